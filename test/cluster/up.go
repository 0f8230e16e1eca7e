package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

//go:embed coredns.yaml
var coreDNS string

// wish is what the cluster is to be: who serves Services, kube-proxy in which mode, and who
// gives pods their network.
type wish struct{ proxy, mode, cni string }

// ours says that millrace is to be installed.
func (w wish) ours() bool { return w.proxy == millrace || w.cni == millrace }

// millrace is the word for us, as who serves Services and as who gives pods their network.
const millrace = "millrace"

// check says what is wrong with the words.
func (w wish) check() error {
	switch {
	case !slices.Contains([]string{"kube-proxy", millrace, "none"}, w.proxy):
		return fmt.Errorf("--proxy %s: it is kube-proxy, millrace or none", w.proxy)
	case !slices.Contains([]string{"ptp", millrace, flannel}, w.cni):
		return fmt.Errorf("--cni %s: it is ptp, millrace or flannel", w.cni)
	case w.cni == millrace && w.proxy == "none":
		return errors.New("--cni millrace --proxy none: the agent serves Services, too; say --proxy millrace")
	}
	return nil
}

// up brings the cluster up, and returns when its nodes are ready, and CoreDNS, if
// somebody serves Services.
func up(ctx context.Context, w wish) error {
	if err := w.check(); err != nil {
		return err
	}
	if nodes < 1 || nodes > mostNodes {
		return fmt.Errorf("--nodes %d: use 1 to %d", nodes, mostNodes)
	}
	if err := controllersInVersion1(); err != nil {
		return err
	}
	bin, err := build(ctx, clusterTools)
	if err != nil {
		return err
	}
	if w.cni == flannel {
		if err := buildFlannel(ctx, bin); err != nil {
			return err
		}
	}
	if err := nothingThere(); err != nil {
		return err
	}
	say("network and credentials")
	if err := errors.Join(os.MkdirAll(folder+"/logs", 0o755), noteWhoServes(w), network(w), credentials(), scripts(bin)); err != nil {
		return err
	}
	say("images")
	if err := images(bin); err != nil {
		return fmt.Errorf("make images: %w", err)
	}
	if w.ours() {
		if err := takeImage(); err != nil {
			return err
		}
	}
	say("control plane")
	if err := startControlPlane(ctx, bin); err != nil {
		return fmt.Errorf("%w; logs are in %s/logs", err, folder)
	}
	if err := startNodes(ctx, bin, w); err != nil {
		return fmt.Errorf("%w; logs are in %s/logs and below %s", err, folder, node(1).file("logs"))
	}
	say("ready: %s/kubectl get pods -A", folder)
	return nil
}

// nothingThere says so if a cluster, or what is left of one, is in the way.
func nothingThere() error {
	for _, path := range append(namespacePaths(), folder) {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is there: a cluster is up, or was left over; make cluster-down removes it", path)
		}
	}
	return nil
}

func startNodes(ctx context.Context, bin string, w wish) error {
	if _, err := kubectl(ctx, bin, nodeObjects(), "create", "-f", "-"); err != nil {
		return err
	}
	if w.cni == flannel {
		if _, err := kubectl(ctx, bin, flannelObjects, "create", "-f", "-"); err != nil {
			return err
		}
	}
	say("nodes")
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, n := range allNodes() {
		command := inside(n.namespace(), self, "enter-node", n.name(), bin, w.proxy, w.mode, w.cni)
		if _, err := output(command); err != nil {
			return err
		}
	}
	if _, err := kubectl(ctx, bin, fillIn(coreDNS), "create", "-f", "-"); err != nil {
		return err
	}
	ready := func() error {
		_, err := kubectl(ctx, bin, "", "wait", "--for=condition=Ready", "node", "--all", "--timeout=2m")
		return err
	}
	// Nodes whose pods get their network from us are ready when we are there.
	steps := []func() error{ready}
	if w.cni == flannel {
		steps = append(steps, func() error { return installFlannel(ctx) })
	}
	if w.ours() {
		steps = append(steps, func() error { return install(ctx, bin, w) })
	}
	if w.cni == millrace {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	if w.proxy == "none" {
		return nil
	}
	say("CoreDNS")
	_, err = kubectl(ctx, bin, "", "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=2m")
	return err
}

// fillIn the addresses and versions that a manifest names in capitals.
func fillIn(manifest string) string {
	return strings.NewReplacer("DNS_V4", dnsV4, "DNS_V6", dnsV6, "COREDNS_IMAGE", coreDNSImage()).Replace(manifest)
}

// scripts to enter the cluster with, which need to know nothing.
func scripts(bin string) error {
	return errors.Join(
		write(folder+"/kubectl", fmt.Sprintf(kubectlScript, control, bin, kubeconfig), 0o755),
		write(folder+"/node", fmt.Sprintf(nodeScript, prefix, folder), 0o755))
}

const kubectlScript = `#!/bin/sh
# The API server is reached from the namespace of the control plane.
exec nsenter --net=/run/netns/%s -- %s/kubectl --kubeconfig %s "$@"
`

const nodeScript = `#!/bin/sh
# node 1 COMMAND...: a command on node 1, in its namespaces and its cgroups
n=$1
shift
for group in /sys/fs/cgroup/*/%[1]snode-$n; do echo $$ >"$group/cgroup.procs" || exit; done
exec nsenter --all --target "$(cat %[2]s/node-$n/pid)" -- "$@"
`

// down removes the cluster. It goes by the namespaces and cgroups that are there,
// not by what somebody wrote down, so that it does not matter how the cluster
// ended.
func down(ctx context.Context) error {
	if nothingThere() == nil {
		say("nothing is there")
		return nil
	}
	if err := endProcesses(ctx); err != nil {
		return err
	}
	if err := removeCgroups(ctx); err != nil {
		return err
	}
	for _, namespace := range namespaces() {
		if _, err := os.Stat("/run/netns/" + namespace); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if _, err := output(exec.Command("ip", "netns", "del", namespace)); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(folder); err != nil {
		return fmt.Errorf("remove %s: %w", folder, err)
	}
	say("removed")
	return nil
}

// endProcesses ends what is in our network namespaces, and waits for it. A node's
// first process takes all of the node with it, its pods included.
func endProcesses(ctx context.Context) error {
	return until(ctx, "processes of the cluster to end", 30*time.Second, func() error {
		var left []int
		for _, namespace := range namespaces() {
			pids, err := processes(namespace)
			if err != nil {
				return err
			}
			if slices.Contains(pids, os.Getpid()) {
				return fmt.Errorf("this process is in network namespace %s of the cluster: its first thread went there and did not come back", namespace)
			}
			left = append(left, pids...)
		}
		for _, pid := range left {
			kill(pid)
		}
		if len(left) > 0 {
			return fmt.Errorf("processes %v are still there", left)
		}
		return nil
	})
}

func namespacePaths() (paths []string) {
	for _, namespace := range namespaces() {
		paths = append(paths, filepath.Join("/run/netns", namespace))
	}
	return paths
}
