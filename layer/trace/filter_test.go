package trace

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer/trace/cause"
)

// packet is an event of a packet, as a table has it: "tcp 10.0.0.1:80 10.0.0.2:4000 S".
func packet(text string) *cause.Event {
	words := strings.Fields(text)
	e := &cause.Event{Kind: cause.Drop, Tuple: cause.Tuple{EtherType: unix.ETH_P_IP}}
	t := &e.Tuple
	t.Protocol = map[string]uint8{"tcp": 6, "udp": 17, "icmp": 1, "icmp6": 58, "sctp": 132, "gre": 47}[words[0]]
	for i, end := range []*netip.AddrPort{&t.Source, &t.Destination} {
		if words[1+i] == "?" {
			continue
		}
		addr, err := netip.ParseAddr(words[1+i])
		if err == nil {
			*end = netip.AddrPortFrom(addr, 0)
		} else {
			*end = netip.MustParseAddrPort(words[1+i])
		}
		if end.Addr().Is6() {
			t.EtherType = unix.ETH_P_IPV6
		}
	}
	if words[0] == "arp" {
		t.EtherType = unix.ETH_P_ARP
	}
	if len(words) > 3 {
		for _, flag := range words[3] {
			t.TCPFlags |= map[rune]uint8{'F': 1, 'S': 2, 'R': 4, 'A': 16}[flag]
		}
	}
	return e
}

const (
	webSYN = "tcp 10.0.0.1:40000 10.0.0.2:443 S"
	webACK = "tcp 10.0.0.2:443 10.0.0.1:40000 SA"
	dns    = "udp 10.0.0.1:5353 10.9.0.9:53"
	six    = "tcp [fd00::1]:40000 [fd00::2]:80 A"
	ping   = "icmp 10.0.0.1 10.0.0.2"
	whoHas = "arp 10.0.0.1 10.0.0.2"
)

var filterRows = []struct {
	filter string
	fits   []string
}{
	{"tcp port 443 and host 10.0.0.1", []string{webSYN, webACK}},
	{"tcp", []string{webSYN, webACK, six}},
	{"not tcp", []string{dns, ping, whoHas}},
	{"dst port 443", []string{webSYN}},
	{"src port 443 or dst port 53", []string{webACK, dns}},
	{"port 443 or 53", []string{webSYN, webACK, dns}},
	{"host 10.0.0.2 and not port 443", []string{ping, whoHas}},
	{"icmp host 10.0.0.2", []string{ping}},
	{"arp", []string{whoHas}},
	{"10.0.0.2", []string{webSYN, webACK, ping, whoHas}},
	{"src net 10.0.0.0/8 and dst net 10.9.0.0/16", []string{dns}},
	{"src and dst net 10.0.0.0/24", []string{webSYN, webACK, ping, whoHas}},
	{"ip6", []string{six}},
	{"ip6 proto tcp", []string{six}},
	{"ip proto 17", []string{dns}},
	{"net fd00::/16 && portrange 1-100", []string{six}},
	{"udp or tcp and port 443", []string{webSYN, webACK}}, // from left to right
	{"udp or (tcp and port 443)", []string{webSYN, webACK, dns}},
	{"tcp[tcpflags] & (tcp-syn|tcp-ack) == tcp-syn", []string{webSYN}},
	{"tcp[13] & 2 != 0", []string{webSYN, webACK}},
	{"! ( tcp || udp ) && ! arp", []string{ping}},
	{"sctp", nil},
}

func TestFiltersFit(t *testing.T) {
	all := []string{webSYN, webACK, dns, six, ping, whoHas}
	for _, row := range filterRows {
		f, err := ParseFilter(row.filter)
		if err != nil {
			t.Errorf("%s: %v", row.filter, err)
			continue
		}
		for _, one := range all {
			if got, want := f.Match(packet(one), nil), slices.Contains(row.fits, one); got != want {
				t.Errorf("%q asks for %q: %v, not %v", row.filter, one, got, want)
			}
		}
	}
	// What is not known may be anything, and what is not so is not.
	for _, row := range []struct {
		filter, packet string
		fits           bool
	}{
		{"tcp port 443", "tcp ? 10.0.0.2:0", true}, {"udp port 443", "tcp ? 10.0.0.2:0", false},
		{"not host 10.0.0.1", "tcp ? 10.0.0.2:80", true}, {"not host 10.0.0.2", "tcp ? 10.0.0.2:80", false},
		{"port 80", "gre 10.0.0.1 10.0.0.2", false}, {"tcp[tcpflags] & tcp-rst != 0", "udp 10.0.0.1:1 10.0.0.2:2", false},
	} {
		f, err := ParseFilter(row.filter)
		if err != nil || f.Match(packet(row.packet), nil) != row.fits {
			t.Errorf("%q asks for %q: not %v (%v)", row.filter, row.packet, row.fits, err)
		}
	}
	f, _ := ParseFilter("tcp port 443")
	if inner := packet(webSYN).Tuple; !f.Match(packet(ping), &inner) || f.Match(packet(ping), nil) {
		t.Error("an ICMP error is not asked for by the packet that it is about, or without")
	}
}

func TestBadFilters(t *testing.T) {
	for _, row := range []struct {
		filter string
		at     int
		word   string
		what   string
	}{
		{"tcp prot 443", 5, "prot", "and, or, or the end"},
		{"tcp port", 9, "", "a port's number"},
		{"tcp port https", 10, "https", "a port's number"},
		{"port 0", 6, "0", "a port's number"},
		{"port 80-90", 6, "80-90", "a portrange"},
		{"portrange 90-80", 11, "90-80", "higher"},
		{"icmp port 80", 6, "port", "has no such thing"},
		{"(tcp", 5, "", `")" is expected`},
		{"tcp)", 4, ")", "and, or, or the end"},
		{"tcp and", 8, "", "is expected"},
		{"", 1, "", "is expected"},
		{"host web", 6, "web", "FROM or TO"},
		{"host 10.0.0.0/8", 6, "10.0.0.0/8", "a net, not a host"},
		{"net 10.0.0.1/8", 5, "10.0.0.1/8", "the net is 10.0.0.0/8"},
		{"ip host fd00::1", 9, "fd00::1", "the other family"},
		{"ether host 1:2:3:4:5:6", 1, "ether", "host, net, port"},
		{"tcp[0] = 1", 5, "0", "only its flags are known"},
		{"tcp[tcpflags] & tcp-push != 0", 17, "tcp-push", "others are not kept"},
		{"ö and tcp", 1, "ö", "host, net"},
		{strings.Repeat("(", 40) + "tcp" + strings.Repeat(")", 40), 34, "(", "more than 32"},
		{"port 1" + strings.Repeat(" or 1", 40), 0, "", "more than 64 steps"},
	} {
		_, err := ParseFilter(row.filter)
		var bad *BadFilter
		if !errors.As(err, &bad) || row.at > 0 && (bad.At != row.at || bad.Word != row.word) || !strings.Contains(bad.Error(), row.what) {
			t.Errorf("%q: %v, not at %d, %q: %s", row.filter, err, row.at, row.word, row.what)
		}
	}
}

func FuzzFilters(f *testing.F) {
	for _, row := range filterRows {
		f.Add(row.filter)
	}
	f.Fuzz(func(t *testing.T, text string) {
		filter, err := ParseFilter(text)
		if err != nil {
			if bad := (&BadFilter{}); !errors.As(err, &bad) || bad.At < 1 || bad.At > len([]rune(text))+1 {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		if len(filter.steps) == 0 || len(filter.steps) > mostTests || filter.answers() > mostAnswers {
			t.Fatalf("%q: %d steps, %d answers wait", text, len(filter.steps), filter.answers())
		}
		opposite := &Filter{append(slices.Clone(filter.steps), traceStep{Test: uint32(traceTestTEST_NOT)})}
		for _, one := range []string{webSYN, webACK, dns, six, ping, whoHas, "tcp ? 10.0.0.2:0"} {
			if !filter.Match(packet(one), nil) && !opposite.Match(packet(one), nil) {
				t.Fatalf("%q: %q fits neither it nor its opposite", text, one)
			}
		}
	})
}

// The kernel's programs count what a filter asks for apart from all else, as Match does, and
// hand out no other packets.
func TestTheKernelFilters(t *testing.T) {
	w := newTown(t)
	for _, row := range []struct {
		filter string
		fits   func(port int) bool
	}{
		{"udp dst port 9 and host " + server4, func(port int) bool { return port == 9 }},
		{"dst portrange 10-12 or dst port 20", func(port int) bool { return port >= 10 && port <= 12 || port == 20 }},
		{"not (portrange 10-30 or tcp) and dst net 10.1.0.0/24", func(port int) bool { return port < 10 || port > 30 }},
		{"ip6 or tcp[tcpflags] & tcp-syn != 0", func(int) bool { return false }},
	} {
		filter, err := ParseFilter(row.filter)
		w.must(err)
		var handed [32]atomic.Int64
		s, err := Watch(Options{Namespaces: []uint32{w.inode(w.server)}, Filter: filter, Packets: func(p Packet) {
			if p.Tuple.Protocol == unix.IPPROTO_UDP && p.Tuple.Destination.Port() < 32 {
				handed[p.Tuple.Destination.Port()].Add(1)
			}
		}})
		w.must(err)
		const rounds = 5
		w.inClient(func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			for range rounds {
				for port := 1; port < 32; port++ {
					to := &unix.SockaddrInet4{Addr: [4]byte{10, 1, 0, 2}, Port: port}
					if err := unix.Sendto(fd, []byte("x"), 0, to); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
						return err
					}
				}
			}
			return nil
		})
		r, err := s.Stop()
		w.must(err)
		var counted [32]int
		for i := range r.Events {
			e := &r.Events[i]
			if e.Kind == cause.Drop && e.Tuple.Protocol == unix.IPPROTO_UDP && e.Tuple.Destination.Port() < 32 {
				counted[e.Tuple.Destination.Port()] += int(e.Count)
				if filter.Match(e, nil) != row.fits(int(e.Tuple.Destination.Port())) {
					t.Errorf("%s: port %d: Match says otherwise", row.filter, e.Tuple.Destination.Port())
				}
			}
		}
		for port := 1; port < 32; port++ {
			want := int64(0)
			if row.fits(port) {
				want = rounds
			}
			if handed[port].Load() != want || counted[port] != rounds {
				t.Errorf("%s: of %d packets to port %d %d are handed out, not %d; %d are counted", row.filter, rounds, port, handed[port].Load(), want, counted[port])
			}
		}
	}
}
