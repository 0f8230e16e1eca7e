package dns

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// What stands before a message, and what a message begins with, in bytes.
const (
	ethernetLength = 14
	ip4Length      = 20
	ip6Length      = 40
	udpLength      = 8
	headerLength   = 12
	optLength      = 11
)

// How long an answer over UDP may be: what every client takes (RFC 1035, 4.2.1), and what
// is surely not fragmented, for those that say that they take more
// (https://www.dnsflagday.net/2020/).
const (
	leastAnswer = 512
	mostAnswer  = 1232
)

var errNoQuery = errors.New("what waits is no query")

// frame is an Ethernet frame with a query in it.
type frame struct {
	bytes []byte
	udp   int // where the UDP header is
}

// readFrame finds the query in what the program took. The program has looked at the
// lengths; here nothing is believed again.
func readFrame(bytes []byte) (frame, error) {
	f := frame{bytes: bytes}
	if len(bytes) < ethernetLength+ip4Length {
		return f, errNoQuery
	}
	ip := bytes[ethernetLength:]
	var datagram int
	switch etherType := binary.BigEndian.Uint16(bytes[12:]); {
	case etherType == 0x0800 && ip[0] == 0x45 && ip[9] == 17:
		f.udp, datagram = ethernetLength+ip4Length, int(binary.BigEndian.Uint16(ip[2:]))-ip4Length
	case etherType == 0x86dd && ip[0]>>4 == 6 && ip[6] == 17:
		f.udp, datagram = ethernetLength+ip6Length, int(binary.BigEndian.Uint16(ip[4:]))
	default:
		return f, errNoQuery
	}
	if len(bytes) < f.udp+udpLength+headerLength || f.udp+datagram != len(bytes) ||
		int(binary.BigEndian.Uint16(bytes[f.udp+4:])) != datagram {
		return f, errNoQuery
	}
	return f, nil
}

func (f frame) ip4() bool { return f.udp == ethernetLength+ip4Length }

// addresses are the pod's and the DNS Service's, as they stand in the frame.
func (f frame) addresses() (from, to []byte) {
	if f.ip4() {
		return f.bytes[f.udp-8 : f.udp-4], f.bytes[f.udp-4 : f.udp]
	}
	return f.bytes[f.udp-32 : f.udp-16], f.bytes[f.udp-16 : f.udp]
}

// from is who asked.
func (f frame) from() netip.AddrPort {
	from, _ := f.addresses()
	addr, _ := netip.AddrFromSlice(from)
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(f.bytes[f.udp:]))
}

func (f frame) message() []byte { return f.bytes[f.udp+udpLength:] }

// again is the frame as it came. Its checksum may be half of one, for the device to
// finish (CHECKSUM_PARTIAL).
func (f frame) again() []byte {
	if f.ip4() && f.bytes[f.udp+6] == 0 && f.bytes[f.udp+7] == 0 {
		return f.bytes // it has none (RFC 768)
	}
	from, to := f.addresses()
	putChecksum(from, to, f.bytes[f.udp:])
	return f.bytes
}

// answer is the frame of an answer: to whom asked, from whom was asked. Nil if the reply is
// none to the query.
func (f frame) answer(reply []byte) []byte {
	reply = fitting(f.message(), reply)
	if reply == nil {
		return nil
	}
	bytes := make([]byte, f.udp+udpLength, f.udp+udpLength+len(reply))
	copy(bytes[0:], f.bytes[6:12])
	copy(bytes[6:], f.bytes[0:6])
	copy(bytes[12:], f.bytes[12:14])
	from, to := f.addresses()
	ip, udp := bytes[ethernetLength:], bytes[f.udp:]
	datagram := udpLength + len(reply)
	if f.ip4() {
		ip[0], ip[6], ip[8], ip[9] = 0x45, 0x40, 64, 17 // may not be cut
		binary.BigEndian.PutUint16(ip[2:], uint16(ip4Length+datagram))
		copy(ip[12:], to)
		copy(ip[16:], from)
		binary.BigEndian.PutUint16(ip[10:], ^sum(0, ip[:ip4Length]))
	} else {
		ip[0], ip[6], ip[7] = 0x60, 17, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(datagram))
		copy(ip[8:], to)
		copy(ip[24:], from)
	}
	copy(udp[0:], f.bytes[f.udp+2:f.udp+4])
	copy(udp[2:], f.bytes[f.udp:f.udp+2])
	binary.BigEndian.PutUint16(udp[4:], uint16(datagram))
	bytes = append(bytes, reply...)
	putChecksum(to, from, bytes[f.udp:])
	return bytes
}

// putChecksum writes the checksum of a datagram (RFC 768; RFC 8200, 8.1).
func putChecksum(from, to, datagram []byte) {
	datagram[6], datagram[7] = 0, 0
	s := ^sum(sum2(uint32(17+len(datagram)), from, to), datagram)
	if s == 0 {
		s = 0xffff
	}
	binary.BigEndian.PutUint16(datagram[6:], s)
}

func sum2(begin uint32, a, b []byte) uint32 { return uint32(sum(uint32(sum(begin, a)), b)) }

// sum is the ones' complement sum of words (RFC 1071).
func sum(begin uint32, bytes []byte) uint16 {
	s := uint64(begin)
	for ; len(bytes) >= 2; bytes = bytes[2:] {
		s += uint64(binary.BigEndian.Uint16(bytes))
	}
	if len(bytes) > 0 {
		s += uint64(bytes[0]) << 8
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}

// fitting is a reply as the client may get it: with the id of its query, and no longer than
// it takes; else what says that it was cut (TC), so that it asks over TCP. Nil if it is no
// reply to the query.
func fitting(query, reply []byte) []byte {
	end := questionEnd(query)
	if end == 0 || len(reply) < end || reply[2]&0x80 == 0 || binary.BigEndian.Uint16(reply[4:]) != 1 ||
		string(reply[headerLength:end]) != string(query[headerLength:end]) {
		return nil
	}
	most, edns := payload(query[end:])
	fit := append([]byte{}, reply...)
	if len(fit) > most {
		fit = fit[:end]
		fit[2] |= 0x02
		copy(fit[6:headerLength], make([]byte, 6))
		if edns {
			fit[11] = 1
			fit = append(fit, 0, 0, 41, mostAnswer>>8, mostAnswer&0xff, 0, 0, 0, 0, 0, 0)
		}
	}
	copy(fit, query[:2])
	return fit
}

// questionEnd is where the first question of a message ends; 0 if it is malformed, or
// compressed.
func questionEnd(message []byte) int {
	at := headerLength
	for at < len(message) && message[at] > 0 && message[at] <= labelLimit {
		at += 1 + int(message[at])
	}
	if at+5 > len(message) || message[at] > 0 || at-headerLength > 254 {
		return 0
	}
	return at + 5
}

// payload reads what a client takes from what follows its question: an OPT record
// (RFC 6891, 6.1.2), or nothing.
func payload(after []byte) (most int, edns bool) {
	if len(after) < optLength || after[0] != 0 || binary.BigEndian.Uint16(after[1:]) != 41 {
		return leastAnswer, false
	}
	return min(max(int(binary.BigEndian.Uint16(after[3:])), leastAnswer), mostAnswer), true
}
