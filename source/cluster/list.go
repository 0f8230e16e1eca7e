package cluster

import (
	"reflect"
	"slices"
)

// list keeps what a Snapshot shows of one kind, in the order of the keys. A
// change is a binary search and its share of one copy of all pointers, which is
// what an immutable Snapshot costs; nothing is sorted again.
type list[T any] struct {
	key     func(*T) Key
	items   []*T
	changed map[Key]*T // nil for what is gone
}

func newList[T any](key func(*T) Key) list[T] {
	return list[T]{key: key, changed: map[Key]*T{}}
}

// set shows item under k from the next merge on, nothing for nil. An item that
// equals the one shown changes nothing. It returns the one that is shown.
func (l *list[T]) set(k Key, item *T) *T {
	old := l.get(k)
	if old == nil && item == nil || old != nil && item != nil && reflect.DeepEqual(*old, *item) {
		return old
	}
	l.changed[k] = item
	return item
}

func (l *list[T]) get(k Key) *T {
	if item, ok := l.changed[k]; ok {
		return item
	}
	if i, ok := l.find(k, 0); ok {
		return l.items[i]
	}
	return nil
}

// find is the place of k in items, which is not before from.
func (l *list[T]) find(k Key, from int) (int, bool) {
	i, ok := slices.BinarySearchFunc(l.items[from:], k, func(item *T, k Key) int { return l.key(item).Compare(k) })
	return from + i, ok
}

// merge puts the changes in their places and says whether there were any. The
// slice that items was before is never written again.
func (l *list[T]) merge() bool {
	if len(l.changed) == 0 {
		return false
	}
	keys := make([]Key, 0, len(l.changed))
	for k := range l.changed {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, Key.Compare)
	items := make([]*T, 0, len(l.items)+len(keys))
	done := 0
	for _, k := range keys {
		i, found := l.find(k, done)
		items = append(items, l.items[done:i]...)
		done = i
		if found {
			done++
		}
		if item := l.changed[k]; item != nil {
			items = append(items, item)
		}
	}
	l.items = append(items, l.items[done:]...)
	l.changed = map[Key]*T{} // going through an emptied map costs what it once held
	return true
}
