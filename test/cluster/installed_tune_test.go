package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	reservedPorts = "/proc/sys/net/ipv4/ip_local_reserved_ports"
	nodePortRange = "30000-32767"
	idleFile      = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"
)

const tunedPod = `
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: default}
spec:
  nodeName: NODE
  terminationGracePeriodSeconds: 0
  containers: [{name: pause, image: "AGNHOST", imagePullPolicy: Never, args: [pause]}]
`

// tuneBed is the DaemonSet of dist/millrace-tune.yaml on the cluster, with rounds of two
// seconds.
type tuneBed struct {
	*testing.T
	begun time.Time
}

func (b *tuneBed) choose(words string) {
	b.Helper()
	b.begun = time.Now()
	manifest := kubectlOf(b.T, "-n", "kube-system", "create", "configmap", "millrace-tune", "--dry-run=client", "-o", "yaml",
		"--from-literal=keep="+words, "--from-literal=first=kubernetes.io/hostname=node-2")
	b.apply(manifest)
}

func (b *tuneBed) apply(manifest string) {
	b.Helper()
	if err := applyText(manifest); err != nil {
		b.Fatal(err)
	}
}

func (b *tuneBed) reserved(n node) string {
	b.Helper()
	return strings.TrimSpace(on(b.T, n, "cat "+reservedPorts))
}

// becomes waits for what is to be.
func (b *tuneBed) becomes(what, want string, is func() string) {
	b.Helper()
	err := until(b.Context(), what, 3*time.Minute, func() error {
		if now := is(); now != want {
			return fmt.Errorf("it is %q", now)
		}
		return nil
	})
	if err != nil {
		b.Log(kubectlOf(b.T, "-n", "kube-system", "logs", "-l", "app.kubernetes.io/name=millrace-tune", "--tail=50", "--prefix"))
		b.Fatal(err)
	}
	b.Logf("%s after %.1f s", what, time.Since(b.begun).Seconds())
}

func (b *tuneBed) phase() string {
	b.Helper()
	return kubectlOf(b.T, "-n", "kube-system", "get", "lease", "millrace-tune", "-o", `jsonpath={.metadata.annotations.millrace\.io/phase} {.metadata.annotations.millrace\.io/choice}`)
}

// events are those of a Node with a reason.
func (b *tuneBed) events(n node, reason string) string {
	b.Helper()
	return kubectlOf(b.T, "get", "events", "--field-selector", "involvedObject.name="+n.name()+",reason="+reason, "-o", "jsonpath={range .items[*]}{.message}{'\\n'}{end}")
}

// idle is a pod's timeout of idle connections.
func (b *tuneBed) idle(pod string) string {
	b.Helper()
	return strings.TrimSpace(kubectlOf(b.T, "exec", pod, "--", "cat", idleFile))
}

func (b *tuneBed) startPod(name string, n node) {
	b.Helper()
	applyWithAgnhost(b.T, strings.NewReplacer("NAME", name, "NODE", n.name()).Replace(tunedPod))
	kubectlOf(b.T, "wait", "--for=condition=Ready", "pod/"+name, "--timeout=1m")
}

// What a ConfigMap chooses is set on the node that a label names, then on the others, is
// set again when somebody sets it otherwise, is given to pods that start, and is put back
// when nothing is chosen; by a DaemonSet with three capabilities.
func TestInstalledKeepsSettings(t *testing.T) {
	needsInstalled(t)
	b := &tuneBed{T: t, begun: time.Now()}
	try := func(arguments ...string) { _ = exec.Command(folder+"/kubectl", arguments...).Run() }
	manifest := string(read(t, filepath.Join(root, millraceTune)))
	t.Cleanup(func() {
		try("delete", "pod", "tuned-old", "tuned-new", "--ignore-not-found")
		try("-n", "kube-system", "delete", "configmap", "millrace-tune", "--ignore-not-found")
		try("delete", "-f", filepath.Join(root, millraceTune), "--ignore-not-found", "--wait")
		for _, n := range allNodes() { // what docs/tune.md says is left
			on(t, n, "rm -rf /run/millrace/tune")
		}
	})
	all := allNodes()
	first, other := all[1], all[0]
	for _, n := range all {
		if now := b.reserved(n); now != "" {
			t.Fatalf("%s reserves %s before", n.name(), now)
		}
	}
	b.startPod("tuned-old", first)
	b.choose("node-ports")
	b.apply(strings.Replace(manifest, "- --node=$(NODE_NAME)\n", "- --node=$(NODE_NAME)\n            - --for=2s\n", 1))
	b.becomes("the node of the label has it", nodePortRange, func() string { return b.reserved(first) })
	if others := b.reserved(all[0]) + b.reserved(all[2]); others != "" && strings.HasPrefix(b.phase(), "trying") {
		t.Errorf("others have %s, and it is tried", others)
	}
	for _, n := range all {
		b.becomes(n.name()+" has it", nodePortRange, func() string { return b.reserved(n) })
	}
	b.becomes("it spreads", "spreading node-ports", b.phase)
	if tried, spread := b.events(first, "TuneTried"), b.events(first, "TuneSpreads"); !strings.Contains(tried, "node-ports is tried on this node") || !strings.Contains(spread, "node-ports was well on this node") {
		t.Errorf("Events of %s: %q, %q", first.name(), tried, spread)
	}
	b.hasThreeCapabilities(first)

	b.begun = time.Now()
	on(t, other, "echo '' > "+reservedPorts)
	b.becomes("what somebody set back is set again", nodePortRange, func() string { return b.reserved(other) })
	b.becomes("an Event says so", "true", func() string {
		return fmt.Sprint(strings.Contains(b.events(other, "TuneDrift"), "ip_local_reserved_ports of node was set to "+nodePortRange+", and somebody has set it to - since: it is set again"))
	})

	b.choose("node-ports conntrack-idle")
	b.becomes("it spreads", "spreading conntrack-idle node-ports", b.phase)
	b.begun = time.Now()
	b.startPod("tuned-new", first)
	b.becomes("a pod that starts has it", "86400", func() string { return b.idle("tuned-new") })
	if now := b.idle("tuned-old"); now != "432000" {
		t.Errorf("a pod that ran already has %s", now)
	}

	b.choose("")
	for _, n := range all {
		b.becomes(n.name()+" has it no more", "", func() string { return b.reserved(n) })
	}
	b.becomes("nor has the pod", "432000", func() string { return b.idle("tuned-new") })
}

// hasThreeCapabilities of capabilities(7), and no way to get more.
func (b *tuneBed) hasThreeCapabilities(n node) {
	b.Helper()
	const netAdmin, sysPtrace, sysAdmin = 12, 19, 21
	set := fmt.Sprintf("%016x", 1<<netAdmin|1<<sysPtrace|1<<sysAdmin)
	said := on(b.T, n, "for p in $(pidof millrace); do tr '\\0' ' ' < /proc/$p/cmdline; grep -E 'Cap(Eff|Prm|Bnd)|NoNewPrivs|Seccomp:' /proc/$p/status | tr '\\n\\t' '  '; echo; done")
	for line := range strings.Lines(said) {
		if strings.Contains(line, " tune keep ") {
			if strings.Count(line, set) != 3 || !strings.Contains(line, "NoNewPrivs: 1") || !strings.Contains(line, "Seccomp: 2") {
				b.Errorf("%s: %s", n.name(), line)
			}
			return
		}
	}
	b.Errorf("%s: no process keeps settings: %s", n.name(), said)
}
