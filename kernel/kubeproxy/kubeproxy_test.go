package kubeproxy

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/nft"
)

// bed is a node in a namespace, with a client and an endpoint in one each.
type bed struct {
	t                      *testing.T
	node, client, endpoint string
}

func newBed(t *testing.T) *bed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	for _, program := range []string{"nft", "iptables-nft-restore", "ip"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip("needs " + program)
		}
	}
	folder := t.TempDir()
	b := &bed{t, filepath.Join(folder, "node"), filepath.Join(folder, "client"), filepath.Join(folder, "endpoint")}
	for _, path := range []string{b.node, b.client, b.endpoint} {
		if err := netns.Create(path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := netns.Remove(path); err != nil {
				t.Error(err)
			}
		})
	}
	b.join(b.client, "10.244.1")
	b.join(b.endpoint, "10.244.9")
	b.must(netns.Do(b.node, func() error {
		// So that a connection that has ended is forgotten soon.
		for _, state := range []string{"time_wait", "close", "last_ack", "fin_wait", "close_wait"} {
			if err := netns.SetSysctl("net/netfilter/nf_conntrack_tcp_timeout_"+state, "1"); err != nil {
				return err
			}
		}
		return netns.SetSysctl("net/ipv4/ip_forward", "1")
	}))
	return b
}

// join gives a namespace the address .2 of a network, and the node .1.
func (b *bed) join(path, network string) {
	b.t.Helper()
	name := filepath.Base(path)[:4]
	b.run(b.node, "", "ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", path)
	b.run(b.node, "", "ip", "addr", "add", network+".1/24", "dev", name)
	b.run(b.node, "", "ip", "link", "set", name, "up")
	b.run(path, "", "ip", "addr", "add", network+".2/24", "dev", "eth0")
	b.run(path, "", "ip", "link", "set", "eth0", "up")
	b.run(path, "", "ip", "route", "add", "default", "via", network+".1")
}

func (b *bed) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// run runs a program inside, with what it reads, and returns what it says.
func (b *bed) run(path, input string, command ...string) string {
	b.t.Helper()
	var said strings.Builder
	err := netns.Do(path, func() error {
		c := exec.Command(command[0], command[1:]...)
		c.Stdin, c.Stdout, c.Stderr = strings.NewReader(input), &said, &said
		return c.Run()
	})
	if err != nil {
		b.t.Fatalf("%v: %v\n%s", command, err, said.String())
	}
	return said.String()
}

// load loads a file of testdata into the node, for both families if it is
// iptables'.
func (b *bed) load(file string) {
	b.t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", file))
	b.must(err)
	if strings.HasSuffix(file, ".nft") {
		b.run(b.node, string(text), "nft", "-f", "-")
		return
	}
	b.run(b.node, string(text), "iptables-nft-restore", "--noflush")
	six := strings.NewReplacer("10.244.9.2:", "[fd00:244:9::2]:", "10.244.9.2/32", "fd00:244:9::2/128", "10.96.0.10/32", "fd00:96::10/128",
		"10.244.0.0/16", "fd00:244::/32", "127.0.0.0/8", "::1/128")
	b.run(b.node, six.Replace(string(text)), "ip6tables-nft-restore", "--noflush")
}

// rules are all of the node's, without their counters.
func (b *bed) rules() string {
	b.t.Helper()
	counters := regexp.MustCompile(`packets \d+ bytes \d+`)
	return counters.ReplaceAllString(b.run(b.node, "", "nft", "list", "ruleset"), "counter")
}

func (b *bed) find() Found {
	b.t.Helper()
	found, err := Find(b.node)
	b.must(err)
	return found
}

func (b *bed) remove() int {
	b.t.Helper()
	connections, err := Remove(b.node, b.find())
	b.must(err)
	return connections
}

// talk is a connection to the Service and what comes back of a word.
type talk struct {
	net.Conn
	lines    *bufio.Reader
	patience time.Duration // for a word to come back
}

// answer serves, at the endpoint, connections that say again what they hear.
func (b *bed) answer() {
	b.t.Helper()
	b.must(netns.Do(b.endpoint, func() error {
		l, err := net.Listen("tcp4", "10.244.9.2:8080")
		if err != nil {
			return err
		}
		b.t.Cleanup(func() { l.Close() })
		datagrams, err := net.ListenPacket("udp4", "10.244.9.2:8080")
		if err != nil {
			return err
		}
		b.t.Cleanup(func() { datagrams.Close() })
		go func() {
			for buffer := make([]byte, 100); ; {
				n, from, err := datagrams.ReadFrom(buffer)
				if err != nil {
					return
				}
				_, _ = datagrams.WriteTo(buffer[:n], from) // who asked has gone: it says so itself
			}
		}()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					for s := bufio.NewScanner(c); s.Scan(); {
						fmt.Fprintln(c, s.Text())
					}
				}()
			}
		}()
		return nil
	}))
}

func (b *bed) connect(network string) (t *talk, err error) {
	err = netns.Do(b.client, func() error {
		c, err := net.DialTimeout(network, "10.96.0.10:80", 4*time.Second)
		if err == nil {
			t = &talk{c, bufio.NewReader(c), 20 * time.Second}
			b.t.Cleanup(func() { c.Close() })
		}
		return err
	})
	return t, err
}

// says says a word and hears it again.
func (t *talk) says(word string) error {
	if err := t.SetDeadline(time.Now().Add(t.patience)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(t, word); err != nil {
		return err
	}
	line, err := t.lines.ReadString('\n')
	if err == nil && line != word+"\n" {
		err = fmt.Errorf("heard %q for %q", line, word)
	}
	return err
}

var modes = []string{"nftables.nft", "iptables.rules"}

// What is others' stays as it was, to the letter; a second time changes nothing.
func TestWhatIsKubeProxysGoesAndNothingElse(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			b := newBed(t)
			b.load("strangers.rules")
			b.run(b.node, "table ip kube-proxy-of-mine { chain KUBE-SERVICES { counter; }; }\ntable inet kube-proxy { chain x { }; }", "nft", "-f", "-")
			before := b.rules()
			if found := b.find(); len(found.Parts)+len(found.Kept)+len(found.Left) > 0 || found.Held {
				t.Errorf("before kube-proxy was here: %+v", found)
			}
			b.load(mode)
			for range 2 {
				if n := b.remove(); n != 0 {
					t.Errorf("%d connections are kept", n)
				}
				if after := b.rules(); after != before {
					t.Errorf("before:\n%s\nafter:\n%s", before, after)
				}
			}
		})
	}
}

// A rule of somebody else that uses a chain goes on doing what it did.
func TestAChainThatOthersUseIsKept(t *testing.T) {
	b := newBed(t)
	b.load("iptables.rules")
	b.run(b.node, "", "iptables-nft", "-t", "nat", "-N", "MINE")
	b.run(b.node, "", "iptables-nft", "-t", "nat", "-A", "MINE", "-p", "udp", "-j", "KUBE-EXT-WVTZY7MVZ3GGVPSU")
	found := b.find()
	var kept []string
	for _, p := range found.Kept {
		kept = append(kept, p.String())
	}
	want := "chain ip nat KUBE-EXT-WVTZY7MVZ3GGVPSU, chain ip nat KUBE-MARK-MASQ, chain ip nat KUBE-SEP-BRKDPGQLHHOUHFXX, chain ip nat KUBE-SVC-WVTZY7MVZ3GGVPSU"
	if got := strings.Join(kept, ", "); got != want {
		t.Errorf("kept %s\nwant %s", got, want)
	}
	b.remove()
	left := b.run(b.node, "", "iptables-nft-save", "-t", "nat")
	for chain, there := range map[string]bool{"KUBE-SERVICES": false, "KUBE-POSTROUTING": false, "KUBE-SEP-BRKDPGQLHHOUHFXX": true, "-A MINE": true} {
		if strings.Contains(left, chain) != there {
			t.Errorf("%s is there: %v, in\n%s", chain, !there, left)
		}
	}
}

// A connection that kube-proxy's rules translate goes on without them, and what
// keeps it goes when it has ended.
func TestConnectionsOutliveTheRules(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			b := newBed(t)
			b.load(mode)
			b.answer()
			c, err := b.connect("tcp4")
			b.must(err)
			datagrams, err := b.connect("udp4")
			b.must(err)
			all := []*talk{c, datagrams}
			for _, one := range all {
				b.must(one.says("before"))
			}
			if n := b.remove(); n != len(all) {
				t.Errorf("%d connections are kept, want %d", n, len(all))
			}
			for _, word := range []string{"after", "again"} {
				for _, one := range all {
					if err := one.says(word); err != nil {
						t.Fatalf("%s: %v\n%s", one.RemoteAddr().Network(), err, b.rules())
					}
				}
			}
			if n := b.remove(); n != len(all) || !b.find().Held {
				t.Errorf("called again: %d connections are kept", n)
			}
			if other, err := b.connect("tcp4"); err == nil {
				t.Errorf("a new connection to %v", other.RemoteAddr())
			}
			// Somebody may save all rules and load them again.
			saved := b.rules()
			b.run(b.node, "flush ruleset\n"+saved, "nft", "-f", "-")
			for _, one := range all {
				b.must(one.says("loaded"))
			}
			tracking, err := nft.In(b.node).Tracking()
			b.must(err)
			if len(tracking.Uses) == 0 {
				t.Error("nobody would keep connection tracking")
			}
			b.must(netns.Do(b.node, func() error { // the last datagram starts its time anew
				return errors.Join(netns.SetSysctl("net/netfilter/nf_conntrack_udp_timeout", "1"),
					netns.SetSysctl("net/netfilter/nf_conntrack_udp_timeout_stream", "1"))
			}))
			b.must(datagrams.says("last"))
			c.Close()
			for deadline := time.Now().Add(time.Minute); b.find().Held; time.Sleep(50 * time.Millisecond) {
				b.remove()
				if time.Now().After(deadline) {
					t.Fatalf("kept after all have ended: %+v", b.find())
				}
			}
			if rules := b.rules(); strings.Contains(rules, "KUBE") || strings.Contains(rules, "table ip kube-proxy") || strings.Contains(rules, "millrace") {
				t.Errorf("left:\n%s", rules)
			}
		})
	}
}

// Without what keeps them connections break: the test above is not blind.
func TestConnectionsBreakIfNothingKeepsThem(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			b := newBed(t)
			b.load(mode)
			b.answer()
			c, err := b.connect("tcp4")
			b.must(err)
			b.must(c.says("before"))
			b.must(nft.In(b.node).Take(b.find().Parts, false))
			c.patience = 2 * time.Second
			if err := c.says("after"); err == nil {
				t.Error("the connection goes on")
			}
		})
	}
}

// Rules of iptables-legacy and of IPVS are named, and left.
func TestWhatIsLeftIsNamed(t *testing.T) {
	b := newBed(t)
	if _, err := exec.LookPath("iptables-legacy-restore"); err != nil {
		t.Skip("needs iptables-legacy")
	}
	b.run(b.node, "*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n*filter\n-A FORWARD -j ACCEPT\nCOMMIT\n", "iptables-legacy-restore")
	b.run(b.node, "", "ip", "link", "add", "kube-ipvs0", "type", "bridge") // not every kernel has dummy
	left := strings.Join(b.find().Left, "\n")
	for _, word := range []string{"iptables-legacy in ip nat:", "kube-ipvs0"} {
		if !strings.Contains(left, word) {
			t.Errorf("%q is not in %s", word, left)
		}
	}
	b.remove()
	if got := b.run(b.node, "", "iptables-legacy-save"); !strings.Contains(got, "KUBE-SERVICES") {
		t.Errorf("it is gone:\n%s", got)
	}
}

// A kube-proxy that runs in the same namespace is found, and no other.
func TestARunningKubeProxyIsFound(t *testing.T) {
	b := newBed(t)
	program := filepath.Join(t.TempDir(), "kube-proxy")
	sleep, err := exec.LookPath("sleep")
	b.must(err)
	content, err := os.ReadFile(sleep)
	b.must(err)
	b.must(os.WriteFile(program, content, 0o755))
	for _, row := range []struct {
		where string
		found bool
	}{{b.client, false}, {b.node, true}} {
		c := exec.Command(program, "60")
		b.must(netns.Do(row.where, c.Start))
		process := b.find().Process
		b.must(c.Process.Kill())
		_ = c.Wait()
		if (process == c.Process.Pid) != row.found {
			t.Errorf("in %s: found %d, it was %d", filepath.Base(row.where), process, c.Process.Pid)
		}
	}
}

// A node with thousands of Services.
func TestVeryManyChains(t *testing.T) {
	b := newBed(t)
	const many = 5000
	var text strings.Builder
	text.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n-A PREROUTING -j KUBE-SERVICES\n")
	for i := range many {
		fmt.Fprintf(&text, ":KUBE-SVC-%016d - [0:0]\n:KUBE-SEP-%016d - [0:0]\n", i, i)
		fmt.Fprintf(&text, "-A KUBE-SVC-%016d -j KUBE-SEP-%016d\n-A KUBE-SEP-%016d -j KUBE-MARK-MASQ\n", i, i, i)
		fmt.Fprintf(&text, "-A KUBE-SEP-%016d -p tcp -j DNAT --to-destination 10.244.9.2:8080\n", i)
		fmt.Fprintf(&text, "-A KUBE-SERVICES -d 10.96.%d.%d/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-%016d\n", i>>8, i&255, i)
	}
	text.WriteString("COMMIT\n")
	b.run(b.node, text.String(), "iptables-nft-restore")
	b.find()
	start := time.Now()
	found := b.find()
	read := time.Since(start)
	if want := 2*many + 3; len(found.Parts) != want {
		t.Errorf("%d parts, want %d", len(found.Parts), want)
	}
	_, err := Remove(b.node, found)
	b.must(err)
	t.Logf("%d chains with %d rules: found in %v, removed in %v", 2*many+2, 4*many+2, read, time.Since(start)-read)
	if rules := b.rules(); strings.Contains(rules, "KUBE") {
		t.Errorf("left: %.2000s", rules)
	}
}
