package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
	"github.com/millrace/millrace/test/metrics"
)

// A machine of its own: the process with the number 2 is called kthreadd, and is in the
// agent's network namespace, so that the agent counts drops. It ends with the agent.
const wholeMachine = `"$0" 600 & mount -t proc proc /proc && exec "$@"`

// startWhole runs an agent that takes the bed for the whole machine, with its metrics at
// an address.
func (n *node) startWhole(address string, more ...string) {
	n.t.Helper()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		n.t.Fatal(err)
	}
	program, err := os.ReadFile(sleep)
	if err != nil {
		n.t.Fatal(err)
	}
	thread := filepath.Join(n.t.TempDir(), "kthreadd")
	if err := os.WriteFile(thread, program, 0o755); err != nil {
		n.t.Fatal(err)
	}
	n.agent = exec.Command("sh", slices.Concat([]string{"-c", wholeMachine, thread, os.Args[0], "agent", "--source", n.source(), "--node", "n1",
		"--cgroup", n.Cgroup, "--pins", n.pins, "--run", n.run, "--metrics", address}, more)...)
	n.agent.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Unshareflags: unix.CLONE_NEWNS}
	n.agent.Stderr = &n.log
	if err := netns.Do(n.NetNS, n.agent.Start); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(n.kill)
	n.until("the agent is ready", func(s agent.Status) bool { return s.Ready })
}

// clientIn opens its connections in a network namespace, a new one for each request.
func clientIn(path string) *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, address string) (conn net.Conn, err error) {
			err = netns.Do(path, func() error { conn, err = net.Dial(network, address); return err })
			return conn, err
		}}}
}

// get asks a port of the node.
func (n *node) get(address string) (status int, body string) {
	n.t.Helper()
	response, err := clientIn(n.NetNS).Get("http://" + address)
	if err != nil {
		n.t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return response.StatusCode, string(text)
}

// talk opens a connection between programs of the node, which stays open.
func (n *node) talk(address string) {
	n.t.Helper()
	n.AddAddress(address + "/32")
	var ends [2]net.Conn
	err := n.Inside(func() error {
		server, err := net.Listen("tcp", address+":8080")
		if err != nil {
			return err
		}
		defer server.Close()
		if ends[0], err = net.Dial("tcp", address+":8080"); err != nil {
			return err
		}
		ends[1], err = server.Accept()
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	for i, end := range ends {
		n.t.Cleanup(func() { end.Close() })
		if _, err := end.Write([]byte("heard")); err != nil {
			n.t.Fatal(err)
		}
		if _, err := io.ReadFull(ends[1-i], make([]byte, 5)); err != nil {
			n.t.Fatal(err)
		}
	}
}

// What deploy/monitoring is made for is what a node shows.
func TestMetricsAreListed(t *testing.T) {
	n := newNode(t)
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1", "10.244.0.2"))
	n.startWhole("127.0.0.1:9470", "--kube-proxy-ports", "--dns", "cluster.local")
	for _, port := range []string{"127.0.0.1:10256/healthz", "127.0.0.1:10256/livez"} {
		if status, body := n.get(port); status != http.StatusOK {
			t.Errorf("%s says %d %s", port, status, body)
		}
	}
	if err := n.Inside(func() error { // a packet that nobody waits for
		conn, err := net.Dial("udp", "127.0.0.1:9")
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write([]byte("lost"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	n.talk("10.1.0.1")
	status, shown := n.get("127.0.0.1:9470/metrics")
	if !strings.Contains(shown, "millrace_flow_rtt_seconds{") {
		t.Errorf("a connection is open and is not in:\n%s", shown)
	}
	if status != http.StatusOK || !strings.Contains(shown, `millrace_drops_total{namespace="",pod="",reason="NO_SOCKET"} `) {
		t.Fatalf("status %d; a packet died and is not in:\n%s", status, shown)
	}
	metrics.Listed(t, "../..", "millrace agent", shown,
		"reasons millrace_events_total service: "+strings.Join(metrics.Values(shown, "millrace_events_total", "reason", `layer="service"`), ", "),
		"reasons millrace_events_total trace: "+strings.Join(metrics.Values(shown, "millrace_events_total", "reason", `reason="connection `), ", "),
		"reasons millrace_events_total dns: "+strings.Join(metrics.Values(shown, "millrace_events_total", "reason", `layer="dns"`), ", "),
		"reasons millrace_drops_total usual: "+strings.Join(cause.UsualReasons(), ", "))
}
