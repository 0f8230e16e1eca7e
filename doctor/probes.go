package doctor

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/probe"
)

const (
	pathMTU      = "https://www.rfc-editor.org/rfc/rfc1191, https://www.rfc-editor.org/rfc/rfc8201 (path MTU discovery)"
	debugService = "https://kubernetes.io/docs/tasks/debug/debug-application/debug-service/"
	debugDNS     = "https://kubernetes.io/docs/tasks/administer-cluster/dns-debugging-resolution/"
)

// Reads of the checks: which node and pod is asked, and by whom.
var (
	readsEchoes   = []string{Echoes, Nodes, Pods, NetworkPolicies}
	readsQueries  = []string{Queries, Nodes, Services, EndpointSlices, ConfigMaps, Pods, NetworkPolicies}
	readsConnects = []string{Connects, Nodes, Services, EndpointSlices}
)

// probeChecks send. None of them is run unless it is named.
var probeChecks = []Check{{
	ID: "PR-01", Layer: "probe", Title: "long packets are lost on the way to a node or its pods, and nobody says so", Severity: Critical, Scope: Sent,
	Reads:   readsEchoes,
	When:    "echo requests that may not be cut, of as many bytes as the device and the route take, get no answer and no ICMP in return, and shorter ones do",
	Effect:  "Connections open, and hang at the first full packet: small answers pass, large ones never do. The sender cannot find out, as nobody tells it.",
	Source:  "https://www.rfc-editor.org/rfc/rfc2923#section-2.1 (black hole detection); " + pathMTU,
	Fix:     "make the devices' MTU what passes, on both nodes (of pods in the network plug-in's configuration), or make the way take more; let ICMP type 3 code 4 and ICMPv6 type 2 through on it",
	Undo:    "put the MTU back",
	Pitfall: "tcp_mtu_probing hides it from TCP, and not from UDP or from tunnels (HS-46). A ping without a size always passes.",
	look:    blackHoles,
}, {
	ID: "PR-02", Layer: "probe", Title: "the way to a node or its pods takes shorter packets than are sent", Severity: Warning, Scope: Sent,
	Reads:   readsEchoes,
	When:    "a router says by ICMP that its most is below the MTU of the device and the route here, and what it says does pass",
	Effect:  "The first long packet to each destination is lost and sent again, every ten minutes anew; datagrams of programs that do not listen are lost each time. It works only for as long as nobody filters ICMP (PR-01).",
	Source:  pathMTU + "; " + ipSysctl + " (mtu_expires)",
	Fix:     "make the devices' MTU what passes, on both nodes; of pods in the network plug-in's configuration",
	Undo:    "put the MTU back",
	Pitfall: "A larger MTU on one node alone is what makes it: it has to hold on the whole way.",
	look:    announcedPaths,
}, {
	ID: "PR-03", Layer: "probe", Title: "the kernel takes a path to be narrower than it is", Severity: Info, Scope: Sent,
	Reads:   readsEchoes,
	When:    "the kernel has learned an MTU of the path to a node or pod that is below what gets an answer now",
	Effect:  "More packets for the same data until it forgets, ten minutes after it was last told; for good if something goes on to tell it.",
	Source:  pathMTU + "; " + ipSysctl + " (mtu_expires); https://www.rfc-editor.org/rfc/rfc5927#section-7 (forged ICMP)",
	Fix:     "ip route flush cache, and ip -6 route flush cache; where it comes back, find who sends the ICMP: tcpdump -ni any 'icmp[0] = 3 and icmp[1] = 4'",
	Undo:    "nothing has to be taken back: it is learned again where it is true",
	Pitfall: "Just after an MTU was raised it is no fault, and goes away by itself.",
	look:    narrowPaths,
}, {
	ID: "PR-04", Layer: "probe", Title: "a node or its pods cannot be reached as the routes say", Severity: Critical, Scope: Sent,
	Reads:   readsEchoes,
	When:    "the kernel refuses the address (no route, or one of type unreachable, blackhole or prohibit), or the next hop does not tell its hardware address, or answers that it has no route",
	Effect:  "Nothing gets there from this node: connections fail with \"no route to host\" after 3 s, or at once.",
	Source:  "https://man7.org/linux/man-pages/man7/arp.7.html; https://man7.org/linux/man-pages/man8/ip-route.8.html (types of routes)",
	Fix:     "ip route get ADDRESS, and ip neigh show ADDRESS: for pods' addresses restart the network plug-in's agent on this node; for nodes' look at the network between them (is the other node up, is it in the same VLAN?)",
	Undo:    "nothing has to be taken back",
	Pitfall: "A blackhole route drops without any counter, and the table of routes looks whole (CN-10).",
	look:    unreachable,
}, {
	ID: "PR-05", Layer: "probe", Title: "packets to a node's pods go by another node", Severity: Warning, Scope: Sent,
	Reads:   readsEchoes,
	When:    "a packet to a pod that may take one step (TTL 1) is given up by another node than the pod's; or, which is information, one to a node that the route calls a neighbour by a router in between",
	Effect:  "A route is left from before a range was given to another node: packets take a way round, or circle until their TTL is used up. A router between neighbours, as networks of clouds have one, may drop what comes from addresses of pods.",
	Source:  "https://www.rfc-editor.org/rfc/rfc1812#section-5.3.1 (TTL); https://kubernetes.io/docs/concepts/cluster-administration/networking/",
	Fix:     "compare ip route get ADDRESS with spec.podCIDR of the nodes, and restart the network plug-in's agent on this node",
	Undo:    "nothing has to be taken back",
	Pitfall: "Route reflectors and routers of racks are no nodes, and are not meant: only addresses of the cluster's nodes count.",
	look:    detours,
}, {
	ID: "PR-06", Layer: "probe", Title: "a DNS server does not answer", Severity: Critical, Scope: Sent,
	Reads:   readsQueries,
	When:    "a ready endpoint of the DNS Service, asked directly, answers none of 3 queries of 1 s each, over UDP; if over TCP alone, a warning; if it answers after a query was lost, information",
	Effect:  "The share of queries that the Service gives to it is lost: each is a wait of 5 s for its client. Without TCP, answers that are longer than a datagram are not to be had.",
	Source:  debugDNS + "; https://man7.org/linux/man-pages/man5/resolv.conf.5.html (timeout); https://www.rfc-editor.org/rfc/rfc7766 (TCP is not optional)",
	Fix:     "where all on one node do not answer, it is the way there (PR-01, PR-04); where one pod does not: kubectl -n kube-system logs POD, then delete it",
	Undo:    "nothing has to be taken back: its Deployment makes it anew",
	Pitfall: "\"Ready\" is what the kubelet of its own node sees: it says nothing of the way to it. A policy may let pods ask and nodes not.",
	look:    silentServers,
}, {
	ID: "PR-07", Layer: "probe", Title: "the Service of DNS does not answer, and its servers do", Severity: Critical, Scope: Sent,
	Reads:   readsQueries,
	When:    "queries to the ClusterIP get no answer, from this node or from a pod on it, and a server does that is asked directly, over the same protocol",
	Effect:  "No name resolves in pods: they all ask this address. It is the proxy of this node, not DNS.",
	Source:  debugDNS + "; " + debugService,
	Fix:     "look at the proxy on this node: kubectl -n kube-system logs of its pod; millrace explain udp POD ADDRESS:53 says what it should do; stale entries of connection tracking go with conntrack -D -p udp --orig-dst ADDRESS",
	Undo:    "nothing has to be taken back",
	Pitfall: "Restarting CoreDNS does not help, and hides it where the new pods get addresses that the proxy still has.",
	look:    silentService,
}, {
	ID: "PR-08", Layer: "probe", Title: "DNS servers give wrong answers, or not the same", Severity: Critical, Scope: Sent,
	Reads:   readsQueries,
	When:    "an answer for kubernetes.default.svc is not NOERROR with the ClusterIP of that Service; without the Service, not that of most",
	Effect:  "Some queries of the same name fail, depending on which server is asked: what looks like chance in programs.",
	Source:  debugDNS + "; https://github.com/kubernetes/dns/blob/master/docs/specification.md",
	Fix:     "kubectl -n kube-system logs of that pod: one that lost the API server, or has an older Corefile, is made anew by kubectl -n kube-system delete pod POD",
	Undo:    "nothing has to be taken back: its Deployment makes it anew",
	Pitfall: "NXDOMAIN from all of them means another cluster domain than the one asked for: clusterDomain of the kubelets, and kubernetes in the Corefile, say it.",
	look:    wrongAnswers,
}, {
	ID: "PR-09", Layer: "probe", Title: "a Service takes no connections, and its endpoint does", Severity: Critical, Scope: Sent,
	Reads:   readsConnects,
	When:    "of one Service of each type (ClusterIP, NodePort on this node, load balancer, externalIP) with a TCP port and ready endpoints: a connection is refused, reset, or not answered within 3.5 s, and one to an endpoint is; a warning for load balancers and externalIPs",
	Effect:  "What connects from this node to Services of that type fails: it is the proxy, or what is before it, and not the program.",
	Source:  debugService + " (is kube-proxy working?); https://www.rfc-editor.org/rfc/rfc6298 (SYN again after 1 s and 3 s)",
	Fix:     "millrace explain tcp NODE ADDRESS:PORT says what should become of it, millrace trace ADDRESS where it is lost; then look at the log of the proxy on this node",
	Undo:    "nothing has to be taken back",
	Pitfall: "A refusal (REJECT) is what proxies answer where they know of no endpoint: their list is older than the API's.",
	look:    deafServices,
}, {
	ID: "PR-10", Layer: "probe", Title: "an endpoint that is ready takes no connections", Severity: Warning, Scope: Sent,
	Reads:   readsConnects,
	When:    "a TCP connection from this node to a ready endpoint of such a Service is refused, reset, or not answered within 3.5 s",
	Effect:  "The share of connections that the Service gives to it fails.",
	Source:  debugService + " (is the Service selecting the right pods?); https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/#readiness-probe",
	Fix:     "refused: the program listens at another port or at 127.0.0.1, and readinessProbe asks another; no answer: the way to the pod (PR-04), or a policy",
	Undo:    "put the port or the address back",
	Pitfall: "A NetworkPolicy may let other pods in, and nodes not: then it is no fault.",
	look:    deafEndpoints,
}}

// answers are what came back for errands of a kind; where there are none, it notes why.
func (v *view) answers(read string) (all []*errand, ok bool) {
	for _, kind := range v.check.Reads {
		if !isResource(kind) {
			continue
		}
		f := fact[struct{}]{err: errNoCluster}
		if v.facts.cluster != nil {
			f.err = errNotAsked
			if o, there := v.facts.cluster.kinds[kind]; there {
				f.err = o.why()
			}
		}
		if _, ok := get(v, kind, f); !ok {
			return nil, false
		}
	}
	p := v.facts.probed
	switch {
	case p == nil:
		v.lacks(read, "nothing was sent")
		return nil, false
	case p.err != nil:
		v.lacks(read, "%s", p.err)
		return nil, false
	case p.none[read] != nil && p.peers == 0 && read == Echoes:
		v.sees(read, "%s", p.none[read])
		return nil, false
	case p.none[read] != nil:
		v.lacks(read, "%s", p.none[read])
	}
	for _, e := range p.all {
		if e.read != read {
			continue
		}
		if errors.Is(e.err, probe.ErrUnsent) || errors.Is(e.err, errTooLate) {
			v.lacksAt(e, "%s", e.err)
		} else {
			all = append(all, e)
		}
	}
	return all, true
}

// at says what was sent to where, and from where if it was not the node.
func (e *errand) at() string {
	to := e.to.String()
	switch e.read {
	case Echoes:
		to = e.to.Addr().String()
	case Queries:
		to += "/" + e.network
	case Connects:
		to = e.part + " " + to
	}
	text := e.read + " to " + to
	if e.from.path != "" {
		text += " from " + e.from.Name
	}
	return text
}

func (v *view) lacksAt(e *errand, format string, values ...any) {
	v.unread = append(v.unread, Evidence{Scope: harmless(e.scope), Read: harmless(e.at()), Value: harmless(fmt.Sprintf(format, values...)), Unread: true})
}

// paths calls f with each path whose MTU was found out, and notes the others.
func (v *view) paths(f func(e *errand)) {
	all, ok := v.answers(Echoes)
	passed := 0
	for _, e := range all {
		switch {
		case e.unreachable() != "":
			v.lacksAt(e, "%s (PR-04)", e.unreachable())
		case e.err != nil:
			v.lacksAt(e, "%s", reason(e.err))
		default:
			passed++
			f(e)
		}
	}
	if ok {
		v.sees(Echoes, "%d paths to %d of %d other nodes and their pods", passed, min(v.facts.probed.peers, mostPeers), v.facts.probed.peers)
	}
}

func blackHoles(v *view) {
	v.paths(func(e *errand) {
		p := e.path
		if p.Passed == p.Tried || p.Announced > 0 && p.Passed >= p.Announced {
			return
		}
		said := "nobody says so"
		if p.Announced > 0 {
			said = fmt.Sprintf("%s says that %d pass", p.By, p.Announced)
		}
		v.firesAt(e.scope, Critical, e.at(), "%d bytes get an answer, and longer ones up to the %d of %s none; %s (%d packets)", p.Passed, p.Tried, e.way.Device, said, p.Packets)
		v.narrows(e)
	})
}

func announcedPaths(v *view) {
	v.paths(func(e *errand) {
		if p := e.path; p.Passed < p.Tried && p.Announced > 0 && p.Passed >= p.Announced {
			v.firesAt(e.scope, Warning, e.at(), "%s takes %d bytes at most, and %s sends %d", p.By, p.Announced, e.way.Device, p.Tried)
			v.narrows(e)
		}
	})
}

// narrows says which device to make narrower, where it is a node's own.
func (v *view) narrows(e *errand) {
	if !e.pod && e.from.path == "" {
		v.mends(fmt.Sprintf("ip link set %s mtu %d on both nodes, and the MTU of pods in the network plug-in's configuration to what a tunnel leaves of it; or make the way take %d, and let ICMP type 3 code 4 and ICMPv6 type 2 through on it",
			e.way.Device, e.path.Passed, e.path.Tried), fmt.Sprintf("ip link set %s mtu %d on both nodes", e.way.Device, e.path.Tried))
	}
}

func narrowPaths(v *view) {
	v.paths(func(e *errand) {
		if e.way.Learned > 0 && e.way.Learned < e.path.Passed {
			v.firesAt(e.scope, Info, e.at(), "%d bytes are known of the path, and %d get an answer", e.way.Learned, e.path.Passed)
		}
	})
}

// unreachable says why a packet does not even reach its next hop, "" if it does.
func (e *errand) unreachable() string {
	next := e.to.Addr()
	if e.way.Via.IsValid() {
		next = e.way.Via
	}
	switch {
	case errors.Is(e.wayErr, unix.EINVAL):
		return "its route is of type blackhole"
	case errors.Is(e.wayErr, unix.EACCES):
		return "its route is of type prohibit"
	case e.wayErr != nil:
		return "the kernel has no way: " + reason(e.wayErr)
	case e.way.Local:
		return "it is an address of this node, too"
	case e.unresolved:
		return fmt.Sprintf("the next hop, %s by %s, does not tell its hardware address", next, e.way.Device)
	case errors.Is(e.hopErr, unix.EHOSTUNREACH), errors.Is(e.hopErr, unix.ENETUNREACH):
		return fmt.Sprintf("the next hop, %s by %s, answers: %s", next, e.way.Device, reason(e.hopErr))
	}
	return ""
}

func unreachable(v *view) {
	all, ok := v.answers(Echoes)
	reached := 0
	for _, e := range all {
		switch why := e.unreachable(); {
		case why != "":
			v.firesAt(e.scope, Critical, e.at(), "%s", why)
		case errors.Is(e.hopErr, probe.ErrSilent) && errors.Is(e.err, probe.ErrSilent):
			v.lacksAt(e, "no answer to any packet, also none of its next hop: ICMP may be filtered")
		default:
			reached++
		}
	}
	if ok {
		v.sees(Echoes, "%d of %d addresses answer, or their next hop does", reached, len(all))
	}
}

func detours(v *view) {
	all, ok := v.answers(Echoes)
	nodes, _ := list[node](v, Nodes)
	known := 0
	for _, e := range all {
		if e.hopErr != nil || e.wayErr != nil {
			if e.unreachable() == "" {
				v.lacksAt(e, "who gives up a packet after one step is not known: %s", reason(e.hopErr))
			}
			continue
		}
		known++
		other := ownerOf(nodes, e.hop.From)
		switch {
		case e.hop.Arrived:
		case e.pod && other != "" && other != e.home && e.from.path == "":
			v.firesAt(e.scope, Warning, e.at(), "the first step is %s of node %s, and the pod is on %s", e.hop.From, other, e.home)
		case !e.pod && !e.way.Via.IsValid():
			v.firesAt(e.scope, Info, e.at(), "%s is in between, and the route by %s calls it a neighbour", e.hop.From, e.way.Device)
		}
	}
	if ok {
		v.sees(Echoes, "the first step to %d addresses", known)
	}
}

// ownerOf is the node that has an address, or a range of pods with it; "" if none has.
func ownerOf(nodes []node, a netip.Addr) string {
	for _, n := range nodes {
		if slices.Contains(n.internal(), a) || slices.ContainsFunc(n.podRanges(), func(r netip.Prefix) bool { return r.Contains(a) }) {
			return n.Metadata.Name
		}
	}
	return ""
}

// toService says that a query went to the ClusterIP, and not to one server.
func (e *errand) toService() bool { return strings.HasPrefix(e.scope, "Service ") }

func silentServers(v *view) {
	all, ok := v.answers(Queries)
	answered := 0
	var slowest *errand
	for _, e := range all {
		switch {
		case e.toService():
			continue
		case e.err != nil && e.network == "udp":
			v.firesAt(e.scope, Critical, e.at(), "%s", reason(e.err))
		case e.err != nil:
			v.firesAt(e.scope, Warning, e.at(), "%s", reason(e.err))
		case e.reply.Lost > 0:
			v.firesAt(e.scope, Info, e.at(), "answered in %s; queries before it that were not: %d", millis(e.reply.Took), e.reply.Lost)
		}
		if e.err == nil {
			answered++
			if slowest == nil || e.reply.Took > slowest.reply.Took {
				slowest = e
			}
		}
	}
	if ok && slowest != nil {
		v.sees(Queries, "%d answers, the slowest in %s, of %s over %s", answered, millis(slowest.reply.Took), slowest.scope, slowest.network)
	}
}

func millis(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}

func silentService(v *view) {
	all, ok := v.answers(Queries)
	direct := map[string]int{} // servers that answer, by protocol
	for _, e := range all {
		if !e.toService() && e.err == nil {
			direct[e.network]++
		}
	}
	for _, e := range all {
		switch {
		case !e.toService():
		case e.err == nil:
			v.sees(e.at(), "answered in %s", millis(e.reply.Took))
		case direct[e.network] > 0:
			v.firesAt(e.scope, Critical, e.at(), "%s; asked directly, %d of its servers answer", reason(e.err), direct[e.network])
		default:
			v.lacksAt(e, "%s; but no server answers that is asked directly (PR-06)", reason(e.err))
		}
	}
	if ok && len(all) == 0 {
		v.lacks(Queries, "no query was sent")
	}
}

func wrongAnswers(v *view) {
	all, ok := v.answers(Queries)
	if !ok {
		return
	}
	p := v.facts.probed
	said := map[string]int{}
	for _, e := range all {
		if e.err == nil {
			said[e.says()]++
		}
	}
	want := ""
	if len(p.want) > 0 {
		want = "NOERROR " + p.want[0].String()
	} else { // that of most
		for _, e := range all {
			if text := e.says(); e.err == nil && said[text] > said[want] {
				want = text
			}
		}
	}
	if !p.known && len(said) == 1 && said["NXDOMAIN"] > 0 {
		v.lacks(Queries, "all servers say that %s is not there: the cluster's domain could not be read, and was taken to be %s", all[0].name, p.domain)
		return
	}
	for _, e := range all {
		if e.err == nil && e.says() != want {
			v.firesAt(e.scope, Critical, e.at(), "%s: %s, and not %s", e.name, e.says(), want)
		}
	}
	if len(said) == 0 {
		v.lacks(Queries, "no server answers (PR-06)")
	} else {
		v.sees(Queries, "%d answers to %s: %s", said[want], all[0].name, want)
	}
}

// says is what a server answers, as a text to be compared.
func (e *errand) says() string {
	text := e.reply.Code
	for _, a := range e.reply.Addresses {
		text += " " + a.String()
	}
	return text
}

// takes says that somebody took a connection: a server may close it at once.
func (e *errand) takes() bool { return e.err == nil || errors.Is(e.err, probe.ErrClosed) }

func deafServices(v *view) {
	all, ok := v.answers(Connects)
	if !ok {
		return
	}
	for _, e := range all {
		at := slices.IndexFunc(all, func(b *errand) bool {
			return b.part == endpointPart && b.of == e.of && b.to.Addr().Is4() == e.to.Addr().Is4()
		})
		severity := Critical
		if e.part == "load balancer" || e.part == "externalIP" {
			severity = Warning
		}
		switch {
		case e.part == endpointPart:
		case e.err == nil || at >= 0 && errors.Is(e.err, probe.ErrClosed) && errors.Is(all[at].err, probe.ErrClosed):
			v.sees(e.at(), "%s: connected in %s", e.scope, millis(e.took))
		case at >= 0 && all[at].takes():
			v.firesAt(e.scope, severity, e.at(), "%s; its endpoint %s, %s, takes connections", reason(e.err), all[at].to, all[at].scope)
		case at >= 0:
			v.lacksAt(e, "%s; but its endpoint %s does not take connections either (PR-10)", reason(e.err), all[at].to)
		}
	}
	if left := v.facts.probed.left; len(left) > 0 {
		v.sees(Services, "left out, as no Service with a TCP port and ready endpoints has it: %s", strings.Join(left, ", "))
	}
	v.sees(Services, "headless Services, and UDP, are left out")
}

func deafEndpoints(v *view) {
	all, _ := v.answers(Connects)
	for _, e := range all {
		switch {
		case e.part != endpointPart:
		case e.takes():
			v.sees(e.at(), "%s: connected in %s", e.scope, millis(e.took))
		default:
			v.firesAt(e.scope, Warning, e.at(), "%s, and the endpoint of %s is ready", reason(e.err), e.of)
		}
	}
}
