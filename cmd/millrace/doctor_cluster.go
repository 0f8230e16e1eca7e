package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/source/dir"
	"github.com/millrace/millrace/source/kube"
)

// fitting are the checks that can look at what is there: without a cluster those of the
// node, unless others are named, and of manifests those of objects alone, and those that
// send to what is named there. Nodes are compared only where there are several; what
// compares a node with its cluster, or sends from it, is for the node itself.
func (e *examination) fitting(chosen []doctor.Check) ([]doctor.Check, error) {
	kind, path, named := strings.Cut(e.from.source, ":")
	among := func(c doctor.Check) bool { return c.Scope == doctor.Among }
	switch {
	case len(e.nodes) > 0 && !(kind == "kube" && named):
		return nil, usage("--nodes goes with --source kube:PATH, which says where the nodes are")
	case len(e.nodes) > 0 && e.window > mostNodesWindow:
		return nil, usage("--nodes takes --for 0s to %s: a node goes on looking when nobody is there any more", mostNodesWindow)
	case len(e.nodes) > 0:
		return e.fittingNodes(chosen)
	case e.from.source == "" && len(e.from.servers) > 0:
		return nil, usage("--api-server goes with --source kube: only")
	case e.from.source == "":
		if len(e.only) == 0 {
			chosen = slices.DeleteFunc(chosen, func(c doctor.Check) bool { return c.NeedsCluster() || among(c) })
		}
		return chosen, nil
	case kind == "kube" && named:
		if len(e.only) == 0 {
			chosen = slices.DeleteFunc(chosen, among)
		}
		return chosen, nil
	case len(e.from.servers) > 0:
		return nil, usage("--api-server goes with --source kube: only")
	case kind != "dir" || path == "":
		return nil, usage("--source %q: use dir:PATH, kube:PATH or kube:", e.from.source)
	}
	chosen = slices.DeleteFunc(chosen, func(c doctor.Check) bool { return c.Scope != doctor.Whole && !c.Sends() })
	if len(chosen) == 0 {
		return nil, usage("--only %s: none of these checks looks at objects, and a folder has nothing else", strings.Join(e.only, ","))
	}
	return chosen, nil
}

// facts reads what the checks ask for: of this node, of the cluster, or of both.
func (e *examination) facts(ctx context.Context, checks []doctor.Check, progress io.Writer) (*doctor.Facts, error) {
	facts := &doctor.Facts{}
	this := doctor.This()
	if slices.ContainsFunc(checks, func(c doctor.Check) bool { return c.Scope != doctor.Whole && !c.Sends() }) {
		var err error
		reads := append(slices.Clone(checks), doctor.Comparing())
		if facts, err = this.Read(ctx, reads, e.window, progress); err != nil {
			return nil, err
		}
	}
	if e.from.source == "" {
		return facts, nil
	}
	lister, unread, err := e.lister()
	if err != nil {
		return nil, err
	}
	facts.Unseen = append(facts.Unseen, unread...)
	found, err := doctor.ReadCluster(ctx, lister, checks, progress)
	if err != nil {
		return nil, err
	}
	return facts, this.Probe(ctx, facts.With(found), checks, progress)
}

// lister opens the source, and says what of it cannot be read.
func (e *examination) lister() (lister doctor.Lister, unread []string, err error) {
	kind, path, _ := strings.Cut(e.from.source, ":")
	if kind == "kube" {
		api, err := kube.OpenAPI(kube.Settings{Kubeconfig: path, Servers: e.from.servers})
		return &apiServer{api: api}, nil, err
	}
	all, problems, err := dir.Objects(path)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range problems {
		unread = append(unread, p.Error())
	}
	return manifests{all: all}, unread, nil
}

// apiServer lists objects of an API server. After one that nobody answered it asks no
// more: each kind would wait as long.
type apiServer struct {
	nested
	api  *kube.API
	away error
}

// Objects lists a kind.
func (a *apiServer) Objects(ctx context.Context, r doctor.Resource, each func([]byte) error) error {
	if a.away != nil {
		return a.away
	}
	err := a.api.Objects(ctx, r.Path(), each)
	switch {
	case errors.Is(err, kube.ErrNoKind):
		return doctor.ErrNoKind
	case errors.Is(err, kube.ErrNoAnswer):
		a.away = err
	}
	return err
}

// manifests are objects of files.
type manifests struct {
	nested
	all []dir.Object
}

// Objects gives those of a kind, of whatever version.
func (m manifests) Objects(_ context.Context, r doctor.Resource, each func([]byte) error) error {
	for _, o := range m.all {
		group, _, grouped := strings.Cut(o.APIVersion, "/")
		if !grouped {
			group = ""
		}
		if o.Kind != r.Kind || group != r.Group {
			continue
		}
		if err := each(o.JSON); err != nil {
			return err
		}
	}
	return nil
}

// nested reads the documents in ConfigMaps.
type nested struct{}

// Document finds the one of a kind in a text of YAML.
func (nested) Document(text, kind string) ([]byte, error) {
	all, problems := dir.Decode(kind, []byte(text))
	if at := slices.IndexFunc(all, func(o dir.Object) bool { return o.Kind == kind }); at >= 0 {
		return all[at].JSON, nil
	}
	if len(problems) > 0 {
		return nil, problems[0]
	}
	return nil, fmt.Errorf("there is no document of kind %s", kind)
}
