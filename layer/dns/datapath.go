package dns

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/pinned"
	"github.com/millrace/millrace/layer"
)

// pinnedMaps outlive the process; the others belong to a load of the program. Of those the
// agent uses ownMaps. Names are pinned last: where they are, Look finds the others.
var (
	pinnedMaps = []string{datapathMapResolvers, datapathMapAuthorities, datapathMapOutcomes, datapathMapOutside, datapathMapSearches, datapathMapWritings, datapathMapWaiting, datapathMapNames}
	ownMaps    = []string{datapathMapAgents, datapathMapCalls, datapathMapPaces}
)

// datapath is what the layer has in the kernel. It implements host.
type datapath struct {
	pinned.Folder
	settings Settings
	// lifetime is the program's ttl.
	lifetime *ebpf.Variable
	outcomes []string
	lock     *os.File
}

// open takes over what an earlier process left, or makes it anew.
func open(settings Settings) (*datapath, error) {
	const act = "open the dns layer"
	if err := need.Check(act, "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"); err != nil {
		return nil, err
	}
	zone, err := ParseZone(settings.Zone)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", act, err)
	}
	settings.Zone = zone
	d := &datapath{settings: settings, Folder: pinned.Folder{Names: pinnedMaps, Points: settings.points()}}
	if err = d.Make(); err == nil {
		err = d.open()
	}
	if err != nil {
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
	spec.Maps[datapathMapNames].MaxEntries = uint32(cmp.Or(d.settings.room, firstNames))
	if err := d.adopt(spec); err != nil {
		return err
	}
	if err := d.load(spec); err != nil {
		return err
	}
	atOnce, err := d.TakeOver()
	if err != nil || !atOnce {
		return err
	}
	return d.Settle()
}

// adopt opens the maps that an earlier process left, if it was of the same layout.
func (d *datapath) adopt(spec *ebpf.CollectionSpec) error {
	like := func(name string, found *ebpf.Map) *ebpf.MapSpec {
		like := spec.Maps[name].Copy()
		if name == datapathMapNames {
			like.MaxEntries = found.MaxEntries() // it may have grown
		}
		return like
	}
	adopted, err := d.Adopt(like)
	if adopted {
		spec.Maps[datapathMapNames].MaxEntries = d.Maps[datapathMapNames].MaxEntries()
	}
	return err
}

// sameLayout says whether maps are as this version's.
func sameLayout(opened map[string]*ebpf.Map) error {
	spec, err := loadDatapath()
	if err != nil {
		return err
	}
	return bpfmap.SameLayout(opened, spec.Maps)
}

// load loads the program over the maps that are there and makes the others.
func (d *datapath) load(spec *ebpf.CollectionSpec) error {
	if err := adapt(spec, d.settings); err != nil {
		return err
	}
	variables, err := d.Load(spec, ownMaps...)
	if err != nil {
		return loadError(err)
	}
	d.lifetime = variables[datapathVarTtl]
	return nil
}

// grow implements host: a larger map of names is filled beside the one in force, and then
// each device is switched over. It is the only writer of names meanwhile. On an error
// everything is as before.
func (d *datapath) grow(room int) (take func() error, err error) {
	spec, err := loadDatapath()
	if err != nil {
		return nil, err
	}
	ttl, err := d.ttl()
	if err != nil {
		return nil, err
	}
	spec.Maps[datapathMapNames].MaxEntries = uint32(room)
	next := &datapath{settings: d.settings, Folder: pinned.Folder{Names: pinnedMaps, Maps: maps.Clone(d.Maps)}}
	delete(next.Maps, datapathMapNames)
	if err := next.load(spec); err != nil {
		return nil, err
	}
	next.Programs[datapathProgDnsGiveBack].Close() // that one has nothing to do with names
	program := next.Programs[datapathProgDnsFromPod]
	old, larger := d.Maps[datapathMapNames], next.Maps[datapathMapNames]
	err = errors.Join(next.setTTL(ttl), bpfmap.Copy(old, larger, func(key, value, newKey, newValue []byte) {
		copy(newKey, key)
		copy(newValue, value)
	}))
	if err == nil && d.Settled() { // else the program that serves is an earlier process'
		err = d.switchTo(program)
	}
	if err != nil {
		larger.Close()
		program.Close()
		return nil, err
	}
	return func() error {
		d.Programs[datapathProgDnsFromPod].Close()
		d.Maps, d.Programs[datapathProgDnsFromPod], d.lifetime = next.Maps, program, next.lifetime
		old.Close()
		if !d.Settled() {
			return nil
		}
		return bpfmap.Pin(d.settings.Pins, pinnedMaps, d.Maps)
	}, nil
}

// names implements host.
func (d *datapath) names() *ebpf.Map { return d.Maps[datapathMapNames] }

// switchTo puts a program in force at all devices, or at none.
func (d *datapath) switchTo(program *ebpf.Program) error {
	var done []attach.Attachment
	for _, at := range d.Points.All() {
		a := d.Points.At(at)
		err := a.Run(program)
		if err == nil {
			done = append(done, a)
			continue
		}
		if !a.Alive() {
			continue // its device has gone
		}
		for _, back := range done {
			err = errors.Join(err, back.Run(d.Programs[datapathProgDnsFromPod]))
		}
		return fmt.Errorf("switch %s at device %d to the new program: %w", at.Program, at.Device, err)
	}
	return nil
}

// adapt gives the program its read-only settings.
func adapt(spec *ebpf.CollectionSpec, settings Settings) error {
	var word, mask [zoneLimit / 8]uint64
	zone := append(wire(settings.Zone), 0)
	for i, b := range zone {
		word[i/8] |= uint64(b) << (8 * (i % 8))
		mask[i/8] |= 0xff << (8 * (i % 8))
	}
	set := map[string]any{
		datapathVarZoneWord: word, datapathVarZoneMask: mask, datapathVarZoneLength: uint32(len(zone)),
		datapathVarTtl: settings.ttl(), datapathVarSilence: uint64(cmp.Or(settings.silence, mostSilence)),
	}
	if settings.pace > 0 {
		set[datapathVarPace], set[datapathVarPaceAll] = uint64(settings.pace), uint64(settings.pace)
	}
	for name, value := range set {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s of the dns program: %w", name, err)
		}
	}
	return nil
}

// loadError turns a failed load into what the user can do about it.
func loadError(err error) error {
	return need.Loading("load the dns program", "Linux 5.15 with CONFIG_BPF_SYSCALL", err)
}

// settle implements host.
func (d *datapath) settle() error { return d.Settle() }

// lost implements host.
func (d *datapath) lost() (gone []lost) {
	for _, pin := range d.Lost() {
		gone = append(gone, lost("pin "+pin))
	}
	return gone
}

// restore implements host.
func (d *datapath) restore() error { return d.Restore() }

// beat implements host.
func (d *datapath) beat(says words) error {
	now, err := sinceBoot()
	if err != nil {
		return err
	}
	authority := datapathAuthority{Beat: now, Serial: says.serial}
	if says.complete {
		authority.Complete = 1
	}
	if says.known > 0 {
		authority.Known = now + uint64(says.known)
	}
	if says.whole > 0 {
		authority.Whole = now + uint64(says.whole)
	}
	if err := d.Maps[datapathMapAuthorities].Put(uint32(0), authority); err != nil {
		return fmt.Errorf("tell the dns program that the agent is there: %w", err)
	}
	return nil
}

// ttl implements host.
func (d *datapath) ttl() (seconds uint32, err error) {
	if err := d.lifetime.Get(&seconds); err != nil {
		return 0, fmt.Errorf("read %s of the dns program: %w", datapathVarTtl, err)
	}
	return seconds, nil
}

// setTTL implements host.
func (d *datapath) setTTL(seconds uint32) error {
	if err := d.lifetime.Set(seconds); err != nil {
		return fmt.Errorf("set %s of the dns program: %w", datapathVarTtl, err)
	}
	return nil
}

// sinceBoot is the clock of the program, in nanoseconds: it goes on while the machine sleeps.
func sinceBoot() (uint64, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, fmt.Errorf("read the time since boot: %w", err)
	}
	return uint64(now.Nano()), nil
}

// describe implements host.
func (d *datapath) describe(to *layer.Description) (err error) {
	if !d.Points.TCX {
		to.Degraded = append(to.Degraded, "pods' queries are seen by clsact filters: tcx needs Linux 6.6")
	}
	names := d.Maps[datapathMapNames]
	to.Maps = append(to.Maps, layer.Map{Name: datapathMapNames, Entries: to.Objects, Capacity: int(names.MaxEntries()), Bytes: bpfmap.Bytes(names)})
	outside := d.Maps[datapathMapOutside]
	to.Maps = append(to.Maps, layer.Map{Name: datapathMapOutside, Capacity: int(outside.MaxEntries()), Bytes: bpfmap.Bytes(outside)})
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
