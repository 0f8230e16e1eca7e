package tune

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Settings are what is asked for, and where it is set.
type Settings struct {
	Conntrack model.Conntrack
	// From is where that is written: a file, or configmap:NAMESPACE/NAME.
	From string
	// CPUs is how many processors the machine has.
	CPUs int
	// Tree is where the settings of the node's network are.
	Tree sysctl.Tree
	// Folder is for the journal; it is the layer's alone.
	Folder string
}

const (
	// timesMended in mendedWithin is how often a setting is set again that somebody
	// else sets otherwise.
	timesMended  = 3
	mendedWithin = 10 * time.Minute
	// mostTries is how often setting one may fail in a row.
	mostTries = 5
)

// host is where settings are read and written.
type host interface {
	Read(name string) (string, error)
	Write(name, value string) (string, error)
}

// Layer is the tune layer. It implements layer.Layer.
type Layer struct {
	settings Settings
	host     host
	now      func() time.Time
	save     func(journal) error
	// lock is nil while the layer is not open.
	lock    *os.File
	journal journal
	// mended is when each setting was taken back from somebody else.
	mended map[string][]time.Time
	// tries counts how often setting one has failed, refused is why some are left.
	tries   map[string]int
	refused map[string]error
	// unread is why settings could not be read; nil for those that could.
	unread map[string]error
	// inForce is what was last read or set.
	inForce *Picture
}

var _ layer.Layer = (*Layer)(nil)

// New makes the layer. It touches nothing before Open.
func New(settings Settings) *Layer {
	return &Layer{
		settings: settings, host: settings.Tree, now: time.Now,
		save:    func(j journal) error { return j.save(settings) },
		journal: journal{}, mended: map[string][]time.Time{}, tries: map[string]int{}, refused: map[string]error{}, unread: map[string]error{}, inForce: &Picture{},
	}
}

// Name implements layer.Layer.
func (l *Layer) Name() string { return "tune" }

// Plan implements layer.Layer. What is asked for is in no Snapshot.
func (l *Layer) Plan(*model.Snapshot) layer.Picture { return plan(l.settings) }

// Diff implements layer.Layer.
func (l *Layer) Diff(have, want layer.Picture, prune bool) layer.Changes {
	return diff(have.(*Picture), want.(*Picture), prune)
}

// Open implements layer.Layer. It needs nothing but the folder: what cannot be set
// is known when it is tried.
func (l *Layer) Open() error {
	if err := os.MkdirAll(l.settings.Folder, 0o700); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	held, err := layer.Lock("folder", l.settings.Folder)
	if err != nil {
		return err
	}
	l.journal, err = load(l.settings)
	if errors.Is(err, errElsewhere) { // that namespace had this folder and is gone
		l.journal, err = journal{}, nil
	}
	if err != nil {
		held.Close()
		return err
	}
	l.lock = held
	return nil
}

// Read implements layer.Layer. What a process that died was about to set is held
// from then on, if it was set.
func (l *Layer) Read() (layer.Picture, error) {
	settled := maps.Clone(l.journal)
	for name, e := range settled {
		if e.Wrote != "" {
			continue
		}
		value, err := l.host.Read(name)
		if err != nil || value == e.Before {
			delete(settled, name)
			continue
		}
		e.Wrote = value
		settled[name] = e
	}
	if !maps.Equal(settled, l.journal) {
		if err := l.save(settled); err != nil {
			return nil, err
		}
		l.journal = settled
	}
	l.inForce = l.look(l.journal)
	for _, r := range l.inForce.rows {
		if r.wanted && r.theirs() && l.foughtOver(r.Name) {
			l.refused[r.Name] = fmt.Errorf("set %s: %w", r.Name, &fight{l.settings.Tree.Netns, *r})
			r.left = true
		}
	}
	return l.inForce, nil
}

// look reads what is asked for, and what is held.
func (l *Layer) look(j journal) *Picture {
	p, asked := &Picture{}, plan(l.settings)
	names := slices.Collect(maps.Keys(j))
	for _, r := range asked.rows {
		names = append(names, r.Name)
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		if r := l.row(name, j, asked); r != nil {
			p.rows = append(p.rows, r)
		}
	}
	return p
}

// row is what a setting is now; nil where it is not there, or is nobody's concern.
func (l *Layer) row(name string, j journal, asked *Picture) *Row {
	value, err := l.host.Read(name)
	if l.unread[name] = err; err != nil {
		return nil
	}
	r := &Row{Name: name, Value: value, left: l.refused[name] != nil}
	if e, held := j[name]; held {
		r.held, r.Before, r.wrote, r.Owner = true, e.Before, e.Wrote, e.Owner
	}
	if wish := asked.row(name); wish != nil {
		r.wanted, r.atLeast, r.Owner = true, wish.atLeast, wish.Owner
	}
	if !r.held && !r.wanted {
		return nil
	}
	return r
}

// foughtOver says that a setting was taken back from somebody else often enough.
func (l *Layer) foughtOver(name string) bool {
	times := l.mended[name]
	return len(times) >= timesMended && l.now().Sub(times[len(times)-timesMended]) <= mendedWithin
}

// Refresh implements layer.Layer: nothing of it changes all the time.
func (l *Layer) Refresh(have layer.Picture) (layer.Picture, error) { return have, nil }

// Watch implements layer.Layer: the kernel does not tell who sets what.
func (l *Layer) Watch(ctx context.Context, _ func()) error {
	<-ctx.Done()
	return nil
}

// Look implements layer.Layer.
func (l *Layer) Look() (layer.Picture, error) {
	j, err := load(l.settings)
	if err != nil {
		return nil, err
	}
	return l.look(j), nil
}

// Apply implements layer.Layer: it writes down what it is about to do, does it, and
// writes down what came of it. The result is have, altered. What cannot be set is
// told by Describe and is no failure in the end: Services do not depend on it.
func (l *Layer) Apply(have, want layer.Picture, changes layer.Changes) (layer.Picture, layer.Changes, error) {
	picture := have.(*Picture)
	if len(changes) == 0 {
		return picture, nil, nil
	}
	earlier := l.journal
	if err := l.writeDown(changes); err != nil {
		return picture, nil, err
	}
	var done layer.Changes
	var failures []error
	for _, change := range changes {
		s := change.Subject.(*step)
		var err error
		if change.Op == layer.Remove {
			err = l.putBack(s.Name)
		} else {
			err = l.set(s, earlier)
		}
		l.tries[s.Name]++
		switch {
		case err == nil:
			delete(l.tries, s.Name)
			done = append(done, change)
		case final(err) || l.tries[s.Name] == mostTries:
			l.refused[s.Name] = err
		default:
			failures = append(failures, err)
		}
		picture.replace(s.Name, l.row(s.Name, l.journal, want.(*Picture)))
	}
	if err := l.save(l.journal); err != nil {
		failures = append(failures, err)
	}
	l.inForce = picture
	return picture, done, errors.Join(failures...)
}

// writeDown says in the journal which settings will be set, and what they are now.
func (l *Layer) writeDown(changes layer.Changes) error {
	next := maps.Clone(l.journal)
	for _, change := range changes {
		s := change.Subject.(*step)
		if change.Op == layer.Remove {
			continue
		}
		value, err := l.host.Read(s.Name)
		if err != nil {
			continue // and so setting it will say
		}
		e, held := next[s.Name]
		if !held || value != e.Wrote {
			e.Before = value // of nobody, or of somebody else
		}
		next[s.Name] = entry{Name: s.Name, Before: e.Before, Owner: s.Owner}
	}
	if err := l.save(next); err != nil {
		return err
	}
	l.journal = next
	return nil
}

// set a setting. Where it stays what it was, the journal says what it said earlier;
// where it is what it was before this layer came, nothing.
func (l *Layer) set(s *step, earlier journal) error {
	found, err := l.host.Read(s.Name)
	if _, written := l.journal[s.Name]; err == nil && !written {
		err = fmt.Errorf("set %s to %s: it could not be read a moment ago, so that what it was is not written down", s.Name, s.to)
	}
	if err != nil {
		return err
	}
	got, err := l.host.Write(s.Name, s.to)
	if clamped := new(sysctl.Clamped); errors.As(err, &clamped) {
		if s.suits(got) { // the size of a table is rounded up
			err = nil
		} else {
			_, _ = l.host.Write(s.Name, l.journal[s.Name].Before) // what it is then is read below
		}
	}
	e, held := earlier[s.Name]
	if err != nil {
		switch now, unread := l.host.Read(s.Name); {
		case unread != nil: // whatever it is stays written down
		case now == l.journal[s.Name].Before:
			delete(l.journal, s.Name)
		case now == found:
			l.enter(e, held)
		}
		return err
	}
	if held && found != e.Wrote {
		l.mended[s.Name] = append(l.mended[s.Name], l.now())
	}
	e = l.journal[s.Name]
	e.Wrote = got
	l.enter(e, got != e.Before)
	return nil
}

// enter what is known of a setting in the journal; nothing if it is not held.
func (l *Layer) enter(e entry, held bool) {
	delete(l.journal, e.Name)
	if held {
		l.journal[e.Name] = e
	}
}

// putBack a setting, if it is still what this layer wrote.
func (l *Layer) putBack(name string) error {
	e := l.journal[name]
	value, err := l.host.Read(name)
	if err == nil && (e.Wrote == "" || value == e.Wrote) {
		_, err = l.host.Write(name, e.Before)
	}
	if err != nil && !errors.Is(err, sysctl.ErrAbsent) { // what is absent has no value
		return err
	}
	delete(l.journal, name)
	return nil
}

// final says that trying again would not help, before this process is started anew.
func final(err error) bool {
	var clamped *sysctl.Clamped
	var privilege *need.Privilege
	return errors.As(err, &clamped) || errors.As(err, &privilege) || errors.Is(err, sysctl.ErrReadOnly) ||
		errors.Is(err, sysctl.ErrRefused) || errors.Is(err, sysctl.ErrNotHere)
}

// Settle implements layer.Layer.
func (l *Layer) Settle() error { return nil }

// Close implements layer.Layer.
func (l *Layer) Close() error {
	if l.lock == nil {
		return nil
	}
	err := l.lock.Close()
	l.lock = nil
	return err
}
