package link

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Way is how packets to an address leave a namespace, as ip-route(8) gets it.
type Way struct {
	// Device is what they leave by, Index its number, Kind the kernel's word for it:
	// "vxlan"; empty for hardware.
	Device string
	Index  int
	Kind   string
	// MTU is the longest packet, in bytes, that the device and the route take. Learned is
	// what the kernel was told that the path takes, 0 if it was told nothing.
	MTU, Learned int
	// Via is the next hop, the zero value where the address itself is a neighbour.
	Via netip.Addr
	// Local says that the address is one of the namespace's own.
	Local bool
}

// Way asks the kernel where a packet to an address would go. The error is the kernel's:
// ENETUNREACH or EHOSTUNREACH without a route, EINVAL of a route of type blackhole, EACCES
// of type prohibit.
func (n *Net) Way(to netip.Addr) (Way, error) {
	found, err := n.handle.RouteGet(to.AsSlice())
	if err != nil || len(found) == 0 {
		return Way{}, fmt.Errorf("find route to %s: %w", to, err)
	}
	route := found[0]
	l, err := n.handle.LinkByIndex(route.LinkIndex)
	if err != nil {
		return Way{}, fmt.Errorf("find device of the route to %s: %w", to, err)
	}
	w := Way{Device: l.Attrs().Name, Index: route.LinkIndex, Kind: l.Type(), MTU: l.Attrs().MTU, Learned: route.MTU, Local: route.Type == unix.RTN_LOCAL}
	if w.Kind == "device" {
		w.Kind = ""
	}
	if via, ok := netip.AddrFromSlice(route.Gw); ok {
		w.Via = via.Unmap()
	} else if route.Via != nil {
		if other, is := route.Via.(*netlink.Via); is {
			w.Via, _ = netip.AddrFromSlice(other.Addr)
		}
	}
	// What was set of the route is not what was learned of the path.
	set, err := n.handle.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if err == nil && len(set) > 0 && set[0].MTU > 0 {
		w.MTU = min(w.MTU, set[0].MTU)
		if w.Learned == set[0].MTU {
			w.Learned = 0
		}
	}
	return w, nil
}

// Unresolved says that the kernel asked for the hardware address of a neighbour and has
// heard nothing: its entry is FAILED, or INCOMPLETE. Without an entry it is false.
func (n *Net) Unresolved(index int, addr netip.Addr) (bool, error) {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	all, err := whole("neighbours", func() ([]netlink.Neigh, error) { return n.handle.NeighList(index, family) })
	if err != nil {
		return false, err
	}
	for _, neigh := range all {
		if a, ok := netip.AddrFromSlice(neigh.IP); ok && a.Unmap() == addr {
			return neigh.State&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) != 0, nil
		}
	}
	return false, nil
}
