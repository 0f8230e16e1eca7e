package resolver

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/millrace/millrace/model"
)

// kernel remembers what it is told.
type kernel struct {
	mu    sync.Mutex
	knows map[string]model.Outside
	asked map[string]time.Time
	// late is called before it takes up what it is told, and told is how often it was.
	late func()
	told int
}

func newKernel() *kernel {
	return &kernel{knows: map[string]model.Outside{}, asked: map[string]time.Time{}}
}

func (k *kernel) Learn(all []model.Outside) error {
	if k.late != nil {
		k.late()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.told++
	for _, of := range all {
		k.knows[of.Name] = of
	}
	return nil
}

func (k *kernel) Forget(names []string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, name := range names {
		delete(k.knows, name)
	}
	return nil
}

func (k *kernel) Asked() (all []model.Asked, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for name, of := range k.knows {
		all = append(all, model.Asked{Name: name, Last: k.asked[name], A: of.A.Until, AAAA: of.AAAA.Until})
	}
	return all, nil
}

func (k *kernel) Learned() (all []model.Outside, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Collect(maps.Values(k.knows)), nil
}

func (k *kernel) of(name string) (model.Outside, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	of, ok := k.knows[name]
	return of, ok
}

// textOf is a family on one line.
func textOf(k model.Known, now time.Time) string {
	var chain []string
	for _, a := range k.Chain {
		chain = append(chain, fmt.Sprintf("%s for %v", a.Target, a.TTL))
	}
	state := []string{"unknown", "addresses", "nodata", "absent"}[k.State]
	if k.Stale {
		state = "stale " + state
	}
	soa := ""
	if len(k.SOA) > 0 {
		r, _, err := dns.UnpackRR(k.SOA, 0)
		soa = fmt.Sprint(" by ", err)
		if err == nil {
			soa = fmt.Sprintf(" by %s for %d", r.Header().Name, r.Header().Ttl)
		}
	}
	return fmt.Sprintf("%s %v%s via [%s] for %v", state, k.Addresses, soa, strings.Join(chain, ", "), k.Until.Sub(now).Round(time.Second))
}

func newTaught(t *testing.T, u *upstream) (*Resolver, *kernel) {
	k := newKernel()
	return newTeacher(t, u, k), k
}

// newTeacher is a resolver that teaches a kernel which may know something already.
func newTeacher(t *testing.T, u *upstream, k *kernel) *Resolver {
	r := New(Settings{Zone: "cluster.local", Sink: k})
	t.Cleanup(r.Close)
	r.Configure(forwardsTo(u))
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	t.Cleanup(func() {
		stop()
		<-done
	})
	return r
}

// An agent that is started where no server answers goes on with what the one before it
// has learned.
func TestKnowledgeOutlivesTheAgent(t *testing.T) {
	u := newUpstream(t, zone)
	r, k := newTaught(t, u)
	names := []string{"www", "only4", "no", "alias"}
	want := map[string]string{}
	for _, name := range names {
		want[name] = said(asks(t, r, question(name+".example.com.", dns.TypeAAAA)))
		until(t, name+" is learned", func() bool { _, ok := k.of(name + ".example.com"); return ok })
	}
	u.deaf.Store(true)
	k.mu.Lock()
	over := k.knows["www.example.com"] // its time is over
	over.A.Until, over.AAAA.Until = time.Now().Add(-time.Minute), time.Now().Add(-time.Minute)
	k.knows["www.example.com"] = over
	silent := k.knows["only4.example.com"] // no server answered a moment ago
	silent.A.Stale, silent.AAAA.Stale = true, true
	silent.A.Until, silent.AAAA.Until = time.Now().Add(time.Second), time.Now().Add(time.Second)
	k.knows["only4.example.com"] = silent
	k.mu.Unlock()
	want["only4"] = "NOERROR; example.com. 30 IN SOA ns.example.com. host.example.com. 1 7200 1800 86400 60"
	asked := u.asked.Load()
	next := newTeacher(t, u, k)
	until(t, "the kernel goes on with what is stale", func() bool {
		of, _ := k.of("only4.example.com")
		return of.A.Stale && of.AAAA.Stale && time.Until(of.A.Until) > staleTTL/2
	})
	until(t, "it is taken up", func() bool { entries, _ := next.cache.usage(); return entries >= 2*len(names) })
	for _, name := range names {
		begun := time.Now()
		got := said(asks(t, next, question(name+".example.com.", dns.TypeAAAA)))
		if took := time.Since(begun); name == "only4" && took > staleAfter/2 {
			t.Errorf("%s took %v", name, took)
		}
		if older := regexp.MustCompile(`(\d)(\d*) IN`); older.ReplaceAllString(got, "IN") != older.ReplaceAllString(want[name], "IN") {
			t.Errorf("%s: %s, not %s", name, got, want[name])
		}
	}
	if n := u.asked.Load() - asked; n == 0 {
		t.Error("nobody was asked for what an earlier agent learned")
	}
	if q := next.Status().Queries; q["stale"] != uint64(len(names)) {
		t.Errorf("what an earlier agent learned is given as if this one had: %v", q)
	}
	for _, name := range names {
		f := next.cache.peek(key{name + ".example.com.", dns.TypeAAAA}, time.Now())
		later := next.cache.peek(key{name + ".example.com.", dns.TypeAAAA}, time.Now().Add(recalledMost))
		if !f.usable() || later.usable() {
			t.Errorf("%s may be given for %v more", name, f.left+staleMost)
		}
	}
}

// An agent with servers takes what its predecessor learned for what it is: they are asked
// for it, and may say otherwise.
func TestPredecessorMayHaveAskedOthers(t *testing.T) {
	u := newUpstream(t, zone)
	r, k := newTaught(t, u)
	asks(t, r, question("www.example.com.", dns.TypeA))
	asks(t, r, question("www.example.com.", dns.TypeAAAA))
	until(t, "it is learned", func() bool { _, ok := k.of("www.example.com"); return ok })
	two := newUpstream(t, func(m *dns.Msg, _ bool) {
		if m.Question[0].Qtype == dns.TypeA {
			m.Answer = append(m.Answer, rr(m.Question[0].Name+" 60 IN A 198.51.100.2"))
		}
	})
	next := newTeacher(t, two, k)
	until(t, "it is taken up", func() bool { entries, _ := next.cache.usage(); return entries >= 2 })
	if got := said(asks(t, next, question("www.example.com.", dns.TypeA))); !strings.Contains(got, "198.51.100.2") {
		t.Errorf("the second server says otherwise: %s", got)
	}
}

// What an earlier agent learned of a zone that is left now goes with the first
// configuration, whether it was taken up before or not.
func TestZonesThatAreLeftAreForgotten(t *testing.T) {
	u := newUpstream(t, zone)
	first, k := newTaught(t, u)
	names := []string{"www.example.com", "alias.example.com"}
	for _, name := range names {
		asks(t, first, question(name+".", dns.TypeA))
		until(t, name+" is learned", func() bool { _, ok := k.of(name); return ok })
	}
	both := map[string]model.Outside{}
	for _, name := range names {
		both[name], _ = k.of(name)
	}
	d := forwardsTo(u)
	d.Forwards = slices.Insert(d.Forwards, 0, model.Forward{Zone: "www.example.com", Left: "Corefile:3: hosts"})
	for _, recallFirst := range []bool{true, false} {
		k := newKernel()
		k.Learn(slices.Collect(maps.Values(both)))
		r := New(Settings{Zone: "cluster.local", Sink: k})
		t.Cleanup(r.Close)
		if recallFirst {
			r.recall()
		}
		r.Configure(d)
		if !recallFirst {
			r.recall()
		}
		for _, name := range names {
			_, taught := k.of(name)
			f := r.cache.peek(key{name + ".", dns.TypeA}, time.Now())
			if want := name == "alias.example.com"; taught != want || f.usable() != want {
				t.Errorf("%s, recalled before the configuration %v: in the kernel %v, here %v, not %v", name, recallFirst, taught, f.usable(), want)
			}
		}
	}
}

// What comes into the servers' table is forgotten, here and in the kernel, and not learned
// again; nor is an ExternalName's target that is in it followed. What leaves it is asked for.
func TestHostsAreForgotten(t *testing.T) {
	u := newUpstream(t, zone)
	r, k := newTaught(t, u)
	d := forwardsTo(u)
	asked := func(name string) bool { return asks(t, r, question(name+".", dns.TypeA)) != nil }
	learned := func(name string) bool { _, ok := k.of(name); return ok }
	names := []string{"www.example.com", "alias.example.com"}
	for _, name := range names {
		if !asked(name) {
			t.Errorf("%s is handed back, and nothing says so", name)
		}
		until(t, name+" is learned", func() bool { return learned(name) })
	}
	for _, hosts := range [][]string{{"www.example.com"}, {"*.example.com"}} {
		tabled := *d
		tabled.Hosts = hosts
		r.Configure(&tabled)
		for _, name := range names {
			in := hosts[0] == "*.example.com" || name == hosts[0]
			before := u.asked.Load()
			if learned(name) == in || asked(name) == in {
				t.Errorf("hosts %v: %s, in the kernel %v", hosts, name, learned(name))
			}
			if in && u.asked.Load() > before {
				t.Errorf("hosts %v: the server was asked for %s", hosts, name)
			}
		}
	}
	s := shop()
	tabled := *d
	tabled.Hosts, tabled.TTL = []string{"www.example.com"}, 5*time.Second
	s.DNS = &tabled
	r.Take(s)
	if asked("elsewhere.shop.svc.cluster.local") {
		t.Error("an ExternalName is followed into the table")
	}
	r.Configure(d)
	for _, name := range names {
		if !asked(name) {
			t.Errorf("%s is handed back after it left the table", name)
		}
		until(t, name+" is learned again", func() bool { return learned(name) })
	}
}

// The kernel learns both families of a name of which one was asked for.
func TestKernelLearns(t *testing.T) {
	u := newUpstream(t, zone)
	r, k := newTaught(t, u)
	for name, want := range map[string][2]string{
		"www":   {"addresses [192.0.2.1] via [] for 5m0s", "addresses [2001:db8::1] via [] for 5m0s"},
		"only4": {"addresses [192.0.2.1] via [] for 5m0s", "nodata [] by example.com. for 60 via [] for 1m0s"},
		"no":    {"absent [] by example.com. for 60 via [] for 1m0s", "absent [] by example.com. for 60 via [] for 1m0s"},
		"alias": {"addresses [192.0.2.1] via [more.example.com for 1m40s, www.example.com for 3m20s] for 1m40s", "addresses [2001:db8::1] via [more.example.com for 1m40s, www.example.com for 3m20s] for 1m40s"},
	} {
		asks(t, r, question(strings.ToUpper(name)+".example.com.", dns.TypeA))
		until(t, name+" is learned", func() bool { _, ok := k.of(name + ".example.com"); return ok })
		of, _ := k.of(name + ".example.com")
		now := time.Now()
		if a, aaaa := textOf(of.A, now), textOf(of.AAAA, now); a != want[0] || aaaa != want[1] {
			t.Errorf("%s:\nA    %s\nAAAA %s\nnot\nA    %s\nAAAA %s", name, a, aaaa, want[0], want[1])
		}
	}
	asks(t, r, question("mail.example.com.", dns.TypeMX))
	asks(t, r, question("broken.example.com.", dns.TypeA))
	asks(t, r, question("never.example.com.", dns.TypeA))
	time.Sleep(5 * lessonEvery)
	for _, name := range []string{"mail.example.com", "broken.example.com", "never.example.com"} {
		if of, ok := k.of(name); ok {
			t.Errorf("%s is learned: %+v", name, of)
		}
	}
	other := newUpstream(t, zone)
	r.Configure(forwardsTo(other))
	if _, ok := k.of("www.example.com"); ok {
		t.Error("another server is to be asked, and the kernel answers with what the first one said")
	}
}

// A name that was asked for once is asked for once of the servers, and one with a short TTL
// only when a pod asks.
func TestNobodyAsksAgain(t *testing.T) {
	u := newUpstream(t, func(m *dns.Msg, tcp bool) {
		zone(m, tcp)
		if strings.HasPrefix(m.Question[0].Name, "brief") {
			m.Rcode, m.Ns, m.Answer = dns.RcodeSuccess, nil, nil
			switch m.Question[0].Qtype {
			case dns.TypeA:
				m.Answer = append(m.Answer, rr(m.Question[0].Name+" 2 IN A 192.0.2.5"))
			case dns.TypeAAAA:
				m.Answer = append(m.Answer, rr(m.Question[0].Name+" 2 IN AAAA 2001:db8::5"))
			}
		}
	})
	r, k := newTaught(t, u)
	for _, name := range []string{"www", "brief"} {
		asks(t, r, question(name+".example.com.", dns.TypeA))
		until(t, name+" is learned", func() bool { _, ok := k.of(name + ".example.com"); return ok })
	}
	learned, before := time.Now(), u.asked.Load()
	set := func(after time.Duration) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.asked["www.example.com"] = learned // when it was written, as by the kernel
		k.asked["brief.example.com"] = learned.Add(after)
	}
	for after := time.Second; after < 330*time.Second; after += 500 * time.Millisecond {
		set(after)
		r.freshen(learned.Add(after), askEvery)
	}
	time.Sleep(50 * time.Millisecond)
	if n := u.asked.Load(); n != before {
		t.Errorf("the server was asked %d times for what no pod waits for", n-before)
	}
}

// What is asked for early does not take the room of what pods wait for, and has a bound.
func TestEarlyQuestionsHaveABound(t *testing.T) {
	u := newUpstream(t, zone)
	u.deaf.Store(true)
	r := newResolver(t, forwardsTo(u))
	c := r.config.Load()
	to := c.forward("example.com.")
	for i := range 2 * allWaiting {
		r.fetchEarly(c, to, key{fmt.Sprintf("early%d.example.com.", i), dns.TypeA})
	}
	r.mu.Lock()
	n, early := len(r.flights), r.early
	r.mu.Unlock()
	if n != earlyWaiting || early != earlyWaiting {
		t.Errorf("%d questions, %d of them early, not %d", n, early, earlyWaiting)
	}
	refused := 0
	for i := range allWaiting {
		if r.fetch(c, to, key{fmt.Sprintf("n%d.example.com.", i), dns.TypeA}, "pod") == nil {
			refused++
		}
	}
	if refused > 0 {
		t.Errorf("%d of %d questions of pods were refused", refused, allWaiting)
	}
	until(t, "all have ended", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.flights) == 0 && r.early == 0
	})
}

// The kernel does not end with what the servers of another configuration said, when that
// changes while it is told.
func TestServersChangeWhileTheKernelLearns(t *testing.T) {
	u, other := newUpstream(t, zone), newUpstream(t, zone)
	k := newKernel()
	r := New(Settings{Zone: "cluster.local", Sink: k})
	t.Cleanup(r.Close)
	r.Configure(forwardsTo(u))
	name := "www.example.com"
	fill := func() {
		for _, kind := range []uint16{dns.TypeA, dns.TypeAAAA} {
			if asks(t, r, question(name+".", kind)) == nil {
				t.Fatal("handed back")
			}
		}
		until(t, "both families are known", func() bool { _, ok := r.known(name+".", time.Now()); return ok })
	}
	fill()
	k.late = func() { r.Configure(forwardsTo(other)) }
	r.teach(context.Background(), name+".")
	if of, ok := k.of(name); ok || k.told != 1 {
		t.Errorf("told %d times, the kernel has what the first server said: %+v", k.told, of)
	}
	fill()
	r.teach(context.Background(), name+".")
	if _, ok := k.of(name); !ok {
		t.Error("what the second server said is not learned")
	}
}

// Only what other servers are asked for now is forgotten: not for a file that is empty for
// a moment, which is said once, nor for another TTL of the cluster's names.
func TestOnlyWhatIsOthersIsForgotten(t *testing.T) {
	u := newUpstream(t, zone)
	file := filepath.Join(t.TempDir(), "resolv.conf")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("nameserver 192.0.2.1\n")
	d := func(ttl time.Duration) *model.DNS {
		return &model.DNS{TTL: ttl, Forwards: []model.Forward{{Zone: "example.com", To: []model.Upstream{{Address: u.at}}}, {Zone: ".", To: []model.Upstream{{File: file}}}}}
	}
	k := newKernel()
	var log bytes.Buffer
	r := New(Settings{Zone: "cluster.local", Sink: k, Log: slog.New(slog.NewTextHandler(&log, nil))})
	t.Cleanup(r.Close)
	r.Configure(d(5 * time.Second))
	names := []string{"www.example.com", "www.example.org"}
	for _, name := range names {
		for _, kind := range []uint16{dns.TypeA, dns.TypeMX} {
			at := key{name + ".", kind}
			a := &answer{records: []dns.RR{rr(name + ". 60 IN A 192.0.2.1")}, ttl: time.Minute}
			packed, err := a.pack(at)
			if err != nil {
				t.Fatal(err)
			}
			r.cache.put(at, nobody, a, packed, time.Now())
		}
		k.Learn([]model.Outside{{Name: name}})
	}
	again := func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.arrange()
	}
	for _, row := range []struct {
		what   string
		change func()
		left   []string
	}{
		{"the file is empty", func() { write(""); again(); again() }, names},
		{"another TTL", func() { r.Configure(d(30 * time.Second)) }, names},
		{"the file is whole again", func() { write("nameserver 192.0.2.1\n"); again() }, names},
		{"another server in the file", func() { write("nameserver 192.0.2.2\n"); again() }, names[:1]},
		{"nothing is configured", func() { r.Configure(nil) }, nil},
	} {
		row.change()
		for _, name := range names {
			_, taught := k.of(name)
			f := r.cache.peek(key{name + ".", dns.TypeMX}, time.Now())
			if want := slices.Contains(row.left, name); f.usable() != want || taught != want {
				t.Errorf("%s: %s is kept %v, by the kernel %v, not %v", row.what, name, f.usable(), taught, want)
			}
		}
		if c := r.config.Load(); row.what == "another TTL" && c.ttl != 30*time.Second {
			t.Errorf("%s: %v", row.what, c.ttl)
		}
	}
	if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "192.0.2.1:53") {
		t.Errorf("said:\n%s", log.String())
	}
}

// What pods ask for is asked for anew before it ends, without anybody who waits, and given
// on where no server answers; what nobody asks for is left to end.
func TestKernelIsKeptFresh(t *testing.T) {
	u := newUpstream(t, zone)
	r, k := newTaught(t, u)
	for _, name := range []string{"www", "only4", "no"} {
		asks(t, r, question(name+".example.com.", dns.TypeA))
		until(t, name+" is learned", func() bool { _, ok := k.of(name + ".example.com"); return ok })
	}
	learned := time.Now()
	podAsks := func(after time.Duration) {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.asked["only4.example.com"] = learned.Add(after)
	}
	answered := func() []string {
		u.mu.Lock()
		defer u.mu.Unlock()
		return slices.Clone(u.names)
	}
	before := len(answered())
	podAsks(50 * time.Second)
	r.freshen(learned.Add(50*time.Second), askEvery)
	r.freshen(learned.Add(58*time.Second), askEvery)
	until(t, "both families of the name are asked for anew", func() bool { return len(answered()) >= before+2 })
	if last := answered()[before:]; !slices.Equal(last, []string{"only4.example.com.", "only4.example.com."}) {
		t.Errorf("asked for %v", last)
	}

	u.deaf.Store(true)
	until(t, "the server is known to be down", func() bool {
		asks(t, r, question("x.example.com.", dns.TypeA))
		return len(r.Status().Down) == 1
	})
	late := 10 * time.Minute
	podAsks(late)
	r.freshen(learned.Add(late), askEvery)
	until(t, "it has been tried", func() bool {
		return r.cache.peek(key{"only4.example.com.", dns.TypeA}, time.Now()).failed.After(learned) &&
			r.cache.peek(key{"only4.example.com.", dns.TypeAAAA}, time.Now()).failed.After(learned)
	})
	r.cache.fail(key{"only4.example.com.", dns.TypeA}, nobody, learned.Add(late)) // as it would be then
	r.cache.fail(key{"only4.example.com.", dns.TypeAAAA}, nobody, learned.Add(late))
	r.freshen(learned.Add(late+time.Second), askEvery)
	of, _ := k.of("only4.example.com")
	now := learned.Add(late + time.Second)
	if got := textOf(of.A, now); got != "stale addresses [192.0.2.1] via [] for 30s" {
		t.Errorf("no server answers, and the kernel has %s", got)
	}
	if got := textOf(of.AAAA, now); got != "stale nodata [] by example.com. for 30 via [] for 30s" {
		t.Errorf("no server answers, and the kernel has %s", got)
	}
	for _, name := range []string{"www.example.com", "no.example.com"} {
		if of, _ := k.of(name); of.A.Stale {
			t.Errorf("%s: nobody asks for it, and it is kept: %s", name, textOf(of.A, now))
		}
	}
}
