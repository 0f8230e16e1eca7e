package masquerade

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// paper is a host of which only the refusals are real.
type paper struct{ refuse string }

func (p *paper) devices() ([]link.Device, error) { return uplinkOnly(), nil }
func (p *paper) attach(d link.Device) error {
	if p.refuse == "masquerade at "+d.Name {
		return syscall.ENODEV
	}
	return nil
}
func (p *paper) detach(int) error                  { return nil }
func (p *paper) attachedAt(link.Device) bool       { return true }
func (p *paper) lost() []lost                      { return nil }
func (p *paper) restore() error                    { return nil }
func (p *paper) settle() error                     { return nil }
func (p *paper) sweep() (int, error)               { return 0, nil }
func (p *paper) describe(*layer.Description) error { return nil }
func (p *paper) close()                            {}

func uplinkOnly() []link.Device {
	return []link.Device{{Index: 2, Name: "eth0", Ethernet: true, DefaultRoute: true, Addresses: []netip.Addr{netip.MustParseAddr(node4), netip.MustParseAddr(node6)}}}
}

func TestPureLaws(t *testing.T) {
	is := &island{}
	layertest.PureLaws(t, layertest.Subject{
		New:       func() layer.Layer { return New(Settings{Node: "n1"}) },
		Snapshots: []*model.Snapshot{is.snapshot(), is.snapshot(2, 3)},
		Nothing: func() layer.Picture {
			nothing := newPicture()
			nothing.devices = uplinkOnly()
			return nothing
		},
		Faulty: func(object string) (layer.Layer, func()) {
			p, ranges := &paper{object}, bpfmap.NewFake[datapathRange, datapathRangeFlags](100)
			ranges.Refuse = func(key datapathRange) error {
				if p.refuse == (row{To: fromRange(key)}).Object() {
					return syscall.ENOMEM
				}
				return nil
			}
			l := New(Settings{Node: "n1"})
			l.host, l.tables = p, tables{ranges: ranges, wires: bpfmap.NewFake[uint32, datapathWire](100)}
			return l, func() { p.refuse = "" }
		},
	})
}

// The order of nodes, of their ranges and of what keeps its address does not change the
// plan.
func TestOrderOfRanges(t *testing.T) {
	is := &island{}
	one, other := is.snapshot(2, 3, 5), is.snapshot(5, 3, 2)
	one.Masquerade = &model.Masquerade{Not: []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("10.0.0.0/9")}}
	other.Masquerade = &model.Masquerade{Not: []netip.Prefix{one.Masquerade.Not[1], one.Masquerade.Not[0]}}
	slices.Reverse(other.Nodes)
	for _, n := range other.Nodes {
		slices.Reverse(n.PodCIDRs)
	}
	nothing := newPicture()
	nothing.devices = uplinkOnly()
	l := New(Settings{Node: "n1"})
	want, same := fmt.Sprint(l.Diff(nothing, l.Plan(one), true)), fmt.Sprint(l.Diff(nothing, l.Plan(other), true))
	if want != same || len(want) < 100 {
		t.Errorf("in one order:\n%s\nin the other:\n%s", want, same)
	}
}

// Of a cluster that is not known whole nothing is planned: what is native may be missing.
func TestIncomplete(t *testing.T) {
	known := (&island{}).snapshot(2)
	known.Complete = false
	nothing := newPicture()
	nothing.devices = uplinkOnly()
	l := New(Settings{Node: "n1"})
	if changes := l.Diff(nothing, l.Plan(known), false); len(changes) > 0 {
		t.Errorf("planned all the same:\n%v", changes)
	}
}

func TestLaws(t *testing.T) { laws(t) }

// The same where there is no tcx.
func TestLawsOfFilters(t *testing.T) {
	withoutTCX(t)
	laws(t)
}

func withoutTCX(t *testing.T) { layertest.WithoutTCX(t, &haveTCX) }

func laws(t *testing.T) {
	layertest.Laws(t, func(t *testing.T) layertest.Subject {
		is := newIsland(t)
		is.serve()
		narrow := is.snapshot(2)
		narrow.Masquerade = &model.Masquerade{Not: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}, LinkLocal: true}
		none := is.snapshot(2)
		none.Nodes[0].PodCIDRs = nil
		return layertest.Subject{
			New:       func() layer.Layer { return New(is.settings) },
			Snapshots: []*model.Snapshot{is.snapshot(2, 3), narrow, none, {Complete: true}, is.snapshot(4)},
			Observe:   is.observe,
			Stranger:  is.stranger,
			Works:     func() error { return errors.Join(is.carry(world4, 1000), is.carry(world6, 1000)) },
		}
	})
}

// observe prints pins, and the programs, filters and qdiscs of the node's devices.
func (is *island) observe() string {
	is.t.Helper()
	var text []string
	must(is.t, filepath.WalkDir(is.BPF, func(path string, _ os.DirEntry, err error) error {
		text = append(text, path)
		return err
	}))
	text = append(text, layertest.Devices(is.t, is.NetNS)...)
	return strings.Join(text, "\n")
}

// stranger has a filter at the uplink, and a pin beside ours.
func (is *island) stranger() func() error {
	is.t.Helper()
	program := layertest.Passing(is.t, "stranger")
	pin := filepath.Join(filepath.Dir(is.settings.Pins), "stranger")
	must(is.t, program.Pin(pin))
	is.t.Cleanup(func() { _ = os.Remove(pin) })
	filtered := layertest.StrangeFilter(is.t, is.NetNS, is.uplink, netlink.HANDLE_MIN_EGRESS, program)
	return func() error {
		if _, err := os.Stat(pin); err != nil {
			return err
		}
		return filtered()
	}
}
