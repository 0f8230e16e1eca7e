package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// removes runs `millrace kube-proxy remove` on the node.
func (n *node) removes(more ...string) (stdout, stderr string, status int) {
	n.t.Helper()
	args := append([]string{"kube-proxy", "remove", "--run", n.run}, more...)
	if err := n.Inside(func() error { stdout, stderr, status = millrace(n.t, args...); return nil }); err != nil {
		n.t.Fatal(err)
	}
	return stdout, stderr, status
}

// load loads what a kube-proxy writes of the Service 10.96.0.10:80.
func (n *node) load(rules string) {
	n.t.Helper()
	text, err := os.ReadFile(filepath.Join("../../kernel/kubeproxy/testdata", rules))
	if err != nil {
		n.t.Fatal(err)
	}
	load := exec.Command("nft", "-f", "-")
	if strings.HasSuffix(rules, ".rules") {
		load = exec.Command("iptables-nft-restore", "--noflush")
	}
	load.Stdin = strings.NewReader(string(text))
	if _, err := exec.LookPath(load.Args[0]); err != nil {
		n.t.Skip("needs " + load.Args[0])
	}
	err = n.Inside(func() error {
		if out, err := load.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
}

// hasKubeProxys loads the rules, and returns a connection to the Service, whose endpoint
// is at the node itself.
func (n *node) hasKubeProxys(rules string) (said *bufio.ReadWriter, end func()) {
	n.t.Helper()
	n.load(rules)
	var conn net.Conn
	err := n.Inside(func() error {
		if err := addresses(n.NetNS, "10.244.9.2/32", "10.96.0.10/32"); err != nil {
			return err
		}
		for _, state := range []string{"time_wait", "close", "last_ack", "fin_wait", "close_wait"} {
			if err := netns.SetSysctl("net/netfilter/nf_conntrack_tcp_timeout_"+state, "1"); err != nil {
				return err
			}
		}
		l, err := net.Listen("tcp4", "10.244.9.2:8080")
		if err != nil {
			return err
		}
		n.t.Cleanup(func() { l.Close() })
		go echo(l)
		conn, err = net.DialTimeout("tcp4", "10.96.0.10:80", 2*time.Second)
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		n.t.Fatal(err)
	}
	return bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn)), func() { conn.Close() }
}

// addresses gives the namespace's loopback device addresses: the Service's too, for
// no route leads there.
func addresses(path string, prefixes ...string) error {
	for _, p := range prefixes {
		if err := exec.Command("ip", "addr", "add", p, "dev", "lo").Run(); err != nil {
			return fmt.Errorf("add %s: %w", p, err)
		}
	}
	l, err := link.Open(path)
	if err != nil {
		return err
	}
	defer l.Close()
	return l.UpLoopback()
}

// echo says again, line by line, what it hears.
func echo(l net.Listener) {
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
}

// says says a word and hears it again.
func says(c *bufio.ReadWriter, word string) error {
	fmt.Fprintln(c, word)
	if err := c.Flush(); err != nil {
		return err
	}
	line, err := c.ReadString('\n')
	if err == nil && line != word+"\n" {
		err = fmt.Errorf("heard %q for %q", line, word)
	}
	return err
}

// Moving over: kube-proxy's rules are there with a connection, the agent comes, they
// are removed, the connection goes on.
func TestMovingOverFromKubeProxy(t *testing.T) {
	for _, rules := range []string{"nftables.nft", "iptables.rules"} {
		t.Run(rules, func(t *testing.T) {
			n := newNode(t)
			if stdout, stderr, status := n.removes(); status != exitOK || stdout != "" || stderr != "nothing of kube-proxy is here\n" {
				t.Errorf("with nothing there: exit status %d, %q, %q", status, stdout, stderr)
			}
			c, end := n.hasKubeProxys(rules)
			if err := says(c, "before"); err != nil {
				t.Fatal(err)
			}
			if _, stderr, status := n.removes(); status != exitFailed || !strings.Contains(stderr, "nobody would serve Services") {
				t.Errorf("without an agent: exit status %d, %q", status, stderr)
			}
			write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.10", "10.244.9.2")+
				"---\napiVersion: v1\nkind: Node\nmetadata: {name: n1}\nspec: {podCIDRs: [10.244.0.0/16]}\n")
			n.start()
			planned, stderr, status := n.removes("--dry-run")
			if status != exitOK || !strings.Contains(stderr, "1 connections are translated now") {
				t.Errorf("--dry-run: exit status %d, %q", status, stderr)
			}
			stdout, stderr, status := n.removes()
			if status != exitOK || stdout != planned || !strings.Contains(stderr, "1 connections are translated and go on, kept by table inet millrace-hold") {
				t.Errorf("exit status %d, %q, %q; planned were %q", status, stdout, stderr, planned)
			}
			n.namesAll(rules, stdout)
			if err := says(c, "after"); err != nil {
				t.Fatal(err)
			}
			// The agent does not bypass the tracking that the connection needs.
			n.until("the agent names who needs tracking", func(s agent.Status) bool {
				text, _ := json.Marshal(s)
				return strings.Contains(string(text), "millrace-hold")
			})
			if err := says(c, "tracked"); err != nil {
				t.Fatal(err)
			}
			end()
			for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
				var said removedRules
				stdout, _, _ := n.removes("-o", "json")
				if err := json.Unmarshal([]byte(stdout), &said); err != nil || len(said.Removed) > 0 {
					t.Fatalf("%q: %v", stdout, err)
				}
				if said.Connections == 0 {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%d connections after all have ended", said.Connections)
				}
			}
			if _, stderr, _ := n.removes(); stderr != "nothing of kube-proxy is here\n" {
				t.Errorf("at last: %q", stderr)
			}
		})
	}
}

// Moving back: connections that kube-proxy's rules began need the table until these
// are there again, and then nobody does.
func TestRemoveReleasesWhatNobodyNeeds(t *testing.T) {
	for _, rules := range []string{"nftables.nft", "iptables.rules"} {
		t.Run(rules, func(t *testing.T) {
			n := newNode(t)
			c, _ := n.hasKubeProxys(rules)
			write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.10", "10.244.9.2"))
			n.start()
			if _, stderr, status := n.removes(); status != exitOK {
				t.Fatalf("kube-proxy remove: exit status %d, %q", status, stderr)
			}
			n.kill()
			remove := func() (stdout, stderr string, status int) {
				err := n.Inside(func() error {
					stdout, stderr, status = millrace(t, "remove", "--pins", n.pins, "--run", n.run)
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				return stdout, stderr, status
			}
			if stdout, stderr, status := remove(); status != exitOK || strings.Contains(stdout, "millrace-hold") ||
				!strings.Contains(stderr, "table inet millrace-hold stays, for 1 connections are translated") {
				t.Errorf("before kube-proxy is back: exit status %d, %q, %q", status, stdout, stderr)
			}
			if err := says(c, "held"); err != nil {
				t.Fatal(err)
			}
			n.load(rules)
			if stdout, stderr, status := remove(); status != exitOK || stdout != "- table inet millrace-hold\n" || stderr != "" {
				t.Errorf("when kube-proxy is back: exit status %d, %q, %q", status, stdout, stderr)
			}
			if err := says(c, "kube-proxy's again"); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// namesAll checks what is named.
func (n *node) namesAll(rules, stdout string) {
	n.t.Helper()
	want := []string{"- table ip kube-proxy, 17 rules", "- table ip6 kube-proxy, 1 rule"}
	if rules == "iptables.rules" {
		want = []string{"- chain ip filter KUBE-FORWARD, 3 rules", "- rule in ip nat PREROUTING, jump KUBE-SERVICES", "- chains ip nat KUBE-SEP-*: 2, 4 rules"}
	}
	lines := strings.Split(stdout, "\n")
	for _, line := range want {
		if !slices.Contains(lines, line) {
			n.t.Errorf("%q is not in\n%s", line, stdout)
		}
	}
}
