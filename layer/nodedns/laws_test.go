package nodedns

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	bpflink "github.com/cilium/ebpf/link"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/test/docs"
)

// paper is a host without a kernel.
type paper struct{}

func (paper) lost() []lost                           { return nil }
func (paper) restore() error                         { return nil }
func (paper) program(ebpf.AttachType) ebpf.ProgramID { return 0 }
func (paper) own(uintptr) error                      { return nil }
func (paper) presence() (*presence, error)           { return nil, errors.New("none") }
func (paper) describe(*layer.Description) error      { return nil }
func (paper) close()                                 {}

func clusters() []*model.Snapshot {
	return []*model.Snapshot{cluster(dns4, dns6), cluster(netip.MustParseAddrPort("10.96.0.11:53"), dns6), cluster(dns6, dns4)}
}

func TestPureLaws(t *testing.T) {
	layertest.PureLaws(t, layertest.Subject{
		New:       func() layer.Layer { return New(Settings{}) },
		Snapshots: clusters(),
		Faulty: func(object string) (layer.Layer, func()) {
			detours := bpfmap.NewFake[datapathFamily, datapathDetour](2)
			detours.Refuse = func(key datapathFamily) error {
				if strings.Contains(object, ":") == (key == datapathFamilyFAMILY_IP6) {
					return syscall.ENOMEM
				}
				return nil
			}
			return &Layer{host: paper{}, tables: tables{detours}}, func() { detours.Refuse = nil }
		},
	})
}

func TestLaws(t *testing.T) {
	layertest.Laws(t, func(t *testing.T) layertest.Subject {
		o := newOutpost(t)
		o.serveElsewhere()
		return layertest.Subject{
			New:       func() layer.Layer { return New(o.settings) },
			Snapshots: clusters(),
			Observe:   o.observe,
			Stranger:  o.stranger,
			Works: func() error {
				got, from, err := o.client(o.NetNS, "udp4", dns4, false).ask(t, 7, "web.")
				if err == nil && (got != elsewhere || from != dns4) {
					err = fmt.Errorf("answered %v by %v", got, from)
				}
				return err
			},
		}
	})
}

// observe prints the pins and the programs of the cgroup.
func (o *outpost) observe() string {
	var text strings.Builder
	must(o.t, filepath.WalkDir(o.BPF, func(path string, _ fs.DirEntry, err error) error {
		fmt.Fprintln(&text, "pin", path)
		return err
	}))
	for _, h := range hooks {
		fmt.Fprintln(&text, h.call, o.programsAt(h.call))
	}
	return text.String()
}

// allowing is a program of somebody else, which lets every call go on.
func allowing(t *testing.T) *ebpf.Program {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	must(t, err)
	t.Cleanup(func() { program.Close() })
	return program
}

func (o *outpost) attach(program *ebpf.Program) bpflink.Link {
	o.t.Helper()
	l, err := bpflink.AttachCgroup(bpflink.CgroupOptions{Path: o.Cgroup, Attach: ebpf.AttachCGroupInet4Connect, Program: program})
	must(o.t, err)
	o.t.Cleanup(func() { l.Close() })
	return l
}

// stranger attaches somebody else's program and pins it beside ours.
func (o *outpost) stranger() func() error {
	theirs, pin := o.attach(allowing(o.t)), filepath.Join(o.BPF, "theirs")
	must(o.t, theirs.Pin(pin))
	o.t.Cleanup(func() { theirs.Unpin() })
	info, err := theirs.Info()
	must(o.t, err)
	return func() error {
		if _, err := os.Stat(pin); err != nil {
			return err
		}
		if there := o.programsAt(ebpf.AttachCGroupInet4Connect); !slices.Contains(there, info.Program) {
			return fmt.Errorf("a stranger's program %d was detached: there are %v", info.Program, there)
		}
		return nil
	}
}

// What somebody took away is seen, and comes back; a link keeps its place.
func TestWhatWasTakenAwayComesBack(t *testing.T) {
	o := newOutpost(t)
	o.serveElsewhere()
	l := o.open()
	o.serve(l, knows)
	place := o.programsAt(ebpf.AttachCGroupInet4Connect)
	must(t, l.host.(*datapath).attached[ebpf.AttachCGroupUDP4Sendmsg].Kernel.Detach())
	must(t, os.Remove(filepath.Join(o.settings.Pins, "link_dns_connect4")))
	must(t, os.Remove(filepath.Join(o.settings.Pins, datapathMapDetours)))
	c := o.client(o.NetNS, "udp4", dns4, false)
	c.expect(t, "a program is gone", "web.", elsewhere)
	want := []string{"+ pin detours", "+ pin link_dns_connect4", "+ program dns_sendmsg4"}
	var got []string
	for _, change := range o.apply(l, cluster(dns4, dns6)) {
		got = append(got, change.String())
	}
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Errorf("brought back %q, not %q", got, want)
	}
	c.expect(t, "all is back", "web.", here)
	if now := o.programsAt(ebpf.AttachCGroupInet4Connect); !slices.Equal(now, place) {
		t.Errorf("the programs are %v, and were %v", now, place)
	}
}

// Programs of others that see calls first are told of: they may have made the DNS Service's
// address another.
func TestOthersComeFirst(t *testing.T) {
	o := newOutpost(t)
	o.attach(allowing(t))
	l := o.open()
	d, err := l.Describe()
	must(t, err)
	if text := strings.Join(d.Degraded, "\n"); !strings.Contains(text, "programs of others see connect() or sendmsg() first: program ") {
		t.Errorf("status has %q", text)
	}
}

// An address for each family is taken, of the Service that serves DNS over UDP.
func TestPlan(t *testing.T) {
	l := New(Settings{})
	overTCP := cluster(dns4)
	overTCP.Services[0].Ports = overTCP.Services[0].Ports[1:]
	for _, row := range []struct {
		what string
		of   *model.Snapshot
		want string
	}{
		{"both families", cluster(dns6, dns4), "[10.96.0.10 fd00:96::a]"},
		{"one", cluster(dns6), "[fd00:96::a]"},
		{"the first of two", cluster(dns4, netip.MustParseAddrPort("10.96.0.11:53")), "[10.96.0.10]"},
		{"no UDP", overTCP, "[]"},
		{"no Service", &model.Snapshot{Complete: true}, "[]"},
	} {
		var got []string
		for _, s := range l.Plan(row.of).Subjects() {
			text, err := s.(detour).MarshalText()
			must(t, err)
			got = append(got, string(text))
		}
		if fmt.Sprint(got) != row.want {
			t.Errorf("%s: %v, not %s", row.what, got, row.want)
		}
	}
	if changes := l.Diff(l.Plan(cluster(dns4)), l.Plan(cluster()), false); len(changes) > 0 {
		t.Errorf("the input is not whole, and %v", changes)
	}
}

// The outcomes are defined once, in nodedns.bpf.c. The table in the docs is made from it, and
// the names in metrics come from the object's BTF.
func TestOutcomesAreTheSameEverywhere(t *testing.T) {
	spec, err := loadDatapath()
	must(t, err)
	names, err := outcomeNames(spec)
	must(t, err)
	docs.SameWords(t, "nodedns.bpf.c", "OUTCOME_", names, "../../docs/dns.md", "calls of the node")
	page, err := os.ReadFile("../../docs/dns.md")
	must(t, err)
	for word := range (&counts{}).all() {
		if !strings.Contains(string(page), "| `"+word+"` |") {
			t.Errorf("docs/dns.md does not say what %s means", word)
		}
	}
}
