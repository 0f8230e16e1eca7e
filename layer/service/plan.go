package service

import (
	"iter"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// planner turns Services into plans. It remembers those of the last Snapshot: a
// Service that is the same value, and so unchanged, keeps its plan, unless this
// node is in another zone now. What it answers depends on the Snapshot alone.
type planner struct {
	last []*plan
	at   place
	// ports is the plan of the last Snapshot's hostPorts.
	ports *plan
	of    []model.HostPort
}

func (p *planner) plan(settings Settings, snapshot *model.Snapshot) *Picture {
	if at := placeOf(settings, snapshot); at != p.at {
		p.last, p.at = nil, at
	}
	plans, ordered := p.merge(snapshot.Services)
	if !ordered {
		plans, _ = p.merge(inNameOrder(snapshot.Services))
	}
	p.last = plans
	if ports := p.planPorts(snapshot.HostPorts); ports != nil {
		plans = append([]*plan{ports}, plans...)
	}
	picture := wanted(plans)
	picture.whole = snapshot.Complete && snapshot.Unread == 0
	var asked demands
	for _, plan := range plans {
		asked = asked.and(plan.demands)
	}
	picture.paths = pathsOf(settings, snapshot, asked)
	return picture
}

// merge plans Services in the order of their names; it says if they are not. A
// run of Services that did not change is passed over by comparing pointers.
func (p *planner) merge(services []*model.Service) (plans []*plan, ordered bool) {
	plans = make([]*plan, len(services))
	old, run := p.last, true
	for i, service := range services {
		if run && len(old) > 0 && old[0].service == service {
			plans[i], old = old[0], old[1:]
			continue
		}
		if i > 0 && services[i-1].Name.Compare(service.Name) > 0 {
			return nil, false
		}
		for len(old) > 0 && old[0].service.Name.Compare(service.Name) < 0 {
			old = old[1:]
		}
		run = len(old) > 0 && old[0].service == service
		if run {
			plans[i], old = old[0], old[1:]
		} else {
			plans[i] = planOf(service, p.at)
		}
	}
	return plans, true
}

// planOf plans one Service. The one whose packets are to be seen is served by packets.
func planOf(service *model.Service, at place) *plan {
	made := &plan{service, demandsOf(service), rowsOf(service, at)}
	if service.Name == at.seen {
		made.demands.packets = true
		for _, row := range made.rows {
			row.Path = PathPacket
		}
	}
	return made
}

// inNameOrder returns services sorted by name; sources deliver them so.
func inNameOrder(services []*model.Service) []*model.Service {
	byName := func(a, b *model.Service) int { return a.Name.Compare(b.Name) }
	if slices.IsSortedFunc(services, byName) {
		return services
	}
	return slices.SortedFunc(slices.Values(services), byName)
}

// diff says what leads from have to want: first what was lost, then ports and
// namespaces that get the packet path, then the rows in the order of the
// frontends, then ports and namespaces that lose it. Without prune no Service is removed, and none
// loses its last endpoint; but hostPorts are, for this node knows them all, and who has the
// pod's address next is not to be reached by them.
func diff(have, want *Picture, prune bool) layer.Changes {
	changes, ok := layer.Changes(nil), false
	if prune && have.agrees != nil {
		changes, ok = diffPlans(have, want)
	}
	if !ok {
		changes = diffAll(have.index(), want.index(), prune)
	}
	slices.SortFunc(changes, func(a, b layer.Change) int {
		return a.Subject.(*Row).compare(b.Subject.(*Row).Frontend)
	})
	var all layer.Changes
	for _, what := range have.lost {
		all = append(all, layer.Change{Op: layer.Add, Subject: what})
	}
	first, last := diffPaths(have, want.paths, prune)
	return append(append(append(all, first...), changes...), last...)
}

// diffAll compares every frontend.
func diffAll(have, want map[Frontend]*Row, prune bool) layer.Changes {
	var changes layer.Changes
	for frontend, row := range want {
		switch old, ok := have[frontend]; {
		case !ok:
			changes = append(changes, layer.Change{Op: layer.Add, Subject: row})
		case !prune && old.Entry != AtHostPort && row.closes(old):
			// What leads to its endpoints may be among what could not be read.
		case old.differs(row):
			changes = append(changes, layer.Change{Op: layer.Alter, Subject: row})
		}
	}
	for frontend, row := range have {
		if _, ok := want[frontend]; !ok && (prune || row.Entry == AtHostPort) {
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: row})
		}
	}
	return changes
}

// diffPlans is diffAll with prune for a picture in force that agrees with an
// earlier plan: it looks only at Services whose plan is another. It gives up
// where an address goes from one Service to another.
func diffPlans(have, want *Picture) (changes layer.Changes, ok bool) {
	rows := have.index()
	stay := map[Frontend]bool{}
	var gone []*Row
	for before, after := range changedPlans(have.agrees.plans, want.plans) {
		if before != nil {
			gone = append(gone, before.rows...)
		}
		if after == nil {
			continue
		}
		for _, row := range after.rows {
			old := rows[row.Frontend]
			if stay[row.Frontend] || old != nil && old.Service != row.Service {
				return nil, false
			}
			stay[row.Frontend] = true
			if old == nil {
				changes = append(changes, layer.Change{Op: layer.Add, Subject: row})
			} else if old.differs(row) {
				changes = append(changes, layer.Change{Op: layer.Alter, Subject: row})
			}
		}
	}
	for _, row := range gone {
		old := rows[row.Frontend]
		if old == nil || old.Service != row.Service {
			return nil, false // it was not this Service that held the address
		}
		if !stay[row.Frontend] {
			stay[row.Frontend] = true
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: old})
		}
	}
	return changes, true
}

// changedPlans pairs the plans of two pictures by the Services' names and yields
// the pairs that differ; one of a pair may be nil.
func changedPlans(before, after []*plan) iter.Seq2[*plan, *plan] {
	return func(yield func(*plan, *plan) bool) {
		for len(before) > 0 || len(after) > 0 {
			order := 0
			switch {
			case len(before) == 0:
				order = 1
			case len(after) == 0:
				order = -1
			case before[0] != after[0]:
				order = before[0].service.Name.Compare(after[0].service.Name)
			}
			var old, now *plan
			if order <= 0 {
				old, before = before[0], before[1:]
			}
			if order >= 0 {
				now, after = after[0], after[1:]
			}
			if old != now && !yield(old, now) {
				return
			}
		}
	}
}

// differs says whether the kernel has to be told of other. Rows that were read from
// the kernel are of no known entry.
func (r *Row) differs(other *Row) bool {
	if r.torn || r == other {
		return r.torn
	}
	return r.Path != other.Path || r.Entry != "" && r.Entry != other.Entry ||
		!slices.Equal(r.Backends, other.Backends) || r.Drops != other.Drops ||
		!r.Outside.same(other.Outside) || r.Masquerade != other.Masquerade ||
		r.Affinity != other.Affinity || r.rangesDiffer(other)
}

// rangesDiffer tells nobody from everybody: nil ranges are all clients.
func (r *Row) rangesDiffer(other *Row) bool {
	return (r.SourceRanges == nil) != (other.SourceRanges == nil) || !slices.Equal(r.SourceRanges, other.SourceRanges)
}

func (o *Outside) same(p *Outside) bool {
	if o == nil || p == nil {
		return o == p
	}
	return o.Drops == p.Drops && slices.Equal(o.Backends, p.Backends)
}

// closes says whether clients that old leads somewhere would be led nowhere.
func (r *Row) closes(old *Row) bool {
	closed := func(now, before []netip.AddrPort) bool { return len(now) == 0 && len(before) > 0 }
	return closed(r.Backends, old.Backends) || closed(r.forOutside(), old.forOutside())
}

// forOutside is where clients outside the cluster are led.
func (r *Row) forOutside() []netip.AddrPort {
	if r.Outside == nil {
		return r.Backends
	}
	return r.Outside.Backends
}
