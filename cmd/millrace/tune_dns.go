package main

import (
	"context"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/tune"
	"github.com/millrace/millrace/source/kube"
)

// scalesServers is the effect of `tune dns apply`.
const scalesServers = "Changes the Deployment of the cluster's DNS servers; has --dry-run, prints the changes, and can be undone with `millrace tune undo`."

const (
	// serversKnob is what `tune undo` and `tune status` call the number of DNS servers.
	serversKnob = "dns-servers"
	// serversSetting is the field of the Deployment.
	serversSetting = "spec.replicas"
	// serversWay ends the way to a Deployment in the ledger, where the way to the
	// cluster is.
	serversWay = " deployment:"
)

func tuneDNSCommand(s *settings) *cobra.Command {
	var from wishes
	c := command(&cobra.Command{
		Use:   "dns [hpa]",
		Short: "How many DNS servers the cluster wants",
		Long: `
Counts nodes and cores, and says how many DNS servers there are to be: one for each 256
cores or 16 nodes, whichever is more, and two at least where there are several nodes. With
hpa it prints a HorizontalPodAutoscaler with that as its least, for kubectl apply -f.
  millrace tune dns --source kube:$HOME/.kube/config
  millrace tune dns hpa --source kube: | kubectl apply -f -`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 || len(args) == 1 && args[0] != "hpa" {
				return usage("say hpa, apply, or nothing")
			}
			return nil
		},
	}, readsOnly, func(ctx context.Context, args []string) error {
		n, err := from.nameServers(ctx)
		switch {
		case err != nil:
			return err
		case len(args) > 0:
			fmt.Print(autoscalerOf(n))
			return nil
		case s.json():
			return printJSON(n)
		}
		fmt.Println(textOf(n))
		return nil
	}, exitData, exitIncomplete)
	from.flagsAs(c, "the cluster: "+sourceForms)
	c.AddCommand(tuneDNSApplyCommand(s))
	return c
}

func tuneDNSApplyCommand(s *settings) *cobra.Command {
	t := tuning{settings: s}
	c := command(&cobra.Command{
		Use:   "apply",
		Short: "Set the number of DNS servers",
		Long: `
Sets spec.replicas of their Deployment to what ` + "`millrace tune dns`" + ` says, if it is less
now; what it was is written down. It is refused where an autoscaler sets it, or somebody
keeps the Deployment (Argo CD, Flux, Helm ...).
  millrace tune dns apply --source kube:$HOME/.kube/config
  millrace tune undo dns-servers`,
	}, scalesServers, func(ctx context.Context, _ []string) error {
		if kind, _, _ := strings.Cut(t.from.source, ":"); kind != "kube" {
			return usage("--source %q: use kube:PATH or kube:, the cluster whose DNS servers are scaled", t.from.source)
		}
		return t.scale(ctx)
	}, exitIncomplete)
	t.flagFolder(c)
	t.from.flagsAs(c, "the cluster, kube:PATH or kube:")
	c.Flags().BoolVar(&t.dry, "dry-run", false, "print what would be set and set nothing")
	return c
}

// nameServers reads how many DNS servers there are and are to be.
func (w *wishes) nameServers(ctx context.Context) (n doctor.NameServers, err error) {
	if w.source == "" {
		return n, usage("--source is missing: say --source kube:PATH, kube: or dir:PATH")
	}
	examined := examination{from: *w}
	lister, _, err := examined.lister()
	if err != nil {
		return n, &failure{exitData, err}
	}
	cluster, err := doctor.ReadCluster(ctx, lister, []doctor.Check{doctor.NameServersCheck()}, io.Discard)
	if err != nil {
		return n, err
	}
	if n, err = cluster.NameServers(); err != nil {
		return n, &failure{exitIncomplete, err}
	}
	return n, nil
}

func textOf(n doctor.NameServers) string {
	why := fmt.Sprintf("%d nodes with %.0f cores want %d; %d are ready", n.Nodes, n.Cores, n.Wanted, n.Ready)
	switch {
	case n.Replicas >= n.Wanted:
		return fmt.Sprintf("= %s %d (Deployment %s/%s): %s", serversSetting, n.Replicas, n.Namespace, n.Deployment, why)
	case n.ScaledBy != "":
		return fmt.Sprintf("! %s %d (Deployment %s/%s): %s: %s sets it: %s", serversSetting, n.Replicas, n.Namespace, n.Deployment, why, n.ScaledBy, n.Fix)
	}
	return fmt.Sprintf("~ %s %d -> %d (Deployment %s/%s): %s", serversSetting, n.Replicas, n.Wanted, n.Namespace, n.Deployment, why)
}

// autoscalerOf is a manifest: the formula says the least, and use by processor how many more.
// https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/
func autoscalerOf(n doctor.NameServers) string {
	return fmt.Sprintf(`# %d nodes with %.0f cores want %d DNS servers at least. The containers need a request
# of processor time, of which 70 %% is the aim. Without scaleDown it would take servers
# away five minutes after a burst.
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: %[4]s, namespace: %[5]s}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: %[4]s}
  minReplicas: %[3]d
  maxReplicas: %[6]d
  metrics:
  - {type: Resource, resource: {name: cpu, target: {type: Utilization, averageUtilization: 70}}}
  behavior:
    scaleDown: {stabilizationWindowSeconds: 1800, policies: [{type: Pods, value: 1, periodSeconds: 300}]}
`, n.Nodes, n.Cores, n.Wanted, n.Deployment, n.Namespace, 4*n.Wanted)
}

// scale sets the number of DNS servers, if there are to be more.
func (t *tuning) scale(ctx context.Context) error {
	n, err := t.from.nameServers(ctx)
	if err != nil {
		return err
	}
	store := &scaleStore{ctx: ctx, settings: t.from.kube(), namespace: n.Namespace, name: n.Deployment}
	cookie, err := store.Number()
	switch {
	case err != nil:
		return err
	case n.Replicas >= n.Wanted:
		if !t.settings.json() {
			fmt.Println(textOf(n))
			return nil
		}
		return t.say(nil, tuned{})
	case n.ScaledBy != "":
		return &failure{exitIncomplete, fmt.Errorf("nothing was set: %s", textOf(n))}
	case store.scale.Owner != "":
		return &failure{exitIncomplete, fmt.Errorf("nothing was set: %s is kept by %s: change it %s", store.scale, store.scale.Owner, store.scale.Where)}
	}
	step := tune.Step{
		ID: serversKnob, Setting: serversSetting, From: strconv.Itoa(n.Replicas), To: strconv.Itoa(n.Wanted),
		Place: tune.Place{Name: store.scale.String(), Path: t.from.way() + serversWay + n.Namespace + "/" + n.Deployment, Cookie: cookie},
	}
	if !t.dry {
		if _, err := t.objects(ctx).Apply([]tune.Step{step}); err != nil {
			return err
		}
	}
	return t.say(layer.Changes{{Op: layer.Alter, Subject: &step}}, tuned{})
}

// scaleStore is the number of a Deployment's replicas. It is a tune.Store.
type scaleStore struct {
	ctx             context.Context
	settings        kube.Settings
	namespace, name string
	scale           *kube.Scale
}

var _ tune.Store = &scaleStore{}

// Number implements tune.Store.
func (s *scaleStore) Number() (number uint64, err error) {
	if s.scale, err = kube.ReadScale(s.ctx, s.settings, s.namespace, s.name); kube.Absent(err) {
		return 0, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	} else if err != nil {
		return 0, err
	}
	sum := fnv.New64a()
	io.WriteString(sum, s.scale.UID)
	return sum.Sum64(), nil
}

// Read implements tune.Store.
func (s *scaleStore) Read(name string) (string, error) {
	if name != serversSetting {
		return "", fmt.Errorf("read %s of a Deployment: only %s is set", name, serversSetting)
	}
	if _, err := s.Number(); err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return strconv.Itoa(s.scale.Replicas), nil
}

// Write implements tune.Store.
func (s *scaleStore) Write(name, value string) (string, error) {
	replicas, err := strconv.Atoi(value)
	if err != nil || replicas < 1 || name != serversSetting {
		return "", fmt.Errorf("set %s to %q: it takes a number of servers", name, value)
	}
	if s.scale == nil {
		if _, err := s.Number(); err != nil {
			return "", err
		}
	}
	if s.scale.Owner != "" {
		return "", fmt.Errorf("set %s: it is kept by %s: change it %s", name, s.scale.Owner, s.scale.Where)
	}
	if err := s.scale.Set(s.ctx, s.settings, replicas); err != nil {
		return "", fmt.Errorf("set %s: %w", name, err)
	}
	got, err := s.Read(name)
	if err == nil && got != value {
		err = fmt.Errorf("set %s: it was set to %s, and is %s: somebody else sets it", name, value, got)
	}
	return got, err
}
