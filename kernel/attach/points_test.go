package attach

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	bpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/netns"
)

// What one process attached the next one has, by links and by filters; and what it did not,
// it leaves alone.
func TestPoints(t *testing.T) {
	for _, tcx := range []bool{true, false} {
		p := newPlace(t, ebpf.AttachTCXIngress)
		if tcx && !HaveTCX() {
			continue // the filters stand for the links of such kernels
		}
		pins := filepath.Join(p.pins, "mine")
		p.must(os.Mkdir(pins, 0o700))
		programs := map[string]*ebpf.Program{"coming": p.passing("coming"), "leaving": p.passing("leaving")}
		process := func() *Points {
			return &Points{Netns: p.hook.Netns, Pins: pins, TCX: tcx, Ways: map[string]Way{
				"coming":  {Attach: ebpf.AttachTCXIngress, Order: OrderAnswers},
				"leaving": {Attach: ebpf.AttachTCXEgress, Order: OrderLeaving},
			}}
		}
		one := process()
		p.must(one.Open())
		coming, leaving := Point{"coming", loopback}, Point{"leaving", loopback}
		for _, at := range []Point{leaving, coming, coming} { // again means nothing
			p.must(one.Attach(at, "lo", programs[at.Program]))
		}
		if err := one.Attach(Point{"coming", 77}, "gone", programs["coming"]); !DeviceGone(err) || one.Alive(Point{"coming", 77}) {
			t.Errorf("tcx %v: attaching to no device: %v", tcx, err)
		}
		id := one.At(coming).ID()
		one.Close()

		next := process()
		p.must(next.Open())
		if got := next.All(); !slices.Equal(got, []Point{coming, leaving}) || next.At(coming).ID() != id || next.At(coming).Name() != "lo" {
			t.Fatalf("tcx %v: the next process has %v, of link %d at %s, not link %d at lo", tcx, got, next.At(coming).ID(), next.At(coming).Name(), id)
		}
		p.must(next.Switch(map[string]*ebpf.Program{"coming": p.passing("next"), "leaving": p.passing("next")}))
		if tcx {
			p.must(os.Remove(filepath.Join(pins, "link_coming_1")))
			if lost := next.Lost(); !slices.Equal(lost, []string{coming.Pin()}) {
				t.Errorf("lost is %v", lost)
			}
		}
		p.must(next.Keep())
		if lost := next.Lost(); len(lost) > 0 {
			t.Errorf("tcx %v: still lost is %v", tcx, lost)
		}
		p.must(next.Detach(coming))
		p.must(next.Detach(coming))
		if next.Alive(coming) || !next.Alive(leaving) {
			t.Errorf("tcx %v: detached, of %v", tcx, next.All())
		}
		p.must(next.Detach(leaving))
		if left, err := os.ReadDir(pins); err != nil || len(left) > 0 || p.hasClsact() {
			t.Errorf("tcx %v: left are %v, %v, and qdiscs %v", tcx, left, err, p.queueing())
		}
	}
}

// A program stands before the one of another layer's that it is to be ahead of, wherever that
// stands, and in its place where there is none.
func TestPointAhead(t *testing.T) {
	p := newPlace(t, ebpf.AttachTCXIngress)
	if !HaveTCX() {
		return // filters stand in the order of their numbers
	}
	pins := filepath.Join(p.pins, "mine")
	p.must(os.Mkdir(pins, 0o700))
	points := &Points{Netns: p.hook.Netns, Pins: pins, TCX: true, Ways: map[string]Way{
		"mine":  {Attach: ebpf.AttachTCXIngress, Order: OrderRoutes, Ahead: "theirs"},
		"other": {Attach: ebpf.AttachTCXIngress, Order: OrderRoutes, Ahead: "absent"},
	}}
	p.must(points.Open())
	for _, name := range []string{"first", "theirs", "last"} {
		l, err := p.hook.TCX(p.passing(name), bpflink.Tail(), "")
		p.must(err)
		defer l.Close()
	}
	for _, name := range []string{"mine", "other"} {
		p.must(points.Attach(Point{name, loopback}, "lo", p.passing(name)))
	}
	if got, want := p.order(), []string{"first", "mine", "theirs", "last", "other"}; !slices.Equal(got, want) {
		t.Errorf("packets meet %v, not %v", got, want)
	}
}

// order are the names of the programs, as packets meet them.
func (p *place) order() (names []string) {
	programs, err := p.hook.Programs()
	p.must(err)
	for _, id := range programs {
		names = append(names, NameOf(id))
	}
	return names
}

// Of a device that has gone the next process forgets the links, pins and all.
func TestPointsOfADeviceThatIsGone(t *testing.T) {
	p := newPlace(t, ebpf.AttachTCXIngress)
	if !HaveTCX() {
		return // filters go with their device
	}
	pins := filepath.Join(p.pins, "mine")
	p.must(os.Mkdir(pins, 0o700))
	process := func() *Points {
		return &Points{Netns: p.hook.Netns, Pins: pins, TCX: true, Ways: map[string]Way{"coming": {Attach: ebpf.AttachTCXIngress, Order: OrderRoutes}}}
	}
	device := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "passing"}}
	p.must(netns.Do(p.hook.Netns, func() error { return netlink.LinkAdd(device) }))
	at := Point{"coming", device.Index}
	open := process()
	p.must(open.Open())
	p.must(open.Attach(at, "passing", p.program))
	stays := Point{"coming", loopback}
	p.must(open.Attach(stays, "lo", p.program))
	p.must(netns.Do(p.hook.Netns, func() error { return netlink.LinkDel(device) }))
	p.must(open.Switch(map[string]*ebpf.Program{"coming": p.passing("next")}))
	if got := open.All(); !slices.Equal(got, []Point{stays}) {
		t.Errorf("switched over are %v", got)
	}
	next := process()
	p.must(next.Open())
	left, err := os.ReadDir(pins)
	if got := next.All(); !slices.Equal(got, []Point{stays}) || len(left) != 1 || err != nil {
		t.Errorf("the next process has %v, and there are pins %v, %v", got, left, err)
	}
	p.must(next.Detach(stays))
	open.Close()
}
