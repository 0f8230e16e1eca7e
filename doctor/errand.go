package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/probe"
)

// What is sent to find out, as Check.Reads names it. It is sent by Host.Probe alone, and
// only for checks that somebody named.
const (
	// Echoes are ICMP echo requests to other nodes and to a pod on each.
	Echoes = "ICMP echo"
	// Queries are DNS queries to each server of the cluster and to their Service.
	Queries = "DNS query"
	// Connects are TCP connections to a Service of each type, and to an endpoint of it.
	Connects = "TCP connection"
)

// Limits of what a run sends.
const (
	mostPeers   = 16               // other nodes; over all nodes each is asked by as many
	mostServers = 16               // DNS servers
	atOnce      = 8                // errands under way
	sendFor     = 60 * time.Second // after which no new one is begun
)

// errTooLate is of what was not begun in time.
var errTooLate = fmt.Errorf("the %s for all probes were over", sendFor)

// errand is one question that is sent, and what came back.
type errand struct {
	read string // Echoes, Queries, Connects
	// scope is the object that is asked, "Pod shop/web-1"; home the node that it is on, ""
	// if it is on none.
	scope, home string
	from        *Space
	to          netip.AddrPort
	// name, kind ("A", "AAAA") and network ("udp", "tcp") are of a query.
	name, kind, network string
	// part is what of a Service a connection is to, of is the Service.
	part, of string
	// pod says that it is a pod's address, and not a node's.
	pod bool

	way        link.Way
	unresolved bool // the next hop did not say its hardware address
	path       probe.Path
	hop        probe.Hop
	reply      probe.Reply
	took       time.Duration
	// wayErr, hopErr and err are why there is no way, first hop, or other answer.
	wayErr, hopErr, err error
}

// probed is what a run has sent.
type probed struct {
	all []*errand
	// err is why nothing was sent, of any or of a kind.
	err  error
	none map[string]error
	// want are the addresses that a name is to have; domain is the cluster's, known
	// says that it was read, and not taken to be the usual one.
	want   []netip.Addr
	domain string
	known  bool
	// peers is how many other nodes there are.
	peers int
	// left are types of Services that no connection was made to, and why.
	left []string
}

// wire sends; tests have their own.
type wire struct {
	way     func(space string, to netip.Addr) (link.Way, error)
	lost    func(space string, w link.Way, to netip.Addr) (bool, error)
	mtu     func(ctx context.Context, space string, to netip.Addr, most int) (probe.Path, error)
	hop     func(ctx context.Context, space string, to netip.Addr) (probe.Hop, error)
	resolve func(ctx context.Context, space, network string, server netip.AddrPort, name string, six bool) (probe.Reply, error)
	connect func(ctx context.Context, space string, to netip.AddrPort) (time.Duration, error)
}

func thisWire() wire {
	return wire{way: wayTo, lost: nextHopLost, mtu: probe.MTU, hop: probe.FirstHop, resolve: probe.Resolve, connect: probe.Connect}
}

func wayTo(space string, to netip.Addr) (link.Way, error) {
	net, err := link.Open(space)
	if err != nil {
		return link.Way{}, errors.Join(err, probe.ErrUnsent)
	}
	defer net.Close()
	return net.Way(to)
}

func nextHopLost(space string, w link.Way, to netip.Addr) (bool, error) {
	net, err := link.Open(space)
	if err != nil {
		return false, err
	}
	defer net.Close()
	if w.Via.IsValid() {
		to = w.Via
	}
	return net.Unresolved(w.Index, to)
}

// Probe sends what the checks ask for: from this node, whose cluster f has, and of path
// MTUs and names also from one pod on it. It sends nothing unless a check was named that
// says so (Check.Sends). It tells progress; the error is that of an end of ctx.
func (h *Host) Probe(ctx context.Context, f *Facts, checks []Check, progress io.Writer) error {
	sends := func(read string) bool {
		return slices.ContainsFunc(checks, func(c Check) bool {
			return c.Sends() && slices.Contains(c.Reads, read) && f.cluster.unread(&c) == nil
		})
	}
	if f.cluster == nil || !sends(Echoes) && !sends(Queries) && !sends(Connects) {
		return nil
	}
	p := &probed{none: map[string]error{}}
	f.probed = p
	me, pods, err := h.asNode(f.cluster)
	if p.err = err; err != nil {
		return nil
	}
	if sends(Echoes) {
		p.echoes(f.cluster, me, pods)
	}
	if sends(Queries) {
		p.queries(f.cluster, pods)
	}
	if sends(Connects) {
		p.connects(f.cluster, me)
	}
	fmt.Fprintf(progress, "send %d probes, for a minute at most\n", len(p.all))
	var several errgroup.Group
	several.SetLimit(atOnce)
	begun := time.Now()
	for _, e := range p.all {
		several.Go(func() error {
			if e.err = context.Cause(ctx); e.err == nil && time.Since(begun) > sendFor {
				e.err = errTooLate
			}
			if e.err == nil {
				h.wire.run(ctx, e)
			}
			return nil
		})
	}
	several.Wait()
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("send probes: %w", err)
	}
	return nil
}

// run does an errand.
func (w *wire) run(ctx context.Context, e *errand) {
	space := e.from.path
	switch e.read {
	case Queries:
		e.reply, e.err = w.resolve(ctx, space, e.network, e.to, e.name, e.kind == "AAAA")
	case Connects:
		e.took, e.err = w.connect(ctx, space, e.to)
	case Echoes:
		to := e.to.Addr()
		if e.way, e.wayErr = w.way(space, to); e.wayErr != nil {
			e.err = e.wayErr
			return
		}
		if e.way.Local {
			e.hop = probe.Hop{From: to, Arrived: true}
			return // it would ask itself
		}
		e.hop, e.hopErr = w.hop(ctx, space, to)
		if e.hopErr != nil {
			e.unresolved, _ = w.lost(space, e.way, to) // then it is only silent
		}
		if e.unresolved {
			e.err = e.hopErr
			return
		}
		e.path, e.err = w.mtu(ctx, space, to, e.way.MTU)
	}
}

// unread is why a check's objects could not all be read.
func (c *Cluster) unread(check *Check) error {
	for _, read := range check.Reads {
		if o, there := c.kinds[read]; there && o.why() != nil {
			return o.why()
		}
	}
	return nil
}

// objectsOf are those of a kind that were read; checks say why there are none.
func objectsOf[T any](c *Cluster, read string) []T {
	if o, there := c.kinds[read].(*objects[T]); there {
		return o.all
	}
	return nil
}

// asNode finds out which node of the cluster this one is, by its addresses, and a pod on
// it that no NetworkPolicy limits: its namespace, nil where there is none. Probes from
// elsewhere would take another way.
func (h *Host) asNode(c *Cluster) (me *node, pods []*Space, err error) {
	f := &Facts{}
	if err := h.find(f); err != nil {
		return nil, nil, err
	}
	here := f.Spaces[0]
	err = h.within(here, func(root string) (err error) {
		here.devices.is, _, err = h.devices(root)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	nodes := objectsOf[node](c, Nodes)
	at := slices.IndexFunc(nodes, func(n node) bool { return slices.ContainsFunc(n.internal(), here.has) })
	if at < 0 {
		return nil, nil, fmt.Errorf("none of the cluster's %d nodes has an address of this host, and probes go out from a node", len(nodes))
	}
	me = &nodes[at]
	pods = []*Space{here}
	free := unlimited(c, me)
	for _, s := range f.Spaces[1:] {
		h.within(s, func(root string) (err error) { // which may have ended
			s.devices.is, _, err = h.devices(root)
			return err
		})
		for _, p := range free {
			if slices.ContainsFunc(p.addresses(), s.has) {
				s.Name = p.scope()
				return me, append(pods, s), nil
			}
		}
	}
	return me, pods, nil
}

// has says that an address is one of the namespace's.
func (s *Space) has(a netip.Addr) bool {
	return slices.ContainsFunc(s.devices.is, func(d link.Device) bool { return slices.Contains(d.Addresses, a) })
}

// speaks says that the namespace has an address of that family that others can answer to.
func (s *Space) speaks(to netip.Addr) bool {
	return slices.ContainsFunc(s.devices.is, func(d link.Device) bool {
		return slices.ContainsFunc(d.Addresses, func(a netip.Addr) bool {
			return a.Is4() == to.Is4() && !a.IsLinkLocalUnicast() && !a.IsLoopback()
		})
	})
}

// unlimited are pods of a node that may send what they want, as far as NetworkPolicies go.
func unlimited(c *Cluster, on *node) (free []pod) {
	policies := objectsOf[networkPolicy](c, NetworkPolicies)
	for _, p := range objectsOf[pod](c, Pods) {
		limited := slices.ContainsFunc(policies, func(n networkPolicy) bool {
			return n.isolates() && n.Metadata.Namespace == p.Metadata.Namespace && n.Spec.PodSelector.matches(p.Metadata.Labels)
		})
		if p.Spec.NodeName == on.Metadata.Name && p.ready() && !limited {
			free = append(free, p)
		}
	}
	return free
}

// peersOf are other nodes, at most mostPeers: those that come after this one by name, so
// that the nodes together ask each of them.
func peersOf(nodes []node, me *node) []node {
	others := slices.DeleteFunc(slices.Clone(nodes), func(n node) bool { return n.Metadata.Name == me.Metadata.Name })
	slices.SortFunc(others, func(a, b node) int { return cmp.Compare(a.Metadata.Name, b.Metadata.Name) })
	after, _ := slices.BinarySearchFunc(others, me.Metadata.Name, func(n node, name string) int { return cmp.Compare(n.Metadata.Name, name) })
	others = slices.Concat(others[after:], others[:after])
	return others[:min(len(others), mostPeers)]
}

// echoes are for each other node and for a pod on it: from this node, and to the pod from
// a pod here as well, whose packets have another length and take another way.
func (p *probed) echoes(c *Cluster, me *node, from []*Space) {
	nodes := objectsOf[node](c, Nodes)
	all := slices.SortedFunc(slices.Values(objectsOf[pod](c, Pods)), func(a, b pod) int { return cmp.Compare(a.Metadata.String(), b.Metadata.String()) })
	p.peers = len(nodes) - 1
	if p.peers == 0 {
		p.none[Echoes] = errors.New("there is no other node")
	}
	ask := func(e errand, s *Space, to netip.Addr) {
		if s.speaks(to) {
			e.read, e.from, e.to = Echoes, s, netip.AddrPortFrom(to, 0)
			p.all = append(p.all, &e)
		}
	}
	for _, n := range peersOf(nodes, me) {
		for _, a := range n.internal() {
			ask(errand{scope: "Node " + n.Metadata.Name, home: n.Metadata.Name}, from[0], a)
		}
		at := slices.IndexFunc(all, func(one pod) bool {
			return one.Spec.NodeName == n.Metadata.Name && one.ready() && len(one.addresses()) > 0
		})
		if at < 0 {
			continue
		}
		for _, a := range all[at].addresses() {
			for _, s := range from {
				ask(errand{scope: all[at].scope(), home: n.Metadata.Name, pod: true}, s, a)
			}
		}
	}
}

// queries are for the name of the API's Service, which every cluster has: to each server
// from this node, and to their Service also from a pod.
func (p *probed) queries(c *Cluster, from []*Space) {
	p.domain, p.known = clusterDomain(c)
	name := "kubernetes.default.svc." + p.domain + "."
	all := objectsOf[service](c, Services)
	for _, s := range all {
		if s.Metadata.String() == "default/kubernetes" {
			p.want = addressesOf(s.clusterIPs()[:min(1, len(s.clusterIPs()))])
		}
	}
	kind := "A"
	if len(p.want) > 0 && p.want[0].Is6() {
		kind = "AAAA"
	}
	ask := func(from *Space, scope, protocol string, to netip.AddrPort) {
		if from.speaks(to.Addr()) {
			p.all = append(p.all, &errand{read: Queries, scope: scope, from: from, to: to, network: strings.ToLower(protocol), name: name, kind: kind})
		}
	}
	servers := 0
	for i := range all {
		s := &all[i]
		if !isDNS(s) || !s.served() {
			continue
		}
		for _, port := range s.Spec.Ports {
			if port.Port != 53 || port.Protocol == "SCTP" {
				continue
			}
			protocol := cmp.Or(port.Protocol, "TCP")
			for _, a := range addressesOf(s.clusterIPs()) {
				for _, space := range from {
					ask(space, s.scope(), protocol, netip.AddrPortFrom(a, 53))
				}
			}
			found := readyBehind(c, s, port.Name)
			servers += len(found)
			for _, e := range found[:min(len(found), mostServers)] {
				ask(from[0], e.who, protocol, e.at)
			}
		}
	}
	if servers == 0 {
		p.none[Queries] = errors.New("the Service of DNS, kube-dns in kube-system, is not there or has no ready endpoint")
	}
}

// isDNS says that a Service is the cluster's DNS.
func isDNS(s *service) bool {
	return s.Metadata.Namespace == "kube-system" && (s.Metadata.Name == "kube-dns" || s.Metadata.Labels["k8s-app"] == "kube-dns")
}

// clusterDomain is the kubelets', or that of the Corefile; else the usual one.
func clusterDomain(c *Cluster) (domain string, known bool) {
	if c.kubelet.is != nil && c.kubelet.is.ClusterDomain != "" {
		return strings.Trim(c.kubelet.is.ClusterDomain, "."), true
	}
	for _, words := range parseCorefile(config(objectsOf[configMap](c, ConfigMaps), "coredns")["Corefile"]).plugins {
		if words[0] == "kubernetes" && len(words) > 1 && words[1] != "{" && !strings.HasSuffix(words[1], ".arpa") {
			return strings.Trim(words[1], "."), true
		}
	}
	return "cluster.local", false
}

// behind is an endpoint: who it is, on which node, and where it listens.
type behind struct {
	who, home string
	at        netip.AddrPort
}

// readyBehind are the ready endpoints of a port of a Service, by their addresses.
func readyBehind(c *Cluster, s *service, port string) (all []behind) {
	for _, slice := range objectsOf[slice](c, EndpointSlices) {
		if slice.Metadata.Namespace != s.Metadata.Namespace || slice.Metadata.Labels["kubernetes.io/service-name"] != s.Metadata.Name {
			continue
		}
		for _, p := range slice.Ports {
			if p.Name != port || p.Port == 0 {
				continue
			}
			for _, e := range slice.Endpoints {
				if !e.ready() || len(e.Addresses) == 0 {
					continue
				}
				for _, a := range addressesOf(e.Addresses[:1]) { // the rest are the same (EndpointSlice v1)
					b := behind{"endpoint of Service " + s.Metadata.String(), e.NodeName, netip.AddrPortFrom(a, uint16(p.Port))}
					if e.TargetRef.Kind == "Pod" {
						b.who = "Pod " + meta{Namespace: cmp.Or(e.TargetRef.Namespace, s.Metadata.Namespace), Name: e.TargetRef.Name}.String()
					}
					all = append(all, b)
				}
			}
		}
	}
	slices.SortFunc(all, func(a, b behind) int { return a.at.Compare(b.at) })
	return slices.Compact(all)
}

func addressesOf(texts []string) (all []netip.Addr) {
	for _, text := range texts {
		if a, err := netip.ParseAddr(text); err == nil {
			all = append(all, a.Unmap())
		}
	}
	return all
}

// front is an address of a Service by which others connect, and the type that it is of.
type front struct {
	part string
	at   []netip.AddrPort
}

// fronts are those of a port of a Service that are to work from a node.
func (s *service) fronts(me *node, port servicePort) (all []front) {
	at := func(part string, port int, addresses []netip.Addr) {
		f := front{part: part}
		for _, a := range addresses {
			f.at = append(f.at, netip.AddrPortFrom(a, uint16(port)))
		}
		if len(f.at) > 0 {
			all = append(all, f)
		}
	}
	at("clusterIP", port.Port, addressesOf(s.clusterIPs()))
	if port.NodePort > 0 {
		own := me.internal()
		slices.SortStableFunc(own, func(a, b netip.Addr) int { return cmp.Compare(a.BitLen(), b.BitLen()) })
		at("nodePort", port.NodePort, slices.DeleteFunc(own, func(a netip.Addr) bool { return !s.speaks(a) }))
	}
	if len(s.Spec.LoadBalancerSourceRanges) == 0 { // else this node may be none of them
		var given []string
		for _, i := range s.Status.LoadBalancer.Ingress {
			given = append(given, i.IP)
		}
		at("load balancer", port.Port, addressesOf(given))
	}
	at("externalIP", port.Port, addressesOf(s.Spec.ExternalIPs))
	return all
}

// speaks says that the Service has an address of that family.
func (s *service) speaks(a netip.Addr) bool {
	return slices.ContainsFunc(addressesOf(s.clusterIPs()), func(b netip.Addr) bool { return a.Is4() == b.Is4() })
}

// clusterIPs are all of them, that of older manifests as well.
func (s *service) clusterIPs() []string {
	if len(s.Spec.ClusterIPs) == 0 {
		return []string{s.Spec.ClusterIP}
	}
	return s.Spec.ClusterIPs
}

// parts are the types of addresses that Services have; endpointPart is what is behind
// them.
var parts = []string{"clusterIP", "nodePort", "load balancer", "externalIP"}

const endpointPart = "endpoint"

// rank puts Services of programs first, then that of DNS, which queries look at, then
// those that select no pods.
func (s *service) rank() int {
	switch {
	case len(s.Spec.Selector) == 0:
		return 2
	case isDNS(s):
		return 1
	}
	return 0
}

// connects are for one Service of each type that has a TCP port and ready endpoints, the
// first by rank and name; and for an endpoint of each of them.
func (p *probed) connects(c *Cluster, me *node) {
	all := slices.SortedFunc(slices.Values(objectsOf[service](c, Services)), func(a, b service) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), cmp.Compare(a.Metadata.String(), b.Metadata.String()))
	})
	chosen := map[string]bool{}
	add := func(e errand) {
		if !slices.ContainsFunc(p.all, func(o *errand) bool { return o.read == Connects && o.of == e.of && o.to == e.to }) {
			e.read, e.from = Connects, &Space{Name: "node"}
			p.all = append(p.all, &e)
		}
	}
	for i := range all {
		s := &all[i]
		for _, port := range s.Spec.Ports {
			if !s.served() || cmp.Or(port.Protocol, "TCP") != "TCP" {
				continue
			}
			endpoints := readyBehind(c, s, port.Name)
			for _, f := range s.fronts(me, port) {
				usable := s.usable(f.part, me, endpoints)
				if chosen[f.part] || len(usable) == 0 {
					continue
				}
				chosen[f.part] = true
				for _, to := range f.at {
					at := slices.IndexFunc(usable, func(b behind) bool { return b.at.Addr().Is4() == to.Addr().Is4() })
					if at < 0 {
						continue // nothing is behind it in this family
					}
					add(errand{scope: s.scope(), of: s.scope(), part: f.part, to: to})
					add(errand{scope: usable[at].who, of: s.scope(), part: endpointPart, to: usable[at].at})
				}
			}
		}
	}
	for _, part := range parts {
		if !chosen[part] {
			p.left = append(p.left, part)
		}
	}
	if len(chosen) == 0 {
		p.none[Connects] = errors.New("no Service has a TCP port and a ready endpoint")
	}
}

// usable are the endpoints that a connection from this node to such an address may reach.
func (s *service) usable(part string, me *node, all []behind) []behind {
	policy := s.Spec.ExternalTrafficPolicy
	if part == "clusterIP" {
		policy = s.Spec.InternalTrafficPolicy
	}
	if policy != "Local" {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(b behind) bool { return b.home != me.Metadata.Name })
}
