package main

import (
	"context"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
)

func agentCommand(s *settings) *cobra.Command {
	var at place
	var from wishes
	var metrics string
	var dryRun bool
	var proxy standIn
	c := command(&cobra.Command{
		Use:   "agent --source dir:PATH|kube:PATH|kube:",
		Short: "Keep this node's kernel as the cluster asks",
		Long: `
Runs until it is stopped. What it has put into the kernel stays in force
without it, and the next agent takes it over: stopping, restarting and
upgrading lose no packet. Needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; where pods ask for a
path by annotation also CAP_SYS_ADMIN and CAP_SYS_PTRACE, to find their network
namespaces.`,
	}, changesHost, func(ctx context.Context, _ []string) error {
		from.names = at.dns != ""
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
		layers, err := at.layers()
		if err != nil {
			return err
		}
		if err := at.removeUnwanted(log); err != nil {
			return err
		}
		// The agent's heap is small and changes in bursts: collecting it more
		// often keeps the resident set near what is live.
		debug.SetGCPercent(50)
		return agent.Run(ctx, agent.Config{
			Node: at.node, Version: version, Source: source, SourceName: from.source, Layers: layers,
			RunFolder: at.run, Metrics: metrics, KubeProxy: kubeProxy, Served: untaint(&from, at.node, log), Log: log, Started: started,
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

// removeUnwanted takes away what an earlier agent left of a layer that is switched off
// now.
func (p *place) removeUnwanted(log *slog.Logger) error {
	if p.dns != "" {
		return nil
	}
	names := p.names()
	removed, err := names.Remove()
	for _, change := range removed {
		log.Info(change.String(), "layer", names.Name())
	}
	return err
}

func logger(s *settings) *slog.Logger {
	if s.json() {
		return slog.New(slog.NewJSONHandler(os.Stderr, nil))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, nil))
}
