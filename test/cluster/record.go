package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The table of results, and where in it they are.
const (
	tableFile  = "docs/conformance.md"
	tableBegin = "<!-- results: written by `make conformance-table` -->\n"
	tableEnd   = "<!-- end of results -->"
)

// record writes what the last run of `make conformance` found into the table in
// the documentation, in the column of who served Services. Other columns, and
// tests that were not run, stay as they are.
func record() error {
	column, err := os.ReadFile(servedBy())
	if err != nil {
		return fmt.Errorf("find out who served: %w", err)
	}
	report := filepath.Join(cacheFolder, "report", "junit_01.xml")
	content, err := os.ReadFile(report)
	if err != nil {
		return fmt.Errorf("read the last run (make conformance): %w", err)
	}
	ran, err := results(content)
	if err != nil {
		return fmt.Errorf("read %s: %w", report, err)
	}
	page, err := os.ReadFile(tableFile)
	if err != nil {
		return err
	}
	before, rest, begins := strings.Cut(string(page), tableBegin)
	old, after, ends := strings.Cut(rest, tableEnd)
	if !begins || !ends {
		return fmt.Errorf("find the table in %s: no line %q", tableFile, strings.TrimSpace(tableBegin))
	}
	t := parseTable(old)
	t.add(strings.TrimSpace(string(column)), ran)
	return os.WriteFile(tableFile, []byte(before+tableBegin+t.String()+tableEnd+after), 0o644)
}

// servedBy is a file that says who serves Services in the cluster that is up.
func servedBy() string { return filepath.Join(cacheFolder, "served-by") }

// table of results: rows are tests, columns are who served.
type table struct {
	columns []string
	cells   map[string]map[string]string // by test, then by column
}

// parseTable reads what String wrote.
func parseTable(text string) *table {
	t := &table{cells: map[string]map[string]string{}}
	for line := range strings.Lines(text) {
		fields := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		for i := range fields {
			fields[i] = strings.TrimSpace(fields[i])
		}
		switch {
		case len(fields) < 2 || strings.HasPrefix(fields[0], "---"):
		case t.columns == nil:
			t.columns = fields[1:]
		default:
			for i, cell := range fields[1:] {
				t.set(fields[0], t.columns[i], cell)
			}
		}
	}
	return t
}

func (t *table) set(test, column, cell string) {
	if t.cells[test] == nil {
		t.cells[test] = map[string]string{}
	}
	t.cells[test][column] = cell
}

// add the results of a run.
func (t *table) add(column string, ran []result) {
	if !slices.Contains(t.columns, column) {
		t.columns = append(t.columns, column)
	}
	for _, r := range ran {
		t.set(strings.TrimPrefix(r.Name, "[sig-network] "), column, r.cell())
	}
}

// cell is a result in a word or two; what did not pass stands out.
func (r result) cell() string {
	switch r.Status {
	case "passed":
		return "passed"
	case "skipped":
		reason, _, _ := strings.Cut(strings.TrimPrefix(r.Skipped, "skipped - "), "\n")
		return "not here: " + strings.ReplaceAll(strings.TrimSpace(reason), "|", "/")
	}
	return "**" + r.Status + "**"
}

// String is the table in Markdown, with the sums first.
func (t *table) String() string {
	var text strings.Builder
	for _, column := range t.columns {
		fmt.Fprintf(&text, "- %s: %s\n", column, t.sum(column))
	}
	fmt.Fprintf(&text, "\n| [sig-network] | %s |\n|---|%s\n", strings.Join(t.columns, " | "), strings.Repeat("---|", len(t.columns)))
	for _, test := range slices.Sorted(maps.Keys(t.cells)) {
		fmt.Fprintf(&text, "| %s |", test)
		for _, column := range t.columns {
			fmt.Fprintf(&text, " %s |", t.cells[test][column])
		}
		text.WriteByte('\n')
	}
	return text.String()
}

// sum of a column: how many tests passed, and how many did not.
func (t *table) sum(column string) string {
	passed, failed, skipped := 0, 0, 0
	for _, cells := range t.cells {
		switch cell := cells[column]; {
		case cell == "passed":
			passed++
		case strings.HasPrefix(cell, "not here"):
			skipped++
		case cell != "":
			failed++
		}
	}
	return fmt.Sprintf("%d passed, %d failed, %d cannot be judged here", passed, failed, skipped)
}

// withPods is in the name of a column where pods have their network from millrace, too.
const withPods = " and millrace's pod network"

// noteWhoServes is asked for by up.
func noteWhoServes(w wish) error {
	proxy := w.proxy
	if proxy == "kube-proxy" {
		proxy += " " + w.mode
	}
	if w.cni == millrace {
		proxy += withPods
	}
	return errors.Join(os.MkdirAll(cacheFolder, 0o755), os.WriteFile(servedBy(), []byte(proxy+"\n"), 0o644))
}
