package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/layer/service"
	"github.com/millrace/millrace/layer/trace/cause"
	"github.com/millrace/millrace/model"
)

// names are those of the cluster, by addresses and the other way round.
type names struct {
	pods     map[netip.Addr]string
	services map[netip.Addr]string
	// of are the addresses that a name stands for: a pod's, or a Service's own and its
	// endpoints'.
	of map[string][]netip.Addr
}

// readNames takes the names from manifests or the API, or from the agent that runs here.
// Without any there are none, which is no error: trace works without a cluster.
func readNames(ctx context.Context, at *place, from *wishes) (*names, error) {
	n := &names{map[netip.Addr]string{}, map[netip.Addr]string{}, map[string][]netip.Addr{}}
	if from.source != "" {
		snapshot, err := firstSnapshot(ctx, from, "") // the pods of all nodes: one may be at the other end
		if err != nil {
			return nil, err
		}
		n.addPods(snapshot.Pods)
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
	for _, row := range rows {
		name := row.Service.String()
		n.add(n.services, name, row.Address.Addr())
		for _, backend := range row.Backends {
			n.of[name] = append(n.of[name], backend.Addr())
		}
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

func (n *names) addService(s *model.Service) {
	name := s.Name.String()
	for _, addr := range slices.Concat(s.ClusterIPs, s.ExternalIPs, s.LoadBalancerIPs) {
		n.add(n.services, name, addr)
	}
	for _, port := range s.Ports {
		for _, backend := range port.Backends {
			n.of[name] = append(n.of[name], backend.Address.Addr())
		}
	}
}

// nameOf is whose an address is, "" if nobody's.
func (n *names) nameOf(addr netip.Addr) string {
	if name := n.pods[addr]; name != "" {
		return "pod " + name
	}
	if name := n.services[addr]; name != "" {
		return "service " + name
	}
	return ""
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

// end is one end of the packets that a person asks about: addresses and a port, or the
// name of a network namespace, whose addresses are known once it was read.
type end struct {
	prefixes []netip.Prefix
	space    string
	port     uint16
}

// ends are FROM and TO, as far as they are given.
type ends []end

func (n *names) parseEnds(args []string) (all ends, err error) {
	for _, arg := range args {
		one, err := n.parseEnd(arg)
		if err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	return all, nil
}

func (n *names) parseEnd(arg string) (end, error) {
	if both, err := netip.ParseAddrPort(arg); err == nil {
		return end{prefixes: []netip.Prefix{whole(both.Addr())}, port: both.Port()}, nil
	}
	if addr, err := netip.ParseAddr(strings.Trim(arg, "[]")); err == nil {
		return end{prefixes: []netip.Prefix{whole(addr)}}, nil
	}
	if prefix, err := netip.ParsePrefix(arg); err == nil {
		return end{prefixes: []netip.Prefix{prefix.Masked()}}, nil
	}
	name, portText, given := strings.Cut(arg, ":")
	var port uint64
	if given {
		var err error
		if port, err = strconv.ParseUint(portText, 10, 16); err != nil {
			return end{}, usage("%q: %q is no port", arg, portText)
		}
	}
	if addresses := n.of[name]; len(addresses) > 0 {
		e := end{port: uint16(port)}
		for _, addr := range addresses {
			e.prefixes = append(e.prefixes, whole(addr))
		}
		return e, nil
	}
	if strings.Contains(name, "/") {
		return end{}, usage("%q: no pod and no Service of this name is known: name the cluster with --source, or use addresses", arg)
	}
	if _, err := os.Stat(pathOfSpace(name)); err != nil {
		return end{}, usage("%q: use an address, ADDRESS:PORT, a range, NAMESPACE/NAME of a pod or Service, or a network namespace's name", arg)
	}
	return end{space: name, port: uint16(port)}, nil
}

func whole(addr netip.Addr) netip.Prefix {
	addr = addr.Unmap().WithZone("")
	return netip.PrefixFrom(addr, addr.BitLen())
}

func (e end) is(a netip.AddrPort, spaces []*cause.Space) bool {
	if e.port != 0 && e.port != a.Port() {
		return false
	}
	if e.space == "" {
		return slices.ContainsFunc(e.prefixes, func(p netip.Prefix) bool { return p.Contains(a.Addr()) })
	}
	for _, s := range spaces {
		if s.Name == e.space || s.Name == "namespace "+e.space {
			return slices.ContainsFunc(s.Addrs, func(own cause.Addr) bool { return own.Prefix.Addr() == a.Addr() })
		}
	}
	return false
}

// filter parts the verdicts that concern the ends asked for, by a tuple that fits in one
// direction or the other, from the others. What has no tuple concerns everybody.
func (all ends) filter(verdicts []cause.Verdict, spaces []*cause.Space) (asked, others []cause.Verdict) {
	for _, v := range verdicts {
		if v.Tuple == nil || all.fit(v, spaces) {
			asked = append(asked, v)
		} else {
			others = append(others, v)
		}
	}
	return asked, others
}

func (all ends) fit(v cause.Verdict, spaces []*cause.Space) bool {
	from, to := v.Tuple.Source, v.Tuple.Destination
	// A listener at all addresses of its namespace has each of them.
	at := slices.IndexFunc(spaces, func(s *cause.Space) bool { return s.Name == v.Where.Namespace })
	is := func(e end, a netip.AddrPort) bool {
		if a.Addr().IsUnspecified() && at >= 0 {
			return slices.ContainsFunc(spaces[at].Addrs, func(own cause.Addr) bool {
				return e.is(netip.AddrPortFrom(own.Prefix.Addr(), a.Port()), spaces)
			})
		}
		return e.is(a, spaces)
	}
	switch len(all) {
	case 0:
		return true
	case 1:
		return is(all[0], from) || is(all[0], to)
	}
	// An end that is not known may be the one that is asked for.
	may := func(e end, a netip.AddrPort) bool { return !a.IsValid() || is(e, a) }
	return may(all[0], from) && may(all[1], to) || may(all[0], to) && may(all[1], from)
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
