package route

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/model"
)

// flannel's words for its ways to other nodes
// (https://github.com/flannel-io/flannel/blob/master/Documentation/backends.md).
const (
	backendVXLAN  = "vxlan"
	backendHostGW = "host-gw"
)

// network is what nodes speak in VXLAN: a UDP port, and a number.
type network struct {
	port uint16
	vni  uint32
}

// peerOf is a node. Where flannel runs, packets are for the addresses that it says.
func peerOf(n *model.Node) peer {
	p := peer{name: n.Name, addresses: usable(n.Addresses), ranges: slices.Clone(n.PodCIDRs), flannel: n.Flannel}
	slices.SortFunc(p.ranges, netip.Prefix.Compare)
	p.mac = macOf(p.addresses)
	if !p.annotated() {
		return p
	}
	if p.mac = n.Flannel.MAC; p.mac == [6]byte{} {
		p.mac = n.Flannel.MAC6
	}
	return p
}

// annotated says that the node says how flannel's nodes reach it by VXLAN, whoever wrote
// that.
func (p peer) annotated() bool { return p.flannel != nil && p.flannel.Backend == backendVXLAN }

// runsFlannel says that flannel writes and reads VXLAN there, as far as the cluster knows.
func (p peer) runsFlannel() bool { return p.annotated() && !p.flannel.Millrace }

// meetFlannel finds out which network the cluster's nodes speak. It is the same on all of
// them, for it depends on what all of them see: while a cluster goes over from flannel node
// by node, those that have gone over speak flannel's among each other, too.
func (w *wish) meetFlannel(settings Settings, config *model.FlannelNetwork) {
	all := append([]peer{w.own}, w.peers...)
	w.flannel = slices.ContainsFunc(all, peer.annotated)
	said := flannelsNetwork(all, config)
	for _, n := range all {
		if n.runsFlannel() && n.flannel.VNI != said.vni {
			w.notes = append(w.notes, fmt.Sprintf("node %s speaks VXLAN of network %d, and others %d: give flannel the same Backend.VNI everywhere, and start it anew there", n.name, n.flannel.VNI, said.vni))
		}
	}
	for i := range w.peers {
		w.meet(&w.peers[i])
	}
	w.network = network{port: DefaultPort, vni: DefaultVNI}
	if w.flannel {
		w.network, w.straight = said, config != nil && config.DirectRouting
	}
	w.network = networkOf(settings, w.network)
}

// flannelsNetwork is what nodes with flannel speak. One Node that says something else changes
// nothing for the others: flannel's configuration counts, as soon as a node has it, for
// flannel reads it only when it begins; else what most nodes say. Those where flannel
// runs know its number best, and of its port they say nothing.
func flannelsNetwork(all []peer, config *model.FlannelNetwork) network {
	var running, marked []uint32
	var ports []uint16
	for _, n := range all {
		switch {
		case !n.annotated():
		case n.runsFlannel():
			running = append(running, n.flannel.VNI)
		default:
			marked = append(marked, n.flannel.VNI)
			if n.flannel.Port != 0 {
				ports = append(ports, n.flannel.Port)
			}
		}
	}
	if len(running) == 0 {
		running = marked
	}
	said := network{port: cmp.Or(most(ports), FlannelPort), vni: most(running)}
	if config == nil {
		return said
	}
	said.port = cmp.Or(config.Port, FlannelPort)
	if vni := cmp.Or(config.VNI, DefaultVNI); slices.Contains(running, vni) {
		said.vni = vni
	}
	return said
}

// most is what most say, of as many the least; zero where nobody says anything.
func most[T cmp.Ordered](said []T) (winner T) {
	count := map[T]int{}
	for _, one := range said {
		count[one]++
	}
	for _, one := range slices.Sorted(maps.Keys(count)) {
		if count[one] > count[winner] {
			winner = one
		}
	}
	return winner
}

// networkOf is what settings ask for, or else a network.
func networkOf(settings Settings, otherwise network) network {
	return network{port: cmp.Or(settings.Port, otherwise.port), vni: cmp.Or(settings.VNI, otherwise.vni)}
}

// meet takes flannel at its word about where it takes packets.
func (w *wish) meet(n *peer) {
	if n.flannel == nil || n.flannel.Millrace {
		return
	}
	if n.flannel.Backend != backendVXLAN && n.flannel.Backend != backendHostGW {
		w.notes = append(w.notes, fmt.Sprintf("node %s says that it runs flannel with the backend %s, which is not spoken here: packets go there as to a node without flannel (where it has gone, take its annotations off the Node)", n.name, n.flannel.Backend))
		return
	}
	var said []netip.Addr
	for _, a := range []netip.Addr{n.flannel.Address, n.flannel.Address6} {
		if a.IsValid() {
			said = append(said, a)
		}
	}
	if len(said) > 0 {
		n.addresses = said
	}
}

// mayBeDirect says whether packets may go to a node, and come from it, as they are. Between
// a node with flannel and another they may not: with strict rp_filter it drops what comes by
// another way than its routes lead, and these lead to its vxlan device.
func (w *wish) mayBeDirect(n peer) bool {
	return w.straight || !w.own.runsFlannel() && !n.runsFlannel()
}

// isFlannels says whether a device is one of flannel's: flannel.1, flannel-v6.1.
func isFlannels(d link.Device) bool {
	return d.Kind == "vxlan" && (strings.HasPrefix(d.Name, "flannel.") || strings.HasPrefix(d.Name, "flannel-v6."))
}

// leftToFlannel says why this node does nothing about other nodes' pods: flannel's device is
// here, by which they are reached, and has the port. Empty where there is none, and where
// the cluster has nothing to do with flannel.
func (w *wish) leftToFlannel(f facts) string {
	if !f.inUse || !w.flannel || w.over {
		return ""
	}
	return fmt.Sprintf("routes to other nodes' pods are left to flannel, whose device %s is here: when flannel has gone from this node for good, say so (kubectl label node %s %s=%s), and they are taken over at once",
		strings.Join(f.flannels, ", "), w.own.name, FlannelLabel, FlannelGone)
}

// A Node with this label has been left by flannel for good: its devices that are still there
// are removed. Nobody but a person can know that, for flannel leaves the same when its
// process starts anew, and may be a part of another one.
const (
	FlannelLabel = "node.millrace.io/flannel"
	FlannelGone  = "gone"
)

// flannels is a vxlan device of flannel. It implements layer.Subject.
type flannels string

// Object implements layer.Subject.
func (f flannels) Object() string { return "device " + string(f) }

// Detail implements layer.Subject.
func (f flannels) Detail() string { return "" }

// saying is what this node says to flannel's nodes, and is to say.
type saying struct{ has, want *model.Flannel }

// unsaid says what others do not know of this node; empty where its Node says all.
func (s saying) unsaid() string {
	if s.want == nil || s.has != nil && *s.has == *s.want {
		return ""
	}
	return "the Node does not say to others that flannel is not here, and how flannel's nodes reach its pods: the agent writes that at once where it has the rights of deploy/own-node.yaml"
}

// say is what this node is to say, by what is in its kernel. Flannel's nodes learn of it
// where there are any. Of what flannel wrote here before others learn that it has gone.
func (w *wish) say(have *Picture) saying {
	s := saying{has: w.own.flannel, want: w.own.flannel}
	if w.leftToFlannel(have.facts) != "" || w.flannelMayRun() {
		return s
	}
	backend := w.flannels()
	if backend == "" && w.own.runsFlannel() {
		backend = backendVXLAN
	}
	if backend == "" || backend == backendVXLAN && w.needsDevice() && (have.device == nil || have.device.torn || have.device.MAC != w.own.mac) {
		return s
	}
	s.want = &model.Flannel{Backend: backend, Millrace: true}
	for _, a := range w.own.addresses {
		switch {
		case a.Is4() && !s.want.Address.IsValid():
			s.want.Address = a
		case a.Is6() && !s.want.Address6.IsValid():
			s.want.Address6 = a
		}
	}
	if backend == backendVXLAN {
		s.want.VNI, s.want.Port = w.network.vni, w.network.port
		if s.want.Address.IsValid() {
			s.want.MAC = w.own.mac
		}
		if s.want.Address6.IsValid() {
			s.want.MAC6 = w.own.mac
		}
	}
	return s
}

// flannelMayRun says that flannel wrote what this node says, and has no device here by whose
// absence one sees that it has gone: so it is with all its backends but vxlan. Then it counts
// as running until a person says otherwise.
func (w *wish) flannelMayRun() bool {
	own := w.own.flannel
	return own != nil && !own.Millrace && own.Backend != backendVXLAN && !w.over
}

// needsDevice says whether packets go by VXLAN to anybody who reads what this node says.
func (w *wish) needsDevice() bool { return w.flannels() == backendVXLAN }

// flannels is the backend of other nodes where flannel runs; empty where there are none.
func (w *wish) flannels() (backend string) {
	for _, n := range w.peers {
		if n.flannel == nil || n.flannel.Millrace {
			continue
		}
		switch n.flannel.Backend {
		case backendVXLAN:
			return backendVXLAN
		case backendHostGW:
			backend = backendHostGW
		}
	}
	return backend
}

// ToFlannel is what this node's Node is to say to the nodes where flannel runs, once the
// kernel is so that it is true. It is ok if the Node says so already, and as long as
// there is nothing to say.
func (l *Layer) ToFlannel() (want *model.Flannel, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.said.want, l.said.unsaid() == ""
}

// WithoutMillrace is what a Node with these addresses is to say to flannel's nodes once
// millrace has gone from it: what flannel said before, nil where it said nothing. It is not
// ok where millrace wrote nothing of what the Node says, which is to stay.
func WithoutMillrace(said *model.Flannel, addresses []netip.Addr) (left *model.Flannel, ok bool) {
	if said == nil || !said.Millrace {
		return nil, false
	}
	// Flannel's address of a device tells that it was here before. With its other backends
	// only a person's word has millrace write over what it said.
	if said.Backend != backendVXLAN || said.MAC == macOf(usable(addresses)) {
		return nil, true
	}
	before := *said
	before.Millrace, before.Port = false, 0
	return &before, true
}

// readNetwork reads which network the device is for. One at another port is not whole.
func readNetwork(d *device, t tables) error {
	if d == nil || !d.Guarded {
		return nil
	}
	entry, _, err := t.networks.Get(0)
	d.VNI = bits.ReverseBytes32(entry.Vni) >> 8
	d.torn = d.torn || bits.ReverseBytes16(entry.Port) != d.Port
	return err
}

// putNetwork tells the programs which network the device is for.
func (l *Layer) putNetwork(d *device) error {
	entry := datapathNetwork{Port: bits.ReverseBytes16(d.Port), Vni: bits.ReverseBytes32(d.VNI << 8)}
	return errors.Join(l.tables.networks.Put([]uint32{0}, []datapathNetwork{entry})...)
}
