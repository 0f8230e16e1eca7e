package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Everything that changes in a cluster changes at once, for minutes: pods, endpoints,
// Services, agents, the API server. Meanwhile each kind of call comes from everywhere,
// and each failure is a failure of this test, unless the endpoint itself was killed:
//
//	make cluster-up CLUSTER='--proxy millrace'
//	MILLRACE_INSTALLED=1 MILLRACE_CHURN=5m go test -C test/cluster -run Churn -v -timeout 20m
//
// Without MILLRACE_CHURN it takes a minute, and the API server is stopped for 15 s.
// docs/cluster.md has what is altered, and what was found.

// churn is what is altered, and what is known of it.
type churn struct {
	t *testing.T
	// length of all of it, and how long the API server is stopped.
	length, stopped time.Duration
	callers         []*caller
	// calm is held for writing while nothing else may be altered.
	calm sync.RWMutex

	mu     sync.Mutex
	events []event
	deaths []death
	away   map[string][]*span // of the endpoints of Service manual, by the server's name
	down   []*span            // some agent
	latest time.Duration      // from a death to a call that failed by it
}

// span is from one moment to another, or goes on.
type span struct{ from, to time.Time }

// within says that a part of it lies between two moments.
func (s *span) within(from, until time.Time) bool {
	return s.from.Before(until) && (s.to.IsZero() || s.to.After(from))
}

type event struct {
	at   time.Time
	what string
}

// death of a pod that was not told before.
type death struct {
	pod       string
	addresses []string
	at        time.Time
}

func TestChurnLosesNothing(t *testing.T) {
	needsInstalled(t)
	c := &churn{t: t, length: time.Minute, stopped: 15 * time.Second, away: map[string][]*span{}}
	if text := os.Getenv("MILLRACE_CHURN"); text != "" {
		length, err := time.ParseDuration(text)
		if err != nil {
			t.Fatalf("MILLRACE_CHURN: %v", err)
		}
		c.length = length
	}
	if c.length >= 3*time.Minute {
		c.stopped = time.Minute
	}
	c.open()
	begun := time.Now()
	c.run()
	c.judge(begun, time.Now())
}

// run alters everything until the time is over, and returns when all is as wanted.
func (c *churn) run() {
	ctx, end := context.WithTimeout(c.t.Context(), c.length)
	defer end()
	var all sync.WaitGroup
	for name, step := range map[string]func(int) error{
		"graceful": c.replace, "abrupt": c.kill, "altered": c.alter, "manual": c.move, "fleeting": c.come, "agents": c.killAgent,
	} {
		all.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				c.calm.RLock()
				if err := step(n); err != nil {
					c.t.Errorf("%s: %v", name, err)
				}
				c.calm.RUnlock()
				time.Sleep(time.Second)
			}
		})
	}
	all.Go(func() { c.stopServer(ctx) })
	all.Wait()
	for _, of := range []string{"-n kube-system daemonset/millrace", "-n churn daemonset/stable", "-n churn deployment/graceful", "-n churn deployment/abrupt"} {
		kubectlOf(c.t, append([]string{"rollout", "status", "--timeout=1m"}, strings.Fields(of)...)...)
	}
}

// note remembers what was done, for who reads the log of a failure.
func (c *churn) note(format string, values ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = append(c.events, event{time.Now(), fmt.Sprintf(format, values...)})
}

// ctl is kubectl in the namespace of all this.
func ctl(arguments ...string) (string, error) {
	return output(exec.Command(folder+"/kubectl", append([]string{"-n", "churn"}, arguments...)...))
}

// pod is what is asked of a pod.
type pod struct {
	name, node string
	addresses  []string
}

func podsOf(app string) (pods []pod, err error) {
	text, err := ctl("get", "pods", "-l", "app="+app, "--field-selector=status.phase=Running",
		"-o", `jsonpath={range .items[?(@.status.podIPs)]}{.metadata.name} {.spec.nodeName} {.status.podIPs[*].ip} {.metadata.deletionTimestamp}{"\n"}{end}`)
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) == 4 { // the fifth: it is ending
			pods = append(pods, pod{fields[0], fields[1], fields[2:4]})
		}
	}
	return pods, err
}

// replace pods in all the ways in which they are told, and have time to end.
func (c *churn) replace(n int) error {
	do := func(arguments ...string) error {
		c.note("%s", strings.Join(arguments, " "))
		_, err := ctl(arguments...)
		return err
	}
	switch n % 6 {
	case 0:
		return errors.Join(do("rollout", "restart", "deployment/graceful"), do("rollout", "status", "deployment/graceful", "--timeout=1m"))
	case 1:
		return do("scale", "deployment/graceful", "--replicas=5")
	case 2:
		return c.unready("graceful")
	case 3:
		return do("scale", "deployment/graceful", "--replicas=2")
	case 4:
		return do("scale", "deployment/graceful", "--replicas=4")
	default:
		pods, err := podsOf("graceful")
		if err != nil || len(pods) < 3 {
			return err
		}
		return do("delete", "pod", pods[0].name, "--wait=false")
	}
}

// unready makes a pod unready for a while, in which its connections go on.
func (c *churn) unready(app string) error {
	pods, err := podsOf(app)
	if err != nil || len(pods) < 2 {
		return err
	}
	ask := func(path string) error {
		c.note("%s of %s", path, pods[0].name)
		_, err := output(inside(control, "curl", "-s", "-m", "2", "http://"+pods[0].addresses[0]+":8081/"+path))
		return err
	}
	err = ask("unready")
	time.Sleep(4 * time.Second)
	return errors.Join(err, ask("ready-again"))
}

// kill a pod that is told nothing: every second time its network dies first, so that
// nobody else is told, either.
func (c *churn) kill(n int) error {
	pods, err := podsOf("abrupt")
	if err != nil || len(pods) < 3 {
		return err
	}
	victim := pods[n%len(pods)]
	c.mu.Lock()
	c.deaths = append(c.deaths, death{victim.name, victim.addresses, time.Now()})
	c.mu.Unlock()
	if n%2 == 1 {
		c.note("network of %s is cut", victim.name)
		command := fmt.Sprintf("ip link set $(ip -o route get %s | sed 's/.* dev \\([^ ]*\\) .*/\\1/') down", victim.addresses[0])
		if _, err := output(exec.Command(folder+"/node", strings.TrimPrefix(victim.node, "node-"), "sh", "-c", command)); err != nil {
			return err
		}
	}
	c.note("kill %s at %v", victim.name, victim.addresses)
	_, err = ctl("delete", "pod", victim.name, "--force", "--grace-period=0")
	time.Sleep(3 * time.Second)
	return err
}

// alter a Service in ways that must not matter to who calls it at port 80.
func (c *churn) alter(n int) error {
	alterations := []string{
		`{"spec":{"sessionAffinity":"ClientIP","sessionAffinityConfig":{"clientIP":{"timeoutSeconds":5}}}}`,
		`{"spec":{"internalTrafficPolicy":"Local"}}`,
		`{"spec":{"type":"NodePort","externalTrafficPolicy":"Local"}}`,
		`{"metadata":{"annotations":{"millrace.io/path":"packet"}}}`,
		`{"spec":{"ports":[{"name":"more","port":81,"targetPort":8080}]}}`,
		`{"spec":{"internalTrafficPolicy":"Cluster","externalTrafficPolicy":"Cluster"}}`,
		`{"spec":{"sessionAffinity":"None","sessionAffinityConfig":null}}`,
		`{"spec":{"trafficDistribution":"PreferClose"}}`,
		`{"spec":{"ports":[{"$patch":"delete","port":81}]}}`,
		`{"metadata":{"annotations":{"millrace.io/path":null}}}`,
		`{"spec":{"type":"ClusterIP"}}`,
		`{"spec":{"trafficDistribution":null}}`,
	}
	patch := alterations[n%len(alterations)]
	c.note("alter %s", patch)
	_, err := ctl("patch", "service", "altered", "--type=strategic", "-p", patch)
	return err
}

// move the endpoints of a Service without a selector: one pod is away for 36 s, so
// that what it has is closed, while another comes and goes.
func (c *churn) move(n int) error {
	pods, err := podsOf("stable")
	if err != nil {
		return err
	}
	if len(pods) != nodes {
		return fmt.Errorf("%d pods of stable run, not %d", len(pods), nodes)
	}
	var members, away []pod
	for i, p := range pods {
		if i == n/12%len(pods) || n%2 == 1 && i == (n/12+1)%len(pods) {
			away = append(away, p)
		} else {
			members = append(members, p)
		}
	}
	for _, p := range away {
		c.isAway(p.name, true)
	}
	if err := writeSlices(members); err != nil {
		return err
	}
	for _, p := range members {
		c.isAway(p.name, false)
	}
	c.note("manual has %v", members)
	time.Sleep(2 * time.Second)
	return nil
}

// isAway remembers since when an endpoint has been away, or that it is not.
func (c *churn) isAway(name string, now bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	spans := c.away[name]
	open := len(spans) > 0 && spans[len(spans)-1].to.IsZero()
	if now && !open {
		c.away[name] = append(spans, &span{from: time.Now()})
	}
	if !now && open {
		spans[len(spans)-1].to = time.Now()
	}
}

// isDown remembers that an agent is down, until the function that it returns is called.
func (c *churn) isDown() (up func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &span{from: time.Now()}
	c.down = append(c.down, s)
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		s.to = time.Now()
	}
}

// come and go of a Service, with a call of each kind from each node while it is there.
func (c *churn) come(n int) error {
	name, address := fmt.Sprintf("fleeting-%d", n), fmt.Sprintf("10.96.77.%d", 100+n%50)
	c.note("create %s at %s", name, address)
	if err := applyText(serviceText(name, "stable", address, "", 0, "")); err != nil {
		return err
	}
	err := c.callEverywhere(name, address+":80")
	c.note("move %s to port 82", name)
	_, patched := ctl("patch", "service", name, "--type=json", "-p", `[{"op":"replace","path":"/spec/ports/0/port","value":82},{"op":"replace","path":"/spec/ports/1/port","value":82}]`)
	err = errors.Join(err, patched, c.callEverywhere(name, address+":82"))
	c.note("delete %s", name)
	_, deleted := ctl("delete", "service", name)
	return errors.Join(err, deleted)
}

// callEverywhere waits until a Service is there, and then counts.
func (c *churn) callEverywhere(name, at string) error {
	for _, n := range allNodes() {
		onNode := func(arguments ...string) (string, error) {
			return output(exec.Command(folder+"/node", append([]string{fmt.Sprint(int(n)), c.program(), "call"}, arguments...)...))
		}
		err := until(context.Background(), name+" at "+at+" on "+n.name(), 15*time.Second, func() error {
			text, err := onNode("--count=1", "--deadline=300ms", name+"/tcp="+at, name+"/udp="+at)
			if err == nil && strings.Contains(text, `"error"`) {
				err = errors.New(text)
			}
			return err
		})
		if err != nil {
			return err
		}
		var targets []string
		for _, kind := range kinds {
			targets = append(targets, name+"/"+kind+"="+at)
		}
		text, err := onNode(append([]string{"--count=4", "--every=50ms"}, targets...)...)
		if err == nil && strings.Contains(text, `"error"`) {
			err = fmt.Errorf("calls of %s on %s: %s", name, n.name(), text)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// program is the path of calls, on this machine and on the nodes.
func (c *churn) program() string {
	found, err := filepath.Glob(filepath.Join(root, cacheFolder, "bin", "*", "calls"))
	if err != nil || len(found) != 1 {
		c.t.Errorf("find the program calls: %q, %v", found, err)
		return ""
	}
	path, _ := filepath.Abs(found[0]) // of a path that was found
	return path
}

// killAgent kills one agent, and waits until all are ready. One that the kubelet has
// started again once would be left for 10 s the next time (CrashLoopBackOff), so it is
// deleted then; and all are replaced once.
func (c *churn) killAgent(n int) error {
	do := func(arguments ...string) (string, error) {
		return output(exec.Command(folder+"/kubectl", append([]string{"-n", "kube-system"}, arguments...)...))
	}
	of := node(n%nodes + 1)
	defer c.isDown()()
	if n == nodes {
		c.note("roll the agents out")
		_, err := do("rollout", "restart", "daemonset/millrace")
		if err != nil {
			return err
		}
	} else {
		text, err := do("get", "pods", "-l", "app.kubernetes.io/name=millrace", "--field-selector=spec.nodeName="+of.name(),
			"-o", `jsonpath={.items[0].metadata.name} {.items[0].status.containerStatuses[0].restartCount}`)
		if err != nil {
			return err
		}
		name, restarts, _ := strings.Cut(text, " ")
		if restarts != "0" {
			c.note("delete the agent %s of %s", name, of.name())
			_, err = do("delete", "pod", name, "--wait=false")
		} else {
			err = c.killAgentOn(of)
		}
		if err != nil {
			return err
		}
	}
	time.Sleep(time.Second)
	_, err := do("rollout", "status", "daemonset/millrace", "--timeout=1m")
	return err
}

func (c *churn) killAgentOn(n node) error {
	c.note("kill the agent of %s", n.name())
	_, err := output(exec.Command(folder+"/node", fmt.Sprint(int(n)), "sh", "-c", "kill -9 $(pidof -s millrace)"))
	return err
}

// stopServer freezes the API server, in the middle, and later ends it and starts it
// again. Nothing else is altered then: who is told what, by whom, is not to be judged.
func (c *churn) stopServer(ctx context.Context) {
	for _, stop := range []func() error{c.freezeServer, c.restartServer} {
		if !sleep(ctx, (c.length-c.stopped)/3) {
			return
		}
		c.calm.Lock()
		time.Sleep(3 * time.Second) // what was asked for is done
		if err := stop(); err != nil {
			c.t.Errorf("stop the API server: %v", err)
		}
		c.calm.Unlock()
	}
}

// freezeServer for a while, and kill all agents meanwhile.
func (c *churn) freezeServer() error {
	pid, err := serverPID()
	if err != nil {
		return err
	}
	c.note("stop the API server")
	err = syscall.Kill(pid, syscall.SIGSTOP)
	goOn := func() error { return syscall.Kill(pid, syscall.SIGCONT) }
	c.t.Cleanup(func() { _ = goOn() })
	time.Sleep(c.stopped / 4)
	defer c.isDown()()
	for _, n := range allNodes() {
		err = errors.Join(err, c.killAgentOn(n))
	}
	time.Sleep(c.stopped - c.stopped/4)
	c.note("let the API server go on")
	err = errors.Join(err, goOn())
	_, ready := output(exec.Command(folder+"/kubectl", "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m"))
	return errors.Join(err, ready)
}

func (c *churn) restartServer() error {
	pid, err := serverPID()
	if err != nil {
		return err
	}
	c.note("end the API server")
	kill(pid)
	time.Sleep(c.stopped / 6)
	c.note("start the API server")
	err = start(control, filepath.Join(filepath.Dir(c.program()), "kube-apiserver"), apiServerFlags()...)
	return errors.Join(err, until(c.t.Context(), "the API server", time.Minute, func() error {
		return exec.Command(folder+"/kubectl", "get", "--raw", "/readyz").Run()
	}))
}

func serverPID() (int, error) {
	pids, err := processes(control)
	for _, pid := range pids {
		if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil && strings.TrimSpace(string(name)) == "kube-apiserver" {
			return pid, nil
		}
	}
	return 0, errors.Join(err, errors.New("no API server runs"))
}

// sleep says whether it was not woken.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
