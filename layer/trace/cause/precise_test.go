package cause

import (
	"net/netip"
	"slices"
	"testing"
)

// precise are cases in which one thing looks like another.
func precise() []handwritten {
	return []handwritten{
		{"two tunnels whose packets come to one socket", VXLANPort, twoTunnels(nil)},
		{"a tunnel that is down, beside one with its port", LinkDown, twoTunnels(func(l *Link) { l.VXLAN.Port, l.Up = 4789, false })},
		{"a number that nobody has", VXLANUnknownID, twoTunnels(func(l *Link) { l.VXLAN.ID = 9 })},
		{"closed with data unread behind a translated address", ClosedUnread, closedBehind(false)},
		{"an idle connection that is closed when it is used again", "", closedBehind(true)},
		{"TCP that fills a queue", "", filled(func(*Evidence) {})},
		{"what is said to neighbours is lost in it, too", "", filled(func(e *Evidence) {
			report := e.Events[0]
			report.Count, report.Tuple = 1, Tuple{Protocol: protoICMP6, EtherType: etherIP6, ICMPType: 143}
			e.Events = append(e.Events, report)
		})},
		{"datagrams that fill it, too", QdiscFull, filled(func(e *Evidence) { e.Events[0].Tuple.Protocol = protoUDP })},
		{"connections that do not come about for it", QdiscFull, filled(func(e *Evidence) { e.Events[0].Tuple.TCPFlags = flagSYN })},
		{"a queue that drops one of two", QdiscFull, filled(func(e *Evidence) { e.Spaces[0].After.Links[0].Qdiscs[0].Packets = 160 })},
		{"a queue that loses by itself", QdiscFull, filled(func(e *Evidence) { e.Spaces[0].After.Links[0].Qdiscs[0].Kind = "netem" })},
		{"a connection that sends the same for long", QdiscFull, filled(func(e *Evidence) {
			e.Spaces[0].After.Sockets = []Socket{{Protocol: protoTCP, State: tcpEstablished, Retransmits: 5,
				Local: netip.MustParseAddrPort("192.0.2.1:40000"), Remote: netip.MustParseAddrPort("192.0.2.2:80")}}
		})},
		{"a message about a packet that was too big, and was heard", "", heard()},
		{"an open connection of IPv6 whose device went down", LinkDown, routeless(false)},
		{"an open connection of IPv6 whose route has gone", NoRoute, routeless(true)},
		{"a port that forwards", "", Evidence{Spaces: []*Space{space(func(s *Space) {
			s.After.Links = append(s.After.Links, Link{Index: 3, Name: "br0", Kind: "bridge", Up: true, Carrier: true})
			s.After.Links[0].Master, s.After.Links[0].PortState = 3, "forwarding"
		})}, Events: []Event{drop("NOT_SPECIFIED", "br_handle_frame_finish", 5)}}},
	}
}

// twoTunnels are two of one host, of which one is changed. A packet for the network of
// that comes to the socket of the other.
func twoTunnels(change func(*Link)) Evidence {
	tunnel := func(index, id, port int) Link {
		return Link{Index: index, Name: "vx" + string(rune('0'+index)), Kind: "vxlan", Up: true, Carrier: true, VXLAN: &VXLAN{ID: id, Port: port}}
	}
	s := space(func(s *Space) { s.After.Links = append(s.After.Links, tunnel(5, 7, 4789), tunnel(6, 8, 8472)) })
	if change != nil {
		change(&s.After.Links[2])
	}
	e := drop("VXLAN_VNI_NOT_FOUND", "vxlan_rcv", 4)
	e.Tuple = Tuple{Protocol: protoUDP, EtherType: etherIP, Source: netip.MustParseAddrPort("192.0.2.1:50000"), Destination: netip.MustParseAddrPort("192.0.2.2:4789")}
	e.Packet = slices.Concat([]byte{0x45}, make([]byte, 27), []byte{8, 0, 0, 0, 0, 0, 8, 0})
	return Evidence{Spaces: []*Space{s}, Events: []Event{e}}
}

// closedBehind is a server that closes with data unread, whose client knows it by an
// address that somebody translates.
func closedBehind(crossed bool) Evidence {
	sent, told := drop("TCP_ABORT_ON_CLOSE", "tcp_close", 3), drop("", "", 3)
	sent.Kind, sent.Device, sent.Crossed = ResetSent, "", crossed
	sent.Tuple.Source, sent.Tuple.Destination = netip.MustParseAddrPort("192.0.2.2:80"), netip.MustParseAddrPort("192.0.2.1:40000")
	told.Kind, told.Errno, told.Space, told.Device = SocketError, eCONNRESET, 2, ""
	told.Tuple.Destination = netip.MustParseAddrPort("10.96.0.1:80")
	client := space(func(s *Space) { s.Inode, s.Name, s.Addrs = 2, "client", []Addr{addr("192.0.2.1/24")} })
	return Evidence{Spaces: []*Space{space(nil), client}, Events: []Event{sent, told}}
}

// heard is discovery of the path MTU on a kernel that tells the end of each message of
// ICMPv6 as a drop.
func heard() Evidence {
	big, told := drop("PKT_TOO_BIG", "ip6_forward", 3), drop("NOT_SPECIFIED", "icmpv6_rcv", 3)
	big.Tuple.Source, big.Tuple.Destination = netip.MustParseAddrPort("[2001:db8::1]:40000"), netip.MustParseAddrPort("[2001:db8:1::1]:80")
	told.Tuple = Tuple{Protocol: protoICMP6, EtherType: etherIP6, ICMPType: 2, Source: netip.MustParseAddrPort("[2001:db8::9]:0"), Destination: netip.MustParseAddrPort("[2001:db8::1]:0")}
	s := space(func(s *Space) {
		s.Addrs = []Addr{addr("2001:db8::1/64")}
		s.After.Counters = map[string]uint64{"Icmp6InPktTooBigs": 3}
	})
	return Evidence{Spaces: []*Space{s}, Events: []Event{big, told}}
}

// routeless is an open connection of IPv6 that has lost its route.
func routeless(up bool) Evidence {
	e, sent := drop("NOT_SPECIFIED", "inet6_csk_xmit", 3), again()
	e.Device, e.Index = "", 0
	e.Tuple.Source, e.Tuple.Destination = netip.MustParseAddrPort("[2001:db8::1]:40000"), netip.MustParseAddrPort("[2001:db8:1::1]:80")
	sent.Tuple = e.Tuple
	s := space(func(s *Space) {
		s.Addrs = []Addr{addr("2001:db8::1/64")}
		s.After.Links[0].Up, s.After.Links[0].Carrier = up, up
	})
	return Evidence{Spaces: []*Space{s}, Events: []Event{e, sent}, Paths: []Path{{Space: 1, Source: e.Tuple.Source.Addr(), Destination: e.Tuple.Destination.Addr(), Errno: eNETUNREACH}}}
}

// filled is a queue that has dropped 80 of 1080 packets of TCP, and what is changed.
func filled(change func(*Evidence)) Evidence {
	e := drop("QDISC_DROP", "__dev_queue_xmit", 80)
	e.Tuple.TCPFlags = flagACK
	s := space(func(s *Space) {
		s.Before.Links = slices.Clone(s.After.Links)
		s.Before.Links[0].Qdiscs = []Qdisc{{Kind: "tbf", Handle: 1, Drops: 20, Packets: 0, Rate: 250000}}
		s.After.Links[0].Qdiscs = []Qdisc{{Kind: "tbf", Handle: 1, Drops: 100, Packets: 1000, Rate: 250000}}
	})
	evidence := Evidence{Spaces: []*Space{s}, Events: []Event{e}}
	change(&evidence)
	return evidence
}

// What a masqueraded server, or its client, meets when the connection is forgotten is
// named where it is translated; the same without a translation is the end of a connection.
func TestForgotten(t *testing.T) {
	router := func() *Space {
		return space(func(s *Space) {
			s.Inode, s.Name, s.Addrs = 2, "router", []Addr{addr("192.0.2.9/24")}
			s.Rules = []Rule{{System: "nftables", Family: "ip", Table: "nat", Chain: "post", Hook: "postrouting", Verdict: "masquerade", Text: "masquerade"}}
		})
	}
	client := space(func(s *Space) { s.Inode, s.Name, s.Addrs = 3, "client", []Addr{addr("10.1.0.2/24")} })
	server := space(func(s *Space) { s.Addrs = []Addr{addr("192.0.2.2/24")} })
	event := func(kind Kind, space uint32, from, to string) Event {
		e := drop("NO_SOCKET", "tcp_v4_rcv", 2)
		e.Kind, e.Space, e.Tuple.TCPFlags = kind, space, flagACK
		e.Tuple.Source, e.Tuple.Destination = netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
		return e
	}
	open := *client
	open.After.Sockets = []Socket{{Protocol: protoTCP, State: tcpEstablished, Local: netip.MustParseAddrPort("10.1.0.2:40000"), Remote: netip.MustParseAddrPort("192.0.2.2:80")}}
	news := event(Drop, 2, "192.0.2.2:80", "192.0.2.9:40000")
	asked := event(Drop, 1, "192.0.2.9:1029", "192.0.2.2:80")
	told := event(SocketError, 3, "10.1.0.2:40000", "192.0.2.2:80")
	told.Errno = eCONNRESET
	honest := router()
	honest.Rules = nil
	for _, row := range []struct {
		name string
		e    *Evidence
		want []string
	}{
		{"the server speaks", &Evidence{Spaces: []*Space{router(), &open, server}, Events: []Event{news}}, []string{"connection-forgotten router"}},
		{"the client speaks", &Evidence{Spaces: []*Space{router(), client, server}, Events: []Event{asked, told}}, []string{"connection-forgotten router"}},
		{"nobody has it any more", &Evidence{Spaces: []*Space{router(), client, server}, Events: []Event{news}}, nil},
		{"nobody was told", &Evidence{Spaces: []*Space{router(), client, server}, Events: []Event{asked}}, nil},
		{"nobody translates", &Evidence{Spaces: []*Space{honest, &open, server}, Events: []Event{news, asked, told}}, nil},
	} {
		if got := named(row.e); !slices.Equal(got, row.want) {
			t.Errorf("%s: %v, not %v", row.name, got, row.want)
		}
	}
}
