package trace

import (
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer/trace/cause"
)

// readRules reads the firewall's rules in a namespace.
func (r *Reader) readRules(n Namespace) (all []cause.Rule) {
	rules, err := nft.In("").Rules() // the thread is there
	r.miss("firewall rules", err)
	for _, rule := range rules {
		all = append(all, cause.Rule{
			System: rule.System, Family: rule.Family, Table: rule.Table, Chain: rule.Chain, Hook: rule.Hook, Handle: rule.Handle,
			Policy: rule.Policy, Verdict: rule.Verdict, Text: rule.Text, Comment: rule.Comment, States: rule.States,
			HasCounter: rule.HasCounter, Before: rule.Packets, After: rule.Packets, Rate: rule.Rate,
			Matches: func(packet []byte, in, out string) cause.Fit { return fitOf[rule.Matches(packet, in, out)] },
		})
	}
	return all
}

var fitOf = map[nft.Fit]cause.Fit{nft.Unknown: cause.Unknown, nft.Yes: cause.Yes, nft.No: cause.No}

// ruleKey tells rules apart within a namespace.
type ruleKey struct {
	system, family, table, chain, hook string
	handle                             uint64
	policy                             bool
}

// bothCounts joins two readings of the same rules: what each has counted before and after.
// One that was put in meanwhile has counted from zero.
func bothCounts(before, after []cause.Rule) []cause.Rule {
	key := func(r cause.Rule) ruleKey {
		return ruleKey{r.System, r.Family, r.Table, r.Chain, r.Hook, r.Handle, r.Policy}
	}
	first := map[ruleKey]uint64{}
	for _, r := range before {
		first[key(r)] = r.After
	}
	for i := range after {
		after[i].Before = min(first[key(after[i])], after[i].After)
	}
	return after
}
