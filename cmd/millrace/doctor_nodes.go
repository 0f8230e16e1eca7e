package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/doctor/report"
	"github.com/millrace/millrace/source/kube"
)

// comparesWithCluster says that a check compares a node with its cluster.
func comparesWithCluster(c doctor.Check) bool { return c.Scope != doctor.Whole && c.NeedsCluster() }

// fittingNodes are the checks for several nodes.
func (e *examination) fittingNodes(chosen []doctor.Check) ([]doctor.Check, error) {
	onNodes := func(c doctor.Check) bool { return c.Scope != doctor.Whole }
	chosen = slices.DeleteFunc(chosen, comparesWithCluster)
	if !slices.ContainsFunc(chosen, onNodes) {
		return nil, usage("--only %s: none of these checks looks at nodes from afar: leave out --nodes", strings.Join(e.only, ","))
	}
	return chosen, nil
}

// target is a node, and the agent that runs there, nil if none does.
type target struct {
	node  string
	agent *kube.Agent
}

// there looks at nodes and, once, at the objects of their cluster.
func (e *examination) there(ctx context.Context, checks []doctor.Check, progress io.Writer) (*report.Report, error) {
	cluster := &report.Report{Header: e.header()}
	_, kubeconfig, _ := strings.Cut(e.from.source, ":")
	at := kube.Settings{Kubeconfig: kubeconfig, Servers: e.from.servers}
	targets, err := e.targets(ctx, at, &cluster.Header)
	if err != nil {
		return nil, err
	}
	objects := slices.DeleteFunc(slices.Clone(checks), func(c doctor.Check) bool { return c.Scope != doctor.Whole })
	if len(objects) > 0 {
		facts, err := e.facts(ctx, objects, progress)
		if err != nil {
			return nil, err
		}
		cluster.Results = doctor.Run(facts, objects)
	}
	fmt.Fprintf(progress, "ask %d nodes, which read counters twice in %s\n", len(targets), e.window)
	command := e.command(checks)
	compared := slices.ContainsFunc(checks, func(c doctor.Check) bool { return c.Scope == doctor.Among })
	var answers []report.Answer
	for _, r := range each(targets, func(t target) reply { return e.ask(ctx, at, t, command) }) {
		a := report.Answer{Node: r.node, Err: r.err}
		if r.err == nil {
			a.Report, a.Err = report.Read(fromBrace(r.out))
		}
		answers = append(answers, a)
	}
	if err := context.Cause(ctx); err != nil {
		return nil, fmt.Errorf("ask nodes: %w", err)
	}
	r := report.Join(answers, cluster, compared)
	if r.Header.Answered() == 0 {
		var failed error
		for _, n := range r.Header.Nodes { // Join has made them fit for a terminal
			failed = errors.Join(failed, fmt.Errorf("node %s: %s", n.Name, n.Error))
		}
		return nil, &failure{exitIncomplete, failed}
	}
	return r, nil
}

// command is what nodes run: all that they know, or the checks that were named.
func (e *examination) command(checks []doctor.Check) []string {
	command := []string{"doctor", "-o", "json", "--for", e.window.String(), "--severity", e.severity}
	if len(e.only) == 0 {
		return command
	}
	var ids []string
	for _, c := range checks {
		if c.Scope != doctor.Whole {
			ids = append(ids, c.ID)
		}
	}
	return append(command, "--only", strings.Join(ids, ","))
}

// doctorStatuses are those with which doctor has written a report.
var doctorStatuses = []int{exitOK, exitFindings, exitIncomplete}

func (e *examination) ask(ctx context.Context, at kube.Settings, t target, command []string) reply {
	patience := e.window + nodesReading
	switch {
	case t.agent != nil:
		return askNode(ctx, t.agent, command, patience, doctorStatuses)
	case e.image == "":
		return reply{node: t.node, err: errors.New("no agent of millrace runs there: `millrace doctor pods IMAGE` looks without one")}
	}
	out, status, err := kube.NewErrand(t.node, e.image, command, patience).Run(ctx, at)
	if err == nil && !slices.Contains(doctorStatuses, status) {
		err = fmt.Errorf("exit status %d: %.500s", status, strings.TrimSpace(string(out)))
	}
	return reply{t.node, out, err}
}

// fromBrace leaves out what is told for people before a report: a pod's log has both.
func fromBrace(out []byte) io.Reader {
	const begin = "{\n"
	if at := bytes.Index(out, []byte("\n"+begin)); !bytes.HasPrefix(out, []byte(begin)) && at >= 0 {
		out = out[at+1:]
	}
	return bytes.NewReader(out)
}

// targets are the nodes that are asked for. Nodes without an agent are known only to who
// may list nodes.
func (e *examination) targets(ctx context.Context, at kube.Settings, h *report.Header) (all []target, err error) {
	agents, err := kube.Agents(ctx, at)
	if err != nil {
		return nil, err
	}
	nodes, err := nodeNames(ctx, at)
	if err != nil {
		h.Unseen = append(h.Unseen, fmt.Sprintf("nodes without an agent: %v", err))
	}
	for _, a := range agents {
		if !slices.ContainsFunc(all, func(t target) bool { return t.node == a.Node }) {
			all = append(all, target{a.Node, a})
		}
	}
	for _, name := range nodes {
		if !slices.ContainsFunc(all, func(t target) bool { return t.node == name }) {
			all = append(all, target{node: name})
		}
	}
	if len(all) == 0 {
		return nil, &failure{exitIncomplete, cmp.Or(err, errors.New("the cluster has no nodes"))}
	}
	slices.SortFunc(all, func(a, b target) int { return strings.Compare(a.node, b.node) })
	if slices.Equal(e.nodes, []string{everyNode}) {
		return all, nil
	}
	for _, name := range e.nodes {
		if !slices.ContainsFunc(all, func(t target) bool { return t.node == name }) {
			return nil, usage("--nodes %s: the cluster has no such node", name)
		}
	}
	return slices.DeleteFunc(all, func(t target) bool { return !slices.Contains(e.nodes, t.node) }), nil
}

// nodeNames are those of the cluster's Nodes.
func nodeNames(ctx context.Context, at kube.Settings) (names []string, err error) {
	api, err := kube.OpenAPI(at)
	if err != nil {
		return nil, err
	}
	err = api.Objects(ctx, "/api/v1/nodes", func(object []byte) error {
		var node struct{ Metadata struct{ Name string } }
		err := json.Unmarshal(object, &node)
		names = append(names, node.Metadata.Name)
		return err
	})
	return names, err
}
