package service

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

var update = flag.Bool("update", false, "write the golden files")

// planned prints a plan as `millrace plan` does.
func planned(t *testing.T, have, want *model.Snapshot, prune bool) string {
	t.Helper()
	l := New(Settings{})
	before := l.Plan(have)
	var text strings.Builder
	if err := l.Diff(before, l.Plan(want), prune).Print(&text); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

// Each row of the story is a cluster, and below it the changes that lead there
// from the one before.
func TestPlans(t *testing.T) {
	backend := func(address string, ready, serving, terminating bool) model.Backend {
		return model.Backend{Address: netip.MustParseAddrPort(address), Ready: ready, Serving: serving, Terminating: terminating}
	}
	web := func(backends ...model.Backend) *model.Service {
		s := serviceOf("web", model.TCP, 80, []string{"10.96.0.1", "fd00:96::1"}, 8080)
		s.Ports[0].Backends = backends
		return s
	}
	ready4, ready6 := backend("10.244.1.4:8080", true, true, false), backend("[fd00::4]:8080", true, true, false)
	draining := backend("10.244.2.9:8080", false, true, true)
	headless := serviceOf("headless", model.TCP, 80, nil, 80, "10.244.1.4")
	headless.Headless = true
	many := serviceOf("many", model.UDP, 53, []string{"10.96.0.10"}, 53, "10.244.0.1", "10.244.0.2", "10.244.0.3", "10.244.0.4",
		"10.244.0.5", "10.244.0.6", "10.244.0.7", "10.244.0.8", "10.244.0.9", "10.244.0.10")
	sctp := serviceOf("sctp", model.SCTP, 9, []string{"10.96.0.11"}, 9, "10.244.0.1")
	thief := serviceOf("zz-thief", model.TCP, 80, []string{"10.96.0.1"}, 9, "10.244.0.66")
	story := []struct {
		what     string
		services []*model.Service
	}{
		{"nothing", nil},
		{"a Service of both families, one endpoint each", []*model.Service{web(ready4, ready6)}},
		{"an endpoint that drains gets nothing while another is ready", []*model.Service{web(ready4, ready6, draining)}},
		{"but everything when none is ready", []*model.Service{web(draining)}},
		{"headless and SCTP are not served, a long list is cut", []*model.Service{web(draining), headless, many, sctp}},
		{"two Services with one address: the first by name stays", []*model.Service{thief, web(draining), many}},
		{"a Service is gone", []*model.Service{many}},
	}
	var text strings.Builder
	have := &model.Snapshot{}
	for _, step := range story {
		want := &model.Snapshot{Services: step.services}
		text.WriteString("# " + step.what + "\n" + planned(t, have, want, true))
		have = want
	}
	golden := filepath.Join("testdata", "plans.golden")
	if *update {
		if err := os.WriteFile(golden, []byte(text.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || string(want) != text.String() {
		t.Errorf("the plans are\n%s\nand %s has\n%s%v", text.String(), golden, want, err)
	}
}

// While something could not be read, nothing goes away: no Service, and not the
// last endpoint of one.
func TestWithoutPruningNothingGoes(t *testing.T) {
	have := shop("10.1.0.1", "10.1.0.2")
	if text := planned(t, have, &model.Snapshot{}, false); text != "" {
		t.Errorf("Services go:\n%s", text)
	}
	if text := planned(t, have, shop(), false); text != "" {
		t.Errorf("a Service loses its last endpoint:\n%s", text)
	}
	if text := planned(t, have, shop("10.1.0.1"), false); !strings.Contains(text, "~ service 10.96.0.1:80/tcp -> 10.1.0.1:8080\n") {
		t.Errorf("one endpoint of two is not taken out:\n%s", text)
	}
}

// Comparing only the Services that changed finds what comparing all finds, also
// where addresses go from one Service to another.
func TestDiffOfWhatChangedIsTheWholeDiff(t *testing.T) {
	l, _ := onFakes(10000)
	var have layer.Picture = inForce(map[Frontend]*Row{})
	short := 0
	for range 500 {
		snapshot := randomCluster(8, 3)
		for i := range snapshot.Services {
			if rand.IntN(10) == 0 { // an address of another Service
				snapshot.Services[i].ClusterIPs = []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.96.0.%d", rand.IntN(8)))}
			}
		}
		want := l.Plan(snapshot).(*Picture)
		held := have.(*Picture)
		whole := held.index()
		if held.agrees != nil {
			if _, ok := diffPlans(held, want); ok {
				short++
			}
		}
		changes := l.Diff(have, want, true)
		if all := diffAll(whole, want.index(), true); len(all) != len(changes) {
			t.Fatalf("%d changes, and %d when all is compared:\n%v\n%v", len(changes), len(all), changes, all)
		}
		var err error
		if have, _, err = l.Apply(have, want, changes); err != nil {
			t.Fatal(err)
		}
		if left := diffAll(have.(*Picture).index(), want.index(), true); len(left) > 0 {
			t.Fatalf("applied, and still to do: %v", left)
		}
	}
	if short < 50 {
		t.Errorf("only %d of 500 were short", short)
	}
}

// A plan is made without root, without the kernel, and costs what changed.
func BenchmarkPlanOneChange(b *testing.B) {
	for _, n := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			snapshot := randomCluster(n, 4)
			l, _ := onFakes(1 << 22)
			var have layer.Picture = inForce(map[Frontend]*Row{})
			want := l.Plan(snapshot)
			have, _, err := l.Apply(have, want, l.Diff(have, want, true))
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				copied := *snapshot.Services[7]
				snapshot.Services[7] = &copied
				want := l.Plan(snapshot)
				if have, _, err = l.Apply(have, want, l.Diff(have, want, true)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
