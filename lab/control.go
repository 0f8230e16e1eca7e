package lab

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/millrace/millrace/model"
	"golang.org/x/sys/unix"
)

// order is what every operation of the control socket is told.
type order struct {
	// Name is a workload, pod or node, by the operation.
	Name  string `json:"name"`
	Count int    `json:"count,omitempty"`
}

// told is what it answers: the pod's full name.
type told struct {
	Pod string `json:"pod,omitempty"`
}

// control is what the daemon does on its unix socket.
func (c *cluster) control(cancel context.CancelCauseFunc) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", c.answerStatus)
	handle := func(path string, operation func(context.Context, order) (told, error)) {
		mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
			var o order
			if !readJSON(w, r, &o) {
				return
			}
			answer, err := operation(r.Context(), o)
			if err != nil {
				writeError(w, http.StatusConflict, err)
				return
			}
			writeJSON(w, answer)
		})
	}
	handle("/scale", c.scale)
	handle("/kill", c.killPod)
	handle("/replace", c.replace)
	handle("/agent-kill", func(_ context.Context, o order) (told, error) { return told{}, c.signalAgent(o.Name, unix.SIGKILL) })
	handle("/agent-stop", func(_ context.Context, o order) (told, error) { return told{}, c.signalAgent(o.Name, unix.SIGTERM) })
	handle("/down", func(context.Context, order) (told, error) {
		time.AfterFunc(10*time.Millisecond, func() { cancel(errDown) }) // the answer leaves first
		return told{}, nil
	})
	return mux
}

// answerStatus gives the status, at once or, asked with ?after=REVISION, when
// there is a newer one than that or ten seconds have passed.
func (c *cluster) answerStatus(w http.ResponseWriter, r *http.Request) {
	if text := r.URL.Query().Get("after"); text != "" {
		after, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			writeError(w, http.StatusBadRequest, fmt.Errorf("read revision: %w", err))
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), statusPatience)
		defer cancel()
		c.wait(ctx, func() bool { return c.revision > after })
	}
	c.mu.Lock()
	s := c.status(os.Getpid())
	c.mu.Unlock()
	writeJSON(w, s)
}

// workload finds a workload by "namespace/name", "kind/namespace/name" or its
// name in the namespace default, or anywhere if it is the only one. The lock is
// held.
func (c *cluster) workload(name string) (*model.Workload, error) {
	if c.wishes == nil {
		return nil, fmt.Errorf("find workload %q: the manifests are not read yet", name)
	}
	var exact, loose []*model.Workload
	for _, w := range c.wishes.Workloads {
		full := w.Name.String()
		switch {
		case name == full, strings.EqualFold(name, w.Kind+"/"+full), w.Namespace == "default" && name == w.Name.Name:
			exact = append(exact, w)
		case name == w.Name.Name:
			loose = append(loose, w)
		}
	}
	if len(exact) == 0 {
		exact = loose
	}
	switch len(exact) {
	case 0:
		return nil, fmt.Errorf("find workload %q: lab %s has none of that name", name, c.cfg.Name)
	case 1:
		return exact[0], nil
	}
	return nil, fmt.Errorf("find workload %q: both %s and %s: write kind/namespace/name", name, exact[0], exact[1])
}

// scale sets how many pods a workload has and waits until it has them, ready
// and published.
func (c *cluster) scale(ctx context.Context, o order) (told, error) {
	c.mu.Lock()
	w, err := c.workload(o.Name)
	switch {
	case err != nil:
	case w.PerNode:
		err = fmt.Errorf("scale %s: it runs one pod on each node", w)
	case o.Count < 0 || o.Count > 10000:
		err = fmt.Errorf("scale %s: %d pods: want 0 to 10000", w, o.Count)
	default:
		c.scales[w.String()] = scale{o.Count, w.Replicas}
		c.bump()
	}
	c.mu.Unlock()
	if err != nil {
		return told{}, err
	}
	err = c.reachFor(ctx, w.String(), func() bool { return c.hasReady(w.String(), o.Count) })
	if err != nil {
		return told{}, fmt.Errorf("scale %s to %d: %w", w, o.Count, err)
	}
	return told{}, nil
}

// hasReady reports whether a workload has n pods, all ready, and none that is
// about to be replaced. The lock is held.
func (c *cluster) hasReady(owner string, n int) bool {
	for _, p := range c.pods {
		if p.Owner == owner && !p.Leaving {
			if !p.Ready || p.Outdated {
				return false
			}
			n--
		}
	}
	return n == 0
}

// pod finds a pod. The lock is held.
func (c *cluster) pod(name string) (*pod, error) {
	found, err := c.status(0).Pod(name)
	if err != nil {
		return nil, err
	}
	return c.pods[model.Name{Namespace: found.Namespace, Name: found.Name}], nil
}

// killPod ends a pod at once, also one that drains, and waits until that is
// published.
func (c *cluster) killPod(ctx context.Context, o order) (told, error) {
	c.mu.Lock()
	p, err := c.pod(o.Name)
	if err == nil && !p.killed {
		p.Leaving, p.killed = true, true
		if p.pid > 0 {
			unix.Kill(p.pid, unix.SIGKILL)
		}
		close(p.kill)
		c.bump()
	}
	c.mu.Unlock()
	if err != nil {
		return told{}, err
	}
	return told{Pod: p.Pod.Name.String()}, c.reach(ctx, func() bool { return p.gone })
}

// replace marks a pod for replacement and waits until a new one is listed and
// the old one is not. It answers the new one's name.
func (c *cluster) replace(ctx context.Context, o order) (told, error) {
	c.mu.Lock()
	old, err := c.pod(o.Name)
	if err == nil && (old.Outdated || old.Leaving) {
		err = fmt.Errorf("replace pod %s: it is about to go already", old.Pod.Name)
	}
	mark := c.serial
	var next *pod
	if err == nil {
		old.Outdated = true
		c.bump()
		for _, made := range c.replan() {
			if made.owner() == old.owner() {
				next = made
			}
		}
	}
	c.mu.Unlock()
	if err != nil {
		return told{}, err
	}
	err = c.reachFor(ctx, old.owner(), func() bool {
		if next == nil || c.pods[next.Pod.Name] != next {
			next = c.successor(old, mark)
		}
		return next != nil && next.Ready && old.Leaving
	})
	if err != nil {
		return told{}, fmt.Errorf("replace pod %s: %w", old.Pod.Name, err)
	}
	return told{Pod: next.Pod.Name.String()}, nil
}

// successor is the first pod that its workload made after the mark: one of the
// same name, or one where the first choice came to nothing. The lock is held.
func (c *cluster) successor(old *pod, mark int) *pod {
	var first *pod
	for _, p := range c.pods {
		if p.owner() == old.owner() && p.Serial > mark && (first == nil || p.Serial < first.Serial) {
			first = p
		}
	}
	return first
}

// reach waits until the condition holds and what it saw is published.
func (c *cluster) reach(ctx context.Context, condition func() bool) error {
	reached := uint64(0)
	return c.wait(ctx, func() bool {
		if reached == 0 && condition() {
			reached = c.version
		}
		return reached > 0 && c.shown >= reached
	})
}

// reachFor is reach for a condition about the pods of one owner. It ends with
// an error when the lab can do no more for them, or when for too long none of
// them has become ready or gone.
func (c *cluster) reachFor(ctx context.Context, owner string, condition func() bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	late := errors.New("late")
	limit := c.cfg.patience + c.cfg.Drain // a pod that drains is no sign of trouble
	timer := time.AfterFunc(limit, func() { cancel(late) })
	defer timer.Stop()
	stuck, last := "", [2]int{}
	err := c.reach(ctx, func() bool {
		if now := c.progress(owner); now != last {
			last = now
			timer.Reset(limit)
		}
		if condition() {
			return true
		}
		if stuck = c.stuck(owner); stuck != "" {
			cancel(late)
		}
		return false
	})
	if err == nil || !errors.Is(err, late) {
		return err
	}
	if stuck != "" {
		return errors.New(stuck)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Errorf("%s after %s without progress", c.missing(owner), limit)
}

// progress counts an owner's pods and those that are ready. The lock is held.
func (c *cluster) progress(owner string) (count [2]int) {
	for _, p := range c.pods {
		if p.owner() == owner {
			count[0]++
			if p.Ready {
				count[1]++
			}
		}
	}
	return count
}

// crashLoop is how often in a row a pod's process must have died before it
// became ready for the lab to expect nothing of it any more.
const crashLoop = 3

// stuck says why an owner's pods will not change any more by themselves; empty
// while anything is in motion, or nothing is wrong. The lock is held.
func (c *cluster) stuck(owner string) string {
	text := ""
	for _, name := range sortedNames(c.pods) {
		p := c.pods[name]
		switch {
		case p.Leaving: // its address, name and ports become free
			return ""
		case p.owner() != owner || p.Ready:
		case p.crashes < crashLoop:
			return ""
		case text == "":
			text = c.failure(p)
		}
	}
	if c.wishes == nil || len(c.nodes) == 0 {
		return text
	}
	plan := makePlan(c.situation())
	if len(plan.Create)+len(plan.Retire) > 0 {
		return ""
	}
	for _, problem := range plan.Problems {
		if problem.Object == owner {
			return problem.Text
		}
	}
	return text
}

// failure is what is wrong with a pod, or empty. The lock is held.
func (c *cluster) failure(p *pod) string {
	object := "Pod " + p.Pod.Name.String()
	if problem, ok := c.happened[object]; ok {
		return fmt.Sprintf("%s: %s", object, problem.Text)
	}
	return ""
}

// missing says what an owner's pods still lack. The lock is held.
func (c *cluster) missing(owner string) string {
	if refusal, ok := c.happened[publishing]; ok {
		return "cannot publish the cluster: " + refusal.Text
	}
	for _, name := range sortedNames(c.pods) {
		p := c.pods[name]
		if p.owner() != owner || p.Ready && !p.Leaving {
			continue
		}
		if text := c.failure(p); text != "" {
			return text
		}
		if p.Leaving {
			return fmt.Sprintf("Pod %s is not gone", name)
		}
		return fmt.Sprintf("Pod %s is not ready", name)
	}
	count := c.progress(owner)
	return fmt.Sprintf("%s has %d pods, %d of them ready", owner, count[0], count[1])
}

// signalAgent kills or stops the agent of a node; it is started again at once.
func (c *cluster) signalAgent(node string, signal unix.Signal) error {
	act := map[unix.Signal]string{unix.SIGKILL: "kill", unix.SIGTERM: "stop"}[signal]
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, agent := range c.agents {
		if agent.node.Name != node || c.cfg.AgentCommand == nil {
			continue
		}
		if agent.pid == 0 {
			return fmt.Errorf("%s agent of node %s: it does not run at the moment", act, node)
		}
		if err := unix.Kill(agent.pid, signal); err != nil {
			return fmt.Errorf("%s agent of node %s: %w", act, node, err)
		}
		agent.killed = true
		return nil
	}
	return fmt.Errorf("%s agent of node %s: lab %s has no such node, or no agents", act, node, c.cfg.Name)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
