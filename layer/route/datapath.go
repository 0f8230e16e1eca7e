package route

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
)

// pinnedMaps outlive the process; nothing else is in the object.
var pinnedMaps = []string{datapathMapRemotes, datapathMapVteps, datapathMapPorts, datapathMapGates, datapathMapOutcomes}

// datapath is what the layer has in the kernel. It implements host.
type datapath struct {
	settings Settings
	maps     map[string]*ebpf.Map
	programs map[string]*ebpf.Program
	// adopted says that the maps are those that an earlier process left. Where they are
	// not, its programs serve until settle.
	adopted  bool
	settled  bool
	points   attach.Points
	outcomes []string
	rules    *nft.Net
	lock     *os.File
}

// open takes over what an earlier process left, or makes it anew.
func open(settings Settings) (*datapath, error) {
	const act = "open the route layer"
	if err := need.Check(act, "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"); err != nil {
		return nil, err
	}
	if settings.VNI >= 1<<24 {
		return nil, fmt.Errorf("%s: network number %d: use 1 to %d", act, settings.VNI, 1<<24-1)
	}
	if err := os.MkdirAll(settings.Pins, 0o700); err != nil {
		return nil, fmt.Errorf("%s: make pin folder: %w", act, err)
	}
	d := &datapath{settings: settings, maps: map[string]*ebpf.Map{}, programs: map[string]*ebpf.Program{}, points: settings.points(), rules: nft.In(settings.Netns)}
	if err := d.open(); err != nil {
		d.close()
		return nil, fmt.Errorf("%s: %w", act, err)
	}
	return d, nil
}

func (d *datapath) open() (err error) {
	if d.lock, err = layer.Lock("pin folder", d.settings.Pins); err != nil {
		return err
	}
	spec, err := loadDatapath()
	if err != nil {
		return fmt.Errorf("read embedded programs: %w", err)
	}
	if d.outcomes, err = outcomeNames(spec); err != nil {
		return err
	}
	if err := d.adopt(spec); err != nil {
		return err
	}
	if err := d.load(spec); err != nil {
		return err
	}
	if err := d.points.Open(); err != nil {
		return err
	}
	if d.adopted || len(d.points.All()) == 0 {
		return d.settle()
	}
	return nil
}

// adopt opens the maps that an earlier process left, if it was of the same layout. A
// change of what a field means has to change its size, or its map's name.
func (d *datapath) adopt(spec *ebpf.CollectionSpec) error {
	found, err := bpfmap.Adopt(d.settings.Pins, pinnedMaps, func(name string, _ *ebpf.Map) *ebpf.MapSpec { return spec.Maps[name] })
	if err != nil || found == nil {
		return err
	}
	d.maps, d.adopted = found, true
	return nil
}

// sameLayout says whether maps are as this version's.
func sameLayout(opened map[string]*ebpf.Map) error {
	spec, err := loadDatapath()
	if err != nil {
		return err
	}
	return bpfmap.SameLayout(opened, spec.Maps)
}

// load loads the programs over the maps that are there and makes the others.
func (d *datapath) load(spec *ebpf.CollectionSpec) error {
	for name, value := range map[string]any{
		datapathVarPort: bits.ReverseBytes16(d.settings.port()), datapathVarVni: bits.ReverseBytes32(d.settings.vni() << 8), datapathVarToPeer: d.settings.Peer,
		datapathVarCanRelabel: d.points.TCX, // which is younger
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s of the route programs: %w", name, err)
		}
	}
	if err := d.openHomes(spec.Maps[datapathMapHomes]); err != nil {
		return err
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: d.maps})
	if err != nil {
		return loadError(err)
	}
	defer collection.Close()
	for _, name := range pinnedMaps {
		if d.maps[name] == nil {
			d.maps[name] = collection.Maps[name]
			delete(collection.Maps, name) // ours now
		}
	}
	for name, program := range collection.Programs {
		d.programs[name] = program
		delete(collection.Programs, name)
	}
	return nil
}

// openHomes opens the map that says where the node's own pods are. Where it is not there,
// or another version's, the programs have an empty one.
func (d *datapath) openHomes(spec *ebpf.MapSpec) error {
	if d.settings.Homes == "" {
		return nil
	}
	m, err := ebpf.LoadPinnedMap(d.settings.Homes, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned map %s: %w", d.settings.Homes, err)
	}
	if spec.Compatible(m) != nil {
		return m.Close()
	}
	d.maps[datapathMapHomes] = m
	return nil
}

// loadError turns a failed load into what the user can do about it.
func loadError(err error) error {
	return need.Loading("load the route programs", "Linux 5.15 with CONFIG_BPF_SYSCALL", err)
}

// settle puts the programs in force where an earlier process' are, and pins the maps.
// Calling it again does nothing.
func (d *datapath) settle() error {
	if d.settled {
		return nil
	}
	if err := bpfmap.Pin(d.settings.Pins, pinnedMaps, d.maps); err != nil {
		return err
	}
	if err := d.points.Switch(d.programs); err != nil {
		return err
	}
	if err := d.notePorts(); err != nil {
		return err
	}
	d.settled = true
	return nil
}

// lost implements host.
func (d *datapath) lost() (gone []lost) {
	if !d.settled {
		return nil
	}
	for _, name := range pinnedMaps {
		if !bpfmap.IsPinned(d.maps[name], filepath.Join(d.settings.Pins, name)) {
			gone = append(gone, lost("pin "+name))
		}
	}
	for _, pin := range d.points.Lost() {
		gone = append(gone, lost("pin "+pin))
	}
	return gone
}

// restore implements host.
func (d *datapath) restore() error {
	if err := os.MkdirAll(d.settings.Pins, 0o700); err != nil {
		return fmt.Errorf("make pin folder: %w", err)
	}
	return errors.Join(bpfmap.Pin(d.settings.Pins, pinnedMaps, d.maps), d.points.Keep())
}

// describe implements host.
func (d *datapath) describe(to *layer.Description) (err error) {
	if !d.points.TCX {
		to.Degraded = append(to.Degraded, "packets are seen by clsact filters: tcx needs Linux 6.6")
	}
	remotes := d.maps[datapathMapRemotes]
	to.Maps = append(to.Maps, layer.Map{Name: datapathMapRemotes, Entries: to.Objects, Capacity: int(remotes.MaxEntries()), Bytes: bpfmap.Bytes(remotes)})
	to.Programs = append(to.Programs, layer.ProgramsAt(&d.points)...)
	to.Reasons, err = bpfmap.Counts(d.maps[datapathMapOutcomes], d.outcomes)
	return err
}

// outcomeNames are the words of `enum outcome`, in order.
func outcomeNames(spec *ebpf.CollectionSpec) ([]string, error) {
	return bpfmap.Words(spec.Types, "outcome", "OUTCOME_", int(datapathOutcomeOUTCOME_COUNT))
}

func (d *datapath) close() {
	bpfmap.CloseAll(d.maps)
	d.points.Close()
	for _, program := range d.programs {
		program.Close()
	}
	if d.lock != nil {
		d.lock.Close()
	}
}
