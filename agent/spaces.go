package agent

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

const (
	// podsMost bounds the pods that metrics name; what dies in others is added up.
	podsMost = 256
	// searchRest is the least time between two searches for namespaces: each takes 0.3 ms
	// a namespace.
	searchRest = 10 * time.Second
	// othersPod stands for pods that are not named.
	othersPod = "others"
)

// spaces knows whose network namespaces are.
type spaces struct {
	mu sync.Mutex
	// pods are NAMESPACE/NAME by inode, "" for the node's own.
	pods map[uint32]string
	// ways are the paths that lead to those of pods.
	ways     map[uint32]string
	named    map[string]bool
	searched time.Time
	// search finds the namespaces of pods; tests have others.
	search func() ([]netns.Space, error)
	own    func() uint32
}

// ownSpace is the inode of this process's network namespace, 0 if unknown.
func ownSpace() uint32 {
	var file unix.Stat_t
	if unix.Stat("/proc/self/ns/net", &file) != nil {
		return 0
	}
	return uint32(file.Ino)
}

func newSpaces() *spaces {
	return &spaces{
		pods: map[uint32]string{}, ways: map[uint32]string{}, named: map[string]bool{},
		search: func() ([]netns.Space, error) { return netns.Spaces("") }, own: ownSpace,
	}
}

// label says of drops in whose namespaces they were, and adds up those of one pod. Those
// in namespaces that no pod of the snapshot has are the others', and so are those of the pods
// beyond the first 256.
func (s *spaces) label(drops []layer.Drops, pods []*model.Pod) []layer.Drops {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pods[s.own()] = ""
	unknown := slices.ContainsFunc(drops, func(d layer.Drops) bool { _, known := s.pods[d.Space]; return !known })
	if unknown && time.Since(s.searched) > searchRest {
		s.searched = time.Now()
		s.find(pods)
	}
	type of struct{ pod, reason string }
	sums := map[of]int{}
	var labelled []layer.Drops
	for _, d := range drops {
		pod, known := s.pods[d.Space]
		if !known || pod != "" && !s.name(pod) {
			pod = othersPod
		}
		d.Pod = pod
		at, seen := sums[of{pod, d.Reason}]
		if !seen {
			sums[of{pod, d.Reason}] = len(labelled)
			labelled = append(labelled, d)
			continue
		}
		labelled[at].Count += d.Count
	}
	return labelled
}

// name says whether a pod is one of those that are named.
func (s *spaces) name(pod string) bool {
	if !s.named[pod] && len(s.named) < podsMost {
		s.named[pod] = true
	}
	return s.named[pod]
}

// find looks for the namespaces of pods. Those that may not be entered stay unknown.
func (s *spaces) find(pods []*model.Pod) {
	by := map[netip.Addr]string{}
	for _, pod := range pods {
		if pod.HostNetwork {
			continue
		}
		for _, addr := range pod.Addresses {
			by[addr] = pod.Name.String()
		}
	}
	found, _ := s.search() // what may not be entered is among the others
	kept := map[uint32]string{s.own(): ""}
	s.ways = map[uint32]string{}
	for _, space := range found {
		for _, addr := range space.Addresses {
			if pod := by[addr]; pod != "" {
				kept[space.Inode], s.ways[space.Inode] = pod, space.Path
			}
		}
	}
	for inode, pod := range s.pods { // what died there is still counted
		if _, there := kept[inode]; !there && len(kept) < 4*podsMost {
			kept[inode] = pod
		}
	}
	s.pods = kept
}

// lookAnew is how old the paths to pods may be.
const lookAnew = time.Minute

// paths lead to the namespaces of pods, and "" to the node's own.
func (s *spaces) paths(pods []*model.Pod) map[uint32]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.searched) > lookAnew {
		s.searched = time.Now()
		s.find(pods)
	}
	all := maps.Clone(s.ways)
	all[s.own()] = ""
	return all
}

// podLabels are the labels of a pod in metrics: its namespace and its name.
func podLabels(pod string) (namespace, name string) {
	namespace, name, found := strings.Cut(pod, "/")
	if !found {
		return "", pod
	}
	return namespace, name
}
