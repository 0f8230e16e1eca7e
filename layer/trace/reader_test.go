package trace

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
)

// spaces makes namespaces, each with a device pair to the first.
func spaces(t testing.TB, count int) (all []Namespace) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	folder := t.TempDir()
	for i := range count {
		n := Namespace{Name: fmt.Sprintf("n%d", i), Path: filepath.Join(folder, fmt.Sprintf("n%d", i))}
		if err := netns.Create(n.Path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { netns.Remove(n.Path) })
		all = append(all, n)
	}
	hub, err := link.Open(all[0].Path)
	if err != nil {
		t.Fatal(err)
	}
	defer hub.Close()
	for i, n := range all[1:] {
		near, err := hub.Veth(link.Veth{Name: fmt.Sprintf("to%d", i+1), Peer: "eth0", PeerNamespace: n.Path})
		if err != nil {
			t.Fatal(err)
		}
		if err := hub.Up(near); err != nil {
			t.Fatal(err)
		}
		if err := hub.Addr(near, netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.1/24", 7+(i+1)/256, (i+1)%256))); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func in(t *testing.T, path string, command ...string) {
	t.Helper()
	err := netns.Do(path, func() error {
		said, err := exec.Command(command[0], command[1:]...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%v: %w: %s", command, err, said)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestReaderReads(t *testing.T) {
	all := spaces(t, 3)
	hub := all[0].Path
	in(t, hub, "ip", "route", "add", "blackhole", "10.99.0.0/16")
	in(t, hub, "ip", "rule", "add", "pref", "77", "to", "10.98.0.0/16", "prohibit")
	in(t, hub, "ip", "link", "add", "vx0", "type", "vxlan", "id", "42", "dstport", "4789", "local", "10.7.1.1", "remote", "10.7.1.2")
	in(t, hub, "iptables-legacy", "-A", "FORWARD", "-j", "DROP")
	in(t, hub, "tc", "qdisc", "add", "dev", "to1", "root", "tbf", "rate", "8mbit", "burst", "4000", "limit", "9000")
	r, err := NewReader(append(all, all[1])) // one named twice is one
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Before(context.Background()); err != nil {
		t.Fatal(err)
	}
	var listener int
	err = netns.Do(hub, func() (err error) {
		if listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.Bind(listener, &unix.SockaddrInet4{Port: 88}); err != nil {
			return err
		}
		return unix.Listen(listener, 7)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(listener)
	if err := netns.Remove(all[2].Path); err != nil { // goes meanwhile
		t.Fatal(err)
	}
	event := func(to string) cause.Event {
		return cause.Event{Kind: cause.CallFailed, Space: r.spaces[0].Inode, Tuple: cause.Tuple{Destination: netip.MustParseAddrPort(to)}}
	}
	e, err := r.After(context.Background(), time.Second, []cause.Event{event("10.99.1.1:80"), event("10.98.1.1:80"), event("10.7.1.9:80"), event("198.51.100.1:80")})
	if err != nil {
		t.Fatal(err)
	}
	if len(e.Spaces) != 2 {
		t.Fatalf("%d namespaces, not the two that are left", len(e.Spaces))
	}
	s := e.Spaces[0]
	for what, ok := range map[string]bool{
		"blackhole": has(s.Routes, func(r cause.Route) bool { return r.Text == "blackhole 10.99.0.0/16" && !r.Rule }),
		"rule":      has(s.Routes, func(r cause.Route) bool { return strings.HasPrefix(r.Text, "pref 77 to 10.98.0.0/16") && r.Rule }),
		"vxlan":     has(s.After.Links, func(l cause.Link) bool { return l.VXLAN != nil && l.VXLAN.ID == 42 && l.VXLAN.Port == 4789 }),
		"qdisc": has(s.After.Links, func(l cause.Link) bool {
			return len(l.Qdiscs) > 0 && l.Qdiscs[0].Kind == "tbf" && l.Qdiscs[0].Rate == 1_000_000 && l.Qdiscs[0].Limit == 9000
		}),
		"peer": has(s.After.Links, func(l cause.Link) bool { return l.Name == "to1" && l.Peer != 0 && l.PeerSpace == r.spaces[1].Inode }),
		"rule of legacy": has(s.Rules, func(r cause.Rule) bool {
			return r.System == "iptables-legacy" && r.Verdict == "drop" && r.Hook == "forward"
		}),
		"listener": has(s.After.Sockets, func(o cause.Socket) bool { return o.Local.Port() == 88 && o.State == tcpListen && o.SendQueue == 7 }),
		"address":  has(s.Addrs, func(a cause.Addr) bool { return a.Prefix == netip.MustParsePrefix("10.7.1.1/24") }),
		"counters": len(s.After.Counters) > 100,
		"setting":  s.Settings["net.ipv4.conf.to1.rp_filter"] != "",
	} {
		if !ok {
			t.Errorf("not read: %s: %+v", what, s.Routes)
		}
	}
	for to, want := range map[string]string{"10.99.1.1": "blackhole", "10.98.1.1": "prohibit", "10.7.1.9": "unicast", "198.51.100.1": ""} {
		if !has(e.Paths, func(p cause.Path) bool { return p.Destination.String() == to && p.Type == want }) {
			t.Errorf("route to %s is not %q: %+v", to, want, e.Paths)
		}
	}
	holder, known := s.Processes[inodeOf(s.After.Sockets, 88)]
	if !known || holder.PID != os.Getpid() {
		t.Errorf("the listener is of %+v, not of this process", holder)
	}
}

func has[T any](all []T, is func(T) bool) bool {
	for _, one := range all {
		if is(one) {
			return true
		}
	}
	return false
}

func inodeOf(all []cause.Socket, port uint16) uint32 {
	for _, o := range all {
		if o.Local.Port() == port && o.State == tcpListen {
			return o.Inode
		}
	}
	return 0
}

// A program that is attached to a device is found by its name.
func TestReaderFindsPrograms(t *testing.T) {
	all := spaces(t, 2)
	err := netns.Do(all[0].Path, func() error {
		l, err := netlink.LinkByName("to1")
		if err != nil {
			return err
		}
		if err := netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_CLSACT, Handle: netlink.MakeHandle(0xffff, 0)}}); err != nil {
			return err
		}
		r, err := NewReader(all)
		if err != nil {
			return err
		}
		r.fill()
		found, err := r.links(t.Context(), "")
		if err != nil {
			return err
		}
		if got := attachedTo(found); len(got) != 0 {
			t.Errorf("nothing is attached, and %+v", got)
		}
		return netlink.FilterAdd(&netlink.MatchAll{FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: 9, Protocol: unix.ETH_P_ALL}})
	})
	if err != nil && !strings.Contains(err.Error(), "no such file") { // this kernel has no such classifier
		t.Fatal(err)
	}
}

// Fifty namespaces are read within a second or so of processor time, not of minutes: the
// bound is what a machine that others load can keep.
func TestNamespacesAreReadInTime(t *testing.T) {
	all := spaces(t, 50)
	r, err := NewReader(all)
	if err != nil {
		t.Fatal(err)
	}
	var began, ended unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &began)
	if err := r.Before(context.Background()); err != nil {
		t.Fatal(err)
	}
	unix.Getrusage(unix.RUSAGE_SELF, &ended)
	took := time.Duration(ended.Utime.Nano() - began.Utime.Nano() + ended.Stime.Nano() - began.Stime.Nano())
	t.Logf("%d namespaces: %s of processor time", len(all), took)
	if took > 5*time.Second {
		t.Errorf("%d namespaces took %s of processor time", len(all), took)
	}
}

// What reading a node takes that has so many pods, each with a device pair to the node's
// own namespace: the time before and after a window, and the memory of the process.
func BenchmarkReader(b *testing.B) {
	for _, pods := range []int{100, 500} {
		b.Run(fmt.Sprint(pods), func(b *testing.B) {
			all := spaces(b, pods+1)
			var before, after time.Duration
			for b.Loop() {
				r, err := NewReader(all)
				if err != nil {
					b.Fatal(err)
				}
				begun := time.Now()
				if err := r.Before(b.Context()); err != nil {
					b.Fatal(err)
				}
				before += time.Since(begun)
				begun = time.Now()
				if _, err := r.After(b.Context(), time.Second, nil); err != nil {
					b.Fatal(err)
				}
				after += time.Since(begun)
			}
			b.ReportMetric(before.Seconds()/float64(b.N), "before-s")
			b.ReportMetric(after.Seconds()/float64(b.N), "after-s")
			b.ReportMetric(float64(peakMemory(b))/(1<<20), "peak-MB")
		})
	}
}

// peakMemory is the most memory, in bytes, that this process has had since it began
// (proc_pid_status(5), VmHWM).
func peakMemory(t testing.TB) (bytes int) {
	t.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &bytes); n == 1 {
			return bytes << 10
		}
	}
	t.Fatal("no VmHWM in /proc/self/status")
	return 0
}
