package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// small is what every path takes (68 bytes for IPv4, RFC 791).
	small = 64
	// smallTries packets of that size are sent before it is said that nobody answers.
	smallTries = 3
	smallFor   = time.Second
	// sizeTries are sent of each other size; at the end, edgeTries of those on either
	// side of the limit, so that chance is not taken for one.
	sizeTries, edgeTries = 2, 3
	// leastWait is for an answer to them, or four times what the small one took.
	leastWait, mostWait = 150 * time.Millisecond, time.Second
	// hopFor is longer than the kernel looks for a neighbour: 3 requests, a second each
	// (mcast_solicit and retrans_time_ms of arp(7) and ip-sysctl).
	hopFor = 3500 * time.Millisecond
	// mostAnnounced is how many routers may say a smaller size, one after the other.
	mostAnnounced = 8
	// mostStrange errors about other packets are passed over at a time.
	mostStrange = 64
)

// Path is how long packets on a way may be, in bytes with the IP header.
type Path struct {
	// Tried is the length that was to be found out, Passed the longest up to it that was
	// answered.
	Tried, Passed int
	// Announced is the least that a router said is its most (ICMP 3/4, ICMPv6 type 2), By
	// who did; 0 where none did.
	Announced int
	By        netip.Addr
	// Packets is how many were sent.
	Packets int
}

// Hop is who answered a packet that may take one step.
type Hop struct {
	// From is the destination itself where Arrived, else the router that gave it up.
	From    netip.Addr
	Arrived bool
	Took    time.Duration
}

// echo is a socket that sends echo requests to one address.
type echo struct {
	fd      int // by which answers come
	out     int // by which requests go, and errors come
	to      netip.Addr
	id, seq uint16
	packets int
	tunnel  *Tunnel // that requests go by, if any
}

// heard is what came back for a packet.
type heard struct {
	answered  bool
	took      time.Duration
	announced int        // the MTU that a router named
	expired   bool       // its TTL was used up
	from      netip.Addr // who said one of these
	err       error      // another error that a router or this kernel told
}

// MTU finds how long packets that may not be cut reach an address: at most bytes, or else
// by halves, some forty packets. The error is ErrSilent where small ones are not answered,
// ErrUnsent, or what the kernel says.
func MTU(ctx context.Context, space string, to netip.Addr, most int) (p Path, err error) {
	e, err := openEcho(space, to, 0)
	if err != nil {
		return p, err
	}
	defer e.close()
	return e.longest(ctx, small, most)
}

// longest finds how long packets are answered: least to most bytes.
func (e *echo) longest(ctx context.Context, least, most int) (p Path, err error) {
	p.Tried = most
	defer func() { p.Packets = e.packets }()
	first, err := e.ask(ctx, least, smallTries, smallFor)
	if err != nil {
		return p, err
	}
	if !first.answered {
		return p, fmt.Errorf("%w to %d packets of %d bytes", ErrSilent, smallTries, least)
	}
	wait := min(max(4*first.took, leastWait), mostWait)
	passed, failed := least, most+1
	for size, announced := most, 0; passed+1 < failed; {
		h, err := e.ask(ctx, size, sizeTries, wait)
		switch {
		case err != nil:
			return p, err
		case h.answered:
			passed = size
		default:
			failed = size
		}
		said := h.announced > 0 && h.announced < size
		if said && (p.Announced == 0 || h.announced < p.Announced) {
			p.Announced, p.By = h.announced, h.from
		}
		if said && h.announced > passed && announced < mostAnnounced {
			failed = h.announced + 1
			size = h.announced // a router names its own limit, which it is worth to try
			announced++
			continue
		}
		size = (passed + failed) / 2
	}
	if p.Passed = passed; passed == most {
		return p, nil
	}
	return p, e.sure(ctx, passed, wait)
}

// sure says whether a limit is one: what is longer never passes, and what is not does.
func (e *echo) sure(ctx context.Context, passed int, wait time.Duration) error {
	longer, err := e.ask(ctx, passed+1, edgeTries, wait)
	if err != nil {
		return err
	}
	again, err := e.ask(ctx, passed, edgeTries, wait)
	if err != nil {
		return err
	}
	if longer.answered || !again.answered {
		return fmt.Errorf("answers come and go whatever the size: packets of %d and %d bytes passed once and once not", passed, passed+1)
	}
	return nil
}

// FirstHop sends a packet that may take one step, and says who gave it up: the first
// router, or where there is none the address itself. Without an answer the error is
// EHOSTUNREACH if the neighbour does not resolve, or ErrSilent.
func FirstHop(ctx context.Context, space string, to netip.Addr) (Hop, error) {
	e, err := openEcho(space, to, 1)
	if err != nil {
		return Hop{}, err
	}
	defer e.close()
	for _, wait := range []time.Duration{hopFor, time.Second} {
		h, err := e.ask(ctx, small, 1, wait)
		switch {
		case err != nil:
			return Hop{}, err
		case h.answered:
			return Hop{From: to, Arrived: true, Took: h.took}, nil
		case h.expired:
			return Hop{From: h.from, Took: h.took}, nil
		}
	}
	return Hop{}, ErrSilent
}

// newEcho begins anywhere: who cannot see the packets has to guess 32 bits.
func newEcho(to netip.Addr) *echo {
	return &echo{to: to, id: uint16(rand.Uint32()), seq: uint16(rand.Uint32())}
}

// openEcho opens a socket for echoes that may not be cut, with a limit of hops unless 0.
func openEcho(space string, to netip.Addr, hops int) (*echo, error) {
	e := newEcho(to)
	family, protocol := unix.AF_INET, unix.IPPROTO_ICMP
	level, discover, errs, limit := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_RECVERR, unix.IP_TTL
	probing := unix.IP_PMTUDISC_PROBE
	var address unix.Sockaddr
	if to.Is6() {
		family, protocol = unix.AF_INET6, unix.IPPROTO_ICMPV6
		level, discover, errs, limit = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_RECVERR, unix.IPV6_UNICAST_HOPS
		probing = unix.IPV6_PMTUDISC_PROBE
		address = &unix.SockaddrInet6{Addr: to.As16()}
	} else {
		address = &unix.SockaddrInet4{Addr: to.As4()}
	}
	err := within(space, func() (err error) {
		e.fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
		if err != nil {
			return unsent("open a raw socket, which takes CAP_NET_RAW", err)
		}
		// PROBE forbids fragments, and does not believe what is known of the path (ip(7)).
		err = errors.Join(unix.SetsockoptInt(e.fd, level, discover, probing), unix.SetsockoptInt(e.fd, level, errs, 1))
		if hops > 0 {
			err = errors.Join(err, unix.SetsockoptInt(e.fd, level, limit, hops))
		}
		if err != nil {
			return unsent("set up a raw socket", err)
		}
		return unix.Connect(e.fd, address)
	})
	e.out = e.fd
	if err != nil {
		e.close()
	}
	return e, err
}

func (e *echo) close() {
	if e.fd > 0 {
		unix.Close(e.fd)
	}
	if e.out > 0 && e.out != e.fd {
		unix.Close(e.out)
	}
}

// ask sends packets of a size until one is answered, or somebody says why not.
func (e *echo) ask(ctx context.Context, size, tries int, wait time.Duration) (heard, error) {
	for range tries {
		if err := context.Cause(ctx); err != nil {
			return heard{}, err
		}
		h, err := e.once(size, wait)
		if err == nil {
			err = h.err
		}
		if err != nil || h.answered || h.expired || h.announced > 0 {
			return h, err
		}
	}
	return heard{}, nil
}

func (e *echo) once(size int, wait time.Duration) (heard, error) {
	for range 16 { // what came late for an earlier one
		if _, told := e.told(); !told {
			break
		}
	}
	unix.GetsockoptInt(e.out, unix.SOL_SOCKET, unix.SO_ERROR)
	e.seq++
	e.packets++
	begun := time.Now()
	if err := unix.Send(e.out, e.packet(size), 0); err != nil {
		return heard{}, fmt.Errorf("send %d bytes: %w", size, err)
	}
	for {
		left := wait - time.Since(begun)
		if left <= 0 {
			return heard{}, nil
		}
		ready := []unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}, {Fd: int32(e.out)}}
		if _, err := unix.Poll(ready, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return heard{}, fmt.Errorf("wait for an answer: %w", err)
		}
		if ready[1].Revents&unix.POLLERR != 0 {
			if h, told := e.told(); told {
				h.took = time.Since(begun)
				return h, nil
			}
			unix.GetsockoptInt(e.out, unix.SOL_SOCKET, unix.SO_ERROR)
		}
		if ready[0].Revents&unix.POLLIN != 0 && e.replied() {
			return heard{answered: true, took: time.Since(begun)}, nil
		}
	}
}

// packet is what is sent for a packet of size bytes on the wire.
func (e *echo) packet(size int) []byte {
	if e.tunnel == nil {
		return e.request(size)
	}
	return e.tunnel.wrap(e.request(size - e.tunnel.overhead()))
}

// request is an echo request that makes a packet of size bytes. The kernel makes the
// checksum of ICMPv6.
func (e *echo) request(size int) []byte {
	header, kind := 20, byte(8)
	if e.to.Is6() {
		header, kind = 40, 128
	}
	b := make([]byte, size-header)
	b[0] = kind
	binary.BigEndian.PutUint16(b[4:], e.id)
	binary.BigEndian.PutUint16(b[6:], e.seq)
	if e.to.Is4() {
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	}
	return b
}

// checksum is that of RFC 1071; the bytes that it is for are 0.
func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum>>16 > 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// replied reads what has come, until the answer to the last request is among it.
func (e *echo) replied() bool {
	b := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(e.fd, b, unix.MSG_DONTWAIT)
		if err != nil {
			return false
		}
		text, kind := b[:n], byte(129)
		if e.to.Is4() { // with the IP header
			kind = 0
			if n < 20 || n < int(b[0]&15)*4 {
				continue
			}
			text = b[int(b[0]&15)*4 : n]
		}
		if len(text) >= 8 && text[0] == kind && binary.BigEndian.Uint16(text[4:]) == e.id && binary.BigEndian.Uint16(text[6:]) == e.seq {
			return true
		}
	}
}

// told reads the next error that a router or this kernel has told of the last packet
// (recvmsg(2), MSG_ERRQUEUE; struct sock_extended_err of ip(7)), past those that quote
// another: anybody can send these.
func (e *echo) told() (h heard, ok bool) {
	b, control := make([]byte, 512), make([]byte, 512)
	for range mostStrange {
		quoted, n, _, _, err := unix.Recvmsg(e.out, b, control, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			return h, false
		}
		if h, ok = e.errorOf(control[:n], b[:quoted]); ok {
			return h, true
		}
	}
	return h, false
}

// errorOf reads one error, and what it quotes of the packet behind the headers that the
// socket made. What this kernel says itself quotes nothing.
func (e *echo) errorOf(control, quoted []byte) (h heard, ok bool) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return h, false
	}
	const size = 16 // of the struct; who told it comes after
	for _, m := range messages {
		if len(m.Data) < size || m.Header.Type != unix.IP_RECVERR && m.Header.Type != unix.IPV6_RECVERR {
			continue
		}
		if m.Data[4] != unix.SO_EE_ORIGIN_LOCAL && !e.quotes(quoted) {
			continue
		}
		number, kind, info := unix.Errno(binary.NativeEndian.Uint32(m.Data)), m.Data[5], binary.NativeEndian.Uint32(m.Data[8:])
		h.from = offender(m.Data[size:])
		switch {
		case number == unix.EMSGSIZE:
			h.announced = int(info)
		case kind == 11 && e.to.Is4() || kind == 3 && e.to.Is6():
			h.expired = true
		default:
			h.err = number
		}
		return h, true
	}
	return h, false
}

// quotes says whether what an error quotes is of the last request. A router need not quote
// more than 8 bytes behind the IP header (RFC 792). Of a request in a tunnel that is the UDP
// header alone, whose source port, by which the kernel found the socket, has to do.
func (e *echo) quotes(b []byte) bool {
	if e.tunnel != nil {
		if before := vxlanHeader + ethernet + ip4Header; len(b) >= before+8 {
			b = b[before:]
		} else {
			return true
		}
	}
	return len(b) >= 8 && binary.BigEndian.Uint16(b[4:]) == e.id && binary.BigEndian.Uint16(b[6:]) == e.seq
}

// offender is the address of a struct sockaddr_in or sockaddr_in6.
func offender(b []byte) netip.Addr {
	if len(b) < 8 {
		return netip.Addr{}
	}
	switch binary.NativeEndian.Uint16(b) {
	case unix.AF_INET:
		a, _ := netip.AddrFromSlice(b[4:8])
		return a
	case unix.AF_INET6:
		if len(b) >= 24 {
			a, _ := netip.AddrFromSlice(b[8:24])
			return a.Unmap()
		}
	}
	return netip.Addr{}
}
