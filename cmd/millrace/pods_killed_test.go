package main

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// Pods begin and end on two nodes with a router in between while both agents are killed at
// random. Those that stay reach each other across, and CHECK finds them whole; a runtime that
// forgets some has them taken back by GC; a node that starts again begins with nothing. At
// the end no address, device, route, program or map entry is left. MILLRACE_LONG=1: 500.
func TestPodsOfTwoNodesWhileAgentsAreKilled(t *testing.T) {
	count := 16
	if os.Getenv("MILLRACE_LONG") != "" {
		count = 500
	}
	n1, n2 := pairOfNodes(t, false)
	folder := filepath.Join(t.TempDir(), "spaces")
	t.Cleanup(func() {
		left, _ := os.ReadDir(folder)
		for _, entry := range left {
			netns.Remove(filepath.Join(folder, entry.Name()))
		}
	})
	nodes := []*node{n1, n2}
	var stops []func() int
	for i, n := range nodes {
		n.start("pods", "--node", fmt.Sprint("n", i+1))
		stops = append(stops, n.keepKilling("pods", "--node", fmt.Sprint("n", i+1)))
	}
	stay := make([]*sync.Map, 2) // what stays on each node: container to its addresses
	for i := range stay {
		stay[i] = &sync.Map{}
	}
	places := make(chan struct{}, 4)
	var all sync.WaitGroup
	for i := range count {
		places <- struct{}{}
		all.Go(func() {
			defer func() { <-places }()
			n, container := nodes[i%2], fmt.Sprintf("c%03d", i)
			path := filepath.Join(folder, container)
			if err := netns.Create(path); err != nil {
				t.Error(err)
				return
			}
			addresses := n.insist("ADD", container, path)
			if i%4 < 2 {
				stay[i%2].Store(container, addresses)
				return
			}
			if i%8 < 4 { // half of those that go lose their namespace first
				netns.Remove(path)
			}
			n.insist("DEL", container, path)
			netns.Remove(path)
		})
	}
	all.Wait()
	killed := stops[0]() + stops[1]()
	t.Logf("%d pods, and agents were killed %d times", count, killed)
	if killed == 0 {
		t.Error("none was killed: this shows nothing")
	}
	for i, n := range nodes {
		n.start("pods", "--node", fmt.Sprint("n", i+1))
	}
	held := map[netip.Addr]string{}
	for i, n := range nodes {
		stay[i].Range(func(container, addresses any) bool {
			name := container.(string)
			n.insist("CHECK", name, filepath.Join(folder, name))
			for _, addr := range addresses.([]netip.Addr) {
				if other := held[addr]; other != "" {
					t.Errorf("%s and %s have %s", name, other, addr)
				}
				held[addr] = name
			}
			return true
		})
	}
	talkAcross(t, folder, stay)
	n1.forgets(stay[0], folder)
	n2.startsAgain(stay[1], folder)
	for _, n := range nodes {
		n.isEmpty()
	}
}

// talkAcross: pods of one node reach those of the other, some of them.
func talkAcross(t *testing.T, folder string, stay []*sync.Map) {
	t.Helper()
	var names [2][]string
	for i := range stay {
		stay[i].Range(func(container, _ any) bool {
			names[i] = append(names[i], container.(string))
			return len(names[i]) < 10
		})
	}
	for j, name := range names[0][:min(len(names[0]), len(names[1]))] {
		there := names[1][j]
		addresses, _ := stay[1].Load(there)
		for _, to := range addresses.([]netip.Addr) {
			if err := connects(filepath.Join(folder, name), filepath.Join(folder, there), to); err != nil {
				t.Errorf("from %s to %s at %s: %v", name, there, to, err)
			}
		}
	}
}

// forgets: of what is there the runtime knows one pod only, and says so by GC; that ends by
// DEL.
func (n *node) forgets(stay *sync.Map, folder string) {
	n.t.Helper()
	var known string
	stay.Range(func(container, _ any) bool {
		known = container.(string)
		return false
	})
	n.more = fmt.Sprintf(`,"cni.dev/valid-attachments":[{"containerID":%q,"ifname":"eth0"}]`, known)
	if out, status := n.plugin("GC", "", ""); status != 0 {
		n.t.Errorf("GC: %s", out)
	}
	n.more = ""
	n.insist("CHECK", known, filepath.Join(folder, known))
	n.insist("DEL", known, filepath.Join(folder, known))
}

// startsAgain: the pods, their namespaces and what was pinned have gone, and what was written
// down of them is still there.
func (n *node) startsAgain(stay *sync.Map, folder string) {
	n.t.Helper()
	n.kill()
	stay.Range(func(container, _ any) bool {
		netns.Remove(filepath.Join(folder, container.(string)))
		return true
	})
	os.RemoveAll(n.pins)
	n.start("pods", "--node", "n2")
}

// isEmpty: of pods nothing is left, on the node or pinned.
func (n *node) isEmpty() {
	n.t.Helper()
	for begun := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		left := n.leftovers()
		if len(left) == 0 {
			return
		}
		if time.Since(begun) > 30*time.Second {
			n.t.Errorf("there is still %q\n%s", left, n.says("show", "pods"))
			return
		}
	}
}

func (n *node) leftovers() (left []string) {
	n.t.Helper()
	net, err := link.Open(n.NetNS)
	if err != nil {
		n.t.Fatal(err)
	}
	defer net.Close()
	devices, err := net.Devices()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, d := range devices {
		if strings.HasPrefix(d.Name, "mr") {
			left = append(left, "device "+d.Name)
		}
	}
	routes, err := net.Routes(109)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, r := range routes {
		left = append(left, "route "+r.To.String())
	}
	if lines := strings.Count(n.says("show", "pods"), "\n"); lines > 1 {
		left = append(left, fmt.Sprintf("%d pods", lines-1))
	}
	for _, pattern := range []string{"pod/link_*", "route/link_route_from_pod_*"} {
		found, _ := filepath.Glob(filepath.Join(n.pins, pattern))
		left = append(left, found...)
	}
	for _, name := range []string{"pod/homes", "route/ports"} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(n.pins, name), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			n.t.Fatal(err)
		}
		defer m.Close()
		key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
		for entries := m.Iterate(); entries.Next(&key, &value); {
			left = append(left, fmt.Sprintf("%s %x", name, key))
		}
	}
	return left
}

// insist asks until it is done, as runtimes do, and returns the addresses of an ADD.
func (n *node) insist(command, container, path string) []netip.Addr {
	for begun := time.Now(); ; {
		out, status := n.plugin(command, container, path)
		switch {
		case status == 0 && command == "ADD":
			return addressesIn(n.t, out)
		case status == 0:
			return nil
		case !strings.Contains(out, `"code": 11`) || time.Since(begun) > time.Minute:
			n.t.Errorf("%s of %s: %s", command, container, out)
			return nil
		}
	}
}

// keepKilling kills the agent at random moments and starts the next one, until it is told to
// stop: then none runs, and it says how often it has.
func (n *node) keepKilling(arguments ...string) (stop func() int) {
	over, done := make(chan struct{}), make(chan int)
	go func() {
		killed := 0
		for {
			for rand.IntN(4) > 0 { // else it is killed while it starts
				if _, err := n.status(); err == nil {
					break
				}
				time.Sleep(20 * time.Millisecond)
			}
			select {
			case <-over:
				done <- killed
				return
			case <-time.After(time.Duration(rand.IntN(500)) * time.Millisecond):
			}
			n.kill()
			killed++
			if err := n.launch(arguments...); err != nil {
				n.t.Error(err)
			}
		}
	}()
	return func() int {
		close(over)
		defer n.kill()
		return <-done
	}
}
