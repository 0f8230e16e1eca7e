package main

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/route"
	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/kube"
)

// How often is looked what flannel's nodes are to be told, and how long it takes at most
// until that is tried again.
const (
	toFlannelEvery = 500 * time.Millisecond
	toFlannelMost  = time.Minute
)

// toFlannel has this node's Node say to flannel's nodes what they have to know of it, as
// long as there are any; without pods, that there is nothing any more. It is nil where
// there is no API server.
func toFlannel(from *wishes, node string, layers []layer.Layer, log *slog.Logger) func(context.Context) {
	kubeconfig, ok := strings.CutPrefix(from.source, "kube:")
	if !ok {
		return nil
	}
	settings := kube.Settings{Kubeconfig: kubeconfig, Servers: from.servers, Node: node}
	say := func(ctx context.Context, is kube.Answer) bool {
		changed, err := kube.SayToFlannel(ctx, settings, is)
		if changed && err == nil {
			log.Info("flannel's annotations changed", "node", node)
		}
		if err != nil {
			log.Error("flannel's annotations", "error", err, "rights", ownNodeRights)
		}
		return err == nil
	}
	at := slices.IndexFunc(layers, func(l layer.Layer) bool { _, is := l.(*route.Layer); return is })
	if at < 0 {
		return func(ctx context.Context) { insist(ctx, func() bool { return say(ctx, route.WithoutMillrace) }) }
	}
	routes := layers[at].(*route.Layer)
	return func(ctx context.Context) {
		for pause(ctx, toFlannelEvery) {
			insist(ctx, func() bool {
				want, ok := routes.ToFlannel()
				return ok || say(ctx, func(*model.Flannel, []netip.Addr) (*model.Flannel, bool) { return want, true })
			})
		}
	}
}

// insist tries something until it succeeds, or ctx ends.
func insist(ctx context.Context, try func() bool) {
	for wait := time.Second; !try() && pause(ctx, wait); wait = min(2*wait, toFlannelMost) {
	}
}

// pause waits, and says whether ctx goes on.
func pause(ctx context.Context, long time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(long):
		return true
	}
}
