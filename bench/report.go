package bench

import (
	"fmt"
	"slices"
	"time"
)

// Report is the outcome of one benchmark, in the form all of them share.
type Report struct {
	Header Header `json:"header"`
	Rows   []Row  `json:"rows"`
	// Skipped are the variants that were asked for and not measured, and why.
	Skipped []Skipped `json:"skipped"`
	// Warnings are sentences that a reader must know before using a number.
	Warnings []string `json:"warnings"`
	// Goals are ratios that somebody has set a bound for.
	Goals []Goal `json:"goals,omitempty"`
}

// Goal is what a ratio of two variants is to be.
type Goal struct {
	Variant string `json:"variant"`
	To      string `json:"to"`
	Metric  string `json:"metric"`
	// Bound is the most that the ratio is to be; with AtLeast the least.
	Bound   float64 `json:"bound"`
	AtLeast bool    `json:"at_least"`
	Ratio   *Ratio  `json:"ratio"`
	// Met says that the median of the ratios keeps to it; of paths, the upper end of the
	// interval.
	Met bool `json:"met"`
}

// Header says where and how the rows came about.
type Header struct {
	// Benchmark is the sub-command: "services".
	Benchmark string `json:"benchmark"`
	// Command is the command line that asked for it, and Time when.
	Command string    `json:"command"`
	Time    time.Time `json:"time"`
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
	// Growth is the ratio to the same variant and position with the fewest
	// Services of this run, in the same rounds; null for that one itself, and
	// where there is none.
	Growth *Ratio `json:"growth"`
	// Samples are the figures of the rounds, in their order.
	Samples []float64 `json:"samples"`
}

// Ratio is the median of the ratios of each round.
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

// Failed says that operations of millrace went wrong: the command shall not end
// as if all were well.
func (r *Report) Failed() bool {
	return slices.ContainsFunc(r.Rows, func(row Row) bool {
		ours := row.Variant == Millrace || row.Variant == MillracePacket
		errors := row.Metric == MetricErrors(Connection) || row.Metric == MetricErrors(Request)
		return ours && errors && row.Max > 0
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

// summarize fills in what follows from the samples. native and fewest are those
// of the native variant and of the same variant with the fewest Services, in the
// same rounds; nil where there is nothing to compare with.
func summarize(row Row, samples, native, fewest []float64) Row {
	row.Samples = samples
	row.Rounds = len(samples)
	row.Median = Median(samples)
	if len(samples) > 0 {
		row.Min, row.Max = slices.Min(samples), slices.Max(samples)
	}
	row.Ratio, row.Growth = ratioOf(samples, native), ratioOf(samples, fewest)
	return row
}

// ratioOf compares round by round; nil where the lists do not match. A round in
// which the reference counted nothing has no ratio, and then the whole row has
// none.
func ratioOf(samples, reference []float64) *Ratio {
	if len(samples) == 0 || len(reference) != len(samples) {
		return nil
	}
	ratio := &Ratio{Samples: make([]float64, len(samples))}
	for i := range samples {
		if reference[i] == 0 {
			return nil
		}
		ratio.Samples[i] = samples[i] / reference[i]
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
