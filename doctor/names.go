package doctor

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
)

const (
	dnsScaling = "https://github.com/coredns/deployment/blob/master/kubernetes/Scaling_CoreDNS.md"
	dnsPods    = "https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/"

	// Of the cluster-proportional autoscaler's usual settings for DNS.
	coresPerReplica, nodesPerReplica = 256, 16

	// nodeLocal is the address that NodeLocal DNSCache listens at, where it is not given
	// another one.
	nodeLocal = "169.254.20.10"
)

var namesChecks = []Check{{
	ID: "DN-01", Layer: "dns", Title: "a name of the outside is looked up in each search domain first", Severity: Info, Scope: Whole,
	Reads:   []string{Pods, ConfigMaps},
	When:    "pods have dnsPolicy ClusterFirst and no option ndots of their own, and CoreDNS has no autopath",
	Effect:  "ndots:5 sends a name with fewer than five dots through all search domains: an external name costs 5 queries in the place of 1, or 10 for both families.",
	Source:  dnsScaling + " (5 backend queries); " + dnsPods + "#pod-dns-config",
	Fix:     "dnsConfig: {options: [{name: ndots, value: \"2\"}]} in pods that ask for many external names, or a dot at the end of these names",
	Undo:    "remove dnsConfig",
	Pitfall: "ndots:1 asks the outside for service.namespace first (DN-12). The kubelet has no setting for it.",
	look:    manyQueries,
}, {
	ID: "DN-02", Layer: "dns", Title: "there are too few DNS servers", Severity: Warning, Scope: Whole,
	Reads:   []string{Pods, Nodes, Deployments, Autoscalers},
	When:    "fewer than 2 DNS pods (k8s-app: kube-dns) are ready, of several nodes, or fewer than one for each 256 cores or 16 nodes",
	Effect:  "One server is none while it is replaced or its node is lost; too few are slow when they are asked most.",
	Source:  "https://kubernetes.io/docs/tasks/administer-cluster/dns-horizontal-autoscaling/ (coresPerReplica 256, nodesPerReplica 16)",
	Fix:     "kubectl -n kube-system scale deployment coredns --replicas=N, or the cluster-proportional autoscaler",
	Undo:    "kubectl -n kube-system scale deployment coredns --replicas=N, with N what it was",
	Pitfall: "An autoscaler takes back what is scaled by hand: its own minimum is what to raise. One by CPU adds servers after names were slow; the proportional one's own minimum is 1.",
	look:    fewServers,
}, {
	ID: "DN-03", Layer: "dns", Title: "all DNS servers are on one node", Severity: Warning, Scope: Whole,
	Reads:   []string{Pods, Nodes},
	When:    "two or more DNS pods are all on the same node, of several nodes",
	Effect:  "When that node is lost or busy, no name resolves in the whole cluster.",
	Source:  "https://kubernetes.io/docs/concepts/scheduling-eviction/topology-spread-constraints/",
	Fix:     "topologySpreadConstraints by kubernetes.io/hostname in CoreDNS' Deployment, then kubectl -n kube-system rollout restart deployment coredns",
	Undo:    "remove the constraint",
	Pitfall: "A preferred anti-affinity counts only when pods are placed: after a node came back they stay together.",
	look: func(v *view) {
		pods, nodes, ok := v.dnsPods()
		if !ok || len(nodes) < 2 {
			return
		}
		on := map[string]bool{}
		for _, p := range pods {
			on[p.Spec.NodeName] = true
		}
		if len(pods) > 1 && len(on) == 1 {
			v.fires(Warning, Pods, "%d DNS pods, all on node %s", len(pods), pods[0].Spec.NodeName)
		} else {
			v.sees(Pods, "%d DNS pods on %d nodes", len(pods), len(on))
		}
	},
}, {
	ID: "DN-04", Layer: "dns", Title: "CoreDNS has less memory than the cluster needs", Severity: Warning, Scope: Whole,
	Reads:   []string{Pods, Services, ConfigMaps},
	When:    "the limit is below (Pods + Services) * 0.000858 + 49.1 MB, or * 0.0025 + 50.5 with autopath",
	Effect:  "It is killed when its cache and its picture of the cluster have grown, and again after each start.",
	Source:  dnsScaling + " (memory and pods)",
	Fix:     "resources.limits.memory of CoreDNS' container of that or more",
	Undo:    "put the limit back",
	Pitfall: "The need grows with the cluster, not with the queries.",
	look:    serverMemory,
}, {
	ID: "DN-05", Layer: "dns", Title: "CoreDNS keeps no answers", Severity: Info, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "no server block of the Corefile has the plug-in cache",
	Effect:  "Each query of the same external name goes to the outside again, and a failure there is met at once.",
	Source:  "https://coredns.io/plugins/cache/; https://kubernetes.io/docs/tasks/administer-cluster/dns-custom-nameservers/ (cache 30 in the usual Corefile)",
	Fix:     "cache 30 in the server block",
	Undo:    "remove the line",
	Pitfall: "A name that is not there is kept as well: a new Service is seen after up to that time by those who asked before it was made.",
	look: func(v *view) {
		if c, ok := v.corefile(); ok && !c.has("cache") {
			v.fires(Info, ConfigMaps, "Corefile: no plug-in cache")
		}
	},
}, {
	ID: "DN-12", Layer: "dns", Title: "a pod asks the outside for names of the cluster", Severity: Info, Scope: Whole,
	Reads:   []string{Pods},
	When:    "dnsConfig sets ndots to 0 or 1",
	Effect:  "service.namespace has a dot: it is asked for as it stands first, at the outside, and only then in the search domains. Where such a domain exists, it wins.",
	Source:  "https://man7.org/linux/man-pages/man5/resolv.conf.5.html (ndots); " + dnsPods + "#pod-dns-config",
	Fix:     "ndots 2 in dnsConfig",
	Undo:    "put the value back",
	Pitfall: "Short names of the own namespace go on to work, so that a quick test finds nothing.",
	look: func(v *view) {
		pods, _ := list[pod](v, Pods)
		for _, p := range pods {
			for _, o := range p.Spec.DNSConfig.Options {
				if o.Name == "ndots" && (o.Value == "0" || o.Value == "1") {
					v.firesAt(p.scope(), Info, Pods, "ndots:%s", o.Value)
				}
			}
		}
	},
}, {
	ID: "DN-13", Layer: "dns", Title: "CoreDNS asks itself", Severity: Critical, Scope: Whole,
	Reads:   []string{ConfigMaps, Services},
	When:    "forward in the Corefile names port 53 of a loopback address, or of the ClusterIP of the DNS Service",
	Effect:  "Each name of the outside goes round until it is given up; the plug-in loop ends CoreDNS for it.",
	Source:  "https://coredns.io/plugins/loop/ (troubleshooting loops in Kubernetes clusters)",
	Fix:     "forward . ADDRESS in the Corefile, with a name server outside the cluster",
	Undo:    "put the line back",
	Pitfall: "forward . /etc/resolv.conf means the node's file as the kubelet gives it: 127.0.0.53 in it is DN-06.",
	look:    forwardsToItself,
}, {
	ID: "DN-14", Layer: "dns", Title: "queries are lost when a DNS server is replaced", Severity: Info, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "health in the Corefile has no lameduck",
	Effect:  "A server that is told to end does so at once, while proxies still send to it: each query that meets it is a wait of 5 s.",
	Source:  "https://coredns.io/plugins/health/ (lameduck); https://kubernetes.io/docs/tasks/administer-cluster/dns-custom-nameservers/ (lameduck 5s in the usual Corefile)",
	Fix:     "in the Corefile, on three lines: health {, lameduck 5s, and }",
	Undo:    "remove it",
	Pitfall: "On one line CoreDNS takes the brace for an argument, and does not start. Times of several server blocks add up, and all must fit into the pod's terminationGracePeriodSeconds.",
	look: func(v *view) {
		if c, ok := v.corefile(); ok && !c.says("health", "lameduck") {
			v.fires(Info, ConfigMaps, "Corefile: health without lameduck")
		}
	},
}, {
	ID: "DN-15", Layer: "dns", Title: "autopath does not work as CoreDNS is configured", Severity: Warning, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "the Corefile has autopath @kubernetes, and the plug-in kubernetes has no line pods verified",
	Effect:  "It does not know whose query it is, and so not the search domains: nothing is shortened.",
	Source:  "https://coredns.io/plugins/autopath/; https://coredns.io/plugins/kubernetes/ (autopath)",
	Fix:     "pods verified in the block of kubernetes",
	Undo:    "put the line back",
	Pitfall: "It watches all pods then, with three times the memory for each (DN-04).",
	look: func(v *view) {
		if c, ok := v.corefile(); ok && c.says("autopath", "@kubernetes") && !c.says("kubernetes", "pods verified") {
			v.fires(Warning, ConfigMaps, "Corefile: autopath @kubernetes without pods verified")
		}
	},
}, {
	ID: "DN-16", Layer: "dns", Title: "the DNS servers have a CPU limit", Severity: Info, Scope: Whole,
	Reads:   []string{Pods},
	When:    "a container of a DNS pod has resources.limits.cpu",
	Effect:  "When more is asked than it allows, CoreDNS stands still for the rest of each tenth of a second; queries wait or are lost (HS-26, DN-10).",
	Source:  "https://docs.kernel.org/scheduler/sched-bwc.html; " + dnsScaling + " (CPU and QPS)",
	Fix:     "remove resources.limits.cpu and keep a request",
	Undo:    "put the limit back",
	Pitfall: "The graph of its use stays below the limit: what is held back is not in it.",
	look: func(v *view) {
		all, _ := list[pod](v, Pods)
		for _, p := range servers(all) {
			for _, c := range p.Spec.Containers {
				if limit := c.Resources.Limits["cpu"]; limit != "" {
					v.firesAt(p.scope(), Info, Pods, "%s: limits.cpu %s", c.Name, limit)
				}
			}
		}
	},
}, {
	ID: "DN-17", Layer: "dns", Title: "a pod in its node's network does not find Services", Severity: Info, Scope: Whole,
	Reads:   []string{Pods},
	When:    "hostNetwork with dnsPolicy ClusterFirst, outside the namespace kube-system",
	Effect:  "With hostNetwork, ClusterFirst counts as Default: the pod asks the node's name servers, which do not know Services.",
	Source:  dnsPods + "#pod-s-dns-policy",
	Fix:     "dnsPolicy: ClusterFirstWithHostNet",
	Undo:    "dnsPolicy: ClusterFirst",
	Pitfall: "What is needed before DNS works, network plug-ins for one, must not have it: it would wait for itself.",
	look: func(v *view) {
		pods, _ := list[pod](v, Pods)
		for _, p := range pods {
			if p.Spec.HostNetwork && p.Spec.DNSPolicy == "ClusterFirst" && p.Metadata.Namespace != "kube-system" && !p.ended() {
				v.firesAt(p.scope(), Info, Pods, "hostNetwork, and dnsPolicy: ClusterFirst")
			}
		}
	},
}, {
	ID: "DN-18", Layer: "dns", Title: "the kubelets name a DNS server that is not there", Severity: Critical, Scope: Whole,
	Reads:   []string{ConfigMaps, Services},
	When:    "clusterDNS of the KubeletConfiguration is neither an address of the Service kube-dns nor link-local (169.254.20.10 or the like: NodeLocal DNSCache)",
	Effect:  "New pods have an address in resolv.conf at which nobody answers: no name resolves in them.",
	Source:  "https://kubernetes.io/docs/reference/config-api/kubelet-config.v1beta1/ (clusterDNS); https://kubernetes.io/docs/tasks/administer-cluster/nodelocaldns/",
	Fix:     "clusterDNS: [the ClusterIP of kube-dns] in the kubelets' configuration, then restart them and make the pods anew; or make the Service anew with that clusterIP",
	Undo:    "put clusterDNS back and restart the kubelets",
	Pitfall: "A Service that is deleted and made again gets another address; the kubelets keep the old one, and so do running pods.",
	look:    kubeletsAsk,
}, {
	ID: "DN-19", Layer: "dns", Title: "the DNS cache on each node is passed by", Severity: Warning, Scope: Whole,
	Reads:   []string{ConfigMaps, DaemonSets, LocalRedirects},
	When:    "a DaemonSet node-local-dns, Cilium's kube-proxy-replacement is true, and there is no CiliumLocalRedirectPolicy",
	Effect:  "The cache takes the DNS Service's address on its node by rules of iptables, which Cilium's programs never reach: queries go to CoreDNS as before.",
	Source:  "https://docs.cilium.io/en/stable/network/kubernetes/local-redirect-policy/#node-local-dns-cache",
	Fix:     "a CiliumLocalRedirectPolicy for kube-dns, and node-local-dns without its own rules, as the page says",
	Undo:    "kubectl -n kube-system delete ciliumlocalredirectpolicy NAME, and node-local-dns as it was",
	Pitfall: "Names resolve all the same, so that nobody notices.",
	look: func(v *view) {
		all, ok := list[configMap](v, ConfigMaps)
		sets, ok2 := list[workload](v, DaemonSets)
		redirects, ok3 := list[named](v, LocalRedirects)
		if !ok || !ok2 || !ok3 || config(all, "cilium-config")["kube-proxy-replacement"] != "true" || len(redirects) > 0 {
			return
		}
		for _, d := range sets {
			if strings.Contains(d.Metadata.Name, "node-local-dns") || strings.Contains(d.Metadata.Name, "nodelocaldns") {
				v.firesAt("DaemonSet "+d.Metadata.String(), Warning, DaemonSets, "kube-proxy-replacement is true, and no CiliumLocalRedirectPolicy")
			}
		}
	},
}, {
	ID: "DN-20", Layer: "dns", Title: "CoreDNS logs every query", Severity: Info, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "the Corefile has the plug-in log without a class",
	Effect:  "Each query writes a line; its manual warns of the cost on busy servers.",
	Source:  "https://coredns.io/plugins/log/",
	Fix:     "remove the line log, or log only what fails, on three lines: log . {, class error, and }",
	Undo:    "put the line back",
	Pitfall: "On one line CoreDNS takes the brace for a class, and does not start. errors is another plug-in, which belongs there.",
	look: func(v *view) {
		if c, ok := v.corefile(); ok && c.has("log") && !c.says("log", "class") {
			v.fires(Info, ConfigMaps, "Corefile: log")
		}
	},
}, {
	ID: "DN-21", Layer: "dns", Title: "two set the number of DNS servers", Severity: Warning, Scope: Whole,
	Reads:   []string{Deployments, Autoscalers},
	When:    "two HorizontalPodAutoscalers, or one and a cluster-proportional-autoscaler, scale the Deployment of the DNS servers",
	Effect:  "Each sets its own number again and again: servers are ended and made, and queries to those that end are lost (DN-14).",
	Source:  "https://kubernetes.io/docs/tasks/administer-cluster/dns-horizontal-autoscaling/; https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/",
	Fix:     "keep one: kubectl -n kube-system delete hpa NAME, or kubectl -n kube-system scale deployment AUTOSCALER --replicas=0",
	Undo:    "make the HorizontalPodAutoscaler anew, or scale the other back to 1",
	Pitfall: "Providers have autoscalers of their own that are no objects of the cluster: those are not seen.",
	look:    twoScalers,
}}

// servers are the pods of the cluster's DNS, those of Kubernetes' label.
func servers(all []pod) (dns []pod) {
	for _, p := range all {
		if p.Metadata.Labels["k8s-app"] == "kube-dns" && p.Metadata.Namespace == "kube-system" && !p.ended() {
			dns = append(dns, p)
		}
	}
	return dns
}

// dnsPods are those that are ready, and the nodes.
func (v *view) dnsPods() (ready []pod, nodes []node, ok bool) {
	pods, ok := list[pod](v, Pods)
	nodes, there := list[node](v, Nodes)
	if !ok || !there {
		return nil, nil, false
	}
	dns := servers(pods)
	if len(dns) == 0 {
		v.lacks(Pods, "none has the label k8s-app: kube-dns in kube-system, so that it is not known who serves names")
	}
	for _, p := range dns {
		if p.ready() {
			ready = append(ready, p)
		}
	}
	return ready, nodes, len(dns) > 0
}

func fewServers(v *view) {
	ready, nodes, ok := v.dnsPods()
	if !ok {
		return
	}
	cores, need := wantedServers(nodes)
	if len(ready) < need {
		v.fires(Warning, Pods, "%d DNS pods are ready; %d nodes with %.0f cores want %d", len(ready), len(nodes), cores, need)
		v.scaledBy(need)
	} else {
		v.sees(Pods, "%d DNS pods are ready; %d nodes with %.0f cores want %d", len(ready), len(nodes), cores, need)
	}
}

// wantedServers is how many DNS servers nodes want, and how many cores these have: the
// larger of one for each 256 cores and one for each 16 nodes, at least two where there are
// several nodes (linear mode with preventSinglePointFailure of
// https://github.com/kubernetes-sigs/cluster-proportional-autoscaler#linear-mode).
func wantedServers(nodes []node) (cores float64, need int) {
	for _, n := range nodes {
		count, _ := n.Status.Capacity["cpu"].quantity()
		cores += count
	}
	need = int(max(math.Ceil(cores/coresPerReplica), math.Ceil(float64(len(nodes))/nodesPerReplica), 1))
	if len(nodes) > 1 {
		need = max(need, 2)
	}
	return cores, need
}

// NameServers is how many DNS servers a cluster wants.
type NameServers struct {
	// Namespace and Deployment are where they are.
	Namespace  string `json:"namespace"`
	Deployment string `json:"deployment"`
	// Replicas are asked for, Ready are those that serve, and Wanted is what the formula of
	// wantedServers comes to for so many nodes and cores.
	Replicas int     `json:"replicas"`
	Ready    int     `json:"ready"`
	Wanted   int     `json:"wanted"`
	Nodes    int     `json:"nodes"`
	Cores    float64 `json:"cores"`
	// ScaledBy is who sets their number and would put it back, "" for nobody; Fix is how it
	// is told to have more.
	ScaledBy string `json:"scaled_by,omitempty"`
	Fix      string `json:"fix,omitempty"`
}

// NameServersCheck is the check about the number of DNS servers: what it reads of a cluster is
// what Cluster.NameServers needs.
func NameServersCheck() Check {
	return namesChecks[slices.IndexFunc(namesChecks, func(c Check) bool { return c.ID == "DN-02" })]
}

// NameServers is how many DNS servers the cluster wants. The error says what could not be read,
// or that it is not clear which Deployment has them.
func (c *Cluster) NameServers() (NameServers, error) {
	check := NameServersCheck()
	v := &view{Space: &Space{}, facts: (&Facts{}).With(c), check: &check}
	ready, nodes, ok := v.dnsPods()
	deployments, there := list[workload](v, Deployments)
	if !ok || !there {
		return NameServers{}, fmt.Errorf("find the DNS servers: %s: %s", v.unread[0].Read, v.unread[0].Value)
	}
	var found []workload
	for _, d := range deployments {
		if d.Metadata.Namespace == "kube-system" && d.Spec.Template.Metadata.Labels["k8s-app"] == "kube-dns" {
			found = append(found, d)
		}
	}
	if len(found) != 1 {
		return NameServers{}, fmt.Errorf("find the DNS servers: %d Deployments in kube-system have pods with the label k8s-app: kube-dns, not one", len(found))
	}
	n := NameServers{Namespace: "kube-system", Deployment: found[0].Metadata.Name, Replicas: 1, Ready: len(ready), Nodes: len(nodes)}
	if found[0].Spec.Replicas != nil {
		n.Replicas = *found[0].Spec.Replicas
	}
	n.Cores, n.Wanted = wantedServers(nodes)
	if all, ok := v.scalers(n.Wanted); !ok {
		return n, fmt.Errorf("find who scales the DNS servers: %s: %s", v.unread[0].Read, v.unread[0].Value)
	} else if len(all) > 0 {
		n.ScaledBy, n.Fix = all[0].name, all[0].fix
	}
	return n, nil
}

func manyQueries(v *view) {
	pods, ok := list[pod](v, Pods)
	c, there := v.corefile()
	if !ok || !there || c.has("autopath") {
		return
	}
	count := 0
	for _, p := range pods {
		own := slices.ContainsFunc(p.Spec.DNSConfig.Options, func(o struct{ Name, Value string }) bool { return o.Name == "ndots" })
		if p.Spec.DNSPolicy == "ClusterFirst" && !p.Spec.HostNetwork && !own && !p.ended() {
			count++
		}
	}
	if count > 0 {
		v.fires(Info, Pods, "%d pods have ndots:5, the usual value", count)
	}
}

func serverMemory(v *view) {
	pods, ok := list[pod](v, Pods)
	all, ok2 := list[service](v, Services)
	c, ok3 := v.corefile()
	if !ok || !ok2 || !ok3 {
		return
	}
	need := float64(len(pods)+len(all))*0.000858 + 49.1
	if c.has("autopath") {
		need = float64(len(pods)+len(all))*0.0025 + 50.5
	}
	for _, p := range servers(pods) {
		for _, one := range p.Spec.Containers {
			limit, known := one.Resources.Limits["memory"].quantity()
			if known && limit > 0 && limit < need*1e6 {
				v.firesAt(p.scope(), Warning, Pods, "%s: limits.memory %s; %d pods and %d Services want %.0f MB", one.Name, one.Resources.Limits["memory"], len(pods), len(all), need)
			}
		}
	}
}

// scaler is who sets the number of DNS servers, and how to make it set more.
type scaler struct{ name, fix, undo string }

// scalers are those of the Deployments whose pods are DNS servers.
func (v *view) scalers(need int) (all []scaler, ok bool) {
	deployments, ok := list[workload](v, Deployments)
	autoscalers, there := list[autoscaler](v, Autoscalers)
	if !ok || !there {
		return nil, false
	}
	var dns []string
	for _, d := range deployments {
		if d.Metadata.Namespace == "kube-system" && d.Spec.Template.Metadata.Labels["k8s-app"] == "kube-dns" {
			dns = append(dns, d.Metadata.Name)
		}
	}
	for _, a := range autoscalers {
		if a.Metadata.Namespace == "kube-system" && a.Spec.ScaleTargetRef.Kind == "Deployment" && slices.Contains(dns, a.Spec.ScaleTargetRef.Name) {
			least := 1 // what is meant where nothing is said
			if a.Spec.MinReplicas != nil {
				least = *a.Spec.MinReplicas
			}
			patch := func(low, high int) string {
				return fmt.Sprintf("kubectl -n kube-system patch hpa %s --type merge -p '{\"spec\":{\"minReplicas\":%d,\"maxReplicas\":%d}}'", a.Metadata.Name, low, high)
			}
			all = append(all, scaler{"HorizontalPodAutoscaler " + a.Metadata.String(), patch(need, max(need, a.Spec.MaxReplicas)), patch(least, a.Spec.MaxReplicas)})
		}
	}
	for _, d := range deployments {
		if target := d.Spec.Template.Spec.proportional(); target != "" && slices.Contains(dns, target) {
			all = append(all, scaler{
				"Deployment " + d.Metadata.String() + " (cluster-proportional-autoscaler)",
				fmt.Sprintf("min %d, or smaller coresPerReplica and nodesPerReplica, in the ConfigMap that --configmap of Deployment %s names", need, d.Metadata),
				"put the values back",
			})
		}
	}
	return all, true
}

// proportional is the Deployment that a cluster-proportional-autoscaler scales, "" if it
// is none.
func (s *podSpec) proportional() string {
	for _, c := range s.Containers {
		if !strings.Contains(c.Image, "cluster-proportional-autoscaler") {
			continue
		}
		for _, word := range slices.Concat(c.Command, c.Args) {
			target, given := strings.CutPrefix(strings.TrimLeft(word, "-"), "target=")
			kind, name, _ := strings.Cut(target, "/")
			if given && strings.EqualFold(kind, "deployment") {
				return name
			}
		}
	}
	return ""
}

// scaledBy says to whom of those that set their number more DNS servers are to be told.
func (v *view) scaledBy(need int) {
	if all, ok := v.scalers(need); ok && len(all) > 0 {
		v.mends(all[0].fix+": "+all[0].name+" sets the number, and takes back what is scaled by hand", all[0].undo)
	}
}

func twoScalers(v *view) {
	all, ok := v.scalers(0)
	if !ok {
		return
	}
	var names []string
	for _, one := range all {
		names = append(names, one.name)
	}
	if len(all) > 1 {
		v.fires(Warning, Autoscalers, "%s", strings.Join(names, " and "))
	} else {
		v.sees(Autoscalers, "%d of CoreDNS: %s", len(all), strings.Join(names, ""))
	}
}

// dnsService are the addresses of the Service kube-dns.
func dnsService(all []service) (addresses []string) {
	for _, s := range all {
		if isDNS(&s) {
			addresses = append(addresses, append(s.Spec.ClusterIPs, s.Spec.ClusterIP)...)
		}
	}
	return addresses
}

func forwardsToItself(v *view) {
	c, ok := v.corefile()
	all, there := list[service](v, Services)
	if !ok || !there {
		return
	}
	own := dnsService(all)
	for _, p := range c.plugins {
		if p[0] != "forward" || len(p) < 3 {
			continue
		}
		for _, to := range strings.Fields(strings.SplitN(strings.Join(p[2:], " "), "{", 2)[0]) {
			host, port := strings.TrimPrefix(to, "dns://"), uint16(53)
			if at, err := netip.ParseAddrPort(host); err == nil {
				host, port = at.Addr().String(), at.Port()
			}
			addr, err := netip.ParseAddr(host)
			// At another port of loopback is another server block, or a program beside it.
			if err == nil && port == 53 && (addr.IsLoopback() || slices.Contains(own, host)) {
				v.fires(Critical, ConfigMaps, "Corefile: forward %s %s", p[1], to)
			}
		}
	}
}

func kubeletsAsk(v *view) {
	kubelet, ok := component(v, "KubeletConfiguration", func(c *Cluster) fact[*kubeletConfig] { return c.kubelet })
	all, there := list[service](v, Services)
	if !ok || !there {
		return
	}
	own := dnsService(all)
	if len(own) == 0 {
		v.lacks(Services, "there is no Service kube-dns in kube-system, nor one with the label k8s-app: kube-dns")
		return
	}
	for _, address := range kubelet.ClusterDNS {
		addr, err := netip.ParseAddr(address)
		if cached := err == nil && addr.IsLinkLocalUnicast(); !cached && !slices.Contains(own, address) {
			v.fires(Critical, ConfigMaps, "clusterDNS: %s; the Service kube-dns has %s", address, strings.Join(slices.Compact(own), ", "))
		} else {
			v.sees(ConfigMaps, "clusterDNS: %s", address)
		}
	}
}

// corefile are the plug-ins of all server blocks of a Corefile, each with its words and,
// after "{", those of its block.
type corefile struct{ plugins [][]string }

// corefile is that of the cluster's CoreDNS; where there is none, it notes that.
func (v *view) corefile() (*corefile, bool) {
	all, ok := list[configMap](v, ConfigMaps)
	if !ok {
		return nil, false
	}
	text := config(all, "coredns")["Corefile"]
	if text == "" {
		v.lacks(ConfigMaps, "there is no Corefile in a ConfigMap coredns")
		return nil, false
	}
	return parseCorefile(text), true
}

// parseCorefile reads the form that https://coredns.io/manual/configuration/ describes: a
// line each for a plug-in, in blocks of servers; braces open and close at ends of lines.
func parseCorefile(text string) *corefile {
	c := &corefile{}
	depth := 0
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		switch {
		case words[0] == "}":
			depth--
			continue
		case depth == 1 && !strings.HasPrefix(words[0], "("):
			c.plugins = append(c.plugins, words)
		case depth > 1 && len(c.plugins) > 0:
			last := &c.plugins[len(c.plugins)-1]
			*last = append(*last, words...)
		}
		depth += strings.Count(line, "{") - strings.Count(line, "}")
	}
	return c
}

func (c *corefile) has(plugin string) bool {
	return slices.ContainsFunc(c.plugins, func(p []string) bool { return p[0] == plugin })
}

// says whether a plug-in is there with these words after its name or in its block.
func (c *corefile) says(plugin, words string) bool {
	return slices.ContainsFunc(c.plugins, func(p []string) bool {
		return p[0] == plugin && strings.Contains(" "+strings.Join(p[1:], " ")+" ", " "+words+" ")
	})
}
