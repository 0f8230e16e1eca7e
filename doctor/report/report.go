// Package report writes what doctor found: a screen for people, JSON, and the forms of
// JUnit, SARIF and Prometheus. All have the checks in the same order, by their IDs.
//
// It reads nothing but the baseline that it is given, and costs milliseconds.
package report

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/millrace/millrace/doctor"
)

// Format is that of the JSON, and grows when a field is taken away or comes to mean
// something else; 2 has all of a check, and nodes.
const Format = 2

// Header says what was looked at.
type Header struct {
	Format  int    `json:"format"`
	Tool    string `json:"tool"`
	Version string `json:"version"`
	// Node is the name of the one that was looked at, "" where there were several, which
	// are Nodes.
	Node   string    `json:"node"`
	Nodes  []Node    `json:"nodes,omitempty"`
	Kernel string    `json:"kernel"`
	Time   time.Time `json:"time"`
	// Seconds are what all took, Window those between the two readings of counters.
	Seconds float64 `json:"seconds"`
	Window  float64 `json:"window_seconds"`
	// Namespaces is how many network namespaces were read.
	Namespaces int `json:"namespaces"`
	// Cluster is where the objects of a cluster were read, "kube:/root/.kube/config"; ""
	// where none were.
	Cluster string `json:"cluster"`
	// Unseen says what could not be looked into, and why.
	Unseen []string `json:"unseen"`
	// Alike is what this node should have in common with others, by where it was read.
	Alike map[string]string `json:"alike,omitempty"`
	// Known are the findings that the baseline had, and which are left out.
	Known int `json:"known"`
}

// Report is what doctor says of one node, of several, or of a cluster's objects.
type Report struct {
	Header  Header
	Results []doctor.Result
}

// check is the JSON form of a Result; its fields are promised in docs/doctor.md.
type check struct {
	ID       string            `json:"id"`
	Title    string            `json:"title"`
	Layer    string            `json:"layer"`
	Severity doctor.Severity   `json:"severity"`
	Status   doctor.Status     `json:"status"`
	Evidence []doctor.Evidence `json:"evidence"`
	Effect   string            `json:"effect"`
	Source   string            `json:"source"`
	Fix      string            `json:"fix"`
	Undo     string            `json:"undo"`
	Pitfall  string            `json:"pitfall"`
}

type document struct {
	Header Header  `json:"header"`
	Checks []check `json:"checks"`
}

// JSON writes the report for machines; it is also what Baseline reads.
func (r *Report) JSON(w io.Writer) error {
	d := document{Header: r.Header, Checks: []check{}}
	d.Header.Format = Format
	if d.Header.Unseen == nil {
		d.Header.Unseen = []string{}
	}
	for _, result := range r.Results {
		d.Checks = append(d.Checks, check{
			result.ID, result.Title, result.Layer, result.Severity, result.Status, append([]doctor.Evidence{}, result.Evidence...),
			result.Effect, result.Source, result.Fix, result.Undo, result.Pitfall,
		})
	}
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(d)
}

// place is what of a finding stays the same while its numbers change.
type place struct{ id, node, scope, read string }

// Since leaves out what a baseline, an earlier report in JSON, had already. A finding of
// which all is known counts as ok.
func (r *Report) Since(baseline io.Reader) error {
	var earlier document
	if err := json.NewDecoder(baseline).Decode(&earlier); err != nil {
		return fmt.Errorf("read baseline: %w: it has to be what `millrace doctor -o json` wrote", err)
	}
	known := map[place]bool{}
	for _, c := range earlier.Checks {
		for _, e := range c.Evidence {
			if c.Status == doctor.Warn || c.Status == doctor.Fail {
				known[place{c.ID, e.Node, e.Scope, e.Read}] = true
			}
		}
	}
	for i := range r.Results {
		left := r.Results[i].Without(func(e doctor.Evidence) bool { return known[place{r.Results[i].ID, e.Node, e.Scope, e.Read}] })
		if found(left) != found(r.Results[i]) {
			r.Header.Known++
		}
		r.Results[i] = left
	}
	return nil
}

func found(r doctor.Result) bool { return r.Status == doctor.Warn || r.Status == doctor.Fail }

// Tally counts the results; information counts apart from warnings.
func (r *Report) Tally() map[string]int {
	tally := map[string]int{}
	for _, result := range r.Results {
		tally[word(result)]++
	}
	return tally
}

// word is the status, or "info" for a finding that is no more.
func word(r doctor.Result) string {
	if r.Status == doctor.Warn && r.Severity == doctor.Info {
		return "info"
	}
	return string(r.Status)
}
