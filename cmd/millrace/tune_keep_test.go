package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/tune"
	"github.com/millrace/millrace/layer/tune/knob"
	"github.com/millrace/millrace/test/metrics"
)

const established = "net.netfilter.nf_conntrack_tcp_timeout_established"

// keeping is a `millrace tune keep` that runs on the node.
type keeping struct {
	*workshop
	command *exec.Cmd
	mu      sync.Mutex
	said    bytes.Buffer
}

func (k *keeping) Write(p []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.said.Write(p)
}

func (k *keeping) text() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.said.String()
}

func (w *workshop) keep(words ...string) *keeping {
	w.t.Helper()
	k := &keeping{workshop: w, command: product(append([]string{"tune", "keep", "--for", "1s", "--run", w.folder}, words...)...)}
	k.command.Stdout, k.command.Stderr = k, k
	w.must(netns.Do(w.node, k.command.Start))
	w.t.Cleanup(func() { k.command.Process.Kill(); k.command.Wait() })
	return k
}

// stop it as a kubelet does; it must end well.
func (k *keeping) stop() {
	k.t.Helper()
	k.must(k.command.Process.Signal(unix.SIGTERM))
	if err := k.command.Wait(); err != nil {
		k.t.Errorf("it ended with %v: %s", err, k.text())
	}
}

func (k *keeping) until(what string, is func() bool) {
	k.t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			k.t.Fatalf("not so within a minute: %s; it said\n%s", what, k.text())
		}
	}
}

func (k *keeping) becomes(space, setting, value string) {
	k.t.Helper()
	k.until(fmt.Sprintf("%s of %s is %s", setting, filepath.Base(space), value), func() bool { return k.value(space, setting) == value })
}

// metrics are what Prometheus reads in the node's namespace.
func (k *keeping) metrics() (text string) {
	answer, err := clientIn(k.node).Get("http://127.0.0.1:9471/metrics")
	if err != nil {
		return err.Error()
	}
	defer answer.Body.Close()
	all, _ := io.ReadAll(answer.Body)
	return string(all)
}

// anotherPod is a namespace beside the pod's.
func (w *workshop) anotherPod(name string) string {
	w.t.Helper()
	path := filepath.Join(filepath.Dir(w.pod), name)
	w.must(netns.Create(path))
	w.t.Cleanup(func() { netns.Remove(path) })
	net, err := link.Open(w.node)
	w.must(err)
	defer net.Close()
	_, err = net.Veth(link.Veth{Name: "veth-" + name, Peer: "eth0", PeerNamespace: path})
	w.must(err)
	w.podIn(path, name)
	return path
}

// What is chosen is set on the node and in pods that start from then on, set again when
// somebody sets it otherwise, left to who does so again and again, and stays when nobody
// keeps it any more.
func TestTuneKeep(t *testing.T) {
	w := newWorkshop(t)
	w.podIs("old")
	w.wants(exitOK, "~ "+established+" 432000 -> 86400 (node, conntrack-idle)", "keep", "conntrack-idle", "--dry-run")
	if w.value(w.node, established) != "432000" {
		t.Error("a dry run has set it")
	}
	k := w.keep("conntrack-idle")
	k.becomes(w.node, established, "86400")
	k.until("metrics say that it is held", func() bool { return strings.Contains(k.metrics(), `millrace_tune_settings{state="held"} 1`+"\n") })
	fresh := w.anotherPod("new-1")
	k.becomes(fresh, established, "86400")
	if w.value(w.pod, established) != "432000" {
		t.Error("a pod that ran already was set")
	}
	for range 3 {
		w.sysctl(w.node, established, "1000")
		k.becomes(w.node, established, "86400")
	}
	w.sysctl(w.node, established, "1000")
	k.until("metrics say that it is left", func() bool {
		return strings.Contains(k.metrics(), `millrace_tune_drift{knob="conntrack-idle",scope="node"} 1`+"\n")
	})
	metrics.Listed(t, "../..", "millrace tune keep", k.metrics())
	if want := "conntrack_tcp_timeout_established of node was set to 86400, and somebody has set it to 1000 since: it was set 3 times within 10m0s, and each time somebody set it otherwise again: now it is left to them"; !strings.Contains(k.text(), want) {
		t.Errorf("it did not say %q: %s", want, k.text())
	}
	if w.value(w.node, established) != "1000" {
		t.Error("it was not left")
	}
	_, stderr, status := inNode(w, "tune", "keep", "conntrack-idle", "--run", w.folder, "--metrics", "")
	if status != exitFailed || !strings.Contains(stderr, layer.ErrInUse.Error()) {
		t.Errorf("a second one: exit status %d, %s", status, stderr)
	}
	k.stop()
	if w.value(fresh, established) != "86400" {
		t.Error("it was put back because a process ended")
	}
	w.wants(exitFindings, "", "status")
	k = w.keep("conntrack-idle") // it tries again
	k.becomes(w.node, established, "86400")
	k.stop()
	w.wants(exitOK, "- "+established+" 86400 -> 432000 (pod new-1, conntrack-idle)", "undo", "--all")
	if w.value(fresh, established) != "432000" || w.value(w.node, established) != "1000" {
		t.Error("not as before, or not as somebody had set it")
	}
}

// A pod that started while nobody looked does not wait until a round is over.
func TestTuneKeepSeesToPodsAtOnce(t *testing.T) {
	w := newWorkshop(t)
	w.podIs("old")
	k := w.keep("conntrack-idle", "--metrics", "")
	k.becomes(w.node, established, "86400")
	k.stop()
	fresh := w.anotherPod("new-1")
	k = w.keep("conntrack-idle", "--metrics", "", "--for", "1h")
	k.becomes(fresh, established, "86400")
	k.becomes(w.anotherPod("new-2"), established, "86400")
	k.stop()
	if w.value(w.pod, established) != "432000" {
		t.Error("a pod that ran already was set")
	}
	w.wants(exitOK, "- "+established, "undo", "--all")
}

// What is not chosen any more is put back; what a person has set stays.
func TestTuneKeepLetsGo(t *testing.T) {
	const backlog = "net.ipv4.tcp_max_syn_backlog"
	w := newWorkshop(t)
	w.wants(exitOK, "~", "apply", "conntrack-idle")
	before := w.value(w.node, backlog)
	k := w.keep("syn-backlog", "--metrics", "")
	k.becomes(w.node, backlog, "4096")
	k.stop()
	k = w.keep("jit", "--metrics", "") // which is the whole machine's, and is so already
	k.becomes(w.node, backlog, before)
	k.stop()
	if w.value(w.node, established) != "86400" {
		t.Error("what a person has set was put back")
	}
	w.wants(exitOK, "- "+established, "undo", "--all")
}

func TestTuneKeepSaysWhatIsWrong(t *testing.T) {
	for _, row := range []struct{ args, says string }{
		{"", "say which: IDs of knobs, --profile, or configmap:NAMESPACE/NAME"},
		{"nonsense", `nothing that can be tuned is called "nonsense"`},
		{"tcp_tw_reuse", "net.ipv4.tcp_tw_reuse is left alone"},
		{"jit --for 1ms", "--for 1ms: use 1s to 1h"},
		{"jit --source kube:", "--source goes with configmap:NAMESPACE/NAME"},
		{"configmap:x", "configmap:x: write configmap:NAMESPACE/NAME"},
		{"configmap:a/b", "configmap:a/b goes with --source kube:"},
		{"configmap:a/b jit --source kube:/absent", "configmap:a/b says what is chosen: no IDs"},
	} {
		_, stderr, status := millrace(t, append([]string{"tune", "keep"}, strings.Fields(row.args)...)...)
		if status != exitUsage || !strings.Contains(stderr, row.says) {
			t.Errorf("tune keep %s: exit status %d, %q, not %q", row.args, status, stderr, row.says)
		}
	}
}

// A ConfigMap is read as it is written.
func TestChoiceOfAConfigMap(t *testing.T) {
	for _, row := range []struct {
		data map[string]string
		want string
	}{
		{map[string]string{keepKey: "conntrack-idle, accept-queue\nlatency"}, "accept-queue conntrack-idle latency"},
		{map[string]string{keepKey: "jit", podsKey: "true"}, "jit (existing pods)"},
		{map[string]string{keepKey: ""}, "nothing"},
		{map[string]string{"kept": "jit"}, `it has no key "keep"`},
		{map[string]string{keepKey: "jit", podsKey: "perhaps"}, `existing-pods: "perhaps" is neither true nor false`},
		{map[string]string{keepKey: "warp"}, `keep: nothing that can be tuned is called "warp"`},
	} {
		c, err := choiceOf(row.data)
		got := c.String()
		if err != nil {
			got = err.Error()
		}
		if !strings.HasPrefix(got, row.want) {
			t.Errorf("%v: %s, not %s", row.data, got, row.want)
		}
	}
}

// inNode runs the product in the node's namespace.
func inNode(w *workshop, args ...string) (stdout, stderr string, status int) {
	w.must(netns.Do(w.node, func() error { stdout, stderr, status = finish(w.t, product(args...)); return nil }))
	return stdout, stderr, status
}

// What a person has set is theirs for `tune keep`, and for nobody else; what is kept is not.
func TestTuneKeepKnowsWhoseItIs(t *testing.T) {
	node := tune.Place{Name: "node", Cookie: 7}
	for _, row := range []struct {
		kept, keeps bool
		want        knob.Holding
	}{
		{false, false, knob.Holding{}},
		{false, true, knob.Holding{Theirs: true}},
		{true, false, knob.Holding{}},
		{true, true, knob.Holding{Again: true}},
	} {
		w := &tuning{at: place{run: filepath.Join(t.TempDir(), "tune"), procSys: t.TempDir()}, keeps: row.keeps}
		folder := filepath.Join(w.at.procSys, "net", "core")
		if err := os.MkdirAll(folder, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(folder, "somaxconn"), "128\n")
		step := tune.Step{ID: "accept-queue", Place: node, Setting: somaxconn, From: "128", To: "8192", Kept: row.kept}
		if _, err := w.ledger().Apply([]tune.Step{step}); err != nil {
			t.Fatal(err)
		}
		space := &knob.Space{Name: "node", Held: map[string]knob.Holding{}}
		if err := w.holdings(&knob.Facts{Spaces: []*knob.Space{space}}, []tune.Place{node}); err != nil {
			t.Fatal(err)
		}
		row.want.Owner, row.want.Wrote, row.want.Ours = "accept-queue", "8192", true
		if got := space.Held[somaxconn]; got != row.want {
			t.Errorf("set by tune keep %t, for tune keep %t: %+v, want %+v", row.kept, row.keeps, got, row.want)
		}
	}
}
