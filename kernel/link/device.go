package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// Device is a network device and what tells a pod's from a node's own.
type Device struct {
	Index int
	Name  string
	// Kind is the kernel's word: "veth", "bridge"; empty for hardware.
	Kind string
	// MTU is the longest packet that it takes, in bytes, without its own header.
	MTU int
	// Up says that it is meant to be used.
	Up bool
	// PeerElsewhere says that the far end is in another network namespace.
	PeerElsewhere bool
	// PeerNamespace is the number of that namespace in this one (netns.Number), or
	// negative.
	PeerNamespace int
	// Peer is the index of the far end of a pair, in its namespace; of a tunnel or a
	// part of a device, that of the device it is bound to. 0 for none.
	Peer int
	// Steered says of a tunnel that programs or routes say, packet by packet, where to.
	Steered bool
	// Master is the index of the bridge, bond or the like that it is a part of; 0 for
	// none.
	Master int
	// Ethernet says that its packets have Ethernet headers; Layer3, that they begin
	// with the IP header (tun, WireGuard, IPIP, SIT, PPP). Both are false of others:
	// loopback, InfiniBand, and GRE, which may have the outer header before it.
	Ethernet, Layer3 bool
	// DefaultRoute says that a default route leaves by it.
	DefaultRoute bool
	Addresses    []netip.Addr
	// MAC is its hardware address, Alias the text that somebody gave it.
	MAC   net.HardwareAddr
	Alias string
}

// layer3 are the names of such types of devices (linux/if_arp.h).
var layer3 = []string{"none", "ipip", "tunnel6", "sit", "ppp"}

// listTries is how often a list is asked for that changed while it was told
// (NLM_F_DUMP_INTR, netlink(7)): pods come and go all the time.
const listTries = 20

// whole asks until the answer is whole.
func whole[T any](what string, list func() ([]T, error)) ([]T, error) {
	for try := 1; ; try++ {
		found, err := list()
		if err == nil {
			return found, nil
		}
		if try == listTries || !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, fmt.Errorf("list %s: %w", what, err)
		}
	}
}

// Devices lists the devices of the namespace, by index.
func (n *Net) Devices() ([]Device, error) {
	links, err := whole("devices", n.handle.LinkList)
	if err != nil {
		return nil, err
	}
	addrs, err := whole("addresses", func() ([]netlink.Addr, error) { return n.handle.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	routes, err := whole("routes", func() ([]netlink.Route, error) { return n.handle.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	devices := make([]Device, len(links))
	at := make(map[int]*Device, len(links))
	for i, l := range links {
		attrs := l.Attrs()
		devices[i] = Device{Index: attrs.Index, Name: attrs.Name, Kind: l.Type(), PeerElsewhere: attrs.NetNsID >= 0, PeerNamespace: attrs.NetNsID,
			MTU: attrs.MTU, Up: attrs.Flags&net.FlagUp != 0, Peer: attrs.ParentIndex,
			MAC: attrs.HardwareAddr, Alias: attrs.Alias, Master: attrs.MasterIndex, Ethernet: attrs.EncapType == "ether", Layer3: slices.Contains(layer3, attrs.EncapType)}
		switch l := l.(type) {
		case *netlink.Device:
			devices[i].Kind = ""
		case *netlink.Vxlan:
			devices[i].Steered = l.FlowBased
		case *netlink.Geneve:
			devices[i].Steered = l.FlowBased
		case *netlink.Gretun:
			devices[i].Steered = l.FlowBased
		case *netlink.Iptun:
			devices[i].Steered = l.FlowBased
		}
		at[attrs.Index] = &devices[i]
	}
	for _, addr := range addrs {
		if p, ok := prefix(addr.IPNet); ok && at[addr.LinkIndex] != nil {
			at[addr.LinkIndex].Addresses = append(at[addr.LinkIndex].Addresses, p.Addr())
		}
	}
	for _, route := range routes {
		if p, ok := prefix(route.Dst); ok && p.Bits() > 0 || route.Type != unix.RTN_UNICAST {
			continue
		}
		for _, index := range append(nextHops(route), route.LinkIndex) {
			if at[index] != nil {
				at[index].DefaultRoute = true
			}
		}
	}
	return devices, nil
}

func nextHops(route netlink.Route) (indexes []int) {
	for _, hop := range route.MultiPath {
		indexes = append(indexes, hop.LinkIndex)
	}
	return indexes
}

// Watch calls changed once it watches, and when devices or their addresses come, go or
// change in the namespace at path (empty: that of this process), until ctx ends. It
// returns an error only where it cannot begin; when messages were lost, it calls
// changed, too.
func Watch(ctx context.Context, path string, changed func()) error {
	for {
		err := watchOnce(ctx, path, changed)
		if err != nil || ctx.Err() != nil {
			return err
		}
		// A socket overflowed and was closed: begin again.
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// watchOnce watches until ctx ends or the kernel's messages do.
func watchOnce(ctx context.Context, path string, changed func()) error {
	ctx, end := context.WithCancel(ctx) // both sockets go when one did
	defer end()
	devices, addresses := make(chan netlink.LinkUpdate, 64), make(chan netlink.AddrUpdate, 64)
	quiet := func(error) {}
	err := netns.In(path, func() error {
		return errors.Join(
			netlink.LinkSubscribeWithOptions(devices, ctx.Done(), netlink.LinkSubscribeOptions{ErrorCallback: quiet}),
			netlink.AddrSubscribeWithOptions(addresses, ctx.Done(), netlink.AddrSubscribeOptions{ErrorCallback: quiet}))
	})
	if err != nil {
		return fmt.Errorf("watch devices: %w", err)
	}
	// They end when their sockets are closed and nothing waits to be taken.
	defer func() { go rest(devices); go rest(addresses) }()
	changed() // what came before
	for open := true; open; changed() {
		select {
		case <-ctx.Done():
			return nil
		case _, open = <-devices:
		case _, open = <-addresses:
		}
		drain(devices)
		drain(addresses)
	}
	return nil
}

func rest[T any](messages chan T) {
	for range messages {
	}
}

// drain takes what is waiting.
func drain[T any](messages chan T) {
	for len(messages) > 0 {
		<-messages
	}
}
