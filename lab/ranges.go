package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/model"
)

// ErrRange says that the lab's address ranges cannot be laid out.
var ErrRange = errors.New("address ranges")

// Ranges are the address ranges of one lab, which overlap neither with the
// host's, routes of /8 and wider aside, nor with another lab's.
type Ranges struct {
	// Pods holds the pod range of every node, Services the ClusterIPs that the
	// lab allocates, Nodes the nodes' own addresses; IPv4 first, then IPv6.
	Pods     [2]netip.Prefix `json:"pods"`
	Services [2]netip.Prefix `json:"services"`
	Nodes    [2]netip.Prefix `json:"nodes"`
}

// all lists the ranges of both families.
func (r Ranges) all() []netip.Prefix {
	return append(append(r.Pods[:], r.Services[:]...), r.Nodes[:]...)
}

const (
	maxNodes    = 200 // each has an address in a node range of 254
	podRange    = 16  // prefix length of the IPv4 range that holds every node's pods
	minNodeBits = 8   // a node's pods get at least a /24
)

// chooseRanges picks the first candidate of each kind that overlaps neither
// with what is in use nor with what the manifests name; only the service range
// may hold single addresses that they name. The familiar ranges of Kubernetes
// come first.
func chooseRanges(inUse, given []netip.Prefix) (Ranges, error) {
	var r Ranges
	whole := slices.DeleteFunc(slices.Clone(given), netip.Prefix.IsSingleIP)
	for _, choice := range []struct {
		what       string
		range4     *netip.Prefix
		candidates func(i int) (string, bool)
		range6     *netip.Prefix
		ipv6       string
	}{
		{"pod", &r.Pods[0], func(i int) (string, bool) {
			return fmt.Sprintf("10.%d.0.0/%d", 128+(116+i)%128, podRange), i < 128
		}, &r.Pods[1], "fd6d:6c72:%x:100::/56"},
		{"service", &r.Services[0], func(i int) (string, bool) {
			return fmt.Sprintf("10.%d.0.0/16", (96+i)%128), i < 128
		}, &r.Services[1], "fd6d:6c72:%x:200::/112"},
		{"node", &r.Nodes[0], func(i int) (string, bool) {
			return fmt.Sprintf("172.%d.%d.0/24", 16+(14+i/256)%16, i%256), i < 16*256
		}, &r.Nodes[1], "fd6d:6c72:%x::/64"},
	} {
		claimed := given
		if choice.what == "service" {
			claimed = whole
		}
		var err error
		if *choice.range4, err = firstFree(choice.what, inUse, claimed, choice.candidates); err != nil {
			return r, err
		}
		*choice.range6, err = firstFree(choice.what, inUse, claimed, func(i int) (string, bool) {
			return fmt.Sprintf(choice.ipv6, i), i < 1<<16
		})
		if err != nil {
			return r, err
		}
	}
	return r, nil
}

// firstFree is the first candidate that overlaps with nothing in use or claimed
// or, where there is none, the first that overlaps with wide routes alone.
func firstFree(what string, inUse, claimed []netip.Prefix, candidate func(i int) (string, bool)) (netip.Prefix, error) {
	for _, used := range [][]netip.Prefix{inUse, withoutWide(inUse)} {
		used = slices.Concat(used, claimed)
		for i := 0; ; i++ {
			text, ok := candidate(i)
			if !ok {
				break
			}
			p := netip.MustParsePrefix(text)
			if overlapping(used, p) < 0 {
				return p, nil
			}
		}
	}
	return netip.Prefix{}, fmt.Errorf("%w: no free %s range: the host or other labs use every candidate", ErrRange, what)
}

// wideRoute is the longest prefix that says where the rest of the world is
// rather than what the host uses: 10.0.0.0/8 of a company's network, or the
// two halves of everything that a VPN takes. The lab is not connected to the
// host, so it can do with a part of such a route.
const wideRoute = 8

// withoutWide leaves wide routes out.
func withoutWide(inUse []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(inUse), func(p netip.Prefix) bool { return p.Bits() <= wideRoute })
}

// overlapping is the index of the first range that overlaps with p, or -1.
func overlapping(ranges []netip.Prefix, p netip.Prefix) int {
	for i, r := range ranges {
		if r.Overlaps(p) {
			return i
		}
	}
	return -1
}

// given lists what the manifests themselves lay claim to: the pod ranges of
// Node objects and the ClusterIPs of Services.
func given(s *model.Snapshot) []netip.Prefix {
	var claimed []netip.Prefix
	for _, node := range s.Nodes {
		claimed = append(claimed, node.PodCIDRs...)
	}
	for _, service := range s.Services {
		for _, ip := range service.ClusterIPs {
			claimed = append(claimed, netip.PrefixFrom(ip, ip.BitLen()))
		}
	}
	return claimed
}

// endpoints lists the addresses that EndpointSlices of the manifests name:
// nothing of the lab may answer there.
func endpoints(s *model.Snapshot) []netip.Prefix {
	var named []netip.Prefix
	for _, service := range s.Services {
		for _, port := range service.Ports {
			for _, b := range port.Backends {
				named = append(named, netip.PrefixFrom(b.Address.Addr(), b.Address.Addr().BitLen()))
			}
		}
	}
	return named
}

// planNodes names the nodes and gives them addresses and pod ranges. Node
// objects of the manifests keep their names, labels and pod ranges; their
// addresses are the lab's. Without Node objects there are count nodes, node-1
// to node-N.
func planNodes(s *model.Snapshot, count int, r Ranges, used []netip.Prefix) ([]*model.Node, error) {
	wanted := s.Nodes
	if len(wanted) == 0 {
		for i := range count {
			wanted = append(wanted, &model.Node{Name: fmt.Sprintf("node-%d", i+1)})
		}
	}
	if len(wanted) == 0 || len(wanted) > maxNodes {
		return nil, fmt.Errorf("%w: a lab has 1 to %d nodes, not %d", ErrRange, maxNodes, len(wanted))
	}
	bits, err := nodeBits(podsWanted(s, len(wanted)), len(wanted))
	if err != nil {
		return nil, err
	}
	nodes := make([]*model.Node, len(wanted))
	for i, w := range wanted {
		node := *w
		node.Addresses = []netip.Addr{offset(r.Nodes[0], uint64(i+1)), offset(r.Nodes[1], uint64(i+1))}
		if len(node.PodCIDRs) == 0 {
			node.PodCIDRs = []netip.Prefix{
				netip.PrefixFrom(offset(r.Pods[0], uint64(i)<<bits), 32-bits),
				subnet64(r.Pods[1], i),
			}
		}
		nodes[i] = &node
	}
	return nodes, checkNodeRanges(nodes, withoutWide(used))
}

// checkNodeRanges refuses pod ranges that overlap with one another's or with
// what the host and other labs use.
func checkNodeRanges(nodes []*model.Node, used []netip.Prefix) error {
	var seen []netip.Prefix
	var owner []string
	for _, node := range nodes {
		for _, p := range node.PodCIDRs {
			if i := overlapping(seen, p); i >= 0 {
				return fmt.Errorf("%w: the pod range %s of node %s overlaps with %s of node %s", ErrRange, p, node.Name, seen[i], owner[i])
			}
			if i := overlapping(used, p); i >= 0 {
				return fmt.Errorf("%w: the pod range %s of node %s overlaps with %s, which this host or another lab uses", ErrRange, p, node.Name, used[i])
			}
			seen, owner = append(seen, p), append(owner, node.Name)
		}
	}
	return nil
}

// nodeBits is how many bits number the pods of one node. There is room for
// twice the pods, because while all are replaced both old and new ones live.
func nodeBits(pods, nodes int) (int, error) {
	perNode := (pods + nodes - 1) / nodes
	bits := minNodeBits
	for (1<<bits)-3 < 2*perNode+20 {
		bits++
	}
	if nodes<<bits > 1<<(32-podRange) {
		return 0, fmt.Errorf("%w: %d pods on %d nodes need more than the /%d that a lab has for pods", ErrRange, pods, nodes, podRange)
	}
	return bits, nil
}

// podsWanted is how many pods the manifests ask for.
func podsWanted(s *model.Snapshot, nodes int) int {
	n := len(s.Pods)
	for _, w := range s.Workloads {
		if w.PerNode {
			n += nodes
		} else {
			n += w.Replicas
		}
	}
	return n
}

// offset is the n-th address of a range.
func offset(p netip.Prefix, n uint64) netip.Addr {
	a := p.Masked().Addr().As16()
	binary.BigEndian.PutUint64(a[8:], binary.BigEndian.Uint64(a[8:])+n)
	if p.Addr().Is4() {
		return netip.AddrFrom16(a).Unmap()
	}
	return netip.AddrFrom16(a)
}

// subnet64 is the i-th /64 of a range.
func subnet64(p netip.Prefix, i int) netip.Prefix {
	a := p.Masked().Addr().As16()
	binary.BigEndian.PutUint64(a[:8], binary.BigEndian.Uint64(a[:8])+uint64(i))
	return netip.PrefixFrom(netip.AddrFrom16(a), 64)
}
