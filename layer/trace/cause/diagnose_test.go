package cause

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// testdata holds what was seen in real runs, with what cannot matter left out (see
// TestTakeEvidence): CAUSE.json or CAUSE.VARIANT.json, and none.*.json of healthy runs.
// Each must be named so, and nothing else: so each is also a case in which all the
// other causes are not named.
func TestRecordedRuns(t *testing.T) {
	named := map[string]bool{}
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) < 50 {
		t.Fatalf("%d recorded runs, %v", len(files), err)
	}
	for _, name := range files {
		want, _, _ := strings.Cut(filepath.Base(name), ".")
		verdicts := Diagnose(load(t, name))
		if want == "none" {
			for _, v := range verdicts {
				t.Errorf("%s: all is well, and there is a verdict: %s: %s", name, v.Cause, v.Title)
			}
			continue
		}
		named[want] = true
		if len(verdicts) == 0 {
			t.Errorf("%s: no verdict", name)
		}
		for _, v := range verdicts {
			if v.Cause != want {
				t.Errorf("%s: %s is named: %s", name, v.Cause, v.Title)
			}
			complete(t, name, v)
		}
	}
	for _, c := range written() {
		named[c.cause] = true
	}
	for _, id := range constants(t) {
		if !named[id] {
			t.Errorf("%s is named in no test", id)
		}
	}
}

// complete says what a verdict lacks.
func complete(t *testing.T, name string, v Verdict) {
	t.Helper()
	for what, text := range map[string]string{"title": v.Title, "fix": v.Fix, "undo": v.Undo, "owner": v.Owner, "namespace": v.Where.Namespace, "confidence": string(v.Confidence)} {
		if text == "" {
			t.Errorf("%s: %s has no %s", name, v.Cause, what)
		}
	}
	if len(v.Evidence) == 0 {
		t.Errorf("%s: %s has no evidence", name, v.Cause)
	}
	if len(v.Not) == 0 && v.Cause != Unexplained {
		t.Errorf("%s: %s does not say what it is not", name, v.Cause)
	}
	for _, text := range append(append([]string{v.Title, v.Fix, v.Undo, v.Owner}, v.Evidence...), v.Not...) {
		if strings.Contains(text, "%!") || strings.Contains(text, "  ") || strings.Contains(text, "invalid IP") || strings.Contains(text, "invalid AddrPort") {
			t.Errorf("%s: %s says %q", name, v.Cause, text)
		}
	}
}

func load(t *testing.T, name string) *Evidence {
	t.Helper()
	raw, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	e := &Evidence{}
	if err := json.Unmarshal(raw, e); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return e
}

// Whatever the order in which things were read, the verdicts are the same.
func TestOrderDoesNotMatter(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.json")
	causes := func(e *Evidence) (all []string) {
		for _, v := range Diagnose(e) {
			all = append(all, v.Cause+" "+v.Where.Namespace)
		}
		slices.Sort(all)
		return all
	}
	for _, name := range files {
		straight, turned := load(t, name), load(t, name)
		slices.Reverse(turned.Events)
		slices.Reverse(turned.Spaces)
		slices.Reverse(turned.Paths)
		if a, b := causes(straight), causes(turned); !slices.Equal(a, b) {
			t.Errorf("%s: %v, and the other way round %v", name, a, b)
		}
	}
}

// drop is an event made by hand.
func drop(reason, location string, count uint64) Event {
	return Event{Kind: Drop, Space: 1, Count: count, Reason: reason, Location: location, Device: "eth0", Index: 2, Last: time.Second,
		Tuple: Tuple{Protocol: protoTCP, EtherType: etherIP, TCPFlags: flagSYN,
			Source: netip.MustParseAddrPort("192.0.2.1:40000"), Destination: netip.MustParseAddrPort("192.0.2.2:80")}}
}

func again() Event {
	e := drop("", "", 3)
	e.Kind, e.OldState = Retransmit, tcpSynSent
	return e
}

func space(change func(*Space)) *Space {
	s := &Space{Inode: 1, Name: "web", Settings: map[string]string{}, Enter: "ip netns exec web"}
	s.After.Links = []Link{{Index: 2, Name: "eth0", Up: true, Carrier: true, MTU: 1500, Statistics: map[string]uint64{}}}
	if change != nil {
		change(s)
	}
	return s
}

// handwritten is a case that no run made.
type handwritten struct {
	name, cause string // "" if nothing is to be named
	evidence    Evidence
}

// written are the causes that the lab does not induce, and what must not be taken for one.
func written() []handwritten {
	one := func(change func(*Space), events ...Event) Evidence {
		return Evidence{Spaces: []*Space{space(change)}, Events: events}
	}
	port := func(s *Space) {
		s.After.Links = append(s.After.Links, Link{Index: 3, Name: "br0", Kind: "bridge", Up: true, Carrier: true})
		s.After.Links[0].Master, s.After.Links[0].PortState = 3, "blocking"
	}
	fragment, echo, reset, late := drop("SOCKET_FILTER", "sk_filter_trim_cap", 4), drop("SOCKET_FILTER", "raw_rcv", 9), drop("NETFILTER_DROP", "nft_do_chain", 2), drop("NO_SOCKET", "tcp_v4_rcv", 8)
	fragment.Tuple.Protocol = protoUDP
	echo.Tuple.Protocol = protoICMP
	reset.Tuple.TCPFlags, late.Tuple.TCPFlags = flagRST, flagACK
	answer := drop("NO_SOCKET", "__udp4_lib_rcv", 3)
	answer.Tuple = Tuple{Protocol: protoUDP, EtherType: etherIP, Source: netip.MustParseAddrPort("192.0.2.1:53"), Destination: netip.MustParseAddrPort("192.0.2.2:41000")}
	group := drop("NETFILTER_DROP", "nft_do_chain", 30)
	group.Tuple = Tuple{Protocol: protoUDP, EtherType: etherIP, Source: netip.MustParseAddrPort("192.0.2.1:5353"), Destination: netip.MustParseAddrPort("224.0.0.251:5353")}
	traced := drop("IP_INHDR", "ip_forward", 3)
	traced.Packet = []byte{0x45, 0, 0, 40, 0, 0, 0, 0, 1, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2}
	to := func(e Event, source, destination string) Event {
		e.Tuple.Source, e.Tuple.Destination = netip.MustParseAddrPort(source), netip.MustParseAddrPort(destination)
		if e.Tuple.Destination.Addr().Is6() {
			e.Tuple.EtherType = etherIP6
		}
		return e
	}
	datagram := func(e Event) Event { e.Tuple.Protocol = protoUDP; return e }
	probe := datagram(to(traced, "192.0.2.1:40000", "198.51.100.2:33436"))
	probe.Count = 9
	probeEnd := datagram(to(drop("NO_SOCKET", "__udp4_lib_rcv", 9), "192.0.2.1:40000", "192.0.2.2:33437"))
	redirect := drop("NETFILTER_DROP", "nf_hook_slow", 9)
	redirect.Tuple.Protocol, redirect.Tuple.ICMPType, redirect.Stack = protoICMP, 5, []string{"__ip_local_out"}
	looped := to(drop("NETFILTER_DROP", "nf_hook_slow", 9), "127.0.0.1:40000", "192.0.2.9:8080")
	looped.Stack = []string{"__ip_local_out"}
	loDown := to(drop("QDISC_DROP", "__dev_queue_xmit", 9), "127.0.0.1:40000", "127.0.0.1:80")
	loDown.Device, loDown.Index = "lo", 1
	answered := to(drop("NO_SOCKET", "tcp_v4_rcv", 4), "192.0.2.9:8080", "192.0.2.1:40000")
	answered.Tuple.TCPFlags = flagSYN | flagACK
	told := datagram(to(drop("NO_SOCKET", "__udp4_lib_rcv", 4), "192.0.2.9:53", "192.0.2.1:40000"))
	blocked := drop("XFRM_POLICY", "tcp_v4_rcv", 4)
	off := to(drop("IPV6DISABLED", "ip6_rcv_core", 4), "[2001:db8::1]:40000", "[2001:db8::2]:80")
	offAgain := to(again(), "[2001:db8::1]:40000", "[2001:db8::2]:80")
	marked := drop("NOT_SPECIFIED", "ip_error", 4)
	reset2 := to(drop("TCP_ABORT_ON_CLOSE", "tcp_close", 9), "192.0.2.1:40000", "192.0.2.2:80")
	reset2.Kind = ResetSent
	opened, hurt := again(), again()
	opened.Kind, opened.OldState, opened.NewState = StateChange, tcpSynSent, tcpEstablished
	hurt.Kind, hurt.Errno = SocketError, eCONNRESET
	big := drop("PKT_TOO_BIG", "ip_forward", 2)
	flooded := drop("OTHERHOST", "ip_rcv_core", 7)
	return append(append(outside(), precise()...), []handwritten{
		{"a port's spanning tree", BridgePortBlocked, one(port, drop("BRIDGE_INGRESS_STP_STATE", "br_handle_frame", 5))},
		{"no memory", MemoryShort, one(nil, drop("NOMEM", "tcp_v4_rcv", 5))},
		{"a processor", BacklogFull, one(nil, drop("CPU_BACKLOG", "enqueue_to_backlog", 5))},
		{"millrace", ServiceDrop, one(func(s *Space) {
			s.Programs = []Program{{ID: 7, Name: "from_pod", Type: "sched_cls", Hook: "tc ingress", Device: "eth0", Owner: "millrace"}}
		}, drop("TC_INGRESS", "__netif_receive_skb_core", 5))},
		{"nobody knows", Unexplained, one(nil, drop("DEV_HDR", "tun_get_user", 5), again())},
		{"a filter of UDP", SocketFilterDrop, one(nil, fragment)},
		{"loopback is down", LinkDown, one(func(s *Space) {
			s.After.Links = append(s.After.Links, Link{Index: 1, Name: "lo", Statistics: map[string]uint64{}})
		}, loDown)},
		{"a NodePort asked for at localhost", MartianSource, one(nil, looped)},
		{"an answer that was not translated back", OtherAnswer, one(nil, answered, again())},
		{"a server of datagrams with two addresses", OtherAnswer, one(func(s *Space) {
			s.After.Sockets = []Socket{{Protocol: protoUDP, Local: netip.MustParseAddrPort("192.0.2.1:40000"), Remote: netip.MustParseAddrPort("192.0.2.2:53")}}
		}, told)},
		{"a policy of IPsec", IPsecPolicy, one(func(s *Space) {
			s.Policies = []Policy{{To: netip.MustParsePrefix("192.0.2.2/32"), Protocol: protoTCP, Text: "src 0.0.0.0/0 dst 192.0.2.2/32 proto 6 dir in"}}
		}, blocked)},
		{"IPv6 is off", IPv6Off, one(nil, off, offAgain)},
		{"a table that a mark leads to", RouteBlackhole, one(func(s *Space) {
			s.Routes = []Route{{Type: "blackhole", To: netip.MustParsePrefix("0.0.0.0/0"), Text: "blackhole default table 200"}}
		}, marked)},
		{"ports that are isolated", BridgePortBlocked, isolatedPorts()},
		{"a question through a tunnel that a firewall blocks", FirewallDrop, tunnelled()},
		{"a client that closes with data unread", "", one(nil, reset2, opened, hurt)},
		{"traceroute with many probes", "", one(nil, probe)},
		{"the end of traceroute", "", one(nil, probeEnd)},
		{"a redirect that translation drops", "", one(nil, redirect)},
		{"nobody suffers", "", one(nil, drop("DEV_HDR", "tun_get_user", 5))},
		{"once", "", one(nil, drop("DEV_HDR", "tun_get_user", 1), again())},
		{"two pings at once", "", one(nil, echo)},
		{"the end of a connection", "", one(nil, reset)},
		{"a segment that comes late", "", one(nil, late)},
		{"an answer that comes late", "", one(nil, answer)},
		{"to a group", "", one(nil, group)},
		{"traceroute", "", one(nil, traced)},
		{"discovery of the path MTU", "", one(nil, big)},
		{"a bridge floods", "", one(nil, flooded)},
		{"a short burst", "", one(func(s *Space) {
			s.After.Counters = map[string]uint64{"TcpExt.ListenOverflows": 1, "TcpExt.ListenDrops": 1}
		})},
		{"a resolver without IPv6", "", Evidence{Spaces: []*Space{space(nil)}, Events: []Event{{Kind: CallFailed, Space: 1, Count: 9, Call: "connect", Errno: eNETUNREACH,
			Tuple: Tuple{Protocol: protoUDP, EtherType: etherIP6, Destination: netip.MustParseAddrPort("[2001:db8::1]:80")}}},
			Paths: []Path{{Space: 1, Destination: netip.MustParseAddr("2001:db8::1"), Errno: eNETUNREACH}}}},
	}...)
}

// isolatedPorts are two pods at a bridge whose ports are isolated from each other.
func isolatedPorts() Evidence {
	pod := func(inode uint32, name, address string, port int) *Space {
		s := space(func(s *Space) { s.Inode, s.Name = inode, name })
		s.After.Links[0].Kind, s.After.Links[0].Peer, s.After.Links[0].PeerSpace = "veth", port, 3
		s.Addrs = []Addr{{Index: 2, Prefix: netip.MustParsePrefix(address)}}
		return s
	}
	node := space(func(s *Space) { s.Inode, s.Name = 3, "node" })
	node.After.Links = []Link{{Index: 9, Name: "cni0", Kind: "bridge", Up: true, Carrier: true}}
	for i, inode := range []uint32{1, 2} {
		node.After.Links = append(node.After.Links, Link{Index: 4 + i, Name: fmt.Sprint("veth", i), Kind: "veth", Up: true, Carrier: true, Master: 9,
			PortState: "forwarding", Isolated: true, Peer: 2, PeerSpace: inode})
	}
	return Evidence{Spaces: []*Space{pod(1, "a", "192.0.2.1/24", 4), pod(2, "b", "192.0.2.2/24", 5), node}, Events: []Event{drop("NEIGH_FAILED", "neigh_invalidate", 4), again()}}
}

// tunnelled is a neighbour that is asked for through a tunnel whose packets a rule drops.
func tunnelled() Evidence {
	s := space(nil)
	s.After.Links = append(s.After.Links, Link{Index: 5, Name: "vx0", Kind: "vxlan", Up: true, Carrier: true,
		VXLAN: &VXLAN{ID: 1, Port: 4789, Peers: map[string][]netip.Addr{"": {netip.MustParseAddr("198.51.100.2")}}}})
	inside, outside := drop("NEIGH_FAILED", "neigh_invalidate", 4), drop("NETFILTER_DROP", "nft_do_chain", 9)
	inside.Device, inside.Index = "vx0", 5
	outside.Tuple = Tuple{Protocol: protoUDP, EtherType: etherIP, Source: netip.MustParseAddrPort("198.51.100.1:50000"), Destination: netip.MustParseAddrPort("198.51.100.2:4789")}
	return Evidence{Spaces: []*Space{s}, Events: []Event{inside, outside, again()}}
}

func TestWrittenCases(t *testing.T) {
	for _, c := range written() {
		verdicts := Diagnose(&c.evidence)
		switch {
		case c.cause == "" && len(verdicts) > 0:
			t.Errorf("%s: %s is named: %s", c.name, verdicts[0].Cause, verdicts[0].Title)
		case c.cause != "" && (len(verdicts) != 1 || verdicts[0].Cause != c.cause):
			t.Errorf("%s: %v is named, not %s", c.name, verdicts, c.cause)
		case c.cause != "":
			complete(t, c.name, verdicts[0])
		}
	}
}

// What is said of nothing is nothing.
func TestNothing(t *testing.T) {
	if v := Diagnose(&Evidence{}); len(v) > 0 {
		t.Errorf("no evidence, and %v", v)
	}
}

// A checksum is wrong if it is, and not where a device is to fill it in.
func TestWrongSum(t *testing.T) {
	packet := []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0x30, 0x39, 0, 53, 0, 8, 0, 0}
	put := func(at int, sum uint32) { packet[at], packet[at+1] = byte(sum>>8), byte(sum) }
	put(10, ^summed(0, packet[:20])&0xffff)
	pseudo := summed(17+8, packet[12:20])
	put(26, ^summed(pseudo, packet[20:])&0xffff)
	e := &Event{Packet: packet}
	if got := e.wrongSum(); got != "" {
		t.Errorf("right sums: %q is wrong", got)
	}
	put(26, pseudo)
	if got := e.wrongSum(); got != "" {
		t.Errorf("a sum that is to be completed: %q is wrong", got)
	}
	put(26, 0x1234)
	if got := e.wrongSum(); got != "UDP" {
		t.Errorf("a wrong sum of UDP: %q", got)
	}
	e.Partial = true
	if got := e.wrongSum(); got != "" {
		t.Errorf("a device fills it in: %q is wrong", got)
	}
	packet[11]++
	if got := e.wrongSum(); got != "IP" {
		t.Errorf("a wrong sum of the header: %q", got)
	}
}

// TestTakeEvidence makes testdata from a folder in which MILLRACE_TRACE_EVIDENCE left
// what was seen: files whose names are those of testdata. What cannot matter is left out.
func TestTakeEvidence(t *testing.T) {
	folder := os.Getenv("MILLRACE_TAKE_EVIDENCE")
	if folder == "" {
		return
	}
	files, _ := filepath.Glob(folder + "/*.json")
	for _, name := range files {
		e := load(t, name)
		reduce(e)
		raw, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		var tree any
		if err := json.Unmarshal(raw, &tree); err != nil {
			t.Fatal(err)
		}
		if raw, err = json.Marshal(prune(tree)); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join("testdata", filepath.Base(name)), append(raw, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func reduce(e *Evidence) {
	moved := func(before, after map[string]uint64) {
		for name := range after {
			if before[name] == after[name] {
				delete(before, name)
				delete(after, name)
			}
		}
	}
	e.Events = slices.DeleteFunc(e.Events, func(o Event) bool {
		return o.Tuple.Destination.Addr().IsMulticast() && (!isDiscovery(&o) || o.Location == "ip6_mc_input") || o.Reason == "QUEUE_PURGE"
	})
	for i := range e.Events {
		if o := &e.Events[i]; o.Kind != Drop || o.Reason != "NETFILTER_DROP" {
			o.Packet = o.Packet[:min(len(o.Packet), 80)]
		}
		e.Events[i].Stack = e.Events[i].Stack[:min(len(e.Events[i].Stack), 8)]
	}
	kept := map[string]int{}
	e.Events = slices.DeleteFunc(e.Events, func(o Event) bool {
		key := fmt.Sprint(o.Kind, o.Space, o.Reason, o.Errno, o.OldState, o.NewState, o.Tuple.Protocol, o.Tuple.is6(), o.Tuple.TCPFlags, o.Location)
		kept[key]++
		return kept[key] > 8
	})
	e.Paths = slices.DeleteFunc(e.Paths, func(p Path) bool { return p.Destination.IsMulticast() })
	for _, s := range e.Spaces {
		moved(s.Before.Counters, s.After.Counters)
		for i := range s.After.Links {
			for j := range s.Before.Links {
				if s.Before.Links[j].Index == s.After.Links[i].Index {
					moved(s.Before.Links[j].Statistics, s.After.Links[i].Statistics)
				}
			}
		}
		wanted := []string{"rp_filter", "forwarding", "ip_forward", "port_range", "syncookies", "syn_backlog", "somaxconn"}
		maps.DeleteFunc(s.Settings, func(name, _ string) bool {
			return strings.Contains(name, "default") || strings.Contains(name, ".lo.") || !slices.ContainsFunc(wanted, func(w string) bool { return strings.HasSuffix(name, w) })
		})
		s.Before.Busy, s.After.Busy = s.Before.Busy[:min(3, len(s.Before.Busy))], s.After.Busy[:min(3, len(s.After.Busy))]
		for _, counters := range []map[string]uint64{s.Before.Counters, s.After.Counters} {
			maps.DeleteFunc(counters, func(name string, _ uint64) bool {
				return strings.Contains(name, "Octets") || strings.Contains(name, "Mcast") || strings.HasPrefix(name, "Icmp6Out") || strings.HasPrefix(name, "IcmpMsg")
			})
		}
	}
}

// prune leaves out what is empty.
func prune(tree any) any {
	switch t := tree.(type) {
	case map[string]any:
		for key, value := range t {
			value = prune(value)
			if list, ok := value.([]any); value == nil || value == "" || value == false || value == 0.0 || ok && len(list) == 0 {
				delete(t, key)
			} else {
				t[key] = value
			}
		}
		if len(t) == 0 {
			return nil
		}
	case []any:
		for i := range t {
			if n, number := t[i].(float64); !number || n != 0 {
				t[i] = prune(t[i])
			}
		}
	}
	return tree
}

// A rule that kube-proxy has for all Services without endpoints is not to be deleted.
func TestRefusalOfKubeProxy(t *testing.T) {
	e := Evidence{Spaces: []*Space{space(func(s *Space) {
		s.Rules = []Rule{{System: "nftables", Family: "ip", Table: "kube-proxy", Chain: "reject-chain", Hook: "forward", Handle: 5, Verdict: "reject", Text: "reject"}}
	})}, Events: []Event{drop("NETFILTER_DROP", "nft_do_chain", 9)}}
	e.Events[0].Stack = []string{"ip_forward"}
	all := Diagnose(&e)
	if len(all) != 1 || all[0].Cause != FirewallReject || !strings.Contains(all[0].Fix, "kubectl get endpointslices") || strings.Contains(all[0].Fix, "delete") {
		t.Errorf("%+v", all)
	}
}
