package route

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/millrace/millrace/kernel/probe"
)

const (
	// pathsEvery is how often the path to each node is measured, pathsApart the least time
	// between two nodes: with more than 6,000 nodes it takes longer.
	pathsEvery = time.Minute
	pathsApart = 10 * time.Millisecond
	// pathsAtOnce are measured at a time: one that does not answer takes 3 s.
	pathsAtOnce = 8
)

// measurement is how long packets to an address may be, as far as it is known.
type measurement struct {
	probe.Path
	// most is the device's MTU when it was measured, in bytes; 0 if it never was.
	most int
	// inside says that only what was in VXLAN was answered.
	inside bool
	// left says that an earlier process found it out: its routes say so.
	left bool
	// unsent is why it could not be measured the last time; empty if it could.
	unsent string
}

// narrow is the longest packet that passes where that is less than what was tried, else 0.
func (m measurement) narrow() int {
	if m.Passed > 0 && m.Passed < m.Tried {
		return m.Passed
	}
	return 0
}

// paths measures how long packets to other nodes may be: what a device says is true of the
// wire that is in it.
type paths struct {
	netns string
	every time.Duration
	mtu   func(ctx context.Context, space string, to netip.Addr, most int) (probe.Path, error)
	inner func(ctx context.Context, space string, by probe.Tunnel, most int) (probe.Path, error)

	mu    sync.Mutex // guards what follows
	known map[netip.Addr]measurement
	aims  map[netip.Addr]aim // the nodes' addresses
	begun bool
	news  chan struct{}
}

func newPaths(netns string) *paths {
	return &paths{netns: netns, every: pathsEvery, mtu: probe.MTU, inner: probe.TunnelMTU, known: map[netip.Addr]measurement{}, aims: map[netip.Addr]aim{}, news: make(chan struct{}, 1)}
}

// aim is what is measured of a way: the longest packet, and how to send it where ICMP is
// filtered, nil if that cannot be.
type aim struct {
	most   int
	tunnel *probe.Tunnel
}

// tunnelOf is from this node's vxlan device to another's, each with the first address of a
// range.
func tunnelOf(own *device, row *Row) *probe.Tunnel {
	if own == nil || row.Direct || row.To.Addr().Is6() {
		return nil
	}
	source := sameFamily(own.Addresses, row.To.Addr())
	if !source.IsValid() {
		return nil
	}
	return &probe.Tunnel{From: row.Local, To: netip.AddrPortFrom(row.Via, own.Port), VNI: own.VNI, FromMAC: own.MAC, ToMAC: row.MAC, Source: source, Target: row.To.Addr()}
}

// all is what is known.
func (p *paths) all() map[netip.Addr]measurement {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.known)
}

// aim says which ways there are: what has gone is forgotten, and what is new is measured
// soon.
func (p *paths) aim(picture *Picture) {
	aims := map[netip.Addr]aim{}
	for _, row := range picture.rows {
		at, there := picture.facts.devices[row.index]
		if !there || !row.Via.IsValid() {
			continue
		}
		tunnel := tunnelOf(picture.device, row)
		if tunnel == nil {
			tunnel = aims[row.Via].tunnel // that of another range
		}
		aims[row.Via] = aim{at.mtu, tunnel}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.aims = aims
	maps.DeleteFunc(p.known, func(to netip.Addr, _ measurement) bool { return aims[to].most == 0 })
	if len(p.due(false)) > 0 {
		select {
		case p.news <- struct{}{}:
		default: // it has yet to look at an earlier one
		}
	}
}

// takeOver believes the routes of an earlier process until they are measured anew, so that
// a restart changes nothing.
func (p *paths) takeOver(picture *Picture) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.begun {
		return
	}
	p.begun = true
	p.known = left(picture)
}

// left is what the routes in a picture say about paths.
func left(picture *Picture) map[netip.Addr]measurement {
	known := map[netip.Addr]measurement{}
	for _, row := range picture.rows {
		at := picture.facts.devices[row.index]
		if outside := row.outside(); row.MTU > 0 && outside < at.mtu {
			known[row.Via] = measurement{Path: probe.Path{Tried: at.mtu, Passed: outside}, left: true}
		}
	}
	return known
}

// due are the addresses to be measured: all, or those that are new or whose devices have
// another MTU. The lock is held.
func (p *paths) due(all bool) (due []netip.Addr) {
	for to, aim := range p.aims {
		if all || p.known[to].most != aim.most {
			due = append(due, to)
		}
	}
	slices.SortFunc(due, netip.Addr.Compare)
	return due
}

// watch measures until ctx ends, and calls changed when a path is found to be another.
func (p *paths) watch(ctx context.Context, changed func()) {
	every := time.NewTicker(p.every)
	defer every.Stop()
	for all := false; ; {
		p.mu.Lock()
		due := p.due(all)
		p.mu.Unlock()
		if p.measure(ctx, due) {
			changed()
		}
		select {
		case <-ctx.Done():
			return
		case <-p.news:
			all = false
		case <-every.C:
			all = true
		}
	}
}

// measure says whether a path was found to be another than it was taken for. It ends when
// all that it began has.
func (p *paths) measure(ctx context.Context, due []netip.Addr) bool {
	var several sync.WaitGroup
	var differ atomic.Bool
	free := make(chan struct{}, pathsAtOnce)
	for _, to := range due {
		if ctx.Err() != nil {
			break
		}
		free <- struct{}{} // each ends soon after ctx
		p.mu.Lock()
		aim, was := p.aims[to], p.known[to]
		p.mu.Unlock()
		several.Go(func() {
			defer func() { <-free }()
			found, err := p.ask(ctx, to, aim, was.inside)
			if p.learn(to, found, err) {
				differ.Store(true)
			}
		})
		time.Sleep(pathsApart)
	}
	several.Wait()
	return differ.Load()
}

// ask measures one path: by ICMP, or in VXLAN where that is filtered, the one first that was
// answered before.
func (p *paths) ask(ctx context.Context, to netip.Addr, aim aim, inside bool) (m measurement, err error) {
	m.most = aim.most
	if inside && aim.tunnel != nil {
		if m.Path, err = p.inner(ctx, p.netns, *aim.tunnel, aim.most); err == nil {
			m.inside = true
			return m, nil
		}
	}
	m.Path, err = p.mtu(ctx, p.netns, to, aim.most)
	if errors.Is(err, probe.ErrSilent) && !inside && aim.tunnel != nil {
		m.Path, err = p.inner(ctx, p.netns, *aim.tunnel, aim.most)
		m.inside = err == nil
	}
	return m, err
}

// learn takes in what a measurement found, and says whether that is something else. Of one
// without a result what was measured before still holds: the node may be off, or nothing may
// be sent from here. What an earlier process left does not, if nobody answers: it may be
// older than its uplink.
func (p *paths) learn(to netip.Addr, now measurement, err error) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.aims[to].most == 0 {
		return false // it has gone meanwhile
	}
	was := p.known[to]
	if err != nil {
		most := now.most
		now = was
		if was.left && errors.Is(err, probe.ErrSilent) {
			now = measurement{}
		}
		now.most, now.unsent = most, ""
		if errors.Is(err, probe.ErrUnsent) {
			now.unsent = err.Error()
		}
	}
	p.known[to] = now
	return now.narrow() != was.narrow() || now.narrow() > 0 && now.Announced != was.Announced
}

// unmeasured says that paths could not be measured, and why not the first of them.
func (p *paths) unmeasured() []string {
	known := p.all()
	maps.DeleteFunc(known, func(_ netip.Addr, m measurement) bool { return m.unsent == "" })
	if len(known) == 0 {
		return nil
	}
	first := slices.MinFunc(slices.Collect(maps.Keys(known)), netip.Addr.Compare)
	return []string{fmt.Sprintf("how long packets to other nodes may be is not measured, of %d (the first is %s): %s. Until it is, what devices and routes say is believed, and what was measured before", len(known), first, known[first].unsent)}
}

// finding says that the way to a node takes less than its device sends, or the route there
// if somebody set that to less; empty if it does not.
func (r *Row) finding(f facts) string {
	m, set, what := f.paths[r.Via], f.devices[r.index].mtu, r.Device
	if h, found := f.way(r.Via); found && h.mtu > 0 && h.mtu < set {
		set, what = h.mtu, "the route there by "+r.Device
	}
	if m.narrow() == 0 || m.narrow() >= set {
		return ""
	}
	said := "nobody says so by ICMP"
	if m.Announced > 0 {
		said = fmt.Sprintf("%s says that %d pass", m.By, m.Announced)
	}
	if m.left {
		said = "as it was found before"
	}
	text := fmt.Sprintf("packets of at most %d bytes pass to node %s (%s), and %s has an MTU of %d; %s. Packets of pods there are kept to %d; make the way take %d, or set an MTU of %d on both nodes",
		m.Passed, r.Node, r.Via, what, set, said, r.MTU, set, m.Passed)
	if r.outside() > m.Passed {
		text += fmt.Sprintf(" (they are cut up on the way, or lost: %d is the least for pods there)", r.MTU)
	}
	return text
}
