package cluster

import (
	"maps"
	"reflect"
	"slices"

	"k8s.io/apimachinery/pkg/runtime"

	"github.com/millrace/millrace/model"
)

// Cluster holds the objects a source has seen. One goroutine at a time may use
// it; the Snapshots it gives are for all.
type Cluster struct {
	objects map[Key]*entry
	// slices are the EndpointSlices in force, by the Service they name, which
	// may not have come yet.
	slices map[model.Name]map[Key]*Object
	// nodesInForce are the Nodes in force, before their ranges are settled.
	nodesInForce map[Key]*Object
	serviceIPs   claims
	podIPs       claims

	services  list[model.Service]
	pods      list[model.Pod]
	nodes     list[model.Node]
	workloads list[model.Workload]

	// What has to be looked at again before the next Snapshot.
	dirtyServices map[Key]struct{}
	dirtyPods     map[Key]struct{}
	dirtyNodes    bool

	faults          map[Key][]model.Problem
	clashes         map[Key][]model.Problem
	remarks         map[string]Remark
	remarked        bool
	problemsChanged bool
	// unread counts the objects of which a faulty version is in force, and what
	// the remarks count.
	unread int

	complete bool
	last     *model.Snapshot
}

// entry is an object as it was last put and the version of it in force.
type entry struct {
	said *Object
	now  *Object
}

// Remark is what a source itself has to say of one part of its input. The zero
// Remark says nothing.
type Remark struct {
	// Problems belong to no object that the source could read.
	Problems []model.Problem
	// Unread is how much could not be read at all and is not known from before;
	// objects that were Put do not count, whatever is wrong with them.
	Unread int
	// Ignored counts the objects passed over, by kind.
	Ignored map[string]int
}

func (r Remark) equal(o Remark) bool {
	return slices.Equal(r.Problems, o.Problems) && r.Unread == o.Unread && maps.Equal(r.Ignored, o.Ignored)
}

// New makes an empty Cluster. Its Snapshots are not complete before SetComplete.
func New() *Cluster {
	return &Cluster{
		objects:       map[Key]*entry{},
		slices:        map[model.Name]map[Key]*Object{},
		nodesInForce:  map[Key]*Object{},
		serviceIPs:    claims{},
		podIPs:        claims{},
		services:      newList(func(s *model.Service) Key { return Key{Name: s.Name} }),
		pods:          newList(func(p *model.Pod) Key { return Key{Name: p.Name} }),
		nodes:         newList(func(n *model.Node) Key { return Key{Name: model.Name{Name: n.Name}} }),
		workloads:     newList(func(w *model.Workload) Key { return Key{w.Kind, w.Name} }),
		dirtyServices: map[Key]struct{}{},
		dirtyPods:     map[Key]struct{}{},
		faults:        map[Key][]model.Problem{},
		clashes:       map[Key][]model.Problem{},
		remarks:       map[string]Remark{},
		last:          &model.Snapshot{},
	}
}

// Set reads obj, which came from where, and puts it. It returns an error for a
// type that Read does not know.
func (c *Cluster) Set(where string, obj runtime.Object) error {
	o, err := Read(At(where), obj)
	if err == nil {
		c.Put(o)
	}
	return err
}

// Put adds an object or replaces the one of the same key. A faulty version does
// not replace a faultless one: that stays in force, and the faults are told.
func (c *Cluster) Put(o *Object) {
	e := c.objects[o.Key]
	if e == nil {
		e = &entry{}
		c.objects[o.Key] = e
	}
	if e.said != nil && e.said.same(o) {
		return
	}
	e.said = o
	c.setProblems(c.faults, o.Key, o.Problems)
	if !o.faulty || e.now == nil || e.now.faulty {
		c.replace(e.now, o)
		e.now = o
	}
}

// Delete forgets an object. One that is not there is no error.
func (c *Cluster) Delete(k Key) {
	e := c.objects[k]
	if e == nil {
		return
	}
	delete(c.objects, k)
	c.setProblems(c.faults, k, nil)
	c.replace(e.now, nil)
}

// same says whether putting p after o changes anything.
func (o *Object) same(p *Object) bool {
	return o.Where == p.Where && o.faulty == p.faulty && o.born.Equal(p.born) &&
		slices.Equal(o.Problems, p.Problems) && reflect.DeepEqual(o.value, p.value)
}

// Remark says what a source found in one part of its input, named by where. It
// replaces what was said of where before.
func (c *Cluster) Remark(where string, r Remark) {
	old := c.remarks[where]
	if old.equal(r) {
		return
	}
	c.unread += r.Unread - old.Unread
	if r.equal(Remark{}) {
		delete(c.remarks, where)
	} else {
		c.remarks[where] = r
	}
	c.remarked = true
}

// SetComplete says that the source has seen everything once.
func (c *Cluster) SetComplete() { c.complete = true }

// replace takes one version of an object out of force and puts another in.
// Either may be nil.
func (c *Cluster) replace(old, now *Object) {
	if old != nil && old.faulty {
		c.unread--
	}
	if now != nil && now.faulty {
		c.unread++
	}
	for _, o := range []*Object{old, now} {
		if o == nil {
			continue
		}
		arrives := o == now
		switch v := o.value.(type) {
		case *model.Service:
			c.claim(c.serviceIPs, c.dirtyServices, o, arrives)
		case *model.Pod:
			c.claim(c.podIPs, c.dirtyPods, o, arrives)
		case *slice:
			c.attach(v.service, o, arrives)
		case *model.Node:
			c.dirtyNodes = true
			if delete(c.nodesInForce, o.Key); arrives {
				c.nodesInForce[o.Key] = o
			}
		case *model.Workload:
			if arrives {
				c.workloads.set(o.Key, v)
			} else if now == nil || now.value == nil {
				c.workloads.set(o.Key, nil)
			}
		}
	}
}

// claim adds or takes away what o claims, and notes whom that concerns.
func (c *Cluster) claim(all claims, dirty map[Key]struct{}, o *Object, arrives bool) {
	if arrives {
		all.add(o)
	} else {
		all.remove(o)
	}
	dirty[o.Key] = struct{}{}
	all.rivals(o, func(p *Object) { dirty[p.Key] = struct{}{} })
}

// attach adds or takes away a slice of a Service.
func (c *Cluster) attach(service model.Name, o *Object, arrives bool) {
	if arrives {
		if c.slices[service] == nil {
			c.slices[service] = map[Key]*Object{}
		}
		c.slices[service][o.Key] = o
	} else if delete(c.slices[service], o.Key); len(c.slices[service]) == 0 {
		delete(c.slices, service)
	}
	c.dirtyServices[Key{"Service", service}] = struct{}{}
}

// setProblems keeps the problems of an object of one sort.
func (c *Cluster) setProblems(in map[Key][]model.Problem, k Key, problems []model.Problem) {
	if slices.Equal(in[k], problems) {
		return
	}
	c.problemsChanged = true
	if len(problems) == 0 {
		delete(in, k)
	} else {
		in[k] = problems
	}
}
