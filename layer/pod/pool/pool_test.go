package pool

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func ranges(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

func key(i int) Key { return Key{fmt.Sprintf("c%d", i), "eth0"} }

func opened(book Book, now time.Time, texts ...string) *Pool {
	p := Open(book, time.Minute, now)
	p.Use(ranges(texts...))
	return p
}

var begun = time.Unix(1_700_000_000, 0)

// What is given, in words.
func TestWhatIsGiven(t *testing.T) {
	for _, row := range []struct {
		name     string
		ranges   []string
		reserved string
		want     []string // of one pod after the other
	}{
		{"one family", []string{"10.1.0.0/29"}, "", []string{"10.1.0.1", "10.1.0.2"}},
		{"both", []string{"10.1.0.0/29", "fd00:1::/64"}, "", []string{"10.1.0.1 fd00:1::1", "10.1.0.2 fd00:1::2"}},
		{"the order of families is one", []string{"fd00:1::/64", "10.1.0.0/29"}, "", []string{"10.1.0.1 fd00:1::1"}},
		{"one after the other", []string{"10.1.0.0/30", "10.2.0.0/30"}, "", []string{"10.1.0.1", "10.1.0.2", "10.2.0.1", "10.2.0.2", "all addresses are in use of 10.1.0.0/30, 10.2.0.0/30"}},
		{"not the node's own", []string{"10.1.0.0/30"}, "10.1.0.1", []string{"10.1.0.2", "all addresses are in use of 10.1.0.0/30"}},
		{"a range of one", []string{"10.1.0.7/32", "fd00::7/128"}, "", []string{"10.1.0.7 fd00::7", "all addresses are in use of 10.1.0.7/32"}},
		{"a range of two", []string{"10.1.0.6/31"}, "", []string{"10.1.0.6", "10.1.0.7"}},
		{"bits behind the range", []string{"10.1.0.77/24"}, "", []string{"10.1.0.1"}},
		{"the end of all", []string{"255.255.255.252/30"}, "", []string{"255.255.255.253", "255.255.255.254", "all addresses are in use of 255.255.255.252/30"}},
		{"one family is full: nothing is taken of the other", []string{"10.1.0.0/24", "fd00::7/128"}, "", []string{"10.1.0.1 fd00::7", "all addresses are in use of fd00::7/128"}},
		{"none", nil, "", []string{"the node has no ranges for pods yet"}},
	} {
		p := opened(Book{}, begun, row.ranges...)
		if row.reserved != "" {
			p.Reserve([]netip.Addr{netip.MustParseAddr(row.reserved)})
		}
		for i, want := range row.want {
			lease, err := p.Take(Lease{Key: key(i)}, begun)
			got := ""
			for j, addr := range lease.Addresses {
				if j > 0 {
					got += " "
				}
				got += addr.String()
			}
			if err != nil {
				got = err.Error()
			}
			if got != want {
				t.Errorf("%s: pod %d gets %s, not %s", row.name, i, got, want)
			}
			if room := p.Room(); i+1 < len(row.want) && room == strings.HasPrefix(row.want[i+1], "all ") {
				t.Errorf("%s: after pod %d there is room: %v", row.name, i, room)
			}
			if _, held := p.Lease(key(i)); held != (err == nil) {
				t.Errorf("%s: pod %d: %v, and it holds something: %v", row.name, i, err, held)
			}
		}
	}
}

// Who comes again has what it had; what was given back rests, unless nothing else is free.
func TestRest(t *testing.T) {
	p := opened(Book{}, begun, "10.1.0.0/29") // six
	take := func(i int, now time.Time) string {
		t.Helper()
		lease, err := p.Take(Lease{Key: key(i)}, now)
		if err != nil {
			t.Fatal(err)
		}
		return lease.Addresses[0].String()
	}
	for i := range 6 {
		take(i, begun)
	}
	if again := take(3, begun); again != "10.1.0.4" {
		t.Errorf("the fourth pod asks again and gets %s", again)
	}
	p.Give(key(1), begun.Add(time.Second))
	p.Give(key(0), begun.Add(2*time.Second))
	if got := take(7, begun.Add(3*time.Second)); got != "10.1.0.2" {
		t.Errorf("all that is free rests: %s, not the one that has rested longest", got)
	}
	p.Give(key(5), begun.Add(30*time.Second))
	if got := take(8, begun.Add(63*time.Second)); got != "10.1.0.1" {
		t.Errorf("%s, not the one whose rest is over", got)
	}
	if _, err := p.Take(Lease{Key: key(9)}, begun.Add(64*time.Second)); err != nil {
		t.Error(err)
	}
	if _, err := p.Take(Lease{Key: key(10)}, begun.Add(64*time.Second)); !errors.Is(err, ErrFull) {
		t.Errorf("%v, not %v", err, ErrFull)
	}
}

// Whatever is taken and given back, forgotten and read again, at whatever time: no address
// has two holders, all are of the ranges, none is given while it rests and others are
// free, and what is remembered is the same after it was written down.
func TestNoAddressHasTwoHolders(t *testing.T) {
	file := File{filepath.Join(t.TempDir(), "book.json")}
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 1))
		now := begun
		sizes := [][]string{{"10.1.0.0/28"}, {"10.1.0.0/29", "10.9.0.0/29", "fd00:1::/125"}, {"10.1.0.0/24", "fd00:1::/64"}, {"fd00:1::/123", "fd00:2::/124"}}[seed%4]
		p := opened(Book{}, now, sizes...)
		given := map[netip.Addr]time.Time{} // when an address was given back last
		for range 300 {
			now = now.Add(time.Duration(r.IntN(8)) * time.Second)
			k := key(r.IntN(24))
			switch r.IntN(24) {
			case 0, 1, 2, 4, 5, 6, 7, 8:
				if lease, held := p.Lease(k); held {
					for _, addr := range lease.Addresses {
						given[addr] = now
					}
				}
				p.Give(k, now)
			case 3:
				if err := file.Write(p.Book()); err != nil {
					t.Fatal(err)
				}
				book, there, err := file.Read()
				if err != nil || !there {
					t.Fatal(there, err)
				}
				before := p.Book()
				p = opened(book, now, sizes...)
				p.wake(now)
				q := opened(before, now, sizes...)
				if got, want := p.Book(), q.Book(); !sameBook(got, want) {
					t.Fatalf("read again\n%v\nnot\n%v", got, want)
				}
			default:
				_, held := p.Lease(k)
				rested := anyRested(p, sizes, given, now)
				lease, err := p.Take(Lease{Key: k, Pod: "shop/web"}, now)
				if err != nil {
					if !errors.Is(err, ErrFull) {
						t.Fatal(err)
					}
					continue
				}
				for _, addr := range lease.Addresses {
					last, was := given[addr]
					if !held && was && now.Sub(last) < p.Cooldown && rested[familyOf(addr)] {
						t.Fatalf("seed %d: %s was given after %v, and others were free", seed, addr, now.Sub(last))
					}
				}
			}
			check(t, p, sizes)
		}
	}
}

func sameBook(a, b Book) bool {
	if len(a.Resting) != len(b.Resting) {
		return false
	}
	for i := range a.Resting {
		if a.Resting[i].Address != b.Resting[i].Address || !a.Resting[i].Until.Equal(b.Resting[i].Until) {
			return false
		}
	}
	return reflect.DeepEqual(a.Leases, b.Leases) && slices.Equal(a.Ranges, b.Ranges) && reflect.DeepEqual(a.Last, b.Last)
}

// anyRested says of each family whether an address is free that does not rest, by counting
// all there are.
func anyRested(p *Pool, texts []string, given map[netip.Addr]time.Time, now time.Time) (found [2]bool) {
	for _, r := range ranges(texts...) {
		first, last := ends(r)
		addr := first
		for range 300 {
			if addr.Compare(last) > 0 {
				break
			}
			if at, was := given[addr]; !p.holds(addr) && (!was || now.Sub(at) >= p.Cooldown) {
				found[familyOf(addr)] = true
			}
			addr = addr.Next()
		}
	}
	return found
}

func check(t *testing.T, p *Pool, texts []string) {
	t.Helper()
	holders := map[netip.Addr]Key{}
	for _, lease := range p.Leases() {
		var families [2]int
		for _, addr := range lease.Addresses {
			if other, twice := holders[addr]; twice {
				t.Fatalf("%s is held by %s and by %s", addr, other, lease.Key)
			}
			holders[addr] = lease.Key
			families[familyOf(addr)]++
			if _, rests := p.resting[addr]; rests {
				t.Fatalf("%s rests and is held", addr)
			}
			in := false
			for _, r := range ranges(texts...) {
				in = in || r.Contains(addr) && addr != r.Addr()
			}
			if !in {
				t.Fatalf("%s is not of %v", addr, texts)
			}
		}
		if families[0] > 1 || families[1] > 1 {
			t.Fatalf("%s holds %v", lease.Key, lease.Addresses)
		}
	}
	if len(holders) != len(p.holder) {
		t.Fatalf("%d addresses are noted as held, %d are", len(p.holder), len(holders))
	}
}

// What is found in the kernel is believed, unless it contradicts.
func TestAdopt(t *testing.T) {
	p := opened(Book{}, begun, "10.1.0.0/29")
	first := Lease{Key: key(0), Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.1")}}
	for range 2 {
		if err := p.Adopt(first); err != nil {
			t.Error(err)
		}
	}
	other := first
	other.Key = key(1)
	if err := p.Adopt(other); err == nil || err.Error() != "10.1.0.1 is held by container c0, interface eth0" {
		t.Error(err)
	}
	other = Lease{Key: key(0), Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.2")}}
	if err := p.Adopt(other); err == nil {
		t.Error("an interface holds other addresses")
	}
	if lease, err := p.Take(Lease{Key: key(2)}, begun); err != nil || lease.Addresses[0] != netip.MustParseAddr("10.1.0.2") {
		t.Error(lease, err)
	}
	p.Use(ranges("10.7.0.0/29"))
	if lease, held := p.Lease(key(0)); !held || lease.Addresses[0] != netip.MustParseAddr("10.1.0.1") {
		t.Error("other ranges took a pod's address away")
	}
	if lease, err := p.Take(Lease{Key: key(3)}, begun); err != nil || lease.Addresses[0] != netip.MustParseAddr("10.7.0.1") {
		t.Error(lease, err)
	}
}

// A clock that was ahead makes no address rest for years.
func TestClockThatWasAhead(t *testing.T) {
	addr := netip.MustParseAddr("10.1.0.1")
	p := Open(Book{Resting: []Rest{{addr, begun.Add(10000 * time.Hour)}}}, time.Minute, begun)
	p.wake(begun.Add(time.Minute))
	if len(p.resting) > 0 {
		t.Error(p.resting)
	}
}

// What is no book is said to be none, and a crash leaves the old one.
func TestFile(t *testing.T) {
	folder := t.TempDir()
	file := File{filepath.Join(folder, "book.json")}
	if book, there, err := file.Read(); err != nil || there || len(book.Leases) > 0 {
		t.Error(book, there, err)
	}
	book := Book{Leases: []Lease{{Key: key(1), Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.1")}}}}
	if err := file.Write(book); err != nil {
		t.Fatal(err)
	}
	// as a crash leaves it
	if err := os.WriteFile(file.Path+".next", []byte(`{"form`), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, there, err := file.Read(); err != nil || !there || !reflect.DeepEqual(got, book) {
		t.Error(got, there, err)
	}
	for _, text := range []string{`{"form`, `{"format":9}`, ``} {
		if err := os.WriteFile(file.Path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, there, err := file.Read(); err == nil || !there {
			t.Errorf("%q was read as a book", text)
		}
	}
	aside, err := file.SetAside()
	if err != nil || filepath.Dir(aside) != folder {
		t.Error(aside, err)
	}
	if err := file.Write(book); err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(file.Path); err != nil || info.Mode().Perm() != 0o600 {
		t.Error(info, err)
	}
	if err := os.WriteFile(file.Path+".next", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join(folder, "*"))
	if paths := file.Paths(); err != nil || !slices.Equal(found, slices.Sorted(slices.Values(paths))) {
		t.Errorf("there are %v, %v, and it says that there may be %v", found, err, paths)
	}
}
