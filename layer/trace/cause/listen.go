package cause

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// listeners are the TCP sockets of a space that listen.
func (s *Space) listeners() (all []*Socket) {
	for i := range s.After.Sockets {
		if o := &s.After.Sockets[i]; o.Protocol == protoTCP && o.State == tcpListen {
			all = append(all, o)
		}
	}
	return all
}

// dropsRose is how much a socket's own counter of drops has grown.
func (s *Space) dropsRose(o *Socket) uint64 {
	for _, was := range s.Before.Sockets {
		if was.Cookie == o.Cookie && o.Cookie != 0 {
			return o.Drops - min(was.Drops, o.Drops)
		}
	}
	return o.Drops
}

// over says that a listener has no room for one more connection.
func (o *Socket) over() bool { return o.State == tcpListen && o.ReceiveQueue > o.SendQueue }

// manyOverflows are more connections turned away than a server that accepts meets by
// chance: one of a burst comes again a second later.
const manyOverflows = 3

// acceptQueues: a program does not accept the connections that are ready for it.
func (d *diagnosis) acceptQueues() {
	for _, s := range d.Spaces {
		overflows := s.rose("TcpExt.ListenOverflows")
		full := slices.ContainsFunc(s.listeners(), (*Socket).over)
		if overflows == 0 || overflows < manyOverflows && !full {
			continue
		}
		d.fullQueues(s, overflows)
	}
}

// fullQueues finds the listeners that turned connections away.
func (d *diagnosis) fullQueues(s *Space, overflows uint64) {
	var full []*Socket
	for _, o := range s.listeners() {
		if o.over() || s.dropsRose(o) > 0 && o.ReceiveQueue >= o.SendQueue {
			full = append(full, o)
		}
	}
	if len(full) == 0 { // it has accepted them meanwhile
		for _, o := range s.listeners() {
			if s.dropsRose(o) > 0 {
				full = append(full, o)
			}
		}
	}
	for _, o := range full {
		d.acceptQueue(s, o, overflows)
	}
	if len(full) == 0 {
		d.acceptQueue(s, nil, overflows)
	}
}

func (d *diagnosis) acceptQueue(s *Space, o *Socket, overflows uint64) {
	object := ""
	if o != nil {
		object = o.Local.String()
	}
	v, _ := d.verdict(AcceptQueueFull, s, object, nil)
	v.Where.Hook = "socket"
	v.saw("TcpExt.ListenOverflows +%d, ListenDrops +%d (/proc/net/netstat)", overflows, s.rose("TcpExt.ListenDrops"))
	v.Packets = overflows
	if o == nil {
		v.Title = fmt.Sprintf("a program in %s does not accept its connections fast enough: %s turned away; its listener is closed by now", s.Name, times(overflows, "time", "times"))
		v.Confidence = Medium
		v.Fix = "find which program in " + s.Name + " closed its listener, and give it more time or workers to call accept()"
		v.Undo, v.Owner = "nothing was changed", "the program that listened"
	} else {
		v.Tuple = &Ends{Protocol: "tcp", Destination: o.Local}
		holder := s.process(o.Inode)
		v.Title = fmt.Sprintf("%s does not accept: its queue at %s in %s is full, %d connections wait and %d may", orProgram(holder), o.Local, s.Name, o.ReceiveQueue, o.SendQueue)
		v.saw("listener %s: Recv-Q %d, Send-Q %d (ss -ltn), drops +%d (SKMEMINFO)", o.Local, o.ReceiveQueue, o.SendQueue, s.dropsRose(o))
		if !o.over() {
			v.Title = fmt.Sprintf("%s was too slow to accept: its queue at %s in %s, for %d connections, was full", orProgram(holder), o.Local, s.Name, o.SendQueue)
		}
		v.Owner = orProgram(holder)
		v.Fix = "see what keeps the program from calling accept()"
		if p, known := s.Processes[o.Inode]; known {
			v.Fix += fmt.Sprintf(": cat /proc/%d/stack /proc/%d/status", p.PID, p.PID)
		}
		v.Undo = "nothing is changed by looking"
		if limit := s.Settings["net.core.somaxconn"]; limit != "" && fmt.Sprint(o.SendQueue) == limit {
			v.Fix += "; the queue is as long as net.core.somaxconn allows: " + s.in("sysctl -w net.core.somaxconn=%d", max(4096, 2*o.SendQueue)) + ", then restart the program"
			v.Undo = s.in("sysctl -w net.core.somaxconn=%s", limit)
		}
	}
	v.isNot("%s: connections are complete, and wait for accept()", SYNQueueFull)
	v.isNot("%s: a socket listens", NoListener)
	d.folds(AcceptQueueFull, func(e *seen) bool {
		return e.Kind == Drop && e.Reason == "TCP_LISTEN_OVERFLOW" && e.Space == s.Inode
	})
}

// manySYNs are more connections at once than clients that wait open by themselves.
const manySYNs = 16

// floods folds what an answer to a flood of SYNs comes to: its sources are often made up.
func (d *diagnosis) floods() {
	for _, s := range d.Spaces {
		refused := s.rose("TcpExt.ListenDrops") - min(s.rose("TcpExt.ListenOverflows"), s.rose("TcpExt.ListenDrops"))
		if s.rose("TcpExt.TCPReqQFullDoCookies", "TcpExt.TCPReqQFullDrop") == 0 && s.halfOpen() < manySYNs && refused < manySYNs {
			continue
		}
		madeUp := func(a netip.Addr) bool { return a.IsValid() && len(d.owners(a)) == 0 }
		gone := map[netip.Addr]bool{}
		d.folds("flood", func(e *seen) bool {
			answer := e.Tuple.Protocol == protoTCP && (e.Kind == Drop || e.Kind == ICMPSent || e.Kind == Retransmit)
			if answer && madeUp(e.Tuple.Destination.Addr()) && s.owns(e.Tuple.Source.Addr()) && !byFirewall(e) {
				gone[e.Tuple.Destination.Addr()] = true
				return true
			}
			return false
		})
		asked := func(a netip.Addr) bool { // by somebody who opens a connection
			return slices.ContainsFunc(d.events, func(o *seen) bool {
				return o.Tuple.Destination.Addr() == a && (o.Kind == CallFailed || o.Kind == SocketError || o.Kind == Drop && o.Tuple.TCPFlags&flagACK == 0)
			})
		}
		d.folds("flood", func(e *seen) bool {
			a := e.Tuple.Destination.Addr()
			return e.Kind == NeighFailed && (gone[a] || madeUp(a) && !asked(a))
		})
	}
}

// halfOpen is how many connections wait for the last packet of their handshake.
func (s *Space) halfOpen() (n int) {
	for _, o := range s.After.Sockets {
		if o.State == tcpSynReceived || o.State == tcpNewSynReceived {
			n++
		}
	}
	return n
}

// synQueues: more connections are half open than a listener may have.
func (d *diagnosis) synQueues() {
	for _, s := range d.Spaces {
		refused, cookies := s.rose("TcpExt.TCPReqQFullDrop"), s.rose("TcpExt.TCPReqQFullDoCookies")
		drops := s.rose("TcpExt.ListenDrops")
		// A listener whose accept queue is full keeps connections half open itself.
		if d.has(AcceptQueueFull, s) {
			continue
		}
		silent := s.Settings["net.ipv4.tcp_syncookies"] == "0" && drops > 0 && s.rose("TcpExt.ListenOverflows") == 0 && !d.has(NoRouteBack, s) && s.halfOpen() > 0
		switch {
		case refused > 0 || silent:
			d.synQueue(s, max(refused, drops))
		case cookies > 0:
			d.synFlood(s, cookies)
		}
	}
}

// busiest is the listener with the most half-open connections.
func (s *Space) busiest() (*Socket, int) {
	count := map[uint16]int{}
	for _, o := range s.After.Sockets {
		if o.State == tcpSynReceived || o.State == tcpNewSynReceived {
			count[o.Local.Port()]++
		}
	}
	var found *Socket
	most := 0
	for _, o := range s.listeners() {
		if n := count[o.Local.Port()]; found == nil || n > most {
			found, most = o, n
		}
	}
	return found, most
}

func (d *diagnosis) synQueue(s *Space, drops uint64) {
	v, _ := d.verdict(SYNQueueFull, s, "", nil)
	v.Packets, v.Where.Hook = drops, "socket"
	o, half := s.busiest()
	at := ""
	if o != nil {
		at = " for " + o.Local.String()
		v.Tuple = &Ends{Protocol: "tcp", Destination: o.Local}
		v.Owner = orProgram(s.process(o.Inode))
	}
	v.Title = fmt.Sprintf("too many half-open connections%s in %s, and SYN cookies are off: %s dropped", at, s.Name, times(drops, "SYN", "SYNs"))
	v.saw("TcpExt.ListenDrops +%d, ListenOverflows +0, TCPReqQFullDrop +%d (/proc/net/netstat)", s.rose("TcpExt.ListenDrops"), s.rose("TcpExt.TCPReqQFullDrop"))
	v.saw("%d connections half open (SYN-RECV) at the end", half)
	v.saw("net.ipv4.tcp_syncookies = %s, net.ipv4.tcp_max_syn_backlog = %s", s.Settings["net.ipv4.tcp_syncookies"], s.Settings["net.ipv4.tcp_max_syn_backlog"])
	v.isNot("%s: ListenOverflows did not rise, accept() is not behind", AcceptQueueFull)
	v.isNot("%s: there is a route back, Ip.OutNoRoutes +%d", NoRouteBack, s.rose("Ip.OutNoRoutes", "Ip6OutNoRoutes"))
	v.Fix, v.Undo = s.in("sysctl -w net.ipv4.tcp_syncookies=1"), s.in("sysctl -w net.ipv4.tcp_syncookies=%s", orZero(s.Settings["net.ipv4.tcp_syncookies"]))
	if v.Owner == "" {
		v.Owner = "whoever sends the SYNs"
	}
}

func (d *diagnosis) synFlood(s *Space, cookies uint64) {
	v, _ := d.verdict(SYNFlood, s, "", nil)
	v.Packets, v.Where.Hook = cookies, "socket"
	at := s.Name
	if o, _ := s.busiest(); o != nil {
		at = o.Local.String() + " in " + s.Name
		v.Tuple = &Ends{Protocol: "tcp", Destination: o.Local}
	}
	v.Title = fmt.Sprintf("more connections are opened to %s than its queue holds: %s answered with a cookie", at, times(cookies, "SYN was", "SYNs were"))
	v.saw("TcpExt.TCPReqQFullDoCookies +%d, SyncookiesSent +%d, SyncookiesRecv +%d, SyncookiesFailed +%d (/proc/net/netstat)", cookies,
		s.rose("TcpExt.SyncookiesSent"), s.rose("TcpExt.SyncookiesRecv"), s.rose("TcpExt.SyncookiesFailed"))
	v.isNot("%s: cookies are on, so no SYN is dropped for it", SYNQueueFull)
	v.isNot("%s: ListenOverflows did not rise", AcceptQueueFull)
	v.Fix = s.in("ss -tn state syn-recv") + " shows where they come from; keep them away by a rule, or let the program listen with a longer queue"
	v.Undo, v.Owner = "nothing is changed by looking", "whoever sends the SYNs"
}

// noRouteBack: a server cannot answer, for no route leads back to the client.
func (d *diagnosis) noRouteBack() {
	for _, s := range d.Spaces {
		drops, missing := s.rose("TcpExt.ListenDrops"), s.rose("Ip.OutNoRoutes", "Ip6OutNoRoutes")
		if drops == 0 || s.rose("TcpExt.ListenOverflows") >= drops {
			continue
		}
		// Whose SYNs come to nothing? Those of clients that try again and have an address here.
		found := false
		for _, e := range d.events {
			asks := e.Kind == Retransmit && e.OldState == tcpSynSent || e.Kind == SocketError && e.Errno == eTIMEDOUT || e.Kind == StateChange && e.OldState == tcpSynSent && e.NewState == tcpClose
			if e.by != "" || !asks || !s.owns(e.Tuple.Destination.Addr()) || e.Tuple.Destination.Addr().IsLoopback() {
				continue
			}
			client := e.Tuple.Source.Addr()
			p := d.path(s.Inode, "", netip.Addr{}, client)
			switch {
			case p != nil && refusing(p.Type):
				d.refusingRoute(s, e, p)
				found = true
			case missing > 0 && p != nil && p.Errno != 0:
				d.routeBackMissing(s, client, e)
				found = true
			}
		}
		// A route of IPv6 that lets nothing through is counted nowhere else.
		if !found && missing > 0 {
			d.routeBackMissing(s, netip.Addr{}, nil)
		}
	}
}

func (d *diagnosis) routeBackMissing(s *Space, client netip.Addr, e *seen) {
	object := ""
	if client.IsValid() {
		object = client.String()
	}
	v, fresh := d.verdict(NoRouteBack, s, object, e)
	if e != nil && e.Kind == CallFailed {
		d.eventOf(v, e)
	}
	if !fresh {
		return
	}
	v.Where.Hook = "route"
	to := "its clients"
	if client.IsValid() {
		to = client.String()
		v.saw("asked for a route to %s, %s has none (RTM_GETROUTE)", to, s.Name)
	} else {
		v.Confidence = Medium
	}
	v.Title = fmt.Sprintf("%s gets packets of %s and has no route back to answer", s.Name, to)
	drops := s.rose("TcpExt.ListenDrops")
	v.Packets = max(v.Packets, drops)
	v.saw("Ip.OutNoRoutes +%d, Ip6OutNoRoutes +%d, TcpExt.ListenDrops +%d, ListenOverflows +%d", s.rose("Ip.OutNoRoutes"), s.rose("Ip6OutNoRoutes"), drops, s.rose("TcpExt.ListenOverflows"))
	v.isNot("%s: ListenOverflows did not rise with ListenDrops", AcceptQueueFull)
	v.isNot("%s: the SYNs arrive, the answers do not leave", FirewallDrop)
	if client.IsValid() {
		six := ""
		if client.Is6() {
			six = "-6 "
		}
		v.Fix, v.Undo = s.in("ip %sroute add %s %s", six, client, d.router(s, client)), s.in("ip %sroute del %s", six, client)
	} else {
		v.Fix, v.Undo = s.in("ip route add default via GATEWAY"), s.in("ip route del default")
	}
	v.Owner = "whoever makes the routes of " + s.Name
}

// router is how a space gets to an address, as far as it can be told: by the wire that it
// is on, by a neighbour that forwards, of the namespaces looked at, or by the only
// neighbour there is.
func (d *diagnosis) router(s *Space, to netip.Addr) string {
	for i := range s.After.Links {
		l := &s.After.Links[i]
		if _, near := owner(d.segment(s, l), to); near && l.Master == 0 && l.Name != "lo" {
			return "dev " + l.Name
		}
	}
	var known []string
	for _, n := range s.Neighs {
		near := slices.ContainsFunc(s.Addrs, func(a Addr) bool { return a.Index == n.Index && a.Prefix.Contains(n.Addr) })
		if n.State&(neighFailed|neighIncomplete) != 0 || n.Addr.Is4() != to.Is4() || !near {
			continue
		}
		text := "via " + n.Addr.String()
		if l := s.linkAt(n.Index); l != nil && n.Addr.Is6() && n.Addr.IsLinkLocalUnicast() {
			text += " dev " + l.Name
		}
		known = append(known, text)
		setting := "net.ipv4.ip_forward"
		if to.Is6() {
			setting = "net.ipv6.conf.all.forwarding"
		}
		for _, o := range d.owners(n.Addr) {
			if p := d.path(o.Inode, "", netip.Addr{}, to); o != s && o.Settings[setting] == "1" && (p == nil || p.Errno == 0) {
				return text
			}
		}
	}
	if len(known) == 1 {
		return known[0]
	}
	return "via GATEWAY"
}

// noListener: nobody has the port that packets come to.
func (d *diagnosis) noListener() {
	for _, e := range d.open(Drop, ResetSent) {
		if e.Reason != "NO_SOCKET" && e.Reason != "IP_NOPROTO" || e.Kind == ResetSent && d.dropOf(e) {
			continue
		}
		s := d.spaces[e.Space]
		if d.late(s, e) {
			e.by = "benign"
			continue
		}
		if d.otherOwner(s, e) {
			continue
		}
		d.portClosed(s, e)
	}
	d.folds(NoListener, func(e *seen) bool {
		if e.Kind == ResetSent && e.Reason == "NO_SOCKET" {
			return true
		}
		refused := (e.Kind == SocketError || e.Kind == CallFailed || e.Kind == StateChange) && e.Errno == eCONNREFUSED
		port := e.Kind == ICMPSent && (e.Type == 3 && (e.Code == 3 || e.Code == 2) || e.Type == 1 && e.Code == 4)
		return (refused || port) && slices.ContainsFunc(d.events, func(o *seen) bool { return o.by == NoListener && same(o.Tuple, e.Tuple) })
	})
}

// dropOf says that there is an event of the packet that a reset answers.
func (d *diagnosis) dropOf(e *seen) bool {
	return slices.ContainsFunc(d.events, func(o *seen) bool {
		return o.Kind == Drop && o.Reason == "NO_SOCKET" && o.Space == e.Space && same(o.Tuple, e.Tuple)
	})
}

// late says that nobody misses the packet: it is to a connection that has ended, or the
// answer to a question whose asker has gone.
func (d *diagnosis) late(s *Space, e *seen) bool {
	switch e.Tuple.Protocol {
	case protoTCP:
		return !e.Tuple.opens() // a connection that was there and is gone
	case protoUDP:
		if e.traceroute() {
			return true
		}
		answer := s.ephemeral(e.Tuple.Destination.Port()) && !s.ephemeral(e.Tuple.Source.Port())
		return answer && e.Tuple.Source.Port() < e.Tuple.Destination.Port()
	}
	return false
}

// otherOwner says that another space on the same wire has the address as well, and
// listens there: the packet has come to the wrong one.
func (d *diagnosis) otherOwner(s *Space, e *seen) bool {
	for _, o := range d.owners(e.Tuple.Destination.Addr()) {
		l := s.link(e.Device)
		if o == s || l == nil || !slices.ContainsFunc(d.segment(s, l), func(p place) bool { return p.space == o }) {
			continue
		}
		if o.serves(e.Tuple.Protocol, e.Tuple.Destination) {
			d.duplicate(s, e, e.Tuple.Destination.Addr())
			return true
		}
	}
	return false
}

// serves says that a socket takes what comes to an end.
func (s *Space) serves(protocol uint8, to netip.AddrPort) bool {
	return slices.ContainsFunc(s.After.Sockets, func(o Socket) bool {
		open := o.State == tcpListen || o.Protocol == protoUDP && o.Remote.Port() == 0
		return open && o.Protocol == protocol && o.Local.Port() == to.Port() && (o.Local.Addr().IsUnspecified() || o.Local.Addr() == to.Addr())
	})
}

func (d *diagnosis) portClosed(s *Space, e *seen) {
	to := e.Tuple.Destination
	if e.Tuple.Protocol == protoTCP && to.Addr().IsLoopback() && e.Count <= 2 && s.listensElsewhere(to) {
		e.by = "benign" // localhost is two addresses: programs try the one and then the other
		return
	}
	v, fresh := d.verdict(NoListener, s, fmt.Sprint(e.Tuple.Protocol, to), e)
	d.eventOf(v, e)
	v.Title = fmt.Sprintf("nothing listens at %s in %s: %s refused", strings.TrimSpace(protocolName(e.Tuple.Protocol)+" "+shown(to)), s.Name, times(e.Count, "packet was", "packets were"))
	if !fresh {
		return
	}
	v.Where.Hook = "socket"
	for _, o := range s.After.Sockets {
		takes := o.State == tcpListen || o.Protocol == protoUDP && o.Remote.Port() == 0
		if takes && o.Protocol == e.Tuple.Protocol && o.Local.Port() == to.Port() {
			v.saw("%s listens at %s only", orProgram(s.process(o.Inode)), o.Local)
		}
	}
	if e.Tuple.Protocol == protoUDP {
		v.saw("Udp.NoPorts +%d, Udp6NoPorts +%d", s.rose("Udp.NoPorts"), s.rose("Udp6NoPorts"))
	}
	v.isNot("%s: the packet came as far as the sockets", FirewallReject)
	what := "-ltnp"
	if e.Tuple.Protocol == protoUDP {
		what = "-lunp"
	}
	v.Fix = fmt.Sprintf("start the program that is to listen at port %d, or let it listen at %s: %s shows who listens", to.Port(), to.Addr(), s.in("ss %s", what))
	v.Undo = "stop it again"
	v.Owner = "the program that should listen there"
	if s.Pod != "" {
		v.Owner += ", pod " + s.Pod
	}
	if e.Reason == "IP_NOPROTO" {
		v.Title = fmt.Sprintf("nobody in %s takes packets of protocol %s: %s refused", s.Name, protocolName(e.Tuple.Protocol), times(e.Count, "packet was", "packets were"))
	}
}

// listensElsewhere says that the port is open at another address.
func (s *Space) listensElsewhere(to netip.AddrPort) bool {
	return slices.ContainsFunc(s.listeners(), func(o *Socket) bool { return o.Local.Port() == to.Port() })
}

// closedUnread: a program closed a connection without reading what had come: the other
// end meets a reset, and may lose what was on its way to it.
func (d *diagnosis) closedUnread() {
	for _, e := range d.open(ResetSent) {
		if e.Reason != "TCP_ABORT_ON_CLOSE" && !(e.Reason == "" && strings.Contains(strings.Join(e.Stack, " "), "tcp_close")) {
			continue
		}
		s := d.spaces[e.Space]
		closer, other := e.Tuple.Source, e.Tuple.Destination
		looked := len(d.owners(other.Addr())) > 0
		hurt := false
		for _, o := range d.events {
			if (o.Kind == SocketError || o.Kind == CallFailed) && o.Errno == eCONNRESET && meets(o, e) {
				hurt = true
				if closer.Port() == 0 { // it was given back by then
					closer = netip.AddrPortFrom(closer.Addr(), o.Tuple.Destination.Port())
				}
			}
		}
		if looked && !hurt && !other.Addr().IsLoopback() || d.givesUp(e) || e.Crossed {
			e.by = "benign"
			continue
		}
		v, fresh := d.verdict(ClosedUnread, s, closer.String(), e)
		d.eventOf(v, e)
		v.Packets += e.Count
		who := e.Command
		if who == "" {
			who = "a program"
		} else {
			who = fmt.Sprintf("%s (pid %d)", e.Command, e.PID)
		}
		v.Title = fmt.Sprintf("%s in %s closes connections of %s with data unread: %s", who, s.Name, shown(closer), times(v.Packets, "reset is sent", "resets are sent"))
		if !fresh {
			continue
		}
		v.Where.Hook = "socket"
		if !hurt {
			v.Confidence = Medium
		} else {
			v.saw("the other end %s was told ECONNRESET", other.Addr())
		}
		v.saw("TcpExt.TCPAbortOnClose +%d (/proc/net/netstat)", s.rose("TcpExt.TCPAbortOnClose"))
		v.isNot("%s: the connection was established", NoListener)
		v.isNot("%s: the reset is this socket's own", FirewallReject)
		v.Fix = "let the program read to the end before it closes (shutdown(SHUT_WR), then read until 0), or see why it gives up: its log at that time"
		v.Undo, v.Owner = "nothing was changed", who
	}
}

// meets says that a program in another conversation, or in this one, was told of a reset:
// by both ends, or by one of them and at the same time, for somebody on the way may
// translate the other.
func meets(told, sent *seen) bool {
	if same(told.Tuple, sent.Tuple) {
		return true
	}
	at := told.First <= sent.Last+settle && told.Last >= sent.First-settle
	client := told.Tuple.Source.Addr() == sent.Tuple.Destination.Addr()
	server := told.Tuple.Destination == sent.Tuple.Source && told.Tuple.Destination.Port() != 0
	return at && told.Space != sent.Space && told.Tuple.Protocol == sent.Tuple.Protocol && (client || server)
}

// givesUp says that it was the client who closed a connection so: it had what it wanted,
// or did not want it any more, and may hang up. A server may not.
func (d *diagnosis) givesUp(e *seen) bool {
	s, from, to := d.spaces[e.Space], e.Tuple.Source, e.Tuple.Destination
	served := slices.ContainsFunc(d.owners(to.Addr()), func(s *Space) bool { return s.serves(protoTCP, to) })
	opened := slices.ContainsFunc(d.events, func(o *seen) bool {
		return o.Kind == StateChange && o.Space == e.Space && o.Tuple.Destination == to && o.OldState == tcpSynSent && o.NewState == tcpEstablished
	})
	return served || opened || !s.serves(protoTCP, from) && s.ephemeral(from.Port())
}
