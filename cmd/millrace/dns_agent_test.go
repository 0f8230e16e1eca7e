package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/agent/resolver"
	"github.com/millrace/millrace/kernel/netns"
)

// noDNSServers is a cluster whose DNS Service nobody serves, and the Corefile of those who
// did.
const noDNSServers = `
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec: {clusterIP: 10.96.0.10, ports: [{name: dns, port: 53, protocol: UDP}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: coredns, namespace: kube-system}
data:
  Corefile: |
    .:53 {
        kubernetes cluster.local in-addr.arpa ip6.arpa {
           pods insecure
           fallthrough in-addr.arpa ip6.arpa
        }
        forward . 203.0.113.53
        cache 30
    }
`

// nameServer is a DNS server in a network namespace of its own.
type nameServer struct {
	asked atomic.Int64
	deaf  atomic.Bool
	ttl   atomic.Uint32
	// knows are the addresses of a name in lower case, and whether there is one.
	knows func(name string) (addresses []netip.Addr, exists bool)
}

// outsideNames are those below example.com whose first label does not begin with "no".
func outsideNames(name string) ([]netip.Addr, bool) {
	return []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}, !strings.HasPrefix(name, "no")
}

// serveInternet has a server at 203.0.113.53 that knows names outside.
func (n *node) serveInternet() *nameServer {
	n.t.Helper()
	return n.serveNames("veth2", "203.0.113.53", outsideNames)
}

// serveNames starts a server behind a device.
func (n *node) serveNames(device, at string, knows func(string) ([]netip.Addr, bool)) *nameServer {
	n.t.Helper()
	space := n.podBehind(device, at)
	var c net.PacketConn
	err := netns.Do(space, func() (err error) {
		c, err = net.ListenPacket("udp", at+":53")
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	i := &nameServer{knows: knows}
	i.ttl.Store(300)
	go func() {
		query := make([]byte, 1500)
		for {
			size, from, err := c.ReadFrom(query)
			if err != nil {
				return
			}
			i.asked.Add(1)
			if !i.deaf.Load() {
				_, _ = c.WriteTo(i.reply(query[:size]), from)
			}
		}
	}()
	return i
}

// reply answers a question for A or AAAA; all else has a negative answer.
func (i *nameServer) reply(query []byte) []byte {
	end := 12 + strings.IndexByte(string(query[12:]), 0) + 5
	reply := append([]byte{query[0], query[1], 0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0}, query[12:end]...)
	record := func(owner uint16, kind byte, data []byte) {
		reply = binary.BigEndian.AppendUint16(reply, owner)
		reply = append(reply, 0, kind, 0, 1)
		reply = binary.BigEndian.AppendUint32(reply, i.ttl.Load())
		reply = append(binary.BigEndian.AppendUint16(reply, uint16(len(data))), data...)
	}
	// The zone is the last two labels of the name.
	zone, name := 12, ""
	for at := 12; query[at] != 0; at += 1 + int(query[at]) {
		if rest := string(query[at : end-4]); strings.Count(rest, "\x03com\x00") == 1 && query[at] == 7 {
			zone = at
		}
		name += strings.ToLower(string(query[at+1:at+1+int(query[at])])) + "."
	}
	kind := query[end-3]
	addresses, exists := i.knows(name)
	for _, addr := range addresses {
		if exists && (kind == 1 && addr.Is4() || kind == 28 && addr.Is6()) {
			reply[7]++
			record(0xc00c, kind, addr.AsSlice())
		}
	}
	if !exists {
		reply[3] |= 3 // NXDOMAIN
	}
	if reply[7] == 0 {
		reply[9] = 1
		record(0xc000|uint16(zone), 6, append([]byte{0, 0}, make([]byte, 20)...))
	}
	return reply
}

const bothFamilies = "192.0.2.1 2001:db8::1"

// resolver is Go's, in the pod, against the cluster's DNS Service.
func (p *asker) resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(_ context.Context, network, _ string) (c net.Conn, err error) {
		err = netns.Do(p.netns, func() error {
			c, err = net.Dial(network, "10.96.0.10:53")
			return err
		})
		return c, err
	}}
}

// load looks names up without a pause until it is stopped, and remembers how that went.
type load struct {
	stop    chan struct{}
	looking sync.WaitGroup
	lookups atomic.Int64

	mu      sync.Mutex
	failed  []string
	longest time.Duration
}

func (p *asker) underLoad(names map[string]string) *load {
	l := &load{stop: make(chan struct{})}
	for name, want := range names {
		l.looking.Go(func() {
			for {
				select {
				case <-l.stop:
					return
				default:
				}
				begun := time.Now()
				got, err := p.look(name)
				took := time.Since(begun)
				l.lookups.Add(1)
				l.mu.Lock()
				if l.longest = max(l.longest, took); got != want {
					l.failed = append(l.failed, fmt.Sprintf("%s is %q, %v, after %v", name, got, err, took))
				}
				l.mu.Unlock()
				time.Sleep(time.Millisecond)
			}
		})
	}
	return l
}

// ends stops the load; nothing may have failed, and nobody have waited for a retry.
func (l *load) ends(t *testing.T, what string) {
	t.Helper()
	close(l.stop)
	l.looking.Wait()
	t.Logf("%s: %d lookups, the longest took %v", what, l.lookups.Load(), l.longest)
	if len(l.failed) > 0 {
		t.Errorf("%s: %d of %d lookups failed: %s", what, len(l.failed), l.lookups.Load(), strings.Join(l.failed[:min(5, len(l.failed))], "\n"))
	}
	if l.longest >= 5*time.Second {
		t.Errorf("%s: a lookup took %v: its query was lost", what, l.longest)
	}
}

// No DNS server of the cluster is there, and the agent answers: what it asks others for,
// what it knows of the cluster, what it was told when nobody answers any more.
func TestNamesThroughTheAgent(t *testing.T) {
	n := newNode(t)
	n.AddAddress("192.0.2.100/32")
	outside := n.serveInternet()
	write(t, filepath.Join(n.manifests, "dns.yaml"), noDNSServers)
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1"))
	p := &asker{n.pod("10.244.0.7")}
	n.start("--dns", "cluster.local")
	n.until("pods' devices have the program", func(s agent.Status) bool {
		return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool { return len(devicesOf(l)["dns_from_pod"]) == 2 })
	})
	looks := func(what, name, want string) {
		t.Helper()
		begun := time.Now()
		if got, err := p.look(name); got != want || time.Since(begun) > 4*time.Second {
			t.Fatalf("%s: %s is %q, %v, after %v, not %q\n%s", what, name, got, err, time.Since(begun), want, n.log.String())
		}
	}
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) { // queries are taken once the agent is ready
		if got, _ := p.look("first.example.com."); got == bothFamilies {
			break
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("the agent does not answer:\n%s", n.log.String())
		}
	}
	looks("asked for", "www.example.com.", bothFamilies)
	before := outside.asked.Load()
	looks("kept", "WWW.example.com.", bothFamilies)
	if _, err := p.look("nothing.example.com."); !isNotFound(err) {
		t.Errorf("a name that does not exist: %v", err)
	}
	if n := outside.asked.Load() - before; n < 1 || n > 6 { // for two families; a busy server is asked again
		t.Errorf("the server was asked %d times for a name that does not exist", n)
	}
	n.knowsTheCluster(p)

	n.showsQueries()

	// In the kernel it costs the agent nothing.
	before = n.reason("agent_cache")
	for range 50 {
		looks("in the kernel", "www.example.com.", bothFamilies)
	}
	if more := n.reason("agent_cache") - before; more > 0 {
		t.Errorf("the agent answered %d of 100 queries for what the kernel has learned", more)
	}

	n.showsNamesOutside()

	known := map[string]string{"www.example.com.": bothFamilies, "first.example.com.": bothFamilies, "web.default.svc.cluster.local.": "10.96.0.1"}
	outside.ttl.Store(2) // over soon, and given all the same
	looks("for a moment", "brief.example.com.", bothFamilies)
	known["brief.example.com."] = bothFamilies
	outside.deaf.Store(true)
	l := p.underLoad(known)
	time.Sleep(5 * time.Second)
	l.ends(t, "no server answers")

	l = p.underLoad(known)
	for range agentKills {
		time.Sleep(100 * time.Millisecond)
		n.kill()
		n.start("--dns", "cluster.local")
	}
	l.ends(t, fmt.Sprintf("no server answers, and the agent was killed %d times", agentKills))
}

// agentKills is how often the agent is killed under load.
const agentKills = 20

// reason is how often the layer dns has counted one.
func (n *node) reason(name string) int64 {
	n.t.Helper()
	status, err := n.status()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, l := range status.Layers {
		if l.Name == "dns" {
			return int64(l.Reasons[name])
		}
	}
	n.t.Fatal("status has no layer dns")
	return 0
}

// knowsTheCluster asks for what no program answers.
func (n *node) knowsTheCluster(p *asker) {
	n.t.Helper()
	r, ctx := p.resolver(), context.Background()
	_, services, err := r.LookupSRV(ctx, "http", "tcp", "web.default.svc.cluster.local.")
	if err != nil || len(services) != 1 || *services[0] != (net.SRV{Target: "web.default.svc.cluster.local.", Port: 80, Weight: 100}) {
		n.t.Errorf("SRV: %+v, %v", services, err)
	}
	names, err := r.LookupAddr(ctx, "10.96.0.1")
	if err != nil || !slices.Equal(names, []string{"web.default.svc.cluster.local."}) {
		n.t.Errorf("PTR: %v, %v", names, err)
	}
	texts, err := r.LookupTXT(ctx, "dns-version.cluster.local.")
	if err != nil || !slices.Equal(texts, []string{"1.1.0"}) {
		n.t.Errorf("TXT: %v, %v", texts, err)
	}
}

// showsNamesOutside: what was learned of names outside, and for how long it is known.
func (n *node) showsNamesOutside() {
	n.t.Helper()
	stdout, _, status := millrace(n.t, "show", "names", "WWW.example", "--pins", n.pins, "--run", n.run, "-o", "json")
	var shown struct{ Outside []nameOutside }
	if err := json.Unmarshal([]byte(stdout), &shown); err != nil || status != exitOK || len(shown.Outside) != 1 {
		n.t.Fatalf("show names WWW.example -o json: %v: %s", err, stdout)
	}
	o := shown.Outside[0]
	if o.Name != "www.example.com" || o.A == nil || o.AAAA == nil || fmt.Sprint(o.A.Addresses, o.AAAA.Addresses) != "[192.0.2.1] [2001:db8::1]" ||
		o.A.Answer != "addresses" || time.Until(o.A.Until) > 5*time.Minute+time.Second || time.Until(o.A.Until) < time.Minute || o.A.Stale {
		n.t.Errorf("show names -o json: %s", stdout)
	}
	stdout, _, _ = millrace(n.t, "show", "names", "--pins", n.pins, "--run", n.run)
	if !strings.Contains(stdout, "NAME OUTSIDE") || !strings.Contains(stdout, "192.0.2.1, for ") || !strings.Contains(stdout, "first.example.com") {
		n.t.Errorf("show names: %s", stdout)
	}
}

// showsQueries: the log of queries, and each of their reasons in the documentation.
func (n *node) showsQueries() {
	n.t.Helper()
	stdout, _, status := millrace(n.t, "show", "queries", "WWW", "--run", n.run)
	if status != exitOK || !strings.Contains(stdout, " www.example.com ") || !strings.Contains(stdout, " upstream ") ||
		!strings.Contains(stdout, " WWW.example.com ") || !strings.Contains(stdout, " cache ") || strings.Contains(stdout, "svc.cluster.local") {
		n.t.Errorf("show queries WWW, exit status %d: %s", status, stdout)
	}
	stdout, _, _ = millrace(n.t, "show", "queries", "--run", n.run, "-o", "json")
	var shown struct{ Queries []resolver.Query }
	if err := json.Unmarshal([]byte(stdout), &shown); err != nil || !slices.ContainsFunc(shown.Queries, func(q resolver.Query) bool {
		return q.Name == "dns-version.cluster.local" && q.Type == "TXT" && q.By == "cluster" && q.Rcode == "NOERROR" && q.Records == 1
	}) {
		n.t.Errorf("show queries as JSON: %v: %s", err, stdout)
	}
	page, err := os.ReadFile("../../docs/dns.md")
	if err != nil {
		n.t.Fatal(err)
	}
	for source := range resolver.New(resolver.Settings{Zone: "cluster.local"}).Status().Queries {
		if !strings.Contains(string(page), "| `agent_"+source+"` |") {
			n.t.Errorf("docs/dns.md does not say what agent_%s means", source)
		}
	}
}

func isNotFound(err error) bool {
	var of *net.DNSError
	return errors.As(err, &of) && of.IsNotFound
}
