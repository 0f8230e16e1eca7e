package dns

import (
	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer"
)

// translator is the program that makes a query to a Service one to an endpoint
// (layer/service): behind it nobody knows any more what was asked of whom.
const translator = "from_pod"

var haveTCX = attach.HaveTCX

// ways are those of the layer's program: before the translator. Earlier versions had the
// place of what turns answers back (layer/masquerade): at a device that is a pod's and leads
// out one took the other's.
var ways = map[string]attach.Way{
	datapathProgDnsFromPod: {Attach: ebpf.AttachTCXIngress, Order: attach.OrderQueries, Former: attach.OrderAnswers},
}

func (s Settings) points() attach.Points {
	return attach.Points{Netns: s.Netns, Pins: s.Pins, Ways: ways, TCX: haveTCX()}
}

// pointAt is the program at a device.
func pointAt(device int) attach.Point {
	return attach.Point{Program: datapathProgDnsFromPod, Device: device}
}

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
		a := d.Points.At(pointAt(one.Index))
		pod := one.Kind == "veth" && one.PeerElsewhere && !one.DefaultRoute
		if pod || a != nil {
			devices = append(devices, device{Index: one.Index, Name: one.Name, pod: pod, attached: a != nil && a.Alive() && d.inFront(one.Index, a), space: one.PeerNamespace})
		}
	}
	for _, at := range d.Points.All() {
		if !there[at.Device] {
			_ = d.Points.Detach(at)
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
	err := d.Points.Attach(pointAt(to.Index), to.Name, d.Programs[datapathProgDnsFromPod])
	if attach.DeviceGone(err) {
		return nil // the pod has gone
	}
	return err
}

// detach implements host.
func (d *datapath) detach(from device) error { return d.Points.Detach(pointAt(from.Index)) }

// inFront says that the translator is not before what is attached to a device.
func (d *datapath) inFront(device int, a attach.Attachment) bool {
	l, ok := a.(*attach.Link)
	if !ok {
		return true // a filter, by its priority
	}
	info, err := l.Kernel.Info()
	if err != nil {
		return false
	}
	programs, err := attach.Hook{Netns: d.settings.Netns, Device: device, Attach: ebpf.AttachTCXIngress}.Programs()
	if err != nil {
		return true // who cannot see cannot mend
	}
	for _, id := range programs {
		if id == info.Program {
			return true
		}
		if attach.NameOf(id) == translator {
			return false
		}
	}
	return true
}

// removal is what Remove would do: filters and links first, so that no program runs on
// maps that are going, the folder last. All that is pinned there goes, also what a later
// version left: the folder is the layer's alone.
func removal(settings Settings) (layer.Changes, error) {
	points := settings.points()
	filters, err := layer.FiltersGone(&points)
	if err != nil {
		return nil, err
	}
	pins, err := layer.PinsGone(settings.Pins, func(string) bool { return true })
	return append(filters, pins...), err
}
