package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// proxyConfig is the ConfigMap of a cluster that used IPVS.
const proxyConfig = `
apiVersion: v1
kind: ConfigMap
metadata: {name: kube-proxy, namespace: kube-system}
data:
  config.conf: |
    apiVersion: kubeproxy.config.k8s.io/v1alpha1
    kind: KubeProxyConfiguration
    mode: ipvs
    ipvs: {scheduler: lc, strictARP: true}
    metricsBindAddress: 127.0.0.1:10250
    hostnameOverride: n1
    syncPeriod: 30s
`

// balanced is a Service that load balancers ask each node about.
const balanced = `
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.2
  clusterIPs: [10.96.0.2]
  externalTrafficPolicy: Local
  healthCheckNodePort: 30100
  ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, protocol: TCP, port: 8080}]
endpoints: [{addresses: [10.244.0.1], nodeName: n1, conditions: {ready: true}}]
---
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.244.0.0/24]}
`

// standsIn runs the agent in kube-proxy's place and does not wait for it.
func (c *clustered) standsIn() {
	c.t.Helper()
	c.agent = product("agent", "--source", "kube:"+c.kubeconfig, "--api-server", c.address, "--kube-proxy-config", "configmap:kube-system/kube-proxy",
		"--cgroup", c.Cgroup, "--pins", c.pins, "--run", c.run, "--metrics", "")
	c.agent.Stderr = &c.log
	if err := netns.Do(c.NetNS, c.agent.Start); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(c.kill)
}

// get asks a port of the node.
func (c *clustered) get(address string) string {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, address string) (conn net.Conn, err error) {
			err = c.Inside(func() error { conn, err = net.Dial(network, address); return err })
			return conn, err
		}}}
	response, err := client.Get("http://" + address)
	if err != nil {
		return "none"
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	return fmt.Sprint(response.StatusCode, " ", string(body))
}

// A cluster whose kube-proxy is taken away: its configuration is read where it is,
// what has no effect is named, the ports answer, and an agent that starts while the
// API server is away goes by what it read last.
func TestAgentInKubeProxysPlace(t *testing.T) {
	c := newClustered(t)
	n, err := link.Open(c.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	c.must(n.UpLoopback())
	c.must(c.Apply(balanced + "---" + proxyConfig))
	var stderr string
	c.must(c.Inside(func() error {
		_, stderr, _ = millrace(t, "plan", "--source", "kube:"+c.kubeconfig, "--api-server", c.address, "--pins", c.pins, "--kube-proxy-config", "configmap:kube-system/kube-proxy")
		return nil
	}))
	for _, want := range []string{"kube-proxy's configuration: ipvs.scheduler: lc: later: ", "syncPeriod: a KubeProxyConfiguration has no such field"} {
		if !strings.Contains(stderr, want) {
			t.Errorf("plan: %q, want %s", stderr, want)
		}
	}
	c.standsIn()
	notes := func(s agent.Status) bool {
		return s.Node == "n1" && s.KubeProxy != nil && len(s.KubeProxy.Notes) == 2 && strings.HasPrefix(s.KubeProxy.Notes[1], "ipvs.strictARP: true: not needed: ")
	}
	c.until("the agent is ready and names what has no effect", func(s agent.Status) bool { return s.Ready && notes(s) && len(s.Problems) == 1 })
	c.until("the ports answer", func(agent.Status) bool {
		return strings.HasPrefix(c.get("127.0.0.1:30100"), `200 {"service":{"namespace":"shop","name":"web"},"localEndpoints":1,`) &&
			strings.HasPrefix(c.get("127.0.0.1:10256/healthz"), "200 ") && c.get("127.0.0.1:10250/proxyMode") == "200 millrace"
	})
	stdout, _, status := millrace(t, "status", "--run", c.run)
	for _, want := range []string{"in kube-proxy's place  by configmap:kube-system/kube-proxy", "answers at 0.0.0.0:30100  healthCheckNodePort of shop/web", "note: ipvs.scheduler: lc"} {
		if !strings.Contains(stdout, want) || status != exitFindings {
			t.Errorf("status, exit %d, lacks %s:\n%s", status, want, stdout)
		}
	}

	c.kill()
	c.down.Store(true)
	c.standsIn()
	c.until("it starts without an API server, by the copy", notes)
	if got := c.get("127.0.0.1:10256/healthz"); !strings.HasPrefix(got, "200 ") {
		t.Errorf("Services are in the kernel, and healthz says %s", got)
	}
	c.kill()
	var old net.Listener
	c.must(c.Inside(func() (err error) { old, err = net.Listen("tcp", "127.0.0.1:10250"); return err }))
	defer old.Close()
	c.must(c.Apply(strings.ReplaceAll(proxyConfig, "syncPeriod: 30s", ""))) // somebody corrected it
	c.down.Store(false)
	c.standsIn()
	c.until("it is ready beside somebody who has a port", func(s agent.Status) bool { return s.Ready && len(s.Problems) == 0 })
	if _, stderr, status := millrace(t, "status", "--run", c.run); status != exitFindings || !strings.Contains(stderr, "not answered: listen at 127.0.0.1:10250 for metrics") {
		t.Errorf("status of a port that is taken: exit %d, %q", status, stderr)
	}
	c.kill()
	c.must(c.Inside(func() error {
		if _, stderr, status := millrace(t, "remove", "--pins", c.pins, "--run", c.run); status != exitOK {
			t.Errorf("remove: exit status %d, %s", status, stderr)
		}
		return nil
	}))
	if left, _ := os.ReadDir(c.run); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// What is wrong with the flags is said before anything is changed.
func TestKubeProxyConfigCannotBeRead(t *testing.T) {
	folder := t.TempDir()
	write(t, filepath.Join(folder, "empty.conf"), "kind: ConfigMap")
	for want, row := range map[string]struct {
		source, config string
		status         int
	}{
		"read kube-proxy's configuration: open /absent: ":     {"dir:" + folder, "/absent", exitData},
		"there is no document of kind KubeProxyConfiguration": {"dir:" + folder, filepath.Join(folder, "empty.conf"), exitData},
		"goes with --source kube: only: name a file instead":  {"dir:" + folder, "configmap:kube-system/kube-proxy", exitUsage},
		"write configmap:NAMESPACE/NAME":                      {"kube:/absent", "configmap:kube-proxy", exitUsage},
		"read kubeconfig /absent: ":                           {"kube:/absent", "configmap:kube-system/kube-proxy", exitData},
	} {
		for _, command := range [][]string{{"plan"}, {"agent", "--run", filepath.Join(folder, "run")}, {"agent", "--dry-run"}} {
			_, stderr, status := millrace(t, slices.Concat(command, []string{"--source", row.source, "--kube-proxy-config", row.config})...)
			if status != row.status || !strings.Contains(stderr, want) {
				t.Errorf("%v: exit status %d, %q; want %d, %s", command, status, stderr, row.status, want)
			}
		}
	}
}
