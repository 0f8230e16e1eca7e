package sockdiag

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// find looks for a path to each network namespace that is wanted, by its inode
// number: first those that are at hand, then those of processes, then mounts.
func find[T any](home string, wanted map[uint32]T) map[uint32]string {
	paths := map[uint32]string{}
	missing := func() bool { return len(paths) < len(wanted) }
	try := func(path string, inode uint32) {
		if _, asked := wanted[inode]; asked && paths[inode] == "" {
			paths[inode] = path
		}
	}
	tryFile := func(path string) {
		var found unix.Stat_t
		if unix.Stat(path, &found) == nil {
			try(path, uint32(found.Ino))
		}
	}
	tryFile("/proc/self/ns/net")
	if home != "" {
		tryFile(home)
	}
	if missing() {
		processes, _ := filepath.Glob("/proc/[0-9]*/ns/net") // the pattern is right
		for _, path := range processes {
			if name, err := os.Readlink(path); err == nil && missing() {
				try(path, inodeOf(name))
			}
		}
	}
	if missing() {
		eachMount(try)
	}
	return paths
}

// inodeOf reads "net:[4026531840]"; 0 for anything else.
func inodeOf(name string) (inode uint32) {
	fmt.Sscanf(name, "net:[%d]", &inode)
	return inode
}

// eachMount calls f with the network namespaces that are mounted somewhere
// (proc_pid_mountinfo(5): the fourth field is the root, the fifth the place).
func eachMount(f func(path string, inode uint32)) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[3], "net:[") {
			f(fields[4], inodeOf(fields[3]))
		}
	}
}
