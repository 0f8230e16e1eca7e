package bench

import (
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"text/tabwriter"
)

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
	out.printf("\nTimes of one connection: connect, request, answer, close. In brackets: the median of the\nratios to native in the same round, and its 95 %% interval. Load: best of few.\n")
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
	fmt.Fprintln(table, "variant\trule\tp50 us\tto native\tp99 us\tto native\tCPU us\tto native\tload ms")
	for _, row := range r.Rows {
		if row.Services != services || row.Metric != MetricP50 {
			continue
		}
		cells := []string{row.Variant, orDash(row.Position)}
		for _, metric := range []string{MetricP50, MetricP99, MetricCPU} {
			cells = append(cells, r.Row(row.Variant, services, row.Position, metric).cells()...)
		}
		load := "-"
		if found := r.Row(row.Variant, services, row.Position, MetricLoad); found != nil {
			load = fmt.Sprintf("%.1f", found.Min)
		}
		fmt.Fprintln(table, strings.Join(append(cells, load), "\t"))
	}
	_ = table.Flush() // the printer keeps the error
}

// cells are a figure and its ratio to native.
func (row *Row) cells() []string {
	if row == nil {
		return []string{"-", "-"}
	}
	return []string{fmt.Sprintf("%.1f", row.Median), row.Ratio.String()}
}

// String is "1.352 [1.341, 1.360]", without brackets where there is no interval.
func (r *Ratio) String() string {
	switch {
	case r == nil:
		return "-"
	case r.Low == nil || r.High == nil:
		return fmt.Sprintf("%.3f", r.Median)
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
