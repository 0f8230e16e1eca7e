package nodedns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/model"
)

// kinds are the sockets that a process may ask by.
var kinds = []struct {
	name, network string
	to            netip.AddrPort
	connected     bool
}{
	{"connected, IPv4", "udp4", dns4, true},
	{"unconnected, IPv4", "udp4", dns4, false},
	{"connected, IPv6", "udp6", dns6, true},
	{"unconnected, IPv6", "udp6", dns6, false},
	{"unconnected, of both families, to IPv4", "udp", dns4, false},
	{"unconnected, of both families, to IPv6", "udp", dns6, false},
}

// What the node asks the agent answers, and all that a process sees is the DNS Service.
func TestTheAgentAnswers(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	l := o.open()
	for _, kind := range kinds {
		o.client(o.NetNS, kind.network, kind.to, kind.connected).expect(t, "nobody serves; "+kind.name, "web.", elsewhere)
	}
	stop := o.serve(l, knows)
	before := o.asked.Load()
	for _, kind := range kinds {
		c := o.client(o.NetNS, kind.network, kind.to, kind.connected)
		for range 3 {
			c.expect(t, kind.name, "web.", here)
		}
		if kind.connected && c.RemoteAddr().(*net.UDPAddr).AddrPort() != kind.to {
			t.Errorf("%s: connected to %v, not %v", kind.name, c.RemoteAddr(), kind.to)
		}
	}
	o.mapped()
	if n := o.asked.Load() - before; n > 0 {
		t.Errorf("the DNS Service was asked %d times", n)
	}
	for _, kind := range kinds {
		o.client(o.NetNS, kind.network, kind.to, kind.connected).expect(t, "not known; "+kind.name, "unknown.", elsewhere)
	}
	is := o.events(l)
	if is["agent_relayed"] != uint64(len(kinds)) || is["agent_answered"] == 0 || is["steered"] == 0 || is["unattended"] == 0 || is["agent_unanswered"] != 0 {
		t.Errorf("counted %v", is)
	}
	stop()
	for _, kind := range kinds {
		o.client(o.NetNS, kind.network, kind.to, kind.connected).expect(t, "it has ended; "+kind.name, "web.", elsewhere)
	}
}

// mapped: an IPv6 socket that is connected to ::ffff:a.b.c.d. Go makes none, others do.
func (o *outpost) mapped() {
	o.t.Helper()
	var got [4]byte
	must(o.t, o.Inside(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		to := &unix.SockaddrInet6{Port: 53, Addr: netip.AddrFrom16(dns4.Addr().As16()).As16()}
		if err := unix.Connect(fd, to); err != nil {
			return err
		}
		peer, err := unix.Getpeername(fd)
		if err != nil || peer.(*unix.SockaddrInet6).Addr != to.Addr || peer.(*unix.SockaddrInet6).Port != 53 {
			return fmt.Errorf("connected to %+v, %v", peer, err)
		}
		if _, err := unix.Write(fd, question(o.t, 7, "web.")); err != nil {
			return err
		}
		answer := make([]byte, 1500)
		n, from, err := unix.Recvfrom(fd, answer, 0)
		if err != nil || from.(*unix.SockaddrInet6).Addr != to.Addr || from.(*unix.SockaddrInet6).Port != 53 {
			return fmt.Errorf("answered by %+v, %v", from, err)
		}
		copy(got[:], answer[n-4:])
		return nil
	}))
	if got != here {
		o.t.Errorf("connected to IPv4 as IPv6: answered %v, not %v", got, here)
	}
}

// What is not the node's, not a query over UDP to the DNS Service, or cannot reach
// loopback, goes where it went.
func TestWhatIsLeft(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	pod := filepath.Join(t.TempDir(), "pod")
	must(t, netns.Create(pod))
	t.Cleanup(func() { must(t, netns.Remove(pod)) })
	l := o.open()
	o.serve(l, knows)

	c := o.client(o.NetNS, "udp4", dns4, false)
	o.AddAddress("10.96.0.20/32") // another Service with port 53
	c.to = netip.MustParseAddrPort("10.96.0.20:53")
	o.serveAt(c.to)
	c.expect(t, "another Service", "web.", elsewhere)
	c.to = netip.AddrPortFrom(dns4.Addr(), 5353)
	o.serveAt(c.to)
	c.expect(t, "another port", "web.", elsewhere)
	c.to = dns4
	c.expect(t, "the DNS Service by the same socket", "web.", here)

	raw, err := c.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), "lo") }))
	must(t, err)
	c.expect(t, "bound to a device", "web.", elsewhere)
	if is := o.events(l); is["bound"] != 1 {
		t.Errorf("counted %v", is)
	}

	o.sentByADevice(l)

	dialer := net.Dialer{Control: l.Own}
	must(t, o.Inside(func() error {
		conn, err := dialer.Dial("udp", dns4.String())
		if err == nil {
			c.Close()
			c.UDPConn, c.is = conn.(*net.UDPConn), true
		}
		return err
	}))
	c.expect(t, "a socket of the agent's own", "web.", elsewhere)

	o.serveIn(pod)
	o.client(pod, "udp4", dns4, true).expect(t, "a pod", "web.", elsewhere)
	o.overTCP()
}

// sentByADevice: sockets with an option that says by which device they send. By lo the DNS
// Service is reached here; the agent would be, too.
func (o *outpost) sentByADevice(l *Layer) {
	o.t.Helper()
	const lo = 1
	by := func(level, option int) func(int) error {
		return func(fd int) error { return unix.SetsockoptInt(fd, level, option, lo<<24) } // in the network's order
	}
	before := o.events(l)["bound"]
	for _, row := range []struct {
		what, network string
		to            netip.AddrPort
		set           func(fd int) error
	}{
		{"IP_UNICAST_IF", "udp4", dns4, by(unix.IPPROTO_IP, unix.IP_UNICAST_IF)},
		{"IP_UNICAST_IF, of both families", "udp", dns4, by(unix.IPPROTO_IP, unix.IP_UNICAST_IF)},
		{"IPV6_UNICAST_IF", "udp6", dns6, by(unix.IPPROTO_IPV6, unix.IPV6_UNICAST_IF)},
		{"IPV6_PKTINFO", "udp6", dns6, func(fd int) error {
			return unix.SetsockoptString(fd, unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, string(append(make([]byte, 16), lo, 0, 0, 0)))
		}},
	} {
		c := o.client(o.NetNS, row.network, row.to, false)
		raw, err := c.SyscallConn()
		must(o.t, err)
		must(o.t, raw.Control(func(fd uintptr) { err = row.set(int(fd)) }))
		must(o.t, err)
		c.expect(o.t, row.what, "web.", elsewhere)
	}
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		failed := c.Control(func(fd uintptr) { err = by(unix.IPPROTO_IP, unix.IP_UNICAST_IF)(int(fd)) })
		return errors.Join(failed, err)
	}}
	must(o.t, o.Inside(func() error {
		conn, err := dialer.Dial("udp", dns4.String())
		if err == nil {
			o.t.Cleanup(func() { conn.Close() })
			(&client{conn.(*net.UDPConn), dns4, true}).expect(o.t, "IP_UNICAST_IF, connected", "web.", elsewhere)
		}
		return err
	}))
	if n := o.events(l)["bound"] - before; n != 5 {
		o.t.Errorf("%d were left as bound, not 5", n)
	}
}

// serveIn has the DNS Service in another namespace.
func (o *outpost) serveIn(space string) {
	o.t.Helper()
	node := o.NetNS
	defer func() { o.NetNS = node }()
	o.NetNS = space
	must(o.t, o.Inside(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	}))
	o.AddAddress("10.96.0.10/32")
	o.serveAt(dns4)
}

func (o *outpost) overTCP() {
	o.t.Helper()
	must(o.t, o.Inside(func() error {
		server, err := net.Listen("tcp", dns4.String())
		if err != nil {
			return err
		}
		defer server.Close()
		c, err := net.Dial("tcp", dns4.String())
		if err != nil {
			return fmt.Errorf("over TCP: %w", err)
		}
		return c.Close()
	}))
}

// A node without IPv6 misses it only where the DNS Service has an address of it.
func TestNodeWithoutIPv6(t *testing.T) {
	o := newOutpost(t)
	must(t, o.Inside(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6", []byte("1"), 0o644) }))
	l := o.open()
	s, err := l.begin()
	must(t, err)
	t.Cleanup(s.close)
	for _, row := range []struct {
		of   *model.Snapshot
		want []string
	}{
		{cluster(dns4, dns6), []string{"the node's own queries for fd00:96::a go to the DNS servers: listen on ::1: "}},
		{cluster(dns4), nil},
	} {
		o.apply(l, row.of)
		d, err := l.Describe()
		must(t, err)
		if !slices.EqualFunc(d.Degraded, row.want, strings.HasPrefix) {
			t.Errorf("of %d addresses status has %q, not %q", d.Objects, d.Degraded, row.want)
		}
	}
}

// One that is silent is asked no more, though its socket is open.
func TestTheAgentHangs(t *testing.T) {
	o := newOutpost(t)
	o.settings.silence = 300 * time.Millisecond
	o.serveElsewhere()
	l := o.open()
	o.serve(l, knows)
	c := o.client(o.NetNS, "udp4", dns4, false)
	maps := l.host.(*datapath).maps
	must(t, maps[datapathMapPresences].Put(uint32(0), datapathPresence{Beat: 1})) // an hour ago
	c.expect(t, "silent", "web.", elsewhere)
	c.await(t, "it beats again, and is not asked", "web.", here)
}

// A socket that is closed however it may be is out of the map at once: who is connected to
// it is refused, and asks again, all others ask the DNS Service.
func TestTheSocketIsClosed(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	l := o.open()
	s, err := l.begin()
	must(t, err)
	must(t, s.presence.beat())
	t.Cleanup(s.close)
	connected, unconnected := o.client(o.NetNS, "udp4", dns4, true), o.client(o.NetNS, "udp4", dns4, false)
	s.conns[datapathFamilyFAMILY_IP4].Close()
	if _, _, err := connected.ask(t, 7, "web."); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connected to an agent that has gone: %v", err)
	}
	o.client(o.NetNS, "udp4", dns4, true).expect(t, "connected anew", "web.", elsewhere)
	unconnected.expect(t, "unconnected", "web.", elsewhere)
	if is := o.events(l); is["unattended"] != 2 {
		t.Errorf("counted %v", is)
	}
}

// What an agent has in hand when it is killed the next one answers, also what it has not
// read yet.
func TestTheNextAnswersWhatWasInHand(t *testing.T) {
	o := newOutpost(t)
	o.settings.rest = time.Nanosecond
	o.serveElsewhere()
	l := o.open()
	s, err := l.begin()
	must(t, err)
	must(t, s.presence.beat())
	var clients []*client
	for _, kind := range kinds {
		c := o.client(o.NetNS, kind.network, kind.to, kind.connected)
		if kind.connected {
			_, err = c.Write(question(t, 7, "web."))
		} else {
			_, err = c.WriteToUDPAddrPort(question(t, 7, "web."), kind.to)
		}
		must(t, err)
		clients = append(clients, c)
	}
	s.close() // as the kernel does
	must(t, l.Close())
	next := o.open()
	o.serve(next, knows)
	for i, c := range clients {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		answer := make([]byte, 1500)
		n, from, err := c.ReadFromUDPAddrPort(answer)
		if err != nil || [4]byte(answer[n-4:n]) != here || from.Port() != 53 || from.Addr().Unmap() != kinds[i].to.Addr() {
			t.Errorf("%s: answered %x from %v, %v", kinds[i].name, answer[:n], from, err)
		}
	}
	if n := o.asked.Load(); n > 0 {
		t.Errorf("the DNS Service was asked %d times", n)
	}
	for begun := time.Now(); o.waiting(next) > 0; time.Sleep(time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("all are answered, and %d wait", o.waiting(next))
		}
	}
}

// Behind an agent that was killed the next one takes no queries for a while: who lost one to
// it asks the DNS Service. Behind one that ended it takes them at once.
func TestTheNextRests(t *testing.T) {
	o := newOutpost(t)
	o.settings.rest = time.Hour
	o.serveElsewhere()
	l := o.open()
	s, err := l.begin()
	must(t, err)
	must(t, s.presence.beat())
	c := o.client(o.NetNS, "udp4", dns4, false)
	_, err = c.WriteToUDPAddrPort(question(t, 6, "web."), dns4)
	must(t, err)
	s.close()
	must(t, l.Close())

	next := o.open()
	ctx, end := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- next.Serve(ctx, knows) }()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	answer := make([]byte, 1500)
	n, _, err := c.ReadFromUDPAddrPort(answer)
	if err != nil || [4]byte(answer[n-4:n]) != here {
		t.Errorf("what was in hand is answered %x, %v", answer[:n], err)
	}
	c.expect(t, "it rests", "web.", elsewhere)
	if is := o.events(next); is["aside"] != 1 {
		t.Errorf("counted %v", is)
	}
	end()
	must(t, <-ended)
	must(t, next.Close())
	third := o.open()
	o.serve(third, knows)
	c.expect(t, "the one before had ended", "web.", here)
}

// waiting is how many queries wait.
func (o *outpost) waiting(l *Layer) (n int) {
	all := l.host.(*datapath).maps[datapathMapWaiting].Iterate()
	var key datapathAsker
	var query datapathQuery
	for all.Next(&key, &query) {
		n++
	}
	return n
}

// What waits longer than a client does is forgotten, and what never was read is found.
func TestWhatWaits(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	l := o.open()
	o.serve(l, knows)
	c := o.client(o.NetNS, "udp4", dns4, true)
	c.expect(t, "once", "web.", here)
	var by datapathDetour
	must(t, l.host.(*datapath).maps[datapathMapDetours].Lookup(datapathFamilyFAMILY_IP4, &by))
	at := c.LocalAddr().(*net.UDPAddr).AddrPort()
	var now unix.Timespec
	must(t, unix.ClockGettime(unix.CLOCK_BOOTTIME, &now))
	put := func(id byte, age time.Duration) {
		query := datapathQuery{Since: uint64(now.Nano()) - uint64(age)}
		query.Length = uint32(copy(query.Message[:], question(t, uint16(id), "web.")))
		key := datapathAsker{Address: addressOf(at.Addr()), Port: hostOrder(at.Port()), Id: uint16(id) << 8, To: by.Port}
		must(t, l.host.(*datapath).maps[datapathMapWaiting].Put(key, query))
	}
	put(1, patience+time.Second)
	put(2, sweptAfter)
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	answer := make([]byte, 1500)
	n, err := c.Read(answer)
	if err != nil || answer[1] != 2 || [4]byte(answer[n-4:n]) != here {
		t.Errorf("what was not read is answered %x, %v", answer[:n], err)
	}
	for begun := time.Now(); o.waiting(l) > 0; time.Sleep(time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("%d wait", o.waiting(l))
		}
	}
}

// The next agent has the port of the one before: who is connected to that need not connect
// again.
func TestTheNextHasThePort(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	l := o.open()
	stop := o.serve(l, knows)
	c := o.client(o.NetNS, "udp6", dns6, true)
	c.expect(t, "the first", "web.", here)
	stop()
	must(t, l.Close())
	if _, _, err := c.ask(t, 7, "web."); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connected to an agent that has ended: %v", err)
	}
	next := o.open()
	o.serve(next, knows)
	c.expect(t, "the next", "web.", here)
}
