package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	bpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
)

// pinnedMaps outlive the process.
var pinnedMaps = []string{datapathMapHomes, datapathMapGates, datapathMapCrossings}

// Homes is the name of the pin that says where the node's pods are, for programs of other
// layers that hand packets to them.
const Homes = datapathMapHomes

// ways are those of the layer's program: behind what translates.
var ways = map[string]attach.Way{datapathProgPodFromPod: {Attach: ebpf.AttachTCXIngress, Order: attach.OrderRoutes}}

// pointAt is the program at a device.
func pointAt(device int) attach.Point {
	return attach.Point{Program: datapathProgPodFromPod, Device: device}
}

// datapath is what the layer has in eBPF. It implements shortcuts.
type datapath struct {
	settings Settings
	maps     map[string]*ebpf.Map
	program  *ebpf.Program
	points   attach.Points
	words    []string // of enum crossing
	rules    *nft.Net
}

var errNoTCX = errors.New("packets between pods take no shortcuts: tcx needs Linux 6.6")

// openDatapath takes over what an earlier process left, or makes it anew. The error is
// errNoTCX where the kernel is too old: then packets go by the stack.
func openDatapath(settings Settings) (*datapath, error) {
	if !attach.HaveTCX() {
		return nil, errNoTCX
	}
	if err := need.Check("open the pod layer's shortcuts", "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"); err != nil {
		return nil, err
	}
	d := &datapath{settings: settings, maps: map[string]*ebpf.Map{}, points: attach.Points{Netns: settings.Netns, Pins: settings.Pins, Ways: ways, TCX: true}, rules: nft.In(settings.Netns)}
	err := os.MkdirAll(settings.Pins, 0o700)
	if err == nil {
		err = d.load()
	}
	if err == nil {
		err = d.restore()
	}
	if err == nil {
		err = d.points.Open()
	}
	if err == nil {
		err = d.points.Switch(map[string]*ebpf.Program{datapathProgPodFromPod: d.program})
	}
	if err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// load loads the program over the maps that an earlier process left. Where those are
// another version's, it makes new ones: until they are filled packets go by the stack.
func (d *datapath) load() error {
	spec, err := loadDatapath()
	if err != nil {
		return fmt.Errorf("read embedded programs: %w", err)
	}
	if d.words, err = crossingNames(spec); err != nil {
		return err
	}
	for _, name := range pinnedMaps {
		m, err := ebpf.LoadPinnedMap(d.pin(name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open pinned map %s: %w", name, err)
		}
		if spec.Maps[name].Compatible(m) != nil {
			m.Close()
			continue
		}
		d.maps[name] = m
	}
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: d.maps})
	if err != nil {
		return need.Loading("load the pod program", "Linux 6.6 with CONFIG_BPF_SYSCALL", err)
	}
	defer loaded.Close()
	for _, name := range pinnedMaps {
		if d.maps[name] == nil {
			d.maps[name] = loaded.DetachMap(name)
		}
	}
	d.program = loaded.DetachProgram(datapathProgPodFromPod)
	return nil
}

// lookAtPins reads what is in force by the pinned maps; where there are none, nothing is.
func lookAtPins(folder string) (sights, error) {
	d := &datapath{maps: map[string]*ebpf.Map{}}
	defer d.close()
	spec, err := loadDatapath()
	if err != nil {
		return sights{}, fmt.Errorf("read embedded programs: %w", err)
	}
	if folder == "" {
		return sights{}, nil
	}
	d.maps, _, err = bpfmap.Look(folder, datapathMapHomes, datapathMapGates)
	if errors.Is(err, fs.ErrNotExist) {
		return sights{}, nil
	}
	if err != nil {
		return sights{}, err
	}
	for name, m := range d.maps {
		if m.ValueSize() != spec.Maps[name].ValueSize {
			return sights{}, fmt.Errorf("map %s is another version's: use the millrace that made it", filepath.Join(folder, name))
		}
	}
	s := sights{homes: map[netip.Addr]datapathHome{}}
	return s, d.readMaps(&s)
}

// readMaps reads whether shortcuts are open, and where they lead.
func (d *datapath) readMaps(s *sights) error {
	var gate uint32
	if err := d.maps[datapathMapGates].Lookup(uint32(0), &gate); err != nil {
		return fmt.Errorf("read %s: %w", datapathMapGates, err)
	}
	s.open = gate != 0
	all, err := bpfmap.New[datapathAddress, datapathHome](d.maps[datapathMapHomes]).All()
	for addr, home := range all {
		s.homes[fromAddress(addr)] = home
	}
	return err
}

func (d *datapath) pin(name string) string { return filepath.Join(d.settings.Pins, name) }

// inNetns runs f where the devices are.
func (d *datapath) inNetns(f func() error) error { return netns.In(d.settings.Netns, f) }

// look implements shortcuts.
func (d *datapath) look(devices []int, ranges []netip.Prefix) (sights, error) {
	s := sights{there: true, homes: map[netip.Addr]datapathHome{}, attached: map[int]bool{}, watched: map[int]bool{}, filtered: map[int]bool{}, lost: d.lost()}
	if err := d.readMaps(&s); err != nil || devices == nil {
		return s, err
	}
	rules, err := d.rules.Tracking()
	if s.why = whyClosed(rules, ranges); err != nil {
		s.why = "packets between pods take no shortcuts: whether somebody's rules need to see them cannot be read: " + err.Error()
	}
	for _, at := range d.points.All() {
		if slices.Contains(devices, at.Device) {
			s.attached[at.Device] = d.points.Alive(at)
		} else {
			_ = d.points.Detach(at) // it has gone
		}
	}
	return s, d.inNetns(func() error { return findOthers(devices, s) })
}

// findOthers says of which devices somebody else looks at packets.
func findOthers(devices []int, s sights) error {
	for _, device := range devices {
		found, err := bpflink.QueryPrograms(bpflink.QueryOptions{Target: device, Attach: ebpf.AttachTCXEgress})
		if err == nil && len(found.Programs) > 0 {
			s.watched[device] = true
		}
	}
	qdiscs, err := netlink.QdiscList(nil)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list queues: %w", err)
	}
	for _, q := range qdiscs {
		switch device := q.Attrs().LinkIndex; q.Type() {
		case "noqueue":
		case "clsact", "ingress":
			s.filtered[device], s.watched[device] = true, true
		default: // a limit of what the pod gets, for one
			s.watched[device] = true
		}
	}
	return nil
}

// attach implements shortcuts.
func (d *datapath) attach(device int, name string) error {
	err := d.points.Attach(pointAt(device), name, d.program)
	if attach.DeviceGone(err) {
		return nil // the pod has gone
	}
	return err
}

// detach implements shortcuts.
func (d *datapath) detach(device int) error { return d.points.Detach(pointAt(device)) }

// put implements shortcuts.
func (d *datapath) put(addr netip.Addr, home datapathHome) error {
	if err := d.maps[datapathMapHomes].Put(addressOf(addr), home); err != nil {
		return fmt.Errorf("write where %s is: %w", addr, err)
	}
	return nil
}

// forget implements shortcuts.
func (d *datapath) forget(addr netip.Addr) (device int, err error) {
	var home datapathHome
	if err = d.maps[datapathMapHomes].Lookup(addressOf(addr), &home); err == nil {
		err = d.maps[datapathMapHomes].Delete(addressOf(addr))
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, fmt.Errorf("forget where %s is: %w", addr, err)
	}
	return int(home.Device), nil
}

// open implements shortcuts.
func (d *datapath) open(yes bool) error {
	var gate uint32
	if yes {
		gate = 1
	}
	if err := d.maps[datapathMapGates].Put(uint32(0), gate); err != nil {
		return fmt.Errorf("write %s: %w", datapathMapGates, err)
	}
	return nil
}

func (d *datapath) lost() (gone []lost) {
	for _, name := range pinnedMaps {
		if !bpfmap.IsPinned(d.maps[name], d.pin(name)) {
			gone = append(gone, lost("pin "+name))
		}
	}
	for _, pin := range d.points.Lost() {
		gone = append(gone, lost("pin "+pin))
	}
	return gone
}

// restore implements shortcuts.
func (d *datapath) restore() error {
	if err := os.MkdirAll(d.settings.Pins, 0o700); err != nil {
		return fmt.Errorf("make pin folder: %w", err)
	}
	return errors.Join(bpfmap.Pin(d.settings.Pins, pinnedMaps, d.maps), d.points.Keep())
}

// describe implements shortcuts.
func (d *datapath) describe(to *layer.Description) error {
	homes := d.maps[datapathMapHomes]
	all, err := bpfmap.New[datapathAddress, datapathHome](homes).All()
	if err != nil {
		return err
	}
	to.Maps = append(to.Maps, layer.Map{Name: datapathMapHomes, Entries: len(all), Capacity: int(homes.MaxEntries()), Bytes: bpfmap.Bytes(homes)})
	to.Programs = append(to.Programs, layer.ProgramsAt(&d.points)...)
	counts, err := bpfmap.Counts(d.maps[datapathMapCrossings], d.words)
	maps.Copy(to.Reasons, counts)
	return err
}

// crossingNames are the words of `enum crossing`, in order.
func crossingNames(spec *ebpf.CollectionSpec) ([]string, error) {
	return bpfmap.Words(spec.Types, "crossing", "CROSSING_", int(datapathCrossingCROSSING_COUNT))
}

func (d *datapath) close() {
	for _, m := range d.maps {
		m.Close()
	}
	d.points.Close()
	if d.program != nil {
		d.program.Close()
	}
}

// isOurs tells the pins of the layer by their names.
func isOurs(name string) bool {
	return strings.HasPrefix(name, layer.LinkPrefix+datapathProgPodFromPod+"_") || slices.Contains(pinnedMaps, strings.TrimSuffix(name, bpfmap.NextSuffix))
}
