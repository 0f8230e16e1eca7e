package trace

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
)

// frame is one that nobody with good intent sends: headers that say they are longer than
// they are, chains of extension headers, fragments, anything.
func frame(r *rand.Rand) []byte {
	f := make([]byte, 14+r.IntN(300))
	for i := range f {
		f[i] = byte(r.Uint32())
	}
	copy(f, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1})
	binary.BigEndian.PutUint16(f[12:], []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6, unix.ETH_P_ARP, unix.ETH_P_8021Q, uint16(r.Uint32())}[r.IntN(5)])
	if len(f) > 34 {
		switch binary.BigEndian.Uint16(f[12:]) {
		case unix.ETH_P_IP:
			f[14] = 0x40 | byte(r.IntN(16))
			binary.BigEndian.PutUint16(f[16:], uint16(r.IntN(len(f)*2)))
			f[23] = []byte{1, 6, 17, 132, byte(r.Uint32())}[r.IntN(5)]
		case unix.ETH_P_IPV6:
			f[14] = 0x60
			binary.BigEndian.PutUint16(f[18:], uint16(r.IntN(len(f)*2)))
			f[20] = []byte{0, 43, 44, 60, 58, 6, byte(r.Uint32())}[r.IntN(7)]
		}
	}
	return f
}

// Whatever is sent, nothing is lost of the totals, what is kept is bounded, and every
// example can be read.
func TestHostilePackets(t *testing.T) {
	w := newTown(t)
	const capacity, frames = 512, 40_000
	s, err := Watch(Options{Namespaces: []uint32{w.inode(w.server)}, Entries: capacity, Packets: func(p Packet) {
		if p.Length < 0 || len(p.Data) > 1<<16 {
			t.Errorf("a packet of %d bytes, %d of them here", p.Length, len(p.Data))
		}
	}})
	w.must(err)
	r := rand.New(rand.NewPCG(1, 2))
	w.inClient(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		to := &unix.SockaddrLinklayer{Ifindex: w.clientDev}
		for range frames {
			if err := unix.Sendto(fd, frame(r), 0, to); err != nil && err != unix.ENOBUFS {
				return fmt.Errorf("send a frame: %w", err)
			}
		}
		return nil
	})
	recording, err := s.Stop()
	w.must(err)
	var died, kept, total uint64
	for _, one := range recording.Totals {
		total += one.Count
		if one.Kind == cause.Drop {
			died += one.Count
		}
	}
	for _, e := range recording.Events {
		kept += e.Count
	}
	if died < frames/2 {
		t.Errorf("only %d packets died of %d frames: the test is blind", died, frames)
	}
	if len(recording.Events) > capacity || kept+recording.Lost != total {
		t.Errorf("%d events are kept, of %d; they count %d, and %d are lost, of %d", len(recording.Events), capacity, kept, recording.Lost, total)
	}
	if recording.Lost == 0 {
		t.Error("all had room: the test is blind")
	}
	t.Logf("%d died, %d kinds of event kept, %d lost", died, len(recording.Events), recording.Lost)
}

// Namespaces that come and go leave nothing behind in memory.
func TestNamespacesComeAndGo(t *testing.T) {
	w := newTown(t)
	namespaces := 300
	if os.Getenv("MILLRACE_LONG") != "" {
		namespaces = 10_000
	}
	s, err := Watch(Options{})
	w.must(err)
	folder := t.TempDir()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range namespaces {
		path := filepath.Join(folder, fmt.Sprint(i))
		w.must(netns.Create(path))
		w.in(path, func() error { ask("udp", "127.0.0.1:9", 0); return nil })
		w.must(netns.Remove(path))
	}
	r, err := s.Stop()
	w.must(err)
	runtime.ReadMemStats(&after)
	if limit := 8192; len(r.Events) > limit {
		t.Errorf("%d events are kept, more than %d", len(r.Events), limit)
	}
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 64<<20 {
		t.Errorf("%d bytes more than before", grown)
	}
}
