package service

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/model"
)

// What the programs of the packet path return: linux/pkt_cls.h.
const (
	passes    = 0xffffffff // TC_ACT_UNSPEC
	dropped   = 2          // TC_ACT_SHOT
	redirects = 7          // TC_ACT_REDIRECT
)

// road is the packet path over an asker's tables, with flows of its own. Programs
// run on frames by BPF_PROG_TEST_RUN.
type road struct {
	*asker
	fromPod, toPod *ebpf.Program
	out            []byte
	// last is the last frame that a program left.
	last []byte
	// known is where the flows went that were seen.
	known map[flowKey]netip.AddrPort
	// met counts what was met on the way, and packets all of it.
	met     map[string]int
	packets int
}

// flowKey is who talks to whom.
type flowKey struct {
	from, to netip.AddrPort
	protocol uint8
}

func (k flowKey) String() string {
	return fmt.Sprintf("%s -> %s/%s", k.from, k.to, model.Protocol(k.protocol))
}

func (k flowKey) back() flowKey { return flowKey{k.to, k.from, k.protocol} }

func newRoad(t testing.TB, a *asker, places uint32) *road {
	t.Helper()
	spec, err := liveSpec()
	if err != nil {
		t.Fatal(err)
	}
	for name := range spec.Programs {
		if name != datapathProgFromPod && name != datapathProgToPod {
			delete(spec.Programs, name)
		}
	}
	tables := map[string]*ebpf.Map{}
	for _, name := range tableMaps {
		tables[name] = a.maps[name]
		spec.Maps[name].MaxEntries = a.maps[name].MaxEntries()
	}
	if err := spec.Variables[datapathVarPlacesMask].Set(places - 1); err != nil {
		t.Fatal(err)
	}
	spec.Maps[datapathMapPlaces].MaxEntries = places
	spec.Maps[datapathMapTranslations].MaxEntries = 2 * places
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: tables})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(loaded.Close)
	return &road{
		asker: a, fromPod: loaded.Programs[datapathProgFromPod], toPod: loaded.Programs[datapathProgToPod],
		out: make([]byte, 4096), known: map[flowKey]netip.AddrPort{}, met: map[string]int{},
	}
}

// send runs a program on a frame.
func (r *road) send(program *ebpf.Program, f []byte) (result uint32, out []byte, err error) {
	options := &ebpf.RunOptions{Data: f, DataOut: r.out}
	result, err = program.Run(options)
	r.packets++
	r.last = slices.Clone(options.DataOut)
	return result, r.last, err
}

// rewritten checks that a frame became another in nothing but its addresses and
// ports, and that every checksum is as right or wrong as it was. Where it is sent
// back the Ethernet addresses are exchanged.
func rewritten(in, out []byte, to flowKey, sentBack bool) error {
	was := readFrame(in)
	want := slices.Clone(in)
	if sentBack {
		copy(want, slices.Concat(in[6:12], in[:6]))
	}
	putAddresses(want, int(was.network), to.from.Addr(), to.to.Addr())
	if was.shape != datapathShapeSHAPE_LATER {
		binary.BigEndian.PutUint16(want[was.transport:], to.from.Port())
		binary.BigEndian.PutUint16(want[was.transport+2:], to.to.Port())
	}
	return sameButSums(in, want, out, was)
}

// sameButSums compares all bytes but the checksums, and what these sum up to.
func sameButSums(in, want, out []byte, was reading) error {
	if len(out) != len(want) {
		return fmt.Errorf("%d bytes became %d", len(in), len(out))
	}
	if was.ip4 {
		copy(want[was.network+10:was.network+12], out[was.network+10:])
	}
	if at := sumAt(was); at > 0 {
		if was.protocol == protoUDP && in[at] == 0 && in[at+1] == 0 {
			if out[at] != 0 || out[at+1] != 0 {
				return errors.New("a datagram without a checksum has got one")
			}
		} else if was.protocol == protoUDP && out[at] == 0 && out[at+1] == 0 {
			return errors.New("a datagram has lost its checksum: 0 is none")
		}
		copy(want[at:at+2], out[at:])
	}
	if !bytes.Equal(out, want) {
		return fmt.Errorf("the frame became\n     %s, should be, checksums aside,\n     %s", hexOf(out), hexOf(want))
	}
	if was.ip4 && ipSum(in, int(was.network)) != ipSum(out, int(was.network)) {
		return errors.New("the IPv4 header's checksum does not fit any more")
	}
	if (was.shape == datapathShapeSHAPE_WHOLE || was.shape == datapathShapeSHAPE_FIRST) && !sumless(in, was) &&
		segmentSum(in, was) != segmentSum(out, readFrame(out)) {
		return fmt.Errorf("the checksum of %s does not fit any more", model.Protocol(was.protocol))
	}
	return nil
}

func putAddresses(f []byte, at int, from, to netip.Addr) {
	if from.Is4() {
		copy(f[at+12:], from.AsSlice())
		copy(f[at+16:], to.AsSlice())
		return
	}
	copy(f[at+8:], from.AsSlice())
	copy(f[at+24:], to.AsSlice())
}

// sumAt is where the checksum of TCP or UDP is; 0 where there is none.
func sumAt(r reading) int {
	if r.shape != datapathShapeSHAPE_WHOLE && r.shape != datapathShapeSHAPE_FIRST {
		return 0
	}
	return int(r.transport) + map[uint8]int{protoTCP: 16, protoUDP: 6}[r.protocol]
}

// sumless says that a datagram has no checksum.
func sumless(f []byte, r reading) bool {
	at := sumAt(r)
	return r.protocol == protoUDP && at > 0 && f[at] == 0 && f[at+1] == 0
}

// segmentSum is the sum over pseudo header and segment: 0xffff if it is right.
func segmentSum(f []byte, r reading) uint16 {
	return minusZero(onesSum(pseudo(r.from.Addr(), r.to.Addr(), int(r.protocol), len(f)-int(r.transport)), f[r.transport:]))
}

func ipSum(f []byte, at int) uint16 {
	return minusZero(onesSum(f[at:min(len(f), at+4*int(f[at]&15))]))
}

// minusZero makes one of the two zeros of ones' complement.
func minusZero(sum uint16) uint16 {
	if sum == 0 {
		return 0xffff
	}
	return sum
}

// flowOf is who talks to whom in a frame.
func flowOf(r reading) flowKey { return flowKey{r.from, r.to, r.protocol} }

// leave checks that nothing happened to a frame.
func leave(in []byte, result uint32, out []byte) error {
	if result != passes || !bytes.Equal(in, out) {
		return fmt.Errorf("not left alone: result %d and\n     %s", int32(result), hexOf(out))
	}
	return nil
}

// depart sends a frame from a pod, and checks what becomes of it against the
// reference. It returns what the flow became; the zero value if nothing.
func (r *road) depart(in []byte) (flowKey, error) {
	result, out, err := r.send(r.fromPod, in)
	if err != nil {
		return flowKey{}, err
	}
	was := readFrame(in)
	if was.shape != datapathShapeSHAPE_WHOLE && was.shape != datapathShapeSHAPE_FIRST {
		r.met["others"]++
		return flowKey{}, leave(in, result, out)
	}
	key := flowOf(was)
	begins := was.protocol == protoUDP || was.flags&(flagSYN|flagACK) == flagSYN
	may := judge(r.rows, was.protocol, was.to)
	before, known := r.known[key]
	switch {
	case !known && (!begins || may.verdict == datapathVerdictVERDICT_NOT_A_SERVICE):
		r.met["left alone"]++
		return flowKey{}, leave(in, result, out)
	case result == dropped && may.verdict == datapathVerdictVERDICT_REFUSE, result == redirects && may.verdict == datapathVerdictVERDICT_REFUSE:
		r.met["refused"]++
		delete(r.known, key)
		return flowKey{}, r.refused(in, was, result, out)
	case !known && may.verdict == datapathVerdictVERDICT_REFUSE:
		return flowKey{}, fmt.Errorf("no endpoint, and the result is %d", int32(result))
	}
	now := readFrame(out)
	became := flowOf(now)
	if known && became.to != before && !begins {
		return became, fmt.Errorf("the flow moved from %s to %s", before, became.to)
	}
	if became.to != before && !slices.Contains(may.backends, unmapped(became.to)) {
		return became, fmt.Errorf("sent to %s, which is none of %v", became.to, may.backends)
	}
	hairpin := became.to.Addr() == was.from.Addr()
	r.known[key] = became.to
	r.met["forwarded"]++
	return became, r.translated(in, was, result, out, became, hairpin)
}

// translated checks a frame that was sent to an endpoint.
func (r *road) translated(in []byte, was reading, result uint32, out []byte, became flowKey, hairpin bool) error {
	source := was.from.Addr()
	want := uint32(passes)
	if hairpin {
		source, want = was.to.Addr(), redirects
		r.met["hairpins"]++
	}
	if result != want {
		return fmt.Errorf("result %d, should be %d", int32(result), int32(want))
	}
	if became.from.Addr() != source {
		return fmt.Errorf("comes from %s, should be from %s", became.from.Addr(), source)
	}
	if became.from.Port() != was.from.Port() {
		r.met["other source ports"]++
		if became.from.Port() < 1024 {
			return fmt.Errorf("the source port has become %d", became.from.Port())
		}
	}
	return rewritten(in, out, became, hairpin)
}

// refused checks the answer to a frame for a Service without endpoints.
func (r *road) refused(in []byte, was reading, result uint32, out []byte) error {
	plain := was.shape == datapathShapeSHAPE_WHOLE && (was.protocol == protoTCP || was.ip4 && was.transport == 34 || !was.ip4 && was.transport == 54)
	if result == dropped {
		if plain {
			return errors.New("dropped, and the sender is not told")
		}
		return nil
	}
	if !bytes.Equal(out[:12], slices.Concat(in[6:12], in[:6])) {
		return fmt.Errorf("the answer goes to %s", hexOf(out[:12]))
	}
	now := readFrame(out)
	if was.protocol == protoTCP {
		if flowOf(now) != flowOf(was).back() || now.flags != flagRST|flagACK || segmentSum(out, now) != 0xffff || now.ip4 && ipSum(in, 14) != ipSum(out, 14) {
			return fmt.Errorf("the answer is no reset: %+v\n     %s", now, hexOf(out))
		}
		if ack, sequence := binary.BigEndian.Uint32(out[now.transport+8:]), binary.BigEndian.Uint32(in[was.transport+4:]); ack != sequence+1 {
			return fmt.Errorf("the reset acknowledges %d, not %d", ack, sequence+1)
		}
		return nil
	}
	// an error about the datagram, with its headers
	if now.shape != datapathShapeSHAPE_ERROR || flowOf(now) != flowOf(was) || now.outerFrom != was.to.Addr() || now.outerTo != was.from.Addr() {
		return fmt.Errorf("the answer is no error about the datagram: %+v\n     %s", now, hexOf(out))
	}
	kind := map[bool][]byte{true: {3, 3}, false: {1, 4}}[was.ip4]
	if !bytes.Equal(out[now.icmp:now.icmp+2], kind) || !bytes.Equal(out[now.network:], in[14:was.transport+8]) {
		return fmt.Errorf("the error is not \"port unreachable\" about the datagram:\n     %s", hexOf(out))
	}
	return soundError(out)
}

// soundError checks the checksums of an ICMP error and of the IPv4 headers in it.
func soundError(f []byte) error {
	r := readFrame(f)
	switch {
	case errorSum(f, r) != 0xffff:
		return fmt.Errorf("the ICMP checksum is wrong:\n     %s", hexOf(f))
	case r.ip4 && (ipSum(f, 14) != 0xffff || ipSum(f, int(r.network)) != 0xffff):
		return fmt.Errorf("an IPv4 checksum is wrong:\n     %s", hexOf(f))
	}
	return nil
}

// parcel is a datagram or segment, how it is sent, and in which packets.
type parcel struct {
	flowKey
	payload []byte
	frames  [][]byte
}

// pack puts a segment into packets: with options or extension headers, whole or in
// fragments.
func pack(r *rand.Rand, flow flowKey, flags int) parcel {
	payload := make([]byte, r.IntN(300))
	for i := range payload {
		payload[i] = byte(r.Uint32())
	}
	p := parcel{flowKey: flow, payload: segment(int(flow.protocol), flow.from, flow.to, flags, payload)}
	if flow.protocol == protoUDP && flow.from.Addr().Is4() && r.IntN(8) == 0 {
		p.payload[6], p.payload[7] = 0, 0
	}
	pieces := [][]byte{p.payload}
	if r.IntN(3) == 0 && len(p.payload) > 80 {
		first := 24 + 8*r.IntN(4)
		second := first + 8*(1+r.IntN(3))
		pieces = [][]byte{p.payload[:first], p.payload[first:second], p.payload[second:]}
	}
	id, offset := r.IntN(1<<16), 0
	options := make([]byte, 4*max(0, r.IntN(14)-3))
	chain := []extension{padded(protoHopByHop, 0), padded(protoRouting, r.IntN(3)), authentication(2 + 2*r.IntN(4)), padded(protoDestination, r.IntN(5))}
	chain = chain[:max(0, r.IntN(8)-3)]
	for i, piece := range pieces {
		f := fragmented{offset: offset / 8, id: id, more: i < len(pieces)-1}
		offset += len(piece)
		var packet []byte
		if flow.from.Addr().Is4() {
			packet = ip4(flow.from.Addr(), flow.to.Addr(), int(flow.protocol), options, f, piece)
		} else {
			own := chain
			if len(pieces) > 1 {
				own = append(slices.Clone(chain), fragmentHeader(f))
			}
			packet = ip6(flow.from.Addr(), flow.to.Addr(), own, int(flow.protocol), piece)
		}
		p.frames = append(p.frames, frame(packet))
	}
	return p
}

// travel sends the rest of a parcel whose first frame became another: each later
// fragment must become the same, and the whole must have its checksum.
func (r *road) travel(program *ebpf.Program, p parcel, first []byte, became flowKey, sentBack bool) error {
	want := uint32(passes)
	if sentBack {
		want = redirects
	}
	now := readFrame(first)
	whole := slices.Clone(first[now.transport:])
	for _, in := range p.frames[1:] {
		result, out, err := r.send(program, in)
		if err == nil && result != want {
			err = fmt.Errorf("result %d, should be %d", int32(result), int32(want))
		}
		if err == nil {
			err = rewritten(in, out, became, sentBack)
		}
		if err != nil {
			return fmt.Errorf("later fragment: %w", err)
		}
		r.met["later fragments"]++
		whole = append(whole, out[len(out)-len(in)+headers(in):]...)
	}
	sum := onesSum(pseudo(became.from.Addr(), became.to.Addr(), int(became.protocol), len(whole)), whole)
	if !sumless(first, now) && minusZero(sum) != 0xffff {
		return errors.New("put together again, its checksum is wrong")
	}
	return nil
}

// headers is the length of what stands before a fragment's payload.
func headers(f []byte) int {
	version := int(f[14] >> 4)
	h, _ := readIP(f, 14, version)
	return h.payload
}

// story sends a flow's packets both ways, and errors about them.
func (r *road) story(x *rand.Rand, flow flowKey) error {
	opens := flagSYN
	if x.IntN(30) == 0 {
		opens = flagACK // of a connection that nobody knows
	}
	p := pack(x, flow, opens)
	became, err := r.depart(p.frames[0])
	if err != nil {
		return fmt.Errorf("%s: %w\n     %s", flow, err, hexOf(p.frames[0]))
	}
	if became == (flowKey{}) {
		return r.ignored(p.frames[1:])
	}
	hairpin := became.to.Addr() == flow.from.Addr()
	if err := r.travel(r.fromPod, p, r.last, became, hairpin); err != nil {
		return fmt.Errorf("%s: %w", flow, err)
	}
	if err := r.next(x, flow, became); err != nil {
		return fmt.Errorf("%s, the next packet: %w", flow, err)
	}
	if err := r.problem(x, r.last[14:], became, flow, hairpin); err != nil {
		return fmt.Errorf("%s, an error about it: %w", flow, err)
	}
	if err := r.reply(x, flow, became, hairpin); err != nil {
		return fmt.Errorf("%s, the reply: %w", flow, err)
	}
	if err := r.complaint(x, r.last[14:], flow.back(), became.back(), hairpin); err != nil {
		return fmt.Errorf("%s, an error about the reply: %w", flow, err)
	}
	return nil
}

// ignored sends frames that nothing must happen to.
func (r *road) ignored(frames [][]byte) error {
	for _, in := range frames {
		result, out, err := r.send(r.fromPod, in)
		if err == nil {
			err = leave(in, result, out)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// next sends a flow's second packet, which must take the way of the first.
func (r *road) next(x *rand.Rand, flow, became flowKey) error {
	p := pack(x, flow, flagACK|flagPSH)
	again, err := r.depart(p.frames[0])
	if err == nil && again != became {
		err = fmt.Errorf("the first packet became %s, this one %s", became, again)
	}
	if err != nil {
		return err
	}
	first := r.last
	err = r.travel(r.fromPod, p, first, became, became.to.Addr() == flow.from.Addr())
	r.last = first
	return err
}

// reply sends the endpoint's answer.
func (r *road) reply(x *rand.Rand, flow, became flowKey, hairpin bool) error {
	program, want := r.toPod, uint32(passes)
	if hairpin {
		program, want = r.fromPod, redirects
	}
	p := pack(x, became.back(), flagSYN|flagACK)
	result, out, err := r.send(program, p.frames[0])
	if err == nil && result != want {
		err = fmt.Errorf("result %d, should be %d", int32(result), int32(want))
	}
	if err == nil {
		err = rewritten(p.frames[0], out, flow.back(), hairpin)
	}
	if err != nil {
		return err
	}
	r.met["replies"]++
	first := r.last
	err = r.travel(program, p, first, flow.back(), hairpin)
	r.last = first
	return err
}

// problem sends the client an error about its packet, which was met as sent: a
// router's, or the endpoint's own. It must be about the packet as the client knows
// it, and an endpoint's must come from the Service.
func (r *road) problem(x *rand.Rand, about []byte, sent, known flowKey, hairpin bool) error {
	program, sender := r.toPod, randomRouter(x, known.from.Addr())
	if x.IntN(2) == 0 {
		sender = sent.to.Addr()
	}
	to := known.from.Addr()
	if hairpin { // the pod's own, to the Service that it takes for the sender
		program, sender, to = r.fromPod, sent.to.Addr(), sent.from.Addr()
	}
	from := sender
	if sender == sent.to.Addr() {
		from = known.to.Addr()
	}
	in := errorAbout(sender, to, errorKind(x, to), 0, shortened(x, about))
	r.met["errors about what was sent"]++
	return r.errorBecomes(program, in, known, from, known.from.Addr(), hairpin)
}

// complaint sends the endpoint an error of the client about the reply, which it
// got as it is known. It must be about the packet as the endpoint has sent it.
func (r *road) complaint(x *rand.Rand, about []byte, known, sent flowKey, hairpin bool) error {
	sender, to := known.to.Addr(), known.from.Addr()
	in := errorAbout(sender, to, errorKind(x, to), 0, shortened(x, about))
	from := sender
	if hairpin {
		from = known.from.Addr()
	}
	r.met["errors about replies"]++
	return r.errorBecomes(r.fromPod, in, sent, from, sent.from.Addr(), hairpin)
}

// errorBecomes sends an ICMP error and says what it has to become.
func (r *road) errorBecomes(program *ebpf.Program, in []byte, inner flowKey, from, to netip.Addr, sentBack bool) error {
	want := uint32(passes)
	if sentBack {
		want = redirects
	}
	result, out, err := r.send(program, in)
	if err != nil {
		return err
	}
	if result != want {
		return fmt.Errorf("result %d, should be %d\n     %s", int32(result), int32(want), hexOf(in))
	}
	return errorRewritten(in, out, inner, from, to, sentBack)
}

// errorRewritten checks that an error became another in nothing but the addresses
// and ports, and that it is sound.
func errorRewritten(in, out []byte, inner flowKey, from, to netip.Addr, sentBack bool) error {
	was, want := readFrame(in), slices.Clone(in)
	if sentBack {
		copy(want, slices.Concat(in[6:12], in[:6]))
	}
	putAddresses(want, int(was.outerNetwork), from, to)
	putAddresses(want, int(was.network), inner.from.Addr(), inner.to.Addr())
	binary.BigEndian.PutUint16(want[was.transport:], inner.from.Port())
	binary.BigEndian.PutUint16(want[was.transport+2:], inner.to.Port())
	if len(out) != len(want) {
		return fmt.Errorf("%d bytes became %d", len(in), len(out))
	}
	sums := []uint16{was.icmp + 2}
	if was.ip4 {
		sums = append(sums, was.outerNetwork+10, was.network+10)
	}
	for _, at := range sums {
		copy(want[at:at+2], out[at:])
	}
	if !bytes.Equal(want, out) {
		return fmt.Errorf("it became\n     %s, should be, checksums aside,\n     %s", hexOf(out), hexOf(want))
	}
	return soundError(out)
}

// errorKind is one of the errors of the address's family.
func errorKind(x *rand.Rand, of netip.Addr) int {
	if of.Is4() {
		return []int{3, 11, 12}[x.IntN(3)]
	}
	return 1 + x.IntN(4)
}

// shortened is as much of a packet as an error may hold, at least eight bytes
// behind the headers.
func shortened(x *rand.Rand, packet []byte) []byte {
	least := headers(frame(packet)) - 14 + 8
	return packet[:least+x.IntN(len(packet)-least+1)]
}

func randomRouter(x *rand.Rand, family netip.Addr) netip.Addr {
	if family.Is4() {
		return netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + x.IntN(250))})
	}
	return netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", 1+x.IntN(250)))
}

// crowd is a cluster of few pods behind many Services: they share endpoints, and
// pods meet themselves.
func crowd(x *rand.Rand) *model.Snapshot {
	snapshot := &model.Snapshot{Complete: true}
	for i := range 40 {
		protocol := []model.Protocol{model.TCP, model.UDP}[i%2]
		var pods []string
		for range x.IntN(5) {
			pods = append(pods, member(x, 0).String(), member(x, 1).String())
		}
		ips := []string{fmt.Sprintf("10.96.0.%d", i/2), fmt.Sprintf("fd00:96::%d", i/2)}
		snapshot.Services = append(snapshot.Services, serviceOf(fmt.Sprintf("s%02d", i), protocol, 80, ips, 8080, pods...))
	}
	return snapshot
}

// member is the address of a pod of the crowd.
func member(x *rand.Rand, family int) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf([]string{"10.244.1.%d", "fd00:244::%d"}[family], 1+x.IntN(12)))
}

// 100,000 packets of flows, both ways, whole and in fragments, with options and
// extension headers, and errors about them, over fifty clusters.
func TestPacketPathAgreesWithTheReference(t *testing.T) {
	r := newRoad(t, newAsker(t, &model.Snapshot{}), 1<<17)
	seed := seedOf(t)
	const packets, clusters = 100_000, 50
	for i := 0; r.packets < packets; i++ {
		x := rand.New(rand.NewPCG(seed, uint64(i)))
		if r.packets >= r.met["clusters"]*packets/clusters {
			r.become(t, crowd(x))
			clear(r.known)
			r.met["clusters"]++
		}
		family := x.IntN(2)
		from := netip.AddrPortFrom(member(x, family), uint16(1024+i%64000))
		for range 1 + x.IntN(2) { // two Services may lead one client's port to one endpoint
			to := netip.MustParseAddr(fmt.Sprintf([]string{"10.96.0.%d", "fd00:96::%d"}[family], x.IntN(22)))
			flow := flowKey{from, netip.AddrPortFrom(to, 80), []uint8{protoTCP, protoUDP}[x.IntN(2)]}
			if err := r.story(x, flow); err != nil {
				t.Fatalf("flow %d of seed %d: %v", i, seed, err)
			}
		}
	}
	t.Logf("%d packets agree: %v", r.packets, r.met)
	for _, what := range []string{"forwarded", "refused", "left alone", "hairpins", "later fragments", "replies", "errors about what was sent", "errors about replies"} {
		if r.met[what] < 500 {
			t.Errorf("only %d %s: the test is half blind", r.met[what], what)
		}
	}
	if r.met["other source ports"] == 0 {
		t.Error("no two Services led one client's port to one endpoint")
	}
}

// Frames with bytes changed by chance: what cannot be read is left alone, and of
// what is translated nothing changes but addresses, ports and checksums, which
// stay as right or wrong as they were.
func TestPacketPathOnDamagedFrames(t *testing.T) {
	r := newRoad(t, newAsker(t, &model.Snapshot{}), 1<<17)
	r.become(t, corner())
	seed := seedOf(t)
	corpus := slices.DeleteFunc(shapes(), func(f []byte) bool { return readFrame(f).shape == datapathShapeSHAPE_OTHER })
	const packets = 50_000
	for i := 0; r.packets < packets; i++ {
		x := rand.New(rand.NewPCG(seed, uint64(i)))
		in := mutated(x, corpus[x.IntN(len(corpus))])
		if !runs(in) {
			continue
		}
		if err := r.survive([]*ebpf.Program{r.fromPod, r.toPod}[x.IntN(2)], in); err != nil {
			t.Fatalf("frame %d of seed %d, %s: %v", i, seed, hexOf(in), err)
		}
	}
	t.Logf("%d frames, %d of them translated or answered", r.packets, r.met["changed"])
	if r.met["changed"] < 1000 {
		t.Error("hardly any was translated: the test is half blind")
	}
}

// FuzzTranslation runs from_pod and to_pod on any bytes.
func FuzzTranslation(f *testing.F) {
	r := newRoad(f, newAsker(f, &model.Snapshot{}), 1<<12)
	r.become(f, corner())
	for _, shape := range shapes() {
		f.Add(shape)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if !runs(data) {
			return
		}
		for _, program := range []*ebpf.Program{r.fromPod, r.toPod} {
			if err := r.survive(program, data); err != nil {
				t.Errorf("%v\n     frame %s", err, hexOf(data))
			}
		}
	})
}

// survive sends whatever bytes. What cannot be read must be left alone; what was
// changed is checked.
func (r *road) survive(program *ebpf.Program, in []byte) error {
	result, out, err := r.send(program, in)
	was := readFrame(in)
	switch {
	case err != nil:
		return err
	case was.shape == datapathShapeSHAPE_OTHER || bytes.Equal(in, out) && result != dropped:
		return leave(in, result, out)
	case bytes.Equal(in, out):
		return nil
	}
	r.met["changed"]++
	return r.unharmed(in, out, was, result)
}

// unharmed checks a damaged frame that was translated.
func (r *road) unharmed(in, out []byte, was reading, result uint32) error {
	if judge(r.rows, was.protocol, was.to).verdict == datapathVerdictVERDICT_REFUSE {
		return nil // the answer is another packet
	}
	now := readFrame(out)
	if now.shape != was.shape {
		return fmt.Errorf("shape %d became %d", was.shape, now.shape)
	}
	if was.shape != datapathShapeSHAPE_ERROR {
		return rewritten(in, out, flowOf(now), result == redirects)
	}
	want := slices.Clone(in)
	if result == redirects {
		copy(want, slices.Concat(in[6:12], in[:6]))
	}
	putAddresses(want, int(was.outerNetwork), now.outerFrom, now.outerTo)
	putAddresses(want, int(was.network), now.from.Addr(), now.to.Addr())
	copy(want[was.transport:was.transport+4], out[was.transport:])
	copy(want[was.icmp+2:was.icmp+4], out[was.icmp+2:])
	if was.ip4 {
		copy(want[was.outerNetwork+10:was.outerNetwork+12], out[was.outerNetwork+10:])
		copy(want[was.network+10:was.network+12], out[was.network+10:])
	}
	if !bytes.Equal(want, out) {
		return fmt.Errorf("became\n     %s, should be, checksums aside,\n     %s", hexOf(out), hexOf(want))
	}
	if was.ip4 && ipSum(in, 14) != ipSum(out, 14) || errorSum(in, was) != errorSum(out, now) {
		return fmt.Errorf("a checksum is otherwise wrong than it was:\n     %s", hexOf(out))
	}
	return nil
}

// errorSum is the sum over an ICMP error: 0xffff if it is right.
func errorSum(f []byte, r reading) uint16 {
	if r.ip4 {
		return minusZero(onesSum(f[r.icmp:]))
	}
	return minusZero(onesSum(pseudo(r.outerFrom, r.outerTo, protoICMPv6, len(f)-int(r.icmp)), f[r.icmp:]))
}
