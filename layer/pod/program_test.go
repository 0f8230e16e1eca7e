package pod

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/test/docs"
)

// Verdicts of linux/pkt_cls.h.
const (
	passed     = 0xffffffff // TC_ACT_UNSPEC
	redirected = 7          // TC_ACT_REDIRECT
)

// loaded is the program with two pods: that of loopback, where packets begin in a test
// run, and another one's.
type loaded struct {
	t       testing.TB
	maps    map[string]*ebpf.Map
	program *ebpf.Program
	words   []string
}

func load(t testing.TB) *loaded {
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads a program")
	}
	spec, err := loadDatapath()
	must(t, err)
	words, err := crossingNames(spec)
	must(t, err)
	collection, err := ebpf.NewCollection(spec)
	must(t, err)
	t.Cleanup(collection.Close)
	p := &loaded{t, collection.Maps, collection.Programs[datapathProgPodFromPod], words}
	must(t, p.maps[datapathMapGates].Put(uint32(0), uint32(1)))
	for _, row := range []struct {
		addr   string
		device uint32
		mtu    uint32
		direct uint8
	}{
		{"10.1.0.1", 1, 1400, 1}, {"fd00::1", 1, 1400, 1}, {"10.1.0.2", 77, 1400, 1}, {"fd00::2", 77, 1500, 1},
		{"10.1.0.3", 78, 1400, 0}, {"fd00::3", 78, 1400, 0}, {"10.1.0.4", 79, 1300, 1}, {"fd00::4", 79, 1300, 1},
	} {
		home := datapathHome{Device: row.device, Mtu: row.mtu, Direct: row.direct}
		copy(home.Ethernet[:], "\x02podend\x02nodeen")
		must(t, p.maps[datapathMapHomes].Put(addressOf(netip.MustParseAddr(row.addr)), home))
	}
	return p
}

// counts are the counters, by their words.
func (p *loaded) counts() map[string]uint64 {
	p.t.Helper()
	counts := map[string]uint64{}
	for i, word := range p.words {
		var perCPU []uint64
		must(p.t, p.maps[datapathMapCrossings].Lookup(uint32(i), &perCPU))
		for _, n := range perCPU {
			counts[word] += n
		}
	}
	return counts
}

func (p *loaded) run(frame []byte) (verdict uint32, after []byte) {
	p.t.Helper()
	after = make([]byte, len(frame)+256)
	out := &ebpf.RunOptions{Data: frame, DataOut: after}
	verdict, err := p.program.Run(out)
	must(p.t, err)
	return verdict, out.DataOut
}

// frameOf is a frame to loopback with a datagram in it.
func frameOf(from, to string, hops byte) []byte {
	source, destination := netip.MustParseAddr(from), netip.MustParseAddr(to)
	payload := []byte("\x04\x00\x00\x09\x00\x0d\x00\x00hello")
	frame := make([]byte, 12, 100)
	if source.Is4() {
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, hops, 17
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(payload)))
		copy(ip[12:], source.AsSlice())
		copy(ip[16:], destination.AsSlice())
		binary.BigEndian.PutUint16(ip[10:], ^sumOf(ip))
		return append(append(append(frame, 8, 0), ip...), payload...)
	}
	ip := make([]byte, 40)
	ip[0], ip[6], ip[7] = 0x60, 17, hops
	binary.BigEndian.PutUint16(ip[4:], uint16(len(payload)))
	copy(ip[8:], source.AsSlice())
	copy(ip[24:], destination.AsSlice())
	return append(append(append(frame, 0x86, 0xdd), ip...), payload...)
}

// sumOf is the Internet checksum's sum (RFC 1071).
func sumOf(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// What is sent, and what becomes of it.
func TestWhatTakesAShortcut(t *testing.T) {
	p := load(t)
	change := func(at int, to byte) func([]byte) {
		return func(frame []byte) { frame[at] = to }
	}
	for _, row := range []struct {
		what, from, to string
		hops           byte
		change         func([]byte)
		word           string
	}{
		{"to another pod", "10.1.0.1", "10.1.0.2", 64, nil, "direct"},
		{"to another pod", "fd00::1", "fd00::2", 64, nil, "direct"},
		{"to one whose device somebody looks at", "10.1.0.1", "10.1.0.3", 64, nil, "device"},
		{"to one whose device somebody looks at", "fd00::1", "fd00::3", 64, nil, "device"},
		{"with two hops left", "10.1.0.1", "10.1.0.2", 2, nil, "direct"},
		{"on its last hop: the stack answers", "10.1.0.1", "10.1.0.2", 1, nil, "stack"},
		{"on its last hop: the stack answers", "fd00::1", "fd00::2", 1, nil, "stack"},
		{"to the pod itself", "10.1.0.1", "10.1.0.1", 64, nil, "stack"},
		{"to a pod of a smaller MTU", "10.1.0.1", "10.1.0.4", 64, nil, "stack"},
		{"to a pod of a smaller MTU", "fd00::1", "fd00::4", 64, nil, "stack"},
		{"to elsewhere", "10.1.0.1", "192.0.2.1", 64, nil, "stack"},
		{"to elsewhere", "fd00::1", "2001:db8::1", 64, nil, "stack"},
		{"from another pod's address", "10.1.0.2", "10.1.0.3", 64, nil, "stack"},
		{"from nobody's address", "10.1.0.9", "10.1.0.2", 64, nil, "stack"},
		{"neighbour discovery", "fe80::1", "ff02::1:ff00:2", 255, nil, "stack"},
		{"with IP options", "10.1.0.1", "10.1.0.2", 64, change(14, 0x46), "stack"},
		{"a fragment", "10.1.0.1", "10.1.0.2", 64, func(f []byte) {
			f[20] = 0x20
			f[24], f[25] = 0, 0
			binary.BigEndian.PutUint16(f[24:], ^sumOf(f[14:34]))
		}, "direct"},
		{"for another machine", "10.1.0.1", "10.1.0.2", 64, change(0, 2), "stack"},
		{"a broadcast", "10.1.0.1", "10.1.0.2", 64, func(f []byte) { copy(f, "\xff\xff\xff\xff\xff\xff") }, "stack"},
		{"no IP", "10.1.0.1", "10.1.0.2", 64, change(13, 6), "stack"},
		{"the other version", "10.1.0.1", "10.1.0.2", 64, change(14, 0x65), "stack"},
	} {
		frame := frameOf(row.from, row.to, row.hops)
		if row.change != nil {
			row.change(frame)
		}
		before := p.counts()
		verdict, after := p.run(bytes.Clone(frame))
		if got := p.counts(); got[row.word] != before[row.word]+1 {
			t.Errorf("%s, %s to %s: %v, then %v: not %s", row.what, row.from, row.to, before, got, row.word)
			continue
		}
		if row.word == "stack" {
			if verdict != passed || !bytes.Equal(frame, after) {
				t.Errorf("%s: verdict %d, the frame\n%x\nis now\n%x", row.what, int32(verdict), frame, after)
			}
			continue
		}
		if verdict != redirected {
			t.Errorf("%s: verdict %d", row.what, int32(verdict))
		}
		p.check(row.what, frame, after)
	}
	must(t, p.maps[datapathMapGates].Put(uint32(0), uint32(0)))
	if verdict, after := p.run(frameOf("10.1.0.1", "10.1.0.2", 64)); verdict != passed || !bytes.Equal(after, frameOf("10.1.0.1", "10.1.0.2", 64)) {
		t.Errorf("closed, and the verdict is %d", int32(verdict))
	}
}

// check says whether a frame is as a router would have made it: new ends, one hop older,
// and nothing else.
func (p *loaded) check(what string, frame, after []byte) {
	p.t.Helper()
	want := bytes.Clone(frame)
	copy(want, "\x02podend\x02nodeen"[:12])
	if frame[12] == 8 {
		want[14+8]--
		want[14+10], want[14+11] = 0, 0
		binary.BigEndian.PutUint16(want[14+10:], ^sumOf(want[14:34]))
	} else {
		want[14+7]--
	}
	if !bytes.Equal(want, after) {
		p.t.Errorf("%s: the frame\n%x\nbecame\n%x, not\n%x", what, frame, after, want)
	}
}

// Whatever the header says, the checksum is right again.
func TestChecksums(t *testing.T) {
	p := load(t)
	for id := range 1 << 16 {
		if id%7 != 0 && id > 300 && id < 1<<16-300 {
			continue
		}
		frame := frameOf("10.1.0.1", "10.1.0.2", byte(2+id%254))
		binary.BigEndian.PutUint16(frame[14+4:], uint16(id))
		frame[24], frame[25] = 0, 0
		binary.BigEndian.PutUint16(frame[24:], ^sumOf(frame[14:34]))
		_, after := p.run(frame)
		if sumOf(after[14:34]) != 0xffff {
			t.Fatalf("%x has a wrong checksum", after[14:34])
		}
	}
}

// Frames of any bytes and lengths.
func FuzzFrames(f *testing.F) {
	f.Add(frameOf("10.1.0.1", "10.1.0.2", 64))
	f.Add(frameOf("fd00::1", "fd00::2", 64))
	p := load(f)
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < 14 || len(frame) > 1400 {
			return // the kernel refuses to run these
		}
		p.t = t
		verdict, after := p.run(bytes.Clone(frame))
		switch {
		case verdict == passed && bytes.Equal(frame, after):
		case verdict == redirected && len(frame) == len(after):
		default:
			t.Errorf("verdict %d, %x became %x", int32(verdict), frame, after)
		}
	})
}

// The crossings are defined once, in shortcut.bpf.c. The table in the docs is made from
// it, and the names in metrics come from the object's BTF.
func TestCrossingsAreTheSameEverywhere(t *testing.T) {
	spec, err := loadDatapath()
	must(t, err)
	names, err := crossingNames(spec)
	must(t, err)
	docs.SameWords(t, "shortcut.bpf.c", "CROSSING_", names, "../../docs/pod.md", "crossings")
}
