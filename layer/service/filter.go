package service

import (
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/layer"
)

// Before Linux 6.6 there is no tcx: then a veth's programs are filters of the
// clsact qdisc (tc-bpf(8)). They need no pin, for they live as long as the device.
const (
	// filterPriority is the layer's own, besidePriority where the next version's programs
	// stand while they take over (handover.go).
	filterPriority = attach.OrderServices
	besidePriority = attach.OrderNextServices
)

// filterAt is the filter that stands for a program at a hook.
func (d *datapath) filterAt(h hook, priority attach.Order) *attach.Filter {
	return &attach.Filter{Hook: d.at(h), Program: h.program, Priority: priority}
}

// filtersLeft takes away the filters of this layer at the node's devices.
func filtersLeft(settings Settings) (left layer.Changes, err error) {
	d := &datapath{settings: settings, ports: map[int]packetPort{}, attached: map[string]attach.Attachment{}}
	if err := d.openFilters(); err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(d.attached)) {
		left = append(left, layer.Gone(layer.Filter{Attachment: d.attached[name], What: name}))
	}
	return left, nil
}

// makeFilter attaches a program where there is no tcx.
func (d *datapath) makeFilter(h hook, program *ebpf.Program, priority attach.Order) (attach.Attachment, error) {
	made := d.filterAt(h, priority)
	if err := made.Begin(program); err != nil {
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
				if left := d.filterAt(h, filterPriority); left.Alive() {
					d.ports[device.Index] = packetPort{device.Name, side}
					d.attached[h.name] = left
				}
			}
		}
	}
	return nil
}
