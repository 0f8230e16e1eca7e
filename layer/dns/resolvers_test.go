package dns

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/netns"
)

// Of ten questions for a name outside two are left, for the resolvers of glibc, musl and Go,
// without a pod's resolv.conf being edited, and they find the same. So it is with 3,000
// random names, and with 10,000 where there is time for it (MILLRACE_LONG).
func TestSearchListsOfEveryResolver(t *testing.T) {
	n := 3000
	if os.Getenv("MILLRACE_LONG") != "" {
		n = 10_000
	}
	h := newHamlet(t)
	asked := h.serve()
	l := h.open()
	list, ok := searchListOf(5, townSearch)
	if !ok {
		t.Fatal("no search list")
	}
	names, of := randomNames(n)
	must(t, l.Learn(of))
	for resolver, program := range lookupPrograms(t) {
		t.Run(resolver, func(t *testing.T) {
			h := *h
			h.t = t
			put := func(index int) []error {
				return l.tables.searches.Put([]uint32{uint32(index)}, []datapathSearchList{list})
			}
			if errs := put(h.device); errs != nil {
				t.Fatal(errs)
			}
			asked.Store(0)
			found, sent := h.counted(l, program, names)
			t.Logf("%d names by %d queries", len(names), sent)
			if sent != 2*len(names) || asked.Load() > 0 {
				t.Errorf("%d names took %d queries, not two each; the server got %d", len(names), sent, asked.Load())
			}
			some := names[:200]
			if errs := l.tables.searches.Delete([]uint32{uint32(h.device)}); errs != nil {
				t.Fatal(errs)
			}
			as, sent := h.counted(l, program, some)
			if sent != 10*len(some) || !slices.Equal(as, found[:len(some)]) {
				t.Errorf("%d names took %d queries without the list, not ten each; the same is found: %v", len(some), sent, slices.Equal(as, found[:len(some)]))
			}
			for i, name := range names {
				if want := addressesOf(of[2*i]); found[i] != want {
					t.Fatalf("%s is %s, not %s", name, found[i], want)
				}
			}
			if errs := put(h.device); errs != nil {
				t.Fatal(errs)
			}
			for _, row := range []struct {
				name, want string
				queries    int
			}{
				{"web", "10.96.0.20 fd00:96::20", 2},
				{"kube-dns.kube-system", "10.96.0.10 fd00:96::a", 2},
				{"web.shop.svc", "10.96.0.20 fd00:96::20", 2},
				{"web.shop.svc.cluster.local", "10.96.0.20 fd00:96::20", 2},
				{"web.shop.svc.cluster.local.", "10.96.0.20 fd00:96::20", 2},
				{names[0] + ".", found[0], 2},
			} {
				if got, sent := h.counted(l, program, []string{row.name}); got[0] != row.want || sent != row.queries {
					t.Errorf("%s is %q by %d queries, not %q by %d", row.name, got[0], sent, row.want, row.queries)
				}
			}
			if got, _ := h.counted(l, program, []string{"nosuch.example"}); got[0] != "" {
				t.Errorf("nosuch.example is %s", got[0])
			}
		})
	}
}

// randomNames are names outside and what is known of them; each is followed by what the
// host's domain makes of it, which does not exist; so are some others.
func randomNames(n int) (names []string, of []Outside) {
	random := rand.New(rand.NewPCG(9, 11))
	until := time.Now().Add(time.Hour)
	absent := Known{State: Absent, Until: until, SOA: soaOf("example.", 3600)}
	for i := range n {
		var name string
		for range 1 + random.IntN(3) {
			name += fmt.Sprintf("%x.", random.Uint64()>>(8*random.IntN(7)))
		}
		name += fmt.Sprintf("n%d.example", i) // with four dots at most
		a := Known{State: Addresses, Until: until, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}}
		aaaa := Known{State: NoData, Until: until, SOA: soaOf("example.", 3600)}
		if random.IntN(2) == 0 {
			aaaa = Known{State: Addresses, Until: until, Addresses: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", i+1))}}
		}
		if random.IntN(4) == 0 {
			chain := []Alias{cname(fmt.Sprintf("cdn%d.example.net", i), time.Hour)}
			a.Chain, aaaa.Chain = chain, chain
			if aaaa.State == NoData {
				aaaa.SOA = soaOf("example.net.", 3600)
			}
		}
		names = append(names, name)
		of = append(of, about(name, a, aaaa), about(name+".corp.example", absent, absent))
	}
	for _, name := range []string{"nosuch.example", "nosuch.example.corp.example", "web.shop.svc.cluster.local.corp.example"} {
		of = append(of, about(name, absent, absent))
	}
	return names, of
}

func addressesOf(o Outside) string {
	var words []string
	for _, addr := range slices.Concat(o.A.Addresses, o.AAAA.Addresses) {
		words = append(words, addr.String())
	}
	return strings.Join(words, " ")
}

// lookupPrograms look up the names on their input: by glibc's and musl's getaddrinfo, and
// by Go's own resolver.
func lookupPrograms(t *testing.T) map[string][]string {
	programs := map[string][]string{"go": {os.Args[0], "-test.run", "^TestAsGoProgram$"}}
	for library, compile := range map[string][]string{"glibc": {"cc"}, "musl": {"musl-gcc", "-static"}} {
		program := filepath.Join(t.TempDir(), library)
		if _, err := exec.LookPath(compile[0]); err != nil {
			t.Run(library, func(t *testing.T) { t.Skipf("needs %s, and there is none", compile[0]) })
			continue
		}
		compile = append(compile, "-O1", "-o", program, filepath.Join("testdata", "lookup.c"))
		if out, err := exec.Command(compile[0], compile[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", compile, err, out)
		}
		programs[library] = []string{program}
	}
	return programs
}

// counted has a program look names up in the pod, and says what it found for each and how
// many queries the pod sent for that.
func (h *hamlet) counted(l *Layer, program, names []string) (found []string, queries int) {
	h.t.Helper()
	conf := filepath.Join(h.t.TempDir(), "resolv.conf")
	text := fmt.Sprintf("nameserver %s\nsearch %s\noptions ndots:5\n", dns4.Addr(), strings.Join(townSearch, " "))
	must(h.t, os.WriteFile(conf, []byte(text), 0o644))
	before := queriesOf(h.t, l)
	command := exec.Command("unshare", append([]string{"--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, conf}, program...)...)
	command.Env = append(os.Environ(), "RESOLVE=-")
	command.Stdin = strings.NewReader(strings.Join(names, "\n") + "\n")
	var out bytes.Buffer
	command.Stdout, command.Stderr = &out, os.Stderr
	must(h.t, netns.Do(h.pod, command.Start))
	must(h.t, command.Wait())
	for line := range strings.Lines(out.String()) {
		if len(found) == len(names) {
			break // a test program says PASS at the end
		}
		words := strings.Fields(line)
		slices.SortFunc(words, func(a, b string) int { return netip.MustParseAddr(a).Compare(netip.MustParseAddr(b)) })
		found = append(found, strings.Join(slices.Compact(words), " "))
	}
	if len(found) != len(names) {
		h.t.Fatalf("%d lines for %d names:\n%s", len(found), len(names), out.String())
	}
	return found, queriesOf(h.t, l) - before
}

// queriesOf is how many queries the program has seen.
func queriesOf(t *testing.T, l *Layer) (n int) {
	t.Helper()
	d, err := l.Describe()
	must(t, err)
	for _, word := range slices.Collect(maps.Keys(d.Reasons)) {
		n += int(d.Reasons[word])
	}
	return n
}
