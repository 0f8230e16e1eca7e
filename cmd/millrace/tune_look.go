package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer/tune"
	"github.com/millrace/millrace/layer/tune/knob"
)

func (t *tuning) ledger() *tune.Ledger { return tune.NewLedger(t.at.run, t.at.procSys, places) }

// places are the network namespaces of this node, its own first.
func places() (all []tune.Place, err error) {
	found, _, _, err := doctor.This().Places()
	if err != nil {
		return nil, err
	}
	for i, p := range found {
		cookie, err := netns.Cookie(p.Path)
		if errors.Is(err, os.ErrNotExist) {
			continue // it has ended
		}
		if err != nil {
			return nil, err
		}
		all = append(all, tune.Place{Name: p.Name, Path: p.Path, Cookie: cookie, Node: i == 0, Pod: p.Pod != ""})
	}
	return all, nil
}

// knobs are those that are asked for.
func (t *tuning) knobs(ids []string) (knobs []*knob.Knob, err error) {
	if t.profile != "" && !isFile(t.profile) {
		p, err := knob.ParseProfile(t.profile)
		if err != nil {
			return nil, usage("--profile: %v", err)
		}
		knobs = p.Of()
	}
	for _, id := range ids {
		k, err := findKnob(id)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(knobs, k) {
			knobs = append(knobs, k)
		}
	}
	return knobs, nil
}

// findKnob is the knob that a person names. Of a check that no knob answers it says whose
// its fix is.
func findKnob(id string) (*knob.Knob, error) {
	k, err := knob.Find(id)
	if err == nil {
		return k, nil
	}
	checks := doctor.Checks()
	if at := slices.IndexFunc(checks, func(c doctor.Check) bool { return strings.EqualFold(c.ID, id) }); at >= 0 {
		return nil, usage("%s is a check of the doctor that no setting of tune answers: what to do is said by `millrace doctor --explain %s`", checks[at].ID, checks[at].ID)
	}
	return nil, usage("%v", err)
}

// isFile says that a profile is the path of one.
func isFile(profile string) bool { return strings.Contains(profile, "/") }

// given are the values of a profile that is a file; of a setting the last one counts.
func (t *tuning) given() (all []knob.Given, err error) {
	if !isFile(t.profile) {
		return nil, nil
	}
	lines, err := sysctl.Assignments(t.profile)
	if err != nil {
		return nil, usage("--profile: %v", err)
	}
	if len(lines) == 0 {
		return nil, usage("--profile %s: it has no line such as net.core.somaxconn = 4096", t.profile)
	}
	for _, l := range lines {
		one := knob.Given{Setting: l.Pattern, Value: l.Value}
		if at := slices.IndexFunc(all, func(g knob.Given) bool { return g.Setting == one.Setting }); at >= 0 {
			all[at] = one
		} else {
			all = append(all, one)
		}
	}
	return all, nil
}

// choose are the namespaces that are asked for.
func (t *tuning) choose() (chosen []tune.Place, err error) {
	all, err := places()
	if err != nil {
		return nil, err
	}
	if len(t.spaces) == 0 {
		return slices.DeleteFunc(all, func(p tune.Place) bool { return !p.Node && !(p.Pod && t.pods) }), nil
	}
	for _, name := range t.spaces {
		p, err := placeOf(all, name)
		if err != nil {
			return nil, err
		}
		if p.Pod && !t.pods {
			return nil, usage("--netns %s: %s runs already, and what it is used to would change under it: say --existing-pods, or give new pods securityContext.sysctls", name, p.Name)
		}
		if !slices.Contains(chosen, p) {
			chosen = append(chosen, p)
		}
	}
	return chosen, nil
}

// placeOf is the namespace that a person means.
func placeOf(all []tune.Place, name string) (tune.Place, error) {
	at := slices.IndexFunc(all, func(p tune.Place) bool {
		return p.Name == name || p.Name == "pod "+name || p.Name == "namespace "+name
	})
	if at >= 0 {
		return all[at], nil
	}
	path := pathOfSpace(name)
	cookie, err := netns.Cookie(path)
	if err != nil {
		return tune.Place{}, usage("--netns %s: no pod and no namespace is called so: %v", name, err)
	}
	for _, p := range all {
		if p.Cookie == cookie {
			return p, nil
		}
	}
	return tune.Place{Name: "namespace " + filepath.Base(name), Path: path, Cookie: cookie}, nil
}

// plan reads what the knobs are computed from, and says what should become of them.
func (t *tuning) plan(ctx context.Context, ids []string) ([]tune.Place, []knob.Proposal, error) {
	knobs, err := t.knobs(ids)
	if err != nil {
		return nil, nil, err
	}
	given, err := t.given()
	if err != nil {
		return nil, nil, err
	}
	if t.window < 0 || t.window > 24*time.Hour {
		return nil, nil, usage("--for %s: use 0s to 24h", t.window)
	}
	chosen, err := t.choose()
	if err != nil {
		return nil, nil, err
	}
	objects, err := t.proxy(ctx, slices.DeleteFunc(checksOf(knobs), func(c doctor.Check) bool { return !c.NeedsCluster() }))
	if err != nil {
		return nil, nil, err
	}
	proposals, err := t.planIn(ctx, knob.Ask{Knobs: knobs, All: t.all, Given: given}, chosen, t.window)
	return append(chosen, objects...), proposals, err
}

// planIn is plan for what is asked, in namespaces, with a time between two readings.
func (t *tuning) planIn(ctx context.Context, ask knob.Ask, chosen []tune.Place, window time.Duration) ([]knob.Proposal, error) {
	var facts *knob.Facts
	var found *doctor.Facts
	checks := slices.DeleteFunc(checksOf(ask.Knobs), func(c doctor.Check) bool { return c.NeedsCluster() })
	var both errgroup.Group
	both.Go(func() (err error) { facts, err = tune.Look(ctx, t.at.procSys, chosen, window); return err })
	both.Go(func() (err error) { found, err = doctor.This().Read(ctx, checks, window, io.Discard); return err })
	if err := both.Wait(); err != nil {
		return nil, &failure{statusOf(&ran{err}), err}
	}
	facts.CPUs, facts.NodePorts, facts.Proxy = processors(), found.NodePorts(), t.config
	for _, r := range doctor.Run(found, checks) {
		note(facts, r)
	}
	if err := t.holdings(facts, chosen); err != nil {
		return nil, err
	}
	return knob.Plan(facts, ask), nil
}

// checksOf are the checks that the knobs answer; of all where none is asked for.
func checksOf(knobs []*knob.Knob) []doctor.Check {
	if len(knobs) == 0 {
		knobs = knob.Knobs
	}
	return slices.DeleteFunc(doctor.Checks(), func(c doctor.Check) bool {
		return !slices.ContainsFunc(knobs, func(k *knob.Knob) bool { return slices.Contains(k.Checks, c.ID) })
	})
}

// lookAgain says which of the findings that justified what was set are still seen.
func (t *tuning) lookAgain(ctx context.Context, proposals []knob.Proposal) (still []string, err error) {
	set := map[string]*knob.Knob{} // by the check that justified it
	for _, p := range proposals {
		if p.Status == knob.Change && p.Finding != "" && p.Scope != knob.Proxy { // a kube-proxy sets it when it starts
			if set[p.Finding], err = knob.Find(p.ID); err != nil {
				return nil, err
			}
		}
	}
	checks := slices.DeleteFunc(doctor.Checks(), func(c doctor.Check) bool { return set[c.ID] == nil })
	if len(checks) == 0 {
		return nil, nil
	}
	found, err := doctor.This().Read(ctx, checks, t.window, io.Discard)
	if err != nil {
		return nil, err
	}
	for _, r := range doctor.Run(found, checks) {
		for _, e := range r.Evidence {
			if e.Severity != "" && (set[r.ID].Scope == knob.Machine || isSet(proposals, r.ID, e.Scope)) {
				still = append(still, fmt.Sprintf("%s in %s: %s: %s (%s)", r.ID, e.Scope, e.Read, e.Value, set[r.ID].Pitfall))
			}
		}
	}
	return still, nil
}

// isSet says that a finding of a namespace justified a setting there.
func isSet(proposals []knob.Proposal, check, space string) bool {
	return slices.ContainsFunc(proposals, func(p knob.Proposal) bool {
		return p.Status == knob.Change && p.Finding == check && p.Space == space
	})
}

// note gives each namespace what a check saw there. Of those that are not asked for it
// counts for what is the whole machine's.
func note(facts *knob.Facts, r doctor.Result) {
	for _, e := range r.Evidence {
		if e.Severity == "" {
			continue
		}
		at := slices.IndexFunc(facts.Spaces, func(s *knob.Space) bool { return s.Name == e.Scope })
		if at < 0 {
			facts.Elsewhere = append(facts.Elsewhere, knob.Sight{Check: r.ID, Space: e.Scope, Value: e.Read + ": " + e.Value})
			continue
		}
		s := facts.Spaces[at]
		s.Found[r.ID] = append(s.Found[r.ID], e.Read+": "+e.Value)
	}
}

// holdings are what an agent and this tool have set.
func (t *tuning) holdings(facts *knob.Facts, chosen []tune.Place) error {
	held, err := t.ledger().Load()
	if err != nil {
		return err
	}
	for i, p := range chosen {
		for _, h := range held {
			if h.Cookie == p.Cookie && h.Wrote != "" {
				facts.Spaces[i].Held[h.Setting] = knob.Holding{Owner: h.ID, Wrote: h.Wrote, Ours: true, Again: h.Kept && t.keeps, Theirs: !h.Kept && t.keeps}
			}
		}
	}
	if len(facts.Spaces) == 0 || !facts.Spaces[0].Node {
		return nil
	}
	folder := filepath.Join(filepath.Dir(t.at.run), "agent", "tune") // beside ours, where an agent's is
	agents := tune.New(tune.Settings{Folder: folder, Tree: sysctl.Tree{Root: t.at.procSys}})
	picture, err := agents.Look()
	if err != nil {
		return nil // it is of another network namespace, or of another form: then it is not this node's
	}
	for _, value := range picture.(*tune.Picture).Values() {
		facts.Spaces[0].Held[value.Name] = knob.Holding{Owner: value.Owner, Wrote: value.Value}
	}
	return nil
}

// signs are before each line of a plan.
var signs = map[knob.Status]string{knob.Change: "~", knob.Enough: "=", knob.Owned: "!", knob.Unknown: "?"}

// print says what should become of each setting, and why.
func (t *tuning) print(proposals []knob.Proposal) error {
	if t.settings.json() {
		return printJSON(map[string][]knob.Proposal{"proposals": append([]knob.Proposal{}, proposals...)})
	}
	if len(proposals) == 0 {
		fmt.Fprintln(os.Stderr, "nothing to tune: the doctor finds nothing here that a setting of millrace would mend. --all lists every setting; an ID or --profile says what that one would be here, and why")
	}
	last := ""
	for _, p := range proposals {
		change := p.Current
		if p.Wanted != "" && p.Wanted != p.Current {
			change = orDash(p.Current) + " -> " + p.Wanted
		}
		fmt.Printf("%s %s %s (%s, %s)\n", signs[p.Status], p.Setting, orDash(change), p.Space, p.ID)
		if p.Owner != "" {
			fmt.Printf("    set by   %s\n", p.Owner)
		}
		if p.Reason != "" {
			fmt.Printf("    because  %s\n", p.Reason)
		}
		if p.Then != "" {
			fmt.Printf("    then     %s\n", p.Then)
		}
		if here := p.ID + p.Space; here != last {
			if p.Status == knob.Change && p.Reason == "" && len(p.Evidence) == 0 {
				fmt.Println("    because  you may choose it: no finding of the doctor asks for it now; docs/tune.md says what it is good for")
			}
			for _, e := range p.Evidence {
				fmt.Printf("    %s    %s\n", p.Finding, e)
			}
			last = here
		}
		t.printPods(p)
	}
	return nil
}

// printPods says how new pods come to a setting that is each namespace's own.
func (t *tuning) printPods(p knob.Proposal) {
	if p.Status != knob.Change || p.Space != "node" || p.ID == "node-ports" {
		return
	}
	switch k, err := knob.Find(p.ID); {
	case err != nil:
	case p.Scope == knob.Copied:
		fmt.Println("    pods     those that start from then on have it too; for others --existing-pods")
	case p.Scope == knob.Namespace && k.Safe:
		fmt.Printf("    pods     have their own: securityContext.sysctls [{name: %s, value: %q}], or --existing-pods\n", p.Setting, p.Wanted)
	case p.Scope == knob.Namespace:
		fmt.Printf("    pods     have their own: securityContext.sysctls [{name: %s, value: %q}], which the kubelet must allow (--allowed-unsafe-sysctls), or --existing-pods\n", p.Setting, p.Wanted)
	}
}
