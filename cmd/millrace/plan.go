package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

func planCommand(s *settings) *cobra.Command {
	var at place
	var from wishes
	var proxy standIn
	c := command(&cobra.Command{
		Use:   "plan [pods] [nodedns] --source dir:PATH|kube:PATH|kube:",
		Args:  cobra.ArbitraryArgs,
		Short: "What the agent would change in the kernel",
		Long: `
Reads the manifests or asks the API server once, compares what is asked for with what is pinned on this
host, and prints the changes: + is new, ~ altered, - removed. Where nothing is
pinned everything is new. With the word pods it is about an agent that gives the
node's pods their network, too, with the ways to those of other nodes and to the world; with
nodedns about one that answers the node's own queries, too.`,
	}, readsOnly, func(ctx context.Context, args []string) error {
		if err := at.also(args); err != nil {
			return err
		}
		from.names, from.pods = at.dns != "", at.pods
		return plan(ctx, s, &at, &from, &proxy)
	}, exitData, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	at.flagProcSys(c)
	at.flagNode(c)
	at.flagPath(c)
	at.flagConntrack(c)
	at.flagWire(c)
	at.flagDNS(c)
	from.flags(c)
	proxy.flagConfig(c)
	return c
}

// planned is the JSON form of one change.
type planned struct {
	Op     layer.Op `json:"op"`
	Layer  string   `json:"layer"`
	Object string   `json:"object"`
	Detail string   `json:"detail,omitempty"`
}

func plan(ctx context.Context, s *settings, at *place, from *wishes, proxy *standIn) error {
	notes, problems, err := proxy.look(ctx, at, from)
	if err != nil {
		return err
	}
	if _, err := at.wanted(); err != nil {
		return err
	}
	snapshot, err := firstSnapshot(ctx, from, at.node)
	if err != nil {
		return err
	}
	if err := at.addHostPorts(snapshot); err != nil {
		return err
	}
	all := []planned{}
	for _, l := range at.pinned() {
		changes, err := at.planned(l, snapshot)
		if err != nil {
			return err
		}
		for _, change := range changes {
			all = append(all, planned{change.Op, l.Name(), change.Subject.Object(), change.Subject.Detail()})
			if !s.json() {
				fmt.Println(change)
			}
		}
	}
	problems = append(problems, snapshot.Problems...)
	if s.json() {
		err = printJSON(struct {
			Changes  []planned       `json:"changes"`
			Problems []model.Problem `json:"problems"`
			Notes    []string        `json:"kube_proxy_notes,omitempty"`
		}{all, problems, notes})
	} else if len(all) == 0 {
		fmt.Fprintln(os.Stderr, "nothing to change")
	}
	if !s.json() {
		for _, note := range notes {
			fmt.Fprintln(os.Stderr, "kube-proxy's configuration:", note)
		}
	}
	return errors.Join(err, problemsError(problems))
}

// planned are the changes of one layer: those that its plan asks for, or its removal
// where it is switched off.
func (p *place) planned(l layer.Layer, snapshot *model.Snapshot) (layer.Changes, error) {
	if p.isOff(l) {
		return l.Removal()
	}
	have, err := l.Look()
	if err != nil {
		return nil, err
	}
	return l.Diff(have, l.Plan(snapshot), snapshot.Complete && snapshot.Unread == 0), nil
}

// firstSnapshot is the first whole picture of a source.
func firstSnapshot(ctx context.Context, from *wishes, node string) (*model.Snapshot, error) {
	source, err := from.open(node)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var first *model.Snapshot
	err = source.Run(ctx, func(snapshot *model.Snapshot) {
		if first == nil && snapshot.Complete {
			first = snapshot
			cancel()
		}
	})
	if first == nil {
		if err == nil {
			err = errors.New("it ended before the cluster was seen whole")
		}
		return nil, &failure{exitData, fmt.Errorf("read %s: %w", from.source, err)}
	}
	return first, nil
}

// problemsError tells each problem on a line of stderr; the exit status says
// that there were some.
func problemsError(problems []model.Problem) error {
	for _, p := range problems {
		fmt.Fprintln(os.Stderr, "millrace:", p.Error())
	}
	if len(problems) > 0 {
		return &failure{exitData, fmt.Errorf("%d problems in the manifests; the rest is used", len(problems))}
	}
	return nil
}
