package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/layer/service"
	"github.com/millrace/millrace/model"
)

func explainCommand(s *settings) *cobra.Command {
	var at place
	var from wishes
	c := command(&cobra.Command{
		Use:   "explain PROTO SRC[:PORT] DST:PORT",
		Short: "What happens to a packet, and why",
		Long: `
Asks the programs in force what they would do with the first packet of a flow, or
with the call that would send it: who decides, what, to which endpoints with
which probability. It reads the agent's pinned maps and sends nothing; with
--source it needs no agent. PROTO is tcp or udp. SRC can be the name of a pod,
DST that of a Service, as in
  millrace explain tcp shop/client-1 shop/web:80
  millrace explain udp 10.244.1.4 10.96.0.10:53 -o json
  millrace explain tcp fd00:244::4 [fd00:96::1]:80 --source dir:shop --node n1
Needs CAP_BPF and CAP_NET_ADMIN.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 3 {
				return usage("say PROTO SRC[:PORT] DST:PORT, as in `millrace explain tcp 10.244.1.4 10.96.0.10:80`")
			}
			return nil
		},
	}, readsOnly, func(ctx context.Context, args []string) error {
		return explain(ctx, s, &at, &from, args)
	}, exitData, exitUnavailable, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	at.flagNode(c)
	at.flagPath(c)
	from.flagsAs(c, "ask without an agent, for this cluster: "+sourceForms)
	return c
}

func explain(ctx context.Context, s *settings, at *place, from *wishes, args []string) error {
	if _, err := service.ParsePath(at.path); err != nil {
		return usage("--path: %v", err)
	}
	in, known, err := surroundings(ctx, at, from)
	if err != nil {
		return err
	}
	explainer, err := service.OpenExplainer(in, known)
	if err != nil {
		return err
	}
	defer explainer.Close()
	question, err := explainer.Question(args[0], args[1], args[2])
	if err != nil {
		return usage("%v", err)
	}
	answer, err := explainer.Explain(question)
	if err != nil {
		return err
	}
	if s.json() {
		err = printJSON(answer)
	} else {
		err = printExplanation(&answer)
	}
	return errors.Join(err, problemsError(known.Snapshot.Problems))
}

// surroundings are the settings in force and what is known of the cluster: from
// the manifests, or from the agent that runs here.
func surroundings(ctx context.Context, at *place, from *wishes) (service.Settings, service.Known, error) {
	in := service.Settings{Node: at.node, Path: service.Path(at.path)}
	if from.source != "" {
		snapshot, err := firstSnapshot(ctx, from, at.node)
		if err != nil {
			return in, service.Known{}, err
		}
		return in, service.Known{Snapshot: snapshot}, isNode(at.node, snapshot)
	}
	in.Pins = filepath.Join(at.pins, "service")
	known := service.Known{Snapshot: &model.Snapshot{}}
	if err := askAgent(ctx, at, &in, &known); err != nil {
		fmt.Fprintf(os.Stderr, "no names, and --path %s is believed: %v\n", at.path, err)
	}
	return in, known, nil
}

// isNode refuses a node that the manifests do not know: every packet would come
// by its wire.
func isNode(name string, snapshot *model.Snapshot) error {
	var known []string
	for _, n := range snapshot.Nodes {
		known = append(known, n.Name)
	}
	if len(known) == 0 || slices.Contains(known, name) {
		return nil
	}
	return usage("--node %s: the manifests have no such Node: name one of %s", name, strings.Join(known[:min(len(known), 8)], ", "))
}

// askAgent learns what the kernel does not know: names, and the node's settings.
func askAgent(ctx context.Context, at *place, in *service.Settings, known *service.Known) error {
	var status agent.Status
	if err := agent.Ask(ctx, at.run, "/status", &status); err != nil {
		return err
	}
	in.Node = status.Node
	if path := defaultPath(ctx, at); path != "" {
		in.Path = path
	}
	for path, into := range map[string]any{
		"/wanted/service": &known.Rows, "/pods": &known.Snapshot.Pods, "/nodes": &known.Snapshot.Nodes,
	} {
		if err := agent.Ask(ctx, at.run, path, into); err != nil {
			return err
		}
	}
	return nil
}

func printExplanation(e *service.Explanation) error {
	source := e.Source.String()
	if e.Source.Port() == 0 {
		source = e.Source.Addr().String()
	}
	fmt.Printf("%s %s -> %s: %s, path %s\n", e.Protocol, source, e.Destination, bold(string(e.Verdict)), e.Path)
	fmt.Println(e.Text)
	if len(e.Backends) == 0 {
		return nil
	}
	fmt.Println()
	t := newTable(os.Stdout, "BACKEND", "PROBABILITY", "NODE", "SOURCE BECOMES")
	for _, b := range e.Backends {
		becomes := "-"
		if b.Masquerade {
			becomes = e.Destination.Addr().String()
		}
		t.row(b.Address.String(), fmt.Sprintf("%.2f %%", 100*b.Probability), orDash(b.Node), becomes)
	}
	return t.print()
}
