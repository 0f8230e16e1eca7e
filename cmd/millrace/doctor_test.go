package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// ward is a node with a pod, in namespaces of the test's own.
type ward struct {
	t         *testing.T
	node, pod string
}

const (
	wardNode = "10.9.0.1"
	wardPod  = "10.9.0.2"
)

func newWard(t *testing.T) *ward {
	t.Helper()
	needsRoot(t)
	folder := t.TempDir()
	w := &ward{t, filepath.Join(folder, "node"), filepath.Join(folder, "pod")}
	for _, path := range []string{w.node, w.pod} {
		w.must(netns.Create(path))
		t.Cleanup(func() { netns.Remove(path) })
		w.sysctl(path, "net.ipv6.conf.default.accept_dad", "0") // or addresses change for a second
	}
	nodes, err := link.Open(w.node)
	w.must(err)
	defer nodes.Close()
	pods, err := link.Open(w.pod)
	w.must(err)
	defer pods.Close()
	near, err := nodes.Veth(link.Veth{Name: "veth1", Peer: "eth0", PeerNamespace: w.pod})
	w.must(err)
	far, err := pods.Index("eth0")
	w.must(err)
	for _, end := range []struct {
		net     *link.Net
		index   int
		address string
	}{{nodes, near, wardNode}, {pods, far, wardPod}} {
		w.must(end.net.UpLoopback())
		w.must(end.net.Addr(end.index, netip.PrefixFrom(netip.MustParseAddr(end.address), 24)))
		w.must(end.net.Up(end.index))
	}
	w.must(pods.Route(link.Route{To: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr(wardNode), Link: far}))
	w.sysctl(w.node, "net.ipv4.ip_forward", "1")
	return w
}

func (w *ward) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *ward) sysctl(space, name, value string) {
	w.t.Helper()
	w.must(netns.Do(space, func() error { return netns.SetSysctl(name, value) }))
}

// shell runs a command in a namespace.
func (w *ward) shell(space, command string) {
	w.t.Helper()
	c := exec.Command("sh", "-ec", command)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	w.must(netns.Do(space, c.Start))
	if err := c.Wait(); err != nil {
		w.t.Fatalf("%s: %v: %s", command, err, out.String())
	}
}

// seen is the JSON that a script reads.
type seen struct {
	Header struct {
		Namespaces int
		Unseen     []string
	}
	Checks []struct {
		ID, Severity, Status, Fix, Undo string
		Evidence                        []doctor.Evidence
	}
}

// doctor runs `millrace doctor` on the node, and again and again what happens meanwhile.
func (w *ward) doctor(meanwhile func(), args ...string) (s seen, status int) {
	w.t.Helper()
	c := product(append([]string{"doctor", "-o", "json", "--for", "0.7s"}, args...)...)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	w.must(netns.Do(w.node, c.Start))
	ended := make(chan struct{})
	go func() { c.Wait(); close(ended) }()
	for running := true; running; {
		if meanwhile != nil {
			meanwhile()
		}
		select {
		case <-ended:
			running = false
		case <-time.After(20 * time.Millisecond):
		}
	}
	if err := json.Unmarshal(out.Bytes(), &s); err != nil {
		w.t.Fatalf("%v: printed %q, said %q", err, out.String(), errs.String())
	}
	return s, c.ProcessState.ExitCode()
}

// open makes a socket in a namespace, which the test closes.
func (w *ward) open(space string, family, kind, protocol int) (fd int) {
	w.t.Helper()
	w.must(netns.Do(space, func() (err error) {
		fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
		return err
	}))
	w.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func at(address string, port int) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Addr: netip.MustParseAddr(address).As4(), Port: port}
}

// listen makes a server that never takes its connections.
func (w *ward) listen(space, address string, port, backlog int) {
	fd := w.open(space, unix.AF_INET, unix.SOCK_STREAM, 0)
	w.must(unix.Bind(fd, at(address, port)))
	w.must(unix.Listen(fd, backlog))
}

// connecting gives a function that begins a connection; at most n are made.
func (w *ward) connecting(space, address string, port, n int) func() {
	return func() {
		if n--; n >= 0 {
			unix.Connect(w.open(space, unix.AF_INET, unix.SOCK_STREAM, 0), at(address, port)) // EINPROGRESS
		}
	}
}

// sending gives a function that sends datagrams, ten each time.
func (w *ward) sending(space, address string, port, size int) func() {
	fd := w.open(space, unix.AF_INET, unix.SOCK_DGRAM, 0)
	return func() {
		for range 10 {
			unix.Sendto(fd, make([]byte, size), 0, at(address, port))
		}
	}
}

// raw gives a function that sends an IPv4 packet as it is.
func (w *ward) raw(space, to string, packet func() []byte) func() {
	fd := w.open(space, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	return func() { unix.Sendto(fd, packet(), 0, at(to, 0)) }
}

// header is that of an IPv4 packet, whose checksum the kernel makes.
func header(protocol byte, fragment uint16, from, to string, payload []byte) []byte {
	h := make([]byte, 20, 20+len(payload))
	h[0], h[8], h[9] = 0x45, 64, protocol
	binary.BigEndian.PutUint16(h[4:], 77)
	binary.BigEndian.PutUint16(h[6:], fragment)
	copy(h[12:], netip.MustParseAddr(from).AsSlice())
	copy(h[16:], netip.MustParseAddr(to).AsSlice())
	return append(h, payload...)
}

// syn begins a connection from an address that never answers, each time another port.
func syn(from, to string, port uint16) func() []byte {
	client := uint16(10000)
	return func() []byte {
		client++
		s := make([]byte, 20)
		binary.BigEndian.PutUint16(s, client)
		binary.BigEndian.PutUint16(s[2:], port)
		s[12], s[13], s[14] = 0x50, 2, 0x20
		sum := uint32(6 + len(s))
		for _, part := range [][]byte{netip.MustParseAddr(from).AsSlice(), netip.MustParseAddr(to).AsSlice(), s} {
			for i := 0; i < len(part); i += 2 {
				sum += uint32(binary.BigEndian.Uint16(part[i:]))
			}
		}
		for sum>>16 > 0 {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(s[16:], ^uint16(sum))
		return header(unix.IPPROTO_TCP, 0, from, to, s)
	}
}

// faults are made in a ward; each gives what is to happen while the doctor looks.
var faults = []struct {
	id, what string
	inject   func(w *ward) func()
	status   doctor.Status
	scope    string // where it is to be seen
}{
	{"HS-04", "a full accept queue", func(w *ward) func() {
		w.listen(w.pod, "0.0.0.0", 80, 1)
		return w.connecting(w.node, wardPod, 80, 20)
	}, doctor.Fail, "namespace pod"},
	{"HS-05", "a short limit", func(w *ward) func() { w.sysctl(w.pod, "net.core.somaxconn", "128"); return nil }, doctor.Warn, "namespace pod"},
	{"HS-06", "too many handshakes", func(w *ward) func() {
		w.sysctl(w.pod, "net.ipv4.tcp_syncookies", "0")
		w.sysctl(w.pod, "net.ipv4.tcp_max_syn_backlog", "8")
		w.listen(w.pod, "0.0.0.0", 80, 128)
		return w.raw(w.node, wardPod, syn("10.99.0.1", wardPod, 80))
	}, doctor.Warn, "namespace pod"},
	{"HS-07", "SYN cookies", func(w *ward) func() {
		w.sysctl(w.pod, "net.ipv4.tcp_syncookies", "2") // for every connection
		w.listen(w.pod, "0.0.0.0", 80, 128)
		return w.connecting(w.node, wardPod, 80, 20)
	}, doctor.Warn, "namespace pod"},
	{"HS-08", "tcp_tw_reuse", func(w *ward) func() { w.sysctl(w.pod, "net.ipv4.tcp_tw_reuse", "1"); return nil }, doctor.Warn, "namespace pod"},
	{"HS-09", "no local ports", func(w *ward) func() {
		w.sysctl(w.pod, "net.ipv4.ip_local_port_range", "40000 40019")
		w.listen(w.node, "0.0.0.0", 80, 128)
		dial := w.connecting(w.pod, wardNode, 80, 18)
		for range 18 {
			dial()
		}
		return nil
	}, doctor.Warn, "namespace pod"},
	{"HS-14", "a slow UDP server", func(w *ward) func() { return w.slowUDP(9000) }, doctor.Warn, "namespace pod"},
	{"DN-10", "a slow DNS server", func(w *ward) func() { return w.slowUDP(53) }, doctor.Warn, "namespace pod"},
	{"HS-20", "strict reverse path filter", func(w *ward) func() {
		w.shell(w.pod, "ip route del default")
		w.sysctl(w.pod, "net.ipv4.conf.all.rp_filter", "1")
		return w.raw(w.node, wardPod, func() []byte {
			return header(unix.IPPROTO_UDP, 0, "203.0.113.9", wardPod, []byte{0, 9, 0, 9, 0, 8, 0, 0})
		})
	}, doctor.Fail, "namespace pod"},
	{"HS-21", "no forwarding", func(w *ward) func() { w.sysctl(w.node, "net.ipv4.ip_forward", "0"); return nil }, doctor.Fail, "namespace pod"},
	{"HS-29", "more than a rate allows", func(w *ward) func() {
		w.shell(w.pod, "tc qdisc add dev eth0 root tbf rate 8kbit burst 2000 limit 3000")
		return w.sending(w.pod, wardNode, 9, 1000)
	}, doctor.Warn, "namespace pod"},
	{"HS-31", "no room for TIME_WAIT", func(w *ward) func() {
		w.sysctl(w.pod, "net.ipv4.tcp_max_tw_buckets", "1")
		return func() { w.closed(w.pod, 4) }
	}, doctor.Warn, "namespace pod"},
	{"HS-35", "wrong checksums", func(w *ward) func() {
		return w.raw(w.node, wardPod, func() []byte {
			return header(unix.IPPROTO_UDP, 0, wardNode, wardPod, []byte{0, 9, 0, 9, 0, 8, 0xba, 0xad})
		})
	}, doctor.Warn, "namespace pod"},
	{"HS-36", "a node without a route", func(w *ward) func() { return w.sending(w.pod, "203.0.113.9", 9, 8) }, doctor.Warn, "node"},
	{"HS-36", "a pod without a route", func(w *ward) func() {
		w.shell(w.pod, "ip route del default")
		return w.sending(w.pod, "203.0.113.9", 9, 8)
	}, doctor.Warn, "namespace pod"},
	{"HS-37", "a lost fragment", func(w *ward) func() {
		w.sysctl(w.pod, "net.ipv4.ipfrag_time", "1")
		id := uint16(0)
		return w.raw(w.node, wardPod, func() []byte {
			p := header(unix.IPPROTO_UDP, 0x2000, wardNode, wardPod, make([]byte, 16)) // more is to come
			id++
			binary.BigEndian.PutUint16(p[4:], id)
			return p
		})
	}, doctor.Warn, "namespace pod"},
	{"CT-12", "a log of odd packets", func(w *ward) func() { w.sysctl(w.pod, "net.netfilter.nf_conntrack_log_invalid", "17"); return nil }, doctor.Warn, "namespace pod"},
	{"CT-05", "no port for a translation", func(w *ward) func() {
		w.shell(w.node, "nft 'table ip t { chain c { type nat hook postrouting priority 100; ip protocol udp snat to 10.9.0.1:5000-5000; }; }'")
		w.shell(w.node, "ip link add far type veth peer name farther; ip addr add 10.8.0.1/24 dev far; ip link set far up; ip link set farther up; ip neigh add 10.8.0.2 lladdr 02:00:00:00:00:02 dev far")
		first, second := w.sending(w.pod, "10.8.0.2", 9, 8), w.sending(w.pod, "10.8.0.2", 9, 8)
		return func() { first(); second() }
	}, doctor.Warn, "node"},
	{"MT-01", "a tunnel too wide", func(w *ward) func() {
		w.shell(w.node, "ip link add vx type vxlan id 7 dstport 4789 remote 10.9.0.9; ip link set vx mtu 1500 up; ip route add default via 10.9.0.9 dev veth1 onlink")
		return nil
	}, doctor.Warn, "node"},
	{"MT-06", "fragments", func(w *ward) func() {
		w.shell(w.node, "ip link add vx type vxlan id 7 dstport 4789 remote 10.9.0.9; ip link set vx up")
		return w.sending(w.node, wardPod, 9, 2000)
	}, doctor.Warn, "node"},
	{"MT-12", "ends of different MTUs", func(w *ward) func() { w.shell(w.pod, "ip link set eth0 mtu 1400"); return nil }, doctor.Fail, "namespace pod"},
	{"DN-06", "the node's resolver", func(w *ward) func() { w.process("nameserver 127.0.0.53"); return nil }, doctor.Fail, "namespace pod"},
	{"DN-08", "four name servers", func(w *ward) func() {
		w.process(strings.Repeat("nameserver 10.0.0.1\\n", 4))
		return nil
	}, doctor.Warn, "namespace pod"},
	{"CT-06", "packets that belong to nothing", func(w *ward) func() {
		w.shell(w.pod, "nft 'table ip t { chain c { type filter hook input priority 0; ct state new accept; }; }'")
		return w.raw(w.node, wardPod, func() []byte { // a TCP header that is shorter than one can be
			return header(unix.IPPROTO_TCP, 0, wardNode, wardPod, []byte{0, 9, 0, 9, 0, 0, 0, 0})
		})
	}, doctor.Warn, "namespace pod"},
	{"CT-09", "half-closed connections beside a kube-proxy", func(w *ward) func() {
		w.sysctl(w.node, "net.netfilter.nf_conntrack_tcp_timeout_close_wait", "60")
		w.called("kube-proxy")
		return nil
	}, doctor.Warn, "node"},
	{"CT-15", "ten minutes", func(w *ward) func() {
		w.sysctl(w.pod, "net.netfilter.nf_conntrack_tcp_timeout_established", "600")
		return nil
	}, doctor.Warn, "namespace pod"},
	{"CT-16", "half a minute", func(w *ward) func() {
		w.sysctl(w.pod, "net.netfilter.nf_conntrack_udp_timeout_stream", "30")
		return nil
	}, doctor.Warn, "namespace pod"},
	{"HS-11", "a server of QUIC", func(w *ward) func() {
		w.must(unix.Bind(w.open(w.pod, unix.AF_INET, unix.SOCK_DGRAM, 0), at("0.0.0.0", 443)))
		return nil
	}, doctor.Warn, "namespace pod"},
	{"HS-12", "a list of 2015", func(w *ward) func() { w.sysctl(w.pod, "net.ipv4.tcp_rmem", "4096 87380 16777216"); return nil }, doctor.Warn, "namespace pod"},
	{"HS-38", "no forwarding of IPv6", func(w *ward) func() {
		w.shell(w.pod, "ip -6 route add default via fe80::1 dev eth0")
		w.sysctl(w.node, "net.ipv6.conf.all.forwarding", "0")
		return nil
	}, doctor.Fail, "namespace pod"},
	{"HS-40", "no time stamps", func(w *ward) func() { w.sysctl(w.pod, "net.ipv4.tcp_timestamps", "0"); return nil }, doctor.Warn, "namespace pod"},
	{"HS-41", "no selective acknowledgements", func(w *ward) func() { w.sysctl(w.pod, "net.ipv4.tcp_sack", "0"); return nil }, doctor.Warn, "namespace pod"},
	{"HS-42", "no window scaling", func(w *ward) func() { w.sysctl(w.pod, "net.ipv4.tcp_window_scaling", "0"); return nil }, doctor.Warn, "namespace pod"},
	{"HS-43", "a short FIN-WAIT-2", func(w *ward) func() { w.sysctl(w.pod, "net.ipv4.tcp_fin_timeout", "10"); return nil }, doctor.Warn, "namespace pod"},
	{"HS-44", "few retries", func(w *ward) func() { w.sysctl(w.pod, "net.ipv4.tcp_retries2", "3"); return nil }, doctor.Warn, "namespace pod"},
	{"HS-45", "no cookies", func(w *ward) func() { w.sysctl(w.pod, "net.ipv4.tcp_syncookies", "0"); return nil }, doctor.Warn, "namespace pod"},
	{"HS-46", "small packets", func(w *ward) func() { w.sysctl(w.pod, "net.ipv4.tcp_mtu_probing", "2"); return nil }, doctor.Warn, "namespace pod"},
	{"MT-02", "jumbo frames that pods do not use", func(w *ward) func() {
		w.shell(w.node, "ip link add up0 mtu 9000 type veth peer name up1; ip link set up1 up; ip link set up0 up; ip route add default dev up0")
		return nil
	}, doctor.Warn, "namespace pod"},
	{"MT-14", "too narrow for IPv6", func(w *ward) func() {
		w.shell(w.node, "ip link set veth1 mtu 1200")
		w.shell(w.pod, "ip link set eth0 mtu 1200")
		return nil
	}, doctor.Warn, "namespace pod"},
	{"CN-13", "a bridge that kube-proxy does not see", func(w *ward) func() {
		w.shell(w.node, "ip link add cni0 type bridge; ip link set cni0 up; ip link set veth1 master cni0; "+
			"sysctl -w net.bridge.bridge-nf-call-iptables=0 2>/dev/null || true; "+
			"nft 'table ip kube-proxy { chain services { counter; }; }'")
		return nil
	}, doctor.Fail, "node"},
	{"PX-02", "IPVS", func(w *ward) func() { w.shell(w.node, "ip link add kube-ipvs0 type bridge"); return nil }, doctor.Warn, "node"},
	{"PX-08", "rules that were left", func(w *ward) func() {
		w.shell(w.node, "nft 'table ip kube-proxy { chain services { counter; }; }'")
		return nil
	}, doctor.Warn, "node"},
	{"PX-16", "loopback that is routed", func(w *ward) func() { w.sysctl(w.node, "net.ipv4.conf.all.route_localnet", "1"); return nil }, doctor.Warn, "node"},
}

// slowUDP is a server that never reads, and what sends to it.
func (w *ward) slowUDP(port int) func() {
	fd := w.open(w.pod, unix.AF_INET, unix.SOCK_DGRAM, 0)
	w.must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4096))
	w.must(unix.Bind(fd, at("0.0.0.0", port)))
	return w.sending(w.node, wardPod, port, 1000)
}

// closed makes connections in a namespace and closes both ends.
func (w *ward) closed(space string, n int) {
	server := w.open(space, unix.AF_INET, unix.SOCK_STREAM, 0)
	w.must(unix.Bind(server, at("127.0.0.1", 0)))
	w.must(unix.Listen(server, n))
	address, err := unix.Getsockname(server)
	w.must(err)
	for range n {
		client := w.open(space, unix.AF_INET, unix.SOCK_STREAM, 0)
		unix.Connect(client, address)
		taken, _, err := unix.Accept(server)
		unix.Shutdown(client, unix.SHUT_RDWR)
		if err == nil {
			unix.Close(taken)
		}
	}
}

// process starts one in the pod that sees a resolv.conf of its own.
func (w *ward) process(resolv string) {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "resolv.conf")
	write(w.t, file, strings.ReplaceAll(resolv, "\\n", "\n")+"\n")
	c := exec.Command("sh", "-ec", `mount --bind "$0" "$(realpath /etc/resolv.conf)"; echo; exec sleep 60`, file)
	c.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	out, err := c.StdoutPipe()
	w.must(err)
	w.must(netns.Do(w.pod, c.Start))
	w.t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	_, err = out.Read(make([]byte, 1)) // it has its file
	w.must(err)
}

// called starts a process of that name on the node.
func (w *ward) called(name string) {
	w.t.Helper()
	sleep, err := exec.LookPath("sleep")
	w.must(err)
	program, err := os.ReadFile(sleep)
	w.must(err)
	file := filepath.Join(w.t.TempDir(), name)
	w.must(os.WriteFile(file, program, 0o755))
	c := exec.Command(file, "60")
	w.must(netns.Do(w.node, c.Start))
	w.t.Cleanup(func() { c.Process.Kill(); c.Wait() })
}

// Each fault is found, where it is. TestDoctorOfAHealthyNode says that nothing is found
// without.
func TestDoctorFindsFaults(t *testing.T) {
	for _, fault := range faults {
		t.Run(fault.id+" "+fault.what, func(t *testing.T) {
			t.Parallel()
			w := newWard(t)
			meanwhile := fault.inject(w)
			s, status := w.doctor(meanwhile, "--only", fault.id, "--for", "1.4s")
			for again := 0; s.Checks[0].Status != string(fault.status) && again < 4; again++ {
				s, status = w.doctor(meanwhile, "--only", fault.id, "--for", "3s") // timers are late on a busy machine
			}
			found := s.Checks[0]
			if found.Status != string(fault.status) || (status == exitFindings) != (fault.status == doctor.Fail) {
				t.Fatalf("%s, exit status %d, not %s: %+v", found.Status, status, fault.status, found.Evidence)
			}
			if !slices.ContainsFunc(found.Evidence, func(e doctor.Evidence) bool { return e.Scope == fault.scope }) {
				t.Errorf("not seen in %s: %+v", fault.scope, found.Evidence)
			}
			t.Logf("%+v", found.Evidence)
		})
	}
}

// The table is made full with connections that the kernel may not forget: 262,144 on
// most machines.
func TestDoctorFindsAFullTable(t *testing.T) {
	if os.Getenv("MILLRACE_LONG") == "" {
		t.Skip("set MILLRACE_LONG=1 to run it")
	}
	if _, err := exec.LookPath("conntrack"); err != nil {
		t.Skip("set MILLRACE_LONG=1 to run it, and install conntrack")
	}
	w := newWard(t)
	w.shell(w.pod, "nft 'table ip t { chain c { type filter hook input priority 0; ct state new accept; }; }'")
	limit, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	w.must(err)
	w.shell(w.pod, `seq 0 `+strings.TrimSpace(string(limit))+` | awk '{
		print "-I -s 10.77." int($1/60000) ".1 -d 10.78.0.1 -p tcp --sport " 1024+$1%60000 " --dport 80 --state ESTABLISHED -t 600 -u ASSURED,SEEN_REPLY"
	}' | conntrack -R - >/dev/null 2>&1 || true`) // the last has no room
	s, _ := w.doctor(w.connecting(w.node, wardPod, 80, 20), "--only", "CT-01,CT-04,CT-08")
	for _, c := range s.Checks {
		if want := map[string]string{"CT-01": "fail", "CT-04": "fail", "CT-08": "warn"}[c.ID]; c.Status != want {
			t.Errorf("%s is %s, not %s: %+v", c.ID, c.Status, want, c.Evidence)
		}
	}
}

// In a node in which all is well, nothing is found, and nothing is changed.
func TestDoctorOfAHealthyNode(t *testing.T) {
	w := newWard(t)
	state := func(space string) string {
		var out []byte
		w.must(netns.Do(space, func() (err error) {
			c := exec.Command("sh", "-c", "ip -d link; ip addr; ip route; ip neigh; ip rule; nft list ruleset; sysctl -a -r '^net' 2>/dev/null | grep -v -e nf_conntrack_count -e tcp_fastopen_key")
			var b bytes.Buffer
			c.Stdout = &b
			if err = c.Start(); err == nil {
				err = c.Wait()
			}
			out = b.Bytes()
			return err
		}))
		return string(out)
	}
	both := func() string { return state(w.node) + state(w.pod) }
	// The kernel tells a carrier, and then looks for neighbours, within seconds.
	before := both()
	for deadline := time.Now().Add(30 * time.Second); ; {
		time.Sleep(1500 * time.Millisecond)
		now := both()
		if settled := now == before && !strings.Contains(now, "NO-CARRIER"); settled {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the namespaces do not come to rest: %s", difference(before, now))
		}
		before = now
	}
	s, status := w.doctor(nil)
	if status != exitOK || s.Header.Namespaces != 2 {
		t.Errorf("exit status %d, %d namespaces", status, s.Header.Namespaces)
	}
	for _, c := range s.Checks {
		if c.ID == "HS-24" || c.ID == "HS-25" { // what else runs, here and beside this machine: true, and not this test's
			continue
		}
		if c.Status == "warn" || c.Status == "fail" {
			t.Errorf("%s is %s: %+v", c.ID, c.Status, c.Evidence)
		}
	}
	if after := both(); after != before {
		t.Errorf("something changed: %s", difference(before, after))
	}
}

// difference are the lines of only one of two texts.
func difference(a, b string) (lines []string) {
	for _, pair := range [][2]string{{a, b}, {b, a}} {
		for line := range strings.Lines(pair[0]) {
			if !strings.Contains(pair[1], line) {
				lines = append(lines, line)
			}
		}
	}
	return lines
}

func TestDoctorWithoutRoot(t *testing.T) {
	needsRoot(t)
	c := weak(product("doctor", "-o", "json", "--for", "0.1s"))
	stdout, stderr, status := finish(t, c)
	var s seen
	if err := json.Unmarshal([]byte(stdout), &s); err != nil {
		t.Fatalf("%v: exit status %d, says %q", err, status, stderr)
	}
	if !strings.Contains(strings.Join(s.Header.Unseen, " "), "CAP_SYS_PTRACE") {
		t.Errorf("it does not say what it lacks: %q", s.Header.Unseen)
	}
	for _, c := range s.Checks {
		if c.ID == "HS-04" && c.Status == "ok" {
			t.Error("HS-04 is ok, and the pods were not looked at")
		}
	}
}

func TestDoctorCommandLine(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "baseline.json")
	write(t, empty, "{")
	broken := filepath.Join(t.TempDir(), "broken.yaml")
	write(t, broken, "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}\nspec: {rules: [{backendRefs: [{name: absent, port: 80}]}]}\n---\nkind: [\n")
	away := filepath.Join(t.TempDir(), "kubeconfig")
	write(t, away, "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c}}]\nclusters: [{name: c, cluster: {server: \"http://127.0.0.1:1\"}}]\n")
	for _, row := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{"--explain", "ct-01"}, exitOK, "nf_conntrack_max"},
		{[]string{"--explain", "XX-01"}, exitUsage, "--explain XX-01: no check has this ID"},
		{[]string{"--only", "XX"}, exitUsage, `--only: no check and no layer is called "XX"`},
		{[]string{"--severity", "bad"}, exitUsage, `--severity: "bad" is no severity: use info, warning or critical`},
		{[]string{"--only", "HS-05", "--severity", "critical"}, exitUsage, "none of these checks can be of severity critical"},
		{[]string{"--for", "-1s"}, exitUsage, "--for -1s: use 0s to 24h"},
		{[]string{"-o", "xml"}, exitUsage, `--output "xml": use text, json, junit, sarif or prom`},
		{[]string{"--source", "dir:../../doctor/testdata"}, exitOK, "millrace doctor  cluster dir:../../doctor/testdata  "},
		{[]string{"--source", "dir:../../doctor/testdata", "--only", "PX-12", "-o", "json"}, exitOK, `"cluster": "dir:../../doctor/testdata"`},
		{[]string{"--source", "dir:../../doctor/testdata", "--only", "HS-05"}, exitUsage, "none of these checks looks at objects, and a folder has nothing else"},
		{[]string{"--source", "dir:" + broken}, exitFindings, "GW-03  a route leads to a Service that is not there"},
		{[]string{"--source", "dir:" + broken}, exitFindings, "not seen     " + broken + ":"},
		{[]string{"--source", "dir:/absent"}, exitIncomplete, "open manifests /absent: no such file"},
		{[]string{"--source", "etcd:x"}, exitUsage, `--source "etcd:x": use dir:PATH, kube:PATH or kube:`},
		{[]string{"--api-server", "https://10.0.0.1:6443"}, exitUsage, "--api-server goes with --source kube: only"},
		{[]string{"--only", "cluster"}, exitIncomplete, "no cluster is named: say --source kube:KUBECONFIG or"},
		{[]string{"--source", "kube:/absent", "--only", "cluster"}, exitIncomplete, "read kubeconfig /absent"},
		{[]string{"--source", "kube:" + away, "--only", "cluster"}, exitIncomplete, "no API server answers"},
		{[]string{"--nodes", "all"}, exitUsage, "--nodes goes with --source kube:PATH"},
		{[]string{"--nodes", "all", "--source", "dir:../../doctor/testdata"}, exitUsage, "--nodes goes with --source kube:PATH"},
		{[]string{"--nodes", "all", "--source", "kube:" + away, "--for", "1h"}, exitUsage, "--nodes takes --for 0s to 10m0s"},
		{[]string{"--nodes", "all", "--source", "kube:" + away, "--only", "PX-12,CN-10"}, exitUsage, "none of these checks looks at nodes from afar"},
		{[]string{"--nodes", "all", "--source", "kube:" + away}, exitIncomplete, "no API server answers"},
		{[]string{"--nodes", "all", "--source", "kube:/absent"}, exitIncomplete, "read kubeconfig /absent"},
		{[]string{"--only", "CN-25", "--for", "0s"}, exitIncomplete, "it compares nodes: say --nodes all --source kube:KUBECONFIG"},
		{[]string{"pods"}, exitUsage, "accepts between 1 and 2 arg(s)"},
		{[]string{"pods", "image", "no", "--source", "kube:" + away}, exitUsage, `"no": the only word after IMAGE is yes`},
		{[]string{"pods", "image"}, exitUsage, "--nodes goes with --source kube:PATH"},
		{[]string{"--only", "HS-18", "--for", "0s", "--baseline", "/absent"}, exitIncomplete, "read baseline: open /absent: no such file"},
		{[]string{"--only", "HS-18", "--for", "0s", "--baseline", empty}, exitIncomplete, "it has to be what `millrace doctor -o json` wrote"},
		{[]string{"--only", "HS-13", "--for", "0s"}, exitOK, "millrace doctor  node "},
		{[]string{"--only", "HS-13", "--for", "0s", "-o", "prom"}, exitOK, `millrace_doctor_check{id="HS-13"`},
		{[]string{"--only", "HS-13", "--for", "0s", "-o", "junit"}, exitOK, `<testsuite name="sockets" tests="1"`},
		{[]string{"--only", "HS-13", "--for", "0s", "-o", "sarif"}, exitOK, `"version": "2.1.0"`},
	} {
		stdout, stderr, status := millrace(t, append([]string{"doctor"}, row.args...)...)
		if status != row.status || !strings.Contains(stdout+stderr, row.says) {
			t.Errorf("millrace doctor %s: exit status %d, not %d; says %q, not %q", strings.Join(row.args, " "), status, row.status, stdout+stderr, row.says)
		}
	}
}

// Warnings end it with 0, or with 1 where that is asked for; what was known before is
// left out; a run in which nothing could be looked at is not one that found nothing.
func TestDoctorExitStatuses(t *testing.T) {
	w := newWard(t)
	w.sysctl(w.node, "net.ipv4.conf.all.route_localnet", "1")
	w.shell(w.node, "ip link add kube-ipvs0 type bridge")
	baseline := filepath.Join(t.TempDir(), "baseline.json")
	for _, row := range []struct {
		args   []string
		status int
		ipvs   string
	}{
		{[]string{"--only", "PX-02"}, exitOK, "warn"},
		{[]string{"--only", "PX-02", "--strict"}, exitFailed, "warn"},
		{[]string{"--only", "PX-16", "--strict"}, exitOK, "warn"}, // information is no warning
		{[]string{"--only", "PX-02", "--strict", "--baseline", baseline}, exitOK, "ok"},
		{[]string{"--only", "HS-27"}, exitIncomplete, "skip"},
	} {
		if row.status == exitIncomplete && frequency(t) {
			continue // here there is something to look at
		}
		if slices.Contains(row.args, baseline) {
			s, _ := w.doctor(nil, "--only", "PX-02")
			text, err := json.Marshal(map[string]any{"header": map[string]any{}, "checks": lower(s)})
			w.must(err)
			write(t, baseline, string(text))
		}
		s, status := w.doctor(nil, append(row.args, "--for", "0s")...)
		if status != row.status || s.Checks[0].Status != row.ipvs {
			t.Errorf("%v: exit status %d and %s, not %d and %s", row.args, status, s.Checks[0].Status, row.status, row.ipvs)
		}
	}
}

// lower is what was read, with the names of fields as they were written.
func lower(s seen) (checks []map[string]any) {
	for _, c := range s.Checks {
		checks = append(checks, map[string]any{"id": c.ID, "status": c.Status, "evidence": c.Evidence})
	}
	return checks
}

func frequency(t *testing.T) bool {
	t.Helper()
	_, err := os.Stat("/sys/devices/system/cpu/cpu0/cpufreq")
	return err == nil
}

// A node with many pods is read within seconds and a hundred megabytes.
func TestDoctorOfManyPods(t *testing.T) {
	if os.Getenv("MILLRACE_LONG") == "" {
		t.Skip("set MILLRACE_LONG=1 to run it")
	}
	w := newWard(t)
	nodes, err := link.Open(w.node)
	w.must(err)
	defer nodes.Close()
	for i := range 200 {
		path := filepath.Join(t.TempDir(), fmt.Sprintf("pod-%d", i))
		w.must(netns.Create(path))
		t.Cleanup(func() { netns.Remove(path) })
		_, err := nodes.Veth(link.Veth{Name: fmt.Sprintf("v%d", i), Peer: "eth0", PeerNamespace: path})
		w.must(err)
	}
	c := product("doctor", "-o", "json")
	var out bytes.Buffer
	c.Stdout = &out
	begun := time.Now()
	w.must(netns.Do(w.node, c.Start))
	w.must(c.Wait())
	took := time.Since(begun)
	memory := c.ProcessState.SysUsage().(*syscall.Rusage).Maxrss >> 10
	var s seen
	w.must(json.Unmarshal(out.Bytes(), &s))
	work := c.ProcessState.UserTime() + c.ProcessState.SystemTime() // beside the window of 2 s, whatever else the machine does
	t.Logf("%d namespaces: %.1f s, %.1f s of processor time, %d MiB", s.Header.Namespaces, took.Seconds(), work.Seconds(), memory)
	if s.Header.Namespaces != 202 || work > 3*time.Second || memory > 100 {
		t.Errorf("%d namespaces, %s of work, %d MiB; not 202, 3 s and 100 MiB", s.Header.Namespaces, work, memory)
	}
}
