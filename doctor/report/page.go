package report

import (
	_ "embed" // the page
	"fmt"
	"io"
	"strings"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/page"
)

//go:embed page.html
var pageText string

var pageTemplate = page.Parse("doctor", pageText)

// content is what page.html shows.
type content struct {
	Header                             Header
	Title, Date, Spaces, Checks, Known string
	Nodes                              string // how many have answered, where there are several

	Tiles    []tile
	Findings []card
	Skips    []string
	All      []line
}

type tile struct {
	Status string
	Count  int
	Says   string
}

// card is a finding, with all its evidence.
type card struct {
	Status, ID, Title string
	Nodes             string // on which it was found, where there are several
	Evidence          []row
	Parts             []part
}

type row struct{ Scopes, Read, Value string }

// part is a word of a check, such as "fix", and what it says.
type part struct{ Name, Text string }

// line is a check in the table of all.
type line struct {
	Status, ID, Title, When string
	Evidence                []string
}

// statuses are the words of results, the worst first, and what each says of the node.
var statuses = []tile{
	{Status: "fail", Says: "traffic is or will be lost"},
	{Status: "warn", Says: "packets are or will be lost or late for some"},
	{Status: "info", Says: "worth knowing"},
	{Status: "skip", Says: "could not be looked at"},
	{Status: "ok", Says: "looked at, and well"},
}

// mostLines is how much evidence of one check the table of all shows.
const mostLines = 4

// WriteHTML writes the report as one page that needs nothing else: no network, no
// scripts, no fonts. It has all evidence of what was found, and every check.
func (r *Report) WriteHTML(w io.Writer) error {
	p := content{
		Header: r.Header, Title: "Nothing is wrong that was looked for",
		Date:   r.Header.Time.Format("2 January 2006, 15:04 MST"),
		Spaces: count(r.Header.Namespaces, "network namespace"), Checks: count(len(r.Results), "check"),
		Known: count(r.Header.Known, "finding"),
	}
	if n := len(r.Header.Nodes); n > 0 {
		p.Nodes = fmt.Sprintf("%d of %s", r.Header.Answered(), count(n, "node"))
	}
	tally := r.Tally()
	if wrong := tally["fail"] + tally["warn"]; wrong > 0 {
		p.Title = count(wrong, "thing") + " to mend"
	}
	for _, t := range statuses {
		t.Count = tally[t.Status]
		p.Tiles = append(p.Tiles, t)
		for _, result := range r.Results {
			if word(result) == t.Status && found(result) {
				p.Findings = append(p.Findings, r.cardOf(result))
			}
		}
	}
	for _, s := range skipped(r.Results) {
		p.Skips = append(p.Skips, strings.Join(s.ids, ", ")+": "+s.why)
	}
	p.Skips = append(p.Skips, r.Header.Unseen...)
	for _, result := range r.Results {
		l := line{Status: word(result), ID: result.ID, Title: result.Title, When: result.When}
		for i, g := range grouped(result.Evidence) {
			if i == mostLines {
				l.Evidence = append(l.Evidence, "...")
				break
			}
			l.Evidence = append(l.Evidence, fmt.Sprintf("%s: %s: %s", g.scopes(), g.read, g.value))
		}
		p.All = append(p.All, l)
	}
	if err := pageTemplate.Execute(w, p); err != nil {
		return fmt.Errorf("write page: %w", err)
	}
	return nil
}

func (r *Report) cardOf(result doctor.Result) card {
	c := card{Status: word(result), ID: result.ID, Title: result.Title, Nodes: r.Header.on(result), Parts: parts(result)}
	for _, g := range grouped(result.Evidence) {
		c.Evidence = append(c.Evidence, row{strings.Join(g.in, ", "), g.read, g.value})
	}
	if result.Pitfall != "" {
		c.Parts = append(c.Parts, part{"beware", result.Pitfall})
	}
	return c
}
