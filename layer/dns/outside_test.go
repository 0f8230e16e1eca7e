package dns

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/millrace/millrace/kernel/bpfmap"

	"github.com/millrace/millrace/model"
)

// Short names for rows of tests.
type (
	Outside = model.Outside
	Known   = model.Known
	Alias   = model.Alias
	Asked   = model.Asked
	State   = model.KnownState
)

const (
	Unknown   = model.KnownNot
	Addresses = model.KnownAddresses
	NoData    = model.KnownNoData
	Absent    = model.KnownAbsent
)

func about(name string, a, aaaa Known) Outside { return Outside{Name: name, A: a, AAAA: aaaa} }

func cname(target string, ttl time.Duration) Alias { return Alias{Target: target, TTL: ttl} }

// townSearch is what kubelet gives a pod of namespace shop, on a host with a domain.
var townSearch = []string{"shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "corp.example"}

// soaOf is a zone's SOA record as a server sends it, without compression.
func soaOf(zone string, ttl uint32) (record []byte) {
	name := func(text string) (bytes []byte) {
		for label := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == '.' }) {
			bytes = append(append(bytes, byte(len(label))), label...)
		}
		return append(bytes, 0)
	}
	data := append(name("ns1.Example.net."), name("hostmaster.example.net.")...)
	for _, number := range []uint32{2026112201, 900, 600, 86400, 60} {
		data = binary.BigEndian.AppendUint32(data, number)
	}
	record = binary.BigEndian.AppendUint32(append(name(zone), 0, 6, 0, 1), ttl)
	return append(binary.BigEndian.AppendUint16(record, uint16(len(data))), data...)
}

// parsedSOA is what such a record says.
func parsedSOA(t testing.TB, record []byte) (zone string, soa dnsmessage.SOAResource) {
	t.Helper()
	var m dnsmessage.Message
	must(t, m.Unpack(append([]byte{0, 0, 0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0}, record...)))
	return m.Authorities[0].Header.Name.String(), *m.Authorities[0].Body.(*dnsmessage.SOAResource)
}

// long1 and long2 have long answers.
var (
	long1 = strings.Repeat("z", 50) + "." + strings.Repeat("w", 20) + ".example"
	long2 = strings.Repeat("v", 50) + "." + strings.Repeat("w", 20) + ".example"
)

// neighbours are names outside the cluster, with all that may be known of them.
func neighbours() []Outside {
	soon, past := time.Now().Add(300*time.Second), time.Now().Add(-time.Minute)
	at := func(addresses ...string) Known {
		k := Known{State: Addresses, Until: soon}
		for _, addr := range addresses {
			k.Addresses = append(k.Addresses, netip.MustParseAddr(addr))
		}
		return k
	}
	behind := func(k Known, targets ...string) Known {
		for i, target := range targets {
			k.Chain = append(k.Chain, cname(target, time.Duration(400-i)*time.Second))
		}
		return k
	}
	noData := Known{State: NoData, Until: soon, SOA: soaOf("Example.com.", 300)}
	absent := Known{State: Absent, Until: soon, SOA: soaOf("com.", 300)}
	corp := Known{State: Absent, Until: time.Now().Add(200 * time.Second), SOA: soaOf("corp.example.", 200)}
	bare := Known{State: Absent, Until: soon}
	old := func(k Known) Known { k.Until = past; return k }
	stale := func(k Known) Known { k.Stale = true; return k }
	var eight4, eight6 []string
	for i := range 8 {
		eight4, eight6 = append(eight4, fmt.Sprintf("192.0.2.%d", 100+i)), append(eight6, fmt.Sprintf("2001:db8::1:%d", i))
	}
	a, aaaa := at("192.0.2.1", "192.0.2.2"), at("2001:db8::1")
	all := []Outside{
		about("Api.Example.com.", a, aaaa),
		about("v4.example.com", at("192.0.2.4"), noData),
		about("empty.example.com", noData, noData),
		about("nosuch.example.com", absent, absent),
		about("www.example.com", behind(a, "cdn.example.net", "EDGE.example.org."), behind(aaaa, "cdn.example.net", "edge.example.org")),
		about("www4.example.com", behind(a, "cdn.example.net"), behind(Known{State: NoData, Until: soon, SOA: soaOf("example.net.", 300)}, "cdn.example.net")),
		about("two.example.com", behind(a, "one.example.net"), behind(aaaa, "other.example.net")),
		about("dangling.example.com", behind(absent, "x.example.com"), behind(absent, "x.example.com")),
		about("half.example.com", a, Known{}),
		about("odd.example.com", a, absent),
		about("old.example.com", old(a), old(aaaa)),
		about("aged.example.com", a, old(aaaa)),
		about("stale.example.com", stale(behind(a, "was.example.net")), stale(aaaa)),
		about("gone.example.com", stale(absent), stale(absent)),
		about("nosoa.example.com", bare, bare),
		about("root.example", Known{State: Absent, Until: soon, SOA: soaOf(".", 300)}, Known{State: Absent, Until: soon, SOA: soaOf(".", 300)}),
		about("eight.example.com", at(eight4...), at(eight6...)),
		about("git.dev.corp.example", at("198.51.100.5"), Known{State: NoData, Until: soon, SOA: soaOf("corp.example.", 300)}),
		about(long1, behind(at(eight4...), strings.Repeat("t", 50)+".example"), behind(at(eight6...), strings.Repeat("t", 50)+".example")),
		about(long2, behind(at(eight4...), strings.Repeat("t", 50)+".example"), behind(at(eight6[:7]...), strings.Repeat("t", 50)+".example")),
	}
	// The host's domain has none of these, and somebody asked.
	for _, name := range []string{"api.example.com", "v4.example.com", "empty.example.com", "nosuch.example.com", "www.example.com", "www4.example.com",
		"dangling.example.com", "half.example.com", "odd.example.com", "old.example.com", "stale.example.com", "gone.example.com", "eight.example.com", long1, long2,
		"web.shop.svc.cluster.local"} {
		all = append(all, about(name+".corp.example", corp, corp))
	}
	return append(all, about("two.example.com.corp.example", stale(corp), stale(corp)))
}

// TestOutside asks for names outside, and for what the search list of a pod makes of names.
func TestOutside(t *testing.T) {
	p := load(t, town())
	p.learn(neighbours()...)
	eight4 := "192.0.2.100 192.0.2.101 192.0.2.102 192.0.2.103 192.0.2.104 192.0.2.105 192.0.2.106 192.0.2.107"
	eight6 := "2001:db8::1:0 2001:db8::1:1 2001:db8::1:2 2001:db8::1:3 2001:db8::1:4 2001:db8::1:5 2001:db8::1:6 2001:db8::1:7"
	p.asks([]asked{
		{"api.example.com.", "192.0.2.1 192.0.2.2", "2001:db8::1"},
		{"API.eXample.COM.", "192.0.2.1 192.0.2.2", "2001:db8::1"},
		{"v4.example.com.", "192.0.2.4", "outside_nodata"},
		{"empty.example.com.", "outside_nodata", "outside_nodata"},
		{"nosuch.example.com.", "outside_nxdomain", "outside_nxdomain"},
		{"www.example.com.", "192.0.2.1 192.0.2.2", "2001:db8::1"},
		{"www4.example.com.", "192.0.2.1 192.0.2.2", "outside_nodata"},
		{"two.example.com.", "192.0.2.1 192.0.2.2", "2001:db8::1"},
		{"dangling.example.com.", "outside_nxdomain", "outside_nxdomain"},
		{"half.example.com.", "192.0.2.1 192.0.2.2", "not_ours"},
		{"odd.example.com.", "192.0.2.1 192.0.2.2", "outside_nxdomain"},
		{"old.example.com.", "not_ours", "not_ours"},
		{"aged.example.com.", "192.0.2.1 192.0.2.2", "not_ours"},
		{"stale.example.com.", "192.0.2.1 192.0.2.2", "2001:db8::1"},
		{"gone.example.com.", "outside_stale", "outside_stale"},
		{"nosoa.example.com.", "outside_nxdomain", "outside_nxdomain"},
		{"root.example.", "outside_nxdomain", "outside_nxdomain"},
		{"eight.example.com.", eight4, eight6},
		{"unheard.example.com.", "not_ours", "not_ours"},
		{"example.com.", "not_ours", "not_ours"},
		// nothing is known of the pod's list
		{"api.example.com.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
	})
	p.search(townSearch...)
	p.asks([]asked{
		{"api.example.com.shop.svc.cluster.local.", "api.example.com. 192.0.2.1 192.0.2.2", "api.example.com. 2001:db8::1"},
		{"Api.Example.com.SHOP.svc.cluster.local.", "api.example.com. 192.0.2.1 192.0.2.2", "api.example.com. 2001:db8::1"},
		{"v4.example.com.shop.svc.cluster.local.", "v4.example.com. 192.0.2.4", "v4.example.com. outside_nodata"},
		{"www.example.com.shop.svc.cluster.local.", "www.example.com. 192.0.2.1 192.0.2.2", "www.example.com. 2001:db8::1"},
		{"www4.example.com.shop.svc.cluster.local.", "www4.example.com. 192.0.2.1 192.0.2.2", "www4.example.com. outside_nodata"},
		{"stale.example.com.shop.svc.cluster.local.", "stale.example.com. 192.0.2.1 192.0.2.2", "stale.example.com. 2001:db8::1"},
		{"eight.example.com.shop.svc.cluster.local.", "eight.example.com. " + eight4, "eight.example.com. " + eight6},
		{long1 + ".", eight4, eight6},
		{long2 + ".shop.svc.cluster.local.", long2 + ". " + eight4, long2 + ". " + strings.TrimSuffix(eight6, " 2001:db8::1:7")},
		{long1 + ".shop.svc.cluster.local.", "nxdomain", "nxdomain"}, // one family's answer would be too long
		{"git.dev.shop.svc.cluster.local.", "git.dev.corp.example. 198.51.100.5", "git.dev.corp.example. outside_nodata"},
		{"kube-dns.kube-system.shop.svc.cluster.local.", "kube-dns.kube-system.svc.cluster.local. 10.96.0.10", "kube-dns.kube-system.svc.cluster.local. fd00:96::a"},
		{"four.shop.shop.svc.cluster.local.", "four.shop.svc.cluster.local. 10.96.0.21", "four.shop.svc.cluster.local. nodata"},
		{"web.shop.svc.shop.svc.cluster.local.", "web.shop.svc.cluster.local. 10.96.0.20", "web.shop.svc.cluster.local. fd00:96::20"},
		{"web.shop.svc.cluster.local.shop.svc.cluster.local.", "web.shop.svc.cluster.local. 10.96.0.20", "web.shop.svc.cluster.local. fd00:96::20"},
		// the candidate exists
		{"web.shop.svc.cluster.local.", "10.96.0.20", "fd00:96::20"},
		// the end is not known, or not for both families, or there is none
		{"unheard.example.com.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"nosuch.example.com.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"empty.example.com.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"half.example.com.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"odd.example.com.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"old.example.com.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"gone.example.com.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		// of an earlier candidate it is not known whether it exists: of the host's domain, of a
		// Service that others answer for, of a namespace
		{"root.example.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"two.example.com.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"outside.shop.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"nosuch.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		// not the first candidate
		{"api.example.com.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"api.example.com.cluster.local.", "nxdomain", "nxdomain"},
		{"api.example.com.other.svc.cluster.local.", "nxdomain", "nxdomain"},
	})
	// ndots 5: with five dots a name is tried as it is at first
	p.learn(about("a.b.c.d.example", neighbours()[0].A, neighbours()[0].AAAA), about("a.b.c.d.e.example", neighbours()[0].A, neighbours()[0].AAAA),
		about("a.b.c.d.example.corp.example", neighbours()[3].A, neighbours()[3].AAAA), about("a.b.c.d.e.example.corp.example", neighbours()[3].A, neighbours()[3].AAAA))
	p.search("shop.svc.cluster.local", "cluster.local")
	p.asks([]asked{
		{"a.b.c.d.example.shop.svc.cluster.local.", "a.b.c.d.example. 192.0.2.1 192.0.2.2", "a.b.c.d.example. 2001:db8::1"},
		{"a.b.c.d.e.example.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
	})
	// a list that begins outside the cluster
	p.search("corp.example", "shop.svc.cluster.local")
	p.asks([]asked{
		{"nosuch.example.com.corp.example.", "outside_nxdomain", "outside_nxdomain"},
		{"api.example.com.corp.example.", "api.example.com. 192.0.2.1 192.0.2.2", "api.example.com. 2001:db8::1"},
		{"api.example.com.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
	})
	t.Log(p.counts())
}

// asked is a name, and what becomes of the questions for its families.
type asked struct{ name, a, aaaa string }

func (p *loaded) asks(rows []asked) {
	p.t.Helper()
	for _, row := range rows {
		for kind, want := range map[dnsmessage.Type]string{dnsmessage.TypeA: row.a, dnsmessage.TypeAAAA: row.aaaa} {
			for _, edns := range []bool{false, true} {
				if got := p.ask(asking(p.t, row.name, kind, edns)); got != want {
					p.t.Errorf("%s %v, EDNS %v: %s, not %s", row.name, kind, edns, got, want)
				}
			}
		}
	}
}

// What is forgotten is passed up, and so is what expires; no one is answered with what is
// known of the cluster in part.
func TestForget(t *testing.T) {
	p := load(t, town())
	p.learn(neighbours()...)
	api, candidate := asking(t, "api.example.com.", dnsmessage.TypeA, false), asking(t, "api.example.com.shop.svc.cluster.local.", dnsmessage.TypeA, false)
	p.search(townSearch...)
	unsure := town()
	unsure.Unread = 1
	p.apply(unsure)
	if got := p.ask(candidate); got != "unsure" {
		t.Errorf("not all of the cluster is known: %s", got)
	}
	if got := p.ask(api); got != "192.0.2.1 192.0.2.2" {
		t.Errorf("not all of the cluster is known: %s", got)
	}
	p.apply(town())
	if got := p.ask(candidate); got != "api.example.com. 192.0.2.1 192.0.2.2" {
		t.Errorf("all is known again: %s", got)
	}
	must(t, p.layer.Forget([]string{"API.example.com.", "never.example.com", ""}))
	delete(p.mirror.outside, "api.example.com")
	if got := p.ask(api); got != "not_ours" {
		t.Errorf("forgotten: %s", got)
	}
	if got := p.ask(candidate); got != "nxdomain" {
		t.Errorf("forgotten: %s", got)
	}

	brief := neighbours()[0]
	brief.A.Until = time.Now().Add(1500 * time.Millisecond)
	must(t, p.layer.Learn([]Outside{brief}))
	frame := datagramOf(client4, dns4, api)
	if verdict, _ := p.run(frame); verdict != redirected && time.Now().Before(brief.A.Until) {
		t.Error("what is known for a second is not answered with")
	}
	time.Sleep(time.Until(brief.A.Until) + 10*time.Millisecond)
	if verdict, after := p.run(frame); verdict != passed {
		t.Errorf("expired, and answered with %x", after)
	}
}

// TTLs are what is left: here of names that were learned 100 s ago.
func TestTTLsAreCountedDown(t *testing.T) {
	p := load(t, town())
	p.learn(neighbours()...)
	p.search(townSearch...)
	const ago = 100 * time.Second
	entries, err := p.layer.tables.outside.All()
	must(t, err)
	for key, entry := range entries {
		entry.Since -= uint64(ago)
		for i := range entry.Known {
			entry.Known[i].Until -= uint64(ago)
		}
		if errs := p.layer.tables.outside.Put([]datapathName{key}, []datapathOutsideName{entry}); errs != nil {
			t.Fatal(errs)
		}
		o := p.mirror.outside[nameOf(key)]
		o.at, o.A.Until, o.AAAA.Until = o.at.Add(-ago), o.A.Until.Add(-ago), o.AAAA.Until.Add(-ago)
		p.mirror.outside[nameOf(key)] = o
	}
	p.asks([]asked{
		{"www.example.com.", "192.0.2.1 192.0.2.2", "2001:db8::1"},
		{"www4.example.com.", "192.0.2.1 192.0.2.2", "outside_nodata"},
		{"dangling.example.com.", "outside_nxdomain", "outside_nxdomain"},
		{"stale.example.com.", "192.0.2.1 192.0.2.2", "2001:db8::1"},
		{"www4.example.com.shop.svc.cluster.local.", "www4.example.com. 192.0.2.1 192.0.2.2", "www4.example.com. outside_nodata"},
	})
	// The host's domain has it absent for 3 s more, so the alias may be kept as long.
	brief := Known{State: Absent, Until: time.Now().Add(3500 * time.Millisecond), SOA: soaOf("corp.example.", 300)}
	p.learn(about("api.example.com.corp.example", brief, brief))
	p.asks([]asked{{"api.example.com.shop.svc.cluster.local.", "api.example.com. 192.0.2.1 192.0.2.2", "api.example.com. 2001:db8::1"}})
}

// When a name was asked for last is in its entry, and stays when it is learned again.
func TestAsked(t *testing.T) {
	p := load(t, town())
	begun := time.Now()
	p.learn(neighbours()...)
	of := func(name string) Asked {
		t.Helper()
		all, err := p.layer.Asked()
		must(t, err)
		if len(all) != len(neighbours()) {
			t.Fatalf("%d names, not %d", len(all), len(neighbours()))
		}
		return all[slices.IndexFunc(all, func(a Asked) bool { return a.Name == name })]
	}
	first := of("half.example.com")
	if d := first.A.Sub(begun); d < 299*time.Second || d > 301*time.Second+time.Since(begun) || !first.AAAA.IsZero() {
		t.Errorf("it expires at %v and %v", first.A, first.AAAA)
	}
	time.Sleep(1100 * time.Millisecond)
	asked := time.Now()
	p.ask(asking(t, "half.example.com.", dnsmessage.TypeA, false))
	p.learn(neighbours()...)
	if last := of("half.example.com").Last; last.Before(asked.Add(-10*time.Millisecond)) || last.After(time.Now()) {
		t.Errorf("asked for at %v, and the entry says %v", asked, last)
	}
	if last := of("api.example.com").Last; last.After(asked) {
		t.Errorf("never asked for, and the entry says %v", last)
	}
}

// What does not fit into an entry is not known at all, also where something else was known
// before.
func TestUnfit(t *testing.T) {
	p := load(t, town())
	good := neighbours()[0]
	chain := func(n, length int) (all []Alias) {
		for i := range n {
			all = append(all, cname(strings.Repeat(string(rune('a'+i)), length)+".example", time.Minute))
		}
		return all
	}
	nine := slices.Repeat(good.A.Addresses, 5)[:9]
	for what, change := range map[string]func(*Outside){
		"nine addresses":         func(o *Outside) { o.A.Addresses = nine },
		"none":                   func(o *Outside) { o.A.Addresses = nil },
		"the other family":       func(o *Outside) { o.A.Addresses = good.AAAA.Addresses },
		"eight aliases":          func(o *Outside) { o.A.Chain = chain(8, 1) },
		"long aliases":           func(o *Outside) { o.A.Chain = chain(3, 40) },
		"different aliases":      func(o *Outside) { o.A.Chain, o.AAAA.Chain = chain(1, 60), chain(2, 30) },
		"an alias that is none":  func(o *Outside) { o.A.Chain = []Alias{cname("a..b", time.Minute)} },
		"an alias to the root":   func(o *Outside) { o.A.Chain = []Alias{cname(".", time.Minute)} },
		"an escape":              func(o *Outside) { o.A.Chain = []Alias{cname(`a\.b.example`, time.Minute)} },
		"another zone's SOA":     func(o *Outside) { o.A = Known{State: NoData, Until: good.A.Until, SOA: soaOf("example.net.", 60)} },
		"half an SOA":            func(o *Outside) { o.A = Known{State: NoData, Until: good.A.Until, SOA: soaOf("com.", 60)[:30]} },
		"an SOA and more":        func(o *Outside) { o.A = Known{State: NoData, Until: good.A.Until, SOA: append(soaOf("com.", 60), 0)} },
		"no state that there is": func(o *Outside) { o.A.State = Absent + 1 },
	} {
		p.learn(good)
		bad := good
		change(&bad)
		must(t, p.layer.Learn([]Outside{bad}))
		if verdict, _ := p.run(datagramOf(client4, dns4, asking(t, "api.example.com.", dnsmessage.TypeA, false))); verdict != passed {
			t.Errorf("%s: answered", what)
		}
	}
	long := good
	long.Name = strings.Repeat("x", 63) + "." + strings.Repeat("y", 32)
	must(t, p.layer.Learn([]Outside{long, {Name: ""}, {Name: `a\.b`, A: good.A, AAAA: good.AAAA}}))
	if all, err := p.layer.Asked(); err != nil || len(all) > 0 || p.layer.learned > 0 {
		t.Errorf("%v, %v", all, err)
	}
	long.Name = long.Name[:len(long.Name)-1] // 96 bytes as in messages
	p.learn(long)
	if got := p.ask(asking(t, long.Name+".", dnsmessage.TypeA, false)); got != "192.0.2.1 192.0.2.2" {
		t.Errorf("a name of 96 bytes: %s", got)
	}
}

// A full table makes room: names that have expired go first, then those asked for longest
// ago.
func TestRoom(t *testing.T) {
	const room = 64
	l := New(Settings{Zone: "cluster.local"})
	outside := bpfmap.NewFake[datapathName, datapathOutsideName](room)
	l.host, l.tables = nobody{}, tables{outside: outside, writings: bpfmap.NewFake[datapathTable, uint64](2)}
	good := neighbours()[0]
	name := func(i int) Outside { return about(fmt.Sprintf("n%d.example", i), good.A, good.AAAA) }
	for i := range room {
		o := name(i)
		if i%16 == 3 {
			o.A.Until, o.AAAA.Until = time.Now().Add(-time.Minute), time.Now().Add(-time.Minute)
		}
		must(t, l.Learn([]Outside{o}))
		key := keyOf(o.Name)
		entry, _, _ := outside.Get(key)
		entry.Asked -= uint64(i) * uint64(time.Second) // the later, the longer ago
		outside.Put([]datapathName{key}, []datapathOutsideName{entry})
	}
	must(t, l.Learn([]Outside{name(room), name(room + 1)}))
	all, err := l.Asked()
	must(t, err)
	there := map[string]bool{}
	for _, one := range all {
		there[one.Name] = true
	}
	if len(all) != room*7/8+2 || l.learned != len(all) || !there["n64.example"] || !there["n65.example"] || !there["n0.example"] || there["n3.example"] || there["n19.example"] || there["n63.example"] || there["n60.example"] || !there["n59.example"] {
		t.Errorf("%d names are left: %v", len(all), there)
	}
	if err := New(Settings{}).Learn(nil); err == nil {
		t.Error("learned by a layer that is not open")
	}
}

// As TestNamesAreWrittenMeanwhile, outside the cluster.
func TestOutsideIsWrittenMeanwhile(t *testing.T) {
	p := load(t, town())
	some := []Outside{neighbours()[0], neighbours()[1]}
	some[0].A.Addresses = some[0].A.Addresses[:1]
	p.learn(some...)
	p.writtenMeanwhile("api.example.com.", some[0].A.Addresses[0], func() {
		if err := p.layer.Learn(some); err != nil {
			t.Error(err)
		}
	})
}

// A resolver asks for its first candidate, whatever the name: one query leads to the same
// as all of them.
func TestSearchListsLeadToTheSame(t *testing.T) {
	p := load(t, town())
	p.learn(neighbours()...)
	p.search(townSearch...)
	random := rand.New(rand.NewPCG(3, 5))
	collapsed := 0
	for range 4000 {
		var labels []string
		if random.IntN(2) == 0 {
			labels = strings.Split(neighbours()[random.IntN(len(neighbours()))].Name, ".")
		} else {
			for range 1 + random.IntN(4) {
				labels = append(labels, []string{"web", "four", "shop", "svc", "db", "kube-dns", "kube-system", "git", "dev"}[random.IntN(9)])
			}
		}
		name := strings.TrimSuffix(strings.ToLower(strings.Join(labels, ".")), ".")
		kind := []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA}[random.IntN(2)]
		if strings.Count(name, ".") >= 5 {
			continue
		}
		got := p.ask(asking(t, name+".shop.svc.cluster.local.", kind, false))
		target, answer, aliased := strings.Cut(got, ". ")
		if !aliased {
			continue
		}
		collapsed++
		// as if the list were not known
		list := p.mirror.search
		if errs := p.layer.tables.searches.Delete([]uint32{1}); errs != nil {
			t.Fatal(errs)
		}
		p.mirror.search = nil
		for _, suffix := range append(slices.Clone(townSearch), "") {
			candidate := strings.TrimSuffix(name+"."+suffix, ".")
			got := p.ask(asking(t, candidate+".", kind, false))
			if candidate == target {
				if got != answer {
					t.Errorf("%s came to %s %s, and that to %s", name, target, answer, got)
				}
				break
			}
			if got != "nxdomain" && got != "outside_nxdomain" {
				t.Errorf("%s came to %s, and before that is %s: %s", name, target, candidate, got)
			}
		}
		p.search(list...)
	}
	if t.Logf("%d were collapsed", collapsed); collapsed < 200 {
		t.Errorf("only %d were collapsed", collapsed)
	}
}
