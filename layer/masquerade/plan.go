package masquerade

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// uniqueLocal are addresses that are for use inside a site (RFC 4193, 3.1): outside nobody
// has a way to them.
var uniqueLocal = netip.MustParsePrefix("fc00::/7")

// Link-local addresses (RFC 3927, RFC 4291).
var (
	linkLocal4 = netip.MustParsePrefix("169.254.0.0/16")
	linkLocal6 = netip.MustParsePrefix("fe80::/10")
)

// wish is what a cluster asks of the layer.
type wish struct {
	// node are the node's own addresses, own the ranges of its pods that are masqueraded,
	// pods all ranges of its pods.
	node []netip.Addr
	own  []netip.Prefix
	pods []netip.Prefix
}

// plan reads a Snapshot. As long as that is not complete, or this node is not in it, nobody
// knows what is native, or whose pods these are, and all stays as it is.
func plan(settings Settings, snapshot *model.Snapshot) *Picture {
	picture := newPicture()
	at := slices.IndexFunc(snapshot.Nodes, func(n *model.Node) bool { return n.Name == settings.Node })
	if at < 0 || !snapshot.Complete {
		return picture
	}
	w := &wish{pods: snapshot.Nodes[at].PodCIDRs}
	for _, a := range snapshot.Nodes[at].Addresses {
		w.node = append(w.node, a.Unmap())
	}
	for _, p := range w.pods {
		if p.Addr().Is4() || uniqueLocal.Overlaps(p) {
			w.own = append(w.own, p)
		}
	}
	for _, p := range natives(snapshot) {
		picture.rows[p] = row{To: p, Native: true}
	}
	if _, is := picture.rows[all4]; !is && covers4(picture.rows) {
		picture.rows[all4] = row{To: all4} // addresses of both families are 16 bytes to the programs
	}
	for _, p := range w.own {
		picture.rows[p] = row{To: p, Native: true, Own: true}
	}
	picture.wish = w
	return picture
}

// natives are the ranges towards which pods keep their addresses, as few as they can be.
// None of them lies inside another one: who reads them finds the longest.
func natives(snapshot *model.Snapshot) []netip.Prefix {
	var all []netip.Prefix
	for _, n := range snapshot.Nodes {
		all = append(all, n.PodCIDRs...)
	}
	said := snapshot.Masquerade
	if said == nil {
		said = &model.Masquerade{}
	}
	all = append(all, said.Not...)
	if !said.LinkLocal {
		all = append(all, linkLocal4)
	}
	if !said.LinkLocalIPv6 {
		all = append(all, linkLocal6)
	}
	return nft.Merge(all)
}

// all4 are all addresses of IPv4, mapped4 what they are within those of IPv6.
var (
	all4    = netip.MustParsePrefix("0.0.0.0/0")
	mapped4 = netip.MustParsePrefix("::ffff:0:0/96")
)

// covers4 says that a range of IPv6 would be found for addresses of IPv4.
func covers4(rows map[netip.Prefix]row) bool {
	for p := range rows {
		if p.Addr().Is6() && p.Overlaps(mapped4) {
			return true
		}
	}
	return false
}

// notWires are the kinds of devices by which nothing leaves the node.
var notWires = []string{"dummy", "ifb", "nlmon", "vcan", "vti"}

// wires are the devices by which packets leave the node, and its addresses there.
func (w *wish) wires(devices []link.Device) map[int]wire {
	all := map[int]wire{}
	for _, d := range devices {
		if w.isWire(d) {
			all[d.Index] = wire{device: d, Name: d.Name, IP4: w.address(d, devices, netip.Addr.Is4), IP6: w.address(d, devices, netip.Addr.Is6)}
		}
	}
	return all
}

// isWire says that packets leave the node by a device: neither a pod's nor a part of
// another one. What may as well be for pods, a bridge, the end of a pair, a device of a
// network between nodes, is one only if the node's own address or default route is there.
func (w *wish) isWire(d link.Device) bool {
	if !d.Ethernet && !d.Layer3 || d.Master != 0 || slices.Contains(notWires, d.Kind) {
		return false
	}
	if d.DefaultRoute || slices.ContainsFunc(d.Addresses, func(a netip.Addr) bool { return slices.Contains(w.node, a.Unmap()) }) {
		return true
	}
	inner := []string{"bridge", "veth", "vxlan", "geneve"}
	return !slices.Contains(inner, d.Kind) && slices.ContainsFunc(d.Addresses, w.usable)
}

// usable says that others can answer to an address, and that it is not for pods.
func (w *wish) usable(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsGlobalUnicast() && !slices.ContainsFunc(w.pods, func(p netip.Prefix) bool { return p.Contains(a) })
}

// address is what packets of a family come from that leave by a device: the address there
// that the Node object names, for that stays, else the first; where the device has none,
// the node's at another one.
func (w *wish) address(d link.Device, devices []link.Device, family func(netip.Addr) bool) netip.Addr {
	var first netip.Addr
	for _, a := range d.Addresses {
		a = a.Unmap()
		if !family(a) || !w.usable(a) {
			continue
		}
		if slices.Contains(w.node, a) {
			return a
		}
		if !first.IsValid() {
			first = a
		}
	}
	if first.IsValid() {
		return first
	}
	for _, a := range w.node {
		here := func(d link.Device) bool { return slices.Contains(d.Addresses, a) }
		if family(a) && w.usable(a) && slices.ContainsFunc(devices, here) {
			return a
		}
	}
	return netip.Addr{}
}

// diff says what leads from have to want: native ranges first, then the programs, then
// what they are for, and in the other order away. So nothing native is masqueraded
// meanwhile, and nothing is looked at that has no address to become.
func diff(have, want *Picture, prune bool) layer.Changes {
	var changes layer.Changes
	note := func(op layer.Op, subject layer.Subject) {
		changes = append(changes, layer.Change{Op: op, Subject: subject})
	}
	for _, what := range have.lost {
		note(layer.Add, what)
	}
	if want.wish == nil {
		return changes
	}
	rows := func(own bool) {
		for _, p := range sortedRanges(want.rows) {
			now, is := want.rows[p], have.rows[p]
			switch {
			case now.Own != own || now == is:
			case is == (row{}):
				note(layer.Add, now)
			default:
				note(layer.Alter, now)
			}
		}
	}
	gone := func(own bool) {
		for _, p := range sortedRanges(have.rows) {
			if _, stays := want.rows[p]; prune && !stays && have.rows[p].Own == own {
				note(layer.Remove, have.rows[p])
			}
		}
	}
	wires := map[int]wire{}
	if len(want.wish.own) > 0 {
		wires = want.wish.wires(have.devices)
	}
	rows(false)
	for _, index := range slices.Sorted(maps.Keys(wires)) {
		switch is, there := have.wires[index]; {
		case !there:
			note(layer.Add, wires[index])
		case is.IP4 != wires[index].IP4 || is.IP6 != wires[index].IP6 || is.torn:
			note(layer.Alter, wires[index])
		}
	}
	rows(true)
	gone(true)
	for _, index := range slices.Sorted(maps.Keys(have.wires)) {
		if _, stays := wires[index]; prune && !stays {
			note(layer.Remove, have.wires[index])
		}
	}
	gone(false)
	return changes
}

func sortedRanges(rows map[netip.Prefix]row) []netip.Prefix {
	return slices.SortedFunc(maps.Keys(rows), netip.Prefix.Compare)
}
