package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/millrace/millrace/kernel/cgroup"
	"golang.org/x/sys/unix"
)

// downPatience is how long a daemon that was asked to end may take.
const downPatience = 2 * time.Minute

// Down ends a lab and removes everything of it, also what is left of one that
// was killed half-way. That there is no such lab is no error. progress may be
// nil.
func Down(name string, progress func(line string)) error {
	if err := checkName(name); err != nil {
		return err
	}
	if progress == nil {
		progress = func(string) {}
	}
	if err := checkPrivileges(); err != nil {
		return err
	}
	folder, err := filepath.EvalSymlinks(Folder(name))
	if err != nil { // no folder, or a link to one that is gone
		folder = Folder(name)
	}
	p, err := newPaths(name, folder)
	if err != nil {
		return fmt.Errorf("take down lab %s: %w", name, err)
	}
	if !p.anythingLeft() && !p.exists() {
		progress(fmt.Sprintf("no lab %q is up, and nothing is left of one", name))
		return p.sweep()
	}
	lock, err := p.endDaemon(progress)
	if err != nil {
		return fmt.Errorf("take down lab %s: %w", name, err)
	}
	defer lock.Close()
	progress("removing what is left")
	return p.sweep()
}

// endDaemon asks the daemon to end, waits until it has, and takes its lock. A
// daemon that does not end in time is killed.
func (p paths) endDaemon(progress func(string)) (*os.File, error) {
	ctx, cancel := context.WithTimeout(context.Background(), downPatience)
	defer cancel()
	for asked := false; ; {
		lock, err := lockFolder(p.folder, false)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return lock, err
		}
		if !asked {
			progress("asking the lab to end")
			asked = (&Client{folder: p.folder}).post(ctx, "/down", nil, nil) == nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return p.killDaemon(progress)
		}
	}
}

// killDaemon kills the process that holds the lock and takes the lock. The pid
// in the record is the holder's, because every holder writes its own there.
func (p paths) killDaemon(progress func(string)) (*os.File, error) {
	r, err := readRecord(p.folder)
	if err != nil {
		return nil, fmt.Errorf("its process does not end, and which one that is cannot be read: %w", err)
	}
	progress(fmt.Sprintf("killing process %d, which did not end within %s", r.Pid, downPatience))
	if err := unix.Kill(r.Pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("kill process %d: %w", r.Pid, err)
	}
	return lockFolder(p.folder, true)
}

func (p paths) exists() bool {
	_, err := os.Lstat(p.folder)
	return err == nil
}

// anythingLeft reports whether the folder holds anything or the group exists.
func (p paths) anythingLeft() bool {
	entries, _ := os.ReadDir(p.folder)
	_, err := os.Stat(p.cgroup)
	return len(entries) > 0 || err == nil
}

// sweep removes whatever bears the lab's name; the caller holds its lock.
// Parts that are not there are no error.
func (p paths) sweep() error {
	if err := p.sweepContents(); err != nil {
		return fmt.Errorf("remove what is left of lab %s: %w", p.name, err)
	}
	for _, path := range []string{p.folder, Folder(p.name)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove what is left of lab %s: %w", p.name, err)
		}
	}
	return p.leaveBase()
}

// leaveBase removes the folders above the labs' when this was the last lab.
func (p paths) leaveBase() error {
	if _, err := os.Stat(Base); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := lockFolder(Base, true) // nobody is choosing ranges in it
	if err != nil {
		return err
	}
	defer lock.Close()
	if unix.Rmdir(Base) == nil { // refuses unless it is empty
		unix.Rmdir(filepath.Dir(Base))
	}
	return nil
}

// sweepContents removes all but the folder itself: first the processes, which
// hold everything else.
func (p paths) sweepContents() error {
	var err error
	for range 6 { // each try waits five seconds
		if err = cgroup.Remove(p.cgroup); err == nil {
			break
		}
	}
	if err != nil {
		return err
	}
	unix.Rmdir(filepath.Dir(p.cgroup)) // refuses unless this was the last lab
	if err := unmountBelow(p.folder); err != nil {
		return err
	}
	entries, err := os.ReadDir(p.folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := os.RemoveAll(filepath.Join(p.folder, entry.Name())); err != nil {
			return err
		}
	}
	return nil
}

// unmountBelow unmounts everything below a folder, the last mounted first. The
// kernel frees a namespace when its last mount and process are gone.
func unmountBelow(folder string) error {
	mounts, err := mountsBelow(folder)
	if err != nil {
		return err
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		err := unix.Unmount(mounts[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", mounts[i], err)
		}
	}
	if mounts, err = mountsBelow(folder); err == nil && len(mounts) > 0 {
		return fmt.Errorf("unmount %s: it is still mounted", mounts[0])
	}
	return err
}

// mountsBelow lists mount points from /proc/self/mountinfo (proc(5)).
func mountsBelow(folder string) ([]string, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer file.Close()
	var mounts []string
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 5 {
			continue
		}
		if path := unescape(fields[4]); strings.HasPrefix(path, folder+"/") {
			mounts = append(mounts, path)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return mounts, nil
}

// unescape undoes mountinfo's \ooo for blanks and backslashes.
func unescape(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

// List names the labs of this host, sorted, those too of which only remains
// are left.
func List() ([]string, error) {
	entries, err := os.ReadDir(Base)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list labs: %w", err)
	}
	var names []string
	for _, entry := range entries {
		if nameForm.MatchString(entry.Name()) {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}
