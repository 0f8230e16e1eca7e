// Package conntrack says whether programs can ask the kernel which connections it tracks
// (nf_conntrack), and makes programs that do without it.
//
// It writes nothing.
package conntrack

import (
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// folder is there while the kernel has nf_conntrack, as a module or built in.
const folder = "/sys/module/nf_conntrack"

// IsLoaded says whether the kernel has nf_conntrack now.
func IsLoaded() bool {
	_, err := os.Stat(folder)
	return err == nil
}

// AskNobody takes the calls out of programs by which they would ask: nobody makes them,
// but loading would look for their targets in all modules.
func AskNobody(spec *ebpf.CollectionSpec) {
	for _, program := range spec.Programs {
		for i := range program.Instructions {
			if program.Instructions[i].IsKfuncCall() {
				program.Instructions[i] = asm.Mov.Imm(asm.R0, 0)
			}
		}
	}
}
