package trace

import (
	"errors"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer/trace/cause"
)

// A range holds what is said of those around it, for the kernel looks at the longest one.
func TestClaims(t *testing.T) {
	ten, one := netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("10.1.0.1/32")
	all := claims(&Options{From: []Range{{ten, 0}}, To: []Range{{one, 80}, {one, 443}, {netip.MustParsePrefix("fd00::/8"), 53}}})
	for prefix, want := range map[string]claim{
		"::ffff:10.0.0.0/104": {sideFrom, [2]uint16{0, 0}},
		"::ffff:10.1.0.1/128": {sideFrom | sideTo, [2]uint16{0, 0}}, // of two ports
		"fd00::/8":            {sideTo, [2]uint16{0, 53}},
	} {
		if got := all[netip.MustParsePrefix(prefix)]; got != want {
			t.Errorf("%s: %+v, not %+v", prefix, got, want)
		}
	}
	if len(all) != 3 {
		t.Errorf("%v", all)
	}
}

// What is asked for is not pushed out by a storm of other packets, which are counted, too;
// and only it is handed out packet by packet: in both directions, and with the ICMP
// errors that are about it.
func TestWhatIsAskedForStays(t *testing.T) {
	w := newTown(t)
	const storm, ports = 5000, 300
	var others, mine atomic.Int64
	s, err := Watch(Options{
		Namespaces: []uint32{w.inode(w.client), w.inode(w.server)}, Entries: 128,
		From: []Range{{Prefix: netip.MustParsePrefix(client4 + "/32")}},
		To:   []Range{{Prefix: netip.MustParsePrefix(server4 + "/32"), Port: 9}},
		Packets: func(p Packet) {
			asked := p.Tuple.Destination == netip.MustParseAddrPort(server4+":9")
			if asked {
				mine.Add(1)
			} else if p.Tuple.Protocol == unix.IPPROTO_UDP {
				others.Add(1)
			}
		},
	})
	w.must(err)
	w.inClient(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for i := range storm {
			port := 1000 + i%ports
			if i%500 == 0 {
				port = 9
			}
			to := &unix.SockaddrInet4{Addr: [4]byte{10, 1, 0, 2}, Port: port}
			if err := unix.Sendto(fd, []byte("x"), 0, to); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		return nil
	})
	r, err := s.Stop()
	w.must(err)
	at := slices.IndexFunc(r.Events, func(e cause.Event) bool {
		return e.Kind == cause.Drop && e.Tuple.Destination == netip.MustParseAddrPort(server4+":9")
	})
	if at < 0 || r.Events[at].Count != storm/500 || len(r.Events[at].Packet) == 0 {
		t.Errorf("what was asked for: %+v", r.Events)
	}
	if len(r.Events) < 50 || r.Lost == 0 {
		t.Errorf("%d events, %d lost: the storm was not counted, or pushed nothing out", len(r.Events), r.Lost)
	}
	if mine.Load() != storm/500 || others.Load() != 0 {
		t.Errorf("%d packets that were asked for were handed out, and %d others", mine.Load(), others.Load())
	}
}
