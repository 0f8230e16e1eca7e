package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/netns"
)

// runsFolder has a folder for each run on this host, named after its process.
const runsFolder = "/run/millrace/bench"

// groupPrefix is the start of the name of a run's cgroup; its process follows.
const groupPrefix = "millrace-bench-"

// run is where one benchmark keeps what outlives a process: bind mounts of
// namespaces, and cgroups.
type run struct {
	folder string
	// namespaces is the folder of the bind mounts.
	namespaces string
	group      string
	// lock is held on the folder for as long as the run lives. The kernel
	// releases it however the process ends, and a process number that was given
	// out again cannot take it for the old one's.
	lock *os.File
}

// openRun removes what killed runs left behind and makes the folders of this
// one. Two runs in one process are refused: they would share their folders.
func openRun() (*run, error) {
	root, err := cgroup.Root()
	if err != nil {
		return nil, err
	}
	// One run at a time sweeps and opens, or a folder could be swept between
	// its making and its locking.
	door, err := openDoor(runsFolder)
	if err != nil {
		return nil, err
	}
	r, err := newRun(root)
	door.Close()
	if err != nil {
		return nil, err
	}
	if err := cgroup.Create(r.group); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

// newRun makes the folder of this run, behind the door.
func newRun(root string) (*run, error) {
	err := sweep(root)
	if err != nil {
		return nil, err
	}
	name := strconv.Itoa(os.Getpid())
	r := &run{folder: filepath.Join(runsFolder, name), group: filepath.Join(root, groupPrefix+name)}
	r.namespaces = filepath.Join(r.folder, "netns")
	if err := os.Mkdir(r.folder, 0o700); errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make folder %s: this process is running a benchmark already", r.folder)
	} else if err != nil {
		return nil, fmt.Errorf("make folder of this run: %w", err)
	}
	if r.lock, err = lockFolder(r.folder, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, err
	}
	return r, nil
}

// close removes the run's folders. Its beds must be closed before.
func (r *run) close() error {
	defer r.lock.Close()
	err := cgroup.Remove(r.group)
	door, failed := openDoor(runsFolder)
	if failed != nil {
		return errors.Join(err, failed)
	}
	defer door.Close()
	return errors.Join(err, removeRun(r.folder), removeEmpty(runsFolder))
}

// openDoor makes the folder of the runs if it is missing, and locks it. Only who
// holds the lock makes and removes what is in it, and the folder itself. Who
// meets a folder that was removed meanwhile tries again, within reason.
func openDoor(folder string) (door *os.File, err error) {
	for range 1000 {
		door, err = tryDoor(folder)
		// MkdirAll says "exists" of what went after it had been there.
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open folder of runs: %w", err)
	}
	return door, nil
}

func tryDoor(folder string) (*os.File, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	door, err := lockFolder(folder, unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	if err := stillNamed(folder, door); err != nil {
		door.Close()
		return nil, err
	}
	return door, nil
}

// stillNamed returns fs.ErrNotExist if path is not, or no longer, the open file.
func stillNamed(path string, open *os.File) error {
	have, err := open.Stat()
	if err != nil {
		return err
	}
	named, err := os.Stat(path)
	if err == nil && !os.SameFile(have, named) {
		return fs.ErrNotExist
	}
	return err
}

// removeEmpty removes the folder of the runs and the one above, each if nothing
// is in it: labs and agents have theirs there too.
func removeEmpty(folder string) error {
	for _, path := range []string{folder, filepath.Dir(folder)} {
		err := unix.Rmdir(path)
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EBUSY) { // busy: something is mounted on it
			return nil
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove folder %s: %w", path, err)
		}
	}
	return nil
}

// sweep removes the runs whose process is gone: those with a folder that nobody
// holds locked, and cgroups without such a folder.
func sweep(root string) error {
	entries, err := os.ReadDir(runsFolder)
	if err != nil {
		return fmt.Errorf("look for left-over runs: %w", err)
	}
	alive := map[string]bool{}
	for _, entry := range entries {
		folder := filepath.Join(runsFolder, entry.Name())
		lock, err := lockFolder(folder, unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			alive[entry.Name()] = true
			continue
		}
		if err != nil {
			return fmt.Errorf("look at left-over run: %w", err)
		}
		err = errors.Join(cgroup.Remove(filepath.Join(root, groupPrefix+entry.Name())), removeRun(folder))
		lock.Close()
		if err != nil {
			return fmt.Errorf("remove left-over run: %w", err)
		}
	}
	groups, err := filepath.Glob(filepath.Join(root, groupPrefix+"*"))
	if err != nil {
		return fmt.Errorf("look for left-over cgroups: %w", err)
	}
	for _, group := range groups {
		name := strings.TrimPrefix(filepath.Base(group), groupPrefix)
		// A container may share the cgroups and not the folder: there only the
		// process number can be asked.
		if !alive[name] && !processExists(name) {
			if err := cgroup.Remove(group); err != nil {
				return fmt.Errorf("remove left-over cgroup: %w", err)
			}
		}
	}
	return nil
}

func processExists(name string) bool {
	pid, err := strconv.Atoi(name)
	return err == nil && !errors.Is(unix.Kill(pid, 0), unix.ESRCH)
}

// removeRun unbinds the namespaces below a run's folder and removes it, with the
// configurations (*.conf) of what it started. It goes
// by the layout and never removes a tree: a bind mount might hang in it.
func removeRun(folder string) error {
	namespaces := filepath.Join(folder, "netns")
	entries, err := os.ReadDir(namespaces)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove run %s: %w", folder, err)
	}
	for _, entry := range entries {
		if err := netns.Remove(filepath.Join(namespaces, entry.Name())); err != nil {
			return err
		}
	}
	written, err := filepath.Glob(filepath.Join(folder, "*.conf"))
	if err != nil {
		return fmt.Errorf("remove run %s: %w", folder, err)
	}
	for _, path := range append(written, namespaces, folder) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove run %s: %w", folder, err)
		}
	}
	return nil
}

// lockFolder opens a folder and locks it (flock(2)) until it is closed.
func lockFolder(path string, how int) (*os.File, error) {
	folder, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("lock folder: %w", err)
	}
	if err := unix.Flock(int(folder.Fd()), how); err != nil {
		folder.Close()
		return nil, fmt.Errorf("lock folder %s: %w", path, err)
	}
	return folder, nil
}

// withNamespace opens the namespace at path for the time that f runs.
func withNamespace(path string, f func(fd int) error) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer file.Close()
	return f(int(file.Fd()))
}

// stages are what a benchmark does.
type stages interface {
	prepare(context.Context) error
	measure(context.Context) error
}

// carryOut does it, and then gives up what it holds.
func carryOut(ctx context.Context, b stages, holds ...func() error) error {
	err := b.prepare(ctx)
	if err == nil {
		err = b.measure(ctx)
	}
	if ctx.Err() != nil {
		err = ctx.Err() // and not that its workers were killed
	}
	for _, release := range holds {
		err = errors.Join(err, release())
	}
	return err
}

// checkRounds says how many rounds there may be, and how long each; 0 is left to the
// benchmark.
func checkRounds(rounds int, each time.Duration) error {
	if rounds < 0 || rounds > 10000 || each < 0 || each > time.Minute {
		return fmt.Errorf("%w: %d rounds of %s: use 1 to 10,000 and at most 1m", ErrOptions, rounds, each)
	}
	return nil
}

// ownWorker is the command that runs WorkerMain where none is given.
func ownWorker() ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	return []string{self, "bench-worker"}, nil
}
