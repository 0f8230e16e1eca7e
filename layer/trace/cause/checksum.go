package cause

import "encoding/binary"

// summed is what the Internet checksum of some bytes is to be compared with: 0xffff where
// they hold their own (RFC 1071).
func summed(sum uint32, raw []byte) uint32 {
	for ; len(raw) >= 2; raw = raw[2:] {
		sum += uint32(binary.BigEndian.Uint16(raw))
	}
	if len(raw) == 1 {
		sum += uint32(raw[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return sum
}

// wrongSum says which checksum of a packet is wrong: "IP", "TCP", "UDP", "ICMP", or "" if
// none is, or if that cannot be told: where only a part of the packet is there, where it is
// a part itself, and where a device fills the checksum in later.
func (e *Event) wrongSum() string {
	raw := e.Packet
	if len(raw) < 20 || e.GSO > 0 {
		return ""
	}
	at, proto, pseudo := 0, byte(0), uint32(0)
	switch raw[0] >> 4 {
	case 4:
		at = int(raw[0]&15) * 4
		if at < 20 || at > len(raw) {
			return ""
		}
		if summed(0, raw[:at]) != 0xffff {
			return "IP"
		}
		total := int(binary.BigEndian.Uint16(raw[2:]))
		if binary.BigEndian.Uint16(raw[6:])&0x3fff != 0 || total > len(raw) || total < at {
			return ""
		}
		raw, proto = raw[:total], raw[9]
		pseudo = summed(uint32(proto)+uint32(total-at), raw[12:20])
	case 6:
		if len(raw) < 40 {
			return ""
		}
		total := 40 + int(binary.BigEndian.Uint16(raw[4:]))
		if total > len(raw) {
			return ""
		}
		at, raw, proto = 40, raw[:total], raw[6]
		pseudo = summed(uint32(proto)+uint32(total-at), raw[8:40])
	default:
		return ""
	}
	return sumOfTransport(proto, raw[at:], pseudo, e.Partial)
}

// sumOfTransport checks what follows the network header.
func sumOfTransport(proto byte, segment []byte, pseudo uint32, partial bool) string {
	place := map[byte]int{protoTCP: 16, protoUDP: 6, protoICMP: 2, protoICMP6: 2}
	name := map[byte]string{protoTCP: "TCP", protoUDP: "UDP", protoICMP: "ICMP", protoICMP6: "ICMPv6"}[proto]
	at := place[proto]
	if name == "" || at+2 > len(segment) || partial {
		return ""
	}
	have := uint32(binary.BigEndian.Uint16(segment[at:]))
	if proto == protoICMP {
		pseudo = 0
	}
	switch {
	case proto == protoUDP && have == 0: // none was made
		return ""
	case have == pseudo: // what a device would complete; on a virtual wire nobody does
		return ""
	case summed(pseudo, segment) != 0xffff:
		return name
	}
	return ""
}

var checksumReasons = map[string]string{"TCP_CSUM": "TCP", "UDP_CSUM": "UDP", "IP_CSUM": "IP", "ICMP_CSUM": "ICMP", "SKB_CSUM": "a"}

// checksums: a packet whose checksum is wrong was altered on its way, or never had a
// right one. Where a rule drops what belongs to no connection it is dropped there first:
// connection tracking takes it for invalid.
func (d *diagnosis) checksums() {
	for _, e := range append(d.open(Drop), d.open(ChecksumFail)...) {
		which := checksumReasons[e.Reason]
		if e.Kind == ChecksumFail {
			which = "TCP"
		}
		invalid := false
		if which == "" && e.Reason == "NETFILTER_DROP" {
			which, invalid = e.wrongSum(), true
		}
		if which == "" {
			continue
		}
		s := d.spaces[e.Space]
		v, fresh := d.verdict(BadChecksum, s, e.Tuple.Source.Addr().String()+which, e)
		counter := map[string][]string{"TCP": {"Tcp.InCsumErrors"}, "UDP": {"Udp.InCsumErrors", "Udp6InCsumErrors"},
			"IP": {"IpExt.InCsumErrors"}, "ICMP": {"Icmp.InCsumErrors"}, "ICMPv6": {"Icmp6InCsumErrors"}}[which]
		if rose := s.rose(counter...); rose > 0 {
			v.saw("%s +%d (%s, /proc/net/snmp)", counter[0], rose, s.Name)
		}
		if e.Kind == ChecksumFail && !fresh {
			continue // it is of packets that died, too
		}
		v.Title = "packets of " + e.Tuple.Source.Addr().String() + " arrive with a wrong " + which + " checksum: " + times(v.Packets, "was", "were") + " dropped"
		v.saw("%d packets dropped at %s, reason %s: %s", e.Count, e.Location, e.Reason, flow(e.Tuple))
		if !fresh {
			continue
		}
		v.Where.Hook = "checksum"
		if invalid {
			v.Where.Hook = hookOf(e)
			v.saw("the %s checksum of a captured packet, computed again, is wrong", which)
			if s.After.Conntrack.Invalid > s.Before.Conntrack.Invalid {
				v.saw("conntrack invalid +%d (/proc/net/stat/nf_conntrack)", s.After.Conntrack.Invalid-s.Before.Conntrack.Invalid)
			}
			v.isNot("%s: the rule drops what is invalid, and it is the checksum that makes it so", ConntrackInvalid)
		}
		v.isNot("%s: no rule drops packets with a right checksum here", FirewallDrop)
		v.Fix = "ethtool -K DEVICE tx off on the sender " + e.Tuple.Source.Addr().String() + ", where DEVICE is the one that it sends by: checksums are then made by the kernel. If they are wrong still, the cable, switch or program in between alters packets"
		v.Undo = "ethtool -K DEVICE tx on"
		v.Owner = "the sender " + e.Tuple.Source.Addr().String() + ", or what is between"
	}
}
