package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/netns"
)

// dnsService is a cluster's DNS Service with one endpoint.
const dnsService = `
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec: {clusterIP: 10.96.0.10, ports: [{name: dns, port: 53, protocol: UDP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns-1, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
addressType: IPv4
ports: [{name: dns, protocol: UDP, port: 53}]
endpoints: [{addresses: [10.244.0.53]}]
`

// asker asks from a network namespace.
type asker struct{ netns string }

// look asks the cluster's DNS Service for a name, by Go's resolver.
func (p *asker) look(name string) (string, error) {
	resolver := net.Resolver{PreferGo: true, Dial: func(_ context.Context, network, _ string) (c net.Conn, err error) {
		err = netns.Do(p.netns, func() error {
			c, err = net.Dial(network, "10.96.0.10:53")
			return err
		})
		return c, err
	}}
	addresses, err := resolver.LookupHost(context.Background(), name)
	slices.Sort(addresses)
	return strings.Join(addresses, " "), err
}

// serveDNS has a server at an address of the node that knows one answer.
func (n *node) serveDNS(at, answer string) *atomic.Int64 {
	n.t.Helper()
	n.AddAddress(at + "/32")
	var asked atomic.Int64
	var c net.PacketConn
	err := n.Inside(func() (err error) {
		c, err = net.ListenPacket("udp", at+":53")
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	go func() {
		query := make([]byte, 1500)
		for {
			size, from, err := c.ReadFrom(query)
			if err != nil {
				return
			}
			asked.Add(1)
			end := 12 + strings.IndexByte(string(query[12:size]), 0) + 5
			reply := append([]byte{query[0], query[1], 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0}, query[12:end]...)
			if query[end-3] == 1 { // A
				reply[7] = 1
				reply = append(append(reply, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4), netip.MustParseAddr(answer).AsSlice()...)
			}
			_, _ = c.WriteTo(reply, from)
		}
	}()
	return &asked
}

// The life of the layer dns: on, a new Service, the agent killed, off.
func TestNamesOfANode(t *testing.T) {
	n := newNode(t)
	asked := n.serveDNS("10.244.0.53", "192.0.2.53")
	write(t, filepath.Join(n.manifests, "dns.yaml"), dnsService)
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1"))
	p := &asker{n.pod("10.244.0.7")}
	p.contain(t, "search default.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n")
	looks := func(what, name, want string) {
		t.Helper()
		if got, err := p.look(name); got != want {
			t.Fatalf("%s: %s is %q, %v, not %q\n%s", what, name, got, err, want, n.log.String())
		}
	}
	n.start("--dns", "Cluster.Local.")
	n.until("the pod's device has the program", func(s agent.Status) bool {
		return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool { return len(devicesOf(l)["dns_from_pod"]) == 1 })
	})
	looks("from the kernel", "web.default.svc.cluster.local.", "10.96.0.1")
	if _, err := p.look("nosuch.default.svc.cluster.local."); err == nil || !strings.Contains(err.Error(), "no such host") {
		t.Errorf("a name that does not exist: %v", err)
	}
	if asked.Load() > 0 {
		t.Errorf("the server was asked %d times", asked.Load())
	}
	// The Service is served by packets for this, behind the program.
	looks("by the server", "example.com.", "192.0.2.53")

	begun := time.Now()
	write(t, filepath.Join(n.manifests, "new.yaml"), web("new", "10.96.0.2", "10.244.0.2"))
	for got := ""; got != "10.96.0.2"; got, _ = p.look("new.default.svc.cluster.local.") {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("a new Service is not there after %v:\n%s", time.Since(begun), n.log.String())
		}
	}
	t.Logf("a new Service is there %v after its manifest was written", time.Since(begun))
	n.showsNames()
	n.leavesToTheCorefile(p)
	n.showsSearchList("default.svc.cluster.local svc.cluster.local cluster.local")

	stdout, _, status := millrace(t, "plan", "--source", n.source(), "--pins", n.pins, "--dns", "cluster.local")
	if strings.Contains(stdout, "name ") || status != exitOK {
		t.Errorf("everything is in force, and plan has %q, exit status %d", stdout, status)
	}
	n.kill()
	for begun, got := time.Now(), ""; got != "192.0.2.53"; time.Sleep(10 * time.Millisecond) {
		var err error
		if got, err = p.look("web.default.svc.cluster.local."); err != nil {
			t.Fatalf("after the agent was killed: %v", err)
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("the agent was killed %v ago, and the answer is still %s", time.Since(begun), got)
		}
	}
	stdout, _, _ = millrace(t, "plan", "--source", n.source(), "--pins", n.pins)
	if !strings.Contains(stdout, fmt.Sprintf("- pin %s\n", filepath.Join(n.pins, "dns"))) {
		t.Errorf("the layer is to be off, and plan has %q", stdout)
	}
	n.start()
	looks("switched off", "web.default.svc.cluster.local.", "192.0.2.53")
	if _, err := os.Stat(filepath.Join(n.pins, "dns")); !os.IsNotExist(err) {
		t.Errorf("switched off, and the folder is there: %v", err)
	}
}

// leavesToTheCorefile: where CoreDNS is told to answer otherwise, it is the one to answer,
// and status says why.
func (n *node) leavesToTheCorefile(p *asker) {
	n.t.Helper()
	corefile := func(more, want string) {
		n.t.Helper()
		write(n.t, filepath.Join(n.manifests, "coredns.yaml"), fmt.Sprintf(
			"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: coredns, namespace: kube-system}\ndata:\n  Corefile: |\n    . {\n      kubernetes cluster.local\n      %s\n    }\n", more))
		for begun, got := time.Now(), ""; got != want; got, _ = p.look("web.default.svc.cluster.local.") {
			if time.Since(begun) > 20*time.Second {
				n.t.Fatalf("with %q in the Corefile the name is %q, not %q, after %v:\n%s", more, got, want, time.Since(begun), n.log.String())
			}
		}
	}
	corefile("hosts", "192.0.2.53")
	n.until("status says why", func(s agent.Status) bool {
		return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool {
			return slices.ContainsFunc(l.Degraded, func(why string) bool {
				return strings.Contains(why, "left to the cluster's DNS servers: Corefile:3: hosts")
			})
		})
	})
	write(n.t, filepath.Join(n.manifests, "coredns-deployment.yaml"), coreDNSDeployment)
	corefile("import custom/*.override", "10.96.0.1")
	write(n.t, filepath.Join(n.manifests, "coredns-custom.yaml"), coreDNSCustom)
	corefile("import custom/*.override", "192.0.2.53")
	if got, err := p.look("new.default.svc.cluster.local."); got != "10.96.0.2" {
		n.t.Errorf("a name that is not in the table of hosts is %q, %v", got, err)
	}
	if _, err := p.look("nosuch.default.svc.cluster.local."); err == nil {
		n.t.Error("a name that does not exist is there, because of a table of hosts")
	}
	corefile("cache", "10.96.0.1")
}

// coreDNSDeployment says which files CoreDNS has, and coreDNSCustom is one of them.
const (
	coreDNSDeployment = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: coredns, namespace: kube-system}
spec:
  selector: {matchLabels: {k8s-app: kube-dns}}
  template:
    metadata: {labels: {k8s-app: kube-dns}}
    spec:
      containers:
      - name: coredns
        image: coredns
        args: [-conf, /etc/coredns/Corefile]
        volumeMounts: [{name: config, mountPath: /etc/coredns}, {name: custom, mountPath: /etc/coredns/custom}]
      volumes: [{name: config, configMap: {name: coredns}}, {name: custom, configMap: {name: coredns-custom, optional: true}}]
`
	coreDNSCustom = `
apiVersion: v1
kind: ConfigMap
metadata: {name: coredns-custom, namespace: kube-system}
data:
  web.override: |
    hosts {
      192.0.2.53 web.default.svc.cluster.local
      fallthrough
    }
`
)

// contain has a process in the pod that sees this text as its resolv.conf, until the test ends.
func (p *asker) contain(t *testing.T, text string) {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, conf, text)
	c := exec.Command("unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec cat`, conf)
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := netns.Do(p.netns, c.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = c.Wait() })
}

// showsSearchList waits until the pod's list is shown.
func (n *node) showsSearchList(want string) {
	n.t.Helper()
	var stdout string
	for begun := time.Now(); time.Since(begun) < 30*time.Second; time.Sleep(10 * time.Millisecond) {
		stdout, _, _ = millrace(n.t, "show", "names", "--pins", n.pins, "--run", n.run)
		if at := strings.Index(stdout, "SEARCH LIST"); at > 0 && strings.HasSuffix(strings.TrimSpace(stdout[at:]), "5      "+want) {
			return
		}
	}
	n.t.Errorf("show names has no search list %s:\n%s", want, stdout)
}

func (n *node) showsNames() {
	n.t.Helper()
	stdout, _, _ := millrace(n.t, "show", "names", "--pins", n.pins, "--run", n.run)
	if words := strings.Fields(stdout); !slices.Contains(words, "web.default.svc.cluster.local") || !slices.Contains(words, "10.96.0.1") {
		n.t.Errorf("show names: %q", stdout)
	}
	stdout, _, _ = millrace(n.t, "show", "names", "KUBE", "--pins", n.pins, "--run", n.run, "-o", "json")
	var shown struct {
		Names []struct {
			Name      string
			Addresses []string
		}
	}
	if err := json.Unmarshal([]byte(stdout), &shown); err != nil || len(shown.Names) != 1 || shown.Names[0].Name != "kube-dns.kube-system.svc.cluster.local" ||
		!slices.Equal(shown.Names[0].Addresses, []string{"10.96.0.10"}) {
		n.t.Errorf("show names KUBE: %q, %v", stdout, err)
	}
}

// Where no DNS server is ready, what is known is answered, also when the agent is gone, and
// nobody waits for a server.
func TestNamesWithoutServers(t *testing.T) {
	n := newNode(t)
	service, _, _ := strings.Cut(dnsService, "---")
	write(t, filepath.Join(n.manifests, "dns.yaml"), service)
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1"))
	p := &asker{n.pod("10.244.0.7")}
	n.start("--dns", "cluster.local")
	n.until("status says that nobody else can answer", func(s agent.Status) bool {
		return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool {
			return len(devicesOf(l)["dns_from_pod"]) == 1 && slices.ContainsFunc(l.Degraded, func(why string) bool {
				return strings.Contains(why, "no endpoint of Service kube-system/kube-dns is ready")
			})
		})
	})
	looks := func(what string) {
		t.Helper()
		begun := time.Now()
		if got, err := p.look("web.default.svc.cluster.local."); got != "10.96.0.1" || time.Since(begun) > 4*time.Second {
			t.Errorf("%s: %q, %v, after %v", what, got, err, time.Since(begun))
		}
	}
	looks("the agent is there")
	_, stderr, _ := millrace(t, "show", "names", "--pins", n.pins, "--run", n.run)
	if !strings.Contains(stderr, "note: the cluster's DNS servers cannot answer") {
		t.Errorf("show names says %q", stderr)
	}
	n.kill()
	time.Sleep(3 * time.Second) // longer than it may be silent where others can answer
	looks("the agent is gone")
}

func TestZoneOfTheCommandLine(t *testing.T) {
	for _, command := range []string{"agent", "plan"} {
		_, stderr, status := millrace(t, command, "--source", "dir:"+t.TempDir(), "--dns", "a..b")
		if status != exitUsage || !strings.Contains(stderr, "is no zone") {
			t.Errorf("%s: exit status %d, %q", command, status, stderr)
		}
	}
}
