package resolver

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/millrace/millrace/model"
)

func addrs(texts ...string) (all []netip.Addr) {
	for _, text := range texts {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

// shop is a cluster with a Service of each kind.
func shop() *model.Snapshot {
	db := &model.Service{
		Name: model.Name{Namespace: "shop", Name: "db"}, Headless: true, Selector: map[string]string{"app": "db"},
		Ports: []model.ServicePort{{Name: "sql", Protocol: model.TCP, Port: 5432}},
		Endpoints: []model.Endpoint{
			{Address: addrs("10.244.0.1")[0], Hostname: "db-0", Ready: true},
			{Address: addrs("10.244.0.2")[0], Ready: true},
			{Address: addrs("10.244.0.3")[0], Ready: false},
			{Address: addrs("2001:db8::")[0], Ready: true},
		},
	}
	for _, e := range db.Endpoints {
		db.Ports[0].Backends = append(db.Ports[0].Backends, model.Backend{Address: netip.AddrPortFrom(e.Address, 6432), Ready: e.Ready})
	}
	many := &model.Service{Name: model.Name{Namespace: "shop", Name: "many"}, Headless: true, Selector: map[string]string{"app": "many"}}
	for i := range 100 {
		many.Endpoints = append(many.Endpoints, model.Endpoint{Address: netip.AddrFrom4([4]byte{10, 244, 9, byte(i)}), Ready: true})
	}
	return &model.Snapshot{
		Number: 7, Complete: true, Named: true,
		Services: []*model.Service{
			{Name: model.Name{Namespace: "shop", Name: "broken"}, ClusterIPs: addrs("10.96.0.9"), Ports: []model.ServicePort{{Port: 1, Protocol: model.TCP}}},
			db,
			{Name: model.Name{Namespace: "shop", Name: "elsewhere"}, Type: model.ExternalName, External: "www.example.com"},
			{Name: model.Name{Namespace: "shop", Name: "inside"}, Type: model.ExternalName, External: "web.shop.svc.cluster.local"},
			many,
			{Name: model.Name{Namespace: "shop", Name: "nowhere"}, Type: model.ExternalName, External: "no.example.com"},
			{
				Name: model.Name{Namespace: "shop", Name: "web"}, ClusterIPs: addrs("10.96.0.1", "2001:db8::1"),
				Ports: []model.ServicePort{{Name: "http", Protocol: model.TCP, Port: 80, Backends: []model.Backend{{Address: netip.MustParseAddrPort("10.244.0.50:80"), Ready: true}}},
					{Name: "https", Protocol: model.TCP, Port: 443}},
			},
		},
		Others:   []model.Name{{Namespace: "shop", Name: "foreign"}},
		Problems: []model.Problem{{Object: "Service shop/broken"}},
		DNS:      &model.DNS{TTL: 5 * time.Second, Reverse: true},
	}
}

// all is an answer with what was added, its records sorted.
func all(m *dns.Msg) string {
	if m == nil {
		return "handed back"
	}
	text := []string{}
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, r := range section {
			text = append(text, strings.Join(strings.Fields(r.String()), " "))
		}
	}
	slices.Sort(text)
	return strings.Join(append([]string{dns.RcodeToString[m.Rcode]}, text...), "\n  ")
}

// What CoreDNS' plugin kubernetes answers, by its own tests and the specification.
func TestNamesOfTheCluster(t *testing.T) {
	u := newUpstream(t, zone)
	r := newResolver(t, nil)
	s := shop()
	s.DNS.Forwards = forwardsTo(u).Forwards
	r.Take(s)
	const soa = "\n  cluster.local. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 7 7200 1800 86400 5"
	for _, row := range []struct{ question, want string }{
		{"web.shop A", "NOERROR\n  web.shop.svc.cluster.local. 5 IN A 10.96.0.1"},
		{"_http._tcp.web.shop AAAA", "NOERROR\n  _http._tcp.web.shop.svc.cluster.local. 5 IN AAAA 2001:db8::1"},
		{"_http._udp.web.shop A", "NXDOMAIN" + soa},
		{"no.shop SRV", "NXDOMAIN" + soa},
		{"no.shop SOA", "NOERROR" + soa}, // CoreDNS does not look whether there is such a name
		{"web.shop PTR", "NOERROR" + soa},
		{"web.shop CNAME", "NOERROR" + soa},
		{"web.shop MX", "NOERROR" + soa},
		{"web.shop HTTPS", "NOERROR" + soa},
		{"web.shop TXT", "NOERROR" + soa},
		{"_http._TCP.web.shop SRV", `NOERROR
  _http._TCP.web.shop.svc.cluster.local. 5 IN SRV 0 50 80 web.shop.svc.cluster.local.
  web.shop.svc.cluster.local. 5 IN A 10.96.0.1
  web.shop.svc.cluster.local. 5 IN AAAA 2001:db8::1`},
		{"web.shop SRV", `NOERROR
  web.shop.svc.cluster.local. 5 IN A 10.96.0.1
  web.shop.svc.cluster.local. 5 IN AAAA 2001:db8::1
  web.shop.svc.cluster.local. 5 IN SRV 0 25 443 web.shop.svc.cluster.local.
  web.shop.svc.cluster.local. 5 IN SRV 0 25 80 web.shop.svc.cluster.local.`},
		{"db.shop A", "NOERROR\n  db.shop.svc.cluster.local. 5 IN A 10.244.0.1\n  db.shop.svc.cluster.local. 5 IN A 10.244.0.2"},
		{"db-0.db.shop A", "NOERROR\n  db-0.db.shop.svc.cluster.local. 5 IN A 10.244.0.1"},
		{"2001-db8--0.db.shop AAAA", "NOERROR\n  2001-db8--0.db.shop.svc.cluster.local. 5 IN AAAA 2001:db8::"},
		{"10-244-0-3.db.shop A", "NXDOMAIN" + soa},
		{"_sql._tcp.db.shop SRV", `NOERROR
  10-244-0-2.db.shop.svc.cluster.local. 5 IN A 10.244.0.2
  2001-db8--0.db.shop.svc.cluster.local. 5 IN AAAA 2001:db8::
  _sql._tcp.db.shop.svc.cluster.local. 5 IN SRV 0 33 6432 10-244-0-2.db.shop.svc.cluster.local.
  _sql._tcp.db.shop.svc.cluster.local. 5 IN SRV 0 33 6432 2001-db8--0.db.shop.svc.cluster.local.
  _sql._tcp.db.shop.svc.cluster.local. 5 IN SRV 0 33 6432 db-0.db.shop.svc.cluster.local.
  db-0.db.shop.svc.cluster.local. 5 IN A 10.244.0.1`},
		{"_nosql._tcp.db.shop SRV", "NXDOMAIN" + soa},
		{"elsewhere.shop A", `NOERROR
  elsewhere.shop.svc.cluster.local. 5 IN CNAME www.example.com.
  www.example.com. 300 IN A 192.0.2.1`},
		{"elsewhere.shop CNAME", "NOERROR\n  elsewhere.shop.svc.cluster.local. 5 IN CNAME www.example.com."},
		{"_._.elsewhere.shop CNAME", "NOERROR\n  _._.elsewhere.shop.svc.cluster.local. 5 IN CNAME www.example.com."},
		{"_http._.elsewhere.shop A", "NXDOMAIN" + soa},
		{"elsewhere.shop SRV", "NOERROR" + soa},
		{"a.elsewhere.shop A", "NXDOMAIN" + soa},
		{"nowhere.shop A", "NOERROR\n  nowhere.shop.svc.cluster.local. 5 IN CNAME no.example.com."},
		{"inside.shop A", "handed back"},
		{"foreign.shop SRV", "handed back"},
		{"broken.shop SRV", "handed back"},
		{"10-244-0-50.web.shop A", "handed back"},
		{"shop A", "handed back"},
	} {
		name, kind, _ := strings.Cut(row.question, " ")
		if got := all(asks(t, r, question(name+".svc.cluster.local.", dns.StringToType[kind]))); got != row.want {
			t.Errorf("%s: %s\nnot %s", row.question, got, row.want)
		}
	}
	for name, want := range map[string]string{
		"dns-version.cluster.local. TXT": "NOERROR\n  dns-version.cluster.local. 28800 IN TXT \"1.1.0\"",
		"_HtTp._TcP.WEB.Shop.Svc.CLUSTER.local. SRV": `NOERROR
  _HtTp._TcP.WEB.Shop.Svc.CLUSTER.local. 5 IN SRV 0 50 80 web.shop.svc.CLUSTER.local.
  web.shop.svc.CLUSTER.local. 5 IN A 10.96.0.1
  web.shop.svc.CLUSTER.local. 5 IN AAAA 2001:db8::1`,
		"1.0.96.10.in-addr.arpa. PTR":  "NOERROR\n  1.0.96.10.in-addr.arpa. 5 IN PTR web.shop.svc.cluster.local.",
		"2.0.244.10.in-addr.arpa. PTR": "handed back",
		"9.0.96.10.in-addr.arpa. PTR":  "handed back",
		"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa. PTR": "NOERROR\n  1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa. 5 IN PTR web.shop.svc.cluster.local.",
		"3.0.244.10.in-addr.arpa. PTR":                   "handed back",
		"50.0.244.10.in-addr.arpa. PTR":                  "handed back",
		"1.2.0.192.in-addr.arpa. PTR":                    "handed back",
		"10-244-0-1.shop.pod.cluster.local. A":           "handed back",
		"cluster.local. SOA":                             "handed back",
		"a.b.c.web.shop.svc.cluster.local. SRV":          "handed back",
		"a.b.c.web.shop.svc.cluster.local. A":            "NXDOMAIN" + soa,
		"api.example.com.cluster.local. AAAA":            "NXDOMAIN" + soa,
		"api.example.com.svc.cluster.local. A":           "NXDOMAIN" + soa,
		"web.shop.cluster.local. A":                      "NXDOMAIN" + soa,
		"Api.cluster.local. A":                           "NXDOMAIN" + soa,
		"api.cluster.local. MX":                          "handed back",
		"dns-version.cluster.local. A":                   "handed back",
		"ns.dns.cluster.local. A":                        "handed back",
		"svc.cluster.local. A":                           "handed back",
		"cluster.local. A":                               "handed back",
		"www.example.com. A":                             "NOERROR\n  www.example.com. 300 IN A 192.0.2.1",
		"web.shop.svc.cluster.local.evil.example.com. A": "NXDOMAIN\n  example.com. 60 IN SOA ns.example.com. host.example.com. 1 7200 1800 86400 60",
	} {
		name, kind, _ := strings.Cut(name, " ")
		got := all(asks(t, r, question(name, dns.StringToType[kind])))
		if got != want {
			t.Errorf("%s: %s\nnot %s", name, got, want)
		}
	}
	if got := asks(t, r, question("many.shop.svc.cluster.local.", dns.TypeA)); got == nil || !got.Truncated || got.Len() > 512 || !got.Authoritative {
		t.Errorf("a large set: %s", said(got))
	}
	m := question("web.shop.svc.cluster.local.", dns.TypeSRV)
	m.RecursionDesired = false
	if got := asks(t, r, m); got == nil || got.RecursionDesired || got.RecursionAvailable || !got.Authoritative {
		t.Errorf("not to be asked of others: %v", got)
	}
	m = question("many.shop.svc.cluster.local.", dns.TypeA)
	if got := asks(t, r, m.SetEdns0(mostUDP, false)); got == nil || len(got.Answer) < 70 {
		t.Errorf("a large set for a client that takes more: %s", said(got))
	}
}

// What is not known whole is for others, and so is all that they answer otherwise.
func TestClusterIsNotGuessed(t *testing.T) {
	for what, change := range map[string]func(*model.Snapshot){
		"incomplete": func(s *model.Snapshot) { s.Complete = false },
		"unread":     func(s *model.Snapshot) { s.Unread = 1 },
		"unnamed":    func(s *model.Snapshot) { s.Named = false },
		"left":       func(s *model.Snapshot) { s.DNS.Left = "Corefile:3: rewrite" },
		"no DNS":     func(s *model.Snapshot) { s.DNS = nil },
	} {
		s := shop()
		change(s)
		r := newResolver(t, nil)
		r.Take(s)
		for _, name := range []string{"web.shop.svc.cluster.local.", "no.shop.svc.cluster.local.", "1.0.96.10.in-addr.arpa.", "dns-version.cluster.local."} {
			for _, kind := range []uint16{dns.TypeA, dns.TypeSRV, dns.TypePTR, dns.TypeTXT} {
				if got := asks(t, r, question(name, kind)); got != nil {
					t.Errorf("%s: %s: %s", what, name, said(got))
				}
			}
		}
	}
}

// A source that has not been heard for 30 s cannot say that a name does not exist, after
// 5 minutes nothing; what is known goes on where no DNS server of the cluster is ready.
func TestClusterGrowsOld(t *testing.T) {
	server := model.Name{Namespace: "kube-system", Name: "kube-dns"}
	names := map[string]struct {
		kind uint16
		last time.Duration // how long after the source was heard it is said
	}{
		"web.shop.svc.cluster.local.":                  {dns.TypeSRV, sayFor},
		"1.0.96.10.in-addr.arpa.":                      {dns.TypePTR, sayFor},
		"db-0.db.shop.svc.cluster.local.":              {dns.TypeAAAA, sayFor}, // as its addresses are
		"elsewhere.shop.svc.cluster.local.":            {dns.TypeCNAME, sayFor},
		"no.shop.svc.cluster.local.":                   {dns.TypeA, denyFor},
		"no2.shop.svc.cluster.local.":                  {dns.TypeSOA, denyFor},
		"10-244-0-3.db.shop.svc.cluster.local.":        {dns.TypeA, denyFor},
		"_nosql._tcp.db.shop.svc.cluster.local.":       {dns.TypeSRV, denyFor},
		"_http._tcp.elsewhere.shop.svc.cluster.local.": {dns.TypeSRV, denyFor},
	}
	for _, served := range []bool{true, false} {
		s := shop()
		s.Services = slices.Insert(s.Services, 0, &model.Service{
			Name: server, ClusterIPs: addrs("10.96.0.10"),
			Ports: []model.ServicePort{{Protocol: model.UDP, Port: 53, Backends: []model.Backend{{Address: netip.MustParseAddrPort("10.244.0.60:53"), Ready: served}}}},
		})
		heard := time.Now()
		r := New(Settings{Zone: "cluster.local", Service: server, Heard: func() time.Time { return heard }, DenyFor: denyFor, SayFor: sayFor})
		t.Cleanup(r.Close)
		r.Take(s)
		for _, ago := range []time.Duration{0, denyFor, denyFor + time.Second, sayFor, sayFor + time.Second, 24 * time.Hour} {
			for name, of := range names {
				q := query{written: name, name: name, kind: of.kind, recursive: true, size: mostUDP}
				m, _ := r.answer(context.Background(), "pod", &q, heard.Add(ago))
				if want := ago <= of.last || of.last == sayFor && !served; (m != nil) != want {
					t.Errorf("%s %s, heard %v ago, a DNS server is ready %v: %s", name, dns.TypeToString[of.kind], ago, served, said(m))
				}
			}
		}
	}
}

const (
	denyFor = 30 * time.Second
	sayFor  = 5 * time.Minute
)

// Where the servers do not answer for addresses, others do.
func TestAddressesAreLeft(t *testing.T) {
	s := shop()
	s.DNS.Reverse = false
	r := newResolver(t, nil)
	r.Take(s)
	if got := asks(t, r, question("1.0.96.10.in-addr.arpa.", dns.TypePTR)); got != nil {
		t.Error(said(got))
	}
}

// What the servers have in a table of their own is for them: names, and those of addresses.
func TestHostsOfTheClusterAreLeft(t *testing.T) {
	s := shop()
	s.DNS.Hosts = []string{"*.many.shop.svc.cluster.local", "db-0.db.shop.svc.cluster.local", "new.shop.svc.cluster.local", "web.shop.svc.cluster.local"}
	s.DNS.HostAddresses = addrs("2001:db8::1")
	r := newResolver(t, nil)
	r.Take(s)
	for name, want := range map[string]string{
		"web.shop.svc.cluster.local.":            "handed back",
		"WEB.shop.svc.cluster.local.":            "handed back",
		"new.shop.svc.cluster.local.":            "handed back",
		"db-0.db.shop.svc.cluster.local.":        "handed back",
		"x.many.shop.svc.cluster.local.":         "handed back",
		"10-244-0-2.db.shop.svc.cluster.local.":  "NOERROR",
		"_http._tcp.web.shop.svc.cluster.local.": "NOERROR",
		"nosuch.shop.svc.cluster.local.":         "NXDOMAIN",
	} {
		for _, kind := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeTXT, dns.TypeSRV} {
			if got := said(asks(t, r, question(name, kind))); !strings.HasPrefix(got, want) {
				t.Errorf("%s %s: %s, not %s", name, dns.TypeToString[kind], got, want)
			}
		}
	}
	for text, want := range map[string]string{"10.96.0.1": "NOERROR", "2001:db8::1": "handed back"} {
		name, err := dns.ReverseAddr(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := said(asks(t, r, question(name, dns.TypePTR))); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s, not %s", text, got, want)
		}
	}
}

func TestAddressesOfReverseNames(t *testing.T) {
	for _, text := range []string{"192.0.2.17", "2001:db8::abcd:1", "::", "0.0.0.0"} {
		name, err := dns.ReverseAddr(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := addressOf(name); !ok || got != netip.MustParseAddr(text) {
			t.Errorf("%s: %v, %v", name, got, ok)
		}
	}
	for _, name := range []string{"2.0.192.in-addr.arpa.", "1.2.3.4.5.in-addr.arpa.", "256.2.0.192.in-addr.arpa.", "1.ip6.arpa.", "in-addr.arpa.", fmt.Sprintf("%sip6.arpa.", strings.Repeat("g.", 32))} {
		if got, ok := addressOf(name); ok {
			t.Errorf("%s: %v", name, got)
		}
	}
}
