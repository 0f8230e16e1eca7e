package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// The network of a turn. Endpoints are all addresses of their range, which one
// namespace has as its own.
//
//	control 10.89.0.1 -- 10.89.0.11 node 10.244.0.1 -- 10.244.0.2 client
//	                                     10.245.0.1 -- 10.245.0.2 pods 10.128.0.0/10
const nodeAddress = "10.89.0.11"

func scaleNetwork() error {
	for _, name := range []string{scaleNode, scaleClient, scalePods} {
		if err := addNamespace(name); err != nil {
			return err
		}
	}
	return errors.Join(
		// The kernel removes that of the last turn when it finds the time.
		unlink(scaleControl, "node"),
		ipBatch(scaleNode, []string{
			"link add eth0 type veth peer name node netns " + scaleControl,
			"addr add " + nodeAddress + "/24 dev eth0", "link set eth0 up",
			"link add client type veth peer name eth0 netns " + scaleClient,
			"addr add 10.244.0.1/24 dev client", "link set client up",
			"link add pods type veth peer name eth0 netns " + scalePods,
			"addr add 10.245.0.1/24 dev pods", "link set pods up",
			"route add " + endpointRange + " via 10.245.0.2",
		}),
		ipBatch(scaleControl, []string{"addr add " + controlV4 + "/24 dev node", "link set node up"}),
		ipBatch(scaleClient, []string{"addr add 10.244.0.2/24 dev eth0", "link set eth0 up", "route add default via 10.244.0.1"}),
		ipBatch(scalePods, []string{"addr add 10.245.0.2/24 dev eth0", "link set eth0 up", "route add default via 10.245.0.1",
			"route add local " + endpointRange + " dev lo"}),
	)
}

// unlink removes a link; that it is not there, or goes at this moment, is no error.
func unlink(namespace, name string) error {
	err := ipBatch(namespace, []string{"link del " + name})
	if _, gone := output(exec.Command("ip", "-n", namespace, "link", "show", name)); gone != nil {
		return nil
	}
	return err
}

// scaleCgroups makes those of a turn.
func scaleCgroups() error {
	node, memory, err := scaleGroups()
	if err != nil {
		return err
	}
	if memory != "" {
		err = os.Mkdir(memory, 0o755)
	}
	err = errors.Join(err, os.Mkdir(node, 0o755))
	if memory == "" {
		// Where that is refused, nobody knows how much memory of the kernel is used.
		_ = os.WriteFile(node+"/cgroup.subtree_control", []byte("+memory"), 0)
	}
	return errors.Join(err, os.Mkdir(node+"/proxy", 0o755), os.Mkdir(node+"/pods", 0o755))
}

// in is a command in a namespace and in cgroups.
func in(namespace string, groups []string, program string, arguments ...string) *exec.Cmd {
	const script = `for g in $1; do echo $$ >$g/cgroup.procs || exit; done; shift; exec "$@"`
	full := append([]string{"-c", script, "sh", strings.Join(groups, " "), "nsenter", "--net=/run/netns/" + namespace, "--", program}, arguments...)
	return exec.Command("sh", full...)
}

// inProxy is a command in the place of a node's proxy.
func inProxy(program string, arguments ...string) (*exec.Cmd, error) {
	node, memory, err := scaleGroups()
	return in(scaleNode, []string{node + "/proxy", memory}, program, arguments...), err
}

// proxies are those that can be measured, and how they are started.
var proxies = []struct {
	name  string
	start func(bin, millrace string) (*exec.Cmd, error)
}{
	{"millrace", startMillrace},
	{"nftables", func(bin, _ string) (*exec.Cmd, error) { return startKubeProxy(bin, "nftables", "") }},
	{"iptables-legacy", func(bin, _ string) (*exec.Cmd, error) { return startKubeProxy(bin, "iptables", "legacy") }},
	{"iptables-nft", func(bin, _ string) (*exec.Cmd, error) { return startKubeProxy(bin, "iptables", "nft") }},
}

func proxyNames() (names []string) {
	for _, p := range proxies {
		names = append(names, p.name)
	}
	return names
}

func startMillrace(_, millrace string) (*exec.Cmd, error) {
	node, _, err := scaleGroups()
	if err != nil {
		return nil, err
	}
	pins := scaleFolder + "/bpf"
	if err := mountAll([]mount{{"bpf", pins, "bpf", 0, ""}}); err != nil {
		return nil, err
	}
	return inProxy(millrace, "agent", "--source", "kube:"+scaleFolder+"/kubeconfig", "--node", "node-1",
		"--cgroup", node, "--pins", pins+"/millrace", "--run", scaleFolder+"/run/agent")
}

// startKubeProxy starts one with the configuration of kubeadm, in which periods are
// 0: kube-proxy's defaults. How many connections may be tracked is said by the host
// alone, and is left as it is.
func startKubeProxy(bin, mode, variant string) (*exec.Cmd, error) {
	configuration := fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: %s
hostnameOverride: node-1
clusterCIDR: 10.128.0.0/9
clientConnection: {kubeconfig: %s/kubeconfig}
iptables: {minSyncPeriod: 0s, syncPeriod: 0s}
nftables: {minSyncPeriod: 0s, syncPeriod: 0s}
conntrack: {maxPerCore: 0, min: 0}
oomScoreAdj: 0
`, mode, scaleFolder)
	file := scaleFolder + "/kube-proxy.yaml"
	if err := write(file, configuration, 0o644); err != nil {
		return nil, err
	}
	command, err := inProxy(filepath.Join(bin, "kube-proxy"), "--config="+file)
	if err == nil && variant != "" {
		path, err := otherIPTables(variant)
		if err != nil {
			return nil, err
		}
		command.Env = append(os.Environ(), "PATH="+path+":"+os.Getenv("PATH"))
	}
	return command, err
}

// otherIPTables is a folder where iptables is iptables-legacy or iptables-nft.
func otherIPTables(variant string) (string, error) {
	folder := filepath.Join(scaleFolder, "run", variant)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return "", err
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, suffix := range []string{"", "-save", "-restore"} {
			program, err := exec.LookPath(family + "-" + variant + suffix)
			if err == nil {
				err = os.Symlink(program, filepath.Join(folder, family+suffix))
			}
			if err != nil {
				return "", err
			}
		}
	}
	return folder, nil
}

// running is a proxy that was started.
type running struct {
	command *exec.Cmd
	name    string
	began   time.Time
	// ended is closed when it has ended.
	ended chan struct{}
	// peak is the most memory that it and the programs it runs had at once.
	peak atomic.Uint64
}

func startProxy(name, bin, millrace string) (*running, error) {
	i := slices.Index(proxyNames(), name)
	command, err := proxies[i].start(bin, millrace)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &running{name: name, began: time.Now(), ended: make(chan struct{})}
	if p.command, err = launch(command, name); err != nil {
		return nil, err
	}
	go func() {
		_ = p.command.Wait() // what it said is in its log
		close(p.ended)
	}()
	go p.watch()
	return p, nil
}

// watch keeps the peak.
func (p *running) watch() {
	node, _, _ := scaleGroups() // known to be there
	for {
		select {
		case <-p.ended:
			return
		case <-time.After(20 * time.Millisecond):
		}
		content, _ := os.ReadFile(node + "/proxy/cgroup.procs")
		var sum uint64
		for _, pid := range strings.Fields(string(content)) {
			var size, resident uint64
			text, _ := os.ReadFile("/proc/" + pid + "/statm") // it may have ended
			_, _ = fmt.Sscan(string(text), &size, &resident)
			sum += resident * uint64(os.Getpagesize())
		}
		p.peak.Store(max(p.peak.Load(), sum))
	}
}

func (p *running) stop() error {
	_ = p.command.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		return nil
	case <-time.After(20 * time.Second):
		_ = p.command.Process.Kill()
		return fmt.Errorf("%s did not end in 20 s", p.name)
	}
}

// used is what a proxy used up to now: seconds of processor time, also of the
// programs it ran, and bytes of memory.
type used struct{ cpu, resident, pss, anonymous, kernel float64 }

func (p *running) used() (u used, err error) {
	select {
	case <-p.ended:
		return u, fmt.Errorf("%s has ended: %s", p.name, endOfLog(p.name))
	default:
	}
	proc := fmt.Sprintf("/proc/%d/", p.command.Process.Pid)
	stat, err := os.ReadFile(proc + "stat")
	if err != nil {
		return u, err
	}
	// utime, stime, cutime and cstime of proc(5), in hundredths of a second.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	for _, field := range fields[11:15] {
		ticks, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return u, fmt.Errorf("read %sstat: %w", proc, err)
		}
		u.cpu += ticks / 100
	}
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		return u, err
	}
	memory, err := os.ReadFile(proc + "smaps_rollup")
	u.resident, u.anonymous, u.pss = 1024*number(status, "VmRSS:"), 1024*number(status, "RssAnon:"), 1024*number(memory, "Pss:")
	u.kernel = kernelMemory()
	return u, err
}

// kernelMemory is what the kernel keeps for the proxy: maps or rules, sockets,
// stacks, page tables. It is 0 where nobody knows.
func kernelMemory() float64 {
	node, memory, _ := scaleGroups() // known to be there
	if memory != "" {
		text, _ := os.ReadFile(memory + "/memory.kmem.usage_in_bytes")
		bytes, _ := strconv.ParseFloat(strings.TrimSpace(string(text)), 64)
		return bytes
	}
	text, _ := os.ReadFile(node + "/proxy/memory.stat")
	return number(text, "kernel ")
}

// number is the one that follows a name at the beginning of a line, 0 if there is none.
func number(text []byte, name string) float64 {
	for line := range strings.Lines(string(text)) {
		if rest, found := strings.CutPrefix(line, name); found && len(strings.Fields(rest)) > 0 {
			n, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return n
		}
	}
	return 0
}

// rest waits until the proxy has used no processor time to speak of for a second.
func (p *running) rest(ctx context.Context) error {
	last := -1.0
	for range 60 {
		u, err := p.used()
		if err != nil || u.cpu-last < 0.02 {
			return err
		}
		last = u.cpu
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
	return fmt.Errorf("%s does not come to rest in a minute", p.name)
}
