package main

import (
	"encoding/json"
	"testing"

	"github.com/millrace/millrace/bench"
)

// All ways between two nodes carry everything, and the figures and aims are there.
func TestBenchPath(t *testing.T) {
	needsRoot(t)
	stdout, stderr, status := finish(t, product("bench", "path", "--rounds", "2", "--round-time", "30ms", "-o", "json"))
	var report bench.Report
	if err := json.Unmarshal([]byte(stdout), &report); err != nil || status != exitOK {
		t.Fatalf("exit status %d, %v:\n%s\n%s", status, err, stdout, stderr)
	}
	for _, variant := range []string{bench.Routed, bench.KernelVXLAN, bench.MillraceVXLAN, bench.MillracePeer} {
		for _, operation := range []string{bench.Connection, bench.Request, bench.Datagram} {
			for _, metric := range []string{bench.MetricP50(operation), bench.MetricCPU(operation), bench.MetricCount(operation)} {
				if row := report.Row(variant, 1, "", metric); row == nil || row.Min <= 0 {
					t.Errorf("%s: %s is %+v", variant, metric, row)
				}
			}
			if row := report.Row(variant, 1, "", bench.MetricErrors(operation)); row == nil || row.Max > 0 {
				t.Errorf("%s: errors of a %s: %+v", variant, operation, row)
			}
		}
	}
	if len(report.Goals) != 6 || len(report.Warnings) > 0 {
		t.Errorf("%d aims, not 6; warnings %v", len(report.Goals), report.Warnings)
	}
}
