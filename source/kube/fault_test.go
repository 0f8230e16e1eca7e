package kube

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/kube/kubetest"
)

// wait waits for something that is not in a Snapshot.
func wait(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited twenty seconds until %s", what)
		}
	}
}

// watched waits until every kind is watched.
func (b *bed) watched() {
	b.t.Helper()
	wait(b.t, "every kind is watched", func() bool {
		for _, f := range b.source.feeds {
			if b.Watches(f.kind.resource) != 1 {
				return false
			}
		}
		return true
	})
}

// asks says whether a request is about a resource.
func asks(r *http.Request, resource string) bool { return strings.HasSuffix(r.URL.Path, "/"+resource) }

func watches(r *http.Request) bool { return r.URL.Query().Get("watch") == "true" }

func refuse(w http.ResponseWriter, code int, reason metav1.StatusReason) bool {
	kubetest.Refuse(w, code, reason, "so says the test")
	return true
}

// lists counts whole lists of a resource, not the question for a version.
func (b *bed) countLists(resource string) *atomic.Int64 {
	var n atomic.Int64
	b.Fault(func(_ http.ResponseWriter, r *http.Request) bool {
		if asks(r, resource) && !watches(r) && r.URL.Query().Get("limit") != "1" {
			n.Add(1)
		}
		return false
	})
	return &n
}

// problem is what the Snapshot says of a resource, "" for nothing.
func problem(s *model.Snapshot, resource string) string {
	for _, p := range s.Problems {
		if p.Where == "kube "+resource {
			return p.Error()
		}
	}
	return ""
}

// A Service without its endpoints would be refused on the node: it waits for them.
func TestNothingIsToldBeforeAllWasListed(t *testing.T) {
	b := newBed(t)
	release := make(chan struct{})
	b.Fault(func(_ http.ResponseWriter, r *http.Request) bool {
		if asks(r, "endpointslices") {
			<-release
		}
		return false
	})
	b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	wait(t, "the others are watched", func() bool {
		return b.Watches("services") == 1 && b.Watches("nodes") == 1 && b.Watches("pods") == 1
	})
	b.apply(service("mail", "10.96.0.3"))
	if all := b.snapshots(); len(all) > 0 {
		t.Errorf("told without endpoints: %s", describe(all[0]))
	}
	close(release)
	b.shows("mail, web 10.244.1.1")
	for _, s := range b.snapshots() {
		if !s.Complete || !strings.Contains(describe(s), "web 10.244.1.1") {
			t.Errorf("told: complete %v, %s", s.Complete, describe(s))
		}
	}
}

// Without the pods Services can be served, but nothing is complete.
func TestForbiddenKindLeavesTheOthersInForce(t *testing.T) {
	b := newBed(t)
	var forbidden atomic.Bool
	forbidden.Store(true)
	b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		return asks(r, "pods") && forbidden.Load() && refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden)
	})
	b.apply(nodes + service("web", "10.96.0.2") + slice("web", "10.244.1.1") + pod("here", "n1", "10.244.1.1"))
	b.run()
	first := b.shows("web 10.244.1.1")
	if text := problem(first, "pods"); first.Complete || !strings.Contains(text, "cannot be followed since 2") || !strings.Contains(text, "list pods at http") {
		t.Errorf("complete %v, problem %q", first.Complete, text)
	}
	b.apply(slice("web", "10.244.1.2"))
	b.shows("web 10.244.1.2")
	forbidden.Store(false)
	b.until("all is well", func(s *model.Snapshot) bool {
		return s.Complete && len(s.Problems) == 0 && len(s.Pods) == 1
	})
}

// One kind is answered with 500s for a while. What it said stays, the others go on.
func TestErrorsOfOneKindAreToldAndTakeNothingAway(t *testing.T) {
	b := newBed(t)
	var failing atomic.Bool
	b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		return asks(r, "services") && failing.Load() && refuse(w, http.StatusInternalServerError, metav1.StatusReasonInternalError)
	})
	b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	b.shows("web 10.244.1.1")
	b.watched()
	failing.Store(true)
	b.Cut(true)
	s := b.until("it is told", func(s *model.Snapshot) bool { return problem(s, "services") != "" })
	if describe(s) != "web 10.244.1.1" || !s.Complete {
		t.Errorf("complete %v: %s", s.Complete, describe(s))
	}
	b.apply(slice("web", "10.244.1.1", "10.244.1.2") + service("mail", "10.96.0.3"))
	b.shows("web 10.244.1.1 10.244.1.2")
	failing.Store(false)
	b.until("all is well", func(s *model.Snapshot) bool {
		return describe(s) == "mail, web 10.244.1.1 10.244.1.2" && len(s.Problems) == 0
	})
}

// While no server answers Run ends with the reason; the next one goes on.
func TestServerGoneAndBack(t *testing.T) {
	b := newBed(t)
	var gone atomic.Bool
	b.Fault(func(http.ResponseWriter, *http.Request) bool {
		if gone.Load() {
			panic(http.ErrAbortHandler)
		}
		return false
	})
	b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	last := b.shows("web 10.244.1.1")
	b.watched()
	gone.Store(true)
	b.Cut(true)
	if err := b.over(); err == nil || !strings.Contains(err.Error(), "watch the cluster: ") || !strings.Contains(err.Error(), b.url) {
		t.Errorf("Run ended with: %v", err)
	}
	b.run()
	if err := b.over(); err == nil {
		t.Error("Run ended without a reason while nobody answers")
	}
	for _, s := range b.snapshots() {
		if describe(s) != "web 10.244.1.1" || !s.Complete {
			t.Errorf("told meanwhile: complete %v, %s", s.Complete, describe(s))
		}
	}
	told := len(b.snapshots())
	gone.Store(false)
	b.run()
	wait(t, "it tells that the server answers, though nothing changed", func() bool { return len(b.snapshots()) > told })
	b.until("nothing is wrong", func(s *model.Snapshot) bool { return len(s.Problems) == 0 && s.Number >= last.Number })
	b.apply(slice("web", "10.244.1.2"))
	b.shows("web 10.244.1.2")
}

// A watch that is cut, in order or in the middle of an event, loses no change and
// does not cost a new list.
// Who acts on what was heard may ask how old it is.
func TestHeard(t *testing.T) {
	b := newBed(t)
	b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	opened := time.Now()
	if b.source.Heard().After(opened) {
		t.Error("it was heard before it was asked")
	}
	b.run()
	b.watched()
	isNow := func() bool { return time.Since(b.source.Heard()) < time.Second }
	wait(t, "all is heard", isNow)
	var gone atomic.Bool
	b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		return gone.Load() && asks(r, "endpointslices") && refuse(w, http.StatusInternalServerError, metav1.StatusReasonInternalError)
	})
	before := time.Now()
	gone.Store(true)
	b.Cut(false)
	wait(t, "it is not heard for a while", func() bool { return !isNow() })
	if since := b.source.Heard(); since.Before(before) || since != b.source.Heard() {
		t.Errorf("cut off at %v, heard at %v and then %v", before, since, b.source.Heard())
	}
	gone.Store(false)
	wait(t, "it is heard again", isNow)
}

func TestCutWatchGoesOnWhereItWas(t *testing.T) {
	for _, torn := range []bool{false, true} {
		b := newBed(t)
		lists := b.countLists("endpointslices")
		b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.0"))
		b.run()
		b.shows("web 10.244.1.0")
		for i := 1; i <= 3; i++ {
			b.watched()
			b.Cut(torn)
			pod := fmt.Sprintf("10.244.1.%d", i)
			b.apply(slice("web", pod))
			b.shows("web " + pod)
		}
		if n := lists.Load(); n != 1 {
			t.Errorf("torn %v: listed %d times", torn, n)
		}
		b.end()
	}
}

// What was deleted while nobody watched is gone after 410.
func TestExpiredWatchListsAgain(t *testing.T) {
	b := newBed(t)
	var blind atomic.Bool
	b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		return blind.Load() && watches(r) && refuse(w, http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable)
	})
	b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.1") + service("mail", "10.96.0.3"))
	b.run()
	b.shows("mail, web 10.244.1.1")
	b.watched()
	blind.Store(true)
	b.Cut(false)
	b.remove(service("web", "10.96.0.2"))
	b.apply(service("wiki", "10.96.0.4"))
	b.Compact()
	blind.Store(false)
	s := b.shows("mail, wiki")
	if !s.Complete || problem(s, "services") != "" {
		t.Errorf("complete %v, problems %v", s.Complete, s.Problems)
	}
	b.watched()
	b.Expire()
	b.apply(service("blog", "10.96.0.5"))
	b.shows("blog, mail, wiki")
}

// Bookmarks are why a quiet kind need not be listed again: a watch goes on from
// the last bookmark, not from the last change of its own kind.
func TestWatchGoesOnFromABookmark(t *testing.T) {
	b := newBed(t)
	lists := b.countLists("services")
	b.apply(service("web", "10.96.0.2"))
	b.run()
	b.shows("web")
	b.watched()
	b.apply(nodes)
	b.until("the nodes came", func(s *model.Snapshot) bool { return len(s.Nodes) == 2 })
	b.Bookmark()
	b.Cut(false)
	b.Compact()
	b.apply(service("mail", "10.96.0.3"))
	b.shows("mail, web")
	if n := lists.Load(); n != 1 {
		t.Errorf("listed %d times", n)
	}
}

// etcd restored from a backup: the server knows less than it did.
func TestOlderServerTakesNothingAwayAtOnce(t *testing.T) {
	b := newBed(t)
	b.source.doubt = 3 * time.Second
	b.apply(service("mail", "10.96.0.3") + service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	b.shows("mail, web 10.244.1.1")
	b.watched()
	b.Restore(50, func(o kubetest.Object) bool { return o.GetName() == "kubernetes" || o.GetName() == "mail" })
	s := b.until("the doubt is told", func(s *model.Snapshot) bool {
		return strings.Contains(problem(s, "services"), "1 that the API server does not list any more stay in force until 2")
	})
	if text := problem(s, "services"); describe(s) != "mail, web 10.244.1.1" || !strings.Contains(text, "it went back from resourceVersion") {
		t.Errorf("%s; %s", describe(s), text)
	}
	b.apply(service("wiki", "10.96.0.4"))
	b.until("changes are still taken", func(s *model.Snapshot) bool { return strings.HasSuffix(describe(s), "wiki") })
	b.shows("mail, wiki")
	b.until("nothing is told any more", func(s *model.Snapshot) bool { return len(s.Problems) == 0 })
}

// What comes back meanwhile is not kept any more but said.
func TestWhatComesBackIsNotDoubted(t *testing.T) {
	b := newBed(t)
	b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	b.shows("web 10.244.1.1")
	b.watched()
	b.Restore(50, func(o kubetest.Object) bool { return o.GetName() == "kubernetes" })
	b.until("the doubt is told", func(s *model.Snapshot) bool {
		return problem(s, "services") != "" && problem(s, "endpointslices") != ""
	})
	b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.9"))
	b.until("all is well", func(s *model.Snapshot) bool { return describe(s) == "web 10.244.1.9" && len(s.Problems) == 0 })
	b.remove(service("web", "10.96.0.2"))
	b.shows("")
}

// An empty store: no Services, no Nodes.
func TestEmptyServerTakesNothingAwayAtOnce(t *testing.T) {
	b := newBed(t)
	b.apply(nodes + service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	b.shows("web 10.244.1.1")
	b.watched()
	b.Restore(5000, func(kubetest.Object) bool { return false })
	s := b.until("the doubt is told", func(s *model.Snapshot) bool {
		return problem(s, "services") != "" && problem(s, "endpointslices") != "" && problem(s, "nodes") != ""
	})
	if describe(s) != "web 10.244.1.1" || len(s.Nodes) != 2 || !strings.Contains(problem(s, "nodes"), "it lists none at all, but this agent runs on one") {
		t.Errorf("%s, %d nodes, %v", describe(s), len(s.Nodes), s.Problems)
	}
}

// A server that has not even its own Service is not believed to be all.
func TestServerThatHasNotComeUpIsNotListened(t *testing.T) {
	b := newBed(t)
	b.Restore(10, func(kubetest.Object) bool { return false })
	b.run()
	failing := func() bool {
		b.source.mu.Lock()
		defer b.source.mu.Unlock()
		return b.source.feeds[0].trouble != nil
	}
	wait(t, "the list is refused", failing)
	if all := b.snapshots(); len(all) > 0 {
		t.Errorf("told: %s, complete %v", describe(all[0]), all[0].Complete)
	}
	b.source.mu.Lock()
	err := b.source.feeds[0].trouble
	b.source.mu.Unlock()
	if !strings.Contains(err.Error(), "it has not come up") {
		t.Error(err)
	}
	b.apply(service("kubernetes", "10.111.0.1"))
	if s := b.shows(""); !s.Complete || len(s.Services) != 1 {
		t.Errorf("complete %v, %d Services", s.Complete, len(s.Services))
	}
}

// Long lists come in pages; where a server cannot go on with one, whole.
func TestLongListsComeInPages(t *testing.T) {
	for _, stale := range []bool{false, true} {
		b := newBed(t)
		lists := b.countLists("services")
		b.Stale(stale)
		var text strings.Builder
		for i := range 1100 {
			text.WriteString(service(fmt.Sprintf("s-%04d", i), fmt.Sprintf("10.97.%d.%d", i/200, i%200+1)))
		}
		b.apply(text.String())
		b.run()
		s := b.until("all are there", func(s *model.Snapshot) bool { return s.Complete })
		if len(s.Services) != 1101 {
			t.Errorf("stale %v: %d Services, want 1101", stale, len(s.Services))
		}
		if n := lists.Load(); n != 3 { // three pages, or the first, the refused and the whole
			t.Errorf("stale %v: %d requests", stale, n)
		}
		b.end()
	}
}

// A server that takes its time is given up, and asked again.
func TestServerThatDoesNotAnswer(t *testing.T) {
	for _, what := range []string{"list", "watch"} {
		t.Run(what, func(t *testing.T) {
			b := newBed(t)
			b.source.patience = 300 * time.Millisecond
			var mute atomic.Bool
			mute.Store(true)
			b.Fault(func(_ http.ResponseWriter, r *http.Request) bool {
				if asks(r, "nodes") && watches(r) == (what == "watch") && mute.Load() {
					<-r.Context().Done()
					return true
				}
				return false
			})
			b.apply(nodes)
			b.run()
			s := b.until("it is told", func(s *model.Snapshot) bool { return problem(s, "nodes") != "" })
			t.Log(problem(s, "nodes"))
			mute.Store(false)
			b.until("all is well", func(s *model.Snapshot) bool { return s.Complete && len(s.Nodes) == 2 && len(s.Problems) == 0 })
		})
	}
}

// Several addresses: those that do not answer are passed over, at the start and later.
func TestServersAreTriedInTurn(t *testing.T) {
	b := newBed(t)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close() // nobody is there
	first := httptest.NewServer(b.Server)
	b.source = b.open(closed.Addr().String(), "http://"+closed.Addr().String(), first.URL, b.url)
	b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	b.shows("web 10.244.1.1")
	b.Cut(true)
	first.Listener.Close()
	first.CloseClientConnections()
	b.apply(slice("web", "10.244.1.2"))
	b.shows("web 10.244.1.2")
	if err := b.end(); err != nil {
		t.Error(err)
	}
}

// A server that ends every watch as it begins is not asked as fast as it answers.
func TestNoBusyLoop(t *testing.T) {
	for what, fault := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"ends": func(w http.ResponseWriter, r *http.Request) bool {
			if watches(r) {
				w.Header().Set("Content-Type", "application/json")
			}
			return watches(r)
		},
		"hangs up": func(w http.ResponseWriter, r *http.Request) bool {
			if watches(r) {
				panic(http.ErrAbortHandler)
			}
			return false
		},
		"expires": func(w http.ResponseWriter, r *http.Request) bool {
			return watches(r) && refuse(w, http.StatusGone, metav1.StatusReasonExpired)
		},
		"throttles": func(w http.ResponseWriter, r *http.Request) bool {
			return watches(r) && refuse(w, http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests)
		},
	} {
		t.Run(what, func(t *testing.T) {
			b := newBed(t)
			b.ended = make(chan error)
			b.Fault(fault)
			begun := time.Now()
			ctx, stop := context.WithCancel(context.Background())
			go func() {
				defer close(b.ended)
				for ctx.Err() == nil { // faster than any agent would
					b.source.Run(ctx, func(*model.Snapshot) {})
				}
			}()
			// The waits between attempts are 0.05 s, 0.1 s, 0.2 s, 0.4 s at least. Each
			// lists or asks for the version once; of watches Go's client may make two.
			wait(t, "there were five attempts", func() bool { return attempts(b) >= 5 })
			if took := time.Since(begun); took < 300*time.Millisecond {
				t.Errorf("five attempts within %v", took)
			}
			stop()
			<-b.ended
		})
	}
}

// attempts counts how often Services were listed or their version was asked for.
func attempts(b *bed) (n int) {
	for _, r := range b.Requests() {
		if r == (kubetest.Request{Verb: "list", Resource: "services"}) {
			n++
		}
	}
	return n
}

// Waits double up to the longest, differ from each other, and are as long as a
// server asks for.
func TestPauses(t *testing.T) {
	f := &feed{source: &Source{servers: &servers{all: make([]*server, 2)}}}
	var slow []time.Duration
	for range 50 {
		f.failures = 100
		slow = append(slow, f.pause(errEnded))
	}
	if low, high := slices.Min(slow), slices.Max(slow); low < retryMost/2 || high > retryMost*3/2 || low == high {
		t.Errorf("waits after many failures: %v to %v", low, high)
	}
	f.failures = 2 // the second of two servers has yet to be asked
	if d := f.pause(errEnded); d > 2*retrySoon {
		t.Errorf("the next server has to wait for %v", d)
	}
}
