package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/probe"
)

var apiAddress = netip.MustParseAddr("10.96.0.1")

// healthyWire is a network on which all is well: nodes are neighbours, pods are one step
// behind their node, and everybody answers.
func healthyWire() wire {
	return wire{
		way: func(_ string, to netip.Addr) (link.Way, error) {
			if text := to.String(); strings.HasPrefix(text, "10.244.1.") {
				return link.Way{Device: "vxlan0", Kind: "vxlan", MTU: 1450, Via: netip.MustParseAddr("10.244.1.0")}, nil
			}
			return link.Way{Device: "eth0", MTU: 1500}, nil
		},
		lost: func(string, link.Way, netip.Addr) (bool, error) { return false, nil },
		mtu: func(_ context.Context, _ string, _ netip.Addr, most int) (probe.Path, error) {
			return probe.Path{Tried: most, Passed: most, Packets: 2}, nil
		},
		hop: func(_ context.Context, _ string, to netip.Addr) (probe.Hop, error) {
			if strings.HasPrefix(to.String(), "10.244.1.") {
				return probe.Hop{From: netip.MustParseAddr("10.244.1.0")}, nil
			}
			return probe.Hop{From: to, Arrived: true}, nil
		},
		resolve: func(context.Context, string, string, netip.AddrPort, string, bool) (probe.Reply, error) {
			return probe.Reply{Code: "NOERROR", Addresses: []netip.Addr{apiAddress}, Took: time.Millisecond}, nil
		},
		connect: func(context.Context, string, netip.AddrPort) (time.Duration, error) { return time.Millisecond, nil },
	}
}

// unsentWire is one on which nothing can be sent.
func unsentWire(why error) wire {
	err := fmt.Errorf("open a raw socket: %w: %w", why, probe.ErrUnsent)
	return wire{
		way: func(string, netip.Addr) (link.Way, error) { return link.Way{}, err },
		resolve: func(context.Context, string, string, netip.AddrPort, string, bool) (probe.Reply, error) {
			return probe.Reply{}, err
		},
		connect: func(context.Context, string, netip.AddrPort) (time.Duration, error) { return 0, err },
	}
}

// paths answers with this path to addresses that begin so.
func paths(begin string, p probe.Path, err error) func(*world) {
	return func(w *world) {
		all := w.wire.mtu
		w.wire.mtu = func(ctx context.Context, space string, to netip.Addr, most int) (probe.Path, error) {
			if !strings.HasPrefix(to.String(), begin) {
				return all(ctx, space, to, most)
			}
			p.Tried = most
			return p, err
		}
	}
}

func hops(begin string, h probe.Hop, err error) func(*world) {
	return func(w *world) {
		all := w.wire.hop
		w.wire.hop = func(ctx context.Context, space string, to netip.Addr) (probe.Hop, error) {
			if !strings.HasPrefix(to.String(), begin) {
				return all(ctx, space, to)
			}
			return h, err
		}
	}
}

func ways(begin string, change func(*link.Way), err error) func(*world) {
	return func(w *world) {
		all := w.wire.way
		w.wire.way = func(space string, to netip.Addr) (link.Way, error) {
			way, _ := all(space, to)
			if strings.HasPrefix(to.String(), begin) {
				if change != nil {
					change(&way)
				}
				return way, err
			}
			return way, nil
		}
	}
}

// replies answers queries over a network to servers that begin so.
func replies(network, begin string, r probe.Reply, err error) func(*world) {
	return func(w *world) {
		all := w.wire.resolve
		w.wire.resolve = func(ctx context.Context, space, over string, server netip.AddrPort, name string, six bool) (probe.Reply, error) {
			if !strings.HasPrefix(over, network) || !strings.HasPrefix(server.String(), begin) {
				return all(ctx, space, over, server, name, six)
			}
			return r, err
		}
	}
}

func connecting(begin string, err error) func(*world) {
	return func(w *world) {
		all := w.wire.connect
		w.wire.connect = func(ctx context.Context, space string, to netip.AddrPort) (time.Duration, error) {
			if !strings.HasPrefix(to.String(), begin) {
				return all(ctx, space, to)
			}
			return 0, err
		}
	}
}

// podAsks makes the pod here one that no policy limits.
func podAsks(w *world) {
	w.pod.devices[0].Addresses = []netip.Addr{netip.MustParseAddr("10.244.0.2")}
}

const api = `{apiVersion: v1, kind: Service, metadata: {name: kubernetes, namespace: default, uid: u}, spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{port: 443}]}}`

var (
	router    = netip.MustParseAddr("192.0.2.254")
	errNobody = fmt.Errorf("%w to 3 queries of 1 s each", probe.ErrSilent)
	nxdomain  = probe.Reply{Code: "NXDOMAIN"}
)

// probesFire are the stories of what is sent.
var probesFire = []story{
	{"PR-01", "to a node", paths("192.0.2.2", probe.Path{Passed: 1400, Packets: 31}, nil), Fail, "Node n2 | ICMP echo to 192.0.2.2 | 1400 bytes get an answer, and longer ones up to the 1500 of eth0 none; nobody says so (31 packets)"},
	{"PR-01", "what to set", paths("192.0.2.2", probe.Path{Passed: 1400}, nil), Fail, "ip link set eth0 mtu 1400 on both nodes"},
	{"PR-01", "to a pod", paths("10.244.1.", probe.Path{Passed: 1350}, nil), Fail, "Pod kube-system/coredns-2 | ICMP echo to 10.244.1.2 | 1350 bytes get an answer, and longer ones up to the 1450 of vxlan0"},
	{"PR-01", "from a pod", all(podAsks, paths("10.244.1.", probe.Path{Passed: 1350}, nil)), Fail, "ICMP echo to 10.244.1.2 from Pod kube-system/coredns-1 | 1350"},
	{"PR-01", "a router that lies", paths("192.0.2.2", probe.Path{Passed: 1300, Announced: 1400, By: router}, nil), Fail, "192.0.2.254 says that 1400 pass"},
	{"PR-02", "a router that says so", paths("192.0.2.2", probe.Path{Passed: 1400, Announced: 1400, By: router}, nil), Warn, "Node n2 | ICMP echo to 192.0.2.2 | 192.0.2.254 takes 1400 bytes at most, and eth0 sends 1500"},
	{"PR-03", "learned", ways("192.0.2.2", func(w *link.Way) { w.Learned = 1280 }, nil), Warn, "1280 bytes are known of the path, and 1500 get an answer"},
	{"PR-04", "a blackhole", ways("10.244.1.", nil, fmt.Errorf("find route: %w", unix.EINVAL)), Fail, "Pod kube-system/coredns-2 | ICMP echo to 10.244.1.2 | its route is of type blackhole"},
	{"PR-04", "forbidden", ways("10.244.1.", nil, unix.EACCES), Fail, "its route is of type prohibit"},
	{"PR-04", "no route", ways("192.0.2.", nil, unix.ENETUNREACH), Fail, "Node n2 | ICMP echo to 192.0.2.2 | the kernel has no way: network is unreachable"},
	{"PR-04", "a next hop that is off", all(hops("10.244.1.", probe.Hop{}, unix.EHOSTUNREACH), func(w *world) {
		w.wire.lost = func(string, link.Way, netip.Addr) (bool, error) { return true, nil }
	}), Fail, "the next hop, 10.244.1.0 by vxlan0, does not tell its hardware address"},
	{"PR-04", "a next hop that has none", hops("10.244.1.", probe.Hop{}, unix.EHOSTUNREACH), Fail, "the next hop, 10.244.1.0 by vxlan0, answers: no route to host"},
	{"PR-04", "one's own address", ways("10.244.1.", func(w *link.Way) { w.Local = true }, nil), Fail, "it is an address of this node, too"},
	{"PR-05", "another node", all(more("{apiVersion: v1, kind: Node, metadata: {name: n3}, status: {addresses: [{type: InternalIP, address: 192.0.2.3}]}}"),
		hops("10.244.1.", probe.Hop{From: netip.MustParseAddr("192.0.2.3")}, nil)), Warn, "the first step is 192.0.2.3 of node n3, and the pod is on n2"},
	{"PR-05", "a router between neighbours", hops("192.0.2.2", probe.Hop{From: router}, nil), Warn, "192.0.2.254 is in between, and the route by eth0 calls it a neighbour"},
	{"PR-06", "no answer", replies("udp", "10.244.1.2", probe.Reply{}, errNobody), Fail, "Pod kube-system/coredns-2 | DNS query to 10.244.1.2:53/udp | no answer to 3 queries of 1 s each"},
	{"PR-06", "not over TCP", replies("tcp", "10.244.1.2", probe.Reply{}, fmt.Errorf("dial: %w", unix.ECONNREFUSED)), Warn, "DNS query to 10.244.1.2:53/tcp | connection refused"},
	{"PR-06", "the second time", replies("udp", "10.244.1.2", probe.Reply{Code: "NOERROR", Addresses: []netip.Addr{apiAddress}, Lost: 1, Took: time.Millisecond}, nil), Warn, "answered in 1.0 ms; queries before it that were not: 1"},
	{"PR-07", "the proxy", replies("udp", "10.96.0.10", probe.Reply{}, errNobody), Fail, "Service kube-system/kube-dns | DNS query to 10.96.0.10:53/udp | no answer to 3 queries of 1 s each; asked directly, 2 of its servers answer"},
	{"PR-07", "from a pod", all(podAsks, replies("udp", "10.96.0.10", probe.Reply{}, errNobody)), Fail, "DNS query to 10.96.0.10:53/udp from Pod kube-system/coredns-1 | no answer"},
	{"PR-08", "one that lost the API", replies("", "10.244.1.2", probe.Reply{Code: "SERVFAIL"}, nil), Fail, "Pod kube-system/coredns-2 | DNS query to 10.244.1.2:53/udp | kubernetes.default.svc.cluster.local.: SERVFAIL, and not NOERROR 10.96.0.1"},
	{"PR-08", "another cluster's", all(more(api), replies("", "", probe.Reply{Code: "NOERROR", Addresses: []netip.Addr{router}}, nil)), Fail, "NOERROR 192.0.2.254, and not NOERROR 10.96.0.1"},
	{"PR-09", "refused", connecting("10.96.0.20:80", fmt.Errorf("dial: %w", unix.ECONNREFUSED)), Fail, "Service shop/web | TCP connection to clusterIP 10.96.0.20:80 | connection refused; its endpoint 10.244.0.3:8080, Pod shop/web-1, takes connections"},
	{"PR-09", "at the node's port", connecting("192.0.2.1:30080", probe.ErrSilent), Fail, "TCP connection to nodePort 192.0.2.1:30080 | no answer"},
	{"PR-09", "reset", connecting("10.96.0.20:80", probe.ErrReset), Fail, "connected, and then reset; its endpoint"},
	{"PR-09", "closed", connecting("10.96.0.20:80", probe.ErrClosed), Fail, "connected, and closed at once; its endpoint"},
	{"PR-09", "at an address outside", all(in("type: NodePort, clusterIP: 10.96.0.20", "type: LoadBalancer, externalIPs: [192.0.2.77], clusterIP: 10.96.0.20"),
		connecting("192.0.2.77:80", unix.EHOSTUNREACH)), Warn, "TCP connection to externalIP 192.0.2.77:80 | no route to host"},
	{"PR-10", "nobody listens", connecting("10.244.0.3:8080", unix.ECONNREFUSED), Warn, "Pod shop/web-1 | TCP connection to endpoint 10.244.0.3:8080 | connection refused, and the endpoint of Service shop/web is ready"},
}

// probesCalm are no faults.
var probesCalm = []story{
	{id: "PR-01", what: "a router says so", change: paths("192.0.2.2", probe.Path{Passed: 1400, Announced: 1400, By: router}, nil)},
	{id: "PR-02", what: "nobody says so", change: paths("192.0.2.2", probe.Path{Passed: 1400}, nil)},
	{id: "PR-03", what: "learned, and true", change: all(ways("192.0.2.2", func(w *link.Way) { w.Learned = 1400 }, nil), paths("192.0.2.2", probe.Path{Passed: 1400, Announced: 1400}, nil))},
	{id: "PR-05", what: "a router that is no node", change: hops("10.244.1.", probe.Hop{From: router}, nil)},
	{id: "PR-05", what: "its own node's address", change: hops("10.244.1.", probe.Hop{From: netip.MustParseAddr("192.0.2.2")}, nil)},
	{id: "PR-05", what: "a node behind a router, as its route says", change: all(ways("192.0.2.2", func(w *link.Way) { w.Via = router }, nil), hops("192.0.2.2", probe.Hop{From: router}, nil))},
	{id: "PR-06", what: "an answer that is no good", change: replies("", "10.244.1.2", probe.Reply{Code: "SERVFAIL"}, nil)},
	{id: "PR-07", what: "one server", change: replies("", "10.244.1.2", probe.Reply{}, errNobody)},
	{id: "PR-08", what: "as the Service is", change: more(api)},
	{id: "PR-09", what: "a program that closes", change: connecting("", probe.ErrClosed)},
	{id: "PR-10", what: "a program that closes", change: connecting("", probe.ErrClosed)},
	{id: "PR-10", what: "only the Service", change: connecting("10.96.0.20", unix.ECONNREFUSED)},
	{id: "PR-04", what: "the only node", change: func(w *world) { w.objects = aloneOnNode() }},
}

// aloneOnNode is the healthy cluster without its second node.
func aloneOnNode() string {
	parts := strings.Split(healthyCluster, "\n---\n")
	return strings.Join(slices.DeleteFunc(parts, func(p string) bool { return strings.Contains(p, "kind: Node\nmetadata: {name: n2") }), "\n---\n")
}

// What could not be found out is said, and is no finding.
func TestProbesSayWhatTheyDoNotKnow(t *testing.T) {
	silent := fmt.Errorf("%w to 3 packets of 64 bytes", probe.ErrSilent)
	for _, row := range []struct {
		id, what string
		change   func(*world)
		says     string
	}{
		{"PR-01", "ICMP is filtered", paths("192.0.2.2", probe.Path{}, silent), "Node n2 | ICMP echo to 192.0.2.2 | no answer to 3 packets of 64 bytes"},
		{"PR-01", "no way there", ways("192.0.2.2", nil, unix.ENETUNREACH), "network is unreachable (PR-04)"},
		{"PR-04", "ICMP is filtered", all(paths("192.0.2.2", probe.Path{}, silent), hops("192.0.2.2", probe.Hop{}, probe.ErrSilent)), "ICMP may be filtered"},
		{"PR-05", "no ICMP of the first step", hops("10.244.1.", probe.Hop{}, probe.ErrSilent), "who gives up a packet after one step is not known"},
		{"PR-06", "no servers", in("name: kube-dns-1, namespace: kube-system, uid: u, labels: {kubernetes.io/service-name: kube-dns}", "name: kube-dns-1, namespace: kube-system, labels: {}"), "is not there or has no ready endpoint"},
		{"PR-07", "no server answers either", replies("", "", probe.Reply{}, errNobody), "but no server answers that is asked directly (PR-06)"},
		{"PR-08", "no server answers", replies("", "", probe.Reply{}, errNobody), "no server answers (PR-06)"},
		{"PR-08", "a domain that is not known", all(in("kubernetes cluster.local in-addr.arpa ip6.arpa {", "kubernetes {"), replies("", "", nxdomain, nil)), "was taken to be cluster.local"},
		{"PR-09", "the endpoint does not, either", connecting("10", probe.ErrSilent), "does not take connections either (PR-10)"},
		{"PR-09", "no such Services", all(in("ports: [{port: 80, targetPort: 8080, nodePort: 30080}]", "ports: []"), in("protocol: TCP, port: 53, t", "protocol: SCTP, port: 53, t")), "no Service has a TCP port and a ready endpoint"},
		{"PR-09", "another cluster", in("address: 192.0.2.1}", "address: 192.0.2.9}"), "none of the cluster's 2 nodes has an address of this host"},
	} {
		t.Run(row.id+" "+row.what, func(t *testing.T) {
			w := healthy()
			row.change(w)
			results, _ := w.examine(t, one(t, row.id))
			if r := results[row.id]; r.Status != Skip || !strings.Contains(texts(r), row.says) {
				t.Errorf("%s, and it does not say %q:\n%s", r.Status, row.says, texts(r))
			}
		})
	}
}

// Nothing is sent unless a check that sends was named, and of many nodes a few are asked.
func TestProbesAreFew(t *testing.T) {
	sent := 0
	counting := func(w *world) {
		all := w.wire.way
		w.wire.way = func(space string, to netip.Addr) (link.Way, error) { sent++; return all(space, to) }
	}
	w := healthy()
	counting(w)
	chosen, err := Select(Checks(), nil, Info)
	if err != nil {
		t.Fatal(err)
	}
	w.examine(t, chosen)
	if sent > 0 || len(chosen)+len(probeChecks) != len(Checks()) {
		t.Errorf("%d probes, though none was asked for, in %d checks", sent, len(chosen))
	}
	many(100, "{apiVersion: v1, kind: Node, metadata: {name: m%[1]d}, status: {addresses: [{type: InternalIP, address: 192.0.2.%[1]d}, {type: InternalIP, address: \"fd00::%[1]d\"}]}}")(w)
	w.node.devices[0].Addresses = append(w.node.devices[0].Addresses, netip.MustParseAddr("fd00::f:1"))
	h := w.host(t, nil)
	var text strings.Builder
	f := &Facts{}
	cluster, err := ReadCluster(t.Context(), w, one(t, "PR-01"), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	h.wire.way = healthyWire().way
	if err := h.Probe(t.Context(), f.With(cluster), one(t, "PR-01"), &text); err != nil {
		t.Fatal(err)
	}
	if n := len(f.probed.all); n > 2*mostPeers+1 || n < 2*mostPeers-1 || !strings.Contains(text.String(), fmt.Sprintf("send %d probes", n)) {
		t.Errorf("%d probes: %s", n, text.String())
	}
	if r := Run(f, one(t, "PR-01"))[0]; !strings.Contains(texts(r), "of 101 other nodes") {
		t.Errorf("it does not say how few were asked:\n%s", texts(r))
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	if err := h.Probe(ctx, f, one(t, "PR-01"), io.Discard); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Error(err)
	}
}

// Every node asks some others, and each is asked by as many.
func TestPeersAreSpread(t *testing.T) {
	var nodes []node
	for i := range 40 {
		nodes = append(nodes, node{Metadata: meta{Name: fmt.Sprintf("n%02d", i)}})
	}
	asked := map[string]int{}
	for i := range nodes {
		for _, peer := range peersOf(nodes, &nodes[i]) {
			asked[peer.Metadata.Name]++
		}
	}
	for _, n := range nodes {
		if asked[n.Metadata.Name] != mostPeers {
			t.Errorf("%s is asked by %d nodes, not %d", n.Metadata.Name, asked[n.Metadata.Name], mostPeers)
		}
	}
}
