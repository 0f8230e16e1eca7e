package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/model"
)

// The benchmark with the real layer: it is loaded, one endpoint is changed in it
// and back while connections prove it, and every figure is there.
func TestBenchServicesOfMillrace(t *testing.T) {
	needsRoot(t)
	page := filepath.Join(t.TempDir(), "page.html")
	stdout, stderr, status := millrace(t, "bench", "services", "--services", "5,200", "--variants", "native,millrace",
		"--rounds", "2", "--round-time", "20ms", "-o", "json", "--html", page)
	var report bench.Report
	if err := json.Unmarshal([]byte(stdout), &report); err != nil || status != exitOK {
		t.Fatalf("exit status %d, %v:\n%s\n%s", status, err, stdout, stderr)
	}
	if len(report.Skipped) > 0 || len(report.Warnings) > 0 {
		t.Errorf("left out: %v; warnings: %v", report.Skipped, report.Warnings)
	}
	for _, services := range []int{5, 200} {
		for _, metric := range []string{
			bench.MetricP50(bench.Connection), bench.MetricP50(bench.Request), bench.MetricLoad, bench.MetricChange,
			bench.MetricKernel, bench.MetricResident,
		} {
			row := report.Row(bench.Millrace, services, "", metric)
			if row == nil || row.Min <= 0 {
				t.Errorf("%d Services: %s is %+v", services, metric, row)
			}
		}
	}
	if row := report.Row(bench.Millrace, 200, "", bench.MetricP50(bench.Connection)); row == nil || row.Growth == nil {
		t.Errorf("200 Services do not compare to 5: %+v", row)
	}
	drawn, err := os.ReadFile(page)
	if err != nil || !strings.Contains(string(drawn), "--html "+page) || !strings.Contains(string(drawn), "millrace, 200 Services") {
		t.Errorf("the page holds neither the command nor millrace's figures (%v):\n%.2000s", err, drawn)
	}
	alone(t, page)
}

// What the number of Services and the path may cost, as ratios of one run: a
// connection with 100,000 Services at most 1.05 of one with 10 on both paths, the
// socket path at most 1.10 of native and the packet path through the host's stack
// at most 1.20, all at the upper end of the 95 % interval.
func TestBenchBudget(t *testing.T) {
	if os.Getenv("MILLRACE_LONG") == "" {
		t.Skip("set MILLRACE_LONG=1 to run it")
	}
	needsRoot(t)
	variants := strings.Join([]string{bench.Native, bench.Millrace, bench.MillracePacket}, ",")
	stdout, stderr, status := millrace(t, "bench", "services", "--services", "10,100000", "--variants", variants,
		"--operations", "connection", "--rounds", "200", "--round-time", "20ms", "-o", "json")
	var report bench.Report
	if err := json.Unmarshal([]byte(stdout), &report); err != nil || status != exitOK {
		t.Fatalf("exit status %d, %v:\n%s\n%s", status, err, stdout, stderr)
	}
	for variant, most := range map[string]float64{bench.Millrace: 1.10, bench.MillracePacket: 1.20} {
		row := report.Row(variant, 100_000, "", bench.MetricP50(bench.Connection))
		if row == nil || row.Ratio == nil || row.Growth == nil {
			t.Fatalf("%s has no figures: %+v; left out: %v", variant, row, report.Skipped)
		}
		t.Logf("%s with 100,000 Services: %s of native, %s of itself with 10", variant, row.Ratio, row.Growth)
		if *row.Ratio.High > most {
			t.Errorf("%s: a connection is %s of native, more than %.2f", variant, row.Ratio, most)
		}
		if *row.Growth.High > 1.05 {
			t.Errorf("%s: a connection with 100,000 Services is %s of one with 10, more than 1.05", variant, row.Growth)
		}
	}
}

// A page that cannot be written is known before the measurement; a measurement
// that fails leaves no page, and one that was there.
func TestBenchPageIsWholeOrNot(t *testing.T) {
	needsRoot(t)
	_, stderr, status := millrace(t, "bench", "services", "--html", "/absent/page.html")
	if status != exitFailed || !strings.Contains(stderr, "write page: open /absent/page.html") || strings.Contains(stderr, "prepare") {
		t.Errorf("exit status %d, says %q", status, stderr)
	}
	page := filepath.Join(t.TempDir(), "page.html")
	write(t, page, "an old page")
	if _, stderr, status := millrace(t, "bench", "services", "--services", "0", "--html", page); status != exitUsage {
		t.Errorf("exit status %d, says %q", status, stderr)
	}
	if kept, err := os.ReadFile(page); string(kept) != "an old page" {
		t.Errorf("the old page is %q (%v)", kept, err)
	}
	alone(t, page)
}

// alone wants nothing beside a file in its folder.
func alone(t *testing.T, path string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("beside %s are %v (%v)", path, entries, err)
	}
}

// What the process that serves says, its parent says, with the same exit status;
// and closing ends the process.
func TestBenchServesInAProcessOfItsOwn(t *testing.T) {
	needsRoot(t)
	service := &model.Service{Name: model.Name{Namespace: "bench", Name: "a"}, Type: model.ClusterIP}
	spec := bench.AttachSpec{Cgroup: "/absent", Services: []*model.Service{service}}
	_, err := attachLayer(bench.Millrace, spec)
	var failed *failure
	if !errors.As(err, &failed) || !strings.Contains(err.Error(), "/absent") {
		t.Errorf("a cgroup that is absent: %v", err)
	}
	if _, err := attachLayer("ipvs", spec); err == nil || !strings.Contains(err.Error(), `serve variant "ipvs": no layer does that`) {
		t.Errorf("a variant that no layer serves: %v", err)
	}

	spec.Cgroup = benchGroup(t)
	attached, err := attachLayer(bench.Millrace, spec)
	if err != nil {
		t.Fatal(err)
	}
	if attached.LoadTime <= 0 || attached.KernelBytes == 0 || attached.ResidentBytes < 1<<20 {
		t.Errorf("loaded in %s, %d bytes of maps, %d resident", attached.LoadTime, attached.KernelBytes, attached.ResidentBytes)
	}
	if took, err := attached.Change(service); err != nil || took <= 0 {
		t.Errorf("a change took %s: %v", took, err)
	}
	stranger := &model.Service{Name: model.Name{Namespace: "bench", Name: "b"}}
	if _, err := attached.Change(stranger); err == nil || !strings.Contains(err.Error(), "change Service bench/b: it is not served") {
		t.Errorf("a change of what is not there: %v", err)
	}
	if err := attached.Close(); err != nil {
		t.Error(err)
	}
	if _, err := attached.Change(service); err == nil || !strings.Contains(err.Error(), "the process that serves ended") {
		t.Errorf("a change after the end: %v", err)
	}
}

// The process that serves does not outlive what feeds it, and takes no nonsense.
func TestBenchServeEndsWithItsInput(t *testing.T) {
	c := exec.Command(product().Path, "bench", "serve")
	c.Stdin = strings.NewReader("nonsense")
	if _, stderr, status := finish(t, c); status != exitFailed || !strings.Contains(stderr, "read what to serve") {
		t.Errorf("exit status %d, says %q", status, stderr)
	}
}

// benchGroup is a cgroup of this test.
func benchGroup(t *testing.T) string {
	t.Helper()
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	group := filepath.Join(root, fmt.Sprintf("millrace-test-bench-%d", os.Getpid()))
	if err := cgroup.Create(group); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cgroup.Remove(group); err != nil {
			t.Error(err)
		}
	})
	return group
}
