package service

import (
	"net/netip"
	"slices"
	"time"

	"github.com/millrace/millrace/model"
)

// place is where a plan is for: which endpoints count may depend on it.
type place struct {
	node, zone string
	seen       model.Name
}

// zoneLabel is the label that says in which zone a Node is.
const zoneLabel = "topology.kubernetes.io/zone"

func placeOf(settings Settings, snapshot *model.Snapshot) place {
	at := place{node: settings.Node, seen: settings.Seen}
	for _, n := range snapshot.Nodes {
		if n.Name == at.node {
			at.zone = n.Labels[zoneLabel]
		}
	}
	return at
}

// door is an address by which clients come to a Service.
type door struct {
	address netip.Addr
	entry   Entry
	ranges  []netip.Prefix
}

// rowsOf plans one Service for a place: a row for each of its ports at each of its
// doors, and for each node port.
func rowsOf(service *model.Service, at place) []*Row {
	if service.Headless || service.Type == model.ExternalName {
		return nil
	}
	var rows []*Row
	for _, ip4 := range []bool{true, false} {
		doors := doorsOf(service, ip4)
		if len(doors) == 0 {
			continue
		}
		for i := range service.Ports {
			port := &service.Ports[i]
			if port.Protocol != model.TCP && port.Protocol != model.UDP {
				continue // SCTP has no connect hook
			}
			to := endpointsOf(service, port, at, ip4)
			for _, d := range doors {
				rows = append(rows, rowAt(service, port, d, port.Port, to))
			}
			if port.NodePort != 0 {
				rows = append(rows, rowAt(service, port, door{anyAddress(ip4), AtNodePort, nil}, port.NodePort, to))
			}
		}
	}
	return rows
}

// anyAddress is the unspecified address of a family, which stands for any of the
// node's.
func anyAddress(ip4 bool) netip.Addr {
	if ip4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// nodePort is the frontend at which the same port is a node port.
func (f Frontend) nodePort() Frontend {
	return Frontend{netip.AddrPortFrom(anyAddress(f.Address.Addr().Is4()), f.Address.Port()), f.Protocol}
}

// doorsOf are a Service's addresses of one family, no two equal; none if it has no
// ClusterIP of that family, as with kube-proxy. An address that is a load
// balancer's and more stays guarded by its source ranges.
func doorsOf(service *model.Service, ip4 bool) []door {
	var doors []door
	add := func(entry Entry, ranges []netip.Prefix, addresses []netip.Addr) {
		for _, a := range addresses {
			a = a.Unmap()
			if a.Is4() == ip4 && !slices.ContainsFunc(doors, func(d door) bool { return d.address == a }) {
				doors = append(doors, door{a, entry, ranges})
			}
		}
	}
	add(AtClusterIP, nil, service.ClusterIPs)
	if len(doors) == 0 {
		return nil
	}
	if len(service.LoadBalancerIPs) > 0 {
		add(AtLoadBalancer, rangesOf(service.SourceRanges, ip4), service.LoadBalancerIPs)
	}
	add(AtExternalIP, nil, service.ExternalIPs)
	return doors
}

// rangesOf are the ranges of one family, nil for all clients. As with kube-proxy,
// that is so too where a range is everything, and where all ranges are of the
// other family: each family's ranges are for its own clients.
func rangesOf(ranges []netip.Prefix, ip4 bool) []netip.Prefix {
	var own []netip.Prefix
	for _, p := range ranges {
		switch {
		case p.Addr().Is4() != ip4:
		case p.Bits() == 0:
			return nil
		default:
			own = append(own, p.Masked())
		}
	}
	slices.SortFunc(own, netip.Prefix.Compare)
	return slices.Compact(own)
}

// rowAt is one port of a Service at one door.
func rowAt(service *model.Service, port *model.ServicePort, d door, number uint16, to endpoints) *Row {
	row := &Row{
		Frontend:     Frontend{netip.AddrPortFrom(d.address, number), port.Protocol},
		Entry:        d.entry,
		Service:      service.Name,
		Port:         port.Name,
		Path:         askedPath(service.Annotations),
		Affinity:     uint32(service.Affinity / time.Second),
		SourceRanges: d.ranges,
	}
	if d.entry == AtClusterIP {
		row.Backends, row.Masquerade = to.cluster, true
		if service.InternalLocal {
			row.Backends, row.Drops = to.local, to.noneLocal()
		}
		return row
	}
	row.Backends, row.Outside, row.Masquerade = to.cluster, to.outside, !service.ExternalLocal
	return row
}

// endpoints are those of one Service port and family that get new connections.
type endpoints struct {
	// cluster are those anywhere that are meant for clients of this place.
	cluster []netip.AddrPort
	// local are those on this node; only for a Service that asks for it.
	local []netip.AddrPort
	// outside is Row.Outside of every entry but the ClusterIP.
	outside *Outside
}

// noneLocal says that there are endpoints, but none on this node.
func (e *endpoints) noneLocal() bool { return len(e.local) == 0 && len(e.cluster) > 0 }

func endpointsOf(service *model.Service, port *model.ServicePort, at place, ip4 bool) endpoints {
	own := func(b *model.Backend) bool { return b.Address.Addr().Unmap().Is4() == ip4 }
	preferred := preferredAt(port.Backends, at, own)
	var e endpoints
	if e.cluster = pick(port.Backends, func(b *model.Backend) bool { return own(b) && b.Ready && preferred(b) }); len(e.cluster) == 0 {
		e.cluster = pick(port.Backends, func(b *model.Backend) bool { return own(b) && b.Serving && b.Terminating })
	}
	if !service.InternalLocal && !service.ExternalLocal {
		return e
	}
	here := func(b *model.Backend) bool { return own(b) && b.Node != "" && b.Node == at.node }
	if e.local = pick(port.Backends, func(b *model.Backend) bool { return here(b) && b.Ready }); len(e.local) == 0 {
		e.local = pick(port.Backends, func(b *model.Backend) bool { return here(b) && b.Serving && b.Terminating })
	}
	if service.ExternalLocal && !slices.Equal(e.local, e.cluster) {
		e.outside = &Outside{Backends: e.local, Drops: e.noneLocal()}
	}
	return e
}

// preferredAt says which ready endpoints clients of a place shall use by their
// hints: those for its node, or else those for its zone. Hints count only if every
// ready endpoint has one and one is for this place; else all are used.
func preferredAt(backends []model.Backend, at place, own func(*model.Backend) bool) func(*model.Backend) bool {
	byNode, byZone := true, true
	someNode, someZone := false, false
	for i := range backends {
		b := &backends[i]
		if !b.Ready || !own(b) {
			continue
		}
		nodes, thisNode := b.Hints.Nodes(at.node)
		zones, thisZone := b.Hints.Zones(at.zone)
		byNode, someNode = byNode && nodes, someNode || thisNode
		byZone, someZone = byZone && zones, someZone || thisZone
	}
	switch {
	case byNode && someNode:
		return func(b *model.Backend) bool { _, this := b.Hints.Nodes(at.node); return this }
	case byZone && someZone:
		return func(b *model.Backend) bool { _, this := b.Hints.Zones(at.zone); return this }
	}
	return func(*model.Backend) bool { return true }
}

// pick are the addresses of the endpoints that are wanted, sorted, no two equal.
func pick(backends []model.Backend, want func(*model.Backend) bool) []netip.AddrPort {
	var picked []netip.AddrPort
	for i := range backends {
		if b := &backends[i]; want(b) {
			picked = append(picked, netip.AddrPortFrom(b.Address.Addr().Unmap(), b.Address.Port()))
		}
	}
	slices.SortFunc(picked, netip.AddrPort.Compare)
	return slices.Compact(picked)
}
