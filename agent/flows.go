package agent

import (
	"cmp"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/sockdiag"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

const (
	// pairsMost bounds the pairs that metrics name at once: up to half of them for their
	// trouble, the others for their bytes. Each has eleven lines.
	pairsMost = 100
	// pairsKnown bounds those that are counted apart, to be named when they come to matter.
	pairsKnown = 10_000
	// flowsRest is the least time between two readings of the sockets that are open, which
	// take two microseconds each. What has ended is taken in then only, too: a connection
	// that ends between is either.
	flowsRest = 10 * time.Second
	// flowsLate is for how many readings a connection may be missing that has ended between
	// what has ended was read and what is open: the next one has it.
	flowsLate = 2
	// flowsHalf is when what a pair has done counts half as much for whether it is named.
	flowsHalf = 10 * time.Minute
)

// pair is who speaks to whom, as metrics name it, and which of the two ends has seen it.
type pair struct {
	client, server string
	ofClient       bool
}

// pairFlow is what is known of a pair. Counts never fall: what the kernel forgets, for
// others needed the room, stays in them.
type pairFlow struct {
	pair
	ended             [verdicts]uint64
	sent, received    uint64
	retransmits       uint64
	open, opening     int
	stalled           int
	rtt               time.Duration // the longest of those that are open
	trouble, activity float64       // of late
	named             bool
}

// How connections have ended, as the label verdict says it.
const (
	endedOK = iota
	endedRefused
	endedUnanswered
	endedReset
	verdicts
)

var verdictNames = [verdicts]string{"ok", "refused", "unanswered", "reset"}

// flowKey is a client and a port of a server, as a namespace has seen them.
type flowKey struct {
	space    uint32
	client   netip.Addr
	server   netip.AddrPort
	ofClient bool
}

// flowNow is a flow as it is now: what has ended and what is open, together.
type flowNow struct {
	layer.Flow
	open, opening, stalled int
	rtt                    time.Duration
}

// flowMark is the most that was counted of a flow, and how many readings have had less.
type flowMark struct {
	layer.Flow
	late int
}

// flows adds up TCP connections by pairs.
type flows struct {
	mu     sync.Mutex
	before map[flowKey]flowMark
	pairs  map[pair]*pairFlow
	added  time.Time
	// now is the clock, sockets reads those that are open; tests have others.
	now     func() time.Time
	sockets func([]*model.Pod) map[flowKey]*flowNow
}

func newFlows(of *spaces) *flows {
	return &flows{
		before: map[flowKey]flowMark{}, pairs: map[pair]*pairFlow{}, now: time.Now,
		sockets: func(pods []*model.Pod) map[flowKey]*flowNow { return openFlows(of.paths(pods)) },
	}
}

// add takes in what has ended, and what is open then, and gives the pairs that are named
// and those of all others, which are two: as clients and as servers see them. Soon after
// the last time it gives the same again.
func (f *flows) add(ended []layer.Flow, of *model.Snapshot) []*pairFlow {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	if now.Sub(f.added) < flowsRest {
		return f.shown()
	}
	f.fade(now)
	names := ownersOf(of)
	come := map[pair]*pairFlow{} // since the last time
	all := current(ended, f.sockets(of.Pods))
	for key, one := range all {
		of := pair{names.of(key.client), names.of(key.server.Addr()), key.ofClient}
		if come[of] == nil {
			come[of] = &pairFlow{pair: of}
		}
		come[of].take(one, f.before[key].Flow)
	}
	f.mark(all)
	for of, p := range f.pairs {
		p.open, p.opening, p.stalled, p.rtt = 0, 0, 0, 0
		if come[of] == nil && p.trouble+p.activity < 1 && !p.named && p.client != othersPod {
			delete(f.pairs, of)
		}
	}
	for _, p := range come {
		known := f.pairOf(p.pair)
		known.trouble, known.activity = known.trouble+p.trouble, known.activity+p.activity
	}
	f.choose()
	for of, p := range come {
		if known := f.pairs[of]; known == nil || !known.named {
			of = pair{othersPod, othersPod, of.ofClient}
		}
		f.pairOf(of).plus(p)
	}
	return f.shown()
}

// mark keeps the most that was counted of each flow.
func (f *flows) mark(all map[flowKey]*flowNow) {
	before := map[flowKey]flowMark{}
	for key, one := range all {
		before[key] = f.before[key].next(one.Flow)
	}
	for key, was := range f.before {
		if all[key] == nil && was.Ended == 0 && was.late < flowsLate {
			before[key] = was.next(layer.Flow{})
		}
	}
	f.before = before
}

// next is the mark with another reading. Where fewer have ended than before the kernel has
// forgotten them, and counts from the beginning.
func (m flowMark) next(now layer.Flow) flowMark {
	less := now.Sent < m.Sent || now.Received < m.Received || now.Retransmits < m.Retransmits
	if !less || now.Ended < m.Ended || m.late == flowsLate {
		return flowMark{Flow: now}
	}
	now.Sent, now.Received, now.Retransmits = max(now.Sent, m.Sent), max(now.Received, m.Received), max(now.Retransmits, m.Retransmits)
	return flowMark{now, m.late + 1}
}

// current are what has ended and what is open, together.
func current(ended []layer.Flow, open map[flowKey]*flowNow) map[flowKey]*flowNow {
	all := map[flowKey]*flowNow{}
	for _, one := range ended {
		all[flowKey{one.Space, one.Client, one.Server, one.OfClient}] = &flowNow{Flow: one}
	}
	for key, one := range open {
		sum := all[key]
		if sum == nil {
			sum = &flowNow{}
			all[key] = sum
		}
		sum.Sent, sum.Received, sum.Retransmits = sum.Sent+one.Sent, sum.Received+one.Received, sum.Retransmits+one.Retransmits
		sum.open, sum.opening, sum.stalled, sum.rtt = one.open, one.opening, one.stalled, one.rtt
	}
	return all
}

// take adds what has come since before.
func (p *pairFlow) take(now *flowNow, before layer.Flow) {
	since := func(now, before uint64) uint64 { return now - min(now, before) }
	refused, unanswered, reset := since(now.Refused, before.Refused), since(now.Unanswered, before.Unanswered), since(now.Reset, before.Reset)
	bad := refused + unanswered + reset
	sent, received, again := since(now.Sent, before.Sent), since(now.Received, before.Received), since(now.Retransmits, before.Retransmits)
	p.plus(&pairFlow{
		ended: [verdicts]uint64{since(since(now.Ended, before.Ended), bad), refused, unanswered, reset},
		sent:  sent, received: received, retransmits: again,
		open: now.open, opening: now.opening, stalled: now.stalled, rtt: now.rtt,
	})
	p.trouble += float64(bad+again) + float64(now.opening+now.stalled)
	p.activity += float64(sent + received)
}

// plus adds counts, and what is open.
func (p *pairFlow) plus(o *pairFlow) {
	for how, n := range o.ended {
		p.ended[how] += n
	}
	p.sent, p.received, p.retransmits = p.sent+o.sent, p.received+o.received, p.retransmits+o.retransmits
	p.open, p.opening, p.stalled, p.rtt = p.open+o.open, p.opening+o.opening, p.stalled+o.stalled, max(p.rtt, o.rtt)
}

// fade lets what was long ago count less for which pairs are named.
func (f *flows) fade(now time.Time) {
	if !f.added.IsZero() {
		left := math.Exp2(-float64(now.Sub(f.added)) / float64(flowsHalf))
		for _, p := range f.pairs {
			p.trouble, p.activity = p.trouble*left, p.activity*left
		}
	}
	f.added = now
}

// pairOf is what is known of a pair; where there is no room for another it is that of all
// others.
func (f *flows) pairOf(of pair) *pairFlow {
	if f.pairs[of] == nil && len(f.pairs) >= pairsKnown {
		of = pair{othersPod, othersPod, of.ofClient}
	}
	if f.pairs[of] == nil {
		f.pairs[of] = &pairFlow{pair: of}
	}
	return f.pairs[of]
}

// choose names pairs: those with the most trouble of late, and those that sent the most.
// Of the room for either, half is for the first; for the other half one that is named
// stays so while it is among the first of twice as many, lest names come and go.
func (f *flows) choose() {
	var all []*pairFlow
	for _, p := range f.pairs {
		if p.client != othersPod {
			all = append(all, p)
		}
	}
	chosen := map[*pairFlow]bool{}
	pick := func(score func(*pairFlow) float64, room int) {
		slices.SortFunc(all, func(a, b *pairFlow) int {
			return cmp.Or(cmp.Compare(score(b), score(a)), strings.Compare(a.client, b.client), strings.Compare(a.server, b.server))
		})
		first := all[:min(len(all), 2*room)]
		for _, may := range []func(int, *pairFlow) bool{
			func(i int, _ *pairFlow) bool { return i < room/2 },
			func(_ int, p *pairFlow) bool { return p.named },
			func(int, *pairFlow) bool { return true },
		} {
			for i, p := range first {
				if room > 0 && !chosen[p] && score(p) > 0 && may(i, p) {
					chosen[p] = true
					room--
				}
			}
		}
	}
	pick(func(p *pairFlow) float64 { return p.trouble }, pairsMost/2)
	pick(func(p *pairFlow) float64 { return p.activity + 1 }, pairsMost-len(chosen))
	for _, p := range all {
		p.named = chosen[p]
	}
}

// shown are the pairs that are named, and those of all others.
func (f *flows) shown() (all []*pairFlow) {
	for _, p := range f.pairs {
		if p.named || p.client == othersPod {
			one := *p
			all = append(all, &one)
		}
	}
	return all
}

// owners are whose addresses are, in the words of metrics: "shop/web-0" of a pod,
// "shop/service/web" of a Service's own, "/node/worker-1".
type owners map[netip.Addr]string

// Names of addresses that are nobody's of the cluster.
const (
	nobody   = "/external"
	loopback = "/localhost"
)

func (o owners) of(a netip.Addr) string {
	switch name := o[a]; {
	case name != "":
		return name
	case a.IsLoopback():
		return loopback
	}
	return nobody
}

// ownersOf finds them in a Snapshot. Pods of other nodes are known where a Service leads
// to them.
func ownersOf(s *model.Snapshot) owners {
	all := owners{}
	for _, n := range s.Nodes {
		for _, a := range n.Addresses {
			all[a] = "/node/" + n.Name
		}
	}
	for _, service := range s.Services {
		for _, a := range slices.Concat(service.ClusterIPs, service.ExternalIPs, service.LoadBalancerIPs) {
			all[a] = service.Namespace + "/service/" + service.Name.Name
		}
		for _, port := range service.Ports {
			for _, b := range port.Backends {
				if a := b.Address.Addr(); b.Pod.Name != "" && all[a] == "" { // those of a node's network are the node's
					all[a] = b.Pod.String()
				}
			}
		}
	}
	for _, pod := range s.Pods {
		for _, a := range pod.Addresses {
			if !pod.HostNetwork {
				all[a] = pod.Name.String()
			}
		}
	}
	return all
}

// openFlows are the TCP connections that are open in network namespaces, by their inodes
// and the paths that lead to them.
func openFlows(of map[uint32]string) map[flowKey]*flowNow {
	all := map[flowKey]*flowNow{}
	for inode, path := range of {
		_ = netns.In(path, func() error { // one that has gone has none
			var file unix.Stat_t
			if unix.Stat("/proc/thread-self/ns/net", &file) != nil || uint32(file.Ino) != inode {
				return nil // another one has its place
			}
			return addOpen(all, inode)
		})
	}
	return all
}

// addOpen adds those of the calling thread's namespace. An end at whose port somebody
// listens is the server's.
func addOpen(all map[flowKey]*flowNow, inode uint32) error {
	listening, err := sockdiag.Ports()
	if err != nil {
		return err
	}
	return sockdiag.Walk(unix.IPPROTO_TCP, func(s sockdiag.State) {
		switch s.State {
		case unix.BPF_TCP_LISTEN, unix.BPF_TCP_TIME_WAIT, unix.BPF_TCP_CLOSE:
			return
		}
		key := flowKey{inode, s.Local.Addr(), s.Remote, true}
		if listening[s.Local.Port()] {
			key = flowKey{inode, s.Remote.Addr(), s.Local, false}
		}
		if all[key] == nil {
			if len(all) >= pairsKnown {
				return
			}
			all[key] = &flowNow{}
		}
		f := all[key]
		f.open++
		if s.State == unix.BPF_TCP_SYN_SENT {
			f.opening++
		} else if s.Timer == sockdiag.TimerProbe || s.Timer == sockdiag.TimerRetransmit && s.Tries > 0 {
			f.stalled++
		}
		f.Sent, f.Received, f.Retransmits = f.Sent+s.BytesAcked, f.Received+s.BytesReceived, f.Retransmits+s.TotalRetransmits
		f.rtt = max(f.rtt, s.RTT)
	})
}
