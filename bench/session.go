package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"time"

	"github.com/millrace/millrace/model"
)

// session is one run of Services, or of Path.
type session struct {
	Options
	run    *run
	cpu    int
	report *Report
	beds   []*bed
	cells  []*cell
	// clusters are what was made for one cell and is the same for others.
	clusters map[clusterSize][]*model.Service
}

// clusterSize is what the Services of a session differ in.
type clusterSize struct{ services, tested int }

// cell is what one figure of a round belongs to.
type cell struct {
	variant  string
	services int
	position string
	bed      *bed
	targets  []netip.AddrPort
	loaded   loaded
	changes  []time.Duration
	// outcomes has, for each operation, one of every round.
	outcomes map[string][]outcome
}

func (c *cell) String() string {
	text := fmt.Sprintf("%s, %d Services", c.variant, c.services)
	if c.position != "" {
		text += ", " + c.position
	}
	return text
}

func (s *session) progress(format string, args ...any) {
	fmt.Fprintf(s.Progress, "bench "+s.report.Header.Benchmark+": "+format+"\n", args...)
}

// prepare makes all beds, and all stay until the end: those with few Services
// and those with many have their turns side by side. Native has one for each number of Services too, which
// are nothing to it, so that its bed has seen as many connections as theirs.
func (s *session) prepare(ctx context.Context) error {
	names := []string{Native}
	for _, name := range s.Variants {
		if name != Native {
			names = append(names, name)
		}
	}
	for _, name := range names {
		v, err := variantNamed(name, s.Attach)
		if err != nil {
			return err
		}
		if err := s.prepareVariant(ctx, v); err != nil {
			return err
		}
	}
	s.clusters = nil // who needs the Services still has them
	return nil
}

func (s *session) prepareVariant(ctx context.Context, v variant) error {
	if v.absent != "" {
		s.skip(Skipped{Variant: v.name, Reason: v.absent})
		return nil
	}
	positions := []string{""}
	if v.ordered {
		positions = s.Positions
	}
	for _, count := range s.Services {
		if v.most > 0 && count > v.most && !s.AllSizes {
			s.skip(Skipped{Variant: v.name, Services: count, Reason: fmt.Sprintf(
				"more than %d take it very long to load: say --all-sizes to have it all the same", v.most)})
			continue
		}
		for _, position := range positions {
			if err := s.prepareCell(ctx, v, count, position); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *session) skip(skipped Skipped) {
	s.report.Skipped = append(s.report.Skipped, skipped)
	s.progress("%s", skipped)
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
	c := &cell{variant: v.name, services: count, position: position, outcomes: map[string][]outcome{}}
	s.progress("prepare %s", c)
	services := s.cluster(count, tested)
	c.targets = []netip.AddrPort{serviceAddress(services[tested])}
	if v.direct {
		c.targets = addresses(services[tested])
	}
	name := strings.TrimSuffix(fmt.Sprintf("%s-%d-%s", v.name, count, position), "-")
	if c.bed, err = s.makeBed(ctx, name); err != nil {
		return err
	}
	c.loaded, err = v.load(ctx, c.bed, services)
	c.bed.detach = c.loaded.detach
	if err == nil {
		err = c.prove(addresses(services[tested]))
	}
	if err == nil {
		err = c.change(ctx, services[tested])
	}
	return s.admit(ctx, c, v.needed, err)
}

// cluster makes the Services, or takes those that another cell has.
func (s *session) cluster(count, tested int) []*model.Service {
	size := clusterSize{count, tested}
	if s.clusters == nil {
		s.clusters = map[clusterSize][]*model.Service{}
	}
	if s.clusters[size] == nil {
		s.clusters[size] = cluster(count, s.Endpoints, tested)
	}
	return s.clusters[size]
}

// admit takes a cell in, or leaves it out because of err. Without native there
// is nothing to compare with, and without millrace nothing to compare.
func (s *session) admit(ctx context.Context, c *cell, needed bool, err error) error {
	if err != nil && (needed || ctx.Err() != nil) {
		return fmt.Errorf("prepare %s: %w", c, err)
	}
	if err != nil {
		s.skip(Skipped{Variant: c.variant, Services: c.services, Position: c.position, Reason: err.Error()})
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

// measure gives every cell its turn in every round, for one operation after the
// other and each time in another random order.
func (s *session) measure(ctx context.Context) error {
	for round := range s.Rounds {
		if round == 0 || (round+1)%10 == 0 {
			s.progress("round %d of %d", round+1, s.Rounds)
		}
		for _, operation := range s.Operations {
			for _, i := range rand.Perm(len(s.cells)) {
				if err := s.turn(ctx, s.cells[i], operation); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// turn measures an operation with one cell.
func (s *session) turn(ctx context.Context, c *cell, operation string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	result, err := c.bed.clientProcess.tell(command{
		Targets:     c.targets,
		Operation:   operation,
		Nanoseconds: s.RoundTime.Nanoseconds() / int64(len(s.Operations)),
		WarmUp:      warmUp[operation],
		Server:      c.bed.serverProcess.pid(),
	})
	c.outcomes[operation] = append(c.outcomes[operation], result)
	return err
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
