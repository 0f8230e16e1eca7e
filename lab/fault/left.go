package fault

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// notesFolder has a file for each process that makes scenes, locked for as long as it
// lives, with the names of its namespaces: what a killed one left can be removed.
const notesFolder = "/run/millrace/fault"

// notes are this process's.
type notes struct {
	mu    sync.Mutex
	file  *os.File
	names map[string]bool
}

var own = &notes{names: map[string]bool{}}

// keep notes a name, or that it is gone.
func (n *notes) keep(name string, there bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.file == nil {
		if err := n.open(); err != nil {
			return fmt.Errorf("note what is made: %w", err)
		}
	}
	n.names[name] = there
	maps.DeleteFunc(n.names, func(_ string, there bool) bool { return !there })
	if len(n.names) == 0 {
		gone := n.file
		n.file = nil
		return errors.Join(os.Remove(gone.Name()), gone.Close())
	}
	text := strings.Join(slices.Sorted(maps.Keys(n.names)), "\n")
	_, err := n.file.WriteAt([]byte(text), 0)
	return errors.Join(err, n.file.Truncate(int64(len(text))))
}

func (n *notes) open() (err error) {
	if err := os.MkdirAll(notesFolder, 0o700); err != nil {
		return err
	}
	n.file, err = os.OpenFile(filepath.Join(notesFolder, strconv.Itoa(os.Getpid())), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return unix.Flock(int(n.file.Fd()), unix.LOCK_EX)
}

// Sweep removes what processes left that were killed.
func Sweep() error {
	files, err := filepath.Glob(notesFolder + "/*")
	for _, name := range files {
		err = errors.Join(err, sweep(name))
	}
	return err
}

func sweep(name string) error {
	file, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil // another one was faster
	}
	defer file.Close()
	if unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return nil // its process lives
	}
	text, err := os.ReadFile(name)
	for _, space := range strings.Fields(string(text)) {
		err = errors.Join(err, netns.Remove(filepath.Join(spacesFolder, filepath.Base(space))))
	}
	if err == nil {
		err = os.Remove(name)
	}
	return err
}
