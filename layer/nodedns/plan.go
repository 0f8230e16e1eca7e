package nodedns

import (
	"net/netip"
	"slices"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// dnsPort is where DNS is served (RFC 1035, 4.2.1).
const dnsPort = 53

// Picture is the state of the layer. It implements layer.Picture.
type Picture struct {
	// detours are by their family: an address of the DNS Service at most for each.
	detours map[datapathFamily]detour
	lost    []lost
}

func newPicture() *Picture { return &Picture{detours: map[datapathFamily]detour{}} }

// detour is the address of the DNS Service of which queries are sent to the agent. It
// implements layer.Subject.
type detour netip.Addr

// Object implements layer.Subject.
func (d detour) Object() string { return "queries of the node for " + netip.Addr(d).String() }

// Detail implements layer.Subject.
func (d detour) Detail() string { return "-> the agent, while it serves" }

// MarshalText gives the address.
func (d detour) MarshalText() ([]byte, error) { return netip.Addr(d).MarshalText() }

func (d detour) family() datapathFamily { return familyOf(netip.Addr(d)) }

func familyOf(addr netip.Addr) datapathFamily {
	if addr.Is4() {
		return datapathFamilyFAMILY_IP4
	}
	return datapathFamilyFAMILY_IP6
}

// lost is something that was taken away. It implements layer.Subject.
type lost string

// Object implements layer.Subject.
func (l lost) Object() string { return string(l) }

// Detail implements layer.Subject.
func (l lost) Detail() string { return "" }

// Len implements layer.Picture.
func (p *Picture) Len() int { return len(p.detours) }

// Subjects implements layer.Picture: IPv4 before IPv6.
func (p *Picture) Subjects() (all []layer.Subject) {
	for family := range datapathFamilyFAMILY_COUNT {
		if d, there := p.detours[family]; there {
			all = append(all, d)
		}
	}
	return all
}

// plan finds the addresses at which the DNS Service is asked over UDP: of each family one,
// so that what comes from the agent's socket of that family stands for it alone.
func plan(settings Settings, snapshot *model.Snapshot) *Picture {
	picture := newPicture()
	for _, s := range snapshot.Services {
		if s.Name != settings.service() || !slices.ContainsFunc(s.Ports, func(p model.ServicePort) bool { return p.Protocol == model.UDP && p.Port == dnsPort }) {
			continue
		}
		for _, addr := range s.ClusterIPs {
			if _, twice := picture.detours[familyOf(addr)]; !twice {
				picture.detours[familyOf(addr)] = detour(addr)
			}
		}
	}
	return picture
}

// diff says what leads from have to want: what was lost, then addresses.
func diff(have, want *Picture, prune bool) layer.Changes {
	var changes layer.Changes
	for _, what := range have.lost {
		changes = append(changes, layer.Change{Op: layer.Add, Subject: what})
	}
	for family := range datapathFamilyFAMILY_COUNT {
		is, there := have.detours[family]
		wish, wanted := want.detours[family]
		switch {
		case wanted && !there:
			changes = append(changes, layer.Change{Op: layer.Add, Subject: wish})
		case wanted && is != wish:
			changes = append(changes, layer.Change{Op: layer.Alter, Subject: wish})
		case there && !wanted && prune:
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: is})
		}
	}
	return changes
}
