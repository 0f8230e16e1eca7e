package service

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Verdict is what happens to a packet or a call: the words of enum verdict in
// bpf/verdict.h, as people write them.
type Verdict string

// The verdicts.
const (
	Forward     Verdict = "forward"
	Refuse      Verdict = "refuse"
	Drop        Verdict = "drop"
	NotAService Verdict = "not-a-service"
)

var verdicts = map[datapathVerdict]Verdict{
	datapathVerdictVERDICT_FORWARD:       Forward,
	datapathVerdictVERDICT_REFUSE:        Refuse,
	datapathVerdictVERDICT_DROP:          Drop,
	datapathVerdictVERDICT_NOT_A_SERVICE: NotAService,
}

// Explanation is what happens to the first packet of a flow, and why.
type Explanation struct {
	Protocol    model.Protocol `json:"protocol"`
	Source      netip.AddrPort `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	Verdict     Verdict        `json:"verdict"`
	// Path is where that is decided.
	Path ServedAt `json:"path"`
	// Service is "namespace/name" of the Service that has the destination, and
	// Port the name of its port; empty if it is nobody's or the name is not known.
	Service string `json:"service"`
	Port    string `json:"port,omitempty"`
	// Pod is "namespace/name" of the pod whose hostPort the destination is; empty if it is
	// none.
	Pod string `json:"pod,omitempty"`
	// Backends are those that can be chosen, sorted by address.
	Backends []Choice `json:"backends"`
	// Masquerade says that with one of the backends the packet gets another
	// source address on its way.
	Masquerade bool `json:"masquerade"`
	// Reason is the word of enum reason that is counted for it; empty where
	// nothing is, because the packet is left alone.
	Reason string `json:"reason"`
	// Text says all this in sentences.
	Text string `json:"text"`
}

// Choice is a backend that can be chosen for a flow.
type Choice struct {
	Address netip.AddrPort `json:"address"`
	// Probability is the share of new flows that go there: of the Service's slots
	// in the kernel those that lead to it.
	Probability float64 `json:"probability"`
	// Node is where it runs; empty if that is not known.
	Node string `json:"node"`
	// Masquerade says that with this backend the source becomes the Service's
	// address, because the client is the backend itself, or the node's, because the
	// client and the backend are on other machines.
	Masquerade bool `json:"masquerade"`
}

// Explainer answers what would happen to packets. It runs the program `explain`
// over the Service tables, which parses and decides with the functions of the
// programs in force; every other map that it uses is its own. It changes nothing
// that serves. One answer takes 50 us, with a thousand endpoints 20 ms.
// An Explainer has one user at a time.
type Explainer struct {
	settings Settings
	known    Known
	names    map[Frontend]*Row
	owners   owners
	tables   tables
	maps     map[string]*ebpf.Map
	program  *ebpf.Program
	reasons  []string
	// wire says that packets from other machines are served.
	wire bool
}

// Known is what an Explainer has to know beside the tables.
type Known struct {
	// Snapshot has the pods and nodes, and the Services where they are known. It
	// must not be nil.
	Snapshot *model.Snapshot
	// Rows name Services beside those of the Snapshot.
	Rows []*Row
}

// OpenExplainer makes an Explainer for the tables pinned in a folder
// (settings.Pins), or where that is empty for tables of its own, filled as the
// layer fills them for the Snapshot. settings.Node is the node on which the packet
// is sent or arrives; settings.Path serves where nobody asks for a path. It needs
// CAP_BPF and CAP_NET_ADMIN, which loading a program for packets takes; errors are
// *need.Privilege, *need.Feature or name the object and the cause.
func OpenExplainer(settings Settings, known Known) (*Explainer, error) {
	if err := need.Check("explain", "CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"); err != nil {
		return nil, err
	}
	x := &Explainer{settings: settings, known: known, owners: ownersOf(settings.Node, known.Snapshot)}
	if err := x.open(); err != nil {
		x.Close()
		return nil, err
	}
	return x, nil
}

func (x *Explainer) open() error {
	spec, err := explainSpec()
	if err != nil {
		return err
	}
	if x.reasons, err = reasonNames(spec); err != nil {
		return err
	}
	planned := (&planner{}).plan(x.settings, x.known.Snapshot)
	x.names = planned.index()
	for _, row := range x.known.Rows {
		x.names[row.Frontend] = row
	}
	if x.live() {
		return x.pinned(spec)
	}
	return x.fresh(spec, planned)
}

// live says that the tables are an agent's.
func (x *Explainer) live() bool { return x.settings.Pins != "" }

// askedMaps are what an answer depends on; scratchMaps are an Explainer's own.
var (
	askedMaps = append([]string{datapathMapSourceRanges, datapathMapNodeAddresses, datapathMapNodePorts},
		tableMaps...)
	scratchMaps = []string{datapathMapAffinities, datapathMapClients, datapathMapReasons}
)

// explainSpec is the program explain and the maps that it uses, without the rest
// of the object.
func explainSpec() (*ebpf.CollectionSpec, error) {
	spec, err := loadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read embedded programs: %w", err)
	}
	for name := range spec.Programs {
		if name != datapathProgExplain {
			delete(spec.Programs, name)
		}
	}
	for name := range spec.Maps {
		if name != datapathMapExplained && !slices.Contains(askedMaps, name) && !slices.Contains(scratchMaps, name) {
			delete(spec.Maps, name)
		}
	}
	clear(spec.Variables) // settings of the others
	return spec, nil
}

// fresh makes tables for a plan, and fills them.
func (x *Explainer) fresh(spec *ebpf.CollectionSpec, planned *Picture) error {
	changes, backends := additions(planned.index())
	spec.Maps[datapathMapServices].MaxEntries = uint32(len(changes) + 1)
	spec.Maps[datapathMapSlots].MaxEntries = uint32(backends + 1)
	spec.Maps[datapathMapBackends].MaxEntries = uint32(backends + 1)
	if err := x.load(spec, nil); err != nil {
		return err
	}
	x.tables.entries = map[Frontend]*entry{}
	if err := errors.Join(x.tables.apply(changes)...); err != nil {
		return err
	}
	x.wire = planned.paths.wire
	first, _ := diffNodeAddresses(nil, planned.paths, x.devices(), false)
	for _, change := range first {
		if err := tellAddress(x.maps, change); err != nil {
			return fmt.Errorf("%s: %w", change.Subject.Object(), err)
		}
	}
	return nil
}

// devices stands for those of the node: its addresses as the cluster knows them,
// and loopback.
func (x *Explainer) devices() []veth {
	addresses := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	for _, node := range x.known.Snapshot.Nodes {
		if node.Name == x.settings.Node {
			addresses = append(addresses, node.Addresses...)
		}
	}
	return []veth{{Device: link.Device{Addresses: addresses}}}
}

// additions are what fills empty tables with rows, and how many backends that are.
func additions(rows map[Frontend]*Row) (changes layer.Changes, backends int) {
	for _, row := range rows {
		backends += row.backendCount()
		changes = append(changes, layer.Change{Op: layer.Add, Subject: row})
	}
	return changes, backends
}

// pinned opens the tables of an agent, for reading.
func (x *Explainer) pinned(spec *ebpf.CollectionSpec) error {
	have := map[string]*ebpf.Map{}
	defer func() {
		for _, m := range have {
			m.Close() // the program and the collection hold copies
		}
	}()
	for _, name := range askedMaps {
		pin := filepath.Join(x.settings.Pins, name)
		m, err := ebpf.LoadPinnedMap(pin, &ebpf.LoadPinOptions{ReadOnly: true})
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("open pinned map %s: %w: no agent has run here: name its folder with --pins, or ask without an agent with --source dir:PATH", pin, err)
		}
		if err != nil {
			return fmt.Errorf("open pinned map %s: %w", pin, err)
		}
		have[name] = m
		if !sameLayout(m, spec.Maps[name]) {
			return fmt.Errorf("read pinned map %s: its layout is another version's: ask the millrace that the agent runs", pin)
		}
		spec.Maps[name].MaxEntries = m.MaxEntries()
	}
	x.wire = x.wiresThere()
	return x.load(spec, have)
}

// wiresThere says that the agent serves packets from other machines.
func (x *Explainer) wiresThere() bool {
	m, err := ebpf.LoadPinnedMap(filepath.Join(x.settings.Pins, datapathMapWires), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return false
	}
	defer m.Close()
	var device uint32
	return m.NextKey(nil, &device) == nil
}

func (x *Explainer) load(spec *ebpf.CollectionSpec, have map[string]*ebpf.Map) error {
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: have})
	if err != nil {
		return loadError(err)
	}
	x.maps, x.program = loaded.Maps, loaded.Programs[datapathProgExplain]
	x.tables.use(x.maps)
	return nil
}

// Close frees the program and the maps.
func (x *Explainer) Close() error {
	for _, m := range x.maps {
		m.Close()
	}
	if x.program != nil {
		x.program.Close()
	}
	return nil
}

// Question is the first packet of a flow, or the call that would send it.
type Question struct {
	Protocol model.Protocol
	// Source and Destination are addresses of one family. A source port of 0
	// stands for any.
	Source, Destination netip.AddrPort
}

// Explain answers a question.
func (x *Explainer) Explain(q Question) (Explanation, error) {
	q.Source, q.Destination = unmapped(q.Source), unmapped(q.Destination)
	answer := Explanation{Protocol: q.Protocol, Source: q.Source, Destination: q.Destination, Backends: []Choice{}}
	from := x.origin(q.Source.Addr())
	said, led, err := x.decide(q, from)
	if err != nil {
		return answer, fmt.Errorf("explain %s %s %s: %w", q.Protocol, q.Source, q.Destination, err)
	}
	decision := said.Decision
	held := decision.Service != 0
	if row := x.named(Frontend{q.Destination, q.Protocol}); row != nil && held {
		answer.takes(row)
	}
	answer.Verdict, answer.Path = verdicts[decision.Verdict], from.servedAt(pathOf(uint8(decision.Path)), x.settings.Path)
	if answer.Path == FromWire && !x.wire {
		answer.Verdict = NotAService
	}
	if answer.Verdict == Forward {
		answer.Backends = x.choices(q, answer.Path, decision.Masquerade != 0, led)
		answer.Masquerade = slices.ContainsFunc(answer.Backends, func(c Choice) bool { return c.Masquerade })
	}
	if answer.Verdict != NotAService {
		answer.Reason = x.reasons[decision.Reason]
	}
	answer.Text = answer.text(from, held)
	return answer, nil
}

// takes says whose the destination is.
func (e *Explanation) takes(row *Row) {
	switch {
	case row.Pod != nil:
		e.Pod = row.Pod.String()
	case row.Service.Name != "":
		e.Service, e.Port = row.Service.String(), row.Port
	}
}

// named is the row of an address, or that of the node port that any address of the
// node has.
func (x *Explainer) named(f Frontend) *Row {
	if row := x.names[f]; row != nil {
		return row
	}
	return x.names[f.nodePort()]
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// readRounds is how often tables that change under the reader are read again.
const readRounds = 8

var errUnsettled = errors.New("the Service keeps changing while it is read: ask again")

// decide runs the program, and reads the slots of the Service that it met: the
// address of each backend, as often as slots lead there.
func (x *Explainer) decide(q Question, from origin) (*datapathExplanation, []netip.AddrPort, error) {
	frame, err := frameOf(q)
	if err != nil {
		return nil, nil, err
	}
	for range readRounds {
		answer, err := x.run(frame, from)
		if err != nil {
			return nil, nil, err
		}
		if answer.Decision.Verdict != datapathVerdictVERDICT_FORWARD {
			return answer, nil, nil
		}
		led, err := x.slots(answer.Decision.Service, answer.Decision.Slots)
		if led != nil || err != nil {
			return answer, led, err
		}
	}
	return nil, nil, errUnsettled
}

// run runs the program on one frame and takes its answer.
func (x *Explainer) run(frame []byte, from origin) (*datapathExplanation, error) {
	asked := &datapathExplanation{Origin: datapathOriginORIGIN_POD}
	switch {
	case from.wire:
		asked.Origin = datapathOriginORIGIN_OUTSIDE
	case from.host:
		asked.Origin = datapathOriginORIGIN_NODE
	}
	if err := x.maps[datapathMapExplained].Put(uint32(0), asked); err != nil {
		return nil, fmt.Errorf("write map %s: %w", datapathMapExplained, err)
	}
	verdict, err := x.program.Run(&ebpf.RunOptions{Data: frame})
	if err != nil {
		return nil, err
	}
	answer := &datapathExplanation{}
	if err := x.maps[datapathMapExplained].Lookup(uint32(0), answer); err != nil {
		return nil, fmt.Errorf("read map %s: %w", datapathMapExplained, err)
	}
	answer.Decision.Verdict = datapathVerdict(verdict) // also where nothing was decided
	return answer, nil
}

// slots reads where each slot of a Service leads; nil if one leads nowhere,
// because the Service has changed since.
func (x *Explainer) slots(service, count uint32) ([]netip.AddrPort, error) {
	led := make([]netip.AddrPort, 0, count)
	for i := range count {
		number, ok, err := x.tables.slots.Get(datapathSlotKey{Service: service, Slot: i})
		if err != nil || !ok {
			return nil, err
		}
		backend, ok, err := x.tables.backends.Get(number)
		if err != nil || !ok || backend.Service != service {
			return nil, err
		}
		led = append(led, addressOf(backend))
	}
	return led, nil
}

// choices weighs the backends: each has as many chances as slots lead to it.
func (x *Explainer) choices(q Question, at ServedAt, masquerade bool, led []netip.AddrPort) []Choice {
	chances := map[netip.AddrPort]int{}
	for _, address := range led {
		chances[address]++
	}
	choices := make([]Choice, 0, len(chances))
	for _, address := range slices.SortedFunc(maps.Keys(chances), netip.AddrPort.Compare) {
		choice := Choice{
			Address:     address,
			Probability: float64(chances[address]) / float64(len(led)),
			Node:        x.owners.nodeOf(address.Addr()),
		}
		switch at {
		case AtPod:
			choice.Masquerade = address.Addr() == q.Source.Addr()
		case FromWire:
			choice.Masquerade = masquerade && (choice.Node == "" || choice.Node != x.settings.Node)
		}
		choices = append(choices, choice)
	}
	return choices
}
