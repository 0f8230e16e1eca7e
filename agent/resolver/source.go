package resolver

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Source is what became of a query.
type Source int

// What may become of one.
const (
	// Cache: answered from what servers said before.
	Cache Source = iota
	// Stale: answered from what they said once, for none answers now.
	Stale
	// Upstream: a server was asked.
	Upstream
	// Cluster: answered from what the agent knows of the cluster.
	Cluster
	// HandedBack: for the cluster's DNS servers, for it is theirs or nobody could be asked.
	HandedBack
	// NotPlain: for them, for it is no plain question.
	NotPlain
	// Refused: for them, for the pod, or all pods, ask too much at once.
	Refused
	sources
)

var sourceNames = [sources]string{"cache", "stale", "upstream", "cluster", "handed_back", "not_plain", "refused"}

// String is the source's name in metrics.
func (s Source) String() string { return sourceNames[s] }

// Status is what a Resolver has done and is doing.
type Status struct {
	// Queries are counted by what became of them: the names of Source.
	Queries map[string]uint64
	// Entries are the answers that are kept, and Bytes their memory.
	Entries, Bytes int
	// Servers are those that are asked, and Down those of them that do not answer.
	Servers, Down []string
}

// Status says what the Resolver has done and is doing.
func (r *Resolver) Status() Status {
	s := Status{Queries: map[string]uint64{}}
	for i := range sources {
		s.Queries[i.String()] = r.counts[i].Load()
	}
	s.Entries, s.Bytes = r.cache.usage()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, server := range r.servers {
		s.Servers = append(s.Servers, server.String())
		if server.isDown() {
			s.Down = append(s.Down, server.String())
		}
	}
	return s
}

// spokenMost bounds the lines a second that queries make in the log.
const spokenMost = 100

// spoken counts lines of the log.
type spoken struct {
	mu     sync.Mutex
	second int64
	lines  int
}

// may says whether there is room for one more.
func (s *spoken) may(now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if second := now.Unix(); s.second != second {
		s.second, s.lines = second, 0
	}
	s.lines++
	return s.lines <= spokenMost
}

// Query is one that was answered or handed back.
type Query struct {
	At time.Time `json:"at"`
	// From is the pod as Resolve was told it.
	From string `json:"from"`
	// Name is as the pod wrote it, without the final dot.
	Name string `json:"name"`
	// Type is "A", "AAAA", "SRV" ...
	Type string `json:"type"`
	// By is what became of it, a name of Source.
	By string `json:"by"`
	// Rcode is "NOERROR", "NXDOMAIN"; empty if it was handed back.
	Rcode string `json:"rcode,omitempty"`
	// Records is the number of those in the answer.
	Records int `json:"records"`
	// Took is from its arrival to the answer, in microseconds.
	Took int64 `json:"took_us"`
}

// remembered is how many queries are.
const remembered = 1024

// history are the last queries.
type history struct {
	mu   sync.Mutex
	last [remembered]Query
	n    int
}

func (h *history) add(q Query) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last[h.n%remembered] = q
	h.n++
}

// Recent are the last queries, at most 1,024, the oldest first; those that were no plain
// question are left out.
func (r *Resolver) Recent() []Query {
	h := &r.history
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []Query
	for i := max(0, h.n-remembered); i < h.n; i++ {
		all = append(all, h.last[i%remembered])
	}
	return all
}

// tell remembers a query, and logs it where that is asked for.
func (r *Resolver) tell(from string, q *query, m *dns.Msg, source Source, begun time.Time) {
	one := Query{At: begun, From: from, Name: strings.TrimSuffix(q.written, "."), Type: dns.Type(q.kind).String(), By: source.String(), Took: r.now().Sub(begun).Microseconds()}
	if m != nil {
		one.Rcode, one.Records = dns.RcodeToString[m.Rcode], len(m.Answer)
	}
	r.history.add(one)
	if r.log.Enabled(context.Background(), slog.LevelDebug) && r.spoken.may(begun) {
		r.log.Debug("query", "from", from, "name", one.Name, "type", one.Type, "by", one.By, "rcode", one.Rcode, "records", one.Records, "took_us", one.Took)
	}
}
