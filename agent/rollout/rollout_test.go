package rollout

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/layer"
)

const (
	every = time.Minute
	soak  = soakRounds * every
)

// store is the API server of some nodes.
type store struct {
	trial  Trial
	choice Choice
	label  string // the node that may begin; empty for any
	down   error
	events []string
}

// seen is the store as one node has read it.
type seen struct {
	*store
	node string
	read Trial
}

func (s *seen) Read(context.Context) (Trial, Choice, bool, bool, error) {
	s.read = s.trial
	return s.trial, s.choice, s.label == "" || s.label == s.node, s.label == s.node, s.down
}

func (s *seen) Write(_ context.Context, t Trial) error {
	switch {
	case s.down != nil:
		return s.down
	case s.trial != s.read:
		return ErrTaken
	}
	s.trial = t
	return nil
}

func (s *seen) Say(_ context.Context, e Event) (string, error) {
	if e.Name == "" {
		s.events = append(s.events, s.node+" "+e.Reason+": "+e.Message)
	}
	return "event", s.down
}

// machine is a node whose settings are kept: it has what is chosen, or it has not.
type machine struct {
	has   []Spot
	found []string
	asked Asked
	drift []Drift
	// err is of rounds, stuck of what is to be put back.
	err, stuck error
}

// The network namespaces of a machine, and of a pod that runs there.
const (
	theNode = 1
	thePod  = 7
)

func (m *machine) Pods() ([]uint64, error) { return []uint64{thePod}, nil }

func (m *machine) Keep(_ context.Context, a Asked) (*Outcome, error) {
	m.asked = a
	if a.More && m.err == nil {
		var has []Spot
		for _, word := range a.Choice.Words {
			has = append(has, Spot{theNode, word, word})
			if pod := (Spot{thePod, word, word}); a.Choice.ExistingPods || slices.Contains(m.has, pod) {
				has = append(has, pod)
			}
		}
		m.has = has
	}
	return &Outcome{Held: len(m.has), Drift: m.drift}, m.err
}

func (m *machine) Findings(context.Context) (map[string]string, error) {
	found := map[string]string{}
	for _, id := range m.found {
		found[id] = "it is bad"
	}
	return found, nil
}

func (m *machine) Holds() ([]Spot, error) { return slices.Clone(m.has), nil }

func (m *machine) LetGo(spots []Spot) ([]string, error) {
	if m.stuck != nil {
		return nil, m.stuck
	}
	m.has = slices.DeleteFunc(m.has, func(s Spot) bool { return slices.Contains(spots, s) })
	return []string{fmt.Sprintf("- %v", spots)}, nil
}

// fleet is nodes of a cluster with one clock.
type fleet struct {
	*testing.T
	*store
	clock    time.Time
	nodes    []*keeping
	machines []*machine
	off      map[int]bool
}

func newFleet(t *testing.T, n int, words ...string) *fleet {
	t.Helper()
	f := &fleet{T: t, store: &store{choice: Choice{Words: words}}, clock: time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC), off: map[int]bool{}}
	for i := range n {
		m := &machine{}
		f.machines = append(f.machines, m)
		f.nodes = append(f.nodes, f.process(i, t.TempDir()))
	}
	return f
}

func (f *fleet) process(i int, folder string) *keeping {
	f.Helper()
	name := fmt.Sprintf("n%d", i)
	k, err := newKeeping(Config{Name: name, Node: f.machines[i], Cluster: &seen{store: f.store, node: name}, Every: every, Folder: folder,
		Retry: "kubectl annotate", Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		f.Fatal(err)
	}
	k.now = func() time.Time { return f.clock }
	return k
}

// rounds lets each node do so many, a minute apart.
func (f *fleet) rounds(n int) {
	f.Helper()
	for range n {
		for i, k := range f.nodes {
			if f.off[i] {
				continue
			}
			if err := k.round(f.Context()); err != nil && f.machines[i].err == nil && f.machines[i].stuck == nil {
				f.Fatal(err)
			}
		}
		f.clock = f.clock.Add(every)
	}
}

// have are the nodes that have something.
func (f *fleet) have() (n int) {
	for _, m := range f.machines {
		if len(m.has) > 0 {
			n++
		}
	}
	return n
}

func (f *fleet) wants(nodes int, phase Phase, event string) {
	f.Helper()
	if f.have() != nodes || f.trial.Phase != phase {
		f.Errorf("%d nodes have it, not %d; it is %s, not %s: %s", f.have(), nodes, f.trial.Phase, phase, f.trial.Reason)
	}
	if event != "" && !slices.ContainsFunc(f.events, func(e string) bool { return strings.Contains(e, event) }) {
		f.Errorf("no Event %q in %q", event, f.events)
	}
}

// One node tries it, then twice as many have it after each time, until all have.
func TestOneThenAnEighthThenAll(t *testing.T) {
	f := newFleet(t, 80, "accept-queue", "conntrack-idle")
	f.rounds(5)
	f.wants(1, Trying, "n0 TuneTried: accept-queue conntrack-idle is tried on this node for 5m0s, and then set on the others")
	f.rounds(2)
	last := f.have()
	f.wants(last, Spreading, "n0 TuneSpreads")
	if last < 4 || last > 20 {
		t.Errorf("at first %d of 80 have it", last)
	}
	for want := 20; want <= 80; want *= 2 {
		f.rounds(5)
		now := f.have()
		if now < last || now < want*6/10 || now > want*14/10 {
			t.Errorf("%d nodes have it after %d, about %d should", now, last, want)
		}
		last = now
	}
	f.wants(80, Spreading, "")
	f.rounds(2 * soakRounds)
	f.choice = Choice{Words: []string{"conntrack-idle"}} // and the next change begins anew
	f.rounds(2)
	f.wants(80, Trying, "TuneTried: conntrack-idle is tried")
	if n := slices.IndexFunc(f.machines, func(m *machine) bool { return len(m.has) == 1 }); n < 0 || f.nodes[n].Name != f.trial.Node {
		t.Errorf("node %d has the new choice, %s tries it", n, f.trial.Node)
	}
}

// What was well goes on, in pods that start as well, while another choice is tried.
func TestAnEarlierChoiceGoesOn(t *testing.T) {
	f := newFleet(t, 3, "jit")
	f.rounds(40)
	f.wants(3, Spreading, "")
	f.choice = Choice{Words: []string{"jit", "rps"}}
	f.rounds(2)
	for i, m := range f.machines {
		if want := map[bool]string{true: "jit rps", false: "jit"}[f.nodes[i].Name == f.trial.Node]; !m.asked.More || m.asked.Choice.String() != want {
			t.Errorf("n%d was asked for %+v, not %s", i, m.asked, want)
		}
	}
	f.down = errors.New("no API server answers")
	f.rounds(1)
	for i, m := range f.machines {
		if m.asked.More {
			t.Errorf("n%d was asked for more", i)
		}
	}
}

// A label says where it begins.
func TestALabelSaysWhereItBegins(t *testing.T) {
	f := newFleet(t, 5, "jit")
	f.label = "n3"
	f.rounds(3)
	f.wants(1, Trying, "n3 TuneTried")
	if f.trial.Node != "n3" || len(f.machines[3].has) != 1 {
		t.Errorf("%s tries it", f.trial.Node)
	}
}

// What is worse on the node that tries it, and was not before, stops it, and is put back
// there; what was wrong before, or is so for a moment, does not.
func TestABadNodeStopsIt(t *testing.T) {
	f := newFleet(t, 5, "jit")
	f.machines[0].found = []string{"HS-01"}
	f.rounds(1)
	f.machines[0].found = []string{"HS-01", "HS-14"}
	f.rounds(5)
	f.machines[0].found = []string{"HS-01"}
	f.rounds(1)
	f.wants(1, Trying, "n0 TuneTried")
	f.rounds(1)
	if f.trial.Phase != Spreading {
		t.Errorf("it is %s: %s", f.trial.Phase, f.trial.Reason)
	}

	f = newFleet(t, 5, "jit")
	f.rounds(1)
	f.machines[0].found = []string{"HS-14"}
	f.rounds(8)
	f.wants(0, Stopped, "n0 TuneStopped: jit is not set on further nodes: n0: HS-14 is found since: it is bad. What is set elsewhere stays. To try again: kubectl annotate")
	f.wants(0, Stopped, "n0 TunePutBack: put back, because HS-14 is found since: it is bad (and 1 more)")
	f.rounds(50)
	f.wants(0, Stopped, "")
	f.trial.Phase = "" // as the Event says
	f.machines[0].found = nil
	f.rounds(60)
	f.wants(5, Spreading, "")
}

// What could not be put back at once is put back later, also by a process that starts then.
func TestAPutBackIsTriedAgain(t *testing.T) {
	f := newFleet(t, 2, "jit")
	f.rounds(1)
	f.machines[0].found, f.machines[0].stuck = []string{"HS-14"}, layer.ErrInUse
	f.rounds(8)
	f.wants(1, Stopped, "n0 TuneRoundFailed: a round failed, and the next one tries again: "+layer.ErrInUse.Error())
	f.nodes[0] = f.process(0, f.nodes[0].Folder)
	f.rounds(2)
	f.wants(1, Stopped, "")
	f.machines[0].stuck = nil
	f.rounds(1)
	f.wants(0, Stopped, "n0 TunePutBack: put back, because HS-14 is found since: it is bad (and 1 more)")
}

// A choice that differs by its pods only is put back in these pods only, if it is bad there
// or if they are not to have it any more.
func TestPodsThatHadNothing(t *testing.T) {
	inNode, inPod := Spot{theNode, "jit", "jit"}, Spot{thePod, "jit", "jit"}
	f := newFleet(t, 1, "jit")
	has := func(want ...Spot) {
		t.Helper()
		if !slices.Equal(f.machines[0].has, want) {
			t.Errorf("it has %v, not %v", f.machines[0].has, want)
		}
	}
	f.rounds(10)
	has(inNode)
	f.choice.ExistingPods = true
	f.rounds(1)
	has(inNode, inPod)
	f.machines[0].found = []string{"HS-14"}
	f.rounds(8)
	f.wants(1, Stopped, "n0 TunePutBack")
	has(inNode)
	f.machines[0].found, f.trial.Phase = nil, ""
	f.rounds(10)
	f.wants(1, Spreading, "")
	has(inNode, inPod)
	f.choice.ExistingPods = false
	f.rounds(1)
	has(inNode)
}

// A trial on a node whose rounds fail comes to an end; one that failed for a moment goes on.
func TestATrialWhoseRoundsFail(t *testing.T) {
	f := newFleet(t, 1, "jit")
	f.rounds(1)
	f.machines[0].err = errors.New("the ledger is not to be read")
	f.rounds(4)
	f.machines[0].err = nil
	f.rounds(3)
	f.wants(1, Spreading, "n0 TuneRoundFailed: a round failed, and the next one tries again: the ledger is not to be read")
	f.choice.Words = []string{"rps"}
	f.machines[0].err = errors.New("the ledger is not to be read")
	f.rounds(9)
	f.wants(1, Stopped, "TuneStopped: rps is not set on further nodes: n0: its rounds fail: the ledger is not to be read")

	f = newFleet(t, 2, "jit")
	f.machines[0].err = errors.New("the ledger is not to be read")
	f.nodes[0], f.nodes[1] = f.nodes[1], f.nodes[0]
	f.machines[0], f.machines[1] = f.machines[1], f.machines[0]
	f.nodes[1].round(t.Context()) // begins
	f.rounds(9)
	f.wants(0, Stopped, "TuneStopped: jit is not set on further nodes: n0, which tried it, is silent")
}

// A node that is bad later stops it for those that have not begun, and for nobody else.
func TestABadNodeStopsItLater(t *testing.T) {
	f := newFleet(t, 80, "jit")
	f.rounds(7)
	had := f.have()
	f.wants(had, Spreading, "")
	bad := slices.IndexFunc(f.machines[1:], func(m *machine) bool { return len(m.has) > 0 }) + 1
	f.machines[bad].drift = []Drift{{Knob: "jit", Text: "it was 1 and is 0", Left: "it is a pest's"}}
	f.rounds(50)
	if f.have() >= 60 || f.have() < had-1 {
		t.Errorf("%d nodes have it, %d had it", f.have(), had)
	}
	f.wants(f.have(), Stopped, fmt.Sprintf("TuneStopped: jit is not set on further nodes: n%d: it was 1 and is 0: it is a pest's", bad))
	if len(f.machines[bad].has) > 0 {
		t.Error("it was not put back there")
	}
	for i, m := range f.machines {
		if len(m.has) > 0 && m.asked.More {
			t.Errorf("n%d may set more", i)
		}
	}
}

// What is fought over is neither good nor bad yet.
func TestAFightIsWaitedFor(t *testing.T) {
	f := newFleet(t, 2, "jit")
	f.machines[0].drift = []Drift{{Knob: "jit", Text: "it was 1 and is 0"}}
	f.rounds(10)
	f.wants(1, Trying, "TuneDrift: it was 1 and is 0: it is set again")
	f.machines[0].drift = nil
	f.rounds(2)
	f.wants(1, Spreading, "")
}

// A node that falls silent while it tries something is a bad sign.
func TestASilentNodeStopsIt(t *testing.T) {
	f := newFleet(t, 5, "jit")
	f.rounds(2)
	f.off[0] = true
	f.rounds(6)
	f.wants(1, Trying, "")
	f.rounds(3)
	f.wants(1, Stopped, "TuneStopped: jit is not set on further nodes: n0, which tried it, is silent")
}

// Without an API server nothing new is set, and what is set is kept, also by a process
// that starts then.
func TestWithoutTheAPIServer(t *testing.T) {
	f := newFleet(t, 3, "jit")
	f.rounds(2)
	f.down = errors.New("no API server answers")
	f.rounds(40)
	f.wants(1, Trying, "")
	f.nodes[0] = f.process(0, f.nodes[0].Folder)
	f.rounds(1)
	for i, m := range f.machines {
		if m.asked.More || i == 0 && m.asked.Choice.String() != "jit" {
			t.Errorf("n%d was asked for %+v", i, m.asked)
		}
	}
	f.down = nil
	if err := f.nodes[1].round(t.Context()); err != nil { // before the one that tries it
		t.Fatal(err)
	}
	f.wants(1, Trying, "")
	f.rounds(60)
	f.wants(3, Spreading, "TuneUnknown: it is not known what is chosen, and nothing new is set: no API server answers")
}

// Of nodes that begin at once one is first.
func TestOneIsFirst(t *testing.T) {
	f := newFleet(t, 2, "jit")
	first, second := f.nodes[0].Cluster.(*seen), f.nodes[1].Cluster.(*seen)
	for _, s := range []*seen{first, second} {
		s.Read(t.Context())
	}
	if err := first.Write(t.Context(), Trial{Choice: "a"}); err != nil {
		t.Fatal(err)
	}
	if err := second.Write(t.Context(), Trial{Choice: "b"}); !errors.Is(err, ErrTaken) {
		t.Errorf("both are first: %v", err)
	}
	f.nodes[1].Cluster = &late{second}
	d := f.nodes[1].decide(t.Context())
	if d.May || d.Why != ErrTaken.Error() {
		t.Errorf("it may, %+v", d)
	}
}

// late reads what is altered before it writes.
type late struct{ *seen }

func (l *late) Read(ctx context.Context) (t Trial, c Choice, first, labelled bool, err error) {
	defer func() { l.trial.Node = "another" }()
	return l.seen.Read(ctx)
}

// Pods that are there when a choice begins are left alone; those that come while the node
// waits for its turn are among them.
func TestPodsThatAreThere(t *testing.T) {
	f := newFleet(t, 1, "jit")
	f.rounds(2)
	if !slices.Equal(f.machines[0].asked.Existing, []uint64{7}) {
		t.Errorf("it was asked for %+v", f.machines[0].asked)
	}
}

// A node on its own sets it at once.
func TestANodeOnItsOwn(t *testing.T) {
	m := &machine{}
	k, err := newKeeping(Config{Name: "n", Node: m, Choice: Choice{Words: []string{"jit"}}, Every: every, Folder: t.TempDir(), Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err == nil {
		err = k.round(t.Context())
	}
	if err != nil || len(m.has) != 1 || !m.asked.More {
		t.Errorf("%v: %+v", err, m)
	}
}

// The same is told once, and counted every ten minutes; others a minute apart.
func TestEventsAreFew(t *testing.T) {
	now := time.Now()
	var said []Event
	tell := newTeller(func(_ context.Context, e Event) (string, error) { said = append(said, e); return "x", nil }, slog.New(slog.NewTextHandler(io.Discard, nil)), func() time.Time { return now })
	for range 60 {
		tell.tell(t.Context(), "TuneLeft", true, "one", "two", "three")
		now = now.Add(time.Minute)
	}
	if len(said) != 6 || said[0].Message != "one (and 2 more)" || said[5].Name != "x" || said[5].Count != 51 {
		t.Errorf("%d: %+v", len(said), said)
	}
	said = nil
	for i := range 60 {
		tell.tell(t.Context(), "TuneDrift", true, fmt.Sprint(strings.Repeat("x", 2000), i))
		tell.tell(t.Context(), "TuneDrift", true, fmt.Sprint("y", i))
		now = now.Add(10 * time.Second)
	}
	if len(said) != 10 || len(said[0].Message) != longest {
		t.Errorf("%d Events in ten minutes", len(said))
	}
}

// A process that has just started has not been idle since 1970.
func TestTheFirstRoundIsNotLate(t *testing.T) {
	families, err := newMetrics().registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == "millrace_tune_last_round_timestamp_seconds" {
			if at := time.Unix(int64(family.Metric[0].GetGauge().GetValue()), 0); time.Since(at) > time.Hour {
				t.Errorf("the last round was at %s", at)
			}
			return
		}
	}
	t.Error("it does not say when the last round was")
}

// What Prometheus reads.
func TestMetrics(t *testing.T) {
	f := newFleet(t, 1, "jit")
	f.machines[0].drift = []Drift{{Knob: "jit", Text: "a", Left: "b"}, {Knob: "accept-queue", Pod: true, Text: "c"}}
	f.rounds(1)
	server := httptest.NewServer(f.nodes[0].metrics.handler(f.nodes[0].hangs, f.nodes[0].done.Load))
	defer server.Close()
	get := func(path string) (int, string) {
		answer, err := http.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		text, _ := io.ReadAll(answer.Body)
		return answer.StatusCode, string(text)
	}
	_, text := get("/metrics")
	for _, want := range []string{
		`millrace_tune_drift{knob="jit",scope="node"} 1`, `millrace_tune_drift_total{knob="accept-queue",scope="pods"} 1`,
		`millrace_tune_settings{state="held"} 1`, `millrace_tune_rollout{state="set"} 1`, "millrace_tune_api_server_answers 1",
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if strings.Contains(text, `millrace_tune_drift{knob="accept-queue"`) {
		t.Error("what was set again counts as drift that is left")
	}
	for _, path := range []string{"/livez", "/readyz"} {
		if status, said := get(path); status != http.StatusOK {
			t.Errorf("%s: %d %s", path, status, said)
		}
	}
	f.clock = f.clock.Add(time.Hour)
	if status, _ := get("/livez"); status != http.StatusServiceUnavailable {
		t.Errorf("/livez of one that hangs: %d", status)
	}
}

// Two on one node are refused, and one that is told to stop does.
func TestRunIsAlone(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	folder := t.TempDir()
	config := Config{Name: "n", Node: &machine{}, Choice: Choice{Words: []string{"jit"}}, Every: time.Millisecond, Folder: folder, Log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	ended := make(chan error)
	go func() { ended <- Run(ctx, config) }()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(filepath.Join(folder, memoryName)); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not begin")
		}
	}
	if err := Run(t.Context(), config); !errors.Is(err, layer.ErrInUse) {
		t.Errorf("a second one: %v", err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
