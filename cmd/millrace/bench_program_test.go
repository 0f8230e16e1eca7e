package main

import (
	"encoding/json"
	"testing"

	"github.com/millrace/millrace/bench"
)

// Every shot says by the program's answer whether it measured what it says; here
// only the order of the figures is looked at that cannot be otherwise.
func TestBenchProgram(t *testing.T) {
	needsRoot(t)
	out, errs, status := millrace(t, "bench", "program", "--services", "500", "--rounds", "6", "--shots", "50", "-o", "json")
	var report bench.Report
	if err := json.Unmarshal([]byte(out), &report); err != nil || status != 0 {
		t.Fatalf("status %d, %v: %s", status, err, errs)
	}
	net := map[string]float64{}
	for _, row := range report.Rows {
		if row.Unit != "ns" || row.Services != 500 || len(row.Samples) != 6 || row.Median < 0 {
			t.Errorf("row %+v", row)
		}
		if row.Metric == bench.MetricNet {
			net[row.Variant] = row.Median
		}
	}
	if len(net) < 6 || net["empty"] != 0 || net["new"] <= net["not a Service"] || net["established"] <= 0 {
		t.Errorf("net figures %v", net)
	}
	for _, args := range [][]string{{"--services", "0"}, {"--rounds", "-1"}, {"--shots", "1000000"}} {
		if _, errs, status := millrace(t, append([]string{"bench", "program"}, args...)...); status != exitUsage {
			t.Errorf("%v: status %d, %s", args, status, errs)
		}
	}
}
