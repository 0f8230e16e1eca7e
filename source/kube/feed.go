package kube

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/cluster"
)

const (
	// pageSize is how many objects are asked for and in memory at a time, as
	// client-go's pager has it.
	pageSize = 500
	// A watch is asked to last watchLeast and up to as long again, so that the
	// nodes of a cluster do not come back all at once.
	watchLeast = 5 * time.Minute
	// steady is how long a watch has to last for what failed before to be over.
	steady = 5 * time.Second
	// A retry comes after about retrySoon where there is a server yet to ask, then
	// after retryFirst, doubled each time up to retryMost.
	retrySoon  = 100 * time.Millisecond
	retryFirst = 200 * time.Millisecond
	retryMost  = 15 * time.Second
)

// errEnded says that a server ended a watch before its time.
var errEnded = errors.New("the server ended the watch")

// feed follows one kind.
type feed struct {
	source *Source
	kind   kind
	file   *cluster.File

	// version is the resourceVersion up to which all changes are known; "" before
	// the kind is listed, and when it has to be listed again.
	version string
	// newest is version, kept over the latter.
	newest string
	// whole: the list cannot be had in pages.
	whole bool
	// failures are the attempts that ended before their time since one lasted;
	// refused are those in a row that did not get as far as to watch.
	failures, refused int
	notSoon           time.Time // no attempt before

	// What follows is guarded by source.mu.

	// listed: the kind was listed once.
	listed bool
	// trouble is why it cannot be followed since then, nil if it can be: no server
	// answered. It is told when that was tried in this Run.
	trouble error
	since   time.Time
	tried   bool
	// silent is since when it is not watched; zero while it is.
	silent time.Time
	// kept are in force until then although a list lacks them, for a reason.
	kept      map[cluster.Key]struct{}
	keptUntil time.Time
	reason    string
}

func newFeed(s *Source, k kind) *feed {
	return &feed{source: s, kind: k, silent: time.Now(), file: cluster.NewFile("kube " + k.title()), kept: map[cluster.Key]struct{}{}}
}

// run follows the kind until ctx ends.
func (f *feed) run(ctx context.Context) {
	for sleep(ctx, time.Until(f.notSoon)) {
		at := f.source.servers.current()
		watched, err := f.follow(ctx, at)
		f.source.unheard(f)
		if ctx.Err() != nil {
			return
		}
		f.count(watched)
		if err == nil {
			continue
		}
		f.failures++
		if !aboutKind(err) {
			f.source.servers.leave(at)
		}
		if f.refused > len(f.source.servers.all) {
			f.source.failed(f, err)
		}
		f.notSoon = time.Now().Add(f.pause(err))
	}
}

// count keeps the counts of what went wrong, by how long an attempt could watch.
func (f *feed) count(watched time.Duration) {
	if f.refused++; watched > 0 {
		f.refused = 0
	}
	if watched > steady {
		f.failures = 0
	}
}

// pause is how long to wait after so many failures: half to one and a half times
// a wait that grows, and not less than the server asks for.
func (f *feed) pause(err error) time.Duration {
	wait := retrySoon
	if n := f.failures - len(f.source.servers.all) - 1; n >= 0 {
		wait = min(retryFirst<<min(n, 10), retryMost)
	}
	if seconds, ok := apierrors.SuggestsClientDelay(err); ok {
		wait = max(wait, min(time.Duration(seconds)*time.Second, time.Minute))
	}
	return wait/2 + rand.N(wait)
}

// aboutKind says whether another server would answer the same.
func aboutKind(err error) bool {
	return apierrors.IsForbidden(err) || apierrors.IsNotFound(err) || expired(err)
}

// expired says that what was asked for is too old for the server.
func expired(err error) bool { return apierrors.IsResourceExpired(err) || apierrors.IsGone(err) }

// follow brings the kind up to date and keeps it so. It returns how long it
// could watch, and nil when that was as long as it asked for.
func (f *feed) follow(ctx context.Context, at *server) (time.Duration, error) {
	if f.version != "" {
		if err := f.compare(ctx, at); err != nil {
			return 0, f.blame("compare", at, err)
		}
	}
	if f.version == "" {
		if err := f.list(ctx, at); err != nil {
			return 0, f.blame("list", at, err)
		}
	}
	watched, err := f.watch(ctx, at)
	if err == nil {
		return watched, nil
	}
	if expired(err) {
		f.version = ""
	}
	return watched, f.blame("watch", at, err)
}

// blame says which act went wrong where. The server's address is in it already.
func (f *feed) blame(act string, at *server, err error) error {
	if inner := new(url.Error); errors.As(err, &inner) {
		err = inner.Err
	}
	return fmt.Errorf("%s %s at %s: %w", act, f.kind.resource, at.url, err)
}

// request asks for the kind.
func (f *feed) request(at *server) *rest.Request {
	r := at.client.Get().AbsPath(f.kind.path).MaxRetries(0)
	if f.kind.labels != "" {
		r.Param("labelSelector", f.kind.labels)
	}
	if f.kind.fields != "" {
		r.Param("fieldSelector", f.kind.fields)
	}
	return r
}

// page asks for a part of the list, or with limit 0 for all of it.
func (f *feed) page(ctx context.Context, at *server, limit int, next string) (runtime.Object, metav1.ListInterface, error) {
	ctx, cancel := context.WithTimeout(ctx, f.source.patience)
	defer cancel()
	r := f.request(at)
	if limit > 0 {
		r.Param("limit", strconv.Itoa(limit))
	}
	if next != "" {
		r.Param("continue", next)
	}
	list := f.kind.list()
	if err := r.Do(ctx).Into(list); err != nil {
		return nil, nil, err
	}
	about, err := meta.ListAccessor(list)
	return list, about, err
}

// compare asks how far the server is. One that is behind what we have seen was
// restored from an older state, or is another cluster's: a watch from our version
// on would stay silent until it catches up.
func (f *feed) compare(ctx context.Context, at *server) error {
	_, about, err := f.page(ctx, at, 1, "")
	if err == nil && older(about.GetResourceVersion(), f.version) {
		f.version = ""
	}
	return err
}

// older compares resourceVersions, which are numbers (KEP-5504). What is none
// cannot be compared.
func older(a, b string) bool {
	order, err := resourceversion.CompareResourceVersion(a, b)
	return err == nil && order < 0
}

// list takes over all there is, a page at a time, and then forgets what is not
// there any more.
func (f *feed) list(ctx context.Context, at *server) error {
	begun := time.Now()
	seen := map[cluster.Key]struct{}{}
	limit := pageSize
	if f.whole {
		limit = 0
	}
	for version, next := "", ""; ; {
		list, about, err := f.page(ctx, at, limit, next)
		if err != nil {
			// Other pages of this list are not to be had any more.
			f.whole = next != "" && expired(err)
			return err
		}
		if version == "" {
			version = about.GetResourceVersion()
		}
		if err := f.take(list, seen); err != nil {
			return err
		}
		if next = about.GetContinue(); next == "" {
			f.whole = false
			return f.settle(begun, version, seen)
		}
	}
}

// take puts the objects of a page.
func (f *feed) take(list runtime.Object, seen map[cluster.Key]struct{}) error {
	arrived := time.Now()
	return meta.EachListItem(list, func(obj runtime.Object) error {
		o, err := f.read(obj)
		if err == nil {
			seen[o.Key()] = struct{}{}
			f.put(arrived, o)
		}
		return err
	})
}

// read takes an object that nobody else has. Whom a Service selects is settled by
// who writes its slices, and 10,000 selectors are 3 MB.
func (f *feed) read(obj runtime.Object) (*cluster.Object, error) {
	if service, ok := obj.(*corev1.Service); ok {
		service.Spec.Selector = nil
	}
	return cluster.Read(cluster.Place{File: f.file}, obj)
}

// put takes over one object.
func (f *feed) put(arrived time.Time, o *cluster.Object) {
	if !o.Named() {
		return // no API server lets it in
	}
	f.source.change(arrived, func(c *cluster.Cluster) bool {
		doubted := f.unkeep(o.Key())
		return c.Put(o) == o || doubted
	})
}

// remove forgets one object.
func (f *feed) remove(arrived time.Time, k cluster.Key) {
	f.source.change(arrived, func(c *cluster.Cluster) bool {
		f.unkeep(k)
		c.Delete(k)
		return true
	})
}

// settle ends a list: what it lacks is gone, unless it is doubtful.
func (f *feed) settle(begun time.Time, version string, seen map[cluster.Key]struct{}) error {
	if len(seen) == 0 && f.kind.always && f.newest == "" {
		return fmt.Errorf("the list is empty, but %s: it has not come up", f.kind.never)
	}
	reason := ""
	switch {
	case f.newest != "" && older(version, f.newest):
		reason = fmt.Sprintf("it went back from resourceVersion %s to %s, as after a restore", f.newest, version)
	case len(seen) == 0 && f.kind.never != "":
		reason = "it lists none at all, but " + f.kind.never
	}
	f.source.change(begun, func(c *cluster.Cluster) bool { return f.sweep(c, seen, reason) })
	f.version, f.newest = version, version
	f.source.listed(f)
	return nil
}

// sweep forgets the objects that a list lacks, or keeps them for a while if there
// is a reason to doubt it. It is called with source.mu held.
func (f *feed) sweep(c *cluster.Cluster, seen map[cluster.Key]struct{}, reason string) bool {
	var gone []cluster.Key
	for k := range c.Keys(f.kind.object) {
		ours := f.kind.name == (model.Name{}) || f.kind.name == k.Name
		if _, there := seen[k]; ours && !there {
			gone = append(gone, k)
		}
	}
	now := time.Now()
	if reason != "" && len(gone) > 0 && len(f.kept) == 0 {
		f.keptUntil, f.reason = now.Add(f.source.doubt), reason
	}
	for _, k := range gone {
		_, kept := f.kept[k]
		switch {
		case reason != "":
			f.kept[k] = struct{}{}
		case !kept:
			c.Delete(k)
		}
	}
	f.source.remark(f)
	return len(gone) > 0
}

// unkeep notes that the API server told something of an object, and says whether
// the object was doubted until now. It is called with source.mu held.
func (f *feed) unkeep(k cluster.Key) bool {
	_, kept := f.kept[k]
	if kept {
		delete(f.kept, k)
		f.source.remark(f)
	}
	return kept
}

// expire forgets what was kept long enough.
func (f *feed) expire() {
	f.source.change(time.Now(), func(c *cluster.Cluster) bool {
		if len(f.kept) == 0 || time.Now().Before(f.keptUntil) {
			return false
		}
		for k := range f.kept {
			c.Delete(k)
		}
		clear(f.kept)
		f.source.remark(f)
		return true
	})
}

// keeping is when to expire next, nil for never.
func (f *feed) keeping() <-chan time.Time {
	f.source.mu.Lock()
	defer f.source.mu.Unlock()
	if len(f.kept) == 0 {
		return nil
	}
	return time.After(time.Until(f.keptUntil))
}

// watch follows the changes since version, until the time it asked for is over.
// It returns how long it could, 0 if no watch began.
func (f *feed) watch(ctx context.Context, at *server) (time.Duration, error) {
	lasts := watchLeast + rand.N(watchLeast)
	ctx, cancel := context.WithTimeout(ctx, lasts+f.source.patience)
	defer cancel()
	w, err := f.open(ctx, cancel, at, lasts)
	if err != nil {
		return 0, err
	}
	defer w.Stop()
	begun := time.Now()
	began, err := f.events(ctx, w)
	watched := time.Since(begun)
	switch {
	case !began:
		return 0, err
	case errors.Is(err, errEnded) && watched > lasts-time.Second:
		return watched, nil
	}
	return watched, err
}

// open begins a watch. What takes too long is ended with give.
func (f *feed) open(ctx context.Context, give func(), at *server, lasts time.Duration) (watch.Interface, error) {
	impatient := time.AfterFunc(f.source.patience, give)
	w, err := f.request(at).
		Param("watch", "true").
		Param("allowWatchBookmarks", "true").
		Param("resourceVersion", f.version).
		Param("timeoutSeconds", strconv.Itoa(int(lasts.Seconds()))).
		Watch(ctx)
	if impatient.Stop() {
		return w, err
	}
	if w != nil {
		w.Stop()
	}
	return nil, fmt.Errorf("no answer for %v", f.source.patience)
}

// events takes the events of a watch until it ends. It says whether the server
// answered at all: client-go's watch has ended before it begins where not.
func (f *feed) events(ctx context.Context, w watch.Interface) (began bool, err error) {
	select {
	case e, open := <-w.ResultChan():
		if err := f.event(time.Now(), e, open); err != nil {
			return false, err
		}
	default:
	}
	f.source.well(f)
	for expire := f.keeping(); ; {
		select {
		case e, open := <-w.ResultChan():
			if err := f.event(time.Now(), e, open); err != nil {
				return true, err
			}
		case <-expire:
			f.expire()
			expire = f.keeping()
		case <-ctx.Done():
			return true, errEnded
		}
	}
}

// event takes one event, if the watch is still open.
func (f *feed) event(arrived time.Time, e watch.Event, open bool) error {
	if !open {
		return errEnded
	}
	if e.Type == watch.Error {
		return apierrors.FromObject(e.Object)
	}
	about, err := meta.Accessor(e.Object)
	if err != nil {
		return err
	}
	if e.Type != watch.Bookmark {
		o, err := f.read(e.Object)
		if err != nil {
			return err
		}
		if e.Type == watch.Deleted {
			f.remove(arrived, o.Key())
		} else {
			f.put(arrived, o)
		}
	}
	f.version, f.newest = about.GetResourceVersion(), about.GetResourceVersion()
	return nil
}
