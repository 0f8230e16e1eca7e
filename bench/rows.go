package bench

import (
	"fmt"
	"slices"
	"time"
)

// summarize turns what the rounds brought into rows.
func (s *session) summarize() {
	for _, services := range s.Services {
		group := s.cellsOf(services)
		for _, c := range group {
			s.summarizeCell(c, group[0]) // native was prepared first
		}
	}
}

func (s *session) summarizeCell(c, native *cell) {
	row := Row{Variant: c.variant, Services: c.services, Position: c.position}
	for _, operation := range s.Operations {
		for _, figure := range figures {
			row.Metric, row.Unit = figure.metric(operation), figure.unit
			var reference, fewest []float64
			if figure.compared {
				reference, fewest = native.samples(operation, figure.of), s.fewest(c).samples(operation, figure.of)
			}
			s.report.Rows = append(s.report.Rows, summarize(row, c.samples(operation, figure.of), reference, fewest))
		}
		s.warn(c, operation)
	}
	s.addOthers(row, MetricLoad, "ms", milliseconds(c.loaded.times))
	s.addOthers(row, MetricChange, "ms", milliseconds(c.changes))
	s.addOthers(row, MetricKernel, "bytes", known(c.loaded.kernelBytes))
	s.addOthers(row, MetricResident, "bytes", known(c.loaded.residentBytes))
}

// addOthers adds a row that compares with nothing, if there are samples.
func (s *session) addOthers(row Row, metric, unit string, samples []float64) {
	if len(samples) > 0 {
		row.Metric, row.Unit = metric, unit
		s.report.Rows = append(s.report.Rows, summarize(row, samples, nil, nil))
	}
}

func milliseconds(times []time.Duration) (samples []float64) {
	for _, t := range times {
		samples = append(samples, t.Seconds()*1e3)
	}
	return samples
}

// known is a figure that is 0 where nobody knows it.
func known(bytes uint64) []float64 {
	if bytes == 0 {
		return nil
	}
	return []float64{float64(bytes)}
}

// fewest is the cell of the same variant with the fewest Services, nil if c is
// that one or it was left out.
func (s *session) fewest(c *cell) *cell {
	fewest := slices.Min(s.Services)
	i := slices.IndexFunc(s.cells, func(o *cell) bool {
		return o.services == fewest && o.variant == c.variant && o.position == c.position
	})
	if i < 0 || s.cells[i] == c {
		return nil
	}
	return s.cells[i]
}

func (c *cell) samples(operation string, of func(outcome) float64) []float64 {
	if c == nil {
		return nil
	}
	samples := make([]float64, len(c.outcomes[operation]))
	for i, o := range c.outcomes[operation] {
		samples[i] = of(o)
	}
	return samples
}

// warn says in a sentence that operations of a cell went wrong.
func (s *session) warn(c *cell, operation string) {
	wrong, made, first := 0, 0, ""
	for _, o := range c.outcomes[operation] {
		made += o.Count + o.Errors
		wrong += o.Errors
		if first == "" {
			first = o.FirstError
		}
	}
	if wrong > 0 {
		s.report.Warnings = append(s.report.Warnings, fmt.Sprintf(
			"%s: %d of %d %ss went wrong, the first with %q: do not use its figures", c, wrong, made, operation, first))
	}
}
