package resolver

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/millrace/millrace/model"
)

// upstream is a real DNS server on the loopback, over UDP and TCP.
type upstream struct {
	at    netip.AddrPort
	asked atomic.Int64
	// overTCP counts what came over TCP.
	overTCP atomic.Int64
	// deaf: it takes questions and says nothing.
	deaf atomic.Bool

	mu    sync.Mutex
	names []string // as they were asked
	says  func(m *dns.Msg, tcp bool)
}

// newUpstream starts a server; says fills in the reply.
func newUpstream(t testing.TB, says func(m *dns.Msg, tcp bool)) *upstream {
	t.Helper()
	u := &upstream{says: says}
	for range 100 { // another process may take the port between
		packets, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		u.at = netip.MustParseAddrPort(packets.LocalAddr().String())
		listener, err := net.Listen("tcp", u.at.String())
		if err != nil {
			packets.Close()
			continue
		}
		for _, s := range []*dns.Server{{PacketConn: packets, Handler: u}, {Listener: listener, Handler: u}} {
			go s.ActivateAndServe()
			t.Cleanup(func() { s.Shutdown() })
		}
		return u
	}
	t.Fatal("no port is free over both UDP and TCP")
	return nil
}

// ServeDNS implements dns.Handler.
func (u *upstream) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	_, tcp := w.RemoteAddr().(*net.TCPAddr)
	u.asked.Add(1)
	if tcp {
		u.overTCP.Add(1)
	}
	if u.deaf.Load() {
		return
	}
	m := new(dns.Msg)
	m.SetReply(q)
	m.RecursionAvailable = true
	u.mu.Lock()
	u.names = append(u.names, q.Question[0].Name)
	u.says(m, tcp)
	u.mu.Unlock()
	w.WriteMsg(m)
}

// rr reads a record; tests have none that cannot be read.
func rr(text string) dns.RR {
	read, err := dns.NewRR(text)
	if err != nil {
		panic(err)
	}
	return read
}

const soa = "example.com. 600 IN SOA ns.example.com. host.example.com. 1 7200 1800 86400 60"

// zone is what the servers of tests know: www has both families, only4 one, alias leads
// there by two names, and all else below example.com does not exist.
func zone(m *dns.Msg, _ bool) {
	name, kind := strings.ToLower(m.Question[0].Name), m.Question[0].Qtype
	add := func(records ...string) {
		for _, text := range records {
			m.Answer = append(m.Answer, rr(text))
		}
	}
	address := func(name string, six bool) {
		switch {
		case kind == dns.TypeA:
			add(name + " 300 IN A 192.0.2.1")
		case kind == dns.TypeAAAA && six:
			add(name + " 300 IN AAAA 2001:db8::1")
		default:
			m.Ns = append(m.Ns, rr(soa))
		}
	}
	switch name {
	case "www.example.com.":
		address(name, true)
	case "only4.example.com.":
		address(name, false)
	case "alias.example.com.":
		add("alias.example.com. 100 IN CNAME more.example.com.", "more.example.com. 200 IN CNAME www.example.com.")
		address("www.example.com.", true)
	case "short.example.com.":
		add("short.example.com. 1 IN A 192.0.2.2")
	case "never.example.com.":
		add("never.example.com. 0 IN A 192.0.2.3")
	case "broken.example.com.":
		m.Rcode = dns.RcodeServerFailure
	case "half.example.com.": // as a load balancer that knows one family alone
		if kind != dns.TypeA {
			m.Rcode = dns.RcodeNameError
			m.Ns = append(m.Ns, rr(soa))
			return
		}
		add("half.example.com. 300 IN A 192.0.2.4")
	case "mail.example.com.":
		add("mail.example.com. 60 IN MX 10 www.example.com.")
	case "large.example.com.":
		for i := range 200 {
			add(fmt.Sprintf("large.example.com. 60 IN A 192.0.2.%d", i))
		}
	case ".":
		add(". 60 IN NS a.root-servers.net.")
	default:
		m.Rcode = dns.RcodeNameError
		m.Ns = append(m.Ns, rr(soa))
	}
}

// forwardsTo is the configuration of CoreDNS with `forward .`.
func forwardsTo(upstreams ...*upstream) *model.DNS {
	d := &model.DNS{TTL: 5 * time.Second, Forwards: []model.Forward{{Zone: "."}}}
	for _, u := range upstreams {
		d.Forwards[0].To = append(d.Forwards[0].To, model.Upstream{Address: u.at})
	}
	return d
}

func newResolver(t testing.TB, d *model.DNS) *Resolver {
	t.Helper()
	r := New(Settings{Zone: "cluster.local"})
	t.Cleanup(r.Close)
	r.Configure(d)
	return r
}

// question is a plain query.
func question(name string, kind uint16) *dns.Msg {
	m := new(dns.Msg)
	m.SetQuestion(name, kind)
	return m
}

// asks resolves as a pod does; nil is handed back.
func asks(t testing.TB, r *Resolver, m *dns.Msg) *dns.Msg {
	t.Helper()
	packed, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	reply, ok := r.Resolve(context.Background(), "pod", packed)
	if !ok {
		return nil
	}
	var got dns.Msg
	if err := got.Unpack(reply); err != nil {
		t.Fatalf("%s: the answer cannot be read: %v", m.Question[0].String(), err)
	}
	got.Compress = true // for Len
	if got.Id != m.Id || !got.Response || !slices.Equal(got.Question, m.Question) {
		t.Fatalf("asked %v, answered %v", m, &got)
	}
	if (got.IsEdns0() != nil) != (m.IsEdns0() != nil) {
		t.Fatalf("asked with OPT: %v, answered with: %v", m.IsEdns0(), got.IsEdns0())
	}
	return &got
}

// said is an answer on one line: its code and its records.
func said(m *dns.Msg) string {
	if m == nil {
		return "handed back"
	}
	text := []string{dns.RcodeToString[m.Rcode]}
	for _, section := range [][]dns.RR{m.Answer, m.Ns} {
		for _, r := range section {
			text = append(text, strings.Join(strings.Fields(r.String()), " "))
		}
	}
	if m.Truncated {
		text = append(text, "cut")
	}
	return strings.Join(text, "; ")
}

func TestNamesOutside(t *testing.T) {
	u := newUpstream(t, zone)
	r := newResolver(t, forwardsTo(u))
	for _, row := range []struct {
		name string
		kind uint16
		want string
	}{
		{"www.example.com.", dns.TypeA, "NOERROR; www.example.com. 300 IN A 192.0.2.1"},
		{"WWW.Example.com.", dns.TypeAAAA, "NOERROR; WWW.Example.com. 300 IN AAAA 2001:db8::1"},
		{"only4.example.com.", dns.TypeAAAA, "NOERROR; example.com. 60 IN SOA ns.example.com. host.example.com. 1 7200 1800 86400 60"},
		{"no.example.com.", dns.TypeA, "NXDOMAIN; example.com. 60 IN SOA ns.example.com. host.example.com. 1 7200 1800 86400 60"},
		{"alias.example.com.", dns.TypeA, "NOERROR; alias.example.com. 100 IN CNAME more.example.com.; more.example.com. 200 IN CNAME www.example.com.; www.example.com. 300 IN A 192.0.2.1"},
		{"mail.example.com.", dns.TypeMX, "NOERROR; mail.example.com. 60 IN MX 10 www.example.com."},
		{"broken.example.com.", dns.TypeA, "handed back"},
	} {
		for _, when := range []string{"once", "again"} {
			if got := said(asks(t, r, question(row.name, row.kind))); got != row.want {
				t.Errorf("%s %s, %s: %s, not %s", row.name, dns.TypeToString[row.kind], when, got, row.want)
			}
		}
	}
	if n := u.asked.Load(); n != 7 {
		t.Errorf("the server was asked %d times for 7 questions", n)
	}
	q := r.Status().Queries
	if q["upstream"] != 6 || q["cache"] != 6 || q["handed_back"] != 2 {
		t.Errorf("counted %v", q)
	}
	recent := r.Recent()
	if len(recent) != 14 {
		t.Fatalf("%d queries are remembered", len(recent))
	}
	third := recent[2]
	third.At, third.Took = time.Time{}, 0
	if want := (Query{From: "pod", Name: "WWW.Example.com", Type: "AAAA", By: "upstream", Rcode: "NOERROR", Records: 1}); third != want {
		t.Errorf("remembered: %+v, not %+v", third, want)
	}
	if last := recent[13]; last.Type != "A" || last.By != "handed_back" || last.Rcode != "" {
		t.Errorf("remembered last: %+v", last)
	}
}

// A server that says of one family that there is no such name does not hide the other, nor
// does the kernel learn either.
func TestHalfOfAName(t *testing.T) {
	u := newUpstream(t, zone)
	r, k := newTaught(t, u)
	for range 3 {
		if got := said(asks(t, r, question("half.example.com.", dns.TypeAAAA))); !strings.HasPrefix(got, "NXDOMAIN") {
			t.Errorf("AAAA: %s", got)
		}
		if got := said(asks(t, r, question("half.example.com.", dns.TypeA))); got != "NOERROR; half.example.com. 300 IN A 192.0.2.4" {
			t.Errorf("A: %s", got)
		}
	}
	asks(t, r, question("www.example.com.", dns.TypeA))
	until(t, "another name is learned", func() bool { _, ok := k.of("www.example.com"); return ok })
	if of, ok := k.of("half.example.com"); ok {
		t.Errorf("the kernel has %+v", of)
	}
}

// TTLs go down, and what must not be kept is asked for each time.
func TestAnswersGrowOld(t *testing.T) {
	u := newUpstream(t, zone)
	r := newResolver(t, forwardsTo(u))
	at := time.Now()
	ask := func(name string, after time.Duration) (string, Source) {
		q := query{written: name, name: name, kind: dns.TypeA, recursive: true, size: mostUDP}
		m, source := r.answer(context.Background(), "pod", &q, at.Add(after))
		return said(m), source
	}
	ask("alias.example.com.", 0)
	at = time.Now()
	if got, source := ask("alias.example.com.", 60*time.Second); source != Cache ||
		got != "NOERROR; alias.example.com. 40 IN CNAME more.example.com.; more.example.com. 140 IN CNAME www.example.com.; www.example.com. 240 IN A 192.0.2.1" {
		t.Errorf("after a minute: %v: %s", source, got)
	}
	if _, source := ask("alias.example.com.", 102*time.Second); source != Upstream {
		t.Errorf("after the TTL of the first alias: %v", source)
	}
	for range 3 {
		if got, source := ask("never.example.com.", 0); source != Upstream || got != "NOERROR; never.example.com. 0 IN A 192.0.2.3" {
			t.Errorf("TTL 0: %v: %s", source, got)
		}
	}
	// With a tenth left it is asked for anew, and nobody waits.
	before := u.asked.Load()
	if _, source := ask("www.example.com.", 0); source != Upstream {
		t.Error(source)
	}
	at = time.Now()
	if _, source := ask("www.example.com.", 269*time.Second); source != Cache || u.asked.Load() != before+1 {
		t.Errorf("early: %v, asked %d times", source, u.asked.Load()-before)
	}
	if _, source := ask("www.example.com.", 272*time.Second); source != Cache {
		t.Errorf("late: %v", source)
	}
	until(t, "the name is asked for anew", func() bool { return u.asked.Load() == before+2 })
}

func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for begun := time.Now(); !is(); time.Sleep(time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// cookie is what dig sends with a question.
var cookie = &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0011223344556677"}

// A question with a cookie is answered as by who knows none: without one. The server is not
// given it either: it is between the pod and whom the pod asks.
func TestCookies(t *testing.T) {
	var given atomic.Int64
	u := newUpstream(t, func(m *dns.Msg, tcp bool) {
		if opt := m.IsEdns0(); opt != nil && len(opt.Option) > 0 {
			given.Add(1)
		}
		zone(m, tcp)
	})
	r := newResolver(t, forwardsTo(u))
	for _, name := range []string{"www.example.com.", "nothing.example.com.", "www.example.com."} {
		m := question(name, dns.TypeA)
		m.SetEdns0(1232, false).IsEdns0().Option = []dns.EDNS0{cookie}
		got, plain := asks(t, r, m), asks(t, r, question(name, dns.TypeA))
		if said(got) != said(plain) || got == nil || len(got.IsEdns0().Option) > 0 {
			t.Errorf("%s with a cookie: %s, options %v; without: %s", name, said(got), got.IsEdns0(), said(plain))
		}
	}
	if given.Load() > 0 {
		t.Error("the server was given the pod's cookie")
	}
}

// What is no plain question is for others; so is all of a zone that is left to them.
func TestHandedBack(t *testing.T) {
	u := newUpstream(t, zone)
	d := forwardsTo(u)
	d.Forwards = slices.Insert(d.Forwards, 0, model.Forward{Zone: "left.example.com", Left: "Corefile:3: hosts"})
	r := newResolver(t, d)
	with := func(change func(*dns.Msg)) *dns.Msg {
		m := question("www.example.com.", dns.TypeA)
		change(m)
		return m
	}
	for what, m := range map[string]*dns.Msg{
		"DO":    with(func(m *dns.Msg) { m.SetEdns0(1232, true) }),
		"CD":    with(func(m *dns.Msg) { m.CheckingDisabled = true }),
		"no RD": with(func(m *dns.Msg) { m.RecursionDesired = false }),
		"a subnet": with(func(m *dns.Msg) {
			m.SetEdns0(1232, false).IsEdns0().Option = []dns.EDNS0{cookie, &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, Address: net.IPv4zero}}
		}),
		"the server's name": with(func(m *dns.Msg) {
			m.SetEdns0(1232, false).IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_NSID{Code: dns.EDNS0NSID}}
		}),
		"EDNS 1":         with(func(m *dns.Msg) { m.SetEdns0(1232, false).IsEdns0().SetVersion(1) }),
		"CHAOS":          with(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }),
		"two questions":  with(func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }),
		"a notification": with(func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }),
		"an answer":      with(func(m *dns.Msg) { m.Response = true }),
		"a transfer":     question("example.com.", dns.TypeAXFR),
		"everything":     question("example.com.", dns.TypeANY),
		"RRSIG":          question("example.com.", dns.TypeRRSIG),
		"left":           question("a.left.example.com.", dns.TypeA),
		"the cluster's":  question("web.shop.svc.cluster.local.", dns.TypeA),
		"an address":     question("1.2.0.192.in-addr.arpa.", dns.TypePTR),
	} {
		if got := asks(t, r, m); got != nil {
			t.Errorf("%s: %s", what, said(got))
		}
	}
	for _, junk := range [][]byte{nil, {1}, make([]byte, 12), make([]byte, 600)} {
		if _, ok := r.Resolve(context.Background(), "pod", junk); ok {
			t.Errorf("%d bytes of junk are answered", len(junk))
		}
	}
	if u.asked.Load() > 0 {
		t.Errorf("the server was asked for %v", u.names)
	}
	if got := newResolver(t, nil); asks(t, got, question("www.example.com.", dns.TypeA)) != nil {
		t.Error("answered, and nothing is configured")
	}
}

// An answer that is too large for a datagram is fetched over TCP, and cut for the pod.
func TestLargeAnswers(t *testing.T) {
	u := newUpstream(t, func(m *dns.Msg, tcp bool) {
		if zone(m, tcp); !tcp {
			m.Answer, m.Truncated = nil, true
		}
	})
	r := newResolver(t, forwardsTo(u))
	for _, row := range []struct{ size, records, most int }{{0, 25, 512}, {100, 25, 512}, {800, 40, 800}, {4096, 70, mostUDP}} {
		m := question("large.example.com.", dns.TypeA)
		if row.size > 0 {
			m.SetEdns0(uint16(row.size), false)
		}
		got := asks(t, r, m)
		if got == nil || !got.Truncated || len(got.Answer) < row.records || got.Len() > row.most {
			t.Errorf("a client that takes %d bytes: %s", row.size, said(got))
		}
	}
	if udp, tcp := u.asked.Load()-u.overTCP.Load(), u.overTCP.Load(); udp != 1 || tcp != 1 {
		t.Errorf("the server was asked %d times over UDP, %d over TCP", udp, tcp)
	}
	d := forwardsTo(u)
	d.Forwards[0].To[0].TCP = true
	r.Configure(d)
	if got := asks(t, r, question("www.example.com.", dns.TypeA)); got == nil || u.overTCP.Load() != 2 {
		t.Errorf("a server for TCP alone: %s", said(got))
	}
}

// Many that ask for one name at once are one question to the server.
func TestAskedOnce(t *testing.T) {
	go1 := make(chan struct{})
	u := newUpstream(t, func(m *dns.Msg, tcp bool) { <-go1; zone(m, tcp) })
	r := newResolver(t, forwardsTo(u))
	var pods sync.WaitGroup
	for range eachWaiting {
		pods.Go(func() {
			if got := asks(t, r, question("www.example.com.", dns.TypeA)); got == nil {
				t.Error("handed back")
			}
		})
	}
	until(t, "all wait", func() bool {
		r.limits.mu.Lock()
		defer r.limits.mu.Unlock()
		return r.limits.pods["pod"] != nil && r.limits.pods["pod"].waiting == eachWaiting
	})
	close(go1)
	pods.Wait()
	// A second question is what a server gets that is slow.
	if n := u.asked.Load(); n > attempts {
		t.Errorf("the server was asked %d times", n)
	}
}

// A pod that asks too much does not keep others from asking.
func TestLimits(t *testing.T) {
	u := newUpstream(t, zone)
	r := newResolver(t, forwardsTo(u))
	packed, _ := question("www.example.com.", dns.TypeA).Pack()
	asked, refused := 0, 0
	for begun := time.Now(); asked < 4*eachBurst; asked++ {
		if _, ok := r.Resolve(context.Background(), "greedy", packed); !ok {
			refused++
		}
		if time.Since(begun) > time.Minute {
			break
		}
	}
	if refused == 0 || r.Status().Queries["refused"] != uint64(refused) {
		t.Errorf("of %d queries %d were refused: %v", asked, refused, r.Status().Queries)
	}
	if _, ok := r.Resolve(context.Background(), "modest", packed); !ok {
		t.Error("another pod is refused")
	}
	u.deaf.Store(true)
	var pods sync.WaitGroup
	for i := range eachWaiting + 10 {
		pods.Go(func() { asks(t, r, question(fmt.Sprintf("n%d.example.com.", i), dns.TypeA)) })
	}
	pods.Wait()
	if q := r.Status().Queries; q["refused"] < uint64(refused)+10 {
		t.Errorf("%d names at once: %v", eachWaiting+10, q)
	}
}

// Memory is bounded in bytes; what was used last stays.
func TestCacheIsBounded(t *testing.T) {
	c := newCache(10_000)
	now := time.Now()
	for i := range 1000 {
		k := key{fmt.Sprintf("n%d.example.com.", i), dns.TypeA}
		a := &answer{records: []dns.RR{rr(k.name + " 60 IN A 192.0.2.1")}, ttl: time.Minute}
		packed, err := a.pack(k)
		if err != nil {
			t.Fatal(err)
		}
		c.put(k, "pod", a, packed, now)
		if c.bytes > c.most {
			t.Fatalf("%d bytes after %d names", c.bytes, i)
		}
		if f := c.get(key{"n0.example.com.", dns.TypeA}, "pod", now); !f.fresh() {
			t.Fatalf("what is used is gone after %d names", i)
		}
	}
	entries, bytes := c.usage()
	if entries < 20 || entries != len(c.entries) || entries != c.pods["pod"].recent.Len() || bytes != c.pods["pod"].bytes {
		t.Errorf("%d entries, %d bytes", entries, bytes)
	}
	sum := 0
	for _, e := range c.entries {
		sum += e.size()
	}
	if sum != bytes {
		t.Errorf("%d bytes, counted %d", sum, bytes)
	}
}

// A pod that asks for very much pushes out what is kept for itself. What another pod has
// asked for stays, also what both have asked for.
func TestFloodKeepsWhatOthersHave(t *testing.T) {
	u := newUpstream(t, func(m *dns.Msg, _ bool) {
		m.Answer = append(m.Answer, rr(m.Question[0].Name+" 600 IN TXT \"yes\""))
	})
	r := newResolver(t, forwardsTo(u))
	r.cache.most = 100_000 // some 300 answers
	ask := func(pod, name string) {
		t.Helper()
		packed, _ := question(name, dns.TypeTXT).Pack()
		if _, ok := r.Resolve(context.Background(), pod, packed); !ok {
			t.Errorf("%s: %s is handed back", pod, name)
		}
	}
	all := func(pod, name string, n int) (asked int64) {
		t.Helper()
		before := u.asked.Load()
		for i := range n {
			ask(pod, fmt.Sprintf("%s%d.example.com.", name, i))
		}
		return u.asked.Load() - before
	}
	all("greedy", "shared", 10)
	all("modest", "shared", 10)
	all("modest", "own", 10)
	all("greedy", "own", 10) // does not make them its own
	if asked := all("greedy", "flood", eachBurst/2); asked < eachBurst/2 {
		t.Fatalf("the server was asked %d times for %d names: the test is blind", asked, eachBurst/2)
	}
	if entries, bytes := r.cache.usage(); bytes > r.cache.most || entries > 500 {
		t.Fatalf("%d answers in %d bytes", entries, bytes)
	}
	if asked := all("modest", "own", 10) + all("modest", "shared", 10); asked > 0 {
		t.Errorf("%d of 20 answers of another pod are gone", asked)
	}
}

// Whom to ask is by zone, and what other servers said is forgotten.
func TestConfigured(t *testing.T) {
	one := newUpstream(t, zone)
	two := newUpstream(t, func(m *dns.Msg, _ bool) {
		m.Answer = append(m.Answer, rr(m.Question[0].Name+" 60 IN A 198.51.100.2"))
	})
	r := newResolver(t, forwardsTo(one))
	asks(t, r, question("www.example.com.", dns.TypeA))
	d := forwardsTo(one)
	d.Forwards = slices.Insert(d.Forwards, 0, model.Forward{Zone: "example.com", To: []model.Upstream{{Address: two.at}}})
	r.Configure(d)
	if got := said(asks(t, r, question("www.example.com.", dns.TypeA))); !strings.Contains(got, "198.51.100.2") {
		t.Errorf("another server's answer: %s", got)
	}
	if got := said(asks(t, r, question("notexample.com.", dns.TypeA))); !strings.HasPrefix(got, "NXDOMAIN") {
		t.Errorf("by the first server: %s", got)
	}
	asked := two.asked.Load()
	r.Configure(forwardsTo(one)) // nothing that is left was asked of it
	if got := said(asks(t, r, question("www.example.com.", dns.TypeA))); !strings.Contains(got, "192.0.2.1") || two.asked.Load() != asked {
		t.Errorf("back again: %s", got)
	}
	r.Configure(nil)
	if got := asks(t, r, question("www.example.com.", dns.TypeA)); got != nil {
		t.Errorf("not known any more: %s", said(got))
	}
}

// BenchmarkKept is a query whose answer is there.
func BenchmarkKept(b *testing.B) {
	u := newUpstream(b, zone)
	r := newResolver(b, forwardsTo(u))
	asks(b, r, question("www.example.com.", dns.TypeA))
	packed, _ := question("www.example.com.", dns.TypeA).Pack()
	for i := 0; b.Loop(); i++ {
		if _, ok := r.Resolve(context.Background(), fmt.Sprint(i%podsMost), packed); !ok {
			b.Fatal("handed back")
		}
	}
}
