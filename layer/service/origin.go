package service

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/model"
)

// ServedAt is where a client's traffic to Services is decided about.
type ServedAt string

// The places.
const (
	// AtSocket: at connect() and sendmsg() of a process in a pod.
	AtSocket ServedAt = "socket"
	// AtPod: packet by packet, where the pod's packets enter the node.
	AtPod ServedAt = "from_pod"
	// FromWire: packet by packet, where those from other machines enter the node.
	FromWire ServedAt = "from_wire"
	// AtHost: at connect() and sendmsg() of a process of the node itself.
	AtHost ServedAt = "host"
)

// owners say whose an address is.
type owners struct {
	node string
	// pods have an address of their own; nodes' are their names.
	pods      map[netip.Addr]*model.Pod
	endpoints map[netip.Addr]model.Backend
	nodes     map[netip.Addr]string
	// ranges are those from which the node's pods take their addresses.
	ranges []netip.Prefix
	// nowhere: the cluster's manifests do not say where anything is.
	nowhere bool
}

func ownersOf(node string, snapshot *model.Snapshot) owners {
	o := owners{
		node: node, pods: map[netip.Addr]*model.Pod{},
		endpoints: map[netip.Addr]model.Backend{}, nodes: map[netip.Addr]string{},
	}
	for _, service := range snapshot.Services {
		for _, port := range service.Ports {
			for _, backend := range port.Backends {
				if address := backend.Address.Addr().Unmap(); o.endpoints[address].Node == "" {
					o.endpoints[address] = backend
				}
			}
		}
	}
	for _, pod := range snapshot.Pods {
		for _, address := range pod.Addresses {
			if pod.HostNetwork {
				o.nodes[address.Unmap()] = pod.Node
			} else {
				o.pods[address.Unmap()] = pod
			}
		}
	}
	for _, n := range snapshot.Nodes {
		for _, address := range n.Addresses {
			o.nodes[address.Unmap()] = n.Name
		}
		if n.Name == node {
			o.ranges = n.PodCIDRs
		}
	}
	located := func(b model.Backend) bool { return b.Node != "" }
	o.nowhere = len(o.nodes) == 0 && len(o.pods) == 0 && len(snapshot.Nodes) == 0 &&
		!slices.ContainsFunc(slices.Collect(maps.Values(o.endpoints)), located)
	return o
}

// nodeOf is the node on which an address is; empty if that is not known.
func (o *owners) nodeOf(address netip.Addr) string {
	if node, known := o.nodes[address]; known {
		return node
	}
	if pod := o.pods[address]; pod != nil {
		return pod.Node
	}
	return o.endpoints[address].Node
}

// origin is who sends, as far as that is known.
type origin struct {
	// what names it in a sentence: "pod shop/client-1 of this node".
	what string
	// wire: its packets come by the wire; host: it is the node itself; else it is
	// a pod of this node.
	wire, host bool
	// asked is the path that the pod asks for; empty for none.
	asked Path
	// unknown: nothing is known of the address.
	unknown bool
}

func (o *owners) origin(address netip.Addr) origin {
	node, isNode := o.nodes[address]
	pod, endpoint := o.pods[address], o.endpoints[address]
	switch {
	case address.IsLoopback():
		return origin{host: true, what: "a loopback address: a process of the node itself"}
	case isNode && node == o.node:
		return origin{host: true, what: "an address of the node itself: a process of it, or of a pod with hostNetwork"}
	case isNode:
		return origin{wire: true, what: "an address of node " + node}
	case pod != nil && pod.Node == o.node:
		return origin{what: "pod " + pod.Name.String() + " of this node", asked: askedPath(pod.Annotations)}
	case pod != nil:
		return origin{wire: true, what: fmt.Sprintf("pod %s of node %s", pod.Name, pod.Node)}
	case endpoint.Node != "" && endpoint.Node == o.node:
		return origin{what: "an endpoint on this node"}
	case endpoint.Node != "":
		return origin{wire: true, what: "an endpoint on node " + endpoint.Node}
	case slices.ContainsFunc(o.ranges, func(p netip.Prefix) bool { return p.Contains(address) }):
		return origin{what: "in the range of this node's pods, though no pod is known that has it"}
	}
	if o.nowhere {
		return origin{unknown: true, what: "taken for a pod's of this node, for nothing is known of nodes and pods"}
	}
	return origin{wire: true, unknown: true, what: "neither a pod's of this node nor the node's own"}
}

// origin asks what is known, and where that knows nothing of an address and the
// tables are an agent's, this host.
func (x *Explainer) origin(address netip.Addr) origin {
	from := x.owners.origin(address)
	if !from.unknown || !x.live() {
		return from
	}
	if slices.Contains(ownAddresses(), address) {
		return origin{host: true, what: "an address of this host: a process of it, or of a pod with hostNetwork"}
	}
	spaces, _ := netns.Spaces(x.settings.Netns) // what may not be looked into is not found
	for _, space := range spaces {
		if slices.Contains(space.Addresses, address) {
			return origin{what: "in another network namespace of this host, as a pod's is", asked: x.askedBy(space.Cookie)}
		}
	}
	return from
}

func ownAddresses() []netip.Addr {
	var own []netip.Addr
	found, _ := net.InterfaceAddrs()
	for _, address := range found {
		if prefix, err := netip.ParsePrefix(address.String()); err == nil {
			own = append(own, prefix.Addr().Unmap())
		}
	}
	return own
}

// askedBy is the path that a namespace asks for, from the pinned map.
func (x *Explainer) askedBy(cookie uint64) Path {
	asked, err := ebpf.LoadPinnedMap(filepath.Join(x.settings.Pins, datapathMapPaths), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return ""
	}
	defer asked.Close()
	var number uint8
	if asked.Lookup(cookie, &number) != nil {
		return ""
	}
	return pathOf(number)
}

// servedAt says which path serves: what left_to_packets() of connect.bpf.c does.
// If the Service and the pod disagree, packets win.
func (o origin) servedAt(service, otherwise Path) ServedAt {
	asked := otherwise
	switch {
	case o.wire:
		return FromWire
	case o.host:
		return AtHost
	case service == PathPacket || o.asked == PathPacket:
		asked = PathPacket
	case service == PathSocket || o.asked == PathSocket:
		asked = PathSocket
	}
	if asked == PathPacket {
		return AtPod
	}
	return AtSocket
}

// text says an answer in sentences.
func (e *Explanation) text(from origin, held bool) string {
	name := "an address of " + e.Service
	switch {
	case e.Pod != "":
		name = "a hostPort of pod " + e.Pod
	case e.Service == "":
		name = "an address of a Service whose name is not known"
	}
	client := fmt.Sprintf("%s is %s.", e.Source.Addr(), from.what)
	to := fmt.Sprintf("%s/%s", e.Destination, e.Protocol)
	switch {
	case !held && e.Protocol != model.TCP && e.Protocol != model.UDP:
		return fmt.Sprintf("%s: only TCP and UDP are served. The packet is left alone.", to)
	case !held:
		return fmt.Sprintf("%s is no address of a Service. The packet is left alone.", to)
	case e.Path == FromWire && e.Verdict == NotAService:
		return fmt.Sprintf("%s is %s, but %s What comes by the wire is left alone: no Service here is to be reached from outside the cluster, or the agent runs with --wire=false.",
			to, name, client)
	case e.Verdict == Drop && e.Reason == reasonNotLetIn:
		return fmt.Sprintf("%s is %s, whose loadBalancerSourceRanges do not have the client. %s %s", to, name, client, e.dropped())
	case e.Verdict == Drop:
		return fmt.Sprintf("%s is %s, which has endpoints, but wants those of this node alone, and none of them serves. %s %s",
			to, name, client, e.dropped())
	case e.Verdict == Refuse:
		return fmt.Sprintf("%s is %s, which has no endpoint that serves. %s %s", to, name, client, e.told())
	}
	return fmt.Sprintf("%s is %s. %s %s%s", to, name, client, e.chosen(), e.translated())
}

// reasonNotLetIn is REASON_NOT_LET_IN of bpf/verdict.h.
const reasonNotLetIn = "not_let_in"

// dropped is how a client learns that what it sends is dropped.
func (e *Explanation) dropped() string {
	switch {
	case e.Path == AtPod || e.Path == FromWire:
		return "Its packet is dropped: nobody tells it."
	case e.Reason == reasonNotLetIn:
		return "Its call ends at once with EPERM."
	}
	return "Its call ends at once with EHOSTUNREACH."
}

// told is how a client learns that it is refused.
func (e *Explanation) told() string {
	switch {
	case e.Path != AtPod && e.Path != FromWire:
		return "Its call ends at once with ECONNREFUSED."
	case e.Protocol == model.TCP:
		return "Its packet is answered with a reset, so that its call ends at once with ECONNREFUSED."
	}
	return "Its packet is answered with \"port unreachable\", so that its next call ends with ECONNREFUSED."
}

func (e *Explanation) chosen() string {
	flow := "connection"
	if e.Protocol == model.UDP {
		flow = "flow"
	}
	if len(e.Backends) == 1 {
		return fmt.Sprintf("Each %s goes to its only endpoint. ", flow)
	}
	return fmt.Sprintf("Each %s goes to one of %d endpoints. ", flow, len(e.Backends))
}

func (e *Explanation) translated() string {
	switch {
	case e.Path == FromWire && e.Masquerade:
		return "Each packet is translated where it enters the node. To an endpoint on another node it goes from this node's address, " +
			"or the answers would not come back this way."
	case e.Path == FromWire:
		return "Each packet is translated where it enters the node, and its endpoint sees the client's address."
	case e.Path != AtPod:
		return "The socket gets the endpoint's address before the first packet exists, so packets cost nothing."
	case e.Masquerade:
		return "Each packet is translated at the pod's veth. The pod is one of the endpoints itself: " +
			"if it is chosen, the packet comes from the Service's address, for no pod takes one from its own."
	}
	return "Each packet is translated at the pod's veth."
}
