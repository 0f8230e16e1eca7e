package cause

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// between asks for what goes from one address to another, or back.
func between(a, b netip.Addr) func(*Event) bool {
	return func(e *Event) bool {
		from, to := e.Tuple.Source.Addr(), e.Tuple.Destination.Addr()
		return from == a && to == b || from == b && to == a
	}
}

// Whoever asks for the packets that a cause is of gets the cause, in every recorded run; who
// asks for all of them gets what nobody's asking gives, and who asks for others
// is told how many there are.
func TestNoCauseIsLostByAsking(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.json")
	for _, name := range files {
		all := Diagnose(load(t, name))
		everything, none, _ := DiagnoseFor(load(t, name), func(*Event) bool { return true })
		if len(everything) != len(all) || len(none) > 0 {
			t.Errorf("%s: %d verdicts, %d and %d others for who asks for all", name, len(all), len(everything), len(none))
		}
		about, others, _ := DiagnoseFor(load(t, name), func(*Event) bool { return false })
		if len(about)+len(others) != len(all) {
			t.Errorf("%s: %d verdicts, %d and %d others for who asks for nothing", name, len(all), len(about), len(others))
		}
		for i, v := range all {
			if v.Cause != everything[i].Cause || v.Title != everything[i].Title || v.Packets != everything[i].Packets {
				t.Errorf("%s: %q of %d, and for who asks for all %q of %d", name, v.Title, v.Packets, everything[i].Title, everything[i].Packets)
			}
			if v.Tuple == nil || !v.Tuple.Source.IsValid() || !v.Tuple.Destination.IsValid() {
				continue
			}
			about, _, _ := DiagnoseFor(load(t, name), between(v.Tuple.Source.Addr(), v.Tuple.Destination.Addr()))
			if !slices.ContainsFunc(about, func(o Verdict) bool { return o.Cause == v.Cause }) {
				t.Errorf("%s: %s is lost for who asks for %s > %s", name, v.Cause, v.Tuple.Source, v.Tuple.Destination)
			}
			for _, o := range about {
				complete(t, name, o)
			}
		}
	}
}

// A cause that many suffer from is told by the packets that were asked for: their
// number, their ends.
func TestCountsAreOfWhatWasAskedFor(t *testing.T) {
	mine, theirs := drop("NETFILTER_DROP", "nft_do_chain", 4), drop("NETFILTER_DROP", "nft_do_chain", 900)
	theirs.Tuple.Source, theirs.First = netip.MustParseAddrPort("192.0.2.77:40000"), 0
	mine.First = 5
	for _, e := range []*Event{&mine, &theirs} {
		e.Stack = []string{"nft_do_chain_inet", "nf_hook_slow", "ip_local_deliver"}
	}
	e := &Evidence{Events: []Event{theirs, mine}, Spaces: []*Space{space(func(s *Space) {
		s.Rules = []Rule{{System: "nftables", Family: "inet", Table: "t", Chain: "in", Hook: "input", Handle: 4, Verdict: "drop", Text: "tcp dport 80 drop", HasCounter: true, After: 904}}
	})}}
	about, others, _ := DiagnoseFor(e, between(mine.Tuple.Source.Addr(), mine.Tuple.Destination.Addr()))
	if len(about) != 1 || len(others) != 0 {
		t.Fatalf("%+v, others %+v", about, others)
	}
	v := about[0]
	if v.Cause != FirewallDrop || v.Packets != 4 || v.Tuple.Source != mine.Tuple.Source || strings.Contains(v.Title, "904") ||
		!slices.Contains(v.Evidence, "900 packets that were not asked for died of it, too") {
		t.Errorf("%+v", v)
	}
}

// What millrace drops is told by the Service's name, wherever it drops it.
func TestOwnDropsNameTheService(t *testing.T) {
	own := func(hook, device string) *Space {
		return space(func(s *Space) {
			s.Addrs = []Addr{addr("192.0.2.2/24")}
			s.Programs = []Program{{ID: 7, Name: "from_pod", Type: "sched_cls", Hook: hook, Device: device, Owner: "millrace"}}
		})
	}
	services := func(at string, endpoints int) []Service {
		return []Service{{"shop/db:sql", protoUDP, netip.MustParseAddrPort(at), 3}, {"shop/web:http", protoTCP, netip.MustParseAddrPort(at), endpoints}}
	}
	refused := again()
	refused.Kind, refused.Call, refused.Errno, refused.Command, refused.OldState = CallFailed, "connect", eCONNREFUSED, "curl", 0
	for _, row := range []struct {
		name string
		e    Evidence
		want string
	}{
		{"at the wire", Evidence{Spaces: []*Space{own("tc ingress", "eth0")}, Services: services("192.0.2.2:80", 0), Events: []Event{drop("TC_INGRESS", "__netif_receive_skb_core", 5)}},
			"millrace drops what goes to Service shop/web:http (192.0.2.2:80) from 192.0.2.1 in web: 5 packets"},
		{"at a node port", Evidence{Spaces: []*Space{own("tc ingress", "eth0")}, Services: services("0.0.0.0:80", 2), Events: []Event{drop("TC_INGRESS", "__netif_receive_skb_core", 5)}},
			"millrace drops what goes to Service shop/web:http (192.0.2.2:80) from 192.0.2.1 in web: 5 packets"},
		{"at the socket", Evidence{Spaces: []*Space{own("cgroup connect", "")}, Services: services("192.0.2.2:80", 0), Events: []Event{refused}},
			"millrace refuses connect of curl to Service shop/web:http (192.0.2.2:80) in web: it has no endpoint"},
	} {
		v := Diagnose(&row.e)
		if len(v) != 1 || v[0].Cause != ServiceDrop || v[0].Title != row.want || v[0].Owner != "Service shop/web:http" {
			t.Errorf("%s: %+v", row.name, v)
			continue
		}
		complete(t, row.name, v[0])
	}
	other := Evidence{Spaces: []*Space{own("cgroup connect", "")}, Services: services("192.0.2.2:80", 1), Events: []Event{refused}}
	if v := Diagnose(&other); len(v) > 0 {
		t.Errorf("an endpoint that refuses is not millrace: %+v", v)
	}
}
