package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
)

// traced is a trace that runs until it is stopped.
type traced struct {
	t       *testing.T
	command *exec.Cmd
	out     bytes.Buffer
}

// trace starts one on the ward's two namespaces, and returns when it watches.
func (w *ward) trace(args ...string) *traced {
	w.t.Helper()
	return traceOf(w.t, append([]string{"--netns", w.node + "," + w.pod}, args...)...)
}

// traceOf starts a trace, and returns when it watches.
func traceOf(t *testing.T, args ...string) *traced {
	t.Helper()
	r := &traced{t: t, command: product(append([]string{"trace", "-o", "json"}, args...)...)}
	r.command.Stdout = &r.out
	told, err := r.command.StderrPipe()
	if err == nil {
		err = r.command.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.command.Process.Kill(); r.command.Wait() })
	lines := bufio.NewReader(told)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatalf("trace ended: %v: %s", err, line)
		}
		if strings.Contains(line, watchingWord+" ") {
			break
		}
	}
	go io.Copy(io.Discard, lines)
	return r
}

// stop is Ctrl-C.
func (r *traced) stop() (report traceReport, status int) {
	r.t.Helper()
	if err := r.command.Process.Signal(syscall.SIGINT); err != nil {
		r.t.Fatal(err)
	}
	_ = r.command.Wait()
	if err := json.Unmarshal(r.out.Bytes(), &report); err != nil {
		r.t.Fatalf("%v: %q", err, r.out.String())
	}
	return report, r.command.ProcessState.ExitCode()
}

// refused calls a port of the pod where nobody listens.
func (w *ward) refused(port int) {
	w.must(netns.Do(w.node, func() error {
		_, err := net.DialTimeout("tcp", fmt.Sprintf("%s:%d", wardPod, port), 5*time.Second)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("port %d where nobody listens: %v", port, err)
		}
		return nil
	}))
}

func TestTraceNamesTheCause(t *testing.T) {
	w := newWard(t)
	file := filepath.Join(t.TempDir(), "died.pcapng")
	manifest := filepath.Join(t.TempDir(), "pods.yaml")
	write(t, manifest, "apiVersion: v1\nkind: Pod\nmetadata: {name: web-0, namespace: shop}\n"+
		"spec: {containers: [{name: c, image: x}]}\nstatus: {phase: Running, podIP: "+wardPod+"}\n")
	r := w.trace("--pcap", file, "--source", "dir:"+manifest)
	w.refused(81)
	report, status := r.stop()
	if status != exitFindings || len(report.Verdicts) != 1 || report.Version != 1 {
		t.Fatalf("exit status %d: %s", status, r.out.String())
	}
	v := report.Verdicts[0]
	if v.Cause != "no-listener" || v.Where.Namespace != w.pod || v.Where.Pod != "shop/web-0" || v.Where.Node == "" ||
		v.Tuple == nil || v.Tuple.Destination.String() != wardPod+":81" || v.Tuple.DestinationName != "pod shop/web-0" || v.Fix == "" || v.Owner == "" {
		t.Errorf("%+v", v)
	}
	if len(v.Way) != 2 || v.Way[0].Out != "veth1" || v.Way[1].In != "eth0" || v.Way[1].Namespace != w.pod {
		t.Errorf("its way: %+v", v.Way)
	}
	if packets, err := os.ReadFile(file); err != nil || !bytes.Contains(packets, []byte("died: NO_SOCKET in tcp_v4_rcv, namespace "+w.pod)) {
		t.Errorf("the file of packets: %v, %q", err, packets)
	}
}

// Packets that are asked for and well are told by the time that they take.
func TestTraceTellsTimes(t *testing.T) {
	w := newWard(t)
	var listener *net.UDPConn
	w.must(netns.Do(w.pod, func() (err error) {
		listener, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(wardPod+":9")))
		return err
	}))
	defer listener.Close()
	r := w.trace(wardPod + ":9")
	w.must(netns.Do(w.node, func() error {
		c, err := net.Dial("udp", wardPod+":9")
		if err != nil {
			return err
		}
		defer c.Close()
		for range 5 {
			if _, err := c.Write([]byte("hello")); err != nil {
				return err
			}
			if _, err := listener.Read(make([]byte, 10)); err != nil {
				return err
			}
		}
		return nil
	}))
	report, status := r.stop()
	wire := func(s stepTime) bool {
		return s.From == timeSpot{w.node, "veth1", cause.Left} && s.To == timeSpot{w.pod, "eth0", cause.Came} && s.Packets == 5 && s.Mean > 0 && s.Mean <= s.Longest
	}
	if status != exitOK || !slices.ContainsFunc(report.Times, wire) {
		t.Errorf("exit status %d: %s", status, r.out.String())
	}
	var text bytes.Buffer
	if err := report.print(&text); err != nil || !strings.Contains(text.String(), "time  "+w.node+": left by veth1 -> "+w.pod+": came by eth0  mean ") {
		t.Errorf("%v: %s", err, text.String())
	}
}

func TestTraceOfAHealthyRunNamesNothing(t *testing.T) {
	w := newWard(t)
	var listener net.Listener
	w.must(netns.Do(w.pod, func() (err error) { listener, err = net.Listen("tcp", wardPod+":80"); return err }))
	defer listener.Close()
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	r := w.trace()
	for range 50 {
		w.must(netns.Do(w.node, func() error {
			c, err := net.Dial("tcp", wardPod+":80")
			if err != nil {
				return err
			}
			defer c.Close()
			if _, err := c.Write([]byte("hello")); err != nil {
				return err
			}
			_, err = io.ReadFull(c, make([]byte, 5))
			return err
		}))
	}
	if report, status := r.stop(); status != exitOK || len(report.Verdicts) != 0 || len(report.Missing) != 0 {
		t.Errorf("exit status %d: %s", status, r.out.String())
	}
}

// Verdicts about others are counted, not shown; nor are their packets in the file.
func TestTraceOfTwoEnds(t *testing.T) {
	w := newWard(t)
	file := filepath.Join(t.TempDir(), "died.pcapng")
	r := w.trace(wardNode, wardPod+":82", "--pcap", file)
	w.refused(82)
	w.refused(83)
	w.refused(83)
	report, status := r.stop()
	if status != exitFindings || len(report.Verdicts) != 1 || report.Verdicts[0].Tuple.Destination.Port() != 82 || report.Verdicts[0].Packets != 1 || report.Others != 1 {
		t.Errorf("exit status %d: %s", status, r.out.String())
	}
	packets, err := os.ReadFile(file)
	w.must(err)
	if n := bytes.Count(packets, []byte("died: NO_SOCKET")); n != 1 {
		t.Errorf("%d packets are in the file, not that of port 82 alone: %q", n, packets)
	}
}

// A filter is about counts, verdicts and the file alike, also beside FROM.
func TestTraceOfAFilter(t *testing.T) {
	w := newWard(t)
	file := filepath.Join(t.TempDir(), "died.pcapng")
	r := w.trace("tcp dst portrange 86-87 and not src port 9", wardNode, "--pcap", file)
	w.refused(86)
	w.refused(88)
	w.refused(88)
	report, status := r.stop()
	if status != exitFindings || len(report.Verdicts) != 1 || report.Verdicts[0].Tuple.Destination.Port() != 86 || report.Verdicts[0].Packets != 1 || report.Others != 1 {
		t.Errorf("exit status %d: %s", status, r.out.String())
	}
	packets, err := os.ReadFile(file)
	w.must(err)
	if n := bytes.Count(packets, []byte("died: NO_SOCKET")); n != 1 {
		t.Errorf("%d packets are in the file, not that of port 86 alone: %q", n, packets)
	}
}

// A pod that comes while a trace looks at the whole node is read as all others.
func TestTraceOfAPodThatComes(t *testing.T) {
	needsRoot(t)
	r := traceOf(t)
	w := newWard(t)
	w.must(netns.Do(w.pod, func() error {
		if out, err := exec.Command("ip", "route", "add", "blackhole", "10.197.0.0/16").CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if _, err := net.Dial("udp", "10.197.1.1:80"); !errors.Is(err, syscall.EINVAL) {
			return fmt.Errorf("a call into a black hole: %v", err)
		}
		return nil
	}))
	w.refused(89)
	report, status := r.stop()
	var said []string
	for _, v := range report.Verdicts {
		if strings.HasPrefix(v.Where.Namespace, "namespace "+filepath.Base(w.pod)) {
			said = append(said, v.Cause+": "+v.Title)
		}
	}
	all := strings.Join(said, "; ")
	if status != exitFindings || !strings.Contains(all, "route-blackhole: ") || !strings.Contains(all, "10.197.0.0/16") || !strings.Contains(all, "no-listener: ") {
		t.Errorf("exit status %d: %s; in all %s", status, all, r.out.String())
	}
	if !slices.ContainsFunc(report.Namespaces, func(n string) bool { return strings.HasPrefix(n, "namespace "+filepath.Base(w.pod)) }) {
		t.Errorf("the pod's namespace is not listed: %q", report.Namespaces)
	}
}

// A packet that a firewall drops behind the translation of a Service is found by the
// Service's name, its address, and that of the pod, whichever address it died with.
func TestTraceThroughAService(t *testing.T) {
	w := newWard(t)
	manifests := filepath.Join(t.TempDir(), "web.yaml")
	write(t, manifests, `
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, image: x}]}
status: {phase: Running, podIP: `+wardPod+`}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.7.7, clusterIPs: [10.96.7.7], selector: {app: web}, ports: [{name: http, port: 80, targetPort: 84}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 84, protocol: TCP}]
endpoints: [{addresses: [`+wardPod+`], conditions: {ready: true}}]
`)
	known, err := readNames(t.Context(), &place{}, &wishes{source: "dir:" + manifests})
	w.must(err)
	for _, row := range []struct {
		to, packet string
		asked      bool
	}{
		{"shop/web", "10.96.7.7:80", true}, {"shop/web", wardPod + ":84", true}, {"shop/web", wardPod + ":85", false},
		{"shop/web:80", wardPod + ":84", true}, {"shop/web:81", wardPod + ":84", false},
		{"10.96.7.7:80", wardPod + ":84", true}, {"10.96.0.0/16", wardPod + ":84", true},
		{"shop/web-0", "10.96.7.7:80", true}, {"shop/web-0", wardPod + ":85", true}, {"shop/web-0:85", "10.96.7.7:80", false},
		{"10.97.0.0/16", wardPod + ":84", false},
		{":80", wardPod + ":84", true}, {":84", "10.96.7.7:80", true}, {":81", wardPod + ":84", false},
	} {
		ends, err := known.parseEnds([]string{wardNode, row.to})
		w.must(err)
		q := ends.ask(nil, nil)
		there := cause.Event{Tuple: cause.Tuple{Protocol: 6, Source: netip.MustParseAddrPort(wardNode + ":40000"), Destination: netip.MustParseAddrPort(row.packet)}}
		back := there
		back.Tuple.Source, back.Tuple.Destination = there.Tuple.Destination, there.Tuple.Source
		if q.asked(&there) != row.asked || q.asked(&back) != row.asked {
			t.Errorf("who asks for %s: a packet to %s is asked for: %v, not %v", row.to, row.packet, !row.asked, row.asked)
		}
	}
	r := w.trace(wardNode, "shop/web", "--source", "dir:"+manifests)
	w.refused(84)
	w.refused(85)
	report, _ := r.stop()
	if len(report.Verdicts) != 1 || report.Verdicts[0].Tuple.Destination.Port() != 84 || report.Others != 1 {
		t.Errorf("%s", r.out.String())
	}
}

// An ICMP error is about the packet that it carries.
func TestErrorsAreAboutTheirPacket(t *testing.T) {
	ends, err := (&names{}).parseEnds([]string{"10.1.0.1", "10.2.0.2:80"})
	if err != nil {
		t.Fatal(err)
	}
	q := ends.ask(nil, nil)
	inner := append([]byte{0x45, 0, 0, 40, 0, 0, 0, 0, 9, 6, 0, 0, 10, 1, 0, 1, 10, 2, 0, 2}, 0x9c, 0x40, 0, 80, 0, 0, 0, 0)
	message := append([]byte{0x45, 0, 0, 56, 0, 0, 0, 0, 9, 1, 0, 0, 10, 3, 0, 3, 10, 1, 0, 1, 3, 4, 0, 0, 0, 0, 5, 0x78}, inner...)
	e := cause.Event{Kind: cause.Drop, Packet: message, Tuple: cause.Tuple{Protocol: 1, ICMPType: 3, ICMPCode: 4,
		Source: netip.MustParseAddrPort("10.3.0.3:0"), Destination: netip.MustParseAddrPort("10.1.0.1:0")}}
	if !q.asked(&e) {
		t.Error("fragmentation needed for a packet that is asked for is not")
	}
	e.Packet = slices.Clone(message)
	e.Packet[20+8+16] = 11 // to another host
	if q.asked(&e) {
		t.Error("fragmentation needed for another's packet is asked for")
	}
}

// Whoever kills it finds nothing of it in the kernel.
func TestKilledTraceLeavesNothing(t *testing.T) {
	w := newWard(t)
	r := w.trace()
	infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", r.command.Process.Pid))
	w.must(err)
	var programs []ebpf.ProgramID
	for _, info := range infos {
		text, _ := os.ReadFile(info) // one that was closed meanwhile has none
		for line := range strings.Lines(string(text)) {
			var id ebpf.ProgramID
			if n, _ := fmt.Sscanf(line, "prog_id: %d", &id); n == 1 && !slices.Contains(programs, id) {
				programs = append(programs, id)
			}
		}
	}
	if len(programs) < 8 {
		t.Fatalf("only programs %v are loaded: the test is blind", programs)
	}
	w.must(r.command.Process.Kill())
	_ = r.command.Wait()
	for _, id := range programs {
		for patience := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			p, err := ebpf.NewProgramFromID(id)
			if err != nil {
				break
			}
			p.Close()
			if time.Now().After(patience) {
				t.Fatalf("program %d is still loaded", id)
			}
		}
	}
}

func TestTraceExitStatuses(t *testing.T) {
	for _, row := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{"--for", "-1s"}, exitUsage, "--for -1s: use 0s to 24h"},
		{[]string{"--netns", "absent"}, exitUsage, "--netns absent: /run/netns/absent: no such file"},
		{[]string{"10.0.0.1:x"}, exitUsage, `"10.0.0.1:x": "x" is no port`},
		{[]string{"shop/web"}, exitUsage, `"shop/web": no pod and no Service of this name is known`},
		{[]string{"nobody"}, exitUsage, `"nobody": use an address`},
		{[]string{"1.1.1.1", "1.1.1.2", "1.1.1.3"}, exitUsage, `"1.1.1.3": there are FROM and TO already`},
		{[]string{"tcp prot 443"}, exitUsage, `filter "tcp prot 443", character 5: "prot": and, or, or the end is expected`},
		{[]string{"tcp", "port", "443"}, exitUsage, `"port": there is a filter already, and it is one word for the shell`},
		{[]string{"1.1.1.1", "host web"}, exitUsage, `filter "host web", character 6: "web": an address is expected`},
	} {
		_, stderr, status := millrace(t, append([]string{"trace"}, row.args...)...)
		if status != row.status || !strings.Contains(stderr, row.says) {
			t.Errorf("millrace trace %s: exit status %d, not %d; says %q, not %q", strings.Join(row.args, " "), status, row.status, stderr, row.says)
		}
	}
}

// Every packet of a storm is in the totals, of whatever way to look at it.
func TestBenchDrops(t *testing.T) {
	needsRoot(t)
	stdout, stderr, status := millrace(t, "bench", "drops", "--rounds", "1", "--round-time", "150ms", "-o", "json")
	var report bench.Report
	if err := json.Unmarshal([]byte(stdout), &report); err != nil || status != exitOK {
		t.Fatalf("exit status %d, %v: %s", status, err, stderr)
	}
	for _, watcher := range []string{"counting", "trace", "each"} {
		died, counted := report.Row(watcher, 0, "", bench.MetricDied), report.Row(watcher, 0, "", bench.MetricCounted)
		rate := report.Row(watcher, 0, "", bench.MetricRate(bench.Healthy))
		if died == nil || died.Median == 0 || counted.Median != died.Median || rate == nil || rate.Median == 0 {
			t.Errorf("%s: died %+v, counted %+v, connections %+v", watcher, died, counted, rate)
		}
	}
}
