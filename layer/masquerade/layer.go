package masquerade

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"net/netip"
	"sync"
	"time"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Settings are where the layer works, and how much it may remember.
type Settings struct {
	// Node is this node's name in the cluster.
	Node string
	// Flows is how many flows there can be at once, a power of two; 0 is DefaultFlows.
	// Another number than an earlier process' ends the flows that are open.
	Flows int
	// Netns is the path of the node's network namespace; empty for this process's own.
	Netns string
	// Pins is the folder in a bpf file system for maps and links; it is the layer's
	// alone.
	Pins string
}

// DefaultFlows is how many flows there can be at once: 6 MiB for their places, and 46 MB
// when all are there.
const DefaultFlows = 131072

func (s Settings) flows() int { return cmp.Or(s.Flows, DefaultFlows) }

// Layer is the masquerade layer. It implements layer.Layer.
type Layer struct {
	settings Settings
	host     host
	tables   tables

	mu    sync.Mutex // guards what follows
	rows  int
	flows int // that live, as of the last sweep
}

// tables are the maps with their types.
type tables struct {
	ranges bpfmap.Table[datapathRange, datapathRangeFlags]
	wires  bpfmap.Table[uint32, datapathWire]
}

// host is what the layer needs of the kernel beside its tables.
type host interface {
	devices() ([]link.Device, error)
	// attach and detach see to both programs of a device.
	attach(link.Device) error
	detach(device int) error
	attachedAt(link.Device) bool
	// lost lists what somebody took away; restore brings it back.
	lost() []lost
	restore() error
	settle() error
	// sweep gives back what flows that have ended hold, and counts the others.
	sweep() (alive int, err error)
	describe(*layer.Description) error
	close()
}

var _ layer.Layer = (*Layer)(nil)

// New makes the layer. It touches nothing before Open.
func New(settings Settings) *Layer { return &Layer{settings: settings} }

// Name implements layer.Layer.
func (l *Layer) Name() string { return "masquerade" }

// Plan implements layer.Layer: which ranges are whose. The devices depend on the host, and
// Diff chooses them.
func (l *Layer) Plan(snapshot *model.Snapshot) layer.Picture { return plan(l.settings, snapshot) }

// Diff implements layer.Layer.
func (l *Layer) Diff(have, want layer.Picture, prune bool) layer.Changes {
	return diff(have.(*Picture), want.(*Picture), prune)
}

// Open implements layer.Layer. It needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; errors are
// *need.Privilege, *need.Feature or name the object and the cause.
func (l *Layer) Open() error {
	if n := l.settings.flows(); bits.OnesCount(uint(n)) != 1 || n > MostFlows {
		return fmt.Errorf("open the masquerade layer: room for %d flows: use a power of two, at most %d", n, MostFlows)
	}
	d, err := open(l.settings)
	if err != nil {
		return err
	}
	l.host, l.tables = d, tablesOf(d.Maps)
	return nil
}

// MostFlows is as many as there are numbers for their places, and more than a node has
// memory for.
const MostFlows = 1 << 24

func tablesOf(maps map[string]*ebpf.Map) tables {
	return tables{
		ranges: bpfmap.New[datapathRange, datapathRangeFlags](maps[datapathMapRanges]),
		wires:  bpfmap.New[uint32, datapathWire](maps[datapathMapWires]),
	}
}

// Read implements layer.Layer.
func (l *Layer) Read() (layer.Picture, error) {
	picture, err := read(l.tables)
	if err != nil {
		return nil, err
	}
	picture.lost = l.host.lost()
	return l.Refresh(picture)
}

// read puts together what the maps say.
func read(t tables) (*Picture, error) {
	picture := newPicture()
	ranges, err := t.ranges.All()
	if err != nil {
		return nil, err
	}
	for key, flags := range ranges {
		to := fromRange(key)
		picture.rows[to] = row{To: to, Native: flags&datapathRangeFlagsRANGE_NATIVE != 0, Own: flags&datapathRangeFlagsRANGE_OWN != 0}
	}
	wires, err := t.wires.All()
	for index, w := range wires {
		name := fmt.Sprintf("device %d", index)
		picture.wires[int(index)] = wire{device: link.Device{Index: int(index), Name: name}, Name: name, IP4: fromAddress(w.Ip4), IP6: fromAddress(w.Ip6)}
	}
	return picture, err
}

// Refresh implements layer.Layer: devices and their addresses.
func (l *Layer) Refresh(have layer.Picture) (layer.Picture, error) {
	picture := have.(*Picture)
	var err error
	if picture.devices, err = l.host.devices(); err != nil {
		return nil, err
	}
	there := map[int]bool{}
	for _, d := range picture.devices {
		there[d.Index] = true
		if w, is := picture.wires[d.Index]; is {
			w.device, w.Name, w.torn = d, d.Name, !l.host.attachedAt(d)
			picture.wires[d.Index] = w
		}
	}
	for index := range picture.wires {
		if !there[index] { // its programs went with it
			if err := errors.Join(l.tables.wires.Delete([]uint32{uint32(index)})...); err != nil {
				return nil, fmt.Errorf("forget a device that went away: %w", err)
			}
			delete(picture.wires, index)
		}
	}
	return picture, nil
}

// sweepEvery is how often the table is looked through for flows that have ended. It is
// a bound of memory, not of room: new flows take the places of ended ones by themselves.
const sweepEvery = 10 * time.Second

// Watch implements layer.Layer: devices and addresses come and go. Meanwhile it sweeps.
func (l *Layer) Watch(ctx context.Context, changed func()) error {
	ctx, end := context.WithCancel(ctx)
	var sweeping sync.WaitGroup
	defer sweeping.Wait()
	defer end()
	sweeping.Go(func() { l.sweepUntil(ctx) })
	err := link.Watch(ctx, l.settings.Netns, changed)
	if err != nil {
		changed()
		<-ctx.Done()
	}
	return err
}

func (l *Layer) sweepUntil(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		if alive, err := l.host.sweep(); err == nil {
			l.mu.Lock()
			l.flows = alive
			l.mu.Unlock()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Look implements layer.Layer: it reads the pinned maps. Where there is no pin folder
// nothing is in force.
func (l *Layer) Look() (layer.Picture, error) {
	picture, err := look(l.settings.Pins)
	if err != nil {
		return nil, err
	}
	picture.devices, err = devices(l.settings.Netns)
	for _, d := range picture.devices {
		if w, is := picture.wires[d.Index]; is {
			w.device, w.Name = d, d.Name
			picture.wires[d.Index] = w
		}
	}
	return picture, err
}

// look reads the maps that are pinned in a folder.
func look(pins string) (*Picture, error) {
	opened, _, err := bpfmap.Look(pins, datapathMapRanges, datapathMapWires)
	if errors.Is(err, fs.ErrNotExist) {
		return newPicture(), nil
	}
	if err != nil {
		return nil, err
	}
	defer bpfmap.CloseAll(opened)
	if err := sameLayout(opened); err != nil {
		return nil, fmt.Errorf("read the ranges in %s: %w", pins, err)
	}
	return read(tablesOf(opened))
}

// Apply implements layer.Layer. The result is have, altered.
func (l *Layer) Apply(have, _ layer.Picture, changes layer.Changes) (layer.Picture, layer.Changes, error) {
	picture := have.(*Picture)
	var failures []error
	var done layer.Changes
	restored := false
	for _, change := range changes {
		var err error
		switch s := change.Subject.(type) {
		case lost:
			if !restored {
				err = l.host.restore()
				restored = err == nil
			}
		case row:
			err = l.writeRow(s, change.Op)
		case wire:
			err = l.writeWire(s, change.Op)
		}
		if err != nil {
			failures = append(failures, fmt.Errorf("%c %s: %w", change.Op, change.Subject.Object(), err))
			continue
		}
		picture.note(change)
		done = append(done, change)
	}
	l.mu.Lock()
	l.rows = len(picture.rows)
	l.mu.Unlock()
	return picture, done, errors.Join(failures...)
}

func (l *Layer) writeRow(r row, op layer.Op) error {
	key := []datapathRange{rangeOf(r.To)}
	if op == layer.Remove {
		return errors.Join(l.tables.ranges.Delete(key)...)
	}
	var flags datapathRangeFlags
	if r.Own {
		flags |= datapathRangeFlagsRANGE_OWN
	}
	if r.Native {
		flags |= datapathRangeFlagsRANGE_NATIVE
	}
	return errors.Join(l.tables.ranges.Put(key, []datapathRangeFlags{flags})...)
}

// writeWire says what packets come from before there is a program, and takes the program
// away first.
func (l *Layer) writeWire(w wire, op layer.Op) error {
	key := []uint32{uint32(w.device.Index)}
	if op == layer.Remove {
		return errors.Join(append(l.tables.wires.Delete(key), l.host.detach(w.device.Index))...)
	}
	value := datapathWire{Ip4: addressOf(w.IP4), Ip6: addressOf(w.IP6)}
	if err := errors.Join(l.tables.wires.Put(key, []datapathWire{value})...); err != nil {
		return err
	}
	return l.host.attach(w.device)
}

// Settle implements layer.Layer.
func (l *Layer) Settle() error { return l.host.settle() }

// Describe implements layer.Layer.
func (l *Layer) Describe() (layer.Description, error) {
	d := layer.Description{Name: l.Name()}
	if l.host == nil {
		return d, nil // not open
	}
	l.mu.Lock()
	d.Objects = l.rows
	d.Maps = []layer.Map{{Name: datapathMapFlows, Entries: l.flows, Capacity: l.settings.flows()}}
	l.mu.Unlock()
	return d, l.host.describe(&d)
}

// Close implements layer.Layer.
func (l *Layer) Close() error {
	if l.host != nil {
		l.host.close()
		l.host = nil
	}
	return nil
}

// Leave implements layer.Layer: it serves all packets of a pod or none.
func (l *Layer) Leave() (layer.Changes, error) { return nil, nil }

// Left implements layer.Layer.
func (l *Layer) Left() (int, error) { return 0, nil }

// Removal implements layer.Layer.
func (l *Layer) Removal() (layer.Changes, error) { return removal(l.settings) }

// Remove implements layer.Layer. It returns layer.ErrInUse while a process has the layer
// open, this one too.
func (l *Layer) Remove() (layer.Changes, error) {
	changes, err := l.Removal()
	if err != nil {
		return nil, err
	}
	return changes.RemoveAlone(l.settings.Pins, nil)
}

// addressOf is the kernel's form of an address: both families in 16 bytes, all zero for
// none.
func addressOf(addr netip.Addr) datapathAddress {
	if !addr.IsValid() {
		return datapathAddress{}
	}
	return datapathAddress{Word: bpfmap.AddrWords(addr)}
}

func fromAddress(a datapathAddress) netip.Addr {
	if a == (datapathAddress{}) {
		return netip.Addr{}
	}
	return bpfmap.AddrOf(a.Word)
}

// rangeOf is the kernel's form of a range: that of IPv4 is 96 bits longer.
func rangeOf(p netip.Prefix) datapathRange {
	return datapathRange{Length: uint32(p.Bits() + 128 - p.Addr().BitLen()), Address: addressOf(p.Masked().Addr())}
}

func fromRange(r datapathRange) netip.Prefix {
	addr := bpfmap.AddrOf(r.Address.Word)
	if addr.Is4() && r.Length >= 96 {
		return netip.PrefixFrom(addr, int(r.Length)-96)
	}
	return netip.PrefixFrom(netip.AddrFrom16(addr.As16()), int(r.Length))
}
