package cluster

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/model"
)

// claims are the objects of one kind that say something is theirs which only one
// can have: an address, a node port.
type claims[K comparable] struct {
	// by is what an object claims.
	by func(*Object) []K
	// owners are the oldest that claim something.
	owners index[K]
	// contested are all that claim something, the oldest first, where they are
	// several.
	contested map[K][]*Object
}

// newClaims makes claims of what by names; has says whether it names one.
func newClaims[K comparable](by func(*Object) []K, has func(*Object, K) bool) claims[K] {
	return claims[K]{by: by, owners: newIndex(has), contested: map[K][]*Object{}}
}

// addressClaims are claims of addresses, as 16 bytes because those have no
// pointers and are looked up faster.
func addressClaims() claims[[16]byte] {
	by := func(o *Object) [][16]byte {
		var all [][16]byte
		for _, a := range o.addresses() {
			all = append(all, a.As16())
		}
		return all
	}
	return newClaims(by, func(o *Object, k [16]byte) bool {
		return slices.ContainsFunc(o.addresses(), func(a netip.Addr) bool { return a.As16() == k })
	})
}

// nodePort is a port that a Service has on every node.
type nodePort struct {
	port     uint16
	protocol model.Protocol
}

func nodePortClaims() claims[nodePort] {
	return newClaims((*Object).nodePorts, func(o *Object, k nodePort) bool { return slices.Contains(o.nodePorts(), k) })
}

func (c *claims[K]) add(o *Object) {
	for _, k := range c.by(o) {
		list := c.of(k)
		i, _ := slices.BinarySearchFunc(list, o, (*Object).older)
		c.set(k, slices.Insert(list, i, o))
	}
}

func (c *claims[K]) remove(o *Object) {
	for _, k := range c.by(o) {
		c.set(k, slices.DeleteFunc(c.of(k), func(p *Object) bool { return p == o }))
	}
}

// of are all that claim k, the oldest first.
func (c *claims[K]) of(k K) []*Object {
	if list := c.contested[k]; list != nil {
		return list
	}
	if owner := c.owners.get(k); owner != nil {
		return []*Object{owner}
	}
	return nil
}

func (c *claims[K]) set(k K, list []*Object) {
	if len(list) > 1 {
		c.contested[k] = list
	} else {
		delete(c.contested, k)
	}
	if len(list) > 0 {
		c.owners.set(k, list[0])
	} else {
		c.owners.delete(k)
	}
}

// rivals calls f for each object that claims what o claims.
func (c *claims[K]) rivals(o *Object, f func(*Object)) {
	for _, k := range c.by(o) {
		for _, p := range c.of(k) {
			f(p)
		}
	}
}

// lost calls f with whatever of o's claims an older object has.
func (c *claims[K]) lost(o *Object, f func(k K, owner *Object)) {
	for _, k := range c.by(o) {
		if owner := c.owners.get(k); owner != o {
			f(k, owner)
		}
	}
}

// lostAddresses are the addresses of o that an older object has, as Problems.
func lostAddresses(c *claims[[16]byte], o *Object) []model.Problem {
	var problems []model.Problem
	c.lost(o, func(k [16]byte, owner *Object) {
		problems = append(problems, model.Problem{
			Where: o.Where(), Object: o.Key().String(), Field: o.addressField(),
			Text: fmt.Sprintf("%s belongs to %s (%s): give one of them another address; until then %s is left out", netip.AddrFrom16(k).Unmap(), owner.Key(), owner.Where(), o.Key()),
		})
	})
	return problems
}

// addresses are those that no other object of o's kind may have. Pods in the
// network of their node share its addresses.
func (o *Object) addresses() []netip.Addr {
	switch v := o.value.(type) {
	case *model.Service:
		return v.ClusterIPs
	case *model.Pod:
		if !v.HostNetwork {
			return v.Addresses
		}
	}
	return nil
}

func (o *Object) addressField() string {
	if o.kind == kindService {
		return "spec.clusterIP"
	}
	return "status.podIPs"
}

// nodePorts are those that no other Service may have.
func (o *Object) nodePorts() []nodePort {
	s, ok := o.value.(*model.Service)
	if !ok {
		return nil
	}
	var all []nodePort
	for i := range s.Ports {
		if p := &s.Ports[i]; p.NodePort != 0 {
			all = append(all, nodePort{p.NodePort, p.Protocol})
		}
	}
	return all
}

// withoutLost takes the node ports from s, a copy of what o says, that an older
// Service has. The rest of s is served.
func (c *Cluster) withoutLost(o *Object, s *model.Service) []model.Problem {
	var problems []model.Problem
	c.nodePorts.lost(o, func(k nodePort, owner *Object) {
		for i := range s.Ports {
			if p := &s.Ports[i]; p.NodePort == k.port && p.Protocol == k.protocol {
				p.NodePort = 0
			}
		}
		problems = append(problems, model.Problem{
			Where: o.Where(), Object: o.Key().String(), Field: "spec.ports",
			Text: fmt.Sprintf("node port %d/%s belongs to %s (%s): give one of them another; until then it does not lead to %s", k.port, k.protocol, owner.Key(), owner.Where(), o.Key()),
		})
	})
	return problems
}
