package dns

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	bpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// agents is what the test's agent answers, where the server on the node answers elsewhere.
var agents = netip.MustParseAddr("192.0.2.77")

// reply is what the test's agent says of a query: its address, but of names that begin
// with "else" it does not know.
func reply(_ context.Context, q Query) ([]byte, bool) {
	if len(q.Message) > 17 && strings.HasPrefix(string(q.Message[13:]), "else") {
		return nil, false
	}
	return answerWith(q.Message, agents), true
}

// attend has an agent that answers what is handed up, until the function that it returns is
// called.
func attend(t testing.TB, l *Layer, answer func(context.Context, Query) ([]byte, bool)) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- l.Serve(ctx, answer) }()
	until(t, "somebody serves", func() bool { return l.isAttended() })
	return sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			must(t, err)
		case <-time.After(20 * time.Second):
			t.Error("Serve does not end")
		}
	})
}

func (l *Layer) isAttended() bool {
	var cookie uint64
	return l.host.(*datapath).Maps[datapathMapAgents].Lookup(uint32(0), &cookie) == nil
}

func until(t testing.TB, what string, done func() bool) {
	t.Helper()
	for begun := time.Now(); !done(); time.Sleep(time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("after %v: not %s", time.Since(begun), what)
		}
	}
}

// reasons are the layer's counters.
func (h *hamlet) reasons(l *Layer) map[string]uint64 {
	h.t.Helper()
	d, err := l.Describe()
	must(h.t, err)
	return d.Reasons
}

// What the kernel has no answer to the agent answers, where it is attached by tcx or as a
// filter, at a device or at a bridge's port.
func TestHandedUp(t *testing.T) {
	for _, row := range []struct {
		what           string
		filter, bridge bool
	}{{"tcx", false, false}, {"filter", true, false}, {"tcx behind a bridge", false, true}, {"filter behind a bridge", true, true}} {
		t.Run(row.what, func(t *testing.T) {
			if row.filter {
				withoutTCX(t)
			}
			h := newHamlet(t)
			if row.bridge {
				h.bridged()
			}
			asked := h.serve()
			l := h.open()
			h.handsUp(l, asked)
		})
	}
}

func (h *hamlet) handsUp(l *Layer, asked *atomic.Int64) {
	t := h.t
	t.Helper()
	stop := attend(t, l, reply)
	for _, server := range []netip.AddrPort{dns4, dns6} {
		for _, name := range []string{"example.com.", "outside.shop.svc.cluster.local."} {
			if got, err := h.lookAt(server, name, 5*time.Second); err != nil || len(got) != 1 || got[0] != agents {
				t.Errorf("%s is asked for %s: %v, %v, not %s", server, name, got, err, agents)
			}
		}
		before := asked.Load()
		if got, err := h.lookAt(server, "else.example.com.", 5*time.Second); err != nil || len(got) != 1 || got[0] != elsewhere {
			t.Errorf("%s is asked for what the agent does not know: %v, %v, not %s", server, got, err, elsewhere)
		}
		if n := asked.Load() - before; n != 1 {
			t.Errorf("the server got %d queries, not one", n)
		}
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("the server got %d queries, not two", n)
	}
	if got := h.reasons(l); got["handed"] != 6 || got["replied"] != 4 || got["back"] != 2 || got["crowded"]+got["lost"]+got["left"]+got["not_ours"] > 0 {
		t.Errorf("the queries came to %v", got)
	}
	if left := keys[datapathSeat](l.host.(*datapath).Maps[datapathMapWaiting]); len(left) > 0 {
		t.Errorf("there still wait %v", left)
	}
	stop()
	if got, err := h.look("example.com."); err != nil || got[0] != elsewhere {
		t.Errorf("the agent has gone: %v, %v, not %s", got, err, elsewhere)
	}
}

// answerWith is the answer to an A query, whatever its name; other types have none.
func answerWith(query []byte, addr netip.Addr) []byte {
	end := questionEnd(query)
	if end == 0 {
		return nil
	}
	answer := append([]byte{}, query[:end]...)
	answer[2], answer[3] = answer[2]|0x80, 0x80
	copy(answer[6:12], make([]byte, 6))
	if binary.BigEndian.Uint16(query[end-4:]) == uint16(dnsmessage.TypeA) {
		answer[7] = 1
		answer = append(append(answer, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4), addr.AsSlice()...)
	}
	return answer
}

// socket opens one in the pod, to the DNS Service.
func (h *hamlet) socket(server netip.AddrPort) (c *net.UDPConn) {
	h.t.Helper()
	must(h.t, netns.Do(h.pod, func() (err error) {
		c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server))
		return err
	}))
	h.t.Cleanup(func() { c.Close() })
	return c
}

// Many queries of many sockets: each answer is to its query, and comes once.
func TestManyHandedUp(t *testing.T) {
	const sockets, inFlight, total = 8, 4, 100_000
	h := newHamlet(t)
	asked := h.serve()
	agent := h.start("answers", "PACE=1us", "PATIENCE=1m")
	var asking sync.WaitGroup
	begun := time.Now()
	for i := range sockets {
		server := dns4
		if i%2 > 0 {
			server = dns6
		}
		c := h.socket(server)
		asking.Go(func() { h.asks(c, i, inFlight, total/sockets) })
	}
	asking.Wait()
	got := h.counters()
	t.Logf("%d queries in %v, with %v of processor time of the agent: %v, the server got %d", total, time.Since(begun), agent.used(), got, asked.Load())
	if got["replied"] < total*9/10 || got["replied"] != got["handed"] || got["handed"]+got["crowded"] != total ||
		uint64(asked.Load()) != got["crowded"] {
		t.Errorf("the queries came to %v", got)
	}
}

// asks sends queries with names and ids of their own over a socket, some at once, and
// checks what comes. Names say who asked for which.
func (h *hamlet) asks(c *net.UDPConn, socket, inFlight, total int) {
	free := make(chan uint16, inFlight)
	names := make([]string, inFlight)
	for i := range inFlight {
		free <- uint16(i)
	}
	go func() {
		for n := range total {
			slot := <-free
			id := uint16(n)<<2 | slot
			names[slot] = fmt.Sprintf("n%d-s%d-i%d.example.com.", n, socket, id)
			query := asking(h.t, names[slot], dnsmessage.TypeA, n%2 > 0)
			binary.BigEndian.PutUint16(query, id)
			if _, err := c.Write(query); err != nil {
				h.t.Error(err)
				return
			}
		}
	}()
	answer := make([]byte, 1500)
	for n := range total {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		size, err := c.Read(answer)
		if err != nil {
			h.t.Errorf("socket %d, after %d answers: %v", socket, n, err)
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(answer[:size]); err != nil {
			h.t.Errorf("%x: %v", answer[:size], err)
			return
		}
		slot := m.ID & 3
		name := m.Questions[0].Name.String()
		if name != names[slot] || !strings.Contains(name, fmt.Sprintf("-s%d-i%d.", socket, m.ID)) || len(m.Answers) != 1 {
			h.t.Errorf("socket %d asked for %s and got %s, id %d", socket, names[slot], name, m.ID)
			return
		}
		free <- slot
	}
}

// A pod's queries wait in seats of its own, and no more than these; what finds none goes to
// the server, and who asks again too. When nobody serves any more, all that wait do.
func TestCrowded(t *testing.T) {
	h := newHamlet(t)
	h.settings.patience = time.Minute
	asked := h.serve()
	l := h.open()
	held := make(chan struct{})
	stop := attend(t, l, func(ctx context.Context, q Query) ([]byte, bool) {
		select {
		case <-ctx.Done():
			return nil, false
		case <-held:
			return reply(ctx, q)
		}
	})
	c := h.socket(dns4)
	const total = 200
	for i := range total {
		query := asking(t, fmt.Sprintf("n%d.example.com.", i), dnsmessage.TypeA, false)
		binary.BigEndian.PutUint16(query, uint16(i))
		_, err := c.Write(query)
		must(t, err)
	}
	got := h.reasons(l)
	if got["handed"] > 64 || got["handed"] < 32 || got["handed"]+got["crowded"] != total {
		t.Errorf("the queries came to %v", got)
	}
	until(t, "what has no seat is with the server", func() bool { return uint64(asked.Load()) == got["crowded"] })
	// one that waits asks again
	first := asking(t, "n0.example.com.", dnsmessage.TypeA, false)
	binary.BigEndian.PutUint16(first, 0)
	_, err := c.Write(first)
	must(t, err)
	if again := h.reasons(l); again["crowded"] != got["crowded"]+1 {
		t.Errorf("who asks again: %v", again)
	}
	stop()
	until(t, "all are with the server", func() bool { return asked.Load() == total+1 })
	if got := h.reasons(l); got["back"] != got["handed"] || got["replied"] > 0 {
		t.Errorf("nobody serves any more: %v", got)
	}
	answers := 0
	for ; answers < total+1; answers++ {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1500)); err != nil {
			break
		}
	}
	if answers != total+1 {
		t.Errorf("%d answers to %d queries", answers, total+1)
	}
}

// What cannot be given now, answer or query, is given when it can be: here the pod's device
// is down, of which the kernel says the same as of a full queue of packets. Where the device
// has gone nobody waits any more.
func TestGivenLater(t *testing.T) {
	h := newHamlet(t)
	h.settings.patience = time.Minute
	asked := h.serve()
	l := h.open()
	held, come := make(chan struct{}), make(chan struct{}, 3)
	stop := attend(t, l, func(ctx context.Context, q Query) ([]byte, bool) {
		come <- struct{}{}
		<-held
		return reply(ctx, q)
	})
	waiting := l.host.(*datapath).Maps[datapathMapWaiting]
	ask := func(id uint16, name string) *net.UDPConn {
		c := h.socket(dns4)
		query := asking(t, name, dnsmessage.TypeA, false)
		binary.BigEndian.PutUint16(query, id)
		_, err := c.Write(query)
		must(t, err)
		<-come
		return c
	}
	answered, back := ask(1, "example.com."), ask(2, "else.example.com.")
	node, err := link.Open(h.NetNS)
	must(t, err)
	defer node.Close()
	device := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Index: h.device}}
	must(t, h.Inside(func() error { return netlink.LinkSetDown(device) }))
	close(held)
	time.Sleep(300 * time.Millisecond)
	if left, got := keys[datapathSeat](waiting), h.reasons(l); len(left) != 2 || got["replied"]+got["back"] > 0 {
		t.Errorf("while the device is down there wait %v: %v", left, got)
	}
	must(t, node.Up(h.device))
	must(t, node.Route(link.Route{To: netip.MustParsePrefix("10.244.1.7/32"), Link: h.device})) // it went with the device
	must(t, node.Neigh(h.device, netip.MustParseAddr("10.244.1.7"), net.HardwareAddr{2, 0, 0, 0, 0, 2}))
	for id, c := range map[uint16]*net.UDPConn{1: answered, 2: back} {
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		answer := make([]byte, 1500)
		if n, err := c.Read(answer); err != nil || n < headerLength || binary.BigEndian.Uint16(answer) != id {
			t.Errorf("query %d, the device is up again: %v, %x", id, err, answer[:n])
		}
	}
	if got := h.reasons(l); got["replied"] != 1 || got["back"] != 1 || asked.Load() != 1 {
		t.Errorf("the server got %d queries: %v", asked.Load(), got)
	}
	held = make(chan struct{})
	ask(3, "example.com.")
	must(t, h.Inside(func() error { return netlink.LinkDel(device) }))
	close(held)
	until(t, "the query of the device that has gone is forgotten", func() bool { return len(keys[datapathSeat](waiting)) == 0 })
	stop()
}

// process is an agent in a process of its own, in the node's namespace.
type process struct {
	t   testing.TB
	cmd *exec.Cmd
}

// start starts one, which answers, or holds what it gets; or a server that listens at an
// address of the node instead. Other variables are
// TestAsAgent's.
func (h *hamlet) start(does string, variables ...string) *process {
	h.t.Helper()
	p := &process{h.t, exec.Command(os.Args[0], "-test.run", "^TestAsAgent$")}
	p.cmd.Env = append(append(os.Environ(), "AGENT="+does, "PINS="+h.settings.Pins), variables...)
	p.cmd.Stderr = os.Stderr
	out, err := p.cmd.StdoutPipe()
	must(h.t, err)
	must(h.t, netns.Do(h.NetNS, func() error {
		// it is to need no more
		kept := []uintptr{unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_PERFMON}
		if does == "listens" {
			kept = []uintptr{unix.CAP_NET_BIND_SERVICE}
		}
		if err := without(kept...); err != nil {
			return err
		}
		return p.cmd.Start()
	}))
	h.t.Cleanup(p.kill)
	reader := bufio.NewReader(out)
	if line, err := reader.ReadString('\n'); line != "serving\n" {
		rest, _ := io.ReadAll(reader)
		h.t.Fatalf("the agent says %q, %v\n%s", line, err, rest)
	}
	return p
}

// kill kills it, as the kernel does when memory is short.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// used is its processor time.
func (p *process) used() time.Duration {
	p.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	must(p.t, err)
	fields := strings.Fields(string(stat[strings.LastIndex(string(stat), ")"):]))
	user, err1 := strconv.Atoi(fields[12])
	system, err2 := strconv.Atoi(fields[13])
	must(p.t, errors.Join(err1, err2))
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}

// TestAsAgent is not a test: it is the agent of another process.
func TestAsAgent(t *testing.T) {
	does := os.Getenv("AGENT")
	if does == "" {
		return
	}
	if does == "listens" {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(dns4))
		must(t, err)
		fmt.Println("serving")
		answerAll(c, agents)
	}
	pace, _ := time.ParseDuration(os.Getenv("PACE"))
	patience, _ := time.ParseDuration(os.Getenv("PATIENCE"))
	silence, err := time.ParseDuration(os.Getenv("SILENCE"))
	if err != nil {
		silence = time.Hour
	}
	h := &hamlet{t: t, settings: Settings{Zone: "cluster.local", Pins: os.Getenv("PINS"), silence: silence, pace: pace, patience: patience}}
	l := h.open()
	defer watch(l)()
	attend(t, l, func(ctx context.Context, q Query) ([]byte, bool) {
		if does == "holds" {
			<-ctx.Done()
		}
		return reply(ctx, q)
	})
	fmt.Println("serving")
	select {}
}

// without takes capabilities from what this thread starts, all but those.
func without(kept ...uintptr) error {
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if slices.Contains(kept, c) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return err
		}
	}
	return nil
}

// counters are those of a layer that another process has open.
func (h *hamlet) counters() map[string]uint64 {
	h.t.Helper()
	spec, err := loadDatapath()
	must(h.t, err)
	names, err := outcomeNames(spec)
	must(h.t, err)
	m, err := ebpf.LoadPinnedMap(filepath.Join(h.settings.Pins, datapathMapOutcomes), nil)
	must(h.t, err)
	defer m.Close()
	counters := map[string]uint64{}
	for i, name := range names {
		var perCPU []uint64
		must(h.t, m.Lookup(uint32(i), &perCPU))
		for _, n := range perCPU {
			counters[name] += n
		}
	}
	return counters
}

// clients ask one query after the other.
type clients struct {
	queries, again atomic.Int64
	stop           chan struct{}
	asking         sync.WaitGroup
}

// askOn has clients ask on, each again after so long, until they are stopped.
func (h *hamlet) askOn(n int, patience time.Duration) *clients {
	a := &clients{stop: make(chan struct{})}
	for i := range n {
		c := h.socket([]netip.AddrPort{dns4, dns6}[i%2])
		a.asking.Go(func() {
			for id := uint16(1); ; id++ {
				select {
				case <-a.stop:
					return
				default:
				}
				_, tries := h.insist(c, id, patience)
				a.queries.Add(1)
				a.again.Add(int64(tries - 1))
			}
		})
	}
	return a
}

func (a *clients) end() { close(a.stop); a.asking.Wait() }

// An agent is killed under load, and nobody follows: what it had taken the clients ask
// again, and that and all else goes to the server at once, though the agent's last beat is
// fresh.
func TestKilledUnderLoad(t *testing.T) {
	const atOnce, patience = 4, 3 * time.Second
	h := newHamlet(t)
	h.serve()
	agent := h.start("answers", "PACE=1us")
	a := h.askOn(atOnce, patience)
	time.Sleep(500 * time.Millisecond)
	agent.kill()
	if addr, n := h.insist(h.socket(dns4), 7, patience); addr != elsewhere || n > 1 {
		t.Errorf("asked right after the kill: %s, after %d tries", addr, n)
	}
	time.Sleep(500 * time.Millisecond)
	a.end()
	t.Logf("%d queries, of which %d were asked again: %v", a.queries.Load(), a.again.Load(), h.counters())
	if n := a.again.Load(); n > atOnce {
		t.Errorf("of %d clients, each with one query in flight, %d asked again", atOnce, n)
	}
}

// One agent after the other is killed under load, and another follows: nobody has to ask
// again, for what was taken the next one answers.
func TestOneAfterTheOther(t *testing.T) {
	const kills = 10
	h := newHamlet(t)
	h.serve()
	agent := h.start("answers", "PACE=1us", "PATIENCE=1m")
	a := h.askOn(4, time.Minute) // longer than any of them takes to begin
	for range kills {
		time.Sleep(200 * time.Millisecond)
		agent.kill()
		agent = h.start("answers", "PACE=1us", "PATIENCE=1m")
	}
	a.end()
	t.Logf("%d kills, %d queries, of which %d were asked again: %v", kills, a.queries.Load(), a.again.Load(), h.counters())
	if a.again.Load() > 0 {
		t.Errorf("%d queries were asked again", a.again.Load())
	}
}

// insist asks until there is an answer, and returns its address and how often it asked.
func (h *hamlet) insist(c *net.UDPConn, id uint16, patience time.Duration) (netip.Addr, int) {
	query := asking(h.t, fmt.Sprintf("n%d.example.com.", id), dnsmessage.TypeA, false)
	binary.BigEndian.PutUint16(query, id)
	answer := make([]byte, 1500)
	for n := 1; n < 20; n++ {
		if _, err := c.Write(query); err != nil {
			h.t.Error(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(patience))
		for {
			size, err := c.Read(answer)
			if err != nil {
				break
			}
			if size > 16 && binary.BigEndian.Uint16(answer) == id {
				return netip.AddrFrom4([4]byte(answer[size-4 : size])), n
			}
		}
	}
	h.t.Errorf("no answer to query %d", id)
	return netip.Addr{}, 0
}

// What an agent had taken when it was killed, its successor answers: nobody asks again.
func TestSuccessorAnswers(t *testing.T) {
	h := newHamlet(t)
	asked := h.serve()
	agent := h.start("holds", "PATIENCE=1m")
	const total = 20
	sockets := map[*net.UDPConn]uint16{}
	for i := range total {
		c := h.socket([]netip.AddrPort{dns4, dns6}[i%2])
		query := asking(t, fmt.Sprintf("n%d.example.com.", i), dnsmessage.TypeA, false)
		binary.BigEndian.PutUint16(query, uint16(i))
		sockets[c] = uint16(i)
		_, err := c.Write(query)
		must(t, err)
	}
	begun := time.Now()
	taken := h.counters()["handed"]
	agent.kill()
	h.start("answers", "PATIENCE=1m")
	for c, id := range sockets {
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		answer := make([]byte, 1500)
		if n, err := c.Read(answer); err != nil || binary.BigEndian.Uint16(answer) != id || n < 16 {
			t.Errorf("query %d: %v, %x", id, err, answer[:n])
		}
	}
	t.Logf("%d taken by the agent that was killed, all answered %v after: %v", taken, time.Since(begun), h.counters())
	if taken < total-2 || uint64(asked.Load()) != total-taken {
		t.Errorf("%d of %d were taken, the server got %d", taken, total, asked.Load())
	}
}

// What an agent had taken when it was killed goes to the server when the layer is removed:
// nobody asks again.
func TestRemoveGivesBack(t *testing.T) {
	h := newHamlet(t)
	h.settings.patience = time.Minute
	asked := h.serve()
	agent := h.start("holds", "PATIENCE=1m")
	const total = 10
	var sockets []*net.UDPConn
	for i := range total {
		c := h.socket([]netip.AddrPort{dns4, dns6}[i%2])
		_, err := c.Write(asking(t, fmt.Sprintf("n%d.example.com.", i), dnsmessage.TypeA, false))
		must(t, err)
		sockets = append(sockets, c)
	}
	before := h.counters()
	agent.kill()
	if before["handed"] < total-2 {
		t.Fatalf("the agent that was killed had not taken them: %v", before)
	}
	_, err := New(h.settings).Remove()
	must(t, err)
	for i, c := range sockets {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		answer := make([]byte, 1500)
		if n, err := c.Read(answer); err != nil || n < headerLength || !strings.HasPrefix(string(answer[13:]), fmt.Sprint("n", i)) {
			t.Errorf("query %d: %v, %x", i, err, answer[:n])
		}
	}
	if asked.Load() != total {
		t.Errorf("the server got %d of %d queries", asked.Load(), total)
	}
}

// An agent hangs. Who asks it in the moment until that is noticed asks again, and that goes
// to the server; then nobody asks it any more.
func TestAgentHangs(t *testing.T) {
	h := newHamlet(t)
	h.serve()
	agent := h.start("answers", "SILENCE=2s")
	must(t, agent.cmd.Process.Signal(syscall.SIGSTOP))
	begun := time.Now()
	c := h.socket(dns4)
	if addr, n := h.insist(c, 1, 200*time.Millisecond); addr != elsewhere || n < 2 {
		t.Errorf("right after: %s, after %d tries", addr, n)
	}
	id := uint16(1)
	until(t, "nobody waits for the agent any more", func() bool {
		id++
		addr, n := h.insist(c, id, 200*time.Millisecond)
		return addr == elsewhere && n == 1
	})
	t.Logf("the agent is asked no more %v after it hangs, %d queries were asked twice", time.Since(begun), id-1)
	must(t, agent.cmd.Process.Signal(syscall.SIGCONT))
	until(t, "the agent answers again", func() bool {
		addr, _ := h.insist(h.socket(dns6), 3, 5*time.Second)
		return addr == agents
	})
}

// A pod that asks as fast as it can costs the agent no more than its pace allows, and
// another pod has its answers from the agent meanwhile, at the first try.
func TestStorm(t *testing.T) {
	h := newHamlet(t)
	other := &hamlet{Bed: h.Bed, t: t, settings: h.settings, pod: filepath.Join(t.TempDir(), "other")}
	must(t, netns.Create(other.pod))
	t.Cleanup(func() { must(t, netns.Remove(other.pod)) })
	other.connect("pod2", other.pod, "10.244.1.8/32", "fd00:244:1::8/128")
	h.serve()
	agent := h.start("answers")
	stop := make(chan struct{})
	var beside sync.WaitGroup
	answers := 0
	beside.Go(func() {
		for c := other.socket(dns6); ; answers++ {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
			if addr, n := other.insist(c, uint16(answers), 5*time.Second); addr != agents || n > 1 {
				t.Errorf("another pod: %s, after %d tries", addr, n)
			}
		}
	})
	c := h.socket(dns4)
	begun, before := time.Now(), agent.used()
	sent := 0
	query := asking(t, "junk0000.example.com.", dnsmessage.TypeTXT, true)
	for ; time.Since(begun) < 2*time.Second; sent++ {
		binary.BigEndian.PutUint16(query, uint16(sent))
		binary.BigEndian.PutUint32(query[13:], uint32(sent)|0x61616161)
		_, _ = c.Write(query) // the server's socket may be full
	}
	took := time.Since(begun)
	close(stop)
	beside.Wait()
	got := h.counters()
	t.Logf("%d queries in %v, %v of processor time of the agent, %d answers for another pod: %v", sent, took, agent.used()-before, answers, got)
	most := uint64(took.Seconds()*2000) + 256 + 64
	if taken := got["handed"] - uint64(answers); taken > most || taken+got["crowded"] != uint64(sent) || taken < min(uint64(sent), most)/4 {
		t.Errorf("%d were taken, at most %d may", taken, most)
	}
	if answers < 10 {
		t.Errorf("another pod had %d answers", answers)
	}
}

// What a query costs the node that is handed up, beside one that goes to a server on it, of
// processor time: the program's by the kernel's own clock, and that of the process that
// answers, in which the kernel also brings the answer to the pod. Both answer the same,
// with as little as can be done; 4 sockets have 4 queries each in flight.
func TestCostOfHandingUp(t *testing.T) {
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		needKernel(t, err)
	}
	defer stats.Close()
	const total = 40_000
	cost := map[string]time.Duration{}
	for _, does := range []string{"answers", "listens"} {
		t.Run(does, func(t *testing.T) {
			h := newHamlet(t)
			if does == "listens" {
				h.AddAddress(netip.PrefixFrom(dns4.Addr(), 32).String())
				h.open().Close()
			} else {
				h.serve() // for those without a seat
			}
			answers := h.start(does, "PACE=1us", "PATIENCE=1m")
			program, used := h.programTime(), answers.used()
			var asking sync.WaitGroup
			for i := range 4 {
				c := h.socket(dns4)
				asking.Go(func() { h.asks(c, i, 4, total/4) })
			}
			asking.Wait()
			cost[does] = (answers.used() - used) / total
			t.Logf("%v of a process a query, %v of the program", cost[does], (h.programTime()-program)/total)
		})
	}
	if cost["answers"] > 10*cost["listens"] {
		t.Errorf("a query that is handed up costs the agent %v, a server %v", cost["answers"], cost["listens"])
	}
}

// programTime is how long the program at the pod's device has run.
func (h *hamlet) programTime() time.Duration {
	h.t.Helper()
	var id ebpf.ProgramID
	must(h.t, h.Inside(func() error {
		found, err := bpflink.QueryPrograms(bpflink.QueryOptions{Target: h.device, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			id = found.Programs[0].ID
		}
		return err
	}))
	program, err := ebpf.NewProgramFromID(id)
	must(h.t, err)
	defer program.Close()
	ran, err := program.Stats()
	must(h.t, err)
	return ran.Runtime
}

// answerAll answers all queries to a socket until it is closed.
func answerAll(c *net.UDPConn, addr netip.Addr) {
	query := make([]byte, 1500)
	for {
		n, from, err := c.ReadFromUDPAddrPort(query)
		if err != nil {
			return
		}
		_, _ = c.WriteToUDPAddrPort(answerWith(query[:n], addr), from)
	}
}
