package dns

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/model"
)

// named is a Service with addresses of its own; port 53 over UDP, so that it may be the
// DNS Service.
func named(namespace, name string, ips ...string) *model.Service {
	s := &model.Service{Name: model.Name{Namespace: namespace, Name: name}, Type: model.ClusterIP,
		Ports: []model.ServicePort{{Name: "dns", Protocol: model.UDP, Port: 53}}}
	for _, ip := range ips {
		s.ClusterIPs = append(s.ClusterIPs, netip.MustParseAddr(ip))
	}
	return s
}

// served is a Service with an endpoint that is ready.
func served(s *model.Service) *model.Service {
	s.Ports[0].Backends = []model.Backend{{Address: netip.MustParseAddrPort("10.244.0.53:53"), Ready: true}}
	return s
}

// headless is a Service whose endpoints are "HOST=ADDRESS" or "ADDRESS", with "!" before
// those that are not ready.
func headless(namespace, name string, endpoints ...string) *model.Service {
	s := &model.Service{Name: model.Name{Namespace: namespace, Name: name}, Type: model.ClusterIP, Headless: true}
	for _, text := range endpoints {
		text, unready := strings.CutPrefix(text, "!")
		host, addr, has := strings.Cut(text, "=")
		if !has {
			host, addr = "", host
		}
		s.Endpoints = append(s.Endpoints, model.Endpoint{Address: netip.MustParseAddr(addr), Hostname: host, Ready: !unready})
	}
	return s
}

// town is a cluster with names of every sort.
func town() *model.Snapshot {
	many := func(n int) (endpoints []string) {
		for i := range n {
			endpoints = append(endpoints, fmt.Sprintf("10.244.3.%d", i+1), fmt.Sprintf("fd00:244:3::%x", i+1))
		}
		return endpoints
	}
	outside := named("shop", "outside")
	outside.Type = model.ExternalName
	long := strings.Repeat("x", 63)
	return &model.Snapshot{Number: 7, Complete: true, Named: true, Services: []*model.Service{
		served(named("kube-system", "kube-dns", "10.96.0.10", "fd00:96::a")),
		named("shop", "web", "10.96.0.20", "fd00:96::20"),
		named("shop", "four", "10.96.0.21"),
		named("shop", "six", "fd00:96::22"),
		named("shop", "pending"),
		outside,
		headless("shop", "db", "db-0=10.244.1.5", "db-1=10.244.2.5", "!db-2=10.244.2.6", "10.244.2.7", "fd00:244:2::7"),
		headless("shop", "down", "!10.244.1.9"),
		headless("shop", "eight", many(8)...),
		headless("shop", "nine", many(9)...),
		named(long, long, "10.96.0.30"),
	}, Others: []model.Name{{Namespace: "shop", Name: "mesh"}}}
}

// TestAnswers asks what people ask. On the left is the name below the zone, or a whole
// one with a final dot; on the right the addresses, or what becomes of the query.
func TestAnswers(t *testing.T) {
	p := load(t, town())
	long := strings.Repeat("x", 63)
	for _, row := range []struct{ name, a, aaaa string }{
		{"web.shop.svc", "10.96.0.20", "fd00:96::20"},
		{"WeB.sHop.SVC", "10.96.0.20", "fd00:96::20"},
		{"four.shop.svc", "10.96.0.21", "nodata"},
		{"six.shop.svc", "nodata", "fd00:96::22"},
		{"kube-dns.kube-system.svc", "10.96.0.10", "fd00:96::a"},
		{"db.shop.svc", "10.244.1.5 10.244.2.5 10.244.2.7", "fd00:244:2::7"},
		{"db-0.db.shop.svc", "10.244.1.5", "nodata"},
		{"db-2.db.shop.svc", "left", "left"}, // not ready: whoever knows why answers
		{"10-244-2-7.db.shop.svc", "10.244.2.7", "nodata"},
		{"fd00-244-2--7.db.shop.svc", "nodata", "fd00:244:2::7"},
		{"down.shop.svc", "nxdomain", "nxdomain"},
		{"10-244-1-9.down.shop.svc", "nxdomain", "nxdomain"},
		{"eight.shop.svc", "10.244.3.1 10.244.3.2 10.244.3.3 10.244.3.4 10.244.3.5 10.244.3.6 10.244.3.7 10.244.3.8",
			"fd00:244:3::1 fd00:244:3::2 fd00:244:3::3 fd00:244:3::4 fd00:244:3::5 fd00:244:3::6 fd00:244:3::7 fd00:244:3::8"},
		{"nine.shop.svc", "left", "left"},
		{"outside.shop.svc", "left", "left"},
		{"pending.shop.svc", "left", "left"},
		{"mesh.shop.svc", "left", "left"},
		{"nosuch.shop.svc", "nxdomain", "nxdomain"},
		{"web.nosuch.svc", "nxdomain", "nxdomain"},
		{"web.shop", "nxdomain", "nxdomain"}, // candidates of search lists
		{"web", "nxdomain", "nxdomain"},
		{"api.example.com", "nxdomain", "nxdomain"},
		{"api.example.com.shop.svc", "nxdomain", "nxdomain"}, // example-com is no Service here
		{"api.web.shop.svc", "left", "left"},                 // perhaps an endpoint
		{"_dns._udp.web.shop.svc", "left", "left"},
		{"_dns._udp.nosuch.shop.svc", "nxdomain", "nxdomain"},
		{"a.b.c.web.shop.svc", "nxdomain", "nxdomain"},
		{"shop.svc", "left", "left"},
		{"svc", "left", "left"},
		{"10-244-1-9.shop.pod", "left", "left"},
		{"ns.dns", "left", "left"},
		{"dns-version", "left", "left"},
		{long + "." + long + ".svc", "left", "left"},
		{"cluster.local.", "not_ours", "not_ours"},
		{"local.", "not_ours", "not_ours"},
		{".", "not_ours", "not_ours"},
		{"example.com.", "not_ours", "not_ours"},
		{"web.shop.svc.cluster.local.example.com.", "not_ours", "not_ours"},
		{"xcluster.local.", "not_ours", "not_ours"},
		{"a.b.c.d.e.f.g.h.i.j.k.l.m.n", "nxdomain", "nxdomain"},
		{"a.b.c.d.e.f.g.h.i.j.k.l.m.n.o", "not_plain", "not_plain"}, // more labels than the program walks
	} {
		name := row.name
		if !strings.HasSuffix(name, ".") {
			name += ".cluster.local."
		}
		for kind, want := range map[dnsmessage.Type]string{dnsmessage.TypeA: row.a, dnsmessage.TypeAAAA: row.aaaa} {
			for _, edns := range []bool{false, true} {
				if got := p.ask(asking(t, name, kind, edns)); got != want {
					t.Errorf("%s %v, EDNS %v: %s, not %s", name, kind, edns, got, want)
				}
			}
		}
	}
}

// ask gives the program a query over both transports, compares what it does with the
// mirror, and says what became of it: addresses in order, or the outcome. Where the search
// list was collapsed, what it came to is before it.
func (p *loaded) ask(query []byte) string {
	p.t.Helper()
	want := p.mirror.decide(query)
	for _, ends := range transports {
		p.askOver(ends, query, want)
	}
	if want.outcome > datapathOutcomeOUTCOME_COLLAPSED {
		return p.word(want.outcome)
	}
	var text []string
	if want.target != "" {
		text = append(text, want.target)
	}
	if len(want.addresses) == 0 {
		return strings.Join(append(text, p.word(want.found.outcome)), " ")
	}
	for _, addr := range want.addresses {
		text = append(text, addr.String())
	}
	return strings.Join(text, " ")
}

// transports are a client and the DNS Service, of both families.
var transports = [][2]netip.AddrPort{{client4, dns4}, {client6, dns6}}

// askOver gives the program a query over one transport. It returns the answer; nil for none.
func (p *loaded) askOver(ends [2]netip.AddrPort, query []byte, want said) []byte {
	p.t.Helper()
	frame := datagramOf(ends[0], ends[1], query)
	before, begun := p.count(want.outcome), time.Now()
	verdict, after := p.run(frame)
	if p.count(want.outcome) != before+1 {
		p.t.Fatalf("%x: the mirror says %s, the counters say %v", query, p.word(want.outcome), p.counts())
	}
	if want.outcome > datapathOutcomeOUTCOME_COLLAPSED {
		if verdict != passed || !bytes.Equal(frame, after) {
			p.t.Fatalf("%x: %s, but the verdict is %d, and the packet after it %x", query, p.word(want.outcome), int32(verdict), after)
		}
		return nil
	}
	if verdict != redirected {
		p.t.Fatalf("%x: %s, but the verdict is %d", query, p.word(want.outcome), int32(verdict))
	}
	answer := opened(p.t, after, ends[1], ends[0])
	p.check(query, want, answer, begun)
	return answer
}

// check reads an answer with somebody else's parser.
func (p *loaded) check(query []byte, want said, answer []byte, begun time.Time) {
	p.t.Helper()
	if len(answer) > 512 || len(answer) != want.length() {
		p.t.Fatalf("the answer has %d bytes, not %d", len(answer), want.length())
	}
	if end := 12 + len(want.wire) + 4; !bytes.Equal(answer[12:end], query[12:end]) {
		p.t.Fatalf("the question came back as %x, not %x", answer[12:end], query[12:end])
	}
	if want.escaped {
		return // the parser cannot say such names
	}
	var m dnsmessage.Message
	if err := m.Unpack(answer); err != nil {
		p.t.Fatalf("%x is no message: %v", answer, err)
	}
	header := dnsmessage.Header{ID: want.id, Response: true, Authoritative: want.ours, RecursionAvailable: !want.ours, RecursionDesired: want.rd}
	if want.found.outcome == datapathOutcomeOUTCOME_NXDOMAIN || want.known.State == Absent {
		header.RCode = dnsmessage.RCodeNameError
	}
	if m.Header != header || len(m.Questions) != 1 {
		p.t.Fatalf("header %v, not %v", m.Header, header)
	}
	if m.Questions[0].Type != want.kind {
		p.t.Fatalf("question %v", m.Questions[0])
	}
	p.checkRecords(m, want, begun)
	if opt := len(m.Additionals) == 1 && m.Additionals[0].Header.Type == dnsmessage.TypeOPT && m.Additionals[0].Header.Class == 1232 &&
		m.Additionals[0].Header.TTL == 0 && len(m.Additionals[0].Body.(*dnsmessage.OPTResource).Options) == 0; opt != want.edns {
		p.t.Fatalf("additionals %v, EDNS %v", m.Additionals, want.edns)
	}
}

// checkRecords follows the aliases to the addresses, or to the SOA record.
func (p *loaded) checkRecords(m dnsmessage.Message, want said, begun time.Time) {
	p.t.Helper()
	owner, rest := m.Questions[0].Name.String(), m.Answers
	alias := func(target string, least, most uint32) {
		p.t.Helper()
		if len(rest) == 0 || rest[0].Header.Type != dnsmessage.TypeCNAME || rest[0].Header.Name.String() != owner || !strings.EqualFold(rest[0].Body.(*dnsmessage.CNAMEResource).CNAME.String(), target) ||
			rest[0].Header.TTL < least || rest[0].Header.TTL > most {
			p.t.Fatalf("%s -> %s for %d to %d s is missing in %v", owner, target, least, most, rest)
		}
		owner, rest = rest[0].Body.(*dnsmessage.CNAMEResource).CNAME.String(), rest[1:]
	}
	if want.target != "" {
		least, most := uint32(5), uint32(5)
		if !want.least.IsZero() {
			low, high := leftOf(want.least, begun)
			least, most = min(low, 5), min(high, 5)
		}
		alias(want.target, least, most)
	}
	for _, one := range want.known.Chain {
		least, most := uint32(30), uint32(30)
		if !want.known.Stale {
			least, most = leftOf(want.learned.Add(one.TTL), begun)
		}
		alias(strings.TrimSuffix(one.Target, ".")+".", least, most)
	}
	least, most := uint32(5), uint32(5)
	if want.known.State != Unknown {
		least, most = leftOf(want.known.Until, begun)
	}
	if want.known.Stale {
		least, most = 30, 30
	}
	var got []netip.Addr
	for _, record := range rest {
		if h := record.Header; h.Name.String() != owner || h.Type != want.kind || h.TTL < least || h.TTL > most || h.Class != dnsmessage.ClassINET {
			p.t.Fatalf("record %v, not of %s for %d to %d s", h, owner, least, most)
		}
		switch body := record.Body.(type) {
		case *dnsmessage.AResource:
			got = append(got, netip.AddrFrom4(body.A))
		case *dnsmessage.AAAAResource:
			got = append(got, netip.AddrFrom16(body.AAAA))
		}
	}
	sorted := slices.SortedFunc(slices.Values(want.addresses), netip.Addr.Compare)
	if slices.SortFunc(got, netip.Addr.Compare); !slices.Equal(got, sorted) {
		p.t.Fatalf("addresses %v, not %v", got, sorted)
	}
	p.checkSOA(m, want, least, most)
}

// leftOf is what may be left of a time that ends then, in seconds, for an answer that was
// made between begun and now.
func leftOf(then, begun time.Time) (least, most uint32) {
	seconds := func(d time.Duration) uint32 { return uint32(max(0, d/time.Second)) }
	return seconds(time.Until(then) - time.Second), seconds(then.Sub(begun) + time.Second)
}

// checkSOA compares the record of a negative answer.
func (p *loaded) checkSOA(m dnsmessage.Message, want said, least, most uint32) {
	p.t.Helper()
	n := 1
	if len(want.addresses) > 0 || want.known.State != Unknown && want.known.SOA == nil {
		n = 0
	}
	if len(m.Authorities) != n {
		p.t.Fatalf("authorities %v", m.Authorities)
	}
	if n == 0 {
		return
	}
	wanted := dnsmessage.SOAResource{NS: dnsmessage.MustNewName("ns.dns.cluster.local."), MBox: dnsmessage.MustNewName("hostmaster.cluster.local."),
		Serial: p.serial, Refresh: 7200, Retry: 1800, Expire: 86400, MinTTL: 5}
	zone := "cluster.local."
	if want.known.State != Unknown {
		zone, wanted = parsedSOA(p.t, want.known.SOA)
	}
	record := m.Authorities[0]
	soa, ok := record.Body.(*dnsmessage.SOAResource)
	if !ok || !strings.EqualFold(record.Header.Name.String(), zone) || record.Header.TTL < least || record.Header.TTL > most ||
		!strings.EqualFold(soa.NS.String(), wanted.NS.String()) || !strings.EqualFold(soa.MBox.String(), wanted.MBox.String()) {
		p.t.Fatalf("authority %v, not %s %v for %d to %d s", record, zone, wanted, least, most)
	}
	if soa.Serial != wanted.Serial || soa.Refresh != wanted.Refresh || soa.Retry != wanted.Retry || soa.Expire != wanted.Expire || soa.MinTTL != wanted.MinTTL {
		p.t.Fatalf("authority %v, not %v", soa, wanted)
	}
}

// word is the name of an outcome in metrics.
func (p *loaded) word(o datapathOutcome) string { return p.words[o] }

func (p *loaded) count(o datapathOutcome) (sum uint64) {
	p.t.Helper()
	var perCPU []uint64
	must(p.t, p.layer.host.(*datapath).Maps[datapathMapOutcomes].Lookup(uint32(o), &perCPU))
	for _, n := range perCPU {
		sum += n
	}
	return sum
}

func (p *loaded) counts() (text string) {
	for o := range datapathOutcomeOUTCOME_COUNT {
		text += fmt.Sprintf(" %s %d", p.word(o), p.count(o))
	}
	return text
}

// What is not a plain query for the DNS Service is left as it is.
func TestPassedUp(t *testing.T) {
	p := load(t, town())
	good := asking(t, "web.shop.svc.cluster.local.", dnsmessage.TypeA, false)
	with := func(at int, value byte) []byte {
		changed := bytes.Clone(good)
		changed[at] = value
		return changed
	}
	edns := asking(t, "web.shop.svc.cluster.local.", dnsmessage.TypeA, true)
	opt := len(edns) - 11
	withOPT := func(at int, value byte) []byte {
		changed := bytes.Clone(edns)
		changed[opt+at] = value
		return changed
	}
	for what, query := range map[string][]byte{
		"an answer": with(2, 0x81), "another opcode": with(2, 0x11), "truncated": with(2, 0x03), "AA": with(2, 0x05),
		"CD": with(3, 0x10), "RA": with(3, 0x80), "a code": with(3, 0x02), "Z": with(3, 0x40),
		"no question": with(5, 0), "two questions": with(5, 2), "an answer record": with(7, 1), "an authority": with(9, 1),
		"an additional that is not there": with(11, 1), "two additionals": with(11, 2),
		"another class": with(len(good)-1, 3), "TXT": with(len(good)-3, 16), "ANY": with(len(good)-3, 255), "SVCB": with(len(good)-3, 64), "HTTPS": with(len(good)-3, 65),
		"cut": good[:len(good)-1], "cut in its name": good[:20], "only a header": good[:12], "nothing": nil,
		"bytes behind": append(bytes.Clone(good), 0), "a pointer for a name": append(bytes.Clone(good[:12]), 0xc0, 12, 0, 1, 0, 1),
		"an extended label": with(12, 0x41),
		"DO":                withOPT(7, 0x80), "a flag of EDNS": withOPT(8, 1), "version 1": withOPT(6, 1), "an extended code": withOPT(5, 1),
		"options":             append(withOPT(10, 4), 0, 10, 0, 0),
		"an OPT with a name":  withOPT(0, 1),
		"not OPT but TSIG":    withOPT(2, 250),
		"bytes behind OPT":    append(bytes.Clone(edns), 0),
		"a very long message": append(bytes.Clone(good), make([]byte, 600)...),
	} {
		if got := p.ask(query); got != "not_plain" {
			t.Errorf("%s: %s", what, got)
		}
	}
	if got := p.ask(with(3, 0x20)); got != "10.96.0.20" {
		t.Errorf("AD, by which a client says that it knows the bit (RFC 6840, 5.7): %s", got)
	}
	p.leavesFrames(good)
}

// leavesFrames tries packets that have nothing to do with the DNS Service, or of which
// it is not clear.
func (p *loaded) leavesFrames(good []byte) {
	p.t.Helper()
	frame := datagramOf(client4, dns4, good)
	with := func(frame []byte, at int, value byte) []byte {
		changed := bytes.Clone(frame)
		changed[at] = value
		return changed
	}
	six := datagramOf(client6, dns6, good)
	for what, frame := range map[string][]byte{
		"another server":  datagramOf(client4, netip.MustParseAddrPort("10.96.0.11:53"), good),
		"no address":      datagramOf(client6, netip.MustParseAddrPort("[::]:53"), good),
		"another port":    datagramOf(client4, netip.MustParseAddrPort("10.96.0.10:5353"), good),
		"TCP":             with(frame, 14+9, 6),
		"a fragment":      with(frame, 14+6, 0x20),
		"a last fragment": with(frame, 14+7, 1),
		"options":         with(frame, 14, 0x46),
		"an extension":    with(six, 14+6, 60),
		"not version 6":   with(six, 14, 0x40),
		"ARP":             with(frame, 13, 6),
		"a short length":  with(frame, 14+3, 30),
		"a long UDP":      with(frame, 14+20+5, 200),
		"a short UDP":     with(frame, 14+20+5, 4),
		"bytes behind":    append(bytes.Clone(frame), 0, 0),
		"half a header":   frame[:14+20+4],
	} {
		verdict, after := p.run(frame)
		if verdict != passed || !bytes.Equal(after, frame) {
			p.t.Errorf("%s: verdict %d", what, int32(verdict))
		}
	}
}

// A UDP checksum of 0 means that there is none (RFC 768).
func TestWithoutChecksum(t *testing.T) {
	p := load(t, town())
	frame := datagramOf(client4, dns4, asking(t, "web.shop.svc.cluster.local.", dnsmessage.TypeA, false))
	frame[14+20+6], frame[14+20+7] = 0, 0
	verdict, after := p.run(frame)
	if verdict != redirected || after[14+20+6] != 0 || after[14+20+7] != 0 {
		t.Errorf("verdict %d, checksum %x", verdict, after[14+20+6:14+20+8])
	}
}

// A set is given beginning with each of its addresses in turn, at random.
func TestTurns(t *testing.T) {
	p := load(t, town())
	frame := datagramOf(client4, dns4, asking(t, "db.shop.svc.cluster.local.", dnsmessage.TypeA, false))
	first := map[string]int{}
	for range 600 {
		_, after := p.run(frame)
		var m dnsmessage.Message
		must(t, m.Unpack(after[14+20+8:]))
		first[fmt.Sprint(m.Answers[0].Body.(*dnsmessage.AResource).A)]++
	}
	for addr, n := range first {
		if n < 120 { // 200 are expected; this happens once in 10^12
			t.Errorf("%s is first %d times in 600", addr, n)
		}
	}
	if len(first) != 3 {
		t.Errorf("first were %v, not three addresses", first)
	}
}

// Nothing is said of names before all are known, and nothing at all when the agent has
// been silent.
func TestWhenNotToSpeak(t *testing.T) {
	web, nosuch := asking(t, "web.shop.svc.cluster.local.", dnsmessage.TypeA, false), asking(t, "nosuch.shop.svc.cluster.local.", dnsmessage.TypeA, false)
	four := asking(t, "four.shop.svc.cluster.local.", dnsmessage.TypeAAAA, false)
	p := load(t, town(), func(spec *ebpf.CollectionSpec) {
		must(t, spec.Variables[datapathVarSilence].Set(uint64(time.Minute))) // the machine may have been up for less than load's hour
	})
	for what, f := range map[string]func(*model.Snapshot){
		"the first sync is not over":      func(s *model.Snapshot) { s.Complete = false },
		"something could not be read":     func(s *model.Snapshot) { s.Unread = 1 },
		"headless Services are not known": func(s *model.Snapshot) { s.Named = false },
	} {
		snapshot := town()
		f(snapshot)
		p.apply(snapshot)
		for query, want := range map[*[]byte]string{&web: "10.96.0.20", &nosuch: "unsure", &four: "unsure"} {
			if got := p.ask(*query); got != want {
				t.Errorf("%s: %s, not %s", what, got, want)
			}
		}
	}
	gone := town()
	gone.Unread = 1
	gone.Services = slices.DeleteFunc(gone.Services, func(s *model.Service) bool { return s.Name.Name == "web" })
	if p.apply(gone); p.ask(web) != "left" {
		t.Errorf("the Service is gone, or the one that could not be read: %s", p.ask(web))
	}
	p.apply(town())
	if got := p.ask(web); got != "10.96.0.20" {
		t.Errorf("the Service is there again: %s", got)
	}
	if got := p.ask(nosuch); got != "nxdomain" {
		t.Errorf("all is known: %s", got)
	}
	must(t, p.layer.host.(*datapath).Maps[datapathMapAuthorities].Put(uint32(0), datapathAuthority{}))
	before := p.count(datapathOutcomeOUTCOME_STALE)
	if verdict, _ := p.run(datagramOf(client4, dns4, web)); verdict != passed || p.count(datapathOutcomeOUTCOME_STALE) != before+1 {
		t.Errorf("the agent is silent: verdict %d", int32(verdict))
	}
}

// An answer is for who gets it, though the query was for another host: a bridge. Kernels
// that do not scrub it would drop it in the pod. The program says the packet's type here
// instead of giving it back.
func TestAnswersAreForThePod(t *testing.T) {
	const ifindex, packetType = 40, 4 // offsets in struct __sk_buff (linux/bpf.h)
	p := load(t, town(), func(spec *ebpf.CollectionSpec) {
		all := spec.Programs[datapathProgDnsFromPod].Instructions
		call := slices.IndexFunc(all, func(in asm.Instruction) bool {
			return in.IsBuiltinCall() && in.Constant == int64(asm.FnRedirectPeer)
		})
		read := call - 1
		for read > 0 && (all[read].Dst != asm.R1 || !all[read].OpCode.Class().IsLoad() || all[read].Offset != ifindex) {
			read--
		}
		if call < 0 || read <= call-5 {
			t.Fatal("the program does not give the answer to the peer of its own device")
		}
		all[read].Offset = packetType
		all[call] = asm.Mov.Reg(asm.R0, asm.R1).WithMetadata(all[call].Metadata)
	})
	query := asking(t, "web.shop.svc.cluster.local.", dnsmessage.TypeA, false)
	if verdict, _ := p.run(datagramOf(client4, dns4, query)); verdict != unix.PACKET_HOST {
		t.Errorf("the answer is of packet type %d, not %d", int32(verdict), unix.PACKET_HOST)
	}
}

// An answer is of the name that was asked for, though the agent writes names meanwhile.
func TestNamesAreWrittenMeanwhile(t *testing.T) {
	p := load(t, town())
	var keys []datapathName
	var entries []datapathAddresses
	for _, name := range []string{"web.shop.svc", "four.shop.svc"} {
		keys, entries = append(keys, keyOf(name)), append(entries, entryOf(p.mirror.rows[name]))
	}
	p.writtenMeanwhile("web.shop.svc.cluster.local.", netip.MustParseAddr("10.96.0.20"), func() {
		for i := range entries {
			entries[i].Number = p.layer.number.Add(1)
		}
		must(t, p.layer.tables.begin(datapathTableTABLE_NAMES))
		if errs := p.layer.tables.names.Put(keys, entries); errs != nil {
			t.Error(errs)
		}
		must(t, p.layer.assert(&Picture{served: true}, true))
	})
}

// While names are written, also by an agent that was killed then, those that are found are
// answered, and of others nothing is said.
func TestWhileNamesAreWritten(t *testing.T) {
	p := load(t, town())
	becomes := func(name string, kind dnsmessage.Type, want datapathOutcome) {
		t.Helper()
		before := p.counts()
		n := p.count(want)
		if p.run(datagramOf(client4, dns4, asking(t, name, kind, false))); p.count(want) != n+1 {
			t.Errorf("%s is not %s: the counters were\n%s\nand are\n%s", name, p.word(want), before, p.counts())
		}
	}
	must(t, p.layer.tables.begin(datapathTableTABLE_NAMES))
	must(t, p.layer.tables.begin(datapathTableTABLE_NAMES)) // a successor
	becomes("web.shop.svc.cluster.local.", dnsmessage.TypeA, datapathOutcomeOUTCOME_ANSWERED)
	becomes("db-0.db.shop.svc.cluster.local.", dnsmessage.TypeA, datapathOutcomeOUTCOME_ANSWERED)
	becomes("four.shop.svc.cluster.local.", dnsmessage.TypeAAAA, datapathOutcomeOUTCOME_NODATA)
	becomes("nosuch.shop.svc.cluster.local.", dnsmessage.TypeA, datapathOutcomeOUTCOME_UNSURE)
	becomes("api.example.com.cluster.local.", dnsmessage.TypeA, datapathOutcomeOUTCOME_UNSURE)
	must(t, p.layer.tables.end(datapathTableTABLE_NAMES))
	becomes("nosuch.shop.svc.cluster.local.", dnsmessage.TypeA, datapathOutcomeOUTCOME_NXDOMAIN)
	becomes("web.shop.svc.cluster.local.", dnsmessage.TypeA, datapathOutcomeOUTCOME_ANSWERED)
}

// writtenMeanwhile asks for a second for a name that is being written all the time.
func (p *loaded) writtenMeanwhile(name string, want netip.Addr, write func()) {
	p.t.Helper()
	stop, done := make(chan struct{}), make(chan int)
	go func() {
		for written := 0; ; written++ {
			select {
			case <-stop:
				done <- written
				return
			default:
				write()
			}
		}
	}()
	query := datagramOf(client4, dns4, asking(p.t, name, dnsmessage.TypeA, false))
	answered, wrong := 0, 0
	for begun := time.Now(); time.Since(begun) < time.Second; {
		verdict, after := p.run(query)
		if verdict == passed {
			if !bytes.Equal(after, query) {
				p.t.Fatalf("passed up, but not as it came: %x", after)
			}
			continue
		}
		answered++
		if !bytes.HasSuffix(after, want.AsSlice()) {
			wrong++
			p.t.Errorf("%s is not there: %x", want, after[14+20+8:])
		}
	}
	close(stop)
	p.t.Logf("%d answers, %d are wrong; written %d times; %d queries were passed up for that", answered, wrong, <-done, p.count(datapathOutcomeOUTCOME_CHANGED))
	if answered == 0 {
		p.t.Error("the test is blind")
	}
}

// Random names, types, headers and cuts, names outside and candidates of a search list: the
// program and the mirror agree.
func TestDifferential(t *testing.T) {
	p := load(t, town())
	random := rand.New(rand.NewPCG(7, 13))
	n := 60_000
	for i := range n {
		if i%10_000 == 0 { // what is known of them runs out, however slow the machine is
			p.learn(neighbours()...)
		}
		if i == n/6 {
			p.search(townSearch...)
		}
		p.ask(arbitraryQuery(random, p.mirror))
	}
	t.Logf("%d queries, over IPv4 and IPv6:%s", n, p.counts())
	for o := range datapathOutcomeOUTCOME_UNSURE {
		if p.count(o) < 100 {
			t.Errorf("only %d queries were %s: the test is blind", p.count(o), p.word(o))
		}
	}
}

// arbitraryQuery is about names that are there, beside them, or anything, with
// something wrong now and then.
func arbitraryQuery(random *rand.Rand, m *mirror) []byte {
	pieces := []string{"web", "db", "db-0", "shop", "svc", "pod", "dns", "cluster", "local", "example", "com", "x", "nosuch", "kube-system", "_dns", "_udp", "four", "10-244-2-7", "nine", "a.b", strings.Repeat("y", 40)}
	var labels []string
	switch random.IntN(6) {
	case 0:
		for name := range m.rows {
			labels = strings.Split(name, ".")
			break
		}
	case 1, 2:
		for name := range m.outside {
			labels = strings.Split(name, ".")
			break
		}
	default:
		for range random.IntN(7) {
			labels = append(labels, pieces[random.IntN(len(pieces))])
		}
	}
	switch random.IntN(6) {
	case 0, 1:
		labels = append(labels, strings.Split(townSearch[random.IntN(len(townSearch))], ".")...)
	case 2:
		labels = append(labels, "shop", "svc", "cluster", "local")
	case 3:
		labels = append(labels, "svc", "cluster", "local")
	}
	return queryOf(random, labels)
}

// queryOf asks for a name, with something wrong now and then.
func queryOf(random *rand.Rand, labels []string) []byte {
	message := []byte{byte(random.Uint32()), byte(random.Uint32()), byte(random.IntN(2)), 0x20 * byte(random.IntN(2)), 0, 1, 0, 0, 0, 0, 0, byte(random.IntN(2))}
	for _, label := range labels {
		message = append(append(message, byte(len(label))), label...)
	}
	message = append(message, 0, 0, []byte{1, 28, 1, 28, 16, 33}[random.IntN(6)], 0, 1)
	if message[11] == 1 {
		message = append(message, 0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0)
	}
	for i := range message[12:] { // 0x20: any letter may be large
		if c := message[12+i]; 'a' <= c && c <= 'z' && random.IntN(2) == 0 {
			message[12+i] -= 'a' - 'A'
		}
	}
	switch random.IntN(10) {
	case 0:
		message[random.IntN(len(message))] = byte(random.Uint32())
	case 1:
		message = message[:random.IntN(len(message)+1)]
	}
	return message
}

// FuzzQuery gives the program any bytes for a message. The mirror has to agree.
func FuzzQuery(f *testing.F) {
	p := load(f, town())
	p.learn(neighbours()...)
	p.search(townSearch...)
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		f.Add(arbitraryQuery(random, p.mirror))
	}
	f.Fuzz(func(t *testing.T, query []byte) {
		if len(query) > 1400 {
			return
		}
		p.t = t
		p.ask(query)
	})
}

// The instructions that the verifier looks at are those of a small program.
func TestProgramSize(t *testing.T) {
	p := load(t, town())
	info, err := p.program.Info()
	must(t, err)
	if n, ok := info.VerifiedInstructions(); ok && n > 200_000 {
		t.Errorf("the verifier looked at %d instructions", n)
	} else {
		t.Logf("the verifier looked at %d instructions", n)
	}
}

// What a query costs the program, by the kernel's own clock, which adds some 20 ns; the
// system call around it is not in it.
func BenchmarkQuery(b *testing.B) {
	p := load(b, town())
	p.learn(neighbours()...)
	p.search(townSearch...)
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	must(b, err)
	defer stats.Close()
	for _, row := range []struct{ what, name string }{
		{"answered", "web.shop.svc.cluster.local."}, {"eight addresses", "eight.shop.svc.cluster.local."},
		{"nxdomain", "nosuch.example.com.shop.svc.cluster.local."}, {"passed up", "nothing.example.com."},
		{"outside", "api.example.com."}, {"an alias outside", "www.example.com."},
		{"collapsed", "api.example.com.shop.svc.cluster.local."},
	} {
		b.Run(row.what, func(b *testing.B) {
			frame := datagramOf(client4, dns4, asking(b, row.name, dnsmessage.TypeA, true))
			before, err := p.program.Stats()
			must(b, err)
			for b.Loop() {
				p.run(frame)
			}
			after, err := p.program.Stats()
			must(b, err)
			b.ReportMetric(float64(after.Runtime-before.Runtime)/float64(after.RunCount-before.RunCount), "program-ns/query")
		})
	}
}
