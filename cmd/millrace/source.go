package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/source/dir"
	"github.com/millrace/millrace/source/kube"
)

// wishes say where the cluster's wishes come from.
type wishes struct {
	// source is "dir:PATH", "kube:PATH" or "kube:".
	source string
	// servers are addresses of API servers.
	servers []string
	// names asks also for the Services that are for DNS alone.
	names bool
	// pods asks also for the configurations of ip-masq-agent and of flannel.
	pods bool
}

const sourceForms = "dir:PATH, a file or folder of manifests; kube:PATH, the API server that a kubeconfig names; kube: the one of the pod this runs in"

func (w *wishes) flags(c *cobra.Command) {
	w.flagsAs(c, "where the cluster's wishes come from: "+sourceForms+" (required)")
}

// flagsAs adds the flags where a source has another meaning.
func (w *wishes) flagsAs(c *cobra.Command, meaning string) {
	c.Flags().StringVar(&w.source, "source", "", meaning)
	c.Flags().StringSliceVar(&w.servers, "api-server", nil,
		"addresses of API servers, tried in turn instead of the one that kube: finds; no Service has to work for them (https://10.0.0.1:6443,...)")
}

// open makes the source for a node of that name.
func (w *wishes) open(node string) (agent.Source, error) {
	kind, path, named := strings.Cut(w.source, ":")
	switch {
	case w.source == "":
		return nil, usage("--source is missing: say --source dir:PATH or kube:PATH")
	case kind == "kube" && named:
		return checked(kube.Open(kube.Settings{Kubeconfig: path, Servers: w.servers, Node: node, Names: w.names, Masquerade: w.pods, Flannel: w.pods}))
	case len(w.servers) > 0:
		return nil, usage("--api-server goes with --source kube: only")
	case kind != "dir" || path == "":
		return nil, usage("--source %q: use dir:PATH, kube:PATH or kube:", w.source)
	}
	return checked(dir.Open(path))
}

func checked[S agent.Source](source S, err error) (agent.Source, error) {
	if err != nil {
		return nil, &failure{exitData, err}
	}
	return source, nil
}
