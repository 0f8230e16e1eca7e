package sockdiag

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// A program that does not accept: its queue is seen to fill, and what it had no room
// for is counted at the socket.
func TestListeners(t *testing.T) {
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
		socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(socket)
		if err := unix.Bind(socket, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			return err
		}
		if err := unix.Listen(socket, 1); err != nil {
			return err
		}
		for range 6 {
			client, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(client)
			unix.Connect(client, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{127, 0, 0, 1}}) // EINPROGRESS
		}
		all, err := Listeners()
		if err != nil {
			return err
		}
		if len(all) != 1 || all[0].Address != netip.MustParseAddrPort("127.0.0.1:80") || all[0].Inode == 0 {
			t.Fatalf("listening: %+v", all)
		}
		if l := all[0]; l.Backlog != 1 || l.Waiting != 2 || l.Drops == 0 {
			t.Errorf("of 6 connections, with room for 1: %+v; not 2 waiting and the others dropped", l)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
