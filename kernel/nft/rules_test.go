package nft

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// packetOf is the beginning of a TCP or UDP packet of IPv4; a TCP one opens a connection
// unless flags say otherwise.
func packetOf(proto byte, from, to string, flags ...byte) []byte {
	source, target := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	raw := make([]byte, 40)
	raw[0], raw[8], raw[9] = 0x45, 64, proto
	copy(raw[12:], source.Addr().AsSlice())
	copy(raw[16:], target.Addr().AsSlice())
	binary.BigEndian.PutUint16(raw[20:], source.Port())
	binary.BigEndian.PutUint16(raw[22:], target.Port())
	raw[33] = 2
	if len(flags) > 0 {
		raw[33] = flags[0]
	}
	return raw
}

const everyKind = `
table inet walls {
	set bad {
		type ipv4_addr
		flags interval
		elements = { 10.66.0.0/16, 192.0.2.9 }
	}
	chain sub {
		tcp dport 8080 counter drop comment "block web"
		ip saddr @bad udp dport { 53, 100-200 } reject
		ip daddr 203.0.113.0/24 tcp sport != 22 reject with tcp reset
	}
	chain walls {
		type filter hook forward priority 0; policy drop;
		ct state established,related accept
		ct state invalid counter drop
		iifname "left*" jump sub
		tcp dport vmap { 22 : accept, 23 : drop }
		udp dport 9 limit rate over 10/second drop
		tcp dport 80 accept
	}
	chain out {
		type nat hook postrouting priority 100;
		ip protocol tcp snat ip to 10.9.9.9:1000-1003
	}
}
table ip asleep {
	flags dormant
	chain forward {
		type filter hook forward priority 0;
		drop
	}
}
`

// find is the one rule whose text has all the words.
func (b *bed) rule(rules []Rule, words ...string) *Rule {
	b.t.Helper()
	var found *Rule
	for i := range rules {
		text := strings.Join([]string{rules[i].System, rules[i].Family, rules[i].Chain, rules[i].Hook, rules[i].Verdict, rules[i].Text, rules[i].Comment}, " ")
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(text, w) }) {
			found = &rules[i]
		}
	}
	if found == nil {
		b.t.Fatalf("no rule with %q among %+v", words, rules)
	}
	return found
}

func TestRulesMeetPackets(t *testing.T) {
	b := newBed(t)
	b.run(everyKind, "nft", "-f", "-")
	rules, err := b.Rules()
	b.must(err)
	if slices.ContainsFunc(rules, func(r Rule) bool { return r.Table == "asleep" }) {
		t.Error("a table that is switched off is listed")
	}
	web, names := b.rule(rules, "8080"), b.rule(rules, "sub", "@bad")
	reset, telnet := b.rule(rules, "tcp reset"), b.rule(rules, "map")
	policy, invalid := b.rule(rules, "policy"), b.rule(rules, "invalid")
	rate, nat := b.rule(rules, "limit"), b.rule(rules, "snat to 10.9.9.9:1000-1003")
	if web.Comment != "block web" || !web.HasCounter || web.Hook != "forward" || web.Verdict != "drop" || web.Handle == 0 {
		t.Errorf("the rule about the port: %+v", web)
	}
	if !slices.Equal(invalid.States, []string{"invalid"}) || !rate.Rate || nat.Hook != "postrouting" || nat.Verdict != "snat" || !policy.Policy {
		t.Errorf("%+v, %+v, %+v, %+v", invalid, rate, nat, policy)
	}
	open := func(to string) []byte { return packetOf(unix.IPPROTO_TCP, "10.0.0.1:40000", to) }
	for _, row := range []struct {
		rule   *Rule
		packet []byte
		in     string
		want   Fit
	}{
		{web, open("10.0.0.2:8080"), "left0", Unknown}, // it may be invalid, and die before
		{web, open("10.0.0.2:8081"), "left0", No},
		{web, open("10.0.0.2:8080"), "right", No}, // does not come to the chain
		{names, packetOf(unix.IPPROTO_UDP, "10.66.3.4:5000", "10.0.0.2:150"), "left0", Unknown},
		{names, packetOf(unix.IPPROTO_UDP, "10.67.3.4:5000", "10.0.0.2:150"), "left0", No},
		{names, packetOf(unix.IPPROTO_UDP, "192.0.2.9:5000", "10.0.0.2:201"), "left0", No},
		{reset, open("203.0.113.7:99"), "left0", Unknown},
		{reset, open("203.0.114.7:99"), "left0", No},
		{telnet, open("10.0.0.2:23"), "right", Unknown},
		{telnet, open("10.0.0.2:22"), "right", No},
		{policy, open("10.0.0.2:80"), "right", No}, // accepted before
		{policy, open("10.0.0.2:81"), "right", Unknown},
		{rate, open("10.0.0.2:9"), "right", No}, // of UDP
		{invalid, open("10.0.0.2:81"), "right", Unknown},
	} {
		if got := row.rule.Matches(row.packet, row.in, ""); got != row.want {
			t.Errorf("%s, packet from %s by %s: %v, not %v", row.rule.Text, row.packet[12:24], row.in, got, row.want)
		}
	}
	if got := b.rule(rules, "snat").Matches(open("10.0.0.2:1"), "", "right"); got != Yes {
		t.Errorf("translation: %v", got)
	}
}

func TestRulesOfIPTables(t *testing.T) {
	b := newBed(t)
	for _, tool := range []string{"iptables-legacy", "iptables-nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("no %s", tool)
		}
		b.run("", tool, "-A", "FORWARD", "-s", "10.1.0.0/16", "-i", "left+", "-p", "tcp", "-m", "multiport", "--dports", "80,90:95", "-m", "comment", "--comment", "why", "-j", "DROP")
		b.run("", tool, "-N", "deeper")
		b.run("", tool, "-A", "INPUT", "-j", "deeper")
		b.run("", tool, "-A", "deeper", "-p", "udp", "--dport", "53", "-j", "RETURN")
		b.run("", tool, "-A", "deeper", "-p", "udp", "-j", "REJECT")
		b.run("", tool, "-P", "OUTPUT", "DROP")
	}
	rules, err := b.Rules()
	b.must(err)
	tcp := func(from, to string) []byte { return packetOf(unix.IPPROTO_TCP, from, to) }
	udp := func(to string) []byte { return packetOf(unix.IPPROTO_UDP, "10.1.0.1:9", to) }
	for _, system := range []string{"iptables-legacy", "iptables-nft"} {
		ports, deeper, policy := b.rule(rules, system, "FORWARD", "why"), b.rule(rules, system, "deeper", "input", "reject"), b.rule(rules, system, "OUTPUT", "policy")
		if ports.Verdict != "drop" || ports.Hook != "forward" || !ports.HasCounter || policy.Hook != "output" {
			t.Errorf("%+v, %+v", ports, policy)
		}
		for _, row := range []struct {
			rule   *Rule
			packet []byte
			in     string
			want   Fit
		}{
			{ports, tcp("10.1.2.3:4", "10.0.0.1:92"), "left7", Yes},
			{ports, tcp("10.1.2.3:4", "10.0.0.1:96"), "left7", No},
			{ports, tcp("10.2.2.3:4", "10.0.0.1:80"), "left7", No},
			{ports, tcp("10.1.2.3:4", "10.0.0.1:80"), "right", No},
			{ports, udp("10.0.0.1:80"), "left7", No},
			{deeper, udp("10.0.0.1:54"), "left7", Yes},
			{deeper, udp("10.0.0.1:53"), "left7", No},
			{policy, tcp("10.1.2.3:4", "10.0.0.1:80"), "", Yes},
		} {
			if got := row.rule.Matches(row.packet, row.in, ""); got != row.want {
				t.Errorf("%s: %s by %s: %v, not %v", system, row.rule.Text, row.in, got, row.want)
			}
		}
	}
}

// Of more rules than are read the first are told, and how many there are.
func TestMoreRulesThanAreRead(t *testing.T) {
	if os.Getenv("MILLRACE_LONG") == "" {
		t.Skip("set MILLRACE_LONG=1 to run it")
	}
	b := newBed(t)
	text := strings.Repeat("ip saddr 10.0.0.1 drop\n", mostRules+7)
	b.run("table ip t {\nchain c {\ntype filter hook input priority 0;\n"+text+"}\n}\n", "nft", "-f", "-")
	rules, err := b.Rules()
	var more *tooMany
	if !errors.As(err, &more) || more.rules != mostRules+7 || len(rules) != mostRules {
		t.Errorf("%d rules are read: %v", len(rules), err)
	}
}

// A header of IPv4 that says that it is shorter than any has nothing behind it.
func TestAHeaderThatIsTooShort(t *testing.T) {
	for first, want := range map[byte]int{0x40: -1, 0x44: -1, 0x45: 20, 0x46: 24} {
		raw := append(packetOf(unix.IPPROTO_TCP, "10.0.0.1:1", "10.0.0.2:2"), make([]byte, 8)...)
		raw[0] = first
		if p := parse(raw, "", ""); p.transport != want {
			t.Errorf("first byte %#x: the transport header is at %d, not %d", first, p.transport, want)
		}
	}
}

// Whatever bytes come as a packet, no rule falls over them.
func FuzzRulesMeetPackets(f *testing.F) {
	f.Add([]byte{0x45, 0, 0, 20})
	f.Add(packetOf(unix.IPPROTO_TCP, "10.0.0.1:1", "10.0.0.2:2"))
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 8, 44, 64}, make([]byte, 48)...))
	f.Fuzz(func(t *testing.T, raw []byte) {
		p := parse(raw, "a", "b")
		p.ports()
		p.opens()
		var v values
		v.put(14, raw, len(raw))
		v.get(14, 16)
		v.get(-1, 4)
	})
}
