package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/doctor/report"
)

// examination is what the flags ask for.
type examination struct {
	only                              []string
	severity, baseline, explain, html string
	window                            time.Duration
	strict                            bool
	// from is where the objects of a cluster are.
	from wishes
	// nodes are those to look at, or all; none for this one.
	nodes []string
	// image is what nodes without an agent run in a pod, "" for nothing.
	image string
}

func doctorCommand(s *settings) *cobra.Command {
	var e examination
	c := command(&cobra.Command{
		Use:   "doctor",
		Short: "What is wrong with this node's or cluster's network, with evidence, fix and undo",
		Long: `
Reads counters and settings of the kernel, twice, on the node and inside every
network namespace on it, and says what is wrong: what was seen and where, what
follows, what to do and how to undo it. It needs no agent and no cluster, and
works beside any network plug-in. Without root it says what it could not see.
With a cluster it lists the objects that the network is made of, and looks at
them as well; of manifests it looks at nothing else. With --nodes it looks at
nodes by the agents that run there, from anywhere, and compares them. It sends
packets to nodes, pods and Services only where --only names such checks (probe).
  millrace doctor
  millrace doctor --source kube:$HOME/.kube/config
  millrace doctor --source kube:$HOME/.kube/config --nodes all
  millrace doctor --source dir:manifests
  millrace doctor --source kube:$HOME/.kube/config --only probe
  millrace doctor --only conntrack,HS-04 --for 1m
  millrace doctor -o json > before.json; millrace doctor --baseline before.json
  millrace doctor --explain CT-01
-o text, json, junit, sarif or prom.`,
		Annotations: doctorEnds,
	}, readsOnly, func(ctx context.Context, _ []string) error { return examine(ctx, s, &e) }, exitFindings, exitIncomplete)
	e.flags(c)
	c.Flags().StringVar(&e.explain, "explain", "", "say all about the check with this `ID`, and read nothing")
	c.AddCommand(doctorPodsCommand(s))
	return c
}

// doctorEnds are its forms of output, and what its exit statuses mean.
var doctorEnds = map[string]string{
	moreOutputs:            "junit sarif prom",
	exitOf(exitOK):         "done: nothing was found, or information, or warnings without --strict",
	exitOf(exitFailed):     "warnings were found, and --strict is given; or --html cannot be written",
	exitOf(exitFindings):   "something critical was found (FAIL), whatever else is true",
	exitOf(exitIncomplete): "nothing of that, and it could not look: none of the checks, or not at a node\n      of --nodes; or it was interrupted, or --source or --baseline cannot be read",
}

// flags are those of both ways to look.
func (e *examination) flags(c *cobra.Command) {
	c.Flags().StringSliceVar(&e.only, "only", nil, "checks, layers or scopes to run, by ID, group or name: CT-01, HS, dns, cluster, probe (default: all that send nothing)")
	c.Flags().StringVar(&e.severity, "severity", string(doctor.Info), "least severity of the checks to run: info, warning or critical")
	c.Flags().StringVar(&e.baseline, "baseline", "", "an earlier `file` of -o json, whose findings are left out")
	c.Flags().StringVar(&e.html, "html", "", "write the report to this `file`, too, as one page for a browser that needs nothing else")
	flagFor(c, &e.window, 2*time.Second, "time between two readings of the counters; what is seldom takes longer to see")
	c.Flags().BoolVar(&e.strict, "strict", false, "warnings end it with status 1")
	c.Flags().StringSliceVar(&e.nodes, "nodes", e.nodes, "look at these nodes, or all, by the agents that run there and --source kube:PATH, instead of at this one")
	e.from.flagsAs(c, "a cluster whose objects are looked at as well: "+sourceForms)
}

func examine(ctx context.Context, s *settings, e *examination) error {
	checks, err := e.checks()
	if err != nil {
		return err
	}
	if e.explain != "" {
		return report.Explain(os.Stdout, columns(report.Screen), checks[0])
	}
	page, err := newDrawing(e.html) // before it looks: it may take minutes
	if err != nil {
		return err
	}
	r, err := e.read(ctx, checks)
	if err = page.finish(r.WriteHTML, err); err != nil {
		if said := (*failure)(nil); errors.As(err, &said) {
			return said
		}
		return &failure{exitIncomplete, err}
	}
	status := e.status(r)
	if err := printReport(s, r, status); err != nil {
		return &failure{exitIncomplete, fmt.Errorf("write report: %w", err)}
	}
	switch status {
	case exitOK:
		return nil
	case exitFailed:
		return &failure{status, errors.New("warnings were found, and --strict is given")}
	case exitIncomplete:
		if r.Header.Answered() < len(r.Header.Nodes) {
			return &failure{status, fmt.Errorf("%d of %d nodes could not be looked at: the report says why", len(r.Header.Nodes)-r.Header.Answered(), len(r.Header.Nodes))}
		}
		return &failure{status, errors.New("none of the checks could look: the report says why")}
	}
	return &failure{status, errors.New("")}
}

// checks are those to run, or the one to explain.
func (e *examination) checks() ([]doctor.Check, error) {
	all := doctor.Checks()
	if e.explain != "" {
		at := slices.IndexFunc(all, func(c doctor.Check) bool { return strings.EqualFold(c.ID, e.explain) })
		if at < 0 {
			return nil, usage("--explain %s: no check has this ID: docs/doctor.md lists them", e.explain)
		}
		return all[at : at+1], nil
	}
	least, err := doctor.ParseSeverity(e.severity)
	if err != nil {
		return nil, usage("--severity: %v", err)
	}
	if e.window < 0 || e.window > 24*time.Hour {
		return nil, usage("--for %s: use 0s to 24h", e.window)
	}
	chosen, err := doctor.Select(all, e.only, least)
	if err != nil {
		return nil, usage("--only: %v", err)
	}
	if len(chosen) == 0 {
		return nil, usage("--only %s: none of these checks can be of severity %s", strings.Join(e.only, ","), least)
	}
	return e.fitting(chosen)
}

func (e *examination) read(ctx context.Context, checks []doctor.Check) (*report.Report, error) {
	// Reading makes much that is thrown away at once.
	debug.SetGCPercent(25)
	begun := time.Now()
	progress := newProgress()
	look := e.here
	if len(e.nodes) > 0 {
		look = e.there
	}
	r, err := look(ctx, checks, progress)
	progress.done()
	if err != nil {
		return nil, err
	}
	if e.baseline != "" {
		file, err := os.Open(e.baseline)
		if err != nil {
			return nil, fmt.Errorf("read baseline: %w", err)
		}
		defer file.Close()
		if err := r.Since(file); err != nil {
			return nil, err
		}
	}
	r.Header.Seconds = time.Since(begun).Seconds()
	return r, nil
}

// header is what every report begins with.
func (e *examination) header() report.Header {
	return report.Header{Tool: "millrace doctor", Version: version, Time: time.Now(), Cluster: e.from.source}
}

// here looks at this node, at a cluster's objects, or at both.
func (e *examination) here(ctx context.Context, checks []doctor.Check, progress io.Writer) (*report.Report, error) {
	r := &report.Report{Header: e.header()}
	facts, err := e.facts(ctx, checks, progress)
	if err != nil {
		return nil, err
	}
	h := &r.Header
	if h.Kernel, err = kernelRelease(); err != nil {
		return nil, err
	}
	h.Node, h.Window, h.Namespaces, h.Unseen, h.Alike = hostname(), facts.Window.Seconds(), len(facts.Spaces), facts.Unseen, facts.Alike()
	r.Results = doctor.Run(facts, checks)
	return r, nil
}

// status is how the command ends.
func (e *examination) status(r *report.Report) int {
	tally := r.Tally()
	switch {
	case tally["fail"] > 0:
		return exitFindings
	case tally["warn"] > 0 && e.strict:
		return exitFailed
	case tally["skip"] == len(r.Results), r.Header.Answered() < len(r.Header.Nodes):
		return exitIncomplete
	}
	return exitOK
}

func printReport(s *settings, r *report.Report, status int) error {
	switch s.output {
	case "json":
		return r.JSON(os.Stdout)
	case "junit":
		return r.JUnit(os.Stdout)
	case "sarif":
		return r.SARIF(os.Stdout)
	case "prom":
		return r.Prometheus(os.Stdout)
	}
	codes := map[string]string{"fail": "31", "warn": "33", "info": "36", "skip": "2"}
	return r.Text(os.Stdout, columns(report.Screen), status, func(status, text string) string { return colour(codes[status], text) })
}
