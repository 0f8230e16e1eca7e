package masquerade

import (
	"testing"

	"github.com/cilium/ebpf"
)

// loadSmall is a node with room for so many flows.
func loadSmall(t *testing.T, flows int) *loaded {
	is := newIsland(t)
	is.settings.Flows = flows
	return is.load()
}

// older lets all flows be silent for so many seconds; it says how many entries there are.
func (p *loaded) older(seconds uint32) (entries int) {
	p.t.Helper()
	m := p.layer.host.(*datapath).maps[datapathMapFlows]
	all := map[datapathTuple]datapathFlow{}
	var key datapathTuple
	var value datapathFlow
	found := m.Iterate()
	for found.Next(&key, &value) {
		all[key] = value
	}
	must(p.t, found.Err())
	for key, value := range all {
		value.Seen -= seconds
		must(p.t, m.Update(key, value, ebpf.UpdateExist))
	}
	return len(all)
}

func (p *loaded) swept() (alive int) {
	p.t.Helper()
	alive, err := p.layer.host.sweep()
	must(p.t, err)
	return alive
}

// A flow that ends and begins again, however often, has one place: others find the rest.
func TestOnePlaceForAFlow(t *testing.T) {
	p := loadSmall(t, 64)
	frame := packetOf(of(udp, pod4, 40000, world4, 5060), nil)
	var after []byte
	for range 600 {
		p.older(1000)
		p.swept()
		_, after = p.run(datapathProgMasqToWire, frame)
	}
	out := p.ours(frame, after, false)
	for range 3 { // it lives
		p.older(5)
		p.run(datapathProgMasqFromWire, packetOf(out.reversed(), nil))
		p.run(datapathProgMasqToWire, frame)
	}
	if entries, alive := p.older(0), p.swept(); entries != 2 || alive != 1 {
		t.Errorf("one flow has %d entries, and sweep finds %d", entries, alive)
	}
	for port := range uint16(20) {
		if word, _ := p.became(datapathProgMasqToWire, packetOf(of(tcp, "10.244.1.8", 40000+port, world4, 443), nil)); word != "translated begun" {
			t.Errorf("another pod's new connection, with one flow in a table of 64: %s", word)
		}
	}
}
