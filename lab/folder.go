package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/model"
	"golang.org/x/sys/unix"
)

// paths are the places of one lab, all absolute.
type paths struct {
	name   string
	folder string
	cgroup string // the lab's group; its parent is shared by all labs
}

func newPaths(name, folder string) (paths, error) {
	root, err := cgroup.Root()
	if err != nil {
		return paths{}, err
	}
	return paths{name: name, folder: folder, cgroup: filepath.Join(root, "millrace-lab", name)}, nil
}

func (p paths) bpf() string     { return filepath.Join(p.folder, "bpf") }
func (p paths) cluster() string { return filepath.Join(p.folder, "cluster") }
func (p paths) socket() string  { return filepath.Join(p.folder, "lab.sock") }
func (p paths) record() string  { return filepath.Join(p.folder, "lab.json") }
func (p paths) log(name string) string {
	return filepath.Join(p.folder, "log", name+".log")
}

// netns is what a namespace is bound to; kind is "node", "pod" or "fabric".
func (p paths) netns(kind, name string) string {
	return filepath.Join(p.folder, "netns", kind, name)
}

func (p paths) node(name string) NodeInfo {
	return NodeInfo{
		Lab:           p.name,
		Node:          name,
		Netns:         p.netns("node", name),
		Cgroup:        filepath.Join(p.cgroup, name),
		BPFFolder:     filepath.Join(p.bpf(), name),
		ClusterFolder: p.cluster(),
		RunFolder:     filepath.Join(p.folder, "run", name),
	}
}

// fileName is a pod's name as one path element.
func fileName(n model.Name) string { return n.Namespace + "_" + n.Name }

// record is lab.json: what other labs and Down must know of this one.
type record struct {
	Name    string    `json:"name"`
	Pid     int       `json:"pid"`
	Started time.Time `json:"started"`
	Ranges  Ranges    `json:"ranges"`
	// Given are ranges and addresses that the manifests themselves name.
	Given []netip.Prefix `json:"given,omitempty"`
}

func (p paths) writeRecord(r record) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = os.WriteFile(p.record(), append(text, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", p.record(), err)
	}
	return nil
}

func readRecord(folder string) (record, error) {
	var r record
	text, err := os.ReadFile(filepath.Join(folder, "lab.json"))
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	return r, err
}

// lockFolder makes a folder (0700) and takes a lock on it that lasts until the
// file is closed or the process ends. block says whether to wait for it. The
// error is EWOULDBLOCK where another process holds the lock.
func lockFolder(path string, block bool) (*os.File, error) {
	how := unix.LOCK_EX
	if !block {
		how |= unix.LOCK_NB
	}
	for {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, fmt.Errorf("make folder %s: %w", path, err)
		}
		file, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed by another lab's end
		}
		if err != nil {
			return nil, fmt.Errorf("lock folder %s: %w", path, err)
		}
		if err := unix.Flock(int(file.Fd()), how); err != nil {
			file.Close()
			return nil, fmt.Errorf("lock folder %s: %w", path, err)
		}
		if isSame(file, path) {
			return file, nil
		}
		file.Close() // what was locked is no longer at path
	}
}

func isSame(file *os.File, path string) bool {
	locked, err1 := file.Stat()
	now, err2 := os.Stat(path)
	return err1 == nil && err2 == nil && os.SameFile(locked, now)
}

// claimRanges chooses the lab's ranges and records them, so that of two labs
// starting together each sees the other's. It returns the nodes, too.
func (p paths) claimRanges(s *model.Snapshot, count int) (Ranges, []*model.Node, error) {
	lock, err := lockFolder(Base, true)
	if err != nil {
		return Ranges{}, nil, err
	}
	defer lock.Close()
	used, err := rangesInUse(p.name)
	if err != nil {
		return Ranges{}, nil, err
	}
	mine := given(s)
	r, err := chooseRanges(slices.Concat(used, endpoints(s)), mine)
	if err != nil {
		return Ranges{}, nil, err
	}
	nodes, err := planNodes(s, count, r, used)
	if err != nil {
		return Ranges{}, nil, err
	}
	return r, nodes, p.writeRecord(record{p.name, os.Getpid(), time.Now(), r, mine})
}

// rangesInUse is what the host and every lab but the one named use.
func rangesInUse(name string) ([]netip.Prefix, error) {
	host, err := link.Open("")
	if err != nil {
		return nil, err
	}
	defer host.Close()
	used, err := host.InUse()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(Base)
	if err != nil {
		return nil, fmt.Errorf("read other labs: %w", err)
	}
	for _, entry := range entries {
		if r, err := readRecord(filepath.Join(Base, entry.Name())); err == nil && entry.Name() != name {
			used = append(append(used, r.Ranges.all()...), r.Given...)
		}
	}
	return used, nil
}
