package dir

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// watch hears from the kernel which files changed. It collects the changes until
// they are taken, so that a thousand of one file are one, and the kernel's queue
// hardly ever runs full. A nil watch watches nothing.
type watch struct {
	fd   int
	file *os.File
	// wake receives when there is something to take.
	wake chan struct{}

	mu      sync.Mutex
	places  map[int32]*place
	round   int
	pending changes
	// moves are the files moved away within the last grace, by the number that
	// the kernel gives both halves of a move.
	moves map[uint32]string
}

// grace is how long a file that was moved away counts as still there. Editors
// move the old file aside before they write the new one, and the objects in it
// must not vanish for these milliseconds.
const grace = 100 * time.Millisecond

// place is a folder that is watched: all of it, or certain names in it.
type place struct {
	path  string
	all   bool
	names map[string]bool
	// round is when it was last asked for; older ones are given up.
	round int
}

// changes are what happened since it was last asked.
type changes struct {
	// files were written, moved or removed.
	files map[string]bool
	// left were moved away a while ago and may be back by now.
	left map[string]bool
	// everything says that folders changed or events were lost.
	everything bool
	// since is when the first of them was heard of.
	since time.Time
}

// written comes when a file is whole: closed by its writer or moved into place.
const (
	written = unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_CREATE
	moved   = unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
)

func newWatch() (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == unix.EMFILE {
		return nil, fmt.Errorf("%w: raise fs.inotify.max_user_instances", err)
	}
	if err != nil {
		return nil, err
	}
	w := &watch{
		fd: fd, file: os.NewFile(uintptr(fd), "inotify"),
		wake: make(chan struct{}, 1), places: map[int32]*place{},
		pending: noChanges(), moves: map[uint32]string{},
	}
	go w.listen()
	return w, nil
}

func (w *watch) close() { w.file.Close() }

// start begins a look at everything; what nobody asks for until finish is not
// watched any more.
func (w *watch) start() {
	if w != nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.round++
	}
}

func (w *watch) finish() {
	if w == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for wd, p := range w.places {
		if p.round != w.round {
			unix.InotifyRmWatch(w.fd, uint32(wd)) // gone already, or going now
			delete(w.places, wd)
		}
	}
}

// folder watches all of a folder.
func (w *watch) folder(path string) error {
	p, err := w.place(path)
	if p != nil {
		p.path, p.all = path, true
		w.mu.Unlock()
	}
	return err
}

// name watches for one name in its folder, whatever is there or comes there. A
// folder that cannot be watched is passed over: only the replacement of the root
// or of a link's target as a whole goes unnoticed then.
func (w *watch) name(path string) {
	if p, _ := w.place(filepath.Dir(path)); p != nil {
		p.names[filepath.Base(path)] = true
		w.mu.Unlock()
	}
}

// place adds a folder to what is watched and returns it with w.mu held.
func (w *watch) place(path string) (*place, error) {
	if w == nil {
		return nil, nil
	}
	w.mu.Lock()
	wd, err := unix.InotifyAddWatch(w.fd, path, written|moved|unix.IN_ONLYDIR)
	if err != nil {
		w.mu.Unlock()
		return nil, err
	}
	p := w.places[int32(wd)]
	if p == nil || p.round != w.round {
		p = &place{path: path, names: map[string]bool{}, round: w.round}
		w.places[int32(wd)] = p
	}
	return p, nil
}

// take returns what changed since the last call.
func (w *watch) take() changes {
	w.mu.Lock()
	defer w.mu.Unlock()
	taken := w.pending
	w.pending = noChanges()
	return taken
}

func noChanges() changes { return changes{files: map[string]bool{}, left: map[string]bool{}} }

// listen reads events until the watch is closed.
func (w *watch) listen() {
	buffer := make([]byte, 64<<10)
	for {
		n, err := w.file.Read(buffer)
		if err != nil {
			return
		}
		w.note(buffer[:n])
	}
}

// note adds events to what is pending.
func (w *watch) note(events []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		cookie := binary.NativeEndian.Uint32(events[8:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		name := string(bytes.TrimRight(events[unix.SizeofInotifyEvent:end], "\x00"))
		events = events[end:]
		w.event(wd, mask, cookie, name)
	}
	if w.pending.everything || len(w.pending.files) > 0 {
		w.ring()
	}
}

// ring wakes the reader of wake.
func (w *watch) ring() {
	if w.pending.since.IsZero() {
		w.pending.since = time.Now()
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watch) event(wd int32, mask, cookie uint32, name string) {
	p := w.places[wd]
	switch {
	case mask&unix.IN_Q_OVERFLOW != 0:
		w.pending.everything = true
	case p == nil:
	case mask&unix.IN_IGNORED != 0:
		delete(w.places, wd)
	case p.names[name]:
		w.pending.everything = true
	case strings.HasPrefix(name, "..") && mask&(unix.IN_MOVED_TO|unix.IN_CREATE) != 0:
		// A mounted ConfigMap changes by moving a new link over ..data.
		w.pending.everything = true
	case !p.all:
	case mask&moved != 0 || mask&unix.IN_ISDIR != 0 && !hidden(name):
		w.pending.everything = true
	case manifestName(name):
		w.change(filepath.Join(p.path, name), mask, cookie)
	}
}

// change notes what happened to a manifest.
func (w *watch) change(path string, mask, cookie uint32) {
	switch {
	case mask&unix.IN_MOVED_FROM != 0:
		w.moves[cookie] = path
		time.AfterFunc(grace, func() { w.leave(path, cookie) })
		return
	case mask&unix.IN_CREATE != 0 && !linked(path):
		return
	}
	w.pending.files[path] = true
	if from := w.moves[cookie]; mask&unix.IN_MOVED_TO != 0 && from != "" {
		w.pending.files[from] = true // it got another name, and both count at once
	}
}

// leave notes that a file was moved away and had its time to come back.
func (w *watch) leave(path string, cookie uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.moves, cookie)
	w.pending.left[path] = true
	w.ring()
}

// linked says whether a name that appeared is a link and so complete; an ordinary
// new file is complete when its writer closes it.
func linked(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && (st.Mode&unix.S_IFMT == unix.S_IFLNK || st.Nlink > 1)
}
