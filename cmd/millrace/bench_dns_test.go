package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/kernel/cgroup"
)

// benchDNS is the command without Go, so that it builds no CoreDNS, and with a cache folder
// of its own.
func benchDNS(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	needsRoot(t)
	if _, err := exec.LookPath("unbound"); err != nil {
		t.Skip("needs unbound: apt-get install unbound")
	}
	c := product(append([]string{"bench", "dns"}, args...)...)
	c.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "XDG_CACHE_HOME="+t.TempDir())
	return c
}

// The layer beside unbound: everything is answered, and the figures are there.
func TestBenchDNS(t *testing.T) {
	stdout, stderr, status := finish(t, benchDNS(t, "--rounds", "2", "--round-time", "60ms", "-o", "json"))
	var report bench.Report
	if err := json.Unmarshal([]byte(stdout), &report); err != nil || status != exitOK {
		t.Fatalf("exit status %d, %v:\n%s\n%s", status, err, stdout, stderr)
	}
	if !strings.Contains(fmt.Sprint(report.Skipped), "coredns left out: go is missing") {
		t.Errorf("left out are %v", report.Skipped)
	}
	queries := map[string]map[string]float64{
		bench.Millrace:     {bench.Query: 1, bench.Pairs: 2, bench.Go: 2},
		bench.MillraceList: {bench.Query: 1, bench.Pairs: 8, bench.Go: 8},
		bench.Unbound:      {bench.Query: 1, bench.Pairs: 8, bench.Go: 8},
	}
	for compiler, library := range map[string]string{"cc": bench.Glibc, "musl-gcc": bench.Musl} {
		if _, err := exec.LookPath(compiler); err == nil {
			for _, of := range queries {
				of[library] = of[bench.Go]
			}
		}
	}
	for variant, of := range queries {
		for operation, want := range of {
			row := report.Row(variant, 0, "", bench.MetricQueries(operation))
			if row == nil || row.Min != want || row.Max != want {
				t.Errorf("%s: %s has %+v queries, not %.0f", variant, operation, row, want)
			}
			for _, metric := range []string{bench.MetricP50(operation), bench.MetricClient(operation)} {
				if row := report.Row(variant, 0, "", metric); row == nil || row.Min <= 0 {
					t.Errorf("%s: %s is %+v", variant, metric, row)
				}
			}
		}
		if row := report.Row(variant, 0, "", bench.MetricRate(bench.Flood)); row == nil || row.Min <= 0 {
			t.Errorf("%s: the rate of a flood is %+v", variant, row)
		}
	}
	// A name costs millrace's servers nothing, and unbound is asked.
	for _, operation := range []string{bench.Query, bench.Pairs} {
		ours, theirs := report.Row(bench.Millrace, 0, "", bench.MetricServer(operation)), report.Row(bench.Unbound, 0, "", bench.MetricServer(operation))
		if ours == nil || theirs == nil || ours.Median >= theirs.Median {
			t.Errorf("%s: servers' time: %+v and %+v", operation, ours, theirs)
		}
	}
	if len(report.Goals) == 0 {
		t.Error("no goals")
	}
}

// What is killed leaves no process, and the next run takes the rest away.
func TestBenchDNSKilled(t *testing.T) {
	c := benchDNS(t, "--rounds", "1000")
	said, err := c.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(said)
	for lines.Scan() && !strings.Contains(lines.Text(), "round 1 of") {
		t.Log(lines.Text())
	}
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	group := filepath.Join(root, fmt.Sprintf("millrace-bench-%d", c.Process.Pid), "dns")
	if pids, err := cgroup.Processes(group); err != nil || len(pids) < 4 {
		t.Errorf("at work are %v, %v", pids, err)
	}
	_ = c.Process.Kill()
	_ = c.Wait()
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		pids, err := cgroup.Processes(group)
		if err == nil && len(pids) == 0 {
			break
		}
		if time.Since(begun) > 10*time.Second {
			t.Fatalf("10 s after it was killed %v are there, %v", pids, err)
		}
	}
	if _, stderr, status := finish(t, benchDNS(t, "--rounds", "1", "--round-time", "6ms")); status != exitOK {
		t.Errorf("the next run ends with %d: %s", status, stderr)
	}
	for _, path := range []string{group, fmt.Sprintf("/run/millrace/bench/%d", c.Process.Pid)} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is there: %v", path, err)
		}
	}
}

func TestBenchDNSUsage(t *testing.T) {
	for _, args := range [][]string{{"--rounds", "-1"}, {"--round-time", "2h"}, {"a", "b"}} {
		if _, stderr, status := millrace(t, append([]string{"bench", "dns"}, args...)...); status != exitUsage {
			t.Errorf("%v: exit status %d, %s", args, status, stderr)
		}
	}
	needsRoot(t)
	if _, stderr, status := millrace(t, "bench", "dns", "/absent/coredns"); status != exitUsage || !strings.Contains(stderr, "/absent/coredns") {
		t.Errorf("exit status %d, %s", status, stderr)
	}
}
