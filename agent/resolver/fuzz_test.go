package resolver

import (
	"context"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/millrace/millrace/model"
)

// FuzzResolve looks for messages of pods that stop the resolver, or are answered with what
// is no answer to them, or larger than what they take.
func FuzzResolve(f *testing.F) {
	for _, m := range []*dns.Msg{
		question("web.shop.svc.cluster.local.", dns.TypeA), question("_http._tcp.web.shop.svc.cluster.local.", dns.TypeSRV),
		question("db.shop.svc.cluster.local.", dns.TypeAAAA).SetEdns0(4096, false), question("many.shop.svc.cluster.local.", dns.TypeA),
		question("1.0.96.10.in-addr.arpa.", dns.TypePTR), question("dns-version.cluster.local.", dns.TypeTXT), question("www.example.com.", dns.TypeA),
		question(`a\.b.web.shop.svc.cluster.local.`, dns.TypeA),
	} {
		packed, _ := m.Pack()
		f.Add(packed)
	}
	r := New(Settings{Zone: "cluster.local"})
	f.Cleanup(r.Close)
	s := shop()
	s.DNS.Forwards = []model.Forward{{Zone: ".", Left: "nobody is asked here"}}
	r.Take(s)
	f.Fuzz(func(t *testing.T, message []byte) {
		r.limits.mu.Lock()
		clear(r.limits.pods)
		r.limits.mu.Unlock()
		reply, ok := r.Resolve(context.Background(), "pod", message)
		if !ok {
			if len(reply) > 0 {
				t.Fatal("handed back, and answered")
			}
			return
		}
		var q, m dns.Msg
		if err := q.Unpack(message); err != nil {
			t.Fatalf("what cannot be read is answered: %v", err)
		}
		if err := m.Unpack(reply); err != nil {
			t.Fatalf("the answer cannot be read: %v", err)
		}
		most := leastUDP
		if opt := q.IsEdns0(); opt != nil {
			most = min(max(most, int(opt.UDPSize())), mostUDP)
		}
		if m.Id != q.Id || !m.Response || len(q.Question) != 1 || m.Question[0] != q.Question[0] || len(reply) > most {
			t.Fatalf("asked %v, answered %v in %d bytes", &q, &m, len(reply))
		}
	})
}

// FuzzAccept looks for messages of servers of which more is kept than answers the question.
func FuzzAccept(f *testing.F) {
	for _, records := range [][]string{
		{"www.example.com. 60 IN A 192.0.2.1"},
		{"www.example.com. 60 IN CNAME a.example.com.", "a.example.com. 60 IN A 192.0.2.1", "b.example.com. 60 IN A 192.0.2.1"},
		{"www.example.com. 60 IN CNAME www.example.com."},
	} {
		m := new(dns.Msg).SetReply(question("www.example.com.", dns.TypeA))
		for _, text := range records {
			m.Answer = append(m.Answer, rr(text))
		}
		packed, _ := m.Pack()
		f.Add(packed)
	}
	m := new(dns.Msg).SetRcode(question("www.example.com.", dns.TypeA), dns.RcodeNameError)
	m.Ns = append(m.Ns, rr(soa))
	packed, _ := m.Pack()
	f.Add(packed)
	f.Fuzz(func(t *testing.T, message []byte) {
		var m dns.Msg
		if m.Unpack(message) != nil {
			return
		}
		a, err := accept("www.example.com.", dns.TypeA, &m)
		if err != nil {
			return
		}
		at := "www.example.com."
		for i, r := range a.records {
			alias, isAlias := r.(*dns.CNAME)
			if strings.ToLower(r.Header().Name) != at || !isAlias && r.Header().Rrtype != dns.TypeA {
				t.Fatalf("record %d of %v does not follow", i, a.records)
			}
			if isAlias {
				at = strings.ToLower(alias.Target)
			}
		}
		if a.soa != nil && !dns.IsSubDomain(strings.ToLower(a.soa.Hdr.Name), at) {
			t.Fatalf("%s is not in the zone of %v", at, a.soa)
		}
		if a.ttl < 0 || a.ttl > mostTTL || a.ttl > 0 && len(a.records) == 0 && a.soa == nil {
			t.Fatalf("kept for %v: %+v", a.ttl, a)
		}
		if _, err := a.pack(key{"www.example.com.", dns.TypeA}); err != nil {
			return // cannot be packed, and is not kept
		}
	})
}
