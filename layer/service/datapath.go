package service

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/layer"
)

// hooks are where each program of connect.bpf.c is attached.
var hooks = []struct {
	name   string
	attach ebpf.AttachType
}{
	{datapathProgConnect4, ebpf.AttachCGroupInet4Connect},
	{datapathProgConnect6, ebpf.AttachCGroupInet6Connect},
	{datapathProgSendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
	{datapathProgSendmsg6, ebpf.AttachCGroupUDP6Sendmsg},
	{datapathProgRecvmsg4, ebpf.AttachCGroupUDP4Recvmsg},
	{datapathProgRecvmsg6, ebpf.AttachCGroupUDP6Recvmsg},
	{datapathProgGetpeername4, ebpf.AttachCgroupInet4GetPeername},
	{datapathProgGetpeername6, ebpf.AttachCgroupInet6GetPeername},
}

// tableMaps belong together and grow with the cluster.
var tableMaps = []string{datapathMapServices, datapathMapSlots, datapathMapBackends}

const (
	linkPrefix = "link_"
	nextPrefix = "next_" // a pin that is about to become the one without; no dots in these names
)

// datapath is what the layer has in the kernel.
type datapath struct {
	settings Settings
	// maps are used by the programs in force, or by those that wait.
	maps  map[string]*ebpf.Map
	links map[string]link.Link
	// programs are in force; nil before this process has put its own there.
	programs map[string]*ebpf.Program
	// waiting are loaded programs that replace those of an earlier process once
	// the tables are filled (see settle).
	waiting  map[string]*ebpf.Program
	lock     *os.File
	reasons  []string
	degraded []string
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
	d := &datapath{settings: settings, maps: map[string]*ebpf.Map{}, links: map[string]link.Link{}}
	if err := d.open(); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

func (d *datapath) open() (err error) {
	if d.lock, err = lockFolder(d.settings.Pins); err != nil {
		return err
	}
	spec, err := loadDatapath()
	if err != nil {
		return fmt.Errorf("read embedded programs: %w", err)
	}
	if d.reasons, err = reasonNames(spec); err != nil {
		return err
	}
	if err := d.adoptMaps(spec); err != nil {
		return err
	}
	adopted := d.maps[datapathMapServices] != nil
	loaded, err := d.load(d.maps, roomFor(0, 0))
	if err != nil {
		return err
	}
	d.maps, d.waiting = loaded.maps, loaded.programs
	if err := d.openLinks(); err != nil {
		return err
	}
	if adopted || len(d.links) == 0 {
		return d.settle()
	}
	return nil
}

// lockFolder holds a pin folder for this process until the file is closed: the
// maps have one writer.
func lockFolder(path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	folder, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("lock pin folder: %w", err)
	}
	err = unix.Flock(int(folder.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = layer.ErrInUse
	}
	if err != nil {
		folder.Close()
		return nil, fmt.Errorf("lock pin folder %s: %w", path, err)
	}
	return folder, nil
}

// ready checks what can be checked before anything is changed.
func ready(settings Settings) error {
	const act = "attach the service layer"
	if err := need.Check(act, "CAP_BPF", "CAP_NET_ADMIN"); err != nil {
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

// adoptMaps opens those maps of an earlier process whose layout is ours: the
// tables all or none, each of the others by itself, so that sockets keep their
// flows whatever else a new version changes.
func (d *datapath) adoptMaps(spec *ebpf.CollectionSpec) error {
	if d.settings.Pins == "" {
		return nil
	}
	for name, want := range spec.Maps {
		if isConstants(name) {
			continue
		}
		pinned, err := ebpf.LoadPinnedMap(d.pin(name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open pinned map %s: %w", name, err)
		}
		if !sameLayout(pinned, want) {
			pinned.Close()
			continue
		}
		d.maps[name] = pinned
	}
	for _, name := range tableMaps {
		if d.maps[name] == nil {
			d.dropTables()
			return nil
		}
	}
	return nil
}

func (d *datapath) dropTables() {
	for _, name := range tableMaps {
		if m := d.maps[name]; m != nil {
			m.Close()
			delete(d.maps, name)
		}
	}
}

func sameLayout(have *ebpf.Map, want *ebpf.MapSpec) bool {
	return have.Type() == want.Type && have.KeySize() == want.KeySize &&
		have.ValueSize() == want.ValueSize && have.Flags() == want.Flags &&
		(slices.Contains(tableMaps, want.Name) || want.Type == ebpf.SkStorage || have.MaxEntries() == want.MaxEntries)
}

// loaded is a set of programs and all the maps they use.
type loaded struct {
	programs map[string]*ebpf.Program
	maps     map[string]*ebpf.Map
}

// load loads the programs over the maps that are there and makes the others. It
// changes nothing that is in force.
func (d *datapath) load(have map[string]*ebpf.Map, room capacity) (loaded, error) {
	spec, err := loadDatapath()
	if err != nil {
		return loaded{}, fmt.Errorf("read embedded programs: %w", err)
	}
	if err := d.adapt(spec); err != nil {
		return loaded{}, err
	}
	spec.Maps[datapathMapServices].MaxEntries = uint32(room.services)
	spec.Maps[datapathMapSlots].MaxEntries = uint32(room.backends)
	spec.Maps[datapathMapBackends].MaxEntries = uint32(room.backends)
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
	return result, nil
}

// adapt turns off what this kernel lacks.
func (d *datapath) adapt(spec *ebpf.CollectionSpec) error {
	d.degraded = nil
	err := features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval)
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return nil // there, or not known: loading will tell
	}
	d.degraded = []string{"a Service without endpoints is refused with EPERM, not ECONNREFUSED: bpf_set_retval needs Linux 5.18"}
	if err := spec.Variables["can_set_error"].Set(false); err != nil {
		return fmt.Errorf("turn off can_set_error: %w", err)
	}
	return nil
}

// loadError turns a failed load into what the user can do about it.
func loadError(err error) error {
	const act = "load the service programs"
	var refused *ebpf.VerifierError
	switch {
	case errors.Is(err, unix.EPERM):
		return &need.Privilege{Act: act, Capabilities: []string{"CAP_BPF", "CAP_NET_ADMIN"}}
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.ENOSYS), errors.As(err, &refused):
		return &need.Feature{Act: act, Feature: fmt.Sprintf("support for them (%v)", err),
			Since: "Linux 5.15 with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF"}
	}
	return fmt.Errorf("%s: %w", act, err)
}

// openLinks opens the attachments of an earlier process.
func (d *datapath) openLinks() error {
	if d.settings.Pins == "" {
		return nil
	}
	for _, hook := range hooks {
		pinned, err := link.LoadPinnedLink(d.pin(linkPrefix+hook.name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("open pinned link %s: %w", hook.name, err)
		}
		d.links[hook.name] = pinned
	}
	return nil
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
	fresh, err := d.pinBeside(next.maps)
	if err != nil {
		d.unpinBeside(fresh)
		return err
	}
	for i, hook := range hooks {
		if err := d.attach(hook.name, hook.attach, next.programs[hook.name]); err != nil {
			for _, switched := range hooks[:i] {
				if before := d.programs[switched.name]; before != nil {
					err = errors.Join(err, d.links[switched.name].Update(before))
				}
			}
			d.unpinBeside(fresh)
			return err
		}
	}
	for _, name := range fresh {
		if err := os.Rename(d.pin(nextPrefix+name), d.pin(name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
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
		if d.isPinned(name, m) {
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

// isPinned says whether a map's pin leads to this very map.
func (d *datapath) isPinned(name string, m *ebpf.Map) bool {
	pinned, err := ebpf.LoadPinnedMap(d.pin(name), nil)
	if err != nil {
		return false
	}
	defer pinned.Close()
	there, err1 := pinned.Info()
	here, err2 := m.Info()
	if err1 != nil || err2 != nil {
		return false
	}
	thereID, _ := there.ID()
	hereID, _ := here.ID()
	return thereID == hereID
}

// attach makes a hook run a program: by switching the link that is there, else
// by a new link.
func (d *datapath) attach(name string, where ebpf.AttachType, program *ebpf.Program) error {
	if have := d.links[name]; have != nil && d.aliveOnCgroup(have) {
		if err := have.Update(program); err != nil {
			return fmt.Errorf("switch %s to the new program: %w", name, err)
		}
		return d.pinLink(name, have)
	}
	d.letGo(name) // the cgroup it was attached to is gone, or somebody detached it
	made, err := link.AttachCgroup(link.CgroupOptions{Path: d.settings.Cgroup, Attach: where, Program: program})
	if err != nil {
		return fmt.Errorf("attach %s to cgroup %s: %w", name, d.settings.Cgroup, err)
	}
	d.links[name] = made
	return d.pinLink(name, made)
}

// letGo forgets a link, and takes it away if nobody else holds it.
func (d *datapath) letGo(name string) {
	if l := d.links[name]; l != nil {
		_ = l.Unpin()
		l.Close()
		delete(d.links, name)
	}
}

// pinLink makes sure that a link's pin is there.
func (d *datapath) pinLink(name string, l link.Link) error {
	path := d.pin(linkPrefix + name)
	if d.settings.Pins == "" {
		return nil
	}
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	_ = l.Unpin() // it may remember a pin that somebody removed
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pin link %s: %w", name, err)
	}
	return nil
}

// lost lists the programs and pins that should be there and are not.
func (d *datapath) lost() []lost {
	if d.waiting != nil {
		return nil
	}
	var gone []lost
	for _, hook := range hooks {
		l := d.links[hook.name]
		if l == nil || !d.aliveOnCgroup(l) {
			gone = append(gone, lost("program "+hook.name))
		} else if _, err := os.Stat(d.pin(linkPrefix + hook.name)); d.settings.Pins != "" && err != nil {
			gone = append(gone, lost("pin "+linkPrefix+hook.name))
		}
	}
	if d.settings.Pins == "" {
		return gone
	}
	for _, name := range slices.Sorted(maps.Keys(d.maps)) {
		if !d.isPinned(name, d.maps[name]) {
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

// aliveOnCgroup says whether a link is still attached to the settings' cgroup:
// its id is the inode number of the cgroup's folder.
func (d *datapath) aliveOnCgroup(l link.Link) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	cgroup := info.Cgroup()
	var folder unix.Stat_t
	return cgroup != nil && unix.Stat(d.settings.Cgroup, &folder) == nil && cgroup.CgroupId == folder.Ino
}

// grow moves the tables into larger maps: these are filled while the old ones
// serve, then each program is switched over. It is the only writer meanwhile.
// The sockets' flows stay: backends keep their numbers. On an error everything
// is as before.
func (d *datapath) grow(t *tables, room capacity) error {
	next, err := d.load(d.others(), room)
	if err != nil {
		return fmt.Errorf("enlarge maps: %w", err)
	}
	for _, name := range tableMaps {
		if err == nil {
			err = copyMap(d.maps[name], next.maps[name])
		}
	}
	// Programs that wait for their maps to be filled go on waiting.
	if err == nil && d.waiting == nil {
		err = d.putInForce(next)
	}
	if err != nil {
		closePrograms(next.programs)
		for _, name := range tableMaps {
			next.maps[name].Close()
		}
		return fmt.Errorf("enlarge maps to %d services and %d backends: %w", room.services, room.backends, err)
	}
	if d.waiting != nil {
		closePrograms(d.waiting)
		d.waiting = next.programs
	}
	d.dropTables()
	d.maps = next.maps
	t.use(d.maps)
	return nil
}

// others are the maps that stay when the tables grow.
func (d *datapath) others() map[string]*ebpf.Map {
	others := maps.Clone(d.maps)
	for _, name := range tableMaps {
		delete(others, name)
	}
	return others
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
	for _, l := range d.links {
		l.Close()
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

// reasonNames reads the words of `enum reason` from the object's BTF, in order:
// "no_backend" for REASON_NO_BACKEND.
func reasonNames(spec *ebpf.CollectionSpec) ([]string, error) {
	var enum *btf.Enum
	if err := spec.Types.TypeByName("reason", &enum); err != nil {
		return nil, fmt.Errorf("read enum reason: %w", err)
	}
	names := make([]string, datapathReasonREASON_COUNT)
	for _, value := range enum.Values {
		if value.Value < uint64(len(names)) {
			names[value.Value] = strings.ToLower(strings.TrimPrefix(value.Name, "REASON_"))
		}
	}
	return names, nil
}
