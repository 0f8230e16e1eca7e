package cluster

import "strconv"

// File is what objects were read from: a file, or an object of an API server.
// All objects of one file share it. Like Cluster, it is for one goroutine.
type File struct {
	name string
	// line and where are the last place that was asked for, so that all objects
	// of a file of one line share its text.
	line  int
	where string
}

// NewFile names a file.
func NewFile(name string) *File { return &File{name: name} }

// Name is the file's name.
func (f *File) Name() string { return f.name }

// Where is a line of the file as a person looks it up, "shop.yaml:14". Line 0 is
// the file itself.
func (f *File) Where(line int) string {
	if line == 0 {
		return f.name
	}
	if line != f.line {
		f.line, f.where = line, f.name+":"+strconv.Itoa(line)
	}
	return f.where
}

// Place is where an object was written.
type Place struct {
	File *File
	// Line is the line of a field such as "spec.ports[0].port"; the empty field is
	// the object itself. Nil where fields have no lines. Read does not keep it.
	Line func(field string) int
}

// At is the Place of an object whose fields have no places of their own.
func At(where string) Place { return Place{File: NewFile(where)} }

func (p Place) line(field string) int {
	if p.Line == nil {
		return 0
	}
	return p.Line(field)
}
