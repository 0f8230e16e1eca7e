package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/model"
	"golang.org/x/sys/unix"
)

// usualPatience is how long the lab waits for what does not come: for agents
// to become ready at first, for a store that refuses, for a workload's pods.
const usualPatience = time.Minute

// errDown is why a lab ends that somebody asked to end.
var errDown = errors.New("lab down")

// Run brings a lab up, keeps it alive, and takes it down when ctx ends, on
// SIGTERM or SIGINT, or when a client asks. It returns nil when the lab was
// asked to end, and otherwise why it could not come up or go on; either way
// nothing of the lab is left.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.check(); err != nil {
		return err
	}
	p, err := newPaths(cfg.Name, cfg.Folder)
	if err != nil {
		return fmt.Errorf("bring up lab %s: %w", cfg.Name, err)
	}
	lock, err := p.take(cfg.Progress)
	if err != nil {
		return err
	}
	defer lock.Close()
	asked, stop := signal.NotifyContext(ctx, unix.SIGTERM, unix.SIGINT)
	defer stop()
	ctx, cancel := context.WithCancelCause(asked)
	c := newCluster(ctx, cfg, p)
	err = c.run(ctx, cancel)
	cancel(err)
	c.lives.Wait()
	if errors.Is(err, errDown) || asked.Err() != nil {
		err = nil
	}
	cfg.Progress("taking the lab down")
	return errors.Join(err, p.sweep())
}

// take makes the folder and locks it for the life of this process. What a lab
// of the same name left when it was killed is removed first.
func (p paths) take(progress func(string)) (*os.File, error) {
	err := p.vacate()
	var lock *os.File
	if err == nil {
		lock, err = lockFolder(p.folder, false)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("%w: %s: run millrace lab down --name %s first, or choose another name", ErrUp, p.name, p.name)
	}
	if err == nil && p.anythingLeft() {
		progress("removing what an earlier lab of this name left")
		err = p.sweepContents()
	}
	if err == nil {
		err = p.furnish()
	}
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("bring up lab %s: %w", p.name, err)
	}
	return lock, nil
}

// vacate removes what a dead lab of this name left in another folder.
func (p paths) vacate() error {
	folder, err := filepath.EvalSymlinks(Folder(p.name))
	if err != nil || folder == p.folder {
		return nil
	}
	lock, err := lockFolder(folder, false)
	if err != nil {
		return err
	}
	defer lock.Close()
	p.folder = folder
	return p.sweep()
}

// furnish makes the folders that are there from the start and, for a lab in a
// folder of its own, the link by which others find it.
func (p paths) furnish() error {
	for _, name := range []string{"log", "pods"} {
		if err := os.MkdirAll(filepath.Join(p.folder, name), 0o700); err != nil {
			return err
		}
	}
	if p.folder == Folder(p.name) {
		return nil
	}
	if err := os.MkdirAll(Base, 0o700); err != nil {
		return err
	}
	os.Remove(Folder(p.name)) // at most a dead link: vacate looked
	return os.Symlink(p.folder, Folder(p.name))
}

// run is the lab from the first Snapshot to the reason for its end.
func (c *cluster) run(ctx context.Context, cancel context.CancelCauseFunc) error {
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel(nil)
	group.Go(func() {
		if err := c.cfg.Watch(ctx, c.deliver); err != nil && ctx.Err() == nil {
			c.watchFailed(err, cancel)
		}
	})
	control, err := c.listen(cancel)
	if err != nil {
		return err
	}
	defer control.Close()
	if err := c.wait(ctx, func() bool { return c.wishes != nil }); err != nil {
		return err
	}
	if err := c.layOut(); err != nil {
		return err
	}
	store, err := c.openStore()
	if err != nil {
		return err
	}
	group.Go(func() { c.publish(ctx, store) })
	group.Go(func() { c.reconcile(ctx) })
	group.Go(func() { trimLogs(ctx, filepath.Join(c.paths.folder, "log")) })
	if c.cfg.AgentCommand != nil {
		for _, a := range c.agents {
			group.Go(func() { c.tend(ctx, a) })
		}
	}
	if err := c.comeUp(ctx); err != nil {
		return err
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// watchFailed ends a lab that never saw its manifests; one that is up goes on
// with what it saw last.
func (c *cluster) watchFailed(err error, cancel context.CancelCauseFunc) {
	c.mu.Lock()
	seen := c.wishes != nil
	c.mu.Unlock()
	if !seen {
		cancel(fmt.Errorf("bring up lab %s: %w", c.cfg.Name, err))
		return
	}
	c.happen("manifests", err.Error())
}

// layOut makes the network and the nodes.
func (c *cluster) layOut() error {
	c.mu.Lock()
	wishes := c.wishes
	c.mu.Unlock()
	ranges, planned, err := c.paths.claimRanges(wishes, c.cfg.Nodes)
	if err != nil {
		return fmt.Errorf("bring up lab %s: %w", c.cfg.Name, err)
	}
	c.cfg.Progress(fmt.Sprintf("making %d nodes: pods %s and %s, services %s and %s", len(planned),
		ranges.Pods[0], ranges.Pods[1], ranges.Services[0], ranges.Services[1]))
	nodes, err := c.makeNodes(planned, ranges)
	if err != nil {
		return fmt.Errorf("bring up lab %s: %w", c.cfg.Name, err)
	}
	c.change(func() {
		c.ranges, c.nodes, c.zones = ranges, nodes, map[string]string{}
		for _, n := range nodes {
			c.zones[n.Name] = n.Labels[zoneLabel]
			c.agents = append(c.agents, &agent{node: n})
		}
	})
	return nil
}

func (c *cluster) makeNodes(planned []*model.Node, ranges Ranges) ([]*node, error) {
	if err := cgroup.Create(c.paths.cgroup); err != nil {
		return nil, err
	}
	if err := mountBPF(c.paths.bpf()); err != nil {
		return nil, err
	}
	fabric, err := makeFabric(c.paths.netns("fabric", "fabric"))
	if err != nil {
		return nil, err
	}
	defer fabric.net.Close()
	nodes := make([]*node, len(planned))
	for i, n := range planned {
		if nodes[i], err = makeNode(n, c.paths.node(n.Name), fabric, i); err != nil {
			return nil, err
		}
		if err := nodes[i].address(ranges); err != nil {
			return nil, err
		}
	}
	for _, n := range nodes {
		for _, other := range nodes {
			if n == other {
				continue
			}
			if err := n.reach(other); err != nil {
				return nil, err
			}
		}
	}
	return nodes, nil
}

// openStore opens the store and publishes the nodes, which do not change.
func (c *cluster) openStore() (Store, error) {
	if c.cfg.Store == nil {
		return nil, nil
	}
	store, err := c.cfg.Store(c.paths.cluster())
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", c.paths.cluster(), err)
	}
	for _, n := range c.nodes {
		if err := store.PutNode(n.Node); err != nil {
			return nil, fmt.Errorf("publish node %s: %w", n.Name, err)
		}
	}
	return store, nil
}

// comeUp waits until every pod is ready, or has a problem that says why not,
// all that is published, and the agents are ready.
func (c *cluster) comeUp(ctx context.Context) error {
	reporting, done := context.WithCancel(ctx)
	defer done()
	go c.report(reporting)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go c.watchStore(ctx, cancel)
	if err := c.wait(ctx, c.settled); err != nil {
		return err
	}
	if err := c.awaitAgents(ctx); err != nil {
		return err
	}
	done()
	c.change(func() { c.up = true })
	c.cfg.Up()
	return nil
}

// watchStore gives up, through cancel, on a store that has refused for too
// long to take what is to be published.
func (c *cluster) watchStore(ctx context.Context, cancel context.CancelCauseFunc) {
	var refusal model.Problem
	refuses := func() (yes bool) {
		refusal, yes = c.happened[publishing]
		return yes
	}
	for c.wait(ctx, refuses) == nil {
		limited, stop := context.WithTimeout(ctx, c.cfg.patience)
		err := c.wait(limited, func() bool { return !refuses() })
		stop()
		if err != nil {
			cancel(fmt.Errorf("bring up lab %s: publish the cluster: %s: tried for %s", c.cfg.Name, refusal.Text, c.cfg.patience))
			return
		}
	}
}

// settled reports whether the pods are as far as they get. The lock is held.
func (c *cluster) settled() bool {
	if c.shown == 0 || c.shown != c.version {
		return false
	}
	for _, p := range c.pods {
		if _, failed := c.happened["Pod "+p.Pod.Name.String()]; !p.Ready && !failed {
			return false
		}
	}
	return len(makePlan(c.situation()).Create) == 0
}

func (c *cluster) awaitAgents(ctx context.Context) error {
	if c.cfg.AgentCommand == nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.cfg.patience, errors.New("timeout"))
	defer cancel()
	waiting := ""
	err := c.wait(ctx, func() bool {
		waiting = ""
		for _, a := range c.agents {
			if !a.ready {
				waiting = fmt.Sprintf("the agent of node %s is not ready after %s: its log is %s", a.node.Name, c.cfg.patience, c.agentLog(a))
				return false
			}
		}
		return true
	})
	if errors.Is(ctx.Err(), context.DeadlineExceeded) && err != nil {
		return fmt.Errorf("bring up lab %s: %s%s", c.cfg.Name, waiting, lastLines(c.cfg, c.paths, c.agents))
	}
	return err
}

// lastLines quotes the end of the log of the first agent that is not ready,
// because the log goes with the lab.
func lastLines(cfg Config, p paths, agents []*agent) string {
	for _, a := range agents {
		if a.ready {
			continue
		}
		text, err := os.ReadFile(p.log("agent-" + a.node.Name))
		if err == nil && len(text) > 0 {
			return " and ends with:\n" + string(text[max(0, len(text)-1000):])
		}
	}
	return ""
}

// report tells a person every second how far the pods are.
func (c *cluster) report(ctx context.Context) {
	for tick := time.NewTicker(time.Second); ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		c.mu.Lock()
		ready, agents := 0, 0
		for _, p := range c.pods {
			if p.Ready {
				ready++
			}
		}
		for _, a := range c.agents {
			if a.ready {
				agents++
			}
		}
		line := fmt.Sprintf("%d of %d pods ready", ready, len(c.pods))
		if c.cfg.AgentCommand != nil {
			line += fmt.Sprintf(", %d of %d agents", agents, len(c.agents))
		}
		if refusal, ok := c.happened[publishing]; ok {
			line += ", cannot publish the cluster: " + refusal.Text
		}
		c.mu.Unlock()
		c.cfg.Progress(line)
	}
}

// listen opens the control socket.
func (c *cluster) listen(cancel context.CancelCauseFunc) (*http.Server, error) {
	listener, err := net.Listen("unix", c.paths.socket())
	if err != nil {
		return nil, fmt.Errorf("bring up lab %s: %w", c.cfg.Name, err)
	}
	if err := os.Chmod(c.paths.socket(), 0o600); err != nil {
		return nil, fmt.Errorf("bring up lab %s: %w", c.cfg.Name, err)
	}
	server := &http.Server{Handler: c.control(cancel), ReadHeaderTimeout: 10 * time.Second}
	go server.Serve(listener)
	return server, nil
}
