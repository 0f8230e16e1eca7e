package cluster

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/millrace/millrace/model"
)

// serviceProxyName is the label of Services, and of their slices, that a proxy of
// the name it gives serves. Every other proxy leaves them alone.
const serviceProxyName = "service.kubernetes.io/service-proxy-name"

// Kubernetes' default and limit of how long a client keeps its endpoint.
const (
	defaultAffinity = int32(corev1.DefaultClientIPServiceAffinitySeconds)
	mostAffinity    = 86400
)

// policies reads which endpoints a client may come to, and for how long it stays
// with one.
func (r *reader) policies(s *model.Service, spec *corev1.ServiceSpec) {
	if p := spec.InternalTrafficPolicy; p != nil {
		s.InternalLocal = r.local("spec.internalTrafficPolicy", string(*p))
	}
	s.ExternalLocal = r.local("spec.externalTrafficPolicy", string(spec.ExternalTrafficPolicy))
	switch spec.SessionAffinity {
	case "", corev1.ServiceAffinityNone:
	case corev1.ServiceAffinityClientIP:
		s.Affinity = r.affinity(spec.SessionAffinityConfig)
	default:
		r.fault("spec.sessionAffinity", "unknown affinity %q: use None or ClientIP", clip(string(spec.SessionAffinity)))
	}
}

func (r *reader) local(field, policy string) bool {
	switch policy {
	case "", "Cluster":
		return false
	case "Local":
		return true
	}
	r.fault(field, "unknown policy %q: use Cluster or Local", clip(policy))
	return false
}

func (r *reader) affinity(c *corev1.SessionAffinityConfig) time.Duration {
	seconds := defaultAffinity
	if c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
		seconds = *c.ClientIP.TimeoutSeconds
	}
	if seconds < 1 || seconds > mostAffinity {
		r.fault("spec.sessionAffinityConfig.clientIP.timeoutSeconds", "%d seconds cannot be: use 1 to %d", seconds, mostAffinity)
		seconds = defaultAffinity
	}
	return time.Duration(seconds) * time.Second
}

// externalIPs reads addresses of others that lead to the Service. Blank ones are
// old API servers' and mean nothing.
func (r *reader) externalIPs(s *model.Service, list []string) {
	if s.Type == model.ExternalName {
		return
	}
	for i, text := range list {
		if strings.TrimSpace(text) != "" {
			s.ExternalIPs = r.extraAddress(s, s.ExternalIPs, fmt.Sprintf("spec.externalIPs[%d]", i), text)
		}
	}
}

// extraAddress adds one more address of a Service to some. Only those of a family
// of which the Service has an own address are served.
func (r *reader) extraAddress(s *model.Service, to []netip.Addr, field, text string) []netip.Addr {
	addr, ok := r.address(field, text)
	if !ok || slices.Contains(to, addr) {
		return to
	}
	if len(s.ClusterIPs) > 0 && !slices.ContainsFunc(s.ClusterIPs, func(a netip.Addr) bool { return a.Is4() == addr.Is4() }) {
		r.advise(field, "%s is of a family of which the Service has no address of its own, so it is not served: add the family to ipFamilies", addr)
	}
	return append(to, addr)
}

// loadBalancer reads what only a Service of type LoadBalancer has: addresses that
// nodes may serve in the load balancer's place, who may use them, and where nodes
// say whether they have endpoints.
func (r *reader) loadBalancer(s *model.Service, obj *corev1.Service) {
	for i, ingress := range obj.Status.LoadBalancer.Ingress {
		field := fmt.Sprintf("status.loadBalancer.ingress[%d]", i)
		switch mode := ingress.IPMode; {
		case ingress.IP == "":
		case mode == nil || *mode == corev1.LoadBalancerIPModeVIP:
			s.LoadBalancerIPs = r.extraAddress(s, s.LoadBalancerIPs, field+".ip", ingress.IP)
		case *mode != corev1.LoadBalancerIPModeProxy:
			r.fault(field+".ipMode", "unknown mode %q: use VIP or Proxy", clip(string(*mode)))
		}
	}
	r.sourceRanges(s, obj)
	if n := obj.Spec.HealthCheckNodePort; n != 0 && s.ExternalLocal {
		s.HealthCheckPort, _ = r.port("spec.healthCheckNodePort", n)
	}
}

// sourceRanges reads who may use LoadBalancerIPs. If none of the ranges can be
// read, nobody knows who that is, and the addresses are not served.
func (r *reader) sourceRanges(s *model.Service, obj *corev1.Service) {
	list, field := obj.Spec.LoadBalancerSourceRanges, "spec.loadBalancerSourceRanges[%d]"
	if len(list) == 0 {
		list = strings.Split(obj.Annotations[corev1.AnnotationLoadBalancerSourceRangesKey], ",")
		field = "metadata.annotations[" + corev1.AnnotationLoadBalancerSourceRangesKey + "][%d]"
	}
	unread := false
	for i, text := range list {
		if text = strings.TrimSpace(text); text == "" {
			continue // the API server lets blanks stand
		}
		p, ok := r.sourceRange(fmt.Sprintf(field, i), text)
		if unread = unread || !ok; ok && !slices.Contains(s.SourceRanges, p) {
			s.SourceRanges = append(s.SourceRanges, p)
		}
	}
	if unread && len(s.SourceRanges) == 0 {
		s.LoadBalancerIPs = nil
	}
}

// sourceRange reads a range; bits behind its mask are allowed and mean nothing.
func (r *reader) sourceRange(field, text string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		r.fault(field, "%q is not a range of addresses: write one such as 192.0.2.0/24", clip(text))
	case p.Addr().Is4In6():
		r.fault(field, "%s is an IPv4 range in IPv6 form: write it as IPv4", clip(text))
	default:
		return p.Masked(), true
	}
	return netip.Prefix{}, false
}

// reachableOutside says whether clients outside the cluster have a way to come to
// a Service; without one its externalTrafficPolicy says nothing.
func reachableOutside(s *model.Service) bool {
	switch s.Type {
	case model.NodePort, model.LoadBalancer:
		return true
	case model.ClusterIP:
		return len(s.ExternalIPs) > 0
	}
	return false
}
