package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/layer/route"
	"github.com/millrace/millrace/model"
)

func showRoutes(s *settings) *cobra.Command {
	var at place
	c := command(&cobra.Command{
		Use:   "routes",
		Short: "Ways to the pods of other nodes, and why these",
		Long: `
Reads the pinned maps, routes and devices, so that it works without an agent. Whose a range
is, and why this way was chosen, comes from the agent: the kernel does not know it. MTU is
the longest packet, in bytes. Ranges to which no way leads are said, too. Needs CAP_BPF or
CAP_SYS_ADMIN.`,
	}, readsOnly, func(ctx context.Context, _ []string) error {
		var cluster model.Snapshot
		var status agent.Status
		err := agent.Ask(ctx, at.run, "/status", &status)
		if err == nil {
			at.node = status.Node
			err = agent.Ask(ctx, at.run, "/nodes", &cluster.Nodes)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "no names and reasons:", err)
		}
		l := at.routes()
		picture, err := l.Look()
		if err != nil {
			return err
		}
		rows, none := l.Explain(picture, l.Plan(&cluster))
		return printRoutes(s, rows, none)
	}, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	return c
}

func printRoutes(s *settings, rows []*route.Row, none []string) error {
	if s.json() {
		return printJSON(map[string]any{"routes": append([]*route.Row{}, rows...), "none": append([]string{}, none...)})
	}
	t := newTable(os.Stdout, "NODE", "RANGE", "WAY", "VIA", "DEVICE", "MTU", "WHY")
	for _, row := range rows {
		way := "vxlan"
		if row.Direct {
			way = "direct"
		}
		t.row(orDash(row.Node), row.To.String(), way, row.Via.String(), row.Device, fmt.Sprint(row.MTU), orDash(row.Why))
	}
	if err := t.print(); err != nil {
		return err
	}
	for _, text := range none {
		fmt.Println(text)
	}
	return nil
}
