package trace

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer/trace/cause"
)

// What a Reader reads is bounded, for a pod can make as many sockets, devices, rules and,
// where it may, network namespaces as it likes. Bounds are of one end of the window; a
// namespace always gets the least, whatever others have taken.
const (
	mostSpaces = 1000 // network namespaces
	// longestReading is how long reading may take at either end of the window.
	longestReading = 30 * time.Second

	mostSockets      = 2000 // of one namespace
	leastSockets     = 50
	mostSocketsInAll = 40_000  // 300 bytes each
	mostDrops        = 20_000  // sockets of one namespace that had dropped something before
	mostRulesInAll   = 200_000 // 600 bytes each; package nft reads 100,000 of one namespace

	mostMissing = 200 // lines about what is missing
)

// room is how many more there may be in all.
type room struct{ left atomic.Int64 }

// take gives room for n, or for as many as there is, but never for fewer than least.
func (r *room) take(n, least int) int {
	for {
		left := r.left.Load()
		given := min(int64(n), max(left, int64(least)))
		if r.left.CompareAndSwap(left, left-given) {
			return int(given)
		}
	}
}

// fill gives all the room there may be.
func (r *Reader) fill() {
	r.linkRoom.left.Store(mostLinksInAll)
	r.socketRoom.left.Store(mostSocketsInAll)
	r.ruleRoom.left.Store(mostRulesInAll)
}

// chosen are the namespaces that are read: those where something happened first, then
// those that were read before, then others, as they were given.
func (r *Reader) chosen(met map[uint32]bool) []Namespace {
	rank := func(n Namespace) int {
		switch {
		case met[n.Inode]:
			return 0
		case r.before[n.Inode] != nil:
			return 1
		}
		return 2
	}
	all := slices.Clone(r.spaces)
	slices.SortStableFunc(all, func(a, b Namespace) int { return rank(a) - rank(b) })
	if len(all) > mostSpaces {
		r.note("counters, sockets, devices and rules of %d of %d network namespaces: no more than %d are read, first those where something died; name those that matter with --netns",
			len(all)-mostSpaces, len(all), mostSpaces)
		all = all[:mostSpaces]
	}
	return all
}

// notRead says how many namespaces there was no time for.
func (r *Reader) notRead(of, unread int, end string) {
	if unread > 0 {
		r.note("%d of %d network namespaces: reading %s the window was ended when it had taken %s; name those that matter with --netns", unread, of, end, longestReading)
	}
}

// strangers says what happened in namespaces that are not read: they came or went
// meanwhile, or nothing leads to them.
func (r *Reader) strangers(e *cause.Evidence) {
	read, others := map[uint32]bool{}, map[uint32]bool{}
	for _, s := range e.Spaces {
		read[s.Inode] = true
	}
	var died, more uint64
	for i := range e.Events {
		switch event := &e.Events[i]; {
		case read[event.Space]:
			continue
		case event.Kind == cause.Drop:
			died += event.Count
			others[event.Space] = true
		default:
			more += event.Count
			others[event.Space] = true
		}
	}
	if len(others) > 0 {
		r.note("why %d packets died, and %d other events, in %d network namespaces that came or went meanwhile, or that were not read", died, more, len(others))
	}
}

// met is what events are about.
type met struct {
	spaces map[uint32]bool
	ports  [1 << 16]bool
	// sockets are their cookies.
	sockets map[uint64]bool
	// senders are ends whose packets found no socket: a translation may have been forgotten.
	senders map[netip.AddrPort]bool
}

func meet(events []cause.Event) *met {
	m := &met{spaces: map[uint32]bool{}, sockets: map[uint64]bool{}, senders: map[netip.AddrPort]bool{}}
	for i := range events {
		e := &events[i]
		m.spaces[e.Space], m.sockets[e.Socket] = true, true
		m.ports[e.Tuple.Source.Port()], m.ports[e.Tuple.Destination.Port()] = true, true
		if e.Reason == "NO_SOCKET" && e.Tuple.Protocol == unix.IPPROTO_TCP {
			m.senders[e.Tuple.Source] = true
		}
	}
	delete(m.sockets, 0)
	m.ports[0] = false
	return m
}

// dropped are the sockets of the beginning, and of those at the end that were not kept then
// what they had dropped already.
func (b *beginning) dropped(now []cause.Socket) []cause.Socket {
	all := slices.Clone(b.Sockets)
	kept := map[uint64]bool{}
	for i := range all {
		kept[all[i].Cookie] = true
	}
	for i := range now {
		if drops := b.drops[now[i].Cookie]; drops > 0 && !kept[now[i].Cookie] {
			all = append(all, cause.Socket{Protocol: now[i].Protocol, State: now[i].State, Cookie: now[i].Cookie, Drops: drops})
		}
	}
	return all
}
