// Package link makes links, addresses, routes and neighbours inside network
// namespaces, and reads which address ranges a namespace already uses.
//
// It writes what it is asked to write, through rtnetlink (rtnetlink(7)), in the
// namespace that a Net was opened in and, for the far end of a veth, in the
// namespace named in the call. It keeps no state of its own and removes only
// links that it is told to remove.
//
// Costs: a Net holds one netlink socket; each call is one or two messages of
// about 20 microseconds, except Delete, which waits for the kernel to let go of
// the link (some milliseconds).
package link

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Net speaks rtnetlink inside one network namespace. Its methods may be called
// from several goroutines.
type Net struct {
	handle *netlink.Handle
}

// Open gives a Net inside the namespace bound to path; the empty path is the
// namespace of the calling process. Close it after use.
func Open(path string) (*Net, error) {
	n := &Net{}
	open := func() (err error) {
		n.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	}
	if err := netns.In(path, open); err != nil {
		return nil, fmt.Errorf("open rtnetlink in %s: %w", path, err)
	}
	return n, nil
}

// Close gives the socket back.
func (n *Net) Close() { n.handle.Close() }

// Index is the number of the link with this name.
func (n *Net) Index(name string) (int, error) {
	l, err := n.handle.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("find link %s: %w", name, err)
	}
	return l.Attrs().Index, nil
}

// Bridge makes an Ethernet bridge that learns addresses and floods multicast,
// sets it up and returns its index.
func (n *Net) Bridge(name string) (int, error) {
	snooping := false
	bridge := &netlink.Bridge{LinkAttrs: attrs(name), MulticastSnooping: &snooping}
	if err := n.handle.LinkAdd(bridge); err != nil {
		return 0, fmt.Errorf("add bridge %s: %w", name, err)
	}
	index, err := n.Index(name)
	if err != nil {
		return 0, err
	}
	return index, n.Up(index)
}

// Join makes the link a port of the bridge, both by index.
func (n *Net) Join(bridge, port int) error {
	if err := n.handle.LinkSetMasterByIndex(byIndex(port), bridge); err != nil {
		return fmt.Errorf("add link %d to bridge %d: %w", port, bridge, err)
	}
	return nil
}

// Veth is a pair of Ethernet devices: what enters one leaves the other.
type Veth struct {
	// Name is the end in the namespace of the Net, at most 15 bytes.
	Name string
	// MAC is its hardware address; nil lets the kernel choose.
	MAC net.HardwareAddr
	// Peer is the far end's name, PeerMAC its hardware address, PeerNamespace
	// the path its namespace is bound to.
	Peer          string
	PeerMAC       net.HardwareAddr
	PeerNamespace string
}

// Veth makes the pair, both ends down, and returns the near end's index.
func (n *Net) Veth(v Veth) (int, error) {
	fd, err := unix.Open(v.PeerNamespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("add veth %s: open namespace %s: %w", v.Name, v.PeerNamespace, err)
	}
	defer unix.Close(fd)
	near := attrs(v.Name)
	near.HardwareAddr = v.MAC
	pair := &netlink.Veth{
		LinkAttrs:        near,
		PeerName:         v.Peer,
		PeerHardwareAddr: v.PeerMAC,
		PeerNamespace:    netlink.NsFd(fd),
	}
	if err := n.handle.LinkAdd(pair); err != nil {
		return 0, fmt.Errorf("add veth %s: %w", v.Name, err)
	}
	return n.Index(v.Name)
}

// Up sets a link up.
func (n *Net) Up(index int) error {
	if err := n.handle.LinkSetUp(byIndex(index)); err != nil {
		return fmt.Errorf("set link %d up: %w", index, err)
	}
	return nil
}

// UpLoopback sets lo up, which a new namespace has down.
func (n *Net) UpLoopback() error {
	index, err := n.Index("lo")
	if err != nil {
		return err
	}
	return n.Up(index)
}

// Delete removes the link with this name; of a veth both ends go. One that does
// not exist is no error.
func (n *Net) Delete(name string) error {
	l, err := n.handle.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err == nil {
		err = n.handle.LinkDel(l)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

// Addr gives a link an address and, where the prefix is longer than the
// address alone, the route to its neighbours. IPv6 addresses are usable at
// once, without duplicate address detection (RFC 4862, 5.4).
func (n *Net) Addr(index int, prefix netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(prefix)}
	if prefix.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := n.handle.AddrAdd(byIndex(index), addr); err != nil {
		return fmt.Errorf("add address %s to link %d: %w", prefix, index, err)
	}
	return nil
}

// Route is one unicast route of the main table.
type Route struct {
	// To is the range it leads to; a range of length 0 is the default route.
	To netip.Prefix
	// Via is the next hop, the zero value where To is on the link itself. It
	// need not be in a range of the link.
	Via netip.Addr
	// Link is the index of the link to leave by.
	Link int
}

// Route adds a route.
func (n *Net) Route(r Route) error {
	route := &netlink.Route{LinkIndex: r.Link, Dst: ipNet(r.To.Masked())}
	if r.Via.IsValid() {
		route.Gw = r.Via.AsSlice()
		route.Flags = int(netlink.FLAG_ONLINK)
	} else {
		route.Scope = netlink.SCOPE_LINK
	}
	if err := n.handle.RouteAdd(route); err != nil {
		return fmt.Errorf("add route %s via %s on link %d: %w", r.To, r.Via, r.Link, err)
	}
	return nil
}

// Neigh says for good which hardware address a neighbour has, so that neither
// ARP nor neighbour discovery is ever needed for it.
func (n *Net) Neigh(index int, addr netip.Addr, mac net.HardwareAddr) error {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	neigh := &netlink.Neigh{
		LinkIndex:    index,
		Family:       family,
		State:        netlink.NUD_PERMANENT,
		IP:           addr.AsSlice(),
		HardwareAddr: mac,
	}
	if err := n.handle.NeighSet(neigh); err != nil {
		return fmt.Errorf("add neighbour %s on link %d: %w", addr, index, err)
	}
	return nil
}

// InUse lists the ranges that the namespace's addresses and routes of both
// families cover: what a newcomer must not choose. Default routes, the loopback
// and multicast ranges are left out. A range can be listed more than once.
func (n *Net) InUse() ([]netip.Prefix, error) {
	var used []netip.Prefix
	keep := func(n *net.IPNet) {
		if p, ok := prefix(n); ok && p.Bits() > 0 && !p.Addr().IsMulticast() && !p.Addr().IsLoopback() {
			used = append(used, p.Masked())
		}
	}
	addrs, err := n.handle.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, addr := range addrs {
		keep(addr.IPNet)
	}
	every := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
	routes, err := n.handle.RouteListFiltered(netlink.FAMILY_ALL, every, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, route := range routes {
		keep(route.Dst)
	}
	return used, nil
}

// attrs are a new link's: the kernel's own queue length, not zero.
func attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

func byIndex(index int) netlink.Link {
	return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), ones), ok
}
