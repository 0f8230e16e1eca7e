package service

import (
	"fmt"
	"maps"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// trackerFolder is there while the kernel has nf_conntrack, as a module or built in.
const trackerFolder = "/sys/module/nf_conntrack"

// findTracker finds out whether the programs can ask the kernel which connections it
// tracks, by loading one. It takes Linux 5.18, and where nf_conntrack is a module that
// it is loaded by now, and CAP_SYS_ADMIN: the kernel shows modules' types to nobody
// else. Without, a source port may be another one's, by chance (docs/service.md).
func (d *datapath) findTracker() {
	if _, err := os.Stat(trackerFolder); err != nil || !d.settings.Wire {
		return
	}
	if asker, err := loadAsker(); err == nil {
		d.asksConntrack = true
		asker.Close()
	}
}

// loadAsker loads the program ask_conntrack alone.
func loadAsker() (*ebpf.Program, error) {
	spec, err := loadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read embedded programs: %w", err)
	}
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return name != datapathProgAskConntrack })
	maps.DeleteFunc(spec.Maps, func(name string, _ *ebpf.MapSpec) bool { return !isConstants(name) })
	if err := spec.Variables[datapathVarAsksConntrack].Set(true); err != nil {
		return nil, err
	}
	loaded, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, err
	}
	defer loaded.Close()
	return loaded.DetachProgram(datapathProgAskConntrack), nil
}

// askNobody takes the calls out of programs by which they would ask: nobody makes them,
// but loading would look for their targets in all modules.
func askNobody(spec *ebpf.CollectionSpec) {
	for _, program := range spec.Programs {
		for i := range program.Instructions {
			if program.Instructions[i].IsKfuncCall() {
				program.Instructions[i] = asm.Mov.Imm(asm.R0, 0)
			}
		}
	}
}
