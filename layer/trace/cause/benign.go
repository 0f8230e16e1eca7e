package cause

import (
	"maps"
	"slices"
	"strings"
)

// usual are the kernel's reasons for packets that die although all is well, or whose
// death is told by something better: ends of connections, what came twice or late, and
// what was for others.
var usual = map[string]bool{
	"SKB_NOT_DROPPED_YET": true, "CONSUMED": true, "SOCKET_CLOSE": true, "QUEUE_PURGE": true,
	"UNIX_DISCONNECT": true, "UNIX_SKIP_OOB": true, "UNHANDLED_PROTO": true, "PACKET_SOCK_ERROR": true,
	"IPV6DISABLED": true, "IPV6_NDISC_NS_OTHERHOST": true, "IPV6_NDISC_BAD_OPTIONS": true, "IPV6_NDISC_BAD_CODE": true,
	"UNICAST_IN_L2_MULTICAST": true, "DUP_FRAG": true, "MAC_IEEE_MAC_CONTROL": true, "LOCAL_MAC": true,
	"TCP_FLAGS": true, "TCP_ABORT_ON_DATA": true, "TCP_ZEROWINDOW": true, "TCP_OLD_DATA": true, "TCP_OVERWINDOW": true,
	"TCP_OFOMERGE": true, "TCP_RFC7323_PAWS": true, "TCP_RFC7323_PAWS_ACK": true, "TCP_RFC7323_TW_PAWS": true, "TCP_RFC7323_TSECR": true,
	"TCP_OLD_SEQUENCE": true, "TCP_INVALID_SEQUENCE": true, "TCP_INVALID_END_SEQUENCE": true, "TCP_INVALID_ACK_SEQUENCE": true,
	"TCP_RESET": true, "TCP_INVALID_SYN": true, "TCP_CLOSE": true, "TCP_OLD_ACK": true, "TCP_TOO_OLD_ACK": true,
	"TCP_ACK_UNSENT_DATA": true, "TCP_FASTOPEN": true, "TCP_OFO_QUEUE_PRUNE": true, "TCP_OFO_DROP": true,
	"SKB_UCOPY_FAULT": true, "NEIGH_QUEUEFULL": true, "NEIGH_DEAD": true,
}

// Usual says that packets like this one die where all is well, too: for its reason, or
// since nobody waits for it.
func Usual(e *Event) bool {
	return usual[e.Reason] || e.Tuple.noise() && !isDiscovery(e) || e.Tuple.EtherType == 0 && !e.Tuple.Destination.Addr().IsValid()
}

// UsualReasons are the kernel's reasons for which packets die where all is well, too, in
// order: what alerts leave out.
func UsualReasons() []string { return slices.Sorted(maps.Keys(usual)) }

// benign takes out what is no sign of anything.
func (d *diagnosis) benign() {
	for _, e := range d.events {
		switch {
		case e.by != "":
		case e.Kind == Drop && usual[e.Reason]:
			e.by = "benign"
		case e.Kind == Drop && e.Tuple.EtherType != 0 && e.Tuple.EtherType != etherIP && e.Tuple.EtherType != etherIP6 && e.Tuple.EtherType != etherARP:
			e.by = "benign" // spanning tree, LLDP and the like
		case e.Kind == Drop && e.Tuple.EtherType == 0 && !e.Tuple.Destination.Addr().IsValid():
			e.by = "benign" // no packet of a network: netlink, UNIX sockets
		case e.Kind == Drop && e.Tuple.noise() && !isDiscovery(e.Event):
			e.by = "benign" // mDNS, MLD, router solicitations: nobody waits for them
		case e.Kind == Drop && e.Tuple.Protocol == protoNone, e.Kind == Drop && e.Tuple.is6() && e.Tuple.Destination.Addr().IsUnspecified():
			e.by = "benign" // nothing is in it that somebody could take (RFC 8200, 4.7), or its header is cut off
		case e.Kind == Drop && broadcasts(d.spaces[e.Space], e.Event):
			e.by = "benign"
		case e.Kind == Drop && (e.Tuple.Protocol == protoICMP && e.Tuple.ICMPType == 5 || e.Tuple.Protocol == protoICMP6 && e.Tuple.ICMPType == 137):
			e.by = "benign" // redirects: nobody needs them, and translation drops its own
		case e.Kind == Drop && strings.HasPrefix(e.Location, "unix_"), e.Kind == Drop && strings.HasPrefix(e.Location, "netlink_"):
			e.by = "benign"
		case e.Kind == Drop && e.Reason == "NOT_SPECIFIED" && strings.HasPrefix(e.Location, "icmpv6_rcv"):
			e.by = "benign" // a message that was heard; its end is called so up to Linux 6.1 at least
		case e.Kind == Drop && strings.HasPrefix(e.Location, "ping_rcv"):
			e.by = "benign" // an answer to ping; programs with a raw socket have got it besides
		case e.Kind == Drop && strings.Contains(e.Location, "packet_rcv"):
			e.by = "benign" // a program that listens to all packets has no room
		case e.Kind == Drop && e.Tuple.Protocol == protoTCP && e.Reason == "SOCKET_FILTER" && e.Tuple.TCPFlags&flagRST != 0:
			e.by = "benign"
		case e.Kind == Drop && e.Location == "tcp_v4_rcv" && e.Reason == "NOT_SPECIFIED", e.Kind == Drop && e.Location == "tcp_v6_rcv" && e.Reason == "NOT_SPECIFIED":
			e.by = "benign" // of TIME-WAIT
		case e.Kind == Drop && e.Reason == "NOT_SPECIFIED" && strings.HasPrefix(e.Location, "tcp_rcv_state_process"):
			e.by = "benign" // of connections that end; later kernels say TCP_RESET, TCP_CLOSE and the like
		}
	}
}

// isDiscovery says that it is a question for a neighbour or its answer: ARP, or types 135
// and 136 of ICMPv6 (RFC 4861).
func isDiscovery(e *Event) bool {
	return e.Tuple.EtherType == etherARP || e.Tuple.Protocol == protoICMP6 && (e.Tuple.ICMPType == 135 || e.Tuple.ICMPType == 136)
}

// broadcasts says that a packet is to the broadcast address of one of the space's ranges.
func broadcasts(s *Space, e *Event) bool {
	to := e.Tuple.Destination.Addr()
	if !to.Is4() || e.Tuple.EtherType == etherARP {
		return false
	}
	for _, a := range s.Addrs {
		if a.Prefix.Addr().Is4() && a.Prefix.Bits() < 31 && a.Prefix.Contains(to) && isLast(a.Prefix.Bits(), to.As4()) {
			return true
		}
	}
	return false
}

// isLast says that all bits behind a prefix are ones.
func isLast(bits int, a [4]byte) bool {
	for i := bits; i < 32; i++ {
		if a[i/8]&(0x80>>(i%8)) == 0 {
			return false
		}
	}
	return true
}
