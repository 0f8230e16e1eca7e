package route

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
	"github.com/millrace/millrace/layer"
)

// linkPrefix is of the pins of links; the program and the index of the device follow.
const linkPrefix = layer.LinkPrefix

// hook is a program and the device at which it runs.
type hook struct {
	program string
	device  int
}

// programs are those of the layer.
var programs = []string{datapathProgRouteFromPod, datapathProgRouteFromWire, datapathProgRouteToRemote, datapathProgRouteUnwrapped}

// hookOf reads the name of a pin.
func hookOf(pin string) (hook, bool) {
	for _, program := range programs {
		index, ok := strings.CutPrefix(pin, linkPrefix+program+"_")
		if device, err := strconv.Atoi(index); ok && err == nil {
			return hook{program, device}, true
		}
	}
	return hook{}, false
}

func (h hook) pin() string { return linkPrefix + h.program + "_" + strconv.Itoa(h.device) }

func (h hook) attach() ebpf.AttachType {
	if h.program == datapathProgRouteToRemote {
		return ebpf.AttachTCXEgress
	}
	return ebpf.AttachTCXIngress
}

func (p port) hook() hook { return hook{p.program(), p.Index} }

// hooks are those with a program, in order.
func (d *datapath) hooks() []hook {
	return slices.SortedFunc(maps.Keys(d.attached), func(a, b hook) int {
		return cmp.Or(cmp.Compare(a.program, b.program), cmp.Compare(a.device, b.device))
	})
}

var haveTCX = attach.HaveTCX

// attach implements host.
func (d *datapath) attach(to port) error {
	err := d.attachAt(to.hook(), to.Name)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOLINK) {
		return nil // the pod has gone
	}
	return err
}

// attachAt puts a program in force behind all others: what translates a packet to a
// Service has to come before what sends it away.
func (d *datapath) attachAt(at hook, name string) error {
	if a := d.attached[at]; a != nil && a.Alive() {
		return a.Keep()
	}
	_ = d.detachAt(at)
	made, err := d.make(at, name)
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", at.program, name, err)
	}
	d.attached[at] = made
	return errors.Join(made.Keep(), d.notePort(at, true))
}

// notePort tells the programs that a pod is behind a device, or not any more.
func (d *datapath) notePort(at hook, there bool) error {
	if at.program != datapathProgRouteFromPod {
		return nil
	}
	ports := d.maps[datapathMapPorts]
	if there {
		return ports.Put(uint32(at.device), uint8(1))
	}
	if err := ports.Delete(uint32(at.device)); !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// notePorts tells the programs so of all devices: one may have gone while no process looked,
// and what has its number next is no pod's.
func (d *datapath) notePorts() error {
	ports := bpfmap.New[uint32, uint8](d.maps[datapathMapPorts])
	known, err := ports.All()
	if err != nil {
		return err
	}
	var gone []uint32
	for device := range known {
		if d.attached[hook{datapathProgRouteFromPod, int(device)}] == nil {
			gone = append(gone, device)
		}
	}
	failures := ports.Delete(gone)
	for at := range d.attached {
		failures = append(failures, d.notePort(at, true))
	}
	return errors.Join(failures...)
}

func (d *datapath) make(at hook, name string) (attach.Attachment, error) {
	if !d.tcx {
		f := d.filterAt(at, name)
		return f, f.Begin(d.programs[at.program])
	}
	return d.hookAt(at, name).TCX(d.programs[at.program], bpflink.Tail(), d.pinAt(at))
}

func (d *datapath) hookAt(at hook, name string) attach.Hook {
	return attach.Hook{Netns: d.settings.Netns, Device: at.device, Name: name, Attach: at.attach()}
}

func (d *datapath) pinAt(at hook) string { return filepath.Join(d.settings.Pins, at.pin()) }

// detach implements host.
func (d *datapath) detach(from port) error { return d.detachAt(from.hook()) }

func (d *datapath) detachAt(at hook) error {
	a := d.attached[at]
	delete(d.attached, at)
	if a == nil {
		return nil
	}
	return errors.Join(d.notePort(at, false), a.Detach())
}

// openAttachments opens what an earlier process has in force.
func (d *datapath) openAttachments() error {
	if !d.tcx {
		return d.openFilters()
	}
	found, err := os.ReadDir(d.settings.Pins)
	if err != nil {
		return fmt.Errorf("read pin folder: %w", err)
	}
	for _, entry := range found {
		at, ok := hookOf(entry.Name())
		if !ok {
			continue
		}
		l, err := d.hookAt(at, fmt.Sprintf("device %d", at.device)).Open(d.pinAt(at))
		if err != nil {
			return err
		}
		if !l.Alive() {
			_ = l.Detach()
			continue
		}
		d.attached[at] = l
	}
	return nil
}

// filterPriority is of the filters of the clsact qdisc (tc-bpf(8)) that stand for tcx
// before Linux 6.6: behind those of the service layer, which has 0x6d72 and 0x6d73. They
// need no pin, for they live as long as the device.
const filterPriority = 0x6d74

func (d *datapath) filterAt(at hook, name string) *attach.Filter {
	return &attach.Filter{Hook: d.hookAt(at, name), Program: at.program, Priority: filterPriority}
}

// openFilters takes over the filters that an earlier process left.
func (d *datapath) openFilters() error {
	devices, err := d.devices()
	if err != nil {
		return err
	}
	for _, one := range devices {
		for _, program := range programs {
			at := hook{program, one.Index}
			if f := d.filterAt(at, one.Name); f.Alive() {
				d.attached[at] = f
			}
		}
	}
	return nil
}

// removal is what Remove would do: routes first, so that nothing is sent that nobody
// takes, then the device, filters and links, and the maps, the folder last if it is empty
// then.
func removal(settings Settings) (layer.Changes, error) {
	var changes layer.Changes
	d := &datapath{settings: settings, attached: map[hook]attach.Attachment{}}
	routes, err := d.routes()
	if err != nil {
		return nil, err
	}
	for _, row := range routes {
		changes = append(changes, layer.Gone(goneRoute{d, row}))
	}
	if there, err := d.found(); err == nil && there != nil {
		changes = append(changes, layer.Gone(goneDevice{d}))
	}
	if !haveTCX() {
		if err := d.openFilters(); err != nil {
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

// goneRoute is a route that is to be removed.
type goneRoute struct {
	d   *datapath
	row *Row
}

// Object implements layer.Subject.
func (g goneRoute) Object() string { return g.row.Object() }

// Detail implements layer.Subject.
func (g goneRoute) Detail() string { return "" }

// Remove implements layer.Removable.
func (g goneRoute) Remove() error { return g.d.dropRoute(g.row) }

// goneDevice is the vxlan device that is to be removed.
type goneDevice struct{ d *datapath }

// Object implements layer.Subject.
func (g goneDevice) Object() string { return "device " + g.d.settings.device() }

// Detail implements layer.Subject.
func (g goneDevice) Detail() string { return "" }

// Remove implements layer.Removable.
func (g goneDevice) Remove() error { return g.d.dropDevice() }
