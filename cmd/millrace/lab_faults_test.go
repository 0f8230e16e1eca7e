package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/lab/fault"
	"github.com/millrace/millrace/layer/trace/cause"
)

// Every fault that was measured is named and nothing else is; so are those drawn from
// one seed, and of the healthy runs nothing is. A run that is not right is made once more,
// and told: other tests may have kept the processors from its programs.
func TestEveryFaultIsNamed(t *testing.T) {
	needsRoot(t)
	again := map[string]*fault.Result{}
	asked := []string{}
	for _, r := range faultsOf(t, 3, "listed", "random:1", "controls", "--rounds", "20") {
		if r.State == fault.Right {
			continue
		}
		t.Logf("once more: %s", resultText(r))
		again[keyOf(r)] = r
		what := r.Name
		if r.Kind == fault.Drawn {
			what = "random:1"
		}
		if !slices.Contains(asked, what) {
			asked = append(asked, what)
		}
	}
	if len(again) > 6 {
		t.Fatalf("%d runs were not right", len(again))
	}
	if len(again) == 0 {
		return
	}
	for _, r := range faultsOf(t, 0, append(asked, "--rounds", "20")...) {
		if first := again[keyOf(r)]; first != nil {
			delete(again, keyOf(r))
			if r.State != fault.Right {
				t.Errorf("twice: %s", resultText(r))
			}
		}
	}
	for _, r := range again {
		t.Errorf("not made again: %s", resultText(r))
	}
}

// faultsOf makes runs, and logs the totals, of which there have to be so many.
func faultsOf(t *testing.T, totals int, arguments ...string) []*fault.Result {
	t.Helper()
	stdout, stderr, _ := millrace(t, append([]string{"lab", "faults", "-o", "json"}, arguments...)...)
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
	if totals > 0 && len(report.Totals) != totals {
		t.Fatalf("%d totals", len(report.Totals))
	}
	return report.Runs
}

// keyOf tells runs apart: what is drawn by its seed, the others by their names.
func keyOf(r *fault.Result) string {
	if r.Kind == fault.Drawn {
		return fmt.Sprint(r.Seed)
	}
	return r.Name
}

func resultText(r *fault.Result) string {
	return fmt.Sprintf("%s %s: %s: named %v, expected %v; missed %v, false alarms %v %s; its application saw %s",
		r.Kind, r.Name, r.State, r.Named, r.Expected, r.Missed, r.False, r.Error, r.Outcomes)
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
