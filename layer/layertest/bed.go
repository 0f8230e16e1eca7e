// Package layertest holds what every layer is tested with: a Bed, which is a
// place in the kernel of the test's own, and the Laws that all layers keep.
//
// A Bed is a network namespace with loopback up, a cgroup that the test process
// is moved into, and a bpf file system. All of it goes with the test.
package layertest

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/netns"
)

// Bed is a place in the kernel for one test.
type Bed struct {
	t *testing.T
	// NetNS is the path of the namespace, Cgroup of the cgroup2 folder, BPF of
	// the bpf file system.
	NetNS, Cgroup, BPF string
}

// NewBed makes a bed and moves this process into its cgroup until the test
// ends. Tests with beds cannot run in parallel. Without root the test is
// skipped.
func NewBed(t *testing.T) *Bed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace, a cgroup and a bpf file system")
	}
	b := &Bed{t: t, NetNS: filepath.Join(t.TempDir(), "net"), BPF: t.TempDir()}
	must(t, netns.Create(b.NetNS))
	t.Cleanup(func() { must(t, netns.Remove(b.NetNS)) })
	must(t, b.Inside(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	}))
	must(t, unix.Mount("bpf", b.BPF, "bpf", 0, "mode=0700"))
	t.Cleanup(func() { must(t, unix.Unmount(b.BPF, unix.MNT_DETACH)) })
	b.joinCgroup()
	return b
}

func (b *Bed) joinCgroup() {
	root, err := cgroup.Root()
	must(b.t, err)
	home, err := ownCgroup()
	must(b.t, err)
	b.Cgroup = filepath.Join(root, fmt.Sprintf("millrace-test-%d", os.Getpid()))
	must(b.t, cgroup.Create(b.Cgroup))
	b.t.Cleanup(func() {
		must(b.t, cgroup.Add(filepath.Join(root, home), 0))
		must(b.t, cgroup.Remove(b.Cgroup))
	})
	must(b.t, cgroup.Add(b.Cgroup, 0))
}

// Inside runs f in the bed's namespace.
func (b *Bed) Inside(f func() error) error { return netns.Do(b.NetNS, f) }

// AddAddress gives the bed's loopback device an address, "10.1.0.1/32".
func (b *Bed) AddAddress(cidr string) {
	b.t.Helper()
	must(b.t, b.Inside(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		address, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		address.Flags = unix.IFA_F_NODAD
		return netlink.AddrAdd(lo, address)
	}))
}

// ownCgroup is this process's cgroup2 group, from its mount point on.
func ownCgroup() (string, error) {
	file, err := os.Open("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if path, ok := strings.CutPrefix(lines.Text(), "0::"); ok {
			return path, nil
		}
	}
	return "", fmt.Errorf("no cgroup2 entry in /proc/self/cgroup")
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
