package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/service"
	"github.com/millrace/millrace/layer/tune"
	"github.com/millrace/millrace/model"
)

func showCommand(s *settings) *cobra.Command {
	c := &cobra.Command{
		Use:   "show",
		Short: "What is in force in the kernel",
		Long:  readsOnly + "\n\nShows Services, backends, names, pods, routes, settings, flows or drops as they are in the kernel now,\nand the DNS queries that the agent was handed.",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usage("say what to show: services, backends, names, queries, pods, routes, settings, flows or drops")
		},
	}
	c.AddCommand(showRows(s, "services", "Services and where they lead", printServices),
		showRows(s, "backends", "Endpoints and the Services that lead to them", printBackends), showNames(s), showQueries(s), showPods(s), showRoutes(s), showSettings(s), showFlowsCommand(s), showDropsCommand(s))
	return c
}

func showSettings(s *settings) *cobra.Command {
	var at place
	c := command(&cobra.Command{
		Use:   "settings",
		Short: "Settings of this node that millrace has set, and what they were before",
		Long:  "Reads the journal in the run folder and the settings, so that it works without an agent.",
	}, readsOnly, func(context.Context, []string) error {
		picture, err := at.tune().Look()
		if err != nil {
			return err
		}
		values := picture.(*tune.Picture).Values()
		if s.json() {
			return printJSON(map[string]any{"settings": append([]layer.Value{}, values...)})
		}
		return printValues("", values)
	}, exitPrivilege)
	at.flagRun(c)
	at.flagProcSys(c)
	return c
}

func printValues(indent string, values []layer.Value) error {
	t := newTable(os.Stdout, indent+"SETTING", "VALUE", "BEFORE", "ASKED FOR BY")
	for _, v := range values {
		t.row(indent+v.Name, v.Value, v.Before, v.Owner)
	}
	return t.print()
}

// backend is the JSON form of one endpoint of one Service address.
type backend struct {
	Address string `json:"address"`
	Service string `json:"service,omitempty"`
	Port    string `json:"port,omitempty"`
	// Pod is whose hostPort leads to it.
	Pod     *model.Name `json:"pod,omitempty"`
	Through string      `json:"through"`
}

func showRows(s *settings, what, short string, print func(*settings, []*service.Row) error) *cobra.Command {
	var at place
	c := command(&cobra.Command{
		Use:   what,
		Short: short,
		Long: `
Reads the pinned maps, so that it works without an agent. Names come from the
agent: the kernel knows addresses only. Needs CAP_BPF or CAP_SYS_ADMIN.`,
	}, readsOnly, func(ctx context.Context, _ []string) error {
		rows, err := rowsInForce(ctx, &at)
		if err != nil {
			return err
		}
		return print(s, rows)
	}, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	return c
}

// rowsInForce reads the kernel and adds the names the agent knows.
func rowsInForce(ctx context.Context, at *place) ([]*service.Row, error) {
	picture, err := at.service().Look()
	if err != nil {
		return nil, err
	}
	named := map[service.Frontend]*service.Row{}
	var wanted []*service.Row
	if err := agent.Ask(ctx, at.run, "/wanted/service", &wanted); err != nil {
		fmt.Fprintln(os.Stderr, "no names:", err)
	}
	for _, row := range wanted {
		named[row.Frontend] = row
	}
	path := defaultPath(ctx, at)
	var rows []*service.Row
	for _, subject := range picture.Subjects() {
		row := *subject.(*service.Row)
		if row.Path == "" {
			row.Path = path
		}
		if known := named[row.Frontend]; known != nil {
			row.Service, row.Port, row.Pod = known.Service, known.Port, known.Pod
			if known.Entry == service.AtHostPort {
				row.Entry = known.Entry
			}
		}
		rows = append(rows, &row)
	}
	return rows, nil
}

// defaultPath is where Services are served that ask for no path; only the agent
// knows.
func defaultPath(ctx context.Context, at *place) service.Path {
	var status agent.Status
	if agent.Ask(ctx, at.run, "/status", &status) == nil {
		for _, l := range status.Layers {
			if path := l.Settings["path"]; path != "" {
				return service.Path(path)
			}
		}
	}
	return ""
}

func printServices(s *settings, rows []*service.Row) error {
	if s.json() {
		return printJSON(struct {
			Services []*service.Row `json:"services"`
		}{append([]*service.Row{}, rows...)})
	}
	t := newTable(os.Stdout, "SERVICE", "PORT", "ADDRESS", "PATH", "BACKENDS")
	for _, row := range rows {
		t.row(nameOf(row), orDash(row.Port), row.Frontend.String(), orDash(string(row.Path)), row.Leads())
	}
	return t.print()
}

func printBackends(s *settings, rows []*service.Row) error {
	all := []backend{}
	for _, row := range rows {
		for _, address := range row.Backends {
			all = append(all, backend{address.String(), nameOf(row), row.Port, row.Pod, row.Frontend.String()})
		}
	}
	if s.json() {
		return printJSON(map[string]any{"backends": all})
	}
	t := newTable(os.Stdout, "BACKEND", "SERVICE", "PORT", "THROUGH")
	for _, b := range all {
		t.row(b.Address, b.Service, orDash(b.Port), b.Through)
	}
	return t.print()
}

func nameOf(row *service.Row) string {
	return orDash(row.Owner())
}

func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}
