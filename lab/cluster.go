package lab

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/millrace/millrace/model"
)

// cluster is the living lab: the wishes as last delivered, the pods that
// exist, and a version that grows with every change of either. Whoever needs a
// state of affairs waits for it; nobody polls.
type cluster struct {
	ctx    context.Context // ends when the lab does
	cfg    Config
	paths  paths
	ranges Ranges
	nodes  []*node
	zones  map[string]string
	// slots bound how many pods are made and how many removed at a time.
	making, clearing chan struct{}
	lives            sync.WaitGroup

	mu       sync.Mutex
	changed  chan struct{} // closed, and made anew, whenever anything below changes
	revision uint64        // how often that was
	version  uint64        // grows when what is to be published may have changed
	shown    uint64        // the last version that is wholly published
	up       bool
	wishes   *model.Snapshot
	pods     map[model.Name]*pod
	used     map[model.Name]bool
	cursor   map[string]uint64
	serial   int
	scales   map[string]scale
	book     addressBook
	services []*model.Service         // as last published
	agents   []*agent                 // in the order of nodes
	planned  []model.Problem          // of the last plan
	happened map[string]model.Problem // by what it happened to; gone when it is over
}

// scale is a scale operation. It is in force until the manifest itself says
// another number than it did at that time.
type scale struct{ wanted, manifest int }

func newCluster(ctx context.Context, cfg Config, p paths) *cluster {
	return &cluster{
		ctx:      ctx,
		cfg:      cfg,
		paths:    p,
		making:   make(chan struct{}, 4),
		clearing: make(chan struct{}, 4),
		changed:  make(chan struct{}),
		pods:     map[model.Name]*pod{},
		used:     map[model.Name]bool{},
		cursor:   map[string]uint64{},
		scales:   map[string]scale{},
		book:     addressBook{},
		happened: map[string]model.Problem{},
	}
}

// change runs f under the lock and wakes everybody who waits. It returns the
// new version.
func (c *cluster) change(f func()) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
	return c.bump()
}

// bump is for those who hold the lock.
func (c *cluster) bump() uint64 {
	c.version++
	c.wake()
	return c.version
}

// wait returns when the condition, asked under the lock, holds.
func (c *cluster) wait(ctx context.Context, condition func() bool) error {
	for {
		c.mu.Lock()
		ok, changed := condition(), c.changed
		c.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// published waits until the version is wholly published.
func (c *cluster) published(ctx context.Context, version uint64) error {
	return c.wait(ctx, func() bool { return c.shown >= version })
}

// publishing is what a problem of the store happens to.
const publishing = "published cluster"

// happen notes a problem of a thing, or with an empty text that it is over.
func (c *cluster) happen(object, text string) {
	c.change(func() { c.happenLocked(object, text) })
}

func (c *cluster) happenLocked(object, text string) {
	if text == "" {
		delete(c.happened, object)
		return
	}
	c.happened[object] = model.Problem{Where: "lab " + c.cfg.Name, Object: object, Text: text}
}

// deliver takes new wishes. The nodes stay as they were at first.
func (c *cluster) deliver(s *model.Snapshot) {
	if !s.Complete {
		return
	}
	c.change(func() {
		c.wishes = s
		for _, w := range s.Workloads {
			if old, ok := c.scales[w.String()]; ok && old.manifest != w.Replicas {
				delete(c.scales, w.String())
			}
		}
		text := ""
		if len(c.nodes) > 0 && !c.sameNodes(s) {
			text = "the nodes of a lab are fixed while it is up: run lab down and lab up to change them"
		}
		c.happenLocked("Nodes", text)
	})
}

func (c *cluster) sameNodes(s *model.Snapshot) bool {
	if len(s.Nodes) == 0 {
		return true
	}
	return slices.EqualFunc(s.Nodes, c.nodes, func(a *model.Node, b *node) bool { return a.Name == b.Name })
}

// reconcile plans after every change, until ctx ends.
func (c *cluster) reconcile(ctx context.Context) {
	for seen := uint64(0); ; {
		if c.wait(ctx, func() bool { return c.version != seen }) != nil {
			return
		}
		c.mu.Lock()
		seen = c.version
		c.replan()
		c.mu.Unlock()
	}
}

// replan makes a plan and sets out to fulfil it. The lock is held; what takes
// time happens in the pods' own goroutines.
func (c *cluster) replan() []*pod {
	if c.wishes == nil || len(c.nodes) == 0 || c.ctx.Err() != nil {
		return nil
	}
	p := makePlan(c.situation())
	c.cursor = p.Cursor
	var made []*pod
	for _, m := range p.Create {
		c.serial++
		m.Serial = c.serial
		pod := newPod(m)
		c.pods[m.Pod.Name], c.used[m.Pod.Name] = pod, true
		made = append(made, pod)
		c.lives.Go(func() { c.live(c.ctx, pod) })
	}
	for _, name := range p.Retire {
		c.retire(c.pods[name])
	}
	book, problems := allocateServices(c.wishes.Services, c.book, c.ranges, c.modelNodes())
	problems = append(problems, p.Problems...)
	same := slices.Equal(problems, c.planned) && maps.EqualFunc(book, c.book, slices.Equal)
	c.book, c.planned = book, problems
	if len(p.Create)+len(p.Retire) > 0 || !same {
		c.bump()
	}
	return made
}

// situation is what a plan needs to know. The lock is held.
func (c *cluster) situation() situation {
	s := situation{Snapshot: c.wishes, Nodes: c.modelNodes(), Used: c.used, Cursor: c.cursor, Scale: map[string]int{}}
	for _, p := range c.pods {
		s.Members = append(s.Members, p.member)
	}
	for workload, scale := range c.scales {
		s.Scale[workload] = scale.wanted
	}
	slices.SortFunc(s.Members, func(a, b member) int { return cmp.Compare(a.Serial, b.Serial) })
	return s
}

func (c *cluster) modelNodes() []*model.Node {
	nodes := make([]*model.Node, len(c.nodes))
	for i, n := range c.nodes {
		nodes[i] = n.Node
	}
	return nodes
}

// retire begins the end of a pod. The lock is held.
func (c *cluster) retire(p *pod) {
	if p.Leaving {
		return
	}
	p.Leaving = true
	p.leftAt = c.version + 1
	close(p.leave)
}

// view is the living cluster as it shall be published.
type view struct {
	version  uint64
	services map[model.Name]*model.Service
	pods     map[model.Name]*model.Pod
}

// view pictures the cluster. Services whose addresses clash are left out.
func (c *cluster) view() view {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := view{c.version, map[model.Name]*model.Service{}, map[model.Name]*model.Pod{}}
	var listed []member
	for name, p := range c.pods {
		if p.gone {
			continue
		}
		pod := *p.Pod
		pod.Ready = p.Ready && !p.Leaving
		v.pods[name] = &pod
		listed = append(listed, p.member)
	}
	if c.wishes == nil {
		return v
	}
	index := indexPods(listed)
	for _, s := range c.wishes.Services {
		ips, ok := c.book[s.Name]
		if ok || !needsAddress(s) {
			v.services[s.Name] = publishService(s, ips, index, c.zones)
		}
	}
	return v
}

// publisher keeps the store equal to the living cluster.
type publisher struct {
	store Store
	have  view
}

// publish follows every change until ctx ends. It never waits for pods to be
// made or removed.
func (c *cluster) publish(ctx context.Context, store Store) {
	p := publisher{store: store, have: view{services: map[model.Name]*model.Service{}, pods: map[model.Name]*model.Pod{}}}
	for seen := uint64(0); ; {
		if c.wait(ctx, func() bool { return c.version != seen }) != nil {
			return
		}
		v := c.view()
		seen = v.version
		err := p.show(v)
		c.mu.Lock()
		c.services = sortedServices(v.services)
		if err == nil {
			c.shown = v.version
			c.happenLocked(publishing, "")
		} else {
			c.happenLocked(publishing, err.Error())
		}
		c.wake()
		c.mu.Unlock()
		if err != nil {
			seen = 0 // retry
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
				return
			}
		}
	}
}

// wake wakes those who wait; by itself it makes no new version, which would
// have to be published in turn. It is for those who hold the lock.
func (c *cluster) wake() {
	c.revision++
	close(c.changed)
	c.changed = make(chan struct{})
}

// show writes what differs from what was written before: pods come before the
// Services that lead to them and go after them.
func (p *publisher) show(v view) error {
	if p.store == nil {
		p.have = v
		return nil
	}
	return firstError(
		func() error { return put(p.have.pods, v.pods, samePod, p.store.PutPod) },
		func() error { return put(p.have.services, v.services, sameService, p.store.PutService) },
		func() error { return drop(p.have.services, v.services, p.store.DeleteService) },
		func() error { return drop(p.have.pods, v.pods, p.store.DeletePod) },
	)
}

func firstError(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// put writes the wanted objects that differ, and notes each in have.
func put[T any](have, want map[model.Name]T, same func(a, b T) bool, write func(T) error) error {
	for _, name := range sortedNames(want) {
		old, ok := have[name]
		if ok && same(old, want[name]) {
			continue
		}
		if err := write(want[name]); err != nil {
			return err
		}
		have[name] = want[name]
	}
	return nil
}

// drop deletes the objects that are no longer wanted.
func drop[T any](have, want map[model.Name]T, remove func(model.Name) error) error {
	for _, name := range sortedNames(have) {
		if _, ok := want[name]; ok {
			continue
		}
		if err := remove(name); err != nil {
			return err
		}
		delete(have, name)
	}
	return nil
}

func sortedNames[T any](m map[model.Name]T) []model.Name {
	return slices.SortedFunc(maps.Keys(m), model.Name.Compare)
}

func sortedServices(m map[model.Name]*model.Service) []*model.Service {
	services := make([]*model.Service, 0, len(m))
	for _, name := range sortedNames(m) {
		services = append(services, m[name])
	}
	return services
}

func samePod(a, b *model.Pod) bool {
	return a.Ready == b.Ready && a.Node == b.Node && slices.Equal(a.Addresses, b.Addresses) &&
		a.HostNetwork == b.HostNetwork && maps.Equal(a.Labels, b.Labels) &&
		maps.Equal(a.Annotations, b.Annotations) && slices.Equal(a.Ports, b.Ports)
}

func sameService(a, b *model.Service) bool {
	return a.Type == b.Type && a.Headless == b.Headless && slices.Equal(a.ClusterIPs, b.ClusterIPs) &&
		a.IPv4 == b.IPv4 && a.IPv6 == b.IPv6 && maps.Equal(a.Selector, b.Selector) &&
		a.PublishNotReadyAddresses == b.PublishNotReadyAddresses && maps.Equal(a.Annotations, b.Annotations) &&
		slices.EqualFunc(a.Ports, b.Ports, samePort)
}

func samePort(a, b model.ServicePort) bool {
	return a.Name == b.Name && a.Protocol == b.Protocol && a.Port == b.Port &&
		a.TargetPort == b.TargetPort && a.TargetName == b.TargetName && slices.Equal(a.Backends, b.Backends)
}
