package masquerade

import (
	"net/netip"
	"strings"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer"
)

// Picture is the state of the layer. It implements layer.Picture.
type Picture struct {
	rows map[netip.Prefix]row
	// wish is in plans: at which devices programs are to be depends on the host.
	wish *wish
	// The rest is in pictures of the kernel.
	devices []link.Device
	wires   map[int]wire
	lost    []lost
}

func newPicture() *Picture {
	return &Picture{rows: map[netip.Prefix]row{}, wires: map[int]wire{}}
}

// row is a range of addresses. It implements layer.Subject.
type row struct {
	To netip.Prefix `json:"to"`
	// Native says that pods keep their addresses towards it.
	Native bool `json:"native"`
	// Own says that it is of this node's pods, whose packets are masqueraded.
	Own bool `json:"own"`
}

// Object implements layer.Subject.
func (r row) Object() string { return "range " + r.To.String() }

// Detail implements layer.Subject.
func (r row) Detail() string {
	switch {
	case r.Own:
		return "of this node's pods: masqueraded"
	case r.Native:
		return "native: pods keep their addresses"
	}
	return "not native"
}

// wire is a device by which packets leave the node. It implements layer.Subject.
type wire struct {
	device link.Device
	Name   string `json:"name"`
	// IP4 and IP6 are what packets of pods come from; the zero value where there is none.
	IP4 netip.Addr `json:"ip4,omitzero"`
	IP6 netip.Addr `json:"ip6,omitzero"`
	// torn is in pictures of the kernel: a program is missing.
	torn bool
}

// Object implements layer.Subject.
func (w wire) Object() string { return "masquerade at " + w.Name }

// Detail implements layer.Subject.
func (w wire) Detail() string {
	var texts []string
	for _, a := range []netip.Addr{w.IP4, w.IP6} {
		if a.IsValid() {
			texts = append(texts, a.String())
		}
	}
	if len(texts) == 0 {
		return "as nobody: the node has no address there"
	}
	return "as " + strings.Join(texts, ", ")
}

// lost is something that was taken away. It implements layer.Subject.
type lost string

// Object implements layer.Subject.
func (l lost) Object() string { return "pin " + string(l) }

// Detail implements layer.Subject.
func (l lost) Detail() string { return "" }

// Len implements layer.Picture: the ranges.
func (p *Picture) Len() int { return len(p.rows) }

// Subjects implements layer.Picture: the devices, then the ranges in their order.
func (p *Picture) Subjects() (all []layer.Subject) {
	for _, d := range p.devices {
		if w, there := p.wires[d.Index]; there {
			all = append(all, w)
		}
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
	case row:
		if p.rows[s.To] = s; gone {
			delete(p.rows, s.To)
		}
	case wire:
		if p.wires[s.device.Index] = s; gone {
			delete(p.wires, s.device.Index)
		}
	}
}
