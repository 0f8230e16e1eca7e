package service

import (
	"net/netip"
	"slices"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// planner turns Services into rows. It remembers the rows of each Service
// value, which is immutable, so that planning costs what changed; what it
// answers depends on the Snapshot alone.
type planner struct {
	known map[*model.Service][]*Row
}

func (p *planner) plan(snapshot *model.Snapshot) *Picture {
	known := make(map[*model.Service][]*Row, len(snapshot.Services))
	picture := &Picture{rows: make(map[Frontend]*Row, 2*len(snapshot.Services))}
	for _, service := range inNameOrder(snapshot.Services) {
		rows, ok := p.known[service]
		if !ok {
			rows = rowsOf(service)
		}
		known[service] = rows
		for _, row := range rows {
			// Two Services with one address: sources report it; the first by
			// name is served, whatever the order of the input.
			if _, taken := picture.rows[row.Frontend]; !taken {
				picture.rows[row.Frontend] = row
			}
		}
	}
	p.known = known
	return picture
}

// inNameOrder returns services sorted by name; sources deliver them so.
func inNameOrder(services []*model.Service) []*model.Service {
	byName := func(a, b *model.Service) int { return a.Name.Compare(b.Name) }
	if slices.IsSortedFunc(services, byName) {
		return services
	}
	return slices.SortedFunc(slices.Values(services), byName)
}

// rowsOf plans one Service: a row for each of its addresses and ports.
func rowsOf(service *model.Service) []*Row {
	if service.Headless || service.Type == model.ExternalName {
		return nil
	}
	var rows []*Row
	for _, port := range service.Ports {
		if port.Protocol != model.TCP && port.Protocol != model.UDP {
			continue // SCTP has no connect hook
		}
		for _, address := range service.ClusterIPs {
			rows = append(rows, &Row{
				Frontend: Frontend{netip.AddrPortFrom(address.Unmap(), port.Port), port.Protocol},
				Service:  service.Name,
				Port:     port.Name,
				Backends: chosen(port.Backends, address.Unmap().Is4()),
			})
		}
	}
	return rows
}

// chosen are the endpoints of one family that get new connections: the ready
// ones, and only if there are none, those that still serve while they terminate
// (KEP-1669).
func chosen(backends []model.Backend, ip4 bool) []netip.AddrPort {
	pick := func(want func(model.Backend) bool) []netip.AddrPort {
		var picked []netip.AddrPort
		for _, b := range backends {
			if b.Address.Addr().Unmap().Is4() == ip4 && want(b) {
				picked = append(picked, netip.AddrPortFrom(b.Address.Addr().Unmap(), b.Address.Port()))
			}
		}
		slices.SortFunc(picked, netip.AddrPort.Compare)
		return slices.Compact(picked)
	}
	if ready := pick(func(b model.Backend) bool { return b.Ready }); len(ready) > 0 {
		return ready
	}
	return pick(func(b model.Backend) bool { return b.Serving && b.Terminating })
}

// diff says what leads from have to want: first what was lost, then the rows in
// the order of the frontends.
func diff(have, want *Picture, prune bool) layer.Changes {
	var back, changes layer.Changes
	for _, what := range have.lost {
		back = append(back, layer.Change{Op: layer.Add, Subject: what})
	}
	for frontend, row := range want.rows {
		switch old, ok := have.rows[frontend]; {
		case !ok:
			changes = append(changes, layer.Change{Op: layer.Add, Subject: row})
		case old.torn || old != row && !slices.Equal(old.Backends, row.Backends):
			changes = append(changes, layer.Change{Op: layer.Alter, Subject: row})
		}
	}
	if prune {
		for frontend, row := range have.rows {
			if _, ok := want.rows[frontend]; !ok {
				changes = append(changes, layer.Change{Op: layer.Remove, Subject: row})
			}
		}
	}
	slices.SortFunc(changes, func(a, b layer.Change) int {
		return a.Subject.(*Row).compare(b.Subject.(*Row).Frontend)
	})
	return append(back, changes...)
}
