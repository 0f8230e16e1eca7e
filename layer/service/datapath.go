package service

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
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

// sized are the maps that grow with the cluster.
var sized = []string{datapathMapServices, datapathMapSlots, datapathMapBackends}

const (
	linkPrefix = "link_"
	nextPrefix = "next_" // a bpf file system takes no dots in names
)

// datapath is what the layer has in the kernel.
type datapath struct {
	settings Settings
	maps     map[string]*ebpf.Map
	links    map[string]link.Link
	reasons  []string
	degraded []string
	// unlinked is the set of loaded programs that replace those of an earlier
	// process once the maps are filled (see commit).
	unlinked map[string]*ebpf.Program
}

// capacity is how many frontends and backends the maps must be able to hold.
type capacity struct{ services, backends int }

// roomFor is the capacity for a need: the next power of two from twice the
// need, at least 4,096 Services and 16,384 backends. An empty map of that size
// costs 16 bytes an entry (a hash bucket), so the smallest set costs 0.6 MB.
func roomFor(services, backends int) capacity {
	return capacity{powerOfTwo(2*services, 1<<12), powerOfTwo(2*backends, 1<<14)}
}

func powerOfTwo(n, least int) int {
	for least < n {
		least *= 2
	}
	return least
}

// open takes over the maps pinned by an earlier process, or makes new ones, and
// loads this process's programs over them. Where nothing was attached before,
// or the maps were taken over, the programs are in force when it returns;
// otherwise commit puts them in force.
func open(settings Settings) (*datapath, error) {
	if err := ready(settings); err != nil {
		return nil, err
	}
	d := &datapath{settings: settings, maps: map[string]*ebpf.Map{}, links: map[string]link.Link{}}
	spec, err := loadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read embedded programs: %w", err)
	}
	if d.reasons, err = reasonNames(spec); err != nil {
		return nil, err
	}
	adopted, err := d.adoptMaps(spec)
	if err != nil {
		d.close()
		return nil, err
	}
	if err := d.load(spec, roomFor(0, 0)); err != nil {
		d.close()
		return nil, err
	}
	if err := d.openLinks(); err != nil {
		d.close()
		return nil, err
	}
	if adopted || len(d.links) == 0 {
		if err := d.commit(); err != nil {
			d.close()
			return nil, err
		}
	}
	return d, nil
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
	if err := unix.Statfs(existing(settings.Pins), &found); err != nil {
		return fmt.Errorf("%s: pin folder %s: %w", act, settings.Pins, err)
	}
	if found.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%s: %s is not in a bpf file system: mount one with `mount -t bpf bpf /sys/fs/bpf`, or name another folder with --pins", act, settings.Pins)
	}
	if err := os.MkdirAll(settings.Pins, 0o700); err != nil {
		return fmt.Errorf("%s: make pin folder: %w", act, err)
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

// adoptMaps opens the maps an earlier process pinned. If any of them is missing
// or has another layout, none is used and the answer is false.
func (d *datapath) adoptMaps(spec *ebpf.CollectionSpec) (bool, error) {
	if d.settings.Pins == "" {
		return false, nil
	}
	for name, want := range spec.Maps {
		if isConstants(name) {
			continue
		}
		pinned, err := ebpf.LoadPinnedMap(d.pin(name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			d.closeMaps()
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("open pinned map %s: %w", name, err)
		}
		d.maps[name] = pinned
		if !sameLayout(pinned, want) {
			d.closeMaps()
			return false, nil
		}
	}
	return true, nil
}

func sameLayout(have *ebpf.Map, want *ebpf.MapSpec) bool {
	return have.Type() == want.Type && have.KeySize() == want.KeySize &&
		have.ValueSize() == want.ValueSize && have.Flags() == want.Flags &&
		(slices.Contains(sized, want.Name) || want.Type == ebpf.SkStorage || have.MaxEntries() == want.MaxEntries)
}

// load loads the programs over d.maps and makes the maps that are not there.
func (d *datapath) load(spec *ebpf.CollectionSpec, room capacity) error {
	spec.Maps[datapathMapServices].MaxEntries = uint32(room.services)
	spec.Maps[datapathMapSlots].MaxEntries = uint32(room.backends)
	spec.Maps[datapathMapBackends].MaxEntries = uint32(room.backends)
	replace := map[string]*ebpf.Map{}
	for name, m := range d.maps {
		// The spec has to agree with a map that is larger than the default.
		spec.Maps[name].MaxEntries = m.MaxEntries()
		replace[name] = m
	}
	options := ebpf.CollectionOptions{MapReplacements: replace}
	loaded, err := ebpf.NewCollectionWithOptions(spec, options)
	if err != nil {
		// Before 5.18 there is no bpf_set_retval.
		if e := spec.Variables["can_set_error"].Set(false); e != nil {
			return fmt.Errorf("set can_set_error: %w", e)
		}
		old := err
		if loaded, err = ebpf.NewCollectionWithOptions(spec, options); err != nil {
			return loadError(old)
		}
		d.degraded = []string{"a Service without endpoints is refused with EPERM, not ECONNREFUSED: bpf_set_retval needs Linux 5.18"}
	}
	for name, m := range loaded.Maps {
		if _, have := d.maps[name]; !have && !isConstants(name) {
			if d.maps[name], err = m.Clone(); err != nil {
				loaded.Close()
				return fmt.Errorf("keep map %s: %w", name, err)
			}
		}
	}
	d.unlinked = loaded.Programs
	loaded.Programs = nil
	loaded.Close()
	return nil
}

// loadError turns a failed load into what the user can do about it.
func loadError(err error) error {
	const act = "load the service programs"
	if errors.Is(err, unix.EPERM) {
		return &need.Privilege{Act: act, Capabilities: []string{"CAP_BPF", "CAP_NET_ADMIN"}}
	}
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.ENOSYS) {
		return &need.Feature{Act: act, Feature: err.Error(), Since: "Linux 5.15 with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF and CONFIG_DEBUG_INFO_BTF"}
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

// commit puts the loaded programs in force: each link that is there is switched
// to its new program in one step, each that is missing is made. Then maps and
// links are pinned. Calling it again does nothing.
func (d *datapath) commit() error {
	if d.unlinked == nil {
		return nil
	}
	for _, hook := range hooks {
		if err := d.attach(hook.name, hook.attach); err != nil {
			return err
		}
	}
	closePrograms(d.unlinked)
	d.unlinked = nil
	return d.pinMaps()
}

func (d *datapath) pinMaps() error {
	if d.settings.Pins == "" {
		return nil
	}
	for name, m := range d.maps {
		if err := repin(m, d.pin(name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	return nil
}

func (d *datapath) attach(name string, where ebpf.AttachType) error {
	program := d.unlinked[name]
	if have := d.links[name]; have != nil {
		if d.aliveOnCgroup(have) {
			if err := have.Update(program); err != nil {
				return fmt.Errorf("switch %s to the new program: %w", name, err)
			}
			return nil
		}
		// The cgroup it was attached to is gone: the link holds nothing.
		_ = have.Unpin()
		have.Close()
		delete(d.links, name)
	}
	made, err := link.AttachCgroup(link.CgroupOptions{Path: d.settings.Cgroup, Attach: where, Program: program})
	if err != nil {
		return fmt.Errorf("attach %s to cgroup %s: %w", name, d.settings.Cgroup, err)
	}
	d.links[name] = made
	if d.settings.Pins == "" {
		return nil
	}
	if err := made.Pin(d.pin(linkPrefix + name)); err != nil {
		return fmt.Errorf("pin link %s: %w", name, err)
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

// repin pins m at path, over what is there, in one step.
func repin(m *ebpf.Map, path string) error {
	next := filepath.Join(filepath.Dir(path), nextPrefix+filepath.Base(path))
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if m.IsPinned() {
		return nil
	}
	if err := m.Pin(next); err != nil {
		return err
	}
	return os.Rename(next, path)
}

// grow moves services, slots and backends into larger maps: these are filled
// while the old ones serve, then each program is switched over. It is the only
// writer meanwhile. The sockets' flows stay: backends keep their numbers.
func (d *datapath) grow(t *tables, room capacity) error {
	spec, err := loadDatapath()
	if err != nil {
		return fmt.Errorf("read embedded programs: %w", err)
	}
	if len(d.degraded) > 0 {
		if err := spec.Variables["can_set_error"].Set(false); err != nil {
			return err
		}
	}
	// Programs that wait for their maps to be filled go on waiting.
	waiting := d.unlinked != nil
	closePrograms(d.unlinked)
	old := map[string]*ebpf.Map{}
	for _, name := range sized {
		old[name] = d.maps[name]
		delete(d.maps, name)
	}
	if err = d.load(spec, room); err == nil {
		for name, from := range old {
			if err = copyMap(from, d.maps[name]); err != nil {
				break
			}
		}
	}
	if err == nil && !waiting {
		err = d.commit()
	}
	for name, m := range old {
		if err != nil { // stay in the old house
			if d.maps[name] != nil {
				d.maps[name].Close()
			}
			d.maps[name] = m
			continue
		}
		m.Close()
	}
	if err != nil {
		return fmt.Errorf("enlarge maps to %d services and %d backends: %w", room.services, room.backends, err)
	}
	t.use(d.maps)
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

func (d *datapath) closeMaps() {
	for name, m := range d.maps {
		m.Close()
		delete(d.maps, name)
	}
}

func (d *datapath) close() {
	d.closeMaps()
	for _, l := range d.links {
		l.Close()
	}
	closePrograms(d.unlinked)
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
