package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	tuneManifest = "deploy/tune.yaml"
	idleTimeout  = "net.netfilter.nf_conntrack_tcp_timeout_established"
)

// keeper is a `millrace tune keep` in the namespace of an apiBed, as the DaemonSet's on a
// node would be.
type keeper struct {
	*apiBed
	node, metrics string
	command       *exec.Cmd
	log           string
}

// keep starts one with the rights of the DaemonSet's service account.
func (b *apiBed) keep(node, metrics string) *keeper {
	b.t.Helper()
	k := &keeper{apiBed: b, node: node, metrics: metrics, log: filepath.Join(b.folder, node+".log")}
	log, err := os.Create(k.log)
	b.want(err)
	k.command = b.inside(b.millrace, "tune", "keep", "configmap:kube-system/millrace-tune", "--source", "kube:"+b.folder+"/tune",
		"--node", node, "--run", filepath.Join(b.folder, node), "--metrics", metrics, "--for", "1s")
	k.command.Stdout, k.command.Stderr = log, log
	b.want(k.command.Start())
	b.t.Cleanup(func() { k.command.Process.Kill(); k.command.Wait(); log.Close() })
	return k
}

func (b *apiBed) said(words ...string) string {
	b.t.Helper()
	c := b.inside(words...)
	text, err := c.Output()
	if err != nil {
		b.t.Fatalf("%s: %v: %s", strings.Join(words, " "), err, text)
	}
	return strings.TrimSpace(string(text))
}

func (b *apiBed) get(words ...string) string {
	b.t.Helper()
	return b.said(append([]string{filepath.Join(b.bin, "kubectl"), "--kubeconfig", b.folder + "/admin"}, words...)...)
}

// trial is what the Lease says: "spreading jit n1".
func (b *apiBed) trial() string {
	return b.get("-n", "kube-system", "get", "lease", "millrace-tune", "-o",
		`jsonpath={.metadata.annotations.millrace\.io/phase} {.metadata.annotations.millrace\.io/choice} {.spec.holderIdentity}`)
}

func (b *apiBed) value(setting string) string {
	b.t.Helper()
	return b.said("cat", "/proc/sys/"+strings.ReplaceAll(setting, ".", "/"))
}

func (b *apiBed) sysctl(setting, value string) {
	b.t.Helper()
	b.must(b.inside("sh", "-c", fmt.Sprintf("echo %s > /proc/sys/%s", value, strings.ReplaceAll(setting, ".", "/"))))
}

// becomes waits for what is to be, and says what is instead.
func (b *apiBed) becomes(want string, is func() string) {
	b.t.Helper()
	err := until(b.t.Context(), want, 3*time.Minute, func() error {
		if now := is(); now != want {
			return fmt.Errorf("it is %q", now)
		}
		return nil
	})
	if err != nil {
		logs, _ := filepath.Glob(b.folder + "/n?.log")
		for _, log := range logs {
			b.t.Logf("%s: %s", log, read(b.t, log))
		}
		b.t.Fatal(err)
	}
}

// seenEvent is an Event of a Node.
type seenEvent struct {
	Reason, Message, Type string
	Count                 int
	InvolvedObject        struct{ Kind, Name string }
}

// events are those of a Node with a reason.
func (b *apiBed) events(reason string) (all []seenEvent) {
	b.t.Helper()
	var list struct{ Items []seenEvent }
	if err := json.Unmarshal([]byte(b.get("get", "events", "-o", "json")), &list); err != nil {
		b.t.Fatal(err)
	}
	return slices.DeleteFunc(list.Items, func(e seenEvent) bool { return e.Reason != reason || e.InvolvedObject.Kind != "Node" })
}

func (b *apiBed) choose(data string) {
	b.t.Helper()
	b.want(b.kubectl("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: millrace-tune, namespace: kube-system}\ndata: "+data+"\n", "apply", "-f", "-"))
}

// Two nodes that have one network namespace keep what a ConfigMap of a real API server
// chooses, with the rights of deploy/tune.yaml: a change begins where the label says, or
// at one of them; who is fought stops it; without an API server what is set is kept; and
// the rights are for nothing else.
func TestKeepWithRealObjects(t *testing.T) {
	b := newAPIBed(t)
	b.want(b.kubectl(strings.ReplaceAll(string(read(t, filepath.Join(root, tuneManifest))), "millrace:TAG", "example.com/millrace:v1"), "apply", "-f", "-"))
	b.want(b.kubectl("{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {pool: canary}}}\n---\n{apiVersion: v1, kind: Node, metadata: {name: n2}}\n", "apply", "-f", "-"))
	token := b.get("-n", "kube-system", "create", "token", "millrace-tune")
	admin := string(read(t, b.folder+"/admin"))
	b.want(os.WriteFile(b.folder+"/tune", []byte(strings.ReplaceAll(admin, "admin-token", token)), 0o600))
	b.tuneMayNothingElse()

	second := b.keep("n2", "127.0.0.1:9472")
	b.becomes("TuneUnknown", func() string { // there is no ConfigMap yet
		for _, e := range b.events("TuneUnknown") {
			if strings.Contains(e.Message, `configmaps "millrace-tune" not found`) && e.InvolvedObject.Name == "n2" && e.Type == "Warning" {
				return e.Reason
			}
		}
		return second.text()
	})
	before := b.value(idleTimeout)
	b.choose("{keep: conntrack-idle, first: pool=canary}")
	b.becomes("0", func() string { return second.metric(`millrace_tune_rollout{state="set"}`) })
	if b.value(idleTimeout) != before {
		t.Error("n2 has set it, which has not the label")
	}
	first := b.keep("n1", "127.0.0.1:9471")
	b.becomes("86400", func() string { return b.value(idleTimeout) })
	b.becomes("spreading conntrack-idle n1", b.trial)
	if tried, spread := b.events("TuneTried"), b.events("TuneSpreads"); len(tried) != 1 || len(spread) != 1 || spread[0].InvolvedObject.Name != "n1" ||
		tried[0].Message != "conntrack-idle is tried on this node for 5s, and then set on the others" {
		t.Errorf("Events: %+v, %+v", tried, spread)
	}
	b.becomes("1", func() string { return second.metric(`millrace_tune_rollout{state="set"}`) })

	// Without a label one of the two is the first.
	b.choose("{keep: conntrack-idle jit}")
	b.becomes("spreading conntrack-idle jit", func() string { return strings.TrimSuffix(strings.TrimSuffix(b.trial(), " n1"), " n2") })

	// Without an API server.
	b.want(b.api.Process.Signal(syscall.SIGSTOP))
	for _, k := range []*keeper{first, second} {
		b.becomes("0", func() string { return k.metric("millrace_tune_api_server_answers") })
	}
	b.sysctl(idleTimeout, "1000")
	b.becomes("86400", func() string { return b.value(idleTimeout) })
	b.want(b.api.Process.Signal(syscall.SIGCONT))

	// Nothing is chosen: what was kept is put back, which is what somebody had set last.
	b.choose("{keep: ''}")
	b.becomes("1000", func() string { return b.value(idleTimeout) })
	b.sysctl(idleTimeout, before)

	// Somebody sets back what is set.
	b.choose("{keep: conntrack-idle, first: pool=canary}")
	b.becomes("86400", func() string { return b.value(idleTimeout) })
	pest := b.inside("sh", "-c", fmt.Sprintf("while sleep 0.2; do echo 50000 > /proc/sys/%s; done", strings.ReplaceAll(idleTimeout, ".", "/")))
	b.want(pest.Start())
	t.Cleanup(func() { pest.Process.Kill(); pest.Wait() })
	b.becomes("stopped conntrack-idle n1", b.trial)
	b.becomes("1", func() string { return second.metric(`millrace_tune_rollout{state="stopped"}`) })
	why := b.events("TuneStopped")
	if len(why) != 1 || !strings.Contains(why[0].Message, "somebody has set it to 50000 since: it was set 3 times within 10m0s") ||
		!strings.Contains(why[0].Message, "To try again: kubectl -n kube-system annotate lease millrace-tune millrace.io/phase-") {
		t.Errorf("why it was stopped: %+v", why)
	}
	for _, k := range []*keeper{first, second} {
		b.want(k.command.Process.Signal(syscall.SIGTERM))
		if err := k.command.Wait(); err != nil {
			t.Errorf("%s ended with %v: %s", k.node, err, k.text())
		}
	}
}

func (k *keeper) text() string { return string(read(k.t, k.log)) }

// metric is a line of what Prometheus reads, without its name.
func (k *keeper) metric(name string) string {
	text, err := k.inside("curl", "-s", "-m", "10", "http://"+k.metrics+"/metrics").Output()
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		k.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, is := strings.CutPrefix(line, name+" "); is {
			return strings.TrimSpace(value)
		}
	}
	return "no " + name
}

// tuneMayNothingElse tries with its token what it does not need.
func (b *apiBed) tuneMayNothingElse() {
	b.t.Helper()
	for words, want := range map[string]string{
		"get configmap/millrace-tune -n kube-system":     "yes",
		"get lease/millrace-tune -n kube-system":         "yes",
		"patch lease/millrace-tune -n kube-system":       "yes",
		"create events -n default":                       "yes",
		"get node/n1":                                    "yes",
		"update configmap/millrace-tune -n kube-system":  "no",
		"patch configmap/millrace-tune -n kube-system":   "no",
		"get configmap/millrace -n kube-system":          "no",
		"list configmap -n kube-system":                  "no",
		"patch lease/another -n kube-system":             "no",
		"delete lease/millrace-tune -n kube-system":      "no",
		"patch lease/n1 -n kube-node-lease":              "no",
		"create events -n kube-system":                   "no",
		"list events -n default":                         "no",
		"delete events -n default":                       "no",
		"list nodes":                                     "no",
		"patch node/n1":                                  "no",
		"list pods -A":                                   "no",
		"get secret/x -n kube-system":                    "no",
		"create pods --subresource exec -n kube-system":  "no",
		"update daemonset/millrace-tune -n kube-system":  "no",
		"watch configmap/millrace-tune -n kube-system":   "no",
		"create clusterrolebindings":                     "no",
		"list leases.coordination.k8s.io -n kube-system": "no",
	} {
		c := b.inside(append([]string{filepath.Join(b.bin, "kubectl"), "--kubeconfig", b.folder + "/tune", "auth", "can-i"}, strings.Fields(words)...)...)
		text, _ := c.Output() // "no" is an exit status
		if got := strings.TrimSpace(string(text)); got != want {
			b.t.Errorf("may it %s? %q, not %s", words, got, want)
		}
	}
}
