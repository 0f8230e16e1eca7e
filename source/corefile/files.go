package corefile

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Files are what the file system of the DNS servers has, as far as it is known. With the zero
// value nothing of it is.
type Files struct {
	// Container is how they are run; nil if that is not known, and Why says why.
	Container *Container
	Why       string
	// ConfigMaps are those of their namespace that are known, by name: nil for one that is not
	// there. Others are not read.
	ConfigMaps map[string]*Keys
}

// Keys are what a ConfigMap has.
type Keys struct {
	Texts map[string]string
	// Unread is why they are not known; "" if they are.
	Unread string
}

// Container is how CoreDNS is run.
type Container struct {
	// Of is the object that says so, "Deployment kube-system/coredns".
	Of string
	// Corefile is the path of its Corefile (-conf); "" where nothing says it.
	Corefile string
	Mounts   []Mount
	// Aliases is what its pods' /etc/hosts have beside what kubelet writes for each of them
	// (hostAliases), if Hosts is empty; else that is why these files are not known.
	Aliases, Hosts string
}

// Mount is a place in a container's file system at which a volume is.
type Mount struct {
	// Path is absolute and clean.
	Path string
	// ConfigMap is the one whose keys are the files there; "" for another volume, of which
	// Else says what it is.
	ConfigMap, Else string
	// Sub says that it is a part of the volume (subPath), which does not follow the ConfigMap
	// (https://kubernetes.io/docs/concepts/configuration/configmap/#mounted-configmaps-are-updated-automatically).
	Sub string
	// Optional says that the ConfigMap, or a key of Items, may be missing.
	Optional bool
	// Items are the files there; nil if each key is one.
	Items []Item
}

// Item is a key of a ConfigMap that is a file.
type Item struct{ Key, Path string }

// found is a file that is known.
type found struct {
	file
	text string
}

// corefile is the path of the Corefile, "" if it is not known.
func (f *Files) corefile() string {
	if f.Container == nil {
		return ""
	}
	return f.Container.Corefile
}

// unknown is why it is not known how they are run.
func (f *Files) unknown() string { return cmp.Or(f.Why, "how they are run is not known") }

// another is why the servers are known to have another Corefile than that of ConfigMap; "" if
// they are not.
func (f *Files) another() string {
	c := f.Container
	if c == nil {
		return ""
	}
	if c.Corefile == "" {
		return fmt.Sprintf("the %s does not say by -conf, with an absolute path, which Corefile it reads", c.Of)
	}
	m := c.mountOf(c.Corefile)
	if m == nil || m.ConfigMap != ConfigMap.Name || m.key(c.Corefile) != Key {
		return fmt.Sprintf("the %s reads the Corefile %s, which is not that of ConfigMap %s", c.Of, clip(c.Corefile), ConfigMap)
	}
	return ""
}

// mountOf finds the volume that a path is in: the deepest that is mounted there; nil if none.
func (c *Container) mountOf(at string) (of *Mount) {
	for i := range c.Mounts {
		if m := &c.Mounts[i]; inFolder(at, m.Path) && (of == nil || len(m.Path) > len(of.Path)) {
			of = m
		}
	}
	return of
}

// inFolder says whether a path is a folder's, or below it.
func inFolder(at, folder string) bool {
	return folder == "/" || at == folder || strings.HasPrefix(at, folder+"/")
}

// below is a path as seen from the mount.
func (m *Mount) below(at string) string {
	return strings.TrimPrefix(strings.TrimPrefix(at, m.Path), "/")
}

// odd is why nobody here knows what is at a path: no key's file begins with "..", but
// kubelet's own link and folder do (oddFolders), and by them all keys are there once more.
func (m *Mount) odd(at string) string {
	if !strings.HasPrefix(m.below(at), "..") {
		return ""
	}
	return fmt.Sprintf("%s is by a link of kubelet's, which is not followed here", clip(at))
}

// key is the key of the ConfigMap that is the file at a path; "" if none is.
func (m *Mount) key(at string) string {
	below := m.below(at)
	if m.Sub != "" {
		below = path.Join(m.Sub, below)
	}
	if m.Items == nil {
		return below
	}
	for _, item := range m.Items {
		if path.Clean(item.Path) == below {
			return item.Key
		}
	}
	return ""
}

// texts are the files of a volume, by their paths. The error is why they are not known.
func (f *Files) texts(m *Mount) (map[string]found, error) {
	if m.ConfigMap == "" {
		return nil, fmt.Errorf("%s is %s, not a ConfigMap", m.Path, m.Else)
	}
	of, known := f.ConfigMaps[m.ConfigMap]
	switch {
	case m.Sub != "":
		return nil, fmt.Errorf("%s is mounted by subPath, and so may not be as the ConfigMap %s is by now", m.Path, m.ConfigMap)
	case !known:
		return nil, fmt.Errorf("%s is the ConfigMap %s, which is not read here", m.Path, m.ConfigMap)
	case of == nil && m.Optional:
		return nil, nil
	case of == nil:
		return nil, fmt.Errorf("%s is the ConfigMap %s, which is not there", m.Path, m.ConfigMap)
	case of.Unread != "":
		return nil, fmt.Errorf("%s is the ConfigMap %s: %s", m.Path, m.ConfigMap, of.Unread)
	}
	items := m.Items
	if items == nil {
		for key := range of.Texts {
			items = append(items, Item{key, key})
		}
	}
	all := map[string]found{}
	for _, item := range items {
		text, has := of.Texts[item.Key]
		if !has && m.Optional {
			continue
		}
		if !has {
			return nil, fmt.Errorf("the ConfigMap %s at %s has no %s", m.ConfigMap, m.Path, item.Key)
		}
		at := path.Join(m.Path, item.Path)
		all[at] = found{file{at, m.ConfigMap + "/" + item.Key}, text}
	}
	return all, nil
}

// oddFolders are what a mounted ConfigMap has beside its keys: a link to a folder, and that
// folder, which has another name each time (AtomicWriter of kubelet).
var oddFolders = []string{"..data", "..2026_01_02_03_04_05.1234567890"}

// glob finds the files that a pattern stands for, which may be relative to the file that has
// it, in the order of their names, as CoreDNS does with filepath.Glob. why says why they are
// not known. The error is of what CoreDNS would refuse.
func (f *Files) glob(pattern, by string) (all []found, why string, err error) {
	if f.Container == nil {
		return nil, f.unknown(), nil
	}
	if !path.IsAbs(pattern) {
		pattern = path.Join(path.Dir(by), pattern)
	}
	pattern = path.Clean(pattern)
	folder, base := path.Split(pattern)
	folder = path.Clean(folder)
	if strings.ContainsAny(folder, "*?") {
		return nil, "wildcards of folders are not followed here", nil
	}
	for i := range f.Container.Mounts {
		inner := &f.Container.Mounts[i]
		matches, _ := path.Match(pattern, inner.Path)
		if _, unknown := f.texts(inner); matches && unknown != nil {
			return nil, unknown.Error(), nil
		}
		if matches || inFolder(inner.Path, pattern) {
			return nil, fmt.Sprintf("another volume is mounted at %s", inner.Path), nil
		}
	}
	m := f.Container.mountOf(path.Join(folder, "x"))
	if m == nil {
		return nil, fmt.Sprintf("%s is of the image, for no volume is mounted there", folder), nil
	}
	if odd := m.odd(folder); odd != "" {
		return nil, odd, nil
	}
	texts, unknown := f.texts(m)
	if unknown != nil {
		return nil, unknown.Error(), nil
	}
	for at, text := range texts {
		switch matches, _ := path.Match(pattern, at); {
		case matches:
			all = append(all, text)
		case strings.HasPrefix(at, folder+"/") && strings.Contains(at[len(folder)+1:], "/"):
			return nil, "keys of the ConfigMap are in folders", nil
		}
	}
	for _, odd := range oddFolders {
		if matches, _ := path.Match(base, odd); matches && folder == m.Path {
			return nil, "", fmt.Errorf("it stands for folders, too, as each ConfigMap has one (..data)")
		}
	}
	if len(all) == 0 && !strings.ContainsAny(pattern, "*?") {
		return nil, "", fmt.Errorf("there is no such file in ConfigMap %s", m.ConfigMap)
	}
	slices.SortFunc(all, func(a, b found) int { return strings.Compare(a.path, b.path) })
	return all, "", nil
}
