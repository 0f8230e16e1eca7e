package cause

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// routed says that the routing code dropped a packet: the functions that a route without
// a way, or a refusing one, leads to.
func routed(e *seen) bool {
	if slices.Contains([]string{"IP_INNOROUTES", "IP_OUTNOROUTES", "IP_INADDRERRORS"}, e.Reason) {
		return true
	}
	if e.Reason != "NOT_SPECIFIED" && e.Reason != "" && e.Reason != "IP_INHDR" {
		return false
	}
	for _, prefix := range []string{"ip_error", "dst_discard", "ip6_pkt_", "ip6_forward", "ip_forward", "ip6_input", "ip_rcv_finish", "ip6_rcv_finish",
		"inet6_csk_xmit"} { // the last is of an open connection, whose route has gone
		if strings.HasPrefix(e.Location, prefix) {
			return true
		}
	}
	return false
}

// routes: no route leads on, or one that lets nothing through; or this is no router.
func (d *diagnosis) routes() {
	for _, e := range d.open(Drop) {
		if !routed(e) {
			continue
		}
		s := d.spaces[e.Space]
		p := d.path(e.Space, e.Device, e.Tuple.Source.Addr(), e.Tuple.Destination.Addr())
		if s.owns(e.Tuple.Destination.Addr()) {
			continue
		}
		listed := d.listedRefusal(s, e)
		switch {
		case p != nil && refusing(p.Type):
			d.refusingRoute(s, e, p)
		case d.noForwarding(s, e):
			if d.asked(e.Tuple.Destination.Addr()) {
				e.by = NeighbourMissing // it is to have the address, not to forward
				continue
			}
			if d.oldEntry(s, e) {
				continue
			}
			d.forwardingOff(s, e)
		case listed != nil:
			d.refusingRoute(s, e, listed)
		case e.Reason == "IP_INNOROUTES" || e.Reason == "IP_OUTNOROUTES" || p != nil && p.Errno == eNETUNREACH:
			d.noRoute(s, e)
		}
	}
	for _, e := range d.open(CallFailed, SocketError) {
		if !slices.Contains([]int{eNETUNREACH, eHOSTUNREACH, eACCES, eINVAL}, e.Errno) || !e.Tuple.Destination.Addr().IsValid() {
			continue
		}
		s := d.spaces[e.Space]
		p := d.path(e.Space, "", e.Tuple.Source.Addr(), e.Tuple.Destination.Addr())
		switch {
		case p != nil && refusing(p.Type):
			d.refusingRoute(s, e, p)
		case d.listedRefusal(s, e) != nil:
			d.refusingRoute(s, e, d.listedRefusal(s, e))
		case p != nil && p.Errno == eNETUNREACH && e.Errno == eNETUNREACH && e.Kind == CallFailed:
			// Resolvers connect UDP sockets only to learn which source address they would have.
			// Where there is no address of IPv6 they learn that all the time.
			if e.Tuple.Protocol == protoUDP && e.Call == "connect" && e.Tuple.is6() && !s.speaks6() {
				e.by = "benign"
				continue
			}
			d.noRoute(s, e)
		}
	}
	d.folds("route", func(e *seen) bool {
		return e.Kind == ICMPSent && slices.ContainsFunc(d.verdicts, func(v *Verdict) bool {
			return v.Where.Hook == "route" && v.Where.Namespace == d.spaces[e.Space].Name
		})
	})
}

// asked says that somebody asks for an address on the wire in vain.
func (d *diagnosis) asked(a netip.Addr) bool {
	return slices.ContainsFunc(d.Spaces, func(s *Space) bool {
		return slices.ContainsFunc(s.Neighs, func(n Neigh) bool { return n.Addr == a && n.State&(neighFailed|neighIncomplete) != 0 })
	})
}

// listedRefusal is the route or rule that lets nothing through and fits a packet, or a
// call, that the routing code refused though the route that it is told leads on: another
// table was asked, by the packet's mark or by what else a rule looks at. Nil unless there
// is just one.
func (d *diagnosis) listedRefusal(s *Space, e *seen) *Path {
	to := e.Tuple.Destination.Addr()
	var fit []Route
	for _, r := range s.Routes {
		if (!r.To.IsValid() || r.To.Contains(to)) && d.mayRefuse(s, e, r) {
			fit = append(fit, r)
		}
	}
	if len(fit) > 1 { // no message was sent: the kind that sends none
		fit = slices.DeleteFunc(fit, func(r Route) bool { return r.Type != "blackhole" })
	}
	if len(fit) != 1 {
		return nil
	}
	errno := map[string]int{"blackhole": eINVAL, "unreachable": eHOSTUNREACH, "prohibit": eACCES}[fit[0].Type]
	return &Path{Space: s.Inode, From: e.Device, Source: e.Tuple.Source.Addr(), Destination: to, Type: fit[0].Type, Errno: errno, Route: fit[0].Text}
}

// mayRefuse says that a route or rule of such a kind refuses as the event was refused: a
// rule of type unreachable says what is said where there is no route (fib_rules.c, FR_ACT_*).
func (d *diagnosis) mayRefuse(s *Space, e *seen, r Route) bool {
	if e.Kind == CallFailed || e.Kind == SocketError {
		own := e.Kind == CallFailed && !slices.ContainsFunc(d.events, func(o *seen) bool {
			return o.Kind == SocketError && o.Errno == e.Errno && o.Space == e.Space && same(o.Tuple, e.Tuple)
		})
		switch e.Errno {
		case eINVAL:
			return own && r.Type == "blackhole"
		case eACCES:
			return own && r.Type == "prohibit"
		case eHOSTUNREACH:
			return own && r.Type == "unreachable" && !r.Rule
		}
		return own && r.Type == "unreachable" && r.Rule && d.routeElse(s, e, r)
	}
	silent := e.Reason == "NOT_SPECIFIED" || e.Reason == ""
	switch {
	case e.Reason == "IP_INNOROUTES" || e.Reason == "IP_OUTNOROUTES" || silent && strings.HasPrefix(e.Location, "ip6_pkt_discard"):
		return r.Type == "unreachable" && r.Rule && d.routeElse(s, e, r)
	case !silent || e.Location != "ip_error" && !strings.HasPrefix(e.Location, "dst_discard") && !strings.HasPrefix(e.Location, "ip6_pkt_"):
		return false
	}
	for _, o := range d.events { // what was said, if anything: such messages are rationed
		if o.Kind != ICMPSent || o.Space != e.Space || !same(o.Tuple, e.Tuple) {
			continue
		}
		switch {
		case o.Type == 3 && o.Code == 13 || o.Type == 1 && o.Code == 1:
			return r.Type == "prohibit"
		case o.Type == 3 && o.Code == 1 || o.Type == 1:
			return r.Type == "unreachable"
		}
	}
	return true
}

// routeElse says that it is the rule that keeps an event from having a route: it is about
// the destination, or a packet that the rule is not about would have one.
func (d *diagnosis) routeElse(s *Space, e *seen, r Route) bool {
	p := d.path(s.Inode, "", netip.Addr{}, e.Tuple.Destination.Addr())
	return r.To.IsValid() && r.To.Bits() > 0 || p != nil && p.Errno == 0
}

// speaks6 says that a namespace has an address of IPv6 that reaches further than its wire.
func (s *Space) speaks6() bool {
	return slices.ContainsFunc(s.Addrs, func(a Addr) bool {
		own := a.Prefix.Addr()
		return own.Is6() && !own.IsLoopback() && !own.IsLinkLocalUnicast()
	})
}

func refusing(kind string) bool {
	return kind == "blackhole" || kind == "unreachable" || kind == "prohibit"
}

// refusingRoute names a route of type blackhole, unreachable or prohibit.
func (d *diagnosis) refusingRoute(s *Space, e *seen, p *Path) {
	id := map[string]string{"blackhole": RouteBlackhole, "unreachable": RouteUnreachable, "prohibit": RouteProhibit}[p.Type]
	v, fresh := d.verdict(id, s, p.Route, e)
	to := e.Tuple.Destination.Addr()
	act := map[string]string{"blackhole": "swallows, without a word,", "unreachable": "refuses as unreachable", "prohibit": "refuses as prohibited"}[p.Type]
	verb, text := "route", p.Route
	if slices.ContainsFunc(s.Routes, func(r Route) bool { return r.Text == p.Route && r.Rule }) {
		verb = "rule"
	}
	v.Title = fmt.Sprintf("the %s %q in %s %s what goes to %s", verb, p.Route, s.Name, act, to)
	d.eventOf(v, e)
	if !fresh {
		return
	}
	v.Where.Hook = "route"
	if !slices.ContainsFunc(d.Paths, func(o Path) bool { return o.Type == p.Type && o.Route == p.Route }) {
		v.saw("the route or rule of %s that refuses like this and fits the packet: %s", s.Name, p.Route)
	} else {
		v.saw("asked for the route from %s to %s, %s answers errno %d: %s", orAny(e.Tuple.Source.Addr()), to, s.Name, p.Errno, p.Route)
	}
	if p.Type == "blackhole" {
		v.isNot("%s: the packet died in the routing code (%s), not at a hook, and no ICMP message was sent", FirewallDrop, orNone(e.Location))
	} else {
		v.isNot("%s: the packet died in the routing code, not at a hook", FirewallReject)
		v.isNot("%s: there is a route, and it refuses", NoRoute)
	}
	six := ""
	if to.Is6() {
		six = "-6 "
	}
	v.Fix, v.Undo = s.in("ip %s%s del %s", six, verb, text), s.in("ip %s%s add %s", six, verb, text)
	v.Owner = "whoever put the " + verb + " in (ip " + verb + " show" + map[string]string{"route": " table all"}[verb] + " shows its protocol)"
}

func orAny(a netip.Addr) string {
	if !a.IsValid() || a.IsUnspecified() {
		return "any address"
	}
	return a.String()
}

// mostAlike is how many lines of evidence may differ in their ports alone.
const mostAlike = 3

// eventOf adds what happened to the evidence. Of the same that happened to many
// connections some examples are told.
func (d *diagnosis) eventOf(v *Verdict, e *seen) {
	s := d.spaces[e.Space]
	alike := fmt.Sprint(e.Kind, e.Space, e.Reason, e.Location, e.Call, e.PID, e.Errno, e.Tuple.Protocol, e.Tuple.Source.Addr(), e.Tuple.Destination.Addr())
	if v.alike == nil {
		v.alike = map[string]int{}
	}
	if v.alike[alike]++; v.alike[alike] > mostAlike {
		return
	}
	switch e.Kind {
	case Drop:
		v.saw("%s dropped at %s in %s, reason %s: %s", times(e.Count, "packet", "packets"), e.Location, s.Name, orNone(e.Reason), flow(e.Tuple))
	case CallFailed:
		v.saw("%s of %s (pid %d) in %s failed %s: %s: %s", e.Call, e.Command, e.PID, s.Name, times(e.Count, "time", "times"), errorName(e.Errno), flow(e.Tuple))
	case SocketError:
		v.saw("sockets in %s were told %s %s: %s", s.Name, errorName(e.Errno), times(e.Count, "time", "times"), flow(e.Tuple))
	case ResetSent:
		v.saw("%s sent in %s, reason %s: %s", times(e.Count, "reset", "resets"), s.Name, orNone(e.Reason), flow(e.Tuple))
	case NeighFailed:
		v.saw("neighbour %s on %s in %s failed %s", e.Tuple.Destination.Addr(), e.Device, s.Name, times(e.Count, "time", "times"))
	}
}

func errorName(number int) string {
	name := map[int]string{ePERM: "EPERM", eAGAIN: "EAGAIN", eACCES: "EACCES", eINVAL: "EINVAL", eMSGSIZE: "EMSGSIZE", eADDRINUSE: "EADDRINUSE",
		eADDRNOTAVAIL: "EADDRNOTAVAIL", eNETUNREACH: "ENETUNREACH", eCONNRESET: "ECONNRESET", eNOBUFS: "ENOBUFS", eTIMEDOUT: "ETIMEDOUT",
		eCONNREFUSED: "ECONNREFUSED", eHOSTUNREACH: "EHOSTUNREACH"}[number]
	if name == "" {
		return fmt.Sprintf("errno %d", number)
	}
	return name
}

// noForwarding says that a packet for somebody else came to a namespace that does not
// forward.
func (d *diagnosis) noForwarding(s *Space, e *seen) bool {
	if e.Device == "" || e.Tuple.noise() {
		return false
	}
	if e.Tuple.is6() {
		return strings.HasPrefix(e.Location, "ip6_forward") && s.Settings["net.ipv6.conf.all.forwarding"] == "0"
	}
	off := s.Settings["net.ipv4.conf."+e.Device+".forwarding"]
	if off == "" {
		off = s.Settings["net.ipv4.ip_forward"]
	}
	return off == "0" && (e.Reason == "IP_INADDRERRORS" || e.Location == "ip_error")
}

func (d *diagnosis) forwardingOff(s *Space, e *seen) {
	setting, counter := "net.ipv4.ip_forward", []string{"Ip.InAddrErrors"}
	if s.Settings[setting] == "1" {
		setting = "net.ipv4.conf." + e.Device + ".forwarding"
	}
	if e.Tuple.is6() {
		setting, counter = "net.ipv6.conf.all.forwarding", []string{"Ip6InAddrErrors"}
	}
	v, fresh := d.verdict(ForwardingOff, s, setting, e)
	v.Title = fmt.Sprintf("%s forwards nothing: %s is 0, and packets for others come to it (%s)", s.Name, setting, flow(e.Tuple))
	d.eventOf(v, e)
	if !fresh {
		return
	}
	v.Where.Hook = "route"
	v.saw("%s = 0", setting)
	v.saw("%s +%d (/proc/net/snmp)", counter[0], s.rose(counter...))
	v.isNot("%s: forwarding is refused before a route is used", NoRoute)
	v.Fix, v.Undo = s.in("sysctl -w %s=1", setting), s.in("sysctl -w %s=0", setting)
	v.Owner = "sysctl; the CNI plug-in sets it where a node routes for pods"
}

// noRoute names a destination to which no route leads. Where a program met it, it is the
// namespace's own; else it is one on the way.
func (d *diagnosis) noRoute(s *Space, e *seen) {
	to := e.Tuple.Destination.Addr()
	if e.Kind == CallFailed && d.answers(s, e) {
		d.routeBackMissing(s, to, e)
		return
	}
	v, fresh := d.verdict(NoRoute, s, to.String(), e)
	v.Title = fmt.Sprintf("%s has no route to %s", s.Name, to)
	d.eventOf(v, e)
	if !fresh {
		return
	}
	v.Where.Hook = "route"
	v.saw("asked for a route to %s, %s has none (RTM_GETROUTE)", to, s.Name)
	if e.Kind == CallFailed {
		v.saw("Ip.OutNoRoutes +%d, Ip6OutNoRoutes +%d", s.rose("Ip.OutNoRoutes"), s.rose("Ip6OutNoRoutes"))
	} else {
		v.saw("IpExt.InNoRoutes +%d, Ip6InNoRoutes +%d", s.rose("IpExt.InNoRoutes"), s.rose("Ip6InNoRoutes"))
	}
	v.isNot("%s, %s: no route matches at all", RouteUnreachable, RouteBlackhole)
	six := ""
	if to.Is6() {
		six = "-6 "
	}
	v.Fix = s.in("ip %sroute add %s %s", six, to, d.router(s, to))
	v.Undo = s.in("ip %sroute del %s", six, to)
	v.Owner = "whoever makes the routes of " + s.Name
}

// answers says that a call that failed was to answer: it came from a port that a socket
// without a fixed remote end holds.
func (d *diagnosis) answers(s *Space, e *seen) bool {
	return slices.ContainsFunc(s.After.Sockets, func(o Socket) bool {
		serves := o.State == tcpListen || o.Protocol == protoUDP && o.Remote.Port() == 0
		return serves && o.Protocol == e.Tuple.Protocol && o.Local.Port() == e.Tuple.Source.Port() && o.Local.Port() != 0 && !s.ephemeral(o.Local.Port())
	})
}

// ephemeral says that a port is one of those that the kernel gives to clients.
func (s *Space) ephemeral(port uint16) bool {
	low, high := s.portRange()
	return int(port) >= low && int(port) <= high
}

func (s *Space) portRange() (low, high int) {
	low, high = 32768, 60999
	fmt.Sscanf(s.Settings["net.ipv4.ip_local_port_range"], "%d %d", &low, &high)
	return low, high
}

// hops: a packet has been through too many routers.
func (d *diagnosis) hops() {
	for _, e := range d.open(Drop) {
		forwards := strings.HasPrefix(e.Location, "ip_forward") || strings.HasPrefix(e.Location, "ip6_forward")
		left, known := e.hopsLeft()
		if !forwards || !known || left > 1 || e.Reason == "PKT_TOO_BIG" || byFirewall(e) {
			continue
		}
		s := d.spaces[e.Space]
		p := d.path(e.Space, e.Device, e.Tuple.Source.Addr(), e.Tuple.Destination.Addr())
		loops := p != nil && d.comesBack(e, p)
		if !loops && !d.suffered(e.Tuple) && (e.Count <= 3 || e.traceroute() || e.Tuple.Protocol == protoICMP || e.Tuple.Protocol == protoICMP6) {
			e.by = "benign" // traceroute asks for this
			continue
		}
		v, fresh := d.verdict(RoutingLoop, s, e.Tuple.Destination.Addr().String(), e)
		d.eventOf(v, e)
		v.Title = fmt.Sprintf("packets to %s go round in a circle through %s until their hops are used up: %s", e.Tuple.Destination.Addr(), s.Name, times(v.Packets, "packet", "packets"))
		if !loops {
			v.Title = fmt.Sprintf("packets to %s have no hops left at %s: %s", e.Tuple.Destination.Addr(), s.Name, times(v.Packets, "packet", "packets"))
			v.Confidence = Medium
		}
		if !fresh {
			continue
		}
		v.Where.Hook = "route"
		v.saw("TTL or hop limit of a captured packet: %d", left)
		if p != nil {
			v.saw("%s sends to %s by: %s", s.Name, e.Tuple.Destination.Addr(), orNone(p.Route))
		}
		v.saw("Ip.InHdrErrors +%d, Ip6InHdrErrors +%d", s.rose("Ip.InHdrErrors"), s.rose("Ip6InHdrErrors"))
		v.isNot("a malformed header: only its hops are used up")
		v.Fix = s.in("ip route get %s", e.Tuple.Destination.Addr()) + " here and on the router that it names: one of the two must lead elsewhere"
		v.Undo = "put the route back that was changed"
		v.Owner = "whoever makes the routes of " + s.Name
		if !loops {
			v.saw("no namespace looked at sends them back: they start with too few hops, or go round before they come here")
			v.Fix = "see with how many hops they start: sysctl net.ipv4.ip_default_ttl net.ipv6.conf.all.hop_limit at the sender, or the program's own IP_TTL; or whether a router before " + s.Name + " sends them in a circle: traceroute " + e.Tuple.Destination.Addr().String()
			v.Undo, v.Owner = "nothing is changed by looking", "the sender's program, or whoever makes the routes before "+s.Name
		}
		d.foldExceeded(e)
	}
}

// traceroute says that a datagram is to one of the ports of traceroute(8), which nobody is
// to listen at: 33434, and one more for each packet.
func (e *Event) traceroute() bool {
	port := e.Tuple.Destination.Port()
	return e.Tuple.Protocol == protoUDP && port >= 33434 && port < 33434+3*64
}

func (d *diagnosis) foldExceeded(e *seen) {
	d.folds(RoutingLoop, func(o *seen) bool {
		exceeded := o.Kind == ICMPSent && (o.Type == 11 || o.Type == 3 && o.Tuple.is6())
		return exceeded && o.Tuple.Destination.Addr() == e.Tuple.Destination.Addr()
	})
}

// comesBack says that the next router is the one that the packet came from, or sends it
// back here.
func (d *diagnosis) comesBack(e *seen, p *Path) bool {
	if p.Device == e.Device && p.Device != "" {
		return true
	}
	for _, next := range d.owners(p.Gateway) {
		for i := range d.Paths {
			back := &d.Paths[i]
			if back.Space == next.Inode && back.Destination == e.Tuple.Destination.Addr() && back.Gateway.IsValid() && d.spaces[e.Space].owns(back.Gateway) {
				return true
			}
		}
	}
	return false
}

// hopsLeft is the TTL or hop limit of the example.
func (e *Event) hopsLeft() (left int, known bool) {
	switch {
	case len(e.Packet) >= 20 && e.Packet[0]>>4 == 4:
		return int(e.Packet[8]), true
	case len(e.Packet) >= 40 && e.Packet[0]>>4 == 6:
		return int(e.Packet[7]), true
	}
	return 0, false
}
