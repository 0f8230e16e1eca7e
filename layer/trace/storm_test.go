package trace

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer/trace/cause"
)

// A storm is counted beside the tables. Each of its packets is with its kind all the same, and
// whoever looks meanwhile never sees a count go back: of both families, of UDP and TCP, of one
// kind and of several in turn, from one client's port and from many, with the flags of an
// opening and without.
func TestStormsAreCountedExactly(t *testing.T) {
	w := newTown(t)
	const packets = 6000
	four, six := unix.SockaddrInet4{Addr: [4]byte{10, 1, 0, 2}}, unix.SockaddrInet6{Addr: netip.MustParseAddr(server6).As16()}
	to4 := func(port int) unix.Sockaddr { a := four; a.Port = port; return &a }
	to6 := func(port int) unix.Sockaddr { a := six; a.Port = port; return &a }
	for _, row := range []struct {
		what    string
		family  int
		sockets int
		to      func(i int) (unix.Sockaddr, uint16)
	}{
		{"one kind", unix.AF_INET, 1, func(int) (unix.Sockaddr, uint16) { return to4(9), 9 }},
		{"one kind of IPv6", unix.AF_INET6, 1, func(int) (unix.Sockaddr, uint16) { return to6(9), 9 }},
		{"from many ports", unix.AF_INET, 50, func(int) (unix.Sockaddr, uint16) { return to4(9), 9 }},
		{"two kinds in turn", unix.AF_INET, 1, func(i int) (unix.Sockaddr, uint16) { p := 9 + i%2; return to4(p), uint16(p) }},
		{"SYN and ACK in turn", unix.AF_PACKET, 1, func(i int) (unix.Sockaddr, uint16) { return to4(9 + i/100%2), uint16(9 + i/100%2) }},
		{"two by two", unix.AF_INET6, 3, func(i int) (unix.Sockaddr, uint16) { p := 9 + i/2%3; return to6(p), uint16(p) }},
	} {
		for _, always := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, always %v", row.what, always), func(t *testing.T) {
				w := w.on(t)
				s, err := Watch(Options{Namespaces: []uint32{w.inode(w.server)}, Always: always})
				w.must(err)
				over := make(chan struct{})
				var looking sync.WaitGroup
				looking.Go(func() { neverBack(t, s, over) })
				sent := map[uint16]uint64{}
				protocol := uint8(unix.IPPROTO_UDP)
				if row.family == unix.AF_PACKET {
					protocol = unix.IPPROTO_TCP
				}
				w.inClient(func() error {
					var sockets []int
					for range row.sockets {
						fd, err := unix.Socket(row.family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
						if protocol == unix.IPPROTO_TCP {
							fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
						}
						if err != nil {
							return err
						}
						defer unix.Close(fd)
						sockets = append(sockets, fd)
					}
					for i := range packets {
						to, port := row.to(i)
						data := []byte("x")
						if protocol == unix.IPPROTO_TCP {
							data = segment(uint16(30_000+i%20_000), port, []byte{2, 16}[i/100%2])
						}
						err := unix.Sendto(sockets[i%len(sockets)], data, 0, to)
						for errors.Is(err, unix.ECONNREFUSED) { // it tells of one before, and sends nothing
							err = unix.Sendto(sockets[i%len(sockets)], data, 0, to)
						}
						if err != nil {
							return err
						}
						sent[port]++
					}
					return nil
				})
				close(over)
				looking.Wait()
				r, err := s.Stop()
				w.must(err)
				counted, shares := map[uint16]uint64{}, uint64(0)
				for _, e := range r.Events {
					if e.Kind == cause.Drop && e.Space == w.inode(w.server) && e.Tuple.Protocol == protocol && e.Tuple.Destination.Port() < 20 {
						counted[e.Tuple.Destination.Port()] += e.Count
					}
				}
				for _, share := range r.Shares {
					if share.Reason == "NO_SOCKET" || share.Reason == "" {
						shares += share.Count
					}
				}
				for port, want := range sent {
					if counted[port] != want {
						t.Errorf("of %d packets to port %d %d are counted", want, port, counted[port])
					}
				}
				if always && shares < packets {
					t.Errorf("of %d packets %d are counted for the namespace", packets, shares)
				}
				if r.Lost != 0 {
					t.Errorf("%d events lost", r.Lost)
				}
			})
		}
	}
}

// segment is one of TCP without data from the client to the server, with its checksum.
func segment(from, to uint16, flags byte) []byte {
	s := make([]byte, 20)
	binary.BigEndian.PutUint16(s, from)
	binary.BigEndian.PutUint16(s[2:], to)
	s[12], s[13] = 5<<4, flags
	source, destination := netip.MustParseAddr(client4).As4(), netip.MustParseAddr(server4).As4()
	pseudo := append(append(source[:], destination[:]...), 0, unix.IPPROTO_TCP, 0, 20)
	binary.BigEndian.PutUint16(s[16:], ^internetSum(append(pseudo, s...)))
	return s
}

// neverBack looks again and again whether a count is lower than it was.
func neverBack(t *testing.T, s *Session, over <-chan struct{}) {
	was := map[string]uint64{}
	for looks := 0; ; looks++ {
		select {
		case <-over:
			t.Logf("looked %d times", looks)
			return
		default:
		}
		r := &Recording{}
		all, err := s.readCounts()
		if err == nil {
			err = errors.Join(s.readTotals(r, all), s.readShares(r))
		}
		if err != nil {
			t.Error(err)
			return
		}
		now := map[string]uint64{}
		for _, e := range all {
			now[fmt.Sprint("event ", e.key)] += e.Count
		}
		for _, share := range r.Shares {
			now[fmt.Sprint("share ", share.Space, share.Reason)] += share.Count
		}
		for _, total := range r.Totals {
			now[fmt.Sprint("total ", total.Kind, total.Reason)] += total.Count
		}
		for what, count := range was {
			if now[what] < count {
				t.Errorf("%s: %d, after %d", what, now[what], count)
			}
		}
		was = now
	}
}
