package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/netns"
)

// pod is a member and the process behind it. What the member holds, and pid,
// restarts and gone, is read and written under the cluster's lock.
type pod struct {
	member
	pid      int
	restarts int
	crashes  int // in a row, without having been ready in between
	// gone: no longer published; its process is about to end. killed: it was
	// asked to end at once.
	gone, killed bool
	// leftAt is the first version in which it is Leaving.
	leftAt uint64
	// leave is closed when it shall drain and go, kill when it shall go at once.
	leave, kill chan struct{}
}

func newPod(m member) *pod {
	return &pod{member: m, leave: make(chan struct{}), kill: make(chan struct{})}
}

// place is where a pod's parts are.
type place struct {
	node   *node
	netns  string
	cgroup string
	veth   string
	socket string
}

func (c *cluster) place(p *pod) place {
	n := c.node(p.Pod.Node)
	at := place{
		node:   n,
		netns:  c.paths.netns("pod", fileName(p.Pod.Name)),
		cgroup: filepath.Join(n.info.Cgroup, "pods", fileName(p.Pod.Name)),
		veth:   fmt.Sprintf("pod%d", p.Serial),
		socket: filepath.Join(c.paths.folder, "pods", fmt.Sprintf("%d.sock", p.Serial)),
	}
	if p.Pod.HostNetwork {
		at.netns = n.info.Netns
	}
	return at
}

func (c *cluster) node(name string) *node {
	for _, n := range c.nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// live is the life of one pod, from its namespace to its removal.
func (c *cluster) live(ctx context.Context, p *pod) {
	object, at := "Pod "+p.Pod.Name.String(), c.place(p)
	if err := c.build(ctx, p, at); err != nil {
		c.happen(object, err.Error())
		pause(ctx, p, time.Second) // then the plan asks for a new one
	} else {
		c.serve(ctx, p, at)
	}
	if ctx.Err() != nil {
		return // the whole lab ends, and is swept at once
	}
	version := c.change(func() { p.gone, p.Ready = true, false })
	c.published(ctx, version)
	err := c.clear(ctx, p, at)
	c.change(func() {
		delete(c.pods, p.Pod.Name)
		c.happenLocked(object, "")
		if err != nil {
			c.happenLocked(object, err.Error())
		}
	})
}

// build makes the pod's group and namespace.
func (c *cluster) build(ctx context.Context, p *pod, at place) error {
	if !acquire(ctx, c.making) {
		return context.Cause(ctx)
	}
	defer release(c.making)
	if err := cgroup.Create(at.cgroup); err != nil {
		return err
	}
	if p.Pod.HostNetwork {
		return nil
	}
	if err := at.node.joinPod(at.netns, at.veth, p.Pod.Addresses); err != nil {
		return fmt.Errorf("make pod %s: %w", p.Pod.Name, err)
	}
	return nil
}

// clear removes what build made, with every process that is still in it.
func (c *cluster) clear(ctx context.Context, p *pod, at place) error {
	if !acquire(ctx, c.clearing) {
		return nil
	}
	defer release(c.clearing)
	errs := []error{cgroup.Remove(at.cgroup)}
	if !p.Pod.HostNetwork {
		errs = append(errs, at.node.leavePod(at.netns, at.veth))
	}
	if err := os.Remove(at.socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove pod %s: %w", p.Pod.Name, err)
	}
	return nil
}

func acquire(ctx context.Context, slots chan struct{}) bool {
	select {
	case slots <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func release(slots chan struct{}) { <-slots }

// serve keeps a process behind the pod, starting it again with growing pauses
// when it dies by itself, until the pod shall go. Then the process is gone, too.
func (c *cluster) serve(ctx context.Context, p *pod, at place) {
	object := "Pod " + p.Pod.Name.String()
	for pauses := newBackoff(); ; {
		started := time.Now()
		process, err := c.startPod(ctx, p, at)
		if err == nil {
			err = c.attend(ctx, p, process)
			process.end()
		}
		c.change(func() {
			p.Ready, p.pid = false, 0
			if err != nil {
				p.restarts++
				p.crashes++
				c.happenLocked(object, err.Error())
			}
		})
		if err == nil || !pause(ctx, p, pauses.next(time.Since(started))) {
			return
		}
	}
}

// attend watches a process until it dies by itself, which is an error, or the
// pod shall go, which is not.
func (c *cluster) attend(ctx context.Context, p *pod, process *podProcess) error {
	listening := process.listening
	for {
		select {
		case err := <-listening:
			if err != nil {
				return err
			}
			listening = nil
			c.change(func() {
				p.Ready, p.crashes = true, 0
				c.happenLocked("Pod "+p.Pod.Name.String(), "")
			})
		case <-process.exited:
			if listening != nil { // what it reported last says why
				if err := <-listening; err != nil {
					return err
				}
			}
			return fmt.Errorf("its process ended (%s): it is started again", process.cmd.ProcessState)
		case <-p.leave:
			c.drain(ctx, p, process)
			return nil
		case <-p.kill:
			return nil
		case <-ctx.Done():
			return nil
		}
	}
}

// drain lets a leaving pod serve on, from the moment its leaving is published,
// and takes it out of the published cluster before it ends.
func (c *cluster) drain(ctx context.Context, p *pod, process *podProcess) {
	if c.published(ctx, p.leftAt) != nil {
		return
	}
	select {
	case <-time.After(c.cfg.Drain):
	case <-process.exited:
	case <-p.kill:
	case <-ctx.Done():
		return
	}
	version := c.change(func() { p.gone = true })
	c.published(ctx, version)
}

// pause waits before another try and reports whether to try at all.
func pause(ctx context.Context, p *pod, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-p.leave:
	case <-p.kill:
	case <-ctx.Done():
	}
	return false
}

// backoff is a pause that doubles from 100 ms to 10 s and starts anew after
// something ran for ten seconds.
type backoff struct{ pause time.Duration }

func newBackoff() *backoff { return &backoff{} }

// fresh reports whether the next pause is the first of its row.
func (b *backoff) fresh(ran time.Duration) bool { return ran > 10*time.Second || b.pause == 0 }

func (b *backoff) next(ran time.Duration) time.Duration {
	if b.fresh(ran) {
		b.pause = 50 * time.Millisecond
	}
	b.pause = min(2*b.pause, 10*time.Second)
	return b.pause
}

// podProcess is a running PodMain.
type podProcess struct {
	cmd *exec.Cmd
	// input is held open: when it closes, the process ends.
	input *os.File
	// listening gets nil when every port listens, or why not.
	listening chan error
	exited    chan struct{}
}

// podEnv keeps a pod's process small: one processor, little garbage.
var podEnv = []string{"GOMAXPROCS=1", "GOGC=20", "GOMEMLIMIT=64MiB"}

// startPod starts the pod's process inside its cgroup and namespace.
func (c *cluster) startPod(ctx context.Context, p *pod, at place) (*podProcess, error) {
	if !acquire(ctx, c.making) {
		return nil, context.Cause(ctx)
	}
	defer release(c.making)
	log, err := appendLog(c.paths.log("pods"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	argv := append(c.cfg.PodCommand[:len(c.cfg.PodCommand):len(c.cfg.PodCommand)], p.Pod.Name.String())
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), podEnv...)
	cmd.Stderr = log
	process := &podProcess{cmd: cmd, listening: make(chan error, 1), exited: make(chan struct{})}
	if err := process.start(p, at); err != nil {
		return nil, fmt.Errorf("start pod %s: %w", p.Pod.Name, err)
	}
	c.change(func() { p.pid = cmd.Process.Pid })
	return process, nil
}

func (q *podProcess) start(p *pod, at place) error {
	stdin, input, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stdin.Close()
	output, stdout, err := os.Pipe()
	if err != nil {
		input.Close()
		return err
	}
	defer stdout.Close()
	q.input, q.cmd.Stdin, q.cmd.Stdout = input, stdin, stdout
	if err := netns.Start(at.netns, at.cgroup, q.cmd); err != nil {
		input.Close()
		output.Close()
		return err
	}
	go func() {
		q.cmd.Wait()
		close(q.exited)
	}()
	go func() {
		defer output.Close()
		q.listening <- readReport(output)
	}()
	return json.NewEncoder(input).Encode(podSpec{
		Name:         p.Pod.Name,
		Node:         p.Pod.Node,
		Addresses:    p.Pod.Addresses,
		Ports:        p.Pod.Ports,
		OwnNamespace: !p.Pod.HostNetwork,
		Socket:       at.socket,
	})
}

func readReport(output *os.File) error {
	line, err := bufio.NewReader(output).ReadBytes('\n')
	if err != nil {
		return errors.New("its process ended before it listened: log/pods.log may say why")
	}
	var report podReport
	if err := json.Unmarshal(line, &report); err != nil {
		return fmt.Errorf("read what its process reports: %w", err)
	}
	if report.Error != "" {
		return errors.New(report.Error)
	}
	return nil
}

// end kills the process and waits for it.
func (q *podProcess) end() {
	q.cmd.Process.Kill()
	<-q.exited
	q.input.Close()
}

// appendLog opens a log file, which later is cut by trimLogs while it is open.
func appendLog(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}
