// Package pinned holds what a layer has in the kernel and finds again by a folder of pins:
// maps, and programs that run at devices (kernel/attach) over them. The next process takes
// maps of the same layout over; where they are of another, the programs of the process before
// serve on, over their own maps, until the new ones are filled: then Settle puts the new
// programs in their places and the new maps at their pins.
//
// It has one owner at a time, which sees to that itself. What else an owner keeps beside its
// maps is not here.
//
// Costs: a few system calls for each map and each device.
package pinned

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
)

// Folder is what one owner has. Its path and names are set before anything else is done.
type Folder struct {
	// Names are of the maps that outlive the process, in the order in which they are pinned.
	Names []string
	// Points are where programs run; it has the folder's path.
	Points attach.Points
	// Maps are those and others that the owner uses; Programs are all.
	Maps     map[string]*ebpf.Map
	Programs map[string]*ebpf.Program

	adopted, settled bool
}

// Make makes the folder, if it is not there.
func (f *Folder) Make() error {
	if err := os.MkdirAll(f.Points.Pins, 0o700); err != nil {
		return fmt.Errorf("make pin folder: %w", err)
	}
	return nil
}

// Adopt opens the maps that an earlier process left, if all are there and like what is wanted
// (bpfmap.Adopt), and says whether. A change of what a field means has to change its size, or
// its map's name.
func (f *Folder) Adopt(like func(name string, found *ebpf.Map) *ebpf.MapSpec) (adopted bool, err error) {
	found, err := bpfmap.Adopt(f.Points.Pins, f.Names, like)
	if f.adopted = found != nil; !f.adopted {
		found = map[string]*ebpf.Map{}
	}
	f.Maps = found
	return f.adopted, err
}

// Load loads the programs over the maps that are there and makes the others; beside those
// with names it keeps those that are named here.
func (f *Folder) Load(spec *ebpf.CollectionSpec, others ...string) (variables map[string]*ebpf.Variable, err error) {
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: f.Maps})
	if err != nil {
		return nil, err
	}
	defer collection.Close()
	for _, names := range [][]string{f.Names, others} {
		for _, name := range names {
			if f.Maps[name] == nil {
				f.Maps[name] = collection.DetachMap(name)
			}
		}
	}
	f.Programs = make(map[string]*ebpf.Program, len(collection.Programs))
	for name := range collection.Programs {
		f.Programs[name] = collection.DetachProgram(name)
	}
	return collection.Variables, nil
}

// TakeOver opens what an earlier process has in force, and says whether all can be settled
// at once: there is nothing in force, or it has these maps.
func (f *Folder) TakeOver() (atOnce bool, err error) {
	err = f.Points.Open()
	return err == nil && (f.adopted || len(f.Points.All()) == 0), err
}

// Settle pins the maps and puts the programs in force where an earlier process' are. Calling
// it again does nothing.
func (f *Folder) Settle() error {
	if f.settled {
		return nil
	}
	err := bpfmap.Pin(f.Points.Pins, f.Names, f.Maps)
	if err == nil {
		err = f.Points.Switch(f.Programs)
	}
	f.settled = err == nil
	return err
}

// Settled says whether Settle has succeeded.
func (f *Folder) Settled() bool { return f.settled }

// Lost are the names of pins that somebody took away; of none before all is settled.
func (f *Folder) Lost() (pins []string) {
	if !f.settled {
		return nil
	}
	for _, name := range f.Names {
		if !bpfmap.IsPinned(f.Maps[name], filepath.Join(f.Points.Pins, name)) {
			pins = append(pins, name)
		}
	}
	return append(pins, f.Points.Lost()...)
}

// Restore brings lost pins back, and the folder.
func (f *Folder) Restore() error {
	if err := f.Make(); err != nil {
		return err
	}
	return errors.Join(bpfmap.Pin(f.Points.Pins, f.Names, f.Maps), f.Points.Keep())
}

// Close lets go of all; what is in force stays so.
func (f *Folder) Close() {
	bpfmap.CloseAll(f.Maps)
	f.Points.Close()
	for _, program := range f.Programs {
		program.Close()
	}
}
