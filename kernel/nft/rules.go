package nft

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
)

// Rule is a rule of somebody, or a chain's policy, that can end a packet's way or
// translate it.
type Rule struct {
	// System is "nftables", "iptables-nft" or "iptables-legacy".
	System string
	// Family is "ip", "ip6", "inet", "arp", "bridge" or "netdev".
	Family, Table, Chain string
	// Hook is "prerouting", "input", "forward", "output", "postrouting", "ingress" or
	// "egress". A rule that several hooks lead to is listed for each.
	Hook string
	// Handle is nftables' number of it; of iptables-legacy the place in its chain from 1.
	Handle uint64
	// Policy says that it is the policy of its chain.
	Policy bool
	// Verdict is "drop", "reject", "reject with tcp reset", "queue", "snat", "masquerade",
	// "dnat", "redirect".
	Verdict string
	// Text is the rule as a person would write it, as far as it is known here.
	Text, Comment string
	// States are the states of connections that it asks for.
	States []string
	// HasCounter says that Packets counts what met the verdict.
	HasCounter bool
	Packets    uint64
	// Rate says that it is about how much comes, or about chance.
	Rate bool

	set  *chainset
	rule *line
}

// Fit is how the conditions of a rule, and the way to it, fit a packet.
type Fit int

// Whether a rule fits.
const (
	Unknown Fit = iota
	Yes
	No
)

func (f Fit) and(g Fit) Fit {
	switch {
	case f == No || g == No:
		return No
	case f == Yes && g == Yes:
		return Yes
	}
	return Unknown
}

func (f Fit) not() Fit {
	switch f {
	case Yes:
		return No
	case No:
		return Yes
	}
	return Unknown
}

func fits(is bool) Fit {
	if is {
		return Yes
	}
	return No
}

// Matches says whether a packet, from its network header on, that came by the device in
// and goes by out ("" for none) meets the rule.
func (r *Rule) Matches(packet []byte, in, out string) Fit {
	return r.set.meets(parse(packet, in, out), r.rule)
}

// chainset are the chains of one table, or of all tables at which packets of a family
// look one after the other: they are told apart by their table.
type chainset struct {
	chains map[chainKey]*listedChain
	// compatible are the tables of iptables-nft.
	compatible map[string]bool
}

// listedChain is a chain with its rules.
type listedChain struct {
	key    chainKey
	family byte
	base   bool
	hook   string
	device string // of hooks of a device
	policy Rule
	drops  bool // its policy
	lines  []*line
	// from are the rules that lead here.
	from []*line
}

// line is one rule of a chain.
type line struct {
	chain      *listedChain
	place      int
	conditions []condition
	ends       bool // no rule of the chain comes after it for a packet that fits
	jump       string
	// branches is the verdict map that the rule looks into, and branch the rule as it is
	// for packets that the map leads to a chain.
	branches *elementList
	branch   func(to string) *line
	report   *Rule // nil if it neither ends nor translates
}

// condition says whether a packet fits; it may leave something in registers.
type condition func(p *packet, r *values) Fit

const deepest = 16 // chains below one another (NFT_JUMP_STACK_SIZE)

func (l *line) fits(p *packet) Fit {
	var r values
	fit := Yes
	for _, c := range l.conditions {
		if fit = fit.and(c(p, &r)); fit == No {
			return No
		}
	}
	return fit
}

// meets says whether a packet comes to a rule and fits.
func (s *chainset) meets(p *packet, l *line) Fit {
	fit := Yes
	if l.place >= 0 {
		fit = l.fits(p)
	}
	if fit == No {
		return No
	}
	return fit.and(s.comes(p, l, 0))
}

// comes says whether a packet gets as far as the rule.
func (s *chainset) comes(p *packet, l *line, depth int) Fit {
	chain := l.chain
	end := l.place
	if end < 0 {
		end = len(chain.lines) // the policy comes after all
	}
	fit := Yes
	for _, before := range chain.lines[:end] {
		if before.ends {
			if fit = fit.and(before.fits(p).not()); fit == No {
				return No
			}
		}
	}
	if chain.base {
		return fit
	}
	if depth >= deepest {
		return Unknown
	}
	way := No
	for _, from := range chain.from {
		switch from.fits(p).and(s.comes(p, from, depth+1)) {
		case Yes:
			return fit
		case Unknown:
			way = Unknown
		}
	}
	return fit.and(way)
}

// hooksOf are those that lead to a chain.
func (s *chainset) hooksOf(c *listedChain, seen map[*listedChain]bool) (hooks []string) {
	if c.base {
		return []string{c.hook}
	}
	if seen[c] {
		return nil
	}
	seen[c] = true
	for _, from := range c.from {
		for _, h := range s.hooksOf(from.chain, seen) {
			if !slices.Contains(hooks, h) {
				hooks = append(hooks, h)
			}
		}
	}
	return hooks
}

// link notes which rules lead to which chains.
func (s *chainset) link() {
	for _, c := range s.chains {
		for _, l := range c.lines {
			if to := s.chains[chainKey{c.key.table, l.jump}]; l.jump != "" && to != nil {
				to.from = append(to.from, l)
			}
			if l.branches == nil {
				continue
			}
			led := map[string]bool{}
			for _, e := range l.branches.elements {
				if to := s.chains[chainKey{c.key.table, e.jump}]; e.jump != "" && to != nil && !led[e.jump] {
					led[e.jump] = true
					to.from = append(to.from, l.branch(e.jump))
				}
			}
		}
	}
}

// reported are the rules that end or translate, for each hook that leads to them.
func (s *chainset) reported() (all []Rule) {
	for _, c := range s.chains {
		hooks := s.hooksOf(c, map[*listedChain]bool{})
		report := func(l *line, r Rule) {
			r.set, r.rule = s, l
			for _, h := range hooks {
				r.Hook = h
				all = append(all, r)
			}
		}
		for _, l := range c.lines {
			if l.report != nil {
				report(l, *l.report)
			}
		}
		if c.base && c.drops {
			report(&line{chain: c, place: -1}, c.policy)
		}
	}
	slices.SortFunc(all, func(a, b Rule) int {
		if a.Table+a.Chain != b.Table+b.Chain {
			if a.Table+a.Chain < b.Table+b.Chain {
				return -1
			}
			return 1
		}
		if a.Policy != b.Policy {
			if a.Policy {
				return 1
			}
			return -1
		}
		return int(int64(a.Handle) - int64(b.Handle))
	})
	return all
}

// mostRules is how many are read in one namespace; those beyond are not listed.
const mostRules = 100_000

// tooMany is the error of rules that are more.
type tooMany struct{ rules int }

func (t *tooMany) Error() string {
	return fmt.Sprintf("there are %d rules, and no more than %d are read: those that come later are not known", t.rules, mostRules)
}

// Rules lists the rules of everybody that can drop, refuse or translate packets, of
// nftables and of both kinds of iptables, in the namespace. The table of this package
// has none. It takes about ten microseconds a rule. The error may come with rules: those
// that were read.
func (n *Net) Rules() ([]Rule, error) {
	var all []Rule
	var beyond *tooMany
	for range 5 {
		found, err := n.everybodys()
		var absent *need.Feature
		if errors.As(err, &absent) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			break // without nftables there are none
		}
		if err == nil || errors.As(err, &beyond) {
			all = found
			break
		}
		if !errors.Is(err, errChanged) {
			return nil, fmt.Errorf("read the rules of nftables: %w", err)
		}
	}
	legacy, err := n.legacyRules()
	if beyond != nil {
		err = errors.Join(beyond, err)
	}
	return append(all, legacy...), err
}
