package cluster

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/millrace/millrace/model"
)

func (r *reader) node(obj *corev1.Node) *model.Node {
	n := &model.Node{
		Name:    r.object.name.Name,
		Labels:  copied(obj.Labels),
		Leaving: obj.DeletionTimestamp != nil || slices.ContainsFunc(obj.Spec.Taints, func(t corev1.Taint) bool { return t.Key == autoscalerTaint }),
		Flannel: r.flannel(obj),
		Where:   r.object.Where(),
	}
	for i, a := range obj.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		addr, ok := r.address(fmt.Sprintf("status.addresses[%d].address", i), a.Address)
		if ok && !slices.Contains(n.Addresses, addr) {
			n.Addresses = append(n.Addresses, addr)
		}
	}
	ranges, field := obj.Spec.PodCIDRs, "spec.podCIDRs[%d]"
	if len(ranges) == 0 && obj.Spec.PodCIDR != "" {
		r.podRange(n, "spec.podCIDR", obj.Spec.PodCIDR)
	}
	for i, text := range ranges {
		r.podRange(n, fmt.Sprintf(field, i), text)
	}
	return n
}

// autoscalerTaint is put on a Node by the cluster autoscaler before it takes the
// machine away (k8s.io/kubernetes/pkg/proxy/healthcheck).
const autoscalerTaint = "ToBeDeletedByClusterAutoscaler"

// podRange reads one range of pod addresses into n.
func (r *reader) podRange(n *model.Node, field, text string) {
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		r.fault(field, "%q is not a range of addresses: write one such as 10.244.1.0/24", clip(text))
		return
	case p.Addr().Is4In6():
		r.fault(field, "%s is an IPv4 range in IPv6 form: write it as IPv4", clip(text))
		return
	case p != p.Masked():
		r.advise(field, "%s has bits set behind its mask and is taken for %s: write that", p, p.Masked())
		p = p.Masked()
	}
	for _, other := range n.PodCIDRs {
		if other.Overlaps(p) {
			r.fault(field, "%s overlaps %s of the same Node: remove one", p, other)
			return
		}
	}
	n.PodCIDRs = append(n.PodCIDRs, p)
}

// ranges is a set of address ranges, none of which overlaps another, in order.
type ranges []owned

type owned struct {
	netip.Prefix
	by *Object
}

// claim adds p for o. If it overlaps a range that is in the set already, it adds
// nothing and returns that one. Being disjoint, the ranges that can overlap p are
// the neighbours of the place where p belongs.
func (s *ranges) claim(p netip.Prefix, o *Object) *owned {
	i, _ := slices.BinarySearchFunc(*s, p, func(e owned, p netip.Prefix) int { return e.Addr().Compare(p.Addr()) })
	for _, j := range []int{i - 1, i} {
		if j >= 0 && j < len(*s) && (*s)[j].Overlaps(p) {
			return &(*s)[j]
		}
	}
	*s = slices.Insert(*s, i, owned{p, o})
	return nil
}

// settleNodes gives each Node the pod ranges that no older Node has.
func (c *Cluster) settleNodes() {
	nodes := slices.SortedFunc(maps.Values(c.nodesInForce), (*Object).older)
	var taken ranges
	for _, o := range nodes {
		c.settleNode(o, &taken)
	}
	for _, n := range c.nodes.items {
		if k := KeyOf("Node", "", n.Name); c.nodesInForce[k] == nil {
			c.nodes.set(Key{Name: k.Name}, nil)
			c.setProblems(c.clashes, k, nil)
		}
	}
}

func (c *Cluster) settleNode(o *Object, taken *ranges) {
	n := *o.value.(*model.Node)
	var kept []netip.Prefix
	var problems []model.Problem
	for _, p := range n.PodCIDRs {
		other := taken.claim(p, o)
		if other == nil {
			kept = append(kept, p)
			continue
		}
		problems = append(problems, model.Problem{
			Where: o.Where(), Object: o.Key().String(), Field: "spec.podCIDRs",
			Text: fmt.Sprintf("%s overlaps %s of %s (%s), which keeps it: give this Node another range", p, other.Prefix, other.by.Key(), other.by.Where()),
		})
	}
	n.PodCIDRs = kept
	c.setProblems(c.clashes, o.Key(), problems)
	c.nodes.set(Key{Name: o.name}, &n)
}
