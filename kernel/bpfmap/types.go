package bpfmap

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// ErrNoTypes says that a map's maker did not describe its types.
var ErrNoTypes = errors.New("the map has no type information")

// Types are the C types of a map's keys and values, as the program that made it
// described them. The kernel gives them to CAP_SYS_ADMIN only.
func Types(m *ebpf.Map) (key, value btf.Type, err error) {
	ids, err := typeIDs(m)
	if err != nil {
		return nil, nil, fmt.Errorf("read types of map %s: %w", m.String(), err)
	}
	handle, err := btf.NewHandleFromID(ids.btf)
	if err != nil {
		return nil, nil, fmt.Errorf("read types of map %s: %w", m.String(), err)
	}
	defer handle.Close()
	spec, err := handle.Spec(nil)
	if err != nil {
		return nil, nil, fmt.Errorf("read types of map %s: %w", m.String(), err)
	}
	if key, err = typeOf(spec, ids.key); err == nil {
		value, err = typeOf(spec, ids.value)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read types of map %s: %w", m.String(), err)
	}
	return key, value, nil
}

type ids struct {
	btf        btf.ID
	key, value btf.TypeID
}

// mapInfo is the part of struct bpf_map_info of linux/bpf.h that says where the
// types are.
type mapInfo struct {
	_          [64]byte
	btf        btf.ID
	key, value btf.TypeID
	_          [4]byte
}

// typeIDs asks the kernel itself, for the library does not tell.
func typeIDs(m *ebpf.Map) (ids, error) {
	const objGetInfoByFD = 15 // BPF_OBJ_GET_INFO_BY_FD
	var info mapInfo
	attr := struct {
		fd, length uint32
		info       unsafe.Pointer
	}{uint32(m.FD()), uint32(unsafe.Sizeof(info)), unsafe.Pointer(&info)}
	_, _, errno := unix.Syscall(unix.SYS_BPF, objGetInfoByFD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return ids{}, errno
	}
	if info.btf == 0 || info.value == 0 {
		return ids{}, ErrNoTypes
	}
	return ids{info.btf, info.key, info.value}, nil
}

func typeOf(spec *btf.Spec, id btf.TypeID) (btf.Type, error) {
	if id == 0 {
		return (*btf.Void)(nil), nil
	}
	return spec.TypeByID(id)
}

// Walk calls f with the bytes of every entry of a map, whatever its layout, in no
// order, until f returns an error. What f is given is its only until it returns.
// Of a map that others change meanwhile, an entry can be left out or come twice.
func Walk(m *ebpf.Map, f func(key, value []byte) error) error {
	keys, values := rows(m.KeySize()), rows(m.ValueSize())
	var cursor ebpf.MapBatchCursor
	for begun := false; ; begun = true {
		n, err := m.BatchLookup(&cursor, keys.Interface(), values.Interface(), nil)
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) && !begun {
			return walkEach(m, f)
		}
		for i := range n {
			if err := f(row(keys, i, m.KeySize()), row(values, i, m.ValueSize())); err != nil {
				return err
			}
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil // the end
		}
		if err != nil {
			return fmt.Errorf("read map %s: %w", m.String(), err)
		}
	}
}

// rows is a slice of batch arrays of so many bytes.
func rows(size uint32) reflect.Value {
	return reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(int(size), reflect.TypeFor[byte]())), batch, batch)
}

// Copy writes an entry to another map for each of a map, whatever their layouts:
// f makes it, of the bytes of the one in those of the other, which are not cleared
// before.
func Copy(from, to *ebpf.Map, f func(key, value, newKey, newValue []byte)) error {
	keys, values := rows(to.KeySize()), rows(to.ValueSize())
	n := 0
	flush := func() error {
		err := putRows(to, keys.Slice(0, n), values.Slice(0, n))
		n = 0
		return err
	}
	err := Walk(from, func(key, value []byte) error {
		f(key, value, row(keys, n, to.KeySize()), row(values, n, to.ValueSize()))
		if n++; n < batch {
			return nil
		}
		return flush()
	})
	if err == nil && n > 0 {
		err = flush()
	}
	if err != nil {
		return fmt.Errorf("copy map %s: %w", from.String(), err)
	}
	return nil
}

// putRows writes entries, one by one where the kernel has no batches.
func putRows(m *ebpf.Map, keys, values reflect.Value) error {
	if _, err := m.BatchUpdate(keys.Interface(), values.Interface(), nil); err == nil {
		return nil
	}
	for i := range keys.Len() {
		if err := m.Put(row(keys, i, m.KeySize()), row(values, i, m.ValueSize())); err != nil {
			return err
		}
	}
	return nil
}

// row is the bytes of one of the rows.
func row(all reflect.Value, i int, size uint32) []byte {
	return all.Index(i).Slice(0, int(size)).Bytes()
}

func walkEach(m *ebpf.Map, f func(key, value []byte) error) error {
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		if err := f(key, value); err != nil {
			return err
		}
	}
	if err := entries.Err(); err != nil {
		return fmt.Errorf("read map %s: %w", m.String(), err)
	}
	return nil
}

// Words are the values of an enum below count, in order, in lower case and without the
// prefix: "no_backend" for REASON_NO_BACKEND. They are read from the object's BTF, so that
// metrics have the words of the program.
func Words(types *btf.Spec, name, prefix string, count int) ([]string, error) {
	var enum *btf.Enum
	if err := types.TypeByName(name, &enum); err != nil {
		return nil, fmt.Errorf("read enum %s: %w", name, err)
	}
	words := make([]string, count)
	for _, value := range enum.Values {
		if value.Value < uint64(count) {
			words[value.Value] = strings.ToLower(strings.TrimPrefix(value.Name, prefix))
		}
	}
	return words, nil
}
