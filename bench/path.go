package bench

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/millrace/millrace/kernel/need"
)

// PathOptions are what a person can choose for paths.
type PathOptions struct {
	// Rounds is how often each variant has its turn, RoundTime how long one lasts, all
	// operations together; 0 is DefaultRounds and PathRoundTime.
	Rounds    int
	RoundTime time.Duration
	// Attach has those of millrace.
	Attach map[string]PathAttach
	// WorkerCommand is the command that runs WorkerMain, to which its arguments are
	// appended; this program with "bench-worker".
	WorkerCommand []string
	// Progress receives a line for everything that takes time; nothing.
	Progress io.Writer
}

// PathRoundTime is that of PathOptions where nothing is said.
const PathRoundTime = 120 * time.Millisecond

// The variants of paths. Between pods of two nodes on one segment:
const (
	// Routed is by routes of the nodes' stacks, as they are.
	Routed = "routed"
	// KernelVXLAN is by the kernel's vxlan devices, with routes as flannel has them.
	KernelVXLAN = "kernel-vxlan"
	// MillraceDirect is past the nodes' stacks, packets as they are; MillraceVXLAN is in
	// VXLAN written by eBPF; MillraceClusterIP is MillraceDirect to a Service's address.
	MillraceDirect    = "millrace-direct"
	MillraceVXLAN     = "millrace-vxlan"
	MillraceClusterIP = "millrace-clusterip"
)

// The variants between pods of one node.
const (
	// SameRouted is by the node's stack, SameBridge by a Linux bridge.
	SameRouted = "same-routed"
	SameBridge = "same-bridge"
	// SameMillrace is past the stack, SameClusterIP that to a Service's address.
	SameMillrace  = "same-millrace"
	SameClusterIP = "same-clusterip"
)

// pathVariant is what is measured of a variant.
type pathVariant struct {
	name string
	// same says that both pods are on one node.
	same bool
	// ours says that it is attached, service that a Service's address is called.
	ours, service bool
	operations    []string
}

// reference is what a variant is compared with.
func (v pathVariant) reference() string {
	if v.same {
		return SameRouted
	}
	return Routed
}

// The operations of paths beside those of Services.
const (
	// Datagram is a small UDP packet among as many as one processor sends.
	Datagram = "datagram"
	// WireStream is Stream while the uplinks take no packet that is longer than a wire's (TSO
	// and GSO off), and put together what comes (GRO on), as cards do: a veth else carries
	// packets that no wire carries.
	WireStream = "wire-true stream"
	// Frame is a packet of 60 bytes that the kernel makes itself: what the way costs
	// without sockets and system calls.
	Frame = "frame"
)

var (
	pathOperations = []string{Frame, Request, Connection, Datagram, Stream, WireStream}
	onOneNode      = []string{Frame, Request, Connection, Datagram, Stream}
	toService      = []string{Request, Connection}
	pathVariants   = []pathVariant{
		{name: Routed, operations: pathOperations},
		{name: KernelVXLAN, operations: pathOperations},
		{name: MillraceDirect, ours: true, operations: pathOperations},
		{name: MillraceVXLAN, ours: true, operations: pathOperations},
		{name: MillraceClusterIP, ours: true, service: true, operations: toService},
		{name: SameRouted, same: true, operations: onOneNode},
		{name: SameBridge, same: true, operations: onOneNode},
		{name: SameMillrace, same: true, ours: true, operations: onOneNode},
		{name: SameClusterIP, same: true, ours: true, service: true, operations: toService},
	}
)

// PathSpec is what a variant under test works with: two nodes, or one.
type PathSpec struct {
	// Nodes are the paths of their network namespaces.
	Nodes []string
	// Addresses are theirs, and Ranges those of their pods.
	Addresses []netip.Addr
	Ranges    []netip.Prefix
	// Pods are the network namespaces of the client, on the first node, and of the server, on
	// the last. They have to be given their networks.
	Pods [2]string
	// Cgroup is the folder of the client's processes.
	Cgroup string
	// Service is a Service's address that leads to the server at Port, if it is valid.
	Service netip.AddrPort
	Port    uint16
	Variant string
}

// PathAttach has a variant in force when it returns, and each pod an eth0 with its address;
// what it returns takes all of it away.
type PathAttach func(PathSpec) (detach func() error, err error)

// The wire between the nodes (RFC 5737).
var wireAddresses = [2]netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("192.0.2.2/24")}

// vxlanOverhead is what VXLAN takes from the MTU, in bytes (RFC 7348, 5).
const vxlanOverhead = 50

// Path compares ways between pods, of two nodes and of one: by routes of the stacks, by the
// kernel's VXLAN or a bridge, and by millrace. It needs root. It ends early, and leaves
// nothing, when ctx ends.
func Path(ctx context.Context, o PathOptions) (*Report, error) {
	common, err := Options{Rounds: o.Rounds, RoundTime: max(o.RoundTime, 0), WorkerCommand: o.WorkerCommand, Progress: o.Progress}.withDefaults()
	if err != nil {
		return nil, err
	}
	if o.RoundTime == 0 {
		common.RoundTime = PathRoundTime
	}
	if err := need.Check("make network namespaces", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"); err != nil {
		return nil, err
	}
	cpu, err := lastProcessor()
	if err != nil {
		return nil, err
	}
	header := newHeader("path", map[string]string{
		Connection:  fmt.Sprintf("connect, %d bytes, %[1]d bytes, close; one at a time; server closes first", messageSize),
		Request:     fmt.Sprintf("%d bytes, %[1]d bytes on one open connection, TCP_NODELAY; one at a time", messageSize),
		Datagram:    fmt.Sprintf("%d bytes of UDP, %d with a system call; nobody keeps them, all are counted where they arrive", smallDatagram, datagramBatch),
		"rounds":    fmt.Sprintf("%d of %s for each variant, in random order", common.Rounds, common.RoundTime),
		"processor": fmt.Sprintf("client and server on number %d", cpu),
		Stream:      "64 KiB with a write, over one open connection; all have arrived in the end",
		WireStream:  "the same with TSO and GSO of the uplinks off and GRO on: each packet on them is one that a wire carries",
		Frame:       fmt.Sprintf("60 bytes of UDP of 1,024 flows, made by the kernel (BPF_PROG_TEST_RUN) at the node's end of the sender's veth, dropped where the other pod gets them; the least of %d times %d, less that of making them", framesTimes, framesAtOnce),
		"uplinks":   "veth, MTU 1500",
	})
	folders, err := openRun()
	if err != nil {
		return nil, err
	}
	common.Operations = pathOperations
	s := &session{Options: common, run: folders, cpu: cpu, report: &Report{Header: header, Rows: []Row{}, Skipped: []Skipped{}, Warnings: []string{}}}
	p := &pathSession{session: s, attach: o.Attach}
	if err := carryOut(ctx, p, s.close, p.close); err != nil {
		return nil, err
	}
	p.summarize()
	s.report.Goals = s.report.pathGoals()
	return s.report, nil
}

// pathGoals are the aims of this run, with the upper ends of the intervals.
func (r *Report) pathGoals() (goals []Goal) {
	for _, g := range []Goal{
		{Variant: SameMillrace, To: SameRouted, Metric: MetricP50(Frame), Bound: 0.70},
		{Variant: SameMillrace, To: SameBridge, Metric: MetricP50(Frame), Bound: 0.45},
		{Variant: MillraceDirect, To: Routed, Metric: MetricP50(Frame), Bound: 0.65},
		{Variant: SameMillrace, To: SameRouted, Metric: MetricP50(Request), Bound: 0.95},
		{Variant: MillraceDirect, To: Routed, Metric: MetricP50(Request), Bound: 0.95},
		{Variant: SameClusterIP, To: SameRouted, Metric: MetricP50(Connection), Bound: 0.90},
		{Variant: MillraceClusterIP, To: Routed, Metric: MetricP50(Connection), Bound: 0.90},
		{Variant: MillraceVXLAN, To: Routed, Metric: MetricP50(Request), Bound: 1},
		{Variant: MillraceVXLAN, To: KernelVXLAN, Metric: MetricP50(Request), Bound: 0.85},
		{Variant: MillraceVXLAN, To: KernelVXLAN, Metric: MetricCPU(Datagram), Bound: 0.65},
	} {
		of, to := r.Row(g.Variant, 1, "", g.Metric), r.Row(g.To, 1, "", g.Metric)
		if of == nil || to == nil {
			continue
		}
		if g.Ratio = ratioOf(of.Samples, to.Samples); g.Ratio == nil {
			continue
		}
		g.Met = g.Ratio.High != nil && *g.Ratio.High <= g.Bound
		goals = append(goals, g)
	}
	return goals
}

// PathFailed says that something on a path under test went wrong.
func (r *Report) PathFailed() bool {
	for _, v := range pathVariants {
		for _, operation := range v.operations {
			if row := r.Row(v.name, 1, "", MetricErrors(operation)); v.ours && (row == nil || row.Max > 0) {
				return true
			}
		}
	}
	return false
}
