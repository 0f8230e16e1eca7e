package doctor

import (
	"encoding/json"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Objects of the API, as far as checks read them. Their fields have the API's names.

type meta struct {
	Namespace, Name, UID string
	DeletionTimestamp    string
	Labels, Annotations  map[string]string
}

// String is "shop/web", or "node-1" of what is in no namespace.
func (m meta) String() string {
	if m.Namespace == "" {
		return m.Name
	}
	return m.Namespace + "/" + m.Name
}

// lives says that it is of an API server, which has filled in its status: a manifest
// that somebody wrote has none.
func (m meta) lives() bool { return m.UID != "" }

// scalar is a text or a number, as its text: ports and quantities are either.
type scalar string

// UnmarshalJSON takes both.
func (s *scalar) UnmarshalJSON(data []byte) error {
	var text string
	if err := json.Unmarshal(data, &text); err != nil {
		text = string(data)
	}
	*s = scalar(text)
	return nil
}

// quantity is the value of a quantity, "64Mi" or "250m".
func (s scalar) quantity() (float64, bool) {
	text := string(s)
	unit := strings.TrimLeft(text, "0123456789.+-")
	number, err := strconv.ParseFloat(strings.TrimSuffix(text, unit), 64)
	factor, known := map[string]float64{
		"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
	}[unit]
	return number * factor, err == nil && known
}

type condition struct{ Type, Status, Reason, Message string }

// is says what a condition is: "True", "False", "Unknown", or "" where there is none.
func is(all []condition, kind string) (status, why string) {
	for _, c := range all {
		if c.Type == kind {
			return c.Status, strings.TrimSpace(c.Reason + " " + c.Message)
		}
	}
	return "", ""
}

type service struct {
	Metadata meta
	Spec     struct {
		Type, ClusterIP                                                   string
		ClusterIPs                                                        []string
		Selector                                                          map[string]string
		ExternalIPs                                                       []string
		Ports                                                             []servicePort
		ExternalTrafficPolicy, InternalTrafficPolicy, TrafficDistribution string
		LoadBalancerSourceRanges                                          []string
	}
	Status struct {
		LoadBalancer struct {
			Ingress []struct{ IP, Hostname string }
		}
	}
}

type servicePort struct {
	Name, Protocol string
	Port, NodePort int
	TargetPort     scalar
}

func (s *service) scope() string { return "Service " + s.Metadata.String() }

// served says that a proxy is to serve it: it has an address of its own.
func (s *service) served() bool {
	return s.Spec.Type != "ExternalName" && s.Spec.ClusterIP != "None"
}

type slice struct {
	Metadata  meta
	Endpoints []endpoint
	Ports     []struct {
		Name string
		Port int
	}
}

type endpoint struct {
	Addresses      []string
	NodeName, Zone string
	Conditions     struct{ Ready, Serving, Terminating *bool }
	TargetRef      struct{ Kind, Namespace, Name string }
}

// ready is as the API says: what is not said is true.
func (e *endpoint) ready() bool { return e.Conditions.Ready == nil || *e.Conditions.Ready }

type node struct {
	Metadata meta
	Spec     struct {
		PodCIDR       string
		PodCIDRs      []string
		Unschedulable bool
	}
	Status struct {
		Addresses  []struct{ Type, Address string }
		Conditions []condition
		Capacity   map[string]scalar
		NodeInfo   struct{ KernelVersion, KubeletVersion string }
	}
}

// internal are the node's own addresses.
func (n *node) internal() (all []netip.Addr) {
	for _, a := range n.Status.Addresses {
		if addr, err := netip.ParseAddr(a.Address); err == nil && a.Type == "InternalIP" {
			all = append(all, addr)
		}
	}
	return all
}

// podRanges are the ranges that the control plane gave it for pods.
func (n *node) podRanges() []netip.Prefix {
	return prefixes(append([]string{n.Spec.PodCIDR}, n.Spec.PodCIDRs...))
}

func prefixes(texts []string) (all []netip.Prefix) {
	for _, text := range texts {
		if p, err := netip.ParsePrefix(text); err == nil && !slices.Contains(all, p.Masked()) {
			all = append(all, p.Masked())
		}
	}
	return all
}

type container struct {
	Name, Image   string
	Command, Args []string
	Ports         []struct {
		Name          string
		ContainerPort int
	}
	Resources      struct{ Limits, Requests map[string]scalar }
	ReadinessProbe *struct{}
	Lifecycle      struct {
		PreStop *struct {
			Exec  *struct{ Command []string }
			Sleep *struct{ Seconds float64 }
		}
	}
}

type podSpec struct {
	NodeName, DNSPolicy, PriorityClassName string
	HostNetwork                            bool
	DNSConfig                              struct {
		Options []struct{ Name, Value string }
	}
	TerminationGracePeriodSeconds *float64
	InitContainers, Containers    []container
}

type pod struct {
	Metadata meta
	Spec     podSpec
	Status   struct {
		Phase      string
		PodIPs     []struct{ IP string }
		Conditions []condition
	}
}

func (p *pod) scope() string { return "Pod " + p.Metadata.String() }

// ended says that nothing of it runs any more.
func (p *pod) ended() bool { return p.Status.Phase == "Succeeded" || p.Status.Phase == "Failed" }

func (p *pod) ready() bool {
	status, _ := is(p.Status.Conditions, "Ready")
	return status == "True"
}

// addresses are those of its own, none for one in its node's namespace, or one that ends:
// its address may be another's already.
func (p *pod) addresses() (all []netip.Addr) {
	if p.Spec.HostNetwork || p.ended() || p.Metadata.DeletionTimestamp != "" {
		return nil
	}
	for _, ip := range p.Status.PodIPs {
		if addr, err := netip.ParseAddr(ip.IP); err == nil {
			all = append(all, addr)
		}
	}
	return all
}

// workload is a Deployment or a DaemonSet.
type workload struct {
	Metadata meta
	Spec     struct {
		Replicas *int
		Template struct {
			Metadata meta
			Spec     podSpec
		}
	}
	Status struct{ DesiredNumberScheduled, NumberReady, ReadyReplicas int }
}

// image says whether a container has an image of that name, whatever its registry, tag
// and digest are.
func (s *podSpec) image(name string) bool {
	return slices.ContainsFunc(s.Containers, func(c container) bool {
		image, _, _ := strings.Cut(c.Image, "@")
		if colon := strings.LastIndexByte(image, ':'); colon > strings.LastIndexByte(image, '/') {
			image = image[:colon]
		}
		return image == name || strings.HasSuffix(image, "/"+name)
	})
}

type autoscaler struct {
	Metadata meta
	Spec     struct {
		ScaleTargetRef reference
		MinReplicas    *int
		MaxReplicas    int
	}
}

type configMap struct {
	Metadata meta
	Data     map[string]string
}

type labelSelector struct {
	MatchLabels      map[string]string
	MatchExpressions []struct {
		Key, Operator string
		Values        []string
	}
}

// matches is what the API server does with a selector: an empty one matches all.
func (s *labelSelector) matches(labels map[string]string) bool {
	for key, want := range s.MatchLabels {
		if have, there := labels[key]; !there || have != want {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		have, there := labels[e.Key]
		holds := map[string]bool{
			"In": there && slices.Contains(e.Values, have), "NotIn": !there || !slices.Contains(e.Values, have),
			"Exists": there, "DoesNotExist": !there,
		}[e.Operator]
		if !holds {
			return false
		}
	}
	return true
}

// selects is a Service's selector, which matches nothing where it is empty.
func selects(selector, labels map[string]string) bool {
	return len(selector) > 0 && (&labelSelector{MatchLabels: selector}).matches(labels)
}

type networkPolicy struct {
	Metadata meta
	Spec     struct {
		PodSelector labelSelector
		PolicyTypes []string
		Egress      []egressRule
	}
}

type egressRule struct {
	Ports []struct {
		Protocol string
		Port     scalar
		EndPort  int
	}
	To []struct {
		PodSelector, NamespaceSelector *labelSelector
		IPBlock                        *struct {
			CIDR   string
			Except []string
		}
	}
}

// isolates says that what the policy selects may send only what policies allow.
func (p *networkPolicy) isolates() bool {
	if len(p.Spec.PolicyTypes) == 0 {
		return len(p.Spec.Egress) > 0
	}
	return slices.Contains(p.Spec.PolicyTypes, "Egress")
}

// reference names another object.
type reference struct{ Group, Kind, Namespace, Name string }

type gatewayClass struct {
	Metadata meta
	Status   struct{ Conditions []condition }
}

type gateway struct {
	Metadata meta
	Spec     struct{ GatewayClassName string }
	Status   struct {
		Conditions []condition
		Listeners  []struct {
			Name       string
			Conditions []condition
		}
	}
}

type httpRoute struct {
	Metadata meta
	Spec     struct {
		ParentRefs []reference
		Rules      []struct{ BackendRefs []reference }
	}
	Status struct {
		Parents []struct {
			ParentRef  reference
			Conditions []condition
		}
	}
}

type referenceGrant struct {
	Metadata meta
	Spec     struct{ From, To []reference }
}

type ingressBackend struct{ Service struct{ Name string } }

type ingress struct {
	Metadata meta
	Spec     struct {
		IngressClassName string
		DefaultBackend   ingressBackend
		Rules            []struct {
			HTTP struct {
				Paths []struct{ Backend ingressBackend }
			}
		}
	}
}

// named is an object of which only the name, labels and annotations matter.
type named struct{ Metadata meta }

type serviceRange struct {
	Metadata meta
	Spec     struct{ CIDRs []string }
}

type calicoPool struct {
	Metadata meta
	Spec     struct {
		CIDR, IPIPMode, VXLANMode string
		Disabled                  bool
	}
}

type calicoBGP struct {
	Metadata meta
	Spec     struct{ NodeToNodeMeshEnabled *bool }
}

// sizeOf is how many addresses a range has.
func sizeOf(p netip.Prefix) float64 { return math.Pow(2, float64(p.Addr().BitLen()-p.Bits())) }
