package main

import (
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/miekg/dns"
)

// query is one query that is made up.
type query struct {
	name    string
	kind    string // what it is about
	flags   string
	message []byte
	// ours says that it is to be answered in the kernel.
	ours bool
}

func (q *query) String() string { return q.name + q.flags }

// Limits of a name in the kernel: layer/dns/names.bpf.c.
const (
	mostBelow  = 96
	mostName   = 160
	mostLabels = 16
)

// query makes one up.
func (t *town) query(random *rand.Rand) *query {
	q := t.name(random)
	if random.IntN(5) == 0 {
		q.name = mixed(random, q.name)
	}
	m := new(dns.Msg)
	m.Id = uint16(random.Uint32())
	m.RecursionDesired = random.IntN(20) > 0
	kind := uint16(dns.TypeA)
	switch n := random.IntN(20); {
	case n < 9:
		kind = dns.TypeAAAA
	case n == 9:
		others := []uint16{dns.TypeSRV, dns.TypeTXT, dns.TypePTR, dns.TypeMX, dns.TypeHTTPS, dns.TypeCNAME, dns.TypeSOA, dns.TypeNS}
		kind = others[random.IntN(len(others))]
		q.leave("another type")
	}
	if strings.HasSuffix(strings.ToLower(q.name), ".arpa.") && random.IntN(4) > 0 {
		kind = dns.TypePTR
	}
	m.Question = []dns.Question{{Name: q.name, Qtype: kind, Qclass: dns.ClassINET}}
	q.flags = " " + dns.TypeToString[kind]
	m.AuthenticatedData = random.IntN(20) == 0
	if random.IntN(50) == 0 {
		m.CheckingDisabled = true
		q.leave("CD")
	}
	if random.IntN(2) == 0 {
		t.edns(random, q, m)
	}
	if length := wireLength(q.name); length > mostName || length-len("\x07cluster\x05local\x00") > mostBelow || dns.CountLabel(q.name) > mostLabels {
		q.leave("a long name")
	}
	message, err := m.Pack()
	if err != nil {
		panic(fmt.Sprintf("%s: %v", q, err)) // a fault of this file
	}
	q.message = message
	return q
}

// leave notes why others are asked.
func (q *query) leave(why string) {
	if q.ours {
		q.ours, q.kind = false, why
	}
}

func (t *town) edns(random *rand.Rand, q *query, m *dns.Msg) {
	m.SetEdns0([]uint16{512, 1232, 1410, 4096, 65535}[random.IntN(5)], false)
	q.flags += " EDNS"
	switch random.IntN(8) {
	case 0:
		m.IsEdns0().SetDo()
		q.leave("DO")
	case 1:
		m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0102030405060708"})
		q.leave("a cookie")
	case 2:
		m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_NSID{Code: dns.EDNS0NSID})
		q.leave("an EDNS option")
	}
}

// wireLength is how long a name is in a message.
func wireLength(name string) int {
	buffer := make([]byte, 300)
	n, err := dns.PackDomainName(name, buffer, 0, nil, false)
	if err != nil {
		panic(err)
	}
	return n
}

// mixed writes some letters in upper case.
func mixed(random *rand.Rand, name string) string {
	bits := random.Uint64()
	return strings.Map(func(r rune) rune {
		if bits = bits<<1 | bits>>63; bits&1 > 0 && 'a' <= r && r <= 'z' {
			return r - 'a' + 'A'
		}
		return r
	}, name)
}

var outsideNames = []string{"api.example.com", "example.com", "www.google.com", "s3.eu-central-1.amazonaws.com", "localhost", "db", "registry.internal.corp.example"}

// name makes up what is asked for.
func (t *town) name(random *rand.Rand) *query {
	s := t.services[random.IntN(len(t.services))]
	namespace := t.namespaces[random.IntN(len(t.namespaces))]
	const zone = "cluster.local."
	nosuch := fmt.Sprintf("no-such-%d", random.IntN(1000))
	switch random.IntN(21) {
	case 20:
		return t.address(random, s)
	case 0, 1, 2, 3, 4, 5:
		return &query{name: s.full(), kind: s.kind, ours: !s.left}
	case 6, 7, 8:
		return t.endpoint(random, s)
	case 9:
		port := []string{"_http._tcp.", "_dns._udp.", "_no._tcp.", "http._tcp.", "_._.", "a.b."}[random.IntN(6)]
		return &query{name: port + s.full(), kind: "a port"}
	case 10:
		return &query{name: nosuch + "." + namespace + ".svc." + zone, kind: "no such Service", ours: true}
	case 11:
		return &query{name: s.name + ".no-such-namespace.svc." + zone, kind: "no such namespace", ours: true}
	case 12:
		below := []string{"db-0", "10-244-0-1", "_http._tcp", "fd00--1"}[random.IntN(4)]
		return &query{name: below + "." + nosuch + "." + namespace + ".svc." + zone, kind: "below no such Service", ours: true}
	case 13:
		return &query{name: "a.b.c." + s.full(), kind: "more labels", ours: true}
	case 14, 15:
		return t.searched(random, s, namespace)
	case 16:
		if len(t.gone) > 0 {
			return &query{name: t.gone[random.IntN(len(t.gone))], kind: "a Service that was deleted", ours: true}
		}
		return &query{name: "_http._tcp.x." + s.full(), kind: "more labels", ours: true}
	case 17:
		pod := []string{"10-244-1-2", "1-2-3-4", "fd00--1", "nginx", "300-1-1-1", "a.10-244-1-2"}[random.IntN(6)]
		return &query{name: pod + "." + namespace + ".pod." + zone, kind: "a pod"}
	case 18:
		own := []string{zone, "svc." + zone, "pod." + zone, "dns." + zone, "ns.dns." + zone, "dns-version." + zone, namespace + ".svc." + zone, "x.dns." + zone}
		return &query{name: own[random.IntN(len(own))], kind: "the zone's own"}
	}
	strange := []string{`w\.eb.shop.svc.`, `\000.svc.`, `a\.b.c.`, `\195\164.shop.svc.`, `-.shop.svc.`, `*.shop.svc.`, `shop\.svc.`}
	name := strange[random.IntN(len(strange))] + zone
	return &query{name: name, kind: "strange labels", ours: !strings.HasPrefix(name, `\000.svc.`)}
}

// endpoint makes up the name of an endpoint, there or not.
func (t *town) endpoint(random *rand.Rand, s *stall) *query {
	if len(s.slices) == 0 {
		return &query{name: "db-0." + s.full(), kind: "no such endpoint"}
	}
	g := s.slices[random.IntN(len(s.slices))]
	if len(g.endpoints) == 0 || random.IntN(5) == 0 {
		return &query{name: fmt.Sprintf("db-%d.", random.IntN(9)) + s.full(), kind: "no such endpoint"}
	}
	m := g.endpoints[random.IntN(len(g.endpoints))]
	return &query{name: m.label() + "." + s.full(), kind: "an endpoint of a " + s.kind, ours: s.kind == kindHeadless && !s.left && m.ready}
}

// address makes up the name of an address of a Service or an endpoint, or of nobody's.
func (t *town) address(random *rand.Rand, s *stall) *query {
	address := []string{dnsV4, dnsV6, "10.96.0.1", "192.0.2.1"}[random.IntN(4)]
	if len(s.slices) > 0 && random.IntN(2) == 0 {
		if g := s.slices[random.IntN(len(s.slices))]; len(g.endpoints) > 0 {
			address = g.endpoints[random.IntN(len(g.endpoints))].address
		}
	}
	name, err := dns.ReverseAddr(address)
	if err != nil {
		panic(fmt.Sprintf("%s: %v", address, err)) // a fault of this file
	}
	return &query{name: name, kind: "an address"}
}

// searched makes up what a pod's search list makes of a name.
func (t *town) searched(random *rand.Rand, s *stall, namespace string) *query {
	name := outsideNames[random.IntN(len(outsideNames))]
	switch random.IntN(8) {
	case 0:
		name = s.name
	case 1:
		name = s.name + "." + s.namespace
	case 2:
		name = s.name + "." + s.namespace + ".svc"
	case 3:
		name = strings.TrimSuffix(s.full(), ".")
	case 4:
		name = "ns.dns.cluster.local"
	}
	suffix := []string{"." + namespace + ".svc.cluster.local.", ".svc.cluster.local.", ".cluster.local.", "."}[random.IntN(4)]
	q := &query{name: name + suffix, kind: "of a search list", ours: true}
	below, inside := strings.CutSuffix(q.name, ".cluster.local.")
	labels := strings.Split(below, ".")
	last := labels[len(labels)-1]
	switch {
	case !inside:
		q.leave("outside the cluster")
	case last == "dns" || last == "pod" || last == "svc" && len(labels) < 3:
		q.leave("the zone's own")
	case last == "svc" && len(labels) <= 5 && t.there(labels):
		// The Service itself is asked for elsewhere; others know what is below it.
		q.leave("of a search list, and there")
	}
	return q
}

// there says whether a Service has such a name, or the one that ends it.
func (t *town) there(labels []string) bool {
	name := strings.Join(labels[len(labels)-3:], ".") + ".cluster.local."
	for _, s := range t.services {
		if s.full() == name {
			return true
		}
	}
	return name == "kube-dns.kube-system.svc.cluster.local." || name == "kubernetes.default.svc.cluster.local."
}
