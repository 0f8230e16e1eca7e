package service

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Frontend is an address on which a Service answers.
type Frontend struct {
	Address  netip.AddrPort `json:"address"`
	Protocol model.Protocol `json:"protocol"`
}

// String is "10.96.0.10:53/udp".
func (f Frontend) String() string { return f.Address.String() + "/" + f.Protocol.String() }

// compare orders frontends by address, port and protocol.
func (f Frontend) compare(o Frontend) int {
	if c := f.Address.Compare(o.Address); c != 0 {
		return c
	}
	return int(f.Protocol) - int(o.Protocol)
}

// Entry is the kind of address by which a client comes to a Service.
type Entry string

// The kinds of entries.
const (
	AtClusterIP    Entry = "cluster-ip"
	AtNodePort     Entry = "node-port" // the frontend's address is unspecified: any of the node's
	AtExternalIP   Entry = "external-ip"
	AtLoadBalancer Entry = "load-balancer"
	AtHostPort     Entry = "host-port" // of a pod, not of a Service
)

// rank says who is served where two have one address: nobody takes a ClusterIP away with an
// external address (CVE-2020-8554), and no pod's port is one of a Service's.
func (e Entry) rank() int {
	switch e {
	case AtClusterIP:
		return 2
	case AtHostPort:
		return 0
	}
	return 1
}

// Outside is where an entry leads those who come from outside the cluster.
type Outside struct {
	// Backends are sorted, and no two are equal.
	Backends []netip.AddrPort `json:"backends"`
	// Drops says that without a backend flows are dropped and not refused: the
	// Service has endpoints, but none on this node, and only those count.
	Drops bool `json:"drops,omitempty"`
}

// Row is one frontend and where it leads: the Subject of this layer's changes.
// A Row is immutable.
type Row struct {
	Frontend
	Entry Entry `json:"entry,omitempty"`
	// Service and Port say whose it is; empty when read from the kernel, which
	// knows no names.
	Service model.Name `json:"service"`
	Port    string     `json:"port,omitempty"`
	// Pod is whose it is where that is no Service.
	Pod *model.Name `json:"pod,omitempty"`
	// Path is what the Service asks for; empty where the setting decides.
	Path Path `json:"path,omitempty"`
	// Backends are where clients inside the cluster are led, the nodes' processes
	// and their pods. They are sorted, and no two are equal.
	Backends []netip.AddrPort `json:"backends"`
	// Drops is Outside.Drops for those inside.
	Drops bool `json:"drops,omitempty"`
	// Outside is nil where it makes no difference where a client comes from.
	Outside *Outside `json:"outside,omitempty"`
	// Masquerade says that clients outside come to the endpoint from the node's
	// address.
	Masquerade bool `json:"masquerade,omitempty"`
	// Affinity is for how many seconds a client stays with its endpoint; 0 for none.
	Affinity uint32 `json:"affinity_seconds,omitempty"`
	// SourceRanges are the clients that are let in, sorted; nil for all.
	SourceRanges []netip.Prefix `json:"source_ranges,omitempty"`
	// torn: read from the kernel, where a writer died in the middle of it.
	torn bool
}

// Owner says whose the row is: "shop/web" of a Service, "hostPort of pod shop/web"; empty
// where that is not known.
func (r *Row) Owner() string {
	switch {
	case r.Pod != nil:
		return "hostPort of pod " + r.Pod.String()
	case r.Entry == AtHostPort:
		return "hostPort"
	case r.Service.Name != "":
		return r.Service.String()
	}
	return ""
}

// backendCount is how many slots the row takes.
func (r *Row) backendCount() int {
	if r.Outside == nil {
		return len(r.Backends)
	}
	return len(r.Backends) + len(r.Outside.Backends)
}

// Object implements layer.Subject.
func (r *Row) Object() string {
	if r.Entry == AtHostPort {
		return "hostPort " + r.Frontend.String()
	}
	return "service " + r.Frontend.String()
}

// Detail implements layer.Subject. A Service without backends refuses.
func (r *Row) Detail() string {
	text := "-> " + r.Leads()
	if r.Pod != nil {
		text += ", pod " + r.Pod.String()
	}
	if r.Outside != nil {
		text += ", from outside the cluster " + leads(r.Outside.Backends, r.Outside.Drops)
	}
	if r.SourceRanges != nil {
		text += fmt.Sprintf(" for %s alone", listed(r.SourceRanges, "nobody"))
	}
	if r.Affinity > 0 {
		text += fmt.Sprintf(", the same for a client for %d s", r.Affinity)
	}
	if r.Path != "" {
		text += " by " + string(r.Path)
	}
	return text
}

// Leads says where the frontend leads clients inside the cluster: its first
// backends, and how many more.
func (r *Row) Leads() string { return leads(r.Backends, r.Drops) }

func leads(backends []netip.AddrPort, drops bool) string {
	if drops {
		return "dropped, no endpoint on this node serves"
	}
	return listed(backends, "refused, no endpoint serves")
}

// listed is the first of a list, and how many more, or what none means.
func listed[T fmt.Stringer](all []T, none string) string {
	if len(all) == 0 {
		return none
	}
	const shown = 8
	names := make([]string, 0, shown)
	for i, one := range all {
		if i == shown {
			names = append(names, fmt.Sprintf("and %d more", len(all)-shown))
			break
		}
		names = append(names, one.String())
	}
	return strings.Join(names, ", ")
}

// Picture is the layer's state: planned, which lists the Services' plans, or in
// force, which knows each frontend's row.
type Picture struct {
	// plans are in the order of the Services' names, that of the hostPorts before all; nil
	// in a picture in force.
	plans []*plan
	// whole says of a plan that the cluster was seen whole: what is not in it is
	// gone.
	whole bool
	index func() map[Frontend]*Row
	// paths is what a plan says of the packet path; a picture in force has those
	// of the plan that was applied last.
	paths paths
	// veths are the node's devices and asks the namespaces that ask for a path,
	// in a picture in force.
	veths []veth
	asks  []*wish
	// nodeAddresses are those that have node ports, in a picture in force.
	nodeAddresses []netip.Addr
	// clients are the namespaces that the programs know, and found those that there
	// are; node is the cookie of the node's own. In a picture in force.
	clients, found []knownClient
	node           uint64
	// tracking is what there is of connection tracking, in a picture in force.
	tracking tracking
	// lost are the programs and pins that somebody else took away.
	lost []lost
	// agrees is the plan that a picture in force holds exactly, if that is known.
	agrees *Picture
}

// plan is one Service and its rows, or all hostPorts, whose Service has no name. Plans are
// compared by pointer: a Service that did not change keeps its plan.
type plan struct {
	service *model.Service
	demands demands
	rows    []*Row
}

// inForce is a picture of what the kernel holds.
func inForce(rows map[Frontend]*Row) *Picture {
	return &Picture{index: func() map[Frontend]*Row { return rows }}
}

// wanted is a picture of what the kernel should hold. Its index is made when it
// is asked for: a change costs what changed.
func wanted(plans []*plan) *Picture {
	return &Picture{plans: plans, index: indexOf(plans)}
}

func indexOf(plans []*plan) func() map[Frontend]*Row {
	return sync.OnceValue(func() map[Frontend]*Row {
		rows := make(map[Frontend]*Row, 2*len(plans))
		for _, plan := range plans {
			for _, row := range plan.rows {
				// Two Services with one address: the first by name is served.
				if old, taken := rows[row.Frontend]; !taken || old.Entry.rank() < row.Entry.rank() {
					rows[row.Frontend] = row
				}
			}
		}
		return rows
	})
}

// agree notes that a picture in force holds a plan exactly, if it does. Unless it
// agreed with one before, its rows may be without names: those of the plan have
// them.
func (p *Picture) agree(want *Picture, named bool) {
	planned := 0
	for _, plan := range want.plans {
		planned += len(plan.rows)
	}
	rows := p.index()
	if len(rows) != planned {
		return // something was held back, or two Services share an address
	}
	if !named {
		maps.Copy(rows, want.index())
	}
	p.agrees = want
	want.index = indexOf(want.plans) // what is in force has one, and two are not needed
}

// namePorts gives the rows of hostPorts that were read from the kernel their names, so that
// it is known whose they are when their pod ends.
func (p *Picture) namePorts(want *Picture) {
	rows := p.index()
	for _, plan := range want.plans {
		if plan.service.Name.Name != "" {
			return // hostPorts are before all
		}
		for _, row := range plan.rows {
			old := rows[row.Frontend]
			if old != nil && old.Entry == "" && !old.differs(row) && want.index()[row.Frontend] == row {
				rows[row.Frontend] = row
			}
		}
	}
}

// lost is the Subject of what has to be attached or pinned again: "program
// connect4", "pin services".
type lost string

// Object implements layer.Subject.
func (l lost) Object() string { return string(l) }

// Detail implements layer.Subject.
func (l lost) Detail() string { return "(was taken away)" }

// Subjects implements layer.Picture: each is a *Row.
func (p *Picture) Subjects() []layer.Subject {
	rows := slices.SortedFunc(maps.Values(p.index()), func(a, b *Row) int { return a.compare(b.Frontend) })
	subjects := make([]layer.Subject, len(rows))
	for i, row := range rows {
		subjects[i] = row
	}
	return subjects
}

// Len implements layer.Picture.
func (p *Picture) Len() int { return len(p.index()) }
