package main

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/bench"
)

func benchCommand(s *settings) *cobra.Command {
	c := &cobra.Command{
		Use:   "bench",
		Short: "Measure, side by side, on this machine",
		Long:  inOwnSpaces + "\n\nMeasures millrace beside what else could do the work.",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usage("say what to measure: services, path, program, drops or dns")
		},
	}
	c.AddCommand(benchServicesCommand(s), benchPathCommand(s), benchProgramCommand(s), benchDropsCommand(s), benchDNSCommand(s), benchServeCommand())
	return c
}

func benchServicesCommand(s *settings) *cobra.Command {
	var options bench.Options
	var html string
	c := command(&cobra.Command{
		Use:   "services",
		Short: "What a connection to a Service costs, beside iptables and nftables",
		Long: `
A connection is connect, 64 bytes there, 64 bytes back, close; a request is 64
bytes there and back on one that is open. All variants and numbers of Services
have their turn in every round, in random order, on one core. A ratio is that to
the routed connection without any Service in the same round, or to the same
variant with the fewest Services, and its interval holds the median with 95 %
confidence. Beside that: the time to load all and to change one endpoint, and
memory. iptables and nftables are the rule sets that kube-proxy writes; where
their tools are not installed they are left out, and the report says so.`,
	}, inOwnSpaces, func(ctx context.Context, _ []string) error {
		page, err := newDrawing(html) // before the measurement: it may take minutes
		if err != nil {
			return err
		}
		p := newProgress()
		options.Progress, options.Attach = p, attachers()
		report, err := bench.Services(ctx, options)
		p.done()
		if err = page.finish(report.WriteHTML, err); err != nil {
			return err
		}
		return s.show(report, report.WriteTable, report.Failed(), "operations through millrace failed: the figures do not count")
	}, exitFindings, exitUnavailable, exitPrivilege)
	c.Flags().IntSliceVar(&options.Services, "services", []int{10, 1000}, "how many Services there are; each number is measured beside the others")
	c.Flags().BoolVar(&options.AllSizes, "all-sizes", false, "load iptables and nftables in every size, also where that takes many minutes")
	c.Flags().StringSliceVar(&options.Variants, "variants", bench.DefaultVariants, "what to compare; native-again shows how finely this machine can measure")
	c.Flags().StringSliceVar(&options.Operations, "operations", bench.DefaultOperations, "what to measure")
	c.Flags().StringSliceVar(&options.Positions, "positions", []string{bench.Last}, "where in the rules the tested Service stands: first, middle, last")
	c.Flags().IntVar(&options.Rounds, "rounds", bench.DefaultRounds, "how often each variant has its turn; 6 or more give an interval")
	c.Flags().DurationVar(&options.RoundTime, "round-time", bench.DefaultRoundTime, "how long a turn lasts, all operations together")
	c.Flags().StringVar(&html, "html", "", "write the report to this file, too, as one page with plots that needs nothing else")
	return c
}

// show prints a report, as a table where JSON is not asked for. Where something failed in
// what was measured, it returns why that matters.
func (s *settings) show(report any, table func(io.Writer) error, failed bool, why string) error {
	var err error
	if s.json() {
		err = printJSON(report)
	} else {
		err = table(os.Stdout)
	}
	if err == nil && failed {
		return &failure{exitFindings, errors.New(why)}
	}
	return err
}
