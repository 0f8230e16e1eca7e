package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What docs/pod.md says, on the cluster of `make cluster-up CLUSTER='--proxy millrace --cni
// millrace'`, on which nobody else gives pods their network: MILLRACE_INSTALLED=1 go test -C
// test/cluster -run PodNetwork -v.

// talkers are pods, one on each node, that answer at port 8080.
const talkers = `
apiVersion: v1
kind: Namespace
metadata: {name: podnet}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: talker, namespace: podnet}
spec:
  selector: {matchLabels: {app: talker}}
  updateStrategy: {rollingUpdate: {maxUnavailable: "100%"}}
  template:
    metadata: {labels: {app: talker}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: talker, image: "AGNHOST", imagePullPolicy: Never, args: [netexec],
        readinessProbe: {httpGet: {port: 8080, path: /healthz}, periodSeconds: 1}}]
`

func needsPodNetwork(t *testing.T) {
	t.Helper()
	if os.Getenv("MILLRACE_INSTALLED") == "" {
		t.Skip("alters a cluster that is up: asked for by MILLRACE_INSTALLED=1")
	}
	who, err := os.ReadFile(filepath.Join(root, servedBy()))
	if err != nil || !strings.HasSuffix(strings.TrimSpace(string(who)), withPods) {
		t.Skip("needs a cluster with millrace's pod network: make cluster-up CLUSTER='--proxy millrace --cni millrace'")
	}
	kubectlOf(t, "get", "--raw", "/readyz")
	before := nodes
	nodes = nodesThere()
	t.Cleanup(func() { nodes = before })
}

// talker is a pod with its addresses and its node.
type talker struct {
	Metadata struct{ Name string }
	Spec     struct{ NodeName string }
	Status   struct{ PodIPs []struct{ IP string } }
}

// begin starts the talkers.
func begin(t *testing.T) []talker { return beginAs(t, talkers) }

// beginAs starts talkers of another manifest.
func beginAs(t *testing.T, manifest string) []talker {
	t.Helper()
	end := func() {
		_ = exec.Command(folder+"/kubectl", "delete", "namespace", "podnet", "--ignore-not-found").Run()
	}
	end()
	t.Cleanup(end)
	applyWithAgnhost(t, manifest)
	kubectlOf(t, "-n", "podnet", "rollout", "status", "daemonset/talker", "--timeout=1m")
	pods := talkersOf(t, "-n", "podnet")
	if len(pods) != nodes {
		t.Fatalf("%d pods on %d nodes", len(pods), nodes)
	}
	return pods
}

func talkersOf(t *testing.T, which ...string) []talker {
	t.Helper()
	var list struct{ Items []talker }
	decode(t, []byte(kubectlOf(t, append([]string{"get", "pods", "-o", "json"}, which...)...)), &list)
	return list.Items
}

// Pods of all nodes speak to each other by their addresses of both families, and so does
// each node; the receiver sees the pod's own address.
func TestPodNetworkCarries(t *testing.T) {
	needsPodNetwork(t)
	pods := begin(t)
	reachEachOther(t, pods)
	for _, n := range allNodes() {
		for _, to := range pods {
			for _, ip := range to.Status.PodIPs {
				on(t, n, "curl -s -m 5 http://"+hostPort(ip.IP, 8080)+"/hostname")
			}
		}
	}
}

// reachEachOther: each pod every other one, which sees its address.
func reachEachOther(t *testing.T, pods []talker) {
	t.Helper()
	for _, from := range pods {
		for _, to := range pods {
			if len(to.Status.PodIPs) != 2 {
				t.Fatalf("%s has addresses %v", to.Metadata.Name, to.Status.PodIPs)
			}
			for i, ip := range to.Status.PodIPs {
				url := "http://" + hostPort(ip.IP, 8080) + "/clientip"
				seen := kubectlOf(t, "-n", "podnet", "exec", from.Metadata.Name, "--", "curl", "-s", "-m", "5", url)
				if want := from.Status.PodIPs[i].IP; from.Metadata.Name != to.Metadata.Name && !strings.Contains(seen, want) {
					t.Errorf("from %s to %s of %s: it sees %q, not %s", from.Spec.NodeName, ip.IP, to.Spec.NodeName, seen, want)
				}
			}
		}
	}
}

func hostPort(ip string, port int) string {
	if strings.Contains(ip, ":") {
		ip = "[" + ip + "]"
	}
	return ip + ":" + strconv.Itoa(port)
}

// A hostPort leads to the node's own pod, which sees who asks, in both families: from the
// control plane, which is no node, from the node, also by 127.0.0.1, and from pods. No rule
// on the node is needed for it, and none is there.
func TestPodNetworkHostPorts(t *testing.T) {
	needsPodNetwork(t)
	const port = 8088
	pods := beginAs(t, strings.Replace(talkers, "args: [netexec],", fmt.Sprintf("args: [netexec], ports: [{containerPort: 8080, hostPort: %d}],", port), 1))
	for _, n := range allNodes() {
		own := pods[slices.IndexFunc(pods, func(one talker) bool { return one.Spec.NodeName == n.name() })]
		for i, ip := range []string{n.v4(), n.v6()} {
			seen, err := output(inside(control, "curl", "-g", "-s", "-m", "5", "http://"+hostPort(ip, port)+"/clientip"))
			if want := []string{controlV4, controlV6}[i]; err != nil || !strings.Contains(string(seen), want) {
				t.Errorf("from outside to %s of %s: it sees %q, not %s: %v", ip, n.name(), seen, want, err)
			}
			for _, from := range pods {
				got := kubectlOf(t, "-n", "podnet", "exec", from.Metadata.Name, "--", "curl", "-g", "-s", "-m", "5", "http://"+hostPort(ip, port)+"/hostname")
				if got != own.Metadata.Name {
					t.Errorf("from a pod of %s to %s of %s: %q answers, not %s", from.Spec.NodeName, ip, n.name(), got, own.Metadata.Name)
				}
			}
		}
		for _, ip := range []string{n.v4(), n.v6(), "127.0.0.1"} {
			if got := on(t, n, "curl -g -s -m 5 http://"+hostPort(ip, port)+"/hostname"); got != own.Metadata.Name {
				t.Errorf("on %s to %s: %q answers, not %s", n.name(), ip, got, own.Metadata.Name)
			}
		}
		if rules := on(t, n, "iptables-save 2>/dev/null; ip6tables-save 2>/dev/null"); strings.Contains(rules, "HOSTPORT") {
			t.Errorf("%s has %s", n.name(), rules)
		}
	}
}

// On each node the ways to all others are there, in both families, and status knows of
// nothing that is not done in full.
func TestPodNetworkIsShown(t *testing.T) {
	needsPodNetwork(t)
	who := read(t, filepath.Join(root, servedBy()))
	for _, n := range allNodes() {
		var shown struct {
			Routes []struct{ Node, Why string }
			None   []string
		}
		decode(t, []byte(on(t, n, "/opt/cni/bin/millrace show routes -o json")), &shown)
		if len(shown.Routes) != 2*(nodes-1) || len(shown.None) > 0 {
			t.Errorf("%s has %+v", n.name(), shown)
		}
		for _, r := range shown.Routes {
			if r.Node == n.name() || r.Why != "it is on the same segment" {
				t.Errorf("%s has a way to %s: %s", n.name(), r.Node, r.Why)
			}
		}
		said := on(t, n, "/opt/cni/bin/millrace status")
		if strings.HasPrefix(string(who), millrace) && strings.Contains(said, "degraded") { // beside kube-proxy there are no shortcuts
			t.Errorf("%s: %s", n.name(), said)
		}
	}
}

// addsToTime is how many pods' networks are timed, and mostOfAnAdd what 99 of 100 may take
// where 99 of 100 starts of a plugin that does nothing take less than quiet.
const (
	addsToTime  = 100
	mostOfAnAdd = 50 * time.Millisecond
	quiet       = 25 * time.Millisecond
)

// timeAdds starts plugins as containerd does, in the node, and prints the nanoseconds that
// each ADD took from the start of the process to its end: of loopback, and then of ours.
const timeAdds = `
export CNI_PATH=/opt/cni/bin
add() {
  before=$(date +%%s%%N)
  echo "{\"cniVersion\":\"1.0.0\",\"name\":\"timed\",\"type\":\"$1\"}" | CNI_COMMAND=$2 CNI_IFNAME=$3 /opt/cni/bin/$1 >/run/timed || { cat /run/timed; exit 1; }
  took=$(($(date +%%s%%N) - before))
}
for i in $(seq %d); do
  ip netns add timed
  export CNI_CONTAINERID=timed-$i CNI_NETNS=/run/netns/timed
  add loopback ADD lo
  echo $took
  add millrace ADD eth0
  echo $took
  add millrace DEL eth0
  ip netns del timed
done
`

// The plugin and the agent take less than 50 ms of a pod's start, 99 of 100 times: the whole
// process that containerd waits for. Where the machine is so busy with other things that
// loopback, which does nothing, takes its time, too, it is 50 of 100. The best of three tries
// counts.
func TestPodNetworkAddsInTime(t *testing.T) {
	needsPodNetwork(t)
	for try := 1; ; try++ {
		var took [2][]time.Duration
		for i, word := range strings.Fields(on(t, 1, fmt.Sprintf(timeAdds, addsToTime))) {
			ns, err := strconv.ParseInt(word, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			took[i%2] = append(took[i%2], time.Duration(ns))
		}
		for i, name := range []string{"loopback", "millrace"} {
			slices.Sort(took[i])
			t.Logf("%d ADDs of %s: p50 %v, p99 %v, longest %v", len(took[i]), name, percentile(took[i], 50), percentile(took[i], 99), percentile(took[i], 100))
		}
		of := 99
		if percentile(took[0], 99) > quiet {
			of = 50
		}
		switch {
		case percentile(took[1], of) < mostOfAnAdd:
			return
		case try == 3:
			t.Fatalf("%d of 100 ADDs take up to %v, not %v", of, percentile(took[1], of), mostOfAnAdd)
		}
	}
}

func percentile(sorted []time.Duration, of int) time.Duration {
	return sorted[max(1, len(sorted)*of/100)-1].Round(100 * time.Microsecond)
}

// While agents are killed pods go on and begin: an ADD waits for the next agent. Afterwards
// what the agents have written down is what runs, and nothing else.
func TestPodNetworkWithoutAgents(t *testing.T) {
	needsPodNetwork(t)
	pods := begin(t)
	for _, n := range allNodes() {
		on(t, n, "kill -9 $(pidof millrace)")
	}
	kubectlOf(t, "-n", "podnet", "exec", pods[0].Metadata.Name, "--", "curl", "-s", "-m", "5", "http://"+hostPort(pods[1].Status.PodIPs[0].IP, 8080)+"/hostname")
	kubectlOf(t, "-n", "podnet", "rollout", "restart", "daemonset/talker")
	kubectlOf(t, "-n", "podnet", "rollout", "status", "daemonset/talker", "--timeout=2m")
	kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m")
	for _, n := range allNodes() {
		err := until(t.Context(), "the book of "+n.name()+" to be what runs", time.Minute, func() error { return sameBook(t, n) })
		if err != nil {
			t.Error(err)
		}
	}
}

// sameBook says what differs between the pods of a node that the API server knows and those
// that the agent has given a network, and the devices.
func sameBook(t *testing.T, n node) error {
	t.Helper()
	var runs, given []string
	for _, pod := range talkersOf(t, "-A", "--field-selector", "spec.hostNetwork=false,spec.nodeName="+n.name()) {
		for _, ip := range pod.Status.PodIPs {
			runs = append(runs, ip.IP)
		}
	}
	var shown struct {
		Pods []struct {
			Addresses []string
			Device    string
		}
	}
	decode(t, []byte(on(t, n, "/opt/cni/bin/millrace show pods -o json")), &shown)
	for _, pod := range shown.Pods {
		given = append(given, pod.Addresses...)
	}
	slices.Sort(runs)
	slices.Sort(given)
	devices := strings.Count(on(t, n, "ip -o link show type veth"), ": mr")
	if !slices.Equal(runs, given) || devices != len(shown.Pods) {
		return fmt.Errorf("pods run at %v, addresses are given to %v, of %d pods with %d devices", runs, given, len(shown.Pods), devices)
	}
	return nil
}

// On a cluster whose pods have their network from ptp and host-local: they go over one by
// one, and all reach each other at each step, in both families. No address is given twice.
func TestInstalledPodNetworkTakesOver(t *testing.T) {
	needsInstalled(t)
	old := begin(t)
	kubectlOf(t, "apply", "-f", filepath.Join(root, millracePods))
	kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m")
	reachEachOther(t, talkersOf(t, "-n", "podnet"))
	if devices := on(t, 1, "ip -o link show type veth"); strings.Contains(devices, ": mr") {
		t.Fatalf("something was replaced by itself: %s", devices)
	}
	gone := old[slices.IndexFunc(old, func(one talker) bool { return one.Spec.NodeName == node(1).name() })]
	kubectlOf(t, "-n", "podnet", "delete", "pod", gone.Metadata.Name)
	kubectlOf(t, "-n", "podnet", "rollout", "status", "daemonset/talker", "--timeout=1m")
	if devices := on(t, 1, "ip -o link show type veth"); strings.Count(devices, ": mr") != 1 {
		t.Errorf("one pod was replaced, and the devices are %s", devices)
	}
	reachEachOther(t, talkersOf(t, "-n", "podnet"))
	for _, what := range []string{"-n podnet daemonset/talker", "-n kube-system deployment/coredns"} {
		words := strings.Fields(what)
		kubectlOf(t, "rollout", "restart", words[0], words[1], words[2])
		kubectlOf(t, "rollout", "status", words[0], words[1], words[2], "--timeout=2m")
	}
	reachEachOther(t, talkersOf(t, "-n", "podnet"))
	for _, n := range allNodes() {
		err := until(t.Context(), n.name()+" to have no pod of the other plug-in", time.Minute, func() error {
			if others := on(t, n, "ls /var/lib/cni/networks/pods | grep '[0-9]$' | grep -v last || true"); strings.TrimSpace(others) != "" {
				return fmt.Errorf("addresses of host-local are %s", others)
			}
			return sameBook(t, n)
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// What was installed is removed by its documented commands: of the network nothing is left
// but what running pods have, and of the runtime's folders what others put there.
func TestPodNetworkIsRemoved(t *testing.T) {
	needsPodNetwork(t)
	kubectlOf(t, "-n", "kube-system", "delete", "daemonset", "millrace")
	kubectlOf(t, "apply", "-f", filepath.Join(root, millraceRemoval))
	kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace-remove", "--timeout=1m")
	for _, n := range allNodes() {
		left := on(t, n, "ls -d /sys/fs/bpf/millrace /run/millrace/* 2>/dev/null; ls /opt/cni/bin /etc/cni/net.d | grep millrace; ip route show proto 110; ip -6 route show proto 110; ip -o link show type vxlan; true")
		if left = strings.TrimSpace(left); left != "" {
			t.Errorf("%s still has %s", n.name(), left)
		}
		if others := strings.Fields(on(t, n, "ls /opt/cni/bin")); !slices.Equal(others, []string{"loopback"}) {
			t.Errorf("%s has the plugins %v", n.name(), others)
		}
	}
}
