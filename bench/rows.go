package bench

import "fmt"

// figures are the metrics of a turn: name, unit, value, and whether a ratio to
// native means anything.
var figures = []struct {
	metric, unit string
	compared     bool
	of           func(outcome) float64
}{
	{MetricP50, "us", true, func(o outcome) float64 { return float64(o.P50) / 1e3 }},
	{MetricP99, "us", true, func(o outcome) float64 { return float64(o.P99) / 1e3 }},
	{MetricCPU, "us", true, func(o outcome) float64 { return float64(o.CPU) / 1e3 / float64(max(o.Connections, 1)) }},
	{MetricConnections, "count", false, func(o outcome) float64 { return float64(o.Connections) }},
	{MetricErrors, "count", false, func(o outcome) float64 { return float64(o.Errors) }},
}

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
	for _, figure := range figures {
		row.Metric, row.Unit = figure.metric, figure.unit
		var reference []float64
		if figure.compared {
			reference = native.samples(figure.of)
		}
		s.report.Rows = append(s.report.Rows, summarize(row, c.samples(figure.of), reference))
	}
	if len(c.loaded.times) > 0 {
		times := make([]float64, len(c.loaded.times))
		for i, t := range c.loaded.times {
			times[i] = t.Seconds() * 1e3
		}
		row.Metric, row.Unit = MetricLoad, "ms"
		s.report.Rows = append(s.report.Rows, summarize(row, times, nil))
	}
	if c.loaded.mapBytes > 0 {
		row.Metric, row.Unit = MetricMaps, "bytes"
		s.report.Rows = append(s.report.Rows, summarize(row, []float64{float64(c.loaded.mapBytes)}, nil))
	}
	s.warn(c)
}

func (c *cell) samples(of func(outcome) float64) []float64 {
	samples := make([]float64, len(c.outcomes))
	for i, o := range c.outcomes {
		samples[i] = of(o)
	}
	return samples
}

// warn says in a sentence that connections of a cell went wrong.
func (s *session) warn(c *cell) {
	wrong, made, first := 0, 0, ""
	for _, o := range c.outcomes {
		made += o.Connections + o.Errors
		wrong += o.Errors
		if first == "" {
			first = o.FirstError
		}
	}
	if wrong > 0 {
		s.report.Warnings = append(s.report.Warnings, fmt.Sprintf(
			"%s: %d of %d connections went wrong, the first with %q: do not use its figures", c, wrong, made, first))
	}
}
