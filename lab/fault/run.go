package fault

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// Said is what a tracer said of a run, and what others would have said of the same.
type Said struct {
	Named []Named
	// Others are causes, by who named them: "reason only".
	Others map[string][]string
	// Report is all of what was said, for who wants to show it.
	Report any
}

// Tracer watches namespaces for a time and names causes. It calls started when it
// watches.
type Tracer func(ctx context.Context, run string, namespaces []string, window time.Duration, started func()) (*Said, error)

// State is how a run ended.
type State string

// The states. A run is right if exactly what was induced was named, and where.
const (
	Right   State = "right"
	Wrong   State = "wrong"
	NotRun  State = "not run"      // a program is missing
	NotTook State = "did not take" // the application saw something else
	Broken  State = "broken"       // the run itself, or the tracer, could not be made
)

// Result is one run and how it ended.
type Result struct {
	Kind     Kind                `json:"kind"`
	Name     string              `json:"name"`
	Says     []string            `json:"says"`
	Expected []string            `json:"expected"`
	State    State               `json:"state"`
	Outcomes string              `json:"outcomes"`
	Named    []Named             `json:"named"`
	Missed   []string            `json:"missed"`
	False    []Named             `json:"false"`
	Others   map[string][]string `json:"others"`
	// Found says of each of Others whether they named all that was induced, or nothing
	// of a healthy run.
	Found map[string]bool `json:"found"`
	Error string          `json:"error,omitempty"`
	Seed  uint64          `json:"seed"`
	// Report is that of Said.
	Report any `json:"-"`
}

// Run induces the faults of a case while a tracer watches, and judges what it said.
func (c Case) Run(ctx context.Context, worker []string, shortest time.Duration, trace Tracer) *Result {
	r := &Result{Kind: c.Kind, Name: c.Name(), Seed: c.Seed, Found: map[string]bool{}}
	for _, f := range c.Faults {
		r.Says = append(r.Says, f.Says)
	}
	stage, err := c.Open(ctx, worker)
	if err != nil {
		r.State, r.Error = Broken, err.Error()
		if errors.Is(err, ErrNotRun) {
			r.State = NotRun
		}
		return r
	}
	said, err := stage.watched(ctx, c.Window(shortest), trace)
	r.Expected, r.Outcomes = stage.expected(), stage.Outcomes()
	took := stage.Check()
	if closing := stage.Close(); closing != nil && err == nil {
		err = closing
	}
	switch {
	case err != nil:
		r.State, r.Error = Broken, err.Error()
		return r
	case took != nil:
		r.State, r.Error = NotTook, took.Error()
	}
	r.Named, r.Others, r.Report = said.Named, said.Others, said.Report
	r.Missed, r.False = stage.Judge(said.Named)
	for who, causes := range said.Others {
		r.Found[who] = stage.named(causes)
	}
	if r.State == "" {
		r.State = Right
		if len(r.Missed)+len(r.False) > 0 {
			r.State = Wrong
		}
	}
	return r
}

// watched sends what meets the faults for as long as the tracer watches.
func (s *Stage) watched(ctx context.Context, window time.Duration, trace Tracer) (*Said, error) {
	ctx, stop := context.WithCancel(ctx)
	var sending sync.WaitGroup
	defer sending.Wait()
	defer stop()
	once := sync.OnceFunc(func() { sending.Go(func() { s.Send(ctx) }) })
	if s.early {
		once()
		rest(ctx, time.Second)
	}
	said, err := trace(ctx, s.Name(), s.Namespaces(), window, once)
	if err != nil {
		return nil, fmt.Errorf("trace %s: %w", s.Name(), err)
	}
	return said, nil
}

// expected says for each fault what must be named.
func (s *Stage) expected() (texts []string) {
	for _, p := range s.parts {
		if !p.fault.Control() {
			texts = append(texts, strings.Join(p.fault.Causes, "|")+" at "+strings.Join(p.blamed, "|"))
		}
	}
	return texts
}

// named says whether every fault is among the causes, wherever they are said to be and
// whatever else is named; of a healthy run that there are none.
func (s *Stage) named(causes []string) bool {
	faults := 0
	for _, p := range s.parts {
		if p.fault.Control() {
			continue
		}
		faults++
		if !slices.ContainsFunc(p.fault.Causes, func(c string) bool { return slices.Contains(causes, c) }) {
			return false
		}
	}
	return faults > 0 || len(causes) == 0
}

// RunAll runs cases, several at once, and gives each result as it comes.
func RunAll(ctx context.Context, cases []Case, atOnce int, worker []string, shortest time.Duration, trace Tracer, done func(*Result)) {
	slots := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	var mu sync.Mutex
	for _, c := range cases {
		if ctx.Err() != nil {
			break
		}
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			r := c.Run(ctx, worker, shortest, trace)
			mu.Lock()
			defer mu.Unlock()
			done(r)
		})
	}
	all.Wait()
}

// Total is how many runs of a kind there were, and how many of them were right.
type Total struct {
	Kind  Kind `json:"kind"`
	Runs  int  `json:"runs"`
	Right int  `json:"right"`
	// False is how many named what was not there, whether or not they named the rest.
	False int `json:"false_alarms"`
	// NotJudged are runs that were not made, or whose fault did not take.
	NotJudged int `json:"not_judged"`
	// Others is how many others found, by who.
	Others map[string]int `json:"others"`
}

// Totals counts results, each kind apart.
func Totals(results []*Result) (totals []Total) {
	for _, kind := range []Kind{Listed, Drawn, Healthy} {
		t := Total{Kind: kind, Others: map[string]int{}}
		for _, r := range results {
			switch {
			case r.Kind != kind:
			case r.State != Right && r.State != Wrong:
				t.NotJudged++
			default:
				t.count(r)
			}
		}
		if t.Runs+t.NotJudged > 0 {
			totals = append(totals, t)
		}
	}
	return totals
}

func (t *Total) count(r *Result) {
	t.Runs++
	if r.State == Right {
		t.Right++
	}
	if len(r.False) > 0 {
		t.False++
	}
	for who, found := range r.Found {
		t.Others[who] += 0
		if found {
			t.Others[who]++
		}
	}
}
