package trace

import (
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer/trace/cause"
)

// readRules reads the firewall's rules in a namespace.
func (r *Reader) readRules(n Namespace) (all []cause.Rule) {
	if r.ruleRoom.take(1, 0) == 0 {
		r.note("firewall rules of %s: %d of other network namespaces are all that are read", n.Name, mostRulesInAll)
		return nil
	}
	rules, err := nft.In("").Rules() // the thread is there
	r.miss("firewall rules of "+n.Name, err)
	if kept := r.ruleRoom.take(len(rules), 1); kept < len(rules) {
		r.note("firewall rules of %s: %d of %d", n.Name, kept, len(rules))
		rules = rules[:kept]
	}
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

func keyOf(r *cause.Rule) ruleKey {
	return ruleKey{r.System, r.Family, r.Table, r.Chain, r.Hook, r.Handle, r.Policy}
}

// countsOf is how many packets each rule has counted.
func countsOf(all []cause.Rule) map[ruleKey]uint64 {
	counts := map[ruleKey]uint64{}
	for i := range all {
		counts[keyOf(&all[i])] = all[i].After
	}
	return counts
}

// bothCounts says of rules what each has counted before and after. One that was put in
// meanwhile has counted from zero; of a namespace that was not read before nothing is known.
func bothCounts(first *beginning, rules []cause.Rule) []cause.Rule {
	if first == nil {
		return rules
	}
	for i := range rules {
		rules[i].Before = min(first.rules[keyOf(&rules[i])], rules[i].After)
	}
	return rules
}
