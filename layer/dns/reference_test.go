package dns

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/millrace/millrace/kernel/pinned"
	"github.com/millrace/millrace/model"
)

// mirror says what names.bpf.c has to do, read from docs/decisions/0014-dns.md and not
// from the program.
type mirror struct {
	zone    string
	rows    map[string]*Row
	whole   bool
	outside map[string]learned
	// search is the pod's list, with ndots 5.
	search []string
}

// question is what is asked in plain words; ok is false for what is to be passed up
// because it is not plain.
type question struct {
	id      uint16
	rd      bool
	edns    bool
	name    string // lower case, with a final dot
	labels  []string
	wire    []byte // the name as it was written
	kind    dnsmessage.Type
	escaped bool // a label has a dot in it, so that no string can say the name
}

// readQuestion reads a message that has the form of a plain query: it is one exactly
// if it is what writing down its question gives.
func readQuestion(message []byte) (q question, ok bool) {
	if len(message) < 17 {
		return q, false
	}
	rest := message[12:]
	for {
		if len(rest) == 0 || rest[0] > 63 || len(rest) <= int(rest[0]) {
			return q, false
		}
		label := rest[:1+rest[0]]
		rest, q.wire = rest[len(label):], append(q.wire, label...)
		if len(label) == 1 {
			break
		}
		text := lower(string(label[1:]))
		q.escaped = q.escaped || strings.Contains(text, ".")
		q.labels = append(q.labels, text)
	}
	// limits of the program's own
	if len(q.labels) > 16 || len(q.wire) > 160 || len(rest) < 4 {
		return q, false
	}
	q.name = strings.Join(q.labels, ".") + "."
	q.id = binary.BigEndian.Uint16(message)
	q.rd = message[2]&1 > 0
	ad := message[3] & 0x20
	q.kind = dnsmessage.Type(binary.BigEndian.Uint16(rest))
	q.edns = message[11] > 0
	again := []byte{message[0], message[1], message[2] & 1, ad, 0, 1, 0, 0, 0, 0, 0, 0}
	again = append(append(again, q.wire...), 0, byte(q.kind), 0, 1)
	if q.edns {
		if len(rest) < 4+11 {
			return q, false
		}
		again[11] = 1
		again = append(again, 0, 0, 41, rest[4+3], rest[4+4], 0, 0, 0, 0, 0, 0)
	}
	return q, bytes.Equal(again, message) && (q.kind == dnsmessage.TypeA || q.kind == dnsmessage.TypeAAAA)
}

// learned is a name outside, and when the layer was told of it.
type learned struct {
	Outside
	at time.Time
}

// said is what is to become of a message, and what the answer has to hold.
type said struct {
	outcome datapathOutcome
	question
	// target is what the search list comes to, if that is the answer; then least is until
	// when it is so, or zero.
	target string
	least  time.Time
	found
}

// found is what is known of a name, for the family asked for.
type found struct {
	outcome   datapathOutcome
	ours      bool
	addresses []netip.Addr
	known     Known // of a name outside, ...
	learned   time.Time
	// settled: it is so for both families, and not for a few seconds only.
	settled bool
	until   time.Time // where it does not exist
}

func (f found) absent() bool {
	return f.settled && (f.outcome == datapathOutcomeOUTCOME_NXDOMAIN || f.outcome == datapathOutcomeOUTCOME_OUTSIDE_NXDOMAIN)
}

func (f found) exists() bool {
	return f.settled && !f.absent() && f.outcome <= datapathOutcomeOUTCOME_OUTSIDE_STALE
}

// decide is what is to become of a message.
func (m *mirror) decide(message []byte) said {
	q, ok := readQuestion(message)
	if !ok {
		return said{outcome: datapathOutcomeOUTCOME_NOT_PLAIN, question: q}
	}
	s := said{question: q, found: m.look(q.labels, q.kind)}
	s.outcome = s.found.outcome
	if s.absent() {
		m.collapse(&s)
	}
	return s
}

// collapse follows the resolver of the pod: what it will ask for next, and so on.
func (m *mirror) collapse(s *said) {
	n := len(s.labels)
	if len(m.search) == 0 {
		return
	}
	first := strings.Split(m.search[0], ".")
	stem := n - len(first)
	if stem < 1 || stem-1 >= 5 || !equalLabels(s.labels[stem:], first) {
		return
	}
	ours, least := s.ours, s.until
	for i := 1; i <= len(m.search); i++ {
		candidate := slices.Clone(s.labels[:stem])
		if i < len(m.search) {
			candidate = append(candidate, strings.Split(m.search[i], ".")...)
		}
		f := m.look(candidate, s.kind)
		ours = ours && f.ours
		switch {
		case f.absent():
			if !f.until.IsZero() && (least.IsZero() || f.until.Before(least)) {
				least = f.until
			}
			continue
		case f.exists() && m.fits(s, candidate):
			s.found, s.least, s.target, s.ours = f, least, strings.Join(candidate, ".")+".", ours
			s.outcome = datapathOutcomeOUTCOME_COLLAPSED
		}
		return
	}
}

// fits says whether there is room for the answers of both families.
func (m *mirror) fits(s *said, candidate []string) bool {
	for _, kind := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA} {
		one := said{question: s.question, found: m.look(candidate, kind), target: strings.Join(candidate, ".") + "."}
		one.edns = true
		if one.length() > 512 {
			return false
		}
	}
	return true
}

// length is that of the answer.
func (s *said) length() int {
	n := 12 + len(s.wire) + 4
	if s.target != "" {
		n += 12 + len(s.target) + 1
	}
	for _, alias := range s.known.Chain {
		n += 12 + len(strings.TrimSuffix(alias.Target, ".")) + 2
	}
	for _, addr := range s.addresses {
		n += 12 + addr.BitLen()/8
	}
	switch {
	case len(s.addresses) > 0:
	case s.known.State == Unknown:
		n += 12 + 42
	case s.known.SOA != nil:
		owner, _, _ := readSOA(s.known.SOA)
		n += 2 + len(s.known.SOA) - len(owner)
	}
	if s.edns {
		n += 11
	}
	return n
}

func (m *mirror) look(labels []string, kind dnsmessage.Type) found {
	zone := strings.Split(m.zone, ".")
	n := len(labels) - len(zone)
	if n < 1 || !equalLabels(labels[n:], zone) {
		return m.lookOutside(labels, kind)
	}
	return m.lookInside(labels[:n], kind)
}

func (m *mirror) lookInside(below []string, kind dnsmessage.Type) found {
	f := found{outcome: datapathOutcomeOUTCOME_LEFT, ours: true, settled: true}
	if lengthOfLabels(below) > nameLimit {
		return f
	}
	row := m.row(below)
	if row != nil {
		f.addresses = ofFamily(row.Addresses, kind)
	}
	switch {
	case row != nil && row.Left:
		return f
	case len(f.addresses) > 0:
		f.outcome = datapathOutcomeOUTCOME_ANSWERED
	case !m.whole:
		f.outcome = datapathOutcomeOUTCOME_UNSURE
	case row != nil:
		f.outcome = datapathOutcomeOUTCOME_NODATA
	default:
		f.outcome = m.absent(below)
	}
	return f
}

func (m *mirror) lookOutside(labels []string, kind dnsmessage.Type) found {
	f := found{outcome: datapathOutcomeOUTCOME_NOT_OURS}
	o, ok := m.outside[strings.Join(labels, ".")]
	if !ok || slices.ContainsFunc(labels, func(label string) bool { return strings.Contains(label, ".") }) {
		return f
	}
	now := time.Now()
	lives := func(k Known) bool { return k.State != Unknown && k.Until.After(now) }
	known := o.A
	if kind == dnsmessage.TypeAAAA {
		known = o.AAAA
	}
	if !lives(known) {
		return f
	}
	f.known, f.learned, f.addresses = known, o.at, known.Addresses
	f.outcome = map[State]datapathOutcome{Addresses: datapathOutcomeOUTCOME_OUTSIDE,
		NoData: datapathOutcomeOUTCOME_OUTSIDE_NODATA, Absent: datapathOutcomeOUTCOME_OUTSIDE_NXDOMAIN}[known.State]
	if known.Stale {
		f.outcome = datapathOutcomeOUTCOME_OUTSIDE_STALE
	}
	switch gone := o.A.State == Absent; {
	case !lives(o.A) || !lives(o.AAAA) || gone != (o.AAAA.State == Absent):
	case gone:
		f.settled = !o.A.Stale && !o.AAAA.Stale
		if f.until = o.A.Until; o.AAAA.Until.Before(f.until) {
			f.until = o.AAAA.Until
		}
	default:
		f.settled = o.A.State == Addresses || o.AAAA.State == Addresses
	}
	return f
}

func ofFamily(all []netip.Addr, kind dnsmessage.Type) (addresses []netip.Addr) {
	for _, addr := range all {
		if addr.Is4() == (kind == dnsmessage.TypeA) {
			addresses = append(addresses, addr)
		}
	}
	return addresses
}

// lengthOfLabels is that of a name in messages without its final zero.
func lengthOfLabels(labels []string) (n int) {
	for _, label := range labels {
		n += 1 + len(label)
	}
	return n
}

// absent is what is said of a name that nothing is known of.
func (m *mirror) absent(below []string) datapathOutcome {
	n := len(below)
	last := below[n-1]
	switch {
	case last == "pod", last == "dns", len(last) == 11 && strings.HasPrefix(last, "dns-ver"):
		return datapathOutcomeOUTCOME_LEFT
	case last != "svc" || n > 5:
		return datapathOutcomeOUTCOME_NXDOMAIN
	case n < 3:
		return datapathOutcomeOUTCOME_LEFT
	case n > 3 && m.row(below[n-3:]) != nil:
		return datapathOutcomeOUTCOME_LEFT
	}
	return datapathOutcomeOUTCOME_NXDOMAIN
}

func (m *mirror) row(labels []string) *Row {
	for _, label := range labels {
		if strings.Contains(label, ".") {
			return nil
		}
	}
	return m.rows[strings.Join(labels, ".")]
}

func equalLabels(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// loaded is the program over maps of its own.
type loaded struct {
	t       testing.TB
	layer   *Layer
	program *ebpf.Program
	mirror  *mirror
	serial  uint32
	words   []string // the names of outcomes
	out     []byte
	calls   *ringbuf.Reader // where somebody attends
}

// load applies a cluster to a program that nobody else uses.
func load(t testing.TB, snapshot *model.Snapshot, change ...func(*ebpf.CollectionSpec)) *loaded {
	t.Helper()
	settings := Settings{Zone: "cluster.local", silence: time.Hour}
	spec, err := loadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	if err := adapt(spec, settings); err != nil {
		t.Fatal(err)
	}
	spec.Maps[datapathMapNames].MaxEntries = leastNames // it does not grow here
	for _, f := range change {
		f(spec)
	}
	collection, err := ebpf.NewCollection(spec)
	if err != nil {
		needKernel(t, err)
	}
	t.Cleanup(collection.Close)
	l := New(settings)
	l.host = &datapath{settings: settings, Folder: pinned.Folder{Maps: collection.Maps}, lifetime: collection.Variables[datapathVarTtl]}
	l.tables = tablesOf(collection.Maps)
	p := &loaded{t: t, layer: l, program: collection.Programs[datapathProgDnsFromPod], out: make([]byte, 2048)}
	p.words, err = outcomeNames(spec)
	must(t, err)
	p.apply(snapshot)
	return p
}

func (p *loaded) apply(snapshot *model.Snapshot) {
	p.t.Helper()
	have, err := p.layer.tables.read("cluster.local")
	if err != nil {
		p.t.Fatal(err)
	}
	want := p.layer.Plan(snapshot).(*Picture)
	want.ports = false
	prune := snapshot.Complete && snapshot.Unread == 0
	now, _, err := p.layer.Apply(have, want, p.layer.Diff(have, want, prune))
	if err != nil {
		p.t.Fatal(err)
	}
	if p.mirror == nil {
		p.mirror = &mirror{zone: "cluster.local", outside: map[string]learned{}}
	}
	p.mirror.rows, p.mirror.whole = now.(*Picture).names, want.whole
	p.serial = want.serial
}

// learn tells the program and the mirror of names outside.
func (p *loaded) learn(of ...Outside) {
	p.t.Helper()
	must(p.t, p.layer.Learn(of))
	now := time.Now()
	for _, o := range of {
		o.A.Until, o.AAAA.Until = soonest(o.A, now), soonest(o.AAAA, now)
		p.mirror.outside[strings.ToLower(strings.TrimSuffix(o.Name, "."))] = learned{o, now}
	}
}

// soonest is when the first of what makes an answer has run out.
func soonest(known Known, now time.Time) time.Time {
	if known.Stale {
		return known.Until
	}
	all := []time.Time{known.Until}
	for _, alias := range known.Chain {
		all = append(all, now.Add(alias.TTL))
	}
	return slices.MinFunc(all, time.Time.Compare)
}

// search gives the pod a search list. Frames of tests come in by the loopback device.
func (p *loaded) search(domains ...string) {
	p.t.Helper()
	list, ok := searchListOf(5, domains)
	if !ok {
		p.t.Fatalf("%v is no search list", domains)
	}
	if errs := p.layer.tables.searches.Put([]uint32{1}, []datapathSearchList{list}); errs != nil {
		p.t.Fatal(errs)
	}
	p.mirror.search = domains
}

// run gives the program a frame. It returns what it says and the frame after it.
func (p *loaded) run(frame []byte) (uint32, []byte) {
	p.t.Helper()
	options := ebpf.RunOptions{Data: frame, DataOut: p.out}
	verdict, err := p.program.Run(&options)
	if err != nil {
		p.t.Fatal(err)
	}
	return verdict, options.DataOut
}
