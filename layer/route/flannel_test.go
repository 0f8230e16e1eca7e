package route

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/model"
)

// flannelSays is what flannel says of the second node of a village: hardware addresses that
// are not made of anything, another one for each family.
func flannelSays() *model.Flannel {
	return &model.Flannel{Backend: "vxlan", VNI: 1, MAC: [6]byte{0x12, 0xc6, 0x65, 0x89, 0xb4, 0xe3}, MAC6: [6]byte{0x6a, 1, 2, 3, 4, 5},
		Address: netip.MustParseAddr("192.0.2.2"), Address6: netip.MustParseAddr("2001:db8::2")}
}

// flannel makes the second node one with flannel, which knows of the first what that says:
// devices as newVXLANDevice has them, and neighbours, forwarding entries and routes as
// handleSubnetEvents (flannel v0.28, pkg/backend/vxlan).
func (v *village) flannel(first *model.Flannel, port int) {
	v.t.Helper()
	own := flannelSays()
	to, here := v.snapshot().Nodes[0].PodCIDRs, v.snapshot().Nodes[1].PodCIDRs
	must(v.t, netns.Do(v.nodes[1], func() error {
		return errors.Join(
			v.flannelDevice("flannel.1", own.MAC, own.Address, here[0], port, to[0], first.MAC, first.Address),
			v.flannelDevice("flannel-v6.1", own.MAC6, own.Address6, here[1], port, to[1], first.MAC6, first.Address6))
	}))
}

func (v *village) flannelDevice(name string, mac [6]byte, at netip.Addr, here netip.Prefix, port int, to netip.Prefix, there [6]byte, via netip.Addr) error {
	d := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: net.HardwareAddr(mac[:]), MTU: 1450},
		VxlanId: 1, VtepDevIndex: v.uplinks[1], SrcAddr: at.AsSlice(), Port: port}
	if err := netlink.LinkAdd(d); err != nil {
		return err
	}
	gateway := to.Addr().AsSlice()
	return errors.Join(
		netlink.AddrAdd(d, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(here.Addr(), here.Addr().BitLen())), Flags: flagsOf(here)}),
		netlink.LinkSetUp(d),
		netlink.NeighSet(&netlink.Neigh{LinkIndex: d.Index, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST, IP: gateway, HardwareAddr: there[:]}),
		netlink.NeighSet(&netlink.Neigh{LinkIndex: d.Index, State: netlink.NUD_PERMANENT, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, IP: via.AsSlice(), HardwareAddr: there[:]}),
		netlink.RouteReplace(&netlink.Route{LinkIndex: d.Index, Scope: netlink.SCOPE_UNIVERSE, Dst: ipNet(to), Gw: gateway, Flags: int(netlink.FLAG_ONLINK)}))
}

func flagsOf(p netip.Prefix) int {
	if p.Addr().Is6() {
		return unix.IFA_F_NODAD
	}
	return 0
}

// withFlannel is the cluster of both nodes, and what they say to flannel's nodes.
func (v *village) withFlannel(first, second *model.Flannel) *model.Snapshot {
	s := v.snapshot()
	s.Nodes[0].Flannel, s.Nodes[1].Flannel = first, second
	return s
}

// carryBoth sends in both directions, in both families, and wants the first node's programs
// to have done certain things.
func (v *village) carryBoth(l *Layer, did ...string) {
	v.t.Helper()
	for _, six := range []bool{false, true} {
		for from := range v.nodes {
			before := counted(v.t, l)
			if err := v.carry(from, six, 2<<20); err != nil {
				v.t.Errorf("IPv6 %v, from pod %d: %v; %v", six, from+1, err, counted(v.t, l))
			}
			after := counted(v.t, l)
			for _, what := range did {
				if after[what] == before[what] {
					v.t.Errorf("IPv6 %v, from pod %d: nothing was %s: %v", six, from+1, what, after)
				}
			}
		}
	}
}

// Pods of a node with flannel and of one without speak to each other: each is set up by what
// the other says. Both nodes have strict rp_filter, and are on one segment.
func TestPodsOfAFlannelNode(t *testing.T) {
	v := newVillage(t, ModeAuto, false)
	l := New(v.settings[0])
	must(t, l.Open())
	t.Cleanup(func() { l.Close() })
	v.apply(l, v.snapshot())
	if want, ok := l.ToFlannel(); want != nil || !ok {
		t.Errorf("without flannel in the cluster it is to say %+v", want)
	}
	v.apply(l, v.withFlannel(nil, flannelSays()))
	want, ok := l.ToFlannel()
	if ok || want == nil || !want.Millrace || want.Address.String() != "192.0.2.1" || want.Address6.String() != "2001:db8::1" || want.Port != FlannelPort {
		t.Fatalf("it is to say %+v (%v)", want, ok)
	}
	if d, err := l.Describe(); err != nil || len(d.Degraded) != 1 || !strings.Contains(d.Degraded[0], "deploy/own-node.yaml") {
		t.Errorf("before it has said that, status has %v: %v", d.Degraded, err)
	}
	v.flannel(want, int(want.Port))
	v.carryBoth(l, "sent", "taken")
	v.apply(l, v.withFlannel(want, flannelSays()))
	if said, ok := l.ToFlannel(); !ok || *said != *want {
		t.Errorf("it has said that, and is to say %+v (%v)", said, ok)
	}
	v.carryBoth(l, "sent", "taken")
	if d, err := l.Describe(); err != nil || len(d.Degraded) > 0 || d.Settings["port"] != "8472" {
		t.Errorf("it says %v, %v: %v", d.Degraded, d.Settings, err)
	}
}

// A node goes over from flannel: as long as flannel's devices are there all is left to it,
// and when they have gone, it has flannel's hardware address, so that the others need not
// know. When all have gone over, packets go directly; then nobody needs to say anything.
func TestGoingOverFromFlannel(t *testing.T) {
	v := newVillage(t, ModeAuto, false)
	one, two := New(v.settings[0]), New(v.settings[1])
	for _, l := range []*Layer{one, two} {
		must(t, l.Open())
		t.Cleanup(func() { l.Close() })
	}
	v.apply(one, v.withFlannel(nil, flannelSays()))
	said, _ := one.ToFlannel()
	v.flannel(said, FlannelPort)
	both := v.withFlannel(said, flannelSays())
	v.apply(one, both)

	v.apply(two, both)
	if d, err := two.Describe(); err != nil || len(d.Degraded) != 1 || !strings.Contains(d.Degraded[0], "kubectl label node n2 node.millrace.io/flannel=gone") || d.Objects != 0 {
		t.Errorf("beside flannel it says %v, %d routes: %v", d.Degraded, d.Objects, err)
	}
	if want, ok := two.ToFlannel(); !ok || *want != *flannelSays() {
		t.Errorf("beside flannel it is to say %+v", want)
	}
	v.carryBoth(one, "sent", "taken")

	v.sh(v.nodes[1], "ip link del flannel-v6.1") // somebody takes one away by hand
	both.Nodes[1].Labels = map[string]string{FlannelLabel: FlannelGone}
	v.apply(two, both)
	v.carryBoth(one, "sent", "taken")
	took, ok := two.ToFlannel()
	if ok || !took.Millrace || took.MAC != flannelSays().MAC || took.MAC6 != took.MAC {
		t.Errorf("flannel has gone, and it is to say %+v (%v)", took, ok)
	}

	// The others hear of it at another moment.
	over := v.withFlannel(said, took)
	v.apply(one, over)
	v.apply(two, over)
	v.carryBoth(one, "sent_direct", "taken_direct")
	for _, l := range []*Layer{one, two} {
		if want, ok := l.ToFlannel(); !ok {
			t.Errorf("all have gone over, and it is to say %+v", want)
		}
	}

	v.apply(one, v.snapshot())
	v.apply(two, v.snapshot())
	v.carryBoth(one, "sent_direct", "taken_direct")
	for _, l := range []*Layer{one, two} {
		if want, _ := l.ToFlannel(); want != nil {
			t.Errorf("nobody says anything any more, and it is to say %+v", want)
		}
	}
}

// A new process goes on with flannel's network before it has seen the cluster.
func TestFlannelsNetworkIsAdopted(t *testing.T) {
	v := newVillage(t, ModeAuto, false)
	settings := v.settings[0]
	l := New(settings)
	must(t, l.Open())
	v.apply(l, v.withFlannel(nil, flannelSays()))
	said, _ := l.ToFlannel()
	v.flannel(said, FlannelPort)
	must(t, l.Close())
	again := New(settings)
	must(t, again.Open())
	t.Cleanup(func() { again.Close() })
	v.carryBoth(again, "sent", "taken")
	have, err := again.Read()
	must(t, err)
	if changes := again.Diff(have, again.Plan(v.withFlannel(said, flannelSays())), true); len(changes) > 0 {
		t.Errorf("to do: %v", changes)
	}
}

// What flannel said of this node is overwritten where flannel has gone, and only there: with
// vxlan its device tells, with its other backends a person.
func TestSayingOverFlannel(t *testing.T) {
	const ways = "device eth0 1500\nroute 192.0.2.0/24 eth0\n"
	const n1, n2 = "node n1 192.0.2.1 10.244.1.0/24 ", "\nnode n2 192.0.2.2 10.244.2.0/24 "
	const vxlan1, vxlan2 = "flannel:vxlan,1,12c66589b401,192.0.2.1", "flannel:vxlan,1,12c66589b4e3,192.0.2.2"
	for _, row := range []struct{ what, cluster, want string }{
		{"flannel's host-gw, by another address", n1 + "flannel:host-gw,0,00,198.51.100.1" + n2 + "flannel:host-gw", "host-gw false 198.51.100.1"},
		{"flannel's host-gw, which has gone", n1 + "flannel:host-gw,0,00,198.51.100.1 gone" + n2 + "flannel:host-gw", "host-gw true 192.0.2.1"},
		{"host-gw among others", n1 + n2 + "flannel:host-gw", "host-gw true 192.0.2.1"},
		{"wireguard, where others have vxlan", n1 + "flannel:wireguard" + n2 + vxlan2, "wireguard false invalid IP"},
		{"wireguard, which has gone", n1 + "flannel:wireguard gone" + n2 + vxlan2, "vxlan true 192.0.2.1"},
		{"vxlan, with its device", "flannels flannel.1\n" + n1 + vxlan1 + n2 + vxlan2, "vxlan false 192.0.2.1"},
		{"vxlan, whose device has gone", n1 + vxlan1 + n2 + vxlan2, "vxlan true 192.0.2.1"},
	} {
		s, f := clusterOf(t, &Settings{}, ways+row.cluster)
		w := plan(Settings{Node: "n1"}, s).wish
		said := w.say(&Picture{facts: f, device: &device{MAC: w.own.mac}}).want
		if got := fmt.Sprintf("%s %v %v", said.Backend, said.Millrace, said.Address); got != row.want {
			t.Errorf("%s: it is to say %s, not %s", row.what, got, row.want)
		}
	}
}

// What a node is to say once millrace has gone from it is what flannel said before.
func TestWithoutMillrace(t *testing.T) {
	addresses := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	ours := &model.Flannel{Backend: "vxlan", VNI: 1, Port: FlannelPort, Millrace: true, MAC: macOf(addresses), Address: addresses[0]}
	if left, ok := WithoutMillrace(ours, addresses); left != nil || !ok {
		t.Errorf("of what only millrace said %+v is left (%v)", left, ok)
	}
	adopted := *flannelSays()
	adopted.Millrace, adopted.Port = true, FlannelPort
	if left, ok := WithoutMillrace(&adopted, addresses); left == nil || *left != *flannelSays() || !ok {
		t.Errorf("of what flannel said before %+v is left (%v)", left, ok)
	}
	for _, said := range []*model.Flannel{nil, flannelSays(), {Backend: "host-gw", Address: addresses[0]}, {Backend: "wireguard"}} {
		if left, ok := WithoutMillrace(said, addresses); ok {
			t.Errorf("%+v, which is not millrace's, is to become %+v", said, left)
		}
	}
}
