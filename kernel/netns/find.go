package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Cookie is the kernel's number of the namespace at path, which no other
// namespace ever has (SO_NETNS_COOKIE, Linux 5.14); the empty path is that of
// this process.
func Cookie(path string) (uint64, error) {
	var cookie uint64
	read := func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("make a socket: %w", err)
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	}
	if err := In(path, read); err != nil {
		return 0, fmt.Errorf("read cookie of namespace %s: %w", path, err)
	}
	return cookie, nil
}

// Number is how the calling thread's namespace calls another, which is open at fd; it
// is negative for one that it has no device pair with. The kernel gives it when the
// devices are listed.
func Number(fd int) (int, error) { return netlink.GetNetNsIdByFd(fd) }

// Space is somebody's network namespace, joined to another by a device pair.
type Space struct {
	Cookie uint64
	// Inode is its number in /proc: "net:[4026531840]".
	Inode uint32
	// Path leads to it while the process lives by which it was found.
	Path string
	// Addresses are those of its devices, loopback left out.
	Addresses []netip.Addr
}

// Processes are the folders in /proc of the processes that there are, the youngest
// last. Some may have ended meanwhile. A few hundred take 2 ms.
func Processes() ([]string, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1) // the kernel lists them by number
	if err != nil {
		return nil, err
	}
	var folders []string
	for _, name := range names {
		if name[0] >= '1' && name[0] <= '9' {
			folders = append(folders, filepath.Join("/proc", name))
		}
	}
	return folders, nil
}

// Spaces finds, through /proc, the network namespaces of processes that have a
// device whose other end is in the one at home (empty: this process's own): the
// pods of a node. Those that end meanwhile are left out, and so are those that may
// not be entered: the error then says so, beside what was found. It needs
// CAP_SYS_ADMIN and CAP_SYS_PTRACE, and costs about 0.3 milliseconds a namespace.
func Spaces(home string) ([]Space, error) {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("find namespaces: %w", err)
	}
	if home == "" {
		home = "/proc/self/ns/net"
	}
	file, err := os.Open(home)
	if err != nil {
		return nil, fmt.Errorf("find namespaces: %w", err)
	}
	defer file.Close()
	processes, err := Processes()
	if err != nil {
		return nil, fmt.Errorf("find namespaces: %w", err)
	}
	seen := map[string]bool{own: true}
	var spaces []Space
	var refused error
	for _, process := range processes {
		path := filepath.Join(process, "ns/net")
		name, err := os.Readlink(path)
		if errors.Is(err, os.ErrPermission) {
			refused = fmt.Errorf("look into %s: %w", path, err)
		}
		if err != nil || seen[name] || !strings.HasPrefix(name, "net:") {
			continue
		}
		space, joined, err := look(path, int(file.Fd()))
		if errors.Is(err, os.ErrPermission) {
			refused = err
		}
		if err != nil {
			continue // it ended; another process may still hold the same one
		}
		seen[name] = true
		if joined {
			spaces = append(spaces, space)
		}
	}
	return spaces, refused
}

// look enters a namespace; joined says that it has a device pair with home.
func look(path string, home int) (space Space, joined bool, err error) {
	var file unix.Stat_t
	if err := unix.Stat(path, &file); err != nil {
		return space, false, err
	}
	space.Inode, space.Path = uint32(file.Ino), path
	err = Do(path, func() (err error) {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list devices: %w", err)
		}
		id, err := Number(home)
		if err != nil || id < 0 {
			return err
		}
		for _, l := range links {
			joined = joined || l.Attrs().NetNsID == id
		}
		if !joined {
			return nil
		}
		if space.Cookie, err = Cookie(""); err != nil {
			return err
		}
		addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		for _, addr := range addrs {
			if a, ok := netip.AddrFromSlice(addr.IP); ok && !a.IsLoopback() {
				space.Addresses = append(space.Addresses, a.Unmap())
			}
		}
		return nil
	})
	return space, joined, err
}
