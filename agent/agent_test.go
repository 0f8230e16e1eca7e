package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// pond is a layer whose kernel is a set of words in memory: the names of the
// Services.
type pond struct {
	mu     sync.Mutex
	kernel map[string]bool
	refuse string // Apply fails for this word
	opened int
	// settled counts Settle.
	settled int
}

// Serves implements layer.Server.
func (p *pond) Serves(have layer.Picture) bool { return have.Len() > 0 }

// settingsOnly is a layer that serves nothing.
type settingsOnly struct{ layer.Layer }

type words map[string]bool

func (w words) Len() int { return len(w) }
func (w words) Subjects() []layer.Subject {
	var subjects []layer.Subject
	for _, s := range slices.Sorted(maps.Keys(w)) {
		subjects = append(subjects, word(s))
	}
	return subjects
}

type word string

func (w word) Object() string { return "word " + string(w) }
func (w word) Detail() string { return "" }

func (p *pond) Name() string { return "pond" }
func (p *pond) Open() error  { p.opened++; return nil }
func (p *pond) Close() error { return nil }
func (p *pond) Plan(s *model.Snapshot) layer.Picture {
	want := words{}
	for _, service := range s.Services {
		want[service.Name.Name] = true
	}
	for _, port := range s.HostPorts {
		want[port.Pod.Name] = true
	}
	return want
}
func (p *pond) Read() (layer.Picture, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return words(maps.Clone(p.kernel)), nil
}
func (p *pond) Look() (layer.Picture, error) { return p.Read() }
func (p *pond) Diff(have, want layer.Picture, prune bool) layer.Changes {
	var changes layer.Changes
	for w := range want.(words) {
		if !have.(words)[w] {
			changes = append(changes, layer.Change{Op: layer.Add, Subject: word(w)})
		}
	}
	for w := range have.(words) {
		if prune && !want.(words)[w] {
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: word(w)})
		}
	}
	return changes
}
func (p *pond) Apply(_, _ layer.Picture, changes layer.Changes) (layer.Picture, layer.Changes, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var done layer.Changes
	var failures []error
	for _, c := range changes {
		w := string(c.Subject.(word))
		switch {
		case w == p.refuse:
			failures = append(failures, fmt.Errorf("%s: no memory", c))
			continue
		case c.Op == layer.Remove:
			delete(p.kernel, w)
		default:
			p.kernel[w] = true
		}
		done = append(done, c)
	}
	return words(maps.Clone(p.kernel)), done, errors.Join(failures...)
}
func (p *pond) Refresh(have layer.Picture) (layer.Picture, error) { return have, nil }

func (p *pond) Watch(ctx context.Context, _ func()) error { <-ctx.Done(); return nil }

func (p *pond) Settle() error { p.settled++; return nil }
func (p *pond) Describe() (layer.Description, error) {
	return layer.Description{Name: "pond", Objects: len(p.kernel), Reasons: map[string]uint64{"splash": 7}, Degraded: []string{"no waves"},
		Maps:  []layer.Map{{Name: "water", Entries: 1, Capacity: 2, Bytes: 3}},
		Drops: []layer.Drops{{Space: 5, Reason: "LEAK", Count: 2}, {Space: 6, Reason: "LEAK", Count: 1}},
		Flows: []layer.Flow{{Space: 5, Client: netip.MustParseAddr("203.0.113.7"), Server: netip.MustParseAddrPort("10.96.0.1:80"), Ended: 4, Refused: 3}}}, nil
}
func (p *pond) Leave() (layer.Changes, error)   { return nil, nil }
func (p *pond) Left() (int, error)              { return 0, nil }
func (p *pond) Removal() (layer.Changes, error) { return nil, nil }
func (p *pond) Remove() (layer.Changes, error)  { return nil, nil }

func (p *pond) holds() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(slices.Sorted(maps.Keys(p.kernel)), " ")
}

// spring is a source that delivers what the test sends, and fails when told to.
type spring struct{ next chan any }

func (s *spring) Run(ctx context.Context, deliver func(*model.Snapshot)) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case what := <-s.next:
			if err, ok := what.(error); ok {
				return err
			}
			deliver(what.(*model.Snapshot))
		}
	}
}

func cluster(complete bool, names ...string) *model.Snapshot {
	s := &model.Snapshot{Complete: complete, Seen: time.Now()}
	for _, name := range names {
		s.Services = append(s.Services, &model.Service{Name: model.Name{Name: name}})
	}
	return s
}

type running struct {
	t      *testing.T
	pond   *pond
	source *spring
	folder string
	stop   func()
	port   string
}

func start(t *testing.T, p *pond, alter ...func(*Config)) *running {
	t.Helper()
	folder := filepath.Join(t.TempDir(), "run")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	r := &running{t: t, pond: p, source: &spring{make(chan any)}, folder: folder, port: address}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	config := Config{Node: "n1", Version: "test", Source: r.source, SourceName: "test:", Layers: []layer.Layer{p},
		RunFolder: folder, Metrics: address, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Started: time.Now()}
	for _, one := range alter {
		one(&config)
	}
	go func() { ended <- Run(ctx, config) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(r.stop)
	r.until("the socket answers", func() bool { _, err := r.status(); return err == nil })
	return r
}

func (r *running) status() (Status, error) {
	var s Status
	return s, Ask(context.Background(), r.folder, "/status", &s)
}

func (r *running) until(what string, true_ func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !true_(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			s, err := r.status()
			r.t.Fatalf("waited ten seconds until %s; the kernel holds %q; status %+v, %v", what, r.pond.holds(), s, err)
		}
	}
}

func (r *running) untilHolds(want string) {
	r.t.Helper()
	r.until("the kernel holds "+want, func() bool { return r.pond.holds() == want })
}

func TestNothingIsRemovedBeforeTheClusterWasSeenWhole(t *testing.T) {
	r := start(t, &pond{kernel: map[string]bool{"old": true}})
	r.source.next <- cluster(false, "new")
	r.untilHolds("new old")
	if s, _ := r.status(); s.Ready {
		t.Error("ready before the cluster was seen whole")
	}
	unread := cluster(true, "new")
	unread.Unread = 1
	r.source.next <- unread
	r.until("the unread object is told", func() bool { s, _ := r.status(); return s.Source.Unread == 1 })
	if held := r.pond.holds(); held != "new old" {
		t.Errorf("something could not be read, and the kernel holds %q", held)
	}
	r.source.next <- cluster(true, "new")
	r.untilHolds("new")
	r.until("the agent is ready", func() bool { s, _ := r.status(); return s.Ready })
}

// HostPorts are part of each Snapshot, of the first one, too; others come without one, also
// while the source cannot be read.
func TestHostPortsAreInEverySnapshot(t *testing.T) {
	ports := make(chan []model.HostPort, 1)
	of := func(names ...string) (all []model.HostPort) {
		for _, name := range names {
			all = append(all, model.HostPort{Pod: model.Name{Name: name}})
		}
		return all
	}
	ports <- of("pod")
	r := start(t, &pond{kernel: map[string]bool{"pod": true, "old": true}}, func(c *Config) { c.HostPorts = ports })
	r.until("they are taken", func() bool { return len(ports) == 0 })
	if held := r.pond.holds(); held != "old pod" {
		t.Errorf("before there is a Snapshot the kernel holds %q", held)
	}
	r.source.next <- cluster(true, "a")
	r.untilHolds("a pod")
	ports <- of("pod", "pod2")
	r.untilHolds("a pod pod2")
	r.source.next <- errors.New("connection refused")
	r.until("status tells the cause", func() bool { s, _ := r.status(); return s.Source.Error != "" })
	ports <- of("pod2")
	r.untilHolds("a pod2")
	if s, _ := r.status(); s.Source.Error == "" {
		t.Error("hostPorts are taken for a word of the source")
	}
	r.source.next <- cluster(true, "b")
	r.untilHolds("b pod2")
	ports <- nil
	r.untilHolds("b")
}

func TestWhatFailsIsTriedAgain(t *testing.T) {
	p := &pond{kernel: map[string]bool{}, refuse: "b"}
	r := start(t, p)
	r.source.next <- cluster(true, "a", "b", "c")
	r.untilHolds("a c")
	r.until("the failure is told", func() bool {
		s, _ := r.status()
		return len(s.Layers) == 1 && s.Layers[0].Failed > 0 && strings.Contains(s.Layers[0].LastError, "word b") && !s.Ready
	})
	p.mu.Lock()
	p.refuse = ""
	p.mu.Unlock()
	r.untilHolds("a b c")
	r.until("the error is gone and the agent ready", func() bool {
		s, _ := r.status()
		return s.Layers[0].LastError == "" && s.Ready
	})
	if s, _ := r.status(); s.Layers[0].Changes.Added != 3 {
		t.Errorf("3 words were added, %d are counted", s.Layers[0].Changes.Added)
	}
	p.mu.Lock()
	p.refuse = "d"
	p.mu.Unlock()
	r.source.next <- cluster(true, "a", "b", "c", "d")
	r.until("the agent is not ready any more", func() bool { s, _ := r.status(); return !s.Ready })
}

func TestALostSourceLeavesEverythingInForce(t *testing.T) {
	r := start(t, &pond{kernel: map[string]bool{}})
	r.source.next <- cluster(true, "a")
	r.untilHolds("a")
	r.source.next <- errors.New("connection refused")
	r.until("status tells the cause", func() bool { s, _ := r.status(); return s.Source.Error == "connection refused" })
	if held := r.pond.holds(); held != "a" {
		t.Errorf("the kernel holds %q", held)
	}
	r.source.next <- cluster(true, "a", "b") // it is asked again by itself
	r.untilHolds("a b")
	r.until("status is clean again", func() bool { s, _ := r.status(); return s.Source.Error == "" })
}

func TestWhatSomebodyElseChangedIsMended(t *testing.T) {
	p := &pond{kernel: map[string]bool{}}
	a := &Agent{config: Config{Log: slog.New(slog.NewTextHandler(io.Discard, nil))}, metrics: newMetrics()}
	if err := a.open(p); err != nil {
		t.Fatal(err)
	}
	a.take(cluster(true, "a", "b"))
	delete(p.kernel, "a")
	p.kernel["x"] = true
	a.findDrift()
	a.applyAll()
	if held := p.holds(); held != "a b" {
		t.Errorf("the kernel holds %q", held)
	}
	if n := a.parts[0].drifted; n != 2 {
		t.Errorf("%d objects drifted, 2 did", n)
	}
}

// After many changes memory goes back to the kernel, when the source has had time to
// read the rest of them, and garbage is collected earlier.
func TestMemoryIsGivenBackAfterManyChanges(t *testing.T) {
	percent := debug.SetGCPercent(100)
	t.Cleanup(func() { debug.SetGCPercent(percent) })
	r := start(t, &pond{kernel: map[string]bool{}})
	var names []string
	for i := range 2000 {
		names = append(names, fmt.Sprintf("s%04d", i))
	}
	r.source.next <- cluster(true, names...)
	r.until("garbage may be a quarter of what is kept", func() bool {
		now := []runtimemetrics.Sample{{Name: "/gc/gogc:percent"}}
		runtimemetrics.Read(now)
		return now[0].Value.Uint64() == percentAtRest
	})
}

// A drift check reads as much as the first load wrote.
func TestMemoryIsGivenBackAfterADriftCheck(t *testing.T) {
	p := &pond{kernel: map[string]bool{}}
	a := &Agent{config: Config{Log: slog.New(slog.NewTextHandler(io.Discard, nil))}, metrics: newMetrics()}
	if err := a.open(p); err != nil {
		t.Fatal(err)
	}
	for _, objects := range []int{10, 2000} {
		for i := range objects {
			p.kernel[fmt.Sprintf("s%04d", i)] = true
		}
		if a.findDrift(); a.litter != (objects > many) {
			t.Errorf("after reading %d objects memory is to be given back: %v", objects, a.litter)
		}
	}
}

func TestTwoAgentsDoNotShareARunFolder(t *testing.T) {
	r := start(t, &pond{kernel: map[string]bool{}})
	err := Run(context.Background(), Config{RunFolder: r.folder})
	if !errors.Is(err, ErrRunning) || !Running(r.folder) {
		t.Errorf("the second agent says %v, Running says %v", err, Running(r.folder))
	}
	r.stop()
	if Running(r.folder) {
		t.Error("stopped, and said to be running")
	}
}

// An agent that cannot go on ends, so that it is started again; it does not stay
// and do nothing.
func TestAPanicEndsTheAgent(t *testing.T) {
	source := &spring{make(chan any)}
	ended := make(chan any)
	go func() {
		defer func() { ended <- recover() }()
		Run(context.Background(), Config{Node: "n1", Source: source, Layers: []layer.Layer{&pond{}}, // its map is nil
			RunFolder: filepath.Join(t.TempDir(), "run"), Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Started: time.Now()})
	}()
	source.next <- cluster(true, "a")
	select {
	case cause := <-ended:
		if cause == nil {
			t.Error("it ended without a panic")
		}
	case <-time.After(10 * time.Second):
		t.Error("ten seconds later it is still there")
	}
}

func TestSocketIsClosedToOthers(t *testing.T) {
	r := start(t, &pond{kernel: map[string]bool{}})
	for path, want := range map[string]os.FileMode{r.folder: 0o700, socketIn(r.folder): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want %o", path, info.Mode(), err, want)
		}
	}
}

// Who waits for /readyz waits until the Services are in the kernel, and not for an
// API server: what an earlier agent left there counts, and a source that is lost is no
// reason. /livez answers all the time.
func TestProbes(t *testing.T) {
	get := func(r *running, path string) string {
		response, err := http.Get("http://" + r.port + path)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		text, _ := io.ReadAll(response.Body)
		return fmt.Sprint(response.StatusCode, " ", strings.TrimSpace(string(text)))
	}
	says := func(r *running, when, readyz string) {
		t.Helper()
		if got := get(r, "/readyz"); got != readyz {
			t.Errorf("%s, /readyz: %s, want %s", when, got, readyz)
		}
		if got := get(r, "/livez"); got != "200 ok" {
			t.Errorf("%s, /livez: %s", when, got)
		}
	}
	const notYet = "503 the cluster's Services are not in the kernel yet"
	r := start(t, &pond{kernel: map[string]bool{}})
	says(r, "at first", notYet)
	r.source.next <- cluster(false, "a")
	r.untilHolds("a")
	says(r, "before the cluster was seen whole", notYet)
	r.source.next <- cluster(true, "a", "b")
	r.untilHolds("a b")
	r.until("it is ready", func() bool { s, _ := r.status(); return s.Ready })
	says(r, "with all of them", "200 ok")
	left := map[string]bool{"a": true}
	says(start(t, &pond{kernel: left}), "after a restart", "200 ok")
	says(start(t, &pond{kernel: map[string]bool{}}, func(c *Config) {
		c.Layers = append(c.Layers, settingsOnly{&pond{kernel: left}})
	}), "after a restart that left settings alone", notYet)
}

func TestMetricsAreServed(t *testing.T) {
	r := start(t, &pond{kernel: map[string]bool{}})
	r.source.next <- cluster(true, "a", "b")
	r.untilHolds("a b")
	r.until("a latency is known", func() bool { s, _ := r.status(); return s.Latency != nil && s.Latency.Changes == 1 })
	text := r.metrics()
	for _, want := range []string{
		`millrace_build_info{version="test"} 1`,
		`millrace_agent_ready 1`,
		`millrace_layer_changes_total{layer="pond",op="add"} 2`,
		`millrace_layer_objects{layer="pond"} 2`,
		`millrace_map_bytes{layer="pond",map="water"} 3`,
		`millrace_events_total{layer="pond",reason="splash"} 7`,
		`millrace_drops_total{namespace="",pod="others",reason="LEAK"} 3`,
		`millrace_flow_connections_ended_total{client="external",client_namespace="",seen_by="server",server="external",server_namespace="",verdict="refused"} 3`,
		`millrace_flow_bytes_total{client="external",client_namespace="",direction="sent",seen_by="server",server="external",server_namespace=""} 0`,
		`millrace_agent_programming_duration_seconds_count 1`,
		`millrace_agent_source_lost_seconds 0`,
		`millrace_agent_unread 0`,
		`millrace_layer_drift_total{layer="pond"} 0`,
		`millrace_layer_degraded{layer="pond"} 1`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in:\n%s", want, text)
		}
	}
}

func (r *running) metrics() string {
	r.t.Helper()
	response, err := http.Get("http://" + r.port + "/metrics")
	if err != nil {
		r.t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return string(text)
}

// The age of the picture says nothing of it: where nothing changes, it grows.
func TestMetricsSayThatTheSourceIsLost(t *testing.T) {
	r := start(t, &pond{kernel: map[string]bool{}})
	held := cluster(true, "a")
	held.Unread = 2
	r.source.next <- held
	r.source.next <- errors.New("connection refused")
	r.until("the source is lost", func() bool {
		text := r.metrics()
		return !strings.Contains(text, "millrace_agent_source_lost_seconds 0\n") && strings.Contains(text, "millrace_agent_unread 2\n")
	})
	r.source.next <- cluster(true, "a")
	r.until("it is back", func() bool {
		text := r.metrics()
		return strings.Contains(text, "millrace_agent_source_lost_seconds 0\n") && strings.Contains(text, "millrace_agent_unread 0\n")
	})
}

func TestOnlyTheNewestSnapshotCounts(t *testing.T) {
	a := &Agent{newest: make(chan *model.Snapshot, 1)}
	first := cluster(true, "a")
	a.deliver(first)
	a.deliver(cluster(true, "b"))
	a.deliver(cluster(true, "c"))
	s := <-a.newest
	if s.Services[0].Name.Name != "c" || !s.Seen.Equal(first.Seen) {
		t.Errorf("got %s seen %v, want c with the time of the oldest, %v", s.Services[0].Name.Name, s.Seen, first.Seen)
	}
}

// Commands ask whose an address is.
func TestPodsAndNodesAreTold(t *testing.T) {
	r := start(t, &pond{kernel: map[string]bool{}})
	ask := func(path string, into any) {
		t.Helper()
		if err := Ask(context.Background(), r.folder, path, into); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	}
	var pods []*model.Pod
	if ask("/pods", &pods); len(pods) != 0 {
		t.Errorf("before the first picture there are pods: %v", pods)
	}
	picture := cluster(true, "a")
	address := netip.MustParseAddr("10.244.1.4")
	for i := range 3 {
		picture.Pods = append(picture.Pods, &model.Pod{Name: model.Name{Namespace: "shop", Name: fmt.Sprint("web-", i)}, Node: "n1",
			Addresses: []netip.Addr{address}, Labels: map[string]string{"app": "web"},
			Annotations: map[string]string{"millrace.io/path": "packet", "example.org/note": "long"}})
	}
	picture.Nodes = []*model.Node{{Name: "n1", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}}}
	r.source.next <- picture
	r.untilHolds("a")
	ask("/pods", &pods)
	want := model.Pod{Name: model.Name{Namespace: "shop", Name: "web-2"}, Node: "n1", Addresses: []netip.Addr{address},
		Annotations: map[string]string{"millrace.io/path": "packet"}}
	if len(pods) != 3 || !reflect.DeepEqual(*pods[2], want) {
		t.Errorf("%d pods, the last is %+v, should be %+v", len(pods), pods[len(pods)-1], want)
	}
	var nodes []*model.Node
	if ask("/nodes", &nodes); len(nodes) != 1 || !reflect.DeepEqual(nodes[0], picture.Nodes[0]) {
		t.Errorf("nodes are %v, should be %v", nodes, picture.Nodes)
	}
}

// brook is a layer that hears of something new all the time, and takes its time to look.
type brook struct {
	pond
	looks atomic.Int64
}

const brookLook = 10 * time.Millisecond

func (b *brook) Watch(ctx context.Context, changed func()) error {
	for ctx.Err() == nil {
		changed()
		time.Sleep(100 * time.Microsecond)
	}
	return nil
}

func (b *brook) Refresh(have layer.Picture) (layer.Picture, error) {
	b.looks.Add(1)
	time.Sleep(brookLook)
	return have, nil
}

// However much layers hear of, at least half of the time the agent does not look at it, and
// what the cluster wants comes through.
func TestTheAgentRestsFromLooking(t *testing.T) {
	one, other := &brook{pond: pond{kernel: map[string]bool{}}}, &brook{pond: pond{kernel: map[string]bool{}}}
	p := &pond{kernel: map[string]bool{}}
	r := start(t, p, func(c *Config) { c.Layers = []layer.Layer{p, one, other} })
	r.source.next <- cluster(true, "web")
	r.untilHolds("web")
	before, begun := one.looks.Load(), time.Now()
	r.until("it was looked some more", func() bool { return one.looks.Load() >= before+20 })
	most := time.Since(begun) / (2 * 2 * brookLook) // two layers look, and as long is rest
	if looks := one.looks.Load() - before; looks > int64(most)+2 {
		t.Errorf("%d looks of 2 x %v in %v", looks, brookLook, time.Since(begun))
	}
}
