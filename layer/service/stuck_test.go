package service

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/model"
)

// client is a connected socket of a pod, or of the node, and the goroutine that
// waits at it for something to read.
type client struct {
	what  string
	conn  net.Conn
	ended chan error
}

// connects opens a socket in a namespace, says something and waits for the answer.
func (v *village) connects(home, network, address string) *client {
	v.t.Helper()
	c := &client{what: network + " " + address, ended: make(chan error, 1)}
	v.must(netns.Do(home, func() (err error) {
		c.conn, err = net.Dial(network, address)
		return err
	}))
	v.t.Cleanup(func() { c.conn.Close() })
	c.talks(v)
	return c
}

func (c *client) talks(v *village) {
	v.t.Helper()
	if err := exchangeLine(c.conn, "hello"); err != nil {
		v.t.Errorf("%s: %v", c.what, err)
	}
	v.must(c.conn.SetDeadline(time.Time{}))
}

// waits begins to read, until the socket is closed.
func (c *client) waits() *client {
	go func() {
		_, err := c.conn.Read(make([]byte, 1))
		c.ended <- err
	}()
	return c
}

// closes does what the agent does when it is woken, until all these have been closed
// under their readers.
func (v *village) closes(clients ...*client) {
	v.t.Helper()
	late := time.Now().Add(patience)
	for _, c := range clients {
		for done := false; !done; {
			v.tick()
			select {
			case err := <-c.ended:
				if !errors.Is(err, syscall.ECONNABORTED) {
					v.t.Errorf("%s: its reader meets %v, want ECONNABORTED", c.what, err)
				}
				done = true
			case <-time.After(time.Millisecond):
			}
			if time.Now().After(late) {
				v.t.Fatalf("%s is not closed", c.what)
			}
		}
	}
}

// tick is what the agent does when the layer wakes it.
func (v *village) tick() {
	v.t.Helper()
	var err error
	v.have, err = v.layer.Refresh(v.have)
	v.must(err)
}

// looks makes the layer look at sockets now.
func (v *village) looks() {
	v.t.Helper()
	v.layer.stuck.due = time.Now()
	v.tick()
}

// settles ticks until the layer has nothing more to look for.
func (v *village) settles() {
	v.t.Helper()
	for late := time.Now().Add(patience); !v.layer.stuck.due.IsZero(); time.Sleep(time.Millisecond) {
		v.tick()
		if time.Now().After(late) {
			v.t.Fatal("it goes on looking")
		}
	}
}

// dnsAt is a cluster whose Service dns has these endpoints; web is another Service of
// both protocols' pods.
func dnsAt(pods ...*pod) *model.Snapshot {
	var all []string
	for _, p := range pods {
		all = append(all, p.addresses()...)
	}
	return &model.Snapshot{Complete: true, Services: []*model.Service{
		serviceOf("dns", model.UDP, 53, []string{"10.96.0.10", "fd00:96::10"}, 5353, all...),
		serviceOf("web", model.TCP, 80, []string{"10.96.0.1", "fd00:96::1"}, 8080, all...),
	}}
}

// callAll opens a socket to each Service in each way.
func (v *village) callAll(home string) (datagrams, streams []*client) {
	v.t.Helper()
	for _, to := range []string{"10.96.0.10", "[fd00:96::10]"} {
		datagrams = append(datagrams, v.connects(home, "udp", to+":53"))
	}
	for _, to := range []string{"10.96.0.1", "[fd00:96::1]"} {
		streams = append(streams, v.connects(home, "tcp", to+":80"))
	}
	return datagrams, streams
}

// addTo gives a device of the thread's namespace addresses, from which the node
// itself is a client.
func addTo(device string, addresses ...string) error {
	l, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	for _, a := range addresses {
		address, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		address.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(l, address); err != nil {
			return err
		}
	}
	return nil
}

// servesAll answers on the ports of both Services.
func (p *pod) servesAll(name string) *pod {
	p.v.t.Helper()
	p.serve("udp", 5353, name)
	p.serve("tcp", 8080, name)
	return p
}

func waiting(clients []*client) []*client {
	for _, c := range clients {
		c.waits()
	}
	return clients
}

func (v *village) allTalk(clients []*client) {
	v.t.Helper()
	for _, c := range clients {
		c.talks(v)
	}
}

// A resolver that keeps a connected socket to the DNS Service asks the next
// endpoint when the one it had is gone, in whatever namespace it lives: the cases of
// cilium#48096 and #48244 (a socket pinned to a removed ClusterIP backend).
func TestSocketsOfAnEndpointThatIsGoneAreClosed(t *testing.T) {
	const drain = 300 * time.Millisecond
	v := newVillage(t, Settings{Drain: drain})
	near, far := v.pod(), v.pod()
	v.must(v.Inside(func() error { return addTo("lo", "192.0.2.7/32", "fd00:c::7/128") }))
	first, second := v.pod().servesAll("first"), v.pod().servesAll("second")
	v.open(dnsAt(first))
	var datagrams, streams, direct []*client
	for _, home := range []string{near.netns, far.netns, v.NetNS} {
		d, s := v.callAll(home)
		datagrams, streams = append(datagrams, d...), append(streams, s...)
		for _, at := range []netip.Addr{first.ip4, first.ip6} {
			direct = append(direct, v.connects(home, "udp", netip.AddrPortFrom(at, 5353).String()),
				v.connects(home, "tcp", netip.AddrPortFrom(at, 8080).String()))
		}
	}
	v.become(dnsAt(second))
	gone := time.Now()
	v.closes(waiting(datagrams)...)
	v.allTalk(streams)
	v.closes(waiting(streams)...)
	if took := time.Since(gone); took < drain {
		t.Errorf("connections were closed after %v, want %v", took, drain)
	}
	v.settles()
	v.allTalk(direct) // they never were a Service's
	d, s := v.callAll(near.netns)
	v.allTalk(append(d, s...))
	if udp, tcp := v.reason(closedUDP), v.reason(closedTCP); udp != uint64(len(datagrams)) || tcp != uint64(len(streams)) {
		t.Errorf("%d and %d were counted, want %d and %d", udp, tcp, len(datagrams), len(streams))
	}
}

// kubernetes#139628: a Service that has no endpoint any more. Whoever sends on
// learns it, and the next connect() too.
func TestDatagramsToAServiceWithoutEndpoints(t *testing.T) {
	v := newVillage(t, Settings{})
	pod, server := v.pod(), v.pod().servesAll("server")
	v.open(dnsAt(server))
	statsd := v.connects(pod.netns, "udp", "10.96.0.10:53")
	v.become(dnsAt())
	v.settles()
	var errs []error
	for range 3 {
		_, err := statsd.conn.Write([]byte("count"))
		errs = append(errs, err)
	}
	for _, err := range errs {
		if !errors.Is(err, syscall.EDESTADDRREQ) {
			t.Errorf("a sender meets %v, want EDESTADDRREQ each time", errs)
			break
		}
	}
	if _, _, err := pod.call("udp", "10.96.0.10:53", "count"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the next socket meets %v, want ECONNREFUSED", err)
	}
}

// kubernetes#141371: a Service is deleted, and its pod's address is another's: what
// was sent to the one does not go on to the other.
func TestASocketOfADeletedServiceDoesNotReachWhoeverGetsTheAddress(t *testing.T) {
	v := newVillage(t, Settings{Drain: time.Millisecond})
	pod, server := v.pod(), v.pod().servesAll("server")
	cluster := dnsAt(server)
	other := serviceOf("other", model.UDP, 54, []string{"10.96.0.11"}, 5353, server.addresses()...)
	v.open(&model.Snapshot{Complete: true, Services: append(slices.Clone(cluster.Services), other)})
	datagrams, streams := v.callAll(pod.netns)
	others := []*client{v.connects(pod.netns, "udp", "10.96.0.11:54"), v.connects(pod.netns, "udp", server.ip4.String()+":5353")}
	v.become(&model.Snapshot{Complete: true, Services: []*model.Service{other}})
	v.closes(waiting(append(datagrams, streams...))...)
	v.settles()
	v.allTalk(others)
}

// kubernetes#122740: an agent that starts again disturbs nobody. What went while
// none ran is found.
func TestSocketsWhileTheAgentIsAway(t *testing.T) {
	v := newVillage(t, Settings{Drain: time.Millisecond})
	pod, first, second := v.pod(), v.pod().servesAll("first"), v.pod().servesAll("second")
	v.open(dnsAt(first))
	datagrams, streams := v.callAll(pod.netns)
	v.reopen(dnsAt(first))
	v.settles()
	v.allTalk(append(datagrams, streams...))
	v.reopen(dnsAt(second))
	v.closes(waiting(append(datagrams, streams...))...)

	// between taking it out of the tables and closing
	datagrams, streams = v.callAll(pod.netns)
	v.become(dnsAt(first))
	v.reopen(dnsAt(first))
	v.closes(waiting(append(datagrams, streams...))...)
}

// An agent that starts over empty tables gives the numbers of backends again that
// it gave before.
func TestANumberThatIsGivenAgainHidesNoSocket(t *testing.T) {
	v := newVillage(t, Settings{Drain: time.Millisecond})
	pod, first, second := v.pod(), v.pod().servesAll("first"), v.pod().servesAll("second")
	v.open(dnsAt(first))
	datagrams, streams := v.callAll(pod.netns)
	given := v.layer.tables.lastNumber
	v.become(dnsAt())
	v.reopen(dnsAt(second))
	if now := v.layer.tables.lastNumber; now > given {
		t.Fatalf("the next number is %d, after %d: they are not given again", now, given)
	}
	v.closes(waiting(append(datagrams, streams...))...)
}

// Not ready is not gone, and what terminates may still answer; when it is gone, its
// sockets are found although the tables do not change any more.
func TestAnEndpointThatIsNotReadyKeepsItsSockets(t *testing.T) {
	v := newVillage(t, Settings{Drain: time.Millisecond})
	pod, first, second := v.pod(), v.pod().servesAll("first"), v.pod().servesAll("second")
	v.open(dnsAt(first))
	datagrams, streams := v.callAll(pod.netns)
	for _, condition := range []func(b *model.Backend){
		func(b *model.Backend) { b.Ready = false; b.Serving = false },
		func(b *model.Backend) { b.Ready = false; b.Terminating = true },
		func(b *model.Backend) { b.Ready = false; b.Serving = false; b.Terminating = true },
	} {
		cluster := dnsAt(first, second)
		for _, service := range cluster.Services {
			for i := range service.Ports[0].Backends {
				b := &service.Ports[0].Backends[i]
				if a := b.Address.Addr(); a == first.ip4 || a == first.ip6 {
					condition(b)
				}
			}
		}
		v.become(cluster)
		v.settles()
		v.allTalk(append(datagrams, streams...))
		if line, _, err := pod.call("udp", "10.96.0.10:53", ""); err != nil || !strings.HasPrefix(line, "second") {
			t.Errorf("a new socket: %q, %v", line, err)
		}
	}
	v.become(dnsAt(second))
	v.closes(waiting(append(datagrams, streams...))...)
}

// While it is not known what the whole cluster asks for, nobody is gone.
func TestNothingIsClosedForAClusterThatWasNotSeenWhole(t *testing.T) {
	for name, partly := range map[string]*model.Snapshot{"it is not read yet": {}, "a part cannot be read": {Complete: true, Unread: 1}} {
		t.Run(name, func(t *testing.T) {
			v := newVillage(t, Settings{Drain: time.Millisecond})
			pod, server := v.pod(), v.pod().servesAll("server")
			v.open(dnsAt(server))
			datagrams, streams := v.callAll(pod.netns)
			v.become(partly) // which takes rows away, as the agent would not
			v.looks()
			v.allTalk(append(datagrams, streams...))
			v.reopen(partly)
			v.looks()
			v.allTalk(append(datagrams, streams...))
			if n := v.reason(closedUDP) + v.reason(closedTCP); n > 0 {
				t.Errorf("%d sockets were closed", n)
			}
			v.become(dnsAt())
			v.closes(waiting(append(datagrams, streams...))...)
		})
	}
}

// An endpoint that comes back before its connections were closed keeps them.
func TestAnEndpointThatComesBackKeepsItsConnections(t *testing.T) {
	v := newVillage(t, Settings{Drain: time.Hour})
	pod, first, second := v.pod(), v.pod().servesAll("first"), v.pod().servesAll("second")
	v.open(dnsAt(first))
	_, streams := v.callAll(pod.netns)
	v.become(dnsAt(second))
	v.looks()
	if n := len(v.layer.stuck.drains); n != len(streams) {
		t.Errorf("%d drain, want %d", n, len(streams))
	}
	v.become(dnsAt(first, second))
	v.looks()
	if n := len(v.layer.stuck.drains); n != 0 {
		t.Errorf("%d drain, but their endpoint is back", n)
	}
	v.allTalk(streams)
}

// The tables move to larger maps: what is looked into are those in force.
func TestStuckSocketsAreFoundAfterMapsHaveGrown(t *testing.T) {
	v := newVillage(t, Settings{})
	pod, first, second := v.pod(), v.pod().servesAll("first"), v.pod().servesAll("second")
	v.open(dnsAt(first))
	before, _ := v.callAll(pod.netns)
	v.become(dnsAt(second))
	v.closes(waiting(before)...)
	datagrams, _ := v.callAll(pod.netns)
	v.must(v.layer.datapath.grow(v.layer.tables, capacity{1 << 15, 1 << 17}))
	steady := v.connects(pod.netns, "udp", "10.96.0.10:53")
	v.looks()
	v.allTalk(append(datagrams, steady))
	v.become(dnsAt(first))
	v.closes(waiting(append(datagrams, steady))...)
}

// A connection that is being made to an endpoint that is gone ends, too.
func TestAConnectionThatIsBeingMade(t *testing.T) {
	v := newVillage(t, Settings{Drain: time.Millisecond})
	pod, server := v.pod(), v.pod()
	v.open(dnsAt(server))
	v.must(v.Inside(func() error { return swallow(server.ip4) }))
	ended := make(chan error, 1)
	go func() {
		ended <- pod.inside(func() error {
			conn, err := net.Dial("tcp", "10.96.0.1:80")
			if err == nil {
				conn.Close()
			}
			return err
		})
	}()
	v.must(pod.inside(awaitSYN))
	v.become(dnsAt())
	for late := time.Now().Add(patience); ; {
		v.tick()
		select {
		case err := <-ended:
			if !errors.Is(err, syscall.ECONNABORTED) {
				t.Errorf("connect() meets %v, want ECONNABORTED", err)
			}
			return
		case <-time.After(time.Millisecond):
		}
		if time.Now().After(late) {
			t.Fatal("connect() still waits")
		}
	}
}

// swallow drops what is sent to an address on the way.
func swallow(a netip.Addr) error {
	to := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
	return netlink.RouteReplace(&netlink.Route{Dst: to, Type: unix.RTN_BLACKHOLE})
}

// awaitSYN returns when a socket of the thread's namespace waits for the answer to
// its SYN (proc_pid_net(5): state 02).
func awaitSYN() error {
	for late := time.Now().Add(patience); time.Now().Before(late); time.Sleep(time.Millisecond) {
		sockets, err := os.ReadFile("/proc/thread-self/net/tcp")
		if err != nil {
			return err
		}
		for _, line := range strings.Split(string(sockets), "\n") {
			if fields := strings.Fields(line); len(fields) > 3 && fields[3] == "02" {
				return nil
			}
		}
	}
	return errors.New("nobody connects")
}

// A namespace is found by its mount, and by its processes.
func TestSocketsOfANamespaceWithoutAMount(t *testing.T) {
	v := newVillage(t, Settings{})
	pod, server := v.pod(), v.pod().servesAll("server")
	v.open(dnsAt(server))
	leave := pod.stay()
	defer leave()
	resolver := v.connects(pod.netns, "udp", "10.96.0.10:53")
	v.must(netns.Remove(pod.netns))
	v.become(dnsAt())
	v.closes(resolver.waits())
}

// A namespace that neither a process nor a mount holds, but a socket: its sockets
// cannot be closed, and status says so.
func TestSocketsOutOfReachAreTold(t *testing.T) {
	v := newVillage(t, Settings{})
	pod, server := v.pod(), v.pod().servesAll("server")
	v.open(dnsAt(server))
	resolver := v.connects(pod.netns, "udp", "10.96.0.10:53")
	v.must(netns.Remove(pod.netns))
	v.become(dnsAt())
	v.looks()
	d, err := v.layer.Describe()
	v.must(err)
	if all := strings.Join(d.Degraded, "\n"); !strings.Contains(all, "1 connected sockets whose endpoint is gone could not be closed") {
		t.Errorf("degraded: %s", all)
	}
	resolver.conn.Close()
	v.looks()
	if d, err = v.layer.Describe(); err != nil || len(d.Degraded) > 0 && strings.Contains(strings.Join(d.Degraded, "\n"), "could not be closed") {
		t.Errorf("degraded, although its program has closed it: %v, %v", d.Degraded, err)
	}
}

// More sockets than are closed in one go.
func TestManySocketsAreClosedInParts(t *testing.T) {
	v := newVillage(t, Settings{Drain: 100 * time.Millisecond})
	pod, server := v.pod(), v.pod().servesAll("server")
	v.open(dnsAt(server))
	_, streams := v.callAll(pod.netns)
	const many = 5*closeAtMost + 100
	v.must(pod.inside(func() error {
		for range many - 2 { // two there are already
			conn, err := net.Dial("udp", "10.96.0.10:53")
			if err != nil {
				return err
			}
			t.Cleanup(func() { conn.Close() })
		}
		return nil
	}))
	v.become(dnsAt())
	v.looks()
	if n := v.reason(closedUDP); n != closeAtMost {
		t.Errorf("%d sockets were closed in one go, want %d", n, closeAtMost)
	}
	v.closes(waiting(streams)...)
	v.settles()
	if n := v.reason(closedUDP); n != many {
		t.Errorf("%d sockets were closed, want %d", n, many)
	}
}

// cilium#39470: a socket of family AF_INET6 that talks to ::ffff:a.b.c.d.
func TestMappedSocketsOfAnEndpointThatIsGone(t *testing.T) {
	v := newVillage(t, Settings{Drain: time.Millisecond})
	pod, server := v.pod(), v.pod().servesAll("server")
	v.open(dnsAt(server))
	var clients []*client
	for kind, to := range map[int]*unix.SockaddrInet6{
		unix.SOCK_DGRAM:  {Port: 53, Addr: mapped(10, 96, 0, 10)},
		unix.SOCK_STREAM: {Port: 80, Addr: mapped(10, 96, 0, 1)},
	} {
		var fd int
		v.must(pod.inside(func() (err error) {
			if fd, err = unix.Socket(unix.AF_INET6, kind|unix.SOCK_CLOEXEC, 0); err == nil {
				err = unix.Connect(fd, to)
			}
			return err
		}))
		file := os.NewFile(uintptr(fd), "")
		conn, err := net.FileConn(file)
		file.Close()
		v.must(err)
		t.Cleanup(func() { conn.Close() })
		c := &client{what: fmt.Sprintf("mapped, type %d", kind), conn: conn, ended: make(chan error, 1)}
		c.talks(v)
		clients = append(clients, c)
	}
	v.become(dnsAt())
	v.closes(waiting(clients)...)
}

// The kernel hides the TCP sockets of one of MPTCP. When they are closed, it waits
// net.mptcp.close_timeout for others, a minute, before the program is told.
func TestMultipathSocketsOfAnEndpointThatIsGone(t *testing.T) {
	v := newVillage(t, Settings{Drain: time.Millisecond})
	pod, server := v.pod(), v.pod().servesAll("server")
	v.open(dnsAt(server))
	c := &client{what: "multipath", ended: make(chan error, 1)}
	dialer := net.Dialer{}
	dialer.SetMultipathTCP(true)
	v.must(pod.inside(func() (err error) {
		_ = netns.SetSysctl("net.mptcp.close_timeout", "1") // not there before Linux 6.7
		c.conn, err = dialer.Dial("tcp", "10.96.0.1:80")
		return err
	}))
	t.Cleanup(func() { c.conn.Close() })
	c.talks(v)
	v.become(dnsAt())
	for late := time.Now().Add(patience); v.reason(closedTCP) == 0; time.Sleep(time.Millisecond) {
		v.tick()
		if time.Now().After(late) {
			t.Fatal("its TCP socket is not closed")
		}
	}
}

// A NodePort is a Service's address at each of the node's, and its port may be
// another Service's at one of them.
func TestAnEndpointIsGoneForWhomeverLedToIt(t *testing.T) {
	web := serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080, "10.244.1.1")
	web.Type, web.Ports[0].NodePort = model.NodePort, 30080
	web.Ports[0].Backends[0].Ready = false
	shop := serviceOf("shop", model.TCP, 30080, []string{"10.96.0.2"}, 8080, "10.244.1.2")
	shop.ExternalIPs = []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	want := New(Settings{Node: "n1"}).Plan(&model.Snapshot{Complete: true, Services: []*model.Service{shop, web}}).(*Picture)
	s := &stuck{have: inForce(nil), wanted: want}
	for _, row := range []struct {
		frontend, endpoint string
		gone               bool
	}{
		{"10.96.0.1:80", "10.244.1.1:8080", false}, // not ready
		{"10.96.0.1:80", "10.244.1.1:8081", true},
		{"10.96.0.1:80", "10.244.1.2:8080", true}, // another Service's
		{"10.96.0.3:80", "10.244.1.1:8080", true}, // a Service that is deleted
		{"192.0.2.9:30080", "10.244.1.1:8080", false},
		{"192.0.2.9:30080", "10.244.1.2:8080", true},
		{"192.0.2.1:30080", "10.244.1.1:8080", false},
		{"192.0.2.1:30080", "10.244.1.2:8080", false},
		{"[2001:db8::1]:30080", "10.244.1.1:8080", true},
	} {
		u := use{Frontend{netip.MustParseAddrPort(row.frontend), model.TCP}, netip.MustParseAddrPort(row.endpoint)}
		if s.gone(u) != row.gone {
			t.Errorf("%s -> %s: gone: %v", row.frontend, row.endpoint, !row.gone)
		}
	}
}

// cilium#48564: a socket that sends without connecting is nobody's, however it is
// bound. It goes on with the next endpoint.
func TestASocketThatIsNotConnectedIsNotClosed(t *testing.T) {
	v := newVillage(t, Settings{})
	home, first, second := v.pod(), v.pod().servesAll("first"), v.pod().servesAll("second")
	v.open(dnsAt(first))
	var free, left net.PacketConn
	v.must(home.inside(func() (err error) {
		if free, err = net.ListenPacket("udp4", ":0"); err != nil {
			return err
		}
		left, err = net.ListenPacket("udp4", ":0")
		return err
	}))
	t.Cleanup(func() { free.Close(); left.Close() })
	v.must(connectAndLeave(left.(*net.UDPConn)))
	asks := func(socket net.PacketConn) string {
		socket.SetDeadline(time.Now().Add(patience))
		_, err := socket.WriteTo([]byte("?"), &net.UDPAddr{IP: net.IPv4(10, 96, 0, 10), Port: 53})
		v.must(err)
		answer := make([]byte, 64)
		n, _, err := socket.ReadFrom(answer)
		v.must(err)
		name, _, _ := strings.Cut(string(answer[:n]), " ")
		return name
	}
	for _, server := range []struct {
		name string
		at   *pod
	}{{"first", first}, {"second", second}} {
		v.become(dnsAt(server.at))
		v.settles()
		for _, socket := range []net.PacketConn{free, left} {
			if name := asks(socket); name != server.name {
				t.Errorf("%s answers, want %s", name, server.name)
			}
		}
	}
	if n := v.reason(closedUDP); n > 0 {
		t.Errorf("%d sockets were closed", n)
	}
}

// connectAndLeave connects a socket to the DNS Service, and takes that back.
func connectAndLeave(socket *net.UDPConn) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	control := raw.Control(func(fd uintptr) {
		if err = unix.Connect(int(fd), &unix.SockaddrInet4{Port: 53, Addr: [4]byte{10, 96, 0, 10}}); err != nil {
			return
		}
		nobody := unix.RawSockaddr{Family: unix.AF_UNSPEC}
		if _, _, code := unix.Syscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&nobody)), unsafe.Sizeof(nobody)); code != 0 {
			err = code
		}
	})
	return errors.Join(control, err)
}

// The agent is woken when sockets are to be looked at, and not otherwise.
func TestTheAgentIsWoken(t *testing.T) {
	v := newVillage(t, Settings{})
	pod, first, second := v.pod(), v.pod().servesAll("first"), v.pod().servesAll("second")
	v.open(dnsAt(first))
	v.settles()
	woken := func() bool {
		select {
		case <-v.layer.stuck.wake:
			return true
		default:
			return false
		}
	}
	woken()
	resolver := v.connects(pod.netns, "udp", "10.96.0.10:53")
	v.become(dnsAt(first, second))
	if !v.layer.stuck.due.IsZero() {
		t.Error("another endpoint is no reason to look at sockets")
	}
	v.become(dnsAt(second))
	select {
	case <-v.layer.stuck.wake:
	case <-time.After(patience):
		t.Fatal("nobody is woken")
	}
	v.closes(resolver.waits())
}

// On the packet path a connection whose endpoint is gone ends as well: who waits for
// something to read is told, in whatever pod.
func TestFlowsOfAnEndpointThatIsGoneAreEnded(t *testing.T) {
	const drain = 300 * time.Millisecond
	v := newVillage(t, Settings{Path: PathPacket, Drain: drain})
	client := v.pod()
	leave := client.stay() // a process, by which its namespace is found
	defer leave()
	first, second, unready := v.pod().servesAll("first"), v.pod().servesAll("second"), v.pod().servesAll("unready")
	v.open(dnsAt(unready))
	_, kept := v.callAll(client.netns)
	v.become(dnsAt(first))
	_, streams := v.callAll(client.netns)
	direct := v.connects(client.netns, "tcp", netip.AddrPortFrom(first.ip4, 8080).String())
	_, ended := v.callAll(client.netns)
	for _, c := range ended { // which is remembered for a minute, and not counted
		hangUp(c.conn)
	}
	after := dnsAt(second, unready)
	for _, s := range after.Services {
		for i := range s.Ports[0].Backends {
			b := &s.Ports[0].Backends[i]
			b.Ready = b.Address.Addr() != unready.ip4 && b.Address.Addr() != unready.ip6
		}
	}
	v.become(after)
	gone := time.Now()
	v.closes(waiting(streams)...)
	if took := time.Since(gone); took < drain {
		t.Errorf("connections were ended after %v, want %v", took, drain)
	}
	v.settles()
	v.allTalk(append(kept, direct))
	if tcp := v.reason(closedTCP); tcp != uint64(len(streams)) {
		t.Errorf("%d were counted, want %d", tcp, len(streams))
	}
	_, again := v.callAll(client.netns)
	v.allTalk(again)
}

// A client whose socket is not the node's to close, a virtual machine's or one
// outside, is reset as soon as it sends; its endpoint, if it lives, hears of it.
func TestASenderToAnEndpointThatIsGoneIsReset(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket, Drain: time.Nanosecond})
	client := v.pod()
	first, second := v.pod().servesAll("first"), v.pod().servesAll("second")
	v.open(dnsAt(first))
	_, streams := v.callAll(client.netns)
	v.become(dnsAt(second))
	v.looks() // they begin to drain
	v.looks() // no process leads to the client's namespace
	for _, c := range streams {
		if err := exchangeLine(c.conn, "lost"); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v, want ECONNRESET", c.what, err)
		}
	}
	_, again := v.callAll(client.netns)
	v.allTalk(again)
}
