package main

import (
	"encoding/json"
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

const (
	ownNodeManifest = "deploy/own-node.yaml"
	flannelLabel    = "node.millrace.io/flannel"
	flannelMark     = "flannel.alpha.coreos.com/"
)

// A cluster goes over from flannel as docs/migrate.md says, node by node, with flannel's own
// flanneld: at each step pods of all nodes reach each other, also those that flannel gave
// their network, on nodes of either kind. Then it is rid of what flannel left.
func TestGoingOverFromFlannel(t *testing.T) {
	if os.Getenv("MILLRACE_LONG") == "" {
		t.Skip("builds flannel and makes a cluster: set MILLRACE_LONG=1 to run it")
	}
	raise(t, "--proxy", millrace, "--cni", flannel)
	pods := begin(t)
	reachEachOther(t, pods)
	for _, n := range allNodes() {
		on(t, n, "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.cni0.proxy_arp=1")
	}
	kubectlOf(t, "apply", "-f", filepath.Join(root, ownNodeManifest), "-f", filepath.Join(root, millracePods))
	kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m")
	awaitRoutes(t, node(1), 0, "are left to flannel")
	reachEachOther(t, pods)
	bothKinds(t, podOn(pods, node(1)))

	for i, n := range allNodes() {
		if i == 1 { // a node with pods of both kinds, beside one that has gone over
			kubectlOf(t, "-n", "podnet", "delete", "pod", podOn(pods, n).Metadata.Name)
			kubectlOf(t, "-n", "podnet", "rollout", "status", "daemonset/talker", "--timeout=1m")
			pods = talkersOf(t, "-n", "podnet")
		}
		longest := longestSilence(t, pods, n, func() {
			on(t, n, "touch /run/flanneld.off; kill $(pidof flanneld); while pidof flanneld; do sleep 0.1; done")
			kubectlOf(t, "label", "node", n.name(), flannelLabel+"=gone")
			awaitRoutes(t, n, 2*(nodes-1), "")
		})
		t.Logf("%s goes over: the longest time without an answer from its pod is %v", n.name(), longest)
		marked(t, n)
		reachEachOther(t, pods)
	}
	bulk(t, pods[0], pods[1])
	for _, n := range allNodes() {
		awaitDirect(t, n)
	}
	reachEachOther(t, pods)
	kubectlOf(t, "-n", "podnet", "rollout", "restart", "daemonset/talker")
	kubectlOf(t, "-n", "podnet", "rollout", "status", "daemonset/talker", "--timeout=2m")
	pods = talkersOf(t, "-n", "podnet")
	reachEachOther(t, pods)

	takeOff := []string{"annotate", "nodes", "--all"}
	for _, name := range []string{"kube-subnet-manager", "backend-type", "backend-data", "backend-v6-data", "public-ip", "public-ipv6"} {
		takeOff = append(takeOff, flannelMark+name+"-")
	}
	kubectlOf(t, takeOff...)
	kubectlOf(t, "label", "nodes", "--all", flannelLabel+"-")
	for _, n := range allNodes() {
		awaitDirect(t, n)
		if said := on(t, n, "/opt/cni/bin/millrace status"); strings.Contains(said, "flannel") {
			t.Errorf("%s still speaks of flannel: %s", n.name(), said)
		}
	}
	reachEachOther(t, pods)
	if said := annotations(t, node(1)); len(said) > 0 {
		t.Errorf("somebody wrote %v again", said)
	}
}

// One node goes over, and the others stay with flannel: bulk goes both ways, to and from
// pods of both kinds.
func TestFlannelBesideMillrace(t *testing.T) {
	if os.Getenv("MILLRACE_LONG") == "" {
		t.Skip("builds flannel and makes a cluster: set MILLRACE_LONG=1 to run it")
	}
	raise(t, "--proxy", millrace, "--cni", flannel)
	kubectlOf(t, "apply", "-f", filepath.Join(root, ownNodeManifest), "-f", filepath.Join(root, millracePods))
	kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m")
	first := node(1)
	// Flannel's pod takes a moment to go when its Node gets the label, and makes its device
	// anew meanwhile.
	kubectlOf(t, "label", "node", first.name(), flannelLabel+"=gone")
	on(t, first, "sleep 3; touch /run/flanneld.off; kill $(pidof flanneld); while pidof flanneld; do sleep 0.1; done")
	awaitRoutes(t, first, 2*(nodes-1), "")
	marked(t, first)
	pods := begin(t)
	reachEachOther(t, pods)
	here, there := podOn(pods, first), podOn(pods, node(2))
	bulk(t, here, there)
	bulk(t, there, here)

	// Flannel comes back: it takes its place with the hardware address that it finds.
	before := annotations(t, first)[flannelMark+"backend-data"]
	kubectlOf(t, "-n", "kube-system", "delete", "daemonset", "millrace")
	kubectlOf(t, "label", "node", first.name(), flannelLabel+"-")
	kubectlOf(t, "apply", "-f", filepath.Join(root, millraceRemoval))
	kubectlOf(t, "-n", "kube-system", "rollout", "status", "daemonset/millrace-remove", "--timeout=1m")
	on(t, first, "rm /run/flanneld.off")
	err := until(t.Context(), "flannel to write its annotations", time.Minute, func() error {
		if now := annotations(t, first)[flannelMark+"backend-data"]; strings.Contains(now, "Millrace") || hardwareAddress(now) != hardwareAddress(before) {
			return fmt.Errorf("%s, and was %s", now, before)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// beside is a pod on a node.
const beside = `
apiVersion: v1
kind: Pod
metadata: {name: beside, namespace: podnet}
spec:
  nodeName: NODE
  terminationGracePeriodSeconds: 0
  containers: [{name: beside, image: "AGNHOST", imagePullPolicy: Never, args: [netexec]}]
`

// bothKinds has a new pod beside one that flannel gave its network: they reach each other by
// IPv4, for the bridge answers for the new one.
func bothKinds(t *testing.T, old talker) {
	t.Helper()
	applyWithAgnhost(t, strings.ReplaceAll(beside, "NODE", old.Spec.NodeName))
	kubectlOf(t, "-n", "podnet", "wait", "--for=condition=Ready", "pod/beside", "--timeout=1m")
	fresh := talkersOf(t, "-n", "podnet", "--field-selector", "metadata.name=beside")[0]
	for _, pair := range [][2]talker{{old, fresh}, {fresh, old}} {
		kubectlOf(t, "-n", "podnet", "exec", pair[0].Metadata.Name, "--", "curl", "-s", "-m", "5", "http://"+hostPort(pair[1].Status.PodIPs[0].IP, 8080)+"/clientip")
	}
	kubectlOf(t, "-n", "podnet", "delete", "pod", "beside")
}

// hardwareAddress is what a Node says to flannel's nodes.
func hardwareAddress(said string) string {
	_, mac, _ := strings.Cut(said, `"VtepMAC":`)
	return mac
}

func podOn(pods []talker, n node) talker {
	return pods[slices.IndexFunc(pods, func(p talker) bool { return p.Spec.NodeName == n.name() })]
}

// awaitRoutes waits for a node to have so many ways, and its status to say something.
func awaitRoutes(t *testing.T, n node, ways int, says string) {
	t.Helper()
	awaitShown(t, n, fmt.Sprintf("%s to have %d ways", n.name(), ways), func(shown []shownRoute) error {
		if len(shown) != ways {
			return fmt.Errorf("it has %+v", shown)
		}
		if said := on(t, n, "/opt/cni/bin/millrace status"); !strings.Contains(said, says) {
			return fmt.Errorf("status is %s", said)
		}
		return nil
	})
}

// awaitDirect waits for a node to send directly to all others.
func awaitDirect(t *testing.T, n node) {
	t.Helper()
	awaitShown(t, n, n.name()+" to send directly", func(shown []shownRoute) error {
		if len(shown) != 2*(nodes-1) || slices.ContainsFunc(shown, func(r shownRoute) bool { return !r.Direct }) {
			return fmt.Errorf("it has %+v", shown)
		}
		return nil
	})
}

type shownRoute struct {
	To     string
	Direct bool
	Why    string
}

func awaitShown(t *testing.T, n node, what string, is func([]shownRoute) error) {
	t.Helper()
	err := until(t.Context(), what, time.Minute, func() error {
		var shown struct{ Routes []shownRoute }
		decode(t, []byte(on(t, n, "/opt/cni/bin/millrace show routes -o json")), &shown)
		return is(shown.Routes)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func annotations(t *testing.T, n node) map[string]string {
	t.Helper()
	var all map[string]string
	decode(t, []byte(kubectlOf(t, "get", "node", n.name(), "-o", "jsonpath={.metadata.annotations}")), &all)
	for name := range all {
		if !strings.HasPrefix(name, flannelMark) {
			delete(all, name)
		}
	}
	return all
}

// marked waits for the Node to say that millrace runs there, with what is true of its device.
func marked(t *testing.T, n node) {
	t.Helper()
	err := until(t.Context(), "Node "+n.name()+" to say that it has gone over", time.Minute, func() error {
		var said struct {
			Millrace bool
			VtepMAC  string
		}
		all := annotations(t, n)
		if err := json.Unmarshal([]byte(all[flannelMark+"backend-data"]), &said); err != nil {
			return err
		}
		if device := on(t, n, "ip link show millrace 2>/dev/null || true"); !said.Millrace || device != "" && !strings.Contains(device, said.VtepMAC) {
			return fmt.Errorf("it says %v, and its device is %s", all, device)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// asking prints the seconds at which answers came, until somebody makes a file.
const asking = `until test -e /tmp/enough; do curl -s -o /dev/null -m 0.3 http://%s/hostname && cut -d' ' -f1 /proc/uptime; done; rm /tmp/enough`

// longestSilence asks the pod of a node from another one while something happens.
func longestSilence(t *testing.T, pods []talker, n node, happens func()) time.Duration {
	t.Helper()
	to := podOn(pods, n)
	from := pods[slices.IndexFunc(pods, func(p talker) bool { return p.Spec.NodeName != n.name() })]
	command := exec.Command(folder+"/kubectl", "-n", "podnet", "exec", from.Metadata.Name, "--", "sh", "-c", fmt.Sprintf(asking, hostPort(to.Status.PodIPs[0].IP, 8080)))
	answered := make(chan string, 1)
	go func() {
		said, err := output(command)
		if err != nil {
			said = err.Error()
		}
		answered <- said
	}()
	time.Sleep(time.Second) // of answers before
	happens()
	time.Sleep(time.Second)
	kubectlOf(t, "-n", "podnet", "exec", from.Metadata.Name, "--", "touch", "/tmp/enough")
	said := strings.Fields(<-answered)
	var before, longest float64
	for _, word := range said {
		at, err := strconv.ParseFloat(word, 64)
		if err != nil {
			t.Fatalf("asking said %q", word)
		}
		if before > 0 {
			longest = max(longest, at-before)
		}
		before = at
	}
	if len(said) < 10 {
		t.Fatalf("%d answers came", len(said))
	}
	return time.Duration(longest*1000) * time.Millisecond
}

// bulk sends 32 MB from one pod to another, by TCP, in both families.
func bulk(t *testing.T, from, to talker) {
	t.Helper()
	kubectlOf(t, "-n", "podnet", "exec", to.Metadata.Name, "--", "mkdir", "-p", "/uploads")
	for _, ip := range to.Status.PodIPs {
		begun := time.Now()
		said := kubectlOf(t, "-n", "podnet", "exec", from.Metadata.Name, "--", "sh", "-c",
			"head -c 33554432 /dev/zero >/tmp/bulk && curl -s -m 60 -F file=@/tmp/bulk http://"+hostPort(ip.IP, 8080)+"/upload; rm /tmp/bulk")
		if !strings.Contains(said, "output") || strings.Contains(said, "error") {
			t.Errorf("32 MB from %s to %s of %s: %s", from.Spec.NodeName, ip.IP, to.Spec.NodeName, said)
		}
		t.Logf("32 MB from %s to %s of %s took %v", from.Spec.NodeName, ip.IP, to.Spec.NodeName, time.Since(begun).Round(time.Millisecond))
	}
}
