package main

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// socket is one of the kernel's, which does not block.
type socket struct {
	fd        int
	tcp       bool
	connected bool // is to be, or is
	to        netip.AddrPort
}

func open(kind string, to netip.AddrPort) (*socket, error) {
	s := &socket{tcp: strings.HasPrefix(kind, "tcp"), connected: kind != "udp", to: to}
	family, transport := unix.AF_INET6, unix.SOCK_DGRAM
	if to.Addr().Is4() {
		family = unix.AF_INET
	}
	if s.tcp {
		transport = unix.SOCK_STREAM
	}
	var err error
	s.fd, err = unix.Socket(family, transport|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	return s, err
}

func (s *socket) close() { unix.Close(s.fd) }

func (s *socket) address() unix.Sockaddr {
	if s.to.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(s.to.Port()), Addr: s.to.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(s.to.Port()), Addr: s.to.Addr().As16()}
}

// connect does nothing for a socket that does not.
func (s *socket) connect(until time.Time) error {
	if !s.connected {
		return nil
	}
	err := unix.Connect(s.fd, s.address())
	if err != unix.EINPROGRESS && err != unix.EINTR {
		return err
	}
	if err := s.wait(unix.POLLOUT, until); err != nil {
		return err
	}
	number, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && number != 0 {
		err = unix.Errno(number)
	}
	return err
}

func (s *socket) send(request []byte) error {
	if s.connected {
		_, err := unix.Write(s.fd, request)
		return err
	}
	return unix.Sendto(s.fd, request, 0, s.address())
}

// receive waits for an answer: they are short, so one read has all of it.
func (s *socket) receive(until time.Time) ([]byte, error) {
	buffer := make([]byte, 1500)
	for {
		n, err := unix.Read(s.fd, buffer)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if err := s.wait(unix.POLLIN, until); err != nil {
				return nil, err
			}
		case err != nil:
			return nil, err
		case n == 0 && s.tcp:
			return nil, io.EOF
		default:
			return buffer[:n], nil
		}
	}
}

func (s *socket) wait(event int16, until time.Time) error {
	for {
		left := time.Until(until).Milliseconds()
		if left <= 0 {
			return errNoAnswer
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: event}}, int(left))
		if err != nil && err != unix.EINTR {
			return err
		}
		if n > 0 {
			return nil
		}
	}
}

// leadsTo is where the kernel's table says that a socket is connected to: at the
// socket path the endpoint, which getpeername() does not show. Empty if the socket
// is closed.
func (s *socket) leadsTo() string {
	var own unix.Stat_t
	if !s.connected || unix.Fstat(s.fd, &own) != nil {
		return ""
	}
	name := "udp"
	if s.tcp {
		name = "tcp"
	}
	if s.to.Addr().Is6() {
		name += "6"
	}
	table, err := os.ReadFile("/proc/self/net/" + name)
	if err != nil {
		return ""
	}
	for row := range strings.Lines(string(table)) {
		fields := strings.Fields(row)
		if len(fields) > 9 && fields[9] == fmt.Sprint(own.Ino) { // proc_net_tcp.rst: inode
			if to := fromTable(fields[2]); to.Port() != 0 {
				return to.String()
			}
		}
	}
	return ""
}

// fromTable reads 0100007F:1F90: words of four bytes in the host's order.
func fromTable(text string) netip.AddrPort {
	address, portText, _ := strings.Cut(text, ":")
	words, err := hex.DecodeString(address)
	port, portErr := hex.DecodeString(portText)
	if err != nil || portErr != nil || len(port) != 2 {
		return netip.AddrPort{}
	}
	for at := 0; at+4 <= len(words); at += 4 {
		binary.NativeEndian.PutUint32(words[at:], binary.BigEndian.Uint32(words[at:]))
	}
	addr, _ := netip.AddrFromSlice(words)
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(port))
}
