package bpfmap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
)

// NextSuffix is of a pin that is about to become the one without.
const NextSuffix = "_next"

// IsPinned says whether the pin at path leads to this very map.
func IsPinned(m *ebpf.Map, path string) bool {
	pinned, err := ebpf.LoadPinnedMap(path, nil)
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

// Pin pins those of the named maps that are not pinned in a folder yet, in order, over
// those that are: there is no moment without a pin. It stops at the first error.
func Pin(folder string, names []string, maps map[string]*ebpf.Map) error {
	for _, name := range names {
		path := filepath.Join(folder, name)
		if IsPinned(maps[name], path) {
			continue
		}
		copied, err := maps[name].Clone() // a clone knows nothing of earlier pins
		if err == nil {
			_ = os.Remove(path + NextSuffix)
			err = copied.Pin(path + NextSuffix)
			copied.Close()
		}
		if err == nil {
			err = os.Rename(path+NextSuffix, path)
		}
		if err != nil {
			return fmt.Errorf("pin map %s: %w", path, err)
		}
	}
	return nil
}

// Adopt opens the named maps that an earlier process pinned in a folder: all of them, or
// none, and no error, where one is not there or is not like what is wanted of it. The
// caller closes them.
func Adopt(folder string, names []string, like func(name string, found *ebpf.Map) *ebpf.MapSpec) (map[string]*ebpf.Map, error) {
	all := map[string]*ebpf.Map{}
	for _, name := range names {
		m, err := ebpf.LoadPinnedMap(filepath.Join(folder, name), nil)
		if err == nil && like(name, m).Compatible(m) != nil {
			m.Close()
			err = fs.ErrNotExist
		}
		if err == nil {
			all[name] = m
			continue
		}
		CloseAll(all)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, fmt.Errorf("open pinned map %s: %w", name, err)
	}
	return all, nil
}

// Look opens the named maps that are pinned in a folder, to read them alone. Where one is
// not there, the error is fs.ErrNotExist, and absent its name. The caller closes them.
func Look(folder string, names ...string) (all map[string]*ebpf.Map, absent string, err error) {
	all = map[string]*ebpf.Map{}
	for _, name := range names {
		path := filepath.Join(folder, name)
		m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			CloseAll(all)
			return nil, name, fmt.Errorf("read pinned map %s: %w", path, err)
		}
		all[name] = m
	}
	return all, "", nil
}

// SameLayout says whether maps are as large as these specifications have them, and what to
// do where one is not.
func SameLayout(maps map[string]*ebpf.Map, specs map[string]*ebpf.MapSpec) error {
	for name, m := range maps {
		if m.KeySize() != specs[name].KeySize || m.ValueSize() != specs[name].ValueSize {
			return fmt.Errorf("map %s is another version's: use the millrace that made it", name)
		}
	}
	return nil
}

// CloseAll closes maps.
func CloseAll(maps map[string]*ebpf.Map) {
	for _, m := range maps {
		m.Close()
	}
}
