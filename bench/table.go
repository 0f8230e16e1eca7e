package bench

import (
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"text/tabwriter"
)

// footnote says what the columns mean.
const footnote = `To native: the median of the ratios to native in the same round.
Rule: where the tested Service stands among the rules of a variant that searches
them in order. last is the worst case for it; kube-proxy's own order is random.
Load: best of few, from nothing to every Service answering. millrace: loading and
attaching its programs, planning and filling its maps. iptables, nftables: the
whole run of iptables-restore or nft; what kube-proxy does before is not in it.
`

// WriteTable prints the report for people: a header, one line a variant for
// each number of Services, and what a reader must know beside it.
func (r *Report) WriteTable(w io.Writer) error {
	out := &printer{w: w}
	out.printf("%s; kernel %s; %d CPUs; load average %.2f; %s\n",
		r.Header.Machine, r.Header.Kernel, r.Header.CPUs, r.Header.LoadAverage[0], r.Header.Go)
	for _, key := range sortedKeys(r.Header.Settings) {
		out.printf("  %s: %s\n", key, r.Header.Settings[key])
	}
	for _, services := range r.serviceCounts() {
		out.printf("\n%d Services\n", services)
		r.writeVariants(out, services)
	}
	out.printf("\n%s", footnote)
	out.printf("%.0f connections, %.0f went wrong.\n", r.sum(MetricConnections), r.sum(MetricErrors))
	for _, skipped := range r.Skipped {
		out.printf("%s\n", skipped)
	}
	for _, warning := range r.Warnings {
		out.printf("warning: %s\n", warning)
	}
	return out.err
}

func (r *Report) writeVariants(out *printer, services int) {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "variant\trule\tp50 us\tto native [95 % interval]\tp99 us\tto native\tCPU us\tto native\tload ms")
	for _, row := range r.Rows {
		if row.Services != services || row.Metric != MetricP50 {
			continue
		}
		figure := func(metric string) *Row { return r.Row(row.Variant, services, row.Position, metric) }
		p99, cpu := figure(MetricP99), figure(MetricCPU)
		fmt.Fprintln(table, strings.Join([]string{
			row.Variant, orDash(row.Position),
			row.median(), row.ratio(true),
			p99.median(), p99.ratio(false),
			cpu.median(), cpu.ratio(false),
			figure(MetricLoad).best(),
		}, "\t"))
	}
	_ = table.Flush() // the printer keeps the error
}

func (row *Row) median() string {
	if row == nil {
		return "-"
	}
	return fmt.Sprintf("%.1f", row.Median)
}

func (row *Row) best() string {
	if row == nil {
		return "-"
	}
	return fmt.Sprintf("%.1f", row.Min)
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

// String is "1.352 [1.341, 1.360]", or why there is no interval.
func (r *Ratio) String() string {
	switch {
	case r == nil:
		return "-"
	case r.Low == nil || r.High == nil:
		return fmt.Sprintf("%.3f [too few rounds]", r.Median)
	}
	return fmt.Sprintf("%.3f [%.3f, %.3f]", r.Median, *r.Low, *r.High)
}

// WriteRounds prints, for the ratio of each variant's connection p50 to native,
// what it was in every round.
func (r *Report) WriteRounds(w io.Writer) error {
	out := &printer{w: w}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "variant\tservices\trule\tp50 to native, round by round")
	for _, row := range r.Rows {
		if row.Metric != MetricP50 || row.Ratio == nil || row.Variant == Native {
			continue
		}
		rounds := make([]string, len(row.Ratio.Samples))
		for i, ratio := range row.Ratio.Samples {
			rounds[i] = fmt.Sprintf("%.3f", ratio)
		}
		fmt.Fprintf(table, "%s\t%d\t%s\t%s\n", row.Variant, row.Services, orDash(row.Position), strings.Join(rounds, " "))
	}
	_ = table.Flush() // the printer keeps the error
	return out.err
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
