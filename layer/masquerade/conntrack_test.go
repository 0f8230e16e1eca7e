package masquerade

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/millrace/millrace/layer/layertest"
)

// rules adds rules of somebody to the node's.
func (is *island) rules(text string) {
	is.t.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		is.t.Skip("needs nft: ", err)
	}
	var said bytes.Buffer
	err := is.Inside(func() error {
		c := exec.Command("nft", "-f", "-")
		c.Stdin, c.Stdout, c.Stderr = strings.NewReader(text), &said, &said
		return c.Run()
	})
	if err != nil {
		is.t.Fatalf("nft: %v\n%s", err, said.String())
	}
}

// tracked is how many connections the node's kernel tracks.
func (is *island) tracked() (n int) {
	is.t.Helper()
	must(is.t, is.Inside(func() error {
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		if err == nil {
			n, err = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		return err
	}))
	return n
}

// Who tracks connections sees the pod and the world, both ways: nothing is invalid to him,
// and nobody but the pod begins a connection.
func TestBesideConntrack(t *testing.T) {
	is := newIsland(t)
	is.serve()
	is.rules(`
table inet others {
	chain prerouting {
		type filter hook prerouting priority -100;
		ct state invalid drop
	}
	chain forward {
		type filter hook forward priority 0; policy drop;
		ct state invalid drop
		ct state established,related accept
		ct state new iifname "pod" accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
	}
}
`)
	l := is.start()
	for _, to := range []string{world4, world6} {
		for _, network := range []string{"tcp", "udp"} {
			if _, err := is.ask(network, to, 80); err != nil {
				t.Errorf("%s to %s: %v; %v", network, to, err, counted(t, l))
			}
		}
		must(t, errors.Join(is.carry(to, 4<<20), is.ping(to, 1000)))
	}
	if n := is.tracked(); n == 0 {
		t.Error("nobody tracks: the test is blind")
	}
}

// With the table full, what nobody tracks goes on: masquerading needs no entry of it.
func TestConntrackIsFull(t *testing.T) {
	is := newIsland(t)
	is.serve()
	is.rules(`
table inet others {
	chain forward {
		type filter hook forward priority 0;
		ct state invalid drop
	}
}
`)
	l := is.start()
	if _, err := is.ask("tcp", world4, 80); err != nil {
		t.Fatal(err)
	}
	must(t, is.Inside(layertest.FillConntrack))
	if _, err := is.ask("tcp", world4, 80); err == nil {
		t.Error("a pod's connection is tracked and succeeds while the table is full: the test is blind")
	}
	is.rules(`
table inet bypass {
	chain prerouting {
		type filter hook prerouting priority -300;
		ip saddr 10.244.1.0/24 notrack
		ip daddr 10.244.1.0/24 notrack
		ip6 saddr fd00:244:1::/64 notrack
		ip6 daddr fd00:244:1::/64 notrack
	}
}
`)
	full := is.tracked()
	for range 50 {
		for _, to := range []string{world4, world6} {
			for _, network := range []string{"tcp", "udp"} {
				if _, err := is.ask(network, to, 80); err != nil {
					t.Fatalf("%s to %s: %v; %v", network, to, err, counted(t, l))
				}
			}
		}
	}
	if now := is.tracked(); now > full {
		t.Errorf("%d connections were tracked before, %d are now", full, now)
	}
}
