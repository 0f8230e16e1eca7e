package pod

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/model"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var (
	node4 = netip.MustParseAddr("192.0.2.10")
	node6 = netip.MustParseAddr("2001:db8::10")
)

// cluster is one whose node n1 has ranges.
func cluster(ranges ...string) *model.Snapshot {
	n1 := &model.Node{Name: "n1", Addresses: []netip.Addr{node4, node6}}
	for _, r := range ranges {
		n1.PodCIDRs = append(n1.PodCIDRs, netip.MustParsePrefix(r))
	}
	return &model.Snapshot{Complete: true, Nodes: []*model.Node{n1, {Name: "n2", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}}}}
}

// town is a node in a bed, with pods. Its way out has an MTU of 1,400 bytes.
type town struct {
	*layertest.Bed
	t        testing.TB
	settings Settings
	pods     map[string]string // namespaces by container
}

func newTown(t *testing.T) *town {
	b := &town{Bed: layertest.NewBed(t), t: t, pods: map[string]string{}}
	folder, err := os.MkdirTemp("", "pod") // sockets have short paths
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(folder) })
	b.settings = Settings{Node: "n1", Netns: b.NetNS, Folder: filepath.Join(folder, "pod"), Socket: filepath.Join(folder, "cni.sock"), Cooldown: time.Minute}
	b.settings.Pins = filepath.Join(b.BPF, "millrace", "pod")
	must(t, os.Mkdir(filepath.Dir(b.settings.Pins), 0o700))
	b.AddAddress(node4.String() + "/32")
	b.AddAddress(node6.String() + "/128")
	must(t, b.Inside(func() error {
		return errors.Join(netns.SetSysctl("net.ipv4.ip_forward", "1"), netns.SetSysctl("net.ipv6.conf.all.forwarding", "1"))
	}))
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	must(t, netns.Create(elsewhere))
	t.Cleanup(func() { must(t, netns.Remove(elsewhere)) })
	n, err := link.Open(b.NetNS)
	must(t, err)
	defer n.Close()
	uplink, err := n.Veth(link.Veth{Name: "uplink", MTU: 1400, Peer: "far", PeerNamespace: elsewhere})
	must(t, err)
	must(t, n.Up(uplink))
	must(t, n.Addr(uplink, netip.MustParsePrefix("198.51.100.2/24")))
	must(t, n.Route(link.Route{To: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("198.51.100.1"), Link: uplink}))
	return b
}

// space makes a pod's namespace as a runtime does.
func (b *town) space(container string) string {
	b.t.Helper()
	path := filepath.Join(b.t.TempDir(), container)
	must(b.t, netns.Create(path))
	b.t.Cleanup(func() { must(b.t, netns.Remove(path)) })
	b.pods[container] = path
	return path
}

// request is what the runtime asks about a container; extra are more fields of the
// configuration.
func (b *town) request(command, container, extra string) *cni.Request {
	b.t.Helper()
	r := &cni.Request{Command: command, Container: container, Interface: "eth0", Space: b.pods[container],
		Args:   "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=" + container,
		Config: []byte(fmt.Sprintf(`{"cniVersion":"1.1.0","name":"town","type":"millrace"%s}`, extra))}
	if r.Space != "" {
		file, err := os.Open(r.Space)
		must(b.t, err)
		b.t.Cleanup(func() { file.Close() })
		r.Namespace = file
	}
	return r
}

// open begins a layer as the agent does, with ranges in force.
func (b *town) open(ranges ...string) *Layer {
	b.t.Helper()
	l := New(b.settings)
	must(b.t, l.Open())
	b.t.Cleanup(func() { l.Close() })
	b.apply(l, ranges...)
	return l
}

func (b *town) apply(l *Layer, ranges ...string) layer.Changes {
	b.t.Helper()
	have, err := l.Read()
	must(b.t, err)
	want := l.Plan(cluster(ranges...))
	changes := l.Diff(have, want, true)
	have, done, err := l.Apply(have, want, changes)
	must(b.t, err)
	if left := l.Diff(have, want, true); len(left) > 0 || len(done) != len(changes) {
		b.t.Fatalf("of\n%v\nleft is\n%v", changes, left)
	}
	return changes
}

// add gives a container its network, and returns its addresses.
func (b *town) add(l *Layer, container string) []netip.Addr {
	b.t.Helper()
	result, err := l.Answer(b.t.Context(), b.request(cni.Add, container, ""))
	must(b.t, err)
	return addressesIn(result)
}

func addressesIn(result *types100.Result) (all []netip.Addr) {
	for _, ip := range result.IPs {
		addr, _ := netip.AddrFromSlice(ip.Address.IP)
		all = append(all, addr.Unmap())
	}
	return all
}

// code is that of a CNI error; 0 for none.
func code(t *testing.T, err error) uint {
	t.Helper()
	if err == nil {
		return 0
	}
	var failed *types.Error
	if !errors.As(err, &failed) {
		return types.ErrInternal
	}
	return failed.Code
}

// say opens a connection from one namespace to a listener in another and back, and returns
// the address that the listener saw.
func say(from, to string, at netip.Addr) (seen netip.Addr, err error) {
	var listener net.Listener
	err = netns.Do(to, func() (err error) {
		listener, err = net.Listen("tcp", netip.AddrPortFrom(at, 0).String())
		return err
	})
	if err != nil {
		return seen, err
	}
	defer listener.Close()
	got := make(chan netip.Addr, 1)
	go func() {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		got <- c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		_, _ = c.Write([]byte("hello"))
	}()
	text := make([]byte, 5)
	err = netns.Do(from, func() error {
		c, err := net.DialTimeout("tcp", listener.Addr().String(), 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err = c.Read(text)
		return err
	})
	if err == nil && string(text) != "hello" {
		err = fmt.Errorf("%q came back", text)
	}
	if err != nil {
		return seen, err
	}
	return <-got, nil
}

// observe prints the layer's files, and the devices and routes of the node.
func (b *town) observe() string {
	b.t.Helper()
	var text []string
	for _, folder := range []string{filepath.Dir(b.settings.Folder), b.BPF} {
		_ = filepath.WalkDir(folder, func(path string, _ os.DirEntry, err error) error {
			text = append(text, path)
			return err
		})
	}
	n, err := link.Open(b.NetNS)
	must(b.t, err)
	defer n.Close()
	devices, err := n.Devices()
	must(b.t, err)
	for _, d := range devices {
		text = append(text, fmt.Sprintf("device %d %s %s", d.Index, d.Name, d.Alias))
	}
	routes, err := n.Routes(routeProtocol)
	must(b.t, err)
	for _, r := range routes {
		text = append(text, fmt.Sprintf("route %s by %d from %s", r.To, r.Link, r.Source))
	}
	slices.Sort(text)
	return strings.Join(text, "\n")
}

// watching has the layer answer at its socket until the function that it returns is
// called.
func watching(l *Layer) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Watch(ctx, func() {}) }()
	return func() { cancel(); <-done }
}
