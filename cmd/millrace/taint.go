package main

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/millrace/millrace/source/kube"
)

// startupTaint keeps pods off a node until Services work there, where the cluster
// registers its nodes with it: docs/install.md.
const startupTaint = "node.millrace.io/agent-not-ready"

// ownNodeRights are what an agent needs to change its own Node.
const ownNodeRights = "deploy/own-node.yaml"

// How long it takes until a taint that could not be taken off is tried again.
const (
	taintFirst = time.Second
	taintMost  = time.Minute
)

// untaint takes the startup taint off the Node if it is there; it is nil where there is
// no API server.
func untaint(from *wishes, node string, log *slog.Logger) func(context.Context) {
	kubeconfig, ok := strings.CutPrefix(from.source, "kube:")
	if !ok {
		return nil
	}
	settings := kube.Settings{Kubeconfig: kubeconfig, Servers: from.servers, Node: node}
	return func(ctx context.Context) {
		for wait := taintFirst; ctx.Err() == nil; wait = min(2*wait, taintMost) {
			was, err := kube.RemoveTaint(ctx, settings, startupTaint)
			if err == nil {
				if was {
					log.Info("startup taint removed", "key", startupTaint, "node", node)
				}
				return
			}
			log.Error("startup taint", "error", err, "rights", ownNodeRights, "again_in", wait)
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
		}
	}
}
