// Package bpfmap gives a kernel hash map Go types, and writes many entries in
// few system calls. Fake is the same table in ordinary memory, for tests that
// have no kernel.
//
// It writes the entries it is told to write and nothing else. One entry costs
// about a microsecond, one of a batch about 0.3.
package bpfmap

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// Table is a typed hash map. K and V must have the layout of the map's C types,
// without padding. A Table has one writer; it is not locked.
type Table[K comparable, V any] interface {
	// Put writes entries, new or over old ones. The result is nil if all were
	// written, else it holds an error or nil for each entry.
	Put(keys []K, values []V) []error
	// Delete removes entries. Absent ones are no error. The result is as Put's.
	Delete(keys []K) []error
	// Get reads one entry.
	Get(key K) (V, bool, error)
	// All reads every entry, in no order.
	All() (map[K]V, error)
	// Capacity is the largest number of entries.
	Capacity() int
	// Bytes is the memory the kernel accounts to the map.
	Bytes() uint64
}

// Map is a Table in the kernel.
type Map[K comparable, V any] struct{ kernel *ebpf.Map }

// New gives types to a loaded map of type hash. The map stays the caller's.
func New[K comparable, V any](m *ebpf.Map) *Map[K, V] { return &Map[K, V]{kernel: m} }

// Put implements Table.
func (m *Map[K, V]) Put(keys []K, values []V) []error {
	if len(keys) > 1 {
		if _, err := m.kernel.BatchUpdate(keys, values, nil); err == nil {
			return nil
		}
		// Old kernels have no batches, and a batch does not say which entry
		// failed: one by one does.
	}
	return each(len(keys), func(i int) error { return m.kernel.Put(keys[i], values[i]) })
}

// Delete implements Table.
func (m *Map[K, V]) Delete(keys []K) []error {
	if len(keys) > 1 {
		if _, err := m.kernel.BatchDelete(keys, nil); err == nil {
			return nil
		}
	}
	return each(len(keys), func(i int) error {
		if err := m.kernel.Delete(keys[i]); !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		return nil
	})
}

// Get implements Table.
func (m *Map[K, V]) Get(key K) (V, bool, error) {
	var value V
	err := m.kernel.Lookup(key, &value)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return value, false, nil
	}
	return value, err == nil, err
}

// batch is how many entries one system call reads.
const batch = 4096

// All implements Table. Reading in batches needs Linux 5.6; where it fails
// entries are read one by one.
func (m *Map[K, V]) All() (map[K]V, error) {
	all := make(map[K]V, batch)
	if m.Each(func(key K, value V) { all[key] = value }) != nil {
		return m.each()
	}
	return all, nil
}

// Each calls f with every entry, in batches, and keeps none. It may fail after some.
func (m *Map[K, V]) Each(f func(key K, value V)) error {
	keys, values := make([]K, batch), make([]V, batch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.kernel.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			f(keys[i], values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil // the end
		}
		if err != nil {
			return fmt.Errorf("read map %s: %w", m.kernel.String(), err)
		}
	}
}

func (m *Map[K, V]) each() (map[K]V, error) {
	all := make(map[K]V)
	var key K
	var value V
	entries := m.kernel.Iterate()
	for entries.Next(&key, &value) {
		all[key] = value
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read map %s: %w", m.kernel.String(), err)
	}
	return all, nil
}

// Capacity implements Table.
func (m *Map[K, V]) Capacity() int { return int(m.kernel.MaxEntries()) }

// Bytes implements Table. It is the kernel's own estimate (memlock in the map's
// fdinfo): buckets and the entries that are there; before Linux 6.4 as if the map
// were full.
func (m *Map[K, V]) Bytes() uint64 { return Bytes(m.kernel) }

// Bytes is the memory the kernel accounts to a map of any type, 0 if unknown.
func Bytes(m *ebpf.Map) uint64 {
	info, err := m.Info()
	if err != nil {
		return 0
	}
	bytes, _ := info.Memlock()
	return bytes
}

func each(n int, do func(i int) error) []error {
	var failed []error
	for i := range n {
		if err := do(i); err != nil {
			if failed == nil {
				failed = make([]error, n)
			}
			failed[i] = err
		}
	}
	return failed
}
