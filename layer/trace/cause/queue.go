package cause

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// qdiscs: a device's queue is full, or its rate is used up.
func (d *diagnosis) qdiscs() {
	for _, e := range d.open(Drop) {
		queue := strings.HasPrefix(e.Reason, "QDISC_") || strings.HasPrefix(e.Reason, "FQ_") || e.Reason == "FULL_RING" || e.Reason == "CAKE_FLOOD" || e.Reason == "DUALPI2_STEP_DROP"
		if !queue || e.Device == "" {
			continue
		}
		s := d.spaces[e.Space]
		if d.fills(s, e) {
			e.by = "benign"
			continue
		}
		v, fresh := d.verdict(QdiscFull, s, e.Device, e)
		d.eventOf(v, e)
		l := s.link(e.Device)
		var q *Qdisc
		var dropped uint64
		if l != nil {
			q, dropped = s.fullest(l)
		}
		v.Title = fmt.Sprintf("the queue of %s in %s is full: %s dropped", e.Device, s.Name, times(v.Packets, "packet", "packets"))
		if q != nil {
			rate := ""
			if q.Rate > 0 {
				rate = fmt.Sprintf(", which lets %d kbit/s through,", q.Rate*8/1000)
			}
			v.Title = fmt.Sprintf("the %s queue of %s in %s%s is full: %s dropped", q.Kind, e.Device, s.Name, rate, times(v.Packets, "packet", "packets"))
		}
		if !fresh {
			continue
		}
		v.Where.Hook = "qdisc"
		v.Fix, v.Undo = s.in("tc -s qdisc show dev %s", e.Device), "nothing is changed by looking"
		if q != nil {
			v.saw("qdisc %s %x:: dropped +%d, overlimits %d, limit %d, backlog %d bytes at the end (tc -s qdisc show dev %s)", q.Kind, q.Handle>>16, dropped, q.Overlimits, q.Limit, q.Backlog, e.Device)
			v.Fix = fmt.Sprintf("give it a higher rate or a longer queue: %s", s.in("tc qdisc change dev %s %s %s ...", e.Device, parent(q), q.Kind))
			v.Undo = "change it back to what tc qdisc show says now"
		}
		v.isNot("%s: the device is up with carrier", LinkDown)
		v.isNot("%s: it is the sender's own device, the receiver has not seen the packet", ReceiveBufferFull)
		v.Owner = "whoever shapes " + e.Device + " (of a pod its annotations kubernetes.io/ingress-bandwidth and egress-bandwidth; or tc)"
		if e.Reason == "FULL_RING" {
			tellRing(v, s, e)
		}
		d.folds(QdiscFull, func(o *seen) bool { return o.Kind == CallFailed && o.Errno == eNOBUFS && o.Space == e.Space })
	}
}

// mostLost is the share of its packets, one of so many, that a queue may drop of TCP
// before it is one that hinders: with a window of two or three segments a
// sender loses about that much (window = 1.22 / sqrt(loss), Mathis et al. 1997,
// https://dl.acm.org/doi/10.1145/263932.264023), with a smaller one it has to wait. A
// queue of 13 packets before 250 kB/s loses one of 7.7 to 13 (healthy-shaped).
const mostLost = 5

// fills says that TCP has filled a queue and been told so by a loss, which is how it finds
// its rate (RFC 5681, 3.1): only segments of connections that go on died, few of all, and
// nobody waited long for it; beside them at most what is said again by itself. A queue that
// loses packets by itself (netem) is not meant.
func (d *diagnosis) fills(s *Space, e *seen) bool {
	l := s.link(e.Device)
	if l == nil || e.Reason == "FULL_RING" {
		return false
	}
	for _, o := range d.events {
		if o.Kind != Drop || o.Space != e.Space || o.Device != e.Device || o.Reason != e.Reason {
			continue
		}
		if ofLink(o.Tuple) {
			continue
		}
		if o.Tuple.Protocol != protoTCP || o.Tuple.TCPFlags&flagSYN != 0 || d.starved(o.Tuple) {
			return false
		}
	}
	q, lost := s.fullest(l)
	if q == nil || q.Kind == "netem" {
		return false
	}
	sent := q.Packets
	for _, was := range s.Before.Links {
		if i := slices.IndexFunc(was.Qdiscs, func(o Qdisc) bool { return was.Index == l.Index && o.Handle == q.Handle && o.Parent == q.Parent }); i >= 0 {
			sent -= min(was.Qdiscs[i].Packets, sent)
		}
	}
	return sent >= lost*mostLost
}

// ofLink says that a packet is one that the kernel sends to its neighbours, and again by
// itself: ARP, IGMP, MLD (RFC 2710, RFC 3810), or neighbour discovery (RFC 4861).
func ofLink(t Tuple) bool {
	const igmp = 2
	return t.EtherType == etherARP || t.Protocol == igmp ||
		t.Protocol == protoICMP6 && (t.ICMPType >= 130 && t.ICMPType <= 137 || t.ICMPType == 143)
}

// starved says that a connection sends the same again and again and does not get on.
func (d *diagnosis) starved(t Tuple) bool {
	const inARow = 3
	gaveUp := slices.ContainsFunc(d.events, func(o *seen) bool {
		return o.Kind == SocketError && o.Errno == eTIMEDOUT && same(o.Tuple, t)
	})
	return gaveUp || slices.ContainsFunc(d.Spaces, func(s *Space) bool {
		return slices.ContainsFunc(s.After.Sockets, func(o Socket) bool {
			return o.Retransmits >= inARow && same(Tuple{Protocol: o.Protocol, Source: o.Local, Destination: o.Remote}, t)
		})
	})
}

// tellRing: the ring behind the queue is full, from which a program (of a VPN, of a
// virtual machine) takes packets that leave by a tun or tap device.
func tellRing(v *Verdict, s *Space, e *seen) {
	v.Title = fmt.Sprintf("who takes packets from %s in %s is too slow, or has stopped: its ring is full, %s dropped", e.Device, s.Name, times(v.Packets, "packet", "packets"))
	v.Fix = "find the program that has the device open, and see why it does not read: grep -l " + e.Device + " /proc/[0-9]*/fdinfo/* names its process"
	v.Undo, v.Owner = "nothing is changed by looking", "the program that has "+e.Device+" open"
}

func parent(q *Qdisc) string {
	const root = 1<<32 - 1
	if q.Parent == root {
		return "root"
	}
	return fmt.Sprintf("parent %x:%x", q.Parent>>16, q.Parent&0xffff)
}

// fullest is the qdisc of a device that has dropped the most in the window.
func (s *Space) fullest(l *Link) (found *Qdisc, most uint64) {
	for i := range l.Qdiscs {
		q := &l.Qdiscs[i]
		rose := q.Drops
		for _, was := range s.Before.Links {
			if was.Index != l.Index {
				continue
			}
			for _, o := range was.Qdiscs {
				if o.Handle == q.Handle && o.Parent == q.Parent && o.Kind == q.Kind {
					rose = q.Drops - min(o.Drops, q.Drops)
				}
			}
		}
		if rose > 0 && rose >= most {
			found, most = q, rose
		}
	}
	return found, most
}

// queues: a program does not read, and its socket has no room.
func (d *diagnosis) queues() {
	for _, e := range d.open(Drop, ReceiveFull) {
		full := e.Kind == ReceiveFull || e.Reason == "SOCKET_RCVBUFF" || e.Reason == "SOCKET_BACKLOG"
		if !full || e.Tuple.Protocol != protoUDP && e.Tuple.Protocol != protoTCP && e.Tuple.Protocol != protoSCTP {
			continue
		}
		s := d.spaces[e.Space]
		if e.Tuple.Protocol == protoTCP && e.Reason != "SOCKET_BACKLOG" {
			e.by = "benign" // TCP holds its sender back: receiver-stalled says so if it lasts
			continue
		}
		socket := s.socketOf(e)
		end := e.Tuple.Destination
		if e.Kind == ReceiveFull && socket != nil {
			end = socket.Local
		} else if e.Kind == ReceiveFull {
			end = e.Tuple.Source
		}
		object := fmt.Sprint(e.Tuple.Protocol, end.Port())
		v, fresh := d.verdict(ReceiveBufferFull, s, object, e)
		if e.Kind == Drop {
			d.eventOf(v, e)
		}
		if !fresh {
			continue
		}
		v.Where.Hook = "socket"
		holder := ""
		if socket != nil {
			holder = s.process(socket.Inode)
			v.saw("the socket at %s: %d bytes wait, room for %d, drops +%d (SKMEMINFO)", socket.Local, socket.ReceiveQueue, socket.ReceiveBuffer, s.dropsRose(socket))
		}
		v.Owner = orProgram(holder)
		v.Title = fmt.Sprintf("the receive buffer of %s at %s %s in %s is full: it does not read fast enough", orProgram(holder), protocolName(e.Tuple.Protocol), shown(end), s.Name)
		if e.Tuple.Protocol == protoUDP {
			v.saw("Udp.RcvbufErrors +%d, Udp6RcvbufErrors +%d (/proc/net/snmp)", s.rose("Udp.RcvbufErrors"), s.rose("Udp6RcvbufErrors"))
		} else {
			v.saw("TcpExt.TCPBacklogDrop +%d", s.rose("TcpExt.TCPBacklogDrop"))
		}
		v.isNot("%s: the socket was found", NoListener)
		v.isNot("%s: the packet arrived at the receiver", QdiscFull)
		v.Fix = "let the program read faster, or ask for a larger buffer (SO_RCVBUF), which net.core.rmem_max limits: sysctl -w net.core.rmem_max=8388608 on the node"
		v.Undo = fmt.Sprintf("sysctl -w net.core.rmem_max=%s", orNone(s.Settings["net.core.rmem_max"]))
	}
}

// memory: the node has no memory, or no time, for packets.
func (d *diagnosis) memory() {
	for _, e := range d.open(Drop) {
		s := d.spaces[e.Space]
		switch e.Reason {
		case "NOMEM", "PROTO_MEM", "PFMEMALLOC":
			// TCP says so as well when the one socket has no room: its sender is held back.
			if e.Reason == "PROTO_MEM" && e.Tuple.Protocol == protoTCP && s.rose("TcpExt.TCPMemoryPressures") == 0 {
				e.by = "benign"
				continue
			}
			v, fresh := d.verdict(MemoryShort, s, e.Reason, e)
			d.eventOf(v, e)
			v.Title = fmt.Sprintf("there is no memory for packets in %s: %s dropped", s.Name, times(v.Packets, "packet", "packets"))
			if !fresh {
				continue
			}
			v.saw("TcpExt.TCPMemoryPressures +%d, Udp.MemErrors +%d", s.rose("TcpExt.TCPMemoryPressures"), s.rose("Udp.MemErrors"))
			v.isNot("%s: it is the limit of all sockets together", ReceiveBufferFull)
			v.Fix, v.Undo = "cat /proc/net/sockstat; sysctl net.ipv4.tcp_mem net.ipv4.udp_mem (raise the third number, in pages)", "set it back"
			v.Owner = "the node's memory"
		case "CPU_BACKLOG":
			v, fresh := d.verdict(BacklogFull, s, "", e)
			d.eventOf(v, e)
			v.Title = fmt.Sprintf("a processor cannot keep up with what comes to %s: %s dropped", s.Name, times(v.Packets, "packet", "packets"))
			if !fresh {
				continue
			}
			v.isNot("%s: no socket was reached yet", ReceiveBufferFull)
			v.Fix = fmt.Sprintf("sysctl -w net.core.netdev_max_backlog=10000 on the node (now %s)", orNone(s.Settings["net.core.netdev_max_backlog"]))
			v.Undo = "sysctl -w net.core.netdev_max_backlog=" + orNone(s.Settings["net.core.netdev_max_backlog"])
			v.Owner = "the node's processors"
		}
	}
}

// mostProbes is how often in a row a sender asks whether a window that is zero has opened
// before its receiver counts as stalled: the second time is after some 0.6 seconds. A
// program that is only busy for a moment reads before. The kernel doubles the time that it
// waits; the questions that it counts are those that nobody answered, and then it is not
// the receiver's program that is the cause.
const mostProbes = 2

// longPause is how long nothing has come to a receiver whose window is zero before it
// counts as stalled.
const longPause = time.Second

// stalled: a program does not read from a connection; the sender may send no more. It is
// seen at the end of the window, where a second look finds everything as it was: a
// receiver that is only slow has read something by then.
func (d *diagnosis) stalled() {
	for _, s := range d.Spaces {
		for i := range s.After.Sockets {
			o := &s.After.Sockets[i]
			if o.Protocol != protoTCP || o.State == tcpListen || !o.Idle {
				continue
			}
			waits := o.SendQueue > 0 && o.Probing && o.Backoff >= mostProbes && o.Retransmits < mostProbes
			switch {
			case o.unread() > 0 && o.ReceiveWindow < max(o.MSS, 1) && o.LastReceived >= longPause:
				d.stallAt(s, o)
			case waits:
				if _, receiver := d.farEnd(s, o); receiver == nil {
					d.stall(s, o, s, nil)
				}
			}
		}
	}
}

// unread are the bytes that a program has not read; the kernel counts the end of what is
// said as one.
func (o *Socket) unread() int {
	if o.State == tcpCloseWait {
		return o.ReceiveQueue - 1
	}
	return o.ReceiveQueue
}

// farEnd is the other end of a connection, by the two addresses, or, as somebody on the way
// may translate those, by this end's alone; nil where it is not in a namespace looked at.
func (d *diagnosis) farEnd(s *Space, o *Socket) (at *Space, other *Socket) {
	for _, r := range d.Spaces {
		for i := range r.After.Sockets {
			p := &r.After.Sockets[i]
			if p == o || p.Protocol != protoTCP || p.State == tcpListen || p.Remote != o.Local && p.Local != o.Remote {
				continue
			}
			if p.Remote == o.Local && p.Local == o.Remote && (r == s || !p.Local.Addr().IsLoopback()) {
				return r, p
			}
			if !p.Local.Addr().IsLoopback() && (s.owns(o.Local.Addr()) && p.Remote == o.Local || r.owns(p.Local.Addr()) && p.Local == o.Remote) {
				at, other = r, p
			}
		}
	}
	return at, other
}

// isFull says that a socket throws away what comes, for nobody reads. It does so where its
// buffer was made smaller than what it had offered: a window is never taken back (RFC 9293,
// 3.8.6), so that the sender goes on, and does not learn of it.
func (o *Socket) isFull() bool { return o.Drops > 0 && 2*o.unread() >= o.ReceiveBuffer }

// stallAt finds the sender of a receiver that is stalled: one that has more to send. Where
// the kernel does not say the receiver's window (before Linux 6.2), the sender's picture of
// it, or a full buffer, has to do.
func (d *diagnosis) stallAt(r *Space, o *Socket) {
	s, sender := d.farEnd(r, o)
	switch {
	case o.ReceiveWindow < 0 && !o.isFull() && (sender == nil || sender.SendWindow >= max(sender.MSS, 1)):
	case sender != nil && sender.SendQueue > 0:
		d.stall(s, sender, r, o)
	case sender == nil && len(d.owners(o.Remote.Addr())) == 0:
		d.stall(r, &Socket{Protocol: protoTCP, Local: o.Remote, Remote: o.Local}, r, o)
	}
}

// stall names the receiver at r, where it is known, of a sender at s.
func (d *diagnosis) stall(s *Space, o *Socket, r *Space, receiver *Socket) {
	at := o.Remote
	if receiver != nil {
		at = receiver.Local
	}
	v, _ := d.verdict(ReceiverStalled, r, at.String(), nil)
	v.Where.Hook = "socket"
	v.Tuple = &Ends{Protocol: "tcp", Source: o.Local, Destination: o.Remote}
	holder, room := "", "the window is zero"
	switch {
	case receiver == nil:
	case receiver.ReceiveWindow < 0 && receiver.isFull():
		room = "its buffer is full"
		v.saw("the receiver's socket in %s has %d bytes that nobody reads in a buffer of %d, and threw %d packets away (sock_diag)", r.Name, receiver.unread(), receiver.ReceiveBuffer, receiver.Drops)
	default:
		v.saw("the receiver's socket in %s has %d bytes that nobody reads, window %d (sock_diag)", r.Name, receiver.unread(), max(receiver.ReceiveWindow, 0))
	}
	if receiver != nil {
		holder = r.process(receiver.Inode)
	}
	v.Title = fmt.Sprintf("%s at %s does not read: %s, and the sender %s in %s waits with %d bytes", orProgram(holder), at, room, o.Local, s.Name, o.SendQueue)
	if o.Probing {
		v.saw("the sender's socket waits for the window to open: timer persist, backoff %d, window %d (ss -tnoi)", o.Backoff, o.SendWindow)
	}
	v.saw("TcpExt.TCPWinProbe +%d in %s, TCPToZeroWindowAdv +%d in %s", s.rose("TcpExt.TCPWinProbe"), s.Name, r.rose("TcpExt.TCPToZeroWindowAdv"), r.Name)
	if o.Probing {
		v.isNot("lost packets: its probes are answered, with a window of zero")
	} else {
		v.isNot("packets lost on the way: they come to the receiver's socket, which has no room for them")
	}
	v.Owner = orProgram(holder)
	v.Fix = "see why the program does not read"
	if receiver != nil {
		if p, known := r.Processes[receiver.Inode]; known {
			v.Fix += fmt.Sprintf(": cat /proc/%d/stack /proc/%d/status", p.PID, p.PID)
		}
	}
	v.Undo = "nothing is changed by looking"
}
