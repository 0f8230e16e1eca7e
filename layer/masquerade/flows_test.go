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
	m := p.layer.host.(*datapath).Maps[datapathMapFlows]
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

// Who begins handshakes and never finishes them has them kept for minutes, not hours, and
// they give way.
func TestHalfOpenHandshakes(t *testing.T) {
	p := loadSmall(t, 64)
	for port := range uint16(200) {
		p.run(datapathProgMasqFromWire, packetOf(of(tcp, "203.0.113.66", 5000+port, pod4, 80), nil))
		p.run(datapathProgMasqToWire, packetOf(of(tcp, pod4, 80, "203.0.113.66", 5000+port), nil, 0x12))
		if port == 0 {
			p.older(200)
			if alive := p.swept(); alive != 1 {
				t.Errorf("after 200 seconds %d of one half-open connection are there", alive)
			}
			p.older(100)
			if alive := p.swept(); alive != 0 {
				t.Errorf("after 300 seconds %d half-open connections are there", alive)
			}
		}
	}
	p.older(5)
	if word, _ := p.became(datapathProgMasqToWire, packetOf(of(tcp, pod4, 40000, world4, 443), nil)); word != "translated cutbegun" && word != "translated beguncut" {
		t.Errorf("a new connection beside half-open ones: %s", word)
	}
}

// open opens a connection, and returns what it is outside.
func (p *loaded) open(is flow) (out flow) {
	p.t.Helper()
	syn := packetOf(is, nil)
	_, after := p.run(datapathProgMasqToWire, syn)
	out = p.ours(syn, after, false)
	p.run(datapathProgMasqFromWire, packetOf(out.reversed(), nil, 0x12))
	p.run(datapathProgMasqToWire, packetOf(is, nil, 0x10))
	return out
}

// A reset from outside, which anybody can forge, ends no connection that is open: its next
// packet has the same port. The pod's own does.
func TestForgedResets(t *testing.T) {
	p := load(t)
	is := of(tcp, pod4, 40000, world4, 443)
	out := p.open(is)
	p.older(7000)
	if alive := p.swept(); alive != 1 {
		t.Errorf("of an open connection that is silent for 7000 seconds %d are there", alive)
	}
	p.run(datapathProgMasqFromWire, packetOf(out.reversed(), nil, 0x04))
	p.older(100)
	p.swept()
	data := packetOf(is, nil, 0x10)
	word, after := p.became(datapathProgMasqToWire, data)
	if again := p.ours(data, after, false); again != out || word != "translated " {
		t.Errorf("behind a reset from outside %v is %v: %s", out, again, word)
	}
	p.run(datapathProgMasqToWire, packetOf(is, nil, 0x04))
	p.older(11)
	if alive := p.swept(); alive != 0 {
		t.Errorf("behind the pod's reset %d are there", alive)
	}
	is = of(tcp, pod4, 40001, world4, 443)
	syn := packetOf(is, nil)
	_, after = p.run(datapathProgMasqToWire, syn)
	p.run(datapathProgMasqFromWire, packetOf(p.ours(syn, after, false).reversed(), nil, 0x14))
	p.older(11)
	if alive := p.swept(); alive != 0 {
		t.Errorf("of a connection that was refused %d are there", alive)
	}
}

// Datagrams and pings from outside alone keep no port open; the pod's own do.
func TestOutsideAloneKeepsNoPort(t *testing.T) {
	p := load(t)
	for _, is := range []flow{of(udp, pod4, 8080, world4, 9999), of(icmp4, pod4, 77, world4, 0)} {
		frame := packetOf(is, nil)
		_, after := p.run(datapathProgMasqToWire, frame)
		out := p.ours(frame, after, false)
		for _, pod := range []bool{true, false} {
			for range 5 {
				p.older(40)
				if pod {
					p.run(datapathProgMasqToWire, frame)
				}
				p.run(datapathProgMasqFromWire, packetOf(out.reversed(), nil))
				p.swept()
			}
			word, _ := p.became(datapathProgMasqFromWire, packetOf(out.reversed(), nil))
			if want := map[bool]string{true: "translated ", false: "untouched "}[pod]; word != want {
				t.Errorf("%v after 200 seconds, the pod spoke %v: %s", is, pod, word)
			}
		}
	}
}

// One pod that fills the table with datagrams that nobody answers keeps no other out.
func TestOnePodKeepsNobodyOut(t *testing.T) {
	p := loadSmall(t, 1024)
	is := of(tcp, "10.244.1.9", 40000, world4, 443)
	out := p.open(is)
	for port := range uint16(4096) {
		p.run(datapathProgMasqToWire, packetOf(of(udp, pod4, 10000+port, "203.0.113.9", 9), nil))
	}
	refused := 0
	for port := range uint16(50) {
		_, after := p.became(datapathProgMasqToWire, packetOf(of(tcp, "10.244.1.8", 40000+port, world4, 443), nil))
		if h, _ := readHeader(after, ethernet, false); h.from != address(node4) {
			refused++
		}
	}
	if refused > 0 {
		t.Errorf("%d of another pod's 50 connections were refused: %v", refused, counted(t, p.layer))
	}
	if word, after := p.became(datapathProgMasqToWire, packetOf(is, nil, 0x10)); word != "translated " || p.ours(packetOf(is, nil, 0x10), after, false) != out {
		t.Errorf("a connection that was open: %s", word)
	}
}

// A pod that sends ICMP errors about another pod's flow, or about its own to who is not in
// it, gets no packet out with its own address.
func TestErrorsOfNeighbours(t *testing.T) {
	p := load(t)
	frame := packetOf(of(udp, pod4, 40000, world4, 5060), nil)
	_, after := p.run(datapathProgMasqToWire, frame)
	out := p.ours(frame, after, false)
	_, answer := p.run(datapathProgMasqFromWire, packetOf(out.reversed(), make([]byte, 30)))
	for _, row := range []struct{ from, to, want string }{
		{pod4, world4, "translated "},
		{node4, world4, "translated "},
		{"10.244.1.8", world4, "dropped stray"},
		{pod4, "203.0.113.200", "dropped stray"},
		{node4, "203.0.113.200", "dropped stray"},
	} {
		told := errorAbout(answer, false, address(row.from), address(row.to), 3, 4, 600)
		if word, _ := p.became(datapathProgMasqToWire, told); word != row.want {
			t.Errorf("an error of %s to %s: %s, not %s", row.from, row.to, word, row.want)
		}
	}
}
