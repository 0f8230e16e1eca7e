package bpfmap

import (
	"fmt"
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
