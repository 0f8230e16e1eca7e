package cause

import (
	"slices"
	"strings"
)

// What tools that look at one kind of signal would say of the same evidence, to compare
// with: generously, as each name is given the cause that it fits most often, and what
// such tools hide by default is left out.

// reasonCauses are the causes that the kernel's reasons for drops stand for.
var reasonCauses = map[string][]string{
	"NETFILTER_DROP":      {FirewallDrop, FirewallReject},
	"IP_RPFILTER":         {ReversePath},
	"NO_SOCKET":           {NoListener},
	"NEIGH_FAILED":        {NeighbourMissing},
	"NEIGH_QUEUEFULL":     {NeighbourMissing},
	"NEIGH_DEAD":          {NeighbourMissing},
	"SOCKET_RCVBUFF":      {ReceiveBufferFull},
	"TCP_CSUM":            {BadChecksum},
	"UDP_CSUM":            {BadChecksum},
	"IP_CSUM":             {BadChecksum},
	"IP_INNOROUTES":       {NoRoute},
	"IP_OUTNOROUTES":      {NoRoute},
	"QDISC_DROP":          {QdiscFull},
	"FULL_RING":           {QdiscFull},
	"TC_INGRESS":          {TCDrop},
	"TC_EGRESS":           {TCDrop},
	"XDP":                 {XDPDrop},
	"BPF_CGROUP_EGRESS":   {CgroupDrop},
	"SOCKET_FILTER":       {SocketFilterDrop},
	"VXLAN_VNI_NOT_FOUND": {VXLANUnknownID},
	"NO_TX_TARGET":        {VXLANNoPeer},
	"IP_LOCALNET":         {MartianSource},
	"IP_LOCAL_SOURCE":     {DuplicateAddress},
	"OTHERHOST":           {WrongMAC},
	"FRAG_REASM_TIMEOUT":  {FragmentLost},
	"PKT_TOO_BIG":         {MTUBlackHole},
	"TCP_ZEROWINDOW":      {ReceiverStalled},
	"LISTEN_QUEUE_FULL":   {AcceptQueueFull},
	"CPU_BACKLOG":         {BacklogFull},
	"NOMEM":               {MemoryShort},
	"BRIDGE_INGRESS_STP_STATE": {
		BridgePortBlocked},
}

// ByReason are the causes that the reasons of drops name by themselves.
func ByReason(e *Evidence) []string {
	var causes []string
	for _, event := range e.Events {
		if event.Kind == Drop {
			causes = append(causes, reasonCauses[event.Reason]...)
		}
	}
	return sorted(causes)
}

// counterCauses are the causes that counters stand for; of IPv6 the names are one word.
var counterCauses = map[string]string{
	"TcpExt.ListenOverflows":     AcceptQueueFull,
	"TcpExt.SyncookiesSent":      SYNFlood,
	"TcpExt.IPReversePathFilter": ReversePath,
	"TcpExt.TCPToZeroWindowAdv":  ReceiverStalled,
	"TcpExt.TCPAbortOnClose":     ClosedUnread,
	"Tcp.AttemptFails":           NoListener,
	"Udp.NoPorts":                NoListener,
	"Udp6NoPorts":                NoListener,
	"Udp.RcvbufErrors":           ReceiveBufferFull,
	"Udp6RcvbufErrors":           ReceiveBufferFull,
	"Tcp.InCsumErrors":           BadChecksum,
	"Udp.InCsumErrors":           BadChecksum,
	"Udp6InCsumErrors":           BadChecksum,
	"IpExt.InCsumErrors":         BadChecksum,
	"IpExt.InNoRoutes":           NoRoute,
	"Ip6InNoRoutes":              NoRoute,
	"Ip.OutNoRoutes":             NoRoute,
	"Ip6OutNoRoutes":             NoRoute,
	"Ip.InAddrErrors":            ForwardingOff,
	"Ip6InAddrErrors":            ForwardingOff,
	"Ip.InHdrErrors":             RoutingLoop,
	"Ip6InHdrErrors":             RoutingLoop,
	"Ip.ReasmTimeout":            FragmentLost,
	"Ip6ReasmTimeout":            FragmentLost,
	"Ip.FragFails":               MTUBlackHole,
	"Ip6InTooBigErrors":          MTUBlackHole,
	"Ip.FragCreates":             VXLANFragments,
}

// ByCounters are the causes that counters of namespaces, rules, queues and devices name
// by themselves.
func ByCounters(e *Evidence) []string {
	var causes []string
	for _, s := range e.Spaces {
		grew := func(name string) bool { return s.After.Counters[name] > s.Before.Counters[name] }
		for name, cause := range counterCauses {
			if grew(name) {
				causes = append(causes, cause)
			}
		}
		if grew("TcpExt.ListenDrops") && !grew("TcpExt.ListenOverflows") {
			causes = append(causes, SYNQueueFull, NoRouteBack)
		}
		before, after := s.Before.Conntrack, s.After.Conntrack
		switch {
		case after.InsertFailed > before.InsertFailed:
			causes = append(causes, SNATPortsExhausted)
		case after.Drop > before.Drop:
			causes = append(causes, ConntrackFull)
		}
		if after.Invalid > before.Invalid {
			causes = append(causes, ConntrackInvalid)
		}
		for _, r := range s.Rules {
			switch {
			case r.After <= r.Before:
			case r.Verdict == "drop":
				causes = append(causes, FirewallDrop)
			case strings.HasPrefix(r.Verdict, "reject"):
				causes = append(causes, FirewallReject)
			}
		}
		causes = append(causes, byLinks(s)...)
	}
	return sorted(causes)
}

// byLinks are what counters of devices and their queues name.
func byLinks(s *Space) (causes []string) {
	for _, after := range s.After.Links {
		i := slices.IndexFunc(s.Before.Links, func(l Link) bool { return l.Index == after.Index })
		if i < 0 {
			continue
		}
		before := s.Before.Links[i]
		for name, n := range after.Statistics {
			switch grew := n > before.Statistics[name]; {
			case grew && strings.Contains(name, "xdp_drops"):
				causes = append(causes, XDPDrop)
			case grew && name == "tx_dropped" && after.Kind == "vxlan":
				causes = append(causes, VXLANNoPeer)
			}
		}
		if before.Carrier && !after.Carrier || before.Up && !after.Up {
			causes = append(causes, LinkDown)
		}
		for _, q := range after.Qdiscs {
			j := slices.IndexFunc(before.Qdiscs, func(b Qdisc) bool { return b.Handle == q.Handle && b.Parent == q.Parent })
			switch {
			case j < 0 || q.Drops <= before.Qdiscs[j].Drops:
			case q.Kind == "clsact" || q.Kind == "ingress":
				causes = append(causes, TCDrop)
			default:
				causes = append(causes, QdiscFull)
			}
		}
	}
	return causes
}

func sorted(causes []string) []string {
	slices.Sort(causes)
	return slices.Compact(causes)
}
