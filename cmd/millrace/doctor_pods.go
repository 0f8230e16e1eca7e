package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/doctor/report"
	"github.com/millrace/millrace/source/kube"
)

// makesPods is the effect of `doctor pods`.
const makesPods = "Makes pods in a cluster, after asking; has --dry-run, changes nothing else, and deletes them."

// agreed is the word that answers the question where nobody can be asked.
const agreed = "yes"

func doctorPodsCommand(s *settings) *cobra.Command {
	e := examination{nodes: []string{everyNode}}
	dry := false
	c := command(&cobra.Command{
		Use:   "pods IMAGE [yes]",
		Short: "Look at nodes without an agent, by a pod on each that is deleted afterwards",
		Long: `
Looks at nodes and their cluster as ` + "`millrace doctor --nodes`" + ` does, and where no agent
runs by a pod of IMAGE, a millrace of this version (docs/install.md: make image).
It has hostNetwork, hostPID, the capabilities NET_ADMIN, SYS_ADMIN and SYS_PTRACE
and the cgroups to read, no service account and nothing to write to; its namespace
is ` + kube.ErrandNamespace + `, which must admit pods of the level privileged. It ends by itself
when its time is over, and is deleted in any case. On a terminal it asks before it
makes any; elsewhere it takes the word yes.
  millrace doctor pods registry.example/millrace:v1 --source kube:$HOME/.kube/config
  millrace doctor pods registry.example/millrace:v1 yes --nodes a,b --source kube:config
  millrace doctor pods registry.example/millrace:v1 --source kube:config --dry-run
--dry-run prints the pods and makes none.`,
		Args:        cobra.RangeArgs(1, 2),
		Annotations: doctorEnds,
	}, makesPods, func(ctx context.Context, args []string) error {
		if len(args) == 2 && args[1] != agreed {
			return usage("%q: the only word after IMAGE is %s, which answers the question whether pods may be made", args[1], agreed)
		}
		e.image = args[0]
		if _, err := e.checks(); err != nil {
			return err
		}
		if err := e.consent(ctx, len(args) == 2, dry); err != nil || dry {
			return err
		}
		return examine(ctx, s, &e)
	}, exitFindings, exitIncomplete)
	e.flags(c)
	c.Flags().BoolVar(&dry, "dry-run", false, "print the pods, as manifests, and make none")
	return c
}

// consent asks whether pods may be made, where any have to be; of a dry run it prints
// them.
func (e *examination) consent(ctx context.Context, sure, dry bool) error {
	_, kubeconfig, _ := strings.Cut(e.from.source, ":")
	targets, err := e.targets(ctx, kube.Settings{Kubeconfig: kubeconfig, Servers: e.from.servers}, &report.Header{})
	if err != nil {
		return err
	}
	checks, err := e.checks()
	if err != nil {
		return err
	}
	var bare []string
	manifests := []json.RawMessage{}
	e.nodes = nil // those that are there now, and no pod on any that comes
	for _, t := range targets {
		e.nodes = append(e.nodes, t.node)
		if t.agent == nil {
			bare = append(bare, t.node)
			manifests = append(manifests, kube.NewErrand(t.node, e.image, e.command(checks), e.window+nodesReading).Manifest())
		}
	}
	switch {
	case dry:
		return printJSON(map[string]any{"apiVersion": "v1", "kind": "List", "items": manifests})
	case sure || len(bare) == 0:
		return nil
	case !terminal(os.Stdin):
		return usage("pods on %s would be made, and nobody can be asked here: say %s after IMAGE, or look at them with --dry-run", some(bare), agreed)
	}
	fmt.Fprintf(os.Stderr, `No agent of millrace runs on %d of %d nodes: %s.
A pod on each would look, for at most %s, and be deleted:
  image      %s
  namespace  %s, which must admit pods of the Pod Security level "privileged"
  it has     hostNetwork, hostPID, NET_ADMIN, SYS_ADMIN, SYS_PTRACE, the node's cgroups to read
Make them? [y/N] `, len(bare), len(targets), some(bare), e.window+nodesReading, e.image, kube.ErrandNamespace)
	return answerOf(os.Stdin)
}

// answerOf is nil where a line says yes.
func answerOf(from io.Reader) error {
	line, err := bufio.NewReader(from).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the answer: %w", err)
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", agreed:
		return nil
	}
	return &failure{exitIncomplete, errors.New("no pods were made")}
}

func terminal(file *os.File) bool {
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// some names the first of many.
func some(names []string) string {
	const most = 6
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}
