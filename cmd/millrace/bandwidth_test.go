package main

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer/layertest"
)

// capping is what a runtime adds to the configuration for a pod with annotations of
// 20M each way.
const capping = `,"runtimeConfig":{"bandwidth":{"ingressRate":20000000,"ingressBurst":4294967295,"egressRate":20000000,"egressBurst":4294967295}}`

// A pod with annotations for its bandwidth has no more, to and from another node's pods
// past the stacks and in VXLAN, by a Service, to and from the world; with another agent, and
// without one. DNS answers of the kernel reach it.
func TestBandwidthOfPods(t *testing.T) {
	for _, near := range []bool{true, false} {
		name, path := "on a segment", "packet"
		if !near {
			name, path = "behind a router", "socket"
		}
		t.Run(name, func(t *testing.T) {
			n1, n2 := pairOfNodes(t, near)
			if near {
				n2.hasWorld()
			}
			write(t, filepath.Join(n1.manifests, "dns.yaml"), noDNSServers)
			n1.start("pods", "--path", path, "--dns", "cluster.local")
			n2.start("pods", "--node", "n2")
			spaces := map[string]string{"web": space(t, "web"), "db": space(t, "db"), "world": n2.NetNS}
			n1.more = capping
			at := map[string][]netip.Addr{"web": n1.add("web", spaces["web"]), "db": n2.add("db", spaces["db"]), "world": {netip.MustParseAddr("203.0.113.9")}}
			write(t, filepath.Join(n1.manifests, "entry.yaml"), fmt.Sprintf(entry, at["db"][0]))
			n1.shows("shop/web", "in 20M, out 20M")
			limited := func(when, from, to, called string, family int, udp bool) {
				t.Helper()
				f := layertest.Flow{From: spaces[from], To: spaces[to], At: netip.AddrPortFrom(at[to][family], 8080), UDP: udp, Streams: 2, MTU: 1450}
				if called != "" {
					f.Called = netip.MustParseAddrPort(called)
				}
				share, err := f.Near(20e6, 500*time.Millisecond)
				if err != nil {
					t.Errorf("%s, from %s to %s %s (UDP: %v): %v\n%s", when, from, to, f.At, udp, err, n1.log.String())
				}
				t.Logf("%s, from %s to %s %s %s (UDP: %v): %.2f of the limit", when, from, to, f.At, called, udp, share)
			}
			asker := &asker{spaces["web"]}
			n1.until("a name is found and the Service served", func(agent.Status) bool {
				_, err := asker.look("entry.default.svc.cluster.local.")
				return err == nil && answers(spaces["web"], spaces["db"], "10.96.0.7:80", netip.AddrPortFrom(at["db"][0], 8080)) == nil
			})
			limited("to another node", "web", "db", "", 0, false)
			limited("to another node", "web", "db", "", 1, true)
			limited("from another node", "db", "web", "", 0, true)
			limited("from another node", "db", "web", "", 1, false)
			limited("by a Service", "web", "db", "10.96.0.7:80", 0, false)
			if near {
				limited("to the world", "web", "world", "", 0, false)
			}
			n1.kill()
			limited("without an agent", "db", "web", "", 0, false)
			n1.start("pods", "--path", path, "--dns", "cluster.local")
			n1.until("it knows the pod", func(s agent.Status) bool { return slices.ContainsFunc(s.Layers, isPods(1)) })
			limited("with another agent", "web", "db", "", 0, false)
			if out, status := n1.plugin("CHECK", "web", spaces["web"]); status != 0 {
				t.Errorf("CHECK: %s", out)
			}
			if taken := n1.events("taken") + n1.events("taken_direct"); taken == 0 {
				t.Error("nothing came past the stack")
			}
		})
	}
}

// hasWorld gives a node an address that is none of the cluster's.
func (n *node) hasWorld() {
	n.t.Helper()
	net, err := link.Open(n.NetNS)
	if err != nil {
		n.t.Fatal(err)
	}
	defer net.Close()
	index, err := net.Index("eth0")
	if err == nil {
		err = net.Addr(index, netip.MustParsePrefix("203.0.113.9/32"))
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// shows: `millrace show pods` has a line with some words.
func (n *node) shows(words ...string) {
	n.t.Helper()
	out := n.says("show", "pods")
	for line := range strings.Lines(out) {
		if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
			return
		}
	}
	n.t.Errorf("no line with %q is in\n%s", words, out)
}
