package dir

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// process is a Source that looks when it is told to.
type process struct {
	t *testing.T
	*Source
}

func start(t *testing.T, path string) *process {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return &process{t, s}
}

// look is the Snapshot of what is there now.
func (p *process) look() string {
	p.scan(nil)
	return dump(p.files.cluster.Snapshot())
}

// wants looks and compares how much is unread.
func (p *process) wants(when string, unread int) {
	p.t.Helper()
	text := p.look()
	if n := p.files.cluster.Snapshot().Unread; n != unread {
		p.t.Errorf("%s %d are unread and should be %d:\n%s", when, n, unread, text)
	}
}

// TestUnread breaks a file in every way before and after a process has seen what
// it said.
func TestUnread(t *testing.T) {
	const pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n"
	good := svc("a", 1)
	for _, test := range []struct {
		about, text string
		unread      int
	}{
		{"faultless", svc("a", 2) + next + pod, 0},
		{"nothing", "# nothing\n", 0},
		{"no YAML", good + next + "kind: [Service\n" + next + pod, 1},
		{"two documents that are no YAML", "kind: [\n" + next + "kind: {\n", 2},
		{"no UTF-8", "\xff\xfe", 1},
		{"no object", "just text\n", 1},
		{"no kind", "apiVersion: v1\nmetadata: {name: a}\n", 1},
		{"no apiVersion", "kind: Service\nmetadata: {name: a}\n", 1},
		{"no name", "apiVersion: v1\nkind: Service\n", 1},
		{"no usable name", strings.Replace(good, "name: a", "name: A", 1), 1},
		{"a former apiVersion", "apiVersion: extensions/v1beta1\nkind: Deployment\nmetadata: {name: d}\n", 1},
		{"another apiVersion", "apiVersion: example.com/v1\nkind: Service\nmetadata: {name: a}\n", 0},
		{"another kind", "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n", 0},
		{"text for a number", strings.Replace(good, "port: 1", "port: eighty", 1), 1},
		{"port 0", svc("a", 0), 1},
		{"port 0 and no YAML", svc("a", 0) + next + "kind: [", 2},
		{"an unknown field", strings.Replace(good, "port: 1", "port: 1, prot: 2", 1), 0},
		{"a field that is there twice", strings.Replace(good, "port: 1", "port: 1, port: 2", 1), 0},
		{"the same object twice", good + next + svc("a", 2), 0},
		{"the same object twice, the second with a fault", good + next + svc("a", 0), 0},
		{"the same object twice, the first with a fault", svc("a", 0) + next + good, 1},
		{"a list of no items", "apiVersion: v1\nkind: List\nitems: {}\n", 1},
		{"a list in a list", "apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: List}, 7]\n", 2},
		{"no JSON", `{"kind": "List", "apiVersion": "v1", "items": [` + "\n" + next + good, 1},
		{"more problems than are told", strings.Repeat("x\n"+next, maxProblems+50), maxProblems + 50},
		{"an object that is too large", pod + "spec: {containers: [" + strings.Repeat("{},", maxObjectValues) + "]}\n", 1},
	} {
		t.Run(test.about, func(t *testing.T) {
			t.Chdir(t.TempDir())
			write(t, "a.yaml", test.text)
			p := start(t, ".")
			p.wants("at first", test.unread)
			p.wants("at a second look", test.unread)
			write(t, "a.yaml", good)
			p.wants("mended", 0)
			write(t, "a.yaml", test.text)
			if p.wants("broken again", 0); test.unread > 0 && !strings.Contains(p.look(), "1/tcp") {
				t.Errorf("what was unread was not known:\n%s", p.look())
			}
			start(t, ".").wants("to a new process", test.unread)
			write(t, "b.yaml", svc("b", 1))
			p.wants("with another file", 0)
			remove(t, "a.yaml")
			p.wants("with the file removed", 0)
			write(t, "a.yaml", test.text)
			p.wants("with the file back", test.unread)
			remove(t, "a.yaml")
			p.wants("with the file removed again", 0)
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

// TestUnreadFiles puts what cannot be read at all in the place of a file.
func TestUnreadFiles(t *testing.T) {
	for about, bad := range map[string]func(path string) error{
		"too large": func(path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, MaxFile+1))
		},
		"a link to nowhere": func(path string) error { return os.Symlink("nowhere", path) },
		"a pipe":            func(path string) error { return unix.Mkfifo(path, 0o600) },
	} {
		t.Run(about, func(t *testing.T) {
			t.Chdir(t.TempDir())
			spoil := func() {
				remove(t, "a.yaml")
				if err := bad("a.yaml"); err != nil {
					t.Fatal(err)
				}
			}
			spoil()
			p := start(t, ".")
			p.wants("at first", 1)
			remove(t, "a.yaml")
			p.wants("removed", 0)
			spoil()
			p.wants("back", 1)
			remove(t, "a.yaml")
			write(t, "a.yaml", "kind: [")
			p.wants("with text that cannot be read either", 1)
			write(t, "a.yaml", svc("a", 1))
			p.wants("mended", 0)
			spoil()
			if p.wants("broken again", 0); !strings.Contains(p.look(), "1/tcp") {
				t.Errorf("what the file said is lost:\n%s", p.look())
			}
			start(t, ".").wants("to a new process", 1)
		})
	}
}

// TestUnreadFolders takes away the right to read files and folders.
func TestUnreadFolders(t *testing.T) {
	for _, root := range []string{"in", "in/"} {
		t.Run(root, func(t *testing.T) {
			t.Chdir(t.TempDir())
			write(t, "in/sub/deeper/a.yaml", svc("a", 1))
			write(t, "in/b.yaml", svc("b", 1))
			bindByModes(t)
			p, never := start(t, root), start(t, root)
			p.wants("with every right", 0)
			for _, path := range []string{"in/b.yaml", "in/sub/deeper", "in/sub", "in"} {
				info, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				chmod(t, path, 0)
				p.wants("without "+path, 0)
				if text := p.look(); !strings.Contains(text, "permission denied") || strings.Count(text, "1/tcp") != 2 {
					t.Errorf("without %s there is\n%s", path, text)
				}
				start(t, root).wants("to a new process without "+path, 1)
				chmod(t, path, info.Mode())
				p.wants("with "+path, 0)
			}
			chmod(t, "in", 0o600) // lists names, and says nothing of what has them
			if p.wants("without in/sub", 0); strings.Count(p.look(), "1/tcp") != 2 {
				t.Errorf("in that cannot be entered lost something:\n%s", p.look())
			}
			start(t, root).wants("to a new process that cannot enter in", 2)
			chmod(t, "in", 0o755)
			chmod(t, "in/sub", 0)
			never.wants("before sub was read", 1)
			chmod(t, "in/sub", 0o755)
			remove(t, "in/sub")
			never.wants("with sub removed", 0)
			if text := never.look(); strings.Contains(text, "problem") {
				t.Errorf("a folder that is gone is still a problem:\n%s", text)
			}
		})
	}
}

func chmod(t *testing.T, path string, mode fs.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// bindByModes makes file modes count for the rest of the test also where it runs
// as root, as long as it stays on its thread.
func bindByModes(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var was [2]unix.CapUserData
	if err := unix.Capget(&head, &was[0]); err != nil {
		t.Fatal(err)
	}
	now := was
	now[0].Effective &^= 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH
	if err := unix.Capset(&head, &now[0]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Capset(&head, &was[0]); err != nil {
			t.Error(err)
		}
	})
}

// TestUnreadRoot takes the whole path away before the first look at it and after.
func TestUnreadRoot(t *testing.T) {
	for _, path := range []string{"in", "one"} {
		t.Run(path, func(t *testing.T) {
			t.Chdir(t.TempDir())
			write(t, "in/a.yaml", svc("a", 1))
			write(t, "one", svc("b", 1))
			early, late := start(t, path), start(t, path)
			early.wants("at first", 0)
			if err := os.Rename(path, "away"); err != nil {
				t.Fatal(err)
			}
			early.wants("gone after a look", 0)
			late.wants("gone before the first look", 1)
			late.wants("gone before the second look", 1)
			if err := os.Rename("away", path); err != nil {
				t.Fatal(err)
			}
			early.wants("back", 0)
			late.wants("back", 0)
		})
	}
}

// TestRestart changes a few files at random and asks after each change what a
// new process would say. It may differ from the old one, which knows more, only
// where it says that something is unread.
func TestRestart(t *testing.T) {
	texts := []string{
		svc("a", 1), svc("a", 2), svc("a", 0), svc("b", 1) + next + svc("c", 1), svc("b", 0) + next + svc("c", 2),
		svc("a", 3) + next + "kind: [", "\xff", "", svc("c", 3) + next + svc("c", 0), "apiVersion: v1\nkind: Service\n",
	}
	paths := []string{"1.yaml", "2.yaml", "sub/3.yaml"}
	differed := 0
	for seed := range uint64(60) {
		random := rand.New(rand.NewPCG(seed, 0))
		t.Chdir(t.TempDir())
		p := start(t, ".")
		for step := range 15 {
			path := paths[random.IntN(len(paths))]
			switch random.IntN(8) {
			case 0:
				remove(t, path)
			case 1:
				remove(t, path)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink("nowhere", path)); err != nil {
					t.Fatal(err)
				}
			default:
				write(t, path, texts[random.IntN(len(texts))])
			}
			old, fresh := p.look(), readAll(t, ".")
			unread := p.files.cluster.Snapshot().Unread
			if fresh.Unread == 0 && (unread != 0 || old != dump(fresh)) {
				t.Fatalf("seed %d, step %d: a new process says\n%sand has read all, but the old one says\n%s", seed, step, dump(fresh), old)
			}
			if old != dump(fresh) {
				differed++
			}
		}
	}
	if differed == 0 {
		t.Error("a new process never knew less than an old one")
	}
}
