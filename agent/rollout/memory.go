package rollout

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// memory is what a node remembers of a choice, over restarts of the process.
type memory struct {
	Boot   string `json:"boot"`
	Choice Choice `json:"choice"`
	// Existing are the pods' network namespaces that were there when the choice began here.
	Existing []uint64 `json:"existing,omitempty"`
	// Began is which trial of it this is, Begun when it began here; zero if it did not.
	Began time.Time `json:"began"`
	Begun time.Time `json:"begun"`
	// Before is what was found wrong before, Held what was kept.
	Before map[string]string `json:"before,omitempty"`
	Held   []Spot            `json:"had,omitempty"`
	// Suspect says that something was found worse once.
	Suspect bool    `json:"suspect,omitempty"`
	Verdict Verdict `json:"verdict,omitempty"`
	Why     string  `json:"why,omitempty"`
	// earlier is what is remembered of the choice that began here last, until this one has.
	earlier *memory
}

// added is what of all that is kept now came with the choice. What was kept before did
// not, and no more what pods that started since have of the same knobs.
func (m *memory) added(now []Spot) []Spot {
	return slices.DeleteFunc(slices.Clone(now), func(s Spot) bool {
		started := !slices.Contains(m.Existing, s.Cookie)
		return slices.ContainsFunc(m.Held, func(h Spot) bool { return h == s || started && h.Knob == s.Knob })
	})
}

const memoryName = "rollout.json"

// recall reads it. One that is not there, or is of another boot, is empty.
func recall(folder string) (*memory, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("tell this boot from others: %w", err)
	}
	fresh := &memory{Boot: strings.TrimSpace(string(boot))}
	path := filepath.Join(folder, memoryName)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fresh, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what was begun here: %w", err)
	}
	m := &memory{}
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("read what was begun here: %s: %w: remove the file", path, err)
	}
	if m.Boot != fresh.Boot {
		return fresh, nil
	}
	return m, nil
}

// save replaces the file at once.
func (m *memory) save(folder string) error {
	path := filepath.Join(folder, memoryName)
	data, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = os.WriteFile(path+".new", append(data, '\n'), 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("write down what is begun here: %w", err)
	}
	return nil
}
