package report

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/millrace/millrace/doctor"
)

const (
	// Screen is how wide lines are where no terminal says less, in columns: longer ones are
	// hard to read.
	Screen   = 100
	indent   = 14
	evidence = 6 // of each finding
)

// sheet is what a screen's text is written to, in lines of so many columns. On a full
// screen evidence, head and foot are a line each, however long: somebody searches in them.
type sheet struct {
	strings.Builder
	columns int
}

// Text writes a screen for people, so many columns wide: the worst first. Colour is
// called with the word of a status and the text to be coloured.
func (r *Report) Text(w io.Writer, columns, exit int, colour func(status, text string) string) error {
	b := &sheet{columns: columns}
	h := r.Header
	head := []string{"millrace doctor"}
	switch {
	case len(h.Nodes) > 0:
		head = append(head, fmt.Sprintf("%d of %s", h.Answered(), count(len(h.Nodes), "node")), "Linux "+h.Kernel, count(h.Namespaces, "network namespace"))
	case h.Namespaces > 0 || h.Cluster == "":
		head = append(head, "node "+h.Node, "Linux "+h.Kernel, count(h.Namespaces, "network namespace"))
	}
	if h.Cluster != "" {
		head = append(head, "cluster "+h.Cluster)
	}
	b.row(append(head, fmt.Sprintf("%s, %.1f s", count(len(r.Results), "check"), h.Seconds)))
	for _, status := range []string{"fail", "warn", "info"} {
		for _, result := range r.Results {
			if word(result) == status {
				r.finding(b, result, colour(status, fmt.Sprintf(" %-5s %-6s", strings.ToUpper(status), result.ID)))
			}
		}
	}
	skips(b, r.Results, colour)
	for _, text := range h.Unseen {
		b.headed(" "+colour("skip", "not seen    "), text)
	}
	tally := r.Tally()
	var foot []string
	for _, status := range []string{"ok", "info", "warn", "fail", "skip"} {
		foot = append(foot, fmt.Sprint(status, " ", tally[status], " "))
	}
	if h.Known > 0 {
		foot = append(foot, fmt.Sprint("known ", h.Known, " "))
	}
	foot[0] = " " + foot[0]
	b.row(append(foot, fmt.Sprintf("     more: --explain ID, -o json      exit %d", exit)))
	_, err := io.WriteString(w, b.String())
	return err
}

// row writes parts beside each other, and what does not fit below.
func (b *sheet) row(parts []string) {
	line := ""
	for _, part := range parts {
		if b.columns < Screen && line != "" && utf8.RuneCountInString(line)+2+utf8.RuneCountInString(part) > b.columns {
			b.WriteString(strings.TrimRight(line, " ") + "\n")
			line, part = "", " "+strings.TrimLeft(part, " ")
		}
		if line != "" {
			line += "  "
		}
		line += part
	}
	b.WriteString(line + "\n")
}

// hang writes a text behind what its first line begins with; the next lines are so far
// in. A word that is longer than a line has its own.
func (b *sheet) hang(first string, in int, text string) {
	line, empty := first, true
	for _, word := range strings.Fields(text) {
		if !empty && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > b.columns {
			b.WriteString(line + "\n")
			line = strings.Repeat(" ", in)
		}
		line += " " + word
		empty = false
	}
	b.WriteString(line + "\n")
}

// headed writes a text behind a head that may be coloured, and has no width that could be
// counted: it takes the indent.
func (b *sheet) headed(head, text string) {
	of := &sheet{columns: b.columns}
	of.hang(strings.Repeat(" ", indent-1), indent-1, text)
	b.WriteString(head + of.String()[indent-1:])
}

// says writes a text with its name before it.
func (b *sheet) says(name, text string) {
	b.hang(fmt.Sprintf("       %-*s", indent-7, name), indent, text)
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprint(n, " ", what)
}

func (r *Report) finding(b *sheet, result doctor.Result, head string) {
	b.headed(head, result.Title)
	if on := r.Header.on(result); on != "" {
		fmt.Fprintf(b, "%*s %s\n", indent, "", on)
	}
	groups := grouped(result.Evidence)
	for i, g := range groups {
		if i == evidence {
			fmt.Fprintf(b, "%*s and %d more: -o json has all\n", indent, "", len(groups)-i)
			break
		}
		first := fmt.Sprintf("%*s %-18s", indent, "", g.scopes())
		if b.columns < Screen {
			b.hang(first, indent+2, g.read+": "+g.value)
			continue
		}
		fmt.Fprintf(b, "%s %s: %s\n", first, g.read, g.value)
	}
	for _, p := range parts(result) {
		b.says(p.Name, p.Text)
	}
}

// parts are what is said of a finding beside its evidence.
func parts(r doctor.Result) []part {
	return []part{{"why", r.Effect}, {"fix", r.Fix}, {"undo", r.Undo}, {"ref", r.Source}}
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

func skips(b *sheet, results []doctor.Result, colour func(status, text string) string) {
	for _, s := range skipped(results) {
		of := &sheet{columns: b.columns}
		of.says("", strings.Join(s.ids, " "))
		b.WriteString(colour("skip", " SKIP  ") + strings.TrimLeft(of.String(), " "))
		b.says("why", s.why)
	}
}

// Explain writes all that is known of a check, before anything is read.
func Explain(w io.Writer, columns int, c doctor.Check) error {
	b := &sheet{columns: columns}
	fmt.Fprintf(b, "%s  %s  (%s, %s, in %s)\n", c.ID, c.Title, c.Layer, c.Severity, c.Scope)
	for _, p := range []part{
		{"reads", strings.Join(c.Reads, ", ")}, {"when", c.When}, {"why", c.Effect}, {"fix", c.Fix}, {"undo", c.Undo},
		{"beware", c.Pitfall}, {"ref", c.Source},
	} {
		b.says(p.Name, p.Text)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
