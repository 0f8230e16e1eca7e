package resolver

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	// chainMost is how many aliases are followed, as CoreDNS' rewriting and resolvers do; a
	// longer chain, or one that comes back to itself, is no answer.
	chainMost = 16
	// mostTTL and mostNegativeTTL bound what is kept: what CoreDNS' plugin cache has by
	// default (https://coredns.io/plugins/cache/); RFC 2308, 5 has 1 to 3 hours.
	mostTTL         = time.Hour
	mostNegativeTTL = 30 * time.Minute
)

var errLoop = errors.New("the aliases in the answer are too many, or lead in a circle")

// answer is what a server said, and of that only what was asked for.
type answer struct {
	rcode int
	// records are the aliases in their order, then the records of the type at their end.
	records []dns.RR
	// soa is the record of a negative answer (RFC 2308), nil where there is none.
	soa *dns.SOA
	// ttl is how long it may be kept: 0 is not at all.
	ttl time.Duration
}

// accept keeps of a server's message what answers the question: records of other names
// than those that the question leads to, and what was added, might be anybody's
// (RFC 5452, 6; RFC 2181, 5.4.1). The message has the question already.
func accept(name string, kind uint16, m *dns.Msg) (*answer, error) {
	if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		return nil, rcodeError(m.Rcode)
	}
	a := &answer{rcode: m.Rcode}
	at, err := a.follow(name, kind, m.Answer)
	if err != nil {
		return nil, err
	}
	if len(a.records) > 0 && a.records[len(a.records)-1].Header().Rrtype == kind {
		if m.Rcode != dns.RcodeSuccess {
			return nil, fmt.Errorf("%s with records of the type asked for", dns.RcodeToString[m.Rcode])
		}
		a.ttl = lowest(a.records, mostTTL)
		return a, nil
	}
	for _, record := range m.Ns {
		soa, ok := record.(*dns.SOA)
		if ok && soa.Hdr.Class == dns.ClassINET && below(at, strings.ToLower(soa.Hdr.Name)) {
			a.soa = soa
			break
		}
	}
	if a.soa == nil { // a referral, or a server that says no more: RFC 2308, 5 keeps none
		return a, nil
	}
	a.soa.Hdr.Ttl = min(a.soa.Hdr.Ttl, a.soa.Minttl)
	a.ttl = lowest(append([]dns.RR{a.soa}, a.records...), mostNegativeTTL)
	return a, nil
}

// follow collects the aliases from a name on, and the records of the type at the end of
// them; it returns the name there, in lower case.
func (a *answer) follow(name string, kind uint16, from []dns.RR) (string, error) {
	at := name
	for range chainMost {
		var alias *dns.CNAME
		found := false
		for _, record := range from {
			h := record.Header()
			if h.Class != dns.ClassINET || strings.ToLower(h.Name) != at {
				continue
			}
			if h.Rrtype == kind {
				a.records = append(a.records, record)
				found = true
			} else if c, ok := record.(*dns.CNAME); ok && alias == nil {
				alias = c
			}
		}
		if found || alias == nil {
			return at, nil
		}
		a.records = append(a.records, alias)
		at = strings.ToLower(alias.Target)
	}
	return "", errLoop
}

// lowest is the smallest TTL of records, at most most. One with its highest bit set is a
// large one (RFC 8767, 4).
func lowest(records []dns.RR, most time.Duration) time.Duration {
	for _, record := range records {
		most = min(most, time.Duration(record.Header().Ttl)*time.Second)
	}
	return most
}

// pack is the answer as a message.
func (a *answer) pack(k key) ([]byte, error) {
	m := &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: a.rcode}, Compress: true, Answer: a.records}
	m.Question = []dns.Question{{Name: k.name, Qtype: k.kind, Qclass: dns.ClassINET}}
	if a.soa != nil {
		m.Ns = []dns.RR{a.soa}
	}
	return m.Pack()
}

// pass counts down the TTLs of a message that has been kept for so long. Those of a stale
// one are what RFC 8767, 5 recommends.
func pass(m *dns.Msg, age time.Duration, stale bool) {
	age = age.Truncate(time.Second)
	for _, section := range [][]dns.RR{m.Answer, m.Ns} {
		for _, record := range section {
			h := record.Header()
			ttl := min(time.Duration(h.Ttl)*time.Second, mostTTL)
			if ttl = max(ttl-age, 0); stale {
				ttl = staleTTL
			}
			h.Ttl = uint32(ttl / time.Second)
		}
	}
}

// rcodeError is a server's refusal to answer.
type rcodeError int

// Error names the code.
func (e rcodeError) Error() string {
	if name, ok := dns.RcodeToString[int(e)]; ok {
		return "it answers " + name
	}
	return fmt.Sprintf("it answers with code %d", int(e))
}
