package route

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// paper is a host of which only the refusals are real.
type paper struct{ refuse string }

func (p *paper) facts() (facts, error)             { return segment(), nil }
func (p *paper) ports(facts) ([]port, error)       { return nil, nil }
func (p *paper) attach(port) error                 { return nil }
func (p *paper) detach(port) error                 { return nil }
func (p *paper) device() (*device, error)          { return nil, nil }
func (p *paper) makeDevice(*device) (int, error)   { return 9, nil }
func (p *paper) dropDevice() error                 { return nil }
func (p *paper) dropFlannels(string) error         { return nil }
func (p *paper) routes() ([]*Row, error)           { return nil, nil }
func (p *paper) dropRoute(*Row) error              { return nil }
func (p *paper) lost() []lost                      { return nil }
func (p *paper) restore() error                    { return nil }
func (p *paper) settle() error                     { return nil }
func (p *paper) describe(*layer.Description) error { return nil }
func (p *paper) close()                            {}
func (p *paper) makeRoute(row *Row, _ int) error {
	if row.Object() == p.refuse {
		return syscall.ENETUNREACH
	}
	return nil
}

// segment is a host that has all nodes of a village on its own segment.
func segment() facts {
	return facts{
		hops:    []hop{{to: netip.MustParsePrefix("192.0.2.0/24"), device: 2}, {to: netip.MustParsePrefix("2001:db8::/64"), device: 2}},
		devices: map[int]fact{2: {name: "eth0", mtu: 1500, ethernet: true}}, shortcuts: true,
	}
}

func TestPureLaws(t *testing.T) {
	v := &village{}
	layertest.PureLaws(t, layertest.Subject{
		New:       func() layer.Layer { return New(Settings{Node: "n1"}) },
		Snapshots: []*model.Snapshot{v.snapshot(), v.snapshot(3)},
		Nothing: func() layer.Picture {
			nothing := newPicture()
			nothing.facts = segment()
			return nothing
		},
		Faulty: func(object string) (layer.Layer, func()) {
			l, p := New(Settings{Node: "n1"}), &paper{refuse: object}
			l.host, l.tables = p, tables{remotes: bpfmap.NewFake[datapathRange, datapathRemote](100), vteps: bpfmap.NewFake[datapathAddress, datapathVtep](100), gates: bpfmap.NewFake[uint32, uint32](1), networks: bpfmap.NewFake[uint32, datapathNetwork](1)}
			return l, func() { p.refuse = "" }
		},
	})
}

// The order of nodes and of their ranges does not change the plan.
func TestOrderOfNodes(t *testing.T) {
	v := &village{}
	for _, mode := range []Mode{ModeAuto, ModeVXLAN} {
		one, other := v.snapshot(3, 4, 5), v.snapshot(5, 4, 3)
		slices.Reverse(other.Nodes)
		for _, n := range other.Nodes {
			slices.Reverse(n.PodCIDRs)
		}
		nothing := newPicture()
		nothing.facts = segment()
		l := New(Settings{Node: "n1", Mode: mode})
		want, same := fmt.Sprint(l.Diff(nothing, l.Plan(one), true)), fmt.Sprint(l.Diff(nothing, l.Plan(other), true))
		if want != same || len(want) < 100 {
			t.Errorf("in one order:\n%s\nin the other:\n%s", want, same)
		}
	}
}

func TestLaws(t *testing.T) { laws(t, ModeVXLAN) }

func TestLawsDirect(t *testing.T) { laws(t, ModeAuto) }

// The same where there is no tcx.
func TestLawsOfFilters(t *testing.T) {
	withoutTCX(t)
	laws(t, ModeVXLAN)
}

func withoutTCX(t *testing.T) { layertest.WithoutTCX(t, &haveTCX) }

func laws(t *testing.T, mode Mode) {
	layertest.Laws(t, func(t *testing.T) layertest.Subject {
		v := newVillage(t, mode, false)
		v.start(1)
		alone := v.snapshot()
		alone.Nodes = alone.Nodes[:1]
		return layertest.Subject{
			New:       func() layer.Layer { return New(v.settings[0]) },
			Snapshots: []*model.Snapshot{v.snapshot(), v.snapshot(3), {Complete: true}, alone, v.snapshot(4), v.snapshot()},
			Observe:   v.observe,
			Stranger:  v.stranger,
			Works:     func() error { return errors.Join(v.carry(0, false, 1000), v.carry(1, true, 1000)) },
		}
	})
}

// observe prints pins, devices, routes, and the programs and filters at the first node's
// devices.
func (v *village) observe() string {
	v.t.Helper()
	var text []string
	must(v.t, filepath.WalkDir(v.BPF, func(path string, _ os.DirEntry, err error) error {
		if !strings.Contains(path, "route2") {
			text = append(text, path)
		}
		return err
	}))
	text = append(text, layertest.Devices(v.t, v.nodes[0])...)
	must(v.t, netns.Do(v.nodes[0], func() error {
		routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
		for _, r := range routes {
			text = append(text, r.String())
		}
		return err
	}))
	return strings.Join(text, "\n")
}

// stranger has a better route to node 3's pods, one to a pod of layer/pod, a vxlan device at the same port, a program
// at the pod's veth, and a pin beside ours.
func (v *village) stranger() func() error {
	v.t.Helper()
	program := layertest.Passing(v.t, "stranger")
	filtered := layertest.StrangeFilter(v.t, v.nodes[0], v.ports[0], netlink.HANDLE_MIN_INGRESS, program)
	pin := filepath.Join(filepath.Dir(v.settings[0].Pins), "stranger")
	must(v.t, program.Pin(pin))
	v.t.Cleanup(func() { _ = os.Remove(pin) })
	to := netip.MustParsePrefix("10.244.3.0/24")
	must(v.t, netns.Do(v.nodes[0], func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "other"
		device := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: 77, Port: DefaultPort}
		return errors.Join(netlink.LinkAdd(device),
			netlink.RouteAdd(&netlink.Route{LinkIndex: v.uplinks[0], Dst: ipNet(to), Gw: net.ParseIP("192.0.2.2"), Protocol: unix.RTPROT_STATIC}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: v.ports[0], Dst: ipNet(netip.MustParsePrefix("10.244.1.9/32")), Scope: netlink.SCOPE_LINK, Protocol: 109}))
	}))
	return func() error {
		if _, err := os.Stat(pin); err != nil {
			return err
		}
		return netns.Do(v.nodes[0], func() error {
			if _, err := netlink.LinkByName("other"); err != nil {
				return err
			}
			found, err := netlink.RouteGet(to.Addr().Next().AsSlice())
			if err != nil || len(found) != 1 || found[0].LinkIndex != v.uplinks[0] {
				return fmt.Errorf("the way to %s is %v: %w", to, found, err)
			}
			pods, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: 109}, netlink.RT_FILTER_PROTOCOL)
			if err != nil || len(pods) != 1 {
				return fmt.Errorf("the pod's route is gone: %v, %w", pods, err)
			}
			return filtered()
		})
	}
}

// A device of our name that is somebody else's stays, and the error says so.
func TestDeviceOfOthers(t *testing.T) {
	v := newVillage(t, ModeVXLAN, false)
	must(t, netns.Do(v.nodes[0], func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = DefaultDevice
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	}))
	l := New(v.settings[0])
	must(t, l.Open())
	t.Cleanup(func() { l.Close() })
	if _, err := l.Read(); err == nil || !strings.Contains(err.Error(), "somebody else's (it is a bridge") {
		t.Errorf("reading beside a stranger's device: %v", err)
	}
	l.Close()
	_, err := New(v.settings[0]).Remove()
	must(t, err)
	must(t, netns.Do(v.nodes[0], func() error {
		_, err := netlink.LinkByName(DefaultDevice)
		return err
	}))
}
