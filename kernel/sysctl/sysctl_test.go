package sysctl

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
)

const closeWait = "net.netfilter.nf_conntrack_tcp_timeout_close_wait"

// newNetns is a network namespace of the test's own; it has settings of its own.
func newNetns(t *testing.T) Tree {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	path := filepath.Join(t.TempDir(), "net")
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netns.Remove(path) })
	return Tree{Root: "/proc/sys", Netns: path}
}

// A setting that every kernel has, in a namespace of its own: others keep theirs.
func TestWriteReadsBackInItsNamespace(t *testing.T) {
	tree, other := newNetns(t), newNetns(t)
	const name = "net.ipv4.tcp_fin_timeout"
	before, err := other.Read(name)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tree.Write(name, "17"); err != nil || got != "17" {
		t.Fatalf("%q, %v", got, err)
	}
	if got, err := tree.Read(name); err != nil || got != "17" {
		t.Errorf("%q, %v; it was set to 17", got, err)
	}
	if got, _ := other.Read(name); got != before || got == "17" {
		t.Errorf("another namespace has %q, before %q", got, before)
	}
}

func TestSeveralNumbersHaveOneSpaceBetweenThem(t *testing.T) {
	tree := newNetns(t)
	if _, err := tree.Write("net.ipv4.ip_local_port_range", "20000 30000"); err != nil {
		t.Error(err)
	}
}

// Each reason for which the kernel keeps somebody from a setting is told apart.
func TestWhyNot(t *testing.T) {
	tree := newNetns(t)
	for _, row := range []struct {
		name, value string
		want        error
	}{
		{"net.netfilter.nf_conntrack_absent", "1", ErrAbsent},
		{"net.absent", "1", ErrAbsent},
		{"net.ipv4.tcp_fin_timeout", "much", ErrRefused},
		{"net.ipv4.tcp_fin_timeout", "99999999999", ErrRefused},
	} {
		if got, err := tree.Write(row.name, row.value); !errors.Is(err, row.want) {
			t.Errorf("%s = %s: %q, %v; want: %v", row.name, row.value, got, err, row.want)
		}
	}
	if _, err := tree.Read("net.absent"); !errors.Is(err, ErrAbsent) {
		t.Errorf("read what is absent: %v", err)
	}
	// Of a file that no namespace but the first may write: what is there, so that
	// nothing changes whatever happens.
	const whole = "net.core.rmem_max"
	value, err := tree.Read(whole)
	if errors.Is(err, ErrAbsent) {
		return // older kernels show it in the first namespace alone
	}
	if _, err := tree.Write(whole, value); !errors.Is(err, ErrNotHere) {
		t.Errorf("write %s in a namespace: %v, want: %v", whole, err, ErrNotHere)
	}
}

// A container that is not privileged sees /proc/sys like this.
func TestReadOnlyFileSystem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a file system")
	}
	root := t.TempDir()
	if err := unix.Mount("fake", root, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	plant(t, root, closeWait, "60")
	if err := unix.Mount("fake", root, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	_, err := Tree{Root: root}.Write(closeWait, "3600")
	if !errors.Is(err, ErrReadOnly) {
		t.Errorf("%v, want: %v", err, ErrReadOnly)
	}
}

// A kernel that takes a value and makes another of it cannot be had at will, but a
// file that forgets what was written can.
func TestValueThatIsNotKept(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "net"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/null", filepath.Join(root, "net", "forgets")); err != nil {
		t.Fatal(err)
	}
	got, err := Tree{Root: root}.Write("net.forgets", "7")
	var clamped *Clamped
	if !errors.As(err, &clamped) || got != "" || clamped.Wanted != "7" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestMissingPrivilegeIsNamed(t *testing.T) {
	tree := newNetns(t)
	err := asNobody(tree.Netns, func() error {
		_, err := Tree{Root: "/proc/sys"}.Write(closeWait, "60")
		return err
	})
	var privilege *need.Privilege
	if !errors.As(err, &privilege) {
		t.Errorf("%v, want what is lacking", err)
	}
}

// asNobody runs f in a namespace, on a thread that is nobody's and is not used
// again. Root without capabilities would not do: it may write as the files' owner.
func asNobody(path string, f func() error) error {
	return netns.Do(path, func() error {
		const nobody = 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			return errno
		}
		return f()
	})
}

func TestFilesThatSetIt(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"etc/sysctl.d/10-a.conf":     "# " + closeWait + " = 1\nnet.ipv4.ip_forward=1\n",
		"etc/sysctl.d/20-b.conf":     "-net/netfilter/nf_conntrack_tcp_timeout_close_wait = 120\n",
		"usr/lib/sysctl.d/50-c.conf": "net.netfilter.nf_conntrack_tcp_timeout_* = 30\n",
		"etc/sysctl.conf":            closeWait + "=60\n",
		"etc/sysctl.d/README":        closeWait + "=60\n",
	} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want := []Line{{"/etc/sysctl.d/20-b.conf", "120"}, {"/usr/lib/sysctl.d/50-c.conf", "30"}, {"/etc/sysctl.conf", "60"}}
	if got := linesBelow(root, closeWait); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func plant(t *testing.T, root, name, value string) {
	t.Helper()
	path := Tree{Root: root}.path(name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(value+"\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
}
