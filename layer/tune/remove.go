package tune

import (
	"errors"
	"io/fs"
	"maps"
	"slices"

	"github.com/millrace/millrace/layer"
)

// Leave implements layer.Layer: settings begin nothing.
func (l *Layer) Leave() (layer.Changes, error) { return nil, nil }

// Left implements layer.Layer.
func (l *Layer) Left() (int, error) { return 0, nil }

// Removal implements layer.Layer: each setting that is held, and what becomes of it.
func (l *Layer) Removal() (layer.Changes, error) {
	j, err := load(l.settings)
	if err != nil {
		return nil, err
	}
	return l.removal(j), nil
}

func (l *Layer) removal(j journal) (changes layer.Changes) {
	for _, name := range slices.Sorted(maps.Keys(j)) {
		r := l.row(name, j, &Picture{})
		if r == nil || r.Value == r.Before {
			continue // it is gone, or as it was
		}
		s := back(r)
		if r.theirs() {
			s.note += suspects(l.settings.Tree.Netns, name)
		}
		changes = append(changes, layer.Change{Op: layer.Remove, Subject: s})
	}
	return changes
}

// Remove implements layer.Layer. It returns layer.ErrInUse while a process has the
// layer open, this one too.
func (l *Layer) Remove() (layer.Changes, error) {
	held, err := layer.Lock("folder", l.settings.Folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer held.Close()
	if l.journal, err = load(l.settings); err != nil {
		return nil, err
	}
	var done layer.Changes
	var failures []error
	for _, change := range l.removal(l.journal) {
		if err := l.putBack(change.Subject.(*step).Name); err != nil {
			failures = append(failures, err)
			continue
		}
		done = append(done, change)
	}
	if len(failures) > 0 {
		return done, errors.Join(append(failures, l.save(l.journal))...)
	}
	return done, removeFolder(l.settings.Folder)
}
