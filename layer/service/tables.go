package service

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// tables are the maps of service.h, those of client.h that belong to Services, and
// what is known to be in them.
type tables struct {
	services bpfmap.Table[datapathServiceKey, datapathService]
	slots    bpfmap.Table[datapathSlotKey, uint32]
	backends bpfmap.Table[uint32, datapathBackend]
	ranges   bpfmap.Table[datapathSourceRangeKey, uint8]
	ports    bpfmap.Table[uint32, datapathPortRange]

	entries    map[Frontend]*entry
	lastID     uint32
	lastNumber uint32
	// wrapped: numbers have been given that were given before, so each must be
	// looked for first.
	wrapped   bool
	slotCount int
}

// entry is a frontend as it stands in the maps.
type entry struct {
	// inside leads all clients, or where outside has an id those inside the cluster.
	inside, outside slotGroup
	rules
	// ranges are the clients that are let in, sorted, if flags say that they are
	// chosen.
	ranges []netip.Prefix
	// torn: a writer died in the middle; the Service is written anew.
	torn bool
}

// rules are what a Service asks beside its backends.
type rules struct {
	path     Path
	flags    datapathServiceFlags
	affinity uint32
}

// slotGroup is an id and the slots that belong to it. Slots with an invalid address
// are holes: they are missing, or lead nowhere.
type slotGroup struct {
	id    uint32
	slots []slot
}

func (e *entry) slotCount() int { return len(e.inside.slots) + len(e.outside.slots) }

type slot struct {
	number  uint32
	address netip.AddrPort
}

// full says whether the maps have no room for so many.
func (t *tables) full(services, backends int) bool {
	return services > t.services.Capacity() || backends > t.slots.Capacity() || backends > t.backends.Capacity()
}

// need counts what the maps must be able to hold while changes are applied:
// what is there and all that comes, since removals come last.
func (t *tables) need(changes layer.Changes) (services, backends int) {
	services, backends = len(t.entries), t.slotCount
	for _, change := range changes {
		if change.Op != layer.Remove {
			services++
			backends += change.Subject.(*Row).backendCount()
		}
	}
	return services, backends
}

// apply carries changes out in six stages, each over all changes, so that a
// reader meets a whole Service at any moment (service.h says why):
// backends, slots and services are written, then services, slots and backends
// are removed. Then it reads back what it wrote. It returns one error or nil for
// each change.
func (t *tables) apply(changes layer.Changes) []error {
	w := &writing{failed: make([]error, len(changes))}
	if err := t.widen(changes); err != nil {
		for i := range changes {
			w.failed[i] = err
		}
		return w.failed
	}
	after := make([]*entry, len(changes))
	for i, change := range changes {
		row := change.Subject.(*Row)
		before := t.entries[row.Frontend]
		if change.Op == layer.Remove {
			w.remove(i, row.Frontend, before)
			continue
		}
		after[i] = t.arrange(before, row)
		w.write(i, row.Frontend, before, after[i])
	}
	w.run(t)
	t.confirm(changes, after, w.failed)
	for i, change := range changes {
		if w.failed[i] == nil {
			t.settle(change.Subject.(*Row).Frontend, after[i])
		}
	}
	return w.failed
}

// readAllFrom is the number of changes from which on reading whole maps back is
// cheaper than reading entries.
const readAllFrom = 256

// confirm reads the changed Services back and notes those that are not as they
// were written.
func (t *tables) confirm(changes layer.Changes, after []*entry, failed []error) {
	there := &tables{services: t.services, slots: t.slots, backends: t.backends, ranges: t.ranges}
	look := t.readOne
	if len(changes) >= readAllFrom {
		_, _, err := there.read()
		look = func(f Frontend) (*entry, error) { return there.entries[f], err }
	}
	for i, change := range changes {
		if failed[i] != nil {
			continue
		}
		found, err := look(change.Subject.(*Row).Frontend)
		if err == nil {
			err = t.checkRanges(after[i])
		}
		if err == nil && !found.equal(after[i]) {
			err = errors.New("the map holds something other than was written")
		}
		if err != nil {
			failed[i] = fmt.Errorf("read back: %w", err)
		}
	}
}

// readOne reads one Service from the maps; nil if it is not there.
func (t *tables) readOne(frontend Frontend) (*entry, error) {
	service, ok, err := t.services.Get(keyOf(frontend))
	if !ok || err != nil {
		return nil, err
	}
	left := orphans{slots: map[datapathSlotKey]uint32{}, backends: map[uint32]datapathBackend{}}
	if err := t.readSlots(left, service.Id, service.Slots); err != nil {
		return nil, err
	}
	if err := t.readSlots(left, service.Outside, service.OutsideSlots); err != nil {
		return nil, err
	}
	return left.take(service), nil
}

// readSlots reads the slots of an id, and the backends that they lead to.
func (t *tables) readSlots(to orphans, id, count uint32) error {
	for i := range count {
		at := datapathSlotKey{Service: id, Slot: i}
		number, ok, err := t.slots.Get(at)
		if err != nil {
			return err
		}
		if ok {
			to.slots[at] = number
		}
		backend, ok, err := t.backends.Get(number)
		if err != nil {
			return err
		}
		if ok {
			to.backends[number] = backend
		}
	}
	return nil
}

func (e *entry) equal(other *entry) bool {
	if e == nil || other == nil {
		return e == other
	}
	return e.rules == other.rules && !e.torn && e.inside.equal(other.inside) && e.outside.equal(other.outside)
}

func (g slotGroup) equal(other slotGroup) bool {
	return g.id == other.id && slices.Equal(g.slots, other.slots)
}

// checkRanges says which range of a Service was not written.
func (t *tables) checkRanges(e *entry) error {
	if e == nil {
		return nil
	}
	for _, p := range e.ranges {
		if _, there, err := t.ranges.Get(rangeOf(e.inside.id, p)); err != nil || !there {
			return errors.Join(fmt.Errorf("source range %s is not there", p), err)
		}
	}
	return nil
}

func (t *tables) settle(frontend Frontend, now *entry) {
	if old := t.entries[frontend]; old != nil {
		t.slotCount -= old.slotCount()
	}
	if now == nil {
		delete(t.entries, frontend)
		return
	}
	t.slotCount += now.slotCount()
	t.entries[frontend] = now
}

// arrange gives a row's backends slots.
func (t *tables) arrange(before *entry, row *Row) *entry {
	if before == nil {
		before = &entry{inside: slotGroup{id: t.nextID()}}
	}
	now := &entry{rules: rulesOf(row), ranges: row.SourceRanges, inside: t.arrangeSlots(before.inside, row.Backends)}
	if row.Outside == nil {
		return now
	}
	outside := before.outside
	if outside.id == 0 {
		outside.id = t.nextID()
	}
	now.outside = t.arrangeSlots(outside, row.Outside.Backends)
	return now
}

// arrangeSlots gives each wanted backend a slot, moving as few as possible: those
// that stay keep their slot if it still exists, the rest fill the holes.
func (t *tables) arrangeSlots(before slotGroup, wanted []netip.AddrPort) slotGroup {
	stays := make(map[netip.AddrPort]uint32, len(before.slots))
	now := slotGroup{id: before.id, slots: make([]slot, len(wanted))}
	var homeless []slot
	for i, s := range before.slots {
		if _, found := slices.BinarySearchFunc(wanted, s.address, netip.AddrPort.Compare); !found {
			continue
		}
		if _, twice := stays[s.address]; twice {
			continue
		}
		stays[s.address] = s.number
		if i < len(wanted) {
			now.slots[i] = s
		} else {
			homeless = append(homeless, s)
		}
	}
	for _, address := range wanted {
		if _, ok := stays[address]; !ok {
			homeless = append(homeless, slot{t.nextNumber(), address})
		}
	}
	for i := range now.slots {
		if !now.slots[i].address.IsValid() {
			now.slots[i], homeless = homeless[0], homeless[1:]
		}
	}
	return now
}

// rulesOf are a row's.
func rulesOf(row *Row) rules {
	r := rules{path: row.Path, affinity: row.Affinity}
	set := func(flag datapathServiceFlags, is bool) {
		if is {
			r.flags |= flag
		}
	}
	set(datapathServiceFlagsSERVICE_APART, row.Outside != nil)
	set(datapathServiceFlagsSERVICE_DROPS, row.Drops)
	set(datapathServiceFlagsSERVICE_DROPS_OUTSIDE, row.Outside != nil && row.Outside.Drops)
	set(datapathServiceFlagsSERVICE_MASQUERADE, row.Masquerade)
	set(datapathServiceFlagsSERVICE_RANGES, row.SourceRanges != nil)
	return r
}

// row is the entry as a row without names.
func (e *entry) row(frontend Frontend) *Row {
	has := func(flag datapathServiceFlags) bool { return e.flags&flag != 0 }
	row := &Row{
		Frontend: frontend, Path: e.path, Backends: e.inside.addresses(), Affinity: e.affinity, torn: e.torn,
		Drops: has(datapathServiceFlagsSERVICE_DROPS), Masquerade: has(datapathServiceFlagsSERVICE_MASQUERADE),
	}
	if has(datapathServiceFlagsSERVICE_APART) {
		row.Outside = &Outside{Backends: e.outside.addresses(), Drops: has(datapathServiceFlagsSERVICE_DROPS_OUTSIDE)}
	}
	if has(datapathServiceFlagsSERVICE_RANGES) {
		row.SourceRanges = slices.Clone(e.ranges)
		if row.SourceRanges == nil {
			row.SourceRanges = []netip.Prefix{}
		}
	}
	return row
}

// widen makes the range of node ports hold those that come. It is made narrower
// when the tables are adopted.
func (t *tables) widen(changes layer.Changes) error {
	now, _, err := t.ports.Get(0)
	if err != nil {
		return fmt.Errorf("read the range of node ports: %w", err)
	}
	wide := now
	for _, change := range changes {
		if change.Op != layer.Remove {
			wide = wide.with(change.Subject.(*Row).Frontend)
		}
	}
	return t.setRange(now, wide)
}

// fitRange makes the range of node ports hold those that there are, and no others:
// whoever was before may have left a wider one, or none.
func (t *tables) fitRange() error {
	now, _, err := t.ports.Get(0)
	if err != nil {
		return fmt.Errorf("read the range of node ports: %w", err)
	}
	var fits datapathPortRange
	for frontend := range t.entries {
		fits = fits.with(frontend)
	}
	return t.setRange(now, fits)
}

func (t *tables) setRange(now, next datapathPortRange) error {
	if next == now {
		return nil
	}
	if err := errors.Join(t.ports.Put([]uint32{0}, []datapathPortRange{next})...); err != nil {
		return fmt.Errorf("write the range of node ports: %w", err)
	}
	return nil
}

// with is the range that holds a frontend's port, too, if that is a node port. Where
// there is none, both ends are 0, as the map is made.
func (r datapathPortRange) with(frontend Frontend) datapathPortRange {
	port := frontend.Address.Port()
	switch {
	case !frontend.Address.Addr().IsUnspecified():
		return r
	case r == datapathPortRange{}:
		return datapathPortRange{Lowest: port, Highest: port}
	}
	return datapathPortRange{Lowest: min(r.Lowest, port), Highest: max(r.Highest, port)}
}

// nextNumber gives a number that no backend has. It is one that no backend ever
// had, until four thousand million have been given.
func (t *tables) nextNumber() uint32 {
	for {
		t.lastNumber++
		t.wrapped = t.wrapped || t.lastNumber == 0
		if !t.wrapped {
			return t.lastNumber
		}
		if _, taken, _ := t.backends.Get(t.lastNumber); !taken && t.lastNumber != 0 {
			return t.lastNumber
		}
	}
}

// nextID is nextNumber for Services.
func (t *tables) nextID() uint32 {
	for {
		t.lastID++
		t.wrapped = t.wrapped || t.lastID == 0
		if !t.wrapped {
			return t.lastID
		}
		taken := t.lastID == 0
		for _, e := range t.entries {
			taken = taken || e.inside.id == t.lastID || e.outside.id == t.lastID
		}
		if !taken {
			return t.lastID
		}
	}
}

// adopt reads what is in force, and removes what a writer that died halfway
// left over.
func (t *tables) adopt() (*Picture, error) {
	picture, left, err := t.read()
	if err != nil {
		return nil, err
	}
	failed := append(t.slots.Delete(slices.Collect(maps.Keys(left.slots))),
		t.backends.Delete(slices.Collect(maps.Keys(left.backends)))...)
	failed = append(failed, t.ranges.Delete(left.rangeKeys())...)
	if err := errors.Join(failed...); err != nil {
		return nil, fmt.Errorf("clear away what a killed writer left: %w", err)
	}
	return picture, t.fitRange()
}

// orphans are entries that belong to no Service.
type orphans struct {
	slots    map[datapathSlotKey]uint32
	backends map[uint32]datapathBackend
	// ranges are those of each id.
	ranges map[uint32][]netip.Prefix
}

func (o orphans) rangeKeys() []datapathSourceRangeKey {
	var keys []datapathSourceRangeKey
	for id, ranges := range o.ranges {
		for _, p := range ranges {
			keys = append(keys, rangeOf(id, p))
		}
	}
	return keys
}

// read learns what is in the maps and changes nothing in them.
func (t *tables) read() (*Picture, orphans, error) {
	services, err := t.services.All()
	if err != nil {
		return nil, orphans{}, err
	}
	slots, err := t.slots.All()
	if err != nil {
		return nil, orphans{}, err
	}
	backends, err := t.backends.All()
	if err != nil {
		return nil, orphans{}, err
	}
	ranges, err := t.ranges.All()
	if err != nil {
		return nil, orphans{}, err
	}
	for number := range backends {
		t.lastNumber = max(t.lastNumber, number)
	}
	t.entries, t.slotCount = make(map[Frontend]*entry, len(services)), 0
	rows := make(map[Frontend]*Row, len(services))
	left := orphans{slots, backends, rangesByID(ranges)}
	for key, service := range services {
		t.lastID = max(t.lastID, service.Id, service.Outside)
		now := left.take(service)
		frontend := frontendOf(key)
		t.settle(frontend, now)
		rows[frontend] = now.row(frontend)
	}
	return inForce(rows), left, nil
}

func rangesByID(keys map[datapathSourceRangeKey]uint8) map[uint32][]netip.Prefix {
	ranges := map[uint32][]netip.Prefix{}
	for key := range keys {
		ranges[key.Service] = append(ranges[key.Service], prefixOf(key.Client.Word, key.Length-32))
	}
	for _, list := range ranges {
		slices.SortFunc(list, netip.Prefix.Compare)
	}
	return ranges
}

// take moves what is a Service's from what is left to its entry.
func (o orphans) take(service datapathService) *entry {
	now := &entry{
		rules:  rules{pathOf(service.Path), datapathServiceFlags(service.Flags), service.Affinity},
		ranges: o.ranges[service.Id],
	}
	delete(o.ranges, service.Id)
	now.inside = o.takeSlots(now, service.Id, service.Slots)
	now.outside = o.takeSlots(now, service.Outside, service.OutsideSlots)
	return now
}

// takeSlots moves slots and their backends to an entry. A slot that leads nowhere,
// or where another slot leads already, stays a hole, and the Service is torn: the
// next diff mends it.
func (o orphans) takeSlots(of *entry, id, count uint32) slotGroup {
	now := slotGroup{id: id, slots: make([]slot, count)}
	for i := range now.slots {
		at := datapathSlotKey{Service: id, Slot: uint32(i)}
		number, ok := o.slots[at]
		delete(o.slots, at)
		if backend, there := o.backends[number]; ok && there && backend.Service == id {
			now.slots[i] = slot{number, addressOf(backend)}
			delete(o.backends, number)
		} else {
			of.torn = true
		}
	}
	return now
}

// addresses are the group's backends in order.
func (g slotGroup) addresses() []netip.AddrPort {
	var addresses []netip.AddrPort
	for _, s := range g.slots {
		if s.address.IsValid() {
			addresses = append(addresses, s.address)
		}
	}
	slices.SortFunc(addresses, netip.AddrPort.Compare)
	return addresses
}

// writing collects the map operations of many changes by stage.
type writing struct {
	failed      []error
	ranges      puts[datapathSourceRangeKey, uint8]
	delRanges   puts[datapathSourceRangeKey, struct{}]
	backends    puts[uint32, datapathBackend]
	slots       puts[datapathSlotKey, uint32]
	services    puts[datapathServiceKey, datapathService]
	delServices puts[datapathServiceKey, struct{}]
	delSlots    puts[datapathSlotKey, struct{}]
	delBackends puts[uint32, struct{}]
}

// puts are entries and the change that each belongs to.
type puts[K comparable, V any] struct {
	keys   []K
	values []V
	change []int
}

func (p *puts[K, V]) add(change int, key K, value V) {
	p.keys, p.values, p.change = append(p.keys, key), append(p.values, value), append(p.change, change)
}

// without drops the entries of changes that have failed.
func (p *puts[K, V]) without(failed []error) {
	keep := 0
	for i, change := range p.change {
		if failed[change] == nil {
			p.keys[keep], p.values[keep], p.change[keep] = p.keys[i], p.values[i], change
			keep++
		}
	}
	p.keys, p.values, p.change = p.keys[:keep], p.values[:keep], p.change[:keep]
}

func (w *writing) write(change int, frontend Frontend, before, now *entry) {
	if before == nil {
		before = &entry{torn: true}
	}
	w.writeSlots(change, before.inside, now.inside)
	w.writeSlots(change, before.outside, now.outside)
	if before.torn || before.rules != now.rules || before.outside.id != now.outside.id ||
		len(before.inside.slots) != len(now.inside.slots) || len(before.outside.slots) != len(now.outside.slots) {
		w.services.add(change, keyOf(frontend), now.service())
	}
	for _, p := range now.ranges {
		if before.torn || !slices.Contains(before.ranges, p) {
			w.ranges.add(change, rangeOf(now.inside.id, p), 1)
		}
	}
	w.dropRanges(change, before, now.ranges)
}

// service is the entry as it stands in the map services.
func (e *entry) service() datapathService {
	return datapathService{
		Id: e.inside.id, Slots: uint32(len(e.inside.slots)),
		Outside: e.outside.id, OutsideSlots: uint32(len(e.outside.slots)),
		Path: uint8(e.path.number()), Flags: uint8(e.flags), Affinity: e.affinity,
	}
}

func (w *writing) writeSlots(change int, before, now slotGroup) {
	old := before.slots
	had := make(map[uint32]bool, len(old))
	for _, s := range old {
		had[s.number] = true
	}
	for i, s := range now.slots {
		if !had[s.number] {
			w.backends.add(change, s.number, backendOf(s.address, now.id))
		}
		delete(had, s.number)
		if i >= len(old) || old[i] != s {
			w.slots.add(change, datapathSlotKey{Service: now.id, Slot: uint32(i)}, s.number)
		}
	}
	w.drop(change, before, len(now.slots), had)
}

func (w *writing) remove(change int, frontend Frontend, before *entry) {
	w.delServices.add(change, keyOf(frontend), struct{}{})
	if before == nil {
		return
	}
	for _, g := range []slotGroup{before.inside, before.outside} {
		gone := make(map[uint32]bool, len(g.slots))
		for _, s := range g.slots {
			gone[s.number] = true
		}
		w.drop(change, g, 0, gone)
	}
	w.dropRanges(change, before, nil)
}

// drop removes the slots of a group from keep on, and the backends in gone.
func (w *writing) drop(change int, before slotGroup, keep int, gone map[uint32]bool) {
	for i := keep; i < len(before.slots); i++ {
		w.delSlots.add(change, datapathSlotKey{Service: before.id, Slot: uint32(i)}, struct{}{})
	}
	for _, s := range before.slots {
		if s.address.IsValid() && gone[s.number] {
			w.delBackends.add(change, s.number, struct{}{})
		}
	}
}

// dropRanges removes the ranges that are not to stay.
func (w *writing) dropRanges(change int, before *entry, stay []netip.Prefix) {
	for _, p := range before.ranges {
		if !slices.Contains(stay, p) {
			w.delRanges.add(change, rangeOf(before.inside.id, p), struct{}{})
		}
	}
}

func (w *writing) run(t *tables) {
	put(w, &w.backends, "backend", t.backends)
	put(w, &w.slots, "slot", t.slots)
	put(w, &w.ranges, "source range", t.ranges)
	put(w, &w.services, "service", t.services)
	remove(w, &w.delServices, "service", t.services)
	remove(w, &w.delRanges, "source range", t.ranges)
	remove(w, &w.delSlots, "slot", t.slots)
	remove(w, &w.delBackends, "backend", t.backends)
}

func put[K comparable, V any](w *writing, p *puts[K, V], what string, table bpfmap.Table[K, V]) {
	p.without(w.failed)
	w.note(p.change, "write "+what, table.Put(p.keys, p.values))
}

func remove[K comparable, V any](w *writing, p *puts[K, struct{}], what string, table bpfmap.Table[K, V]) {
	p.without(w.failed)
	w.note(p.change, "remove "+what, table.Delete(p.keys))
}

func (w *writing) note(changes []int, act string, failed []error) {
	for i, err := range failed {
		if err != nil {
			w.failed[changes[i]] = errors.Join(w.failed[changes[i]], fmt.Errorf("%s: %w", act, err))
		}
	}
}

func keyOf(f Frontend) datapathServiceKey {
	var key datapathServiceKey
	key.Address.Word = bpfmap.AddrWords(f.Address.Addr())
	key.Port = portOf(f.Address.Port())
	key.Protocol = uint8(f.Protocol)
	return key
}

func frontendOf(key datapathServiceKey) Frontend {
	return Frontend{netip.AddrPortFrom(bpfmap.AddrOf(key.Address.Word), portOf(key.Port)), model.Protocol(key.Protocol)}
}

func backendOf(address netip.AddrPort, id uint32) datapathBackend {
	var backend datapathBackend
	backend.Address.Word = bpfmap.AddrWords(address.Addr())
	backend.Port = portOf(address.Port())
	backend.Service = id
	return backend
}

// rangeOf is a range of clients that a Service lets in.
func rangeOf(id uint32, p netip.Prefix) datapathSourceRangeKey {
	key := datapathSourceRangeKey{Service: id, Length: 32 + lengthOf(p)}
	key.Client.Word = bpfmap.AddrWords(p.Masked().Addr())
	return key
}

// lengthOf is a prefix's length in struct address.
func lengthOf(p netip.Prefix) uint32 {
	if p.Addr().Is4() {
		return uint32(p.Bits()) + 96
	}
	return uint32(p.Bits())
}

// prefixOf is the range of so many bits in struct address.
func prefixOf(words [4]uint32, length uint32) netip.Prefix {
	address := bpfmap.AddrOf(words)
	if address.Is4() && length >= 96 {
		length -= 96
	}
	return netip.PrefixFrom(address, int(length))
}

func addressOf(b datapathBackend) netip.AddrPort {
	return netip.AddrPortFrom(bpfmap.AddrOf(b.Address.Word), portOf(b.Port))
}

// portOf turns a port between the host's order and the network's.
func portOf(port uint16) uint16 {
	var bytes [2]byte
	binary.BigEndian.PutUint16(bytes[:], port)
	return binary.NativeEndian.Uint16(bytes[:])
}
