package service

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/conntrack"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
)

// tableMaps belong together and grow with the cluster.
var tableMaps = []string{datapathMapServices, datapathMapSlots, datapathMapBackends}

// flowMaps belong together and hold what the packet path knows of its flows.
var flowMaps = []string{datapathMapTranslations, datapathMapPlaces, datapathMapVacant, datapathMapFlowUsage}

// packetMaps are those that the packet path needs, with flows or without.
var packetMaps = append([]string{datapathMapMasquerades}, flowMaps...)

// ruleMaps are what the programs know beside the tables, and what the agent does.
var ruleMaps = []string{datapathMapSourceRanges, datapathMapNodeAddresses, datapathMapNodePorts,
	datapathMapWires, datapathMapSpaces, datapathMapClients, datapathMapAffinities, datapathMapPaths,
	datapathMapDraining}

const (
	linkPrefix = layer.LinkPrefix
	nextPrefix = "next_" // a pin that is about to become the one without; no dots in these names
)

// datapath is what the layer has in the kernel.
type datapath struct {
	settings Settings
	// maps are used by the programs in force, or by those that wait.
	maps map[string]*ebpf.Map
	// left are maps of another version, which are in force until what is in them
	// has been carried over to those of this one.
	left map[string]*ebpf.Map
	// ports are the devices at which the packet path is to be in force, by index.
	ports    map[int]packetPort
	attached map[string]attach.Attachment // by the name of the hook
	// carried is how many flows come from another version.
	carried int
	// packets says that the packet path's flows have their maps, bare that the programs
	// for wires without Ethernet headers are loaded.
	packets, bare bool
	// tcx says that this kernel has it.
	tcx bool
	// programs are in force; nil before this process has put its own there.
	programs map[string]*ebpf.Program
	// waiting are loaded programs that replace those of an earlier process once
	// the tables are filled (see settle).
	waiting map[string]*ebpf.Program
	lock    *os.File
	// node is the cookie of the node's own network namespace.
	node   uint64
	looked lookedAt
	// firstPort and portCount are the source ports of masqueraded flows.
	firstPort, portCount uint16
	noSetRetval          bool
	// asksConntrack says that the programs ask which connections the kernel tracks.
	asksConntrack bool
	// rules is nftables in the node's namespace; untrackable is why ours cannot
	// be there, bypassing says that this process wrote them.
	rules       *nft.Net
	untrackable error
	bypassing   bool
	reasons     []string
	degraded    []string
}

// capacity is how many frontends and backends the maps must be able to hold.
type capacity struct{ services, backends int }

// roomFor is the capacity for a need: the next power of two from twice the
// need, at least 16,384 frontends and 65,536 backends. An empty map of that size
// costs 16 bytes an entry (a hash bucket), so the smallest set costs 2.4 MB; in
// return hardly any cluster meets the 25 ms of a growth.
func roomFor(services, backends int) capacity {
	return capacity{powerOfTwo(2*services, 1<<14), powerOfTwo(2*backends, 1<<16)}
}

func powerOfTwo(n, least int) int {
	for least < n {
		least *= 2
	}
	return least
}

// open takes over the maps pinned by an earlier process, or makes new ones, and
// loads this process's programs over them. Where nothing was attached before,
// or the tables were taken over, the programs are in force when it returns;
// otherwise they wait for settle. On an error nothing has changed.
func open(settings Settings) (*datapath, error) {
	if err := ready(settings); err != nil {
		return nil, err
	}
	d := &datapath{
		settings: settings, rules: nft.In(settings.Netns),
		maps: map[string]*ebpf.Map{}, left: map[string]*ebpf.Map{},
		ports: map[int]packetPort{}, attached: map[string]attach.Attachment{},
	}
	if err := d.open(); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

func (d *datapath) open() error {
	whole, err := d.prepare()
	if err == nil && (whole || len(d.attached) == 0) {
		return d.settle()
	}
	return err
}

// prepare does all that changes nothing yet of what is in force. It says whether
// the tables hold what they held before.
func (d *datapath) prepare() (whole bool, err error) {
	if d.lock, err = lockFolder(d.settings.Pins); err != nil {
		return false, err
	}
	spec, err := liveSpec()
	if err != nil {
		return false, err
	}
	if d.reasons, err = reasonNames(spec); err != nil {
		return false, err
	}
	if d.node, err = netns.Cookie(d.settings.Netns); err != nil {
		return false, err
	}
	d.probe()
	if err := d.findSourcePorts(); err != nil {
		return false, err
	}
	if err := d.resume(); err != nil {
		return false, err
	}
	if err := d.adoptMaps(spec); err != nil {
		return false, err
	}
	if err := d.openAttachments(); err != nil {
		return false, err
	}
	d.packets = len(d.ports) > 0
	d.bare = d.hasBareWire()
	adopted := d.maps[datapathMapServices] != nil
	room, err := d.roomForLeft()
	if err != nil {
		return false, err
	}
	loaded, err := d.loadSpec(spec, d.maps, room)
	if err != nil {
		return false, err
	}
	d.maps, d.waiting = loaded.maps, loaded.programs
	adopted = adopted || d.left[datapathMapServices] != nil
	if err := d.carryTables(); err != nil {
		return false, err
	}
	return adopted, nil
}

// lockFolder holds a pin folder for this process until the file is closed: the
// maps have one writer.
func lockFolder(path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	return layer.Lock("pin folder", path)
}

// ready checks what can be checked before anything is changed.
func ready(settings Settings) error {
	const act = "attach the service layer"
	if err := need.Check(act, "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"); err != nil {
		return err
	}
	var found unix.Statfs_t
	if err := unix.Statfs(settings.Cgroup, &found); err != nil {
		return fmt.Errorf("%s: cgroup %s: %w", act, settings.Cgroup, err)
	}
	if found.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%s: %s is not in a cgroup2 hierarchy: name one with --cgroup", act, settings.Cgroup)
	}
	if settings.Pins == "" {
		return nil
	}
	if err := isBPF(existing(settings.Pins)); err != nil {
		return fmt.Errorf("%s: %w", act, err)
	}
	if err := os.MkdirAll(settings.Pins, 0o700); err != nil {
		return fmt.Errorf("%s: make pin folder: %w", act, err)
	}
	return nil
}

// isBPF refuses a folder that is not in a bpf file system.
func isBPF(path string) error {
	var found unix.Statfs_t
	if err := unix.Statfs(path, &found); err != nil {
		return fmt.Errorf("pin folder %s: %w", path, err)
	}
	if found.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("pin folder %s is not in a bpf file system: mount one with `mount -t bpf bpf /sys/fs/bpf`, or name another folder with --pins", path)
	}
	return nil
}

// existing is the longest part of a path that is there.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil || path == filepath.Dir(path) {
			return path
		}
		path = filepath.Dir(path)
	}
}

// drop lets go of maps that belong together.
func (d *datapath) drop(names []string) {
	for _, name := range names {
		if m := d.maps[name]; m != nil {
			m.Close()
			delete(d.maps, name)
		}
	}
}

// loaded is a set of programs and all the maps they use.
type loaded struct {
	programs map[string]*ebpf.Program
	maps     map[string]*ebpf.Map
}

// load loads the programs over the maps that are there and makes the others. It
// changes nothing that is in force.
func (d *datapath) load(have map[string]*ebpf.Map, room capacity) (loaded, error) {
	spec, err := liveSpec()
	if err != nil {
		return loaded{}, err
	}
	return d.loadSpec(spec, have, room)
}

// loadSpec is load for who has read the embedded object; nobody can use it again.
func (d *datapath) loadSpec(spec *ebpf.CollectionSpec, have map[string]*ebpf.Map, room capacity) (loaded, error) {
	places := 1
	if d.packets {
		places = powerOfTwo(2*d.carried, flowPlaces(d.settings.Flows))
	}
	if m := have[datapathMapPlaces]; m != nil {
		places = int(m.MaxEntries())
		d.packets = places > 1
	}
	if err := d.adapt(spec, places); err != nil {
		return loaded{}, err
	}
	// verifying takes most of the time of a start
	maps.DeleteFunc(spec.Programs, func(name string, p *ebpf.ProgramSpec) bool {
		return !d.packets && p.Type == ebpf.SchedCLS || !d.bare && slices.Contains(bareWires[:], name)
	})
	sizeMaps(spec, room, places)
	for name, m := range have {
		spec.Maps[name].MaxEntries = m.MaxEntries() // it may be larger than the default
	}
	collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: have})
	if err != nil {
		return loaded{}, loadError(err)
	}
	defer collection.Close()
	result := loaded{collection.Programs, map[string]*ebpf.Map{}}
	for name, m := range collection.Maps {
		switch {
		case have[name] != nil:
			result.maps[name] = have[name]
		case !isConstants(name):
			result.maps[name] = m
			delete(collection.Maps, name) // ours now
		}
	}
	collection.Programs = nil
	return result, writeVersions(result.maps[datapathMapSchema])
}

// sizeMaps gives the maps their room.
func sizeMaps(spec *ebpf.CollectionSpec, room capacity, places int) {
	spec.Maps[datapathMapServices].MaxEntries = uint32(room.services)
	spec.Maps[datapathMapSlots].MaxEntries = uint32(room.backends)
	spec.Maps[datapathMapBackends].MaxEntries = uint32(room.backends)
	// a flow's replies are written before its place is taken
	spec.Maps[datapathMapTranslations].MaxEntries = uint32(2*places + flowSlack)
	spec.Maps[datapathMapMasquerades].MaxEntries = masqueradesOf(places)
	spec.Maps[datapathMapPlaces].MaxEntries = uint32(places)
	spec.Maps[datapathMapVacant].MaxEntries = uint32(places)
}

// liveSpec is the embedded object without what only `explain` and `bench` run.
func liveSpec() (*ebpf.CollectionSpec, error) {
	spec, err := loadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read embedded programs: %w", err)
	}
	for _, name := range []string{datapathProgExplain, datapathProgNothing, datapathProgOneLookUp, datapathProgAskConntrack} {
		delete(spec.Programs, name)
	}
	delete(spec.Maps, datapathMapExplained)
	return spec, nil
}

// probe finds out what this kernel lacks.
func (d *datapath) probe() {
	d.tcx = haveTCX()
	if !d.tcx {
		d.degraded = append(d.degraded, "the packet path is attached by clsact filters: tcx needs Linux 6.6")
	}
	d.findTracker()
	err := features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval)
	if errors.Is(err, ebpf.ErrNotSupported) { // what is not known, loading will tell
		d.noSetRetval = true
		d.degraded = append(d.degraded, "a Service without endpoints is refused with EPERM, not ECONNREFUSED: bpf_set_retval needs Linux 5.18")
	}
}

// adapt gives the programs their read-only settings.
func (d *datapath) adapt(spec *ebpf.CollectionSpec, places int) error {
	settings := map[string]any{
		"first_port":     d.firstPort,
		"port_count":     d.portCount,
		"can_set_error":  !d.noSetRetval,
		"asks_conntrack": d.asksConntrack,
		"default_path":   uint8(d.settings.Path.number()),
		"node_cookie":    d.node,
		"places_mask":    uint32(places - 1),
	}
	for name, value := range settings {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s of the service programs: %w", name, err)
		}
	}
	if !d.asksConntrack {
		conntrack.AskNobody(spec)
	}
	return nil
}

// cookie is that of the node's own network namespace.
func (d *datapath) cookie() uint64 { return d.node }

// loadError turns a failed load into what the user can do about it.
func loadError(err error) error {
	return need.Loading("load the service programs", "Linux 5.15 with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF", err)
}

// settle puts waiting programs in force. Calling it again does nothing.
func (d *datapath) settle() error {
	if d.waiting == nil {
		return nil
	}
	if err := d.putInForce(loaded{d.waiting, d.maps}); err != nil {
		return err
	}
	d.waiting = nil
	return nil
}

// putInForce makes the hooks run these programs, and pins their maps: first
// beside the old ones, then, when every hook has been switched, over them. On an
// error the hooks go back to this process's last programs, if it had any; else
// some run the new ones, over tables as whole as the old.
func (d *datapath) putInForce(next loaded) error {
	if d.leftFlows() {
		if err := d.handOver(next); err != nil {
			return err
		}
	}
	fresh, err := d.pinBeside(next.maps)
	if err != nil {
		d.unpinBeside(fresh)
		return err
	}
	hooks := d.hooks()
	for i, hook := range hooks {
		if err := d.attachIfThere(hook, next.programs[hook.program]); err != nil {
			for _, switched := range hooks[:i] {
				before, there := d.programs[switched.program], d.attached[switched.name]
				if before != nil && there != nil {
					err = errors.Join(err, there.Run(before))
				}
			}
			d.unpinBeside(fresh)
			return err
		}
	}
	if len(fresh) > 0 {
		if err := d.takeNames(); err != nil {
			return err
		}
		if err := writeVersions(next.maps[datapathMapSchema]); err != nil {
			return err
		}
	}
	closePrograms(d.programs)
	d.programs = next.programs
	return nil
}

// pinBeside pins the maps that are not pinned yet, under names of their own, and
// returns which those are.
func (d *datapath) pinBeside(maps map[string]*ebpf.Map) (fresh []string, err error) {
	if d.settings.Pins == "" {
		return nil, nil
	}
	for name, m := range maps {
		if bpfmap.IsPinned(m, d.pin(name)) {
			continue
		}
		fresh = append(fresh, name)
		copied, err := m.Clone() // a clone knows nothing of earlier pins
		if err == nil {
			d.unpinBeside([]string{name})
			err = copied.Pin(d.pin(nextPrefix + name))
			copied.Close()
		}
		if err != nil {
			return fresh, fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	return fresh, nil
}

func (d *datapath) unpinBeside(names []string) {
	for _, name := range names {
		_ = os.Remove(d.pin(nextPrefix + name))
	}
}

// lostPins lists the maps' pins that should be there and are not.
func (d *datapath) lostPins() (gone []lost) {
	if d.settings.Pins == "" {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(d.maps)) {
		if !bpfmap.IsPinned(d.maps[name], d.pin(name)) {
			gone = append(gone, lost("pin "+name))
		}
	}
	return gone
}

// restore brings back what was lost.
func (d *datapath) restore() error {
	if d.settings.Pins != "" {
		if err := os.MkdirAll(d.settings.Pins, 0o700); err != nil {
			return fmt.Errorf("make pin folder: %w", err)
		}
	}
	again, err := d.load(d.maps, capacity{1, 1})
	if err != nil {
		return err
	}
	if err := d.putInForce(again); err != nil {
		closePrograms(again.programs)
		return err
	}
	return nil
}

// grow moves the tables into larger maps: these are filled while the old ones
// serve, then each program is switched over. It is the only writer meanwhile.
// The sockets' flows stay: backends keep their numbers. On an error everything
// is as before.
func (d *datapath) grow(t *tables, room capacity) error {
	err := d.exchange(tableMaps, room, func(next map[string]*ebpf.Map) error {
		for _, name := range tableMaps {
			if err := copyMap(d.maps[name], next[name]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("enlarge maps to %d services and %d backends: %w", room.services, room.backends, err)
	}
	t.use(d.maps)
	return nil
}

// makeFlows gives the flows of the packet path their maps, which have no room
// until somebody needs it.
func (d *datapath) makeFlows() error {
	if d.packets {
		return nil
	}
	d.packets = true
	if err := d.exchange(packetMaps, capacity{1, 1}, func(map[string]*ebpf.Map) error { return nil }); err != nil {
		d.packets = false
		return fmt.Errorf("make the maps of the packet path: %w", err)
	}
	return nil
}

// loadBare loads the programs for wires without Ethernet headers, which few nodes have.
func (d *datapath) loadBare() error {
	if d.bare {
		return nil
	}
	d.bare = true
	if err := d.exchange(nil, capacity{1, 1}, func(map[string]*ebpf.Map) error { return nil }); err != nil {
		d.bare = false
		return fmt.Errorf("load the programs for devices without Ethernet headers: %w", err)
	}
	return nil
}

// hasBareWire says whether an earlier process served one.
func (d *datapath) hasBareWire() bool {
	for _, port := range d.ports {
		if port.side == ofWireL3 {
			return true
		}
	}
	return false
}

// exchange puts new maps of these names in force: they are filled while the old
// ones serve, then each program is switched over. On an error everything is as
// before.
func (d *datapath) exchange(names []string, room capacity, fill func(next map[string]*ebpf.Map) error) error {
	stay := maps.Clone(d.maps)
	for _, name := range names {
		delete(stay, name)
	}
	next, err := d.load(stay, room)
	if err != nil {
		return err
	}
	err = fill(next.maps)
	// Programs that wait for their maps to be filled go on waiting.
	if err == nil && d.waiting == nil {
		err = d.putInForce(next)
	}
	if err != nil {
		closePrograms(next.programs)
		for _, name := range names {
			next.maps[name].Close()
		}
		return err
	}
	if d.waiting != nil {
		closePrograms(d.waiting)
		d.waiting = next.programs
	}
	d.drop(names)
	d.maps = next.maps
	return nil
}

// copyMap copies every entry, as bytes.
func copyMap(from, to *ebpf.Map) error {
	key := make([]byte, from.KeySize())
	value := make([]byte, from.ValueSize())
	entries := from.Iterate()
	for entries.Next(&key, &value) {
		if err := to.Put(key, value); err != nil {
			return fmt.Errorf("copy %s: %w", from.String(), err)
		}
	}
	return entries.Err()
}

func (d *datapath) pin(name string) string { return filepath.Join(d.settings.Pins, name) }

func (d *datapath) close() {
	for _, m := range d.maps {
		m.Close()
	}
	bpfmap.CloseAll(d.left)
	for _, a := range d.attached {
		a.Close()
	}
	closePrograms(d.programs)
	closePrograms(d.waiting)
	if d.lock != nil {
		d.lock.Close()
	}
}

func closePrograms(programs map[string]*ebpf.Program) {
	for _, program := range programs {
		program.Close()
	}
}

// isConstants tells the map of read-only settings, which belongs to one load.
func isConstants(name string) bool { return strings.HasPrefix(name, ".") }

// reasonNames are the words of `enum reason`, in order.
func reasonNames(spec *ebpf.CollectionSpec) ([]string, error) {
	return bpfmap.Words(spec.Types, "reason", "REASON_", int(datapathReasonREASON_COUNT))
}
