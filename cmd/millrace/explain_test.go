package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/layer/service"
)

// shopping is a Service with endpoints on two nodes, and one without endpoints.
const shopping = `
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.244.1.0/24, "fd00:244:1::/64"]}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
spec: {podCIDRs: [10.244.2.0/24]}
---
apiVersion: v1
kind: Pod
metadata: {name: client-1, namespace: shop}
spec: {nodeName: n1, containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.244.1.4}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop}
spec: {nodeName: n1, containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.244.1.5}, {ip: "fd00:244:1::5"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-2, namespace: shop}
spec: {nodeName: n2, containers: [{name: c, image: x}]}
status: {podIPs: [{ip: 10.244.2.9}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {millrace.io/path: packet}}
spec: {clusterIPs: [10.96.0.10, "fd00:96::10"], ipFamilyPolicy: PreferDualStack, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.11, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, protocol: TCP, port: 8080}]
endpoints: [{addresses: ["10.244.1.5"], nodeName: n1}, {addresses: ["10.244.2.9"], nodeName: n2}]
`

// explained asks, and reads the answer for machines.
func explained(t *testing.T, args ...string) (e service.Explanation) {
	t.Helper()
	stdout, stderr, status := millrace(t, append([]string{"explain", "-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(stdout), &e); err != nil || status != exitOK {
		t.Fatalf("explain %v: exit status %d, %v, %s%s", args, status, err, stdout, stderr)
	}
	return e
}

// With an agent, without one over what it left pinned, and from its manifests the
// answers are the same.
func TestExplainWithAnAgentAndWithout(t *testing.T) {
	n := newNode(t)
	write(t, filepath.Join(n.manifests, "shop.yaml"), shopping)
	n.start()
	live := []string{"--pins", n.pins, "--run", n.run}
	source := []string{"--source", n.source(), "--node", "n1"}
	questions := [][]string{
		{"tcp", "shop/client-1", "shop/web:http"}, {"tcp", "shop/web-1", "shop/web:80"}, {"tcp", "10.244.1.5:99", "10.96.0.10:80"},
		{"tcp", "[fd00:244:1::5]:99", "[fd00:96::10]:80"}, {"tcp", "shop/client-1", "shop/cart:80"}, {"udp", "10.244.1.4", "10.96.0.10:80"},
		{"tcp", "192.0.2.1", "10.96.0.10:80"}, {"tcp", "127.0.0.1", "shop/cart:80"}, {"tcp", "shop/web-2", "shop/web:80"}, {"tcp", "198.51.100.1", "10.96.0.10:80"},
	}
	var first []service.Explanation
	for _, q := range questions {
		e := explained(t, slices.Concat(q, source)...)
		if got := explained(t, slices.Concat(q, live)...); !reflect.DeepEqual(got, e) {
			t.Errorf("%v:\n     from the agent %+v,\n     from its manifests %+v", q, got, e)
		}
		first = append(first, e)
	}
	e := first[1]
	if e.Verdict != "forward" || e.Path != "from_pod" || e.Service != "shop/web" || len(e.Backends) != 2 || e.Backends[0].Probability != 0.5 ||
		!e.Backends[0].Masquerade || e.Backends[1].Masquerade || e.Backends[1].Node != "n2" || !e.Masquerade || e.Reason != "forwarded" {
		t.Errorf("a pod that asks for its own Service: %+v", e)
	}
	n.kill()
	stdout, stderr, status := millrace(t, slices.Concat([]string{"explain", "tcp", "10.244.1.4", "10.96.0.10:80"}, live)...)
	if !strings.Contains(stdout, "a Service whose name is not known") || !strings.Contains(stderr, "no names") || status != exitOK {
		t.Errorf("without the agent: exit status %d, %s%s", status, stdout, stderr)
	}
}

// The table for people names all that matters.
func TestExplanationForPeople(t *testing.T) {
	needsRoot(t)
	file := filepath.Join(t.TempDir(), "shop.yaml")
	write(t, file, shopping)
	stdout, _, status := millrace(t, "explain", "tcp", "shop/web-1", "shop/web:80", "--source", "dir:"+file, "--node", "n1")
	for _, want := range []string{
		"tcp 10.244.1.5 -> 10.96.0.10:80: forward, path from_pod\n", "shop/web", "pod shop/web-1 of this node",
		"BACKEND          PROBABILITY  NODE  SOURCE BECOMES\n", "10.244.1.5:8080  50.00 %      n1    10.96.0.10\n", "10.244.2.9:8080  50.00 %      n2    -\n",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("no %q in\n%s", want, stdout)
		}
	}
	if status != exitOK {
		t.Errorf("exit status %d", status)
	}
}

// What cannot be answered is named, with what to do.
func TestExplainNamesWhatIsWrong(t *testing.T) {
	needsRoot(t)
	file := filepath.Join(t.TempDir(), "shop.yaml")
	write(t, file, shopping)
	for _, row := range []struct {
		args   string
		status int
		says   string
	}{
		{"tcp 10.244.1.4", exitUsage, "say PROTO SRC[:PORT] DST:PORT"},
		{"icmp 10.244.1.4 10.96.0.10:80", exitUsage, `unknown protocol "icmp"`},
		{"tcp 10.244.1.4 10.96.0.10", exitUsage, "the port is missing: write ADDRESS:PORT"},
		{"tcp 10.244.1.4 fd00:96::10", exitUsage, "or [ADDRESS]:PORT for IPv6"},
		{"tcp 10.244.1.4:70000 10.96.0.10:80", exitUsage, `"70000" is not a port`},
		{"tcp fd00:244:1::4 10.96.0.10:80", exitUsage, "one is IPv4, the other IPv6"},
		{"tcp shop/client-1 [fd00:96::10]:80", exitUsage, "name two of one family"},
		{"tcp shop/nobody shop/web:80", exitUsage, "neither an address nor a pod that is known"},
		{"tcp shop/client-1 shop/nothing:80", exitUsage, "neither an address nor a Service that is known"},
		{"udp shop/client-1 shop/web:80", exitUsage, "no port 80/udp of Service shop/web"},
		{"tcp 10.244.1.4 10.96.0.10:80 --path both", exitUsage, `unknown path "both"`},
		{"tcp 10.244.1.4 10.96.0.10:80 --node n3", exitUsage, "the manifests have no such Node: name one of n1, n2"},
	} {
		args := append([]string{"explain"}, strings.Fields(row.args)...)
		args = append(args, "--source", "dir:"+file)
		if !slices.Contains(args, "--node") {
			args = append(args, "--node", "n1")
		}
		stdout, stderr, status := millrace(t, args...)
		if status != row.status || !strings.Contains(stderr, row.says) || stdout != "" {
			t.Errorf("%s: exit status %d, says %s%s; should be %d and say %q", row.args, status, stdout, stderr, row.status, row.says)
		}
	}
	absent := t.TempDir()
	if _, stderr, status := millrace(t, "explain", "tcp", "10.244.1.4", "10.96.0.10:80", "--pins", absent, "--run", absent); status != exitFailed ||
		!strings.Contains(stderr, "no agent has run here") || !strings.Contains(stderr, "--source dir:PATH") {
		t.Errorf("without an agent: exit status %d, %s", status, stderr)
	}
	_, stderr, status := finish(t, weak(product("explain", "tcp", "10.244.1.4", "10.96.0.10:80", "--source", "dir:"+file, "--node", "n1")))
	if status != exitPrivilege || !strings.Contains(stderr, "CAP_BPF, CAP_NET_ADMIN") {
		t.Errorf("without privileges: exit status %d, %s", status, stderr)
	}
}

// A manifest that cannot be used is told, and the rest is answered.
func TestExplainTellsProblems(t *testing.T) {
	needsRoot(t)
	file := filepath.Join(t.TempDir(), "shop.yaml")
	write(t, file, fmt.Sprintf("%s---\n%s", shopping, "kind: Service\napiVersion: v1\nmetadata: {name: bad, namespace: shop}\nspec: {ports: [{port: eighty}]}\n"))
	stdout, stderr, status := millrace(t, "explain", "tcp", "shop/client-1", "shop/cart:80", "--source", "dir:"+file, "--node", "n1")
	if status != exitData || !strings.Contains(stdout, "refuse, path socket") || !strings.Contains(stderr, "shop.yaml:") {
		t.Errorf("exit status %d, %s%s", status, stdout, stderr)
	}
}
