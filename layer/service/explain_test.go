package service

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/tools/txtar"

	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

const explainTable = "testdata/explain.txtar"

// clusterOf reads the words of testdata/explain.txtar.
func clusterOf(t *testing.T, text string) *model.Snapshot {
	t.Helper()
	snapshot := &model.Snapshot{Complete: true}
	var service *model.Service
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] == "#" {
			continue
		}
		switch words[0] {
		case "node":
			snapshot.Nodes = append(snapshot.Nodes, nodeOf(words[1:]))
		case "pod":
			snapshot.Pods = append(snapshot.Pods, podOf(words[1:]))
		case "service":
			service = &model.Service{Name: namedBy(words[1]), Type: model.ClusterIP}
			for _, word := range words[2:] {
				if path, ok := strings.CutPrefix(word, "path="); ok {
					service.Annotations = map[string]string{PathAnnotation: path}
				} else if service.Headless = word == "headless"; !service.Headless {
					service.ClusterIPs = append(service.ClusterIPs, netip.MustParseAddr(word))
				}
			}
			snapshot.Services = append(snapshot.Services, service)
		default:
			service.Ports = append(service.Ports, servicePortOf(t, words))
		}
	}
	return snapshot
}

func nodeOf(words []string) *model.Node {
	n := &model.Node{Name: words[0]}
	for _, word := range words[1:] {
		if address, err := netip.ParseAddr(word); err == nil {
			n.Addresses = append(n.Addresses, address)
		} else if word != "pods" {
			n.PodCIDRs = append(n.PodCIDRs, netip.MustParsePrefix(word))
		}
	}
	return n
}

func podOf(words []string) *model.Pod {
	p := &model.Pod{Name: namedBy(words[0]), Node: words[1]}
	for _, word := range words[2:] {
		if path, ok := strings.CutPrefix(word, "path="); ok {
			p.Annotations = map[string]string{PathAnnotation: path}
		} else if word == "host" {
			p.HostNetwork = true
		} else {
			p.Addresses = append(p.Addresses, netip.MustParseAddr(word))
		}
	}
	return p
}

// servicePortOf reads "http tcp 80: 10.244.1.10:8080@n1 10.244.2.23:8080@n2!draining".
func servicePortOf(t *testing.T, words []string) model.ServicePort {
	t.Helper()
	protocol, err := model.ParseProtocol(words[1])
	if err != nil {
		t.Fatal(err)
	}
	p := model.ServicePort{Name: words[0], Protocol: protocol}
	fmt.Sscan(words[2], &p.Port)
	for _, word := range words[3:] {
		word, state, _ := strings.Cut(word, "!")
		address, node, _ := strings.Cut(word, "@")
		b := model.Backend{Address: netip.MustParseAddrPort(address), Node: node}
		b.Ready = state == ""
		b.Serving, b.Terminating = b.Ready || state == "draining", state == "draining" || state == "gone"
		p.Backends = append(p.Backends, b)
	}
	return p
}

// row is the line of an answer in the table.
func (e *Explanation) row() string {
	words := []string{string(e.Verdict), string(e.Path)}
	if e.Service != "" {
		words = append(words, e.Service+":"+e.Port)
	}
	for _, b := range e.Backends {
		word := b.Address.String() + "@" + b.Node
		if b.Masquerade {
			word += "*"
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

// question is a row of the table.
type question struct {
	line, asked, answer string
	Question
}

// questions reads the rows, with answers or yet without.
func (x *Explainer) questions(t *testing.T, text string) (all []question) {
	t.Helper()
	for line := range strings.Lines(text) {
		q := question{line: strings.TrimRight(line, "\n")}
		q.asked, q.answer, _ = strings.Cut(q.line, " -> ")
		if words := strings.Fields(q.asked); len(words) == 3 && words[0] != "#" {
			var err error
			if q.Question, err = x.Question(words[0], words[1], words[2]); err != nil {
				t.Fatalf("%s: %v", q.line, err)
			}
		}
		all = append(all, q)
	}
	return all
}

func (q *question) blank() bool { return q.Protocol == 0 }

// sound answers, and checks what holds of every answer.
func (x *Explainer) sound(t *testing.T, q Question) Explanation {
	t.Helper()
	e, err := x.Explain(q)
	if err != nil {
		t.Fatal(err)
	}
	sum, masquerade := 0.0, false
	for _, b := range e.Backends {
		sum += b.Probability
		masquerade = masquerade || b.Masquerade
		if b.Probability != 1/float64(len(e.Backends)) {
			t.Errorf("%s: %s has probability %v of %d endpoints", e.row(), b.Address, b.Probability, len(e.Backends))
		}
	}
	switch {
	case (e.Verdict == Forward) != (len(e.Backends) > 0), e.Masquerade != masquerade, e.Text == "":
		t.Errorf("contradicts itself: %+v", e)
	case e.Verdict == Forward && (sum < 0.999999 || sum > 1.000001 || e.Reason != "forwarded"),
		e.Verdict == Refuse && e.Reason != "no_backend", e.Verdict == NotAService && e.Reason != "":
		t.Errorf("the reason or the sum of probabilities, %v, does not fit: %+v", sum, e)
	}
	return e
}

// The table of testdata/explain.txtar: what explain says is what is written
// there, from a Snapshot as well as over the maps of a running layer, and what
// real sockets and real packets meet.
func TestExplainAgreesWithRealPackets(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads programs")
	}
	archive, err := txtar.ParseFile(explainTable)
	if err != nil {
		t.Fatal(err)
	}
	snapshot := clusterOf(t, string(archive.Files[0].Data))
	rows := 0
	for i, path := range []Path{PathSocket, PathPacket} {
		file := &archive.Files[1+i]
		t.Run(string(path), func(t *testing.T) {
			var fresh []string
			lane := newLane(t, path, snapshot)
			for _, q := range lane.source.questions(t, string(file.Data)) {
				if q.blank() {
					fresh = append(fresh, q.line)
					continue
				}
				rows++
				fresh = append(fresh, q.asked+" -> "+lane.compare(t, q))
			}
			file.Data = []byte(strings.Join(fresh, "\n") + "\n")
		})
	}
	t.Logf("%d questions", rows)
	if rows < 150 {
		t.Errorf("%d questions are fewer than 150", rows)
	}
	if *update {
		if err := os.WriteFile(explainTable, txtar.Format(archive), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// lane is a running layer, and two who explain it.
type lane struct {
	*town
	source, live *Explainer
	road         *road
	// port is the last source port used: explain knows of no flows, so each is
	// another (keep_apart() in packet.bpf.c).
	port uint16
}

func newLane(t *testing.T, path Path, snapshot *model.Snapshot) *lane {
	t.Helper()
	l := &lane{town: newTown(t, path, snapshot), port: 20000}
	var err error
	if l.source, err = OpenExplainer(Settings{Node: "n1", Path: path}, Known{Snapshot: snapshot}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.source.Close() })
	// names as the agent tells them, nodes of endpoints as slices do
	known := Known{Snapshot: &model.Snapshot{Pods: snapshot.Pods, Nodes: snapshot.Nodes}}
	for _, subject := range l.layer.Plan(snapshot).Subjects() {
		known.Rows = append(known.Rows, subject.(*Row))
	}
	if l.live, err = OpenExplainer(l.layer.settings, known); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.live.Close() })
	l.road = newRoad(t, &asker{l.live, l.source.names}, 1<<12)
	return l
}

// compare asks both, compares with the table and with what is met, and returns
// the row.
func (l *lane) compare(t *testing.T, q question) string {
	t.Helper()
	e, live := l.source.sound(t, q.Question), l.live.sound(t, q.Question)
	if e.row() != q.answer && !*update {
		t.Errorf("%s:\n     explained as %s,\n     the table has %s", q.asked, e.row(), q.answer)
	}
	for i := range live.Backends { // which slices name and pods do not
		live.Backends[i].Node = e.Backends[i].Node
	}
	if live.row() != e.row() {
		t.Errorf("%s:\n     over the running layer %s,\n     from the source %s", q.asked, live.row(), e.row())
	}
	if err := l.meet(t, &e); err != nil {
		t.Errorf("%s: explained as %s, but %v", q.asked, e.row(), err)
	}
	return e.row()
}

// meet does what was explained.
func (l *lane) meet(t *testing.T, e *Explanation) error {
	if e.Protocol == model.SCTP {
		return l.alone(l.road.fromPod, e)
	}
	switch e.Path {
	case AtPod:
		if err := l.packets(e); err != nil {
			return err
		}
		// and a socket leaves it to the packets
		return l.calls(e, NotAService, nil)
	case FromWire: // no program is there, and where a pod gets it, it is left alone
		return l.alone(l.road.toPod, e)
	}
	return l.calls(e, e.Verdict, e.Backends)
}

// alone runs a program that is to do nothing.
func (l *lane) alone(program *ebpf.Program, e *Explanation) error {
	in, err := frameOf(Question{e.Protocol, e.Source, e.Destination})
	if err != nil {
		return err
	}
	result, out, err := l.road.send(program, in)
	if err != nil {
		return err
	}
	return leave(in, result, out)
}

// packets sends first packets from the pod until every endpoint got one.
func (l *lane) packets(e *Explanation) error {
	left := map[netip.AddrPort]bool{}
	for _, b := range e.Backends {
		left[b.Address] = b.Masquerade
	}
	may := maps.Clone(left)
	for range 1000 {
		l.port++
		from := netip.AddrPortFrom(e.Source.Addr(), l.port)
		p := frame(packetOf(from.Addr(), e.Destination.Addr(), int(e.Protocol), segment(int(e.Protocol), from, e.Destination, flagSYN, nil)))
		clear(l.road.known)
		became, err := l.road.depart(p)
		if err != nil {
			return err
		}
		verdict := verdictOf(p, l.road.last)
		if verdict != e.Verdict {
			return fmt.Errorf("a packet met %s", verdict)
		}
		if verdict != Forward {
			return nil
		}
		masquerade, allowed := may[became.to]
		if !allowed || masquerade != (became.from.Addr() != from.Addr()) {
			return fmt.Errorf("a packet became %s", became)
		}
		if delete(left, became.to); len(left) == 0 {
			return nil
		}
	}
	return fmt.Errorf("of 1000 flows none went to %v", left)
}

// verdictOf tells from what became of a packet what was decided.
func verdictOf(in, out []byte) Verdict {
	was, now := readFrame(in), readFrame(out)
	switch {
	case slices.Equal(in, out):
		return NotAService
	case now.shape == datapathShapeSHAPE_ERROR, now.flags&flagRST != 0:
		return Refuse
	case was.to != now.to:
		return Forward
	}
	return Drop
}

// Asking changes nothing that serves: every entry of every map, and the counters,
// are as before.
func TestExplainChangesNothing(t *testing.T) {
	bed := layertest.NewBed(t)
	s := &street{Bed: bed, t: t}
	archive, err := txtar.ParseFile(explainTable)
	if err != nil {
		t.Fatal(err)
	}
	snapshot := clusterOf(t, string(archive.Files[0].Data))
	s.layer = New(Settings{Cgroup: bed.Cgroup, Netns: bed.NetNS, Pins: filepath.Join(bed.BPF, "service"), Node: "n1"})
	if err := s.layer.Open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.layer.Close()
		New(s.layer.settings).Remove()
	})
	if s.have, err = s.layer.Read(); err != nil {
		t.Fatal(err)
	}
	snapshot.Pods = nil // whose namespaces are not there
	s.become(snapshot)
	x, err := OpenExplainer(s.layer.settings, Known{Snapshot: snapshot})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	before := s.everything()
	for _, q := range x.questions(t, string(archive.Files[1].Data)) {
		if !q.blank() {
			x.sound(t, q.Question)
		}
	}
	if after := s.everything(); after != before {
		t.Errorf("before\n%s\nand after\n%s", before, after)
	}
	if !strings.Contains(before, "services") || !strings.Contains(before, "reasons") {
		t.Fatalf("the test is blind: %s", before)
	}
}

// everything prints all pinned maps that can be listed.
func (s *street) everything() string {
	s.t.Helper()
	var text strings.Builder
	pins, err := os.ReadDir(s.layer.settings.Pins)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(filepath.Join(s.layer.settings.Pins, pin.Name()), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil || m.Type() == ebpf.SkStorage {
			continue // a link, or what is in the sockets
		}
		var lines []string
		key, value := make([]byte, m.KeySize()), any(new([]byte))
		if m.Type() == ebpf.PerCPUArray {
			value = new([][]byte)
		}
		for entries := m.Iterate(); entries.Next(&key, value); {
			lines = append(lines, fmt.Sprintf("%x %x", key, value))
			if m.MaxEntries() > 1<<15 && m.Type() == ebpf.Array && len(lines) > 1<<10 {
				break // places: those taken first are the first
			}
		}
		slices.Sort(lines)
		fmt.Fprintf(&text, "%s %s\n", pin.Name(), strings.Join(lines, "\n"))
		m.Close()
	}
	return text.String()
}

// Each endpoint gets its share of flows: of 30,000 decisions among three, chi
// square with two degrees of freedom is above 41.4 once in a thousand million
// times.
func TestDecideIsFair(t *testing.T) {
	a := newAsker(t, &model.Snapshot{Services: []*model.Service{
		serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080, "10.244.1.1", "10.244.1.2", "10.244.1.3")}})
	frame, err := frameOf(Question{model.TCP, netip.MustParseAddrPort("10.244.9.9:5000"), netip.MustParseAddrPort("10.96.0.1:80")})
	if err != nil {
		t.Fatal(err)
	}
	const n = 30_000
	got := map[netip.AddrPort]int{}
	for range n {
		answer, err := a.run(frame, origin{})
		if err != nil {
			t.Fatal(err)
		}
		got[addressOf(answer.Decision.Backend)]++
	}
	chi := 0.0
	for _, k := range got {
		chi += (float64(k) - n/3) * (float64(k) - n/3) / (n / 3)
	}
	t.Logf("%d decisions: %v, chi square %.2f", n, got, chi)
	if len(got) != 3 || chi > 41.4 {
		t.Errorf("chi square %.1f is above 41.4", chi)
	}
}

// The probability is that of the kernel's slots, whatever leads to how many.
func TestProbabilitiesAreTheKernelsWeights(t *testing.T) {
	a := newAsker(t, &model.Snapshot{Services: []*model.Service{
		serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080, "10.244.1.1", "10.244.1.2", "10.244.1.3", "10.244.1.4")}})
	e := a.tables.entries[Frontend{netip.MustParseAddrPort("10.96.0.1:80"), model.TCP}]
	// three of four slots lead to the first endpoint
	for slot := range uint32(3) {
		if err := errors.Join(a.tables.slots.Put([]datapathSlotKey{{Service: e.inside.id, Slot: slot}}, []uint32{e.inside.slots[0].number})...); err != nil {
			t.Fatal(err)
		}
	}
	answer, err := a.Explain(Question{model.TCP, netip.MustParseAddrPort("127.0.0.1:5000"), netip.MustParseAddrPort("10.96.0.1:80")})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, b := range answer.Backends {
		got[b.Address.String()] = b.Probability
	}
	first, last := e.inside.slots[0].address.String(), e.inside.slots[3].address.String()
	if want := map[string]float64{first: 0.75, last: 0.25}; !maps.Equal(got, want) {
		t.Errorf("probabilities %v, should be %v", got, want)
	}
}

// While a Service changes every answer is one that some moment gave: there are
// endpoints, of one cluster or the other, and their probabilities are whole.
func TestExplainWhileServicesChange(t *testing.T) {
	clusters := []*model.Snapshot{shop("127.0.0.1", "127.0.0.2", "127.0.0.3"), shop("127.0.0.3", "127.0.0.4"), shop("127.0.0.5")}
	s := newStreet(t, clusters[0])
	x, err := OpenExplainer(s.layer.settings, Known{Snapshot: clusters[0]})
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	done := make(chan string)
	go func() { done <- x.askOften(t) }()
	for n := 1; ; n++ {
		s.become(clusters[n%len(clusters)])
		select {
		case asked := <-done:
			t.Logf("%s during %d changes", asked, n)
			return
		default:
		}
	}
}

// askOften asks one question until every number of endpoints was seen.
func (x *Explainer) askOften(t *testing.T) string {
	seen := map[int]bool{}
	asked := 0
	for ; asked < 2000 || len(seen) < 3 && asked < 1_000_000; asked++ {
		e, err := x.Explain(Question{model.TCP, netip.MustParseAddrPort("127.0.0.1:0"), netip.MustParseAddrPort("10.96.0.1:80")})
		if err != nil {
			t.Error(err)
			break
		}
		sum := 0.0
		for _, b := range e.Backends {
			sum += b.Probability
		}
		seen[len(e.Backends)] = true
		if e.Verdict != Forward || sum < 0.999999 || sum > 1.000001 {
			t.Errorf("%s, probabilities %v", e.row(), e.Backends)
			break
		}
	}
	return fmt.Sprintf("%d questions, %d numbers of endpoints,", asked, len(seen))
}
