package service

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// village is a node with pods behind veths, as a CNI plug-in makes them, where
// the packet path serves.
type village struct {
	*layertest.Bed
	t     *testing.T
	node  *link.Net
	layer *Layer
	have  layer.Picture
	pods  int
}

// newVillage makes the node; settings give what is not its place.
func newVillage(t *testing.T, settings Settings) *village {
	t.Helper()
	bed := layertest.NewBed(t)
	v := &village{Bed: bed, t: t}
	v.sysctl(bed.NetNS, "net.ipv4.ip_forward", "1", "net.ipv6.conf.all.forwarding", "1",
		// a router without an address that is valid at once cannot say that a packet is too big
		"net.ipv6.conf.all.accept_dad", "0", "net.ipv6.conf.default.accept_dad", "0")
	var err error
	v.node, err = link.Open(bed.NetNS)
	v.must(err)
	t.Cleanup(v.node.Close)
	settings.Cgroup, settings.Netns, settings.Pins = bed.Cgroup, bed.NetNS, filepath.Join(bed.BPF, "service")
	v.layer = New(settings)
	return v
}

// open puts the layer in force for a cluster.
func (v *village) open(snapshot *model.Snapshot) {
	v.t.Helper()
	v.must(v.layer.Open())
	v.t.Cleanup(func() {
		v.layer.Close()
		_, err := New(v.layer.settings).Remove()
		v.must(err)
	})
	var err error
	v.have, err = v.layer.Read()
	v.must(err)
	v.become(snapshot)
}

// become makes the kernel hold another cluster and serve the pods there are.
func (v *village) become(snapshot *model.Snapshot) {
	v.t.Helper()
	have, err := v.layer.Refresh(v.have)
	v.must(err)
	want := v.layer.Plan(snapshot)
	v.have, _, err = v.layer.Apply(have, want, v.layer.Diff(have, want, true))
	v.must(err)
	v.must(v.layer.Settle())
}

func (v *village) must(err error) {
	v.t.Helper()
	if err != nil {
		v.t.Fatal(err)
	}
}

func (v *village) sysctl(path string, pairs ...string) {
	v.t.Helper()
	v.must(netns.Do(path, func() error {
		for i := 0; i < len(pairs); i += 2 {
			if err := netns.SetSysctl(pairs[i], pairs[i+1]); err != nil {
				return err
			}
		}
		return nil
	}))
}

// pod is a network namespace behind a veth with one address of each family.
type pod struct {
	v      *village
	netns  string
	device string
	ip4    netip.Addr
	ip6    netip.Addr
}

// pod adds a pod and its routes.
func (v *village) pod() *pod {
	v.t.Helper()
	v.pods++
	p := &pod{v: v, netns: filepath.Join(v.t.TempDir(), "pod"), device: fmt.Sprintf("veth%d", v.pods),
		ip4: netip.AddrFrom4([4]byte{10, 244, 1, byte(v.pods)}),
		ip6: netip.MustParseAddr(fmt.Sprintf("fd00:244::%d", v.pods))}
	v.must(netns.Create(p.netns))
	v.t.Cleanup(func() { v.must(netns.Remove(p.netns)) })
	v.sysctl(p.netns, "net.ipv6.conf.all.accept_dad", "0", "net.ipv6.conf.default.accept_dad", "0", "net.ipv4.tcp_no_metrics_save", "1")
	gateway, mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 1, 0, byte(v.pods)}
	outer, err := v.node.Veth(link.Veth{Name: p.device, MAC: gateway, Peer: "eth0", PeerMAC: mac, PeerNamespace: p.netns})
	v.must(err)
	v.must(v.node.Up(outer))
	inner, err := link.Open(p.netns)
	v.must(err)
	defer inner.Close()
	v.must(inner.UpLoopback())
	eth0, err := inner.Index("eth0")
	v.must(err)
	v.must(inner.Up(eth0))
	for _, a := range []netip.Addr{p.ip4, p.ip6} {
		way := netip.MustParseAddr("169.254.1.1")
		if a.Is6() {
			way = netip.MustParseAddr("fe80::1")
		}
		v.must(inner.Addr(eth0, netip.PrefixFrom(a, a.BitLen())))
		v.must(inner.Neigh(eth0, way, gateway))
		v.must(inner.Route(link.Route{To: netip.PrefixFrom(anyOf(a), 0), Via: way, Link: eth0}))
		v.must(v.node.Route(link.Route{To: netip.PrefixFrom(a, a.BitLen()), Link: outer}))
		v.must(v.node.Neigh(outer, a, mac))
	}
	return p
}

func anyOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// addresses are the pod's as serviceOf takes them.
func (p *pod) addresses() []string { return []string{p.ip4.String(), p.ip6.String()} }

func (p *pod) inside(f func() error) error { return netns.Do(p.netns, f) }

// serve answers, until the test ends: what is received comes back, after the
// name and the address it came from, on a line.
func (p *pod) serve(network string, port int, name string) {
	p.v.t.Helper()
	address := fmt.Sprintf("[::]:%d", port)
	p.v.must(p.inside(func() error {
		if network == "udp" {
			conn, err := net.ListenPacket("udp", address)
			if err == nil {
				p.v.t.Cleanup(func() { conn.Close() })
				go echoDatagrams(conn, name)
			}
			return err
		}
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		p.v.t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				go echoStream(conn, name)
			}
		}()
		return nil
	}))
}

func echoStream(conn net.Conn, name string) {
	defer conn.Close()
	fmt.Fprintf(conn, "%s %s\n", name, hostOf(conn.RemoteAddr()))
	io.Copy(conn, conn)
}

func echoDatagrams(conn net.PacketConn, name string) {
	buffer := make([]byte, 65536)
	for {
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return
		}
		conn.WriteTo(append([]byte(name+" "+hostOf(from)+"\n"), buffer[:n]...), from)
	}
}

func hostOf(a net.Addr) string {
	at, _ := netip.ParseAddrPort(a.String())
	return at.Addr().Unmap().String()
}

// call sends from the pod and returns the first line that comes back, and the
// rest.
func (p *pod) call(network, address, text string) (line, rest string, err error) {
	err = p.inside(func() error {
		conn, err := net.DialTimeout(network, address, patience)
		if err != nil {
			return err
		}
		defer conn.Close()
		line, rest, err = talk(conn, text)
		if got := conn.RemoteAddr().String(); err == nil && got != address {
			err = fmt.Errorf("the socket says that its peer is %s", got)
		}
		return err
	})
	return line, rest, err
}

func talk(conn net.Conn, text string) (line, rest string, err error) {
	conn.SetDeadline(time.Now().Add(patience))
	sent := make(chan error, 1)
	go func() {
		_, err := conn.Write([]byte(text))
		if stream, ok := conn.(*net.TCPConn); ok && err == nil {
			err = stream.CloseWrite()
		}
		sent <- err
	}()
	var all []byte
	if _, stream := conn.(*net.TCPConn); stream {
		all, err = io.ReadAll(conn)
	} else {
		buffer := make([]byte, 65536)
		var n int
		n, err = conn.Read(buffer)
		all = buffer[:n]
	}
	if err == nil {
		err = <-sent
	}
	line, rest, _ = strings.Cut(string(all), "\n")
	return line, rest, err
}

// exchangeLine writes a line and waits until the answer ends with it.
func exchangeLine(conn net.Conn, text string) error { return exchangeWithin(patience, conn, text) }

func exchangeWithin(limit time.Duration, conn net.Conn, text string) error {
	conn.SetDeadline(time.Now().Add(limit))
	if _, err := fmt.Fprintln(conn, text); err != nil {
		return err
	}
	var got []byte
	buffer := make([]byte, 4096)
	for !strings.HasSuffix(string(got), text+"\n") {
		n, err := conn.Read(buffer)
		if err != nil {
			return fmt.Errorf("after %q: %w", got, err)
		}
		got = append(got, buffer[:n]...)
	}
	return nil
}

// hangUp closes a connection, a TCP one when its server has closed it, too: before
// that its port cannot be taken again, for the socket is in FIN-WAIT.
func hangUp(conn net.Conn) {
	defer conn.Close()
	if stream, ok := conn.(*net.TCPConn); ok {
		conn.SetDeadline(time.Now().Add(patience))
		stream.CloseWrite()
		io.Copy(io.Discard, conn)
	}
}

// narrow gives the node's routes to a pod an MTU. The device keeps its own: a veth
// drops what its peer sends beyond it, and tells nobody.
func (p *pod) narrow(mtu int) error {
	return p.v.Inside(func() error {
		l, err := netlink.LinkByName(p.device)
		if err != nil {
			return err
		}
		for _, a := range []netip.Addr{p.ip4, p.ip6} {
			to := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
			route := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: to, Scope: netlink.SCOPE_LINK, MTU: mtu, MTULock: true}
			if err := netlink.RouteReplace(route); err != nil {
				return err
			}
		}
		return nil
	})
}

// stayVariable makes this test program a process that does nothing.
const stayVariable = "MILLRACE_TEST_STAY"

// TestStay is such a process, until its parent is gone; else it tests nothing.
func TestStay(*testing.T) {
	if os.Getenv(stayVariable) != "" {
		io.Copy(io.Discard, os.Stdin)
	}
}

// stay keeps a process in the pod, as a container does, until the function it
// returns is called: a namespace is found by its processes.
func (p *pod) stay() (leave func()) {
	p.v.t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestStay$")
	cmd.Env = append(os.Environ(), stayVariable+"=1")
	in, err := cmd.StdinPipe()
	p.v.must(err)
	p.v.must(netns.Start(p.netns, p.v.Cgroup, cmd))
	return func() {
		in.Close()
		cmd.Wait()
	}
}

func clientAddresses(p *pod) []netip.Addr { return []netip.Addr{p.ip4, p.ip6} }
