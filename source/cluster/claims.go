package cluster

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/model"
)

// claims are the objects of one kind that say an address is theirs.
type claims struct {
	// owners are the oldest that claim an address, which is looked up as 16 bytes
	// because that has no pointers.
	owners index[[16]byte]
	// contested are all that claim an address, the oldest first, where they are
	// several.
	contested map[netip.Addr][]*Object
}

func newClaims() claims {
	return claims{
		owners: newIndex(func(o *Object, k [16]byte) bool {
			return slices.ContainsFunc(o.addresses(), func(a netip.Addr) bool { return a.As16() == k })
		}),
		contested: map[netip.Addr][]*Object{},
	}
}

func (c *claims) add(o *Object) {
	for _, addr := range o.addresses() {
		list := c.of(addr)
		i, _ := slices.BinarySearchFunc(list, o, (*Object).older)
		c.set(addr, slices.Insert(list, i, o))
	}
}

func (c *claims) remove(o *Object) {
	for _, addr := range o.addresses() {
		c.set(addr, slices.DeleteFunc(c.of(addr), func(p *Object) bool { return p == o }))
	}
}

// of are all that claim an address, the oldest first.
func (c *claims) of(addr netip.Addr) []*Object {
	if list := c.contested[addr]; list != nil {
		return list
	}
	if owner := c.owners.get(addr.As16()); owner != nil {
		return []*Object{owner}
	}
	return nil
}

func (c *claims) set(addr netip.Addr, list []*Object) {
	if len(list) > 1 {
		c.contested[addr] = list
	} else {
		delete(c.contested, addr)
	}
	if len(list) > 0 {
		c.owners.set(addr.As16(), list[0])
	} else {
		c.owners.delete(addr.As16())
	}
}

// rivals calls f for each object that claims an address of o.
func (c *claims) rivals(o *Object, f func(*Object)) {
	for _, addr := range o.addresses() {
		for _, p := range c.of(addr) {
			f(p)
		}
	}
}

// lost are the addresses of o that an older object has, as Problems.
func (c *claims) lost(o *Object) []model.Problem {
	var problems []model.Problem
	for _, addr := range o.addresses() {
		if owner := c.owners.get(addr.As16()); owner != o {
			problems = append(problems, model.Problem{
				Where: o.Where(), Object: o.Key().String(), Field: o.addressField(),
				Text: fmt.Sprintf("%s belongs to %s (%s): give one of them another address; until then %s is left out", addr, owner.Key(), owner.Where(), o.Key()),
			})
		}
	}
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
