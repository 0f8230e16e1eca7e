package lab

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/model"
)

// testRanges are those of a lab on a host that uses nothing.
func testRanges(t *testing.T) Ranges {
	t.Helper()
	r, err := chooseRanges(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestServicesGetTheirFamilies(t *testing.T) {
	r := testRanges(t)
	for _, c := range []struct {
		what   string
		change func(*model.Service)
		want   string // for each address: a family, or the address named
	}{
		{"neither family named", func(*model.Service) {}, "4 6"},
		{"IPv4", func(s *model.Service) { s.IPv4 = true }, "4"},
		{"IPv6", func(s *model.Service) { s.IPv6 = true }, "6"},
		{"headless", func(s *model.Service) { s.Headless = true }, ""},
		{"ExternalName", func(s *model.Service) { s.Type = model.ExternalName }, ""},
		{"NodePort", func(s *model.Service) { s.Type = model.NodePort }, "4 6"},
		{"an address named", func(s *model.Service) { s.ClusterIPs = addrs("10.96.0.10") }, "10.96.0.10 6"},
		{"outside the range", func(s *model.Service) { s.ClusterIPs = addrs("192.168.9.9"); s.IPv4 = true }, "192.168.9.9"},
		{"both named", func(s *model.Service) { s.ClusterIPs = addrs("fd00::9", "10.96.0.10") }, "fd00::9 10.96.0.10"},
	} {
		s := service("web")
		c.change(s)
		book, problems := allocateServices([]*model.Service{s}, nil, r, nil)
		var got []string
		for _, a := range book[s.Name] {
			switch {
			case slices.Contains(s.ClusterIPs, a):
				got = append(got, a.String())
			case r.Services[0].Contains(a):
				got = append(got, "4")
			case r.Services[1].Contains(a):
				got = append(got, "6")
			}
		}
		if strings.Join(got, " ") != c.want || len(problems) > 0 {
			t.Errorf("%s: got %v (%q), %v; want %q", c.what, book[s.Name], got, problems, c.want)
		}
	}
}

func TestServiceAddressesAreKeptAndNeverShared(t *testing.T) {
	r := testRanges(t)
	var services []*model.Service
	for i := range 3000 {
		services = append(services, service(fmt.Sprintf("s%d", i)))
	}
	book, problems := allocateServices(services, nil, r, nil)
	seen := map[string]bool{}
	for _, ips := range book {
		for _, ip := range ips {
			if seen[ip.String()] {
				t.Fatalf("%s is given twice", ip)
			}
			seen[ip.String()] = true
		}
	}
	if len(seen) != 6000 || len(problems) > 0 {
		t.Fatalf("%d addresses for 3000 Services, problems %v", len(seen), problems)
	}
	// A newcomer names the address that s7 was given: s7 has to move, alone.
	newcomer := service("a-newcomer")
	newcomer.ClusterIPs = book[services[7].Name][:1]
	again, problems := allocateServices(append([]*model.Service{newcomer}, services...), book, r, nil)
	if len(problems) > 0 || !slices.Contains(again[newcomer.Name], newcomer.ClusterIPs[0]) {
		t.Errorf("the newcomer has %v, problems %v", again[newcomer.Name], problems)
	}
	for i, s := range services {
		if same := slices.Equal(again[s.Name], book[s.Name]); same == (i == 7) {
			t.Errorf("%s: %v became %v", s.Name, book[s.Name], again[s.Name])
		}
	}
}

func TestClashingServiceAddressesAreProblems(t *testing.T) {
	r := testRanges(t)
	first, second, pod := service("first"), service("second"), service("third")
	first.ClusterIPs, second.ClusterIPs, pod.ClusterIPs = addrs("10.96.0.10"), addrs("10.96.0.10"), addrs("10.244.1.1")
	book, problems := allocateServices([]*model.Service{first, second, pod}, nil, r, nil)
	var got []string
	for _, p := range problems {
		got = append(got, p.Error())
	}
	want := []string{
		"test.yaml:9: Service default/second: spec.clusterIP: 10.96.0.10 is also the address of Service default/first: give each Service its own",
		"test.yaml:9: Service default/third: spec.clusterIP: 10.244.1.1 lies in 10.244.0.0/16, from which pods or nodes take their addresses",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	if _, ok := book[second.Name]; ok || len(book) != 1 {
		t.Errorf("a Service whose address clashes has addresses: %v", book)
	}
}

// TestEndpoints tells from which pods which endpoints come. A line is
// "address:port condition", condition being R(eady), S(erving), T(erminating).
func TestEndpoints(t *testing.T) {
	port := model.ServicePort{Protocol: model.TCP, Port: 80}
	for _, c := range []struct {
		what    string
		service func(*model.Service)
		pod     func(*member)
		want    string
	}{
		{what: "a ready pod", want: "10.1.0.2:80 RS, [fd00::2]:80 RS"},
		{what: "a named target port", service: func(s *model.Service) { s.Ports[0].TargetName = "web" }, want: "10.1.0.2:8080 RS, [fd00::2]:8080 RS"},
		{what: "a name for the other protocol", service: func(s *model.Service) { s.Ports[0].TargetName = "dns" }},
		{what: "a numbered target port", service: func(s *model.Service) { s.Ports[0].TargetPort = 99 }, want: "10.1.0.2:99 RS, [fd00::2]:99 RS"},
		{what: "IPv4 alone", service: func(s *model.Service) { s.IPv4 = true }, want: "10.1.0.2:80 RS"},
		{what: "IPv6 alone", service: func(s *model.Service) { s.IPv6 = true }, want: "[fd00::2]:80 RS"},
		{what: "a pod that is not ready", pod: func(m *member) { m.Ready = false }, want: "10.1.0.2:80 , [fd00::2]:80 "},
		{what: "not ready, but wanted so", pod: func(m *member) { m.Ready = false },
			service: func(s *model.Service) { s.PublishNotReadyAddresses = true }, want: "10.1.0.2:80 R, [fd00::2]:80 R"},
		{what: "a leaving pod", pod: func(m *member) { m.Leaving = true }, want: "10.1.0.2:80 ST, [fd00::2]:80 ST"},
		{what: "other labels", pod: func(m *member) { m.Pod.Labels = map[string]string{"app": "db"} }},
		{what: "a label missing", service: func(s *model.Service) { s.Selector = map[string]string{"app": "web", "tier": ""} }},
		{what: "other namespace", pod: func(m *member) { m.Pod.Namespace = "shop" }},
		{what: "an empty selector", service: func(s *model.Service) { s.Selector = map[string]string{} }},
		{what: "given endpoints stay", service: func(s *model.Service) {
			s.Ports[0].Backends = []model.Backend{{Address: addrPort("9.9.9.9:1"), Ready: true}}
		},
			want: "9.9.9.9:1 R, 10.1.0.2:80 RS, [fd00::2]:80 RS"},
	} {
		s := service("web", port)
		m := member{Ready: true, Pod: &model.Pod{
			Name: model.Name{Namespace: "default", Name: "web-1"}, Labels: map[string]string{"app": "web"},
			Node: "n1", Addresses: addrs("10.1.0.2", "fd00::2"), Ports: webPorts,
		}}
		if c.service != nil {
			c.service(s)
		}
		if c.pod != nil {
			c.pod(&m)
		}
		out := publishService(s, nil, indexPods([]member{m}), map[string]string{"n1": "zone-a"})
		if got := endpointText(out.Ports[0].Backends); got != c.want {
			t.Errorf("%s: got %q, want %q", c.what, got, c.want)
		}
	}
}

func endpointText(backends []model.Backend) string {
	var lines []string
	for _, b := range backends {
		text := b.Address.String() + " "
		for _, c := range []struct {
			on     bool
			letter string
		}{{b.Ready, "R"}, {b.Serving, "S"}, {b.Terminating, "T"}} {
			if c.on {
				text += c.letter
			}
		}
		lines = append(lines, text)
	}
	return strings.Join(lines, ", ")
}

// TestOfPodsWithOneAddressTheBestIsListed lists pods on a node's own network in
// every order.
func TestOfPodsWithOneAddressTheBestIsListed(t *testing.T) {
	pod := func(name string, ready, leaving bool) member {
		return member{Ready: ready, Leaving: leaving, Pod: &model.Pod{Name: model.Name{Namespace: "default", Name: name},
			Labels: map[string]string{"app": "web"}, Node: "n1", Addresses: addrs("10.1.0.2")}}
	}
	s := service("web", model.ServicePort{Protocol: model.TCP, Port: 80})
	for _, c := range []struct {
		pods []member
		want string
	}{
		{[]member{pod("a", false, false), pod("b", true, true), pod("c", true, false)}, "c"},
		{[]member{pod("a", false, false), pod("b", true, true), pod("c", false, true)}, "b"},
		{[]member{pod("a", true, false), pod("b", true, false), pod("c", true, false)}, "a"},
	} {
		for range c.pods {
			c.pods = append(c.pods[1:], c.pods[0])
			got := publishService(s, nil, indexPods(c.pods), nil).Ports[0].Backends
			if len(got) != 1 || got[0].Pod.Name != c.want {
				t.Errorf("of %v: %+v, want %s", c.pods, got, c.want)
			}
		}
	}
}

func TestEndpointsNameWhereTheyAre(t *testing.T) {
	m := member{Ready: true, Pod: &model.Pod{Name: model.Name{Namespace: "default", Name: "web-1"},
		Labels: map[string]string{"app": "web"}, Node: "n1", Addresses: addrs("10.1.0.2")}}
	s := service("web", model.ServicePort{Protocol: model.TCP, Port: 80})
	b := publishService(s, nil, indexPods([]member{m}), map[string]string{"n1": "zone-a"}).Ports[0].Backends[0]
	if b.Node != "n1" || b.Zone != "zone-a" || b.Pod != m.Pod.Name {
		t.Errorf("got %+v", b)
	}
	if len(s.Ports[0].Backends) > 0 {
		t.Error("the Snapshot, which is immutable, was changed")
	}
}
