package dir

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/model"
)

// shopService is a Service of both families with two ports and n endpoints.
func shopService(name string, n int) *model.Service {
	s := &model.Service{
		Name: model.Name{Namespace: "shop", Name: name}, Type: model.ClusterIP,
		ClusterIPs: []netip.Addr{netip.MustParseAddr("fd00::10"), netip.MustParseAddr("10.96.0.10")},
		IPv4:       true, IPv6: true,
		Ports: []model.ServicePort{
			{Name: "http", Protocol: model.TCP, Port: 80, TargetName: "http"},
			{Name: "dns", Protocol: model.UDP, Port: 53, TargetPort: 5353},
		},
		Selector: map[string]string{"app": name}, Annotations: map[string]string{"note": "kept"},
	}
	for i := range n {
		addr := netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)})
		pod := model.Name{Namespace: "shop", Name: fmt.Sprint(name, "-", i)}
		b := model.Backend{Ready: true, Serving: true, Node: "n1", Zone: "a", Pod: pod}
		s.Ports[0].Backends = append(s.Ports[0].Backends, at(b, addr, 8080))
		s.Ports[1].Backends = append(s.Ports[1].Backends, at(b, addr, 5353))
	}
	return s
}

func at(b model.Backend, addr netip.Addr, port uint16) model.Backend {
	b.Address = netip.AddrPortFrom(addr, port)
	return b
}

// arbitraryService is any Service that a source can deliver.
func arbitraryService(random *rand.Rand, number int) *model.Service {
	name := fmt.Sprintf("s%04d", number)
	s := &model.Service{Name: model.Name{Namespace: "shop", Name: name}, Type: model.ClusterIP}
	switch random.IntN(4) {
	case 0:
		s.Type, s.Headless = model.ClusterIP, true
	case 1:
		s.Type, s.IPv4 = model.NodePort, true
	case 2:
		s.IPv4, s.IPv6 = true, true
	}
	if !s.Headless && random.IntN(2) == 0 {
		ip := netip.MustParseAddr("fd02::1:" + name[1:])
		s.ClusterIPs, s.IPv6 = []netip.Addr{ip}, true
		if s.IPv4 && random.IntN(2) == 0 {
			s.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 97, byte(number >> 8), byte(number)}), ip}
		}
	}
	for i := range random.IntN(4) {
		p := model.ServicePort{Name: fmt.Sprint("p", i), Protocol: []model.Protocol{model.TCP, model.UDP, model.SCTP}[random.IntN(3)], Port: uint16(80 + i)}
		for range random.IntN(8) {
			p.Backends = append(p.Backends, arbitraryBackend(random))
		}
		slices.SortFunc(p.Backends, func(a, b model.Backend) int { return a.Address.Compare(b.Address) })
		p.Backends = slices.CompactFunc(p.Backends, func(a, b model.Backend) bool { return a.Address == b.Address })
		s.Ports = append(s.Ports, p)
	}
	if len(s.Ports) == 0 {
		s.Ports = []model.ServicePort{{Protocol: model.TCP, Port: 80}}
	}
	return s
}

func arbitraryBackend(random *rand.Rand) model.Backend {
	b := model.Backend{Ready: random.IntN(2) == 0, Serving: random.IntN(2) == 0, Terminating: random.IntN(2) == 0}
	if random.IntN(2) == 0 {
		b.Node, b.Zone, b.Pod = "n1", "a", model.Name{Namespace: "shop", Name: "p"}
	}
	addr := netip.AddrFrom4([4]byte{10, 244, 0, byte(1 + random.IntN(3))})
	if random.IntN(2) == 0 {
		addr = netip.MustParseAddr(fmt.Sprint("fd01::", 1+random.IntN(3)))
	}
	return at(b, addr, uint16(8080+random.IntN(3)))
}

// TestRoundTrip holds Writer to its law: what a Source reads is what was put.
func TestRoundTrip(t *testing.T) {
	folder := t.TempDir()
	w, err := NewWriter(folder)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	services := []*model.Service{shopService("a-many", 2500)}
	services = append(services, &model.Service{Name: model.Name{Namespace: "shop", Name: "b-outside"}, Type: model.ExternalName})
	for i := range 200 {
		services = append(services, arbitraryService(random, i))
	}
	pods := []*model.Pod{
		{Name: model.Name{Namespace: "shop", Name: "asked"}, Ports: []model.ContainerPort{{Name: "http", Protocol: model.TCP, Port: 80}, {Protocol: model.UDP, Port: 53}}},
		{Name: model.Name{Namespace: "shop", Name: "there"}, Node: "n1", Ready: true, Labels: map[string]string{"a": "b"}, Annotations: map[string]string{"c": "d"},
			Addresses: []netip.Addr{netip.MustParseAddr("10.244.0.1"), netip.MustParseAddr("fd01::1")}},
		{Name: model.Name{Namespace: "shop", Name: "wide"}, Node: "n1", HostNetwork: true, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}},
	}
	nodes := []*model.Node{
		{Name: "n1", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/24"), netip.MustParsePrefix("fd01::/64")}, Labels: map[string]string{"zone": "a"}},
		{Name: "n2"},
	}
	for _, s := range services {
		check(t, w.PutService(s))
	}
	for _, p := range pods {
		check(t, w.PutPod(p))
	}
	for _, n := range nodes {
		check(t, w.PutNode(n))
	}
	got := readAll(t, folder)
	for _, p := range got.Problems {
		if !strings.HasPrefix(p.Text, "SCTP is not served") {
			t.Errorf("what Writer wrote has a problem: %v", p)
		}
	}
	// Endpoints are made of Backends when they are read.
	same(t, got.Services, services, func(s *model.Service) { s.Where, s.Endpoints = "", nil })
	same(t, got.Pods, pods, func(p *model.Pod) { p.Where = "" })
	same(t, got.Nodes, nodes, func(n *model.Node) { n.Where = "" })
	for _, s := range services {
		check(t, w.DeleteService(s.Name))
	}
	for _, p := range pods {
		check(t, w.DeletePod(p.Name))
		check(t, w.DeletePod(p.Name))
	}
	for _, n := range nodes {
		check(t, w.DeleteNode(n.Name))
	}
	if left, err := os.ReadDir(folder); err != nil || len(left) > 0 {
		t.Errorf("after all was deleted there is %v %v", left, err)
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func same[T any](t *testing.T, got, want []*T, blank func(*T)) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d were put and %d read", len(want), len(got))
	}
	for i := range got {
		read := *got[i]
		if blank(&read); !reflect.DeepEqual(read, *want[i]) {
			t.Errorf("was put\n%+v\nand read as\n%+v", *want[i], read)
		}
	}
}

// TestSlicesKeepToTheAPI counts endpoints and families in what Writer makes of a
// Service whose named port is another number on some pods.
func TestSlicesKeepToTheAPI(t *testing.T) {
	s := shopService("web", 2100)
	for i := range 50 {
		b := &s.Ports[0].Backends[i*7]
		b.Address = netip.AddrPortFrom(b.Address.Addr(), 9090)
	}
	s.Ports[0].Backends = append(s.Ports[0].Backends, at(model.Backend{Ready: true, Serving: true}, netip.MustParseAddr("fd01::1"), 8080))
	var shape []string
	for _, slice := range endpointSlices(s) {
		line := fmt.Sprintf("%s %s %d:", slice.Name, slice.AddressType, len(slice.Endpoints))
		for _, p := range slice.Ports {
			line += fmt.Sprintf(" %s=%d", *p.Name, *p.Port)
		}
		shape = append(shape, line)
	}
	want := []string{
		"web-0 IPv4 1000: http=8080 dns=5353", "web-1 IPv4 1000: http=8080 dns=5353", "web-2 IPv4 50: http=8080 dns=5353",
		"web-3 IPv4 50: http=9090 dns=5353", "web-4 IPv6 1: http=8080",
	}
	if !slices.Equal(shape, want) {
		t.Errorf("the slices are\n%s\nand should be\n%s", strings.Join(shape, "\n"), strings.Join(want, "\n"))
	}
}

func TestWriterLeavesTheSameAlone(t *testing.T) {
	folder := t.TempDir()
	check(t, os.WriteFile(filepath.Join(folder, unfinished+"x"), nil, 0o644))
	w, err := NewWriter(folder)
	check(t, err)
	s := shopService("web", 2)
	check(t, w.PutService(s))
	inode := func() os.FileInfo {
		info, err := os.Stat(filepath.Join(folder, "service_shop_web.json"))
		check(t, err)
		return info
	}
	first := inode()
	check(t, w.PutService(s))
	again, err := NewWriter(folder)
	check(t, err)
	check(t, again.PutService(s))
	if !os.SameFile(first, inode()) {
		t.Error("a file was written again to say the same")
	}
	s.Ports[0].Backends[0].Ready = false
	check(t, again.PutService(s))
	if os.SameFile(first, inode()) {
		t.Error("a change was not written, or not by renaming")
	}
	if entries, err := os.ReadDir(folder); err != nil || len(entries) != 1 {
		t.Errorf("there is more than the Service's file: %v %v", entries, err)
	}
}

func TestWriterRefusesPaths(t *testing.T) {
	w, err := NewWriter(t.TempDir())
	check(t, err)
	for _, n := range []model.Name{{Namespace: "shop", Name: "../x"}, {Namespace: "a/b", Name: "x"}, {Namespace: "shop"}} {
		if err := w.PutPod(&model.Pod{Name: n}); err == nil {
			t.Errorf("a pod named %s was written", n)
		}
	}
}
