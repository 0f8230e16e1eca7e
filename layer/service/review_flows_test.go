package service

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/model"
)

// masqueradesFit checks that there are two entries for each flow to the other node,
// and no more.
func (h *harbour) masqueradesFit(when string) {
	h.t.Helper()
	far := 0
	var key datapathTuple
	var value datapathTranslation
	entries := h.layer.datapath.maps[datapathMapTranslations].Iterate()
	for entries.Next(&key, &value) {
		if at := bpfmap.AddrOf(value.To.Destination.Word).String(); at == farPod4 || at == farPod6 {
			far++
		}
	}
	h.must(entries.Err())
	if n := h.masqueraded(); n != 2*far {
		h.t.Errorf("%s there are %d masquerades for %d flows to the other node", when, n, far)
	}
}

// A client that comes again from the same port, after the end and after its endpoint
// went, is served by whoever is there, and what was remembered before is forgotten.
func TestClientsComeAgainFromTheSamePort(t *testing.T) {
	h := newHarbour(t)
	h.local.serveAll("local")
	h.other.serveAll("far")
	clusters := []*model.Snapshot{
		h.services(nil, h.local), h.services(nil, h.other), h.services(nil, h.local, h.other),
		h.services(func(s *model.Service) { s.ExternalLocal = true }, h.local, h.other),
	}
	h.open(clusters[2])
	random := rand.New(rand.NewPCG(seedOf(t), 0))
	for i := range 60 {
		way := entrances[random.IntN(4)]
		conn, err := h.client.fromPort(way.network, way.address, 4000+random.IntN(2)*32000)
		if err != nil {
			t.Fatalf("round %d, %s to %s: %v", i, way.network, way.address, err)
		}
		if err := exchangeWithin(3*time.Second, conn, fmt.Sprint("round ", i)); err != nil {
			t.Fatalf("round %d, %s to %s: %v", i, way.network, way.address, err)
		}
		if random.IntN(2) == 0 { // the endpoint goes, or another comes, while it is open
			h.become(clusters[random.IntN(len(clusters))])
			if way.network == "udp" {
				if err := exchangeWithin(3*time.Second, conn, fmt.Sprint("after a change in round ", i)); err != nil {
					t.Fatalf("round %d, %s to %s: %v", i, way.network, way.address, err)
				}
			}
		}
		hangUp(conn)
		h.masqueradesFit(fmt.Sprintf("after round %d", i))
		h.whole(fmt.Sprintf("after round %d", i))
	}
	h.age(90000 * time.Second)
	h.sweep()
	if n := h.masqueraded(); n != 0 {
		t.Errorf("%d masquerades are left when all is over", n)
	}
}

// serves checks that the node's entrances lead to the pod here and to the other node's,
// with datagrams and streams of so many bytes, three times each.
func (h *harbour) serves(datagram, stream int) {
	h.t.Helper()
	for _, server := range []*pod{h.local, h.other} {
		h.become(h.services(nil, server))
		for _, way := range entrances[:4] {
			text := long(way.network, datagram, stream)
			for range 3 {
				if line, rest, err := h.client.call(way.network, way.address, text); err != nil || rest != text {
					h.t.Errorf("%s to %s: %q, %d of %d bytes, %v\n%s", way.network, way.address, line, len(rest), len(text), err, h.ruleset())
				}
			}
		}
	}
}

// Where connections are tracked the node puts fragments together and takes them apart
// again, between our programs; and drops what it calls invalid, if it is told to.
func TestWireBesideConntrack(t *testing.T) {
	h := newHarbour(t)
	h.rules(`table inet k { chain f { type filter hook forward priority 0; ct state invalid counter drop; ct state established,related accept; }
		chain i { type filter hook input priority 0; ct state invalid counter drop; }
		chain s { type nat hook postrouting priority 100; }
		}`)
	h.local.serveAll("local")
	h.other.serveAll("far")
	h.open(h.services(nil, h.local))
	h.serves(20000, 1<<18)
	if rules := h.ruleset(); strings.Count(rules, "packets 0 bytes 0") != 2 {
		t.Errorf("packets were called invalid:\n%s", rules)
	}
}

// A pod of the node asks a node port of its node, by its sockets and by its packets,
// and a process of the node does.
func TestNodePortsFromTheNode(t *testing.T) {
	for _, path := range []Path{PathSocket, PathPacket} {
		t.Run(string(path), func(t *testing.T) {
			h := newHarbour(t)
			h.layer.settings.Path = path
			h.other.serveAll("far")
			h.routes(h.other.netns, client4+"/32", nodeToOther, client6+"/128", nodeToOther6)
			h.open(h.services(func(s *model.Service) { s.ExternalLocal = true }, h.other))
			for _, way := range entrances[:6] {
				line, _, err := h.local.call(way.network, way.address, "hello")
				if err != nil || !strings.HasPrefix(line, "far ") {
					t.Errorf("a pod to %s %s: %q, %v", way.network, way.address, line, err)
				}
			}
			node := &pod{v: h.village, netns: h.NetNS}
			for _, address := range []string{"127.0.0.1:30080", nodeToClient + ":30080", nodeToOther + ":30080", "[" + nodeToOther6 + "]:30080"} {
				line, _, err := node.call("tcp", address, "hello")
				if err != nil || !strings.HasPrefix(line, "far ") {
					t.Errorf("the node to %s: %q, %v", address, line, err)
				}
			}
			if n := h.masqueraded(); n != 0 {
				t.Errorf("%d masquerades of clients on the node", n)
			}
		})
	}
}

// Beside a plug-in that masquerades what goes to other nodes' pods from outside
// (flannel's FLANNEL-POSTRTG, here in nftables), connection tracking gives the client
// another address before ours would: every entry works, and answers come from it.
func TestWireBesideAPluginThatMasquerades(t *testing.T) {
	h := newHarbour(t)
	h.rules(`table inet flannel { chain postrtg { type nat hook postrouting priority 100;
		ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 return
		ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return
		ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 counter masquerade fully-random
		ip6 saddr != fd00:244::/32 ip6 daddr fd00:244:2::/48 masquerade fully-random
		}
		}`)
	h.local.serveAll("local")
	h.other.serveAll("far")
	h.open(h.services(nil, h.local))
	h.serves(3000, 3000)
	if strings.Contains(h.ruleset(), "packets 0 bytes 0") {
		t.Errorf("nothing was masqueraded by the plug-in:\n%s", h.ruleset())
	}
}
