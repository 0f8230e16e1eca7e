package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Tunnel is VXLAN from this node to another (RFC 7348). What goes in it is no ICMP for what
// is on the way.
type Tunnel struct {
	// From is this node's address outside, To the other's with its UDP port.
	From netip.Addr
	To   netip.AddrPort
	VNI  uint32
	// FromMAC and ToMAC are the hardware addresses inside, Source and Target addresses of
	// the two nodes there, of IPv4.
	FromMAC, ToMAC [6]byte
	Source, Target netip.Addr
}

const (
	ip4Header   = 20
	ip6Header   = 40
	udpHeader   = 8
	vxlanHeader = 8
	ethernet    = 14

	noCheck6 = 101 // UDP_NO_CHECK6_TX of linux/udp.h
)

// overhead is what is outside, in bytes.
func (t *Tunnel) overhead() int {
	if t.To.Addr().Is6() {
		return ip6Header + udpHeader + vxlanHeader + ethernet
	}
	return ip4Header + udpHeader + vxlanHeader + ethernet
}

// wrap puts an ICMP message into a packet inside, with all that is before it but the outer IP
// and UDP headers.
func (t *Tunnel) wrap(message []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x08<<24) // the network's number is valid
	b = binary.BigEndian.AppendUint32(b, t.VNI<<8)
	b = slices.Concat(b, t.ToMAC[:], t.FromMAC[:], []byte{0x08, 0x00})
	at := len(b)
	b = binary.BigEndian.AppendUint32(b, 0x4500<<16|uint32(ip4Header+len(message)))
	b = binary.BigEndian.AppendUint32(b, 0x4000) // Don't Fragment
	b = append(b, 64, unix.IPPROTO_ICMP, 0, 0)
	b = slices.Concat(b, t.Source.AsSlice(), t.Target.AsSlice())
	binary.BigEndian.PutUint16(b[at+10:], checksum(b[at:]))
	return append(b, message...)
}

// TunnelMTU finds how long packets that may not be cut reach the other node in VXLAN: at
// most bytes, with the outer IP header. It is as MTU, of what filters ICMP on the way.
func TunnelMTU(ctx context.Context, space string, t Tunnel, most int) (p Path, err error) {
	e := newEcho(t.Target)
	e.tunnel = &t
	defer e.close()
	if err := within(space, e.openTunnel); err != nil {
		return p, err
	}
	return e.longest(ctx, small+t.overhead(), most)
}

func (e *echo) openTunnel() (err error) {
	e.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMP)
	if err != nil {
		return unsent("open a raw socket, which takes CAP_NET_RAW", err)
	}
	family, level, discover, probing, errs := unix.AF_INET, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE, unix.IP_RECVERR
	unchecked := [2]int{unix.SOL_SOCKET, unix.SO_NO_CHECK} // as RFC 7348 asks
	from, to := sockaddr(netip.AddrPortFrom(e.tunnel.From, 0)), sockaddr(e.tunnel.To)
	if e.tunnel.To.Addr().Is6() {
		family, level, discover, probing, errs = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE, unix.IPV6_RECVERR
		unchecked = [2]int{unix.IPPROTO_UDP, noCheck6} // RFC 6935
	}
	e.out, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return unsent("open a socket", err)
	}
	err = errors.Join(unix.SetsockoptInt(e.out, level, discover, probing), unix.SetsockoptInt(e.out, level, errs, 1),
		unix.SetsockoptInt(e.out, unchecked[0], unchecked[1], 1), unix.Bind(e.out, from))
	if err != nil {
		return unsent("set up a socket for VXLAN", err)
	}
	return errors.Join(unix.Connect(e.fd, sockaddr(netip.AddrPortFrom(e.to, 0))), unix.Connect(e.out, to))
}

func sockaddr(to netip.AddrPort) unix.Sockaddr {
	if to.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
}
