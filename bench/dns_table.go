package bench

import (
	"fmt"
	"io"
)

// dnsGoals are those of this run: for what was measured. A lookup is that of glibc, or
// where no compiler was there that of the client which sends the same.
func (r *Report) dnsGoals() (goals []Goal) {
	lookup := Glibc
	if r.Row(Millrace, 0, "", MetricP50(Glibc)) == nil {
		lookup = Pairs
	}
	for _, g := range []Goal{
		{Variant: Millrace, To: CoreDNS, Metric: MetricP50(lookup), Bound: 1. / 50},
		{Variant: Millrace, To: CoreDNS, Metric: MetricCPU(lookup), Bound: 1. / 40},
		{Variant: Millrace, To: Unbound, Metric: MetricP50(lookup), Bound: 1. / 15},
		{Variant: Millrace, To: Unbound, Metric: MetricCPU(lookup), Bound: 1. / 20},
		{Variant: MillraceList, To: CoreDNS, Metric: MetricP50(lookup), Bound: 1. / 15},
		{Variant: MillraceList, To: CoreDNS, Metric: MetricCPU(lookup), Bound: 1. / 15},
		{Variant: Millrace, To: Unbound, Metric: MetricP50(Query), Bound: 1. / 4},
		{Variant: Millrace, To: Unbound, Metric: MetricRate(Flood), Bound: 3.5, AtLeast: true},
	} {
		of, to := r.Row(g.Variant, 0, "", g.Metric), r.Row(g.To, 0, "", g.Metric)
		if of == nil || to == nil {
			continue
		}
		if g.Ratio = ratioOf(of.Samples, to.Samples); g.Ratio == nil {
			continue
		}
		g.Met = g.Ratio.Median <= g.Bound
		if g.AtLeast {
			g.Met = g.Ratio.Median >= g.Bound
		}
		goals = append(goals, g)
	}
	return goals
}

// dnsTitles are those of the tables.
var dnsTitles = map[string]string{
	Query: "One query in flight: the address of a Service",
	Flood: "As many as can be on two processors, client included",
	Pairs: "A lookup of " + dnsOutside + ", ndots:5, sent as glibc sends it",
	Glibc: "The same lookup: glibc's getaddrinfo",
	Musl:  "The same lookup: musl's getaddrinfo",
	Go:    "The same lookup: Go's resolver",
}

// WriteDNSTable prints a report of DNS for people.
func (r *Report) WriteDNSTable(w io.Writer) error {
	out := &printer{w: w}
	out.printf("%s; kernel %s; %d CPUs; load average %.2f; %s\n",
		r.Header.Machine, r.Header.Kernel, r.Header.CPUs, r.Header.LoadAverage[0], r.Header.Go)
	for _, key := range sortedKeys(r.Header.Settings) {
		out.printf("  %s: %s\n", key, r.Header.Settings[key])
	}
	var variants []string
	for _, s := range r.subjects() {
		variants = append(variants, s.Variant)
	}
	for _, operation := range dnsOperations {
		if r.Row(Millrace, 0, "", MetricCPU(operation)) == nil {
			continue
		}
		heads := []string{"", "p50 us", "p99 us", "CPU us", "client", "servers", "queries", "p50 to " + CoreDNS + " [95 %]", "to " + Unbound + " [95 %]"}
		first := []string{MetricP50(operation), MetricP99(operation)}
		if operation == Flood {
			heads = append([]string{"", "a second"}, heads[3:]...)
			heads[6] = "to " + CoreDNS + " [95 %]"
			first = []string{MetricRate(operation)}
		}
		var cells [][]string
		for _, variant := range variants {
			line := []string{variant}
			for _, metric := range append(first, MetricCPU(operation), MetricClient(operation), MetricServer(operation), MetricQueries(operation)) {
				row := r.Row(variant, 0, "", metric)
				line = append(line, digits(row, row.middle()))
			}
			cells = append(cells, append(line, r.dnsRatio(variant, CoreDNS, first[0]), r.dnsRatio(variant, Unbound, first[0])))
		}
		out.printf("\n%s\n", dnsTitles[operation])
		out.columns(heads, cells)
	}
	if len(r.Goals) > 0 {
		out.printf("\nWhat is aimed at\n")
		out.columns([]string{"", "to", "", "aim", "is [95 %]", ""}, r.goalCells())
	}
	out.printf("\nA ratio is the median of those of each round. CPU is processor time of client and\nservers, with all that the kernel does for them. All answers come from a cache, or from\nthe kernel. The client of a flood has %d sockets a thread; of four forms of it, with one\nthread or two and few or many queries in flight, the fastest counts for each.\n", floodSockets)
	for _, skipped := range r.Skipped {
		out.printf("%s\n", skipped)
	}
	for _, warning := range r.Warnings {
		out.printf("warning: %s\n", warning)
	}
	return out.err
}

func (r *Report) dnsRatio(variant, to, metric string) string {
	of, reference := r.Row(variant, 0, "", metric), r.Row(to, 0, "", metric)
	switch {
	case of == nil || reference == nil:
		return "-"
	case variant == to:
		return "1"
	}
	return shortRatio(ratioOf(of.Samples, reference.Samples))
}

// shortRatio writes ratios below one so that they can be compared with 1/50.
func shortRatio(r *Ratio) string {
	text := func(value float64) string {
		if value > 0 && value < 0.995 {
			return "1/" + threeDigits(1/value)
		}
		return threeDigits(value)
	}
	switch {
	case r == nil:
		return "-"
	case r.Low == nil || r.High == nil:
		return text(r.Median) + " [too few rounds]"
	}
	return fmt.Sprintf("%s [%s, %s]", text(r.Median), text(*r.Low), text(*r.High))
}

func (r *Report) goalCells() (cells [][]string) {
	for _, g := range r.Goals {
		aim, met := fmt.Sprintf("at most 1/%.0f", 1/g.Bound), "missed"
		if g.AtLeast {
			aim = fmt.Sprintf("at least %.1f", g.Bound)
		}
		if g.Met {
			met = "met"
		}
		cells = append(cells, []string{g.Variant, g.To, g.Metric, aim, shortRatio(g.Ratio), met})
	}
	return cells
}

// DNSFailed says that lookups through millrace went wrong.
func (r *Report) DNSFailed() bool {
	for _, variant := range []string{Millrace, MillraceList} {
		for _, operation := range dnsOperations {
			if row := r.Row(variant, 0, "", MetricErrors(operation)); row != nil && row.Max > 0 {
				return true
			}
		}
	}
	return false
}
