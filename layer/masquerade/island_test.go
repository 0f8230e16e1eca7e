package masquerade

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// island is a pod on a node, and the world behind a router. Neither the router nor the
// world has a way to pods.
//
//	pod 10.244.1.7 - node 192.0.2.1 ~~~ 192.0.2.254 router 198.51.100.254 ~~~ 198.51.100.9 world
type island struct {
	*layertest.Bed     // the node
	t                  testing.TB
	pod, router, world string
	uplink             int
	settings           Settings
}

// links are the wires of an island, from one namespace to the next.
var islandLinks = []struct{ name, near4, far4, near6, far6 string }{
	{"pod", "10.244.1.1/24", "10.244.1.7/24", "fd00:244:1::1/64", "fd00:244:1::7/64"},
	{"uplink", "192.0.2.1/24", "192.0.2.254/24", "2001:db8::1/64", "2001:db8::254/64"},
	{"far", "198.51.100.254/24", "198.51.100.9/24", "2001:db8:1::254/64", "2001:db8:1::9/64"},
}

const (
	pod4, pod6     = "10.244.1.7", "fd00:244:1::7"
	node4, node6   = "192.0.2.1", "2001:db8::1"
	world4, world6 = "198.51.100.9", "2001:db8:1::9"
)

func newIsland(t *testing.T) *island {
	is := &island{Bed: layertest.NewBed(t), t: t}
	is.pod, is.router, is.world = is.space("pod"), is.space("router"), is.space("world")
	must(t, os.Mkdir(filepath.Join(is.BPF, "millrace"), 0o700))
	is.settings = Settings{Node: "n1", Flows: 65536, Netns: is.NetNS, Pins: filepath.Join(is.BPF, "millrace", "masquerade")}
	for _, space := range []string{is.NetNS, is.router} {
		must(t, netns.Do(space, func() error {
			return errors.Join(netns.SetSysctl("net.ipv4.ip_forward", "1"), netns.SetSysctl("net.ipv6.conf.all.forwarding", "1"))
		}))
	}
	for _, space := range []string{is.pod, is.world} { // who pings is anybody, and many connections end
		must(t, netns.Do(space, func() error { return netns.SetSysctl("net.ipv4.ping_group_range", "0 2147483647") }))
	}
	ends := [][2]string{{is.NetNS, is.pod}, {is.NetNS, is.router}, {is.router, is.world}}
	for i, l := range islandLinks {
		is.wire(l.name, ends[i], [2][2]string{{l.near4, l.near6}, {l.far4, l.far6}})
	}
	is.route(is.pod, "pod", "10.244.1.1", "fd00:244:1::1")
	is.route(is.NetNS, "uplink", "192.0.2.254", "2001:db8::254")
	is.route(is.world, "far", "198.51.100.254", "2001:db8:1::254")
	return is
}

func (is *island) space(name string) string {
	is.t.Helper()
	path := filepath.Join(is.t.TempDir(), name)
	must(is.t, netns.Create(path))
	is.t.Cleanup(func() { must(is.t, netns.Remove(path)) })
	must(is.t, netns.Do(path, func() error { return is.onDevice("lo", netlink.LinkSetUp) }))
	return path
}

func (is *island) onDevice(name string, do func(netlink.Link) error) error {
	device, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return do(device)
}

// wire lays a wire between two namespaces, whose ends have the same name.
func (is *island) wire(name string, ends [2]string, addresses [2][2]string) {
	is.t.Helper()
	one, err := link.Open(ends[0])
	must(is.t, err)
	defer one.Close()
	index, err := one.Veth(link.Veth{Name: name, Peer: name, PeerNamespace: ends[1]})
	must(is.t, err)
	if name == "uplink" {
		is.uplink = index
	}
	for i, space := range ends {
		end, err := link.Open(space)
		must(is.t, err)
		index, err := end.Index(name)
		must(is.t, err)
		must(is.t, end.Up(index))
		for _, a := range addresses[i] {
			must(is.t, end.Addr(index, netip.MustParsePrefix(a)))
		}
		end.Close()
	}
}

// route gives a namespace default routes.
func (is *island) route(space, device string, vias ...string) {
	is.t.Helper()
	n, err := link.Open(space)
	must(is.t, err)
	defer n.Close()
	index, err := n.Index(device)
	must(is.t, err)
	for _, via := range vias {
		a := netip.MustParseAddr(via)
		must(is.t, n.Route(link.Route{To: netip.PrefixFrom(a, 0).Masked(), Via: a, Link: index}))
	}
}

// snapshot is the cluster: this node, and others that are only named.
func (is *island) snapshot(others ...int) *model.Snapshot {
	s := &model.Snapshot{Complete: true}
	for _, i := range append([]int{1}, others...) {
		s.Nodes = append(s.Nodes, &model.Node{
			Name:      fmt.Sprintf("n%d", i),
			Addresses: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", i)), netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", i))},
			PodCIDRs:  []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i)), netip.MustParsePrefix(fmt.Sprintf("fd00:244:%d::/64", i))},
		})
	}
	return s
}

// start opens the layer and applies the cluster.
func (is *island) start() *Layer {
	is.t.Helper()
	l := New(is.settings)
	must(is.t, l.Open())
	is.t.Cleanup(func() { l.Close() })
	is.apply(l, is.snapshot(2, 3))
	return l
}

func (is *island) apply(l *Layer, s *model.Snapshot) {
	is.t.Helper()
	have, err := l.Read()
	must(is.t, err)
	want := l.Plan(s)
	_, _, err = l.Apply(have, want, l.Diff(have, want, true))
	must(is.t, err)
	must(is.t, l.Settle())
}

// counted is what the programs have done.
func counted(t testing.TB, l *Layer) map[string]uint64 {
	t.Helper()
	d, err := l.Describe()
	must(t, err)
	return d.Reasons
}

// answer serves whoever asks at an address of a namespace, with the address that it comes
// from, and what it says. UDP answers each datagram, TCP says the address and then repeats.
func (is *island) answer(space, network string, at netip.AddrPort) {
	is.t.Helper()
	must(is.t, netns.Do(space, func() error {
		if network == "udp" {
			c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
			if err == nil {
				is.t.Cleanup(func() { c.Close() })
				go repeat(c)
			}
			return err
		}
		listener, err := net.Listen("tcp", at.String())
		if err == nil {
			is.t.Cleanup(func() { listener.Close() })
			go accept(listener)
		}
		return err
	}))
}

func repeat(c *net.UDPConn) {
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buffer)
		if err != nil {
			return
		}
		_, _ = c.WriteToUDPAddrPort(append([]byte(from.String()+" "), buffer[:n]...), from)
	}
}

func accept(listener net.Listener) {
	for {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if _, err := fmt.Fprintln(c, c.RemoteAddr()); err == nil {
				_, _ = io.Copy(c, c)
			}
		}()
	}
}

// patience is how long an answer is waited for: some tests wait for none.
const patience = 3 * time.Second

// dial connects from a namespace.
func (is *island) dial(space, network string, to netip.AddrPort) (c net.Conn, err error) {
	err = netns.Do(space, func() error {
		dialer := net.Dialer{Timeout: patience}
		c, err = dialer.Dial(network, to.String())
		return err
	})
	if err == nil {
		err = c.SetDeadline(time.Now().Add(patience))
	}
	return c, err
}

// seen is what the other end says that a connection comes from.
func seen(c net.Conn) (from netip.AddrPort, err error) {
	if c.LocalAddr().Network() == "udp" {
		if _, err := c.Write([]byte("hello")); err != nil {
			return from, err
		}
		buffer := make([]byte, 200)
		n, err := c.Read(buffer)
		if err != nil {
			return from, err
		}
		var text string
		_, err = fmt.Sscan(string(buffer[:n]), &text)
		return netip.MustParseAddrPort(text), err
	}
	var line []byte
	for one := make([]byte, 1); one[0] != '\n'; line = append(line, one[0]) {
		if _, err := c.Read(one); err != nil {
			return from, err
		}
	}
	return netip.ParseAddrPort(string(line[:len(line)-1]))
}

// ask asks the world once, from the pod, and returns what it says that this came from.
func (is *island) ask(network, to string, port uint16) (from netip.AddrPort, err error) {
	c, err := is.dial(is.pod, network, netip.AddrPortFrom(netip.MustParseAddr(to), port))
	if err != nil {
		return from, err
	}
	defer c.Close()
	return seen(c)
}

// carry sends bytes to the world and back.
func (is *island) carry(to string, bytes int) error {
	c, err := is.dial(is.pod, "tcp", netip.AddrPortFrom(netip.MustParseAddr(to), 80))
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := seen(c); err != nil {
		return err
	}
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, bytes))
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	back, err := io.Copy(io.Discard, c)
	if err = errors.Join(err, <-sent); err == nil && back != int64(bytes) {
		err = fmt.Errorf("%d of %d bytes came back", back, bytes)
	}
	return err
}

// serve has the world answer in both families at port 80.
func (is *island) serve() {
	is.t.Helper()
	for _, a := range []string{world4, world6} {
		for _, network := range []string{"tcp", "udp"} {
			is.answer(is.world, network, netip.AddrPortFrom(netip.MustParseAddr(a), 80))
		}
	}
}
