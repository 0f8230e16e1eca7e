package nft

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// match is one of iptables, whose C structs are those of linux/netfilter/xt_*.h.
func (d *decoding) match(name string, revision uint32, info []byte) {
	switch {
	case name == "comment":
		d.comment = string(trim(info))
	case (name == "tcp" || name == "udp") && len(info) >= 8:
		d.proto = name
		d.portRanges(name, info)
	case name == "multiport" && len(info) >= 48:
		d.multiport(info)
	case name == "conntrack" || name == "state":
		d.connectionState(name, revision, info)
	case (name == "icmp" || name == "icmp6") && len(info) >= 4:
		d.icmp(info)
	case slices.Contains([]string{"limit", "hashlimit", "connlimit", "statistic", "quota", "recent", "rateest", "quota2"}, name):
		d.rate = true
		d.unknown("-m " + name)
	default:
		d.unknown("-m " + name)
	}
}

// portRanges are struct xt_tcp and xt_udp: two pairs of ports, then for TCP an option,
// the flags' mask and value, and what is inverted.
func (d *decoding) portRanges(name string, info []byte) {
	source := [2]uint16{host.Uint16(info), host.Uint16(info[2:])}
	target := [2]uint16{host.Uint16(info[4:]), host.Uint16(info[6:])}
	var mask, flags, inverted, option byte
	switch {
	case name == "udp" && len(info) >= 9:
		inverted = info[8]
	case name == "tcp" && len(info) >= 12:
		option, mask, flags, inverted = info[8], info[9], info[10], info[11]
	}
	for i, r := range [][2]uint16{source, target} {
		if r == [2]uint16{0, 65535} {
			continue
		}
		text := fmt.Sprint(r[0])
		if r[0] != r[1] {
			text += fmt.Sprintf(":%d", r[1])
		}
		not := inverted&(1<<i) != 0
		d.say(name + " " + []string{"sport", "dport"}[i] + map[bool]string{true: " !="}[not] + " " + text)
		d.add(func(p *packet, _ *values) Fit {
			s, t, known := p.ports()
			if !known {
				return No
			}
			port := []uint16{s, t}[i]
			return fits((port >= r[0] && port <= r[1]) != not)
		})
	}
	if mask != 0 {
		not := inverted&4 != 0
		d.say(fmt.Sprintf("tcp flags & 0x%x == 0x%x", mask, flags))
		d.add(func(p *packet, _ *values) Fit {
			have := p.bytes(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1)
			if have == nil {
				return No
			}
			return fits((have[0]&mask == flags) != not)
		})
	}
	if option != 0 {
		d.unknown("tcp option")
	}
}

// multiport is struct xt_multiport_v1: flags, a count, 15 ports, which of them begin a
// range, and whether it is inverted.
func (d *decoding) multiport(info []byte) {
	const sources, targets = 0, 1
	kind, count, not := info[0], min(int(info[1]), 15), info[47] != 0
	var ranges [][2]uint16
	var texts []string
	for i := 0; i < count; i++ {
		r := [2]uint16{host.Uint16(info[2+2*i:]), host.Uint16(info[2+2*i:])}
		text := fmt.Sprint(r[0])
		if info[32+i] != 0 && i+1 < count {
			i++
			r[1] = host.Uint16(info[2+2*i:])
			text += fmt.Sprintf(":%d", r[1])
		}
		ranges, texts = append(ranges, r), append(texts, text)
	}
	d.say(map[byte]string{sources: "sports ", targets: "dports "}[kind] + map[bool]string{true: "!= "}[not] + strings.Join(texts, ","))
	d.add(func(p *packet, _ *values) Fit {
		s, t, known := p.ports()
		if !known {
			return No
		}
		found := slices.ContainsFunc(ranges, func(r [2]uint16) bool {
			source, target := s >= r[0] && s <= r[1], t >= r[0] && t <= r[1]
			return kind != targets && source || kind != sources && target
		})
		return fits(found != not)
	})
}

// connectionState reads xt_conntrack and xt_state, as far as they are about states.
func (d *decoding) connectionState(name string, revision uint32, info []byte) {
	asked, known := conntrackOf(revision, info)
	if name == "state" && len(info) >= 4 {
		asked, known = conntrackMatch{states: host.Uint32(info), onlyStates: true}, true
	}
	if !known {
		d.unknown("-m " + name)
		return
	}
	mask, not := asked.states, asked.inverted&byState != 0
	names := stateNames(mask)
	d.states = append(d.states, names...)
	d.say("ctstate " + map[bool]string{true: "! "}[not] + strings.ToUpper(strings.Join(names, ",")))
	d.add(func(p *packet, _ *values) Fit {
		fit := p.inState(mask)
		if not {
			fit = fit.not()
		}
		if !asked.onlyStates {
			fit = fit.and(Unknown)
		}
		return fit
	})
}

// icmp is struct ipt_icmp and ip6t_icmp: a type, the lowest and highest code, inverted.
func (d *decoding) icmp(info []byte) {
	kind, low, high, not := info[0], info[1], info[2], info[3] != 0
	d.say(fmt.Sprintf("icmp type %d", kind))
	d.add(func(p *packet, _ *values) Fit {
		have := p.bytes(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2)
		if have == nil {
			return No
		}
		is := (kind == 255 || have[0] == kind) && have[1] >= low && have[1] <= high
		return fits(is != not)
	})
}

// target is one of iptables that is no verdict of the kernel's.
func (d *decoding) target(name string, info []byte) {
	switch name {
	case "REJECT":
		// struct ipt_reject_info: the way; IPT_TCP_RESET is 7, IP6T_TCP_RESET 5.
		reset := uint32(7)
		if d.family == unix.NFPROTO_IPV6 {
			reset = 5
		}
		if len(info) >= 4 && host.Uint32(info) == reset {
			d.finish("reject with tcp reset", "REJECT --reject-with tcp-reset")
			return
		}
		d.finish("reject", "REJECT")
	case "NFQUEUE":
		d.finish("queue", "NFQUEUE")
	case "SNAT":
		d.finish("snat", "SNAT"+natRange(info))
	case "MASQUERADE":
		d.finish("masquerade", "MASQUERADE"+natRange(info))
	case "DNAT":
		d.finish("dnat", "DNAT")
	case "REDIRECT", "NETMAP", "TPROXY":
		d.finish("redirect", name)
	case "SYNPROXY":
		d.finish("synproxy", name)
	default: // LOG, MARK, TCPMSS, CT ... go on
		d.say(name)
	}
}

// natRange is the ports of struct nf_nat_ipv4_multi_range_compat or nf_nat_range, where
// there are any: only their numbers are told.
func natRange(info []byte) string {
	const specified = 2 // NF_NAT_RANGE_PROTO_SPECIFIED
	switch {
	case len(info) >= 20 && len(info) < 40 && host.Uint32(info) == 1 && host.Uint32(info[4:])&specified != 0:
		return fmt.Sprintf(" --to-ports %d-%d", uint16(info[16])<<8|uint16(info[17]), uint16(info[18])<<8|uint16(info[19]))
	case len(info) >= 40 && host.Uint32(info)&specified != 0:
		return fmt.Sprintf(" --to-ports %d-%d", uint16(info[36])<<8|uint16(info[37]), uint16(info[38])<<8|uint16(info[39]))
	}
	return ""
}
