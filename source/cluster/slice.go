package cluster

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/millrace/millrace/model"
)

// slice is an EndpointSlice.
type slice struct {
	// service is the name of the Service, which is in the same namespace.
	service string
	ports   []slicePort
	// endpoints are sorted, no two with the same address, and have the number of
	// the first port. They may be a part of those of the Service that was shown last.
	endpoints []model.Backend
	// hostnames are those of endpoints that have one; nil where none has.
	hostnames map[netip.Addr]string
	// more says that there are host names or further addresses, which DNS alone knows.
	more bool
	// next and previous are other slices of the Service in force.
	next, previous *Object
}

type slicePort struct {
	name     string
	protocol model.Protocol
	port     uint16
}

// slice reads an EndpointSlice, nil for one of another proxy's Service. Of one of host
// names is kept that there are some: those are for DNS, no packet can be sent to them.
func (r *reader) slice(obj *discoveryv1.EndpointSlice) *slice {
	if _, ok := obj.Labels[serviceProxyName]; ok {
		return nil
	}
	switch obj.AddressType {
	case discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6:
	case discoveryv1.AddressTypeFQDN:
		if service := obj.Labels[discoveryv1.LabelServiceName]; service != "" && len(obj.Endpoints) > 0 {
			return &slice{service: service, more: true}
		}
		return nil
	default:
		r.fault("addressType", "unknown address type %q: use IPv4, IPv6 or FQDN", clip(string(obj.AddressType)))
		return nil
	}
	service := obj.Labels[discoveryv1.LabelServiceName]
	if service == "" {
		r.fault("metadata.labels", "the slice names no Service: add the label %s", discoveryv1.LabelServiceName)
		return nil
	}
	s := &slice{service: service}
	_, r.object.headless = obj.Labels[corev1.IsHeadlessService]
	for i := range obj.Ports {
		r.slicePort(s, fmt.Sprintf("ports[%d]", i), &obj.Ports[i])
	}
	var number uint16
	if len(s.ports) > 0 {
		number = s.ports[0].port
	}
	s.endpoints = make([]model.Backend, 0, len(obj.Endpoints))
	for i := range obj.Endpoints {
		r.endpoint(s, number, i, &obj.Endpoints[i], obj.AddressType)
	}
	s.endpoints = slices.Clip(sorted(s.endpoints))
	if len(s.endpoints) == 0 {
		s.endpoints = nil
	}
	return s
}

// serviceOf is the Service that an EndpointSlice in force belongs to.
func serviceOf(o *Object) model.Name {
	return model.Name{Namespace: o.name.Namespace, Name: o.value.(*slice).service}
}

// slicePort reads one port. A port without a number means every port, which no
// Service port leads to.
func (r *reader) slicePort(s *slice, field string, from *discoveryv1.EndpointPort) {
	if from.Port == nil {
		return
	}
	var p slicePort
	var okProtocol, okPort bool
	if from.Name != nil {
		p.name = *from.Name
	}
	protocol := corev1.ProtocolTCP
	if from.Protocol != nil {
		protocol = *from.Protocol
	}
	p.protocol, okProtocol = r.protocol(field+".protocol", string(protocol))
	p.port, okPort = r.port(field+".port", *from.Port)
	if okProtocol && okPort {
		s.ports = append(s.ports, p)
	}
}

// endpoint reads one endpoint. Its addresses are interchangeable and the API
// lets a reader use the first alone.
func (r *reader) endpoint(s *slice, number uint16, i int, from *discoveryv1.Endpoint, family discoveryv1.AddressType) {
	field := fmt.Sprintf("endpoints[%d].addresses[0]", i)
	if len(from.Addresses) == 0 {
		r.fault(field, "the endpoint has no address: add one")
		return
	}
	addr, ok := r.address(field, from.Addresses[0])
	if !ok {
		return
	}
	if addr.Is4() != (family == discoveryv1.AddressTypeIPv4) {
		r.fault(field, "%s is not of the slice's addressType, %s: move it to a slice of its own family", addr, family)
		return
	}
	s.more = s.more || len(from.Addresses) > 1
	b := model.Backend{Address: netip.AddrPortFrom(addr, number)}
	b.Ready, b.Serving, b.Terminating = conditions(&from.Conditions)
	if from.NodeName != nil {
		b.Node = *from.NodeName
	}
	if from.Zone != nil {
		b.Zone = *from.Zone
	}
	if ref := from.TargetRef; ref != nil && ref.Kind == "Pod" {
		b.Pod = model.Name{Namespace: cmp.Or(ref.Namespace, r.object.name.Namespace), Name: ref.Name}
	}
	b.Hints = r.hints(fmt.Sprintf("endpoints[%d].hints", i), from.Hints)
	s.endpoints = append(s.endpoints, b)
	if from.Hostname != nil && *from.Hostname != "" {
		if validation.IsDNS1123Label(*from.Hostname) != nil {
			r.fault(fmt.Sprintf("endpoints[%d].hostname", i), "%q is not a host name: use at most 63 lower-case letters, digits and -", clip(*from.Hostname))
			return
		}
		if s.hostnames == nil {
			s.hostnames = map[netip.Addr]string{}
		}
		s.hostnames[addr] = *from.Hostname
	}
}

// hints reads which clients shall use an endpoint.
func (r *reader) hints(field string, from *discoveryv1.EndpointHints) model.Hints {
	if from == nil {
		return model.Hints{}
	}
	var nodes, zones []string
	for i, n := range from.ForNodes {
		if r.hinted(field, "forNodes", i, n.Name) {
			nodes = append(nodes, n.Name)
		}
	}
	for i, z := range from.ForZones {
		if r.hinted(field, "forZones", i, z.Name) {
			zones = append(zones, z.Name)
		}
	}
	return model.HintsFor(nodes, zones)
}

// hinted says whether name is one that a node or a zone can have.
func (r *reader) hinted(field, list string, i int, name string) bool {
	ok := name != "" && !strings.Contains(name, ",")
	if !ok {
		r.fault(fmt.Sprintf("%s.%s[%d].name", field, list, i), "%q is not the name of a node or a zone: correct it or leave it out", clip(name))
	}
	return ok
}

// conditions gives unset conditions the meaning that the API documents: ready is
// true, serving is what ready is, terminating is false
// (discovery.k8s.io/v1 EndpointConditions).
func conditions(c *discoveryv1.EndpointConditions) (ready, serving, terminating bool) {
	ready = c.Ready == nil || *c.Ready
	serving = ready
	if c.Serving != nil {
		serving = *c.Serving
	}
	return ready, serving, c.Terminating != nil && *c.Terminating
}

// join is the Service with the endpoints of its slices.
func join(base *model.Service, from []*Object) *model.Service {
	s := *base
	s.Ports = slices.Clone(base.Ports)
	s.Endpoints, s.More = nil, false
	if s.Type == model.ExternalName {
		return &s
	}
	for i := range s.Ports {
		s.Ports[i].Backends = backends(&s.Ports[i], s.Headless, from)
	}
	if s.Headless {
		s.Endpoints = endpoints(from)
		s.More = slices.ContainsFunc(from, func(o *Object) bool { return o.value.(*slice).more })
	}
	return &s
}

// endpoints are those of all slices, whatever their ports. One that is in several under
// the same host name is ready if it is so in any; under several it is there several times.
func endpoints(from []*Object) []model.Endpoint {
	var list []model.Endpoint
	for _, o := range from {
		s := o.value.(*slice)
		for _, b := range s.endpoints {
			addr := b.Address.Addr()
			list = append(list, model.Endpoint{Address: addr, Hostname: s.hostnames[addr], Ready: b.Ready})
		}
	}
	slices.SortFunc(list, func(a, b model.Endpoint) int {
		return cmp.Or(a.Address.Compare(b.Address), strings.Compare(a.Hostname, b.Hostname), falseFirst(!a.Ready, !b.Ready))
	})
	return slices.Clip(slices.CompactFunc(list, func(a, b model.Endpoint) bool { return a.Address == b.Address && a.Hostname == b.Hostname }))
}

// backends are the endpoints of one Service port: those of every slice that has
// a port of the same name and protocol. One that is in several slices, as while
// the controller moves it, is taken in its best condition. Those of a single
// slice are not copied.
func backends(p *model.ServicePort, headless bool, from []*Object) []model.Backend {
	var list []model.Backend
	for _, o := range from {
		s := o.value.(*slice)
		if o.headless && !headless {
			continue
		}
		for i, sp := range s.ports {
			if !sp.leadsTo(p) {
				continue
			}
			if list == nil && i == 0 {
				list = slices.Clip(s.endpoints) // what is added makes a copy
				continue
			}
			list = slices.Grow(list, len(s.endpoints))
			for _, b := range s.endpoints {
				b.Address = netip.AddrPortFrom(b.Address.Addr(), sp.port)
				list = append(list, b)
			}
		}
	}
	return sorted(list)
}

// leadsTo says whether the port of a slice is one of a Service.
func (sp *slicePort) leadsTo(p *model.ServicePort) bool {
	return sp.name == p.Name && sp.protocol == p.Protocol
}

// sorted sorts endpoints and leaves each address once, in its best condition, and
// without hints where its slices disagree about them. It does not write to a list
// that is so already, which others may be reading.
func sorted(list []model.Backend) []model.Backend {
	done := true
	for i := 1; i < len(list) && done; i++ {
		done = list[i-1].Address.Compare(list[i].Address) < 0
	}
	if done {
		return list
	}
	slices.SortFunc(list, compareBackends)
	for i := 1; i < len(list); i++ {
		if compareBackends(list[i-1], list[i]) == 0 && list[i-1].Hints != list[i].Hints {
			dropHints(list, list[i])
		}
	}
	return slices.CompactFunc(list, func(a, b model.Backend) bool { return a.Address == b.Address })
}

// dropHints takes the hints of all that are like b but for them.
func dropHints(list []model.Backend, b model.Backend) {
	i, _ := slices.BinarySearchFunc(list, b, compareBackends)
	for ; i < len(list) && compareBackends(list[i], b) == 0; i++ {
		list[i].Hints = model.Hints{}
	}
}

// compareBackends orders by address, then the better first. It tells any two
// backends apart that differ in more than hints, which have no order, so that the
// order of slices does not matter.
func compareBackends(a, b model.Backend) int {
	if c := a.Address.Compare(b.Address); c != 0 {
		return c
	}
	return cmp.Or(
		falseFirst(!a.Ready, !b.Ready),
		falseFirst(!a.Serving, !b.Serving),
		falseFirst(a.Terminating, b.Terminating),
		strings.Compare(a.Node, b.Node),
		strings.Compare(a.Zone, b.Zone),
		a.Pod.Compare(b.Pod),
	)
}

func falseFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}
