package frame

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// All frames that come by a device arrive, with many source ports, valid, and whole each
// time; those for nobody do not.
func TestFramesArrive(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	var spaces [2]string
	for i, name := range []string{"near", "far"} {
		spaces[i] = filepath.Join(t.TempDir(), name)
		must(t, netns.Create(spaces[i]))
		t.Cleanup(func() { must(t, netns.Remove(spaces[i])) })
	}
	near, err := link.Open(spaces[0])
	must(t, err)
	defer near.Close()
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 2}
	index, err := near.Veth(link.Veth{Name: "eth0", Peer: "eth0", PeerMAC: mac, PeerNamespace: spaces[1]})
	must(t, err)
	must(t, near.UpLoopback())
	must(t, near.Up(index))
	far, err := link.Open(spaces[1])
	must(t, err)
	defer far.Close()
	peer, err := far.Index("eth0")
	must(t, err)
	must(t, far.Up(peer))
	must(t, far.Addr(peer, netip.MustParsePrefix("10.0.0.2/24")))

	to := netip.MustParseAddrPort("10.0.0.2:9")
	var server *net.UDPConn
	must(t, netns.Do(spaces[1], func() (err error) {
		server, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(to))
		return err
	}))
	defer server.Close()
	send := func(count int) (made uint64) {
		t.Helper()
		must(t, netns.Do(spaces[1], func() error {
			source, err := Open(Frame{From: net.HardwareAddr{2, 0, 0, 0, 0, 1}, To: mac, Source: netip.MustParseAddr("10.0.0.1"), Destination: to}, "eth0")
			if err != nil {
				return err
			}
			defer source.Close()
			each, err := source.Send(count)
			if each <= 0 || each > time.Second {
				t.Errorf("each of %d frames took %s", count, each)
			}
			if err == nil {
				made, err = source.Count()
			}
			if idle, wrong := source.Idle(count); wrong != nil || idle <= 0 {
				t.Errorf("each of %d frames for nobody took %s: %v", count, idle, wrong)
			}
			return err
		}))
		if made < uint64(count) {
			t.Errorf("%d frames were made, not %d", made, count)
		}
		return made
	}
	send(50)
	ports := map[uint16]bool{}
	for range 50 {
		must(t, server.SetReadDeadline(time.Now().Add(5*time.Second)))
		n, from, err := server.ReadFromUDPAddrPort(make([]byte, 100))
		must(t, err)
		if ports[from.Port()] = true; n != frameLength-headerLength || from.Addr() != netip.MustParseAddr("10.0.0.1") {
			t.Fatalf("%d bytes came from %s", n, from)
		}
	}
	if len(ports) < 30 {
		t.Errorf("50 frames have %d ports", len(ports))
	}
	var sink *Sink
	must(t, netns.Do(spaces[1], func() (err error) {
		sink, err = Catch(to.Port(), "eth0")
		return err
	}))
	count, n := send(20000), uint64(0)
	for end := time.Now().Add(5 * time.Second); n < count && time.Now().Before(end); time.Sleep(time.Millisecond) {
		n, err = sink.Count()
		must(t, err)
	}
	if n != count {
		t.Errorf("%d of %d frames came", n, count)
	}
	must(t, sink.Close())
	send(1)
	must(t, server.SetReadDeadline(time.Now().Add(5*time.Second)))
	if _, err := server.Read(make([]byte, 100)); err != nil {
		t.Errorf("without the sink nothing comes: %v", err)
	}
}
