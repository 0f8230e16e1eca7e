package cgroup

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

// Remove ends every process in a tree of groups and takes the tree away.
func TestRemoveEndsWhatIsInside(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes cgroups")
	}
	root, err := Root()
	if err != nil {
		t.Fatal(err)
	}
	top := filepath.Join(root, fmt.Sprintf("millrace-cgroup-test-%d", os.Getpid()))
	defer Remove(top)
	deep := filepath.Join(top, "node", "pod")
	if err := Create(deep); err != nil {
		t.Fatal(err)
	}
	sleeper := exec.Command("sleep", "1000")
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	if err := Add(deep, sleeper.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if pids, err := Processes(top); err != nil || !slices.Equal(pids, []int{sleeper.Process.Pid}) {
		t.Errorf("Processes: %v, %v; want %d", pids, err, sleeper.Process.Pid)
	}
	ended := make(chan error, 1)
	go func() { ended <- sleeper.Wait() }()
	if err := Remove(top); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil {
		t.Error("the process ended by itself")
	}
	if _, err := os.Stat(top); !os.IsNotExist(err) {
		t.Errorf("the group is still there: %v", err)
	}
	if err := Remove(top); err != nil {
		t.Errorf("removing what is not there: %v", err)
	}
}
