package dns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	bpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// nobody is a host with nothing on it.
type nobody struct{}

func (nobody) beat(words) error                  { return nil }
func (nobody) ttl() (uint32, error)              { return 5, nil }
func (nobody) setTTL(uint32) error               { return nil }
func (nobody) grow(int) (func() error, error)    { return nil, errors.ErrUnsupported }
func (nobody) names() *ebpf.Map                  { return nil }
func (nobody) devices() ([]device, error)        { return nil, nil }
func (nobody) attach(device) error               { return nil }
func (nobody) detach(device) error               { return nil }
func (nobody) lost() []lost                      { return nil }
func (nobody) restore() error                    { return nil }
func (nobody) settle() error                     { return nil }
func (nobody) server() (*server, error)          { return nil, errors.New("nobody") }
func (nobody) describe(*layer.Description) error { return nil }
func (nobody) close()                            {}

func towns() []*model.Snapshot {
	other := town()
	other.Services = slices.DeleteFunc(other.Services, func(s *model.Service) bool { return s.Name.Name == "db" })
	other.Services = append(other.Services, named("shop", "new", "10.96.0.77"))
	return []*model.Snapshot{town(), other, {Complete: true, Named: true}, town()}
}

func TestPureLaws(t *testing.T) {
	layertest.PureLaws(t, layertest.Subject{
		New:       func() layer.Layer { return New(Settings{Zone: "cluster.local"}) },
		Snapshots: towns()[:2],
		Faulty: func(object string) (layer.Layer, func()) {
			names := bpfmap.NewFake[datapathName, datapathAddresses](1000)
			names.Refuse = func(key datapathName) error {
				if (&Row{Name: nameOf(key), zone: "cluster.local"}).Object() == object {
					return syscall.ENOMEM
				}
				return nil
			}
			l := New(Settings{Zone: "cluster.local"})
			l.host, l.tables = nobody{}, tables{names: names, resolvers: bpfmap.NewFake[uint32, datapathResolverList](1), writings: bpfmap.NewFake[datapathTable, uint64](2)}
			return l, func() { names.Refuse = nil }
		},
	})
}

func TestLaws(t *testing.T) { laws(t) }

// The same where there is no tcx.
func TestLawsOfFilters(t *testing.T) {
	withoutTCX(t)
	laws(t)
}

func withoutTCX(t *testing.T) { layertest.WithoutTCX(t, &haveTCX) }

func laws(t *testing.T) {
	layertest.Laws(t, func(t *testing.T) layertest.Subject {
		h := newHamlet(t)
		return layertest.Subject{
			New:       func() layer.Layer { return New(h.settings) },
			Snapshots: towns(),
			Observe:   h.observe,
			Stranger:  h.stranger,
			Works: func() error {
				addresses, err := h.look("web.shop.svc.cluster.local.")
				if err == nil && len(addresses) == 0 {
					err = errors.New("no address")
				}
				return err
			},
		}
	})
}

// hamlet is a node with one pod, in a bed. The pod has a route to all else by its
// veth. The agent may be silent for an hour: the machine may be busy.
type hamlet struct {
	*layertest.Bed
	t        *testing.T
	settings Settings
	pod      string // its namespace
	device   int    // the node's end
}

func newHamlet(t *testing.T) *hamlet {
	h := &hamlet{Bed: layertest.NewBed(t), t: t, pod: filepath.Join(t.TempDir(), "pod")}
	must(t, netns.Create(h.pod))
	t.Cleanup(func() { must(t, netns.Remove(h.pod)) })
	pins := filepath.Join(h.BPF, "millrace", "dns")
	must(t, os.Mkdir(filepath.Dir(pins), 0o700))
	h.settings = Settings{Zone: "cluster.local", Netns: h.NetNS, Pins: pins, silence: time.Hour}
	h.device = h.connect("pod1", h.pod, "10.244.1.7/32", "fd00:244:1::7/128")
	return h
}

// connect gives a pod a veth, its addresses and a route to all else by it. It returns the
// index of the node's end.
func (h *hamlet) connect(name, netns, ip4, ip6 string) int {
	t := h.t
	t.Helper()
	nodeMAC, podMAC := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}
	node, err := link.Open(h.NetNS)
	must(t, err)
	defer node.Close()
	device, err := node.Veth(link.Veth{Name: name, MAC: nodeMAC, Peer: "eth0", PeerMAC: podMAC, PeerNamespace: netns})
	must(t, err)
	must(t, node.Up(device))
	pod, err := link.Open(netns)
	must(t, err)
	defer pod.Close()
	eth0, err := pod.Index("eth0")
	must(t, err)
	must(t, pod.UpLoopback())
	must(t, pod.Up(eth0))
	for _, end := range []struct{ own, via string }{{ip4, "169.254.1.1"}, {ip6, "fe80::1"}} {
		own, via := netip.MustParsePrefix(end.own), netip.MustParseAddr(end.via)
		must(t, pod.Addr(eth0, own))
		must(t, pod.Neigh(eth0, via, nodeMAC))
		must(t, pod.Route(link.Route{To: netip.PrefixFrom(via, via.BitLen()), Link: eth0}))
		must(t, pod.Route(link.Route{To: netip.PrefixFrom(via, 0).Masked(), Via: via, Link: eth0}))
		must(t, node.Route(link.Route{To: own, Link: device}))
		must(t, node.Neigh(device, own.Addr(), podMAC))
	}
	return device
}

// bridged makes the pod's veth a port of a bridge, which is the pod's gateway then.
func (h *hamlet) bridged() {
	h.t.Helper()
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 9} // not that of its port, which it would take
	node, err := link.Open(h.NetNS)
	must(h.t, err)
	defer node.Close()
	bridge, err := node.Bridge("cni0")
	must(h.t, err)
	must(h.t, h.Inside(func() error {
		return netlink.LinkSetHardwareAddr(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Index: bridge}}, mac)
	}))
	must(h.t, node.Join(bridge, h.device))
	pod, err := link.Open(h.pod)
	must(h.t, err)
	defer pod.Close()
	eth0, err := pod.Index("eth0")
	must(h.t, err)
	for _, via := range []string{"169.254.1.1", "fe80::1"} {
		must(h.t, pod.Neigh(eth0, netip.MustParseAddr(via), mac))
	}
}

// look asks the DNS Service from the pod.
func (h *hamlet) look(name string) ([]netip.Addr, error) { return h.lookAt(dns4, name, 5*time.Second) }

func (h *hamlet) lookAt(server netip.AddrPort, name string, patience time.Duration) (addresses []netip.Addr, err error) {
	err = netns.Do(h.pod, func() error {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server))
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := c.Write(asking(h.t, name, dnsmessage.TypeA, true)); err != nil {
			return err
		}
		answer := make([]byte, 1500)
		n, err := c.Read(answer)
		if err != nil {
			return err
		}
		var m dnsmessage.Message
		if err := m.Unpack(answer[:n]); err != nil {
			return err
		}
		if m.RCode != dnsmessage.RCodeSuccess {
			return fmt.Errorf("%s: %v", name, m.RCode)
		}
		for _, record := range m.Answers {
			addresses = append(addresses, netip.AddrFrom4(record.Body.(*dnsmessage.AResource).A))
		}
		return nil
	})
	return addresses, err
}

// observe prints the pins, and the programs and filters at the node's devices.
func (h *hamlet) observe() string {
	h.t.Helper()
	var text []string
	must(h.t, filepath.WalkDir(h.BPF, func(path string, _ os.DirEntry, err error) error {
		text = append(text, path)
		return err
	}))
	must(h.t, h.Inside(func() error {
		if found, err := bpflink.QueryPrograms(bpflink.QueryOptions{Target: h.device, Attach: ebpf.AttachTCXIngress}); err == nil {
			for _, one := range found.Programs {
				text = append(text, "program "+attach.NameOf(one.ID))
			}
		}
		qdiscs, err := netlink.QdiscList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: h.device}})
		for _, q := range qdiscs {
			text = append(text, "qdisc "+q.Type())
		}
		return err
	}))
	return strings.Join(text, "\n")
}

// stranger has a program and a filter of its own at the device, and a pin beside ours.
func (h *hamlet) stranger() func() error {
	h.t.Helper()
	program := layertest.Passing(h.t, "stranger")
	filtered := layertest.StrangeFilter(h.t, h.NetNS, h.device, netlink.HANDLE_MIN_INGRESS, program)
	var l bpflink.Link
	pin := filepath.Join(filepath.Dir(h.settings.Pins), "stranger")
	must(h.t, h.Inside(func() (err error) {
		l, err = bpflink.AttachTCX(bpflink.TCXOptions{Interface: h.device, Program: program, Attach: ebpf.AttachTCXIngress})
		return err
	}))
	h.t.Cleanup(func() { l.Close() })
	must(h.t, l.Pin(pin))
	h.t.Cleanup(func() { _ = os.Remove(pin) })
	return func() error {
		if _, err := os.Stat(pin); err != nil {
			return err
		}
		if err := filtered(); err != nil {
			return err
		}
		return h.Inside(func() error {
			found, err := bpflink.QueryPrograms(bpflink.QueryOptions{Target: h.device, Attach: ebpf.AttachTCXIngress})
			if err != nil || !slices.ContainsFunc(found.Programs, func(p bpflink.AttachedProgram) bool { return attach.NameOf(p.ID) == "stranger" }) {
				return fmt.Errorf("the program is gone: %w", err)
			}
			return nil
		})
	}
}
