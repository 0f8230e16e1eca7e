package doctor

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

const (
	flannelTrouble = "https://github.com/flannel-io/flannel/blob/master/Documentation/troubleshooting.md"
	modelDoc       = "https://kubernetes.io/docs/concepts/services-networking/#the-kubernetes-network-model"
	gkeAddresses   = "https://cloud.google.com/network-intelligence-center/docs/network-analyzer/insights/kubernetes-engine/gke-ip-utilization"
	ciliumTuning   = "https://docs.cilium.io/en/stable/operations/performance/tuning/"

	flannelIP = "flannel.alpha.coreos.com/public-ip"
	calicoIP  = "projectcalico.org/IPv4Address"
	zoneLabel = "topology.kubernetes.io/zone"

	// restartCilium is what its agents take to read their ConfigMap again.
	restartCilium = ", then kubectl -n kube-system rollout restart daemonset cilium"

	// nearlyOut is the share of addresses in use that Google reports.
	nearlyOut = 0.8
	// From where on Calico's authors advise Typha and route reflectors.
	withoutTypha, fullMesh = 50, 100
)

// agents are the DaemonSets on which the network of each node depends.
var agents = []string{
	"cilium", "calico-node", "canal", "kube-flannel-ds", "kube-flannel", "antrea-agent", "kube-router", "weave-net", "kindnet",
	"aws-node", "azure-cni", "kube-proxy", "node-local-dns", "kube-ovn-cni", "millrace",
}

var pluginChecks = []Check{{
	ID: "CN-01", Layer: "plugin", Title: "Cilium's kube-proxy-replacement has a value that means nothing", Severity: Critical, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "kube-proxy-replacement of the ConfigMap cilium-config is neither true nor false",
	Effect:  "Cilium from 1.18 on does not start with it; 1.15 took it for neither, and Services were served by nobody or by two.",
	Source:  "https://github.com/cilium/cilium/issues/32711; https://docs.cilium.io/en/stable/network/kubernetes/kubeproxy-free/",
	Fix:     "kubeProxyReplacement: true or false in Cilium's Helm values" + restartCilium,
	Undo:    "put the value back",
	Pitfall: "strict, partial, probe and disabled are of before 1.14, and still in many articles.",
	look: func(v *view) {
		all, ok := list[configMap](v, ConfigMaps)
		value := config(all, "cilium-config")["kube-proxy-replacement"]
		if ok && !slices.Contains([]string{"", "true", "false"}, value) {
			v.fires(Critical, ConfigMaps, "kube-proxy-replacement: %s", value)
		}
	},
}, {
	ID: "CN-02", Layer: "plugin", Title: "Cilium sends packets through the host's stack", Severity: Info, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "enable-host-legacy-routing is true, and kube-proxy-replacement as well",
	Effect:  "Packets pass the rules and the routes of the host, where Cilium could hand them over: a third less of requests in its own benchmark.",
	Source:  ciliumTuning + " (eBPF host-routing); https://docs.cilium.io/en/stable/operations/performance/benchmark/",
	Fix:     "bpf.hostLegacyRouting: false and bpf.masquerade: true in Cilium's Helm values" + restartCilium,
	Undo:    "put both values back" + restartCilium,
	Pitfall: "Rules of iptables on the host, a firewall for one, no longer see pods' packets then.",
	look: func(v *view) {
		if v.cilium("enable-host-legacy-routing") == "true" && v.cilium("kube-proxy-replacement") == "true" {
			v.fires(Info, ConfigMaps, "enable-host-legacy-routing: true")
		}
	},
}, {
	ID: "CN-03", Layer: "plugin", Title: "Cilium masquerades by iptables", Severity: Info, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "enable-bpf-masquerade is not true, while enable-ipv4-masquerade and kube-proxy-replacement are",
	Effect:  "What leaves the cluster takes the host's connection tracking and its rules, and host routing is off (CN-02).",
	Source:  "https://docs.cilium.io/en/stable/network/concepts/masquerading/; " + ciliumTuning,
	Fix:     "bpf.masquerade: true in Cilium's Helm values" + restartCilium,
	Undo:    "bpf.masquerade: false" + restartCilium,
	Pitfall: "It masquerades on the devices that Cilium manages only: one that is not among them leaves pods' addresses as they are.",
	look: func(v *view) {
		if v.cilium("enable-bpf-masquerade") != "true" && v.cilium("enable-ipv4-masquerade") == "true" && v.cilium("kube-proxy-replacement") == "true" {
			v.fires(Info, ConfigMaps, "enable-bpf-masquerade: %q", v.cilium("enable-bpf-masquerade"))
		}
	},
}, {
	ID: "CN-04", Layer: "plugin", Title: "a network agent does not run on all its nodes", Severity: Critical, Scope: Whole,
	Reads:   []string{DaemonSets, Nodes},
	When:    "a DaemonSet of a network plug-in or proxy has fewer pods ready than it has nodes; a warning, and one for all of them, where no more are missing than nodes are not Ready",
	Effect:  "On the other nodes new pods do not start, and changes of Services, routes or policies do not arrive.",
	Source:  "https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/daemon-set-v1/#DaemonSetStatus",
	Fix:     "kubectl -n NAMESPACE get pods -o wide, then kubectl logs of the one that is not ready",
	Undo:    "nothing is changed by looking",
	Pitfall: "Pods that run go on to work for a while: what is written in the kernel stays.",
	look:    missingAgents,
}, {
	ID: "CN-05", Layer: "plugin", Title: "ranges of addresses overlap", Severity: Critical, Scope: Whole,
	Reads:   []string{Nodes, Services, CalicoPools},
	When:    "two nodes' ranges of pods overlap, or a range of pods (podCIDR, or Calico's IPPools) has a node's address or a ClusterIP in it",
	Effect:  "The same address means two things: packets for one reach the other, from some nodes and not from others.",
	Source:  modelDoc + "; https://kubernetes.io/docs/concepts/cluster-administration/networking/",
	Fix:     "another range for one of them; for nodes: kubectl drain NODE, kubectl delete node NODE, and restart its kubelet, which makes it anew; the controller manager gives it a range that is free",
	Undo:    "put the range back",
	Pitfall: "A Node that is deleted takes its labels and taints with it, and its pods. Ranges of other networks that nodes route to (VPNs, docker0) are not in the API: ip route on a node has them.",
	look:    overlaps,
}, {
	ID: "CN-06", Layer: "plugin", Title: "a node runs out of addresses for pods", Severity: Warning, Scope: Whole,
	Reads:   []string{Nodes, Pods},
	When:    "pods have more than 80 % of the addresses of a node's podCIDR",
	Effect:  "When there is none left, new pods stay in ContainerCreating.",
	Source:  gkeAddresses + " (80 %); https://kubernetes.io/docs/concepts/architecture/nodes/",
	Fix:     "lower maxPods of the kubelet below the number of addresses, so that pods go elsewhere; larger ranges (--node-cidr-mask-size) are for new nodes",
	Undo:    "put maxPods back",
	Pitfall: "Addresses of pods that have ended may be held for a while: a /24 is for 110 pods, not for 254.",
	look:    podAddresses,
}, {
	ID: "CN-07", Layer: "plugin", Title: "there are few addresses left for Services", Severity: Warning, Scope: Whole,
	Reads:   []string{ServiceCIDRs, Services},
	When:    "ClusterIPs take more than 80 % of a range of Services (ServiceCIDR)",
	Effect:  "When there is none left, no Service can be made.",
	Source:  gkeAddresses + " (80 %); https://kubernetes.io/docs/tasks/network/extend-service-ip-ranges/",
	Fix:     "another ServiceCIDR (networking.k8s.io/v1), which Kubernetes has from 1.33 on",
	Undo:    "kubectl delete servicecidr NAME, while no Service has an address of it",
	Pitfall: "The range of the API server's flag cannot be changed; before 1.33 that meant a new cluster.",
	look:    serviceAddresses,
}, {
	ID: "CN-08", Layer: "plugin", Title: "a node's network is not set up", Severity: Critical, Scope: Whole,
	Reads:   []string{Nodes},
	When:    "the condition NetworkUnavailable of a node is True",
	Effect:  "The node is tainted: nothing new runs there, and pods there may not be reached.",
	Source:  "https://kubernetes.io/docs/reference/node/node-status/#condition",
	Fix:     "kubectl describe node NAME says who set it: the network plug-in, or the cloud's controller of routes",
	Undo:    "nothing is changed by looking",
	Pitfall: "Where it was set by something that is gone, it stays: only its owner takes it back.",
	look: func(v *view) {
		nodes, _ := list[node](v, Nodes)
		for _, n := range nodes {
			if status, why := is(n.Status.Conditions, "NetworkUnavailable"); status == "True" {
				v.firesAt("Node "+n.Metadata.Name, Critical, Nodes, "NetworkUnavailable: %s", why)
			}
		}
	},
}, {
	ID: "CN-09", Layer: "plugin", Title: "Calico is set up for fewer nodes", Severity: Warning, Scope: Whole,
	Reads:   []string{Nodes, DaemonSets, Deployments, CalicoPools, CalicoBGP},
	When:    "calico-node on more than 50 nodes without a Deployment calico-typha, or a mesh of BGP between more than 100 nodes (nodeToNodeMeshEnabled, and a pool without VXLAN)",
	Effect:  "Each node watches the API by itself, or keeps a session to each other one: changes of routes and policies take longer.",
	Source:  "https://docs.tigera.io/calico/latest/network-policy/comms/reduce-nodes (50 nodes); https://docs.tigera.io/calico/latest/networking/configuring/bgp (route reflectors); https://github.com/kubernetes/kops/pull/6047 (100 nodes)",
	Fix:     "install by the operator, which brings Typha; for the mesh route reflectors, then nodeToNodeMeshEnabled: false",
	Undo:    "nodeToNodeMeshEnabled: true before the reflectors are removed",
	Pitfall: "The mesh must not be switched off before the reflectors have all sessions: routes go with the last one.",
	look:    largeCalico,
}, {
	ID: "CN-11", Layer: "plugin", Title: "a policy cuts pods off from DNS", Severity: Warning, Scope: Whole,
	Reads:   []string{NetworkPolicies, Pods, Namespaces},
	When:    "pods whose outgoing traffic is limited may not send to UDP port 53 of the DNS pods by any policy; if only TCP port 53 lacks, information",
	Effect:  "No name resolves in these pods. Without TCP only long answers fail, which are asked for again by TCP.",
	Source:  "https://kubernetes.io/docs/concepts/services-networking/network-policies/; https://www.rfc-editor.org/rfc/rfc7766 (TCP is not optional)",
	Fix:     "an egress rule to namespace kube-system, k8s-app: kube-dns, ports 53 of UDP and TCP",
	Undo:    "remove the rule",
	Pitfall: "A rule for the ClusterIP of kube-dns is none: policies see the pod's address. NodeLocal DNSCache needs its own address allowed.",
	look:    policiesAndDNS,
}, {
	ID: "CN-12", Layer: "plugin", Title: "Services send across zones", Severity: Info, Scope: Whole,
	Reads:   []string{Services, EndpointSlices, Nodes},
	When:    "nodes are in several zones, a Service has endpoints in more than one, and trafficDistribution is not set",
	Effect:  "All endpoints are used alike: most connections cross zones, with the time, and in clouds the money, that takes.",
	Source:  "https://kubernetes.io/docs/concepts/services-networking/service/#traffic-distribution",
	Fix:     "kubectl -n NAMESPACE patch service NAME -p '{\"spec\":{\"trafficDistribution\":\"PreferClose\"}}' (PreferSameZone from Kubernetes 1.35 on)",
	Undo:    "kubectl -n NAMESPACE patch service NAME -p '{\"spec\":{\"trafficDistribution\":null}}'",
	Pitfall: "Zones whose clients ask more than their endpoints can take are overloaded then: there is no balance between zones.",
	look:    acrossZones,
}, {
	ID: "CN-15", Layer: "plugin", Title: "nobody enforces the network policies", Severity: Warning, Scope: Whole,
	Reads:   []string{NetworkPolicies, DaemonSets},
	When:    "there are NetworkPolicies, flannel is the network plug-in, and no DaemonSet or container is known that enforces them",
	Effect:  "They are stored, and do nothing: what they forbid is allowed.",
	Source:  "https://kubernetes.io/docs/concepts/services-networking/network-policies/#prerequisites; https://github.com/flannel-io/flannel/blob/master/Documentation/netpol.md",
	Fix:     "a plug-in that enforces them: flannel with kube-network-policies (netpol.md), Canal, Calico or Cilium",
	Undo:    "remove it; the policies stay without effect",
	Pitfall: "kubectl get networkpolicy shows them as if they were in force.",
	look:    unenforced,
}, {
	ID: "CN-20", Layer: "plugin", Title: "two have the same address", Severity: Critical, Scope: Whole,
	Reads:   []string{Pods, Nodes},
	When:    "two pods that run, two nodes, or a pod and a node have the same address",
	Effect:  "Packets reach the one or the other, by which route the sender has.",
	Source:  modelDoc,
	Fix:     "delete one of the pods; if it happens again, the address management of the network plug-in gave it twice: look at its agent's logs on both nodes. A node needs another address",
	Undo:    "nothing has to be taken back",
	Pitfall: "A Service that has both as endpoints answers with errors in every second try, and each pod by itself looks well.",
	look:    doubleAddresses,
}, {
	ID: "CN-21", Layer: "plugin", Title: "flannel has no range of addresses for a node", Severity: Critical, Scope: Whole,
	Reads:   []string{Nodes, ConfigMaps},
	When:    "flannel is configured, and a node has no podCIDR",
	Effect:  "flannel does not start there, and no pod does.",
	Source:  flannelTrouble + " (Kubernetes specific)",
	Fix:     "--allocate-node-cidrs=true and --cluster-cidr of the controller manager, kubeadm init --pod-network-cidr; or kubectl patch node NAME -p '{\"spec\":{\"podCIDR\":\"RANGE\"}}'",
	Undo:    "a podCIDR that is set cannot be changed: as CN-05 says for nodes",
	Pitfall: "A cluster made without --pod-network-cidr looks well until flannel is installed.",
	look: func(v *view) {
		nodes, ok := list[node](v, Nodes)
		if network, there := v.flannel(); !ok || !there || network == nil {
			return
		}
		for _, n := range nodes {
			if len(n.podRanges()) == 0 {
				v.firesAt("Node "+n.Metadata.Name, Critical, Nodes, "no podCIDR")
			}
		}
	},
}, {
	ID: "CN-22", Layer: "plugin", Title: "flannel's network is not that of the nodes' ranges", Severity: Critical, Scope: Whole,
	Reads:   []string{Nodes, ConfigMaps},
	When:    "a node's podCIDR is not within Network (or IPv6Network) of flannel's net-conf.json",
	Effect:  "flannel's routes and its masquerading are for another range: pods of different nodes do not reach each other, or with wrong sources.",
	Source:  "https://github.com/flannel-io/flannel/blob/master/Documentation/configuration.md (Network); " + flannelTrouble,
	Fix:     "Network in the ConfigMap kube-flannel-cfg as --cluster-cidr of the controller manager, then restart flannel",
	Undo:    "put Network back",
	Pitfall: "10.244.0.0/16 in flannel's manifest is an example that kubeadm init has to be told of.",
	look: func(v *view) {
		nodes, ok := list[node](v, Nodes)
		if network, there := v.flannel(); ok && there && network != nil {
			outside(v, nodes, prefixes([]string{network.Network, network.IPv6Network}), "flannel's Network", Critical)
		}
	},
}, {
	ID: "CN-23", Layer: "plugin", Title: "nodes give the same address as theirs", Severity: Critical, Scope: Whole,
	Reads:   []string{Nodes},
	When:    "the annotation of flannel (public-ip) or of Calico (IPv4Address) is the same on two nodes",
	Effect:  "Packets for pods of both are sent to that address: nodes send to themselves, and pods of different nodes do not reach each other.",
	Source:  flannelTrouble + " (Vagrant: 10.0.2.15 on all machines); https://docs.tigera.io/calico/latest/networking/ipam/ip-autodetection",
	Fix:     "--iface=DEVICE of flannel, or IP_AUTODETECTION_METHOD of calico-node, with the device that leads to the other nodes",
	Undo:    "remove the option",
	Pitfall: "kubectl get nodes -o wide may show the right addresses: the plug-in finds its own.",
	look: func(v *view) {
		nodes, _ := list[node](v, Nodes)
		for _, key := range []string{flannelIP, calicoIP} {
			at := map[string][]string{}
			for _, n := range nodes {
				if address := n.Metadata.Annotations[key]; address != "" {
					at[address] = append(at[address], n.Metadata.Name)
				}
			}
			for _, address := range slices.Sorted(maps.Keys(at)) {
				if len(at[address]) > 1 {
					v.fires(Critical, Nodes, "%s of %s: %s", key, some(at[address]), address)
				}
			}
		}
	},
}, {
	ID: "CN-24", Layer: "plugin", Title: "a network agent has a CPU limit", Severity: Info, Scope: Whole,
	Reads:   []string{DaemonSets},
	When:    "a container of a network plug-in's or proxy's DaemonSet has resources.limits.cpu",
	Effect:  "When much changes at once, at a node's start or after a loss of the API server, it stands still for parts of each tenth of a second (HS-26): new pods and changes wait.",
	Source:  "https://docs.kernel.org/scheduler/sched-bwc.html",
	Fix:     "remove resources.limits.cpu and keep a request",
	Undo:    "put the limit back",
	Pitfall: "A request is what protects others, not the limit.",
	look: func(v *view) {
		sets, _ := list[workload](v, DaemonSets)
		for _, d := range sets {
			if !slices.Contains(agents, d.Metadata.Name) {
				continue
			}
			for _, c := range d.Spec.Template.Spec.Containers {
				if limit := c.Resources.Limits["cpu"]; limit != "" {
					v.firesAt("DaemonSet "+d.Metadata.String(), Info, DaemonSets, "%s: limits.cpu %s", c.Name, limit)
				}
			}
		}
	},
}, {
	ID: "MT-09", Layer: "mtu", Title: "a node's kernel computes wrong checksums in tunnels", Severity: Info, Scope: Whole,
	Reads:   []string{Nodes, ConfigMaps, CalicoPools},
	When:    "flannel's backend is vxlan or a pool of Calico has VXLAN, and the kernel of a node is older than 5.7",
	Effect:  "Packets that are masqueraded before they are wrapped may have wrong checksums: the first of a connection to a Service is lost, and connections take 1, 3, 7 ... 63 s.",
	Source:  "https://github.com/kubernetes/kubernetes/issues/88986; https://github.com/projectcalico/calico/issues/3145; https://git.kernel.org/linus/ea64d8d6c675",
	Fix:     "a newer kernel; until then ethtool -K flannel.1 tx-checksum-ip-generic off (vxlan.calico)",
	Undo:    "ethtool -K flannel.1 tx-checksum-ip-generic on",
	Pitfall: "Distributions have taken the change over into older kernels: HS-35 counts whether it happens. Left off on a kernel that does not need it, it costs throughput.",
	look: func(v *view) {
		nodes, ok := list[node](v, Nodes)
		network, ok2 := v.flannel()
		pools, ok3 := list[calicoPool](v, CalicoPools)
		vxlan := network != nil && network.Backend.Type == "vxlan" || slices.ContainsFunc(pools, func(p calicoPool) bool { return p.wraps("VXLAN") })
		if !ok || !ok2 || !ok3 || !vxlan {
			return
		}
		for _, n := range nodes {
			if kernel := n.Status.NodeInfo.KernelVersion; older(kernel, 5, 7) {
				v.firesAt("Node "+n.Metadata.Name, Info, Nodes, "kernel %s", kernel)
			}
		}
	},
}}

// cilium is a setting of Cilium's, "" where there is none.
func (v *view) cilium(setting string) string {
	all, _ := list[configMap](v, ConfigMaps)
	return config(all, "cilium-config")[setting]
}

// flannelNetwork is net-conf.json.
type flannelNetwork struct {
	Network, IPv6Network string
	Backend              struct {
		Type          string
		DirectRouting bool
	}
}

// flannel is its configuration, nil where there is none.
func (v *view) flannel() (*flannelNetwork, bool) {
	all, ok := list[configMap](v, ConfigMaps)
	if !ok {
		return nil, false
	}
	for _, m := range all {
		text, there := m.Data["net-conf.json"]
		if !there {
			continue
		}
		network := &flannelNetwork{}
		if err := json.Unmarshal([]byte(text), network); err != nil {
			v.lacks(ConfigMaps, "net-conf.json of %s: %s", m.Metadata, reason(err))
			return nil, false
		}
		return network, true
	}
	return nil, true
}

// wraps says that a pool is in use with this kind of tunnel.
func (p *calicoPool) wraps(kind string) bool {
	mode := map[string]string{"VXLAN": p.Spec.VXLANMode, "IPIP": p.Spec.IPIPMode}[kind]
	return !p.Spec.Disabled && mode != "" && mode != "Never"
}

// owned is a range or an address, and whose it is.
type owned struct {
	prefix netip.Prefix
	who    string
}

func overlaps(v *view) {
	nodes, ok := list[node](v, Nodes)
	all, ok2 := list[service](v, Services)
	pools, ok3 := list[calicoPool](v, CalicoPools)
	if !ok || !ok2 || !ok3 {
		return
	}
	var pods, others []owned
	for _, n := range nodes {
		for _, p := range n.podRanges() {
			pods = append(pods, owned{p, "podCIDR of node " + n.Metadata.Name})
		}
		for _, a := range n.internal() {
			others = append(others, owned{netip.PrefixFrom(a, a.BitLen()), "node " + n.Metadata.Name})
		}
	}
	clash := func(a, b owned) {
		if a.prefix.Overlaps(b.prefix) {
			v.fires(Critical, Nodes, "%s %s and %s %s", a.who, a.prefix, b.who, b.prefix)
		}
	}
	slices.SortFunc(pods, func(a, b owned) int { return a.prefix.Addr().Compare(b.prefix.Addr()) })
	for i := 1; i < len(pods); i++ {
		clash(pods[i-1], pods[i]) // in their order only neighbours can
	}
	for _, p := range pools {
		for _, r := range prefixes([]string{p.Spec.CIDR}) {
			if !p.Spec.Disabled {
				pods = append(pods, owned{r, "pool " + p.Metadata.Name})
			}
		}
	}
	for _, s := range all {
		if a, err := netip.ParseAddr(s.Spec.ClusterIP); err == nil {
			others = append(others, owned{netip.PrefixFrom(a, a.BitLen()), "Service " + s.Metadata.String()})
		}
	}
	for _, a := range pods {
		for _, b := range others {
			clash(a, b)
		}
	}
}

func podAddresses(v *view) {
	nodes, ok := list[node](v, Nodes)
	pods, there := list[pod](v, Pods)
	if !ok || !there {
		return
	}
	on := map[string][]netip.Addr{}
	for _, p := range pods {
		on[p.Spec.NodeName] = append(on[p.Spec.NodeName], p.addresses()...)
	}
	for _, n := range nodes {
		for _, r := range n.podRanges() {
			used := 0
			for _, a := range on[n.Metadata.Name] {
				if r.Contains(a) {
					used++
				}
			}
			if size := sizeOf(r); float64(used) > nearlyOut*size {
				v.firesAt("Node "+n.Metadata.Name, Warning, Pods, "%d pods have addresses of %s, which has %.0f", used, r, size)
			}
		}
	}
}

func serviceAddresses(v *view) {
	ranges, ok := list[serviceRange](v, ServiceCIDRs)
	all, there := list[service](v, Services)
	if !ok || !there {
		return
	}
	for _, c := range ranges {
		for _, r := range prefixes(c.Spec.CIDRs) {
			used := 0
			for _, s := range all {
				for _, ip := range s.Spec.ClusterIPs {
					if a, err := netip.ParseAddr(ip); err == nil && r.Contains(a) {
						used++
					}
				}
			}
			if size := sizeOf(r); float64(used) > nearlyOut*size {
				v.firesAt("ServiceCIDR "+c.Metadata.Name, Warning, Services, "%d ClusterIPs of %s, which has %.0f", used, r, size)
			} else {
				v.sees(Services, "%d ClusterIPs of %s", used, r)
			}
		}
	}
}

func largeCalico(v *view) {
	nodes, ok := list[node](v, Nodes)
	sets, ok2 := list[workload](v, DaemonSets)
	deployments, ok3 := list[workload](v, Deployments)
	pools, ok4 := list[calicoPool](v, CalicoPools)
	bgp, ok5 := list[calicoBGP](v, CalicoBGP)
	called := func(name string) func(workload) bool { return func(w workload) bool { return w.Metadata.Name == name } }
	if !ok || !ok2 || !ok3 || !ok4 || !ok5 || !slices.ContainsFunc(sets, called("calico-node")) {
		return
	}
	if len(nodes) > withoutTypha && !slices.ContainsFunc(deployments, called("calico-typha")) {
		v.fires(Warning, Deployments, "%d nodes, and no calico-typha", len(nodes))
	}
	meshed := !slices.ContainsFunc(bgp, func(b calicoBGP) bool { return b.Spec.NodeToNodeMeshEnabled != nil && !*b.Spec.NodeToNodeMeshEnabled })
	routed := slices.ContainsFunc(pools, func(p calicoPool) bool { return !p.Spec.Disabled && !p.wraps("VXLAN") })
	if len(nodes) > fullMesh && meshed && routed {
		v.fires(Warning, CalicoBGP, "%d nodes in one mesh", len(nodes))
	}
}

func acrossZones(v *view) {
	all, ok := list[service](v, Services)
	found, ok2 := list[slice](v, EndpointSlices)
	nodes, ok3 := list[node](v, Nodes)
	if !ok || !ok2 || !ok3 {
		return
	}
	zone := map[string]string{}
	for _, n := range nodes {
		zone[n.Metadata.Name] = n.Metadata.Labels[zoneLabel]
	}
	of := endpointsOf(found)
	for _, s := range all {
		in := map[string]bool{}
		for _, e := range of[s.Metadata.String()] {
			if z := zone[e.NodeName]; z != "" && e.ready() {
				in[z] = true
			}
		}
		if len(in) > 1 && s.served() && s.Spec.TrafficDistribution == "" && s.Metadata.Annotations["service.kubernetes.io/topology-mode"] == "" {
			v.firesAt(s.scope(), Info, EndpointSlices, "endpoints in %s", some(slices.Collect(maps.Keys(in))))
		}
	}
}

// enforcers are parts of the names of what enforces NetworkPolicies.
var enforcers = []string{"calico", "canal", "cilium", "antrea", "kube-router", "weave", "network-polic", "netpol", "ovn", "romana", "kindnet", "aws-node", "millrace"}

func unenforced(v *view) {
	policies, ok := list[networkPolicy](v, NetworkPolicies)
	sets, there := list[workload](v, DaemonSets)
	if !ok || !there || len(policies) == 0 {
		return
	}
	flannel := ""
	for _, d := range sets {
		texts := []string{d.Metadata.Name}
		for _, c := range d.Spec.Template.Spec.Containers {
			texts = append(texts, c.Name, c.Image)
		}
		all := strings.Join(texts, " ")
		if slices.ContainsFunc(enforcers, func(part string) bool { return strings.Contains(all, part) }) {
			return
		}
		if strings.Contains(all, "flannel") {
			flannel = d.Metadata.String()
		}
	}
	if flannel != "" {
		v.firesAt("DaemonSet "+flannel, Warning, NetworkPolicies, "%d of them, and none but flannel to enforce them", len(policies))
	}
}

func doubleAddresses(v *view) {
	pods, ok := list[pod](v, Pods)
	nodes, there := list[node](v, Nodes)
	if !ok || !there {
		return
	}
	who := map[netip.Addr][]string{}
	for _, n := range nodes {
		for _, a := range n.internal() {
			who[a] = append(who[a], "node "+n.Metadata.Name)
		}
	}
	for _, p := range pods {
		for _, a := range p.addresses() {
			who[a] = append(who[a], "pod "+p.Metadata.String())
		}
	}
	for _, a := range slices.SortedFunc(maps.Keys(who), netip.Addr.Compare) {
		if len(who[a]) > 1 {
			v.fires(Critical, Pods, "%s: %s", a, some(who[a]))
		}
	}
}

func policiesAndDNS(v *view) {
	policies, ok := list[networkPolicy](v, NetworkPolicies)
	pods, ok2 := list[pod](v, Pods)
	namespaces, ok3 := list[named](v, Namespaces)
	if !ok || !ok2 || !ok3 || len(policies) == 0 {
		return
	}
	labels := map[string]string{"kubernetes.io/metadata.name": "kube-system"}
	for _, n := range namespaces {
		if n.Metadata.Name == "kube-system" {
			maps.Copy(labels, n.Metadata.Labels)
		}
	}
	dns := servers(pods)
	cut := map[string][]string{} // what is lacking, by the policies that isolate
	for _, p := range pods {
		if p.Spec.HostNetwork || p.ended() || p.Spec.DNSPolicy == "Default" {
			continue
		}
		var by []string
		udp, tcp := false, false
		for _, policy := range policies {
			if policy.Metadata.Namespace != p.Metadata.Namespace || !policy.isolates() || !policy.Spec.PodSelector.matches(p.Metadata.Labels) {
				continue
			}
			by = append(by, policy.Metadata.String())
			for _, rule := range policy.Spec.Egress {
				if rule.reaches(dns, policy.Metadata.Namespace, labels) {
					udp, tcp = udp || rule.allows("UDP"), tcp || rule.allows("TCP")
				}
			}
		}
		if len(by) > 0 && !(udp && tcp) {
			what := map[bool]string{true: "TCP", false: "UDP"}[udp]
			key := fmt.Sprintf("%s %s", what, some(by))
			cut[key] = append(cut[key], p.Metadata.String())
		}
	}
	for _, key := range slices.Sorted(maps.Keys(cut)) {
		what, by, _ := strings.Cut(key, " ")
		severity := map[string]Severity{"UDP": Warning, "TCP": Info}[what]
		v.firesAt("NetworkPolicy "+by, severity, NetworkPolicies, "pods %s may not send to %s port 53", some(cut[key]), what)
	}
}

// allows says that a rule is for port 53 of a protocol.
func (r *egressRule) allows(protocol string) bool {
	if len(r.Ports) == 0 {
		return true
	}
	for _, p := range r.Ports {
		var from int
		fmt.Sscan(string(p.Port), &from)
		named := p.Port == "" || p.Port == scalar("dns") || p.Port == scalar("dns-tcp")
		if (p.Protocol == protocol || p.Protocol == "" && protocol == "TCP") && (named || from == 53 || from < 53 && from > 0 && p.EndPort >= 53) {
			return true
		}
	}
	return false
}

// reaches says that a rule of a policy in namespace is for the DNS pods, which are in
// the namespace kube-system of these labels, or may be: what is outside the cluster, as a
// cache on the node, is not known here.
func (r *egressRule) reaches(dns []pod, namespace string, labels map[string]string) bool {
	if len(r.To) == 0 {
		return true
	}
	for _, to := range r.To {
		if to.IPBlock != nil {
			block, err := netip.ParsePrefix(to.IPBlock.CIDR)
			inside := slices.ContainsFunc(dns, func(p pod) bool { return slices.ContainsFunc(p.addresses(), block.Contains) })
			if err == nil && (inside || block.Contains(netip.MustParseAddr(nodeLocal))) {
				return true
			}
			continue
		}
		if to.NamespaceSelector == nil && namespace != "kube-system" || to.NamespaceSelector != nil && !to.NamespaceSelector.matches(labels) {
			continue
		}
		if to.PodSelector == nil || slices.ContainsFunc(dns, func(p pod) bool { return to.PodSelector.matches(p.Metadata.Labels) }) {
			return true
		}
	}
	return false
}

// missingAgents tells what a node that is away takes with it as one: its kubelet says
// nothing of its pods, and none of them is ready.
func missingAgents(v *view) {
	sets, ok := list[workload](v, DaemonSets)
	nodes, there := list[node](v, Nodes)
	if !ok || !there {
		return
	}
	var away, with []string
	for _, n := range nodes {
		if status, _ := is(n.Status.Conditions, "Ready"); status != "True" && status != "" {
			away = append(away, n.Metadata.Name)
		}
	}
	for _, d := range sets {
		missing := d.Status.DesiredNumberScheduled - d.Status.NumberReady
		switch {
		case !slices.Contains(agents, d.Metadata.Name) || missing <= 0:
		case missing <= len(away):
			with = append(with, d.Metadata.String())
		default:
			v.firesAt("DaemonSet "+d.Metadata.String(), Critical, DaemonSets, "%d of %d are ready", d.Status.NumberReady, d.Status.DesiredNumberScheduled)
		}
	}
	if len(with) > 0 {
		v.firesAt("Nodes "+some(away), Warning, Nodes, "not Ready, and with them pods of %s", some(with))
	}
}
