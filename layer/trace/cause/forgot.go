package cause

import (
	"fmt"
	"slices"
	"strconv"
)

// longIdle is how many seconds connection tracking keeps an idle connection where
// kube-proxy has set it (conntrack.tcpEstablishedTimeout); the kernel's own default is
// five days (nf_conntrack_tcp_timeout_established, nf_conntrack-sysctl).
const longIdle = 86400

// forgotten: a host that translates a connection does not know it any more, as it was
// idle for too long or its entry was removed, and one end goes on. What the server sends
// then is for the translating host itself, which refuses it; what the client sends is
// translated anew and is of no connection that the server knows. The end that is refused
// was told nothing before: an end that has closed has sent a FIN, after which the error
// is another one (EPIPE, tcp_reset of net/ipv4/tcp_input.c).
func (d *diagnosis) forgotten() {
	for _, e := range d.open(Drop, ResetSent) {
		if !e.amidst() || e.Kind == ResetSent && d.dropOf(e) {
			continue
		}
		s := d.spaces[e.Space]
		if client, at := d.stillOpen(s, e); client != nil {
			v := d.forgot(s, e, High)
			v.Title = fmt.Sprintf("%s has forgotten a connection that it translates: what %s sends for %s in %s is refused by a reset", s.Name, shown(e.Tuple.Source), shown(client.Local), at.Name)
			v.saw("%s has an open connection from %s to %s (sock_diag), which %s knows as %s", at.Name, shown(client.Local), shown(client.Remote), shown(e.Tuple.Source), shown(e.Tuple.Destination))
		} else if told, t := d.refusedAmidst(s, e); told != nil {
			v := d.forgot(t, e, Medium)
			v.Title = fmt.Sprintf("%s has forgotten a connection that it translates: what %s sends to %s is of no connection that %s knows, and is refused by a reset", t.Name,
				told.Tuple.Source.Addr(), shown(told.Tuple.Destination), s.Name)
			v.saw("sockets of %s were told ECONNRESET, and no FIN before: %s", d.spaces[told.Space].Name, flow(told.Tuple))
			v.isNot("%s: it is a packet in the middle of a connection; a server that was started again without having closed its connections would do the same", NoListener)
		}
	}
	for _, e := range d.open(Drop, ResetSent) { // the other end of those that are named
		if e.amidst() && d.has(TrackingForgot, d.spaces[e.Space]) {
			e.by = TrackingForgot
		}
	}
}

// amidst says that nobody has a socket for a packet in the middle of a connection.
func (e *seen) amidst() bool {
	return e.Reason == "NO_SOCKET" && e.Tuple.Protocol == protoTCP && e.Tuple.TCPFlags&(flagSYN|flagFIN|flagRST) == 0
}

// translates says that a space has a rule that does so.
func (s *Space) translates(verdicts ...string) bool {
	return slices.ContainsFunc(s.Rules, func(r Rule) bool { return slices.Contains(verdicts, r.Verdict) })
}

// stillOpen finds the client of a connection whose server's packet was taken for one of
// the translating host itself: it has the port that the host had translated it to, which
// is its own wherever that is free.
func (d *diagnosis) stillOpen(s *Space, e *seen) (*Socket, *Space) {
	if !s.owns(e.Tuple.Destination.Addr()) || !s.translates("snat", "masquerade") {
		return nil, nil
	}
	for _, o := range d.Spaces {
		for i := range o.After.Sockets {
			c := &o.After.Sockets[i]
			if o != s && c.Protocol == protoTCP && c.State == tcpEstablished && c.Remote == e.Tuple.Source &&
				c.Local.Port() == e.Tuple.Destination.Port() && c.Local.Addr() != e.Tuple.Destination.Addr() {
				return c, o
			}
		}
	}
	return nil, nil
}

// refusedAmidst finds the client that was told of a reset at the time at which a server
// refused a packet in the middle of a connection, and who translates between the two.
func (d *diagnosis) refusedAmidst(s *Space, e *seen) (told *seen, by *Space) {
	from, to := e.Tuple.Source, e.Tuple.Destination
	if s.ephemeral(to.Port()) {
		return nil, nil
	}
	for _, o := range d.events {
		if o.Kind != SocketError || o.Errno != eCONNRESET || o.Space == e.Space || !meets(o, e.turned()) {
			continue
		}
		for _, t := range d.Spaces {
			source := o.Tuple.Source.Addr() != from.Addr() && t.owns(from.Addr()) && t.translates("snat", "masquerade")
			target := o.Tuple.Source.Addr() == from.Addr() && o.Tuple.Destination != to && t.translates("dnat")
			if t != s && (source || target) {
				return o, t
			}
		}
	}
	return nil, nil
}

// turned is an event as one of the answer.
func (e *seen) turned() *seen {
	other := *e.Event
	other.Tuple.Source, other.Tuple.Destination = e.Tuple.Destination, e.Tuple.Source
	return &seen{Event: &other}
}

// forgot is the verdict about a space that translates.
func (d *diagnosis) forgot(t *Space, e *seen, sure Confidence) *Verdict {
	v, fresh := d.verdict(TrackingForgot, t, "", e)
	d.eventOf(v, e)
	if !fresh {
		return v
	}
	v.Where.Hook, v.Confidence = "conntrack", sure
	v.Owner = "whoever translates at " + t.Name
	for _, kind := range []string{"masquerade", "snat", "dnat"} {
		if i := slices.IndexFunc(t.Rules, func(r Rule) bool { return r.Verdict == kind }); i >= 0 {
			v.saw("it translates, as by the %s", t.Rules[i].describe())
			v.Owner = t.Rules[i].owner()
			break
		}
	}
	const setting = "net.netfilter.nf_conntrack_tcp_timeout_established"
	c := t.After.Conntrack
	v.saw("%s = %s seconds; %d of %d entries, early_drop +%d", setting, orNone(t.Settings[setting]), c.Count, c.Max, c.EarlyDrop-min(t.Before.Conntrack.EarlyDrop, c.EarlyDrop))
	v.isNot("%s: no rule drops it", ConntrackInvalid)
	v.isNot("%s: the reset is of the kernel, which has no socket for the packet", FirewallReject)
	v.Fix, v.Undo = "let the program keep its idle connections alive (SO_KEEPALIVE, TCP_KEEPIDLE well below the time for which they are tracked), or open them anew", "nothing was changed"
	if seconds, err := strconv.Atoi(t.Settings[setting]); err == nil && seconds < longIdle {
		v.Fix = t.in("sysctl -w %s=%d", setting, longIdle) + "; or " + v.Fix
		v.Undo = t.in("sysctl -w %s=%d", setting, seconds)
	}
	return v
}
