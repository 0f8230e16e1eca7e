package dns

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/model"
)

var update = flag.Bool("update", false, "write the golden files")

// TestPlans tells the story in testdata/plans.txtar; plans.golden has the changes.
func TestPlans(t *testing.T) {
	story, err := txtar.ParseFile(filepath.Join("testdata", "plans.txtar"))
	must(t, err)
	l := New(Settings{Zone: "cluster.local"})
	var text strings.Builder
	have := l.Plan(&model.Snapshot{})
	for _, step := range story.Files {
		snapshot := clusterOf(t, string(step.Data))
		want := l.Plan(snapshot)
		changes := l.Diff(have, want, snapshot.Complete)
		text.WriteString("# " + step.Name + "\n")
		must(t, changes.Print(&text))
		// What is in force then is what was asked for, and what was not taken away.
		for _, change := range changes {
			have.(*Picture).note(change)
		}
	}
	if left := l.Plan(clusterOf(t, "zone other.example")).(*Picture).left; left != "they serve other.example: say --dns other.example" {
		t.Errorf("another zone is left because %q", left)
	}
	golden := filepath.Join("testdata", "plans.golden")
	if *update {
		must(t, os.WriteFile(golden, []byte(text.String()), 0o644))
	}
	want, err := os.ReadFile(golden)
	if err != nil || string(want) != text.String() {
		t.Errorf("the plans are\n%s\nand %s has\n%s%v", text.String(), golden, want, err)
	}
}

// clusterOf reads the lines of a cluster.
func clusterOf(t *testing.T, text string) *model.Snapshot {
	t.Helper()
	s := &model.Snapshot{Complete: true, Named: true}
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 1 {
			s.Complete = false
			continue
		}
		if len(words) < 2 {
			continue
		}
		namespace, name, _ := strings.Cut(words[1], "/")
		switch words[0] {
		case "left":
			s.DNS = &model.DNS{Zone: "cluster.local", TTL: DefaultTTL, Left: strings.Join(words[1:], " ")}
		case "hosts":
			s.DNS = &model.DNS{Zone: "cluster.local", TTL: DefaultTTL, Hosts: words[1:]}
		case "zone":
			s.DNS = &model.DNS{Zone: words[1], TTL: DefaultTTL}
		case "ttl":
			seconds, err := time.ParseDuration(words[1])
			must(t, err)
			s.DNS = &model.DNS{Zone: "cluster.local", TTL: seconds}
		case "service":
			s.Services = append(s.Services, named(namespace, name, words[2:]...))
		case "headless":
			s.Services = append(s.Services, headless(namespace, name, words[2:]...))
		case "more":
			elsewhere := headless(namespace, name, words[2:]...)
			elsewhere.More = true
			s.Services = append(s.Services, elsewhere)
		case "external":
			outside := named(namespace, name)
			outside.Type = model.ExternalName
			s.Services = append(s.Services, outside)
		case "other":
			s.Others = append(s.Others, model.Name{Namespace: namespace, Name: name})
		case "problem":
			s.Problems = append(s.Problems, model.Problem{Object: "Service " + words[1]})
		default:
			t.Fatalf("%q is not understood", line)
		}
	}
	return s
}

// Whatever has been written can be read back.
func TestEntries(t *testing.T) {
	for _, row := range New(Settings{Zone: "cluster.local"}).Plan(town()).(*Picture).Rows() {
		back := rowOf("cluster.local", keyOf(row.Name), entryOf(row))
		if back.Name != row.Name || !back.equal(row) {
			t.Errorf("%s -> %s was read back as %s -> %s", row.Name, row.Leads(), back.Name, back.Leads())
		}
	}
	for _, addr := range []string{"10.0.0.1", "255.255.255.255", "fd00::1", "2001:db8:1:2:3:4:5:6"} {
		a := netip.MustParseAddr(addr)
		if back := fromAddress(addressOf(a)); back != a {
			t.Errorf("%s was read back as %s", a, back)
		}
	}
	for name, want := range map[string]bool{
		"web.shop.svc": true, "": false, "a..b": false, strings.Repeat("x", 64) + ".svc": false, strings.Repeat("x", 63) + ".svc": true,
		strings.Repeat("x", 63) + "." + strings.Repeat("y", 27) + ".svc": true, strings.Repeat("x", 63) + "." + strings.Repeat("y", 28) + ".svc": false,
	} {
		if fits(name) != want {
			t.Errorf("%q fits: %v, not %v", name, !want, want)
		}
	}
}

func TestZones(t *testing.T) {
	for text, want := range map[string]string{
		"cluster.local": "cluster.local", "Cluster.Local.": "cluster.local", "k8s": "k8s", "": "", ".": "", "a..b": "",
		strings.Repeat("x", 31) + "." + strings.Repeat("y", 30): strings.Repeat("x", 31) + "." + strings.Repeat("y", 30),
		strings.Repeat("x", 31) + "." + strings.Repeat("y", 31): "", strings.Repeat("x", 64): "",
	} {
		if zone, err := ParseZone(text); zone != want || (err == nil) != (want != "") {
			t.Errorf("%q is read as %q, %v", text, zone, err)
		}
	}
}

// A search list is told whole or not at all.
func TestSearchLists(t *testing.T) {
	many := slices.Repeat([]string{"example.com"}, 9)
	for _, row := range []struct {
		domains []string
		fits    bool
	}{
		{[]string{"shop.svc.cluster.local", "svc.cluster.local", "Cluster.Local."}, true},
		{nil, false}, {[]string{"."}, false}, {[]string{"a..b"}, false}, {many[:8], true}, {many, false},
		{[]string{strings.Repeat("x", 31) + "." + strings.Repeat("y", 30)}, true},
		{[]string{strings.Repeat("x", 31) + "." + strings.Repeat("y", 31)}, false},
	} {
		list, ok := searchListOf(5, row.domains)
		if ok != row.fits || ok && (list.Ndots != 5 || int(list.Count) != len(row.domains)) {
			t.Errorf("%v: %v, ndots %d, %d domains", row.domains, ok, list.Ndots, list.Count)
		}
		for i := range row.domains {
			text := strings.ToLower(strings.TrimSuffix(row.domains[i], "."))
			if ok && (nameOf(datapathName{Word: [12]uint64(append(list.Suffix[i].Word[:], 0, 0, 0, 0))}) != text || int(list.Length[i]) != len(text)+2) {
				t.Errorf("%s is written as %x, of length %d", row.domains[i], list.Suffix[i].Word, list.Length[i])
			}
		}
	}
	if list, _ := searchListOf(99, many[:1]); list.Ndots != 15 {
		t.Errorf("ndots is %d, not 15, which is the most for resolvers", list.Ndots)
	}
}

// How many names there may be is a matter of the node's memory.
func TestMostNames(t *testing.T) {
	for memory, want := range map[uint64]int{0: 1 << 17, 1 << 30: 1 << 17, 4 << 30: 1 << 18, 8 << 30: 1 << 19, 64 << 30: 1 << 22} {
		if got := mostNames(memory); got != want || got > leastNames && uint64(got)*ofName > memory/memoryShare {
			t.Errorf("with %d MB there may be %d names, not %d", memory>>20, got, want)
		}
	}
	for names, want := range map[int]int{0: 1, 1: 1, 2: 2, 1024: 1024, 1025: 2048, 1<<17 + 1: 1 << 18} {
		if got := roomFor(names); got != want {
			t.Errorf("%d names get room for %d, not %d", names, got, want)
		}
	}
}

// All names are of Services, and below a Service only beside the Service's own: the program
// does not look for others.
func TestNamesAreOfServices(t *testing.T) {
	for _, snapshot := range append(towns(), city(10)) {
		names := New(Settings{Zone: "cluster.local"}).Plan(snapshot).(*Picture).names
		for name := range names {
			labels := strings.Split(name, ".")
			n := len(labels)
			if n < 3 || labels[n-1] != "svc" || names[strings.Join(labels[n-3:], ".")] == nil {
				t.Errorf("%s is below no Service", name)
			}
		}
	}
}

// More names than there is room for: the rest is left out, and none is said not to
// exist.
func TestCut(t *testing.T) {
	p := New(Settings{Zone: "cluster.local"}).Plan(town()).(*Picture)
	if !p.whole {
		t.Fatal("the town is not whole")
	}
	n := p.Len()
	if p.cut(n); !p.whole || p.Len() != n {
		t.Error("cut, though all fit")
	}
	if p.cut(5); p.whole || p.Len() != 5 || p.over != n-5 {
		t.Errorf("%d are left, whole is %v", p.Len(), p.whole)
	}
}

// spent is the processor time of this process: the machine may be busy.
func spent(t *testing.T) time.Duration {
	t.Helper()
	var used unix.Rusage
	must(t, unix.Getrusage(unix.RUSAGE_SELF, &used))
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// 100,000 names are in the kernel without anything quadratic, with at most 400 bytes each.
// How long it takes is logged; the limit has room for the race detector.
func TestManyNames(t *testing.T) {
	const n = 100_000
	empty := &model.Snapshot{Complete: true, Named: true}
	p := load(t, empty)
	names := p.layer.host.(*datapath).Maps[datapathMapNames]
	before := bpfmap.Bytes(names)
	many := &model.Snapshot{Complete: true, Named: true, Services: []*model.Service{named("kube-system", "kube-dns", "10.96.0.10", "fd00:96::a")}}
	for i := range n {
		many.Services = append(many.Services, named(fmt.Sprintf("namespace-%d", i%100), fmt.Sprintf("service-%06d", i), fmt.Sprintf("10.96.%d.%d", i>>8&255, i&255)))
	}
	best := time.Hour
	for range 3 {
		p.apply(empty)
		begun := spent(t)
		p.apply(many)
		best = min(best, spent(t)-begun)
	}
	each := float64(bpfmap.Bytes(names)-before) / n
	t.Logf("%d names in %v of processor time; %d bytes when empty, %.0f more for each", n, best, before, each)
	if total := float64(bpfmap.Bytes(names)) / n; total > 400 {
		t.Errorf("%.0f bytes a name", total)
	}
	if best > 20*time.Second {
		t.Errorf("%d names took %v of processor time", n, best)
	}
	if got := p.ask(asking(t, "service-099999.namespace-99.svc.cluster.local.", dnsmessage.TypeA, false)); got != "10.96.134.159" {
		t.Errorf("the last name: %s", got)
	}
}
