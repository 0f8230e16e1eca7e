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

// tables are the three maps of service.h and what is known to be in them.
type tables struct {
	services bpfmap.Table[datapathServiceKey, datapathService]
	slots    bpfmap.Table[datapathSlotKey, uint32]
	backends bpfmap.Table[uint32, datapathBackend]

	entries    map[Frontend]*entry
	lastID     uint32
	lastNumber uint32
	// wrapped: numbers have been given that were given before, so each must be
	// looked for first.
	wrapped   bool
	slotCount int
}

// entry is a frontend as it stands in the maps. Slots with an invalid address
// are holes: they are missing, or lead nowhere.
type entry struct {
	id    uint32
	path  Path
	slots []slot
	// torn: a writer died in the middle; the Service is written anew.
	torn bool
}

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
			backends += len(change.Subject.(*Row).Backends)
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
	after := make([]*entry, len(changes))
	for i, change := range changes {
		row := change.Subject.(*Row)
		before := t.entries[row.Frontend]
		if change.Op == layer.Remove {
			w.remove(i, row.Frontend, before)
			continue
		}
		after[i] = t.arrange(before, row.Backends)
		after[i].path = row.Path
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
	there := &tables{services: t.services, slots: t.slots, backends: t.backends}
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
	left := orphans{map[datapathSlotKey]uint32{}, map[uint32]datapathBackend{}}
	for i := range service.Slots {
		at := datapathSlotKey{Service: service.Id, Slot: i}
		number, ok, err := t.slots.Get(at)
		if err != nil {
			return nil, err
		}
		if ok {
			left.slots[at] = number
		}
		backend, ok, err := t.backends.Get(number)
		if err != nil {
			return nil, err
		}
		if ok {
			left.backends[number] = backend
		}
	}
	return left.take(service), nil
}

func (e *entry) equal(other *entry) bool {
	if e == nil || other == nil {
		return e == other
	}
	return e.id == other.id && e.path == other.path && !e.torn && slices.Equal(e.slots, other.slots)
}

func (t *tables) settle(frontend Frontend, now *entry) {
	if old := t.entries[frontend]; old != nil {
		t.slotCount -= len(old.slots)
	}
	if now == nil {
		delete(t.entries, frontend)
		return
	}
	t.slotCount += len(now.slots)
	t.entries[frontend] = now
}

// arrange gives each wanted backend a slot, moving as few as possible: those
// that stay keep their slot if it still exists, the rest fill the holes.
func (t *tables) arrange(before *entry, wanted []netip.AddrPort) *entry {
	if before == nil {
		before = &entry{id: t.nextID()}
	}
	stays := make(map[netip.AddrPort]uint32, len(before.slots))
	now := &entry{id: before.id, slots: make([]slot, len(wanted))}
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
			taken = taken || e.id == t.lastID
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
	if err := errors.Join(failed...); err != nil {
		return nil, fmt.Errorf("clear away what a killed writer left: %w", err)
	}
	return picture, nil
}

// orphans are entries that belong to no Service.
type orphans struct {
	slots    map[datapathSlotKey]uint32
	backends map[uint32]datapathBackend
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
	for number := range backends {
		t.lastNumber = max(t.lastNumber, number)
	}
	t.entries, t.slotCount = make(map[Frontend]*entry, len(services)), 0
	rows := make(map[Frontend]*Row, len(services))
	left := orphans{slots, backends}
	for key, service := range services {
		t.lastID = max(t.lastID, service.Id)
		now := left.take(service)
		frontend := frontendOf(key)
		t.settle(frontend, now)
		rows[frontend] = &Row{Frontend: frontend, Path: now.path, Backends: now.addresses(), torn: now.torn}
	}
	return inForce(rows), left, nil
}

// take moves a Service's slots and backends from what is left to its entry. A
// slot that leads nowhere, or where another slot leads already, stays a hole, and
// the Service is torn: the next diff mends it.
func (o orphans) take(service datapathService) *entry {
	now := &entry{id: service.Id, path: pathOf(service.Path), slots: make([]slot, service.Slots)}
	for i := range now.slots {
		at := datapathSlotKey{Service: service.Id, Slot: uint32(i)}
		number, ok := o.slots[at]
		delete(o.slots, at)
		if backend, there := o.backends[number]; ok && there && backend.Service == service.Id {
			now.slots[i] = slot{number, addressOf(backend)}
			delete(o.backends, number)
		} else {
			now.torn = true
		}
	}
	return now
}

// addresses are the entry's backends in order.
func (e *entry) addresses() []netip.AddrPort {
	var addresses []netip.AddrPort
	for _, s := range e.slots {
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
	var old []slot
	if before != nil {
		old = before.slots
	}
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
	if before == nil || before.torn || before.path != now.path || len(old) != len(now.slots) {
		w.services.add(change, keyOf(frontend), datapathService{Id: now.id, Slots: uint32(len(now.slots)), Path: uint8(now.path.number())})
	}
	w.drop(change, now.id, old, len(now.slots), had)
}

func (w *writing) remove(change int, frontend Frontend, before *entry) {
	w.delServices.add(change, keyOf(frontend), struct{}{})
	if before == nil {
		return
	}
	gone := make(map[uint32]bool, len(before.slots))
	for _, s := range before.slots {
		gone[s.number] = true
	}
	w.drop(change, before.id, before.slots, 0, gone)
}

// drop removes the slots from keep on, and the backends in gone.
func (w *writing) drop(change int, id uint32, old []slot, keep int, gone map[uint32]bool) {
	for i := keep; i < len(old); i++ {
		w.delSlots.add(change, datapathSlotKey{Service: id, Slot: uint32(i)}, struct{}{})
	}
	for _, s := range old {
		if s.address.IsValid() && gone[s.number] {
			w.delBackends.add(change, s.number, struct{}{})
		}
	}
}

func (w *writing) run(t *tables) {
	put(w, &w.backends, "backend", t.backends)
	put(w, &w.slots, "slot", t.slots)
	put(w, &w.services, "service", t.services)
	remove(w, &w.delServices, "service", t.services)
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
	key.Address.Word = wordsOf(f.Address.Addr())
	key.Port = portOf(f.Address.Port())
	key.Protocol = uint8(f.Protocol)
	return key
}

func frontendOf(key datapathServiceKey) Frontend {
	return Frontend{netip.AddrPortFrom(addrOf(key.Address.Word), portOf(key.Port)), model.Protocol(key.Protocol)}
}

func backendOf(address netip.AddrPort, id uint32) datapathBackend {
	var backend datapathBackend
	backend.Address.Word = wordsOf(address.Addr())
	backend.Port = portOf(address.Port())
	backend.Service = id
	return backend
}

func addressOf(b datapathBackend) netip.AddrPort {
	return netip.AddrPortFrom(addrOf(b.Address.Word), portOf(b.Port))
}

// wordsOf is struct address of bpf/address.h: 16 bytes in network order, read
// as the host's words.
func wordsOf(address netip.Addr) (words [4]uint32) {
	bytes := address.As16()
	for i := range words {
		words[i] = binary.NativeEndian.Uint32(bytes[4*i:])
	}
	return words
}

func addrOf(words [4]uint32) netip.Addr {
	var bytes [16]byte
	for i, word := range words {
		binary.NativeEndian.PutUint32(bytes[4*i:], word)
	}
	return netip.AddrFrom16(bytes).Unmap()
}

// portOf turns a port between the host's order and the network's.
func portOf(port uint16) uint16 {
	var bytes [2]byte
	binary.BigEndian.PutUint16(bytes[:], port)
	return binary.NativeEndian.Uint16(bytes[:])
}
