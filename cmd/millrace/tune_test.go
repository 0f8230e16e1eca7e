package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer"
)

const closeWait = "net.netfilter.nf_conntrack_tcp_timeout_close_wait"

// asksConntrack is what somebody with a kube-proxy may have, without what belongs to
// the whole machine.
const asksConntrack = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nconntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s}\n"

// setting is one of the node's.
func (n *node) setting(name string) string {
	n.t.Helper()
	value, err := sysctl.Tree{Root: "/proc/sys", Netns: n.NetNS}.Read(name)
	if err != nil {
		n.t.Skip(err)
	}
	return value
}

// inside runs a command in the node's network namespace, as somebody on the node.
func (n *node) inside(args ...string) (stdout, stderr string, status int) {
	n.t.Helper()
	if err := n.Inside(func() error { stdout, stderr, status = millrace(n.t, args...); return nil }); err != nil {
		n.t.Fatal(err)
	}
	return stdout, stderr, status
}

// What a kube-proxy's configuration asks of connection tracking, by the commands a
// person would give: seen before, set, told, put back when nobody asks any more, set
// again after an agent was killed, put back by remove.
func TestConntrackOfKubeProxysConfiguration(t *testing.T) {
	n := newNode(t)
	before := n.setting(closeWait)
	if before == "3600" {
		t.Fatal("it is as it shall be: the test is blind")
	}
	config := filepath.Join(t.TempDir(), "kube-proxy.conf")
	write(t, config, asksConntrack)
	asks := []string{"--kube-proxy-config", config, "--kube-proxy-ports=false"}
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1"))

	change := "~ " + closeWait + " " + before + " -> 3600\n"
	stdout, _, _ := n.inside("plan", "--source", n.source(), "--pins", n.pins, "--run", n.run, "--kube-proxy-config", config)
	if !strings.Contains(stdout, change) {
		t.Errorf("plan lacks %q: %q", change, stdout)
	}
	if now := n.setting(closeWait); now != before {
		t.Errorf("plan has set it to %s", now)
	}
	n.start()
	if now := n.setting(closeWait); now != before {
		t.Errorf("nobody asked, and it is set to %s", now)
	}
	n.kill()

	n.start(asks...)
	if now := n.setting(closeWait); now != "3600" {
		t.Errorf("the agent is ready, and it is %s\n%s", now, n.log.String())
	}
	line := []string{closeWait, "3600", before, "conntrack.tcpCloseWaitTimeout", "of", config}
	for _, command := range []string{"status", "show"} {
		args := []string{command, "--run", n.run}
		if command == "show" {
			args = []string{"show", "settings", "--run", n.run}
		}
		if stdout, _, status := n.inside(args...); status != exitOK || !strings.Contains(strings.Join(strings.Fields(stdout), " "), strings.Join(line, " ")) {
			t.Errorf("%s, exit status %d, lacks %q:\n%s", command, status, line, stdout)
		}
	}
	stdout, _, _ = n.inside("show", "settings", "--run", n.run, "-o", "json")
	var shown struct{ Settings []layer.Value }
	if err := json.Unmarshal([]byte(stdout), &shown); err != nil || len(shown.Settings) != 1 || shown.Settings[0].Before != before {
		t.Errorf("show settings -o json: %q, %v", stdout, err)
	}

	n.kill()
	if stdout, _, _ := n.inside("show", "settings", "--run", n.run); !strings.Contains(stdout, closeWait) {
		t.Errorf("without an agent: %q", stdout)
	}
	n.start()
	n.until("what nobody asks for any more is put back", func(agent.Status) bool { return n.setting(closeWait) == before })
	n.kill()

	n.start(asks...)
	n.kill()
	dry, _, _ := n.inside("remove", "--dry-run", "--pins", n.pins, "--run", n.run)
	removed, _, status := n.inside("remove", "--pins", n.pins, "--run", n.run)
	if change := "- " + closeWait + " 3600 -> " + before + "\n"; !strings.HasPrefix(removed, change) || dry != removed || status != exitOK {
		t.Errorf("remove --dry-run says\n%s and remove, exit status %d,\n%s", dry, status, removed)
	}
	if now := n.setting(closeWait); now != before {
		t.Errorf("remove has left %s", now)
	}
	if _, err := os.Stat(n.run); !os.IsNotExist(err) {
		t.Errorf("the run folder is left: %v", err)
	}
}

// The manifest names the configuration by a variable, which a ConfigMap may leave out.
func TestConfigurationNamedByVariable(t *testing.T) {
	folder := t.TempDir()
	command := product("plan", "--source", "dir:"+folder)
	command.Env = append(os.Environ(), configVariable+"="+filepath.Join(folder, "absent"))
	if _, stderr, status := finish(t, command); status != exitData || !strings.Contains(stderr, "absent: no such file") {
		t.Errorf("exit status %d, %q", status, stderr)
	}
}
