// Command millrace is a Kubernetes network stack for one node, and the tools to
// look at any: see `millrace help`. This package is wiring: flags, one call,
// printing. A file for each sub-command.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/lab"
	"github.com/millrace/millrace/layer/pod/cni"
)

// version is set by the linker (-X main.version=...).
var version = "development"

// Exit statuses; those above 63 are sysexits.h's.
const (
	exitOK          = 0
	exitFailed      = 1
	exitFindings    = 2
	exitIncomplete  = 3
	exitUsage       = 64
	exitData        = 65
	exitUnavailable = 69
	exitPrivilege   = 77
)

var exitMeanings = map[int]string{
	exitOK:          "done",
	exitFailed:      "failed: the message says what, where and why",
	exitFindings:    "done, and something was found wrong",
	exitIncomplete:  "could not be completed: the message says why",
	exitUsage:       "the command line cannot be understood",
	exitData:        "the manifests hold something that cannot be used; the rest is in force",
	exitUnavailable: "this kernel lacks something; the message names it",
	exitPrivilege:   "a privilege is missing; the message names it",
}

// The first line of every help is one of these effects.
const (
	readsOnly   = "Reads only."
	changesHost = "Changes this host; has --dry-run, prints the changes, and can be undone with `millrace remove`."
	// replacesOther is about what somebody else wrote, whom we replace.
	replacesOther = "Changes this host; has --dry-run, prints the changes, and is undone by starting kube-proxy again."
	inOwnSpaces   = "Changes only namespaces, cgroups and a run folder of its own, and removes them."
)

// started is as near to the start of the process as Go code gets.
var started = time.Now()

func main() {
	// A container runtime starts a CNI plugin without arguments, once for every pod that
	// begins or ends.
	if os.Getenv("CNI_COMMAND") != "" && len(os.Args) == 1 {
		os.Exit(cni.Main())
	}
	// The two processes that the lab and the benchmarks make a great many of
	// start without the command tree.
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case podWord:
			os.Exit(lab.PodMain(os.Args[2:]))
		case workerWord:
			os.Exit(bench.WorkerMain(os.Args[2:]))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:]))
}

// Hidden sub-commands.
const (
	podWord    = "lab-pod"
	workerWord = "bench-worker"
	labRunWord = "lab-run"
)

func run(ctx context.Context, args []string) int {
	root := rootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	status := statusOf(err)
	if err.Error() != "" {
		fmt.Fprintln(os.Stderr, "millrace:", err)
	}
	if status == exitPrivilege && os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "millrace: this was not run as root; run it with sudo")
	}
	if status == exitUsage {
		fmt.Fprintln(os.Stderr, "run `millrace help` to see what there is")
	}
	return status
}

// failure is an error with an exit status of its own.
type failure struct {
	status int
	error
}

func (f *failure) Unwrap() error { return f.error }

// ran marks an error that came from doing, not from the command line.
type ran struct{ error }

func (r *ran) Unwrap() error { return r.error }

func statusOf(err error) int {
	var failed *failure
	var privilege *need.Privilege
	var feature *need.Feature
	var done *ran
	switch {
	case errors.As(err, &failed):
		return failed.status
	case errors.As(err, &privilege), errors.Is(err, lab.ErrPrivilege), errors.Is(err, fs.ErrPermission):
		return exitPrivilege
	case errors.Is(err, lab.ErrName), errors.Is(err, bench.ErrOptions):
		return exitUsage
	case errors.Is(err, lab.ErrRange):
		return exitData
	case errors.As(err, &feature), errors.Is(err, cgroup.ErrNoCgroup2):
		return exitUnavailable
	case errors.As(err, &done):
		return exitFailed
	}
	return exitUsage // cobra's own: an unknown command, flag or argument
}

// moreOutputs is the annotation of a command that has forms of output of its own.
const moreOutputs = "outputs"

// exitOf is the annotation of a command for which a status means something more precise.
func exitOf(status int) string { return fmt.Sprint("exit ", status) }

func usage(format string, args ...any) error {
	return &failure{exitUsage, fmt.Errorf(format, args...)}
}

// settings are the flags that every command has.
type settings struct{ output string }

func (s *settings) json() bool { return s.output == "json" }

func rootCommand() *cobra.Command {
	s := &settings{}
	root := &cobra.Command{
		Use:   "millrace",
		Short: "Kubernetes networking that is fast, tunes its node, and says why a packet died",
		Long: readsOnly + `

millrace is a Kubernetes network stack in Go and eBPF. Start with
  millrace demo         a cluster in a box, measured beside iptables (needs root)
  millrace status       what the agent on this node does
  millrace trace        where packets die on this node, why, and what to do`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		PersistentPreRunE: func(c *cobra.Command, _ []string) error {
			forms := append([]string{"text", "json"}, strings.Fields(c.Annotations[moreOutputs])...)
			if !slices.Contains(forms, s.output) {
				last := len(forms) - 1
				return usage("--output %q: use %s or %s", s.output, strings.Join(forms[:last], ", "), forms[last])
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.PersistentFlags().StringVarP(&s.output, "output", "o", "text", "text for people, json for machines")
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(demoCommand(s), labCommand(s), labRunCommand(), labFaultCommand(), agentCommand(s), statusCommand(s), showCommand(s),
		planCommand(s), explainCommand(s), doctorCommand(s), traceCommand(s), reportCommand(s), benchCommand(s), tuneCommand(s), removeCommand(s), kubeProxyCommand(s), versionCommand(s))
	return root
}

// command completes one: its help starts with its effect and ends with its exit
// statuses, and what its function returns is told apart from usage errors.
func command(c *cobra.Command, effect string, do func(ctx context.Context, args []string) error, statuses ...int) *cobra.Command {
	var long strings.Builder
	fmt.Fprintf(&long, "%s\n\n%s", effect, strings.TrimSpace(c.Long))
	long.WriteString("\n\nExit statuses:\n")
	for _, status := range append([]int{exitOK, exitFailed}, append(statuses, exitUsage)...) {
		fmt.Fprintf(&long, "  %-3d %s\n", status, cmp.Or(c.Annotations[exitOf(status)], exitMeanings[status]))
	}
	c.Long = strings.TrimRight(long.String(), "\n")
	if c.Args == nil {
		c.Args = cobra.NoArgs
	}
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := do(c.Context(), args); err != nil {
			return &ran{err}
		}
		return nil
	}
	return c
}
