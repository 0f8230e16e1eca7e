package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/millrace/millrace/kernel/resolv"
)

// Who answers a query.
const (
	ByKernel  = "kernel"
	ByAgent   = "agent"
	ByServers = "servers"
)

// Sent is a query that a pod sends, and what becomes of it.
type Sent struct {
	Name string `json:"name"`
	// Type is A or AAAA.
	Type string `json:"type"`
	// By is who answers: ByKernel, ByAgent, or ByServers, those of the DNS Service.
	By string `json:"by"`
	// Outcome is the word of enum outcome that is counted for it; empty where nothing is,
	// because the layer is off or the pod asks another server.
	Outcome string `json:"outcome,omitempty"`
	// Answer is what the kernel says, or what was said when it was really asked; nil where
	// nobody knows.
	Answer *Answer `json:"answer"`
	// From is what the answer is made of: "Service shop/web".
	From string `json:"from,omitempty"`
	// Took is the median of how long an answer took, where it was really asked for; 0.
	Took time.Duration `json:"took_ns,omitempty"`
}

// Answer is what a message says.
type Answer struct {
	// Code is "NOERROR", "NXDOMAIN", "SERVFAIL" or another of RFC 6895.
	Code string `json:"code"`
	// Addresses are of the type that was asked for.
	Addresses []netip.Addr `json:"addresses"`
	// Alias is the name that they are of, where it is another one than was asked for.
	Alias string `json:"alias,omitempty"`
}

// String is "10.96.0.1", "NXDOMAIN", or "no address of this family".
func (a *Answer) String() string {
	switch {
	case a == nil:
		return "not known before it is asked for"
	case a.Code != codeOK:
		return a.Code
	case len(a.Addresses) == 0:
		return "no address of this family"
	}
	var words []string
	for _, addr := range a.Addresses {
		words = append(words, addr.String())
	}
	if a.Alias != "" {
		return a.Alias + ": " + strings.Join(words, ", ")
	}
	return strings.Join(words, ", ")
}

// Lookup is what the resolvers of some programs send for a name.
type Lookup struct {
	// Resolvers are those that send these queries: "glibc", "musl", "go".
	Resolvers []string `json:"resolvers"`
	Queries   []Sent   `json:"queries"`
	// Ends is how it ends: Found, NotFound, or NotKnown.
	Ends string `json:"ends"`
	// Count is how many queries are sent: each to all servers by musl, which asks them at
	// once. AtMost says that there may be fewer, for nobody knows an answer before it is
	// asked for.
	Count  int  `json:"count"`
	AtMost bool `json:"at_most"`
	// Uncollapsed is how many it would be if the kernel did not collapse the search list.
	Uncollapsed int `json:"uncollapsed"`
}

// Sum is a lookup in one line: "8 queries, 2 with the collapsed list; 2 by the kernel; found".
func (l Lookup) Sum() string {
	text := fmt.Sprintf("%d queries", l.Uncollapsed)
	if l.Count < l.Uncollapsed {
		text += fmt.Sprintf(", %d with the collapsed list", l.Count)
	}
	if l.AtMost {
		text = "at most " + text
	}
	for _, by := range []string{ByKernel, ByAgent, ByServers} {
		n := 0
		for _, q := range l.Queries {
			if q.By == by {
				n++
			}
		}
		if n > 0 {
			text += fmt.Sprintf("; %d by the %s", n, by)
		}
	}
	return text + "; " + l.Ends
}

// How lookups end.
const (
	Found    = "found"
	NotFound = "not found"
	NotKnown = "not known"
)

// resolvers are those that pods have.
var resolvers = []string{"glibc", "musl", "go"}

// asker says what becomes of a query.
type asker func(name, kind string) (Sent, error)

// lookups are what the resolvers send for a name with a resolv.conf; those that send the
// same are one. collapsed says what becomes of a query, and plain what would become of it if
// the search list were not collapsed.
func lookups(conf resolv.Conf, name string, collapsed, plain asker) (all []Lookup, err error) {
	for _, resolver := range resolvers {
		l, err := lookup(resolver, conf, name, collapsed)
		if err != nil {
			return nil, err
		}
		without, err := lookup(resolver, conf, name, plain)
		if err != nil {
			return nil, err
		}
		l.Uncollapsed = without.Count
		same := slices.IndexFunc(all, func(o Lookup) bool { return l.sameAs(o) })
		if same >= 0 {
			all[same].Resolvers = append(all[same].Resolvers, resolver)
			continue
		}
		all = append(all, l)
	}
	return all, nil
}

func (l Lookup) sameAs(o Lookup) bool {
	return l.Count == o.Count && l.Uncollapsed == o.Uncollapsed && l.Ends == o.Ends &&
		slices.EqualFunc(l.Queries, o.Queries, func(a, b Sent) bool { return a.Name == b.Name && a.Type == b.Type })
}

// lookup follows a resolver from candidate to candidate.
func lookup(resolver string, conf resolv.Conf, name string, ask asker) (l Lookup, err error) {
	l = Lookup{Resolvers: []string{resolver}, Ends: NotFound}
	all := candidates(resolver, conf, name)
	for i, candidate := range all {
		var both [2]Sent
		for k, kind := range []string{"A", "AAAA"} {
			if both[k], err = ask(candidate, kind); err != nil {
				return l, fmt.Errorf("%s %s: %w", candidate, kind, err)
			}
			l.Queries = append(l.Queries, both[k])
		}
		found, known, stop := judge(resolver, both)
		if found {
			l.Ends = Found
			break
		}
		if !known {
			l.Ends, l.AtMost = NotKnown, l.AtMost || i < len(all)-1
		}
		if stop {
			break
		}
	}
	l.Count = len(l.Queries)
	if resolver == "musl" {
		l.Count *= max(1, len(conf.Servers))
	}
	return l, nil
}

// judge says whether the answers to both families have an address, whether all is known of
// them, and whether the resolver goes no further.
func judge(resolver string, both [2]Sent) (found, known, stop bool) {
	known = true
	for _, q := range both {
		found = found || q.Answer != nil && len(q.Answer.Addresses) > 0
		known = known && q.Answer != nil
	}
	// musl tries the rest of the list after a name that does not exist, and not after one
	// that has no address, or a server that fails (name_from_dns of
	// https://git.musl-libc.org/cgit/musl/tree/src/network/lookup_name.c).
	stop = resolver == "musl" && known && both[0].Answer.Code != codeAbsent
	return found, known || found, stop
}

// candidates are the names that a resolver asks for, in its order, until one is found.
//
// glibc and Go try a name with at least ndots dots as it is first, and then the list
// (__res_context_search of https://sourceware.org/git/?p=glibc.git;f=resolv/res_query.c,
// nameList of https://go.dev/src/net/dnsclient_unix.go); musl does not try the list then
// (name_from_dns_search of lookup_name.c). With fewer dots all try the list, and then the
// name. One with a final dot is whole.
func candidates(resolver string, conf resolv.Conf, name string) (names []string) {
	plain := strings.TrimSuffix(name, ".")
	if plain != name {
		return []string{plain}
	}
	for _, suffix := range conf.Search {
		names = append(names, plain+"."+suffix)
	}
	switch {
	case strings.Count(plain, ".") < conf.Ndots:
		return append(names, plain)
	case resolver == "musl":
		return []string{plain}
	}
	return append([]string{plain}, names...)
}
