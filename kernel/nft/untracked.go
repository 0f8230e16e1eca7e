package nft

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
)

const (
	// Table is the name of this package's one table, of the family inet.
	Table = "millrace"

	familyInet = 1 // NFPROTO_INET
	// priorityRaw is before connection tracking (-200) and after fragments were
	// put together (-400), so that rules of others that look at ports go on to
	// find them.
	priorityRaw = -300
	comment     = "connections between these ranges are not tracked; remove: millrace remove"
)

// errOthers says that the table holds what this package does not write.
var errOthers = errors.New("the table is not as it was written")

// Untracked returns the ranges between which connections are not tracked, in the
// order of Merge; none if the table is not there. With whole false the table is
// there but not as SetUntracked leaves it.
func (n *Net) Untracked() (ranges []netip.Prefix, whole bool, err error) {
	generation, err := n.now()
	if err != nil {
		return nil, false, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	table, err := n.table.at(generation, n.readTable)
	if err != nil {
		return nil, false, fmt.Errorf("read table inet %s: %w", Table, err)
	}
	return table.ranges, table.whole, nil
}

// ours is what is in our table.
type ours struct {
	ranges []netip.Prefix
	whole  bool
}

func (n *Net) readTable() (table ours, err error) {
	s, err := n.dial(0)
	if err != nil {
		return table, err
	}
	defer s.close()
	_, err = s.object(unix.NFT_MSG_GETTABLE, attributes(nil).text(unix.NFTA_TABLE_NAME, Table))
	if errors.Is(err, unix.ENOENT) {
		return ours{whole: true}, nil
	}
	for _, f := range families {
		if err == nil {
			var found []netip.Prefix
			found, err = s.ranges(f)
			table.ranges = append(table.ranges, found...)
		}
	}
	if err == nil {
		err = s.verify()
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, errOthers) {
		return table, nil
	}
	table.whole = err == nil
	return table, err
}

// SetUntracked makes connections between any two of the ranges be tracked no
// longer, and all others as before, in one transaction. Without ranges the table
// goes. Errors are *need.Feature where the kernel cannot do it.
func (n *Net) SetUntracked(ranges []netip.Prefix) error {
	s, err := n.dial(0)
	if err != nil {
		return err
	}
	defer s.close()
	name := attributes(nil).text(unix.NFTA_TABLE_NAME, Table)
	// Adding what may be there already, so that it can be deleted.
	steps := []step{{message: unix.NFT_MSG_NEWTABLE, flags: unix.NLM_F_CREATE, attributes: name}, {message: unix.NFT_MSG_DELTABLE, attributes: name}}
	if len(ranges) > 0 {
		steps = append(steps, table(Merge(ranges))...)
	}
	err = s.commit(steps)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return &need.Feature{Act: "write table inet " + Table, Feature: fmt.Sprintf("part of nftables that it takes (%v)", err),
			Since: "CONFIG_NF_TABLES_INET and CONFIG_NFT_CT"}
	}
	if err != nil {
		return fmt.Errorf("write table inet %s: %w", Table, err)
	}
	return nil
}

// family is what differs between IPv4 and IPv6.
type family struct {
	set, inner     string // of ranges, for headers and for packets inside others
	number         byte   // NFPROTO_*
	keyType        uint32 // nft(8)'s number for how to print an address
	length         uint32 // of an address, in bytes
	source, target uint32 // offsets of the addresses in the header
	icmp           byte
	// errors are the types of ICMP messages that hold the packet they are about
	// (RFC 792; RFC 4443, 2.1), from and to.
	errors [][2]byte
}

var families = []family{
	{"pods4", "inner4", unix.NFPROTO_IPV4, 7, 4, 12, 16, unix.IPPROTO_ICMP, [][2]byte{{3, 5}, {11, 12}}},
	{"pods6", "inner6", unix.NFPROTO_IPV6, 8, 16, 8, 24, unix.IPPROTO_ICMPV6, [][2]byte{{0, 127}}},
}

func (f family) is(p netip.Prefix) bool { return uint32(p.Addr().BitLen()) == 8*f.length }

// table are the steps that write the table for merged ranges.
func table(ranges []netip.Prefix) []step {
	text := append([]byte{0, byte(len(comment) + 1)}, comment...) // type comment, length
	steps := []step{{message: unix.NFT_MSG_NEWTABLE, flags: unix.NLM_F_CREATE, attributes: attributes(nil).
		text(unix.NFTA_TABLE_NAME, Table).put(tableUserdata, append(text, 0))}}
	id := uint32(0)
	for _, f := range families {
		for name, set := range f.newSets() {
			id++
			steps = append(steps, step{message: unix.NFT_MSG_NEWSET, flags: unix.NLM_F_CREATE, attributes: set.number(unix.NFTA_SET_ID, id)})
			for _, list := range f.newElements(name, ranges) {
				steps = append(steps, step{message: unix.NFT_MSG_NEWSETELEM, flags: unix.NLM_F_CREATE, attributes: list})
			}
		}
	}
	for _, c := range chains {
		steps = append(steps, step{message: unix.NFT_MSG_NEWCHAIN, flags: unix.NLM_F_CREATE, attributes: c.newChain()})
		for _, rule := range c.newRules() {
			steps = append(steps, step{message: unix.NFT_MSG_NEWRULE, flags: unix.NLM_F_CREATE | unix.NLM_F_APPEND, attributes: rule})
		}
	}
	return steps
}

// chain is one of the table's: packets that arrive, and those of this host.
type chain struct {
	name string
	hook uint32
}

var chains = []chain{{"prerouting", unix.NF_INET_PRE_ROUTING}, {"output", unix.NF_INET_LOCAL_OUT}}

func (c chain) newChain() attributes {
	const accept = 1
	priority := int32(priorityRaw)
	return attributes(nil).
		text(unix.NFTA_CHAIN_TABLE, Table).
		text(unix.NFTA_CHAIN_NAME, c.name).
		nest(unix.NFTA_CHAIN_HOOK, attributes(nil).
			number(unix.NFTA_HOOK_HOOKNUM, c.hook).
			number(unix.NFTA_HOOK_PRIORITY, uint32(priority))).
		number(unix.NFTA_CHAIN_POLICY, accept).
		text(unix.NFTA_CHAIN_TYPE, "filter")
}

func (c chain) newRules() (rules []attributes) {
	add := func(expressions attributes) {
		rules = append(rules, attributes(nil).
			text(unix.NFTA_RULE_TABLE, Table).
			text(unix.NFTA_RULE_CHAIN, c.name).
			nest(unix.NFTA_RULE_EXPRESSIONS, expressions))
	}
	for _, f := range families {
		add(f.packets())
		for _, kinds := range f.errors {
			add(f.errorsAbout(kinds))
		}
	}
	return rules
}

// tableUserdata is NFTA_TABLE_USERDATA (Linux 5.10).
const tableUserdata = 6

// packets is `ip saddr @pods4 ip daddr @pods4 notrack accept`.
func (f family) packets() attributes {
	return attributes(nil).
		meta(unix.NFT_META_NFPROTO).equals(f.number).
		payload(unix.NFT_PAYLOAD_NETWORK_HEADER, f.source, f.length).in(f.set).
		payload(unix.NFT_PAYLOAD_NETWORK_HEADER, f.target, f.length).in(f.set).
		untrack()
}

// errorsAbout is the same for ICMP errors, by the addresses of the packet that
// they are about: such an error comes from any router on the way, and where it
// is about a connection that is not tracked it would count as invalid.
func (f family) errorsAbout(kinds [2]byte) attributes {
	return attributes(nil).
		meta(unix.NFT_META_NFPROTO).equals(f.number).
		meta(unix.NFT_META_L4PROTO).equals(f.icmp).
		payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 1).between(kinds[0], kinds[1]).
		payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, icmpHeader+f.source, f.length).in(f.inner).
		payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, icmpHeader+f.target, f.length).in(f.inner).
		untrack()
}

// icmpHeader is the length of an ICMP error's own header.
const icmpHeader = 8

// newSets are the family's two sets of the same ranges: one of addresses and one
// of bytes of the transport header, `typeof @th,160,32`. The kernel would do with
// one, but nft(8) could not read the rules that it lists: a saved ruleset would
// not load.
func (f family) newSets() map[string]attributes {
	set := func(name string, keyType uint32) attributes {
		return attributes(nil).
			text(unix.NFTA_SET_TABLE, Table).
			text(unix.NFTA_SET_NAME, name).
			number(unix.NFTA_SET_FLAGS, unix.NFT_SET_INTERVAL).
			number(unix.NFTA_SET_KEY_TYPE, keyType).
			number(unix.NFTA_SET_KEY_LEN, f.length)
	}
	const integer = 4
	return map[string]attributes{
		f.set:   set(f.set, f.keyType),
		f.inner: set(f.inner, integer).put(unix.NFTA_SET_USERDATA, f.typeOfInner()),
	}
}

// typeOfInner is what libnftnl(3) keeps with a set for nft(8): the order of a
// key's bytes, and the expression that it is a value of.
func (f family) typeOfInner() []byte {
	const bigEndian, payload, transport = 2, 7, 3
	note := func(kind byte, value []byte) []byte { return append([]byte{kind, byte(len(value))}, value...) }
	number := func(kind byte, n uint32) []byte { return note(kind, host.AppendUint32(nil, n)) }
	expression := slices.Concat(number(0, 0), number(1, 4), number(2, transport),
		number(3, 8*(icmpHeader+f.source)), number(4, 8*f.length))
	return append(number(0, bigEndian), note(3, append(number(0, payload), note(1, expression)...))...)
}

// newElements adds the ranges of the family: each is where it begins and where
// the next address that is not in it is, unless there is none.
func (f family) newElements(set string, ranges []netip.Prefix) (lists []attributes) {
	const most = 500 // ranges in a message; an attribute ends at 64 KiB
	ranges = slices.DeleteFunc(slices.Clone(ranges), func(p netip.Prefix) bool { return !f.is(p) })
	for some := range slices.Chunk(ranges, most) {
		var list attributes
		for _, p := range some {
			list = list.nest(unix.NFTA_LIST_ELEM, element(p.Addr()))
			if end := last(p).Next(); end.IsValid() {
				list = list.nest(unix.NFTA_LIST_ELEM, element(end).number(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END))
			}
		}
		lists = append(lists, attributes(nil).
			text(unix.NFTA_SET_ELEM_LIST_TABLE, Table).
			text(unix.NFTA_SET_ELEM_LIST_SET, set).
			nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, list))
	}
	return lists
}

func element(a netip.Addr) attributes {
	return attributes(nil).nest(unix.NFTA_SET_ELEM_KEY, attributes(nil).put(unix.NFTA_DATA_VALUE, a.AsSlice()))
}

// Expressions work on register 1.

func (a attributes) expression(name string, data attributes) attributes {
	e := attributes(nil).text(unix.NFTA_EXPR_NAME, name)
	if data != nil {
		e = e.nest(unix.NFTA_EXPR_DATA, data)
	}
	return a.nest(unix.NFTA_LIST_ELEM, e)
}

func (a attributes) meta(key uint32) attributes {
	return a.expression("meta", attributes(nil).
		number(unix.NFTA_META_KEY, key).
		number(unix.NFTA_META_DREG, unix.NFT_REG_1))
}

func (a attributes) payload(base, offset, length uint32) attributes {
	return a.expression("payload", attributes(nil).
		number(unix.NFTA_PAYLOAD_DREG, unix.NFT_REG_1).
		number(unix.NFTA_PAYLOAD_BASE, base).
		number(unix.NFTA_PAYLOAD_OFFSET, offset).
		number(unix.NFTA_PAYLOAD_LEN, length))
}

// untrack ends the rule, and the chain: the verdict is of this chain alone.
func (a attributes) untrack() attributes {
	const accept = 1
	return a.expression("notrack", nil).expression("immediate", attributes(nil).
		number(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT).
		nest(unix.NFTA_IMMEDIATE_DATA, attributes(nil).
			nest(unix.NFTA_DATA_VERDICT, attributes(nil).number(unix.NFTA_VERDICT_CODE, accept))))
}

func (a attributes) equals(value byte) attributes {
	return a.expression("cmp", attributes(nil).
		number(unix.NFTA_CMP_SREG, unix.NFT_REG_1).
		number(unix.NFTA_CMP_OP, unix.NFT_CMP_EQ).
		nest(unix.NFTA_CMP_DATA, attributes(nil).put(unix.NFTA_DATA_VALUE, []byte{value})))
}

func (a attributes) between(from, to byte) attributes {
	return a.expression("range", attributes(nil).
		number(unix.NFTA_RANGE_SREG, unix.NFT_REG_1).
		number(unix.NFTA_RANGE_OP, unix.NFT_RANGE_EQ).
		nest(unix.NFTA_RANGE_FROM_DATA, attributes(nil).put(unix.NFTA_DATA_VALUE, []byte{from})).
		nest(unix.NFTA_RANGE_TO_DATA, attributes(nil).put(unix.NFTA_DATA_VALUE, []byte{to})))
}

func (a attributes) in(set string) attributes {
	return a.expression("lookup", attributes(nil).
		text(unix.NFTA_LOOKUP_SET, set).
		number(unix.NFTA_LOOKUP_SREG, unix.NFT_REG_1))
}

// object asks for one object of the family inet by what names it.
func (s *socket) object(message uint16, name attributes) (found []byte, err error) {
	for m, err := range s.ask(message, 0, familyInet, name) {
		if err != nil {
			return nil, err
		}
		found = bytes.Clone(m.attributes)
	}
	return found, nil
}

// ranges reads the ranges of one family; its sets must hold the same.
func (s *socket) ranges(f family) ([]netip.Prefix, error) {
	found, err := s.elements(f.set)
	if err != nil {
		return nil, err
	}
	inner, err := s.elements(f.inner)
	if err == nil && !slices.Equal(found, inner) {
		err = errOthers
	}
	return found, err
}

// elements reads a set of ranges. Intervals that are no range of a prefix are
// errOthers.
func (s *socket) elements(set string) ([]netip.Prefix, error) {
	type edge struct {
		at  netip.Addr
		end bool
	}
	var edges []edge
	name := attributes(nil).text(unix.NFTA_SET_ELEM_LIST_TABLE, Table).text(unix.NFTA_SET_ELEM_LIST_SET, set)
	for m, err := range s.ask(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, familyInet, name) {
		if err != nil {
			return nil, err
		}
		for _, listed := range listed(find(m.attributes, unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			raw := listed.value
			at, ok := netip.AddrFromSlice(find(find(raw, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE))
			if !ok {
				return nil, errOthers
			}
			edges = append(edges, edge{at, numberOf(raw, unix.NFTA_SET_ELEM_FLAGS)&unix.NFT_SET_ELEM_INTERVAL_END != 0})
		}
	}
	slices.SortFunc(edges, func(a, b edge) int {
		if c := a.at.Compare(b.at); c != 0 || a.end == b.end {
			return c
		}
		if a.end {
			return -1
		}
		return 1
	})
	var ranges []netip.Prefix
	for i, e := range edges {
		var end netip.Addr // not valid: to the last address
		if i+1 < len(edges) {
			end = edges[i+1].at
		}
		if e.end {
			continue
		}
		p, ok := prefixOf(e.at, end)
		if !ok {
			return nil, errOthers
		}
		ranges = append(ranges, p)
	}
	return ranges, nil
}

// verify compares what does not depend on the ranges with what is written.
func (s *socket) verify() error {
	for _, f := range families {
		for _, set := range f.newSets() {
			if err := s.compare(unix.NFT_MSG_GETSET, set); err != nil {
				return err
			}
		}
	}
	for _, c := range chains {
		if err := s.compare(unix.NFT_MSG_GETCHAIN, c.newChain()); err != nil {
			return err
		}
		rules := c.newRules()
		for m, err := range s.ask(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, familyInet, attributes(nil).
			text(unix.NFTA_RULE_TABLE, Table).text(unix.NFTA_RULE_CHAIN, c.name)) {
			if err != nil {
				return err
			}
			if len(rules) == 0 || !agrees(m.attributes, rules[0]) {
				return errOthers
			}
			rules = rules[1:]
		}
		if len(rules) > 0 {
			return errOthers
		}
	}
	return nil
}

// compare asks for the object that was written so.
func (s *socket) compare(message uint16, written attributes) error {
	found, err := s.object(message, written)
	if err == nil && !agrees(found, written) {
		err = errOthers
	}
	return err
}

// agrees says that everything that was written is in what was found, which may
// say more; what occurs several times is in the same order, and as often.
func agrees(found, written []byte) bool {
	wanted := map[uint16][]attribute{}
	for _, w := range listed(written) {
		wanted[w.kind] = append(wanted[w.kind], w)
	}
	for _, f := range listed(found) {
		w := wanted[f.kind]
		if _, known := wanted[f.kind]; !known {
			continue
		}
		if len(w) == 0 || w[0].nested && !agrees(f.value, w[0].value) || !w[0].nested && !bytes.Equal(f.value, w[0].value) {
			return false
		}
		wanted[f.kind] = w[1:]
	}
	for _, w := range wanted {
		if len(w) > 0 {
			return false
		}
	}
	return true
}
