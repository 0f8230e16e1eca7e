package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// What scale is made of. Its names are its own, so that a cluster may be up beside it.
const (
	scalePrefix  = "millrace-scale-" // of namespaces and cgroups
	scaleFolder  = "/var/cache/millrace-scale"
	scaleControl = scalePrefix + "control" // etcd, the API server, and who writes to it
	scaleNode    = scalePrefix + "node"    // the proxy under test
	scaleClient  = scalePrefix + "client"  // a pod of that node, which calls Services
	scalePods    = scalePrefix + "pods"    // has the addresses of all endpoints
)

// scaleTools are those of clusterTools that scale needs.
var scaleTools = []string{"etcd", "kube-apiserver", "kube-proxy"}

// scaleSettings are the flags of scale.
type scaleSettings struct {
	services, rounds, changes, amid       int
	pause                                 time.Duration
	proxies, output, millrace, logs, with string
}

func (s *scaleSettings) flags(flags *flag.FlagSet) {
	flags.IntVar(&s.services, "services", 10_000, "how many Services, with two to four endpoints each")
	flags.StringVar(&s.proxies, "proxies", "millrace,nftables,iptables-legacy", "who is measured, of "+strings.Join(proxyNames(), ","))
	flags.IntVar(&s.rounds, "rounds", 3, "how often each has a turn, in random order")
	flags.IntVar(&s.changes, "changes", 34, "how many changes are measured in a turn, each alone")
	flags.IntVar(&s.amid, "amid", 34, "how many are measured while ten others are made every second")
	flags.DurationVar(&s.pause, "pause", 1200*time.Millisecond, "from the arrival of a change to the next one alone; up to a quarter is added")
	flags.StringVar(&s.output, "o", "table", "table or json")
	flags.StringVar(&s.millrace, "millrace", "bin/millrace", "the program, as make build makes it")
	flags.StringVar(&s.with, "with", "", "the JSON of an earlier run, whose values count too: a long measurement in several parts")
	flags.StringVar(&s.logs, "logs", "", "an existing folder that gets what the programs said")
}

func (s *scaleSettings) check() error {
	if s.services < 1 || s.services > mostServices {
		return fmt.Errorf("--services %d: use 1 to %d", s.services, mostServices)
	}
	if s.rounds < 1 || s.changes < 1 || s.amid < 0 || s.pause < 0 {
		return errors.New("--rounds and --changes are at least 1, --amid and --pause are not negative")
	}
	if s.output != "table" && s.output != "json" {
		return fmt.Errorf("-o %s: it is table or json", s.output)
	}
	for name := range strings.SplitSeq(s.proxies, ",") {
		if !slices.Contains(proxyNames(), name) {
			return fmt.Errorf("--proxies %s: %q is none of %s", s.proxies, name, strings.Join(proxyNames(), ", "))
		}
	}
	if _, err := os.Stat(s.millrace); err != nil {
		return fmt.Errorf("find millrace: %w: make build makes it", err)
	}
	return nil
}

// scale measures in another process, in the namespace of the API server, and clears
// up after it, whatever became of it.
func scale(ctx context.Context, settings *scaleSettings, arguments []string) (err error) {
	if err := settings.check(); err != nil {
		return err
	}
	bin, err := build(ctx, toolsOf(scaleTools))
	if err != nil {
		return err
	}
	// An abstract name is gone with the process that has it.
	alone, err := net.Listen("unix", "@"+scalePrefix+"lock")
	if err != nil {
		return fmt.Errorf("scale runs already on this machine: %w", err)
	}
	defer alone.Close()
	if err := clearScale(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, keepLogs(settings.logs), clearScale(context.WithoutCancel(ctx))) }()
	if err := addNamespace(scaleControl); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	full := inside(scaleControl, self, append([]string{"scale-inside", bin}, arguments...)...)
	command := exec.CommandContext(ctx, full.Path, full.Args[1:]...)
	command.Stdout, command.Stderr = os.Stdout, os.Stderr
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) }
	command.WaitDelay = 10 * time.Second
	if command.Run() != nil {
		return errors.New("not measured: it says why above")
	}
	return nil
}

// clearScale removes what is there of a run. It goes by namespaces and cgroups, so
// that it does not matter how the run ended.
func clearScale(ctx context.Context) error {
	if err := clearTurn(ctx); err != nil {
		return err
	}
	if err := removeNamespaces(ctx, scaleControl); err != nil {
		return err
	}
	if err := os.RemoveAll(scaleFolder); err != nil {
		return fmt.Errorf("remove %s: %w", scaleFolder, err)
	}
	return nil
}

// clearTurn removes what a turn made: everything but the API server.
func clearTurn(ctx context.Context) error {
	if err := removeNamespaces(ctx, scaleClient, scalePods, scaleNode); err != nil {
		return err
	}
	node, memory, err := scaleGroups()
	if err != nil {
		return err
	}
	for _, group := range []string{node, memory} {
		if group == "" {
			continue
		}
		if err := until(ctx, group+" to be empty", 30*time.Second, func() error { return removeCgroup(group) }); err != nil {
			return err
		}
	}
	// Programs and maps end with the file system that they are pinned in.
	if err := syscall.Unmount(scaleFolder+"/bpf", 0); err != nil && err != syscall.EINVAL && err != syscall.ENOENT {
		return fmt.Errorf("unmount %s/bpf: %w", scaleFolder, err)
	}
	return os.RemoveAll(scaleFolder + "/run")
}

// removeNamespaces with the processes that are in them: only ours can be.
func removeNamespaces(ctx context.Context, names ...string) error {
	for _, name := range names {
		err := until(ctx, "processes in "+name+" to end", 30*time.Second, func() error {
			left, err := processes(name)
			for _, pid := range left {
				kill(pid)
			}
			if err == nil && len(left) > 0 {
				err = fmt.Errorf("%v are still there", left)
			}
			return err
		})
		if err != nil {
			return err
		}
		if _, err := os.Stat("/run/netns/" + name); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if _, err := output(exec.Command("ip", "netns", "del", name)); err != nil {
			return err
		}
	}
	return nil
}

// scaleGroups are the cgroup of the node in the hierarchy of version 2, which has one
// for its proxy and one for its pods below it, and that of the proxy where memory is
// counted in a hierarchy of its own, or "".
func scaleGroups() (node, memory string, err error) {
	all, err := hierarchies()
	for _, h := range all {
		switch {
		case h.kind == "cgroup2":
			node = filepath.Join(h.path, scalePrefix+"node")
		case filepath.Base(h.path) == "memory":
			memory = filepath.Join(h.path, scalePrefix+"proxy")
		}
	}
	if err == nil && node == "" {
		err = errors.New("this host has no cgroup hierarchy of version 2")
	}
	return node, memory, err
}

// keepLogs copies what the programs said to a folder, if one is named.
func keepLogs(to string) error {
	if to == "" {
		return nil
	}
	logs, err := filepath.Glob(scaleFolder + "/logs/*")
	for _, log := range logs {
		content, readError := os.ReadFile(log)
		err = errors.Join(err, readError, os.WriteFile(filepath.Join(to, filepath.Base(log)), content, 0o644))
	}
	return err
}
