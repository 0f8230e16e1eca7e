package service

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/millrace/millrace/model"
)

// portTo is a hostPort of pod shop/NAME.
func portTo(name string, protocol model.Protocol, at, to string) model.HostPort {
	return model.HostPort{Pod: model.Name{Namespace: "shop", Name: name}, Protocol: protocol,
		At: netip.MustParseAddrPort(at), To: netip.MustParseAddrPort(to)}
}

// with is a snapshot that has hostPorts, too.
func with(snapshot *model.Snapshot, ports ...model.HostPort) *model.Snapshot {
	copied := *snapshot
	copied.HostPorts = ports
	return &copied
}

// portsOfTwo are hostPorts of two pods, some of one number at different addresses and
// protocols.
func portsOfTwo(local, second *pod) []model.HostPort {
	at := func(p *pod, port uint16) (string, string) {
		return netip.AddrPortFrom(p.ip4, port).String(), netip.AddrPortFrom(p.ip6, port).String()
	}
	local4, local6 := at(local, 8080)
	names4, names6 := at(local, 5353)
	second4, _ := at(second, 8080)
	return []model.HostPort{
		portTo("local", model.TCP, "0.0.0.0:8088", local4), portTo("local", model.TCP, "[::]:8088", local6),
		portTo("local", model.UDP, "0.0.0.0:53", names4), portTo("local", model.UDP, "[::]:53", names6),
		portTo("local", model.TCP, "127.0.0.1:81", local4), portTo("local", model.TCP, "[::1]:81", local6),
		portTo("second", model.TCP, nodeToClient+":81", second4),
		portTo("local", model.UDP, nodeToClient+":81", names4),
	}
}

// A port of the node leads to the pod, which sees who asks: from elsewhere, from other pods
// and itself, from the node; on both paths, in both families, at one address or all.
func TestHostPorts(t *testing.T) {
	for _, path := range []Path{PathSocket, PathPacket} {
		t.Run(string(path), func(t *testing.T) {
			h := newHarbour(t)
			h.layer = New(Settings{Cgroup: h.layer.settings.Cgroup, Netns: h.NetNS, Pins: h.layer.settings.Pins, Node: "n1", Wire: true, Path: path})
			second := h.pod()
			second.serve("tcp", 81, "own") // what a pod has at its own loopback address
			for name, p := range map[string]*pod{"local": h.local, "second": second} {
				p.serveAll(name)
			}
			node := &pod{v: h.village, netns: h.NetNS}
			cluster := with(&model.Snapshot{Complete: true, Nodes: h.services(nil).Nodes}, portsOfTwo(h.local, second)...)
			h.open(cluster)
			itself4, itself6 := h.local.ip4.String(), h.local.ip6.String() // it connects to itself
			if path == PathPacket {
				itself4, itself6 = nodeToClient, nodeToClient6
			}
			for _, row := range []struct {
				from             *pod
				network, address string
				want             string
			}{
				{h.client, "tcp", nodeToClient + ":8088", "local " + client4},
				{h.client, "tcp", "[" + nodeToClient6 + "]:8088", "local " + client6},
				{h.client, "udp", nodeToClient + ":53", "local " + client4},
				{h.client, "udp", "[" + nodeToClient6 + "]:53", "local " + client6},
				{h.client, "tcp", nodeToClient + ":81", "second " + client4},
				{h.client, "udp", nodeToClient + ":81", "local " + client4},
				{second, "tcp", nodeToClient + ":8088", "local " + second.ip4.String()},
				{second, "tcp", "[" + nodeToOther6 + "]:8088", "local " + second.ip6.String()},
				{second, "udp", nodeToOther + ":53", "local " + second.ip4.String()},
				{h.local, "tcp", nodeToClient + ":81", "second " + h.local.ip4.String()},
				{h.local, "tcp", nodeToClient + ":8088", "local " + itself4},
				{h.local, "tcp", "[" + nodeToClient6 + "]:8088", "local " + itself6},
				{second, "tcp", "127.0.0.1:81", "own 127.0.0.1"},
				{second, "tcp", "[::1]:81", "own ::1"},
				{node, "tcp", "127.0.0.1:8088", "local"},
				{node, "tcp", "127.0.0.1:81", "local"},
				{node, "tcp", "[::1]:81", "local"},
				{node, "tcp", nodeToClient + ":81", "second"},
				{node, "tcp", "[" + nodeToOther6 + "]:8088", "local"},
				{node, "udp", "127.0.0.1:53", "local"},
			} {
				if row.from == h.client && path == PathSocket {
					continue // its sockets are in the cgroup of the test, as no other machine's are
				}
				text := long(row.network, 9000, 100_000)
				line, rest, err := row.from.call(row.network, row.address, text)
				if row.from == node { // comes from whatever address the kernel chooses
					line, _, _ = strings.Cut(line, " ")
				}
				if err != nil || line != row.want || rest != text {
					t.Errorf("%s to %s: %q, %d of %d bytes, %v; want %q", row.network, row.address, line, len(rest), len(text), err, row.want)
				}
			}
			if _, _, err := h.client.call("tcp", nodeToOther+":81", "x"); err == nil {
				t.Error("a port of one address of the node is served at another")
			}
			h.become(&model.Snapshot{Complete: true, Nodes: cluster.Nodes})
			if _, _, err := h.client.call("tcp", nodeToClient+":8088", "x"); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("a port that is gone: %v", err)
			}
			if left := h.have.(*Picture); left.Len() > 0 || len(left.nodeAddresses) > 0 {
				t.Errorf("%d rows are left, node ports at %v", left.Len(), left.nodeAddresses)
			}
		})
	}
}

// A connected UDP socket of the node is steered away when its pod is gone, and stays where
// another pod's port comes and goes.
func TestHostPortsThatGo(t *testing.T) {
	h := newHarbour(t)
	second := h.pod()
	h.local.serveAll("local")
	nodes := &model.Snapshot{Complete: true, Nodes: h.services(nil).Nodes}
	names := portTo("local", model.UDP, "0.0.0.0:53", netip.AddrPortFrom(h.local.ip4, 5353).String())
	h.open(with(nodes, names))
	var conn net.Conn
	h.must(h.Inside(func() (err error) {
		conn, err = net.Dial("udp", nodeToClient+":53")
		return err
	}))
	defer conn.Close()
	for _, ports := range [][]model.HostPort{{names}, {names, portTo("second", model.TCP, "0.0.0.0:80", netip.AddrPortFrom(second.ip4, 80).String())}, {names}} {
		h.become(with(nodes, ports...))
		h.layer.stuck.look()
		if err := exchangeLine(conn, "hello"); err != nil {
			t.Errorf("with %v: %v", ports, err)
		}
	}
	h.become(nodes)
	var err error
	for range 100 { // it rests between two looks
		h.layer.stuck.look()
		if err = exchangeLine(conn, "hello"); errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.EDESTADDRREQ) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("the pod is gone, and its client meets %v", err)
}

// What is planned: hostPorts are no Services, are beside them in any order, and give way
// where a Service has the same address.
func TestPlanOfHostPorts(t *testing.T) {
	web := serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080, "10.244.1.4")
	web.Type, web.Ports[0].NodePort = model.NodePort, 30080
	services := &model.Snapshot{Services: []*model.Service{web}}
	ports := []model.HostPort{
		portTo("db", model.TCP, "192.0.2.1:5432", "10.244.1.5:5432"),
		portTo("db", model.TCP, "0.0.0.0:30080", "10.244.1.5:80"),
		{Protocol: model.UDP, At: netip.MustParseAddrPort("127.0.0.1:53"), To: netip.MustParseAddrPort("10.244.1.6:5353")},
	}
	slices.Reverse(ports)
	for _, step := range []struct {
		have, want *model.Snapshot
		changes    string
	}{
		{services, with(services, ports...), "+ hostPort 127.0.0.1:53/udp -> 10.244.1.6:5353\n" +
			"+ hostPort 192.0.2.1:5432/tcp -> 10.244.1.5:5432, pod shop/db\n"},
		{with(services, ports...), with(&model.Snapshot{}, ports...), "~ hostPort 0.0.0.0:30080/tcp -> 10.244.1.5:80, pod shop/db\n" +
			"- service 10.96.0.1:80/tcp -> 10.244.1.4:8080\n"},
		{with(services, ports...), services, "- hostPort 127.0.0.1:53/udp -> 10.244.1.6:5353\n" +
			"- hostPort 192.0.2.1:5432/tcp -> 10.244.1.5:5432, pod shop/db\n"},
	} {
		if changes := planned(t, step.have, step.want, true); changes != step.changes {
			t.Errorf("the changes are\n%s not\n%s", changes, step.changes)
		}
	}
}

// Where something of the cluster cannot be read, hostPorts of pods that end go all the same,
// also those that an earlier process served: who gets the pod's address next is not to be
// reached by them. Services stay, and so do hostPorts of which nothing was said yet.
func TestHostPortsGoWhateverIsUnread(t *testing.T) {
	l, _ := onFakes(1000)
	web := serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080, "10.244.1.4")
	web.Type, web.Ports[0].NodePort = model.NodePort, 30080
	services := &model.Snapshot{Services: []*model.Service{web}}
	closed := *web
	closed.Ports = slices.Clone(web.Ports)
	closed.Ports[0].Backends = nil
	db, at := portTo("db", model.TCP, "0.0.0.0:5432", "10.244.1.5:5432"), portTo("web", model.TCP, "0.0.0.0:30080", "10.244.1.5:80")
	have, err := l.Read()
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		want    *model.Snapshot
		anew    bool // by another process
		changes string
	}{
		{with(services, db), false, "+ hostPort 0.0.0.0:5432/tcp -> 10.244.1.5:5432, pod shop/db\n+ service 0.0.0.0:30080/tcp -> 10.244.1.4:8080\n+ service 10.96.0.1:80/tcp -> 10.244.1.4:8080\n"},
		{services, false, "- hostPort 0.0.0.0:5432/tcp -> 10.244.1.5:5432, pod shop/db\n"},
		{with(services, db), false, "+ hostPort 0.0.0.0:5432/tcp -> 10.244.1.5:5432, pod shop/db\n"},
		{services, true, ""},
		{with(services, db), true, ""},
		{with(&model.Snapshot{}, db), false, ""},
		{&model.Snapshot{}, false, "- hostPort 0.0.0.0:5432/tcp -> 10.244.1.5:5432, pod shop/db\n"},
		{with(&model.Snapshot{}, at), false, "~ hostPort 0.0.0.0:30080/tcp -> 10.244.1.5:80, pod shop/web\n"},
		{&model.Snapshot{Services: []*model.Service{&closed}}, false, "~ service 0.0.0.0:30080/tcp -> refused, no endpoint serves\n"},
	} {
		if step.anew {
			if have, err = l.Read(); err != nil {
				t.Fatal(err)
			}
		}
		var text strings.Builder
		want := l.Plan(step.want)
		changes := l.Diff(have, want, false)
		if have, _, err = l.Apply(have, want, changes); err != nil || changes.Print(&text) != nil || text.String() != step.changes {
			t.Fatalf("the changes are\n%s not\n%s%v", &text, step.changes, err)
		}
	}
}

// explain names the pod, and says that a pod's own loopback address is nobody's.
func TestHostPortsAreExplained(t *testing.T) {
	snapshot := with(&model.Snapshot{Complete: true, Nodes: []*model.Node{{Name: "n1", Addresses: addrs("192.0.2.1"), PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}}}},
		portTo("db", model.TCP, "0.0.0.0:5432", "10.244.1.5:5432"), portTo("db", model.UDP, "127.0.0.1:53", "10.244.1.5:53"))
	x, err := OpenExplainer(Settings{Node: "n1", Wire: true}, Known{Snapshot: snapshot})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	for _, row := range []struct {
		protocol, from, to string
		verdict            Verdict
		says               string
	}{
		{"tcp", "203.0.113.9", "192.0.2.1:5432", Forward, "192.0.2.1:5432/tcp is a hostPort of pod shop/db. 203.0.113.9 is "},
		{"udp", "127.0.0.1", "127.0.0.1:53", Forward, "127.0.0.1:53/udp is a hostPort of pod shop/db. "},
		{"udp", "10.244.1.7", "127.0.0.1:53", NotAService, "is no address of a Service"},
	} {
		q, err := x.Question(row.protocol, row.from, row.to)
		if err != nil {
			t.Fatal(err)
		}
		e, err := x.Explain(q)
		if err != nil || e.Verdict != row.verdict || !strings.Contains(e.Text, row.says) || e.Service != "" || (e.Pod == "shop/db") != (row.verdict == Forward) || e.Masquerade {
			t.Errorf("%s from %s to %s: %+v, %v", row.protocol, row.from, row.to, e, err)
		}
	}
}
