package service

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// Whoever asks for more flows gets them with the next process, and open streams do
// not notice; whoever asks for fewer keeps the room that there is.
func TestMoreFlowsFromTheNextProcessOn(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket, Flows: 256})
	client, server := v.pod(), v.pod()
	server.serve("tcp", 8080, "server")
	v.open(webAndNames(server))
	var conn net.Conn
	v.must(client.inside(func() (err error) {
		conn, err = net.DialTimeout("tcp", "10.96.0.1:80", patience)
		return err
	}))
	defer conn.Close()
	v.must(exchangeLine(conn, "in 256"))
	for _, c := range []struct{ asked, places int }{{1000, 1024}, {256, 1024}, {0, DefaultFlows}} {
		v.layer.settings.Flows = c.asked
		v.again(webAndNames(server))
		if places := int(v.layer.datapath.maps[datapathMapPlaces].MaxEntries()); places != c.places {
			t.Errorf("asked for %d flows there is room for %d, want %d", c.asked, places, c.places)
		}
		if degraded := v.layer.datapath.degraded; len(degraded) > 0 && v.layer.datapath.tcx {
			t.Errorf("asked for %d flows: %q", c.asked, degraded)
		}
		v.must(exchangeLine(conn, "in more"))
		v.whole("in more room")
		v.age(80000 * time.Second)
		v.sweep()
		v.must(exchangeLine(conn, "and it stays"))
	}
}

// A device may go at any moment, before anybody has seen it: nothing else waits for
// that.
func TestADeviceThatGoesStopsNothing(t *testing.T) {
	v, _, _ := twoPods(t)
	gone := v.pod()
	late := v.pod()
	v.become(webAndNames())
	v.must(v.node.Delete(gone.device))
	if err := v.layer.datapath.grow(v.layer.tables, capacity{1 << 15, 1 << 17}); err != nil {
		t.Errorf("growing while a device goes: %v", err)
	}
	have, err := v.layer.Refresh(v.have)
	v.must(err)
	var index int
	for _, p := range have.(*Picture).veths {
		if p.Name == late.device {
			index = p.Index
		}
	}
	v.must(v.layer.datapath.detachPort(index))
	v.must(v.node.Delete(late.device))
	if err := v.layer.datapath.attachPort(index, packetPort{late.device, ofPod}); err != nil {
		t.Errorf("attaching to a device that went: %v", err)
	}
	if _, there := v.layer.datapath.ports[index]; there {
		t.Error("a device that went is remembered")
	}
}

// A pod's device may get the index of one that just went, also its name: some CNI
// plug-ins make it in the pod and move it out, where it keeps its index.
func TestADeviceWithTheIndexOfAnother(t *testing.T) {
	v, _, server := twoPods(t)
	pod := v.pod()
	v.become(webAndNames(server))
	var index int
	v.must(v.Inside(func() error {
		there, err := netlink.LinkByName(pod.device)
		v.must(err)
		index = there.Attrs().Index
		v.must(netlink.LinkDel(there))
		space, err := os.Open(pod.netns)
		v.must(err)
		defer space.Close()
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: pod.device, Index: index},
			PeerName: "eth0", PeerNamespace: netlink.NsFd(space.Fd())})
	}))
	v.become(webAndNames(server))
	for _, h := range portHooks(index, ofPod) {
		if have := v.layer.datapath.attached[h.name]; have == nil || !have.Alive() {
			t.Errorf("%s is not in force at the new device", h.name)
		}
	}
}

// Where nobody asks for the packet path any more, it stays until its flows have
// ended: their sockets know the Service only.
func TestThePacketPathStaysForItsFlows(t *testing.T) {
	v, client, server := twoPods(t)
	conn, err := client.fromPort("tcp4", "10.96.0.1:80", 4000)
	v.must(err)
	defer conn.Close()
	v.must(exchangeLine(conn, "packet by packet"))
	v.layer.settings.Path = PathSocket
	v.become(webAndNames(server))
	v.again(webAndNames(server))
	if err := exchangeLine(conn, "still"); err != nil {
		t.Fatalf("a stream that was open when the packet path was switched off: %v", err)
	}
	conn.Close()
	v.awaitClosed()
	v.age(61 * time.Second)
	v.sweep()
	v.become(webAndNames(server))
	if n := len(v.layer.datapath.ports); n != 0 {
		t.Errorf("without flows the packet path is still at %d devices", n)
	}
}
