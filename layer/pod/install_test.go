package pod

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/version"

	"github.com/millrace/millrace/layer/pod/pool"
	"github.com/millrace/millrace/model"
)

// withFolders gives a node a runtime's folders, with somebody else's plugin and list.
func (b *town) withFolders() {
	b.t.Helper()
	folder := filepath.Dir(b.settings.Folder)
	b.settings.Plugins, b.settings.Networks = filepath.Join(folder, "bin"), filepath.Join(folder, "net.d")
	for _, file := range []string{filepath.Join(b.settings.Plugins, "loopback"), filepath.Join(b.settings.Networks, "10-other.conflist")} {
		must(b.t, os.MkdirAll(filepath.Dir(file), 0o755))
		must(b.t, os.WriteFile(file, []byte("{}"), 0o644))
	}
}

// inFolders are the names of the files there.
func (b *town) inFolders() (names []string) {
	b.t.Helper()
	for _, folder := range []string{b.settings.Plugins, b.settings.Networks} {
		found, err := os.ReadDir(folder)
		must(b.t, err)
		for _, entry := range found {
			names = append(names, entry.Name())
		}
	}
	return names
}

// The plugin and the list that names it come as soon as pods can begin, not before; are put
// back when somebody alters or deletes them; and go with the layer, with what a crash left.
func TestPluginIsInstalled(t *testing.T) {
	b := newTown(t)
	b.withFolders()
	others := []string{"loopback", "10-other.conflist"}
	l := b.open() // the node has no ranges yet
	if names := b.inFolders(); !slices.Equal(names, others) {
		t.Fatalf("before there are ranges there is %q", names)
	}
	changes := b.apply(l, "10.244.1.0/24")
	file, conf := b.settings.files()[0], b.settings.files()[1]
	if n := len(changes); n < 3 || changes[n-2].Subject != file || changes[n-1].Subject != conf {
		t.Errorf("the files are not last, in this order: %v", changes)
	}
	if same, err := sameBytes(string(file), "/proc/self/exe"); err != nil || !same {
		t.Errorf("the plugin is not this program: %v", err)
	}
	for path, mode := range map[string]fs.FileMode{string(file): 0o755, string(conf): 0o644} {
		if info, err := os.Stat(path); err != nil || info.Mode() != mode {
			t.Errorf("%s has %v, %v", path, info.Mode(), err)
		}
	}
	if changes := b.apply(l, "10.244.1.0/24"); len(changes) > 0 {
		t.Errorf("again: %v", changes)
	}
	for what, damage := range map[string]func() error{
		"an older plugin": func() error { return pool.Replace(string(file), 0o755, strings.NewReader("old")) },
		// of the same length, so that only reading tells it
		"another plugin": func() error {
			info, err := os.Stat("/proc/self/exe")
			must(t, err)
			return pool.Replace(string(file), 0o755, strings.NewReader(strings.Repeat("x", int(info.Size()))))
		},
		"one that cannot be run": func() error { return os.Chmod(string(file), 0o644) },
		"no plugin":              func() error { return os.Remove(string(file)) },
		"another list":           func() error { return os.WriteFile(string(conf), []byte("{}"), 0o644) },
		"no list":                func() error { return os.Remove(string(conf)) },
		"portmap":                func() error { return os.WriteFile(filepath.Join(b.settings.Plugins, "portmap"), nil, 0o755) },
	} {
		must(t, damage())
		if changes := b.apply(l, "10.244.1.0/24"); len(changes) != 1 {
			t.Errorf("%s: %v", what, changes)
		}
	}
	must(t, l.Close())
	must(t, os.WriteFile(pool.Half(string(file)), nil, 0o755)) // of a crash
	_, err := New(b.settings).Remove()
	must(t, err)
	if names := b.inFolders(); !slices.Equal(names, []string{"loopback", "portmap", "10-other.conflist"}) {
		t.Errorf("after the removal there is %q", names)
	}
}

// The list names what the runtime's own versions know, what a runtime may ask for one pod,
// and where hostPorts are not served here the plugin portmap, if that is there; a socket only
// where it is not the usual one.
func TestListForRuntimes(t *testing.T) {
	s := Settings{Plugins: t.TempDir(), Networks: t.TempDir(), Socket: "/run/millrace/agent/cni.sock"}
	i := installation{settings: s}
	if text := string(i.list()); strings.Contains(text, "socket") || strings.Contains(text, "portmap") || !strings.Contains(text, `"1.1.0"`) || !strings.Contains(text, `"bandwidth": true`) {
		t.Error(text)
	}
	must(t, os.Symlink("/absent", filepath.Join(s.Plugins, "portmap")))
	i.settings.Socket = "/x/cni.sock"
	text := string(i.list())
	if !strings.Contains(text, `"socket": "/x/cni.sock"`) || strings.Contains(text, "1.1.0") || strings.Index(text, `"portmap"`) < strings.Index(text, `"millrace"`) {
		t.Error(text)
	}
	i.settings.HostPorts = func([]model.HostPort) {}
	if own := string(i.list()); strings.Contains(own, "portmap\"") || !strings.Contains(own, `"portMappings": true`) || !strings.Contains(own, `"1.1.0"`) {
		t.Errorf("where hostPorts are served here: %s", own)
	}
	if got, err := (&version.ConfigDecoder{}).Decode([]byte(text)); err != nil || got != "1.0.0" {
		t.Errorf("a runtime reads version %s, %v", got, err)
	}
	if files := (Settings{}).files(); files != nil {
		t.Errorf("where nobody says where: %v", files)
	}
	if err := (&installation{settings: s, self: "/absent"}).put(s.files()[0]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without the program: %v", err)
	}
}
