package service

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
)

// index is a device's of the node.
func (h *harbour) index(device string) int {
	h.t.Helper()
	index, err := h.node.Index(device)
	h.must(err)
	return index
}

// A device that turns from a pod's to one by which packets leave the node, and back,
// has the programs that it needs, and no others, as soon as that was carried out.
func TestDeviceTurnsFromPodToWireAndBack(t *testing.T) {
	h := newHarbour(t)
	h.machine("eth2", []string{"192.0.4.1/24"}, []string{"192.0.4.2/24"})
	h.local.serveAll("local")
	without := h.services(nil, h.local)
	h.open(without)
	with := h.services(nil, h.local)
	with.Nodes[0].Addresses = append(with.Nodes[0].Addresses, netip.MustParseAddr("192.0.4.1"))
	device := h.index("eth2")
	expect := func(what string, wire bool) {
		t.Helper()
		port, there := h.layer.datapath.ports[device]
		if !there || (port.side == ofWire) != wire {
			t.Errorf("%s: in force there: %v, side %d", what, there, port.side)
		}
		if known := h.layer.datapath.readWire(link.Device{Index: device}) != nil; known != wire {
			t.Errorf("%s: the programs know it as a wire: %v", what, known)
		}
		for _, other := range sides {
			for _, hook := range portHooks(device, other) {
				have := h.layer.datapath.attached[hook.name]
				if there := have != nil && have.Alive(); there != (other == port.side) {
					t.Errorf("%s: %s is in force: %v", what, hook.name, there)
				}
			}
		}
	}
	expect("at first", false)
	h.become(with)
	expect("as a wire", true)
	h.must(clearFlows(h.layer.datapath))
	h.become(without)
	expect("as a pod's again", false)
}

// A device that goes while no process runs is not left in the map of wires.
func TestWireThatWentMeanwhileIsForgotten(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	snapshot := h.services(nil, h.local)
	h.open(snapshot)
	gone := uint32(h.index("eth1"))
	h.must(h.layer.Close())
	h.must(h.node.Delete("eth1"))
	h.layer = New(h.layer.settings)
	h.must(h.layer.Open())
	var err error
	h.have, err = h.layer.Read()
	h.must(err)
	h.become(snapshot)
	var value datapathAddresses
	if err := h.layer.datapath.maps[datapathMapWires].Lookup(gone, &value); err == nil {
		t.Error("the device that went is still a wire")
	}
}

// The next process finds everything as it should be.
func TestNextProcessTakesWiresOver(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.other.serveAll("far")
	snapshot := h.services(nil, h.local, h.other)
	h.open(snapshot)
	h.again(snapshot)
	var conn net.Conn
	h.must(h.client.inside(func() (err error) {
		conn, err = net.Dial("tcp", nodeToClient+":30080")
		return err
	}))
	defer conn.Close()
	for i := range 3 {
		h.must(exchangeLine(conn, fmt.Sprint("before ", i)))
		h.again(snapshot)
		h.must(exchangeLine(conn, fmt.Sprint("after ", i)))
	}
}

// Node ports are served by the next process also where it does not find the range
// in which they lie, and the range is no larger than it must be.
func TestRangeOfNodePortsIsMended(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	snapshot := h.services(nil, h.local)
	h.open(snapshot)
	restart := func() {
		h.layer = New(h.layer.settings)
		h.must(h.layer.Open())
		var err error
		h.have, err = h.layer.Read()
		h.must(err)
		h.become(snapshot)
	}
	h.must(h.layer.Close())
	h.must(os.Remove(h.layer.settings.Pins + "/" + datapathMapNodePorts))
	restart()
	if err := h.client.quickly("tcp", nodeToClient+":30080"); err != nil {
		t.Errorf("after the range was lost: %v", err)
	}
	snapshot = h.services(nil, h.local)
	snapshot.Services = snapshot.Services[:1] // names, 30053
	h.become(snapshot)
	h.must(h.layer.Close())
	restart()
	now, _, err := h.layer.tables.ports.Get(0)
	h.must(err)
	if now != (datapathPortRange{Lowest: 30053, Highest: 30053}) {
		t.Errorf("with one node port the range is %d to %d", now.Lowest, now.Highest)
	}
}

// A frame for another machine, which a device in promiscuous mode gets as well, is
// that machine's.
func TestFramesForOtherMachinesAreLeftAlone(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.open(h.services(nil, h.local))
	from, to := netip.MustParseAddrPort(client4+":5000"), netip.MustParseAddrPort("198.51.100.7:80")
	syn := frame(packetOf(from.Addr(), to.Addr(), protoTCP, tcp(from, to, flagSYN, nil)))
	copy(syn, []byte{2, 0xaa, 0, 0, 0, 1})
	h.must(h.client.sendFrame(syn))
	for deadline := time.Now().Add(patience / 40); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if flows, _ := h.flows(); flows > 0 {
			t.Fatalf("%d flows were made of a frame for another machine", flows)
		}
	}
	copy(syn, []byte{2, 0, 0, 2, 0, 0x70}) // the node's
	h.must(h.client.sendFrame(syn))
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if flows, _ := h.flows(); flows == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no flow of a frame for this machine either")
		}
	}
}

// sendFrame sends an Ethernet frame as it is.
func (p *pod) sendFrame(f []byte) error {
	return p.inside(func() error {
		device, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: device.Index})
	})
}

// After everything there is nothing left of it.
func TestRemoveLeavesNothingAtWires(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.open(h.services(nil, h.local))
	var ids []uint32
	for _, a := range h.layer.datapath.attached {
		ids = append(ids, a.ID())
	}
	h.must(h.layer.Close())
	_, err := New(h.layer.settings).Remove()
	h.must(err)
	if _, err := os.Stat(h.layer.settings.Pins); !os.IsNotExist(err) {
		t.Errorf("the pin folder: %v", err)
	}
	if slices.Contains(ids, 0) {
		t.Errorf("links %v", ids)
	}
	if err := h.client.quickly("tcp", nodeToClient+":30080"); err == nil {
		t.Error("the node port is still served")
	}
	h.layer = New(h.layer.settings)
	h.must(h.layer.Open())
}

// Masqueraded packets come from an address that stays the node's.
func TestAddressesOfWires(t *testing.T) {
	node := addrs("192.0.2.1", "fd00:2::1")
	for _, row := range []struct {
		name       string
		has, other []string // addresses of the device, and of another one
		ip4, ip6   string
	}{
		{name: "the only ones", has: []string{"192.0.2.1", "fe80::1", "fd00:2::1"}, ip4: "192.0.2.1", ip6: "fd00:2::1"},
		{name: "a load balancer's that is the newest", has: []string{"198.51.100.7", "192.0.2.1", "fd00:99::7", "fd00:2::1"}, ip4: "192.0.2.1", ip6: "fd00:2::1"},
		{name: "none of the Node object's", has: []string{"192.0.9.1", "192.0.9.2"}, ip4: "192.0.9.1"},
		{name: "unnumbered", has: []string{"fe80::1"}, other: []string{"127.0.0.1", "192.0.2.1", "fd00:2::1"}, ip4: "192.0.2.1", ip6: "fd00:2::1"},
		{name: "an external address that no device has", has: []string{"fd00:2::1"}, ip6: "fd00:2::1"},
	} {
		t.Run(row.name, func(t *testing.T) {
			device, other := link.Device{Addresses: addrs(row.has...)}, link.Device{Addresses: addrs(row.other...)}
			w := wireOf(device, node, []veth{{Device: device}, {Device: other}})
			var ip4, ip6 netip.Addr
			if row.ip4 != "" {
				ip4 = netip.MustParseAddr(row.ip4)
			}
			if row.ip6 != "" {
				ip6 = netip.MustParseAddr(row.ip6)
			}
			if w.ip4 != ip4 || w.ip6 != ip6 {
				t.Errorf("%v and %v, want %v and %v", w.ip4, w.ip6, ip4, ip6)
			}
		})
	}
}

// The last Service that can be reached from outside goes: connections that are open
// go on, as with any other; when they are over the programs go.
func TestConnectionsOutliveTheLastEntrance(t *testing.T) {
	h := newHarbour(t)
	h.other.serveAll("far")
	h.open(h.services(nil, h.other))
	conn, err := h.client.fromPort("tcp", nodeToClient+":30080", 4000)
	h.must(err)
	defer conn.Close()
	h.must(exchangeLine(conn, "before"))
	none := h.services(nil)
	none.Services = nil
	h.become(none)
	h.must(exchangeWithin(3*time.Second, conn, "after"))
	conn.Close()
	h.awaitClosed()
	h.age(90000 * time.Second)
	h.sweep()
	h.become(none)
	for _, port := range h.layer.datapath.ports {
		if port.side != ofPod {
			t.Errorf("when all is over there are programs at %s", port.name)
		}
	}
}
