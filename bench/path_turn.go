package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/frame"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// measure gives every way its turn in every round, for one operation after the other and
// each time in another random order.
func (p *pathSession) measure(ctx context.Context) error {
	for round := range p.Rounds {
		if round == 0 || (round+1)%10 == 0 {
			p.progress("round %d of %d", round+1, p.Rounds)
		}
		for _, operation := range pathOperations {
			for _, i := range rand.Perm(len(p.cells)) {
				if !slices.Contains(p.ways[i].operations, operation) {
					continue
				}
				if err := p.turn(ctx, i, operation); err != nil {
					return fmt.Errorf("%s of %s: %w", operation, p.cells[i], err)
				}
			}
		}
	}
	return nil
}

// turn measures an operation with one way.
func (p *pathSession) turn(ctx context.Context, i int, operation string) error {
	switch operation {
	case Frame:
		result, err := p.frames(ctx, i)
		p.cells[i].outcomes[Frame] = append(p.cells[i].outcomes[Frame], result)
		return err
	case WireStream:
		if err := p.likeWires(i, true); err != nil {
			return err
		}
		return errors.Join(p.tell(ctx, i, Stream, WireStream), p.likeWires(i, false))
	}
	return p.tell(ctx, i, operation, operation)
}

// time is how long one operation has its turn.
func (p *pathSession) time() time.Duration {
	return p.RoundTime / time.Duration(len(pathOperations))
}

// tell has the client do something, and puts down what came of it.
func (p *pathSession) tell(ctx context.Context, i int, operation, as string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	c := p.cells[i]
	result, err := c.bed.clientProcess.tell(command{Targets: c.targets, Operation: operation, Nanoseconds: p.time().Nanoseconds(),
		WarmUp: warmUp[operation], Server: c.bed.serverProcess.pid()})
	c.outcomes[as] = append(c.outcomes[as], result)
	return err
}

// likeWires has the uplinks of a way carry no packet that is longer than their MTU, as
// wires do, and the node put together what comes, as it does with what cards receive.
func (p *pathSession) likeWires(i int, yes bool) error {
	var errs []error
	for _, node := range p.ways[i].nodes {
		errs = append(errs, netns.Do(node, func() error {
			return errors.Join(link.SetOffload(uplink, link.TSO, !yes), link.SetOffload(uplink, link.GSO, !yes), link.SetOffload(uplink, link.GRO, yes))
		}))
	}
	return errors.Join(errs...)
}

const (
	// framesAtOnce is how many are sent between two readings of the clock, framesTimes how
	// often in a turn, and idleTimes how often they are made for nobody: their time varies
	// less.
	framesAtOnce = 4096
	framesTimes  = 8
	idleTimes    = 3
	// framePort is that of the discard protocol (RFC 863).
	framePort = 9
)

// frames measures what a frame takes from the node's end of the client's veth, where it
// becomes a packet, until the server's pod has it: the least of some times, less the least
// of making it. Whatever else a busy machine does makes a time longer, never shorter.
func (p *pathSession) frames(ctx context.Context, i int) (result outcome, err error) {
	if err := ctx.Err(); err != nil {
		return result, err
	}
	b, w := p.cells[i].bed, p.ways[i]
	f, port, err := b.frame(w.pods)
	if err != nil {
		return result, err
	}
	var sink *frame.Sink
	err = netns.Do(b.backend, func() error {
		sink, err = frame.Catch(framePort, "eth0")
		return err
	})
	if err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, sink.Close()) }()
	var each time.Duration
	sent := uint64(0)
	err = netns.Do(b.node, func() error {
		if err := errors.Join(pin(p.cpu), undisturbed()); err != nil {
			return err
		}
		source, err := frame.Open(f, port)
		if err == nil {
			each, sent, err = leastOf(source)
			err = errors.Join(err, source.Close())
		}
		return err
	})
	if err == nil {
		err = arrive(sink, sent)
	}
	return outcome{Count: int(sent), P50: uint32(each), P99: uint32(each), CPU: each.Nanoseconds() * int64(sent)}, err
}

// undisturbed has the calling thread, which ends soon, keep its processor: nobody else's
// turn falls into a time, and softirqs are done at once.
func undisturbed() error {
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0); err != nil {
		return fmt.Errorf("take real-time priority: %w", err)
	}
	return nil
}

// leastOf sends frames, and returns how long one takes, and how many were sent.
func leastOf(source *frame.Source) (each time.Duration, sent uint64, err error) {
	gross, idle := time.Hour, time.Hour
	for range framesTimes {
		took, err := source.Send(framesAtOnce)
		if err != nil {
			return 0, 0, err
		}
		gross = min(gross, took)
	}
	if sent, err = source.Count(); err != nil {
		return 0, 0, err
	}
	for range idleTimes {
		took, err := source.Idle(framesAtOnce)
		if err != nil {
			return 0, 0, err
		}
		idle = min(idle, took)
	}
	return max(gross-idle, 0), sent, nil
}

// arrive waits until all frames have.
func arrive(sink *frame.Sink, sent uint64) error {
	came := uint64(0)
	for end := time.Now().Add(patience); came < sent && time.Now().Before(end); time.Sleep(100 * time.Microsecond) {
		var err error
		if came, err = sink.Count(); err != nil {
			return err
		}
	}
	if came != sent {
		return fmt.Errorf("%d of %d frames arrived", came, sent)
	}
	return nil
}

// frame is one that the client's pod sends to the server's, and the name of the node's end
// of its veth.
func (b *bed) frame(pods [2]netip.Addr) (f frame.Frame, port string, err error) {
	f = frame.Frame{Source: pods[0], Destination: netip.AddrPortFrom(pods[1], framePort)}
	outer := 0
	err = netns.Do(b.client, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		f.From, outer = eth0.Attrs().HardwareAddr, eth0.Attrs().ParentIndex
		f.To, err = nextHop(eth0, pods[1])
		return err
	})
	if err != nil {
		return f, "", err
	}
	err = netns.Do(b.node, func() error {
		found, err := netlink.LinkByIndex(outer)
		if err == nil {
			port = found.Attrs().Name
		}
		return err
	})
	return f, port, err
}

// nextHop is the hardware address to which a device sends what is for an address. Somebody
// has spoken with it before.
func nextHop(device netlink.Link, to netip.Addr) (net.HardwareAddr, error) {
	routes, err := netlink.RouteGet(to.AsSlice())
	if err != nil || len(routes) == 0 {
		return nil, fmt.Errorf("find the way to %s: %w", to, err)
	}
	via, ok := netip.AddrFromSlice(routes[0].Gw)
	if !ok {
		via = to
	}
	neighbours, err := netlink.NeighList(device.Attrs().Index, unix.AF_INET)
	for _, n := range neighbours {
		if addr, _ := netip.AddrFromSlice(n.IP); addr.Unmap() == via.Unmap() && len(n.HardwareAddr) > 0 {
			return n.HardwareAddr, nil
		}
	}
	return nil, fmt.Errorf("find the neighbour %s: there is none: %w", via, err)
}

// summarize turns what the rounds brought into rows.
func (p *pathSession) summarize() {
	for i, c := range p.cells {
		p.Operations = p.ways[i].operations
		reference := slices.IndexFunc(p.ways, func(w *way) bool { return w.name == p.ways[i].reference() })
		p.summarizeCell(c, p.cells[reference])
	}
}
