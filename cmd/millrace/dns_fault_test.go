package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/layertest"
)

// dualStack is a Service of both families.
const dualStack = `
apiVersion: v1
kind: Service
metadata: {name: both}
spec: {clusterIPs: [10.96.0.3, "fd00:96::3"], ipFamilies: [IPv4, IPv6], ports: [{name: http, port: 80}]}
`

// ofPods is the resolv.conf that kubelet gives them.
const ofPods = "search default.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n"

// known are the names that are asked for while things fail, and their addresses. Those
// outside have been asked for before.
var known = []string{
	"web=10.96.0.1",
	"both=10.96.0.3,fd00:96::3",
	"both.default.svc.cluster.local.=10.96.0.3,fd00:96::3",
	"nosuch.default.svc.cluster.local.=",
	"www.example.com=192.0.2.1,2001:db8::1",
	"www.example.com.=192.0.2.1,2001:db8::1",
	"brief.example.com.=192.0.2.1,2001:db8::1",
}

// clusterNames are what a DNS server of the cluster knows: known, what is added, and names
// outside.
type clusterNames struct{ added sync.Map }

func (c *clusterNames) knows(name string) ([]netip.Addr, bool) {
	below, ours := strings.CutSuffix(name, ".default.svc.cluster.local.")
	if !strings.HasSuffix(name, ".cluster.local.") {
		return outsideNames(name)
	}
	if added, ok := c.added.Load(below); ok && ours {
		return []netip.Addr{added.(netip.Addr)}, true
	}
	for _, row := range known {
		if label, list, _ := strings.Cut(row, "="); ours && label == below && !strings.Contains(label, ".") {
			var addresses []netip.Addr
			for text := range strings.SplitSeq(list, ",") {
				addresses = append(addresses, netip.MustParseAddr(text))
			}
			return addresses, true
		}
	}
	return nil, false
}

// trouble is a node with a pod, whose names are known and looked up while something fails.
type trouble struct {
	*node
	pod     *asker
	outside *nameServer
	cluster *clusterNames
	// servers is the cluster's DNS server; nil where there is none.
	servers *nameServer
	// pairs is how many lookups of both families there are to be, and mayWait how many of
	// them may wait until they are asked again, and how many fail.
	pairs, mayWait, mayFail int
}

// inTrouble starts everything. What the pod asks for in the end, it has asked for before.
func inTrouble(t *testing.T, withServers bool) *trouble {
	t.Helper()
	n := newNode(t)
	r := &trouble{node: n, cluster: &clusterNames{}, pairs: 2000}
	if os.Getenv("MILLRACE_LONG") != "" {
		r.pairs = 100_000
	}
	if err := n.Inside(func() error { return netns.SetSysctl("net.ipv4.ip_forward", "1") }); err != nil {
		t.Fatal(err)
	}
	n.AddAddress("192.0.2.100/32")
	r.outside = n.serveInternet()
	dns := noDNSServers
	if withServers {
		r.servers = n.serveNames("veth3", "10.244.0.53", r.cluster.knows)
		_, slice, _ := strings.Cut(dnsService, "---")
		dns += "---" + slice
	}
	write(t, filepath.Join(n.manifests, "dns.yaml"), dns)
	write(t, filepath.Join(n.manifests, "web.yaml"), web("web", "10.96.0.1", "10.244.0.1")+"---"+dualStack)
	r.pod = &asker{n.pod("10.244.0.7")}
	r.pod.contain(t, ofPods)
	n.start("--dns", "cluster.local")
	r.outside.ttl.Store(2) // over soon
	r.learns("brief.example.com.", bothFamilies)
	brief := time.Now()
	r.outside.ttl.Store(300)
	r.learns("www.example.com.", bothFamilies)
	r.learns("both.default.svc.cluster.local.", "10.96.0.3 fd00:96::3")
	n.showsSearchList("default.svc.cluster.local svc.cluster.local cluster.local")
	time.Sleep(time.Until(brief.Add(2100 * time.Millisecond)))
	return r
}

// learns waits until a name is known here: nobody is asked beside the agent.
func (r *trouble) learns(name, want string) {
	r.t.Helper()
	for asked := int64(-1); r.servers != nil && asked != r.servers.asked.Load(); {
		asked = r.servers.asked.Load()
		r.finds(name, want)
	}
	r.finds(name, want)
}

// finds waits until a name is found.
func (r *trouble) finds(name, want string) {
	r.t.Helper()
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		got, err := r.pod.look(name)
		if got == want {
			return
		}
		if time.Since(begun) > 20*time.Second {
			r.t.Fatalf("%s is %q, %v\n%s", name, got, err, r.log.String())
		}
	}
}

// libraries are C libraries: how to compile for them, and after how many milliseconds their
// resolvers ask again.
var libraries = map[string]struct {
	compile []string
	again   int
}{"glibc": {[]string{"cc"}, 5000}, "musl": {[]string{"musl-gcc", "-static"}, 2500}}

// lookups is a program in the pod that looks known names up.
type lookups struct {
	library string
	cmd     *exec.Cmd
	in      io.Closer
	out     strings.Builder
}

// looksUp starts one for each library, which look up until they are told to end, each its
// part of the pairs at least.
func (r *trouble) looksUp(pause time.Duration) (all []*lookups) {
	t := r.t
	t.Helper()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, conf, ofPods)
	for library, of := range libraries {
		program := filepath.Join(t.TempDir(), library)
		if _, err := exec.LookPath(of.compile[0]); err != nil {
			t.Run(library, func(t *testing.T) { t.Skipf("needs %s, and there is none", of.compile[0]) })
			continue
		}
		compile := slices.Concat(of.compile, []string{"-O1", "-o", program, filepath.Join("testdata", "lookups.c")})
		if out, err := exec.Command(compile[0], compile[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", compile, err, out)
		}
		words := []string{"--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, conf, program,
			fmt.Sprint(r.pairs / len(libraries)), fmt.Sprint(pause.Microseconds()), fmt.Sprint(of.again - 100)}
		l := &lookups{library: library, cmd: exec.Command("unshare", append(words, known...)...)}
		l.cmd.Stdout, l.cmd.Stderr = &l.out, os.Stderr
		in, err := l.cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		l.in = in
		if err := netns.Do(r.pod.netns, l.cmd.Start); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.cmd.Process.Kill() })
		all = append(all, l)
	}
	return all
}

// end has them all come to their end. None may have failed, and no more than may have waited
// until their library asked again.
func (r *trouble) end(what string, all []*lookups) {
	r.t.Helper()
	for _, l := range all {
		l.in.Close()
	}
	for _, l := range all {
		if err := l.cmd.Wait(); err != nil {
			r.t.Errorf("%s: %s: %v: %s", what, l.library, err, l.out.String())
			continue
		}
		lines := strings.Split(strings.TrimSpace(l.out.String()), "\n")
		var pairs, failed, waits, longest int
		if _, err := fmt.Sscan(lines[len(lines)-1], &pairs, &failed, &waits, &longest); err != nil {
			r.t.Fatalf("%s: %s says %q", what, l.library, l.out.String())
		}
		r.t.Logf("%s: %s: %d pairs of A and AAAA, %d failed, %d waited until they were asked again, the longest took %d ms", what, l.library, pairs, failed, waits, longest)
		if failed > r.mayFail || waits > r.mayWait || pairs < r.pairs/len(libraries) {
			queries, _, _ := millrace(r.t, "show", "queries", "--run", r.run)
			r.t.Errorf("%s: %s: %s\nThe agent's last queries:\n%s", what, l.library, l.out.String(), queries)
		}
	}
}

// cannotFind says whether a name that nobody has asked for is not found: what fails fails.
func (r *trouble) cannotFind(name string) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	if found, err := r.pod.resolver().LookupHost(ctx, name); err == nil {
		r.t.Errorf("%s is found, %v: the test is blind", name, found)
	}
}

// No DNS server of the cluster is there. Names outside that nobody has asked for are found
// too: the agent asks.
func TestNamesWithoutClusterServers(t *testing.T) {
	r := inTrouble(t, false)
	fresh := r.looksUpFresh()
	r.end("no DNS server of the cluster", r.looksUp(0))
	fresh.end(t)
}

// Neither a DNS server of the cluster is there, nor does one outside answer.
func TestNamesWithoutAnyServer(t *testing.T) {
	r := inTrouble(t, false)
	r.outside.deaf.Store(true)
	r.end("a black hole outside", r.looksUp(0))
	r.hasGivenStale()
	r.cannotFind("fresh.example.com.")
}

// The node's table of connections is full, and every packet that is tracked makes an entry
// or is lost.
func TestNamesWhileConntrackIsFull(t *testing.T) {
	r := inTrouble(t, true)
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft, and there is none")
	}
	err := r.Inside(func() error {
		c := exec.Command("nft", "-f", "-")
		c.Stdin = strings.NewReader(`table inet others {
			chain into { type filter hook prerouting priority 0; ct state invalid counter; }
			chain own { type filter hook output priority 0; ct state invalid counter; }
		}`)
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return layertest.FillConntrack()
	})
	if err != nil {
		t.Fatal(err)
	}
	r.nothingIsTracked()
	before := r.servers.asked.Load()
	r.end("the table of connections is full", r.looksUp(0))
	r.nothingIsTracked()
	r.hasGivenStale()
	if n := r.servers.asked.Load() - before; n > 0 {
		t.Errorf("the cluster's DNS server was asked %d times for what is known", n)
	}
}

// hasGivenStale: what was over was asked for, in vain, and given.
func (r *trouble) hasGivenStale() {
	r.t.Helper()
	if r.reason("agent_stale")+r.reason("outside_stale") == 0 {
		r.t.Error("nothing that was over has been given: the test is blind")
	}
}

// nothingIsTracked: the table is full, and what needs an entry is lost.
func (r *trouble) nothingIsTracked() {
	r.t.Helper()
	err := netns.Do(r.pod.netns, func() error {
		c, err := net.DialTimeout("tcp", "203.0.113.53:53", 300*time.Millisecond)
		if err == nil {
			c.Close()
		}
		return err
	})
	if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
		r.t.Errorf("through the node's table of connections: %v, not lost: the test is blind", err)
	}
}

// The agent is killed once a second.
func TestNamesWhileTheAgentIsKilled(t *testing.T) {
	kills := 8
	if os.Getenv("MILLRACE_LONG") != "" {
		kills = 100
	}
	r := inTrouble(t, true)
	fresh := r.looksUpFresh()
	all := r.looksUp(time.Millisecond)
	begun := time.Now()
	var gone, longest time.Duration
	for range kills {
		at := time.Now()
		r.kill()
		r.start("--dns", "cluster.local")
		gone, longest = gone+time.Since(at), max(longest, time.Since(at))
		time.Sleep(time.Second - time.Since(at))
	}
	t.Logf("%d kills in %v, for %v of which no agent was ready, %v at most at a time", kills, time.Since(begun).Round(time.Millisecond), gone.Round(time.Millisecond), longest.Round(time.Millisecond))
	r.end(fmt.Sprintf("the agent was killed %d times", kills), all)
	fresh.end(t)
}

// freshLookups are lookups of names outside that nobody has asked for before, one after the
// other.
type freshLookups struct {
	stop    chan struct{}
	done    sync.WaitGroup
	looked  int
	failed  []string
	waited  int
	late    int // not found, for the test's server outside was not heard in 2 s: the agent waits no longer
	longest time.Duration
}

func (r *trouble) looksUpFresh() *freshLookups {
	f := &freshLookups{stop: make(chan struct{})}
	f.done.Go(func() {
		for ; ; f.looked++ {
			select {
			case <-f.stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
			name := fmt.Sprintf("fresh%d.example.com.", f.looked)
			begun := time.Now()
			got, err := r.pod.look(name)
			took := time.Since(begun)
			f.longest = max(f.longest, took)
			if took > 4900*time.Millisecond {
				f.waited++
			}
			switch {
			case got == bothFamilies:
			case took > 2*time.Second && took < 4900*time.Millisecond:
				f.late++
			default:
				f.failed = append(f.failed, fmt.Sprintf("%s is %q, %v, after %v", name, got, err, took))
			}
		}
	})
	return f
}

// end stops them. None may have failed.
func (f *freshLookups) end(t *testing.T) {
	t.Helper()
	close(f.stop)
	f.done.Wait()
	t.Logf("%d lookups of names that nobody had asked for, %d failed, %d were too late for a busy machine, %d were asked again, the longest took %v", f.looked, len(f.failed), f.late, f.waited, f.longest)
	if len(f.failed) > 0 || f.late > 1+f.looked/50 || f.looked == 0 {
		t.Errorf("%d of %d lookups of names that nobody had asked for failed: %s", len(f.failed), f.looked, strings.Join(f.failed[:min(5, len(f.failed))], "\n"))
	}
}

// A Service that is made while there is no agent resolves too, by the cluster's DNS servers:
// from two seconds after the agent was last heard, for until then the kernel says that there
// is no such name.
func TestNewServiceWhileTheAgentIsDead(t *testing.T) {
	r := inTrouble(t, true)
	r.kill()
	dead := time.Now()
	write(t, filepath.Join(r.manifests, "late.yaml"), web("late", "10.96.0.9", "10.244.0.9"))
	r.cluster.added.Store("late", netip.MustParseAddr("10.96.0.9"))
	r.finds("late.default.svc.cluster.local.", "10.96.0.9")
	took, asked := time.Since(dead), r.servers.asked.Load()
	t.Logf("found %v after the agent was killed", took)
	if took > 4*time.Second || asked == 0 {
		t.Errorf("found after %v, and the servers were asked %d times", took, asked)
	}
	const more = 50
	for range more { // not once more denied
		if got, err := r.pod.look("late.default.svc.cluster.local."); got != "10.96.0.9" {
			t.Fatalf("found, and then %q, %v", got, err)
		}
	}
	if asked := r.servers.asked.Load() - asked; asked < 2*more {
		t.Errorf("the servers were asked %d times by %d lookups: who answered?", asked, more)
	}
	r.start("--dns", "cluster.local")
	r.until("the agent answers for it", func(agent.Status) bool {
		asked := r.servers.asked.Load()
		got, err := r.pod.look("late.default.svc.cluster.local.")
		if got != "10.96.0.9" {
			t.Fatalf("an agent is there again, and it is %q, %v", got, err)
		}
		return r.servers.asked.Load() == asked
	})
}
