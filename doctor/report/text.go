package report

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/millrace/millrace/doctor"
)

const (
	screen   = 100 // columns
	indent   = 14
	evidence = 6 // lines of each finding
)

// Text writes a screen for people: the worst first. Colour is called with the word of a
// status and the text to be coloured.
func (r *Report) Text(w io.Writer, exit int, colour func(status, text string) string) error {
	var b strings.Builder
	h := r.Header
	b.WriteString("millrace doctor")
	switch {
	case len(h.Nodes) > 0:
		fmt.Fprintf(&b, "  %d of %s  Linux %s  %s", h.Answered(), count(len(h.Nodes), "node"), h.Kernel, count(h.Namespaces, "network namespace"))
	case h.Namespaces > 0 || h.Cluster == "":
		fmt.Fprintf(&b, "  node %s  Linux %s  %s", h.Node, h.Kernel, count(h.Namespaces, "network namespace"))
	}
	if h.Cluster != "" {
		fmt.Fprintf(&b, "  cluster %s", h.Cluster)
	}
	fmt.Fprintf(&b, "  %s, %.1f s\n", count(len(r.Results), "check"), h.Seconds)
	for _, status := range []string{"fail", "warn", "info"} {
		for _, result := range r.Results {
			if word(result) == status {
				r.finding(&b, result, colour(status, fmt.Sprintf(" %-5s %-6s", strings.ToUpper(status), result.ID)))
			}
		}
	}
	skips(&b, r.Results, colour)
	for _, text := range h.Unseen {
		fmt.Fprintf(&b, " %s %s\n", colour("skip", "not seen    "), text)
	}
	tally := r.Tally()
	for _, status := range []string{"ok", "info", "warn", "fail", "skip"} {
		fmt.Fprintf(&b, " %s %d  ", status, tally[status])
	}
	if h.Known > 0 {
		fmt.Fprintf(&b, " known %d  ", h.Known)
	}
	fmt.Fprintf(&b, "      more: --explain ID, -o json      exit %d\n", exit)
	_, err := io.WriteString(w, b.String())
	return err
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprint(n, " ", what)
}

func (r *Report) finding(b *strings.Builder, result doctor.Result, head string) {
	fmt.Fprintf(b, "%s %s\n", head, result.Title)
	if on := r.Header.on(result); on != "" {
		fmt.Fprintf(b, "%*s %s\n", indent, "", on)
	}
	groups := grouped(result.Evidence)
	for i, g := range groups {
		if i == evidence {
			fmt.Fprintf(b, "%*s and %d more: -o json has all\n", indent, "", len(groups)-i)
			break
		}
		fmt.Fprintf(b, "%*s %-18s %s: %s\n", indent, "", g.scopes(), g.read, g.value)
	}
	for _, p := range parts(result) {
		wrap(b, p.Name, p.Text)
	}
}

// parts are what is said of a finding beside its evidence.
func parts(r doctor.Result) []part {
	return []part{{"why", r.Effect}, {"fix", r.Fix}, {"undo", r.Undo}, {"ref", r.Source}}
}

// wrap writes a text in lines of the screen's width; a word that is longer has its own.
func wrap(b *strings.Builder, name, text string) {
	line := fmt.Sprintf("       %-*s", indent-7, name)
	empty := true
	for _, word := range strings.Fields(text) {
		if !empty && len(line)+1+len(word) > screen {
			b.WriteString(line + "\n")
			line = strings.Repeat(" ", indent)
		}
		line += " " + word
		empty = false
	}
	b.WriteString(line + "\n")
}

// group is the same thing, seen in several namespaces.
type group struct {
	read, value string
	in          []string
}

func grouped(all []doctor.Evidence) (groups []*group) {
	for _, e := range all {
		at := slices.IndexFunc(groups, func(g *group) bool { return g.read == e.Read && g.value == e.Value })
		if at < 0 {
			groups = append(groups, &group{read: e.Read, value: e.Value})
			at = len(groups) - 1
		}
		if in := where(e); !slices.Contains(groups[at].in, in) {
			groups[at].in = append(groups[at].in, in)
		}
	}
	return groups
}

func (g *group) scopes() string {
	if len(g.in) > 2 {
		return fmt.Sprintf("%s and %d others", g.in[0], len(g.in)-1)
	}
	return strings.Join(g.in, ", ")
}

// skip is a reason why checks could not look.
type skip struct {
	why string
	ids []string
}

// skipped tells each reason once, with all that it stopped.
func skipped(results []doctor.Result) (all []*skip) {
	for _, r := range results {
		if r.Status != doctor.Skip {
			continue
		}
		g := grouped(r.Evidence)[0] // a skip has evidence of what it lacks, first
		why := fmt.Sprintf("%s: %s: %s", g.scopes(), g.read, g.value)
		at := slices.IndexFunc(all, func(s *skip) bool { return s.why == why })
		if at < 0 {
			at = len(all)
			all = append(all, &skip{why: why})
		}
		all[at].ids = append(all[at].ids, r.ID)
	}
	return all
}

func skips(b *strings.Builder, results []doctor.Result, colour func(status, text string) string) {
	for _, s := range skipped(results) {
		var of strings.Builder
		wrap(&of, "", strings.Join(s.ids, " "))
		b.WriteString(colour("skip", " SKIP  ") + strings.TrimLeft(of.String(), " "))
		wrap(b, "why", s.why)
	}
}

// Explain writes all that is known of a check, before anything is read.
func Explain(w io.Writer, c doctor.Check) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %s  (%s, %s, in %s)\n", c.ID, c.Title, c.Layer, c.Severity, c.Scope)
	for _, p := range []part{
		{"reads", strings.Join(c.Reads, ", ")}, {"when", c.When}, {"why", c.Effect}, {"fix", c.Fix}, {"undo", c.Undo},
		{"beware", c.Pitfall}, {"ref", c.Source},
	} {
		wrap(&b, p.Name, p.Text)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
