package tune

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/tune/knob"
)

// Keeper sets what is planned, by a Ledger, and sets again what somebody else has set
// otherwise since; after three times in ten minutes it leaves that to them until the
// process starts again. It is called from one goroutine at a time, and costs what reading
// the held settings costs.
type Keeper struct {
	ledger *Ledger
	mended map[spot][]time.Time
	left   map[spot]string
}

// spot is a setting of a namespace.
type spot struct {
	cookie  uint64
	setting string
}

// NewKeeper keeps what it sets in a ledger. It touches nothing.
func NewKeeper(ledger *Ledger) *Keeper {
	return &Keeper{ledger: ledger, mended: map[spot][]time.Time{}, left: map[spot]string{}}
}

// Kept is what Keep came to.
type Kept struct {
	// Set is what was set, for the first time or again.
	Set layer.Changes
	// Drift is what somebody else had set otherwise.
	Drift []Drift
	// Held is how many settings are as a Keeper set them.
	Held int
	// Refused is what somebody else sets, or what cannot be said; Waiting is what would be
	// set, and may not be yet.
	Refused, Waiting []knob.Proposal
	// Failed is why settings could not be set; it is tried again the next time.
	Failed []error
}

// Drift is a setting that was kept, and was found otherwise.
type Drift struct {
	Held
	// Now is what it was found to be, Who by whom it may have been set; empty if nobody is
	// known.
	Now, Who string
	// Left says why it is not set again; empty if it is.
	Left string
}

// Keep sets what the proposals for the places come to; without more only what is held
// already, where it was set otherwise since. A place is set all or not at all, and does
// not stop the others. What is held of namespaces that have ended is forgotten.
func (k *Keeper) Keep(places []Place, proposals []knob.Proposal, more bool) (kept Kept, err error) {
	held, err := k.held()
	if err != nil {
		return kept, err
	}
	steps := map[uint64][]Step{}
	drifted := map[spot]bool{}
	for _, s := range held {
		at := slices.IndexFunc(places, func(p Place) bool { return p.Cookie == s.Cookie })
		if at < 0 {
			continue
		}
		asked := slices.IndexFunc(proposals, func(p knob.Proposal) bool { return p.Space == places[at].Name && p.Setting == s.Setting })
		if asked < 0 {
			continue // it is not chosen any more
		}
		p := &proposals[asked]
		switch {
		case s.Wrote == "":
			continue // an earlier process was killed: Apply finds out
		case s.Drift == "" || p.AtLeast && knob.Suits(s.Wrote, s.Now, true):
			kept.Held++
			continue
		}
		drifted[spot{s.Cookie, s.Setting}] = true
		d := k.judge(s, p, places[at].Node)
		kept.Drift = append(kept.Drift, d)
		if d.Left == "" {
			steps[s.Cookie] = append(steps[s.Cookie], Step{ID: s.ID, Place: places[at], Setting: s.Setting, From: s.Now, To: s.Wrote, AtLeast: p.AtLeast, Kept: true})
		}
	}
	for _, p := range proposals {
		at := slices.IndexFunc(places, func(s Place) bool { return s.Name == p.Space })
		if at < 0 || drifted[spot{places[at].Cookie, p.Setting}] {
			continue
		}
		switch {
		case p.Status == knob.Owned || p.Status == knob.Unknown:
			kept.Refused = append(kept.Refused, p)
		case p.Status == knob.Change && !more:
			kept.Waiting = append(kept.Waiting, p)
		case p.Status == knob.Change:
			steps[places[at].Cookie] = append(steps[places[at].Cookie], Step{ID: p.ID, Place: places[at], Setting: p.Setting, From: p.Current, To: p.Wanted, AtLeast: p.AtLeast, Kept: true})
		}
	}
	for _, p := range places {
		if todo := steps[p.Cookie]; len(todo) > 0 {
			k.set(p, todo, drifted, &kept)
		}
	}
	return kept, nil
}

// held is what a Keeper holds, without what has gone with its namespace.
func (k *Keeper) held() (held []State, err error) {
	all, err := k.ledger.Status()
	if err != nil {
		return nil, err
	}
	gone := map[spot]bool{}
	for _, s := range all {
		switch {
		case !s.Kept:
		case s.Gone:
			gone[spot{s.Cookie, s.Setting}] = true
		default:
			held = append(held, s)
		}
	}
	if len(gone) == 0 {
		return held, nil
	}
	for at := range gone {
		delete(k.mended, at)
		delete(k.left, at)
	}
	_, err = k.ledger.undo(func(h *Held) bool { return h.Kept && gone[spot{h.Cookie, h.Setting}] }, false)
	return held, err
}

// judge says whether a setting is to be set again, and who may have set it.
func (k *Keeper) judge(s State, p *knob.Proposal, node bool) Drift {
	at := spot{s.Cookie, s.Setting}
	d := Drift{Held: s.Held, Now: s.Now, Who: p.Owner}
	if d.Who == "" && node { // the files are the node's
		d.Who = setBy(s.Setting, s.Now)
	}
	times := k.mended[at]
	switch {
	case s.Unread:
		d.Left = s.Drift
	case p.Status == knob.Owned:
		d.Left = p.Reason
	case k.left[at] != "":
		d.Left = k.left[at]
	case len(times) >= timesMended && k.ledger.now().Sub(times[len(times)-timesMended]) <= mendedWithin:
		k.left[at] = fmt.Sprintf("it was set %d times within %s, and each time somebody set it otherwise again: now it is left to them", timesMended, mendedWithin)
		d.Left = k.left[at]
	}
	return d
}

// set the steps of a place, unless its pod has ended while it was looked at: its path may
// be another's by now.
func (k *Keeper) set(p Place, steps []Step, drifted map[spot]bool, kept *Kept) {
	cookie, err := netns.Cookie(p.Path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && cookie != p.Cookie {
		return
	}
	done, err := k.ledger.Apply(steps)
	if errors.Is(err, layer.ErrInUse) {
		return // a person sets something at this moment: the next time
	}
	if err != nil {
		kept.Failed = append(kept.Failed, err)
		return
	}
	kept.Set = append(kept.Set, done...)
	kept.Held += len(done)
	for _, s := range steps {
		if at := (spot{p.Cookie, s.Setting}); drifted[at] {
			k.mended[at] = append(k.mended[at], k.ledger.now())
		}
	}
}

// Holds is what is kept, in the order in which it was set.
func (k *Keeper) Holds() ([]Held, error) {
	all, err := k.ledger.Load()
	return slices.DeleteFunc(all, func(h Held) bool { return !h.Kept }), err
}

// LetGo puts back which of what is kept, as Ledger.Undo does; what people have set stays.
func (k *Keeper) LetGo(which func(*Held) bool) (layer.Changes, error) {
	return k.ledger.undo(func(h *Held) bool { return h.Kept && which(h) }, false)
}
