package trace

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Settings say where the layer keeps what outlives the process.
type Settings struct {
	// Pins is a folder in a bpf file system; it is the layer's alone.
	Pins string
	// Whole says that this node is the whole machine. Where it is a namespace of one, as
	// in the lab, the programs would see what happens at its neighbours: it counts
	// nothing there.
	Whole bool
}

// mostTries is how often attaching a program may fail in a row. Then it is left out:
// Services do not depend on it.
const mostTries = 3

// Layer counts drops and the like all the time, also while no agent runs. It implements
// layer.Layer. Its objects are pinned in a folder that is named after the programs, so
// that a process with the same programs has nothing to load, and one with others
// replaces them.
type Layer struct {
	settings Settings
	// attach attaches one program and pins it.
	attach func(probe) error
	// adding are the programs that Apply is to attach; loaded are they, once the first is
	// attached.
	adding []probe
	loaded *ebpf.Collection
	// lacking is why the kernel did not take some of them.
	lacking map[string]error
	lock    *os.File // nil while the layer is not open
	tries   map[string]int
	// refused is why programs are not attached.
	refused map[string]error
	reasons *reasons
}

var _ layer.Layer = (*Layer)(nil)

// New makes the layer. It touches nothing before Open.
func New(settings Settings) *Layer {
	l := &Layer{settings: settings, tries: map[string]int{}, refused: map[string]error{}}
	l.attach = l.attachPinned
	return l
}

// Name implements layer.Layer.
func (l *Layer) Name() string { return "trace" }

// Picture is which programs are in force. It implements layer.Picture.
type Picture struct{ signals []*Signal }

// Signal is one program in force. It implements layer.Subject.
type Signal struct {
	Program    string `json:"program"`
	Tracepoint string `json:"tracepoint"`
	// version is of the programs that it belongs to.
	version string
}

// Object implements layer.Subject.
func (s *Signal) Object() string { return "signal " + s.Tracepoint }

// Detail implements layer.Subject.
func (s *Signal) Detail() string { return "" }

// Len implements layer.Picture.
func (p *Picture) Len() int { return len(p.signals) }

// Subjects implements layer.Picture.
func (p *Picture) Subjects() (all []layer.Subject) {
	for _, s := range p.signals {
		all = append(all, s)
	}
	return all
}

// lasting are the programs that are always in force: what concerns packets. Those that
// see each connection, and each system call, are for millrace trace alone.
func lasting() (all []probe) {
	for _, p := range probes {
		seldom := append([]string{traceProgCall, traceProgState, traceProgSocketError}, onTheWay...) // end sees the ends of connections
		if !slices.Contains(seldom, p.name) {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b probe) int { return strings.Compare(a.tracepoint, b.tracepoint) })
	return all
}

// version names the programs of this process.
func version() string {
	sum := sha256.Sum256(_TraceBytes)
	return fmt.Sprintf("%x", sum[:6])
}

// Plan implements layer.Layer. No Snapshot asks for it.
func (l *Layer) Plan(*model.Snapshot) layer.Picture {
	p := &Picture{}
	if !l.settings.Whole {
		return p
	}
	for _, one := range lasting() {
		p.signals = append(p.signals, &Signal{Program: one.name, Tracepoint: one.tracepoint, version: version()})
	}
	return p
}

// Diff implements layer.Layer. Programs of another version are replaced; what an
// unknown part of the cluster asks for makes no difference here.
func (l *Layer) Diff(have, want layer.Picture, prune bool) (changes layer.Changes) {
	has := have.(*Picture).signals
	for _, w := range want.(*Picture).signals {
		if l.refused[w.Tracepoint] == nil && !slices.ContainsFunc(has, func(h *Signal) bool { return *h == *w }) {
			changes = append(changes, layer.Change{Op: layer.Add, Subject: w})
		}
	}
	for _, h := range has {
		if h.version != version() || want.Len() == 0 && prune {
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: h})
		}
	}
	return changes
}

// Open implements layer.Layer.
func (l *Layer) Open() error {
	if err := os.MkdirAll(l.settings.Pins, 0o700); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	held, err := layer.Lock("pin folder", l.settings.Pins)
	if err != nil {
		return err
	}
	l.lock = held
	return nil
}

// Close implements layer.Layer.
func (l *Layer) Close() error {
	if l.lock == nil {
		return nil
	}
	err := l.lock.Close()
	l.lock = nil
	return err
}

// Read implements layer.Layer.
func (l *Layer) Read() (layer.Picture, error) { return l.Look() }

// linkPrefix is the start of the names of links' pins; their program follows.
const linkPrefix = "link_"

// Look implements layer.Layer.
func (l *Layer) Look() (layer.Picture, error) {
	p := &Picture{}
	versions, err := os.ReadDir(l.settings.Pins)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read pins: %w", err)
	}
	for _, v := range versions {
		pins, err := os.ReadDir(filepath.Join(l.settings.Pins, v.Name()))
		if err != nil {
			return nil, fmt.Errorf("read pins: %w", err)
		}
		for _, pin := range pins {
			name, is := strings.CutPrefix(pin.Name(), linkPrefix)
			if !is {
				continue
			}
			s := &Signal{Program: name, Tracepoint: name, version: v.Name()}
			if at := slices.IndexFunc(probes, func(p probe) bool { return p.name == name }); at >= 0 {
				s.Tracepoint = probes[at].tracepoint
			}
			p.signals = append(p.signals, s)
		}
	}
	slices.SortFunc(p.signals, func(a, b *Signal) int {
		return strings.Compare(a.Tracepoint+a.version, b.Tracepoint+b.version)
	})
	return p, nil
}

// Refresh implements layer.Layer: nobody but us takes the programs away.
func (l *Layer) Refresh(have layer.Picture) (layer.Picture, error) { return have, nil }

// Watch implements layer.Layer.
func (l *Layer) Watch(ctx context.Context, _ func()) error {
	<-ctx.Done()
	return nil
}

// Settle implements layer.Layer.
func (l *Layer) Settle() error { return nil }

// Apply implements layer.Layer. Removals come first, so that no packet is counted
// twice; those that die in the millisecond between are not counted. A program that
// cannot be attached is tried again, and then left out.
func (l *Layer) Apply(have, _ layer.Picture, changes layer.Changes) (layer.Picture, layer.Changes, error) {
	defer l.unload()
	for _, change := range changes {
		if s := change.Subject.(*Signal); change.Op == layer.Add {
			l.adding = append(l.adding, probes[slices.IndexFunc(probes, func(p probe) bool { return p.name == s.Program })])
		}
	}
	now := &Picture{signals: slices.Clone(have.(*Picture).signals)}
	var done layer.Changes
	var failures []error
	for _, op := range []layer.Op{layer.Remove, layer.Add} {
		for _, change := range changes {
			if change.Op != op {
				continue
			}
			s := change.Subject.(*Signal)
			if err := l.apply(op, s); err != nil {
				failures = append(failures, err)
				continue
			}
			if l.refused[s.Tracepoint] != nil {
				continue
			}
			done = append(done, change)
			now.signals = slices.DeleteFunc(now.signals, func(o *Signal) bool { return *o == *s })
			if op == layer.Add {
				now.signals = append(now.signals, s)
			}
		}
	}
	slices.SortFunc(done, func(a, b layer.Change) int { return strings.Compare(a.String(), b.String()) })
	return now, done, errors.Join(failures...)
}

func (l *Layer) apply(op layer.Op, s *Signal) error {
	if op == layer.Remove {
		return l.detach(s)
	}
	at := slices.IndexFunc(probes, func(p probe) bool { return p.name == s.Program })
	err := l.attach(probes[at])
	var lacks *missing
	if err == nil {
		delete(l.tries, s.Tracepoint)
		return nil
	}
	l.tries[s.Tracepoint]++
	if errors.As(err, &lacks) || l.tries[s.Tracepoint] >= mostTries {
		l.refused[s.Tracepoint] = err
		return nil
	}
	return fmt.Errorf("attach %s: %w", s.Tracepoint, err)
}

// missing says that a kernel has no tracepoint of the kind.
type missing struct{ what string }

func (m *missing) Error() string { return m.what }

// load loads the programs that are to be attached, over the pinned maps: all at once,
// so that the kernel's types are read once, and that they share the maps that are not
// pinned.
func (l *Layer) load() error {
	types := btf.NewCache()
	kernel, err := types.Kernel()
	if err != nil {
		return &missing{err.Error()}
	}
	if l.reasons == nil {
		words, err := readReasons(kernel)
		if err != nil {
			return err
		}
		l.reasons = &words
	}
	spec, err := loadTrace()
	if err != nil {
		return err
	}
	l.lacking = map[string]error{}
	var chosen []probe
	for _, p := range l.adding {
		if _, err := adapt(kernel, spec, p); err != nil {
			l.lacking[p.tracepoint] = err
			continue
		}
		chosen = append(chosen, p)
	}
	if len(chosen) == 0 {
		l.loaded = &ebpf.Collection{}
		return nil
	}
	if err := size(spec, &Options{Always: true}); err != nil {
		return err
	}
	folder := filepath.Join(l.settings.Pins, version())
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	for _, name := range pinnedMaps {
		spec.Maps[name].Pinning = ebpf.PinByName
	}
	l.loaded, err = load(spec, chosen, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: folder}, Cache: types},
		func(p probe, why error) { l.lacking[p.tracepoint] = why })
	return err
}

// unload lets go of what was loaded; what is pinned stays in force.
func (l *Layer) unload() {
	if l.loaded != nil {
		l.loaded.Close()
	}
	l.adding, l.loaded, l.lacking = nil, nil, nil
}

// attachPinned attaches one of the programs that are to be added, and pins it.
func (l *Layer) attachPinned(p probe) error {
	if l.loaded == nil {
		if err := l.load(); err != nil {
			return err
		}
	}
	program := l.loaded.Programs[p.name]
	if program == nil {
		return l.lacking[p.tracepoint]
	}
	attached, err := link.AttachTracing(link.TracingOptions{Program: program})
	if err != nil {
		return err
	}
	defer attached.Close()
	return attached.Pin(filepath.Join(l.settings.Pins, version(), linkPrefix+p.name))
}

// detach takes a program out of force, and the folder of its version away with the
// last one.
func (l *Layer) detach(s *Signal) error {
	folder := filepath.Join(l.settings.Pins, s.version)
	if err := os.Remove(filepath.Join(folder, linkPrefix+s.Program)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("detach %s: %w", s.Tracepoint, err)
	}
	pins, err := os.ReadDir(folder)
	if err != nil || slices.ContainsFunc(pins, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), linkPrefix) }) {
		return err
	}
	return os.RemoveAll(folder)
}

// Leave implements layer.Layer: to look begins nothing.
func (l *Layer) Leave() (layer.Changes, error) { return nil, nil }

// Left implements layer.Layer.
func (l *Layer) Left() (int, error) { return 0, nil }

// Removal implements layer.Layer.
func (l *Layer) Removal() (changes layer.Changes, err error) {
	have, err := l.Look()
	if err != nil {
		return nil, err
	}
	for _, s := range have.(*Picture).signals {
		changes = append(changes, layer.Change{Op: layer.Remove, Subject: s})
	}
	return changes, nil
}

// Remove implements layer.Layer.
func (l *Layer) Remove() (layer.Changes, error) {
	held, err := layer.Lock("pin folder", l.settings.Pins)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer held.Close()
	changes, err := l.Removal()
	if err != nil {
		return nil, err
	}
	return changes, os.RemoveAll(l.settings.Pins)
}

// Describe implements layer.Layer. Reasons are the packets that died since the programs
// were first attached.
func (l *Layer) Describe() (layer.Description, error) {
	d := layer.Description{Name: l.Name(), Reasons: map[string]uint64{}, Maps: []layer.Map{}, Programs: []layer.Program{}}
	have, err := l.Look()
	if err != nil {
		return d, err
	}
	d.Objects = have.Len()
	for _, s := range have.(*Picture).signals {
		d.Programs = append(d.Programs, layer.Program{Name: s.Program, Hook: "tracepoint " + s.Tracepoint})
	}
	for _, tracepoint := range slices.Sorted(maps.Keys(l.refused)) {
		d.Degraded = append(d.Degraded, fmt.Sprintf("%s is not counted: %v", tracepoint, l.refused[tracepoint]))
	}
	if d.Objects == 0 {
		return d, nil
	}
	s, err := l.open()
	if err != nil {
		return d, err
	}
	defer s.collection.Close()
	r := &Recording{}
	if err := errors.Join(s.readTotals(r, nil), s.readShares(r), s.readFlows(r)); err != nil {
		return d, err
	}
	for _, f := range r.Flows {
		d.Flows = append(d.Flows, layer.Flow{Space: f.Space, Client: f.Client, Server: f.Server, OfClient: f.OfClient,
			Ended: f.Ended, Refused: f.Refused, Unanswered: f.Unanswered, Reset: f.Reset, Sent: f.Sent, Received: f.Received, Retransmits: f.Retransmits})
	}
	endings, err := s.readEndings()
	if err != nil {
		return d, err
	}
	for how, count := range endings {
		d.Reasons[endingWords[how]] = count
	}
	for _, share := range r.Shares {
		d.Drops = append(d.Drops, layer.Drops{Space: share.Space, Reason: share.Reason, Count: share.Count})
	}
	for _, total := range r.Totals {
		if total.Reason != "" {
			d.Reasons[string(total.Kind)+" "+total.Reason] += total.Count
		}
	}
	for _, name := range pinnedMaps {
		m := s.collection.Maps[name]
		size := layer.Map{Name: name, Capacity: int(m.MaxEntries()), Entries: int(m.MaxEntries())}
		switch name {
		case traceMapEvents, traceMapShares, traceMapFlows:
			size.Entries = entries(m)
		}
		if info, err := m.Info(); err == nil {
			size.Bytes, _ = info.Memlock()
		}
		d.Maps = append(d.Maps, size)
	}
	return d, nil
}

// entries counts those of a hash map.
func entries(m *ebpf.Map) (n int) {
	key, next := make([]byte, m.KeySize()), make([]byte, m.KeySize())
	err := m.NextKey(nil, &next)
	for ; err == nil && n < int(m.MaxEntries()); n++ {
		copy(key, next)
		err = m.NextKey(key, &next)
	}
	return n
}

// open opens what is pinned, to be read.
func (l *Layer) open() (*Session, error) {
	if l.reasons == nil {
		kernel, err := btf.LoadKernelSpec()
		if err != nil {
			return nil, err
		}
		words, err := readReasons(kernel)
		if err != nil {
			return nil, err
		}
		l.reasons = &words
	}
	s := &Session{always: true, reasons: *l.reasons, examples: map[traceEventKey]*sample{}, collection: &ebpf.Collection{Maps: map[string]*ebpf.Map{}}}
	for _, name := range pinnedMaps {
		m, err := ebpf.LoadPinnedMap(filepath.Join(l.settings.Pins, version(), name), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			s.collection.Close()
			return nil, fmt.Errorf("open map %s: %w", name, err)
		}
		s.collection.Maps[name] = m
	}
	return s, nil
}

// Counted is what was counted since the programs were first attached, and when that is:
// First and Last of events are from the start of the machine. The error is
// fs.ErrNotExist where nothing counts.
func (l *Layer) Counted() (*Recording, error) {
	s, err := l.open()
	if err != nil {
		return nil, err
	}
	defer s.collection.Close()
	return s.record()
}
