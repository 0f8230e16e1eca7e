package fault

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// notAccepting is a listener that never accepts, with room for n.
func notAccepting(n int) func(*Part) error {
	return func(p *Part) error {
		p.blame(p.server)
		if !p.listed {
			n = 1 + p.random.IntN(4)
		}
		l, err := listen(p.server, p.local(p.port), n)
		if err == nil {
			p.atEnd(func() { l.Close() })
		}
		return err
	}
}

// connects opens connections and keeps those that come about.
func connects(n int, between time.Duration) func(context.Context, *Part) {
	return func(ctx context.Context, p *Part) {
		every(ctx, n, between, func() {
			conn, err := p.connect(ctx, "tcp")
			if err == nil {
				p.atEnd(func() { conn.Close() })
			}
			p.saw(outcomeOf(err, Timeout))
		})
	}
}

// flooded makes the server ready for a flood of SYN.
func flooded(cookies string) func(*Part) error {
	return serving(func(p *Part) error {
		p.blame(p.server)
		return p.server.set("net.ipv4.tcp_syncookies", cookies, "net.ipv4.tcp_max_syn_backlog", "64")
	})
}

// flood sends SYN of clients that do not exist, and then asks as one that does. Those
// who do not exist are of the client's network, and of a fault drawn at random of
// networks that nobody has.
func flood(ctx context.Context, p *Part) {
	raw, ok := openRaw(p)
	if !ok {
		return
	}
	defer raw.close()
	to := p.local(p.port)
	ghost := func() netip.Addr { return p.host(p.near[p.i()]) }
	if p.draw(2) == 1 {
		via := p.distantGate[p.i()]
		some := p.elsewhere()
		wide := netip.PrefixFrom(some, some.BitLen()/2).Masked()
		p.wrong(p.server.route(wide, via, p.server.device, unix.RTN_UNICAST))
		ghost = func() netip.Addr { return some }
	}
	var ghosts []netip.Addr
	for range 20 {
		ghosts = append(ghosts, ghost())
	}
	burst := func() {
		for i := range 200 {
			from := netip.AddrPortFrom(ghosts[i%len(ghosts)], uint16(1024+p.random.IntN(60000)))
			p.wrong(raw.send(segment(from, to, synFlag, p.random.Uint32(), nil, 0)))
		}
	}
	burst()
	done := make(chan struct{})
	go func() {
		defer close(done)
		rest(ctx, 100*time.Millisecond)
		calls(ctx, p)
	}()
	for {
		select {
		case <-done:
			return
		case <-time.After(100 * time.Millisecond):
			burst()
		}
	}
}

// narrowPipe puts a slow queue at a device of the client or the router.
func narrowPipe(p *Part) error {
	at, device := p.client, p.client.device
	if p.draw(2) == 1 {
		at, device = p.router, p.router.far
	}
	p.blame(at)
	rate := uint64(20000 << p.draw(3))
	tbf := &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: at.index(device), Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate, Limit: uint32(6000 + p.draw(2)*4000), Buffer: uint32(2000 * 15625 / rate * 1000),
	}
	if err := at.net.QdiscAdd(tbf); err != nil {
		return fmt.Errorf("add tbf to %s in %s: %w", device, at.name, err)
	}
	return nil
}

// overflowed says that a queue of the client or the router dropped something.
func overflowed(p *Part) error {
	for _, at := range []*space{p.client, p.router} {
		queues, err := at.net.QdiscList(nil)
		if err != nil {
			return err
		}
		for _, q := range queues {
			if s := q.Attrs().Statistics; s != nil && s.Queue != nil && s.Queue.Drops > 0 {
				return nil
			}
		}
	}
	return errors.New("no queue dropped anything")
}

var queueFaults = []*Fault{
	{Name: "accept-queue", behind: true, Number: "06a", Says: "A server does not accept: connections wait until there is no room.",
		Causes: []string{"accept-queue-full"}, Seen: []Outcome{Timeout}, induce: notAccepting(1), send: connects(10, 60*time.Millisecond)},
	{Name: "accept-burst", behind: true, Number: "35", Says: "More connections at once than a server has room for.",
		Causes: []string{"accept-queue-full"}, Seen: []Outcome{Timeout}, induce: notAccepting(4), send: connects(30, 0)},
	{Name: "syn-queue", Number: "06b", Says: "A flood of SYN without cookies: nobody gets through.",
		Causes: []string{"syn-queue-full"}, Seen: []Outcome{Timeout}, whole: true, induce: flooded("0"), send: flood},
	{Name: "syn-flood", Number: "06c", Says: "A flood of SYN, answered with cookies.",
		Causes: []string{"syn-flood"}, Seen: []Outcome{OK, Reset}, whole: true, induce: flooded("1"), send: flood},
	{Name: "qdisc-full", behind: true, Number: "14", Says: "The queue of a device that is limited overflows.", whole: true,
		Causes: []string{"qdisc-full"}, Seen: []Outcome{Silent, OK}, induce: serving(narrowPipe), send: pour(1200, 200), took: overflowed},
}
