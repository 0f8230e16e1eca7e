package tune

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/millrace/millrace/layer"
)

// Row is one setting.
type Row struct {
	Name string `json:"name"`
	// Value is what it is, or shall be.
	Value string `json:"value"`
	// Before is what it was when this layer set it; empty where it did not.
	Before string `json:"before,omitempty"`
	// Owner is who asks for it.
	Owner string `json:"owner,omitempty"`

	// wanted: somebody asks for it. atLeast: more will do.
	wanted, atLeast bool
	// held: this layer set it, to wrote; where that is empty a process died over it.
	held  bool
	wrote string
	// left: it is not to be set, and Describe says why.
	left bool
}

// Object implements layer.Subject.
func (r *Row) Object() string { return r.Name }

// Detail implements layer.Subject.
func (r *Row) Detail() string { return r.Value }

// theirs says that somebody else has set it since this layer did.
func (r *Row) theirs() bool { return r.held && r.wrote != "" && r.Value != r.wrote }

// suits says whether a value is as good as the one that is asked for.
func (r *Row) suits(value string) bool {
	return value == r.Value || r.atLeast && number(value) >= number(r.Value)
}

// number of a setting; -1 is none.
func number(value string) int64 {
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		return -1
	}
	return n
}

// Picture is settings in the order of their names: those that are asked for, or
// what is in force. Of one that the kernel does not have the latter has no row.
type Picture struct {
	rows  []*Row
	asked bool
}

// Len implements layer.Picture. Of what is in force it counts what this layer set.
func (p *Picture) Len() (n int) {
	for _, r := range p.rows {
		if p.asked || r.held {
			n++
		}
	}
	return n
}

// Subjects implements layer.Picture.
func (p *Picture) Subjects() (subjects []layer.Subject) {
	for _, r := range p.rows {
		subjects = append(subjects, r)
	}
	return subjects
}

// Values are the settings that this layer has set, as far as nobody else has since.
func (p *Picture) Values() (values []layer.Value) {
	for _, r := range p.rows {
		if r.held && !r.theirs() {
			values = append(values, layer.Value{Name: r.Name, Value: r.Value, Before: r.Before, Owner: r.Owner})
		}
	}
	return values
}

func (p *Picture) row(name string) *Row {
	i := slices.IndexFunc(p.rows, func(r *Row) bool { return r.Name == name })
	if i < 0 {
		return nil
	}
	return p.rows[i]
}

// replace a row by another one, or take it away.
func (p *Picture) replace(name string, by *Row) {
	i, found := slices.BinarySearchFunc(p.rows, name, func(r *Row, name string) int { return strings.Compare(r.Name, name) })
	if found {
		p.rows = slices.Delete(p.rows, i, i+1)
	}
	if by != nil {
		p.rows = slices.Insert(p.rows, i, by)
	}
}

// step is what is to be done to a setting: the subject of a Change.
type step struct {
	Row      // what it shall be
	from, to string
	// note is why nothing is done.
	note string
}

// Detail implements layer.Subject: "60 -> 3600".
func (s *step) Detail() string {
	if s.note != "" {
		return s.note
	}
	return s.from + " -> " + s.to
}

// diff says what leads from one picture to another.
func diff(have, want *Picture, prune bool) (changes layer.Changes) {
	for _, h := range have.rows {
		w := want.row(h.Name)
		switch {
		case h.left:
		case w != nil && !w.left && !w.suits(h.Value):
			changes = append(changes, layer.Change{Op: layer.Alter, Subject: &step{Row: *w, from: h.Value, to: w.Value}})
		case w == nil && h.held && prune:
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: back(h)})
		}
	}
	return changes
}

// back is the way to what a setting was before.
func back(r *Row) *step {
	s := &step{Row: *r, from: r.Value, to: r.Before}
	switch {
	case r.Value == r.Before:
		s.note = "stays " + r.Value + ", as it was before"
	case r.theirs():
		s.note = fmt.Sprintf("stays %s: it was %s before millrace set it to %s, and somebody else has set it since", r.Value, r.Before, r.wrote)
	}
	return s
}
