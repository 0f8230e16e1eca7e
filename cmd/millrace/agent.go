package main

import (
	"context"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/agent/resolver"
)

func agentCommand(s *settings) *cobra.Command {
	var at place
	var from wishes
	var metrics string
	var dryRun bool
	var proxy standIn
	c := command(&cobra.Command{
		Use:   "agent [pods] [nodedns] --source dir:PATH|kube:PATH|kube:",
		Args:  cobra.ArbitraryArgs,
		Short: "Keep this node's kernel as the cluster asks",
		Long: `
Runs until it is stopped. What it has put into the kernel stays in force
without it, and the next agent takes it over: stopping, restarting and
upgrading lose no packet. With the word pods it gives the node's pods their
network, too: it answers the CNI plugin, which is this program as a container
runtime starts it, keeps the routes to other nodes' pods, and masquerades what
pods send out of the cluster. With the word nodedns, and --dns, it answers also
what the node's own processes and hostNetwork pods ask the DNS Service. What is
not asked for any more it takes away when it starts. Needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; where pods ask for a
path by annotation also CAP_SYS_ADMIN and CAP_SYS_PTRACE, to find their network
namespaces; with --dns CAP_SYS_PTRACE, to read their search lists; with pods
CAP_SYS_ADMIN.`,
	}, changesHost, func(ctx context.Context, args []string) error {
		if err := at.also(args); err != nil {
			return err
		}
		from.names, from.pods = at.dns != "", at.pods
		if dryRun {
			return plan(ctx, s, &at, &from, &proxy)
		}
		log := logger(s)
		kubeProxy, err := proxy.read(ctx, &at, &from, log)
		if ctx.Err() != nil {
			return nil // stopped while it waited for the API server
		}
		if err != nil {
			return err
		}
		source, err := from.open(at.node)
		if err != nil {
			return err
		}
		if heard, ok := source.(interface{ Heard() time.Time }); ok {
			at.heard = heard.Heard
		}
		layers, err := at.layers()
		if err != nil {
			return err
		}
		at.removeUnwanted(log)
		served := both(untaint(&from, at.node, log), toFlannel(&from, at.node, layers, log))
		var queries func() []resolver.Query
		if answers := answersFor(at.dns, at.heard, layers, log); answers != nil {
			source = heard{source, answers.resolver.Take}
			served = both(served, answers.serve)
			queries = answers.resolver.Recent
		}
		// The agent's heap is small and changes in bursts: collecting it more
		// often keeps the resident set near what is live.
		debug.SetGCPercent(50)
		return agent.Run(ctx, agent.Config{
			Node: at.node, Version: version, Source: source, SourceName: from.source, Layers: layers, HostPorts: at.hostPorts,
			RunFolder: at.run, Metrics: metrics, KubeProxy: kubeProxy, Served: served, Queries: queries, Log: log, Started: started,
		})
	}, exitData, exitUnavailable, exitPrivilege)
	at.flagCgroup(c)
	at.flagPins(c)
	at.flagRun(c)
	at.flagProcSys(c)
	from.flags(c)
	at.flagNode(c)
	at.flagPath(c)
	at.flagFlows(c)
	at.flagConntrack(c)
	at.flagWire(c)
	at.flagDNS(c)
	proxy.flagConfig(c)
	proxy.flagPorts(c)
	c.Flags().StringVar(&metrics, "metrics", "127.0.0.1:9470", "address for Prometheus, /livez and /readyz; empty for none")
	c.Flags().BoolVar(&dryRun, "dry-run", false, "print what would change, change nothing and end")
	return c
}

// both does two things at once; each may be nil.
func both(one, other func(context.Context)) func(context.Context) {
	if one == nil {
		return other
	}
	if other == nil {
		return one
	}
	return func(ctx context.Context) {
		var doing sync.WaitGroup
		defer doing.Wait()
		doing.Go(func() { one(ctx) })
		other(ctx)
	}
}

// removeUnwanted takes away what an earlier agent left of a layer that is switched off
// now. What cannot be taken away keeps nobody from serving the others: it is said, and
// tried again at the next start.
func (p *place) removeUnwanted(log *slog.Logger) {
	for _, l := range p.pinned() {
		if !p.isOff(l) {
			continue
		}
		removed, err := l.Remove()
		for _, change := range removed {
			log.Info(change.String(), "layer", l.Name())
		}
		if err != nil {
			log.Error("a layer that is switched off is still here, in part or whole; it is tried again at the next start", "layer", l.Name(), "error", err)
		}
	}
}

func logger(s *settings) *slog.Logger {
	if s.json() {
		return slog.New(slog.NewJSONHandler(os.Stderr, nil))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, nil))
}
