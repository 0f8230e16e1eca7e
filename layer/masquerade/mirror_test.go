package masquerade

import (
	"bytes"
	"encoding/binary"
	"net/netip"
)

// What a packet says and becomes, in another language than the programs', with checksums
// that are computed anew and not adjusted.

const (
	icmp4, tcp, udp, icmp6 = 1, 6, 17, 58
	ethernet               = 14
)

// flow is who speaks to whom; of pings the identifier is the port of who asks.
type flow struct {
	protocol byte
	from, to netip.AddrPort
}

func (f flow) reversed() flow { return flow{f.protocol, f.to, f.from} }

// header is where an IP packet in a frame has its parts.
type header struct {
	at, payload, end int
	six              bool
	protocol         byte
	from, to         netip.Addr
}

// readHeader reads an IP header without extensions.
func readHeader(f []byte, at int, six bool) (h header, ok bool) {
	h = header{at: at, end: len(f), six: six}
	switch {
	case six && len(f) >= at+40 && f[at]>>4 == 6:
		h.payload, h.protocol = at+40, f[at+6]
		h.from, h.to = netip.AddrFrom16([16]byte(f[at+8:])), netip.AddrFrom16([16]byte(f[at+24:]))
	case !six && len(f) >= at+20 && f[at]>>4 == 4 && f[at]&15 >= 5:
		h.payload, h.protocol = at+int(f[at]&15)*4, f[at+9]
		h.from, h.to = netip.AddrFrom4([4]byte(f[at+12:])), netip.AddrFrom4([4]byte(f[at+16:]))
	default:
		return h, false
	}
	return h, true
}

// flowOf reads who speaks to whom.
func (h header) flowOf(f []byte) (is flow, ok bool) {
	if len(f) < h.payload+8 || !h.six && binary.BigEndian.Uint16(f[h.at+6:])&0x3fff != 0 {
		return is, false
	}
	p := f[h.payload:]
	ports := [2]uint16{binary.BigEndian.Uint16(p), binary.BigEndian.Uint16(p[2:])}
	switch {
	case h.protocol == tcp || h.protocol == udp:
	case h.protocol == icmp4 && !h.six && p[0] == 8, h.protocol == icmp6 && h.six && p[0] == 128:
		ports = [2]uint16{binary.BigEndian.Uint16(p[4:]), 0}
	case h.protocol == icmp4 && !h.six && p[0] == 0, h.protocol == icmp6 && h.six && p[0] == 129:
		ports = [2]uint16{0, binary.BigEndian.Uint16(p[4:])}
	default:
		return is, false
	}
	return flow{h.protocol, netip.AddrPortFrom(h.from, ports[0]), netip.AddrPortFrom(h.to, ports[1])}, true
}

// put writes another flow into a packet, without checksums.
func (h header) put(f []byte, to flow) {
	if h.six {
		copy(f[h.at+8:], to.from.Addr().AsSlice())
		copy(f[h.at+24:], to.to.Addr().AsSlice())
	} else {
		copy(f[h.at+12:], to.from.Addr().AsSlice())
		copy(f[h.at+16:], to.to.Addr().AsSlice())
	}
	if h.protocol == tcp || h.protocol == udp {
		binary.BigEndian.PutUint16(f[h.payload:], to.from.Port())
		binary.BigEndian.PutUint16(f[h.payload+2:], to.to.Port())
	} else {
		binary.BigEndian.PutUint16(f[h.payload+4:], to.from.Port()|to.to.Port())
	}
}

// seal computes the checksums of a packet.
func (h header) seal(f []byte) {
	if !h.six {
		f[h.at+10], f[h.at+11] = 0, 0
		binary.BigEndian.PutUint16(f[h.at+10:], ^sum(0, f[h.at:h.payload]))
	}
	at := h.payload + map[byte]int{tcp: 16, udp: 6, icmp4: 2, icmp6: 2}[h.protocol]
	was := binary.BigEndian.Uint16(f[at:])
	if h.protocol == udp && was == 0 {
		return // there is none (RFC 768)
	}
	var pseudo uint32
	if h.protocol != icmp4 {
		header := append(h.fromTo(f), 0, 0, byte((h.end-h.payload)>>8), byte(h.end-h.payload), 0, 0, 0, h.protocol)
		pseudo = uint32(sum(0, header))
	}
	f[at], f[at+1] = 0, 0
	value := ^sum(pseudo, f[h.payload:h.end])
	if h.protocol == udp && value == 0 {
		value = 0xffff
	}
	binary.BigEndian.PutUint16(f[at:], value)
}

func (h header) fromTo(f []byte) []byte {
	if h.six {
		return bytes.Clone(f[h.at+8 : h.at+40])
	}
	return bytes.Clone(f[h.at+12 : h.at+20])
}

// sum is the ones' complement sum of RFC 1071.
func sum(with uint32, data []byte) uint16 {
	for i := 0; i+1 < len(data); i += 2 {
		with += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	if len(data)%2 == 1 {
		with += uint32(data[len(data)-1]) << 8
	}
	for with > 0xffff {
		with = with>>16 + with&0xffff
	}
	return uint16(with)
}

// translated is a frame of another flow.
func translated(frame []byte, six bool, to flow) []byte {
	f := bytes.Clone(frame)
	h, _ := readHeader(f, ethernet, six)
	h.put(f, to)
	h.seal(f)
	return f
}

// errorAbout is an ICMP error from one address to another, about a packet of which so many
// bytes are in it.
func errorAbout(packet []byte, six bool, from, to netip.Addr, kind, code byte, rest uint32) []byte {
	inside := packet[ethernet:]
	if most := 1280 - 48; len(inside) > most {
		inside = inside[:most]
	}
	body := binary.BigEndian.AppendUint32([]byte{kind, code, 0, 0}, rest)
	protocol := byte(icmp4)
	if six {
		protocol = icmp6
	}
	f := frameOf(flow{protocol, netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, 0)}, append(body, inside...))
	h, _ := readHeader(f, ethernet, six)
	h.seal(f)
	return f
}

// translatedError is an error of which the packet inside becomes another, but for its
// transport checksum, which nobody looks at.
func translatedError(frame []byte, six bool, from, to netip.Addr, inside flow) []byte {
	f := bytes.Clone(frame)
	outer, _ := readHeader(f, ethernet, six)
	inner, _ := readHeader(f, outer.payload+8, six)
	inner.put(f, inside)
	if !six {
		f[inner.at+10], f[inner.at+11] = 0, 0
		binary.BigEndian.PutUint16(f[inner.at+10:], ^sum(0, f[inner.at:inner.payload]))
		copy(f[outer.at+12:], from.AsSlice())
		copy(f[outer.at+16:], to.AsSlice())
	} else {
		copy(f[outer.at+8:], from.AsSlice())
		copy(f[outer.at+24:], to.AsSlice())
	}
	outer.seal(f)
	return f
}

// frameOf is a frame with a payload behind the IP header, without checksums.
func frameOf(is flow, payload []byte) []byte {
	f := make([]byte, 12, 64+len(payload))
	if is.from.Addr().Is4() {
		f = append(f, 8, 0, 0x45, 0)
		f = binary.BigEndian.AppendUint16(f, uint16(20+len(payload)))
		f = append(f, 0, 7, 0, 0, 64, is.protocol, 0, 0)
	} else {
		f = append(f, 0x86, 0xdd, 0x60, 0, 0, 0)
		f = binary.BigEndian.AppendUint16(f, uint16(len(payload)))
		f = append(f, is.protocol, 64)
	}
	f = append(append(f, is.from.Addr().AsSlice()...), is.to.Addr().AsSlice()...)
	return append(f, payload...)
}

// packetOf is a whole packet of a flow; the TCP flags are those of a SYN unless said.
func packetOf(is flow, payload []byte, flags ...byte) []byte {
	var head []byte
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, is.from.Port()), is.to.Port())
	switch is.protocol {
	case tcp:
		tcpFlags := byte(2)
		if len(flags) > 0 {
			tcpFlags = flags[0]
		}
		head = append(append(ports, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, tcpFlags), 1, 0, 1, 1, 0, 0)
	case udp:
		head = binary.BigEndian.AppendUint16(ports, uint16(8+len(payload)))
		head = append(head, 1, 1)
	default:
		kind := map[byte][2]byte{icmp4: {0, 8}, icmp6: {129, 128}}[is.protocol]
		of := kind[0]
		if is.from.Port() != 0 {
			of = kind[1]
		}
		head = append([]byte{of, 0, 1, 1}, ports[0]|ports[2], ports[1]|ports[3], 0, 9)
	}
	f := frameOf(is, append(head, payload...))
	h, _ := readHeader(f, ethernet, is.from.Addr().Is6())
	h.seal(f)
	return f
}
