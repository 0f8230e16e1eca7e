package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/queue"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/tune/knob"
)

const somaxconn = "net.core.somaxconn"

// workshop is a ward with a folder for what is set.
type workshop struct {
	*ward
	folder string
}

func newWorkshop(t *testing.T) *workshop {
	return &workshop{newWard(t), filepath.Join(t.TempDir(), "tune")}
}

func (w *workshop) value(space, name string) string {
	w.t.Helper()
	value, err := sysctl.Tree{Root: "/proc/sys", Netns: space}.Read(name)
	w.must(err)
	return value
}

// tune runs `millrace tune` on the node.
func (w *workshop) tune(args ...string) (stdout, stderr string, status int) {
	w.t.Helper()
	if args[0] == "plan" || args[0] == "apply" || args[0] == "prove" {
		args = append(args, "--for", "0.1s")
	}
	c := product(append([]string{"tune"}, append(args, "--run", w.folder)...)...)
	w.must(netns.Do(w.node, func() error { stdout, stderr, status = finish(w.t, c); return nil }))
	return stdout, stderr, status
}

func (w *workshop) wants(wantStatus int, wantSaid string, args ...string) string {
	w.t.Helper()
	stdout, stderr, status := w.tune(args...)
	if status != wantStatus || !strings.Contains(stdout+stderr, wantSaid) {
		w.t.Errorf("tune %s: exit status %d, not %d; printed %q, said %q; want %q", strings.Join(args, " "), status, wantStatus, stdout, stderr, wantSaid)
	}
	return stdout
}

// fullQueue holds a socket that listens in a namespace, with more connections than it takes.
func (w *workshop) fullQueue(space string) {
	w.t.Helper()
	w.must(netns.Do(space, func() error {
		server, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		w.must(err)
		w.t.Cleanup(func() { unix.Close(server) })
		at := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 8080}
		w.must(unix.Bind(server, at))
		w.must(unix.Listen(server, 1<<16))
		for range 4200 {
			client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			w.must(err)
			w.t.Cleanup(func() { unix.Close(client) })
			unix.Connect(client, at) // it is under way, or the queue is full
		}
		return nil
	}))
}

// What a finding justifies in a namespace: planned with what was seen, set there alone,
// told, told as drift when somebody sets it otherwise, and left to them then.
func TestTuneWhatAFindingJustifies(t *testing.T) {
	w := newWorkshop(t)
	w.fullQueue(w.pod)
	planned := w.wants(exitOK, "HS-04", "plan", "--netns", w.pod)
	if want := "~ net.core.somaxconn 4096 -> 8192 (namespace pod, accept-queue)\n    HS-04    sock_diag listeners: 127.0.0.1:8080"; !strings.Contains(planned, want) {
		t.Errorf("plan lacks %q:\n%s", want, planned)
	}
	if w.value(w.pod, somaxconn) != "4096" {
		t.Error("plan has set it")
	}
	w.wants(exitOK, "", "apply", "HS-04", "--netns", w.pod, "--dry-run")
	if w.value(w.pod, somaxconn) != "4096" {
		t.Error("a dry run has set it")
	}
	// The server listens since before, and keeps its queue.
	stdout, stderr, status := w.tune("apply", "HS-04", "--netns", w.pod)
	if status != exitFindings || stdout != "~ net.core.somaxconn 4096 -> 8192 (namespace pod, accept-queue)\n" || !strings.Contains(stderr, "still seen: HS-04 in namespace pod") || !strings.Contains(stderr, "start the server again") {
		t.Errorf("exit status %d, %q, %q", status, stdout, stderr)
	}
	if w.value(w.pod, somaxconn) != "8192" || w.value(w.node, somaxconn) != "4096" {
		t.Errorf("it is %s, and %s on the node", w.value(w.pod, somaxconn), w.value(w.node, somaxconn))
	}
	told := w.wants(exitOK, "net.core.somaxconn  namespace pod  8192  4096    accept-queue", "status")
	if !regexp.MustCompile(`accept-queue  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}  `).MatchString(told) {
		t.Errorf("the time has no zone: %s", told)
	}
	w.sysctl(w.pod, somaxconn, "1000")
	w.wants(exitFindings, "it was set to 8192, and somebody has set it to 1000 since", "status")
	w.wants(exitIncomplete, "nothing was set: net.core.somaxconn of namespace pod is set by somebody unknown: millrace tune had set it to 8192", "apply", "accept-queue", "--netns", w.pod)
	w.wants(exitOK, "- net.core.somaxconn stays 1000: it was 4096 before millrace set it to 8192, and somebody else has set it since (namespace pod, accept-queue)\n", "undo", "--all")
	w.wants(exitOK, "nothing was set", "status")
	if _, err := os.Stat(w.folder); !os.IsNotExist(err) {
		t.Errorf("the folder is left: %v", err)
	}
}

// Settings that go together, in several namespaces, and back.
func TestTuneSeveralNamespaces(t *testing.T) {
	w := newWorkshop(t)
	before := [2]string{w.value(w.node, closeWait), w.value(w.pod, closeWait)}
	stdout, stderr, status := w.tune("apply", "conntrack-idle", "--netns", w.pod, "--netns", "node", "-o", "json")
	var done struct {
		Changes []struct{ Op, Layer, Object, Detail string }
	}
	if err := json.Unmarshal([]byte(stdout), &done); err != nil || status != exitOK || len(done.Changes) != 2 || done.Changes[0].Op != "~" {
		t.Errorf("exit status %d, %q, %q", status, stdout, stderr)
	}
	const established = "net.netfilter.nf_conntrack_tcp_timeout_established"
	if w.value(w.node, established) != "86400" || w.value(w.pod, established) != "86400" {
		t.Error("it is not set in both")
	}
	w.wants(exitOK, "nothing to change", "apply", "conntrack-idle", "--netns", w.pod)
	w.wants(exitOK, "", "undo", "conntrack-idle")
	if w.value(w.node, established) != "432000" || w.value(w.pod, established) != "432000" || before != [2]string{w.value(w.node, closeWait), w.value(w.pod, closeWait)} {
		t.Error("not as before")
	}
}

// A device's queues, and a pod's own namespace as somebody in it sees it.
func TestTuneDevices(t *testing.T) {
	if processors() < 2 {
		t.Skip("one processor receives for all")
	}
	w := newWorkshop(t)
	const name = "eth0/rx-0/rps_cpus"
	before, err := queue.In(w.pod).Read(name)
	w.must(err)
	w.wants(exitOK, "~ "+name+" 0 -> ", "apply", "rps", "--netns", w.pod)
	if now, err := queue.In(w.pod).Read(name); err != nil || now == before {
		t.Errorf("it is %q: %v", now, err)
	}
	w.wants(exitOK, "- "+name, "undo", "rps")
	if now, err := queue.In(w.pod).Read(name); err != nil || now != before {
		t.Errorf("it is %q: %v", now, err)
	}
	w.wants(exitOK, "no card here loses packets", "plan", "ring")
	w.wants(exitOK, "each device here has as many receive queues as there are processors", "plan", "rps") // of a node cards alone
}

// What somebody has set is theirs; an unknown ID, a useless one, two at once.
func TestTuneRefuses(t *testing.T) {
	w := newWorkshop(t)
	w.sysctl(w.pod, somaxconn, "100")
	w.wants(exitIncomplete, "a new namespace has 4096, so that somebody has set this to 100", "apply", "accept-queue", "--netns", w.pod)
	w.wants(exitUsage, "it shortens FIN_WAIT_2", "apply", "tcp_fin_timeout")
	w.wants(exitUsage, `nothing that can be tuned is called "nonsense"`, "plan", "nonsense")
	w.wants(exitUsage, "HS-43 is a check of the doctor that no setting of tune answers: what to do is said by `millrace doctor --explain HS-43`", "plan", "hs-43")
	w.wants(exitUsage, `"speed" is no profile`, "apply", "--profile", "speed")
	w.wants(exitUsage, "say which", "apply")
	w.wants(exitUsage, "say which", "undo")
	w.wants(exitUsage, `--source "dir:x": use kube:PATH or kube:, the cluster whose kube-proxy is configured`, "plan", "--source", "dir:x")
	w.wants(exitData, "/absent: no such file", "apply", "conntrack", "--source", "kube:/absent")
	w.wants(exitIncomplete, "nothing was set: iptables.minSyncPeriod of ConfigMap kube-system/kube-proxy: it is in the cluster: say --source kube:KUBECONFIG", "apply", "PX-18")
	w.wants(exitUsage, "no pod and no namespace is called so", "plan", "--netns", "nobody")
	w.must(os.MkdirAll(w.folder, 0o700))
	lock, err := layer.Lock("folder", w.folder)
	w.must(err)
	w.wants(exitFailed, layer.ErrInUse.Error(), "apply", "conntrack-idle", "--netns", w.pod)
	w.wants(exitFailed, layer.ErrInUse.Error(), "undo", "--all")
	lock.Close()
	if w.value(w.pod, somaxconn) != "100" || w.value(w.pod, "net.netfilter.nf_conntrack_tcp_timeout_established") != "432000" {
		t.Error("something was set")
	}
}

// What is the whole machine's, in a folder that stands for /proc/sys.
func TestTuneTheMachine(t *testing.T) {
	w := newWorkshop(t)
	root := t.TempDir()
	plant := func(name, value string) {
		file := filepath.Join(root, strings.ReplaceAll(name, ".", "/"))
		w.must(os.MkdirAll(filepath.Dir(file), 0o755))
		write(t, file, value+"\n")
	}
	read := func(name string) string {
		value, err := sysctl.Tree{Root: root}.Read(name)
		w.must(err)
		return value
	}
	plant("net.core.rmem_max", "212992")
	w.wants(exitIncomplete, "net.core.wmem_max of node: read net.core.wmem_max: the kernel has no such setting", "apply", "socket-buffers", "--proc-sys", root)
	if read("net.core.rmem_max") != "212992" {
		t.Error("half of it was set")
	}
	plant("net.core.wmem_max", "212992")
	w.wants(exitOK, "~ net.core.rmem_max 212992 -> ", "apply", "socket-buffers", "--proc-sys", root)
	if n, _ := strconv.Atoi(read("net.core.wmem_max")); n < 7_500_000/8 {
		t.Errorf("it is %d", n)
	}
	w.wants(exitOK, "- net.core.rmem_max", "undo", "--all", "--proc-sys", root)
	if read("net.core.rmem_max") != "212992" || read("net.core.wmem_max") != "212992" {
		t.Error("not as before")
	}
}

// What an agent keeps is the agent's.
func TestTuneLeavesWhatAnAgentKeeps(t *testing.T) {
	const established = "net.netfilter.nf_conntrack_tcp_timeout_established"
	n := newNode(t)
	n.setting(established)
	home := t.TempDir()
	n.run = filepath.Join(home, "agent")
	config := filepath.Join(home, "kube-proxy.conf")
	write(t, config, "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nconntrack: {maxPerCore: 0, tcpEstablishedTimeout: 48h}\n")
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1"))
	n.start("--kube-proxy-config", config, "--kube-proxy-ports=false")
	_, stderr, status := n.inside("tune", "apply", "conntrack-idle", "--for", "0s", "--run", filepath.Join(home, "tune"))
	if want := established + " of node is set by conntrack.tcpEstablishedTimeout of " + config + ": millrace's agent keeps it so: change it there"; status != exitIncomplete || !strings.Contains(stderr, want) {
		t.Errorf("exit status %d, %q; want %q", status, stderr, want)
	}
	if now := n.setting(established); now != "172800" {
		t.Errorf("it is %s", now)
	}
}

// What a server in a pod loses for want of a buffer is a finding for the machine's default.
func TestTuneTheMachineForAPod(t *testing.T) {
	w := newWorkshop(t)
	w.must(netns.Do(w.pod, func() error {
		server, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		w.must(err)
		client, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		w.must(err)
		at := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 5353}
		w.must(unix.Bind(server, at))
		w.must(unix.Connect(client, at))
		for range 2000 { // its buffer is full from now on
			unix.Write(client, make([]byte, 1000))
		}
		stop, stopped := make(chan struct{}), make(chan struct{})
		w.t.Cleanup(func() { close(stop); <-stopped; unix.Close(server); unix.Close(client) })
		go func() { // until the end: the window of the reading is anywhere
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
					unix.Write(client, make([]byte, 1000))
				}
			}
		}()
		return nil
	}))
	root := t.TempDir()
	w.must(os.MkdirAll(filepath.Join(root, "net/core"), 0o755))
	write(t, filepath.Join(root, "net/core/rmem_default"), "10000\n")
	stdout, stderr, status := w.tune("apply", "datagram-buffer", "--proc-sys", root)
	if status != exitFindings || !strings.HasPrefix(stdout, "~ net.core.rmem_default 10000 -> ") || !strings.Contains(stderr, "still seen: HS-14 in namespace pod") {
		t.Errorf("exit status %d, %q, %q", status, stdout, stderr)
	}
	w.wants(exitOK, "- net.core.rmem_default", "undo", "datagram-buffer", "--proc-sys", root)
	if value, err := (sysctl.Tree{Root: root}).Read("net.core.rmem_default"); value != "10000" {
		t.Errorf("it is %q: %v", value, err)
	}
}

// Pods that run already are asked for by consent alone.
func TestTuneExistingPods(t *testing.T) {
	w := newWorkshop(t)
	w.podIs("web-7f")
	const established = "net.netfilter.nf_conntrack_tcp_timeout_established"
	w.wants(exitUsage, "pod web-7f runs already, and what it is used to would change under it: say --existing-pods", "apply", "conntrack-idle", "--netns", "web-7f")
	w.wants(exitOK, "(node, conntrack-idle)", "apply", "conntrack-idle")
	if w.value(w.pod, established) != "432000" || w.value(w.node, established) != "86400" {
		t.Error("the pod's was set, or the node's was not")
	}
	w.wants(exitOK, "(pod web-7f, conntrack-idle)", "apply", "conntrack-idle", "--existing-pods")
	if w.value(w.pod, established) != "86400" {
		t.Error("the pod's was not set")
	}
	w.wants(exitOK, "- "+established+" 86400 -> 432000 (pod web-7f, conntrack-idle)\n- "+established+" 86400 -> 432000 (node, conntrack-idle)", "undo", "--all")
}

// podIs runs a process in the pod's namespace as a kubelet's runtime would.
func (w *workshop) podIs(name string) { w.t.Helper(); w.podIn(w.pod, name) }

func (w *workshop) podIn(space, name string) {
	w.t.Helper()
	root, err := cgroup.Root()
	w.must(err)
	group := filepath.Join(root, fmt.Sprintf("millrace-kubepods-%d-%s", os.Getpid(), name))
	w.must(cgroup.Create(group))
	w.t.Cleanup(func() { w.must(cgroup.Remove(group)) })
	file := filepath.Join(w.t.TempDir(), "hostname")
	write(w.t, file, name+"\n")
	c := exec.Command("unshare", "-m", "sh", "-ec", "mount --bind "+file+" /etc/hostname; exec sleep 300")
	w.must(netns.Start(space, group, c))
	w.t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", c.Process.Pid))
		if strings.TrimSpace(string(comm)) == "sleep" {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("the pod's process is %q", comm)
		}
	}
}

// A profile whose values are harmful is rejected; what has an effect is kept.
func TestTuneProve(t *testing.T) {
	w := newWorkshop(t)
	w.wants(exitFindings, "1 of 2 are harmful", "prove", "accept-queue=16", "datagram-buffer=1048576", "--rounds", "6")
	stdout, _, status := w.tune("prove", "accept-queue=16384", "accept-queue=5000", "--rounds", "6", "-o", "json")
	var all proofs
	if err := json.Unmarshal([]byte(stdout), &all); err != nil || status != exitOK || len(all.Proofs) != 2 || all.Proofs[0].Verdict != "keeps" || all.Proofs[0].Ratio.Low == nil || all.Proofs[1].B != "5000" {
		t.Errorf("exit status %d: %q: %v", status, stdout, err)
	}
	w.wants(exitUsage, "no load here would show what it does", "prove", "local-ports=1")
	w.wants(exitIncomplete, "nothing could be proved", "prove", "accept-queue")
	if w.value(w.node, somaxconn) != "4096" {
		t.Error("proving has set it")
	}
}

// Each check that a knob answers is one of the doctor's.
func TestKnobsAnswerChecks(t *testing.T) {
	checks := doctor.Checks()
	for _, k := range knob.Knobs {
		for _, id := range k.Checks {
			if !slices.ContainsFunc(checks, func(c doctor.Check) bool { return c.ID == id }) {
				t.Errorf("%s answers %s, which is no check", k.ID, id)
			}
		}
	}
}
