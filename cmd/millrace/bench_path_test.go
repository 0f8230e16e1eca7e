package main

import (
	"encoding/json"
	"testing"

	"github.com/millrace/millrace/bench"
)

// All ways between pods carry everything, and the figures and aims are there.
func TestBenchPath(t *testing.T) {
	needsRoot(t)
	stdout, stderr, status := finish(t, product("bench", "path", "--rounds", "2", "--round-time", "30ms", "-o", "json"))
	var report bench.Report
	if err := json.Unmarshal([]byte(stdout), &report); err != nil || status != exitOK {
		t.Fatalf("exit status %d, %v:\n%s\n%s", status, err, stdout, stderr)
	}
	whole := []string{bench.Frame, bench.Request, bench.Connection, bench.Datagram, bench.Stream}
	wires, calls := append(whole, bench.WireStream), []string{bench.Request, bench.Connection}
	for variant, operations := range map[string][]string{
		bench.Routed: wires, bench.KernelVXLAN: wires, bench.MillraceDirect: wires, bench.MillraceVXLAN: wires, bench.MillraceClusterIP: calls,
		bench.SameRouted: whole, bench.SameBridge: whole, bench.SameMillrace: whole, bench.SameClusterIP: calls,
	} {
		for _, operation := range operations {
			for _, metric := range []string{bench.MetricP50(operation), bench.MetricCPU(operation), bench.MetricCount(operation)} {
				if row := report.Row(variant, 1, "", metric); row == nil || row.Max <= 0 {
					t.Errorf("%s: %s is %+v", variant, metric, row)
				}
			}
			if row := report.Row(variant, 1, "", bench.MetricErrors(operation)); row == nil || row.Max > 0 {
				t.Errorf("%s: errors of a %s: %+v", variant, operation, row)
			}
		}
	}
	if len(report.Goals) != 10 || len(report.Warnings) > 0 {
		t.Errorf("%d aims, not 10; warnings %v", len(report.Goals), report.Warnings)
	}
}
