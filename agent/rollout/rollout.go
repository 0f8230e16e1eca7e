package rollout

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/millrace/millrace/layer"
)

// Node is the node whose settings are kept.
type Node interface {
	// Pods are the network namespaces of the pods that run now, by their cookies.
	Pods() ([]uint64, error)
	// Keep does one round, which takes Every.
	Keep(ctx context.Context, a Asked) (*Outcome, error)
	// Findings are what is wrong on the node now: a sentence for each check.
	Findings(ctx context.Context) (map[string]string, error)
	// Holds is what is kept; LetGo puts some of it back, and says what it did, also beside
	// an error. What it could not put back is still held.
	Holds() ([]Spot, error)
	LetGo(spots []Spot) ([]string, error)
}

// Spot is a setting that is kept.
type Spot struct {
	// Cookie is of the network namespace it is in.
	Cookie  uint64 `json:"netns"`
	Setting string `json:"setting"`
	// Knob is the ID of the one that it is of.
	Knob string `json:"knob"`
}

// Asked is what a round is to do.
type Asked struct {
	Choice Choice
	// Existing are pods' network namespaces that are not to be set without consent.
	Existing []uint64
	// More says that something new may be set; else what is held is kept.
	More bool
}

// Outcome is what a round came to, in sentences.
type Outcome struct {
	Held                          int
	Set, Waiting, Refused, Failed []string
	Drift                         []Drift
}

// Drift is a setting that was found otherwise than it was set.
type Drift struct {
	// Knob is its ID, Pod says that it is of a pod's namespace.
	Knob string
	Pod  bool
	// Text says what it was and is; Left why it is left so, empty if it was set again.
	Text, Left string
}

// Cluster is what the nodes have in common.
type Cluster interface {
	// Read reads the trial, and then what is chosen, in this order: so nobody takes an old
	// choice for a newer one than is tried. First and labelled are Standing's.
	Read(ctx context.Context) (t Trial, c Choice, first, labelled bool, err error)
	// Write writes the trial, if it is still the one that was read; else the error is
	// ErrTaken.
	Write(ctx context.Context, t Trial) error
	// Say writes an Event, or counts one that was written, and returns its name.
	Say(ctx context.Context, e Event) (name string, err error)
}

// ErrTaken says that another node was faster.
var ErrTaken = errors.New("another node was faster")

// Config is what Run needs.
type Config struct {
	// Name is the node's in the cluster.
	Name string
	Node Node
	// Cluster is nil for a node on its own: then Choice is set at once.
	Cluster Cluster
	Choice  Choice
	// Every is how long a round takes. After five a node knows whether all is well.
	Every time.Duration
	// Retry is the command that makes the nodes try again what was stopped.
	Retry string
	// Folder is for what is remembered, and is this process's alone.
	Folder string
	// Metrics is the TCP address for Prometheus, empty for none.
	Metrics string
	Log     *slog.Logger
}

const (
	soakRounds = 5
	// grace is what a node may take longer for its rounds than they should, before it
	// counts as silent.
	grace = time.Minute
)

// keeping is a Run.
type keeping struct {
	Config
	memory  *memory
	teller  *teller
	metrics *metrics
	now     func() time.Time
	// wanted is what the cluster has chosen; empty while it has not answered.
	wanted string
	// renewed is what the trial's node said last, and heard when that was seen here, or
	// when it could not have been.
	renewed, heard time.Time
	// went says that the last round did what it should, and failure why it did not; both
	// are empty before the first.
	went    bool
	failure string
	ended   atomic.Int64 // the last round, in Unix nanoseconds
	done    atomic.Bool
}

// Run keeps what is chosen until ctx ends. What is set stays. It returns layer.ErrInUse
// while another process has the folder.
func Run(ctx context.Context, config Config) error {
	if err := os.MkdirAll(config.Folder, 0o700); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	lock, err := layer.Lock("folder", config.Folder)
	if err != nil {
		return err
	}
	defer lock.Close()
	k, err := newKeeping(config)
	if err != nil {
		return err
	}
	if config.Metrics != "" {
		listener, err := net.Listen("tcp", config.Metrics)
		if err != nil {
			return fmt.Errorf("serve metrics: %w", err)
		}
		server := k.metrics.serve(k.metrics.handler(k.hangs, k.done.Load))
		defer server.Close()
		go server.Serve(listener)
	}
	for ctx.Err() == nil {
		rest := time.NewTimer(config.Every)
		err := k.round(ctx)
		if ctx.Err() != nil {
			break
		}
		k.metrics.done(err)
		if err != nil {
			k.Log.Error("round", "error", err)
		}
		select {
		case <-rest.C: // a round takes that long unless it failed
		case <-ctx.Done():
		}
	}
	return nil
}

func newKeeping(config Config) (*keeping, error) {
	k := &keeping{Config: config, metrics: newMetrics(), now: time.Now}
	var say func(context.Context, Event) (string, error)
	if config.Cluster != nil {
		say = config.Cluster.Say
	}
	k.teller = newTeller(say, config.Log, func() time.Time { return k.now() })
	k.ended.Store(k.now().UnixNano())
	var err error
	k.memory, err = recall(config.Folder)
	return k, err
}

func (k *keeping) soak() time.Duration { return soakRounds * k.Every }

func (k *keeping) hangs() bool {
	return k.now().Sub(time.Unix(0, k.ended.Load())) > k.soak()+5*grace
}

// round looks, sets what may be set, and says what came of it.
func (k *keeping) round(ctx context.Context) error {
	defer func() { k.ended.Store(k.now().UnixNano()) }()
	err := k.tryRound(ctx)
	if ctx.Err() != nil {
		return err // it was told to stop
	}
	k.went, k.failure = err == nil, ""
	if err == nil {
		k.teller.over("TuneRoundFailed")
		return nil
	}
	k.failure = err.Error()
	k.teller.tell(ctx, "TuneRoundFailed", true, "a round failed, and the next one tries again: "+k.failure)
	return err
}

func (k *keeping) tryRound(ctx context.Context) error {
	d := k.decide(ctx)
	k.metrics.rollout(d)
	if d.May {
		if err := k.begin(ctx, d); err != nil {
			return err
		}
	}
	o, err := k.Node.Keep(ctx, Asked{k.memory.Choice, k.memory.Existing, d.May || k.hasEarlier()})
	if err != nil {
		return err
	}
	k.metrics.round(o)
	k.report(ctx, o, d)
	k.done.Store(true)
	return k.judge(ctx, o, d)
}

// decide asks the cluster what is chosen, and whether it may be set here. Without an
// answer what is remembered is kept.
func (k *keeping) decide(ctx context.Context) *Decision {
	k.wanted = ""
	if k.Cluster == nil {
		k.metrics.answers.Set(1) // nobody is asked
		k.choose(k.Choice)
		return &Decision{May: true}
	}
	d, err := k.consult(ctx)
	if errors.Is(err, ErrTaken) {
		return &Decision{Why: err.Error()}
	}
	k.metrics.answers.Set(1)
	if err != nil {
		k.metrics.answers.Set(0)
		k.teller.tell(ctx, "TuneUnknown", true, fmt.Sprintf("it is not known what is chosen, and nothing new is set: %v", err))
		return &Decision{Why: err.Error()}
	}
	k.teller.over("TuneUnknown")
	return d
}

func (k *keeping) consult(ctx context.Context) (*Decision, error) {
	t, c, first, labelled, err := k.Cluster.Read(ctx)
	if err != nil {
		k.heard = k.now() // who cannot hear does not know who is silent
		return nil, err
	}
	k.wanted = c.String()
	if !t.Renewed.Equal(k.renewed) {
		k.renewed, k.heard = t.Renewed, k.now()
	}
	s := Standing{Node: k.Name, Choice: c.String(), First: first, Labelled: labelled, Went: k.went, Failure: k.failure, Silent: k.now().Sub(k.heard) > k.soak()+grace}
	if k.memory.Choice.String() == s.Choice && k.memory.Began.Equal(t.Began) {
		s.Verdict, s.Why = k.memory.Verdict, k.memory.Why
	}
	d := Decide(t, s, k.soak(), k.now())
	if d.Trial != t {
		if err := k.Cluster.Write(ctx, d.Trial); err != nil {
			return nil, err
		}
		k.announce(ctx, t, d.Trial)
	}
	if d.May {
		k.choose(c)
	}
	return &d, nil
}

// hasEarlier says that an earlier choice was well here, which goes on, also in pods that
// start, until another may be set.
func (k *keeping) hasEarlier() bool {
	return k.wanted != "" && k.memory.Choice.String() != k.wanted && k.memory.Verdict == Good
}

// choose remembers what is chosen. What is kept of an earlier choice goes on until this
// one may be set.
func (k *keeping) choose(c Choice) {
	if k.memory.Choice.String() != c.String() {
		earlier := k.memory
		if earlier.Begun.IsZero() {
			earlier = earlier.earlier
		}
		k.memory = &memory{Boot: k.memory.Boot, Choice: c, earlier: earlier}
	}
}

// announce says what became of a trial, at the Node that did it.
func (k *keeping) announce(ctx context.Context, before, t Trial) {
	switch {
	case t.Phase == before.Phase && t.Choice == before.Choice:
	case t.Phase == Trying:
		k.teller.tell(ctx, "TuneTried", false, fmt.Sprintf("%s is tried on this node for %s, and then set on the others", t.Choice, k.soak()))
	case t.Phase == Spreading:
		k.teller.tell(ctx, "TuneSpreads", false, fmt.Sprintf("%s was well on this node: it is set on the others now, all have it in %s", t.Choice, 3*k.soak()))
	case t.Phase == Stopped:
		k.teller.tell(ctx, "TuneStopped", true, fmt.Sprintf("%s is not set on further nodes: %s. What is set elsewhere stays. To try again: %s", t.Choice, t.Reason, k.Retry))
	}
}

// begin remembers how things are before something new is set.
func (k *keeping) begin(ctx context.Context, d *Decision) error {
	m := k.memory
	if !m.Begun.IsZero() && m.Began.Equal(d.Trial.Began) {
		return nil
	}
	next := &memory{Boot: m.Boot, Choice: m.Choice, Existing: m.Existing, Held: m.Held, Began: d.Trial.Began, Begun: k.now()}
	var err error
	if m.Begun.IsZero() { // it is not the same again
		if err := k.withdraw(m); err != nil {
			return err
		}
		if next.Existing, err = k.Node.Pods(); err != nil {
			return err
		}
		if next.Held, err = k.Node.Holds(); err != nil {
			return err
		}
	}
	if k.Cluster == nil {
		next.Verdict = Good // nobody waits for it
	} else if next.Before, err = k.Node.Findings(ctx); err != nil {
		return err
	}
	if err := next.save(k.Folder); err != nil {
		return err
	}
	k.memory = next
	return nil
}

// withdraw puts back what pods that ran already have by a consent that a new choice does
// not give any more.
func (k *keeping) withdraw(m *memory) error {
	if m.earlier == nil || !m.earlier.Choice.ExistingPods || m.Choice.ExistingPods {
		return nil
	}
	now, err := k.Node.Holds()
	if err != nil {
		return err
	}
	given := slices.DeleteFunc(m.earlier.added(now), func(s Spot) bool { return !slices.Contains(m.earlier.Existing, s.Cookie) })
	if len(given) == 0 {
		return nil
	}
	lines, err := k.Node.LetGo(given)
	for _, line := range lines {
		k.Log.Info(line)
	}
	return err
}

// judge says after a time whether all is well here, and puts back what is new if not.
func (k *keeping) judge(ctx context.Context, o *Outcome, d *Decision) error {
	m := k.memory
	if m.Verdict == Bad {
		return k.putBack(ctx) // what could not be put back before
	}
	if !d.May || m.Verdict != "" || k.now().Sub(m.Begun) < k.soak() {
		return nil
	}
	if slices.ContainsFunc(o.Drift, func(d Drift) bool { return d.Left == "" }) {
		return nil // it is fought over: that has an end
	}
	worse, err := k.worse(ctx, o)
	if err != nil {
		return err
	}
	switch {
	case worse == "":
		m.Verdict = Good
	case !m.Suspect: // once may be chance
		m.Suspect = true
	default:
		m.Verdict, m.Why = Bad, worse
		return errors.Join(m.save(k.Folder), k.putBack(ctx))
	}
	return m.save(k.Folder)
}

// putBack what is new with a choice that was found bad here, if it still is held.
func (k *keeping) putBack(ctx context.Context) error {
	now, err := k.Node.Holds()
	if err != nil {
		return err
	}
	added := k.memory.added(now)
	if len(added) == 0 {
		return nil
	}
	lines, err := k.Node.LetGo(added)
	if len(lines) > 0 {
		k.teller.tell(ctx, "TunePutBack", true, append([]string{"put back, because " + k.memory.Why}, lines...)...)
	}
	return err
}

// worse is what is wrong here and was not before; empty if nothing is.
func (k *keeping) worse(ctx context.Context, o *Outcome) (string, error) {
	if len(o.Failed) > 0 {
		return o.Failed[0], nil
	}
	for _, drift := range o.Drift {
		if drift.Left != "" {
			return drift.Text + ": " + drift.Left, nil
		}
	}
	found, err := k.Node.Findings(ctx)
	if err != nil {
		return "", err
	}
	for _, id := range slices.Sorted(maps.Keys(found)) {
		if _, was := k.memory.Before[id]; !was {
			return id + " is found since: " + found[id], nil
		}
	}
	return "", nil
}

// report says what a round did.
func (k *keeping) report(ctx context.Context, o *Outcome, d *Decision) {
	var again, left []string
	for _, drift := range o.Drift {
		if drift.Left != "" {
			left = append(left, drift.Text+": "+drift.Left)
		} else {
			again = append(again, drift.Text+": it is set again")
		}
	}
	for _, line := range o.Set {
		k.Log.Info(line)
	}
	k.teller.tell(ctx, "TuneDrift", true, again...)
	for reason, lines := range map[string][]string{"TuneLeft": left, "TuneRefused": o.Refused, "TuneFailed": o.Failed} {
		if len(lines) == 0 {
			k.teller.over(reason)
		}
		k.teller.tell(ctx, reason, true, lines...)
	}
	if len(o.Waiting) > 0 {
		k.Log.Debug("waits", "settings", len(o.Waiting), "because", d.Why)
	}
}
