package sockdiag

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// Of each socket its ends, queues and drops are read: of a connection that nobody reads
// from, of a datagram socket without room, of a listener.
func TestWalk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	path := filepath.Join(t.TempDir(), "net")
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	defer netns.Remove(path)
	n, err := link.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if err := n.UpLoopback(); err != nil {
		t.Fatal(err)
	}
	err = netns.Do(path, func() error {
		listener, err := net.Listen("tcp6", "[::1]:80")
		if err != nil {
			return err
		}
		defer listener.Close()
		client, err := net.Dial("tcp6", "[::1]:80")
		if err != nil {
			return err
		}
		defer client.Close()
		if _, err := client.Write(make([]byte, 5000)); err != nil {
			return err
		}
		full, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 53})
		if err != nil {
			return err
		}
		defer full.Close()
		if err := full.SetReadBuffer(2048); err != nil {
			return err
		}
		sender, err := net.DialUDP("udp4", nil, full.LocalAddr().(*net.UDPAddr))
		if err != nil {
			return err
		}
		defer sender.Close()
		for range 50 {
			if _, err := sender.Write(make([]byte, 1000)); err != nil {
				return err
			}
		}
		seen := map[string]bool{}
		note := func(s State) {
			switch {
			case s.State == stateListen && s.Local == netip.MustParseAddrPort("[::1]:80"):
				seen["listener"] = s.Inode != 0 && s.Cookie != 0
			case s.State == 1 && s.Local.Port() == 80:
				seen["unread"] = s.ReceiveQueue == 5000 || s.ReceiveQueue == 0 // not accepted yet, it has no queue
			case s.State == 1 && s.Remote.Port() == 80:
				seen["client"] = s.MSS > 1000 && s.BytesAcked >= 5000 && s.RTT > 0
			case s.Protocol == unix.IPPROTO_UDP && s.Local.Port() == 53 && s.Remote.Port() == 0:
				seen["datagrams"] = s.Drops > 0 && s.Received > 0 && s.ReceiveBuffer >= 2048
			}
		}
		for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			if err := Walk(protocol, note); err != nil {
				return err
			}
		}
		if ports, err := Ports(); err != nil || len(ports) != 1 || !ports[80] {
			t.Errorf("ports that listen: %v, %v, want 80 alone", ports, err)
		}
		for _, what := range []string{"listener", "unread", "client", "datagrams"} {
			if !seen[what] {
				t.Errorf("%s: not as it is: %v", what, seen)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
