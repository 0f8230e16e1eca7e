package masquerade

import (
	"errors"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer"
)

var haveTCX = attach.HaveTCX

// ways are those of the layer's programs: what leaves is seen behind all others, which see
// it as the pod sent it, and what comes before those that have to know whom it is for.
var ways = map[string]attach.Way{
	datapathProgMasqFromWire: coming,
	datapathProgMasqFromL3:   coming,
	datapathProgMasqToWire:   leaving,
	datapathProgMasqToL3:     leaving,
}

var (
	coming  = attach.Way{Attach: ebpf.AttachTCXIngress, Order: attach.OrderAnswers}
	leaving = attach.Way{Attach: ebpf.AttachTCXEgress, Order: attach.OrderLeaving}
)

func (s Settings) points() attach.Points {
	return attach.Points{Netns: s.Netns, Pins: s.Pins, Ways: ways, TCX: haveTCX()}
}

// pointsOf are those of a device: answers can come back before anything leaves.
func pointsOf(d link.Device) []attach.Point {
	if d.Layer3 {
		return []attach.Point{{Program: datapathProgMasqFromL3, Device: d.Index}, {Program: datapathProgMasqToL3, Device: d.Index}}
	}
	return []attach.Point{{Program: datapathProgMasqFromWire, Device: d.Index}, {Program: datapathProgMasqToWire, Device: d.Index}}
}

// attach implements host. A device that has gone is no error.
func (d *datapath) attach(to link.Device) error {
	for _, at := range pointsOf(to) {
		if err := d.Points.Attach(at, to.Name, d.Programs[at.Program]); err != nil && !attach.DeviceGone(err) {
			return err
		}
	}
	return nil
}

// attachedAt implements host.
func (d *datapath) attachedAt(device link.Device) bool {
	return !slices.ContainsFunc(pointsOf(device), func(at attach.Point) bool { return !d.Points.Alive(at) })
}

// detach implements host.
func (d *datapath) detach(device int) error {
	var failures []error
	for _, at := range d.Points.All() {
		if at.Device == device {
			failures = append(failures, d.Points.Detach(at))
		}
	}
	return errors.Join(failures...)
}

// devices implements host. What is left of those that have gone is forgotten.
func (d *datapath) devices() ([]link.Device, error) {
	found, err := devices(d.settings.Netns)
	if err != nil {
		return nil, err
	}
	for _, at := range d.Points.All() {
		if !slices.ContainsFunc(found, func(one link.Device) bool { return one.Index == at.Device }) {
			_ = d.Points.Detach(at)
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

// removal is what Remove would do: programs first, then the maps, and the folder if it is
// empty then.
func removal(settings Settings) (layer.Changes, error) {
	points := settings.points()
	filters, err := layer.FiltersGone(&points)
	if err != nil {
		return nil, err
	}
	pins, err := layer.PinsGone(settings.Pins, func(name string) bool {
		name = strings.TrimSuffix(name, bpfmap.NextSuffix)
		_, isLink := points.Point(name)
		return isLink || slices.Contains(pinnedMaps, name)
	})
	return append(filters, pins...), err
}
