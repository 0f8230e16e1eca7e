package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/agent/healthcheck"
	"github.com/millrace/millrace/agent/resolver"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Source is where Snapshots come from. Run delivers them, the newest last, until
// ctx ends or it cannot go on. It is called again after an error.
type Source interface {
	Run(ctx context.Context, deliver func(*model.Snapshot)) error
}

// Config is what an agent needs. All but HostPorts, Metrics, KubeProxy, Served and Queries
// must be set.
type Config struct {
	// Node is this node's name in the cluster.
	Node string
	// Version is shown in status and metrics.
	Version string
	Source  Source
	// SourceName is shown in status: "dir:/etc/millrace".
	SourceName string
	Layers     []layer.Layer
	// HostPorts has room for one: those that Snapshots are to have beside what the source
	// says, whenever they are others. What is in it when all layers are open is in force
	// with the first Snapshot. Nil for none.
	HostPorts <-chan []model.HostPort
	// RunFolder gets the lock and the status socket.
	RunFolder string
	// Metrics is the TCP address for Prometheus, "127.0.0.1:9470"; empty for none.
	Metrics string
	// KubeProxy is nil where the agent does not stand in for a kube-proxy.
	KubeProxy *KubeProxy
	// Served is called once Services are in the kernel for the first time, beside the
	// agent; nil for nothing. Its context ends with the agent.
	Served func(context.Context)
	// Queries are the last DNS queries that were handed to the agent; nil where none are.
	Queries func() []resolver.Query
	Log     *slog.Logger
	// Started is when the process began, for the time to attach.
	Started time.Time
}

const (
	lockName = "agent.lock"
	// restBetween is the least time between two looks at what others change, or as long as
	// the first took: a pod that starts is ten messages of the kernel, of which each layer
	// hears for itself.
	restBetween = 5 * time.Millisecond
	driftEvery  = time.Minute
	lookAgain   = 100 * time.Millisecond
	retryFirst  = 100 * time.Millisecond
	retryMost   = 10 * time.Second
	// tidyAfter is how long after many changes memory is given back. From then on
	// garbage may be a quarter of what is kept: a change makes little of it.
	tidyAfter     = time.Second
	percentAtRest = 25
	// many objects, read or changed at once, leave garbage that is worth giving back.
	many = 1000
)

// ErrRunning says that another agent holds the run folder.
var ErrRunning = errors.New("another agent is running here: stop it first")

// Agent is one running agent.
type Agent struct {
	config Config
	parts  []*part
	// newest is the last Snapshot delivered and not yet taken.
	newest chan *model.Snapshot
	// changed says that a layer is to be refreshed.
	changed  chan struct{}
	metrics  *metrics
	spaces   *spaces
	flows    *flows
	attached time.Duration
	// litter: much memory became garbage just now.
	litter bool
	health healthcheck.Health
	proxy  standIn
	// hostPorts are those that were taken last.
	hostPorts []model.HostPort

	mu       sync.Mutex // guards what status reads
	snapshot *model.Snapshot
	received time.Time
	ready    bool
	// sourceIs is why the source cannot be read, since sourceLost.
	sourceIs   string
	sourceLost time.Time
}

// part is one layer and what the agent knows of it.
type part struct {
	layer.Layer
	// have is in force, want is asked for; both are nil at first.
	have, want layer.Picture
	done       layer.Tally
	failed     int
	drifted    int
	// longest is the longest time that applying took.
	longest   time.Duration
	lastError string
}

// Run runs an agent until ctx ends. What the layers have in the kernel stays in
// force afterwards. It returns an error only for what makes starting pointless:
// a missing privilege or kernel feature, a run folder in use.
func Run(ctx context.Context, config Config) error {
	unlock, err := lock(config.RunFolder)
	if err != nil {
		return err
	}
	defer unlock()
	a := &Agent{config: config, newest: make(chan *model.Snapshot, 1), changed: make(chan struct{}, 1), metrics: newMetrics(), spaces: newSpaces()}
	a.flows = newFlows(a.spaces)
	defer a.close()
	listeners, err := a.listen() // before anything is changed
	if err != nil {
		return err
	}
	defer listeners.close()
	if err := a.answerAsProxy(); err != nil {
		return err
	}
	defer a.proxy.server.Close()
	for _, l := range config.Layers {
		if err := a.open(l); err != nil {
			return err
		}
	}
	a.attached = time.Since(config.Started)
	config.Log.Info("attached", "after", a.attached.Round(time.Millisecond), "node", config.Node)
	listeners.serve(a)
	defer listeners.shutdown()
	var sources sync.WaitGroup
	defer sources.Wait()
	// Also when the loop panics: the process shall end then, and be started again.
	ctx, end := context.WithCancel(ctx)
	defer end()
	sources.Go(func() { a.watch(ctx) })
	if config.Served != nil {
		sources.Go(func() { a.whenServed(ctx, config.Served) })
	}
	for _, p := range a.parts {
		sources.Go(func() { a.watchLayer(ctx, p) })
	}
	a.loop(ctx)
	return nil
}

func (a *Agent) open(l layer.Layer) error {
	if err := l.Open(); err != nil {
		return err
	}
	p := &part{Layer: l}
	a.parts = append(a.parts, p)
	a.metrics.drift(l.Name(), 0) // counted from nothing, so that the first is seen to be one
	var err error
	if p.have, err = l.Read(); err != nil {
		return fmt.Errorf("read what the %s layer has in the kernel: %w", l.Name(), err)
	}
	if n := p.have.Len(); n > 0 {
		a.config.Log.Info("took over", "layer", l.Name(), "objects", n)
	}
	if server, ok := l.(layer.Server); ok && server.Serves(p.have) {
		a.health.TookOver()
	}
	return nil
}

func (a *Agent) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.parts {
		if err := p.Close(); err != nil {
			a.config.Log.Error("close", "layer", p.Name(), "error", err)
		}
	}
}

// whenServed calls f as soon as /readyz says yes.
func (a *Agent) whenServed(ctx context.Context, f func(context.Context)) {
	for a.health.Ready() != nil {
		select {
		case <-ctx.Done():
			return
		case <-time.After(lookAgain):
		}
	}
	f(ctx)
}

// watch runs the source again and again: what it cannot read now it may be able
// to read later, and meanwhile the kernel keeps what it has.
func (a *Agent) watch(ctx context.Context) {
	for wait := retryFirst; ctx.Err() == nil; wait = min(2*wait, retryMost) {
		err := a.config.Source.Run(ctx, func(s *model.Snapshot) {
			wait = retryFirst
			a.setSource("")
			a.deliver(s)
		})
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("ended")
		}
		a.setSource(err.Error())
		a.config.Log.Error("source", "name", a.config.SourceName, "error", err, "again_in", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// deliver replaces a Snapshot that nobody has taken yet: only the newest counts,
// but it carries the older one's time.
func (a *Agent) deliver(s *model.Snapshot) {
	select {
	case older := <-a.newest:
		if !older.Seen.IsZero() && older.Seen.Before(s.Seen) {
			copied := *s
			copied.Seen = older.Seen
			s = &copied
		}
	default:
	}
	a.newest <- s
}

// watchLayer tells the loop that a layer's kernel objects changed under it.
func (a *Agent) watchLayer(ctx context.Context, p *part) {
	err := p.Watch(ctx, func() {
		select {
		case a.changed <- struct{}{}:
		default: // the loop has yet to look at an earlier change
		}
	})
	if err != nil {
		a.config.Log.Error("watch the kernel: changes are seen once a minute only", "layer", p.Name(), "error", err)
	}
}

// loop is the one goroutine that calls the layers' verbs.
func (a *Agent) loop(ctx context.Context) {
	drift := time.NewTicker(driftEvery)
	defer drift.Stop()
	wait := retryFirst
	retry, tidy, rested := time.NewTimer(0), time.NewTimer(0), time.NewTimer(0)
	<-retry.C
	<-tidy.C
	<-rested.C
	changed := a.changed // nil while the loop rests from it
	for {
		var clean bool
		select {
		case <-ctx.Done():
			return
		case s := <-a.newest:
			clean = a.take(s)
			wait = retryFirst
		case a.hostPorts = <-a.config.HostPorts:
			clean = a.snapshot == nil || a.become(a.snapshot)
			wait = retryFirst
		case <-retry.C:
			clean = a.applyAll()
		case <-a.proxy.again:
			a.proxy.bring()
			continue
		case <-tidy.C:
			debug.SetGCPercent(percentAtRest)
			debug.FreeOSMemory()
			continue
		case <-drift.C:
			a.findDrift()
			clean = a.applyAll()
			a.proxy.bring() // the node's addresses may be others now
		case <-changed:
			begun := time.Now()
			a.refresh()
			clean = a.applyAll()
			changed = nil
			rested.Reset(max(restBetween, time.Since(begun)))
		case <-rested.C:
			changed = a.changed
			continue
		}
		if a.litter {
			// What it took to read and apply so much is as much again as what is kept.
			// The source may be reading more of it yet.
			a.litter = false
			tidy.Reset(tidyAfter)
		}
		if !clean {
			retry.Reset(wait)
			wait = min(2*wait, retryMost)
		}
	}
}

// take makes a Snapshot the wanted one and applies it. It says whether
// everything succeeded.
func (a *Agent) take(s *model.Snapshot) bool {
	a.mu.Lock()
	a.received = time.Now()
	a.mu.Unlock()
	a.health.Asked()
	a.proxy.take(s)
	select {
	case a.hostPorts = <-a.config.HostPorts:
	default:
	}
	clean := a.become(s)
	if clean && !s.Seen.IsZero() {
		a.metrics.programmed(time.Since(s.Seen))
	}
	a.proxy.bring()
	return clean
}

// become plans a Snapshot, with the hostPorts, and applies it.
func (a *Agent) become(s *model.Snapshot) bool {
	with := *s
	with.HostPorts = a.hostPorts
	a.mu.Lock()
	a.snapshot = &with
	a.mu.Unlock()
	for _, p := range a.parts {
		want := p.Plan(&with)
		a.mu.Lock()
		p.want = want
		a.mu.Unlock()
	}
	return a.applyAll()
}

// applyAll brings every layer to what is wanted. The agent is ready when all
// succeeded for a cluster that was seen whole.
func (a *Agent) applyAll() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.snapshot == nil {
		return true
	}
	clean, begun := true, time.Now()
	for _, p := range a.parts {
		clean = a.apply(p) && clean
	}
	a.ready = clean && a.snapshot.Complete
	if clean {
		a.health.Done(a.snapshot.Complete)
	}
	a.proxy.applied(clean, time.Since(begun))
	return clean
}

func (a *Agent) apply(p *part) bool {
	// What could not be read may ask for anything: nothing is removed then.
	prune := a.snapshot.Complete && a.snapshot.Unread == 0
	begun := time.Now()
	changes := p.Diff(p.have, p.want, prune)
	var done layer.Changes
	var err error
	p.have, done, err = p.Apply(p.have, p.want, changes)
	if a.snapshot.Complete {
		err = errors.Join(err, p.Settle())
	}
	p.longest = max(p.longest, time.Since(begun))
	a.report(p, done, err)
	return err == nil
}

// report tells what was applied, in the log, metrics and status. A few changes
// are told one by one, many are counted.
func (a *Agent) report(p *part, done layer.Changes, err error) {
	p.lastError = ""
	failed := 0
	if err != nil {
		failed = len(unjoin(err))
		p.failed += failed
		p.lastError = err.Error()
		a.config.Log.Error("apply", "layer", p.Name(), "failed", failed, "error", unjoin(err)[0])
	}
	tally := done.Tally()
	p.done.Added += tally.Added
	p.done.Altered += tally.Altered
	p.done.Removed += tally.Removed
	a.metrics.applied(p.Name(), tally, failed)
	const spoken = 8
	a.litter = a.litter || len(done) > many
	if len(done) > spoken {
		a.config.Log.Info("applied", "layer", p.Name(), "added", tally.Added, "altered", tally.Altered, "removed", tally.Removed)
		return
	}
	for _, change := range done {
		a.config.Log.Info(change.String(), "layer", p.Name())
	}
}

// refresh looks again at what others change.
func (a *Agent) refresh() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.parts {
		found, err := p.Refresh(p.have)
		if err != nil {
			a.config.Log.Error("look at the kernel again", "layer", p.Name(), "error", err)
			continue
		}
		p.have = found
	}
}

// findDrift reads the kernel again. What differs from what was applied is what
// somebody else changed; the next apply mends it.
func (a *Agent) findDrift() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.parts {
		found, err := p.Read()
		if err != nil {
			a.config.Log.Error("drift check", "layer", p.Name(), "error", err)
			continue
		}
		a.litter = a.litter || found.Len() > many
		if drift := p.Diff(found, p.have, true); len(drift) > 0 {
			p.drifted += len(drift)
			a.metrics.drift(p.Name(), len(drift))
			a.config.Log.Warn("the kernel holds something other than was applied, and is mended",
				"layer", p.Name(), "differences", len(drift), "first", drift[0].String())
		}
		p.have = found
	}
}

func (a *Agent) setSource(problem string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.sourceIs == "" {
		a.sourceLost = time.Now()
	}
	a.sourceIs = problem
}

// lock makes the run folder and takes it for this process until the function it
// returns is called, or the process ends.
func lock(folder string) (func(), error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fmt.Errorf("make run folder: %w", err)
	}
	path := filepath.Join(folder, lockName)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock run folder: %w", err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		file.Close()
		return nil, fmt.Errorf("lock %s: %w", path, ErrRunning)
	}
	return func() { file.Close() }, nil
}

// Running says whether an agent holds the run folder.
func Running(folder string) bool {
	file, err := os.Open(filepath.Join(folder, lockName))
	if err != nil {
		return false
	}
	defer file.Close()
	return errors.Is(unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// unjoin takes an errors.Join apart, and those inside it.
func unjoin(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	for _, inner := range joined.Unwrap() {
		all = append(all, unjoin(inner)...)
	}
	return all
}
