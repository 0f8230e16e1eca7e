package doctor

import (
	"slices"
	"strings"

	"github.com/millrace/millrace/kernel/link"
)

// overheads are what tunnels over IPv4 add to a packet, in bytes; over IPv6 it is 20
// more.
var overheads = map[string]int{"vxlan": 50, "geneve": 50, "ipip": 20, "sit": 20, "gre": 24, "wireguard": 60}

// ownAlias begins the alias of millrace's devices: each route by its tunnel has an MTU of its
// own.
const ownAlias = "millrace "

var mtuChecks = []Check{{
	ID: "MT-01", Layer: "mtu", Title: "the packets of a tunnel do not fit the network below it", Severity: Warning, Scope: Node,
	Reads:   []string{Devices},
	When:    "the MTU of a tunnel and what it adds (VXLAN and Geneve 50 bytes, WireGuard 60, GRE 24, IPIP 20) exceed that of the device below it; not of tunnels that programs steer (external), as millrace's own",
	Effect:  "Each full packet is cut into fragments, or dropped where the outer header forbids it: transfers hang while small packets pass.",
	Source:  "https://docs.cilium.io/en/stable/network/concepts/routing/ (50 bytes for VXLAN); https://www.rfc-editor.org/rfc/rfc7348#section-4.3",
	Fix:     "lower the MTU in the network plug-in's configuration, then make the pods anew",
	Undo:    "put the MTU back",
	Pitfall: "ip link set mtu on the tunnel alone leaves the pods' devices, which decide how large packets become.",
	look:    tunnelFits,
}, {
	ID: "MT-06", Layer: "mtu", Title: "packets are cut into fragments on a node with tunnels", Severity: Warning, Scope: Node,
	Reads:   []string{snmp, snmp6, Devices},
	When:    "FragCreates of Ip or Ip6 grows, and the node has a tunnel",
	Effect:  "Twice the packets and the work for each full one, and one that is lost costs both. Nothing is dropped and nothing is logged.",
	Source:  "https://www.rfc-editor.org/rfc/rfc4293 (ipSystemStatsOutFragCreates); https://www.rfc-editor.org/rfc/rfc7348#section-4.3 (VXLAN endpoints must not fragment)",
	Fix:     "lower the MTU of the pods by what the tunnel adds (MT-01)",
	Undo:    "put the MTU back",
	Pitfall: "A program that sends datagrams larger than the MTU is counted as well: look at which device they leave by.",
	look: func(v *view) {
		all, ok := get(v, Devices, v.devices)
		if ok && slices.ContainsFunc(all, func(d link.Device) bool { return overheads[d.Kind] > 0 && d.Up }) {
			v.rises(Warning, "Ip.FragCreates", "Ip6FragCreates")
		}
	},
}, {
	ID: "MT-12", Layer: "mtu", Title: "the ends of a device pair have different MTUs", Severity: Critical, Scope: Everywhere,
	Reads:   []string{Devices},
	When:    "the device of a namespace and its end on the node have different MTUs",
	Effect:  "The end with the lower one drops what is longer, without ICMP and without a reason: connections open, and hang at the first full packet.",
	Source:  "__is_skb_forwardable of https://github.com/torvalds/linux/blob/master/include/linux/netdevice.h",
	Fix:     "ip link set DEVICE mtu N at the end that differs from what the network plug-in is told",
	Undo:    "ip link set DEVICE mtu N, with N what it was",
	Pitfall: "Bulk transfers may pass for a while: what the kernel has not yet cut into packets is not measured.",
	look:    pairsAgree,
}}

func tunnelFits(v *view) {
	all, ok := get(v, Devices, v.devices)
	if !ok {
		return
	}
	for _, tunnel := range all {
		added := overheads[tunnel.Kind]
		if added == 0 || tunnel.Steered || !tunnel.Up || strings.HasPrefix(tunnel.Alias, ownAlias) {
			continue
		}
		at := slices.IndexFunc(all, func(d link.Device) bool { return d.Index == tunnel.Peer })
		if at < 0 { // bound to none: it leaves by the default route
			at = slices.IndexFunc(all, func(d link.Device) bool { return d.DefaultRoute && overheads[d.Kind] == 0 })
		}
		if at >= 0 && tunnel.MTU+added > all[at].MTU {
			v.fires(Warning, Devices, "%s (%s) %d + %d, and %s below it %d", tunnel.Name, tunnel.Kind, tunnel.MTU, added, all[at].Name, all[at].MTU)
		}
	}
}

// peerOf is the end, in the node's namespace, of a device pair of another namespace.
func (s *Space) peerOf(other *Space, d link.Device) *link.Device {
	if d.Kind != "veth" || !d.PeerElsewhere || d.PeerNamespace != other.home {
		return nil
	}
	at := slices.IndexFunc(s.devices.is, func(near link.Device) bool { return near.Index == d.Peer && near.Peer == d.Index })
	if at < 0 {
		return nil
	}
	return &s.devices.is[at]
}

func pairsAgree(v *view) {
	all, ok := get(v, Devices, v.devices)
	node := v.facts.Spaces[0]
	if !ok || v.Space == node {
		return
	}
	for _, d := range all {
		if near := node.peerOf(v.Space, d); near != nil && near.MTU != d.MTU {
			v.fires(Critical, Devices, "%s %d, and its end on the node, %s, %d", d.Name, d.MTU, near.Name, near.MTU)
		}
	}
}
