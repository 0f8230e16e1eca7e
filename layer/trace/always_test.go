package trace

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/layer/trace/cause"
)

// always watches the town as the layer does.
func (w *town) always() *Session {
	w.t.Helper()
	s, err := Watch(Options{Namespaces: []uint32{w.inode(w.client), w.inode(w.server)}, Always: true})
	w.must(err)
	return s
}

// Of a storm the last examples are kept, at most a few a second, each with its packet and
// the functions that led to its death; and each namespace's packets are counted.
func TestExamplesAreKept(t *testing.T) {
	w := newTown(t)
	s := w.always()
	const storm = 3000
	w.inClient(func() error {
		c, err := net.Dial("udp", server4+":9")
		if err != nil {
			return err
		}
		defer c.Close()
		for range storm {
			_, _ = c.Write([]byte("hello")) // the answer to the one before it refuses every other
			_, _ = c.Write([]byte("hello"))
		}
		return nil
	})
	r, err := s.Stop()
	w.must(err)
	var mine []cause.Event
	for _, e := range r.Examples {
		if e.Kind == cause.Drop && e.Tuple.Destination == netip.MustParseAddrPort(server4+":9") {
			mine = append(mine, e)
		}
	}
	if len(mine) < 2 || len(mine) > 16 {
		t.Fatalf("%d examples of %d drops are kept", len(mine), storm)
	}
	for _, e := range mine {
		if e.Location == "" || len(e.Stack) == 0 || !bytes.HasSuffix(e.Packet, []byte("hello")) || e.Device != "eth0" || e.Space != w.inode(w.server) {
			t.Errorf("an example: %+v", e)
		}
	}
	var died uint64
	for _, total := range r.Totals {
		if total.Kind == cause.Drop && total.Reason == "NO_SOCKET" {
			died += total.Count
		}
	}
	at := slices.IndexFunc(r.Shares, func(s Share) bool { return s.Space == w.inode(w.server) && s.Reason == "NO_SOCKET" })
	if at < 0 || r.Shares[at].Count != died || died < storm {
		t.Errorf("%d of the server's died: %+v", died, r.Shares)
	}
}

// The numbers of connections are read when they end, at both ends: what was sent and
// sent again, and whether they ever were answered.
func TestConnectionsThatEnd(t *testing.T) {
	w := newTown(t)
	w.lost(w.client, w.clientDev, "10.1.0.8")
	var listener net.Listener
	w.inServer(func() (err error) { listener, err = net.Listen("tcp", server4+":80"); return err })
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
	s := w.always()
	const connections, length = 3, 100_000
	w.inClient(func() error {
		for range connections {
			c, err := net.Dial("tcp", server4+":80")
			if err != nil {
				return err
			}
			go func() { c.Write(make([]byte, length)); c.(*net.TCPConn).CloseWrite() }()
			if _, err := io.ReadAll(c); err != nil {
				return err
			}
			c.Close()
		}
		ask("tcp", server4+":81", time.Second)
		ask("tcp", "10.1.0.8:80", 1500*time.Millisecond)
		return nil
	})
	find := func(r *Recording, space uint32, server string, ofClient bool) *Flow {
		at := slices.IndexFunc(r.Flows, func(f Flow) bool {
			return f.Space == space && f.Server == netip.MustParseAddrPort(server) && f.Client == netip.MustParseAddr(client4) && f.OfClient == ofClient
		})
		if at < 0 {
			return &Flow{}
		}
		return &r.Flows[at]
	}
	client, server := w.inode(w.client), w.inode(w.server)
	var r *Recording
	whole := func() bool {
		near, far := find(r, client, server4+":80", true), find(r, server, server4+":80", false)
		return near.Ended == connections && far.Ended == connections && near.Sent >= connections*length && near.Received >= connections*length &&
			far.Received >= connections*length && near.Longest > 0 && find(r, client, server4+":81", true).Refused == 1 &&
			find(r, client, "10.1.0.8:80", true).Unanswered == 1 && find(r, client, "10.1.0.8:80", true).Retransmits > 0
	}
	for patience := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		var err error
		r, err = s.record()
		w.must(err)
		if whole() || time.Now().After(patience) {
			break
		}
	}
	if !whole() || r.FlowsLost > 0 {
		t.Errorf("%+v, lost %d", r.Flows, r.FlowsLost)
	}
	_, err := s.Stop()
	w.must(err)
}

// Which end is the server is known by who accepted, whatever the ports are, and also when
// nobody listens there any more.
func TestServerOfAConnectionThatEnds(t *testing.T) {
	w := newTown(t)
	s := w.always()
	client, server := w.inode(w.client), w.inode(w.server)
	for i, at := range []uint16{80, 50051} {
		to := netip.AddrPortFrom(netip.MustParseAddr(server4), at)
		for _, from := range []int{20_000 + i, 60_000 + i} {
			var listener net.Listener
			w.inServer(func() (err error) { listener, err = net.Listen("tcp", to.String()); return err })
			var near net.Conn
			w.inClient(func() (err error) {
				near, err = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(client4), Port: from}}).Dial("tcp", to.String())
				return err
			})
			far, err := listener.Accept()
			w.must(err)
			w.must(errors.Join(listener.Close(), near.Close(), far.Close()))
		}
		for patience := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			r, err := s.record()
			w.must(err)
			ended := map[bool]uint64{}
			for _, f := range r.Flows {
				if f.Server == to && f.Client == netip.MustParseAddr(client4) && f.Space == map[bool]uint32{true: client, false: server}[f.OfClient] {
					ended[f.OfClient] += f.Ended
				}
			}
			if ended[true] == 2 && ended[false] == 2 {
				break
			}
			if time.Now().After(patience) {
				t.Fatalf("of two connections to %v %d have ended at the client, %d at the server: %+v", to, ended[true], ended[false], r.Flows)
			}
		}
	}
	_, err := s.Stop()
	w.must(err)
}

// What the layer keeps is there for the next process, too.
func TestCountedIsWhatWasKept(t *testing.T) {
	w := newTown(t)
	bed := layertest.NewBed(t)
	pins := filepath.Join(bed.BPF, "trace")
	l := New(Settings{Pins: pins, Whole: true})
	w.must(l.Open())
	have, err := l.Read()
	w.must(err)
	want := l.Plan(snapshots[0])
	_, _, err = l.Apply(have, want, l.Diff(have, want, true))
	w.must(err)
	w.must(l.Close())
	w.inClient(func() error {
		ask("udp", server4+":9", time.Second)
		ask("tcp", server4+":81", time.Second)
		return nil
	})
	r, err := New(Settings{Pins: pins, Whole: true}).Counted()
	w.must(err)
	server := w.inode(w.server)
	if !slices.ContainsFunc(r.Examples, func(e cause.Event) bool { return e.Space == server && e.Tuple.Destination.Port() == 9 }) ||
		!slices.ContainsFunc(r.Shares, func(s Share) bool { return s.Space == server && s.Count > 0 }) ||
		!slices.ContainsFunc(r.Flows, func(f Flow) bool { return f.Refused > 0 && f.Server == netip.MustParseAddrPort(server4+":81") }) {
		t.Errorf("examples %+v, shares %+v, flows %+v", r.Examples, r.Shares, r.Flows)
	}
	d, err := New(Settings{Pins: pins, Whole: true}).Describe()
	w.must(err)
	if !slices.ContainsFunc(d.Flows, func(f layer.Flow) bool {
		return f.Refused > 0 && f.OfClient && f.Space == w.inode(w.client) && f.Server == netip.MustParseAddrPort(server4+":81")
	}) {
		t.Errorf("flows for metrics: %+v", d.Flows)
	}
}
