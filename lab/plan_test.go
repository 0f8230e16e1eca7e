package lab

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/model"
)

// box plays a lab without a kernel: pods are made, become ready and go as soon
// as a plan says so.
type box struct {
	situation
	serial int
}

func newBox(t *testing.T, nodes int, s *model.Snapshot) *box {
	t.Helper()
	r, err := chooseRanges(nil, given(s))
	if err != nil {
		t.Fatal(err)
	}
	planned, err := planNodes(s, nodes, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &box{situation: situation{Snapshot: s, Nodes: planned, Used: map[model.Name]bool{}, Scale: map[string]int{}}}
}

// apply lets one plan become true and returns it.
func (b *box) apply() plan {
	p := makePlan(b.situation)
	b.Cursor = p.Cursor
	b.Members = slices.DeleteFunc(b.Members, func(m member) bool { return slices.Contains(p.Retire, m.Pod.Name) })
	for _, m := range p.Create {
		b.serial++
		m.Serial, m.Ready = b.serial, true
		b.Members = append(b.Members, m)
		b.Used[m.Pod.Name] = true
	}
	return p
}

// settle applies plans until there is nothing left to do.
func (b *box) settle(t *testing.T) *box {
	t.Helper()
	for range 100 {
		if p := b.apply(); len(p.Create)+len(p.Retire) == 0 {
			return b
		}
	}
	t.Fatal("plans never come to an end")
	return nil
}

// names lists the pods, "name@node", sorted.
func (b *box) names() []string {
	var names []string
	for _, m := range b.Members {
		names = append(names, m.Pod.Name.Name+"@"+m.Pod.Node)
	}
	slices.Sort(names)
	return names
}

func (b *box) perNode() map[string]int {
	count := map[string]int{}
	for _, m := range b.Members {
		count[m.Pod.Node]++
	}
	return count
}

func TestPodsAreSpreadOverNodes(t *testing.T) {
	s := &model.Snapshot{Workloads: []*model.Workload{deployment("a", 4), deployment("b", 2), deployment("c", 3)}}
	b := newBox(t, 3, s).settle(t)
	if got := b.perNode(); !maps.Equal(got, map[string]int{"node-1": 3, "node-2": 3, "node-3": 3}) {
		t.Errorf("nine pods on three nodes: %v", got)
	}
	for _, w := range s.Workloads {
		count := map[string]int{}
		for _, m := range b.Members {
			if m.Owner == w.String() {
				count[m.Pod.Node]++
			}
		}
		for node, n := range count {
			if n > (w.Replicas+2)/3 {
				t.Errorf("%s has %d of its %d pods on %s", w, n, w.Replicas, node)
			}
		}
	}
}

func TestNamesAreLikeKubernetes(t *testing.T) {
	set := deployment("db", 2)
	set.Kind = "StatefulSet"
	agent := deployment("agent", 0)
	agent.Kind, agent.PerNode = "DaemonSet", true
	single := &model.Pod{Name: model.Name{Namespace: "default", Name: "lonely"}, Node: "node-2"}
	b := newBox(t, 2, &model.Snapshot{
		Workloads: []*model.Workload{deployment("web", 1), set, agent},
		Pods:      []*model.Pod{single},
	}).settle(t)
	names := b.names()
	if !slices.Contains(names, "lonely@node-2") {
		t.Errorf("spec.nodeName is not honoured: %v", names)
	}
	for _, prefix := range []string{"db-0@", "db-1@", "web-", "agent-"} {
		if !slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, prefix) }) {
			t.Errorf("no pod begins with %s: %v", prefix, names)
		}
	}
	agents := map[string]bool{}
	for _, m := range b.Members {
		if m.Owner == agent.String() {
			agents[m.Pod.Node] = true
		}
		if m.Owner == "Deployment default/web" && len(m.Pod.Name.Name) != len("web-")+5 {
			t.Errorf("the name %s does not end in five letters", m.Pod.Name.Name)
		}
	}
	if len(agents) != 2 {
		t.Errorf("the DaemonSet has pods on %v, not one on each node", agents)
	}
}

func TestLongNamesAreCutLikeKubernetes(t *testing.T) {
	perNode := deployment(strings.Repeat("d", 236), 0)
	perNode.Kind, perNode.PerNode = "DaemonSet", true
	s := &model.Snapshot{Workloads: []*model.Workload{
		deployment(strings.Repeat("w", 236), 2), deployment(strings.Repeat("w", 58), 2), perNode,
	}}
	b := newBox(t, 2, s).settle(t)
	if len(b.Used) != 6 {
		t.Errorf("%d names for 6 pods: %v", len(b.Used), b.names())
	}
	for name := range b.Used {
		if len(name.Name) != 63 {
			t.Errorf("%s has %d bytes, want 63", name.Name, len(name.Name))
		}
	}
}

func TestSamePlanWhateverTheOrder(t *testing.T) {
	s := &model.Snapshot{Workloads: []*model.Workload{deployment("a", 3), deployment("b", 2)}}
	first := newBox(t, 3, s).settle(t)
	if again := newBox(t, 3, s).settle(t); !slices.Equal(first.names(), again.names()) {
		t.Errorf("two labs from the same manifests differ:\n%v\n%v", first.names(), again.names())
	}
	slices.Reverse(first.Members)
	if p := makePlan(first.situation); len(p.Create)+len(p.Retire) > 0 {
		t.Errorf("a settled lab, its pods listed backwards, plans %+v", p)
	}
}

func TestScaleRetiresTheNotReadyAndTheYoungest(t *testing.T) {
	w := deployment("web", 4)
	b := newBox(t, 2, &model.Snapshot{Workloads: []*model.Workload{w}}).settle(t)
	sick, youngest := b.Members[1].Pod.Name, b.Members[3].Pod.Name
	b.Members[1].Ready = false
	b.Scale[w.String()] = 2
	p := makePlan(b.situation)
	if !slices.Equal(p.Retire, []model.Name{sick, youngest}) {
		t.Errorf("4 to 2 retires %v, want the sick %v and the youngest %v", p.Retire, sick, youngest)
	}
	b.settle(t).Scale[w.String()] = 5
	if n := len(b.settle(t).Members); n != 5 {
		t.Errorf("scaled to 5: %d pods", n)
	}
}

func TestNewPodsComeBeforeOldOnesGo(t *testing.T) {
	w := deployment("web", 3)
	b := newBox(t, 2, &model.Snapshot{Workloads: []*model.Workload{w}}).settle(t)
	old := b.Members[0].Pod.Name
	b.Members[0].Outdated = true
	p := makePlan(b.situation)
	if len(p.Create) != 1 || len(p.Retire) != 0 {
		t.Fatalf("before the new pod is ready: %d created, retired %v; want 1 and none", len(p.Create), p.Retire)
	}
	m := p.Create[0]
	b.Members = append(b.Members, m) // made, but not ready
	if p := makePlan(b.situation); len(p.Create)+len(p.Retire) > 0 {
		t.Errorf("while the new pod starts: %+v", p)
	}
	b.Members[3].Ready = true
	if p := makePlan(b.situation); !slices.Equal(p.Retire, []model.Name{old}) {
		t.Errorf("when the new pod is ready, retired %v, want %v", p.Retire, old)
	}
}

// TestWhatHoldsTheNodesPortsGoesFirst changes the template of pods whose
// successors cannot listen beside them.
func TestWhatHoldsTheNodesPortsGoesFirst(t *testing.T) {
	agent, edge := deployment("agent", 0), deployment("edge", 2)
	agent.Kind, agent.PerNode = "DaemonSet", true
	edge.Template.HostNetwork = true
	for _, w := range []*model.Workload{agent, edge} {
		b := newBox(t, 2, &model.Snapshot{Workloads: []*model.Workload{w}}).settle(t)
		changed := *w
		changed.Template.Labels = map[string]string{"version": "2"}
		b.Snapshot = &model.Snapshot{Workloads: []*model.Workload{&changed}}
		for round := range 2 {
			p := makePlan(b.situation)
			if len(p.Retire) != 1 || len(p.Create) != 0 {
				t.Fatalf("%s, round %d: want one retired before any is made: %+v", w, round, p)
			}
			i := slices.IndexFunc(b.Members, func(m member) bool { return m.Pod.Name == p.Retire[0] })
			old := b.Members[i]
			b.Members[i].Leaving = true
			if p := makePlan(b.situation); len(p.Create)+len(p.Retire) > 0 {
				t.Errorf("%s, while the old pod drains: %+v", w, p)
			}
			b.Members = slices.Delete(b.Members, i, i+1)
			p = b.apply()
			if len(p.Create) != 1 || len(p.Retire) != 0 || p.Create[0].Pod.Node != old.Pod.Node {
				t.Fatalf("%s, after the pod on %s is gone: %+v", w, old.Pod.Node, p)
			}
		}
		if p := makePlan(b.situation); len(p.Create)+len(p.Retire) > 0 {
			t.Errorf("%s, all are new, and yet: %+v", w, p)
		}
		b.Members[0].Outdated = true
		b.Members[1].Ready = false
		if p := makePlan(b.situation); !slices.Equal(p.Retire, []model.Name{b.Members[0].Pod.Name}) {
			t.Errorf("%s, asked to replace one pod while another is not ready: %+v", w, p)
		}
	}
}

func TestStatefulSetReplacesInPlaceAndOneAtATime(t *testing.T) {
	w := deployment("db", 3)
	w.Kind = "StatefulSet"
	b := newBox(t, 2, &model.Snapshot{Workloads: []*model.Workload{w}}).settle(t)
	changed := *w
	changed.Template.Labels = map[string]string{"app": "db", "version": "2"}
	b.Snapshot = &model.Snapshot{Workloads: []*model.Workload{&changed}}
	for _, want := range []string{"db-2", "db-1", "db-0"} {
		p := b.apply()
		if len(p.Retire) != 1 || p.Retire[0].Name != want || len(p.Create) != 0 {
			t.Fatalf("want %s alone retired, got %v and %d created", want, p.Retire, len(p.Create))
		}
		if p := b.apply(); len(p.Create) != 1 || p.Create[0].Pod.Name.Name != want {
			t.Fatalf("want a new %s, got %+v", want, p)
		}
	}
	if p := b.apply(); len(p.Create)+len(p.Retire) > 0 {
		t.Errorf("all are new, and yet: %+v", p)
	}
}

func TestAPodWaitsForItsName(t *testing.T) {
	w := deployment("db", 1)
	w.Kind = "StatefulSet"
	b := newBox(t, 1, &model.Snapshot{Workloads: []*model.Workload{w}}).settle(t)
	b.Members[0].Leaving = true
	if p := makePlan(b.situation); len(p.Create)+len(p.Problems) > 0 {
		t.Errorf("while db-0 drains: %+v", p)
	}
	b.Members = nil
	if p := makePlan(b.situation); len(p.Create) != 1 {
		t.Errorf("after db-0 is gone: %+v", p)
	}
}

func TestWhatIsNoLongerAskedForGoes(t *testing.T) {
	b := newBox(t, 1, &model.Snapshot{
		Workloads: []*model.Workload{deployment("web", 2)},
		Pods:      []*model.Pod{{Name: model.Name{Namespace: "default", Name: "lonely"}}},
	}).settle(t)
	b.Snapshot = &model.Snapshot{}
	if b.settle(t); len(b.Members) > 0 {
		t.Errorf("left: %v", b.names())
	}
}

func TestBadPodsAreProblems(t *testing.T) {
	taken := &model.Pod{Name: model.Name{Namespace: "default", Name: "db-0"}}
	set := deployment("db", 1)
	set.Kind = "StatefulSet"
	nowhere := &model.Pod{Name: model.Name{Namespace: "default", Name: "lost"}, Node: "mars", Where: "shop.yaml:7"}
	long := &model.Pod{Name: model.Name{Namespace: strings.Repeat("n", 60), Name: strings.Repeat("p", 240)}}
	p := makePlan(newBox(t, 1, &model.Snapshot{
		Workloads: []*model.Workload{set},
		Pods:      []*model.Pod{taken, nowhere, long},
	}).situation)
	want := []string{`shop.yaml:7: Pod default/lost: spec.nodeName: there is no node "mars"`, "name is taken by", "longer than"}
	var got []string
	for _, problem := range p.Problems {
		got = append(got, problem.Error())
	}
	for _, w := range want {
		if !slices.ContainsFunc(got, func(g string) bool { return strings.Contains(g, w) }) {
			t.Errorf("no problem says %q: %q", w, got)
		}
	}
	if len(p.Create) != 1 {
		t.Errorf("%d pods made, want only the first db-0", len(p.Create))
	}
}

func TestAddresses(t *testing.T) {
	w := deployment("web", 250)
	s := &model.Snapshot{
		Workloads: []*model.Workload{w},
		Nodes:     []*model.Node{{Name: "n", PodCIDRs: prefixes("10.9.8.0/24", "fd00:9::/64")}},
	}
	b := newBox(t, 0, s)
	// Room for twice the pods is asked of ranges that the lab chooses, not of
	// those that a Node object names.
	b.settle(t)
	seen := map[netip.Addr]bool{}
	for _, m := range b.Members {
		for i, a := range m.Pod.Addresses {
			if seen[a] || !s.Nodes[0].PodCIDRs[i].Contains(a) {
				t.Errorf("pod %s has %s", m.Pod.Name, a)
			}
			seen[a] = true
		}
	}
	last := b.Members[249].Pod.Addresses
	if !slices.Equal(last, addrs("10.9.8.251", "fd00:9::fb")) {
		t.Errorf("the 250th pod has %v", last)
	}
	b.Members = b.Members[:249]
	if next := makePlan(b.situation).Create[0].Pod.Addresses; slices.Equal(next, last) {
		t.Errorf("the address %v, just given up, is given on at once", last)
	}
	b.Scale[w.String()] = 300
	p := b.apply()
	if len(b.Members) != 253 || len(p.Problems) != 1 || !strings.Contains(p.Problems[0].Text, "no pod address left") {
		t.Errorf("a /24 holds %d pods; problems %v", len(b.Members), p.Problems)
	}
}

func TestHostNetworkPodsHaveTheNodesAddresses(t *testing.T) {
	pod := &model.Pod{Name: model.Name{Namespace: "default", Name: "host"}, HostNetwork: true}
	b := newBox(t, 1, &model.Snapshot{Pods: []*model.Pod{pod}}).settle(t)
	if !slices.Equal(b.Members[0].Pod.Addresses, b.Nodes[0].Addresses) {
		t.Errorf("%v is not %v", b.Members[0].Pod.Addresses, b.Nodes[0].Addresses)
	}
}

func TestRangesAvoidWhatIsInUse(t *testing.T) {
	free, err := chooseRanges(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(free); got != "{[10.244.0.0/16 fd6d:6c72:0:100::/56] [10.96.0.0/16 fd6d:6c72:0:200::/112] [172.30.0.0/24 fd6d:6c72::/64]}" {
		t.Errorf("on a host that uses nothing: %s", got)
	}
	used := append(free.all(), prefixes("10.245.7.0/24", "10.97.0.1/32", "172.30.0.0/16")...)
	second, err := chooseRanges(used, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range second.all() {
		if i := overlapping(used, r); i >= 0 {
			t.Errorf("%s overlaps with %s, which is in use", r, used[i])
		}
	}
	if _, err := chooseRanges(prefixes("10.0.0.0/9", "10.128.0.0/9"), nil); !errors.Is(err, ErrRange) {
		t.Errorf("no room left gives %v", err)
	}
	if _, err := chooseRanges(nil, prefixes("10.0.0.0/8")); !errors.Is(err, ErrRange) {
		t.Errorf("no room left by the manifests gives %v", err)
	}
	// A ClusterIP named in the manifests may lie in the service range only.
	named, err := chooseRanges(nil, prefixes("10.96.0.10/32", "10.244.0.1/32"))
	if err != nil || named.Services[0] != free.Services[0] || named.Pods[0] == free.Pods[0] {
		t.Errorf("with ClusterIPs 10.96.0.10 and 10.244.0.1: %v, %v", named, err)
	}
}

func TestWideRoutesOfTheHostTakeNothing(t *testing.T) {
	for _, c := range []struct{ inUse, pods string }{
		{"10.0.0.0/8", "10.244.0.0/16"},
		{"0.0.0.0/1 128.0.0.0/1 ::/1 8000::/1 10.0.0.0/8 fc00::/7", "10.244.0.0/16"},
		{"10.0.0.0/8 10.244.7.0/24", "10.245.0.0/16"},
	} {
		r, err := chooseRanges(prefixes(strings.Fields(c.inUse)...), nil)
		if err != nil || r.Pods[0].String() != c.pods {
			t.Errorf("on a host that routes %s: %v, %v, want pods in %s", c.inUse, r, err, c.pods)
		}
	}
}

func TestRangesAvoidEndpointsOfTheManifests(t *testing.T) {
	needRoot(t)
	p, err := newPaths(unique("claim"), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	external := service("external", model.ServicePort{Protocol: model.TCP, Port: 80})
	s := &model.Snapshot{Services: []*model.Service{external}}
	free, _, err := p.claimRanges(s, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range free.all() {
		b := model.Backend{Address: netip.AddrPortFrom(offset(r, 2), 80)}
		external.Ports[0].Backends = append(external.Ports[0].Backends, b)
	}
	chosen, _, err := p.claimRanges(s, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range external.Ports[0].Backends {
		for _, r := range chosen.all() {
			if r.Contains(b.Address.Addr()) {
				t.Errorf("%s holds the endpoint %s", r, b.Address)
			}
		}
	}
}

func TestNodesFromManifests(t *testing.T) {
	r, _ := chooseRanges(nil, nil)
	for _, c := range []struct {
		what    string
		s       model.Snapshot
		count   int
		used    []netip.Prefix
		want    string
		problem string
	}{
		{what: "none", count: 2, want: "node-1 10.244.0.0/24 fd6d:6c72:0:100::/64; node-2 10.244.1.0/24 fd6d:6c72:0:101::/64"},
		{what: "named", s: model.Snapshot{Nodes: []*model.Node{{Name: "a"}, {Name: "b", PodCIDRs: prefixes("10.7.0.0/20")}}},
			want: "a 10.244.0.0/24 fd6d:6c72:0:100::/64; b 10.7.0.0/20"},
		{what: "many pods", count: 2, s: model.Snapshot{Workloads: []*model.Workload{deployment("web", 400)}},
			want: "node-1 10.244.0.0/23 fd6d:6c72:0:100::/64; node-2 10.244.2.0/23 fd6d:6c72:0:101::/64"},
		{what: "overlap", s: model.Snapshot{Nodes: []*model.Node{
			{Name: "a", PodCIDRs: prefixes("10.7.0.0/20")}, {Name: "b", PodCIDRs: prefixes("10.7.1.0/24")}}},
			problem: "the pod range 10.7.1.0/24 of node b overlaps with 10.7.0.0/20 of node a"},
		{what: "the host's", used: prefixes("10.7.1.2/32"), s: model.Snapshot{Nodes: []*model.Node{{Name: "a", PodCIDRs: prefixes("10.7.0.0/20")}}},
			problem: "the pod range 10.7.0.0/20 of node a overlaps with 10.7.1.2/32, which this host or another lab uses"},
		{what: "a wide route", used: prefixes("10.0.0.0/8"), s: model.Snapshot{Nodes: []*model.Node{{Name: "a", PodCIDRs: prefixes("10.7.0.0/20")}}},
			want: "a 10.7.0.0/20"},
		{what: "too many pods", count: 1, s: model.Snapshot{Workloads: []*model.Workload{deployment("web", 40000)}},
			problem: "40000 pods on 1 nodes need more than the /16"},
		{what: "too many nodes", count: 201, problem: "a lab has 1 to 200 nodes, not 201"},
	} {
		nodes, err := planNodes(&c.s, c.count, r, c.used)
		var got []string
		for _, n := range nodes {
			got = append(got, strings.Trim(n.Name+" "+strings.Trim(fmt.Sprint(n.PodCIDRs), "[]"), " "))
		}
		switch {
		case c.problem == "" && (err != nil || strings.Join(got, "; ") != c.want):
			t.Errorf("%s: got %q, %v; want %q", c.what, got, err, c.want)
		case c.problem != "" && (!errors.Is(err, ErrRange) || !strings.Contains(err.Error(), c.problem)):
			t.Errorf("%s: got %v; want %q", c.what, err, c.problem)
		}
	}
}

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, text := range texts {
		out = append(out, netip.MustParsePrefix(text))
	}
	return out
}

func addrs(texts ...string) []netip.Addr {
	var out []netip.Addr
	for _, text := range texts {
		out = append(out, netip.MustParseAddr(text))
	}
	return out
}

func addrPort(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }
