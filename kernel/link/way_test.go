package link

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The kernel says by which device and next hop it would send, what fits, and why not.
func TestWay(t *testing.T) {
	path, n := namespace(t, "way")
	if err := n.UpLoopback(); err != nil {
		t.Fatal(err)
	}
	index, err := n.Veth(Veth{Name: "a", Peer: "b", PeerNamespace: path})
	if err != nil {
		t.Fatal(err)
	}
	setUp(t, n, index, "10.1.0.1/24", "fd00:1::1/64")
	far, err := n.Index("b")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Up(far); err != nil {
		t.Fatal(err)
	}
	narrow := &netlink.Route{LinkIndex: index, Dst: ipNet(netip.MustParsePrefix("10.2.0.0/24")), Gw: netip.MustParseAddr("10.1.0.254").AsSlice(), MTU: 1400}
	refused := &netlink.Route{Dst: ipNet(netip.MustParsePrefix("10.3.0.0/24")), Type: unix.RTN_BLACKHOLE}
	for _, r := range []*netlink.Route{narrow, refused} {
		if err := n.handle.RouteAdd(r); err != nil {
			t.Fatal(err)
		}
	}
	for _, row := range []struct {
		to   string
		want Way
	}{
		{"10.1.0.7", Way{Device: "a", Index: index, Kind: "veth", MTU: 1500}},
		{"fd00:1::7", Way{Device: "a", Index: index, Kind: "veth", MTU: 1500}},
		{"10.2.0.7", Way{Device: "a", Index: index, Kind: "veth", MTU: 1400, Via: netip.MustParseAddr("10.1.0.254")}},
		{"10.1.0.1", Way{Device: "lo", Index: 1, MTU: 65536, Local: true}},
	} {
		if w, err := n.Way(netip.MustParseAddr(row.to)); err != nil || w != row.want {
			t.Errorf("%s: %+v, %v; not %+v", row.to, w, err, row.want)
		}
	}
	for to, want := range map[string]error{"10.3.0.1": unix.EINVAL, "10.9.0.1": unix.ENETUNREACH} {
		if w, err := n.Way(netip.MustParseAddr(to)); !errors.Is(err, want) {
			t.Errorf("%s: %+v, %v; not %v", to, w, err, want)
		}
	}
	if lost, err := n.Unresolved(index, netip.MustParseAddr("10.1.0.7")); lost || err != nil {
		t.Errorf("nobody has asked for it: %v, %v", lost, err)
	}
	failed := &netlink.Neigh{LinkIndex: index, Family: unix.AF_INET, State: netlink.NUD_FAILED, IP: netip.MustParseAddr("10.1.0.7").AsSlice()}
	if err := n.handle.NeighSet(failed); err != nil {
		t.Fatal(err)
	}
	if lost, err := n.Unresolved(index, netip.MustParseAddr("10.1.0.7")); !lost || err != nil {
		t.Errorf("it did not answer: %v, %v", lost, err)
	}
}
