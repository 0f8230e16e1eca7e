package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"

	"github.com/millrace/millrace/kernel/netns"
)

// Load is what a setting is put under, to see whether it does anything.
type Load string

// The loads. Of each more is better.
const (
	// BurstOfConnections is many connections to a server that takes none meanwhile, and
	// then all: how many it gets. As many as the larger queue holds; at most 1,024, or half as
	// many again as the smaller holds if that is more.
	BurstOfConnections Load = "a burst of connections to a server that pauses"
	// BurstOfDatagrams is many datagrams of 1,000 bytes to a UDP server that reads none
	// meanwhile, and then all: how many it gets. As many as the larger buffer
	// holds; at most 16,384, or half as many again as the smaller holds if that is more.
	BurstOfDatagrams Load = "a burst of datagrams to a server that pauses"
	// FullTable is new connections while the table of connection tracking holds those that
	// there were: how many are let through. The limit is the whole machine's and stays:
	// where the new one is twice as high, the table is filled half as far.
	FullTable Load = "new connections beside a full connection tracking table"
	// Connections is connections to a server of the same namespace, one after another,
	// 64 bytes there and back: how many in a second.
	Connections Load = "connections, one after another"
)

// Verdict is what a proof comes to.
type Verdict string

// The verdicts. A difference of one percent or less is none: two alike beds differ by up
// to 0.7 % (see the package documentation).
const (
	// Keeps: the whole interval is better than before by more than one percent.
	Keeps Verdict = "keeps"
	// Harmful: the whole interval is worse by more than that.
	Harmful Verdict = "harmful"
	// NoEffect: neither.
	NoEffect Verdict = "no effect"
)

// least is the difference that counts.
const least = 0.01

// ProveOptions say what is proved.
type ProveOptions struct {
	Load Load
	// Setting is what is compared, A its value now and B the new one.
	Setting, A, B string
	// Rounds is how often both have their turn, in random order; 0 is DefaultRounds.
	Rounds int
	// Progress receives a line for what takes time; nothing.
	Progress io.Writer
}

// Proof says what a setting does under a load.
type Proof struct {
	Setting string `json:"setting"`
	Load    Load   `json:"load"`
	A       string `json:"a"`
	B       string `json:"b"`
	// MedianA and MedianB are what the load got, in Unit.
	MedianA float64 `json:"median_a"`
	MedianB float64 `json:"median_b"`
	Unit    string  `json:"unit"`
	// Ratio is that of B to A in the same round.
	Ratio   *Ratio  `json:"ratio"`
	Rounds  int     `json:"rounds"`
	Verdict Verdict `json:"verdict"`
}

// String is the proof in one line.
func (p *Proof) String() string {
	interval := "no interval: " + p.Ratio.Note
	if p.Ratio.Low != nil {
		interval = fmt.Sprintf("[%.3g, %.3g]", *p.Ratio.Low, *p.Ratio.High)
	}
	return fmt.Sprintf("%s: %s %s -> %s: %.5g -> %.5g %s, ratio %.3g %s of %d rounds", p.Verdict, p.Setting, p.A, p.B,
		p.MedianA, p.MedianB, p.Unit, p.Ratio.Median, interval, p.Rounds)
}

// stand is a load in a namespace of its own, with one of the two values.
type stand interface {
	// turn puts the setting under the load once, on a thread in the namespace.
	turn() (float64, error)
	close() error
}

// Prove compares two values of a setting under a load, in namespaces of its own: turns
// of both in random order, and the median of the ratios with its interval. The machine's
// settings are neither changed nor asked for.
func Prove(ctx context.Context, o ProveOptions) (proof *Proof, err error) {
	if o.Rounds == 0 {
		o.Rounds = DefaultRounds
	}
	if o.Rounds < minRounds || o.Rounds > 10000 {
		return nil, fmt.Errorf("%w: %d rounds: use %d to 10,000", ErrOptions, o.Rounds, minRounds)
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	run, err := openRun()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, run.close()) }()
	values := [2]string{o.A, o.B}
	var stands [2]stand
	var paths [2]string
	for i, name := range []string{"a", "b"} {
		paths[i] = filepath.Join(run.namespaces, name)
		if err := netns.Create(paths[i]); err != nil {
			return nil, err
		}
		if err := netns.Do(paths[i], func() error { return raise("lo") }); err != nil {
			return nil, err
		}
		fmt.Fprintf(o.Progress, "prepare %s = %s\n", o.Setting, values[i])
		if stands[i], err = o.prepare(ctx, paths[i], values[i]); err != nil {
			return nil, fmt.Errorf("prove %s = %s: %w", o.Setting, values[i], err)
		}
		defer func() { err = errors.Join(err, stands[i].close()) }()
	}
	var samples [2][]float64
	for round := range o.Rounds {
		fmt.Fprintf(o.Progress, "round %d of %d\n", round+1, o.Rounds)
		for _, i := range rand.Perm(2) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			var figure float64
			err := netns.Do(paths[i], func() (err error) { figure, err = stands[i].turn(); return err })
			if err != nil {
				return nil, fmt.Errorf("prove %s = %s: %w", o.Setting, values[i], err)
			}
			samples[i] = append(samples[i], figure)
		}
	}
	return o.judge(samples)
}

func (o *ProveOptions) judge(samples [2][]float64) (*Proof, error) {
	p := &Proof{Setting: o.Setting, Load: o.Load, A: o.A, B: o.B, Rounds: o.Rounds, Unit: o.Load.unit(),
		MedianA: Median(samples[0]), MedianB: Median(samples[1]), Ratio: ratioOf(samples[1], samples[0]), Verdict: NoEffect}
	if p.Ratio == nil {
		return nil, fmt.Errorf("prove %s: with %s the load got nothing at all in some round, so that there is no ratio: %v", o.Setting, o.A, samples[0])
	}
	switch {
	case p.Ratio.Low == nil:
	case *p.Ratio.Low > 1+least:
		p.Verdict = Keeps
	case *p.Ratio.High < 1-least:
		p.Verdict = Harmful
	}
	return p, nil
}

func (l Load) unit() string {
	switch l {
	case BurstOfDatagrams:
		return "datagrams"
	case Connections:
		return "connections a second"
	}
	return "connections"
}
