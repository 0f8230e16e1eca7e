package route

import (
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"
)

const (
	// dropRounds in a row have to end with an answer to the nodes' addresses and none to pods'
	// before the fabric is said to drop these; passRounds with one to pods' before it is said
	// not to any more. Of rounds against what is known the former follow each other at once, the
	// latter are a minute apart.
	dropRounds, passRounds = 3, 5
	// triesOfRound are the packets to each of the two that a round sends at most, silentTries
	// where nobody has answered to either.
	triesOfRound, silentTries = 5, 3
	// dropAnswers are those to the nodes' addresses that these rounds have to have heard in all:
	// if as many packets to pods' had a chance of e.g. one in two, or one in ten, to be answered,
	// none would be in 6 of a million such cases (e^-12), whatever part of all packets is lost.
	dropAnswers = 12
)

// sign is what nodes tell each other in notes (probe.Note.Said).
type sign uint8

const (
	// signDrops: the fabric drops packets of pods' addresses. signReady: who says it takes VXLAN
	// from the other. signSends: it sends in VXLAN.
	signDrops sign = 1 << iota
	signReady
	signSends
)

// adjacent is another node that looks as if it were on a segment of this host, for the ranges
// of one family.
type adjacent struct {
	node string
	// via and own are the two nodes' addresses, pods and ownPods the first addresses of their
	// ranges: nobody has these where all ways are direct, and fabrics treat them as any pod's.
	via, own      netip.Addr
	pods, ownPods netip.Addr
	index         int // the device
}

// about is a word for what is asked, by which the other node sees that it knows these ranges by
// the same addresses; else it does not answer, and nothing can be said of the fabric.
func about(asker, asked netip.Addr) uint32 {
	sum := fnv.New32a()
	sum.Write(asker.AsSlice())
	sum.Write(asked.AsSlice())
	return sum.Sum32()
}

// round is what came back to the packets of one round.
type round struct {
	nodes  int  // answers to those of the nodes' addresses
	pods   bool // one to those of pods'
	theirs sign // what the other said last
}

// fabric is what is known of what is between this node and an adjacent one.
type fabric struct {
	// drops is what this node has found out, theirs what the other said when it answered last.
	drops  bool
	theirs sign
	// heard says that it answered when it was asked last, met that it ever did, begun since when
	// it is asked.
	heard, met bool
	begun      time.Time
	// over says that packets are to go in VXLAN, kept that it is to be taken from the other.
	// ready and sends say that the kernel is so.
	over, kept, ready, sends bool
	// against are the rounds in a row that spoke against drops.
	against int
	answers int    // to the nodes' addresses in these
	unsent  string // why nothing could be asked the last time
	// next is when it is asked again, last when it was, wait the time after that; asking that it
	// is being asked.
	next, last time.Time
	wait       time.Duration
	asking     bool
	hinted     bool // the other seems to have something to say
}

// course is what a plan has to know of a fabric.
type course struct{ over, kept bool }

// says is what this node tells the other.
func (f *fabric) says() (s sign) {
	if f.drops {
		s |= signDrops
	}
	if f.ready && f.kept { // or it may end at any time
		s |= signReady
	}
	if f.over || f.sends {
		s |= signSends
	}
	return s
}

func (f *fabric) blocked() bool { return f.drops || f.theirs&signDrops != 0 }

// unsettled says that something is to follow from what is known, and waits for the other node.
func (f *fabric) unsettled() bool {
	return f.blocked() != f.over || f.kept && !f.over || !f.drops && f.against > 0
}

// learn takes in what came back. What no node answered says nothing, and what was before holds.
// This node goes over to VXLAN only when the other takes it, and takes it until the other does
// not send it any more: so neither sends what the other drops.
func (f *fabric) learn(r round) {
	switch {
	case r.pods == f.drops && (r.pods || r.nodes > 0):
		f.against++
		f.answers += r.nodes
	case r.pods || r.nodes > 0:
		f.against, f.answers = 0, 0
	}
	if f.drops && f.against >= passRounds || !f.drops && f.against >= dropRounds && f.answers >= dropAnswers {
		f.drops, f.against, f.answers = !f.drops, 0, 0
	}
	if f.heard = r.nodes > 0; !f.heard {
		f.kept = f.kept || f.drops
		return
	}
	f.theirs, f.met = r.theirs, true
	switch {
	case !f.blocked():
		f.over = false
	case f.theirs&signReady != 0:
		f.over = true
	}
	f.kept = f.blocked() || f.theirs&signSends != 0
}

// listens says that the other node has to be heard at a time, also outside windows: where
// something is under way, where it is in VXLAN, and for some time as long as it never answered.
func (f *fabric) listens(now time.Time) bool {
	return f.unsettled() || f.over || !f.met && now.Sub(f.begun) < youngFor
}

// windows are times at which all nodes listen, by their clocks.
type windows struct{ long, every time.Duration }

func (w windows) open(now time.Time) bool { return now.Sub(now.Truncate(w.every)) < w.long }

// edge is how long it is until one begins or ends.
func (w windows) edge(now time.Time) time.Duration {
	since := now.Sub(now.Truncate(w.every))
	if since < w.long {
		return w.long - since
	}
	return w.every - since
}

// next is somewhere in the middle half of the next window: clocks may differ.
func (w windows) next(now time.Time) time.Time {
	return now.Truncate(w.every).Add(w.every + w.long/4 + rand.N(w.long/2))
}

// later says when to ask again: soon while something is under way, at ever longer intervals; in
// the next window where nothing is.
func (f *fabric) later(now time.Time, changed bool, soon, every time.Duration, w windows) {
	switch {
	case changed || f.wait == 0:
		f.wait = soon
	default:
		f.wait = 2 * f.wait
	}
	if f.wait = min(f.wait, every); !f.unsettled() {
		f.wait = every
	}
	if f.against > 0 && !f.drops {
		f.wait = soon
	}
	f.last, f.next = now, now.Add(f.wait)
	if !f.listens(now) {
		f.next = w.next(now)
	}
}

// hurry has it asked at a time, if not before.
func (f *fabric) hurry(at time.Time) {
	if at.Before(f.next) {
		f.next = at
	}
}

// first is the range of a node by which its ranges of a family are known.
func (p peer) first(of netip.Prefix) netip.Prefix {
	for _, one := range p.ranges {
		if one.Addr().BitLen() == of.Addr().BitLen() {
			return one
		}
	}
	return of
}

// adjacentBy says whether a node looks adjacent, to which a way leads: also where packets go
// there in VXLAN because the fabric drops them.
func adjacentBy(settings Settings, w *wish, n peer, row *Row, f facts) (a adjacent, is bool) {
	own := w.own
	if settings.Mode == ModeVXLAN || !w.mayBeDirect(n) || row.To != n.first(row.To) {
		return a, false
	}
	if !row.Direct {
		if row = direct(own, n, row.To, f); row == nil {
			return a, false
		}
	}
	a = adjacent{node: n.name, via: row.Via, pods: row.To.Masked().Addr(), index: row.index}
	ranges := own.first(row.To)
	for _, one := range own.addresses {
		h, found := f.way(one)
		if found && h.device == row.index && one.BitLen() == row.Via.BitLen() {
			a.own = one
			break
		}
	}
	a.ownPods = ranges.Masked().Addr()
	return a, a.own.IsValid() && slices.Contains(own.ranges, ranges)
}

// leftBy is what an earlier process knew of fabrics, by the routes in a picture: where it sent
// to a neighbour in VXLAN, it is to stay so until it is asked anew.
func leftBy(picture *Picture) map[netip.Prefix]course {
	left := map[netip.Prefix]course{}
	for to, row := range picture.rows {
		if !row.Direct && row.Near {
			left[to] = course{over: true, kept: true}
		}
	}
	return left
}

// findings say in a line each to how many nodes packets go otherwise than they could, or cannot.
func (f *fabrics) findings() (texts []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var over, waiting, unsent []netip.Prefix
	for _, to := range slices.SortedFunc(maps.Keys(f.known), netip.Prefix.Compare) {
		switch known := f.known[to]; {
		case known.over:
			over = append(over, to)
		case known.blocked():
			waiting = append(waiting, to)
		}
		if f.known[to].unsent != "" {
			unsent = append(unsent, to)
		}
	}
	of := func(all []netip.Prefix) string {
		first := f.aims[all[0]]
		return fmt.Sprintf("%d (the first is that of node %s at %s)", len(all), first.node, first.via)
	}
	if len(over) > 0 {
		texts = append(texts, "a segment drops packets of pods' addresses: to ranges of nodes that are on it packets go in VXLAN, of "+of(over)+
			". To have them go as they are, let the network carry the pods' ranges (source/destination check, allowed address pairs, IP forwarding and routes of a cloud)")
	}
	if len(waiting) > 0 {
		texts = append(texts, "a segment drops packets of pods' addresses, and the node has not said yet that it takes VXLAN, of "+of(waiting)+": see its agent's status")
	}
	if len(unsent) > 0 {
		texts = append(texts, "whether segments carry packets of pods' addresses is not asked, of "+of(unsent)+": "+f.known[unsent[0]].unsent+". What was found before holds")
	}
	return texts
}
