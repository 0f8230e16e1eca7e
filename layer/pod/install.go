package pod

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
)

const (
	// plugin is the type in network configurations, and so the plugin's file.
	plugin = "millrace"
	// list is before those that flannel, kubeadm's and Debian's packages come with (10-,
	// 87-): runtimes take the first by its name
	// (https://github.com/containerd/containerd/blob/main/docs/cri/config.md#cni-config-template).
	list = "05-millrace.conflist"
	// portmap is the plugin of others for the hostPort of pods.
	portmap = "portmap"
)

// installation is where runtimes find the plugin: two files, of which the second names the
// first.
type installation struct {
	settings Settings
	// self is the program that is running, a plugin when a runtime starts it.
	self string
	// same is what the plugin's file was when its bytes were those of self.
	same signature
}

// signature tells a file from what it was before, without reading it.
type signature struct {
	inode   uint64
	size    int64
	changed syscall.Timespec
}

func signatureOf(info fs.FileInfo) signature {
	s := signature{size: info.Size()}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode, s.changed = stat.Ino, stat.Ctim
	}
	return s
}

// installed is one of the files. It implements layer.Subject.
type installed string

// Object implements layer.Subject.
func (i installed) Object() string { return "file " + string(i) }

// Detail implements layer.Subject.
func (i installed) Detail() string { return "for container runtimes" }

// Remove implements layer.Removable.
func (i installed) Remove() error { return left(i).Remove() }

// files are those to be there: the plugin before the list that names it.
func (s Settings) files() []installed {
	if s.Plugins == "" || s.Networks == "" {
		return nil
	}
	return []installed{installed(filepath.Join(s.Plugins, plugin)), installed(filepath.Join(s.Networks, list))}
}

// look says which of the files are there, and whether they are as they are to be.
func (i *installation) look() (map[installed]bool, error) {
	there := map[installed]bool{}
	for n, file := range i.settings.files() {
		right, err := i.isPlugin(string(file))
		if n == 1 {
			right, err = i.isList(string(file))
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look at %s: %w", file, err)
		}
		there[file] = right
	}
	return there, nil
}

// isPlugin says whether a file has the bytes of this program. It is read again only when it
// is another one than it was.
func (i *installation) isPlugin(file string) (bool, error) {
	info, err := os.Stat(file)
	if err != nil {
		return false, err
	}
	if i.same == signatureOf(info) {
		return true, nil
	}
	own, err := os.Stat(i.self)
	if err != nil || own.Size() != info.Size() || info.Mode().Perm()&0o111 != 0o111 {
		return false, err
	}
	same, err := sameBytes(file, i.self)
	if same {
		i.same = signatureOf(info)
	}
	return same, err
}

func sameBytes(one, other string) (bool, error) {
	a, err := os.Open(one)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := os.Open(other)
	if err != nil {
		return false, err
	}
	defer b.Close()
	var parts [2][64 << 10]byte
	for {
		n, ended := io.ReadFull(a, parts[0][:])
		m, _ := io.ReadFull(b, parts[1][:])
		if !bytes.Equal(parts[0][:n], parts[1][:m]) {
			return false, nil
		}
		switch {
		case errors.Is(ended, io.EOF), errors.Is(ended, io.ErrUnexpectedEOF):
			return true, nil
		case ended != nil:
			return false, ended
		}
	}
}

func (i *installation) isList(file string) (bool, error) {
	text, err := os.ReadFile(file)
	return err == nil && bytes.Equal(text, i.list()), err
}

// network is a list of plugins, as runtimes read it
// (https://www.cni.dev/docs/spec/#configuration-format).
type network struct {
	Version string `json:"cniVersion"`
	// Versions are for runtimes that can choose.
	Versions []string         `json:"cniVersions,omitempty"`
	Name     string           `json:"name"`
	Plugins  []map[string]any `json:"plugins"`
}

// list is the text of the list. Where hostPorts are not served here and the runtime has the
// plugin portmap, that comes behind ours; which versions of CNI it knows cannot be seen, so
// the one that all know is used then.
func (i *installation) list() []byte {
	able := map[string]bool{"bandwidth": true}
	ours := map[string]any{"type": plugin, "capabilities": able}
	if i.settings.Socket != cni.DefaultSocket {
		ours["socket"] = i.settings.Socket
	}
	n := network{Version: "1.0.0", Versions: []string{"1.0.0", "1.1.0"}, Name: plugin, Plugins: []map[string]any{ours}}
	switch {
	case i.settings.HostPorts != nil:
		able["portMappings"] = true
	case i.hasPortmap():
		n.Versions = nil
		n.Plugins = append(n.Plugins, map[string]any{"type": portmap, "capabilities": map[string]bool{"portMappings": true}})
	}
	text, err := json.MarshalIndent(n, "", "  ")
	if err != nil {
		panic(err) // strings and nothing else
	}
	return append(text, '\n')
}

// hasPortmap says whether the runtime has the plugin portmap. A link may lead where this
// process cannot follow, in a container.
func (i *installation) hasPortmap() bool {
	_, err := os.Lstat(filepath.Join(i.settings.Plugins, portmap))
	return err == nil
}

// put writes one of the files in one piece: a runtime finds the old one or the new one.
func (i *installation) put(file installed) error {
	if err := os.MkdirAll(filepath.Dir(string(file)), 0o755); err != nil {
		return fmt.Errorf("make the runtime's folder: %w", err)
	}
	var from io.Reader = bytes.NewReader(i.list())
	mode := fs.FileMode(0o644)
	if file == i.settings.files()[0] {
		self, err := os.Open(i.self)
		if err != nil {
			return fmt.Errorf("read this program: %w", err)
		}
		defer self.Close()
		from, mode = self, 0o755
	}
	if err := pool.Replace(string(file), mode, from); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}

// removal lists what there is of the files, the list first: what it names has to be there.
func (i *installation) removal() (changes layer.Changes, err error) {
	files := i.settings.files()
	for n := len(files) - 1; n >= 0; n-- {
		for _, path := range []installed{files[n], installed(pool.Half(string(files[n])))} {
			_, err := os.Lstat(string(path))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("look for what runtimes read of the pod layer: %w", err)
			}
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: path})
		}
	}
	return changes, nil
}
