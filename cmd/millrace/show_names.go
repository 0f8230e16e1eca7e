package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/layer/dns"
)

func showNames(s *settings) *cobra.Command {
	var at place
	c := command(&cobra.Command{
		Use:   "names [PART]",
		Short: "Names of the cluster that are answered for in the kernel",
		Long: `
Reads the pinned maps, so that it works without an agent; the zone comes from the agent.
With PART only names that hold it. Needs CAP_BPF or CAP_SYS_ADMIN.`,
		Args: cobra.MaximumNArgs(1),
	}, readsOnly, func(ctx context.Context, args []string) error {
		at.dns = zoneOfAgent(ctx, &at)
		picture, err := at.names().Look()
		if err != nil {
			return err
		}
		rows := []*dns.Row{}
		for _, row := range picture.(*dns.Picture).Rows() {
			if len(args) == 0 || strings.Contains(row.FullName(), strings.ToLower(args[0])) {
				rows = append(rows, row)
			}
		}
		return printNames(s, rows)
	}, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	return c
}

// zoneOfAgent is the zone that the agent answers for; only it knows.
func zoneOfAgent(ctx context.Context, at *place) string {
	var status agent.Status
	if err := agent.Ask(ctx, at.run, "/status", &status); err != nil {
		fmt.Fprintln(os.Stderr, "no zone:", err)
	}
	for _, l := range status.Layers {
		if l.Name == at.names().Name() {
			return l.Settings["zone"]
		}
	}
	return ""
}

func printNames(s *settings, rows []*dns.Row) error {
	if s.json() {
		return printJSON(map[string]any{"names": rows})
	}
	t := newTable(os.Stdout, "NAME", "ADDRESSES")
	for _, row := range rows {
		t.row(row.FullName(), row.Leads())
	}
	return t.print()
}
