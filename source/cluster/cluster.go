package cluster

import (
	"iter"
	"maps"
	"slices"

	"k8s.io/apimachinery/pkg/runtime"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/corefile"
)

// Cluster holds the objects a source has seen. One goroutine at a time may use
// it; the Snapshots it gives are for all.
type Cluster struct {
	// objects are as they were last put.
	objects index[Key]
	// standIns are in force instead of those among objects that came with a fault.
	standIns map[Key]*Object
	// slices are the EndpointSlices in force, one of those of each Service that
	// they name, which may not have come yet. The others follow it.
	slices index[model.Name]
	// nodesInForce are the Nodes in force, before their ranges are settled.
	nodesInForce map[Key]*Object
	serviceIPs   claims[[16]byte]
	nodePorts    claims[nodePort]
	podIPs       claims[[16]byte]

	services  list[model.Service]
	pods      list[model.Pod]
	nodes     list[model.Node]
	workloads list[model.Workload]

	// What has to be looked at again before the next Snapshot.
	dirty      []*Object // Services and pods
	dirtyNodes bool

	names names

	faults          map[Key][]model.Problem
	clashes         map[Key][]model.Problem
	remarks         map[string]Remark
	remarked        bool
	others          map[model.Name]bool // Services that are another proxy's
	problemsChanged bool
	// unread counts the objects of which a faulty version is in force, and what
	// the remarks count.
	unread int

	complete, named bool
	// unknown is why objects that configure the DNS servers are not known; dns is what was
	// read last, of dnsOf.
	unknown map[Key]string
	dns     *model.DNS
	dnsOf   dnsInput
	last    *model.Snapshot
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
		objects:      newIndex(func(o *Object, k Key) bool { return o.Key() == k }),
		standIns:     map[Key]*Object{},
		slices:       newIndex(func(o *Object, service model.Name) bool { return serviceOf(o) == service }),
		nodesInForce: map[Key]*Object{},
		serviceIPs:   addressClaims(),
		nodePorts:    nodePortClaims(),
		podIPs:       addressClaims(),
		services:     newList(func(s *model.Service) Key { return Key{Name: s.Name} }),
		pods:         newList(func(p *model.Pod) Key { return Key{Name: p.Name} }),
		nodes:        newList(func(n *model.Node) Key { return Key{Name: model.Name{Name: n.Name}} }),
		workloads:    newList(func(w *model.Workload) Key { return Key{w.Kind, w.Name} }),
		names:        names{},
		faults:       map[Key][]model.Problem{},
		clashes:      map[Key][]model.Problem{},
		remarks:      map[string]Remark{},
		others:       map[model.Name]bool{},
		unknown:      map[Key]string{},
		last:         &model.Snapshot{},
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
// not replace a faultless one: that stays in force, and the faults are told. It
// returns what is kept of o: the object that was there if that says the same.
func (c *Cluster) Put(o *Object) *Object {
	k := o.Key()
	old := c.objects.get(k)
	if old != nil && old.same(o) {
		return old
	}
	if !o.shared {
		c.names.object(o)
		o.shared = true
	}
	before := c.inForce(k)
	c.objects.set(k, o)
	c.setProblems(c.faults, k, o.Problems())
	if o.faulty() && before != nil && !before.faulty() {
		c.standIns[k] = before
	} else {
		delete(c.standIns, k)
		c.replace(before, o)
	}
	return o
}

// Said is the object as it was last put, nil if there is none.
func (c *Cluster) Said(k Key) *Object { return c.objects.get(k) }

// Keys are those of all objects of a kind as they were last put, in no order. The
// Cluster may not be changed meanwhile.
func (c *Cluster) Keys(kind string) iter.Seq[Key] {
	return func(yield func(Key) bool) {
		for _, o := range c.objects.objects {
			if o != nil && o.kind.String() == kind && !yield(o.Key()) {
				return
			}
		}
	}
}

// inForce is the version of an object that is in force, nil if there is none.
func (c *Cluster) inForce(k Key) *Object {
	if o := c.standIns[k]; o != nil {
		return o
	}
	return c.objects.get(k)
}

// Delete forgets an object. One that is not there is no error.
func (c *Cluster) Delete(k Key) {
	before := c.inForce(k)
	if before == nil {
		return
	}
	c.objects.delete(k)
	delete(c.standIns, k)
	c.setProblems(c.faults, k, nil)
	c.replace(before, nil)
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

// SetNamed says that the source asks for all Services, also those that are for DNS
// alone.
func (c *Cluster) SetNamed() { c.named = true }

// replace takes one version of an object out of force and puts another in.
// Either may be nil.
func (c *Cluster) replace(old, now *Object) {
	if old != nil {
		c.leave(old)
		if now == nil || now.value == nil {
			c.hide(old)
		}
	}
	if now != nil {
		c.arrive(now)
	}
}

// leave takes an object out of force.
func (c *Cluster) leave(o *Object) {
	if o.faulty() {
		c.unread--
	}
	c.noteOther(o, false)
	switch v := o.value.(type) {
	case *model.Service:
		c.serviceIPs.remove(o)
		c.nodePorts.remove(o)
		c.serviceIPs.rivals(o, c.again)
		c.nodePorts.rivals(o, c.again)
	case *model.Pod:
		c.podIPs.remove(o)
		c.podIPs.rivals(o, c.again)
	case *slice:
		c.detach(o, v)
		c.again(c.inForce(Key{kindService.String(), serviceOf(o)}))
	case *model.Node:
		c.dirtyNodes = true
		delete(c.nodesInForce, o.Key())
	case *dnsServers, *corefile.Keys, *model.Masquerade, *model.FlannelNetwork:
		c.remarked = true
	}
}

// hide shows nothing any more of an object that was in force. Nodes are settled
// all together, slices with their Service.
func (c *Cluster) hide(o *Object) {
	switch o.value.(type) {
	case *model.Service:
		c.services.set(Key{Name: o.name}, nil)
	case *model.Pod:
		c.pods.set(Key{Name: o.name}, nil)
	case *model.Workload, *dnsServers:
		c.workloads.set(o.Key(), nil)
	default:
		return
	}
	c.setProblems(c.clashes, o.Key(), nil)
}

// arrive puts an object in force.
func (c *Cluster) arrive(o *Object) {
	if o.faulty() {
		c.unread++
	}
	c.noteOther(o, true)
	switch v := o.value.(type) {
	case *model.Service:
		c.serviceIPs.add(o)
		c.nodePorts.add(o)
		c.again(o)
		c.serviceIPs.rivals(o, c.again)
		c.nodePorts.rivals(o, c.again)
	case *model.Pod:
		c.podIPs.add(o)
		c.again(o)
		c.podIPs.rivals(o, c.again)
	case *slice:
		c.attach(o, v)
		c.again(c.inForce(Key{kindService.String(), serviceOf(o)}))
	case *model.Node:
		c.dirtyNodes = true
		c.nodesInForce[o.Key()] = o
	case *model.Workload:
		c.workloads.set(o.Key(), v)
	case *dnsServers:
		c.workloads.set(o.Key(), v.workload)
		c.remarked = true
	case *corefile.Keys, *model.Masquerade, *model.FlannelNetwork:
		c.remarked = true
	}
}

// noteOther keeps the names of Services that are another proxy's.
func (c *Cluster) noteOther(o *Object, there bool) {
	if o.kind != kindService || o.value != nil {
		return
	}
	if there {
		c.others[o.name] = true
	} else {
		delete(c.others, o.name)
	}
	c.remarked = true
}

// again has a Service or pod settled before the next Snapshot; nil is nobody.
func (c *Cluster) again(o *Object) {
	if o != nil && !o.dirty {
		o.dirty = true
		c.dirty = append(c.dirty, o)
	}
}

// attach adds a slice to those of its Service, as the first of them.
func (c *Cluster) attach(o *Object, s *slice) {
	service := serviceOf(o)
	if s.next = c.slices.get(service); s.next != nil {
		s.next.value.(*slice).previous = o
	}
	c.slices.set(service, o)
}

// detach takes a slice away from those of its Service.
func (c *Cluster) detach(o *Object, s *slice) {
	switch {
	case s.previous != nil:
		s.previous.value.(*slice).next = s.next
	case s.next != nil:
		c.slices.set(serviceOf(o), s.next)
	default:
		c.slices.delete(serviceOf(o))
	}
	if s.next != nil {
		s.next.value.(*slice).previous = s.previous
	}
	s.next, s.previous = nil, nil
}

// slicesOf are the EndpointSlices in force of a Service.
func (c *Cluster) slicesOf(service model.Name) []*Object {
	var all []*Object
	for o := c.slices.get(service); o != nil; o = o.value.(*slice).next {
		all = append(all, o)
	}
	return all
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
