package kube

import (
	"context"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/kube/kubetest"
)

// bed is an API server and a Source that asks it.
type bed struct {
	*kubetest.Server
	t      *testing.T
	url    string
	source *Source

	mu        sync.Mutex
	delivered []*model.Snapshot
	at        []time.Time // when each was
	ended     chan error
	stop      context.CancelFunc
	// pause is how long taking a Snapshot lasts.
	pause time.Duration
}

// newBed makes both; the Source does not run yet.
func newBed(t *testing.T) *bed {
	b := &bed{Server: kubetest.New(), t: t}
	b.url = serve(t, b.Server)
	b.source = b.open(b.url)
	return b
}

// serve makes a server reachable until the test ends.
func serve(t *testing.T, s *kubetest.Server) string {
	t.Helper()
	web := httptest.NewServer(s)
	t.Cleanup(func() {
		web.CloseClientConnections()
		web.Close()
	})
	return web.URL
}

func (b *bed) open(servers ...string) *Source { return b.openFor("n1", servers...) }

func (b *bed) openFor(node string, servers ...string) *Source {
	b.t.Helper()
	s, err := Open(Settings{Kubeconfig: kubeconfig(b.t, "http://192.0.2.1"), Servers: servers, Node: node})
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

func kubeconfig(t *testing.T, server string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q}}]
users: [{name: u, user: {token: secret}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, server)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// run starts a Run of the Source; end waits for its end.
func (b *bed) run() {
	ctx, stop := context.WithCancel(context.Background())
	b.stop, b.ended = stop, make(chan error, 1)
	go func() {
		b.ended <- b.source.Run(ctx, func(s *model.Snapshot) {
			time.Sleep(b.pause)
			b.mu.Lock()
			defer b.mu.Unlock()
			b.delivered, b.at = append(b.delivered, s), append(b.at, time.Now())
		})
	}()
	b.t.Cleanup(stop)
}

func (b *bed) end() error {
	b.t.Helper()
	b.stop()
	return b.over()
}

// over waits until Run ends by itself.
func (b *bed) over() error {
	b.t.Helper()
	select {
	case err := <-b.ended:
		return err
	case <-time.After(20 * time.Second):
		b.t.Fatal("twenty seconds, and Run has not ended")
		return nil
	}
}

func (b *bed) snapshots() []*model.Snapshot {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.delivered
}

// until waits for a Snapshot of which holds is true, and gives it.
func (b *bed) until(what string, holds func(*model.Snapshot) bool) *model.Snapshot {
	b.t.Helper()
	last := new(model.Snapshot)
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if all := b.snapshots(); len(all) > 0 {
			if last = all[len(all)-1]; holds(last) {
				return last
			}
		}
	}
	b.t.Fatalf("waited twenty seconds until %s: %s, problems %v", what, describe(last), last.Problems)
	return nil
}

// shows waits until the Services and their endpoints are these, in the form of
// describe.
func (b *bed) shows(want string) *model.Snapshot {
	b.t.Helper()
	return b.until("it shows "+want, func(s *model.Snapshot) bool { return describe(s) == want })
}

// describe is what a Snapshot says of Services other than the API's own:
// "web 10.244.0.1, mail".
func describe(s *model.Snapshot) string {
	if s == nil {
		return "no Snapshot"
	}
	var all []string
	for _, svc := range s.Services {
		if svc.Name.Name == "kubernetes" {
			continue
		}
		text := svc.Name.Name
		for _, p := range svc.Ports {
			for _, e := range p.Backends {
				text += " " + e.Address.Addr().String()
			}
		}
		all = append(all, text)
	}
	return strings.Join(all, ", ")
}

// apply puts manifests.
func (b *bed) apply(text string) {
	b.t.Helper()
	if err := b.Apply(text); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) remove(text string) {
	b.t.Helper()
	if err := b.Remove(text); err != nil {
		b.t.Fatal(err)
	}
}

// service and slice are manifests.
func service(name, ip string) string {
	return fmt.Sprintf(`
---
apiVersion: v1
kind: Service
metadata: {name: %s}
spec: {clusterIP: %q, clusterIPs: [%[2]q], ports: [{name: http, protocol: TCP, port: 80, targetPort: 8080}]}
`, name, ip)
}

func slice(service string, pods ...string) string {
	var endpoints []string
	for _, pod := range pods {
		endpoints = append(endpoints, fmt.Sprintf(`{"addresses":[%q],"conditions":{"ready":true}}`, pod))
	}
	return fmt.Sprintf(`
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: %[1]s-1, labels: {kubernetes.io/service-name: %[1]s}}
addressType: IPv4
ports: [{name: http, protocol: TCP, port: 8080}]
endpoints: [%[2]s]
`, service, strings.Join(endpoints, ","))
}

const nodes = `
---
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.11}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
spec: {podCIDR: 10.244.2.0/24, podCIDRs: [10.244.2.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.12}]}
`

func pod(name, node, ip string) string {
	return fmt.Sprintf(`
---
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec: {nodeName: %s, containers: [{name: c}]}
status: {phase: Running, podIP: %[3]s, podIPs: [{ip: %[3]s}]}
`, name, node, ip)
}

// Who asks for no node gets the pods of all.
func TestRunDeliversThePodsOfAllNodes(t *testing.T) {
	b := newBed(t)
	b.source = b.openFor("", b.url)
	b.apply(nodes + service("web", "10.96.0.2") + slice("web", "10.244.1.1") + pod("here", "n1", "10.244.1.1") + pod("there", "n2", "10.244.2.1"))
	b.run()
	if first := b.shows("web 10.244.1.1"); len(first.Pods) != 2 {
		t.Errorf("pods %v, want those of both nodes", first.Pods)
	}
	if err := b.end(); err != nil {
		t.Errorf("Run ended with %v", err)
	}
}

// The first Snapshot holds all there is and is complete; each change makes another.
func TestRunDeliversTheClusterAndItsChanges(t *testing.T) {
	b := newBed(t)
	b.apply(nodes + service("web", "10.96.0.2") + slice("web", "10.244.1.1", "10.244.2.1") +
		pod("here", "n1", "10.244.1.1") + pod("there", "n2", "10.244.2.1"))
	b.run()
	first := b.shows("web 10.244.1.1 10.244.2.1")
	if all := b.snapshots(); first != all[0] || !first.Complete || first.Unread != 0 || len(first.Problems) > 0 {
		t.Errorf("%d Snapshots until then; complete %v, unread %d, problems %v", len(all), first.Complete, first.Unread, first.Problems)
	}
	if len(first.Nodes) != 2 || len(first.Pods) != 1 || first.Pods[0].Name.Name != "here" {
		t.Errorf("nodes %v, pods %v: want two Nodes and the pod of this one", first.Nodes, first.Pods)
	}
	before := time.Now()
	b.apply(slice("web", "10.244.1.1"))
	after := b.shows("web 10.244.1.1")
	if after.Seen.Before(before) || after.Seen.After(time.Now()) || after.Number <= first.Number {
		t.Errorf("seen %v, changed %v; number %d after %d", after.Seen, before, after.Number, first.Number)
	}
	b.apply(service("mail", "10.96.0.3"))
	b.shows("mail, web 10.244.1.1")
	b.remove(service("web", "10.96.0.2"))
	b.shows("mail")
	if err := b.end(); err != nil {
		t.Errorf("Run ended with %v", err)
	}
}
