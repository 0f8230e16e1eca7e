package agent

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// town is a snapshot with pods at 10.1.*.*, a Service, a node and a pod elsewhere behind it.
func town(pods int) *model.Snapshot {
	s := &model.Snapshot{
		Nodes: []*model.Node{{Name: "worker-2", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.2")}}},
		Services: []*model.Service{{Name: model.Name{Namespace: "shop", Name: "db"}, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.5")},
			Ports: []model.ServicePort{{Backends: []model.Backend{{Address: netip.MustParseAddrPort("10.2.0.9:5432"), Pod: model.Name{Namespace: "shop", Name: "db-0"}}}}}}},
	}
	for i := range pods {
		s.Pods = append(s.Pods, &model.Pod{Name: model.Name{Namespace: "shop", Name: fmt.Sprintf("web-%d", i)}, Addresses: []netip.Addr{townPod(i)}})
	}
	return s
}

func townPod(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}) }

var db = netip.MustParseAddrPort("10.96.0.5:5432")

// sum adds up the counts of all pairs, and finds one.
func sum(all []*pairFlow, client string) (total, one pairFlow, pairs int) {
	for _, p := range all {
		total.plus(p)
		if p.client == client {
			one = *p
		}
		if p.named {
			pairs++
		}
	}
	return total, one, pairs
}

// Of however many pairs there are a bounded number is named: those in trouble, and those
// that say the most. No count is lost, and none ever falls, whatever comes to be named
// and whatever the kernel forgets.
func TestFlowsOfPairs(t *testing.T) {
	const many = 3 * pairsMost
	of := town(many)
	clock := time.Unix(1000, 0)
	f := newFlows(newSpaces())
	f.now = func() time.Time { return clock }
	f.sockets = func([]*model.Pod) map[flowKey]*flowNow { return nil }
	var flows []layer.Flow
	for i := range many {
		flows = append(flows, layer.Flow{Space: uint32(i), Client: townPod(i), Server: db, OfClient: true, Ended: 10, Sent: uint64(1000 * (i + 1)), Received: 1})
	}
	flows[3] = layer.Flow{Space: 3, Client: townPod(3), Server: db, OfClient: true, Ended: 8, Refused: 8}
	all := f.add(flows, of)
	total, refused, pairs := sum(all, "shop/web-3")
	if pairs != pairsMost || len(all) != pairsMost+1 || total.ended[endedRefused] != 8 || total.ended[endedOK] != 10*(many-1) || total.received != many-1 {
		t.Errorf("%d pairs named, %d told, %+v", pairs, len(all), total)
	}
	if !refused.named || refused.server != "shop/service/db" || refused.ended[endedRefused] != 8 {
		t.Errorf("the one that is refused: %+v", refused)
	}
	if _, quiet, _ := sum(all, "shop/web-0"); quiet.named {
		t.Error("the one that says the least is named")
	}
	most := fmt.Sprintf("shop/web-%d", many-1)
	before := map[pair]pairFlow{}
	for _, p := range all {
		before[p.pair] = *p
	}
	var came uint64
	for round := range 5 {
		clock = clock.Add(time.Minute)
		flows[0].Sent += 1 << 30 // it comes to matter
		flows[many-1].Sent = 5   // it was forgotten
		all = f.add(flows, of)
		for _, p := range all {
			if was := before[p.pair]; p.sent < was.sent || p.ended[endedOK] < was.ended[endedOK] {
				t.Errorf("round %d: %v had sent %d, and now %d", round, p.pair, was.sent, p.sent)
			}
			came += p.sent - before[p.pair].sent
			before[p.pair] = *p
		}
	}
	if _, loud, _ := sum(all, "shop/web-0"); !loud.named || came != 5<<30 {
		t.Errorf("the one that came to matter: %+v; %d came, not %d", loud, came, uint64(5)<<30)
	}
	if _, big, _ := sum(all, most); big.sent != 1000*many {
		t.Errorf("the one that the kernel forgot: %+v", big)
	}
}

// Open connections are counted with those that have ended, each once.
func TestFlowsThatAreOpen(t *testing.T) {
	clock := time.Unix(1000, 0)
	f := newFlows(newSpaces())
	f.now = func() time.Time { clock = clock.Add(flowsRest); return clock }
	key := flowKey{7, townPod(0), netip.MustParseAddrPort("10.2.0.9:5432"), true}
	open := map[flowKey]*flowNow{key: {Flow: layer.Flow{Sent: 100}, open: 3, stalled: 1, rtt: time.Millisecond}}
	f.sockets = func([]*model.Pod) map[flowKey]*flowNow { return open }
	f.add([]layer.Flow{{}}, town(1))
	open = nil // all have ended
	all := f.add([]layer.Flow{{Space: 7, Client: key.client, Server: key.server, OfClient: true, Ended: 3, Sent: 150}}, town(1))
	_, one, _ := sum(all, "shop/web-0")
	if one.sent != 150 || one.ended[endedOK] != 3 || one.open != 0 || one.server != "shop/db-0" {
		t.Errorf("%+v", one)
	}
}

// A connection that ends is counted once, whenever it does so: between two of those who ask
// within a moment, and between what has ended is read and what is open. What the kernel
// forgets is counted from the beginning.
func TestFlowsThatEndMeanwhile(t *testing.T) {
	const size = 1 << 30
	key := flowKey{7, townPod(0), netip.MustParseAddrPort("10.2.0.9:5432"), true}
	type reading struct {
		after       time.Duration
		ended, sent uint64 // of those that have ended
		open        uint64 // what the one that is open has sent
		want        uint64
	}
	for what, readings := range map[string][]reading{
		"between two who ask": {
			{0, 0, 0, size, size}, {time.Second, 1, size, 0, size}, {flowsRest, 1, size, 0, size},
		},
		"while it is read, the first": {
			{0, 0, 0, size, size}, {flowsRest, 0, 0, 0, size}, {flowsRest, 1, size, 0, size}, {flowsRest, 1, size + 5, 0, size + 5},
		},
		"while it is read, not the first": {
			{0, 3, 100, size, size + 100}, {flowsRest, 3, 100, 0, size + 100}, {flowsRest, 4, 100 + size, 7, size + 107},
		},
		"forgotten": {
			{0, 3, 100, 0, 100}, {flowsRest, 1, 20, 0, 100}, {flowsRest, 2, 30, 0, 110},
		},
		"never told": { // the kernel had no room for it
			{0, 3, 100, size, size + 100}, {flowsRest, 3, 100, 0, size + 100}, {flowsRest, 3, 100, 0, size + 100},
			{flowsRest, 3, 100, 0, size + 100}, {flowsRest, 4, 150, 0, size + 150},
		},
	} {
		clock := time.Unix(1000, 0)
		f := newFlows(newSpaces())
		f.now = func() time.Time { return clock }
		for i, r := range readings {
			clock = clock.Add(r.after)
			f.sockets = func([]*model.Pod) map[flowKey]*flowNow {
				if r.open == 0 {
					return nil
				}
				return map[flowKey]*flowNow{key: {Flow: layer.Flow{Sent: r.open}, open: 1}}
			}
			ended := []layer.Flow{{Space: 7, Client: key.client, Server: key.server, OfClient: true, Ended: r.ended, Sent: r.sent}}
			if r.ended == 0 {
				ended = []layer.Flow{{}}
			}
			if _, one, _ := sum(f.add(ended, town(1)), "shop/web-0"); one.sent != r.want {
				t.Errorf("%s, reading %d: %d sent, not %d", what, i, one.sent, r.want)
			}
		}
	}
}

// What this process has open is found, at both ends, and Prometheus gets it.
func TestOpenFlowsOfThisProcess(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	other, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := conn.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(other, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(listener.Addr().String())
	found := openFlows(map[uint32]string{ownSpace(): ""})
	client, server := found[flowKey{ownSpace(), at.Addr(), at, true}], found[flowKey{ownSpace(), at.Addr(), at, false}]
	if client == nil || server == nil || client.open != 1 || server.Received < 1000 {
		t.Fatalf("client %+v, server %+v", client, server)
	}
	f := newFlows(newSpaces())
	f.sockets = func([]*model.Pod) map[flowKey]*flowNow {
		return map[flowKey]*flowNow{{1, townPod(0), db, true}: client, {1, townPod(1), db, false}: server}
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector(func(into chan<- prometheus.Metric) {
		for _, p := range f.add([]layer.Flow{{}}, town(2)) {
			p.collect(into)
		}
	}))
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, family := range families {
		for _, m := range family.Metric {
			fmt.Fprintln(&text, family.GetName(), m)
		}
	}
	for _, want := range []string{"millrace_flow_bytes_total", "millrace_flow_connections_open", "millrace_flow_rtt_seconds", `"service/db"`, `"web-0"`, `"client"`, `"server"`} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %s in:\n%s", want, text.String())
		}
	}
}

type collector func(chan<- prometheus.Metric)

func (c collector) Describe(chan<- *prometheus.Desc)      {}
func (c collector) Collect(into chan<- prometheus.Metric) { c(into) }
