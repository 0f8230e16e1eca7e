package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/layer/trace"
	"github.com/millrace/millrace/layer/trace/cause"
)

func benchDropsCommand(s *settings) *cobra.Command {
	var options bench.DropsOptions
	c := command(&cobra.Command{
		Use:   "drops",
		Short: "What it costs a sender that somebody looks at drops",
		Long: `
Sends a storm of UDP packets to a port where nobody is, opens connections, and
sends much over one, while nobody looks, while programs count in the kernel as the
agent's do, while they look at system calls, too, as millrace trace does, and while
a tracer gets every drop with its stack, one by one. All have their turn in every
round, in random order; a ratio is that to the turn of the same round in which
nobody looks. Every packet that died must be in the totals of trace.`,
	}, inOwnSpaces, func(ctx context.Context, _ []string) error {
		options.Watchers = watchers()
		p := newProgress()
		options.Progress = p
		report, err := bench.Drops(ctx, options)
		p.done()
		if err != nil {
			return err
		}
		table := func(w io.Writer) error { return report.WriteDropsTable(w, options.Watchers) }
		return s.show(report, table, report.Miscounted(options.Watchers), "packets died that are not in the totals")
	}, exitFindings, exitUnavailable, exitPrivilege)
	c.Flags().IntVar(&options.Rounds, "rounds", bench.DefaultRounds, "how often each has its turn; 6 or more give an interval")
	c.Flags().DurationVar(&options.RoundTime, "round-time", bench.DropsRoundTime, "how long a turn lasts, all operations together")
	return c
}

// watchers are the ways to look at drops that are compared.
func watchers() []bench.Watcher {
	return []bench.Watcher{
		{Name: "counting", About: "as the agent all the time: counts, keeps the last examples, reads connections when they end", Watch: watcher(trace.Options{Always: true})},
		{Name: "trace", About: "millrace trace: shows one example of each kind, and system calls that are refused", Watch: watcher(trace.Options{Calls: true})},
		{Name: "each", About: "a tracer that gets every drop with its stack", Watch: watcher(trace.Options{EveryDrop: true})},
	}
}

func watcher(o trace.Options) func([]string) (func() (uint64, uint64, error), error) {
	return func(paths []string) (func() (uint64, uint64, error), error) {
		o := o
		for _, path := range paths {
			var file unix.Stat_t
			if err := unix.Stat(path, &file); err != nil {
				return nil, err
			}
			o.Namespaces = append(o.Namespaces, uint32(file.Ino))
		}
		session, err := trace.Watch(o)
		if err != nil {
			return nil, err
		}
		return func() (counted, received uint64, err error) {
			r, err := session.Stop()
			if err != nil {
				return 0, 0, err
			}
			for _, t := range r.Totals {
				if t.Kind == cause.Drop && t.Reason == "NO_SOCKET" {
					counted += t.Count
				}
			}
			return counted, r.Received, nil
		}, nil
	}
}
