package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/model"
	"golang.org/x/sys/unix"
)

// gateways are what every pod's default routes point to: the node's end of the
// pod's veth, under addresses that nobody owns. A permanent neighbour entry
// says their hardware address, so they never answer ARP or neighbour discovery.
var gateways = []netip.Addr{netip.MustParseAddr("169.254.1.1"), netip.MustParseAddr("fe80::1")}

// gatewayMAC is that of the node's end of every pod's veth.
var gatewayMAC = net.HardwareAddr{0x02, 0x6c, 0x61, 0x62, 0x00, 0x01}

// macOf derives a pod's or node's hardware address from its first address.
func macOf(addrs []netip.Addr) net.HardwareAddr {
	a := addrs[0].As16()
	return net.HardwareAddr{0x02, 0x6d, a[12], a[13], a[14], a[15]}
}

// settings are the /proc/sys settings of every namespace that has addresses:
// IPv6 addresses without duplicate detection, no router discovery, and no
// reverse path filter, which would drop what an eBPF program sends past the
// routes. default.* is for links made later, so this comes first.
var settings = [][2]string{
	{"net.ipv4.conf.all.rp_filter", "0"},
	{"net.ipv4.conf.default.rp_filter", "0"},
	{"net.ipv6.conf.all.disable_ipv6", "0"},
	{"net.ipv6.conf.default.disable_ipv6", "0"},
	{"net.ipv6.conf.default.accept_dad", "0"},
	{"net.ipv6.conf.default.dad_transmits", "0"},
	{"net.ipv6.conf.default.accept_ra", "0"},
	{"net.ipv6.conf.default.addr_gen_mode", "1"}, // no link-local address: nothing here needs one
}

// forwarding makes a namespace a router.
var forwarding = [][2]string{
	{"net.ipv4.ip_forward", "1"},
	{"net.ipv6.conf.all.forwarding", "1"},
	{"net.ipv4.conf.all.send_redirects", "0"},
	{"net.ipv4.conf.default.send_redirects", "0"},
}

// noIPv6 keeps the fabric's bridge from taking part in what it carries.
var noIPv6 = [][2]string{{"net.ipv6.conf.default.disable_ipv6", "1"}}

// makeNamespace makes a network namespace with lo up and the settings given.
func makeNamespace(path string, settings ...[][2]string) error {
	if err := netns.Create(path); err != nil {
		return err
	}
	return netns.Do(path, func() error {
		for _, group := range settings {
			for _, s := range group {
				if err := netns.SetSysctl(s[0], s[1]); err != nil {
					return err
				}
			}
		}
		here, err := link.Open("")
		if err != nil {
			return err
		}
		defer here.Close()
		return here.UpLoopback()
	})
}

// fabric is the segment that joins the nodes: a bridge in a namespace of its own.
type fabric struct {
	path   string
	net    *link.Net
	bridge int
}

func makeFabric(path string) (*fabric, error) {
	f := &fabric{path: path}
	err := makeNamespace(path, noIPv6)
	if err == nil {
		f.net, err = link.Open(path)
	}
	if err == nil {
		f.bridge, err = f.net.Bridge("fabric")
	}
	if err != nil {
		return nil, fmt.Errorf("make fabric: %w", err)
	}
	return f, nil
}

// node is one node's namespace, groups and folders.
type node struct {
	*model.Node
	info NodeInfo
	net  *link.Net
	eth0 int
}

// makeNode makes a node and joins it to the fabric under port number i. Its
// routes to the others are added when all exist.
func makeNode(n *model.Node, info NodeInfo, f *fabric, i int) (*node, error) {
	made := &node{Node: n, info: info}
	if err := made.make(f, i); err != nil {
		return nil, fmt.Errorf("make node %s: %w", n.Name, err)
	}
	return made, nil
}

func (n *node) make(f *fabric, i int) error {
	for _, group := range []string{"agent", "host", "pods"} {
		if err := cgroup.Create(n.info.Cgroup + "/" + group); err != nil {
			return err
		}
	}
	for _, folder := range []string{n.info.BPFFolder, n.info.RunFolder} {
		if err := os.MkdirAll(folder, 0o700); err != nil {
			return err
		}
	}
	if err := makeNamespace(n.info.Netns, settings, forwarding); err != nil {
		return err
	}
	port, err := f.net.Veth(link.Veth{
		Name:          fmt.Sprintf("node%d", i+1),
		Peer:          "eth0",
		PeerMAC:       macOf(n.Addresses),
		PeerNamespace: n.info.Netns,
	})
	if err != nil {
		return err
	}
	if n.net, err = link.Open(n.info.Netns); err != nil {
		return err
	}
	n.eth0, err = n.net.Index("eth0")
	return errors.Join(err, f.net.Join(f.bridge, port), f.net.Up(port), n.net.Up(n.eth0))
}

// address gives eth0 the node's addresses.
func (n *node) address(r Ranges) error {
	for i, addr := range n.Addresses {
		if err := n.net.Addr(n.eth0, netip.PrefixFrom(addr, r.Nodes[i].Bits())); err != nil {
			return fmt.Errorf("make node %s: %w", n.Name, err)
		}
	}
	return nil
}

// reach adds what the node must know of another: its hardware address and the
// way to its pods.
func (n *node) reach(other *node) error {
	for _, addr := range other.Addresses {
		if err := n.net.Neigh(n.eth0, addr, macOf(other.Addresses)); err != nil {
			return fmt.Errorf("make node %s: %w", n.Name, err)
		}
	}
	for _, r := range other.PodCIDRs {
		via := other.Addresses[0]
		if r.Addr().Is6() {
			via = other.Addresses[1]
		}
		if err := n.net.Route(link.Route{To: r, Via: via, Link: n.eth0}); err != nil {
			return fmt.Errorf("make node %s: %w", n.Name, err)
		}
	}
	return nil
}

// joinPod makes the pod's namespace and its way in and out: /32 and /128 on
// eth0, everything else through the node.
func (n *node) joinPod(path, veth string, addrs []netip.Addr) error {
	if err := makeNamespace(path, settings); err != nil {
		return err
	}
	mac := macOf(addrs)
	outer, err := n.net.Veth(link.Veth{Name: veth, MAC: gatewayMAC, Peer: "eth0", PeerMAC: mac, PeerNamespace: path})
	if err != nil {
		return err
	}
	if err := n.net.Up(outer); err != nil {
		return err
	}
	if err := wirePod(path, addrs); err != nil {
		return err
	}
	for _, addr := range addrs {
		err := errors.Join(
			n.net.Route(link.Route{To: netip.PrefixFrom(addr, addr.BitLen()), Link: outer}),
			n.net.Neigh(outer, addr, mac))
		if err != nil {
			return err
		}
	}
	return nil
}

// wirePod sets up the pod's side.
func wirePod(path string, addrs []netip.Addr) error {
	pod, err := link.Open(path)
	if err != nil {
		return err
	}
	defer pod.Close()
	eth0, err := pod.Index("eth0")
	if err == nil {
		err = pod.Up(eth0)
	}
	if err != nil {
		return err
	}
	for _, addr := range addrs {
		gateway, all := gateways[0], netip.MustParsePrefix("0.0.0.0/0")
		if addr.Is6() {
			gateway, all = gateways[1], netip.MustParsePrefix("::/0")
		}
		err := errors.Join(
			pod.Addr(eth0, netip.PrefixFrom(addr, addr.BitLen())),
			pod.Neigh(eth0, gateway, gatewayMAC),
			pod.Route(link.Route{To: all, Via: gateway, Link: eth0}))
		if err != nil {
			return err
		}
	}
	return nil
}

// leavePod removes what joinPod made; parts that are missing are no error.
func (n *node) leavePod(path, veth string) error {
	return errors.Join(n.net.Delete(veth), netns.Remove(path))
}

// mountBPF mounts a bpf file system of the lab's own, so that pins of the
// lab's agents are neither seen by others nor outlive the lab.
func mountBPF(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return fmt.Errorf("mount bpf file system: %w", err)
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if err := unix.Mount("millrace-lab", path, "bpf", flags, "mode=0700"); err != nil {
		return fmt.Errorf("mount bpf file system on %s: %w", path, err)
	}
	return nil
}
