package bpfmap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func loaded(t *testing.T, kind ebpf.MapType) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: kind, KeySize: 4, ValueSize: 8, MaxEntries: 3})
	must(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

func TestPinsLeadToTheMapsInForce(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("pinning maps needs root")
	}
	root := t.TempDir()
	must(t, unix.Mount("bpf", root, "bpf", 0, "mode=0700"))
	t.Cleanup(func() { must(t, unix.Unmount(root, unix.MNT_DETACH)) })
	folder := filepath.Join(root, "pins") // the kernel has files of its own above
	must(t, os.Mkdir(folder, 0o700))
	names := []string{"one", "two"}
	old := map[string]*ebpf.Map{"one": loaded(t, ebpf.Array), "two": loaded(t, ebpf.Array)}
	next := map[string]*ebpf.Map{"one": loaded(t, ebpf.Array), "two": old["two"]}
	expect := func(what string, maps map[string]*ebpf.Map, want ...bool) {
		t.Helper()
		for i, name := range names {
			if got := IsPinned(maps[name], filepath.Join(folder, name)); got != want[i] {
				t.Errorf("%s: %s is pinned: %v", what, name, got)
			}
		}
	}
	expect("before", old, false, false)
	must(t, Pin(folder, names, old))
	expect("after", old, true, true)
	must(t, old["one"].Pin(filepath.Join(folder, "one"+NextSuffix))) // of a process that was killed
	must(t, Pin(folder, names, next))
	expect("the map that was replaced", old, false, true)
	expect("the new one", next, true, true)
	must(t, os.Remove(filepath.Join(folder, "two")))
	must(t, Pin(folder, names, next))
	expect("somebody removed a pin", next, true, true)
	left, err := os.ReadDir(folder)
	if must(t, err); len(left) != len(names) {
		t.Errorf("in the folder: %v", left)
	}
}

func TestCountsAreSums(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("pinning maps needs root")
	}
	m := loaded(t, ebpf.PerCPUArray)
	cpus := make([]uint64, ebpf.MustPossibleCPU())
	for i := range cpus {
		cpus[i] = uint64(i + 1)
	}
	must(t, m.Put(uint32(1), cpus))
	counts, err := Counts(m, []string{"answered", "dropped"})
	must(t, err)
	n := len(cpus)
	if want := map[string]uint64{"answered": 0, "dropped": uint64(n * (n + 1) / 2)}; fmt.Sprint(counts) != fmt.Sprint(want) {
		t.Errorf("%v, not %v", counts, want)
	}
	if _, err := Counts(m, []string{"", "", "", "more words than counters"}); err == nil {
		t.Error("no error")
	}
}

func TestAddressesAreInNetworkOrder(t *testing.T) {
	for _, text := range []string{"0.0.0.0", "10.1.2.3", "::", "::1", "fd00::1:2:3"} {
		addr := netip.MustParseAddr(text)
		words := AddrWords(addr)
		var bytes []byte
		for _, word := range words {
			bytes = binary.NativeEndian.AppendUint32(bytes, word)
		}
		if as16 := addr.As16(); string(bytes) != string(as16[:]) {
			t.Errorf("%s is %x in memory, not %x", addr, bytes, as16)
		}
		if back := AddrOf(words); back != addr {
			t.Errorf("%s comes back as %s", addr, back)
		}
	}
}

// A process takes over all maps of an earlier one or none, and who only looks is told what
// is not there.
func TestMapsOfAnEarlierProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("pinning maps needs root")
	}
	root := t.TempDir()
	must(t, unix.Mount("bpf", root, "bpf", 0, "mode=0700"))
	t.Cleanup(func() { must(t, unix.Unmount(root, unix.MNT_DETACH)) })
	names := []string{"one", "two"}
	maps := map[string]*ebpf.Map{"one": loaded(t, ebpf.Array), "two": loaded(t, ebpf.Hash)}
	specs := map[string]*ebpf.MapSpec{
		"one": {Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 3}, "two": {Type: ebpf.Hash, KeySize: 4, ValueSize: 8, MaxEntries: 3},
	}
	adopts := func(what string, want bool) {
		t.Helper()
		found, err := Adopt(root, names, func(name string, _ *ebpf.Map) *ebpf.MapSpec { return specs[name] })
		must(t, err)
		defer CloseAll(found)
		if (len(found) == len(names)) != want || !want && found != nil {
			t.Errorf("%s: adopted are %v", what, found)
		}
	}
	adopts("nothing is there", false)
	must(t, Pin(root, names[:1], maps))
	adopts("one of two is there", false)
	if found, absent, err := Look(root, names...); !errors.Is(err, fs.ErrNotExist) || absent != "two" || found != nil {
		t.Errorf("who looks at one of two sees %v, not there is %q: %v", found, absent, err)
	}
	must(t, Pin(root, names, maps))
	adopts("both are there", true)
	opened, absent, err := Look(root, names...)
	must(t, err)
	defer CloseAll(opened)
	if len(opened) != 2 || absent != "" || SameLayout(opened, specs) != nil {
		t.Errorf("who looks sees %v, not there is %q: %v", opened, absent, SameLayout(opened, specs))
	}
	specs["two"].ValueSize = 16
	adopts("one is another version's", false)
	if err := SameLayout(opened, specs); err == nil || err.Error() != "map two is another version's: use the millrace that made it" {
		t.Errorf("of another version's map it says %v", err)
	}
}
