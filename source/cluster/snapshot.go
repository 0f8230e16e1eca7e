package cluster

import (
	"cmp"
	"maps"
	"reflect"
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
		next.Others = slices.SortedFunc(maps.Keys(c.others), model.Name.Compare)
		changed = changed || !maps.Equal(next.Ignored, c.last.Ignored) || !slices.Equal(next.Others, c.last.Others)
		if dns := c.dnsNow(); !reflect.DeepEqual(dns, c.last.DNS) {
			next.DNS, changed = dns, true
		}
		if m := c.masqueradeNow(); !reflect.DeepEqual(m, c.last.Masquerade) {
			next.Masquerade, changed = m, true
		}
		if n := c.flannelNow(); !reflect.DeepEqual(n, c.last.Flannel) {
			next.Flannel, changed = n, true
		}
	}
	next.Unread, next.Named = c.unread, c.named
	changed = changed || next.Named != c.last.Named
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
	for _, o := range c.dirty {
		if o.dirty = false; c.inForce(o.Key()) != o {
			continue // replaced or gone meanwhile
		}
		switch v := o.value.(type) {
		case *model.Service:
			c.settleService(o, v)
		case *model.Pod:
			c.settlePod(o, v)
		}
	}
	if c.dirtyNodes {
		c.settleNodes()
	}
	c.dirty, c.dirtyNodes = nil, false
}

func (c *Cluster) settleService(o *Object, base *model.Service) {
	k := Key{Name: o.name}
	if !c.owns(&c.serviceIPs, o) {
		c.services.set(k, nil)
		return
	}
	from := c.slicesOf(o.name)
	joined := join(base, from)
	lost := c.withoutLost(o, joined)
	c.setProblems(c.clashes, o.Key(), lost)
	shown := c.services.set(k, joined)
	if len(lost) == 0 {
		o.value = shown // the same but for the endpoints, and there anyway
	}
	shareEndpoints(shown, from)
}

func (c *Cluster) settlePod(o *Object, pod *model.Pod) {
	if !c.owns(&c.podIPs, o) {
		pod = nil
	}
	c.pods.set(Key{Name: o.name}, pod)
}

// owns says whether no older object has an address of o, and notes which.
func (c *Cluster) owns(all *claims[[16]byte], o *Object) bool {
	lost := lostAddresses(all, o)
	c.setProblems(c.clashes, o.Key(), lost)
	return len(lost) == 0
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
	if len(c.others) > 0 {
		if all == nil {
			all = map[string]int{}
		}
		all["Service of another proxy"] += len(c.others)
	}
	return all
}
