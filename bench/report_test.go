package bench

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

// example is a report with a bit of everything.
func example() *Report {
	report := &Report{
		Header: Header{
			Benchmark: "services", Machine: "a machine, 2.0 GiB", Kernel: "6.1.0", CPUs: 2,
			LoadAverage: [3]float64{0.5, 0.4, 0.3}, Go: "go1.26", Settings: map[string]string{"rounds": "6 of 100ms", "endpoints": "2 a Service"},
		},
		Skipped:  []Skipped{{Variant: Nftables, Services: 10, Reason: "nft is not installed: apt-get install nftables"}},
		Warnings: []string{"millrace, 10 Services: 1 of 601 connections went wrong"},
	}
	native := []float64{100, 110, 90, 100, 100, 100}
	add := func(variant, position, metric, unit string, samples, reference []float64) {
		row := Row{Variant: variant, Services: 10, Position: position, Metric: metric, Unit: unit}
		report.Rows = append(report.Rows, summarize(row, samples, reference))
	}
	add(Native, "", MetricP50, "us", native, native)
	add(Millrace, "", MetricP50, "us", []float64{101, 110, 93, 102, 99, 104}, native)
	add(Millrace, "", MetricP99, "us", []float64{200, 220, 180, 200, 200, 200}, native)
	add(Millrace, "", MetricConnections, "count", []float64{100, 100, 100, 100, 100, 100}, nil)
	add(Millrace, "", MetricErrors, "count", []float64{0, 0, 1, 0, 0, 0}, nil)
	add(Millrace, "", MetricLoad, "ms", []float64{0.9, 0.4, 0.5}, nil)
	add(IptablesNft, Last, MetricP50, "us", []float64{140, 150, 130}, native[:3])
	return report
}

func TestRatioIsTakenRoundByRound(t *testing.T) {
	row := example().Row(Millrace, 10, "", MetricP50)
	want := []float64{1.01, 1, 93.0 / 90, 1.02, 0.99, 1.04}
	if !slices.Equal(row.Ratio.Samples, want) {
		t.Errorf("ratios are %v, want %v", row.Ratio.Samples, want)
	}
	if got := row.Ratio.String(); got != "1.015 [0.990, 1.040]" {
		t.Errorf("ratio is %s, want 1.015 [0.990, 1.040]", got)
	}
	if row.Median != 101.5 || row.Min != 93 || row.Max != 110 || row.Rounds != 6 {
		t.Errorf("row is %+v", row)
	}
}

func TestTooFewRoundsHaveNoInterval(t *testing.T) {
	ratio := example().Row(IptablesNft, 10, Last, MetricP50).Ratio
	if ratio.Low != nil || ratio.High != nil || !strings.Contains(ratio.Note, "at least 6 rounds, this run had 3") {
		t.Errorf("3 rounds gave the ratio %+v, want no interval and the reason", ratio)
	}
}

func TestNoRatioWithoutANativeFigure(t *testing.T) {
	if row := summarize(Row{}, []float64{1, 2}, []float64{1, 0}); row.Ratio != nil {
		t.Errorf("a round in which native counted nothing gave the ratio %+v", row.Ratio)
	}
	if row := example().Row(Millrace, 10, "", MetricLoad); row.Ratio != nil || row.Rounds != 3 {
		t.Errorf("the load time has the ratio %+v of %d rounds", row.Ratio, row.Rounds)
	}
}

// The names that all benchmarks share and that programs read.
func TestReportInJSON(t *testing.T) {
	data, err := json.Marshal(example())
	if err != nil {
		t.Fatal(err)
	}
	var report struct {
		Header map[string]any
		Rows   []map[string]any
	}
	if err := json.Unmarshal(data, &report); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"variant", "services", "position", "metric", "unit", "median", "min", "max", "rounds", "ratio", "samples"} {
		for _, row := range report.Rows {
			if _, ok := row[name]; !ok {
				t.Errorf("the row %v has no %s", row, name)
			}
		}
	}
	for _, name := range []string{"machine", "kernel", "cpus", "load_average", "go", "settings"} {
		if _, ok := report.Header[name]; !ok {
			t.Errorf("the header has no %s", name)
		}
	}
	ratio := report.Rows[1]["ratio"].(map[string]any)
	if ratio["median"] == nil || ratio["low"] == nil || ratio["high"] == nil {
		t.Errorf("the ratio is %v", ratio)
	}
}

// One connection of millrace that went wrong is a failure; one of a peer is a
// warning.
func TestFailedConnectionsOfMillraceFailTheReport(t *testing.T) {
	report := example()
	if !report.Failed() {
		t.Error("a connection of millrace went wrong, and the report has not failed")
	}
	report.Row(Millrace, 10, "", MetricErrors).Variant = Nftables
	if report.Failed() {
		t.Error("a connection of nftables went wrong, and the report has failed")
	}
}

func TestTables(t *testing.T) {
	var text strings.Builder
	if err := example().WriteTable(&text); err != nil {
		t.Fatal(err)
	}
	text.WriteString("\n")
	if err := example().WriteRounds(&text); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.txt", text.String())
}

type fullDisk struct{}

var errFull = errors.New("no space left")

func (fullDisk) Write([]byte) (int, error) { return 0, errFull }

func TestTablesSayThatTheyCouldNotBeWritten(t *testing.T) {
	if err := example().WriteTable(fullDisk{}); !errors.Is(err, errFull) {
		t.Errorf("WriteTable onto a full disk returned %v", err)
	}
	if err := example().WriteRounds(fullDisk{}); !errors.Is(err, errFull) {
		t.Errorf("WriteRounds onto a full disk returned %v", err)
	}
}

func TestWrongOptionsAreNamed(t *testing.T) {
	for want, o := range map[string]Options{
		"0 Services":                {Services: []int{0}},
		"-5 Services":               {Services: []int{10, -5}},
		"rounds of -1s":             {RoundTime: -time.Second},
		"1 endpoints":               {Endpoints: 1},
		"unknown position \"lost\"": {Positions: []string{"lost"}},
		"unknown variant \"ipvs\"":  {Variants: []string{"ipvs"}},
		"-1 rounds":                 {Rounds: -1},
	} {
		if _, err := o.withDefaults(); !errors.Is(err, ErrOptions) || !strings.Contains(err.Error(), want) {
			t.Errorf("options %+v gave the error %v, want one that says %q", o, err, want)
		}
	}
}
