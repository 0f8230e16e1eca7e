package route

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/model"
)

// A route of IPv4 may lead by neighbours of IPv6, one or several of them.
func TestHopsByNeighboursOfIPv6(t *testing.T) {
	to := netip.MustParsePrefix("0.0.0.0/0")
	via := func(last string) *netlink.Via {
		return &netlink.Via{AddrFamily: netlink.FAMILY_V6, Addr: net.ParseIP("fe80::" + last)}
	}
	for _, r := range []netlink.Route{
		{LinkIndex: 2, Via: via("1")},
		{MultiPath: []*netlink.NexthopInfo{{LinkIndex: 2, Via: via("1")}, {LinkIndex: 3, Via: via("2")}}},
	} {
		hops := hopsOf(to, r)
		if len(hops) != max(1, len(r.MultiPath)) {
			t.Errorf("%v has the hops %v", r, hops)
		}
		for i, h := range hops {
			if want := netip.MustParseAddr([]string{"fe80::1", "fe80::2"}[i]); h.via != want || h.device != i+2 {
				t.Errorf("hop %d is by %s and device %d, not %s and %d", i, h.via, h.device, want, i+2)
			}
		}
	}
}

// Where nodes are reached by several neighbours of IPv6 (BGP unnumbered), they are in VXLAN
// behind them, and not on the segment.
func TestBehindSeveralNeighboursOfIPv6(t *testing.T) {
	for _, mode := range []Mode{ModeAuto, ModeVXLAN} {
		t.Run(string(mode), func(t *testing.T) {
			v := bare(t, mode, false)
			v.sh(v.nodes[0], `ip link set lo up; ip addr add 192.0.2.1/32 dev lo
				for i in 1 2; do ip link add sw$i type veth peer name sx$i; ip link set sw$i up; ip link set sx$i up; done
				ip route add default proto bgp src 192.0.2.1 nexthop via inet6 fe80::1 dev sw1 nexthop via inet6 fe80::2 dev sw2`)
			l := v.start(0)
			have, err := l.Read()
			must(t, err)
			row := have.(*Picture).rows[netip.MustParsePrefix("10.244.2.0/24")]
			if row == nil || row.Direct || row.Near || row.Device != "sw1" && row.Device != "sw2" {
				t.Errorf("the way is %+v", row)
			}
		})
	}
}

// An address that another node had becomes ours: packets to it are for our device.
func TestTakenAddress(t *testing.T) {
	v := newVillage(t, ModeVXLAN, false)
	l := New(v.settings[0])
	must(t, l.Open())
	defer l.Close()
	extra := netip.MustParseAddr("192.0.2.50")
	theirs, ours := v.snapshot(), v.snapshot()
	theirs.Nodes[1].Addresses = append(theirs.Nodes[1].Addresses, extra)
	ours.Nodes[0].Addresses = append(ours.Nodes[0].Addresses, extra)
	have, err := l.Read()
	must(t, err)
	for _, s := range []*model.Snapshot{theirs, ours, theirs} {
		want := l.Plan(s)
		have, _, err = l.Apply(have, want, l.Diff(have, want, true))
		must(t, err)
		entry, there, err := l.tables.vteps.Get(addressOf(extra))
		must(t, err)
		if !there || (entry.Device != 0) != (s == ours) {
			t.Errorf("the entry of %s is %+v (there: %v)", extra, entry, there)
		}
		if left := l.Diff(have, want, true); len(left) > 0 {
			t.Errorf("still to do: %v", left)
		}
	}
}

// A Node that was left behind, with an address of this one, changes nothing.
func TestStaleNode(t *testing.T) {
	for _, mode := range []Mode{ModeAuto, ModeVXLAN} {
		t.Run(string(mode), func(t *testing.T) {
			v := newVillage(t, mode, false)
			l := v.start(0)
			s := v.snapshot()
			s.Nodes = append(s.Nodes, &model.Node{Name: "old-name", Addresses: s.Nodes[0].Addresses, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.9.0/24")}})
			for range 2 {
				have, err := l.Read()
				must(t, err)
				want := l.Plan(s)
				if changes := l.Diff(have, want, true); len(changes) > 0 {
					t.Errorf("to do: %v", changes)
				}
				_, _, err = l.Apply(have, want, nil)
				must(t, err)
			}
			d, err := l.Describe()
			must(t, err)
			if why := strings.Join(d.Degraded, "; "); !strings.Contains(why, "no route to 10.244.9.0/24 of node old-name: it has an address of this node") {
				t.Errorf("it says %q", why)
			}
		})
	}
}

// Routes of the host are away for a moment, and just then ways are looked for: when they are
// back, the layer hears of it.
func TestRoutesAwayForAMoment(t *testing.T) {
	v := newVillage(t, ModeVXLAN, false)
	l := v.start(0)
	calls := make(chan struct{}, 1)
	quiet := func(long time.Duration) {
		t.Helper()
		for end := time.After(20 * time.Second); ; {
			select {
			case <-calls:
			case <-time.After(long):
				return
			case <-end:
				t.Fatal("it calls again and again")
			}
		}
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = l.Watch(t.Context(), func() {
			select {
			case calls <- struct{}{}:
			default:
			}
		})
	}()
	t.Cleanup(func() { <-ended })
	quiet(3 * routesApart)
	v.sh(v.nodes[0], "ip route del 192.0.2.0/24 dev uplink; ip -6 route del 2001:db8::/64 dev uplink")
	v.apply(l, v.snapshot())
	quiet(3 * routesApart)
	v.sh(v.nodes[0], "ip route add 203.0.113.0/24 dev uplink")
	select {
	case <-calls:
		t.Error("a route that leads to no node is heard of")
	case <-time.After(3 * routesApart):
	}
	v.sh(v.nodes[0], "ip route add 192.0.2.0/24 dev uplink src 192.0.2.1; ip -6 route add 2001:db8::/64 dev uplink")
	select {
	case <-calls:
	case <-time.After(10 * time.Second):
		t.Fatal("the routes are back, and nobody hears of it")
	}
	v.apply(l, v.snapshot())
	have, err := l.Read()
	must(t, err)
	if n := len(have.(*Picture).rows); n != 2 {
		t.Errorf("%d ways to the other node, not 2", n)
	}
}
