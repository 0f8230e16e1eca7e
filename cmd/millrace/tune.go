package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/tune"
	"github.com/millrace/millrace/layer/tune/knob"
)

// tunesHost is the effect of `tune apply`, and undoesTune of its undo.
const (
	tunesHost  = "Changes this host, with --source kube-proxy's ConfigMap; has --dry-run, prints the changes, and can be undone with `millrace tune undo`."
	undoesTune = "Changes what `millrace tune apply` has set; has --dry-run, prints the changes, and is undone by `millrace tune apply`."
)

// tuneFolder is where what was set is written down.
const tuneFolder = "/run/millrace/tune"

// sinceForm is a time of this machine's zone, with its distance from UTC.
const sinceForm = "2006-01-02 15:04:05 -0700"

// tuning is what the flags of `tune` ask for.
type tuning struct {
	settings *settings
	at       place
	profile  string
	spaces   []string
	pods     bool
	all, dry bool
	window   time.Duration
	// keeps says that what `tune keep` has set is set again.
	keeps bool
	// proving says that only what is measured to help is set; rounds is how often.
	proving bool
	rounds  int
	// from is the cluster whose kube-proxy is configured, none if it is empty; config is
	// that configuration, once it was read.
	from   wishes
	config *knob.ProxyConfig
}

func tuneCommand(s *settings) *cobra.Command {
	c := &cobra.Command{
		Use:   "tune",
		Short: "Settings of the kernel and of network cards, with evidence, proof and undo",
		Long: tunesHost + `

What can be tuned, how each value is computed, what justifies it and what is
useless: docs/tune.md.
  millrace tune plan                     what findings of the doctor justify here
  millrace tune plan --profile latency   what a profile comes to on this machine
  millrace tune apply accept-queue --netns web-7f --existing-pods
  millrace tune prove accept-queue       whether it does anything, measured
  millrace tune apply --profile ./article.conf --prove
  millrace tune status                   what is set, and whether it still is so
  millrace tune undo --all
  millrace tune keep conntrack-idle      runs, and sets it again
  millrace tune dns --source kube:       how many DNS servers the cluster wants`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usage("say what to do: plan, apply, undo, status, keep, prove or dns")
		},
	}
	c.AddCommand(tunePlanCommand(s), tuneApplyCommand(s), tuneUndoCommand(s), tuneStatusCommand(s), tuneKeepCommand(s), tuneProveCommand(s), tuneDNSCommand(s))
	return c
}

func (t *tuning) flagFolder(c *cobra.Command) {
	c.Flags().StringVar(&t.at.run, "run", tuneFolder, "folder for what was set and its values before")
	t.at.flagProcSys(c)
}

func (t *tuning) flagCluster(c *cobra.Command) {
	t.from.flagsAs(c, "the cluster whose kube-proxy's configuration is tuned as well, kube:PATH or kube: (for undo and status: as it was said to apply)")
}

// flagsOfChoice say what to look at.
func (t *tuning) flagsOfChoice(c *cobra.Command) {
	t.flagFolder(c)
	c.Flags().StringVar(&t.profile, "profile", "", "latency, throughput or many-connections: the knobs of it; or the path of a file in the form of sysctl.d(5), ./NAME: its values")
	c.Flags().StringSliceVar(&t.spaces, "netns", nil, "network namespaces: node, a pod's name, a name below /run/netns, a path, or a process's number (default: node)")
	c.Flags().BoolVar(&t.pods, "existing-pods", false, "pods that run already, too: what they are used to changes under them")
	flagFor(c, &t.window, 2*time.Second, "time between two readings of what is counted")
}

func tunePlanCommand(s *settings) *cobra.Command {
	t := tuning{settings: s}
	c := command(&cobra.Command{
		Use:   "plan [ID...]",
		Short: "What to tune on this node, with the evidence for it",
		Long: `
Reads settings and counters, computes values for this machine, and says for each
what it is, what it should be, who sets it otherwise, and what justifies it. Without
an ID or a profile: what a finding of the doctor justifies now; with --all
everything. ID is a knob's, a setting's or a check's (docs/tune.md).
  ~ would be set   = stays   ! is somebody else's   ? cannot be said
What a kube-proxy sets is its configuration's: with --source kube:KUBECONFIG plan
says what to change there, and apply changes it.
Needs root for namespaces of others and for what only root may see.`,
		Args: cobra.ArbitraryArgs,
	}, readsOnly, func(ctx context.Context, ids []string) error {
		_, proposals, err := t.plan(ctx, ids)
		if err != nil {
			return err
		}
		return t.print(proposals)
	}, exitIncomplete, exitPrivilege)
	t.flagsOfChoice(c)
	t.flagCluster(c)
	c.Flags().BoolVar(&t.all, "all", false, "each knob, also what nothing justifies")
	return c
}

func tuneApplyCommand(s *settings) *cobra.Command {
	t := tuning{settings: s}
	c := command(&cobra.Command{
		Use:   "apply ID...|--profile NAME",
		Short: "Set what plan says",
		Long: `
Writes down the values before, sets, reads back. With an error nothing stays set. A
finding that justified it is looked for again (exit status 2 if it is still seen).
What somebody else sets is refused: with an ID all of it, of a profile that part
(exit status 3). Settings last until the machine starts again. They are not set
back when this or any other process ends.
With --prove each change is measured first, as ` + "`millrace tune prove`" + ` does, and
the comparison printed: what helps beyond noise is set, what does not is kept as it
was, and what harms ends it with nothing set (exit status 2). What no load here can
show is left, too (exit status 3). Of a profile that is a file nothing is set without
it: somebody else has chosen those values, for another machine.
With --source kube:KUBECONFIG what a kube-proxy sets is changed in its ConfigMap, one
field of it, unless somebody keeps that (Argo CD, Flux, Helm ...). Each kube-proxy has
it when it starts again: how to do that is said, and not done.
  millrace tune apply datagram-buffer --prove
  millrace tune apply conntrack --source kube:$HOME/.kube/config
  millrace tune apply --profile ./article.conf --prove`,
		Args: cobra.ArbitraryArgs,
	}, tunesHost, func(ctx context.Context, ids []string) error {
		if len(ids) == 0 && t.profile == "" {
			return usage("say which: IDs of knobs, or --profile")
		}
		if isFile(t.profile) && !t.proving {
			return usage("--profile %s: its values were chosen for another machine: say --prove, and those that help here are set", t.profile)
		}
		return t.apply(ctx, ids)
	}, exitFindings, exitIncomplete, exitPrivilege)
	t.flagsOfChoice(c)
	t.flagCluster(c)
	c.Flags().BoolVar(&t.dry, "dry-run", false, "print what would be set and set nothing")
	c.Flags().BoolVar(&t.proving, "prove", false, "measure each change before, and set only what helps beyond noise")
	t.flagRounds(c)
	return c
}

func tuneUndoCommand(s *settings) *cobra.Command {
	t := tuning{settings: s}
	c := command(&cobra.Command{
		Use:   "undo ID...|--all",
		Short: "Put back what was set",
		Long: `
Puts back each setting that still is as it was set; what somebody else has set
since stays, and is named. After a process that was killed, too. Fields of kube-proxy's
ConfigMap are put back in the cluster in which they were set.`,
		Args: cobra.ArbitraryArgs,
	}, undoesTune, func(ctx context.Context, ids []string) error {
		if (len(ids) == 0) != t.all {
			return usage("say which: IDs of knobs, or --all")
		}
		return t.undo(ctx, ids)
	}, exitPrivilege)
	t.flagFolder(c)
	t.flagCluster(c)
	c.Flags().BoolVar(&t.all, "all", false, "everything that was set")
	c.Flags().BoolVar(&t.dry, "dry-run", false, "print what would be put back and change nothing")
	return c
}

func tuneStatusCommand(s *settings) *cobra.Command {
	t := tuning{settings: s}
	c := command(&cobra.Command{
		Use:   "status",
		Short: "What was set, and whether it still is so",
		Long: `
Says of each setting what it is now and was before, which knob set it and when, and
what somebody else has set since (exit status 2).`,
	}, readsOnly, func(ctx context.Context, _ []string) error { return t.status(ctx) }, exitFindings, exitPrivilege)
	t.flagFolder(c)
	t.flagCluster(c)
	return c
}

// apply sets what the plan says.
func (t *tuning) apply(ctx context.Context, ids []string) error {
	places, proposals, err := t.plan(ctx, ids)
	if err != nil {
		return err
	}
	_, refused := steps(places, proposals)
	if len(refused) > 0 && t.profile == "" {
		return &failure{exitIncomplete, fmt.Errorf("nothing was set: %s", strings.Join(refused, "\nmillrace: "))}
	}
	var all tuned
	if t.proving {
		if all.Proofs, err = t.try(ctx, proposals); err != nil {
			return err
		}
	}
	steps, refused := steps(places, proposals)
	all.Refused = refused
	var done layer.Changes
	if t.dry {
		for i := range steps {
			done = append(done, layer.Change{Op: layer.Alter, Subject: &steps[i]})
		}
	} else if done, err = t.applySteps(ctx, steps); err != nil {
		return err
	}
	all.Then = then(proposals)
	if !t.dry && len(steps) > 0 {
		if all.Still, err = t.lookAgain(ctx, proposals); err != nil {
			return err
		}
	}
	if err := t.say(done, all); err != nil {
		return err
	}
	if len(steps) == 0 && len(refused) == 0 && !t.settings.json() {
		return t.print(proposals) // why each stays
	}
	switch {
	case len(refused) > 0:
		return &failure{exitIncomplete, fmt.Errorf("left out: %s", strings.Join(refused, "\nmillrace: left out: "))}
	case len(all.Still) > 0:
		return &failure{exitFindings, fmt.Errorf("it is set, and what it is for is still seen: %s", strings.Join(all.Still, "\nmillrace: still seen: "))}
	}
	return nil
}

// steps are what proposals come to, and why some do not.
func steps(places []tune.Place, proposals []knob.Proposal) (steps []tune.Step, refused []string) {
	for _, p := range proposals {
		switch p.Status {
		case knob.Change:
			at := slices.IndexFunc(places, func(s tune.Place) bool { return s.Name == p.Space })
			steps = append(steps, tune.Step{ID: p.ID, Place: places[at], Setting: p.Setting, From: p.Current, To: p.Wanted, AtLeast: p.AtLeast})
		case knob.Owned:
			if p.Field != "" {
				continue // the field is a proposal, too
			}
			refused = append(refused, fmt.Sprintf("%s of %s is set by %s: %s", p.Setting, p.Space, p.Owner, p.Reason))
		case knob.Unknown:
			refused = append(refused, fmt.Sprintf("%s of %s: %s", p.Setting, p.Space, p.Reason))
		}
	}
	return steps, refused
}

// tuned is the JSON form of what apply and undo did.
type tuned struct {
	Changes []planned `json:"changes"`
	Refused []string  `json:"refused,omitempty"`
	// Still are findings that a setting is for, and that are seen after it was set.
	Still []string `json:"still,omitempty"`
	// Then are commands by which it comes into force.
	Then   []string `json:"then,omitempty"`
	DryRun bool     `json:"dry_run"`
	// Proofs are what was measured before, and what follows from it.
	Proofs []tried `json:"proofs,omitempty"`
}

func (t *tuning) say(done layer.Changes, all tuned) error {
	all.Changes, all.DryRun = []planned{}, t.dry
	for _, change := range done {
		all.Changes = append(all.Changes, planned{change.Op, "tune", change.Subject.Object(), change.Subject.Detail()})
	}
	if t.settings.json() {
		return printJSON(all)
	}
	printTried(all.Proofs)
	if len(done) == 0 {
		fmt.Fprintln(os.Stderr, "nothing to change")
	}
	err := done.Print(os.Stdout)
	if !t.dry {
		for _, command := range all.Then {
			fmt.Fprintln(os.Stderr, "each kube-proxy has it when it starts again:", command)
		}
	}
	return err
}

// then are the commands after which what was changed is in force.
func then(proposals []knob.Proposal) (all []string) {
	for _, p := range proposals {
		if p.Status == knob.Change && p.Then != "" && !slices.Contains(all, p.Then) {
			all = append(all, p.Then)
		}
	}
	return all
}

func (t *tuning) undo(ctx context.Context, ids []string) error {
	for i, id := range ids {
		if id == serversKnob {
			continue
		}
		k, err := findKnob(id)
		if err != nil {
			return err
		}
		ids[i] = k.ID
	}
	var all tuned
	there, err := t.objects(ctx).Undo(ids, t.dry)
	if slices.ContainsFunc(there, func(c layer.Change) bool { return tune.IsPutBack(c) && c.Subject.Object() != serversSetting }) {
		all.Then = []string{proxyRestart}
	}
	done, errHere := t.ledger().Undo(ids, t.dry)
	err = errors.Join(err, errHere)
	if t.at.run == tuneFolder && !t.dry {
		err = errors.Join(err, removeEmpty(filepath.Dir(tuneFolder)), removeEmpty(filepath.Dir(objectsFolder)))
	}
	return errors.Join(err, t.say(append(there, done...), all))
}

func (t *tuning) status(ctx context.Context) error {
	states, err := t.ledger().Status()
	if err != nil {
		return err
	}
	there, err := t.objects(ctx).Status()
	if err != nil {
		return err
	}
	states = append(states, there...)
	drifted := 0
	for _, s := range states {
		if s.Drift != "" {
			drifted++
		}
	}
	if t.settings.json() {
		err = printJSON(map[string][]tune.State{"settings": append([]tune.State{}, states...)})
	} else if len(states) == 0 {
		fmt.Fprintln(os.Stderr, "nothing was set")
	} else {
		table := newTable(os.Stdout, "SETTING", "NAMESPACE", "NOW", "BEFORE", "KNOB", "SINCE", "DRIFT")
		for _, s := range states {
			table.row(s.Setting, s.Space, orDash(s.Now), orDash(s.Before), s.ID, s.Since.Local().Format(sinceForm), orDash(s.Drift))
		}
		err = table.print()
	}
	if err == nil && drifted > 0 {
		return &failure{exitFindings, fmt.Errorf("settings that are not as they were set: %d", drifted)}
	}
	return err
}
