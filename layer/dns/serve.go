package dns

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// Query is what a pod asks the DNS Service, and the kernel has no answer to.
type Query struct {
	// Device is the node's end of the pod's veth, by its index.
	Device int
	// From is the pod's address and port.
	From netip.AddrPort
	// Message is the query as it came (RFC 1035, 4): one question, of any type, and at
	// most one additional record, which nobody has read yet. It has at most 354 bytes.
	Message []byte
}

const (
	// mostPatience is how long a query may wait. Clients ask again after 5 s
	// (resolv.conf(5), timeout), and then ask the DNS Service.
	mostPatience = 4 * time.Second
	// sweepEvery is how often what waits is looked through for what nobody was called for.
	sweepEvery = time.Second
	// mostPause is between two tries to give what the kernel does not take now: the queue
	// of packets that came to a processor is full for milliseconds (net.core.netdev_max_backlog,
	// https://docs.kernel.org/admin-guide/sysctl/net.html), a device may be down for long.
	mostPause = 250 * time.Millisecond
	// seenAfter is how long what was given back is left in the processors' queues before the
	// program at its device goes, which takes off the mark that it bears.
	seenAfter = 100 * time.Millisecond
	// paceKept is how long the pace of a device is kept after its last query.
	paceKept = time.Minute
	// mostResting is how many goroutines wait for queries.
	mostResting = 64
)

// Serve answers the queries that the kernel hands up, those of an earlier process first,
// until the context ends. answer is called for each in a goroutine of its own, at most
// 4,096 at once, 64 of a device; it returns a message that replies to the query, or false,
// and has to return when its context ends. A query without a reply goes on to the DNS
// Service as it came, from the pod, and so do all when Serve ends; what replies to another
// question is none. A reply that is longer than the client takes is cut, with TC.
//
// The layer has to be open, and remains so until Serve has returned. While it runs, and
// beats come, queries are taken, at most 2,000 a second of a device and 20,000 of all. It
// needs CAP_BPF and CAP_NET_ADMIN, and no raw socket. Errors name what could not be begun:
// then no query is taken.
func (l *Layer) Serve(ctx context.Context, answer func(ctx context.Context, q Query) (reply []byte, ok bool)) error {
	l.mu.Lock()
	if l.host == nil || l.serving {
		l.mu.Unlock()
		return errors.New("serve queries: the dns layer is not open, or serves already")
	}
	s, err := l.host.server()
	l.serving = err == nil
	l.mu.Unlock()
	if err != nil {
		return fmt.Errorf("serve queries: %w", err)
	}
	defer func() {
		s.close()
		l.mu.Lock()
		l.serving = false
		l.mu.Unlock()
	}()
	s.answer = answer
	return s.run(ctx)
}

// server is the agent's side of what the kernel hands up.
type server struct {
	netns    string
	patience time.Duration
	answer   func(context.Context, Query) ([]byte, bool)
	waiting  *ebpf.Map
	paces    *ebpf.Map
	agents   *ebpf.Map
	giveBack *ebpf.Program
	calls    *ringbuf.Reader
	closers  []func() error

	handlers sync.WaitGroup
	resting  atomic.Int64      // how many of them have nothing to do, ...
	next     chan datapathSeat // ... and wait here

	mu sync.Mutex // guards what follows
	// inHand are the seats whose queries are being answered; true: called again.
	inHand map[datapathSeat]bool
}

// server implements host. What it uses is its own, so that the datapath may be closed.
func (d *datapath) server() (_ *server, err error) {
	s := newServer(d.settings)
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	own := map[string]*ebpf.Map{}
	for _, name := range []string{datapathMapWaiting, datapathMapPaces, datapathMapAgents, datapathMapCalls} {
		if own[name], err = d.Maps[name].Clone(); err != nil {
			return nil, fmt.Errorf("open map %s: %w", name, err)
		}
		s.closers = append(s.closers, own[name].Close)
	}
	if s.giveBack, err = d.Programs[datapathProgDnsGiveBack].Clone(); err != nil {
		return nil, fmt.Errorf("open program %s: %w", datapathProgDnsGiveBack, err)
	}
	s.closers = append(s.closers, s.giveBack.Close)
	if s.calls, err = ringbuf.NewReader(own[datapathMapCalls]); err != nil {
		return nil, fmt.Errorf("read ring %s: %w", datapathMapCalls, err)
	}
	s.closers = append(s.closers, s.calls.Close)
	s.agents, s.waiting, s.paces = own[datapathMapAgents], own[datapathMapWaiting], own[datapathMapPaces]
	return s, nil
}

// giveAllBack gives back what waits for an agent that was killed. What cannot be given
// back its clients ask again.
func giveAllBack(settings Settings) {
	waiting, err := ebpf.LoadPinnedMap(filepath.Join(settings.Pins, datapathMapWaiting), nil)
	if err != nil {
		return
	}
	defer waiting.Close()
	spec, err := loadDatapath()
	if err != nil || spec.Maps[datapathMapWaiting].Compatible(waiting) != nil || len(keys[datapathSeat](waiting)) == 0 {
		return
	}
	var programs struct {
		GiveBack *ebpf.Program `ebpf:"dns_give_back"`
	}
	if spec.LoadAndAssign(&programs, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{datapathMapWaiting: waiting}}) != nil {
		return
	}
	defer programs.GiveBack.Close()
	s := newServer(settings)
	s.waiting, s.giveBack = waiting, programs.GiveBack
	s.answer = func(context.Context, Query) ([]byte, bool) { return nil, false }
	ended, end := context.WithCancel(context.Background())
	end()
	s.sweep(ended)
	s.handlers.Wait()
	time.Sleep(seenAfter)
}

func newServer(settings Settings) *server {
	return &server{netns: settings.Netns, patience: cmp.Or(settings.patience, mostPatience), inHand: map[datapathSeat]bool{}, next: make(chan datapathSeat)}
}

func (s *server) close() {
	for _, closes := range s.closers {
		_ = closes()
	}
}

// run serves until the context ends, and then until everything is given back.
func (s *server) run(ctx context.Context) error {
	leave, err := s.attend()
	if err != nil {
		return err
	}
	ctx, end := context.WithCancel(ctx)
	defer context.AfterFunc(ctx, func() {
		leave() // nothing is taken any more
		_ = s.calls.Flush()
	})()
	var sweeping sync.WaitGroup
	sweeping.Go(func() { s.sweeps(ctx) })
	err = s.listen(ctx)
	end()
	leave()
	sweeping.Wait()
	s.sweep(ctx)
	s.handlers.Wait()
	return err
}

// listen begins what it is called for.
func (s *server) listen(ctx context.Context) error {
	var record ringbuf.Record
	for {
		err := s.calls.ReadInto(&record)
		if errors.Is(err, ringbuf.ErrFlushed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("serve queries: read ring %s: %w", datapathMapCalls, err)
		}
		if seat, ok := readSeat(record.RawSample); ok {
			s.begin(ctx, seat)
		}
	}
}

// attend tells the kernel that somebody is there, until leave is called or the process
// ends: the kernel takes a socket that is closed out of the map.
func (s *server) attend() (leave func(), err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("serve queries: open a socket: %w", err)
	}
	leave = sync.OnceFunc(func() { unix.Close(fd) })
	if err := s.agents.Put(uint32(0), uint64(fd)); err != nil {
		leave()
		return nil, fmt.Errorf("serve queries: put a socket into map %s, which takes Linux 5.15: %w", datapathMapAgents, err)
	}
	return leave, nil
}

func readSeat(record []byte) (seat datapathSeat, ok bool) {
	if len(record) < 8 {
		return seat, false
	}
	return datapathSeat{Device: binary.NativeEndian.Uint32(record), Number: binary.NativeEndian.Uint32(record[4:])}, true
}

// sweeps looks through what waits now and then: for what an earlier process left, at once,
// and for what nobody was called for.
func (s *server) sweeps(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		s.sweep(ctx)
		if n%int(paceKept/sweepEvery) == 0 {
			s.forgetPaces()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *server) sweep(ctx context.Context) {
	for _, seat := range keys[datapathSeat](s.waiting) {
		s.begin(ctx, seat)
	}
}

// keys are those of a map whose entries come and go meanwhile: some may be missed.
func keys[K any](of *ebpf.Map) (found []K) {
	var last any
	for range of.MaxEntries() {
		var key K
		if of.NextKey(last, &key) != nil {
			break
		}
		found, last = append(found, key), key
	}
	return found
}

// forgetPaces forgets the paces of devices of which no query was taken for long: they are
// as those that are not known.
func (s *server) forgetPaces() {
	now, err := sinceBoot()
	if err != nil {
		return
	}
	for _, device := range keys[uint32](s.paces) {
		var due uint64
		if s.paces.Lookup(device, &due) == nil && now > due+uint64(paceKept) {
			_ = s.paces.Delete(device)
		}
	}
}

// begin answers the query of a seat, once, in a goroutine that rests or a new one.
func (s *server) begin(ctx context.Context, seat datapathSeat) {
	s.mu.Lock()
	_, busy := s.inHand[seat]
	s.inHand[seat] = busy
	s.mu.Unlock()
	if busy {
		return
	}
	select {
	case s.next <- seat:
	default:
		s.handlers.Go(func() { s.handle(ctx, seat) })
	}
}

// handle answers the query of a seat, and then others: a new goroutine would have to find
// out anew how much stack that takes.
func (s *server) handle(ctx context.Context, seat datapathSeat) {
	for {
		for again := true; again; again = s.done(seat) {
			s.serve(ctx, seat)
		}
		if s.resting.Add(1) > mostResting {
			s.resting.Add(-1)
			return
		}
		select {
		case seat = <-s.next:
			s.resting.Add(-1)
		case <-ctx.Done():
			return
		}
	}
}

// done says whether the query of a seat was called for again meanwhile: another one.
func (s *server) done(seat datapathSeat) (again bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if again = s.inHand[seat]; again {
		s.inHand[seat] = false
	} else {
		delete(s.inHand, seat)
	}
	return again
}

// serve answers the query of a seat, or gives it back.
func (s *server) serve(ctx context.Context, seat datapathSeat) {
	var waiting datapathHanded
	if s.waiting.Lookup(seat, &waiting) != nil {
		return // answered already
	}
	now, err := sinceBoot()
	f, broken := readFrame(waiting.Frame[:min(int(waiting.Length), len(waiting.Frame))])
	age := time.Duration(now - waiting.Since)
	if err != nil || broken != nil || age > s.patience {
		s.forget(seat) // the client has asked again
		return
	}
	ctx, done := context.WithTimeout(ctx, s.patience-age)
	defer done()
	reply, ok := s.answer(ctx, Query{Device: int(seat.Device), From: f.from(), Message: f.message()})
	var answer []byte
	if ok {
		answer = f.answer(reply)
	}
	s.insist(seat, waiting.Since, f, answer)
}

// insist gives an answer, or the query where there is none, to the device of a query that
// waits. Where that cannot be done now it tries again, until the client has asked again.
func (s *server) insist(seat datapathSeat, since uint64, f frame, answer []byte) {
	for pause := time.Millisecond; ; pause = min(2*pause, mostPause) {
		bytes := answer
		if answer == nil {
			bytes = f.again()
		}
		given, err := s.give(seat, since, bytes, answer != nil)
		if err != nil {
			answer = nil
		} else if given == datapathGivenGIVEN || given == datapathGivenGIVEN_TO_NONE {
			return
		}
		now, wrong := sinceBoot()
		if given == datapathGivenGIVEN_NOWHERE || wrong != nil || time.Duration(now-since)+pause > s.patience {
			s.forget(seat)
			return
		}
		time.Sleep(pause)
	}
}

// give gives a frame to the device of a query that waits, once. Errors say that this could
// not be tried.
func (s *server) give(seat datapathSeat, since uint64, frame []byte, answer bool) (datapathGiven, error) {
	// The beginning of struct __sk_buff (linux/bpf.h); cb is from the thirteenth word on.
	var skb [17]uint32
	cb := skb[12:]
	cb[0], cb[1], cb[2], cb[3] = seat.Device, seat.Number, uint32(since), uint32(since>>32)
	if answer {
		cb[4] = 1
	}
	var given uint32
	err := netns.In(s.netns, func() (err error) {
		given, err = s.giveBack.Run(&ebpf.RunOptions{Data: frame, Context: skb})
		return err
	})
	if err != nil {
		return datapathGivenGIVEN_FAILED, err
	}
	return datapathGiven(given), nil
}

func (s *server) forget(seat datapathSeat) { _ = s.waiting.Delete(seat) }
