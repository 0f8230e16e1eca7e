package nft

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// packet is what rules can look at.
type packet struct {
	raw     []byte // from the network header on
	in, out string
	version byte // 4, 6, or 0 for what is no IP
	proto   byte
	// transport is where the transport header begins; -1 if it is not there.
	transport int
	fragment  bool // not the first part
}

// parse finds the headers.
func parse(raw []byte, in, out string) *packet {
	p := &packet{raw: raw, in: in, out: out, transport: -1}
	if len(raw) == 0 {
		return p
	}
	switch {
	case raw[0]>>4 == 4 && len(raw) >= 20:
		p.version, p.proto = 4, raw[9]
		offset := binary.BigEndian.Uint16(raw[6:])
		p.fragment = offset&0x1fff != 0
		if length := int(raw[0]&15) * 4; !p.fragment && length >= 20 {
			p.transport = length
		}
	case raw[0]>>4 == 6 && len(raw) >= 40:
		p.version = 6
		p.walk()
	}
	return p
}

// walk goes over the extension headers of IPv6 (RFC 8200, 4).
func (p *packet) walk() {
	next, at := p.raw[6], 40
	for at+8 <= len(p.raw) {
		switch next {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			next, at = p.raw[at], at+8+8*int(p.raw[at+1])
			continue
		case unix.IPPROTO_FRAGMENT:
			p.fragment = binary.BigEndian.Uint16(p.raw[at+2:])&^7 != 0
			next, at = p.raw[at], at+8
			if p.fragment {
				p.proto = next
				return
			}
			continue
		}
		break
	}
	p.proto, p.transport = next, at
}

// bytes are some of the packet; nil if they are not there or not known.
func (p *packet) bytes(base, offset, length uint32) []byte {
	from := -1
	switch base {
	case unix.NFT_PAYLOAD_NETWORK_HEADER:
		from = 0
	case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		from = p.transport
	}
	at := from + int(offset)
	if from < 0 || at+int(length) > len(p.raw) {
		return nil
	}
	return p.raw[at : at+int(length)]
}

// ports are the packet's, of protocols that have them.
func (p *packet) ports() (source, destination uint16, known bool) {
	b := p.bytes(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 4)
	if b == nil {
		return 0, 0, false
	}
	return binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]), true
}

// opens says that it is the first of a TCP connection: a SYN without an ACK.
func (p *packet) opens() bool {
	const syn, ack = 2, 16
	flags := p.bytes(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1)
	return p.proto == unix.IPPROTO_TCP && flags != nil && flags[0]&(syn|ack) == syn
}

// States of connections, as bits of nft(8) and of xt_conntrack alike.
const (
	stateEstablished = 1 << 1
	stateRelated     = 1 << 2
	stateNew         = 1 << 3
	stateUntracked   = 1 << 6
)

// stateNames are those bits' words.
func stateNames(mask uint32) (names []string) {
	for _, s := range []struct {
		bit  uint32
		name string
	}{{invalidBit, "invalid"}, {stateEstablished, "established"}, {stateRelated, "related"}, {stateNew, "new"}, {stateUntracked, "untracked"}} {
		if mask&s.bit != 0 {
			names = append(names, s.name)
		}
	}
	return names
}

// inState says whether a packet's connection may be in one of the states: only that one
// that opens a connection is not of one that is established is known.
func (p *packet) inState(mask uint32) Fit {
	if p.opens() {
		if mask&(stateNew|invalidBit|stateUntracked) == 0 {
			return No
		}
		if mask&stateNew != 0 {
			return Yes
		}
	}
	return Unknown
}

// values are what expressions have put into registers: 16 of four bytes.
type values struct {
	data  [64]byte
	known [16]bool
	// states says that a register holds the state of a connection, under mask.
	states [16]bool
	mask   [16]uint32
}

// put writes value at a place, as the kernel does: what is left of the last four bytes is
// zero. A nil value is one of length that is not known.
func (v *values) put(at int, value []byte, length int) {
	for i := at; i < at+(length+3)/4 && i < len(v.known); i++ {
		v.known[i], v.states[i] = value != nil, false
		for b := range 4 {
			v.data[4*i+b] = 0
			if n := 4*(i-at) + b; n < len(value) {
				v.data[4*i+b] = value[n]
			}
		}
	}
}

// get reads length bytes; nil if they are not known.
func (v *values) get(at, length int) []byte {
	for i := at; i < at+(length+3)/4; i++ {
		if i < 0 || i >= len(v.known) || !v.known[i] {
			return nil
		}
	}
	if at < 0 {
		return nil
	}
	return v.data[4*at : 4*at+length]
}
