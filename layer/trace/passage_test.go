package trace

import (
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
)

// The time that packets wait in a queue is told apart from what they take over a wire, of
// those packets alone that are asked for.
func TestTimeOnTheWay(t *testing.T) {
	w := newTown(t)
	w.withoutLabels()
	const rate = 100_000 // bytes a second
	w.inClient(func() error {
		return netlink.QdiscAdd(&netlink.Tbf{
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: w.clientDev, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			Rate:       rate, Limit: 100_000, Buffer: 2000 * 15625 / rate * 1000,
		})
	})
	client, server := w.inode(w.client), w.inode(w.server)
	for _, ends := range [][2]string{{client4, server4}, {client6, server6}} {
		t.Run(ends[1], func(t *testing.T) {
			w := w.on(t)
			near, far := netip.MustParseAddr(ends[0]), netip.MustParseAddr(ends[1])
			asked, other := netip.AddrPortFrom(far, 9), netip.AddrPortFrom(far, 10)
			var listener *net.UDPConn
			w.inServer(func() (err error) {
				listener, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(asked))
				return err
			})
			defer listener.Close()
			s, err := Watch(Options{
				Namespaces: []uint32{client, server},
				From:       []Range{{Prefix: netip.PrefixFrom(near, near.BitLen())}},
				To:         []Range{{Prefix: netip.PrefixFrom(far, far.BitLen()), Port: asked.Port()}},
			})
			w.must(err)
			const packets, size = 20, 1000
			w.inClient(func() error {
				for _, to := range []netip.AddrPort{asked, other} {
					conn, err := net.Dial("udp", to.String())
					if err != nil {
						return err
					}
					defer conn.Close()
					for range packets {
						if _, err := conn.Write(make([]byte, size)); err != nil && to == asked {
							return err
						}
					}
				}
				return nil
			})
			listener.SetReadDeadline(time.Now().Add(10 * time.Second))
			for range packets {
				_, err := listener.Read(make([]byte, size))
				w.must(err)
			}
			r, err := s.Stop()
			w.must(err)
			find := func(from, to cause.Spot) cause.Passage {
				at := slices.IndexFunc(r.Hops, func(p cause.Passage) bool { return p.From == from && p.To == to })
				if at < 0 {
					t.Fatalf("no time from %+v to %+v: %+v, missing %v", from, to, r.Hops, r.Missing)
				}
				return r.Hops[at]
			}
			left := cause.Spot{Space: client, Index: w.clientDev, Point: cause.Left}
			waited := find(cause.Spot{Space: client, Index: w.clientDev, Point: cause.Queued}, left)
			wire := find(left, cause.Spot{Space: server, Index: w.serverDev, Point: cause.Came})
			if waited.Packets != packets || wire.Packets != packets {
				t.Errorf("%d and %d packets, not %d: %+v", waited.Packets, wire.Packets, packets, r.Hops)
			}
			// What is sent at once waits for what is before it: the last for nearly all of it, or
			// half where the sender is kept waiting meanwhile.
			if least := time.Second * packets * size / rate / 2; waited.Longest < least || wire.Mean > waited.Mean {
				t.Errorf("in the queue %v at most, of which it takes %v; on the wire %v", waited.Longest, least, wire.Mean)
			}
		})
	}
}

// withoutLabels lets all packets of IPv6 have the same label.
func (w *town) withoutLabels() {
	off := func() error { return netns.SetSysctl("net.ipv6.auto_flowlabels", "0") }
	w.inClient(off)
	w.inServer(off)
}

// Packets that have had the same memory one after the other are not taken for one: not what
// TCP sends once more, nor the answer for the question.
func TestAnotherPacketIsNotOnTheWay(t *testing.T) {
	w := newTown(t)
	w.withoutLabels()
	const nobody = "fd01::8"
	w.lost(w.client, w.clientDev, nobody)
	var listener net.Listener
	w.inServer(func() (err error) { listener, err = net.Listen("tcp", net.JoinHostPort(server6, "80")); return err })
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
	client := w.inode(w.client)
	filter, err := ParseFilter("tcp") // what neighbours ask for each other is another matter
	w.must(err)
	s, err := Watch(Options{Namespaces: []uint32{client}, Filter: filter, From: []Range{{Prefix: netip.MustParsePrefix(client6 + "/128")}}})
	w.must(err)
	w.inClient(func() error {
		c, err := net.Dial("tcp", net.JoinHostPort(server6, "80"))
		if err != nil {
			return err
		}
		defer c.Close()
		for data := make([]byte, 64); err == nil && data[0] < 250; data[0]++ {
			if _, err = c.Write(data); err == nil {
				_, err = io.ReadFull(c, data)
			}
		}
		ask("tcp", net.JoinHostPort(nobody, "80"), 1500*time.Millisecond) // a SYN is sent twice
		return err
	})
	r, err := s.Stop()
	w.must(err)
	queued := cause.Spot{Space: client, Index: w.clientDev, Point: cause.Queued}
	left := cause.Spot{Space: client, Index: w.clientDev, Point: cause.Left}
	if len(r.Hops) != 1 || r.Hops[0].From != queued || r.Hops[0].To != left || r.Hops[0].Packets < 250 {
		t.Errorf("%+v, missing %v", r.Hops, r.Missing)
	}
}
