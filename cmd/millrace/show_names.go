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
		Short: "Names of the cluster that are answered for in the kernel, and search lists of pods",
		Long: `
Reads the pinned maps, so that it works without an agent; the zone comes from the agent.
With PART only names that hold it. Then the search lists of pods, by their devices at
the node, as far as they are known. Needs CAP_BPF or CAP_SYS_ADMIN.`,
		Args: cobra.MaximumNArgs(1),
	}, readsOnly, func(ctx context.Context, args []string) error {
		var notes []string
		at.dns, notes = zoneOfAgent(ctx, &at)
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
		return printNames(s, rows, picture.(*dns.Picture).Searches(), notes)
	}, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	return c
}

// zoneOfAgent is the zone that the agent answers for, and what of it is left to others; only
// it knows.
func zoneOfAgent(ctx context.Context, at *place) (zone string, notes []string) {
	var status agent.Status
	if err := agent.Ask(ctx, at.run, "/status", &status); err != nil {
		fmt.Fprintln(os.Stderr, "no zone:", err)
	}
	for _, l := range status.Layers {
		if l.Name == at.names().Name() {
			return l.Settings["zone"], l.Degraded
		}
	}
	return "", nil
}

func printNames(s *settings, rows []*dns.Row, searches []*dns.SearchList, notes []string) error {
	if s.json() {
		return printJSON(map[string]any{"names": rows, "searches": append([]*dns.SearchList{}, searches...), "degraded": append([]string{}, notes...)})
	}
	for _, note := range notes {
		fmt.Fprintln(os.Stderr, "note:", note)
	}
	t := newTable(os.Stdout, "NAME", "ADDRESSES")
	for _, row := range rows {
		t.row(row.FullName(), row.Leads())
	}
	if err := t.print(); err != nil || len(searches) == 0 {
		return err
	}
	fmt.Println()
	t = newTable(os.Stdout, "DEVICE", "NDOTS", "SEARCH LIST")
	for _, list := range searches {
		t.row(list.Device, fmt.Sprint(list.Ndots), strings.Join(list.Suffixes, " "))
	}
	return t.print()
}
