package service

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/model"
)

// flows is how many flows the packet path knows, by its own count and by that of
// its entries, two for each.
func (v *village) flows() (counted, entries int) {
	v.t.Helper()
	counted, err := v.layer.datapath.flowCount()
	v.must(err)
	var key datapathTuple
	var value datapathTranslation
	all := v.layer.datapath.maps[datapathMapTranslations].Iterate()
	for all.Next(&key, &value) {
		entries++
	}
	v.must(all.Err())
	return counted, entries
}

// age makes every flow look as if it had been silent for so long.
func (v *village) age(by time.Duration) {
	v.t.Helper()
	m := v.layer.datapath.maps[datapathMapTranslations]
	changed := map[datapathTuple]datapathTranslation{}
	var key datapathTuple
	var value datapathTranslation
	all := m.Iterate()
	for all.Next(&key, &value) {
		value.Seen -= uint32(by.Seconds())
		changed[key] = value
	}
	v.must(all.Err())
	for key, value := range changed {
		v.must(m.Put(key, value))
	}
}

func (v *village) sweep() {
	v.t.Helper()
	v.must(v.layer.datapath.sweep(0, 1))
}

func (v *village) reason(name string) uint64 {
	v.t.Helper()
	description, err := v.layer.Describe()
	v.must(err)
	return description.Reasons[name]
}

// A flow is remembered for as long as its protocol and state ask for, whoever
// sent last, and no longer.
func TestFlowsExpire(t *testing.T) {
	v, client, _ := twoPods(t)
	open := func(network, address string) net.Conn {
		var conn net.Conn
		v.must(client.inside(func() (err error) {
			conn, err = net.Dial(network, address)
			return err
		}))
		t.Cleanup(func() { conn.Close() })
		v.must(exchangeLine(conn, "first"))
		return conn
	}
	expect := func(what string, flows int) {
		t.Helper()
		v.sweep()
		if counted, entries := v.flows(); counted != flows || entries != 2*flows {
			t.Errorf("%s: %d flows are counted and %d entries there, want %d and %d", what, counted, entries, flows, 2*flows)
		}
	}
	stream, datagrams := open("tcp", "10.96.0.1:80"), open("udp", "10.96.0.10:53")
	expect("two open flows", 2)
	v.age(121 * time.Second)
	expect("after two silent minutes the datagrams' flow goes", 1)
	v.must(exchangeLine(datagrams, "again"))
	v.age(86000 * time.Second)
	v.must(exchangeLine(stream, "a day is not over"))
	expect("the stream's flow stays for a day", 1)
	v.age(80000 * time.Second)
	expect("and for another one", 1)
	stream.Close()
	v.awaitClosed()
	expect("a closed stream's flow waits as the sockets do", 1)
	v.age(61 * time.Second)
	expect("and goes after a minute", 0)
	if _, _, err := client.call("tcp", "10.96.0.1:80", "anew"); err != nil {
		t.Error(err)
	}
}

// awaitClosed waits until every flow has seen both ends.
func (v *village) awaitClosed() {
	v.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		ends := 0
		var key datapathTuple
		var value datapathTranslation
		all := v.layer.datapath.maps[datapathMapTranslations].Iterate()
		for all.Next(&key, &value) {
			if value.Flags&3 != 0 { // SEEN_FIN, SEEN_RST
				ends++
			}
		}
		v.must(all.Err())
		if ends >= 2 {
			return
		}
		if time.Now().After(deadline) {
			v.t.Fatalf("%d entries have seen the end", ends)
		}
		time.Sleep(time.Millisecond)
	}
}

// A table full of open connections refuses new ones, says so, and loses none of
// those it has; what is over gives way at once.
func TestFullFlowTableIsNamedAndKeepsWhatItHas(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket, Flows: 256})
	client, server := v.pod(), v.pod()
	server.serve("tcp", 8080, "server")
	server.serve("udp", 5353, "server")
	v.open(webAndNames(server))
	var open []net.Conn
	defer func() {
		for _, conn := range open {
			conn.Close()
		}
	}()
	dial := func() (net.Conn, error) {
		var conn net.Conn
		err := client.inside(func() (err error) {
			conn, err = net.DialTimeout("tcp", "10.96.0.1:80", 300*time.Millisecond)
			return err
		})
		return conn, err
	}
	for v.reason("flows_full") == 0 {
		conn, err := dial()
		if err != nil {
			if !os.IsTimeout(err) {
				t.Fatal(err)
			}
			break
		}
		open = append(open, conn)
		if len(open) > 300 {
			t.Fatalf("%d connections are open through a table of 256", len(open))
		}
	}
	if len(open) < 250 || v.reason("flows_full") == 0 {
		t.Errorf("%d connections opened, flows_full is %d", len(open), v.reason("flows_full"))
	}
	for i, conn := range open {
		if err := exchangeLine(conn, fmt.Sprint(i)); err != nil {
			t.Fatalf("connection %d of %d in a full table: %v", i, len(open), err)
		}
	}
	for _, conn := range open[:128] {
		conn.Close()
	}
	v.awaitClosed()
	v.age(2 * time.Second) // closed flows may be spared from the second second on
	before := v.reason("flow_cut")
	v.sweep()
	for range 100 {
		if _, _, err := client.call("tcp", "10.96.0.1:80", "hello"); err != nil {
			t.Fatal(err)
		}
	}
	if v.reason("flow_cut") == before {
		t.Error("100 connections through a full table cut no closed flow short, or did not count it")
	}
	for i, conn := range open[128:] {
		if err := exchangeLine(conn, fmt.Sprint(i)); err != nil {
			t.Errorf("connection %d was lost: %v", i, err)
		}
	}
}

// One socket's datagrams to two Services with one endpoint are two flows, and the
// endpoint must not take them for one.
func TestOnePortToOneEndpointByTwoServices(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket})
	client, server := v.pod(), v.pod()
	server.serve("udp", 5353, "server")
	snapshot := webAndNames(server)
	other := serviceOf("other", model.UDP, 53, []string{"10.96.0.11"}, 5353, server.addresses()...)
	snapshot.Services = append(snapshot.Services[:3:3], other, snapshot.Services[3])
	v.open(snapshot)
	v.must(client.inside(func() error {
		conn, err := net.ListenPacket("udp4", ":0")
		if err != nil {
			return err
		}
		defer conn.Close()
		for range 3 {
			for _, address := range []string{"10.96.0.10:53", "10.96.0.11:53"} {
				to, _ := net.ResolveUDPAddr("udp", address)
				conn.SetDeadline(time.Now().Add(patience))
				if _, err := conn.WriteTo([]byte("?"), to); err != nil {
					return err
				}
				_, from, err := conn.ReadFrom(make([]byte, 64))
				if err != nil || from.String() != address {
					t.Errorf("sent to %s, answered by %v, %v", address, from, err)
				}
			}
		}
		return nil
	}))
}

// A pod that comes later is served as soon as its device is there; without the
// packet path nothing is left at any.
func TestPacketPathFollowsPods(t *testing.T) {
	v, _, server := twoPods(t)
	late := v.pod()
	if _, _, err := late.call("tcp", "10.96.0.1:80", "early"); err == nil {
		t.Error("a pod was served before its device was found")
	}
	v.become(webAndNames(server))
	for _, way := range ways {
		if _, _, err := late.call(way.network, way.address, "hello"); err != nil {
			t.Errorf("%s: %v", way.address, err)
		}
	}
	if n := len(v.layer.datapath.ports); n != 3 {
		t.Errorf("the packet path is at %d devices, want 3", n)
	}
	v.must(v.node.Delete(late.device))
	v.become(webAndNames(server))
	if n := len(v.layer.datapath.ports); n != 2 {
		t.Errorf("the packet path is at %d devices after one went, want 2", n)
	}
	pins, err := os.ReadDir(v.layer.settings.Pins)
	v.must(err)
	for _, pin := range pins {
		if device, _, ok := portOfHook(pin.Name()[min(len(linkPrefix), len(pin.Name())):]); ok && v.layer.datapath.ports[device].name == "" {
			t.Errorf("pin %s is of a device that is gone", pin.Name())
		}
	}
	v.age(25 * time.Hour)
	v.sweep()
	v.layer.settings.Path = PathSocket
	v.become(webAndNames(server))
	if n := len(v.layer.datapath.ports); n != 0 {
		t.Errorf("switched off, the packet path is still at %d devices", n)
	}
}

// Who serves is asked for by the Service and by the pod; what one path leaves
// alone the other serves.
func TestPathsAreChosenByServiceAndPod(t *testing.T) {
	for _, c := range []struct {
		setting      Path
		service, pod string
		packet       bool
	}{
		{PathSocket, "", "", false},
		{PathSocket, "packet", "", true},
		{PathSocket, "", "packet", true},
		{PathSocket, "socket", "packet", true},
		{PathSocket, "packet", "socket", true},
		{PathPacket, "", "", true},
		{PathPacket, "", "socket", false},
		{PathPacket, "socket", "", false},
		{PathPacket, "nonsense", "", true},
	} {
		t.Run(fmt.Sprintf("%s,%s,%s", c.setting, c.service, c.pod), func(t *testing.T) {
			v := newVillage(t, Settings{Path: c.setting, Node: "n1"})
			client, server := v.pod(), v.pod()
			server.serve("tcp", 8080, "server")
			server.serve("udp", 5353, "server")
			snapshot := webAndNames(server)
			for _, s := range snapshot.Services {
				s.Annotations = map[string]string{PathAnnotation: c.service}
			}
			snapshot.Pods = []*model.Pod{{Name: model.Name{Namespace: "default", Name: "client"}, Node: "n1",
				Annotations: map[string]string{PathAnnotation: c.pod}, Addresses: clientAddresses(client)}}
			stay := client.stay()
			defer stay()
			v.open(snapshot)
			for _, way := range ways {
				if line, _, err := client.call(way.network, way.address, "hello"); err != nil {
					t.Errorf("%s to %s: %q, %v", way.network, way.address, line, err)
				}
			}
			flows := 0
			if v.layer.datapath.packets {
				flows, _ = v.flows()
			}
			if (flows > 0) != c.packet {
				t.Errorf("%d flows on the packet path, want some: %v", flows, c.packet)
			}
			v.again(snapshot)
			snapshot.Pods = nil
			v.become(snapshot)
			if asks := v.have.(*Picture).asks; len(asks) != 0 {
				t.Errorf("%d namespaces still ask for a path after their pod is gone", len(asks))
			}
		})
	}
}

// again checks that applying again, also as a new process, changes nothing.
func (v *village) again(snapshot *model.Snapshot) {
	v.t.Helper()
	if left := v.layer.Diff(v.have, v.layer.Plan(snapshot), true); len(left) > 0 {
		v.t.Errorf("left to do after it was done: %v", left)
	}
	v.must(v.layer.Close())
	next := New(v.layer.settings)
	v.must(next.Open())
	v.layer = next
	var err error
	v.have, err = next.Read()
	v.must(err)
	if left := next.Diff(v.have, next.Plan(snapshot), true); len(left) > 0 {
		v.t.Errorf("a new process would change: %v", left)
	}
}

// The next process takes devices and flows over: streams do not notice.
func TestNextProcessTakesThePacketPathOver(t *testing.T) {
	v, client, server := twoPods(t)
	var conn net.Conn
	v.must(client.inside(func() (err error) {
		conn, err = net.Dial("tcp", "10.96.0.1:80")
		return err
	}))
	defer conn.Close()
	for i := range 5 {
		v.must(exchangeLine(conn, fmt.Sprint("before ", i)))
		v.again(webAndNames(server))
		v.must(exchangeLine(conn, fmt.Sprint("after ", i)))
	}
	v.must(v.layer.Close())
	v.must(exchangeLine(conn, "without a process"))
	removed, err := New(v.layer.settings).Remove()
	v.must(err)
	if err := exchangeWithin(time.Second, conn, "translated by nobody"); err == nil || errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after %d things were removed the stream ended with %v", len(removed), err)
	}
	v.layer = New(v.layer.settings)
	v.must(v.layer.Open())
	v.have, err = v.layer.Read()
	v.must(err)
}

// A question with its answer is over soon, and gives way at once in a full table:
// whoever asks for names does it from another port each time. Who goes on talking is
// remembered for longer.
func TestQuestionsGiveWay(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket, Flows: 256})
	client, server := v.pod(), v.pod()
	server.serve("udp", 5353, "server")
	v.open(webAndNames(server))
	talks, err := client.fromPort("udp", "10.96.0.10:53", 4000)
	v.must(err)
	defer talks.Close()
	v.must(exchangeLine(talks, "first"))
	v.age(2 * time.Second)
	v.must(exchangeLine(talks, "again"))
	for i := range 600 {
		if i%50 == 49 {
			v.age(2 * time.Second)
			v.sweep()
		}
		if _, _, err := client.call("udp", "10.96.0.10:53", "where?"); err != nil {
			t.Fatalf("question %d: %v; flows_full is %d", i, err, v.reason("flows_full"))
		}
	}
	v.age(31 * time.Second)
	v.sweep()
	// an answer that comes in another second makes a question look like a talk
	if counted, _ := v.flows(); counted > 60 {
		t.Errorf("31 s later there are %d flows of 600 questions", counted)
	}
	talk := datapathTuple{SourcePort: portOf(4000), DestinationPort: portOf(53), Protocol: protoUDP}
	talk.Source.Word, talk.Destination.Word = bpfmap.AddrWords(client.ip4), bpfmap.AddrWords(netip.MustParseAddr("10.96.0.10"))
	var flow datapathTranslation
	if err := v.layer.datapath.maps[datapathMapTranslations].Lookup(talk, &flow); err != nil {
		t.Errorf("the flow of who goes on talking: %v", err)
	}
}
