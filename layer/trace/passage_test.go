package trace

import (
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/layer/trace/cause"
)

// The time that packets wait in a queue is told apart from what they take over a wire, of
// those packets alone that are asked for.
func TestTimeOnTheWay(t *testing.T) {
	w := newTown(t)
	var listener *net.UDPConn
	w.inServer(func() (err error) {
		listener, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(server4+":9")))
		return err
	})
	defer listener.Close()
	const rate = 100_000 // bytes a second
	w.inClient(func() error {
		return netlink.QdiscAdd(&netlink.Tbf{
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: w.clientDev, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			Rate:       rate, Limit: 100_000, Buffer: 2000 * 15625 / rate * 1000,
		})
	})
	client, server := w.inode(w.client), w.inode(w.server)
	s, err := Watch(Options{
		Namespaces: []uint32{client, server},
		From:       []Range{{Prefix: netip.MustParsePrefix(client4 + "/32")}},
		To:         []Range{{Prefix: netip.MustParsePrefix(server4 + "/32"), Port: 9}},
	})
	w.must(err)
	const packets, size = 20, 1000
	w.inClient(func() error {
		for _, to := range []string{server4 + ":9", server4 + ":10"} {
			conn, err := net.Dial("udp", to)
			if err != nil {
				return err
			}
			defer conn.Close()
			for range packets {
				if _, err := conn.Write(make([]byte, size)); err != nil && to == server4+":9" {
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
	// What is sent at once waits for what is before it: the last for nearly all of it.
	if least := time.Second * (packets - 4) * size / rate; waited.Longest < least || wire.Mean > waited.Mean {
		t.Errorf("in the queue %v at most, which takes %v; on the wire %v", waited.Longest, least, wire.Mean)
	}
}
