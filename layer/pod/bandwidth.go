package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
)

// Limits of what a pod receives and sends are queues that let a device send at a rate
// (tbf, tc-tbf(8)), both at the sending end of the pod's veth: what the pod sends waits at
// its own device, so that its connections feel it and nothing is lost; what it receives
// waits at the node's end. The rate is that of frames, with their Ethernet headers.
const (
	// usualBurst is how long a pod that was silent may send or receive without waiting, where
	// nobody says otherwise. It has to be longer than the kernel takes to come back to a
	// queue on a busy machine, or the rate is not reached (docs/decisions/0016-pod.md).
	usualBurst = 20 * time.Millisecond
	// mostBurst is what the kernel can be told, in its ticks.
	mostBurst = math.MaxUint32 * link.Tick
	// unsaidBurst and more bits are what runtimes say who were not told of any burst, for
	// Kubernetes has no word for it: dockershim 2^31-1, containerd 2^32-1, CRI-O eight times
	// that (https://github.com/containerd/containerd/blob/main/internal/cri/server/sandbox_run.go,
	// toCNIBandWidth). That would be half a gigabyte without any limit.
	unsaidBurst = math.MaxInt32
	// usualWait is how long packets wait at most, and leastWaiting how many may at least:
	// TCP begins with ten (RFC 6928).
	usualWait    = 25 * time.Millisecond
	leastWaiting = 16
	// frameHeader is what a frame has beside the packet, in bytes: addresses, type, and a VLAN.
	frameHeader = 18
)

// bucketOf is the queue for a rate and a burst in bits, at a device with an MTU. The zero
// one is for no limit.
func bucketOf(rate, burst uint64, mtu int) (b link.TokenBucket) {
	if rate == 0 {
		return b
	}
	b.Rate = rate / 8
	b.Burst = usualBurst
	if burst > 0 {
		b.Burst = lasting(float64(burst/8), b.Rate)
	}
	frame := float64(mtu + frameHeader)
	// A packet that is longer than the burst would never be sent.
	b.Burst = min(max(b.Burst, lasting(frame, b.Rate)), mostBurst)
	waiting := max(float64(b.Rate)*usualWait.Seconds(), leastWaiting*frame)
	b.Limit = uint32(min(float64(b.Rate)*b.Burst.Seconds()+waiting, math.MaxInt32))
	return b
}

// lasting is how long bytes take at a rate, in whole ticks of the kernel.
func lasting(bytes float64, rate uint64) time.Duration {
	ticks := math.Ceil(bytes / float64(rate) * float64(time.Second/link.Tick))
	return time.Duration(min(ticks, math.MaxUint32)) * link.Tick
}

// toPod and fromPod are the queues for what a pod receives, at the node's end, and for what
// it sends, at its own.
func toPod(b pool.Bandwidth, mtu int) link.TokenBucket {
	return bucketOf(b.IngressRate, b.IngressBurst, mtu)
}

func fromPod(b pool.Bandwidth, mtu int) link.TokenBucket {
	return bucketOf(b.EgressRate, b.EgressBurst, mtu)
}

// annotations are where Kubernetes has a pod's bandwidth.
const annotations = "annotations kubernetes.io/ingress-bandwidth and kubernetes.io/egress-bandwidth"

// bandwidthFor is what a runtime asks for a pod.
func bandwidthFor(config *cni.Config, pod *Pod) (pool.Bandwidth, error) {
	b := config.RuntimeConfig.Bandwidth
	if err := b.Check(); err != nil {
		return b, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("limit the bandwidth of %s: %v: set the pod's %s to that, and make it anew", pod.Object(), err, annotations), "")
	}
	b.IngressBurst, b.EgressBurst = said(b.IngressRate, b.IngressBurst), said(b.EgressRate, b.EgressBurst)
	return b, nil
}

// said is a burst that somebody means, 0 for others.
func said(rate, burst uint64) uint64 {
	if rate == 0 || burst >= unsaidBurst {
		return 0
	}
	return burst
}

// limit sets the queue of a pod's device, if it is to have one.
func limit(n *link.Net, index int, b link.TokenBucket) error {
	if b == (link.TokenBucket{}) {
		return nil
	}
	return withoutBuckets(n.SetTokenBucket(index, b))
}

// withoutBuckets says what to do where the kernel has no such queue.
func withoutBuckets(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("this kernel cannot keep the pod's bandwidth: `modprobe sch_tbf` (CONFIG_NET_SCH_TBF), or take the pod's %s away: %w", annotations, err)
	}
	return err
}

// limitReceived sets the queue of the node's end, if there is to be one and there is none.
func limitReceived(outer *link.Net, pod *Pod) error {
	if pod.Bandwidth.IngressRate == 0 {
		return nil
	}
	queues, err := outer.Qdiscs()
	if err != nil || !unlimited(queues[pod.Index], pod.Bandwidth.IngressRate) {
		return err
	}
	return limit(outer, pod.Index, toPod(pod.Bandwidth, pod.mtu))
}

// readBucket is the opposite of bucketOf, for a pod whose limits are not written down any
// more.
func readBucket(b link.TokenBucket, mtu int) (rate, burst uint64) {
	rate = b.Rate * 8
	if b != bucketOf(rate, 0, mtu) {
		burst = uint64(float64(rate) * b.Burst.Seconds())
	}
	return rate, burst
}

// unlimited says that a pod's device has no queue where it is to have one. Another queue
// than ours is somebody's who means it.
func unlimited(q link.Qdisc, rate uint64) bool {
	return rate > 0 && (q.Kind == "" || q.Kind == "noqueue")
}

// unlimitedEnds are the words for queues that a pod is to have and has not; index is that
// of its own device.
func unlimitedEnds(outer, inner *link.Net, pod *Pod, index int) (missing []string, err error) {
	if pod.Bandwidth == (pool.Bandwidth{}) {
		return nil, nil
	}
	node, err := outer.Qdiscs()
	if err != nil {
		return nil, err
	}
	own, err := inner.Qdiscs()
	if unlimited(node[pod.Index], pod.Bandwidth.IngressRate) {
		missing = append(missing, "the limit of what the pod receives (tbf) at "+pod.Device)
	}
	if unlimited(own[index], pod.Bandwidth.EgressRate) {
		missing = append(missing, "the limit of what the pod sends (tbf) at "+pod.Interface+" of the pod")
	}
	return missing, err
}

// bandwidth implements host.
func (n node) bandwidth(pod *Pod, space string) (b pool.Bandwidth, err error) {
	outer, err := link.Open(n.netns)
	if err != nil {
		return b, err
	}
	defer outer.Close()
	queues, err := outer.Qdiscs()
	if err != nil {
		return b, err
	}
	b.IngressRate, b.IngressBurst = readBucket(queues[pod.Index].Bucket, pod.mtu)
	if space == "" {
		return b, nil
	}
	inner, err := link.Open(space)
	if err != nil {
		return b, err
	}
	defer inner.Close()
	index, err := inner.Index(pod.Interface)
	if err != nil {
		return b, err
	}
	queues, err = inner.Qdiscs()
	b.EgressRate, b.EgressBurst = readBucket(queues[index].Bucket, pod.mtu)
	return b, err
}

// widen makes a pod's queues such that longer packets pass, where its bursts are shorter.
// Another queue than ours is somebody's who means it, and stays. Ours is known by its rate:
// bursts are rounded where they were read back.
func widen(outer, inner *link.Net, pod *Pod, index int, from, to int) error {
	for _, end := range []struct {
		at    *link.Net
		index int
		queue func(pool.Bandwidth, int) link.TokenBucket
		rate  uint64
	}{{outer, pod.Index, toPod, pod.Bandwidth.IngressRate}, {inner, index, fromPod, pod.Bandwidth.EgressRate}} {
		queue := end.queue(pod.Bandwidth, to)
		if queue == end.queue(pod.Bandwidth, from) {
			continue
		}
		queues, err := end.at.Qdiscs()
		if err != nil {
			return err
		}
		if is := queues[end.index]; is.Bucket.Rate != queue.Rate && !unlimited(is, end.rate) {
			continue
		}
		if err := limit(end.at, end.index, queue); err != nil {
			return err
		}
	}
	return nil
}
