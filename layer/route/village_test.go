package route

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// village is two nodes with a pod each. Between them is a wire, or a router.
//
//	pod1 10.244.1.7 - node1 192.0.2.1 ~~~ 192.0.2.2 node2 - 10.244.2.7 pod2
type village struct {
	*layertest.Bed // node1
	t              testing.TB
	nodes          [2]string
	pods           [2]string
	uplinks        [2]int
	ports          [2]int
	settings       [2]Settings
	six            bool // nodes have addresses of IPv6 alone
}

var (
	nodeMACs = [2]net.HardwareAddr{{2, 0, 0, 0, 1, 1}, {2, 0, 0, 0, 2, 1}}
	podMACs  = [2]net.HardwareAddr{{2, 0, 0, 0, 1, 2}, {2, 0, 0, 0, 2, 2}}
)

func newVillage(t *testing.T, mode Mode, six bool) *village {
	v := bare(t, mode, six)
	one, err := link.Open(v.nodes[0])
	must(t, err)
	defer one.Close()
	_, err = one.Veth(link.Veth{Name: "uplink", Peer: "uplink", PeerNamespace: v.nodes[1]})
	must(t, err)
	for i := range v.nodes {
		v.furnish(i)
	}
	return v
}

// bare makes the nodes, and nothing between them.
func bare(t *testing.T, mode Mode, six bool) *village {
	t.Helper()
	v := &village{Bed: layertest.NewBed(t), t: t, six: six}
	v.nodes = [2]string{v.NetNS, filepath.Join(t.TempDir(), "node2")}
	must(t, netns.Create(v.nodes[1]))
	t.Cleanup(func() { must(t, netns.Remove(v.nodes[1])) })
	must(t, os.Mkdir(filepath.Join(v.BPF, "millrace"), 0o700))
	for i := range v.nodes {
		v.settings[i] = Settings{Node: fmt.Sprintf("n%d", i+1), Mode: mode, Netns: v.nodes[i], Pins: filepath.Join(v.BPF, "millrace", fmt.Sprintf("route%d", i+1))}
		must(t, netns.Do(v.nodes[i], func() error {
			for _, s := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv4.conf.all.rp_filter", "net.ipv4.conf.default.rp_filter"} {
				if err := netns.SetSysctl(s, "1"); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	return v
}

// furnish gives a node its addresses, and a pod.
func (v *village) furnish(i int) {
	v.t.Helper()
	node, err := link.Open(v.nodes[i])
	must(v.t, err)
	defer node.Close()
	v.uplinks[i], err = node.Index("uplink")
	must(v.t, err)
	must(v.t, node.UpLoopback())
	must(v.t, node.Up(v.uplinks[i]))
	if !v.six {
		must(v.t, node.Addr(v.uplinks[i], netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/24", i+1))))
	}
	must(v.t, node.Addr(v.uplinks[i], netip.MustParsePrefix(fmt.Sprintf("2001:db8::%d/64", i+1))))
	v.pods[i] = filepath.Join(v.t.TempDir(), fmt.Sprintf("pod%d", i+1))
	must(v.t, netns.Create(v.pods[i]))
	v.t.Cleanup(func() { must(v.t, netns.Remove(v.pods[i])) })
	v.ports[i], err = node.Veth(link.Veth{Name: "pod", MAC: nodeMACs[i], Peer: "eth0", PeerMAC: podMACs[i], PeerNamespace: v.pods[i]})
	must(v.t, err)
	must(v.t, node.Up(v.ports[i]))
	pod, err := link.Open(v.pods[i])
	must(v.t, err)
	defer pod.Close()
	eth0, err := pod.Index("eth0")
	must(v.t, err)
	must(v.t, pod.UpLoopback())
	must(v.t, pod.Up(eth0))
	for _, end := range []struct {
		own netip.Addr
		via string
	}{{podAddress(i, false), "169.254.1.1"}, {podAddress(i, true), "fe80::1"}} {
		own, via := netip.PrefixFrom(end.own, end.own.BitLen()), netip.MustParseAddr(end.via)
		must(v.t, pod.Addr(eth0, own))
		must(v.t, pod.Neigh(eth0, via, nodeMACs[i]))
		must(v.t, pod.Route(link.Route{To: netip.PrefixFrom(via, via.BitLen()), Link: eth0}))
		must(v.t, pod.Route(link.Route{To: netip.PrefixFrom(via, 0).Masked(), Via: via, Link: eth0}))
		must(v.t, node.Route(link.Route{To: own, Link: v.ports[i]}))
		must(v.t, node.Neigh(v.ports[i], own.Addr(), podMACs[i]))
	}
}

func podAddress(i int, six bool) netip.Addr {
	if six {
		return netip.MustParseAddr(fmt.Sprintf("fd00:244:%d::7", i+1))
	}
	return netip.MustParseAddr(fmt.Sprintf("10.244.%d.7", i+1))
}

// snapshot is the cluster of both nodes, and of others that are only named.
func (v *village) snapshot(others ...int) *model.Snapshot {
	s := &model.Snapshot{Complete: true}
	for _, i := range append([]int{1, 2}, others...) {
		n := &model.Node{Name: fmt.Sprintf("n%d", i), PodCIDRs: []netip.Prefix{
			netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i)), netip.MustParsePrefix(fmt.Sprintf("fd00:244:%d::/64", i))}}
		if !v.six {
			n.Addresses = append(n.Addresses, netip.MustParseAddr(fmt.Sprintf("192.0.2.%d", i)))
		}
		n.Addresses = append(n.Addresses, netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", i)))
		s.Nodes = append(s.Nodes, n)
	}
	return s
}

// start opens the layer on a node and applies the cluster.
func (v *village) start(i int) *Layer {
	v.t.Helper()
	l := New(v.settings[i])
	must(v.t, l.Open())
	v.t.Cleanup(func() { l.Close() })
	v.apply(l, v.snapshot())
	return l
}

func (v *village) apply(l *Layer, s *model.Snapshot) {
	v.t.Helper()
	have, err := l.Read()
	must(v.t, err)
	want := l.Plan(s)
	_, _, err = l.Apply(have, want, l.Diff(have, want, true))
	must(v.t, err)
	must(v.t, l.Settle())
}

// plain makes a node one with the kernel's own vxlan, as flannel would set it up.
func (v *village) plain(i int) {
	v.t.Helper()
	other := v.snapshot().Nodes[1-i]
	must(v.t, netns.Do(v.nodes[i], func() error {
		attrs := netlink.NewLinkAttrs()
		mac := macOf(usable(v.snapshot().Nodes[i].Addresses))
		attrs.Name, attrs.HardwareAddr, attrs.MTU = "flannel.1", mac[:], 1500-overhead6
		d := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: DefaultVNI, Port: DefaultPort, UDP6ZeroCSumRx: true, SrcAddr: v.snapshot().Nodes[i].Addresses[0].AsSlice()}
		if err := netlink.LinkAdd(d); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(d); err != nil {
			return err
		}
		there := macOf(usable(other.Addresses))
		entry := &netlink.Neigh{LinkIndex: d.Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, State: netlink.NUD_PERMANENT | netlink.NUD_NOARP,
			IP: other.Addresses[0].AsSlice(), HardwareAddr: there[:]}
		failures := []error{netlink.NeighAppend(entry)}
		for _, to := range other.PodCIDRs {
			first := to.Addr()
			family := unix.AF_INET
			flags := int(netlink.FLAG_ONLINK)
			if first.Is6() {
				family = unix.AF_INET6
			}
			failures = append(failures,
				netlink.NeighSet(&netlink.Neigh{LinkIndex: d.Index, Family: family, State: netlink.NUD_PERMANENT, IP: first.AsSlice(), HardwareAddr: there[:]}),
				netlink.RouteAdd(&netlink.Route{LinkIndex: d.Index, Dst: ipNet(to), Gw: first.AsSlice(), Flags: flags}))
		}
		for _, own := range v.snapshot().Nodes[i].PodCIDRs {
			failures = append(failures, netlink.AddrAdd(d, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(own.Addr(), own.Addr().BitLen())), Flags: unix.IFA_F_NODAD}))
		}
		return errors.Join(failures...)
	}))
}

// sh runs a command in a namespace.
func (v *village) sh(space, command string) {
	v.t.Helper()
	c := exec.Command("sh", "-ec", command)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	must(v.t, netns.Do(space, c.Start))
	if err := c.Wait(); err != nil {
		v.t.Fatalf("%s: %v: %s", command, err, out.String())
	}
}

// carry sends bytes from one pod to the other by TCP, and back.
func (v *village) carry(from int, six bool, bytes int) error {
	to := podAddress(1-from, six)
	var listener net.Listener
	err := netns.Do(v.pods[1-from], func() (err error) {
		listener, err = net.Listen("tcp", netip.AddrPortFrom(to, 80).String())
		return err
	})
	if err != nil {
		return err
	}
	defer listener.Close()
	go func() {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(60 * time.Second))
		_, _ = io.Copy(c, c)
	}()
	var c net.Conn
	err = netns.Do(v.pods[from], func() (err error) {
		c, err = net.DialTimeout("tcp", netip.AddrPortFrom(to, 80).String(), 10*time.Second)
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(60 * time.Second))
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

// counted is what the programs of a node have done.
func counted(t testing.TB, l *Layer) map[string]uint64 {
	t.Helper()
	var d layer.Description
	must(t, l.host.describe(&d))
	return d.Reasons
}

// Pods of two nodes speak to each other, whatever families are inside and outside, whether
// the other node writes VXLAN by eBPF or by the kernel.
func TestPodsOfTwoNodes(t *testing.T) {
	for _, six := range []bool{false, true} {
		for _, plain := range []bool{false, true} {
			t.Run(fmt.Sprintf("outer IPv6 %v, the other node is plain %v", six, plain), func(t *testing.T) {
				v := newVillage(t, ModeVXLAN, six)
				l := v.start(0)
				if plain {
					v.plain(1)
				} else {
					v.start(1)
				}
				for _, inner := range []bool{false, true} {
					for from := range v.nodes {
						before := counted(t, l)
						const bytes = 16 << 20
						if err := v.carry(from, inner, bytes); err != nil {
							t.Errorf("inner IPv6 %v, from pod %d: %v; %v", inner, from+1, err, counted(t, l))
							continue
						}
						after := counted(t, l)
						for _, what := range []string{"sent", "taken"} {
							n := after[what] - before[what]
							t.Logf("inner IPv6 %v, from pod %d: %s %d packets, %.1f KB each", inner, from+1, what, n, bytes/1024/float64(max(n, 1)))
						}
						if n := after["sent"] - before["sent"]; n == 0 || bytes/n < 4000 {
							t.Errorf("inner IPv6 %v, from pod %d: %d packets were sent for %d bytes: they were cut up", inner, from+1, n, bytes)
						}
						way := "taken"
						if inner != six && !haveTCX() {
							way = "taken_stack"
						}
						if after[way] == before[way] {
							t.Errorf("inner IPv6 %v, from pod %d: nothing was %s: %v", inner, from+1, way, after)
						}
					}
				}
			})
		}
	}
}
