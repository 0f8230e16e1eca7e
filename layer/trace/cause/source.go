package cause

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// arriving says that a packet died where its source and destination are looked at, for a
// reason that this kernel has no word for.
func arriving(e *seen) bool {
	return (e.Reason == "NOT_SPECIFIED" || e.Reason == "") && strings.HasPrefix(e.Location, "ip_rcv_finish")
}

// sourceChecks: a packet's source is not one that may come by this device.
func (d *diagnosis) sourceChecks() {
	for _, e := range d.open(Drop) {
		s := d.spaces[e.Space]
		src, dst := e.Tuple.Source.Addr(), e.Tuple.Destination.Addr()
		six := strings.HasPrefix(e.Location, "ip6_rcv") || strings.HasPrefix(e.Location, "ipv6_rcv")
		martian := src.IsLoopback() || src.IsMulticast() || src.IsUnspecified() || dst.IsLoopback()
		switch {
		case e.Reason == "IP_RPFILTER", arriving(e) && s.rose("TcpExt.IPReversePathFilter") > 0:
			d.reversePath(s, e)
		case e.Reason == "IP_LOCAL_SOURCE", arriving(e) && src.IsValid() && s.owns(src) && !src.IsLoopback():
			d.duplicate(s, e, src)
		case e.Reason == "IP_LOCALNET", e.Reason == "IP_INVALID_SOURCE", e.Reason == "IP_INVALID_DEST" && !e.Tuple.noise(), (arriving(e) || six) && martian && src.IsValid():
			d.martian(s, e)
		}
	}
	for _, e := range d.open(Retransmit, SocketError, NeighFailed, Drop) {
		if e.Kind != Drop || e.unresolved() {
			d.unanswered(e)
		}
	}
}

// unanswered: who is asked for its hardware address also looks at who asks. The question
// comes from the address that the packet is to come from (ARP with arp_announce 0): a
// router that would drop the packet for it does not answer, nor does a host that has that
// address itself.
func (d *diagnosis) unanswered(e *seen) {
	s := d.spaces[e.Space]
	src, hop := e.Tuple.Source.Addr(), d.nextHop(e)
	unknown := slices.ContainsFunc(s.Neighs, func(n Neigh) bool {
		return n.Addr == hop && n.State&(neighFailed|neighIncomplete) != 0
	})
	if !unknown || src.IsLoopback() || !s.owns(src) {
		return
	}
	for _, o := range d.owners(hop) {
		if o != s && o.owns(src) {
			d.duplicate(o, e, src)
			d.keys[fmt.Sprint(DuplicateAddress, " ", o.Inode, " ", src)].isNot("%s: %s has %s, and does not answer its own address", NeighbourMissing, o.Name, hop)
			d.folds(DuplicateAddress, func(f *seen) bool {
				return f.Space == e.Space && (f.Kind == NeighFailed || f.unresolved()) && f.Tuple.Destination.Addr() == hop
			})
			continue
		}
		for _, a := range o.Addrs {
			l := o.linkAt(a.Index)
			if a.Prefix.Addr() != hop || l == nil {
				continue
			}
			if !src.Is4() {
				continue
			}
			mode := max(orZero(o.Settings["net.ipv4.conf.all.rp_filter"]), orZero(o.Settings["net.ipv4.conf."+l.Name+".rp_filter"]))
			p := d.path(o.Inode, "", netip.Addr{}, src)
			if p == nil || mode == "0" || mode == "1" && p.Device == l.Name || mode == "2" && p.Device != "" {
				continue
			}
			was := *e.Event
			was.Space, was.Device = o.Inode, l.Name
			d.reversePath(o, &seen{Event: &was})
			v := d.keys[fmt.Sprint(ReversePath, " ", o.Inode, " ", l.Name)]
			v.saw("%s asks for %s from %s, and is not answered: neighbour %s (RTM_GETNEIGH); the filter holds for ARP as well", s.Name, hop, src, "FAILED")
			v.isNot("%s: %s is there, and does not want to answer this source", NeighbourMissing, hop)
			e.by = ReversePath
			d.folds(ReversePath, func(f *seen) bool {
				return f.Space == e.Space && (f.Kind == NeighFailed && f.Tuple.Destination.Addr() == hop || f.unresolved() && f.Tuple.Source.Addr() == src)
			})
		}
	}
}

// reversePath: the answer would leave by another device than the packet came by.
func (d *diagnosis) reversePath(s *Space, e *seen) {
	src := e.Tuple.Source.Addr()
	v, fresh := d.verdict(ReversePath, s, e.Device, e)
	v.Title = fmt.Sprintf("the reverse path filter on %s in %s drops what comes from %s: %s", e.Device, s.Name, src, times(v.Packets, "packet", "packets"))
	d.eventOf(v, e)
	if !fresh {
		return
	}
	all, own := s.Settings["net.ipv4.conf.all.rp_filter"], s.Settings["net.ipv4.conf."+e.Device+".rp_filter"]
	v.Where.Hook = "route"
	v.saw("net.ipv4.conf.all.rp_filter = %s, net.ipv4.conf.%s.rp_filter = %s: the larger counts; 1 is strict, 2 loose", orNone(all), e.Device, orNone(own))
	v.saw("TcpExt.IPReversePathFilter +%d (/proc/net/netstat)", s.rose("TcpExt.IPReversePathFilter"))
	v.Fix = s.in("sysctl -w net.ipv4.conf.%s.rp_filter=2", e.Device)
	v.Undo = s.in("sysctl -w net.ipv4.conf.%s.rp_filter=%s", e.Device, orZero(own))
	switch p := d.path(e.Space, "", netip.Addr{}, src); {
	case p != nil && p.Device != "":
		v.saw("the route back to %s leaves by %s, the packet came by %s: %s", src, p.Device, e.Device, p.Route)
	case p != nil:
		v.saw("there is no route back to %s (errno %d): with one by %s the packets would be taken", src, p.Errno, e.Device)
		v.Fix = s.in("ip route add %s dev %s", src, e.Device)
		v.Undo = s.in("ip route del %s dev %s", src, e.Device)
	}
	v.isNot("%s: no hook of a firewall was reached", FirewallDrop)
	v.Owner = "sysctl; systemd and some distributions set it to strict, CNI plug-ins set it off on their devices"
}

// duplicate: somebody else has an address of this namespace.
func (d *diagnosis) duplicate(s *Space, e *seen, address netip.Addr) {
	v, fresh := d.verdict(DuplicateAddress, s, address.String(), e)
	v.Title = fmt.Sprintf("another host uses %s, an address of %s", address, s.Name)
	if e != nil {
		d.eventOf(v, e)
	}
	if !fresh {
		return
	}
	v.Where.Hook = "route"
	v.saw("%s has %s itself (RTM_GETADDR)", s.Name, address)
	for _, o := range d.owners(address) {
		if o != s {
			v.saw("%s has it, too", o.Name)
		}
	}
	v.isNot("%s: the source is an ordinary address, but it is this host's own", MartianSource)
	device := "DEVICE"
	for _, a := range s.Addrs {
		if l := s.linkAt(a.Index); a.Prefix.Addr() == address && l != nil {
			device = fmt.Sprintf("%s dev %s", a.Prefix, l.Name)
		}
	}
	v.Fix, v.Undo = "take the address from one of the two: "+s.in("ip addr del %s", device), s.in("ip addr add %s", device)
	v.Owner = "whoever gives out addresses (IPAM, DHCP, or a person)"
}

func (d *diagnosis) martian(s *Space, e *seen) {
	src := e.Tuple.Source.Addr()
	v, fresh := d.verdict(MartianSource, s, e.Device+src.String(), e)
	v.Title = fmt.Sprintf("packets from %s to %s come to %s by %s: such addresses never come by a wire", src, e.Tuple.Destination.Addr(), s.Name, e.Device)
	d.eventOf(v, e)
	if !fresh {
		return
	}
	v.Where.Hook = "route"
	if src.IsLoopback() || e.Tuple.Destination.Addr().IsLoopback() {
		v.saw("net.ipv4.conf.%s.route_localnet = %s", e.Device, orNone(s.Settings["net.ipv4.conf."+e.Device+".route_localnet"]))
	}
	v.isNot("%s: the route back was not looked for", ReversePath)
	v.Fix = "find the sender: " + s.in("tcpdump -eni %s src host %s", e.Device, src) + " shows its hardware address; its programs bind to a loopback address, or a rule translates sources wrongly"
	v.Undo = "nothing is changed by looking"
	v.Owner = "the sender"
}

// duplicates: neighbour discovery of IPv6 has found that somebody has the address.
func (d *diagnosis) duplicates() {
	for _, s := range d.Spaces {
		for _, a := range s.Addrs {
			if !a.Duplicate {
				continue
			}
			d.duplicate(s, nil, a.Prefix.Addr())
			v := d.keys[fmt.Sprint(DuplicateAddress, " ", s.Inode, " ", a.Prefix.Addr())]
			v.saw("the address is marked dadfailed: another host answered for it")
			if l := s.linkAt(a.Index); l != nil {
				v.Where.Interface = l.Name
			}
			// Without it programs send from the address of the wire, which no router forwards.
			d.folds(DuplicateAddress, func(e *seen) bool {
				src := e.Tuple.Source.Addr()
				asks := (e.Kind == NeighFailed || e.unresolved()) && e.Space == s.Inode && e.Tuple.Destination.Addr() == a.Prefix.Addr()
				return asks || e.Kind == Drop && e.Reason == "IP_INADDRERRORS" && src.Is6() && src.IsLinkLocalUnicast() && s.owns(src)
			})
		}
	}
}
