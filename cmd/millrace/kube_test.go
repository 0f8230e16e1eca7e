package main

import (
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/source/kube/kubetest"
)

// clustered is a node whose agent asks an API server in the same namespace.
type clustered struct {
	*node
	*kubetest.Server
	kubeconfig, address string
	down                atomic.Bool
}

func newClustered(t *testing.T) *clustered {
	c := &clustered{node: newNode(t), Server: kubetest.New()}
	var listener net.Listener
	err := c.Inside(func() (err error) {
		listener, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: c.Server}
	go web.Serve(listener) // ends with Close
	t.Cleanup(func() { web.Close() })
	c.Fault(func(http.ResponseWriter, *http.Request) bool {
		if c.down.Load() {
			panic(http.ErrAbortHandler)
		}
		return false
	})
	c.address = "http://" + listener.Addr().String()
	// The kubeconfig names the Service of the API server, which nobody serves yet.
	c.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	write(t, c.kubeconfig, `
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://10.111.0.1:443"}}]
contexts: [{name: x, context: {cluster: c}}]
current-context: x
`)
	return c
}

func (c *clustered) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// begin runs an agent, with more flags, and does not wait for it.
func (c *clustered) begin(more ...string) {
	c.t.Helper()
	c.agent = product(append([]string{"agent", "--source", "kube:" + c.kubeconfig, "--api-server", "127.0.0.1:1," + c.address, "--node", "n1",
		"--cgroup", c.Cgroup, "--pins", c.pins, "--run", c.run, "--metrics", ""}, more...)...)
	c.agent.Stderr = &c.log
	if err := netns.Do(c.NetNS, c.agent.Start); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(c.kill)
}

// serves waits until the Service web is in the kernel with these endpoints.
func (c *clustered) serves(pods ...string) {
	c.t.Helper()
	c.until(fmt.Sprintf("the kernel has %v", pods), func(agent.Status) bool {
		have := c.inForce()
		return len(have) == len(pods)+1 && !slices.ContainsFunc(pods, func(pod string) bool { return !slices.Contains(have, pod+":8080") })
	})
}

// A node of a cluster: the agent starts before any Service works, follows
// changes, and outlives the API server, also when it is killed meanwhile.
func TestAgentOfAnAPIServer(t *testing.T) {
	c := newClustered(t)
	c.must(c.Apply(web("web", "10.96.0.2", "10.244.0.1", "10.244.0.2")))
	plan := []string{"plan", "--source", "kube:" + c.kubeconfig, "--api-server", c.address, "--pins", c.pins, "--node", "n1"}
	var stdout string
	c.must(c.Inside(func() error { stdout, _, _ = millrace(t, plan...); return nil }))
	if want := "+ service 10.96.0.2:80/tcp -> 10.244.0.1:8080, 10.244.0.2:8080\n"; !strings.Contains(stdout, want) {
		t.Errorf("plan before: %q, want %q", stdout, want)
	}
	c.begin()
	c.until("the agent is ready", func(s agent.Status) bool { return s.Ready && s.Source.Complete })
	c.serves("10.244.0.1", "10.244.0.2")
	if s, err := c.status(); err == nil {
		t.Logf("agent %s resident", bytesText(s.Memory.ResidentBytes))
	}
	c.must(c.Apply(web("web", "10.96.0.2", "10.244.0.3")))
	c.serves("10.244.0.3")

	c.down.Store(true)
	c.Cut(true)
	s := c.until("status says that the API server is gone", func(s agent.Status) bool { return s.Source.Error != "" && s.Source.ErrorSince != nil })
	if !s.Ready || s.Source.Services != 2 || !strings.Contains(s.Source.Error, "watch the cluster: ") {
		t.Errorf("meanwhile: ready %v, %d services, %q", s.Ready, s.Source.Services, s.Source.Error)
	}
	c.serves("10.244.0.3")
	c.kill()
	c.begin()
	s = c.until("the new agent says that it is gone", func(s agent.Status) bool { return s.Source.Error != "" })
	if s.Ready || s.Source.Complete {
		t.Errorf("a new agent that has seen nothing: ready %v, complete %v", s.Ready, s.Source.Complete)
	}
	c.serves("10.244.0.3")

	c.must(c.Apply(web("web", "10.96.0.2", "10.244.0.4")))
	c.down.Store(false)
	c.until("the agent is ready again", func(s agent.Status) bool { return s.Ready && s.Source.Error == "" && len(s.Problems) == 0 })
	c.serves("10.244.0.4")
	c.must(c.Remove(web("web", "10.96.0.2")))
	c.until("what was removed is gone", func(agent.Status) bool { return len(c.inForce()) == 1 })
}

// Ten thousand Services through an API server: every one answers, and the agent
// stays small. The bound is memory, not time; the time is printed.
func TestManyServicesOfAnAPIServer(t *testing.T) {
	const services, endpoints, megabytes = 10_000, 4, 85
	c := newClustered(t)
	for from := 0; from < services; from += 1000 {
		c.must(c.Apply(string(thousand(from, endpoints))))
	}
	c.Compact()
	begun := time.Now()
	c.begin()
	s := c.until("the agent is ready", func(s agent.Status) bool { return s.Ready })
	took := time.Since(begun)
	answered := c.connectToAll(services)
	if now, err := c.status(); err == nil {
		s = now
	}
	t.Logf("%d of %d answered; ready %v after the start; agent %s resident, maps %s", answered, services,
		took.Round(time.Millisecond), bytesText(s.Memory.ResidentBytes), bytesText(s.Memory.MapBytes))
	if answered != services {
		t.Errorf("only %d of %d Services answer", answered, services)
	}
	if resident := s.Memory.ResidentBytes; resident > megabytes*1e6 {
		t.Errorf("the agent has %s, more than %d MB", bytesText(resident), megabytes)
	}
}
