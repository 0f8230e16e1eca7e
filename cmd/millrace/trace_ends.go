package main

import (
	"context"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer/trace"
	"github.com/millrace/millrace/layer/trace/cause"
)

// end is one end of the packets that a person asks about: addresses and ports, or the
// name of a network namespace, whose addresses are read when the watching begins.
type end struct {
	ranges []trace.Range
	space  string
	port   uint16
}

// ends are FROM and TO, as far as they are given.
type ends []end

func (n *names) parseEnds(args []string) (all ends, err error) {
	for _, arg := range args {
		one, err := n.parseEnd(arg)
		if err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	return all, nil
}

// parseAsked reads FROM, TO and a filter.
func (n *names) parseAsked(args []string) (all ends, filter *trace.Filter, err error) {
	var rest []string
	for _, arg := range args {
		if !n.isFilter(arg) {
			rest = append(rest, arg)
			continue
		}
		if filter != nil {
			return nil, nil, usage("%q: there is a filter already, and it is one word for the shell: 'tcp port 443 and host 10.0.0.1'", arg)
		}
		if filter, err = trace.ParseFilter(arg); err != nil {
			return nil, nil, usage("%w", err)
		}
	}
	if len(rest) > 2 {
		return nil, nil, usage("%q: there are FROM and TO already; a filter is one word for the shell: 'tcp port 443'", rest[2])
	}
	all, err = n.parseEnds(rest)
	return all, filter, err
}

// isFilter says whether it is a filter, not a name that is the same as a protocol's.
func (n *names) isFilter(arg string) bool {
	if _, err := os.Stat(pathOfSpace(arg)); err == nil || len(n.of[arg]) > 0 {
		return false
	}
	return trace.IsFilter(arg)
}

// parseEnd reads one, or several addresses with commas.
func (n *names) parseEnd(arg string) (end, error) {
	if several := strings.Split(arg, ","); len(several) > 1 {
		var all []trace.Range
		for _, one := range several {
			e, err := n.parseEnd(one)
			if err != nil {
				return end{}, err
			}
			if e.space != "" {
				return end{}, usage("%q: only addresses can be several", arg)
			}
			all = append(all, e.ranges...)
		}
		return end{ranges: all}, nil
	}
	if both, err := netip.ParseAddrPort(arg); err == nil {
		return n.led([]trace.Range{{Prefix: whole(both.Addr()), Port: both.Port()}}), nil
	}
	if addr, err := netip.ParseAddr(strings.Trim(arg, "[]")); err == nil {
		return n.led([]trace.Range{{Prefix: whole(addr)}}), nil
	}
	if prefix, err := netip.ParsePrefix(arg); err == nil {
		return n.led([]trace.Range{{Prefix: prefix.Masked()}}), nil
	}
	name, portText, given := strings.Cut(arg, ":")
	var port uint64
	if given {
		var err error
		if port, err = strconv.ParseUint(portText, 10, 16); err != nil {
			return end{}, usage("%q: %q is no port", arg, portText)
		}
	}
	if given && name == "" {
		return n.led([]trace.Range{ofPort(netip.IPv4Unspecified(), uint16(port)), ofPort(netip.IPv6Unspecified(), uint16(port))}), nil
	}
	var ranges []trace.Range
	for _, addr := range n.of[name] {
		ranges = append(ranges, trace.Range{Prefix: whole(addr), Port: uint16(port)})
	}
	for _, l := range n.leads { // node ports have no address
		if l.service == name && l.front.Addr().IsUnspecified() && (port == 0 || l.front.Port() == uint16(port)) {
			ranges = append(ranges, ofNodePort(l.front))
		}
	}
	if len(ranges) > 0 {
		return n.led(ranges), nil
	}
	if strings.Contains(name, "/") {
		return end{}, usage("%q: no pod and no Service of this name is known: name the cluster with --source, or use addresses", arg)
	}
	if _, err := os.Stat(pathOfSpace(name)); err != nil {
		return end{}, usage("%q: use an address, ADDRESS:PORT, :PORT, a range, NAMESPACE/NAME of a pod or Service, a node's name, or a network namespace's name", arg)
	}
	return end{space: name, port: uint16(port)}, nil
}

func whole(addr netip.Addr) netip.Prefix {
	addr = addr.Unmap().WithZone("")
	return netip.PrefixFrom(addr, addr.BitLen())
}

// ofNodePort is every address, at the port of a Service on the nodes.
func ofNodePort(front netip.AddrPort) trace.Range { return ofPort(front.Addr(), front.Port()) }

// ofPort is every address of a family at a port.
func ofPort(any netip.Addr, port uint16) trace.Range {
	return trace.Range{Prefix: netip.PrefixFrom(any, 0), Port: port}
}

// led adds to what is asked for where Services lead it, and the Services that lead to
// it: packets have both addresses on their way, before and behind the translation.
func (n *names) led(asked []trace.Range) end {
	all := slices.Clone(asked)
	for _, l := range n.leads {
		front := trace.Range{Prefix: whole(l.front.Addr()), Port: l.front.Port()}
		if l.front.Addr().IsUnspecified() {
			front = ofNodePort(l.front)
		}
		to := within(asked, l.front) || slices.Contains(asked, front)
		for _, backend := range l.backends {
			if to {
				all = append(all, trace.Range{Prefix: whole(backend.Addr()), Port: backend.Port()})
			} else if within(asked, backend) && !slices.Contains(all, front) {
				all = append(all, front)
			}
		}
	}
	return end{ranges: all}
}

// within says whether one of the ranges has an end. A port that is not known may be any.
func within(ranges []trace.Range, a netip.AddrPort) bool {
	return slices.ContainsFunc(ranges, func(r trace.Range) bool {
		return r.Prefix.Contains(a.Addr()) && (r.Port == 0 || a.Port() == 0 || r.Port == a.Port())
	})
}

// question is what is asked for, once the addresses of the namespaces are known.
type question struct {
	sides [][]trace.Range
	// filter is what is asked for of what is between the sides; nil for all.
	filter *trace.Filter
	// own are the addresses of each namespace.
	own map[uint32][]netip.Addr
	// translating are those of namespaces through which others' packets go: they may be
	// FROM's by the time they get to TO.
	translating []netip.Addr
}

// everything says that all is asked for.
func (q *question) everything() bool { return len(q.sides) == 0 && q.filter == nil }

// read makes the question of the ends, with the addresses that the namespaces have now.
func (all ends) read(ctx context.Context, spaces []trace.Namespace) (*question, error) {
	if len(all) == 0 {
		return &question{}, nil
	}
	reader, err := trace.NewReader(spaces)
	if err != nil {
		return nil, err
	}
	addrs, err := reader.Addresses(ctx)
	if err != nil {
		return nil, err
	}
	return all.ask(spaces, addrs), nil
}

// ask completes the ends by the addresses of the namespaces.
func (all ends) ask(spaces []trace.Namespace, addrs map[uint32][]cause.Addr) *question {
	q := &question{own: map[uint32][]netip.Addr{}}
	for inode, of := range addrs {
		for _, a := range of {
			q.own[inode] = append(q.own[inode], a.Prefix.Addr())
		}
	}
	for _, e := range all {
		side := e.ranges
		for _, s := range spaces {
			if e.space == "" || s.Name != e.space && s.Name != "namespace "+e.space && s.Path != pathOfSpace(e.space) {
				continue
			}
			for _, addr := range q.own[s.Inode] {
				if !addr.IsLoopback() {
					side = append(side, trace.Range{Prefix: whole(addr), Port: e.port})
				}
			}
		}
		q.sides = append(q.sides, side)
	}
	for inode, of := range addrs {
		if devices(of) > 1 && !slices.ContainsFunc(q.own[inode], q.holds) {
			q.translating = append(q.translating, q.own[inode]...)
		}
	}
	q.translating = slices.DeleteFunc(q.translating, netip.Addr.IsLoopback)
	return q
}

// devices counts those with addresses of their own, but for loopback.
func devices(of []cause.Addr) int {
	indexes := map[int]bool{}
	for _, a := range of {
		if !a.Prefix.Addr().IsLoopback() {
			indexes[a.Index] = true
		}
	}
	return len(indexes)
}

// holds says whether an address is asked for by itself, not by a range.
func (q *question) holds(addr netip.Addr) bool {
	return slices.ContainsFunc(q.sides, func(side []trace.Range) bool {
		return slices.ContainsFunc(side, func(r trace.Range) bool { return r.Prefix == whole(addr) })
	})
}

// options are what the kernel is told: nothing, which stands for all, where there is
// too much to tell.
func (q *question) options(o *trace.Options) {
	o.Filter = q.filter
	var between []trace.Range
	for _, addr := range q.translating {
		between = append(between, trace.Range{Prefix: whole(addr)})
	}
	switch len(q.sides) {
	case 0:
		return
	case 1:
		o.From = q.sides[0]
	default:
		o.From, o.To = slices.Concat(q.sides[0], between), q.sides[1]
	}
	if len(o.From)+len(o.To) > trace.MostRanges || len(q.sides) == 2 && (len(o.From) == 0 || len(o.To) == 0) {
		o.From, o.To = nil, nil
	}
}

// asked says whether an event is of a packet that is asked for, in one direction or the
// other. An end that is not known may be the one that is asked for.
func (q *question) asked(e *cause.Event) bool {
	from, to := e.Tuple.Source, e.Tuple.Destination
	var about *cause.Tuple
	if inner, ok := aboutPacket(e); ok {
		from, to, about = inner.Source, inner.Destination, &inner
	}
	if !q.filter.Match(e, about) {
		return false
	}
	is := func(side int, a netip.AddrPort) bool { return q.is(side, a, e.Space) }
	switch {
	case len(q.sides) == 0:
		return true
	case !from.Addr().IsValid() && !to.Addr().IsValid():
		return false
	case len(q.sides) == 1:
		return is(0, from) || is(0, to)
	}
	may := func(side int, a netip.AddrPort) bool { return !a.Addr().IsValid() || is(side, a) }
	sent := func(a netip.AddrPort) bool { return may(0, a) || slices.Contains(q.translating, a.Addr()) }
	return sent(from) && may(1, to) || may(1, from) && sent(to)
}

// is says whether an end is of a side. One at all addresses of its namespace has each of
// them.
func (q *question) is(side int, a netip.AddrPort, space uint32) bool {
	if a.Addr().IsUnspecified() {
		return slices.ContainsFunc(q.own[space], func(own netip.Addr) bool {
			return within(q.sides[side], netip.AddrPortFrom(own, a.Port()))
		})
	}
	return within(q.sides[side], a)
}

// aboutPacket are the ends of the packet that an ICMP message is about (RFC 792, RFC 4443),
// if the event's is such a message.
func aboutPacket(e *cause.Event) (inner cause.Tuple, ok bool) {
	t, b := e.Tuple, e.Packet
	switch {
	case t.Protocol == unix.IPPROTO_ICMP && slices.Contains([]uint8{3, 4, 11, 12}, t.ICMPType) && len(b) > 0:
		at := int(b[0]&15)*4 + 8
		if len(b) < at+20 || b[at]>>4 != 4 {
			return inner, false
		}
		b = b[at:]
		source, destination := netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		return withPorts(unix.ETH_P_IP, source, destination, b[9], b[min(len(b), int(b[0]&15)*4):]), true
	case t.Protocol == unix.IPPROTO_ICMPV6 && t.ICMPType > 0 && t.ICMPType < 128 && len(b) >= 40+8+40:
		b = b[48:]
		if b[0]>>4 != 6 {
			return inner, false
		}
		source, destination := netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		return withPorts(unix.ETH_P_IPV6, source, destination, b[6], b[40:]), true
	}
	return inner, false
}

// withPorts reads the ports from the beginning of a transport header, where there are any.
func withPorts(ethertype uint16, source, destination netip.Addr, protocol uint8, header []byte) cause.Tuple {
	var from, to uint16
	switch protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP:
		if len(header) >= 4 {
			from, to = uint16(header[0])<<8|uint16(header[1]), uint16(header[2])<<8|uint16(header[3])
		}
	}
	return cause.Tuple{EtherType: ethertype, Protocol: protocol, Source: netip.AddrPortFrom(source, from), Destination: netip.AddrPortFrom(destination, to)}
}
