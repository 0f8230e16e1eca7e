// Package attach puts eBPF programs in force at network devices, so that they outlive the
// process and a later one can take them over: by tcx where the kernel has it, else as
// filters of the clsact qdisc (tc-bpf(8)).
//
// Hook is one place; Points are those of all programs of a layer, which the next process
// finds by their pins or filters.
//
// It attaches what it is told to and takes away nothing else: of a device that has a
// clsact qdisc, that goes only when nobody has a filter in it. It is not for seeing what
// others have attached.
//
// Costs: a few system calls each; in another namespace also a thread (kernel/netns).
package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/netns"
)

// Attachment is a program in force at a hook. It outlives the process.
type Attachment interface {
	// Run makes the hook run another program, without a moment of none.
	Run(*ebpf.Program) error
	// Alive says whether it is still in force at its hook.
	Alive() bool
	// Keep makes sure that it outlives the process, and Kept says whether it will.
	Keep() error
	Kept() bool
	// Name is of the device, "eth0", or "device 12" where its number is all one knows.
	Name() string
	// ID is the kernel's number of it.
	ID() uint32
	// Close lets go of it; Detach takes it out of force.
	Close()
	Detach() error
}

// HaveTCX says whether the kernel has tcx, which Linux 6.6 brought. It finds out by asking
// for the programs of the loopback device, which every namespace has.
func HaveTCX() bool {
	_, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
	return err == nil
}

// Hook is one direction of a network device.
type Hook struct {
	// Netns is the path of the device's namespace, "" for this process' own.
	Netns string
	// Device is its index, Name what it is called in messages.
	Device int
	Name   string
	// Attach is AttachTCXIngress or AttachTCXEgress, of filters too.
	Attach ebpf.AttachType
}

// TCX attaches a program at a place among those that are there. Nothing is pinned before
// Keep; with pin "" it is not to be.
func (h Hook) TCX(program *ebpf.Program, anchor link.Anchor, pin string) (*Link, error) {
	var made link.Link
	err := netns.In(h.Netns, func() (err error) {
		made, err = link.AttachTCX(link.TCXOptions{Interface: h.Device, Program: program, Attach: h.Attach, Anchor: anchor})
		return err
	})
	if err != nil {
		return nil, err
	}
	return &Link{Kernel: made, Pin: pin, Where: h.Name, Place: h.Place}, nil
}

// ahead is TCX right before the program of that name. Not ok where there is none.
func (h Hook) ahead(of string, program *ebpf.Program, pin string) (made *Link, ok bool) {
	id, ok := h.find(of)
	if !ok {
		return nil, false
	}
	made, err := h.TCX(program, link.BeforeProgramByID(id), pin)
	return made, err == nil // it may have gone meanwhile
}

// find is the program of a name that runs at this hook by tcx.
func (h Hook) find(name string) (id ebpf.ProgramID, found bool) {
	if name == "" {
		return 0, false
	}
	programs, err := h.Programs()
	if err != nil {
		return 0, false
	}
	for _, id := range programs {
		if NameOf(id) == name {
			return id, true
		}
	}
	return 0, false
}

// Programs are those that run at this hook by tcx, in the order in which packets meet them.
func (h Hook) Programs() (ids []ebpf.ProgramID, err error) {
	var there *link.QueryResult
	err = netns.In(h.Netns, func() (err error) {
		there, err = link.QueryPrograms(link.QueryOptions{Target: h.Device, Attach: h.Attach})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list the programs at device %d: %w", h.Device, err)
	}
	for _, program := range there.Programs {
		ids = append(ids, program.ID)
	}
	return ids, nil
}

// NameOf is what the kernel calls a program, "" if that has gone.
func NameOf(id ebpf.ProgramID) string {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

// Open opens the link of this hook that an earlier process pinned.
func (h Hook) Open(pin string) (*Link, error) {
	return Open(pin, h.Name, h.Place)
}

// Place recognizes a link of this hook's device.
func (h Hook) Place(info *link.Info) bool {
	tcx := info.TCX()
	return tcx != nil && int(tcx.Ifindex) == h.Device
}

// Link is an Attachment that is a link of the kernel, at a device or elsewhere.
type Link struct {
	Kernel link.Link
	// Pin is the path at which Keep pins it, Where what Name returns.
	Pin   string
	Where string
	// Place recognizes a link that is still in force where it is meant to be.
	Place func(*link.Info) bool
}

// Open opens a pinned link of any type, for the one who may Keep it: another that was to have
// its pin, when a process was killed, is taken out of force. The error wraps fs.ErrNotExist
// where there is none.
func Open(pin, where string, place func(*link.Info) bool) (*Link, error) {
	if err := RemovePin(pin + bpfmap.NextSuffix); err != nil {
		return nil, err
	}
	pinned, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, fmt.Errorf("open pinned link %s: %w", filepath.Base(pin), err)
	}
	return &Link{Kernel: pinned, Pin: pin, Where: where, Place: place}, nil
}

// Run implements Attachment.
func (l *Link) Run(program *ebpf.Program) error { return l.Kernel.Update(program) }

// Alive implements Attachment.
func (l *Link) Alive() bool {
	info, err := l.Kernel.Info()
	return err == nil && l.Place(info)
}

// Name implements Attachment.
func (l *Link) Name() string { return l.Where }

// ID implements Attachment.
func (l *Link) ID() uint32 {
	info, err := l.Kernel.Info()
	if err != nil {
		return 0
	}
	return uint32(info.ID)
}

// Kept implements Attachment: the pin is there and leads to this very link.
func (l *Link) Kept() bool {
	pinned, err := link.LoadPinnedLink(l.Pin, nil)
	if err != nil {
		return false
	}
	defer pinned.Close()
	info, err := pinned.Info()
	return err == nil && uint32(info.ID) == l.ID()
}

// Keep implements Attachment. Where the pin is that of the link before it there is no moment
// without one: whoever is killed leaves one of the two in force.
func (l *Link) Keep() error {
	if l.Kept() {
		return nil
	}
	next := l.Pin + bpfmap.NextSuffix
	_ = os.Remove(next)
	_ = l.Kernel.Unpin() // it may remember a pin that somebody removed
	err := l.Kernel.Pin(next)
	if err == nil {
		err = os.Rename(next, l.Pin)
	}
	if err != nil {
		return fmt.Errorf("pin %s: %w", l.Pin, err)
	}
	return nil
}

// Close implements Attachment.
func (l *Link) Close() { l.Kernel.Close() }

// Detach implements Attachment. A pin that leads elsewhere stays.
func (l *Link) Detach() error {
	kept := l.Kept()
	_ = l.Kernel.Detach() // also from processes that still hold it; Linux 5.9
	l.Kernel.Close()
	if !kept {
		return nil
	}
	return unpin(l.Pin)
}

// RemovePin removes a pin, or an empty folder of them; a link that is pinned there is
// taken out of force. Absent is success.
func RemovePin(path string) error {
	if attached, err := link.LoadPinnedLink(path, nil); err == nil {
		_ = attached.Detach()
		attached.Close()
	}
	return unpin(path)
}

func unpin(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin %s: %w", path, err)
	}
	return nil
}
