package resolver

import (
	"slices"
	"strings"

	"github.com/miekg/dns"
)

const (
	// mostUDP is what is said to servers, and the most that a pod is answered, in bytes: it
	// crosses every path in one piece (DNS flag day 2020, https://www.dnsflagday.net/2020/).
	mostUDP = 1232
	// leastUDP is what every client can take (RFC 1035, 2.3.4).
	leastUDP = dns.MinMsgSize
	// mostQuery is the longest query that is looked at: a name has 255 bytes at most.
	mostQuery = 512
)

// query is a question that is understood whole.
type query struct {
	id uint16
	// written is the name as the pod wrote it, name the same in lower case; both end with a
	// dot.
	written, name string
	kind          uint16
	// recursive says that others may be asked (RD).
	recursive bool
	// edns says that it came with an OPT record, size is the longest answer it takes.
	edns bool
	size int
}

// read takes a message apart; ok is false for all that is no plain question, and so is for
// others to answer: other classes and operations, more than one question, DNSSEC's bits DO
// and CD, EDNS options but a cookie, types that are no data.
func read(message []byte) (q query, ok bool) {
	if len(message) > mostQuery {
		return q, false
	}
	var m dns.Msg
	if m.Unpack(message) != nil {
		return q, false
	}
	if m.Response || m.Opcode != dns.OpcodeQuery || m.Rcode != 0 || m.CheckingDisabled || m.Truncated || m.Authoritative || m.Zero ||
		len(m.Question) != 1 || len(m.Answer) > 0 || len(m.Ns) > 0 || len(m.Extra) > 1 {
		return q, false
	}
	question := m.Question[0]
	q = query{id: m.Id, written: question.Name, name: strings.ToLower(question.Name), kind: question.Qtype, recursive: m.RecursionDesired, size: leastUDP}
	if question.Qclass != dns.ClassINET || !forwarded(q.kind) {
		return q, false
	}
	if len(m.Extra) == 1 {
		opt, isOPT := m.Extra[0].(*dns.OPT)
		if !isOPT || opt.Version() != 0 || opt.Do() || !passable(opt.Option) || opt.Hdr.Name != "." || opt.Hdr.Ttl != 0 {
			return q, false
		}
		q.edns, q.size = true, min(max(int(opt.UDPSize()), leastUDP), mostUDP)
	}
	return q, true
}

// passable says whether options are none that an answer would have to heed: a cookie is for
// servers that know cookies, and others leave it out (RFC 6891, 6.1.2). dig sends one.
func passable(options []dns.EDNS0) bool {
	return !slices.ContainsFunc(options, func(o dns.EDNS0) bool { return o.Option() != dns.EDNS0COOKIE })
}

// forwarded says whether a type is one of records that can be asked for and kept. Those
// that are not are DNSSEC's, which come with others, transfers, and what is about the
// message (RFC 6895, 3.1).
func forwarded(kind uint16) bool {
	switch kind {
	case dns.TypeNone, dns.TypeOPT, dns.TypeRRSIG, dns.TypeSIG, dns.TypeNSEC, dns.TypeNSEC3, dns.TypeANY:
		return false
	}
	return kind < 128 || kind > 255 // meta types and QTYPEs
}

// reply answers a query with what is in m: AA, records and rcode. It is cut where it does
// not fit, and says so (TC). RA is not set for the cluster's zone, as by CoreDNS.
func (q *query) reply(m *dns.Msg) ([]byte, error) {
	m.Id, m.Response, m.Opcode, m.RecursionDesired, m.RecursionAvailable = q.id, true, dns.OpcodeQuery, q.recursive, !m.Authoritative
	m.AuthenticatedData, m.CheckingDisabled, m.Zero = false, false, false
	m.Question = []dns.Question{{Name: q.written, Qtype: q.kind, Qclass: dns.ClassINET}}
	for _, record := range m.Answer { // as the pod wrote it, which is also shorter on the wire
		if h := record.Header(); strings.EqualFold(h.Name, q.written) {
			h.Name = q.written
		}
	}
	if q.edns {
		opt := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		opt.SetUDPSize(mostUDP)
		m.Extra = append(m.Extra, opt)
	}
	m.Compress = true
	m.Truncate(q.size)
	return m.Pack()
}

// below says whether a name is a zone or in it; both are in lower case and end with a dot.
func below(name, zone string) bool { return dns.IsSubDomain(zone, name) }
