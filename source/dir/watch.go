package dir

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
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
	buffer  []byte
	places  map[int32]*place
	round   int
	pending changes
	// moves are the files moved away within the last grace, by the number that
	// the kernel gives both halves of a move.
	moves map[uint32]string
	// drafts are the files that are being written.
	drafts map[spot]*draft
}

// spot is a name in a folder that is watched. It stays the same when the folder
// gets another path.
type spot struct {
	wd   int32
	name string
}

// draft is a file that is being written.
type draft struct {
	// last is when something was last written.
	last time.Time
	// asked are the paths by which it was to be read meanwhile.
	asked map[string]bool
}

// patience is how long after its last write a file is read that nobody closes.
const patience = 5 * time.Second

// grace is how long a file that was moved away counts as still there. Editors
// move the old file aside before they write the new one, and the objects in it
// must not vanish for these milliseconds.
const grace = 100 * time.Millisecond

// place is a folder that is watched: all of it, or certain names in it. The
// numbers are the rounds in which each was last asked for, 0 for never; what is
// older is given up when a round is over, so that nothing is missed during it.
type place struct {
	path  string
	all   int
	names map[string]int
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
// writing comes before that.
const (
	written = unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_CREATE
	writing = unix.IN_MODIFY
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
		wake: make(chan struct{}, 1), buffer: make([]byte, 64<<10), places: map[int32]*place{},
		pending: noChanges(), moves: map[uint32]string{}, drafts: map[spot]*draft{},
	}
	conn, err := w.file.SyscallConn()
	if err != nil {
		w.close()
		return nil, err
	}
	go w.listen(conn)
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
		maps.DeleteFunc(p.names, func(_ string, round int) bool { return round != w.round })
		if p.all != w.round {
			p.all = 0
		}
	}
}

// folder watches all of a folder.
func (w *watch) folder(path string) error {
	p, err := w.place(path)
	if p != nil {
		p.path, p.all = path, w.round
		w.mu.Unlock()
	}
	return err
}

// name watches for one name in its folder, whatever is there or comes there. A
// folder that cannot be watched is passed over: only the replacement of the root
// or of a link's target as a whole goes unnoticed then.
func (w *watch) name(path string) {
	if p, _ := w.place(filepath.Dir(path)); p != nil {
		p.names[filepath.Base(path)] = w.round
		w.mu.Unlock()
	}
}

// place adds a folder to what is watched and returns it with w.mu held.
func (w *watch) place(path string) (*place, error) {
	if w == nil {
		return nil, nil
	}
	w.mu.Lock()
	wd, err := unix.InotifyAddWatch(w.fd, path, written|writing|moved|unix.IN_ONLYDIR)
	if err != nil {
		w.mu.Unlock()
		return nil, err
	}
	p := w.places[int32(wd)]
	if p == nil {
		p = &place{names: map[string]int{}}
		w.places[int32(wd)] = p
	}
	if p.round != w.round {
		p.path, p.round = path, w.round
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
func (w *watch) listen(conn syscall.RawConn) {
	for conn.Read(func(uintptr) bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.hear()
	}) == nil {
	}
}

// hear takes events from the kernel, false if there are none. It holds w.mu from
// before the read, so that they are noted in the order in which they came.
func (w *watch) hear() bool {
	n, err := unix.Read(w.fd, w.buffer)
	if err != nil {
		return err == unix.EINTR
	}
	w.note(w.buffer[:n])
	return true
}

// note adds events to what is pending. It is called with w.mu held.
func (w *watch) note(events []byte) {
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
	if p != nil && p.file(name, mask) && w.write(spot{wd, name}, filepath.Join(p.path, name), mask) {
		return
	}
	switch {
	case mask&unix.IN_Q_OVERFLOW != 0:
		w.pending.everything = true
	case p == nil:
	case mask&unix.IN_IGNORED != 0:
		delete(w.places, wd)
	case p.names[name] > 0:
		w.pending.everything = true
	case strings.HasPrefix(name, "..") && mask&(unix.IN_MOVED_TO|unix.IN_CREATE) != 0:
		// A mounted ConfigMap changes by moving a new link over ..data.
		w.pending.everything = true
	case p.all == 0:
	case mask&moved != 0 || mask&unix.IN_ISDIR != 0 && !hidden(name):
		w.pending.everything = true
	case manifestName(name):
		w.change(filepath.Join(p.path, name), mask, cookie)
	}
}

// file says whether an event is about a file that may be read.
func (p *place) file(name string, mask uint32) bool {
	return mask&unix.IN_ISDIR == 0 && (p.names[name] > 0 || p.all > 0 && manifestName(name))
}

// write notes whether a file is being written. It is called for each piece of a
// large file and so does next to nothing then.
func (w *watch) write(at spot, path string, mask uint32) bool {
	d := w.drafts[at]
	switch {
	case mask&writing == 0 && (mask&unix.IN_CREATE == 0 || linked(path)):
		if mask&written != 0 && d != nil {
			w.settle(at, d)
		}
		return false
	case d == nil:
		w.drafts[at] = &draft{last: time.Now(), asked: map[string]bool{}}
		time.AfterFunc(patience, func() { w.tire(at) })
	default:
		d.last = time.Now()
	}
	return true
}

// settle ends a draft, and has it read where that was put off.
func (w *watch) settle(at spot, d *draft) {
	delete(w.drafts, at)
	for path := range d.asked {
		w.pending.files[path] = true
	}
}

// tire has a draft read that nobody wrote to for long.
func (w *watch) tire(at spot) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.drafts[at]
	if d == nil {
		return
	}
	if rest := patience - time.Since(d.last); rest > 0 {
		time.AfterFunc(rest, func() { w.tire(at) })
		return
	}
	w.settle(at, d)
	switch p := w.places[at.wd]; {
	case p == nil:
	case p.names[at.name] > 0:
		w.pending.everything = true
	default:
		w.pending.files[filepath.Join(p.path, at.name)] = true
	}
	w.ring()
}

// drafted says whether the file at path, by whatever path it is written, is being
// written as far as the kernel has told. If so, it is among the changes later.
func (w *watch) drafted(path string) bool {
	if w == nil {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.hear() {
	}
	if len(w.drafts) == 0 {
		return false
	}
	info, err := os.Stat(path)
	if err != nil {
		return false
	}
	for at, d := range w.drafts {
		p := w.places[at.wd]
		if p == nil {
			continue
		}
		if other, err := os.Stat(filepath.Join(p.path, at.name)); err == nil && os.SameFile(info, other) {
			d.asked[path] = true
			return true
		}
	}
	return false
}

// change notes what happened to a manifest.
func (w *watch) change(path string, mask, cookie uint32) {
	if mask&unix.IN_MOVED_FROM != 0 {
		w.moves[cookie] = path
		time.AfterFunc(grace, func() { w.leave(path, cookie) })
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
