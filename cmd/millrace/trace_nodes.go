package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/millrace/millrace/layer/trace/cause"
	"github.com/millrace/millrace/source/kube"
)

// traceNodes watches on nodes where agents run, all at the same time, and tells what
// they say as one.
func (w *watching) traceNodes(ctx context.Context, s *settings, args []string) error {
	kubeconfig, named := strings.CutPrefix(w.from.source, "kube:")
	switch {
	case !named:
		return usage("--nodes goes with --source kube:PATH, which says where the agents are")
	case w.window <= 0 || w.window > mostNodesWindow:
		return usage("--nodes takes --for 1s to %s: a node goes on watching when nobody is there any more", mostNodesWindow)
	case len(w.spaces) > 0 || w.pcap != "":
		return usage("--netns and --pcap are of one node: leave out --nodes, or run them there")
	}
	known, err := readNames(ctx, &w.at, &w.from)
	if err != nil {
		return err
	}
	command := []string{"trace"}
	if _, _, err := known.parseAsked(args); err != nil {
		return err
	}
	for _, arg := range args {
		if known.isFilter(arg) {
			command = append(command, arg)
			continue
		}
		spelled, err := known.spelled(arg)
		if err != nil {
			return err
		}
		command = append(command, spelled)
	}
	command = append(command, "--for", w.window.String(), "-o", "json")
	agents, err := agentsOn(ctx, kube.Settings{Kubeconfig: kubeconfig, Servers: w.from.servers}, w.nodes)
	if err != nil {
		return err
	}
	p := newProgress()
	fmt.Fprintf(p, watchingWord+" %d nodes %s", len(agents), w.until())
	all := askNodes(ctx, agents, command, w.window+nodesReading, exitOK, exitFindings)
	p.done()
	r, err := joined(readAnswers(all))
	if err != nil {
		return err
	}
	known.describe(r.Verdicts)
	return r.tell(s)
}

// spelled is an end as any node understands it: a pod's name only its own node knows,
// Services' all do.
func (n *names) spelled(arg string) (string, error) {
	if _, err := n.parseEnd(arg); err != nil {
		return "", err
	}
	name, port, given := strings.Cut(arg, ":")
	if !slices.Contains(n.hosts(), name) {
		if !strings.Contains(arg, "/") && !isAddress(arg) && name != "" {
			return "", usage("%q: name a pod, a node, a Service or addresses with --nodes: each node has network namespaces of its own", arg)
		}
		return arg, nil
	}
	var all []string
	for _, addr := range n.of[name] {
		text := addr.String()
		if given && addr.Is6() {
			text = "[" + text + "]"
		}
		if given {
			text += ":" + port
		}
		all = append(all, text)
	}
	return strings.Join(all, ","), nil
}

func isAddress(text string) bool {
	_, pair := netip.ParseAddrPort(text)
	_, one := netip.ParseAddr(strings.Trim(text, "[]"))
	return pair == nil || one == nil
}

// answer is what a node said, or why it did not.
type answer struct {
	node   string
	report *traceReport
	err    error
}

func readAnswers(all []reply) (answers []answer) {
	for _, one := range all {
		a := answer{node: one.node, err: one.err}
		if one.err == nil {
			if err := json.Unmarshal(one.out, &a.report); err != nil {
				a.err = fmt.Errorf("its answer cannot be read, is it of another version? %w", err)
			}
		}
		answers = append(answers, a)
	}
	return answers
}

// joined makes one report of those of all nodes. A node that did not answer is told
// among what was not seen; it fails if none did.
func joined(all []answer) (*traceReport, error) {
	r := &traceReport{Version: 1, Nodes: []string{}, Namespaces: []string{}, Verdicts: []cause.Verdict{}, Times: []stepTime{}, Folded: []folded{}, Missing: []string{}}
	var kernels []string
	var failed error
	for _, a := range all {
		if a.err != nil {
			why := fmt.Sprintf("node %s: %s", a.node, visible(strings.ReplaceAll(a.err.Error(), "\n", "; ")))
			failed = errors.Join(failed, errors.New(why))
			r.Missing = append(r.Missing, why)
			continue
		}
		on := func(name string) string { return a.node + ": " + name }
		r.Nodes = append(r.Nodes, a.node)
		r.WindowSeconds = max(r.WindowSeconds, a.report.WindowSeconds)
		r.Others += a.report.Others
		r.Lost += a.report.Lost
		if !slices.Contains(kernels, a.report.Kernel) {
			kernels = append(kernels, a.report.Kernel)
		}
		for _, name := range a.report.Namespaces {
			r.Namespaces = append(r.Namespaces, on(name))
		}
		for _, v := range a.report.Verdicts {
			v.Where.Node = a.node
			r.Verdicts = append(r.Verdicts, v)
		}
		for _, t := range a.report.Times {
			t.From.Namespace, t.To.Namespace = on(t.From.Namespace), on(t.To.Namespace)
			r.Times = append(r.Times, t)
		}
		for _, f := range a.report.Folded {
			f.Namespace = on(f.Namespace)
			r.Folded = append(r.Folded, f)
		}
		for _, m := range a.report.Missing {
			r.Missing = append(r.Missing, on(m))
		}
	}
	if len(r.Nodes) == 0 {
		return nil, &failure{exitIncomplete, failed}
	}
	r.Node, r.Kernel = strings.Join(r.Nodes, ", "), strings.Join(kernels, ", ")
	return r, nil
}
