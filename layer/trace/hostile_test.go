package trace

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

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

// bad is a frame that is made by hand, and what it is for somebody who looks at it: the
// cause that is to be named, or "" if all that is wrong is the packet itself.
type bad struct {
	what  string
	frame []byte
	// dies says that the server's namespace throws it away; others it takes.
	dies  bool
	cause string
}

// badFrames go to the server's device from the client's.
func badFrames(mac []byte) []bad {
	ether := func(kind uint16, body []byte) []byte {
		f := append(append([]byte{}, mac...), 2, 0, 0, 0, 0, 1)
		return append(binary.BigEndian.AppendUint16(f, kind), body...)
	}
	from, to := netip.MustParseAddr(client4), netip.MustParseAddr(server4)
	four := func(change func(h []byte), proto byte, body []byte) []byte {
		h := make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(body)))
		copy(h[12:], from.AsSlice())
		copy(h[16:], to.AsSlice())
		if change != nil {
			change(h)
		}
		binary.BigEndian.PutUint16(h[10:], 0)
		binary.BigEndian.PutUint16(h[10:], ^internetSum(h))
		return ether(unix.ETH_P_IP, append(h, body...))
	}
	six := func(next byte, body []byte, more int) []byte {
		h := make([]byte, 40)
		h[0], h[6], h[7] = 0x60, next, 64
		binary.BigEndian.PutUint16(h[4:], uint16(len(body)+more))
		copy(h[8:], netip.MustParseAddr(client6).AsSlice())
		copy(h[24:], netip.MustParseAddr(server6).AsSlice())
		return ether(unix.ETH_P_IPV6, append(h, body...))
	}
	udp := func(port uint16, length int, payload []byte) []byte {
		u := make([]byte, 8)
		binary.BigEndian.PutUint16(u, 4711)
		binary.BigEndian.PutUint16(u[2:], port)
		binary.BigEndian.PutUint16(u[4:], uint16(length))
		return append(u, payload...)
	}
	chain := func(kind byte, headers int, last byte, body []byte) []byte {
		var b []byte
		for i := range headers {
			next := kind
			if i == headers-1 {
				next = last
			}
			b = append(b, next, 0, 1, 4, 0, 0, 0, 0) // one option, PadN
		}
		return append(b, body...)
	}
	word := func(at int, value uint16) func([]byte) {
		return func(h []byte) { binary.BigEndian.PutUint16(h[at:], value) }
	}
	first := func(value byte) func([]byte) { return func(h []byte) { h[0] = value } }
	flip := four(nil, unix.IPPROTO_UDP, udp(openPort, 8, nil))
	flip[14+10] ^= 0x40
	vxlan := append([]byte{8, 0, 0, 0, 0, 0, 42, 0}, four(nil, unix.IPPROTO_GRE, []byte{0, 0, 0x65, 0x58, 1, 2})...)
	return []bad{
		{"a header of IPv4 that is cut off", ether(unix.ETH_P_IP, []byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, 17}), true, ""},
		{"no header at all", ether(unix.ETH_P_IP, nil), true, ""},
		{"a header of 12 bytes", four(first(0x43), unix.IPPROTO_UDP, udp(openPort, 8, nil)), true, ""},
		{"a header of no bytes", four(first(0x40), unix.IPPROTO_UDP, udp(openPort, 8, nil)), true, ""},
		{"a header longer than the packet", four(first(0x4f), unix.IPPROTO_UDP, udp(openPort, 8, nil)), true, ""},
		{"version 5", four(first(0x55), unix.IPPROTO_UDP, udp(openPort, 8, nil)), true, ""},
		{"longer than it is", four(word(2, 9000), unix.IPPROTO_UDP, udp(openPort, 8, nil)), true, ""},
		{"shorter than its header", four(word(2, 19), unix.IPPROTO_UDP, udp(openPort, 8, nil)), true, ""},
		{"UDP without a header", four(nil, unix.IPPROTO_UDP, []byte{1, 2, 3}), true, ""},
		{"UDP that says it has no bytes", four(nil, unix.IPPROTO_UDP, udp(openPort, 0, nil)), true, ""},
		{"UDP that says it has more", four(nil, unix.IPPROTO_UDP, udp(openPort, 500, nil)), true, ""},
		{"UDP without data", four(nil, unix.IPPROTO_UDP, udp(openPort, 8, nil)), false, ""},
		{"IPv6 that is cut off", ether(unix.ETH_P_IPV6, []byte{0x60, 0, 0, 0, 0, 8, 17}), true, ""},
		{"IPv6 without addresses", ether(unix.ETH_P_IPV6, append([]byte{0x60, 0, 0, 0, 9, 0, 17, 64}, make([]byte, 32)...)), true, ""},
		{"IPv6 longer than it is", six(unix.IPPROTO_UDP, udp(openPort, 8, nil), 900), true, ""},
		{"a chain of 20 destination options", six(unix.IPPROTO_DSTOPTS, chain(unix.IPPROTO_DSTOPTS, 20, unix.IPPROTO_NONE, nil), 0), true, ""},
		{"hop-by-hop options behind others", six(unix.IPPROTO_DSTOPTS, chain(unix.IPPROTO_HOPOPTS, 3, unix.IPPROTO_NONE, nil), 0), true, ""},
		{"a chain that ends in nothing", six(unix.IPPROTO_DSTOPTS, []byte{unix.IPPROTO_DSTOPTS, 255, 0, 0, 0, 0, 0, 0}, 0), true, ""},
		{"a frame of nobody's protocol", ether(0x88b5, []byte("experiment")), true, ""},
		{"a frame of another", ether(0x1234, []byte{0xde, 0xad}), true, ""},
		{"an IP checksum that is wrong", flip, true, "bad-checksum"},
		{"a source on loopback", four(func(h []byte) { copy(h[12:], []byte{127, 0, 0, 9}) }, unix.IPPROTO_UDP, udp(openPort, 8, nil)), true, "martian-source"},
		{"GRE, which nobody takes", four(nil, unix.IPPROTO_GRE, []byte{0, 0, 8, 0, 0x45}), true, "no-listener"},
		{"VXLAN with GRE in it, where nobody listens", four(nil, unix.IPPROTO_UDP, udp(4789, 8+len(vxlan), vxlan)), true, "no-listener"},
	}
}

// openPort is one where the server takes UDP.
const openPort = 4000

func internetSum(b []byte) uint16 {
	var sum uint32
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// Packets that are wrong in themselves are counted, written to the file and told by their
// reasons; no cause is named for them but one that is there.
func TestCraftedPackets(t *testing.T) {
	w := newTown(t)
	var mac []byte
	w.inServer(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		mac = eth0.HardwareAddr
		conn, err := net.ListenPacket("udp", fmt.Sprintf("%s:%d", server4, openPort))
		if err == nil {
			t.Cleanup(func() { conn.Close() })
		}
		return err
	})
	var nothing []bad
	for _, b := range badFrames(mac) {
		if b.cause == "" {
			nothing = append(nothing, b)
			continue
		}
		t.Run(b.what, func(t *testing.T) { w.on(t).crafted([]bad{b}) })
	}
	t.Run("of no cause", func(t *testing.T) { w.on(t).crafted(nothing) })
}

// on is the town in another test.
func (w *town) on(t *testing.T) *town {
	other := *w
	other.t = t
	return &other
}

// crafted sends each frame a few times while it is watched, and looks at what is told.
func (w *town) crafted(all []bad) {
	reader, err := NewReader([]Namespace{{Name: "client", Path: w.client}, {Name: "server", Path: w.server}})
	w.must(err)
	var file bytes.Buffer
	capture := NewCapture(&file, time.Now(), func(uint32) string { return "server" })
	s, err := Watch(Options{Namespaces: []uint32{w.inode(w.client), w.inode(w.server)}, Packets: capture.Write})
	w.must(err)
	w.must(reader.Before(w.t.Context()))
	const frames = 20
	var least uint64
	w.inClient(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, b := range all {
			if b.dies {
				least += frames
			}
			for range frames {
				if err := unix.Sendto(fd, b.frame, 0, &unix.SockaddrLinklayer{Ifindex: w.clientDev}); err != nil {
					return fmt.Errorf("send %s: %w", b.what, err)
				}
			}
		}
		return nil
	})
	r, err := s.Stop()
	w.must(err)
	e, err := reader.After(w.t.Context(), time.Second, r.Events)
	w.must(err)
	var died, kept uint64
	for _, total := range r.Totals {
		if total.Kind == cause.Drop {
			died += total.Count
		}
	}
	for _, event := range r.Events {
		if event.Kind == cause.Drop {
			kept += event.Count
		}
	}
	if died < least || kept+r.Lost != died {
		w.t.Errorf("of at least %d frames %d died, of %d an event is kept, %d are lost: %+v", least, died, kept, r.Lost, r.Totals)
	}
	if written := uint64(len(readCapture(w.t, file.Bytes()))); written != died || capture.Packets != died {
		w.t.Errorf("%d packets died, %d are in the file, which says %d", died, written, capture.Packets)
	}
	named := 0
	for _, v := range cause.Diagnose(e) {
		if v.Cause != all[0].cause || v.Where.Namespace != "server" {
			w.t.Errorf("%s in %s: %s: %q", v.Cause, v.Where.Namespace, v.Title, v.Evidence)
		}
		named++
	}
	if (named > 0) != (all[0].cause != "") {
		w.t.Errorf("%d verdicts, not of %q: %+v", named, all[0].cause, r.Totals)
	}
}

// Whatever comes as an example, its packet can be written and read.
func FuzzExamples(f *testing.F) {
	for _, captured := range []uint32{0, 60, 1 << 31} {
		one := traceExample{Captured: captured, Before: -14, Headers: 20, StackBytes: 16}
		one.Key.Kind, one.Key.Ethertype = uint8(traceKindKIND_DROP), 8
		raw, err := binary.Append(nil, binary.NativeEndian, &one)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(append(raw, make([]byte, 80)...))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		one := readSample(raw)
		if one == nil {
			return
		}
		s := &Session{names: map[uint64]string{one.Key.Location: "f"}}
		p := s.packetOf(one)
		if len(p.Data) > len(raw) {
			t.Errorf("%d bytes of a packet out of %d", len(p.Data), len(raw))
		}
		var file bytes.Buffer
		c := NewCapture(&file, time.Unix(0, 0), func(space uint32) string { return fmt.Sprint(space) })
		c.Write(p)
		if written := readCapture(t, file.Bytes()); len(written) != 1 || len(written[0].frame) != 14+len(p.Data) {
			t.Errorf("%+v is written as %+v", p, written)
		}
		e, known := s.event(&tally{key: one.Key}, one, map[uint64]string{})
		if known != (kinds[traceKind(one.Key.Kind)] != "") || known && !bytes.Equal(e.Packet, p.Data) {
			t.Errorf("an event of %+v: %+v", one.Key, e)
		}
	})
}

// Another namespace that gets the inode of one that has gone does not get its name, nor its
// packets.
func TestANamespaceWithTheInodeOfAnother(t *testing.T) {
	w := newTown(t)
	old := filepath.Join(t.TempDir(), "old")
	w.must(netns.Create(old))
	defer netns.Remove(old)
	inode := w.inode(old)
	r, err := NewReader([]Namespace{{Name: "client", Path: w.client}, {Name: "old", Path: old}})
	w.must(err)
	w.must(r.Before(t.Context()))
	w.must(netns.Remove(old))
	for patience := time.Now().Add(20 * time.Second); ; {
		w.must(netns.Create(old)) // the kernel gives the lowest inode that is free
		if w.inode(old) == inode {
			break
		}
		w.must(netns.Remove(old))
		if time.Now().After(patience) {
			t.Skip("no other namespace got the inode")
		}
	}
	drop := cause.Event{Kind: cause.Drop, Space: inode, Count: 7, Reason: "NO_SOCKET"}
	e, err := r.After(t.Context(), time.Second, []cause.Event{drop})
	w.must(err)
	if len(e.Spaces) != 1 || e.Spaces[0].Name != "client" {
		t.Errorf("%d namespaces are read, not the one that is still there: %+v", len(e.Spaces), e.Spaces[len(e.Spaces)-1])
	}
	if len(e.Missing) != 1 || !strings.HasPrefix(e.Missing[0], "why 7 packets died, and 0 other events, in 1 network namespaces") {
		t.Errorf("missing: %q", e.Missing)
	}
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
