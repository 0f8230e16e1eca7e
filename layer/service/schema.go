package service

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/bpfmap"
)

// group is maps that are taken over together: as they are where the process that
// left them had the same version and layout, else entry by entry (migrate.go),
// else not at all.
type group struct {
	number  datapathSchemaGroup
	version datapathSchemaVersion
	maps    []string
	// without says what it means that they could not be taken over; empty where
	// it means nothing, because they are filled anew.
	without string
}

var groups = append([]group{
	{datapathSchemaGroupSCHEMA_TABLES, datapathSchemaVersionVERSION_TABLES, tableMaps, ""},
	{datapathSchemaGroupSCHEMA_SOCKETS, datapathSchemaVersionVERSION_SOCKETS, []string{datapathMapConnected},
		"getpeername() of sockets that were connected before shows the endpoint"},
	{datapathSchemaGroupSCHEMA_SOCKETS, datapathSchemaVersionVERSION_SOCKETS, []string{datapathMapSent},
		"UDP sockets that send without connecting began anew"},
	{datapathSchemaGroupSCHEMA_FLOWS, datapathSchemaVersionVERSION_FLOWS, flowMaps,
		"flows of the packet path that were open before are broken"},
	{datapathSchemaGroupSCHEMA_FLOWS, datapathSchemaVersionVERSION_FLOWS, []string{datapathMapMasquerades},
		"masqueraded connections that were open before are broken"},
	{datapathSchemaGroupSCHEMA_FRAGMENTS, datapathSchemaVersionVERSION_FRAGMENTS, []string{datapathMapFragments}, ""},
}, ruleGroups()...)

// ruleGroups take each of the rules by itself.
func ruleGroups() []group {
	var all []group
	for _, name := range ruleMaps {
		all = append(all, group{datapathSchemaGroupSCHEMA_TABLES, datapathSchemaVersionVERSION_TABLES, []string{name}, ""})
	}
	return all
}

// unversioned is what a process that knew of no versions left: the first of each.
const unversioned datapathSchemaVersion = 1

// mixed is the version of a group whose pins are being replaced, one by one.
const mixed datapathSchemaVersion = 0

// versionsOf reads which versions an earlier process's maps have; m is nil where
// it wrote none.
func versionsOf(m *ebpf.Map) (map[datapathSchemaGroup]datapathSchemaVersion, error) {
	versions := map[datapathSchemaGroup]datapathSchemaVersion{}
	for _, g := range groups {
		versions[g.number] = unversioned
		if m == nil || uint32(g.number) >= m.MaxEntries() {
			continue
		}
		var version datapathSchemaVersion
		if err := m.Lookup(g.number, &version); err != nil {
			return nil, fmt.Errorf("read %s: %w", datapathMapSchema, err)
		}
		versions[g.number] = version
	}
	return versions, nil
}

// writeVersions notes in a new map which versions this process's maps have.
func writeVersions(m *ebpf.Map) error {
	for _, g := range groups {
		if err := m.Put(g.number, g.version); err != nil {
			return fmt.Errorf("write %s: %w", datapathMapSchema, err)
		}
	}
	return nil
}

// adoptMaps opens what an earlier process left: into d.maps what is laid out as
// ours, into d.left what has to be carried over.
func (d *datapath) adoptMaps(spec *ebpf.CollectionSpec) error {
	if d.settings.Pins == "" {
		return nil
	}
	found, err := d.openPins(spec)
	defer bpfmap.CloseAll(found) // those that nobody took
	if err != nil {
		return err
	}
	versions, err := versionsOf(found[datapathMapSchema])
	if err != nil {
		return err
	}
	same := true
	for _, g := range groups {
		d.adoptGroup(g, versions[g.number], found, spec)
		same = same && versions[g.number] == g.version
	}
	same = same && len(d.left) == 0
	if sameSizes(found[datapathMapReasons], spec.Maps[datapathMapReasons]) {
		move(found, d.maps, datapathMapReasons)
	}
	if same {
		move(found, d.maps, datapathMapSchema)
	}
	if d.leftFlows() {
		move(found, d.left, datapathMapHandover)
	} else {
		move(found, d.maps, datapathMapHandover)
	}
	return nil
}

// leftFlows says that flows of another version are to be carried over.
func (d *datapath) leftFlows() bool {
	for _, name := range []string{datapathMapConnected, datapathMapSent, datapathMapTranslations, datapathMapMasquerades} {
		if d.left[name] != nil {
			return true
		}
	}
	return false
}

// openPins opens the pins of all maps that this version has.
func (d *datapath) openPins(spec *ebpf.CollectionSpec) (map[string]*ebpf.Map, error) {
	found := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if isConstants(name) {
			continue
		}
		pinned, err := ebpf.LoadPinnedMap(d.pin(name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return found, fmt.Errorf("open pinned map %s: %w", name, err)
		}
		found[name] = pinned
	}
	return found, nil
}

// adoptGroup takes a group's maps from what was found: all or none. A map cannot
// grow: where more flows are asked for, those there are carried over like those of
// another version.
func (d *datapath) adoptGroup(g group, version datapathSchemaVersion, found map[string]*ebpf.Map, spec *ebpf.CollectionSpec) {
	if slices.ContainsFunc(g.maps, func(name string) bool { return found[name] == nil }) {
		return
	}
	to := d.maps
	other := func(name string) bool { return !sameLayout(found[name], spec.Maps[name]) }
	if version != g.version || slices.ContainsFunc(g.maps, other) || d.wantsMore(g, found) {
		if hasNothing(g, found) {
			return
		}
		to = d.left
		if err := carriable(g, version, found, spec); err != nil {
			if g.without != "" {
				d.degraded = append(d.degraded, fmt.Sprintf("%s: another version was in force, and %v", g.without, err))
			}
			return
		}
	}
	move(found, to, g.maps...)
}

// wantsMore says that there is room for flows, but for fewer than are asked for now.
func (d *datapath) wantsMore(g group, found map[string]*ebpf.Map) bool {
	places := flowPlaces(d.settings.Flows)
	switch {
	case hasNothing(g, found):
		return false
	case slices.Contains(g.maps, datapathMapPlaces):
		return int(found[datapathMapPlaces].MaxEntries()) < places
	case slices.Contains(g.maps, datapathMapMasquerades):
		return found[datapathMapMasquerades].MaxEntries() < masqueradesOf(places)
	}
	return false
}

// hasNothing says that a group has no entry that would have to be carried over.
func hasNothing(g group, found map[string]*ebpf.Map) bool {
	if slices.Contains(g.maps, datapathMapMasquerades) {
		return found[datapathMapMasquerades].MaxEntries() <= masqueradesOf(1)
	}
	return g.number == datapathSchemaGroupSCHEMA_FRAGMENTS ||
		g.number == datapathSchemaGroupSCHEMA_FLOWS && found[datapathMapPlaces].MaxEntries() == 1
}

// carriable says whether, and if not why, a group's entries can be carried over.
func carriable(g group, version datapathSchemaVersion, found map[string]*ebpf.Map, spec *ebpf.CollectionSpec) error {
	if version == mixed {
		return errors.New("its process was killed while it put that in force")
	}
	for _, name := range g.maps {
		if _, carried := needed[name]; !carried {
			continue
		}
		if _, err := translatorTo(found[name], spec.Maps[name]); err != nil {
			return err
		}
	}
	return nil
}

// move hands maps over; those that are not there it leaves out.
func move(from, to map[string]*ebpf.Map, names ...string) {
	for _, name := range names {
		if m := from[name]; m != nil {
			to[name] = m
			delete(from, name)
		}
	}
}

// sameSizes is what can be compared of a map whose types are not known.
func sameSizes(have *ebpf.Map, want *ebpf.MapSpec) bool {
	return have != nil && have.Type() == want.Type && have.KeySize() == want.KeySize &&
		have.ValueSize() == want.ValueSize && have.Flags() == want.Flags &&
		(sizedHere(want.Name) || want.Type == ebpf.SkStorage || have.MaxEntries() == want.MaxEntries)
}

// sameLayout says that what is in a map means to us what it meant to its maker,
// as far as its types tell. Where the kernel does not give the types, sizes and
// version have to do.
func sameLayout(have *ebpf.Map, want *ebpf.MapSpec) bool {
	if !sameSizes(have, want) {
		return false
	}
	theirs, err := layoutOf(have)
	if err != nil {
		return true
	}
	ours := layoutWanted(want)
	return slices.Equal(theirs.key, ours.key) && slices.Equal(theirs.value, ours.value)
}

// sizedHere says that a map's size is a setting, not part of its layout.
func sizedHere(name string) bool {
	return slices.Contains(tableMaps, name) || slices.Contains(packetMaps, name)
}
