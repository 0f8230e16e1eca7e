package main

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/layer/service"
	"github.com/millrace/millrace/layer/trace/cause"
	"github.com/millrace/millrace/model"
)

// names are those of the cluster, by addresses and the other way round.
type names struct {
	pods     map[netip.Addr]string
	nodes    map[netip.Addr]string
	services map[netip.Addr]string
	// of are the addresses that a name stands for: a pod's, a node's, or a Service's own.
	of map[string][]netip.Addr
	// leads are the Services' addresses and ports, and where they lead.
	leads []lead
}

// lead is an address and a port of a Service: "shop/web:http". A node port has no address.
type lead struct {
	service, port string
	protocol      uint8
	front         netip.AddrPort
	backends      []netip.AddrPort
}

// readNames takes the names from manifests or the API, or from the agent that runs here.
// Without any there are none, which is no error: trace works without a cluster.
func readNames(ctx context.Context, at *place, from *wishes) (*names, error) {
	n := &names{pods: map[netip.Addr]string{}, nodes: map[netip.Addr]string{}, services: map[netip.Addr]string{}, of: map[string][]netip.Addr{}}
	if from.source != "" {
		snapshot, err := firstSnapshot(ctx, from, "") // the pods of all nodes: one may be at the other end
		if err != nil {
			return nil, err
		}
		n.addPods(snapshot.Pods)
		n.addNodes(snapshot.Nodes)
		for _, s := range snapshot.Services {
			n.addService(s)
		}
		return n, nil
	}
	var pods []*model.Pod
	var rows []*service.Row
	if agent.Ask(ctx, at.run, "/pods", &pods) != nil || agent.Ask(ctx, at.run, "/wanted/service", &rows) != nil {
		return n, nil // there is no agent
	}
	n.addPods(pods)
	var nodes []*model.Node
	if agent.Ask(ctx, at.run, "/nodes", &nodes) == nil {
		n.addNodes(nodes)
	}
	for _, row := range rows {
		name := row.Owner()
		if row.Entry != service.AtHostPort { // that is at the node's own addresses
			n.add(n.services, name, row.Address.Addr())
		}
		n.leads = append(n.leads, lead{name, row.Port, uint8(row.Protocol), row.Address, row.Backends})
	}
	return n, nil
}

func (n *names) add(to map[netip.Addr]string, name string, addr netip.Addr) {
	if addr.IsValid() && !addr.IsUnspecified() {
		to[addr] = name
		n.of[name] = append(n.of[name], addr)
	}
}

func (n *names) addPods(pods []*model.Pod) {
	for _, pod := range pods {
		for _, addr := range pod.Addresses {
			if !pod.HostNetwork {
				n.add(n.pods, pod.Name.String(), addr)
			}
		}
	}
}

func (n *names) addNodes(nodes []*model.Node) {
	for _, node := range nodes {
		for _, addr := range node.Addresses {
			n.add(n.nodes, node.Name, addr)
		}
	}
}

func (n *names) addService(s *model.Service) {
	name := s.Name.String()
	addresses := slices.Concat(s.ClusterIPs, s.ExternalIPs, s.LoadBalancerIPs)
	for _, addr := range addresses {
		n.add(n.services, name, addr)
	}
	for _, port := range s.Ports {
		var backends []netip.AddrPort
		for _, backend := range port.Backends {
			backends = append(backends, backend.Address)
		}
		for _, addr := range addresses {
			n.leads = append(n.leads, lead{name, port.Name, uint8(port.Protocol), netip.AddrPortFrom(addr, port.Port), backends})
		}
		if port.NodePort != 0 {
			n.leads = append(n.leads, lead{name, port.Name, uint8(port.Protocol), netip.AddrPortFrom(netip.IPv4Unspecified(), port.NodePort), backends},
				lead{name, port.Name, uint8(port.Protocol), netip.AddrPortFrom(netip.IPv6Unspecified(), port.NodePort), backends})
		}
	}
}

// hosts are the names of pods and nodes.
func (n *names) hosts() []string {
	return slices.Concat(slices.Collect(maps.Values(n.pods)), slices.Collect(maps.Values(n.nodes)))
}

// nameOf is whose an address is, "" if nobody's.
func (n *names) nameOf(addr netip.Addr) string {
	if name := n.pods[addr]; name != "" {
		return "pod " + name
	}
	if name := n.services[addr]; name != "" {
		return "service " + name
	}
	if name := n.nodes[addr]; name != "" {
		return "node " + name
	}
	return ""
}

// String is "shop/web:http".
func (l lead) String() string {
	if l.port == "" {
		return l.service
	}
	return l.service + ":" + l.port
}

// addresses are those of all Services, as evidence.
func (n *names) addresses() (all []cause.Service) {
	for _, l := range n.leads {
		all = append(all, cause.Service{Name: l.String(), Protocol: l.protocol, Address: l.front, Endpoints: len(l.backends)})
	}
	return all
}

// label says of the namespaces which pods' they are.
func (n *names) label(spaces []*cause.Space) {
	for _, s := range spaces {
		for _, a := range s.Addrs {
			if name := n.pods[a.Prefix.Addr()]; name != "" {
				s.Pod = name
			}
		}
	}
}

// describe gives the ends of a verdict's packet their names.
func (n *names) describe(verdicts []cause.Verdict) {
	for i := range verdicts {
		if t := verdicts[i].Tuple; t != nil {
			t.SourceName, t.DestinationName = n.nameOf(t.Source.Addr()), n.nameOf(t.Destination.Addr())
		}
	}
}

// named is an end with its name behind it.
func named(a netip.AddrPort, name string) string {
	if !a.IsValid() {
		return "unknown"
	}
	if name == "" {
		return a.String()
	}
	return fmt.Sprintf("%s (%s)", a, name)
}
