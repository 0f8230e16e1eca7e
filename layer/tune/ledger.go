package tune

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

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/queue"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/tune/knob"
)

// Ledger is what people have set by `millrace tune`, in whichever namespaces, with the
// values before. It is beside the layer's own journal, which is an agent's.
//
// What is set is written down before, synced, and read back after; with an error none of
// it stays. A process that is killed at any moment leaves what Undo puts back. Settings
// end with the boot and with their namespace, and what is written of them then counts no
// more. Two ledgers of one folder exclude each other.
type Ledger struct {
	folder, root string
	// file is the name of what is written.
	file string
	// boot tells what was set from what a later boot has begun without; empty for what
	// outlives them.
	boot func() (string, error)
	// places are the namespaces that there are now, for those that are at another path
	// than they were.
	places func() ([]Place, error)
	// where is where the place of a setting is now; there is false if it has gone, and
	// the setting with it.
	where func(*Held) (path string, there bool, err error)
	// open is where settings of a path are, save writes the ledger.
	open func(path string) host
	save func([]Held) error
	now  func() time.Time
}

// NewLedger is the ledger in a folder, which is its alone. Root stands for /proc/sys,
// empty is what sysctl.Find finds. Places are called when a namespace is not where it
// was. It touches nothing.
func NewLedger(folder, root string, places func() ([]Place, error)) *Ledger {
	l := &Ledger{folder: folder, root: root, file: ledgerName, boot: thisBoot, places: places, now: time.Now}
	l.open = func(path string) host { return at(root, path) }
	l.save, l.where = l.write, l.find
	return l
}

// Store is where settings are that are no host's: an object of a cluster.
type Store interface {
	// Number tells the object from one that is made after it under the same name; it
	// returns fs.ErrNotExist where there is none.
	Number() (uint64, error)
	// Read is a setting's value, "" for none.
	Read(name string) (string, error)
	// Write sets it, and returns what it is then. It fails if the object was changed since
	// Read, whoever did it.
	Write(name, value string) (string, error)
}

// errAnother is of a way that leads to another object than the one that was set. Whether
// that one has gone cannot be told from a kubeconfig that leads elsewhere by now.
var errAnother = errors.New("this leads to another cluster now, or its object was made anew or has gone")

// NewLedgerOf is a ledger of objects of clusters, beside one of a host: what it holds
// outlives boots, and stays held while its object is not found. Open gives the Store that
// a Place's path leads to.
func NewLedgerOf(folder string, open func(path string) Store) *Ledger {
	l := &Ledger{folder: folder, file: objectsName, now: time.Now,
		boot: func() (string, error) { return "", nil }}
	l.open = func(path string) host { return open(path) }
	l.where = func(h *Held) (string, bool, error) {
		n, err := open(h.Path).Number()
		if errors.Is(err, fs.ErrNotExist) || err == nil && n != h.Cookie {
			err = fmt.Errorf("%w: what was set stays written down: name its cluster with --source kube:KUBECONFIG; if its object has gone for good, undo the rest and remove %s",
				errAnother, filepath.Join(folder, objectsName))
		}
		if err != nil {
			return "", false, fmt.Errorf("%s, set by way of %s: %w", h.object(), strings.TrimSpace(h.Path), err)
		}
		return h.Path, true, nil
	}
	l.save = l.write
	return l
}

func thisBoot() (string, error) {
	boot, err := os.ReadFile(bootID)
	if err != nil {
		return "", fmt.Errorf("tell this boot from others: %w", err)
	}
	return strings.TrimSpace(string(boot)), nil
}

// Held is a setting that was set.
type Held struct {
	ID      string `json:"id"`
	Space   string `json:"space"`
	Path    string `json:"path"`
	Cookie  uint64 `json:"netns"`
	Setting string `json:"setting"`
	Before  string `json:"before"`
	// Wrote is what it became; empty from before it is set until that is known.
	Wrote string    `json:"wrote"`
	Since time.Time `json:"since"`
	// Kept says that a Keeper set it, and keeps it so.
	Kept bool `json:"kept,omitempty"`
}

// object names it: "net.core.somaxconn of pod web-7f".
func (h *Held) object() string { return h.Setting + " of " + h.Space }

func (h Held) same(o Held) bool { return h.Cookie == o.Cookie && h.Setting == o.Setting }

// sheet is the form of the file.
type sheet struct {
	// Boot is empty where what is held outlives it.
	Boot     string `json:"boot,omitempty"`
	Settings []Held `json:"settings"`
}

const (
	ledgerName  = "ledger.json"
	objectsName = "objects.json"
)

// Load is what is held, in the order in which it was set. It changes nothing.
func (l *Ledger) Load() ([]Held, error) {
	path := filepath.Join(l.folder, l.file)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read what was set: %w", err)
	}
	var s sheet
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("read what was set: %s: %w: remove the file, and set by hand what shall not stay", path, err)
	}
	boot, err := l.boot()
	if err != nil {
		return nil, err
	}
	if s.Boot != boot {
		return nil, nil
	}
	return s.Settings, nil
}

// write replaces the ledger at once and for good. An empty one is no file.
func (l *Ledger) write(all []Held) error {
	path := filepath.Join(l.folder, l.file)
	if len(all) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("write down what was set: %w", err)
		}
		return nil
	}
	boot, err := l.boot()
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(sheet{boot, all}, "", "  ")
	if err == nil {
		err = replace(path, append(data, '\n'))
	}
	if err != nil {
		return fmt.Errorf("write down what is set, before it is: %w", err)
	}
	return nil
}

// lock takes the folder for this process, and makes it.
func (l *Ledger) lock() (*os.File, error) {
	if err := os.MkdirAll(l.folder, 0o700); err != nil {
		return nil, fmt.Errorf("make folder: %w", err)
	}
	lock, err := layer.Lock("folder", l.folder)
	if err != nil {
		return nil, err
	}
	have, err := lock.Stat()
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("lock folder %s: %w", l.folder, err)
	}
	if named, err := os.Stat(l.folder); err != nil || !os.SameFile(have, named) {
		lock.Close()
		return nil, fmt.Errorf("lock folder %s: %w", l.folder, layer.ErrInUse) // somebody has just removed it
	}
	return lock, nil
}

// leave removes the folder if nothing is written down.
func (l *Ledger) leave() {
	if _, err := os.Stat(filepath.Join(l.folder, l.file)); errors.Is(err, fs.ErrNotExist) {
		_ = removeFiles(l.folder, l.file) // what cannot be removed does no harm
	}
}

// Step is one setting that is to be set.
type Step struct {
	ID      string
	Place   Place
	Setting string
	// From is what it was when it was planned, To what it shall be; with AtLeast what the
	// kernel makes of it may be more.
	From, To string
	AtLeast  bool
	// Kept says that a Keeper sets it, and keeps it so.
	Kept bool
}

// Object implements layer.Subject.
func (s *Step) Object() string { return s.Setting }

// Detail implements layer.Subject: "128 -> 4096 (pod web-7f, accept-queue)".
func (s *Step) Detail() string {
	return fmt.Sprintf("%s -> %s (%s, %s)", orNothing(s.From), orNothing(s.To), s.Place.Name, s.ID)
}

// held is what is written down of it before it is set, without the value and the time.
func (s *Step) held() Held {
	return Held{ID: s.ID, Space: s.Place.Name, Path: s.Place.Path, Cookie: s.Place.Cookie, Setting: s.Setting, Kept: s.Kept}
}

func orNothing(value string) string {
	if value == "" {
		return "nothing"
	}
	return value
}

// Apply sets all steps, or none: what was set before an error is put back. It returns
// layer.ErrInUse while another process applies or undoes.
func (l *Ledger) Apply(steps []Step) (layer.Changes, error) {
	lock, err := l.lock()
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	held, err := l.settled()
	if err != nil {
		return nil, err
	}
	next, err := l.intend(held, steps)
	if err == nil {
		err = l.save(next)
	}
	if err != nil {
		l.leave()
		return nil, err
	}
	var done layer.Changes
	for i := range steps {
		s := &steps[i]
		got, err := l.set(s)
		if err != nil {
			err = fmt.Errorf("%s: %w", s.Place.Name, err)
			if back := l.back(steps[:i+1]); back != nil {
				return nil, errors.Join(err, back)
			}
			err = errors.Join(fmt.Errorf("%w: nothing was changed", err), l.save(held))
			l.leave()
			return nil, err
		}
		next[slices.IndexFunc(next, s.held().same)].Wrote = got
		done = append(done, layer.Change{Op: layer.Alter, Subject: s})
	}
	return done, l.save(next)
}

// TakeBack makes what Apply has just set what it was before these steps, which an earlier
// one may have set, and holds of it what was held then: before is what Load returned.
// What a process leaves that is killed is undone as after one in Apply. It returns layer.ErrInUse while another process applies or undoes.
func (l *Ledger) TakeBack(steps []Step, before []Held) error {
	lock, err := l.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	held, err := l.Load()
	if err != nil {
		return err
	}
	for i := range steps {
		if at := slices.IndexFunc(held, steps[i].held().same); at >= 0 {
			held[at].Wrote = "" // until it is known again
		}
	}
	if err = l.save(held); err == nil {
		err = l.back(steps)
	}
	if err != nil {
		return err
	}
	for i := range steps {
		is := steps[i].held().same
		held = slices.DeleteFunc(held, is)
		if at := slices.IndexFunc(before, is); at >= 0 {
			held = append(held, before[at])
		}
	}
	err = l.save(held)
	l.leave()
	return err
}

// intend is the ledger with the steps before they are taken. Each must be as it was when
// it was planned.
func (l *Ledger) intend(held []Held, steps []Step) ([]Held, error) {
	next := slices.Clone(held)
	for i := range steps {
		s := &steps[i]
		value, err := l.open(s.Place.Path).Read(s.Setting)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.Place.Name, err)
		}
		if value != s.From {
			return nil, fmt.Errorf("%s: %s was %q when this was planned, and is %q now: somebody else sets it; plan again", s.Place.Name, s.Setting, s.From, value)
		}
		h := s.held()
		h.Before, h.Since = value, l.now()
		if at := slices.IndexFunc(next, h.same); at >= 0 {
			if next[at].Wrote == value {
				h.Before = next[at].Before // of before the first time
			}
			next = slices.Delete(next, at, at+1)
		}
		next = append(next, h)
	}
	return next, nil
}

// set one setting, and say what it became.
func (l *Ledger) set(s *Step) (string, error) {
	got, err := l.open(s.Place.Path).Write(s.Setting, s.To)
	if clamped := new(sysctl.Clamped); errors.As(err, &clamped) && knob.Suits(s.To, got, s.AtLeast) {
		err = nil // the size of a table is rounded up
	}
	return got, err
}

// back puts steps back that were taken a moment ago, the last one first.
func (l *Ledger) back(steps []Step) error {
	var failures []error
	for _, s := range slices.Backward(steps) {
		h := l.open(s.Place.Path)
		value, err := h.Read(s.Setting)
		if err == nil && value != s.From {
			_, err = h.Write(s.Setting, s.From)
		}
		if err != nil {
			failures = append(failures, fmt.Errorf("put back in %s: %w: it is written down, so that `millrace tune undo` can", s.Place.Name, err))
		}
	}
	return errors.Join(failures...)
}

// settled is what is held, without what a process that was killed was about to set and
// did not; what it did set is held from now on.
func (l *Ledger) settled() (settled []Held, err error) {
	all, err := l.Load()
	if err != nil {
		return nil, err
	}
	for _, h := range all {
		switch l.settle(&h) {
		case known:
			settled = append(settled, h)
		case elsewhere:
			settled = append(settled, h) // its own cluster tells
		case failed:
			return nil, fmt.Errorf("%s: it cannot be seen what became of it when an earlier process was killed: millrace tune undo %s", h.object(), h.ID)
		}
	}
	return settled, nil
}

type settling byte

const (
	known settling = iota
	notSet
	elsewhere
	failed
)

// settle finds out what became of a setting that a killed process was about to set.
func (l *Ledger) settle(h *Held) settling {
	if h.Wrote != "" {
		return known
	}
	path, there, err := l.where(h)
	switch {
	case errors.Is(err, errAnother):
		return elsewhere
	case err != nil:
		return failed
	case !there:
		return notSet
	}
	value, err := l.open(path).Read(h.Setting)
	switch {
	case err != nil:
		return failed
	case value == h.Before:
		return notSet
	}
	h.Wrote = value
	return known
}

// find is where the namespace is now that a setting was set in; there is false if it has
// gone, and the setting with it.
func (l *Ledger) find(h *Held) (path string, there bool, err error) {
	if cookie, err := netns.Cookie(h.Path); err == nil && cookie == h.Cookie {
		return h.Path, true, nil
	}
	places, err := l.places()
	if err != nil {
		return "", false, fmt.Errorf("look for %s, in which %s was set: %w", h.Space, h.Setting, err)
	}
	for _, p := range places {
		if p.Cookie == h.Cookie {
			return p.Path, true, nil
		}
	}
	if h.Path == "" { // the node's does not end before the machine does
		return "", false, fmt.Errorf("%s: %w", h.object(), errElsewhere)
	}
	return "", false, nil
}

// State is a setting that is held, and what is the matter with it now.
type State struct {
	Held
	// Now is what it is.
	Now string `json:"now"`
	// Drift says what differs from what was set, empty if nothing does.
	Drift string `json:"drift,omitempty"`
	// Gone says that its namespace has ended, Unread that it could not be read.
	Gone   bool `json:"-"`
	Unread bool `json:"-"`
}

// Status is what is held, as it is now. It changes nothing.
func (l *Ledger) Status() (all []State, err error) {
	held, err := l.Load()
	if err != nil {
		return nil, err
	}
	for _, h := range held {
		s := State{Held: h}
		path, there, err := l.where(&h)
		switch {
		case err != nil:
			s.Drift, s.Unread = err.Error(), true
		case !there:
			s.Drift, s.Gone = "its namespace has gone, and it with that", true
		default:
			l.drift(&s, path)
		}
		all = append(all, s)
	}
	return all, nil
}

// drift reads what a setting is now, and says what differs from what was set.
func (l *Ledger) drift(s *State, path string) {
	now, err := l.open(path).Read(s.Setting)
	s.Now = now
	switch {
	case err != nil:
		s.Drift, s.Unread = err.Error(), true
	case s.Wrote == "" && now == s.Before:
		s.Drift = "a process was killed before it was set"
	case s.Wrote == "":
		s.Drift = "a process was killed when it was set: millrace tune undo puts it back"
	case now != s.Wrote:
		s.Drift = fmt.Sprintf("it was set to %s, and somebody has set it to %s since", s.Wrote, orNothing(now)) + whoSets(s.Setting, now)
	}
}

// whoSets are files of sysctl.d(5) that say what is found, " (...)", or nothing.
func whoSets(setting, now string) string {
	if file := setBy(setting, now); file != "" {
		return " (" + file + " sets it)"
	}
	return ""
}

// setBy is the file of sysctl.d(5) that says what is found; nothing if none does.
func setBy(setting, now string) string {
	for _, line := range sysctl.Lines(setting) {
		if line.Value == now {
			return line.File
		}
	}
	return ""
}

// undoing is the subject of a Change: a setting that is put back, or why it is not.
type undoing struct {
	Held
	note string
}

// Object implements layer.Subject.
func (u *undoing) Object() string { return u.Setting }

// Detail implements layer.Subject: "4096 -> 128 (pod web-7f, accept-queue)".
func (u *undoing) Detail() string {
	if u.note != "" {
		return fmt.Sprintf("%s (%s, %s)", u.note, u.Space, u.ID)
	}
	return fmt.Sprintf("%s -> %s (%s, %s)", orNothing(u.Wrote), orNothing(u.Before), u.Space, u.ID)
}

// IsPutBack says of a change that Undo has made whether a setting became another by it.
func IsPutBack(c layer.Change) bool {
	u, is := c.Subject.(*undoing)
	return is && u.note == ""
}

// Undo puts back the settings of the knobs with these IDs, none for all: each that still
// is what was set. What somebody else has set since stays, is named, and is held no
// more. With dry it only says what it would do. It returns layer.ErrInUse while another
// process applies or undoes.
func (l *Ledger) Undo(ids []string, dry bool) (layer.Changes, error) {
	return l.undo(func(h *Held) bool { return len(ids) == 0 || slices.Contains(ids, h.ID) }, dry)
}

func (l *Ledger) undo(which func(*Held) bool, dry bool) (layer.Changes, error) {
	if _, err := os.Stat(l.folder); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	lock, err := l.lock()
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	held, err := l.Load()
	if err != nil {
		return nil, err
	}
	left := slices.Clone(held)
	var done layer.Changes
	var failures []error
	for _, h := range slices.Backward(held) {
		if !which(&h) {
			continue
		}
		u, err := l.putBack(h, dry)
		if err != nil {
			failures = append(failures, err)
			continue
		}
		done = append(done, layer.Change{Op: layer.Remove, Subject: u})
		left = slices.DeleteFunc(left, h.same)
	}
	if !dry {
		failures = append(failures, l.save(left))
		l.leave()
	}
	return done, errors.Join(failures...)
}

// putBack one setting, if it is still what was set.
func (l *Ledger) putBack(h Held, dry bool) (*undoing, error) {
	u := &undoing{Held: h}
	path, there, err := l.where(&h)
	if err != nil {
		return nil, err
	}
	if !there {
		u.note = "has gone with its namespace"
		return u, nil
	}
	value, err := l.open(path).Read(h.Setting)
	switch {
	case errors.Is(err, sysctl.ErrAbsent), errors.Is(err, queue.ErrAbsent):
		u.note = "is not there any more"
		return u, nil
	case err != nil:
		return nil, fmt.Errorf("%s: %w", h.Space, err)
	case value == h.Before:
		u.note = "stays " + orNothing(value) + ", as it was before"
		return u, nil
	case h.Wrote != "" && value != h.Wrote:
		u.note = fmt.Sprintf("stays %s: it was %s before millrace set it to %s, and somebody else has set it since", orNothing(value), orNothing(h.Before), h.Wrote) +
			whoSets(h.Setting, value)
		return u, nil
	}
	if u.Wrote == "" {
		u.Wrote = value
	}
	if dry {
		return u, nil
	}
	if _, err := l.open(path).Write(h.Setting, h.Before); err != nil {
		return nil, fmt.Errorf("%s: put back: %w", h.Space, err)
	}
	return u, nil
}
