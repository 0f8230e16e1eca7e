package fault

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"
)

// Kind is why a run is made.
type Kind string

// The kinds: a fault as it is listed, one drawn at random, and a healthy run.
const (
	Listed  Kind = "as listed"
	Drawn   Kind = "randomised"
	Healthy Kind = "controls"
)

// Case is one run: what is induced, and the number that everything drawn at random
// comes from.
type Case struct {
	Kind   Kind
	Seed   uint64
	Faults []*Fault
	// Six says of each whether it is IPv6.
	Six []bool
	// apart gives each fault a scene of its own; farther puts another router in each.
	apart, farther bool
	// early sends before anybody watches, and again and again until the end.
	early bool
}

// Name is what a person calls the run: "blackhole-route/6 + xdp-drop".
func (c Case) Name() string {
	var names []string
	for i, f := range c.Faults {
		name := f.Name
		if c.Six[i] {
			name += "/6"
		}
		names = append(names, name)
	}
	return strings.Join(names, " + ")
}

// Window is how long the run takes to show what it is about, for those who wait for the
// shortest time given.
func (c Case) Window(shortest time.Duration) time.Duration {
	for _, f := range c.Faults {
		shortest = max(shortest, f.window)
	}
	return shortest
}

// Of is a fault as it is listed, by IPv4 unless six.
func Of(f *Fault, six bool, seed uint64) Case {
	kind := Listed
	if f.Control() {
		kind = Healthy
	}
	return Case{Kind: kind, Seed: seed, Faults: []*Fault{f}, Six: []bool{six || f.families == onlySix}}
}

// AsListed are the faults that were measured, once each.
func AsListed() (cases []Case) {
	for i, f := range All() {
		if f.Number != "" && !f.Control() {
			cases = append(cases, Of(f, false, uint64(i)))
		}
	}
	return cases
}

// Variants are those that were not measured, and all by IPv6 that can be.
func Variants() (cases []Case) {
	for i, f := range All() {
		switch {
		case f.Control():
		case f.Number == "":
			cases = append(cases, Of(f, false, uint64(1000+i)))
			fallthrough
		case f.families == both:
			cases = append(cases, Of(f, true, uint64(2000+i)))
		}
	}
	for i := range cases {
		cases[i].Kind = Drawn
	}
	return slices.DeleteFunc(cases, func(c Case) bool { return c.Six[0] && c.Faults[0].families == onlyFour })
}

// Controls are the healthy runs, by both families.
func Controls() (cases []Case) {
	for i, f := range controls {
		cases = append(cases, Of(f, false, uint64(3000+i)))
		if f.families == both {
			cases = append(cases, Of(f, true, uint64(4000+i)))
		}
	}
	return cases
}

// Random draws n runs: each fault about as often as any other, one of five runs with two.
func Random(seed uint64, n int) (cases []Case) {
	random := rand.New(rand.NewPCG(seed, 1))
	var deck []*Fault
	next := func() *Fault {
		if len(deck) == 0 {
			for _, f := range All() {
				if !f.Control() {
					deck = append(deck, f)
				}
			}
			random.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		f := deck[0]
		deck = deck[1:]
		return f
	}
	for i := range n {
		c := Case{Kind: Drawn, Seed: seed*1_000_003 + uint64(i)}
		c.take(random, next())
		if i%5 == 4 {
			second := next()
			for second == c.Faults[0] {
				second = next()
			}
			c.take(random, second)
			// What meets more than its own traffic would hide the other; a scene has one shape.
			a, b := c.Faults[0], c.Faults[1]
			c.apart = a.whole || b.whole || a.shape != b.shape || random.IntN(2) == 0
		}
		c.farther, c.early = random.IntN(3) == 0, random.IntN(3) == 0
		cases = append(cases, c)
	}
	return cases
}

func (c *Case) take(random *rand.Rand, f *Fault) {
	c.Faults = append(c.Faults, f)
	c.Six = append(c.Six, f.families == onlySix || f.families == both && random.IntN(3) == 0)
}

// Stage is a run that is ready: its namespaces are there, and what is wrong is wrong.
type Stage struct {
	Case
	scenes  []*scene
	parts   []*Part
	healthy []*healthy
	order   []string
}

// ErrNotRun says that a fault's program is not installed.
var ErrNotRun = errors.New("not run")

// Open makes the namespaces, starts healthy traffic and induces the faults. worker is
// the command of WorkerMain. Close the stage, whatever happens.
func (c Case) Open(ctx context.Context, worker []string) (*Stage, error) {
	for _, f := range c.Faults {
		if missing := f.Missing(); len(missing) > 0 {
			return nil, fmt.Errorf("%w: %s needs %s", ErrNotRun, f.Name, strings.Join(missing, " and "))
		}
	}
	s := &Stage{Case: c}
	if err := s.open(ctx, worker); err != nil {
		return nil, errors.Join(fmt.Errorf("induce %s: %w", c.Name(), err), s.Close())
	}
	return s, nil
}

func (s *Stage) open(ctx context.Context, worker []string) error {
	random := rand.New(rand.NewPCG(s.Seed, 2))
	listed := s.Kind != Drawn
	for i, f := range s.Faults {
		if i == 0 || s.apart {
			shape := f.shape
			shape.farther = s.farther && !shape.bridged
			made, err := newScene(random, shape)
			if err != nil {
				return err
			}
			s.scenes = append(s.scenes, made)
		}
		p, err := s.scenes[len(s.scenes)-1].newPart(f, s.Six[i], listed)
		if err != nil {
			return err
		}
		p.worker = worker
		s.parts = append(s.parts, p)
	}
	for _, made := range s.scenes {
		if err := s.enliven(ctx, made, random); err != nil {
			return err
		}
		for _, at := range made.spaces() {
			s.order = append(s.order, at.name)
		}
	}
	for _, p := range s.parts {
		if err := p.fault.induce(p); err != nil {
			return err
		}
		if p.fault.behind && s.Kind == Drawn && p.random.IntN(4) == 0 {
			if err := p.translate(); err != nil {
				return err
			}
		}
	}
	random.Shuffle(len(s.order), func(i, j int) { s.order[i], s.order[j] = s.order[j], s.order[i] })
	return nil
}

// enliven starts healthy traffic in a scene, unless the fault is run as it is listed.
func (s *Stage) enliven(ctx context.Context, made *scene, random *rand.Rand) error {
	if s.Kind == Listed || slices.ContainsFunc(s.Faults, func(f *Fault) bool { return f.alone }) {
		return nil
	}
	for _, six := range []bool{false, true} {
		h, err := made.background(ctx, six, random.IntN(2) == 0)
		if err != nil {
			return err
		}
		s.healthy = append(s.healthy, h)
	}
	return nil
}

// Namespaces are the names of those that take part, in no order that says anything.
func (s *Stage) Namespaces() []string { return slices.Clone(s.order) }

// Send sends what meets the faults, and returns when all has been sent and waited for,
// or ctx ended. What is open then stays so until Close.
func (s *Stage) Send(ctx context.Context) {
	var all sync.WaitGroup
	for _, p := range s.parts {
		all.Go(func() {
			p.fault.send(ctx, p)
			for s.early && !p.fault.once && rest(ctx, 300*time.Millisecond) {
				p.fault.send(ctx, p)
			}
		})
	}
	all.Wait()
}

// Check says which fault did not take, if one did not: its application saw something
// else. Ask after Send.
func (s *Stage) Check() error {
	var all error
	for _, p := range s.parts {
		all = errors.Join(all, p.check())
	}
	return all
}

// Outcomes says what the applications saw.
func (s *Stage) Outcomes() string {
	var texts []string
	for _, p := range s.parts {
		texts = append(texts, p.outcomes())
	}
	return strings.Join(texts, " | ")
}

// Close ends the traffic and removes everything.
func (s *Stage) Close() error {
	for _, p := range s.parts {
		p.end()
	}
	for _, h := range s.healthy {
		h.end()
	}
	var all error
	for _, made := range slices.Backward(s.scenes) {
		all = errors.Join(all, made.close())
	}
	return all
}

// Named is a cause that somebody gave, and where.
type Named struct {
	Cause      string `json:"cause"`
	Namespace  string `json:"namespace"`
	Confidence string `json:"confidence"`
}

// Judge compares what was named with what was induced: missed are the faults that
// nobody named in a namespace where they are, wrong is what was named and is not there.
func (s *Stage) Judge(named []Named) (missed []string, wrong []Named) {
	explained := make([]bool, len(named))
	for _, p := range s.parts {
		if p.fault.Control() {
			continue
		}
		found := false
		for i, n := range named {
			if slices.Contains(p.fault.Causes, n.Cause) && (n.Namespace == "" || slices.Contains(p.blamed, n.Namespace)) {
				found, explained[i] = true, true
			}
		}
		if !found {
			missed = append(missed, strings.Join(p.fault.Causes, " or ")+" in "+strings.Join(p.blamed, " or "))
		}
	}
	for i, n := range named {
		if !explained[i] {
			wrong = append(wrong, n)
		}
	}
	return missed, wrong
}
