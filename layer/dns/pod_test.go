package dns

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
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	bpflink "github.com/cilium/ebpf/link"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
)

// elsewhere is what the server on the node answers, to whatever it is asked.
var elsewhere = netip.MustParseAddr("192.0.2.53")

// serve has a DNS server on the node, which gets what is passed up. It returns how many
// queries it got.
func (h *hamlet) serve() *atomic.Int64 {
	h.t.Helper()
	var asked atomic.Int64
	for _, at := range []netip.AddrPort{dns4, dns6} {
		h.AddAddress(netip.PrefixFrom(at.Addr(), at.Addr().BitLen()).String())
		var c *net.UDPConn
		must(h.t, h.Inside(func() (err error) {
			c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
			return err
		}))
		h.t.Cleanup(func() { c.Close() })
		go func() {
			query := make([]byte, 1500)
			for {
				n, from, err := c.ReadFromUDPAddrPort(query)
				if err != nil {
					return
				}
				asked.Add(1)
				_, _ = c.WriteToUDPAddrPort(otherAnswer(query[:n]), from)
			}
		}()
	}
	return &asked
}

func otherAnswer(query []byte) []byte {
	var m dnsmessage.Message
	if m.Unpack(query) != nil || len(m.Questions) != 1 {
		return nil
	}
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}, Body: &dnsmessage.AResource{A: elsewhere.As4()},
		}}
	}
	answer, err := m.Pack()
	if err != nil {
		return nil
	}
	return answer
}

// open begins a layer as the agent does, with the town in force.
func (h *hamlet) open() *Layer {
	h.t.Helper()
	l := New(h.settings)
	must(h.t, l.Open())
	h.t.Cleanup(func() { l.Close() })
	h.apply(l)
	return l
}

func (h *hamlet) apply(l *Layer) layer.Changes {
	h.t.Helper()
	have, err := l.Read()
	must(h.t, err)
	want := l.Plan(town())
	changes := l.Diff(have, want, true)
	_, _, err = l.Apply(have, want, changes)
	must(h.t, err)
	must(h.t, l.Settle())
	return changes
}

// watch has a layer's agent there until the function that it returns is called.
func watch(l *Layer) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = l.Watch(ctx, func() {})
	}()
	return func() { cancel(); <-done }
}

// The resolvers of programs in a pod, with the search list that kubelet gives them:
// glibc's and Go's.
func TestResolversOfPods(t *testing.T) {
	h := newHamlet(t)
	h.serve()
	l := h.open()
	defer watch(l)()
	for _, server := range []netip.AddrPort{dns4, dns6} {
		for _, row := range []struct{ name, want string }{
			{"web", "10.96.0.20 fd00:96::20"},
			{"web.shop", "10.96.0.20 fd00:96::20"},
			{"web.shop.svc", "10.96.0.20 fd00:96::20"},
			{"WEB.shop.svc.cluster.local.", "10.96.0.20 fd00:96::20"},
			{"db", "10.244.1.5 10.244.2.5 10.244.2.7 fd00:244:2::7"},
			{"db-1.db", "10.244.2.5"},
			{"kube-dns.kube-system", "10.96.0.10 fd00:96::a"},
			{"outside", "192.0.2.53"},         // ExternalName: of the server
			{"api.example.com", "192.0.2.53"}, // after what the search list makes of it
			{"nosuch.shop.svc.cluster.local.", ""},
		} {
			for _, program := range []string{"getent", "go"} {
				if got := h.resolve(program, server.Addr(), row.name); got != row.want {
					t.Errorf("%s asks %s for %s: %q, not %q", program, server.Addr(), row.name, got, row.want)
				}
			}
		}
	}
	d, err := l.Describe()
	must(t, err)
	t.Log(d.Reasons)
	if d.Reasons["answered"] == 0 || d.Reasons["nodata"] == 0 || d.Reasons["nxdomain"] == 0 || d.Reasons["left"] == 0 || d.Reasons["not_ours"] == 0 || d.Reasons["lost"] > 0 {
		t.Errorf("the queries came to %v", d.Reasons)
	}
}

// resolve has a program resolve a name in the pod and returns its addresses in order.
func (h *hamlet) resolve(program string, server netip.Addr, name string) string {
	h.t.Helper()
	for _, tool := range []string{"unshare", "getent"} {
		if _, err := exec.LookPath(tool); err != nil {
			h.t.Skipf("needs %s", tool)
		}
	}
	conf := filepath.Join(h.t.TempDir(), "resolv.conf")
	text := fmt.Sprintf("nameserver %s\nsearch shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n", server)
	must(h.t, os.WriteFile(conf, []byte(text), 0o644))
	resolver := []string{"getent", "ahosts", name}
	if program == "go" {
		resolver = []string{os.Args[0], "-test.run", "^TestAsGoProgram$"}
	}
	// a mount namespace of its own, in which /etc/resolv.conf is the pod's
	command := exec.Command("unshare", append([]string{"--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, conf}, resolver...)...)
	command.Env = append(os.Environ(), "RESOLVE="+name)
	var out strings.Builder
	command.Stdout = &out
	must(h.t, netns.Do(h.pod, command.Start))
	_ = command.Wait() // a name that is not there is an error of getent's
	var addresses []netip.Addr
	for _, word := range strings.Fields(out.String()) {
		if addr, err := netip.ParseAddr(word); err == nil {
			addresses = append(addresses, addr)
		}
	}
	slices.SortFunc(addresses, netip.Addr.Compare)
	var words []string
	for _, addr := range slices.Compact(addresses) {
		words = append(words, addr.String())
	}
	return strings.Join(words, " ")
}

// TestAsGoProgram is not a test: it is the program that resolves a name in a pod, or those
// on its input.
func TestAsGoProgram(t *testing.T) {
	name := os.Getenv("RESOLVE")
	if name == "" {
		return
	}
	names := []string{name}
	if name == "-" {
		input, err := io.ReadAll(os.Stdin)
		must(t, err)
		names = strings.Fields(string(input))
	}
	for _, name := range names {
		addresses, _ := net.DefaultResolver.LookupHost(context.Background(), name)
		fmt.Println(strings.Join(addresses, " "))
	}
}

// Where pods are behind a bridge, their queries are for the bridge and not for its port.
func TestPodsBehindABridge(t *testing.T) {
	h := newHamlet(t)
	h.bridged()
	h.open()
	for _, server := range []netip.AddrPort{dns4, dns6} {
		if got, err := h.lookAt(server, "web.shop.svc.cluster.local.", 5*time.Second); err != nil || len(got) != 1 || got[0] != netip.MustParseAddr("10.96.0.20") {
			t.Errorf("%s answers %v, %v, not 10.96.0.20", server, got, err)
		}
	}
}

// When the agent is silent, and when the layer is removed, every query goes to the
// server, and none is lost on the way.
func TestFailOpen(t *testing.T) {
	h := newHamlet(t)
	asked := h.serve()
	h.settings.silence = 3 * mostSilence // a busy machine's agent may be late
	l := h.open()
	stop := watch(l)
	const name = "web.shop.svc.cluster.local."
	web := netip.MustParseAddr("10.96.0.20")
	answers := func(what string, want netip.Addr) {
		t.Helper()
		got, err := h.look(name)
		if err != nil || len(got) != 1 || got[0] != want {
			t.Fatalf("%s: %v, %v, not %s", what, got, err, want)
		}
	}
	until := func(what string, want netip.Addr) {
		t.Helper()
		for begun := time.Now(); ; {
			got, err := h.look(name)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if got[0] == want {
				return
			}
			if time.Since(begun) > 20*time.Second {
				t.Fatalf("%s: after %v it is still %v", what, time.Since(begun), got)
			}
		}
	}
	answers("the agent is there", web)
	time.Sleep(h.settings.silence + beatEvery) // longer than without its beats
	answers("the agent goes on to be there", web)
	if asked.Load() > 0 {
		t.Errorf("the server got %d queries meanwhile", asked.Load())
	}
	stop()
	l.Close()
	until("the agent is gone", elsewhere)
	h.settings.silence = time.Hour
	l = h.open()
	answers("another agent", web)
	l.Close()
	removed, err := New(h.settings).Remove()
	must(t, err)
	if len(removed) == 0 {
		t.Error("nothing was removed")
	}
	answers("the layer is gone", elsewhere)
}

// Behind what translates queries nobody knows what was asked of whom.
func TestInFront(t *testing.T) {
	if !haveTCX() {
		t.Skip("needs Linux 6.6: tcx")
	}
	h := newHamlet(t)
	l := h.open()
	defer watch(l)()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: translator, Type: ebpf.SchedCLS, License: "MIT",
		Instructions: asm.Instructions{asm.LoadImm(asm.R0, 2, asm.DWord), asm.Return()}}) // TC_ACT_SHOT
	must(t, err)
	defer program.Close()
	must(t, h.Inside(func() error {
		other, err := bpflink.AttachTCX(bpflink.TCXOptions{Interface: h.device, Program: program, Attach: ebpf.AttachTCXIngress, Anchor: bpflink.Head()})
		if err == nil {
			t.Cleanup(func() { other.Close() })
		}
		return err
	}))
	if got, err := h.lookAt(dns4, "web.shop.svc.cluster.local.", 100*time.Millisecond); err == nil {
		t.Fatalf("the other program drops, and there is an answer: %v", got)
	}
	changes := h.apply(l)
	if len(changes) != 1 || changes[0].String() != "+ device pod1" {
		t.Errorf("the changes are\n%v", changes)
	}
	if _, err := h.look("web.shop.svc.cluster.local."); err != nil {
		t.Error(err)
	}
	if changes := h.apply(l); len(changes) > 0 {
		t.Errorf("again\n%v", changes)
	}
}

// What an earlier version left serves until the names of this one are there.
func TestAnotherLayout(t *testing.T) {
	h := newHamlet(t)
	h.serve()
	h.open().Close()
	pin := filepath.Join(h.settings.Pins, datapathMapNames)
	must(t, os.Remove(pin))
	old, err := ebpf.NewMap(&ebpf.MapSpec{Name: datapathMapNames, Type: ebpf.Hash, KeySize: 32, ValueSize: 8, MaxEntries: 16})
	must(t, err)
	defer old.Close()
	must(t, old.Pin(pin))
	if _, err := New(h.settings).Look(); err == nil {
		t.Error("another version's map was read")
	}
	l := New(h.settings)
	must(t, l.Open())
	defer l.Close()
	if got, err := h.look("web.shop.svc.cluster.local."); err != nil || len(got) != 1 || got[0] != netip.MustParseAddr("10.96.0.20") {
		t.Errorf("before the names are there: %v, %v", got, err)
	}
	h.apply(l)
	if got, err := h.look("web.shop.svc.cluster.local."); err != nil || got[0] != netip.MustParseAddr("10.96.0.20") {
		t.Errorf("after: %v, %v", got, err)
	}
	found, err := New(h.settings).Look()
	if err != nil || found.Len() != l.Plan(town()).Len() {
		t.Errorf("%v, %v", found, err)
	}
}

// Names of a version that had no search lists are not said to be none.
func TestLookAtAnotherVersions(t *testing.T) {
	h := newHamlet(t)
	if found, err := New(h.settings).Look(); err != nil || found.Len() > 0 {
		t.Errorf("nothing is here: %v, %v", found, err)
	}
	h.open().Close()
	must(t, os.Remove(filepath.Join(h.settings.Pins, datapathMapSearches)))
	found, err := New(h.settings).Look()
	if err == nil || !strings.Contains(err.Error(), h.settings.Pins+": map searches is missing, they are another version's") {
		t.Errorf("%v, %v", found, err)
	}
	must(t, os.Remove(filepath.Join(h.settings.Pins, datapathMapNames)))
	if found, err := New(h.settings).Look(); err != nil || found.Len() > 0 {
		t.Errorf("there are no names: %v, %v", found, err)
	}
}

// What a later version left, which this one does not know, is removed as well, a program in
// force first.
func TestRemoveTakesEveryPin(t *testing.T) {
	h := newHamlet(t)
	before := h.observe()
	h.open().Close()
	later, err := ebpf.NewMap(&ebpf.MapSpec{Name: "later", Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	must(t, err)
	defer later.Close()
	must(t, later.Pin(filepath.Join(h.settings.Pins, "later")))
	program := layertest.Passing(t, "later")
	if haveTCX() {
		must(t, h.Inside(func() error {
			l, err := bpflink.AttachTCX(bpflink.TCXOptions{Interface: h.device, Program: program, Attach: ebpf.AttachTCXIngress})
			if err != nil {
				return err
			}
			t.Cleanup(func() { l.Close() }) // somebody still holds it
			return l.Pin(filepath.Join(h.settings.Pins, layer.LinkPrefix+"later"))
		}))
	}
	planned, err := New(h.settings).Removal()
	must(t, err)
	done, err := New(h.settings).Remove()
	if err != nil || !slices.Equal(texts(planned), texts(done)) {
		t.Errorf("it removed\n%v, %v, not\n%v", done, err, planned)
	}
	if after := h.observe(); after != before {
		t.Errorf("there is\n%s\nnot\n%s", after, before)
	}
}

func texts(changes layer.Changes) (lines []string) {
	for _, change := range changes {
		lines = append(lines, change.String())
	}
	return lines
}

// Earlier versions had the filter where that of layer/masquerade is. It is taken over from
// there: nobody meets a gap, and what comes into that place stays.
func TestFilterOfEarlierVersions(t *testing.T) {
	withoutTCX(t)
	now := ways
	t.Cleanup(func() { ways = now })
	ways = map[string]attach.Way{datapathProgDnsFromPod: {Attach: ebpf.AttachTCXIngress, Order: attach.OrderAnswers}}
	h := newHamlet(t)
	h.open().Close()
	ways = now
	var stop atomic.Bool
	failed := make(chan error, 1)
	go func() {
		defer close(failed)
		for !stop.Load() {
			if _, err := h.look("web.shop.svc.cluster.local."); err != nil {
				failed <- err
				return
			}
		}
	}()
	l := h.open()
	stop.Store(true)
	must(t, <-failed)
	program := layertest.Passing(t, "other")
	hook := attach.Hook{Netns: h.NetNS, Device: h.device, Attach: ebpf.AttachTCXIngress}
	if former := (&attach.Filter{Hook: hook, Program: datapathProgDnsFromPod, Priority: attach.OrderAnswers}); former.Alive() {
		t.Error("the earlier version's is still there")
	}
	other := &attach.Filter{Hook: hook, Program: "other", Priority: attach.OrderAnswers}
	must(t, other.Begin(program))
	if changes := h.apply(l); len(changes) > 0 || !other.Alive() {
		t.Errorf("beside what turns answers back, there is %v, %v to do", other.Alive(), changes)
	}
	if _, err := h.look("web.shop.svc.cluster.local."); err != nil {
		t.Errorf("beside what turns answers back: %v", err)
	}
	l.Close()
	_, err := New(h.settings).Remove()
	must(t, err)
	ours := &attach.Filter{Hook: hook, Program: datapathProgDnsFromPod, Priority: attach.OrderQueries, Former: attach.OrderAnswers}
	if ours.Alive() || !other.Alive() {
		t.Errorf("removed, ours is there: %v; the other: %v", ours.Alive(), other.Alive())
	}
}

// What somebody takes away comes back.
func TestLost(t *testing.T) {
	h := newHamlet(t)
	l := h.open()
	link := filepath.Join(h.settings.Pins, pointAt(h.device).Pin())
	must(t, os.Remove(link))
	must(t, os.Remove(filepath.Join(h.settings.Pins, datapathMapOutcomes)))
	if changes := h.apply(l); len(changes) != 2 {
		t.Errorf("the changes are\n%v", changes)
	}
	if changes := h.apply(l); len(changes) > 0 {
		t.Errorf("again\n%v", changes)
	}
	if _, err := os.Stat(link); err != nil {
		t.Error(err)
	}
}
