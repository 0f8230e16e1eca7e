package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/millrace/millrace/layer/trace"
	"github.com/millrace/millrace/layer/trace/cause"
)

// captureFile is the file of --pcap; nil if none is wanted.
type captureFile struct {
	*trace.Capture
	file   *os.File
	buffer *bufio.Writer
}

// capture makes the file, and has every packet that dies and is asked for written to it.
func (w *watching) capture(o *trace.Options, spaces []trace.Namespace, q *question) (*captureFile, error) {
	if w.pcap == "" {
		return nil, nil
	}
	file, err := os.Create(w.pcap)
	if err != nil {
		return nil, fmt.Errorf("write packets: %w", err)
	}
	buffer := bufio.NewWriter(file)
	c := &captureFile{file: file, buffer: buffer, Capture: trace.NewCapture(buffer, time.Now(), func(space uint32) string {
		at := slices.IndexFunc(spaces, func(n trace.Namespace) bool { return n.Inode == space })
		if at < 0 || !spaces[at].There() {
			return fmt.Sprintf("net:[%d]", space)
		}
		return spaces[at].Name
	})}
	o.Packets = func(p trace.Packet) {
		if q.asked(&cause.Event{Kind: cause.Drop, Space: p.Space, Tuple: p.Tuple, Packet: p.Data}) {
			c.Write(p)
		}
	}
	return c, nil
}

// finish completes the file once nobody writes to it any more, and says what is in it: of
// all that died, or of those that were asked for.
func (c *captureFile) finish(r *trace.Recording, q *question, progress io.Writer) error {
	if c == nil {
		return nil
	}
	if err := errors.Join(c.Err(), c.buffer.Flush()); err != nil {
		return fmt.Errorf("write packets: %w", err)
	}
	var died uint64
	what := "packets that died"
	if q.everything() {
		for _, t := range r.Totals {
			if t.Kind == cause.Drop {
				died += t.Count
			}
		}
	} else {
		what += " and were asked for"
		for i := range r.Events {
			if e := &r.Events[i]; e.Kind == cause.Drop && q.asked(e) {
				died += e.Count
			}
		}
	}
	fmt.Fprintf(progress, "%s: %d of %d %s\n", c.file.Name(), c.Packets, died, what)
	return nil
}

func (c *captureFile) close() {
	if c != nil {
		c.file.Close()
	}
}
