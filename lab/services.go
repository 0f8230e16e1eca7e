package lab

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/model"
)

// zoneLabel is Kubernetes' well-known label of a node's zone.
const zoneLabel = "topology.kubernetes.io/zone"

// addressBook is which ClusterIPs each Service has.
type addressBook map[model.Name][]netip.Addr

// allocateServices gives every Service its ClusterIPs. Addresses named in the
// manifests come first and are kept; what have holds is kept where it does not
// clash with those; the rest comes from the lab's service range, the same
// address for the same name as long as nothing is in its way. A Service whose
// own address clashes is left out, and is a problem.
func allocateServices(services []*model.Service, have addressBook, r Ranges, nodes []*model.Node) (addressBook, []model.Problem) {
	book, holders := addressBook{}, map[netip.Addr]model.Name{}
	var problems []model.Problem
	for _, s := range services {
		if !needsAddress(s) {
			continue
		}
		if text := claim(s, holders, r, nodes); text != "" {
			problems = append(problems, model.Problem{Where: s.Where, Object: "Service " + s.Name.String(), Field: "spec.clusterIP", Text: text})
			continue
		}
		book[s.Name] = slices.Clone(s.ClusterIPs)
	}
	for _, old := range []bool{true, false} { // old allocations before new ones
		for _, s := range services {
			if _, ok := book[s.Name]; !ok {
				continue
			}
			for i, wanted := range families(s) {
				if wanted && !slices.ContainsFunc(book[s.Name], isFamily(i)) {
					addr := allocate(s.Name, have[s.Name], holders, r.Services[i], i, old)
					if addr.IsValid() {
						holders[addr] = s.Name
						book[s.Name] = append(book[s.Name], addr)
					}
				}
			}
		}
	}
	return book, problems
}

// needsAddress reports whether a Service has ClusterIPs at all.
func needsAddress(s *model.Service) bool {
	return !s.Headless && s.Type != model.ExternalName
}

// families says whether the Service has IPv4 and IPv6. One that leaves the
// choice to the cluster gets both (PreferDualStack).
func families(s *model.Service) [2]bool {
	if !s.IPv4 && !s.IPv6 {
		return [2]bool{true, true}
	}
	return [2]bool{s.IPv4, s.IPv6}
}

func isFamily(i int) func(netip.Addr) bool {
	return func(a netip.Addr) bool { return a.Is6() == (i == 1) }
}

// claim notes the addresses that a manifest names, or says why it cannot.
func claim(s *model.Service, holders map[netip.Addr]model.Name, r Ranges, nodes []*model.Node) string {
	taken := append(r.Pods[:], r.Nodes[:]...)
	for _, node := range nodes {
		taken = append(taken, node.PodCIDRs...)
	}
	for _, addr := range s.ClusterIPs {
		if holder, ok := holders[addr]; ok && holder != s.Name {
			return fmt.Sprintf("%s is also the address of Service %s: give each Service its own", addr, holder)
		}
		if i := slices.IndexFunc(taken, func(p netip.Prefix) bool { return p.Contains(addr) }); i >= 0 {
			return fmt.Sprintf("%s lies in %s, from which pods or nodes take their addresses", addr, taken[i])
		}
	}
	for _, addr := range s.ClusterIPs {
		holders[addr] = s.Name
	}
	return ""
}

// allocate finds an address of one family: the one that the Service had
// before (old), or else a free one. The search starts at a place that depends
// on the name, so that an address given up is hardly ever given on at once.
func allocate(name model.Name, had []netip.Addr, holders map[netip.Addr]model.Name, r netip.Prefix, family int, old bool) netip.Addr {
	if old {
		for _, addr := range had {
			if _, held := holders[addr]; addr.Is6() == (family == 1) && !held && r.Contains(addr) {
				return addr
			}
		}
		return netip.Addr{}
	}
	h := fnv.New64a()
	h.Write([]byte(name.String()))
	const size = 1<<16 - 2 // both ranges have at least 16 bits
	for i := range uint64(size) {
		addr := offset(r, 1+(h.Sum64()+i)%size)
		if _, held := holders[addr]; !held {
			return addr
		}
	}
	return netip.Addr{}
}

// podIndex finds the pods that a selector matches without looking at all.
type podIndex map[labelKey][]member

type labelKey struct{ namespace, label, value string }

func indexPods(members []member) podIndex {
	index := podIndex{}
	for _, m := range members {
		for label, value := range m.Pod.Labels {
			key := labelKey{m.Pod.Namespace, label, value}
			index[key] = append(index[key], m)
		}
	}
	return index
}

// match lists the pods that carry every label of the selector. An empty
// selector matches none: such a Service has its endpoints from elsewhere.
func (x podIndex) match(namespace string, selector map[string]string) []member {
	labels := slices.Sorted(maps.Keys(selector))
	if len(labels) == 0 {
		return nil
	}
	var found []member
	for _, m := range x[labelKey{namespace, labels[0], selector[labels[0]]}] {
		if !slices.ContainsFunc(labels, func(l string) bool {
			v, ok := m.Pod.Labels[l]
			return !ok || v != selector[l]
		}) {
			found = append(found, m)
		}
	}
	return found
}

// publishService is the Service as the living cluster shows it: with its
// addresses, and with the endpoints derived from the pods beside those that
// EndpointSlices of the manifests gave.
func publishService(s *model.Service, ips []netip.Addr, pods podIndex, zones map[string]string) *model.Service {
	out := *s
	out.ClusterIPs = ips
	fam := families(s)
	out.IPv4, out.IPv6 = fam[0], fam[1]
	out.Ports = slices.Clone(s.Ports)
	matched := pods.match(s.Namespace, s.Selector)
	for i := range out.Ports {
		port := &out.Ports[i]
		backends := slices.Clone(port.Backends)
		for _, m := range matched {
			backends = append(backends, podBackends(&out, port, m, zones[m.Pod.Node])...)
		}
		slices.SortStableFunc(backends, compareBackends)
		port.Backends = slices.CompactFunc(backends, func(a, b model.Backend) bool { return a.Address == b.Address })
	}
	return &out
}

// compareBackends sorts by address and, where pods share one on their node,
// the one first that most likely answers there.
func compareBackends(a, b model.Backend) int {
	better := func(x, y bool) int {
		switch {
		case x == y:
			return 0
		case x:
			return -1
		}
		return 1
	}
	return cmp.Or(a.Address.Compare(b.Address), better(a.Ready, b.Ready), better(a.Serving, b.Serving), a.Pod.Compare(b.Pod))
}

// podBackends are the endpoints of one pod behind one port: one for each
// family that both have. The conditions are those that Kubernetes' endpoint
// slice controller sets: a leaving pod is terminating, and serving for as long
// as it answers.
func podBackends(s *model.Service, port *model.ServicePort, m member, zone string) []model.Backend {
	number := targetPort(port, m.Pod)
	if number == 0 {
		return nil
	}
	var backends []model.Backend
	for _, addr := range m.Pod.Addresses {
		if addr.Is4() && !s.IPv4 || addr.Is6() && !s.IPv6 {
			continue
		}
		backends = append(backends, model.Backend{
			Address:     netip.AddrPortFrom(addr, number),
			Ready:       s.PublishNotReadyAddresses || m.Ready && !m.Leaving,
			Serving:     m.Ready,
			Terminating: m.Leaving,
			Node:        m.Pod.Node,
			Zone:        zone,
			Pod:         m.Pod.Name,
		})
	}
	return backends
}

// targetPort is the pod's port behind a Service port; 0 where the pod has no
// port of the name asked for.
func targetPort(port *model.ServicePort, pod *model.Pod) uint16 {
	if port.TargetName == "" {
		return cmp.Or(port.TargetPort, port.Port)
	}
	for _, p := range pod.Ports {
		if p.Name == port.TargetName && p.Protocol == port.Protocol {
			return p.Port
		}
	}
	return 0
}
