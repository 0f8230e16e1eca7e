package doctor

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/proc"
)

const (
	reservedPorts   = "net.ipv4.ip_local_reserved_ports"
	localnets       = "net.ipv4.conf.*.route_localnet"
	nodePortDefault = "30000-32767"
)

// kubelets are the names of processes that make a host a node of a cluster.
var kubelets = []string{"kubelet", "k3s-server", "k3s-agent", "k3s", "rke2", "kubelite", "k0s"}

var serviceChecks = []Check{{
	ID: "PX-02", Layer: "service", Title: "Services are served by kube-proxy's mode ipvs", Severity: Warning, Scope: Node,
	Reads:   []string{Devices},
	When:    "the device kube-ipvs0 is there",
	Effect:  "The mode is deprecated since Kubernetes 1.35 and will be removed; kube-proxy says so when it starts.",
	Source:  "https://github.com/kubernetes/enhancements/issues/5495; https://github.com/kubernetes/kubernetes/pull/134539",
	Fix:     "mode: nftables in kube-proxy's configuration (kernel 5.13 and nft 1.0.1 or newer), then restart it on each node",
	Undo:    "mode: ipvs, and restart it",
	Pitfall: "\"IPVS for many Services\" is advice of before mode nftables, which is as fast.",
	look: func(v *view) {
		all, ok := get(v, Devices, v.devices)
		if ok && slices.ContainsFunc(all, func(d link.Device) bool { return d.Name == "kube-ipvs0" }) {
			v.fires(Warning, Devices, "kube-ipvs0")
		}
	},
}, {
	ID: "PX-08", Layer: "service", Title: "rules of a kube-proxy are there that no longer runs", Severity: Warning, Scope: Node,
	Reads:   []string{KubeProxyRules, Processes},
	When:    "chains or tables of kube-proxy hold rules, and no process kube-proxy is in this namespace",
	Effect:  "They translate Services to endpoints that were right when it ended: connections go to addresses that others may have now, or nobody.",
	Source:  "https://kubernetes.io/docs/reference/networking/virtual-ips/",
	Fix:     "millrace kube-proxy remove, or kube-proxy --cleanup of its own version",
	Undo:    "start kube-proxy again: it writes its rules anew",
	Pitfall: "Deleting the DaemonSet leaves the rules, until the node restarts.",
	look:    leftRules,
}, {
	ID: "PX-15", Layer: "service", Title: "the ports of NodePort Services are used for outgoing connections", Severity: Warning, Scope: Node,
	Reads:   []string{localPorts, reservedPorts, Processes},
	When:    "ip_local_port_range has ports of the range of NodePorts (" + nodePortDefault + ", or that of a kube-apiserver on this node) that ip_local_reserved_ports does not reserve; on nodes with a kubelet",
	Effect:  "A connection of the node may take the port of a Service, and its answers then meet the Service: it never gets through. It happens by chance, and to a few only.",
	Source:  "https://github.com/kubernetes/kubernetes/pull/111697; https://github.com/kubernetes/kops/issues/6342; https://github.com/awslabs/amazon-eks-ami/issues/1307",
	Fix:     "sysctl -w " + reservedPorts + "=" + nodePortDefault + ", and the same in a file in /etc/sysctl.d; what is reserved already belongs into the same list",
	Undo:    "sysctl -w " + reservedPorts + "=LIST, with what it was, and without the file; if nothing was: echo > /proc/sys/net/ipv4/ip_local_reserved_ports",
	Pitfall: "The advice \"ip_local_port_range = 1024 65535\" is what makes it. kube-proxy no longer holds a socket at node ports (kubernetes#108496), so that nothing complains.",
	look:    nodePortsReserved,
}, {
	ID: "PX-16", Layer: "service", Title: "loopback addresses are routed", Severity: Info, Scope: Node,
	Reads:   []string{localnets},
	When:    "route_localnet is 1 for a device",
	Effect:  "kube-proxy's mode iptables sets it to serve node ports at 127.0.0.1. Services of the node that rely on loopback alone can be reached from the network unless rules prevent it.",
	Source:  ipSysctl + " (route_localnet); https://github.com/kubernetes/kubernetes/issues/92315 (CVE-2020-8558)",
	Fix:     "iptables.localhostNodePorts: false in kube-proxy's configuration, restart it, then sysctl -w net.ipv4.conf.DEVICE.route_localnet=0, DEVICE as above (kube-proxy sets it of all)",
	Undo:    "sysctl -w net.ipv4.conf.DEVICE.route_localnet=1, and put localhostNodePorts back",
	Pitfall: "It is about reach, not about speed.",
	look: func(v *view) {
		for _, name := range v.matches(localnets) {
			if strings.TrimSpace(v.last[name].is) == "1" {
				v.fires(Info, name, "1")
			}
		}
		if len(v.matches(localnets)) == 0 {
			v.lacks(localnets, "no such setting")
		}
	},
}}

func leftRules(v *view) {
	found, ok := get(v, KubeProxyRules, v.facts.kubeProxy)
	if !ok || len(found.Parts) == 0 {
		return
	}
	if found.Process != 0 {
		v.sees(KubeProxyRules, "those of process %d, which runs", found.Process)
		return
	}
	if len(v.facts.hidden) > 0 {
		v.lacks(Processes, "rules of kube-proxy are there, and whether it runs cannot be seen")
		return
	}
	rules := map[string]int{}
	for _, part := range found.Parts {
		rules[part.Family+" "+part.Table] += part.Rules
	}
	for _, table := range slices.Sorted(maps.Keys(rules)) {
		v.fires(Warning, KubeProxyRules, "%d rules in table %s", rules[table], table)
	}
}

func nodePortsReserved(v *view) {
	if !v.facts.isNode() {
		v.lacks(Processes, "no kubelet is seen, so that no NodePorts are expected")
		return
	}
	text, ok := v.text(localPorts)
	reserved, there := v.text(reservedPorts)
	if !ok || !there {
		return
	}
	wanted := nodePortDefault
	if v.facts.nodePorts != "" {
		wanted = v.facts.nodePorts
	}
	low, high, err := portRange(text)
	from, to, err2 := portRange(strings.ReplaceAll(wanted, "-", " "))
	kept, err3 := proc.Ranges(reserved)
	if err := errors.Join(err, err2, err3); err != nil {
		v.lacks(localPorts, "%s", reason(err))
		return
	}
	open := proc.Outside(max(low, from), min(high, to), kept)
	if open == 0 {
		v.sees(localPorts, "%d-%d; NodePorts are %s", low, high, wanted)
		return
	}
	// By chance, and to few connections: that is what a warning is. Kubernetes' text says
	// that the ranges must not overlap, and nobody's stops anything for it.
	v.fires(Warning, localPorts, "%d-%d has %d ports of %s that are not reserved", low, high, open, wanted)
	list := strings.Trim(strings.TrimSpace(reserved)+","+wanted, ",")
	v.fix = fmt.Sprintf("sysctl -w %s=%s, and the same in a file in /etc/sysctl.d", reservedPorts, list)
	v.undo = fmt.Sprintf("sysctl -w %s=%s, and without the file", reservedPorts, strings.TrimSpace(reserved))
	if strings.TrimSpace(reserved) == "" { // older versions of sysctl(8) take no empty value
		v.undo = "echo > /proc/sys/net/ipv4/ip_local_reserved_ports, and without the file"
	}
}
