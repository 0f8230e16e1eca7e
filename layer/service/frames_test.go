package service

import (
	"encoding/binary"
	"encoding/hex"
	"flag"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// Frames for the tests of the programs, built from the RFCs, without the code
// under test.

var seedFlag = flag.Uint64("seed", 0, "repeat a test of random packets that printed this seed")

// seedOf is another seed for each run. It is logged, so that a failure can be
// repeated.
func seedOf(t testing.TB) uint64 {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("repeat with -seed %d", seed)
	return seed
}

// Protocol numbers (IANA), and a few that are none of ours.
const (
	protoHopByHop    = 0
	protoICMP        = 1
	protoTCP         = 6
	protoUDP         = 17
	protoRouting     = 43
	protoFragment    = 44
	protoESP         = 50
	protoAuth        = 51
	protoICMPv6      = 58
	protoNoNext      = 59
	protoDestination = 60
	protoSCTP        = 132
)

const (
	flagFIN = 1 << iota
	flagSYN
	flagRST
	flagPSH
	flagACK
)

func be16(v int) []byte { return binary.BigEndian.AppendUint16(nil, uint16(v)) }

func ether(kind int, payload []byte) []byte {
	return slices.Concat([]byte{2, 0, 0, 0, 0, 0xb, 2, 0, 0, 0, 0, 0xa}, be16(kind), payload)
}

// onesSum is the ones' complement sum of RFC 1071 over parts, each but the last
// of even length.
func onesSum(parts ...[]byte) uint16 {
	sum := uint64(0)
	for _, part := range parts {
		for i, b := range part {
			sum += uint64(b) << (8 * (1 - i%2))
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// pseudo is the pseudo header: RFC 9293 3.1 and RFC 768 for IPv4, RFC 8200 8.1.
func pseudo(from, to netip.Addr, protocol, length int) []byte {
	if from.Is4() {
		return slices.Concat(from.AsSlice(), to.AsSlice(), []byte{0, byte(protocol)}, be16(length))
	}
	return slices.Concat(from.AsSlice(), to.AsSlice(), []byte{0, 0}, be16(length), []byte{0, 0, 0, byte(protocol)})
}

// fragmented says which part of a datagram a packet is: an offset in units of
// eight bytes, whether more follow, and the datagram's number.
type fragmented struct {
	offset, id int
	more       bool
}

// ip4 puts an IPv4 header before a payload. Options are a multiple of four bytes.
func ip4(from, to netip.Addr, protocol int, options []byte, f fragmented, payload []byte) []byte {
	bits := f.offset
	if f.more {
		bits |= 0x2000
	}
	header := slices.Concat([]byte{byte(0x45 + len(options)/4), 0}, be16(20+len(options)+len(payload)), be16(f.id), be16(bits),
		[]byte{64, byte(protocol), 0, 0}, from.AsSlice(), to.AsSlice(), options)
	binary.BigEndian.PutUint16(header[10:], ^onesSum(header))
	return append(header, payload...)
}

// extension is an IPv6 extension header; its first byte is filled in.
type extension struct {
	kind int
	data []byte
}

// padded is an extension header of options alone, all of them PadN (RFC 8200, 4.2).
func padded(kind, words int) extension {
	data := make([]byte, 8*(words+1))
	data[1], data[2], data[3] = byte(words), 1, byte(len(data)-4)
	return extension{kind, data}
}

// fragmentHeader is RFC 8200, 4.5.
func fragmentHeader(f fragmented) extension {
	bits := f.offset << 3
	if f.more {
		bits |= 1
	}
	return extension{protoFragment, slices.Concat([]byte{0, 0}, be16(bits), be16(f.id>>16), be16(f.id&0xffff))}
}

// authentication is RFC 4302: its length counts words of four bytes, less two.
func authentication(words int) extension {
	data := make([]byte, 4*words)
	data[1] = byte(words - 2)
	return extension{protoAuth, data}
}

func ip6(from, to netip.Addr, extensions []extension, protocol int, payload []byte) []byte {
	next, chain := protocol, []byte(nil)
	for _, e := range slices.Backward(extensions) {
		data := slices.Clone(e.data)
		data[0] = byte(next)
		chain, next = append(data, chain...), e.kind
	}
	return slices.Concat([]byte{0x60, 0, 0, 0}, be16(len(chain)+len(payload)), []byte{byte(next), 64},
		from.AsSlice(), to.AsSlice(), chain, payload)
}

// tcp and udp build a segment with its checksum.
func tcp(from, to netip.AddrPort, flags int, payload []byte) []byte {
	segment := slices.Concat(be16(int(from.Port())), be16(int(to.Port())), []byte{0, 0, 0, 1, 0, 0, 0, 2, 0x50, byte(flags), 0xff, 0xff, 0, 0, 0, 0}, payload)
	return summed(segment, 16, from.Addr(), to.Addr(), protoTCP)
}

func udp(from, to netip.AddrPort, payload []byte) []byte {
	segment := slices.Concat(be16(int(from.Port())), be16(int(to.Port())), be16(8+len(payload)), []byte{0, 0}, payload)
	segment = summed(segment, 6, from.Addr(), to.Addr(), protoUDP)
	if segment[6] == 0 && segment[7] == 0 {
		segment[6], segment[7] = 0xff, 0xff // RFC 768
	}
	return segment
}

func summed(segment []byte, at int, from, to netip.Addr, protocol int) []byte {
	binary.BigEndian.PutUint16(segment[at:], ^onesSum(pseudo(from, to, protocol, len(segment)), segment))
	return segment
}

func segment(protocol int, from, to netip.AddrPort, flags int, payload []byte) []byte {
	if protocol == protoTCP {
		return tcp(from, to, flags, payload)
	}
	return udp(from, to, payload)
}

// icmp4 and icmp6 build a message about a packet: RFC 792, RFC 4443.
func icmp4(kind, code int, about []byte) []byte {
	message := append([]byte{byte(kind), byte(code), 0, 0, 0, 0, 0, 0}, about...)
	binary.BigEndian.PutUint16(message[2:], ^onesSum(message))
	return message
}

func icmp6(from, to netip.Addr, kind, code int, about []byte) []byte {
	message := append([]byte{byte(kind), byte(code), 0, 0, 0, 0, 0, 0}, about...)
	return summed(message, 2, from, to, protoICMPv6)
}

// packetOf is the IP packet of whichever family the addresses are.
func packetOf(from, to netip.Addr, protocol int, payload []byte) []byte {
	if from.Is4() {
		return ip4(from, to, protocol, nil, fragmented{}, payload)
	}
	return ip6(from, to, nil, protocol, payload)
}

// frame puts an IP packet into Ethernet.
func frame(packet []byte) []byte {
	if packet[0]>>4 == 4 {
		return ether(0x0800, packet)
	}
	return ether(0x86dd, packet)
}

// errorAbout is a frame with an ICMP error about a packet, of which it holds the
// first bytes.
func errorAbout(from, to netip.Addr, kind, code int, about []byte) []byte {
	if from.Is4() {
		return frame(ip4(from, to, protoICMP, nil, fragmented{}, icmp4(kind, code, about)))
	}
	return frame(ip6(from, to, nil, protoICMPv6, icmp6(from, to, kind, code, about)))
}

// shapes are frames of every kind that the parser knows, and of many that it must
// leave alone: the corpus for fuzzing.
func shapes() (all [][]byte) {
	add := func(packets ...[]byte) {
		for _, p := range packets {
			all = append(all, frame(p))
		}
	}
	client4, service4 := netip.MustParseAddrPort("10.244.1.4:5000"), netip.MustParseAddrPort("10.96.0.1:80")
	client6, service6 := netip.MustParseAddrPort("[fd00:244::4]:5000"), netip.MustParseAddrPort("[fd00:96::1]:80")
	for flags := range 64 {
		add(ip4(client4.Addr(), service4.Addr(), protoTCP, nil, fragmented{}, tcp(client4, service4, flags, nil)))
	}
	add(shapes4(client4, service4)...)
	add(shapes6(client6, service6)...)
	inner4 := ip4(service4.Addr(), client4.Addr(), protoTCP, nil, fragmented{}, tcp(service4, client4, flagACK, nil))
	inner6 := ip6(service6.Addr(), client6.Addr(), nil, protoUDP, udp(service6, client6, []byte("abc")))
	for kind := range 32 {
		for _, inner := range [][]byte{inner4, inner6} {
			all = append(all, errorAbout(client4.Addr(), service4.Addr(), kind, 0, inner), errorAbout(client6.Addr(), service6.Addr(), kind, 0, inner))
		}
	}
	for _, inner := range slices.Concat(shapes4(client4, service4), shapes6(client6, service6)) {
		for _, kind := range []int{1, 3} {
			all = append(all, errorAbout(client4.Addr(), service4.Addr(), kind, 4, inner), errorAbout(client6.Addr(), service6.Addr(), kind, 4, inner))
		}
	}
	all = append(all,
		ether(0x0806, make([]byte, 28)),                          // ARP
		ether(0x8100, slices.Concat([]byte{0, 7, 8, 0}, inner4)), // VLAN
		ether(0x86dd, inner4), ether(0x0800, inner6),             // of another family than it says
	)
	return all
}

// cut are frames that end early, in each of their headers.
func cut(frames [][]byte) (all [][]byte) {
	for _, whole := range frames {
		for _, n := range []int{15, 33, 34, 38, 42, 53, 54, 58, 61, 62, 70, 74, 82, 90, 110} {
			if n < len(whole) {
				all = append(all, whole[:n])
			}
		}
	}
	return all
}

func shapes4(from, to netip.AddrPort) (all [][]byte) {
	payload := []byte("0123456789abcdef0123456789abcdef")
	for _, protocol := range []int{protoTCP, protoUDP} {
		whole := segment(protocol, from, to, flagSYN, payload)
		for _, options := range [][]byte{nil, {1, 1, 1, 0}, make([]byte, 40)} {
			all = append(all, ip4(from.Addr(), to.Addr(), protocol, options, fragmented{}, whole),
				ip4(from.Addr(), to.Addr(), protocol, options, fragmented{0, 77, true}, whole[:24]),
				ip4(from.Addr(), to.Addr(), protocol, options, fragmented{3, 77, true}, whole[24:32]),
				ip4(from.Addr(), to.Addr(), protocol, options, fragmented{4, 77, false}, whole[32:]))
		}
		dont := ip4(from.Addr(), to.Addr(), protocol, nil, fragmented{offset: 0x4000}, whole) // DF
		short := slices.Clone(dont)
		short[0] = 0x44
		all = append(all, dont, short)
	}
	for _, protocol := range []int{protoICMP, protoICMPv6, protoESP, protoSCTP, 2, 4, 41, 47} {
		all = append(all, ip4(from.Addr(), to.Addr(), protocol, nil, fragmented{}, payload))
	}
	return all
}

func shapes6(from, to netip.AddrPort) (all [][]byte) {
	payload := []byte("0123456789abcdef0123456789abcdef")
	chains := [][]extension{nil,
		{padded(protoHopByHop, 0)}, {padded(protoRouting, 2)}, {padded(protoDestination, 31)}, {authentication(6)},
		{padded(protoHopByHop, 0), padded(protoDestination, 0), padded(protoRouting, 0), authentication(3), padded(protoDestination, 1)},
		{padded(protoDestination, 127), padded(protoDestination, 0)}, {padded(protoDestination, 119)},
		{padded(protoDestination, 119), padded(protoDestination, 0)}, {padded(protoDestination, 119), padded(protoDestination, 1)},
		{fragmentHeader(fragmented{id: 0xabcdef01})}, // an atomic fragment, RFC 6946
		{fragmentHeader(fragmented{0, 0xabcdef01, true})},
		{fragmentHeader(fragmented{3, 0xabcdef01, true})}, {fragmentHeader(fragmented{9, 0xabcdef01, false})},
		{padded(protoHopByHop, 0), fragmentHeader(fragmented{0, 5, true}), padded(protoDestination, 0)},
		{fragmentHeader(fragmented{9, 5, true}), fragmentHeader(fragmented{0, 6, true})},
	}
	for n := 7; n <= 10; n++ {
		chains = append(chains, slices.Repeat([]extension{padded(protoDestination, 0)}, n))
	}
	for _, protocol := range []int{protoTCP, protoUDP, protoICMPv6, protoESP, protoNoNext, protoSCTP, 135} {
		whole := payload
		if protocol == protoTCP || protocol == protoUDP {
			whole = segment(protocol, from, to, flagSYN, payload)
		}
		for _, chain := range chains {
			all = append(all, ip6(from.Addr(), to.Addr(), chain, protocol, whole))
		}
	}
	return all
}

// mutated changes a frame here and there: a few bytes, its length, or a length,
// type or offset of a header.
func mutated(r *rand.Rand, whole []byte) []byte {
	f := slices.Clone(whole)
	for range r.IntN(4) {
		switch r.IntN(5) {
		case 0:
			f[r.IntN(len(f))] = byte(r.Uint32())
		case 1:
			f[r.IntN(len(f))] ^= 1 << r.IntN(8)
		case 2: // where the headers are
			f[12+r.IntN(min(len(f)-12, 60))] = byte(r.Uint32())
		case 3:
			f = f[:15+r.IntN(len(f)-14)]
		case 4:
			f = append(f, make([]byte, r.IntN(20))...)
		}
	}
	return f
}

func hexOf(b []byte) string { return hex.EncodeToString(b) }
