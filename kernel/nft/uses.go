package nft

import (
	"bytes"
	"errors"
	"fmt"
	mathbits "math/bits"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
)

// Use is a rule of somebody that goes another way for a connection that is not
// tracked.
type Use struct {
	// Family, Table and Chain say where the rule is, in nft(8)'s words; of
	// iptables-legacy only Family ("ip" or "ip6") and Table are known.
	Family, Table, Chain string
	// What it does, "looks at the state of connections".
	What string
	// From and To are the packets it is about, as far as the rule says: of
	// rules that translate, To is the translated address. A prefix that is not
	// valid is any.
	From, To netip.Prefix
}

// String is `table ip filter, chain FORWARD: looks at the state of connections`.
func (u Use) String() string {
	if u.Chain == "" {
		return fmt.Sprintf("table %s %s: %s", u.Family, u.Table, u.What)
	}
	return fmt.Sprintf("table %s %s, chain %s: %s", u.Family, u.Table, u.Chain, u.What)
}

// Touches says that the rule may meet a packet from one of the ranges to one.
func (u Use) Touches(ranges []netip.Prefix) bool {
	from, to := !u.From.IsValid(), !u.To.IsValid()
	for _, r := range ranges {
		from = from || r.Overlaps(u.From)
		to = to || r.Overlaps(u.To)
	}
	return from && to
}

// Tracking is what a namespace's rules want of connection tracking.
type Tracking struct {
	// Asked says that some rule makes the kernel track connections. Without one
	// none is tracked, and no table fills.
	Asked bool
	// Uses are rules that need it; the list ends with the first that may be
	// about any packet.
	Uses []Use
}

// About returns a rule that may meet a packet from one of the ranges to one, and needs it
// tracked.
func (t Tracking) About(ranges []netip.Prefix) (Use, bool) {
	for _, use := range t.Uses {
		if use.Touches(ranges) {
			return use, true
		}
	}
	return Use{}, false
}

// mostUses is when rules are not told apart any more.
const mostUses = 1000

// Tracking reads the rules of everybody. Not a use are rules that only look for
// invalid packets, for what is not tracked is not invalid, and those that
// translate the source on the way out, for what is not tracked keeps its own.
//
// It stops at the first use that may be about any packet; otherwise it takes
// about five microseconds a rule, and memory that does not grow with them. Rules
// that nobody changed since the last call are not read again.
func (n *Net) Tracking() (Tracking, error) {
	legacy, err := n.legacy()
	if err != nil {
		return Tracking{}, err
	}
	if len(legacy) > 0 {
		return Tracking{true, legacy}, nil
	}
	generation, err := n.now()
	var absent *need.Feature
	if errors.As(err, &absent) {
		return Tracking{}, nil // then nobody has rules there
	}
	if err != nil {
		return Tracking{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.rules.at(generation, func() (rules Tracking, err error) {
		for range 5 {
			if rules, err = n.readRules(); !errors.Is(err, errChanged) {
				break
			}
		}
		if err != nil {
			err = fmt.Errorf("read the rules of nftables: %w", err)
		}
		return rules, err
	})
}

func (n *Net) readRules() (Tracking, error) {
	s, err := n.dial(0)
	if err != nil {
		return Tracking{}, err
	}
	defer s.close()
	asleep, err := s.dormant()
	if err != nil {
		return Tracking{}, err
	}
	var t Tracking
	for m, err := range s.ask(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, unix.AF_UNSPEC, nil) {
		if err != nil {
			return t, err
		}
		r := reading{tracking: &t, family: m.family, header: m.family}
		if r.rule(m.attributes, asleep); r.final {
			break
		}
	}
	return t, nil
}

// dormant lists the tables that are switched off, and ours.
func (s *socket) dormant() (map[tableKey]bool, error) {
	asleep := map[tableKey]bool{{familyInet, Table}: true}
	for m, err := range s.ask(unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP, unix.AF_UNSPEC, nil) {
		if err != nil {
			return nil, err
		}
		if numberOf(m.attributes, unix.NFTA_TABLE_FLAGS)&unix.NFT_TABLE_F_DORMANT != 0 {
			asleep[tableKey{m.family, textOf(m.attributes, unix.NFTA_TABLE_NAME)}] = true
		}
	}
	return asleep, nil
}

// tableKey names a table.
type tableKey struct {
	family byte
	name   string
}

// familyNames are nft(8)'s words for NFPROTO_*.
var familyNames = map[byte]string{familyInet: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_ARP: "arp",
	unix.NFPROTO_NETDEV: "netdev", unix.NFPROTO_BRIDGE: "bridge", unix.NFPROTO_IPV6: "ip6"}

// reading is one rule being read, expression by expression.
type reading struct {
	tracking *Tracking
	// family is the table's, header that of the packets, as far as it is known.
	family, header byte
	registers      [16]register // of four bytes each
	elsewhere      register     // what is not among them
	from, to       netip.Prefix
	what           string       // why it is a use; "" while it is none
	translated     netip.Prefix // what destinations become
	final          bool         // it may be about any packet
}

// register is what is known to be in one. Its bytes are those of the message.
type register struct {
	what  content
	value []byte // of a constant
	mask  []byte
	// width is the number of bytes loaded of an address, which may be of IPv6.
	width int
	ip6   bool
}

type content int

const (
	unknown content = iota
	constant
	protocol // NFPROTO_*
	source   // the packet's source address, or its first bytes
	target   // its destination
	state    // of its connection
)

// What rules do with tracking.
const (
	looksAtState = "looks at the state of connections"
	translates   = "translates destinations"
	marks        = "keeps something with connections"
	counts       = "counts connections"
)

// rule reads one rule and notes whether it is a use.
func (r *reading) rule(raw []byte, asleep map[tableKey]bool) {
	table := find(raw, unix.NFTA_RULE_TABLE)
	if asleep[tableKey{r.family, string(trim(table))}] {
		return
	}
	for _, e := range listed(find(raw, unix.NFTA_RULE_EXPRESSIONS)) {
		name := trim(find(e.value, unix.NFTA_EXPR_NAME))
		r.expression(name, find(e.value, unix.NFTA_EXPR_DATA))
	}
	for _, left := range r.registers {
		if left.what == state { // loaded, and judged by nothing that is known
			r.use(looksAtState)
		}
	}
	if r.what == "" {
		return
	}
	use := Use{familyNames[r.family], string(trim(table)), textOf(raw, unix.NFTA_RULE_CHAIN), r.what, r.from, r.to}
	if r.what == translates {
		use.To = r.translated
	}
	if len(r.tracking.Uses) >= mostUses {
		use.From, use.To = netip.Prefix{}, netip.Prefix{}
	}
	r.final = !use.From.IsValid() && !use.To.IsValid()
	r.tracking.Uses = append(r.tracking.Uses, use)
}

// use notes that the rule is one. One that translates does so to packets that
// are not yet between the ranges, whatever else it looks at.
func (r *reading) use(what string) {
	r.tracking.Asked = true
	if r.what == "" || what == translates {
		r.what = what
	}
}

// expression notes what one expression does; those that have nothing to do with
// connections or addresses leave all as it is.
func (r *reading) expression(name, data []byte) {
	switch string(name) {
	case "payload":
		r.load(data)
	case "meta":
		if numberOf(data, unix.NFTA_META_KEY) == unix.NFT_META_NFPROTO {
			r.set(data, unix.NFTA_META_DREG, register{what: protocol})
		} else {
			r.set(data, unix.NFTA_META_DREG, register{})
		}
	case "immediate":
		value := find(find(data, unix.NFTA_IMMEDIATE_DATA), unix.NFTA_DATA_VALUE)
		r.set(data, unix.NFTA_IMMEDIATE_DREG, register{what: constant, value: value})
	case "bitwise":
		r.mask(data)
	case "cmp":
		r.compare(data)
	case "lookup":
		if at := r.register(data, unix.NFTA_LOOKUP_SREG); at.what == state {
			r.use(looksAtState)
		}
		r.set(data, unix.NFTA_LOOKUP_DREG, register{})
	case "ct":
		r.connection(data)
	case "nat":
		r.translation(data)
	case "redir":
		r.use(translates)
	case "masq", "flow_offload":
		r.tracking.Asked = true
	case "connlimit":
		r.use(counts)
	case "synproxy":
		r.use(looksAtState)
	case "objref":
		r.reference(data)
	case "dynset":
		if bytes.Contains(data, []byte("connlimit\x00")) {
			r.use(counts)
		}
	case "match":
		r.match(textOf(data, unix.NFTA_MATCH_NAME), numberOf(data, unix.NFTA_MATCH_REV), find(data, unix.NFTA_MATCH_INFO))
	case "target":
		r.jump(textOf(data, unix.NFTA_TARGET_NAME), numberOf(data, unix.NFTA_TARGET_REV), find(data, unix.NFTA_TARGET_INFO))
	}
}

// place is a register's place among those of four bytes: 1 to 4 are sixteen
// bytes each over the same memory.
func place(number uint32) int {
	switch {
	case number >= unix.NFT_REG_1 && number <= unix.NFT_REG_4:
		return int(number-unix.NFT_REG_1) * 4
	case number >= unix.NFT_REG32_00 && number <= unix.NFT_REG32_15:
		return int(number - unix.NFT_REG32_00)
	}
	return -1
}

func (r *reading) register(data []byte, attribute uint16) *register {
	if at := place(numberOf(data, attribute)); at >= 0 {
		return &r.registers[at]
	}
	r.elsewhere = register{}
	return &r.elsewhere
}

// set notes what an expression writes into the register that attribute names.
func (r *reading) set(data []byte, attribute uint16, value register) {
	if find(data, attribute) != nil {
		at := r.register(data, attribute)
		if at.what == state {
			r.use(looksAtState)
		}
		*at = value
	}
}

// load notes that an address is read from the packet's header.
func (r *reading) load(data []byte) {
	offset, length := numberOf(data, unix.NFTA_PAYLOAD_OFFSET), numberOf(data, unix.NFTA_PAYLOAD_LEN)
	loaded := register{width: int(length), ip6: r.header == unix.NFPROTO_IPV6}
	if numberOf(data, unix.NFTA_PAYLOAD_BASE) == unix.NFT_PAYLOAD_NETWORK_HEADER {
		for _, f := range families {
			switch {
			case f.number != r.header || length > f.length:
			case offset == f.source:
				loaded.what = source
			case offset == f.target:
				loaded.what = target
			}
		}
	}
	r.set(data, unix.NFTA_PAYLOAD_DREG, loaded)
}

func (r *reading) mask(data []byte) {
	from := *r.register(data, unix.NFTA_BITWISE_SREG)
	mask := find(find(data, unix.NFTA_BITWISE_MASK), unix.NFTA_DATA_VALUE)
	xor := find(find(data, unix.NFTA_BITWISE_XOR), unix.NFTA_DATA_VALUE)
	if mask == nil || len(bytes.Trim(xor, "\x00")) > 0 || from.mask != nil {
		if from.what == state {
			r.use(looksAtState)
		}
		from = register{}
	}
	from.mask = mask
	*r.register(data, unix.NFTA_BITWISE_SREG) = register{}
	*r.register(data, unix.NFTA_BITWISE_DREG) = from
}

func (r *reading) compare(data []byte) {
	at := r.register(data, unix.NFTA_CMP_SREG)
	value := find(find(data, unix.NFTA_CMP_DATA), unix.NFTA_DATA_VALUE)
	operation := numberOf(data, unix.NFTA_CMP_OP)
	equal := operation == unix.NFT_CMP_EQ
	switch at.what {
	case state:
		// `ct state invalid` is "the bits of the mask are not all zero".
		zero := len(bytes.Trim(value, "\x00")) == 0
		if !isInvalid(at.mask) || operation != unix.NFT_CMP_NEQ || !zero {
			r.use(looksAtState)
		}
		at.what = unknown // judged
	case protocol:
		if equal && len(value) == 1 {
			r.header = value[0]
		}
	case source:
		if p, ok := prefixIn(*at, value); ok && equal {
			r.from = p
		}
	case target:
		if p, ok := prefixIn(*at, value); ok && equal {
			r.to = p
		}
	}
}

// invalidBit is the state of a packet that belongs to nothing, in nft(8) and
// xt_conntrack alike (NF_CT_STATE_INVALID_BIT, XT_CONNTRACK_STATE_INVALID).
const invalidBit = 1

func isInvalid(mask []byte) bool { return len(mask) == 4 && host.Uint32(mask) == invalidBit }

// prefixIn is the prefix whose addresses begin with value under the register's
// mask.
func prefixIn(at register, value []byte) (netip.Prefix, bool) {
	if len(value) != at.width || at.mask != nil && len(at.mask) != at.width {
		return netip.Prefix{}, false
	}
	bits := 8 * at.width
	for i := range at.mask {
		if ones := leadingOnes(at.mask[i]); ones < 8 {
			bits = 8*i + ones
			if at.mask[i]<<ones != 0 || len(bytes.Trim(at.mask[i+1:], "\x00")) > 0 {
				return netip.Prefix{}, false
			}
			break
		}
	}
	var whole [16]byte
	copy(whole[:], value)
	address := netip.AddrFrom16(whole)
	if !at.ip6 {
		address = netip.AddrFrom4([4]byte(whole[:4]))
	}
	return netip.PrefixFrom(address, bits).Masked(), true
}

func leadingOnes(b byte) int { return mathbits.LeadingZeros8(^b) }

// connection is an expression that reads or writes something of the connection.
func (r *reading) connection(data []byte) {
	r.tracking.Asked = true
	switch {
	case find(data, unix.NFTA_CT_SREG) != nil:
		r.use(marks)
	case numberOf(data, unix.NFTA_CT_KEY) == unix.NFT_CT_STATE:
		r.set(data, unix.NFTA_CT_DREG, register{what: state})
	default:
		r.use(looksAtState)
	}
}

func (r *reading) translation(data []byte) {
	r.tracking.Asked = true
	if numberOf(data, unix.NFTA_NAT_TYPE) == unix.NFT_NAT_SNAT {
		return
	}
	r.use(translates)
	least, most := numberOf(data, unix.NFTA_NAT_REG_ADDR_MIN), numberOf(data, unix.NFTA_NAT_REG_ADDR_MAX)
	to := r.register(data, unix.NFTA_NAT_REG_ADDR_MIN)
	if to.what == constant && (most == 0 || most == least) {
		r.translated = onlyAddress(to.value)
	}
}

// onlyAddress is the range of one address; not valid if it is none.
func onlyAddress(raw []byte) netip.Prefix {
	a, ok := netip.AddrFromSlice(raw)
	if !ok {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, a.BitLen())
}

// reference is a named object; those of tracking are helpers, limits, timeouts
// and expectations. Of objects that a map chooses nothing is known.
func (r *reading) reference(data []byte) {
	const helper, limit, timeout, expectation, synproxy = 3, 5, 7, 9, 10 // NFT_OBJECT_*
	switch kind := numberOf(data, unix.NFTA_OBJREF_IMM_TYPE); {
	case find(data, unix.NFTA_OBJREF_SET_NAME) != nil, kind == helper, kind == limit, kind == timeout, kind == expectation, kind == synproxy:
		r.use(marks)
	}
}

// conntrackMatch is what xt_conntrack asks for, as far as it is about states.
type conntrackMatch struct {
	states     uint32
	onlyStates bool
	inverted   uint16 // byState, and what else is the other way round
}

// byState is XT_CONNTRACK_STATE.
const byState = 1

// conntrackOf reads struct xt_conntrack_mtinfo1 to 3 of linux/netfilter/xt_conntrack.h:
// three sets of flags after ten addresses, two times and five ports.
func conntrackOf(revision uint32, info []byte) (m conntrackMatch, ok bool) {
	const flagsAt, invertedAt, statesAt, calledState = 146, 148, 150, 1 << 13
	if revision < 1 || len(info) < statesAt+2 {
		return m, false
	}
	m.states = uint32(info[statesAt])
	if revision > 1 {
		m.states = uint32(host.Uint16(info[statesAt:]))
	}
	m.onlyStates = host.Uint16(info[flagsAt:])&^calledState == byState
	m.inverted = host.Uint16(info[invertedAt:])
	return m, true
}

// match is one of iptables-nft: its name, revision and C struct.
func (r *reading) match(name string, revision uint32, info []byte) {
	switch name {
	case "conntrack":
		r.tracking.Asked = true
		if asked, ok := conntrackOf(revision, info); !ok || !asked.onlyStates || asked.inverted != 0 || asked.states != invalidBit {
			r.use(looksAtState)
		}
	case "state":
		r.tracking.Asked = true
		if !isInvalid(info[:min(4, len(info))]) {
			r.use(looksAtState)
		}
	case "connbytes", "connlabel", "connmark", "helper", "cluster":
		r.use(looksAtState)
	case "connlimit":
		r.use(counts)
	}
}

// jump is a target of iptables-nft: its name, revision and C struct.
func (r *reading) jump(name string, revision uint32, info []byte) {
	switch name {
	case "SNAT", "MASQUERADE":
		r.tracking.Asked = true
	case "DNAT":
		r.use(translates)
		r.translated = r.dnatTo(revision, info)
	case "REDIRECT", "NETMAP":
		r.use(translates)
	case "CONNMARK", "CONNSECMARK", "CLUSTERIP":
		r.use(marks)
	case "SYNPROXY":
		r.use(looksAtState)
	case "CT": // struct xt_ct_target_info: flags first
		const notrack = 1
		if len(info) < 2 || host.Uint16(info)&notrack == 0 {
			r.use(marks)
		}
	}
}

// dnatTo is where a DNAT of iptables-nft leads: struct nf_nat_range2 or
// nf_nat_range of linux/netfilter/nf_nat.h, flags before two addresses.
func (r *reading) dnatTo(revision uint32, info []byte) netip.Prefix {
	const byAddress, leastAt, mostAt, end = 1, 4, 20, 36
	if revision == 0 || len(info) < end || host.Uint32(info)&byAddress == 0 || !bytes.Equal(info[leastAt:mostAt], info[mostAt:end]) {
		return netip.Prefix{}
	}
	if r.family == unix.NFPROTO_IPV4 {
		return onlyAddress(info[leastAt : leastAt+4])
	}
	return onlyAddress(info[leastAt:mostAt])
}
