package route

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/netns"
)

// Where there is no tcx, and the kernel cannot be told that a packet is of another family:
// those go by the stack, and arrive as well.
func TestPodsByFilters(t *testing.T) {
	withoutTCX(t)
	v := newVillage(t, ModeVXLAN, false)
	l := v.start(0)
	v.start(1)
	for _, inner := range []bool{false, true} {
		before := counted(t, l)
		must(t, v.carry(0, inner, 16<<20))
		after := counted(t, l)
		way := map[bool]string{false: "taken", true: "taken_stack"}[inner]
		if after[way] == before[way] {
			t.Errorf("inner IPv6 %v: nothing was %s: %v", inner, way, after)
		}
	}
}

// Large packets are cut up by the uplink, as a network card without offloads has it done:
// both ends, and a plain one, understand each piece.
func TestCutUpByTheUplink(t *testing.T) {
	for _, six := range []bool{false, true} {
		for _, plain := range []bool{false, true} {
			t.Run(fmt.Sprintf("outer IPv6 %v, the other node is plain %v", six, plain), func(t *testing.T) {
				v := newVillage(t, ModeVXLAN, six)
				for i, path := range v.nodes {
					must(t, netns.Do(path, func() error {
						return netlink.LinkSetGSOMaxSize(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: v.uplinks[i]}}, 2000)
					}))
				}
				l := v.start(0)
				if plain {
					v.plain(1)
				} else {
					v.start(1)
				}
				for _, inner := range []bool{false, true} {
					before := counted(t, l)
					if err := v.carry(0, inner, 4<<20); err != nil {
						t.Errorf("inner IPv6 %v: %v", inner, err)
					}
					after := counted(t, l)
					if n := after["taken"] - before["taken"]; n < 4<<20/1500 {
						t.Errorf("inner IPv6 %v: %d packets came for 4 MB: they were not cut up", inner, n)
					}
				}
			})
		}
	}
}

// Pods are handed packets past their veths, too.
func TestPeer(t *testing.T) {
	v := newVillage(t, ModeVXLAN, false)
	v.settings[0].Peer, v.settings[1].Peer = true, true
	l := v.start(0)
	v.start(1)
	for _, inner := range []bool{false, true} {
		must(t, v.carry(0, inner, 16<<20))
	}
	if counted(t, l)["taken"] == 0 {
		t.Error("nothing was taken out")
	}
}

// Direct ways carry pods' packets as they are: past the stacks, or where the kernel cannot
// do that, by plain routes.
func TestDirect(t *testing.T) {
	for _, old := range []bool{false, true} {
		t.Run(fmt.Sprintf("by routes alone %v", old), func(t *testing.T) {
			if old {
				withoutTCX(t)
			}
			carryDirect(t)
		})
	}
}

func carryDirect(t *testing.T) {
	v := newVillage(t, ModeAuto, false)
	l := v.start(0)
	v.start(1)
	const bytes = 16 << 20
	for _, inner := range []bool{false, true} {
		for from := range v.nodes {
			before, stack := counted(t, l), v.forwarded(0)
			must(t, v.carry(from, inner, bytes))
			after, passed := counted(t, l), v.forwarded(0)-stack
			for _, what := range []string{"sent_direct", "taken_direct"} {
				n := after[what] - before[what]
				t.Logf("IPv6 %v, from pod %d: %s %d packets, %.1f KB each; the stack forwarded %d", inner, from+1, what, n, bytes/1024/float64(max(n, 1)), passed)
				if haveTCX() && (n == 0 || bytes/n < 4000 || passed > 0) || !haveTCX() && (n > 0 || passed == 0) {
					t.Errorf("IPv6 %v, from pod %d: %d packets were %s for %d bytes, and the stack forwarded %d", inner, from+1, n, what, bytes, passed)
				}
			}
		}
	}
	if n := counted(t, l)["sent"]; n > 0 {
		t.Errorf("%d packets went in VXLAN", n)
	}
	must(t, netns.Do(v.nodes[0], func() error {
		if _, err := netlink.LinkByName(DefaultDevice); err == nil {
			return errors.New("there is a vxlan device, for nobody")
		}
		return nil
	}))
}

// A node's own processes reach pods of the other node, and are answered: by eBPF and by a
// plain node.
func TestNodeToPod(t *testing.T) {
	for _, plain := range []bool{false, true} {
		t.Run(fmt.Sprintf("the other node is plain %v", plain), func(t *testing.T) {
			v := newVillage(t, ModeVXLAN, false)
			l := v.start(0)
			if plain {
				v.plain(1)
			} else {
				v.start(1)
			}
			for _, six := range []bool{false, true} {
				to := netip.AddrPortFrom(podAddress(1, six), 81)
				before := counted(t, l)
				answered := v.listen(v.pods[1], to)
				must(t, netns.Do(v.nodes[0], func() error {
					c, err := net.DialTimeout("tcp", to.String(), 5*time.Second)
					if err != nil {
						return err
					}
					defer c.Close()
					if from := netip.MustParseAddrPort(c.LocalAddr().String()).Addr(); from != v.snapshot().Nodes[0].PodCIDRs[map[bool]int{false: 0, true: 1}[six]].Addr() {
						t.Errorf("the node speaks from %s", from)
					}
					_ = c.SetDeadline(time.Now().Add(5 * time.Second))
					_, err = c.Read(make([]byte, 1))
					return err
				}))
				answered()
				after := counted(t, l)
				if after["sent_stack"] == before["sent_stack"] || after["taken_stack"] == before["taken_stack"] {
					t.Errorf("IPv6 %v: the stack's packets were not seen: %v", six, after)
				}
			}
		})
	}
}

// listen answers one connection with a byte; the result waits for that.
func (v *village) listen(space string, at netip.AddrPort) func() {
	v.t.Helper()
	var l net.Listener
	must(v.t, netns.Do(space, func() (err error) {
		l, err = net.Listen("tcp", at.String())
		return err
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		if c, err := l.Accept(); err == nil {
			_, _ = c.Write([]byte{1})
			c.Close()
		}
	}()
	return func() {
		l.Close()
		<-done
	}
}

// A datagram that is too long for VXLAN and must not be cut up is refused, and its sender
// is told what fits; what fits arrives.
func TestTooLong(t *testing.T) {
	for _, outer := range []bool{false, true} {
		t.Run(fmt.Sprintf("outer IPv6 %v", outer), func(t *testing.T) {
			v := newVillage(t, ModeVXLAN, outer)
			l := v.start(0)
			v.start(1)
			mtu := map[bool]int{false: 1450, true: 1430}[outer]
			for _, six := range []bool{false, true} {
				v.refused(six, mtu)
			}
			if n := counted(t, l)["too_big"]; n != 2 {
				t.Errorf("%d packets were too long, not 2", n)
			}
		})
	}
}

// refused sends a datagram that takes the uplink's MTU, wants to be told of another, and
// one of that length to arrive.
func (v *village) refused(six bool, mtu int) {
	v.t.Helper()
	to := netip.AddrPortFrom(podAddress(1, six), 82)
	var server *net.UDPConn
	must(v.t, netns.Do(v.pods[1], func() (err error) {
		server, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(to))
		return err
	}))
	defer server.Close()
	header := map[bool]int{false: 28, true: 48}[six]
	told, err := v.sendLong(v.pods[0], to, 1500-header, mtu-header)
	if err != nil || told != mtu {
		v.t.Errorf("inner IPv6 %v: told that %d bytes fit, not %d: %v", six, told, mtu, err)
	}
	_ = server.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := server.Read(make([]byte, 2000)); err != nil || n != mtu-header {
		v.t.Errorf("inner IPv6 %v: %d bytes came, not %d: %v", six, n, mtu-header, err)
	}
}

// sendLong sends a datagram that is too long, waits until the kernel was told, sends one
// that fits, and returns what was told.
func (v *village) sendLong(space string, to netip.AddrPort, long, short int) (told int, err error) {
	err = netns.Do(space, func() error {
		family, level, discover, path := unix.AF_INET, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_MTU
		var address unix.Sockaddr
		if to.Addr().Is6() {
			family, level, discover, path = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_MTU
			address = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
		} else {
			address = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		err = errors.Join(unix.SetsockoptInt(fd, level, discover, unix.IP_PMTUDISC_DO), unix.Connect(fd, address))
		if err != nil {
			return err
		}
		if _, err := unix.Write(fd, make([]byte, long)); err != nil {
			return err
		}
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if told, err = unix.GetsockoptInt(fd, level, path); err != nil || told < 1500 {
				break
			}
		}
		_, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR) // EMSGSIZE, once
		_, wrong := unix.Write(fd, make([]byte, short))
		return errors.Join(err, wrong)
	})
	return told, err
}

func needsTCX(t *testing.T) {
	if !haveTCX() {
		t.Skip("tcx needs Linux 6.6: without it direct ways are routes alone")
	}
}

// A pod's device that went while no process looked is forgotten by the next: its number may
// be another device's by then.
func TestDevicesThatWentMeanwhile(t *testing.T) {
	v := newVillage(t, ModeVXLAN, false)
	l := v.start(0)
	must(t, l.host.(*datapath).Maps[datapathMapPorts].Put(uint32(4711), uint8(1)))
	must(t, l.Close())
	ports := v.start(0).host.(*datapath).Maps[datapathMapPorts]
	var there uint8
	if err := ports.Lookup(uint32(4711), &there); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("the device that went: %d, %v", there, err)
	}
	if err := ports.Lookup(uint32(v.ports[0]), &there); err != nil || there != 1 {
		t.Errorf("the one that is there: %d, %v", there, err)
	}
}

// A program that is in force and cannot be pinned at once has its pod's device known all the
// same: the pin comes with a later look, which attaches nothing.
func TestDevicesWhosePinComesLater(t *testing.T) {
	if !haveTCX() {
		return // filters are not pinned
	}
	v := newVillage(t, ModeVXLAN, false)
	d := v.start(0).host.(*datapath)
	at := attach.Point{Program: datapathProgRouteFromPod, Device: v.ports[0]}
	must(t, d.detachAt(at))
	inTheWay := filepath.Join(d.Points.Pins, at.Pin())
	must(t, os.MkdirAll(filepath.Join(inTheWay, "more"), 0o700)) // an empty one would be cleared away
	if err := d.attachAt(at, "pod"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("what is in the way of the pin: %v", err)
	}
	must(t, os.RemoveAll(inTheWay))
	var there uint8
	if err := d.Maps[datapathMapPorts].Lookup(uint32(at.Device), &there); err != nil || !d.Points.Alive(at) {
		t.Errorf("the program is in force: %v, the device is known: %v", d.Points.Alive(at), err)
	}
	must(t, d.Points.Keep())
}
