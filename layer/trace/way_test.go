package trace

import (
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer/trace/cause"
)

// A packet goes from a client by a router, which translates both its ends, to a server. Its
// way is known from what it is at the server, behind the translation, and the other way
// round from what it was at the client.
func TestWayThroughATranslation(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft")
	}
	all := spaces(t, 3)
	router, client, server := all[0], all[1], all[2]
	sh := func(n Namespace, command string) { t.Helper(); in(t, n.Path, "sh", "-ec", command) }
	sh(router, `echo 1 > /proc/sys/net/ipv4/ip_forward
nft 'add table ip n; add chain ip n d { type nat hook prerouting priority -100; }; add chain ip n s { type nat hook postrouting priority 100; }
add rule ip n d ip daddr 10.96.0.10 tcp dport 80 dnat to 10.7.2.2:8080; add rule ip n s oifname to2 masquerade'`)
	sh(client, "ip addr add 10.7.1.2/24 dev eth0; ip link set eth0 up; ip link set lo up; ip route add default via 10.7.1.1")
	sh(server, "ip addr add 10.7.2.2/24 dev eth0; ip link set eth0 up; ip link set lo up; nft 'add table ip f; add chain ip f i { type filter hook input priority 0; policy drop; }'")
	var from netip.AddrPort
	err := netns.Do(client.Path, func() error {
		d := net.Dialer{Timeout: 500 * time.Millisecond, LocalAddr: &net.TCPAddr{Port: 41000}}
		from = netip.MustParseAddrPort("10.7.1.2:41000")
		_, err := d.Dial("tcp", "10.96.0.10:80")
		if err == nil {
			t.Error("the server answers")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	reader, err := NewReader(all)
	if err != nil {
		t.Fatal(err)
	}
	if err := reader.Before(t.Context()); err != nil {
		t.Fatal(err)
	}
	e, err := reader.After(t.Context(), time.Second, nil)
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort
	verdict := func(from, to netip.AddrPort, last Namespace) cause.Verdict {
		return cause.Verdict{Where: cause.Where{Namespace: last.Name}, Tuple: &cause.Ends{Protocol: "tcp", Source: from, Destination: to}}
	}
	verdicts := []cause.Verdict{
		verdict(from, at("10.96.0.10:80"), server),
		verdict(from, at("10.7.2.2:8080"), server), // as a rule of the router's would meet it
		verdict(from, at("10.7.2.2:9999"), server), // of no entry
	}
	reader.Ways(t.Context(), e, verdicts)
	for i, want := range []string{"destination 10.96.0.10:80 becomes 10.7.2.2:8080, source 10.7.1.2:41000 becomes 10.7.2.1:41000", "", ""} {
		way := verdicts[i].Way
		if len(way) != 3 || way[0].Namespace != client.Name || way[1].Namespace != router.Name || way[2].Namespace != server.Name {
			t.Errorf("%d: the way is %+v", i, way)
			continue
		}
		if way[0].Translation != "" || way[1].Translation != want || way[2].Translation != "" {
			t.Errorf("%d: translations %q, %q, %q; want the second %q", i, way[0].Translation, way[1].Translation, way[2].Translation, want)
		}
	}
	// What the server has seen is known at the router only by what it was translated to.
	before, after := "", ""
	err = netns.Do(router.Path, func() error {
		was, is := translated("tcp", direction("10.7.2.1:41000", "10.7.2.2:8080"))
		before, after = was.From.String()+" "+was.To.String(), is.From.String()+" "+is.To.String()
		return nil
	})
	if err != nil || before != "10.7.1.2:41000 10.96.0.10:80" || !strings.HasPrefix(after, "10.7.2.1:41000") {
		t.Errorf("before %s, after %s, %v", before, after, err)
	}
}

func direction(from, to string) nft.Direction {
	return nft.Direction{From: netip.MustParseAddrPort(from), To: netip.MustParseAddrPort(to)}
}
