package service

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A client may talk to an endpoint by a Service and past it from one port: the
// endpoint must not take the two for one.
func TestOneClientTwoWaysToOneEndpoint(t *testing.T) {
	h := newHarbour(t)
	h.routes(h.client.netns, farPod4+"/32", nodeToClient)
	h.routes(h.other.netns, client4+"/32", nodeToOther)
	h.other.serveAll("far")
	h.open(h.services(nil, h.other))
	through, err := h.client.fromPort("tcp", nodeToClient+":30080", 4000)
	h.must(err)
	defer through.Close()
	h.must(exchangeLine(through, "by the Service"))
	past, err := h.client.fromPort("tcp", farPod4+":8080", 4000)
	if err != nil {
		t.Fatalf("past the Service: %v", err)
	}
	defer past.Close()
	for i := range 3 {
		h.must(exchangeLine(past, fmt.Sprint("past it ", i)))
		h.must(exchangeLine(through, fmt.Sprint("by it ", i)))
	}
}

// What is tagged for a VLAN is for that VLAN's device, which sees it as well: its
// carrier would translate it a second time. A priority alone is no VLAN.
func TestPacketsOfAVLANAreLeftToItsDevice(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.open(h.services(nil, h.local))
	from, to := netip.MustParseAddrPort(client4+":5000"), netip.MustParseAddrPort("198.51.100.7:80")
	plain := frame(packetOf(from.Addr(), to.Addr(), protoTCP, tcp(from, to, flagSYN, nil)))
	copy(plain, []byte{2, 0, 0, 2, 0, 0x70}) // the node's
	send := func(vlan byte) {
		h.must(h.client.sendFrame(slices.Concat(plain[:12], []byte{0x81, 0, 0x20, vlan}, plain[12:])))
	}
	send(7)
	for deadline := time.Now().Add(patience / 40); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if flows, _ := h.flows(); flows > 0 {
			t.Fatalf("%d flows were made of a frame of a VLAN", flows)
		}
	}
	send(0)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if flows, _ := h.flows(); flows == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no flow of a frame with a priority either")
		}
	}
}

// A process of the node that asks somebody from a port which is also a node port
// gets the answer.
func TestAnswersToTheNodesOwnSockets(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.open(h.services(nil, h.local))
	h.client.serve("udp", 9999, "client")
	var conn net.Conn
	h.must(h.Inside(func() (err error) {
		conn, err = net.DialUDP("udp", &net.UDPAddr{IP: net.ParseIP(nodeToClient), Port: 30053}, &net.UDPAddr{IP: net.ParseIP(client4), Port: 9999})
		return err
	}))
	defer conn.Close()
	if err := exchangeWithin(2*time.Second, conn, "hello"); err != nil {
		t.Errorf("the answer: %v", err)
	}
	if line, _, err := h.client.call("udp", nodeToClient+":30053", "hello"); err != nil || line != "local "+client4 {
		t.Errorf("others at the node port meanwhile: %q, %v", line, err)
	}
}
