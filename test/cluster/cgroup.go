package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// hierarchy of cgroups: one of version 1, or the one of version 2.
type hierarchy struct {
	path    string // where it is mounted: /sys/fs/cgroup/memory
	kind    string // cgroup or cgroup2
	options string // for mount: memory, or none,name=systemd
}

// hierarchies of this host, as /proc/self/mountinfo lists them.
func hierarchies() (all []hierarchy, err error) {
	content, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(content)) {
		mount, system, _ := strings.Cut(line, " - ")
		fields, kinds := strings.Fields(mount), strings.Fields(system)
		if len(fields) < 5 || len(kinds) < 3 || kinds[0] != "cgroup" && kinds[0] != "cgroup2" || !strings.HasPrefix(fields[4], "/sys/fs/cgroup") {
			continue
		}
		all = append(all, hierarchy{path: fields[4], kind: kinds[0], options: mountOptions(kinds[2])})
	}
	return all, nil
}

// controllersInVersion1 says so if they are not: kubelet and runc need them, and
// on a host with version 2 alone they would have to be handed on from its root.
func controllersInVersion1() error {
	all, err := hierarchies()
	if err == nil && !slices.ContainsFunc(all, func(h hierarchy) bool { return h.kind == "cgroup" }) {
		err = errors.New("start nodes: this host has no cgroup hierarchy of version 1, and nodes on version 2 alone are not supported yet")
	}
	return err
}

// mountOptions keeps of "rw,xattr,name=systemd" what chooses the hierarchy. One
// without a controller has to be asked for as such.
func mountOptions(super string) string {
	var kept []string
	for option := range strings.SplitSeq(super, ",") {
		switch {
		case strings.HasPrefix(option, "name="):
			kept = append(kept, "none", option)
		case !slices.Contains([]string{"rw", "ro", "xattr", "nsdelegate", "memory_recursiveprot", "release_agent"}, strings.SplitN(option, "=", 2)[0]):
			kept = append(kept, option)
		}
	}
	return strings.Join(kept, ",")
}

// joinCgroups makes a cgroup for a node in each hierarchy, and moves this process
// there.
func joinCgroups(n node) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		group := filepath.Join(h.path, n.namespace())
		if err := os.Mkdir(group, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup: %w", err)
		}
		// A cpuset accepts nobody before it has been filled.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(h.path, file))
			if err == nil && h.kind == "cgroup" {
				err = os.WriteFile(filepath.Join(group, file), value, 0)
			}
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("fill cgroup: %w", err)
			}
		}
		if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	return nil
}

// removeCgroups of all nodes, with the processes that are still there: only ours
// can be.
func removeCgroups(ctx context.Context) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		for _, n := range allNodes() {
			group := filepath.Join(h.path, n.namespace())
			err := until(ctx, "cgroup "+group+" to be empty", 30*time.Second, func() error { return removeCgroup(group) })
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func removeCgroup(group string) error {
	var groups []string
	err := filepath.WalkDir(group, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			groups = append(groups, path)
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, group := range slices.Backward(groups) { // children first
		content, _ := os.ReadFile(filepath.Join(group, "cgroup.procs"))
		for _, pid := range strings.Fields(string(content)) {
			if number, err := strconv.Atoi(pid); err == nil {
				kill(number)
			}
		}
		if removed := syscall.Rmdir(group); removed != nil && removed != syscall.ENOENT {
			err = errors.Join(err, fmt.Errorf("remove %s: %w", group, removed))
		}
	}
	return err
}

// processes in one of our network namespaces; those of pods have their own.
func processes(namespace string) (pids []int, err error) {
	if _, err := os.Stat("/run/netns/" + namespace); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	text, err := output(exec.Command("ip", "netns", "pids", namespace))
	for _, pid := range strings.Fields(text) {
		number, err := strconv.Atoi(pid)
		if err != nil {
			return nil, fmt.Errorf("read pids of %s: %w", namespace, err)
		}
		pids = append(pids, number)
	}
	return pids, err
}

// kill at once. A process that is gone already is what was wanted; one that stays
// is seen by who asks again.
func kill(pid int) { _ = syscall.Kill(pid, syscall.SIGKILL) }
