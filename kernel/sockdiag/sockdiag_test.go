package sockdiag

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// house is a network namespace with loopback up.
func house(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and closes sockets")
	}
	path := filepath.Join(t.TempDir(), "net")
	must(t, netns.Create(path))
	t.Cleanup(func() { must(t, netns.Remove(path)) })
	must(t, netns.Do(path, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	}))
	return path
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// listen takes connections and reads from them until the test ends.
func listen(t *testing.T, path, network, address string) {
	t.Helper()
	must(t, netns.Do(path, func() error {
		if network == "udp" {
			conn, err := net.ListenPacket(network, address)
			if err == nil {
				t.Cleanup(func() { conn.Close() })
			}
			return err
		}
		listener, err := net.Listen(network, address)
		if err != nil {
			return err
		}
		t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				t.Cleanup(func() { conn.Close() })
			}
		}()
		return nil
	}))
}

// dial connects and names the socket.
func dial(t *testing.T, path, network, address string) (net.Conn, Socket) {
	t.Helper()
	var conn net.Conn
	must(t, netns.Do(path, func() (err error) {
		conn, err = net.Dial(network, address)
		return err
	}))
	t.Cleanup(func() { conn.Close() })
	return conn, nameOf(t, path, conn)
}

func nameOf(t *testing.T, path string, conn net.Conn) Socket {
	t.Helper()
	s := Socket{
		Protocol: unix.IPPROTO_UDP,
		Local:    netip.MustParseAddrPort(conn.LocalAddr().String()),
		Remote:   netip.MustParseAddrPort(conn.RemoteAddr().String()),
	}
	if _, stream := conn.(*net.TCPConn); stream {
		s.Protocol = unix.IPPROTO_TCP
	}
	raw, err := conn.(syscall.Conn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		s.Cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
	}))
	must(t, err)
	var found unix.Stat_t
	must(t, unix.Stat(path, &found))
	s.Namespace = uint32(found.Ino)
	return s
}

// open says whether a connection still waits for something to read.
func open(conn net.Conn) error {
	conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("it is closed: %v", err)
	}
	return nil
}

// ways are the means of closing; an absent one is skipped.
func ways(t *testing.T, f func(t *testing.T, c *Closer)) {
	t.Run("by netlink", func(t *testing.T) {
		if err := probeNetlink(); err != nil {
			t.Skipf("needs a kernel with SOCK_DESTROY: %v", err)
		}
		f(t, &Closer{})
	})
	t.Run("by walking", func(t *testing.T) {
		w, err := newWalker()
		if err != nil {
			t.Skipf("needs a kernel with bpf_sock_destroy: %v", err)
		}
		c := &Closer{walker: w}
		defer c.End()
		f(t, c)
	})
}

func TestTheNamedSocketIsClosedAndNoOther(t *testing.T) {
	here, there := house(t), house(t)
	ways(t, func(t *testing.T, c *Closer) {
		for i, row := range []struct{ network, address string }{
			{"tcp", "127.0.0.1"}, {"tcp", "[::1]"}, {"udp", "127.0.0.1"}, {"udp", "[::1]"},
		} {
			address := fmt.Sprintf("%s:%d", row.address, 8000+i)
			listen(t, here, row.network, address)
			listen(t, there, row.network, address)
			closed, named := dial(t, here, row.network, address)
			other, namedOther := dial(t, there, row.network, address)
			neighbour, _ := dial(t, here, row.network, address)
			reading := make(chan error, 1)
			go func() {
				_, err := closed.Read(make([]byte, 1))
				reading <- err
			}()
			wrong := namedOther // as if another socket had come to its addresses
			wrong.Cookie = named.Cookie
			for i, err := range c.Close([]Socket{named, wrong}) {
				if want := []error{nil, ErrEnded}[i]; !errors.Is(err, want) {
					t.Errorf("%s %s: close: %v, want %v", row.network, address, err, want)
				}
			}
			if err := <-reading; !errors.Is(err, syscall.ECONNABORTED) {
				t.Errorf("%s %s: whoever reads meets %v, want ECONNABORTED", row.network, address, err)
			}
			if err := errors.Join(open(neighbour), open(other)); err != nil {
				t.Errorf("%s %s: another socket: %v", row.network, address, err)
			}
			if err := c.Close([]Socket{named})[0]; !errors.Is(err, ErrEnded) {
				t.Errorf("%s %s: closing it again: %v", row.network, address, err)
			}
		}
	})
}

// A socket of family AF_INET6 can talk to IPv4 as ::ffff:a.b.c.d.
func TestMappedSockets(t *testing.T) {
	here := house(t)
	ways(t, func(t *testing.T, c *Closer) {
		for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM} {
			listen(t, here, map[int]string{unix.SOCK_STREAM: "tcp", unix.SOCK_DGRAM: "udp"}[kind], "127.0.0.1:9000")
			var fd int
			must(t, netns.Do(here, func() (err error) {
				if fd, err = unix.Socket(unix.AF_INET6, kind, 0); err != nil {
					return err
				}
				return unix.Connect(fd, &unix.SockaddrInet6{Port: 9000, Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()})
			}))
			conn, err := net.FileConn(os.NewFile(uintptr(fd), ""))
			must(t, err)
			defer conn.Close()
			if err := c.Close([]Socket{nameOf(t, here, conn)})[0]; err != nil {
				t.Error(err)
			}
			if open(conn) == nil {
				t.Error("it is still open")
			}
		}
	})
}

// A program that still waits for the answer to its SYN waits no longer.
func TestASocketThatConnects(t *testing.T) {
	here := house(t)
	must(t, netns.Do(here, func() error { return dark("192.0.2.1") }))
	ways(t, func(t *testing.T, c *Closer) {
		var fd int
		must(t, netns.Do(here, func() (err error) {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
			if err == nil {
				if err = unix.Connect(fd, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{192, 0, 2, 1}}); errors.Is(err, unix.EINPROGRESS) {
					err = nil
				}
			}
			return err
		}))
		defer unix.Close(fd)
		s := Socket{Protocol: unix.IPPROTO_TCP, Remote: netip.MustParseAddrPort("192.0.2.1:80")}
		local, err := unix.Getsockname(fd)
		must(t, err)
		at := local.(*unix.SockaddrInet4)
		s.Local = netip.AddrPortFrom(netip.AddrFrom4(at.Addr), uint16(at.Port))
		s.Cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		must(t, err)
		var found unix.Stat_t
		must(t, unix.Stat(here, &found))
		s.Namespace = uint32(found.Ino)
		if err := c.Close([]Socket{s})[0]; err != nil {
			t.Error(err)
		}
		if code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || syscall.Errno(code) != syscall.ECONNABORTED {
			t.Errorf("the socket's error is %v, %v; want ECONNABORTED", syscall.Errno(code), err)
		}
	})
}

// dark makes a route to where nobody answers.
func dark(to string) error {
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "dark"}, PeerName: "darker"}
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(pair); err != nil {
		return err
	}
	address, err := netlink.ParseAddr("192.0.2.9/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(pair, address); err != nil {
		return err
	}
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	return netlink.NeighAdd(&netlink.Neigh{LinkIndex: pair.Index, IP: net.ParseIP(to), HardwareAddr: mac, State: netlink.NUD_PERMANENT})
}

func TestANamespaceThatNobodyHoldsIsOutOfReach(t *testing.T) {
	here := house(t)
	listen(t, here, "udp", "127.0.0.1:9000")
	_, named := dial(t, here, "udp", "127.0.0.1:9000")
	named.Namespace = 1 // no namespace's
	c, err := New(here)
	must(t, err)
	defer c.End()
	if err := c.Close([]Socket{named})[0]; !errors.Is(err, ErrOutOfReach) {
		t.Errorf("close: %v", err)
	}
}

// What New finds out is what the kernel does.
func TestNewChoosesWhatWorks(t *testing.T) {
	here := house(t)
	c, err := New("")
	must(t, err)
	defer c.End()
	if wants := probeNetlink() != nil; wants != (c.walker != nil) {
		t.Errorf("walks: %v, although netlink does not work: %v", c.walker != nil, wants)
	}
	listen(t, here, "tcp", "127.0.0.1:9000")
	conn, named := dial(t, here, "tcp", "127.0.0.1:9000")
	must(t, c.Close([]Socket{named})[0])
	if open(conn) == nil {
		t.Error("it is still open")
	}
}
