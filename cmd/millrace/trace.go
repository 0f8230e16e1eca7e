package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/layer/trace"
	"github.com/millrace/millrace/layer/trace/cause"
)

// watching is what the flags ask for.
type watching struct {
	spaces []string
	window time.Duration
	pcap   string
	nodes  []string
	// at and from are where names are asked for.
	at   place
	from wishes
}

// watchingWord is what the progress of a trace begins with once it watches.
const watchingWord = "watching"

// evidenceVariable names a file into which all that was seen is written as JSON: what a
// rule that was wrong has to be mended with.
const evidenceVariable = "MILLRACE_TRACE_EVIDENCE"

func traceCommand(s *settings) *cobra.Command {
	var w watching
	c := command(&cobra.Command{
		Use:   "trace [FROM] [TO] [FILTER]",
		Short: "Where packets die, why, and what to do about it",
		Long: `
Watches packets and connections in network namespaces of this node, and says why
those that died did so: the cause, the evidence for it and against others, what
to do, how to undo that, and whose it is. It needs no agent, works beside any
network plug-in, and leaves nothing behind, also when it is killed.
  millrace trace --netns blue,green --for 10s
  millrace trace 10.244.1.4 10.96.0.10:53
  millrace trace 10.244.0.0/16 -o json --for 1m
  millrace trace --pcap died.pcapng 'tcp port 443 and not host 10.0.0.1'
  millrace trace shop/web-0 shop/db --nodes all --source kube:config --for 10s
FROM and TO are an address, one with a port, a port alone (:53), a range, the
name of a pod or a Service (NAMESPACE/NAME), of a node, or of a network
namespace, and stand for packets in both directions, before and behind the
translation that a Service makes. Names are those that the agent knows, or
--source. FILTER, in quotes, is one of pcap-filter(7) about addresses, ports,
protocols and tcp[tcpflags]. Without --for it goes on until Ctrl-C. Needs root,
or CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_SYS_PTRACE and CAP_SYSLOG.`,
		Args: cobra.ArbitraryArgs, // parseAsked says which are too many
	}, readsOnly, func(ctx context.Context, args []string) error {
		if len(w.nodes) > 0 {
			return w.traceNodes(ctx, s, args)
		}
		return w.trace(ctx, s, args)
	}, exitFindings, exitIncomplete, exitUnavailable, exitPrivilege)
	c.Flags().StringSliceVar(&w.spaces, "netns", nil, "network namespaces to look at: a name below /run/netns, a path, a process's number, or node (default: all of this node)")
	flagFor(c, &w.window, 0, "how long to watch; 0 is until Ctrl-C")
	c.Flags().StringVar(&w.pcap, "pcap", "", "write the packets that died to this `file`, as pcapng with the reason as a comment")
	c.Flags().StringSliceVar(&w.nodes, "nodes", nil, "watch on these nodes, or all, by the agents that run there and --source kube:PATH, instead of on this one")
	w.at.flagRun(c)
	w.from.flagsAs(c, "where names of pods and Services come from, without an agent: "+sourceForms)
	return c
}

// flagFor is the flag of every command that goes on for a time.
func flagFor(c *cobra.Command, window *time.Duration, value time.Duration, meaning string) {
	c.Flags().DurationVar(window, "for", value, meaning)
}

func (w *watching) trace(ctx context.Context, s *settings, args []string) error {
	known, err := readNames(ctx, &w.at, &w.from)
	if err != nil {
		return err
	}
	ends, filter, err := known.parseAsked(args)
	if err != nil {
		return err
	}
	if w.window < 0 || w.window > 24*time.Hour {
		return usage("--for %s: use 0s to 24h", w.window)
	}
	spaces, chosen, err := w.namespaces()
	if err != nil {
		return err
	}
	q, err := ends.read(ctx, spaces)
	if err != nil {
		return err
	}
	q.filter = filter
	evidence, reader, err := w.watch(ctx, spaces, chosen, q)
	if err != nil {
		return err
	}
	known.label(evidence.Spaces)
	evidence.Services = known.addresses()
	if name := os.Getenv(evidenceVariable); name != "" {
		if err := writeEvidence(name, evidence); err != nil {
			return err
		}
	}
	verdicts, others, folded := cause.DiagnoseFor(evidence, q.asked)
	known.describe(verdicts)
	reader.Ways(context.WithoutCancel(ctx), evidence, verdicts)
	r := newTraceReport(evidence, verdicts, slices.DeleteFunc(folded, func(e cause.Event) bool { return !q.asked(&e) }), reader.Namespaces())
	r.Others = len(others)
	return r.tell(s)
}

// tell prints the report and says how the command ends.
func (r *traceReport) tell(s *settings) (err error) {
	if s.json() {
		err = printJSON(r)
	} else {
		err = r.print(os.Stdout)
	}
	if err != nil {
		return &failure{exitIncomplete, fmt.Errorf("write report: %w", err)}
	}
	if len(r.Verdicts) > 0 {
		return &failure{exitFindings, errors.New("")}
	}
	return nil
}

// watch takes the evidence of one window.
func (w *watching) watch(ctx context.Context, spaces []trace.Namespace, chosen []uint32, q *question) (*cause.Evidence, *trace.Reader, error) {
	p := newProgress()
	defer p.done()
	reader, err := trace.NewReader(spaces)
	if err != nil {
		return nil, nil, err
	}
	options := trace.Options{Namespaces: chosen, Calls: true}
	q.options(&options)
	var newcomers *trace.Newcomers
	if len(w.spaces) == 0 && len(chosen) == 0 {
		newcomers = reader.Newcomers(func() ([]trace.Namespace, error) {
			now, _, err := everywhere()
			return now, err
		})
		options.Met = newcomers.Met
	}
	kept, err := w.capture(&options, spaces, q)
	if err != nil {
		return nil, nil, err
	}
	defer kept.close()
	session, err := trace.Watch(options)
	if err != nil {
		return nil, nil, err
	}
	if err := reader.Before(ctx); err != nil {
		_, _ = session.Stop()
		return nil, nil, err
	}
	if newcomers != nil {
		newcomers.Follow(ctx)
		defer newcomers.Stop()
	}
	begun := time.Now()
	fmt.Fprintf(p, watchingWord+" %d network namespaces %s", len(spaces), w.until())
	var over <-chan time.Time
	if w.window > 0 {
		over = time.After(w.window)
	}
	select {
	case <-over:
	case <-ctx.Done(): // Ctrl-C: what was seen until then is told
	}
	window := time.Since(begun)
	recording, err := session.Stop()
	if newcomers != nil {
		newcomers.Stop()
	}
	if err == nil {
		err = kept.finish(recording, q, p)
	}
	if err != nil {
		return nil, nil, err
	}
	evidence, err := reader.After(context.WithoutCancel(ctx), window, recording.Events)
	if err != nil {
		return nil, nil, err
	}
	evidence.Missing = append(recording.Missing, evidence.Missing...)
	evidence.Lost, evidence.Passages = recording.Lost, recording.Hops
	return evidence, reader, nil
}

func (w *watching) until() string {
	if w.window == 0 {
		return "until Ctrl-C"
	}
	return "for " + w.window.String()
}

// namespaces are those to be read, and the inodes of those to be watched; none of the
// latter stands for all.
func (w *watching) namespaces() (spaces []trace.Namespace, chosen []uint32, err error) {
	if len(w.spaces) == 0 {
		spaces, nested, err := everywhere()
		for i := range spaces {
			if nested { // the others are of another node
				chosen = append(chosen, spaces[i].Inode)
			}
		}
		return spaces, chosen, err
	}
	for _, name := range w.spaces {
		path := pathOfSpace(name)
		var file unix.Stat_t
		if err := unix.Stat(path, &file); err != nil {
			return nil, nil, usage("--netns %s: %s: %v", name, path, err)
		}
		spaces = append(spaces, trace.Namespace{Name: name, Path: path, Inode: uint32(file.Ino)})
		chosen = append(chosen, uint32(file.Ino))
	}
	return spaces, chosen, nil
}

// everywhere lists the namespaces of this node that there are now; nested says that there
// are others on the host, which are not its own.
func everywhere() (spaces []trace.Namespace, nested bool, err error) {
	places, _, nested, err := doctor.This().Places()
	for _, p := range places {
		spaces = append(spaces, trace.Namespace{Name: p.Name, Path: p.Path, Pod: p.Pod, Inode: p.Inode})
	}
	return spaces, nested, err
}

// pathOfSpace leads to a namespace as a person names it.
func pathOfSpace(name string) string {
	if name == "node" {
		return "/proc/self/ns/net"
	}
	if strings.Contains(name, "/") {
		return name
	}
	mounted := filepath.Join("/run/netns", name)
	if _, err := strconv.Atoi(name); err == nil {
		if _, err := os.Stat(mounted); err != nil {
			return filepath.Join("/proc", name, "ns/net")
		}
	}
	return mounted
}

func writeEvidence(name string, e *cause.Evidence) error {
	file, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("write evidence: %w", err)
	}
	encoder := json.NewEncoder(file)
	encoder.SetIndent("", " ")
	if err := errors.Join(encoder.Encode(e), file.Close()); err != nil {
		return fmt.Errorf("write evidence: %w", err)
	}
	return nil
}
