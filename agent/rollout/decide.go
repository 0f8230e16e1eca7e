package rollout

import (
	"fmt"
	"hash/fnv"
	"math"
	"slices"
	"strings"
	"time"
)

// Choice is what is to be set.
type Choice struct {
	// Words are knobs and profiles (docs/tune.md).
	Words []string `json:"words"`
	// ExistingPods says that pods that run already have it, too.
	ExistingPods bool `json:"existing_pods,omitempty"`
}

// String names it, whatever the order of its words: "accept-queue conntrack-idle".
func (c Choice) String() string {
	words := slices.Sorted(slices.Values(c.Words))
	if c.ExistingPods {
		words = append(words, "(existing pods)")
	}
	if len(words) == 0 {
		return "nothing"
	}
	return strings.Join(words, " ")
}

// Phase says how far a trial is.
type Phase string

// The phases. The empty one is that nobody has tried anything.
const (
	// Trying: one node, or those of a label, have it and see whether all is well.
	Trying Phase = "trying"
	// Spreading: it was well there, and the others have it by and by, or all have it.
	Spreading Phase = "spreading"
	// Stopped: it was not well. Nobody sets anything new.
	Stopped Phase = "stopped"
)

// Trial is what all nodes know of the choice that is tried, or was last.
type Trial struct {
	Choice string
	Phase  Phase
	// Node is the one that tries it.
	Node string
	// Reason says why it was stopped.
	Reason string
	// Began is when it began, and tells it from others; Since is when its phase began, and
	// Renewed when Node last said that it is there.
	Began, Since, Renewed time.Time
}

// Verdict is what a node says of a trial after it has had what was chosen for a time.
type Verdict string

// The verdicts. The empty one is that it is too early.
const (
	Good Verdict = "good"
	Bad  Verdict = "bad"
)

// Standing is what a node knows of itself.
type Standing struct {
	Node string
	// Choice is what is chosen.
	Choice string
	// First says that it may begin a trial; Labelled, that it is one of those that a label
	// names for that.
	First, Labelled bool
	// Verdict is its own of this trial, and Why the reason.
	Verdict Verdict
	Why     string
	// Silent says that the trial's node has not renewed it for too long.
	Silent bool
	// Went says that its last round did what it should: a trial is renewed only then.
	// Failure is why it did not, if it is known.
	Went    bool
	Failure string
}

// Decision is what becomes of a trial.
type Decision struct {
	// Trial is it from now on. Where it differs from before, it counts once it is written.
	Trial Trial
	// May says that this node may set what is chosen, Why the reason if not.
	May bool
	Why string
}

// firstShare of the nodes have a choice as soon as it was well where it was tried.
const firstShare = 1.0 / 8

// Decide says what becomes of a trial in the eyes of one node. After soak a node knows
// whether all is well, and twice as many begin. It is pure.
func Decide(t Trial, s Standing, soak time.Duration, now time.Time) Decision {
	stop := func(reason string) Decision {
		t.Phase, t.Reason, t.Since = Stopped, reason, now
		return Decision{t, false, "stopped: " + reason}
	}
	if t.Choice != s.Choice || t.Phase == "" {
		if !s.First {
			return Decision{t, false, "no node of the label has begun with it"}
		}
		return Decision{Trial{Choice: s.Choice, Phase: Trying, Node: s.Node, Began: now, Since: now, Renewed: now}, true, ""}
	}
	spread := now.Sub(t.Since)
	switch {
	case t.Phase == Stopped:
		return Decision{t, false, "stopped: " + t.Reason}
	case s.Verdict == Bad && (t.Phase == Trying || spread < spreadsFor(soak)):
		return stop(s.Node + ": " + s.Why)
	case s.Verdict == Bad: // long after: it is this node's own trouble
		return Decision{t, false, s.Why}
	case t.Phase == Spreading:
		if share := shareAfter(spread, soak); !s.Labelled && t.Node != s.Node && place(s.Node, t.Choice) >= share {
			return Decision{t, false, fmt.Sprintf("%.0f %% of the nodes have their turn", 100*share)}
		}
		return Decision{t, true, ""}
	case t.Node == s.Node && s.Verdict == Good:
		t.Phase, t.Since, t.Renewed = Spreading, now, now
		return Decision{t, true, ""}
	case t.Node == s.Node && s.Silent && s.Failure != "":
		return stop(s.Node + ": its rounds fail: " + s.Failure)
	case t.Node == s.Node:
		if s.Went {
			t.Renewed = now
		}
		return Decision{t, true, ""}
	case s.Silent:
		return stop(t.Node + ", which tried it, is silent")
	case s.Labelled:
		return Decision{t, true, ""}
	}
	return Decision{t, false, t.Node + " tries it"}
}

// shareAfter is the share of the nodes whose turn it is: it doubles with each soak.
func shareAfter(spread, soak time.Duration) float64 {
	return min(1, firstShare*math.Exp2(math.Floor(float64(spread)/float64(soak))))
}

// spreadsFor is how long it takes until the last nodes know whether all is well.
func spreadsFor(soak time.Duration) time.Duration { return 5 * soak }

// place of a node among all, from 0 to 1: another one for each choice, so that it is not
// always the same nodes that are first.
func place(node, choice string) float64 {
	h := fnv.New64a()
	h.Write([]byte(node + "\x00" + choice))
	// The last bytes of FNV barely reach the upper bits: mix them (the finalizer of
	// MurmurHash3, https://github.com/aappleby/smhasher).
	x := h.Sum64()
	x = (x ^ x>>33) * 0xff51afd7ed558ccd
	x = (x ^ x>>33) * 0xc4ceb9fe1a85ec53
	return float64((x^x>>33)>>11) / (1 << 53)
}
