package cluster

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/millrace/millrace/model"
)

// Snapshot is everything in force now. It is the same pointer as the last one
// if nothing has changed, else its number is one higher.
func (c *Cluster) Snapshot() *model.Snapshot {
	c.settle()
	next := *c.last
	changed := c.services.merge()
	changed = c.pods.merge() || changed
	changed = c.nodes.merge() || changed
	changed = c.workloads.merge() || changed
	next.Services, next.Pods, next.Nodes, next.Workloads = c.services.items, c.pods.items, c.nodes.items, c.workloads.items
	if c.problemsChanged || c.remarked {
		next.Problems = c.problems()
		changed = changed || !slices.Equal(next.Problems, c.last.Problems)
	}
	if c.remarked {
		next.Ignored = c.ignored()
		changed = changed || !maps.Equal(next.Ignored, c.last.Ignored)
	}
	next.Unread = c.unread
	changed = changed || next.Unread != c.last.Unread
	c.problemsChanged, c.remarked = false, false
	if next.Complete = c.complete; next.Complete == c.last.Complete && !changed {
		return c.last
	}
	next.Number++
	c.last = &next
	return c.last
}

// settle looks again at whatever the changes since the last Snapshot concern.
func (c *Cluster) settle() {
	for k := range c.dirtyServices {
		c.settleService(k)
	}
	for k := range c.dirtyPods {
		c.settlePod(k)
	}
	if c.dirtyNodes {
		c.settleNodes()
	}
	// New maps, because going through an emptied one costs what it once held.
	c.dirtyServices, c.dirtyPods, c.dirtyNodes = map[Key]struct{}{}, map[Key]struct{}{}, false
}

func (c *Cluster) settleService(k Key) {
	o := c.inForce(c.serviceIPs, k)
	if o == nil {
		c.services.set(Key{Name: k.Name}, nil)
		return
	}
	from := slices.Collect(maps.Values(c.slices[k.Name]))
	c.services.set(Key{Name: k.Name}, join(o.value.(*model.Service), from))
}

func (c *Cluster) settlePod(k Key) {
	var pod *model.Pod
	if o := c.inForce(c.podIPs, k); o != nil {
		pod = o.value.(*model.Pod)
	}
	c.pods.set(Key{Name: k.Name}, pod)
}

// inForce is the object under k, unless it lost an address to an older one or
// has nothing to show.
func (c *Cluster) inForce(all claims, k Key) *Object {
	e := c.objects[k]
	if e == nil || e.now.value == nil {
		c.setProblems(c.clashes, k, nil)
		return nil
	}
	lost := all.lost(e.now)
	c.setProblems(c.clashes, k, lost)
	if len(lost) > 0 {
		return nil
	}
	return e.now
}

// problems are all there are, by file, line and object.
func (c *Cluster) problems() []model.Problem {
	var all []model.Problem
	for _, list := range c.faults {
		all = append(all, list...)
	}
	for _, list := range c.clashes {
		all = append(all, list...)
	}
	for _, r := range c.remarks {
		all = append(all, r.Problems...)
	}
	slices.SortFunc(all, func(a, b model.Problem) int {
		return cmp.Or(compareWhere(a.Where, b.Where), strings.Compare(a.Object, b.Object),
			strings.Compare(a.Field, b.Field), strings.Compare(a.Text, b.Text))
	})
	return all
}

// compareWhere orders "shop.yaml:9" before "shop.yaml:14".
func compareWhere(a, b string) int {
	fileA, lineA := splitWhere(a)
	fileB, lineB := splitWhere(b)
	return cmp.Or(strings.Compare(fileA, fileB), cmp.Compare(lineA, lineB), strings.Compare(a, b))
}

func splitWhere(where string) (file string, line int) {
	i := strings.LastIndexByte(where, ':')
	if i < 0 {
		return where, 0
	}
	line, err := strconv.Atoi(where[i+1:])
	if err != nil {
		return where, 0
	}
	return where[:i], line
}

// ignored counts the objects passed over, nil for none.
func (c *Cluster) ignored() map[string]int {
	var all map[string]int
	for _, r := range c.remarks {
		for kind, n := range r.Ignored {
			if all == nil {
				all = map[string]int{}
			}
			all[kind] += n
		}
	}
	return all
}
