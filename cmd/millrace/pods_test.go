package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/netns"
)

const nodeWithRanges = `
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDR: 10.244.1.0/24, podCIDRs: [10.244.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.10}]}
`

// plugin runs the product as a container runtime runs a CNI plugin.
func (n *node) plugin(command, container, space string) (stdout string, status int) {
	n.t.Helper()
	c := product()
	c.Stdin = strings.NewReader(fmt.Sprintf(`{"cniVersion":"1.1.0","name":"town","type":"millrace","socket":%q%s}`, filepath.Join(n.run, "cni.sock"), n.more))
	c.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+container, "CNI_IFNAME=eth0", "CNI_NETNS="+space,
		"CNI_PATH=/opt/cni/bin", "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME="+container)
	stdout, stderr, status := finish(n.t, c)
	if stderr != "" {
		n.t.Errorf("%s of %s says %s", command, container, stderr)
	}
	return stdout, status
}

// The life of the layer pod: on, two pods by the plugin, the agent killed and started
// again, a pod's end, off. A pod that runs keeps its network.
func TestPodsOfANode(t *testing.T) {
	n := newNode(t)
	n.run = filepath.Join("/tmp", fmt.Sprint("millrace-test-", os.Getpid())) // sockets have short paths
	t.Cleanup(func() { os.RemoveAll(n.run) })
	n.AddAddress("192.0.2.10/32")
	if err := n.Inside(func() error { return netns.SetSysctl("net.ipv4.ip_forward", "1") }); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(n.manifests, "node.yaml"), nodeWithRanges)
	spaces := map[string]string{}
	for _, container := range []string{"web", "db"} {
		spaces[container] = filepath.Join(t.TempDir(), container)
		if err := netns.Create(spaces[container]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { netns.Remove(spaces[container]) })
	}
	if out, _, status := finish(t, product("plan", "pods", "--source", n.source(), "--node", "n1", "--pins", n.pins, "--run", n.run)); status != exitOK || !strings.Contains(out, "+ range 10.244.1.0/24 for pods\n") {
		t.Errorf("the plan is\n%s", out)
	}
	if _, stderr, status := millrace(t, "agent", "gateways", "--source", n.source()); status != exitUsage || !strings.Contains(stderr, `"gateways" is no layer to switch on: say pods, nodedns, or nothing`) {
		t.Errorf("%s, exit status %d", stderr, status)
	}
	if out, status := n.plugin("STATUS", "", ""); status == 0 || !strings.Contains(out, `"code": 50`) {
		t.Errorf("without an agent STATUS is %s", out)
	}
	n.start("pods")
	addresses := map[string]netip.Addr{}
	for container, space := range spaces {
		all := n.add(container, space)
		if len(all) != 1 {
			t.Fatalf("ADD of %s: %v\n%s", container, all, n.log.String())
		}
		addresses[container] = all[0]
	}
	talks := func(what string) {
		t.Helper()
		if err := connects(spaces["web"], spaces["db"], addresses["db"]); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	talks("two pods")
	n.kill()
	talks("without an agent")
	n.start("pods")
	talks("with another agent")
	s := n.until("it knows the pods", func(s agent.Status) bool { return slices.ContainsFunc(s.Layers, isPods(2)) })
	if len(s.Problems) > 0 {
		t.Error(s.Problems)
	}
	n.showsPods(addresses["web"])
	for _, command := range []string{"CHECK", "DEL", "DEL"} {
		if out, status := n.plugin(command, "web", spaces["web"]); status != 0 {
			t.Errorf("%s of web: %s", command, out)
		}
	}
	n.kill()
	n.start() // without the word
	if found, _ := filepath.Glob(filepath.Join(n.run, "pod")); len(found) > 0 {
		t.Errorf("switched off, and there is %v", found)
	}
	if err := connects(n.NetNS, spaces["db"], addresses["db"]); err != nil {
		t.Errorf("from the node to a pod of before: %v", err)
	}
}

// A pod reaches another one of its node by a Service, on both paths, while packets between
// pods take shortcuts: what has to be translated on the way back is.
func TestServicesOfPods(t *testing.T) {
	for _, path := range []string{"socket", "packet"} {
		t.Run(path, func(t *testing.T) {
			n := newNode(t)
			n.run = filepath.Join("/tmp", fmt.Sprint("millrace-test-", os.Getpid()))
			t.Cleanup(func() { os.RemoveAll(n.run) })
			n.AddAddress("192.0.2.10/32")
			if err := n.Inside(func() error { return netns.SetSysctl("net.ipv4.ip_forward", "1") }); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(n.manifests, "node.yaml"), nodeWithRanges)
			write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.1.2"))
			n.start("pods", "--path", path)
			space := map[string]string{}
			for _, container := range []string{"client", "web"} { // 10.244.1.1 and 10.244.1.2
				space[container] = filepath.Join(t.TempDir(), container)
				if err := netns.Create(space[container]); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { netns.Remove(space[container]) })
				if out, status := n.plugin("ADD", container, space[container]); status != 0 {
					t.Fatal(out)
				}
			}
			var listener net.Listener
			err := netns.Do(space["web"], func() (err error) {
				listener, err = net.Listen("tcp", "10.244.1.2:8080")
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			go func() {
				for {
					c, err := listener.Accept()
					if err != nil {
						return
					}
					_, _ = c.Write([]byte("hello"))
					c.Close()
				}
			}()
			served := func(s agent.Status) bool {
				return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool { return len(devicesOf(l)["from_pod"]) == 2 })
			}
			if path == "packet" {
				n.until("the packet path is at the pods' devices", served)
			}
			n.until("packets take shortcuts", func(s agent.Status) bool {
				if err := reads(space["client"], "10.96.0.1:80"); err != nil {
					t.Fatal(err)
				}
				for _, l := range s.Layers {
					if l.Name == "pod" {
						return path == "socket" && l.Reasons["direct"] > 100 || path == "packet" && l.Reasons["device"] > 100
					}
				}
				return false
			})
			// The packet path comes to be where packets have taken shortcuts so far.
			manifest := strings.Replace(web("late", "10.96.0.2", "10.244.1.2"), "metadata: {name: late}", "metadata: {name: late, annotations: {millrace.io/path: packet}}", 1)
			write(t, filepath.Join(n.manifests, "late.yaml"), manifest)
			for begun := time.Now(); reads(space["client"], "10.96.0.2:80") != nil; {
				if time.Since(begun) > time.Minute {
					t.Fatalf("the new Service is not served\n%s", n.log.String())
				}
				if err := reads(space["client"], "10.96.0.1:80"); err != nil {
					t.Fatalf("meanwhile the other: %v", err)
				}
			}
			n.until("the packet path is at the pods' devices", served)
			for i := range 200 {
				for _, address := range []string{"10.96.0.1:80", "10.96.0.2:80"} {
					if err := reads(space["client"], address); err != nil {
						t.Fatalf("connection %d to %s: %v\n%s", i, address, err, n.log.String())
					}
				}
			}
		})
	}
}

// reads opens a connection from a namespace and reads until its end.
func reads(from, address string) error {
	return netns.Do(from, func() error {
		c, err := net.DialTimeout("tcp", address, 10*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		text, err := io.ReadAll(c)
		if err == nil && string(text) != "hello" {
			err = fmt.Errorf("%q came", text)
		}
		return err
	})
}

// showsPods: `millrace show pods` says how packets come to the pod web once the agent has
// seen it.
func (n *node) showsPods(web netip.Addr) {
	n.t.Helper()
	want := regexp.MustCompile(fmt.Sprintf(`(?m)^shop/web +%s +mr[0-9a-v]{13} +(direct|stack) +- +web +-$`, web))
	for begun := time.Now(); ; {
		show := product("show", "pods", "--run", n.run, "--pins", n.pins)
		var out, errs bytes.Buffer
		show.Stdout, show.Stderr = &out, &errs
		if err := netns.Do(n.NetNS, show.Run); err != nil {
			n.t.Fatalf("show pods: %v: %s", err, errs.String())
		}
		found := want.FindStringSubmatch(out.String())
		if found == nil {
			n.t.Fatalf("show pods says\n%s", out.String())
		}
		if found[1] == "direct" {
			return
		}
		if time.Since(begun) > time.Minute {
			n.t.Fatalf("after a minute there is no shortcut\n%s", out.String())
		}
	}
}

func isPods(count int) func(agent.LayerStatus) bool {
	return func(l agent.LayerStatus) bool { return l.Name == "pod" && l.Objects == count }
}

// connects opens a connection from one namespace to a listener in another.
func connects(from, to string, at netip.Addr) error {
	var listener net.Listener
	err := netns.Do(to, func() (err error) {
		listener, err = net.Listen("tcp", netip.AddrPortFrom(at, 0).String())
		return err
	})
	if err != nil {
		return err
	}
	defer listener.Close()
	return netns.Do(from, func() error {
		c, err := net.DialTimeout("tcp", listener.Addr().String(), 10*time.Second)
		if err == nil {
			c.Close()
		}
		return err
	})
}
