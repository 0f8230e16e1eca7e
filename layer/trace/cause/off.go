package cause

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// sixOff: packets of IPv6 come by a device that takes none. Where it is to be so nobody
// sends any but to groups.
func (d *diagnosis) sixOff() {
	for _, e := range d.events {
		if e.Kind != Drop || e.Reason != "IPV6DISABLED" {
			continue
		}
		s, to := d.spaces[e.Space], e.Tuple.Destination.Addr()
		if to.IsMulticast() {
			if to = d.soughtBy(e); !to.IsValid() {
				continue
			}
		} else if e.Count < often || !d.suffered(e.Tuple) {
			continue
		}
		v, fresh := d.verdict(IPv6Off, s, e.Device, e)
		d.eventOf(v, e)
		v.Title = fmt.Sprintf("IPv6 is off on %s in %s, and packets for %s come to it: %s", e.Device, s.Name, to, times(v.Packets, "packet dropped", "packets dropped"))
		if fresh {
			tellOff(v, s, e)
		}
		d.folds(IPv6Off, func(o *seen) bool {
			return (o.Kind == NeighFailed || o.unresolved() || o.Kind == ICMPSent) && (o.Tuple.Destination.Addr() == to || o.Kind == Drop && d.nextHop(o) == to)
		})
	}
}

func tellOff(v *Verdict, s *Space, e *seen) {
	const least = 1280 // of IPv6 (RFC 8200, 5)
	v.Where.Hook = "device"
	setting := "net.ipv6.conf." + e.Device + ".disable_ipv6"
	v.saw("%s = %s, net.ipv6.conf.all.disable_ipv6 = %s", setting, orNone(s.Settings[setting]), orNone(s.Settings["net.ipv6.conf.all.disable_ipv6"]))
	v.isNot("%s: the packets arrive at the device", NeighbourMissing)
	v.isNot("%s: no hook of a firewall was reached", FirewallDrop)
	v.Fix, v.Undo = s.in("sysctl -w %s=0", setting)+", and give it its address again, which went with it", s.in("sysctl -w %s=1", setting)
	if l := s.link(e.Device); l != nil && l.MTU < least {
		v.saw("%s has MTU %d, and IPv6 needs %d", e.Device, l.MTU, least)
		v.Fix, v.Undo = s.in("ip link set %s mtu %d", e.Device, least)+", and give it its address again, which went with it", s.in("ip link set %s mtu %d", e.Device, l.MTU)
	}
	v.Owner = "sysctl; CNI plug-ins and container runtimes set it for pods that are to have IPv4 only"
}

// soughtBy is the address that a question for a neighbour is about, if somebody asks for
// it in vain: its last three bytes are those of the group (RFC 4291, 2.7.1).
func (d *diagnosis) soughtBy(e *seen) netip.Addr {
	if !isDiscovery(e.Event) {
		return netip.Addr{}
	}
	group := e.Tuple.Destination.Addr().As16()
	for _, o := range d.Spaces {
		for _, n := range o.Neighs {
			a := n.Addr.As16()
			if n.Addr.Is6() && !n.Addr.IsLinkLocalUnicast() && n.State&(neighFailed|neighIncomplete) != 0 && string(a[13:]) == string(group[13:]) {
				return n.Addr
			}
		}
	}
	return netip.Addr{}
}

// pings: a host is set not to answer pings, and is asked some. That may be meant so; who
// pings it cannot tell it from a host that is not there.
func (d *diagnosis) pings() {
	const fewest = 2
	for _, s := range d.Spaces {
		for _, of := range []struct{ family, setting, asked, answered string }{
			{"IPv4", "net.ipv4.icmp_echo_ignore_all", "Icmp.InEchos", "Icmp.OutEchoReps"},
			{"IPv6", "net.ipv6.icmp.echo_ignore_all", "Icmp6InEchos", "Icmp6OutEchoReplies"},
		} {
			n := s.rose(of.asked)
			if s.Settings[of.setting] != "1" || n < fewest || s.rose(of.answered) > 0 {
				continue
			}
			v, _ := d.verdict(PingIgnored, s, of.family, nil)
			v.Where.Hook, v.Confidence = "icmp", Medium
			v.Title = fmt.Sprintf("%s is set not to answer pings of %s: %s, none answered", s.Name, of.family, times(n, "came", "came"))
			v.saw("%s = 1", of.setting)
			v.saw("%s +%d, %s +0 in %s", of.asked, n, of.answered, s.Name)
			v.isNot("%s: the pings arrive", FirewallDrop)
			v.isNot("%s: a host that is asked is there", NeighbourMissing)
			v.Fix, v.Undo = s.in("sysctl -w %s=0", of.setting), s.in("sysctl -w %s=1", of.setting)
			v.Owner = "sysctl: somebody may want it so"
		}
	}
}

// policies: a policy of IPsec lets packets not through, or wants them encrypted.
func (d *diagnosis) policies() {
	for _, e := range d.open(Drop) {
		if !strings.HasPrefix(e.Reason, "XFRM_") {
			continue
		}
		s := d.spaces[e.Space]
		v, fresh := d.verdict(IPsecPolicy, s, e.Reason, e)
		d.eventOf(v, e)
		v.Title = fmt.Sprintf("a policy of IPsec in %s lets %s not through: %s", s.Name, flow(e.Tuple), times(v.Packets, "packet dropped", "packets dropped"))
		if !fresh {
			continue
		}
		v.Where.Hook = "ipsec"
		v.isNot("%s: the packet died at %s, not at a hook of netfilter", FirewallDrop, orNone(e.Location))
		v.Fix, v.Undo = s.in("ip xfrm policy")+" lists them, "+s.in("ip xfrm state")+" the keys that they want", "nothing is changed by looking"
		v.Owner = "the program that keeps the keys (strongSwan, libreswan, a CNI plug-in with encryption), or a person"
		if i := slices.IndexFunc(s.Policies, func(p Policy) bool { return p.fits(e.Tuple) }); i >= 0 {
			p := s.Policies[i]
			v.saw("it fits: %s %s (ip xfrm policy)", p.Text, "action block")
			v.Fix, v.Undo = s.in("ip xfrm policy delete %s", p.Text), s.in("ip xfrm policy add %s action block", p.Text)
		} else {
			v.Confidence = Medium
		}
	}
}

// signatures: a connection is to be signed (TCP-MD5, TCP-AO), and one end does not know of
// it or has another key: speakers of BGP with different passwords.
func (d *diagnosis) signatures() {
	for _, e := range d.open(Drop) {
		if !strings.HasPrefix(e.Reason, "TCP_MD5") && !strings.HasPrefix(e.Reason, "TCP_AO") && e.Reason != "TCP_AUTH_HDR" {
			continue
		}
		s, from, to := d.spaces[e.Space], e.Tuple.Source, e.Tuple.Destination
		v, fresh := d.verdict(TCPSignature, s, from.Addr().String()+e.Reason, e)
		d.eventOf(v, e)
		fault := "has a wrong signature"
		switch {
		case strings.HasSuffix(e.Reason, "NOTFOUND"):
			fault = "is not signed as it has to be, or with a key that nobody has"
		case strings.HasSuffix(e.Reason, "UNEXPECTED"):
			fault = "is signed, and no key is set for it"
		}
		v.Title = fmt.Sprintf("what %s sends to %s in %s %s: %s", from.Addr(), shown(to), s.Name, fault, times(v.Packets, "packet dropped", "packets dropped"))
		if !fresh {
			continue
		}
		v.Where.Hook = "socket"
		v.isNot("%s: the packet came as far as the sockets", FirewallDrop)
		v.isNot("%s: a socket has the port, and would refuse with a reset", NoListener)
		v.Fix = fmt.Sprintf("give both ends the same password (of BGP: of the peer %s), or none", from.Addr())
		v.Undo, v.Owner = "give them the old ones", "the program that sets TCP_MD5SIG or TCP_AO on its socket"
		for _, o := range s.listeners() {
			if holder := s.process(o.Inode); o.Local.Port() == to.Port() && holder != "" {
				v.Owner = holder
			}
		}
	}
}

func (p Policy) fits(t Tuple) bool {
	within := func(of netip.Prefix, a netip.Addr) bool { return !of.IsValid() || of.Bits() == 0 || of.Contains(a) }
	return within(p.From, t.Source.Addr()) && within(p.To, t.Destination.Addr()) &&
		(p.Protocol == 0 || p.Protocol == t.Protocol) && (p.Port == 0 || p.Port == t.Destination.Port())
}
