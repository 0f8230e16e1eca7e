package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/millrace/millrace/kernel/resolv"
)

var ofAPod = resolv.Conf{
	Servers: []netip.Addr{dns4.Addr()}, Search: []string{"shop.svc.cluster.local", "svc.cluster.local", "cluster.local"}, Ndots: 5,
}

// answering is an asker that knows some names: "-" is one without addresses, "?" one that
// only a server knows.
func answering(names map[string]string) asker {
	return func(name, kind string) (Sent, error) {
		q := Sent{Name: name, Type: kind, By: ByKernel, Answer: &Answer{Code: codeOK}}
		switch known, found := names[name]; {
		case !found:
			q.Answer.Code = codeAbsent
		case known == "?":
			q.By, q.Answer = ByServers, nil
		case known != "-" && kind == "A":
			q.Answer.Addresses = []netip.Addr{netip.MustParseAddr(known)}
		}
		return q, nil
	}
}

// Who sends how many queries, as counted at a server with the real resolvers.
func TestLookups(t *testing.T) {
	known := map[string]string{
		"web.shop.svc.cluster.local": "10.96.0.1", "web.other.svc.cluster.local": "10.96.0.2", "bare.shop.svc.cluster.local": "-",
		"api.example.com": "192.0.2.1", "web.example.com": "?", "left.shop.svc.cluster.local": "?", "a.b.c.d.e.f": "192.0.2.2",
	}
	one, two := ofAPod, ofAPod
	one.Ndots = 1
	two.Servers = append(slices.Clone(two.Servers), dns6.Addr())
	for _, row := range []struct {
		what, name string
		conf       resolv.Conf
		want       string
	}{
		{"of the same namespace", "web", ofAPod, "glibc,musl,go: 2 queries; 2 by the kernel; found"},
		{"of another", "web.other", ofAPod, "glibc,musl,go: 4 queries; 4 by the kernel; found"},
		{"outside", "api.example.com", ofAPod, "glibc,musl,go: 8 queries; 8 by the kernel; found"},
		{"outside, ndots:1", "api.example.com", one, "glibc,musl,go: 2 queries; 2 by the kernel; found"},
		{"with a final dot", "api.example.com.", ofAPod, "glibc,musl,go: 2 queries; 2 by the kernel; found"},
		{"of another, ndots:1", "web.other", one, "glibc,go: 6 queries; 6 by the kernel; found|musl: 2 queries; 2 by the kernel; not found"},
		{"with many dots", "a.b.c.d.e.f", ofAPod, "glibc,musl,go: 2 queries; 2 by the kernel; found"},
		{"absent", "nosuch.example.com", ofAPod, "glibc,musl,go: 8 queries; 8 by the kernel; not found"},
		{"without addresses", "bare", ofAPod, "glibc,go: 8 queries; 8 by the kernel; not found|musl: 2 queries; 2 by the kernel; not found"},
		{"known to a server", "web.example.com", ofAPod, "glibc,musl,go: 8 queries; 6 by the kernel; 2 by the servers; not known"},
		{"left to a server", "left", ofAPod, "glibc,musl,go: at most 8 queries; 6 by the kernel; 2 by the servers; not known"},
		{"two servers", "web", two, "glibc,go: 2 queries; 2 by the kernel; found|musl: 4 queries; 2 by the kernel; found"},
		{"no list", "api.example.com", resolv.Conf{Servers: ofAPod.Servers, Ndots: 1}, "glibc,musl,go: 2 queries; 2 by the kernel; found"},
	} {
		all, err := lookups(row.conf, row.name, answering(known), answering(known))
		if err != nil {
			t.Fatal(err)
		}
		var said []string
		for _, l := range all {
			said = append(said, strings.Join(l.Resolvers, ",")+": "+l.Sum())
		}
		if got := strings.Join(said, "|"); got != row.want {
			t.Errorf("%s (%s):\n%s, not\n%s", row.what, row.name, got, row.want)
		}
	}
	collapsed := map[string]string{"api.example.com.shop.svc.cluster.local": "192.0.2.1"}
	all, err := lookups(ofAPod, "api.example.com", answering(collapsed), answering(known))
	if err != nil || len(all) != 1 || all[0].Sum() != "8 queries, 2 with the collapsed list; 2 by the kernel; found" {
		t.Errorf("collapsed: %+v, %v", all, err)
	}
}

// Messages are read as another parser reads them, and what is none is refused.
func TestAnswersAreRead(t *testing.T) {
	asked := dnsmessage.Question{Name: dnsmessage.MustNewName("api.example.com.shop.svc.cluster.local."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}
	alias := dnsmessage.MustNewName("api.example.com.")
	head := func(name dnsmessage.Name) dnsmessage.ResourceHeader {
		return dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: 5}
	}
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: 1, Response: true}, Questions: []dnsmessage.Question{asked}, Answers: []dnsmessage.Resource{
		{Header: head(asked.Name), Body: &dnsmessage.CNAMEResource{CNAME: alias}},
		{Header: head(alias), Body: &dnsmessage.AResource{A: [4]byte{192, 0, 2, 1}}},
		{Header: head(alias), Body: &dnsmessage.AResource{A: [4]byte{192, 0, 2, 2}}},
	}}
	packed, err := m.Pack()
	must(t, err)
	answer, err := answerIn(packed)
	if err != nil || answer.String() != "api.example.com: 192.0.2.1, 192.0.2.2" {
		t.Errorf("%v, %v", answer, err)
	}
	for end := range packed {
		if answer, err := answerIn(packed[:end]); err == nil {
			t.Errorf("%d of %d bytes are read as %v", end, len(packed), answer)
		}
	}
	loop := append(slices.Clone(packed[:headerLength]), 0xc0, headerLength, 0, 1, 0, 1)
	if _, err := answerIn(loop); err == nil {
		t.Error("a name that leads to itself is read")
	}
	m = dnsmessage.Message{Header: dnsmessage.Header{Response: true, RCode: dnsmessage.RCodeServerFailure}, Questions: []dnsmessage.Question{asked}}
	if packed, err = m.Pack(); err != nil {
		t.Fatal(err)
	}
	if answer, err := answerIn(packed); err != nil || answer.String() != "SERVFAIL" {
		t.Errorf("%v, %v", answer, err)
	}
}

func FuzzAnswerIn(f *testing.F) {
	f.Add(asking(f, "web.shop.svc.cluster.local.", dnsmessage.TypeA, true))
	f.Fuzz(func(t *testing.T, message []byte) {
		if len(message) > 2 {
			message[2] |= 0x80
		}
		answer, err := answerIn(message)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(message) == nil && len(m.Questions) > 0 && len(answer.Addresses) > len(m.Answers) {
			t.Errorf("%d addresses of %d records", len(answer.Addresses), len(m.Answers))
		}
	})
}

// What would become of queries is what becomes of them, and asking changes nothing.
func TestExplainedLookups(t *testing.T) {
	h := newHamlet(t)
	h.serve()
	l := h.open()
	defer watch(l)()
	x, err := OpenExplainer(h.settings)
	must(t, err)
	defer x.Close()
	before := h.observe()
	who := Pod{Device: h.device, Address: client4.Addr(), Netns: h.pod, Conf: ofAPod}
	for name, want := range map[string]string{
		"web":             "2 queries; 2 by the kernel; found",
		"nosuch.shop.svc": "8 queries; 6 by the kernel; 2 by the servers; not known",
		"api.example.com": "8 queries; 6 by the kernel; 2 by the servers; not known",
		"nine":            "at most 8 queries; 2 by the kernel; 6 by the servers; not known",
	} {
		all, err := x.Explain(who, name, false)
		if err != nil || len(all) != 1 || all[0].Sum() != want {
			t.Errorf("%s: %+v, %v, not %s", name, all, err, want)
		}
	}
	if after := h.observe(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("asking has changed\n%v into\n%v", before, after)
	}
	for server, from := range map[netip.Addr]netip.Addr{dns4.Addr(): client4.Addr(), dns6.Addr(): client6.Addr()} {
		who.Conf.Servers, who.Address = []netip.Addr{server}, from
		dry, err := x.Explain(who, "db-1.db", false)
		must(t, err)
		really, err := x.Explain(who, "db-1.db", true)
		must(t, err)
		for i, q := range really[0].Queries {
			if d := dry[0].Queries[i]; q.Answer.String() != d.Answer.String() || q.By != d.By || q.From != d.From || q.Took <= 0 {
				t.Errorf("really %+v %v, said %+v %v", q, q.Answer, d, d.Answer)
			}
		}
		if last := really[0].Queries[len(really[0].Queries)-2]; last.From != "Service shop/db" || last.Answer.String() != "10.244.2.5" {
			t.Errorf("the last query is %+v %v", last, last.Answer)
		}
	}
	who.Conf.Servers = []netip.Addr{dns4.Addr()}
	if all, err := x.Explain(who, "api.example.com", true); err != nil || all[0].Ends != Found || all[0].Queries[6].Answer.String() != elsewhere.String() {
		t.Errorf("a name of the server: %+v, %v", all, err)
	}
	attended := attend(t, l, reply)
	if all, err := x.Explain(who, "api.example.com", false); err != nil || all[0].Sum() != "8 queries; 6 by the kernel; 2 by the agent; not known" {
		t.Errorf("a name that the agent may know: %+v, %v", all, err)
	}
	if all, err := x.Explain(who, "api.example.com", true); err != nil || all[0].Queries[6].Answer.String() != agents.String() {
		t.Errorf("a name of the agent: %+v, %v", all, err)
	}
	attended()
	if _, err := x.Explain(Pod{}, "web", false); err == nil || !strings.Contains(err.Error(), "names no server") {
		t.Errorf("without a resolv.conf: %v", err)
	}
	h.settings.Pins = t.TempDir()
	if _, err := OpenExplainer(h.settings); !IsOff(err) {
		t.Errorf("where the layer is off: %v", err)
	}
	var off *Explainer
	if all, err := off.Explain(who, "web", false); err != nil || all[0].Sum() != "at most 8 queries; 8 by the servers; not known" {
		t.Errorf("without the layer: %+v, %v", all, err)
	}
}
