package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strconv"
	"syscall"
)

// Client speaks with a lab that is up. Its methods may be called from several
// goroutines; each call is a connection of its own.
type Client struct {
	name   string
	folder string
}

// Dial finds the lab of this name. The error is ErrNotUp where there is none.
func Dial(name string) (*Client, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	folder, err := filepath.EvalSymlinks(Folder(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notUp(name)
	}
	if err != nil {
		return nil, fmt.Errorf("find lab %s: %w", name, err)
	}
	c := &Client{name: name, folder: folder}
	conn, err := net.Dial("unix", c.socket())
	if absent(err) {
		return nil, notUp(name)
	}
	if err != nil {
		return nil, fmt.Errorf("find lab %s: %w", name, err)
	}
	conn.Close()
	return c, nil
}

func notUp(name string) error {
	return fmt.Errorf("%w: no lab %q is up: run millrace lab up -f FILE --name %s", ErrNotUp, name, name)
}

// absent reports whether a unix socket has nobody behind it.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

func (c *Client) socket() string { return filepath.Join(c.folder, "lab.sock") }

func (c *Client) post(ctx context.Context, path string, in, out any) error {
	err := postJSON(ctx, c.socket(), "POST", path, in, out)
	if absent(err) {
		return notUp(c.name)
	}
	return err
}

// Status pictures the lab now.
func (c *Client) Status(ctx context.Context) (*Status, error) { return c.status(ctx, "/status") }

func (c *Client) status(ctx context.Context, path string) (*Status, error) {
	var s Status
	err := postJSON(ctx, c.socket(), "GET", path, nil, &s)
	if absent(err) {
		return nil, notUp(c.name)
	}
	if err != nil {
		return nil, fmt.Errorf("read status of lab %s: %w", c.name, err)
	}
	return &s, nil
}

// Await returns the first status for which the condition holds. It asks again
// whenever something has changed.
func (c *Client) Await(ctx context.Context, condition func(*Status) bool) (*Status, error) {
	s, err := c.Status(ctx)
	for err == nil && !condition(s) {
		s, err = c.status(ctx, "/status?after="+strconv.FormatUint(s.Revision, 10))
	}
	return s, err
}

// Scale sets how many pods a workload has, until its manifest says another
// number, and returns when it has them, ready and published. workload is
// "name", "namespace/name" or "kind/namespace/name".
func (c *Client) Scale(ctx context.Context, workload string, n int) error {
	return c.post(ctx, "/scale", order{Name: workload, Count: n}, nil)
}

// Kill ends a pod abruptly, without a drain or in the midst of it, and returns
// its full name when it is gone from the published cluster. Its workload makes
// a new one.
func (c *Client) Kill(ctx context.Context, pod string) (string, error) {
	return c.pod(ctx, "/kill", pod)
}

// Replace makes a new pod in place of one and returns the new one's full name
// when it is ready and published and the old one gets no new connections. The
// old one serves on for the time of Config.Drain.
func (c *Client) Replace(ctx context.Context, pod string) (string, error) {
	return c.pod(ctx, "/replace", pod)
}

func (c *Client) pod(ctx context.Context, path, pod string) (string, error) {
	var answer told
	err := c.post(ctx, path, order{Name: pod}, &answer)
	return answer.Pod, err
}

// KillAgent kills a node's agent with SIGKILL. The lab starts it again.
func (c *Client) KillAgent(ctx context.Context, node string) error {
	return c.post(ctx, "/agent-kill", order{Name: node}, nil)
}

// StopAgent asks a node's agent with SIGTERM to end. The lab starts it again.
func (c *Client) StopAgent(ctx context.Context, node string) error {
	return c.post(ctx, "/agent-stop", order{Name: node}, nil)
}

// Call lets a pod call somebody. pod is found as Status.Pod does.
func (c *Client) Call(ctx context.Context, pod string, r CallRequest) ([]Answer, error) {
	var answers []Answer
	err := c.work(ctx, pod, "/call", r, &answers)
	return answers, err
}

// Load lets a pod call at a steady rate and returns when it has done so.
func (c *Client) Load(ctx context.Context, pod string, r LoadRequest) (*LoadResult, error) {
	var result LoadResult
	if err := c.work(ctx, pod, "/load", r, &result); err != nil {
		return nil, err
	}
	return &result, nil
}

// EndLoads ends the loads of a pod that have no duration; their Load returns.
func (c *Client) EndLoads(ctx context.Context, pod string) error {
	return c.work(ctx, pod, "/load/end", nil, nil)
}

func (c *Client) work(ctx context.Context, pod, path string, in, out any) error {
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	p, err := s.Pod(pod)
	if err != nil {
		return err
	}
	if err := postJSON(ctx, p.Socket, "POST", path, in, out); err != nil {
		return fmt.Errorf("let pod %s work: %w", p, err)
	}
	return nil
}

// Down asks the lab to end. It answers before everything is gone; the function
// Down waits for that.
func (c *Client) Down(ctx context.Context) error { return c.post(ctx, "/down", nil, nil) }

// Exec replaces the calling process by argv, run inside a pod's network
// namespace and cgroup, so that what it does meets what the pod's own process
// meets. pod is found as Status.Pod does; a node's name enters the node. It
// returns only with an error.
func Exec(name, pod string, argv []string) error {
	c, err := Dial(name)
	if err != nil {
		return err
	}
	s, err := c.Status(context.Background())
	if err != nil {
		return err
	}
	if n := s.Node(pod); n != nil {
		return execInside(n.Netns, filepath.Join(n.Cgroup, "host"), argv)
	}
	p, err := s.Pod(pod)
	if err != nil {
		return err
	}
	return execInside(p.Netns, p.Cgroup, argv, "MILLRACE_POD="+p.String())
}
