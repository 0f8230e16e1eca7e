package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent/rollout"
	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/tune"
	"github.com/millrace/millrace/layer/tune/knob"
)

func tuneKeepCommand(s *settings) *cobra.Command {
	t := tuning{settings: s, keeps: true}
	var from wishes
	var metrics string
	c := command(&cobra.Command{
		Use:   "keep ID...|--profile NAME|configmap:NAMESPACE/NAME",
		Short: "Keep settings as they are chosen, on one node or through a cluster",
		Long: `
Runs until it is stopped: looks, sets what plan says, and sets it again when somebody
has set it otherwise, three times in ten minutes; then it is left to them, and told.
Pods that start from then on have it too. What is set stays when this ends.
With a ConfigMap and --source kube: the nodes agree (deploy/tune.yaml, docs/tune.md):
one tries what is chosen, then the others have it by and by; a node on which the
doctor finds more than before stops it. Without an answer of the API server nothing
new is set. Drift is told in the log, as metrics, and as Events of the Node.`,
		Args: cobra.ArbitraryArgs,
	}, tunesHost, func(ctx context.Context, words []string) error {
		if t.profile != "" {
			words = append(words, t.profile)
		}
		if len(words) == 0 {
			return usage("say which: IDs of knobs, --profile, or configmap:NAMESPACE/NAME")
		}
		return t.keep(ctx, words, &from, metrics)
	}, exitIncomplete, exitPrivilege)
	t.flagFolder(c)
	c.Flags().StringVar(&t.profile, "profile", "", "latency, throughput or many-connections: the knobs of it")
	c.Flags().BoolVar(&t.pods, "existing-pods", false, "pods that run already, too: what they are used to changes under them")
	flagFor(c, &t.window, time.Minute, "how long a round takes, and what is counted is counted; after five it is known whether all is well")
	from.flagsAs(c, "the API server that has the ConfigMap: kube:PATH, the one that a kubeconfig names; kube: the one of the pod this runs in")
	t.at.flagNode(c)
	c.Flags().StringVar(&metrics, "metrics", "127.0.0.1:9471", "address for Prometheus, /livez and /readyz; empty for none")
	c.Flags().BoolVar(&t.dry, "dry-run", false, "print what would be set on this node, set nothing and end")
	return c
}

// newPods is how often it is looked for pods that have just started.
const newPods = 5 * time.Second

func (t *tuning) keep(ctx context.Context, words []string, from *wishes, metrics string) error {
	if t.window < time.Second || t.window > time.Hour {
		return usage("--for %s: use 1s to 1h", t.window)
	}
	n := &keptNode{tuning: t, keeper: tune.NewKeeper(t.ledger())}
	config := rollout.Config{
		Name: t.at.node, Node: n, Choice: rollout.Choice{Words: words, ExistingPods: t.pods}, Every: t.window,
		Folder: filepath.Join(t.at.run, "keep"), Metrics: metrics, Log: logger(t.settings),
	}
	if object, named := strings.CutPrefix(words[0], "configmap:"); named {
		shared, err := newShared(object, from, t.at.node)
		if err != nil {
			return err
		}
		if len(words) > 1 || t.pods {
			return usage("%s says what is chosen: no IDs, --profile or --existing-pods beside it", words[0])
		}
		config.Cluster, config.Retry = shared, shared.retry()
		if t.dry {
			var trial rollout.Trial
			if trial, config.Choice, _, _, err = shared.Read(ctx); err != nil {
				return err
			}
			fmt.Fprintf(os.Stderr, "chosen: %s; last tried: %s, %s on %s\n", config.Choice, orDash(trial.Choice), orDash(string(trial.Phase)), orDash(trial.Node))
		}
	} else if from.source != "" || len(from.servers) > 0 {
		return usage("--source goes with configmap:NAMESPACE/NAME: nodes of a cluster that agree on a choice have it from there")
	}
	if _, err := n.knobs(config.Choice); err != nil && config.Cluster == nil {
		return err
	}
	if t.dry {
		return n.dryRun(ctx, config.Choice)
	}
	debug.SetGCPercent(50) // a round makes much that is thrown away at once
	return rollout.Run(ctx, config)
}

// dryRun prints what a node that may set it would set.
func (n *keptNode) dryRun(ctx context.Context, c rollout.Choice) error {
	knobs, err := n.knobs(c)
	if err != nil || len(knobs) == 0 {
		return err
	}
	n.pods = c.ExistingPods
	var ids []string
	for _, k := range knobs {
		ids = append(ids, k.ID)
	}
	n.profile, n.window = "", min(n.window, 2*time.Second)
	_, proposals, err := n.plan(ctx, ids)
	if err != nil {
		return err
	}
	return n.print(proposals)
}

// keptNode is this node for a rollout.
type keptNode struct {
	*tuning
	keeper *tune.Keeper
	mu     sync.Mutex // of the keeper: pods that start are seen to while a round looks
	// known are the pods that rounds look at; others have started since, and are seen to at
	// once.
	known map[uint64]bool
}

// knobs are those that words name, each a profile or something of a knob.
func (n *keptNode) knobs(c rollout.Choice) (knobs []*knob.Knob, err error) {
	for _, word := range c.Words {
		named := []*knob.Knob{}
		if p, err := knob.ParseProfile(word); err == nil {
			named = p.Of()
		} else if k, err := knob.Find(word); err == nil {
			named = append(named, k)
		} else {
			return nil, usage("%v", err)
		}
		for _, k := range named {
			if k.Scope == knob.Proxy {
				return nil, usage("%s is in kube-proxy's configuration, which is one for all nodes and stays: millrace tune apply %s --source kube:KUBECONFIG", word, k.ID)
			}
			if !slices.Contains(knobs, k) {
				knobs = append(knobs, k)
			}
		}
	}
	return knobs, nil
}

// places are the namespaces with names of their own: two pods may be called the same.
func (n *keptNode) places() ([]tune.Place, error) {
	all, err := places()
	for i, p := range all {
		if slices.ContainsFunc(all[:i], func(other tune.Place) bool { return other.Name == p.Name }) {
			all[i].Name = fmt.Sprintf("%s (network namespace %d)", p.Name, p.Cookie)
		}
	}
	return all, err
}

// Pods implements rollout.Node.
func (n *keptNode) Pods() (cookies []uint64, err error) {
	all, err := n.places()
	for _, p := range all {
		if p.Pod {
			cookies = append(cookies, p.Cookie)
		}
	}
	return cookies, err
}

// Keep implements rollout.Node.
func (n *keptNode) Keep(ctx context.Context, a rollout.Asked) (*rollout.Outcome, error) {
	o := &rollout.Outcome{}
	knobs, err := n.knobs(a.Choice)
	if err != nil {
		return nil, err
	}
	if a.More {
		if o.Set, err = n.letGoOthers(knobs); err != nil {
			return nil, err
		}
	}
	all, err := n.places()
	if err != nil {
		return nil, err
	}
	if len(knobs) == 0 {
		return o, n.rest(ctx)
	}
	known := all
	if a.More {
		if known, err = n.knownOf(a, all); err != nil {
			return nil, err
		}
	}
	var fresh rollout.Outcome
	looked := make(chan struct{})
	seen := make(chan struct{})
	go func() {
		defer close(seen)
		if a.More {
			n.seeToNewPods(ctx, a, knobs, looked, &fresh)
		}
	}()
	err = n.keepIn(ctx, a, knobs, known, n.window, o)
	close(looked)
	<-seen
	o.Held += fresh.Held
	o.Set, o.Refused, o.Failed, o.Drift = append(o.Set, fresh.Set...), append(o.Refused, fresh.Refused...), append(o.Failed, fresh.Failed...), append(o.Drift, fresh.Drift...)
	return o, err
}

func (n *keptNode) rest(ctx context.Context) error {
	select {
	case <-time.After(n.window):
	case <-ctx.Done():
	}
	return nil
}

// letGoOthers puts back what is kept of knobs that are not chosen any more.
func (n *keptNode) letGoOthers(knobs []*knob.Knob) ([]string, error) {
	held, err := n.Holds()
	if err != nil {
		return nil, err
	}
	held = slices.DeleteFunc(held, func(s rollout.Spot) bool {
		return slices.ContainsFunc(knobs, func(k *knob.Knob) bool { return k.ID == s.Knob })
	})
	if len(held) == 0 {
		return nil, nil
	}
	return n.LetGo(held)
}

// knownOf are the places that a round looks at: the node, pods that were there when the
// choice began, and those that were seen to. What runs of the others is new.
func (n *keptNode) knownOf(a rollout.Asked, all []tune.Place) (known []tune.Place, err error) {
	held, err := n.Holds()
	if err != nil {
		return nil, err
	}
	before := n.known
	n.known = map[uint64]bool{}
	for _, p := range all {
		if !p.Pod || before[p.Cookie] || slices.Contains(a.Existing, p.Cookie) || slices.ContainsFunc(held, func(s rollout.Spot) bool { return s.Cookie == p.Cookie }) {
			n.known[p.Cookie] = true
			known = append(known, p)
		}
	}
	return known, nil
}

// seeToNewPods sets in pods that start what is chosen, until looked is closed. What fails
// is tried again, and told if it still fails then.
func (n *keptNode) seeToNewPods(ctx context.Context, a rollout.Asked, knobs []*knob.Knob, looked <-chan struct{}, o *rollout.Outcome) {
	again := time.NewTicker(min(newPods, n.window/2))
	defer again.Stop()
	for {
		failed := n.seeToThoseNow(ctx, a, knobs, o)
		select {
		case <-looked:
			o.Failed = append(o.Failed, failed...)
			return
		case <-ctx.Done():
			return
		case <-again.C:
		}
	}
}

// seeToThoseNow sees to the pods that are not known yet, and says what failed.
func (n *keptNode) seeToThoseNow(ctx context.Context, a rollout.Asked, knobs []*knob.Knob, o *rollout.Outcome) (failed []string) {
	all, err := n.places()
	if err != nil {
		return []string{err.Error()}
	}
	started := slices.DeleteFunc(all, func(p tune.Place) bool { return !p.Pod || n.known[p.Cookie] })
	if len(started) == 0 {
		return nil
	}
	var one rollout.Outcome
	if err := n.keepIn(ctx, a, knobs, started, 0, &one); err != nil {
		return []string{err.Error()}
	}
	o.Held, o.Set = o.Held+one.Held, append(o.Set, one.Set...)
	if len(one.Failed) > 0 {
		return one.Failed
	}
	for _, p := range started {
		n.known[p.Cookie] = true
	}
	return nil
}

// keepIn looks at those of the places that may be set, and keeps them.
func (n *keptNode) keepIn(ctx context.Context, a rollout.Asked, knobs []*knob.Knob, all []tune.Place, window time.Duration, o *rollout.Outcome) error {
	held, err := n.ledger().Load()
	if err != nil {
		return err
	}
	holds := func(p tune.Place, setting string) bool {
		return slices.ContainsFunc(held, func(h tune.Held) bool {
			return h.Kept && h.Cookie == p.Cookie && (setting == "" || h.Setting == setting)
		})
	}
	free := func(p tune.Place) bool {
		return p.Node || p.Pod && a.More && (a.Choice.ExistingPods || !slices.Contains(a.Existing, p.Cookie))
	}
	chosen := slices.DeleteFunc(slices.Clone(all), func(p tune.Place) bool { return !free(p) && !holds(p, "") })
	ask := knob.Ask{Knobs: knobs}
	proposals, err := n.planIn(ctx, ask, chosen, window)
	if errors.Is(err, fs.ErrNotExist) { // a pod ended when it was looked at
		chosen = slices.DeleteFunc(chosen, func(p tune.Place) bool {
			cookie, err := netns.Cookie(p.Path)
			return err != nil || cookie != p.Cookie
		})
		proposals, err = n.planIn(ctx, ask, chosen, window)
	}
	if err != nil {
		return err
	}
	proposals = slices.DeleteFunc(proposals, func(p knob.Proposal) bool {
		at := chosen[slices.IndexFunc(chosen, func(c tune.Place) bool { return c.Name == p.Space })]
		return !free(at) && !holds(at, p.Setting)
	})
	n.mu.Lock()
	defer n.mu.Unlock()
	kept, err := n.keeper.Keep(chosen, proposals, a.More)
	if err != nil {
		return err
	}
	tell(&kept, chosen, o)
	return nil
}

// tell what was kept, in sentences.
func tell(kept *tune.Kept, places []tune.Place, o *rollout.Outcome) {
	o.Held += kept.Held
	o.Set = append(o.Set, sentences(kept.Set)...)
	for _, p := range kept.Refused {
		why := "is set by " + p.Owner
		if p.Owner == "" {
			why = "cannot be set"
		}
		o.Refused = append(o.Refused, fmt.Sprintf("%s of %s %s: %s", p.Setting, p.Space, why, p.Reason))
	}
	for _, p := range kept.Waiting {
		o.Waiting = append(o.Waiting, fmt.Sprintf("%s of %s %s -> %s", p.Setting, p.Space, orDash(p.Current), p.Wanted))
	}
	for _, err := range kept.Failed {
		o.Failed = append(o.Failed, err.Error())
	}
	for _, d := range kept.Drift {
		who := ""
		if d.Who != "" {
			who = " (" + d.Who + ")"
		}
		pod := slices.ContainsFunc(places, func(p tune.Place) bool { return p.Cookie == d.Cookie && p.Pod })
		o.Drift = append(o.Drift, rollout.Drift{Knob: d.ID, Pod: pod, Left: d.Left,
			Text: fmt.Sprintf("%s of %s was set to %s, and somebody%s has set it to %s since", d.Setting, d.Space, d.Wrote, who, orDash(d.Now))})
	}
}

func sentences(changes layer.Changes) (lines []string) {
	for _, change := range changes {
		lines = append(lines, change.String())
	}
	return lines
}

// mostFindings is the longest time for which it is counted before what was found and
// what is found are compared.
const mostFindings = 10 * time.Second

// notBySettings are checks of what no setting of the kernel brings about: errors on the
// wire, and what the hypervisor takes.
var notBySettings = []string{"HS-22", "HS-25"}

// Findings implements rollout.Node: what the doctor finds on this node, of severity
// warning or above.
func (n *keptNode) Findings(ctx context.Context) (map[string]string, error) {
	checks := slices.DeleteFunc(doctor.Checks(), func(c doctor.Check) bool {
		return c.Scope == doctor.Whole || !c.Severity.AtLeast(doctor.Warning) || slices.Contains(notBySettings, c.ID)
	})
	facts, err := doctor.This().Read(ctx, checks, min(n.window, mostFindings), io.Discard)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for _, r := range doctor.Run(facts, checks) {
		if (r.Status == doctor.Warn || r.Status == doctor.Fail) && r.Severity.AtLeast(doctor.Warning) {
			at := max(0, slices.IndexFunc(r.Evidence, func(e doctor.Evidence) bool { return e.Severity != "" }))
			e := r.Evidence[at]
			found[r.ID] = fmt.Sprintf("%s (%s: %s: %s)", r.Title, e.Scope, e.Read, e.Value)
		}
	}
	return found, nil
}

// Holds implements rollout.Node.
func (n *keptNode) Holds() (spots []rollout.Spot, err error) {
	held, err := n.keeper.Holds()
	for _, h := range held {
		spots = append(spots, spotOf(&h))
	}
	return spots, err
}

func spotOf(h *tune.Held) rollout.Spot {
	return rollout.Spot{Cookie: h.Cookie, Setting: h.Setting, Knob: h.ID}
}

// LetGo implements rollout.Node.
func (n *keptNode) LetGo(spots []rollout.Spot) ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	done, err := n.keeper.LetGo(func(h *tune.Held) bool { return slices.Contains(spots, spotOf(h)) })
	return sentences(done), err
}
