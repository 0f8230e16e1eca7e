package nft

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ruleset is somebody's rules, and what Tracking says of them.
type ruleset struct {
	name string
	// program reads the rules; without one they are lines of
	// `nft add rule inet t forward ...`.
	program, rules, file string
	asked                bool
	// use is the first that touches 10.244.0.0/16 or fd00:244::/48; "" for none.
	use string
}

const (
	restore4      = "iptables-nft-restore"
	restore6      = "ip6tables-nft-restore"
	restoreLegacy = "iptables-legacy-restore"
	nftables      = "nft -f -"
)

var rulesets = []ruleset{
	{name: "nothing"},
	{name: "no tracking", rules: "tcp dport 80 accept\nip saddr 10.0.0.0/8 counter drop\nmeta mark 4 limit rate 5/second log"},

	{name: "invalid is dropped", asked: true, rules: "ct state invalid drop"},
	{name: "invalid and untracked are dropped", asked: true, rules: "ct state invalid,untracked drop", use: "inet t, chain forward: looks at the state"},
	{name: "established", asked: true, rules: "ct state established,related accept", use: "looks at the state"},
	{name: "invalid among others", asked: true, rules: "ct state invalid,new drop", use: "looks at the state"},
	{name: "not invalid", asked: true, rules: "ct state != invalid accept", use: "looks at the state"},
	{name: "verdicts by state", asked: true, rules: "ct state vmap { established : accept, invalid : drop }", use: "looks at the state"},
	{name: "a set of states", asked: true, rules: "ct state { established, related } accept", use: "looks at the state"},
	{name: "state and address together", asked: true, rules: "ct state . ip saddr { established . 10.0.0.1 } accept", use: "looks at the state"},
	{name: "status", asked: true, rules: "ct status dnat accept", use: "looks at the state"},
	{name: "reading a mark", asked: true, rules: "ct mark 5 accept", use: "looks at the state"},
	{name: "writing a mark", asked: true, rules: "ct mark set 5", use: "keeps something"},
	{name: "original direction", asked: true, rules: "ct original ip daddr 10.0.0.1 accept", use: "looks at the state"},
	{name: "counting", asked: true, rules: "ct count over 20 drop", use: "counts connections"},

	{name: "established, elsewhere", asked: true, rules: "ip daddr 127.0.0.0/8 ct state established accept"},
	{name: "established, from elsewhere", asked: true, rules: "ip saddr 192.168.7.0/28 ct state established accept"},
	{name: "established, elsewhere in IPv6", asked: true, rules: "ip6 daddr fd00:96::/108 ct state established accept"},
	{name: "established, not from elsewhere", asked: true, rules: "ip saddr != 192.168.0.0/16 ct state established accept", use: "looks"},
	{name: "established, to one pod", asked: true, rules: "ip daddr 10.244.3.4 ct state established accept", use: "looks"},
	{name: "established, to one pod in IPv6", asked: true, rules: "ip6 saddr fd00:244::8 ct state established accept", use: "looks"},
	{name: "established, around the pods", asked: true, rules: "ip daddr 10.128.0.0/9 ct state established accept", use: "looks"},
	{name: "established, after one elsewhere", asked: true, rules: "ip daddr 127.0.0.0/8 ct state established accept\nct state established accept", use: "looks"},

	{name: "masquerade", asked: true, program: nftables, rules: `
		add table ip n
		add chain ip n post { type nat hook postrouting priority 100; }
		add rule ip n post ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
		add rule ip n post snat to 192.0.2.1`},
	{name: "DNAT to a pod", asked: true, program: nftables, rules: `
		add table ip n
		add chain ip n pre { type nat hook prerouting priority -100; }
		add rule ip n pre ip daddr 192.0.2.1 tcp dport 80 dnat to 10.244.1.2:8080`, use: "ip n, chain pre: translates"},
	{name: "DNAT to a pod of new connections", asked: true, program: nftables, rules: `
		add table ip n
		add chain ip n pre { type nat hook prerouting priority -100; }
		add rule ip n pre ip daddr 192.0.2.1 ct state new tcp dport 80 dnat to 10.244.1.2:8080`, use: "ip n, chain pre: translates"},
	{name: "DNAT elsewhere", asked: true, program: nftables, rules: `
		add table ip n
		add chain ip n pre { type nat hook prerouting priority -100; }
		add rule ip n pre tcp dport 80 dnat to 172.17.0.2:8080`},
	{name: "DNAT by a map", asked: true, program: nftables, rules: `
		add table ip n
		add chain ip n pre { type nat hook prerouting priority -100; }
		add rule ip n pre dnat to tcp dport map { 80 : 172.17.0.2, 81 : 10.244.1.2 }`, use: "translates"},
	{name: "DNAT to some addresses", asked: true, program: nftables, rules: `
		add table ip n
		add chain ip n pre { type nat hook prerouting priority -100; }
		add rule ip n pre tcp dport 80 dnat to 172.17.0.2-172.17.0.9`, use: "translates"},
	{name: "redirect", asked: true, program: nftables, rules: `
		add table ip n
		add chain ip n pre { type nat hook prerouting priority -100; }
		add rule ip n pre tcp dport 80 redirect to :8080`, use: "translates"},
	{name: "somebody's own bypass", program: nftables, rules: `
		add table ip n
		add chain ip n pre { type filter hook prerouting priority -300; }
		add rule ip n pre ip saddr 10.0.0.0/8 notrack`},
	{name: "a table that sleeps", program: nftables, rules: `
		add table ip n { flags dormant; }
		add chain ip n f { type filter hook forward priority 0; }
		add rule ip n f ct state established accept`},
	{name: "a helper", asked: true, program: nftables, rules: `
		add table ip n
		add ct helper ip n ftp { type "ftp" protocol tcp; }
		add chain ip n f { type filter hook forward priority 0; }
		add rule ip n f tcp dport 21 ct helper set "ftp"`, use: "keeps something"},

	{name: "kube-proxy, nftables", program: nftables, file: "nftables.rules", asked: true, use: "ip kube-proxy"},
	{name: "kube-proxy, iptables-nft", program: restore4, file: "iptables.rules", asked: true, use: "KUBE-"},
	{name: "kube-proxy, iptables-legacy", program: restoreLegacy, file: "iptables.rules", asked: true, use: "iptables-legacy"},
	{name: "iptables-legacy without rules", program: restoreLegacy, rules: "*filter\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT"},
	{name: "iptables-legacy with a chain", program: restoreLegacy, rules: "*filter\n:MINE - [0:0]\nCOMMIT", asked: true, use: "ip filter: is iptables-legacy's"},
	{name: "ip6tables-legacy", program: "ip6tables-legacy-restore", rules: "*raw\n-A OUTPUT -j ACCEPT\nCOMMIT", asked: true, use: "ip6 raw"},

	{name: "kubelet", program: restore4, asked: true, rules: `*mangle
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
COMMIT`},
	{name: "flannel", program: restore4, asked: true, rules: `*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN
-A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -j ACCEPT
COMMIT`},
	{name: "Calico", program: restore4, asked: true, use: "chain cali-tw-cali1: looks", rules: `*filter
:cali-FORWARD - [0:0]
:cali-tw-cali1 - [0:0]
-A FORWARD -j cali-FORWARD
-A cali-FORWARD -o cali+ -j cali-tw-cali1
-A cali-tw-cali1 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-tw-cali1 -m conntrack --ctstate INVALID -j DROP
COMMIT`},
	{name: "Docker", program: restore4, asked: true, use: "chain FORWARD: looks", rules: `*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT`},
	{name: "portmap to a pod", program: restore4, asked: true, use: "chain CNI-DN-a: translates", rules: `*nat
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-DN-a - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 80,443 -j CNI-DN-a
-A CNI-DN-a -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.244.1.7:80
COMMIT`},
	{name: "portmap to a pod in IPv6", program: restore6, asked: true, use: "chain PREROUTING: translates", rules: `*nat
-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination [fd00:244::7]:80
COMMIT`},
	{name: "iptables-nft, others", program: restore4, asked: true, rules: `*filter
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -m state --state INVALID -j DROP
-A FORWARD -d 172.17.0.2/32 -m conntrack --ctstate ESTABLISHED -j ACCEPT
COMMIT
*raw
-A PREROUTING -s 10.244.0.0/16 -j CT --notrack
COMMIT
*nat
-A PREROUTING -p tcp --dport 81 -j DNAT --to-destination 172.17.0.2:80
COMMIT`},
	{name: "iptables-nft, not invalid", program: restore4, asked: true, use: "looks", rules: "*filter\n-A FORWARD -m conntrack ! --ctstate INVALID -j ACCEPT\nCOMMIT"},
	{name: "iptables-nft, invalid by protocol", program: restore4, asked: true, use: "looks", rules: "*filter\n-A FORWARD -m conntrack --ctstate INVALID --ctdir ORIGINAL -j ACCEPT\nCOMMIT"},
	{name: "iptables-nft, connmark", program: restore4, asked: true, use: "keeps", rules: "*mangle\n-A PREROUTING -j CONNMARK --restore-mark\nCOMMIT"},
	{name: "iptables-nft, connlimit", program: restore4, asked: true, use: "counts", rules: "*filter\n-A FORWARD -p tcp -m connlimit --connlimit-above 5 -j DROP\nCOMMIT"},
	{name: "iptables-nft, zones", program: restore4, asked: true, use: "keeps", rules: "*raw\n-A PREROUTING -j CT --zone 4\nCOMMIT"},
	{name: "firewalld", program: nftables, asked: true, use: "inet firewalld, chain filter_FORWARD: looks", rules: `
		add table inet firewalld
		add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; policy accept; }
		add rule inet firewalld filter_FORWARD ct state { established, related } accept
		add rule inet firewalld filter_FORWARD ct status dnat accept
		add rule inet firewalld filter_FORWARD iifname "lo" accept
		add rule inet firewalld filter_FORWARD ct state invalid drop`},
}

func TestTrackingOfOthers(t *testing.T) {
	ranges := prefixes("10.244.0.0/16", "fd00:244::/48")
	for _, set := range rulesets {
		t.Run(set.name, func(t *testing.T) {
			b := newBed(t)
			b.load(set)
			b.must(b.SetUntracked(ranges)) // ours is not somebody's
			got, err := b.Tracking()
			b.must(err)
			use := ""
			for _, u := range got.Uses {
				if u.Touches(ranges) {
					use = u.String()
					break
				}
			}
			if got.Asked != set.asked || (set.use == "") != (use == "") || !strings.Contains(use, set.use) {
				t.Errorf("asked for: %v, used: %q\nwant %v, %q\nall: %v", got.Asked, use, set.asked, set.use, got.Uses)
			}
		})
	}
}

func (b *bed) load(set ruleset) {
	b.t.Helper()
	rules := set.rules + "\n"
	if set.file != "" {
		text, err := os.ReadFile("../../bench/testdata/" + set.file)
		b.must(err)
		rules = string(text)
	}
	program := strings.Fields(set.program)
	switch {
	case set.name == "nothing":
		return
	case set.program == "":
		program = strings.Fields(nftables)
		rules = "add table inet t\nadd chain inet t forward { type filter hook forward priority 0; }\n"
		for line := range strings.Lines(set.rules) {
			rules += "add rule inet t forward " + strings.TrimSpace(line) + "\n"
		}
	case set.program != nftables:
		if _, err := exec.LookPath(program[0]); err != nil {
			b.t.Skip("needs iptables: ", err)
		}
	}
	b.run(rules, program...)
}

// Very many rules of somebody are no reason to need much memory.
func TestTrackingOfVeryManyRules(t *testing.T) {
	b := newBed(t)
	var rules strings.Builder
	rules.WriteString("add table ip many\nadd chain ip many c { type filter hook forward priority 0; }\n")
	const count = 10_000
	for i := range count {
		fmt.Fprintf(&rules, "add rule ip many c ip saddr %s tcp dport 80 counter drop\n", netip.AddrFrom4([4]byte{192, 168, byte(i >> 8), byte(i)}))
	}
	rules.WriteString("add rule ip many c ct state invalid drop\n")
	b.run(rules.String(), strings.Fields(nftables)...)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	spent := processorTime()
	got, err := b.Tracking()
	spent = processorTime() - spent
	runtime.ReadMemStats(&after)
	b.must(err)
	if !got.Asked || len(got.Uses) > 0 {
		t.Errorf("%+v", got)
	}
	allocated := after.TotalAlloc - before.TotalAlloc
	t.Logf("%d rules: %v of processor time, %d bytes", count, spent, allocated)
	if allocated > 4<<20 {
		t.Errorf("%d bytes were allocated for %d rules: they are kept in memory", allocated, count)
	}
}

// processorTime is what this process has used, in user and system mode.
func processorTime() time.Duration {
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &used); err != nil {
		return 0
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// A chain that only a verdict map leads to is found by the packets that the map sends there.
func TestRulesBehindAVerdictMap(t *testing.T) {
	b := newBed(t)
	b.run(`table ip t {
	map refused {
		type ipv4_addr . inet_proto . inet_service : verdict
		elements = { 192.0.2.2 . tcp . 80 : goto refuse }
	}
	chain refuse {
		reject
	}
	chain check {
		ip daddr . meta l4proto . th dport vmap @refused
	}
	chain forward {
		type filter hook forward priority 0
		jump check
	}
}
`, strings.Fields(nftables)...)
	rules, err := b.Rules()
	b.must(err)
	var found *Rule
	for i := range rules {
		if rules[i].Chain == "refuse" {
			found = &rules[i]
		}
	}
	if found == nil {
		t.Fatalf("the rule that refuses is not listed: %+v", rules)
	}
	if found.Hook != "forward" || found.Verdict != "reject" {
		t.Errorf("hook %q, verdict %q", found.Hook, found.Verdict)
	}
	packet := []byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2, 0x9c, 0x40, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0}
	if fit := found.Matches(packet, "a", "b"); fit != Yes {
		t.Errorf("a packet that the map sends there fits: %v", fit)
	}
	packet[23] = 81
	if fit := found.Matches(packet, "a", "b"); fit != No {
		t.Errorf("a packet to another port fits: %v", fit)
	}
}
