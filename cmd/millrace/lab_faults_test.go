package main

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/millrace/millrace/lab/fault"
	"github.com/millrace/millrace/layer/trace/cause"
)

// Every fault that was measured is named and nothing else is; so are those drawn from
// one seed, and of the healthy runs nothing is.
func TestEveryFaultIsNamed(t *testing.T) {
	needsRoot(t)
	stdout, stderr, _ := millrace(t, "lab", "faults", "listed", "random:1", "controls", "--rounds", "20", "-o", "json")
	var report struct {
		Runs   []*fault.Result
		Totals []fault.Total
	}
	if err := json.Unmarshal([]byte(stdout), &report); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	for _, total := range report.Totals {
		t.Logf("%s: %d of %d right, %d with false alarms, %d not judged", total.Kind, total.Right, total.Runs, total.False, total.NotJudged)
	}
	if len(report.Totals) != 3 {
		t.Fatalf("%d totals", len(report.Totals))
	}
	for _, r := range report.Runs {
		if r.State != fault.Right {
			t.Errorf("%s %s: %s: named %v, expected %v; missed %v, false alarms %v %s; its application saw %s",
				r.Kind, r.Name, r.State, r.Named, r.Expected, r.Missed, r.False, r.Error, r.Outcomes)
		}
	}
}

// One fault is shown with what it is, what its application saw, and what trace says.
func TestOneFaultIsShown(t *testing.T) {
	needsRoot(t)
	stdout, stderr, status := millrace(t, "lab", "faults", "11")
	for _, want := range []string{"A route of type blackhole", "the application saw: timeout", cause.RouteBlackhole, "fix", "right"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is not in it, status %d:\n%s%s", want, status, stdout, stderr)
		}
	}
	entries, err := os.ReadDir("/run/netns")
	if err == nil && strings.Contains(stdout, "namespaces 3") {
		for _, e := range entries {
			if strings.Contains(stdout, e.Name()) {
				t.Errorf("namespace %s is left", e.Name())
			}
		}
	}
}

// A fault expects causes by the names that package cause gives them.
func TestCausesOfFaults(t *testing.T) {
	known := map[string]bool{}
	for _, c := range cause.All() {
		known[c.ID] = true
	}
	for _, f := range fault.All() {
		for _, c := range f.Causes {
			if !known[c] {
				t.Errorf("%s expects %s, which is no cause", f.Name, c)
			}
		}
	}
}
