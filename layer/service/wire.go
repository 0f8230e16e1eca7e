package service

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/portrange"
	"github.com/millrace/millrace/kernel/proc"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// wire is a device by which packets leave the node: the Subject of attaching
// from_wire and to_wire there.
type wire struct {
	link.Device
	// addresses are the node's there, those that masqueraded packets come from.
	addresses
}

// Object implements layer.Subject.
func (w wire) Object() string { return "services at the wire " + w.Name }

// Detail implements layer.Subject.
func (w wire) Detail() string {
	if w.addresses == (addresses{}) {
		return ""
	}
	return "masquerading as " + w.join(" ")
}

// wireOf says which addresses packets that leave by a device are to come from: of each
// family one that the Node object names, for those stay, which an address that moves
// between nodes (a load balancer's, say) does not; else the device's first; else, where it has
// none (an unnumbered link), the node's at another device.
func wireOf(device link.Device, node []netip.Addr, devices []veth) wire {
	first := firstOf(device.Addresses)
	return wire{device, addresses{
		wireAddress(device, node, devices, netip.Addr.Is4, first.ip4), wireAddress(device, node, devices, netip.Addr.Is6, first.ip6),
	}}
}

func wireAddress(device link.Device, node []netip.Addr, devices []veth, family func(netip.Addr) bool, first netip.Addr) netip.Addr {
	for _, a := range device.Addresses {
		if a = a.Unmap(); a.IsGlobalUnicast() && family(a) && slices.Contains(node, a) {
			return a
		}
	}
	if first.IsValid() {
		return first
	}
	for _, a := range node {
		here := func(v veth) bool { return slices.Contains(v.Addresses, a) }
		if a = a.Unmap(); family(a) && slices.ContainsFunc(devices, here) {
			return a
		}
	}
	return netip.Addr{}
}

// notWires are the kinds of devices by which nothing leaves the node.
var notWires = []string{"dummy", "ifb", "nlmon", "vcan", "vti"}

// isWire says that packets leave the node by a device: neither a pod's nor a part of
// another device, with an address or a default route of its own. A bridge is one
// only if the node's own address or default route is there; else it is one of pods.
func (v veth) isWire(node []netip.Addr) bool {
	if !v.Ethernet && !v.Layer3 || v.Master != 0 || slices.Contains(notWires, v.Kind) || v.isPods(node) {
		return false
	}
	own := v.DefaultRoute || slices.ContainsFunc(v.Addresses, func(a netip.Addr) bool { return slices.Contains(node, a.Unmap()) })
	if v.Kind == "bridge" || v.Kind == "veth" {
		return own
	}
	return own || len(v.Addresses) > 0
}

// nodeAddress is an address of the node that has node ports: the Subject of a
// change of the map node_addresses.
type nodeAddress struct{ netip.Addr }

// Object implements layer.Subject.
func (a nodeAddress) Object() string { return "node ports at " + a.String() }

// Detail implements layer.Subject.
func (a nodeAddress) Detail() string {
	if a.IsLoopback() {
		return "for the node's own processes"
	}
	return ""
}

// ipvsDevice holds every ClusterIP where kube-proxy runs in its IPVS mode.
const ipvsDevice = "kube-ipvs0"

// nodePortAddresses are the addresses of a node's devices that have node ports: all
// that the setting does not exclude. Of loopback it is the one that kube-proxy
// serves, too.
func (s Settings) nodePortAddresses(devices []veth, node []netip.Addr) []netip.Addr {
	var all []netip.Addr
	for _, device := range devices {
		if device.Name == ipvsDevice {
			continue
		}
		for _, a := range device.Addresses {
			if a = a.Unmap(); s.hasNodePorts(a, node) && !slices.Contains(all, a) {
				all = append(all, a)
			}
		}
	}
	return all
}

// hasNodePorts says whether an address of the node has node ports. The node's
// primary addresses are the first of each family of its Node object.
func (s Settings) hasNodePorts(a netip.Addr, node []netip.Addr) bool {
	if a.IsLinkLocalUnicast() || a.IsLoopback() && a != netip.AddrFrom4([4]byte{127, 0, 0, 1}) {
		return false
	}
	if s.NodePortPrimary {
		first := slices.IndexFunc(node, func(n netip.Addr) bool { return n.Unmap().Is4() == a.Is4() })
		return first >= 0 && node[first].Unmap() == a
	}
	return s.NodePortAddresses == nil ||
		slices.ContainsFunc(s.NodePortAddresses, func(p netip.Prefix) bool { return p.Contains(a) })
}

// demands are what a Service asks of the node beside its rows.
type demands struct {
	// packets: its packets are to be translated, not its clients' sockets.
	packets bool
	// entrance: it is to be reached from outside the cluster; nodePorts: so by one.
	entrance, nodePorts bool
	// clients: it asks for its clients' addresses.
	clients bool
}

func demandsOf(s *model.Service) demands {
	d := demands{
		packets:   askedPath(s.Annotations) == PathPacket,
		nodePorts: slices.ContainsFunc(s.Ports, func(p model.ServicePort) bool { return p.NodePort != 0 }),
		clients:   s.Affinity > 0 || s.SourceRanges != nil,
	}
	d.entrance = d.nodePorts || len(s.ExternalIPs)+len(s.LoadBalancerIPs) > 0
	return d
}

// and is what either asks.
func (d demands) and(o demands) demands {
	return demands{d.packets || o.packets, d.entrance || o.entrance, d.nodePorts || o.nodePorts, d.clients || o.clients}
}

// diffNodeAddresses says at which addresses node ports come, and where they go last.
func diffNodeAddresses(have []netip.Addr, want paths, devices []veth, prune bool) (first, last layer.Changes) {
	var addresses []netip.Addr
	if want.nodePorts {
		addresses = want.settings.nodePortAddresses(devices, want.node)
	}
	for _, a := range addresses {
		if !slices.Contains(have, a) {
			first = append(first, layer.Change{Op: layer.Add, Subject: nodeAddress{a}})
		}
	}
	for _, a := range have {
		if prune && !slices.Contains(addresses, a) {
			last = append(last, layer.Change{Op: layer.Remove, Subject: nodeAddress{a}})
		}
	}
	return first, last
}

// diffWires says at which devices services have to be put in force.
func diffWires(have *Picture, want paths, prune bool) (first, last layer.Changes) {
	for _, v := range have.veths {
		needed := want.wire && v.isWire(want.node)
		now := wireOf(v.Device, want.node, have.veths)
		switch {
		case needed && v.asWire == nil:
			first = append(first, layer.Change{Op: layer.Add, Subject: now})
		case needed && v.asWire.addresses != now.addresses:
			first = append(first, layer.Change{Op: layer.Alter, Subject: now})
		case !needed && v.asWire != nil && prune && !(v.busy && want.settings.Wire):
			last = append(last, layer.Change{Op: layer.Remove, Subject: now})
		}
	}
	return first, last
}

// readNodeAddresses reads at which addresses node ports are.
func (d *datapath) readNodeAddresses() (all []netip.Addr, err error) {
	var words [4]uint32
	var kind datapathNodeAddress
	entries := d.maps[datapathMapNodeAddresses].Iterate()
	for entries.Next(&words, &kind) {
		all = append(all, bpfmap.AddrOf(words))
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", datapathMapNodeAddresses, err)
	}
	return all, nil
}

// tellAddress carries out the change of a node's address.
func tellAddress(maps map[string]*ebpf.Map, change layer.Change) error {
	subject := change.Subject.(nodeAddress)
	key := bpfmap.AddrWords(subject.Addr)
	if change.Op == layer.Remove {
		return gone(maps[datapathMapNodeAddresses].Delete(key))
	}
	kind := datapathNodeAddressADDRESS_OF_NODE
	if subject.IsLoopback() {
		kind = datapathNodeAddressADDRESS_OF_LOOPBACK
	}
	return maps[datapathMapNodeAddresses].Put(key, kind)
}

// readWire is what the programs know of a device; nil if it is no wire to them.
func (d *datapath) readWire(device link.Device) *wire {
	var value datapathAddresses
	if d.ports[device.Index].side == ofPod || d.maps[datapathMapWires].Lookup(uint32(device.Index), &value) != nil {
		return nil
	}
	return &wire{device, addressesOf(value)}
}

// attachWire puts services in force at a device, and says by which addresses
// packets leave there.
func (d *datapath) attachWire(w wire) error {
	// First, for a flow that begins without it goes without to its end. What is left
	// of a device at which nothing could be attached is forgotten (forgetDevices).
	if err := d.maps[datapathMapWires].Put(uint32(w.Index), w.value()); err != nil {
		return err
	}
	side := ofWire
	if w.Layer3 {
		side = ofWireL3
	}
	if d.ports[w.Index].side == side {
		return nil
	}
	return d.attachPort(w.Index, packetPort{w.Name, side})
}

func (d *datapath) detachWire(device int) error {
	if err := gone(d.maps[datapathMapWires].Delete(uint32(device))); err != nil {
		return err
	}
	return d.detachPortAs(device, true)
}

// forgetDevices clears away what a map knows of devices that are no such ports any
// more: they went, also while no process ran, or a wire turned into a pod's.
func forgetDevices[value any](m *ebpf.Map, stays func(device int) bool) error {
	var gone []uint32
	var device uint32
	var of value
	entries := m.Iterate()
	for entries.Next(&device, &of) {
		if !stays(int(device)) {
			gone = append(gone, device)
		}
	}
	err := entries.Err()
	for _, device := range gone {
		err = errors.Join(err, m.Delete(device))
	}
	if err != nil {
		return fmt.Errorf("clear devices that went away: %w", err)
	}
	return nil
}

// findSourcePorts finds the ports that masqueraded flows get: the largest range
// without those that the kernel gives to the node's own sockets
// (ip_local_port_range), and without node ports.
func (d *datapath) findSourcePorts() error {
	low, high, err := portrange.Local(d.settings.Netns)
	if err != nil {
		return err
	}
	text, err := sysctl.Tree{Root: "/proc/sys", Netns: d.settings.Netns}.Read("net.ipv4.ip_local_reserved_ports")
	if err != nil {
		return fmt.Errorf("find out which ports sockets are given: %w", err)
	}
	reserved, err := proc.Ranges(text)
	if err != nil {
		return fmt.Errorf("read net.ipv4.ip_local_reserved_ports: %w", err)
	}
	if proc.Outside(max(low, portrange.FirstNode), min(high, portrange.LastNode), reserved) > 0 {
		d.degraded = append(d.degraded, fmt.Sprintf("net.ipv4.ip_local_port_range %d %d has node ports in it: a UDP socket of this node that is given the number of one "+
			"and does not connect gets no answers; set net.ipv4.ip_local_reserved_ports to %d-%d", low, high, portrange.FirstNode, portrange.LastNode))
	}
	d.firstPort, d.portCount = portrange.Free(low, high)
	if d.portCount < 1024 {
		d.degraded = append(d.degraded, fmt.Sprintf("clients from outside have %d source ports towards each endpoint on another node: "+
			"net.ipv4.ip_local_port_range is %d %d", d.portCount, low, high))
	}
	return nil
}
