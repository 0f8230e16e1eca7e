package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/agent"
)

const masqueradeConfig = `
apiVersion: v1
kind: ConfigMap
metadata: {name: ip-masq-agent, namespace: kube-system}
data: {config: "nonMasqueradeCIDRs: [%s]"}
`

// A pod reaches a machine outside, which has no way to pods, in both families; without an
// agent, too. What is said to be native is left alone.
func TestPodsReachTheWorld(t *testing.T) {
	n := newNode(t)
	n.run = filepath.Join("/tmp", fmt.Sprint("millrace-test-", os.Getpid())) // sockets have short paths
	t.Cleanup(func() { os.RemoveAll(n.run) })
	forward(t, n.NetNS)
	world, pod := space(t, "world"), space(t, "pod")
	wire(t, "eth0", [2]string{n.NetNS, world}, [2][]string{{"192.0.2.1/24", "2001:db8:1::1/64"}, {"192.0.2.9/24", "2001:db8:1::9/64"}}, true)
	write(t, filepath.Join(n.manifests, "nodes.yaml"), fmt.Sprintf(nodesWithRanges, "192.0.2.2", "2001:db8:1::2"))
	planned := n.says("plan", "pods", "--source", n.source(), "--node", "n1")
	for _, line := range []string{
		"+ range 10.244.1.0/24 of this node's pods: masqueraded\n", "+ range 10.244.2.0/23 native: pods keep their addresses\n", "+ masquerade at eth0 as 192.0.2.1, 2001:db8:1::1\n",
	} {
		if !strings.Contains(planned, line) {
			t.Errorf("the plan is without %s%s", line, planned)
		}
	}
	n.start("pods")
	n.add("web", pod)
	reaches := func(when string, want bool, addresses ...string) {
		t.Helper()
		for _, a := range addresses {
			if err := connects(pod, world, netip.MustParseAddr(a)); (err == nil) != want {
				t.Errorf("%s: from the pod to %s: %v\n%s", when, a, err, n.log.String())
			}
		}
	}
	ranges := func(many int, flows uint64) func(agent.Status) bool {
		return func(s agent.Status) bool {
			return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool {
				return l.Name == "masquerade" && l.Objects == many && l.Reasons["begun"] >= flows
			})
		}
	}
	reaches("with an agent", true, "192.0.2.9", "2001:db8:1::9")
	n.until("it has masqueraded", ranges(7, 2))
	n.kill()
	reaches("without an agent", true, "192.0.2.9", "2001:db8:1::9")
	n.start("pods")
	write(t, filepath.Join(n.manifests, "masquerade.yaml"), fmt.Sprintf(masqueradeConfig, "192.0.2.0/24"))
	n.until("the configuration is in force", ranges(8, 2))
	reaches("native", false, "192.0.2.9")
	reaches("beside what is native", true, "2001:db8:1::9")
	n.kill()
	n.start() // without the word
	reaches("switched off", false, "2001:db8:1::9")
	if found, _ := filepath.Glob(filepath.Join(n.pins, "masquerade")); len(found) > 0 {
		t.Errorf("switched off, and there is %v", found)
	}
}
