package cause

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// seen is an event of the evidence, and what explains it.
type seen struct {
	*Event
	// by is the cause that it is of, or why it is none; "" while nobody knows.
	by string
	// asked says that somebody asks about it.
	asked bool
}

// diagnosis is the work on one Evidence.
type diagnosis struct {
	*Evidence
	spaces   map[uint32]*Space
	events   []*seen
	verdicts []*Verdict
	keys     map[string]*Verdict
	// homes are the spaces that have an address; stuck are the connections that do not get on.
	homes map[netip.Addr][]*Space
	stuck []Tuple
	// narrow are the devices whose MTU a path MTU is, by namespace and name.
	narrow map[string]*Verdict
	// asks says that somebody asks about some of the events only.
	asks bool
}

// Diagnose names the causes of what the evidence holds. A cause is named once for each
// object (a rule, a socket, a route, a device); what follows from a cause is not named
// beside it. The surest come first.
func Diagnose(e *Evidence) []Verdict { return judge(e).sorted() }

// folded are the packets that died and that no cause is named for: they die where all is
// well, too.
func (d *diagnosis) folded() (all []Event) {
	for _, event := range d.events {
		about := slices.ContainsFunc(d.verdicts, func(v *Verdict) bool { return v.Cause == event.by })
		if event.Kind == Drop && !about {
			all = append(all, *event.Event)
		}
	}
	return all
}

// judge lets all rules look at the evidence.
func judge(e *Evidence) *diagnosis { return judgeFor(e, nil) }

// judgeFor is judge for somebody who asks about some of the events; nil for all.
func judgeFor(e *Evidence, asked func(*Event) bool) *diagnosis {
	d := &diagnosis{Evidence: e, spaces: map[uint32]*Space{}, keys: map[string]*Verdict{}, narrow: map[string]*Verdict{}}
	d.index()
	for i := range e.Events {
		if d.spaces[e.Events[i].Space] != nil {
			d.events = append(d.events, &seen{Event: &e.Events[i]})
		}
	}
	if asked != nil {
		d.askFor(asked)
	}
	// The order is that of what follows from what: a packet that a rule drops is the
	// cause of the neighbour that is not found, not the other way round.
	for _, rule := range []func(*diagnosis){
		(*diagnosis).sixOff, (*diagnosis).benign,
		(*diagnosis).checksums, (*diagnosis).duplicates, (*diagnosis).floods,
		(*diagnosis).pathMTU, (*diagnosis).linkMTU,
		(*diagnosis).tracking, (*diagnosis).firewall,
		(*diagnosis).programs, (*diagnosis).bridges, (*diagnosis).misforwarded,
		(*diagnosis).sourceChecks, (*diagnosis).wrongMAC, (*diagnosis).sameMAC, (*diagnosis).downLinks,
		(*diagnosis).vxlan, (*diagnosis).hops, (*diagnosis).routes, (*diagnosis).neighbours,
		(*diagnosis).qdiscs, (*diagnosis).queues, (*diagnosis).memory,
		(*diagnosis).acceptQueues, (*diagnosis).pings, (*diagnosis).policies, (*diagnosis).signatures, (*diagnosis).otherAnswers, (*diagnosis).forgotten, (*diagnosis).noListener,
		(*diagnosis).noRouteBack, (*diagnosis).synQueues,
		(*diagnosis).closedUnread, (*diagnosis).stalled, (*diagnosis).localPorts, (*diagnosis).portInUse, (*diagnosis).portsTaken,
		(*diagnosis).fragments, (*diagnosis).fragmentsOfTunnels,
		(*diagnosis).calls, (*diagnosis).rest,
		(*diagnosis).throughTunnels,
	} {
		rule(d)
	}
	d.quoted()
	return d
}

// index finds once what is looked for with each event.
func (d *diagnosis) index() {
	d.homes = map[netip.Addr][]*Space{}
	for _, s := range d.Spaces {
		d.spaces[s.Inode] = s
		for _, a := range s.Addrs {
			addr := a.Prefix.Addr()
			if all := d.homes[addr]; !addr.IsLoopback() && (len(all) == 0 || all[len(all)-1] != s) {
				d.homes[addr] = append(all, s)
			}
		}
		for i := range s.After.Sockets {
			if o := &s.After.Sockets[i]; o.State == tcpSynSent || o.Retransmits > 0 {
				d.stuck = append(d.stuck, Tuple{Protocol: o.Protocol, Source: o.Local, Destination: o.Remote})
			}
		}
	}
}

// sort puts the surest verdicts first.
func (d *diagnosis) sort() {
	rank := map[Confidence]int{High: 0, Medium: 1, Low: 2}
	slices.SortStableFunc(d.verdicts, func(a, b *Verdict) int {
		return cmp.Or(cmp.Compare(rank[a.Confidence], rank[b.Confidence]), cmp.Compare(a.Where.Namespace, b.Where.Namespace))
	})
}

// sorted are the verdicts, the surest first.
func (d *diagnosis) sorted() []Verdict {
	d.sort()
	result := make([]Verdict, len(d.verdicts))
	for i, v := range d.verdicts {
		result[i] = *v
	}
	return result
}

// open are the events of a kind that nothing explains yet.
func (d *diagnosis) open(kinds ...Kind) (all []*seen) {
	for _, e := range d.events {
		if e.by == "" && slices.Contains(kinds, e.Kind) {
			all = append(all, e)
		}
	}
	return all
}

// verdict gives the verdict about an object in a space, and whether it is a new one. The
// caller fills in a new one; an old one counts the packets of the event as well.
func (d *diagnosis) verdict(id string, s *Space, object string, e *seen) (v *Verdict, fresh bool) {
	key := fmt.Sprint(id, " ", s.Inode, " ", object)
	v = d.keys[key]
	if v == nil {
		v, fresh = &Verdict{Cause: id, Evidence: []string{}, Not: []string{}, Confidence: High}, true
		v.Where = Where{Namespace: s.Name, Pod: s.Pod}
		d.keys[key] = v
		d.verdicts = append(d.verdicts, v)
	}
	if e != nil {
		e.by = id
		if scratch := d.beside(v, e); scratch != nil {
			return scratch, false
		}
		if e.Kind == Drop {
			v.Packets += e.Count
		}
		if v.Tuple == nil && e.Tuple.Destination.Addr().IsValid() {
			v.Tuple = ends(e.Tuple)
		}
		if v.Where.Interface == "" {
			v.Where.Interface = e.Device
		}
	}
	return v, fresh
}

// saw adds a line of evidence, once.
func (v *Verdict) saw(format string, values ...any) {
	if line := fmt.Sprintf(format, values...); !slices.Contains(v.Evidence, line) {
		v.Evidence = append(v.Evidence, line)
	}
}

// isNot adds a cause that it is not, with the evidence against it.
func (v *Verdict) isNot(format string, values ...any) {
	if line := fmt.Sprintf(format, values...); !slices.Contains(v.Not, line) {
		v.Not = append(v.Not, line)
	}
}

// has says whether a cause was named in a space.
func (d *diagnosis) has(id string, s *Space) bool {
	return slices.ContainsFunc(d.verdicts, func(v *Verdict) bool { return v.Cause == id && v.Where.Namespace == s.Name })
}

// folds explains events as what follows from a cause.
func (d *diagnosis) folds(id string, follows func(*seen) bool) {
	for _, e := range d.events {
		if e.by == "" && follows(e) {
			e.by = id
		}
	}
}

// in is a command for a space.
func (s *Space) in(format string, values ...any) string {
	return strings.TrimSpace(s.Enter + " " + fmt.Sprintf(format, values...))
}

// rose is how much a counter has grown, the sum of several.
func (s *Space) rose(names ...string) (sum uint64) {
	for _, name := range names {
		sum += s.After.Counters[name] - min(s.Before.Counters[name], s.After.Counters[name])
	}
	return sum
}

func (s *Space) link(name string) *Link {
	for i := range s.After.Links {
		if s.After.Links[i].Name == name {
			return &s.After.Links[i]
		}
	}
	return nil
}

func (s *Space) linkAt(index int) *Link {
	for i := range s.After.Links {
		if s.After.Links[i].Index == index {
			return &s.After.Links[i]
		}
	}
	return nil
}

// linkRose is how much a device's counter has grown.
func (s *Space) linkRose(index int, name string) uint64 {
	now := s.linkAt(index)
	if now == nil {
		return 0
	}
	for _, l := range s.Before.Links {
		if l.Index == index {
			return now.Statistics[name] - min(l.Statistics[name], now.Statistics[name])
		}
	}
	return now.Statistics[name]
}

// owns says whether a space has the address.
func (s *Space) owns(a netip.Addr) bool {
	return a.IsLoopback() || slices.ContainsFunc(s.Addrs, func(o Addr) bool { return o.Prefix.Addr() == a })
}

// owners are the spaces that have an address on a device other than loopback.
func (d *diagnosis) owners(a netip.Addr) []*Space { return d.homes[a] }

// path is the kernel's answer for a destination: as asked for the packet, else for any.
func (d *diagnosis) path(space uint32, from string, src, dst netip.Addr) *Path {
	var other *Path
	for i := range d.Paths {
		p := &d.Paths[i]
		if p.Space != space || p.Destination != dst || p.From != from {
			continue
		}
		if p.Source == src {
			return p
		}
		if other == nil || !p.Source.IsValid() {
			other = p
		}
	}
	return other
}

// ends are a tuple as people read it.
func ends(t Tuple) *Ends {
	return &Ends{Protocol: protocolName(t.Protocol), Source: t.Source, Destination: t.Destination}
}

func protocolName(number uint8) string {
	switch number {
	case protoICMP:
		return "icmp"
	case protoTCP:
		return "tcp"
	case protoUDP:
		return "udp"
	case protoICMP6:
		return "icmpv6"
	case protoSCTP:
		return "sctp"
	case 0:
		return ""
	}
	return fmt.Sprint(number)
}

// Protocols, types of Ethernet frames, states of TCP and neighbours, error numbers: the
// kernel's, which are the same on all architectures that it is built for here.
const (
	protoICMP, protoTCP, protoUDP, protoICMP6, protoNone, protoSCTP = 1, 6, 17, 58, 59, 132

	etherIP, etherARP, etherIP6 = 0x0800, 0x0806, 0x86dd

	flagFIN, flagSYN, flagRST, flagACK = 1, 2, 4, 16

	tcpEstablished, tcpSynSent, tcpSynReceived, tcpClose, tcpCloseWait, tcpListen, tcpNewSynReceived = 1, 2, 3, 7, 8, 10, 12

	neighIncomplete, neighFailed, neighPermanent = 0x01, 0x20, 0x80

	ePERM, eAGAIN, eACCES, eINVAL, eMSGSIZE                                                            = 1, 11, 13, 22, 90
	eADDRINUSE, eADDRNOTAVAIL, eNETUNREACH, eCONNRESET, eNOBUFS, eTIMEDOUT, eCONNREFUSED, eHOSTUNREACH = 98, 99, 101, 104, 105, 110, 111, 113
)

// shown is an end of a connection, without the port where there is none.
func shown(a netip.AddrPort) string {
	if !a.Addr().IsValid() {
		return "an unknown address"
	}
	if a.Port() == 0 {
		return a.Addr().String()
	}
	return a.String()
}

// flow is a tuple in words: "tcp 10.0.0.1:4711 > 10.0.0.2:80".
func flow(t Tuple) string {
	name := protocolName(t.Protocol)
	if t.EtherType == etherARP {
		name = "arp"
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s > %s", name, shown(t.Source), shown(t.Destination)))
}

// times is a count in words.
func times(n uint64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// is6 says whether a tuple is of IPv6.
func (t Tuple) is6() bool { return t.Destination.Addr().Is6() && !t.Destination.Addr().Is4In6() }

// noise says that a packet is to many: for these nobody waits.
func (t Tuple) noise() bool {
	a := t.Destination.Addr()
	return a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// opens says that it is the first packet of a TCP connection.
func (t Tuple) opens() bool { return t.Protocol == protoTCP && t.TCPFlags&(flagSYN|flagACK) == flagSYN }

// same says whether two tuples are of one conversation, whoever speaks; the client's port
// is not compared, for events leave it out.
func same(a, b Tuple) bool {
	if a.Protocol != b.Protocol {
		return false
	}
	straight := a.Source.Addr() == b.Source.Addr() && a.Destination.Addr() == b.Destination.Addr()
	turned := a.Source.Addr() == b.Destination.Addr() && a.Destination.Addr() == b.Source.Addr()
	// A socket that is closed has lost its port.
	service := func(x, y netip.AddrPort) bool { return x.Port() == y.Port() || x.Port() == 0 || y.Port() == 0 }
	return straight && (service(a.Destination, b.Destination) || service(a.Source, b.Source)) ||
		turned && (service(a.Destination, b.Source) || service(a.Source, b.Destination))
}

// suffered says whether the programs of a conversation noticed: something was sent again,
// was refused or came to nothing.
func (d *diagnosis) suffered(t Tuple) bool {
	for _, e := range d.events {
		switch e.Kind {
		case Retransmit, SocketError, CallFailed:
			if same(e.Tuple, t) {
				return true
			}
		}
	}
	return slices.ContainsFunc(d.stuck, func(o Tuple) bool { return same(o, t) })
}

// process is who holds the socket, in words; "" if nobody is known.
func (s *Space) process(inode uint32) string {
	p, known := s.Processes[inode]
	if !known {
		return ""
	}
	return fmt.Sprintf("%s (pid %d)", p.Command, p.PID)
}
