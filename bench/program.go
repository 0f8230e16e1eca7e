package bench

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/millrace/millrace/model"
)

// Shot is one way to run a program in the kernel on one packet.
type Shot struct {
	Name string
	// About says what the packet is, for people.
	About string
	// Fire runs the program once and returns the time that the kernel measured.
	Fire func() (time.Duration, error)
}

// ProgramOptions are what a person can choose for Program.
type ProgramOptions struct {
	// Services is how many are loaded, for the report.
	Services int
	// Shots are what to compare; the first is taken from all others.
	Shots []Shot
	// Rounds is how often each has its turn, PerRound how many shots a turn has;
	// 0 is 20 and 1,000.
	Rounds, PerRound int
	// Progress receives a line for what takes time; nothing.
	Progress io.Writer
}

// Metrics of Program, in nanoseconds a packet.
const (
	// MetricGross is the median of a turn's shots.
	MetricGross = "gross"
	// MetricNet is that without the first shot's of the same round.
	MetricNet = "net"
)

// Program fires single shots: each shot is one run of one program on a packet of
// its own, so that nothing is measured on a packet that was translated before. In
// every round all shots have their turn, in random order, one after the other.
func Program(ctx context.Context, o ProgramOptions) (*Report, error) {
	if len(o.Shots) == 0 {
		return nil, fmt.Errorf("%w: no program is given", ErrOptions)
	}
	if o.Rounds < 0 || o.PerRound < 0 || o.Rounds > 10000 || o.PerRound > 100000 {
		return nil, fmt.Errorf("%w: %d rounds of %d shots: use 1 to 10,000 and 1 to 100,000", ErrOptions, o.Rounds, o.PerRound)
	}
	if o.Rounds == 0 {
		o.Rounds = DefaultRounds
	}
	if o.PerRound == 0 {
		o.PerRound = 1000
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	report := &Report{Header: newHeader("program", map[string]string{
		"rounds": fmt.Sprint(o.Rounds), "shots a round": fmt.Sprint(o.PerRound), "Services": fmt.Sprint(o.Services),
	})}
	gross, err := o.fire(ctx)
	if err != nil {
		return nil, err
	}
	for i, shot := range o.Shots {
		net := make([]float64, o.Rounds)
		for round := range net {
			net[round] = gross[i][round] - gross[0][round]
		}
		row := Row{Variant: shot.Name, Services: o.Services, Unit: "ns"}
		row.Metric = MetricGross
		report.Rows = append(report.Rows, summarize(row, gross[i], nil, nil))
		row.Metric = MetricNet
		report.Rows = append(report.Rows, summarize(row, net, nil, nil))
	}
	return report, nil
}

// fire gives the median of each turn, by shot and round.
func (o ProgramOptions) fire(ctx context.Context) ([][]float64, error) {
	gross := make([][]float64, len(o.Shots))
	order := make([]int, len(o.Shots))
	for i := range order {
		order[i], gross[i] = i, make([]float64, o.Rounds)
	}
	times := make([]float64, o.PerRound)
	for round := range o.Rounds {
		if round%10 == 0 {
			fmt.Fprintf(o.Progress, "round %d of %d\n", round+1, o.Rounds)
		}
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, i := range order {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			for j := range times {
				took, err := o.Shots[i].Fire()
				if err != nil {
					return nil, fmt.Errorf("%s: %w", o.Shots[i].Name, err)
				}
				times[j] = float64(took.Nanoseconds())
			}
			gross[i][round] = Median(times)
		}
	}
	return gross, nil
}

// WriteProgramTable prints a report of Program for people.
func (r *Report) WriteProgramTable(w io.Writer, shots []Shot) error {
	out := &printer{w: w}
	out.printf("%s; kernel %s; %d CPUs; load average %.2f; %s\n",
		r.Header.Machine, r.Header.Kernel, r.Header.CPUs, r.Header.LoadAverage[0], r.Header.Go)
	out.printf("%s Services, %s rounds of %s shots each\n\n", r.Header.Settings["Services"], r.Header.Settings["rounds"], r.Header.Settings["shots a round"])
	var cells [][]string
	for i, shot := range shots {
		gross, net := r.Rows[2*i], r.Rows[2*i+1]
		interval := "-"
		if low, high, ok := MedianInterval(net.Samples); ok && i > 0 {
			interval = fmt.Sprintf("[%.0f, %.0f]", low, high)
		}
		netText := "-"
		if i > 0 {
			netText = fmt.Sprintf("%.0f", net.Median)
		}
		cells = append(cells, []string{shot.Name, fmt.Sprintf("%.0f", gross.Median), netText, interval, shot.About})
	}
	out.columns([]string{"packet", "gross ns", "net ns", "[95 %]", ""}, cells)
	out.printf("\nOne run of the program on one packet, as the kernel times it (BPF_PROG_TEST_RUN,\nrepeat 1); net is without the empty program of the same round. Each run comes out\nof a system call, so caches are colder than under load.\n")
	return out.err
}

// ManyServices are Services with four endpoints each, in name order; none of them
// answers.
func ManyServices(count int) ([]*model.Service, error) {
	if count < 1 || count > 1_000_000 {
		return nil, fmt.Errorf("%w: %d Services: use 1 to 1,000,000", ErrOptions, count)
	}
	return inNameOrder(cluster(count, 4, -1)), nil
}
