package pinned

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/netns"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// owner is a program at the loopback device of a namespace over one map, by a folder of pins.
type owner struct {
	*testing.T
	netns, pins string
}

func newOwner(t *testing.T) *owner {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces needs root")
	}
	bpf := t.TempDir()
	must(t, unix.Mount("bpf", bpf, "bpf", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(bpf, unix.MNT_DETACH)) })
	o := &owner{T: t, netns: filepath.Join(t.TempDir(), "node"), pins: filepath.Join(bpf, "mine")}
	must(t, netns.Create(o.netns))
	t.Cleanup(func() { must(t, netns.Remove(o.netns)) })
	return o
}

var at = attach.Point{Program: "mine", Device: 1}

// process begins as one whose map has values of so many bytes. It says whether it could
// settle at once.
func (o *owner) process(size uint32) (f *Folder, atOnce bool) {
	o.Helper()
	f = &Folder{Names: []string{"values"}, Points: attach.Points{Netns: o.netns, Pins: o.pins, TCX: attach.HaveTCX(),
		Ways: map[string]attach.Way{at.Program: {Attach: ebpf.AttachTCXIngress, Order: attach.OrderQueries}}}}
	spec := &ebpf.CollectionSpec{
		Maps: map[string]*ebpf.MapSpec{"values": {Name: "values", Type: ebpf.Array, KeySize: 4, ValueSize: size, MaxEntries: 1}},
		Programs: map[string]*ebpf.ProgramSpec{at.Program: {Name: at.Program, Type: ebpf.SchedCLS, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}}},
	}
	must(o.T, f.Make())
	o.Cleanup(f.Close)
	_, err := f.Adopt(func(name string, _ *ebpf.Map) *ebpf.MapSpec { return spec.Maps[name] })
	must(o.T, err)
	_, err = f.Load(spec)
	must(o.T, err)
	atOnce, err = f.TakeOver()
	must(o.T, err)
	return f, atOnce
}

// runs is the number of the program in force.
func (o *owner) runs(f *Folder) (id uint32) {
	o.Helper()
	if !f.Points.TCX {
		return f.Points.At(at).ID()
	}
	info, err := f.Points.At(at).(*attach.Link).Kernel.Info()
	must(o.T, err)
	return uint32(info.Program)
}

// A process of the same layout has its predecessor's map; one of another leaves both map and
// program in force until it settles.
func TestNextProcess(t *testing.T) {
	o := newOwner(t)
	first, atOnce := o.process(8)
	if !atOnce || len(first.Lost()) > 0 {
		t.Fatalf("nothing was there, and it waits (%v) or misses %v", !atOnce, first.Lost())
	}
	must(t, first.Settle())
	must(t, first.Points.Attach(at, "lo", first.Programs[at.Program]))
	must(t, first.Maps["values"].Put(uint32(0), uint64(4711)))
	value := func(f *Folder) (v uint64) {
		must(t, f.Maps["values"].Lookup(uint32(0), &v))
		return v
	}
	was := o.runs(first)

	same, atOnce := o.process(8)
	if !atOnce || value(same) != 4711 || o.runs(same) != was {
		t.Errorf("the same layout: at once %v, value %d, program %d, and it was %d", atOnce, value(same), o.runs(same), was)
	}
	must(t, same.Settle())
	if now := o.runs(same); now == was {
		t.Error("settled, and the old program runs")
	}
	was = o.runs(same)

	other, atOnce := o.process(16)
	if atOnce || o.runs(other) != was || len(other.Lost()) > 0 || len(same.Lost()) > 0 {
		t.Errorf("another layout: at once %v, program %d, and it was %d; lost are %v and %v", atOnce, o.runs(other), was, other.Lost(), same.Lost())
	}
	for range 2 { // again means nothing
		must(t, other.Settle())
	}
	if o.runs(other) == was || !slices.Equal(same.Lost(), []string{"values"}) {
		t.Errorf("settled, the program in force is the old one: %v; the one before has lost %v", o.runs(other) == was, same.Lost())
	}
}

// What somebody takes away is missed, and comes back with the folder.
func TestRestore(t *testing.T) {
	o := newOwner(t)
	f, _ := o.process(8)
	must(t, f.Settle())
	must(t, f.Points.Attach(at, "lo", f.Programs[at.Program]))
	want := []string{"values"}
	if f.Points.TCX {
		want = append(want, at.Pin())
	}
	must(t, os.RemoveAll(o.pins))
	if lost := f.Lost(); !slices.Equal(lost, want) {
		t.Errorf("lost is %v, not %v", lost, want)
	}
	must(t, f.Restore())
	if lost := f.Lost(); len(lost) > 0 {
		t.Errorf("restored, and lost is %v", lost)
	}
}
