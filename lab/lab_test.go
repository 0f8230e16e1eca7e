package lab

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/model"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a lab makes network namespaces, which needs root")
	}
}

// patience is how long a test waits for what should happen soon.
func patience(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// memory is a store that remembers.
type memory struct {
	mu       sync.Mutex
	services map[model.Name]*model.Service
	pods     map[model.Name]*model.Pod
	nodes    map[string]*model.Node
	fail     error // what every write answers
}

func newMemory() *memory {
	return &memory{services: map[model.Name]*model.Service{}, pods: map[model.Name]*model.Pod{}, nodes: map[string]*model.Node{}}
}

func (m *memory) do(f func()) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail == nil {
		f()
	}
	return m.fail
}

func (m *memory) PutService(s *model.Service) error { return m.do(func() { m.services[s.Name] = s }) }
func (m *memory) DeleteService(n model.Name) error  { return m.do(func() { delete(m.services, n) }) }
func (m *memory) PutPod(p *model.Pod) error         { return m.do(func() { m.pods[p.Name] = p }) }
func (m *memory) DeletePod(n model.Name) error      { return m.do(func() { delete(m.pods, n) }) }
func (m *memory) PutNode(n *model.Node) error       { return m.do(func() { m.nodes[n.Name] = n }) }
func (m *memory) DeleteNode(n string) error         { return m.do(func() { delete(m.nodes, n) }) }

// live is a lab inside the test process.
type live struct {
	*Client
	t       *testing.T
	ctx     context.Context
	deliver func(*model.Snapshot)
	store   *memory
	done    chan error
}

// up brings a lab up and takes it down after the test.
func up(t *testing.T, name string, s *model.Snapshot, more ...func(*Config)) *live {
	needRoot(t)
	name = unique(name)
	before := picture(t)
	l := &live{t: t, ctx: patience(t), store: newMemory(), done: make(chan error, 1)}
	watching, isUp := make(chan struct{}), make(chan struct{})
	cfg := testConfig(name, "", func(ctx context.Context, deliver func(*model.Snapshot)) error {
		l.deliver = deliver
		close(watching)
		return watchOnce(s)(ctx, deliver)
	})
	cfg.Store = func(string) (Store, error) { return l.store, nil }
	cfg.Up = func() { close(isUp) }
	for _, change := range more {
		change(&cfg)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { l.done <- Run(ctx, cfg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-l.done; err != nil {
			t.Errorf("the lab ended with: %v", err)
		}
		before.compare(t)
	})
	select {
	case <-isUp:
	case err := <-l.done:
		l.done <- err
		t.Fatalf("the lab did not come up: %v", err)
	case <-l.ctx.Done():
		t.Fatal("the lab did not come up in time")
	}
	<-watching
	client, err := Dial(name)
	if err != nil {
		t.Fatal(err)
	}
	l.Client = client
	return l
}

// await waits for a condition of the status.
func (l *live) await(what string, condition func(*Status) bool) *Status {
	l.t.Helper()
	s, err := l.Await(l.ctx, condition)
	if err != nil {
		l.t.Fatalf("wait until %s: %v", what, err)
	}
	return s
}

// pods lists the pods of a Deployment in the namespace default.
func (s *Status) podsOf(deployment string) []PodStatus {
	return slices.DeleteFunc(slices.Clone(s.Pods), func(p PodStatus) bool {
		return p.Workload != "Deployment default/"+deployment
	})
}

// ready lists the addresses that a Service's port leads to now.
func (s *Status) ready(service, port string) []string {
	var addrs []string
	for _, p := range s.Service(service).Ports {
		for _, e := range p.Endpoints {
			if e.Ready && p.Name == port {
				addrs = append(addrs, e.Address.String())
			}
		}
	}
	return addrs
}

func TestEveryPodReachesEveryPod(t *testing.T) {
	s := shop(3)
	s.Workloads = append(s.Workloads, &model.Workload{
		Name: model.Name{Namespace: "kube-system", Name: "probe"}, Kind: "DaemonSet", PerNode: true,
		Template: model.Pod{Labels: map[string]string{"app": "probe"}, Ports: webPorts},
	})
	s.Pods = append(s.Pods, &model.Pod{Name: model.Name{Namespace: "default", Name: "host"}, HostNetwork: true,
		Ports: []model.ContainerPort{{Protocol: model.TCP, Port: 8080}, {Protocol: model.UDP, Port: 8080}}})
	l := up(t, "reach", s)
	status := l.await("all is ready", func(s *Status) bool { return len(s.Pods) == 7 && s.Up })
	for _, from := range status.Pods {
		for _, to := range status.Pods {
			for _, addr := range to.Addresses {
				if len(to.Ports) > 0 {
					l.reaches(from, to, net.JoinHostPort(addr.String(), "8080"))
				}
			}
		}
	}
	if len(status.Problems) > 0 {
		t.Errorf("problems of a healthy lab: %v", status.Problems)
	}
}

// reaches checks one pair over each protocol.
func (l *live) reaches(from, to PodStatus, target string) {
	l.t.Helper()
	for _, proto := range []string{ProtoTCP, ProtoUDP, ProtoSend, ProtoHTTP, ProtoGRPC} {
		answers, err := l.Call(l.ctx, from.String(), CallRequest{Proto: proto, Target: target})
		if err != nil {
			l.t.Fatal(err)
		}
		if a := answers[0]; a.Error != "" || a.Pod != to.String() || a.Peer != target {
			l.t.Errorf("%s asks %s at %s over %s: got %+v", from, to, target, proto, a)
		}
	}
}

// unique is a lab's name that no other process uses, because a lab's name is
// known to the whole host.
func unique(name string) string { return fmt.Sprintf("%s-%d", name, os.Getpid()) }

// hostPicture is what this process's labs can leave on the host.
type hostPicture map[string][]string

// picture lists mounts, groups, folders and the host's links.
func picture(t *testing.T) hostPicture {
	t.Helper()
	p := hostPicture{}
	mounts, err := mountsBelow("")
	if err != nil {
		t.Fatal(err)
	}
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	root, err := newPaths("x", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		p["links"] = append(p["links"], l.Name)
	}
	groups, _ := os.ReadDir(filepath.Dir(root.cgroup))
	folders, _ := os.ReadDir(Base)
	p["mounts"] = ofThisTest(mounts)
	p["groups"] = ofThisTest(entryNames(groups))
	p["folders"] = ofThisTest(entryNames(folders))
	return p
}

func entryNames(entries []os.DirEntry) []string {
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// ofThisTest keeps what bears the mark of unique: others run labs, too.
func ofThisTest(things []string) []string {
	return slices.DeleteFunc(things, func(s string) bool { return !strings.Contains(s, unique("")) })
}

// compare fails the test for everything that is there now and was not before.
func (p hostPicture) compare(t *testing.T) {
	t.Helper()
	now := picture(t)
	for _, kind := range slices.Sorted(maps.Keys(now)) {
		for _, thing := range now[kind] {
			if !slices.Contains(p[kind], thing) {
				t.Errorf("left behind among %s: %s", kind, thing)
			}
		}
	}
}
