package doctor

import (
	"net/netip"
	"slices"
	"strings"
)

const (
	rpFilters = "net.ipv4.conf.*.rp_filter"
	ipForward = "net.ipv4.ip_forward"
)

var routingChecks = []Check{{
	ID: "HS-20", Layer: "routing", Title: "packets are dropped because their way back is another", Severity: Critical, Scope: Everywhere,
	Reads:   []string{netstat, rpFilters},
	When:    "IPReversePathFilter grows: critical where a pod's filter is strict, a warning where the node's is, else information",
	Effect:  "Strict reverse path filtering drops what comes in by a device other than the one the answer would leave by: pods with several devices, or plug-ins that route by rules, lose connections. What comes to a node from outside may be forged, and then rightly dropped.",
	Source:  ipSysctl + " (rp_filter)",
	Fix:     "where it is strict: sysctl -w net.ipv4.conf.DEVICE.rp_filter=2 in that namespace, of the device that the packets come in by; else nothing leads back to their senders at all: ip route get SENDER",
	Undo:    "sysctl -w net.ipv4.conf.DEVICE.rp_filter=N, with N what it was",
	Pitfall: "The greater of \"all\" and the device's own counts: 0 at the device does nothing while all is 1, and 2 is enough at either.",
	look:    reversePath,
}, {
	ID: "HS-21", Layer: "routing", Title: "the node does not forward its pods' packets", Severity: Critical, Scope: Everywhere,
	Reads:   []string{ipForward, Devices},
	When:    "ip_forward is 0 on the node, and a namespace has its default route over a device pair whose end on the node is no part of a bridge",
	Effect:  "Pods reach nothing beyond the node, and each other not either.",
	Source:  ipSysctl + " (ip_forward); https://kubernetes.io/docs/setup/production-environment/container-runtimes/#prerequisite-ipv4-forwarding-optional",
	Fix:     "sysctl -w " + ipForward + "=1, and the same in a file in /etc/sysctl.d",
	Undo:    "sysctl -w " + ipForward + "=0, and without the file",
	Pitfall: "Each change of it resets all of net.ipv4.conf to the defaults for hosts or for routers: set it first, the others after it.",
	look:    forwarding,
}, {
	ID: "HS-35", Layer: "routing", Title: "packets arrive with wrong checksums", Severity: Warning, Scope: Everywhere,
	Reads:   []string{snmp, snmp6, netstat},
	When:    "InCsumErrors of Tcp, Udp, Udp6 or Ip grows",
	Effect:  "They are dropped. Where all of one kind are, a device computes checksums wrongly for tunnels; where few are, it is the wire.",
	Source:  "__udp4_lib_rcv of https://github.com/torvalds/linux/blob/master/net/ipv4/udp.c and tcp_v4_rcv of net/ipv4/tcp_ipv4.c; https://github.com/projectcalico/calico/issues/3145 (tunnels)",
	Fix:     "on the sender's node, for tunnels: ethtool -K DEVICE tx-checksum-ip-generic off, of the VXLAN device",
	Undo:    "ethtool -K DEVICE tx-checksum-ip-generic on",
	Pitfall: "Where connection tracking sees them first they count as invalid, and rules that drop those hide the cause.",
	look: func(v *view) {
		v.rises(Warning, "Tcp.InCsumErrors", "Udp.InCsumErrors", "Udp6InCsumErrors", "IpExt.InCsumErrors")
	},
}, {
	ID: "HS-36", Layer: "routing", Title: "packets have no route", Severity: Warning, Scope: Everywhere,
	Reads:   []string{snmp, netstat},
	When:    "InNoRoutes (packets to forward) or OutNoRoutes (the namespace's own; info) grows",
	Effect:  "They are dropped; the sender is told by ICMP, which is often filtered on the way.",
	Source:  counterDoc + " (IpExtInNoRoutes, IpOutNoRoutes); ip_error of https://github.com/torvalds/linux/blob/master/net/ipv4/route.c",
	Fix:     "ip route get ADDRESS in that namespace; the routes of pods are written by the network plug-in: look at its agent",
	Undo:    "nothing is changed by looking",
	Pitfall: "A blackhole route drops without any counter: this check does not see it.",
	look: func(v *view) {
		v.rises(Warning, "IpExt.InNoRoutes")
		v.rises(Info, "Ip.OutNoRoutes")
	},
}, {
	ID: "HS-37", Layer: "routing", Title: "fragments cannot be put together", Severity: Warning, Scope: Everywhere,
	Reads:   []string{snmp, snmp6},
	When:    "ReasmFails of Ip or Ip6 grows",
	Effect:  "One fragment of a datagram was lost or filtered, and so the whole of it is: large DNS answers, and tunnels whose packets are cut (MT-06).",
	Source:  "https://www.rfc-editor.org/rfc/rfc4293 (ipSystemStatsReasmFails); " + ipSysctl + " (ipfrag_time)",
	Fix:     "avoid fragments: an MTU that fits (MT-01), EDNS sizes of 1232 bytes; then look for rules that drop fragments",
	Undo:    "put the MTU back",
	Pitfall: "They fail 30 s (ipfrag_time) after the first fragment came: a short window sees them late.",
	look:    func(v *view) { v.rises(Warning, "Ip.ReasmFails", "Ip6ReasmFails") },
}}

func reversePath(v *view) {
	grown, ok := v.rise("TcpExt.IPReversePathFilter")
	if !ok || grown == 0 {
		v.sees("TcpExt.IPReversePathFilter", "%s", v.inWindow(grown))
		return
	}
	strict := v.strict()
	severity := Info // loose: their sources are nowhere
	switch {
	case len(strict) > 0 && v.Space == v.facts.Spaces[0]:
		severity = Warning // forged ones may be among them
	case len(strict) > 0:
		severity = Critical
	}
	v.fires(severity, "TcpExt.IPReversePathFilter", "%s", v.inWindow(grown))
	for _, name := range strict {
		v.fires(severity, name, "1: strict")
	}
}

// strict are the settings that make devices strict: the greater of a device's own and that
// of "all" counts, and 2 is loose.
func (v *view) strict() (names []string) {
	const all = "net.ipv4.conf.all.rp_filter"
	of := func(name string) string { return strings.TrimSpace(v.last[name].is) }
	for _, name := range v.matches(rpFilters) {
		if of(name) == "1" && of(all) != "2" && !strings.Contains(name, ".default.") {
			names = append(names, name)
		}
	}
	return names
}

func forwarding(v *view) {
	node := v.facts.Spaces[0]
	if v.Space == node {
		v.number(ipForward) // notes it, where it cannot be read
		get(v, Devices, v.devices)
		return
	}
	devices, ok := get(v, Devices, v.devices)
	if !ok || strings.TrimSpace(node.last[ipForward].is) != "0" {
		return
	}
	for _, d := range devices {
		near := node.peerOf(v.Space, d)
		if near != nil && near.Master == 0 && d.DefaultRoute && slices.ContainsFunc(d.Addresses, netip.Addr.Is4) {
			v.fires(Critical, ipForward, "0 on the node, whose %s is the default route of this namespace", near.Name)
		}
	}
}
