package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
)

// mostTraceMemory is what a trace may take, whatever others do: kilobytes.
const mostTraceMemory = 150 << 10

// ended is Ctrl-C, and says how long the trace went on after it and the most memory that it
// had, in kilobytes.
func (r *traced) ended() (report traceReport, took time.Duration, memory int64) {
	r.t.Helper()
	begun := time.Now()
	report, _ = r.stop()
	return report, time.Since(begun), r.command.ProcessState.SysUsage().(*syscall.Rusage).Maxrss
}

// closed sends packets to a UDP port of a namespace's loopback where nobody is.
func closed(path string, port, packets int) error {
	return netns.Do(path, func() error {
		n, err := link.Open("")
		if err != nil {
			return err
		}
		defer n.Close()
		if err := n.UpLoopback(); err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for range packets {
			if err := unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		return nil
	})
}

// Namespaces come and go while a trace looks at the whole host: it takes a bounded memory
// and time, counts what died in them, and gives nobody the name of another, although the
// kernel gives the inodes of those that went to those that come.
func TestManyNamespaces(t *testing.T) {
	needsRoot(t)
	passing, standing := 300, 60
	if os.Getenv("MILLRACE_LONG") != "" {
		passing, standing = 10_000, 200
	}
	const basePort, passingPort = 20_000, 30_000
	folder := t.TempDir()
	name := func(kind string, i int) string { return fmt.Sprintf("%s%d-%d", kind, i, os.Getpid()) }
	make := func(name string) string {
		path := filepath.Join(folder, name)
		if err := netns.Create(path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range standing {
		path := make(name("s", i))
		t.Cleanup(func() { netns.Remove(path) })
	}
	pcap := filepath.Join(folder, "died.pcapng")
	r := traceOf(t, "--pcap", pcap)
	for i := 0; i < standing; i += 2 { // each second one goes, and leaves its inode
		must(netns.Remove(filepath.Join(folder, name("s", i))))
	}
	for i := range passing {
		path := make(name("p", i))
		err := closed(path, passingPort+i%30_000, 1)
		must(errors.Join(err, netns.Remove(path)))
	}
	for i := 0; i < standing; i += 2 {
		path := make(name("n", i))
		t.Cleanup(func() { netns.Remove(path) })
		must(closed(path, basePort+i, 3))
	}
	for i := 1; i < standing; i += 2 {
		must(closed(filepath.Join(folder, name("s", i)), basePort+i, 3))
	}
	report, took, memory := r.ended()
	right := map[string]bool{}
	var told uint64 // as died in namespaces that have gone
	for _, v := range report.Verdicts {
		if strings.HasSuffix(v.Where.Namespace, fmt.Sprintf("-%d (gone)", os.Getpid())) {
			told += v.Packets
			if v.Cause != "no-listener" || v.Tuple == nil || v.Where.Namespace != "namespace "+name("p", int(v.Tuple.Destination.Port())-passingPort)+" (gone)" {
				t.Errorf("%s in %s: %s", v.Cause, v.Where.Namespace, v.Title)
			}
			continue
		}
		if !strings.HasSuffix(v.Where.Namespace, fmt.Sprintf("-%d", os.Getpid())) {
			continue // of somebody else on this host
		}
		i := -1
		if v.Tuple != nil {
			i = int(v.Tuple.Destination.Port()) - basePort
		}
		kind := []string{"n", "s"}[i&1]
		if v.Cause != "no-listener" || v.Where.Namespace != "namespace "+name(kind, i) {
			t.Errorf("%s in %s: %s", v.Cause, v.Where.Namespace, v.Title)
		}
		right[v.Where.Namespace] = true
	}
	for i := range standing {
		if n := "namespace " + name([]string{"n", "s"}[i&1], i); !right[n] {
			t.Errorf("%s has no verdict", n)
		}
	}
	var strangers, died, spaces uint64
	for _, m := range report.Missing {
		var others uint64
		if n, _ := fmt.Sscanf(m, "why %d packets died, and %d other events, in %d network", &died, &others, &spaces); n == 3 {
			strangers = died
		}
	}
	if want := uint64(passing); strangers+told+report.Lost < want {
		t.Errorf("%d packets died in namespaces that came and went, %d in ones that were read, %d are told, %d lost: %q", want, told, strangers, report.Lost, report.Missing)
	}
	packets, err := os.ReadFile(pcap)
	must(err)
	for i := 0; i < standing; i += 2 {
		if strings.Contains(string(packets), "namespace "+name("s", i)) {
			t.Errorf("packets are said to have died in %s, where none was", name("s", i))
		}
	}
	t.Logf("%d namespaces that stay, %d that pass: %d MB, %s after Ctrl-C; %d packets died in %d that passed, %d in others that were read meanwhile, %d events lost",
		standing, passing, memory>>10, took.Round(time.Millisecond), strangers, spaces, told, report.Lost)
	if memory > mostTraceMemory {
		t.Errorf("%d kB of memory", memory)
	}
}

// 50,000 sockets in one namespace, of one process if it may: what is wrong beside them is named, at a bounded cost.
func TestManySockets(t *testing.T) {
	w := newWard(t)
	const udp, listeners, connections = 20_000, 10_000, 10_000
	defer w.crowd(udp, listeners, connections)()
	r := w.trace()
	w.refused(9)
	var full int
	w.must(netns.Do(w.pod, func() (err error) {
		if full, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(unix.Bind(full, &unix.SockaddrInet4{Port: 85}), unix.Listen(full, 1))
	}))
	defer unix.Close(full)
	for range 12 {
		w.must(netns.Do(w.node, func() error {
			c, err := net.DialTimeout("tcp", wardPod+":85", 100*time.Millisecond)
			if err == nil {
				t.Cleanup(func() { c.Close() })
			}
			return nil // some have no room
		}))
	}
	report, took, memory := r.ended()
	named := map[string]string{}
	for _, v := range report.Verdicts {
		named[v.Cause] = v.Tuple.Destination.String()
	}
	if len(report.Verdicts) != 2 || named["no-listener"] != wardPod+":9" || !strings.HasSuffix(named["accept-queue-full"], ":85") {
		t.Errorf("named: %v: %+v", named, report.Verdicts)
	}
	if all := strings.Join(report.Missing, "\n"); !strings.Contains(all, "sockets of "+w.pod+": 2000 of ") {
		t.Errorf("what was left out is not told: %q", report.Missing)
	}
	t.Logf("%d sockets: %d MB, %s after Ctrl-C", udp+listeners+2*connections, memory>>10, took.Round(time.Millisecond))
	if memory > mostTraceMemory || took > time.Minute {
		t.Errorf("%d kB of memory, %s", memory, took)
	}
}

// What a pod calls its processes and devices gives a terminal no orders.
func TestTracePrintsNoOrders(t *testing.T) {
	const order = "\x1b[2J\u009b1m\r"
	r := &traceReport{Verdicts: []cause.Verdict{{Title: "evil" + order, Evidence: []string{"one\ntwo" + order}, Fix: order,
		Where: cause.Where{Namespace: "a", Interface: order}}}, Missing: []string{"devices of " + order}}
	var out strings.Builder
	if err := r.print(&out); err != nil {
		t.Fatal(err)
	}
	if text := out.String(); strings.ContainsAny(text, "\x1b\u009b\r") || !strings.Contains(text, "evil?[2J") || !strings.Contains(text, " two?") {
		t.Errorf("%q", text)
	}
}

// asCrowd makes the test's binary a process with very many sockets: its value is how many
// UDP sockets, listeners and connections, and the first port of UDP and of listeners.
const asCrowd = "MILLRACE_TEST_CROWD"

// crowd makes processes in the pod that hold so many sockets together: one, if it may have
// so many open files, else as few as it takes.
func (w *ward) crowd(udp, listeners, connections int) (end func()) {
	w.t.Helper()
	var limit unix.Rlimit
	w.must(unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	processes := 1
	if need := udp + listeners + 2*connections + 500; unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit.Cur, Max: max(limit.Max, uint64(need))}) != nil {
		processes = need/(int(limit.Max)-500) + 1
	}
	w.t.Logf("the sockets are of %d processes: at most %d open files each", processes, limit.Max)
	var ends []func()
	for i := range processes {
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d %d %d %d", asCrowd, udp/processes, listeners/processes, connections/processes,
			32_000+i*udp/processes, 10_000+i*listeners/processes))
		c.Stderr = os.Stderr
		in, err := c.StdinPipe()
		w.must(err)
		out, err := c.StdoutPipe()
		w.must(err)
		w.must(netns.Do(w.pod, c.Start))
		ends = append(ends, func() { in.Close(); c.Wait() })
		w.t.Cleanup(func() { c.Process.Kill() })
		if said, err := bufio.NewReader(out).ReadString('\n'); said != "ready\n" {
			w.t.Fatalf("process %d with many sockets: %q, %v", i, said, err)
		}
	}
	return func() {
		for _, end := range ends {
			end()
		}
	}
}

// beCrowd holds the sockets until its input ends.
func beCrowd(of string) error {
	var udp, listeners, connections, firstUDP, firstTCP int
	if _, err := fmt.Sscan(of, &udp, &listeners, &connections, &firstUDP, &firstTCP); err != nil {
		return err
	}
	need := uint64(udp + listeners + 2*connections + 500)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if limit.Cur < need {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: need, Max: max(need, limit.Max)}); err != nil {
			return err
		}
	}
	at := func(port int) *unix.SockaddrInet4 {
		return &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}
	}
	for i := range udp {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err == nil {
			err = unix.Bind(fd, at(firstUDP+i))
		}
		if err != nil {
			return fmt.Errorf("UDP socket %d: %w", i, err)
		}
	}
	var server int
	for i := range listeners {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err == nil {
			err = errors.Join(unix.Bind(fd, at(firstTCP+i)), unix.Listen(fd, 16))
		}
		if err != nil {
			return fmt.Errorf("listener %d: %w", i, err)
		}
		server = fd
	}
	for i := range connections {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err == nil {
			err = unix.Connect(fd, at(firstTCP+listeners-1))
		}
		if err == nil {
			_, _, err = unix.Accept(server)
		}
		if err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
	}
	fmt.Println("ready")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}
