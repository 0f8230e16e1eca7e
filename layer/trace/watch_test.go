package trace

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
)

// town is two namespaces with a veth pair between them.
type town struct {
	t                    *testing.T
	client, server       string
	clientDev, serverDev int
}

const (
	client4, server4 = "10.1.0.1", "10.1.0.2"
	client6, server6 = "fd01::1", "fd01::2"
)

func newTown(t *testing.T) *town {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	folder := t.TempDir()
	w := &town{t: t, client: filepath.Join(folder, "client"), server: filepath.Join(folder, "server")}
	for _, path := range []string{w.client, w.server} {
		w.must(netns.Create(path))
		t.Cleanup(func() { w.must(netns.Remove(path)) })
	}
	up := func(path, near, far string, addresses ...string) (index int) {
		w.in(path, func() error {
			n, err := link.Open("")
			if err != nil {
				return err
			}
			defer n.Close()
			if far != "" {
				if _, err := n.Veth(link.Veth{Name: near, Peer: far, PeerNamespace: w.server}); err != nil {
					return err
				}
			}
			if index, err = n.Index(near); err != nil {
				return err
			}
			for _, a := range addresses {
				if err := n.Addr(index, netip.MustParsePrefix(a)); err != nil {
					return err
				}
			}
			return errors.Join(n.UpLoopback(), n.Up(index))
		})
		return index
	}
	w.clientDev = up(w.client, "eth0", "eth0", client4+"/24", client6+"/64")
	w.serverDev = up(w.server, "eth0", "", server4+"/24", server6+"/64")
	w.inClient(func() error { return netns.SetSysctl("net.ipv4.neigh.eth0.retrans_time_ms", "50") })
	return w
}

func (w *town) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *town) in(path string, f func() error) {
	w.t.Helper()
	w.must(netns.Do(path, f))
}

func (w *town) inClient(f func() error) { w.t.Helper(); w.in(w.client, f) }
func (w *town) inServer(f func() error) { w.t.Helper(); w.in(w.server, f) }

// lost makes a neighbour of a namespace one whose frames nobody takes.
func (w *town) lost(path string, device int, addr string) {
	w.in(path, func() error {
		n, err := link.Open("")
		if err != nil {
			return err
		}
		defer n.Close()
		return n.Neigh(device, netip.MustParseAddr(addr), net.HardwareAddr{2, 0, 0, 9, 9, 9})
	})
}

func (w *town) inode(path string) uint32 {
	var file unix.Stat_t
	w.must(unix.Stat(path, &file))
	return uint32(file.Ino)
}

// watched is what was seen while f ran, in the client's and the server's namespace; done
// says when there is no more to wait for.
func (w *town) watched(f func(), done func(seen *Recording) bool) *Recording {
	w.t.Helper()
	s, err := Watch(Options{Namespaces: []uint32{w.inode(w.client), w.inode(w.server)}, Calls: true})
	w.must(err)
	f()
	for patience := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		now, err := s.record()
		if err == nil && done(now) || time.Now().After(patience) {
			break
		}
	}
	r, err := s.Stop()
	w.must(err)
	return r
}

// signal is an event that must have been seen, and the tracepoint that it takes.
type signal struct {
	tracepoint string
	what       string
	is         func(*cause.Event) bool
}

func (w *town) find(r *Recording, s signal) *cause.Event {
	at := slices.IndexFunc(r.Events, func(e cause.Event) bool { return s.is(&e) })
	if at < 0 {
		return nil
	}
	return &r.Events[at]
}

func absent(r *Recording, tracepoint string) bool {
	return slices.ContainsFunc(r.Missing, func(m string) bool { return strings.HasPrefix(m, tracepoint+": this kernel has no such tracepoint") })
}

// ask connects to an address and a port where nobody answers well.
func ask(network, address string, patience time.Duration) {
	c, err := net.DialTimeout(network, address, patience)
	if err == nil {
		_, _ = c.Write([]byte("hello"))
		c.Close()
	}
}

// signals are what every program is to see of what the test does.
func (w *town) signals() []signal {
	client, server := w.inode(w.client), w.inode(w.server)
	return []signal{
		{"kfree_skb", "a UDP packet to nobody is dropped", func(e *cause.Event) bool {
			return e.Kind == cause.Drop && e.Space == server && e.Location == "__udp4_lib_rcv" && e.Device == "eth0" &&
				e.Tuple.Destination == netip.MustParseAddrPort(server4+":9") && bytes.HasSuffix(e.Packet, []byte("hello")) &&
				slices.Contains(e.Stack, "ip_local_deliver_finish") && e.Length == 33
		}},
		{"kfree_skb", "a SYN over IPv6 to nobody is dropped", func(e *cause.Event) bool {
			return e.Kind == cause.Drop && e.Space == server && e.Location == "tcp_v6_rcv" && e.Tuple.TCPFlags == 2 &&
				e.Tuple.Source.Addr() == netip.MustParseAddr(client6) && e.Tuple.Destination == netip.MustParseAddrPort("["+server6+"]:81")
		}},
		{"icmp_send", "its sender is told", func(e *cause.Event) bool {
			return e.Kind == cause.ICMPSent && e.Space == server && e.Type == 3 && e.Code == 3 && e.Tuple.Destination.Port() == 9
		}},
		{"tcp_send_reset", "a connection is closed with data unread", func(e *cause.Event) bool {
			// the kernel tells of one without a socket only since Linux 6.2
			return e.Kind == cause.ResetSent && e.Space == server && e.Tuple.Source == netip.MustParseAddrPort(server4+":84")
		}},
		{"inet_sk_error_report", "the socket is told", func(e *cause.Event) bool {
			return e.Kind == cause.SocketError && e.Space == client && e.Errno == int(unix.ECONNREFUSED) && e.Tuple.Destination.Port() == 81
		}},
		{"inet_sock_set_state", "the connection does not come about", func(e *cause.Event) bool {
			return e.Kind == cause.StateChange && e.Space == client && e.OldState == 2 && e.NewState == 7 &&
				e.Errno == int(unix.ECONNREFUSED) && e.Tuple.Destination.Port() == 81
		}},
		{"tcp_retransmit_skb", "a SYN is repeated", func(e *cause.Event) bool {
			return e.Kind == cause.Retransmit && e.Space == client && e.OldState == 2 && e.Tuple.Destination == netip.MustParseAddrPort("10.1.0.8:80")
		}},
		{"tcp_retransmit_synack", "the answer to a SYN is repeated", func(e *cause.Event) bool {
			return e.Kind == cause.Retransmit && e.Space == server && e.OldState == 12 && e.Tuple.Source == netip.MustParseAddrPort(server4+":80")
		}},
		{"neigh_timer_handler", "a neighbour does not answer", func(e *cause.Event) bool {
			return e.Kind == cause.NeighFailed && e.Space == client && e.Tuple.Destination.Addr() == netip.MustParseAddr("10.1.0.9") && e.Device == "eth0"
		}},
		{"udp_fail_queue_rcv_skb", "a socket's buffer is full", func(e *cause.Event) bool {
			return e.Kind == cause.ReceiveFull && e.Space == server && e.Tuple.Source == netip.MustParseAddrPort(server4+":90") && e.Tuple.Protocol == 17 && e.Errno != 0
		}},
		{"sock_rcvqueue_full", "a socket for echoes is full", func(e *cause.Event) bool {
			return e.Kind == cause.ReceiveFull && e.Space == client && e.Tuple.Protocol == unix.IPPROTO_ICMP
		}},
		{"tcp_bad_csum", "a checksum is wrong", func(e *cause.Event) bool {
			return e.Kind == cause.ChecksumFail && e.Space == server && e.Tuple.Destination == netip.MustParseAddrPort(server4+":82")
		}},
		{"sys_exit", "a call is refused", func(e *cause.Event) bool {
			return e.Kind == cause.CallFailed && e.Space == client && e.Call == "bind" && e.Errno == int(unix.EADDRNOTAVAIL) &&
				e.Tuple.Destination == netip.MustParseAddrPort("10.9.9.9:99") && e.PID == os.Getpid()
		}},
	}
}

// Every program sees its event, and says of it what it has to.
func TestEveryProgramSeesItsEvent(t *testing.T) {
	w := newTown(t)
	w.lost(w.client, w.clientDev, "10.1.0.8")  // our SYN to it is repeated
	w.lost(w.server, w.serverDev, "10.1.0.77") // and the server's answer to it
	w.inClient(func() error {
		n, err := link.Open("")
		if err != nil {
			return err
		}
		defer n.Close()
		return n.Addr(w.clientDev, netip.MustParsePrefix("10.1.0.77/32"))
	})
	var listener, hasty net.Listener
	var deaf *net.UDPConn
	w.inServer(func() (err error) {
		if listener, err = net.Listen("tcp", server4+":80"); err != nil {
			return err
		}
		if hasty, err = net.Listen("tcp", server4+":84"); err != nil {
			return err
		}
		deaf, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(server4), Port: 90})
		return errors.Join(err, deaf.SetReadBuffer(1))
	})
	defer listener.Close()
	defer deaf.Close()
	go rude(hasty)
	defer hasty.Close()
	signals := w.signals()
	all := func(r *Recording) bool {
		return !slices.ContainsFunc(signals, func(s signal) bool { return !absent(r, s.tracepoint) && w.find(r, s) == nil })
	}
	r := w.watched(func() {
		w.inClient(func() error {
			ask("udp", server4+":9", time.Second)
			ask("tcp", server4+":81", time.Second)
			ask("tcp", server4+":84", time.Second)
			ask("tcp", "["+server6+"]:81", time.Second)
			go netns.Do(w.client, func() error { ask("tcp", "10.1.0.8:80", 2500*time.Millisecond); return nil })
			go netns.Do(w.client, func() error {
				from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 1, 0, 77)}, Timeout: 2500 * time.Millisecond}
				c, err := from.DialContext(context.Background(), "tcp", server4+":80")
				if err == nil {
					c.Close()
				}
				return nil
			})
			ask("udp", "10.1.0.9:80", time.Second)
			for range 100 {
				ask("udp", server4+":90", time.Second)
			}
			_, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(10, 9, 9, 9), Port: 99})
			if !errors.Is(err, unix.EADDRNOTAVAIL) {
				return fmt.Errorf("bind to an address that is not ours: %v", err)
			}
			return errors.Join(fillPingSocket(), sendBadChecksum())
		})
	}, all)
	for _, s := range signals {
		if !absent(r, s.tracepoint) && w.find(r, s) == nil {
			t.Errorf("%s: %s: not seen", s.tracepoint, s.what)
		}
	}
	if t.Failed() {
		for _, e := range r.Events {
			t.Logf("%s %d x%d %s %s %s %s errno %d states %d %d", e.Kind, e.Space, e.Count, e.Reason, e.Location,
				e.Tuple.Source, e.Tuple.Destination, e.Errno, e.OldState, e.NewState)
		}
	}
	if len(r.Missing) > 0 {
		t.Logf("missing: %s", strings.Join(r.Missing, "; "))
	}
}

// rude reads one byte of what each caller says, and hangs up.
func rude(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = c.Read(make([]byte, 1))
		c.Close()
	}
}

// fillPingSocket lets a socket for echoes, which nobody reads, get more than it holds.
func fillPingSocket() error {
	if err := netns.SetSysctl("net.ipv4.ping_group_range", "0 0"); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
		return err
	}
	echo := make([]byte, 1008)
	echo[0] = 8
	for range 50 {
		if err := unix.Sendto(fd, echo, 0, &unix.SockaddrInet4{Addr: [4]byte{10, 1, 0, 2}}); err != nil {
			return err
		}
	}
	return nil
}

// sendBadChecksum sends a SYN whose checksum is wrong.
func sendBadChecksum() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	syn := make([]byte, 20)
	binary.BigEndian.PutUint16(syn, 4444)
	binary.BigEndian.PutUint16(syn[2:], 82)
	syn[12], syn[13] = 5<<4, 2
	binary.BigEndian.PutUint16(syn[16:], 0xbad)
	return unix.Sendto(fd, syn, 0, &unix.SockaddrInet4{Addr: [4]byte{10, 1, 0, 2}})
}

// An example holds the whole of a packet that is not too large, wherever in the buffer
// it lies: checksums are looked at.
func TestExamplesAreWhole(t *testing.T) {
	w := newTown(t)
	payload := bytes.Repeat([]byte("millrace"), 175)
	is := func(e *cause.Event) bool {
		return e.Kind == cause.Drop && e.Tuple.Destination.Port() == 9 && len(e.Packet) == 28+len(payload)
	}
	r := w.watched(func() {
		w.inClient(func() error {
			c, err := net.Dial("udp", server4+":9")
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write(payload)
			return err
		})
	}, func(r *Recording) bool {
		return slices.ContainsFunc(r.Events, func(e cause.Event) bool { return is(&e) })
	})
	e := w.find(r, signal{is: is})
	if e == nil {
		t.Fatalf("no example of %d bytes among %+v", 28+len(payload), r.Events)
	}
	if !bytes.Equal(e.Packet[28:], payload) || e.Packet[0] != 0x45 || e.Length != len(e.Packet) {
		t.Errorf("the example is not the packet that was sent: %x", e.Packet)
	}
}

// However many packets die, each is in the totals; and nothing of other namespaces is.
func TestTotalsAreExact(t *testing.T) {
	w := newTown(t)
	const packets, ports = 10_000, 300 // of more destinations than the map of events holds
	s, err := Watch(Options{Namespaces: []uint32{w.inode(w.server)}, Entries: 128})
	w.must(err)
	w.inClient(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for i := range packets {
			to := &unix.SockaddrInet4{Addr: [4]byte{10, 1, 0, 2}, Port: 1000 + i%ports}
			if err := unix.Sendto(fd, []byte("x"), 0, to); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		return nil
	})
	r, err := s.Stop()
	w.must(err)
	var dropped, kept uint64
	for _, total := range r.Totals {
		// others are IPv6's own, of multicast; a kernel before 5.18 has no such words
		if total.Kind == cause.Drop && (total.Reason == "NO_SOCKET" || total.Reason == "") {
			dropped += total.Count
		}
	}
	for _, e := range r.Events {
		kept += e.Count
		if e.Space != w.inode(w.server) {
			t.Errorf("%d of namespace %d, which was not asked for", e.Count, e.Space)
		}
	}
	var all uint64
	for _, total := range r.Totals {
		all += total.Count
	}
	if dropped != packets {
		t.Errorf("%d packets died, the totals hold %d: %+v", packets, dropped, r.Totals)
	}
	if all != kept+r.Lost {
		t.Errorf("%d in the totals, %d events and %d lost", all, kept, r.Lost)
	}
	if r.Lost == 0 {
		t.Error("nothing was pushed out: the test is blind")
	}
}

func TestNothingIsLeftBehind(t *testing.T) {
	w := newTown(t)
	s, err := Watch(Options{Namespaces: []uint32{w.inode(w.client)}})
	w.must(err)
	var ids []ebpf.ProgramID
	for _, p := range s.collection.Programs {
		info, err := p.Info()
		w.must(err)
		id, _ := info.ID()
		ids = append(ids, id)
	}
	_, err = s.Stop()
	w.must(err)
	for _, id := range ids {
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
