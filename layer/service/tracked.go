package service

import (
	"fmt"
	"maps"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/conntrack"
)

// findTracker finds out whether the programs can ask the kernel which connections it
// tracks, by loading one. It takes Linux 5.18, and where nf_conntrack is a module that
// it is loaded by now, and CAP_SYS_ADMIN: the kernel shows modules' types to nobody
// else. Without, a source port may be another one's, by chance (docs/service.md).
func (d *datapath) findTracker() {
	if !conntrack.IsLoaded() || !d.settings.Wire {
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
