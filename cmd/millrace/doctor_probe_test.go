package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/kernel/netns"
)

// twoNodes is a ward whose node has a neighbour, n2, with pods behind it: name servers and
// a program. The ward's pod is another, on n1. nftables on n1 is the proxy.
type twoNodes struct {
	*ward
	far, web, folder string
	objects          string
	// broken says that the second name server has lost the API.
	broken atomic.Bool
}

const twoNodesObjects = `
apiVersion: v1
kind: Node
metadata: {name: n1, uid: u}
spec: {podCIDR: 10.9.0.0/24}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: "fd00:2::1"}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2, uid: u}
spec: {podCIDR: 10.244.1.0/24}
status: {addresses: [{type: InternalIP, address: 192.0.2.2}, {type: InternalIP, address: "fd00:2::2"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, uid: u}
spec: {nodeName: n1}
status: {phase: Running, podIPs: [{ip: 10.9.0.2}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u, labels: {app: web}}
spec: {nodeName: n2}
status: {phase: Running, podIPs: [{ip: 10.244.1.5}, {ip: "fd00:244:1::5"}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: kubernetes, namespace: default, uid: u}
spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], ports: [{port: 443}]}
---
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system, uid: u}
spec: {clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10], selector: {k8s-app: kube-dns}, ports: [{name: dns, protocol: UDP, port: 53}, {name: dns-tcp, protocol: TCP, port: 53}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns-1, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
ports: [{name: dns, protocol: UDP, port: 53}, {name: dns-tcp, protocol: TCP, port: 53}]
endpoints:
- {addresses: [10.244.1.5], nodeName: n2, targetRef: {kind: Pod, name: coredns-1, namespace: kube-system}}
- {addresses: [10.244.1.6], nodeName: n2, targetRef: {kind: Pod, name: coredns-2, namespace: kube-system}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, uid: u}
spec: {type: LoadBalancer, externalIPs: [198.51.100.8], clusterIP: 10.96.0.20, clusterIPs: [10.96.0.20], selector: {app: web}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
status: {loadBalancer: {ingress: [{ip: 198.51.100.7}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
ports: [{name: "", protocol: TCP, port: 8080}]
endpoints:
- {addresses: [10.244.1.5], nodeName: n2, targetRef: {kind: Pod, name: web, namespace: shop}}
`

func newTwoNodes(t *testing.T) *twoNodes {
	t.Helper()
	w := newWard(t)
	n := &twoNodes{ward: w, folder: t.TempDir(), objects: twoNodesObjects}
	n.far, n.web = filepath.Join(n.folder, "far"), filepath.Join(n.folder, "web")
	for _, path := range []string{n.far, n.web} {
		n.must(netns.Create(path))
		t.Cleanup(func() { netns.Remove(path) })
		n.shell(path, "ip link set lo up; sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
	}
	n.shell(n.node, "ip link add up0 type veth peer name up0 netns "+n.far+"; ip addr add 192.0.2.1/24 dev up0; ip addr add fd00:2::1/64 dev up0; ip link set up0 up; "+
		"ip route add default via 192.0.2.2; ip route add 10.244.1.0/24 via 192.0.2.2; sysctl -qw net.ipv6.conf.all.forwarding=1")
	n.shell(n.far, "ip addr add 192.0.2.2/24 dev up0; ip addr add fd00:2::2/64 dev up0; ip link set up0 up; ip route add 10.9.0.0/24 via 192.0.2.1; "+
		"ip link add v1 type veth peer name eth0 netns "+n.web+"; ip link set v1 up; ip addr add 10.244.1.1/24 dev v1; ip addr add fd00:244:1::1/64 dev v1")
	n.shell(n.node, "ip -6 route add fd00:244:1::/64 via fd00:2::2")
	n.shell(n.web, "ip addr add 10.244.1.5/24 dev eth0; ip addr add 10.244.1.6/24 dev eth0; ip addr add fd00:244:1::5/64 dev eth0; ip link set eth0 up; ip route add default via 10.244.1.1; ip -6 route add default via fd00:244:1::1")
	rules := "ip daddr 10.96.0.10 udp dport 53 dnat to 10.244.1.5; ip daddr 10.96.0.10 tcp dport 53 dnat to 10.244.1.5; "
	for _, front := range []string{"10.96.0.20 tcp dport 80", "192.0.2.1 tcp dport 30080", "198.51.100.7 tcp dport 80", "198.51.100.8 tcp dport 80"} {
		rules += "ip daddr " + front + " dnat to 10.244.1.5:8080; "
	}
	n.shell(n.node, "nft 'table ip services { chain in { type nat hook prerouting priority -100; "+rules+" }; chain out { type nat hook output priority -100; "+rules+" }; }'")
	for _, address := range []string{"10.244.1.5:53", "10.244.1.6:53"} {
		n.names(address)
	}
	n.takes("10.244.1.5:8080", func(c net.Conn) { io.Copy(io.Discard, c) })
	return n
}

// takes serves connections to a pod on n2.
func (n *twoNodes) takes(address string, each func(net.Conn)) {
	n.t.Helper()
	var l net.Listener
	n.must(netns.Do(n.web, func() (err error) { l, err = net.Listen("tcp", address); return err }))
	n.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); each(c) }()
		}
	}()
}

// names serves DNS: every name has the address of the API.
func (n *twoNodes) names(address string) {
	n.t.Helper()
	answer := func(query []byte) []byte {
		a := append(slices.Clone(query), 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 96, 0, 1) // RFC 1035, 4.1
		a[2], a[7] = a[2]|0x80, 1
		if n.broken.Load() && strings.HasPrefix(address, "10.244.1.6") {
			a = slices.Clone(query)
			a[2], a[3] = a[2]|0x80, 2 // SERVFAIL
		}
		return a
	}
	var udp net.PacketConn
	n.must(netns.Do(n.web, func() (err error) { udp, err = net.ListenPacket("udp", address); return err }))
	n.t.Cleanup(func() { udp.Close() })
	go func() {
		b := make([]byte, 512)
		for {
			size, from, err := udp.ReadFrom(b)
			if err != nil {
				return
			}
			udp.WriteTo(answer(b[:size]), from)
		}
	}()
	n.takes(address, func(c net.Conn) {
		var length [2]byte
		if _, err := io.ReadFull(c, length[:]); err != nil {
			return
		}
		query := make([]byte, binary.BigEndian.Uint16(length[:]))
		io.ReadFull(c, query)
		text := answer(query)
		c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(text))), text...))
	})
}

// probe runs the checks that send, or some of them, on n1.
func (n *twoNodes) probe(only string) (seen, int) {
	n.t.Helper()
	write(n.t, filepath.Join(n.folder, "objects.yaml"), n.objects)
	return n.doctor(nil, "--source", "dir:"+filepath.Join(n.folder, "objects.yaml"), "--only", only)
}

const dropICMP = "nft 'table inet quiet { chain c { type filter hook output priority 0; icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }; }'"

var probeFaults = []struct {
	id, what string
	inject   func(n *twoNodes)
	status   doctor.Status
	says     string // of the evidence: scope, what was sent, what came back
}{
	{"PR-01", "a node behind a switch that takes less", func(n *twoNodes) {
		n.shell(n.far, "nft 'table inet t { chain c { type filter hook prerouting priority -300; ip length > 1400 drop; ip6 length > 1360 drop; }; }'")
	}, doctor.Fail, "Node n2 ICMP echo to 192.0.2.2 1400 bytes get an answer, and longer ones up to the 1500 of up0 none; nobody says so"},
	{"PR-01", "the same over IPv6", func(n *twoNodes) {
		n.shell(n.far, "nft 'table inet t { chain c { type filter hook prerouting priority -300; ip6 length > 1360 drop; }; }'")
	}, doctor.Fail, "Node n2 ICMP echo to fd00:2::2 1400 bytes get an answer"},
	{"PR-01", "a pod whose node is kept from saying so", func(n *twoNodes) {
		n.shell(n.far, "ip link set v1 mtu 1400; "+dropICMP)
	}, doctor.Fail, "Pod shop/web ICMP echo to 10.244.1.5 from Pod shop/client 1400 bytes get an answer"},
	{"PR-02", "a pod whose node says so", func(n *twoNodes) { n.shell(n.far, "ip link set v1 mtu 1400") }, doctor.Warn,
		"Pod shop/web ICMP echo to 10.244.1.5 192.0.2.2 takes 1400 bytes at most, and up0 sends 1500"},
	{"PR-03", "what was so before", func(n *twoNodes) {
		n.shell(n.far, "ip link set v1 mtu 1400")
		n.probe("PR-02")
		n.shell(n.far, "ip link set v1 mtu 1500")
	}, doctor.Warn, "Pod shop/web ICMP echo to 10.244.1.5 1400 bytes are known of the path, and 1500 get an answer"},
	{"PR-04", "a route that drops", func(n *twoNodes) { n.shell(n.node, "ip route replace blackhole 10.244.1.0/24") }, doctor.Fail,
		"Pod shop/web ICMP echo to 10.244.1.5 its route is of type blackhole"},
	{"PR-04", "a node that is off", func(n *twoNodes) { n.objects = strings.ReplaceAll(n.objects, "192.0.2.2}", "192.0.2.9}") }, doctor.Fail,
		"Node n2 ICMP echo to 192.0.2.9 the next hop, 192.0.2.9 by up0, does not tell its hardware address"},
	{"PR-05", "a route of before", func(n *twoNodes) {
		n.shell(n.far, "ip addr add 192.0.2.3/24 dev up0")
		n.objects = strings.Replace(n.objects, "spec: {nodeName: n2}", "spec: {nodeName: n3}", 1) +
			"---\napiVersion: v1\nkind: Node\nmetadata: {name: n3, uid: u}\nspec: {}\nstatus: {addresses: [{type: InternalIP, address: 192.0.2.3}]}\n"
	}, doctor.Warn, "Pod shop/web ICMP echo to 10.244.1.5 the first step is 192.0.2.2 of node n2, and the pod is on n3"},
	{"PR-06", "a server that loses queries", func(n *twoNodes) {
		n.shell(n.web, "nft 'table inet t { chain c { type filter hook input priority 0; ip daddr 10.244.1.6 udp dport 53 drop; }; }'")
	}, doctor.Fail, "Pod kube-system/coredns-2 DNS query to 10.244.1.6:53/udp no answer to 3 queries of 1 s each"},
	{"PR-06", "a server without TCP", func(n *twoNodes) {
		n.shell(n.web, "nft 'table inet t { chain c { type filter hook input priority 0; ip daddr 10.244.1.6 tcp dport 53 reject with tcp reset; }; }'")
	}, doctor.Warn, "Pod kube-system/coredns-2 DNS query to 10.244.1.6:53/tcp connection refused"},
	{"PR-07", "a proxy that sends to a pod that is gone", func(n *twoNodes) {
		n.shell(n.node, "nft flush table ip services; nft 'table ip services { chain out { ip daddr 10.96.0.10 dnat to 10.244.1.77; }; }'")
	}, doctor.Fail, "Service kube-system/kube-dns DNS query to 10.96.0.10:53/udp"},
	{"PR-07", "a proxy that does not serve pods", func(n *twoNodes) {
		n.shell(n.node, "nft flush chain ip services in; nft 'table inet t { chain c { type filter hook forward priority 0; ip daddr 10.96.0.10 drop; }; }'")
	}, doctor.Fail, "Service kube-system/kube-dns DNS query to 10.96.0.10:53/udp from Pod shop/client no answer to 3 queries of 1 s each; asked directly, 2 of its servers answer"},
	{"PR-08", "a server that lost the API", func(n *twoNodes) { n.broken.Store(true) }, doctor.Fail,
		"Pod kube-system/coredns-2 DNS query to 10.244.1.6:53/udp kubernetes.default.svc.cluster.local.: SERVFAIL, and not NOERROR 10.96.0.1"},
	{"PR-09", "a proxy that knows of no endpoint", func(n *twoNodes) {
		n.shell(n.node, "nft 'table inet t { chain c { type filter hook output priority -200; ip daddr 10.96.0.20 reject with icmp port-unreachable; }; }'")
	}, doctor.Fail, "Service shop/web TCP connection to clusterIP 10.96.0.20:80 connection refused; its endpoint 10.244.1.5:8080, Pod shop/web, takes connections"},
	{"PR-09", "a node port that is filtered", func(n *twoNodes) {
		n.shell(n.node, "nft 'table inet t { chain c { type filter hook output priority -200; ip daddr 192.0.2.1 tcp dport 30080 drop; }; }'")
	}, doctor.Fail, "Service shop/web TCP connection to nodePort 192.0.2.1:30080 no answer in 3.5 s"},
	{"PR-09", "an external address that nobody serves", func(n *twoNodes) {
		n.shell(n.node, "ip route add unreachable 198.51.100.8")
	}, doctor.Warn, "Service shop/web TCP connection to externalIP 198.51.100.8:80 no route to host"},
	{"PR-10", "a program that listens elsewhere", func(n *twoNodes) {
		n.shell(n.web, "nft 'table inet t { chain c { type filter hook input priority 0; tcp dport 8080 reject with tcp reset; }; }'")
	}, doctor.Warn, "Pod shop/web TCP connection to endpoint 10.244.1.5:8080 connection refused, and the endpoint of Service shop/web is ready"},
}

// Each fault between two nodes is found by what is sent; without one nothing is.
func TestDoctorProbesFindFaults(t *testing.T) {
	for _, fault := range probeFaults {
		t.Run(fault.id+" "+fault.what, func(t *testing.T) {
			t.Parallel()
			n := newTwoNodes(t)
			fault.inject(n)
			s, status := n.probe(fault.id)
			for again := 0; s.Checks[0].Status != string(fault.status) && again < 3; again++ {
				s, status = n.probe(fault.id) // answers are late on a busy machine
			}
			found := s.Checks[0]
			if found.Status != string(fault.status) || (status == exitFindings) != (fault.status == doctor.Fail) {
				t.Fatalf("%s, exit status %d, not %s: %+v", found.Status, status, fault.status, found.Evidence)
			}
			if !strings.Contains(evidenceOf(found.Evidence), fault.says) {
				t.Errorf("it does not say %q:\n%s", fault.says, evidenceOf(found.Evidence))
			}
			t.Logf("%+v", found.Evidence)
		})
	}
}

func evidenceOf(all []doctor.Evidence) (text string) {
	for _, e := range all {
		text += fmt.Sprintln(e.Scope, e.Read, e.Value)
	}
	return text
}

// Between two nodes that are well the probes find nothing, of either family, and all four
// types of Services take connections.
func TestDoctorProbesOfHealthyNodes(t *testing.T) {
	n := newTwoNodes(t)
	s, status := n.probe("probe")
	unwell := func() (is bool) {
		for _, c := range s.Checks {
			is = is || c.Status != "ok"
		}
		return is
	}
	for again := 0; unwell() && again < 3; again++ {
		s, status = n.probe("probe") // answers are late on a busy machine
	}
	if status != exitOK || len(s.Checks) != 10 {
		t.Errorf("exit status %d, %d checks", status, len(s.Checks))
	}
	text := ""
	for _, c := range s.Checks {
		if c.Status != "ok" {
			t.Errorf("%s is %s: %+v", c.ID, c.Status, c.Evidence)
		}
		text += evidenceOf(c.Evidence)
	}
	for _, says := range []string{"5 paths to 1 of 1 other nodes", "clusterIP 10.96.0.20:80", "nodePort 192.0.2.1:30080", "load balancer 198.51.100.7:80", "externalIP 198.51.100.8:80", "8 answers to kubernetes.default.svc.cluster.local.: NOERROR 10.96.0.1"} {
		if !strings.Contains(text, says) {
			t.Errorf("it does not say %q:\n%s", says, text)
		}
	}
}

// Nothing is sent unless it is asked for, and what cannot be sent is said.
func TestDoctorProbesThatCannotBe(t *testing.T) {
	n := newTwoNodes(t)
	// What probes send, and not what the kernel does by itself for a new device (RFC 3810).
	n.shell(n.node, `nft 'table inet t { counter sent {}; chain c { type filter hook output priority 0; icmp type echo-request counter name sent
		icmpv6 type echo-request counter name sent; udp dport 53 counter name sent; tcp flags & (syn | ack) == syn counter name sent; }; }'`)
	write(t, filepath.Join(n.folder, "objects.yaml"), n.objects)
	from := "dir:" + filepath.Join(n.folder, "objects.yaml")
	n.doctor(nil, "--source", from)
	n.shell(n.node, "nft list counter inet t sent | grep -q 'packets 0 '")
	s, status := n.doctor(nil, "--only", "probe")
	if status != exitIncomplete || !strings.Contains(evidenceOf(s.Checks[0].Evidence), "no cluster is named") {
		t.Errorf("without objects: exit status %d, %+v", status, s.Checks[0])
	}
	n.objects = strings.ReplaceAll(n.objects, "192.0.2.1}", "192.0.2.77}")
	n.objects = strings.ReplaceAll(n.objects, `"fd00:2::1"`, `"fd00:2::77"`)
	if s, status = n.probe("probe"); status != exitIncomplete || !strings.Contains(evidenceOf(s.Checks[0].Evidence), "none of the cluster's 2 nodes has an address of this host") {
		t.Errorf("on another host: exit status %d, %+v", status, s.Checks[0])
	}
	write(t, filepath.Join(n.folder, "objects.yaml"), twoNodesObjects)
	c := weak(product("doctor", "--source", from, "--only", "probe", "-o", "text"))
	var out strings.Builder
	c.Stdout = &out
	n.must(netns.Do(n.node, c.Start))
	c.Wait()
	n.shell(n.node, "nft list counter inet t sent | grep -q 'packets [1-9]'") // connections take no privilege
	for _, says := range []string{"SKIP  PR-01 PR-02", "open a raw socket, which takes CAP_NET_RAW:", "ok 5"} {
		if !strings.Contains(out.String(), says) {
			t.Errorf("without privileges it does not say %q:\n%s", says, out.String())
		}
	}
}
