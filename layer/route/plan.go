package route

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// What VXLAN adds to a packet, in bytes: outer IP header, UDP, VXLAN and the inner
// Ethernet header (RFC 7348, 5).
const (
	overhead4 = 20 + 8 + 8 + 14
	overhead6 = 40 + 8 + 8 + 14
)

// leastMTU is the smallest that IPv6 works with (RFC 8200, 5).
const leastMTU = 1280

// facts are what a plan has to know of this host.
type facts struct {
	hops    []hop // routes of the main table that are not the layer's
	devices map[int]fact
	// paths are how long packets to nodes may be, by their addresses, where it was measured.
	paths map[netip.Addr]measurement
	// fabrics are what is between this node and adjacent ones, where it was asked, by the first
	// range of a family that a node has.
	fabrics map[netip.Prefix]course
	// shortcuts says that the kernel can give a packet to a pod, or to a neighbour, past the
	// stack.
	shortcuts bool
	// flannels are the vxlan devices that flannel has on this host, inUse that one is up.
	flannels []string
	inUse    bool
	// rules are those of others, unread why they cannot be known.
	rules  nft.Tracking
	unread error
}

// whyClosed says whose rules need to see packets between pods of the ranges. Empty where
// nobody's do.
func (f facts) whyClosed(ranges []netip.Prefix) string {
	const what = "packets to pods of other nodes go through the stack: "
	if f.unread != nil {
		return what + "whether somebody's rules need to see them cannot be read: " + f.unread.Error()
	}
	if use, found := f.rules.About(ranges); found {
		return what + fmt.Sprintf("somebody's rules need to see them (%s)", use)
	}
	return ""
}

// fact is a device that packets to other nodes may leave by.
type fact struct {
	name     string
	mtu      int
	ethernet bool
}

// hop is one way out of one route.
type hop struct {
	to     netip.Prefix
	via    netip.Addr // the zero value where what is in the range are neighbours
	device int
	metric int
	mtu    int // that somebody set of the route, in bytes; 0 for the device's
}

// way is how packets to an address leave the host: by the longest range, then by the
// smallest metric, as the kernel decides without rules.
func (f facts) way(to netip.Addr) (best hop, found bool) {
	for _, h := range f.hops {
		if !h.to.Contains(to) || f.devices[h.device].name == "" {
			continue
		}
		better := cmp.Or(cmp.Compare(h.to.Bits(), best.to.Bits()), cmp.Compare(best.metric, h.metric))
		if !found || better > 0 {
			best, found = h, true
		}
	}
	return best, found
}

// most is the longest packet by a hop to an address, in bytes: what is configured, and what
// was seen to pass.
func (f facts) most(h hop, to netip.Addr) (set, passes int) {
	set = f.devices[h.device].mtu
	if h.mtu > 0 {
		set = min(set, h.mtu)
	}
	if passes = f.paths[to].narrow(); passes == 0 {
		return set, set
	}
	return set, min(set, passes)
}

// peer is a node, as far as routes to its pods depend on it.
type peer struct {
	name      string
	addresses []netip.Addr
	ranges    []netip.Prefix
	// mac is the hardware address of its vxlan device.
	mac [6]byte
	// flannel is what it says to flannel's nodes; nil where it does not.
	flannel *model.Flannel
}

// wish is what a cluster asks of the layer.
type wish struct {
	own   peer
	peers []peer
	// network is what nodes speak in VXLAN; flannel says that flannel is or was in the
	// cluster, straight that its nodes send directly on a segment.
	network           network
	flannel, straight bool
	// over is a person's word that flannel has gone from this node for good.
	over  bool
	notes []string
}

// ranges are those of all pods.
func (w *wish) ranges() (all []netip.Prefix) {
	all = slices.Clone(w.own.ranges)
	for _, n := range w.peers {
		all = append(all, n.ranges...)
	}
	return all
}

// others are the addresses of the other nodes.
func (w *wish) others() (all []netip.Addr) {
	for _, n := range w.peers {
		all = append(all, n.addresses...)
	}
	return all
}

// besides are the node's addresses that another does not have, too: of a Node that this
// machine had under an earlier name, say, nothing can be reached.
func (p peer) besides(own peer) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(p.addresses), func(a netip.Addr) bool { return slices.Contains(own.addresses, a) })
}

// plan reads a Snapshot. As long as this node is not in it, nobody knows where its own pods
// are, and all stays as it is.
func plan(settings Settings, snapshot *model.Snapshot) *Picture {
	picture := newPicture()
	w := &wish{}
	for _, n := range snapshot.Nodes {
		p := peerOf(n)
		if n.Name == settings.Node {
			w.own, w.over = p, n.Labels[FlannelLabel] == FlannelGone
		} else {
			w.peers = append(w.peers, p)
		}
	}
	slices.SortFunc(w.peers, func(a, b peer) int { return cmp.Compare(a.name, b.name) })
	if w.own.name != "" {
		w.meetFlannel(settings, snapshot.Flannel)
		picture.wish = w
	}
	return picture
}

// usable are the addresses that others can send to, IPv4 first: over it VXLAN is shorter
// and needs no receiver that takes UDP without a checksum over IPv6.
func usable(all []netip.Addr) (some []netip.Addr) {
	for _, a := range all {
		if a = a.Unmap(); a.IsGlobalUnicast() {
			some = append(some, a)
		}
	}
	slices.SortStableFunc(some, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
	return some
}

// macOf is the hardware address of a node's vxlan device: of its first address, so that
// nodes need not tell each other. It is a locally administered one (IEEE 802, 8.4).
func macOf(addresses []netip.Addr) (mac [6]byte) {
	if len(addresses) == 0 {
		return mac
	}
	mac = [6]byte{0x02, 'm'}
	bytes := addresses[0].AsSlice()
	sum := uint32(2166136261) // FNV-1a, http://www.isthe.com/chongo/tech/comp/fnv/
	for _, b := range bytes {
		sum = (sum ^ uint32(b)) * 16777619
	}
	copy(mac[2:], []byte{byte(sum >> 24), byte(sum >> 16), byte(sum >> 8), byte(sum)})
	if len(bytes) == 4 {
		copy(mac[2:], bytes)
	}
	return mac
}

// resolve makes of a wish what is to be in the kernel of a host.
func resolve(settings Settings, w *wish, f facts) *Picture {
	p := newPicture()
	p.left = append(p.left, w.notes...)
	if why := w.leftToFlannel(f); why != "" {
		p.left = append(p.left, why)
		return p
	}
	p.why = f.whyClosed(w.ranges())
	mtu, told := 0, map[netip.Addr]bool{}
	for _, n := range w.peers {
		for _, to := range n.ranges {
			row, why := choose(settings, w, n, to, f)
			if row == nil {
				p.left = append(p.left, fmt.Sprintf("no route to %s of node %s: %s", to, n.name, why))
				continue
			}
			if p.rows[to] != nil {
				p.left = append(p.left, fmt.Sprintf("no route to %s of node %s: node %s has the same range", to, n.name, p.rows[to].Node))
				continue
			}
			p.rows[to] = row
			if near, is := adjacentBy(settings, w, n, row, f); is {
				p.adjacent[to] = near
			}
			if by := w.takenBy(n, row, f); by != nil {
				p.takes[n.name] = true
				mtu = max(mtu, f.devices[by.index].mtu-by.overhead()) // the routes by the device have their own
			}
			if found := row.finding(f); found != "" && !told[row.Via] {
				told[row.Via] = true
				p.narrow = append(p.narrow, found)
			}
		}
	}
	w.addVTEPs(p)
	if mtu > 0 {
		p.device = &device{Name: settings.device(), VNI: w.network.vni, Port: w.network.port, MTU: mtu, MAC: w.own.mac, VTEPs: w.own.addresses, Guarded: true}
		for _, own := range w.own.ranges {
			p.device.Addresses = append(p.device.Addresses, own.Masked().Addr())
		}
	}
	return p
}

// takenBy is how a node may send VXLAN: as it is sent there, or would be where it is taken
// for as long as that node has not gone over to direct ways, or back. Nil where it may not.
func (w *wish) takenBy(n peer, row *Row, f facts) *Row {
	if !row.Direct {
		return row
	}
	if !f.fabrics[n.first(row.To)].kept {
		return nil
	}
	by, _ := w.inVXLAN(n, row.To, f)
	return by
}

// addVTEPs notes from where VXLAN is taken: from nodes to which it leads. Where flannel is
// in the cluster, nodes change their ways one after the other, and it is from all.
func (w *wish) addVTEPs(p *Picture) {
	for _, n := range w.peers {
		if !p.takes[n.name] && (!w.flannel || len(p.takes) == 0) {
			continue
		}
		for _, a := range n.besides(w.own) {
			p.vteps[a] = true
		}
	}
}

// choose finds the best way to a range of another node, or says why there is none.
func choose(settings Settings, w *wish, n peer, to netip.Prefix, f facts) (row *Row, why string) {
	if settings.Mode == ModeVXLAN || !w.mayBeDirect(n) {
		if row, why = w.inVXLAN(n, to, f); row != nil && row.Near {
			row.Why = "as the setting asks"
			if !w.mayBeDirect(n) {
				row.Why = "flannel takes packets that way"
			}
		}
		return row, why
	}
	if near := direct(w.own, n, to, f); near != nil {
		if f.fabrics[n.first(to)].over {
			if row, _ = w.inVXLAN(n, to, f); row != nil {
				row.Why = "it is on the same segment, which drops packets of pods' addresses"
				return row, ""
			}
		}
		return near, ""
	}
	if row, why = w.inVXLAN(n, to, f); row != nil && row.Near {
		row.Why = fmt.Sprintf("no address for %s on the same segment", family(to.Addr()))
	}
	return row, why
}

// inVXLAN is the way in VXLAN, or why there is none.
func (w *wish) inVXLAN(n peer, to netip.Prefix, f facts) (row *Row, why string) {
	own := w.own
	why = "it has no address that this node has a route to"
	addresses := n.besides(own)
	if len(addresses) < len(n.addresses) {
		why = "it has an address of this node: is it an earlier name of this one?"
	}
	for _, vtep := range addresses {
		h, found := f.way(vtep)
		if !found {
			continue
		}
		if vtep.Is6() && n.runsFlannel() {
			why = "flannel there takes VXLAN over IPv6 only with UDP checksums, which there are none of"
			continue
		}
		local, at := sameFamily(own.addresses, vtep), f.devices[h.device]
		over := overheadOf(vtep)
		set, passes := f.most(h, vtep)
		switch {
		case !local.IsValid():
			why = fmt.Sprintf("this node has no address from which it could send to %s", vtep)
		case !at.ethernet:
			why = fmt.Sprintf("packets to %s leave by %s, which has no Ethernet headers", vtep, at.name)
		case set-over < leastMTU:
			why = fmt.Sprintf("packets to %s leave by %s, whose MTU of %d leaves less than %d inside", vtep, at.name, set, leastMTU)
		default:
			return &Row{To: to, Node: n.name, Via: vtep, Local: local, Device: at.name, index: h.device, MTU: max(passes-over, leastMTU),
				set: max(passes-over, leastMTU), MAC: n.mac, Near: !h.via.IsValid(), Why: fmt.Sprintf("it is behind %s", h.via)}, ""
		}
	}
	return nil, why
}

// direct is the way to a node on the same segment; nil if it is not on one.
func direct(own, n peer, to netip.Prefix, f facts) *Row {
	for _, via := range n.besides(own) {
		h, found := f.way(via)
		if !found || h.via.IsValid() || via.BitLen() != to.Addr().BitLen() || !f.devices[h.device].ethernet {
			continue
		}
		at := f.devices[h.device]
		set, passes := f.most(h, via)
		passes = max(passes, min(set, leastMTU)) // what was seen to pass may be what somebody says
		if via.Is6() {
			passes = max(passes, min(at.mtu, leastMTU))
		}
		row := &Row{To: to, Node: n.name, Direct: true, Via: via, Device: at.name, index: h.device, Shortcut: f.shortcuts,
			MTU: passes, Why: "it is on the same segment"}
		if passes < at.mtu {
			row.set = passes
		}
		return row
	}
	return nil
}

// overheadOf is what VXLAN to an address adds.
func overheadOf(vtep netip.Addr) int {
	if vtep.Is6() {
		return overhead6
	}
	return overhead4
}

func sameFamily(all []netip.Addr, as netip.Addr) netip.Addr {
	for _, a := range all {
		if a.BitLen() == as.BitLen() {
			return a
		}
	}
	return netip.Addr{}
}

func family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// diff says what leads from have to want: what a route stands on before it, and in the
// other order away.
func diff(settings Settings, have, want *Picture, prune bool) layer.Changes {
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
	aim := resolve(settings, want.wish, have.facts)
	there := have.rows
	if have.open && aim.why != "" {
		note(layer.Remove, gate{})
	}
	if want.wish.over {
		for _, name := range have.facts.flannels {
			note(layer.Remove, flannels(name))
		}
	}
	switch {
	case aim.device == nil:
	case have.device == nil:
		note(layer.Add, aim.device)
	case !have.device.equal(aim.device):
		note(layer.Alter, aim.device)
	}
	for _, a := range sortedAddresses(aim.vteps) {
		if !have.vteps[a] {
			note(layer.Add, vtep(a))
		}
	}
	// Programs before routes: what takes packets out has to be there when the others send.
	ports, unwanted := wantedPorts(have, aim, prune)
	for _, p := range ports {
		note(layer.Add, p)
	}
	for _, to := range sortedRanges(aim.rows) {
		switch old := there[to]; {
		case old == nil:
			note(layer.Add, aim.rows[to])
		case !old.equal(aim.rows[to]) || !old.Direct && have.device != nil && aim.device != nil && !have.device.same(aim.device):
			note(layer.Alter, aim.rows[to])
		}
	}
	if !have.open && aim.why == "" && len(aim.rows) > 0 {
		note(layer.Add, gate{})
	}
	if !prune {
		return changes
	}
	for _, to := range sortedRanges(there) {
		if aim.rows[to] == nil {
			note(layer.Remove, there[to])
		}
	}
	for _, p := range unwanted {
		note(layer.Remove, p)
	}
	for _, a := range sortedAddresses(have.vteps) {
		if !aim.vteps[a] {
			note(layer.Remove, vtep(a))
		}
	}
	if have.device != nil && aim.device == nil {
		note(layer.Remove, have.device)
	}
	return changes
}

// wires are the devices by which packets go and come past the stack.
func (p *Picture) wires() map[int]bool {
	wires := map[int]bool{}
	for _, row := range p.rows {
		if row.byProgram() {
			wires[row.index] = true
		}
	}
	return wires
}

// wanted says that the program has something to do there.
func (p port) wanted(wires map[int]bool) bool {
	if p.ofPod {
		return len(wires) > 0 && p.pod && !wires[p.Index]
	}
	return wires[p.Index]
}

// byStack says why packets that come by some devices go through the stack.
func byStack(ports []port, wires map[int]bool) (why []string) {
	for _, p := range ports {
		if p.filtered && p.wanted(wires) {
			why = append(why, fmt.Sprintf("what comes by %s goes through the stack: somebody's filters look at it (tc filter show dev %s ingress)", p.Name, p.Name))
		}
	}
	return why
}

// wantedPorts are the devices whose programs are missing, and those that have one too
// many.
func wantedPorts(have, aim *Picture, prune bool) (missing, unwanted []port) {
	wires := aim.wires()
	if !prune { // what is not known to be away may still come by them
		maps.Copy(wires, have.wires())
	}
	for _, p := range have.ports {
		wanted := p.wanted(wires) && !p.filtered
		switch {
		case wanted && !p.attached:
			missing = append(missing, p)
		case !wanted && p.attached:
			unwanted = append(unwanted, p)
		}
	}
	return missing, unwanted
}

func sortedRanges(rows map[netip.Prefix]*Row) []netip.Prefix {
	return slices.SortedFunc(maps.Keys(rows), netip.Prefix.Compare)
}

func sortedAddresses(set map[netip.Addr]bool) []netip.Addr {
	return slices.SortedFunc(maps.Keys(set), netip.Addr.Compare)
}
