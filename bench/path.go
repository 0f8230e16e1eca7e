package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
)

// PathOptions are what a person can choose for paths.
type PathOptions struct {
	// Rounds is how often each variant has its turn, RoundTime how long one lasts, all
	// operations together; 0 is DefaultRounds and PathRoundTime.
	Rounds    int
	RoundTime time.Duration
	// Attach has the variants under test, MillraceVXLAN and MillracePeer.
	Attach map[string]PathAttach
	// WorkerCommand is the command that runs WorkerMain, to which its arguments are
	// appended; this program with "bench-worker".
	WorkerCommand []string
	// Progress receives a line for everything that takes time; nothing.
	Progress io.Writer
}

// PathRoundTime is that of PathOptions where nothing is said.
const PathRoundTime = 60 * time.Millisecond

// The variants of paths, between pods of two nodes on one segment.
const (
	// Routed is by routes of the nodes' stacks, as they are.
	Routed = "routed"
	// KernelVXLAN is by the kernel's vxlan devices, with routes as flannel has them.
	KernelVXLAN = "kernel-vxlan"
	// MillraceVXLAN is in VXLAN written by eBPF; MillracePeer the same, with packets handed
	// past the node's ends of pods' veths.
	MillraceVXLAN = "millrace-vxlan"
	MillracePeer  = "millrace-peer"
)

var pathVariants = []string{Routed, KernelVXLAN, MillraceVXLAN, MillracePeer}

// Datagram is a small UDP packet among as many as one processor sends.
const Datagram = "datagram"

var pathOperations = []string{Connection, Request, Datagram}

// PathSpec is what a variant under test works with: two nodes.
type PathSpec struct {
	// Nodes are the paths of their network namespaces.
	Nodes [2]string
	// Addresses are theirs, and Ranges those of their pods.
	Addresses [2]netip.Addr
	Ranges    [2]netip.Prefix
	// Variant is MillraceVXLAN or MillracePeer.
	Variant string
}

// PathAttach has VXLAN in force between the nodes when it returns; what it returns takes
// all of it away.
type PathAttach func(PathSpec) (detach func() error, err error)

// The wire between the nodes (RFC 5737).
var wireAddresses = [2]netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("192.0.2.2/24")}

// vxlanOverhead is what VXLAN takes from the MTU, in bytes (RFC 7348, 5).
const vxlanOverhead = 50

// Path compares what goes between pods of two nodes: by routes as it is, by the kernel's
// VXLAN, and by VXLAN of eBPF. It needs root. It ends early, and leaves nothing, when ctx
// ends.
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
		"uplinks":   "veth, MTU 1500: no packet is cut up on it",
	})
	folders, err := openRun()
	if err != nil {
		return nil, err
	}
	common.Operations = pathOperations
	s := &session{Options: common, run: folders, cpu: cpu, report: &Report{Header: header, Rows: []Row{}, Skipped: []Skipped{}, Warnings: []string{}}}
	p := &pathSession{session: s, attach: o.Attach}
	err = p.prepare(ctx)
	if err == nil {
		err = s.measure(ctx)
	}
	if ctx.Err() != nil {
		err = ctx.Err() // and not that its workers were killed
	}
	if err = errors.Join(err, s.close(), p.close()); err != nil {
		return nil, err
	}
	for _, c := range s.cells {
		s.summarizeCell(c, s.cells[0])
	}
	s.report.Goals = s.report.pathGoals()
	return s.report, nil
}

// pathSession is one run of Path.
type pathSession struct {
	*session
	attach map[string]PathAttach
	second []string // the namespaces of second nodes
}

// prepare makes a bed for each variant, all of which stay until the end.
func (p *pathSession) prepare(ctx context.Context) error {
	for _, variant := range pathVariants {
		if err := ctx.Err(); err != nil {
			return err
		}
		p.progress("prepare %s", variant)
		b, second, err := p.makePathBed(variant)
		if err != nil {
			return err
		}
		if err := p.lead(variant, b, second); err != nil {
			return fmt.Errorf("prepare %s: %w", variant, err)
		}
		if err := b.startWorkers(ctx, p.WorkerCommand, p.cpu); err != nil {
			return err
		}
		c := &cell{variant: variant, services: 1, bed: b, targets: liveBackends(1), outcomes: map[string][]outcome{}}
		if err := c.prove(c.targets); err != nil {
			return fmt.Errorf("prepare %s: %w", variant, err)
		}
		p.cells = append(p.cells, c)
	}
	p.Services = []int{1} // one, as it were: the target
	return nil
}

// makePathBed makes the client's node, and the server's behind a wire.
func (p *pathSession) makePathBed(name string) (*bed, string, error) {
	b := &bed{
		name:    name,
		client:  filepath.Join(p.run.namespaces, name+"-client"),
		node:    filepath.Join(p.run.namespaces, name+"-node"),
		backend: filepath.Join(p.run.namespaces, name+"-backend"),
		group:   filepath.Join(p.run.group, name),
	}
	second := filepath.Join(p.run.namespaces, name+"-second")
	p.beds, p.second = append(p.beds, b), append(p.second, second)
	b.clientGroup, b.serverGroup = filepath.Join(b.group, "client"), filepath.Join(b.group, "server")
	for _, path := range []string{b.client, b.node, b.backend, second} {
		if err := netns.Create(path); err != nil {
			return b, second, err
		}
		if err := netns.Do(path, settings); err != nil {
			return b, second, fmt.Errorf("prepare namespace %s: %w", path, err)
		}
	}
	for _, path := range []string{b.clientGroup, b.serverGroup} {
		if err := cgroup.Create(path); err != nil {
			return b, second, err
		}
	}
	far := *b
	far.node = second
	err := b.connect(b.client, "c0", []netip.Prefix{clientAddress}, clientGateway)
	if err == nil {
		err = far.connect(b.backend, "b0", []netip.Prefix{backendBase}, backendGateway)
	}
	if err == nil {
		err = wire(b.node, second)
	}
	return b, second, err
}

// wire joins two nodes.
func wire(first, second string) error {
	err := withNamespace(second, func(fd int) error {
		return netns.Do(first, func() error {
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wire", MTU: 1500}, PeerName: "wire", PeerNamespace: netlink.NsFd(fd)})
		})
	})
	for i, node := range []string{first, second} {
		if err == nil {
			err = netns.Do(node, func() error { return raise("wire", wireAddresses[i]) })
		}
	}
	if err != nil {
		return fmt.Errorf("join nodes %s and %s: %w", first, second, err)
	}
	return nil
}

// lead makes packets go the variant's way.
func (p *pathSession) lead(variant string, b *bed, second string) error {
	nodes, ranges := [2]string{b.node, second}, [2]netip.Prefix{clientAddress.Masked(), backendBase.Masked()}
	if variant != Routed && variant != KernelVXLAN {
		if p.attach[variant] == nil {
			return errors.New("nothing was given to attach under that name (bench.PathOptions.Attach)")
		}
		var err error
		b.detach, err = p.attach[variant](PathSpec{Nodes: nodes, Addresses: [2]netip.Addr{wireAddresses[0].Addr(), wireAddresses[1].Addr()}, Ranges: ranges, Variant: variant})
		return err
	}
	for i := range nodes {
		err := netns.Do(nodes[i], func() error {
			if variant == KernelVXLAN {
				return kernelVXLAN(i, ranges[1-i])
			}
			return netlink.RouteAdd(&netlink.Route{Dst: network(ranges[1-i]), Gw: wireAddresses[1-i].Addr().AsSlice()})
		})
		if err != nil {
			return fmt.Errorf("lead packets from node %d by %s: %w", i+1, variant, err)
		}
	}
	return nil
}

func network(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// kernelVXLAN makes the device of a node, and all that it has to know of the other, as
// flannel does (https://github.com/flannel-io/flannel/blob/master/pkg/backend/vxlan/vxlan_network.go).
func kernelVXLAN(i int, to netip.Prefix) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = "flannel.1", 1500-vxlanOverhead, net.HardwareAddr{2, 0, 0, 0, 0, byte(i)}
	other := net.HardwareAddr{2, 0, 0, 0, 0, byte(1 - i)}
	d := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: 1, Port: 4789, SrcAddr: wireAddresses[i].Addr().AsSlice()}
	if err := netlink.LinkAdd(d); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(d); err != nil {
		return err
	}
	return errors.Join(
		netlink.NeighAppend(&netlink.Neigh{LinkIndex: d.Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF,
			State: netlink.NUD_PERMANENT | netlink.NUD_NOARP, IP: wireAddresses[1-i].Addr().AsSlice(), HardwareAddr: other}),
		netlink.NeighSet(&netlink.Neigh{LinkIndex: d.Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: to.Addr().AsSlice(), HardwareAddr: other}),
		netlink.RouteAdd(&netlink.Route{LinkIndex: d.Index, Dst: network(to), Gw: to.Addr().AsSlice(), Flags: int(netlink.FLAG_ONLINK)}))
}

// close takes the second nodes away.
func (p *pathSession) close() error {
	var errs []error
	for _, path := range p.second {
		errs = append(errs, netns.Remove(path))
	}
	return errors.Join(errs...)
}

// pathGoals are the aims of this run, with the upper ends of the intervals.
func (r *Report) pathGoals() (goals []Goal) {
	for _, g := range []Goal{
		{Variant: MillraceVXLAN, To: Routed, Metric: MetricP50(Request), Bound: 1},
		{Variant: MillraceVXLAN, To: KernelVXLAN, Metric: MetricP50(Request), Bound: 0.85},
		{Variant: MillraceVXLAN, To: KernelVXLAN, Metric: MetricCPU(Datagram), Bound: 0.65},
		{Variant: MillracePeer, To: Routed, Metric: MetricP50(Request), Bound: 1},
		{Variant: MillracePeer, To: KernelVXLAN, Metric: MetricP50(Request), Bound: 0.85},
		{Variant: MillracePeer, To: KernelVXLAN, Metric: MetricCPU(Datagram), Bound: 0.65},
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
	for _, variant := range []string{MillraceVXLAN, MillracePeer} {
		for _, operation := range pathOperations {
			if row := r.Row(variant, 1, "", MetricErrors(operation)); row == nil || row.Max > 0 {
				return true
			}
		}
	}
	return false
}

// WritePathTable prints a report of Path for people.
func (r *Report) WritePathTable(w io.Writer) error {
	out := &printer{w: w}
	out.printf("%s; kernel %s; %d CPUs; load average %.2f; %s\n",
		r.Header.Machine, r.Header.Kernel, r.Header.CPUs, r.Header.LoadAverage[0], r.Header.Go)
	for _, key := range sortedKeys(r.Header.Settings) {
		out.printf("  %s: %s\n", key, r.Header.Settings[key])
	}
	ratio := func(variant, to, metric string) string {
		of, reference := r.Row(variant, 1, "", metric), r.Row(to, 1, "", metric)
		if variant == to {
			return "1"
		}
		return ratioOf(of.Samples, reference.Samples).String()
	}
	for _, operation := range pathOperations {
		var cells [][]string
		for _, variant := range pathVariants {
			line := []string{variant}
			for _, metric := range []string{MetricP50(operation), MetricCPU(operation)} {
				row := r.Row(variant, 1, "", metric)
				line = append(line, digits(row, row.middle()), ratio(variant, Routed, metric), ratio(variant, KernelVXLAN, metric))
			}
			cells = append(cells, line)
		}
		out.printf("\nA %s\n", operation)
		out.columns([]string{"", "p50 us", "to " + Routed + " [95 %]", "to " + KernelVXLAN, "CPU us", "to " + Routed, "to " + KernelVXLAN}, cells)
	}
	var cells [][]string
	for _, g := range r.Goals {
		met := "missed"
		if g.Met {
			met = "met"
		}
		cells = append(cells, []string{g.Variant, g.To, g.Metric, fmt.Sprintf("at most %.2f", g.Bound), g.Ratio.String(), met})
	}
	out.printf("\nWhat is aimed at: the upper end of the interval\n")
	out.columns([]string{"", "to", "", "aim", "is [95 %]", ""}, cells)
	out.printf("\nA ratio is the median of those of each round. CPU is processor time of client and server,\nwith all that the kernel does in their name.\n")
	for _, warning := range r.Warnings {
		out.printf("warning: %s\n", warning)
	}
	return out.err
}
