package fault

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// nobodyListens takes a port that nobody has, or that somebody has at loopback only.
func nobodyListens(p *Part) error {
	p.blame(p.server)
	if p.draw(2) == 0 {
		return nil
	}
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if p.six {
		loopback = netip.IPv6Loopback()
	}
	on := netip.AddrPortFrom(loopback, p.port)
	return errors.Join(p.serve(p.server, on, echo), p.answers(p.server, on))
}

// closesUnread is a server that closes while data waits to be read.
func closesUnread(p *Part) error {
	p.blame(p.server)
	return p.serve(p.server, p.local(p.port), func(conn net.Conn) {
		conn.Read(make([]byte, 16))
		time.Sleep(50 * time.Millisecond) // the rest has come
	})
}

// longCalls ask for more than a small answer.
func longCalls(ctx context.Context, p *Part) {
	every(ctx, p.attempts, 100*time.Millisecond, func() { p.saw(p.call(ctx, 4000)) })
}

// deaf is a UDP server that does not read, with little room.
func deaf(p *Part) error {
	p.blame(p.server)
	conn, err := packetConn(p.server, p.local(p.port))
	if err != nil {
		return err
	}
	p.atEnd(func() { conn.Close() })
	return conn.SetReadBuffer(4096 << p.draw(3))
}

// pour sends many datagrams, and notes whether one was answered.
func pour(size, times int) func(context.Context, *Part) {
	return func(ctx context.Context, p *Part) {
		conn, err := p.connect(ctx, "udp")
		if err != nil {
			p.wrong(err)
			return
		}
		p.atEnd(func() { conn.Close() })
		for i := range times {
			if _, err := conn.Write(make([]byte, size)); err != nil && !errors.Is(err, unix.ENOBUFS) {
				p.saw(outcomeOf(err, Silent))
			}
			if i%50 == 49 && !rest(ctx, 20*time.Millisecond) {
				return
			}
		}
		conn.SetReadDeadline(time.Now().Add(answerTime))
		_, err = conn.Read(make([]byte, size))
		p.saw(outcomeOf(err, Silent))
	}
}

// stalled is a TCP server that accepts, and reads no more than it must.
func stalled(p *Part) error {
	p.blame(p.server)
	l, err := listen(p.server, p.local(p.port), 128)
	if err != nil {
		return err
	}
	p.atEnd(func() { l.Close() })
	go func() {
		for {
			conn, err := l.AcceptTCP()
			if err != nil {
				return
			}
			conn.SetReadBuffer(8192)
			p.atEnd(func() { conn.Close() })
		}
	}()
	return nil
}

// push writes until nothing goes any more, and stays.
func push(ctx context.Context, p *Part) {
	every(ctx, 1+p.draw(3), 100*time.Millisecond, func() {
		conn, err := p.connect(ctx, "tcp")
		if err != nil {
			p.saw(outcomeOf(err, Timeout))
			return
		}
		p.atEnd(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(patience))
		_, err = conn.Write(make([]byte, 32<<20))
		p.saw(outcomeOf(err, Hang))
	})
}

// filtered puts a filter at the server's socket that lets nothing in.
func filtered(p *Part) error {
	p.blame(p.server)
	none := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	attach := func(control func(func(uintptr)) error) error {
		var refused error
		err := control(func(fd uintptr) {
			refused = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &none[0]})
		})
		return errors.Join(err, refused)
	}
	conn, err := packetConn(p.server, p.local(p.port))
	if err != nil {
		return err
	}
	p.atEnd(func() { conn.Close() })
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	return attach(raw.Control)
}

// signed lets the server take from the client only what is signed with a password, which
// the client does not know of.
func signed(p *Part) error {
	p.blame(p.server)
	l, err := listen(p.server, p.local(p.port), 128)
	if err != nil {
		return err
	}
	p.atEnd(func() { l.Close() })
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	const addresses = 128 // bytes of struct sockaddr_storage, which struct tcp_md5sig of linux/tcp.h begins with
	value := make([]byte, addresses+8+80)
	family := uint16(unix.AF_INET)
	at := 4
	if p.six {
		family, at = unix.AF_INET6, 8
	}
	native.PutUint16(value, family)
	copy(value[at:], p.from.AsSlice())
	password := "sesame"
	native.PutUint16(value[addresses+2:], uint16(len(password)))
	copy(value[addresses+8:], password)
	var refused error
	err = raw.Control(func(fd uintptr) {
		refused = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, string(value))
	})
	return errors.Join(err, refused)
}

// pingless sets the server not to answer pings.
func pingless(p *Part) error {
	p.blame(p.server)
	if p.six {
		return p.server.set("net.ipv6.icmp.echo_ignore_all", "1")
	}
	return p.server.set("net.ipv4.icmp_echo_ignore_all", "1")
}

// pings are echo requests (RFC 792, RFC 4443), as ping(8) sends them.
func pings(ctx context.Context, p *Part) {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if p.six {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	var number atomic.Uint32
	every(ctx, p.attempts, 100*time.Millisecond, func() {
		var conn net.PacketConn
		err := p.client.do(func() (err error) { conn, err = net.ListenPacket(network, p.from.String()); return err })
		if err != nil {
			p.wrong(fmt.Errorf("make a socket for pings in %s: %w", p.client.name, err))
			return
		}
		defer conn.Close()
		message := []byte{request, 0, 0, 0, 0x6d, 0x72, 0, byte(number.Add(1))}
		if !p.six { // by IPv6 the kernel does it
			binary.BigEndian.PutUint16(message[2:], ^sum(0, message))
		}
		if _, err := conn.WriteTo(message, &net.IPAddr{IP: p.to.AsSlice()}); err != nil {
			p.saw(outcomeOf(err, Silent))
			return
		}
		conn.SetReadDeadline(time.Now().Add(answerTime))
		for answer := make([]byte, 64); ; {
			n, _, err := conn.ReadFrom(answer)
			if err != nil {
				p.saw(outcomeOf(err, Silent))
				return
			}
			if n >= 8 && answer[0] == reply && bytes.Equal(answer[4:8], message[4:8]) {
				p.saw(OK)
				return
			}
		}
	})
}

// fewPorts leaves the client a handful of ports.
func fewPorts(p *Part) error {
	p.blame(p.client)
	first := 33000 + p.random.IntN(20000)
	return p.client.set("net.ipv4.ip_local_port_range", fmt.Sprintf("%d %d", first, first+3+p.draw(8)))
}

// hold opens connections and keeps them until the end.
func hold(n int) func(context.Context, *Part) {
	return func(ctx context.Context, p *Part) {
		var mu sync.Mutex
		every(ctx, n, 20*time.Millisecond, func() {
			conn, err := p.connect(ctx, "tcp")
			if err != nil {
				p.saw(outcomeOf(err, Timeout))
				return
			}
			mu.Lock()
			defer mu.Unlock()
			p.atEnd(func() { conn.Close() })
			p.saw(p.exchange(ctx, conn, 10))
		})
	}
}

var socketFaults = []*Fault{
	{Name: "no-tcp-listener", behind: true, Number: "05a", Says: "Nobody listens at the TCP port.",
		Causes: []string{"no-listener"}, Seen: []Outcome{Refused}, induce: nobodyListens, send: calls},
	{Name: "no-udp-listener", behind: true, Number: "05b", Says: "Nobody listens at the UDP port.",
		Causes: []string{"no-listener"}, Seen: []Outcome{Refused}, induce: nobodyListens, send: questions},
	{Name: "udp-buffer-full", behind: true, Number: "09", Says: "A UDP server does not read: its receive buffer overflows.",
		Causes: []string{"receive-buffer-full"}, Seen: []Outcome{Silent}, induce: deaf, send: pour(800, 300)},
	{Name: "closed-unread", behind: true, Number: "19", Says: "A server closes with data unread, which resets the connection.",
		Causes: []string{"closed-with-unread-data"}, Seen: []Outcome{Reset}, induce: closesUnread, send: longCalls},
	{Name: "local-ports", Number: "20", Says: "The client has no local port left for this destination.", whole: true,
		Causes: []string{"local-ports-exhausted"}, Seen: []Outcome{NoAddress}, induce: serving(fewPorts), send: hold(20)},
	{Name: "socket-filter", behind: true, Number: "28", Says: "A filter at the server's socket lets nothing in.",
		Causes: []string{"socket-filter-drop"}, Seen: []Outcome{Silent}, induce: filtered, send: questions},
	{Name: "tcp-signature", Says: "A server of TCP wants its packets signed, and the client does not sign them.",
		Causes: []string{"tcp-signature"}, Seen: []Outcome{Timeout}, induce: signed, send: calls},
	{Name: "ping-ignored", Says: "A host is set not to answer pings.",
		Causes: []string{"ping-ignored"}, Seen: []Outcome{Silent}, induce: pingless, send: pings},
	{Name: "zero-window", once: true, behind: true, Number: "30", Says: "A server does not read: its window is closed, and the sender waits.",
		Causes: []string{"receiver-stalled"}, Seen: []Outcome{Hang}, induce: stalled, send: push},
}
