package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/layer/service"
)

// node is a bed with a folder of manifests and, while it runs, an agent.
type node struct {
	*layertest.Bed
	t                    *testing.T
	manifests, run, pins string
	agent                *exec.Cmd
	log                  bytes.Buffer
	// more is what a runtime says in the plugin's configuration beside the list's: of the
	// pod, or of what it knows.
	more string
}

func newNode(t *testing.T) *node {
	bed := layertest.NewBed(t)
	return &node{Bed: bed, t: t, manifests: t.TempDir(), run: filepath.Join(t.TempDir(), "run"), pins: filepath.Join(bed.BPF, "millrace")}
}

func (n *node) source() string { return "dir:" + n.manifests }

// start runs an agent as its own process, in the bed's namespace, with more flags.
func (n *node) start(more ...string) {
	n.t.Helper()
	n.t.Cleanup(n.kill)
	if err := n.launch(more...); err != nil {
		n.t.Fatal(err)
	}
	n.until("the agent is ready", func(s agent.Status) bool { return s.Ready })
}

// launch starts an agent and waits for nothing.
func (n *node) launch(more ...string) error {
	n.agent = product(append([]string{"agent", "--source", n.source(), "--node", "n1", "--cgroup", n.Cgroup, "--pins", n.pins, "--run", n.run, "--metrics", ""}, more...)...)
	n.agent.Stderr = &n.log
	return netns.Do(n.NetNS, n.agent.Start)
}

func (n *node) kill() {
	if n.agent != nil {
		n.agent.Process.Kill()
		n.agent.Wait()
		n.agent = nil
	}
}

func (n *node) status() (s agent.Status, err error) {
	return s, agent.Ask(context.Background(), n.run, "/status", &s)
}

func (n *node) until(what string, holds func(agent.Status) bool) agent.Status {
	n.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Millisecond) {
		s, err := n.status()
		if err == nil && holds(s) {
			return s
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("waited two minutes until %s: %+v, %v\n%s", what, s, err, n.log.String())
		}
	}
}

// web is a Service and its EndpointSlice.
func web(name, ip string, pods ...string) string {
	var endpoints []string
	for _, pod := range pods {
		endpoints = append(endpoints, fmt.Sprintf(`{"addresses":["%s"]}`, pod))
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %[1]s}
spec: {clusterIP: %[2]s, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-1, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
ports: [{name: http, protocol: TCP, port: 8080}]
endpoints: [%[3]s]
`, name, ip, strings.Join(endpoints, ","))
}

// The life of an agent on a node, by the commands a person would give.
func TestLifeOfAnAgent(t *testing.T) {
	n := newNode(t)
	at := []string{"--pins", n.pins}
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1", "10.244.0.2"))

	stdout, _, status := millrace(t, append([]string{"plan", "--source", n.source()}, at...)...)
	stdout, signals, _ := strings.Cut(stdout, "+ signal") // those are counted where a node is the whole machine
	if want := "+ service 10.96.0.1:80/tcp -> 10.244.0.1:8080, 10.244.0.2:8080\n"; stdout != want || status != exitOK || (signals != "") != isWholeMachine() {
		t.Fatalf("plan before: %q, exit status %d; want %q", stdout, status, want)
	}
	n.start()
	stdout, _, _ = millrace(t, append([]string{"plan", "--source", n.source()}, at...)...)
	if stdout, _, _ := strings.Cut(stdout, "+ signal"); stdout != "" { // the agent is in a namespace
		t.Errorf("the agent is ready and plan still has: %q", stdout)
	}
	stdout, _, _ = millrace(t, "show", "services", "--pins", n.pins, "--run", n.run)
	if !strings.Contains(stdout, "default/web") || !strings.Contains(stdout, "10.244.0.1:8080, 10.244.0.2:8080") {
		t.Errorf("show services: %q", stdout)
	}
	stdout, _, _ = millrace(t, "show", "backends", "--pins", n.pins, "--run", n.run, "-o", "json")
	var shown struct{ Backends []backend }
	if err := json.Unmarshal([]byte(stdout), &shown); err != nil || len(shown.Backends) != 2 || shown.Backends[1].Address != "10.244.0.2:8080" {
		t.Errorf("show backends -o json: %q, %v", stdout, err)
	}
	if stdout, _, status = millrace(t, "status", "--run", n.run); status != exitOK || !strings.Contains(stdout, "layer service  1 objects") {
		t.Errorf("status: %q, exit status %d", stdout, status)
	}
	if _, stderr, status := millrace(t, "remove", "--pins", n.pins, "--run", n.run); status != exitFailed || !strings.Contains(stderr, "another agent is running here") {
		t.Errorf("remove beside a running agent: %q, exit status %d", stderr, status)
	}
	n.kill()
	if stdout, _, _ = millrace(t, "show", "services", "--pins", n.pins, "--run", n.run); !strings.Contains(stdout, "10.96.0.1:80/tcp") {
		t.Errorf("without an agent the kernel's Services are not shown: %q", stdout)
	}
	n.removeEverything()
}

func (n *node) removeEverything() {
	n.t.Helper()
	dry, _, _ := millrace(n.t, "remove", "--dry-run", "--pins", n.pins, "--run", n.run)
	if left, _ := filepath.Glob(n.pins + "/*/*"); len(left) < 14 {
		n.t.Errorf("remove --dry-run left only %v", left)
	}
	real, _, status := millrace(n.t, "remove", "--pins", n.pins, "--run", n.run)
	if dry == "" || dry != real || status != exitOK {
		n.t.Errorf("remove --dry-run says\n%s and remove did, with exit status %d,\n%s", dry, status, real)
	}
	for _, path := range []string{n.pins, n.run} {
		if found, _ := filepath.Glob(path); len(found) > 0 {
			n.t.Errorf("%s is still there", path)
		}
	}
}

// inForce lists the backends in the kernel, read from the pinned maps.
func (n *node) inForce() []string {
	n.t.Helper()
	picture, err := service.New(service.Settings{Pins: filepath.Join(n.pins, "service")}).Look()
	if err != nil {
		n.t.Fatal(err)
	}
	var addresses []string
	for _, subject := range picture.Subjects() {
		for _, address := range subject.(*service.Row).Backends {
			addresses = append(addresses, address.String())
		}
	}
	return addresses
}

// What a malformed manifest cannot do: stop the agent, or take anything away.
func TestMalformedManifestLeavesTheRestInForce(t *testing.T) {
	n := newNode(t)
	file := filepath.Join(n.manifests, "shop.yaml")
	write(t, file, web("a", "10.96.0.1", "10.244.0.1")+"---"+web("b", "10.96.0.2", "10.244.0.1"))
	n.start()
	write(t, file, web("a", "10.96.0.1", "10.244.0.1", "10.244.0.9")+"---"+strings.Replace(web("b", "10.96.0.2", "10.244.0.1"), "port: 80,", "port: eighty,", 1))
	s := n.until("the problem is told", func(s agent.Status) bool { return len(s.Problems) > 0 })
	text := s.Problems[len(s.Problems)-1].Error()
	for _, want := range []string{"shop.yaml:", "Service", "b", "port"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q does not name %s", text, want)
		}
	}
	n.until("the rest is in force", func(agent.Status) bool {
		stdout, _, _ := millrace(t, "show", "services", "--pins", n.pins, "--run", n.run)
		return strings.Contains(stdout, "10.244.0.9:8080") && strings.Contains(stdout, "10.96.0.2:80/tcp")
	})
	// and an agent that has never seen the good version takes nothing away
	n.kill()
	n.start()
	n.until("the new agent has read it", func(s agent.Status) bool { return s.Source.Unread > 0 })
	if stdout, _, _ := millrace(t, "show", "services", "--pins", n.pins, "--run", n.run); !strings.Contains(stdout, "10.96.0.2:80/tcp") {
		t.Errorf("the new agent removed what it could not read: %s", stdout)
	}
	if _, stderr, status := millrace(t, "status", "--run", n.run); status != exitFindings || !strings.Contains(stderr, "cannot be used") {
		t.Errorf("status with a problem: exit status %d, %q", status, stderr)
	}
}

// A layer that is off and cannot be removed keeps nobody from serving the others.
func TestUnwantedLayerThatStays(t *testing.T) {
	n := newNode(t)
	stranger := filepath.Join(n.run, "pod", "stranger")
	if err := os.MkdirAll(filepath.Dir(stranger), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, stranger, "somebody's")
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1"))
	n.start()
	if got := n.inForce(); !slices.Equal(got, []string{"10.244.0.1:8080"}) {
		t.Errorf("in force is %v", got)
	}
	n.kill() // its log is whole then
	if log := n.log.String(); !strings.Contains(log, "level=ERROR") || !strings.Contains(log, "layer=pod") || !strings.Contains(log, filepath.Dir(stranger)+": directory not empty") {
		t.Errorf("the log does not say what stays, and why:\n%s", log)
	}
	if _, err := os.Stat(stranger); err != nil {
		t.Error(err)
	}
}

// The figures of "start to attached", "idle memory" and "change to kernel" are
// printed, not judged here: they belong to a machine.
func TestFiguresOfAnAgent(t *testing.T) {
	n := newNode(t)
	file := filepath.Join(n.manifests, "web.yaml")
	write(t, file, web("web", "10.96.0.1", "10.244.0.1"))
	n.start()
	look := n.inForce
	var took []time.Duration
	for i := range 50 {
		pod := fmt.Sprintf("10.244.1.%d", i+1)
		begun := time.Now()
		write(t, file, web("web", "10.96.0.1", pod))
		for !slices.Contains(look(), pod+":8080") {
			if time.Since(begun) > 10*time.Second {
				t.Fatal("ten seconds, and the endpoint is not in the kernel")
			}
		}
		took = append(took, time.Since(begun))
	}
	slices.Sort(took)
	s, err := n.status()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("start to attached %.0f ms; agent %s resident, maps %s; file written to endpoint in the kernel p50 %v, worst %v (of 50)",
		s.AttachedAfterMS, bytesText(s.Memory.ResidentBytes), bytesText(s.Memory.MapBytes), took[len(took)/2], took[len(took)-1])
	if s.Latency == nil || s.Latency.Changes < 50 {
		t.Errorf("the agent knows of %+v changes, 50 were made", s.Latency)
	}
}

// Connections go on while an agent is killed twenty times.
func TestKilledAgentLosesNoConnection(t *testing.T) {
	n := newNode(t)
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1"))
	n.AddAddress("10.244.0.1/32")
	n.start()
	err := n.Inside(func() error {
		listener, err := net.Listen("tcp", "10.244.0.1:8080")
		if err != nil {
			return err
		}
		t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				conn.Close()
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	stop, result := make(chan struct{}), make(chan error, 1)
	tries := 0
	go func() {
		result <- n.Inside(func() error {
			for ; ; tries++ {
				select {
				case <-stop:
					return nil
				default:
				}
				conn, err := net.DialTimeout("tcp", "10.96.0.1:80", 5*time.Second)
				if err != nil {
					return err
				}
				conn.Close()
			}
		})
	}()
	for range 20 {
		if err := n.agent.Process.Signal(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		n.agent.Wait()
		n.start()
	}
	close(stop)
	if err := <-result; err != nil {
		t.Fatalf("after %d connections: %v", tries, err)
	}
	if tries < 100 {
		t.Errorf("only %d connections during 20 kills", tries)
	}
	t.Logf("20 kills during %d connections, none failed", tries)
}
