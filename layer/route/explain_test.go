package route

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/millrace/millrace/kernel/probe"
)

// What the kernel has is told with what a plan knows of it: whose it is and why, what is to
// be otherwise, what is too much and what is missing.
func TestWaysAreExplained(t *testing.T) {
	settings := Settings{Node: "n1"}
	snapshot, f := clusterOf(t, &settings, `device eth0 1500
route default eth0 via 192.0.2.254
route 192.0.2.0/24 eth0
node n1 192.0.2.1 10.244.1.0/24
node n2 192.0.2.2 10.244.2.0/24
node n3 198.51.100.3 10.244.3.0/24
node n4 198.51.100.4 10.244.4.0/24
node n5 10.244.5.0/24
`)
	l := New(settings)
	want := plan(settings, snapshot)
	have := resolve(settings, want.wish, f)
	have.facts = f
	for _, row := range have.rows {
		row.Node, row.Why = "", "" // as the kernel has it
	}
	to := netip.MustParsePrefix
	have.rows[to("10.244.3.0/24")].MTU = 1400
	have.facts.paths[netip.MustParseAddr("192.0.2.2")] = measurement{Path: probe.Path{Tried: 1600, Passed: 1450}}
	have.rows[to("10.244.2.0/24")].MTU, have.rows[to("10.244.2.0/24")].set = 1450, 1450
	delete(have.rows, to("10.244.4.0/24"))
	have.rows[to("10.244.9.0/24")] = &Row{To: to("10.244.9.0/24"), Direct: true, index: 2}
	rows, left := l.Explain(have, want)
	told := map[string]string{}
	for _, row := range rows {
		told[row.To.String()] = row.Node + ": " + row.Why
	}
	for what, says := range map[string]string{
		"10.244.2.0/24": "n2: it is on the same segment; 1450 of 1500 bytes pass",
		"10.244.3.0/24": "n3: it is to be -> n3 vxlan to 198.51.100.3 by eth0 mtu 1450: it is behind 192.0.2.254",
		"10.244.9.0/24": ": it is no range of another node's any more",
	} {
		if told[what] != says {
			t.Errorf("%s is told as %q, not %q", what, told[what], says)
		}
	}
	if rows[0].MTU != 1450 {
		t.Errorf("by a direct way go %d bytes", rows[0].MTU)
	}
	if text := strings.Join(left, "\n"); len(left) != 2 || !strings.Contains(text, "not there yet: route 10.244.4.0/24 -> n4 ") || !strings.Contains(text, "no route to 10.244.5.0/24 of node n5: ") {
		t.Errorf("no way leads to\n%s", text)
	}
	if row := have.rows[to("10.244.2.0/24")]; row.Why != "" {
		t.Error("the picture was altered")
	}
	if rows, left := l.Explain(have, newPicture()); len(rows) != 3 || rows[0].Why != "" || len(left) > 0 {
		t.Errorf("without a plan: %v, %v", rows, left)
	}
}
