// Cluster is a real Kubernetes on one machine, for tests: etcd, kube-apiserver,
// controllers, scheduler, and three nodes with kubelet, containerd and CoreDNS, dual
// stack, and the Kubernetes project's own end-to-end tests to put to it.
//
//	cluster up [--proxy kube-proxy|millrace|none] [--mode nftables|iptables] [--cni ptp|millrace|flannel] [--nodes N]
//	cluster down
//	cluster conformance [--focus RE] [--skip RE] [--procs N] [--attempts N]
//	cluster record
//	cluster scale [--services N] [--proxies millrace,nftables,iptables-legacy]
//
// It is run by `make cluster-up` and its like, from the root of the repository, as
// root. The binaries come from the Go module proxy and are kept in
// .cache/cluster/bin as long as go.mod stays what it is; the container runtime is
// Debian's. Images are made of files of this machine, so nothing is pulled.
//
// In the kernel it makes network namespaces whose names begin with
// millrace-cluster-, and a cgroup of the same name for each node in every
// hierarchy; everything else is inside of these. The host's own network, firewall
// and sysctls are not touched. What it writes elsewhere is below
// /var/cache/millrace-cluster. Up takes 15 s and 1.2 GB of memory on an idle machine
// with two cores, once everything is built.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"
)

const usage = `usage: cluster COMMAND [flags]

  build        the binaries, into .cache/cluster/bin; nothing else on this host
  up           the cluster; only inside namespaces and cgroups of its own
  down         removes it, whatever is left of it
  conformance  the Kubernetes end-to-end tests of Services and networking
  record       what conformance found, into docs/conformance.md
  scale        from a write to the API to the first packet, with 10,000 Services;
               only inside namespaces and cgroups of its own

Exit status: 0 done, 1 not done or a test failed, 2 wrong usage.
`

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, command string, arguments []string) error {
	if runtime.GOOS != "linux" {
		return fmt.Errorf("run on %s: nodes are made of Linux namespaces", runtime.GOOS)
	}
	flags := flag.NewFlagSet(command, flag.ExitOnError)
	switch command {
	case "build":
		_ = flags.Parse(arguments) // ExitOnError: it does not return one
		_, err := build(ctx, append(clusterTools, testTools...))
		return err
	case "up":
		var w wish
		flags.StringVar(&w.proxy, "proxy", "kube-proxy", "who serves Services: kube-proxy, millrace, or none")
		flags.StringVar(&w.mode, "mode", "nftables", "the mode of kube-proxy: nftables or iptables")
		flags.StringVar(&w.cni, "cni", "ptp", "who gives pods their network: ptp, with static routes between nodes, millrace, or flannel")
		flags.IntVar(&nodes, "nodes", nodes, "how many nodes, 1 to 9, in three zones")
		_ = flags.Parse(arguments)
		return up(ctx, w)
	case "down":
		nodes = mostNodes
		_ = flags.Parse(arguments)
		return down(ctx)
	case "conformance":
		focus := flags.String("focus", `\[sig-network\].*\[Conformance\]`, "which tests, a regular expression over their names")
		skip := flags.String("skip", unfit, "which of them not; as it is, those that this cluster cannot pass")
		processes := flags.Int("procs", 8, "how many tests at once")
		attempts := flags.Int("attempts", 1, "how often one that fails is tried")
		_ = flags.Parse(arguments)
		nodes = nodesThere()
		return conformance(ctx, *focus, *skip, *processes, *attempts)
	case "record":
		_ = flags.Parse(arguments)
		return record()
	case "scale":
		var settings scaleSettings
		settings.flags(flags)
		_ = flags.Parse(arguments)
		return scale(ctx, &settings, arguments)
	case "scale-inside": // of ourselves, by scale
		var settings scaleSettings
		settings.flags(flags)
		_ = flags.Parse(arguments[1:])
		return scaleInside(ctx, arguments[0], &settings)
	case "scale-client": // of ourselves, by scale-inside
		return callServices()
	case "scale-server":
		return serveEndpoints()
	case "enter-node": // of ourselves, by up
		return enterNode(arguments)
	case "node": // of ourselves, by enter-node: the first process of a node
		return beNode(arguments)
	}
	fmt.Fprint(os.Stderr, usage)
	os.Exit(2)
	return nil
}

// say tells a person what is being done, with the seconds since the start.
func say(format string, values ...any) {
	fmt.Fprintf(os.Stderr, "%6.1f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, values...))
}

var began = time.Now()

// until asks again and again until the answer is nil, and otherwise says what the
// last answer was.
func until(ctx context.Context, what string, limit time.Duration, ask func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := ask()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait %v for %s: %w", limit, what, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// lastLines is the end of a text, for messages.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
