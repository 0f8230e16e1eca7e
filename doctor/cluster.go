package doctor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// Kinds of objects of the API that checks read, as RBAC rules and kubectl name them.
const (
	Services        = "services"
	EndpointSlices  = "endpointslices.discovery.k8s.io"
	Nodes           = "nodes"
	Pods            = "pods"
	Namespaces      = "namespaces"
	ConfigMaps      = "configmaps"
	Deployments     = "deployments.apps"
	DaemonSets      = "daemonsets.apps"
	Autoscalers     = "horizontalpodautoscalers.autoscaling"
	NetworkPolicies = "networkpolicies.networking.k8s.io"
	Ingresses       = "ingresses.networking.k8s.io"
	IngressClasses  = "ingressclasses.networking.k8s.io"
	ServiceCIDRs    = "servicecidrs.networking.k8s.io"
	GatewayClasses  = "gatewayclasses.gateway.networking.k8s.io"
	Gateways        = "gateways.gateway.networking.k8s.io"
	HTTPRoutes      = "httproutes.gateway.networking.k8s.io"
	ReferenceGrants = "referencegrants.gateway.networking.k8s.io"
	CalicoPools     = "ippools.crd.projectcalico.org"
	CalicoBGP       = "bgpconfigurations.crd.projectcalico.org"
	LocalRedirects  = "ciliumlocalredirectpolicies.cilium.io"
)

// Resource is a kind of objects of the API.
type Resource struct {
	// Name is one of the words of this package, Services and so on.
	Name string
	// Group is "" for the core; Version is the one that is asked for.
	Group, Version string
	// Kind is its name in manifests.
	Kind string

	empty func() collection
}

// Path leads to all of the kind below the address of an API server.
func (r Resource) Path() string {
	plural, _, _ := strings.Cut(r.Name, ".")
	if r.Group == "" {
		return "/api/" + r.Version + "/" + plural
	}
	return "/apis/" + r.Group + "/" + r.Version + "/" + plural
}

var resources = []Resource{
	of[service](Services, "v1", "Service", nil),
	of[slice](EndpointSlices, "v1", "EndpointSlice", nil),
	of[node](Nodes, "v1", "Node", nil),
	of[pod](Pods, "v1", "Pod", func(p *pod) bool { p.Metadata.Annotations = nil; return true }),
	of[named](Namespaces, "v1", "Namespace", nil),
	of[configMap](ConfigMaps, "v1", "ConfigMap", ofNetwork),
	of[workload](Deployments, "v1", "Deployment", nil),
	of[workload](DaemonSets, "v1", "DaemonSet", nil),
	of[autoscaler](Autoscalers, "v2", "HorizontalPodAutoscaler", nil),
	of[networkPolicy](NetworkPolicies, "v1", "NetworkPolicy", nil),
	of[ingress](Ingresses, "v1", "Ingress", nil),
	of[named](IngressClasses, "v1", "IngressClass", nil),
	of[serviceRange](ServiceCIDRs, "v1", "ServiceCIDR", nil),
	of[gatewayClass](GatewayClasses, "v1", "GatewayClass", nil),
	of[gateway](Gateways, "v1", "Gateway", nil),
	of[httpRoute](HTTPRoutes, "v1", "HTTPRoute", nil),
	of[referenceGrant](ReferenceGrants, "v1beta1", "ReferenceGrant", nil),
	of[calicoPool](CalicoPools, "v1", "IPPool", nil),
	of[calicoBGP](CalicoBGP, "v1", "BGPConfiguration", nil),
	of[named](LocalRedirects, "v2", "CiliumLocalRedirectPolicy", nil),
}

// of describes a kind whose objects are kept as T; keep, unless nil, leaves some out.
func of[T any](name, version, kind string, keep func(*T) bool) Resource {
	_, group, _ := strings.Cut(name, ".")
	return Resource{name, group, version, kind, func() collection { return &objects[T]{keep: keep} }}
}

// ofNetwork keeps the ConfigMaps that checks know, and of those the data that is short:
// there may be many others, with anything in them.
func ofNetwork(c *configMap) bool {
	maps.DeleteFunc(c.Data, func(_, text string) bool { return len(text) > longest })
	c.Metadata.Annotations = nil
	known := []string{"kube-proxy", "coredns", "kubelet-config", "cilium-config", "flannel", "calico-config", "nginx"}
	return slices.ContainsFunc(known, func(part string) bool { return strings.Contains(c.Metadata.Name, part) })
}

// collection are the objects of a kind.
type collection interface {
	add(object []byte) error
	fails(why error)
	why() error
}

type objects[T any] struct {
	all  []T
	err  error
	keep func(*T) bool
}

func (o *objects[T]) add(object []byte) error {
	var one T
	if err := json.Unmarshal(object, &one); err != nil {
		return err
	}
	if o.keep == nil || o.keep(&one) {
		o.all = append(o.all, one)
	}
	return nil
}

// fails keeps the words of a server whole, which say more than the cause at their end.
func (o *objects[T]) fails(why error) { o.all, o.err = nil, errors.New(why.Error()) }

func (o *objects[T]) why() error { return o.err }

// Lister gives the objects of a cluster: an API server, or manifests.
type Lister interface {
	// Objects calls each with every object of a kind, as JSON. A kind that the cluster
	// does not know is ErrNoKind; another error says why it could not be read.
	Objects(ctx context.Context, r Resource, each func(object []byte) error) error
	// Document is the document of a kind in a text of YAML or JSON, as JSON.
	Document(text, kind string) ([]byte, error)
}

// ErrNoKind says that a cluster does not know a kind: then it has no objects of it.
var ErrNoKind = errors.New("the cluster does not know this kind of objects")

// errNoCluster is of checks of objects where there are none.
var errNoCluster = errors.New("no cluster is named: say --source kube:KUBECONFIG or dir:FOLDER")

// Cluster is what was read of the objects of a cluster.
type Cluster struct {
	kinds   map[string]collection
	proxy   fact[*proxyConfig]
	kubelet fact[*kubeletConfig]
}

// proxyConfig is a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1).
type proxyConfig struct {
	Mode, ClusterCIDR, DetectLocalMode string
	NodePortAddresses                  []string
	IPTables                           struct{ MinSyncPeriod, SyncPeriod string }
	Conntrack                          struct{ MaxPerCore, Min *float64 }
}

// mode is what is meant where nothing is said.
func (p *proxyConfig) mode() string { return cmp.Or(p.Mode, "iptables") }

// kubeletConfig is a KubeletConfiguration (kubelet.config.k8s.io/v1beta1).
type kubeletConfig struct {
	ClusterDNS    []string
	ClusterDomain string
}

// ReadCluster lists the objects that the checks name, each kind once, and tells progress.
// What cannot be listed is what checks that need it are skipped for; the error is that of
// an end of ctx.
func ReadCluster(ctx context.Context, from Lister, checks []Check, progress io.Writer) (*Cluster, error) {
	c := &Cluster{kinds: map[string]collection{}}
	wanted := slices.DeleteFunc(slices.Clone(resources), func(r Resource) bool {
		return !slices.ContainsFunc(checks, func(c Check) bool { return slices.Contains(c.Reads, r.Name) })
	})
	fmt.Fprintf(progress, "list objects of %d kinds\n", len(wanted))
	for _, r := range wanted {
		found := r.empty()
		if err := from.Objects(ctx, r, found.add); err != nil && !errors.Is(err, ErrNoKind) {
			found.fails(err)
		}
		if err := context.Cause(ctx); err != nil {
			return nil, fmt.Errorf("list %s: %w", r.Name, err)
		}
		c.kinds[r.Name] = found
	}
	c.proxy.is, c.proxy.err = configured[proxyConfig](c, from, "kube-proxy", "KubeProxyConfiguration")
	c.kubelet.is, c.kubelet.err = configured[kubeletConfig](c, from, "kubelet-config", "KubeletConfiguration")
	return c, nil
}

// configured finds a component's configuration in ConfigMaps of its name; nil where
// there is none.
func configured[T any](c *Cluster, from Lister, name, kind string) (*T, error) {
	all, there := c.kinds[ConfigMaps].(*objects[configMap])
	if !there || all.err != nil {
		return nil, nil // who asks for it is told so of ConfigMaps
	}
	for _, m := range all.all {
		for _, text := range m.Data {
			if !strings.HasPrefix(m.Metadata.Name, name) || !strings.Contains(text, kind) {
				continue
			}
			document, err := from.Document(text, kind)
			config := new(T)
			if err == nil {
				err = json.Unmarshal(document, config)
			}
			if err != nil {
				return nil, fmt.Errorf("ConfigMap %s: %w", m.Metadata, err)
			}
			return config, nil
		}
	}
	return nil, nil
}

// isResource says that a fact is a kind of objects.
func isResource(read string) bool {
	return slices.ContainsFunc(resources, func(r Resource) bool { return r.Name == read })
}

// NeedsCluster says that the check reads objects of the API.
func (c *Check) NeedsCluster() bool { return slices.ContainsFunc(c.Reads, isResource) }

// list gives the objects of a kind; where they could not be read, it notes why.
func list[T any](v *view, read string) ([]T, bool) {
	f := fact[[]T]{err: errNoCluster}
	if v.facts.cluster != nil {
		if o, there := v.facts.cluster.kinds[read].(*objects[T]); there {
			f = fact[[]T]{o.all, o.err}
		} else {
			f.err = errNotAsked
		}
	}
	return get(v, read, f)
}

// kubeProxy is the configuration of the cluster's kube-proxy; where there is none, it
// notes that.
func (v *view) kubeProxy() (*proxyConfig, bool) {
	return component(v, "KubeProxyConfiguration", func(c *Cluster) fact[*proxyConfig] { return c.proxy })
}

func component[T any](v *view, kind string, find func(*Cluster) fact[*T]) (*T, bool) {
	if _, ok := list[configMap](v, ConfigMaps); !ok {
		return nil, false
	}
	f := find(v.facts.cluster)
	if f.err == nil && f.is == nil {
		f.err = fmt.Errorf("there is no %s among them", kind)
	}
	return get(v, ConfigMaps, f)
}

// config is a ConfigMap by the name of it, nil where there is none.
func config(all []configMap, name string) map[string]string {
	for _, m := range all {
		if m.Metadata.Name == name {
			return m.Data
		}
	}
	return nil
}

// firesAt is fires for an object.
func (v *view) firesAt(scope string, s Severity, read, format string, values ...any) {
	v.found = append(v.found, Evidence{Scope: harmless(scope), Read: harmless(read), Value: harmless(fmt.Sprintf(format, values...)), Severity: s})
}

// some names the first of many.
func some(names []string) string {
	slices.Sort(names)
	if len(names) > 3 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:3], ", "), len(names)-3)
	}
	return strings.Join(names, ", ")
}

// version is the number of "v1.36.3+k3s1" or "6.1.0-18-amd64".
func version(text string) (major, minor int, ok bool) {
	n, _ := fmt.Sscanf(strings.TrimPrefix(text, "v"), "%d.%d", &major, &minor)
	return major, minor, n == 2
}

// older says that a version is known and below another.
func older(text string, major, minor int) bool {
	m, n, ok := version(text)
	return ok && (m < major || m == major && n < minor)
}
