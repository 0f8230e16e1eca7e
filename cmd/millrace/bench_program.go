package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/layer/service"
)

func benchProgramCommand(s *settings) *cobra.Command {
	var options bench.ProgramOptions
	c := command(&cobra.Command{
		Use:   "program",
		Short: "What the packet path's programs cost a packet",
		Long: `
Runs the programs of the packet path in single shots, each on a packet of its own,
over tables of their own: of an open connection, of a new one, and of one that
goes to no Service, beside an empty program and one that makes one look-up. No
program is attached anywhere. Needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON.`,
	}, readsOnly, func(ctx context.Context, _ []string) error {
		services, err := bench.ManyServices(options.Services)
		if err != nil {
			return err
		}
		at, err := service.OpenRange(services)
		if err != nil {
			return err
		}
		defer at.Close()
		for _, shot := range at.Shots() {
			options.Shots = append(options.Shots, bench.Shot(shot))
		}
		p := newProgress()
		options.Progress = p
		report, err := bench.Program(ctx, options)
		p.done()
		if err != nil {
			return err
		}
		table := func(w io.Writer) error { return report.WriteProgramTable(w, options.Shots) }
		return s.show(report, table, false, "")
	}, exitUnavailable, exitPrivilege)
	c.Flags().IntVar(&options.Services, "services", 10000, "how many Services there are")
	c.Flags().IntVar(&options.Rounds, "rounds", bench.DefaultRounds, "how often each kind of packet has its turn; 6 or more give an interval")
	c.Flags().IntVar(&options.PerRound, "shots", 1000, "how many packets a turn has")
	return c
}
