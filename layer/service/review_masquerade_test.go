package service

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/millrace/millrace/model"
)

// farNames puts the Service names on the other node and leaves web on this one.
func (h *harbour) farNames() *model.Snapshot {
	far, near := h.services(nil, h.other), h.services(nil, h.local)
	far.Services[1] = near.Services[1]
	return far
}

// What a full table refuses leaves nothing behind: nobody would look for it.
func TestRefusedFlowsLeaveNoMasquerades(t *testing.T) {
	h := newHarbour(t)
	h.layer.settings.Flows = 256
	h.local.serveAll("local")
	h.other.serveAll("far")
	h.open(h.farNames())
	var open []net.Conn
	defer func() {
		for _, conn := range open {
			conn.Close()
		}
	}()
	for port := 3000; port < 3256; port++ {
		conn, err := h.client.fromPort("tcp", nodeToClient+":30080", port)
		if err != nil {
			break
		}
		open = append(open, conn)
	}
	before := h.reason("flows_full")
	for i := range 20 {
		h.must(h.client.inside(func() error {
			conn, err := net.Dial("udp", nodeToClient+":30053")
			if err == nil {
				_, err = fmt.Fprint(conn, i)
				conn.Close()
			}
			return err
		}))
	}
	if refused := h.reason("flows_full") - before; len(open) < 250 || refused < 10 {
		t.Fatalf("%d connections are open, %d datagrams were refused: the table is not full", len(open), refused)
	}
	if n := h.masqueraded(); n != 0 {
		t.Errorf("%d entries of flows that were refused", n)
	}
}

// Where most endpoints are on other nodes, nearly every flow is masqueraded. What is
// over gives way to them as to others.
func TestMasqueradedFlowsGiveWay(t *testing.T) {
	h := newHarbour(t)
	h.layer.settings.Flows = 256
	h.other.serveAll("far")
	h.open(h.services(nil, h.other))
	lacked := h.reason("no_storage")
	for i := range 400 {
		if i%50 == 49 {
			h.age(2 * time.Second)
			h.sweep()
		}
		_, _, err := h.client.call("udp", nodeToClient+":30053", "where?")
		// On a slow machine with one processor the kernel has no memory at hand for a
		// moment (kernel/bpf/memalloc.c gets it in the background).
		if now := h.reason("no_storage"); err != nil && now > lacked && now <= 3 {
			lacked = now
			_, _, err = h.client.call("udp", nodeToClient+":30053", "where?")
		}
		if err != nil {
			t.Fatalf("question %d: %v; flows_full is %d, no_storage %d, with %d entries", i, err, h.reason("flows_full"), h.reason("no_storage"), h.masqueraded())
		}
	}
	h.age(200 * time.Second)
	h.sweep()
	if n := h.masqueraded(); n != 0 {
		t.Errorf("%d entries are left when all flows are over", n)
	}
}

// Who asks for room for more flows gets it for masqueraded ones, too; those that are
// open stay.
func TestMoreFlowsMoreMasquerades(t *testing.T) {
	h := newHarbour(t)
	h.layer.settings.Flows = 256
	h.other.serveAll("far")
	snapshot := h.services(nil, h.other)
	h.open(snapshot)
	conn, err := h.client.fromPort("tcp", nodeToClient+":30080", 4000)
	h.must(err)
	defer conn.Close()
	h.must(exchangeLine(conn, "before"))
	h.layer.settings.Flows = 1024
	h.must(h.layer.Close())
	h.layer = New(h.layer.settings)
	h.must(h.layer.Open())
	h.have, err = h.layer.Read()
	h.must(err)
	h.become(snapshot)
	h.must(exchangeLine(conn, "after"))
	if have, want := h.layer.datapath.maps[datapathMapMasquerades].MaxEntries(), masqueradesOf(1024); have < want {
		t.Errorf("there is room for %d entries, want %d", have, want)
	}
	if n := h.masqueraded(); n != 2 {
		t.Errorf("%d entries of one flow", n)
	}
	h.again(snapshot)
	h.must(exchangeLine(conn, "and again"))
}

// An upgrade carries masqueraded connections over, and nothing of those that are over.
func TestUpgradeCarriesMasquerades(t *testing.T) {
	h := newHarbour(t)
	h.other.serveAll("far")
	snapshot := h.services(nil, h.other)
	h.open(snapshot)
	conn, err := h.client.fromPort("tcp", nodeToClient+":30080", 4000)
	h.must(err)
	defer conn.Close()
	h.must(exchangeLine(conn, "before"))
	var over datapathTuple
	over.SourcePort = 1
	h.must(h.layer.datapath.maps[datapathMapMasquerades].Put(over, datapathMasquerade{}))
	h.must(h.layer.Close())
	h.leaveOtherwise(datapathMapTranslations, datapathMapPlaces) // of one version with masquerades
	h.layer = New(h.layer.settings)
	h.must(h.layer.Open())
	h.have, err = h.layer.Read()
	h.must(err)
	h.become(snapshot)
	for i := range 3 {
		h.must(exchangeLine(conn, fmt.Sprint("after ", i)))
	}
	if _, _, err := h.client.call("tcp", nodeToClient+":30080", "anew"); err != nil {
		t.Error(err)
	}
	h.masqueradesFit("after an upgrade")
	description, err := h.layer.Describe()
	h.must(err)
	for _, text := range description.Degraded {
		t.Log(text)
	}
}
