package trace

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/symbol"
	"github.com/millrace/millrace/layer/trace/cause"
)

// sample is an example as it came, with the packet's bytes behind it.
type sample struct {
	traceExample
	behind []byte
}

// readExamples keeps the first example of each kind of event.
func (s *Session) readExamples() {
	for {
		record, err := s.reader.Read()
		if err != nil {
			return
		}
		one := readSample(record.RawSample)
		s.arrived(record.LostSamples, one != nil)
		if one == nil {
			continue
		}
		s.tell(one.Key)
		if s.packets != nil && one.Asked != 0 && traceKind(one.Key.Kind) == traceKindKIND_DROP {
			s.packets(s.packetOf(one))
		}
		s.keep(one)
	}
}

// tell says that something happens in a namespace, once for each kind of it.
func (s *Session) tell(kind traceEventKey) {
	if s.met != nil && !s.told[kind] && len(s.told) < mostMet {
		s.told[kind] = true
		s.met(kind.Netns, kind.Cookie)
	}
}

// readSample reads an example as it came; nil if it is cut off.
func readSample(raw []byte) *sample {
	if len(raw) < int(unsafe.Sizeof(traceExample{})) {
		return nil
	}
	one := &sample{}
	read, err := binary.Decode(raw, binary.NativeEndian, &one.traceExample)
	if err != nil {
		return nil
	}
	one.behind = raw[read:]
	one.behind = one.behind[:min(uint64(len(one.behind)), uint64(one.Captured))]
	return one
}

// arrived counts what came, and what was lost before it.
func (s *Session) arrived(lost uint64, one bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unread += lost
	if one {
		s.received++
	}
}

func (s *Session) keep(one *sample) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.examples[one.Key] == nil && len(s.examples) < mostExamples {
		one.behind = bytes.Clone(one.behind)
		s.examples[one.Key] = one
	}
}

// tally is a kind of event with its count.
type tally struct {
	key traceEventKey
	traceEvent
}

// record makes of what the kernel has counted, and of the examples, a Recording.
func (s *Session) record() (*Recording, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &Recording{Missing: s.missing, Received: s.received}
	all, err := s.readCounts()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.readTotals(r, all), s.readHops(r)); err != nil {
		return nil, err
	}
	slices.SortFunc(all, func(a, b tally) int { return cmp.Or(cmp.Compare(a.First, b.First), cmp.Compare(b.Count, a.Count)) })
	var kept []*sample
	if s.always {
		kept, err = s.readAlways(r)
		if err != nil {
			return nil, err
		}
	}
	names, err := symbol.Names(s.addresses(all, kept))
	if err != nil {
		r.Missing = append(r.Missing, err.Error())
	}
	for i := range all {
		if e, ok := s.event(&all[i], s.examples[all[i].key], names); ok {
			r.Events = append(r.Events, e)
		}
	}
	for _, one := range kept {
		if e, ok := s.event(one.tally(), one, names); ok {
			r.Examples = append(r.Examples, e)
		}
	}
	return r, nil
}

// readCounts reads the events of all processors. No count is lower than it was before: what
// waits on a processor may be put into the tables after those were read, and then it is in
// neither.
func (s *Session) readCounts() (all []tally, err error) {
	beside := math.MaxInt // where the events of the second table begin
	for _, name := range []string{traceMapEvents, traceMapBeside} {
		if from := s.collection.Maps[name]; from != nil {
			if name == traceMapBeside {
				beside = len(all)
			}
			if all, err = readTable(from, all); err != nil {
				return nil, err
			}
		}
	}
	if all, err = s.addStorms(all); err != nil {
		return nil, err
	}
	s.reachedMu.Lock()
	defer s.reachedMu.Unlock()
	reached := make(map[place]uint64, len(all))
	for i := range all {
		at := place{all[i].key, i >= beside}
		all[i].Count = max(all[i].Count, s.reached[at])
		reached[at] = all[i].Count
	}
	s.reached = reached
	return all, nil
}

// place is an event in one of the two tables.
type place struct {
	key    traceEventKey
	beside bool
}

// addStorms adds to the events what is not in the tables yet.
func (s *Session) addStorms(all []tally) ([]tally, error) {
	storms, err := s.readStorms()
	if err != nil {
		return nil, err
	}
	done := map[traceEventKey]bool{}
	for _, storm := range storms {
		if storm.Key.Location == 0 || done[storm.Key] {
			continue
		}
		done[storm.Key] = true
		at := slices.IndexFunc(all, func(t tally) bool { return t.key == storm.Key })
		if at < 0 {
			continue // it was pushed out: the totals have it
		}
		count, err := s.whileStill(func() (counts []uint64, err error) {
			var values []traceEvent
			err = s.collection.Maps[traceMapEvents].Lookup(storm.Key, &values)
			for _, v := range values {
				counts = append(counts, v.Count)
			}
			return counts, err
		}, func(key *traceEventKey) bool { return *key == storm.Key })
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read events: %w", err)
		}
		all[at].Count = max(all[at].Count, count)
	}
	return all, nil
}

// stillTries is how often it is tried to read a table between two moments at which a
// storm is put there: each 64 packets of it, on each processor by itself.
const stillTries = 16

// whileStill sums up a table's counts of all processors, with what of these keys waits to
// be put there: of each processor never twice, and not at all only where a storm is put
// there all the time.
func (s *Session) whileStill(read func() ([]uint64, error), of func(*traceEventKey) bool) (uint64, error) {
	var whole []uint64
	done := map[int]bool{} // processors
	for try := 0; try == 0 || try < stillTries && len(done) < len(whole); try++ {
		before, err := s.readStorms()
		if err != nil {
			return 0, err
		}
		counts, err := read()
		if err != nil {
			return 0, err
		}
		after, err := s.readStorms()
		if err != nil {
			return 0, err
		}
		if whole == nil {
			whole = make([]uint64, len(counts))
		}
		for i, count := range counts {
			if done[i] {
				continue
			}
			if before[i].Turns == after[i].Turns && after[i].Turns%2 == 0 {
				done[i] = true
			}
			whole[i] = count
			if of(&after[i].Key) {
				whole[i] += after[i].Count
			}
		}
	}
	return sumOf(whole), nil
}

// readStorms reads what each processor has met again and again.
func (s *Session) readStorms() (storms []traceStorm, err error) {
	if err := s.collection.Maps[traceMapStorms].Lookup(uint32(0), &storms); err != nil {
		return nil, fmt.Errorf("read storms: %w", err)
	}
	return storms, nil
}

func readTable(from *ebpf.Map, all []tally) ([]tally, error) {
	var key traceEventKey
	var values []traceEvent
	entries := from.Iterate()
	for entries.Next(&key, &values) {
		sum := tally{key: key}
		for _, v := range values {
			if v.Count == 0 {
				continue
			}
			if sum.Count == 0 || v.First < sum.First {
				count, longest, last := sum.Count, sum.Longest, sum.Last
				sum.traceEvent = v
				sum.Count, sum.Longest, sum.Last = count, max(longest, v.Longest), max(last, v.Last)
			}
			sum.Count += v.Count
			sum.Last, sum.Longest = max(sum.Last, v.Last), max(sum.Longest, v.Longest)
		}
		if sum.Count > 0 {
			all = append(all, sum)
		}
	}
	if err := entries.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, fmt.Errorf("read events: %w", err)
	}
	return all, nil
}

// points are the words of enum point.
var points = map[tracePoint]cause.Point{tracePointPOINT_CAME: cause.Came, tracePointPOINT_QUEUED: cause.Queued, tracePointPOINT_LEFT: cause.Left}

// readHops reads how long packets took on their way.
func (s *Session) readHops(r *Recording) error {
	from := s.collection.Maps[traceMapHops]
	if from == nil {
		return nil // the layer's
	}
	var key traceHopKey
	var h traceHop
	entries := from.Iterate()
	for entries.Next(&key, &h) {
		if h.Count == 0 {
			continue
		}
		r.Hops = append(r.Hops, cause.Passage{
			From:    cause.Spot{Space: key.From.Netns, Index: int(key.From.Ifindex), Point: points[key.From.Point]},
			To:      cause.Spot{Space: key.To.Netns, Index: int(key.To.Ifindex), Point: points[key.To.Point]},
			Packets: h.Count, Mean: time.Duration(h.Total / h.Count), Longest: time.Duration(h.Longest),
		})
	}
	if err := entries.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read times of packets: %w", err)
	}
	slices.SortFunc(r.Hops, func(a, b cause.Passage) int {
		return cmp.Or(cmp.Compare(b.Longest, a.Longest), cmp.Compare(b.Packets, a.Packets))
	})
	return nil
}

// readTotals reads the totals, and finds what of them is not among the events: what
// was pushed out, and what a program did not see because it had been interrupted by
// the same.
func (s *Session) readTotals(r *Recording, all []tally) error {
	totals := s.collection.Maps[traceMapTotals]
	reasons := totals.MaxEntries() / uint32(traceKindKINDS)
	var counts []uint64
	var total, kept uint64
	for slot := range totals.MaxEntries() {
		kind := traceKind(slot / reasons)
		if slot%reasons > 0 && kind != traceKindKIND_DROP && kind != traceKindKIND_RESET {
			continue // of those there is no reason
		}
		if err := totals.Lookup(slot, &counts); err != nil {
			return fmt.Errorf("read totals: %w", err)
		}
		sum := sumOf(counts)
		if sum == 0 {
			continue
		}
		total += sum
		one := Total{Kind: kinds[kind], Reason: s.reason(uint8(kind), slot%reasons), Count: sum}
		if slot%reasons == reasons-1 {
			one.Reason = "others"
		}
		r.Totals = append(r.Totals, one)
	}
	for _, e := range all {
		kept += e.Count
	}
	if total > kept {
		r.Lost = total - kept
	}
	for _, p := range s.collection.Programs {
		if stats, err := p.Stats(); err == nil {
			r.Lost += stats.RecursionMisses
		}
	}
	return nil
}

func sumOf(counts []uint64) (sum uint64) {
	for _, c := range counts {
		sum += c
	}
	return sum
}

// addresses are those that are to be named.
func (s *Session) addresses(all []tally, kept []*sample) (addresses []uint64) {
	for _, one := range kept {
		addresses = append(addresses, one.Key.Location-1)
		for _, address := range one.stack() {
			addresses = append(addresses, address-1)
		}
	}
	for _, e := range all {
		if traceKind(e.key.Kind) == traceKindKIND_DROP {
			addresses = append(addresses, e.key.Location-1) // it is where the call returns to
		}
		if example := s.examples[e.key]; example != nil {
			for _, address := range example.stack() {
				addresses = append(addresses, address-1)
			}
		}
	}
	return addresses
}

func (e *sample) stack() []uint64 {
	if e.StackBytes <= 0 {
		return nil
	}
	return e.Stack[:min(len(e.Stack), int(e.StackBytes)/8)]
}

var kinds = map[traceKind]cause.Kind{
	traceKindKIND_DROP: cause.Drop, traceKindKIND_RESET: cause.ResetSent, traceKindKIND_ICMP: cause.ICMPSent,
	traceKindKIND_RETRANSMIT: cause.Retransmit, traceKindKIND_SOCKET_ERROR: cause.SocketError,
	traceKindKIND_NEIGHBOUR: cause.NeighFailed, traceKindKIND_FULL: cause.ReceiveFull, traceKindKIND_CALL: cause.CallFailed,
	traceKindKIND_CHECKSUM: cause.ChecksumFail, traceKindKIND_STATE: cause.StateChange,
}

// calls are the names of those system calls that are looked at.
var calls = map[uint64]string{
	unix.SYS_CONNECT: "connect", unix.SYS_BIND: "bind", unix.SYS_SENDTO: "sendto", unix.SYS_SENDMSG: "sendmsg",
	unix.SYS_SENDMMSG: "sendmmsg", unix.SYS_WRITE: "write", unix.SYS_WRITEV: "writev",
}

func (s *Session) reason(kind uint8, number uint32) string {
	switch traceKind(kind) {
	case traceKindKIND_DROP:
		return s.reasons.word(s.reasons.drop, number)
	case traceKindKIND_RESET:
		return s.reasons.word(s.reasons.reset, number)
	}
	return ""
}

// event gives an event the form in which it is judged.
func (s *Session) event(c *tally, example *sample, names map[uint64]string) (cause.Event, bool) {
	k := &c.key
	kind, ok := kinds[traceKind(k.Kind)]
	if !ok {
		return cause.Event{}, false
	}
	e := cause.Event{
		Kind: kind, Space: k.Netns, Cookie: k.Cookie, Count: c.Count, First: s.since(c.First), Last: s.since(c.Last),
		Reason: s.reason(k.Kind, k.Reason), Index: int(k.Ifindex), Device: text(c.Device[:]),
		Longest: int(c.Longest), Socket: c.Socket,
	}
	if example != nil {
		e.Length, e.GSO, e.MAC, e.PacketType = int(example.Length), int(example.Gso), example.Mac, int(example.PacketType)
		e.Partial, e.Packet = example.Summed == checksumPartial, example.packet()
		e.PID, e.Command, e.Retransmits = int(example.Pid), text(example.Command[:]), int(example.Retransmits)
	}
	e.Tuple = tuple(c)
	switch kind {
	case cause.Drop:
		e.Location = names[k.Location-1]
		e.Stack = callers(example, k.Location, names)
	case cause.ResetSent, cause.ICMPSent:
		e.Stack = callers(example, 0, names)
		e.Crossed = kind == cause.ResetSent && k.Location != 0
		if kind == cause.ICMPSent {
			e.Type, e.Code = int(k.Reason>>8), int(k.Reason&0xff)
		}
	case cause.Retransmit:
		e.OldState = int(k.Reason)
	case cause.SocketError, cause.ReceiveFull:
		e.Errno = int(k.Reason)
	case cause.CallFailed:
		e.Errno, e.Call = int(k.Reason), calls[k.Location]
	case cause.StateChange:
		e.OldState, e.NewState, e.Errno = int(k.Reason>>8), int(k.Reason&0xff), int(k.Location)
	}
	return e, true
}

const checksumPartial = 3 // CHECKSUM_PARTIAL of linux/skbuff.h

func (s *Session) since(at uint64) time.Duration { return max(0, time.Duration(at)-s.begun) }

const (
	flagsOfTCP     = 0x17 // FIN, SYN, RST and ACK are told apart
	flagIsFragment = 0x80
)

func tuple(c *tally) cause.Tuple {
	k := &c.key
	t := cause.Tuple{Protocol: k.Protocol, EtherType: swap(k.Ethertype), Fragment: k.Flags&flagIsFragment != 0}
	ip6 := t.EtherType == unix.ETH_P_IPV6
	source, destination := address(k.Source.Word, ip6), address(k.Destination.Word, ip6)
	sourcePort, destinationPort := swap(c.SourcePort), swap(c.DestinationPort)
	switch k.Protocol {
	case unix.IPPROTO_TCP:
		switch traceKind(k.Kind) { // the others are of sockets
		case traceKindKIND_DROP, traceKindKIND_RESET, traceKindKIND_ICMP, traceKindKIND_CHECKSUM:
			t.TCPFlags = k.Flags & flagsOfTCP
		}
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		t.ICMPType, t.ICMPCode = uint8(k.Port), uint8(k.Port>>8)
	}
	t.Source, t.Destination = netip.AddrPortFrom(source, sourcePort), netip.AddrPortFrom(destination, destinationPort)
	return t
}

func swap(port uint16) uint16 { return port<<8 | port>>8 }

// address reads one of 16 bytes. Where nothing was read it is the zero one, but for
// IPv6, whose :: is one that packets have.
func address(word [4]uint32, ip6 bool) netip.Addr {
	if word == [4]uint32{} && !ip6 {
		return netip.Addr{}
	}
	return bpfmap.AddrOf(word)
}

func text(chars []int8) string {
	var b []byte
	for _, c := range chars {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return string(b)
}

// packet puts an example's packet together, from its network header on: what stood
// before skb->data, and what came from there on.
func (e *sample) packet() []byte {
	behind, before := e.behind, int(e.Before)
	switch {
	case before < 0 && -before <= len(behind):
		return behind[-before:]
	case before < 0:
		return nil
	case int(e.Headers) < before:
		behind = nil // there is a gap
	}
	return slices.Concat(e.Header[:min(int(e.Headers), len(e.Header))], behind)
}

// callers are the functions that called the one at location, which dropped.
func callers(example *sample, location uint64, names map[uint64]string) (stack []string) {
	if example == nil {
		return nil
	}
	frames := example.stack()
	if at := slices.Index(frames, location); location != 0 && at >= 0 {
		frames = frames[at+1:]
	}
	for _, address := range frames {
		name := names[address-1]
		if name == "" || len(stack) == 0 && isTracing(name) {
			continue
		}
		stack = append(stack, name)
	}
	return stack
}

// isTracing tells the innermost frames of a stack: our program, and what runs it.
func isTracing(function string) bool {
	return strings.HasPrefix(function, "bpf_prog_") || strings.HasPrefix(function, "bpf_trace_run") ||
		strings.HasPrefix(function, "__traceiter_") || strings.HasPrefix(function, "__bpf_trace_")
}

// packetOf is a packet that died, for somebody who wants each.
func (s *Session) packetOf(e *sample) Packet {
	p := Packet{
		At: s.since(e.When), Space: e.Key.Netns, Reason: s.reason(e.Key.Kind, e.Key.Reason), MAC: e.Mac,
		EtherType: swap(e.Key.Ethertype), Data: e.packet(), Length: int(e.Length), Device: text(e.Device[:]),
	}
	c := tally{key: e.Key}
	c.SourcePort, c.DestinationPort = e.SourcePort, e.DestinationPort
	p.Tuple = tuple(&c)
	where, known := s.names[e.Key.Location]
	if !known { // there are few such functions
		names, err := symbol.Names([]uint64{e.Key.Location - 1})
		if err == nil {
			where = names[e.Key.Location-1]
		}
		s.names[e.Key.Location] = where
	}
	p.Location = where
	return p
}
