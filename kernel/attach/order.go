package attach

import "github.com/cilium/ebpf/link"

// Order is the place of a program among ours of all layers at one side of a device. With
// tcx they stand at its head or at its tail, in the order in which they came. Where filters
// stand for links it is their priority, those with a smaller number run first: one number is
// one program's, for whoever takes another's has it replaced.
type Order uint16

// In this order packets meet them.
const (
	// OrderQueries reads what pods ask of a Service (layer/dns).
	OrderQueries Order = 0x6d70 + iota
	// OrderAnswers turns answers to what left with the node's address back (layer/masquerade).
	OrderAnswers
	// OrderServices makes packets to a Service ones to an endpoint (layer/service), and
	// OrderNextServices the next version of it while it takes over.
	OrderServices
	OrderNextServices
	// OrderRoutes sends packets to other nodes and takes theirs (layer/route).
	OrderRoutes
	// OrderLeaving gives what leaves the node's address (layer/masquerade).
	OrderLeaving
)

// FromPod is the name of layer/pod's program at the devices of pods. Packets to other nodes
// meet that of layer/route before it where they can: it has a look-up for them that finds
// nothing.
const FromPod = "pod_from_pod"

// anchor is the place with tcx: what reads or alters packets for the others stands before
// programs of strangers, what sends them away behind.
func (o Order) anchor() link.Anchor {
	if o >= OrderRoutes {
		return link.Tail()
	}
	return link.Head()
}
