package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
)

// Options are what a person can choose. The zero value is the default of each.
type Options struct {
	// Services is how many to load, one table for each number; 10 and 1000.
	Services []int
	// Variants are what to compare, by name; DefaultVariants. Native is always
	// measured.
	Variants []string
	// Positions are where among the rules the tested Service stands, for
	// variants that search in order: First, Middle, Last; Last.
	Positions []string
	// Endpoints is how many a Service has, 2 to 200; 2.
	Endpoints int
	// Rounds is how often each variant has its turn; DefaultRounds.
	Rounds int
	// RoundTime is how long a turn lasts; DefaultRoundTime.
	RoundTime time.Duration
	// Millrace attaches the variant under test. Without it the variant is left
	// out, and the report says so; with it, it must work.
	Millrace Attach
	// WorkerCommand is the command that runs WorkerMain, to which its arguments are
	// appended; this program with "bench-worker".
	WorkerCommand []string
	// Progress receives a line for everything that takes time; nothing.
	Progress io.Writer
}

// ErrOptions is wrapped by the error of Services when its Options make no sense.
var ErrOptions = errors.New("choose what to measure")

// Defaults of Options. 20 rounds put the 95 % interval between the 6th and the
// 15th of the ordered ratios.
const (
	DefaultRounds    = 20
	DefaultRoundTime = 100 * time.Millisecond
)

// sliceTime is the piece in which a turn is taken.
const sliceTime = 20 * time.Millisecond

// warmUp is how many connections a slice makes before it counts: they bring the
// variant's code and tables back into the caches.
const warmUp = 20

// withDefaults fills in what was left at zero and checks the rest.
func (o Options) withDefaults() (Options, error) {
	if len(o.Services) == 0 {
		o.Services = []int{10, 1000}
	}
	if len(o.Variants) == 0 {
		o.Variants = DefaultVariants
	}
	if len(o.Positions) == 0 {
		o.Positions = []string{Last}
	}
	o.Services, o.Variants, o.Positions = once(o.Services), once(o.Variants), once(o.Positions)
	if o.Endpoints == 0 {
		o.Endpoints = 2
	}
	if o.Rounds == 0 {
		o.Rounds = DefaultRounds
	}
	if o.RoundTime == 0 {
		o.RoundTime = DefaultRoundTime
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if len(o.WorkerCommand) == 0 {
		self, err := os.Executable()
		if err != nil {
			return o, fmt.Errorf("find this program: %w", err)
		}
		o.WorkerCommand = []string{self, "bench-worker"}
	}
	if err := o.check(); err != nil {
		return o, fmt.Errorf("%w: %w", ErrOptions, err)
	}
	return o, nil
}

// once leaves away what was named before.
func once[T comparable](named []T) []T {
	var kept []T
	for _, item := range named {
		if !slices.Contains(kept, item) {
			kept = append(kept, item)
		}
	}
	return kept
}

func (o Options) check() error {
	if o.Endpoints < 2 || o.Endpoints > 200 { // first, for it is multiplied with
		return fmt.Errorf("%d endpoints a Service: use 2 to 200", o.Endpoints)
	}
	for _, count := range o.Services {
		if count < 1 || count > 1_000_000 {
			return fmt.Errorf("%d Services: use 1 to 1,000,000", count)
		}
		if count*o.Endpoints > 8_000_000 {
			return fmt.Errorf("%d Services with %d endpoints: use at most 8,000,000 endpoints", count, o.Endpoints)
		}
	}
	if o.Rounds < 1 || o.RoundTime < time.Millisecond {
		return fmt.Errorf("%d rounds of %s: use at least one round of a millisecond", o.Rounds, o.RoundTime)
	}
	for _, position := range o.Positions {
		if _, err := testedIndex(position, 1); err != nil {
			return err
		}
	}
	for _, name := range o.Variants {
		if _, err := variantNamed(name, nil); err != nil {
			return err
		}
	}
	return nil
}

// Services compares what a connection costs with each variant, for each number
// of Services. It needs root. It ends early, and leaves nothing, when ctx ends.
// A peer that this machine cannot run is left out and named in the report. An
// error means that there is no report: it wraps [ErrOptions], a [need.Privilege],
// or the reason why millrace does not work here.
func Services(ctx context.Context, opts Options) (*Report, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := need.Check("make network namespaces", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"); err != nil {
		return nil, err
	}
	cpu, err := lastProcessor()
	if err != nil {
		return nil, err
	}
	header := newHeader("services", opts.settings(cpu))
	folders, err := openRun()
	if err != nil {
		return nil, err
	}
	s := &session{Options: opts, run: folders, cpu: cpu, report: &Report{Header: header, Rows: []Row{}, Skipped: []Skipped{}, Warnings: []string{}}}
	err = s.prepare(ctx)
	if err == nil {
		err = s.measure(ctx)
	}
	if ctx.Err() != nil {
		err = ctx.Err() // and not that its workers were killed
	}
	if err = errors.Join(err, s.close()); err != nil {
		return nil, err
	}
	s.summarize()
	return s.report, nil
}

func (o Options) settings(cpu int) map[string]string {
	return map[string]string{
		"connection": fmt.Sprintf("connect, %d bytes, %[1]d bytes, close; one at a time; server closes first", messageSize),
		"endpoints":  fmt.Sprintf("%d a Service", o.Endpoints),
		"rounds":     fmt.Sprintf("%d of %s for each variant, in random order", o.Rounds, o.RoundTime),
		"processor":  fmt.Sprintf("client and server on number %d", cpu),
		"namespaces": "tcp_timestamps=2 tcp_no_metrics_save=1 tcp_congestion_control=reno",
	}
}

// lastProcessor is the last one this process may use: interrupts like the first.
func lastProcessor() (int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return 0, fmt.Errorf("find a processor: %w", err)
	}
	for cpu := len(set)*64 - 1; cpu >= 0; cpu-- {
		if set.IsSet(cpu) {
			return cpu, nil
		}
	}
	return 0, errors.New("find a processor: this process may use none")
}

// session is one run of Services.
type session struct {
	Options
	run    *run
	cpu    int
	report *Report
	beds   []*bed
	cells  []*cell
}

// cell is what one figure of a round belongs to.
type cell struct {
	variant  string
	services int
	position string
	bed      *bed
	targets  []netip.AddrPort
	loaded   loaded
	// outcomes has one of every round.
	outcomes []outcome
}

func (c *cell) String() string {
	text := fmt.Sprintf("%s, %d Services", c.variant, c.services)
	if c.position != "" {
		text += ", " + c.position
	}
	return text
}

func (s *session) progress(format string, args ...any) {
	fmt.Fprintf(s.Progress, "bench services: "+format+"\n", args...)
}

// prepare makes all beds. Native has one for each number of Services too, which
// are nothing to it, so that its bed has seen as many connections as theirs.
func (s *session) prepare(ctx context.Context) error {
	names := []string{Native}
	for _, name := range s.Variants {
		if name != Native {
			names = append(names, name)
		}
	}
	for _, name := range names {
		v, err := variantNamed(name, s.Millrace)
		if err != nil {
			return err
		}
		positions := []string{""}
		if v.ordered {
			positions = s.Positions
		}
		for _, count := range s.Services {
			for _, position := range positions {
				if err := s.prepareCell(ctx, v, count, position); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// prepareCell loads the Services into a bed of their own. Of the peers, what the
// machine refuses to load, or does not translate once loaded, is left out.
func (s *session) prepareCell(ctx context.Context, v variant, count int, position string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	tested, err := testedIndex(position, count)
	if err != nil {
		return err
	}
	c := &cell{variant: v.name, services: count, position: position}
	s.progress("prepare %s", c)
	services := cluster(count, s.Endpoints, tested)
	c.targets = []netip.AddrPort{serviceAddress(services[tested])}
	if v.direct {
		c.targets = liveBackends(s.Endpoints)
	}
	name := strings.TrimSuffix(fmt.Sprintf("%s-%d-%s", v.name, count, position), "-")
	if c.bed, err = s.makeBed(ctx, name); err != nil {
		return err
	}
	c.loaded, err = v.load(ctx, c.bed, services)
	c.bed.detach = c.loaded.detach
	if err == nil {
		err = c.prove(s.Endpoints)
	}
	return s.admit(ctx, c, err)
}

// admit takes a cell in, or leaves it out because of err. Without native there
// is nothing to compare with, and without millrace nothing to compare.
func (s *session) admit(ctx context.Context, c *cell, err error) error {
	needed := c.variant == Native || c.variant == Millrace && s.Millrace != nil
	if err != nil && (needed || ctx.Err() != nil) {
		return fmt.Errorf("prepare %s: %w", c, err)
	}
	if err != nil {
		skipped := Skipped{Variant: c.variant, Services: c.services, Position: c.position, Reason: err.Error()}
		s.report.Skipped = append(s.report.Skipped, skipped)
		s.progress("%s", skipped)
		return nil
	}
	if c.loaded.by != "" {
		s.report.Header.Settings[c.variant] = "loaded by " + c.loaded.by
	}
	s.cells = append(s.cells, c)
	return nil
}

// makeBed makes a bed with its workers, which close takes away.
func (s *session) makeBed(ctx context.Context, name string) (*bed, error) {
	b, err := makeBed(s.run, name, s.Endpoints)
	s.beds = append(s.beds, b)
	if err != nil {
		return nil, err
	}
	return b, b.startWorkers(ctx, s.WorkerCommand, s.cpu)
}

// prove makes connections until every backend has answered one. It gives up
// after so many that an even choice among 200 backends would not have missed
// one in 10^15 runs.
func (c *cell) prove(backends int) error {
	missing := map[string]bool{}
	for _, backend := range liveBackends(backends) {
		missing[backend.String()] = true
	}
	for range 40 * backends {
		result, err := c.bed.clientProcess.tell(command{Targets: c.targets})
		if err != nil {
			return err
		}
		if result.Errors > 0 {
			return fmt.Errorf("connect to %s: %s", c.targets[0], result.FirstError)
		}
		delete(missing, result.Backend)
		if len(missing) == 0 {
			return nil
		}
	}
	return fmt.Errorf("connect to %s: %d of %d backends never answered", c.targets[0], len(missing), backends)
}

// measure gives every cell its turn in every round. The cells with the same
// number of Services take theirs together, native among them.
func (s *session) measure(ctx context.Context) error {
	for round := range s.Rounds {
		if round == 0 || (round+1)%5 == 0 {
			s.progress("round %d of %d", round+1, s.Rounds)
		}
		for _, i := range rand.Perm(len(s.Services)) {
			if err := s.turns(ctx, s.cellsOf(s.Services[i])); err != nil {
				return err
			}
		}
	}
	return nil
}

// turns gives each cell of the group one turn, in slices: all have their first
// slice, in random order, then all their second. What else the machine does for
// a few tenths of a second then meets them all, and no one's median moves.
func (s *session) turns(ctx context.Context, group []*cell) error {
	for _, c := range group {
		c.outcomes = append(c.outcomes, outcome{})
	}
	count := max(int(s.RoundTime/sliceTime), 1)
	for slice := range count {
		for _, i := range rand.Perm(len(group)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			result, err := group[i].bed.clientProcess.tell(command{
				Targets:     group[i].targets,
				Nanoseconds: s.RoundTime.Nanoseconds() / int64(count),
				First:       slice == 0,
				Last:        slice == count-1,
				WarmUp:      warmUp,
				Server:      group[i].bed.serverProcess.pid(),
			})
			if err != nil {
				return err
			}
			group[i].outcomes[len(group[i].outcomes)-1].add(result)
		}
	}
	return nil
}

func (s *session) cellsOf(services int) []*cell {
	var group []*cell
	for _, c := range s.cells {
		if c.services == services {
			group = append(group, c)
		}
	}
	return group
}

// close takes all beds and the run's folders away.
func (s *session) close() error {
	var errs []error
	for _, b := range s.beds {
		errs = append(errs, b.close())
	}
	return errors.Join(append(errs, s.run.close())...)
}
