package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/millrace/millrace/source/kube"
)

const (
	// mostNodesWindow is how long nodes may watch: nobody stops one whose caller has gone.
	mostNodesWindow = 10 * time.Minute
	// nodesReading is what reading a node before and after may take beside the window.
	nodesReading = time.Minute
	// mostNodesAtOnce are asked at the same time.
	mostNodesAtOnce = 64
	// mostSaid bounds what is kept of what a node says.
	mostSaid  = 32 << 20
	everyNode = "all"
)

// agentsOn are those on the nodes that are asked for, of each of which there has to be one.
func agentsOn(ctx context.Context, settings kube.Settings, nodes []string) ([]*kube.Agent, error) {
	agents, err := kube.Agents(ctx, settings)
	if err != nil {
		return nil, err
	}
	if len(agents) == 0 {
		return nil, &failure{exitIncomplete, errors.New("no agent of millrace runs in this cluster: docs/install.md says how to get one, and `millrace trace` on a node needs none")}
	}
	slices.SortFunc(agents, func(a, b *kube.Agent) int { return strings.Compare(a.Node, b.Node) })
	if slices.Equal(nodes, []string{everyNode}) {
		return agents, nil
	}
	for _, name := range nodes {
		if !slices.ContainsFunc(agents, func(a *kube.Agent) bool { return a.Node == name }) {
			return nil, usage("--nodes %s: no agent of millrace runs there", name)
		}
	}
	return slices.DeleteFunc(agents, func(a *kube.Agent) bool { return !slices.Contains(nodes, a.Node) }), nil
}

// reply is what millrace wrote on a node, or why it did not.
type reply struct {
	node string
	out  []byte
	err  error
}

// askNodes runs millrace in agents' containers, in many at the same time. It may end with
// one of these statuses.
func askNodes(ctx context.Context, agents []*kube.Agent, command []string, patience time.Duration, statuses ...int) []reply {
	return each(agents, func(a *kube.Agent) reply { return askNode(ctx, a, command, patience, statuses) })
}

// each calls f with many at the same time, and returns what it returns in their order.
func each[T any](all []T, f func(T) reply) []reply {
	results := make([]reply, len(all))
	room := make(chan struct{}, mostNodesAtOnce)
	var asked sync.WaitGroup
	for i, one := range all {
		asked.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			results[i] = f(one)
		})
	}
	asked.Wait()
	return results
}

func askNode(ctx context.Context, a *kube.Agent, command []string, patience time.Duration, statuses []int) reply {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("it has not answered in %s", patience))
	defer cancel()
	out, wrong := bounded{most: mostSaid}, bounded{most: 8 << 10}
	status, err := a.Exec(ctx, command, &out, &wrong)
	switch {
	case err != nil && ctx.Err() != nil:
		err = fmt.Errorf("run millrace in pod %s/%s: %w", a.Namespace, a.Name, context.Cause(ctx))
	case err == nil && !slices.Contains(statuses, status):
		err = fmt.Errorf("exit status %d: %s", status, strings.TrimSpace(wrong.String()))
	}
	return reply{a.Node, out.Bytes(), err}
}
