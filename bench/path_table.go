package bench

import (
	"fmt"
	"io"
	"slices"
)

// WritePathTable prints a report of Path for people.
func (r *Report) WritePathTable(w io.Writer) error {
	out := &printer{w: w}
	out.printf("%s; kernel %s; %d CPUs; load average %.2f; %s\n",
		r.Header.Machine, r.Header.Kernel, r.Header.CPUs, r.Header.LoadAverage[0], r.Header.Go)
	for _, key := range sortedKeys(r.Header.Settings) {
		out.printf("  %s: %s\n", key, r.Header.Settings[key])
	}
	for _, operation := range pathOperations {
		metrics, unit := []string{MetricP50(operation), MetricCPU(operation)}, []string{"p50 us", "CPU us"}
		switch operation {
		case Frame:
			metrics, unit = metrics[:1], []string{"us"}
		case Stream, WireStream, Datagram: // waiting for each other is no time of theirs
			metrics, unit = metrics[1:], unit[1:]
		}
		out.printf("\nA %s\n", operation)
		head := []string{""}
		for _, u := range unit {
			head = append(head, u, "to routed [95 %]", "to "+KernelVXLAN+" or "+SameBridge)
		}
		out.columns(head, r.pathCells(operation, metrics))
	}
	out.printf("\nWhat is aimed at: the upper end of the interval\n")
	out.columns([]string{"", "to", "", "aim", "is [95 %]", ""}, r.pathGoalCells())
	out.printf("\nA ratio is the median of those of each round, to %s or, on one node, to %s. CPU is processor\n"+
		"time of client and server, with all that the kernel does in their name.\n", Routed, SameRouted)
	for _, warning := range r.Warnings {
		out.printf("warning: %s\n", warning)
	}
	return out.err
}

// pathCells are the lines of a table: of each metric the figure, and two ratios.
func (r *Report) pathCells(operation string, metrics []string) (cells [][]string) {
	for _, v := range pathVariants {
		if !slices.Contains(v.operations, operation) {
			continue
		}
		other := KernelVXLAN
		if v.same {
			other = SameBridge
		}
		line := []string{v.name}
		for _, metric := range metrics {
			row := r.Row(v.name, 1, "", metric)
			line = append(line, digits(row, row.middle()), r.pathRatio(v.name, v.reference(), metric), r.pathRatio(v.name, other, metric))
		}
		cells = append(cells, line)
	}
	return cells
}

// pathRatio compares two variants by a metric, "" where one of them does not have it.
func (r *Report) pathRatio(variant, to, metric string) string {
	of, reference := r.Row(variant, 1, "", metric), r.Row(to, 1, "", metric)
	if of == nil || reference == nil {
		return ""
	}
	if variant == to {
		return "1"
	}
	return ratioOf(of.Samples, reference.Samples).String()
}

func (r *Report) pathGoalCells() (cells [][]string) {
	for _, g := range r.Goals {
		met := "missed"
		if g.Met {
			met = "met"
		}
		cells = append(cells, []string{g.Variant, g.To, g.Metric, fmt.Sprintf("at most %.2f", g.Bound), g.Ratio.String(), met})
	}
	return cells
}
