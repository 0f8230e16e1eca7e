package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/netns"
)

// namespace makes one for the test.
func namespace(t *testing.T, name string) (string, *Net) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces needs root")
	}
	path := filepath.Join(t.TempDir(), name)
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Remove(path); err != nil {
			t.Error(err)
		}
	})
	n, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return path, n
}

var (
	leftMAC  = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	rightMAC = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

// Both ends of a veth that was just set up send at once after Ready. Nobody is asked about one
// link to find out, for that makes it ready: they are listed.
func TestReady(t *testing.T) {
	_, left := namespace(t, "left")
	rightPath, right := namespace(t, "right")
	waited := 0
	for round := range 50 {
		near, err := left.Veth(Veth{Name: "near", MAC: leftMAC, Peer: "far", PeerMAC: rightMAC, PeerNamespace: rightPath})
		if err != nil {
			t.Fatal(err)
		}
		far, err := right.Index("far")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(right.Up(far), left.Up(near)); err != nil {
			t.Fatal(err)
		}
		if !sends(t, left, "near") || !sends(t, right, "far") {
			waited++
		}
		if err := errors.Join(left.Ready(near), right.Ready(far)); err != nil {
			t.Fatal(err)
		}
		for name, n := range map[string]*Net{"near": left, "far": right} {
			if !sends(t, n, name) {
				t.Errorf("round %d: %s is ready, and sends nothing", round, name)
			}
		}
		if err := left.Delete("near"); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d of 50 were not ready when they had been set up", waited)
	if err := left.Ready(4711); err == nil {
		t.Error("a link that is not there is ready")
	}
}

// sends says whether the kernel sends by a link.
func sends(t *testing.T, n *Net, name string) bool {
	t.Helper()
	all, err := n.handle.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(l netlink.Link) bool { return l.Attrs().Name == name })
	return i >= 0 && all[i].Attrs().OperState == netlink.OperUp
}

// TestTwoNamespacesTalk joins two namespaces by hand, each end with addresses
// that no range joins, and sends a datagram over both families.
func TestTwoNamespacesTalk(t *testing.T) {
	leftPath, left := namespace(t, "left")
	rightPath, right := namespace(t, "right")
	near, err := left.Veth(Veth{Name: "near", MAC: leftMAC, Peer: "far", PeerMAC: rightMAC, PeerNamespace: rightPath})
	if err != nil {
		t.Fatal(err)
	}
	far, err := right.Index("far")
	if err != nil {
		t.Fatal(err)
	}
	setUp(t, left, near, "10.0.0.1/32", "fd00::1/128")
	setUp(t, right, far, "10.9.9.9/32", "fd99::9/128")
	for _, c := range []struct {
		n                *Net
		link             int
		range_, via, mac string
	}{
		{left, near, "10.9.9.0/24", "10.9.9.1", rightMAC.String()},
		{left, near, "fd99::9/128", "fe80::1", rightMAC.String()},
		{right, far, "0.0.0.0/0", "169.254.1.1", leftMAC.String()},
		{right, far, "::/0", "fe80::1", leftMAC.String()},
	} {
		mac, _ := net.ParseMAC(c.mac)
		via := netip.MustParseAddr(c.via)
		if err := c.n.Neigh(c.link, via, mac); err != nil {
			t.Fatal(err)
		}
		if err := c.n.Route(Route{To: netip.MustParsePrefix(c.range_), Via: via, Link: c.link}); err != nil {
			t.Fatal(err)
		}
	}
	for _, target := range []string{"10.9.9.9", "fd99::9"} {
		talk(t, leftPath, rightPath, net.JoinHostPort(target, "7"))
	}
	inUse(t, left, "10.0.0.1/32", "10.9.9.0/24", "fd00::1/128", "fd99::9/128")
	inUse(t, right, "10.9.9.9/32", "fd99::9/128")
	if err := left.Delete("near"); err != nil {
		t.Fatal(err)
	}
	if _, err := right.Index("far"); err == nil {
		t.Error("near is deleted, and far is still there")
	}
	inUse(t, left)
}

// setUp sets a link up and gives it addresses.
func setUp(t *testing.T, n *Net, index int, prefixes ...string) {
	t.Helper()
	if err := n.Up(index); err != nil {
		t.Fatal(err)
	}
	for _, p := range prefixes {
		if err := n.Addr(index, netip.MustParsePrefix(p)); err != nil {
			t.Fatal(err)
		}
	}
}

// talk sends datagrams from one namespace to the other until one is heard: the
// kernel can take a second to notice that both ends of a veth are up.
func talk(t *testing.T, from, to, target string) {
	t.Helper()
	var server, client net.Conn
	err := netns.Do(to, func() error {
		conn, err := net.ListenPacket("udp", target)
		if err == nil {
			server = conn.(*net.UDPConn)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := netns.Do(from, func() (err error) { client, err = net.Dial("udp", target); return err }); err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	buffer := make([]byte, 16)
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		fmt.Fprint(client, "hello")
		server.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if n, err := server.Read(buffer); err == nil && string(buffer[:n]) == "hello" {
			return
		}
	}
	t.Errorf("%s heard nothing", target)
}

// inUse compares the ranges in use, the link-local ones left out.
func inUse(t *testing.T, n *Net, want ...string) {
	t.Helper()
	used, err := n.InUse()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range used {
		if !p.Addr().IsLinkLocalUnicast() && !slices.Contains(got, p.String()) {
			got = append(got, p.String())
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("in use: %v, want %v", got, want)
	}
}

func TestBridgeHasPorts(t *testing.T) {
	_, left := namespace(t, "left")
	right, _ := namespace(t, "right")
	bridge, err := left.Bridge("fabric")
	if err != nil {
		t.Fatal(err)
	}
	port, err := left.Veth(Veth{Name: "port", Peer: "eth0", PeerNamespace: right})
	if err != nil {
		t.Fatal(err)
	}
	if err := left.Join(bridge, port); err != nil {
		t.Fatal(err)
	}
	if l, err := left.handle.LinkByIndex(port); err != nil || l.Attrs().MasterIndex != bridge {
		t.Errorf("the master of the port is %v, want %d; %v", l, bridge, err)
	}
}

func TestWhatIsNotThere(t *testing.T) {
	_, n := namespace(t, "alone")
	if err := n.Delete("nothing"); err != nil {
		t.Errorf("delete a link that is not there: %v", err)
	}
	if _, err := n.Index("nothing"); err == nil {
		t.Error("a link that is not there has an index")
	}
	if err := n.Up(4711); err == nil {
		t.Error("a link that is not there was set up")
	}
	if err := n.UpLoopback(); err != nil {
		t.Error(err)
	}
	if _, err := Open("/nowhere"); err == nil {
		t.Error("a namespace that is not there was opened")
	}
}

// A device that comes and an address that it is given are told at once, and nothing
// is told while nothing happens or after the end.
func TestWatchTellsDevicesAndAddresses(t *testing.T) {
	path, n := namespace(t, "watched")
	told := make(chan bool, 1000)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Watch(ctx, path, func() { told <- true }) }()
	tells := func(what string) {
		t.Helper()
		select {
		case <-told:
		case <-time.After(10 * time.Second):
			t.Fatalf("nothing was told of %s", what)
		}
		for quiet := false; !quiet; { // the last of it
			select {
			case <-told:
			case <-time.After(300 * time.Millisecond):
				quiet = true
			}
		}
	}
	tells("the beginning")
	bridge, err := n.Bridge("br0")
	if err != nil {
		t.Fatal(err)
	}
	tells("a device")
	if err := n.Addr(bridge, netip.MustParsePrefix("192.0.2.1/24")); err != nil {
		t.Fatal(err)
	}
	tells("an IPv4 address")
	if err := n.Addr(bridge, netip.MustParsePrefix("fd00::1/64")); err != nil {
		t.Fatal(err)
	}
	tells("an IPv6 address")
	stop()
	if err := <-ended; err != nil {
		t.Errorf("the watch ended with %v", err)
	}
}

// A device pair counts what its queues do; a bridge has no counters of its own.
func TestCounters(t *testing.T) {
	path, n := namespace(t, "counted")
	far, _ := namespace(t, "far")
	if _, err := n.Veth(Veth{Name: "near", Peer: "far", PeerNamespace: far}); err != nil {
		t.Fatal(err)
	}
	err := netns.Do(path, func() error {
		found, err := Counters("near")
		if err != nil {
			return err
		}
		if _, has := found["rx_queue_0_xdp_drops"]; !has {
			t.Errorf("counters of a pair: %v", found)
		}
		none, err := Counters("lo")
		if len(none) > 0 || err != nil {
			t.Errorf("counters of loopback: %v, %v", none, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// What a pair is made with, and routes that know who made them.
func TestRoutesOfOneProtocol(t *testing.T) {
	const ours = 109
	path, left := namespace(t, "left")
	rightPath, _ := namespace(t, "right")
	near, err := left.Veth(Veth{Name: "near", MAC: leftMAC, MTU: 1400, Alias: "of a pod", Peer: "far", PeerNamespace: rightPath})
	if err != nil {
		t.Fatal(err)
	}
	if err := left.NoLinkLocal(near); err != nil {
		t.Fatal(err)
	}
	setUp(t, left, near, "192.0.2.1/32", "2001:db8::1/128")
	var want []Route
	for _, r := range []Route{
		{To: netip.MustParsePrefix("10.1.0.7/32"), Link: near, Source: netip.MustParseAddr("192.0.2.1"), Protocol: ours},
		{To: netip.MustParsePrefix("fd00::7/128"), Link: near, Source: netip.MustParseAddr("2001:db8::1"), Protocol: ours},
	} {
		for range 2 {
			if err := left.SetRoute(r); err != nil {
				t.Fatal(err)
			}
		}
		want = append(want, r)
	}
	if err := left.Route(Route{To: netip.MustParsePrefix("10.2.0.0/24"), Link: near}); err != nil {
		t.Fatal(err)
	}
	if got, err := left.Routes(ours); err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v, not %v", got, err, want)
	}
	if err := left.Neigh(near, netip.MustParseAddr("10.1.0.7"), rightMAC); err != nil {
		t.Fatal(err)
	}
	if neighs, err := left.Neighs(near); err != nil || neighs[netip.MustParseAddr("10.1.0.7")].String() != rightMAC.String() {
		t.Error(neighs, err)
	}
	devices, err := left.Devices()
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(devices, func(d Device) bool { return d.Index == near })
	if d := devices[at]; d.Alias != "of a pod" || d.MTU != 1400 || d.MAC.String() != leftMAC.String() {
		t.Errorf("%+v", d)
	}
	if slices.ContainsFunc(devices[at].Addresses, netip.Addr.IsLinkLocalUnicast) {
		t.Errorf("in %s: %v", path, devices[at].Addresses)
	}
	for range 2 {
		if err := left.DeleteRoute(want[0]); err != nil {
			t.Error(err)
		}
	}
	if got, err := left.Routes(ours); err != nil || len(got) != 1 {
		t.Error(got, err)
	}
}
