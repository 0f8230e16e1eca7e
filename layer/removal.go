package layer

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/millrace/millrace/kernel/attach"
)

// Removable is a Subject of Removal.
type Removable interface {
	Subject
	// Remove takes it away. Absent is success.
	Remove() error
}

// Gone is the change that takes something away.
func Gone(what Removable) Change { return Change{Op: Remove, Subject: what} }

// Remove carries out changes that Gone made and returns those that succeeded. One that
// fails does not stop the others; the error joins them all.
func (c Changes) Remove() (done Changes, err error) {
	var failures []error
	for _, change := range c {
		if err := change.Subject.(Removable).Remove(); err != nil {
			failures = append(failures, err)
			continue
		}
		done = append(done, change)
	}
	return done, errors.Join(failures...)
}

// RemoveAlone is Remove of a layer that has a folder of pins: it returns ErrInUse while a
// process has that one open, this one too. What has to be done before is first; nil is
// nothing.
func (c Changes) RemoveAlone(folder string, first func()) (Changes, error) {
	if len(c) == 0 {
		return nil, nil
	}
	if _, err := os.Stat(folder); err == nil {
		lock, err := Lock("pin folder", folder)
		if err != nil {
			return nil, err
		}
		defer lock.Close()
		if first != nil {
			first()
		}
	}
	return c.Remove()
}

// LinkPrefix begins the names of pins of links in all layers, perhaps behind another prefix.
const LinkPrefix = attach.PinPrefix

// FiltersGone takes away what an earlier process has in force where there is no tcx: pins
// of a folder lead to nothing else there.
func FiltersGone(points *attach.Points) (changes Changes, err error) {
	if points.TCX {
		return nil, nil
	}
	if err := points.Open(); err != nil {
		return nil, err
	}
	for _, at := range points.All() {
		a := points.At(at)
		changes = append(changes, Gone(Filter{Attachment: a, What: at.Program + " of " + a.Name()}))
	}
	return changes, nil
}

// ProgramsAt are the programs in force at points, as Describe lists them.
func ProgramsAt(points *attach.Points) (all []Program) {
	for _, at := range points.All() {
		if a := points.At(at); a.Alive() {
			all = append(all, Program{Name: at.Program, Hook: points.Ways[at.Program].Attach.String() + " " + a.Name(), Device: a.Name(), Link: a.ID()})
		}
	}
	return all
}

// PinsGone takes away what a layer has pinned in a folder: first the links that it says
// are its own, so that no program runs on maps that are going, then its maps, and the
// folder last if it is empty then. There is nothing to take away where there is no folder.
func PinsGone(folder string, isOurs func(name string) bool) (Changes, error) {
	found, err := os.ReadDir(folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read pin folder: %w", err)
	}
	var links, rest Changes
	for _, entry := range found {
		change := Gone(Pin(filepath.Join(folder, entry.Name())))
		switch {
		case !isOurs(entry.Name()):
		case strings.Contains(entry.Name(), LinkPrefix):
			links = append(links, change)
		default:
			rest = append(rest, change)
		}
	}
	all := append(links, rest...)
	if len(all) == len(found) {
		all = append(all, Gone(Pin(folder)))
	}
	return all, nil
}

// Pin is the path of something pinned, or of a folder of pins: a Removable.
type Pin string

// Object implements Subject.
func (p Pin) Object() string { return "pin " + string(p) }

// Detail implements Subject.
func (p Pin) Detail() string { return "" }

// Remove implements Removable. A link is taken out of force.
func (p Pin) Remove() error { return attach.RemovePin(string(p)) }

// Filter is a filter at a device: a Removable.
type Filter struct {
	attach.Attachment
	// What is how changes call it: "from_pod_12".
	What string
}

// Object implements Subject.
func (f Filter) Object() string { return "filter " + f.What }

// Detail implements Subject.
func (f Filter) Detail() string { return "" }

// Remove implements Removable.
func (f Filter) Remove() error { return f.Detach() }
