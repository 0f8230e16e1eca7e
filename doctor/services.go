package doctor

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	virtualIPs = "https://kubernetes.io/docs/reference/networking/virtual-ips/"
	serviceDoc = "https://kubernetes.io/docs/concepts/services-networking/service/"
	proxyDoc   = "https://kubernetes.io/docs/reference/config-api/kube-proxy-config.v1alpha1/"
	nftBlog    = "https://kubernetes.io/blog/2025/02/28/nftables-kube-proxy/"
	scaleDoc   = "https://github.com/kubernetes/community/blob/master/sig-scalability/configs-and-limits/thresholds.md"
	ipvsEnd    = "https://github.com/kubernetes/enhancements/issues/5495"

	// manyServices is from where on Amazon advises against mode iptables.
	manyServices = 1000
	// The thresholds of SIG Scalability, for the largest clusters.
	mostServices, mostOfNamespace, mostEndpoints, mostNodes = 10000, 5000, 250, 5000

	// proxyCap is what kube-proxy 1.36 holds nf_conntrack_max to; proxyPerCore and proxyMin
	// are its defaults (pkg/proxy/apis/config/v1alpha1/defaults.go).
	proxyCap, proxyPerCore, proxyMin = 1 << 20, 32 << 10, 128 << 10
)

var servicesChecks = []Check{{
	ID: "PX-01", Layer: "service", Title: "kube-proxy walks a list of all Services for each new connection", Severity: Warning, Scope: Whole,
	Reads:   []string{ConfigMaps, Services},
	When:    "kube-proxy's mode is iptables, which is also what is meant where none is named, and there are more than 1,000 Services",
	Effect:  "Each new connection is compared with the rules of all Services; changes to them take longer to be in force.",
	Source:  "https://docs.aws.amazon.com/eks/latest/best-practices/ipvs.html (over 1,000 services); " + nftBlog,
	Fix:     "mode: nftables in kube-proxy's configuration (kernel 5.13 and nft 1.0.1 or newer), then restart it on each node",
	Undo:    "mode: iptables, and restart it",
	Pitfall: "iptables is still the default, also of versions in which nftables is finished (1.33); \"IPVS\" is the answer of older articles, and deprecated.",
	look: func(v *view) {
		p, ok := v.kubeProxy()
		all, there := list[service](v, Services)
		switch {
		case !ok || !there:
		case p.mode() == "iptables" && len(all) > manyServices:
			v.fires(Warning, ConfigMaps, "mode %q, and %s Services", p.Mode, thousands(uint64(len(all))))
		default:
			v.sees(ConfigMaps, "mode %q, and %d Services", p.Mode, len(all))
		}
	},
}, {
	ID: "PX-03", Layer: "service", Title: "kube-proxy's mode nftables does not work with a node's kernel", Severity: Critical, Scope: Whole,
	Reads:   []string{ConfigMaps, Nodes},
	When:    "mode nftables, and the kernel of a node is older than 5.13",
	Effect:  "kube-proxy ends with an error on these nodes: Services do not work there, or stay as an earlier one left them.",
	Source:  "https://github.com/kubernetes/kubernetes/blob/v1.36.3/pkg/proxy/nftables/proxier.go (kernel 5.13, nft 1.0.1); " + virtualIPs,
	Fix:     "a kernel of 5.13 or newer on these nodes, or mode: iptables",
	Undo:    "mode: nftables",
	Pitfall: "The host's nft must be 1.0.1 or newer as well, which the API does not say; an older one on the host can no longer list the rules.",
	look: func(v *view) {
		p, ok := v.kubeProxy()
		nodes, there := list[node](v, Nodes)
		if !ok || !there || p.mode() != "nftables" {
			return
		}
		for _, n := range nodes {
			if kernel := n.Status.NodeInfo.KernelVersion; older(kernel, 5, 13) {
				v.firesAt("Node "+n.Metadata.Name, Critical, Nodes, "kernel %s", kernel)
			}
		}
	},
}, {
	ID: "PX-04", Layer: "service", Title: "NodePorts are served at one address of each node only", Severity: Info, Scope: Whole,
	Reads:   []string{ConfigMaps, Services},
	When:    "mode nftables, nodePortAddresses is not set, and Services have NodePorts",
	Effect:  "Mode nftables serves them at the node's primary address alone; 127.0.0.1 and other addresses, which mode iptables serves, refuse.",
	Source:  nftBlog + "; " + proxyDoc + " (nodePortAddresses)",
	Fix:     "nodePortAddresses: [\"0.0.0.0/0\"] in kube-proxy's configuration, if others are meant as well, then restart it on each node; [primary] says that they are not",
	Undo:    "nodePortAddresses: []",
	Pitfall: "It breaks without a message when the mode is changed: look for clients of 127.0.0.1 before.",
	look: func(v *view) {
		p, ok := v.kubeProxy()
		all, there := list[service](v, Services)
		if !ok || !there || p.mode() != "nftables" || len(p.NodePortAddresses) > 0 {
			return
		}
		var with []string
		for _, s := range all {
			if s.Spec.Type == "NodePort" || s.Spec.Type == "LoadBalancer" {
				with = append(with, s.Metadata.String())
			}
		}
		if len(with) > 0 {
			v.fires(Info, ConfigMaps, "mode nftables and no nodePortAddresses; %d Services have NodePorts: %s", len(with), some(with))
		}
	},
}, {
	ID: "PX-10", Layer: "service", Title: "kube-proxy cannot tell pods from others", Severity: Warning, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "detectLocalMode is ClusterCIDR, as where none is named, and clusterCIDR is not set",
	Effect:  "It does not know what comes from outside: such packets to a Service keep their source, and answers may go another way; externalTrafficPolicy: Local treats pods as outsiders.",
	Source:  proxyDoc + " (clusterCIDR, detectLocalMode); https://github.com/kubernetes/kubernetes/blob/v1.36.3/cmd/kube-proxy/app/server_linux.go",
	Fix:     "clusterCIDR: the range of pods, or detectLocalMode: NodeCIDR, in kube-proxy's configuration, then restart it on each node",
	Undo:    "clusterCIDR: \"\"",
	Pitfall: "kubeadm sets it only where podSubnet was given to it.",
	look: func(v *view) {
		p, ok := v.kubeProxy()
		if ok && cmp.Or(p.DetectLocalMode, "ClusterCIDR") == "ClusterCIDR" && p.ClusterCIDR == "" {
			v.fires(Warning, ConfigMaps, "detectLocalMode %q and no clusterCIDR", p.DetectLocalMode)
		}
	},
}, {
	ID: "PX-12", Layer: "service", Title: "a Service has nobody to serve it", Severity: Warning, Scope: Whole,
	Reads:   []string{Services, EndpointSlices, Deployments},
	When:    "a Service with a selector has no endpoint that is ready; information where its Deployment is scaled to 0",
	Effect:  "Connections to it are refused at once, as if nothing listened; the client does not learn that the Service is known.",
	Source:  virtualIPs + "; " + serviceDoc + " (services in Kubernetes)",
	Fix:     "kubectl -n NAMESPACE describe service NAME and kubectl -n NAMESPACE get pods -l SELECTOR: the selector fits no pod, or none of them is ready",
	Undo:    "nothing is changed by looking",
	Pitfall: "The refusal looks the same as that of a pod in which nothing listens.",
	look:    withoutEndpoints,
}, {
	ID: "PX-13", Layer: "service", Title: "a load balancer's clients are hidden, and take one more hop", Severity: Info, Scope: Whole,
	Reads:   []string{Services},
	When:    "a Service of type LoadBalancer has externalTrafficPolicy: Cluster",
	Effect:  "A node that has no endpoint sends the packet on to another one, and puts its own address in the place of the client's.",
	Source:  "https://kubernetes.io/docs/tasks/access-application-cluster/create-external-load-balancer/#preserving-the-client-source-ip",
	Fix:     "kubectl -n NAMESPACE patch service NAME -p '{\"spec\":{\"externalTrafficPolicy\":\"Local\"}}', where its pods are spread over the nodes",
	Undo:    "kubectl -n NAMESPACE patch service NAME -p '{\"spec\":{\"externalTrafficPolicy\":\"Cluster\"}}'",
	Pitfall: "With Local, nodes without an endpoint drop what still reaches them, and load is shared between nodes, not between pods.",
	look: func(v *view) {
		all, _ := list[service](v, Services)
		for _, s := range all {
			if s.Spec.Type == "LoadBalancer" && cmp.Or(s.Spec.ExternalTrafficPolicy, "Cluster") == "Cluster" {
				v.firesAt(s.scope(), Info, Services, "externalTrafficPolicy: Cluster")
			}
		}
	},
}, {
	ID: "PX-14", Layer: "service", Title: "there is more of something than Kubernetes is tested with", Severity: Warning, Scope: Whole,
	Reads:   []string{Services, EndpointSlices, Nodes},
	When:    "more than 10,000 Services, 5,000 of them in a namespace, 250 endpoints of a Service, or 5,000 nodes",
	Effect:  "The control plane and the proxies take longer to follow changes; what they promise of their times does not hold.",
	Source:  scaleDoc,
	Fix:     "several clusters, or Services of fewer endpoints",
	Undo:    "put them together again",
	Pitfall: "These are no hard limits, and they are for the largest clusters: smaller ones reach theirs earlier.",
	look:    overThresholds,
}, {
	ID: "PX-17", Layer: "service", Title: "kube-proxy is configured for mode ipvs", Severity: Warning, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "the KubeProxyConfiguration of the cluster says mode: ipvs",
	Effect:  "The mode is deprecated since Kubernetes 1.35 and will be removed; where its kernel modules are missing kube-proxy does not start.",
	Source:  ipvsEnd + "; " + nftBlog,
	Fix:     "mode: nftables in kube-proxy's configuration, then restart it on each node",
	Undo:    "mode: ipvs, and restart it",
	Pitfall: "Its schedulers (least connections and so on) count on each node by itself. It does not fall back to iptables any more.",
	look: func(v *view) {
		if p, ok := v.kubeProxy(); ok && p.mode() == "ipvs" {
			v.fires(Warning, ConfigMaps, "mode: ipvs")
		} else if ok {
			v.sees(ConfigMaps, "mode: %s", p.mode())
		}
	},
}, {
	ID: "PX-18", Layer: "service", Title: "kube-proxy is told to wait before it applies changes", Severity: Info, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "iptables.minSyncPeriod is more than 1 s, its default, or iptables.syncPeriod is 1 h or more, in mode iptables",
	Effect:  "An endpoint that is gone goes on to be used for up to that time; rules that somebody else damaged are mended after syncPeriod.",
	Source:  virtualIPs + "#minimize-iptables-restore",
	Fix:     "remove iptables.minSyncPeriod and iptables.syncPeriod from kube-proxy's configuration, then restart it on each node",
	Undo:    "put them back",
	Pitfall: "Both were advised for kube-proxy before 1.28, which wrote all rules for each change.",
	look: func(v *view) {
		p, ok := v.kubeProxy()
		if !ok || p.mode() != "iptables" {
			return
		}
		for _, row := range []struct {
			name, is string
			over     time.Duration
		}{{"minSyncPeriod", p.IPTables.MinSyncPeriod, time.Second + 1}, {"syncPeriod", p.IPTables.SyncPeriod, time.Hour}} {
			if d, err := time.ParseDuration(row.is); err == nil && d >= row.over {
				v.fires(Info, ConfigMaps, "iptables.%s: %s", row.name, row.is)
			}
		}
	},
}, {
	ID: "PX-19", Layer: "service", Title: "a Service has externalIPs", Severity: Warning, Scope: Whole,
	Reads:   []string{Services},
	When:    "spec.externalIPs is not empty",
	Effect:  "The field is deprecated since Kubernetes 1.36. Whoever may write Services can take any address with it, and so the traffic to it (CVE-2020-8554).",
	Source:  "https://github.com/kubernetes/enhancements/issues/5707; https://github.com/kubernetes/kubernetes/issues/97076",
	Fix:     "type: LoadBalancer with an implementation for one's own machines (MetalLB, Cilium), or a Gateway",
	Undo:    "put spec.externalIPs back",
	Pitfall: "The admission plug-in DenyServiceExternalIPs forbids new ones only.",
	look: func(v *view) {
		all, _ := list[service](v, Services)
		for _, s := range all {
			if len(s.Spec.ExternalIPs) > 0 {
				v.firesAt(s.scope(), Warning, Services, "externalIPs: %s", strings.Join(s.Spec.ExternalIPs, ", "))
			}
		}
	},
}, {
	ID: "PX-20", Layer: "service", Title: "a Service names a port that its pods do not have", Severity: Warning, Scope: Whole,
	Reads:   []string{Services, Pods},
	When:    "targetPort is a name, there are pods that the Service selects, and none of their containers has a port of that name",
	Effect:  "The Service has no endpoints for that port: connections to it are refused.",
	Source:  serviceDoc + "#field-spec-ports",
	Fix:     "give the container's port that name, or write the number as targetPort",
	Undo:    "put the targetPort back",
	Pitfall: "A number needs no port in the pod; a name is looked up in each pod by itself.",
	look:    portNames,
}, {
	ID: "PX-21", Layer: "service", Title: "a Service of the node's own endpoints has none on some nodes", Severity: Info, Scope: Whole,
	Reads:   []string{Services, EndpointSlices, Nodes},
	When:    "internalTrafficPolicy is Local, and a node that pods may be scheduled to has no ready endpoint",
	Effect:  "To clients on these nodes the Service has no endpoints at all, though others have.",
	Source:  "https://kubernetes.io/docs/concepts/services-networking/service-traffic-policy/",
	Fix:     "a DaemonSet that runs on these nodes as well, or internalTrafficPolicy: Cluster",
	Undo:    "internalTrafficPolicy: Local",
	Pitfall: "trafficDistribution: PreferSameNode prefers the node's own endpoints and takes others where there are none.",
	look:    localOnly,
}, {
	ID: "PX-22", Layer: "service", Title: "a Service waits for a load balancer", Severity: Warning, Scope: Whole,
	Reads:   []string{Services},
	When:    "type LoadBalancer, without an address in its status",
	Effect:  "Nobody outside can reach it but by its NodePort. In a cluster without a provider of load balancers it stays so.",
	Source:  serviceDoc + "#loadbalancer",
	Fix:     "kubectl -n NAMESPACE describe service NAME says what its provider reports; where there is none, install one (MetalLB, kube-vip), or use type: NodePort",
	Undo:    "put the type back",
	Pitfall: "Kubernetes itself makes no load balancers: without a cloud somebody has to.",
	look: func(v *view) {
		all, _ := list[service](v, Services)
		for _, s := range all {
			if s.Spec.Type == "LoadBalancer" && s.Metadata.lives() && len(s.Status.LoadBalancer.Ingress) == 0 {
				v.firesAt(s.scope(), Warning, Services, "no address in status.loadBalancer")
			}
		}
	},
}, {
	ID: "PX-23", Layer: "service", Title: "two proxies serve the same Services", Severity: Warning, Scope: Whole,
	Reads:   []string{ConfigMaps, DaemonSets},
	When:    "a DaemonSet kube-proxy has pods, and Cilium's kube-proxy-replacement is true",
	Effect:  "Both translate; which one wins depends on the path. kube-proxy's rules cost time in each packet that the host's stack sees, and its entries fill the connection tracking table.",
	Source:  "https://docs.cilium.io/en/stable/network/kubernetes/kubeproxy-free/",
	Fix:     "kubectl -n kube-system get daemonset kube-proxy -o yaml > kube-proxy.yaml, kubectl -n kube-system delete daemonset kube-proxy, then remove its rules on each node (millrace kube-proxy remove)",
	Undo:    "kubectl apply -f kube-proxy.yaml",
	Pitfall: "Deleting the DaemonSet alone leaves its rules until the node restarts (PX-08).",
	look: func(v *view) {
		all, ok := list[configMap](v, ConfigMaps)
		sets, there := list[workload](v, DaemonSets)
		if !ok || !there || config(all, "cilium-config")["kube-proxy-replacement"] != "true" {
			return
		}
		for _, d := range sets {
			if d.Metadata.Name == "kube-proxy" && (d.Status.DesiredNumberScheduled > 0 || !d.Metadata.lives()) {
				v.firesAt("DaemonSet "+d.Metadata.String(), Warning, DaemonSets, "%d pods, and kube-proxy-replacement is true", d.Status.DesiredNumberScheduled)
			}
		}
	},
}, {
	ID: "PX-24", Layer: "service", Title: "kube-proxy's range of pods lacks nodes' ranges", Severity: Warning, Scope: Whole,
	Reads:   []string{ConfigMaps, Nodes},
	When:    "clusterCIDR is set, and a node's podCIDR of the same family is not within it",
	Effect:  "Pods of these nodes count as clients from outside: what they send to Services is masqueraded, and policies see the node's address.",
	Source:  proxyDoc + " (clusterCIDR)",
	Fix:     "clusterCIDR: the whole range of pods, in kube-proxy's configuration, then restart it on each node",
	Undo:    "put clusterCIDR back",
	Pitfall: "It is the second place of the same number; the controller manager's --cluster-cidr is the first.",
	look: func(v *view) {
		p, ok := v.kubeProxy()
		nodes, there := list[node](v, Nodes)
		if !ok || !there || p.ClusterCIDR == "" || cmp.Or(p.DetectLocalMode, "ClusterCIDR") != "ClusterCIDR" {
			return
		}
		outside(v, nodes, prefixes(strings.Split(p.ClusterCIDR, ",")), "clusterCIDR", Warning)
	},
}, {
	ID: "PX-25", Layer: "service", Title: "a Service leads to pods that are not there", Severity: Warning, Scope: Whole,
	Reads:   []string{EndpointSlices, Pods},
	When:    "an endpoint that is ready names a pod that the API does not have",
	Effect:  "A share of the connections goes to an address that nobody has, or that another pod has by now.",
	Source:  "https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/#ownership",
	Fix:     "kubectl -n NAMESPACE delete endpointslice NAME: its controller makes it anew. Who makes it by hand (label endpointslice.kubernetes.io/managed-by) has to correct it",
	Undo:    "nothing has to be taken back, where a controller makes it anew",
	Pitfall: "A pod that ended just now is not meant: slices follow within a second, where the controller manager runs.",
	look:    lostPods,
}, {
	ID: "CT-14", Layer: "conntrack", Title: "kube-proxy lowers nf_conntrack_max on large nodes", Severity: Warning, Scope: Whole,
	Reads:   []string{ConfigMaps, Nodes},
	When:    "a node of Kubernetes 1.36 or newer has so many cores that conntrack.maxPerCore times them is over 1,048,576",
	Effect:  "From 1.36 on the result is cut to 1,048,576, before conntrack.min is looked at: a node of 64 cores has half of what it had.",
	Source:  "https://github.com/kubernetes/kubernetes/issues/141943; https://github.com/kubernetes/kubernetes/blob/v1.36.3/cmd/kube-proxy/app/conntrack.go",
	Fix:     "conntrack: {maxPerCore: 0} in kube-proxy's configuration and nf_conntrack_max in a file of sysctl.d; or {maxPerCore: 1024, min: N}; then restart it on each node",
	Undo:    "put conntrack back",
	Pitfall: "A larger min does nothing: the branch of maxPerCore returns before it.",
	look:    cappedConntrack,
}}

// outside fires for nodes of which a range of pods is not within one of the ranges.
func outside(v *view, nodes []node, ranges []netip.Prefix, of string, s Severity) {
	for _, n := range nodes {
		for _, p := range n.podRanges() {
			sameFamily := func(r netip.Prefix) bool { return r.Addr().Is4() == p.Addr().Is4() }
			within := func(r netip.Prefix) bool { return r.Bits() <= p.Bits() && r.Contains(p.Addr()) }
			if slices.ContainsFunc(ranges, sameFamily) && !slices.ContainsFunc(ranges, within) {
				v.firesAt("Node "+n.Metadata.Name, s, Nodes, "podCIDR %s is not within %s %v", p, of, ranges)
			}
		}
	}
}

// serviceOf is "namespace/name" of the Service that a slice is for.
func (s *slice) serviceOf() string {
	if name := s.Metadata.Labels["kubernetes.io/service-name"]; name != "" {
		return s.Metadata.Namespace + "/" + name
	}
	return ""
}

// endpointsOf are the endpoints of each Service, by "namespace/name"; those that are in
// several slices (of two families) once.
func endpointsOf(slices []slice) map[string]map[string]endpoint {
	all := map[string]map[string]endpoint{}
	for _, s := range slices {
		name := s.serviceOf()
		if all[name] == nil {
			all[name] = map[string]endpoint{}
		}
		for i, e := range s.Endpoints {
			who := e.TargetRef.Namespace + "/" + e.TargetRef.Name
			if e.TargetRef.Name == "" {
				who = strings.Join(e.Addresses, ",") + strconv.Itoa(i)
			}
			all[name][who] = e
		}
	}
	return all
}

func withoutEndpoints(v *view) {
	all, ok := list[service](v, Services)
	found, there := list[slice](v, EndpointSlices)
	deployments, ok2 := list[workload](v, Deployments)
	if !ok || !there || !ok2 {
		return
	}
	of := endpointsOf(found)
	for _, s := range all {
		if len(s.Spec.Selector) == 0 || !s.served() || !s.Metadata.lives() {
			continue
		}
		endpoints := of[s.Metadata.String()]
		ready := false
		for _, e := range endpoints {
			ready = ready || e.ready()
		}
		// Those of which the same is said are one line on a screen.
		switch {
		case ready:
		case len(endpoints) > 0:
			v.firesAt(s.scope(), Warning, EndpointSlices, "none of its endpoints is ready")
		case asleep(s, deployments):
			v.firesAt(s.scope(), Info, Deployments, "no endpoints: its Deployment has replicas: 0")
		default:
			v.firesAt(s.scope(), Warning, EndpointSlices, "no endpoints")
		}
	}
}

// asleep says that the Deployments whose pods a Service selects are meant to have none.
func asleep(s service, deployments []workload) (yes bool) {
	for _, d := range deployments {
		if d.Metadata.Namespace != s.Metadata.Namespace || !selects(s.Spec.Selector, d.Spec.Template.Metadata.Labels) {
			continue
		}
		if d.Spec.Replicas == nil || *d.Spec.Replicas > 0 {
			return false
		}
		yes = true
	}
	return yes
}

func overThresholds(v *view) {
	all, ok := list[service](v, Services)
	found, ok2 := list[slice](v, EndpointSlices)
	nodes, ok3 := list[node](v, Nodes)
	if !ok || !ok2 || !ok3 {
		return
	}
	over := func(scope, read string, n, most int, what string) {
		if n > most {
			v.firesAt(scope, Warning, read, "%s %s; tested with %s", thousands(uint64(n)), what, thousands(uint64(most)))
		}
	}
	over(v.Name, Services, len(all), mostServices, "Services")
	over(v.Name, Nodes, len(nodes), mostNodes, "nodes")
	in := map[string]int{}
	for _, s := range all {
		in[s.Metadata.Namespace]++
	}
	for _, namespace := range slices.Sorted(maps.Keys(in)) {
		over("Namespace "+namespace, Services, in[namespace], mostOfNamespace, "Services")
	}
	of := endpointsOf(found)
	for _, name := range slices.Sorted(maps.Keys(of)) {
		over("Service "+name, EndpointSlices, len(of[name]), mostEndpoints, "endpoints")
	}
}

func portNames(v *view) {
	all, ok := list[service](v, Services)
	pods, there := list[pod](v, Pods)
	if !ok || !there {
		return
	}
	in := map[string][]pod{}
	for _, p := range pods {
		if !p.ended() {
			in[p.Metadata.Namespace] = append(in[p.Metadata.Namespace], p)
		}
	}
	for _, s := range all {
		for _, port := range s.Spec.Ports {
			name := string(port.TargetPort)
			if _, err := strconv.Atoi(name); name == "" || err == nil {
				continue
			}
			selected, named := 0, 0
			for _, p := range in[s.Metadata.Namespace] {
				if !selects(s.Spec.Selector, p.Metadata.Labels) {
					continue
				}
				selected++
				if slices.ContainsFunc(slices.Concat(p.Spec.InitContainers, p.Spec.Containers), func(c container) bool { return c.has(name) }) {
					named++
				}
			}
			if selected > 0 && named == 0 {
				v.firesAt(s.scope(), Warning, Services, "targetPort %s, which none of its %d pods has", name, selected)
			}
		}
	}
}

// has says that the container has a port of that name.
func (c *container) has(name string) bool {
	for _, p := range c.Ports {
		if p.Name == name {
			return true
		}
	}
	return false
}

func localOnly(v *view) {
	all, ok := list[service](v, Services)
	found, ok2 := list[slice](v, EndpointSlices)
	nodes, ok3 := list[node](v, Nodes)
	if !ok || !ok2 || !ok3 {
		return
	}
	of := endpointsOf(found)
	for _, s := range all {
		if s.Spec.InternalTrafficPolicy != "Local" || !s.served() {
			continue
		}
		has := map[string]bool{}
		for _, e := range of[s.Metadata.String()] {
			has[e.NodeName] = has[e.NodeName] || e.ready()
		}
		var without []string
		for _, n := range nodes {
			if !has[n.Metadata.Name] && !n.Spec.Unschedulable {
				without = append(without, n.Metadata.Name)
			}
		}
		if len(without) > 0 {
			v.firesAt(s.scope(), Info, EndpointSlices, "internalTrafficPolicy: Local, and no ready endpoint on %s", some(without))
		}
	}
}

func lostPods(v *view) {
	found, ok := list[slice](v, EndpointSlices)
	pods, there := list[pod](v, Pods)
	if !ok || !there {
		return
	}
	known := map[string]bool{}
	for _, p := range pods {
		known[p.Metadata.String()] = true
	}
	for _, s := range found {
		for _, e := range s.Endpoints {
			name := meta{Namespace: cmp.Or(e.TargetRef.Namespace, s.Metadata.Namespace), Name: e.TargetRef.Name}.String()
			if e.TargetRef.Kind == "Pod" && e.ready() && s.Metadata.lives() && !known[name] {
				v.firesAt("EndpointSlice "+s.Metadata.String(), Warning, EndpointSlices, "%s is pod %s, which is not there", strings.Join(e.Addresses, ", "), name)
			}
		}
	}
}

func cappedConntrack(v *view) {
	p, ok := v.kubeProxy()
	nodes, there := list[node](v, Nodes)
	if !ok || !there {
		return
	}
	perCore, least := float64(proxyPerCore), float64(proxyMin)
	if p.Conntrack.MaxPerCore != nil {
		perCore = *p.Conntrack.MaxPerCore
	}
	if p.Conntrack.Min != nil {
		least = *p.Conntrack.Min
	}
	for _, n := range nodes {
		cores, known := n.Status.Capacity["cpu"].quantity()
		kubelet := n.Status.NodeInfo.KubeletVersion
		_, _, said := version(kubelet)
		if known && said && !older(kubelet, 1, 36) && perCore*cores > proxyCap {
			v.firesAt("Node "+n.Metadata.Name, Warning, Nodes, "%.0f cores, Kubernetes %s: %d, and %.0f before 1.36", cores, kubelet, proxyCap, max(perCore*cores, least))
		}
	}
}
