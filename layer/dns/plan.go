package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// planner turns Snapshots into pictures. It remembers the rows of the last one: a
// Service that is the same value, and so unchanged, keeps its rows. What it answers
// depends on the Snapshot alone.
type planner struct{ last map[*model.Service][]*Row }

func (p *planner) plan(settings Settings, snapshot *model.Snapshot) *Picture {
	picture := newPicture(settings.Zone)
	picture.ports, picture.serial, picture.ttl = true, uint32(snapshot.Number), lifetime(settings.ttl())
	if snapshot.DNS != nil {
		picture.ttl = lifetime(snapshot.DNS.TTL / time.Second)
	}
	if picture.left = leftWhole(settings.Zone, snapshot.DNS); picture.left != "" {
		p.last = nil
		for _, s := range snapshot.Services {
			if s.Name == settings.service() {
				picture.addResolvers(s)
			}
		}
		return picture
	}
	next := make(map[*model.Service][]*Row, len(snapshot.Services))
	there := make(map[model.Name]bool, len(snapshot.Services))
	for _, s := range snapshot.Services {
		rows, known := p.last[s]
		if !known {
			rows = rowsOf(s)
		}
		next[s], there[s.Name] = rows, true
		picture.add(rows...)
		if s.Name == settings.service() {
			picture.addResolvers(s)
		}
	}
	p.last = next
	for _, name := range snapshot.Strangers() {
		if !there[name] {
			picture.add(leftTo(serviceName(name)))
		}
	}
	picture.whole = snapshot.HasAllNames()
	picture.cut(settings.names)
	return picture
}

// leftWhole is why the zone is to be left to the DNS servers; "" if it is not, also where
// nobody knows how they are configured.
func leftWhole(zone string, dns *model.DNS) string {
	switch {
	case dns == nil:
		return ""
	case dns.Left != "":
		return dns.Left
	case dns.Zone != zone:
		return fmt.Sprintf("they serve %s: say --dns %s", dns.Zone, dns.Zone)
	}
	return ""
}

// serviceName is a Service's name below the zone.
func serviceName(n model.Name) string { return n.Name + "." + n.Namespace + ".svc" }

// rowsOf are the names of a Service, as CoreDNS' kubernetes plugin gives them
// (https://github.com/kubernetes/dns/blob/master/docs/specification.md). One that has
// none, like a headless one without endpoints, does not exist.
func rowsOf(s *model.Service) []*Row {
	name := serviceName(s.Name)
	if strings.Contains(s.Name.Name, ".") {
		return nil // no query can ask for it
	}
	if s.Headless && s.Type != model.ExternalName {
		if s.More {
			return []*Row{leftTo(name)}
		}
		return headlessRows(name, s.Endpoints)
	}
	if s.Type == model.ExternalName || len(s.ClusterIPs) == 0 || len(s.Ports) == 0 {
		return []*Row{leftTo(name)}
	}
	return []*Row{newRow(name, s.ClusterIPs)}
}

// headlessRows are the name of the Service, which has all endpoints that are ready, and
// one for each host name, or address, of an endpoint.
func headlessRows(name string, endpoints []model.Endpoint) []*Row {
	of := map[string][]netip.Addr{}
	for _, e := range endpoints {
		if !e.Ready {
			continue
		}
		below := e.Label() + "." + name
		of[name] = append(of[name], e.Address)
		of[below] = append(of[below], e.Address)
	}
	rows := make([]*Row, 0, len(of))
	for name, addresses := range of {
		rows = append(rows, newRow(name, addresses))
	}
	return rows
}

// addResolvers adds the addresses at which a Service serves DNS over UDP, and says whether
// anybody is behind them.
func (p *Picture) addResolvers(s *model.Service) {
	for _, port := range s.Ports {
		if port.Protocol != model.UDP || port.Port != 53 {
			continue
		}
		for _, addr := range s.ClusterIPs {
			p.resolvers[addr] = true
		}
		p.served = p.served || port.HasEndpoint()
	}
}

// diff says what leads from have to want: what was lost, names, resolvers, devices, search lists.
func diff(have, want *Picture, prune bool) layer.Changes {
	var changes layer.Changes
	for _, what := range have.lost {
		changes = append(changes, layer.Change{Op: layer.Add, Subject: what})
	}
	changes = append(changes, diffNames(have, want, prune)...)
	for _, addr := range sortedAddresses(want.resolvers) {
		if !have.resolvers[addr] {
			changes = append(changes, layer.Change{Op: layer.Add, Subject: resolver(addr)})
		}
	}
	for _, addr := range sortedAddresses(have.resolvers) {
		if !want.resolvers[addr] && prune {
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: resolver(addr)})
		}
	}
	if have.ttl != lifetimeUnknown && want.ttl != lifetimeUnknown && have.ttl != want.ttl {
		changes = append(changes, layer.Change{Op: layer.Alter, Subject: want.ttl})
	}
	for _, d := range have.devices {
		switch {
		case want.ports && d.pod && !d.attached:
			changes = append(changes, layer.Change{Op: layer.Add, Subject: d})
		case d.attached && !d.pod:
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: d})
		}
	}
	return append(changes, diffSearches(have, want, prune)...)
}

// diffNames leaves a name to others that may be gone, where nobody knows: what it leads to
// may be somebody else's by now.
func diffNames(have, want *Picture, prune bool) layer.Changes {
	var changes layer.Changes
	for name, row := range want.names {
		switch old := have.names[name]; {
		case old == nil:
			changes = append(changes, layer.Change{Op: layer.Add, Subject: row})
		case old != row && !old.equal(row):
			changes = append(changes, layer.Change{Op: layer.Alter, Subject: row})
		}
	}
	for name, row := range have.names {
		switch {
		case want.names[name] != nil:
		case prune:
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: row})
		case !row.Left:
			changes = append(changes, layer.Change{Op: layer.Alter, Subject: &Row{Name: name, Left: true, zone: row.zone}})
		}
	}
	slices.SortFunc(changes, func(a, b layer.Change) int {
		return strings.Compare(a.Subject.(*Row).Name, b.Subject.(*Row).Name)
	})
	return changes
}
