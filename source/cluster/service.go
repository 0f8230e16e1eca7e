package cluster

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/millrace/millrace/model"
)

// service reads a Service without its endpoints; nil for one that is another
// proxy's.
func (r *reader) service(obj *corev1.Service) *model.Service {
	if _, ok := obj.Labels[serviceProxyName]; ok {
		return nil
	}
	s := &model.Service{
		Name:                     r.object.name,
		Type:                     r.serviceType(obj.Spec.Type),
		Selector:                 r.selector("spec.selector", obj.Spec.Selector),
		PublishNotReadyAddresses: obj.Spec.PublishNotReadyAddresses,
		Annotations:              annotations(obj.Annotations),
		Where:                    r.object.Where(),
	}
	if s.Type != model.ExternalName {
		r.clusterIPs(s, &obj.Spec)
		r.families(s, &obj.Spec)
	} else {
		s.External = strings.Clone(obj.Spec.ExternalName)
	}
	for i := range obj.Spec.Ports {
		if len(obj.Spec.Ports) > 1 && obj.Spec.Ports[i].Name == "" {
			r.fault(fmt.Sprintf("spec.ports[%d].name", i), "a Service with several ports has to name each: add a name")
		}
		r.servicePort(s, fmt.Sprintf("spec.ports[%d]", i), &obj.Spec.Ports[i])
	}
	r.policies(s, &obj.Spec)
	r.externalIPs(s, obj.Spec.ExternalIPs)
	if s.Type == model.LoadBalancer {
		r.loadBalancer(s, obj)
	}
	if s.ExternalLocal && !reachableOutside(s) {
		s.ExternalLocal = false // the API server lets it stand, and it says nothing
	}
	if len(obj.Spec.Ports) == 0 && !s.Headless && s.Type != model.ExternalName {
		r.advise("spec.ports", "the Service has no ports, so nothing can reach it: add one")
	}
	return s
}

func (r *reader) serviceType(t corev1.ServiceType) model.ServiceType {
	if t == "" {
		return model.ClusterIP
	}
	for _, known := range []model.ServiceType{model.ClusterIP, model.NodePort, model.LoadBalancer, model.ExternalName} {
		if string(t) == string(known) {
			return known // and not t, which is a string of its own
		}
	}
	r.fault("spec.type", "unknown type %q: use ClusterIP, NodePort, LoadBalancer or ExternalName", clip(string(t)))
	return model.ClusterIP
}

// selector copies a Service's selector; one that no label can match is dropped.
func (r *reader) selector(field string, from map[string]string) map[string]string {
	if len(from) == 0 {
		return nil
	}
	if _, err := labels.ValidatedSelectorFromSet(from); err != nil {
		r.fault(field, "the selector can match no pod: %s", clip(err.Error()))
		return nil
	}
	return copied(from)
}

// clusterIPs reads the Service's own addresses, at most one of each family.
func (r *reader) clusterIPs(s *model.Service, spec *corev1.ServiceSpec) {
	list, field := spec.ClusterIPs, "spec.clusterIPs[%d]"
	if len(list) == 0 && spec.ClusterIP != "" {
		list, field = []string{spec.ClusterIP}, "spec.clusterIP"
	} else if spec.ClusterIP != "" && spec.ClusterIP != list[0] {
		r.fault("spec.clusterIP", "%s is not the first of clusterIPs, %s: make them the same", clip(spec.ClusterIP), clip(list[0]))
	}
	if len(list) == 1 && list[0] == corev1.ClusterIPNone {
		s.Headless = true
		return
	}
	for i, text := range list {
		at := field
		if len(spec.ClusterIPs) > 0 {
			at = fmt.Sprintf(field, i)
		}
		addr, ok := r.address(at, text)
		if ok && slices.ContainsFunc(s.ClusterIPs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() }) {
			r.fault(at, "%s is a second address of one family: a Service has one IPv4 and one IPv6 address at most", addr)
		} else if ok {
			s.ClusterIPs = append(s.ClusterIPs, addr)
		}
	}
}

// families reads which address families the Service chose. Its addresses choose
// too; a Service that says nothing leaves the choice to the cluster.
func (r *reader) families(s *model.Service, spec *corev1.ServiceSpec) {
	for i, family := range spec.IPFamilies {
		switch family {
		case corev1.IPv4Protocol:
			s.IPv4 = true
		case corev1.IPv6Protocol:
			s.IPv6 = true
		default:
			r.fault(fmt.Sprintf("spec.ipFamilies[%d]", i), "unknown family %q: use IPv4 or IPv6", clip(string(family)))
		}
	}
	if p := spec.IPFamilyPolicy; p != nil {
		switch *p {
		case corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack:
			s.IPv4, s.IPv6 = true, true
		case corev1.IPFamilyPolicySingleStack:
			r.single(s)
		default:
			r.fault("spec.ipFamilyPolicy", "unknown policy %q: use SingleStack, PreferDualStack or RequireDualStack", clip(string(*p)))
		}
	}
	chosen := s.IPv4 || s.IPv6
	for _, addr := range s.ClusterIPs {
		if chosen && (addr.Is4() && !s.IPv4 || addr.Is6() && !s.IPv6) {
			r.fault("spec.ipFamilies", "address %s is of a family that ipFamilies does not name: add the family or drop the address", addr)
		}
		s.IPv4, s.IPv6 = s.IPv4 || addr.Is4(), s.IPv6 || addr.Is6()
	}
}

// single chooses the one family of a Service that asks for one without naming
// it: that of its address, else IPv4, which is first in most clusters.
func (r *reader) single(s *model.Service) {
	if s.IPv4 && s.IPv6 {
		r.fault("spec.ipFamilyPolicy", "SingleStack with two ipFamilies: name one family, or use PreferDualStack")
		return
	}
	if !s.IPv4 && !s.IPv6 {
		s.IPv4 = len(s.ClusterIPs) == 0 || s.ClusterIPs[0].Is4()
		s.IPv6 = !s.IPv4
	}
}

// servicePort reads one port into s, unless s has it already.
func (r *reader) servicePort(s *model.Service, field string, from *corev1.ServicePort) {
	p := model.ServicePort{Name: from.Name}
	var okProtocol, okPort bool
	p.Protocol, okProtocol = r.protocol(field+".protocol", string(from.Protocol))
	p.Port, okPort = r.port(field+".port", from.Port)
	if !okProtocol || !okPort || !r.targetPort(&p, field+".targetPort", from.TargetPort) {
		return
	}
	for _, other := range s.Ports {
		if other.Port == p.Port && other.Protocol == p.Protocol {
			r.fault(field+".port", "port %d/%s is here twice: remove one", p.Port, p.Protocol)
			return
		}
		if other.Name == p.Name && p.Name == "" {
			return // told already
		}
		if other.Name == p.Name {
			r.fault(field+".name", "two ports are named %s: rename one", clip(p.Name))
			return
		}
	}
	if p.NodePort = r.nodePort(s, &p, field+".nodePort", from.NodePort); p.Protocol == model.SCTP {
		r.advise(field+".protocol", "SCTP is not served here: this port is left to whatever else serves the Service")
	}
	s.Ports = append(s.Ports, p)
}

// nodePort reads on which port nodes serve p, which is not in s yet; 0 is none.
func (r *reader) nodePort(s *model.Service, p *model.ServicePort, field string, n int32) uint16 {
	if n == 0 || s.Type == model.ExternalName {
		return 0
	}
	if s.Type == model.ClusterIP {
		r.fault(field, "a Service of type %s has no node ports: use type NodePort or LoadBalancer, or leave it out", s.Type)
		return 0
	}
	number, ok := r.port(field, n)
	for _, other := range s.Ports {
		if ok && other.NodePort == number && other.Protocol == p.Protocol {
			r.fault(field, "node port %d/%s is here twice: change one", number, p.Protocol)
			return 0
		}
	}
	return number
}

// targetPort reads a port number or a container port's name; 0 is neither.
func (r *reader) targetPort(p *model.ServicePort, field string, from intstr.IntOrString) bool {
	if from.Type == intstr.String && from.StrVal != "" {
		if msgs := validation.IsValidPortName(from.StrVal); msgs != nil {
			r.fault(field, "%q is not the name of a port: %s", clip(from.StrVal), msgs[0])
			return false
		}
		p.TargetName = from.StrVal
		return true
	}
	if from.IntVal == 0 {
		return true
	}
	var ok bool
	p.TargetPort, ok = r.port(field, from.IntVal)
	return ok
}
