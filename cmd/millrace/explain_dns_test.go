package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/proc"
	"github.com/millrace/millrace/layer/dns"
)

const ofKubelet = "search default.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"

// sent is how many UDP packets the pod has sent.
func (p *asker) sent(t *testing.T) (count uint64) {
	t.Helper()
	err := netns.Do(p.netns, func() error {
		text, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err == nil {
			count, err = proc.Counter(string(text), "Udp.OutDatagrams")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return count
}

// getaddrinfo has glibc look a name up in the pod, and returns how many queries it sent.
func (p *asker) getaddrinfo(t *testing.T, name string) uint64 {
	t.Helper()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, conf, ofKubelet)
	before := p.sent(t)
	c := exec.Command("unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec getent ahosts "$1"`, conf, name)
	if err := netns.Do(p.netns, c.Start); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait() // a name that is not there is an error of getent's
	return p.sent(t) - before
}

// explains asks for the JSON of a lookup, by the pod's address.
func (n *node) explains(name string, more ...string) (e lookupExplained) {
	n.t.Helper()
	args := append([]string{"explain", "dns", "10.244.0.7", name, "--pins", n.pins, "--run", n.run, "-o", "json"}, more...)
	stdout, stderr, status := n.inside(args...)
	if err := json.Unmarshal([]byte(stdout), &e); err != nil || status != exitOK {
		n.t.Fatalf("%v: exit status %d, %v: %s", args, status, err, stderr)
	}
	return e
}

// What is explained is what happens: glibc sends as many queries, and the answers are those
// that are really given.
func TestExplainDNS(t *testing.T) {
	n := newNode(t)
	for _, tool := range []string{"unshare", "getent"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	n.serveDNS("10.244.0.53", "192.0.2.53")
	write(t, filepath.Join(n.manifests, "dns.yaml"), dnsService)
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1"))
	p := &asker{n.pod("10.244.0.7")}
	p.contain(t, ofKubelet)
	n.start()
	if e := n.explains("web"); e.On || len(e.Notes) != 1 || e.Lookups[0].Count != 8 || !e.Lookups[0].AtMost || e.Lookups[0].Queries[0].By != "servers" {
		t.Errorf("where the layer is off: %+v", e)
	}
	n.kill()
	n.start("--dns", "cluster.local")
	n.until("the pod's device has the program", func(s agent.Status) bool {
		return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool { return len(devicesOf(l)["dns_from_pod"]) == 1 })
	})
	n.showsSearchList("default.svc.cluster.local svc.cluster.local cluster.local")
	for _, name := range []string{"web", "web.default", "web.default.svc", "nosuch.svc.cluster.local", "example.com", "example.com."} {
		e := n.explains(name, "--prove")
		glibc := e.Lookups[slices.IndexFunc(e.Lookups, func(l dns.Lookup) bool { return slices.Contains(l.Resolvers, "glibc") })]
		if sent := p.getaddrinfo(t, name); uint64(glibc.Count) != sent || !e.On || glibc.AtMost {
			t.Errorf("%s: %s, and glibc has sent %d queries", name, glibc.Sum(), sent)
		}
		for _, q := range glibc.Queries {
			if q.Answer == nil || q.Took <= 0 || q.Took > 5*time.Second {
				t.Errorf("%s: %+v", name, q)
			}
		}
	}
	e := n.explains("web")
	q := e.Lookups[0].Queries[0]
	if q.By != "kernel" || q.From != "Service default/web" || q.Answer.String() != "10.96.0.1" || q.Outcome != "answered" || e.Device != "veth1" || e.Ndots != 5 {
		t.Errorf("web: %+v, %+v", e, q)
	}
	stdout, _, _ := n.inside("explain", "dns", "10.244.0.7", "web", "--pins", n.pins, "--run", n.run)
	if !strings.Contains(stdout, "glibc, musl, go: 2 queries; 2 by the kernel; found\n") || !strings.Contains(stdout, "Service default/web") {
		t.Errorf("for people: %s", stdout)
	}
	n.kill()
	for begun := time.Now(); n.explains("web").Lookups[0].Queries[0].Outcome != "stale"; time.Sleep(100 * time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("the agent was killed, and %+v", n.explains("web").Lookups[0].Queries[0])
		}
	}
}

func TestExplainDNSUsage(t *testing.T) {
	for _, args := range [][]string{{}, {"a"}, {"a", "b", "c"}, {"shop/web", "a..b"}, {"shop/web", ""}, {"shop/web", strings.Repeat("a.", 128)}, {"shop/web", "a b"}} {
		if _, stderr, status := millrace(t, append([]string{"explain", "dns"}, args...)...); status != exitUsage {
			t.Errorf("%q: exit status %d, %s", args, status, stderr)
		}
	}
	needsRoot(t)
	for who, says := range map[string]string{"192.0.2.99": "is not on this node", "shop/nobody": "is not known"} {
		if _, stderr, status := millrace(t, "explain", "dns", who, "web", "--run", "/absent"); status != exitData || !strings.Contains(stderr, says) {
			t.Errorf("%s: exit status %d, %s", who, status, stderr)
		}
	}
}
