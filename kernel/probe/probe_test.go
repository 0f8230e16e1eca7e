package probe

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// street is a row of namespaces: here, a router, and there. The way between the router
// and there takes 1400 bytes.
type street struct {
	t                   *testing.T
	here, middle, there string
}

var (
	middle4, there4 = netip.MustParseAddr("10.1.0.254"), netip.MustParseAddr("10.2.0.1")
	middle6, there6 = netip.MustParseAddr("fd00:1::254"), netip.MustParseAddr("fd00:2::1")
)

const narrow = 1400

func newStreet(t *testing.T) *street {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces")
	}
	t.Parallel()
	folder := t.TempDir()
	s := &street{t, filepath.Join(folder, "here"), filepath.Join(folder, "middle"), filepath.Join(folder, "there")}
	for _, path := range []string{s.here, s.middle, s.there} {
		if err := netns.Create(path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { netns.Remove(path) })
		s.shell(path, "ip link set lo up; sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
	}
	s.shell(s.middle, "ip link add west type veth peer name eth0 netns "+s.here+"; ip link add east type veth peer name eth0 netns "+s.there+
		"; ip addr add 10.1.0.254/24 dev west; ip addr add fd00:1::254/64 dev west; ip addr add 10.2.0.254/24 dev east; ip addr add fd00:2::254/64 dev east; ip link set west up; ip link set east mtu 1400 up")
	for path, n := range map[string]string{s.here: "1", s.there: "2"} {
		s.shell(path, "ip addr add 10."+n+".0.1/24 dev eth0; ip addr add fd00:"+n+"::1/64 dev eth0; ip link set eth0 up; ip route add default via 10."+n+".0.254; ip -6 route add default via fd00:"+n+"::254")
	}
	return s
}

func (s *street) shell(space, command string) {
	s.t.Helper()
	c := exec.Command("sh", "-ec", command)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := netns.Do(space, c.Start); err != nil {
		s.t.Fatal(err)
	}
	if err := c.Wait(); err != nil {
		s.t.Fatalf("%s: %v: %s", command, err, out.String())
	}
}

// again says whether something came out, and lets it be tried anew a few times: answers are
// late on a busy machine.
func again(try func() bool) bool {
	for range 3 {
		if try() {
			return true
		}
	}
	return try()
}

// A router that says its most is believed, where that is what passes; of one that is kept
// from saying so the limit is found by halves, to the byte.
func TestMTU(t *testing.T) {
	s := newStreet(t)
	for _, to := range []netip.Addr{there4, there6} {
		var p Path
		var err error
		by := map[bool]netip.Addr{true: middle4, false: middle6}[to.Is4()]
		if !again(func() bool {
			p, err = MTU(t.Context(), s.here, to, 1500)
			return err == nil && p.Passed == narrow && p.Announced == narrow && p.By == by && p.Tried == 1500
		}) {
			t.Errorf("%s by a router that says so: %+v, %v", to, p, err)
		}
		if !again(func() bool {
			p, err = MTU(t.Context(), s.here, by, 1500)
			return err == nil && p.Passed == 1500 && p.Packets <= 2
		}) {
			t.Errorf("the router itself: %+v, %v", p, err)
		}
	}
	s.shell(s.middle, "nft 'table inet t { chain c { type filter hook output priority 0; icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }; }'")
	for _, to := range []netip.Addr{there4, there6} {
		var p Path
		var err error
		if !again(func() bool {
			p, err = MTU(t.Context(), s.here, to, 1500)
			return err == nil && p.Passed == narrow && p.Announced == 0 && p.Packets <= 60
		}) {
			t.Errorf("%s by a router that says nothing: %+v, %v", to, p, err)
		}
	}
}

// Anybody can say that packets are too big, of any router's address; what is not about the
// packet that was sent is passed over, also where there is much of it.
func TestTooBigByStrangers(t *testing.T) {
	s := newStreet(t)
	s.shell(s.there, "nft 'table inet t { chain c { type filter hook input priority 0; meta l4proto {icmp, icmpv6} drop; }; }'")
	for _, to := range []netip.Addr{there4, there6} {
		e, err := openEcho(s.here, to, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer e.close()
		for _, row := range []struct {
			what      string
			id, seq   uint16 // by how much they differ from the request's
			announced int
		}{{"of another socket", 1, 0, 0}, {"of another request", 0, 1, 0}, {"of this one", 0, 0, 1300}} {
			stop, stopped := make(chan bool), make(chan bool)
			go func(id, seq uint16) {
				defer close(stopped)
				for {
					select {
					case <-stop:
						return
					default:
						s.tooBig(to, 1300, id, seq)
						time.Sleep(time.Millisecond)
					}
				}
			}(e.id+row.id, e.seq+1+row.seq)
			wait := 300 * time.Millisecond
			if row.announced > 0 {
				wait = 10 * time.Second // it ends when it is heard
			}
			h, err := e.once(1400, wait)
			close(stop)
			<-stopped
			if err != nil || h.announced != row.announced || h.answered {
				t.Errorf("%s, %s: %+v, %v", to, row.what, h, err)
			}
		}
	}
}

// tooBig has the middle say to here that a request to an address is too big.
func (s *street) tooBig(to netip.Addr, mtu uint32, id, seq uint16) {
	s.t.Helper()
	request := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16([]byte{8, 0, 0, 0}, id), seq)
	text := binary.BigEndian.AppendUint32([]byte{3, 4, 0, 0}, mtu)
	from := netip.MustParseAddr("10.1.0.1")
	header := make([]byte, ip4Header)
	header[0], header[8], header[9] = 0x45, 64, unix.IPPROTO_ICMP
	binary.BigEndian.PutUint16(header[2:], 1400)
	family, protocol, at := unix.AF_INET, unix.IPPROTO_ICMP, 12
	if to.Is6() {
		request[0], text[0], text[1], from = 128, 2, 0, netip.MustParseAddr("fd00:1::1")
		header = make([]byte, ip6Header)
		header[0], header[6], header[7] = 0x60, unix.IPPROTO_ICMPV6, 64
		binary.BigEndian.PutUint16(header[4:], 1400-ip6Header)
		family, protocol, at = unix.AF_INET6, unix.IPPROTO_ICMPV6, 8
	}
	copy(header[at:], slices.Concat(from.AsSlice(), to.AsSlice()))
	text = slices.Concat(text, header, request)
	if to.Is4() {
		binary.BigEndian.PutUint16(text[2:], checksum(text))
	}
	err := netns.Do(s.middle, func() error {
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, text, 0, sockaddr(netip.AddrPortFrom(from, 0)))
	})
	if err != nil {
		s.t.Error(err)
	}
}

func TestMTUOfWhatDoesNotAnswer(t *testing.T) {
	s := newStreet(t)
	s.shell(s.there, "nft 'table inet t { chain c { type filter hook input priority 0; meta l4proto {icmp, icmpv6} drop; }; }'")
	if p, err := MTU(t.Context(), s.here, there4, 1500); !errors.Is(err, ErrSilent) {
		t.Errorf("%+v, %v", p, err)
	}
	s.shell(s.middle, "ip route add unreachable 10.3.0.0/24")
	if p, err := MTU(t.Context(), s.here, netip.MustParseAddr("10.3.0.1"), 1500); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("behind a router that has no route: %+v, %v", p, err)
	}
}

// Where chance takes packets, whatever their size, no limit is found.
func TestMTUOfAWayThatLoses(t *testing.T) {
	s := newStreet(t)
	var p Path
	var err error
	if !again(func() bool {
		// A new rule counts from 0: the same packets are lost each time.
		s.shell(s.there, "nft flush ruleset; nft 'table inet t { chain c { type filter hook input priority 0; ip length > 600 numgen inc mod 5 < 4 drop; }; }'")
		p, err = MTU(t.Context(), s.here, there4, 1000)
		return err != nil && strings.Contains(err.Error(), "answers come and go")
	}) {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestFirstHop(t *testing.T) {
	s := newStreet(t)
	for _, row := range []struct {
		to, from netip.Addr
		arrived  bool
	}{{there4, middle4, false}, {there6, middle6, false}, {middle4, middle4, true}, {middle6, middle6, true}} {
		h, err := FirstHop(t.Context(), s.here, row.to)
		if err != nil || h.From != row.from || h.Arrived != row.arrived {
			t.Errorf("%s: %+v, %v", row.to, h, err)
		}
	}
	if h, err := FirstHop(t.Context(), s.here, netip.MustParseAddr("10.1.0.7")); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("a neighbour that is not there: %+v, %v", h, err)
	}
}

// serve takes connections in a namespace, and does with them what it is told.
func (s *street) serve(space, at string, each func(net.Conn)) netip.AddrPort {
	s.t.Helper()
	var l net.Listener
	err := netns.Do(space, func() (err error) { l, err = net.Listen("tcp", at); return err })
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go each(c)
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String())
}

func TestConnect(t *testing.T) {
	s := newStreet(t)
	holds := func(c net.Conn) { io.Copy(io.Discard, c); c.Close() }
	for _, row := range []struct {
		what string
		to   netip.AddrPort
		want error
	}{
		{"it waits for us", s.serve(s.there, "10.2.0.1:80", holds), nil},
		{"over IPv6", s.serve(s.there, "[fd00:2::1]:80", holds), nil},
		{"it speaks first", s.serve(s.there, "10.2.0.1:81", func(c net.Conn) { c.Write([]byte("220\n")); holds(c) }), nil},
		{"it resets", s.serve(s.there, "10.2.0.1:82", func(c net.Conn) { c.(*net.TCPConn).SetLinger(0); c.Close() }), ErrReset},
		{"it closes", s.serve(s.there, "10.2.0.1:83", func(c net.Conn) { c.Close() }), ErrClosed},
		{"nobody listens", netip.MustParseAddrPort("10.2.0.1:84"), unix.ECONNREFUSED},
	} {
		took, err := Connect(t.Context(), s.here, row.to)
		if !errors.Is(err, row.want) || took <= 0 || took > connectFor {
			t.Errorf("%s: %v after %s", row.what, err, took)
		}
	}
	s.shell(s.there, "nft 'table inet t { chain c { type filter hook input priority 0; tcp dport 80 drop; }; }'")
	if took, err := Connect(t.Context(), s.here, netip.MustParseAddrPort("10.2.0.1:80")); !errors.Is(err, ErrSilent) || took < connectFor {
		t.Errorf("packets are dropped: %v after %s", err, took)
	}
	if _, err := Connect(t.Context(), filepath.Join(t.TempDir(), "absent"), netip.MustParseAddrPort("10.2.0.1:80")); !errors.Is(err, ErrUnsent) {
		t.Errorf("from a namespace that is not there: %v", err)
	}
}

// answer is what a name server of the tests says to a query.
func answer(query []byte) []byte {
	var m dnsmessage.Message
	if m.Unpack(query) != nil {
		return nil
	}
	m.Response = true
	q := m.Questions[0]
	head := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 5}
	switch {
	case q.Name.String() == "absent.example.":
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		m.Answers = []dnsmessage.Resource{{Header: head, Body: &dnsmessage.AResource{A: [4]byte{10, 96, 0, 1}}}}
	default:
		m.Answers = []dnsmessage.Resource{{Header: head, Body: &dnsmessage.AAAAResource{AAAA: netip.MustParseAddr("fd00:96::1").As16()}}}
	}
	text, _ := m.Pack()
	return text
}

func TestResolve(t *testing.T) {
	s := newStreet(t)
	var udp net.PacketConn
	err := netns.Do(s.there, func() (err error) { udp, err = net.ListenPacket("udp", "10.2.0.1:53"); return err })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { udp.Close() })
	lose := make(chan bool, 3) // queries to be passed over
	go func() {
		b := make([]byte, 512)
		for {
			n, from, err := udp.ReadFrom(b)
			if err != nil {
				return
			}
			select {
			case <-lose:
				continue
			default:
			}
			text := answer(b[:n])
			stranger := slices.Clone(text)
			stranger[0]++ // of another query
			udp.WriteTo(stranger, from)
			udp.WriteTo(text, from)
		}
	}()
	s.serve(s.there, "10.2.0.1:53", func(c net.Conn) {
		defer c.Close()
		var length [2]byte
		io.ReadFull(c, length[:])
		query := make([]byte, binary.BigEndian.Uint16(length[:]))
		io.ReadFull(c, query)
		text := answer(query)
		c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(text))), text...))
	})
	server := netip.MustParseAddrPort("10.2.0.1:53")
	for _, network := range []string{"udp", "tcp"} {
		for six, want := range map[bool]string{false: "10.96.0.1", true: "fd00:96::1"} {
			var r Reply
			var err error
			if !again(func() bool {
				r, err = Resolve(t.Context(), s.here, network, server, "kubernetes.default.svc.cluster.local.", six)
				return err == nil && r.Code == "NOERROR" && len(r.Addresses) == 1 && r.Addresses[0].String() == want && r.Lost == 0
			}) {
				t.Errorf("%s, %s: %+v, %v", network, want, r, err)
			}
		}
		r, err := Resolve(t.Context(), s.here, network, server, "absent.example.", false)
		if err != nil || r.Code != "NXDOMAIN" || len(r.Addresses) > 0 {
			t.Errorf("%s, a name that is not there: %+v, %v", network, r, err)
		}
		if _, err := Resolve(t.Context(), s.here, network, netip.MustParseAddrPort("10.1.0.254:53"), "absent.example.", false); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s, nobody listens: %v", network, err)
		}
	}
	var r Reply
	if !again(func() bool {
		lose <- true
		r, err = Resolve(t.Context(), s.here, "udp", server, "absent.example.", false)
		return err == nil && r.Lost == 1 && r.Took <= queryFor
	}) {
		t.Errorf("a query that is lost: %+v, %v", r, err)
	}
	for range cap(lose) {
		lose <- true
	}
	begun := time.Now()
	if r, err := Resolve(t.Context(), s.here, "udp", server, "absent.example.", false); !errors.Is(err, ErrSilent) || r.Lost != queryTries || time.Since(begun) < queryTries*queryFor {
		t.Errorf("all are lost: %+v, %v", r, err)
	}
}
