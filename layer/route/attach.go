package route

import (
	"errors"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/layer"
)

var haveTCX = attach.HaveTCX

// ways are those of the layer's programs: what translates a packet to a Service has to come
// before what sends it away.
var ways = map[string]attach.Way{
	datapathProgRouteFromPod:   {Attach: ebpf.AttachTCXIngress, Order: attach.OrderRoutes, Ahead: attach.FromPod},
	datapathProgRouteFromWire:  {Attach: ebpf.AttachTCXIngress, Order: attach.OrderRoutes},
	datapathProgRouteToRemote:  {Attach: ebpf.AttachTCXEgress, Order: attach.OrderRoutes},
	datapathProgRouteUnwrapped: {Attach: ebpf.AttachTCXIngress, Order: attach.OrderRoutes},
}

func (s Settings) points() attach.Points {
	return attach.Points{Netns: s.Netns, Pins: s.Pins, Ways: ways, TCX: haveTCX()}
}

func (p port) at() attach.Point { return attach.Point{Program: p.program(), Device: p.Index} }

// attach implements host.
func (d *datapath) attach(to port) error {
	err := d.attachAt(to.at(), to.Name)
	if attach.DeviceGone(err) {
		return nil // the pod has gone
	}
	return err
}

func (d *datapath) attachAt(at attach.Point, device string) error {
	if !d.Points.Alive(at) {
		_ = d.detachAt(at)
	}
	err := d.Points.Attach(at, device, d.Programs[at.Program])
	if d.Points.Alive(at) { // also where it could not be pinned: nobody attaches it again
		err = errors.Join(err, d.notePort(at, true))
	}
	return err
}

// notePort tells the programs that a pod is behind a device, or not any more.
func (d *datapath) notePort(at attach.Point, there bool) error {
	if at.Program != datapathProgRouteFromPod {
		return nil
	}
	ports := d.Maps[datapathMapPorts]
	if there {
		return ports.Put(uint32(at.Device), uint8(1))
	}
	if err := ports.Delete(uint32(at.Device)); !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	return nil
}

// notePorts tells the programs so of all devices: one may have gone while no process looked,
// and what has its number next is no pod's.
func (d *datapath) notePorts() error {
	ports := bpfmap.New[uint32, uint8](d.Maps[datapathMapPorts])
	known, err := ports.All()
	if err != nil {
		return err
	}
	var gone []uint32
	for device := range known {
		if d.Points.At(attach.Point{Program: datapathProgRouteFromPod, Device: int(device)}) == nil {
			gone = append(gone, device)
		}
	}
	failures := ports.Delete(gone)
	for _, at := range d.Points.All() {
		failures = append(failures, d.notePort(at, true))
	}
	return errors.Join(failures...)
}

// detach implements host.
func (d *datapath) detach(from port) error { return d.detachAt(from.at()) }

func (d *datapath) detachAt(at attach.Point) error {
	if d.Points.At(at) == nil {
		return nil
	}
	return errors.Join(d.notePort(at, false), d.Points.Detach(at))
}

// removal is what Remove would do: routes first, so that nothing is sent that nobody
// takes, then the device, filters and links, and the maps, the folder last if it is empty
// then.
func removal(settings Settings) (layer.Changes, error) {
	var changes layer.Changes
	d := newDatapath(settings)
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
	filters, err := layer.FiltersGone(&d.Points)
	if err != nil {
		return nil, err
	}
	changes = append(changes, filters...)
	pins, err := layer.PinsGone(settings.Pins, func(name string) bool {
		name = strings.TrimSuffix(name, bpfmap.NextSuffix)
		_, isLink := d.Points.Point(name)
		return isLink || slices.Contains(pinnedMaps, name)
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
