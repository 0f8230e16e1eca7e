package trace

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
)

// portStates are the kernel's BR_STATE_*.
var portStates = []string{"disabled", "listening", "learning", "forwarding", "blocking"}

// links lists the devices of the calling thread's namespace with their counters.
func links() ([]cause.Link, error) {
	ask := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	ask.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	replies, err := ask.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return nil, err
	}
	var all []cause.Link
	at := map[int]int{}
	for _, reply := range replies {
		l, err := netlink.LinkDeserialize(nil, reply)
		if err != nil {
			continue
		}
		at[l.Attrs().Index] = len(all)
		all = append(all, linkOf(l, reply))
	}
	qdiscs(func(index int, q cause.Qdisc) {
		if i, known := at[index]; known {
			all[i].Qdiscs = append(all[i].Qdiscs, q)
		}
	})
	for i := range all {
		own, _ := link.Counters(all[i].Name) // many have none
		for name, n := range own {
			all[i].Statistics["ethtool."+name] = n
		}
		if all[i].VXLAN != nil {
			forwarding(all[i].Index, all[i].VXLAN)
		}
	}
	return all, nil
}

func linkOf(l netlink.Link, reply []byte) cause.Link {
	attrs := l.Attrs()
	c := cause.Link{
		Index: attrs.Index, Name: attrs.Name, Kind: l.Type(), MTU: attrs.MTU,
		Up: attrs.Flags&net.FlagUp != 0, Carrier: attrs.RawFlags&unix.IFF_LOWER_UP != 0,
		Master: attrs.MasterIndex, Statistics: map[string]uint64{},
	}
	copy(c.MAC[:], attrs.HardwareAddr)
	if c.Kind == "device" {
		c.Kind = ""
	}
	if c.Kind == "veth" {
		c.Peer = attrs.ParentIndex
	}
	if s := attrs.Statistics; s != nil {
		c.Statistics = map[string]uint64{
			"rx_packets": s.RxPackets, "tx_packets": s.TxPackets, "rx_errors": s.RxErrors, "tx_errors": s.TxErrors,
			"rx_dropped": s.RxDropped, "tx_dropped": s.TxDropped, "tx_carrier_errors": s.TxCarrierErrors,
		}
	}
	if v, ok := l.(*netlink.Vxlan); ok {
		c.VXLAN = &cause.VXLAN{ID: v.VxlanId, Port: v.Port, Underlay: v.VtepDevIndex, Learning: v.Learning, External: v.FlowBased,
			Peers: map[string][]netip.Addr{}}
		c.VXLAN.Local, c.VXLAN.Group = addrOf(v.SrcAddr), addrOf(v.Group)
	}
	c.PortState, c.Isolated = portState(reply)
	return c
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// portState is that of a bridge's port: IFLA_LINKINFO, IFLA_INFO_SLAVE_DATA,
// IFLA_BRPORT_STATE and IFLA_BRPORT_ISOLATED.
func portState(reply []byte) (name string, alone bool) {
	const slaveKind, slaveData, state, isolated = 4, 5, 1, 33
	info := inner(reply[unix.SizeofIfInfomsg:], unix.IFLA_LINKINFO)
	if kind := inner(info, slaveKind); string(kind) != "bridge" && string(kind) != "bridge\x00" {
		return "", false
	}
	port := inner(info, slaveData)
	if s := inner(port, state); len(s) == 1 && int(s[0]) < len(portStates) {
		name = portStates[s[0]]
	}
	i := inner(port, isolated)
	return name, len(i) == 1 && i[0] != 0
}

// inner is the value of the first attribute of a kind.
func inner(raw []byte, kind uint16) []byte {
	for len(raw) >= 4 {
		length := int(binary.NativeEndian.Uint16(raw))
		if length < 4 || length > len(raw) {
			return nil
		}
		if binary.NativeEndian.Uint16(raw[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER) == kind {
			return raw[4:length]
		}
		raw = raw[min((length+3)&^3, len(raw)):]
	}
	return nil
}

// of linux/rtnetlink.h, pkt_sched.h and gen_stats.h
const (
	tcaKind, tcaOptions, tcaStats2 = 1, 2, 7
	statsQueue                     = 3 // TCA_STATS_QUEUE: struct gnet_stats_queue
	tbfParms                       = 1 // TCA_TBF_PARMS: struct tc_tbf_qopt
	tbfRate64                      = 4 // TCA_TBF_RATE64
	sizeOfTcmsg                    = 20
)

// qdiscs calls f with each queueing discipline and the index of its device.
func qdiscs(f func(index int, q cause.Qdisc)) {
	ask := nl.NewNetlinkRequest(unix.RTM_GETQDISC, unix.NLM_F_DUMP)
	ask.AddData(&nl.TcMsg{})
	replies, err := ask.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWQDISC)
	if err != nil {
		return // a kernel without them has none
	}
	word := binary.NativeEndian.Uint32
	for _, reply := range replies {
		if len(reply) < sizeOfTcmsg {
			continue
		}
		raw := reply[sizeOfTcmsg:]
		q := cause.Qdisc{Kind: strings.TrimRight(string(inner(raw, tcaKind)), "\x00"), Handle: word(reply[8:]), Parent: word(reply[12:])}
		if s := inner(inner(raw, tcaStats2), statsQueue); len(s) >= 20 {
			q.Queue, q.Backlog, q.Drops, q.Overlimits = word(s), word(s[4:]), uint64(word(s[8:])), uint64(word(s[16:]))
		}
		switch options := inner(raw, tcaOptions); {
		case q.Kind == "tbf":
			if p := inner(options, tbfParms); len(p) >= 28 {
				q.Rate, q.Limit = uint64(word(p[8:])), word(p[24:])
			}
			if r := inner(options, tbfRate64); len(r) == 8 {
				q.Rate = binary.NativeEndian.Uint64(r)
			}
		case strings.HasSuffix(q.Kind, "fifo") && len(options) >= 4:
			q.Limit = word(options)
		}
		f(int(int32(word(reply[4:]))), q)
	}
}

// forwarding reads where a vxlan device sends to.
func forwarding(index int, v *cause.VXLAN) {
	const most = 4096
	neighs, err := netlink.NeighList(index, unix.AF_BRIDGE)
	if err != nil {
		return
	}
	for _, n := range neighs {
		if n.IP == nil || len(v.Peers) >= most {
			continue
		}
		mac := n.HardwareAddr.String()
		v.Peers[mac] = append(v.Peers[mac], addrOf(n.IP))
	}
}

// addresses lists those of the calling thread's namespace.
func addresses() (all []cause.Addr) {
	const most = 10000
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil
	}
	for _, a := range addrs[:min(len(addrs), most)] {
		ones, _ := a.Mask.Size()
		prefix := netip.PrefixFrom(addrOf(a.IP), ones)
		all = append(all, cause.Addr{Index: a.LinkIndex, Prefix: prefix, Duplicate: a.Flags&unix.IFA_F_DADFAILED != 0})
	}
	return all
}

// neighbours lists those of ARP and of neighbour discovery.
func neighbours() (all []cause.Neigh) {
	const most = 10000
	neighs, err := netlink.NeighList(0, netlink.FAMILY_ALL)
	if err != nil {
		return nil
	}
	for _, n := range neighs[:min(len(neighs), most)] {
		if n.Family != unix.AF_INET && n.Family != unix.AF_INET6 || n.State&unix.NUD_NOARP != 0 {
			continue
		}
		c := cause.Neigh{Index: n.LinkIndex, Addr: addrOf(n.IP), State: n.State}
		copy(c.MAC[:], n.HardwareAddr)
		all = append(all, c)
	}
	return all
}

// refused are the types of routes and rules that let nothing through.
var refused = map[int]string{unix.RTN_BLACKHOLE: "blackhole", unix.RTN_UNREACHABLE: "unreachable", unix.RTN_PROHIBIT: "prohibit"}

// refusing lists routes and rules of all tables that let nothing through.
func refusing() (all []cause.Route) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			continue
		}
		for _, r := range routes {
			if kind := refused[r.Type]; kind != "" {
				to := destination(family, r.Dst)
				all = append(all, cause.Route{Type: kind, To: to, Text: fmt.Sprintf("%s %s%s%s", kind, shown(to), table(r.Table), metric(r.Priority))})
			}
		}
		all = append(all, refusingRules(family)...)
	}
	return all
}

func destination(family int, to *net.IPNet) netip.Prefix {
	if to == nil && family == netlink.FAMILY_V4 {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	if to == nil {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	ones, _ := to.Mask.Size()
	return netip.PrefixFrom(addrOf(to.IP), ones)
}

func shown(p netip.Prefix) string {
	if p.Bits() == 0 {
		return "default"
	}
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

func table(number int) string {
	switch number {
	case 0, unix.RT_TABLE_MAIN:
		return ""
	case unix.RT_TABLE_LOCAL:
		return " table local"
	}
	return fmt.Sprintf(" table %d", number)
}

func metric(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(" metric %d", n)
}

// refusingRules lists rules that let nothing through (struct fib_rule_hdr and FRA_* of
// linux/fib_rules.h; the netlink library leaves their action out).
func refusingRules(family int) (all []cause.Route) {
	const to, from, input, preference, mark, output, action, header = 1, 2, 3, 6, 10, 17, 7, 12
	ask := nl.NewNetlinkRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP)
	ask.AddData(nl.NewIfInfomsg(family))
	replies, err := ask.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
	if err != nil {
		return nil
	}
	for _, reply := range replies {
		if len(reply) < header || refused[int(reply[action])] == "" {
			continue
		}
		kind, raw, text := refused[int(reply[action])], reply[header:], ""
		add := func(word, value string) {
			if value != "" {
				text += word + " " + value + " "
			}
		}
		number := func(attribute uint16) uint32 {
			if value := inner(raw, attribute); len(value) == 4 {
				return binary.NativeEndian.Uint32(value)
			}
			return 0
		}
		prefix := func(attribute uint16, bits byte) (netip.Prefix, string) {
			a, ok := netip.AddrFromSlice(inner(raw, attribute))
			if !ok {
				return netip.Prefix{}, ""
			}
			p := netip.PrefixFrom(a, int(bits))
			return p, p.String()
		}
		name := func(attribute uint16) string { return strings.TrimRight(string(inner(raw, attribute)), "\x00") }
		_, source := prefix(from, reply[2])
		target, shown := prefix(to, reply[1])
		add("pref", fmt.Sprint(number(preference)))
		add("from", source)
		add("to", shown)
		add("iif", name(input))
		add("oif", name(output))
		if m := number(mark); m != 0 {
			add("fwmark", fmt.Sprintf("%#x", m))
		}
		if !target.IsValid() {
			target = destination(family, nil)
		}
		all = append(all, cause.Route{Type: kind, Rule: true, To: target, Text: text + kind})
	}
	return all
}

// joinPeers finds in which of the namespaces the other ends of devices are. It asks the
// kernel for each pair, so it is done for no more than some thousands.
func (r *Reader) joinPeers(ctx interface{ Err() error }, spaces []*cause.Space) {
	const most = 10000
	pairs := 0
	_ = r.eachSpace(ctx, spaces, func(s *cause.Space, path string) {
		numbers := numbersOf()
		for i := range s.After.Links {
			l := &s.After.Links[i]
			if l.Kind != "veth" {
				continue
			}
			number, elsewhere := numbers[l.Index]
			if !elsewhere {
				l.PeerSpace = s.Inode
				continue
			}
			for _, other := range r.spaces {
				if pairs++; pairs > most {
					return
				}
				if n, ok := numberOf(other); ok && n == number {
					l.PeerSpace = other.Inode
					break
				}
			}
		}
	})
}

// numbersOf are the numbers of the namespaces where devices have their other ends.
func numbersOf() map[int]int {
	all := map[int]int{}
	links, err := netlink.LinkList()
	if err != nil {
		return all
	}
	for _, l := range links {
		if n := l.Attrs().NetNsID; n >= 0 {
			all[l.Attrs().Index] = n
		}
	}
	return all
}

// numberOf is how the calling thread's namespace calls another.
func numberOf(n Namespace) (int, bool) {
	path := n.Path
	if path == "" {
		path = "/proc/self/ns/net"
	}
	file, err := os.Open(path)
	if err != nil {
		return 0, false
	}
	defer file.Close()
	number, err := netns.Number(int(file.Fd()))
	return number, err == nil && number >= 0
}

// eachSpace runs f on a thread inside each space, one after the other.
func (r *Reader) eachSpace(ctx interface{ Err() error }, spaces []*cause.Space, f func(s *cause.Space, path string)) error {
	for _, s := range spaces {
		for _, n := range r.spaces {
			if n.Inode != s.Inode || ctx.Err() != nil {
				continue
			}
			err := netns.In(n.Path, func() error {
				if here(n.Inode) {
					f(s, n.Path)
				}
				return nil
			})
			if err != nil {
				continue // it has gone meanwhile
			}
		}
	}
	return nil
}
