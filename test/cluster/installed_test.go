package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What docs/install.md says, on the cluster of `make cluster-up CLUSTER='--proxy
// millrace'`: go test -C test/cluster -run Installed -v.

// root is the root of the repository, from here.
const root = "../.."

func needsInstalled(t *testing.T) {
	t.Helper()
	if os.Getenv("MILLRACE_INSTALLED") == "" {
		t.Skip("alters a cluster that is up: asked for by MILLRACE_INSTALLED=1")
	}
	for _, file := range []string{millraceManifest, millraceRemoval} {
		if _, err := os.Stat(filepath.Join(root, file)); err != nil {
			t.Fatalf("what would be installed again is not there (make image): %v", err)
		}
	}
	who, err := os.ReadFile(filepath.Join(root, servedBy()))
	if err != nil || strings.TrimSpace(string(who)) != "millrace" {
		t.Skip("needs a cluster with millrace: make cluster-up CLUSTER='--proxy millrace'")
	}
	if err := exec.Command(folder+"/kubectl", "get", "--raw", "/readyz").Run(); err != nil {
		t.Skip("needs a cluster that is up: make cluster-up CLUSTER='--proxy millrace'")
	}
	before := nodes
	nodes = nodesThere()
	t.Cleanup(func() { nodes = before })
}

// kubectlOf the cluster that is up; what it says has to be wanted.
func kubectlOf(t *testing.T, arguments ...string) string {
	t.Helper()
	text, err := output(exec.Command(folder+"/kubectl", arguments...))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// on runs a shell command on a node.
func on(t *testing.T, n node, command string) string {
	t.Helper()
	text, err := output(exec.Command(folder+"/node", strconv.Itoa(int(n)), "sh", "-c", command))
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// The agent runs with these capabilities of capabilities(7) and no other, without
// a way to get more, behind seccomp's filter.
func TestInstalledAgentHasSixCapabilities(t *testing.T) {
	needsInstalled(t)
	const netAdmin, sysPtrace, sysAdmin, syslog, perfmon, bpf = 12, 19, 21, 34, 38, 39
	set := fmt.Sprintf("%016x", 1<<netAdmin|1<<sysPtrace|1<<sysAdmin|1<<syslog|1<<perfmon|1<<bpf)
	want := map[string]string{"CapEff": set, "CapPrm": set, "CapBnd": set, "CapAmb": strings.Repeat("0", 16), "NoNewPrivs": "1", "Seccomp": "2"}
	for _, n := range allNodes() {
		has := map[string]string{}
		for line := range strings.Lines(on(t, n, "cat /proc/$(pidof millrace)/status")) {
			name, value, _ := strings.Cut(line, ":")
			has[name] = strings.TrimSpace(value)
		}
		for name, value := range want {
			if has[name] != value {
				t.Errorf("%s: the agent's %s is %s, not %s", n.name(), name, has[name], value)
			}
		}
	}
}

// What kube-proxy's configuration asks of connection tracking is in force on each
// node, set through the one folder that the container was given for it.
func TestInstalledSetsConntrack(t *testing.T) {
	needsInstalled(t)
	const closeWait = "net.netfilter.nf_conntrack_tcp_timeout_close_wait"
	for _, n := range allNodes() {
		if value := strings.TrimSpace(on(t, n, "cat /proc/sys/"+strings.ReplaceAll(closeWait, ".", "/"))); value != "3600" {
			t.Errorf("%s: %s is %s", n.name(), closeWait, value)
		}
	}
	shown := strings.Join(strings.Fields(kubectlOf(t, "-n", "kube-system", "exec", "ds/millrace", "--", "/millrace", "show", "settings")), " ")
	if want := closeWait + " 3600 60 conntrack.tcpCloseWaitTimeout of configmap:kube-system/kube-proxy"; !strings.Contains(shown, want) {
		t.Errorf("show settings lacks %q: %s", want, shown)
	}
	if said := kubectlOf(t, "-n", "kube-system", "exec", "ds/millrace", "--", "/millrace", "status"); strings.Contains(said, "degraded: not as configmap") {
		t.Errorf("status: %s", said)
	}
}

const shop = `
apiVersion: v1
kind: Namespace
metadata: {name: installed}
---
apiVersion: v1
kind: Service
metadata: {name: shop, namespace: installed}
spec: {selector: {app: shop}, ports: [{port: 80, targetPort: 9376}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: shop, namespace: installed}
spec:
  replicas: 3
  selector: {matchLabels: {app: shop}}
  template:
    metadata: {labels: {app: shop}}
    spec:
      containers: [{name: shop, image: "AGNHOST", imagePullPolicy: Never, args: [serve-hostname],
        readinessProbe: {httpGet: {port: 9376, path: /}, periodSeconds: 1}}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: client, namespace: installed}
spec:
  selector: {matchLabels: {app: client}}
  template:
    metadata: {labels: {app: client}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: client, image: "AGNHOST", imagePullPolicy: Never, command: [sh, -c, 'while true; do curl -s -m 2 -o /dev/null http://shop.installed.svc.cluster.local/ && echo yes || echo no; done']}]
`

// openShop starts three servers, a Service before them, and a client on each node
// that calls it without end.
func openShop(t *testing.T) {
	t.Helper()
	closeShop := func() {
		_ = exec.Command(folder+"/kubectl", "delete", "namespace", "installed", "--ignore-not-found").Run()
	}
	closeShop()
	t.Cleanup(closeShop)
	applyWithAgnhost(t, shop)
	kubectlOf(t, "-n", "installed", "rollout", "status", "deployment/shop", "--timeout=1m")
	kubectlOf(t, "-n", "installed", "rollout", "status", "daemonset/client", "--timeout=1m")
	calls(t, 10)
}

// calls waits until each client has called so many times more, and returns how
// many of all calls since then failed.
func calls(t *testing.T, more int) (failed int) {
	t.Helper()
	pods := strings.Fields(kubectlOf(t, "-n", "installed", "get", "pods", "-l", "app=client", "-o", "name"))
	for _, pod := range pods {
		before := strings.Count(kubectlOf(t, "-n", "installed", "logs", pod), "\n")
		err := until(t.Context(), "calls of "+pod, time.Minute, func() error {
			text := kubectlOf(t, "-n", "installed", "logs", pod)
			lines := strings.Fields(text)
			if len(lines) < before+more {
				return fmt.Errorf("%d calls of %d", len(lines)-before, more)
			}
			failed += strings.Count(strings.Join(lines[before:], " "), "no")
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return failed
}

// allCalls are those from the beginning on.
func allCalls(t *testing.T) (all, failed int) {
	t.Helper()
	for _, pod := range strings.Fields(kubectlOf(t, "-n", "installed", "get", "pods", "-l", "app=client", "-o", "name")) {
		text := kubectlOf(t, "-n", "installed", "logs", pod)
		all += strings.Count(text, "\n")
		failed += strings.Count(text, "no\n")
	}
	return all, failed
}

// Agents that are replaced one after the other, as in an upgrade, and a DaemonSet
// that is deleted: nobody notices, and what changes afterwards is followed again.
func TestInstalledAgentsAreReplacedWithoutLoss(t *testing.T) {
	needsInstalled(t)
	openShop(t)
	_, failedBefore := allCalls(t)
	for range 3 {
		kubectlOf(t, "-n", "kube-system", "rollout", "restart", "daemonset/millrace")
		kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m")
	}
	kubectlOf(t, "-n", "kube-system", "delete", "daemonset", "millrace", "--wait")
	t.Cleanup(func() {
		_, _ = output(exec.Command(folder+"/kubectl", "apply", "-f", filepath.Join(root, millraceManifest)))
	})
	for _, n := range allNodes() {
		err := until(t.Context(), "the agent of "+n.name()+" to end", time.Minute, func() error {
			if pid := strings.TrimSpace(on(t, n, "pidof millrace || true")); pid != "" {
				return fmt.Errorf("process %s runs", pid)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	calls(t, 100) // nobody is there but what is in the kernel
	kubectlOf(t, "apply", "-f", filepath.Join(root, millraceManifest))
	kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m")
	calls(t, 10)
	all, failed := allCalls(t)
	if failed > failedBefore {
		t.Errorf("%d of %d calls failed", failed-failedBefore, all)
	}
	t.Logf("%d calls from %d nodes, %d failed, while agents were replaced three times and taken away once", all, nodes, failed-failedBefore)
	kubectlOf(t, "-n", "installed", "rollout", "restart", "deployment/shop")
	kubectlOf(t, "-n", "installed", "rollout", "status", "deployment/shop", "--timeout=1m")
	if failed := calls(t, 20); failed > 0 {
		t.Errorf("%d calls failed after the servers were replaced", failed)
	}
}

// What is installed is removed by its documented commands, on every node, and can
// be installed again.
func TestInstalledIsRemoved(t *testing.T) {
	needsInstalled(t)
	manifest, removal := filepath.Join(root, millraceManifest), filepath.Join(root, millraceRemoval)
	t.Cleanup(func() {
		kubectlOf(t, "apply", "-f", manifest)
		kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m")
	})
	kubectlOf(t, "-n", "kube-system", "delete", "daemonset", "millrace")
	t.Cleanup(func() { kubectlOf(t, "delete", "-f", removal, "--ignore-not-found") })
	kubectlOf(t, "apply", "-f", removal)
	kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace-remove", "--timeout=1m")
	for _, n := range allNodes() {
		left := on(t, n, "ls -d /sys/fs/bpf/millrace /run/millrace/* 2>/dev/null; nft list tables | grep millrace; tc filter show dev eth0 ingress | grep millrace; grep -v '^60$' /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait; true")
		if left = strings.TrimSpace(left); left != "" {
			t.Errorf("%s still has %s", n.name(), left)
		}
	}
}
