package dir

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/millrace/millrace/model"
)

// dump says what a Snapshot holds, a line for each thing.
func dump(s *model.Snapshot) string {
	var b strings.Builder
	for _, svc := range s.Services {
		dumpService(&b, svc)
	}
	for _, p := range s.Pods {
		fmt.Fprintf(&b, "pod %s%s\n", p.Name, dumpPod(p))
	}
	for _, n := range s.Nodes {
		fmt.Fprintf(&b, "node %s%s%s%s", n.Name, some(" at", n.Addresses), some(" pods", n.PodCIDRs), pairs(" labels", n.Labels))
		if n.Leaving {
			b.WriteString(" leaving")
		}
		b.WriteString("\n")
	}
	for _, w := range s.Workloads {
		count := fmt.Sprint(w.Replicas)
		if w.PerNode {
			count = "one a node"
		}
		fmt.Fprintf(&b, "workload %s: %s,%s\n", w, count, dumpPod(&w.Template))
	}
	for _, kind := range slices.Sorted(maps.Keys(s.Ignored)) {
		fmt.Fprintf(&b, "ignored %d %s\n", s.Ignored[kind], kind)
	}
	if s.Unread != 0 {
		fmt.Fprintf(&b, "unread %d\n", s.Unread)
	}
	for _, p := range s.Problems {
		fmt.Fprintf(&b, "problem %v\n", p)
	}
	return b.String()
}

func dumpService(b *strings.Builder, s *model.Service) {
	fmt.Fprintf(b, "service %s %s%s%s%s%s%s%s\n", s.Name, s.Type, some(" at", s.ClusterIPs), when(" headless", s.Headless),
		when(" ipv4", s.IPv4), when(" ipv6", s.IPv6), pairs(" selects", s.Selector), when(" publishes not ready", s.PublishNotReadyAddresses))
	dumpContract(b, s)
	for _, p := range s.Ports {
		target := fmt.Sprint(p.TargetPort)
		if p.TargetPort == 0 {
			target = "same"
		}
		if p.TargetName != "" {
			target = p.TargetName
		}
		fmt.Fprintf(b, "  port %q %d/%s -> %s%s\n", p.Name, p.Port, p.Protocol, target, when(fmt.Sprint(" node port ", p.NodePort), p.NodePort != 0))
		for _, e := range p.Backends {
			fmt.Fprintf(b, "    %s%s%s%s%s%s%s%s\n", e.Address, when(" ready", e.Ready), when(" serving", e.Serving), when(" terminating", e.Terminating),
				named(" node ", e.Node), named(" zone ", e.Zone), named(" pod ", strings.TrimSuffix(e.Pod.String(), "/")), dumpHints(e))
		}
	}
}

// dumpContract says what a Service asks for beyond its ClusterIP, nothing for most.
func dumpContract(b *strings.Builder, s *model.Service) {
	line := some(" external", s.ExternalIPs) + some(" load balancer", s.LoadBalancerIPs) + some(" for", s.SourceRanges) +
		when(" internal local", s.InternalLocal) + when(" external local", s.ExternalLocal) +
		when(fmt.Sprint(" affinity ", s.Affinity), s.Affinity != 0) + when(fmt.Sprint(" health check ", s.HealthCheckPort), s.HealthCheckPort != 0)
	b.WriteString(when(" "+line+"\n", line != ""))
}

// dumpHints asks for the names that the stories use.
func dumpHints(e model.Backend) string {
	var names []string
	for _, name := range []string{"n1", "n2", "a", "b"} {
		if _, ok := e.Hints.Nodes(name); ok {
			names = append(names, "node "+name)
		}
		if _, ok := e.Hints.Zones(name); ok {
			names = append(names, "zone "+name)
		}
	}
	return when(" for "+strings.Join(names, ", "), len(names) > 0)
}

func dumpPod(p *model.Pod) string {
	var ports []string
	for _, c := range p.Ports {
		ports = append(ports, strings.TrimPrefix(fmt.Sprintf("%s:%d/%s", c.Name, c.Port, c.Protocol), ":"))
	}
	return named(" on ", p.Node) + some(" at", p.Addresses) + when(" hostNetwork", p.HostNetwork) + when(" ready", p.Ready) +
		some(" listens", ports) + pairs(" labels", p.Labels)
}

func when(text string, on bool) string {
	if on {
		return text
	}
	return ""
}

func named(text, name string) string { return when(text+name, name != "") }

func some[T any](text string, list []T) string {
	return when(text+" "+strings.Trim(fmt.Sprint(list), "[]"), len(list) > 0)
}

func pairs(text string, m map[string]string) string {
	var list []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		list = append(list, k+"="+m[k])
	}
	return some(text, list)
}
