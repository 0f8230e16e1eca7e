package doctor

import (
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/kernel/link"
)

// What nodes have is compared with what most of them have; a tunnel's MTU weighs more
// than a setting, and where all is the same nothing is found.
func TestCompareNodes(t *testing.T) {
	same := func() map[string]map[string]string {
		all := map[string]map[string]string{}
		for _, name := range []string{"a", "b", "c"} {
			all[name] = map[string]string{somaxconn: "4096", deviceMTU + "flannel.1": "1450", uplinkMTU: "1500", osRelease: "6.18.1", congestion: "cubic"}
		}
		return all
	}
	if r := Compare(same()); r.Status != OK || !strings.Contains(texts(r), "5 values | the same on 3 nodes") {
		t.Errorf("%s: %s", r.Status, texts(r))
	}
	for _, row := range []struct {
		what   string
		change func(map[string]map[string]string)
		status Status
		s      Severity
		want   []string
	}{
		{"a setting", func(n map[string]map[string]string) { n["b"][somaxconn] = "128" }, Warn, Info, []string{"b: 128; 2 of 3 nodes have 4096"}},
		{"a tunnel", func(n map[string]map[string]string) { n["a"][deviceMTU+"flannel.1"] = "8950" }, Warn, Warning, []string{"a: 8950; 2 of 3 nodes have 1450"}},
		{"the uplink", func(n map[string]map[string]string) { n["c"][uplinkMTU] = "9001" }, Warn, Info, []string{"c: 9001; 2 of 3 nodes have 1500"}},
		{"all", func(n map[string]map[string]string) { n["b"][osRelease], n["c"][osRelease] = "6.18.2", "6.18.3" }, Warn, Info,
			[]string{"b: 6.18.2; 1 of 3 nodes have 6.18.1", "c: 6.18.3; 1 of 3 nodes have 6.18.1"}},
		{"one lacks it", func(n map[string]map[string]string) { delete(n["a"], congestion) }, OK, Warning, nil},
		{"nothing reserved", func(n map[string]map[string]string) {
			n["a"][reservedPorts], n["b"][reservedPorts], n["c"][reservedPorts] = "", "", "30000-32767"
		}, Warn, Info,
			[]string{"c: 30000-32767; 2 of 3 nodes have nothing"}},
		{"one node", func(n map[string]map[string]string) { delete(n, "a"); delete(n, "b") }, Skip, Warning, nil},
	} {
		nodes := same()
		row.change(nodes)
		r := Compare(nodes)
		var got []string
		for _, e := range r.Evidence {
			if e.Severity != "" {
				got = append(got, e.Node+": "+e.Value)
			}
		}
		if r.Status != row.status || r.Severity != row.s || !slices.Equal(got, row.want) {
			t.Errorf("%s: %s %s: %q", row.what, r.Status, r.Severity, got)
		}
	}
}

// A node tells what it should have in common with others; one that is asked alone says
// that there is nothing to compare.
func TestAlike(t *testing.T) {
	w := healthy()
	w.node.devices = append(w.node.devices,
		link.Device{Index: 90, Name: "uplink", MTU: 1500, Up: true, DefaultRoute: true}, link.Device{Index: 91, Name: "uplink2", MTU: 1400, Up: true, DefaultRoute: true},
		link.Device{Index: 92, Name: "flannel.1", Kind: "vxlan", MTU: 1450, Up: true}, link.Device{Index: 93, Name: "docker0", Kind: "bridge", MTU: 1500})
	results, facts := w.examine(t, []Check{Comparing()})
	if r := results["CN-25"]; r.Status != Skip || !strings.Contains(texts(r), "say --nodes all") {
		t.Errorf("%s: %s", r.Status, texts(r))
	}
	got := facts.Alike()
	for name, want := range map[string]string{uplinkMTU: "1400", deviceMTU + "flannel.1": "1450", localPorts: "32768 60999", somaxconn: "4096", reservedPorts: ""} {
		if value, there := got[name]; !there || value != want {
			t.Errorf("%s is %q, %v; not %q", name, value, there, want)
		}
	}
	for _, name := range []string{deviceMTU + "docker0", deviceMTU + "eth0", "net.ipv4.tcp_mem"} {
		if value, there := got[name]; there {
			t.Errorf("%s is told: %q", name, value)
		}
	}
	if none := (&Facts{}).Alike(); len(none) != 0 {
		t.Errorf("of no node: %v", none)
	}
}

// The same finding on several nodes is one; its fix is that of all, or each one's with
// its node, or of many the check's own.
func TestJoinResults(t *testing.T) {
	check := one(t, "CT-01")[0]
	on := func(node string, status Status, fix string) Result {
		r := Result{Check: &check, Status: status, Severity: Critical, Fix: fix, Undo: "back", Evidence: []Evidence{{Node: node, Scope: "node", Read: trackedCount, Value: "10"}}}
		switch status {
		case Fail:
			r.Evidence[0].Severity = Critical
		case Skip:
			r.Evidence[0].Unread = true
		}
		return r
	}
	for _, row := range []struct {
		of     []Result
		status Status
		nodes  string
		fix    string
	}{
		{[]Result{on("a", OK, "own"), on("b", OK, "own")}, OK, "ab", check.Fix},
		{[]Result{on("a", OK, "own"), on("b", Fail, "x")}, Fail, "b", "x"},
		{[]Result{on("a", Fail, "x"), on("b", OK, "own"), on("c", Fail, "x")}, Fail, "ac", "x"},
		{[]Result{on("a", Fail, "x"), on("b", Fail, "y"), on("c", Fail, "x")}, Fail, "abc", "on a, c: x; on b: y"},
		{[]Result{on("a", Fail, "w"), on("b", Fail, "x"), on("c", Fail, "y"), on("d", Fail, "z")}, Fail, "abcd", check.Fix},
		{[]Result{on("a", OK, "own"), on("b", Skip, "own")}, Skip, "ba", check.Fix}, // what lacks is told first
		{[]Result{on("a", Skip, "own"), on("b", Fail, "x")}, Fail, "ba", "x"},
	} {
		r := Join(row.of)
		nodes := ""
		for _, e := range r.Evidence {
			nodes += e.Node
		}
		if r.Status != row.status || nodes != row.nodes || r.Fix != row.fix {
			t.Errorf("%s on %q, fix %q; not %s on %q, %q", r.Status, nodes, r.Fix, row.status, row.nodes, row.fix)
		}
	}
}
