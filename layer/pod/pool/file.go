package pool

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// File is where a Book is written down. A crash leaves the old one or the new one,
// never a part.
type File struct{ Path string }

// format is raised with every change of what a field of Book means.
const format = 1

type written struct {
	Format int `json:"format"`
	Book
}

// Read reads the book; one that does not exist is empty. There is false where that is so.
func (f File) Read() (book Book, there bool, err error) {
	text, err := os.ReadFile(f.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return Book{}, false, nil
	}
	if err != nil {
		return Book{}, false, fmt.Errorf("read the pods' addresses: %w", err)
	}
	var w written
	if err := json.Unmarshal(text, &w); err != nil {
		return Book{}, true, fmt.Errorf("read the pods' addresses in %s: %w", f.Path, err)
	}
	if w.Format != format {
		return Book{}, true, fmt.Errorf("read the pods' addresses in %s: it has format %d, this version of millrace knows %d only", f.Path, w.Format, format)
	}
	return w.Book, true, nil
}

// Write writes the book, and returns when it will outlast a crash of the machine: the
// file, and the folder that names it (fsync(2)).
func (f File) Write(book Book) error {
	text, err := json.Marshal(written{format, book})
	if err == nil {
		err = Replace(f.Path, 0o600, bytes.NewReader(text))
	}
	if err != nil {
		return fmt.Errorf("write the pods' addresses: %w", err)
	}
	return nil
}

// Replace writes a file whole, or not at all, and returns when it will outlast a crash of
// the machine. A crash may leave Half of it beside.
func Replace(path string, mode fs.FileMode, from io.Reader) error {
	next := Half(path)
	file, err := os.OpenFile(next, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	if _, err = io.Copy(file, from); err == nil {
		err = file.Chmod(mode) // whatever the umask is
	}
	if err == nil {
		err = file.Sync()
	}
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		_ = os.Remove(next)
		return err
	}
	folder, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync()
}

// SetAside renames a book that cannot be read, so that another one can be begun and
// somebody can look at it. It returns the new name,
// which is always the same.
func (f File) SetAside() (string, error) {
	aside := f.aside()
	if err := os.Rename(f.Path, aside); err != nil {
		return "", fmt.Errorf("set the pods' addresses aside: %w", err)
	}
	return aside, nil
}

// Half is where a file is written before it gets its name.
func Half(path string) string { return path + ".next" }

func (f File) aside() string { return f.Path + ".unreadable" }

// Paths are all files that there may be: the book, one that was set aside, and one that a
// crash left half written.
func (f File) Paths() []string { return []string{f.Path, f.aside(), Half(f.Path)} }
