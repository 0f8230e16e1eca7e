package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
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
	var here nodeFacts
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
Needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 3 {
				return usage("say PROTO SRC[:PORT] DST:PORT, as in `millrace explain tcp 10.244.1.4 10.96.0.10:80`")
			}
			return nil
		},
	}, readsOnly, func(ctx context.Context, args []string) error {
		return explain(ctx, s, &at, &from, &here, args)
	}, exitData, exitUnavailable, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	at.flagNode(c)
	at.flagPath(c)
	at.flagWire(c)
	c.Flags().StringSliceVar(&here.addresses, "node-addresses", nil, "with --source: addresses of the node, beside those of its Node object")
	c.Flags().StringSliceVar(&here.ranges, "pod-cidrs", nil, "with --source: ranges of the node's pods, beside those of its Node object")
	from.flagsAs(c, "ask without an agent, for this cluster: "+sourceForms)
	c.AddCommand(explainDNSCommand(s))
	return c
}

func explain(ctx context.Context, s *settings, at *place, from *wishes, here *nodeFacts, args []string) error {
	if _, err := service.ParsePath(at.path); err != nil {
		return usage("--path: %v", err)
	}
	in, known, err := surroundings(ctx, at, from, here)
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
func surroundings(ctx context.Context, at *place, from *wishes, here *nodeFacts) (service.Settings, service.Known, error) {
	in := service.Settings{Node: at.node, Path: service.Path(at.path), Wire: at.wire}
	if from.source != "" {
		snapshot, err := firstSnapshot(ctx, from, at.node)
		if err != nil {
			return in, service.Known{}, err
		}
		if err := isNode(at.node, snapshot); err != nil {
			return in, service.Known{}, err
		}
		snapshot, err = here.in(snapshot, at.node)
		return in, service.Known{Snapshot: snapshot}, err
	}
	in.Pins = filepath.Join(at.pins, "service")
	known := service.Known{Snapshot: &model.Snapshot{}}
	if err := askAgent(ctx, at, &in, &known); err != nil {
		fmt.Fprintf(os.Stderr, "no names, and --path %s is believed: %v\n", at.path, err)
	}
	return in, known, nil
}

// nodeFacts is what flags say of a node.
type nodeFacts struct{ addresses, ranges []string }

// in is a Snapshot whose Node of this name has what flags say, too.
func (f *nodeFacts) in(snapshot *model.Snapshot, name string) (*model.Snapshot, error) {
	if len(f.addresses)+len(f.ranges) == 0 {
		return snapshot, nil
	}
	node := model.Node{Name: name}
	with := *snapshot
	with.Nodes = slices.Clone(snapshot.Nodes)
	at, there := slices.BinarySearchFunc(with.Nodes, name, func(n *model.Node, name string) int { return strings.Compare(n.Name, name) })
	if there {
		node = *with.Nodes[at]
	} else {
		with.Nodes = slices.Insert(with.Nodes, at, nil)
	}
	for _, text := range f.addresses {
		address, err := netip.ParseAddr(text)
		if err != nil {
			return nil, usage("--node-addresses %s: write an address such as 192.0.2.1", text)
		}
		node.Addresses = append(slices.Clip(node.Addresses), address.Unmap())
	}
	for _, text := range f.ranges {
		pods, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, usage("--pod-cidrs %s: write a range such as 10.244.1.0/24", text)
		}
		node.PodCIDRs = append(slices.Clip(node.PodCIDRs), pods.Masked())
	}
	with.Nodes[at] = &node
	return &with, nil
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
			if e.Path == service.FromWire {
				becomes = "the node's"
			}
		}
		t.row(b.Address.String(), fmt.Sprintf("%.2f %%", 100*b.Probability), orDash(b.Node), becomes)
	}
	return t.print()
}
