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
	tabled := hostsBelow(settings.Zone, snapshot.DNS)
	for _, name := range tabled {
		picture.add(leftTo(name))
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
	for _, name := range tabled {
		picture.add(leftTo(serviceAbove(name)))
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
	for _, name := range dns.Hosts {
		if below, inside := strings.CutSuffix(name, "."+zone); inside && !canBeLeft(below) {
			return fmt.Sprintf("hosts in the Corefile has %s, and below %s a name can be left alone only if it is one of a Service", name, zone)
		}
	}
	return ""
}

// canBeLeft says whether a name below the zone can be in the table of names as one that others
// answer, or is theirs anyway: of other names than Services' the program knows, without
// looking, that they do not exist (names.bpf.c, absent).
func canBeLeft(below string) bool {
	labels := strings.Split(below, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_'
		}) {
			return false
		}
	}
	switch last := labels[len(labels)-1]; last {
	case "svc":
		return len(labels) <= 5
	case "pod", "dns":
		return true
	}
	return false
}

// hostsBelow are the names of Services, and below these, that the DNS servers have in a table
// of their own.
func hostsBelow(zone string, dns *model.DNS) (names []string) {
	if dns == nil {
		return nil
	}
	for _, name := range dns.Hosts {
		below, inside := strings.CutSuffix(name, "."+zone)
		if inside && strings.HasSuffix(below, ".svc") && strings.Count(below, ".") >= 2 {
			names = append(names, below)
		}
	}
	return names
}

// serviceAbove is the name of the Service that a name is, or is below: without it the program
// does not look for the name.
func serviceAbove(name string) string {
	labels := strings.Split(name, ".")
	return strings.Join(labels[len(labels)-3:], ".")
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
