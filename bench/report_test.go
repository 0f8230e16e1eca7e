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
	add := func(services int, variant, position, metric, unit string, samples, reference, fewest []float64) {
		row := Row{Variant: variant, Services: services, Position: position, Metric: metric, Unit: unit}
		report.Rows = append(report.Rows, summarize(row, samples, reference, fewest))
	}
	ten := []float64{101, 110, 93, 102, 99, 104}
	for _, operation := range DefaultOperations {
		add(10, Native, "", MetricP50(operation), "us", native, native, nil)
		add(10, Millrace, "", MetricP50(operation), "us", ten, native, nil)
		add(10, Millrace, "", MetricP99(operation), "us", []float64{200, 220, 180, 200, 200, 200}, native, nil)
		add(10, Millrace, "", MetricCPU(operation), "us", []float64{120, 130, 110, 120, 120, 120}, native, nil)
		add(10, Millrace, "", MetricCount(operation), "count", []float64{100, 100, 100, 100, 100, 100}, nil, nil)
		add(10, IptablesNft, Last, MetricP50(operation), "us", []float64{140, 150, 130}, native[:3], nil)
		add(100000, Native, "", MetricP50(operation), "us", native, native, native)
		add(100000, Millrace, "", MetricP50(operation), "us", []float64{102, 110, 93, 103, 99, 104}, native, ten)
	}
	add(10, Millrace, "", MetricErrors(Connection), "count", []float64{0, 0, 1, 0, 0, 0}, nil, nil)
	add(10, Millrace, "", MetricLoad, "ms", []float64{0.9, 0.4, 0.5}, nil, nil)
	add(10, Millrace, "", MetricChange, "ms", []float64{0.02, 0.03, 0.04}, nil, nil)
	add(10, Millrace, "", MetricKernel, "bytes", []float64{2345678}, nil, nil)
	add(10, Millrace, "", MetricResident, "bytes", []float64{18765432}, nil, nil)
	add(10, IptablesNft, Last, MetricLoad, "ms", []float64{5.2, 7.5}, nil, nil)
	add(10, IptablesNft, Last, MetricChange, "ms", []float64{2461, 2462}, nil, nil)
	return report
}

func TestRatioIsTakenRoundByRound(t *testing.T) {
	row := example().Row(Millrace, 10, "", MetricP50(Connection))
	want := []float64{1.01, 1, 93.0 / 90, 1.02, 0.99, 1.04}
	if !slices.Equal(row.Ratio.Samples, want) {
		t.Errorf("ratios are %v, want %v", row.Ratio.Samples, want)
	}
	if got := row.Ratio.String(); got != "1.015 [0.990, 1.040]" {
		t.Errorf("ratio is %s, want 1.015 [0.990, 1.040]", got)
	}
	row = example().Row(Millrace, 100000, "", MetricP50(Connection))
	if want := []float64{102.0 / 101, 1, 1, 103.0 / 102, 1, 1}; !slices.Equal(row.Growth.Samples, want) {
		t.Errorf("ratios to 10 Services are %v, want %v", row.Growth.Samples, want)
	}
	row = example().Row(Millrace, 10, "", MetricP50(Connection))
	if row.Growth != nil {
		t.Errorf("10 Services compare to themselves: %+v", row.Growth)
	}
	if row.Median != 101.5 || row.Min != 93 || row.Max != 110 || row.Rounds != 6 {
		t.Errorf("row is %+v", row)
	}
}

func TestTooFewRoundsHaveNoInterval(t *testing.T) {
	ratio := example().Row(IptablesNft, 10, Last, MetricP50(Connection)).Ratio
	if ratio.Low != nil || ratio.High != nil || !strings.Contains(ratio.Note, "at least 6 rounds, this run had 3") {
		t.Errorf("3 rounds gave the ratio %+v, want no interval and the reason", ratio)
	}
}

func TestNoRatioWithoutANativeFigure(t *testing.T) {
	if row := summarize(Row{}, []float64{1, 2}, []float64{1, 0}, nil); row.Ratio != nil {
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
	for _, name := range []string{"variant", "services", "position", "metric", "unit", "median", "min", "max", "rounds", "ratio", "growth", "samples"} {
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

// One operation of millrace that went wrong is a failure; one of a peer is a
// warning.
func TestFailedOperationsOfMillraceFailTheReport(t *testing.T) {
	for variant, fails := range map[string]bool{Millrace: true, MillracePacket: true, Nftables: false} {
		for _, operation := range DefaultOperations {
			report := example()
			row := report.Row(Millrace, 10, "", MetricErrors(Connection))
			row.Variant, row.Metric = variant, MetricErrors(operation)
			if report.Failed() != fails {
				t.Errorf("a %s of %s went wrong: failed is %v", operation, variant, report.Failed())
			}
		}
	}
}

func TestTables(t *testing.T) {
	var text strings.Builder
	if err := example().WriteTable(&text); err != nil {
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
}

func TestWrongOptionsAreNamed(t *testing.T) {
	for want, o := range map[string]Options{
		"0 Services":                {Services: []int{0}},
		"-5 Services":               {Services: []int{10, -5}},
		"rounds of -1s":             {RoundTime: -time.Second},
		"1 endpoints":               {Endpoints: 1},
		"unknown position \"lost\"": {Positions: []string{"lost"}},
		"unknown variant \"ipvs\"":  {Variants: []string{"ipvs"}},
		"unknown operation \"udp\"": {Operations: []string{"udp"}},
		"-1 rounds":                 {Rounds: -1},
	} {
		if _, err := o.withDefaults(); !errors.Is(err, ErrOptions) || !strings.Contains(err.Error(), want) {
			t.Errorf("options %+v gave the error %v, want one that says %q", o, err, want)
		}
	}
}
