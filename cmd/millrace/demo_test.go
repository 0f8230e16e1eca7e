package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/lab"
)

// The demo, without its benchmark: every pod reaches every Service over both
// families, 10 replacements a second for 30 s and 20 killed agents fail no
// operation, and nothing is left behind.
func TestDemo(t *testing.T) {
	needsRoot(t)
	d := demonstrate(t, "--for", "30s", "--kills", "20")
	if d.Services < 10 || d.Matrix.Calls < 500 {
		t.Errorf("only %d calls to %d Services", d.Matrix.Calls, d.Services)
	}
	if d.Replacement.Events < 290 || d.Replacement.Operations < 9000 {
		t.Errorf("%d replacements during %d operations; 10 a second for 30 s, and 300 operations a second, were asked for",
			d.Replacement.Events, d.Replacement.Operations)
	}
	if d.AgentKills.Events != 20 {
		t.Errorf("%d agents were killed, not 20", d.AgentKills.Events)
	}
}

// The same where every packet to a Service is translated at the pod's veth.
func TestDemoOnThePacketPath(t *testing.T) {
	needsRoot(t)
	d := demonstrate(t, "--path", "packet", "--for", "8s", "--kills", "5")
	if d.Matrix.Calls < 500 || d.Replacement.Events < 20 || d.AgentKills.Events != 5 {
		t.Errorf("%d calls, %d replacements, %d kills", d.Matrix.Calls, d.Replacement.Events, d.AgentKills.Events)
	}
}

// A real application's manifests, from outside this repository: name the file
// to run it.
func TestDemoOfGivenManifests(t *testing.T) {
	path := os.Getenv("MILLRACE_MANIFESTS")
	if path == "" {
		t.Skip("MILLRACE_MANIFESTS names no manifests")
	}
	needsRoot(t)
	demonstrate(t, "-f", path, "--for", "5s", "--kills", "3")
}

// demonstrate runs the demo and fails the test on any failed operation.
func demonstrate(t *testing.T, args ...string) *demonstration {
	t.Helper()
	c := product(append([]string{"demo", "--rounds", "0", "-o", "json"}, args...)...)
	stdout, stderr, status := finish(t, c)
	var d demonstration
	if err := json.Unmarshal([]byte(stdout), &d); err != nil {
		t.Fatalf("exit status %d, %v:\n%s\n%s", status, err, stdout, stderr)
	}
	for _, row := range d.Matrix.Rows {
		for i := range row.Calls {
			if row.OK[i] != row.Calls[i] || row.Calls[i] == 0 {
				t.Errorf("%s %s %s from %s: %d of %d right", row.Service, row.How, row.target, d.Matrix.Nodes[i], row.OK[i], row.Calls[i])
			}
		}
	}
	if len(d.Matrix.Examples) > 0 {
		t.Errorf("calls that failed:\n%s", strings.Join(d.Matrix.Examples, "\n"))
	}
	for _, trial := range []*trial{d.Replacement, d.AgentKills} {
		if trial.Failed > 0 {
			t.Errorf("%d %s: %d of %d operations failed: %v\n%s", trial.Events, trial.What, trial.Failed, trial.Operations,
				trial.Failures, strings.Join(trial.Examples, "\n"))
		}
		t.Logf("%d %s: %d operations, %d failed", trial.Events, trial.What, trial.Operations, trial.Failed)
	}
	for _, a := range d.Agents {
		t.Logf("agent on %s: events %v", a.Node, a.Events)
	}
	if status != exitOK || !d.OK {
		t.Fatalf("exit status %d, ok %v:\n%s", status, d.OK, stderr)
	}
	for _, a := range d.Agents {
		t.Logf("agent on %s: attached after %.0f ms, %s resident, maps %s, change to kernel %+v",
			a.Node, a.AttachedAfterMS, bytesText(a.Memory.ResidentBytes), bytesText(a.Memory.MapBytes), a.Latency)
	}
	nothingLeft(t, c.Process.Pid)
	return &d
}

func nothingLeft(t *testing.T, pid int) {
	t.Helper()
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("demo-%d", pid)
	for _, path := range []string{filepath.Join(root, "millrace-lab", name), lab.Folder(name)} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("left behind: %s", path)
		}
	}
}
