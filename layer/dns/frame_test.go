package dns

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// What tc programs return (linux/pkt_cls.h).
const (
	passed     = 0xffffffff // TC_ACT_UNSPEC
	redirected = 7
)

var (
	client4 = netip.MustParseAddrPort("10.244.1.7:40053")
	client6 = netip.MustParseAddrPort("[fd00:244:1::7]:40053")
	dns4    = netip.MustParseAddrPort("10.96.0.10:53")
	dns6    = netip.MustParseAddrPort("[fd00:96::a]:53")
)

func needKernel(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		t.Skip("needs root: loads an eBPF program")
	}
	var refused *ebpf.VerifierError
	if errors.As(err, &refused) {
		t.Logf("%-60v", refused)
	}
	t.Fatal(err)
}

// datagramOf is an Ethernet frame with a UDP datagram.
func datagramOf(from, to netip.AddrPort, message []byte) []byte {
	udp := make([]byte, 8, 8+len(message))
	binary.BigEndian.PutUint16(udp, from.Port())
	binary.BigEndian.PutUint16(udp[2:], to.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(message)))
	udp = append(udp, message...)
	binary.BigEndian.PutUint16(udp[6:], udpSum(from.Addr(), to.Addr(), udp))
	frame := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}
	if from.Addr().Is4() {
		frame = append(frame, 8, 0)
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, 17
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(udp)))
		binary.BigEndian.PutUint16(ip[4:], 4711)
		copy(ip[12:], from.Addr().AsSlice())
		copy(ip[16:], to.Addr().AsSlice())
		binary.BigEndian.PutUint16(ip[10:], ^sum16(0, ip))
		return append(append(frame, ip...), udp...)
	}
	frame = append(frame, 0x86, 0xdd)
	ip := make([]byte, 40)
	ip[0], ip[6], ip[7] = 0x60, 17, 64
	binary.BigEndian.PutUint16(ip[4:], uint16(len(udp)))
	copy(ip[8:], from.Addr().AsSlice())
	copy(ip[24:], to.Addr().AsSlice())
	return append(append(frame, ip...), udp...)
}

// udpSum is the checksum of a datagram whose own checksum field counts as zero.
func udpSum(from, to netip.Addr, udp []byte) uint16 {
	sum := uint32(17) + uint32(len(udp))
	for _, part := range [][]byte{from.AsSlice(), to.AsSlice(), udp[:6]} {
		sum = uint32(sum16(sum, part))
	}
	if s := ^sum16(sum, udp[8:]); s != 0 {
		return s
	}
	return 0xffff
}

func sum16(sum uint32, bytes []byte) uint16 {
	for i := 0; i < len(bytes); i += 2 {
		word := uint32(bytes[i]) << 8
		if i+1 < len(bytes) {
			word |= uint32(bytes[i+1])
		}
		sum += word
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// opened checks a frame that is to be an answer from one end to the other and returns
// the message in it.
func opened(t testing.TB, frame []byte, from, to netip.AddrPort) []byte {
	t.Helper()
	if [12]byte(frame[:12]) != [12]byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1} {
		t.Fatalf("Ethernet addresses %x", frame[:12])
	}
	want := datagramOf(from, to, frame[14+headerOf(from)+8:])
	if from.Addr().Is4() {
		copy(want[14+4:14+8], []byte{0, 0, 0x40, 0}) // no number, may not be cut
		copy(want[14+10:], []byte{0, 0})
		binary.BigEndian.PutUint16(want[14+10:], ^sum16(0, want[14:14+20]))
	}
	for i := 14; i < len(want); i++ {
		if frame[i] != want[i] {
			t.Fatalf("byte %d of the answer is %#x, not %#x:\n%x\n%x", i, frame[i], want[i], frame, want)
		}
	}
	return frame[14+headerOf(from)+8:]
}

func headerOf(a netip.AddrPort) int {
	if a.Addr().Is4() {
		return 20
	}
	return 40
}

// asking is a plain query.
func asking(t testing.TB, name string, kind dnsmessage.Type, edns bool) []byte {
	t.Helper()
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: 0xbeef, RecursionDesired: true})
	parsed, err := dnsmessage.NewName(name)
	must(t, err)
	must(t, b.StartQuestions())
	must(t, b.Question(dnsmessage.Question{Name: parsed, Type: kind, Class: dnsmessage.ClassINET}))
	if edns {
		must(t, b.StartAdditionals())
		var h dnsmessage.ResourceHeader
		must(t, h.SetEDNS0(4096, dnsmessage.RCodeSuccess, false))
		must(t, b.OPTResource(h, dnsmessage.OPTResource{}))
	}
	message, err := b.Finish()
	must(t, err)
	return message
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
