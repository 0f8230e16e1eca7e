package doctor

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Severity says what becomes of a node that is left as it is.
type Severity string

// The severities, the least first.
const (
	Info     Severity = "info"     // worth knowing
	Warning  Severity = "warning"  // packets are or will be lost or late for some
	Critical Severity = "critical" // traffic is or will be lost
)

var severities = []Severity{Info, Warning, Critical}

// AtLeast compares severities.
func (s Severity) AtLeast(other Severity) bool {
	return slices.Index(severities, s) >= slices.Index(severities, other)
}

// ParseSeverity reads the word of a severity.
func ParseSeverity(word string) (Severity, error) {
	if s := Severity(word); slices.Contains(severities, s) {
		return s, nil
	}
	return "", fmt.Errorf("%q is no severity: use info, warning or critical", word)
}

// Status is what a check came to.
type Status string

// The four statuses. Skip says that something could not be looked at, and nothing
// was found in the rest.
const (
	OK   Status = "ok"
	Warn Status = "warn"
	Fail Status = "fail"
	Skip Status = "skip"
)

// Scope says where a check looks.
type Scope string

// The scopes.
const (
	Node       Scope = "node"           // the node's own namespace, and what is global
	Everywhere Scope = "each namespace" // there, and in every other network namespace
	Whole      Scope = "cluster"        // the objects of the API
	Among      Scope = "nodes"          // what several nodes have, compared
	Sent       Scope = "what it sends"  // answers to packets of this node: only where it is named
)

// Check is one thing that can be wrong.
type Check struct {
	// ID is stable: scripts and baselines name it.
	ID string
	// Layer is the part of the network that it is about.
	Layer string
	// Title is what is wrong, when it fires.
	Title string
	// Severity is that of the worst it can find.
	Severity Severity
	Scope    Scope
	// Reads are the facts it needs: files, settings by the names of sysctl(8), or one of
	// the words of this package, kinds of objects among them. What is not named here is
	// not read.
	Reads []string
	// When it fires, with the threshold.
	When string
	// Effect is what follows, Source where that and the threshold are written.
	Effect, Source string
	// Fix and Undo are what to do, and how to take it back.
	Fix, Undo string
	// Pitfall is what the usual advice gets wrong.
	Pitfall string

	look func(*view)
}

// Evidence is one thing that was seen, or why it was not.
type Evidence struct {
	// Node is where it was seen, where several were looked at.
	Node string `json:"node,omitempty"`
	// Scope is the namespace or the object: "node", "pod web-7f", "Service shop/web".
	Scope string `json:"scope"`
	// Read is where the value was read.
	Read  string `json:"read"`
	Value string `json:"value"`

	// Severity is that of what fires, empty for the rest.
	Severity Severity `json:"severity,omitempty"`
	// Unread says that the value is why something could not be looked at.
	Unread bool `json:"unread,omitempty"`
}

// Result is what a check came to, on one node or on several.
type Result struct {
	*Check
	Status Status
	// Severity is that of what was found, or the check's own.
	Severity Severity
	Evidence []Evidence
	// Fix and Undo are the check's, with numbers of this node where they can be said.
	Fix, Undo string
}

// Run is what the checks say of the facts. It is pure.
func Run(facts *Facts, checks []Check) []Result {
	results := make([]Result, len(checks))
	for i := range checks {
		results[i] = run(facts, &checks[i])
	}
	return results
}

func run(facts *Facts, check *Check) Result {
	v := &view{facts: facts, check: check, fix: check.Fix, undo: check.Undo}
	spaces := facts.Spaces
	switch check.Scope {
	case Node:
		spaces = spaces[:1]
	case Whole, Among:
		spaces = []*Space{{Name: string(check.Scope)}}
	case Sent:
		spaces = []*Space{{Name: string(Node)}}
	}
	for _, s := range spaces {
		v.Space = s
		check.look(v)
	}
	if check.Scope == Everywhere {
		v.unread = append(v.unread, facts.hidden...)
	}
	r := Result{Check: check, Fix: v.fix, Undo: v.undo, Evidence: slices.Concat(v.found, v.unread)}
	r.judge()
	if r.Status == OK || r.Status == Skip {
		r.Evidence = append(r.Evidence, v.sound(len(spaces))...)
	}
	return r
}

// judge makes status and severity of the evidence: what fires, or else what is lacking.
func (r *Result) judge() {
	var worst Severity
	for _, e := range r.Evidence {
		if e.Severity != "" && (worst == "" || !worst.AtLeast(e.Severity)) {
			worst = e.Severity
		}
	}
	r.Status, r.Severity = OK, r.Check.Severity
	switch {
	case worst == Critical:
		r.Status, r.Severity = Fail, worst
	case worst != "":
		r.Status, r.Severity = Warn, worst
	case slices.ContainsFunc(r.Evidence, func(e Evidence) bool { return e.Unread }):
		r.Status = Skip
	}
}

// Without is the result without the evidence that fires and is known.
func (r Result) Without(known func(Evidence) bool) Result {
	r.Evidence = slices.DeleteFunc(slices.Clone(r.Evidence), func(e Evidence) bool { return e.Severity != "" && known(e) })
	r.judge()
	return r
}

// view is what a check sees of one namespace, and where it says what it found.
type view struct {
	*Space
	facts *Facts
	check *Check
	// fix and undo start as the check's; mixed says that namespaces differ in theirs.
	fix, undo string
	mixed     bool
	// found fires, unread could not be looked at, seen is the node's where it is well.
	found, unread, seen []Evidence
}

// sound is the evidence of a check that found nothing.
func (v *view) sound(spaces int) []Evidence {
	blind := map[string]bool{}
	for _, e := range v.unread {
		blind[e.Scope] = true
	}
	if spaces -= len(blind) + 1; v.check.Scope != Everywhere || spaces <= 0 {
		return v.seen
	}
	text := fmt.Sprintf("nothing found in %d other namespaces", spaces)
	return append(v.seen, Evidence{Scope: string(Everywhere), Read: strings.Join(v.check.Reads, ", "), Value: text})
}

func (v *view) fires(s Severity, read, format string, values ...any) {
	v.firesAt(v.Name, s, read, format, values...)
}

// mends says what to do here, and how to take it back. Where namespaces differ in that no
// one command is right in all: then the check's own words stay, and the evidence has the
// values.
func (v *view) mends(fix, undo string) {
	first := v.fix == v.check.Fix && v.undo == v.check.Undo
	v.mixed = v.mixed || !first && (v.fix != fix || v.undo != undo)
	v.fix, v.undo = fix, undo
	if v.mixed {
		v.fix, v.undo = v.check.Fix, v.check.Undo
	}
}

// sees notes what is well, of the node or the cluster: other namespaces are counted.
func (v *view) sees(read, format string, values ...any) {
	if v.check.Scope == Whole || v.check.Scope == Sent || v.Space == v.facts.Spaces[0] {
		v.seen = append(v.seen, Evidence{Scope: v.Name, Read: harmless(read), Value: harmless(fmt.Sprintf(format, values...))})
	}
}

// lacks notes what could not be looked at, and why.
func (v *view) lacks(read, format string, values ...any) {
	v.unread = append(v.unread, Evidence{Scope: v.Name, Read: harmless(read), Value: harmless(fmt.Sprintf(format, values...)), Unread: true})
}

// Sends says that the check takes packets that Host.Probe sends.
func (c *Check) Sends() bool { return c.Scope == Sent }

// Select picks checks: those that are named, by ID, by the beginning of it, by layer or
// by scope (where none is named, all that send nothing), and that can be as severe as it
// is asked.
func Select(checks []Check, names []string, least Severity) ([]Check, error) {
	for _, name := range names {
		if !slices.ContainsFunc(checks, func(c Check) bool { return c.named(name) }) {
			return nil, fmt.Errorf("no check and no layer is called %q: docs/doctor.md lists them", name)
		}
	}
	var chosen []Check
	for _, c := range checks {
		named := len(names) == 0 && !c.Sends() || slices.ContainsFunc(names, c.named)
		if named && c.Severity.AtLeast(least) {
			chosen = append(chosen, c)
		}
	}
	return chosen, nil
}

func (c *Check) named(name string) bool {
	return strings.EqualFold(c.ID, name) || strings.EqualFold(c.Layer, name) || strings.EqualFold(string(c.Scope), name) ||
		strings.HasPrefix(c.ID, strings.ToUpper(strings.TrimSuffix(name, "-"))+"-")
}

// Checks are all that there are, by their IDs.
func Checks() []Check {
	all := slices.Concat(
		conntrackChecks, dnsChecks, hostChecks, mtuChecks, routingChecks, serviceChecks, socketChecks, settingChecks,
		servicesChecks, namesChecks, pluginChecks, workloadChecks, gatewayChecks, amongChecks, probeChecks,
	)
	slices.SortFunc(all, func(a, b Check) int { return cmp.Compare(a.ID, b.ID) })
	return all
}
