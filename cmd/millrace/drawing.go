package main

import (
	"fmt"
	"io"
	"os"
)

// drawing is the file that a report is drawn into: under another name until it is
// whole, so that one that was there stays if the measurement fails.
type drawing struct {
	path string
	file *os.File
}

// newDrawing makes the file; without a path there is none.
func newDrawing(path string) (*drawing, error) {
	if path == "" {
		return &drawing{}, nil
	}
	file, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("write page: %w", err)
	}
	return &drawing{path, file}, nil
}

// finish writes the report, or takes the file away if there is none because of
// failed, which it returns.
func (d *drawing) finish(write func(io.Writer) error, failed error) error {
	if d.file == nil {
		return failed
	}
	err := failed
	if err == nil {
		err = write(d.file)
	}
	if closed := d.file.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(d.file.Name(), d.path)
	}
	if err != nil {
		os.Remove(d.file.Name())
	}
	return err
}
