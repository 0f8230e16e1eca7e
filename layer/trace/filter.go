package trace

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer/trace/cause"
)

// Filter says which packets are asked for, in the words of pcap-filter(7): those about
// addresses, ports, protocols and TCP's flags, which are known of every event, also of
// those that are no packets. It is a program of a few steps, which the kernel's programs
// go through as Match does.
type Filter struct{ steps []traceStep }

// BadFilter says what of a filter is not understood. At counts its characters from 1.
type BadFilter struct {
	Text string
	At   int
	Word string // "" for its end
	What string
}

func (b *BadFilter) Error() string {
	word := strconv.Quote(b.Word)
	if b.Word == "" {
		word = "its end"
	}
	return fmt.Sprintf("filter %q, character %d: %s: %s", b.Text, b.At, word, b.What)
}

const (
	mostTests    = 64 // and the like; STEPS of the programs
	mostAnswers  = 32 // that wait for an and, an or, or a not: bits of a word
	mostBrackets = 32
)

// IsFilter says whether a text has the form of a filter of more than an address or a name:
// two words, a bracket, a protocol, or a word that one begins with.
func IsFilter(text string) bool {
	_, protocol := filterProtocols[text]
	return protocol || slices.Contains(filterStarts, text) || strings.ContainsAny(text, " \t\n()!&|")
}

// ParseFilter reads a filter. The error is a *BadFilter.
func ParseFilter(text string) (f *Filter, err error) {
	p := &filterParser{text: text, filter: &Filter{}}
	defer func() {
		if why := recover(); why != nil {
			bad, ours := why.(*BadFilter)
			if !ours {
				panic(why)
			}
			f, err = nil, bad
		}
	}()
	p.lex()
	p.expression(0)
	if p.at < len(p.words) {
		p.fail("and, or, or the end is expected")
	}
	if waiting := p.filter.answers(); waiting > mostAnswers {
		p.fail(fmt.Sprintf("%d answers wait for each other, %d may", waiting, mostAnswers))
	}
	return p.filter, nil
}

type filterWord struct {
	text string
	at   int // of its first character, from 0
}

type filterParser struct {
	text   string
	words  []filterWord
	at     int
	filter *Filter
	// last is what was said before the address or the port of the last test: it need not be
	// said again.
	last *qualifiers
}

// qualifiers are what stands before an address or a port.
type qualifiers struct{ protocol, direction, kind string }

// fail ends reading, at the word that is next.
func (p *filterParser) fail(what string) {
	bad := &BadFilter{Text: p.text, At: len([]rune(p.text)) + 1, What: what}
	if p.at < len(p.words) {
		bad.Word, bad.At = p.words[p.at].text, len([]rune(p.text[:p.words[p.at].at]))+1
	}
	panic(bad)
}

func inWord(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || strings.IndexByte(".:/-_", c) >= 0
}

func (p *filterParser) lex() {
	for at := 0; at < len(p.text); {
		_, long := utf8.DecodeRuneInString(p.text[at:])
		end := at + long
		switch two := p.text[at:min(at+2, len(p.text))]; {
		case strings.IndexByte(" \t\n", p.text[at]) >= 0:
			at++
			continue
		case inWord(p.text[at]):
			for end < len(p.text) && inWord(p.text[end]) {
				end++
			}
		case two == "&&" || two == "||" || two == "==" || two == "!=":
			end = at + 2
		}
		p.words = append(p.words, filterWord{p.text[at:end], at})
		at = end
	}
}

// next is the word that is next, "" at the end.
func (p *filterParser) next() string {
	if p.at == len(p.words) {
		return ""
	}
	return p.words[p.at].text
}

// take goes over the next word if it is one of these.
func (p *filterParser) take(words ...string) (taken string) {
	if p.next() != "" && slices.Contains(words, p.next()) {
		taken = p.next()
		p.at++
	}
	return taken
}

func (p *filterParser) emit(steps ...traceStep) {
	if p.filter.steps = append(p.filter.steps, steps...); len(p.filter.steps) > mostTests {
		p.fail(fmt.Sprintf("the filter is too long: it takes more than %d steps", mostTests))
	}
}

// expression reads terms with and and or between them, which count the same and go from
// left to right, as pcap-filter(7) says.
func (p *filterParser) expression(depth int) {
	if depth > mostBrackets {
		p.fail(fmt.Sprintf("more than %d brackets and nots in each other", mostBrackets))
	}
	p.term(depth)
	for {
		switch p.take("and", "&&", "or", "||") {
		case "and", "&&":
			p.term(depth)
			p.emit(traceStep{Test: uint32(traceTestTEST_AND)})
		case "or", "||":
			p.term(depth)
			p.emit(traceStep{Test: uint32(traceTestTEST_OR)})
		default:
			return
		}
	}
}

func (p *filterParser) term(depth int) {
	switch p.take("not", "!", "(") {
	case "not", "!":
		if depth == mostBrackets {
			p.fail(fmt.Sprintf("more than %d brackets and nots in each other", mostBrackets))
		}
		p.term(depth + 1)
		p.emit(traceStep{Test: uint32(traceTestTEST_NOT)})
	case "(":
		p.expression(depth + 1)
		if p.take(")") == "" {
			p.fail(`")" is expected`)
		}
	default:
		p.test()
	}
}

// filterProtocol is an EtherType, and a protocol of IP; 0 for any.
type filterProtocol struct {
	ethertype uint16
	protocol  uint8
	ports     bool
}

var filterProtocols = map[string]filterProtocol{
	"ip": {ethertype: unix.ETH_P_IP}, "ip6": {ethertype: unix.ETH_P_IPV6}, "arp": {ethertype: unix.ETH_P_ARP},
	"tcp": {protocol: unix.IPPROTO_TCP, ports: true}, "udp": {protocol: unix.IPPROTO_UDP, ports: true},
	"sctp": {protocol: unix.IPPROTO_SCTP, ports: true},
	"icmp": {protocol: unix.IPPROTO_ICMP}, "icmp6": {protocol: unix.IPPROTO_ICMPV6},
}

var filterStarts = []string{"host", "net", "port", "portrange", "proto", "src", "dst", "not"}

const filterWords = "host, net, port, portrange, src, dst, proto, tcp, udp, sctp, icmp, icmp6, ip, ip6, arp, tcp[tcpflags], an address, not, or a bracket is expected"

// test reads one test.
func (p *filterParser) test() {
	first := p.at
	q := qualifiers{protocol: p.takeProtocol()}
	if q.protocol == "tcp" && p.next() == "[" {
		p.flags()
		return
	}
	q.direction = p.direction()
	q.kind = p.take("host", "net", "port", "portrange", "proto")
	_, notAddress := netip.ParseAddr(p.next())
	_, notPrefix := netip.ParsePrefix(p.next())
	switch {
	case q.kind != "" || q.direction != "":
	case q.protocol != "" && notAddress != nil && notPrefix != nil: // a protocol alone
		p.emitProtocol(q.protocol)
		return
	case q.protocol == "" && p.last != nil && p.next() != "" && (notAddress == nil || notPrefix == nil || strings.Trim(p.next(), "0123456789-") == ""):
		q = *p.last
	case notAddress != nil && notPrefix != nil:
		p.at = first
		p.fail(filterWords)
	}
	if q.kind == "" {
		q.kind = "host"
		if notAddress != nil && notPrefix == nil {
			q.kind = "net"
		}
	}
	p.last = &q
	p.value(q)
	if q.protocol != "" {
		p.emitProtocol(q.protocol)
		p.emit(traceStep{Test: uint32(traceTestTEST_AND)})
	}
}

func (p *filterParser) takeProtocol() string {
	if _, is := filterProtocols[p.next()]; is {
		return p.take(p.next())
	}
	return ""
}

// direction reads src, dst, and both with and or or between them.
func (p *filterParser) direction() string {
	first := p.take("src", "dst")
	if first == "" || p.at+1 >= len(p.words) {
		return first
	}
	joint, second := p.words[p.at].text, p.words[p.at+1].text
	if (joint == "or" || joint == "and") && (second == "src" || second == "dst") && second != first {
		p.at += 2
		return joint
	}
	return first
}

func (p *filterParser) emitProtocol(name string) {
	of := filterProtocols[name]
	if of.ethertype != 0 {
		p.emit(traceStep{Test: uint32(traceTestTEST_ETHERTYPE), Low: swap(of.ethertype)})
		return
	}
	p.emit(traceStep{Test: uint32(traceTestTEST_PROTOCOL), Low: uint16(of.protocol)})
}

// value reads what is compared with.
func (p *filterParser) value(q qualifiers) {
	of := filterProtocols[q.protocol]
	switch {
	case (q.kind == "port" || q.kind == "portrange") && q.protocol != "" && of.ethertype == 0 && !of.ports, q.kind != "host" && q.kind != "net" && q.protocol == "arp":
		p.at--
		p.fail(q.protocol + " has no such thing")
	case q.kind == "proto" && (q.direction != "" || of.ethertype == 0 && q.protocol != ""):
		p.at--
		p.fail("proto goes with ip, ip6, or nothing")
	}
	switch q.kind {
	case "host", "net":
		p.address(q)
	case "port", "portrange":
		p.ports(q)
	case "proto":
		word := strings.TrimPrefix(p.next(), "\\")
		number, err := strconv.ParseUint(word, 10, 8)
		if of, named := filterProtocols[word]; named && of.protocol != 0 {
			number, err = uint64(of.protocol), nil
		}
		if err != nil {
			p.fail("a protocol's number, 0 to 255, or tcp, udp, sctp, icmp, icmp6 is expected")
		}
		p.at++
		p.emit(traceStep{Test: uint32(traceTestTEST_PROTOCOL), Low: uint16(number)})
	}
}

func (p *filterParser) address(q qualifiers) {
	prefix, err := netip.ParsePrefix(p.next())
	if addr, alone := netip.ParseAddr(p.next()); alone == nil && addr.Zone() == "" {
		prefix, err = netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	switch {
	case err != nil:
		p.fail("an address is expected; a pod, a Service or a node is named as FROM or TO, beside the filter")
	case q.kind == "host" && !prefix.IsSingleIP():
		p.fail("a range is a net, not a host")
	case prefix != prefix.Masked():
		p.fail(fmt.Sprintf("the net is %s", prefix.Masked()))
	case q.protocol == "ip" && !prefix.Addr().Is4() || q.protocol == "ip6" && prefix.Addr().Is4():
		p.fail("it is of the other family than " + q.protocol)
	}
	p.at++
	var s traceStep
	whole := bits128(prefix)
	address, mask := whole.Addr().As16(), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff").As16()
	ones := netip.PrefixFrom(netip.AddrFrom16(mask), whole.Bits()).Masked().Addr().As16()
	for i := range s.Address.Word {
		s.Address.Word[i] = binary.NativeEndian.Uint32(address[4*i:])
		s.Mask.Word[i] = binary.NativeEndian.Uint32(ones[4*i:])
	}
	p.emitEnds(q.direction, s, traceTestTEST_SOURCE, traceTestTEST_DESTINATION)
}

func (p *filterParser) ports(q qualifiers) {
	low, high, ranged := strings.Cut(p.next(), "-")
	from, err := strconv.ParseUint(low, 10, 16)
	to := from
	if ranged && err == nil {
		to, err = strconv.ParseUint(high, 10, 16)
	}
	switch {
	case err != nil || from == 0:
		p.fail("a port's number, 1 to 65535, is expected")
	case ranged != (q.kind == "portrange"):
		p.fail("one port is a port, two with - between them are a portrange")
	case to < from:
		p.fail("the first port is higher than the last")
	}
	p.at++
	p.emitEnds(q.direction, traceStep{Low: uint16(from), High: uint16(to)}, traceTestTEST_SOURCE_PORT, traceTestTEST_DESTINATION_PORT)
}

// emitEnds makes a test of one end, or of both.
func (p *filterParser) emitEnds(direction string, s traceStep, source, destination traceTest) {
	from, to := s, s
	from.Test, to.Test = uint32(source), uint32(destination)
	switch direction {
	case "src":
		p.emit(from)
	case "dst":
		p.emit(to)
	case "and":
		p.emit(from, to, traceStep{Test: uint32(traceTestTEST_AND)})
	default:
		p.emit(from, to, traceStep{Test: uint32(traceTestTEST_OR)})
	}
}

// The flags of TCP of which every packet's are kept.
var filterFlags = map[string]uint16{"tcp-fin": 1, "tcp-syn": 2, "tcp-rst": 4, "tcp-ack": 16}

// flags reads tcp[tcpflags] & (tcp-syn|tcp-ack) == tcp-syn.
func (p *filterParser) flags() {
	p.take("[")
	if p.take("tcpflags", "13") == "" {
		p.fail("tcpflags is expected: of a header only its flags are known of every packet")
	}
	for _, word := range []string{"]", "&"} {
		if p.take(word) == "" {
			p.fail(strconv.Quote(word) + " is expected: tcp[tcpflags] & tcp-syn != 0")
		}
	}
	mask := p.flagSet()
	unequal := p.take("==", "=", "!=")
	if unequal == "" {
		p.fail("==, = or != is expected")
	}
	value := p.flagSet()
	p.emit(traceStep{Test: uint32(traceTestTEST_FLAGS), Low: mask, High: value})
	if unequal == "!=" {
		p.emit(traceStep{Test: uint32(traceTestTEST_NOT)})
	}
	p.emitProtocol("tcp")
	p.emit(traceStep{Test: uint32(traceTestTEST_AND)})
}

// flagSet reads one flag, several in brackets with | between them, or a number.
func (p *filterParser) flagSet() (set uint16) {
	bracket := p.take("(") != ""
	for {
		flag, named := filterFlags[p.next()]
		if number, err := strconv.ParseUint(p.next(), 0, 8); err == nil {
			flag, named = uint16(number), number&^uint64(flagsOfTCP) == 0
		}
		if !named {
			p.fail("tcp-syn, tcp-ack, tcp-fin, tcp-rst, or a number of these is expected: others are not kept")
		}
		p.at++
		set |= flag
		if !bracket || p.take("|") == "" {
			break
		}
	}
	if bracket && p.take(")") == "" {
		p.fail(`")" is expected`)
	}
	return set
}

// answers is how many answers wait at most.
func (f *Filter) answers() (most int) {
	waiting := 0
	for _, s := range f.steps {
		switch traceTest(s.Test) {
		case traceTestTEST_AND, traceTestTEST_OR:
			waiting--
		case traceTestTEST_NOT:
		default:
			waiting++
		}
		most = max(most, waiting)
	}
	return most
}

// Match says whether an event may be of a packet that is asked for: what is not known of
// it may be anything. An ICMP error may also be asked for by the packet that it is about,
// inner, if that is known.
func (f *Filter) Match(e *cause.Event, inner *cause.Tuple) bool {
	if f == nil {
		return true
	}
	flags := slices.Contains([]cause.Kind{cause.Drop, cause.ICMPSent, cause.ChecksumFail}, e.Kind)
	return f.may(&e.Tuple, flags) || inner != nil && f.may(inner, false)
}

// may goes through the steps. Each bit of yes and no is an answer that may be.
func (f *Filter) may(t *cause.Tuple, flags bool) bool {
	var yes, no uint64
	for i := range f.steps {
		s := &f.steps[i]
		switch traceTest(s.Test) {
		case traceTestTEST_AND:
			yes, no = yes>>1&(yes|^uint64(1)), no>>1|no&1
		case traceTestTEST_OR:
			yes, no = yes>>1|yes&1, no>>1&(no|^uint64(1))
		case traceTestTEST_NOT:
			yes, no = yes&^1|no&1, no&^1|yes&1
		default:
			is, known := s.test(t, flags)
			yes, no = yes<<1, no<<1
			if is || !known {
				yes |= 1
			}
			if !is || !known {
				no |= 1
			}
		}
	}
	return yes&1 != 0
}

// test answers one step; known is false where the event does not say.
func (s *traceStep) test(t *cause.Tuple, flags bool) (is, known bool) {
	ip := t.EtherType == 0 || t.EtherType == unix.ETH_P_IP || t.EtherType == unix.ETH_P_IPV6
	switch traceTest(s.Test) {
	case traceTestTEST_ETHERTYPE:
		return t.EtherType == swap(s.Low), t.EtherType != 0
	case traceTestTEST_PROTOCOL:
		return t.Protocol != 0 && uint16(t.Protocol) == s.Low, t.Protocol != 0 || !ip
	case traceTestTEST_FLAGS:
		is := t.Protocol == unix.IPPROTO_TCP && uint16(t.TCPFlags)&s.Low == s.High
		return is, flags && !t.Fragment || t.Protocol != 0 && t.Protocol != unix.IPPROTO_TCP || !ip
	case traceTestTEST_SOURCE:
		return s.holds(t.Source.Addr())
	case traceTestTEST_DESTINATION:
		return s.holds(t.Destination.Addr())
	case traceTestTEST_SOURCE_PORT:
		return s.spans(t, t.Source.Port(), ip)
	}
	return s.spans(t, t.Destination.Port(), ip)
}

func (s *traceStep) holds(a netip.Addr) (is, known bool) {
	if !a.IsValid() || a.IsUnspecified() {
		return false, false
	}
	bytes := a.As16()
	for i := range s.Mask.Word {
		if binary.NativeEndian.Uint32(bytes[4*i:])&s.Mask.Word[i] != s.Address.Word[i] {
			return false, true
		}
	}
	return true, true
}

func (s *traceStep) spans(t *cause.Tuple, port uint16, ip bool) (is, known bool) {
	if port != 0 {
		return s.Low <= port && port <= s.High, true
	}
	return false, !ip || t.Protocol != 0 && !slices.Contains(withPortNumbers, t.Protocol)
}

// withPortNumbers are the protocols whose headers begin with ports, as has_ports of the
// programs says.
var withPortNumbers = []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP, unix.IPPROTO_UDPLITE, unix.IPPROTO_DCCP}
