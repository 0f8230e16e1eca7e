package bench

import (
	"fmt"
	"slices"
)

// Report is the outcome of one benchmark, in the form all of them share.
type Report struct {
	Header Header `json:"header"`
	Rows   []Row  `json:"rows"`
	// Skipped are the variants that were asked for and not measured, and why.
	Skipped []Skipped `json:"skipped"`
	// Warnings are sentences that a reader must know before using a number.
	Warnings []string `json:"warnings"`
}

// Header says where and how the rows came about.
type Header struct {
	// Benchmark is the sub-command: "services".
	Benchmark string `json:"benchmark"`
	// Machine is the processor and the memory.
	Machine string `json:"machine"`
	// Kernel is the kernel's release, as `uname -r` prints it.
	Kernel string `json:"kernel"`
	CPUs   int    `json:"cpus"`
	// LoadAverage is that of the last 1, 5 and 15 minutes, before the start.
	LoadAverage [3]float64 `json:"load_average"`
	// Go is the version of Go that built this program.
	Go string `json:"go"`
	// Settings are the benchmark's own, in its words: "rounds", "time per round".
	Settings map[string]string `json:"settings"`
}

// The metrics of the connection benchmark.
const (
	MetricP50         = "connection p50"
	MetricP99         = "connection p99"
	MetricCPU         = "cpu per connection"
	MetricConnections = "connections"
	MetricErrors      = "connection errors"
	MetricLoad        = "load time"
	MetricMaps        = "map memory"
)

// Row is one metric of one variant.
type Row struct {
	Variant string `json:"variant"`
	// Services is how many Services were loaded; for native, beside how many.
	Services int `json:"services"`
	// Position of the tested Service among the rules (first, middle, last);
	// empty where rules are not searched in order.
	Position string `json:"position"`
	Metric   string `json:"metric"`
	// Unit is us, ms, bytes or count.
	Unit   string  `json:"unit"`
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	// Rounds is the number of samples: rounds, or loads for the load time.
	Rounds int `json:"rounds"`
	// Ratio is that to native in the same rounds; null where native has no
	// such figure.
	Ratio *Ratio `json:"ratio"`
	// Samples are the figures of the rounds, in their order.
	Samples []float64 `json:"samples"`
}

// Ratio is the median of the ratios to native of each round.
type Ratio struct {
	Median float64 `json:"median"`
	// Low and High bound the 95 % interval of MedianInterval; null with Note
	// saying why where there are too few rounds.
	Low  *float64 `json:"low"`
	High *float64 `json:"high"`
	Note string   `json:"note,omitempty"`
	// Samples are the ratios of the rounds, in their order.
	Samples []float64 `json:"samples"`
}

// Skipped is a variant that was left out.
type Skipped struct {
	Variant string `json:"variant"`
	// Services is 0 where the variant was left out for every number of them.
	Services int    `json:"services"`
	Position string `json:"position"`
	// Reason is a sentence: the cause, and what would bring the variant in.
	Reason string `json:"reason"`
}

// String is the sentence that names the variant and the reason.
func (s Skipped) String() string {
	name := s.Variant
	if s.Services > 0 {
		name += fmt.Sprintf(" with %d Services", s.Services)
	}
	if s.Position != "" {
		name += " (" + s.Position + ")"
	}
	return name + " left out: " + s.Reason
}

// Failed says that connections of millrace went wrong: the command shall not end
// as if all were well.
func (r *Report) Failed() bool {
	return slices.ContainsFunc(r.Rows, func(row Row) bool {
		return row.Variant == Millrace && row.Metric == MetricErrors && row.Max > 0
	})
}

// Row finds a row, nil if there is none. An empty position finds any.
func (r *Report) Row(variant string, services int, position, metric string) *Row {
	for i := range r.Rows {
		row := &r.Rows[i]
		if row.Variant == variant && row.Services == services && row.Metric == metric &&
			(position == "" || row.Position == position) {
			return row
		}
	}
	return nil
}

// summarize fills in what follows from the samples. native are those of the
// native variant in the same rounds, nil where there are none to compare with.
func summarize(row Row, samples, native []float64) Row {
	row.Samples = samples
	row.Rounds = len(samples)
	row.Median = Median(samples)
	if len(samples) > 0 {
		row.Min, row.Max = slices.Min(samples), slices.Max(samples)
	}
	if len(native) == len(samples) && len(native) > 0 {
		row.Ratio = ratioOf(samples, native)
	}
	return row
}

// ratioOf compares round by round. A round in which native counted nothing has
// no ratio, and then the whole row has none: the lists would not match.
func ratioOf(samples, native []float64) *Ratio {
	ratio := &Ratio{Samples: make([]float64, len(samples))}
	for i := range samples {
		if native[i] == 0 {
			return nil
		}
		ratio.Samples[i] = samples[i] / native[i]
	}
	ratio.Median = Median(ratio.Samples)
	low, high, ok := MedianInterval(ratio.Samples)
	if !ok {
		ratio.Note = fmt.Sprintf("no 95 %% interval: it needs at least %d rounds, this run had %d", minRounds, len(samples))
		return ratio
	}
	ratio.Low, ratio.High = &low, &high
	return ratio
}
