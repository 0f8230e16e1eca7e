package service

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// text is a row in one line: where, who it is for, where it leads.
func (r *Row) text() string {
	led := func(to []netip.AddrPort, drops bool) string {
		switch {
		case drops:
			return "dropped"
		case len(to) == 0:
			return "refused"
		}
		return strings.Trim(fmt.Sprint(to), "[]")
	}
	text := fmt.Sprintf("%s %s -> %s", r.Entry, r.Frontend, led(r.Backends, r.Drops))
	if r.Outside != nil {
		text += "; from outside " + led(r.Outside.Backends, r.Outside.Drops)
	}
	if r.Masquerade {
		text += ", masqueraded"
	}
	if r.Affinity != 0 {
		text += fmt.Sprintf(", for %d s", r.Affinity)
	}
	if r.SourceRanges != nil {
		text += fmt.Sprintf(", only for %s", r.SourceRanges)
	}
	return text
}

// state is the condition of an endpoint in a story.
type state int

const (
	isReady state = iota
	isDraining
	isUnready
)

func endpoint(address, node string, s state, hints model.Hints) model.Backend {
	return model.Backend{
		Address: netip.AddrPortFrom(netip.MustParseAddr(address), 8080), Node: node, Hints: hints,
		Ready: s == isReady, Serving: s != isUnready, Terminating: s == isDraining,
	}
}

// rowsTest is a Service and what is planned for it on node n1 in zone z1.
type rowsTest struct {
	about     string
	endpoints []model.Backend
	change    func(*model.Service)
	want      []string
}

func (test *rowsTest) run(t *testing.T) {
	s := serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080)
	s.Ports[0].Backends = test.endpoints
	test.change(s)
	var got []string
	for _, row := range rowsOf(s, place{node: "n1", zone: "z1"}) {
		got = append(got, row.text())
	}
	if a, b := strings.Join(got, "\n"), strings.Join(test.want, "\n"); a != b {
		t.Errorf("planned is\n%s\nand should be\n%s", a, b)
	}
}

// Which entries a Service has, and where they lead.
func TestRows(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	none := model.Hints{}
	everywhere := []model.Backend{endpoint("10.1.0.1", "n1", isReady, none), endpoint("10.1.0.2", "n2", isReady, none)}
	elsewhere := everywhere[1:]
	nodePort := func(s *model.Service) { s.Ports[0].NodePort = 30080 }
	for _, test := range []rowsTest{
		{"a plain Service", everywhere, func(*model.Service) {}, []string{
			"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded",
		}},
		{"both families, of which one has endpoints", everywhere, func(s *model.Service) {
			nodePort(s)
			s.ClusterIPs = append(s.ClusterIPs, addr("fd00::1"))
		}, []string{
			"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded",
			"node-port 0.0.0.0:30080/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded",
			"cluster-ip [fd00::1]:80/tcp -> refused, masqueraded",
			"node-port [::]:30080/tcp -> refused, masqueraded",
		}},
		{"local for outside, with an endpoint here", everywhere, func(s *model.Service) { nodePort(s); s.ExternalLocal = true }, []string{
			"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded",
			"node-port 0.0.0.0:30080/tcp -> 10.1.0.1:8080 10.1.0.2:8080; from outside 10.1.0.1:8080",
		}},
		{"local for outside, without one", elsewhere, func(s *model.Service) { nodePort(s); s.ExternalLocal = true }, []string{
			"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.2:8080, masqueraded",
			"node-port 0.0.0.0:30080/tcp -> 10.1.0.2:8080; from outside dropped",
		}},
		{"local for outside, all here", everywhere[:1], func(s *model.Service) { nodePort(s); s.ExternalLocal = true }, []string{
			"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.1:8080, masqueraded",
			"node-port 0.0.0.0:30080/tcp -> 10.1.0.1:8080",
		}},
		{"local for all, without an endpoint here", elsewhere, func(s *model.Service) { nodePort(s); s.InternalLocal, s.ExternalLocal = true, true }, []string{
			"cluster-ip 10.96.0.1:80/tcp -> dropped, masqueraded",
			"node-port 0.0.0.0:30080/tcp -> 10.1.0.2:8080; from outside dropped",
		}},
		{"local for all, without any endpoint", nil, func(s *model.Service) { nodePort(s); s.InternalLocal, s.ExternalLocal = true, true }, []string{
			"cluster-ip 10.96.0.1:80/tcp -> refused, masqueraded",
			"node-port 0.0.0.0:30080/tcp -> refused",
		}},
		{"local, the one here draining and another ready", []model.Backend{endpoint("10.1.0.1", "n1", isDraining, none), elsewhere[0]}, func(s *model.Service) {
			nodePort(s)
			s.InternalLocal, s.ExternalLocal = true, true
		}, []string{
			"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.1:8080, masqueraded",
			"node-port 0.0.0.0:30080/tcp -> 10.1.0.2:8080; from outside 10.1.0.1:8080",
		}},
		{"not ready at all", []model.Backend{endpoint("10.1.0.1", "n1", isUnready, none)}, nodePort, []string{
			"cluster-ip 10.96.0.1:80/tcp -> refused, masqueraded",
			"node-port 0.0.0.0:30080/tcp -> refused, masqueraded",
		}},
		{"every address, some twice", everywhere, func(s *model.Service) {
			s.ExternalIPs = []netip.Addr{addr("192.0.2.1"), addr("198.51.100.1"), addr("10.96.0.1"), addr("2001:db8::1")}
			s.LoadBalancerIPs = []netip.Addr{addr("192.0.2.1"), addr("192.0.2.2")}
			s.SourceRanges = []netip.Prefix{prefix("203.0.113.9/24"), prefix("198.18.0.0/15"), prefix("203.0.113.0/24"), prefix("2001:db8::/32")}
			s.Affinity = time.Hour
		}, []string{
			"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded, for 3600 s",
			"load-balancer 192.0.2.1:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded, for 3600 s, only for [198.18.0.0/15 203.0.113.0/24]",
			"load-balancer 192.0.2.2:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded, for 3600 s, only for [198.18.0.0/15 203.0.113.0/24]",
			"external-ip 198.51.100.1:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded, for 3600 s",
		}},
		{"ranges of the other family alone, and one of everything", everywhere, func(s *model.Service) {
			s.ClusterIPs = append(s.ClusterIPs, addr("fd00::1"))
			s.LoadBalancerIPs = []netip.Addr{addr("192.0.2.1"), addr("2001:db8::1")}
			s.SourceRanges = []netip.Prefix{prefix("2001:db8::/32"), prefix("::/0")}
		}, []string{
			"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded",
			"load-balancer 192.0.2.1:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded",
			"cluster-ip [fd00::1]:80/tcp -> refused, masqueraded",
			"load-balancer [2001:db8::1]:80/tcp -> refused, masqueraded",
		}},
		{"an endpoint of no known node is not local", []model.Backend{endpoint("10.1.0.1", "", isReady, none)}, func(s *model.Service) { s.InternalLocal = true }, []string{
			"cluster-ip 10.96.0.1:80/tcp -> dropped, masqueraded",
		}},
		{"headless", everywhere, func(s *model.Service) { s.Headless = true }, nil},
		{"ExternalName", everywhere, func(s *model.Service) { s.Type = model.ExternalName }, nil},
		{"SCTP", everywhere, func(s *model.Service) { s.Ports[0].Protocol = model.SCTP }, nil},
		{"no address yet", everywhere, func(s *model.Service) { nodePort(s); s.ClusterIPs = nil }, nil},
	} {
		t.Run(test.about, test.run)
	}
}

// Hints choose among the ready endpoints of the whole cluster.
func TestRowsByHints(t *testing.T) {
	none := model.Hints{}
	zones := func(names ...string) model.Hints { return model.HintsFor(nil, names) }
	for _, test := range []rowsTest{
		{"hints for zones", []model.Backend{
			endpoint("10.1.0.1", "n1", isReady, zones("z2")), endpoint("10.1.0.2", "n2", isReady, zones("z1")),
			endpoint("10.1.0.3", "n2", isUnready, none), endpoint("10.1.0.4", "n2", isDraining, none),
		}, func(s *model.Service) { s.Ports[0].NodePort, s.ExternalLocal = 30080, true }, []string{
			"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.2:8080, masqueraded",
			"node-port 0.0.0.0:30080/tcp -> 10.1.0.2:8080; from outside 10.1.0.1:8080",
		}},
		{"a ready endpoint without a hint", []model.Backend{endpoint("10.1.0.1", "n1", isReady, none), endpoint("10.1.0.2", "n2", isReady, zones("z1"))},
			func(*model.Service) {}, []string{"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded"}},
		{"hints for other zones", []model.Backend{endpoint("10.1.0.1", "n1", isReady, zones("z2")), endpoint("10.1.0.2", "n2", isReady, zones("z3"))},
			func(*model.Service) {}, []string{"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.1:8080 10.1.0.2:8080, masqueraded"}},
		{"hints for nodes come before those for zones", []model.Backend{
			endpoint("10.1.0.1", "n2", isReady, model.HintsFor([]string{"n1"}, []string{"z2"})),
			endpoint("10.1.0.2", "n2", isReady, model.HintsFor([]string{"n2"}, []string{"z1"})),
		}, func(*model.Service) {}, []string{"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.1:8080, masqueraded"}},
		{"hints for other nodes, so the zone's", []model.Backend{
			endpoint("10.1.0.1", "n2", isReady, model.HintsFor([]string{"n2"}, []string{"z2"})),
			endpoint("10.1.0.2", "n3", isReady, model.HintsFor([]string{"n3"}, []string{"z1"})),
		}, func(*model.Service) {}, []string{"cluster-ip 10.96.0.1:80/tcp -> 10.1.0.2:8080, masqueraded"}},
	} {
		t.Run(test.about, test.run)
	}
}

// A node that does not know its own name has no local endpoints.
func TestNodeWithoutName(t *testing.T) {
	s := serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080)
	s.Ports[0].Backends = []model.Backend{endpoint("10.1.0.1", "", isReady, model.Hints{})}
	s.InternalLocal = true
	if text := rowsOf(s, place{})[0].text(); !strings.Contains(text, "dropped") {
		t.Errorf("the row is %s", text)
	}
}

// Plans are remembered by Service; a node that moves to another zone plans anew,
// and one that changes otherwise does not.
func TestZoneOfTheNodeChanges(t *testing.T) {
	s := serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080)
	s.Ports[0].Backends = []model.Backend{
		endpoint("10.1.0.1", "n1", isReady, model.HintsFor(nil, []string{"z1"})),
		endpoint("10.1.0.2", "n2", isReady, model.HintsFor(nil, []string{"z2"})),
	}
	l := New(Settings{Node: "n1"})
	in := func(labels map[string]string) *Picture {
		nodes := []*model.Node{{Name: "n0", Labels: map[string]string{zoneLabel: "z2"}}, {Name: "n1", Labels: labels}}
		return l.Plan(&model.Snapshot{Services: []*model.Service{s}, Nodes: nodes}).(*Picture)
	}
	first := in(map[string]string{zoneLabel: "z1"})
	if same := in(map[string]string{zoneLabel: "z1", "other": "label"}); same.plans[0] != first.plans[0] {
		t.Error("another label of the node made another plan")
	}
	moved := in(map[string]string{zoneLabel: "z2"})
	if got := moved.plans[0].rows[0].text(); !strings.Contains(got, "-> 10.1.0.2:8080,") {
		t.Errorf("in zone z2 the row is %s", got)
	}
	if changes := l.Diff(first, moved, true); len(changes) != 1 || changes[0].Op != layer.Alter {
		t.Errorf("the changes are %v", changes)
	}
	if got := in(nil).plans[0].rows[0].text(); !strings.Contains(got, "-> 10.1.0.1:8080 10.1.0.2:8080,") {
		t.Errorf("in no zone the row is %s", got)
	}
}

// Each of these alone is a change; what a row says otherwise is not told to the
// kernel.
func TestWhatMakesRowsDiffer(t *testing.T) {
	base := func() *Row {
		return &Row{
			Entry: AtLoadBalancer, Path: PathSocket, Backends: []netip.AddrPort{netip.MustParseAddrPort("10.1.0.1:80")},
			Outside: &Outside{Backends: []netip.AddrPort{netip.MustParseAddrPort("10.1.0.1:80")}}, Affinity: 60,
			SourceRanges: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")},
		}
	}
	for about, change := range map[string]func(*Row){
		"entry":              func(r *Row) { r.Entry = AtExternalIP },
		"path":               func(r *Row) { r.Path = PathPacket },
		"backends":           func(r *Row) { r.Backends = nil },
		"drops":              func(r *Row) { r.Drops = true },
		"no outside":         func(r *Row) { r.Outside = nil },
		"backends outside":   func(r *Row) { r.Outside.Backends = nil },
		"drops outside":      func(r *Row) { r.Outside.Drops = true },
		"masquerade":         func(r *Row) { r.Masquerade = true },
		"affinity":           func(r *Row) { r.Affinity = 0 },
		"ranges":             func(r *Row) { r.SourceRanges[0] = netip.MustParsePrefix("203.0.113.0/25") },
		"nobody is not all":  func(r *Row) { r.SourceRanges = []netip.Prefix{} },
		"all are not nobody": func(r *Row) { r.SourceRanges = nil },
	} {
		other := base()
		if base().differs(other) || other.differs(base()) {
			t.Fatal("equal rows differ")
		}
		change(other)
		if !base().differs(other) || !other.differs(base()) {
			t.Errorf("%s: not seen", about)
		}
	}
	if nobody, all := (&Row{SourceRanges: []netip.Prefix{}}), (&Row{}); !nobody.differs(all) {
		t.Error("a row for nobody is one for all")
	}
	read, planned := base(), base()
	read.Entry, planned.Service = "", model.Name{Namespace: "shop", Name: "web"}
	if read.differs(planned) {
		t.Error("a row that was read from the kernel differs by what the kernel does not know")
	}
}

// While something could not be read, clients outside keep their last endpoint too.
func TestWithoutPruningNobodyOutsideIsClosedOut(t *testing.T) {
	cluster := func(local string) *model.Snapshot {
		s := serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080)
		s.Ports[0].NodePort, s.ExternalLocal = 30080, true
		s.Ports[0].Backends = []model.Backend{endpoint("10.1.0.1", local, isReady, model.Hints{}), endpoint("10.1.0.2", "n2", isReady, model.Hints{})}
		return &model.Snapshot{Services: []*model.Service{s}}
	}
	l := New(Settings{Node: "n1"})
	have, want := l.Plan(cluster("n1")), l.Plan(cluster("n2"))
	if changes := l.Diff(have, want, false); len(changes) != 0 {
		t.Errorf("without pruning there is to do: %v", changes)
	}
	if changes := l.Diff(have, want, true); len(changes) != 1 {
		t.Errorf("with pruning there is to do: %v", changes)
	}
}

// The Service whose packets have to be seen is served by packets, whatever it or the
// settings ask for.
func TestServiceThatIsSeen(t *testing.T) {
	seen := serviceOf("dns", model.UDP, 53, []string{"10.96.0.10"}, 53, "10.244.0.53")
	seen.Annotations = map[string]string{PathAnnotation: string(PathSocket)}
	other := serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 80, "10.244.0.1")
	snapshot := &model.Snapshot{Services: []*model.Service{seen, other}}
	l := New(Settings{Seen: seen.Name})
	picture := l.Plan(snapshot).(*Picture)
	for _, subject := range picture.Subjects() {
		want := Path("")
		if row := subject.(*Row); row.Service == seen.Name {
			want = PathPacket
		}
		if row := subject.(*Row); row.Path != want {
			t.Errorf("%s is served by %q, not %q", row.Object(), row.Path, want)
		}
	}
	if !picture.paths.packets {
		t.Error("nobody is served by packets")
	}
}
