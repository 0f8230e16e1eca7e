package service

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// A reader of service.h looks up a Service, then a slot below the count it saw,
// then the backend. Whatever moment of an update it meets, it must find one.
// So after every single map write, every Service that is there must be whole.
func TestEveryMomentOfAnUpdateIsWhole(t *testing.T) {
	l, fakes := onFakes(10000)
	watch := &watcher{t: t, fakes: fakes}
	l.tables.services = &watched[datapathServiceKey, datapathService]{fakes.services, watch}
	l.tables.slots = &watched[datapathSlotKey, uint32]{fakes.slots, watch}
	l.tables.backends = &watched[uint32, datapathBackend]{fakes.backends, watch}
	var have layer.Picture = inForce(map[Frontend]*Row{})
	for range 300 {
		want := l.Plan(randomCluster(6, 7))
		var err error
		if have, _, err = l.Apply(have, want, l.Diff(have, want, true)); err != nil {
			t.Fatal(err)
		}
		read, err := l.Read()
		if err != nil {
			t.Fatal(err)
		}
		if left := l.Diff(read, want, true); len(left) > 0 {
			t.Fatalf("the tables hold something other than was applied:\n%v", left)
		}
		if n := len(fakes.backends.Entries); n != l.tables.slotCount {
			t.Fatalf("%d backends in the map, %d in use: one leaked", n, l.tables.slotCount)
		}
	}
	if watch.moments < 3000 {
		t.Fatalf("only %d moments were watched", watch.moments)
	}
}

// A backend that stays must keep its number, or UDP flows to it would move.
func TestWhatStaysKeepsItsNumber(t *testing.T) {
	l, fakes := onFakes(1000)
	var have layer.Picture = inForce(map[Frontend]*Row{})
	numberOf := func(address string) uint32 {
		for number, b := range fakes.backends.Entries {
			if addressOf(b).Addr().String() == address {
				return number
			}
		}
		return 0
	}
	steps := [][]string{{"10.1.0.1", "10.1.0.5"}, {"10.1.0.0", "10.1.0.5", "10.1.0.7"}, {"10.1.0.5"}}
	var first uint32
	for _, pods := range steps {
		want := l.Plan(&model.Snapshot{Services: []*model.Service{
			serviceOf("s", model.UDP, 53, []string{"10.96.0.1"}, 53, pods...)}})
		have, _, _ = l.Apply(have, want, l.Diff(have, want, true))
		if first == 0 {
			first = numberOf("10.1.0.5")
		}
		if now := numberOf("10.1.0.5"); now != first || now == 0 {
			t.Fatalf("with pods %v the backend 10.1.0.5 has number %d, at first %d", pods, now, first)
		}
	}
}

// What a writer that was killed in the middle leaves is removed by the next.
func TestAdoptRemovesWhatAKilledWriterLeft(t *testing.T) {
	l, fakes := onFakes(1000)
	empty := inForce(map[Frontend]*Row{})
	want := l.Plan(shop("10.1.0.1", "10.1.0.2"))
	if _, _, err := l.Apply(empty, want, l.Diff(empty, want, true)); err != nil {
		t.Fatal(err)
	}
	fakes.backends.Entries[900] = backendOf(netip.MustParseAddrPort("10.9.9.9:1"), 77)
	fakes.slots.Entries[datapathSlotKey{Service: 77}] = 900
	for key := range fakes.slots.Entries { // and one slot that was never written
		if key.Service != 77 {
			delete(fakes.slots.Entries, key)
			break
		}
	}
	have, err := l.Read()
	if err != nil {
		t.Fatal(err)
	}
	if _, there := fakes.backends.Entries[900]; there {
		t.Error("the orphaned backend is still there")
	}
	left := l.Diff(have, want, true)
	if len(left) != 1 || left[0].Op != layer.Alter {
		t.Fatalf("one Service lacks a backend and is to be mended, but: %v", left)
	}
	if have, _, err = l.Apply(have, want, left); err != nil {
		t.Fatal(err)
	}
	if read, _ := l.Read(); len(l.Diff(read, want, true)) > 0 || len(l.Diff(have, want, true)) > 0 {
		t.Error("not mended")
	}
}

func TestMapsGrowBeforeTheyFill(t *testing.T) {
	l, fakes := onFakes(4)
	empty := inForce(map[Frontend]*Row{})
	want := l.Plan(randomCluster(3000, 8))
	if _, _, err := l.Apply(empty, want, l.Diff(empty, want, true)); err != nil {
		t.Fatal(err)
	}
	if fakes.grown.services < want.Len() {
		t.Fatalf("asked for room for %d Services, %d are there", fakes.grown.services, want.Len())
	}
}

// One endpoint more or less is a handful of writes, however large the cluster.
func TestAChangeCostsWhatChanged(t *testing.T) {
	l, fakes := onFakes(1 << 20)
	snapshot := randomCluster(2000, 8)
	var have layer.Picture = inForce(map[Frontend]*Row{})
	have, _, err := l.Apply(have, l.Plan(snapshot), l.Diff(have, l.Plan(snapshot), true))
	if err != nil {
		t.Fatal(err)
	}
	altered := *snapshot.Services[7]
	altered.Ports = []model.ServicePort{altered.Ports[0]}
	altered.Ports[0].Backends = append([]model.Backend{{
		Address: netip.MustParseAddrPort("10.9.0.1:8080"), Ready: true}}, altered.Ports[0].Backends...)
	snapshot.Services[7] = &altered
	fakes.services.Written, fakes.slots.Written, fakes.backends.Written = 0, 0, 0
	if _, _, err := l.Apply(have, l.Plan(snapshot), l.Diff(have, l.Plan(snapshot), true)); err != nil {
		t.Fatal(err)
	}
	if n := fakes.services.Written + fakes.slots.Written + fakes.backends.Written; n != 3 {
		t.Fatalf("one endpoint more took %d map writes, not 3", n)
	}
}

// randomCluster has up to n Services with up to m pods each.
func randomCluster(n, m int) *model.Snapshot {
	snapshot := &model.Snapshot{Complete: true}
	for i := range n {
		if rand.IntN(5) == 0 {
			continue
		}
		var pods []string
		for j := range m {
			if rand.IntN(2) == 0 {
				pods = append(pods, fmt.Sprintf("10.1.%d.%d", i%250, j+1))
			}
		}
		ip := fmt.Sprintf("10.%d.%d.%d", 96+i/62500, i/250%250, i%250)
		snapshot.Services = append(snapshot.Services, serviceOf(fmt.Sprintf("s%05d", i), model.TCP, 80, []string{ip}, 8080, pods...))
	}
	return snapshot
}

// watcher checks after every write that each Service can be read.
type watcher struct {
	t       *testing.T
	fakes   *fakeTables
	moments int
}

func (w *watcher) look() {
	w.t.Helper()
	w.moments++
	for key, service := range w.fakes.services.Entries {
		for i := range service.Slots {
			number, ok := w.fakes.slots.Entries[datapathSlotKey{Service: service.Id, Slot: i}]
			backend, there := w.fakes.backends.Entries[number]
			if !ok || !there || backend.Service != service.Id {
				w.t.Fatalf("service %s: slot %d of %d leads nowhere in the middle of an update", frontendOf(key), i, service.Slots)
			}
		}
	}
}

// watched is a table whose every single write is looked at.
type watched[K comparable, V any] struct {
	bpfmap.Table[K, V]
	watcher *watcher
}

func (w *watched[K, V]) Put(keys []K, values []V) []error {
	for i := range keys {
		w.Table.Put(keys[i:i+1], values[i:i+1])
		w.watcher.look()
	}
	return nil
}

func (w *watched[K, V]) Delete(keys []K) []error {
	for i := range keys {
		w.Table.Delete(keys[i : i+1])
		w.watcher.look()
	}
	return nil
}
