package cause

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// place is a device in a namespace.
type place struct {
	space *Space
	link  *Link
}

// segment are the devices that frames from one can reach through device pairs and
// bridges, in the namespaces looked at; those that are down included.
func (d *diagnosis) segment(s *Space, l *Link) []place {
	return d.reach(place{s, l}, func(place) bool { return false })
}

// reach is segment, but for what is behind a place that ends it.
func (d *diagnosis) reach(from place, ends func(place) bool) (all []place) {
	waiting := []place{from}
	for len(waiting) > 0 {
		at := waiting[0]
		waiting = waiting[1:]
		if at.link == nil || ends(at) || slices.ContainsFunc(all, func(p place) bool { return p.space == at.space && p.link.Index == at.link.Index }) {
			continue
		}
		all = append(all, at)
		if other, peer := d.peer(at.link); peer != nil {
			waiting = append(waiting, place{other, peer})
		}
		bridge := at.link.Master
		if at.link.Kind == "bridge" {
			bridge = at.link.Index
		}
		for i := range at.space.After.Links {
			o := &at.space.After.Links[i]
			if bridge != 0 && (o.Master == bridge || o.Index == bridge) {
				waiting = append(waiting, place{at.space, o})
			}
		}
	}
	return all
}

// owner is where an address is, among the places.
func owner(of []place, a netip.Addr) (place, bool) {
	for _, p := range of {
		for _, own := range p.space.Addrs {
			if own.Prefix.Addr() == a && own.Index == p.link.Index {
				return p, true
			}
		}
	}
	return place{}, false
}

// broken is where a device that does not carry is down: itself, or the other end.
func (d *diagnosis) broken(s *Space, l *Link) (place, bool) {
	switch {
	case l == nil || l.Name == "lo":
		return place{}, false
	case !l.Up:
		return place{s, l}, true
	case l.Carrier:
		return place{}, false
	}
	if other, peer := d.peer(l); peer != nil && !peer.Up {
		return place{other, peer}, true
	}
	return place{s, l}, true
}

// nextHop is to whom a packet goes from a space.
func (d *diagnosis) nextHop(e *seen) netip.Addr {
	for _, from := range []string{"", e.Device} {
		if p := d.path(e.Space, from, e.Tuple.Source.Addr(), e.Tuple.Destination.Addr()); p != nil && p.Gateway.IsValid() {
			return p.Gateway
		}
	}
	return e.Tuple.Destination.Addr()
}

// downLinks: a device is down, or has no carrier, and what was to go by it dies: at the
// device, for no neighbour answers, or for the routes by it have gone.
func (d *diagnosis) downLinks() {
	for _, e := range d.open(Drop, NeighFailed, CallFailed, SocketError) {
		if e.Kind == CallFailed || e.Kind == SocketError {
			if e.Errno != eHOSTUNREACH && e.Errno != eNETUNREACH && e.Errno != 100 { // ENETDOWN
				continue
			}
		}
		if e.Kind == Drop && !strings.HasPrefix(e.Reason, "QDISC_") && !slices.Contains([]string{"NEIGH_FAILED", "NEIGH_CREATEFAIL", "DEV_READY",
			"IP_INNOROUTES", "IP_OUTNOROUTES", "NO_TX_TARGET", "NOT_SPECIFIED", "IP_INADDRERRORS"}, e.Reason) {
			continue
		}
		if e.Tuple.noise() && !isDiscovery(e.Event) {
			continue
		}
		s := d.spaces[e.Space]
		at, found := d.downFor(s, e)
		if !found {
			continue
		}
		d.linkDown(at, s, e)
	}
	for _, v := range d.verdicts {
		if v.Cause == LinkDown {
			d.folds(LinkDown, func(e *seen) bool {
				return e.Kind == ICMPSent && e.Type == 3 || e.Kind == Drop && e.Tuple.EtherType == etherARP
			})
		}
	}
}

// downFor finds the device that is down for an event.
func (d *diagnosis) downFor(s *Space, e *seen) (place, bool) {
	if l := s.link(e.Device); l != nil && l.Name == "lo" && !l.Up {
		return place{s, l}, true
	}
	if l := s.link(e.Device); l != nil {
		routed := e.Reason == "IP_INNOROUTES" || e.Reason == "NOT_SPECIFIED" && !strings.Contains(e.Location, "forward_skb")
		if !routed {
			if at, down := d.broken(s, l); down {
				return at, true
			}
			if other, peer := d.peer(l); peer != nil && !peer.Up {
				return place{other, peer}, true
			}
		}
	}
	to := e.Tuple.Destination.Addr()
	if e.Kind == NeighFailed || e.unresolved() {
		return d.downBetween(s, e, to)
	}
	if e.Reason == "NOT_SPECIFIED" && e.Location != "ip_error" && !strings.HasPrefix(e.Location, "ip6_") && !strings.HasPrefix(e.Location, "inet6_csk_xmit") {
		return place{}, false
	}
	// The route is gone with the device: it led where the device's addresses are.
	p := d.path(e.Space, "", netip.Addr{}, to)
	if p != nil && p.Errno == 0 {
		return place{}, false
	}
	for _, a := range s.Addrs {
		l := s.linkAt(a.Index)
		if at, down := d.broken(s, l); down && a.Prefix.Addr().Is4() == to.Is4() {
			if a.Prefix.Contains(to) || d.onlyWay(s, l) {
				return at, true
			}
		}
	}
	for i := range s.After.Links { // addresses of IPv6 go with it as well
		l := &s.After.Links[i]
		if at, down := d.broken(s, l); down && d.onlyWay(s, l) {
			return at, true
		}
	}
	return place{}, false
}

// onlyWay says that a device has come down within the window, or is the only one that is
// not up: the routes that led by it are not to be seen any more.
func (d *diagnosis) onlyWay(s *Space, l *Link) bool {
	for _, was := range s.Before.Links {
		if was.Index == l.Index && was.Up && was.Carrier {
			return true
		}
	}
	others := 0
	for _, o := range s.After.Links {
		if o.Name != "lo" && o.Up && o.Carrier {
			others++
		}
	}
	return others == 0
}

// downBetween finds a device that is down between a space and its neighbour.
func (d *diagnosis) downBetween(s *Space, e *seen, _ netip.Addr) (place, bool) {
	l := s.link(e.Device)
	if l == nil {
		return place{}, false
	}
	hop := e.Tuple.Destination.Addr()
	if e.Kind == Drop {
		hop = d.nextHop(e)
	}
	all := d.segment(s, l)
	home, known := owner(all, hop)
	for _, p := range all {
		if p.link.Name == "lo" || p.link.Up && p.link.Carrier {
			continue
		}
		_, peer := d.peer(p.link)
		near := known && (p.space == home.space || peer != nil && d.spaces[p.link.PeerSpace] == home.space)
		mine := p.space == s || peer != nil && d.spaces[p.link.PeerSpace] == s
		if near || mine {
			return d.broken(p.space, p.link)
		}
	}
	return place{}, false
}

// linkDown names it.
func (d *diagnosis) linkDown(at place, s *Space, e *seen) {
	v, fresh := d.verdict(LinkDown, at.space, at.link.Name, e)
	if e.Kind == Drop {
		v.saw("%s dropped at %s in %s, reason %s: %s", times(e.Count, "packet", "packets"), e.Location, s.Name, e.Reason, flow(e.Tuple))
	}
	if !fresh {
		return
	}
	v.Where.Interface, v.Where.Hook = at.link.Name, "device"
	state := "is down"
	v.Fix, v.Undo = at.space.in("ip link set %s up", at.link.Name), at.space.in("ip link set %s down", at.link.Name)
	if at.link.Up {
		state = "has no carrier: its cable, or its other end, is down"
		v.Fix, v.Undo = "set the other end of "+at.link.Name+" up", "set it down again"
	}
	v.Title = fmt.Sprintf("device %s in %s %s", at.link.Name, at.space.Name, state)
	v.saw("%s in %s: up %t, carrier %t (RTM_GETLINK)", at.link.Name, at.space.Name, at.link.Up, at.link.Carrier)
	if other, peer := d.peer(at.link); peer != nil {
		v.saw("its other end %s in %s: up %t, carrier %t", peer.Name, other.Name, peer.Up, peer.Carrier)
	}
	v.isNot("%s: nobody can answer there before the device is up", NeighbourMissing)
	v.Owner = "whoever set " + at.link.Name + " down"
}

// bridges: a bridge's port takes no packets, for its spanning tree state is not forwarding.
func (d *diagnosis) bridges() {
	blocked := func(p place, e *seen) {
		if m := p.space.linkAt(p.link.Master); m != nil && !m.Up {
			d.linkDown(place{p.space, m}, d.spaces[e.Space], e)
			return
		}
		v, fresh := d.verdict(BridgePortBlocked, p.space, p.link.Name, e)
		if e.Kind == Drop {
			v.saw("%s dropped at %s, reason %s: %s", times(e.Count, "packet", "packets"), e.Location, e.Reason, flow(e.Tuple))
		}
		if !fresh {
			return
		}
		bridge := ""
		if m := p.space.linkAt(p.link.Master); m != nil {
			bridge = m.Name
		}
		v.Where.Interface, v.Where.Hook = p.link.Name, "bridge"
		v.Title = fmt.Sprintf("port %s of bridge %s in %s does not forward: its state is %s", p.link.Name, bridge, p.space.Name, orNone(p.link.PortState))
		if p.link.PortState == "forwarding" {
			v.Title = fmt.Sprintf("port %s of bridge %s in %s did not forward yet, and does so now: it waits after it comes up", p.link.Name, bridge, p.space.Name)
		}
		v.saw("%s: state %s (RTM_GETLINK, IFLA_BRPORT_STATE)", p.link.Name, p.link.PortState)
		v.isNot("%s: the port is up", LinkDown)
		v.Fix = p.space.in("bridge link set dev %s state 3", p.link.Name)
		number := slices.Index([]string{"disabled", "listening", "learning", "forwarding", "blocking"}, p.link.PortState)
		v.Undo = p.space.in("bridge link set dev %s state %d", p.link.Name, max(number, 0))
		if p.link.PortState == "forwarding" {
			v.Fix, v.Undo = p.space.in("ip link set %s type bridge forward_delay 200", bridge)+" lets ports wait for 4 s instead of 30", p.space.in("ip link set %s type bridge forward_delay 1500", bridge)
		}
		v.Owner = "the spanning tree of bridge " + bridge + ", or whoever set the state"
	}
	for _, e := range d.open(Drop) {
		stp := strings.Contains(e.Reason, "STP_STATE") || e.Reason == "NOT_SPECIFIED" && strings.HasPrefix(e.Location, "br_handle_frame")
		if !stp {
			continue
		}
		s := d.spaces[e.Space]
		if l := s.link(e.Device); l != nil && l.Master != 0 && l.Up && (l.PortState != "forwarding" || e.Reason != "NOT_SPECIFIED") {
			blocked(place{s, l}, e)
		}
	}
	for _, e := range d.open(NeighFailed, Drop) {
		// A switch that knows behind which port a host is drops what may not leave by it.
		kept := e.Reason == "NO_TX_TARGET" && strings.HasPrefix(e.Location, "br_")
		if e.Kind == Drop && !e.unresolved() && !kept {
			continue
		}
		s := d.spaces[e.Space]
		l := s.link(e.Device)
		if l == nil {
			continue
		}
		if d.isolated(s, l, e) || d.withheld(s, l, e) {
			continue
		}
		for _, p := range d.segment(s, l) {
			if p.link.PortState != "" && p.link.PortState != "forwarding" && p.link.Up && p.link.Carrier {
				blocked(p, e)
				break
			}
		}
	}
}

// isolated: the ports of a bridge by which a packet comes and would have to leave are
// isolated from each other.
func (d *diagnosis) isolated(s *Space, l *Link, e *seen) bool {
	hop := e.Tuple.Destination.Addr()
	if e.Kind == Drop {
		hop = d.nextHop(e)
	}
	all := d.segment(s, l)
	home, known := owner(all, hop)
	if !known {
		return false
	}
	port := func(of *Space) (place, bool) {
		for _, p := range all {
			if other, peer := d.peer(p.link); p.link.Isolated && peer != nil && other == of {
				return p, true
			}
		}
		return place{}, false
	}
	near, ok := port(s)
	far, there := port(home.space)
	if !ok || !there || near.space != far.space || near.link.Master != far.link.Master {
		return false
	}
	v, fresh := d.verdict(BridgePortBlocked, near.space, near.link.Name+far.link.Name, e)
	d.eventOf(v, e)
	if !fresh {
		return true
	}
	bridge := ""
	if m := near.space.linkAt(near.link.Master); m != nil {
		bridge = m.Name
	}
	v.Where.Interface, v.Where.Hook = near.link.Name, "bridge"
	v.Title = fmt.Sprintf("ports %s and %s of bridge %s in %s are isolated: nothing passes from one to the other", near.link.Name, far.link.Name, bridge, near.space.Name)
	v.saw("%s and %s: isolated on (RTM_GETLINK, IFLA_BRPORT_ISOLATED)", near.link.Name, far.link.Name)
	v.saw("%s is behind %s, and is asked for by %s", hop, far.link.Name, s.Name)
	v.isNot("%s: both ports are up", LinkDown)
	v.isNot("%s: %s has the address", NeighbourMissing, home.space.Name)
	v.Fix, v.Undo = near.space.in("bridge link set dev %s isolated off", near.link.Name), near.space.in("bridge link set dev %s isolated on", near.link.Name)
	v.Owner = "whoever isolated the ports (the CNI plug-in bridge does with portIsolation)"
	return true
}

// withheld: the port behind which a host is, is not given what goes to all: questions for
// its hardware address (ARP to all, neighbour discovery to a group), or frames to one that
// the bridge does not know yet.
func (d *diagnosis) withheld(s *Space, l *Link, e *seen) bool {
	hop, kind := e.Tuple.Destination.Addr(), "flood"
	if e.Kind == Drop {
		hop = d.nextHop(e)
	}
	if e.Kind == NeighFailed || e.unresolved() {
		kind = map[bool]string{true: "bcast_flood", false: "mcast_flood"}[hop.Is4()]
	}
	all := d.segment(s, l)
	home, known := owner(all, hop)
	if !known {
		return false
	}
	i := slices.IndexFunc(all, func(p place) bool {
		other, peer := d.peer(p.link)
		return slices.Contains(p.link.Withheld, kind) && peer != nil && other == home.space
	})
	if i < 0 {
		return false
	}
	p := all[i]
	v, fresh := d.verdict(BridgePortBlocked, p.space, p.link.Name+kind, e)
	d.eventOf(v, e)
	if !fresh {
		return true
	}
	what := map[string]string{"flood": "frames to hardware addresses that the bridge does not know", "mcast_flood": "frames to groups, such as questions of neighbour discovery",
		"bcast_flood": "frames to all, such as questions of ARP"}[kind]
	v.Where.Interface, v.Where.Hook = p.link.Name, "bridge"
	v.Title = fmt.Sprintf("port %s in %s is not given %s: nothing for %s gets there", p.link.Name, p.space.Name, what, hop)
	v.saw("%s: %s off (RTM_GETLINK, IFLA_BRPORT_*_FLOOD)", p.link.Name, kind)
	v.saw("%s is behind it, in %s", hop, home.space.Name)
	v.isNot("%s: the port is up", LinkDown)
	v.isNot("%s: %s has the address", NeighbourMissing, home.space.Name)
	v.Fix, v.Undo = p.space.in("bridge link set dev %s %s on", p.link.Name, kind), p.space.in("bridge link set dev %s %s off", p.link.Name, kind)
	v.Owner = "whoever set it (a switch's configuration, EVPN)"
	return true
}
