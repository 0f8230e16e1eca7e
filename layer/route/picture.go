package route

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/millrace/millrace/layer"
)

// Picture is the state of the layer. It implements layer.Picture.
type Picture struct {
	// wish is what a plan holds: what of it is to be in the kernel depends on facts.
	wish *wish
	// The rest is in pictures of the kernel.
	facts  facts
	device *device
	rows   map[netip.Prefix]*Row
	vteps  map[netip.Addr]bool // of other nodes
	ports  []port
	// open says that packets go past the stack; why, in plans, whose rules need to see them.
	open   bool
	why    string
	lost   []lost
	left   []string
	narrow []string // findings
	// Of plans: the nodes that look adjacent, by the first range of a family that each has, and
	// the nodes from which VXLAN is taken.
	adjacent map[netip.Prefix]adjacent
	takes    map[string]bool
}

func newPicture() *Picture {
	return &Picture{rows: map[netip.Prefix]*Row{}, vteps: map[netip.Addr]bool{}, adjacent: map[netip.Prefix]adjacent{}, takes: map[string]bool{}}
}

// Row is a range of another node's pods and the way there. It implements layer.Subject.
type Row struct {
	To   netip.Prefix `json:"to"`
	Node string       `json:"node,omitempty"`
	// Direct says that packets go to the node as they are; otherwise in VXLAN.
	Direct bool `json:"direct"`
	// Via is the node's address, Local this node's where packets go in VXLAN.
	Via   netip.Addr `json:"via"`
	Local netip.Addr `json:"local,omitzero"`
	// Device is what they leave by.
	Device string `json:"device"`
	index  int
	// Shortcut says that packets of pods go that way past the node's stack, also where
	// Direct; in VXLAN they always do.
	Shortcut bool `json:"shortcut,omitempty"`
	// MTU is the longest packet of pods, in bytes. set is that of the node's route: where it
	// is Direct, 0 if the device's holds.
	MTU int `json:"mtu,omitempty"`
	set int
	// MAC is the hardware address of the node's vxlan device.
	MAC [6]byte `json:"-"`
	// Near says that Via is a neighbour.
	Near bool `json:"near,omitempty"`
	// Why says why this way was chosen.
	Why string `json:"why,omitempty"`
	// torn is in pictures of the kernel: a part is missing. ownMAC is there, too: that of
	// this node's device, as the entry has it.
	torn   bool
	ownMAC [6]byte
}

// equal says that two lead the same way. Why, and whose the range is, the kernel does not
// know.
func (r *Row) equal(o *Row) bool {
	return r.To == o.To && r.Direct == o.Direct && r.Via == o.Via && r.Local == o.Local && r.index == o.index &&
		r.Shortcut == o.Shortcut && r.MTU == o.MTU && r.set == o.set && r.MAC == o.MAC && r.Near == o.Near && !r.torn && !o.torn
}

// byProgram says that programs take packets that way.
func (r *Row) byProgram() bool { return r.Shortcut || !r.Direct }

// overhead is what is put around a packet, in bytes.
func (r *Row) overhead() int {
	if r.Direct {
		return 0
	}
	return overheadOf(r.Via)
}

// outside is the longest packet on the wire, in bytes.
func (r *Row) outside() int { return r.MTU + r.overhead() }

// Object implements layer.Subject.
func (r *Row) Object() string { return "route " + r.To.String() }

// Detail implements layer.Subject.
func (r *Row) Detail() string {
	text := "->"
	if r.Node != "" {
		text += " " + r.Node
	}
	if r.Direct {
		text += fmt.Sprintf(" direct via %s by %s mtu %d", r.Via, r.Device, r.MTU)
		if r.Shortcut {
			text += ", past the stack"
		}
	} else {
		text += fmt.Sprintf(" vxlan to %s by %s mtu %d", r.Via, r.Device, r.MTU)
	}
	if r.Why != "" {
		text += ": " + r.Why
	}
	return text
}

// device is the node's vxlan device. It implements layer.Subject.
type device struct {
	Name  string       `json:"name"`
	VNI   uint32       `json:"vni"`
	Port  uint16       `json:"port"`
	MTU   int          `json:"mtu"`
	MAC   [6]byte      `json:"-"`
	index int          // 0 in plans
	VTEPs []netip.Addr `json:"vteps"` // this node's, at which packets are taken
	// Addresses are the first of each of this node's pod ranges: from them the stack speaks
	// to pods of other nodes, and answers find the way back.
	Addresses []netip.Addr `json:"addresses"`
	// Guarded says that packets by it are asked who sent them.
	Guarded bool `json:"guarded"`
	torn    bool
}

// same says that one can become the other without being made anew.
func (d *device) same(o *device) bool {
	return d.Name == o.Name && d.VNI == o.VNI && d.Port == o.Port && d.MAC == o.MAC && d.Guarded == o.Guarded
}

func (d *device) equal(o *device) bool {
	return d.same(o) && d.MTU == o.MTU && sameSet(d.VTEPs, o.VTEPs) && sameSet(d.Addresses, o.Addresses) && !d.torn && !o.torn
}

func sameSet(a, b []netip.Addr) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.SortFunc(a, netip.Addr.Compare)
	slices.SortFunc(b, netip.Addr.Compare)
	return slices.Equal(a, b)
}

// Object implements layer.Subject.
func (d *device) Object() string { return "device " + d.Name }

// Detail implements layer.Subject.
func (d *device) Detail() string {
	var texts []string
	for _, a := range d.Addresses {
		texts = append(texts, a.String())
	}
	return fmt.Sprintf("-> vxlan id %d port %d mtu %d mac %s %s", d.VNI, d.Port, d.MTU, net.HardwareAddr(d.MAC[:]), strings.Join(texts, ", "))
}

// vtep is an address of another node from which VXLAN is taken. It implements
// layer.Subject.
type vtep netip.Addr

// Object implements layer.Subject.
func (v vtep) Object() string { return "vtep " + netip.Addr(v).String() }

// Detail implements layer.Subject.
func (v vtep) Detail() string { return "" }

// MarshalText gives the address.
func (v vtep) MarshalText() ([]byte, error) { return netip.Addr(v).MarshalText() }

// port is a device and one program that may be at it. It implements layer.Subject.
type port struct {
	Index int    `json:"index"`
	Name  string `json:"name"`
	// ofPod says which program: that of pods, or that of wires.
	ofPod bool
	// pod says that a pod is behind the device, attached that the program is in force,
	// filtered that somebody's filters look at what comes by it, which they would not see
	// any more.
	pod, attached, filtered bool
}

func (p port) program() string {
	if p.ofPod {
		return datapathProgRouteFromPod
	}
	return datapathProgRouteFromWire
}

// Object implements layer.Subject.
func (p port) Object() string { return "program " + p.program() + " of " + p.Name }

// Detail implements layer.Subject.
func (p port) Detail() string { return "" }

// gate is whether packets go past the stack. It implements layer.Subject.
type gate struct{}

// Object implements layer.Subject.
func (gate) Object() string { return "shortcuts to pods of other nodes" }

// Detail implements layer.Subject.
func (gate) Detail() string { return "" }

// lost is something that was taken away. It implements layer.Subject.
type lost string

// Object implements layer.Subject.
func (l lost) Object() string { return string(l) }

// Detail implements layer.Subject.
func (l lost) Detail() string { return "" }

// measure says how long packets by plain routes may be, which depends on their devices.
func (p *Picture) measure() {
	for _, row := range p.rows {
		if row.byProgram() {
			continue // its entry says so
		}
		row.MTU = p.facts.devices[row.index].mtu
		if row.set > 0 {
			row.MTU = min(row.MTU, row.set)
		}
	}
}

// Len implements layer.Picture: the ranges of other nodes.
func (p *Picture) Len() int {
	n := len(p.rows)
	if p.wish != nil {
		for _, peer := range p.wish.peers {
			n += len(peer.ranges)
		}
	}
	return n
}

// Subjects implements layer.Picture: the device, then the routes in their order.
func (p *Picture) Subjects() (all []layer.Subject) {
	if p.device != nil {
		all = append(all, p.device)
	}
	for _, to := range sortedRanges(p.rows) {
		all = append(all, p.rows[to])
	}
	return all
}

// note puts a change that was made into a picture.
func (p *Picture) note(change layer.Change) {
	gone := change.Op == layer.Remove
	switch s := change.Subject.(type) {
	case lost:
		p.lost = nil
	case gate:
		p.open = !gone
	case flannels:
		p.facts.flannels = slices.DeleteFunc(slices.Clone(p.facts.flannels), func(name string) bool { return name == string(s) })
		p.facts.inUse = p.facts.inUse && len(p.facts.flannels) > 0
	case *device:
		if p.device != nil && !p.device.same(s) {
			maps.DeleteFunc(p.rows, func(_ netip.Prefix, r *Row) bool { return !r.Direct })
		}
		if p.device = s; gone {
			p.device = nil
		}
	case vtep:
		if p.vteps[netip.Addr(s)] = true; gone {
			delete(p.vteps, netip.Addr(s))
		}
	case *Row:
		if p.rows[s.To] = s; gone {
			delete(p.rows, s.To)
		}
	case port:
		for i := range p.ports {
			if p.ports[i].Index == s.Index && p.ports[i].ofPod == s.ofPod {
				p.ports[i].attached = !gone
			}
		}
	}
}
