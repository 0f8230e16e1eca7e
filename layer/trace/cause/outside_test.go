package cause

import (
	"net/netip"
)

// outside are cases that somebody thought of who had not seen the rules.
func outside() []handwritten {
	one := func(change func(*Space), events ...Event) Evidence {
		return Evidence{Spaces: []*Space{space(change)}, Events: events}
	}
	ping := drop("NO_SOCKET", "ping_rcv", 40)
	ping.Tuple.Protocol = protoICMP
	narrow := drop("NOT_SPECIFIED", "br_nf_dev_queue_xmit", 4)
	narrow.Longest = 9000
	ring := drop("FULL_RING", "tun_net_xmit", 40)
	ring.Tuple.Protocol = protoUDP
	inUse := drop("", "", 9)
	inUse.Kind, inUse.Call, inUse.Errno, inUse.Command = CallFailed, "bind", eADDRINUSE, "web"
	inUse.Tuple.Source, inUse.Tuple.Destination = netip.AddrPort{}, netip.MustParseAddrPort("0.0.0.0:8080")
	inUseOnce := inUse
	inUseOnce.Count = 1
	refusedCall := inUse
	refusedCall.Call, refusedCall.Errno, refusedCall.Tuple.Destination = "connect", eINVAL, netip.MustParseAddrPort("192.0.2.2:80")
	unrouted := drop("IP_INNOROUTES", "ip_error", 4)
	elsewhere := []Path{{Space: 1, From: "eth0", Source: unrouted.Tuple.Source.Addr(), Destination: unrouted.Tuple.Destination.Addr(), Errno: eNETUNREACH},
		{Space: 1, Destination: unrouted.Tuple.Destination.Addr(), Type: "unicast", Device: "eth0"}}
	ruled := func(kind string) func(*Space) {
		return func(s *Space) {
			s.Routes = []Route{{Type: kind, Rule: true, To: netip.MustParsePrefix("0.0.0.0/0"), Text: "pref 100 from 192.0.2.1/32 " + kind}}
		}
	}
	return []handwritten{
		{"a password of BGP", TCPSignature, one(nil, drop("TCP_MD5NOTFOUND", "tcp_v4_rcv", 5), again())},
		{"a host that is pinged in vain", PingIgnored, Evidence{Spaces: []*Space{space(func(s *Space) {
			s.Settings["net.ipv4.icmp_echo_ignore_all"] = "1"
			s.After.Counters = map[string]uint64{"Icmp.InEchos": 3}
		})}}},
		{"a bridge's port that takes less", MTUExceedsPeer, one(nil, narrow)},
		{"a program that does not read from its tun", QdiscFull, one(nil, ring)},
		{"a port that somebody has", PortInUse, one(nil, inUse)},
		{"a machine that was copied", DuplicateMAC, twoAlike()},
		{"a rule that refuses", RouteUnreachable, Evidence{Spaces: []*Space{space(ruled("unreachable"))}, Events: []Event{unrouted}, Paths: elsewhere}},
		{"a rule, and no route", NoRoute, Evidence{Spaces: []*Space{space(ruled("unreachable"))}, Events: []Event{unrouted}, Paths: elsewhere[:1]}},
		{"a rule of another kind", NoRoute, Evidence{Spaces: []*Space{space(ruled("prohibit"))}, Events: []Event{unrouted}, Paths: elsewhere}},
		{"a rule that refuses a call", RouteBlackhole, Evidence{Spaces: []*Space{space(ruled("blackhole"))}, Events: []Event{refusedCall}, Paths: elsewhere[1:]}},
		{"a bridge that is down", LinkDown, one(func(s *Space) {
			s.After.Links = append(s.After.Links, Link{Index: 3, Name: "br0", Kind: "bridge"})
			s.After.Links[0].Master, s.After.Links[0].PortState = 3, "disabled"
		}, drop("BRIDGE_INGRESS_STP_STATE", "br_handle_frame", 5))},
		{"a tunnel's device that is down", LinkDown, one(func(s *Space) {
			s.After.Links = append(s.After.Links, Link{Index: 5, Name: "vx0", Kind: "vxlan", VXLAN: &VXLAN{ID: 1, Port: 4789}})
		}, outer())},
		{"a port that gets no questions", BridgePortBlocked, atBridge(func(e *Evidence) {
			e.Spaces[2].After.Links[2].Withheld = []string{"bcast_flood"}
		})},
		{"a pod that is gone from its bridge", NeighbourMissing, atBridge(func(e *Evidence) {
			e.Spaces[1].Addrs = nil
			e.Events[0].Reason, e.Events[0].Location, e.Events[0].Space, e.Events[0].Device = "NO_TX_TARGET", "br_handle_frame_finish", 3, "veth0"
		})},
		{"a pod that has lost its address", NeighbourMissing, atBridge(func(e *Evidence) {
			e.Spaces[1].Addrs = nil
			e.Spaces[1].Settings["net.ipv4.ip_forward"] = "0"
			e.Spaces[0].Neighs = []Neigh{{Index: 2, Addr: netip.MustParseAddr("192.0.2.2"), MAC: e.Spaces[1].After.Links[0].MAC, State: 4}}
			e.Events[0].Reason, e.Events[0].Location, e.Events[0].Space = "IP_INADDRERRORS", "ip_error", 2
		})},
		{"an answer to ping that a raw socket has got", "", one(nil, ping)},
		{"a program that looks for a free port", "", one(nil, inUseOnce)},
		{"a call that is refused for another reason", "", Evidence{Spaces: []*Space{space(ruled("prohibit"))}, Events: []Event{refusedCall}, Paths: elsewhere[1:]}},
	}
}

// outer is a packet of a tunnel that comes to a port where nobody listens.
func outer() Event {
	e := drop("NO_SOCKET", "__udp4_lib_rcv", 5)
	e.Tuple = Tuple{Protocol: protoUDP, EtherType: etherIP, Source: netip.MustParseAddrPort("198.51.100.1:50000"), Destination: netip.MustParseAddrPort("198.51.100.2:4789")}
	e.Packet = append(make([]byte, 28), 8, 0, 0, 0, 0, 0, 1, 0)
	e.Packet[0] = 0x45
	return e
}

// twoAlike are two pods at a bridge with the same hardware address; what is sent to the one
// comes to the other.
func twoAlike() Evidence {
	e := atBridge(func(*Evidence) {})
	e.Spaces[0].After.Links[0].MAC = e.Spaces[1].After.Links[0].MAC
	astray := drop("IP_INADDRERRORS", "ip_error", 9)
	astray.Tuple.Source = netip.MustParseAddrPort("192.0.2.9:40000")
	e.Events = []Event{astray}
	e.Spaces[0].Settings["net.ipv4.ip_forward"] = "0"
	return e
}

// atBridge are two pods at a bridge, and the one does not get to the other.
func atBridge(change func(*Evidence)) Evidence {
	e := isolatedPorts()
	for i, s := range e.Spaces {
		for j := range s.After.Links {
			s.After.Links[j].Isolated = false
			s.After.Links[j].MAC = [6]byte{2, 0, 0, byte(i), 0, byte(j)}
		}
	}
	change(&e)
	return e
}
