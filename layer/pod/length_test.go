package pod

import (
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/pod/pool"
	"github.com/millrace/millrace/model"
)

// What a node's routes take is what its pods' routes are given: one number where that is
// all, and otherwise as few as possible.
func TestLengths(t *testing.T) {
	for _, row := range []struct{ what, table, others, want string }{
		{"no other node", "default 1500", "", "1500: default 1500"},
		{"no way out either", "", "", "1400: default 1400"},
		{"all are direct", "default 1500, 10.244.2.0/24 1500, 10.244.3.0/24 1500", "10.244.2.0/24 10.244.3.0/24", "1500: default 1500"},
		{"all in VXLAN", "default 1500, 10.244.2.0/24 1450, 10.244.3.0/24 1450", "10.244.2.0/24 10.244.3.0/24", "1500: default 1450"},
		{"jumbo frames in VXLAN", "default 9000, 10.244.2.0/24 8950", "10.244.2.0/24", "9000: default 8950"},
		{"the way out takes less", "default 1500, 10.244.2.0/24 9000, 10.244.3.0/24 9000", "10.244.2.0/24 10.244.3.0/24", "9000: default 1500, 10.244.2.0/23 9000"},
		{"nothing leaves the cluster", "10.244.2.0/24 9000, 10.244.3.0/24 9000", "10.244.2.0/24 10.244.3.0/24", "9000: default 9000"},
		{"one node is direct, two are not", "default 1500, 10.244.2.0/24 1450, 10.244.3.0/24 1450, 10.244.4.0/24 1500", "10.244.2.0/24 10.244.3.0/24 10.244.4.0/24", "1500: default 1450, 10.244.4.0/24 1500"},
		{"one path is narrow", "default 1500, 10.244.2.0/24 1500, 10.244.3.0/24 1400, 10.244.4.0/24 1500", "10.244.2.0/24 10.244.3.0/24 10.244.4.0/24", "1500: default 1500, 10.244.3.0/24 1400"},
		{"ranges far apart", "default 1500, 10.244.2.0/24 9000, 10.244.3.0/24 9000, 172.16.2.0/24 9000, 192.168.2.0/24 1500", "10.244.2.0/24 10.244.3.0/24 172.16.2.0/24 192.168.2.0/24", "9000: default 1500, 10.244.2.0/23 9000, 172.16.2.0/24 9000, 192.168.2.0/24 1500"},
		{"no route: by the default one", "default 1400", "10.244.2.0/24", "1400: default 1400"},
		{"a route of somebody's, to all nodes", "default 1500, 10.244.0.0/16 1420", "10.244.2.0/24 10.244.3.0/24", "1500: default 1420"},
		{"both families", "default 1500, 10.244.2.0/24 1450, fd00:2::/64 1430", "10.244.2.0/24 fd00:2::/64", "1500: default 1450, ::/0 1430"},
	} {
		f := facts{mtu: 1400, table: map[netip.Prefix]int{}}
		for entry := range strings.SplitSeq(row.table, ", ") {
			if to, mtu, ok := strings.Cut(entry, " "); ok {
				f.table[netip.MustParsePrefix(strings.Replace(to, "default", "0.0.0.0/0", 1))], _ = strconv.Atoi(mtu)
			}
		}
		var others []netip.Prefix
		for r := range strings.FieldsSeq(row.others) {
			others = append(others, netip.MustParsePrefix(r))
		}
		pod := &Pod{Lease: pool.Lease{Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.2")}}}
		if strings.Contains(row.others, "::") {
			pod.Addresses = append(pod.Addresses, netip.MustParseAddr("fd00:1::2"))
		}
		if is := told(f.lengths(others).of(pod)); is != row.want {
			t.Errorf("%s: %s, not %s", row.what, is, row.want)
		}
	}
}

func told(l lengths) string {
	var routes []string
	for _, to := range slices.SortedFunc(maps.Keys(l.routes), netip.Prefix.Compare) {
		routes = append(routes, strings.Replace(to.String(), "0.0.0.0/0", "default", 1)+" "+strconv.Itoa(l.routes[to]))
	}
	return fmt.Sprintf("%d: %s", l.device, strings.Join(routes, ", "))
}

// However many nodes there are, a pod has few routes, and none that takes more than the
// node's.
func TestFewRoutes(t *testing.T) {
	f := facts{mtu: 1500, table: map[netip.Prefix]int{everywhere[0]: 1500}}
	var others []netip.Prefix
	for i := range 5000 {
		to := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
		others, f.table[to] = append(others, to), 9000-i%7
	}
	l := f.lengths(others)
	if len(l.routes) != len(everywhere)+1+mostLengths || l.routes[netip.MustParsePrefix("10.0.0.0/11")] != 8999 {
		t.Errorf("%d routes: %s", len(l.routes), told(l))
	}
	for to, mtu := range l.routes {
		if is := f.table[to]; is > 0 && is < mtu {
			t.Errorf("to %s go %d bytes, not %d", to, is, mtu)
		}
	}
	if few := covers(others[:1]); len(few) != 1 || few[0] != others[0] {
		t.Errorf("one range is covered by %v", few)
	}
}

// A pod that runs gets what a new one would: its routes say what the node's take, when they
// come to be others, and an agent that is new finds what there is.
func TestRunningPodsAreCorrected(t *testing.T) {
	b := newTown(t)
	space := b.space("web")
	run := exec.Command("sleep", "600") // a namespace is found by its processes
	must(t, netns.Do(space, run.Start))
	t.Cleanup(func() { _ = run.Process.Kill(); _ = run.Wait() })
	n, err := link.Open(b.NetNS)
	must(t, err)
	defer n.Close()
	uplink, err := n.Index("uplink")
	must(t, err)
	route := link.Route{To: netip.MustParsePrefix("10.244.2.0/24"), Via: netip.MustParseAddr("198.51.100.1"), Link: uplink}
	ranges := []string{"10.244.1.0/24", "fd00:1::/64"}
	l := b.open(ranges...)
	b.add(l, "web")
	pod := podOf(l.pool.Leases()[0])
	expect := func(what, want string) {
		t.Helper()
		is, err := node{}.inside(pod, space)
		must(t, err)
		if told(is) != want {
			t.Errorf("%s: %s, not %s", what, told(is), want)
		}
	}
	expect("a new pod", "1400: default 1400, ::/0 1400")
	route.MTU = 1350
	must(t, n.Route(route))
	b.apply(l, ranges...)
	expect("the way to another node takes less", "1400: default 1350, ::/0 1400")
	must(t, n.SetMTU(uplink, 9000))
	route.MTU = 8950
	must(t, n.SetRoute(route))
	b.apply(l, ranges...)
	expect("the uplink takes more", "9000: default 8950, ::/0 9000")
	must(t, l.Close())
	must(t, n.SetMTU(uplink, 1400))
	l = New(b.settings)
	must(t, l.Open())
	t.Cleanup(func() { l.Close() })
	b.apply(l, ranges...)
	expect("the uplink takes less again, and the agent is new", "9000: default 1400, ::/0 1400")
	if changes := b.apply(l, ranges...); len(changes) > 0 {
		t.Errorf("corrected, and still to do: %v", changes)
	}
	if d, err := l.Describe(); err != nil || d.Settings["mtu"] != "1400" {
		t.Errorf("the layer says %v, %v", d.Settings, err)
	}
}

// A pod of which no process is to be seen cannot be corrected, and is not tried again and
// again.
func TestAPodWithoutProcesses(t *testing.T) {
	b := newTown(t)
	b.space("web")
	n, err := link.Open(b.NetNS)
	must(t, err)
	defer n.Close()
	uplink, err := n.Index("uplink")
	must(t, err)
	ranges := []string{"10.244.1.0/24"}
	l := b.open(ranges...)
	b.add(l, "web")
	must(t, n.Route(link.Route{To: netip.MustParsePrefix("10.244.2.0/24"), Via: netip.MustParseAddr("198.51.100.1"), Link: uplink, MTU: 1350}))
	if changes := b.apply(l, ranges...); !strings.Contains(fmt.Sprint(changes), "mtu of pod shop/web") {
		t.Errorf("a way takes less, and the changes are %v", changes)
	}
	if changes := b.apply(l, ranges...); len(changes) > 0 {
		t.Errorf("tried, and still to do: %v", changes)
	}
}

// A pod that was given CAP_NET_ADMIN can alter its network so that nothing can be set there.
// It is told and left alone: the others are corrected, and the layer's changes are made.
func TestAPodThatCannotBeCorrected(t *testing.T) {
	b := newTown(t)
	spaces := map[string]string{"broken": b.space("broken"), "web": b.space("web")}
	for _, space := range spaces {
		run := exec.Command("sleep", "600") // a namespace is found by its processes
		must(t, netns.Do(space, run.Start))
		t.Cleanup(func() { _ = run.Process.Kill(); _ = run.Wait() })
	}
	ip := func(space, arguments string) {
		t.Helper()
		must(t, netns.Do(space, func() error { return exec.Command("ip", strings.Fields(arguments)...).Run() }))
	}
	n, err := link.Open(b.NetNS)
	must(t, err)
	defer n.Close()
	uplink, err := n.Index("uplink")
	must(t, err)
	ranges := []string{"10.244.1.0/24"}
	l := b.open(ranges...)
	b.add(l, "broken")
	b.add(l, "web")
	snapshot := cluster(ranges...)
	third := netip.MustParsePrefix("10.244.3.0/24")
	snapshot.Nodes = append(snapshot.Nodes, &model.Node{Name: "n3", PodCIDRs: []netip.Prefix{third}})
	apply := func() {
		t.Helper()
		have, err := l.Read()
		must(t, err)
		want := l.Plan(snapshot)
		have, _, err = l.Apply(have, want, l.Diff(have, want, true))
		if left := l.Diff(have, want, true); err != nil || len(left) > 0 {
			t.Errorf("still to do are %v, %v", left, err)
		}
	}
	says := func(what string, degraded bool) {
		t.Helper()
		d, err := l.Describe()
		if is := strings.Contains(fmt.Sprint(d.Degraded), "pod shop/broken keeps the MTUs that it has: its network namespace does not take them: "); err != nil || is != degraded {
			t.Errorf("%s: the layer says %q, %v", what, d.Degraded, err)
		}
		for _, text := range d.Degraded {
			if strings.Contains(text, "shop/web") {
				t.Errorf("%s: the layer says %q", what, text)
			}
		}
	}
	ip(spaces["broken"], "link set eth0 down")
	for to, mtu := range map[string]int{"10.244.2.0/24": 1350, "10.244.3.0/24": 1300} {
		must(t, n.Route(link.Route{To: netip.MustParsePrefix(to), Via: netip.MustParseAddr("198.51.100.1"), Link: uplink, MTU: mtu}))
	}
	for range 2 {
		apply()
		says("its device is down", true)
	}
	for _, lease := range l.pool.Leases() {
		if pod := podOf(lease); pod.Pod == "shop/web" {
			if is, err := (node{}).inside(pod, spaces["web"]); err != nil || !slices.Contains(slices.Collect(maps.Values(is.routes)), 1300) {
				t.Errorf("the other pod has %s, %v", told(is), err)
			}
		}
	}
	ip(spaces["broken"], "link set eth0 up")
	ip(spaces["broken"], "route add 169.254.1.1/32 dev eth0")
	ip(spaces["broken"], "route add default via 169.254.1.1 dev eth0")
	apply()
	says("its network is as it was", false)
}
