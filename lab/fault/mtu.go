package fault

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/proc"
)

// narrow makes the router's way to the server take less than the links before it.
func narrow(p *Part) error {
	mtu := 1300 + p.random.IntN(120)
	if p.draw(2) == 0 {
		return p.mtu(p.router, p.router.far, mtu)
	}
	return p.narrowRoute(mtu)
}

// narrowWay does so for what goes to the server alone: a device that took less would
// not take what its other end sends, which nobody is told of.
func narrowWay(p *Part) error { return p.narrowRoute(1300 + p.random.IntN(120)) }

func (p *Part) narrowRoute(mtu int) error {
	r := &netlink.Route{Dst: ipNet(one(p.to)), LinkIndex: p.router.index(p.router.far), Scope: netlink.SCOPE_LINK, MTU: mtu}
	return p.router.net.RouteAdd(r)
}

func (p *Part) mtu(at *space, device string, mtu int) error {
	l, err := at.link(device)
	if err == nil {
		err = at.net.LinkSetMTU(l, mtu)
	}
	if err != nil {
		return fmt.Errorf("set mtu of %s in %s: %w", device, at.name, err)
	}
	return nil
}

// untold drops the ICMP messages that would tell the client, where they are sent or
// where they come.
func untold(p *Part) error {
	p.blame(p.router, p.client)
	r := rule{at: p.router, hook: "output", verdict: "drop", any: true, protocol: "icmp",
		iptables: "--icmp-type fragmentation-needed", nft: "icmp type destination-unreachable"}
	if p.six {
		r.protocol, r.iptables, r.nft = "icmpv6", "--icmpv6-type packet-too-big", "icmpv6 type packet-too-big"
	}
	if p.draw(2) == 1 {
		r.at, r.hook = p.client, "input"
	}
	return p.add(fronts[p.draw(len(fronts))], r)
}

// bigCalls send more than a packet holds.
func bigCalls(ctx context.Context, p *Part) {
	every(ctx, p.attempts, 50*time.Millisecond, func() { p.saw(p.call(ctx, 60000)) })
}

// unequal makes the far end of the client's link take less than the client sends, and
// the client cut its segments itself, as without offloads.
func unequal(p *Part) error {
	p.blame(p.client, p.gate())
	return errors.Join(p.mtu(p.gate(), p.gate().device, 1300+p.random.IntN(120)), p.noOffloads(p.client, p.client.device))
}

// The commands of ethtool (linux/ethtool.h).
const (
	setTXChecksum = 0x17
	setTSO        = 0x1f
	setGSO        = 0x24
)

// noOffloads makes the kernel cut segments and fill in checksums before the device.
func (p *Part) noOffloads(at *space, device string) error {
	return at.do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, command := range []uint32{setTSO, setGSO, setTXChecksum} {
			value := struct{ command, data uint32 }{command, 0}
			request := struct {
				name [unix.IFNAMSIZ]byte
				data uintptr
				rest [16]byte
			}{data: uintptr(unsafe.Pointer(&value))}
			copy(request.name[:], device)
			_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
			if errno != 0 {
				return fmt.Errorf("switch offloads of %s off: %w", device, errno)
			}
		}
		return nil
	})
}

// fragments lets the server wait for the rest of a packet for a second only.
func impatient(p *Part) error {
	p.blame(p.server)
	return p.server.set("net.ipv4.ipfrag_time", "1", "net.ipv6.ip6frag_time", "1")
}

// halves sends datagrams of which the second half never comes.
func halves(ctx context.Context, p *Part) {
	raw, ok := openRaw(p)
	if !ok {
		return
	}
	defer raw.close()
	from := netip.AddrPortFrom(p.from, uint16(1024+p.random.IntN(60000)))
	whole := udpSegment(from, p.local(p.port), make([]byte, 2000), 0)
	for range p.attempts {
		const more = 1 << 13
		first := whole[:1208]
		identity := uint16(p.random.Uint32())
		packet := append(ipHeader(p.from, p.to, unix.IPPROTO_UDP, len(first), identity, more), first...)
		if p.draw(3) == 2 { // the other half
			offset := uint16(1208 / 8)
			packet = append(ipHeader(p.from, p.to, unix.IPPROTO_UDP, len(whole)-1208, identity, offset), whole[1208:]...)
		}
		p.wrong(raw.send(packet))
		if !rest(ctx, 30*time.Millisecond) {
			return
		}
	}
	p.saw(Silent)
}

// counted reads a counter of /proc/net/snmp or netstat in a namespace: "Ip", "FragCreates".
func counted(at *space, group, name string) (n uint64) {
	at.do(func() error {
		for _, file := range []string{"snmp", "netstat"} {
			text, err := os.ReadFile("/proc/thread-self/net/" + file)
			if err != nil {
				return err
			}
			if v, err := proc.Counter(string(text), group+"."+name); err == nil {
				n = v
			}
		}
		return nil
	})
	return n
}

// grew says that the fault took only if a counter moved.
func grew(at func(*Part) *space, group, name string) func(*Part) error {
	return func(p *Part) error {
		if counted(at(p), group, name) == 0 {
			return fmt.Errorf("%s%s is 0 in %s", group, name, at(p).name)
		}
		return nil
	}
}

func atClient(p *Part) *space { return p.client }
func atServer(p *Part) *space { return p.server }

var mtuFaults = []*Fault{
	{Name: "mtu-black-hole", Number: "02a", Says: "The way is narrower than the links, and the message about it is filtered.", whole: true,
		Causes: []string{"mtu-black-hole"}, Seen: []Outcome{Hang}, needs: []string{"iptables-nft"},
		induce: serving(narrow, untold), send: bigCalls},
	{Name: "mtu-peer", Number: "02b", Says: "The far end of a link takes less than its near end sends; nobody tells.", whole: true,
		Causes: []string{"mtu-exceeds-peer"}, Seen: []Outcome{Hang}, induce: serving(unequal), send: bigCalls},
	{Name: "fragment-lost", Number: "29", Says: "One fragment of a datagram never comes.",
		Causes: []string{"fragment-lost"}, Seen: []Outcome{Silent}, window: 3 * time.Second, induce: serving(impatient), send: halves},
}

var native = binary.NativeEndian
