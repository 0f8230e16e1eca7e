package trace

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
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

// device is a link with what only the Reader needs to know of it.
type device struct {
	cause.Link
	// elsewhere is what its namespace calls the one of its other end; negative if that is
	// its own.
	elsewhere int
	xdp       *netlink.LinkXdp
}

// mostLinks is how many devices of one namespace are kept, mostLinksInAll of all at one end
// of the window: each takes about 2 kB, and a pod can make as many as it likes.
const (
	mostLinks      = 10_000
	mostLinksInAll = 20_000
)

// links lists the devices of the calling thread's namespace with their counters. The error
// may come with devices: they were changed all the while.
func (r *Reader) links(ctx context.Context, name string) ([]device, error) {
	replies, err := dump(unix.RTM_GETLINK, unix.RTM_NEWLINK, nl.NewIfInfomsg(unix.AF_UNSPEC))
	room := r.linkRoom.take(min(len(replies), mostLinks), 1)
	if room < len(replies) {
		r.note("devices of %s: %d of %d", name, room, len(replies))
		replies = replies[:room]
	}
	var all []device
	at := map[int]int{}
	for _, reply := range replies {
		l, err := netlink.LinkDeserialize(nil, reply)
		if err != nil {
			continue
		}
		at[l.Attrs().Index] = len(all)
		all = append(all, device{linkOf(l, reply), l.Attrs().NetNsID, l.Attrs().Xdp})
	}
	qdiscs(func(index int, q cause.Qdisc) {
		if i, known := at[index]; known && len(all[i].Qdiscs) < mostQdiscs {
			all[i].Qdiscs = append(all[i].Qdiscs, q)
		}
	})
	for i := range all {
		if ctx.Err() != nil {
			break
		}
		own, _ := link.Counters(all[i].Name) // many have none
		for name, n := range own {
			all[i].Statistics["ethtool."+name] = n
		}
		if all[i].VXLAN != nil {
			forwarding(all[i].Index, all[i].VXLAN)
		}
	}
	return all, err
}

// mostQdiscs is how many queueing disciplines of one device are kept: a network card has
// one for each queue.
const mostQdiscs = 1024

// dump asks rtnetlink for all of a kind.
func dump(ask int, answer uint16, body nl.NetlinkRequestData) (replies [][]byte, err error) {
	err = settled(func() (err error) {
		request := nl.NewNetlinkRequest(ask, unix.NLM_F_DUMP)
		request.AddData(body)
		replies, err = request.Execute(unix.NETLINK_ROUTE, answer)
		return err
	})
	return replies, err
}

// settled lists something again if it was changed meanwhile, and gives up after a few times:
// then what is listed is not of one moment.
func settled(list func() error) (err error) {
	for range 5 {
		if err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return err
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
	c.PortState, c.Isolated, c.Withheld = portState(reply)
	return c
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// portState is that of a bridge's port: IFLA_LINKINFO, IFLA_INFO_SLAVE_DATA,
// IFLA_BRPORT_STATE and IFLA_BRPORT_ISOLATED.
func portState(reply []byte) (name string, alone bool, withheld []string) {
	const slaveKind, slaveData, state, isolated = 4, 5, 1, 33
	info := inner(reply[unix.SizeofIfInfomsg:], unix.IFLA_LINKINFO)
	if kind := inner(info, slaveKind); string(kind) != "bridge" && string(kind) != "bridge\x00" {
		return "", false, nil
	}
	port := inner(info, slaveData)
	if s := inner(port, state); len(s) == 1 && int(s[0]) < len(portStates) {
		name = portStates[s[0]]
	}
	for _, floods := range []struct { // IFLA_BRPORT_*_FLOOD
		kind uint16
		name string
	}{{9, "flood"}, {27, "mcast_flood"}, {30, "bcast_flood"}} {
		if on := inner(port, floods.kind); len(on) == 1 && on[0] == 0 {
			withheld = append(withheld, floods.name)
		}
	}
	i := inner(port, isolated)
	return name, len(i) == 1 && i[0] != 0, withheld
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
	statsBasic                     = 1 // TCA_STATS_BASIC: struct gnet_stats_basic
	statsQueue                     = 3 // TCA_STATS_QUEUE: struct gnet_stats_queue
	tbfParms                       = 1 // TCA_TBF_PARMS: struct tc_tbf_qopt
	tbfRate64                      = 4 // TCA_TBF_RATE64
	sizeOfTcmsg                    = 20
)

// qdiscs calls f with each queueing discipline and the index of its device.
func qdiscs(f func(index int, q cause.Qdisc)) {
	replies, _ := dump(unix.RTM_GETQDISC, unix.RTM_NEWQDISC, &nl.TcMsg{}) // a kernel without them has none
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
		if s := inner(inner(raw, tcaStats2), statsBasic); len(s) >= 12 {
			q.Packets = uint64(word(s[8:]))
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

// forwards lists the forwarding entries of bridges: those of other hosts' addresses.
func (r *Reader) forwards(name string, links []cause.Link) (all []cause.Forward) {
	if !slices.ContainsFunc(links, func(l cause.Link) bool { return l.Kind == "bridge" }) {
		return nil
	}
	var entries []netlink.Neigh
	r.miss("forwarding entries of bridges of "+name, settled(func() (err error) {
		entries, err = netlink.NeighList(0, unix.AF_BRIDGE)
		return err
	}))
	for _, n := range entries {
		if n.MasterIndex == 0 || n.Flags&netlink.NTF_SELF != 0 || len(n.HardwareAddr) != 6 {
			continue
		}
		if len(all) >= mostEntries {
			r.note("forwarding entries of bridges of %s: the first %d", name, mostEntries)
			break
		}
		f := cause.Forward{Bridge: n.MasterIndex, Port: n.LinkIndex, VLAN: n.Vlan, Local: n.State&netlink.NUD_PERMANENT != 0}
		f.Fixed = f.Local || n.Flags&netlink.NTF_STICKY != 0
		copy(f.MAC[:], n.HardwareAddr)
		all = append(all, f)
	}
	return all
}

// mostEntries is how many addresses, neighbours, forwarding entries, routes and policies
// that refuse are kept of one namespace, each.
const mostEntries = 10_000

// addresses lists those of the calling thread's namespace.
func (r *Reader) addresses(name string) (all []cause.Addr) {
	var addrs []netlink.Addr
	r.miss("addresses of "+name, settled(func() (err error) {
		addrs, err = netlink.AddrList(nil, netlink.FAMILY_ALL)
		return err
	}))
	if len(addrs) > mostEntries {
		r.note("addresses of %s: %d of %d", name, mostEntries, len(addrs))
	}
	for _, a := range addrs[:min(len(addrs), mostEntries)] {
		ones, _ := a.Mask.Size()
		prefix := netip.PrefixFrom(addrOf(a.IP), ones)
		all = append(all, cause.Addr{Index: a.LinkIndex, Prefix: prefix, Duplicate: a.Flags&unix.IFA_F_DADFAILED != 0})
	}
	return all
}

// neighbours lists those of ARP and of neighbour discovery.
func (r *Reader) neighbours(name string) (all []cause.Neigh) {
	var neighs []netlink.Neigh
	r.miss("neighbours of "+name, settled(func() (err error) {
		neighs, err = netlink.NeighList(0, netlink.FAMILY_ALL)
		return err
	}))
	if len(neighs) > mostEntries {
		r.note("neighbours of %s: %d of %d", name, mostEntries, len(neighs))
	}
	for _, n := range neighs[:min(len(neighs), mostEntries)] {
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

// refusing lists routes and rules of all tables that let nothing through. Of the others,
// which may be a million, none is kept.
func (r *Reader) refusing(ctx context.Context, name string) (all []cause.Route) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		before := len(all)
		every := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		err := settled(func() error {
			all = all[:before]
			return netlink.RouteListFilteredIter(family, every, netlink.RT_FILTER_TABLE, func(route netlink.Route) bool {
				if kind := refused[route.Type]; kind != "" {
					to := destination(family, route.Dst)
					all = append(all, cause.Route{Type: kind, To: to, Text: fmt.Sprintf("%s %s%s%s", kind, shown(to), table(route.Table), metric(route.Priority))})
				}
				return len(all) < mostEntries && ctx.Err() == nil
			})
		})
		if !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) { // a kernel without IPv6
			r.miss("routes of "+name, err)
		}
		all = append(all, refusingRules(family)...)
	}
	if len(all) >= mostEntries {
		r.note("routes of %s that let nothing through: the first %d", name, mostEntries)
		all = all[:mostEntries]
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
	const to, from, input, preference, mark, maskOfMark, output, action, header = 1, 2, 3, 6, 10, 16, 17, 7, 12
	const users, protocol, sourcePorts, ports = 20, 22, 23, 24
	replies, _ := dump(unix.RTM_GETRULE, unix.RTM_NEWRULE, nl.NewIfInfomsg(family)) // a kernel without them has none
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
			value := fmt.Sprintf("%#x", m)
			if mask := number(maskOfMark); mask != 0 && mask != 1<<32-1 {
				value += fmt.Sprintf("/%#x", mask)
			}
			add("fwmark", value)
		}
		if value := inner(raw, users); len(value) == 8 {
			add("uidrange", fmt.Sprintf("%d-%d", binary.NativeEndian.Uint32(value), binary.NativeEndian.Uint32(value[4:])))
		}
		if value := inner(raw, protocol); len(value) == 1 {
			add("ipproto", fmt.Sprint(value[0]))
		}
		for _, of := range []struct {
			word string
			kind uint16
		}{{"sport", sourcePorts}, {"dport", ports}} {
			if value := inner(raw, of.kind); len(value) == 4 {
				first, last := binary.NativeEndian.Uint16(value), binary.NativeEndian.Uint16(value[2:])
				add(of.word, strings.TrimSuffix(fmt.Sprintf("%d-%d", first, last), fmt.Sprintf("-%d", first)))
			}
		}
		if !target.IsValid() {
			target = destination(family, nil)
		}
		all = append(all, cause.Route{Type: kind, Rule: true, To: target, Text: text + kind})
	}
	return all
}

// pair is a veth device by what its other end says of it as well.
type pair struct{ index, peer int }

// joinPeers finds in which of the namespaces the other ends of devices are. The kernel is
// asked only about those that have a device with the right two numbers, and what is found
// for one end is known for the other.
func (r *Reader) joinPeers(ctx context.Context, spaces []*cause.Space, elsewhere map[uint32]map[int]int) {
	ends := map[pair][]*cause.Space{}
	for _, s := range spaces {
		for _, l := range s.After.Links {
			if l.Kind == "veth" {
				ends[pair{l.Index, l.Peer}] = append(ends[pair{l.Index, l.Peer}], s)
			}
		}
	}
	for _, s := range spaces {
		open := func(l *cause.Link) bool { return l.Kind == "veth" && l.PeerSpace == 0 }
		if ctx.Err() != nil || !slices.ContainsFunc(s.After.Links, func(l cause.Link) bool { return open(&l) }) {
			continue
		}
		_ = r.inside(s.Inode, func() {
			numbers := map[uint32]int{} // how this namespace calls others
			for i := range s.After.Links {
				l := &s.After.Links[i]
				if !open(l) {
					continue
				}
				number := elsewhere[s.Inode][l.Index]
				if number < 0 {
					l.PeerSpace = s.Inode
					continue
				}
				for _, other := range ends[pair{l.Peer, l.Index}] {
					if _, asked := numbers[other.Inode]; !asked {
						numbers[other.Inode] = r.numberOf(other.Inode)
					}
					if numbers[other.Inode] == number {
						l.PeerSpace = other.Inode
						farEnd(other, l, s.Inode)
						break
					}
				}
			}
		})
	}
}

// farEnd notes at the other end of a veth pair where this end is.
func farEnd(other *cause.Space, near *cause.Link, space uint32) {
	for i := range other.After.Links {
		if l := &other.After.Links[i]; l.Kind == "veth" && l.Index == near.Peer && l.Peer == near.Index {
			l.PeerSpace = space
		}
	}
}

// numberOf is how the calling thread's namespace calls another of those that are read; -1
// if it does not.
func (r *Reader) numberOf(inode uint32) int {
	path := r.spaces[r.at[inode]].Path
	if path == "" {
		path = "/proc/self/ns/net"
	}
	file, err := os.Open(path)
	if err != nil {
		return -1
	}
	defer file.Close()
	var is unix.Stat_t
	if unix.Fstat(int(file.Fd()), &is) != nil || uint32(is.Ino) != inode {
		return -1 // the path leads to another one by now
	}
	number, err := netns.Number(int(file.Fd()))
	if err != nil {
		return -1
	}
	return number
}
