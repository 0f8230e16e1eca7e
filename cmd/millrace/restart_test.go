package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sync/errgroup"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/lab"
	"github.com/millrace/millrace/source/dir"
)

// restarting is the cluster: callers of both paths on each node, and what they
// call, over both families.
const restarting = `
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ipFamilyPolicy: PreferDualStack
  ports:
  - {name: http, port: 80, targetPort: 8080, protocol: TCP}
  - {name: dns, port: 53, targetPort: 5353, protocol: UDP}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 4
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: web, ports: [{containerPort: 8080}, {containerPort: 5353, protocol: UDP}]}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: by-socket}
spec:
  selector: {matchLabels: {app: by-socket}}
  template:
    metadata: {labels: {app: by-socket}}
    spec: {containers: [{name: caller}]}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: by-packet}
spec:
  selector: {matchLabels: {app: by-packet}}
  template:
    metadata: {labels: {app: by-packet}, annotations: {millrace.io/path: packet}}
    spec: {containers: [{name: caller}]}
`

const (
	restartNodes = 2
	// restartsOfNode are restarts of each node's agent, half of them kills, and
	// switchEvery restarts it is another binary: the next version, or ours again.
	restartsOfNode = 50
	switchEvery    = 5
	// callRate is operations a second of each kind in each caller.
	callRate     = 90
	callPatience = 30_000 // milliseconds: longer than a machine that others load stands still
	streams      = 8      // long-living connections of each kind in each caller
)

// Agents are stopped, killed, upgraded to a version whose maps have another
// layout, and downgraded, over and over; no connection, datagram or message on an
// open stream fails meanwhile.
func TestRestartsAndUpgradesFailNothing(t *testing.T) {
	needsRoot(t)
	least := 100_000
	if os.Getenv("MILLRACE_LONG") != "" {
		least = 1_000_000
	}
	r := &restarter{t: t, ours: os.Args[0], theirs: nextVersion(t), binary: map[string]*atomic.Pointer[string]{}}
	header := filepath.Join("..", "..", "layer/service/service.h")
	if _, err := fmt.Sscanf(versionIn(t, header, "TABLES"), "VERSION_TABLES = %d,", &r.version); err != nil {
		t.Fatal(err)
	}
	r.up()
	begun := time.Now()
	load := r.load(least)
	if err := r.restartAll(load); err != nil {
		t.Fatal(err)
	}
	<-load.ended
	load.report(t, least)
	t.Logf("%d restarts, %d of them by SIGKILL; %d upgrades and %d downgrades; %.0f s", r.restarts.Load(), r.kills.Load(),
		r.upgrades.Load(), r.downgrades.Load(), time.Since(begun).Seconds())
	if r.restarts.Load() < 100 || r.kills.Load()*2 < r.restarts.Load() || r.upgrades.Load() < 10 || r.downgrades.Load() < 10 {
		t.Error("these are fewer than were to be made")
	}
}

// restarter is a lab whose agents' program can be changed.
type restarter struct {
	// version is that of our tables.
	version                               uint32
	t                                     *testing.T
	ours, theirs                          string
	binary                                map[string]*atomic.Pointer[string] // by node
	client                                *lab.Client
	ctx                                   context.Context
	restarts, kills, upgrades, downgrades atomic.Int64
}

// up brings the lab up in this process, for as long as the test lasts.
func (r *restarter) up() {
	name := fmt.Sprintf("restarts-%d", os.Getpid())
	manifests := filepath.Join(r.t.TempDir(), "cluster.yaml")
	write(r.t, manifests, restarting)
	source, err := dir.Open(manifests)
	if err != nil {
		r.t.Fatal(err)
	}
	for i := range restartNodes {
		r.binary[fmt.Sprintf("node-%d", i+1)] = &atomic.Pointer[string]{}
		r.binary[fmt.Sprintf("node-%d", i+1)].Store(&r.ours)
	}
	ctx, cancel := context.WithCancel(context.Background())
	isUp, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- lab.Run(ctx, lab.Config{
			Name: name, Nodes: restartNodes, Watch: source.Run,
			Store: func(folder string) (lab.Store, error) { return dir.NewWriter(folder) },
			AgentCommand: func(n lab.NodeInfo) []string {
				return []string{*r.binary[n.Node].Load(), "agent", "--source", "dir:" + n.ClusterFolder, "--node", n.Node,
					"--cgroup", n.Cgroup, "--pins", n.BPFFolder, "--run", n.RunFolder, "--metrics", ""}
			},
			PodCommand: []string{r.ours, podWord},
			Up:         func() { close(isUp) },
		})
	}()
	r.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			r.t.Errorf("the lab ended with: %v", err)
		}
	})
	select {
	case <-isUp:
	case err := <-ended:
		ended <- err
		r.t.Fatalf("the lab did not come up: %v", err)
	}
	if r.client, err = lab.Dial(name); err != nil {
		r.t.Fatal(err)
	}
	r.ctx = ctx
}

// restartAll restarts the agents of all nodes side by side, each so many times
// and the next one when the last is ready. Then it tells the loads to end, and goes
// on until they are large enough.
func (r *restarter) restartAll(load *calls) error {
	var group errgroup.Group
	var busy atomic.Int64
	busy.Store(int64(len(r.binary)))
	for node := range r.binary {
		group.Go(func() error {
			for i := 0; i < restartsOfNode || !load.over(); i++ {
				if err := r.restart(node, i); err != nil {
					return fmt.Errorf("restart %d of the agent of %s: %w", i, node, err)
				}
				if i == restartsOfNode-1 && busy.Add(-1) == 0 {
					if err := r.endLoads(); err != nil {
						return err
					}
				}
			}
			return nil
		})
	}
	return group.Wait()
}

func (r *restarter) restart(node string, i int) error {
	before, err := r.client.Status(r.ctx)
	if err != nil {
		return err
	}
	if i%switchEvery == 0 {
		r.change(node)
	}
	if i%2 == 0 {
		r.kills.Add(1)
		err = r.client.KillAgent(r.ctx, node)
	} else {
		err = r.client.StopAgent(r.ctx, node)
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.ctx, time.Minute)
	defer cancel()
	after, err := r.client.Await(ctx, func(s *lab.Status) bool {
		now := s.Node(node).Agent
		return now.Ready && now.Restarts > before.Node(node).Agent.Restarts
	})
	if err != nil {
		return err
	}
	r.restarts.Add(1)
	return r.check(after.Node(node))
}

// change lets a node's next agent be of the other version.
func (r *restarter) change(node string) {
	if *r.binary[node].Load() == r.ours {
		r.upgrades.Add(1)
		r.binary[node].Store(&r.theirs)
	} else {
		r.downgrades.Add(1)
		r.binary[node].Store(&r.ours)
	}
}

// check looks whether the version that runs is the one in force, and lacks
// nothing.
func (r *restarter) check(node *lab.NodeStatus) error {
	var status agent.Status
	if err := agent.Ask(r.ctx, filepath.Clean(node.RunFolder), "/status", &status); err != nil {
		return err
	}
	for _, l := range status.Layers {
		for _, text := range l.Degraded {
			if !strings.Contains(text, "Linux") { // what this kernel lacks
				return fmt.Errorf("degraded: %s", text)
			}
		}
	}
	versions, err := ebpf.LoadPinnedMap(filepath.Join(node.BPFFolder, "service", "schema"), nil)
	if err != nil {
		return err
	}
	defer versions.Close()
	var version uint32
	if err := versions.Lookup(uint32(0), &version); err != nil {
		return err
	}
	want := r.version
	if *r.binary[node.Node].Load() == r.theirs {
		want = theirVersion
	}
	if version != want {
		return fmt.Errorf("version %d is in force, not %d", version, want)
	}
	return nil
}

// calls are the loads of all callers and what came of them, by kind and path.
type calls struct {
	ended  chan struct{} // when all have
	mu     sync.Mutex
	byKind map[string]*lab.LoadResult
	failed error
}

// load lets every caller call in every way, until endLoads, and until there are
// so many operations.
func (r *restarter) load(least int) *calls {
	status, err := r.client.Status(r.ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	c := &calls{ended: make(chan struct{}), byKind: map[string]*lab.LoadResult{}}
	callers, kinds := callersOf(status), kindsOf(status)
	var group errgroup.Group
	for _, pod := range callers {
		for kind, request := range kinds {
			request.Least = least/len(callers)/len(kinds) + 1
			group.Go(func() error {
				result, err := r.client.Load(r.ctx, pod.String(), request)
				if err == nil {
					c.add(kind+" "+strings.TrimPrefix(pod.Workload, "DaemonSet default/"), result)
				}
				return err
			})
		}
	}
	go func() {
		c.failed = group.Wait()
		close(c.ended)
	}()
	return c
}

func callersOf(status *lab.Status) []lab.PodStatus {
	return slices.DeleteFunc(slices.Clone(status.Pods), func(p lab.PodStatus) bool { return !strings.Contains(p.Workload, "DaemonSet") })
}

// kindsOf are the ways to call the Service, over both families.
func kindsOf(status *lab.Status) map[string]lab.LoadRequest {
	var stream, datagram []string
	for _, ip := range status.Service("web").ClusterIPs {
		stream = append(stream, netip.AddrPortFrom(ip, 80).String())
		datagram = append(datagram, netip.AddrPortFrom(ip, 53).String())
	}
	return map[string]lab.LoadRequest{
		"connections":                          {Proto: lab.ProtoTCP, Targets: stream, Rate: callRate, Timeout: callPatience},
		"datagrams":                            {Proto: lab.ProtoSend, Targets: datagram, Rate: callRate, Timeout: callPatience},
		"connected datagrams":                  {Proto: lab.ProtoUDP, Targets: datagram, Rate: callRate, Timeout: callPatience},
		"messages on open streams":             {Proto: lab.ProtoTCP, Targets: stream, Rate: callRate, Timeout: callPatience, Keep: streams, Stay: true},
		"messages on open connected datagrams": {Proto: lab.ProtoUDP, Targets: datagram, Rate: callRate, Timeout: callPatience, Keep: streams, Stay: true},
		"messages on open sockets":             {Proto: lab.ProtoSend, Targets: datagram, Rate: callRate, Timeout: callPatience, Keep: streams, Stay: true},
	}
}

func (c *calls) add(kind string, result *lab.LoadResult) {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.byKind[kind]
	if all == nil {
		c.byKind[kind] = result
		return
	}
	all.Operations += result.Operations
	all.Failed += result.Failed
	all.Reconnects += result.Reconnects
	all.Max = max(all.Max, result.Max)
	all.Examples = append(all.Examples, result.Examples...)
}

func (r *restarter) endLoads() error {
	status, err := r.client.Status(r.ctx)
	if err != nil {
		return err
	}
	for _, pod := range callersOf(status) {
		err = errors.Join(err, r.client.EndLoads(r.ctx, pod.String()))
	}
	return err
}

func (c *calls) over() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// report prints what the callers met and fails the test for anything that failed.
func (c *calls) report(t *testing.T, least int) {
	t.Helper()
	if c.failed != nil {
		t.Fatal(c.failed)
	}
	operations, failed := 0, 0
	for _, kind := range slices.Sorted(maps.Keys(c.byKind)) {
		all := c.byKind[kind]
		operations, failed = operations+all.Operations, failed+all.Failed
		t.Logf("%-48s %7d, %d failed, the longest took %.1f ms", kind, all.Operations, all.Failed, float64(all.Max)/1000)
		if all.Failed > 0 || all.Reconnects > 0 {
			t.Errorf("%s: %d failed, %d opened anew: %+v", kind, all.Failed, all.Reconnects, all.Examples)
		}
	}
	t.Logf("%d operations, %d failed", operations, failed)
	if operations < least || len(c.byKind) != 12 {
		t.Errorf("%d operations of %d kinds, want %d of 12", operations, len(c.byKind), least)
	}
}

// theirVersion is that of each group of maps in the next version.
const theirVersion = 1000

// nextVersion builds the program of a version whose maps have other layouts:
// fields have come into the middle of what tables, sockets and flows hold.
func nextVersion(t *testing.T) string {
	t.Helper()
	for _, tool := range []string{"clang-14", "llvm-strip-14"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s to build another version: run test/needs check", tool)
		}
	}
	tree := filepath.Join(t.TempDir(), "next")
	copyTree(t, filepath.Join("..", ".."), tree)
	for _, change := range []struct{ file, after string }{
		{"layer/service/translation.h", "struct translation {\n\tstruct tuple to;"},
		{"layer/service/connect.bpf.c", "struct flow {\n\tstruct address service;"},
		{"layer/service/service.h", "struct service {\n\t__u32 id;\n\t__u32 slots;"},
		{"layer/service/service.h", "struct backend {\n\tstruct address address;"},
	} {
		replace(t, filepath.Join(tree, change.file), change.after, change.after+"\n\t__u32 new_one, new_two;\n\t")
	}
	for _, group := range []string{"TABLES", "SOCKETS", "FLOWS"} {
		header := filepath.Join(tree, "layer/service/service.h")
		replace(t, header, versionIn(t, header, group), fmt.Sprintf("VERSION_%s = %d,", group, theirVersion))
	}
	binary := filepath.Join(t.TempDir(), "millrace")
	for _, args := range [][]string{{"generate", "./layer/service"}, {"build", "-o", binary, "./cmd/millrace"}} {
		command := exec.Command("go", args...)
		command.Dir = tree
		if out, err := command.CombinedOutput(); err != nil {
			t.Fatalf("go %s of the next version: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	return binary
}

// copyTree copies the sources, without what was built or fetched.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if entry.IsDir() {
			if slices.Contains([]string{".git", ".cache", "bin", "dist"}, name) {
				return filepath.SkipDir
			}
			return os.MkdirAll(filepath.Join(to, name), 0o755)
		}
		if !entry.Type().IsRegular() {
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, name), content, 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// versionIn is where a header says which version a group has.
func versionIn(t *testing.T, path, group string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(regexp.MustCompile("VERSION_" + group + ` = \d+,`).Find(content))
}

func replace(t *testing.T, path, old, new string) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Count(content, []byte(old)) != 1 {
		t.Fatalf("%s does not have %q once", path, old)
	}
	if err := os.WriteFile(path, bytes.ReplaceAll(content, []byte(old), []byte(new)), 0o644); err != nil {
		t.Fatal(err)
	}
}
