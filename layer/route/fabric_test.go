package route

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/probe"
)

// What rounds say of a fabric, one after the other.
func TestWhatIsKnownOfFabrics(t *testing.T) {
	pass, drop, silent, once := round{nodes: 1, pods: true}, round{nodes: 5}, round{}, round{nodes: 1}
	ready, dropsReady := round{nodes: 1, pods: true, theirs: signReady}, round{nodes: 5, theirs: signDrops | signReady}
	for _, row := range []struct {
		what        string
		rounds      []round
		drops, over bool
		kept        bool
	}{
		{"all passes", []round{pass, pass, pass}, false, false, false},
		{"nobody answers", []round{silent, silent, silent, silent, silent}, false, false, false},
		{"nodes are answered too seldom to say anything", []round{once, once, once, once, once, once, once, once, once, once, once}, false, false, false},
		{"in the end it says something", []round{once, once, once, once, once, once, once, once, once, once, once, once}, true, false, true},
		{"twice is chance", []round{drop, drop, pass, drop, drop, pass}, false, false, false},
		{"three times is not", []round{drop, drop, drop}, true, false, true},
		{"also with silence between", []round{drop, silent, drop, once, drop}, true, false, true},
		{"the other takes VXLAN", []round{drop, drop, drop, dropsReady}, true, true, true},
		{"it is off then", []round{drop, drop, drop, dropsReady, silent, silent, silent, silent, silent, silent}, true, true, true},
		{"the other says so alone", []round{{nodes: 1, pods: true, theirs: signDrops}}, false, false, true},
		{"and takes VXLAN", []round{{nodes: 1, pods: true, theirs: signDrops | signReady}}, false, true, true},
		{"and says so no more, but still sends", []round{{nodes: 1, pods: true, theirs: signDrops | signReady}, {nodes: 1, pods: true, theirs: signReady | signSends}}, false, false, true},
		{"nor sends", []round{{nodes: 1, pods: true, theirs: signDrops | signReady}, {nodes: 1, pods: true, theirs: signReady | signSends}, ready}, false, false, false},
		{"four times is chance", []round{dropsReady, dropsReady, dropsReady, ready, ready, ready, ready, dropsReady, ready}, true, true, true},
		{"five times is not", []round{dropsReady, dropsReady, dropsReady, ready, ready, ready, silent, ready, ready}, false, false, false},
	} {
		f := &fabric{}
		for _, r := range row.rounds {
			f.learn(r)
		}
		if f.drops != row.drops || f.over != row.over || f.kept != row.kept {
			t.Errorf("%s: drops %v, over %v, kept %v", row.what, f.drops, f.over, f.kept)
		}
	}
}

// Of two nodes, whose rounds come in any order, are lost, and whose kernels follow late, neither
// sends VXLAN that the other does not take; both go over, and both come back. One may begin anew
// at any time: what its kernel has, it believes.
func TestNeitherSendsWhatTheOtherDrops(t *testing.T) {
	for seed := range uint64(300) {
		chance := rand.New(rand.NewPCG(seed, 0))
		nodes := [2]*fabric{{}, {}}
		drops, settled := false, 0
		for step := range 3000 {
			i := chance.IntN(2)
			own, other := nodes[i], nodes[1-i]
			switch what := chance.IntN(20); {
			case what < 9:
				r := round{}
				if chance.IntN(10) > 2 {
					r = round{nodes: 1 + chance.IntN(5), pods: !drops && chance.IntN(10) > 2, theirs: other.says()}
				}
				own.learn(r)
			case what < 18: // its kernel follows
				own.ready, own.sends = own.kept, own.over
			case what == 18 && step%7 == 0 && own.sends: // a new process; that of a node with direct ways keeps nothing, and takes nothing
				nodes[i] = &fabric{drops: true, over: true, kept: true, ready: own.ready, sends: true}
			case what == 19 && settled > 300:
				drops, settled = !drops, 0
			}
			for i, n := range nodes {
				if n.sends && !nodes[1-i].ready {
					t.Fatalf("seed %d, step %d: node %d sends VXLAN that the other does not take: %+v and %+v", seed, step, i, *n, *nodes[1-i])
				}
			}
			if settled++; settled == 300 && drops && !(nodes[0].sends && nodes[1].sends) {
				t.Fatalf("seed %d, step %d: the fabric drops, and they have not gone over: %+v and %+v", seed, step, *nodes[0], *nodes[1])
			}
		}
	}
}

// When it is asked again: at once again what speaks against what is known, soon and ever later
// what waits for the other, else after a minute.
func TestWhenFabricsAreAsked(t *testing.T) {
	const soon, every = time.Second, time.Minute
	now, hours := time.Unix(1e9, 0), windows{fabricsWindow, time.Hour}
	for _, row := range []struct {
		what string
		f    fabric
		want []time.Duration
	}{
		{"it never answered", fabric{begun: now}, []time.Duration{every, every}},
		{"pods' are not answered", fabric{against: 1}, []time.Duration{soon, soon, soon}},
		{"the other does not take VXLAN", fabric{drops: true, kept: true}, []time.Duration{soon, 2 * soon, 4 * soon, 8 * soon, 16 * soon, 32 * soon, every, every}},
		{"in VXLAN", fabric{drops: true, kept: true, over: true}, []time.Duration{every, every}},
		{"in VXLAN, and it passes again", fabric{drops: true, kept: true, over: true, against: 2}, []time.Duration{every, every}},
		{"the other still sends VXLAN", fabric{kept: true}, []time.Duration{soon, 2 * soon}},
	} {
		for i, want := range row.want {
			row.f.later(now, false, soon, every, hours)
			if got := row.f.next.Sub(now); got != want {
				t.Errorf("%s: the %d. time it is asked after %s, not %s", row.what, i+1, got, want)
			}
		}
	}
	for what, f := range map[string]*fabric{"all is well": {met: true, begun: now}, "it has not answered for long": {begun: now.Add(-youngFor)}} {
		f.later(now, false, soon, every, hours)
		if open := hours.open(f.next); !open || hours.open(now) || f.next.Sub(now) > time.Hour || f.listens(now) {
			t.Errorf("%s: it is asked after %s, in a window %v", what, f.next.Sub(now), open)
		}
		if edge := hours.edge(now); !hours.open(now.Add(edge)) || hours.open(now.Add(edge-1)) || hours.open(now.Add(edge+fabricsWindow)) {
			t.Errorf("a window is said to begin in %s", edge)
		}
	}
}

// Where all is well nobody listens, and pays for it, but in windows.
func TestFabricsListenInWindows(t *testing.T) {
	v := newValley(t, ModeAuto, false)
	v.quick()
	const every = 1500 * time.Millisecond
	for _, l := range v.layers {
		l.fabrics.windows = windows{every / 3, every}
	}
	v.watch()
	f := v.layers[0].fabrics
	last := map[bool]time.Time{}
	closed := 0
	for end := time.Now().Add(5 * every); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		f.mu.Lock()
		open := len(f.posts) > 0
		met := true
		for _, known := range f.known {
			met = met && known.met
		}
		f.mu.Unlock()
		if last[open] = time.Now(); met && !open {
			closed++
		}
	}
	if closed < 20 || time.Since(last[true]) > 2*every {
		t.Errorf("it was seen not to listen %d times, and to listen %s ago", closed, time.Since(last[true]))
	}
	v.becomes(waysAll("direct"), "nothing is dropped")
	v.fabric("ip saddr 10.244.0.0/16 drop")
	v.becomes("[n1 IPv4 vxlan n1 IPv6 direct n2 IPv4 vxlan n2 IPv6 direct]", "pods' IPv4 is dropped")
}

// quick has layers ask often.
func (v *valley) quick() {
	for _, l := range v.layers {
		l.fabrics.every, l.fabrics.soon, l.fabrics.try = 100*time.Millisecond, 50*time.Millisecond, 40*time.Millisecond
		l.fabrics.windows = windows{100 * time.Millisecond, 100 * time.Millisecond}
	}
}

// fabric has the middle drop what a rule says.
func (v *valley) fabric(rules ...string) {
	v.t.Helper()
	v.sh(v.middle, "nft flush ruleset; nft 'table inet f { chain c { type filter hook forward priority 0; "+strings.Join(rules, "; ")+"; }; }'")
}

// ways are how packets to the other node's pods go, of each node and family.
func (v *valley) ways() (all []string) {
	v.t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	for i, l := range v.layers {
		have, err := l.Read()
		must(v.t, err)
		for _, to := range sortedRanges(have.(*Picture).rows) {
			way := map[bool]string{true: "direct", false: "vxlan"}[have.(*Picture).rows[to].Direct]
			all = append(all, fmt.Sprintf("n%d %s %s", i+1, family(to.Addr()), way))
		}
	}
	return all
}

func waysAll(way string) string {
	return fmt.Sprintf("[n1 IPv4 %[1]s n1 IPv6 %[1]s n2 IPv4 %[1]s n2 IPv6 %[1]s]", way)
}

// becomes waits until packets go so.
func (v *valley) becomes(want, when string) {
	v.t.Helper()
	begun := time.Now()
	for ; ; time.Sleep(20 * time.Millisecond) {
		got := fmt.Sprint(v.ways())
		if got == want {
			break
		}
		if time.Since(begun) > 30*time.Second {
			v.t.Fatalf("%s: packets go %s, not %s", when, got, want)
		}
	}
	v.t.Logf("%s: after %.1f s", when, time.Since(begun).Seconds())
}

// talks sends something between pods, in both families.
func (v *valley) talks(when string) {
	v.t.Helper()
	for _, six := range []bool{false, true} {
		for from := range v.pods {
			if err := v.carry(from, six, 100_000); err != nil {
				v.t.Errorf("%s, IPv6 %v, from pod %d: %v", when, six, from+1, err)
			}
		}
	}
}

// Where what looks like a segment drops packets of pods' addresses, nodes find it out, go over to
// VXLAN together and say so; a new process changes nothing; and when it passes them, they come
// back.
func TestAFabricThatDropsPodsAddresses(t *testing.T) {
	const pods4, pods6 = "{10.244.0.0/16}", "{fd00:244::/32}"
	source := []string{"ip saddr " + pods4 + " drop", "ip6 saddr " + pods6 + " drop"}
	target := []string{"ip daddr " + pods4 + " drop", "ip6 daddr " + pods6 + " drop"}
	v := newValley(t, ModeAuto, false)
	v.quick()
	end := v.watch()
	v.becomes(waysAll("direct"), "nothing is dropped")
	v.talks("nothing is dropped")
	for _, row := range []struct {
		what  string
		rules []string
	}{{"by source", source}, {"by destination", target}, {"in one direction", []string{"ip saddr 10.244.1.0/24 drop", "ip6 daddr fd00:244:1::/64 drop"}}} {
		v.fabric(row.rules...)
		v.becomes(waysAll("vxlan"), "dropped "+row.what)
		v.talks("dropped " + row.what)
		for i, l := range v.layers {
			d, err := l.Describe()
			must(t, err)
			said := strings.Join(d.Degraded, "\n")
			if want := fmt.Sprintf("a segment drops packets of pods' addresses: to ranges of nodes that are on it packets go in VXLAN, of 2 (the first is that of node n%d at 192.0.2.%[1]d)", 2-i); !strings.Contains(said, want) {
				t.Errorf("dropped %s: node %d says %q", row.what, i+1, said)
			}
		}
		if row.what == "by source" {
			end()
			v.restartsWithoutChange()
			v.quick()
			v.watch()
		}
		v.sh(v.middle, "nft flush ruleset")
		v.becomes(waysAll("direct"), "passed again")
		v.talks("passed again")
	}
	v.gone()
}

// restartsWithoutChange has new processes take over: there is nothing for them to do.
func (v *valley) restartsWithoutChange() {
	v.t.Helper()
	for i := range v.layers {
		must(v.t, v.layers[i].Close())
		l := New(v.settings[i])
		must(v.t, l.Open())
		v.t.Cleanup(func() { l.Close() })
		have, err := l.Read()
		must(v.t, err)
		want := l.Plan(v.snapshot())
		changes := l.Diff(have, want, true)
		if len(changes) > 0 {
			v.t.Errorf("node %d: a new process changes %v", i+1, changes)
		}
		_, _, err = l.Apply(have, want, changes)
		must(v.t, err)
		v.layers[i] = l
		look, err := l.Look()
		must(v.t, err)
		rows, _ := l.Explain(look, want)
		if len(rows) != 2 || rows[0].Why != "it is on the same segment, which drops packets of pods' addresses" {
			v.t.Errorf("node %d: it shows %v", i+1, rows)
		}
	}
}

// gone waits until nobody has a device any more that nobody needs.
func (v *valley) gone() {
	v.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left := 0
		v.mu.Lock()
		for _, l := range v.layers {
			d, err := l.host.device()
			must(v.t, err)
			if d != nil {
				left++
			}
		}
		v.mu.Unlock()
		if left == 0 {
			return
		}
		if time.Now().After(end) {
			v.t.Fatalf("all ways are direct, and %d nodes have a vxlan device", left)
		}
	}
}

// Nothing but packets of pods' addresses that are dropped is taken for that.
func TestNoFalseAlarmOfFabrics(t *testing.T) {
	v := newValley(t, ModeAuto, false)
	v.quick()
	ends := [2]func(){v.watchOne(0), v.watchOne(1)}
	for _, row := range []struct {
		what, rule string
		prepare    func()
		answered   bool
	}{
		{"three of ten packets are lost", "numgen random mod 10 < 3 drop", nil, true},
		{"half of all ICMP is lost", "meta l4proto {icmp, icmpv6} numgen random mod 2 < 1 drop", nil, true},
		{"all ICMP is filtered", "meta l4proto {icmp, icmpv6} drop", nil, false},
		{"pods' are dropped, and the other's process is away", "ip saddr 10.244.0.0/16 drop", ends[1], false},
	} {
		v.fabric(row.rule)
		if row.prepare != nil {
			row.prepare()
		}
		if answered := v.rounds(0, 12); answered != row.answered {
			t.Errorf("%s: answered %v", row.what, answered)
		}
		if got := fmt.Sprint(v.ways()); got != waysAll("direct") {
			t.Errorf("%s: packets go %s", row.what, got)
		}
	}
}

// rounds waits until a node has asked the other so often more, and says whether it was ever
// answered meanwhile.
func (v *valley) rounds(i, more int) (answered bool) {
	v.t.Helper()
	f := v.layers[i].fabrics
	look := func() (at time.Time, heard bool) {
		f.mu.Lock()
		defer f.mu.Unlock()
		for to, known := range f.known {
			if to.Addr().Is4() {
				at, heard = known.last, known.heard
			}
		}
		return at, heard
	}
	last, _ := look()
	begun := last // before what is between the nodes became another
	for end := time.Now().Add(30 * time.Second); more > 0; time.Sleep(5 * time.Millisecond) {
		if at, heard := look(); at != last {
			answered = answered || heard && last != begun
			last = at
			more--
		}
		if time.Now().After(end) {
			v.t.Fatalf("%d rounds have not come to an end", more)
		}
	}
	return answered
}

func noteOf(from, to string) probe.Note {
	return probe.Note{From: netip.MustParseAddr(from), To: netip.MustParseAddr(to), Token: 7, About: about(netip.MustParseAddr("10.244.2.0"), netip.MustParseAddr("10.244.1.0"))}
}

// Where nothing can be sent it is said why, and what was found before holds.
func TestFabricsThatCannotBeAsked(t *testing.T) {
	v := newVillage(t, ModeAuto, false)
	l := v.start(0)
	key := netip.MustParsePrefix("10.244.2.0/24")
	l.fabrics.known[key].drops, l.fabrics.known[key].over, l.fabrics.known[key].kept = true, true, true
	for to, a := range l.fabrics.aims {
		a.index = 4711
		l.fabrics.aims[to] = a
	}
	var running sync.WaitGroup
	for to := range l.fabrics.aims {
		l.fabrics.keepPosts(t.Context(), &running, l.fabrics.wanted(time.Now()))
		l.fabrics.ask(t.Context(), to)
	}
	d, err := l.Describe()
	must(t, err)
	if said := strings.Join(d.Degraded, "\n"); !strings.Contains(said, "is not asked, of 2 (the first is that of node n2 at 192.0.2.2): set up a packet socket at device 4711: no such device") {
		t.Errorf("it says %q", said)
	}
	if all := l.fabrics.all(); all[key] != (course{over: true, kept: true}) || len(l.fabrics.posts) > 0 {
		t.Errorf("what was found before is %v now", all)
	}
}

// Who is no node of the cluster gets no answer, nor does one who mixes pods' addresses and nodes'.
func TestWhomFabricsAnswer(t *testing.T) {
	v := &village{}
	l := New(Settings{Node: "n1"})
	w := plan(l.settings, v.snapshot()).wish
	have := newPicture()
	l.fabrics.aim(resolve(l.settings, w, segment()), w, have)
	for _, row := range []struct {
		from, to string
		answered bool
	}{
		{"192.0.2.2", "192.0.2.1", true}, {"10.244.2.0", "10.244.1.0", true}, {"2001:db8::2", "2001:db8::1", true}, {"fd00:244:2::", "fd00:244:1::", true},
		{"192.0.2.3", "192.0.2.1", false}, {"10.244.2.7", "10.244.1.0", false}, {"10.244.2.0", "10.244.1.7", false}, {"10.244.2.0", "192.0.2.1", false},
		{"192.0.2.2", "10.244.1.0", false}, {"192.0.2.1", "192.0.2.1", false}, {"10.244.1.0", "10.244.1.0", false},
	} {
		ask := noteOf(row.from, row.to)
		if ask.From.Is6() {
			ask.About = about(netip.MustParseAddr("fd00:244:2::"), netip.MustParseAddr("fd00:244:1::"))
		}
		if other := ask; row.answered {
			other.About++
			if _, may := l.fabrics.answer(other); may {
				t.Errorf("from %s to %s: answered about other ranges", row.from, row.to)
			}
		}
		answer, may := l.fabrics.answer(ask)
		if may != row.answered || may && (answer.From != ask.To || answer.To != ask.From || !answer.Answer || answer.Token != ask.Token) {
			t.Errorf("from %s to %s: answered %v: %+v", row.from, row.to, may, answer)
		}
	}
	// What a request says is not believed: it is a reason to ask.
	key := netip.MustParsePrefix("10.244.2.0/24")
	known := l.fabrics.known[key]
	known.last, known.next = time.Now(), time.Now().Add(time.Hour)
	ask := noteOf("192.0.2.2", "192.0.2.1")
	ask.Said = uint8(signDrops | signReady)
	l.fabrics.answer(ask)
	if known.theirs != 0 || known.over || time.Until(known.next) > fabricsSoon {
		t.Errorf("a request is believed, or not heeded: %+v", *known)
	}
	budget, now := allowance{most: 2}, time.Now()
	var taken []bool
	for _, at := range []time.Duration{0, 0, 0, time.Second} {
		taken = append(taken, budget.take(now.Add(at)))
	}
	if fmt.Sprint(taken) != "[true true false true]" {
		t.Errorf("of two a second there are let through %v", taken)
	}
}
