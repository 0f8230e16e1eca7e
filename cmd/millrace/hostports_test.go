package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/layertest"
)

// seenBy serves in a namespace until the test ends, and answers who asks with the address
// that it sees: by TCP at one port, by UDP at another.
func seenBy(t *testing.T, path string, tcp, udp int) {
	t.Helper()
	err := netns.Do(path, func() error {
		listener, err := net.Listen("tcp", fmt.Sprintf("[::]:%d", tcp))
		if err != nil {
			return err
		}
		t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				c, err := listener.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, hostOf(c.RemoteAddr()))
				c.Close()
			}
		}()
		datagrams, err := net.ListenPacket("udp", fmt.Sprintf("[::]:%d", udp))
		if err != nil {
			return err
		}
		t.Cleanup(func() { datagrams.Close() })
		go func() {
			for buffer := make([]byte, 64); ; {
				_, from, err := datagrams.ReadFrom(buffer)
				if err != nil {
					return
				}
				_, _ = datagrams.WriteTo([]byte(hostOf(from)), from)
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func hostOf(a net.Addr) string {
	at, _ := netip.ParseAddrPort(a.String())
	return at.Addr().Unmap().String()
}

// seenAs asks from a namespace, and returns the address that was seen.
func seenAs(from, network, address string) (seen string, err error) {
	err = netns.Do(from, func() error {
		c, err := net.DialTimeout(network, address, 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err = c.Write([]byte("who?")); err != nil {
			return err
		}
		buffer := make([]byte, 64)
		n, err := c.Read(buffer)
		seen = string(buffer[:n])
		return err
	})
	return seen, err
}

// withPorts gives a pod its network by the plugin, and hostPorts: "8080:80/tcp", or
// "127.0.0.1 8080:80/tcp".
func (n *node) withPorts(command, container, path string, ports ...string) (out string, status int) {
	n.t.Helper()
	n.more = layertest.PortMappings(ports...)
	defer func() { n.more = "" }()
	return n.plugin(command, container, path)
}

// A pod's hostPorts by the plugin and the agent, without a rule on the node: from another
// node and its pods, which it sees, from pods of its own and itself, and from the node; while
// the agent is killed and started again, on both paths, until the pod ends.
func TestHostPortsOfPods(t *testing.T) {
	n, other := pairOfNodes(t, true)
	n.start("pods", "--path", "packet")
	other.start("pods", "--node", "n2")
	spaces := map[string]string{}
	for _, name := range []string{"web", "client", "far", "rival"} {
		spaces[name] = space(t, name)
		seenBy(t, spaces[name], 80, 53)
	}
	client := n.add("client", spaces["client"])
	other.add("far", spaces["far"])
	ports := []string{"8080:80/tcp", "53:53/udp", "192.0.2.1 81:80/tcp", "127.0.0.1 82:80/tcp"}
	out, status := n.withPorts("ADD", "web", spaces["web"], ports...)
	if status != 0 {
		t.Fatalf("ADD: %s\n%s", out, n.log.String())
	}
	added := time.Now()
	n.until("a hostPort is served", func(agent.Status) bool {
		seen, _ := seenAs(other.NetNS, "tcp", "192.0.2.1:8080")
		return seen == "192.0.2.2"
	})
	t.Logf("served %v after ADD had returned", time.Since(added).Round(100*time.Microsecond))
	n.until("the packet path is at the pods' devices", func(s agent.Status) bool {
		return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool { return len(devicesOf(l)["from_pod"]) == 2 })
	})
	web := addressesIn(t, out)

	type row struct{ from, network, address, want string }
	check := func(when string, rows ...row) {
		t.Helper()
		for _, r := range rows {
			path := spaces[r.from]
			switch r.from {
			case "node":
				path = n.NetNS
			case "other":
				path = other.NetNS
			}
			if seen, err := seenAs(path, r.network, r.address); err != nil || r.want != "" && seen != r.want {
				t.Errorf("%s: %s to %s of %s is seen as %q, %v; not %s", when, r.network, r.address, r.from, seen, err, r.want)
			}
		}
	}
	outside := []row{
		{"other", "tcp", "192.0.2.1:8080", "192.0.2.2"}, {"other", "tcp", "[2001:db8:1::1]:8080", "2001:db8:1::2"},
		{"other", "udp", "192.0.2.1:53", "192.0.2.2"}, {"other", "udp", "[2001:db8:1::1]:53", "2001:db8:1::2"},
		{"other", "tcp", "192.0.2.1:81", "192.0.2.2"},
		{"far", "tcp", "192.0.2.1:8080", "192.0.2.2"}, // masqueraded towards nodes, as ever
	}
	inside := []row{
		{"client", "tcp", "192.0.2.1:8080", client[0].String()}, {"client", "tcp", "[2001:db8:1::1]:8080", client[1].String()},
		{"client", "udp", "192.0.2.1:53", client[0].String()}, {"client", "tcp", "192.0.2.1:81", client[0].String()},
		{"node", "tcp", "127.0.0.1:8080", ""}, {"node", "tcp", "127.0.0.1:82", ""}, {"node", "udp", "127.0.0.1:53", ""}, {"node", "tcp", "192.0.2.1:8080", ""},
	}
	check("packet by packet", append(slices.Clone(outside), inside...)...)
	check("to itself", row{"web", "tcp", "192.0.2.1:8080", "192.0.2.1"})
	if _, err := seenAs(other.NetNS, "tcp", "192.0.2.1:82"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a port of the node's loopback address from elsewhere: %v", err)
	}
	if _, err := seenAs(spaces["client"], "tcp", "127.0.0.1:82"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a pod's own loopback address: %v", err)
	}
	n.showsPorts(web[0])
	for _, refused := range []string{"8080:80/tcp", "192.0.2.1 53:53/udp"} {
		if out, status := n.withPorts("ADD", "rival", spaces["rival"], refused); status == 0 || !strings.Contains(out, `"code": 11`) || !strings.Contains(out, "pod shop/web of this node has it") {
			t.Errorf("what another pod has: %s", out)
		}
	}

	goesOn, stop := n.keepsAsking(other.NetNS, "192.0.2.1:8080")
	n.kill()
	goesOn()
	check("without an agent", outside...)
	n.start("pods", "--path", "packet")
	goesOn()
	check("with another agent", outside...)
	stop()
	n.kill()
	n.start("pods")
	check("at the socket", append(inside, row{"web", "tcp", "192.0.2.1:8080", web[0].String()})...)
	n.until("packets between pods take shortcuts", func(s agent.Status) bool {
		if err := connects(spaces["client"], spaces["web"], web[0]); err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool {
			return l.Name == "pod" && l.Reasons["direct"] > 0 && len(l.Degraded) == 0
		})
	})

	for _, command := range []string{"CHECK", "DEL"} {
		if out, status := n.withPorts(command, "web", spaces["web"], ports...); status != 0 {
			t.Errorf("%s: %s", command, out)
		}
	}
	n.until("the hostPorts are gone", func(agent.Status) bool { return len(n.inForce()) == 0 })
	if _, err := seenAs(other.NetNS, "tcp", "192.0.2.1:8080"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the pod has ended, and its hostPort: %v", err)
	}
	if out, status := n.withPorts("ADD", "rival", spaces["rival"], "8080:80/tcp"); status != 0 {
		t.Errorf("what no pod has any more: %s", out)
	}
	n.until("the other pod is served", func(agent.Status) bool { return len(n.inForce()) == 2 })
	check("the other pod", outside[:2]...)
	n.kill()
	n.start() // without the word
	if held := n.inForce(); len(held) > 0 {
		t.Errorf("switched off, and in force are %v", held)
	}
}

// showsPorts: the pod is named wherever its ports are shown, and who plans beside the agent
// would change nothing.
func (n *node) showsPorts(web netip.Addr) {
	n.t.Helper()
	for _, row := range []struct {
		command, want string
	}{
		{"show pods", `(?m)^shop/web .* 8080->80/tcp, 53->53/udp, 192\.0\.2\.1:81->80/tcp, 127\.0\.0\.1:82->80/tcp$`},
		{"show pods -o json", `"ports": \[\s*\{\s*"protocol": "tcp",\s*"host_port": 8080,\s*"container_port": 80`},
		{"show services", `(?m)^hostPort of pod shop/web +- +0\.0\.0\.0:8080/tcp +packet +` + web.String() + `:80$`},
		{"show services -o json", `"pod": \{\s*"namespace": "shop",\s*"name": "web"`},
		{"show backends", `(?m)^` + web.String() + `:53 +hostPort of pod shop/web +- +0\.0\.0\.0:53/udp$`},
		{"explain tcp 198.51.100.7 192.0.2.1:8080", `192\.0\.2\.1:8080/tcp is a hostPort of pod shop/web\.`},
		{"explain tcp 192.0.2.1 127.0.0.1:82", `127\.0\.0\.1:82/tcp is a hostPort of pod shop/web\.`},
	} {
		if out := n.says(strings.Fields(row.command)...); !regexp.MustCompile(row.want).MatchString(out) {
			n.t.Errorf("%s says\n%s\nnot %s", row.command, out, row.want)
		}
	}
	planned := n.says("plan", "pods", "--path", "packet", "--source", n.source(), "--node", "n1")
	if strings.Contains(planned, "hostPort") || strings.Contains(planned, "service") {
		n.t.Errorf("the plan is\n%s", planned)
	}
	text := n.says("plan", "pods", "--wire=false", "--path", "packet", "--source", n.source(), "--node", "n1")
	if !strings.Contains(text, "- service 0.0.0.0:8080/tcp") {
		n.t.Errorf("without the wire the plan is\n%s", text)
	}
}

// keepsAsking opens connections one after the other from a namespace; goesOn waits for some
// more, and none may fail until stop.
func (n *node) keepsAsking(from, address string) (goesOn, stop func()) {
	n.t.Helper()
	var asked atomic.Int64
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-over:
				return
			default:
			}
			if _, err := seenAs(from, "tcp", address); err != nil {
				n.t.Errorf("connection %d to %s: %v", asked.Load(), address, err)
				return
			}
			asked.Add(1)
		}
	}()
	goesOn = func() {
		n.t.Helper()
		for before, begun := asked.Load(), time.Now(); asked.Load() < before+20; time.Sleep(time.Millisecond) {
			if time.Since(begun) > 20*time.Second {
				n.t.Fatalf("%s is not answered any more", address)
			}
		}
	}
	return goesOn, func() { close(over); <-done }
}
