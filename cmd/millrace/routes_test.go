package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/route"
)

// Both nodes, and one that is only named: it is behind the default route.
const nodesWithRanges = `
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.244.1.0/24, "fd00:244:1::/64"]}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: "2001:db8:1::1"}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
spec: {podCIDRs: [10.244.2.0/24, "fd00:244:2::/64"]}
status: {addresses: [{type: InternalIP, address: %[1]s}, {type: InternalIP, address: "%[2]s"}]}
---
apiVersion: v1
kind: Node
metadata: {name: n3}
spec: {podCIDRs: [10.244.3.0/24, "fd00:244:3::/64"]}
status: {addresses: [{type: InternalIP, address: 203.0.113.3}]}
`

// space makes a network namespace in which packets are handed on, as strictly as a
// distribution may do it.
func space(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netns.Remove(path) })
	forward(t, path)
	return path
}

func forward(t *testing.T, path string) {
	t.Helper()
	err := netns.Do(path, func() error {
		for _, s := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv4.conf.all.rp_filter", "net.ipv4.conf.default.rp_filter"} {
			if err := netns.SetSysctl(s, "1"); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// wire joins two namespaces; each end has its addresses, and default routes by those of
// the other end where they are asked for.
func wire(t *testing.T, name string, ends [2]string, addresses [2][]string, defaults bool) {
	t.Helper()
	one, err := link.Open(ends[0])
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	if _, err := one.Veth(link.Veth{Name: name, Peer: name, PeerNamespace: ends[1]}); err != nil {
		t.Fatal(err)
	}
	for i, end := range ends {
		n, err := link.Open(end)
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		index, err := n.Index(name)
		if err != nil {
			t.Fatal(err)
		}
		failed := n.Up(index)
		for j, text := range addresses[i] {
			if failed == nil {
				failed = n.Addr(index, netip.MustParsePrefix(text))
			}
			if via := netip.MustParsePrefix(addresses[1-i][j]).Addr(); failed == nil && defaults && i == 0 {
				failed = n.Route(link.Route{To: netip.PrefixFrom(via, 0).Masked(), Via: via, Link: index})
			}
		}
		if failed != nil {
			t.Fatal(failed)
		}
	}
}

// second is another node beside n, with an agent of its own.
func (n *node) second(netNS string) *node {
	bed := *n.Bed
	bed.NetNS, bed.Cgroup = netNS, filepath.Join(n.Cgroup, "n2")
	if err := cgroup.Create(bed.Cgroup); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { cgroup.Remove(bed.Cgroup) })
	return &node{Bed: &bed, t: n.t, manifests: n.manifests, run: n.run + "-2", pins: n.pins + "-2"}
}

// pairOfNodes are n1 and n2, on one segment or with a router in between, whose manifests
// name a third.
func pairOfNodes(t *testing.T, near bool) (n1, n2 *node) {
	t.Helper()
	n1 = newNode(t)
	n1.run = filepath.Join("/tmp", fmt.Sprint("millrace-test-", os.Getpid())) // sockets have short paths
	t.Cleanup(func() { os.RemoveAll(n1.run); os.RemoveAll(n1.run + "-2") })
	forward(t, n1.NetNS)
	n2 = n1.second(space(t, "node2"))
	second := [2]string{"192.0.2.2", "2001:db8:1::2"}
	if near {
		wire(t, "eth0", [2]string{n1.NetNS, n2.NetNS}, [2][]string{{"192.0.2.1/24", "2001:db8:1::1/64"}, {"192.0.2.2/24", "2001:db8:1::2/64"}}, true)
	} else {
		router := space(t, "router")
		second = [2]string{"198.51.100.2", "2001:db8:2::2"}
		wire(t, "eth0", [2]string{n1.NetNS, router}, [2][]string{{"192.0.2.1/24", "2001:db8:1::1/64"}, {"192.0.2.254/24", "2001:db8:1::fe/64"}}, true)
		wire(t, "eth1", [2]string{n2.NetNS, router}, [2][]string{{"198.51.100.2/24", "2001:db8:2::2/64"}, {"198.51.100.254/24", "2001:db8:2::fe/64"}}, true)
	}
	write(t, filepath.Join(n1.manifests, "nodes.yaml"), fmt.Sprintf(nodesWithRanges, second[0], second[1]))
	return n1, n2
}

// add asks the plugin for a pod's network, and returns its addresses.
func (n *node) add(container, space string) []netip.Addr {
	n.t.Helper()
	out, status := n.plugin("ADD", container, space)
	if status != 0 {
		n.t.Fatalf("ADD of %s: %s\n%s", container, out, n.log.String())
	}
	return addressesIn(n.t, out)
}

// addressesIn reads the answer to an ADD.
func addressesIn(t *testing.T, out string) (all []netip.Addr) {
	t.Helper()
	var result struct {
		IPs []struct {
			Address netip.Prefix `json:"address"`
		} `json:"ips"`
	}
	if err := json.Unmarshal([]byte(out), &result); err != nil {
		t.Errorf("the answer to an ADD is %s: %v", out, err)
	}
	for _, ip := range result.IPs {
		all = append(all, ip.Address.Addr())
	}
	return all
}

// routes are what `millrace show routes -o json` says on the node.
func (n *node) routes() (rows []*route.Row, none []string) {
	n.t.Helper()
	out := n.says("show", "routes", "-o", "json")
	var shown struct {
		Routes []*route.Row `json:"routes"`
		None   []string     `json:"none"`
	}
	if err := json.Unmarshal([]byte(out), &shown); err != nil {
		n.t.Fatalf("%v: %s", err, out)
	}
	return shown.Routes, shown.None
}

// says runs a command of the product on the node.
func (n *node) says(arguments ...string) string {
	n.t.Helper()
	var out, errs strings.Builder
	command := product(append(arguments, "--run", n.run, "--pins", n.pins)...)
	command.Stdout, command.Stderr = &out, &errs
	if err := netns.Do(n.NetNS, command.Run); err != nil {
		n.t.Fatalf("%v: %v: %s", arguments, err, errs.String())
	}
	return out.String()
}

// Pods of two nodes speak to each other, on one segment and by a router in between, in both
// families; without an agent, too. What is done is shown with its reason, and all of it
// goes when the layer is switched off.
func TestPodsOfTwoNodes(t *testing.T) {
	for _, near := range []bool{true, false} {
		name := map[bool]string{true: "on a segment", false: "behind a router"}[near]
		t.Run(name, func(t *testing.T) {
			n1, n2 := pairOfNodes(t, near)
			if planned := n1.says("plan", "pods", "--source", n1.source(), "--node", "n1"); !strings.Contains(planned, "+ route 10.244.2.0/24 -> n2 ") {
				t.Errorf("the plan is\n%s", planned)
			}
			n1.start("pods")
			n2.start("pods", "--node", "n2")
			spaces := []string{filepath.Join(t.TempDir(), "pod1"), filepath.Join(t.TempDir(), "pod2")}
			for _, path := range spaces {
				if err := netns.Create(path); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { netns.Remove(path) })
			}
			addresses := [2][]netip.Addr{n1.add("web", spaces[0]), n2.add("db", spaces[1])}
			talk := func(when string) {
				t.Helper()
				for i := range spaces {
					for _, to := range addresses[1-i] {
						if err := connects(spaces[i], spaces[1-i], to); err != nil {
							t.Errorf("%s: from pod %d to %s: %v\n%s", when, i+1, to, err, n1.says("show", "routes"))
						}
					}
				}
				for _, to := range addresses[1] {
					if err := connects(n1.NetNS, spaces[1], to); err != nil {
						t.Errorf("%s: from node 1 to %s of node 2: %v", when, to, err)
					}
				}
			}
			talk("with agents")
			n1.showsRoutes(near)
			for _, n := range []*node{n1, n2} {
				n.kill()
			}
			talk("without agents")
			if rows, _ := n1.routes(); len(rows) != 4 {
				t.Errorf("without an agent it shows %d routes", len(rows))
			}
			n1.start("pods")
			talk("with another agent")
			n1.kill()
			n1.start() // without the word
			if rows, _ := n1.routes(); len(rows) > 0 {
				t.Errorf("switched off, and there is %v", rows[0])
			}
		})
	}
}

// On a segment that drops packets of pods' addresses agents take VXLAN, both, and say why.
func TestASegmentThatDropsPodsAddresses(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft")
	}
	n1, n2 := pairOfNodes(t, true)
	drop := exec.Command("nft", "table netdev fabric { chain c { type filter hook ingress device eth0 priority 0; ip saddr 10.244.0.0/16 drop; ip6 saddr fd00:244::/32 drop; }; }")
	if err := netns.Do(n2.NetNS, drop.Run); err != nil {
		t.Fatal(err)
	}
	n1.start("pods")
	n2.start("pods", "--node", "n2")
	for i, n := range []*node{n1, n2} {
		n.until("packets go in VXLAN", func(agent.Status) bool {
			rows, _ := n.routes()
			return len(rows) >= 2 && !slices.ContainsFunc(rows, func(r *route.Row) bool { return r.Node == fmt.Sprintf("n%d", 2-i) && r.Direct })
		})
		if shown := n.says("show", "routes"); strings.Count(shown, "it is on the same segment, which drops packets of pods' addresses") != 2 {
			t.Errorf("node %d shows\n%s", i+1, shown)
		}
		n.until("status says so", func(s agent.Status) bool {
			return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool {
				return strings.Contains(strings.Join(l.Degraded, ""), "a segment drops packets of pods' addresses: to ranges of nodes that are on it packets go in VXLAN, of 2")
			})
		})
	}
}

// showsRoutes: the way to each range, and why; status counts them.
func (n *node) showsRoutes(near bool) {
	n.t.Helper()
	way, via, why, mtu := "direct", "192.0.2.2", "it is on the same segment", 1500
	if !near {
		way, via, why, mtu = "vxlan", "198.51.100.2", "it is behind 192.0.2.254", 1450
	}
	rows, none := n.routes()
	i := slices.IndexFunc(rows, func(r *route.Row) bool { return r.To == netip.MustParsePrefix("10.244.2.0/24") })
	if len(rows) != 4 || len(none) > 0 || i < 0 {
		n.t.Fatalf("show routes: %d, %v", len(rows), none)
	}
	if r := rows[i]; r.Node != "n2" || r.Direct != near || r.Via.String() != via || r.Device != "eth0" || r.MTU != mtu || r.Why != why {
		n.t.Errorf("show routes has %+v; not %s via %s, mtu %d: %s", r, way, via, mtu, why)
	}
	if shown := strings.Join(strings.Fields(n.says("show", "routes")), " "); !strings.Contains(shown, fmt.Sprintf("n2 10.244.2.0/24 %s %s eth0 %d %s", way, via, mtu, why)) {
		n.t.Errorf("show routes says %s", shown)
	}
	n.until("status counts the routes", func(s agent.Status) bool {
		return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool { return l.Name == "route" && l.Objects == 4 && len(l.Degraded) == 0 })
	})
}
