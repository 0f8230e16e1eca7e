package service

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Before Linux 6.6 there is no tcx: then a veth's programs are filters of the
// clsact qdisc (tc-bpf(8)). They need no pin, for they live as long as the device.
const (
	// filterPriority is the layer's own: filters with a smaller number run
	// before it. Those of other programs are never touched.
	filterPriority = 0x6d72
	// besidePriority is where the next version's programs stand while they take
	// over (handover.go).
	besidePriority = filterPriority + 1
	filterHandle   = 1
	filterPrefix   = "millrace:"
)

// filter is an attachment to the clsact qdisc of a device.
type filter struct {
	d        *datapath
	hook     hook
	priority uint16
}

func (f *filter) attrs() netlink.FilterAttrs {
	attrs := netlink.FilterAttrs{
		LinkIndex: f.hook.device,
		Parent:    netlink.HANDLE_MIN_INGRESS,
		Handle:    netlink.MakeHandle(0, filterHandle),
		Protocol:  unix.ETH_P_ALL,
		Priority:  f.priority,
	}
	if f.hook.attach == ebpf.AttachTCXEgress {
		attrs.Parent = netlink.HANDLE_MIN_EGRESS
	}
	return attrs
}

func (f *filter) run(program *ebpf.Program) error {
	return f.d.inNetns(func() error {
		return netlink.FilterReplace(&netlink.BpfFilter{
			FilterAttrs: f.attrs(), Fd: program.FD(), Name: filterPrefix + f.hook.program, DirectAction: true,
		})
	})
}

// find returns the program's number; false where the filter is not there.
func (f *filter) find() (id int, found bool) {
	_ = f.d.inNetns(func() error {
		filters, err := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: f.hook.device}}, f.attrs().Parent)
		for _, there := range filters {
			if ours, ok := there.(*netlink.BpfFilter); ok && ours.Attrs().Priority == f.priority &&
				ours.Name == filterPrefix+f.hook.program {
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

func (f *filter) keep() error { return nil }
func (f *filter) kept() bool  { return true }
func (f *filter) close()      {}

func (f *filter) id() uint32 {
	id, _ := f.find()
	return uint32(id)
}

func (f *filter) detach() error {
	err := f.d.inNetns(func() error {
		err := netlink.FilterDel(&netlink.BpfFilter{FilterAttrs: f.attrs()})
		dropEmptyQdisc(f.hook.device)
		return err
	})
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return nil // EINVAL: the device has no clsact qdisc
	}
	return fmt.Errorf("remove filter %s from device %d: %w", f.hook.program, f.hook.device, err)
}

// dropEmptyQdisc removes a device's clsact qdisc if nobody has a filter in it.
func dropEmptyQdisc(device int) {
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		left, err := netlink.FilterList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: device}}, parent)
		if err != nil || len(left) > 0 {
			return
		}
	}
	_ = netlink.QdiscDel(clsact(device)) // left behind it does nothing
}

func clsact(device int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: device, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

// filtersLeft are the filters of this layer at the node's devices.
func filtersLeft(settings Settings) (left []*filter, err error) {
	d := &datapath{settings: settings, ports: map[int]packetPort{}, attached: map[string]attachment{}}
	if err := d.openFilters(); err != nil {
		return nil, err
	}
	for device, port := range d.ports {
		for _, h := range portHooks(device, port.side) {
			if f, ok := d.attached[h.name].(*filter); ok {
				left = append(left, f)
			}
		}
	}
	slices.SortFunc(left, func(a, b *filter) int { return strings.Compare(a.hook.name, b.hook.name) })
	return left, nil
}

// Object implements layer.Subject: a filter that is to be removed.
func (f *filter) Object() string { return "filter " + f.hook.name }

// Detail implements layer.Subject.
func (f *filter) Detail() string { return "" }

// makeFilter attaches a program where there is no tcx.
func (d *datapath) makeFilter(h hook, program *ebpf.Program, priority uint16) (attachment, error) {
	made := &filter{d, h, priority}
	err := d.inNetns(func() error {
		err := netlink.QdiscAdd(clsact(h.device))
		if errors.Is(err, unix.EEXIST) {
			return nil
		}
		return err
	})
	if err == nil {
		err = made.run(program)
	}
	if err != nil {
		return nil, fmt.Errorf("attach %s to device %s by a filter: %w", h.program, d.ports[h.device].name, err)
	}
	return made, nil
}

// openFilters takes over the filters that an earlier process left.
func (d *datapath) openFilters() error {
	devices, err := d.devices()
	if err != nil {
		return err
	}
	for _, device := range devices {
		for _, side := range sides {
			for _, h := range portHooks(device.Index, side) {
				if left := (&filter{d, h, filterPriority}); left.alive() {
					d.ports[device.Index] = packetPort{device.Name, side}
					d.attached[h.name] = left
				}
			}
		}
	}
	return nil
}
