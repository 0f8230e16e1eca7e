package dns

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// FuzzFrame reads any bytes as a frame that waits, and answers with any others: what is
// given to a device is a whole frame to whom asked.
func FuzzFrame(f *testing.F) {
	query := asking(f, "www.example.com.", dnsmessage.TypeA, true)
	for _, ends := range [][2]netip.AddrPort{{client4, dns4}, {client6, dns6}} {
		frame := datagramOf(ends[0], ends[1], query)
		f.Add(frame, answerWith(query, elsewhere))
		f.Add(frame, append(answerWith(query, elsewhere), make([]byte, 1300)...))
		f.Add(frame[:len(frame)-1], []byte(nil))
	}
	f.Fuzz(func(t *testing.T, taken, reply []byte) {
		q, err := readFrame(bytes.Clone(taken))
		if err != nil {
			return
		}
		from := q.from()
		if len(q.message()) < headerLength || !from.IsValid() {
			t.Fatalf("a query of %d bytes from %s", len(q.message()), from)
		}
		_, to := q.addresses()
		server, _ := netip.AddrFromSlice(to)
		port := binary.BigEndian.Uint16(q.bytes[q.udp+2:])
		if answer := q.answer(reply); answer != nil {
			message := answer[q.udp+udpLength:]
			if len(message) > mostAnswer || !bytes.Equal(message[:2], q.message()[:2]) || message[2]&0x80 == 0 {
				t.Fatalf("%x is answered with %x", q.message(), message)
			}
			isWhole(t, answer, q.udp, netip.AddrPortFrom(server, port), from)
		}
		again := q.again()
		if !bytes.Equal(again[:q.udp+6], taken[:q.udp+6]) || !bytes.Equal(again[q.udp+8:], taken[q.udp+8:]) {
			t.Fatalf("%x came back as %x", taken, again)
		}
	})
}

// isWhole checks lengths, ends and checksums of a frame that is to lead from one end to
// the other.
func isWhole(t *testing.T, frame []byte, udp int, from, to netip.AddrPort) {
	t.Helper()
	want := datagramOf(from, to, frame[udp+udpLength:])
	if udp == ethernetLength+ip4Length {
		copy(want[ethernetLength+4:], []byte{0, 0, 0x40, 0})
		copy(want[ethernetLength+10:], []byte{0, 0})
		binary.BigEndian.PutUint16(want[ethernetLength+10:], ^sum16(0, want[ethernetLength:udp]))
	}
	if !bytes.Equal(frame[ethernetLength:], want[ethernetLength:]) {
		t.Fatalf("the answer is\n%x, not\n%x", frame, want)
	}
}

// What a client does not take is cut, and says so.
func TestAnswersThatAreTooLong(t *testing.T) {
	for _, row := range []struct {
		what               string
		edns, size, length int
		cut                bool
	}{
		{"without EDNS, 512 bytes", 0, 0, 512, false},
		{"without EDNS, 513 bytes", 0, 0, 513, true},
		{"EDNS of 1,000, 1,000 bytes", 1, 1000, 1000, false},
		{"EDNS of 1,000, 1,001 bytes", 1, 1000, 1001, true},
		{"EDNS of 100, 512 bytes", 1, 100, 512, false},
		{"EDNS of 4,096, 1,232 bytes", 1, 4096, 1232, false},
		{"EDNS of 4,096, 1,233 bytes", 1, 4096, 1233, true},
	} {
		query := asking(t, "www.example.com.", dnsmessage.TypeA, row.edns > 0)
		if row.edns > 0 {
			binary.BigEndian.PutUint16(query[len(query)-8:], uint16(row.size))
		}
		reply := answerWith(query, elsewhere)
		reply = append(reply, make([]byte, row.length-len(reply))...)
		reply[0] = ^reply[0] // a resolver may have asked with another id
		got := fitting(query, reply)
		var m dnsmessage.Parser
		header, err := m.Start(got)
		if err != nil || header.Truncated != row.cut || header.ID != 0xbeef || (row.cut && got[7] != 0) || (!row.cut && len(got) != row.length) {
			t.Errorf("%s: %v, %v, %d bytes", row.what, header, err, len(got))
		}
		if row.cut && row.edns > 0 {
			var whole dnsmessage.Message
			if err := whole.Unpack(got); err != nil || len(whole.Additionals) != 1 {
				t.Errorf("%s: %v, %v", row.what, whole, err)
			}
		}
	}
	query := asking(t, "www.example.com.", dnsmessage.TypeA, false)
	for what, reply := range map[string][]byte{
		"nothing": nil, "a query": query, "the answer to another question": answerWith(asking(t, "wwx.example.com.", dnsmessage.TypeA, false), elsewhere),
		"a header": answerWith(query, elsewhere)[:12],
	} {
		if got := fitting(query, reply); got != nil {
			t.Errorf("%s is taken for a reply: %x", what, got)
		}
	}
}

// The program hands up what is a query, and nothing else: it and this reading of the rules
// agree on random messages with random faults.
func TestWhatIsHandedUp(t *testing.T) {
	p := attended(t)
	random := rand.New(rand.NewPCG(3, 5))
	handed := 0
	for range 20_000 {
		query := arbitraryQuery(random, p.mirror)
		if random.IntN(4) == 0 {
			query = append(query, make([]byte, random.IntN(400))...)
		}
		if p.handsUp(query) {
			handed++
		}
	}
	if t.Logf("%d of 20,000 were handed up", handed); handed < 2000 || handed > 18_000 {
		t.Error("the test is blind")
	}
}

// FuzzHandUp does so with any bytes.
func FuzzHandUp(f *testing.F) {
	p := attended(f)
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		f.Add(arbitraryQuery(random, p.mirror))
	}
	f.Fuzz(func(t *testing.T, query []byte) {
		if len(query) > 1400 {
			return
		}
		p.t = t
		p.handsUp(query)
	})
}

// attended has somebody there for the program, and no pace to keep.
func attended(t testing.TB) *loaded {
	t.Helper()
	p := load(t, town(), func(spec *ebpf.CollectionSpec) {
		must(t, spec.Variables[datapathVarPace].Set(uint64(1)))
		must(t, spec.Variables[datapathVarPaceAll].Set(uint64(1)))
	})
	d := p.layer.host.(*datapath)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	must(t, d.Maps[datapathMapAgents].Put(uint32(0), uint64(fd)))
	p.calls, err = ringbuf.NewReader(d.Maps[datapathMapCalls])
	must(t, err)
	t.Cleanup(func() { p.calls.Close() })
	return p
}

// handsUp gives the program a query over both transports and says whether it was handed
// up, which it has to be exactly if the rules say so.
func (p *loaded) handsUp(query []byte) bool {
	p.t.Helper()
	outcome := p.mirror.decide(query).outcome
	left := outcome == datapathOutcomeOUTCOME_NOT_PLAIN || outcome == datapathOutcomeOUTCOME_NOT_OURS || outcome == datapathOutcomeOUTCOME_LEFT
	// a header with one question, RD, AD and CD at most, and room for a name, type and class
	plain := len(query) >= 17 && query[2]&^1 == 0 && query[3]&^0x30 == 0 && bytes.Equal(query[4:10], []byte{0, 1, 0, 0, 0, 0}) && query[10] == 0 && query[11] <= 1
	if !left || !plain || len(query) > 416-54-8 {
		p.ask(query)
		return false
	}
	waiting := p.layer.host.(*datapath).Maps[datapathMapWaiting]
	some := false
	for _, ends := range [][2]netip.AddrPort{{client4, dns4}, {client6, dns6}} {
		frame := datagramOf(ends[0], ends[1], query)
		if len(frame) > 416 {
			continue
		}
		before := p.count(datapathOutcomeOUTCOME_HANDED)
		verdict, after := p.run(frame)
		seats := keys[datapathSeat](waiting)
		if verdict != redirected || p.count(datapathOutcomeOUTCOME_HANDED) != before+1 || len(seats) != 1 || !bytes.Equal(after[12:14], []byte{8, 6}) {
			p.t.Fatalf("%x: to be handed up; verdict %d, %v wait, %v", query, int32(verdict), seats, p.counts())
		}
		record, err := p.calls.Read()
		must(p.t, err)
		if seat, ok := readSeat(record.RawSample); !ok || seat != seats[0] || seat.Device != 1 {
			p.t.Fatalf("called for %v, and %v waits", seat, seats)
		}
		var taken datapathHanded
		must(p.t, waiting.Lookup(seats[0], &taken))
		f, err := readFrame(taken.Frame[:taken.Length])
		if err != nil || !bytes.Equal(f.bytes, frame) || f.from() != ends[0] || !bytes.Equal(f.message(), query) {
			p.t.Fatalf("%x: there waits %x, %v", frame, f.bytes, err)
		}
		must(p.t, waiting.Delete(seats[0]))
		some = true
	}
	return some
}
