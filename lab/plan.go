package lab

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/millrace/millrace/model"
)

// member is a pod of the lab as planning sees it.
type member struct {
	Pod *model.Pod
	// Owner is the workload's String, empty for a pod of its own.
	Owner string
	// Template tells pods of an older version of their manifest from new ones.
	Template uint64
	// Serial grows with every pod the lab makes.
	Serial int
	// Ready: its server listens. Outdated: somebody asked to replace it.
	// Leaving: it gets no new connections and will go.
	Ready, Outdated, Leaving bool
}

// situation is everything a plan is made from.
type situation struct {
	Snapshot *model.Snapshot
	Nodes    []*model.Node
	// Members are the pods that exist, the leaving ones too.
	Members []member
	// Scale overrides the replicas of a workload, by its String.
	Scale map[string]int
	// Used holds the pod names that were given before, which are not given
	// again; Cursor where the search for a node's next pod address starts.
	Used   map[model.Name]bool
	Cursor map[string]uint64
}

// plan is what has to happen to the pods.
type plan struct {
	Create   []member
	Retire   []model.Name
	Cursor   map[string]uint64
	Problems []model.Problem
}

// planner carries a plan while it is made.
type planner struct {
	situation
	plan
	taken     map[model.Name]string     // name -> owner
	addresses map[netip.Addr]bool       // in use by a pod
	load      map[string]int            // pods per node
	owned     map[string][]member       // by owner, the leaving ones left out
	nodes     map[string]*model.Node    // by name
	leaving   map[string][]member       // by owner, those alone
	spread    map[string]map[string]int // owner -> node -> pods
}

// makePlan says which pods to create and which to retire, so that in the end
// there are those that the manifests ask for. It is pure, and it changes
// nothing when what is asked for exists.
func makePlan(s situation) plan {
	p := newPlanner(s)
	wanted := map[string]bool{}
	for _, pod := range s.Snapshot.Pods {
		wanted[p.single(pod)] = true
	}
	for _, w := range s.Snapshot.Workloads {
		wanted[w.String()] = true
		switch {
		case w.Kind == "StatefulSet":
			p.ordered(w)
		case w.PerNode:
			p.perNode(w)
		case w.Template.HostNetwork:
			p.inPlace(w, p.owned[w.String()], p.leaving[w.String()], p.wantedReplicas(w), nil)
			p.retireOutdated(w)
		default:
			p.replicas(w, p.owned[w.String()], p.wantedReplicas(w))
		}
	}
	for _, owner := range slices.Sorted(maps.Keys(p.owned)) {
		if !wanted[owner] {
			p.retire(p.owned[owner]...)
		}
	}
	return p.plan
}

func newPlanner(s situation) *planner {
	p := &planner{
		situation: s,
		plan:      plan{Cursor: maps.Clone(s.Cursor)},
		taken:     map[model.Name]string{},
		addresses: map[netip.Addr]bool{},
		load:      map[string]int{},
		owned:     map[string][]member{},
		nodes:     map[string]*model.Node{},
		leaving:   map[string][]member{},
		spread:    map[string]map[string]int{},
	}
	if p.plan.Cursor == nil {
		p.plan.Cursor = map[string]uint64{}
	}
	for _, n := range s.Nodes {
		p.nodes[n.Name] = n
	}
	for _, m := range s.Members {
		p.count(m)
		if m.Leaving {
			p.leaving[m.owner()] = append(p.leaving[m.owner()], m)
		} else {
			p.owned[m.owner()] = append(p.owned[m.owner()], m)
		}
	}
	for _, members := range p.owned {
		slices.SortFunc(members, func(a, b member) int { return cmp.Compare(a.Serial, b.Serial) })
	}
	return p
}

// owner is the workload's String or, for a pod of its own, "Pod namespace/name".
func (m member) owner() string {
	if m.Owner == "" {
		return "Pod " + m.Pod.Name.String()
	}
	return m.Owner
}

// count notes that a pod takes its name, its addresses and a place on its node.
func (p *planner) count(m member) {
	p.taken[m.Pod.Name] = m.owner()
	for _, a := range m.Pod.Addresses {
		p.addresses[a] = true
	}
	p.load[m.Pod.Node]++
	if m.Leaving || m.Outdated {
		return
	}
	if p.spread[m.owner()] == nil {
		p.spread[m.owner()] = map[string]int{}
	}
	p.spread[m.owner()][m.Pod.Node]++
}

// single plans for a pod that no workload owns and returns its owner key.
func (p *planner) single(pod *model.Pod) string {
	m := member{Pod: pod, Template: hash(pod)}
	have := p.owned[m.owner()] // one, because names are
	switch {
	case len(have) == 0:
		p.create(m, pod.Node)
	case have[0].Outdated || have[0].Template != m.Template:
		p.retire(have...)
	}
	return m.owner()
}

// wantedReplicas is what the manifest says or a scale operation overrode.
func (p *planner) wantedReplicas(w *model.Workload) int {
	if n, ok := p.Scale[w.String()]; ok {
		return n
	}
	return w.Replicas
}

// replicas plans for n equal pods out of those that exist. New ones come
// first; outdated ones go only when enough new ones are ready.
func (p *planner) replicas(w *model.Workload, have []member, n int) {
	template := hash(&w.Template)
	current, outdated := byAge(have, template)
	ready := 0
	for _, m := range current {
		if m.Ready {
			ready++
		}
	}
	for range n - len(current) {
		if !p.create(p.newMember(w, template), w.Template.Node) {
			break
		}
	}
	p.retireSurplus(current, n)
	p.retireSurplus(outdated, max(0, n-ready))
}

// byAge tells the members that are as the template wants them from those to be
// replaced.
func byAge(have []member, template uint64) (current, outdated []member) {
	for _, m := range have {
		if m.Outdated || m.Template != template {
			outdated = append(outdated, m)
		} else {
			current = append(current, m)
		}
	}
	return current, outdated
}

// inPlace plans for n equal pods whose successors cannot run beside them: a
// new one is made only where an old one is gone for good, because until then
// that one has the node's ports.
func (p *planner) inPlace(w *model.Workload, have, leaving []member, n int, node *model.Node) {
	template := hash(&w.Template)
	for range n - len(have) - len(leaving) {
		if !p.create(p.newMember(w, template), nodeName(w, node)) {
			break
		}
	}
	current, outdated := byAge(have, template)
	p.retireSurplus(outdated, max(0, n-len(current)))
	p.retireSurplus(current, n)
}

// retireOutdated makes room for the successors of a workload planned inPlace:
// at once where somebody asked for it or nothing is lost, and otherwise, as in
// Kubernetes, one pod at a time.
func (p *planner) retireOutdated(w *model.Workload) {
	current, outdated := byAge(p.owned[w.String()], hash(&w.Template))
	starting := func(m member) bool { return m.owner() == w.String() && !m.Ready }
	settled := len(p.leaving[w.String()]) == 0 && !slices.ContainsFunc(slices.Concat(current, p.Create), starting)
	for _, m := range outdated {
		if m.Outdated || !m.Ready || settled {
			p.retire(m)
			settled = settled && !m.Ready
		}
	}
}

// retireSurplus retires all but keep pods: those that are not ready first,
// then the youngest, as Kubernetes does.
func (p *planner) retireSurplus(members []member, keep int) {
	if len(members) <= keep {
		return
	}
	order := slices.Clone(members)
	slices.SortStableFunc(order, func(a, b member) int {
		if a.Ready != b.Ready {
			if b.Ready {
				return -1
			}
			return 1
		}
		return cmp.Compare(b.Serial, a.Serial)
	})
	p.retire(order[:len(order)-keep]...)
}

// perNode plans for one pod on each node.
func (p *planner) perNode(w *model.Workload) {
	for _, node := range p.Nodes {
		here := func(all []member) (some []member) {
			for _, m := range all {
				if m.Pod.Node == node.Name {
					some = append(some, m)
				}
			}
			return some
		}
		p.inPlace(w, here(p.owned[w.String()]), here(p.leaving[w.String()]), 1, node)
	}
	p.retireOutdated(w)
}

// ordered plans for the numbered pods of a StatefulSet. A pod is replaced by
// one of the same name, so the old one goes first, and one at a time.
func (p *planner) ordered(w *model.Workload) {
	template, n := hash(&w.Template), p.wantedReplicas(w)
	have := map[string]member{}
	for _, m := range p.owned[w.String()] {
		have[m.Pod.Name.Name] = m
	}
	unsettled := 0
	var outdated []member
	for i := range n {
		m := p.newMember(w, template)
		m.Pod.Name.Name = fmt.Sprintf("%s-%d", w.Name.Name, i)
		old, ok := have[m.Pod.Name.Name]
		delete(have, m.Pod.Name.Name)
		switch {
		case !ok:
			unsettled++
			p.create(m, w.Template.Node)
		case old.Outdated || old.Template != template:
			outdated = append(outdated, old)
		case !old.Ready:
			unsettled++
		}
	}
	if len(outdated) > 0 && unsettled == 0 {
		p.retire(outdated[len(outdated)-1])
	}
	for _, name := range slices.Sorted(maps.Keys(have)) {
		p.retire(have[name])
	}
}

// newMember is a pod of a workload, still without a name, node and addresses.
func (p *planner) newMember(w *model.Workload, template uint64) member {
	pod := w.Template
	pod.Name = model.Name{Namespace: w.Namespace}
	pod.Where = w.Where
	return member{Pod: &pod, Owner: w.String(), Template: template}
}

func nodeName(w *model.Workload, node *model.Node) string {
	if node != nil {
		return node.Name
	}
	return w.Template.Node
}

// create plans a pod. node is where the manifest wants it, or empty. It
// reports whether the pod can be made now.
func (p *planner) create(m member, node string) bool {
	pod := *m.Pod
	if pod.Name.Name == "" {
		pod.Name.Name = p.freshName(m.Owner, pod.Namespace)
	}
	m.Pod = &pod
	if holder, ok := p.taken[pod.Name]; ok {
		if holder != m.owner() {
			p.problem(m, "metadata.name", "the name is taken by a pod of "+holder)
		}
		return false // or it waits for the one of the same name to go
	}
	if len(pod.Namespace)+len(pod.Name.Name) > maxNames {
		p.problem(m, "metadata.name", fmt.Sprintf("namespace and name together are longer than %d bytes, which no file name can hold", maxNames))
		return false
	}
	if p.nodes[node] == nil && node != "" {
		p.problem(m, "spec.nodeName", fmt.Sprintf("there is no node %q", node))
		return false
	}
	if node == "" {
		node = p.place(m)
	}
	pod.Node, pod.Ready = node, false
	if !p.address(m, p.nodes[node]) {
		return false
	}
	p.count(m)
	p.Create = append(p.Create, m)
	return true
}

// place is the node with the fewest pods of the same workload; among those the
// one with the fewest pods at all; among those the first.
func (p *planner) place(m member) string {
	best := slices.MinFunc(p.Nodes, func(a, b *model.Node) int {
		mine := p.spread[m.owner()]
		return cmp.Or(cmp.Compare(mine[a.Name], mine[b.Name]), cmp.Compare(p.load[a.Name], p.load[b.Name]))
	})
	return best.Name
}

// address gives the pod one address of each of its node's ranges, all with the
// same number. The search goes on where it last stopped, so that an address
// just given up is not at once another pod's.
func (p *planner) address(m member, node *model.Node) bool {
	if m.Pod.HostNetwork {
		m.Pod.Addresses = node.Addresses
		return true
	}
	size := uint64(1 << 16)
	for _, r := range node.PodCIDRs {
		if bits := r.Addr().BitLen() - r.Bits(); bits < 16 {
			size = min(size, 1<<bits)
		}
	}
	const first = 2 // 0 is the range's own address, 1 is left for a gateway
	usable := int64(size) - first - 1
	for range max(0, usable) {
		n := first + p.plan.Cursor[node.Name]%uint64(usable)
		p.plan.Cursor[node.Name]++
		addrs := make([]netip.Addr, len(node.PodCIDRs))
		free := true
		for i, r := range node.PodCIDRs {
			addrs[i] = offset(r, n)
			free = free && !p.addresses[addrs[i]]
		}
		if free {
			m.Pod.Addresses = addrs
			return true
		}
	}
	p.problem(m, "", fmt.Sprintf("node %s has no pod address left in %v", node.Name, node.PodCIDRs))
	return false
}

// retire plans for pods to go; asking twice changes nothing.
func (p *planner) retire(members ...member) {
	for _, m := range members {
		if !slices.Contains(p.Retire, m.Pod.Name) {
			p.Retire = append(p.Retire, m.Pod.Name)
		}
	}
}

func (p *planner) problem(m member, field, text string) {
	p.Problems = append(p.Problems, model.Problem{Where: m.Pod.Where, Object: m.owner(), Field: field, Text: text})
}

// nameLetters are Kubernetes' own for generated names: no vowels, so that no
// words arise, and no digits that look like letters.
const nameLetters = "bcdfghjklmnpqrstvwxz2456789"

const (
	// maxBase is how much of a workload's name and its dash a pod's name keeps:
	// with the five letters it is a DNS label, 63 bytes, as in Kubernetes.
	maxBase = 58
	// maxNames is how long a pod's namespace and name may be together, in bytes:
	// a file name holds 255, and says what kind of thing it is about.
	maxNames = 240
)

// freshName is the workload's name and five letters, never the same twice.
func (p *planner) freshName(owner, namespace string) string {
	base := owner[strings.LastIndexByte(owner, '/')+1:] + "-"
	base = base[:min(len(base), maxBase)]
	for i := 0; ; i++ {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s#%d", owner, i))
		suffix := sum[:5]
		for j, b := range suffix {
			suffix[j] = nameLetters[int(b)%len(nameLetters)]
		}
		name := model.Name{Namespace: namespace, Name: base + string(suffix)}
		if _, taken := p.taken[name]; !taken && !p.Used[name] {
			return name.Name
		}
	}
}

// hash is equal for templates that make equal pods.
func hash(t *model.Pod) uint64 {
	type template struct {
		Labels, Annotations map[string]string
		Node                string
		HostNetwork         bool
		Ports               []model.ContainerPort
	}
	text, err := json.Marshal(template{t.Labels, t.Annotations, t.Node, t.HostNetwork, t.Ports})
	if err != nil {
		panic(err) // strings, numbers and a MarshalText that cannot fail
	}
	h := fnv.New64a()
	h.Write(text)
	return h.Sum64()
}
