package main

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/layer/service"
	"github.com/millrace/millrace/model"
)

func benchCommand(s *settings) *cobra.Command {
	c := &cobra.Command{
		Use:   "bench",
		Short: "Measure, side by side, on this machine",
		Long:  inOwnSpaces + "\n\nMeasures millrace beside what else could do the work.",
		Args:  cobra.NoArgs,
		RunE:  func(*cobra.Command, []string) error { return usage("say what to measure: services") },
	}
	c.AddCommand(benchServicesCommand(s))
	return c
}

func benchServicesCommand(s *settings) *cobra.Command {
	var options bench.Options
	var rounds bool
	c := command(&cobra.Command{
		Use:   "services",
		Short: "What a connection to a Service costs, beside iptables and nftables",
		Long: `
A connection is connect, 64 bytes there, 64 bytes back, close. All variants have
their turn in every round, in random order, on one core; a ratio is that to the
routed connection without any Service in the same round, and its interval holds
the median with 95 % confidence. iptables and nftables are the rule sets that
kube-proxy writes; where their tools are not installed they are left out, and
the report says so.`,
	}, inOwnSpaces, func(ctx context.Context, _ []string) error {
		p := newProgress()
		options.Progress, options.Millrace = p, attachService
		report, err := bench.Services(ctx, options)
		p.done()
		if err != nil {
			return err
		}
		if s.json() {
			err = printJSON(report)
		} else {
			err = report.WriteTable(os.Stdout)
		}
		if rounds && !s.json() {
			err = errors.Join(err, report.WriteRounds(os.Stdout))
		}
		if err == nil && report.Failed() {
			return &failure{exitFindings, errors.New("connections through millrace failed: the figures do not count")}
		}
		return err
	}, exitFindings, exitUnavailable, exitPrivilege)
	c.Flags().IntSliceVar(&options.Services, "services", []int{10, 1000}, "how many Services there are, one table for each number")
	c.Flags().StringSliceVar(&options.Variants, "variants", bench.DefaultVariants, "what to compare; native-again shows how finely this machine can measure")
	c.Flags().StringSliceVar(&options.Positions, "positions", []string{bench.Last}, "where in the rules the tested Service stands: first, middle, last")
	c.Flags().IntVar(&options.Rounds, "rounds", bench.DefaultRounds, "how often each variant has its turn; 6 or more give an interval")
	c.Flags().DurationVar(&options.RoundTime, "round-time", bench.DefaultRoundTime, "how long a turn lasts")
	c.Flags().BoolVar(&rounds, "show-rounds", false, "print the ratio of every round, too")
	return c
}

// attachService puts the service layer on the benchmark's client. Nothing is
// pinned: it ends with the benchmark, however that ends.
func attachService(spec bench.AttachSpec) (bench.Attached, error) {
	begun := time.Now() // as for the peers: from nothing to all Services
	l := service.New(service.Settings{Cgroup: spec.Cgroup})
	if err := l.Open(); err != nil {
		return bench.Attached{}, err
	}
	have, err := l.Read()
	if err == nil {
		want := l.Plan(&model.Snapshot{Complete: true, Services: spec.Services})
		_, _, err = l.Apply(have, want, l.Diff(have, want, true))
	}
	took := time.Since(begun)
	if err != nil {
		return bench.Attached{}, errors.Join(err, l.Close())
	}
	attached := bench.Attached{LoadTime: took, Close: l.Close}
	description, err := l.Describe()
	if err != nil {
		return bench.Attached{}, errors.Join(err, l.Close())
	}
	for _, m := range description.Maps {
		attached.MapBytes += m.Bytes
	}
	return attached, nil
}
