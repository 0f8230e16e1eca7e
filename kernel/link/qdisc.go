package link

import "github.com/vishvananda/netlink"

// Qdisc is the queueing discipline by which a device sends (tc(8)).
type Qdisc struct {
	// Kind is the kernel's word: "tbf", "fq_codel", "mq".
	Kind string
	// Drops are those of the root, which has those of its parts.
	Drops uint32
}

// Qdiscs are those at the root of each device that has one, by the device's index.
func (n *Net) Qdiscs() (map[int]Qdisc, error) {
	all, err := whole("qdiscs", func() ([]netlink.Qdisc, error) { return n.handle.QdiscList(nil) })
	if err != nil {
		return nil, err
	}
	roots := map[int]Qdisc{}
	for _, q := range all {
		attrs := q.Attrs()
		if attrs.Parent != netlink.HANDLE_ROOT {
			continue
		}
		root := Qdisc{Kind: q.Type()}
		if s := attrs.Statistics; s != nil && s.Queue != nil {
			root.Drops = s.Queue.Drops
		}
		roots[attrs.LinkIndex] = root
	}
	return roots, nil
}

// Filtered are the devices, by their indices, at which somebody can have filters (the
// qdiscs clsact and ingress, tc-bpf(8)).
func (n *Net) Filtered() (map[int]bool, error) {
	all, err := whole("qdiscs", func() ([]netlink.Qdisc, error) { return n.handle.QdiscList(nil) })
	if err != nil {
		return nil, err
	}
	filtered := map[int]bool{}
	for _, q := range all {
		if q.Type() == "clsact" || q.Type() == "ingress" {
			filtered[q.Attrs().LinkIndex] = true
		}
	}
	return filtered, nil
}
