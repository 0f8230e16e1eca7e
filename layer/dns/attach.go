package dns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	bpflink "github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
)

// linkPrefix is of the pins of links; the index of the device follows. anyLink is of those
// of every version.
const (
	linkPrefix = anyLink + datapathProgDnsFromPod + "_"
	anyLink    = layer.LinkPrefix
)

// translator is the program that makes a query to a Service one to an endpoint
// (layer/service): behind it nobody knows any more what was asked of whom.
const translator = "from_pod"

var haveTCX = attach.HaveTCX

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
			devices = append(devices, device{Index: one.Index, Name: one.Name, pod: pod, attached: a != nil && a.Alive() && d.inFront(one.Index, a), space: one.PeerNamespace})
		}
	}
	for index, a := range d.attached {
		if !there[index] {
			_ = a.Detach()
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
	return made.Keep()
}

func (d *datapath) make(to device) (attach.Attachment, error) {
	if !d.tcx {
		f := d.filterAt(to.Index, to.Name)
		return f, f.Begin(d.program)
	}
	return d.hookAt(to.Index, to.Name).TCX(d.program, bpflink.Head(), d.pinAt(to.Index))
}

func (d *datapath) hookAt(device int, name string) attach.Hook {
	return attach.Hook{Netns: d.settings.Netns, Device: device, Name: name, Attach: ebpf.AttachTCXIngress}
}

func (d *datapath) pinAt(device int) string {
	return filepath.Join(d.settings.Pins, linkPrefix+strconv.Itoa(device))
}

// detach implements host.
func (d *datapath) detach(from device) error {
	a := d.attached[from.Index]
	delete(d.attached, from.Index)
	if a == nil {
		return nil
	}
	return a.Detach()
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
		l, err := d.hookAt(device, "device "+index).Open(d.pinAt(device))
		if err != nil {
			return err
		}
		if !l.Alive() {
			_ = l.Detach()
			continue
		}
		d.attached[device] = l
	}
	return nil
}

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
	var there *bpflink.QueryResult
	err = d.inNetns(func() (err error) {
		there, err = bpflink.QueryPrograms(bpflink.QueryOptions{Target: device, Attach: ebpf.AttachTCXIngress})
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

// filterPriority is of the filter that stands for tcx before Linux 6.6: the layer's own;
// the translator's is one more.
const filterPriority = 0x6d71

func (d *datapath) filterAt(device int, name string) *attach.Filter {
	return &attach.Filter{Hook: d.hookAt(device, name), Program: datapathProgDnsFromPod, Priority: filterPriority}
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
		if f := d.filterAt(one.Index, one.Name); f.Alive() {
			d.attached[one.Index] = f
		}
	}
	return nil
}

// removal is what Remove would do: filters and links first, so that no program runs on
// maps that are going, the folder last. All that is pinned there goes, also what a later
// version left: the folder is the layer's alone.
func removal(settings Settings) (layer.Changes, error) {
	var changes layer.Changes
	if !haveTCX() {
		d := &datapath{settings: settings, attached: map[int]attach.Attachment{}}
		if err := d.openFilters(); err != nil {
			return nil, err
		}
		for _, a := range d.attached {
			changes = append(changes, layer.Gone(layer.Filter{Attachment: a, What: datapathProgDnsFromPod + " of " + a.Name()}))
		}
	}
	pins, err := layer.PinsGone(settings.Pins, func(string) bool { return true })
	return append(changes, pins...), err
}
