package route

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// letter is a packet of VXLAN's payload: a datagram between pods, for the first node's device.
func letter(from, to netip.Addr) []byte {
	mac := macOf([]netip.Addr{netip.MustParseAddr("192.0.2.1")})
	payload := append([]byte{8, 0, 0, 0, 0, 0, DefaultVNI, 0}, mac[:]...)
	frame := packet(from.String(), to.String(), 0, 64, 5)
	frame[34+2], frame[34+3] = 5000>>8, 5000&0xff
	return append(append(payload, 2, 9, 9, 9, 9, 9), frame[12:]...)
}

// post sends a letter from an address in a namespace, with IP options if there are any.
func (v *village) post(space string, from, to netip.Addr, options string, letter []byte) {
	v.t.Helper()
	must(v.t, netns.Do(space, func() error {
		family := unix.AF_INET6
		if to.Is4() {
			family = unix.AF_INET
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1); err != nil {
			return err
		}
		if options != "" {
			if err := unix.SetsockoptString(fd, unix.IPPROTO_IP, unix.IP_OPTIONS, options); err != nil {
				return err
			}
		}
		if to.Is6() {
			if err := unix.Bind(fd, &unix.SockaddrInet6{Addr: from.As16()}); err != nil {
				return err
			}
			return unix.Sendto(fd, letter, 0, &unix.SockaddrInet6{Port: DefaultPort, Addr: to.As16()})
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: from.As4()}); err != nil {
			return err
		}
		return unix.Sendto(fd, letter, 0, &unix.SockaddrInet4{Port: DefaultPort, Addr: to.As4()})
	}))
}

// mailbox is a socket of a pod at port 5000, of the family of IPv4.
func (v *village) mailbox(pod int) net.PacketConn {
	v.t.Helper()
	var in net.PacketConn
	must(v.t, netns.Do(v.pods[pod], func() (err error) {
		in, err = net.ListenPacket("udp4", netip.AddrPortFrom(podAddress(pod, false), 5000).String())
		return err
	}))
	v.t.Cleanup(func() { in.Close() })
	return in
}

// came says whether something is in the mailbox soon.
func came(in net.PacketConn, wait time.Duration) bool {
	_ = in.SetReadDeadline(time.Now().Add(wait))
	_, _, err := in.ReadFrom(make([]byte, 100))
	return err == nil
}

// VXLAN is taken from nodes of the cluster only, by whatever way it comes to the kernel's
// device: to addresses that are not the node's in the cluster, with IP options, in fragments,
// from pods, and over IPv6.
func TestStrangers(t *testing.T) {
	v := newVillage(t, ModeVXLAN, false)
	l := v.start(0)
	addr := netip.MustParseAddr
	add := func(node int, prefix string) {
		must(t, netns.Do(v.nodes[node], func() error {
			return netlink.AddrAdd(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: v.uplinks[node]}}, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(prefix)), Flags: unix.IFA_F_NODAD})
		}))
	}
	add(0, "198.51.100.1/32")
	add(1, "192.0.2.99/24")
	add(1, "2001:db8::99/64")
	add(0, "2001:db8::77/128")
	must(t, netns.Do(v.nodes[1], func() error {
		return netlink.RouteAdd(&netlink.Route{LinkIndex: v.uplinks[1], Dst: ipNet(netip.MustParsePrefix("198.51.100.1/32")), Gw: addr("192.0.2.1").AsSlice()})
	}))
	in := v.mailbox(0)
	plain := letter(podAddress(1, false), podAddress(0, false))
	long := append(append([]byte{}, plain...), make([]byte, 1500)...)
	other := append([]byte{}, plain...)
	other[6]++
	const option = "\x01\x01\x01\x01"
	for _, row := range []struct {
		what, space, from, to, options string
		letter                         []byte
		taken                          bool
	}{
		{"a stranger, to the address of VXLAN", v.nodes[1], "192.0.2.99", "192.0.2.1", "", plain, false},
		{"a stranger, to another address", v.nodes[1], "192.0.2.99", "198.51.100.1", "", plain, false},
		{"a stranger, with an option", v.nodes[1], "192.0.2.99", "192.0.2.1", option, plain, false},
		{"a stranger, in fragments", v.nodes[1], "192.0.2.99", "192.0.2.1", "", long, false},
		{"a stranger, over IPv6", v.nodes[1], "2001:db8::99", "2001:db8::1", "", plain, false},
		{"a stranger, over IPv6 to another address", v.nodes[1], "2001:db8::99", "2001:db8::77", "", plain, false},
		{"a pod, to its node", v.pods[0], "10.244.1.7", "192.0.2.1", "", plain, false},
		{"a pod, to another address of its node", v.pods[0], "10.244.1.7", "198.51.100.1", "", plain, false},
		{"a pod, with an option", v.pods[0], "10.244.1.7", "192.0.2.1", option, plain, false},
		{"a pod, in fragments", v.pods[0], "10.244.1.7", "192.0.2.1", "", long, false},
		{"a pod, in the name of a node", v.pods[0], "192.0.2.2", "198.51.100.1", "", plain, false},
		{"a pod, over IPv6", v.pods[0], "fd00:244:1::7", "2001:db8::1", "", plain, false},
		{"a node, of another network", v.nodes[1], "192.0.2.2", "198.51.100.1", "", other, false},
		{"a node", v.nodes[1], "192.0.2.2", "192.0.2.1", "", plain, true},
		{"a node, to another address", v.nodes[1], "192.0.2.2", "198.51.100.1", "", plain, true},
		{"a node, with an option", v.nodes[1], "192.0.2.2", "192.0.2.1", option, plain, true},
		{"a node, in fragments", v.nodes[1], "192.0.2.2", "192.0.2.1", "", long, true},
		{"a node, over IPv6 to another address", v.nodes[1], "2001:db8::2", "2001:db8::77", "", plain, true},
	} {
		before := counted(t, l)["stranger"]
		v.post(row.space, addr(row.from), addr(row.to), row.options, row.letter)
		wait := 3 * time.Second
		if !row.taken {
			wait = 300 * time.Millisecond
		}
		got, counts := came(in, wait), counted(t, l)["stranger"]-before
		if got != row.taken || (counts == 0) != row.taken {
			t.Errorf("%s: taken %v, %d counted as strangers", row.what, got, counts)
		}
	}
}

// What a pod sends to another node's port of VXLAN is dropped before its own node writes its
// own address as the sender's.
func TestMasqueradedStranger(t *testing.T) {
	v := newVillage(t, ModeVXLAN, false)
	l := v.start(0)
	v.start(1)
	v.sh(v.nodes[0], "nft 'table ip m { chain p { type nat hook postrouting priority 100; ip saddr 10.244.1.0/24 ip daddr != 10.244.0.0/16 masquerade; }; }'")
	in := v.mailbox(1)
	mac := macOf([]netip.Addr{netip.MustParseAddr("192.0.2.2")})
	forged := letter(netip.MustParseAddr("10.244.1.99"), podAddress(1, false))
	copy(forged[8:], mac[:])
	for range 2 {
		v.post(v.pods[0], podAddress(0, false), netip.MustParseAddr("192.0.2.2"), "", forged)
		forged = append(forged, make([]byte, 2000)...) // then in fragments
	}
	if came(in, time.Second) {
		t.Error("a pod's VXLAN was taken as its node's")
	}
	if n := counted(t, l)["stranger"]; n != 2 {
		t.Errorf("%d packets were counted as strangers, not 2", n)
	}
}

// A device that takes VXLAN from anybody, as an earlier version made it, becomes one that
// asks.
func TestEarlierDevice(t *testing.T) {
	v := newVillage(t, ModeVXLAN, false)
	must(t, netns.Do(v.nodes[0], func() error {
		attrs := netlink.NewLinkAttrs()
		mac := macOf(usable(v.snapshot().Nodes[0].Addresses))
		attrs.Name, attrs.HardwareAddr, attrs.MTU = DefaultDevice, mac[:], 1450
		d := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: DefaultVNI, Port: DefaultPort, UDP6ZeroCSumRx: true}
		if err := netlink.LinkAdd(d); err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetAlias(d, alias), netlink.LinkSetUp(d))
	}))
	l := v.start(0)
	v.start(1)
	have, err := l.Read()
	must(t, err)
	if d := have.(*Picture).device; !d.Guarded || d.torn || d.VNI != DefaultVNI {
		t.Errorf("the device is %+v", d)
	}
	if left := l.Diff(have, l.Plan(v.snapshot()), true); len(left) > 0 {
		t.Errorf("still to do: %v", left)
	}
	must(t, v.carry(0, false, 1<<20))
}
