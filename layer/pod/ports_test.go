package pod

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
	"github.com/millrace/millrace/model"
)

// tellsPorts has the town note which hostPorts it is told of.
func (b *town) tellsPorts() (told func() []string) {
	var last []model.HostPort
	b.settings.HostPorts = func(ports []model.HostPort) { last = ports }
	return func() (texts []string) {
		for _, p := range last {
			texts = append(texts, fmt.Sprintf("%s/%s -> %s %s", p.At, p.Protocol, p.To, p.Pod))
		}
		return texts
	}
}

// HostPorts are told of when the pod has its network, in each family in which they lead to
// it; another agent knows them; they go with the pod.
func TestPortsOfPods(t *testing.T) {
	b := newTown(t)
	told := b.tellsPorts()
	ranges := []string{"10.244.1.0/24", "fd00:1::/64"}
	l := b.open(ranges...)
	b.space("web")
	b.space("db")
	asked := layertest.PortMappings("8080:80/tcp", "8080:80/tcp", "0.0.0.0 53:5353/UDP", "2001:db8::10 81:80/tcp", "::ffff:127.0.0.1 81:81/tcp", "81:82/udp")
	must(t, second(l.Answer(t.Context(), b.request(cni.Add, "web", asked))))
	want := []string{
		"0.0.0.0:53/udp -> 10.244.1.1:5353 shop/web", "0.0.0.0:81/udp -> 10.244.1.1:82 shop/web", "0.0.0.0:8080/tcp -> 10.244.1.1:80 shop/web",
		"127.0.0.1:81/tcp -> 10.244.1.1:81 shop/web", "[::]:81/udp -> [fd00:1::1]:82 shop/web", "[::]:8080/tcp -> [fd00:1::1]:80 shop/web",
		"[2001:db8::10]:81/tcp -> [fd00:1::1]:80 shop/web",
	}
	if got := told(); !slices.Equal(got, want) {
		t.Errorf("told are\n%s\nnot\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	must(t, second(l.Answer(t.Context(), b.request(cni.Add, "web", asked)))) // again
	must(t, second(l.Answer(t.Context(), b.request(cni.Check, "web", asked))))
	if err := second(l.Answer(t.Context(), b.request(cni.Check, "web", layertest.PortMappings("8081:80/tcp")))); err == nil || !strings.Contains(err.Error(), "missing is hostPort 8081->80/tcp: delete the pod") {
		t.Errorf("CHECK of another port: %v", err)
	}
	must(t, l.Close())

	told = b.tellsPorts() // nothing was told to this one
	l = New(b.settings)
	must(t, l.Open())
	t.Cleanup(func() { l.Close() })
	if got := told(); !slices.Equal(got, want) {
		t.Errorf("another agent tells of\n%s", strings.Join(got, "\n"))
	}
	b.apply(l, ranges...)
	looked, err := New(b.settings).Look()
	must(t, err)
	if got := looked.(*Picture).HostPorts(); len(got) != len(want) {
		t.Errorf("who looks sees %v", got)
	}
	must(t, second(l.Answer(t.Context(), b.request(cni.Add, "db", layertest.PortMappings("82:82/tcp")))))
	if got := told(); len(got) != len(want)+2 {
		t.Errorf("told are %v", got)
	}
	must(t, second(l.Answer(t.Context(), b.request(cni.Del, "web", ""))))
	if got := told(); !slices.Equal(got, []string{"0.0.0.0:82/tcp -> 10.244.1.2:82 shop/db", "[::]:82/tcp -> [fd00:1::2]:82 shop/db"}) {
		t.Errorf("one pod has ended, and told are %v", got)
	}
	must(t, second(l.Answer(t.Context(), b.request(cni.GC, "", `,"cni.dev/valid-attachments":[]`))))
	if got := told(); len(got) > 0 {
		t.Errorf("no pod is valid, and told are %v", got)
	}
	if text, err := os.ReadFile(filepath.Join(b.settings.Folder, "addresses.json")); err != nil || strings.Contains(string(text), "ports") {
		t.Errorf("written down is %s, %v", text, err)
	}
}

// What cannot be served is refused with what to do, and nothing is left of the pod; what
// another pod has can be had when that has ended.
func TestPortsThatAreRefused(t *testing.T) {
	b := newTown(t)
	told := b.tellsPorts()
	l := b.open("10.244.1.0/24")
	for _, container := range []string{"web", "db"} {
		b.space(container)
	}
	have, err := l.Read()
	must(t, err)
	cluster := cluster("10.244.1.0/24")
	cluster.Services = []*model.Service{{Name: model.Name{Namespace: "shop", Name: "front"}, ExternalIPs: []netip.Addr{netip.MustParseAddr("198.51.100.7")},
		Ports: []model.ServicePort{{Protocol: model.TCP, Port: 443, NodePort: 30080}}},
		{Name: model.Name{Namespace: "kube-system", Name: "traefik"}, LoadBalancerIPs: []netip.Addr{node4}, Ports: []model.ServicePort{{Protocol: model.TCP, Port: 8443}}}}
	want := l.Plan(cluster)
	_, _, err = l.Apply(have, want, l.Diff(have, want, true))
	must(t, err)
	must(t, second(l.Answer(t.Context(), b.request(cni.Add, "web", layertest.PortMappings("80:80/tcp", "127.0.0.1 53:53/udp")))))
	before := b.observe()
	for _, row := range []struct {
		ports string
		code  uint
		says  string
	}{
		{layertest.PortMappings("5060:5060/sctp"), types.ErrInvalidNetworkConfig, "hostPort 5060/sctp of pod shop/db: SCTP is not served"},
		{layertest.PortMappings("5060:5060/dccp"), types.ErrInvalidNetworkConfig, `unknown protocol "dccp"`},
		{layertest.PortMappings("0:80/tcp"), types.ErrInvalidNetworkConfig, "ports are 1 to 65535"},
		{layertest.PortMappings("80:70000/tcp"), types.ErrInvalidNetworkConfig, "to port 70000 of the pod"},
		{layertest.PortMappings("node 81:80/tcp"), types.ErrInvalidNetworkConfig, `hostIP "node" is no address`},
		{layertest.PortMappings("ff02::1 81:80/tcp"), types.ErrInvalidNetworkConfig, `hostIP "ff02::1" is no address`},
		{layertest.PortMappings("fe80::1%eth0 81:80/tcp"), types.ErrInvalidNetworkConfig, "is no address"},
		{layertest.PortMappings("::1 81:80/tcp"), types.ErrInvalidNetworkConfig, "of the family of its hostIP (the ranges are [10.244.1.0/24])"},
		{layertest.PortMappings("81:80/tcp", "192.0.2.10 81:81/tcp"), types.ErrInvalidNetworkConfig, "it leads to port 80 and to 81 of the pod"},
		{layertest.PortMappings(slices.Repeat([]string{"80:80/udp"}, mostPorts+1)...), types.ErrInvalidNetworkConfig, "pod shop/db has 257 hostPorts: a pod may have 256"},
		{layertest.PortMappings("80:80/tcp"), types.ErrTryAgainLater, "hostPort 80/tcp of pod shop/db: pod shop/web of this node has it"},
		{layertest.PortMappings("192.0.2.10 80:80/tcp"), types.ErrTryAgainLater, "hostPort 192.0.2.10:80/tcp of pod shop/db: pod shop/web"},
		{layertest.PortMappings("53:53/udp"), types.ErrTryAgainLater, "pod shop/web of this node has it"},
		{layertest.PortMappings("30080:80/tcp"), types.ErrTryAgainLater, "the node port of Service shop/front has it"},
		{layertest.PortMappings("198.51.100.7 443:80/tcp"), types.ErrTryAgainLater, "Service shop/front has it"},
		{layertest.PortMappings("192.0.2.10 8443:80/tcp"), types.ErrTryAgainLater, "Service kube-system/traefik has it"},
	} {
		err := second(l.Answer(t.Context(), b.request(cni.Add, "db", row.ports)))
		if code(t, err) != row.code || err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v, code %d, not %d with %q", row.ports, err, code(t, err), row.code, row.says)
		}
		if after := b.observe(); after != before || len(told()) != 2 {
			t.Errorf("%s was refused, and left\n%s\nand %v", row.ports, after, told())
		}
	}
	for _, free := range []string{"80:80/udp", "192.0.2.10 53:53/udp", "30080:80/udp", "192.0.2.10 443:443/tcp", "8443:8443/tcp"} {
		must(t, second(l.Answer(t.Context(), b.request(cni.Add, "db", layertest.PortMappings(free)))))
		if why := l.unserved(); len(why) > 0 {
			t.Errorf("%s: status says %q", free, why)
		}
		must(t, second(l.Answer(t.Context(), b.request(cni.Del, "db", ""))))
	}
	must(t, second(l.Answer(t.Context(), b.request(cni.Del, "web", ""))))
	must(t, second(l.Answer(t.Context(), b.request(cni.Add, "db", layertest.PortMappings("80:80/tcp")))))
	if got := told(); len(got) != 1 || !strings.HasPrefix(got[0], "0.0.0.0:80/tcp -> 10.244.1.") || !strings.HasSuffix(got[0], ":80 shop/db") {
		t.Errorf("the other pod has ended, and told are %v", got)
	}
}

// However many hostPorts there are, each Service is looked at once: a node full of pods with
// as many as they may have, in a large cluster, keeps no ADD waiting.
func TestOwnersOfManyPorts(t *testing.T) {
	var ports []pool.Port
	for i := range 100 * mostPorts {
		ports = append(ports, pool.Port{Protocol: "tcp", HostPort: uint16(1000 + i), ContainerPort: 80})
	}
	var services []*model.Service
	for i := range 100_000 {
		services = append(services, &model.Service{Name: model.Name{Namespace: "shop", Name: fmt.Sprint("s", i)}, Ports: []model.ServicePort{{Protocol: model.TCP, Port: 80}}})
	}
	services[7].Ports[0].NodePort, services[9].Ports[0].NodePort = 1001, 1001
	begun := time.Now()
	if found := owners(services, ports); len(found) != 1 || found[ports[1]] != "the node port of Service shop/s7" {
		t.Errorf("they are %v", found)
	}
	if took := time.Since(begun); took > 2*time.Second { // some 30 ms; pair by pair 80 s
		t.Errorf("%d ports and %d Services took %v", len(ports), len(services), took)
	}
}

// A pod may say one port at several addresses, as long as it leads to one of its own.
func TestPortsThatMeetInOnePod(t *testing.T) {
	b := newTown(t)
	told := b.tellsPorts()
	l := b.open("10.244.1.0/24")
	b.space("web")
	asked := layertest.PortMappings("127.0.0.1 80:80/tcp", "80:80/tcp", "0.0.0.0 80:80/tcp", "80:80/tcp")
	must(t, second(l.Answer(t.Context(), b.request(cni.Add, "web", asked))))
	want := []string{"0.0.0.0:80/tcp -> 10.244.1.1:80 shop/web", "127.0.0.1:80/tcp -> 10.244.1.1:80 shop/web"}
	if got := told(); !slices.Equal(got, want) {
		t.Errorf("told are\n%s", strings.Join(got, "\n"))
	}
	must(t, second(l.Answer(t.Context(), b.request(cni.Check, "web", asked))))
	for _, refused := range []string{layertest.PortMappings("127.0.0.1 80:80/tcp", "80:81/tcp"), layertest.PortMappings("127.0.0.1 80:80/tcp", "192.0.2.10 80:81/tcp", "80:81/tcp")} {
		if err := second(l.Answer(t.Context(), b.request(cni.Add, "web", refused))); code(t, err) != types.ErrInvalidNetworkConfig || !strings.Contains(err.Error(), "it leads to port 80 and to 81 of the pod") {
			t.Errorf("one port that leads to two: %v", err)
		}
	}
}

// A hostIP that is not the node's takes nothing from whose it is: it is not told of, and
// named in the status, until the node has the address.
func TestPortsAtAddressesOfOthers(t *testing.T) {
	b := newTown(t)
	told := b.tellsPorts()
	l := b.open("10.244.1.0/24")
	b.space("web")
	asked := layertest.PortMappings("198.51.100.9 6443:80/tcp", "169.254.169.254 80:80/tcp", "10.244.1.1 81:80/tcp", "127.0.0.5 82:80/tcp", node4.String()+" 83:80/tcp")
	must(t, second(l.Answer(t.Context(), b.request(cni.Add, "web", asked))))
	want := []string{"127.0.0.5:82/tcp -> 10.244.1.1:80 shop/web", "192.0.2.10:83/tcp -> 10.244.1.1:80 shop/web"}
	if got := told(); !slices.Equal(got, want) {
		t.Errorf("told are\n%s", strings.Join(got, "\n"))
	}
	why := l.unserved()
	if len(why) != 3 || !strings.Contains(why[0], "hostPort 198.51.100.9:6443/tcp of pod shop/web is not served: no device of this node has its hostIP") {
		t.Errorf("status says %q", why)
	}
	b.AddAddress("198.51.100.9/32")
	have, err := l.Refresh(nil)
	must(t, err)
	want = append(want, "198.51.100.9:6443/tcp -> 10.244.1.1:80 shop/web")
	if got := told(); !slices.Equal(got, want) {
		t.Errorf("the node has the address now, and told are\n%s", strings.Join(got, "\n"))
	}
	if seen := have.(*Picture).HostPorts(); len(seen) != len(want) {
		t.Errorf("who looks sees %v", seen)
	}
	if why := l.unserved(); len(why) != 2 {
		t.Errorf("status says %q", why)
	}
}

// A Service that comes later and has a pod's port is named in the status; where hostPorts are
// not served here, and the runtime cannot, that is.
func TestPortsThatAreNotServed(t *testing.T) {
	l := New(Settings{Plugins: t.TempDir(), HostPorts: func([]model.HostPort) {}})
	l.host, l.save = nobody{}, func(pool.Book) error { return nil }
	l.pool.Use([]netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")})
	r := &cni.Request{Command: cni.Add, Container: "c1", Interface: "eth0", Args: "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=names", Namespace: os.Stdin,
		Config: []byte(`{"name":"town"` + layertest.PortMappings("30053:53/udp", "53:53/udp") + "}")}
	must(t, second(l.Answer(t.Context(), r)))
	if why := l.unserved(); len(why) > 0 {
		t.Errorf("nobody else has its ports, but %q", why)
	}
	l.services = []*model.Service{{Name: model.Name{Namespace: "shop", Name: "front"}, Ports: []model.ServicePort{{Protocol: model.UDP, Port: 53, NodePort: 30053}}}}
	if why := l.unserved(); len(why) != 1 || !strings.Contains(why[0], "hostPort 30053/udp of pod shop/names is not served, or not everywhere: the node port of Service shop/front has it, too") {
		t.Errorf("status says %q", why)
	}
	l.settings.HostPorts = nil
	r.Container = "c2"
	if err := second(l.Answer(t.Context(), r)); code(t, err) != types.ErrInvalidNetworkConfig || !strings.Contains(err.Error(), "--wire=false") {
		t.Errorf("an agent that serves none: %v", err)
	}
	l.install.settings = l.settings
	if why := l.unserved(); len(why) != 3 || !strings.Contains(why[1], "hostPort 30053/udp of pod shop/names is not served with --wire=false") || !strings.Contains(why[2], "hostPort 53/udp of pod") {
		t.Errorf("of a pod that an agent before served, status says %q", why)
	}
	l.pool.GivePorts(pool.Key{Container: "c1", Interface: "eth0"})
	if why := l.unserved(); len(why) != 1 || !strings.Contains(why[0], "the plug-in portmap, which is not in "+l.settings.Plugins) {
		t.Errorf("status says %q", why)
	}
	must(t, os.WriteFile(filepath.Join(l.settings.Plugins, "portmap"), nil, 0o755))
	if why := l.unserved(); len(why) > 0 {
		t.Errorf("portmap is there, but %q", why)
	}
}
