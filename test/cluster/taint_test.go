package main

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	startupTaint  = "node.millrace.io/agent-not-ready"
	taintManifest = "deploy/own-node.yaml"
)

// A node that has the taint of docs/install.md loses it once its agent serves, and no
// other; and with the rights that this takes, an agent can do nothing else to any Node.
func TestInstalledTakesTheStartupTaintOff(t *testing.T) {
	needsInstalled(t)
	try := func(arguments ...string) { _ = exec.Command(folder+"/kubectl", arguments...).Run() }
	all := allNodes()
	first, second := all[len(all)-1].name(), all[0].name()
	t.Cleanup(func() {
		try("delete", "-f", filepath.Join(root, taintManifest), "--ignore-not-found")
		try("taint", "node", first, startupTaint+"-", "example.com/other-")
	})
	kubectlOf(t, "taint", "node", first, startupTaint+"=:NoSchedule", "example.com/other=x:PreferNoSchedule", "--overwrite")
	kubectlOf(t, "-n", "kube-system", "rollout", "restart", "daemonset/millrace")
	kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m")
	taints := func() string {
		return kubectlOf(t, "get", "node", first, "-o", "jsonpath={range .spec.taints[*]}{.key}={.value}:{.effect} {end}")
	}
	// Without the rights it says what it lacks, and goes on.
	err := until(t.Context(), "an agent to say what it lacks", time.Minute, func() error {
		said := kubectlOf(t, "-n", "kube-system", "logs", "-l", "app.kubernetes.io/name=millrace", "--tail=-1")
		if !strings.Contains(said, "own-node.yaml") || !strings.Contains(taints(), startupTaint) {
			return fmt.Errorf("the taints are %s, and the agents say %s", taints(), said)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	kubectlOf(t, "apply", "-f", filepath.Join(root, taintManifest))
	err = until(t.Context(), "the taint to go", 3*time.Minute, func() error {
		if now := taints(); now != "example.com/other=x:PreferNoSchedule " {
			return fmt.Errorf("the taints are %s", now)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	// The agent takes it off once; flannel's annotations it may change beside it, too.
	kubectlOf(t, "taint", "node", first, startupTaint+"=:NoSchedule")
	token := tokenOfAgent(t, first)
	for _, row := range []struct{ path, patch, want string }{
		{second, `{"spec":{"unschedulable":true}}`, "may change no Node but the one it runs on"},
		{first, `{"spec":{"taints":null}}`, "may change no taint but " + startupTaint},
		{first, `{"spec":{"taints":[{"key":"example.com/other","value":"x","effect":"PreferNoSchedule"},{"key":"new","effect":"NoExecute"}]}}`, "may change no taint but " + startupTaint},
		{first, `{"spec":{"taints":[{"key":"` + startupTaint + `","effect":"NoExecute"},{"key":"example.com/other","value":"x","effect":"PreferNoSchedule"}]}}`, "may change no taint but " + startupTaint},
		{first, `{"metadata":{"labels":{"example.com/role":"x"}}}`, "may change nothing of a Node but a taint and annotations"},
		{first, `{"metadata":{"annotations":{"example.com/role":"x"}}}`, "may change no annotation of a Node but flannel's"},
		{second, `{"metadata":{"annotations":{"flannel.alpha.coreos.com/public-ip":"192.0.2.9"}}}`, "may change no Node but the one it runs on"},
		{first, `{"metadata":{"annotations":{"flannel.alpha.coreos.com/public-ip":"192.0.2.9"}}}`, "192.0.2.9"},
		{first, `{"spec":{"unschedulable":true}}`, "may change nothing of a Node but a taint and annotations"},
		{first + "/status", `{"status":{"phase":"Running"}}`, "cannot patch resource"},
	} {
		// Nothing would be changed, and an API server follows its policies by a watch.
		err := until(t.Context(), "it to be refused", time.Minute, func() error {
			said := on(t, all[0], fmt.Sprintf("curl -sk -m 10 -X PATCH -H 'Authorization: Bearer %s' -H 'Content-Type: application/merge-patch+json' -d '%s' '%s/api/v1/nodes/%s?dryRun=All'",
				token, row.patch, server, row.path))
			if !strings.Contains(said, row.want) {
				return errors.New(said)
			}
			return nil
		})
		if err != nil {
			t.Errorf("with the token of the agent of %s, %s of Node %s: %v", first, row.patch, row.path, err)
		}
	}
}

// tokenOfAgent is what somebody has who got hold of the token of the agent on a node.
func tokenOfAgent(t *testing.T, node string) string {
	t.Helper()
	pod := kubectlOf(t, "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=millrace", "--field-selector", "spec.nodeName="+node, "-o", "jsonpath={.items[0].metadata.name}")
	return strings.TrimSpace(kubectlOf(t, "-n", "kube-system", "create", "token", "millrace", "--bound-object-kind=Pod", "--bound-object-name="+pod))
}
