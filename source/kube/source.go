package kube

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/cluster"
	"github.com/millrace/millrace/source/corefile"
)

// Settings say where the API is and for whom it is asked.
type Settings struct {
	// Kubeconfig is the path of a kubeconfig file; empty for the service account
	// of the pod that this runs in.
	Kubeconfig string
	// Servers are addresses of API servers, "https://10.0.0.1:6443", tried in turn
	// instead of the one in the kubeconfig or the pod's environment.
	Servers []string
	// Node is the node whose pods are asked for; empty for those of all nodes.
	Node string
	// Names asks also for the Services that are for DNS alone: headless ones, and those
	// of other proxies.
	Names bool
	// Masquerade asks also for the configuration of ip-masq-agent.
	Masquerade bool
	// Flannel asks also for the configuration of flannel.
	Flannel bool
	// Account is the folder of the service account; empty for where Kubernetes
	// mounts it.
	Account string
}

// After a Snapshot the next one comes at the earliest in spacing, or in share times
// the processor time that that one took to make: a change after a pause is not
// delayed, and a burst costs at most a part of one core.
const (
	spacing = time.Millisecond
	share   = 4
)

// Source delivers what the API server says and its changes.
type Source struct {
	servers *servers
	feeds   []*feed
	wake    chan struct{}
	// patience is how long a page of a list, or the beginning of a watch, may take.
	patience time.Duration
	// doubt is how long objects stay in force that a doubtful list lacks.
	doubt time.Duration

	mu      sync.Mutex // guards what follows, and what feeds say of themselves
	cluster *cluster.Cluster
	// since is when the first change arrived that no Snapshot has yet.
	since time.Time
	// fresh: a server has answered since Run began.
	fresh bool
	// giveUp ends the Run.
	giveUp context.CancelCauseFunc

	// silent is since when what Services need is not followed; nil while it is.
	silent atomic.Pointer[time.Time]
}

// Open prepares to ask the API server. It reads the credentials and sends nothing.
func Open(settings Settings) (*Source, error) {
	if settings.Account == "" {
		settings.Account = accountFolder
	}
	servers, err := connect(settings)
	if err != nil {
		return nil, err
	}
	s := &Source{
		servers: servers, wake: make(chan struct{}, 1), cluster: cluster.New(),
		patience: 30 * time.Second, doubt: 5 * time.Minute,
	}
	if settings.Names {
		s.cluster.SetNamed()
	}
	for _, k := range kindsFor(settings) {
		s.feeds = append(s.feeds, newFeed(s, k))
	}
	s.listen()
	return s, nil
}

// Heard is when the API server last said what it had to say of Services and their endpoints:
// now, while both are watched. A watch over which nothing comes is taken for one until
// client-go gives it up, 45 seconds after the server fell silent
// (https://github.com/kubernetes/apimachinery/blob/master/pkg/util/net/http.go).
func (s *Source) Heard() time.Time {
	if since := s.silent.Load(); since != nil {
		return *since
	}
	return time.Now()
}

// listen notes since when one of the kinds that Services need is not followed. It is called
// with s.mu held.
func (s *Source) listen() {
	var silent *time.Time
	for _, f := range s.feeds {
		if since := f.silent; f.kind.needed && !since.IsZero() && (silent == nil || since.Before(*silent)) {
			silent = &since
		}
	}
	s.silent.Store(silent)
}

// Run delivers a Snapshot when everything was listed once, and another after each
// change, until ctx ends; it returns nil then. It returns an error when no kind
// can be read from any server; the next Run goes on where this one ended, and
// waits before it asks again, however soon it is called. It calls deliver one at
// a time. Only one Run of a Source may go on at a time.
func (s *Source) Run(ctx context.Context, deliver func(*model.Snapshot)) error {
	running, giveUp := context.WithCancelCause(ctx)
	s.mu.Lock()
	s.fresh, s.giveUp = false, giveUp
	for _, f := range s.feeds {
		f.tried = false
		s.remark(f)
	}
	s.mu.Unlock()
	var feeds sync.WaitGroup
	defer feeds.Wait()
	defer giveUp(nil)
	for _, f := range s.feeds {
		feeds.Go(func() { f.run(running) })
	}
	s.deliver(running, deliver)
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("watch the cluster: %w", context.Cause(running))
}

// deliver hands out Snapshots until ctx ends.
func (s *Source) deliver(ctx context.Context, deliver func(*model.Snapshot)) {
	var last *model.Snapshot
	var next time.Time // when the next Snapshot may come
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		}
		if !sleep(ctx, time.Until(next)) {
			return
		}
		worked := processorTime(func() {
			snapshot, since := s.snapshot()
			if snapshot == nil || snapshot == last {
				return
			}
			last = snapshot
			dated := *snapshot
			dated.Seen = since
			deliver(&dated)
		})
		next = time.Now().Add(max(spacing, share*worked))
	}
}

// processorTime is how long f works. Waiting is no work: on a node whose processors
// others use, a Snapshot of 1 ms can take 50, and the next would wait for 200.
func processorTime(f func()) time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	begun := threadTime()
	f()
	return threadTime() - begun
}

func threadTime() time.Duration {
	var worked unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &worked) // it cannot fail: the clock is there
	return time.Duration(worked.Nano())
}

// snapshot is what is known now, nil if it is too early to tell anybody.
func (s *Source) snapshot() (*model.Snapshot, time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.fresh || !s.presentable() {
		return nil, time.Time{}
	}
	since := s.since
	s.since = time.Time{}
	return s.cluster.Snapshot(), since
}

// presentable says whether there is something to show: everything was listed
// once, or what Services need was, and the rest is known to be out of reach. A
// Service without its endpoints would take them away from those who use it.
func (s *Source) presentable() bool {
	for _, f := range s.feeds {
		if !f.listed && (f.kind.needed || !f.tried) {
			return false
		}
	}
	return true
}

// change lets do change the cluster because of what arrived at a moment, and has
// a Snapshot made if do says that there is something new.
func (s *Source) change(at time.Time, do func(*cluster.Cluster) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !do(s.cluster) {
		return
	}
	if s.since.IsZero() && s.presentable() {
		s.since = at
	}
	s.ring()
}

// ring has deliver look. It is called with s.mu held.
func (s *Source) ring() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// listed notes that all of a kind is known.
func (s *Source) listed(f *feed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.listed = true
	s.complete()
}

// complete notes that all is known, if it is. It is called with s.mu held.
func (s *Source) complete() {
	for _, other := range s.feeds {
		forbidden := other.kind.may && other.tried && apierrors.IsForbidden(other.trouble)
		if !other.listed && !other.kind.beside && !forbidden {
			return
		}
	}
	s.cluster.SetComplete()
}

// well notes that a kind is followed.
func (s *Source) well(f *feed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fresh, f.trouble, f.tried, f.silent = true, nil, false, time.Time{}
	s.listen()
	s.remark(f)
	s.ring()
}

// unheard notes that a kind is not followed from now on.
func (s *Source) unheard(f *feed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.silent.IsZero() {
		f.silent = time.Now()
	}
	s.listen()
}

// failed notes why a kind cannot be followed. When none can, Run ends.
func (s *Source) failed(f *feed, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.trouble == nil {
		f.since = time.Now()
	}
	f.trouble, f.tried = err, true
	s.remark(f)
	s.complete()
	s.ring()
	var all []error
	for _, other := range s.feeds {
		if !other.tried {
			return
		}
		all = append(all, other.trouble)
	}
	s.giveUp(gravest(all))
}

// gravest is one error for all: the first, but for one that forbids something,
// which is about one kind alone.
func gravest(all []error) error {
	for _, err := range all {
		if !apierrors.IsForbidden(err) {
			return err
		}
	}
	return all[0]
}

// remark has the Snapshots say how a kind does. It is called with s.mu held.
func (s *Source) remark(f *feed) {
	var r cluster.Remark
	say := func(format string, args ...any) {
		r.Problems = append(r.Problems, model.Problem{Where: f.file.Name(), Text: fmt.Sprintf(format, args...)})
	}
	if f.tried {
		say("cannot be followed since %s, what they said before stays in force: %v", f.since.UTC().Format(time.RFC3339), f.trouble)
	}
	if n := len(f.kept); n > 0 {
		say("%d that the API server does not list any more stay in force until %s, because %s: if they are really gone, restart the agent",
			n, f.keptUntil.UTC().Format(time.RFC3339), f.reason)
	}
	s.cluster.Remark(f.kind.title(), r)
	if f.kind.dns {
		s.cluster.SetUnknown(cluster.Key{Kind: f.kind.object, Name: f.kind.name}, f.unknown())
	}
}

// unknown is why it is not known what an object says of the DNS servers, if it is not there;
// "" where that says enough. It is called with s.mu held.
func (f *feed) unknown() string {
	switch {
	case !f.listed && f.tried:
		return fmt.Sprintf("the %s %s cannot be read: %v", f.kind.object, f.kind.name, f.trouble)
	case f.kind.object != "ConfigMap" || f.kind.name != corefile.ConfigMap:
		return ""
	}
	return fmt.Sprintf("there is no ConfigMap %s: who serves DNS here, and how, is not known", corefile.ConfigMap)
}

// sleep waits and says whether ctx goes on.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
