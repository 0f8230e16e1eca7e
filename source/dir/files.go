package dir

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/cluster"
)

// files knows which file says what, and settles which of two files that name
// one object is heard.
type files struct {
	cluster *cluster.Cluster
	byPath  map[string]*file
	// claims are in the order of who is heard. What one file alone says, and says
	// now, is not here: cluster knows it.
	claims map[cluster.Key][]claim
}

// file is one file as it was last read.
type file struct {
	sum     [sha256.Size]byte
	stamp   stamp
	objects []*cluster.Object
	// known says that all of the file could be read, now or before: nothing that
	// it said and cannot say now is missing from objects.
	known bool
}

// claim is what one file says of an object.
type claim struct {
	path   string
	object *cluster.Object
	// kept is for an object that a broken file held before and does not show now.
	kept bool
}

// compare orders by who is heard: what is there before what was there, then by path.
func (c claim) compare(o claim) int {
	switch {
	case c.kept == o.kept:
		return strings.Compare(c.path, o.path)
	case o.kept:
		return -1
	}
	return 1
}

func newFiles() *files {
	f := &files{cluster: cluster.New(), byPath: map[string]*file{}, claims: map[cluster.Key][]claim{}}
	f.cluster.SetNamed() // a folder holds all that there is
	return f
}

// put takes over the data of a file. The same data again changes nothing.
func (f *files) put(path string, data []byte, at stamp) {
	sum := sha256.Sum256(data)
	old := f.byPath[path]
	if old != nil && old.sum == sum {
		old.stamp = at
		return
	}
	f.replace(path, decode(path, data), &file{sum: sum, stamp: at})
}

// unreadable reports a file that cannot be read. What it said stays in force.
func (f *files) unreadable(path string, text string) {
	f.replace(path, contents{
		problems: []model.Problem{{Where: path, Text: text}},
		unread:   1,
	}, &file{})
}

// replace puts what a file says now in the place of what it said before.
func (f *files) replace(path string, now contents, next *file) {
	old := f.byPath[path]
	if old == nil {
		old = &file{}
	}
	next.known = now.unread == 0 || old.known
	next.objects = slices.Clone(now.objects)
	f.byPath[path] = next
	for i, o := range next.objects {
		next.objects[i] = f.claim(o.Key(), claim{path: path, object: o})
	}
	for _, o := range old.objects {
		switch k := o.Key(); {
		case now.byKey[k] != nil:
		case now.unread > 0:
			next.objects = append(next.objects, f.claim(k, claim{path: path, object: o, kept: true}))
		default:
			f.withdraw(k, path)
		}
	}
	said := cluster.Remark{Problems: now.problems, Ignored: now.ignored}
	if !next.known {
		said.Unread = now.unread
	}
	f.cluster.Remark(path, said)
}

// remove forgets a file that is gone. One that never was is no error.
func (f *files) remove(path string) {
	if old := f.byPath[path]; old != nil {
		f.replace(path, contents{}, &file{})
		delete(f.byPath, path)
	}
}

// of are the claims to an object.
func (f *files) of(k cluster.Key) []claim {
	if list := f.claims[k]; list != nil {
		return list
	}
	if o := f.cluster.Said(k); o != nil {
		return []claim{{path: o.File().Name(), object: o}}
	}
	return nil
}

// claim notes what a file says of an object, instead of what it said before. It
// returns what is kept of it: the same as before if that says the same.
func (f *files) claim(k cluster.Key, c claim) *cluster.Object {
	list := slices.DeleteFunc(f.of(k), func(o claim) bool { return o.path == c.path })
	i, _ := slices.BinarySearchFunc(list, c, claim.compare)
	list = slices.Insert(list, i, c)
	f.settle(k, list)
	return list[i].object
}

// withdraw notes that a file says nothing of an object any more.
func (f *files) withdraw(k cluster.Key, path string) {
	f.settle(k, slices.DeleteFunc(f.of(k), func(o claim) bool { return o.path == path }))
}

// settle hears the first file that names an object and reports the others.
func (f *files) settle(k cluster.Key, list []claim) {
	if len(list) == 0 {
		f.cluster.Delete(k)
	} else {
		list[0].object = f.cluster.Put(list[0].object)
	}
	_, several := f.claims[k]
	if len(list) > 1 || len(list) == 1 && list[0].kept {
		several, f.claims[k] = true, list
	} else {
		delete(f.claims, k)
	}
	if several {
		f.cluster.Remark("twice: "+k.String(), cluster.Remark{Problems: twice(list)})
	}
}

// twice reports all but the first of the files that name one object.
func twice(list []claim) []model.Problem {
	var problems []model.Problem
	for i, c := range list {
		if i == 0 || c.kept {
			continue // a kept one most likely moved to the other file
		}
		problems = append(problems, model.Problem{
			Where: c.object.Where(), Object: c.object.Key().String(), Field: "metadata.name",
			Text: fmt.Sprintf("is at %s already, which stays in force: remove or rename one of them", list[0].object.Where()),
		})
	}
	return problems
}
