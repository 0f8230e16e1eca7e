package nft

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// tables4And6 is what differs between ip_tables and ip6_tables: where things are in
// struct ipt_entry and ip6t_entry of linux/netfilter_ipv4/ip_tables.h and its sister.
type tables4And6 struct {
	name, file              string
	family                  byte
	domain, level           int
	address                 int // bytes of one
	devices, proto, flags   int // offsets
	inverted                int
	target, next            int
	counters, header        int
	invertSource, invertDst byte
}

// legacyRules reads those of iptables-legacy.
func (n *Net) legacyRules() (all []Rule, err error) {
	err = n.eachLegacy(func(f *tables4And6, table string) error {
		info, entries, err := f.entries(table)
		if err == nil {
			all = append(all, f.read(table, info, entries)...)
		}
		return err
	})
	return all, err
}

// read makes chains of the entries: built-in ones begin at hooks, others after an ERROR
// target that names them.
func (f *tables4And6) read(table string, info tableInfo, raw []byte) []Rule {
	set := &chainset{chains: map[chainKey]*listedChain{}}
	begins := map[int]*listedChain{}
	chain := func(name string) *listedChain {
		c := &listedChain{key: chainKey{table, name}, family: f.family}
		c.policy = Rule{System: "iptables-legacy", Family: f.name, Table: table, Chain: name, Policy: true, Verdict: "drop", Text: "policy DROP", HasCounter: true}
		set.chains[c.key] = c
		return c
	}
	policies := map[int]bool{}
	for hook := range info.entries {
		if info.hooks&(1<<hook) == 0 {
			continue
		}
		c := chain(strings.ToUpper(hookNames[hook]))
		c.base, c.hook = true, hookNames[hook]
		begins[int(info.entries[hook])], policies[int(info.underflow[hook])] = c, true
	}
	type jump struct {
		from *line
		to   int
	}
	var jumps []jump
	var current *listedChain
	for offset := 0; offset+f.header <= len(raw); {
		entry := raw[offset:]
		target, next := int(host.Uint16(entry[f.target:])), int(host.Uint16(entry[f.next:]))
		if next < f.header || next > len(entry) || target < f.header || target+32 > next {
			break
		}
		if c := begins[offset]; c != nil {
			current = c
		}
		name := string(trim(entry[target+2 : target+31])) // struct xt_entry_target
		data := entry[target+32 : next]
		switch {
		case name == "ERROR" && next < len(entry):
			current = chain(string(trim(data)))
			begins[offset+next] = current
		case name == "ERROR" || current == nil:
		case policies[offset]:
			current.drops = int32(host.Uint32(data)) == -1
			current.policy.Packets = host.Uint64(entry[f.counters:])
		default:
			l, to := f.line(current, entry[:next], target, name, data)
			current.lines = append(current.lines, l)
			if to >= 0 && to != offset+next {
				jumps = append(jumps, jump{l, to})
			}
		}
		offset += next
	}
	for _, j := range jumps {
		if to := begins[j.to]; to != nil {
			j.from.jump = to.key.chain
		}
	}
	set.link()
	return set.reported()
}

// line reads one entry; to is the offset that it jumps to, or negative.
func (f *tables4And6) line(c *listedChain, entry []byte, target int, name string, data []byte) (l *line, to int) {
	to = -1
	d := decoding{family: f.family, header: f.family, table: c.key.table, system: "iptables-legacy", line: &line{chain: c, place: len(c.lines)}}
	f.header4And6(&d, entry)
	for at := f.header; at+32 <= target; { // struct xt_entry_match
		size := int(host.Uint16(entry[at:]))
		if size < 32 || at+size > target {
			break
		}
		d.match(string(trim(entry[at+2:at+31])), uint32(entry[at+31]), entry[at+32:at+size])
		at += size
	}
	if name == "" && len(data) >= 4 { // the standard target: below zero a verdict, else an offset
		const drop, accept, queue, back = -1, -2, -4, -5
		switch verdict := int32(host.Uint32(data)); verdict {
		case drop:
			d.finish("drop", "-j DROP")
		case accept, back:
			d.line.ends = true
		case queue:
			d.finish("queue", "-j QUEUE")
		default:
			to = int(verdict)
		}
	} else {
		d.target(name, data)
	}
	if d.verdict != "" {
		d.line.report = &Rule{System: d.system, Family: f.name, Table: c.key.table, Chain: c.key.chain, Handle: uint64(d.line.place + 1),
			Verdict: d.verdict, Text: strings.Join(d.words, " "), Comment: d.comment, States: d.states,
			HasCounter: true, Packets: host.Uint64(entry[f.counters:]), Rate: d.rate}
	}
	return d.line, to
}

// header4And6 reads the addresses, devices and protocol of an entry.
func (f *tables4And6) header4And6(d *decoding, entry []byte) {
	flags := entry[f.inverted]
	const invertIn, invertOut, invertProto, invertFragment = 1, 2, 64, 32
	sides := []struct {
		word     string
		at, mask int
		invert   byte
		headerOf int // the offset in the packet
	}{
		{"-s", 0, 2 * f.address, f.invertSource, map[int]int{4: 12, 16: 8}[f.address]},
		{"-d", f.address, 3 * f.address, f.invertDst, map[int]int{4: 16, 16: 24}[f.address]},
	}
	for _, s := range sides {
		value, mask := bytes.Clone(entry[s.at:s.at+f.address]), bytes.Clone(entry[s.mask:s.mask+f.address])
		if len(bytes.Trim(mask, "\x00")) == 0 {
			continue
		}
		not := flags&s.invert != 0
		a, _ := netip.AddrFromSlice(value)
		d.say(map[bool]string{true: "!"}[not] + s.word + " " + a.String() + strings.TrimSuffix(maskText(mask), fmt.Sprintf("/%d", 8*f.address)))
		d.add(func(p *packet, _ *values) Fit {
			have := p.bytes(unix.NFT_PAYLOAD_NETWORK_HEADER, uint32(s.headerOf), uint32(f.address))
			if have == nil {
				return Unknown
			}
			same := true
			for i := range have {
				same = same && have[i]&mask[i] == value[i]&mask[i]
			}
			return fits(same != not)
		})
	}
	for i, word := range []string{"-i", "-o"} {
		name := trim(entry[f.devices+16*i : f.devices+16*i+16])
		if len(name) == 0 {
			continue
		}
		short, wild := bytes.CutSuffix(name, []byte("+"))
		not := flags&[]byte{invertIn, invertOut}[i] != 0
		d.say(map[bool]string{true: "!"}[not] + word + " " + string(name))
		wanted := string(short)
		d.add(func(p *packet, _ *values) Fit {
			device := []string{p.in, p.out}[i]
			if device == "" {
				return Unknown
			}
			return fits((device == wanted || wild && strings.HasPrefix(device, wanted)) != not)
		})
	}
	if proto := byte(host.Uint16(entry[f.proto:])); proto != 0 {
		not := flags&invertProto != 0
		d.proto = protoName(proto)
		d.say(map[bool]string{true: "!"}[not] + "-p " + d.proto)
		d.add(func(p *packet, _ *values) Fit { return fits((p.proto == proto) != not) })
	}
	const fragments = 1 // IPT_F_FRAG
	if f.family == unix.NFPROTO_IPV4 && entry[f.flags]&fragments != 0 {
		not := flags&invertFragment != 0
		d.say(map[bool]string{true: "!"}[not] + "-f")
		d.add(func(p *packet, _ *values) Fit { return fits(p.fragment != not) })
	}
}
