package bench

import (
	"fmt"
	"io"
	"slices"
	"sort"
	"strconv"
	"strings"
	"text/tabwriter"
)

// footnote says what the columns mean.
const footnote = `To native, to %s: the median of the ratios in the same round, and its
95 %% interval. Read a difference below one percent as none.
Rule: where the tested Service stands among the rules of a variant that searches
them in order. last is the worst case for it; kube-proxy's own order is random.
Load: best of few, from nothing to every Service answering. millrace: loading and
attaching its programs, planning and filling its maps. iptables, nftables: the
whole run of iptables-restore or nft; what kube-proxy does before is not in it.
Change: median, one endpoint of the tested Service replaced, each proved by
connections. millrace: from the Snapshot to what was read back. iptables, nftables:
the run of iptables-restore or nft with what kube-proxy writes for that.
Kernel: what its maps hold as the kernel counts it; of iptables-legacy its tables.
Resident: the process that serves. - is not known, or nothing.
`

// WriteTable prints the report for people: a header, for each operation and for
// what is beside it one line a variant and number of Services, and what a reader
// must know.
func (r *Report) WriteTable(w io.Writer) error {
	out := &printer{w: w}
	out.printf("%s; kernel %s; %d CPUs; load average %.2f; %s\n",
		r.Header.Machine, r.Header.Kernel, r.Header.CPUs, r.Header.LoadAverage[0], r.Header.Go)
	for _, key := range sortedKeys(r.Header.Settings) {
		out.printf("  %s: %s\n", key, r.Header.Settings[key])
	}
	made, wrong := []string{}, 0.0
	for _, operation := range r.operations() {
		out.printf("\n%s\n", titles[operation])
		out.columns(r.operationCells(operation))
		made = append(made, fmt.Sprintf("%.0f %s", r.sum(MetricCount(operation)), MetricCount(operation)))
		wrong += r.sum(MetricErrors(operation))
	}
	out.printf("\nLoading all, changing one, and memory\n")
	out.columns(r.costCells())
	out.printf("\n"+footnote, r.fewestText())
	out.printf("%s, %.0f went wrong.\n", strings.Join(made, " and "), wrong)
	for _, skipped := range r.Skipped {
		out.printf("%s\n", skipped)
	}
	for _, warning := range r.Warnings {
		out.printf("warning: %s\n", warning)
	}
	return out.err
}

// titles are those of the operations' tables.
var titles = map[string]string{
	Connection: "A connection: connect, 64 bytes there, 64 bytes back, close",
	Request:    "A request on an open connection: 64 bytes there, 64 bytes back",
}

// operations are those that were measured, in their usual order.
func (r *Report) operations() (measured []string) {
	for _, operation := range DefaultOperations {
		if slices.ContainsFunc(r.Rows, func(row Row) bool { return row.Metric == MetricP50(operation) }) {
			measured = append(measured, operation)
		}
	}
	return measured
}

// subjects has one row of every variant, number of Services and position.
func (r *Report) subjects() (subjects []Row) {
	for _, row := range r.Rows {
		if !slices.ContainsFunc(subjects, func(s Row) bool {
			return s.Variant == row.Variant && s.Services == row.Services && s.Position == row.Position
		}) {
			subjects = append(subjects, Row{Variant: row.Variant, Services: row.Services, Position: row.Position})
		}
	}
	return subjects
}

// operationCells are the cells of the table of one operation.
func (r *Report) operationCells(operation string) (heads []string, rows [][]string) {
	heads = []string{"services", "variant", "rule", "p50 us", "to native [95 %]", "to " + r.fewestText() + " [95 %]", "CPU us", "to native"}
	growth := len(r.serviceCounts()) > 1
	if !growth {
		heads = slices.Delete(heads, 5, 6)
	}
	last := 0
	for _, s := range r.subjects() {
		p50, cpu := r.figure(s, MetricP50(operation)), r.figure(s, MetricCPU(operation))
		if p50 == nil {
			continue
		}
		cells := []string{newOnly(s.Services, &last), s.Variant, orDash(s.Position),
			p50.median(), p50.ratio(true), p50.growth(), cpu.median(), cpu.ratio(false)}
		if !growth {
			cells = slices.Delete(cells, 5, 6)
		}
		rows = append(rows, cells)
	}
	return heads, rows
}

// costCells are the cells of the table of what a variant costs beside its
// operations; native has none of it.
func (r *Report) costCells() (heads []string, rows [][]string) {
	heads = []string{"services", "variant", "rule", "load ms", "change ms", "kernel MB", "resident MB"}
	last := 0
	for _, s := range r.subjects() {
		load := r.figure(s, MetricLoad)
		if load == nil {
			continue
		}
		change, kernel, resident := r.figure(s, MetricChange), r.figure(s, MetricKernel), r.figure(s, MetricResident)
		rows = append(rows, []string{newOnly(s.Services, &last), s.Variant, orDash(s.Position),
			digits(load, load.best()), digits(change, change.middle()),
			digits(kernel, kernel.middle()/1e6), digits(resident, resident.middle()/1e6)})
	}
	return heads, rows
}

// columns prints cells so that they stand below each other.
func (p *printer) columns(heads []string, rows [][]string) {
	table := tabwriter.NewWriter(p, 0, 0, 2, ' ', 0)
	for _, cells := range append([][]string{heads}, rows...) {
		fmt.Fprintln(table, strings.Join(cells, "\t"))
	}
	_ = table.Flush() // the printer keeps the error
}

// newOnly is a number if it is another than in the line above.
func newOnly(services int, last *int) string {
	if services == *last {
		return ""
	}
	*last = services
	return strconv.Itoa(services)
}

// figure is a row of the same variant, number of Services and position.
func (r *Report) figure(of Row, metric string) *Row {
	for i := range r.Rows {
		row := &r.Rows[i]
		if row.Metric == metric && row.Variant == of.Variant && row.Services == of.Services && row.Position == of.Position {
			return row
		}
	}
	return nil
}

// fewestText is "10 Services".
func (r *Report) fewestText() string {
	counts := r.serviceCounts()
	if len(counts) == 0 {
		return "none"
	}
	return fmt.Sprintf("%d Services", slices.Min(counts))
}

func (row *Row) median() string {
	if row == nil {
		return "-"
	}
	return fmt.Sprintf("%.1f", row.Median)
}

// middle and best are the median and the smallest sample, 0 where there is none.
func (row *Row) middle() float64 {
	if row == nil {
		return 0
	}
	return row.Median
}

func (row *Row) best() float64 {
	if row == nil {
		return 0
	}
	return row.Min
}

// digits is a value of a row with three digits that count, or a dash.
func digits(row *Row, value float64) string {
	if row == nil {
		return "-"
	}
	return threeDigits(value)
}

// threeDigits writes a number so that a person can compare it with its
// neighbours: 1234, 56.7, 8.90, 0.123.
func threeDigits(value float64) string {
	switch {
	case value >= 100:
		return fmt.Sprintf("%.0f", value)
	case value >= 10:
		return fmt.Sprintf("%.1f", value)
	case value >= 1:
		return fmt.Sprintf("%.2f", value)
	}
	return fmt.Sprintf("%.3f", value)
}

// ratio is that to native, with its interval if it is asked for.
func (row *Row) ratio(interval bool) string {
	switch {
	case row == nil || row.Ratio == nil:
		return "-"
	case row.Variant == Native:
		return "1"
	case !interval:
		return fmt.Sprintf("%.2f", row.Ratio.Median)
	}
	return row.Ratio.String()
}

// growth is the ratio to the fewest Services.
func (row *Row) growth() string {
	if row == nil {
		return "-"
	}
	return row.Growth.String()
}

// String is "1.352 [1.341, 1.360]", or why there is no interval.
func (r *Ratio) String() string {
	switch {
	case r == nil:
		return "-"
	case r.Low == nil || r.High == nil:
		return fmt.Sprintf("%.3f [too few rounds]", r.Median)
	}
	return fmt.Sprintf("%.3f %s", r.Median, r.interval())
}

// sum adds up a metric over all rows and rounds.
func (r *Report) sum(metric string) float64 {
	sum := 0.0
	for _, row := range r.Rows {
		if row.Metric == metric {
			for _, sample := range row.Samples {
				sum += sample
			}
		}
	}
	return sum
}

// serviceCounts are those of the rows, in their order.
func (r *Report) serviceCounts() []int {
	var counts []int
	for _, row := range r.Rows {
		if !slices.Contains(counts, row.Services) {
			counts = append(counts, row.Services)
		}
	}
	return counts
}

func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	return keys
}

// printer writes until the first error and keeps it.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) Write(data []byte) (int, error) {
	if p.err != nil {
		return 0, p.err
	}
	var n int
	n, p.err = p.w.Write(data)
	return n, p.err
}

func (p *printer) printf(format string, args ...any) { fmt.Fprintf(p, format, args...) }
