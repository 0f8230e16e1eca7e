package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// hookNames are nft(8)'s words: of devices, and of all others.
var (
	hookNames   = []string{"prerouting", "input", "forward", "output", "postrouting", "ingress"}
	deviceHooks = []string{"ingress", "egress"}
	arpHooks    = []string{"input", "output", "forward"}
)

// everybodys reads the rules of nftables, those of iptables-nft among them.
func (n *Net) everybodys() ([]Rule, error) {
	s, err := n.dial(0)
	if err != nil {
		return nil, err
	}
	defer s.close()
	asleep, err := s.dormant()
	if err != nil {
		return nil, err
	}
	sets, err := s.chainsOf(asleep)
	if err != nil || len(sets) == 0 {
		return nil, err // without a chain there are no rules
	}
	lists := &elementLists{socket: s, named: map[setKey]*elementList{}}
	left := mostRules
	for m, err := range s.ask(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, unix.AF_UNSPEC, nil) {
		if err != nil {
			return nil, err
		}
		key := chainKey{textOf(m.attributes, unix.NFTA_RULE_TABLE), textOf(m.attributes, unix.NFTA_RULE_CHAIN)}
		set := sets[m.family]
		if left--; set == nil || set.chains[key] == nil || left < 0 {
			continue
		}
		chain := set.chains[key]
		d := decoding{family: m.family, header: m.family, table: key.table, system: set.system(key.table), lists: lists, line: &line{chain: chain, place: len(chain.lines)}}
		d.rule(m.attributes)
		chain.lines = append(chain.lines, d.line)
	}
	if err := lists.read(); err != nil {
		return nil, err
	}
	var all []Rule
	for _, family := range []byte{familyInet, unix.NFPROTO_IPV4, unix.NFPROTO_IPV6, unix.NFPROTO_ARP, unix.NFPROTO_BRIDGE, unix.NFPROTO_NETDEV} {
		if set := sets[family]; set != nil {
			set.link()
			all = append(all, set.reported()...)
		}
	}
	if left < 0 {
		return all, &tooMany{mostRules - left}
	}
	return all, nil
}

// chainsOf reads the chains of tables that are not asleep, by family.
func (s *socket) chainsOf(asleep map[tableKey]bool) (map[byte]*chainset, error) {
	sets := map[byte]*chainset{}
	for m, err := range s.ask(unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP, unix.AF_UNSPEC, nil) {
		if err != nil {
			return nil, err
		}
		key := chainKey{textOf(m.attributes, unix.NFTA_CHAIN_TABLE), textOf(m.attributes, unix.NFTA_CHAIN_NAME)}
		if asleep[tableKey{m.family, key.table}] {
			continue
		}
		if sets[m.family] == nil {
			sets[m.family] = &chainset{chains: map[chainKey]*listedChain{}, compatible: map[string]bool{}}
		}
		c := &listedChain{key: key, family: m.family}
		if hook := find(m.attributes, unix.NFTA_CHAIN_HOOK); hook != nil {
			const device = 3 // NFTA_HOOK_DEV
			c.base, c.device = true, textOf(hook, device)
			names := hookNames
			switch m.family {
			case unix.NFPROTO_NETDEV:
				names = deviceHooks
			case unix.NFPROTO_ARP:
				names = arpHooks
			}
			if number := int(numberOf(hook, unix.NFTA_HOOK_HOOKNUM)); number < len(names) {
				c.hook = names[number]
			}
			c.drops = find(m.attributes, unix.NFTA_CHAIN_POLICY) != nil && numberOf(m.attributes, unix.NFTA_CHAIN_POLICY) == 0
			if ofIPTables(m.family, key) {
				sets[m.family].compatible[key.table] = true
			}
			c.policy = Rule{System: sets[m.family].system(key.table), Family: familyNames[m.family], Table: key.table, Chain: key.chain,
				Policy: true, Verdict: "drop", Text: "policy drop"}
			if counters := find(m.attributes, unix.NFTA_CHAIN_COUNTERS); counters != nil {
				c.policy.HasCounter, c.policy.Packets = false, longOf(counters, unix.NFTA_COUNTER_PACKETS)
			}
		}
		sets[m.family].chains[key] = c
	}
	return sets, nil
}

func longOf(raw []byte, kind uint16) uint64 {
	if value := find(raw, kind); len(value) == 8 {
		return binary.BigEndian.Uint64(value)
	}
	return 0
}

// ofIPTables says that a base chain is one of iptables-nft: it has a name of theirs.
func ofIPTables(family byte, key chainKey) bool {
	ip := family == unix.NFPROTO_IPV4 || family == unix.NFPROTO_IPV6
	return ip && slices.Contains(iptables, key.table) && key.chain == strings.ToUpper(key.chain)
}

// system is whose a table is: of iptables-nft if it has their chains.
func (s *chainset) system(table string) string {
	if s.compatible[table] {
		return "iptables-nft"
	}
	return "nftables"
}

// decoding is one rule being read: conditions are collected, and what it says.
type decoding struct {
	family, header byte
	proto          string // whose ports are looked at, in words
	table          string
	lists          *elementLists
	line           *line
	words          []string
	// described is what registers hold, in words; constants are what immediates wrote.
	described [16]string
	constants [16][]byte
	states    []string
	masks     [16]uint32
	ct        [16]bool
	counter   bool
	packets   uint64
	rate      bool
	verdict   string
	comment   string
	system    string
}

// rule reads a whole rule.
func (d *decoding) rule(raw []byte) {
	for _, e := range listed(find(raw, unix.NFTA_RULE_EXPRESSIONS)) {
		d.expression(string(trim(find(e.value, unix.NFTA_EXPR_NAME))), find(e.value, unix.NFTA_EXPR_DATA))
	}
	const commentOf = 0 // NFTNL_UDATA_RULE_COMMENT
	for notes := find(raw, unix.NFTA_RULE_USERDATA); len(notes) >= 2 && len(notes) >= 2+int(notes[1]); notes = notes[2+int(notes[1]):] {
		if notes[0] == commentOf {
			d.comment = string(trim(notes[2 : 2+int(notes[1])]))
		}
	}
	if d.verdict == "" {
		return
	}
	key := d.line.chain.key
	d.line.report = &Rule{
		System: d.system, Family: familyNames[d.family], Table: key.table, Chain: key.chain,
		Handle: longOf(raw, unix.NFTA_RULE_HANDLE), Verdict: d.verdict, Text: strings.Join(d.words, " "), Comment: d.comment,
		States: d.states, HasCounter: d.counter, Packets: d.packets, Rate: d.rate,
	}
}

func (d *decoding) add(c condition) {
	d.line.conditions = append(d.line.conditions, c)
	d.counter = false // it counted before
}

// unknown is a condition that is not understood.
func (d *decoding) unknown(word string) {
	d.say(word)
	d.add(func(*packet, *values) Fit { return Unknown })
}

func (d *decoding) say(words ...string) { d.words = append(d.words, words...) }

// at is a register's place, inside the array.
func at(data []byte, kind uint16) int { return min(max(place(numberOf(data, kind)), 0), 15) }

func (d *decoding) expression(name string, data []byte) {
	switch name {
	case "payload":
		d.payload(data)
	case "meta":
		d.meta(data)
	case "ct":
		d.tracked(data)
	case "cmp":
		d.compare(data)
	case "bitwise":
		d.bitwise(data)
	case "range":
		d.between(data)
	case "lookup":
		d.lookup(data)
	case "immediate":
		d.immediate(data)
	case "counter":
		d.counter, d.packets = true, longOf(data, unix.NFTA_COUNTER_PACKETS)
		d.say("counter")
	case "reject":
		d.reject(numberOf(data, unix.NFTA_REJECT_TYPE))
	case "queue":
		d.finish("queue", "queue")
	case "nat":
		kind := "dnat"
		if numberOf(data, unix.NFTA_NAT_TYPE) == unix.NFT_NAT_SNAT {
			kind = "snat"
		}
		d.finish(kind, kind+d.natRange(data))
	case "masq":
		d.finish("masquerade", "masquerade")
	case "redir":
		d.finish("redirect", "redirect")
	case "synproxy":
		d.finish("synproxy", "synproxy")
	case "limit", "quota", "connlimit", "last", "numgen":
		d.chance(name)
	case "match":
		d.match(textOf(data, unix.NFTA_MATCH_NAME), numberOf(data, unix.NFTA_MATCH_REV), find(data, unix.NFTA_MATCH_INFO))
	case "target":
		d.target(textOf(data, unix.NFTA_TARGET_NAME), find(data, unix.NFTA_TARGET_INFO))
	case "log", "notrack", "dup", "objref":
		d.say(name)
	case "dynset":
		d.dynamic(data)
	default: // fib, rt, socket, osf, hash, exthdr ...: what they load or find is not known
		d.load(name)
	}
}

// load notes an expression whose result is not known: most name their register second or
// first, so all registers are forgotten.
func (d *decoding) load(name string) {
	d.line.conditions = append(d.line.conditions, func(_ *packet, r *values) Fit { *r = values{}; return Yes })
	for i := range d.described {
		d.described[i] = name
	}
	d.ct, d.constants = [16]bool{}, [16][]byte{}
	if name == "osf" || name == "xfrm" {
		d.unknown(name)
	}
}

func (d *decoding) chance(name string) {
	d.rate = d.rate || name != "last"
	switch name {
	case "numgen":
		d.load(name)
	case "last":
	default:
		d.unknown(name)
	}
}

// dynamic adds to a set; with a limit in it, it is a condition.
func (d *decoding) dynamic(data []byte) {
	d.say("update", "@"+textOf(data, unix.NFTA_DYNSET_SET_NAME))
	for _, name := range []string{"limit\x00", "connlimit\x00", "quota\x00"} {
		if bytes.Contains(data, []byte(name)) {
			d.rate = true
			d.unknown(strings.TrimSuffix(name, "\x00"))
			return
		}
	}
}

func (d *decoding) finish(verdict, text string) {
	d.verdict = verdict
	d.line.ends = true
	d.say(text)
}

func (d *decoding) reject(kind uint32) {
	const reset = 1 // NFT_REJECT_TCP_RST
	if kind == reset {
		d.finish("reject with tcp reset", "reject with tcp reset")
		return
	}
	d.finish("reject", "reject")
}

// natRange is what an address is translated to.
func (d *decoding) natRange(data []byte) (text string) {
	if find(data, unix.NFTA_NAT_REG_ADDR_MIN) != nil {
		if a, ok := netip.AddrFromSlice(d.constants[at(data, unix.NFTA_NAT_REG_ADDR_MIN)]); ok {
			text += " to " + a.String()
		}
	}
	if find(data, unix.NFTA_NAT_REG_PROTO_MIN) == nil {
		return text
	}
	low := d.constants[at(data, unix.NFTA_NAT_REG_PROTO_MIN)]
	if len(low) == 2 {
		text += fmt.Sprintf(":%d", binary.BigEndian.Uint16(low))
	}
	if high := d.constants[at(data, unix.NFTA_NAT_REG_PROTO_MAX)]; find(data, unix.NFTA_NAT_REG_PROTO_MAX) != nil && len(high) == 2 && !bytes.Equal(low, high) {
		text += fmt.Sprintf("-%d", binary.BigEndian.Uint16(high))
	}
	return text
}

func (d *decoding) immediate(data []byte) {
	value := find(data, unix.NFTA_IMMEDIATE_DATA)
	if v := find(value, unix.NFTA_DATA_VERDICT); v != nil {
		code := int32(numberOf(v, unix.NFTA_VERDICT_CODE))
		d.decide(code, textOf(v, unix.NFTA_VERDICT_CHAIN))
		return
	}
	constant := bytes.Clone(find(value, unix.NFTA_DATA_VALUE))
	to := at(data, unix.NFTA_IMMEDIATE_DREG)
	d.constants[to] = constant
	d.line.conditions = append(d.line.conditions, func(_ *packet, r *values) Fit { r.put(to, constant, len(constant)); return Yes })
}

// decide is a verdict: NF_*, or NFT_* below zero.
func (d *decoding) decide(code int32, chain string) {
	const drop, accept, queue = 0, 1, 3
	switch code {
	case drop:
		d.finish("drop", "drop")
	case accept, unix.NFT_RETURN:
		d.line.ends = true
	case queue:
		d.finish("queue", "queue")
	case unix.NFT_JUMP:
		d.line.jump = chain
	case unix.NFT_GOTO:
		d.line.jump, d.line.ends = chain, true
	}
}

func (d *decoding) payload(data []byte) {
	base, offset, length := numberOf(data, unix.NFTA_PAYLOAD_BASE), numberOf(data, unix.NFTA_PAYLOAD_OFFSET), numberOf(data, unix.NFTA_PAYLOAD_LEN)
	if find(data, unix.NFTA_PAYLOAD_DREG) == nil {
		d.say("payload set")
		return // it writes into the packet
	}
	to := at(data, unix.NFTA_PAYLOAD_DREG)
	d.described[to], d.ct[to] = d.field(base, offset, length), false
	d.line.conditions = append(d.line.conditions, func(p *packet, r *values) Fit {
		value := p.bytes(base, offset, length)
		r.put(to, value, int(length))
		if value == nil && base == unix.NFT_PAYLOAD_TRANSPORT_HEADER && p.fragment {
			return No // the kernel breaks off
		}
		return Yes
	})
}

// field is what nft(8) calls a part of a header.
func (d *decoding) field(base, offset, length uint32) string {
	type part struct{ base, offset, length uint32 }
	p := part{base, offset, length}
	const network, transport = unix.NFT_PAYLOAD_NETWORK_HEADER, unix.NFT_PAYLOAD_TRANSPORT_HEADER
	proto := d.proto
	if proto == "" {
		proto = "th"
	}
	if name := map[part]string{{transport, 0, 2}: " sport", {transport, 2, 2}: " dport", {transport, 13, 1}: " flags"}[p]; name != "" {
		return proto + name
	}
	if name := map[part]string{{transport, 0, 1}: " type", {transport, 1, 1}: " code"}[p]; name != "" {
		return proto + name
	}
	names := map[part]string{{network, 12, 4}: "ip saddr", {network, 16, 4}: "ip daddr", {network, 9, 1}: "ip protocol", {network, 8, 1}: "ip ttl",
		{network, 2, 2}: "ip length", {network, 6, 2}: "ip frag-off", {network, 1, 1}: "ip tos"}
	if d.header == unix.NFPROTO_IPV6 {
		names = map[part]string{{network, 8, 16}: "ip6 saddr", {network, 24, 16}: "ip6 daddr", {network, 6, 1}: "ip6 nexthdr", {network, 7, 1}: "ip6 hoplimit", {network, 4, 2}: "ip6 length"}
	}
	if d.family == unix.NFPROTO_ARP {
		names = map[part]string{{network, 6, 2}: "arp operation", {network, 14, 4}: "arp saddr ip", {network, 24, 4}: "arp daddr ip"}
	}
	if name := names[p]; name != "" {
		return name
	}
	if base == network && length < 4 && offset == 12 || base == network && length < 4 && offset == 16 {
		return names[part{network, offset, 4}]
	}
	return fmt.Sprintf("@%s,%d,%d", map[uint32]string{0: "ll", network: "nh", transport: "th", 3: "ih"}[base], 8*offset, 8*length)
}

func (d *decoding) meta(data []byte) {
	key := numberOf(data, unix.NFTA_META_KEY)
	if find(data, unix.NFTA_META_DREG) == nil {
		d.say("meta set")
		return
	}
	to := at(data, unix.NFTA_META_DREG)
	name, known := map[uint32]string{unix.NFT_META_NFPROTO: "meta nfproto", unix.NFT_META_L4PROTO: "meta l4proto", unix.NFT_META_IIFNAME: "iifname",
		unix.NFT_META_OIFNAME: "oifname", unix.NFT_META_MARK: "meta mark", unix.NFT_META_LEN: "meta length", unix.NFT_META_PROTOCOL: "meta protocol",
		unix.NFT_META_IIF: "iif", unix.NFT_META_OIF: "oif", unix.NFT_META_PKTTYPE: "meta pkttype", unix.NFT_META_SKUID: "meta skuid",
		unix.NFT_META_SKGID: "meta skgid", unix.NFT_META_CGROUP: "meta cgroup", unix.NFT_META_PRANDOM: "meta random"}[key]
	if !known {
		name = fmt.Sprintf("meta %d", key)
	}
	d.rate = d.rate || key == unix.NFT_META_PRANDOM
	d.described[to], d.ct[to] = name, false
	d.line.conditions = append(d.line.conditions, func(p *packet, r *values) Fit {
		var value []byte
		length := 4
		switch key {
		case unix.NFT_META_NFPROTO:
			if value = []byte{unix.NFPROTO_IPV4}; p.version == 6 {
				value[0] = unix.NFPROTO_IPV6
			}
		case unix.NFT_META_L4PROTO:
			if p.version != 0 {
				value = []byte{p.proto}
			}
		case unix.NFT_META_PROTOCOL:
			if p.version != 0 {
				value = binary.BigEndian.AppendUint16(nil, map[byte]uint16{4: unix.ETH_P_IP, 6: unix.ETH_P_IPV6}[p.version])
			}
		case unix.NFT_META_IIFNAME, unix.NFT_META_OIFNAME:
			device := p.in
			if key == unix.NFT_META_OIFNAME {
				device = p.out
			}
			length = unix.IFNAMSIZ
			if device != "" {
				value = append([]byte(device), make([]byte, max(0, length-len(device)))...)
			}
		}
		r.put(to, value, length)
		return Yes
	})
}

// tracked is an expression about the packet's connection.
func (d *decoding) tracked(data []byte) {
	if find(data, unix.NFTA_CT_DREG) == nil {
		d.say("ct set")
		return
	}
	to := at(data, unix.NFTA_CT_DREG)
	state := numberOf(data, unix.NFTA_CT_KEY) == unix.NFT_CT_STATE
	d.described[to], d.ct[to], d.masks[to] = "ct", state, 1<<32-1
	if state {
		d.described[to] = "ct state"
	}
	d.line.conditions = append(d.line.conditions, func(_ *packet, r *values) Fit {
		r.put(to, nil, 16)
		r.states[to], r.mask[to] = state, 1<<32-1
		return Yes
	})
}

func (d *decoding) bitwise(data []byte) {
	from, to := at(data, unix.NFTA_BITWISE_SREG), at(data, unix.NFTA_BITWISE_DREG)
	mask := bytes.Clone(find(find(data, unix.NFTA_BITWISE_MASK), unix.NFTA_DATA_VALUE))
	xor := bytes.Clone(find(find(data, unix.NFTA_BITWISE_XOR), unix.NFTA_DATA_VALUE))
	length := int(numberOf(data, unix.NFTA_BITWISE_LEN))
	d.described[to], d.ct[to] = d.described[from], d.ct[from]
	if len(mask) == 4 {
		d.masks[to] = host.Uint32(mask)
	}
	if len(mask) != length || len(xor) != length { // a shift, or of two registers
		d.ct[to] = false
		d.line.conditions = append(d.line.conditions, func(_ *packet, r *values) Fit { r.put(to, nil, length); return Yes })
		return
	}
	if !d.ct[from] {
		d.described[to] += maskText(mask)
	}
	d.line.conditions = append(d.line.conditions, func(_ *packet, r *values) Fit {
		states, value := r.states[from], r.get(from, length)
		if value != nil {
			value = bytes.Clone(value)
			for i := range value {
				value[i] = value[i]&mask[i] ^ xor[i]
			}
		}
		r.put(to, value, length)
		if states && length == 4 {
			r.states[to], r.mask[to] = true, host.Uint32(mask)
		}
		return Yes
	})
}

func maskText(mask []byte) string {
	ones := 0
	for _, b := range mask {
		n := leadingOnes(b)
		ones += n
		if n < 8 {
			break
		}
	}
	if len(mask) == 4 || len(mask) == 16 {
		if p := prefixBytes(len(mask), ones); bytes.Equal(p, mask) {
			return "/" + strconv.Itoa(ones)
		}
	}
	return fmt.Sprintf(" & 0x%x", mask)
}

func prefixBytes(length, ones int) []byte {
	b := make([]byte, length)
	for i := range ones {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return b
}

func (d *decoding) compare(data []byte) {
	from, operation := at(data, unix.NFTA_CMP_SREG), numberOf(data, unix.NFTA_CMP_OP)
	value := bytes.Clone(find(find(data, unix.NFTA_CMP_DATA), unix.NFTA_DATA_VALUE))
	what := d.described[from]
	equal := operation == unix.NFT_CMP_EQ
	switch {
	case d.ct[from]:
		names := stateNames(d.masks[from])
		d.states = append(d.states, names...)
		d.say("ct state " + strings.Join(names, ","))
	case what == "meta nfproto" && equal && len(value) == 1:
		d.header = value[0]
		if d.family == familyInet {
			d.say("meta nfproto " + map[byte]string{unix.NFPROTO_IPV4: "ipv4", unix.NFPROTO_IPV6: "ipv6"}[value[0]])
		}
	case (what == "meta l4proto" || what == "ip protocol" || what == "ip6 nexthdr") && equal && len(value) >= 1:
		d.proto = protoName(value[0])
		d.say("meta l4proto " + d.proto)
	default:
		sign := map[uint32]string{unix.NFT_CMP_NEQ: "!= ", unix.NFT_CMP_LT: "< ", unix.NFT_CMP_LTE: "<= ", unix.NFT_CMP_GT: "> ", unix.NFT_CMP_GTE: ">= "}[operation]
		d.say(sayValue(what, sign, value))
	}
	d.add(func(p *packet, r *values) Fit {
		if r.states[from] { // `ct state x` is "the bits of the mask are not all zero"
			zero := len(bytes.Trim(value, "\x00")) == 0
			switch {
			case zero && operation == unix.NFT_CMP_NEQ:
				return p.inState(r.mask[from])
			case zero && equal:
				return p.inState(r.mask[from]).not()
			}
			return Unknown
		}
		have := r.get(from, len(value))
		if have == nil {
			return Unknown
		}
		c := bytes.Compare(have, value)
		return fits(map[uint32]bool{unix.NFT_CMP_EQ: c == 0, unix.NFT_CMP_NEQ: c != 0, unix.NFT_CMP_LT: c < 0, unix.NFT_CMP_LTE: c <= 0,
			unix.NFT_CMP_GT: c > 0, unix.NFT_CMP_GTE: c >= 0}[operation])
	})
}

func protoName(number byte) string {
	if name := map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_ICMPV6: "icmpv6",
		unix.IPPROTO_SCTP: "sctp", unix.IPPROTO_GRE: "gre", unix.IPPROTO_ESP: "esp"}[number]; name != "" {
		return name
	}
	return strconv.Itoa(int(number))
}

// sayValue is a comparison as nft(8) writes it.
func sayValue(what, sign string, value []byte) string {
	prefix := ""
	if name, bits, found := strings.Cut(what, "/"); found {
		what, prefix = name, "/"+bits
	}
	return what + " " + sign + valueText(what, value) + prefix
}

func valueText(what string, value []byte) string {
	switch {
	case strings.HasSuffix(what, "addr"), strings.HasSuffix(what, "addr ip"):
		size := 4
		if strings.HasPrefix(what, "ip6") {
			size = 16
		}
		whole := make([]byte, size)
		copy(whole, value)
		a, _ := netip.AddrFromSlice(whole)
		if len(value) < size {
			return fmt.Sprintf("%s/%d", a, 8*len(value))
		}
		return a.String()
	case strings.HasSuffix(what, "ifname"):
		name := string(trim(value))
		if !bytes.Contains(value, []byte{0}) && len(value) < unix.IFNAMSIZ {
			name += "*"
		}
		return strconv.Quote(name)
	case strings.HasSuffix(what, "port"), strings.HasSuffix(what, "length"), strings.HasSuffix(what, "operation"):
		if len(value) == 2 {
			return strconv.Itoa(int(binary.BigEndian.Uint16(value)))
		}
	case strings.HasSuffix(what, "type"), strings.HasSuffix(what, "code"), strings.HasSuffix(what, "ttl"):
		if len(value) == 1 {
			return strconv.Itoa(int(value[0]))
		}
	case strings.HasPrefix(what, "meta sk"), strings.HasPrefix(what, "meta mark"), what == "iif", what == "oif":
		if len(value) == 4 {
			return strconv.FormatUint(uint64(host.Uint32(value)), 10)
		}
	}
	return fmt.Sprintf("0x%x", value)
}

func (d *decoding) between(data []byte) {
	from, operation := at(data, unix.NFTA_RANGE_SREG), numberOf(data, unix.NFTA_RANGE_OP)
	low := bytes.Clone(find(find(data, unix.NFTA_RANGE_FROM_DATA), unix.NFTA_DATA_VALUE))
	high := bytes.Clone(find(find(data, unix.NFTA_RANGE_TO_DATA), unix.NFTA_DATA_VALUE))
	what := d.described[from]
	d.say(sayValue(what, map[bool]string{true: "!= "}[operation == unix.NFT_RANGE_NEQ], low) + "-" + valueText(what, high))
	d.add(func(_ *packet, r *values) Fit {
		have := r.get(from, len(low))
		if have == nil {
			return Unknown
		}
		inside := bytes.Compare(have, low) >= 0 && bytes.Compare(have, high) <= 0
		return fits(inside == (operation == unix.NFT_RANGE_EQ))
	})
}

func (d *decoding) lookup(data []byte) {
	const inverted = 1 // NFT_LOOKUP_F_INV
	from := at(data, unix.NFTA_LOOKUP_SREG)
	invert := numberOf(data, unix.NFTA_LOOKUP_FLAGS)&inverted != 0
	name := textOf(data, unix.NFTA_LOOKUP_SET)
	list := d.lists.want(setKey{d.family, d.table, name})
	isMap := find(data, unix.NFTA_LOOKUP_DREG) != nil
	to := at(data, unix.NFTA_LOOKUP_DREG)
	what, states := d.described[from], d.ct[from]
	kind := map[bool]string{true: "map", false: ""}[isMap]
	sign := map[bool]string{true: "!="}[invert]
	shown := "@" + name
	if strings.HasPrefix(name, "__") {
		shown = "{...}"
	}
	d.say(strings.Join(strings.Fields(what+" "+kind+" "+sign+" "+shown), " "))
	if states {
		d.states = append(d.states, "by "+shown)
	}
	verdictMap := isMap && numberOf(data, unix.NFTA_LOOKUP_DREG) == unix.NFT_REG_VERDICT
	if verdictMap {
		// What a packet meets depends on the element: those that drop are what is told of.
		d.verdict, d.counter = "drop", false
		before := slices.Clone(d.line.conditions)
		d.line.branches = list
		d.line.branch = func(to string) *line {
			taken := func(_ *packet, r *values) Fit {
				return list.holds(r, from, func(e setElement) bool { return e.jump == to })
			}
			return &line{chain: d.line.chain, place: d.line.place, conditions: append(slices.Clone(before), taken)}
		}
		d.add(func(_ *packet, r *values) Fit { return list.holds(r, from, func(e setElement) bool { return e.drop }) })
		return
	}
	d.add(func(_ *packet, r *values) Fit {
		found := list.holds(r, from, func(setElement) bool { return true })
		if isMap {
			r.put(to, nil, 16)
		}
		if invert {
			return found.not()
		}
		return found
	})
}

// setKey names a set.
type setKey struct {
	family      byte
	table, name string
}

// elementLists are the sets that rules look into.
type elementLists struct {
	socket *socket
	named  map[setKey]*elementList
	order  []setKey
}

// elementList is what is in a set, as far as it was read.
type elementList struct {
	read      bool
	intervals bool
	elements  []setElement
}

type setElement struct {
	key, end []byte
	last     bool   // where an interval has ended
	drop     bool   // of a verdict map
	jump     string // of a verdict map: the chain that it leads to
}

func (l *elementLists) want(key setKey) *elementList {
	if l.named[key] == nil {
		l.named[key] = &elementList{}
		l.order = append(l.order, key)
	}
	return l.named[key]
}

// mostElements is how many are kept in all; of larger sets nothing is known.
const mostElements = 100_000

func (l *elementLists) read() error {
	left := mostElements
	for _, key := range l.order {
		list := l.named[key]
		name := attributes(nil).text(unix.NFTA_SET_TABLE, key.table).text(unix.NFTA_SET_NAME, key.name)
		for m, err := range l.socket.ask(unix.NFT_MSG_GETSET, 0, key.family, name) {
			if errors.Is(err, unix.ENOENT) {
				break
			}
			if err != nil {
				return err
			}
			list.intervals = numberOf(m.attributes, unix.NFTA_SET_FLAGS)&unix.NFT_SET_INTERVAL != 0
		}
		whole := true
		for m, err := range l.socket.ask(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, key.family,
			attributes(nil).text(unix.NFTA_SET_ELEM_LIST_TABLE, key.table).text(unix.NFTA_SET_ELEM_LIST_SET, key.name)) {
			if errors.Is(err, unix.ENOENT) {
				whole = false
				break
			}
			if err != nil {
				return err
			}
			for _, e := range listed(find(m.attributes, unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
				if left--; left < 0 {
					whole = false
					break
				}
				list.elements = append(list.elements, elementOf(e.value))
			}
		}
		list.read = whole
		slices.SortFunc(list.elements, func(a, b setElement) int { return bytes.Compare(a.key, b.key) })
	}
	return nil
}

func elementOf(raw []byte) setElement {
	const keyEnd = 10 // NFTA_SET_ELEM_KEY_END
	e := setElement{
		key:  bytes.Clone(find(find(raw, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE)),
		end:  bytes.Clone(find(find(raw, keyEnd), unix.NFTA_DATA_VALUE)),
		last: numberOf(raw, unix.NFTA_SET_ELEM_FLAGS)&unix.NFT_SET_ELEM_INTERVAL_END != 0,
	}
	if verdict := find(find(raw, unix.NFTA_SET_ELEM_DATA), unix.NFTA_DATA_VERDICT); verdict != nil {
		e.drop, e.jump = numberOf(verdict, unix.NFTA_VERDICT_CODE) == 0, textOf(verdict, unix.NFTA_VERDICT_CHAIN)
	}
	return e
}

// find is the element that a value is, or falls into.
func (l *elementList) find(value []byte) (found setElement, ok bool) {
	for _, e := range l.elements {
		switch {
		case len(e.end) > 0:
			if inParts(value, e.key, e.end) {
				return e, true
			}
		case l.intervals:
			if bytes.Compare(e.key, value) > 0 {
				return found, ok
			}
			found, ok = e, !e.last
		case bytes.Equal(e.key, value):
			return e, true
		}
	}
	return found, ok
}

// inParts compares a concatenation of keys, each of which may be a range, by its words of
// four bytes: where that is not exact, addresses of IPv6, it says too much.
func inParts(value, low, high []byte) bool {
	if len(value) != len(low) || len(low) != len(high) {
		return false
	}
	for i := 0; i+4 <= len(value); i += 4 {
		if bytes.Compare(value[i:i+4], low[i:i+4]) < 0 || bytes.Compare(value[i:i+4], high[i:i+4]) > 0 {
			return false
		}
	}
	return true
}

// holds says whether the value of a register is, or falls into, such an element.
func (l *elementList) holds(r *values, from int, such func(setElement) bool) Fit {
	if !l.read {
		return Unknown
	}
	if !slices.ContainsFunc(l.elements, such) {
		return No
	}
	value := r.get(from, len(l.elements[0].key))
	if value == nil {
		return Unknown
	}
	e, found := l.find(value)
	return fits(found && such(e))
}
