package report

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/millrace/millrace/doctor"
)

// Node is one of several that were to be looked at.
type Node struct {
	Name       string `json:"name"`
	Version    string `json:"version,omitempty"`
	Kernel     string `json:"kernel,omitempty"`
	Namespaces int    `json:"namespaces"`
	// Error says why it did not answer, "" if it did.
	Error string `json:"error,omitempty"`
}

// Answer is what a node said of itself, or why it did not.
type Answer struct {
	Node   string
	Report *Report
	Err    error
}

// Read reads what JSON has written, on this machine or another. Checks that this version
// does not know are as they are told.
func Read(from io.Reader) (*Report, error) {
	var d document
	if err := json.NewDecoder(from).Decode(&d); err != nil {
		return nil, fmt.Errorf("read report: %w: is it of `millrace doctor -o json`, whole?", err)
	}
	if d.Header.Format != Format {
		return nil, fmt.Errorf("read report: it is in format %d of millrace %s, and this is format %d: use the same version on both sides", d.Header.Format, d.Header.Version, Format)
	}
	all := doctor.Checks()
	r := &Report{Header: d.Header}
	r.Header.clean()
	for _, c := range d.Checks {
		c.clean()
		told := &doctor.Check{ID: c.ID, Layer: c.Layer, Title: c.Title, Severity: c.Severity, Effect: c.Effect, Source: c.Source, Fix: c.Fix, Undo: c.Undo, Pitfall: c.Pitfall}
		if at := slices.IndexFunc(all, func(k doctor.Check) bool { return k.ID == c.ID }); at >= 0 {
			told = &all[at]
		}
		result := doctor.Result{Check: told, Evidence: c.Evidence, Fix: c.Fix, Undo: c.Undo}
		// Its status is judged here: others count on a finding to have evidence.
		r.Results = append(r.Results, result.Without(func(doctor.Evidence) bool { return false }))
	}
	return r, nil
}

// clean makes what another machine has said fit for a terminal.
func (h *Header) clean() {
	for _, text := range []*string{&h.Version, &h.Node, &h.Kernel} {
		*text = doctor.Harmless(*text)
	}
	for i := range h.Unseen {
		h.Unseen[i] = doctor.Harmless(h.Unseen[i])
	}
	alike := map[string]string{}
	for read, value := range h.Alike {
		alike[doctor.Harmless(read)] = doctor.Harmless(value)
	}
	h.Alike = alike
}

func (c *check) clean() {
	c.Severity = known(c.Severity)
	for _, text := range []*string{&c.ID, &c.Title, &c.Layer, &c.Effect, &c.Source, &c.Fix, &c.Undo, &c.Pitfall} {
		*text = doctor.Harmless(*text)
	}
	for i := range c.Evidence {
		e := &c.Evidence[i]
		for _, text := range []*string{&e.Node, &e.Scope, &e.Read, &e.Value} {
			*text = doctor.Harmless(*text)
		}
		if e.Severity != "" {
			e.Severity = known(e.Severity)
		}
	}
}

// known is a severity of this version; what it does not know is a warning.
func known(s doctor.Severity) doctor.Severity {
	if _, err := doctor.ParseSeverity(string(s)); err != nil {
		return doctor.Warning
	}
	return s
}

// why is an error, with what another machine has said, fit for a terminal and one line.
func why(err error) string { return doctor.Harmless(strings.ReplaceAll(err.Error(), "\n", "; ")) }

// Join makes one report of what nodes have said and of what is said of their cluster's
// objects, with the same finding of several as one. Only what is found in comparing them
// is added, where compared says so. One that did not answer is told as not seen. The
// header has of the command itself what cluster's has.
func Join(nodes []Answer, cluster *Report, compared bool) *Report {
	r := &Report{Header: cluster.Header}
	h := &r.Header
	h.Node, h.Namespaces, h.Unseen = "", 0, nil
	of, values := map[string][]doctor.Result{}, map[string]map[string]string{}
	unseen := map[string][]string{}
	var ids, kernels, texts []string
	for _, a := range nodes {
		if a.Err != nil {
			h.Nodes = append(h.Nodes, Node{Name: a.Node, Error: why(a.Err)})
			h.Unseen = append(h.Unseen, fmt.Sprintf("node %s: %s", a.Node, why(a.Err)))
			continue
		}
		from := a.Report.Header
		h.Nodes = append(h.Nodes, Node{Name: a.Node, Version: from.Version, Kernel: from.Kernel, Namespaces: from.Namespaces})
		h.Namespaces += from.Namespaces
		h.Window = max(h.Window, from.Window)
		if !slices.Contains(kernels, from.Kernel) {
			kernels = append(kernels, from.Kernel)
		}
		for _, text := range from.Unseen {
			if unseen[text] == nil {
				texts = append(texts, text)
			}
			unseen[text] = append(unseen[text], a.Node)
		}
		values[a.Node] = from.Alike
		for _, result := range a.Report.Results {
			if result.Scope == doctor.Among {
				continue // it is for all of them
			}
			result.Evidence = slices.Clone(result.Evidence)
			for i := range result.Evidence {
				result.Evidence[i].Node = a.Node
			}
			if of[result.ID] == nil {
				ids = append(ids, result.ID)
			}
			of[result.ID] = append(of[result.ID], result)
		}
	}
	h.Kernel = strings.Join(kernels, ", ")
	for _, text := range texts {
		h.Unseen = append(h.Unseen, fewer(unseen[text])+": "+text)
	}
	h.Unseen = append(h.Unseen, cluster.Header.Unseen...)
	r.Results = slices.Clone(cluster.Results)
	for _, id := range ids {
		r.Results = append(r.Results, doctor.Join(of[id]))
	}
	if compared {
		r.Results = append(r.Results, doctor.Compare(values))
	}
	slices.SortStableFunc(r.Results, func(a, b doctor.Result) int { return strings.Compare(a.ID, b.ID) })
	h.Seconds = time.Since(h.Time).Seconds()
	return r
}

// Answered is how many of the nodes have said something.
func (h *Header) Answered() (n int) {
	for _, node := range h.Nodes {
		if node.Error == "" {
			n++
		}
	}
	return n
}

// nodesOf are those on which something was found, each once, in their order.
func nodesOf(r doctor.Result) (names []string) {
	for _, e := range r.Evidence {
		if e.Severity != "" && e.Node != "" && !slices.Contains(names, e.Node) {
			names = append(names, e.Node)
		}
	}
	return names
}

// on says on which of the nodes something was found: "3 of 5 nodes: a, b, c"; "" where
// one node was looked at, or what was found is the cluster's.
func (h *Header) on(r doctor.Result) string {
	names := nodesOf(r)
	if len(names) == 0 || len(h.Nodes) == 0 {
		return ""
	}
	return fmt.Sprintf("%d of %s: %s", len(names), count(h.Answered(), "node"), fewer(names))
}

// mostNamed is how many nodes are named of more.
const mostNamed = 6

func fewer(names []string) string {
	if len(names) > mostNamed {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:mostNamed], ", "), len(names)-mostNamed)
	}
	return strings.Join(names, ", ")
}

// where is the place of evidence, with its node where there are several.
func where(e doctor.Evidence) string {
	switch {
	case e.Node == "":
		return e.Scope
	case e.Scope == string(doctor.Node):
		return e.Node
	}
	return e.Node + ": " + e.Scope
}
