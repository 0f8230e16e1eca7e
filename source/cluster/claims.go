package cluster

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/model"
)

// claims are the objects of one kind that say an address is theirs, the oldest
// first, by address.
type claims map[netip.Addr][]*Object

func (c claims) add(o *Object) {
	for _, addr := range o.addresses() {
		i, _ := slices.BinarySearchFunc(c[addr], o, (*Object).older)
		c[addr] = slices.Insert(c[addr], i, o)
	}
}

func (c claims) remove(o *Object) {
	for _, addr := range o.addresses() {
		c[addr] = slices.DeleteFunc(c[addr], func(p *Object) bool { return p == o })
		if len(c[addr]) == 0 {
			delete(c, addr)
		}
	}
}

// rivals calls f for each object that claims an address of o.
func (c claims) rivals(o *Object, f func(*Object)) {
	for _, addr := range o.addresses() {
		for _, p := range c[addr] {
			f(p)
		}
	}
}

// lost are the addresses of o that an older object has, as Problems.
func (c claims) lost(o *Object) []model.Problem {
	var problems []model.Problem
	for _, addr := range o.addresses() {
		if owner := c[addr][0]; owner != o {
			problems = append(problems, model.Problem{
				Where: o.Where, Object: o.Key.String(), Field: o.addressField(),
				Text: fmt.Sprintf("%s belongs to %s (%s): give one of them another address; until then %s is left out", addr, owner.Key, owner.Where, o.Key),
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
	if o.Kind == "Service" {
		return "spec.clusterIP"
	}
	return "status.podIPs"
}
