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
	"time"

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
	// MTU is the longest packet of both ends in bytes; 0 is the kernel's default.
	MTU int
	// Alias is a text of at most 255 bytes that the near end carries (ip-link(8)).
	Alias string
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
	near.HardwareAddr, near.MTU = v.MAC, v.MTU
	pair := &netlink.Veth{
		LinkAttrs:        near,
		PeerName:         v.Peer,
		PeerHardwareAddr: v.PeerMAC,
		PeerNamespace:    netlink.NsFd(fd),
	}
	if err := n.handle.LinkAdd(pair); err != nil {
		return 0, fmt.Errorf("add veth %s: %w", v.Name, err)
	}
	index, err := n.Index(v.Name)
	if err != nil || v.Alias == "" {
		return index, err
	}
	// A message of its own: the kernel does not heed it when it makes a device.
	if err := n.handle.LinkSetAlias(byIndex(index), v.Alias); err != nil {
		return 0, fmt.Errorf("add veth %s: set its alias: %w", v.Name, err)
	}
	return index, nil
}

// SetMTU says how long packets of a link may be, in bytes.
func (n *Net) SetMTU(index, mtu int) error {
	if err := n.handle.LinkSetMTU(byIndex(index), mtu); err != nil {
		return fmt.Errorf("set mtu of link %d to %d: %w", index, mtu, err)
	}
	return nil
}

// Up sets a link up.
func (n *Net) Up(index int) error {
	if err := n.handle.LinkSetUp(byIndex(index)); err != nil {
		return fmt.Errorf("set link %d up: %w", index, err)
	}
	return nil
}

// readyWithin is how long Ready waits at most.
const readyWithin = 100 * time.Millisecond

// Ready waits until the kernel sends by a link that was set up and has a carrier. It makes it
// so beside whoever set it up (net/core/link_watch.c), on a busy machine some milliseconds
// later, and drops without a word what is sent until then (noop_qdisc). From Linux 6.8 on it
// is made so by being asked.
func (n *Net) Ready(index int) error {
	for begun := time.Now(); ; time.Sleep(time.Millisecond) {
		l, err := n.handle.LinkByIndex(index)
		if err != nil {
			return fmt.Errorf("find out whether link %d is ready: %w", index, err)
		}
		if l.Attrs().OperState == netlink.OperUp || time.Since(begun) > readyWithin {
			return nil
		}
	}
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
	// Source is the address that the namespace's own packets have which leave by it;
	// the zero value lets the kernel choose.
	Source netip.Addr
	// Protocol says who made it (rtnetlink(7), rtm_protocol); 0 is an administrator.
	Protocol int
	// MTU is the longest packet that takes it, in bytes; 0 is the link's.
	MTU int
}

// asNetlink is the route as rtnetlink has it.
func (r Route) asNetlink() *netlink.Route {
	route := &netlink.Route{LinkIndex: r.Link, Dst: ipNet(r.To.Masked()), Protocol: netlink.RouteProtocol(r.Protocol), MTU: r.MTU}
	if r.Source.IsValid() {
		route.Src = r.Source.AsSlice()
	}
	if r.Via.IsValid() {
		route.Gw = r.Via.AsSlice()
		route.Flags = int(netlink.FLAG_ONLINK)
	} else {
		route.Scope = netlink.SCOPE_LINK
	}
	return route
}

// Route adds a route.
func (n *Net) Route(r Route) error {
	if err := n.handle.RouteAdd(r.asNetlink()); err != nil {
		return fmt.Errorf("add route %s via %s on link %d: %w", r.To, r.Via, r.Link, err)
	}
	return nil
}

// SetRoute adds a route, or puts it in the place of one that leads to the same range.
func (n *Net) SetRoute(r Route) error {
	if err := n.handle.RouteReplace(r.asNetlink()); err != nil {
		return fmt.Errorf("set route %s on link %d: %w", r.To, r.Link, err)
	}
	return nil
}

// Routes lists the unicast routes of the main table that one protocol has made.
func (n *Net) Routes(protocol int) ([]Route, error) {
	return n.routes(&netlink.Route{Protocol: netlink.RouteProtocol(protocol)}, netlink.RT_FILTER_PROTOCOL)
}

// Table lists the unicast routes of the main table, one that spreads its packets over
// several links once for each.
func (n *Net) Table() ([]Route, error) { return n.routes(&netlink.Route{}, 0) }

func (n *Net) routes(filter *netlink.Route, mask uint64) (routes []Route, err error) {
	found, err := whole("routes", func() ([]netlink.Route, error) {
		return n.handle.RouteListFiltered(netlink.FAMILY_ALL, filter, mask)
	})
	for _, r := range found {
		to, ok := prefix(r.Dst)
		if !ok || r.Type != unix.RTN_UNICAST {
			continue
		}
		source, _ := netip.AddrFromSlice(r.Src)
		add := func(link int, gw net.IP) {
			via, _ := netip.AddrFromSlice(gw)
			routes = append(routes, Route{To: to, Via: via.Unmap(), Link: link, Source: source.Unmap(), Protocol: int(r.Protocol), MTU: r.MTU})
		}
		for _, hop := range r.MultiPath {
			add(hop.LinkIndex, hop.Gw)
		}
		if len(r.MultiPath) == 0 {
			add(r.LinkIndex, r.Gw)
		}
	}
	return routes, err
}

// DeleteRoute removes a route; one that does not exist is no error.
func (n *Net) DeleteRoute(r Route) error {
	if err := n.handle.RouteDel(r.asNetlink()); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove route %s from link %d: %w", r.To, r.Link, err)
	}
	return nil
}

// NoLinkLocal keeps the kernel from giving a link an IPv6 address of its own when it is
// set up (RFC 4862, 5.3).
func (n *Net) NoLinkLocal(index int) error {
	const none = 1 // IN6_ADDR_GEN_MODE_NONE of linux/if_link.h
	if err := n.handle.LinkSetIP6AddrGenMode(byIndex(index), none); err != nil {
		return fmt.Errorf("keep link %d without a link-local address: %w", index, err)
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

// Neighs lists, of one link, whose hardware addresses somebody has said for good.
func (n *Net) Neighs(index int) (map[netip.Addr]net.HardwareAddr, error) {
	found, err := whole("neighbours", func() ([]netlink.Neigh, error) { return n.handle.NeighList(index, netlink.FAMILY_ALL) })
	permanent := map[netip.Addr]net.HardwareAddr{}
	for _, neigh := range found {
		if addr, ok := netip.AddrFromSlice(neigh.IP); ok && neigh.State&netlink.NUD_PERMANENT != 0 {
			permanent[addr.Unmap()] = neigh.HardwareAddr
		}
	}
	return permanent, err
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
