package fault

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tunnel is a pair of vxlan devices between client and server.
type tunnel struct {
	// ids and ports are the client's and the server's.
	ids, ports [2]int
	mtu        int
	// known says that each knows where the other is.
	known bool
	// settled says that neighbours need not be asked for.
	settled bool
}

func (p *Part) tunnel() tunnel {
	id, port := 1+p.random.IntN(1<<20), []int{4789, 8472, 1024 + p.random.IntN(20000)}[p.draw(3)]
	return tunnel{ids: [2]int{id, id}, ports: [2]int{port, port}, mtu: 1400, known: true}
}

// dig makes the tunnel, and moves the part's addresses into it.
func (p *Part) dig(t tunnel) error {
	p.blame(p.client, p.server)
	outer := [2]netip.Addr{p.from, p.to}
	inner := p.overlay()
	ends := [2]*space{p.client, p.server}
	var macs [2]net.HardwareAddr
	var indexes [2]int
	name := "vxlan" + fmt.Sprint(p.random.IntN(100))
	for i, at := range ends {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = name, t.mtu
		device := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: t.ids[i], Port: t.ports[i], SrcAddr: outer[i].AsSlice(), Learning: p.draw(2) == 1}
		if err := at.net.LinkAdd(device); err != nil {
			return fmt.Errorf("add vxlan in %s: %w", at.name, err)
		}
		l, err := at.link(name)
		if err != nil {
			return err
		}
		if err := at.net.LinkSetUp(l); err != nil {
			return err
		}
		if err := at.addr(name, netip.PrefixFrom(inner[i], p.overlayBits())); err != nil {
			return err
		}
		macs[i], indexes[i] = l.Attrs().HardwareAddr, l.Attrs().Index
	}
	for i, at := range ends {
		other := 1 - i
		if t.known {
			entry := &netlink.Neigh{LinkIndex: indexes[i], Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF,
				State: netlink.NUD_PERMANENT | netlink.NUD_NOARP, IP: outer[other].AsSlice(), HardwareAddr: make(net.HardwareAddr, 6)}
			if err := at.net.NeighAppend(entry); err != nil {
				return fmt.Errorf("add a forwarding entry in %s: %w", at.name, err)
			}
		}
		if t.settled {
			if err := at.neigh(name, inner[other], macs[other]); err != nil {
				return err
			}
		}
	}
	p.from, p.to = inner[0], inner[1]
	return nil
}

// overlay are the addresses of both ends inside.
func (p *Part) overlay() [2]netip.Addr {
	base := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(64 + p.random.IntN(60)), byte(p.random.IntN(256)), 0}), 24)
	if p.six {
		base = netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, byte(p.random.IntN(256)), byte(p.random.IntN(256)), 0xee}), 64)
	}
	return [2]netip.Addr{p.host(base), p.host(base)}
}

func (p *Part) overlayBits() int {
	if p.six {
		return 64
	}
	return 24
}

func digging(change func(*Part, *tunnel)) func(*Part) error {
	return func(p *Part) error {
		t := p.tunnel()
		change(p, &t)
		return errors.Join(p.dig(t), p.servers())
	}
}

func bigQuestions(ctx context.Context, p *Part) {
	every(ctx, p.attempts, 50*time.Millisecond, func() { p.saw(p.ask(ctx, fullPacket)) })
}

// fullPacket fills a packet inside a tunnel whose devices take 1500 bytes.
const fullPacket = 1470

var vxlanFaults = []*Fault{
	{Name: "vxlan-vni", Number: "18a", Says: "The two ends of a tunnel have different numbers.",
		Causes: []string{"vxlan-unknown-vni"}, Seen: []Outcome{Silent, Timeout, Unreachable},
		induce: digging(func(p *Part, t *tunnel) { t.ids[1]++; t.settled = p.draw(2) == 0 }), send: callsOrQuestions},
	{Name: "vxlan-no-entry", Number: "18b", Says: "A tunnel's device does not know where the other end is.",
		Causes: []string{"vxlan-no-forwarding-entry"}, Seen: []Outcome{Silent, Timeout, Unreachable},
		induce: digging(func(p *Part, t *tunnel) { t.known = false; t.settled = p.draw(2) == 0 }), send: callsOrQuestions},
	{Name: "vxlan-port", Number: "18c", Says: "The two ends of a tunnel use different ports.",
		Causes: []string{"vxlan-port-mismatch"}, Seen: []Outcome{Silent, Timeout, Unreachable},
		induce: digging(func(p *Part, t *tunnel) { t.ports = [2]int{8472, 4789}; t.settled = p.draw(2) == 0 }), send: callsOrQuestions},
	{Name: "vxlan-fragments", Number: "18d", Says: "A tunnel's devices take as much as the links below: what is sent is cut in two, silently.", families: onlyFour,
		Causes: []string{"vxlan-fragmentation"}, Seen: []Outcome{OK},
		induce: digging(func(_ *Part, t *tunnel) { t.mtu = 1500 }), send: bigQuestions, took: grew(atClient, "Ip", "FragCreates")},
}
