package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/model"
)

// host is the network namespace of a node.
type host struct {
	t    *testing.T
	path string
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a network namespace")
	}
	h := &host{t, filepath.Join(t.TempDir(), "node")}
	if err := netns.Create(h.path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netns.Remove(h.path) })
	n, err := link.Open(h.path)
	if err == nil {
		err = n.UpLoopback()
		n.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// listen takes a port, as a kube-proxy does.
func (h *host) listen(address string) net.Listener {
	h.t.Helper()
	var l net.Listener
	if err := netns.Do(h.path, func() (err error) { l, err = net.Listen("tcp", address); return err }); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { l.Close() })
	return l
}

// get is "200 text", or "none" where nobody listens.
func (h *host) get(url string) string {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, address string) (c net.Conn, err error) {
			err = netns.Do(h.path, func() error { c, err = net.Dial(network, address); return err })
			return c, err
		}}}
	response, err := client.Get("http://" + url)
	if err != nil {
		return "none"
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	return fmt.Sprint(response.StatusCode, " ", string(body))
}

func (h *host) kubeProxy() *KubeProxy {
	return &KubeProxy{
		From: "configmap:kube-system/kube-proxy", Notes: []string{"ipvs.scheduler: lc: later: ..."}, Netns: h.path, Ports: true,
		Problems: []model.Problem{{Where: "kube-proxy.conf:3", Field: "mod", Text: "no such field"}},
		Healthz:  netip.MustParseAddrPort("0.0.0.0:10256"), Metrics: netip.MustParseAddrPort("127.0.0.1:10249"),
	}
}

// local is a cluster with a Service that a load balancer asks about, and endpoints
// on these nodes.
func local(nodes ...string) *model.Snapshot {
	web := &model.Service{Name: model.Name{Namespace: "shop", Name: "web"}, Type: model.LoadBalancer, ExternalLocal: true,
		HealthCheckPort: 30100, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.2")}, Ports: []model.ServicePort{{Port: 80}}}
	for i, node := range nodes {
		web.Ports[0].Backends = append(web.Ports[0].Backends, model.Backend{
			Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 1, byte(i)}), 8080), Ready: true, Serving: true, Node: node})
	}
	return &model.Snapshot{Complete: true, Seen: time.Now(), Services: []*model.Service{web}, Nodes: []*model.Node{{Name: "n1"}, {Name: "n2"}}}
}

// A load balancer and a kubelet ask the node through the life of a Service.
func TestInKubeProxysPlace(t *testing.T) {
	h := newHost(t)
	r := start(t, &pond{kernel: map[string]bool{}}, func(c *Config) { c.KubeProxy = h.kubeProxy() })
	until := func(url, want string) {
		t.Helper()
		var got string
		r.until(url+" says "+want, func() bool { got = h.get(url); return strings.HasPrefix(got, want) })
	}
	until("127.0.0.1:10256/healthz", "503 ")
	until("127.0.0.1:10256/livez", "200 ")
	until("127.0.0.1:30100/", "none")
	r.source.next <- local("n1", "n1", "n2")
	until("127.0.0.1:30100/healthz", `200 {"service":{"namespace":"shop","name":"web"},"localEndpoints":2,"serviceProxyHealthy":true}`)
	until("[::1]:10256/healthz", `200 {"lastUpdated":`)
	r.source.next <- local("n2")
	until("127.0.0.1:30100/", `503 {"service":{"namespace":"shop","name":"web"},"localEndpoints":0,`)
	text := h.get("127.0.0.1:10249/metrics")
	for _, want := range []string{
		`kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv4",traffic_policy="external"} 1`,
		`kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv6",traffic_policy="external"} 0`,
		`kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv4"} 2`,
		`kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv6"} 1.`,
		`kubeproxy_proxy_healthz_total{code="503"} `,
		`millrace_agent_ready 1`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in:\n%s", want, text)
		}
	}
	until("127.0.0.1:10249/proxyMode", "200 millrace")
	until("127.0.0.1:10249/healthz", "200 ok")
	s, err := r.status()
	if err != nil || s.KubeProxy == nil || len(s.KubeProxy.Notes) != 1 || len(s.KubeProxy.Ports) != 3 || s.KubeProxy.Ports[0].Error != "" || len(s.Problems) != 1 {
		t.Errorf("status %+v, problems %v, %v", s.KubeProxy, s.Problems, err)
	}
	leaving := local("n1", "n2")
	leaving.Nodes[0].Leaving = true
	r.source.next <- leaving
	until("127.0.0.1:10256/healthz", "503 ")
	until("127.0.0.1:10256/livez", "200 ")
	r.source.next <- local("n1", "n2")
	until("127.0.0.1:10256/healthz", "200 ")
	gone := cluster(true)
	gone.Nodes = []*model.Node{{Name: "n2"}}
	r.source.next <- gone
	until("127.0.0.1:30100/", "none")
	until("127.0.0.1:10256/healthz", "503 ")
	until("127.0.0.1:10256/livez", "200 ")
	r.stop()
	until("127.0.0.1:10256/livez", "none")
}

// A kube-proxy still runs: its ports are its own, which is said, and Services are
// served all the same. When it ends the ports are taken over.
func TestAKubeProxyThatStillRuns(t *testing.T) {
	h := newHost(t)
	old := h.listen("0.0.0.0:10256")
	r := start(t, &pond{kernel: map[string]bool{}}, func(c *Config) { c.KubeProxy = h.kubeProxy() })
	r.source.next <- local("n1")
	r.untilHolds("web")
	r.until("status names the port", func() bool {
		s, _ := r.status()
		return s.Ready && s.KubeProxy != nil && len(s.KubeProxy.Ports) == 3 && strings.Contains(s.KubeProxy.Ports[0].Error, "listen at 0.0.0.0:10256 for healthz: bind: address already in use")
	})
	old.Close()
	r.until("it answers there", func() bool { return strings.HasPrefix(h.get("127.0.0.1:10256/healthz"), "200 ") })

	hard := h.kubeProxy()
	hard.HardFail = true
	err := Run(t.Context(), Config{RunFolder: t.TempDir(), KubeProxy: hard, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err == nil || !strings.Contains(err.Error(), "listen at 0.0.0.0:10256 for healthz") {
		t.Errorf("bindAddressHardFail: %v", err)
	}
}

// An agent that took over what another left in the kernel may be sent traffic
// while no API server answers.
func TestHealthAfterARestart(t *testing.T) {
	h := newHost(t)
	r := start(t, &pond{kernel: map[string]bool{"web": true}}, func(c *Config) { c.KubeProxy = h.kubeProxy() })
	r.until("healthz says yes", func() bool { return strings.HasPrefix(h.get("127.0.0.1:10256/healthz"), "200 ") })
}

// Beside a kube-proxy its configuration can be read without its ports.
func TestConfigurationWithoutPorts(t *testing.T) {
	h := newHost(t)
	r := start(t, &pond{kernel: map[string]bool{}}, func(c *Config) { c.KubeProxy = h.kubeProxy(); c.KubeProxy.Ports = false })
	r.source.next <- local("n1")
	r.untilHolds("web")
	if s, err := r.status(); err != nil || s.KubeProxy == nil || len(s.KubeProxy.Notes) != 1 || len(s.KubeProxy.Ports) != 0 {
		t.Errorf("%+v, %v", s.KubeProxy, err)
	}
	if got := h.get("127.0.0.1:10256/healthz"); got != "none" {
		t.Errorf("it answers %s", got)
	}
}

// The metric of Services that lead nowhere from here, by what kube-proxy counts.
func TestWithoutLocalEndpoints(t *testing.T) {
	s := local("n2")
	inside := *s.Services[0]
	inside.ExternalLocal, inside.InternalLocal = false, true
	unserved := *s.Services[0]
	unserved.Ports = []model.ServicePort{{Port: 80}, {Port: 81}}
	s.Services = append(s.Services, &inside, &unserved)
	for node, want := range map[string]string{"n1": "1 1", "n2": "0 0", "n3": "1 1"} {
		internal, external := withoutLocal(s, node, false)
		if got := fmt.Sprint(internal, " ", external); got != want {
			t.Errorf("%s: %s, want %s (inside, outside)", node, got, want)
		}
	}
}
