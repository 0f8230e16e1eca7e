package bench

import (
	"bytes"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// answerer is a server of the test, and how a client is told to ask it.
func answerer(t *testing.T, answer func(query []byte) []byte) *dnsCommand {
	t.Helper()
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		query := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(query)
			if err != nil {
				return
			}
			if said := answer(query[:n]); said != nil {
				_, _ = conn.WriteToUDPAddrPort(said, from)
			}
		}
	}()
	return &dnsCommand{
		Server: conn.LocalAddr().(*net.UDPAddr).AddrPort(), Names: []string{"web.shop.svc.cluster.local", "db.shop.svc.cluster.local"},
		Name: dnsOutside, Searches: dnsSearches, Nanoseconds: int64(20 * time.Millisecond), Threads: 2, Window: 8,
	}
}

func someNames() *upstream {
	return &upstream{names: map[string][]netip.Addr{
		"web.shop.svc.cluster.local": {netip.MustParseAddr("10.97.0.1")},
		"db.shop.svc.cluster.local":  {netip.MustParseAddr("10.97.0.2")},
		dnsOutside:                   {netip.MustParseAddr("192.0.2.80"), netip.MustParseAddr("2001:db8::80")},
	}}
}

func TestUpstreamAnswers(t *testing.T) {
	u := someNames()
	for _, row := range []struct {
		name    string
		kind    uint16
		code    byte
		answers byte
		ends    []byte
	}{
		{"web.shop.svc.cluster.local", typeA, 0, 1, []byte{0, 4, 10, 97, 0, 1}},
		{"API.example.com", typeA, 0, 1, []byte{0, 4, 192, 0, 2, 80}},
		{"api.example.com", typeAAAA, 0, 1, netip.MustParseAddr("2001:db8::80").AsSlice()},
		{"web.shop.svc.cluster.local", typeAAAA, 0, 0, nil},
		{"web.shop.svc.cluster.local", 33, 0, 0, nil},
		{"nosuch.example.com", typeA, nxdomain, 0, nil},
	} {
		query := appendQuestion(nil, 7, row.name, row.kind)
		said := u.answer(query)
		if said[1] != 7 || said[2]&0x80 == 0 || said[3]&15 != row.code || said[7] != row.answers || said[9] != 1-row.answers || !bytes.HasSuffix(said, row.ends) {
			t.Errorf("%s %d: %x", row.name, row.kind, said)
		}
		if isFound(said) != (row.answers > 0) {
			t.Errorf("%s %d is found: %v", row.name, row.kind, isFound(said))
		}
		if row.answers > 0 {
			continue
		}
		// the owner of the SOA is the last two labels
		if owner := int(said[len(query)+1]); strings.Count(nameAt(said, owner), ".") != 1 {
			t.Errorf("%s: the SOA is of %q", row.name, nameAt(said, owner))
		}
	}
	for _, query := range [][]byte{nil, make([]byte, 12), append(make([]byte, 12), 0xc0, 12, 0, 1, 0, 1), appendQuestion(nil, 1, "a", typeA)[:14]} {
		if said := u.answer(query); said != nil && len(query) != headerSize {
			t.Errorf("%x is answered with %x", query, said)
		}
	}
}

func nameAt(message []byte, at int) string {
	name, _ := questionName(append(make([]byte, headerSize), message[at:]...))
	return name
}

// Each client counts what is answered, and its queries are those that it says.
func TestClientsOfDNS(t *testing.T) {
	u := someNames()
	var lock sync.Mutex
	var asked []string
	do := answerer(t, func(query []byte) []byte {
		name, _ := questionName(query)
		lock.Lock()
		defer lock.Unlock()
		asked = append(asked, name)
		return u.answer(query)
	})
	if result, err := do.prove(); err != nil || result.Count != 0 {
		t.Errorf("nothing to prove: %+v, %v", result, err)
	}
	do.Prove = map[string]netip.Addr{"web.shop.svc.cluster.local": netip.MustParseAddr("10.97.0.1")}
	if result, err := do.prove(); err != nil || result.Count != 1 {
		t.Errorf("prove: %+v, %v", result, err)
	}
	do.Prove["db.shop.svc.cluster.local"] = netip.MustParseAddr("10.97.0.1")
	if _, err := do.prove(); err == nil || !strings.Contains(err.Error(), "db.shop.svc.cluster.local") {
		t.Errorf("a wrong address is proved: %v", err)
	}
	do.Prove = nil
	for _, operation := range []string{Query, Flood, Pairs} {
		do.Operation = operation
		result, err := do.perform(make([]uint32, 0, 1000))
		if err != nil || result.Errors > 0 || result.Count == 0 || result.CPU <= 0 || result.Took < do.Nanoseconds/2 {
			t.Errorf("%s: %+v, %v", operation, result, err)
		}
	}
	lock.Lock()
	asked = nil
	lock.Unlock()
	if err := do.pairs(); err != nil {
		t.Fatal(err)
	}
	lock.Lock()
	defer lock.Unlock()
	var want []string
	for _, suffix := range append(slices.Clone(dnsSearches), "") {
		name := strings.TrimSuffix(dnsOutside+"."+suffix, ".")
		want = append(want, name, name)
	}
	if !slices.Equal(asked, want) {
		t.Errorf("a lookup asks for %q, not %q", asked, want)
	}
}

// What is not answered, and what is answered otherwise, does not count.
func TestClientsOfDNSCountErrors(t *testing.T) {
	do := answerer(t, func(query []byte) []byte {
		said := append([]byte{}, query...)
		said[2], said[3] = 0x81, 0x82 // SERVFAIL
		return said
	})
	do.Operation = Query
	if result, err := do.perform(make([]uint32, 0, 1000)); err != nil || result.Count > 0 || result.Errors == 0 || !strings.Contains(result.FirstError, "is not found") {
		t.Errorf("answers of SERVFAIL: %+v, %v", result, err)
	}
	do.Operation = Pairs
	if result, err := do.perform(make([]uint32, 0, 1000)); err != nil || result.Count > 0 || result.Errors == 0 {
		t.Errorf("lookups: %+v, %v", result, err)
	}
	silent := answerer(t, func([]byte) []byte { return nil })
	silent.Operation = Flood
	if result, err := silent.perform(nil); err != nil || result.Count > 0 || result.Errors < 2*8 || !strings.Contains(result.FirstError, "lost, 0 not found") {
		t.Errorf("a flood without answers: %+v, %v", result, err)
	}
}

func TestGoalsOfDNS(t *testing.T) {
	row := func(variant, metric string, samples ...float64) Row {
		return summarize(Row{Variant: variant, Metric: metric}, samples, nil, nil)
	}
	r := &Report{Rows: []Row{
		row(Millrace, MetricP50(Query), 2, 2, 2), row(Unbound, MetricP50(Query), 10, 8, 7),
		row(Millrace, MetricRate(Flood), 300, 300, 300), row(Unbound, MetricRate(Flood), 100, 100, 100),
		row(Millrace, MetricP50(Pairs), 10, 10, 10), row(CoreDNS, MetricP50(Pairs), 700, 600, 800),
	}}
	met := map[string]bool{}
	for _, g := range r.dnsGoals() {
		met[g.Metric+" "+g.To] = g.Met
	}
	if len(met) != 3 || !met["query p50 unbound"] || met["flood rate unbound"] || !met["pairs p50 coredns"] {
		t.Errorf("goals %v", met)
	}
	for value, want := range map[float64]string{0.0125: "1/80.0 [too few rounds]", 0.5: "1/2.00 [too few rounds]", 3.5: "3.50 [too few rounds]"} {
		if got := shortRatio(&Ratio{Median: value}); got != want {
			t.Errorf("%v is written %q, not %q", value, got, want)
		}
	}
}

func TestDNSOptions(t *testing.T) {
	for _, o := range []DNSOptions{{Rounds: -1}, {Rounds: 10001}, {RoundTime: time.Hour}, {RoundTime: -1}} {
		if _, err := o.withDefaults(); err == nil {
			t.Errorf("%+v is taken", o)
		}
	}
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	cpus, err := lastProcessors(2)
	if err != nil || len(cpus) != min(2, set.Count()) || !slices.IsSorted(cpus) {
		t.Errorf("processors %v, %v", cpus, err)
	}
}
