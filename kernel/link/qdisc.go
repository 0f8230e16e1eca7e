package link

import (
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
)

// Qdisc is the queueing discipline by which a device sends (tc(8)).
type Qdisc struct {
	// Kind is the kernel's word: "tbf", "fq_codel", "mq".
	Kind string
	// Drops are those of the root, which has those of its parts.
	Drops uint32
	// Bucket is what a "tbf" lets pass.
	Bucket TokenBucket
}

// TokenBucket is the qdisc tbf (tc-tbf(8)): it lets a device send at a rate, and has what
// is more wait.
type TokenBucket struct {
	// Rate is in bytes a second, with the Ethernet headers.
	Rate uint64
	// Burst is how long a device that was silent may send without waiting: Rate x Burst
	// bytes at once. A packet of more is cut up if it is one of many segments, or else
	// dropped. At most 274 s.
	Burst time.Duration
	// Limit is how many bytes may wait; what comes then is dropped.
	Limit uint32
}

// Tick is the unit in which the kernel takes bursts (PSCHED_SHIFT, net/pkt_sched.h).
const Tick = 64 * time.Nanosecond

// bucketHandle is the handle of those made here, 6d72: ("mr"), by which tc shows them.
var bucketHandle = netlink.MakeHandle(0x6d72, 0)

// SetTokenBucket has a link send at most at a rate, in the place of what it sent by before.
// fs.ErrNotExist where the kernel has no such qdisc (CONFIG_NET_SCH_TBF).
func (n *Net) SetTokenBucket(index int, b TokenBucket) error {
	err := n.handle.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: bucketHandle, Parent: netlink.HANDLE_ROOT},
		Rate:       b.Rate, Buffer: uint32(b.Burst / Tick), Limit: b.Limit,
	})
	if err != nil {
		return fmt.Errorf("give link %d a queue that limits (tbf): %w", index, err)
	}
	return nil
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
		if b, is := q.(*netlink.Tbf); is {
			root.Bucket = TokenBucket{Rate: b.Rate, Burst: time.Duration(b.Buffer) * Tick, Limit: b.Limit}
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
