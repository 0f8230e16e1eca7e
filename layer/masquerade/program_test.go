package masquerade

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/netns"
)

const (
	passed  = uint32(0xffffffff) // TC_ACT_UNSPEC
	dropped = uint32(2)          // TC_ACT_SHOT
)

// loaded is a node whose programs are run by hand, as if loopback were its uplink.
type loaded struct {
	*island
	t     testing.TB
	layer *Layer
}

func load(t *testing.T) *loaded { return newIsland(t).load() }

func (is *island) load() *loaded {
	t := is.t
	l := is.start()
	const loopback = 1
	wire := datapathWire{Ip4: addressOf(netip.MustParseAddr(node4)), Ip6: addressOf(netip.MustParseAddr(node6))}
	for _, err := range l.tables.wires.Put([]uint32{loopback}, []datapathWire{wire}) {
		must(t, err)
	}
	return &loaded{is, t, l}
}

// run gives a program a frame in the node.
func (p *loaded) run(program string, frame []byte) (verdict uint32, after []byte) {
	p.t.Helper()
	options := &ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+64)}
	must(p.t, netns.Do(p.NetNS, func() (err error) {
		verdict, err = p.layer.host.(*datapath).Programs[program].Run(options)
		return err
	}))
	return verdict, options.DataOut
}

// became runs a program and says in a word what became of the frame, by the counters.
func (p *loaded) became(program string, frame []byte) (word string, after []byte) {
	p.t.Helper()
	before := counted(p.t, p.layer)
	verdict, after := p.run(program, frame)
	for name, n := range counted(p.t, p.layer) {
		if n == before[name]+1 {
			word += name
		} else if n != before[name] {
			p.t.Fatalf("%s: %s counted %d at once", program, name, n-before[name])
		}
	}
	switch verdict {
	case dropped:
		return "dropped " + word, after
	case passed:
		if !bytes.Equal(frame, after) {
			return "translated " + word, after
		}
		return "untouched " + word, after
	}
	return fmt.Sprintf("verdict %d %s", verdict, word), after
}

func address(text string) netip.Addr { return netip.MustParseAddr(text) }

func of(protocol byte, from string, fromPort uint16, to string, toPort uint16) flow {
	return flow{protocol, netip.AddrPortFrom(address(from), fromPort), netip.AddrPortFrom(address(to), toPort)}
}

// ours checks that a frame is what the mirror makes of another, with some free port of the
// node, and returns the flow that it is of.
func (p *loaded) ours(before, after []byte, six bool) flow {
	p.t.Helper()
	h, ok := readHeader(after, ethernet, six)
	is, okay := h.flowOf(after)
	if !ok || !okay {
		p.t.Fatalf("not readable: %x", after)
	}
	node := map[bool]string{false: node4, true: node6}[six]
	if is.from.Addr() != address(node) || is.from.Port() < 1024 || is.from.Port() > 29999 {
		p.t.Fatalf("it comes from %s, not a free port of %s", is.from, node)
	}
	if want := translated(before, six, is); !bytes.Equal(after, want) {
		p.t.Fatalf("%x\nbecame\n%x\nnot\n%x", before, after, want)
	}
	return is
}

// Every protocol, both families, there and back, as the mirror has it.
func TestThereAndBack(t *testing.T) {
	p := load(t)
	for _, six := range []bool{false, true} {
		pod, world, ping := pod4, world4, byte(icmp4)
		if six {
			pod, world, ping = pod6, world6, icmp6
		}
		for _, is := range []flow{of(tcp, pod, 40000, world, 443), of(udp, pod, 40000, world, 53), of(ping, pod, 77, world, 0)} {
			for _, payload := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte("abc"), 300)} {
				frame := packetOf(is, payload)
				_, after := p.run(datapathProgMasqToWire, frame)
				out := p.ours(frame, after, six)
				back := packetOf(out.reversed(), payload, 0x12)
				word, answer := p.became(datapathProgMasqFromWire, back)
				if want := translated(back, six, is.reversed()); word != "translated " || !bytes.Equal(answer, want) {
					t.Errorf("the answer to %v was %s:\n%x\nnot\n%x", is, word, answer, want)
				}
				for _, kind := range [][2]byte{{3, 4}, {11, 0}, {3, 3}, {12, 0}} {
					if six {
						kind[0] = 1 + kind[0]%4 // RFC 4443, 2.1: 1 to 4
					}
					router := netip.MustParseAddr(map[bool]string{false: "192.0.2.254", true: "2001:db8::254"}[six])
					told := errorAbout(after, six, router, out.from.Addr(), kind[0], kind[1], 1400)
					word, got := p.became(datapathProgMasqFromWire, told)
					if want := translatedError(told, six, router, is.from.Addr(), is); word != "translated " || !bytes.Equal(got, want) {
						t.Errorf("an error about %v was %s:\n%x\nnot\n%x", is, word, got, want)
					}
				}
				if is.protocol == ping {
					continue
				}
				// the pod's own error about the answer, and the node's
				for _, from := range []string{pod, map[bool]string{false: node4, true: node6}[six]} {
					told := errorAbout(answer, six, address(from), address(world), map[bool]byte{false: 3, true: 1}[six], 4, 0)
					word, got := p.became(datapathProgMasqToWire, told)
					if want := translatedError(told, six, out.from.Addr(), address(world), out.reversed()); word != "translated " || !bytes.Equal(got, want) {
						t.Errorf("%s's error about the answer to %v was %s:\n%x\nnot\n%x", from, is, word, got, want)
					}
				}
			}
		}
	}
}

// What is whose: a row for each kind of packet that leaves.
func TestToWire(t *testing.T) {
	p := load(t)
	sctp := frameOf(flow{132, netip.AddrPortFrom(address(pod4), 0), netip.AddrPortFrom(address(world4), 0)}, make([]byte, 20))
	later := packetOf(of(udp, pod4, 1, world4, 2), make([]byte, 20))
	later[ethernet+7] = 9 // its offset
	timestamp := packetOf(of(icmp4, pod4, 7, world4, 0), nil)
	timestamp[ethernet+20] = 13
	request := packetOf(of(icmp4, pod4, 0, world4, 0), nil)
	request[ethernet+20], request[ethernet+22] = 8, 0xf7 // and its checksum
	arp := packetOf(of(udp, pod4, 1, world4, 2), nil)
	arp[13] = 6
	stray := errorAbout(packetOf(of(udp, world4, 9, pod4, 9), nil), false, address(pod4), address(world4), 3, 3, 0)
	for _, row := range []struct {
		what  string
		frame []byte
		want  string
	}{
		{"a SYN", packetOf(of(tcp, pod4, 1000, world4, 80), nil), "translated begun"},
		{"the same flow", packetOf(of(tcp, pod4, 1000, world4, 80), nil, 0x10), "translated "},
		{"in the middle of a connection", packetOf(of(tcp, pod4, 1001, world4, 80), nil, 0x10), "translated begun"},
		{"a reset of nothing", packetOf(of(tcp, pod4, 1002, world4, 80), nil, 0x04), "dropped stray"},
		{"to a pod here", packetOf(of(udp, pod4, 1, "10.244.1.8", 2), nil), "untouched "},
		{"to a pod elsewhere", packetOf(of(udp, pod4, 1, "10.244.2.8", 2), nil), "untouched "},
		{"to a pod elsewhere, IPv6", packetOf(of(udp, pod6, 1, "fd00:244:3::8", 2), nil), "untouched "},
		{"to no pod's range", packetOf(of(udp, pod4, 1, "10.244.9.8", 2), nil), "translated begun"},
		{"to another node", packetOf(of(udp, pod4, 1, "192.0.2.2", 2), nil), "translated begun"},
		{"link-local", packetOf(of(udp, pod4, 1, "169.254.169.254", 80), nil), "untouched "},
		{"multicast", packetOf(of(udp, pod4, 1, "224.0.0.251", 5353), nil), "untouched "},
		{"multicast, IPv6", packetOf(of(udp, pod6, 1, "ff02::fb", 5353), nil), "untouched "},
		{"broadcast", packetOf(of(udp, pod4, 1, "255.255.255.255", 67), nil), "untouched "},
		{"of the node", packetOf(of(udp, node4, 40000, world4, 2), nil), "untouched "},
		{"of a pod elsewhere", packetOf(of(udp, "10.244.2.7", 1, world4, 2), nil), "untouched "},
		{"SCTP", sctp, "dropped unknown"},
		{"an ICMP timestamp request", timestamp, "dropped unknown"},
		{"a later fragment without a first", later, "dropped stray"},
		{"a ping with the identifier 0", request, "translated begun"},
		{"an echo reply with the identifier 0", packetOf(of(icmp4, pod4, 0, "203.0.113.5", 0), nil), "dropped stray"},
		{"an echo reply that nobody asked for", packetOf(of(icmp4, pod4, 0, world4, 5), nil), "dropped stray"},
		{"an ICMP error about nothing", stray, "dropped stray"},
		{"ARP", arp, "untouched "},
	} {
		if got, _ := p.became(datapathProgMasqToWire, row.frame); got != row.want {
			t.Errorf("%s: %q, not %q", row.what, got, row.want)
		}
	}
}

// What comes by the wire and belongs to nobody stays as it is; what goes to a pod's own
// address is remembered, and its answers keep that.
func TestFromWire(t *testing.T) {
	p := load(t)
	for _, row := range []struct {
		what  string
		frame []byte
		want  string
	}{
		{"to the node", packetOf(of(tcp, world4, 80, node4, 2000), nil), "untouched "},
		{"an answer to nobody", packetOf(of(tcp, world4, 80, node4, 2000), nil, 0x12), "untouched "},
		{"a SYN to a pod", packetOf(of(tcp, world4, 5000, pod4, 80), nil), "untouched outside"},
		{"it again", packetOf(of(tcp, world4, 5000, pod4, 80), nil), "untouched "},
		{"the middle of a connection with a pod", packetOf(of(tcp, world4, 5001, pod4, 80), nil, 0x10), "untouched "},
		{"a datagram to a pod, IPv6", packetOf(of(udp, world6, 5000, pod6, 53), nil), "untouched outside"},
		{"a ping of a pod", packetOf(of(icmp4, world4, 9, pod4, 0), nil), "untouched outside"},
		{"from a pod elsewhere", packetOf(of(tcp, "10.244.2.7", 5000, pod4, 80), nil), "untouched "},
	} {
		if got, _ := p.became(datapathProgMasqFromWire, row.frame); got != row.want {
			t.Errorf("%s: %q, not %q", row.what, got, row.want)
		}
	}
	for _, answer := range []flow{of(tcp, pod4, 80, world4, 5000), of(udp, pod6, 53, world6, 5000), of(icmp4, pod4, 0, world4, 9)} {
		if got, _ := p.became(datapathProgMasqToWire, packetOf(answer, nil, 0x12)); got != "untouched " {
			t.Errorf("the answer %v: %q", answer, got)
		}
	}
}

// The node's own flow goes first: a pod's gives its port back, and gets another.
func TestYields(t *testing.T) {
	p := load(t)
	for _, is := range []flow{of(tcp, pod4, 40000, world4, 443), of(udp, pod6, 40000, world6, 53), of(icmp4, pod4, 77, world4, 0)} {
		frame := packetOf(is, nil)
		six := is.from.Addr().Is6()
		_, after := p.run(datapathProgMasqToWire, frame)
		out := p.ours(frame, after, six)
		if got, _ := p.became(datapathProgMasqToWire, packetOf(out, nil)); got != "untouched yielded" {
			t.Errorf("the node's own %v: %q", out, got)
		}
		if got, _ := p.became(datapathProgMasqFromWire, packetOf(out.reversed(), nil, 0x12)); got != "untouched " {
			t.Errorf("the answer to the node's own %v: %q", out, got)
		}
		if got, _ := p.became(datapathProgMasqToWire, frame); got != "translated begun" {
			t.Errorf("the pod's next packet: %q", got)
		}
	}
}

// Random flows of one pod after the other: no two are the same outside, answers go to whom
// they are for, and every checksum is right.
func TestDifferential(t *testing.T) {
	p := load(t)
	random := rand.New(rand.NewPCG(3, 5))
	pods, worlds := []string{pod4, "10.244.1.8", "10.244.1.9"}, []string{world4, "203.0.113.5"}
	pods6, worlds6 := []string{pod6, "fd00:244:1::8"}, []string{world6, "2001:db8:77::1"}
	one := func(all []string) string { return all[random.IntN(len(all))] }
	outside := map[flow]flow{}
	inside := map[flow]flow{}
	for range 6000 {
		six := random.IntN(2) == 0
		protocol, from, to := []byte{tcp, udp, icmp4}[random.IntN(3)], one(pods), one(worlds)
		if six {
			from, to = one(pods6), one(worlds6)
			if protocol == icmp4 {
				protocol = icmp6
			}
		}
		is := of(protocol, from, uint16(1+random.IntN(300)), to, uint16(1+random.IntN(3)))
		if protocol == icmp4 || protocol == icmp6 {
			is.to = netip.AddrPortFrom(is.to.Addr(), 0)
		}
		payload := make([]byte, random.IntN(900))
		for i := range payload {
			payload[i] = byte(random.Uint32())
		}
		frame := packetOf(is, payload)
		if protocol == udp && !six && random.IntN(4) == 0 {
			frame[ethernet+26], frame[ethernet+27] = 0, 0 // no checksum
		}
		_, after := p.run(datapathProgMasqToWire, frame)
		out := p.ours(frame, after, six)
		if before, known := inside[is]; known && before != out {
			t.Fatalf("%v was %v and is %v", is, before, out)
		}
		if other, known := outside[out]; known && other != is {
			t.Fatalf("%v and %v are both %v", other, is, out)
		}
		inside[is], outside[out] = out, is
		back := packetOf(out.reversed(), payload, 0x10)
		_, answer := p.run(datapathProgMasqFromWire, back)
		if want := translated(back, six, is.reversed()); !bytes.Equal(answer, want) {
			t.Fatalf("the answer to %v:\n%x\nnot\n%x", is, answer, want)
		}
	}
	if len(inside) < 3000 {
		t.Errorf("only %d flows: the test is blind", len(inside))
	}
	alive, err := p.layer.host.sweep()
	if err != nil || alive != len(inside) {
		t.Errorf("sweep finds %d flows, not %d: %v", alive, len(inside), err)
	}
}
