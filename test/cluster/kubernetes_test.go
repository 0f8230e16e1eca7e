package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// conformanceTests is how many of the Kubernetes project's conformance tests are about
// networking, in the version that go.mod names.
const conformanceTests = 47

// On a real cluster of this machine, where millrace was installed as users do it and no
// kube-proxy runs: the Kubernetes project's own conformance tests of networking, and
// then what docs/install.md promises. A cluster that is up is taken down first.
func TestKubernetes(t *testing.T) {
	raise(t, "--proxy", "millrace")
	t.Run("conformance", judged)
	t.Setenv("MILLRACE_INSTALLED", "1")
	t.Run("capabilities", TestInstalledAgentHasSixCapabilities)
	t.Run("conntrack", TestInstalledSetsConntrack)
	t.Run("taint", TestInstalledTakesTheStartupTaintOff)
	t.Run("trace", TestInstalledTraceNamesTheCause)
	t.Run("doctor", TestInstalledDoctorOfAllNodes)
	t.Run("probes", TestInstalledDoctorProbes)
	t.Run("tune", TestInstalledKeepsSettings)
	t.Run("names", TestInstalledAnswersNames)
	t.Run("replaced", TestInstalledAgentsAreReplacedWithoutLoss)
	t.Run("removed", TestInstalledIsRemoved)
	t.Run("pods", TestInstalledPodNetworkTakesOver)
}

// On one on which nobody else gives pods their network: every pod gets it here, those of
// different nodes speak to each other, and what docs/pod.md promises.
func TestKubernetesWithPodNetwork(t *testing.T) {
	raise(t, "--proxy", "millrace", "--cni", "millrace")
	t.Setenv("MILLRACE_INSTALLED", "1")
	t.Run("carries", TestPodNetworkCarries)
	t.Run("hostports", TestPodNetworkHostPorts)
	t.Run("shown", TestPodNetworkIsShown)
	t.Run("adds", TestPodNetworkAddsInTime)
	t.Run("killed", TestPodNetworkWithoutAgents)
	t.Run("removed", TestPodNetworkIsRemoved)
}

// raise brings a cluster up for one test. One that is up is taken down first.
func raise(t *testing.T, how ...string) {
	t.Helper()
	if os.Getenv("MILLRACE_CLUSTER") == "" {
		t.Skip("makes a cluster: make test-cluster runs it")
	}
	if err := controllersInVersion1(); err != nil {
		t.Skip(err)
	}
	if _, err := output(exec.Command("go", "build", "-o", filepath.Join(root, cacheFolder, "cluster"), ".")); err != nil {
		t.Fatal(err)
	}
	ours(t, context.Background(), "down")
	t.Cleanup(func() { ours(t, context.Background(), "down") })
	ours(t, t.Context(), "build")
	ours(t, t.Context(), append([]string{"up"}, how...)...)
}

// built is the folder with these tools of the cluster, which are made where a cluster is
// made anyway. From the root of the repository.
func built(t *testing.T, names []string) string {
	t.Helper()
	if os.Getenv("MILLRACE_CLUSTER") != "" {
		bin, err := build(t.Context(), toolsOf(names))
		if err != nil {
			t.Fatal(err)
		}
		return bin
	}
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			t.Skip("needs the binaries of the cluster, which take half an hour to build: make bench-api")
		}
	}
	return bin
}

// ours runs a command of the program that this package is.
func ours(t *testing.T, ctx context.Context, arguments ...string) {
	t.Helper()
	command := exec.CommandContext(ctx, cacheFolder+"/cluster", arguments...)
	command.Dir = root
	command.Cancel = func() error { return command.Process.Signal(os.Interrupt) }
	command.WaitDelay = time.Minute
	said, err := output(command)
	t.Log(said)
	if err != nil {
		t.Fatal(err)
	}
}

// judged is a test for each test of theirs. One that fails is tried a second time, on
// a machine of two cores; the log says which.
func judged(t *testing.T) {
	t.Run("all", func(t *testing.T) { ours(t, t.Context(), "conformance", "--attempts", "2") })
	ran, err := results(read(t, filepath.Join(root, cacheFolder, "report", "junit_01.xml")))
	if err != nil {
		t.Fatal(err)
	}
	if len(ran) < conformanceTests {
		t.Errorf("%d conformance tests ran, not %d", len(ran), conformanceTests)
	}
	for _, r := range ran {
		t.Run(r.Name, func(t *testing.T) {
			if r.Status != "passed" {
				t.Errorf("%s %s: .cache/cluster/report/e2e.log says more", r.Status, r.Skipped)
			}
		})
	}
}
