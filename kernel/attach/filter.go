package attach

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// filterPrefix tells our filters from those of others.
const filterPrefix = "millrace:"

// Filter is an Attachment to the clsact qdisc of a device, for kernels without tcx. It
// needs no pin, for it lives as long as the device.
type Filter struct {
	Hook Hook
	// Program is its name, which the filter has too.
	Program string
	// Priority is the filter's place, and no other program's of ours at this hook: those
	// with a smaller number run before it. Filters of others are never touched.
	Priority uint16
}

func (f *Filter) parent() uint32 {
	if f.Hook.Attach == ebpf.AttachTCXEgress {
		return netlink.HANDLE_MIN_EGRESS
	}
	return netlink.HANDLE_MIN_INGRESS
}

func (f *Filter) attrs() netlink.FilterAttrs {
	return netlink.FilterAttrs{
		LinkIndex: f.Hook.Device, Parent: f.parent(), Handle: netlink.MakeHandle(0, 1),
		Protocol: unix.ETH_P_ALL, Priority: f.Priority,
	}
}

func (f *Filter) title() string { return filterPrefix + f.Program }

func (f *Filter) inNetns(do func() error) error { return netns.In(f.Hook.Netns, do) }

// Begin attaches a program where there is none yet.
func (f *Filter) Begin(program *ebpf.Program) error {
	err := f.inNetns(func() error { return netlink.QdiscAdd(Clsact(f.Hook.Device)) })
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return f.Run(program)
}

// Run implements Attachment.
func (f *Filter) Run(program *ebpf.Program) error {
	return f.inNetns(func() error {
		return netlink.FilterReplace(&netlink.BpfFilter{FilterAttrs: f.attrs(), Fd: program.FD(), Name: f.title(), DirectAction: true})
	})
}

// find returns the program's number; false where the filter is not there.
func (f *Filter) find() (id int, found bool) {
	_ = f.inNetns(func() error {
		filters, err := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: f.Hook.Device}}, f.parent())
		for _, there := range filters {
			if ours, ok := there.(*netlink.BpfFilter); ok && ours.Attrs().Priority == f.Priority && ours.Name == f.title() {
				id, found = ours.Id, true
			}
		}
		return err
	})
	return id, found
}

// Alive implements Attachment.
func (f *Filter) Alive() bool {
	_, found := f.find()
	return found
}

// Keep implements Attachment.
func (f *Filter) Keep() error { return nil }

// Kept implements Attachment.
func (f *Filter) Kept() bool { return true }

// Name implements Attachment.
func (f *Filter) Name() string { return f.Hook.Name }

// ID implements Attachment: it is the program's, 0 where the filter is not there.
func (f *Filter) ID() uint32 {
	id, _ := f.find()
	return uint32(id)
}

// Close implements Attachment.
func (f *Filter) Close() {}

// Detach implements Attachment.
func (f *Filter) Detach() error {
	err := f.inNetns(func() error {
		err := netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: f.attrs()})
		dropEmptyQdisc(f.Hook.Device)
		return err
	})
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return nil // EINVAL: the device has no clsact qdisc
	}
	return fmt.Errorf("remove filter %s of %s: %w", f.title(), f.Hook.Name, err)
}

// dropEmptyQdisc removes a device's clsact qdisc if nobody has a filter in it.
func dropEmptyQdisc(device int) {
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		left, err := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: device}}, parent)
		if err != nil || len(left) > 0 {
			return
		}
	}
	_ = netlink.QdiscDel(Clsact(device)) // left behind it does nothing
}

// Clsact is the qdisc of a device in which filters of ours are.
func Clsact(device int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: device, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}
