package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/millrace/millrace/agent/rollout"
	"github.com/millrace/millrace/source/kube"
)

// What a ConfigMap of `tune keep` may have.
const (
	keepKey  = "keep"          // knobs and profiles
	podsKey  = "existing-pods" // "true": pods that run already, too
	firstKey = "first"         // a selector of labels: nodes where a change begins
)

// What the Lease of a trial has.
const (
	choiceNote = "millrace.io/choice"
	phaseNote  = "millrace.io/phase"
	reasonNote = "millrace.io/reason"
	beganNote  = "millrace.io/began"
	sinceNote  = "millrace.io/since"
)

// leaseTime is how a Lease writes a time (metav1.MicroTime).
const leaseTime = "2006-01-02T15:04:05.000000Z07:00"

// tuneComponent is who says Events.
const tuneComponent = "millrace-tune"

// shared is what nodes have in common: a ConfigMap that says what is chosen, and a Lease
// of the same name that says how far that is.
type shared struct {
	settings        kube.Settings
	namespace, name string
	read            *kube.Lease
}

func newShared(object string, from *wishes, node string) (*shared, error) {
	namespace, name, whole := strings.Cut(object, "/")
	kubeconfig, ofKube := strings.CutPrefix(from.source, "kube:")
	switch {
	case !whole || namespace == "" || name == "" || strings.Contains(name, "/"):
		return nil, usage("configmap:%s: write configmap:NAMESPACE/NAME, such as configmap:kube-system/millrace-tune", object)
	case !ofKube:
		return nil, usage("configmap:%s goes with --source kube:PATH or kube:", object)
	}
	return &shared{settings: kube.Settings{Kubeconfig: kubeconfig, Servers: from.servers, Node: node}, namespace: namespace, name: name}, nil
}

// retry is how a person begins again with what was stopped.
func (s *shared) retry() string {
	return fmt.Sprintf("kubectl -n %s annotate lease %s %s-", s.namespace, s.name, phaseNote)
}

// Read implements rollout.Cluster.
func (s *shared) Read(ctx context.Context) (t rollout.Trial, c rollout.Choice, first, labelled bool, err error) {
	if s.read, err = kube.ReadLease(ctx, s.settings, s.namespace, s.name); err != nil {
		return t, c, false, false, err
	}
	t = trialOf(s.read)
	data, err := kube.ConfigMapData(ctx, s.settings, s.namespace, s.name)
	if err != nil {
		return t, c, false, false, err
	}
	if c, err = choiceOf(data); err != nil {
		return t, c, false, false, fmt.Errorf("ConfigMap %s/%s: %w", s.namespace, s.name, err)
	}
	if data[firstKey] == "" {
		return t, c, true, false, nil
	}
	is, err := kube.Labelled(ctx, s.settings, data[firstKey])
	return t, c, is, is, err
}

// choiceOf reads what a ConfigMap chooses.
func choiceOf(data map[string]string) (c rollout.Choice, err error) {
	words, has := data[keepKey]
	if !has {
		return c, fmt.Errorf("it has no key %q, which names what is chosen; an empty one is nothing", keepKey)
	}
	c.Words = strings.Fields(strings.ReplaceAll(words, ",", " "))
	if _, err := (&keptNode{}).knobs(c); err != nil {
		return c, fmt.Errorf("%s: %w", keepKey, err)
	}
	if text := data[podsKey]; text != "" {
		if c.ExistingPods, err = strconv.ParseBool(text); err != nil {
			return c, fmt.Errorf("%s: %q is neither true nor false", podsKey, text)
		}
	}
	return c, nil
}

// trialOf is what a Lease says; what cannot be read is as if it were not there.
func trialOf(l *kube.Lease) rollout.Trial {
	at := func(form, text string) time.Time {
		when, err := time.Parse(form, text)
		if err != nil {
			return time.Time{}
		}
		return when.UTC()
	}
	return rollout.Trial{
		Choice: l.Annotations[choiceNote], Phase: rollout.Phase(l.Annotations[phaseNote]), Node: l.Holder, Reason: l.Annotations[reasonNote],
		Began: at(time.RFC3339Nano, l.Annotations[beganNote]), Since: at(time.RFC3339Nano, l.Annotations[sinceNote]), Renewed: at(leaseTime, l.Renewed),
	}
}

// Write implements rollout.Cluster.
func (s *shared) Write(ctx context.Context, t rollout.Trial) error {
	l := *s.read
	l.Annotations = map[string]string{
		choiceNote: t.Choice, phaseNote: string(t.Phase), reasonNote: t.Reason,
		beganNote: t.Began.UTC().Format(time.RFC3339Nano), sinceNote: t.Since.UTC().Format(time.RFC3339Nano),
	}
	l.Holder, l.Renewed = t.Node, t.Renewed.UTC().Format(leaseTime)
	err := l.Write(ctx, s.settings)
	if errors.Is(err, kube.ErrChanged) {
		return rollout.ErrTaken
	}
	return err
}

// Say implements rollout.Cluster.
func (s *shared) Say(ctx context.Context, e rollout.Event) (string, error) {
	return kube.Say(ctx, s.settings, kube.Event{
		Name: e.Name, Reason: e.Reason, Message: e.Message, Warning: e.Warning, Count: e.Count, First: e.First, Last: e.Last, Component: tuneComponent,
	})
}
