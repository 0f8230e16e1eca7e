package cause

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// neighbours: nobody answers for the next hop's address.
func (d *diagnosis) neighbours() {
	for _, e := range d.open(Drop) {
		if e.unresolved() {
			d.unresolved(e, d.nextHop(e))
		}
	}
	for _, e := range d.open(NeighFailed) {
		// Without a packet that waited for it, nobody missed it: a host that has gone.
		if d.wanted(e) {
			d.unresolved(e, e.Tuple.Destination.Addr())
		}
	}
	d.behindNoPort()
	for _, v := range d.verdicts {
		if v.Cause != NeighbourMissing {
			continue
		}
		d.folds(NeighbourMissing, func(e *seen) bool {
			unreachable := e.Kind == ICMPSent && (e.Type == 3 && e.Code == 1 || e.Type == 1 && e.Code == 3)
			told := (e.Kind == SocketError || e.Kind == CallFailed) && e.Errno == eHOSTUNREACH
			return unreachable || told
		})
	}
}

// behindNoPort: a bridge has no port to which a frame may go: who had its hardware address
// has gone, and the sender does not know it yet.
func (d *diagnosis) behindNoPort() {
	for _, e := range d.open(Drop) {
		if e.Reason != "NO_TX_TARGET" || !strings.HasPrefix(e.Location, "br_") || e.Count < often || !d.suffered(e.Tuple) {
			continue
		}
		hop := d.nextHop(e)
		if slices.ContainsFunc(d.Spaces, func(s *Space) bool { return d.keys[fmt.Sprint(NeighbourMissing, " ", s.Inode, " ", hop)] != nil }) {
			e.by = NeighbourMissing
			continue
		}
		v, fresh := d.verdict(NeighbourMissing, d.spaces[e.Space], hop.String(), e)
		if fresh {
			v.Title = fmt.Sprintf("the bridge behind %s in %s has no port for %s (hardware address %s): it has gone", e.Device, v.Where.Namespace, hop, macText(e.MAC))
			d.tellGone(v, e, hop)
		}
		d.eventOf(v, e)
	}
}

// tellGone fills in a verdict about a host that is not there any more.
func (d *diagnosis) tellGone(v *Verdict, e *seen, hop netip.Addr) {
	s := d.spaces[e.Space]
	v.Where.Hook = "neighbour"
	if len(d.owners(hop)) == 0 {
		v.saw("no namespace looked at has %s (RTM_GETADDR)", hop)
	}
	v.isNot("%s: %s is up with carrier", LinkDown, orNone(e.Device))
	v.isNot("%s: there is a route, and it names this next hop", NoRoute)
	v.Fix = fmt.Sprintf("bring %s back, or let its clients ask for another one: who names it is to be found (a Service's endpoints, DNS, a route)", hop)
	v.Undo, v.Owner = "nothing is changed by looking", "the host that should have "+hop.String()
	if s.Pod != "" {
		v.Owner += ", pod " + s.Pod
	}
}

// oldEntry: a packet for somebody else came because another namespace has this one's
// hardware address for its destination: it is no router for it. Its owner is elsewhere,
// or nobody has the address any more.
func (d *diagnosis) oldEntry(s *Space, e *seen) bool {
	l, to := s.link(e.Device), e.Tuple.Destination.Addr()
	if l == nil {
		return false
	}
	for _, o := range d.Spaces {
		if o == s || !slices.ContainsFunc(o.Neighs, func(n Neigh) bool { return n.Addr == to && n.MAC == l.MAC }) {
			continue
		}
		if d.keys[fmt.Sprint(WrongMAC, " ", o.Inode, " ", to)] != nil {
			e.by = WrongMAC
			return true
		}
		if len(d.owners(to)) > 0 {
			return false
		}
		v, fresh := d.verdict(NeighbourMissing, o, to.String(), e)
		d.eventOf(v, e)
		if fresh {
			v.Where.Interface = ""
			v.Title = fmt.Sprintf("%s sends what is for %s to %s in %s, which has not got this address, or not any more", o.Name, to, l.Name, s.Name)
			v.saw("neighbour table of %s: %s lladdr %s, which is that of %s in %s", o.Name, to, macText(l.MAC), l.Name, s.Name)
			v.isNot("%s: %s is to have the address, not to forward", ForwardingOff, s.Name)
			d.tellGone(v, e, to)
		}
		return true
	}
	return false
}

// unresolved says that a packet died while it waited for a neighbour's answer.
func (e *Event) unresolved() bool {
	return e.Kind == Drop && (e.Reason == "NEIGH_FAILED" || e.Reason == "NEIGH_CREATEFAIL" ||
		e.Reason == "NOT_SPECIFIED" && (strings.HasPrefix(e.Location, "neigh_invalidate") || strings.HasSuffix(e.Location, "_error_report")))
}

// wanted says that a program or a packet needed a neighbour that failed.
func (d *diagnosis) wanted(e *seen) bool {
	return slices.ContainsFunc(d.events, func(o *seen) bool {
		told := (o.Kind == SocketError || o.Kind == CallFailed) && o.Errno == eHOSTUNREACH
		unreachable := o.Kind == ICMPSent && o.Space == e.Space && (o.Type == 3 && o.Code == 1 || o.Type == 1 && o.Code == 3)
		return told && (o.Space == e.Space || o.Tuple.Destination.Addr() == e.Tuple.Destination.Addr()) || unreachable
	})
}

func (d *diagnosis) unresolved(e *seen, hop netip.Addr) {
	s := d.spaces[e.Space]
	if hop.IsLinkLocalUnicast() && e.Kind == NeighFailed || !hop.IsValid() {
		e.by = "benign"
		return
	}
	v, fresh := d.verdict(NeighbourMissing, s, hop.String(), e)
	d.eventOf(v, e)
	asks := "ARP"
	if hop.Is6() {
		asks = "neighbour discovery"
	}
	v.Title = fmt.Sprintf("nobody answers %s for %s on %s in %s", asks, hop, orNone(v.Where.Interface), s.Name)
	if !fresh {
		return
	}
	v.Where.Hook = "neighbour"
	for _, n := range s.Neighs {
		if n.Addr == hop {
			v.saw("neighbour table: %s %s (RTM_GETNEIGH)", hop, neighState(n.State))
		}
	}
	if l := s.link(e.Device); l != nil {
		v.isNot("%s: %s is up with carrier", LinkDown, l.Name)
		d.whySilent(v, s, l, hop)
	}
	v.isNot("%s: there is a route, and it names this next hop", NoRoute)
	v.Fix = s.in("arping -I %s %s", e.Device, hop)
	if hop.Is6() {
		v.Fix = s.in("ndisc6 %s %s", hop, e.Device)
	}
	v.Fix += fmt.Sprintf(" shows whether anybody answers; if the host has another address, mend the route: %s", s.in("ip route get %s", e.Tuple.Destination.Addr()))
	v.Undo = "nothing is changed by asking"
	v.Owner = "the host that should have " + hop.String() + ", or whoever made the route"
}

// whySilent adds why a host that is among those looked at does not answer.
func (d *diagnosis) whySilent(v *Verdict, s *Space, l *Link, hop netip.Addr) {
	all := d.segment(s, l)
	if home, known := owner(all, hop); known {
		v.saw("%s has the address on %s, which frames from %s reach", home.space.Name, home.link.Name, l.Name)
		if ignore := home.space.Settings["net.ipv4.conf."+home.link.Name+".arp_ignore"]; ignore != "" && ignore != "0" {
			v.saw("net.ipv4.conf.%s.arp_ignore = %s in %s", home.link.Name, ignore, home.space.Name)
		}
		return
	}
	for _, o := range d.owners(hop) {
		v.saw("%s has the address, but frames from %s do not reach it", o.Name, l.Name)
	}
}

func neighState(state int) string {
	for _, s := range []struct {
		bit  int
		name string
	}{{neighIncomplete, "INCOMPLETE"}, {2, "REACHABLE"}, {4, "STALE"}, {8, "DELAY"}, {16, "PROBE"}, {neighFailed, "FAILED"}, {0x40, "NOARP"}, {neighPermanent, "PERMANENT"}} {
		if state&s.bit != 0 {
			return s.name
		}
	}
	return fmt.Sprintf("state %#x", state)
}

func macText(mac [6]byte) string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5])
}

// wrongMAC: frames go to a hardware address that the next hop does not have.
func (d *diagnosis) wrongMAC() {
	for _, e := range d.open(Drop) {
		if e.Reason != "OTHERHOST" {
			continue
		}
		s := d.spaces[e.Space]
		sender, entry := d.entryFor(s, e)
		if entry == nil && !s.owns(e.Tuple.Destination.Addr()) {
			e.by = "benign" // a bridge floods what is for others
			continue
		}
		d.staleEntry(s, e, sender, entry)
	}
	for _, s := range d.Spaces {
		for i := range s.Neighs {
			d.nobodysMAC(s, &s.Neighs[i])
		}
	}
}

// entryFor finds the neighbour entry that led a frame to a space: one with the frame's
// hardware address, for an address of that space.
func (d *diagnosis) entryFor(s *Space, e *seen) (*Space, *Neigh) {
	for _, o := range d.Spaces {
		for i := range o.Neighs {
			n := &o.Neighs[i]
			if o != s && n.MAC == e.MAC && n.MAC != [6]byte{} && s.owns(n.Addr) && !n.Addr.IsLoopback() {
				return o, n
			}
		}
	}
	return nil, nil
}

func (d *diagnosis) staleEntry(s *Space, e *seen, sender *Space, entry *Neigh) {
	at, object := s, macText(e.MAC)
	if entry != nil {
		at, object = sender, entry.Addr.String()
	}
	v, fresh := d.verdict(WrongMAC, at, object, e)
	d.eventOf(v, e)
	if !fresh {
		return
	}
	v.Where.Hook = "neighbour"
	own := ""
	if l := s.link(e.Device); l != nil {
		own = macText(l.MAC)
	}
	v.Title = fmt.Sprintf("frames for %s reach %s in %s with hardware address %s, which is not its own (%s)", e.Tuple.Destination.Addr(), e.Device, s.Name, macText(e.MAC), own)
	v.saw("%s in %s has %s (RTM_GETLINK)", e.Device, s.Name, own)
	v.Fix, v.Undo = "ip neigh flush to "+e.Tuple.Destination.Addr().String()+" on the sender", "nothing: the kernel asks again"
	v.Owner = "the sender's neighbour table"
	if entry != nil {
		device := at.linkAt(entry.Index)
		name := ""
		if device != nil {
			name = device.Name
		}
		v.Where.Interface = name
		v.Title = fmt.Sprintf("%s has hardware address %s for %s, but its owner %s has %s", at.Name, macText(entry.MAC), entry.Addr, s.Name, own)
		v.saw("neighbour table of %s: %s lladdr %s %s (RTM_GETNEIGH)", at.Name, entry.Addr, macText(entry.MAC), neighState(entry.State))
		v.Fix, v.Undo = at.in("ip neigh del %s dev %s", entry.Addr, name), at.in("ip neigh replace %s lladdr %s dev %s nud %s", entry.Addr, macText(entry.MAC), name, strings.ToLower(neighState(entry.State)))
		if entry.State&neighPermanent != 0 {
			v.Owner = "whoever put the permanent entry in"
		}
	}
	v.isNot("%s: it arrives, and is not taken", LinkDown)
	v.isNot("%s: somebody's address is known, a wrong one", NeighbourMissing)
}

// nobodysMAC names an entry whose hardware address nobody has: a bridge between swallows
// the frames without a sign. It takes a conversation that does not get on.
func (d *diagnosis) nobodysMAC(s *Space, n *Neigh) {
	l := s.linkAt(n.Index)
	if l == nil || n.State&(neighFailed|neighIncomplete) != 0 || n.MAC == [6]byte{} {
		return
	}
	all := d.segment(s, l)
	home, known := owner(all, n.Addr)
	if !known || home.space == s || home.link.MAC == n.MAC ||
		slices.ContainsFunc(all, func(p place) bool { return p.link.MAC == n.MAC && p.space.owns(n.Addr) }) || d.keys[fmt.Sprint(WrongMAC, " ", s.Inode, " ", n.Addr)] != nil {
		return
	}
	for _, e := range d.open(Retransmit, SocketError, CallFailed) {
		if e.Space != s.Inode && !slices.ContainsFunc(d.owners(e.Tuple.Source.Addr()), func(o *Space) bool { return o == s }) {
			continue
		}
		if hop := d.nextHop(e); hop != n.Addr && e.Tuple.Destination.Addr() != n.Addr {
			continue
		}
		v, fresh := d.verdict(WrongMAC, s, n.Addr.String(), e)
		if !fresh {
			continue
		}
		v.Where.Interface, v.Where.Hook = l.Name, "neighbour"
		v.Title = fmt.Sprintf("%s has hardware address %s for %s, but its owner %s has %s", s.Name, macText(n.MAC), n.Addr, home.space.Name, macText(home.link.MAC))
		v.saw("neighbour table of %s: %s lladdr %s %s (RTM_GETNEIGH)", s.Name, n.Addr, macText(n.MAC), neighState(n.State))
		v.saw("%s in %s has %s (RTM_GETLINK)", home.link.Name, home.space.Name, macText(home.link.MAC))
		v.saw("%s sent again, without an answer: %s", times(e.Count, "packet", "packets"), flow(e.Tuple))
		v.isNot("%s: an entry is there, a wrong one", NeighbourMissing)
		v.Fix, v.Undo = s.in("ip neigh del %s dev %s", n.Addr, l.Name), s.in("ip neigh replace %s lladdr %s dev %s nud %s", n.Addr, macText(n.MAC), l.Name, strings.ToLower(neighState(n.State)))
		v.Owner = "whoever put the entry in"
	}
}

// sameMAC: two devices on one wire have the same hardware address (a machine was copied,
// an address was set by hand): a switch sends frames to the one that spoke last.
func (d *diagnosis) sameMAC() {
	type pair struct {
		one, other place
		found      bool
	}
	known := map[netip.Addr]pair{}
	for _, e := range d.open(Drop, Retransmit) {
		misled := routed(e) || e.Reason == "OTHERHOST" || strings.HasPrefix(e.Location, "br_dev_xmit")
		if e.Kind == Drop && !misled || e.Tuple.noise() {
			continue
		}
		for _, a := range []netip.Addr{e.Tuple.Destination.Addr(), e.Tuple.Source.Addr()} {
			p, looked := known[a]
			if !looked {
				p.one, p.other, p.found = d.twins(a)
				known[a] = p
			}
			if p.found {
				d.namesTwins(e, a, p.one, p.other)
				break
			}
		}
	}
}

// twins are the device that has an address, and another one on its wire, in another
// namespace, with the same hardware address.
func (d *diagnosis) twins(a netip.Addr) (one, other place, found bool) {
	for _, s := range d.owners(a) {
		for _, own := range s.Addrs {
			l := s.linkAt(own.Index)
			if own.Prefix.Addr() != a || l == nil || l.Name == "lo" || shares(l) {
				continue
			}
			for _, p := range d.segment(s, l) {
				if p.space != s && p.link.MAC == l.MAC && p.link.Up && p.link.Master == 0 && !shares(p.link) {
					return place{s, l}, p, true
				}
			}
		}
	}
	return one, other, false
}

// shares says that a device is meant to have an address that others have as well: those
// upon another device, and routers that stand in for each other (VRRP, RFC 9568, 7.3).
func shares(l *Link) bool {
	return l.MAC == [6]byte{} || slices.Contains([]string{"ipvlan", "vlan", "vxlan", "tun"}, l.Kind) || l.MAC[0] == 0 && l.MAC[1] == 0 && l.MAC[2] == 0x5e
}

func (d *diagnosis) namesTwins(e *seen, a netip.Addr, one, other place) {
	if d.explainedBy(e, FirewallDrop, FirewallReject, WrongMAC, DuplicateAddress) {
		return
	}
	v, fresh := d.verdict(DuplicateMAC, one.space, macText(one.link.MAC), e)
	d.eventOf(v, e)
	d.folds(DuplicateMAC, func(o *seen) bool {
		return o.Kind == ICMPSent && o.Type == 5 && same(o.Tuple, e.Tuple)
	})
	if !fresh {
		return
	}
	v.Where.Interface, v.Where.Hook = one.link.Name, "device"
	v.Title = fmt.Sprintf("%s in %s and %s in %s have the same hardware address %s: frames for %s go to either", one.link.Name, one.space.Name, other.link.Name, other.space.Name, macText(one.link.MAC), a)
	v.saw("%s in %s and %s in %s: %s (RTM_GETLINK), on one wire", one.link.Name, one.space.Name, other.link.Name, other.space.Name, macText(one.link.MAC))
	v.isNot("%s: %s is an address of %s only", DuplicateAddress, a, one.space.Name)
	v.isNot("%s: the neighbours' entries have the owner's address", WrongMAC)
	mac := fmt.Sprintf("02:%02x:%02x:%02x:%02x:%02x", one.link.MAC[1], one.link.MAC[2], one.link.MAC[3], one.link.MAC[4], one.link.MAC[5]^1)
	v.Fix = other.space.in("ip link set %s address %s", other.link.Name, mac)
	v.Undo = other.space.in("ip link set %s address %s", other.link.Name, macText(other.link.MAC))
	v.Owner = "whoever made one of the two from the other, or set its address"
}
