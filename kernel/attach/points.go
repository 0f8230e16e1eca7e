package attach

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
)

// PinPrefix begins the names of pins of links.
const PinPrefix = "link_"

// Point is a program, by its name, and the index of the device at which it runs.
type Point struct {
	Program string
	Device  int
}

// Pin is the name of its pin.
func (at Point) Pin() string { return PinPrefix + at.Program + "_" + strconv.Itoa(at.Device) }

// Way is how a program runs at devices.
type Way struct {
	// Attach is AttachTCXIngress or AttachTCXEgress.
	Attach ebpf.AttachType
	// Order is its place among the others, Former that in earlier versions if it was another.
	Order, Former Order
	// Ahead is a program of another layer's, by its name, that this one stands before where
	// that is at the device already, instead of behind it; with tcx only.
	Ahead string
}

// Points are where programs of one owner run, and run on when the process has ended: by
// links that are pinned in one folder, or by filters.
type Points struct {
	// Netns is the path of the devices' namespace, "" for this process' own.
	Netns string
	// Pins is the folder of the links' pins.
	Pins string
	// Ways are those of each program.
	Ways map[string]Way
	// TCX says that they are links (HaveTCX).
	TCX bool

	attached map[Point]Attachment
}

// All are those with a program, by program and device.
func (p *Points) All() []Point {
	return slices.SortedFunc(maps.Keys(p.attached), func(a, b Point) int {
		return cmp.Or(cmp.Compare(a.Program, b.Program), cmp.Compare(a.Device, b.Device))
	})
}

// At is what is attached at a point, nil if nothing was.
func (p *Points) At(at Point) Attachment { return p.attached[at] }

// Alive says whether the program is in force there.
func (p *Points) Alive(at Point) bool {
	a := p.attached[at]
	return a != nil && a.Alive()
}

// Attach puts a program in force at a device, which errors call by its name. One that is
// in force there already stays.
func (p *Points) Attach(at Point, device string, program *ebpf.Program) error {
	if p.Alive(at) {
		return p.attached[at].Keep()
	}
	_ = p.Detach(at)
	made, err := p.begin(at, device, program)
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", at.Program, device, err)
	}
	if p.attached == nil {
		p.attached = map[Point]Attachment{}
	}
	p.attached[at] = made
	return made.Keep()
}

// DeviceGone says that attaching failed because the device has gone, as those of pods do
// at any moment.
func DeviceGone(err error) bool { return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOLINK) }

func (p *Points) begin(at Point, device string, program *ebpf.Program) (Attachment, error) {
	if !p.TCX {
		f := p.filter(at, device)
		return f, f.Begin(program)
	}
	way, hook := p.Ways[at.Program], p.hook(at, device)
	if made, ok := hook.ahead(way.Ahead, program, p.pin(at)); ok {
		return made, nil
	}
	return hook.TCX(program, way.Order.anchor(), p.pin(at))
}

func (p *Points) hook(at Point, device string) Hook {
	return Hook{Netns: p.Netns, Device: at.Device, Name: device, Attach: p.Ways[at.Program].Attach}
}

func (p *Points) filter(at Point, device string) *Filter {
	way := p.Ways[at.Program]
	return &Filter{Hook: p.hook(at, device), Program: at.Program, Priority: way.Order, Former: way.Former}
}

func (p *Points) pin(at Point) string { return filepath.Join(p.Pins, at.Pin()) }

// Detach takes the program out of force. Absent is success.
func (p *Points) Detach(at Point) error {
	a := p.attached[at]
	delete(p.attached, at)
	if a == nil {
		return nil
	}
	return a.Detach()
}

// Open opens what an earlier process has in force, and clears away what is left of devices
// that have gone. The programs are still those of that process: see Switch.
func (p *Points) Open() error {
	devices, err := p.devices()
	if err != nil {
		return err
	}
	p.attached = map[Point]Attachment{}
	if !p.TCX {
		p.openFilters(devices)
		return nil
	}
	pins, err := os.ReadDir(p.Pins)
	if err != nil {
		return fmt.Errorf("read pin folder: %w", err)
	}
	for _, pin := range pins {
		at, ok := p.Point(pin.Name())
		if !ok {
			continue
		}
		l, err := p.hook(at, devices[at.Device]).Open(p.pin(at))
		if err != nil {
			return err
		}
		if l.Alive() {
			p.attached[at] = l
		} else {
			_ = l.Detach()
		}
	}
	return nil
}

func (p *Points) openFilters(devices map[int]string) {
	for index, name := range devices {
		for program := range p.Ways {
			at := Point{program, index}
			if f := p.filter(at, name); f.Alive() {
				p.attached[at] = f
			}
		}
	}
}

// devices are the names of those that are there, by index.
func (p *Points) devices() (names map[int]string, err error) {
	n, err := link.Open(p.Netns)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	found, err := n.Devices()
	names = make(map[int]string, len(found))
	for _, one := range found {
		names[one.Index] = one.Name
	}
	return names, err
}

// Point reads the name of a pin.
func (p *Points) Point(pin string) (at Point, ok bool) {
	for program := range p.Ways {
		index, ok := strings.CutPrefix(pin, PinPrefix+program+"_")
		if device, err := strconv.Atoi(index); ok && err == nil {
			return Point{program, device}, true
		}
	}
	return Point{}, false
}

// Switch makes all points run programs, by their names, without a moment of none. Points
// whose device has gone are forgotten.
func (p *Points) Switch(programs map[string]*ebpf.Program) error {
	for at, a := range p.attached {
		if err := a.Run(programs[at.Program]); err != nil {
			if a.Alive() {
				return fmt.Errorf("switch %s at device %d to the new program: %w", at.Program, at.Device, err)
			}
			_ = p.Detach(at)
		}
	}
	return nil
}

// Lost are the names of pins that somebody took away.
func (p *Points) Lost() (pins []string) {
	for _, at := range p.All() {
		if a := p.attached[at]; a.Alive() && !a.Kept() {
			pins = append(pins, at.Pin())
		}
	}
	return pins
}

// Keep brings lost pins back.
func (p *Points) Keep() error {
	var failures []error
	for _, a := range p.attached {
		failures = append(failures, a.Keep())
	}
	return errors.Join(failures...)
}

// Close lets go of all; they stay in force.
func (p *Points) Close() {
	for _, a := range p.attached {
		a.Close()
	}
}
