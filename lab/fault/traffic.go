package fault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long an application waits for a connection, answerTime for an answer
// to a datagram.
const (
	patience   = 1500 * time.Millisecond
	answerTime = 300 * time.Millisecond
)

// lateBind lets connect choose the port, as it does for sockets that bind nothing.
func lateBind(_, _ string, raw syscall.RawConn) error {
	var refused error
	err := raw.Control(func(fd uintptr) {
		refused = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	})
	return errors.Join(err, refused)
}

// dial connects from a space.
func dial(ctx context.Context, at *space, network string, from netip.Addr, to netip.AddrPort, timeout time.Duration) (conn net.Conn, err error) {
	d := net.Dialer{Timeout: timeout, KeepAlive: -1, Control: lateBind}
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		if network == "udp" {
			d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		}
	}
	err = at.do(func() (err error) { conn, err = d.DialContext(ctx, network, to.String()); return err })
	return conn, err
}

// connect is the part's client: from its address to its server, or to the address that
// stands for it.
func (p *Part) connect(ctx context.Context, network string) (net.Conn, error) {
	to := p.local(p.port)
	if p.service.IsValid() {
		to = p.service
	}
	return dial(ctx, p.client, network, p.from, to, patience)
}

// listen opens a listener of TCP; queue is how many connections may wait to be accepted.
func listen(at *space, on netip.AddrPort, queue int) (*net.TCPListener, error) {
	var listener net.Listener
	err := at.do(func() error {
		family, to := sockaddr(on)
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("make a socket: %w", err)
		}
		err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, to))
		if err == nil {
			err = unix.Listen(fd, queue)
		}
		file := os.NewFile(uintptr(fd), "listener")
		defer file.Close()
		if err == nil {
			listener, err = net.FileListener(file)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen at %s in %s: %w", on, at.name, err)
	}
	return listener.(*net.TCPListener), nil
}

// sockaddr is an address as system calls want it.
func sockaddr(a netip.AddrPort) (family int, to unix.Sockaddr) {
	if a.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// serve accepts connections until the part ends, each answered by f in a goroutine.
func (p *Part) serve(at *space, on netip.AddrPort, f func(net.Conn)) error {
	l, err := listen(at, on, 128)
	if err != nil {
		return err
	}
	p.atEnd(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				f(conn)
			}()
		}
	}()
	return nil
}

// echo gives back what it gets.
func echo(conn net.Conn) { io.Copy(conn, conn) }

// echoServer is a TCP server at the part's target.
func (p *Part) echoServer() error { return p.serve(p.server, p.local(p.port), echo) }

// packetConn opens a UDP socket.
func packetConn(at *space, on netip.AddrPort) (conn *net.UDPConn, err error) {
	err = at.do(func() (err error) { conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(on)); return err })
	if err != nil {
		return nil, fmt.Errorf("listen at %s/udp in %s: %w", on, at.name, err)
	}
	return conn, nil
}

// answers is a UDP server that answers from a port of the part's target.
func (p *Part) answers(at *space, on netip.AddrPort) error {
	conn, err := packetConn(at, on)
	if err != nil {
		return err
	}
	p.atEnd(func() { conn.Close() })
	go func() {
		buffer := make([]byte, 65536)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				conn.WriteToUDPAddrPort(buffer[:n], from)
			}
		}
	}()
	return nil
}

// call connects, sends, waits for the answer of the echo server, and says how it went.
func (p *Part) call(ctx context.Context, size int) Outcome {
	conn, err := p.connect(ctx, "tcp")
	if err != nil {
		return outcomeOf(err, Timeout)
	}
	defer conn.Close()
	return p.exchange(ctx, conn, size)
}

// exchange sends size bytes to an echo server and reads them.
func (p *Part) exchange(ctx context.Context, conn net.Conn, size int) Outcome {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	conn.SetDeadline(time.Now().Add(patience))
	sent := make(chan error, 1)
	go func() { _, err := conn.Write(make([]byte, size)); sent <- err }()
	_, err := io.ReadFull(conn, make([]byte, size))
	if err == nil {
		err = <-sent
	}
	return outcomeOf(err, Hang)
}

// calls is the usual application of TCP: some connections, each with a question.
func calls(ctx context.Context, p *Part) {
	every(ctx, p.attempts, 100*time.Millisecond, func() { p.saw(p.call(ctx, 100)) })
}

// ask sends a datagram and waits for its answer.
func (p *Part) ask(ctx context.Context, size int) Outcome {
	conn, err := p.connect(ctx, "udp")
	if err != nil {
		return outcomeOf(err, Timeout)
	}
	defer conn.Close()
	for range 2 {
		if _, err := conn.Write(make([]byte, size)); err != nil {
			return outcomeOf(err, Silent)
		}
		conn.SetDeadline(time.Now().Add(answerTime))
		_, err = conn.Read(make([]byte, 65536))
		if outcome := outcomeOf(err, Silent); outcome != Silent {
			return outcome
		}
	}
	return Silent
}

// questions is the usual application of UDP.
func questions(ctx context.Context, p *Part) {
	every(ctx, p.attempts, 100*time.Millisecond, func() { p.saw(p.ask(ctx, 64)) })
}

// callsOrQuestions are either, where the fault makes no difference between them.
func callsOrQuestions(ctx context.Context, p *Part) {
	if p.udp {
		questions(ctx, p)
		return
	}
	calls(ctx, p)
}

// servers are both servers at the part's target.
func (p *Part) servers() error {
	return errors.Join(p.echoServer(), p.answers(p.server, p.local(p.port)))
}

// serving induces nothing but servers, and then what is given.
func serving(more ...func(*Part) error) func(*Part) error {
	return func(p *Part) error {
		if err := p.servers(); err != nil {
			return err
		}
		for _, induce := range more {
			if err := induce(p); err != nil {
				return err
			}
		}
		return nil
	}
}
