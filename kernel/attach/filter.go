package attach

import (
	"cmp"
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
	Priority Order
	// Former is the place that it had in earlier versions, if it was another. What is there
	// counts as this one, and goes when Run has made this one.
	Former Order
}

func (f *Filter) parent() uint32 {
	if f.Hook.Attach == ebpf.AttachTCXEgress {
		return netlink.HANDLE_MIN_EGRESS
	}
	return netlink.HANDLE_MIN_INGRESS
}

func (f *Filter) attrs(at Order) netlink.FilterAttrs {
	return netlink.FilterAttrs{
		LinkIndex: f.Hook.Device, Parent: f.parent(), Handle: netlink.MakeHandle(0, 1),
		Protocol: unix.ETH_P_ALL, Priority: uint16(at),
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
		err := netlink.FilterReplace(&netlink.BpfFilter{FilterAttrs: f.attrs(f.Priority), Fd: program.FD(), Name: f.title(), DirectAction: true})
		if err != nil {
			return err
		}
		return f.dropFormer()
	})
}

// dropFormer takes the filter of an earlier version away. Up to then a packet met both, the
// new one first.
func (f *Filter) dropFormer() error {
	if f.programs()[f.Former] == 0 {
		return nil
	}
	return netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: f.attrs(f.Former)})
}

// programs are the numbers of those that run at the filter's own places, by place.
func (f *Filter) programs() map[Order]int {
	found := map[Order]int{}
	filters, _ := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: f.Hook.Device}}, f.parent()) // an error: none
	for _, there := range filters {
		ours, ok := there.(*netlink.BpfFilter)
		if at := Order(there.Attrs().Priority); ok && ours.Name == f.title() && (at == f.Priority || at == f.Former) {
			found[at] = ours.Id
		}
	}
	return found
}

// Alive implements Attachment.
func (f *Filter) Alive() bool {
	return f.ID() != 0
}

// Keep implements Attachment.
func (f *Filter) Keep() error { return nil }

// Kept implements Attachment.
func (f *Filter) Kept() bool { return true }

// Name implements Attachment.
func (f *Filter) Name() string { return f.Hook.Name }

// ID implements Attachment: it is the program's, 0 where the filter is not there.
func (f *Filter) ID() (id uint32) {
	_ = f.inNetns(func() error {
		found := f.programs()
		id = uint32(cmp.Or(found[f.Priority], found[f.Former]))
		return nil
	})
	return id
}

// Close implements Attachment.
func (f *Filter) Close() {}

// Detach implements Attachment.
func (f *Filter) Detach() error {
	err := f.inNetns(func() error {
		former := f.dropFormer()
		err := netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: f.attrs(f.Priority)})
		dropEmptyQdisc(f.Hook.Device)
		return cmp.Or(former, err)
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
