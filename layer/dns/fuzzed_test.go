package dns

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Queries that were damaged at random, 10 million of them where there is time for it: the
// program does with each what the mirror says, answers with a message that somebody else's
// parser reads, and never with more than 512 bytes, which is all that anybody can ask for
// without EDNS (RFC 1035, 2.3.4).
func TestFuzzedQueries(t *testing.T) {
	n := 100_000
	if os.Getenv("MILLRACE_LONG") != "" {
		n = 10_000_000
	}
	workers := runtime.GOMAXPROCS(0)
	for i := range workers {
		t.Run(fmt.Sprint("worker ", i+1), func(t *testing.T) {
			t.Parallel()
			fuzzed(t, rand.New(rand.NewPCG(11, uint64(i))), (n+workers-1)/workers)
		})
	}
}

// fuzzed asks so many queries of a program and tables of its own, half of them over IPv6.
func fuzzed(t *testing.T, random *rand.Rand, n int) {
	p := load(t, town())
	begun, learned := time.Now(), time.Time{}
	ratio, largest := 0.0, 0
	for i := range n {
		if time.Since(learned) > 2*time.Second { // what is known of names outside runs out
			p.learn(neighbours()...)
			learned = time.Now()
		}
		if i == n/6 {
			p.search(townSearch...)
		}
		query := damaged(random, p.mirror)
		answer := p.askOver(transports[i%2], query, p.mirror.decide(query))
		ratio, largest = max(ratio, float64(len(answer))/float64(max(len(query), 1))), max(largest, len(answer))
	}
	t.Logf("%d queries in %v:%s; the largest answer has %d bytes, %.1f times its query at most", n, time.Since(begun).Round(time.Second), p.counts(), largest, ratio)
	for o := range datapathOutcomeOUTCOME_UNSURE {
		if p.count(o) < uint64(n/1000) {
			t.Errorf("only %d queries were %s: the test is blind", p.count(o), p.word(o))
		}
	}
}

// damaged is a query of queryOf's, as it is or damaged in up to four places.
func damaged(random *rand.Rand, m *mirror) []byte {
	query := arbitraryQuery(random, m)
	for range max(0, random.IntN(10)-5) {
		query = damage(random, query, m)
	}
	return query[:min(len(query), 1400)]
}

// damage alters a message in one place.
func damage(random *rand.Rand, query []byte, m *mirror) []byte {
	if len(query) == 0 {
		return arbitraryQuery(random, m)
	}
	at := random.IntN(len(query))
	from, to := min(at, random.IntN(len(query)+1)), at
	switch random.IntN(9) {
	case 0: // a bit
		query[at] ^= 1 << random.IntN(8)
	case 1: // a byte that means something: lengths, pointers, types
		const telling = "\x00\x01\x02\x05\x0c\x0f\x10\x1c\x29\x3f\x40\x41\x80\xc0\xff"
		query[at] = telling[random.IntN(len(telling))]
	case 2: // more behind it
		for range 1 + random.IntN(40) {
			query = append(query, byte(random.Uint32()))
		}
	case 3: // less
		query = query[:at]
	case 4: // a piece is missing
		query = slices.Delete(query, from, to)
	case 5: // a piece twice
		query = slices.Insert(query, at, slices.Clone(query[from:to])...)
	case 6: // another message's end
		other := arbitraryQuery(random, m)
		query = append(query[:at:at], other[min(at, len(other)):]...)
	case 7: // a count or a flag of the header
		query[min(2+random.IntN(10), len(query)-1)] = byte(random.IntN(4))
	case 8: // an OPT record, or what looks like one
		opt := []byte{0, 0, byte(dnsmessage.TypeOPT), byte(random.IntN(20)), 208, 0, 0, byte(random.IntN(2) << 7), 0, 0, byte(random.IntN(12))}
		query = append(query, opt...)
		query[min(11, len(query)-1)] = 1
	}
	return query
}
