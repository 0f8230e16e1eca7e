package main

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

// probeFrom runs the checks that send on a node, or some of them.
func probeFrom(t *testing.T, n node, only string) (r nodesReport) {
	t.Helper()
	text := on(t, n, program(t)+" doctor --source kube:"+kubeconfig+" --only "+only+" -o json 2>/dev/null || true")
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		t.Fatalf("%v: %.500s", err, text)
	}
	return r
}

// From each node of a real cluster the other nodes and their pods, the DNS servers and
// Services answer; a way that takes less is found from the others, to the byte.
func TestInstalledDoctorProbes(t *testing.T) {
	needsInstalled(t)
	for _, n := range allNodes() {
		for _, c := range probeFrom(t, n, "probe").Checks {
			if c.Status != "ok" {
				t.Errorf("from %s: %s is %s: %+v", n.name(), c.ID, c.Status, c.Evidence)
			}
			t.Logf("from %s: %s %s: %+v", n.name(), c.ID, c.Status, c.Evidence)
		}
	}
	on(t, server2, "nft 'table inet narrow { chain c { type filter hook prerouting priority -300; ip length > 1400 drop; ip6 length > 1360 drop; }; }'")
	t.Cleanup(func() { on(t, server2, "nft delete table inet narrow") })
	found := probeFrom(t, node(1), "PR-01").Checks[0]
	var said []string
	for _, e := range found.Evidence {
		if e.Severity != "" {
			said = append(said, e.Scope+" "+e.Read+": "+e.Value)
		}
	}
	slices.Sort(said)
	for _, address := range []string{"ICMP echo to 10.89.0.12: 1400 bytes get an answer", "ICMP echo to fd00:10:89::12: 1400 bytes get an answer"} {
		if !strings.Contains(strings.Join(said, "\n"), "Node "+server2.name()+" "+address) {
			t.Errorf("%s; it does not say %q:\n%s", found.Status, address, strings.Join(said, "\n"))
		}
	}
	t.Logf("%s", strings.Join(said, "\n"))
}
