package cause

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

const (
	overhead4, overhead6 = 50, 70 // bytes that VXLAN puts before a packet (RFC 7348, 5), with its Ethernet header
)

// tunnels are the vxlan devices of a space.
func (s *Space) tunnels() (all []*Link) {
	for i := range s.After.Links {
		if s.After.Links[i].VXLAN != nil {
			all = append(all, &s.After.Links[i])
		}
	}
	return all
}

// vxlan: the two ends of a tunnel do not fit each other.
func (d *diagnosis) vxlan() {
	for _, e := range d.open(Drop) {
		s := d.spaces[e.Space]
		switch {
		case e.Reason == "VXLAN_VNI_NOT_FOUND", e.Reason == "NOT_SPECIFIED" && strings.HasPrefix(e.Location, "vxlan_rcv") && s.hasNot(e):
			d.unknownID(s, e)
		case e.Reason == "NO_TX_TARGET" && strings.HasPrefix(e.Location, "vxlan"), e.Reason == "NOT_SPECIFIED" && strings.HasPrefix(e.Location, "vxlan_xmit"):
			d.noPeer(s, e)
		case (e.Reason == "NO_SOCKET" || e.Reason == "") && e.Tuple.Protocol == protoUDP:
			d.otherPort(s, e)
		}
	}
	for _, v := range d.verdicts {
		if v.Tuple != nil && slices.Contains([]string{VXLANUnknownID, VXLANNoPeer, VXLANPort}, v.Cause) {
			d.behindTunnel(v)
		}
	}
}

// behindTunnel folds neighbours that are asked for through a tunnel that is broken, from
// its own host or from behind a bridge: the questions die with all else.
func (d *diagnosis) behindTunnel(v *Verdict) {
	through := func(e *seen) bool {
		s, hop := d.spaces[e.Space], e.Tuple.Destination.Addr()
		l := s.link(e.Device)
		if l == nil {
			return false
		}
		if e.Kind == Drop {
			hop = d.nextHop(e)
		}
		all := d.segment(s, l)
		if _, near := owner(all, hop); near {
			return false
		}
		return slices.ContainsFunc(all, func(p place) bool {
			return p.link.VXLAN != nil && (p.space.Name == v.Where.Namespace || slices.Contains(d.owners(v.Tuple.Source.Addr()), p.space))
		})
	}
	d.folds(v.Cause, func(e *seen) bool {
		unreachable := e.Kind == ICMPSent && (e.Type == 3 && e.Code == 1 || e.Type == 1 && e.Code == 3)
		return (e.Kind == NeighFailed || e.unresolved() || unreachable) && through(e)
	})
}

// throughTunnels takes verdicts back about neighbours that are asked for through a tunnel,
// where the packets of the tunnel itself have a cause: the questions are inside.
func (d *diagnosis) throughTunnels() {
	within := func(v *Verdict) bool {
		if v.Cause != NeighbourMissing {
			return false
		}
		for _, s := range d.Spaces {
			l := s.link(v.Where.Interface)
			if s.Name != v.Where.Namespace || l == nil {
				continue
			}
			for _, p := range d.segment(s, l) {
				if x := p.link.VXLAN; x != nil && slices.ContainsFunc(d.verdicts, func(o *Verdict) bool { return o != v && o.carries(x) }) {
					return true
				}
			}
		}
		return false
	}
	inside := map[*Verdict]bool{} // the decision about one must not hang on that about another
	for _, v := range d.verdicts {
		inside[v] = within(v)
	}
	d.verdicts = slices.DeleteFunc(d.verdicts, func(v *Verdict) bool { return inside[v] })
}

// carries says that a verdict is about packets between the ends of a tunnel.
func (v *Verdict) carries(x *VXLAN) bool {
	if v.Tuple == nil || v.Tuple.Protocol != "udp" && v.Tuple.Protocol != "" {
		return false
	}
	from, to := v.Tuple.Source.Addr(), v.Tuple.Destination.Addr()
	ends := []netip.Addr{x.Group}
	for _, peers := range x.Peers {
		ends = append(ends, peers...)
	}
	port := v.Tuple.Destination.Port()
	return (port == 0 || int(port) == x.Port) && slices.ContainsFunc(ends, func(a netip.Addr) bool { return a.IsValid() && (a == from || a == to) })
}

// network finds the VXLAN header in a packet: behind UDP, its flag for a network number
// is set.
func (e *Event) network() (vni int, found bool) {
	raw := e.Packet
	at := -1
	switch {
	case len(raw) >= 20 && raw[0]>>4 == 4:
		at = int(raw[0]&15)*4 + 8
	case len(raw) >= 48 && raw[0]>>4 == 6:
		at = 48
	}
	if at < 0 || at+8 > len(raw) || raw[at]&^0x80 != 8 || raw[at+7] != 0 {
		return 0, false
	}
	return int(binary.BigEndian.Uint32(raw[at+4:]) >> 8), true
}

// network is the tunnel of a space that has a network number; nil if none has.
func (s *Space) network(vni int) *Link {
	for _, l := range s.tunnels() {
		if l.VXLAN.ID == vni && !l.VXLAN.External {
			return l
		}
	}
	return nil
}

// hasNot says that a packet is of a network that no tunnel here takes at its port.
func (s *Space) hasNot(e *seen) bool {
	vni, read := e.network()
	l := s.network(vni)
	return read && (l == nil || !l.Up || l.VXLAN.Port != int(e.Tuple.Destination.Port()))
}

// unknownID: the socket that a packet came to has no device for its network number. If
// this space has the network at another port, the port is wrong and not the number:
// tunnels with the same port share a socket, so a packet for one may come to another.
func (d *diagnosis) unknownID(s *Space, e *seen) {
	vni, read := e.network()
	if l := s.network(vni); read && l != nil {
		switch {
		case l.VXLAN.Port != int(e.Tuple.Destination.Port()):
			d.portMismatch(s, e, l)
			return
		case !l.Up:
			d.linkDown(place{s, l}, s, e)
			return
		}
	}
	v, fresh := d.verdict(VXLANUnknownID, s, fmt.Sprint(vni), e)
	d.eventOf(v, e)
	if !fresh {
		return
	}
	v.Where.Hook = "vxlan"
	var have []string
	var first *Link
	for _, l := range s.tunnels() {
		have = append(have, fmt.Sprintf("%s has %d", l.Name, l.VXLAN.ID))
		if first == nil {
			first = l
		}
	}
	what := "a VXLAN network number"
	if read {
		what = fmt.Sprintf("VXLAN network %d", vni)
	}
	v.Title = fmt.Sprintf("%s comes to %s from %s, which has no device for it (%s)", what, s.Name, e.Tuple.Source.Addr(), strings.Join(have, ", "))
	v.isNot("%s: the socket at port %d was found", VXLANPort, e.Tuple.Destination.Port())
	v.Owner = "whoever made the tunnel (the CNI plug-in)"
	v.Fix = "make the two ends agree: " + s.in("ip -d link show type vxlan") + " shows the numbers of this one"
	v.Undo = "nothing is changed by looking"
	if first != nil && read {
		v.Where.Interface = first.Name
		v.saw("vxlan devices of %s: %s (RTM_GETLINK)", s.Name, strings.Join(have, ", "))
		v.Fix = fmt.Sprintf("make the two ends agree: %s; ip link add %s type vxlan id %d ...", s.in("ip link del %s", first.Name), first.Name, vni)
		v.Undo = fmt.Sprintf("make it again with id %d", first.VXLAN.ID)
	}
}

func (d *diagnosis) noPeer(s *Space, e *seen) {
	l := s.link(e.Device)
	if l == nil || e.Tuple.noise() && len(l.VXLAN.Peers) > 0 {
		e.by = "benign"
		return
	}
	v, fresh := d.verdict(VXLANNoPeer, s, e.Device+macText(e.MAC), e)
	d.eventOf(v, e)
	if !fresh {
		return
	}
	v.Where.Hook = "vxlan"
	v.Title = fmt.Sprintf("vxlan device %s in %s does not know to which host frames for %s go", e.Device, s.Name, macText(e.MAC))
	if e.MAC == [6]byte{} {
		v.Title = fmt.Sprintf("vxlan device %s in %s does not know to which host frames go", e.Device, s.Name)
	}
	if l.VXLAN != nil {
		v.saw("forwarding entries of %s: %d, none for it and none for all else (bridge fdb show dev %s)", e.Device, len(l.VXLAN.Peers), e.Device)
	}
	v.saw("tx_dropped of %s +%d", e.Device, s.linkRose(l.Index, "tx_dropped"))
	v.isNot("%s: the packet reached the tunnel", NoRoute)
	mac := macText(e.MAC)
	if e.MAC == [6]byte{} {
		mac = "MAC"
	}
	v.Fix, v.Undo = s.in("bridge fdb append %s dev %s dst HOST", mac, e.Device), s.in("bridge fdb del %s dev %s dst HOST", mac, e.Device)
	v.Owner = "the CNI plug-in, which keeps the entries"
}

// otherPort: what comes to a port where nobody is looks like VXLAN, and there is a tunnel
// here with another port, or there with this one.
func (d *diagnosis) otherPort(s *Space, e *seen) {
	port := int(e.Tuple.Destination.Port())
	vni, looks := e.network()
	var near *Link
	for _, l := range s.tunnels() {
		switch {
		case l.VXLAN.Port == port && !l.Up: // its socket has gone with it
			d.linkDown(place{s, l}, s, e)
			return
		case l.VXLAN.Port != port && (near == nil || l.VXLAN.ID == vni):
			near = l
		}
	}
	far := false
	for _, o := range d.owners(e.Tuple.Source.Addr()) {
		far = far || slices.ContainsFunc(o.tunnels(), func(l *Link) bool { return l.VXLAN.Port == port })
	}
	if near == nil && !far || !looks && !far {
		return
	}
	d.portMismatch(s, e, near)
}

// portMismatch names it; near is the tunnel here that the packet was for, nil if it is
// not known.
func (d *diagnosis) portMismatch(s *Space, e *seen, near *Link) {
	port := int(e.Tuple.Destination.Port())
	vni, _ := e.network()
	v, fresh := d.verdict(VXLANPort, s, fmt.Sprint(port), e)
	d.eventOf(v, e)
	if !fresh {
		return
	}
	v.Where.Hook = "socket"
	v.Title = fmt.Sprintf("VXLAN comes to %s at port %d, where no tunnel listens", s.Name, port)
	v.Fix, v.Undo = "give both ends the same dstport", "give it the old one"
	if near != nil {
		v.Where.Interface = near.Name
		v.Title = fmt.Sprintf("VXLAN of network %d comes to %s at port %d, but %s there uses port %d", vni, s.Name, port, near.Name, near.VXLAN.Port)
		v.Fix = fmt.Sprintf("give both ends the same port: %s; ip link add %s type vxlan id %d dstport %d ...", s.in("ip link del %s", near.Name), near.Name, near.VXLAN.ID, port)
		v.Undo = fmt.Sprintf("make it again with dstport %d", near.VXLAN.Port)
	}
	v.isNot("%s: the packet is one of a tunnel, no program was to take it", NoListener)
	v.Owner = "whoever made the tunnel (4789 is the standard's port, 8472 Linux' and flannel's)"
	d.folds(VXLANPort, func(o *seen) bool {
		return o.Kind == ICMPSent && o.Tuple.Protocol == protoUDP && int(o.Tuple.Destination.Port()) == port
	})
}

// fragmentsOfTunnels: a tunnel's packets do not fit the device below, and are cut and put
// together again, every one of them: nothing is lost but time.
func (d *diagnosis) fragmentsOfTunnels() {
	for _, s := range d.Spaces {
		cut := s.rose("Ip.FragCreates", "Ip6FragCreates")
		if cut == 0 {
			continue
		}
		for _, l := range s.tunnels() {
			below, mtu := d.underlay(s, l)
			need := overhead4
			if l.VXLAN.Local.Is6() || l.VXLAN.Group.Is6() {
				need = overhead6
			}
			if mtu == 0 || l.MTU+need <= mtu || s.linkRose(l.Index, "tx_packets") == 0 {
				continue
			}
			v, _ := d.verdict(VXLANFragments, s, l.Name, nil)
			v.Where.Interface, v.Where.Hook = l.Name, "vxlan"
			v.Title = fmt.Sprintf("packets of vxlan device %s in %s are cut in pieces: its MTU %d and %d bytes of header do not fit into %d of %s", l.Name, s.Name, l.MTU, need, mtu, below)
			v.saw("Ip.FragCreates +%d, Ip6FragCreates +%d (/proc/net/snmp)", s.rose("Ip.FragCreates"), s.rose("Ip6FragCreates"))
			v.saw("MTU of %s %d, of the way below it %d (RTM_GETLINK, RTM_GETROUTE)", l.Name, l.MTU, mtu)
			v.isNot("%s: nothing is lost, every packet is put together again", MTUBlackHole)
			v.Fix, v.Undo = s.in("ip link set %s mtu %d", l.Name, mtu-need), s.in("ip link set %s mtu %d", l.Name, l.MTU)
			v.Owner = "the CNI plug-in, which sets the tunnel's MTU"
		}
	}
}

// underlay is what a tunnel's packets leave by.
func (d *diagnosis) underlay(s *Space, l *Link) (device string, mtu int) {
	if u := s.linkAt(l.VXLAN.Underlay); l.VXLAN.Underlay != 0 && u != nil {
		return u.Name, u.MTU
	}
	targets := []netip.Addr{l.VXLAN.Group}
	for _, peers := range l.VXLAN.Peers {
		targets = append(targets, peers...)
	}
	for _, to := range targets {
		for i := range d.Paths {
			p := &d.Paths[i]
			if p.Space == s.Inode && p.Destination == to && p.From == "" && p.MTU > 0 && (mtu == 0 || p.MTU < mtu) {
				device, mtu = p.Device, p.MTU
			}
		}
	}
	return device, mtu
}
