package bench

import (
	"fmt"
	"slices"
	"strings"

	"github.com/millrace/millrace/model"
)

// nftablesRules is the input of `nft -f -` that has the shape kube-proxy 1.36
// gives its rules in its nftables mode: one verdict map from address, protocol
// and port to the Service's chain, which draws an endpoint by number. The
// base chains are those of nftablesFrame: nat at prerouting, output and
// postrouting; filter ahead of the translation at prerouting and output, and
// after it at input, forward and output. A connection that is measured passes
// four of them: both at prerouting, forward, and postrouting. Which filter
// chains there are, and at which priority, differs between the versions of
// kube-proxy: take this as the shape, not as a copy. What no Service here has (node ports, source ranges, Services without
// endpoints) is present as the empty sets and maps that kube-proxy makes.
// kube-proxy drops no invalid packets in this mode.
func nftablesRules(services []*model.Service) string {
	var rules, addresses, verdicts strings.Builder
	rules.WriteString(nftablesFrame)
	for _, service := range services {
		fmt.Fprintf(&addresses, "add element ip kube-proxy cluster-ips { %s }\n", service.ClusterIPs[0])
		for _, port := range service.Ports {
			chain := nftablesChain("service", service, port, "")
			writeNftablesPort(&rules, chain, service, port)
			fmt.Fprintf(&verdicts, "add element ip kube-proxy service-ips { %s . %s . %d : goto %s }\n",
				service.ClusterIPs[0], port.Protocol, port.Port, chain)
		}
	}
	rules.WriteString(addresses.String())
	rules.WriteString(verdicts.String())
	return rules.String()
}

// nftablesChange is the input that replaces from by to, which have the same
// addresses and ports: the chains of the Service and of its endpoints are
// emptied and written again, those of endpoints that went are emptied, as
// kube-proxy does (it deletes them a while later, because kernels before 6.2
// notice late that nothing leads there any more). All else stays.
func nftablesChange(_ []*model.Service, from, to *model.Service) string {
	var chains, rules strings.Builder
	empty := func(chain string) {
		fmt.Fprintf(&chains, "add chain ip kube-proxy %[1]s\nflush chain ip kube-proxy %[1]s\n", chain)
	}
	for i, port := range to.Ports {
		chain := nftablesChain("service", to, port, "")
		empty(chain)
		for _, backend := range port.Backends {
			empty(nftablesEndpoint(to, port, backend))
		}
		for _, backend := range from.Ports[i].Backends {
			if !slices.Contains(port.Backends, backend) {
				empty(nftablesEndpoint(from, port, backend))
			}
		}
		writeNftablesPort(&rules, chain, to, port)
	}
	return chains.String() + rules.String()
}

func writeNftablesPort(rules *strings.Builder, chain string, service *model.Service, port model.ServicePort) {
	draws := make([]string, len(port.Backends))
	for i, backend := range port.Backends {
		to := backend.Address
		endpoint := nftablesEndpoint(service, port, backend)
		draws[i] = fmt.Sprintf("%d : goto %s", i, endpoint)
		fmt.Fprintf(rules, "add chain ip kube-proxy %s\n", endpoint)
		fmt.Fprintf(rules, "add rule ip kube-proxy %s ip saddr %s jump mark-for-masquerade\n", endpoint, to.Addr())
		fmt.Fprintf(rules, "add rule ip kube-proxy %s meta l4proto %s dnat to %s\n", endpoint, port.Protocol, to)
	}
	fmt.Fprintf(rules, "add chain ip kube-proxy %s\n", chain)
	fmt.Fprintf(rules, "add rule ip kube-proxy %s ip daddr %s %s dport %d ip saddr != %s jump mark-for-masquerade\n",
		chain, service.ClusterIPs[0], port.Protocol, port.Port, podRange)
	fmt.Fprintf(rules, "add rule ip kube-proxy %s numgen random mod %d vmap { %s }\n",
		chain, len(draws), strings.Join(draws, ", "))
}

// nftablesChain is a chain's name: what it is for, a hash, and what a person
// looking at the rules wants to read.
func nftablesChain(kind string, service *model.Service, port model.ServicePort, suffix string) string {
	readable := fmt.Sprintf("%s/%s/%s/%s%s", service.Namespace, service.Name.Name, port.Protocol, port.Name, suffix)
	return fmt.Sprintf("%s-%s-%s", kind, chainHash(readable)[:8], readable)
}

func nftablesEndpoint(service *model.Service, port model.ServicePort, backend model.Backend) string {
	return nftablesChain("endpoint", service, port, fmt.Sprintf("__%s/%d", backend.Address.Addr(), backend.Address.Port()))
}

// nftablesFrame has what does not depend on Services. New connections to a
// Service's address that nothing translated end in cluster-ips-check; there are
// none here, but each new connection is asked.
var nftablesFrame = `table ip kube-proxy {
	set cluster-ips { type ipv4_addr; }
	set nodeport-ips { type ipv4_addr; }
	map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
	map service-nodeports { type inet_proto . inet_service : verdict; }
	map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
	map no-endpoint-nodeports { type inet_proto . inet_service : verdict; }
	map firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict; }

	chain mark-for-masquerade { mark set mark or 0x4000; }
	chain masquerading {
		mark and 0x4000 == 0 return
		mark set mark xor 0x4000
		masquerade fully-random
	}
	chain services {
		ip daddr . meta l4proto . th dport vmap @service-ips
		ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
	}
	chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
	chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
	chain nodeport-endpoints-check { ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }
	chain cluster-ips-check {
		ip daddr @cluster-ips reject comment "no such port"
		ip daddr { ` + serviceRange.String() + ` } drop comment "no such Service"
	}

	chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
	chain nat-output { type nat hook output priority -100; jump services; }
	chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }
	chain filter-prerouting-pre-dnat { type filter hook prerouting priority -110; ct state new jump firewall-check; }
	chain filter-output-pre-dnat { type filter hook output priority -110; ct state new jump firewall-check; }
	chain filter-forward {
		type filter hook forward priority 0;
		ct state new jump service-endpoints-check
		ct state new jump cluster-ips-check
	}
	chain filter-input {
		type filter hook input priority 0;
		ct state new jump nodeport-endpoints-check
		ct state new jump service-endpoints-check
	}
	chain filter-output {
		type filter hook output priority 0;
		ct state new jump service-endpoints-check
		ct state new jump cluster-ips-check
	}
}
`
