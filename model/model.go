package model

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unique"
)

// Name identifies an object of one kind in a cluster.
type Name struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// String is "namespace/name", as kubectl and Kubernetes' own logs print it.
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Compare orders names by namespace, then by name.
func (n Name) Compare(o Name) int {
	if c := strings.Compare(n.Namespace, o.Namespace); c != 0 {
		return c
	}
	return strings.Compare(n.Name, o.Name)
}

// Protocol is a transport protocol by its IP protocol number.
type Protocol uint8

// The transport protocols a Service port can name (RFC 9293, RFC 768, RFC 9260).
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// String is the protocol's name in lower case, as `10.96.0.10:53/udp` has it.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprintf("protocol-%d", uint8(p))
}

// MarshalText gives the protocol's name.
func (p Protocol) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText accepts what ParseProtocol does.
func (p *Protocol) UnmarshalText(text []byte) error {
	parsed, err := ParseProtocol(string(text))
	if err != nil {
		return err
	}
	*p = parsed
	return nil
}

// ParseProtocol reads "TCP", "UDP" or "SCTP" in any case. The empty string is
// TCP, which is Kubernetes' default.
func ParseProtocol(s string) (Protocol, error) {
	switch strings.ToLower(s) {
	case "", "tcp":
		return TCP, nil
	case "udp":
		return UDP, nil
	case "sctp":
		return SCTP, nil
	}
	return 0, fmt.Errorf("unknown protocol %q: use TCP, UDP or SCTP", s)
}

// Snapshot is everything a source knows of the cluster at one moment.
// It is whole, immutable and numbered; each slice is sorted by name.
type Snapshot struct {
	// Number grows by at least one with every Snapshot of a source.
	Number uint64
	// Complete says that the source has seen everything once. Nothing may be
	// removed from the kernel for a Snapshot that is not complete.
	Complete bool
	// Unread counts what could not be read and of which no earlier version is
	// known: malformed documents and objects, unreadable or too large files,
	// folders that could not be listed. While it is not zero, nothing may be
	// removed from the kernel, because nobody knows what these asked for.
	Unread int
	// Seen is when the source noticed the oldest change that is new in this
	// Snapshot; zero where that is unknown. Plans do not read it.
	Seen time.Time

	Services  []*Service
	Pods      []*Pod
	Nodes     []*Node
	Workloads []*Workload

	// HostPorts are the ports of this node that lead to its pods. They are the container
	// runtime's to say, not a source's: the wiring adds them. No two have one address and
	// protocol.
	HostPorts []HostPort

	// Named says that all Services were asked for, also those that are for DNS alone:
	// without it, headless ones and those of other proxies may be missing.
	Named bool
	// Others are the Services of other proxies. They have names, and nothing else here.
	Others []Name
	// DNS is how the cluster's DNS servers are configured; nil where that is not known.
	DNS *DNS
	// Masquerade is what the cluster says of packets that leave it; nil where it says
	// nothing.
	Masquerade *Masquerade
	// Flannel is how flannel is configured, also where it has gone; nil where that is not
	// known.
	Flannel *FlannelNetwork

	// Ignored counts objects of kinds that nobody here reads, by kind.
	Ignored map[string]int
	// Problems are the objects that could not be read or used, and why. What
	// they said before, where it is known, is still in force.
	Problems []Problem
}

// Problem names something in the input that cannot be used.
type Problem struct {
	// Where is the file and line ("shop.yaml:14") or the API object.
	Where string `json:"where"`
	// Object is "Kind namespace/name" as far as it could be read.
	Object string `json:"object,omitempty"`
	// Field is the path inside the object, "spec.ports[0].port".
	Field string `json:"field,omitempty"`
	// Text is the cause and what to do.
	Text string `json:"text"`
}

// Error prints the problem on one line: where, object, field, cause.
func (p Problem) Error() string {
	parts := make([]string, 0, 4)
	for _, s := range []string{p.Where, p.Object, p.Field, p.Text} {
		if s != "" {
			parts = append(parts, s)
		}
	}
	return strings.Join(parts, ": ")
}

// ServiceType is Kubernetes' spec.type.
type ServiceType string

// The types of a Service.
const (
	ClusterIP    ServiceType = "ClusterIP"
	NodePort     ServiceType = "NodePort"
	LoadBalancer ServiceType = "LoadBalancer"
	ExternalName ServiceType = "ExternalName"
)

// Service is a Kubernetes Service joined with its endpoints.
type Service struct {
	Name
	Type ServiceType
	// ClusterIPs are the Service's own addresses, at most one of each family.
	// None for a headless Service or where the lab still has to give some.
	ClusterIPs []netip.Addr
	Headless   bool
	// IPv4 and IPv6 say which families the manifest chose (ipFamilies,
	// ipFamilyPolicy); neither where it left the choice to the cluster.
	IPv4, IPv6 bool
	Ports      []ServicePort
	// Endpoints are those that the names of a headless Service lead to, whatever their
	// ports, sorted by address and host name, no two equal; nil for other Services.
	Endpoints []Endpoint
	// External is the name that one of type ExternalName is another one for
	// (spec.externalName); empty for other Services.
	External string
	// More says that the names of a headless Service lead to more than Endpoints: to host
	// names, or to further addresses of an endpoint.
	More bool
	// ExternalIPs are addresses of others that lead here (spec.externalIPs).
	ExternalIPs []netip.Addr
	// LoadBalancerIPs are the addresses that a load balancer serves and that nodes
	// may serve themselves: status.loadBalancer.ingress whose ipMode is VIP.
	LoadBalancerIPs []netip.Addr
	// SourceRanges are the clients that may use LoadBalancerIPs; nil is all.
	SourceRanges []netip.Prefix
	// InternalLocal and ExternalLocal say that only endpoints of the client's or
	// the entered node count (internalTrafficPolicy, externalTrafficPolicy).
	InternalLocal, ExternalLocal bool
	// Affinity is how long a client stays with its endpoint after its last flow
	// began; 0 is not at all (sessionAffinity ClientIP).
	Affinity time.Duration
	// HealthCheckPort is where each node says whether it has endpoints of the
	// Service (healthCheckNodePort); 0 is nowhere.
	HealthCheckPort uint16
	// Selector picks the pods behind the Service; nil means that endpoints come
	// from EndpointSlices alone.
	Selector                 map[string]string
	PublishNotReadyAddresses bool
	Annotations              map[string]string
	// Where is the file and line or API object it came from, for messages.
	Where string
}

// ServicePort is one port of a Service and the endpoints behind it.
type ServicePort struct {
	// Name is the port's name, empty for a Service's only port.
	Name     string
	Protocol Protocol
	Port     uint16
	// TargetPort or TargetName is the port on the pod; with neither it is Port.
	TargetPort uint16
	TargetName string
	// NodePort is the port on which nodes serve it; 0 is none.
	NodePort uint16
	// Backends are the endpoints of both families, sorted by address and port,
	// no two equal.
	Backends []Backend
}

// Backend is one endpoint of one Service port.
type Backend struct {
	Address netip.AddrPort
	// Ready, Serving and Terminating are the conditions of an EndpointSlice
	// (Kubernetes API, discovery.k8s.io/v1 EndpointConditions).
	Ready       bool
	Serving     bool
	Terminating bool
	Node        string
	Zone        string
	// Hints say which clients shall use this endpoint.
	Hints Hints
	// Pod is the pod behind it, if the slice names one.
	Pod Name
}

// Endpoint is one endpoint of a headless Service.
type Endpoint struct {
	Address netip.Addr
	// Hostname is the label that it has below the Service's name; empty where it has none
	// of its own.
	Hostname string
	Ready    bool
}

// Hints are the nodes and zones whose clients shall use an endpoint
// (discovery.k8s.io/v1 EndpointHints). The zero value is no hint; two are equal if
// they say the same. They take the memory of a pointer.
type Hints struct{ of unique.Handle[hints] }

// hints are names between commas: ",a,b,", which no name has; "" for none.
type hints struct{ nodes, zones string }

// HintsFor makes hints, in any order.
func HintsFor(nodes, zones []string) Hints {
	if len(nodes) == 0 && len(zones) == 0 {
		return Hints{}
	}
	return Hints{unique.Make(hints{listed(nodes), listed(zones)})}
}

func listed(names []string) string {
	if len(names) == 0 {
		return ""
	}
	names = slices.Clone(names)
	slices.Sort(names)
	return "," + strings.Join(slices.Compact(names), ",") + ","
}

// Nodes says whether nodes are named, and whether this is one of them.
func (h Hints) Nodes(node string) (any, named bool) { return among(h.text().nodes, node) }

// Zones says whether zones are named, and whether this is one of them.
func (h Hints) Zones(zone string) (any, named bool) { return among(h.text().zones, zone) }

func (h Hints) text() hints {
	if h == (Hints{}) {
		return hints{}
	}
	return h.of.Value()
}

// MarshalText is the text that UnmarshalText reads.
func (h Hints) MarshalText() ([]byte, error) {
	if h == (Hints{}) {
		return nil, nil
	}
	return []byte("nodes=" + strings.Trim(h.text().nodes, ",") + ";zones=" + strings.Trim(h.text().zones, ",")), nil
}

// UnmarshalText reads "nodes=a,b;zones=c".
func (h *Hints) UnmarshalText(text []byte) error {
	nodes, zones, ok := strings.Cut(string(text), ";zones=")
	nodes, named := strings.CutPrefix(nodes, "nodes=")
	if len(text) == 0 {
		*h = Hints{}
		return nil
	}
	if !ok || !named {
		return fmt.Errorf("read hints %q: write nodes=a,b;zones=c", text)
	}
	split := func(list string) []string {
		return strings.FieldsFunc(list, func(r rune) bool { return r == ',' })
	}
	*h = HintsFor(split(nodes), split(zones))
	return nil
}

// GobEncode is MarshalText.
func (h Hints) GobEncode() ([]byte, error) { return h.MarshalText() }

// GobDecode is UnmarshalText.
func (h *Hints) GobDecode(text []byte) error { return h.UnmarshalText(text) }

func among(list, name string) (any, named bool) {
	return list != "", name != "" && strings.Contains(list, ","+name+",")
}

// Pod is a pod that exists (Node and Addresses set) or is asked for (neither).
type Pod struct {
	Name
	Labels      map[string]string
	Annotations map[string]string
	Node        string
	Addresses   []netip.Addr
	HostNetwork bool
	Ready       bool
	Ports       []ContainerPort
	// Where is the file and line or API object it came from, for messages.
	Where string
}

// ContainerPort is a port on which a container listens.
type ContainerPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// Node is a machine of the cluster.
type Node struct {
	Name string
	// Addresses are its internal addresses.
	Addresses []netip.Addr
	// PodCIDRs are the ranges its pods take their addresses from.
	PodCIDRs []netip.Prefix
	Labels   map[string]string
	// Leaving says that it is being deleted, or that an autoscaler is about to take
	// the machine away.
	Leaving bool
	// Flannel is how flannel's nodes reach its pods; nil where it does not say.
	Flannel *Flannel
	// Where is the file and line or API object it came from, for messages.
	Where string
}

// Workload is something that makes pods: a Deployment, StatefulSet, DaemonSet,
// ReplicaSet or Job.
type Workload struct {
	Name
	Kind string
	// Replicas is how many pods are wanted; for a DaemonSet one a node.
	Replicas int
	PerNode  bool
	// Template is what each pod looks like; its Name is not used.
	Template Pod
	// Where is the file and line or API object it came from, for messages.
	Where string
}

// String is "Kind namespace/name".
func (w *Workload) String() string { return w.Kind + " " + w.Name.String() }
