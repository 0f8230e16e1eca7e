package dns

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/millrace/millrace/model"
)

// What may be said, by how old it is.
func TestWhatMayBeSaid(t *testing.T) {
	const silence = 2 * time.Second
	for _, row := range []struct {
		what   string
		is     knowledge
		ago    time.Duration
		known  time.Duration
		whole  time.Duration
		reason string // in status
	}{
		{"all is well", knowledge{whole: true, served: true}, 0, silence, silence, ""},
		{"the source is away, as while it changes servers", knowledge{whole: true, served: true}, 25 * time.Second, silence, silence, ""},
		{"for long", knowledge{whole: true, served: true}, DenyFor + time.Second, silence, 0, "names that are not known here are asked of the cluster's DNS servers: the source was last well 31s ago"},
		{"for very long", knowledge{whole: true, served: true}, SayFor + time.Second, 0, 0, "asked for every name: the source was last well 5m1s ago"},
		{"and nobody else can answer", knowledge{whole: true}, SayFor + time.Hour, SayFor, 0, "no endpoint of Service kube-system/kube-dns is ready"},
		{"nobody else can answer", knowledge{whole: true}, 0, SayFor, silence, "cannot answer what is asked of them"},
		{"not all was read", knowledge{served: true}, 0, silence, 0, "not all Services of the cluster are known"},
		{"the zone is others'", knowledge{served: true, left: "rewrite in line 7"}, 0, silence, 0, "all names are left to the cluster's DNS servers: rewrite in line 7"},
	} {
		says := row.is.says(row.ago, silence)
		if says.known != row.known || says.whole != row.whole {
			t.Errorf("%s: names for %v, and no others for %v; not %v and %v", row.what, says.known, says.whole, row.known, row.whole)
		}
		heard := func() time.Time { return time.Now().Add(-row.ago) }
		text := strings.Join(row.is.degraded(Settings{Zone: "cluster.local", Heard: heard}), "\n")
		if (row.reason == "") != (text == "") || !strings.Contains(text, row.reason) {
			t.Errorf("%s: status says %q, not %q", row.what, text, row.reason)
		}
	}
}

// The program says what it may: by time, since nobody tells it when the agent is gone.
func TestSaysWhatItMay(t *testing.T) {
	p := load(t, town(), func(spec *ebpf.CollectionSpec) {
		must(t, spec.Variables[datapathVarSilence].Set(uint64(time.Minute)))
	})
	maps := p.layer.host.(*datapath).Maps
	for _, row := range []struct {
		what                    string
		complete                uint32
		beat, known, whole      time.Duration // from now
		found, nodata, nxdomain string
	}{
		{"all is well", 1, 0, time.Hour, time.Hour, "answered", "nodata", "nxdomain"},
		{"not all was read", 0, 0, time.Hour, -time.Second, "answered", "unsure", "unsure"},
		{"no other names", 1, 0, time.Hour, -time.Second, "answered", "nodata", "unsure"},
		{"nothing of the zone", 1, 0, -time.Second, -time.Second, "left", "left", "left"},
		{"the agent is gone, and others can answer", 1, -2 * time.Minute, -time.Second, -time.Second, "stale", "stale", "stale"},
		{"the agent is gone, and nobody can answer", 1, -2 * time.Minute, time.Hour, -time.Second, "answered", "nodata", "unsure"},
	} {
		now, err := sinceBoot()
		must(t, err)
		at := func(d time.Duration) uint64 { return uint64(int64(now) + int64(d)) }
		must(t, maps[datapathMapAuthorities].Put(uint32(0), datapathAuthority{Beat: at(row.beat), Known: at(row.known), Whole: at(row.whole), Serial: 7, Complete: row.complete}))
		for name, want := range map[string]string{"four.shop.svc": row.found, "six.shop.svc": row.nodata, "nosuch.shop.svc": row.nxdomain} {
			if got := p.outcome(asking(t, name+".cluster.local.", dnsmessage.TypeA, false)); got != want {
				t.Errorf("%s: %s: %s, not %s", row.what, name, got, want)
			}
		}
	}
}

// outcome is what the program says became of a query.
func (p *loaded) outcome(query []byte) string {
	p.t.Helper()
	var before []uint64
	for o := range datapathOutcomeOUTCOME_COUNT {
		before = append(before, p.count(o))
	}
	p.run(datagramOf(client4, dns4, query))
	for o := range datapathOutcomeOUTCOME_COUNT {
		if p.count(o) != before[o] {
			return p.word(o)
		}
	}
	return "nothing"
}

// Records may be kept for as long as the DNS servers' configuration says.
func TestLifetime(t *testing.T) {
	p := load(t, town())
	other := town()
	other.DNS = &model.DNS{Zone: "cluster.local", TTL: 30 * time.Second}
	have := p.layer.Plan(town())
	changes := p.layer.Diff(have, p.layer.Plan(other), true)
	if len(changes) != 1 || changes[0].String() != "~ records -> to be kept for 30 s" {
		t.Fatalf("the changes are\n%v", changes)
	}
	_, _, err := p.layer.Apply(have, p.layer.Plan(other), changes)
	must(t, err)
	for name, section := range map[string]string{"web.shop.svc": "answer", "nosuch.shop.svc": "authority"} {
		_, frame := p.run(datagramOf(client4, dns4, asking(t, name+".cluster.local.", dnsmessage.TypeA, false)))
		var m dnsmessage.Message
		must(t, m.Unpack(opened(t, frame, dns4, client4)))
		records := append(m.Answers, m.Authorities...)
		if len(records) != 1 || records[0].Header.TTL != 30 {
			t.Errorf("%s of %s: %v", section, name, records)
		}
		if soa, ok := records[0].Body.(*dnsmessage.SOAResource); ok && soa.MinTTL != 30 {
			t.Errorf("the SOA says that absence is kept for %d s", soa.MinTTL)
		}
	}
}

// While the agent is gone and nobody else can answer, what was known is said: nobody has to
// wait for a server that is not there.
func TestAgentAndServersAreGone(t *testing.T) {
	h := newHamlet(t)
	h.settings.silence = 100 * time.Millisecond
	l := New(h.settings)
	must(t, l.Open())
	alone := town()
	alone.Services[0] = named("kube-system", "kube-dns", "10.96.0.10", "fd00:96::a")
	have, err := l.Read()
	must(t, err)
	_, _, err = l.Apply(have, l.Plan(alone), l.Diff(have, l.Plan(alone), true))
	must(t, err)
	d, err := l.Describe()
	must(t, err)
	if !strings.Contains(strings.Join(d.Degraded, "\n"), "no endpoint of Service kube-system/kube-dns is ready") {
		t.Errorf("status says %q", d.Degraded)
	}
	l.Close()
	time.Sleep(2 * h.settings.silence) // what it says of itself is old now
	answers := func(what string, want string) {
		t.Helper()
		got, err := h.look("web.shop.svc.cluster.local.")
		if err != nil || len(got) != 1 || got[0] != netip.MustParseAddr(want) {
			t.Errorf("%s: %v, %v, not %s", what, got, err, want)
		}
	}
	answers("nobody else can answer", "10.96.0.20")
	asked := h.serve()
	if _, err := h.look("nosuch.shop.svc.cluster.local."); err != nil || asked.Load() != 1 {
		t.Errorf("that a name does not exist only a server may say: %v, asked %d times", err, asked.Load())
	}
	l = h.open() // and a server is ready
	l.Close()
	time.Sleep(2 * h.settings.silence)
	answers("others can answer", elsewhere.String())
}
