package service

import (
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/bpfmap"
)

// dial connects from a machine, for as long as the test runs.
func (p *pod) dial(network, address string) net.Conn {
	p.v.t.Helper()
	var conn net.Conn
	p.v.must(p.inside(func() (err error) {
		conn, err = net.DialTimeout(network, address, patience)
		return err
	}))
	p.v.t.Cleanup(func() { conn.Close() })
	return conn
}

// Who leaves begins nothing new: that is for whoever serves beside, here the node
// itself at its ports. Connections that are open go on, and are counted until they
// have ended; datagrams go over at once. A new process takes it back.
func TestWhoLeavesLetsConnectionsEnd(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("pod")
	h.other.serveAll("pod")
	beside := &pod{v: h.village, netns: h.NetNS}
	beside.serve("tcp", 30080, "beside")
	beside.serve("udp", 30053, "beside")
	snapshot := h.services(nil, h.local, h.other)
	h.open(snapshot)
	const perWay = 6 // so that both endpoints have some
	var streams, questions []net.Conn
	for i := range perWay {
		for _, way := range entrances[:4] {
			conn := h.client.dial(way.network, way.address)
			if way.network == "tcp" {
				streams = append(streams, conn)
			} else {
				questions = append(questions, conn)
			}
			h.must(exchangeLine(conn, fmt.Sprint("before ", i)))
		}
		conn := h.local.dial("tcp", "10.96.0.1:80")
		streams = append(streams, conn)
		h.must(exchangeLine(conn, "from a pod"))
	}
	h.leaves()
	for i, conn := range streams {
		if err := exchangeLine(conn, "after"); err != nil {
			t.Errorf("stream %d to %s: %v", i, conn.RemoteAddr(), err)
		}
	}
	for _, conn := range questions {
		line, _, err := talk(conn, "after")
		if err != nil || line != "beside "+client4 && line != "beside "+client6 {
			t.Errorf("the next datagram to %s: %q, %v; want who serves beside", conn.RemoteAddr(), line, err)
		}
	}
	for _, way := range entrances[:4] {
		if line, _, err := h.client.call(way.network, way.address, "new"); err != nil || line[:6] != "beside" {
			t.Errorf("who begins with %s meets %q, %v; want who serves beside", way.address, line, err)
		}
	}
	h.left(len(streams))
	for _, conn := range streams[1:] {
		hangUp(conn)
	}
	h.left(1)
	h.forgets(2)
	h.reopen(snapshot)
	h.whole("after all but one were forgotten")
	h.must(exchangeLine(streams[0], "served again"))
	for _, way := range entrances[:4] {
		if line, _, err := h.client.call(way.network, way.address, "again"); err != nil || line[:3] != "pod" {
			t.Errorf("with a new process %s is %q, %v", way.address, line, err)
		}
	}
}

// The same source port may begin anew with whoever serves beside, when its connection
// has ended: nothing of the one before is in its way.
func TestWhoLeavesForgetsWhatBeginsAnew(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("pod")
	(&pod{v: h.village, netns: h.NetNS}).serve("tcp", 30080, "beside")
	h.open(h.services(nil, h.local))
	for _, want := range []string{"pod " + client4 + "\n", "beside " + client4 + "\n"} {
		conn, err := h.client.fromPort("tcp", nodeToClient+":30080", 4000)
		h.must(err)
		conn.SetDeadline(time.Now().Add(patience))
		line := make([]byte, len(want))
		if _, err := conn.Read(line); err != nil || string(line) != want {
			t.Errorf("port 4000 meets %q, %v; want %q", line, err, want)
		}
		h.must(exchangeLine(conn, "goes on"))
		hangUp(conn)
		h.leaves()
	}
}

func (h *harbour) leaves() {
	h.t.Helper()
	h.must(h.layer.Close())
	_, err := New(h.layer.settings).Leave()
	h.must(err)
}

// forgets leaves again until so many entries of flows are there, and no more of
// masqueraded ones.
func (h *harbour) forgets(want int) {
	h.t.Helper()
	l := New(h.layer.settings)
	entries := func(name string) (n int) {
		m, err := l.openPin(name)
		h.must(err)
		defer m.Close()
		h.must(bpfmap.Walk(m, func(_, _ []byte) error { n++; return nil }))
		return n
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		_, err := l.Leave()
		h.must(err)
		flows, masqueraded := entries(datapathMapTranslations), entries(datapathMapMasquerades)
		if flows == want && masqueraded <= want {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%d entries of flows and %d of masqueraded ones are left, want %d", flows, masqueraded, want)
		}
	}
}

// left waits until so many connections are left.
func (h *harbour) left(want int) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		left, err := New(h.layer.settings).Left()
		h.must(err)
		if left == want {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%d connections are left, want %d", left, want)
		}
	}
}

// Who serves beside masquerades towards the same endpoints, and cannot know which ports
// of the node our open connections have: it gets none of them.
func TestWhoLeavesReservesThePortsOfOpenConnections(t *testing.T) {
	h := newHarbour(t)
	h.sysctl(h.NetNS, "net.ipv4.ip_local_port_range", "1024 65533") // two ports are left for others
	h.rules(`table inet other { chain postrouting { type nat hook postrouting priority 100;
		ip daddr 10.244.2.0/24 tcp sport 4000-4009 masquerade to :65534-65535
		ip6 daddr fd00:244:2::/64 tcp sport 4000-4009 masquerade to :65534-65535
		}
		}`)
	h.routes(h.client.netns, farPod4+"/32", nodeToClient, farPod6+"/128", nodeToClient6)
	h.other.serveAll("far")
	h.open(h.services(nil, h.other))
	ways := []struct{ endpoint, entrance string }{
		{farPod4 + ":8080", nodeToClient + ":30080"}, {"[" + farPod6 + "]:8080", "[" + nodeToClient6 + "]:30080"},
	}
	ours := make([]net.Conn, len(ways))
	for i, way := range ways {
		ours[i] = h.client.dial("tcp", way.entrance)
		h.must(exchangeLine(ours[i], "before"))
	}
	h.leaves()
	h.leaves() // as often as one likes
	for i, way := range ways {
		theirs, err := h.client.fromPort("tcp", way.endpoint, 4000)
		if err != nil {
			t.Fatalf("%s: %v; the other port is free", way.endpoint, err)
		}
		defer theirs.Close()
		for n := range 3 {
			h.must(exchangeLine(theirs, fmt.Sprint("theirs ", n)))
			h.must(exchangeLine(ours[i], fmt.Sprint("ours ", n)))
		}
		if err := h.client.quicklyFrom(way.endpoint, 4001); !errors.Is(err, errNoAnswer) {
			t.Errorf("%s: %v; there is no third port", way.endpoint, err)
		}
		h.must(exchangeLine(ours[i], "after"))
	}
}

// quicklyFrom connects from a port, and waits half a second for an answer.
func (p *pod) quicklyFrom(address string, port int) error {
	return p.inside(func() error {
		dialer := net.Dialer{Timeout: patience / 20, LocalAddr: &net.TCPAddr{Port: port}}
		conn, err := dialer.Dial("tcp", address)
		var late net.Error
		if errors.As(err, &late) && late.Timeout() {
			return errNoAnswer
		}
		if err == nil {
			conn.Close()
		}
		return err
	})
}
