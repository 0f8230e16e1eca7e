package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/agent/resolver"
	"github.com/millrace/millrace/kernel/netns"
)

// askingNode is a node whose own processes ask, with a DNS server of the cluster and one
// outside.
func askingNode(t *testing.T) *trouble {
	t.Helper()
	n := newNode(t)
	r := &trouble{node: n, cluster: &clusterNames{}, pod: &asker{n.NetNS}}
	if err := n.Inside(func() error { return netns.SetSysctl("net.ipv4.ip_forward", "1") }); err != nil {
		t.Fatal(err)
	}
	n.AddAddress("192.0.2.100/32")
	r.outside = n.serveInternet()
	r.servers = n.serveNames("veth3", "10.244.0.53", r.cluster.knows)
	_, slice, _ := strings.Cut(dnsService, "---")
	write(t, filepath.Join(n.manifests, "dns.yaml"), noDNSServers+"---"+slice)
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1")+"---"+dualStack)
	return r
}

var nodeDNS = []string{"nodedns", "--dns", "cluster.local"}

// counted is how often the layer nodedns has counted something.
func (r *trouble) counted(reason string) uint64 {
	r.t.Helper()
	status, err := r.status()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, l := range status.Layers {
		if l.Name == "nodedns" {
			return l.Reasons[reason]
		}
	}
	return 0
}

// servesNode waits until the agent answers the node: it begins once it is ready, and behind
// one that was killed some seconds later. Ten answers are more than what was in hand.
func (r *trouble) servesNode() {
	r.t.Helper()
	r.until("the agent answers the node", func(agent.Status) bool {
		_, _ = r.pod.look("web.default.svc.cluster.local.")
		return r.counted("agent_answered") > 10
	})
}

// The life of the layer nodedns: off, on beside programs that translate the DNS Service's
// address, off, and removed.
func TestNamesOfTheNodeItself(t *testing.T) {
	r := askingNode(t)
	_, stderr, status := millrace(t, "plan", "nodedns", "--source", r.source(), "--pins", r.pins)
	if status != exitUsage || !strings.Contains(stderr, "nodedns goes with --dns") {
		t.Errorf("nodedns without --dns: exit status %d: %s", status, stderr)
	}
	r.start("--dns", "cluster.local")
	r.finds("web.default.svc.cluster.local.", "10.96.0.1")
	if r.servers.asked.Load() == 0 {
		t.Fatal("off, and the cluster's DNS server was not asked")
	}
	stdout, _, _ := millrace(t, append([]string{"plan", "--source", r.source(), "--pins", r.pins}, nodeDNS...)...)
	if !strings.Contains(stdout, "+ queries of the node for 10.96.0.10 -> the agent, while it serves\n") {
		t.Errorf("plan has %q", stdout)
	}
	r.kill()
	r.start(nodeDNS...)
	r.servesNode()
	r.answersTheNode()

	stdout, _, status = millrace(t, append([]string{"plan", "--source", r.source(), "--pins", r.pins}, nodeDNS...)...)
	if status != exitOK || strings.Contains(stdout, "queries of the node") {
		t.Errorf("all is in force, and plan has %q, exit status %d", stdout, status)
	}
	stdout, _, _ = millrace(t, "plan", "--source", r.source(), "--pins", r.pins, "--dns", "cluster.local")
	if !strings.Contains(stdout, fmt.Sprintf("- pin %s\n", filepath.Join(r.pins, "nodedns"))) {
		t.Errorf("the layer is to be off, and plan has %q", stdout)
	}
	r.kill()
	r.start("--dns", "cluster.local")
	asked := r.servers.asked.Load()
	r.finds("web.default.svc.cluster.local.", "10.96.0.1")
	if _, err := os.Stat(filepath.Join(r.pins, "nodedns")); !os.IsNotExist(err) || r.servers.asked.Load() == asked {
		t.Errorf("switched off, and the folder is there (%v), or the server was not asked", err)
	}
	r.kill()
	r.start(nodeDNS...)
	r.kill()
	r.removeEverything()
	if there := r.inForce(); len(there) > 0 {
		t.Errorf("removed, and there are %v", there)
	}
}

// answersTheNode: names of the cluster and outside, what the agent asks the DNS Service, and
// what is told of all that.
func (r *trouble) answersTheNode() {
	t := r.t
	t.Helper()
	before, others := r.servers.asked.Load(), r.outside.asked.Load()
	for name, want := range map[string]string{
		"web.default.svc.cluster.local.":  "10.96.0.1",
		"both.default.svc.cluster.local.": "10.96.0.3 fd00:96::3",
		"www.example.com.":                bothFamilies,
	} {
		if got, err := r.pod.look(name); got != want {
			t.Errorf("%s is %q, %v, not %q\n%s", name, got, err, want, r.log.String())
		}
	}
	for _, name := range []string{"nosuch.default.svc.cluster.local.", "www.example.com.default.svc.cluster.local.", "www.example.com.cluster.local.", "nothing.example.com."} {
		if got, err := r.pod.look(name); !isNotFound(err) {
			t.Errorf("%s, which does not exist, is %q, %v", name, got, err)
		}
	}
	r.knowsTheCluster(r.pod)
	if n := r.servers.asked.Load() - before; n > 0 {
		t.Errorf("the cluster's DNS server was asked %d times for what the agent knows", n)
	}
	if r.outside.asked.Load() == others {
		t.Error("the server outside was not asked: who answered?")
	}
	relayed := r.counted("agent_relayed")
	if _, err := r.pod.look("10-244-0-7.default.pod.cluster.local."); !isNotFound(err) {
		t.Errorf("the record of a pod, which the server denies: %v", err)
	}
	if n := r.servers.asked.Load() - before; n == 0 || r.counted("agent_relayed") == relayed {
		t.Errorf("the record of a pod: the cluster's DNS server was asked %d times, %d relayed", n, r.counted("agent_relayed")-relayed)
	}
	stdout, _, _ := millrace(t, "show", "queries", "www", "--run", r.run, "-o", "json")
	var shown struct{ Queries []resolver.Query }
	if err := json.Unmarshal([]byte(stdout), &shown); err != nil || !slices.ContainsFunc(shown.Queries, func(q resolver.Query) bool { return q.From == "node" && q.Name == "www.example.com" }) {
		t.Errorf("show queries: %v: %s", err, stdout)
	}
	if _, stderr, _ := millrace(t, "show", "names", "nosuch", "--pins", r.pins, "--run", r.run); !strings.Contains(stderr, "note: queries of the node for 10.96.0.10 -> the agent, while it serves\n") {
		t.Errorf("show names: %s", stderr)
	}
	status, err := r.status()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range status.Layers {
		if l.Name == "nodedns" && (len(l.Degraded) > 0 || len(l.Programs) != 8 || l.Objects != 1) {
			t.Errorf("status has %+v", l)
		}
	}
}

// The agent is killed again and again while the node looks names up by glibc and musl, each
// time when it answers the node. What it has in hand then its successor answers. Where the
// machine is so busy that it comes too late for glibc's second try, that lookup fails.
func TestNodesNamesWhileTheAgentIsKilled(t *testing.T) {
	r := askingNode(t)
	r.pairs, r.mayWait = 2000, 10
	kills := 2
	if os.Getenv("MILLRACE_LONG") != "" {
		r.pairs, kills, r.mayWait = 100_000, 30, 60
	}
	r.start(nodeDNS...)
	r.servesNode()
	r.finds("www.example.com.", bothFamilies)
	r.finds("brief.example.com.", bothFamilies)
	all := r.looksUp(time.Millisecond)
	for range kills {
		r.servesNode()
		at := time.Now()
		r.kill()
		r.start(nodeDNS...)
		if gone := time.Since(at); gone > 3*time.Second {
			t.Logf("no agent was ready for %v", gone)
			r.mayFail += 2
		}
	}
	r.servesNode()
	r.end(fmt.Sprintf("the agent was killed %d times", kills), all)
	if asked := r.servers.asked.Load(); asked == 0 {
		t.Error("the cluster's DNS server was not asked: the test is blind")
	}
}
