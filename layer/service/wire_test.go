package service

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/model"
)

// The machines of a harbour: the node, a client somewhere, and another node with a
// pod, at a network of its own. The other node knows no way to the client.
const (
	nodeToClient, nodeToClient6 = "192.0.2.1", "fd00:2::1"
	client4, client6            = "192.0.2.100", "fd00:2::100"
	nodeToOther, nodeToOther6   = "192.0.3.1", "fd00:3::1"
	other4, other6              = "192.0.3.2", "fd00:3::2" // of the other node, that nobody asks
	farPod4, farPod6            = "10.244.2.9", "fd00:244:2::9"
)

// harbour is a node with one pod of its own, where packets come in by wires.
type harbour struct {
	*village
	client, other, local *pod
	line                 func(h *harbour, p *pod) (index int)
}

func newHarbour(t *testing.T) *harbour { return harbourBy(t, (*harbour).cable) }

// harbourBy has the machines at other ends of something else.
func harbourBy(t *testing.T, line func(h *harbour, p *pod) (index int)) *harbour {
	h := &harbour{village: newVillage(t, Settings{Wire: true, Node: "n1", Path: PathPacket}), line: line}
	h.client = h.machine("eth0", []string{nodeToClient + "/24", nodeToClient6 + "/64"}, []string{client4 + "/24", client6 + "/64"})
	h.other = h.machine("eth1", []string{nodeToOther + "/24", nodeToOther6 + "/64"}, []string{farPod4 + "/32", farPod6 + "/128"})
	h.routes(h.NetNS, farPod4+"/32", "eth1", farPod6+"/128", "eth1")
	h.routes(h.other.netns, nodeToOther+"/32", "eth0", nodeToOther6+"/128", "eth0")
	h.routes(h.other.netns, "10.244.1.0/24", nodeToOther, "fd00:244::/64", nodeToOther6)
	// a client that was told to reach the Services' range by this node
	h.routes(h.client.netns, "10.96.0.0/16", nodeToClient, "fd00:96::/64", nodeToClient6, "198.51.100.0/24", nodeToClient)
	h.local = h.pod()
	return h
}

// machine is a network namespace at the far end of a device of the node.
func (h *harbour) machine(device string, here, there []string) *pod {
	h.t.Helper()
	p := &pod{v: h.village, netns: filepath.Join(h.t.TempDir(), device), device: device}
	h.must(netns.Create(p.netns))
	h.t.Cleanup(func() { h.must(netns.Remove(p.netns)) })
	h.sysctl(p.netns, "net.ipv6.conf.all.accept_dad", "0", "net.ipv6.conf.default.accept_dad", "0")
	outer := h.line(h, p)
	for _, a := range here {
		h.must(h.node.Addr(outer, netip.MustParsePrefix(a)))
	}
	h.must(h.node.Up(outer))
	p.has(there...)
	return p
}

// cable leads from the node to a machine's eth0.
func (h *harbour) cable(p *pod) int {
	number := byte(len(p.device)*16) + p.device[len(p.device)-1]
	outer, err := h.node.Veth(link.Veth{Name: p.device, MAC: net.HardwareAddr{2, 0, 0, 2, 0, number}, Peer: "eth0",
		PeerMAC: net.HardwareAddr{2, 0, 0, 3, 0, number}, PeerNamespace: p.netns})
	h.must(err)
	return outer
}

// has gives a machine addresses.
func (p *pod) has(addresses ...string) {
	p.v.t.Helper()
	inner, err := link.Open(p.netns)
	p.v.must(err)
	defer inner.Close()
	p.v.must(inner.UpLoopback())
	eth0, err := inner.Index("eth0")
	p.v.must(err)
	for _, a := range addresses {
		p.v.must(inner.Addr(eth0, netip.MustParsePrefix(a)))
	}
	p.v.must(inner.Up(eth0))
}

// routes adds pairs of range and next hop, or device.
func (h *harbour) routes(path string, pairs ...string) {
	h.t.Helper()
	h.must(netns.Do(path, func() error {
		for i := 0; i < len(pairs); i += 2 {
			to := netip.MustParsePrefix(pairs[i])
			route := &netlink.Route{Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())}}
			if by, err := netip.ParseAddr(pairs[i+1]); err == nil {
				route.Gw = by.AsSlice()
			} else if device, err := netlink.LinkByName(pairs[i+1]); err == nil {
				route.LinkIndex, route.Scope = device.Attrs().Index, netlink.SCOPE_LINK
			}
			if err := netlink.RouteAdd(route); err != nil {
				return fmt.Errorf("route %s via %s: %w", pairs[i], pairs[i+1], err)
			}
		}
		return nil
	}))
}

// services are one Service of every kind of entry, behind these pods.
func (h *harbour) services(change func(*model.Service), pods ...*pod) *model.Snapshot {
	web := serviceOf("web", model.TCP, 80, []string{"10.96.0.1", "fd00:96::1"}, 8080)
	web.Type, web.Ports[0].NodePort = model.LoadBalancer, 30080
	web.LoadBalancerIPs = []netip.Addr{netip.MustParseAddr("198.51.100.7")}
	names := serviceOf("names", model.UDP, 53, []string{"10.96.0.10", "fd00:96::10"}, 5353)
	names.Type, names.Ports[0].NodePort = model.NodePort, 30053
	for _, s := range []*model.Service{web, names} {
		for _, p := range pods {
			s.Ports[0].Backends = append(s.Ports[0].Backends, h.backends(p, s.Ports[0].Protocol)...)
		}
		slices.SortFunc(s.Ports[0].Backends, func(a, b model.Backend) int { return a.Address.Compare(b.Address) })
		if change != nil {
			change(s)
		}
	}
	return &model.Snapshot{Complete: true, Services: []*model.Service{names, web}, Nodes: []*model.Node{
		{Name: "n1", Addresses: addrs(nodeToClient, nodeToClient6, nodeToOther, nodeToOther6), PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}},
		{Name: "n2", Addresses: addrs(other4, other6), PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}},
	}}
}

func addrs(texts ...string) (list []netip.Addr) {
	for _, text := range texts {
		list = append(list, netip.MustParseAddr(text))
	}
	return list
}

func (h *harbour) backends(p *pod, protocol model.Protocol) (list []model.Backend) {
	number, at, node := uint16(8080), []netip.Addr{p.ip4, p.ip6}, "n1"
	if protocol == model.UDP {
		number = 5353
	}
	if p == h.other {
		at, node = addrs(farPod4, farPod6), "n2"
	}
	for _, a := range at {
		list = append(list, model.Backend{Address: netip.AddrPortFrom(a, number), Ready: true, Serving: true, Node: node})
	}
	return list
}

func (p *pod) serveAll(name string) {
	p.serve("tcp", 8080, name)
	p.serve("udp", 5353, name)
}

// entrances are all ways from the client to the Services.
var entrances = []struct{ network, address string }{
	{"tcp", nodeToClient + ":30080"}, {"tcp", "[" + nodeToClient6 + "]:30080"},
	{"udp", nodeToClient + ":30053"}, {"udp", "[" + nodeToClient6 + "]:30053"},
	{"tcp", nodeToOther + ":30080"}, {"tcp", "198.51.100.7:80"},
	{"tcp", "10.96.0.1:80"}, {"udp", "[fd00:96::10]:53"},
}

// reaches checks that every entrance leads the client to a pod that sees it come from
// one of two addresses, with long datagrams and streams of so many bytes.
func (h *harbour) reaches(name, sees4, sees6 string, stream int) {
	h.t.Helper()
	for _, way := range entrances {
		text, want := long(way.network, 9000, stream), name+" "+sees4
		if strings.HasPrefix(way.address, "[") {
			want = name + " " + sees6
		}
		line, rest, err := h.client.call(way.network, way.address, text)
		if err != nil || line != want || rest != text {
			h.t.Errorf("%s to %s: %q, %d of %d bytes, %v; want %q", way.network, way.address, line, len(rest), len(text), err, want)
		}
	}
}

// long is a text for a datagram or a stream.
func long(network string, datagram, stream int) string {
	if network == "tcp" {
		return strings.Repeat("0123456789abcdef", (stream+15)/16)
	}
	return strings.Repeat("x", datagram)
}

// A client elsewhere reaches pods of this node, which see it, and of others, which
// see the node; large transfers and fragments too.
func TestClientsElsewhereReachEveryEntry(t *testing.T) {
	h := newHarbour(t)
	h.routes(h.client.netns, "192.0.3.0/24", nodeToClient)
	h.local.serveAll("local")
	h.other.serveAll("far")
	for _, row := range []struct {
		server       *pod
		name         string
		sees4, sees6 string
		masquerades  bool
	}{
		{server: h.local, name: "local", sees4: client4, sees6: client6},
		{server: h.other, name: "far", sees4: nodeToOther, sees6: nodeToOther6, masquerades: true},
	} {
		snapshot := h.services(nil, row.server)
		if h.layer.datapath == nil {
			h.open(snapshot)
		} else {
			h.become(snapshot)
		}
		h.reaches(row.name, row.sees4, row.sees6, 1<<18)
		if n := h.masqueraded(); (n > 0) != row.masquerades {
			t.Errorf("%s: %d entries of masqueraded flows", row.name, n)
		}
	}
}

// masqueraded counts entries.
func (h *harbour) masqueraded() int {
	h.t.Helper()
	n := 0
	var key datapathTuple
	var value datapathMasquerade
	entries := h.layer.datapath.maps[datapathMapMasquerades].Iterate()
	for entries.Next(&key, &value) {
		n++
	}
	h.must(entries.Err())
	return n
}

// Under externalTrafficPolicy Local the client's address is kept, and where there
// is no endpoint nobody answers; those inside the cluster are led to any.
func TestExternalPolicyLocal(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.other.serveAll("far")
	local := func(s *model.Service) { s.ExternalLocal = true }
	h.open(h.services(local, h.local, h.other))
	for range 8 {
		line, _, err := h.client.call("tcp", nodeToClient+":30080", "hello")
		if err != nil || line != "local "+client4 {
			t.Errorf("with a local endpoint: %q, %v", line, err)
		}
	}
	h.become(h.services(local, h.other))
	if err := h.client.quickly("tcp", nodeToClient+":30080"); !errors.Is(err, errNoAnswer) {
		t.Errorf("without a local endpoint: %v, want no answer", err)
	}
	line, _, err := h.local.call("tcp", nodeToClient+":30080", "hello")
	if err != nil || line != "far "+h.local.ip4.String() {
		t.Errorf("a pod without a local endpoint: %q, %v", line, err)
	}
	h.become(h.services(local))
	if err := h.client.quickly("tcp", nodeToClient+":30080"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("without any endpoint: %v, want ECONNREFUSED", err)
	}
	if _, _, err := h.client.call("udp", nodeToClient+":30053", "hello"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("datagram without any endpoint: %v, want ECONNREFUSED", err)
	}
	description, err := h.layer.Describe()
	h.must(err)
	if description.Reasons["no_local_backend"] == 0 || description.Reasons["no_backend"] == 0 {
		t.Errorf("counted: %v", description.Reasons)
	}
}

var errNoAnswer = errors.New("no answer")

// quickly connects, and waits half a second for an answer.
func (p *pod) quickly(network, address string) error {
	return p.inside(func() error {
		conn, err := net.DialTimeout(network, address, patience/20)
		var late net.Error
		if errors.As(err, &late) && late.Timeout() {
			return errNoAnswer
		}
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// A load balancer's address lets in whom it names; the other entries let in all.
func TestSourceRanges(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	ranges := func(text string) func(*model.Service) {
		return func(s *model.Service) { s.SourceRanges = []netip.Prefix{netip.MustParsePrefix(text)} }
	}
	h.open(h.services(ranges("203.0.113.0/24"), h.local))
	if err := h.client.quickly("tcp", "198.51.100.7:80"); !errors.Is(err, errNoAnswer) {
		t.Errorf("from outside the range: %v, want no answer", err)
	}
	if err := h.client.quickly("tcp", nodeToClient+":30080"); err != nil {
		t.Errorf("by the node port: %v", err)
	}
	h.become(h.services(ranges("192.0.2.64/26"), h.local))
	if err := h.client.quickly("tcp", "198.51.100.7:80"); err != nil {
		t.Errorf("from inside the range: %v", err)
	}
	h.become(h.services(nil, h.local))
	if err := h.client.quickly("tcp", "198.51.100.7:80"); err != nil {
		t.Errorf("without ranges: %v", err)
	}
	if n := len(h.layer.tables.mustRanges(h.t)); n != 0 {
		t.Errorf("%d ranges left", n)
	}
}

func (t *tables) mustRanges(test *testing.T) map[datapathSourceRangeKey]uint8 {
	all, err := t.ranges.All()
	if err != nil {
		test.Fatal(err)
	}
	return all
}

// A client stays with its endpoint while it comes back in time.
func TestAffinity(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	second := h.pod()
	second.serveAll("second")
	h.other.serveAll("far")
	stays := func(s *model.Service) { s.Affinity = 3 * time.Hour }
	h.open(h.services(stays, h.local, second, h.other))
	for _, way := range []struct{ network, address string }{
		{"tcp", nodeToClient + ":30080"}, {"udp", nodeToClient + ":30053"}, {"tcp", "[" + nodeToClient6 + "]:30080"},
	} {
		seen := map[string]bool{}
		for range 20 {
			line, _, err := h.client.call(way.network, way.address, "hello")
			if err != nil {
				t.Fatal(err)
			}
			name, _, _ := strings.Cut(line, " ")
			seen[name] = true
		}
		if len(seen) != 1 {
			t.Errorf("%s to %s: one client met %v", way.network, way.address, seen)
		}
	}
	seen := map[string]bool{}
	for range 20 { // by its sockets
		line, _, err := second.call("tcp", "10.96.0.1:80", "hello")
		if err != nil {
			t.Fatal(err)
		}
		name, _, _ := strings.Cut(line, " ")
		seen[name] = true
	}
	if len(seen) != 1 {
		t.Errorf("one pod met %v", seen)
	}
}

// Routers and endpoints that report errors are understood by a client elsewhere,
// and by an endpoint elsewhere.
func TestErrorsAboutMasqueradedPackets(t *testing.T) {
	h := newHarbour(t)
	h.open(h.services(nil, h.other))
	for _, way := range entrances[:4] {
		if _, _, err := h.client.call(way.network, way.address, "anybody?"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s to %s: %v, want the endpoint's ECONNREFUSED", way.network, way.address, err)
		}
	}
	h.other.serveAll("far")
	h.must(h.Inside(func() error {
		device, err := netlink.LinkByName("eth1")
		for _, to := range addrs(farPod4, farPod6) {
			err = errors.Join(err, netlink.RouteReplace(&netlink.Route{LinkIndex: device.Attrs().Index, Scope: netlink.SCOPE_LINK,
				MTU: 1300, MTULock: true, Dst: &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}}))
		}
		return err
	}))
	for _, way := range entrances[:2] {
		text := strings.Repeat("z", 100_000)
		if _, rest, err := h.client.call(way.network, way.address, text); err != nil || rest != text {
			t.Errorf("%s over a smaller MTU: %d bytes, %v", way.address, len(rest), err)
		}
	}
}

// What is switched off is gone: programs, node ports and ranges.
func TestWireIsTakenAway(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.open(h.services(nil, h.local))
	if err := h.client.quickly("tcp", nodeToClient+":30080"); err != nil {
		t.Fatal(err)
	}
	h.layer.planner.last, h.layer.settings.Wire, h.layer.settings.Path = nil, false, PathSocket
	h.become(h.services(func(s *model.Service) { s.Ports[0].NodePort = 0 }, h.local))
	for range 2 { // what is busy waits
		h.must(clearFlows(h.layer.datapath))
		h.become(h.services(func(s *model.Service) { s.Ports[0].NodePort = 0 }, h.local))
	}
	known, err := h.layer.datapath.readNodeAddresses()
	h.must(err)
	if len(known)+len(h.layer.datapath.ports) != 0 {
		t.Errorf("left: %v, at %v", known, h.layer.datapath.ports)
	}
}

// clearFlows forgets all flows of the packet path.
func clearFlows(d *datapath) error {
	zero := uint32(0)
	return d.maps[datapathMapFlowUsage].Put(zero, datapathUsage{})
}

// A pod is the same client by its sockets and by its packets, and so is the node.
func TestAffinityIsTheSameOnBothPaths(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.other.serveAll("far")
	client := h.pod()
	defer client.stay()()
	stays := func(s *model.Service) { s.Affinity = time.Hour }
	h.open(h.services(stays, h.local, h.other))
	byPackets, _, err := client.call("tcp", "10.96.0.1:80", "hello")
	h.must(err)
	sockets := func(s *model.Service) {
		stays(s)
		s.Annotations = map[string]string{PathAnnotation: string(PathSocket)}
	}
	h.become(h.services(sockets, h.local, h.other))
	for range 12 {
		bySockets, _, err := client.call("tcp", "10.96.0.1:80", "hello")
		if err != nil || bySockets != byPackets {
			t.Errorf("by its packets the pod met %q, by its sockets %q, %v", byPackets, bySockets, err)
		}
	}
	read, err := h.layer.Read() // as a drift check does
	h.must(err)
	if changes := h.layer.Diff(read, h.layer.Plan(h.services(sockets, h.local, h.other)), true); len(changes) > 0 {
		t.Errorf("what was read is to be changed: %v", changes)
	}
	if n := h.layer.datapath.affinityCount(t); n != 1 {
		t.Errorf("%d affinities of one client", n)
	}
}

// The first Service that asks who its clients are knows those that are there: none of
// them gets another endpoint a moment later.
func TestTheFirstServiceWithAffinityKnowsItsClients(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.other.serveAll("far")
	client := h.pod()
	defer client.stay()() // a process, by which its namespace is found
	h.layer.settings.Path = PathSocket
	h.open(h.services(nil, h.local, h.other))
	stays := h.services(func(s *model.Service) { s.Affinity = time.Hour }, h.local, h.other)
	h.become(stays)
	for _, address := range []string{"10.96.0.1:80", "[fd00:96::1]:80"} {
		first, _, err := client.call("tcp", address, "hello")
		h.must(err)
		h.become(stays)
		for range 12 {
			again, _, err := client.call("tcp", address, "hello")
			if err != nil || again != first {
				t.Fatalf("%s: the pod met %q, then %q, %v", address, first, again, err)
			}
		}
	}
	if n := h.layer.datapath.affinityCount(t); n != 2 {
		t.Errorf("%d affinities of one client at two addresses", n)
	}
}

// A pod that asks before its address is known keeps the endpoint that it got.
func TestAClientThatWasUnknownKeepsItsEndpoint(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.other.serveAll("far")
	h.layer.settings.Path = PathSocket
	stays := h.services(func(s *model.Service) { s.Affinity = time.Hour }, h.local, h.other)
	h.open(stays)
	client := h.pod() // whose namespace nobody finds yet
	ways := []string{"10.96.0.1:80", "[fd00:96::1]:80"}
	var first []string
	for _, address := range ways {
		line, _, err := client.call("tcp", address, "hello")
		h.must(err)
		first = append(first, line)
	}
	defer client.stay()()
	h.layer.datapath.looked = lookedAt{}
	h.become(stays)
	for i, address := range ways {
		if line, _, err := client.call("tcp", address, "hello"); err != nil || line != first[i] {
			t.Errorf("%s: the pod met %q, then %q, %v", address, first[i], line, err)
		}
	}
	if n := h.layer.datapath.affinityCount(t); n != len(ways) {
		t.Errorf("%d affinities of one client at %d addresses", n, len(ways))
	}
	known, err := h.layer.datapath.readClients()
	h.must(err)
	if !slices.ContainsFunc(known, func(c knownClient) bool { return c.ip4 == client.ip4 }) {
		t.Errorf("the pod is still unknown: %v", known)
	}
}

func (d *datapath) affinityCount(t *testing.T) (n int) {
	var key datapathAffinityKey
	var value datapathAffinity
	entries := d.maps[datapathMapAffinities].Iterate()
	for entries.Next(&key, &value) {
		n++
	}
	if err := entries.Err(); err != nil {
		t.Fatal(err)
	}
	return n
}

// What is remembered of clients goes with its time and with its endpoint, however long
// that time would be; but a client that comes back while it is cleared away keeps what
// it has.
func TestAffinitiesAreForgotten(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket})
	client, server := v.pod(), v.pod().servesAll("server")
	long := func(pods ...*pod) *model.Snapshot {
		s := dnsAt(pods...)
		for _, service := range s.Services {
			service.Affinity = 3 * time.Hour
		}
		return s
	}
	defer client.stay()()
	v.open(long(server))
	v.become(long(server)) // clients are looked for when somebody asks
	v.callAll(client.netns)
	d := v.layer.datapath
	v.sweep()
	if n := d.affinityCount(t); n != 4 {
		t.Fatalf("%d affinities of one client at four addresses", n)
	}
	var key datapathAffinityKey
	var value datapathAffinity
	for entries := d.maps[datapathMapAffinities].Iterate(); entries.Next(&key, &value); {
		v.must(d.forgetAffinity(key, value.Until))
	}
	if n := d.affinityCount(t); n != 4 {
		t.Errorf("%d affinities are left of four that had been renewed when they were cleared away", n)
	}
	v.must(d.forgetAffinity(key, value.Until+1))
	if n := d.affinityCount(t); n != 3 {
		t.Errorf("%d affinities are left, one of four was over", n)
	}
	v.become(&model.Snapshot{Complete: true})
	v.sweep()
	if n := d.affinityCount(t); n != 0 {
		t.Errorf("%d affinities are left of Services that were deleted", n)
	}
}
