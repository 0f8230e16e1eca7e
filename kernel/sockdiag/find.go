package sockdiag

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// search looks for paths to network namespaces, by their inode numbers.
type search struct {
	wanted map[uint32]bool
	paths  map[uint32]string
}

// find looks for a path to each of these namespaces: first among those that are at
// hand, then among mounts and processes.
func find(atHand []string, wanted []uint32) map[uint32]string {
	s := search{map[uint32]bool{}, map[uint32]string{}}
	for _, inode := range wanted {
		s.wanted[inode] = true
	}
	for _, path := range atHand {
		var found unix.Stat_t
		if unix.Stat(path, &found) == nil {
			s.try(path, uint32(found.Ino))
		}
	}
	if !s.over() {
		s.mounts()
	}
	if !s.over() {
		s.processes()
	}
	return s.paths
}

func (s *search) try(path string, inode uint32) {
	if s.wanted[inode] && s.paths[inode] == "" {
		s.paths[inode] = path
	}
}

// over says that all are found.
func (s *search) over() bool { return len(s.paths) == len(s.wanted) }

// inodeOf reads "net:[4026531840]"; 0 for anything else.
func inodeOf(name string) (inode uint32) {
	fmt.Sscanf(name, "net:[%d]", &inode)
	return inode
}

// mounts tries the network namespaces that are mounted somewhere
// (proc_pid_mountinfo(5): the fourth field is the root, the fifth the place).
func (s *search) mounts() {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan() && !s.over(); {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[3], "net:[") {
			s.try(fields[4], inodeOf(fields[3]))
		}
	}
}

// processes tries those of processes, and begins with the youngest: the first are
// the kernel's own, and the node's.
func (s *search) processes() {
	folders, err := netns.Processes()
	if err != nil {
		return
	}
	for _, folder := range slices.Backward(folders) {
		if s.over() {
			return
		}
		path := filepath.Join(folder, "ns/net")
		if to, err := os.Readlink(path); err == nil {
			s.try(path, inodeOf(to))
		}
	}
}
