package bench

import (
	_ "embed" // the page
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/millrace/millrace/page"
)

//go:embed page.html
var pageText string

var pageTemplate = page.Parse("bench", pageText)

// content is what page.html shows.
type content struct {
	*Report
	Title    string
	Date     string
	Tiles    [][]tile // one list a variant
	Pictures []picture
	Tables   []pageTable
	Settings []setting
	All      pageTable
	Fewest   string
}

// tile is a figure that stands out, with its interval if it has one.
type tile struct{ Class, Subject, Figure, Text, Interval string }

type setting struct{ Name, Value string }

// pageTable is a table; the first Texts of its columns are words, the others
// numbers.
type pageTable struct {
	Title, Caption string
	Heads          []string
	Texts          int
	// Grouped: a row whose first cell is not empty begins a group.
	Grouped bool
	Rows    [][]string
}

// WriteHTML writes the report as one page that needs nothing else: no network, no
// scripts, no fonts. It has plots of all figures and, in a table, every row.
func (r *Report) WriteHTML(w io.Writer) error {
	p := content{
		Report: r, Title: "What a Service costs", Fewest: r.fewestText(),
		Tiles: r.tiles(), Pictures: r.pictures(), Tables: r.pageTables(), All: r.allRows(),
	}
	if !r.Header.Time.IsZero() {
		p.Date = r.Header.Time.Format("2 January 2006, 15:04 MST")
	}
	for _, key := range sortedKeys(r.Header.Settings) {
		p.Settings = append(p.Settings, setting{key, r.Header.Settings[key]})
	}
	if err := pageTemplate.Execute(w, p); err != nil {
		return fmt.Errorf("write page: %w", err)
	}
	return nil
}

// tiles are those of millrace with the most Services.
func (r *Report) tiles() (lists [][]tile) {
	for _, variant := range []string{Millrace, MillracePacket} {
		most := Row{Variant: variant}
		for _, s := range r.subjects() {
			if s.Variant == variant {
				most.Services = max(most.Services, s.Services)
			}
		}
		if tiles := r.tilesOf(most); len(tiles) > 0 {
			lists = append(lists, tiles)
		}
	}
	return lists
}

func (r *Report) tilesOf(s Row) (tiles []tile) {
	subject := fmt.Sprintf("%s, %s Services", s.Variant, thousands(s.Services))
	add := func(figure, text, interval string) {
		tiles = append(tiles, tile{classOf(s.Variant), subject, figure, text, interval})
	}
	addRatio := func(ratio *Ratio, text string) {
		if ratio != nil {
			add(fmt.Sprintf("%.3f", ratio.Median), text, ratio.interval())
		}
	}
	for _, operation := range r.operations() {
		if row := r.figure(s, MetricP50(operation)); row != nil {
			addRatio(row.Ratio, "of a native "+operation)
			addRatio(row.Growth, "of a "+operation+" with "+r.fewestText())
		}
	}
	if row := r.figure(s, MetricChange); row != nil {
		add(milli(row.Median), "to change one endpoint", "")
	}
	return tiles
}

// interval is "[1.341, 1.360]", or nothing.
func (r *Ratio) interval() string {
	if r.Low == nil || r.High == nil {
		return ""
	}
	return fmt.Sprintf("[%.3f, %.3f]", *r.Low, *r.High)
}

// pictures are the plots that have something to show.
func (r *Report) pictures() (pictures []picture) {
	ratio := func(value float64) string { return fmt.Sprintf("%.4g", value) }
	add := func(p plot) {
		if len(p.lines) > 0 {
			pictures = append(pictures, p.draw())
		}
	}
	toNative := func(row *Row) *Ratio {
		if row.Variant == Native {
			return nil
		}
		return row.Ratio
	}
	toFewest := func(row *Row) *Ratio {
		if row.Services == slices.Min(r.serviceCounts()) {
			return &Ratio{Median: 1} // that is what it compares to
		}
		return row.Growth
	}
	for _, operation := range r.operations() {
		add(plot{title: "A " + operation + ", to native", reference: "native 1", format: ratio,
			caption: titleOf(operation) + ": p50 to native in the same round",
			lines:   r.ratioLines(MetricP50(operation), toNative)})
	}
	if len(r.serviceCounts()) > 1 {
		for _, operation := range r.operations() {
			add(plot{title: "A " + operation + ", to itself with " + r.fewestText(), reference: "1", format: ratio,
				caption: "p50 to that of the same variant with " + r.fewestText() + " in the same round",
				lines:   r.ratioLines(MetricP50(operation), toFewest)})
		}
	}
	add(plot{title: "To load all Services", format: milli, caption: "from nothing to every Service answering, the best of few",
		lines: r.costLines(MetricLoad, "", "", (*Row).best)})
	add(plot{title: "To change one endpoint", format: milli, caption: "one endpoint of the tested Service replaced by another, median",
		lines: r.costLines(MetricChange, "", "", (*Row).middle)})
	memory := r.costLines(MetricKernel, ", kernel", "", (*Row).middle)
	add(plot{title: "Memory", format: bytesText, caption: "maps or tables in the kernel, and the process that serves",
		lines: append(memory, r.costLines(MetricResident, ", process", "7 3", (*Row).middle)...)})
	return pictures
}

func titleOf(operation string) string {
	_, after, _ := strings.Cut(titles[operation], ": ")
	return after
}

// ratioLines are those of one metric; native, to which others compare, has none.
func (r *Report) ratioLines(metric string, of func(*Row) *Ratio) (lines []line) {
	for _, s := range r.ofOneLine() {
		l := line{name: lineName(s), variant: s.Variant, dash: dashOf(s.Position)}
		for _, count := range r.serviceCounts() {
			s.Services = count
			if row := r.figure(s, metric); row != nil && of(row) != nil {
				l.points = append(l.points, ratioPoint(count, of(row)))
			}
		}
		if len(l.points) > 0 {
			lines = append(lines, l)
		}
	}
	return lines
}

func ratioPoint(services int, ratio *Ratio) point {
	p := point{services: services, value: ratio.Median, text: ratio.String()}
	if ratio.Low != nil && ratio.High != nil {
		p.low, p.high = *ratio.Low, *ratio.High
	}
	return p
}

// costLines are those of a metric that compares with nothing: one for each
// variant, for it does not depend on the position. kind is added to the names.
func (r *Report) costLines(metric, kind, dash string, of func(*Row) float64) (lines []line) {
	for _, s := range r.ofOneLine() {
		l := line{name: s.Variant + kind, variant: s.Variant, dash: dash}
		if slices.ContainsFunc(lines, func(o line) bool { return o.name == l.name }) {
			continue
		}
		for _, count := range r.serviceCounts() {
			s.Services = count
			if row := r.figure(s, metric); row != nil && of(row) > 0 {
				p := point{services: count, value: of(row), text: milli(of(row))}
				if row.Unit == "bytes" {
					p.text = bytesText(of(row))
				}
				l.points = append(l.points, p)
			}
		}
		if len(l.points) > 0 {
			lines = append(lines, l)
		}
	}
	return lines
}

// ofOneLine has one subject of every variant and position.
func (r *Report) ofOneLine() (subjects []Row) {
	seen := map[[2]string]bool{}
	for _, s := range r.subjects() {
		if key := [2]string{s.Variant, s.Position}; !seen[key] {
			seen[key] = true
			subjects = append(subjects, s)
		}
	}
	return subjects
}

func lineName(row Row) string {
	if row.Position == "" {
		return row.Variant
	}
	return row.Variant + ", " + row.Position
}

// dashOf tells the positions of one variant apart.
func dashOf(position string) string {
	switch position {
	case First:
		return "2 3"
	case Middle:
		return "7 3"
	}
	return ""
}

// pageTables are those that WriteTable prints.
func (r *Report) pageTables() (tables []pageTable) {
	for _, operation := range r.operations() {
		t := pageTable{Title: "A " + operation, Caption: titles[operation], Texts: 3, Grouped: true}
		t.Heads, t.Rows = r.operationCells(operation)
		tables = append(tables, t)
	}
	t := pageTable{Title: "Loading, changing, memory", Texts: 3, Grouped: true,
		Caption: "Load: best of few; change: median. A dash is not known, or nothing."}
	t.Heads, t.Rows = r.costCells()
	return append(tables, t)
}

// allRows is every row of the report, as in its JSON form.
func (r *Report) allRows() pageTable {
	t := pageTable{Title: "All figures", Texts: 5, Heads: []string{"variant", "services", "rule", "metric", "unit", "median", "min", "max", "rounds",
		"to native [95 %]", "to " + r.fewestText() + " [95 %]"}}
	number := func(value float64) string { return strconv.FormatFloat(math.Round(value*1e4)/1e4, 'f', -1, 64) }
	for _, row := range r.Rows {
		t.Rows = append(t.Rows, []string{row.Variant, thousands(row.Services), orDash(row.Position), row.Metric, row.Unit,
			number(row.Median), number(row.Min), number(row.Max), fmt.Sprint(row.Rounds), row.Ratio.String(), row.Growth.String()})
	}
	return t
}

// milli writes milliseconds in the unit that a person would use.
func milli(ms float64) string {
	switch {
	case ms >= 1000:
		return trimmed(ms/1000) + " s"
	case ms >= 1:
		return trimmed(ms) + " ms"
	}
	return trimmed(ms*1000) + " µs"
}

// bytesText writes bytes with powers of ten.
func bytesText(bytes float64) string {
	for _, unit := range []string{"B", "kB", "MB"} {
		if bytes < 999.5 {
			return trimmed(bytes) + " " + unit
		}
		bytes /= 1000
	}
	return trimmed(bytes) + " GB"
}

// trimmed writes three digits, without zeros at the end.
func trimmed(value float64) string {
	if value >= 100 {
		return fmt.Sprintf("%.0f", value)
	}
	return fmt.Sprintf("%.3g", value)
}
