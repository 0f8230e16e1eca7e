package kubeproxy

import (
	"fmt"
	"slices"
	"strings"
)

// Fate says what becomes of a field.
type Fate string

// What may become of a field.
const (
	// Honoured means that it has the effect that it has on a kube-proxy.
	Honoured Fate = "yes"
	// Later means that it is read, and that nothing uses it yet.
	Later Fate = "later"
	// Unneeded means that millrace works without it.
	Unneeded Fate = "not needed"
)

// Field is one field of the API.
type Field struct {
	// Path leads to it: "ipvs.scheduler".
	Path string
	Fate Fate
	// Text is how it is honoured, or what takes its place.
	Text string

	shape shape
	// usual are values that ask for nothing: kube-proxy's own defaults. Those that
	// are empty, zero or false ask for nothing either.
	usual []string
	// set is nil where the value is only looked at.
	set func(*Settings, value) error
}

// shape is what a value may look like.
type shape int

const (
	text shape = iota
	flag
	number
	duration
	list
	anything
)

// value is a value of a shape: list of a list, text of all others.
type value struct {
	text string
	list []string
}

func (v value) String() string {
	if v.list != nil {
		return strings.Join(v.list, ", ")
	}
	return v.text
}

// asks says whether a value is other than what everybody has.
func (f *Field) asks(v value) bool {
	text := v.String()
	switch {
	case text == "", text == "0":
		return false
	case f.shape == flag && len(f.usual) == 0:
		return text == "true"
	case f.shape == duration:
		return !slices.ContainsFunc(append(f.usual, "0s"), func(usual string) bool { return sameTime(usual, text) })
	}
	return !slices.Contains(f.usual, text)
}

// note is what to tell about a field that has no effect; "" for nothing.
func (f *Field) note(v value) string {
	if f.Fate == Honoured || !f.asks(v) {
		return ""
	}
	return fmt.Sprintf("%s: %s: %s: %s", f.Path, clip(v.String()), f.Fate, f.Text)
}

// Table is the documentation's table of all fields, in Markdown.
func Table() string {
	var b strings.Builder
	b.WriteString("| field | honoured | how, or what takes its place |\n|---|---|---|\n")
	for i := range Fields {
		f := &Fields[i]
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", f.Path, f.Fate, f.Text)
	}
	return b.String()
}
