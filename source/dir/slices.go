package dir

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/millrace/millrace/model"
)

// maxEndpoints is how many endpoints the API allows in one EndpointSlice.
const maxEndpoints = 1000

// service is a Service as a manifest.
func service(s *model.Service) *corev1.Service {
	obj := &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name.Name, Annotations: s.Annotations},
		Spec: corev1.ServiceSpec{
			Type:                     corev1.ServiceType(s.Type),
			Selector:                 s.Selector,
			PublishNotReadyAddresses: s.PublishNotReadyAddresses,
		},
	}
	for _, addr := range s.ClusterIPs {
		obj.Spec.ClusterIPs = append(obj.Spec.ClusterIPs, addr.String())
	}
	if s.Headless {
		obj.Spec.ClusterIPs = []string{corev1.ClusterIPNone}
	}
	if len(obj.Spec.ClusterIPs) > 0 {
		obj.Spec.ClusterIP = obj.Spec.ClusterIPs[0]
	}
	families(s, &obj.Spec)
	for _, p := range s.Ports {
		target := intstr.FromInt32(int32(p.TargetPort))
		if p.TargetName != "" {
			target = intstr.FromString(p.TargetName)
		}
		obj.Spec.Ports = append(obj.Spec.Ports, corev1.ServicePort{
			Name: p.Name, Protocol: protocol(p.Protocol), Port: int32(p.Port), TargetPort: target,
		})
	}
	return obj
}

// families names the families that the Service chose, that of its first address
// first, which is where the API wants it.
func families(s *model.Service, spec *corev1.ServiceSpec) {
	policy := corev1.IPFamilyPolicySingleStack
	if s.IPv4 {
		spec.IPFamilies = append(spec.IPFamilies, corev1.IPv4Protocol)
	}
	if s.IPv6 {
		spec.IPFamilies = append(spec.IPFamilies, corev1.IPv6Protocol)
	}
	switch len(spec.IPFamilies) {
	case 0:
		return
	case 2:
		policy = corev1.IPFamilyPolicyPreferDualStack
		if len(s.ClusterIPs) > 0 && s.ClusterIPs[0].Is6() {
			slices.Reverse(spec.IPFamilies)
		}
	}
	spec.IPFamilyPolicy = &policy
}

// endpoint is one address behind a Service in one condition. Address has port 0.
type endpoint = model.Backend

// row is an endpoint and the number on it of each of the Service's ports, 0 for
// those it does not offer.
type row struct {
	endpoint
	numbers []uint16
}

// endpointSlices are the endpoints of a Service as manifests. All endpoints of a
// slice share its family and its port numbers; a targetPort that is a name may
// be another number on another pod, which puts the pod into another slice.
func endpointSlices(s *model.Service) []*discoveryv1.EndpointSlice {
	rows := rows(s)
	slices.SortFunc(rows, func(a, b row) int {
		return cmp.Or(
			cmp.Compare(a.Address.Addr().BitLen(), b.Address.Addr().BitLen()),
			slices.Compare(a.numbers, b.numbers),
			a.Address.Compare(b.Address),
		)
	})
	var out []*discoveryv1.EndpointSlice
	for start := 0; start < len(rows); {
		end := start + 1
		for end < len(rows) && end-start < maxEndpoints &&
			rows[end].Address.Addr().Is4() == rows[start].Address.Addr().Is4() && slices.Equal(rows[end].numbers, rows[start].numbers) {
			end++
		}
		out = append(out, endpointSlice(s, len(out), rows[start:end]))
		start = end
	}
	return out
}

// rows collects what the ports of a Service say of each endpoint. An endpoint
// with several numbers for one port becomes several rows.
func rows(s *model.Service) []row {
	var rows []row
	at := map[endpoint][]int{} // the rows of an endpoint
	for i := range s.Ports {
		for _, b := range s.Ports[i].Backends {
			number := b.Address.Port()
			b.Address = netip.AddrPortFrom(b.Address.Addr(), 0)
			free := slices.IndexFunc(at[b], func(r int) bool { return rows[r].numbers[i] == 0 })
			if free < 0 {
				free = len(at[b])
				at[b] = append(at[b], len(rows))
				rows = append(rows, row{b, make([]uint16, len(s.Ports))})
			}
			rows[at[b][free]].numbers[i] = number
		}
	}
	return rows
}

func endpointSlice(s *model.Service, number int, rows []row) *discoveryv1.EndpointSlice {
	obj := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.Namespace, Name: fmt.Sprintf("%s-%d", s.Name.Name, number),
			Labels: map[string]string{discoveryv1.LabelServiceName: s.Name.Name},
		},
		AddressType: discoveryv1.AddressTypeIPv6,
	}
	if rows[0].Address.Addr().Is4() {
		obj.AddressType = discoveryv1.AddressTypeIPv4
	}
	for i, n := range rows[0].numbers {
		if n != 0 {
			name, protocol, port := s.Ports[i].Name, protocol(s.Ports[i].Protocol), int32(n)
			obj.Ports = append(obj.Ports, discoveryv1.EndpointPort{Name: &name, Protocol: &protocol, Port: &port})
		}
	}
	for i := range rows {
		obj.Endpoints = append(obj.Endpoints, manifestOf(&rows[i].endpoint))
	}
	return obj
}

// manifestOf is an endpoint as the API has it.
func manifestOf(b *endpoint) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{
		Addresses:  []string{b.Address.Addr().String()},
		Conditions: discoveryv1.EndpointConditions{Ready: &b.Ready, Serving: &b.Serving, Terminating: &b.Terminating},
	}
	if b.Node != "" {
		e.NodeName = &b.Node
	}
	if b.Zone != "" {
		e.Zone = &b.Zone
	}
	if b.Pod.Name != "" {
		e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Namespace: b.Pod.Namespace, Name: b.Pod.Name}
	}
	return e
}
