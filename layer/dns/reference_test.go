package dns

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/millrace/millrace/model"
)

// mirror says what names.bpf.c has to do, read from docs/decisions/0014-dns.md and not
// from the program.
type mirror struct {
	zone  string
	rows  map[string]*Row
	whole bool
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
		text := lowered(label[1:])
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

// lowered is ASCII lower case; other bytes are as they are (RFC 4343).
func lowered(label []byte) string {
	out := bytes.Clone(label)
	for i, c := range out {
		if 'A' <= c && c <= 'Z' {
			out[i] = c + 'a' - 'A'
		}
	}
	return string(out)
}

// decide is what is to become of a message, and the addresses of the answer.
func (m *mirror) decide(message []byte) (datapathOutcome, question, []netip.Addr) {
	q, ok := readQuestion(message)
	if !ok {
		return datapathOutcomeOUTCOME_NOT_PLAIN, q, nil
	}
	zone := strings.Split(m.zone, ".")
	n := len(q.labels) - len(zone)
	if n < 1 || !equalLabels(q.labels[n:], zone) {
		return datapathOutcomeOUTCOME_NOT_OURS, q, nil
	}
	below := q.labels[:n]
	if len(q.wire)-len(m.zone)-2 > nameLimit {
		return datapathOutcomeOUTCOME_LEFT, q, nil
	}
	row := m.row(below)
	var addresses []netip.Addr
	if row != nil {
		for _, addr := range row.Addresses {
			if addr.Is4() == (q.kind == dnsmessage.TypeA) {
				addresses = append(addresses, addr)
			}
		}
	}
	switch {
	case row != nil && row.Left:
		return datapathOutcomeOUTCOME_LEFT, q, nil
	case len(addresses) > 0:
		return datapathOutcomeOUTCOME_ANSWERED, q, addresses
	case !m.whole:
		return datapathOutcomeOUTCOME_UNSURE, q, nil
	case row != nil:
		return datapathOutcomeOUTCOME_NODATA, q, nil
	}
	return m.absent(below), q, nil
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
}

// load applies a cluster to a program that nobody else uses.
func load(t testing.TB, snapshot *model.Snapshot, change ...func(*ebpf.CollectionSpec)) *loaded {
	t.Helper()
	settings := Settings{Zone: "cluster.local"}
	spec, err := loadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	if err := adapt(spec, settings); err != nil {
		t.Fatal(err)
	}
	if err := spec.Variables[datapathVarSilence].Set(uint64(1) << 62); err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(spec)
	}
	collection, err := ebpf.NewCollection(spec)
	if err != nil {
		needKernel(t, err)
	}
	t.Cleanup(collection.Close)
	l := New(settings)
	l.host = &datapath{settings: settings, maps: collection.Maps, attached: map[int]attachment{}}
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
	p.mirror = &mirror{zone: "cluster.local", rows: now.(*Picture).names, whole: want.whole}
	p.serial = want.serial
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
