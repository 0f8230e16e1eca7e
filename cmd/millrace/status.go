package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
)

func statusCommand(s *settings) *cobra.Command {
	var at place
	c := command(&cobra.Command{
		Use:   "status",
		Short: "What the agent on this node does",
		Long:  "Asks the running agent through its socket.",
	}, readsOnly, func(ctx context.Context, _ []string) error {
		var status agent.Status
		if err := agent.Ask(ctx, at.run, "/status", &status); err != nil {
			return silent(at.run, err)
		}
		if s.json() {
			if err := printJSON(status); err != nil {
				return err
			}
		} else {
			printStatus(status)
		}
		if !status.Ready || len(status.Problems) > 0 || status.Source.Error != "" || refusedPort(status) != "" {
			return &failure{exitFindings, fmt.Errorf("%s", unready(status))}
		}
		return nil
	}, exitFindings, exitPrivilege)
	at.flagRun(c)
	return c
}

// silent says why an agent does not answer, and what to do.
func silent(folder string, err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return err
	case agent.Running(folder):
		return fmt.Errorf("%w: an agent is running there and does not answer: look at its log, or restart it; the Services stay in force", err)
	}
	return fmt.Errorf("%w: is an agent running? Start one with `millrace agent`, or name its run folder with --run", err)
}

func unready(s agent.Status) string {
	switch {
	case s.Source.Error != "":
		return "the source cannot be read: " + s.Source.Error
	case !s.Source.Complete:
		return "not ready: the cluster has not been seen whole yet"
	case !s.Ready:
		return "not ready: a change failed and is tried again: " + lastError(s)
	}
	if len(s.Problems) == 0 {
		return "not answered: " + refusedPort(s)
	}
	return fmt.Sprintf("%d objects of the input cannot be used", len(s.Problems))
}

func lastError(s agent.Status) string {
	for _, l := range s.Layers {
		if l.LastError != "" {
			return l.LastError
		}
	}
	return "see the agent's log"
}

func printStatus(s agent.Status) {
	ready := green("ready")
	if !s.Ready {
		ready = red("not ready")
	}
	fmt.Printf("%s  node %s  millrace %s  pid %d  up %s  attached after %.0f ms\n", ready, s.Node, s.Version, s.PID,
		time.Since(s.Started).Round(time.Second), s.AttachedAfterMS)
	fmt.Printf("source   %s  snapshot %d, %.0f s old: %d services, %d pods, %d nodes\n", s.Source.Name, s.Source.Snapshot,
		s.Source.AgeSeconds, s.Source.Services, s.Source.Pods, s.Source.Nodes)
	fmt.Printf("memory   agent %s, maps %s\n", bytesText(s.Memory.ResidentBytes), bytesText(s.Memory.MapBytes))
	if s.Latency != nil {
		fmt.Printf("latency  noticed to in the kernel: p50 %.2f ms, p99 %.2f ms, worst %.2f ms over %d changes\n",
			s.Latency.P50MS, s.Latency.P99MS, s.Latency.MaxMS, s.Latency.Changes)
	}
	for _, l := range s.Layers {
		printLayer(l)
	}
	if s.KubeProxy != nil {
		printKubeProxy(s.KubeProxy)
	}
	for _, kind := range slices.Sorted(maps.Keys(s.Ignored)) {
		fmt.Printf("passed over  %d %s\n", s.Ignored[kind], kind)
	}
	if s.Source.Unread > 0 {
		fmt.Printf("%s  %d objects could not be read and were never known: nothing is removed until they can be\n", red("held back"), s.Source.Unread)
	}
	for _, p := range s.Problems {
		fmt.Println(red("problem"), p.Error())
	}
}

func printLayer(l agent.LayerStatus) {
	fmt.Printf("\n%s  %d objects, changes: %d added, %d altered, %d removed, %d failed, %d drifted; longest apply %.1f ms\n", bold("layer "+l.Name), l.Objects,
		l.Changes.Added, l.Changes.Altered, l.Changes.Removed, l.Failed, l.Drifted, l.LongestApplyMS)
	if len(l.Maps) > 0 {
		t := newTable(os.Stdout, "  MAP", "ENTRIES", "ROOM", "FILL", "MEMORY")
		for _, m := range l.Maps {
			t.row("  "+m.Name, fmt.Sprint(m.Entries), fmt.Sprint(m.Capacity),
				fmt.Sprintf("%.1f %%", 100*float64(m.Entries)/float64(max(1, m.Capacity))), bytesText(m.Bytes))
		}
		t.print()
	}
	if len(l.Values) > 0 {
		printValues("  ", l.Values)
	}
	var reasons []string
	for _, name := range slices.Sorted(maps.Keys(l.Reasons)) {
		reasons = append(reasons, fmt.Sprintf("%s %d", name, l.Reasons[name]))
	}
	if len(reasons) > 0 {
		fmt.Println("  events:", strings.Join(reasons, ", "))
	}
	var settings []string
	for _, name := range slices.Sorted(maps.Keys(l.Settings)) {
		settings = append(settings, name+" "+l.Settings[name])
	}
	if len(settings) > 0 {
		fmt.Println("  settings:", strings.Join(settings, ", "))
	}
	if attached := attachedTexts(l); len(attached) > 0 || len(l.Maps) > 0 {
		fmt.Println("  attached:", strings.Join(attached, ", "))
	}
	for _, text := range l.Degraded {
		fmt.Println("  degraded:", text)
	}
	if l.LastError != "" {
		fmt.Println("  last error:", l.LastError)
	}
}

// attachedTexts name the programs, and for those at network devices how many.
func attachedTexts(l agent.LayerStatus) (texts []string) {
	for _, p := range l.Programs {
		if p.Device == "" {
			texts = append(texts, p.Name)
		}
	}
	at := devicesOf(l)
	for _, name := range slices.Sorted(maps.Keys(at)) {
		texts = append(texts, fmt.Sprintf("%s at %d devices", name, len(at[name])))
	}
	return texts
}

// devicesOf are the network devices of each program that is attached to some.
func devicesOf(l agent.LayerStatus) map[string][]string {
	devices := map[string][]string{}
	for _, p := range l.Programs {
		if p.Device != "" {
			devices[p.Name] = append(devices[p.Name], p.Device)
		}
	}
	return devices
}
