package fault

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Outcome is what an application saw of one call, connection or question.
type Outcome string

// The outcomes. Timeout is a connection that did not come about, Hang one that came
// about and then stood still, Silent a datagram that was not answered.
const (
	OK          Outcome = "ok"
	Timeout     Outcome = "timeout"
	Hang        Outcome = "hang"
	Silent      Outcome = "silent"
	Refused     Outcome = "ECONNREFUSED"
	Reset       Outcome = "ECONNRESET"
	Unreachable Outcome = "EHOSTUNREACH"
	NoNetwork   Outcome = "ENETUNREACH"
	NotAllowed  Outcome = "EPERM"
	Prohibited  Outcome = "EACCES"
	NoAddress   Outcome = "EADDRNOTAVAIL"
	NoBuffers   Outcome = "ENOBUFS"
	Otherwise   Outcome = "another error"
)

// of says what an error was for the application; without is what it is if time ran out.
func outcomeOf(err error, without Outcome) Outcome {
	var timeout interface{ Timeout() bool }
	for _, row := range []struct {
		errno   error
		outcome Outcome
	}{
		{unix.ECONNREFUSED, Refused}, {unix.ECONNRESET, Reset}, {unix.EPIPE, Reset}, {unix.EHOSTUNREACH, Unreachable},
		{unix.ENETUNREACH, NoNetwork}, {unix.EPERM, NotAllowed}, {unix.EACCES, Prohibited}, {unix.EADDRNOTAVAIL, NoAddress},
		{unix.ENOBUFS, NoBuffers}, {unix.ETIMEDOUT, without}, {context.DeadlineExceeded, without}, {context.Canceled, without},
	} {
		if errors.Is(err, row.errno) {
			return row.outcome
		}
	}
	switch {
	case err == nil:
		return OK
	case errors.As(err, &timeout) && timeout.Timeout():
		return without
	}
	return Otherwise
}

// Part is the piece of a scene that one fault has for itself: a client's address, a
// server's, and a port.
type Part struct {
	*scene
	fault  *Fault
	random *rand.Rand
	// six is the family, listed that nothing is drawn at random that changes what the fault is.
	// udp that its application asks by datagrams, where it may be either.
	six, listed, udp bool
	from, to         netip.Addr
	port             uint16
	// service is an address that the router translates to the server's, if it does.
	service  netip.AddrPort
	attempts int
	// asked tells the server of a control that its client has asked.
	asked chan struct{}
	// worker is the command of WorkerMain; group the one that its process is in.
	worker []string
	group  string

	mu     sync.Mutex
	seen   map[Outcome]int
	errors []string // of what was to be done meanwhile and could not be
	blamed []string // namespaces where the cause may be said to be
	ending []func() // at the end of the run
}

// newPart adds addresses for a fault to the scene.
func (s *scene) newPart(f *Fault, six, listed bool) (*Part, error) {
	random := rand.New(rand.NewPCG(s.random.Uint64(), 3))
	p := &Part{scene: s, fault: f, random: random, six: six, listed: listed, port: uint16(1024 + random.IntN(28000)),
		attempts: 3 + random.IntN(6), seen: map[Outcome]int{}}
	p.udp = p.draw(3) == 2
	near, distant := s.near[p.i()], s.distant[p.i()]
	p.from, p.to = s.host(near), s.host(distant)
	p.blame(s.router)
	return p, errors.Join(
		s.client.addr(s.client.device, netip.PrefixFrom(p.from, near.Bits())),
		s.server.addr(s.server.device, netip.PrefixFrom(p.to, distant.Bits())))
}

// i is the index of the family in what a scene has for both.
func (p *Part) i() int {
	if p.six {
		return 1
	}
	return 0
}

// draw chooses one of n ways; of a fault as it is listed it is always the first.
func (p *Part) draw(n int) int {
	if p.listed {
		return 0
	}
	return p.random.IntN(n)
}

// blame says in which namespaces the cause is; one of them is enough.
func (p *Part) blame(at ...*space) {
	p.blamed = p.blamed[:0]
	for _, s := range at {
		p.blamed = append(p.blamed, s.name)
	}
}

// protocol is that of the part's application.
func (p *Part) protocol() string {
	if p.udp {
		return "udp"
	}
	return "tcp"
}

func (p *Part) saw(o Outcome) {
	p.mu.Lock()
	p.seen[o]++
	p.mu.Unlock()
}

// wrong notes what could not be done during the run.
func (p *Part) wrong(err error) {
	if err == nil {
		return
	}
	p.mu.Lock()
	p.errors = append(p.errors, err.Error())
	p.mu.Unlock()
}

// atEnd calls f when the run is over.
func (p *Part) atEnd(f func()) {
	p.mu.Lock()
	p.ending = append(p.ending, f)
	p.mu.Unlock()
}

func (p *Part) end() {
	p.mu.Lock()
	all := p.ending
	p.ending = nil
	p.mu.Unlock()
	for _, f := range slices.Backward(all) {
		f()
	}
}

// outcomes says what was seen: "ok 3, timeout 2".
func (p *Part) outcomes() (text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range slices.Sorted(maps.Keys(p.seen)) {
		if text != "" {
			text += ", "
		}
		text += fmt.Sprintf("%s %d", o, p.seen[o])
	}
	if text == "" {
		return "nothing"
	}
	return text
}

// check says why the fault did not take, if it did not.
func (p *Part) check() error {
	p.mu.Lock()
	wrong, took := p.errors, len(p.fault.Seen) == 0
	for _, o := range p.fault.Seen {
		took = took || p.seen[o] > 0
	}
	p.mu.Unlock()
	switch {
	case len(wrong) > 0:
		return fmt.Errorf("%s: %s", p.fault.Name, wrong[0])
	case !took:
		return fmt.Errorf("%s: the application saw %s, and should have seen %v", p.fault.Name, p.outcomes(), p.fault.Seen)
	case p.fault.took != nil:
		if err := p.fault.took(p); err != nil {
			return fmt.Errorf("%s: %w", p.fault.Name, err)
		}
	}
	return nil
}

func (p *Part) target() string { return netip.AddrPortFrom(p.to, p.port).String() }

// local is a port of the server's.
func (p *Part) local(port uint16) netip.AddrPort { return netip.AddrPortFrom(p.to, port) }

// every calls f n times, some at once, a tenth of a second between two starts, and
// waits for all.
func every(ctx context.Context, n int, between time.Duration, f func()) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(f)
		if i < n-1 && !rest(ctx, between) {
			break
		}
	}
	all.Wait()
}

// rest waits, and says whether ctx goes on.
func rest(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
