package bench

import (
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"strings"

	"github.com/millrace/millrace/model"
)

// largeCluster is the number of endpoints above which kube-proxy leaves the
// comments in Service and endpoint chains away (--help of kube-proxy does not
// say so; its largeClusterEndpointsThreshold does).
const largeCluster = 1000

// iptablesRules is the input of iptables-restore, legacy or nft, that has the
// shape kube-proxy 1.36 gives its rules in its iptables mode: the same tables,
// chains, matches and order of matches, so that a packet meets as many of them
// as it would on a node. One KUBE-SERVICES rule a Service port, searched in
// order; after it the Service's chain, which draws an endpoint, and the
// endpoint's, which translates.
//
// Left out, because no Service here has them: node ports, load balancer
// addresses, Services without endpoints, and the nfacct counter that kube-proxy
// adds to the rule for invalid packets where the kernel has it.
func iptablesRules(services []*model.Service) string {
	return writeIptables(services, services, true)
}

// iptablesChange is the input that brings one changed Service into the rules of
// services, as kube-proxy writes it when it knows what changed: KUBE-SERVICES is
// written again in full, with a rule for each Service, and of the Services'
// chains only those of the one that changed. The chains of endpoints that went
// stay; kube-proxy deletes them in a later run.
func iptablesChange(services []*model.Service, _, to *model.Service) string {
	return writeIptables(services, []*model.Service{to}, false)
}

// writeIptables writes KUBE-SERVICES for services, the chains of some of them, and
// in the first run of all what kube-proxy writes once.
func writeIptables(services, some []*model.Service, first bool) string {
	commented := countBackends(services) <= largeCluster
	var rules, chains, portals, bodies strings.Builder
	for _, service := range services {
		for _, port := range service.Ports {
			writeIptablesPortal(&portals, service, port)
		}
	}
	for _, service := range some {
		for _, port := range service.Ports {
			writeIptablesPort(&chains, &bodies, service, port, commented)
		}
	}
	parts := []string{iptablesFilter, iptablesForward, "COMMIT\n", iptablesNat, chains.String(), iptablesNatRules,
		portals.String(), bodies.String(), iptablesNodePorts, "COMMIT\n"}
	if first {
		parts = []string{iptablesMangle, iptablesFilter, iptablesFilterOnce, iptablesForward, "COMMIT\n",
			iptablesNat, iptablesCanary, chains.String(), iptablesNatOnce, iptablesNatRules,
			portals.String(), bodies.String(), iptablesNodePorts, "COMMIT\n"}
	}
	for _, part := range parts {
		rules.WriteString(part)
	}
	return rules.String()
}

// The canary chains are kube-proxy's way of noticing that someone flushed the
// rules; that in mangle brings its hooks into the path of every packet.
const (
	iptablesCanary = ":KUBE-PROXY-CANARY - [0:0]\n"
	iptablesMangle = "*mangle\n" + iptablesCanary + "COMMIT\n"
)

// What does not depend on Services in the filter table: chains that are emptied
// and written in every run, jumps into them that are made once, and the rules.
const (
	iptablesFilter = `*filter
:KUBE-NODEPORTS - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
`
	iptablesFilterOnce = iptablesCanary + `:KUBE-FIREWALL - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "source ranges of load balancers" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "health check ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "external addresses of Services" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "source ranges of load balancers" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "what to forward" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "addresses of Services" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "external addresses of Services" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "source ranges of load balancers" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "addresses of Services" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m comment --comment "no loopback addresses from outside" -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
`
	iptablesForward = `-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "what was marked" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "what belongs to a connection" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
`
)

// The same for the nat table.
const (
	iptablesNat = `*nat
:KUBE-NODEPORTS - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
`
	iptablesNatOnce = `-A PREROUTING -m comment --comment "addresses of Services" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "addresses of Services" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "what to masquerade" -j KUBE-POSTROUTING
`
	iptablesNatRules = `-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment "Service traffic that was marked" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
`
	iptablesNodePorts = `-A KUBE-SERVICES -m comment --comment "node ports, after all Services" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
`
)

func iptablesName(service *model.Service, port model.ServicePort) (name, chain string) {
	name = fmt.Sprintf("%s:%s", service.Name, port.Name)
	return name, "KUBE-SVC-" + chainHash(name, port.Protocol.String())
}

func iptablesMatch(service *model.Service, port model.ServicePort) string {
	return fmt.Sprintf("-m %[1]s -p %[1]s -d %[2]s --dport %[3]d", port.Protocol, service.ClusterIPs[0], port.Port)
}

// writeIptablesPortal writes the rule that leads to a Service's chain.
func writeIptablesPortal(portals *strings.Builder, service *model.Service, port model.ServicePort) {
	name, chain := iptablesName(service, port)
	fmt.Fprintf(portals, "-A KUBE-SERVICES -m comment --comment \"%s cluster IP\" %s -j %s\n", name, iptablesMatch(service, port), chain)
}

// writeIptablesPort writes the chains of a Service and its endpoints.
func writeIptablesPort(chains, bodies *strings.Builder, service *model.Service, port model.ServicePort, commented bool) {
	name, serviceChain := iptablesName(service, port)
	comment := func(text string) string {
		if !commented {
			return ""
		}
		return fmt.Sprintf("-m comment --comment %q ", text)
	}
	fmt.Fprintf(chains, ":%s - [0:0]\n", serviceChain)
	fmt.Fprintf(bodies, "-A %s %s%s ! -s %s -j KUBE-MARK-MASQ\n", serviceChain, comment(name+" cluster IP"), iptablesMatch(service, port), podRange)
	for i, backend := range port.Backends {
		to := backend.Address
		endpointChain := "KUBE-SEP-" + chainHash(name, port.Protocol.String(), to.String())
		// The i-th of n rules is reached when those before it were not drawn,
		// so it must match with 1/(n-i); the last one always does.
		draw := ""
		if left := len(port.Backends) - i; left > 1 {
			draw = fmt.Sprintf("-m statistic --mode random --probability %.10f ", 1/float64(left))
		}
		fmt.Fprintf(chains, ":%s - [0:0]\n", endpointChain)
		fmt.Fprintf(bodies, "-A %s %s%s-j %s\n", serviceChain, comment(fmt.Sprintf("%s -> %s", name, to)), draw, endpointChain)
		fmt.Fprintf(bodies, "-A %s %s-s %s -j KUBE-MARK-MASQ\n", endpointChain, comment(name), to.Addr())
		fmt.Fprintf(bodies, "-A %s %s-m %[3]s -p %[3]s -j DNAT --to-destination %[4]s\n", endpointChain, comment(name), port.Protocol, to)
	}
}

// chainHash makes 16 letters out of what identifies a chain, for chain names
// have at most 28 (iptables-extensions(8), XT_EXTENSION_MAXNAMELEN).
func chainHash(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "")))
	return base32.StdEncoding.EncodeToString(sum[:])[:16]
}

func countBackends(services []*model.Service) int {
	count := 0
	for _, service := range services {
		for _, port := range service.Ports {
			count += len(port.Backends)
		}
	}
	return count
}
