package attach

import (
	"fmt"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Cgroup is one kind of call that processes in a cgroup, and in those below it, make.
// Programs see it in the order in which they were attached.
type Cgroup struct {
	// Path is the cgroup's folder.
	Path string
	// Attach is the kind of call: AttachCGroupInet4Connect.
	Attach ebpf.AttachType
}

// Link attaches a program behind those that are there. Nothing is pinned before Keep; with
// pin "" it is not to be.
func (c Cgroup) Link(program *ebpf.Program, pin string) (*Link, error) {
	made, err := link.AttachCgroup(link.CgroupOptions{Path: c.Path, Attach: c.Attach, Program: program})
	if err != nil {
		return nil, fmt.Errorf("attach to %s of cgroup %s: %w", c.Attach, c.Path, err)
	}
	return &Link{Kernel: made, Pin: pin, Where: c.Path, Place: c.Place}, nil
}

// Open opens the link that an earlier process pinned.
func (c Cgroup) Open(pin string) (*Link, error) { return Open(pin, c.Path, c.Place) }

// Place recognizes a link of this cgroup, by the inode number of its folder.
func (c Cgroup) Place(info *link.Info) bool {
	cgroup := info.Cgroup()
	var folder unix.Stat_t
	return cgroup != nil && unix.Stat(c.Path, &folder) == nil && cgroup.CgroupId == folder.Ino
}

// Before lists the programs of this cgroup that see a call before one does; all of them
// where that is not there. It takes CAP_NET_ADMIN.
func (c Cgroup) Before(program ebpf.ProgramID) ([]ebpf.ProgramID, error) {
	folder, err := os.Open(c.Path)
	if err != nil {
		return nil, fmt.Errorf("list programs of a cgroup: %w", err)
	}
	defer folder.Close()
	there, err := link.QueryPrograms(link.QueryOptions{Target: int(folder.Fd()), Attach: c.Attach})
	if err != nil {
		return nil, fmt.Errorf("list programs at %s of cgroup %s: %w", c.Attach, c.Path, err)
	}
	var before []ebpf.ProgramID
	for _, one := range there.Programs {
		before = append(before, one.ID)
	}
	if at := slices.Index(before, program); at >= 0 {
		before = before[:at]
	}
	return before, nil
}

// Program is the one that a link runs; 0 where the kernel does not say.
func (l *Link) Program() ebpf.ProgramID {
	info, err := l.Kernel.Info()
	if err != nil {
		return 0
	}
	return info.Program
}
