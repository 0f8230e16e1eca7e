package cluster

import (
	"slices"

	"github.com/millrace/millrace/model"
)

// maxNames bounds what names remembers. Clusters have fewer nodes, namespaces
// and labels, and whatever is forgotten is merely no longer shared.
const maxNames = 10_000

// names are strings that many objects have, so that each is in memory once.
type names map[string]string

// one replaces s by the same string that was there before.
func (n names) one(s *string) {
	if *s == "" {
		return
	}
	if known, ok := n[*s]; ok {
		*s = known
		return
	}
	if len(n) >= maxNames {
		clear(n)
	}
	n[*s] = *s
}

// object shares what is in o, which nobody else may have seen yet. Names of objects
// themselves and what is made of them (pods, selectors) are as many as there are
// objects and are not looked up.
func (n names) object(o *Object) {
	n.one(&o.name.Namespace)
	switch v := o.value.(type) {
	case *model.Service:
		n.service(v)
	case *slice:
		n.slice(v)
	case *model.Pod:
		n.pod(v)
	case *model.Node:
		n.labels(v.Labels)
	case *model.Workload:
		n.one(&v.Name.Namespace)
		n.pod(&v.Template)
	}
}

func (n names) service(s *model.Service) {
	n.one(&s.Name.Namespace)
	for i := range s.Ports {
		n.one(&s.Ports[i].Name)
		n.one(&s.Ports[i].TargetName)
	}
	n.keys(s.Annotations)
	n.keys(s.Selector)
	for key, value := range s.Selector {
		if value == s.Name.Name {
			s.Selector[key] = s.Name.Name
		}
	}
}

func (n names) slice(s *slice) {
	for i := range s.ports {
		n.one(&s.ports[i].name)
	}
	for i := range s.endpoints {
		b := &s.endpoints[i]
		n.one(&b.Node)
		n.one(&b.Zone)
		n.one(&b.Pod.Namespace)
	}
}

func (n names) pod(p *model.Pod) {
	n.one(&p.Name.Namespace)
	n.one(&p.Node)
	for i := range p.Ports {
		n.one(&p.Ports[i].Name)
	}
	n.keys(p.Annotations)
	n.labels(p.Labels)
}

// keys shares the keys of a map. Storing under a key that is there replaces the
// string of the key too.
func (n names) keys(m map[string]string) {
	for key, value := range m {
		n.one(&key)
		m[key] = value
	}
}

// labels shares keys and values.
func (n names) labels(m map[string]string) {
	for key, value := range m {
		n.one(&key)
		n.one(&value)
		m[key] = value
	}
}

// shareEndpoints lets the slices of a Service use its endpoints instead of their
// own, where they are the same and stand together in it: always where a port has
// one slice, or one of each family.
func shareEndpoints(svc *model.Service, from []*Object) {
	for _, o := range from {
		s := o.value.(*slice)
		s.service = svc.Name.Name
		if len(s.ports) == 0 || len(s.endpoints) == 0 {
			continue
		}
		for i := range svc.Ports {
			if s.ports[0].leadsTo(&svc.Ports[i]) {
				s.endpoints = within(svc.Ports[i].Backends, s.endpoints)
			}
		}
	}
}

// within is the part of all that equals part, or part itself if there is none.
// Both are sorted.
func within(all, part []model.Backend) []model.Backend {
	i, _ := slices.BinarySearchFunc(all, part[0], compareBackends)
	if end := i + len(part); end <= len(all) && slices.Equal(all[i:end], part) {
		return all[i:end:end]
	}
	return part
}
