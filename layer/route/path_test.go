package route

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/millrace/millrace/kernel/probe"
)

// A measurement that ends without a result says nothing against an earlier one; what an
// earlier process left is believed until somebody looked, and kept if nothing is heard
// because packets come and go.
func TestWhatIsKnownOfPaths(t *testing.T) {
	to, device := netip.MustParseAddr("192.0.2.2"), 2
	var answer probe.Path
	var failed error
	p := newPaths("")
	p.mtu = func(_ context.Context, _ string, _ netip.Addr, most int) (probe.Path, error) {
		answer.Tried = most
		return answer, failed
	}
	picture := newPicture()
	picture.facts = segment()
	row := &Row{To: netip.MustParsePrefix("10.244.2.0/24"), Via: to, Direct: true, index: device, set: 1350}
	picture.rows[row.To] = row
	picture.measure()
	p.takeOver(picture)
	passed := func(n int) func() { return func() { answer, failed = probe.Path{Passed: n}, nil } }
	fails := func(err error) func() { return func() { answer, failed = probe.Path{}, err } }
	mtu := func(n int) func() {
		return func() { picture.facts.devices[device] = fact{name: "eth0", mtu: n, ethernet: true} }
	}
	for _, step := range []struct {
		what   string
		do     func()
		differ bool
		narrow int
	}{
		{"an earlier process' is believed, while answers come and go", fails(errors.New("answers come and go")), false, 1350},
		{"and forgotten, if nobody answers", fails(probe.ErrSilent), true, 0},
		{"all passes", passed(1500), false, 0},
		{"less passes", passed(1400), true, 1400},
		{"still", passed(1400), false, 1400},
		{"a router says so now", func() { answer, failed = probe.Path{Passed: 1400, Announced: 1400}, nil }, true, 1400},
		{"the node is off", fails(probe.ErrSilent), false, 1400},
		{"it may be measured again", passed(1380), true, 1380},
		{"the uplink takes less by itself", func() { mtu(1300)(); passed(1300)() }, true, 0},
	} {
		step.do()
		p.aim(picture)
		if differ := p.measure(t.Context(), p.due(true)); differ != step.differ || p.all()[to].narrow() != step.narrow {
			t.Errorf("%s: differs: %v; known is %+v", step.what, differ, p.all()[to])
		}
	}
	if due := p.due(false); len(due) > 0 {
		t.Errorf("measured, and still to do: %v", due)
	}
	mtu(9000)()
	p.aim(picture)
	if due := p.due(false); fmt.Sprint(due) != "[192.0.2.2]" || len(p.news) != 1 {
		t.Errorf("the uplink takes more, and to be measured is %v", due)
	}
	delete(picture.rows, row.To)
	p.aim(picture)
	if len(p.all()) > 0 || p.learn(to, measurement{Path: probe.Path{Tried: 9000, Passed: 1400}, most: 9000}, nil) {
		t.Errorf("the node has gone, and known is %v", p.all())
	}
}
