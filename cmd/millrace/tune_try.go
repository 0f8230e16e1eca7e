package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/layer/tune/knob"
)

// tried is what was measured of a change before it is made, and what follows.
type tried struct {
	*bench.Proof
	Outcome outcome `json:"outcome"`
}

// outcome is what follows from a proof.
type outcome string

const (
	// helps beyond noise, so that it is set, and with it what goes with it.
	helps outcome = "set"
	// stays as it was: no difference that counts.
	stays outcome = "kept as it was"
	// harms, so that nothing is set at all.
	harms outcome = "refused"
	// unseen: the load shows harm alone, and there was none.
	unseen outcome = "not proved"
)

// outcomeOf reads a proof. Connections over loopback show what a setting breaks; what it
// is for, a long path or many clients, they do not.
func outcomeOf(p *bench.Proof) outcome {
	switch {
	case p.Verdict == bench.Harmful:
		return harms
	case p.Verdict == bench.Keeps:
		return helps
	case p.Load == bench.Connections:
		return unseen
	}
	return stays
}

// bundle is what is set together or not at all: the settings of a knob in a namespace, or
// those that kube-proxy makes of a field of its configuration, with the field.
type bundle struct{ id, space string }

func bundleOf(p *knob.Proposal) bundle {
	if p.Field != "" || p.Scope == knob.Proxy {
		return bundle{p.ID, "kube-proxy"}
	}
	return bundle{p.ID, p.Space}
}

// toChange says that a setting is to become another, here or by kube-proxy.
func toChange(p *knob.Proposal) bool {
	return p.Status == knob.Change || p.Field != "" && p.Wanted != ""
}

// try measures what is to be changed, each comparison once, in namespaces of its own and
// never where it is to be set: there a wrong value would do its harm while it is measured,
// other people's traffic differs more than the setting does, and a limit shows only when
// it is reached. Of the proposals those stay changes that help; with one that harms, all
// of it is refused.
func (t *tuning) try(ctx context.Context, proposals []knob.Proposal) (all []tried, err error) {
	if t.rounds < 6 || t.rounds > 10000 {
		return nil, usage("--rounds %d: use 6 to 10,000: with fewer there is no interval of 95 %%", t.rounds)
	}
	known := map[comparison]*tried{}
	why := map[comparison]error{}
	for _, p := range proposals {
		one := comparison{p.Setting, p.Current, p.Wanted}
		if !toChange(&p) || loads[p.Setting] == "" || known[one] != nil || why[one] != nil {
			continue
		}
		proof, err := t.measure(ctx, one)
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil:
			why[one] = err
		default:
			known[one] = &tried{proof, outcomeOf(proof)}
			all = append(all, *known[one])
		}
	}
	var harmful []string
	for _, one := range all {
		if one.Outcome == harms {
			harmful = append(harmful, one.Proof.String())
		}
	}
	if len(harmful) > 0 {
		if err := t.sayTried(all); err != nil {
			return nil, err
		}
		return nil, &failure{exitFindings, fmt.Errorf("nothing was set: %s", strings.Join(harmful, "\nmillrace: "))}
	}
	decide(proposals, known, why)
	return all, nil
}

// decide lets those changes stand that are measured to help, and what goes with them.
func decide(proposals []knob.Proposal, known map[comparison]*tried, why map[comparison]error) {
	best := map[bundle]*tried{}
	failed := map[bundle]error{}
	for _, p := range proposals {
		b, one := bundleOf(&p), comparison{p.Setting, p.Current, p.Wanted}
		if !toChange(&p) {
			continue
		}
		if why[one] != nil {
			failed[b] = why[one]
		}
		if k := known[one]; k != nil && (best[b] == nil || k.Outcome == helps || k.Outcome == stays && best[b].Outcome == unseen) {
			best[b] = k
		}
	}
	for i := range proposals {
		p := &proposals[i]
		if p.Status != knob.Change {
			continue
		}
		b := bundleOf(p)
		switch k := best[b]; {
		case k != nil && k.Outcome == helps:
		case k != nil && k.Outcome == stays:
			p.Status, p.Reason = knob.Enough, "there is no difference beyond noise (more --rounds see smaller ones): kept as it was: "+k.Ratio.String()
		case k != nil:
			p.Status, p.Reason = knob.Unknown, fmt.Sprintf("it harms nothing (%s), and no load here shows what it is for: %s", k.Ratio, without(p))
		case failed[b] != nil:
			p.Status, p.Reason = knob.Unknown, fmt.Sprintf("it could not be measured: %v: %s", failed[b], without(p))
		default:
			p.Status, p.Reason = knob.Unknown, "no load here shows what it does: "+without(p)
		}
	}
}

// without says how to set what cannot be proved.
func without(p *knob.Proposal) string {
	return fmt.Sprintf("`millrace tune apply %s` without --prove sets what is computed for this machine", p.ID)
}

// sayTried prints what was measured.
func (t *tuning) sayTried(all []tried) error {
	if t.settings.json() {
		return printJSON(tuned{Changes: []planned{}, DryRun: t.dry, Proofs: all})
	}
	printTried(all)
	return nil
}

func printTried(all []tried) {
	for _, one := range all {
		printProof(one.Proof)
		fmt.Printf("    %s: %s\n", one.Outcome, one.Ratio)
	}
}
