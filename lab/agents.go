package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/millrace/millrace/kernel/netns"
)

// agent is the agent of one node: a program that the lab starts, restarts when
// it dies, and otherwise knows nothing of. Its fields are under the cluster's
// lock.
type agent struct {
	node     *node
	pid      int
	ready    bool
	killed   bool // by signalAgent, which wants it back at once
	restarts int
}

// tend keeps the agent of one node running until ctx ends, with the pauses of
// agentPause.
func (c *cluster) tend(ctx context.Context, a *agent) {
	object := "agent of node " + a.node.Name
	for pauses := newBackoff(); ; {
		started := time.Now()
		err := c.runAgent(ctx, a)
		if ctx.Err() != nil {
			return
		}
		var ready, killed bool
		c.change(func() {
			ready, killed = a.ready, a.killed
			a.pid, a.ready, a.killed = 0, false, false
			a.restarts++
			c.happenLocked(object, fmt.Sprintf("%v: it is started again; its log is %s", err, c.agentLog(a)))
		})
		select {
		case <-time.After(agentPause(pauses, time.Since(started), ready, killed)):
		case <-ctx.Done():
			return
		}
	}
}

// agentPause is how long an agent that died rests before it is started again:
// not at all where it was killed through the lab, or was ready and died for the
// first time in a while; up to a second where it was ready; and as long as the
// back-off says where it never was.
func agentPause(pauses *backoff, ran time.Duration, ready, killed bool) time.Duration {
	if killed {
		return 0
	}
	first := pauses.fresh(ran)
	pause := pauses.next(ran)
	switch {
	case ready && first:
		return 0
	case ready:
		return min(pause, time.Second)
	}
	return pause
}

func (c *cluster) agentLog(a *agent) string { return c.paths.log("agent-" + a.node.Name) }

// runAgent runs the agent once, to its end.
func (c *cluster) runAgent(ctx context.Context, a *agent) error {
	log, err := appendLog(c.agentLog(a))
	if err != nil {
		return err
	}
	defer log.Close()
	argv := c.cfg.AgentCommand(a.node.info)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	// The socket of a killed predecessor must not be taken for this one's.
	socket := filepath.Join(a.node.info.RunFolder, "agent.sock")
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := netns.Start(a.node.info.Netns, filepath.Join(a.node.info.Cgroup, "agent"), cmd); err != nil {
		return fmt.Errorf("start %s: %w", argv[0], err)
	}
	c.change(func() { a.pid = cmd.Process.Pid })
	running, ended := context.WithCancel(ctx)
	go c.awaitAgent(running, a, socket)
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	err = cmd.Wait()
	ended()
	if err == nil {
		err = errors.New("it ended by itself")
	}
	return err
}

// awaitAgent asks the agent until it says that it is ready.
func (c *cluster) awaitAgent(ctx context.Context, a *agent, socket string) {
	for tick := time.NewTicker(10 * time.Millisecond); ; {
		if agentReady(ctx, socket) {
			c.change(func() {
				if ctx.Err() == nil {
					a.ready = true
					c.happenLocked("agent of node "+a.node.Name, "")
				}
			})
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func agentReady(ctx context.Context, socket string) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	request, err := http.NewRequestWithContext(ctx, "GET", "http://agent/status", nil)
	if err != nil {
		return false
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return false
	}
	defer response.Body.Close()
	var status struct {
		Ready bool `json:"ready"`
	}
	err = json.NewDecoder(response.Body).Decode(&status)
	return err == nil && response.StatusCode == http.StatusOK && status.Ready
}

// logLimit is how large a log may grow, in bytes, before all but the last
// quarter is cut off.
const logLimit = 4 << 20

// trimLogs keeps the logs in the folder bounded until ctx ends. Writers have
// them open for appending, so cutting is safe.
func trimLogs(ctx context.Context, folder string) {
	for tick := time.NewTicker(5 * time.Second); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		logs, _ := filepath.Glob(filepath.Join(folder, "*.log"))
		for _, path := range logs {
			if info, err := os.Stat(path); err == nil && info.Size() > logLimit {
				trimLog(path)
			}
		}
	}
}

// trimLog keeps the last quarter of the limit. What is written meanwhile can
// be lost; an error leaves the log as it is, for the next round.
func trimLog(path string) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return
	}
	tail := make([]byte, logLimit/4)
	n, _ := file.ReadAt(tail, info.Size()-int64(len(tail)))
	if file.Truncate(0) == nil {
		file.Write(tail[:n])
	}
}
