package main

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/tune"
	"github.com/millrace/millrace/layer/tune/knob"
	"github.com/millrace/millrace/source/kube"
	"github.com/millrace/millrace/source/kubeproxy"
)

// proxyHomes are where clusters have kube-proxy's configuration, namespace, name and key:
// kubeadm's, and Amazon EKS's.
var proxyHomes = [][3]string{{"kube-system", "kube-proxy", configKey}, {"kube-system", "kube-proxy-config", "config"}}

const (
	// proxyRestart makes each kube-proxy read its configuration again, one after the other.
	proxyRestart = "kubectl -n kube-system rollout restart daemonset kube-proxy"
	// objectsFolder is where what was set in a cluster is written down: it outlives boots,
	// which tuneFolder does not.
	objectsFolder = "/var/lib/millrace/tune"
)

// proxyStore is the configuration of a cluster's kube-proxy. It is a tune.Store.
type proxyStore struct {
	ctx      context.Context
	settings kube.Settings
	// text is what was read last, and what is written next goes by it.
	text *kube.Text
}

var _ tune.Store = &proxyStore{}

func (p *proxyStore) read() error {
	homes := proxyHomes
	if p.text != nil {
		homes = [][3]string{{p.text.Namespace, p.text.Name, p.text.Key}}
	}
	var absent error // of the first home: the others are less usual
	for _, home := range homes {
		text, err := kube.ReadText(p.ctx, p.settings, home[0], home[1], home[2])
		switch {
		case err == nil:
			p.text = text
			return nil
		case !kube.Absent(err):
			return err // it may be there
		case absent == nil:
			absent = err
		}
	}
	return fmt.Errorf("%w: this cluster has no kube-proxy, or it has its configuration elsewhere: change it there", absent)
}

// Number implements tune.Store.
func (p *proxyStore) Number() (uint64, error) {
	if err := p.read(); kube.Absent(err) {
		return 0, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	} else if err != nil {
		return 0, err
	}
	return number(p.text), nil
}

// number stands for an object's UID.
func number(t *kube.Text) uint64 {
	sum := fnv.New64a()
	io.WriteString(sum, t.UID)
	return sum.Sum64()
}

// Read implements tune.Store.
func (p *proxyStore) Read(name string) (string, error) {
	if err := p.read(); err != nil {
		return "", err
	}
	value, err := kubeproxy.Value([]byte(p.text.Is), name)
	if err != nil {
		return "", fmt.Errorf("read %s: %s: %w", name, p.text, err)
	}
	return value, nil
}

// Write implements tune.Store.
func (p *proxyStore) Write(name, value string) (string, error) {
	if p.text == nil {
		if err := p.read(); err != nil {
			return "", err
		}
	}
	if p.text.Owner != "" {
		return "", fmt.Errorf("set %s: it is kept by %s: change it %s", name, p.text.Owner, p.text.Where)
	}
	next, err := kubeproxy.Set([]byte(p.text.Is), name, value)
	if err == nil {
		err = p.text.Replace(p.ctx, p.settings, string(next))
	}
	if err != nil {
		return "", fmt.Errorf("set %s: %w", name, err)
	}
	got, err := p.Read(name)
	if err == nil && got != value {
		err = fmt.Errorf("set %s: it was set to %q, and is %q: somebody else sets it", name, value, got)
	}
	return got, err
}

// objects is the ledger of what was set in clusters. --source says how to reach one, else
// what was said when it was set.
func (t *tuning) objects(ctx context.Context) *tune.Ledger {
	folder := t.at.run
	if folder == tuneFolder {
		folder = objectsFolder
	}
	known := map[string]tune.Store{}
	return tune.NewLedgerOf(folder, func(path string) tune.Store {
		way, deployment, ofServers := strings.Cut(path, serversWay)
		from := t.from
		if from.source == "" {
			from = wayOf(way)
		}
		namespace, name, _ := strings.Cut(deployment, "/")
		switch {
		case known[path] != nil:
		case ofServers:
			known[path] = &scaleStore{ctx: ctx, settings: from.kube(), namespace: namespace, name: name}
		default:
			known[path] = &proxyStore{ctx: ctx, settings: from.kube()}
		}
		return known[path]
	})
}

// way is how to reach the cluster later, from whichever folder: "https://a,https://b kube:/root/.kube/config".
func (w *wishes) way() string {
	kind, path, _ := strings.Cut(w.source, ":")
	if whole, err := filepath.Abs(path); path != "" && err == nil {
		path = whole
	}
	return strings.Join(w.servers, ",") + " " + kind + ":" + path
}

// wayOf reads it.
func wayOf(text string) (w wishes) {
	servers, source, _ := strings.Cut(text, " ")
	w.source = source
	if servers != "" {
		w.servers = strings.Split(servers, ",")
	}
	return w
}

// kube is how to ask the API server of a source.
func (w *wishes) kube() kube.Settings {
	_, path, _ := strings.Cut(w.source, ":")
	return kube.Settings{Kubeconfig: path, Servers: w.servers}
}

// proxy reads the configuration of the cluster's kube-proxy, and what the checks that can
// be answered there see in it. It returns the place in which fields of it are set.
func (t *tuning) proxy(ctx context.Context, checks []doctor.Check) ([]tune.Place, error) {
	if t.from.source == "" && len(t.from.servers) == 0 {
		return nil, nil
	}
	if kind, _, named := strings.Cut(t.from.source, ":"); kind != "kube" || !named {
		return nil, usage("--source %q: use kube:PATH or kube:, the cluster whose kube-proxy is configured", t.from.source)
	}
	examined := examination{from: t.from}
	lister, _, err := examined.lister()
	if err != nil {
		return nil, &failure{exitData, err}
	}
	store := &proxyStore{ctx: ctx, settings: t.from.kube()}
	c := &knob.ProxyConfig{Values: map[string]string{}, Found: map[string][]string{}, Restart: proxyRestart}
	t.config = c
	if c.Unread = store.read(); c.Unread != nil {
		return nil, nil
	}
	c.Name, c.Owner, c.Where = store.text.String(), store.text.Owner, store.text.Where
	config, err := kubeproxy.Read(c.Name, []byte(store.text.Is))
	c.Conntrack = config.Conntrack
	for _, field := range knob.ProxyFields() {
		if err == nil {
			c.Values[field], err = kubeproxy.Value([]byte(store.text.Is), field)
		}
	}
	if err != nil {
		c.Unread = fmt.Errorf("%s: %w", c.Name, err)
		return nil, nil
	}
	cluster, err := doctor.ReadCluster(ctx, lister, checks, io.Discard)
	if err != nil {
		return nil, err
	}
	for _, r := range doctor.Run((&doctor.Facts{}).With(cluster), checks) {
		for _, e := range r.Evidence {
			if e.Severity != "" {
				c.Found[r.ID] = append(c.Found[r.ID], e.Read+": "+e.Value)
			}
		}
	}
	return []tune.Place{{Name: c.Name, Path: t.from.way(), Cookie: number(store.text)}}, nil
}

// applySteps sets those of clusters and then those of this host; with an error none of it
// stays.
func (t *tuning) applySteps(ctx context.Context, all []tune.Step) (done layer.Changes, err error) {
	var here, there []tune.Step
	for _, s := range all {
		if s.Place.Path == t.from.way() && t.from.source != "" {
			there = append(there, s)
		} else {
			here = append(here, s)
		}
	}
	objects := t.objects(ctx)
	var before []tune.Held
	if len(there) > 0 {
		if before, err = objects.Load(); err != nil {
			return nil, err
		}
		if _, err := objects.Apply(there); err != nil {
			return nil, err
		}
	}
	if len(here) > 0 {
		if _, err := t.ledger().Apply(here); err != nil {
			if len(there) > 0 {
				err = errors.Join(err, objects.TakeBack(there, before))
			}
			return nil, err
		}
	}
	for i := range all {
		done = append(done, layer.Change{Op: layer.Alter, Subject: &all[i]})
	}
	return done, nil
}
