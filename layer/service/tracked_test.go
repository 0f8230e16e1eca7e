package service

import (
	"fmt"
	"testing"
	"unsafe"
)

// Somebody else masquerades connections towards the same endpoints, as kube-proxy does
// before it is removed: a port of the node that one of them has is not given again.
func TestAPortThatIsTrackedIsNotGiven(t *testing.T) {
	h := newHarbour(t)
	h.rules(`table inet other { chain postrouting { type nat hook postrouting priority 100;
		ip daddr 10.244.2.0/24 tcp sport 4000 masquerade to :65534
		ip daddr 10.244.2.0/24 udp sport 4000 masquerade to :65534
		ip6 daddr fd00:244:2::/64 tcp sport 4000 masquerade to :65534
		ip6 daddr fd00:244:2::/64 udp sport 4000 masquerade to :65534
		}
		}`)
	h.routes(h.client.netns, farPod4+"/32", nodeToClient, farPod6+"/128", nodeToClient6)
	h.sysctl(h.NetNS, "net.ipv4.ip_local_port_range", "1024 65533") // two ports are left for others
	h.other.serveAll("far")
	h.open(h.services(nil, h.other))
	for _, way := range []struct{ network, endpoint, entrance string }{
		{"tcp", farPod4 + ":8080", nodeToClient + ":30080"},
		{"tcp", "[" + farPod6 + "]:8080", "[" + nodeToClient6 + "]:30080"},
		{"udp", farPod4 + ":5353", nodeToClient + ":30053"},
		{"udp", "[" + farPod6 + "]:5353", "[" + nodeToClient6 + "]:30053"},
	} {
		theirs, err := h.client.fromPort(way.network, way.endpoint, 4000)
		h.must(err)
		defer theirs.Close()
		h.must(exchangeLine(theirs, "before"))
		ours, err := h.client.fromPort(way.network, way.entrance, 65534)
		if err != nil {
			t.Fatalf("%s %s: %v", way.network, way.entrance, err)
		}
		defer ours.Close()
		for i := range 3 {
			if err := exchangeLine(ours, fmt.Sprint("ours ", i)); err != nil {
				t.Fatalf("%s %s: %v", way.network, way.entrance, err)
			}
			if err := exchangeLine(theirs, fmt.Sprint("theirs ", i)); err != nil {
				t.Fatalf("%s %s, which was there before: %v", way.network, way.endpoint, err)
			}
		}
	}
	if n := h.reason("no_port"); n > 0 {
		t.Errorf("%d flows found no port", n)
	}
}

// BenchmarkAskConntrack is what a new masqueraded flow pays for each port that is tried,
// as the kernel measures it; and what a start of the agent pays to find out.
func BenchmarkAskConntrack(b *testing.B) {
	program, err := loadAsker()
	if err != nil {
		b.Skip("needs root, and a kernel that can be asked: ", err)
	}
	defer program.Close()
	frame := make([]byte, ethernetLength+int(unsafe.Sizeof(datapathTuple{})))
	_, took, err := program.Benchmark(frame, 1_000_000, nil)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		again, err := loadAsker()
		if err != nil {
			b.Fatal(err)
		}
		again.Close()
	}
	b.ReportMetric(float64(took.Nanoseconds()), "ns/question")
}
