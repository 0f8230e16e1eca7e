package dir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/cluster"
)

// stamp tells one state of a file from another without reading it.
type stamp struct {
	inode   uint64
	size    int64
	changed syscall.Timespec
}

// fresh is how young a change may be for a further one to leave the same time
// on the file: the clock behind file times ticks every 4 to 10 ms.
const fresh = 100 * time.Millisecond

// stampOf is the zero stamp, which equals none, for a file that changed so
// recently that its times do not tell yet.
func stampOf(info fs.FileInfo) stamp {
	st := info.Sys().(*syscall.Stat_t)
	if time.Since(time.Unix(st.Ctim.Unix())) < fresh {
		return stamp{}
	}
	return stamp{inode: st.Ino, size: info.Size(), changed: st.Ctim}
}

// walk is one look at everything below the root.
type walk struct {
	source *Source
	watch  *watch // nil when changes are of no interest
	// found are the manifests that are there, folders what holds them.
	found, folders map[string]bool
	// blind is what the paths below the folders that could not be read start with.
	blind []string
	// linked are the folders that links lead to. They come last, so that a folder
	// which is there by itself too is known by its own path.
	linked []string
	// been are the folders already read: links may lead to one twice, or in circles.
	been map[folderID]bool
}

type folderID struct{ device, inode uint64 }

// scan looks at the root and everything below it, reads what changed and forgets
// what is gone.
func (s *Source) scan(w *watch) {
	look := &walk{source: s, watch: w, found: map[string]bool{}, folders: map[string]bool{}, been: map[folderID]bool{}}
	info, err := os.Stat(s.path)
	if err != nil {
		s.rootGone(err)
		w.start()
		look.follow(s.path)
		w.finish()
		return
	}
	s.remark(s.path, "", 0)
	w.start()
	look.follow(s.path)
	if info.IsDir() {
		look.folder(s.path, info)
		look.links()
	} else {
		look.found[s.path] = true
		s.load(s.path, w)
	}
	w.finish()
	look.forget()
}

// rootGone notes that there is nothing at the path any more.
func (s *Source) rootGone(err error) {
	unread := 1
	if s.folders[s.path] || s.files.byPath[s.path] != nil {
		unread = 0 // its files are known, or counted one by one
	}
	s.remark(s.path, fmt.Sprintf("%v; what it said stays in force: put it back", cause(err)), unread)
}

// forget drops the files and folders that are gone.
func (l *walk) forget() {
	s := l.source
	for path := range s.files.byPath {
		if !l.found[path] && !l.unseen(path) {
			s.files.remove(path)
		}
	}
	for path := range s.folders {
		if !l.folders[path] && !l.unseen(path) {
			s.remark(path, "", 0)
			delete(s.folders, path)
		}
	}
}

// folder watches and then reads one folder, so that nothing slips in between.
func (l *walk) folder(path string, info fs.FileInfo) {
	st := info.Sys().(*syscall.Stat_t)
	id := folderID{st.Dev, st.Ino}
	if l.been[id] {
		return
	}
	l.been[id] = true
	trouble := ""
	if err := l.watch.folder(path); err != nil {
		trouble = fmt.Sprintf("changes go unnoticed: %v: raise fs.inotify.max_user_watches", err)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		l.closed(path, err)
	} else {
		l.folders[path], l.source.folders[path] = true, true
		l.source.remark(path, trouble, 0)
	}
	for _, e := range entries {
		if !hidden(e.Name()) {
			l.entry(filepath.Join(path, e.Name()), e)
		}
	}
}

// closed notes a folder that cannot be read. It is unread unless it was read
// before: then it is known what its files said.
func (l *walk) closed(path string, err error) {
	l.blind = append(l.blind, strings.TrimSuffix(filepath.Join(path, "x"), "x"))
	unread, known := 1, l.source.folders[path]
	if known {
		unread = 0
	}
	l.folders[path], l.source.folders[path] = true, known
	l.source.remark(path, fmt.Sprintf("%v; what its files said stays in force: make it readable", cause(err)), unread)
}

// links reads the folders that links lead to, and those that they link to.
func (l *walk) links() {
	for len(l.linked) > 0 {
		path := l.linked[0]
		l.linked = l.linked[1:]
		l.follow(path)
		if info, err := os.Stat(path); err == nil && info.IsDir() {
			l.folder(path, info)
		}
	}
}

func (l *walk) entry(path string, e fs.DirEntry) {
	linked := e.Type()&fs.ModeSymlink != 0
	if !linked && !e.IsDir() && !manifestName(path) {
		return
	}
	info, err := os.Stat(path)
	switch {
	case err != nil && manifestName(path):
		l.file(path, linked, stamp{}) // say why it cannot be read
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		l.closed(path, err)
	case err != nil:
	case info.IsDir() && linked:
		l.linked = append(l.linked, path)
	case info.IsDir():
		l.folder(path, info)
	case manifestName(path):
		l.file(path, linked, stampOf(info))
	}
}

// file reads a file unless it is the same as last time.
func (l *walk) file(path string, linked bool, now stamp) {
	l.found[path] = true
	if linked {
		l.follow(path)
	}
	if known := l.source.files.byPath[path]; linked || known == nil || now == (stamp{}) || known.stamp != now {
		l.source.load(path, l.watch)
	}
}

// maxLinks is how many links in a row are followed; the kernel allows as many.
const maxLinks = 40

// follow watches for path itself, and what it links to, being put elsewhere. Where
// that is gone, each step that the links still name is watched for its return.
func (l *walk) follow(path string) {
	path, err := filepath.Abs(path)
	if err != nil {
		return
	}
	l.watch.name(path)
	if real, err := filepath.EvalSymlinks(path); err == nil {
		l.watch.name(real)
		return
	}
	for range maxLinks {
		target, err := os.Readlink(path)
		if err != nil {
			return
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = target
		l.watch.name(path)
	}
}

// unseen says that a path is below a folder that could not be read.
func (l *walk) unseen(path string) bool {
	for _, folder := range l.blind {
		if strings.HasPrefix(path, folder) {
			return true
		}
	}
	return false
}

// load reads a file. One that is gone is forgotten, unless it is the root, and
// one that is being written is left for later.
func (s *Source) load(path string, w *watch) {
	if w.drafted(path) {
		s.unfinished(path)
		return
	}
	data, at, err := read(path)
	switch {
	case w.drafted(path): // began while it was read
		s.unfinished(path)
	case errors.Is(err, fs.ErrNotExist) && path != s.path && !isLink(path):
		s.files.remove(path)
	case err != nil:
		s.files.unreadable(path, fmt.Sprintf("cannot be read, what it said before stays in force: %v", cause(err)))
	default:
		s.files.put(path, data, at)
	}
}

// unfinished leaves in force what a file said before it is being written. If that
// is not known, as after a restart, it counts as unread.
func (s *Source) unfinished(path string) {
	if s.files.byPath[path] == nil {
		s.files.unreadable(path, "is being written, and is read when its writer closes it")
	}
}

// isLink tells a link that leads nowhere from a file that is gone.
func isLink(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode()&fs.ModeSymlink != 0
}

// read reads an ordinary file of at most MaxFile, or a byte more of one that
// grows meanwhile, which decode refuses.
func read(path string) ([]byte, stamp, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, stamp{}, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, stamp{}, err
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, stamp{}, errors.New("it is no ordinary file")
	case info.Size() > MaxFile:
		return nil, stamp{}, fmt.Errorf("it is larger than %d MiB: split it", MaxFile>>20)
	}
	data := make([]byte, 0, min(info.Size(), MaxFile)+512)
	for limited := io.LimitReader(file, MaxFile+1); ; {
		n, err := limited.Read(data[len(data):cap(data)])
		data = data[:len(data)+n]
		switch {
		case err == io.EOF:
			return data, stampOf(info), nil
		case err != nil:
			return nil, stamp{}, err
		case len(data) == cap(data):
			data = append(data, 0)[:len(data)]
		}
	}
}

// remark says what is wrong with a folder, or that nothing is any more.
func (s *Source) remark(path, text string, unread int) {
	said := cluster.Remark{Unread: unread}
	if text != "" {
		said.Problems = []model.Problem{{Where: path, Text: text}}
	}
	s.files.cluster.Remark("folder: "+path, said)
}

// cause is an error without the path, which the message has already.
func cause(err error) error {
	if pathErr := new(fs.PathError); errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}

// hidden names are not read: editors, Kubernetes and Writer put unfinished and
// internal files there.
func hidden(name string) bool { return strings.HasPrefix(name, ".") }

// manifestName says whether a file in a folder is taken for a manifest.
func manifestName(path string) bool {
	switch strings.ToLower(filepath.Ext(path)) {
	case ".yaml", ".yml", ".json":
		return !hidden(filepath.Base(path))
	}
	return false
}
