package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
)

// Options are what a person can choose. The zero value is the default of each.
type Options struct {
	// Services is how many to load, each number beside the others; 10 and 1000.
	Services []int
	// AllSizes loads also so many of them that a variant takes minutes for it.
	AllSizes bool
	// Variants are what to compare, by name; DefaultVariants. Native is always
	// measured.
	Variants []string
	// Operations are what to measure of them; DefaultOperations.
	Operations []string
	// Positions are where among the rules the tested Service stands, for
	// variants that search in order: First, Middle, Last; Last.
	Positions []string
	// Endpoints is how many a Service has, 2 to 200; 2.
	Endpoints int
	// Rounds is how often each variant has its turn; DefaultRounds.
	Rounds int
	// RoundTime is how long a turn lasts, all operations together;
	// DefaultRoundTime.
	RoundTime time.Duration
	// Attach has what attaches Millrace and MillracePacket, by these names. A
	// variant that is not in it is left out, and the report says so; one that is
	// must work.
	Attach map[string]Attach
	// WorkerCommand is the command that runs WorkerMain, to which its arguments are
	// appended; this program with "bench-worker".
	WorkerCommand []string
	// Progress receives a line for everything that takes time; nothing.
	Progress io.Writer
}

// ErrOptions is wrapped by the error of Services when its Options make no sense.
var ErrOptions = errors.New("choose what to measure")

// Defaults of Options. Many short rounds, for what else happens on a machine comes
// and goes: within a short one it meets all variants alike, and the median over
// many leaves out those in which it did not. 50 rounds put the 95 % interval
// between the 18th and the 33rd of the ordered ratios.
const (
	DefaultRounds    = 50
	DefaultRoundTime = 40 * time.Millisecond
)

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
	if len(o.Operations) == 0 {
		o.Operations = DefaultOperations
	}
	o.Services, o.Variants, o.Positions, o.Operations = once(o.Services), once(o.Variants), once(o.Positions), once(o.Operations)
	slices.Sort(o.Services)
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
		own, err := ownWorker()
		if err != nil {
			return o, err
		}
		o.WorkerCommand = own
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
	for _, name := range o.Operations {
		if !slices.Contains(DefaultOperations, name) {
			return fmt.Errorf("unknown operation %q: use %s", name, strings.Join(DefaultOperations, ", "))
		}
	}
	for _, name := range o.Variants {
		if _, err := variantNamed(name, nil); err != nil {
			return err
		}
	}
	return nil
}

// Services compares what a connection to a Service and a request on it cost with
// each variant and for each number of Services, and what it costs to load the
// Services and to change one endpoint of them. It needs root. It ends early, and leaves nothing, when ctx ends.
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
	report := &Report{Header: header, Rows: []Row{}, Skipped: []Skipped{}, Warnings: []string{}}
	s := &session{Options: opts, run: folders, cpu: cpu, report: report}
	if err := carryOut(ctx, s, s.close); err != nil {
		return nil, err
	}
	s.summarize()
	return s.report, nil
}

func (o Options) settings(cpu int) map[string]string {
	return map[string]string{
		Connection:   fmt.Sprintf("connect, %d bytes, %[1]d bytes, close; one at a time; server closes first", messageSize),
		Request:      fmt.Sprintf("%d bytes, %[1]d bytes on one open connection, TCP_NODELAY; one at a time", messageSize),
		"endpoints":  fmt.Sprintf("%d a Service", o.Endpoints),
		"rounds":     fmt.Sprintf("%d of %s for each variant and number of Services, in random order", o.Rounds, o.RoundTime),
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
