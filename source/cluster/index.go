package cluster

import "hash/maphash"

// index finds Objects by something that they say themselves, as a map would in
// five times the memory: it keeps no keys. No two of its Objects have the same.
//
// It is a table with linear probing. The place of a hash grows with the hash, so
// that the table can have any size and grow by a quarter instead of to twice.
type index[K comparable] struct {
	// has says whether an Object has this key.
	has     func(*Object, K) bool
	seed    maphash.Seed
	hashes  []uint32
	objects []*Object // nil where the table is free, never all of it
	count   int
}

func newIndex[K comparable](has func(*Object, K) bool) index[K] {
	return index[K]{has: has, seed: maphash.MakeSeed(), hashes: make([]uint32, 8), objects: make([]*Object, 8)}
}

// get is the Object that has k, nil if there is none.
func (x *index[K]) get(k K) *Object { return x.objects[x.find(k, x.hash(k))] }

// set puts o, which has k, in the place of the one that had it.
func (x *index[K]) set(k K, o *Object) {
	if (x.count+1)*5 > len(x.objects)*4 {
		x.grow()
	}
	hash := x.hash(k)
	i := x.find(k, hash)
	if x.objects[i] == nil {
		x.count++
	}
	x.hashes[i], x.objects[i] = hash, o
}

// delete forgets the Object that has k, if there is one.
func (x *index[K]) delete(k K) {
	hole := x.find(k, x.hash(k))
	if x.objects[hole] == nil {
		return
	}
	x.count--
	// What stands behind the hole because its own place was taken moves up.
	for i := x.next(hole); x.objects[i] != nil; i = x.next(i) {
		if x.distance(x.home(x.hashes[i]), i) >= x.distance(hole, i) {
			x.hashes[hole], x.objects[hole] = x.hashes[i], x.objects[i]
			hole = i
		}
	}
	x.objects[hole] = nil
}

// find is where the Object that has k stands, or is to stand.
func (x *index[K]) find(k K, hash uint32) int {
	i := x.home(hash)
	for x.objects[i] != nil && (x.hashes[i] != hash || !x.has(x.objects[i], k)) {
		i = x.next(i)
	}
	return i
}

func (x *index[K]) grow() {
	hashes, objects := x.hashes, x.objects
	size := len(objects) + len(objects)/4
	x.hashes, x.objects = make([]uint32, size), make([]*Object, size)
	for i, o := range objects {
		if o == nil {
			continue
		}
		at := x.home(hashes[i])
		for x.objects[at] != nil {
			at = x.next(at)
		}
		x.hashes[at], x.objects[at] = hashes[i], o
	}
}

func (x *index[K]) hash(k K) uint32 { return uint32(maphash.Comparable(x.seed, k)) }

// home is where an Object stands if its place is free.
func (x *index[K]) home(hash uint32) int { return int(uint64(hash) * uint64(len(x.objects)) >> 32) }

func (x *index[K]) next(i int) int {
	if i++; i < len(x.objects) {
		return i
	}
	return 0
}

// distance is how many steps of next lead from one place to another.
func (x *index[K]) distance(from, to int) int {
	if from <= to {
		return to - from
	}
	return to - from + len(x.objects)
}
