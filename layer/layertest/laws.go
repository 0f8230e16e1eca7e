package layertest

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Subject is a layer under the laws.
type Subject struct {
	// New makes the layer as a new process would, with the same settings.
	New func() layer.Layer
	// Snapshots are at least two clusters, each different from the next. Works
	// must hold for the first and the last of them without interruption.
	Snapshots []*model.Snapshot
	// Nothing is what is in force before anything is; nil where that is the plan of a
	// cluster in which there is nothing.
	Nothing func() layer.Picture
	// Observe prints everything in the kernel that the layer could have touched.
	Observe func() string
	// Stranger puts something of somebody else next to the layer's things, and
	// returns a function that says whether it is still there and unharmed.
	Stranger func() (unharmed func() error)
	// Works tries the layer once with traffic.
	Works func() error
	// Faulty makes the layer over tables of which every write of an object with
	// this name fails, and a function that mends them.
	Faulty func(object string) (broken layer.Layer, mend func())
}

// PureLaws tests the laws that need neither root nor a kernel.
func PureLaws(t *testing.T, s Subject) {
	t.Run("law 1: the order of the input does not change the plan", s.sameInputSamePlan)
	t.Run("law 6: a change that fails does not stop the others, and is tried again", s.failureIsAlone)
	// Law 7, the plan needs no root: these run as any user.
}

// Laws tests the laws that need a kernel; each inside a bed of its own.
func Laws(t *testing.T, prepare func(*testing.T) Subject) {
	laws := []struct {
		name string
		hold func(Subject, *testing.T)
	}{
		{"law 2: applying twice changes nothing the second time", Subject.againMeansNothing},
		{"law 3: remove leaves everything as it was found", Subject.offMeansGone},
		{"law 4: a new process takes over without a gap", Subject.newMeansAdopt},
		{"law 5: what is others' is not touched", Subject.strangersStay},
	}
	for _, law := range laws {
		t.Run(law.name, func(t *testing.T) { law.hold(prepare(t), t) })
	}
}

func (s Subject) sameInputSamePlan(t *testing.T) {
	for _, snapshot := range s.Snapshots {
		one, other := s.New(), s.New()
		want := one.Plan(snapshot)
		if want.Len() == 0 {
			t.Fatal("the snapshot plans nothing: it proves nothing")
		}
		for range 20 {
			if changes := one.Diff(want, other.Plan(shuffled(snapshot)), true); len(changes) > 0 {
				t.Fatalf("the same snapshot in another order plans otherwise:\n%v", changes)
			}
		}
	}
}

// shuffled is the same cluster in another order, in new values.
func shuffled(snapshot *model.Snapshot) *model.Snapshot {
	other := *snapshot
	other.Services = slices.Clone(snapshot.Services)
	for i, service := range other.Services {
		copied := *service
		copied.Ports = slices.Clone(service.Ports)
		for j := range copied.Ports {
			backends := slices.Clone(copied.Ports[j].Backends)
			rand.Shuffle(len(backends), func(a, b int) { backends[a], backends[b] = backends[b], backends[a] })
			copied.Ports[j].Backends = backends
		}
		rand.Shuffle(len(copied.Ports), func(a, b int) { copied.Ports[a], copied.Ports[b] = copied.Ports[b], copied.Ports[a] })
		other.Services[i] = &copied
	}
	rand.Shuffle(len(other.Services), func(a, b int) {
		other.Services[a], other.Services[b] = other.Services[b], other.Services[a]
	})
	return &other
}

func (s Subject) againMeansNothing(t *testing.T) {
	l := s.open(t)
	for _, snapshot := range s.Snapshots {
		want := l.Plan(snapshot)
		have := apply(t, l, want)
		if changes := l.Diff(have, want, true); len(changes) > 0 {
			t.Fatalf("applied once, and still to do:\n%v", changes)
		}
		if changes := l.Diff(read(t, l), want, true); len(changes) > 0 {
			t.Fatalf("the kernel holds something other than was applied:\n%v", changes)
		}
	}
}

func (s Subject) offMeansGone(t *testing.T) {
	before := s.Observe()
	l := s.open(t)
	apply(t, l, l.Plan(s.Snapshots[0]))
	if s.Observe() == before {
		t.Fatal("the layer is on and nothing can be observed: the test is blind")
	}
	if _, err := s.New().Remove(); !errors.Is(err, layer.ErrInUse) {
		t.Errorf("removing what a process has open: %v, not %v", err, layer.ErrInUse)
	}
	l.Close()
	removed, err := s.New().Remove()
	if err != nil {
		t.Fatal(err)
	}
	if len(removed) == 0 {
		t.Error("remove does not say what it removed")
	}
	if after := s.Observe(); after != before {
		t.Fatalf("before:\n%s\nafter:\n%s", before, after)
	}
	if again, err := s.New().Remove(); err != nil || len(again) > 0 {
		t.Fatalf("removing what is gone: %v, %v", again, err)
	}
}

func (s Subject) newMeansAdopt(t *testing.T) {
	l := s.open(t)
	want := l.Plan(s.Snapshots[0])
	apply(t, l, want)
	if err := s.Works(); err != nil {
		t.Fatalf("before any restart: %v", err)
	}
	var stop atomic.Bool
	var tries atomic.Int64
	failed := make(chan error, 1)
	go func() {
		defer close(failed)
		for !stop.Load() {
			tries.Add(1)
			if err := s.Works(); err != nil {
				failed <- err
				return
			}
		}
	}()
	for i := range 20 {
		l.Close()
		l = s.open(t)
		if changes := l.Diff(read(t, l), want, true); len(changes) > 0 {
			t.Errorf("the new process finds something else:\n%v", changes)
		}
		// every second one meets another cluster than the last one left
		want = l.Plan([]*model.Snapshot{s.Snapshots[0], s.Snapshots[len(s.Snapshots)-1]}[i%2])
		apply(t, l, want)
	}
	stop.Store(true)
	if err := <-failed; err != nil {
		t.Fatalf("traffic met a gap after %d tries: %v", tries.Load(), err)
	}
	t.Logf("%d tries during 20 take-overs, none failed", tries.Load())
}

func (s Subject) strangersStay(t *testing.T) {
	unharmed := s.Stranger()
	l := s.open(t)
	for _, snapshot := range s.Snapshots {
		apply(t, l, l.Plan(snapshot))
	}
	if err := unharmed(); err != nil {
		t.Fatalf("while the layer is on: %v", err)
	}
	l.Close()
	if _, err := s.New().Remove(); err != nil {
		t.Fatal(err)
	}
	if err := unharmed(); err != nil {
		t.Fatalf("after remove: %v", err)
	}
}

func (s Subject) failureIsAlone(t *testing.T) {
	want := s.New().Plan(s.Snapshots[0])
	nothing := s.New().Plan(&model.Snapshot{})
	if s.Nothing != nil {
		nothing = s.Nothing()
	}
	plan := s.New().Diff(nothing, want, true)
	if len(plan) < 2 {
		t.Fatal("needs a snapshot of at least two objects")
	}
	victim := plan[0].Subject.Object()
	l, mend := s.Faulty(victim)
	have, done, err := l.Apply(nothing, want, plan)
	if err == nil {
		t.Fatal("a write failed and no error was reported")
	}
	if len(done) != len(plan)-1 {
		t.Fatalf("one of %d changes failed, and %d are said to be done", len(plan), len(done))
	}
	left := l.Diff(have, want, true)
	if len(left) != 1 || left[0].Subject.Object() != victim {
		t.Fatalf("only %s may be left to do, but:\n%v", victim, left)
	}
	mend()
	if have, _, err = l.Apply(have, want, left); err != nil {
		t.Fatal(err)
	}
	if left := l.Diff(have, want, true); len(left) > 0 {
		t.Fatalf("after the second try:\n%v", left)
	}
}

func (s Subject) open(t *testing.T) layer.Layer {
	t.Helper()
	l := s.New()
	if err := l.Open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func read(t *testing.T, l layer.Layer) layer.Picture {
	t.Helper()
	have, err := l.Read()
	if err != nil {
		t.Fatal(err)
	}
	return have
}

func apply(t *testing.T, l layer.Layer, want layer.Picture) layer.Picture {
	t.Helper()
	have := read(t, l)
	have, _, err := l.Apply(have, want, l.Diff(have, want, true))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Settle(); err != nil {
		t.Fatal(err)
	}
	return have
}
