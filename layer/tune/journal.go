package tune

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// entry is what is remembered of a setting that this layer set.
type entry struct {
	Name   string `json:"name"`
	Before string `json:"before"`
	// Wrote is what it became; empty from before it is set until that is known.
	Wrote string `json:"wrote"`
	Owner string `json:"owner"`
}

// journal holds the entries by name.
type journal map[string]entry

const (
	journalName = "journal.json"
	bootID      = "/proc/sys/kernel/random/boot_id"
)

// written is the form of the file.
type written struct {
	home
	Settings []entry `json:"settings"`
}

// home is where settings are: each boot of a machine, and each network namespace, has
// its own.
type home struct {
	Boot  string `json:"boot"`
	Netns uint64 `json:"netns"`
}

// errElsewhere says that a journal is of another network namespace of this boot.
var errElsewhere = errors.New("it is of another network namespace: run this there; if that one is gone, remove the file")

func homeOf(s Settings) (home, error) {
	boot, err := thisBoot()
	if err != nil {
		return home{}, err
	}
	cookie, err := netns.Cookie(s.Tree.Netns)
	return home{boot, cookie}, err
}

// load reads the journal. One that is not there, or is of another boot, is empty.
func load(s Settings) (journal, error) {
	path := filepath.Join(s.Folder, journalName)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return journal{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what was set: %w", err)
	}
	var w written
	if err := json.Unmarshal(data, &w); err != nil {
		return nil, fmt.Errorf("read what was set: %s: %w: remove the file, and set by hand what shall not stay", path, err)
	}
	here, err := homeOf(s)
	switch {
	case err != nil:
		return nil, err
	case w.Boot != here.Boot:
		return journal{}, nil
	case w.Netns != here.Netns:
		return nil, fmt.Errorf("read what was set: %s: %w", path, errElsewhere)
	}
	j := journal{}
	for _, e := range w.Settings {
		j[e.Name] = e
	}
	return j, nil
}

// save replaces the journal at once and for good. An empty one is no file.
func (j journal) save(s Settings) error {
	path := filepath.Join(s.Folder, journalName)
	if len(j) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("write down what was set: %w", err)
		}
		return nil
	}
	here, err := homeOf(s)
	if err != nil {
		return err
	}
	w := written{home: here}
	for _, name := range slices.Sorted(maps.Keys(j)) {
		w.Settings = append(w.Settings, j[name])
	}
	data, err := json.MarshalIndent(w, "", "  ")
	if err == nil {
		err = replace(path, append(data, '\n'))
	}
	if err != nil {
		return fmt.Errorf("write down what is set, before it is: %w", err)
	}
	return nil
}

// replace a file, so that nobody ever finds half of it, whenever this ends.
func replace(path string, data []byte) error {
	file, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	folder, err := os.Open(filepath.Dir(path)) // the new name is to outlive a loss of power, too
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

// removeFolder removes what this layer has in its folder, and the folder.
func removeFolder(folder string) error { return removeFiles(folder, journalName) }

// removeFiles removes the file of this name in a folder, what was begun of it, and the
// folder if nothing else is in it.
func removeFiles(folder, name string) error {
	for _, path := range []string{filepath.Join(folder, name+".new"), filepath.Join(folder, name), folder} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return fmt.Errorf("remove folder: %w", err)
		}
	}
	return nil
}
