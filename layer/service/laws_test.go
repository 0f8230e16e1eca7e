package service

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// shop is a cluster of two Services, echo and dns, of both families.
func shop(echoPods ...string) *model.Snapshot {
	return &model.Snapshot{Complete: true, Services: []*model.Service{
		serviceOf("echo", model.TCP, 80, []string{"10.96.0.1", "fd00:96::1"}, 8080, echoPods...),
		serviceOf("dns", model.UDP, 53, []string{"10.96.0.10"}, 5353, "127.0.0.3", "127.0.0.4"),
		serviceOf("empty", model.TCP, 443, []string{"10.96.0.2"}, 8443),
	}}
}

// serviceOf makes a Service of one port whose pods are all ready.
func serviceOf(name string, protocol model.Protocol, port uint16, ips []string, target uint16, pods ...string) *model.Service {
	s := &model.Service{Name: model.Name{Namespace: "default", Name: name}, Type: model.ClusterIP}
	for _, ip := range ips {
		s.ClusterIPs = append(s.ClusterIPs, netip.MustParseAddr(ip))
	}
	p := model.ServicePort{Protocol: protocol, Port: port}
	for _, pod := range pods {
		p.Backends = append(p.Backends, model.Backend{
			Address: netip.AddrPortFrom(netip.MustParseAddr(pod), target), Ready: true, Serving: true,
		})
	}
	s.Ports = []model.ServicePort{p}
	return s
}

func shops() []*model.Snapshot {
	return []*model.Snapshot{
		shop("127.0.0.1", "127.0.0.2", "::1"),
		shop("127.0.0.2", "127.0.0.5"),
		{Complete: true},
		shop("127.0.0.2", "::1"),
	}
}

func TestPureLaws(t *testing.T) {
	layertest.PureLaws(t, layertest.Subject{
		New:       func() layer.Layer { return New(Settings{}) },
		Snapshots: shops()[:2],
		Faulty: func(object string) (layer.Layer, func()) {
			l, tables := onFakes(1000)
			tables.services.Refuse = func(key datapathServiceKey) error {
				if (&Row{Frontend: frontendOf(key)}).Object() == object {
					return syscall.ENOMEM
				}
				return nil
			}
			return l, func() { tables.services.Refuse = nil }
		},
	})
}

func TestLaws(t *testing.T) {
	layertest.Laws(t, func(t *testing.T) layertest.Subject {
		bed := layertest.NewBed(t)
		pins := filepath.Join(bed.BPF, "millrace", "service")
		if err := os.Mkdir(filepath.Dir(pins), 0o700); err != nil {
			t.Fatal(err)
		}
		serve(t, bed, "tcp", "127.0.0.1:8080", "127.0.0.2:8080", "[::1]:8080")
		return layertest.Subject{
			New:       func() layer.Layer { return New(Settings{Cgroup: bed.Cgroup, Pins: pins}) },
			Snapshots: shops(),
			Observe:   func() string { return observe(t, bed) },
			Stranger:  func() func() error { return stranger(t, bed) },
			Works: func() error {
				_, _, err := ask(bed, "tcp", "10.96.0.1:80")
				return err
			},
		}
	})
}

// The same laws where the packet path serves at a pod's veth, with pods that ask
// for paths.
func TestLawsOfThePacketPath(t *testing.T) {
	layertest.Laws(t, func(t *testing.T) layertest.Subject {
		v := newVillage(t, Settings{Path: PathPacket, Node: "n1"})
		client, server := v.pod(), v.pod()
		t.Cleanup(client.stay())
		for _, port := range []int{8080, 8081} {
			server.serve("tcp", port, "server")
		}
		settings := v.layer.settings
		settings.Pins = filepath.Join(v.BPF, "millrace", "service")
		v.must(os.Mkdir(filepath.Dir(settings.Pins), 0o700))
		var snapshots []*model.Snapshot
		for _, s := range shops() {
			for _, service := range s.Services {
				if service.Name.Name == "echo" {
					service.Ports = serviceOf("echo", model.TCP, 80, nil, 8080, server.addresses()...).Ports
				}
			}
			s.Pods = []*model.Pod{{Name: model.Name{Namespace: "default", Name: "client"}, Node: "n1",
				Annotations: map[string]string{PathAnnotation: "packet"}, Addresses: clientAddresses(client)}}
			snapshots = append(snapshots, s)
		}
		snapshots[2].Pods = nil
		return layertest.Subject{
			New:       func() layer.Layer { return New(settings) },
			Snapshots: snapshots,
			Observe:   func() string { return observe(t, v.Bed) + v.observe() },
			Stranger:  func() func() error { return v.stranger() },
			Works: func() error {
				_, _, err := client.call("tcp", "10.96.0.1:80", "hello")
				return err
			},
		}
	})
}

// observe prints the programs at the pods' devices.
func (v *village) observe() (text string) {
	v.t.Helper()
	if !haveTCX() {
		return strings.Join(v.filters(), "\n")
	}
	v.must(v.Inside(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			for _, attach := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
				found, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: attach})
				if err != nil {
					return err
				}
				for _, program := range found.Programs {
					text += fmt.Sprintln("program", l.Attrs().Name, attach, program.ID)
				}
			}
		}
		return err
	}))
	return text
}

// stranger attaches a program of somebody else to every pod's device, and
// returns what checks that it is still there.
func (v *village) stranger() func() error {
	v.t.Helper()
	program := passing(v.t)
	if !haveTCX() {
		return v.strangeFilters(program)
	}
	var made []link.Link
	v.must(v.Inside(func() error {
		for i := range v.pods {
			device, err := netlink.LinkByName(fmt.Sprintf("veth%d", i+1))
			if err != nil {
				return err
			}
			l, err := link.AttachTCX(link.TCXOptions{Interface: device.Attrs().Index, Program: program, Attach: ebpf.AttachTCXIngress})
			if err != nil {
				return err
			}
			made = append(made, l)
		}
		return nil
	}))
	v.t.Cleanup(func() {
		for _, l := range made {
			l.Close()
		}
	})
	return func() error {
		for _, l := range made {
			info, err := l.Info()
			if err != nil {
				return err
			}
			if tcx := info.TCX(); tcx == nil || tcx.Ifindex == 0 {
				return errors.New("a stranger's program was detached")
			}
		}
		return nil
	}
}

// passing is a program of somebody else, which lets every packet pass on.
func passing(t *testing.T) *ebpf.Program {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return program
}

// observe prints the pins and the programs on the cgroup.
func observe(t *testing.T, bed *layertest.Bed) string {
	t.Helper()
	var text strings.Builder
	err := filepath.WalkDir(bed.BPF, func(path string, _ fs.DirEntry, err error) error {
		fmt.Fprintln(&text, "pin", path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	cgroup, err := os.Open(bed.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.Close()
	for _, hook := range cgroupHooks {
		found, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: hook.attach})
		if err != nil {
			t.Fatal(err)
		}
		for _, program := range found.Programs {
			fmt.Fprintln(&text, "program", hook.attach, program.ID)
		}
	}
	return text.String()
}

// stranger attaches somebody else's program to connect4 of the cgroup, pins it
// and a map.
func stranger(t *testing.T, bed *layertest.Bed) func() error {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	theirs, err := link.AttachCgroup(link.CgroupOptions{Path: bed.Cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: program})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	pin := filepath.Join(bed.BPF, "theirs")
	if err := theirs.Pin(pin); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Unpin() })
	return func() error {
		if _, err := os.Stat(pin); err != nil {
			return err
		}
		info, err := theirs.Info()
		if err != nil {
			return err
		}
		if info.Cgroup().CgroupId == 0 {
			return errors.New("the stranger's program was detached")
		}
		return nil
	}
}

type fakeTables struct {
	services *bpfmap.Fake[datapathServiceKey, datapathService]
	slots    *bpfmap.Fake[datapathSlotKey, uint32]
	backends *bpfmap.Fake[uint32, datapathBackend]
	ranges   *bpfmap.Fake[datapathSourceRangeKey, uint8]
	ports    *bpfmap.Fake[uint32, datapathPortRange]
	// grown is the last room that was asked for.
	grown capacity
}

// tables are the maps as a new process finds them.
func (f *fakeTables) tables() *tables {
	return &tables{services: f.services, slots: f.slots, backends: f.backends, ranges: f.ranges, ports: f.ports}
}

func (f *fakeTables) settle() error  { return nil }
func (f *fakeTables) restore() error { return nil }
func (f *fakeTables) lost() []lost   { return nil }

func (f *fakeTables) findVeths() ([]veth, error) { return nil, nil }
func (f *fakeTables) readAsks() ([]*wish, error) { return nil, nil }

func (f *fakeTables) readClients() ([]knownClient, error) { return nil, nil }
func (f *fakeTables) findClients([]veth) []knownClient    { return nil }
func (f *fakeTables) cookie() uint64                      { return 0 }

func (f *fakeTables) readNodeAddresses() ([]netip.Addr, error) { return nil, nil }

func (f *fakeTables) readTracking() tracking      { return tracking{} }
func (f *fakeTables) sweep(int, int) error        { return nil }
func (f *fakeTables) carryOut(layer.Change) error { return nil }

func (f *fakeTables) grow(_ *tables, room capacity) error {
	f.grown = room
	f.services.Max, f.slots.Max, f.backends.Max = room.services, room.backends, room.backends
	return nil
}

// onFakes is the layer over tables in ordinary memory.
func onFakes(size int) (*Layer, *fakeTables) {
	f := &fakeTables{
		services: bpfmap.NewFake[datapathServiceKey, datapathService](size),
		slots:    bpfmap.NewFake[datapathSlotKey, uint32](size),
		backends: bpfmap.NewFake[uint32, datapathBackend](size),
		ranges:   bpfmap.NewFake[datapathSourceRangeKey, uint8](size),
		ports:    bpfmap.NewFake[uint32, datapathPortRange](1),
	}
	t := f.tables()
	t.entries = map[Frontend]*entry{}
	return &Layer{tables: t, room: f}, f
}
