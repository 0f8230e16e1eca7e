package cgroup

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// own is what the calling thread sees of its own process's cgroup2 group.
func own() string {
	text, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(text)) {
		if path, of := strings.CutPrefix(line, "0::"); of {
			return strings.TrimSpace(path)
		}
	}
	return ""
}

// Whose namespace it is decides how a group is called; the caller sees what it saw before.
func TestSeenFrom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes cgroups")
	}
	root, err := Root()
	if err != nil {
		t.Fatal(err)
	}
	top := filepath.Join(root, fmt.Sprintf("millrace-cgroup-test-%d", os.Getpid()))
	defer Remove(top)
	if err := Create(filepath.Join(top, "pod")); err != nil {
		t.Fatal(err)
	}
	group, err := os.Open(filepath.Join(top, "pod"))
	if err != nil {
		t.Fatal(err)
	}
	defer group.Close()
	container := exec.Command("sleep", "1000")
	container.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd()), Cloneflags: unix.CLONE_NEWCGROUP}
	if err := container.Start(); err != nil {
		t.Fatal(err)
	}
	defer container.Wait()
	defer container.Process.Kill()
	before, there := own(), ""
	if err := SeenFrom(fmt.Sprintf("/proc/%d/ns/cgroup", container.Process.Pid), func() { there = own() }); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(there, "/../..") || own() != before {
		t.Errorf("from the container it is %q, and now %q, which was %q", there, own(), before)
	}
	if err := SeenFrom("/proc/self/ns/cgroup", func() { there = own() }); err != nil || there != before {
		t.Errorf("from its own it is %q, not %q: %v", there, before, err)
	}
	if err := SeenFrom("/absent", func() { t.Error("it was called") }); err == nil {
		t.Error("no error")
	}
}
