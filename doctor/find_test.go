package doctor

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func names(f *Facts) (names []string) {
	for _, s := range f.Spaces {
		names = append(names, s.Name)
	}
	return names
}

// What is not seen is said, and no check passes because of it.
func TestWhatIsHidden(t *testing.T) {
	for _, row := range []struct {
		what   string
		change func(*world)
		spaces []string
		unseen string
		status Status
	}{
		{"all is seen", func(*world) {}, []string{"node", "pod web-1"}, "", OK},
		{"not root", func(w *world) { w.privileged = errors.New("this process lacks CAP_SYS_PTRACE") }, []string{"node"}, "lacks CAP_SYS_PTRACE", Skip},
		{"in a node that is a container", func(w *world) { w.files["proc/2/comm"] = "sleep" }, []string{"node", "pod web-1"}, "", OK},
		{"in a container", func(w *world) { w.files["proc/2/comm"], w.files["proc/30/comm"] = "sleep", "bash" }, []string{"node", "pod web-1"}, "hostPID: true", Skip},
		{"Kata", func(w *world) { w.files["proc/41/comm"] = "qemu-system-x86" }, []string{"node"}, "pod web-1: its sockets are in the kernel of qemu-system-x86", OK},
		{"no pod", func(w *world) { w.files["proc/41/cgroup"] = "0::/user.slice\n" }, []string{"node", "pid 40 (pause)"}, "", OK},
		{"a name that is none", func(w *world) { w.files["proc/41/root/etc/hostname"] = "\x1b[31mred\n" }, []string{"node", "pid 40 (pause)"}, "", OK},
		{"a name of the terminal's", func(w *world) { w.files["proc/41/cgroup"], w.files["proc/40/comm"] = "", "\x1b[2J" }, []string{"node", "pid 40 (?[2J)"}, "", OK},
		{"a mount", func(w *world) {
			w.files["proc/41/cgroup"], w.files["proc/self/mountinfo"] = "", "9 8 0:4 net:[4026532001] /run/netns/blue rw shared:1 - nsfs nsfs rw\n"
		}, []string{"node", "namespace blue"}, "", OK},
	} {
		t.Run(row.what, func(t *testing.T) {
			w := healthy()
			row.change(w)
			results, facts := w.examine(t, one(t, "HS-05"))
			if !slices.Equal(names(facts), row.spaces) {
				t.Errorf("namespaces %q, not %q", names(facts), row.spaces)
			}
			if all := strings.Join(facts.Unseen, "; "); !strings.Contains(all, row.unseen) || row.unseen == "" && all != "" {
				t.Errorf("not seen is %q, not %q", all, row.unseen)
			}
			if r := results["HS-05"]; r.Status != row.status {
				t.Errorf("%s, not %s:\n%s", r.Status, row.status, texts(r))
			}
		})
	}
}

// A pod that ends between the readings is no matter; one that may not be entered is.
func TestNamespacesThatCannotBeEntered(t *testing.T) {
	for _, row := range []struct {
		err    error
		status Status
	}{{&fs.PathError{Op: "open", Path: "ns", Err: fs.ErrNotExist}, OK}, {&fs.PathError{Op: "setns", Path: "ns", Err: fs.ErrPermission}, Skip}} {
		checks := one(t, "HS-05")
		h := healthy().host(t, checks)
		enter, entered := h.within, 0
		h.within = func(s *Space, read func(string) error) error {
			if s.path != "" {
				if entered++; entered == 2 {
					return row.err
				}
			}
			return enter(s, read)
		}
		facts, err := h.Read(t.Context(), checks, time.Millisecond, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if r := Run(facts, checks)[0]; r.Status != row.status || !slices.Equal(names(facts), []string{"node"}) {
			t.Errorf("%v: %s in %q:\n%s", row.err, r.Status, names(facts), texts(r))
		}
	}
}

// In a lab's node, whose namespace is not that of the host's first process, the host's
// other namespaces are none of the node's.
func TestOnlyNamespacesOfThisNode(t *testing.T) {
	for number, want := range map[int][]string{0: {"node", "pod web-1"}, 4: {"node"}} {
		w := healthy()
		w.inside = true
		w.pod.devices[0].PeerNamespace = number
		_, facts := w.examine(t, one(t, "HS-05"))
		if !slices.Equal(names(facts), want) {
			t.Errorf("a pair that leads to namespace %d: %q, not %q", number, names(facts), want)
		}
	}
}

// What is global is not to be seen from such a node, which is no fault of it.
func TestWhatIsTheHostsOnly(t *testing.T) {
	w := healthy()
	w.inside = true
	delete(w.node.files, tcpMem)
	results, _ := w.examine(t, one(t, "HS-13"))
	if r := results["HS-13"]; r.Status != Skip || !strings.Contains(texts(r), "it is the host's") {
		t.Errorf("%s:\n%s", r.Status, texts(r))
	}
}

func TestReadEndsWhenItIsTold(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	checks := one(t, "HS-05")
	if _, err := healthy().host(t, checks).Read(ctx, checks, time.Hour, io.Discard); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Error(err)
	}
	if _, err := (&Host{root: t.TempDir()}).Read(t.Context(), checks, time.Hour, io.Discard); err == nil || !strings.Contains(err.Error(), "is /proc mounted?") {
		t.Error(err)
	}
}

// A file that a pod chose is neither waited for nor followed out of the pod.
func TestFilesOfOthers(t *testing.T) {
	base := t.TempDir()
	put(t, filepath.Join(base, "secret"), "nameserver 1.1.1.1\n")
	inside := filepath.Join(base, "root/etc")
	put(t, filepath.Join(inside, "real"), "nameserver 10.96.0.10\n")
	for link, to := range map[string]string{"out": "../../secret", "absolute": filepath.Join(base, "secret"), "within": "real"} {
		if err := os.Symlink(to, filepath.Join(inside, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(inside, "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"real": true, "within": true, "out": false, "absolute": false, "pipe": false, ".": false} {
		text, err := readBounded(filepath.Join(base, "root"), "etc/"+name)
		if (err == nil) != want || want && text != "nameserver 10.96.0.10\n" {
			t.Errorf("%s: %q, %v", name, text, err)
		}
	}
}
