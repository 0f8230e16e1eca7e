package main

import (
	"context"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/agent/resolver"
)

func showQueries(s *settings) *cobra.Command {
	var at place
	c := command(&cobra.Command{
		Use:   "queries [PART]",
		Short: "DNS queries that the kernel handed to the agent, and what became of them",
		Long: `
Asks the agent for the last 1,024, the oldest first. With PART only those whose name holds
it. FROM is the pod's device at the node, by its index, or node. What the kernel answers itself the
agent does not see.`,
		Args: cobra.MaximumNArgs(1),
	}, readsOnly, func(ctx context.Context, args []string) error {
		all, some := []resolver.Query{}, []resolver.Query{}
		if err := agent.Ask(ctx, at.run, "/queries", &all); err != nil {
			return err
		}
		for _, q := range all {
			if len(args) == 0 || strings.Contains(strings.ToLower(q.Name), strings.ToLower(args[0])) {
				some = append(some, q)
			}
		}
		return printQueries(s, some)
	})
	at.flagRun(c)
	return c
}

func printQueries(s *settings, all []resolver.Query) error {
	if s.json() {
		return printJSON(map[string]any{"queries": all})
	}
	t := newTable(os.Stdout, "AT", "FROM", "NAME", "TYPE", "BY", "ANSWER", "RECORDS", "TOOK")
	for _, q := range all {
		t.row(q.At.Local().Format("15:04:05.000"), q.From, q.Name, q.Type, q.By, q.Rcode, strconv.Itoa(q.Records), (time.Duration(q.Took) * time.Microsecond).String())
	}
	return t.print()
}
