package route

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// alias is what our vxlan device is known by, beside its name.
const alias = "millrace route"

// inNetns runs f where the node's devices are.
func (d *datapath) inNetns(f func() error) error { return netns.In(d.settings.Netns, f) }

// mainRoutes lists the unicast routes of the main table.
func (d *datapath) mainRoutes() (routes []netlink.Route, err error) {
	err = d.inNetns(func() error {
		for try := 0; try < 20; try++ { // they may change while they are told
			routes, err = netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
			if !errors.Is(err, netlink.ErrDumpInterrupted) {
				break
			}
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return routes, nil
}

// facts implements host.
func (d *datapath) facts() (facts, error) {
	f := facts{devices: map[int]fact{}, shortcuts: d.Points.TCX}
	f.rules, f.unread = d.rules.Tracking()
	devices, err := d.devices()
	if err != nil {
		return f, err
	}
	for _, one := range devices {
		if one.Up && one.Name != d.settings.device() {
			f.devices[one.Index] = fact{name: one.Name, mtu: one.MTU, ethernet: one.Ethernet && one.Kind != "vxlan"}
		}
		if isFlannels(one) {
			f.flannels, f.inUse = append(f.flannels, one.Name), f.inUse || one.Up
		}
	}
	routes, err := d.mainRoutes()
	if err != nil {
		return f, err
	}
	for _, r := range routes {
		if r.Protocol == Protocol {
			continue
		}
		to, ok := prefixOf(r.Dst)
		if !ok {
			continue
		}
		f.hops = append(f.hops, hopsOf(to, r)...)
	}
	return f, nil
}

// hopsOf are the ways out of a route, of which the kernel chooses by the flow: the first
// is as good as any.
func hopsOf(to netip.Prefix, r netlink.Route) (hops []hop) {
	one := func(device int, gw net.IP, other netlink.Destination) {
		via, _ := netip.AddrFromSlice(gw)
		if neighbour, ok := other.(*netlink.Via); ok { // IPv4 by a neighbour of IPv6 (RFC 8950)
			via, _ = netip.AddrFromSlice(neighbour.Addr)
		}
		hops = append(hops, hop{to: to, via: via.Unmap(), device: device, metric: r.Priority, mtu: r.MTU})
	}
	for _, next := range r.MultiPath {
		one(next.LinkIndex, next.Gw, next.Via)
	}
	if len(r.MultiPath) == 0 {
		one(r.LinkIndex, r.Gw, r.Via)
	}
	return hops
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, length := n.Mask.Size()
	if length == 32 {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, ones), ok
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func (d *datapath) devices() ([]link.Device, error) {
	n, err := link.Open(d.settings.Netns)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	return n.Devices()
}

// ports implements host. Those that have gone are forgotten.
func (d *datapath) ports(facts) (ports []port, err error) {
	n, err := link.Open(d.settings.Netns)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	devices, err := n.Devices()
	if err != nil {
		return nil, err
	}
	filtered := map[int]bool{}
	if d.Points.TCX { // otherwise our programs are filters, too
		if filtered, err = n.Filtered(); err != nil {
			return nil, err
		}
	}
	there := make(map[int]bool, len(devices))
	for _, one := range devices {
		there[one.Index] = true
		for _, ofPod := range []bool{true, false} {
			p := port{Index: one.Index, Name: one.Name, ofPod: ofPod, filtered: filtered[one.Index]}
			p.attached = d.Points.Alive(p.at())
			p.pod = one.Kind == "veth" && one.PeerElsewhere && !one.DefaultRoute
			if ofPod && p.pod || !ofPod && one.Ethernet && one.Name != d.settings.device() || d.Points.At(p.at()) != nil {
				ports = append(ports, p)
			}
		}
	}
	for _, at := range d.Points.All() {
		if !there[at.Device] {
			_ = d.detachAt(at)
		}
	}
	return ports, nil
}

// found is the vxlan device, nil if there is none; an error if there is another of its
// name.
func (d *datapath) found() (*netlink.Vxlan, error) {
	var there netlink.Link
	name := d.settings.device()
	err := d.inNetns(func() (err error) {
		there, err = netlink.LinkByName(name)
		return err
	})
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find device %s: %w", name, err)
	}
	vxlan, ok := there.(*netlink.Vxlan)
	if !ok || vxlan.Alias != alias {
		return nil, fmt.Errorf("device %s is somebody else's (it is a %s, without the alias %q): rename it or delete it", name, there.Type(), alias)
	}
	return vxlan, nil
}

// device implements host.
func (d *datapath) device() (*device, error) {
	there, err := d.found()
	if there == nil || err != nil {
		return nil, err
	}
	is := &device{Name: there.Name, VNI: uint32(there.VxlanId), Port: uint16(there.Port), MTU: there.MTU, index: there.Index}
	is.Guarded = there.FlowBased // it takes all numbers: the program that asks for senders asks for ours
	copy(is.MAC[:], there.HardwareAddr)
	is.torn = there.Flags&net.FlagUp == 0
	for _, at := range devicePoints(there.Index) {
		if d.Programs != nil && !d.Points.Alive(at) {
			is.torn = true
		}
	}
	err = d.inNetns(func() error {
		addresses, err := netlink.AddrList(there, netlink.FAMILY_ALL)
		for _, a := range addresses {
			if p, ok := prefixOf(a.IPNet); ok && !p.Addr().IsLinkLocalUnicast() {
				is.Addresses = append(is.Addresses, p.Addr())
			}
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list addresses of device %s: %w", there.Name, err)
	}
	return is, nil
}

// makeDevice implements host.
func (d *datapath) makeDevice(want *device) (int, error) {
	is, err := d.device()
	if err != nil {
		return 0, err
	}
	if is != nil && is.Guarded {
		is.VNI = want.VNI
	}
	if is != nil && !is.same(want) {
		if err := d.dropDevice(); err != nil {
			return 0, err
		}
		is = nil
	}
	if is == nil {
		if err := d.addDevice(want); err != nil {
			return 0, err
		}
		if is, err = d.device(); err != nil {
			return 0, err
		}
	}
	// Programs first: as soon as it is up, it takes packets.
	for _, at := range devicePoints(is.index) {
		if err := d.attachAt(at, want.Name); err != nil {
			return 0, err
		}
	}
	return is.index, d.inNetns(func() error { return alterDevice(is, want) })
}

// devicePoints are the programs of the vxlan device.
func devicePoints(index int) []attach.Point {
	return []attach.Point{{Program: datapathProgRouteUnwrapped, Device: index}, {Program: datapathProgRouteToRemote, Device: index}}
}

// addDevice makes the vxlan device. Neighbours on it need no asking: whom a frame is for
// is written by the program. It has no table of neighbours: it is one whose packets carry
// who sent them (FlowBased), so that route_unwrapped can ask, and it hears both families.
func (d *datapath) addDevice(want *device) error {
	err := d.inNetns(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr, attrs.MTU = want.Name, want.MAC[:], want.MTU
		vxlan := &netlink.Vxlan{LinkAttrs: attrs, Port: int(want.Port), FlowBased: true, Learning: false, UDP6ZeroCSumRx: true}
		if err := netlink.LinkAdd(vxlan); err != nil {
			if errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("%w: another vxlan device has port %d", err, want.Port)
			}
			return err
		}
		if err := netlink.LinkSetAlias(vxlan, alias); err != nil {
			return errors.Join(err, netlink.LinkDel(vxlan))
		}
		return netlink.LinkSetARPOff(vxlan)
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = fmt.Errorf("%w: this kernel has no vxlan devices (CONFIG_VXLAN)", err)
	}
	if err != nil {
		return fmt.Errorf("add vxlan device %s: %w", want.Name, err)
	}
	return nil
}

// alterDevice gives the device the rest of what it is to have.
func alterDevice(is, want *device) error {
	at := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: is.index, Name: want.Name}}
	if is.MTU != want.MTU {
		if err := netlink.LinkSetMTU(at, want.MTU); err != nil {
			return fmt.Errorf("set mtu of device %s to %d: %w", want.Name, want.MTU, err)
		}
	}
	if err := netlink.LinkSetUp(at); err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			err = fmt.Errorf("%w: another vxlan device or a process has UDP port %d (ss -lun; ip -d link show type vxlan)", err, want.Port)
		}
		return fmt.Errorf("set device %s up: %w", want.Name, err)
	}
	for _, a := range want.Addresses {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(at, addr); err != nil {
			return fmt.Errorf("add address %s to device %s: %w", a, want.Name, err)
		}
	}
	for _, a := range is.Addresses {
		if slices.Contains(want.Addresses, a) {
			continue
		}
		if err := netlink.AddrDel(at, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s from device %s: %w", a, want.Name, err)
		}
	}
	return nil
}

// dropDevice implements host. The routes by it go with it.
func (d *datapath) dropDevice() error {
	there, err := d.found()
	if there == nil || err != nil {
		return err
	}
	for _, at := range devicePoints(there.Index) {
		_ = d.Points.Detach(at)
	}
	err = d.inNetns(func() error { return netlink.LinkDel(there) })
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete device %s: %w", there.Name, err)
	}
	return nil
}

// dropFlannels implements host.
func (d *datapath) dropFlannels(name string) error {
	err := d.inNetns(func() error {
		there, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkDel(there)
	})
	if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete device %s: %w", name, err)
	}
	return nil
}

// routes implements host.
func (d *datapath) routes() (rows []*Row, err error) {
	all, err := d.mainRoutes()
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		to, ok := prefixOf(r.Dst)
		if r.Protocol != Protocol || !ok {
			continue
		}
		via, _ := netip.AddrFromSlice(r.Gw)
		rows = append(rows, &Row{To: to, Via: via.Unmap(), index: r.LinkIndex, set: r.MTU})
	}
	return rows, nil
}

// makeRoute implements host.
func (d *datapath) makeRoute(row *Row, device int) error {
	r := &netlink.Route{Dst: ipNet(row.To), Table: unix.RT_TABLE_MAIN, Protocol: Protocol, Priority: metric, LinkIndex: device, Scope: netlink.SCOPE_LINK, MTU: row.set}
	// Of IPv6 the kernel heeds it at once only so when it forwards (ip6_dst_mtu_maybe_forward);
	// what routers say is heeded all the same.
	r.MTULock = row.set > 0 && row.To.Addr().Is6()
	if row.Direct {
		r.LinkIndex, r.Gw, r.Scope = row.index, row.Via.AsSlice(), netlink.SCOPE_UNIVERSE
	}
	if err := d.inNetns(func() error { return netlink.RouteReplace(r) }); err != nil {
		return fmt.Errorf("add route %s: %w", row.To, err)
	}
	return nil
}

// dropRoute implements host.
func (d *datapath) dropRoute(row *Row) error {
	r := &netlink.Route{Dst: ipNet(row.To), Table: unix.RT_TABLE_MAIN, Protocol: Protocol, Priority: metric, Scope: netlink.SCOPE_NOWHERE} // of any scope
	err := d.inNetns(func() error { return netlink.RouteDel(r) })
	if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove route %s: %w", row.To, err)
	}
	return nil
}
