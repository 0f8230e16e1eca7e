package masquerade

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/netns"
)

// narrow leaves so few free ports to the node: 1024 to 1087.
const narrow = 64

func newNarrowIsland(t *testing.T) *island {
	is := newIsland(t)
	must(t, netns.Do(is.NetNS, func() error {
		return netns.SetSysctl("net.ipv4.ip_local_port_range", fmt.Sprintf("%d 65535", 1024+narrow))
	}))
	return is
}

// Where all ports towards a destination are taken, the next flow there is dropped and the
// destination is named; others are served by the same ports. Flows that have ended make
// room.
func TestExhaustion(t *testing.T) {
	is := newNarrowIsland(t)
	is.serve()
	is.answer(is.world, "udp", at(world4, 81))
	l := is.start()
	ports := map[uint16]bool{}
	var refused int
	var open []net.Conn
	for range 2 * narrow {
		c, err := is.dial(is.pod, "tcp", at(world4, 80))
		if err != nil {
			if refused++; refused == 3 {
				break
			}
			continue
		}
		defer c.Close()
		open = append(open, c)
		from, err := seen(c)
		must(t, err)
		if ports[from.Port()] || from.Port() < 1024 || from.Port() >= 1024+narrow {
			t.Errorf("port %d was given, twice or out of the range", from.Port())
		}
		ports[from.Port()] = true
	}
	now, described := counted(t, l), describe(t, l)
	t.Logf("%d ports were given, %d connections refused: %v", len(ports), refused, now)
	if refused < 3 || len(ports) < narrow*3/4 || now["no_port"] == 0 {
		t.Errorf("%d ports were given, %d connections refused: %v", len(ports), refused, now)
	}
	if !strings.Contains(described, "towards 198.51.100.9:80/tcp: pods of this node have used nearly all 64") {
		t.Errorf("nobody says towards whom: %s", described)
	}
	anHourLater(t, l)
	if described := describe(t, l); strings.Contains(described, "no source port") {
		t.Errorf("an hour later it is still said: %s", described)
	}
	for _, other := range []netip.AddrPort{at(world6, 80), at(world4, 81)} {
		if from, err := is.ask("udp", other.Addr().String(), other.Port()); err != nil || from.Port() >= 1024+narrow {
			t.Errorf("towards %s: from %s, %v", other, from, err)
		}
	}
	for _, c := range open {
		_ = c.(*net.TCPConn).SetLinger(0) // by a reset
		c.Close()
	}
	time.Sleep(2500 * time.Millisecond) // KEEP_LEAST, in whole seconds
	for range 10 {
		if _, err := is.ask("tcp", world4, 80); err != nil {
			t.Errorf("after all were closed: %v; %v", err, counted(t, l))
		}
	}
	if now := counted(t, l); now["cut"] == 0 {
		t.Errorf("flows that were closed gave no way: %v", now)
	}
}

// anHourLater makes what is remembered of destinations an hour older.
func anHourLater(t *testing.T, l *Layer) {
	t.Helper()
	m := bpfmap.New[datapathDestination, datapathExhaustion](l.host.(*datapath).Maps[datapathMapExhausted])
	all, err := m.All()
	must(t, err)
	for to, of := range all {
		of.Last -= 3601
		must(t, errors.Join(m.Put([]datapathDestination{to}, []datapathExhaustion{of})...))
	}
}

func describe(t *testing.T, l *Layer) string {
	t.Helper()
	d, err := l.Describe()
	must(t, err)
	return strings.Join(d.Degraded, "\n")
}

// Ports at which the node's own sockets listen are not given.
func TestPortsOfTheNodesSockets(t *testing.T) {
	is := newNarrowIsland(t)
	is.serve()
	l := is.start()
	const left = 8
	must(t, netns.Do(is.NetNS, func() error {
		for port := 1024; port < 1024+narrow-left; port++ {
			listener, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			t.Cleanup(func() { listener.Close() })
			c, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
		}
		return nil
	}))
	given := 0
	for _, to := range []string{world4, world6} {
		for _, network := range []string{"tcp", "udp"} {
			for range 4 {
				from, err := is.ask(network, to, 80)
				if err == nil && from.Port() < 1024+narrow-left {
					t.Errorf("%s to %s got port %d, at which the node listens", network, to, from.Port())
				}
				if err == nil {
					given++
				}
			}
		}
	}
	if given < 12 {
		t.Errorf("%d of 16 flows got a port, of %d that are free: %v", given, left, counted(t, l))
	}
}

// A socket of the node that speaks from a port later gets its answers, and the pod's flow
// another port.
func TestTheNodeGoesFirst(t *testing.T) {
	is := newNarrowIsland(t)
	is.serve()
	l := is.start()
	c, err := is.dial(is.pod, "udp", at(world4, 80))
	must(t, err)
	defer c.Close()
	before, err := seen(c)
	must(t, err)
	must(t, netns.Do(is.NetNS, func() error {
		own, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(before), net.UDPAddrFromAddrPort(at(world4, 80)))
		if err != nil {
			return err
		}
		t.Cleanup(func() { own.Close() })
		_ = own.SetDeadline(time.Now().Add(patience))
		if from, err := seen(own); err != nil || from != before {
			t.Errorf("the node speaks from %s and is seen at %s: %v; %v", before, from, err, counted(t, l))
		}
		return nil
	}))
	after, err := seen(c)
	if err != nil || after == before || counted(t, l)["yielded"] != 1 {
		t.Errorf("the pod spoke from %s and speaks from %s: %v; %v", before, after, err, counted(t, l))
	}
}

// A table that is full of flows that live takes no more; when they have ended it does.
func TestFullTable(t *testing.T) {
	is := newIsland(t)
	is.settings.Flows = 64
	is.serve()
	l := is.start()
	var open []net.Conn
	for range 80 {
		c, err := is.dial(is.pod, "tcp", at(world4, 80))
		if err != nil {
			break
		}
		defer c.Close()
		_, err = seen(c)
		must(t, err)
		open = append(open, c)
	}
	if now := counted(t, l); len(open) > 64 || len(open) < 48 || now["full"] == 0 {
		t.Errorf("%d flows in a table of 64: %v", len(open), now)
	}
	for i, c := range open {
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write([]byte{1}); err != nil {
			t.Errorf("flow %d: %v", i, err)
		}
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Errorf("flow %d was cut: %v", i, err)
		}
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	time.Sleep(2500 * time.Millisecond) // KEEP_LEAST, in whole seconds
	for range 20 {
		if _, err := is.ask("udp", world4, 80); err != nil {
			t.Errorf("after all were closed: %v; %v", err, counted(t, l))
		}
	}
}
