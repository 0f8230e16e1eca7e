package dns

import (
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// city is the town with so many Services more.
func city(more int) *model.Snapshot {
	s := town()
	for i := range more {
		s.Services = append(s.Services, named("city", fmt.Sprintf("x%06d", i), fmt.Sprintf("10.%d.%d.%d", 100+i>>16, i>>8&255, i&255)))
	}
	return s
}

func (h *hamlet) become(l *Layer, snapshot *model.Snapshot) layer.Changes {
	h.t.Helper()
	have, err := l.Read()
	must(h.t, err)
	want := l.Plan(snapshot)
	changes := l.Diff(have, want, true)
	_, _, err = l.Apply(have, want, changes)
	must(h.t, err)
	must(h.t, l.Settle())
	return changes
}

// More names than there is room for get a larger map, and no query meets a gap: there is no
// server that would answer it.
func TestTheMapGrows(t *testing.T) { theMapGrows(t) }

func TestTheMapGrowsBehindFilters(t *testing.T) {
	withoutTCX(t)
	theMapGrows(t)
}

func theMapGrows(t *testing.T) {
	h := newHamlet(t)
	h.settings.room, h.settings.names = 1<<10, 1<<13
	l := h.open()
	defer watch(l)()
	var stop atomic.Bool
	failed := make(chan error, 1)
	var asked int
	go func() {
		defer close(failed)
		for ; !stop.Load(); asked++ {
			got, err := h.look("web.shop.svc.cluster.local.")
			if err == nil && (len(got) != 1 || got[0] != netip.MustParseAddr("10.96.0.20")) {
				err = fmt.Errorf("the answer is %v", got)
			}
			if err != nil {
				failed <- err
				return
			}
		}
	}()
	room := func() int { return int(l.host.(*datapath).Maps[datapathMapNames].MaxEntries()) }
	few := &model.DNS{Zone: "cluster.local", TTL: 7e9}
	for _, step := range []struct{ more, room int }{{900, 1 << 10}, {1500, 1 << 11}, {6000, 1 << 13}, {10, 1 << 13}} {
		snapshot := city(step.more)
		snapshot.DNS = few
		h.become(l, snapshot)
		if room() != step.room {
			t.Errorf("with %d Services there is room for %d names, not %d", step.more, room(), step.room)
		}
		last := fmt.Sprintf("x%06d.city.svc.cluster.local.", step.more-1)
		if _, err := h.look(last); err != nil {
			t.Errorf("the last of %d: %v", step.more, err)
		}
		if changes := h.become(l, snapshot); len(changes) > 0 { // the TTL is in the new program, too
			t.Errorf("again\n%v", changes[:min(5, len(changes))])
		}
	}
	// Another process goes on with the larger map.
	h.become(l, city(6000))
	l.Close()
	next := New(h.settings)
	must(t, next.Open())
	defer next.Close()
	if changes := h.become(next, city(6000)); len(changes) > 0 {
		t.Errorf("another process has still to do\n%v", changes[:min(5, len(changes))])
	}
	l = next
	if room() != 1<<13 {
		t.Errorf("another process has room for %d", room())
	}
	// There is an end to it.
	h.become(l, city(9000))
	d, err := l.Describe()
	must(t, err)
	text := strings.Join(d.Degraded, "\n")
	if over := l.Plan(city(9000)).(*Picture).over; room() > 1<<14 || over == 0 || !strings.Contains(text, fmt.Sprintf("%d names and those that are not known here", over)) {
		t.Errorf("room for %d, and status says %q", room(), text)
	}
	stop.Store(true)
	if err := <-failed; err != nil {
		t.Fatalf("after %d queries: %v", asked, err)
	}
	t.Logf("%d queries, none without its answer", asked)
}

// What growing costs, for as many names as there may be on a small node.
func TestGrowingCosts(t *testing.T) {
	h := newHamlet(t)
	h.settings.room = leastNames
	l := h.open()
	h.become(l, city(leastNames-100))
	before := bpfmap.Bytes(l.host.(*datapath).Maps[datapathMapNames])
	begun := spent(t)
	take, err := l.host.grow(2 * leastNames)
	must(t, err)
	must(t, take())
	took := spent(t) - begun
	names := l.host.(*datapath).Maps[datapathMapNames]
	t.Logf("from %d to %d names: %v of processor time; %d bytes, %d before", leastNames, names.MaxEntries(), took, bpfmap.Bytes(names), before)
	if int(names.MaxEntries()) != 2*leastNames || took.Seconds() > 20 {
		t.Errorf("room for %d after %v", names.MaxEntries(), took)
	}
	if _, err := h.look("web.shop.svc.cluster.local."); err != nil {
		t.Error(err)
	}
}
