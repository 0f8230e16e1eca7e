package service

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/conntrack"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// Every program passes the verifier with every setting on and off. The golden
// file holds their sizes in instructions, which are those of the pinned clang:
// a program that grows is seen in review.
func TestEveryProgramPassesTheVerifier(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads programs")
	}
	var sizes strings.Builder
	for _, on := range []bool{true, false} {
		spec, err := loadDatapath()
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{datapathVarCanSetError, datapathVarAsksConntrack} {
			if err := spec.Variables[name].Set(on); err != nil {
				t.Fatal(err)
			}
		}
		if !on {
			conntrack.AskNobody(spec)
		}
		loaded, err := ebpf.NewCollection(spec)
		if err != nil {
			t.Fatalf("settings %v: %+v", on, err)
		}
		defer loaded.Close()
		for _, name := range slices.Sorted(maps.Keys(loaded.Programs)) {
			info, err := loaded.Programs[name].Info()
			if err != nil {
				t.Fatal(err)
			}
			verified, _ := info.VerifiedInstructions()
			t.Logf("%-13s settings %-5v %d instructions verified", name, on, verified)
			if verified > 100_000 {
				t.Errorf("%s: %d instructions verified: a tenth of the kernel's limit of a million", name, verified)
			}
		}
	}
	spec, _ := loadDatapath()
	for _, name := range slices.Sorted(maps.Keys(spec.Programs)) {
		fmt.Fprintf(&sizes, "%-13s %d\n", name, len(spec.Programs[name].Instructions))
	}
	golden := filepath.Join("testdata", "program-sizes.golden")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, []byte(sizes.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || string(want) != sizes.String() {
		t.Errorf("program sizes in instructions:\n%s%s has:\n%s(%v) run with UPDATE_GOLDEN=1 if this is intended", sizes.String(), golden, want, err)
	}
}

// More Services than the maps have room for: they are exchanged for larger
// ones, and connections go on meanwhile.
func TestMapsGrowUnderTraffic(t *testing.T) {
	web := serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080, "127.0.0.1", "127.0.0.2")
	s := newStreet(t, &model.Snapshot{Services: []*model.Service{web}})
	serve(t, s.Bed, "tcp", "127.0.0.1:8080", "127.0.0.2:8080")
	before := s.layer.tables.services.Capacity()
	var stop atomic.Bool
	var tries int
	failed := make(chan error, 1)
	go func() {
		defer close(failed)
		for ; !stop.Load(); tries++ {
			if _, _, err := ask(s.Bed, "tcp", "10.96.0.1:80"); err != nil {
				failed <- err
				return
			}
		}
	}()
	for i := range 2 {
		snapshot := &model.Snapshot{Services: []*model.Service{web}}
		for j := range before << i {
			ip := fmt.Sprintf("10.%d.%d.%d", 100+j>>16, j>>8&255, j&255)
			snapshot.Services = append(snapshot.Services, serviceOf(fmt.Sprintf("x%06d", j), model.TCP, 80, []string{ip}, 80, "127.0.0.7"))
		}
		s.become(snapshot)
	}
	s.become(&model.Snapshot{Services: []*model.Service{web}})
	stop.Store(true)
	if err := <-failed; err != nil {
		t.Fatalf("after %d connections: %v", tries, err)
	}
	after := s.layer.tables.services.Capacity()
	t.Logf("room for %d Services, then %d; %d connections, none failed", before, after, tries)
	if after < 4*before || tries == 0 {
		t.Errorf("the maps grew from %d to %d during %d connections", before, after, tries)
	}
}

// What is pinned in another layout is not used: the new process fills maps of
// its own, and only then takes the hooks over.
func TestOtherLayoutIsReplacedWithoutAGap(t *testing.T) {
	web := &model.Snapshot{Services: []*model.Service{
		serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080, "127.0.0.1")}}
	s := newStreet(t, web)
	serve(t, s.Bed, "tcp", "127.0.0.1:8080")
	s.layer.Close()
	s.layOtherwise(datapathMapSlots)

	next := New(s.layer.settings)
	if err := next.Open(); err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if _, _, err := ask(s.Bed, "tcp", "10.96.0.1:80"); err != nil {
		t.Fatalf("the new process has no Services yet, and the old programs do not serve any more: %v", err)
	}
	have, err := next.Read()
	if err != nil || have.Len() != 0 {
		t.Fatalf("the new maps hold %d Services, %v", have.Len(), err)
	}
	if _, _, err := next.Apply(have, next.Plan(web), next.Diff(have, next.Plan(web), true)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ask(s.Bed, "tcp", "10.96.0.1:80"); err != nil {
		t.Fatalf("filled but not settled, the old programs do not serve any more: %v", err)
	}
	if err := next.Settle(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ask(s.Bed, "tcp", "10.96.0.1:80"); err != nil {
		t.Fatalf("after the new maps were put in force: %v", err)
	}
	if next.datapath.waiting != nil {
		t.Error("the new programs were never put in force")
	}
	read, err := New(s.layer.settings).Look()
	if err != nil || read.Len() != 1 {
		t.Errorf("the pins hold %d Services, %v", read.Len(), err)
	}
}

// layOtherwise pins a map of another layout in the place of one of ours, as
// another version would have.
func (s *street) layOtherwise(name string) {
	s.t.Helper()
	pin := filepath.Join(s.layer.settings.Pins, name)
	if err := os.Remove(pin); err != nil {
		s.t.Fatal(err)
	}
	other, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		s.t.Fatal(err)
	}
	defer other.Close()
	if err := other.Pin(pin); err != nil {
		s.t.Fatal(err)
	}
}

func TestWhatIsMissingIsNamed(t *testing.T) {
	bed := layertest.NewBed(t)
	for _, row := range []struct {
		settings Settings
		want     string
	}{
		{Settings{Cgroup: "/tmp", Pins: bed.BPF}, "/tmp is not in a cgroup2 hierarchy: name one with --cgroup"},
		{Settings{Cgroup: "/absent", Pins: bed.BPF}, "cgroup /absent: no such file or directory"},
		{Settings{Cgroup: bed.Cgroup, Pins: t.TempDir()}, "is not in a bpf file system: mount one with"},
	} {
		if err := New(row.settings).Open(); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%+v: %v, which does not say %q", row.settings, err, row.want)
		}
	}
}

func TestMissingPrivilegeIsNamed(t *testing.T) {
	bed := layertest.NewBed(t)
	err := withoutCapabilities(func() error {
		return New(Settings{Cgroup: bed.Cgroup, Pins: filepath.Join(bed.BPF, "x")}).Open()
	})
	var privilege *need.Privilege
	if !errors.As(err, &privilege) {
		t.Fatalf("not a missing privilege: %v", err)
	}
	if !strings.Contains(err.Error(), "CAP_BPF") {
		t.Errorf("the capability is not named: %v", err)
	}
}

// withoutCapabilities runs f on a thread that has none, and throws it away.
func withoutCapabilities(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}
