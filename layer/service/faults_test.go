package service

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

func oneWeb() *model.Snapshot {
	return &model.Snapshot{Services: []*model.Service{
		serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080, "127.0.0.1")}}
}

// Maps that cannot be made larger leave the old ones in force, and later
// changes go into those.
func TestGrowthThatFailsChangesNothing(t *testing.T) {
	for _, fault := range []struct {
		name   string
		room   capacity
		break_ func(*street)
	}{
		{"the entries do not fit", capacity{1, 1}, func(*street) {}},
		{"the new maps cannot be pinned", capacity{8192, 32768}, func(s *street) {
			// a folder with something in it, where the pin would go
			if err := os.MkdirAll(s.layer.datapath.pin(nextPrefix+datapathMapServices)+"/x", 0o700); err != nil {
				s.t.Fatal(err)
			}
		}},
	} {
		t.Run(fault.name, func(t *testing.T) {
			snapshot := oneWeb()
			snapshot.Services = append(snapshot.Services, serviceOf("x", model.TCP, 81, []string{"10.96.0.3"}, 8080, "127.0.0.1", "127.0.0.2"))
			s := newStreet(t, snapshot)
			serve(t, s.Bed, "tcp", "127.0.0.1:8080")
			fault.break_(s)
			if err := s.layer.datapath.grow(s.layer.tables, fault.room); err == nil {
				t.Fatal("no error: the fault did not happen")
			}
			more := oneWeb()
			more.Services = append(more.Services, serviceOf("new", model.TCP, 82, []string{"10.96.0.2"}, 8080, "127.0.0.1"))
			s.become(more)
			for _, to := range []string{"10.96.0.1:80", "10.96.0.2:82"} {
				if _, _, err := ask(s.Bed, "tcp", to); err != nil {
					t.Errorf("after the failure: %v", err)
				}
			}
			os.RemoveAll(s.layer.datapath.pin(nextPrefix+datapathMapServices) + "/x")
			os.Remove(s.layer.datapath.pin(nextPrefix + datapathMapServices))
		})
	}
}

func TestTwoProcessesDoNotShareAPinFolder(t *testing.T) {
	s := newStreet(t, oneWeb())
	second := New(s.layer.settings)
	if err := second.Open(); !errors.Is(err, layer.ErrInUse) {
		t.Errorf("the second process opens: %v, not %v", err, layer.ErrInUse)
	}
}

// What is not of this layer's making stays, wherever the folder is.
func TestRemoveTouchesOnlyItsOwn(t *testing.T) {
	s := newStreet(t, oneWeb())
	s.layer.Close()
	theirs := filepath.Join(s.layer.settings.Pins, "theirs")
	if err := os.Mkdir(theirs, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := New(s.layer.settings).Remove(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(s.layer.settings.Pins)
	if err != nil || len(left) != 1 || left[0].Name() != "theirs" {
		t.Errorf("left in the folder: %v, %v; want what is theirs", left, err)
	}
	os.Remove(theirs)
	ordinary := t.TempDir()
	if err := os.WriteFile(filepath.Join(ordinary, "services"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Settings{Pins: ordinary}).Remove(); err == nil || !strings.Contains(err.Error(), "not in a bpf file system") {
		t.Errorf("removing from an ordinary folder: %v", err)
	}
	if _, err := os.Stat(filepath.Join(ordinary, "services")); err != nil {
		t.Errorf("an ordinary file is gone: %v", err)
	}
}

// Programs and pins that somebody takes away are noticed by the next Read, are
// changes like others, and are brought back.
func TestWhatIsTakenAwayIsBroughtBack(t *testing.T) {
	for _, theft := range []struct {
		name string
		take func(*street) error
		lost int // 0: all pins
	}{
		{"a program is detached", func(s *street) error { return detach(s, "connect4") }, 1},
		{"a pin is removed", func(s *street) error { return os.Remove(s.layer.datapath.pin(datapathMapServices)) }, 1},
		{"a link's pin is removed", func(s *street) error { return os.Remove(s.layer.datapath.pin(linkPrefix + "connect4")) }, 1},
		{"the pin folder is emptied", func(s *street) error {
			return errors.Join(os.RemoveAll(s.layer.settings.Pins), os.Mkdir(s.layer.settings.Pins, 0o700))
		}, 0},
	} {
		t.Run(theft.name, func(t *testing.T) {
			s := newStreet(t, oneWeb())
			serve(t, s.Bed, "tcp", "127.0.0.1:8080")
			if err := theft.take(s); err != nil {
				t.Fatal(err)
			}
			if theft.lost == 0 {
				theft.lost = len(cgroupHooks) + len(s.layer.datapath.maps)
			}
			s.mended(theft.lost)
			// and the next process finds everything
			s.layer.Close()
			if err := s.layer.Open(); err != nil {
				t.Fatal(err)
			}
			if have, err := s.layer.Read(); err != nil || have.Len() != 1 {
				t.Errorf("the next process finds %d Services, %v", have.Len(), err)
			}
		})
	}
}

// A cgroup that is removed and made again has none of our programs.
func TestNewCgroupOfTheSameNameIsNoticed(t *testing.T) {
	bed := layertest.NewBed(t)
	inner := filepath.Join(bed.Cgroup, "inner")
	if err := cgroup.Create(inner); err != nil {
		t.Fatal(err)
	}
	l := New(Settings{Cgroup: inner, Pins: filepath.Join(bed.BPF, "service")})
	if err := l.Open(); err != nil {
		t.Fatal(err)
	}
	s := &street{Bed: bed, t: t, layer: l}
	defer func() {
		l.Close()
		if _, err := New(l.settings).Remove(); err != nil {
			t.Error(err)
		}
	}()
	s.have, _ = l.Read()
	s.become(oneWeb())
	serve(t, bed, "tcp", "127.0.0.1:8080")
	if err := errors.Join(cgroup.Remove(inner), cgroup.Create(inner), cgroup.Add(inner, 0)); err != nil {
		t.Fatal(err)
	}
	defer cgroup.Add(bed.Cgroup, 0)
	s.mended(len(cgroupHooks))
}

// mended reads, expects so many losses, applies, and expects the Service to work
// and nothing to be lost any more.
func (s *street) mended(losses int) {
	s.t.Helper()
	want := s.layer.Plan(oneWeb())
	found, err := s.layer.Read()
	if err != nil {
		s.t.Fatal(err)
	}
	changes := s.layer.Diff(found, want, true)
	if len(changes) != losses {
		s.t.Fatalf("%d changes are to be made, not %d:\n%v", len(changes), losses, changes)
	}
	if _, _, err = s.layer.Apply(found, want, changes); err != nil {
		s.t.Fatal(err)
	}
	if _, _, err := ask(s.Bed, "tcp", "10.96.0.1:80"); err != nil {
		s.t.Errorf("after mending: %v", err)
	}
	if found, err = s.layer.Read(); err != nil || len(s.layer.Diff(found, want, true)) > 0 {
		s.t.Errorf("after mending there is still to do: %v, %v", s.layer.Diff(found, want, true), err)
	}
}

func detach(s *street, name string) error {
	pinned, err := link.LoadPinnedLink(s.layer.datapath.pin(linkPrefix+name), nil)
	if err != nil {
		return err
	}
	defer pinned.Close()
	return pinned.Detach()
}

// A version that counts more reasons, or lays the tables out otherwise, leaves
// the sockets their flows.
func TestUpgradeKeepsTheFlowsOfSockets(t *testing.T) {
	s := newStreet(t, &model.Snapshot{Services: []*model.Service{
		serviceOf("dns", model.UDP, 53, []string{"10.96.0.10"}, 5353, "127.0.0.3")}})
	serve(t, s.Bed, "udp", "127.0.0.3:5353")
	to := &unix.SockaddrInet4{Port: 53, Addr: [4]byte{10, 96, 0, 10}}
	unconnected, fd := s.ownDatagrams(), s.ownDatagrams()
	s.whoAnswers(unconnected, to)
	if err := unix.Connect(fd, to); err != nil {
		t.Fatal(err)
	}
	s.layer.Close()
	for _, name := range []string{datapathMapReasons, datapathMapSlots} {
		s.layOtherwise(name)
	}
	if err := s.layer.Open(); err != nil {
		t.Fatal(err)
	}
	s.have, _ = s.layer.Read()
	s.become(&model.Snapshot{Services: []*model.Service{
		serviceOf("dns", model.UDP, 53, []string{"10.96.0.10"}, 5353, "127.0.0.3")}})
	if err := s.layer.Settle(); err != nil {
		t.Fatal(err)
	}
	if peer, err := unix.Getpeername(fd); err != nil || !same(peer, to) {
		t.Errorf("after the upgrade getpeername of an open socket says %+v, %v", peer, err)
	}
	s.whoAnswers(unconnected, to) // checks where the answer seems to come from
}

// Two Services with one endpoint: the answer comes from the one that was asked.
func TestTwoServicesWithOneEndpoint(t *testing.T) {
	s := newStreet(t, &model.Snapshot{Services: []*model.Service{
		serviceOf("dns", model.UDP, 53, []string{"10.96.0.10"}, 5353, "127.0.0.3"),
		serviceOf("dns-upstream", model.UDP, 53, []string{"10.96.0.11"}, 5353, "127.0.0.3")}})
	serve(t, s.Bed, "udp", "127.0.0.3:5353")
	fd := s.ownDatagrams()
	for i := range 6 {
		s.whoAnswers(fd, &unix.SockaddrInet4{Port: 53, Addr: [4]byte{10, 96, 0, 10 + byte(i%2)}})
	}
}

// Many threads send on one socket to many Services; each datagram arrives where
// it should.
func TestThreadsShareASocket(t *testing.T) {
	snapshot := &model.Snapshot{}
	for i := range 6 {
		ip, pod := fmt.Sprintf("10.96.1.%d", i), fmt.Sprintf("127.0.1.%d", i+1)
		snapshot.Services = append(snapshot.Services, serviceOf(fmt.Sprintf("s%d", i), model.UDP, 53, []string{ip}, 5353, pod))
	}
	s := newStreet(t, snapshot)
	var arrived [6]int
	var readers, senders sync.WaitGroup
	for i := range 6 {
		var server int
		err := s.Inside(func() (err error) {
			if server, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0); err == nil {
				err = unix.Bind(server, &unix.SockaddrInet4{Port: 5353, Addr: [4]byte{127, 0, 1, byte(i + 1)}})
			}
			return errors.Join(err, unix.SetsockoptInt(server, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20))
		})
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(server)
		readers.Go(func() {
			buffer := make([]byte, 8)
			for {
				n, _, err := unix.Recvfrom(server, buffer, 0)
				if err != nil || n == 4 {
					return // the end
				}
				if buffer[0] != byte(i) {
					t.Errorf("a datagram for Service %d arrived at the endpoint of %d", buffer[0], i)
					continue
				}
				arrived[i]++
			}
		})
	}
	fd := s.ownDatagrams()
	const each = 500
	for range 4 {
		senders.Go(func() {
			for n := range each * 6 {
				to := &unix.SockaddrInet4{Port: 53, Addr: [4]byte{10, 96, 1, byte(n % 6)}}
				if err := unix.Sendto(fd, []byte{byte(n % 6)}, 0, to); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	senders.Wait()
	for i := range 6 {
		unix.Sendto(fd, []byte("done"), 0, &unix.SockaddrInet4{Port: 53, Addr: [4]byte{10, 96, 1, byte(i)}})
	}
	readers.Wait()
	for i, n := range arrived {
		if n != 4*each {
			t.Errorf("%d of %d datagrams arrived at endpoint %d", n, 4*each, i)
		}
	}
}

// A writer may die after any write. The next one finds what is there, mends it,
// and leaves nothing over.
func TestCrashAfterEveryWrite(t *testing.T) {
	crashed := errors.New("crashed")
	for budget := 0; ; budget++ {
		l, fakes := onFakes(1000)
		before, after := l.Plan(shop("10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4")), l.Plan(shop("10.1.0.2", "10.1.0.9", "fd00::7"))
		empty := inForce(map[Frontend]*Row{})
		have, _, err := l.Apply(empty, before, l.Diff(empty, before, true))
		if err != nil {
			t.Fatal(err)
		}
		left := budget
		spend := func() error {
			if left--; left < 0 {
				return crashed
			}
			return nil
		}
		fakes.services.Refuse = func(datapathServiceKey) error { return spend() }
		fakes.slots.Refuse = func(datapathSlotKey) error { return spend() }
		fakes.backends.Refuse = func(uint32) error { return spend() }
		_, _, err = l.Apply(have, after, l.Diff(have, after, true))
		fakes.services.Refuse, fakes.slots.Refuse, fakes.backends.Refuse = nil, nil, nil

		next := &Layer{tables: fakes.tables(), room: fakes}
		found, readErr := next.Read()
		if readErr != nil {
			t.Fatal(readErr)
		}
		if _, _, err := next.Apply(found, after, next.Diff(found, after, true)); err != nil {
			t.Fatal(err)
		}
		again := &Layer{tables: fakes.tables(), room: fakes}
		if found, readErr = again.Read(); readErr != nil || len(again.Diff(found, after, true)) > 0 {
			t.Fatalf("after a crash at write %d: %v, %v", budget, again.Diff(found, after, true), readErr)
		}
		if n := len(fakes.backends.Entries); n != again.tables.slotCount {
			t.Fatalf("after a crash at write %d: %d backends in the map, %d in use", budget, n, again.tables.slotCount)
		}
		if err == nil {
			if budget < 10 {
				t.Fatalf("the change took only %d writes: the test proves little", budget)
			}
			return
		}
	}
}

// Numbers are never given twice, also after four thousand million of them.
func TestNumbersWrap(t *testing.T) {
	l, fakes := onFakes(100)
	empty := inForce(map[Frontend]*Row{})
	have, _, err := l.Apply(empty, l.Plan(shop("10.1.0.1")), l.Diff(empty, l.Plan(shop("10.1.0.1")), true))
	if err != nil {
		t.Fatal(err)
	}
	l.tables.lastID, l.tables.lastNumber = 1<<32-1, 1<<32-1
	want := l.Plan(shop("10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4"))
	if have, _, err = l.Apply(have, want, l.Diff(have, want, true)); err != nil {
		t.Fatal(err)
	}
	if _, zero := fakes.backends.Entries[0]; zero {
		t.Error("a backend has number 0")
	}
	if len(l.Diff(have, want, true)) > 0 || len(fakes.backends.Entries) != l.tables.slotCount {
		t.Error("a number was given twice")
	}
}
