package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/model"
	"golang.org/x/sys/unix"
)

func TestScale(t *testing.T) {
	l := up(t, "scale", shop(2))
	for _, n := range []int{5, 1, 0, 2} {
		if err := l.Scale(l.ctx, "web", n); err != nil {
			t.Fatal(err)
		}
		s := l.await("up", func(*Status) bool { return true })
		if v4v6 := len(s.ready("web", "web")); v4v6 != 2*n {
			t.Errorf("scaled to %d: %d ready endpoints of two families", n, v4v6)
		}
		l.await("the others are gone", func(s *Status) bool { return len(s.podsOf("web")) == n })
	}
	for _, c := range []struct{ workload, want string }{
		{"nothing", "has none of that name"}, {"default/web", "want 0 to 10000"},
	} {
		if err := l.Scale(l.ctx, c.workload, -1); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("scale %s to -1: %v, want %q", c.workload, err, c.want)
		}
	}
}

func TestWhatCannotSucceedSaysWhy(t *testing.T) {
	s := shop(1)
	s.Nodes = []*model.Node{{Name: "small", PodCIDRs: prefixes("10.9.8.0/29", "fd00:9::/64")}}
	edge := deployment("edge", 1, model.ContainerPort{Protocol: model.TCP, Port: 7777})
	edge.Template.HostNetwork = true
	s.Workloads = append(s.Workloads, edge)
	l := up(t, "stuck", s, func(c *Config) { c.Drain, c.patience = time.Millisecond, time.Hour })
	for _, c := range []struct {
		workload string
		pods     int
		want     string
	}{
		{"web", 9, "scale Deployment default/web to 9: node small has no pod address left"},
		{"edge", 2, "address already in use"},
	} {
		if err := l.Scale(l.ctx, c.workload, c.pods); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("scale %s to %d: %v, want %q", c.workload, c.pods, err, c.want)
		}
	}
	if _, err := l.Replace(l.ctx, "web"); err == nil || !strings.Contains(err.Error(), "begin so") {
		t.Errorf("replace one of many: %v", err)
	}
	web := l.await("four are ready", func(s *Status) bool { return len(s.podsOf("web")) == 4 }).podsOf("web")
	if _, err := l.Replace(l.ctx, web[0].String()); err == nil || !strings.Contains(err.Error(), "no pod address left") {
		t.Errorf("replace where there is no room for another: %v", err)
	}
	for _, workload := range []string{"web", "edge"} {
		if err := l.Scale(l.ctx, workload, 1); err != nil {
			t.Errorf("scale back what could not succeed: %v", err)
		}
	}
}

func TestAStoreThatRefusesEndsTheWait(t *testing.T) {
	l := up(t, "refused", shop(1), func(c *Config) {
		c.AgentCommand = nil // agents need more patience
		c.Drain, c.patience = time.Millisecond, 100*time.Millisecond
	})
	l.store.mu.Lock()
	l.store.fail = errors.New("no space left on device")
	l.store.mu.Unlock()
	if err := l.Scale(l.ctx, "web", 2); err == nil || !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("scale while nothing can be published: %v", err)
	}
	l.store.mu.Lock()
	l.store.fail = nil
	l.store.mu.Unlock()
}

func TestReplacedPodServesUntilItIsDrained(t *testing.T) {
	l := up(t, "replace", shop(2), func(c *Config) { c.Drain = time.Hour })
	s := l.await("up", func(s *Status) bool { return s.Up })
	old := s.podsOf("web")[0]
	target := net.JoinHostPort(old.Addresses[0].String(), "8080")
	next, err := l.Replace(l.ctx, old.String())
	if err != nil {
		t.Fatal(err)
	}
	s = l.await("replaced", func(*Status) bool { return true })
	if slices.Contains(s.ready("web", "web"), target) {
		t.Errorf("%s is replaced, and yet %s is a ready endpoint", old, target)
	}
	p, err := s.Pod(next)
	if err != nil || !slices.Contains(s.ready("web", "web"), net.JoinHostPort(p.Addresses[0].String(), "8080")) {
		t.Errorf("the new pod %s is not listed: %v", next, err)
	}
	if o, err := s.Pod(old.String()); err != nil || !o.Terminating {
		t.Errorf("the old pod while it drains: %+v, %v", o, err)
	}
	if a := l.call("client", ProtoTCP, target); a.Pod != old.String() {
		t.Errorf("the old pod while it drains answers: %+v", a)
	}
	if _, err := l.Kill(l.ctx, old.String()); err != nil {
		t.Fatal(err)
	}
	l.await("the old pod is gone", func(s *Status) bool { return len(s.podsOf("web")) == 2 })
	if a := l.call("client", ProtoTCP, target); a.Error == "" {
		t.Errorf("the old pod is gone, and yet it answers: %+v", a)
	}
	for _, path := range []string{old.Netns, old.Cgroup, old.Socket} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the old pod left %s: %v", path, err)
		}
	}
}

// call is one call from the first pod whose name begins so.
func (l *live) call(from, proto, target string) Answer {
	l.t.Helper()
	answers, err := l.Call(l.ctx, from, CallRequest{Proto: proto, Target: target, Timeout: 20_000})
	if err != nil {
		l.t.Fatal(err)
	}
	return answers[0]
}

func TestDrainedPodGoesByItself(t *testing.T) {
	l := up(t, "drain", shop(1), func(c *Config) { c.Drain = time.Millisecond })
	old := l.await("up", func(s *Status) bool { return s.Up }).podsOf("web")[0]
	next, err := l.Replace(l.ctx, old.Name)
	if err != nil {
		t.Fatal(err)
	}
	l.await("only the new pod is left", func(s *Status) bool {
		pods := s.podsOf("web")
		return len(pods) == 1 && pods[0].String() == next && pods[0].Ready
	})
}

func TestStatefulSetKeepsItsNames(t *testing.T) {
	s := shop(0)
	s.Workloads[1].Kind = "StatefulSet"
	s.Workloads[1].Replicas = 2
	l := up(t, "ordered", s)
	old, err := l.await("up", func(s *Status) bool { return s.Up }).Pod("web-1")
	if err != nil {
		t.Fatal(err)
	}
	if next, err := l.Replace(l.ctx, "web-1"); err != nil || next != "default/web-1" {
		t.Fatalf("replaced by %s, %v", next, err)
	}
	l.await("web-1 is another process", func(s *Status) bool {
		p, err := s.Pod("web-1")
		return err == nil && p.Ready && p.Pid != old.Pid && p.Addresses[0] != old.Addresses[0]
	})
}

func TestHostNetworkPodsAreReplacedOnTheirPort(t *testing.T) {
	s := shop(1)
	edge := deployment("edge", 2, model.ContainerPort{Protocol: model.TCP, Port: 7777})
	edge.Template.HostNetwork = true
	s.Workloads = append(s.Workloads, edge)
	l := up(t, "edge", s, func(c *Config) { c.Drain = 10 * time.Millisecond })
	old := l.await("up", func(s *Status) bool { return s.Up }).podsOf("edge")[0]
	next, err := l.Replace(l.ctx, old.String())
	if err != nil {
		t.Fatal(err)
	}
	p, err := l.await("replaced", func(*Status) bool { return true }).Pod(next)
	if err != nil || p.Node != old.Node {
		t.Fatalf("%s on %s became %+v, %v", old, old.Node, p, err)
	}
	if a := l.call("client", ProtoTCP, net.JoinHostPort(old.Addresses[0].String(), "7777")); a.Pod != next {
		t.Errorf("the new pod is %s, and this answers: %+v", next, a)
	}
}

func TestKilledPodIsFollowedByAnother(t *testing.T) {
	l := up(t, "kill", shop(2), func(c *Config) { c.Drain = time.Hour })
	old := l.await("up", func(s *Status) bool { return s.Up }).podsOf("web")[0]
	if name, err := l.Kill(l.ctx, old.Name[:len(old.Name)-1]); err != nil || name != old.String() {
		t.Fatalf("killed %s, %v", name, err)
	}
	s := l.await("another is ready and the killed one gone", func(s *Status) bool {
		_, err := s.Pod(old.String())
		return err != nil && len(s.ready("web", "web")) == 4
	})
	if slices.ContainsFunc(s.podsOf("web"), func(p PodStatus) bool { return p.Pid == old.Pid }) {
		t.Errorf("the killed process %d is still a pod's", old.Pid)
	}
}

func TestCrashedPodIsRestartedInPlace(t *testing.T) {
	l := up(t, "crash", shop(1))
	before := l.await("up", func(s *Status) bool { return s.Up }).podsOf("web")[0]
	if err := unix.Kill(before.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	after := l.await("it runs again", func(s *Status) bool {
		p, err := s.Pod(before.String())
		return err == nil && p.Ready && p.Restarts == 1
	})
	p, _ := after.Pod(before.String())
	if p.Pid == before.Pid || !slices.Equal(p.Addresses, before.Addresses) {
		t.Errorf("before %+v, after %+v", before, p)
	}
	target := net.JoinHostPort(p.Addresses[1].String(), "9090")
	if a := l.call("client", ProtoHTTP, target); a.Pod != p.String() {
		t.Errorf("after the restart: %+v", a)
	}
}

func TestPodThatCannotListenIsAProblem(t *testing.T) {
	s := shop(1)
	for _, name := range []string{"one", "two"} {
		s.Pods = append(s.Pods, &model.Pod{Name: model.Name{Namespace: "default", Name: name}, HostNetwork: true,
			Node: "node-1", Ports: []model.ContainerPort{{Protocol: model.TCP, Port: 7777}}})
	}
	l := up(t, "clash", s)
	l.await("one of the two says why it is not ready", func(s *Status) bool {
		for _, p := range s.Problems {
			if strings.HasPrefix(p.Object, "Pod default/") && strings.Contains(p.Text, "address already in use") {
				return true
			}
		}
		return false
	})
}

func TestAPortMayHaveTwoNames(t *testing.T) {
	s := shop(1)
	ports := append(slices.Clone(webPorts), model.ContainerPort{Name: "metrics", Protocol: model.TCP, Port: 8080},
		model.ContainerPort{Name: "dns-too", Protocol: model.UDP, Port: 8080})
	s.Workloads[1] = deployment("web", 1, ports...)
	l := up(t, "names", s)
	if s := l.await("up", func(s *Status) bool { return s.Up }); !s.podsOf("web")[0].Ready || len(s.Problems) > 0 {
		t.Errorf("a pod with two names for a port: %+v, %v", s.podsOf("web"), s.Problems)
	}
}

func TestManifestsChangeLive(t *testing.T) {
	first := shop(2)
	l := up(t, "live", first)
	old := l.await("up", func(s *Status) bool { return s.Up })
	second := *first
	web := *first.Workloads[1]
	web.Template.Labels = map[string]string{"app": "web", "version": "2"}
	second.Workloads = []*model.Workload{first.Workloads[0], &web, deployment("db", 1, webPorts...)}
	second.Services = append(slices.Clone(first.Services), service("db", model.ServicePort{Protocol: model.TCP, Port: 5432, TargetPort: 9090}))
	second.Nodes = []*model.Node{{Name: "another"}}
	l.deliver(&second)
	s := l.await("the new template and the new workload are there", func(s *Status) bool {
		return s.Service("db") != nil && len(s.ready("db", "")) == 2 && len(s.podsOf("web")) == 2 &&
			!slices.ContainsFunc(s.podsOf("web"), func(p PodStatus) bool { _, err := old.Pod(p.String()); return err == nil })
	})
	if len(s.ready("web", "web")) != 4 || !slices.Equal(s.Service("web").ClusterIPs, old.Service("web").ClusterIPs) {
		t.Errorf("after the change the Service is %+v", s.Service("web"))
	}
	if !slices.ContainsFunc(s.Problems, func(p model.Problem) bool { return strings.Contains(p.Text, "nodes of a lab are fixed") }) {
		t.Errorf("other nodes are asked for, and no problem says so: %v", s.Problems)
	}
	l.deliver(&model.Snapshot{}) // not complete: nothing may go
	if err := l.Scale(l.ctx, "db", 2); err != nil {
		t.Errorf("after a Snapshot that is not complete: %v", err)
	}
	l.deliver(&model.Snapshot{Complete: true})
	l.await("all is gone", func(s *Status) bool { return len(s.Pods)+len(s.Services) == 0 })
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	if len(l.store.pods)+len(l.store.services) > 0 || len(l.store.nodes) != 2 {
		t.Errorf("published: %d pods, %d Services, %d nodes", len(l.store.pods), len(l.store.services), len(l.store.nodes))
	}
}

func TestStoreIsWrittenAgainAfterAnError(t *testing.T) {
	l := up(t, "store", shop(1))
	l.store.mu.Lock()
	l.store.fail = errors.New("no space left on device")
	l.store.mu.Unlock()
	scaled := make(chan error, 1)
	go func() { scaled <- l.Scale(l.ctx, "web", 2) }()
	l.await("the error is a problem", func(s *Status) bool {
		return slices.ContainsFunc(s.Problems, func(p model.Problem) bool { return strings.Contains(p.Text, "no space left") })
	})
	l.store.mu.Lock()
	l.store.fail = nil
	l.store.mu.Unlock()
	if err := <-scaled; err != nil {
		t.Fatal(err)
	}
	if s := l.await("up", func(*Status) bool { return true }); len(s.Problems) > 0 {
		t.Errorf("the error is over: %v", s.Problems)
	}
	if b := l.pickBackend(); !b.Ready {
		t.Errorf("published: %+v", b)
	}
}

func TestAgentsAreRestarted(t *testing.T) {
	l := up(t, "agents", shop(1))
	s := l.await("up", func(s *Status) bool { return s.Up })
	for i := range 3 {
		before := s.Node("node-1").Agent.Pid
		end := []func(context.Context, string) error{l.KillAgent, l.StopAgent}[i%2]
		if err := end(l.ctx, "node-1"); err != nil {
			t.Fatal(err)
		}
		s = l.await("it is ready again", func(s *Status) bool {
			a := s.Node("node-1").Agent
			return a.Ready && a.Restarts == i+1 && a.Pid != before
		})
	}
	pids, err := cgroup.Processes(filepath.Join(s.Node("node-1").Cgroup, "agent"))
	if err != nil || !slices.Equal(pids, []int{s.Node("node-1").Agent.Pid}) {
		t.Errorf("in the agent's group: %v, %v", pids, err)
	}
	if err := l.KillAgent(l.ctx, "node-9"); err == nil {
		t.Error("the agent of a node that does not exist was killed")
	}
}

// TestAnAgentThatDiesAgainAndAgainRests tells the pauses after each death of
// one agent.
func TestAnAgentThatDiesAgainAndAgainRests(t *testing.T) {
	const soon, late = time.Millisecond, 11 * time.Second
	pauses := newBackoff()
	for i, c := range []struct {
		ran           time.Duration
		ready, killed bool
		want          time.Duration
	}{
		{soon, true, false, 0},
		{soon, true, false, 200 * time.Millisecond},
		{soon, true, true, 0},
		{soon, true, false, 400 * time.Millisecond},
		{soon, true, false, 800 * time.Millisecond},
		{soon, true, false, time.Second},
		{soon, false, false, 3200 * time.Millisecond},
		{late, true, false, 0},
		{late, false, false, 100 * time.Millisecond},
		{soon, false, false, 200 * time.Millisecond},
	} {
		if got := agentPause(pauses, c.ran, c.ready, c.killed); got != c.want {
			t.Errorf("death %d, %+v: rests for %s", i+1, c, got)
		}
	}
}

func TestTwoLabsDoNotCollide(t *testing.T) {
	folder := filepath.Join("/run", unique("millrace"))
	one := up(t, "left", shop(1))
	two := up(t, "right", shop(1), func(c *Config) { c.Folder = folder })
	a := one.await("up", func(s *Status) bool { return s.Up })
	b := two.await("up", func(s *Status) bool { return s.Up })
	host, err := link.Open("")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	used, err := host.InUse()
	if err != nil {
		t.Fatal(err)
	}
	used = append(withoutWide(used), a.Ranges.all()...)
	for _, r := range b.Ranges.all() {
		if i := overlapping(used, r); i >= 0 {
			t.Errorf("lab right uses %s, which overlaps with %s", r, used[i])
		}
	}
	if b.Folder != folder {
		t.Errorf("lab right lives in %s, not in %s", b.Folder, folder)
	}
	if names, err := List(); err != nil || !slices.Contains(names, unique("left")) || !slices.Contains(names, unique("right")) {
		t.Errorf("labs: %v, %v", names, err)
	}
	if err := Run(one.ctx, testConfig(unique("left"), "", watchOnce(shop(1)))); !errors.Is(err, ErrUp) {
		t.Errorf("another lab left: %v", err)
	}
	if err := Run(one.ctx, testConfig(unique("right"), "", watchOnce(shop(1)))); !errors.Is(err, ErrUp) {
		t.Errorf("another lab right, in the usual folder: %v", err)
	}
	target := net.JoinHostPort(b.podsOf("web")[0].Addresses[0].String(), "8080")
	if answer := one.call("client", ProtoTCP, target); answer.Kind != FailureUnreachable {
		t.Errorf("lab left reaches into lab right: %+v", answer)
	}
}

// start brings up a lab in a process of its own, which the test may kill.
func start(t *testing.T, name string) {
	t.Helper()
	needRoot(t)
	name = unique(name)
	before := picture(t)
	t.Cleanup(func() {
		if err := Down(name, nil); err != nil {
			t.Error(err)
		}
		before.compare(t)
	})
	argv := []string{os.Args[0], "lab-daemon", name, "", "4"}
	if err := Start(patience(t), argv, func(line string) { t.Log(line) }); err != nil {
		t.Fatal(err)
	}
}

// TestStartHearsOfAKilledDaemon kills the daemon while its agents, which never
// become ready, outlive it.
func TestStartHearsOfAKilledDaemon(t *testing.T) {
	needRoot(t)
	name := unique("unheard")
	before := picture(t)
	t.Cleanup(func() {
		if err := Down(name, nil); err != nil {
			t.Error(err)
		}
		before.compare(t)
	})
	started := make(chan error, 1)
	argv := []string{os.Args[0], "lab-daemon", name, "", "1", "sleep", "3600"}
	ctx := patience(t)
	go func() { started <- Start(ctx, argv, nil) }()
	var c *Client
	waitUntil(t, "the lab can be asked", func() bool {
		var err error
		c, err = Dial(name)
		return err == nil
	})
	s, err := c.Await(ctx, func(s *Status) bool {
		return len(s.Nodes) == 2 && s.Nodes[0].Agent.Pid > 0 && s.Nodes[1].Agent.Pid > 0
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(s.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-started:
		if err == nil || !strings.Contains(err.Error(), "ended without saying why") {
			t.Errorf("the daemon was killed, and Start says: %v", err)
		}
	case <-ctx.Done():
		t.Error("the daemon was killed, and Start waits on")
	}
}

func TestKilledDaemonIsCleanedUp(t *testing.T) {
	before := picture(t)
	start(t, "killed")
	c, err := Dial(unique("killed"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.Status(patience(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(s.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitReaped(t, s.Pid)
	if _, err := Dial(unique("killed")); !errors.Is(err, ErrNotUp) || !strings.Contains(err.Error(), "run millrace lab up") {
		t.Errorf("dial a killed lab: %v", err)
	}
	if err := Down(unique("killed"), nil); err != nil {
		t.Fatal(err)
	}
	before.compare(t)
	for _, n := range s.Nodes {
		waitGone(t, n.Agent.Pid)
	}
	for _, p := range s.Pods {
		waitGone(t, p.Pid)
	}
	if err := Down(unique("killed"), nil); err != nil {
		t.Errorf("down again: %v", err)
	}
}

// waitReaped waits until this test's own child is no more: only then has it
// given up its locks and sockets.
func waitReaped(t *testing.T, pid int) {
	t.Helper()
	waitUntil(t, fmt.Sprintf("process %d is no more", pid), func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		return err != nil
	})
}

// waitGone waits until a process has ended; a zombie that init does not reap
// has, too.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	waitUntil(t, fmt.Sprintf("process %d has ended", pid), func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
}

func waitUntil(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting until %s", what)
		}
	}
}

func TestRemainsOfAKilledLabDoNotHinderTheNext(t *testing.T) {
	start(t, "again")
	c, _ := Dial(unique("again"))
	s, err := c.Status(patience(t))
	if err != nil {
		t.Fatal(err)
	}
	unix.Kill(s.Pid, unix.SIGKILL)
	waitReaped(t, s.Pid)
	l := up(t, "again", shop(1))
	l.await("up", func(s *Status) bool { return s.Up })
}

func TestStartTellsWhyALabDoesNotComeUp(t *testing.T) {
	start(t, "twice")
	self := os.Args[0]
	for _, c := range []struct {
		name string
		want error
	}{{unique("twice"), ErrUp}, {"Bad_Name", ErrName}} {
		err := Start(patience(t), []string{self, "lab-daemon", c.name, "", "1"}, nil)
		if !errors.Is(err, c.want) {
			t.Errorf("start lab %s: %v, want %v", c.name, err, c.want)
		}
	}
}

// TestExec runs commands in a pod and in a node.
func TestExec(t *testing.T) {
	l := up(t, "exec", shop(1))
	s := l.await("up", func(s *Status) bool { return s.Up })
	pod := s.podsOf("web")[0]
	group := func(path string) string { return path[strings.Index(path, "/millrace-lab/"):] }
	for _, c := range []struct{ where, netns, cgroup string }{
		{"web", pod.Netns, group(pod.Cgroup)},
		{pod.String(), pod.Netns, group(pod.Cgroup)},
		{"node-2", s.Node("node-2").Netns, group(s.Node("node-2").Cgroup) + "/host"},
	} {
		out, err := exec.Command(os.Args[0], "lab-exec", unique("exec"), c.where,
			"sh", "-c", "stat -Lc %i /proc/self/ns/net; cat /proc/self/cgroup").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		var stat unix.Stat_t
		if err := unix.Stat(c.netns, &stat); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(string(out), fmt.Sprintf("%d\n", stat.Ino)) {
			t.Errorf("exec in %s: not in the namespace %d: %s", c.where, stat.Ino, out)
		}
		if !strings.Contains(string(out), "0::"+c.cgroup+"\n") {
			t.Errorf("exec in %s: not in the group %s: %s", c.where, c.cgroup, out)
		}
	}
	for where, want := range map[string]string{"nobody": "has none of that name", "": "begin so"} {
		out, _ := exec.Command(os.Args[0], "lab-exec", unique("exec"), where, "true").CombinedOutput()
		if !strings.Contains(string(out), want) {
			t.Errorf("exec in %q says %q, want %q", where, out, want)
		}
	}
	if err := Exec("no-such-lab", "web", []string{"true"}); !errors.Is(err, ErrNotUp) {
		t.Errorf("exec without a lab: %v", err)
	}
}

func TestPodsSocketsBelongToThePodsGroup(t *testing.T) {
	l := up(t, "groups", shop(1))
	pod := l.await("up", func(s *Status) bool { return s.Up }).podsOf("web")[0]
	pids, err := cgroup.Processes(pod.Cgroup)
	if err != nil || !slices.Equal(pids, []int{pod.Pid}) {
		t.Errorf("in the group of %s, whose process is %d: %v, %v", pod, pod.Pid, pids, err)
	}
}

func TestLoad(t *testing.T) {
	l := up(t, "load", shop(2))
	s := l.await("up", func(s *Status) bool { return s.Up })
	web := s.podsOf("web")
	target := func(i int, port string) string { return net.JoinHostPort(web[i].Addresses[i].String(), port) }
	for _, c := range []LoadRequest{
		{Targets: []string{target(0, "8080"), target(1, "9090")}, Rate: 200, Duration: 200},
		{Proto: ProtoUDP, Targets: []string{target(0, "8080"), target(1, "8080")}, Rate: 200, Duration: 200},
		{Targets: []string{target(0, "8080"), target(1, "9090")}, Rate: 200, Duration: 200, Keep: 4},
		{Proto: ProtoSend, Targets: []string{target(0, "8080"), target(1, "8080")}, Rate: 200, Duration: 200, Keep: 4, Stay: true},
	} {
		r, err := l.Load(l.ctx, "client", c)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]int{web[0].String(): 20, web[1].String(): 20}
		if r.Failed > 0 || r.Operations != 40 || fmt.Sprint(r.Backends) != fmt.Sprint(want) || r.P50 <= 0 || r.P99 < r.P50 || r.Reconnects > 0 {
			t.Errorf("%+v: %+v", c, r)
		}
	}
	refused := LoadRequest{Targets: []string{target(0, "1")}, Rate: 100, Duration: 100}
	silent := CallRequest{Proto: ProtoSend, Target: "192.0.2.77:80", Timeout: 20} // such a socket hears of no ICMP error
	if a, err := l.Call(l.ctx, "client", silent); err != nil || a[0].Kind != FailureTimeout {
		t.Errorf("%+v: %+v, %v", silent, a, err)
	}
	if r, err := l.Load(l.ctx, "client", refused); err != nil || r.Failures[FailureRefused] != 10 || r.Failed != 10 || len(r.Examples) != 10 {
		t.Errorf("where nobody listens: %+v, %v", r, err)
	}
	if _, err := l.Load(l.ctx, "client", LoadRequest{}); err == nil {
		t.Error("a load without targets is no error")
	}
	for _, c := range []struct{ proto, target, kind string }{
		{ProtoTCP, target(0, "1"), FailureRefused},
		{ProtoUDP, target(0, "1"), FailureRefused},
		{ProtoHTTP, target(0, "1"), FailureRefused},
		{ProtoTCP, "192.0.2.77:80", FailureUnreachable},     // a pod has no way out of the lab
		{ProtoTCP, "[2001:db8::77]:80", FailureUnreachable}, // at the second SYN
	} {
		if a := l.call("client", c.proto, c.target); a.Kind != c.kind {
			t.Errorf("%s to %s: %+v, want %s", c.proto, c.target, a, c.kind)
		}
	}
}

func TestLoadUntilToldToEnd(t *testing.T) {
	l := up(t, "until", shop(1))
	web := l.await("up", func(s *Status) bool { return s.Up }).podsOf("web")[0]
	results := make(chan *LoadResult, 1)
	target := net.JoinHostPort(web.Addresses[0].String(), "8080")
	go func() {
		r, err := l.Load(l.ctx, "client", LoadRequest{Targets: []string{target}, Rate: 500, Keep: 1, Least: 50})
		if err != nil {
			t.Error(err)
		}
		results <- r
	}()
	waitUntil(t, "the load is there", func() bool { return established(web) >= 1 })
	if err := l.EndLoads(l.ctx, "client"); err != nil {
		t.Fatal(err)
	}
	if r := <-results; r == nil || r.Operations < 50 || r.Failed > 0 || r.Reconnects > 0 {
		t.Errorf("a load of at least 50 operations: %+v", r)
	}
}

// A long-living connection that is to stay with its pod notices another one.
func TestLoadNoticesAnotherPod(t *testing.T) {
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() {
		buffer := make([]byte, 512)
		for i := 0; ; i++ {
			n, from, err := server.ReadFrom(buffer)
			if err != nil {
				return
			}
			server.WriteTo(fmt.Appendf(nil, "pod-%d node %s", min(i/5, 1), buffer[:n]), from)
		}
	}()
	request := LoadRequest{Proto: ProtoUDP, Targets: []string{server.LocalAddr().String()}, Rate: 1000, Duration: 10, Keep: 1, Stay: true}
	r, err := runLoad(t.Context(), request, nil)
	if err != nil || r.Operations != 10 || r.Failures[FailureWrong] != 1 || r.Failed != 1 {
		t.Errorf("the second of two pods answered from the sixth time on: %+v, %v", r, err)
	}
}

func TestLongConnectionsAreOpenedAnew(t *testing.T) {
	l := up(t, "anew", shop(1))
	web := l.await("up", func(s *Status) bool { return s.Up }).podsOf("web")[0]
	ctx, cancel := context.WithCancel(l.ctx)
	defer cancel()
	results := make(chan *LoadResult, 1)
	target := net.JoinHostPort(web.Addresses[0].String(), "8080")
	go func() {
		r, err := l.Load(ctx, "client", LoadRequest{Targets: []string{target}, Rate: 200, Duration: 1500, Keep: 2})
		if err != nil {
			t.Error(err)
		}
		results <- r
	}()
	waitUntil(t, "the load is there", func() bool { return established(web) >= 2 })
	unix.Kill(web.Pid, unix.SIGKILL)
	l.await("the pod is back", func(s *Status) bool {
		p, err := s.Pod(web.String())
		return err == nil && p.Ready && p.Restarts == 1
	})
	// One more may be opened to the pod while it dies, and again afterwards.
	if r := <-results; r == nil || r.Failed == 0 || r.Reconnects < 2 || r.Reconnects > 4 || r.Succeeded == 0 {
		t.Errorf("a pod that died and came back: %+v", r)
	}
}

// established counts the TCP connections in a pod's namespace.
func established(p PodStatus) int {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", p.Pid))
	v6, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp6", p.Pid))
	return strings.Count(string(data)+string(v6), " 01 ")
}

func TestMissingPrivilegeIsOneSentence(t *testing.T) {
	needRoot(t)
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	done := make(chan error)
	go func() { // on a thread of its own, which keeps the loss for itself and ends with it
		lockThread()
		err := unix.Capget(&header, &data[0])
		data[0].Effective &^= 1 << unix.CAP_SYS_ADMIN
		done <- errors.Join(err, unix.Capset(&header, &data[0]), checkPrivileges())
	}()
	if err := <-done; !errors.Is(err, ErrPrivilege) || !strings.Contains(err.Error(), "needs CAP_SYS_ADMIN: run it as root") {
		t.Errorf("without CAP_SYS_ADMIN: %v", err)
	}
}

// TestLabKilledHalfWay kills the daemon as soon as one thing or another is
// there, and expects Down to find the rest.
func TestLabKilledHalfWay(t *testing.T) {
	needRoot(t)
	name := unique("half")
	before := picture(t)
	for _, sign := range []string{"lab.sock", "lab.json", "netns/fabric/fabric", "netns/node/node-2", "netns/pod", "pods/1.sock"} {
		devNull, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(os.Args[0], "lab-daemon", name, "", "6")
		cmd.ExtraFiles = []*os.File{devNull} // nobody reads its reports
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitUntil(t, sign+" exists", func() bool {
			_, err := os.Lstat(filepath.Join(Folder(name), sign))
			return err == nil
		})
		cmd.Process.Kill()
		cmd.Wait()
		if err := Down(name, nil); err != nil {
			t.Errorf("killed when there was %s: %v", sign, err)
		}
		before.compare(t)
	}
}

// podless is a store that takes everything but pods.
type podless struct{ *memory }

func (*podless) PutPod(*model.Pod) error { return fmt.Errorf("write pod: %w", unix.ENAMETOOLONG) }

func TestWhatCannotComeUpLeavesNothing(t *testing.T) {
	needRoot(t)
	before := picture(t)
	overlap := shop(1)
	overlap.Nodes = []*model.Node{{Name: "a", PodCIDRs: prefixes("10.9.0.0/16")}, {Name: "b", PodCIDRs: prefixes("10.9.1.0/24")}}
	name := unique("never")
	for _, c := range []struct {
		what   string
		change func(*Config)
		want   string
	}{
		{"pod ranges overlap", func(c *Config) { c.Watch = watchOnce(overlap) }, "the pod range 10.9.1.0/24 of node b overlaps with 10.9.0.0/16 of node a"},
		{"manifests cannot be read", func(c *Config) {
			c.Watch = func(context.Context, func(*model.Snapshot)) error { return errors.New("open shop.yaml: no such file") }
		}, "open shop.yaml: no such file"},
		{"the store cannot be opened", func(c *Config) {
			c.Store = func(string) (Store, error) { return nil, errors.New("read-only file system") }
		}, "read-only file system"},
		{"the store takes no pod", func(c *Config) {
			c.Store = func(string) (Store, error) { return &podless{newMemory()}, nil }
			c.patience = 10 * time.Millisecond
			c.AgentCommand = nil
		}, "publish the cluster: write pod: file name too long"},
		{"a long folder", func(c *Config) { c.Folder = "/run/" + strings.Repeat("x", 60) }, "at most 60 bytes"},
		{"a bad name", func(c *Config) { c.Name = "../x" }, `bad lab name "../x"`},
	} {
		cfg := testConfig(name, "", watchOnce(shop(1)))
		c.change(&cfg)
		if err := Run(patience(t), cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.what, err, c.want)
		}
		before.compare(t)
	}
}
