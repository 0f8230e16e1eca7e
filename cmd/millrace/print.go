package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// printJSON writes a value for machines, indented.
func printJSON(value any) error {
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}

// table prints aligned columns with a heading.
type table struct {
	out  *tabwriter.Writer
	cols int
}

func newTable(w io.Writer, heading ...string) *table {
	t := &table{out: tabwriter.NewWriter(w, 0, 8, 2, ' ', 0), cols: len(heading)}
	t.row(heading...)
	return t
}

func (t *table) row(cells ...string) { fmt.Fprintln(t.out, strings.Join(cells, "\t")) }

func (t *table) print() error { return t.out.Flush() }

// bytesText is a size for people: "1.2 MB", powers of ten.
func bytesText(n uint64) string {
	switch {
	case n >= 1e9:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%d B", n)
}

// colours are used on a terminal only, and not if NO_COLOR is set.
func colour(code, text string) string {
	info, err := os.Stdout.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 || os.Getenv("NO_COLOR") != "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// columns is how wide text may be on standard output: as the terminal, if that is narrower
// than most, and 60 at least.
func columns(most int) int {
	size, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 {
		return most
	}
	return max(60, min(most, int(size.Col)))
}

func green(text string) string { return colour("32", text) }
func red(text string) string   { return colour("31", text) }
func bold(text string) string  { return colour("1", text) }

// progress writes lines for people to stderr; over the last one on a terminal.
type progress struct {
	terminal bool
	width    int
}

func newProgress() *progress {
	info, err := os.Stderr.Stat()
	return &progress{terminal: err == nil && info.Mode()&os.ModeCharDevice != 0}
}

// Write takes whole lines, so that it can serve as a library's progress.
func (p *progress) Write(text []byte) (int, error) {
	for line := range strings.Lines(string(text)) {
		p.say(strings.TrimRight(line, "\n"))
	}
	return len(text), nil
}

func (p *progress) say(line string) {
	if !p.terminal {
		fmt.Fprintln(os.Stderr, line)
		return
	}
	pad := max(0, p.width-utf8.RuneCountInString(line))
	fmt.Fprintf(os.Stderr, "\r%s%s", line, strings.Repeat(" ", pad))
	p.width = utf8.RuneCountInString(line)
}

// done leaves the last line standing.
func (p *progress) done() {
	if p.terminal && p.width > 0 {
		fmt.Fprintln(os.Stderr)
	}
	p.width = 0
}
