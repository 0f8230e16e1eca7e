package nft

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// bed is a namespace of the test's own.
type bed struct {
	*Net
	t *testing.T
}

func newBed(t *testing.T) *bed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	path := filepath.Join(t.TempDir(), "net")
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Remove(path); err != nil {
			t.Error(err)
		}
	})
	return &bed{In(path), t}
}

// run runs a program inside, with what it reads, and returns what it says.
func (b *bed) run(input string, command ...string) string {
	b.t.Helper()
	var said strings.Builder
	err := netns.Do(b.path, func() error {
		c := exec.Command(command[0], command[1:]...)
		c.Stdin, c.Stdout, c.Stderr = strings.NewReader(input), &said, &said
		return c.Run()
	})
	if err != nil {
		b.t.Fatalf("%v: %v\n%s", command, err, said.String())
	}
	return said.String()
}

func (b *bed) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// rules of somebody else, beside which the table is written.
const strangers = `
table inet millrace2 {
	chain forward {
		type filter hook forward priority 0;
		ct state invalid drop
	}
}
table ip millrace {
	chain prerouting {
		type filter hook prerouting priority -300;
		counter
	}
}
table inet filter {
	set some { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 }; }
	chain input {
		type filter hook input priority 0;
		ip saddr @some tcp dport 22 accept
	}
}
`

func TestTheTableIsWrittenReadAndRemoved(t *testing.T) {
	b := newBed(t)
	b.run(strangers, "nft", "-f", "-")
	before := b.run("", "nft", "list", "ruleset")
	last := 0
	for _, ranges := range [][]netip.Prefix{
		prefixes("10.244.0.0/16"),
		prefixes("fd00:10:244::/56"),
		prefixes("10.244.1.0/24", "10.244.2.0/24", "fd00:1::/64", "fd00:1:0:3::/64"), // neighbours
		prefixes("10.0.0.0/8", "255.255.255.0/24", "fd00::/8", "ffff:ffff::/32"),     // up to the last address
		prefixes("0.0.0.0/0", "::/0"),
		many(),
		prefixes("10.1.2.3/32"),
	} {
		for range 2 { // the second time changes nothing
			b.must(b.SetUntracked(ranges))
			got, whole, err := b.Untracked()
			if want := Merge(ranges); err != nil || !whole || !slices.Equal(got, want) {
				t.Fatalf("%v, as written: %v, %v\nwant %v", got, whole, err, want)
			}
		}
		last++
	}
	text := b.run("", "nft", "list", "table", "inet", Table)
	for _, rule := range []string{
		"ip saddr @pods4 ip daddr @pods4 notrack accept", "ip6 saddr @pods6 ip6 daddr @pods6 notrack accept",
		"icmp type 3-5 @th,160,32 @inner4 @th,192,32 @inner4 notrack accept", comment, "10.1.2.3",
	} {
		if !strings.Contains(text, rule) {
			t.Errorf("%q is not in\n%s", rule, text)
		}
	}
	b.must(b.SetUntracked(nil))
	if after := b.run("", "nft", "list", "ruleset"); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	b.must(b.SetUntracked(nil))
	if got, whole, err := b.Untracked(); len(got) > 0 || !whole || err != nil {
		t.Errorf("without the table: %v, %v, %v", got, whole, err)
	}
}

// many are the ranges of a large cluster that cannot be merged.
func many() (ranges []netip.Prefix) {
	for i := range 5000 {
		ranges = append(ranges,
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 7), byte(i << 1), 0}), 24),
			netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 1: 1, 6: byte(i >> 7), 7: byte(i << 1)}), 64))
	}
	return ranges
}

// Somebody may save all rules and load them again: ours must not be in the way,
// and are found as they were.
func TestASavedRulesetCanBeLoaded(t *testing.T) {
	b := newBed(t)
	b.must(b.SetUntracked(many()))
	saved := b.run("", "nft", "list", "ruleset")
	b.run("flush ruleset\n"+saved, "nft", "-f", "-")
	if again := b.run("", "nft", "list", "ruleset"); again != saved {
		t.Errorf("saved:\n%s\nloaded:\n%s", saved, again)
	}
	if got, _, err := b.Untracked(); err != nil || !slices.Equal(got, Merge(many())) {
		t.Errorf("%d ranges, %v", len(got), err)
	}
}

// What somebody does to the table is seen, whatever it is.
func TestATableThatSomebodyChangedIsNotWhole(t *testing.T) {
	b := newBed(t)
	ranges := prefixes("10.244.0.0/16", "fd00:244::/48")
	for _, change := range []string{
		"flush chain inet millrace output",
		"flush chain inet millrace prerouting",
		"insert rule inet millrace prerouting counter",
		"add rule inet millrace output ip saddr @pods4 ip daddr @pods4 notrack accept",
		"flush table inet millrace; delete set inet millrace pods4",
		"flush set inet millrace inner6",
		"flush set inet millrace pods4; add element inet millrace pods4 { 10.1.0.0-10.1.0.2 }",
	} {
		b.must(b.SetUntracked(ranges))
		b.run(strings.ReplaceAll(change, "; ", "\n"), "nft", "-f", "-")
		if got, whole, err := b.Untracked(); err != nil || whole {
			t.Errorf("after %q: %v, as written: %v, %v", change, got, whole, err)
		}
		b.must(b.SetUntracked(ranges))
		if got, whole, err := b.Untracked(); err != nil || !whole || !slices.Equal(got, Merge(ranges)) {
			t.Errorf("mended after %q: %v, %v, %v", change, got, whole, err)
		}
	}
	b.run("flush set inet millrace pods4\nflush set inet millrace inner4", "nft", "-f", "-")
	if got, whole, err := b.Untracked(); err != nil || !whole || !slices.Equal(got, ranges[1:]) {
		t.Errorf("without ranges of IPv4: %v, %v, %v", got, whole, err)
	}
}

// The kernel keeps the count of what it tracks; our table alone tracks nothing.
func TestTheTableItselfTracksNothing(t *testing.T) {
	b := newBed(t)
	b.must(b.SetUntracked(prefixes("10.244.0.0/16")))
	if got := b.talkAndCount(); got != "0" {
		t.Errorf("%s connections are tracked", got)
	}
	b.run("add table ip t\nadd chain ip t c { type filter hook output priority 0; }\nadd rule ip t c ct state established accept", "nft", "-f", "-")
	if got := b.talkAndCount(); got == "0" {
		t.Error("a rule of somebody tracks nothing: the test is blind")
	}
}

// talkAndCount sends a datagram to the namespace itself and returns how many
// connections are tracked.
func (b *bed) talkAndCount() (count string) {
	b.t.Helper()
	b.must(netns.Do(b.path, func() error {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if err := sendToSelf(); err != nil {
			return err
		}
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		count = strings.TrimSpace(string(text))
		return err
	}))
	return count
}

// Rules are read again when somebody has changed one, and only then.
func TestRulesAreReadAgainAfterAChange(t *testing.T) {
	b := newBed(t)
	b.run("add table ip t\nadd chain ip t c { type filter hook output priority 0; }", "nft", "-f", "-")
	for _, row := range []struct {
		rules string
		asked bool
		uses  int
	}{
		{"add rule ip t c counter", false, 0},
		{"add rule ip t c ct state invalid drop", true, 0},
		{"add rule ip t c ct state new accept", true, 1},
		{"flush ruleset", false, 0},
	} {
		b.run(row.rules, "nft", "-f", "-")
		for range 2 {
			got, err := b.Tracking()
			b.must(err)
			if got.Asked != row.asked || len(got.Uses) != row.uses {
				t.Errorf("after %q: %+v", row.rules, got)
			}
		}
	}
	b.rules.value.Asked = true // as if remembered
	if got, err := b.Tracking(); err != nil || !got.Asked {
		t.Errorf("nobody changed anything, and the rules were read again: %+v, %v", got, err)
	}
}

func TestWatchSeesChanges(t *testing.T) {
	b := newBed(t)
	ctx, cancel := context.WithCancel(t.Context())
	seen, ended := make(chan bool, 100), make(chan error, 1)
	go func() { ended <- Watch(ctx, b.path, time.Millisecond, func() { seen <- true }) }()
	// Until the watch has begun, changes go by.
	for i := 0; ; i++ {
		b.run(fmt.Sprintf("add table ip t%d", i), "nft", "-f", "-")
		select {
		case <-seen:
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
			return
		case <-time.After(10 * time.Millisecond):
		}
		if i == 1000 {
			t.Fatal("1000 changes, and none was seen")
		}
	}
}

func TestMerge(t *testing.T) {
	for _, row := range []struct{ in, want []netip.Prefix }{
		{nil, nil},
		{prefixes("10.0.1.0/24", "10.0.0.0/24"), prefixes("10.0.0.0/23")},
		{prefixes("10.0.1.0/24", "10.0.2.0/24"), prefixes("10.0.1.0/24", "10.0.2.0/24")},
		{prefixes("10.0.3.0/24", "10.0.1.0/24", "10.0.2.0/24", "10.0.0.0/24"), prefixes("10.0.0.0/22")},
		{prefixes("10.0.1.7/24", "10.0.1.0/24", "10.0.1.128/25"), prefixes("10.0.1.0/24")},
		{prefixes("10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/8"), prefixes("10.0.0.0/7")},
		{prefixes("fd00::/64", "10.0.0.0/24", "fd00:0:0:1::/64"), prefixes("10.0.0.0/24", "fd00::/63")},
		{prefixes("::ffff:10.0.0.0/120", "10.0.1.0/24"), prefixes("10.0.0.0/23")},
		{prefixes("0.0.0.0/1", "128.0.0.0/1", "::/0"), prefixes("0.0.0.0/0", "::/0")},
		{[]netip.Prefix{{}}, nil},
	} {
		if got := Merge(row.in); !slices.Equal(got, row.want) {
			t.Errorf("%v: %v, want %v", row.in, got, row.want)
		}
	}
}

// sendToSelf sends a datagram over the loopback device and receives it.
func sendToSelf() error {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.WriteTo([]byte("x"), conn.LocalAddr()); err != nil {
		return err
	}
	_, _, err = conn.ReadFrom(make([]byte, 1))
	return err
}

// What is remembered of connections between the ranges goes, and nothing else.
func TestForget(t *testing.T) {
	b := newBed(t)
	s, err := b.dial(0)
	b.must(err)
	defer s.close()
	const many = 1300 // more than fit into a message
	for port := range uint16(many) {
		s.remember(b, "10.244.1.1", "10.244.2.2", "10.244.2.2", "10.244.1.1", 1000+port)
	}
	s.remember(b, "fd00:244::1", "fd00:244::2", "fd00:244::2", "fd00:244::1", 1)
	s.remember(b, "10.244.1.1", "10.9.0.1", "10.9.0.1", "10.244.1.1", 1)         // to elsewhere
	s.remember(b, "10.9.0.1", "10.244.1.1", "10.244.1.1", "10.9.0.1", 1)         // from elsewhere
	s.remember(b, "10.244.1.1", "10.96.0.1", "10.244.2.2", "10.244.1.1", 1)      // translated
	s.remember(b, "10.244.1.1", "10.244.2.9", "10.244.2.2", "10.244.1.1", 2)     // translated within
	s.remember(b, "fd00:244::1", "fd00:245::2", "fd00:245::2", "fd00:244::1", 1) // elsewhere in IPv6
	ranges := Merge(prefixes("10.244.0.0/16", "fd00:244::/64", "10.240.0.0/24", "fd00:246::/64"))
	for _, want := range []int{many + 1, 0} {
		if got, err := b.Forget(ranges); err != nil || got != want {
			t.Errorf("%d forgotten, %v, want %d", got, err, want)
		}
	}
	left := 0
	for _, err := range s.request(ctGet, unix.NLM_F_DUMP, unix.AF_UNSPEC, nil) {
		b.must(err)
		left++
	}
	if left != 5 {
		t.Errorf("%d entries are left of 5", left)
	}
}

// An entry is found by either of its directions, and says what a packet becomes.
func TestEntry(t *testing.T) {
	b := newBed(t)
	s, err := b.dial(0)
	b.must(err)
	defer s.close()
	s.remember(b, "10.244.1.1", "10.96.0.1", "10.244.2.2", "10.244.1.1", 1000)
	s.remember(b, "fd00:244::1", "fd00:245::2", "fd00:245::2", "fd00:244::9", 2000)
	at := netip.MustParseAddrPort
	for _, row := range []struct{ from, to, becomesFrom, becomesTo string }{
		{"10.244.1.1:1000", "10.96.0.1:53", "10.244.1.1:1000", "10.244.2.2:53"},
		{"10.244.2.2:53", "10.244.1.1:1000", "10.96.0.1:53", "10.244.1.1:1000"},
		{"[fd00:244::1]:2000", "[fd00:245::2]:53", "[fd00:244::9]:2000", "[fd00:245::2]:53"},
	} {
		d := Direction{at(row.from), at(row.to)}
		entry, err := b.Entry(unix.IPPROTO_UDP, d)
		if got := entry.Translated(d); err != nil || got != (Direction{at(row.becomesFrom), at(row.becomesTo)}) {
			t.Errorf("%v becomes %v, %v", d, got, err)
		}
	}
	for _, protocol := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		if entry, err := b.Entry(protocol, Direction{at("10.244.1.1:1001"), at("10.96.0.1:53")}); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("an entry that is not there: %v, %v", entry, err)
		}
	}
}

// remember makes an entry, by its addresses in both directions.
func (s *socket) remember(b *bed, from, to, back, forth string, port uint16) {
	b.t.Helper()
	tuple := func(from, to string, source, target uint16) attributes {
		return tupleOf(unix.IPPROTO_UDP, netip.AddrPortFrom(netip.MustParseAddr(from), source), netip.AddrPortFrom(netip.MustParseAddr(to), target))
	}
	const timeout, newEntry = 7, unix.NFNL_SUBSYS_CTNETLINK << 8
	entry := attributes(nil).
		nest(ctaOriginal, tuple(from, to, port, 53)).
		nest(ctaReply, tuple(back, forth, 53, port)).
		number(timeout, 3600)
	for _, err := range s.request(newEntry, unix.NLM_F_CREATE|unix.NLM_F_EXCL, familyOf(entry), entry) {
		b.must(err)
	}
}
