package route

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/kernel/pinned"
	"github.com/millrace/millrace/layer"
)

// pinnedMaps outlive the process; nothing else is in the object.
var pinnedMaps = []string{datapathMapRemotes, datapathMapVteps, datapathMapPorts, datapathMapGates, datapathMapNetworks, datapathMapOutcomes}

// datapath is what the layer has in the kernel. It implements host.
type datapath struct {
	pinned.Folder
	settings Settings
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
	d := newDatapath(settings)
	err := d.Make()
	if err == nil {
		err = d.open()
	}
	if err != nil {
		d.close()
		return nil, fmt.Errorf("%s: %w", act, err)
	}
	return d, nil
}

func newDatapath(settings Settings) *datapath {
	return &datapath{settings: settings, Folder: pinned.Folder{Names: pinnedMaps, Points: settings.points()}, rules: nft.In(settings.Netns)}
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
	if _, err := d.Adopt(func(name string, _ *ebpf.Map) *ebpf.MapSpec { return spec.Maps[name] }); err != nil {
		return err
	}
	if err := d.load(spec); err != nil {
		return err
	}
	atOnce, err := d.TakeOver()
	if err != nil || !atOnce {
		return err
	}
	return d.settle()
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
		datapathVarToPeer:     d.settings.Peer,
		datapathVarCanRelabel: d.Points.TCX, // which is younger
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s of the route programs: %w", name, err)
		}
	}
	if err := d.openHomes(spec.Maps[datapathMapHomes]); err != nil {
		return err
	}
	if _, err := d.Load(spec); err != nil {
		return need.Loading("load the route programs", "Linux 5.15 with CONFIG_BPF_SYSCALL", err)
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
	d.Maps[datapathMapHomes] = m
	return nil
}

// settle puts the programs in force where an earlier process' are, and pins the maps.
// Calling it again does nothing.
func (d *datapath) settle() error {
	if d.Settled() {
		return nil
	}
	if err := d.notePorts(); err != nil {
		return err
	}
	return d.Settle()
}

// lost implements host.
func (d *datapath) lost() (gone []lost) {
	for _, pin := range d.Lost() {
		gone = append(gone, lost("pin "+pin))
	}
	return gone
}

// restore implements host.
func (d *datapath) restore() error { return d.Restore() }

// describe implements host.
func (d *datapath) describe(to *layer.Description) (err error) {
	if !d.Points.TCX {
		to.Degraded = append(to.Degraded, "packets are seen by clsact filters: tcx needs Linux 6.6")
	}
	remotes := d.Maps[datapathMapRemotes]
	to.Maps = append(to.Maps, layer.Map{Name: datapathMapRemotes, Entries: to.Objects, Capacity: int(remotes.MaxEntries()), Bytes: bpfmap.Bytes(remotes)})
	to.Programs = append(to.Programs, layer.ProgramsAt(&d.Points)...)
	to.Reasons, err = bpfmap.Counts(d.Maps[datapathMapOutcomes], d.outcomes)
	return err
}

// outcomeNames are the words of `enum outcome`, in order.
func outcomeNames(spec *ebpf.CollectionSpec) ([]string, error) {
	return bpfmap.Words(spec.Types, "outcome", "OUTCOME_", int(datapathOutcomeOUTCOME_COUNT))
}

func (d *datapath) close() {
	d.Close()
	if d.lock != nil {
		d.lock.Close()
	}
}
