package cause

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// localPorts: no local port is left towards a remote end.
func (d *diagnosis) localPorts() {
	for _, e := range d.open(CallFailed) {
		none := e.Call == "connect" && e.Errno == eADDRNOTAVAIL || e.Call == "bind" && e.Errno == eADDRINUSE && e.Tuple.Destination.Port() == 0 ||
			e.Call == "connect" && e.Errno == eAGAIN && e.Tuple.Protocol == protoUDP
		if !none {
			continue
		}
		s := d.spaces[e.Space]
		low, high := s.portRange()
		taken, of := 0, Busy{}
		for _, b := range append(slices.Clone(s.Before.Busy), s.After.Busy...) {
			if b.Ports > taken && (b.Remote == e.Tuple.Destination || !e.Tuple.Destination.Addr().IsValid() || e.Tuple.Destination.Port() == 0) {
				taken, of = b.Ports, b
			}
		}
		// connect() says the same when the address to come from is not this host's.
		src := e.Tuple.Source.Addr()
		if src.IsValid() && !src.IsUnspecified() && !s.owns(src) {
			continue
		}
		v, fresh := d.verdict(PortsExhausted, s, "", e)
		d.eventOf(v, e)
		if !fresh {
			continue
		}
		v.Where.Hook = "socket"
		v.Packets = e.Count
		v.Title = fmt.Sprintf("%s in %s has no local port left towards %s: the range %d-%d has %d", e.Command, s.Name, shown(e.Tuple.Destination), low, high, high-low+1)
		v.saw("net.ipv4.ip_local_port_range = %d %d", low, high)
		if taken > 0 {
			v.saw("%d ports are taken towards %s, those in TIME-WAIT too (sock_diag)", taken, of.Remote)
		}
		if taken*10 < (high-low+1)*8 {
			v.Confidence = Medium
		}
		v.isNot("%s: the error is of this host, nothing was sent", NoRoute)
		v.Fix, v.Undo = s.in("sysctl -w net.ipv4.ip_local_port_range='1024 65535'"), s.in("sysctl -w net.ipv4.ip_local_port_range='%d %d'", low, high)
		v.Fix += "; better, let the program keep and use its connections again"
		v.Owner = fmt.Sprintf("%s (pid %d)", e.Command, e.PID)
	}
}

// portInUse: a program asks for a certain local port again and again, and another socket
// has it. One that looks for a free port asks for another one.
func (d *diagnosis) portInUse() {
	for _, e := range d.open(CallFailed) {
		want := e.Tuple.Destination
		if e.Call != "bind" || e.Errno != eADDRINUSE || want.Port() == 0 || e.Count < often {
			continue
		}
		s := d.spaces[e.Space]
		v, fresh := d.verdict(PortInUse, s, fmt.Sprint(e.Tuple.Protocol, want), e)
		d.eventOf(v, e)
		v.Title = fmt.Sprintf("%s in %s cannot have local port %s %s: it is in use", e.Command, s.Name, protocolName(e.Tuple.Protocol), shown(want))
		if !fresh {
			continue
		}
		v.Where.Hook, v.Tuple, v.Owner = "socket", &Ends{Protocol: protocolName(e.Tuple.Protocol), Source: want}, fmt.Sprintf("%s (pid %d)", e.Command, e.PID)
		what := map[bool]string{true: "-tanp", false: "-uanp"}[e.Tuple.Protocol == protoTCP]
		v.Fix = fmt.Sprintf("stop who has it, or take another port: %s shows who; nobody, if it is a connection in TIME-WAIT, which SO_REUSEADDR passes over", s.in("ss %s sport = :%d", what, want.Port()))
		v.Undo = "nothing is changed by looking"
		v.isNot("%s: it asked for this one port", PortsExhausted)
		for _, o := range s.After.Sockets {
			if o.Protocol == e.Tuple.Protocol && o.Local.Port() == want.Port() && s.process(o.Inode) != "" {
				v.saw("%s has %s (sock_diag)", s.process(o.Inode), o.Local)
				v.Title += " by " + s.process(o.Inode)
				break
			}
		}
	}
}

// portsTaken: all local ports are taken towards a remote end, at both ends of the window:
// whoever connects there next is refused, whether or not somebody was in between.
func (d *diagnosis) portsTaken() {
	for _, s := range d.Spaces {
		low, high := s.portRange()
		for _, b := range s.After.Busy {
			before := slices.ContainsFunc(s.Before.Busy, func(o Busy) bool {
				return o.Remote == b.Remote && o.Local == b.Local && o.Protocol == b.Protocol && o.Ports > high-low
			})
			if b.Ports <= high-low || !before || !s.owns(b.Local) || s.serves(b.Protocol, netip.AddrPortFrom(b.Local, uint16(low))) || d.has(PortsExhausted, s) {
				continue
			}
			v, _ := d.verdict(PortsExhausted, s, b.Remote.String(), nil)
			v.Where.Hook, v.Confidence = "socket", Medium
			v.Tuple = &Ends{Protocol: protocolName(b.Protocol), Source: netip.AddrPortFrom(b.Local, 0), Destination: b.Remote}
			v.Title = fmt.Sprintf("%s has no local port left towards %s: all %d of the range %d-%d are taken", s.Name, b.Remote, high-low+1, low, high)
			v.saw("%d ports are taken towards %s, those in TIME-WAIT too (sock_diag)", b.Ports, b.Remote)
			v.saw("net.ipv4.ip_local_port_range = %d %d", low, high)
			v.isNot("%s: what has a port is connected", NoRoute)
			v.Fix, v.Undo = s.in("sysctl -w net.ipv4.ip_local_port_range='1024 65535'"), s.in("sysctl -w net.ipv4.ip_local_port_range='%d %d'", low, high)
			v.Owner = "the program that connects there"
		}
	}
}

// fragments: a part of a packet is missing, so that the whole of it dies.
func (d *diagnosis) fragments() {
	for _, e := range d.open(Drop) {
		if e.Reason == "FRAG_REASM_TIMEOUT" || e.Reason == "FRAG_TOO_FAR" || e.Reason == "NOT_SPECIFIED" && (strings.HasPrefix(e.Location, "ip_expire") || strings.HasPrefix(e.Location, "ip6_frag_expire") || strings.HasPrefix(e.Location, "ip6frag_expire")) {
			d.fragmentLost(d.spaces[e.Space], e)
		}
	}
	for _, s := range d.Spaces {
		came, whole, failed := s.rose("Ip.ReasmReqds", "Ip6ReasmReqds"), s.rose("Ip.ReasmOKs", "Ip6ReasmOKs"), s.rose("Ip.ReasmTimeout", "Ip6ReasmTimeout")
		// Parts that wait at the end may be just on their way: they count if none of many
		// packets was ever whole.
		waits := s.After.Fragments > s.Before.Fragments && whole == 0 && came >= 2
		cut := slices.ContainsFunc(d.events, func(e *seen) bool {
			return e.Kind == Drop && e.by != "" && e.by != "benign" && e.Tuple.Fragment && s.owns(e.Tuple.Destination.Addr())
		})
		if d.has(FragmentLost, s) || cut || failed == 0 && !waits {
			continue
		}
		d.fragmentLost(s, nil)
	}
	d.folds(FragmentLost, func(e *seen) bool {
		return e.Kind == ICMPSent && (e.Type == 11 || e.Type == 3 && e.Tuple.is6()) && e.Code == 1
	})
}

func (d *diagnosis) fragmentLost(s *Space, e *seen) {
	object := ""
	if e != nil {
		object = e.Tuple.Source.Addr().String()
	}
	v, fresh := d.verdict(FragmentLost, s, object, e)
	v.Title = fmt.Sprintf("parts of packets get lost on their way to %s: the rest of them waits in vain", s.Name)
	if e != nil {
		d.eventOf(v, e)
		v.Title = fmt.Sprintf("parts of packets from %s get lost on their way to %s: the rest of them waits in vain", e.Tuple.Source.Addr(), s.Name)
	}
	if !fresh {
		return
	}
	v.Where.Hook = "reassembly"
	v.saw("Ip.ReasmReqds +%d, ReasmOKs +%d, ReasmTimeout +%d, Ip6ReasmReqds +%d, Ip6ReasmOKs +%d, Ip6ReasmTimeout +%d", s.rose("Ip.ReasmReqds"), s.rose("Ip.ReasmOKs"), s.rose("Ip.ReasmTimeout"),
		s.rose("Ip6ReasmReqds"), s.rose("Ip6ReasmOKs"), s.rose("Ip6ReasmTimeout"))
	v.saw("%d packets wait for their parts at the end (/proc/net/sockstat)", s.After.Fragments)
	if e == nil && s.rose("Ip.ReasmTimeout", "Ip6ReasmTimeout") == 0 {
		v.Confidence = Medium
	}
	v.isNot("%s: some parts arrive, which a router that drops what is too big would not let", MTUBlackHole)
	v.Fix = "send smaller packets (an MTU or a buffer of EDNS that fits the way), or find who drops the parts: " + s.in("tcpdump -ni any 'ip[6:2] & 0x3fff != 0'")
	v.Undo, v.Owner = "nothing is changed by looking", "the network between"
}

// calls are errors of programs that nothing else explains.
func (d *diagnosis) calls() {
	for _, e := range d.open(CallFailed) {
		s := d.spaces[e.Space]
		if d.refusedService(e) || e.Errno != ePERM {
			continue
		}
		hook := map[string]string{"connect": "cgroup connect", "bind": "cgroup bind"}[e.Call]
		if hook == "" {
			hook = "cgroup"
		}
		if d.explainedBy(e, FirewallDrop, CgroupDrop, FirewallReject, ConntrackFull, ConntrackInvalid, SNATPortsExhausted) {
			e.by = "refused"
			continue
		}
		all := s.attached(hook, "")
		if len(all) == 0 {
			all = s.attached("cgroup", "")
		}
		if len(all) == 0 {
			continue
		}
		v, fresh := d.verdict(CgroupDrop, s, hook, e)
		d.eventOf(v, e)
		if !fresh {
			continue
		}
		v.Where.Hook = all[0].Hook
		v.Title = fmt.Sprintf("%s refuses %s of %s in %s: EPERM", all[0], e.Call, e.Command, s.Name)
		v.Confidence = Medium
		for _, p := range all {
			v.saw("attached: %s", p)
		}
		v.isNot("%s: no packet died at a hook of netfilter", FirewallDrop)
		v.Fix, v.Undo = all[0].fix(s)
		v.Owner = all[0].owner()
	}
}

// explainedBy says that a conversation has met one of the causes.
func (d *diagnosis) explainedBy(e *seen, causes ...string) bool {
	return slices.ContainsFunc(d.events, func(o *seen) bool {
		return slices.Contains(causes, o.by) && o.Space == e.Space && (same(o.Tuple, e.Tuple) || o.Tuple.Destination.Addr() == e.Tuple.Destination.Addr())
	})
}

// often is how many packets of a conversation have to die before a cause that is not
// known is told of: one that dies now and then is nothing.
const often = 3

// rest tells of what died again and again, hurt somebody, and fits nothing known.
func (d *diagnosis) rest() {
	for _, e := range d.open(Drop) {
		if e.Count < often || !e.Tuple.Destination.Addr().IsValid() || e.Tuple.noise() || !d.suffered(e.Tuple) || lateReset(e.Tuple) {
			continue
		}
		if slices.ContainsFunc(d.events, func(o *seen) bool { return o.by != "" && o.by != "benign" && o.Kind == Drop && same(o.Tuple, e.Tuple) }) {
			continue // the conversation has a cause
		}
		s := d.spaces[e.Space]
		v, fresh := d.verdict(Unexplained, s, e.Reason+e.Location, e)
		d.eventOf(v, e)
		v.Title = fmt.Sprintf("%s of %s died at %s in %s, reason %s: no cause is known", times(v.Packets, "packet", "packets"), flow(e.Tuple), orNone(e.Location), s.Name, orNone(e.Reason))
		if !fresh {
			continue
		}
		v.Confidence = Low
		v.Where.Hook = hookOf(e)
		if len(e.Stack) > 0 {
			v.saw("called by %s", strings.Join(e.Stack[:min(6, len(e.Stack))], " < "))
		}
		v.Fix, v.Undo = "look up the function in the kernel's source; report it with the output of -o json", "nothing was changed"
		v.Owner = "not known"
	}
}
