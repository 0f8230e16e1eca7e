// Package cgroup finds the cgroup2 hierarchy of this host, makes and removes
// groups in it, and moves processes into them.
//
// It works where cgroup2 is the only hierarchy and where it is mounted beside
// cgroup1 (hybrid): nothing but cgroup.procs is used, no controller is needed.
// It writes folders below the cgroup2 mount that the caller names.
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// ErrNoCgroup2 says that no cgroup2 hierarchy is mounted.
var ErrNoCgroup2 = errors.New("no cgroup2 hierarchy is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup`, or boot with systemd.unified_cgroup_hierarchy=1")

// Root is where the cgroup2 hierarchy is mounted, read from
// /proc/self/mountinfo (proc(5)): /sys/fs/cgroup on most hosts,
// /sys/fs/cgroup/unified on hybrid ones. In a container with a cgroup namespace of
// its own, the host's hierarchy that was mounted into it has a root above the
// container's, "/../..": of several mounts it is the one that begins farthest up.
func Root() (string, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	defer file.Close()
	return rootIn(file)
}

func rootIn(mounts io.Reader) (string, error) {
	root, highest := "", -1
	lines := bufio.NewScanner(mounts)
	for lines.Scan() {
		// 36 35 0:31 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw
		before, after, ok := strings.Cut(lines.Text(), " - ")
		if !ok || !strings.HasPrefix(after, "cgroup2 ") {
			continue
		}
		fields := strings.Fields(before)
		if len(fields) < 5 || strings.Trim(fields[3], "/.") != "" {
			continue // a part of the hierarchy
		}
		if up := strings.Count(fields[3], ".."); up > highest {
			root, highest = fields[4], up
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	if root == "" {
		return "", ErrNoCgroup2
	}
	return root, nil
}

// SeenFrom calls f on a thread of its own in the cgroup namespace at path, such as
// /proc/1/ns/cgroup: what /proc/PID/cgroup says there is as those see it who are in that
// namespace (cgroup_namespaces(7)). A container's own says only how far others are from
// it. It takes CAP_SYS_ADMIN.
func SeenFrom(path string, f func()) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("enter cgroup namespace: %w", err)
	}
	defer file.Close()
	return netns.OnThread(func() error {
		if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWCGROUP); err != nil {
			return fmt.Errorf("enter cgroup namespace %s: %w", path, err)
		}
		f()
		return nil
	})
}

// Create makes the group at path and its parents. An existing one is no error.
func Create(path string) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return fmt.Errorf("create cgroup %s: %w", path, err)
	}
	return nil
}

// Add moves a process, by its pid, into the group at path. A pid of 0 is the
// calling process. Sockets that the process already has keep their old group.
func Add(path string, pid int) error {
	err := os.WriteFile(filepath.Join(path, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644)
	if err != nil {
		return fmt.Errorf("move process %d into cgroup %s: %w", pid, path, err)
	}
	return nil
}

// Processes lists the pids in the group at path and in every group below it.
func Processes(path string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(path, func(p string, entry fs.DirEntry, err error) error {
		if err != nil || entry.Name() != "cgroup.procs" {
			return ignoreGone(err)
		}
		data, err := os.ReadFile(p)
		for _, field := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return ignoreGone(err)
	})
	if err != nil {
		return nil, fmt.Errorf("list cgroup %s: %w", path, err)
	}
	return pids, nil
}

// Remove kills every process in the group at path and below, waits up to five
// seconds for them to go, and removes the groups. A group that does not exist
// is no error. Only call it on a group of your own making.
func Remove(path string) error {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		pids, err := Processes(path)
		if err != nil {
			return fmt.Errorf("remove cgroup %s: %w", path, err)
		}
		for _, pid := range pids {
			if pid != os.Getpid() {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		if err = removeTree(path); err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup %s: %w", path, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// removeTree removes the groups from the leaves up; their files go with them.
func removeTree(path string) error {
	var groups []string
	err := filepath.WalkDir(path, func(p string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			groups = append(groups, p)
		}
		return ignoreGone(err)
	})
	if err != nil {
		return err
	}
	sort.Sort(sort.Reverse(sort.StringSlice(groups)))
	for _, group := range groups {
		if err := unix.Rmdir(group); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
