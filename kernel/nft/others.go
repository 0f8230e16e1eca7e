package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
)

// Names say what in nftables, that of iptables-nft included, is one program's.
type Names struct {
	// Tables are its own altogether, of the families ip and ip6.
	Tables func(table string) bool
	// Chains are its own in the tables of iptables, which others use as well.
	Chains func(chain string) bool
	// Entries are those of Chains to which it jumps from iptables' built-in chains.
	Entries func(chain string) bool
}

// Part is something of one program in nftables: a table, a chain with its rules, or
// one rule that leads from somebody else's chain to it.
type Part struct {
	// Family is "ip" or "ip6".
	Family string
	Table  string
	// Chain is empty for a whole table.
	Chain string
	// Jump is, of a rule in Chain, where it leads.
	Jump string
	// Rules is how many there are in it.
	Rules int

	family byte
	handle []byte // of the rule
}

// String is `table ip kube-proxy`, `chain ip nat KUBE-SERVICES` or
// `rule in ip nat OUTPUT, jump KUBE-SERVICES`.
func (p Part) String() string {
	switch {
	case p.Chain == "":
		return fmt.Sprintf("table %s %s", p.Family, p.Table)
	case p.Jump != "":
		return fmt.Sprintf("rule in %s %s %s, jump %s", p.Family, p.Table, p.Chain, p.Jump)
	}
	return fmt.Sprintf("chain %s %s %s", p.Family, p.Table, p.Chain)
}

// iptables are the tables of iptables-nft.
var iptables = []string{"filter", "nat", "mangle", "raw", "security"}

// Find lists what is one program's. Kept are chains of its own to which somebody
// else's rule leads, with all to which they lead: to remove these would change what
// that rule does. It reads all rules, fifteen microseconds each where most are of
// iptables-nft.
func (n *Net) Find(names Names) (parts, kept []Part, err error) {
	for range 5 {
		if parts, kept, err = n.find(names); !errors.Is(err, errChanged) {
			break
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the rules of nftables: %w", err)
	}
	return parts, kept, nil
}

func (n *Net) find(names Names) (parts, kept []Part, err error) {
	s, err := n.dial(0)
	if err != nil {
		return nil, nil, err
	}
	defer s.close()
	for _, family := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6} {
		f := finding{names: names, family: family, own: map[chainKey]*Part{}, tables: map[string]*Part{}, base: map[chainKey]bool{}}
		for _, read := range []func(*socket) error{f.readTables, f.readChains, f.readRules} {
			if err := read(s); err != nil {
				return nil, nil, err
			}
		}
		mine, others := f.sort()
		parts, kept = append(parts, mine...), append(kept, others...)
	}
	return parts, kept, nil
}

// chainKey names a chain of one family.
type chainKey struct{ table, chain string }

// finding is the search in one family.
type finding struct {
	names  Names
	family byte
	tables map[string]*Part
	own    map[chainKey]*Part
	base   map[chainKey]bool // chains of anybody that packets meet by themselves
	jumps  []jumping         // to chains of its own
}

// jumping is a rule that leads from one chain to another of the same table.
type jumping struct {
	table, from, to string
	handle          []byte
}

func (f *finding) part(table, chain string) *Part {
	return &Part{Family: familyNames[f.family], Table: table, Chain: chain, family: f.family}
}

func (f *finding) readTables(s *socket) error {
	for m, err := range s.ask(unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP, f.family, nil) {
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil // a kernel without nftables has none
		}
		if err != nil {
			return err
		}
		if name := textOf(m.attributes, unix.NFTA_TABLE_NAME); f.names.Tables(name) {
			f.tables[name] = f.part(name, "")
		}
	}
	return nil
}

func (f *finding) readChains(s *socket) error {
	for m, err := range s.ask(unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP, f.family, nil) {
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		if err != nil {
			return err
		}
		key := chainKey{textOf(m.attributes, unix.NFTA_CHAIN_TABLE), textOf(m.attributes, unix.NFTA_CHAIN_NAME)}
		switch {
		case !slices.Contains(iptables, key.table):
		case find(m.attributes, unix.NFTA_CHAIN_HOOK) != nil:
			f.base[key] = true
		case f.names.Chains(key.chain):
			f.own[key] = f.part(key.table, key.chain)
		}
	}
	return nil
}

func (f *finding) readRules(s *socket) error {
	if len(f.tables)+len(f.own) == 0 {
		return nil
	}
	for m, err := range s.ask(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, f.family, nil) {
		if err != nil {
			return err
		}
		key := chainKey{textOf(m.attributes, unix.NFTA_RULE_TABLE), textOf(m.attributes, unix.NFTA_RULE_CHAIN)}
		if table := f.tables[key.table]; table != nil {
			table.Rules++
		}
		if own := f.own[key]; own != nil {
			own.Rules++
		}
		for _, to := range leadsTo(m.attributes) {
			if f.own[chainKey{key.table, to}] != nil {
				handle := slices.Clone(find(m.attributes, unix.NFTA_RULE_HANDLE))
				f.jumps = append(f.jumps, jumping{key.table, key.chain, to, handle})
			}
		}
	}
	return nil
}

// leadsTo are the chains to which a rule jumps or goes.
func leadsTo(rule []byte) (chains []string) {
	for _, e := range listed(find(rule, unix.NFTA_RULE_EXPRESSIONS)) {
		if string(trim(find(e.value, unix.NFTA_EXPR_NAME))) != "immediate" {
			continue
		}
		data := find(find(e.value, unix.NFTA_EXPR_DATA), unix.NFTA_IMMEDIATE_DATA)
		if chain := textOf(find(data, unix.NFTA_DATA_VERDICT), unix.NFTA_VERDICT_CHAIN); chain != "" {
			chains = append(chains, chain)
		}
	}
	return chains
}

// sort tells what can go from what somebody else needs.
func (f *finding) sort() (parts, kept []Part) {
	needed := map[chainKey]bool{}
	for _, j := range f.jumps {
		from := chainKey{j.table, j.from}
		switch {
		case f.own[from] != nil:
		case f.base[from] && f.names.Entries(j.to):
			rule := *f.part(j.table, j.from)
			rule.Jump, rule.Rules, rule.handle = j.to, 1, j.handle
			parts = append(parts, rule)
		default:
			needed[chainKey{j.table, j.to}] = true
		}
	}
	for more := true; more; {
		more = false
		for _, j := range f.jumps {
			to := chainKey{j.table, j.to}
			if needed[chainKey{j.table, j.from}] && !needed[to] {
				needed[to], more = true, true
			}
		}
	}
	for key, chain := range f.own {
		if needed[key] {
			kept = append(kept, *chain)
		} else {
			parts = append(parts, *chain)
		}
	}
	for _, table := range f.tables {
		parts = append(parts, *table)
	}
	order(parts)
	order(kept)
	return parts, kept
}

// order sorts by what is said of a part; rules that jump come before chains.
func order(parts []Part) {
	rank := func(p Part) string {
		if p.Jump != "" {
			return p.Table + " 0 " + p.Chain + " " + p.Jump
		}
		return p.Table + " 1 " + p.Chain
	}
	slices.SortFunc(parts, func(a, b Part) int {
		switch x, y := rank(a), rank(b); {
		case x < y:
			return -1
		case x > y:
			return 1
		}
		return 0
	})
}

// Take removes parts, as Find gives them, in one transaction: all or none. With hold
// the connections whose addresses are translated go on being translated, whoever's
// rules said so: see Held.
func (n *Net) Take(parts []Part, hold bool) error {
	s, err := n.dial(0)
	if err != nil {
		return err
	}
	defer s.close()
	var steps []step
	if hold {
		steps = holdSteps()
	}
	for _, stage := range []func(Part) (step, bool){jumpOf, rulesOf, chainOf, tableOf} {
		for _, p := range parts {
			if one, ok := stage(p); ok {
				one.family = p.family
				steps = append(steps, one)
			}
		}
	}
	err = s.commit(steps)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("remove %d parts of nftables: a chain is still used by a rule that was not seen: nothing was changed, try again: %w", len(parts), err)
	}
	if err != nil {
		return fmt.Errorf("remove %d parts of nftables: nothing was changed: %w", len(parts), err)
	}
	return nil
}

func jumpOf(p Part) (step, bool) {
	name := attributes(nil).text(unix.NFTA_RULE_TABLE, p.Table).text(unix.NFTA_RULE_CHAIN, p.Chain).put(unix.NFTA_RULE_HANDLE, p.handle)
	return step{message: unix.NFT_MSG_DELRULE, attributes: name}, p.Jump != ""
}

// rulesOf removes a chain's rules: those that lead to others have to go first.
func rulesOf(p Part) (step, bool) {
	name := attributes(nil).text(unix.NFTA_RULE_TABLE, p.Table).text(unix.NFTA_RULE_CHAIN, p.Chain)
	return step{message: unix.NFT_MSG_DELRULE, attributes: name}, p.Chain != "" && p.Jump == ""
}

func chainOf(p Part) (step, bool) {
	name := attributes(nil).text(unix.NFTA_CHAIN_TABLE, p.Table).text(unix.NFTA_CHAIN_NAME, p.Chain)
	return step{message: unix.NFT_MSG_DELCHAIN, attributes: name}, p.Chain != "" && p.Jump == ""
}

func tableOf(p Part) (step, bool) {
	return step{message: unix.NFT_MSG_DELTABLE, attributes: attributes(nil).text(unix.NFTA_TABLE_NAME, p.Table)}, p.Chain == ""
}

// HoldTable is the name of the table, of the family inet, that Take leaves with
// hold.
const HoldTable = "millrace-hold"

const holdComment = "connections that are translated go on being so; remove: millrace kube-proxy remove"

// holdSteps make a table that translates nothing, and keeps what does. When the last
// nat chain goes, the kernel takes its translation away from the hooks
// (nf_nat_unregister_fn), and when the last rule that looks at connections goes, it
// stops tracking them: connections that are translated would break in the middle. A
// nat chain in the family inet keeps both, for both families, for it has a rule
// that looks at connections. Being one, it also keeps `auto` from bypassing
// connection tracking.
func holdSteps() []step {
	const accept, afterAll = 1, 300
	text := append([]byte{0, byte(len(holdComment) + 1)}, holdComment...)
	table := attributes(nil).text(unix.NFTA_TABLE_NAME, HoldTable)
	chain := attributes(nil).
		text(unix.NFTA_CHAIN_TABLE, HoldTable).
		text(unix.NFTA_CHAIN_NAME, "postrouting").
		nest(unix.NFTA_CHAIN_HOOK, attributes(nil).
			number(unix.NFTA_HOOK_HOOKNUM, unix.NF_INET_POST_ROUTING).
			number(unix.NFTA_HOOK_PRIORITY, afterAll)).
		number(unix.NFTA_CHAIN_POLICY, accept).
		text(unix.NFTA_CHAIN_TYPE, "nat")
	rule := attributes(nil).
		text(unix.NFTA_RULE_TABLE, HoldTable).
		text(unix.NFTA_RULE_CHAIN, "postrouting").
		nest(unix.NFTA_RULE_EXPRESSIONS, attributes(nil).translated())
	return []step{
		// Adding what may be there already, so that it can be deleted.
		{message: unix.NFT_MSG_NEWTABLE, flags: unix.NLM_F_CREATE, attributes: table},
		{message: unix.NFT_MSG_DELTABLE, attributes: table},
		{message: unix.NFT_MSG_NEWTABLE, flags: unix.NLM_F_CREATE, attributes: slices.Clip(table).put(tableUserdata, append(text, 0))},
		{message: unix.NFT_MSG_NEWCHAIN, flags: unix.NLM_F_CREATE, attributes: chain},
		{message: unix.NFT_MSG_NEWRULE, flags: unix.NLM_F_CREATE | unix.NLM_F_APPEND, attributes: rule},
	}
}

// destinationTranslated is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const destinationTranslated = 1 << 5

// translated is `ct status dnat`.
func (a attributes) translated() attributes {
	number := func(n uint32) attributes {
		return attributes(nil).put(unix.NFTA_DATA_VALUE, host.AppendUint32(nil, n))
	}
	return a.
		expression("ct", attributes(nil).
			number(unix.NFTA_CT_DREG, unix.NFT_REG_1).
			number(unix.NFTA_CT_KEY, unix.NFT_CT_STATUS)).
		expression("bitwise", attributes(nil).
			number(unix.NFTA_BITWISE_SREG, unix.NFT_REG_1).
			number(unix.NFTA_BITWISE_DREG, unix.NFT_REG_1).
			number(unix.NFTA_BITWISE_LEN, 4).
			nest(unix.NFTA_BITWISE_MASK, number(destinationTranslated)).
			nest(unix.NFTA_BITWISE_XOR, number(0))).
		expression("cmp", attributes(nil).
			number(unix.NFTA_CMP_SREG, unix.NFT_REG_1).
			number(unix.NFTA_CMP_OP, unix.NFT_CMP_NEQ).
			nest(unix.NFTA_CMP_DATA, number(0)))
}

// Held says whether the table of Take with hold is there.
func (n *Net) Held() (bool, error) {
	s, err := n.dial(0)
	if err != nil {
		var absent *need.Feature
		if errors.As(err, &absent) {
			return false, nil
		}
		return false, err
	}
	defer s.close()
	_, err = s.object(unix.NFT_MSG_GETTABLE, attributes(nil).text(unix.NFTA_TABLE_NAME, HoldTable))
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read table inet %s: %w", HoldTable, err)
	}
	return true, nil
}

// Release removes the table of Take with hold; that it is not there is no error.
func (n *Net) Release() error {
	s, err := n.dial(0)
	if err != nil {
		return err
	}
	defer s.close()
	table := attributes(nil).text(unix.NFTA_TABLE_NAME, HoldTable)
	err = s.commit([]step{
		{message: unix.NFT_MSG_NEWTABLE, flags: unix.NLM_F_CREATE, attributes: table},
		{message: unix.NFT_MSG_DELTABLE, attributes: table},
	})
	if err != nil {
		return fmt.Errorf("remove table inet %s: %w", HoldTable, err)
	}
	return nil
}

// Translated counts the connections that are tracked and whose destination is
// translated. It reads the whole table, about two microseconds an entry.
func (n *Net) Translated() (count int, err error) {
	const status = 3 // CTA_STATUS
	s, err := n.dial(0)
	if err != nil {
		return 0, err
	}
	defer s.close()
	for m, err := range s.request(ctGet, unix.NLM_F_DUMP, unix.AF_UNSPEC, nil) {
		switch value := find(m.attributes, status); {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
			return 0, &need.Feature{Act: "count translated connections", Feature: "ctnetlink", Since: "CONFIG_NF_CT_NETLINK"}
		case errors.Is(err, errChanged):
		case err != nil:
			return 0, fmt.Errorf("count translated connections: %w", err)
		case len(value) == 4 && binary.BigEndian.Uint32(value)&destinationTranslated != 0:
			count++
		}
	}
	return count, nil
}
