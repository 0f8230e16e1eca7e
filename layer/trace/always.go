package trace

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
)

// alwaysExamples is how many examples of each kind each processor keeps in a second, where
// they are kept all the time. Of those the last 16 of each kind are there.
const alwaysExamples = 4

// alwaysMaps are used where it is watched all the time, pinnedMaps stay with the programs
// of the layer.
var (
	alwaysMaps = []string{traceMapRecent, traceMapShares, traceMapFlows, traceMapServers}
	pinnedMaps = []string{traceMapEvents, traceMapTotals, traceMapRecent, traceMapTurns, traceMapShares, traceMapFlows, traceMapEnded, traceMapStorms}
)

// Share is how many packets died in a namespace of a reason.
type Share struct {
	Space  uint32 // its inode
	Reason string
	Count  uint64
}

// Flow adds up the TCP connections of a client with a port of a server that have ended, as
// one of the two ends has seen them.
type Flow struct {
	Space  uint32 // inode of the namespace of that end
	Client netip.Addr
	Server netip.AddrPort
	// OfClient says that the client's end is the one.
	OfClient bool
	// Ended are all; Refused those that met a port where nobody listens, Unanswered those
	// that got no answer to their first packet or none any more, Reset those that the
	// other end broke off.
	Ended, Refused, Unanswered, Reset uint64
	// Sent are bytes that the other end acknowledged, Received those from it. As the kernel
	// counts, the ends of what is said are one more each.
	Sent, Received uint64
	Retransmits    uint64
	// Longest is the longest smoothed round-trip time of one at its end.
	Longest time.Duration
	// Last is when the last one ended, from the start of the machine.
	Last time.Duration
}

// readAlways reads what is kept where it is watched all the time; kept are the
// examples, the newest first.
func (s *Session) readAlways(r *Recording) (kept []*sample, err error) {
	if kept, err = s.readRecent(); err != nil {
		return nil, err
	}
	for _, one := range slices.Backward(kept) {
		s.examples[one.Key] = one // the newest
	}
	return kept, errors.Join(s.readShares(r), s.readFlows(r))
}

func (s *Session) readRecent() (kept []*sample, err error) {
	from := s.collection.Maps[traceMapRecent]
	for slot := range from.MaxEntries() {
		one := &sample{}
		if err := from.Lookup(slot, &one.traceExample); err != nil {
			return nil, fmt.Errorf("read examples: %w", err)
		}
		if one.When > 0 {
			kept = append(kept, one)
		}
	}
	slices.SortFunc(kept, func(a, b *sample) int { return cmp.Compare(b.When, a.When) })
	return kept, nil
}

// tally is an example as an event that was counted once.
func (e *sample) tally() *tally {
	t := &tally{key: e.Key}
	t.Count, t.First, t.Last = 1, e.When, e.When
	t.Socket, t.Longest, t.SourcePort, t.DestinationPort, t.Device = e.Socket, e.Length, e.SourcePort, e.DestinationPort, e.Device
	return t
}

func (s *Session) readShares(r *Recording) error {
	var key traceShareKey
	var counts []uint64
	shares := map[traceShareKey]int{} // places in r.Shares
	entries := s.collection.Maps[traceMapShares].Iterate()
	for entries.Next(&key, &counts) {
		shares[key] = len(r.Shares)
		r.Shares = append(r.Shares, Share{key.Netns, s.reason(uint8(traceKindKIND_DROP), key.Reason), sumOf(counts)})
	}
	if err := entries.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read drops by namespace: %w", err)
	}
	if err := s.addStormShares(r, shares); err != nil {
		return err
	}
	s.reachedMu.Lock()
	reached := make(map[traceShareKey]uint64, len(shares))
	for key, at := range shares {
		r.Shares[at].Count = max(r.Shares[at].Count, s.reachedShares[key])
		reached[key] = r.Shares[at].Count
	}
	s.reachedShares = reached
	s.reachedMu.Unlock()
	slices.SortFunc(r.Shares, func(a, b Share) int {
		return cmp.Or(cmp.Compare(a.Space, b.Space), cmp.Compare(a.Reason, b.Reason))
	})
	return nil
}

// addStormShares adds what is not in the table yet.
func (s *Session) addStormShares(r *Recording, shares map[traceShareKey]int) error {
	storms, err := s.readStorms()
	if err != nil {
		return err
	}
	for _, storm := range storms {
		key := traceShareKey{Netns: storm.Key.Netns, Reason: storm.Key.Reason}
		at, known := shares[key]
		if storm.Key.Location == 0 || !known {
			continue
		}
		count, err := s.whileStill(func() (counts []uint64, err error) {
			err = s.collection.Maps[traceMapShares].Lookup(key, &counts)
			return counts, err
		}, func(of *traceEventKey) bool { return of.Netns == key.Netns && of.Reason == key.Reason })
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read drops by namespace: %w", err)
		}
		r.Shares[at].Count = max(r.Shares[at].Count, count)
	}
	return nil
}

func (s *Session) readFlows(r *Recording) error {
	var key traceFlowKey
	var f traceFlow
	var known uint64
	entries := s.collection.Maps[traceMapFlows].Iterate()
	for entries.Next(&key, &f) {
		known += f.Ended[traceEndingENDING_ANY]
		r.Flows = append(r.Flows, Flow{
			Space: key.Netns, Client: address(key.Client.Word, true), OfClient: key.OfClient != 0,
			Server: netip.AddrPortFrom(address(key.Server.Word, true), swap(key.Port)),
			Ended:  f.Ended[traceEndingENDING_ANY], Refused: f.Ended[traceEndingENDING_REFUSED],
			Unanswered: f.Ended[traceEndingENDING_UNANSWERED], Reset: f.Ended[traceEndingENDING_RESET],
			Sent: f.Sent, Received: f.Received, Retransmits: f.Retransmits,
			Longest: time.Duration(f.LongestRtt) * time.Microsecond, Last: time.Duration(f.Last),
		})
	}
	if err := entries.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read flows: %w", err)
	}
	endings, err := s.readEndings()
	if err != nil {
		return err
	}
	r.FlowsLost = endings[traceEndingENDING_ANY] - min(endings[traceEndingENDING_ANY], known)
	return nil
}

// endingWords are what the ways in which connections end are called in metrics.
var endingWords = [traceEndingENDINGS]string{"connection ended", "connection refused", "connection unanswered", "connection reset"}

// readEndings reads how connections have ended; none is ever lost.
func (s *Session) readEndings() (counts [traceEndingENDINGS]uint64, err error) {
	for how := range counts {
		if err := s.collection.Maps[traceMapEnded].Lookup(uint32(how), &counts[how]); err != nil {
			return counts, fmt.Errorf("read how connections ended: %w", err)
		}
	}
	return counts, nil
}
