package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What docs/migrate.md says, on a cluster with kube-proxy, under load: `make moving`.

const (
	loadImage = "cluster.test/load:1"
	nodePort  = "30900"
	localPort = "30901" // of the Service with externalTrafficPolicy Local
	movings   = 10
	rest      = 3 * time.Second // how long each state is looked at
)

const loadManifest = `
apiVersion: v1
kind: Namespace
metadata: {name: moving}
---
apiVersion: v1
kind: Service
metadata: {name: cluster, namespace: moving}
spec:
  type: NodePort
  clusterIP: 10.96.90.1
  clusterIPs: [10.96.90.1, "fd00:10:96::9001"]
  ipFamilyPolicy: RequireDualStack
  selector: {app: server}
  ports: [{name: tcp, port: 9000, nodePort: 30900}, {name: udp, port: 9000, nodePort: 30900, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: local, namespace: moving}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  externalTrafficPolicy: Local
  selector: {app: server}
  ports: [{name: tcp, port: 9000, nodePort: 30901}, {name: udp, port: 9000, nodePort: 30901, protocol: UDP}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: server, namespace: moving}
spec:
  selector: {matchLabels: {app: server}}
  template:
    metadata: {labels: {app: server}}
    spec: {terminationGracePeriodSeconds: 0, containers: [{name: server, image: "cluster.test/load:1", imagePullPolicy: Never, args: [serve], resources: {requests: {cpu: 250m}}}]}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: client, namespace: moving}
spec:
  selector: {matchLabels: {app: client}}
  template:
    metadata: {labels: {app: client}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: client, image: "cluster.test/load:1", imagePullPolicy: Never, args: [call, --on, "10.96.90.1:9000", "[fd00:10:96::9001]:9000"], resources: {requests: {cpu: 250m}}}]
`

var movingAt = []string{"10.96.90.1:9000", "[fd00:10:96::9001]:9000"}

// moving is a cluster with kube-proxy whose Services are asked all the time.
type moving struct {
	t    *testing.T
	mode string
	// phases are what was done since when.
	phases []phase
	ends   []func() // of the callers that are no pods
	said   []*bytes.Buffer
}

type phase struct {
	name  string
	since time.Time
}

// phase says what is being done from now on.
func (m *moving) phase(name string) { m.phases = append(m.phases, phase{name, time.Now()}) }

// There and back again, ten times: no operation fails.
func TestMovingOverAndBack(t *testing.T) {
	m := needsMoving(t)
	m.open()
	for i := range movings {
		m.phase("kube-proxy alone")
		time.Sleep(rest)
		m.phase("millrace is installed")
		m.installed()
		m.phase("beside")
		time.Sleep(rest)
		m.phase("kube-proxy is removed")
		m.stopKubeProxy()
		m.removeRules()
		m.phase("millrace alone")
		time.Sleep(rest)
		m.phase("kube-proxy is back")
		m.startKubeProxy()
		m.phase("millrace is removed")
		m.removed()
		t.Logf("%v: there and back %d times", time.Since(m.phases[0].since).Round(time.Second), i+1)
	}
	m.phase("kube-proxy alone")
	time.Sleep(rest)
	m.judge()
}

func needsMoving(t *testing.T) *moving {
	t.Helper()
	if os.Getenv("MILLRACE_MOVING") == "" {
		t.Skip("alters a cluster that is up: asked for by MILLRACE_MOVING=1 (make moving)")
	}
	who, err := os.ReadFile(filepath.Join(root, servedBy()))
	served, mode, _ := strings.Cut(strings.TrimSpace(string(who)), " ")
	if err != nil || served != "kube-proxy" {
		t.Skip("needs a cluster with kube-proxy: make cluster-up")
	}
	kubectlOf(t, "get", "--raw", "/readyz")
	before := nodes
	nodes = nodesThere()
	t.Cleanup(func() { nodes = before })
	return &moving{t: t, mode: mode}
}

// open puts the images on the nodes, and starts servers and callers.
func (m *moving) open() {
	t := m.t
	t.Helper()
	m.clear()
	t.Cleanup(m.clear)
	program := filepath.Join(t.TempDir(), "load")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", program, "./load")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // there is no libc in the image
	if _, err := output(build); err != nil {
		t.Fatal(err)
	}
	files := files{{"load", 0o755, fromFile(program)}}
	if err := (image{[]string{loadImage}, []string{"/load"}, nil, files}).write(filepath.Dir(program)); err != nil {
		t.Fatal(err)
	}
	millrace, err := filepath.Abs(filepath.Join(root, millraceImage))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range allNodes() {
		on(t, n, "for image in "+program+".tar "+millrace+"; do ctr -n k8s.io images import $image; done")
	}
	m.apply(loadManifest)
	kubectlOf(t, "-n", "moving", "rollout", "status", "daemonset/server", "--timeout=1m")
	kubectlOf(t, "-n", "moving", "rollout", "status", "daemonset/client", "--timeout=1m")
	var entrances []string
	for _, n := range allNodes() {
		m.start(func(word string) *exec.Cmd {
			return exec.Command(folder+"/node", append([]string{strconv.Itoa(int(n)), program, word}, movingAt...)...)
		})
		for _, port := range []string{nodePort, localPort} {
			entrances = append(entrances, n.v4()+":"+port, "["+n.v6()+"]:"+port)
		}
	}
	m.start(func(word string) *exec.Cmd { return inside(control, program, append([]string{word}, entrances...)...) })
	kubectlOf(t, "-n", "kube-system", "create", "configmap", "millrace", "--from-literal=api-server="+server)
}

// clear removes all of it, and lets kube-proxy run.
func (m *moving) clear() {
	for _, n := range allNodes() {
		on(m.t, n, "rm -f /run/kube-proxy.off")
	}
	kubectlOf(m.t, "delete", "namespace", "moving", "--ignore-not-found")
	kubectlOf(m.t, "delete", "-f", filepath.Join(root, millraceRemoval), "-f", filepath.Join(root, millraceManifest), "--ignore-not-found")
	kubectlOf(m.t, "-n", "kube-system", "delete", "configmap", "millrace", "--ignore-not-found")
}

func (m *moving) apply(manifest string) {
	m.t.Helper()
	apply := exec.Command(folder+"/kubectl", "apply", "-f", "-")
	apply.Stdin = strings.NewReader(manifest)
	if _, err := output(apply); err != nil {
		m.t.Fatal(err)
	}
}

// start a caller, once all that it asks answers; it ends when its standard input does.
func (m *moving) start(load func(word string) *exec.Cmd) {
	m.t.Helper()
	err := until(m.t.Context(), "all entrances to answer", time.Minute, func() error {
		_, err := output(load("once"))
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	command := load("call")
	said := &bytes.Buffer{}
	command.Stdout, command.Stderr = said, os.Stderr
	in, err := command.StdinPipe()
	if err == nil {
		err = command.Start()
	}
	if err != nil {
		m.t.Fatal(err)
	}
	end := func() {
		in.Close()
		_ = command.Wait() // it is judged by what it said
	}
	m.t.Cleanup(func() { in.Close() })
	m.ends, m.said = append(m.ends, end), append(m.said, said)
}

func (m *moving) installed() {
	m.t.Helper()
	kubectlOf(m.t, "apply", "-f", filepath.Join(root, millraceManifest))
	kubectlOf(m.t, "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m")
}

func (m *moving) stopKubeProxy() {
	m.t.Helper()
	for _, n := range allNodes() {
		on(m.t, n, "touch /run/kube-proxy.off; kill $(pidof kube-proxy); while pidof kube-proxy >/dev/null; do sleep 0.1; done")
	}
}

func (m *moving) removeRules() {
	m.t.Helper()
	for _, pod := range strings.Fields(kubectlOf(m.t, "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=millrace", "-o", "name")) {
		kubectlOf(m.t, "-n", "kube-system", "exec", pod, "--", "/millrace", "kube-proxy", "remove")
	}
	for _, n := range allNodes() {
		if m.hasRules(n) {
			m.t.Errorf("%s still has rules of kube-proxy", n.name())
		}
	}
}

// hasRules says whether kube-proxy's rules for our Services are there, of both
// families.
func (m *moving) hasRules(n node) bool {
	m.t.Helper()
	list := "nft list table ip kube-proxy; nft list table ip6 kube-proxy"
	if m.mode == "iptables" {
		list = "iptables-nft-save -t nat; ip6tables-nft-save -t nat"
	}
	found := on(m.t, n, "("+list+") 2>/dev/null | grep -o "+localPort+" | wc -l")
	// at least one for each of TCP and UDP in each family
	count, err := strconv.Atoi(strings.TrimSpace(found))
	return err == nil && count >= 4
}

func (m *moving) startKubeProxy() {
	m.t.Helper()
	for _, n := range allNodes() {
		on(m.t, n, "rm /run/kube-proxy.off")
	}
	for _, n := range allNodes() {
		err := until(m.t.Context(), "the rules of kube-proxy on "+n.name(), time.Minute, func() error {
			if !m.hasRules(n) {
				return fmt.Errorf("they are not there")
			}
			return nil
		})
		if err != nil {
			m.t.Fatal(err)
		}
	}
}

// removed removes millrace as docs/migrate.md says.
func (m *moving) removed() {
	m.t.Helper()
	removal := filepath.Join(root, millraceRemoval)
	kubectlOf(m.t, "-n", "kube-system", "delete", "daemonset", "millrace")
	kubectlOf(m.t, "apply", "-f", removal)
	kubectlOf(m.t, "-n", "kube-system", "rollout", "status", "daemonset/millrace-remove", "--timeout=2m")
	for _, n := range allNodes() {
		left := on(m.t, n, "ls -d /sys/fs/bpf/millrace /run/millrace/* 2>/dev/null; nft list tables | grep millrace; true")
		if left = strings.TrimSpace(left); left != "" {
			m.t.Errorf("%s still has %s", n.name(), left)
		}
	}
	kubectlOf(m.t, "delete", "-f", removal, "--wait")
}

// judge ends the callers and counts what they said since the first phase.
func (m *moving) judge() {
	t := m.t
	t.Helper()
	said := map[string]string{}
	for _, pod := range strings.Fields(kubectlOf(t, "-n", "moving", "get", "pods", "-l", "app=client", "-o", "name")) {
		said["pods"] += kubectlOf(t, "-n", "moving", "logs", pod)
	}
	for i, end := range m.ends {
		end()
		who := "nodes"
		if i == len(m.ends)-1 {
			who = "outside"
		}
		said[who] += m.said[i].String()
	}
	byPhase, byKind := counts{}, counts{}
	for who, text := range said {
		for line := range strings.Lines(text) {
			m.count(who, strings.TrimSpace(line), byPhase, byKind)
		}
	}
	var order []string
	for _, p := range m.phases {
		if !slices.Contains(order, p.name) {
			order = append(order, p.name)
		}
	}
	t.Logf("%s, %d nodes, %d times there and back\n%s\n%s", m.mode, nodes, movings,
		byPhase.table(order), byKind.table(slices.Sorted(maps.Keys(byKind))))
}

// counts are operations, and those of them that failed, by some name.
type counts map[string]*[2]int

func (c counts) add(name string, operations, failed int) {
	if c[name] == nil {
		c[name] = &[2]int{}
	}
	c[name][0] += operations
	c[name][1] += failed
}

func (c counts) table(order []string) string {
	text := fmt.Sprintf("%-26s %10s %7s\n", "", "operations", "failed")
	for _, name := range order {
		if n := c[name]; n != nil {
			text += fmt.Sprintf("%-26s %10d %7d\n", name, n[0], n[1])
		}
	}
	return text
}

// count counts a line of load.
func (m *moving) count(who, line string, byPhase, byKind counts) {
	rest, failed := strings.CutPrefix(line, "! ")
	words := strings.SplitN(rest, " ", 3)
	moment, err := strconv.ParseInt(words[0], 10, 64)
	if err != nil || len(words) < 3 {
		m.t.Errorf("%s said %q", who, line)
		return
	}
	phase := m.phaseAt(time.UnixMilli(moment))
	if phase == "" {
		return
	}
	if failed {
		m.t.Errorf("%.1f s, %s, %s: %s %s", time.UnixMilli(moment).Sub(m.phases[0].since).Seconds(), phase, who, words[1], words[2])
		byPhase.add(phase, 0, 1)
		byKind.add(who+" "+words[1], 0, 1)
		return
	}
	operations, err := strconv.Atoi(words[2])
	if err != nil {
		m.t.Errorf("%s said %q", who, line)
	}
	byPhase.add(phase, operations, 0)
	byKind.add(who+" "+words[1], operations, 0)
}

// phaseAt is what was being done at a moment; empty before the first.
func (m *moving) phaseAt(moment time.Time) (name string) {
	for _, p := range m.phases {
		if !moment.Before(p.since) {
			name = p.name
		}
	}
	return name
}
