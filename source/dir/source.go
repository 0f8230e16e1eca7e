package dir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/millrace/millrace/model"
)

// Source delivers the manifests at a path and their changes.
type Source struct {
	path  string
	files *files
	// folders are those found by the last look, and whether one has been read.
	folders map[string]bool
}

// Open prepares to read the file or folder at path, which has to exist.
func Open(path string) (*Source, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("open manifests %s: %w: give a manifest file or a folder of them", path, cause(err))
	}
	return &Source{path: path, files: newFiles(), folders: map[string]bool{}}, nil
}

// Read is what the manifests at path say now. Nothing is watched.
func Read(path string) (*model.Snapshot, error) {
	s, err := Open(path)
	if err != nil {
		return nil, err
	}
	s.scan(nil)
	s.files.cluster.SetComplete()
	return s.files.cluster.Snapshot(), nil
}

// Run delivers a complete Snapshot at once and another after each change, until
// ctx ends, and returns nil then. It calls deliver one at a time, and reads no
// further while deliver runs: what changes meanwhile comes in the next Snapshot,
// all together. Only one Run of a Source may go on at a time; one after another
// continues the numbering. It returns an error if changes cannot be watched.
func (s *Source) Run(ctx context.Context, deliver func(*model.Snapshot)) error {
	w, err := newWatch()
	if err != nil {
		return fmt.Errorf("watch manifests %s: %w", s.path, err)
	}
	defer w.close()
	s.scan(w)
	s.files.cluster.SetComplete()
	var last *model.Snapshot
	var since time.Time
	for {
		if next := s.files.cluster.Snapshot(); next != last {
			last = next
			dated := *next
			dated.Seen = since
			deliver(&dated)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-w.wake:
			changes := w.take()
			since = changes.since
			s.apply(changes, w)
		}
	}
}

// apply reads what changed.
func (s *Source) apply(c changes, w *watch) {
	for path := range c.files {
		s.load(path, w)
	}
	for path := range c.left {
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			s.files.remove(path)
		}
	}
	if c.everything {
		s.scan(w)
	}
}
