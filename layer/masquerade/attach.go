package masquerade

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
	bpflink "github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer"
)

var haveTCX = attach.HaveTCX

// hook is a program and the device at which it runs.
type hook struct {
	program string
	device  int
}

// programs are those at devices: what leaves is seen behind all others, which see it as
// the pod sent it, and what comes before all others. The values stand for that where there
// are filters: the service layer's have 0x6d72 and 0x6d73, those of routes 0x6d74.
var programs = map[string]uint16{
	datapathProgMasqFromWire: filterFirst,
	datapathProgMasqFromL3:   filterFirst,
	datapathProgMasqToWire:   filterLast,
	datapathProgMasqToL3:     filterLast,
}

const filterFirst, filterLast = 0x6d71, 0x6d75

// hooksOf are the programs of a device: answers can come back before anything leaves.
func hooksOf(d link.Device) []hook {
	if d.Layer3 {
		return []hook{{datapathProgMasqFromL3, d.Index}, {datapathProgMasqToL3, d.Index}}
	}
	return []hook{{datapathProgMasqFromWire, d.Index}, {datapathProgMasqToWire, d.Index}}
}

// hookOf reads the name of a pin.
func hookOf(pin string) (hook, bool) {
	for program := range programs {
		index, ok := strings.CutPrefix(pin, layer.LinkPrefix+program+"_")
		if device, err := strconv.Atoi(index); ok && err == nil {
			return hook{program, device}, true
		}
	}
	return hook{}, false
}

func (h hook) pin() string { return layer.LinkPrefix + h.program + "_" + strconv.Itoa(h.device) }

func (h hook) attach() ebpf.AttachType {
	if programs[h.program] == filterLast {
		return ebpf.AttachTCXEgress
	}
	return ebpf.AttachTCXIngress
}

func (h hook) anchor() bpflink.Anchor {
	if programs[h.program] == filterLast {
		return bpflink.Tail()
	}
	return bpflink.Head()
}

// hooks are those with a program, in order.
func (d *datapath) hooks() []hook {
	return slices.SortedFunc(maps.Keys(d.attached), func(a, b hook) int {
		return cmp.Or(cmp.Compare(a.program, b.program), cmp.Compare(a.device, b.device))
	})
}

func (d *datapath) hookAt(at hook, name string) attach.Hook {
	return attach.Hook{Netns: d.settings.Netns, Device: at.device, Name: name, Attach: at.attach()}
}

func (d *datapath) filterAt(at hook, name string) *attach.Filter {
	return &attach.Filter{Hook: d.hookAt(at, name), Program: at.program, Priority: programs[at.program]}
}

func (d *datapath) pinAt(at hook) string { return filepath.Join(d.settings.Pins, at.pin()) }

// attach implements host. A device that has gone is no error.
func (d *datapath) attach(to link.Device) error {
	for _, at := range hooksOf(to) {
		err := d.attachAt(at, to.Name)
		if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOLINK) {
			return fmt.Errorf("attach %s to %s: %w", at.program, to.Name, err)
		}
	}
	return nil
}

func (d *datapath) attachAt(at hook, name string) error {
	if a := d.attached[at]; a != nil && a.Alive() {
		return a.Keep()
	}
	_ = d.detachAt(at)
	if !d.tcx {
		f := d.filterAt(at, name)
		if err := f.Begin(d.programs[at.program]); err != nil {
			return err
		}
		d.attached[at] = f
		return nil
	}
	made, err := d.hookAt(at, name).TCX(d.programs[at.program], at.anchor(), d.pinAt(at))
	if err != nil {
		return err
	}
	d.attached[at] = made
	return made.Keep()
}

// attachedAt implements host.
func (d *datapath) attachedAt(device link.Device) bool {
	return !slices.ContainsFunc(hooksOf(device), func(at hook) bool {
		a := d.attached[at]
		return a == nil || !a.Alive()
	})
}

// detach implements host.
func (d *datapath) detach(device int) error {
	var failures []error
	for _, at := range d.hooks() {
		if at.device == device {
			failures = append(failures, d.detachAt(at))
		}
	}
	return errors.Join(failures...)
}

func (d *datapath) detachAt(at hook) error {
	a := d.attached[at]
	delete(d.attached, at)
	if a == nil {
		return nil
	}
	return a.Detach()
}

// devices implements host. What is left of those that have gone is forgotten.
func (d *datapath) devices() ([]link.Device, error) {
	found, err := devices(d.settings.Netns)
	if err != nil {
		return nil, err
	}
	for _, at := range d.hooks() {
		if !slices.ContainsFunc(found, func(one link.Device) bool { return one.Index == at.device }) {
			_ = d.detachAt(at)
		}
	}
	return found, nil
}

func devices(path string) ([]link.Device, error) {
	n, err := link.Open(path)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	return n.Devices()
}

// openAttachments opens what an earlier process has in force, and clears away what is left
// of devices that have gone.
func (d *datapath) openAttachments() error {
	found, err := devices(d.settings.Netns)
	if err != nil {
		return err
	}
	names := make(map[int]string, len(found))
	for _, one := range found {
		names[one.Index] = one.Name
		for program := range programs {
			at := hook{program, one.Index}
			if f := d.filterAt(at, one.Name); !d.tcx && f.Alive() {
				d.attached[at] = f
			}
		}
	}
	if !d.tcx {
		return nil
	}
	pins, err := os.ReadDir(d.settings.Pins)
	if err != nil {
		return fmt.Errorf("read pin folder: %w", err)
	}
	for _, entry := range pins {
		at, ok := hookOf(entry.Name())
		if !ok {
			continue
		}
		l, err := d.hookAt(at, names[at.device]).Open(d.pinAt(at))
		if err != nil {
			return err
		}
		if l.Alive() {
			d.attached[at] = l
		} else {
			_ = l.Detach()
		}
	}
	return nil
}

// removal is what Remove would do: programs first, then the maps, and the folder if it is
// empty then.
func removal(settings Settings) (layer.Changes, error) {
	var changes layer.Changes
	if !haveTCX() {
		d := &datapath{settings: settings, attached: map[hook]attach.Attachment{}}
		if err := d.openAttachments(); err != nil {
			return nil, err
		}
		for _, at := range d.hooks() {
			a := d.attached[at]
			changes = append(changes, layer.Gone(layer.Filter{Attachment: a, What: at.program + " of " + a.Name()}))
		}
	}
	pins, err := layer.PinsGone(settings.Pins, func(name string) bool {
		_, isLink := hookOf(name)
		return isLink || slices.Contains(pinnedMaps, strings.TrimSuffix(name, bpfmap.NextSuffix))
	})
	return append(changes, pins...), err
}
