package bpfmap

import "syscall"

// Fake is a Table in ordinary memory. Like the kernel's it refuses a new entry
// when it is full, with E2BIG.
type Fake[K comparable, V any] struct {
	Entries map[K]V
	// Max is the capacity.
	Max int
	// Refuse makes Put and Delete of a key fail, if it is set and not nil for it.
	Refuse func(K) error
	// Written counts the entries put and deleted.
	Written int
}

// NewFake makes an empty table for at most max entries.
func NewFake[K comparable, V any](max int) *Fake[K, V] {
	return &Fake[K, V]{Entries: make(map[K]V), Max: max}
}

// Put implements Table.
func (f *Fake[K, V]) Put(keys []K, values []V) []error {
	return each(len(keys), func(i int) error {
		if err := f.refuse(keys[i]); err != nil {
			return err
		}
		if _, have := f.Entries[keys[i]]; !have && len(f.Entries) >= f.Max {
			return syscall.E2BIG
		}
		f.Entries[keys[i]] = values[i]
		f.Written++
		return nil
	})
}

// Delete implements Table.
func (f *Fake[K, V]) Delete(keys []K) []error {
	return each(len(keys), func(i int) error {
		if err := f.refuse(keys[i]); err != nil {
			return err
		}
		delete(f.Entries, keys[i])
		f.Written++
		return nil
	})
}

// Get implements Table.
func (f *Fake[K, V]) Get(key K) (V, bool, error) {
	value, ok := f.Entries[key]
	return value, ok, nil
}

// All implements Table.
func (f *Fake[K, V]) All() (map[K]V, error) {
	all := make(map[K]V, len(f.Entries))
	for key, value := range f.Entries {
		all[key] = value
	}
	return all, nil
}

// Capacity implements Table.
func (f *Fake[K, V]) Capacity() int { return f.Max }

// Bytes implements Table; a fake has no kernel memory.
func (f *Fake[K, V]) Bytes() uint64 { return 0 }

func (f *Fake[K, V]) refuse(key K) error {
	if f.Refuse == nil {
		return nil
	}
	return f.Refuse(key)
}
