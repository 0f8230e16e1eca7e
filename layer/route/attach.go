package route

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	bpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer"
)

// linkPrefix is of the pins of links; the program and the index of the device follow.
const linkPrefix = "link_"

// hook is a program and the device at which it runs.
type hook struct {
	program string
	device  int
}

// programs are those of the layer.
var programs = []string{datapathProgRouteFromPod, datapathProgRouteFromWire, datapathProgRouteToRemote}

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

// attachment is a program in force at a device. It outlives the process.
type attachment interface {
	// run makes it another program, without a moment of none.
	run(*ebpf.Program) error
	alive() bool
	// keep makes sure that it outlives the process, and kept says whether it will.
	keep() error
	kept() bool
	name() string
	id() uint32
	close()
	detach() error
}

// haveTCX finds out by asking for the tcx programs of the loopback device, which
// every namespace has.
var haveTCX = func() bool {
	_, err := bpflink.QueryPrograms(bpflink.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
	return err == nil
}

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
	if a := d.attached[at]; a != nil && a.alive() {
		return a.keep()
	}
	_ = d.detachAt(at)
	made, err := d.make(at, name)
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", at.program, name, err)
	}
	d.attached[at] = made
	return errors.Join(made.keep(), d.notePort(at, true))
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

func (d *datapath) make(at hook, name string) (attachment, error) {
	if !d.tcx {
		f := &filter{d: d, at: at, device: name}
		return f, f.begin()
	}
	var made bpflink.Link
	err := d.inNetns(func() (err error) {
		made, err = bpflink.AttachTCX(bpflink.TCXOptions{Interface: at.device, Program: d.programs[at.program], Attach: at.attach(), Anchor: bpflink.Tail()})
		return err
	})
	return &linked{made, d, at, name}, err
}

// detach implements host.
func (d *datapath) detach(from port) error { return d.detachAt(from.hook()) }

func (d *datapath) detachAt(at hook) error {
	a := d.attached[at]
	delete(d.attached, at)
	if a == nil {
		return nil
	}
	return errors.Join(d.notePort(at, false), a.detach())
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
		pinned, err := bpflink.LoadPinnedLink(filepath.Join(d.settings.Pins, entry.Name()), nil)
		if err != nil {
			return fmt.Errorf("open pinned link %s: %w", entry.Name(), err)
		}
		l := &linked{pinned, d, at, fmt.Sprintf("device %d", at.device)}
		if !l.alive() {
			_ = l.detach()
			continue
		}
		d.attached[at] = l
	}
	return nil
}

// linked is a link of the kernel.
type linked struct {
	bpflink.Link
	d      *datapath
	at     hook
	device string
}

func (l *linked) run(program *ebpf.Program) error { return l.Update(program) }
func (l *linked) name() string                    { return l.device }
func (l *linked) pin() string                     { return filepath.Join(l.d.settings.Pins, l.at.pin()) }
func (l *linked) close()                          { l.Link.Close() }

func (l *linked) alive() bool {
	info, err := l.Info()
	return err == nil && info.TCX() != nil && int(info.TCX().Ifindex) == l.at.device
}

func (l *linked) id() uint32 {
	info, err := l.Info()
	if err != nil {
		return 0
	}
	return uint32(info.ID)
}

func (l *linked) kept() bool {
	pinned, err := bpflink.LoadPinnedLink(l.pin(), nil)
	if err != nil {
		return false
	}
	defer pinned.Close()
	info, err := pinned.Info()
	return err == nil && uint32(info.ID) == l.id()
}

func (l *linked) keep() error {
	if l.kept() {
		return nil
	}
	_ = os.Remove(l.pin()) // that of the one before it
	_ = l.Unpin()          // it may remember a pin that somebody removed
	if err := l.Pin(l.pin()); err != nil {
		return fmt.Errorf("pin %s: %w", l.pin(), err)
	}
	return nil
}

func (l *linked) detach() error {
	kept := l.kept()
	_ = l.Detach() // also from processes that still hold it; Linux 5.9
	l.Link.Close()
	if !kept {
		return nil // the pin is another's
	}
	if err := os.Remove(l.pin()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin %s: %w", l.pin(), err)
	}
	return nil
}

// filterPriority is of the filters of the clsact qdisc (tc-bpf(8)) that stand for tcx
// before Linux 6.6: behind those of the service layer, which has 0x6d72 and 0x6d73. They
// need no pin, for they live as long as the device.
const filterPriority = 0x6d74

// filter is an attachment to the clsact qdisc of a device.
type filter struct {
	d      *datapath
	at     hook
	device string
}

func (f *filter) title() string { return "millrace:" + f.at.program }

func (f *filter) parent() uint32 {
	if f.at.attach() == ebpf.AttachTCXEgress {
		return netlink.HANDLE_MIN_EGRESS
	}
	return netlink.HANDLE_MIN_INGRESS
}

func (f *filter) attrs() netlink.FilterAttrs {
	return netlink.FilterAttrs{LinkIndex: f.at.device, Parent: f.parent(), Handle: netlink.MakeHandle(0, 1), Protocol: unix.ETH_P_ALL, Priority: filterPriority}
}

// begin attaches the program.
func (f *filter) begin() error {
	err := f.d.inNetns(func() error {
		return netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: f.at.device, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}})
	})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return f.run(f.d.programs[f.at.program])
}

func (f *filter) run(program *ebpf.Program) error {
	return f.d.inNetns(func() error {
		return netlink.FilterReplace(&netlink.BpfFilter{FilterAttrs: f.attrs(), Fd: program.FD(), Name: f.title(), DirectAction: true})
	})
}

// find returns the program's number; false where the filter is not there.
func (f *filter) find() (id int, found bool) {
	_ = f.d.inNetns(func() error {
		filters, err := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: f.at.device}}, f.parent())
		for _, there := range filters {
			if ours, ok := there.(*netlink.BpfFilter); ok && ours.Attrs().Priority == filterPriority && ours.Name == f.title() {
				id, found = ours.Id, true
			}
		}
		return err
	})
	return id, found
}

func (f *filter) alive() bool {
	_, found := f.find()
	return found
}

func (f *filter) keep() error  { return nil }
func (f *filter) kept() bool   { return true }
func (f *filter) name() string { return f.device }
func (f *filter) close()       {}

func (f *filter) id() uint32 {
	id, _ := f.find()
	return uint32(id)
}

func (f *filter) detach() error {
	err := f.d.inNetns(func() error {
		err := netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: f.attrs()})
		dropEmptyQdisc(f.at.device)
		return err
	})
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return nil // EINVAL: the device has no clsact qdisc
	}
	return fmt.Errorf("remove filter %s from device %s: %w", f.title(), f.device, err)
}

// dropEmptyQdisc removes a device's clsact qdisc if nobody has a filter in it.
func dropEmptyQdisc(device int) {
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		left, err := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: device}}, parent)
		if err != nil || len(left) > 0 {
			return
		}
	}
	_ = netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: device, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}})
}

// openFilters takes over the filters that an earlier process left.
func (d *datapath) openFilters() error {
	devices, err := d.devices()
	if err != nil {
		return err
	}
	for _, one := range devices {
		for _, program := range programs {
			if f := (&filter{d: d, at: hook{program, one.Index}, device: one.Name}); f.alive() {
				d.attached[f.at] = f
			}
		}
	}
	return nil
}

// remover is a subject of a removal.
type remover interface {
	layer.Subject
	remove() error
}

// removal is what Remove would do: routes first, so that nothing is sent that nobody
// takes, then the device, filters and links, and the maps, the folder last if it is empty
// then.
func removal(settings Settings) (layer.Changes, error) {
	var changes layer.Changes
	take := func(subject remover) { changes = append(changes, layer.Change{Op: layer.Remove, Subject: subject}) }
	d := &datapath{settings: settings, attached: map[hook]attachment{}}
	routes, err := d.routes()
	if err != nil {
		return nil, err
	}
	for _, row := range routes {
		take(goneRoute{d, row})
	}
	if there, err := d.found(); err == nil && there != nil {
		take(goneDevice{d})
	}
	if !haveTCX() {
		if err := d.openFilters(); err != nil {
			return nil, err
		}
		for _, at := range d.hooks() {
			take(d.attached[at].(*filter))
		}
	}
	found, err := os.ReadDir(settings.Pins)
	if errors.Is(err, fs.ErrNotExist) {
		return changes, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read pin folder: %w", err)
	}
	ours := 0
	for _, links := range []bool{true, false} {
		for _, entry := range found {
			name := strings.TrimSuffix(entry.Name(), nextSuffix)
			_, isLink := hookOf(name)
			if isLink == links && (isLink || slices.Contains(pinnedMaps, name)) {
				take(pinned(filepath.Join(settings.Pins, entry.Name())))
				ours++
			}
		}
	}
	if ours == len(found) {
		take(pinned(settings.Pins))
	}
	return changes, nil
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

func (g goneRoute) remove() error { return g.d.dropRoute(g.row) }

// goneDevice is the vxlan device that is to be removed.
type goneDevice struct{ d *datapath }

// Object implements layer.Subject.
func (g goneDevice) Object() string { return "device " + g.d.settings.device() }

// Detail implements layer.Subject.
func (g goneDevice) Detail() string { return "" }

func (g goneDevice) remove() error { return g.d.dropDevice() }

// Object implements layer.Subject: a filter that is to be removed.
func (f *filter) Object() string { return "filter " + f.at.program + " of " + f.device }

// Detail implements layer.Subject.
func (f *filter) Detail() string { return "" }

func (f *filter) remove() error { return f.detach() }

// pinned is a path below the pin folder, or the folder itself.
type pinned string

// Object implements layer.Subject.
func (p pinned) Object() string { return "pin " + string(p) }

// Detail implements layer.Subject.
func (p pinned) Detail() string { return "" }

func (p pinned) remove() error {
	if _, isLink := hookOf(filepath.Base(string(p))); isLink {
		if attached, err := bpflink.LoadPinnedLink(string(p), nil); err == nil {
			_ = attached.Detach()
			attached.Close()
		}
	}
	if err := os.Remove(string(p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin %s: %w", string(p), err)
	}
	return nil
}
