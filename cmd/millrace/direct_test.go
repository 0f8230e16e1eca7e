package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/netns"
)

// entry is a Service with a node port that leads to a pod of node 2. Pods keep their own
// addresses towards nodes.
const entry = `
apiVersion: v1
kind: ConfigMap
metadata: {name: ip-masq-agent, namespace: kube-system}
data: {config: "nonMasqueradeCIDRs: [10.244.0.0/16, 192.0.2.0/24]"}
---
apiVersion: v1
kind: Service
metadata: {name: entry}
spec: {type: NodePort, clusterIP: 10.96.0.7, ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: entry-1, labels: {kubernetes.io/service-name: entry}}
addressType: IPv4
ports: [{name: http, protocol: TCP, port: 8080}]
endpoints: [{addresses: [%s], nodeName: n2}]
`

// Between two nodes of one segment packets of pods go past the stacks and the nodes' ends
// of the pods' veths; and through the programs of Services at the uplink, which stand in
// front of those: a pod calls the other node's node port, whose endpoint is a pod there.
func TestPastTheStacksOfTwoNodes(t *testing.T) {
	n1 := newNode(t)
	n1.run = filepath.Join("/tmp", fmt.Sprint("millrace-test-", os.Getpid()))
	t.Cleanup(func() { os.RemoveAll(n1.run); os.RemoveAll(n1.run + "-2") })
	forward(t, n1.NetNS)
	n2 := n1.second(space(t, "node2"))
	wire(t, "eth0", [2]string{n1.NetNS, n2.NetNS}, [2][]string{{"192.0.2.1/24", "2001:db8:1::1/64"}, {"192.0.2.2/24", "2001:db8:1::2/64"}}, true)
	write(t, filepath.Join(n1.manifests, "nodes.yaml"), fmt.Sprintf(nodesWithRanges, "192.0.2.2", "2001:db8:1::2"))
	n1.start("pods")
	n2.start("pods", "--node", "n2")
	spaces := [2]string{space(t, "pod1"), space(t, "pod2")}
	addresses := [2][]netip.Addr{n1.add("web", spaces[0]), n2.add("db", spaces[1])}
	before := n2.events("taken_direct")
	write(t, filepath.Join(n1.manifests, "entry.yaml"), fmt.Sprintf(entry, addresses[1][0]))

	for _, to := range addresses[1] {
		n1.passesDevice(func() error { return connects(spaces[0], spaces[1], to) })
	}
	if met, want := n1.programsOfPods(), []string{"route_from_pod", attach.FromPod}; !slices.Equal(met, want) {
		t.Errorf("a pod's packets meet %v, not %v", met, want)
	}
	n2.until("a pod is reached by its node's port, and past the stack", func(agent.Status) bool {
		err := answers(spaces[0], spaces[1], "192.0.2.2:30080", netip.AddrPortFrom(addresses[1][0], 8080))
		return err == nil && n2.events("taken_direct")-before >= 10 // of several calls
	})
}

// passesDevice waits until something works without a packet that the node's end of its one
// pod's veth sends.
func (n *node) passesDevice(f func() error) {
	n.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		before := n.sentToPods()
		err := f()
		sent := n.sentToPods() - before
		if err == nil && sent == 0 {
			return
		}
		if time.Now().After(deadline) {
			n.t.Errorf("the pod's device sent %d packets: %v", sent, err)
			return
		}
	}
}

// programsOfPods are those that packets of pods meet at the node, in that order.
func (n *node) programsOfPods() (names []string) {
	n.t.Helper()
	var devices []net.Interface
	err := netns.Do(n.NetNS, func() (err error) {
		devices, err = net.Interfaces()
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	for _, device := range devices {
		if !strings.HasPrefix(device.Name, "mr") {
			continue
		}
		programs, err := attach.Hook{Netns: n.NetNS, Device: device.Index, Attach: ebpf.AttachTCXIngress}.Programs()
		if err != nil {
			n.t.Fatal(err)
		}
		for _, id := range programs {
			names = append(names, attach.NameOf(id))
		}
	}
	return names
}

// sentToPods is how many packets pods' devices have sent (proc_net(5), dev).
func (n *node) sentToPods() (sent int) {
	n.t.Helper()
	err := netns.Do(n.NetNS, func() error {
		text, err := os.ReadFile("/proc/thread-self/net/dev")
		for line := range strings.Lines(string(text)) {
			name, numbers, _ := strings.Cut(strings.TrimSpace(line), ":")
			if words := strings.Fields(numbers); strings.HasPrefix(name, "mr") && len(words) > 9 {
				count, _ := strconv.Atoi(words[9])
				sent += count
			}
		}
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return sent
}

// events is a counter of the layer of routes.
func (n *node) events(word string) (count uint64) {
	n.t.Helper()
	n.until("it has a layer of routes", func(s agent.Status) bool {
		for _, l := range s.Layers {
			if l.Name == "route" {
				count = l.Reasons[word]
				return true
			}
		}
		return false
	})
	return count
}

// answers says whether a call from one namespace to an address is answered by who listens
// at another address in the other.
func answers(from, to, called string, at netip.AddrPort) error {
	var listener net.Listener
	err := netns.Do(to, func() (err error) {
		listener, err = net.Listen("tcp", at.String())
		return err
	})
	if err != nil {
		return err
	}
	defer listener.Close()
	go func() {
		if c, err := listener.Accept(); err == nil {
			_, _ = c.Write([]byte{1})
			c.Close()
		}
	}()
	return netns.Do(from, func() error {
		c, err := net.DialTimeout("tcp", called, time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(time.Second))
		_, err = c.Read(make([]byte, 1))
		return err
	})
}
