package dns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	bpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
)

// linkPrefix is of the pins of links; the index of the device follows. anyLink is of those
// of every version.
const (
	linkPrefix = anyLink + datapathProgDnsFromPod + "_"
	anyLink    = "link_"
)

// translator is the program that makes a query to a Service one to an endpoint
// (layer/service): behind it nobody knows any more what was asked of whom.
const translator = "from_pod"

// attachment is the program in force at a device. It outlives the process.
type attachment interface {
	// run makes it another program, without a moment of none.
	run(*ebpf.Program) error
	// alive says whether it is still in force; inFront, whether it sees queries first.
	alive() bool
	inFront() bool
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

// inNetns runs f where the devices are.
func (d *datapath) inNetns(f func() error) error { return netns.In(d.settings.Netns, f) }

// devices implements host. Those that have gone are forgotten.
func (d *datapath) devices() ([]device, error) {
	n, err := link.Open(d.settings.Netns)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	found, err := n.Devices()
	if err != nil {
		return nil, err
	}
	there := make(map[int]bool, len(found))
	devices := make([]device, 0, len(found))
	for _, one := range found {
		there[one.Index] = true
		a := d.attached[one.Index]
		pod := one.Kind == "veth" && one.PeerElsewhere && !one.DefaultRoute
		if pod || a != nil {
			devices = append(devices, device{Index: one.Index, Name: one.Name, pod: pod, attached: a != nil && a.alive() && a.inFront(), space: one.PeerNamespace})
		}
	}
	for index, a := range d.attached {
		if !there[index] {
			_ = a.detach()
			delete(d.attached, index)
		}
	}
	return devices, nil
}

// attach implements host. One that is not in front any more is taken away first, for a
// program can be at a hook only once: a query in between goes to the server.
func (d *datapath) attach(to device) error {
	if err := d.detach(to); err != nil {
		return err
	}
	made, err := d.make(to)
	if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOLINK) {
		return nil // the pod has gone
	}
	if err != nil {
		return fmt.Errorf("attach %s: %w", datapathProgDnsFromPod, err)
	}
	d.attached[to.Index] = made
	return made.keep()
}

func (d *datapath) make(to device) (attachment, error) {
	if !d.tcx {
		f := &filter{d: d, device: to.Index, at: to.Name}
		return f, f.begin()
	}
	var made bpflink.Link
	err := d.inNetns(func() (err error) {
		made, err = bpflink.AttachTCX(bpflink.TCXOptions{
			Interface: to.Index, Program: d.program, Attach: ebpf.AttachTCXIngress, Anchor: bpflink.Head(),
		})
		return err
	})
	return &linked{made, d, to.Index, to.Name}, err
}

// detach implements host.
func (d *datapath) detach(from device) error {
	a := d.attached[from.Index]
	delete(d.attached, from.Index)
	if a == nil {
		return nil
	}
	return a.detach()
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
		index, ok := strings.CutPrefix(entry.Name(), linkPrefix)
		device, err := strconv.Atoi(index)
		if !ok || err != nil {
			continue
		}
		pinned, err := bpflink.LoadPinnedLink(filepath.Join(d.settings.Pins, entry.Name()), nil)
		if err != nil {
			return fmt.Errorf("open pinned link %s: %w", entry.Name(), err)
		}
		l := &linked{pinned, d, device, "device " + index}
		if !l.alive() {
			_ = l.detach()
			continue
		}
		d.attached[device] = l
	}
	return nil
}

// linked is a link of the kernel.
type linked struct {
	bpflink.Link
	d      *datapath
	device int
	at     string
}

func (l *linked) run(program *ebpf.Program) error { return l.Update(program) }
func (l *linked) name() string                    { return l.at }
func (l *linked) pin() string {
	return filepath.Join(l.d.settings.Pins, linkPrefix+strconv.Itoa(l.device))
}
func (l *linked) close() { l.Link.Close() }

func (l *linked) alive() bool {
	info, err := l.Info()
	return err == nil && info.TCX() != nil && int(info.TCX().Ifindex) == l.device
}

func (l *linked) id() uint32 {
	info, err := l.Info()
	if err != nil {
		return 0
	}
	return uint32(info.ID)
}

// inFront says that the translator is not before it.
func (l *linked) inFront() bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	var there *bpflink.QueryResult
	err = l.d.inNetns(func() (err error) {
		there, err = bpflink.QueryPrograms(bpflink.QueryOptions{Target: l.device, Attach: ebpf.AttachTCXIngress})
		return err
	})
	if err != nil {
		return true // who cannot see cannot mend
	}
	for _, one := range there.Programs {
		if one.ID == info.Program {
			return true
		}
		if programName(one.ID) == translator {
			return false
		}
	}
	return true
}

func programName(id ebpf.ProgramID) string {
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

// Before Linux 6.6 there is no tcx: then the program is a filter of the clsact qdisc
// (tc-bpf(8)). It needs no pin, for it lives as long as the device.
const (
	// filterPriority is the layer's own; the translator's is one more.
	filterPriority = 0x6d71
	filterName     = "millrace:" + datapathProgDnsFromPod
)

// filter is an attachment to the clsact qdisc of a device.
type filter struct {
	d      *datapath
	device int
	at     string
}

func (f *filter) attrs() netlink.FilterAttrs {
	return netlink.FilterAttrs{
		LinkIndex: f.device, Parent: netlink.HANDLE_MIN_INGRESS, Handle: netlink.MakeHandle(0, 1),
		Protocol: unix.ETH_P_ALL, Priority: filterPriority,
	}
}

// begin attaches the program.
func (f *filter) begin() error {
	err := f.d.inNetns(func() error {
		return netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: f.device, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}})
	})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return f.run(f.d.program)
}

func (f *filter) run(program *ebpf.Program) error {
	return f.d.inNetns(func() error {
		return netlink.FilterReplace(&netlink.BpfFilter{FilterAttrs: f.attrs(), Fd: program.FD(), Name: filterName, DirectAction: true})
	})
}

// find returns the program's number; false where the filter is not there.
func (f *filter) find() (id int, found bool) {
	_ = f.d.inNetns(func() error {
		filters, err := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: f.device}}, netlink.HANDLE_MIN_INGRESS)
		for _, there := range filters {
			if ours, ok := there.(*netlink.BpfFilter); ok && ours.Attrs().Priority == filterPriority && ours.Name == filterName {
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

func (f *filter) inFront() bool { return true }
func (f *filter) keep() error   { return nil }
func (f *filter) kept() bool    { return true }
func (f *filter) name() string  { return f.at }
func (f *filter) close()        {}

func (f *filter) id() uint32 {
	id, _ := f.find()
	return uint32(id)
}

func (f *filter) detach() error {
	err := f.d.inNetns(func() error {
		err := netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: f.attrs()})
		dropEmptyQdisc(f.device)
		return err
	})
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return nil // EINVAL: the device has no clsact qdisc
	}
	return fmt.Errorf("remove filter %s from device %s: %w", filterName, f.at, err)
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
	n, err := link.Open(d.settings.Netns)
	if err != nil {
		return err
	}
	defer n.Close()
	devices, err := n.Devices()
	if err != nil {
		return err
	}
	for _, one := range devices {
		if f := (&filter{d: d, device: one.Index, at: one.Name}); f.alive() {
			d.attached[one.Index] = f
		}
	}
	return nil
}

// remover is a subject of a removal.
type remover interface {
	layer.Subject
	remove() error
}

// removal is what Remove would do: filters and links first, so that no program runs on
// maps that are going, the folder last. All that is pinned there goes, also what a later
// version left: the folder is the layer's alone.
func removal(settings Settings) (layer.Changes, error) {
	var changes layer.Changes
	take := func(subject remover) { changes = append(changes, layer.Change{Op: layer.Remove, Subject: subject}) }
	if !haveTCX() {
		d := &datapath{settings: settings, attached: map[int]attachment{}}
		if err := d.openFilters(); err != nil {
			return nil, err
		}
		for _, a := range d.attached {
			take(a.(*filter))
		}
	}
	found, err := os.ReadDir(settings.Pins)
	if errors.Is(err, fs.ErrNotExist) {
		return changes, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read pin folder: %w", err)
	}
	for _, links := range []bool{true, false} {
		for _, entry := range found {
			if strings.HasPrefix(entry.Name(), anyLink) == links {
				take(pinned(filepath.Join(settings.Pins, entry.Name())))
			}
		}
	}
	take(pinned(settings.Pins))
	return changes, nil
}

// Object implements layer.Subject: a filter that is to be removed.
func (f *filter) Object() string { return "filter " + datapathProgDnsFromPod + " of " + f.at }

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
	if strings.HasPrefix(filepath.Base(string(p)), anyLink) {
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
