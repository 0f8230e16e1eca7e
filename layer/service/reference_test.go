package service

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// reading is what a frame says, as bpf/packet.h promises to read it: a second
// opinion in another language. Fields that have no meaning in a shape are zero.
type reading struct {
	shape              datapathShape
	from, to           netip.AddrPort
	protocol           uint8
	outerFrom, outerTo netip.Addr
	fragment           uint32
	network, transport uint16
	outerNetwork, icmp uint16
	ip4                bool
	flags              uint8
	padding            [5]uint8 // of the C structs; zero, for tuples are keys
}

// ipHeader is an IP header and all its extensions.
type ipHeader struct {
	from, to      netip.Addr
	protocol      uint8
	fragment      uint32
	later, more   bool
	payload, here int
}

const (
	mostExtensions = 8
	farthestHeader = 1024
)

// readIP reads the header of version 4 or 6 at an offset; ok is false for what
// is cut off or not well-formed. Lengths that the header claims of the payload
// are the stack's to check.
func readIP(f []byte, at, version int) (h ipHeader, ok bool) {
	h.here = at
	if version == 4 {
		return readIP4(f, h)
	}
	return readIP6(f, h)
}

// readIP4 reads RFC 791, 3.1.
func readIP4(f []byte, h ipHeader) (ipHeader, bool) {
	b := f[min(h.here, len(f)):]
	if len(b) < 20 || b[0]>>4 != 4 || b[0]&15 < 5 {
		return h, false
	}
	bits := binary.BigEndian.Uint16(b[6:])
	h.from, h.to = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	h.protocol, h.later, h.more = b[9], bits&0x1fff != 0, bits&0x2000 != 0
	h.fragment = uint32(binary.LittleEndian.Uint16(b[4:])) // as it lies in memory
	h.payload = h.here + 4*int(b[0]&15)
	return h, h.payload <= len(f)
}

// readIP6 reads RFC 8200, 3 and 4, and the length of RFC 4302, 2.2.
func readIP6(f []byte, h ipHeader) (ipHeader, bool) {
	b := f[min(h.here, len(f)):]
	if len(b) < 40 || b[0]>>4 != 6 {
		return h, false
	}
	h.from, h.to = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	h.protocol, h.payload = b[6], h.here+40
	for range mostExtensions {
		if !slices.Contains([]uint8{protoHopByHop, protoRouting, protoFragment, protoAuth, protoDestination}, h.protocol) || h.later {
			break
		}
		if h.payload > farthestHeader || h.payload+8 > len(f) {
			return h, false
		}
		e := f[h.payload:]
		switch h.protocol {
		case protoFragment:
			bits := binary.BigEndian.Uint16(e[2:])
			h.later, h.more = bits>>3 != 0, h.more || bits&1 != 0
			h.fragment = binary.LittleEndian.Uint32(e[4:])
			h.payload += 8
		case protoAuth:
			h.payload += 4 * (int(e[1]) + 2)
		default:
			h.payload += 8 * (int(e[1]) + 1)
		}
		h.protocol = e[0]
	}
	return h, h.payload <= farthestHeader
}

// readFrame reads an Ethernet frame.
func readFrame(f []byte) reading {
	other := reading{shape: datapathShapeSHAPE_OTHER}
	if len(f) < 14 {
		return other
	}
	version := map[uint16]int{0x0800: 4, 0x86dd: 6}[binary.BigEndian.Uint16(f[12:])]
	if version == 0 {
		return other
	}
	h, ok := readIP(f, 14, version)
	if !ok {
		return other
	}
	if h.protocol == map[int]uint8{4: protoICMP, 6: protoICMPv6}[version] {
		return readError(f, h, version)
	}
	r := reading{ip4: version == 4, network: 14, protocol: h.protocol, shape: datapathShapeSHAPE_WHOLE}
	switch {
	case h.protocol != protoTCP && h.protocol != protoUDP:
		return other
	case h.later:
		r.shape, r.fragment = datapathShapeSHAPE_LATER, h.fragment
		r.from, r.to = netip.AddrPortFrom(h.from, 0), netip.AddrPortFrom(h.to, 0)
		return r
	case h.more:
		r.shape, r.fragment = datapathShapeSHAPE_FIRST, h.fragment
	}
	if !r.readPorts(f, h, map[uint8]int{protoTCP: 20, protoUDP: 8}[h.protocol]) {
		return other
	}
	if h.protocol == protoTCP {
		r.flags = f[h.payload+13]
	}
	return r
}

// readPorts reads a transport header of which so many bytes have to be there.
func (r *reading) readPorts(f []byte, h ipHeader, need int) bool {
	if h.payload+need > len(f) {
		return false
	}
	r.from = netip.AddrPortFrom(h.from, binary.BigEndian.Uint16(f[h.payload:]))
	r.to = netip.AddrPortFrom(h.to, binary.BigEndian.Uint16(f[h.payload+2:]))
	r.transport = uint16(h.payload)
	return true
}

// readError reads an ICMP error: RFC 792 destination unreachable, time exceeded
// and parameter problem; RFC 4443 the types below 128 that are assigned.
func readError(f []byte, outer ipHeader, version int) reading {
	other := reading{shape: datapathShapeSHAPE_OTHER}
	if outer.later || outer.more || outer.payload+8 > len(f) {
		return other
	}
	about := map[int][]uint8{4: {3, 11, 12}, 6: {1, 2, 3, 4}}[version]
	if !slices.Contains(about, f[outer.payload]) {
		return other
	}
	h, ok := readIP(f, outer.payload+8, version)
	if !ok || h.later || h.protocol != protoTCP && h.protocol != protoUDP {
		return other
	}
	r := reading{
		shape: datapathShapeSHAPE_ERROR, ip4: version == 4, protocol: h.protocol,
		outerFrom: outer.from, outerTo: outer.to, outerNetwork: 14, icmp: uint16(outer.payload),
		network: uint16(h.here),
	}
	if !r.readPorts(f, h, 8) {
		return other
	}
	return r
}

// readingOf is what the program has read, without what has no meaning.
func readingOf(e *datapathExplanation) reading {
	p := &e.Packet
	if p.Shape == datapathShapeSHAPE_OTHER {
		return reading{shape: p.Shape}
	}
	outer := func(words [4]uint32) netip.Addr {
		if words == [4]uint32{} && p.Shape != datapathShapeSHAPE_ERROR {
			return netip.Addr{}
		}
		return family(words, p.Ip4 == 1)
	}
	r := reading{
		shape: p.Shape, protocol: p.Tuple.Protocol, ip4: p.Ip4 == 1, flags: p.TcpFlags,
		from:      netip.AddrPortFrom(family(p.Tuple.Source.Word, p.Ip4 == 1), portOf(p.Tuple.SourcePort)),
		to:        netip.AddrPortFrom(family(p.Tuple.Destination.Word, p.Ip4 == 1), portOf(p.Tuple.DestinationPort)),
		outerFrom: outer(p.OuterSource.Word), outerTo: outer(p.OuterDestination.Word),
		network: p.Network, transport: p.Transport, outerNetwork: p.OuterNetwork, icmp: p.Icmp,
		padding: [5]uint8{p.Tuple.Zero[0], p.Tuple.Zero[1], p.Tuple.Zero[2], p.Zero, p.Frame - 14},
	}
	if p.Shape == datapathShapeSHAPE_FIRST || p.Shape == datapathShapeSHAPE_LATER {
		r.fragment = p.Fragment
	}
	return r
}

// family is an address as the packet has it: an IPv6 packet may hold an
// IPv4-mapped address.
func family(words [4]uint32, ip4 bool) netip.Addr {
	var bytes [16]byte
	for i, word := range words {
		binary.NativeEndian.PutUint32(bytes[4*i:], word)
	}
	if ip4 {
		return netip.AddrFrom16(bytes).Unmap()
	}
	return netip.AddrFrom16(bytes)
}

// judged is what decide() may answer for a new flow.
type judged struct {
	verdict  datapathVerdict
	backends []netip.AddrPort
	path     Path
}

// judge says what happens to a new flow: to a Service with endpoints one of
// them, without endpoints a refusal, to others nothing.
func judge(rows map[Frontend]*Row, protocol uint8, to netip.AddrPort) judged {
	row := rows[Frontend{unmapped(to), model.Protocol(protocol)}]
	switch {
	case row == nil:
		return judged{verdict: datapathVerdictVERDICT_NOT_A_SERVICE}
	case len(row.Backends) == 0:
		return judged{verdict: datapathVerdictVERDICT_REFUSE, path: row.Path}
	}
	return judged{datapathVerdictVERDICT_FORWARD, row.Backends, row.Path}
}

// differs compares the program's whole answer with the second opinion.
func differs(rows map[Frontend]*Row, f []byte, got *datapathExplanation, verdict datapathVerdict) error {
	want := readFrame(f)
	if have := readingOf(got); have != want {
		return fmt.Errorf("read\n     %+v, should be\n     %+v", have, want)
	}
	if want.shape != datapathShapeSHAPE_WHOLE && want.shape != datapathShapeSHAPE_FIRST {
		if verdict != datapathVerdictVERDICT_NOT_A_SERVICE {
			return fmt.Errorf("verdict %d on shape %d", verdict, want.shape)
		}
		return nil
	}
	may, d := judge(rows, want.protocol, want.to), &got.Decision
	switch {
	case verdict != may.verdict:
		return fmt.Errorf("verdict %d, should be %d", verdict, may.verdict)
	case verdict == datapathVerdictVERDICT_NOT_A_SERVICE && d.Service != 0:
		return fmt.Errorf("nobody's address, and the Service is said to be %d", d.Service)
	case verdict == datapathVerdictVERDICT_REFUSE && d.Reason != datapathReasonREASON_NO_BACKEND:
		return fmt.Errorf("refused for reason %d", d.Reason)
	case verdict != datapathVerdictVERDICT_NOT_A_SERVICE && pathOf(uint8(d.Path)) != may.path:
		return fmt.Errorf("the Service asks for path %q, should be %q", pathOf(uint8(d.Path)), may.path)
	case verdict == datapathVerdictVERDICT_FORWARD && int(d.Slots) != len(may.backends):
		return fmt.Errorf("%d slots for %d backends", d.Slots, len(may.backends))
	case verdict == datapathVerdictVERDICT_FORWARD && !slices.Contains(may.backends, addressOf(d.Backend)):
		return fmt.Errorf("sent to %s, which is none of %v", addressOf(d.Backend), may.backends)
	}
	return nil
}

// asker is an Explainer over a cluster whose Services the shapes go to.
type asker struct {
	*Explainer
	rows map[Frontend]*Row
}

func newAsker(t testing.TB, snapshot *model.Snapshot) *asker {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads programs")
	}
	var pods []string
	for i := range 600 {
		pods = append(pods, fmt.Sprintf("10.9.%d.%d", i/200, i%200))
	}
	large := &model.Snapshot{}
	for i := range 300 {
		large.Services = append(large.Services, serviceOf(fmt.Sprint(i), model.TCP, uint16(i), []string{"10.9.9.9"}, 1, pods[2*i:2*i+2]...))
	}
	x, err := OpenExplainer(Settings{}, Known{Snapshot: large}) // for the size of its tables
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close() })
	a := &asker{x, x.names}
	a.become(t, snapshot)
	return a
}

// runs says that BPF_PROG_TEST_RUN takes a frame: newer kernels want an Ethernet
// header and something behind it, and a whole IP header where it announces one.
func runs(f []byte) bool {
	least := 15
	if len(f) >= 14 {
		switch binary.BigEndian.Uint16(f[12:]) {
		case 0x0800:
			least = 34
		case 0x86dd:
			least = 54
		}
	}
	return len(f) >= least && len(f) <= 1500
}

// ask runs the program on a frame and compares.
func (a *asker) ask(f []byte) error {
	answer := &datapathExplanation{}
	verdict, err := a.program.Run(&ebpf.RunOptions{Data: f})
	if err == nil {
		err = a.maps[datapathMapExplained].Lookup(uint32(0), answer)
	}
	if err != nil {
		return err
	}
	return differs(a.rows, f, answer, datapathVerdict(verdict))
}

// corner is the cluster to which the shapes go.
func corner() *model.Snapshot {
	one := serviceOf("one", model.TCP, 80, []string{"10.96.0.1", "fd00:96::1"}, 8080, "10.244.1.4", "10.244.2.5", "fd00:244::4", "fd00:244::9")
	one.Ports = append(one.Ports, model.ServicePort{Name: "udp", Protocol: model.UDP, Port: 80})
	return &model.Snapshot{Complete: true, Services: []*model.Service{one}}
}

// randomCorner has other endpoints and asks for other paths.
func randomCorner(r *rand.Rand) *model.Snapshot {
	snapshot := corner()
	service := snapshot.Services[0]
	for i := range service.Ports {
		port := &service.Ports[i]
		port.Backends = nil
		for range r.IntN(6) {
			address := []string{"10.244.1.%d", "fd00:244::%d"}[r.IntN(2)]
			port.Backends = append(port.Backends, model.Backend{Ready: true, Address: netip.AddrPortFrom(
				netip.MustParseAddr(fmt.Sprintf(address, r.IntN(9))), uint16(1+r.IntN(65535)))})
		}
	}
	service.Annotations = map[string]string{PathAnnotation: []string{"", "socket", "packet", "both"}[r.IntN(4)]}
	return snapshot
}

// become empties the tables and fills them with other Services.
func (a *asker) become(t testing.TB, snapshot *model.Snapshot) {
	t.Helper()
	rows := (&planner{}).plan(a.settings, snapshot).index()
	a.apply(t, layer.Remove, a.rows)
	a.apply(t, layer.Add, rows)
	a.rows, a.names = rows, rows
}

func (a *asker) apply(t testing.TB, op layer.Op, rows map[Frontend]*Row) {
	t.Helper()
	var changes layer.Changes
	for _, row := range rows {
		changes = append(changes, layer.Change{Op: op, Subject: row})
	}
	if err := errors.Join(a.tables.apply(changes)...); err != nil {
		t.Fatal(err)
	}
}

// FuzzPacket runs the C parser and decide() on any bytes beside the reference.
func FuzzPacket(f *testing.F) {
	a := newAsker(f, corner())
	for _, shape := range shapes() {
		f.Add(shape)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if !runs(data) {
			return
		}
		if err := a.ask(data); err != nil {
			t.Errorf("%v\n     frame %s", err, hexOf(data))
		}
	})
}

// Every shape, and 100,000 that were made from them by chance.
func TestParserAndDecisionAgreeWithTheReference(t *testing.T) {
	a := newAsker(t, corner())
	corpus := shapes()
	var readable [][]byte
	for _, f := range corpus {
		if readFrame(f).shape != datapathShapeSHAPE_OTHER {
			readable = append(readable, f)
		}
	}
	seed := seedOf(t)
	seen := map[datapathShape]int{}
	agreed := 0
	try := func(i int, f []byte) {
		if !runs(f) {
			return
		}
		if err := a.ask(f); err != nil {
			t.Fatalf("frame %d of seed %d: %v\n     %s", i, seed, err, hexOf(f))
		}
		seen[readFrame(f).shape]++
		agreed++
	}
	for i, f := range slices.Concat(corpus, cut(corpus)) {
		try(-i, f)
	}
	const packets = 100_000
	for i := 0; agreed < packets; i++ {
		if i%2000 == 0 {
			a.become(t, randomCorner(rand.New(rand.NewPCG(seed, uint64(i)))))
		}
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		from := [][][]byte{corpus, readable}[i%2]
		f := mutated(r, from[r.IntN(len(from))])
		if i%20 == 0 {
			f = make([]byte, 15+r.IntN(200))
			for j := range f {
				f[j] = byte(r.Uint32())
			}
			f[12], f[13] = []byte{0x08, 0x86}[i/20%2], []byte{0x00, 0xdd}[i/20%2]
		}
		try(i, f)
	}
	t.Logf("%d frames agree: %d whole, %d first fragments, %d later ones, %d ICMP errors, %d others", agreed,
		seen[datapathShapeSHAPE_WHOLE], seen[datapathShapeSHAPE_FIRST], seen[datapathShapeSHAPE_LATER], seen[datapathShapeSHAPE_ERROR], seen[datapathShapeSHAPE_OTHER])
	for shape := datapathShapeSHAPE_OTHER; shape < datapathShapeSHAPE_UNREADABLE; shape++ {
		if seen[shape] < 1000 {
			t.Errorf("only %d frames of shape %d: the test is half blind", seen[shape], shape)
		}
	}
}
