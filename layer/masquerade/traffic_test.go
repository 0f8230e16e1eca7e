package masquerade

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/model"
)

// What pods send comes from the node's address, and the answers come back: both families,
// TCP and UDP, small and large.
func TestPodsReachTheWorld(t *testing.T) {
	is := newIsland(t)
	is.serve()
	if _, err := is.ask("udp", world4, 80); err == nil {
		t.Fatal("the world has a way to pods: the test is blind")
	}
	l := is.start()
	for to, node := range map[string]string{world4: node4, world6: node6} {
		for _, network := range []string{"tcp", "udp"} {
			from, err := is.ask(network, to, 80)
			if err != nil || from.Addr() != netip.MustParseAddr(node) || from.Port() < 1024 || from.Port() >= 30000 {
				t.Errorf("%s to %s comes from %s, not a free port of %s: %v; %v", network, to, from, node, err, counted(t, l))
			}
		}
		if err := is.carry(to, 16<<20); err != nil {
			t.Errorf("16 MB to %s: %v; %v", to, err, counted(t, l))
		}
	}
	if n := counted(t, l)["begun"]; n != 6 {
		t.Errorf("%d flows have begun, not 6: %v", n, counted(t, l))
	}
}

// Large datagrams go in fragments, both ways.
func TestFragments(t *testing.T) {
	is := newIsland(t)
	is.serve()
	l := is.start()
	for _, to := range []string{world4, world6} {
		c, err := is.dial(is.pod, "udp", at(to, 80))
		must(t, err)
		defer c.Close()
		for _, size := range []int{5000, 30000, 100} {
			if _, err := c.Write(make([]byte, size)); err != nil {
				t.Fatal(err)
			}
			n, err := c.Read(make([]byte, 1<<16))
			if err != nil || n < size {
				t.Errorf("%d of %d bytes came back from %s: %v; %v", n, size, to, err, counted(t, l))
			}
		}
	}
	if n := counted(t, l)["begun"]; n != 2 {
		t.Errorf("%d flows have begun, not 2", n)
	}
}

func at(addr string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(addr), port)
}

// Pings are answered, small ones and those that go in fragments.
func TestPings(t *testing.T) {
	is := newIsland(t)
	l := is.start()
	for _, to := range []string{world4, world6} {
		for _, size := range []int{8, 1000, 5000} {
			if err := is.ping(to, size); err != nil {
				t.Errorf("a ping of %d bytes to %s: %v; %v", size, to, err, counted(t, l))
			}
		}
	}
}

// ping sends an echo request from the pod and waits for the reply.
func (is *island) ping(to string, size int) error {
	network, request := "udp4", byte(8)
	addr := netip.MustParseAddr(to)
	if addr.Is6() {
		network, request = "udp6", 128
	}
	c, err := is.icmp(network)
	if err != nil {
		return err
	}
	defer c.Close()
	message := append([]byte{request, 0, 0, 0, 0, 0, 0, 1}, make([]byte, size)...)
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.WriteTo(message, &net.UDPAddr{IP: addr.AsSlice()}); err != nil {
		return err
	}
	n, from, err := c.ReadFrom(make([]byte, 1<<16))
	if err == nil && (n != len(message) || !from.(*net.UDPAddr).IP.Equal(addr.AsSlice())) {
		err = fmt.Errorf("%d of %d bytes came back, from %s", n, len(message), from)
	}
	return err
}

// icmp is a socket of the pod for pings (icmp(7)).
func (is *island) icmp(network string) (c net.PacketConn, err error) {
	family, protocol := unix.AF_INET, unix.IPPROTO_ICMP
	if network == "udp6" {
		family, protocol = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	err = netns.Do(is.pod, func() error {
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
		if err != nil {
			return err
		}
		file := os.NewFile(uintptr(fd), "ping")
		defer file.Close()
		c, err = net.FilePacketConn(file)
		return err
	})
	return c, err
}

// A router on the way says that a packet is too old, and the pod hears it: traceroute.
func TestRoutersAreHeard(t *testing.T) {
	is := newIsland(t)
	is.start()
	for _, to := range []string{world4, world6} {
		for _, protocol := range []int{unix.IPPROTO_UDP, unix.IPPROTO_TCP, unix.IPPROTO_ICMP} {
			for hops, router := range map[int]string{1: "10.244.1.1", 2: "192.0.2.254"} {
				if netip.MustParseAddr(to).Is6() {
					router = map[int]string{1: "fd00:244:1::1", 2: "2001:db8::254"}[hops]
				}
				from, err := is.heard(at(to, 33434), protocol, hops)
				if err != nil || from != netip.MustParseAddr(router) {
					t.Errorf("protocol %d to %s with %d hops: heard %s, not %s: %v", protocol, to, hops, from, router, err)
				}
			}
		}
	}
}

// heard is who says that a packet with so many hops does not arrive (IP_RECVERR, ip(7)).
func (is *island) heard(to netip.AddrPort, protocol, hops int) (from netip.Addr, err error) {
	err = netns.Do(is.pod, func() error {
		family, level, hop, receive, queue := unix.AF_INET, unix.IPPROTO_IP, unix.IP_TTL, unix.IP_RECVERR, unix.MSG_ERRQUEUE
		var address unix.Sockaddr
		if to.Addr().Is4() {
			address = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
		} else {
			family, level, hop, receive = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, unix.IPV6_RECVERR
			address = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
			if protocol == unix.IPPROTO_ICMP {
				protocol = unix.IPPROTO_ICMPV6
			}
		}
		kind := unix.SOCK_DGRAM
		if protocol == unix.IPPROTO_TCP {
			kind = unix.SOCK_STREAM | unix.SOCK_NONBLOCK
		}
		fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := errors.Join(unix.SetsockoptInt(fd, level, hop, hops), unix.SetsockoptInt(fd, level, receive, 1)); err != nil {
			return err
		}
		if err := unix.Connect(fd, address); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		request := []byte{8, 0, 0, 0, 0, 0, 0, 1}
		if family == unix.AF_INET6 {
			request[0] = 128
		}
		if protocol != unix.IPPROTO_TCP {
			if _, err := unix.Write(fd, request); err != nil {
				return err
			}
		}
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
			control := make([]byte, 512)
			_, n, _, _, err := unix.Recvmsg(fd, make([]byte, 100), control, queue|unix.MSG_DONTWAIT)
			if errors.Is(err, unix.EAGAIN) {
				continue
			}
			if err != nil {
				return err
			}
			from, err = offender(control[:n])
			return err
		}
		return errors.New("nobody says anything")
	})
	return from, err
}

// offender is who sent the error (struct sock_extended_err, and the address behind it).
func offender(control []byte) (from netip.Addr, err error) {
	messages, err := unix.ParseSocketControlMessage(control)
	for _, m := range messages {
		if m.Header.Type != unix.IP_RECVERR && m.Header.Type != unix.IPV6_RECVERR || len(m.Data) < 24 {
			continue
		}
		if binary.NativeEndian.Uint16(m.Data[16:]) == unix.AF_INET6 {
			from, _ = netip.AddrFromSlice(m.Data[24:40])
		} else {
			from, _ = netip.AddrFromSlice(m.Data[20:24])
		}
	}
	return from, err
}

// A smaller MTU behind the router is told to the pod, and large transfers come through.
func TestPathMTU(t *testing.T) {
	is := newIsland(t)
	is.serve()
	must(t, netns.Do(is.router, func() error {
		return is.onDevice("far", func(l netlink.Link) error { return netlink.LinkSetMTU(l, 1300) })
	}))
	l := is.start()
	for _, to := range []string{world4, world6} {
		if err := is.carry(to, 1<<20); err != nil {
			t.Errorf("1 MB to %s: %v; %v", to, err, counted(t, l))
		}
		must(t, netns.Do(is.pod, func() error {
			found, err := netlink.RouteGet(netip.MustParseAddr(to).AsSlice())
			if err == nil && found[0].MTU != 1300 {
				t.Errorf("the pod's way to %s takes %d bytes, not 1300", to, found[0].MTU)
			}
			return err
		}))
	}
}

// What goes to a native range keeps its address, also when it becomes one meanwhile; flows
// that are open go on as they were.
func TestNativeRanges(t *testing.T) {
	is := newIsland(t)
	is.serve()
	l := is.start()
	is.way("10.244.1.0/24", "192.0.2.1")
	is.way("fd00:244:1::/64", "2001:db8::1")
	open, err := is.dial(is.pod, "udp", at(world4, 80))
	must(t, err)
	defer open.Close()
	before, err := seen(open)
	must(t, err)
	native := is.snapshot(2)
	native.Masquerade = &model.Masquerade{Not: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:1::/48")}}
	is.apply(l, native)
	for to, pod := range map[string]string{world4: pod4, world6: pod6} {
		for _, network := range []string{"tcp", "udp"} {
			if from, err := is.ask(network, to, 80); err != nil || from.Addr() != netip.MustParseAddr(pod) {
				t.Errorf("%s to %s, which is native, comes from %s: %v", network, to, from, err)
			}
		}
	}
	if after, err := seen(open); err != nil || after != before {
		t.Errorf("an open flow came from %s, and comes from %s: %v", before, after, err)
	}
	is.apply(l, is.snapshot(2))
	if from, err := is.ask("tcp", world4, 80); err != nil || from.Addr() != netip.MustParseAddr(node4) {
		t.Errorf("it is not native any more, and comes from %s: %v", from, err)
	}
}

// way gives the router, and so the world, a way to pods.
func (is *island) way(to, via string) {
	is.t.Helper()
	n, err := link.Open(is.router)
	must(is.t, err)
	defer n.Close()
	index, err := n.Index("uplink")
	must(is.t, err)
	must(is.t, n.Route(link.Route{To: netip.MustParsePrefix(to), Via: netip.MustParseAddr(via), Link: index}))
}

// Who reaches a pod at its own address gets answers from that.
func TestBegunOutside(t *testing.T) {
	is := newIsland(t)
	l := is.start()
	is.way("10.244.1.0/24", "192.0.2.1")
	is.way("fd00:244:1::/64", "2001:db8::1")
	for _, pod := range []string{pod4, pod6} {
		for _, network := range []string{"tcp", "udp"} {
			is.answer(is.pod, network, at(pod, 80))
			c, err := is.dial(is.world, network, at(pod, 80))
			if err != nil {
				t.Errorf("%s from the world to %s: %v; %v", network, pod, err, counted(t, l))
				continue
			}
			if _, err := seen(c); err != nil {
				t.Errorf("%s from the world to %s: %v; %v", network, pod, err, counted(t, l))
			}
			c.Close()
		}
	}
	if now := counted(t, l); now["outside"] != 4 || now["begun"] != 0 {
		t.Errorf("4 flows came from outside: %v", now)
	}
}

// A flow keeps its address as long as that is the node's, and gets another one when it is
// gone.
func TestTheNodesAddressChanges(t *testing.T) {
	is := newIsland(t)
	is.serve()
	l := is.start()
	for _, row := range []struct{ world, was, is string }{{world4, node4 + "/24", "192.0.2.77/24"}, {world6, node6 + "/64", "2001:db8::77/64"}} {
		was, now := netip.MustParsePrefix(row.was), netip.MustParsePrefix(row.is)
		c, err := is.dial(is.pod, "udp", at(row.world, 80))
		must(t, err)
		defer c.Close()
		must(t, c.SetDeadline(time.Now().Add(5*patience)))
		before, err := seen(c)
		must(t, err)
		wire := datapathWire{Ip4: addressOf(netip.MustParseAddr("192.0.2.77")), Ip6: addressOf(netip.MustParseAddr(node6))}
		if now.Addr().Is6() {
			wire.Ip6 = addressOf(now.Addr())
		}
		must(t, errors.Join(l.tables.wires.Put([]uint32{uint32(is.uplink)}, []datapathWire{wire})...))
		time.Sleep(1100 * time.Millisecond) // it is asked once a second
		if from, err := seen(c); err != nil || from != before {
			t.Errorf("the device's first address is another, and %s is %s: %v; %v", before, from, err, counted(t, l))
		}
		must(t, netns.Do(is.NetNS, func() error {
			return is.onDevice("uplink", func(d netlink.Link) error {
				gone := &netlink.Addr{IPNet: &net.IPNet{IP: was.Addr().AsSlice(), Mask: net.CIDRMask(was.Bits(), was.Addr().BitLen())}}
				return netlink.AddrDel(d, gone)
			})
		}))
		n, err := link.Open(is.NetNS)
		must(t, err)
		must(t, n.Addr(is.uplink, now))
		n.Close()
		if was.Addr().Is4() {
			is.route(is.NetNS, "uplink", "192.0.2.254")
		}
		time.Sleep(1100 * time.Millisecond)
		if from, err := seen(c); err != nil || from.Addr() != now.Addr() {
			t.Errorf("%s has gone, and the flow comes from %s: %v; %v", before, from, err, counted(t, l))
		}
	}
	if n := counted(t, l)["moved"]; n != 2 {
		t.Errorf("%d flows have moved, not 2: %v", n, counted(t, l))
	}
}

// Ten thousand connections, one after the other by four at once: each is answered.
func TestTenThousandConnections(t *testing.T) {
	is := newIsland(t)
	is.serve()
	l := is.start()
	const connections, together = 10_000, 4
	var all sync.WaitGroup
	var failed atomic.Int64
	start := time.Now()
	for range together {
		all.Go(func() {
			err := netns.Do(is.pod, func() error {
				for range connections / together {
					c, err := net.DialTimeout("tcp", at(world4, 80).String(), patience)
					if err == nil {
						_ = c.SetDeadline(time.Now().Add(patience))
						_, err = seen(c)
						_ = c.(*net.TCPConn).SetLinger(0) // no TIME_WAIT, the pod has ports again
						c.Close()
					}
					if err != nil && failed.Add(1) == 1 {
						t.Error(err)
					}
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	now := counted(t, l)
	if failed.Load() > 0 || now["begun"] < 5000 || now["no_port"]+now["full"]+now["stray"] > 0 {
		t.Errorf("%d of %d failed: %v", failed.Load(), connections, now)
	}
	t.Logf("%d connections in %.1f s: %v", connections, time.Since(start).Seconds(), now)
}

// An agent that restarts, twenty times and with another cluster each time, breaks no
// connection that is open.
func TestConnectionsOutliveAgents(t *testing.T) {
	is := newIsland(t)
	is.serve()
	l := is.start()
	var open []net.Conn
	for _, to := range []string{world4, world6} {
		for range 20 {
			c, err := is.dial(is.pod, "tcp", at(to, 80))
			must(t, err)
			defer c.Close()
			_, err = seen(c)
			must(t, err)
			open = append(open, c)
		}
	}
	for i := range 20 {
		l.Close()
		l = New(is.settings)
		must(t, l.Open())
		is.apply(l, is.snapshot(2+i%2))
		for _, c := range open {
			_ = c.SetDeadline(time.Now().Add(patience))
			if _, err := c.Write([]byte{byte(i)}); err != nil {
				t.Fatalf("after %d restarts: %v", i+1, err)
			}
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatalf("after %d restarts: %v; %v", i+1, err, counted(t, l))
			}
		}
	}
	if n := counted(t, l)["begun"]; n != 40 {
		t.Errorf("%d flows have begun, not 40", n)
	}
	l.Close()
}
