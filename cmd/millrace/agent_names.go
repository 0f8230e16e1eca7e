package main

import (
	"context"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/agent/resolver"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/dns"
	"github.com/millrace/millrace/layer/nodedns"
	"github.com/millrace/millrace/model"
)

// serveAgain is how long after an error queries are taken again.
const serveAgain = 10 * time.Second

// answering is the layer dns with the resolver behind it, which answers what the kernel
// does not.
type answering struct {
	*dns.Layer
	// node sends what the node asks, too; nil where that is off.
	node     *nodedns.Layer
	resolver *resolver.Resolver
	log      *slog.Logger
}

// answersFor puts the resolver behind the layer dns, if that is among the layers; it
// returns nil where it is not. Both say as much when the source was last heard so long ago.
func answersFor(zone string, heard func() time.Time, layers []layer.Layer, log *slog.Logger) *answering {
	a := &answering{log: log}
	for i, l := range layers {
		switch l := l.(type) {
		case *nodedns.Layer:
			a.node = l
		case *dns.Layer:
			a.Layer, layers[i] = l, a
		}
	}
	if a.Layer == nil {
		return nil
	}
	settings := resolver.Settings{
		Zone: zone, Heard: heard, DenyFor: dns.DenyFor, SayFor: dns.SayFor, Service: dns.DefaultService, Sink: a.Layer, Log: log,
	}
	if a.node != nil {
		settings.Control = a.node.Own // the servers to ask may be the DNS Service
	}
	a.resolver = resolver.New(settings)
	return a
}

// heard is a source whose Snapshots the resolver has too.
type heard struct {
	agent.Source
	take func(*model.Snapshot)
}

// Run implements agent.Source.
func (h heard) Run(ctx context.Context, deliver func(*model.Snapshot)) error {
	return h.Source.Run(ctx, func(s *model.Snapshot) {
		h.take(s)
		deliver(s)
	})
}

// serve answers queries until ctx ends.
func (a *answering) serve(ctx context.Context) {
	var learns sync.WaitGroup
	defer learns.Wait()
	defer a.resolver.Close()
	learns.Go(func() { a.resolver.Run(ctx) })
	var serving sync.WaitGroup
	defer serving.Wait()
	if a.node != nil {
		serving.Go(func() {
			a.insist(ctx, "what the node asks is left to the cluster's DNS servers", func() error {
				return a.node.Serve(ctx, func(ctx context.Context, q nodedns.Query) ([]byte, bool) {
					return a.resolver.Resolve(ctx, fromNode, q.Message)
				})
			})
		})
	}
	a.insist(ctx, "names are left to the cluster's DNS servers where the kernel has no answer", func() error {
		return a.Serve(ctx, func(ctx context.Context, q dns.Query) ([]byte, bool) {
			return a.resolver.Resolve(ctx, strconv.Itoa(q.Device), q.Message)
		})
	})
}

// fromNode stands for the node where pods have their devices.
const fromNode = "node"

// insist serves again and again until ctx ends; meanwhile is what an error means.
func (a *answering) insist(ctx context.Context, meanwhile string, serve func() error) {
	for ctx.Err() == nil {
		err := serve()
		if ctx.Err() != nil {
			return
		}
		a.log.Error(meanwhile, "error", err, "again_in", serveAgain)
		select {
		case <-ctx.Done():
		case <-time.After(serveAgain):
		}
	}
}

// Describe adds what became of the queries that the agent was handed.
func (a *answering) Describe() (layer.Description, error) {
	d, err := a.Layer.Describe()
	if err != nil || d.Reasons == nil {
		return d, err
	}
	s := a.resolver.Status()
	for source, n := range s.Queries {
		d.Reasons["agent_"+source] = n
	}
	if len(s.Down) > 0 {
		d.Degraded = append(d.Degraded, "these DNS servers do not answer: "+strings.Join(s.Down, ", ")+"; names outside the cluster are answered from what is known, others are left to the cluster's DNS servers")
	}
	return d, nil
}
