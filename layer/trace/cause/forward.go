package cause

import (
	"fmt"
	"net/netip"
	"slices"
)

// misforwarded: a bridge's forwarding entry leads to a port behind which the hardware
// address is not: one that somebody put in, or one that is left of before it moved. What
// goes to that address dies elsewhere, or comes to nobody who counts it.
func (d *diagnosis) misforwarded() {
	for _, s := range d.Spaces {
		homes := map[int]map[[6]byte][]behindPort{} // by bridge
		for i := range s.Forwards {
			f := &s.Forwards[i]
			bridge, port := s.linkAt(f.Bridge), s.linkAt(f.Port)
			if bridge == nil || port == nil || f.VLAN != 0 && s.sendsAll(f) {
				continue
			}
			if homes[f.Bridge] == nil {
				homes[f.Bridge] = d.homesBehind(s, bridge)
			}
			at := homes[f.Bridge][f.MAC]
			if len(at) == 1 && (f.Local || at[0].port.Index != f.Port) {
				d.wrongPort(s, f, at[0])
			}
		}
	}
}

// sendsAll says that an entry without a VLAN is there for the same address: it counts
// where the bridge does not tell VLANs apart.
func (s *Space) sendsAll(f *Forward) bool {
	return slices.ContainsFunc(s.Forwards, func(o Forward) bool {
		return o.VLAN == 0 && o.Bridge == f.Bridge && o.MAC == f.MAC
	})
}

// behindPort is a device, and the port of a bridge that it is behind.
type behindPort struct {
	port *Link
	home place
}

// homesBehind are the devices behind a bridge's ports, and its own, by hardware address.
func (d *diagnosis) homesBehind(s *Space, bridge *Link) map[[6]byte][]behindPort {
	homes := map[[6]byte][]behindPort{}
	add := func(port *Link, p place) { homes[p.link.MAC] = append(homes[p.link.MAC], behindPort{port, p}) }
	own := func(p place) bool {
		return p.space == s && (p.link.Index == bridge.Index || p.link.Master == bridge.Index)
	}
	for i := range s.After.Links {
		port := &s.After.Links[i]
		if !own(place{s, port}) {
			continue
		}
		add(port, place{s, port})
		add(port, place{s, port}) // an entry for one of the bridge's own is never wrong
		if other, peer := d.peer(port); peer != nil {
			for _, p := range d.reach(place{other, peer}, own) {
				if p.link.Master == 0 && !shares(p.link) {
					add(port, p)
				}
			}
		}
	}
	return homes
}

// wrongPort names an entry, if a conversation with who has the address does not get on.
func (d *diagnosis) wrongPort(s *Space, f *Forward, at behindPort) {
	home := at.home
	has := func(a netip.Addr) bool {
		return slices.ContainsFunc(home.space.Addrs, func(own Addr) bool {
			l := home.space.linkAt(own.Index) // or one upon the device
			return own.Prefix.Addr() == a && l != nil && l.MAC == f.MAC
		})
	}
	for _, e := range d.open(Drop, Retransmit, SocketError, CallFailed, NeighFailed) {
		asks := e.Kind == NeighFailed && e.Space == home.space.Inode && e.Index == home.link.Index // is not answered
		if !e.vanishes(s) || !asks && !has(e.Tuple.Source.Addr()) && !has(e.Tuple.Destination.Addr()) && !has(d.nextHop(e)) {
			continue
		}
		v, fresh := d.verdict(BridgeWrongPort, s, fmt.Sprint(f.Bridge, macText(f.MAC)), e)
		d.eventOf(v, e)
		if !fresh {
			continue
		}
		tellWrongPort(v, s, f, at)
	}
}

// tellWrongPort fills in a new verdict.
func tellWrongPort(v *Verdict, s *Space, f *Forward, at behindPort) {
	port, bridge, right, home := s.linkAt(f.Port), s.linkAt(f.Bridge), at.port, at.home
	v.Where.Interface, v.Where.Hook = port.Name, "bridge"
	who := fmt.Sprintf("%s of %s", home.link.Name, home.space.Name)
	v.Title = fmt.Sprintf("bridge %s in %s sends what is for %s (%s) out by port %s, but it is behind port %s", bridge.Name, s.Name, macText(f.MAC), who, port.Name, right.Name)
	kind, words := "learned, or put in as static", "master static"
	if f.Fixed {
		kind, words = "put in by somebody, so that the bridge does not learn better", "master static sticky"
	}
	if f.Local {
		v.Title = fmt.Sprintf("bridge %s in %s keeps what is for %s (%s) to its own host, but it is behind port %s", bridge.Name, s.Name, macText(f.MAC), who, right.Name)
		words = "master local"
	}
	vlan := ""
	if f.VLAN != 0 {
		vlan = fmt.Sprintf(" vlan %d", f.VLAN)
	}
	v.saw("forwarding entry of %s: %s dev %s, %s (RTM_GETNEIGH, bridge fdb show br %s)", bridge.Name, macText(f.MAC), port.Name, kind, bridge.Name)
	v.saw("%s has %s and is behind %s (RTM_GETLINK)", who, macText(f.MAC), right.Name)
	v.isNot("%s: ports %s and %s are up and forward", BridgePortBlocked, port.Name, right.Name)
	v.isNot("%s: %s is the address that its owner has", WrongMAC, macText(f.MAC))
	v.Fix, v.Undo = s.in("bridge fdb del %s dev %s master%s", macText(f.MAC), port.Name, vlan), s.in("bridge fdb replace %s dev %s %s%s", macText(f.MAC), port.Name, words, vlan)
	v.Owner = "whoever put the entry in (a CNI plug-in, EVPN, or a person)"
	if !f.Fixed {
		v.Owner = "the bridge, which has not heard of " + who + " since it moved"
	}
}

// vanishes says that an event is what one meets whose frames go astray at a bridge of s:
// they die there or at another host, or somebody waits for them in vain.
func (e *seen) vanishes(s *Space) bool {
	switch e.Kind {
	case Drop:
		return !byFirewall(e) && (!e.Tuple.noise() || isDiscovery(e.Event)) && (e.Reason == "OTHERHOST" || e.unresolved() || e.Space == s.Inode)
	case SocketError, CallFailed:
		return e.Errno == eHOSTUNREACH || e.Errno == eTIMEDOUT
	}
	return true
}
