// Package resolv reads the resolv.conf that the processes of other network namespaces
// see: how their resolvers make names complete, and whom they ask.
//
// It writes nothing. It takes files from people who may mean harm, and so opens only
// regular ones, inside the root of the process (openat2(2), RESOLVE_IN_ROOT), reads a
// few kilobytes, and waits for no file system longer than a second.
//
// What a single process is told by its environment (LOCALDOMAIN, RES_OPTIONS) is not seen.
//
// Costs: BenchmarkViews; about 3 us a process of the machine, and 60 us a container.
package resolv

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
)

const (
	// sizeLimit is the longest file that is read, in bytes.
	sizeLimit = 1 << 14
	// mostRoots are how many different ones of a namespace are looked into; a pod has one
	// for each container.
	mostRoots = 32
	// patience is how long reading may take. Files of pods are on file systems of the node.
	patience = time.Second
)

// View is what the processes of a network namespace see.
type View struct {
	// Conf is theirs, if Err is nil and Found.
	Conf Conf
	// Found says that there is a file at all.
	Found bool
	// Err says why nobody knows: they see different files, or one that is not to be read.
	Err error
}

// Reader reads views. The zero value is ready. It is for one goroutine.
type Reader struct {
	// stuck are the names of namespaces of which a file was not read in time, and is still
	// waited for.
	stuck sync.Map
}

// inhabited is a network namespace and, of each root in it, one process.
type inhabited struct {
	name      string // "net:[4026531840]"
	number    int    // as the one at home calls it
	processes map[string]string
}

// Views are by the number that the network namespace at home (empty: this process's own)
// gives to the other one, as devices have it (link.Device.PeerNamespace). Processes in
// the node's own mount namespace are visitors and do not count, and neither do those that see
// the node's own file, as a container does that is about to start. A namespace in which there
// is no other process has no view. It needs CAP_SYS_PTRACE (for a
// home of others CAP_SYS_ADMIN, too); processes that may not be looked into all the same are passed over.
func (r *Reader) Views(home string) (map[int]View, error) {
	const act = "find the resolv.conf of pods"
	if err := need.Check(act, "CAP_SYS_PTRACE"); err != nil {
		return nil, err
	}
	var there []*inhabited
	err := netns.In(home, func() (err error) {
		there, err = inhabitants()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", act, err)
	}
	nodes := []file{identify("/proc/1"), identify("/proc/self")}
	views := make(map[int]View, len(there))
	for _, one := range there {
		if view, any := r.view(one, nodes); any {
			views[one.number] = view
		}
	}
	return views, nil
}

// inhabitants are the namespaces that have a number in the one of this thread.
func inhabitants() ([]*inhabited, error) {
	folders, err := netns.Processes()
	if err != nil {
		return nil, err
	}
	visitors := map[string]bool{}
	for _, folder := range []string{"/proc/1", "/proc/self"} {
		if name, err := os.Readlink(folder + "/ns/mnt"); err == nil {
			visitors[name] = true
		}
	}
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	known := map[string]*inhabited{own: nil}
	var all []*inhabited
	for _, folder := range folders {
		name, err := os.Readlink(folder + "/ns/net")
		if err != nil {
			continue // it has ended, or may not be looked into
		}
		space, seen := known[name]
		if !seen {
			if space = numbered(folder, name); space != nil {
				all = append(all, space)
			}
			known[name] = space
		}
		if space != nil {
			space.admit(folder, visitors)
		}
	}
	return all, nil
}

// numbered is the namespace of a process; nil for one that has no number here.
func numbered(folder, name string) *inhabited {
	fd, err := unix.Open(folder+"/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	number, err := netns.Number(fd)
	if err != nil || number < 0 {
		return nil
	}
	return &inhabited{name, number, map[string]string{}}
}

// admit notes a process, if it is the first with its root.
func (i *inhabited) admit(folder string, visitors map[string]bool) {
	mounts, err := os.Readlink(folder + "/ns/mnt")
	if err != nil || visitors[mounts] {
		return
	}
	root, err := os.Readlink(folder + "/root")
	if err != nil {
		return
	}
	if key := mounts + root; i.processes[key] == "" && len(i.processes) <= mostRoots {
		i.processes[key] = folder
	}
}

var (
	errSlow   = fmt.Errorf("no answer for %v: its file system is slow or hangs", patience)
	errMany   = fmt.Errorf("more than %d roots: it is not looked into", mostRoots)
	errDiffer = errors.New("containers have different ones")
)

// view reads what the processes of a namespace see, in time; false if there are none.
func (r *Reader) view(of *inhabited, nodes []file) (View, bool) {
	_, stuck := r.stuck.Load(of.name)
	switch {
	case len(of.processes) == 0:
		return View{}, false
	case len(of.processes) > mostRoots:
		return View{Err: errMany}, true
	case stuck:
		return View{Err: errSlow}, true
	}
	done := make(chan View, 1)
	go func() { done <- agreed(of.processes, nodes) }()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case view := <-done:
		return view, view.Found || view.Err != nil
	case <-late.C:
	}
	r.stuck.Store(of.name, true)
	go func() {
		<-done
		r.stuck.Delete(of.name)
	}()
	return View{Err: errSlow}, true
}

// file is which file it is; the zero value is none.
type file struct{ device, inode uint64 }

// identify says which file the process of a folder in /proc sees.
func identify(folder string) file {
	path, is, err := find(folder)
	if err != nil {
		return file{}
	}
	unix.Close(path)
	return file{is.Dev, is.Ino}
}

// agreed is what all processes see that see a file which is none of the node's.
func agreed(processes map[string]string, nodes []file) (view View) {
	for _, folder := range processes {
		text, is, err := read(folder)
		if is != (file{}) && slices.Contains(nodes, is) {
			continue
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // no file, or it has ended
		}
		var conf Conf
		if err == nil {
			conf, err = Parse(text)
		}
		switch {
		case err != nil:
			return View{Err: fmt.Errorf("resolv.conf of process %s: %w", filepath.Base(folder), err)}
		case view.Found && !view.Conf.Equal(conf):
			return View{Err: errDiffer}
		}
		view = View{Conf: conf, Found: true}
	}
	return view
}

// find opens /etc/resolv.conf as the process of a folder in /proc sees it, for looking at
// it only: before it is known what it is, opening it may have effects, and wait.
func find(folder string) (path int, is unix.Stat_t, err error) {
	root, err := unix.Open(folder+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, is, err
	}
	defer unix.Close(root)
	path, err = unix.Openat2(root, "etc/resolv.conf", &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return -1, is, err
	}
	if err := unix.Fstat(path, &is); err != nil {
		unix.Close(path)
		return -1, is, err
	}
	return path, is, nil
}

// read is the text of the file, and which it is.
func read(folder string) (string, file, error) {
	path, is, err := find(folder)
	if err != nil {
		return "", file{}, err
	}
	defer unix.Close(path)
	text, err := readRegular(path, &is)
	return text, file{is.Dev, is.Ino}, err
}

func readRegular(path int, is *unix.Stat_t) (string, error) {
	switch {
	case is.Mode&unix.S_IFMT != unix.S_IFREG:
		return "", errors.New("it is no regular file")
	case is.Size > sizeLimit:
		return "", fmt.Errorf("it has %d bytes, more than %d", is.Size, sizeLimit)
	case is.Size == 0: // as files are that the kernel makes up
		return "", nil
	}
	var on unix.Statfs_t
	if err := unix.Fstatfs(path, &on); err != nil || on.Type == unix.SYSFS_MAGIC { // to read these may do something
		return "", errors.Join(err, errors.New("it is on no file system of a container"))
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", path), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	open := os.NewFile(uintptr(fd), "resolv.conf")
	defer open.Close()
	text, err := io.ReadAll(io.LimitReader(open, sizeLimit+1))
	if err == nil && len(text) > sizeLimit {
		err = fmt.Errorf("it has more than %d bytes", sizeLimit)
	}
	return string(text), err
}
