package cause

import (
	"fmt"
	"net/netip"
	"slices"
)

// otherAnswers: answers come from another address than the one that was asked, so that no
// socket waits for them. A server of datagrams sends from the address that its route
// likes; or an address was translated on the way there, and the answer takes a way on
// which nobody translates it back.
func (d *diagnosis) otherAnswers() {
	for _, e := range d.open(Drop) {
		if e.Reason != "NO_SOCKET" {
			continue
		}
		s := d.spaces[e.Space]
		asked, sure, found := d.askedFor(s, e)
		if !found {
			continue
		}
		from := e.Tuple.Source
		at := s
		if home := d.home(asked.Addr(), from.Addr()); home != nil && e.Tuple.Protocol == protoUDP {
			at = home
		}
		v, fresh := d.verdict(OtherAnswer, at, fmt.Sprint(e.Tuple.Protocol, asked, from.Addr()), e)
		d.eventOf(v, e)
		v.Title = fmt.Sprintf("%s asks %s %s and is answered by %s, which it does not know: %s", s.Name, protocolName(e.Tuple.Protocol), shown(asked), shown(from), times(v.Packets, "answer dies", "answers die"))
		if fresh {
			d.tellAnswer(v, s, at, e, asked, sure)
		}
		d.folds(OtherAnswer, func(o *seen) bool {
			mine := o.Space == e.Space && o.Tuple.Destination.Addr() == from.Addr() && o.Tuple.Destination.Port() == from.Port()
			return mine && (o.Kind == ICMPSent || o.Kind == ResetSent) || o.Space == e.Space && o.Kind == ICMPSent && same(o.Tuple, e.Tuple)
		})
	}
}

// tellAnswer fills in a new verdict.
func (d *diagnosis) tellAnswer(v *Verdict, s, at *Space, e *seen, asked netip.AddrPort, sure bool) {
	from, client := e.Tuple.Source, e.Tuple.Destination.Addr()
	v.Where.Hook = "socket"
	v.isNot("%s: %s is the port of a client, which waits for %s", NoListener, shown(e.Tuple.Destination), shown(asked))
	if !sure {
		v.Confidence = Medium
	}
	if at != s || e.Tuple.Protocol == protoUDP {
		v.saw("sockets of %s are connected to %s (sock_diag); an answer from %s is for none of them", s.Name, shown(asked), from.Addr())
		if at != s {
			v.saw("%s has both addresses (RTM_GETADDR)", at.Name)
		}
		v.Fix = fmt.Sprintf("let the program at port %d answer from the address that was asked: bind a socket to %s, or use IP_PKTINFO; %s shows from which it sends", from.Port(), asked.Addr(), at.in("ip route get %s", client))
		v.Undo, v.Owner = "bind it as it was", "the program that answers"
		if holder := at.holder(e.Tuple.Protocol, from); holder != "" {
			v.Owner = holder
		}
		return
	}
	v.saw("%s sends SYNs to %s again and again, and never sent one to %s", s.Name, shown(asked), shown(from))
	v.isNot("%s: the answers arrive", FirewallDrop)
	rule := fmt.Sprintf("POSTROUTING -s %s -d %s -p tcp --dport %d -j MASQUERADE", client, from.Addr(), from.Port())
	v.Fix = fmt.Sprintf("let the answers come back by the host that translates %s to %s, by translating the source there, too: iptables -t nat -A %s", shown(asked), shown(from), rule)
	v.Undo = "iptables -t nat -D " + rule
	v.Owner = "whoever translates " + shown(asked)
	for _, o := range d.Spaces {
		for _, r := range o.Rules {
			if r.Verdict == "dnat" {
				v.saw("%s translates destinations: %s", o.Name, r.describe())
				v.Owner = r.owner()
				v.Fix = fmt.Sprintf("%s # so that answers come back by %s, which translates; on a bridge sysctl net.bridge.bridge-nf-call-iptables=1 does it as well", o.in("iptables -t nat -A %s", rule), o.Name)
				v.Undo = o.in("iptables -t nat -D %s", rule)
				return
			}
		}
	}
}

// holder is who has a socket bound to an end.
func (s *Space) holder(protocol uint8, end netip.AddrPort) string {
	for _, o := range s.After.Sockets {
		if o.Protocol == protocol && o.Local == end {
			return s.process(o.Inode)
		}
	}
	return ""
}

// home is the space that has both addresses, nil if none is known.
func (d *diagnosis) home(a, b netip.Addr) *Space {
	for _, s := range d.owners(a) {
		if s.owns(b) {
			return s
		}
	}
	return nil
}

// askedFor finds whom a space had asked when an answer came from somebody else: a remote
// end with another address, for which a socket waits. It is sure if that socket has the
// port that the answer came to.
func (d *diagnosis) askedFor(s *Space, e *seen) (asked netip.AddrPort, sure, found bool) {
	from, port := e.Tuple.Source, e.Tuple.Destination.Port()
	switch {
	case e.Tuple.Protocol == protoUDP && s.ephemeral(port) && !e.traceroute():
		for _, o := range append(slices.Clone(s.Before.Sockets), s.After.Sockets...) {
			other := o.Protocol == protoUDP && o.Remote.Port() == from.Port() && o.Remote.Addr().Is4() == from.Addr().Is4() && o.Remote.Addr() != from.Addr()
			if other && (o.Local.Port() == port || d.home(o.Remote.Addr(), from.Addr()) != nil) {
				return o.Remote, true, true
			}
		}
		for _, b := range append(slices.Clone(s.Before.Busy), s.After.Busy...) {
			if b.Protocol == protoUDP && b.Remote.Port() == from.Port() && b.Remote.Addr() != from.Addr() && d.home(b.Remote.Addr(), from.Addr()) != nil {
				return b.Remote, true, true
			}
		}
	case e.Tuple.Protocol == protoTCP && e.Tuple.TCPFlags&(flagSYN|flagACK|flagRST) == flagSYN|flagACK:
		if slices.ContainsFunc(d.events, func(o *seen) bool {
			return o.Space == s.Inode && (o.Kind == StateChange || o.Kind == Retransmit) && o.Tuple.Destination == from
		}) {
			return asked, false, false // it had asked this one, too, and has given up
		}
		for _, o := range d.events {
			if o.Space != s.Inode || o.Kind != Retransmit || o.OldState != tcpSynSent || o.Tuple.Source.Addr() != e.Tuple.Destination.Addr() {
				continue
			}
			if o.Tuple.Source.Port() == port {
				return o.Tuple.Destination, true, true
			}
			asked, found = o.Tuple.Destination, true
		}
	}
	return asked, false, found
}
