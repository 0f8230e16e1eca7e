// Package pack makes the archive of `millrace report`: what somebody needs who helps from
// afar, in one file, without secrets.
//
// It reads settings and counters of the network, never environments, logs, files of pods
// or objects of the API, and takes out of all of it what looks like a secret. It writes
// nothing but the archive; each part is bounded.
package pack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
)

// MostBytes is how much of each part is kept.
const MostBytes = 4 << 20

// Part is one file of the archive.
type Part struct {
	// Name is the file's in the archive.
	Name string
	// From says where the content comes from: a command or a folder.
	From string
	// Read makes the content. With an error what was read so far is kept, too.
	Read func(context.Context) ([]byte, error)
}

// File says what became of a part.
type File struct {
	Name  string `json:"name"`
	From  string `json:"from"`
	Bytes int    `json:"bytes"`
	// Removed is how many secrets were taken out.
	Removed int `json:"removed"`
	// Cut says that there was more than MostBytes.
	Cut   bool   `json:"cut,omitempty"`
	Error string `json:"error,omitempty"`
}

// Contents is the file contents.json of an archive.
type Contents struct {
	Tool    string    `json:"tool"`
	Version string    `json:"version"`
	Node    string    `json:"node"`
	Kernel  string    `json:"kernel"`
	Time    time.Time `json:"time"`
	Files   []File    `json:"files"`
}

// Write reads the parts one after the other and writes them as a gzipped tar whose last
// file is contents.json. A part that cannot be read is no error: contents.json says why.
// It fails if the archive cannot be written, or ctx ends.
func Write(ctx context.Context, w io.Writer, c *Contents, parts []Part, progress io.Writer) error {
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	for i, part := range parts {
		fmt.Fprintf(progress, "%d of %d: %s", i+1, len(parts), part.From)
		content, err := part.Read(ctx)
		if ctx.Err() != nil {
			return fmt.Errorf("read %s: %w", part.From, ctx.Err())
		}
		f := File{Name: part.Name, From: part.From}
		if err != nil {
			f.Error, _ = Redact(err.Error())
		}
		if len(content) > MostBytes {
			content, f.Cut = content[:MostBytes], true
		}
		text, removed := Redact(string(content))
		f.Removed, f.Bytes = removed, len(text)
		if f.Bytes > 0 {
			if err := add(t, c, part.Name, []byte(text)); err != nil {
				return err
			}
		}
		c.Files = append(c.Files, f)
	}
	var contents bytes.Buffer
	encoder := json.NewEncoder(&contents)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(c); err != nil {
		return fmt.Errorf("write contents.json: %w", err)
	}
	if err := add(t, c, "contents.json", contents.Bytes()); err != nil {
		return err
	}
	if err := t.Close(); err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	if err := z.Close(); err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	return nil
}

func add(t *tar.Writer, c *Contents, name string, content []byte) error {
	header := &tar.Header{Name: "millrace-report/" + strings.TrimPrefix(name, "/"), Mode: 0o600, Size: int64(len(content)), ModTime: c.Time}
	err := t.WriteHeader(header)
	if err == nil {
		_, err = t.Write(content)
	}
	if err != nil {
		return fmt.Errorf("write %s into the archive: %w", name, err)
	}
	return nil
}
