package route

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/netns"
)

const (
	passed     = uint32(0xffffffff) // TC_ACT_UNSPEC
	dropped    = uint32(2)          // TC_ACT_SHOT
	redirected = uint32(7)          // TC_ACT_REDIRECT
)

// loaded is a node of a village, with its programs and what they ought to do. Node 3 has
// an address of IPv6 alone.
type loaded struct {
	*village
	t      testing.TB
	layer  *Layer
	mirror *mirror
	words  []string
	wire   [6]byte // the uplink's
}

func load(t *testing.T) *loaded { return loadAs(t, ModeVXLAN, 4, 5) }

// loadAs says how many ways and addresses there are to be in the maps.
func loadAs(t *testing.T, mode Mode, ways, addresses int) *loaded {
	v := newVillage(t, mode, false)
	p := &loaded{village: v, t: t, layer: New(v.settings[0])}
	must(t, p.layer.Open())
	t.Cleanup(func() { p.layer.Close() })
	cluster := v.snapshot(3)
	cluster.Nodes[2].Addresses = cluster.Nodes[2].Addresses[1:]
	v.apply(p.layer, cluster)
	p.words = p.layer.host.(*datapath).outcomes
	p.mirror = &mirror{remotes: map[netip.Prefix]datapathRemote{}, vteps: map[netip.Addr]datapathVtep{}, port: DefaultPort, vni: DefaultVNI, relabel: haveTCX(), uplink: v.uplinks[0],
		pods: map[netip.Addr][2][6]byte{podAddress(0, false): {[6]byte(nodeMACs[0]), [6]byte(podMACs[0])}, podAddress(0, true): {[6]byte(nodeMACs[0]), [6]byte(podMACs[0])}}}
	remotes, err := p.layer.tables.remotes.All()
	must(t, err)
	for key, entry := range remotes {
		p.mirror.remotes[fromRange(key)] = entry
	}
	vteps, err := p.layer.tables.vteps.All()
	must(t, err)
	for key, entry := range vteps {
		p.mirror.vteps[fromAddress(key)] = entry
	}
	if len(remotes) != ways || len(vteps) != addresses {
		t.Fatalf("%d ways and %d addresses, not %d and %d", len(remotes), len(vteps), ways, addresses)
	}
	must(t, netns.Do(v.nodes[0], func() error {
		uplink, err := netlink.LinkByName("uplink")
		if err == nil {
			p.wire = [6]byte(uplink.Attrs().HardwareAddr)
		}
		return err
	}))
	return p
}

// run gives a program a frame in the node, that came by the pod's device or by the uplink
// and is for it.
func (p *loaded) run(program string, frame []byte) (verdict uint32, after []byte) {
	p.t.Helper()
	after = make([]byte, len(frame)+256)
	var context struct { // struct __sk_buff up to ifindex
		_       [10]uint32
		IfIndex uint32
	}
	context.IfIndex = uint32(p.uplinks[0])
	copy(frame, p.wire[:])
	if program == datapathProgRouteFromPod {
		context.IfIndex = uint32(p.ports[0])
		copy(frame, nodeMACs[0])
	}
	options := &ebpf.RunOptions{Data: frame, DataOut: after, Context: context}
	must(p.t, netns.Do(p.nodes[0], func() (err error) {
		verdict, err = p.layer.host.(*datapath).Programs[program].Run(options)
		return err
	}))
	return verdict, options.DataOut
}

func (p *loaded) counts() (all [datapathOutcomeOUTCOME_COUNT]uint64) {
	for word, n := range counted(p.t, p.layer) {
		for i := range all {
			if p.words[i] == word {
				all[i] = n
			}
		}
	}
	return all
}

// same compares program and mirror, and says what became of the frame.
func (p *loaded) same(program string, frame []byte) string {
	p.t.Helper()
	before := p.counts()
	verdict, after := p.run(program, frame)
	var outcome datapathOutcome
	var want []byte
	if program == datapathProgRouteFromPod {
		outcome, want = p.mirror.fromPod(frame, after)
	} else {
		outcome, want = p.mirror.fromWire(frame)
	}
	says, expected := "untouched", passed
	switch outcome {
	case none:
	case datapathOutcomeOUTCOME_SENT, datapathOutcomeOUTCOME_TAKEN, datapathOutcomeOUTCOME_TAKEN_STACK, datapathOutcomeOUTCOME_SENT_DIRECT, datapathOutcomeOUTCOME_TAKEN_DIRECT:
		expected = redirected
	case datapathOutcomeOUTCOME_STRANGER, datapathOutcomeOUTCOME_CONGESTED:
		expected = dropped
	}
	if outcome != none {
		says = p.words[outcome]
		before[outcome]++
	}
	if verdict != expected || before != p.counts() || expected != dropped && !bytes.Equal(after, want) {
		p.t.Fatalf("%s of %x\nought to be %s, verdict %d:\n%x\nverdict is %d, counters %v, not %v:\n%x", program, frame, says, int32(expected), want, int32(verdict), p.counts(), before, after)
	}
	return says
}

// packet is UDP from one address to another, in an Ethernet frame.
func packet(from, to string, tos, hops byte, payload int) []byte {
	source, destination := netip.MustParseAddr(from), netip.MustParseAddr(to)
	frame := append(make([]byte, 12, 128), 8, 0)
	udp := binary.BigEndian.AppendUint16([]byte{0x10, 1, 0, 53}, uint16(8+payload))
	udp = append(udp, make([]byte, 2+payload)...)
	if source.Is4() {
		frame = append(frame, 0x45, tos)
		frame = binary.BigEndian.AppendUint16(frame, uint16(20+len(udp)))
		frame = append(frame, 0, 1, 0, 0, hops, 17, 0, 0)
		frame = append(append(frame, source.AsSlice()...), destination.AsSlice()...)
		binary.BigEndian.PutUint16(frame[24:], checksum(frame[14:]))
	} else {
		frame[12], frame[13] = 0x86, 0xdd
		frame = append(frame, 0x60|tos>>4, tos<<4, 0, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(len(udp)))
		frame = append(append(append(frame, 17, hops), source.AsSlice()...), destination.AsSlice()...)
	}
	return append(frame, udp...)
}

// tunnelled is a packet as another node sends it to this one.
func (p *loaded) tunnelled(inner []byte, six bool, tos byte) []byte {
	entry := datapathRemote{Local: addressOf(netip.MustParseAddr("2001:db8::2")), Vtep: addressOf(netip.MustParseAddr("2001:db8::1")), Mac: macOf(usable(p.snapshot().Nodes[0].Addresses))}
	if !six {
		entry.Local, entry.Vtep, entry.Ip4 = addressOf(netip.MustParseAddr("192.0.2.2")), addressOf(netip.MustParseAddr("192.0.2.1")), 1
	}
	h, _ := readHead(inner, 14, binary.BigEndian.Uint16(inner[12:]))
	h.tos = tos
	return p.mirror.wrapped(make([]byte, 12), inner[14:], h, entry, bytes.Repeat([]byte{0xc1}, 60))
}

// behind puts an extension header of eight bytes before what follows the IPv6 header.
func behind(frame []byte, header byte, head ...byte) []byte {
	frame[20] = header
	return slices.Insert(frame, 54, append(head, make([]byte, 8-len(head))...)...)
}

func TestFromPod(t *testing.T) {
	p := load(t)
	for _, row := range []struct {
		from, to string
		tos      byte
		hops     byte
		payload  int
		want     string
	}{
		{"10.244.1.7", "10.244.2.7", 0, 64, 10, "sent"},
		{"10.244.1.7", "10.244.2.255", 0xb9, 2, 0, "sent"}, // EF and ECT(1)
		{"10.244.1.7", "10.244.3.7", 0x03, 64, 10, "sent"},
		{"fd00:244:1::7", "fd00:244:2::7", 0xff, 64, 10, "sent"},
		{"fd00:244:1::7", "fd00:244:3::7", 0x02, 255, 10, "sent"},
		{"10.244.1.8", "10.244.2.7", 0, 64, 10, "stack"}, // another pod's address
		{"192.0.2.1", "10.244.2.7", 0, 64, 10, "stack"},
		{"fd00:244:2::8", "fd00:244:2::7", 0, 64, 10, "stack"},
		{"10.244.1.7", "10.244.4.7", 0, 64, 10, "untouched"},
		{"10.244.1.7", "10.244.1.8", 0, 64, 10, "untouched"},
		{"10.244.1.7", "192.0.2.2", 0, 64, 10, "untouched"},
		{"fd00:244:1::7", "fd00:244:4::7", 0, 64, 10, "untouched"},
		{"10.244.1.7", "10.244.2.7", 0, 1, 10, "expired"},
		{"fd00:244:1::7", "fd00:244:2::7", 0, 0, 10, "expired"},
		{"10.244.1.7", "10.244.2.7", 0, 64, 1450 - 28, "sent"},
		{"10.244.1.7", "10.244.2.7", 0, 64, 1450 - 27, "too_big"},
		{"fd00:244:1::7", "fd00:244:3::7", 0, 64, 1430 - 48, "sent"},
		{"fd00:244:1::7", "fd00:244:3::7", 0, 64, 1430 - 47, "too_big"},
	} {
		if got := p.same(datapathProgRouteFromPod, packet(row.from, row.to, row.tos, row.hops, row.payload)); got != row.want {
			t.Errorf("%s -> %s with %d bytes: %s, not %s", row.from, row.to, row.payload, got, row.want)
		}
	}
	for _, row := range []struct {
		what, from, to string
		alter          func([]byte) []byte
		want           string
	}{
		{"to a node", "10.244.1.7", "192.0.2.2", nil, "stranger"},
		{"to its own", "10.244.1.7", "192.0.2.1", nil, "stranger"},
		{"in the name of a node", "192.0.2.2", "10.244.2.7", nil, "stranger"},
		{"to another pod", "10.244.1.7", "10.244.2.7", nil, "sent"},
		{"to elsewhere", "10.244.1.7", "198.51.100.1", nil, "untouched"},
		{"to another port", "10.244.1.7", "192.0.2.2", func(f []byte) []byte { f[37]--; return f }, "untouched"},
		{"by TCP", "10.244.1.7", "192.0.2.2", func(f []byte) []byte { f[23] = 6; return f }, "untouched"},
		{"a first fragment", "10.244.1.7", "192.0.2.2", func(f []byte) []byte { f[20] = 0x20; return f }, "stranger"},
		{"a later fragment", "10.244.1.7", "192.0.2.2", func(f []byte) []byte { f[21] = 1; return f }, "untouched"},
		{"behind an option", "10.244.1.7", "192.0.2.2", func(f []byte) []byte {
			f[14]++
			return slices.Insert(f, 34, 1, 1, 1, 1)
		}, "stranger"},
		{"IPv6", "fd00:244:1::7", "2001:db8::2", nil, "stranger"},
		{"a first fragment of IPv6", "fd00:244:1::7", "2001:db8::2", func(f []byte) []byte { return behind(f, 44, 17, 0, 0, 1) }, "stranger"},
		{"a later fragment of IPv6", "fd00:244:1::7", "2001:db8::2", func(f []byte) []byte { return behind(f, 44, 17, 0, 0, 8) }, "untouched"},
		{"behind extension headers", "fd00:244:1::7", "2001:db8::2", func(f []byte) []byte { return behind(behind(f, 60, 17), 43, 60) }, "stranger"},
		{"behind more than anybody sends", "fd00:244:1::7", "2001:db8::2", func(f []byte) []byte {
			f = behind(f, 60, 6)
			for range 8 {
				f = behind(f, 60, 60)
			}
			return f
		}, "stranger"},
		{"TCP behind an extension header", "fd00:244:1::7", "2001:db8::2", func(f []byte) []byte { return behind(f, 60, 6) }, "untouched"},
	} {
		frame := packet(row.from, row.to, 0, 64, 60)
		port := 36
		if frame[12] != 8 {
			port = 56
		}
		binary.BigEndian.PutUint16(frame[port:], DefaultPort)
		if row.alter != nil {
			frame = row.alter(frame)
		}
		if got := p.same(datapathProgRouteFromPod, frame); got != row.want {
			t.Errorf("VXLAN %s: %s, not %s", row.what, got, row.want)
		}
	}
	arp := packet("10.244.1.7", "10.244.2.7", 0, 64, 10)
	arp[13] = 6
	if got := p.same(datapathProgRouteFromPod, arp); got != "untouched" {
		t.Errorf("ARP: %s", got)
	}
}

// Source ports are of the range of RFC 7348, the same for a flow, and many for many.
func TestSourcePorts(t *testing.T) {
	p := load(t)
	ports := map[uint16]int{}
	for i := range 200 {
		frame := packet("10.244.1.7", "10.244.2.7", 0, 64, 10)
		binary.BigEndian.PutUint16(frame[34:], uint16(2000+i))
		var of [2]uint16
		for j := range of {
			_, after := p.run(datapathProgRouteFromPod, frame)
			of[j] = binary.BigEndian.Uint16(after[34:])
		}
		if of[0] != of[1] || of[0] < 49152 {
			t.Errorf("a flow has the ports %d and %d", of[0], of[1])
		}
		ports[of[0]]++
	}
	if len(ports) < 180 { // 199 are expected
		t.Errorf("200 flows have %d ports", len(ports))
	}
}

func TestFromWire(t *testing.T) {
	p := load(t)
	pod4, pod6 := packet("10.244.2.7", "10.244.1.7", 0, 64, 30), packet("fd00:244:2::7", "fd00:244:1::7", 0, 64, 30)
	with := func(frame []byte, at int, value byte) []byte {
		changed := bytes.Clone(frame)
		changed[at] = value
		return changed
	}
	plain, six := p.tunnelled(pod4, false, 0), p.tunnelled(pod4, true, 0)
	mixed, short := "taken", "taken"
	if !haveTCX() {
		mixed, short = "taken_stack", "unwritable"
	}
	for _, row := range []struct {
		what  string
		frame []byte
		want  string
	}{
		{"IPv4 in IPv4", plain, "taken"}, {"IPv6 in IPv4", p.tunnelled(pod6, false, 0), mixed},
		{"IPv4 in IPv6", six, mixed}, {"IPv6 in IPv6", p.tunnelled(pod6, true, 0), "taken"},
		{"short IPv4 in IPv6", p.tunnelled(packet("10.244.2.7", "10.244.1.7", 0, 64, 10), true, 0), short},
		{"for the node", p.tunnelled(packet("10.244.2.7", "10.244.1.0", 0, 64, 10), false, 0), "taken_stack"},
		{"for a pod that is not there", p.tunnelled(packet("10.244.2.7", "10.244.1.99", 0, 64, 10), false, 0), "taken_stack"},
		{"the last hop", p.tunnelled(packet("10.244.2.7", "10.244.1.7", 0, 1, 10), false, 0), "taken_stack"},
		{"another network", with(plain, 34+8+6, 9), "untouched"},
		{"another port", with(plain, 37, 9), "untouched"},
		{"other flags", with(plain, 34+8, 0x0c), "untouched"},
		{"for another device", with(plain, 34+16, 4), "untouched"},
		{"ARP inside", with(plain, 34+8+8+13, 6), "untouched"},
		{"to another address", with(plain, 33, 77), "untouched"},
		{"from another address", with(plain, 29, 77), "stranger"},
		{"from another address, IPv6", with(six, 14+8+15, 77), "stranger"},
		{"from ourselves", with(plain, 29, 1), "stranger"},
		{"a fragment", with(plain, 20, 0x20), "untouched"},
		{"a last fragment", with(plain, 21, 1), "untouched"},
		{"don't fragment", with(plain, 20, 0x40), "taken"},
		{"options", with(plain, 14, 0x46), "untouched"},
		{"TCP", with(plain, 23, 6), "untouched"},
		{"cut", plain[:34+8+8+14+19], "untouched"},
		{"a query", packet("192.0.2.2", "192.0.2.1", 0, 64, 40), "untouched"},
	} {
		if got := p.same(datapathProgRouteFromWire, row.frame); got != row.want {
			t.Errorf("%s: %s, not %s", row.what, got, row.want)
		}
	}
}

// Each cell of figure 4 of RFC 6040, in both families.
func TestCongestion(t *testing.T) {
	p := load(t)
	names := [4]string{"Not-ECT", "ECT(1)", "ECT(0)", "CE"}
	for inside := range byte(4) {
		for outside := range byte(4) {
			want := "taken"
			if inside == 0 && outside == 3 {
				want = "congested"
			}
			for _, six := range []bool{false, true} {
				inner := packet(podAddress(1, six).String(), podAddress(0, six).String(), 0xb8|inside, 64, 10)
				frame := p.tunnelled(inner, six, outside)
				if got := p.same(datapathProgRouteFromWire, frame); got != want {
					t.Errorf("%s in %s: %s, not %s", names[inside], names[outside], got, want)
				}
				_, after := p.run(datapathProgRouteFromWire, frame)
				if want == "taken" && !six && checksum(after[14:34]) != 0 {
					t.Errorf("%s in %s: the checksum is wrong: %x", names[inside], names[outside], after[14:34])
				}
			}
		}
	}
}

// What one program puts in, the other takes out, but for two hops.
func TestThereAndBack(t *testing.T) {
	p := load(t)
	for _, six := range []bool{false, true} {
		frame := packet("10.244.1.7", "10.244.2.7", 0x2a, 64, 99)
		if six {
			frame = packet("fd00:244:1::7", "fd00:244:2::7", 0x2a, 64, 99)
		}
		_, outer := p.run(datapathProgRouteFromPod, frame)
		if six {
			copy(outer[64+24:], podAddress(0, true).AsSlice())
		} else {
			copy(outer[64+16:], podAddress(0, false).AsSlice())
		}
		mac := macOf(usable(p.snapshot().Nodes[0].Addresses)) // for us, from node 2
		copy(outer[26:], netip.MustParseAddr("192.0.2.2").AsSlice())
		copy(outer[30:], netip.MustParseAddr("192.0.2.1").AsSlice())
		copy(outer[50:], mac[:])
		if got := p.same(datapathProgRouteFromWire, outer); got != "taken" && (haveTCX() || !six) {
			t.Errorf("IPv6 %v: %s", six, got)
		}
	}
}

// Random frames near those that mean something: programs and mirror agree.
func TestDifferential(t *testing.T) {
	p := load(t)
	p.differ("sent", "taken", "taken_stack", "expired", "too_big", "stranger", "congested", "stack", "untouched")
}

// The same where nodes are on one segment.
func TestDifferentialDirect(t *testing.T) {
	needsTCX(t)
	p := loadAs(t, ModeAuto, 4, 3)
	p.differ("sent", "sent_direct", "taken_direct", "expired", "too_big", "stack", "untouched")
}

// differ compares programs and mirror, and asks for at least ten frames of each kind.
func (p *loaded) differ(kinds ...string) {
	t := p.t
	random := rand.New(rand.NewPCG(3, 5))
	seen := map[string]int{}
	addresses := []string{"10.244.2.7", "10.244.1.7", "10.244.3.9", "192.0.2.1", "10.244.1.0"}
	sixes := []string{"fd00:244:2::7", "fd00:244:1::7", "fd00:244:3::9", "2001:db8::1"}
	one := func(all []string) string { return all[random.IntN(len(all))] }
	for range 6000 {
		tos, hops := byte(random.Uint32()), byte(random.IntN(4)*random.IntN(80))
		inner := packet(one(addresses), one(addresses), tos, hops, random.IntN(1600))
		if random.IntN(2) == 0 {
			inner = packet(one(sixes), one(sixes), tos, hops, random.IntN(1600))
		}
		program, frame := datapathProgRouteFromPod, inner
		if random.IntN(2) == 0 {
			program, frame = datapathProgRouteFromWire, p.tunnelled(inner, random.IntN(2) == 0, byte(random.Uint32()))
		}
		if random.IntN(4) == 0 {
			program, frame = datapathProgRouteFromWire, inner
		}
		for range random.IntN(3) {
			at := 12 + random.IntN(min(len(frame)-12, 90))
			frame[at] ^= 1 << random.IntN(8)
		}
		if random.IntN(20) == 0 {
			frame = frame[:min(len(frame), 54+random.IntN(60))]
		}
		seen[p.same(program, frame)]++
	}
	t.Log(seen)
	for _, what := range kinds {
		if seen[what] < 10 {
			t.Errorf("only %d frames were %s: the test is blind", seen[what], what)
		}
	}
}

// To and from nodes on the segment packets go as they are, one hop older; what the stack
// has to answer, or to see, it gets untouched.
func TestDirectPrograms(t *testing.T) {
	needsTCX(t)
	p := loadAs(t, ModeAuto, 4, 3)
	options := func(frame []byte) []byte {
		frame[14]++
		return frame
	}
	byHop := func(frame []byte) []byte {
		frame[20] = 0 // RFC 8200, 4.3
		return frame
	}
	const out, in = datapathProgRouteFromPod, datapathProgRouteFromWire
	for _, row := range []struct {
		what, program string
		frame         []byte
		want          string
	}{
		{"IPv4", out, packet("10.244.1.7", "10.244.2.7", 0xb9, 64, 10), "sent_direct"},
		{"IPv6", out, packet("fd00:244:1::7", "fd00:244:2::7", 0xb9, 2, 10), "sent_direct"},
		{"IPv6, the other node has no IPv4", out, packet("fd00:244:1::7", "fd00:244:3::7", 0, 64, 10), "sent_direct"},
		{"IPv4, the other node has none", out, packet("10.244.1.7", "10.244.3.7", 0, 64, 10), "sent"},
		{"as long as the uplink takes", out, packet("10.244.1.7", "10.244.2.7", 0, 64, 1500-28), "sent_direct"},
		{"longer", out, packet("10.244.1.7", "10.244.2.7", 0, 64, 1500-27), "too_big"},
		{"IPv6, longer", out, packet("fd00:244:1::7", "fd00:244:2::7", 0, 64, 1500-47), "too_big"},
		{"the last hop", out, packet("10.244.1.7", "10.244.2.7", 0, 1, 10), "expired"},
		{"another's address", out, packet("10.244.1.8", "10.244.2.7", 0, 64, 10), "stack"},
		{"the node's address", out, packet("192.0.2.1", "10.244.2.7", 0, 64, 10), "stack"},
		{"IP options", out, options(packet("10.244.1.7", "10.244.2.7", 0, 64, 10)), "stack"},
		{"IPv6, for each hop", out, byHop(packet("fd00:244:1::7", "fd00:244:2::7", 0, 64, 10)), "stack"},
		{"to elsewhere", out, packet("10.244.1.7", "198.51.100.1", 0, 64, 10), "untouched"},
		{"IPv4 comes", in, packet("10.244.2.7", "10.244.1.7", 0xb9, 64, 10), "taken_direct"},
		{"IPv6 comes", in, packet("fd00:244:2::7", "fd00:244:1::7", 0xb9, 2, 10), "taken_direct"},
		{"from a node that sends VXLAN", in, packet("10.244.3.7", "10.244.1.7", 0, 64, 10), "untouched"},
		{"from another node itself", in, packet("192.0.2.2", "10.244.1.7", 0, 64, 10), "untouched"},
		{"from outside", in, packet("198.51.100.1", "10.244.1.7", 0, 64, 10), "untouched"},
		{"from a pod of this node", in, packet("10.244.1.8", "10.244.1.7", 0, 64, 10), "untouched"},
		{"to the node", in, packet("10.244.2.7", "192.0.2.1", 0, 64, 10), "untouched"},
		{"to a pod that is not there", in, packet("10.244.2.7", "10.244.1.99", 0, 64, 10), "untouched"},
		{"to a pod of another node", in, packet("10.244.2.7", "10.244.2.9", 0, 64, 10), "untouched"},
		{"comes with its last hop", in, packet("10.244.2.7", "10.244.1.7", 0, 1, 10), "untouched"},
		{"comes with IP options", in, options(packet("10.244.2.7", "10.244.1.7", 0, 64, 10)), "untouched"},
		{"comes too long for the pod", in, packet("10.244.2.7", "10.244.1.7", 0, 64, 1500-27), "untouched"},
		{"comes in VXLAN from a node that sends none", in, p.tunnelled(packet("10.244.2.7", "10.244.1.7", 0, 64, 10), false, 0), "stranger"},
	} {
		if got := p.same(row.program, row.frame); got != row.want {
			t.Errorf("%s: %s, not %s", row.what, got, row.want)
		}
	}
}
