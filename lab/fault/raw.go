package fault

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// raw sends packets made by hand to the client's gate.
type raw struct {
	fd, index int
	to        net.HardwareAddr
}

// openRaw says what goes wrong; without a packet socket there is nothing to send with.
func openRaw(p *Part) (r *raw, ok bool) {
	from := p.client
	r = &raw{index: from.index(from.device), to: p.gate().mac(p.gate().device)}
	err := from.do(func() (err error) {
		r.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		p.wrong(fmt.Errorf("make a packet socket in %s: %w", from.name, err))
	}
	return r, err == nil
}

func (r *raw) close() { unix.Close(r.fd) }

// send sends an IP packet.
func (r *raw) send(packet []byte) error {
	to := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: r.index, Halen: 6}
	if packet[0]>>4 == 6 {
		to.Protocol = htons(unix.ETH_P_IPV6)
	}
	copy(to.Addr[:], r.to)
	if err := unix.Sendto(r.fd, packet, 0, to); err != nil {
		return fmt.Errorf("send a packet: %w", err)
	}
	return nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// ipHeader is that of a packet with a payload of length n.
func ipHeader(from, to netip.Addr, protocol byte, n int, identity, fragment uint16) []byte {
	if from.Is4() {
		h := make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, protocol
		binary.BigEndian.PutUint16(h[2:], uint16(20+n))
		binary.BigEndian.PutUint16(h[4:], identity)
		binary.BigEndian.PutUint16(h[6:], fragment)
		copy(h[12:], from.AsSlice())
		copy(h[16:], to.AsSlice())
		binary.BigEndian.PutUint16(h[10:], ^sum(0, h))
		return h
	}
	h := make([]byte, 40, 48)
	h[0], h[6], h[7] = 0x60, protocol, 64
	copy(h[8:], from.AsSlice())
	copy(h[24:], to.AsSlice())
	if fragment != 0 { // a header of fragments (RFC 8200, 4.5); the flag is the last bit there
		h[6] = unix.IPPROTO_FRAGMENT
		extra := []byte{protocol, 0, 0, 0, 0, 0, byte(identity >> 8), byte(identity)}
		offset := fragment&0x1fff<<3 | fragment>>13&1
		binary.BigEndian.PutUint16(extra[2:], offset)
		h = append(h, extra...)
	}
	binary.BigEndian.PutUint16(h[4:], uint16(len(h)-40+n))
	return h
}

// sum is the Internet's checksum (RFC 1071), not inverted.
func sum(start uint32, b []byte) uint16 {
	for i := 0; i+1 < len(b); i += 2 {
		start += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		start += uint32(b[len(b)-1]) << 8
	}
	for start > 0xffff {
		start = start>>16 + start&0xffff
	}
	return uint16(start)
}

// transport completes a header and its payload with the checksum, to which wrong is added.
func transport(from, to netip.Addr, protocol byte, at int, segment []byte, wrong uint16) []byte {
	pseudo := append(from.AsSlice(), to.AsSlice()...)
	pseudo = append(pseudo, 0, protocol, byte(len(segment)>>8), byte(len(segment)))
	binary.BigEndian.PutUint16(segment[at:], ^sum(uint32(sum(0, pseudo)), segment)+wrong)
	return segment
}

// datagram is a packet of UDP; wrong spoils its checksum.
func datagram(from, to netip.AddrPort, payload []byte, wrong uint16) []byte {
	segment := udpSegment(from, to, payload, wrong)
	return append(ipHeader(from.Addr(), to.Addr(), unix.IPPROTO_UDP, len(segment), 0, 0), segment...)
}

func udpSegment(from, to netip.AddrPort, payload []byte, wrong uint16) []byte {
	s := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(s, from.Port())
	binary.BigEndian.PutUint16(s[2:], to.Port())
	binary.BigEndian.PutUint16(s[4:], uint16(8+len(payload)))
	return transport(from.Addr(), to.Addr(), unix.IPPROTO_UDP, 6, append(s, payload...), wrong)
}

// Flags of TCP.
const (
	synFlag = 2
	ackFlag = 16
)

// segment is a packet of TCP; wrong spoils its checksum.
func segment(from, to netip.AddrPort, flags byte, number uint32, payload []byte, wrong uint16) []byte {
	s := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(s, from.Port())
	binary.BigEndian.PutUint16(s[2:], to.Port())
	binary.BigEndian.PutUint32(s[4:], number)
	s[12], s[13] = 5<<4, flags
	binary.BigEndian.PutUint16(s[14:], 65000)
	s = transport(from.Addr(), to.Addr(), unix.IPPROTO_TCP, 16, append(s, payload...), wrong)
	return append(ipHeader(from.Addr(), to.Addr(), unix.IPPROTO_TCP, len(s), 0, 0), s...)
}
