package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Settings are where the layer works, and how. Where has no default here: the
// command line knows the host's.
type Settings struct {
	// Cgroup is the cgroup2 folder whose processes, and those of all groups
	// below it, are served.
	Cgroup string
	// Netns is the path of the node's network namespace; empty for this
	// process's own.
	Netns string
	// Path serves where neither a Service nor a pod asks for one; empty is
	// PathSocket.
	Path Path
	// Seen is the Service that is served by packets whatever it asks for, because
	// somebody has to see what is sent to it; the zero value is none.
	Seen model.Name
	// Conntrack says whether connections between pods are tracked; empty is
	// ConntrackAuto.
	Conntrack Conntrack
	// Flows is how many flows of the packet path are remembered at once; 0 is
	// DefaultFlows. A flow takes about 350 bytes of kernel memory.
	Flows int
	// Drain is how long TCP connections to an endpoint that is gone may go on; 0 is
	// DefaultDrain.
	Drain time.Duration
	// Wire says that packets that come from other machines are served, too: node
	// ports, external and load balancers' addresses, and ClusterIPs.
	Wire bool
	// NodePortAddresses are those of the node's addresses that have node ports; nil
	// is all.
	NodePortAddresses []netip.Prefix
	// NodePortPrimary says that only the node's primary addresses have them.
	NodePortPrimary bool
	// ClusterCIDRs are the ranges of the cluster's pods, whose connections are left
	// out of connection tracking; nil are those of the Snapshot's nodes.
	ClusterCIDRs []netip.Prefix
	// Node is this node's name: its own addresses and pods are those of the
	// Snapshot's node and pods of that name.
	Node string
	// Pins is the folder in a bpf file system for maps and links; it is the
	// layer's alone. Empty pins nothing: all ends with this process.
	Pins string
	// Behind says which program has to see a kind of call at the cgroup before this layer's,
	// 0 for none; nil is never. It would not know the DNS Service by an endpoint's address.
	Behind func(call ebpf.AttachType) ebpf.ProgramID
	// Claim is called, with its index, before the packet path is put in force at a pod's
	// device: whoever hands packets to the pod past the device has to stop. Nil is nobody.
	Claim func(device int) error
}

// path is the path of those who ask for none.
func (s Settings) path() Path {
	if s.Path == "" {
		return PathSocket
	}
	return s.Path
}

// Layer is the service layer. It implements layer.Layer.
type Layer struct {
	settings Settings
	planner  planner
	datapath *datapath
	tables   *tables
	room     room
	// swept is when flows were last swept, part what part of them.
	swept time.Time
	part  int
	// asked says that Services ask for their clients' addresses.
	asked bool
	// bypassed are the ranges in force; whyTracked says why there are none where
	// there should be some.
	bypassed   bypass
	whyTracked string
	// stuck closes sockets whose endpoint is gone; nil until the layer is open.
	stuck *stuck
}

// room is what Apply needs of the datapath.
type room interface {
	// grow makes the tables' maps larger and gives them to the tables.
	grow(t *tables, room capacity) error
	// settle puts programs in force that waited for the tables to be filled.
	settle() error
	// lost lists what somebody took away; restore attaches and pins it again.
	lost() []lost
	restore() error
	// findVeths lists the node's devices, readAsks the namespaces that ask for a
	// path; carryOut changes one of them.
	findVeths() ([]veth, error)
	readAsks() ([]*wish, error)
	readNodeAddresses() ([]netip.Addr, error)
	// readClients and findClients are the namespaces that the programs know, and
	// those that there are; node is the cookie of the node's own.
	readClients() ([]knownClient, error)
	findClients([]veth) []knownClient
	cookie() uint64
	// readTracking reads what there is of connection tracking.
	readTracking() tracking
	// sweep clears expired flows away, one of so many parts.
	sweep(part, parts int) error
	carryOut(layer.Change) error
}

var (
	_ layer.Layer  = (*Layer)(nil)
	_ layer.Server = (*Layer)(nil)
)

// New makes the layer. It touches nothing before Open.
func New(settings Settings) *Layer { return &Layer{settings: settings} }

// Name implements layer.Layer.
func (l *Layer) Name() string { return "service" }

// Serves implements layer.Server.
func (l *Layer) Serves(have layer.Picture) bool { return have.Len() > 0 }

// Plan implements layer.Layer.
func (l *Layer) Plan(snapshot *model.Snapshot) layer.Picture {
	return l.planner.plan(l.settings, snapshot)
}

// Diff implements layer.Layer.
func (l *Layer) Diff(have, want layer.Picture, prune bool) layer.Changes {
	return diff(have.(*Picture), want.(*Picture), prune)
}

// Open implements layer.Layer. It needs CAP_BPF and CAP_NET_ADMIN; errors are
// *need.Privilege, *need.Feature or name the object and the cause.
func (l *Layer) Open() error {
	datapath, err := open(l.settings)
	if err != nil {
		return err
	}
	l.datapath, l.room, l.tables = datapath, datapath, &tables{}
	l.tables.use(datapath.maps)
	l.stuck = newStuck(l.settings, func() map[string]*ebpf.Map { return datapath.maps }, datapath.endFlow)
	return nil
}

// use gives types to the maps.
func (t *tables) use(maps map[string]*ebpf.Map) {
	t.services = bpfmap.New[datapathServiceKey, datapathService](maps[datapathMapServices])
	t.slots = bpfmap.New[datapathSlotKey, uint32](maps[datapathMapSlots])
	t.backends = bpfmap.New[uint32, datapathBackend](maps[datapathMapBackends])
	t.ranges = bpfmap.New[datapathSourceRangeKey, uint8](maps[datapathMapSourceRanges])
	t.ports = bpfmap.New[uint32, datapathPortRange](maps[datapathMapNodePorts])
}

// Read implements layer.Layer: the tables, and what of the programs and pins is
// missing.
func (l *Layer) Read() (layer.Picture, error) {
	picture, err := l.tables.adopt()
	if err != nil {
		return nil, err
	}
	if picture.asks, err = l.room.readAsks(); err != nil {
		return nil, fmt.Errorf("read whose paths are asked for: %w", err)
	}
	if picture.nodeAddresses, err = l.room.readNodeAddresses(); err != nil {
		return nil, err
	}
	if picture.clients, err = l.room.readClients(); err != nil {
		return nil, err
	}
	picture.node = l.room.cookie()
	picture.lost = l.room.lost()
	return l.Refresh(picture)
}

// Refresh implements layer.Layer: which devices are there, which rules, and whose
// sockets are stuck.
func (l *Layer) Refresh(have layer.Picture) (layer.Picture, error) {
	picture := have.(*Picture)
	veths, err := l.room.findVeths()
	if err != nil {
		return nil, fmt.Errorf("find the devices of pods: %w", err)
	}
	picture.veths = veths
	// Before it is known whether somebody asks, those that are known stay.
	picture.found = picture.clients
	if l.asked {
		picture.found = l.room.findClients(veths)
	}
	picture.tracking = l.room.readTracking()
	l.stuck.look()
	if now := time.Now(); now.Sub(l.swept) >= sweepEvery {
		l.swept = now
		l.part = (l.part + 1) % sweepParts
		return picture, l.room.sweep(l.part, sweepParts)
	}
	return picture, nil
}

// sweepEvery is how often a part of the flows that have expired is cleared away,
// and sweepParts how many parts there are.
const (
	sweepEvery = 10 * time.Second
	sweepParts = 6
	// rulesAtMost is how often somebody's changed rules are looked at.
	rulesAtMost = time.Second
)

// Watch implements layer.Layer: devices come and go with pods, flows expire,
// others change their rules.
func (l *Layer) Watch(ctx context.Context, changed func()) error {
	stuck := l.stuck.wake
	go func() {
		for tick := time.NewTicker(sweepEvery); ; {
			select {
			case <-ctx.Done():
				tick.Stop()
				return
			case <-tick.C:
				changed()
			case <-stuck:
				changed()
			}
		}
	}()
	if l.settings.Conntrack != ConntrackKeep {
		// Where it cannot be watched, the tick finds it.
		go nft.Watch(ctx, l.settings.Netns, rulesAtMost, changed)
	}
	return link.Watch(ctx, l.settings.Netns, changed)
}

// Settle implements layer.Layer.
func (l *Layer) Settle() error { return l.room.settle() }

// Apply implements layer.Layer. Maps that would be too small are enlarged
// first; if that fails, what fits in is still applied. The result is have,
// altered.
func (l *Layer) Apply(have, want layer.Picture, changes layer.Changes) (layer.Picture, layer.Changes, error) {
	picture := have.(*Picture)
	known := picture.agrees != nil
	picture.agrees = nil
	inForce := picture.index()
	lost, first, rows, last := partition(changes)
	var done layer.Changes
	var failures []error
	if len(lost) > 0 {
		if err := l.room.restore(); err != nil {
			failures = append(failures, fmt.Errorf("bring back what was taken away: %w", err))
		} else {
			picture.lost, done = nil, lost
		}
	}
	each := func(changes layer.Changes) {
		for _, change := range changes {
			if err := l.room.carryOut(change); err != nil {
				failures = append(failures, fmt.Errorf("%c %s: %w", change.Op, change.Subject.Object(), err))
				continue
			}
			picture.note(change)
			done = append(done, change)
		}
	}
	each(l.withClients(picture, want.(*Picture), first))
	if services, backends := l.tables.need(rows); l.tables.full(services, backends) {
		failures = appendError(failures, l.room.grow(l.tables, roomFor(services, backends)))
	}
	dropped, torn := drops(inForce, rows), false
	for i, err := range l.tables.apply(rows) {
		row := rows[i].Subject.(*Row)
		switch {
		case err != nil:
			torn = true
			failures = append(failures, fmt.Errorf("%c %s: %w", rows[i].Op, row.Object(), err))
			continue
		case rows[i].Op == layer.Remove:
			delete(inForce, row.Frontend)
		default:
			inForce[row.Frontend] = row
		}
		done = append(done, rows[i])
	}
	if torn {
		// A half-written change left the maps other than remembered.
		read, err := l.tables.adopt()
		failures = appendError(failures, err)
		if err == nil {
			read.lost, read.veths, read.asks, read.nodeAddresses, read.tracking = picture.lost, picture.veths, picture.asks, picture.nodeAddresses, picture.tracking
			read.clients, read.found, read.node = picture.clients, picture.found, picture.node
			picture = read
		}
	}
	each(last)
	picture.namePorts(want.(*Picture))
	picture.paths = want.(*Picture).paths // what a drift check compares with
	l.asked = picture.paths.clients
	l.bypassed = picture.tracking.inForce
	_, l.whyTracked = picture.tracking.decide(picture.paths.untracked)
	if len(failures) == 0 {
		picture.agree(want.(*Picture), known)
	}
	l.stuck.applied(picture, want.(*Picture), dropped)
	return picture, done, errors.Join(failures...)
}

// partition tells what was lost, what comes before the rows, the rows, and what
// comes after them, in the order in which diff puts them.
func partition(changes layer.Changes) (losses, first, rows, last layer.Changes) {
	for _, change := range changes {
		switch change.Subject.(type) {
		case lost:
			losses = append(losses, change)
		case *Row:
			rows = append(rows, change)
		default:
			if change.Op == layer.Remove {
				last = append(last, change)
			} else {
				first = append(first, change)
			}
		}
	}
	return losses, first, rows, last
}

func appendError(all []error, err error) []error {
	if err != nil {
		all = append(all, err)
	}
	return all
}

// Describe implements layer.Layer.
func (l *Layer) Describe() (layer.Description, error) {
	if l.datapath == nil {
		return layer.Description{Name: l.Name()}, nil // not open
	}
	d := layer.Description{Name: l.Name(), Objects: len(l.tables.entries), Degraded: slices.Clone(l.datapath.degraded)}
	if l.whyTracked != "" {
		d.Degraded = append(d.Degraded, l.whyTracked)
	}
	d.Settings = map[string]string{"path": string(l.settings.path()), "flows": fmt.Sprint(l.datapath.places()),
		"conntrack": l.conntrackNow()}
	entries := map[string]int{
		datapathMapServices: len(l.tables.entries),
		datapathMapSlots:    l.tables.slotCount,
		datapathMapBackends: l.tables.slotCount,
	}
	for _, name := range tableMaps {
		m := l.datapath.maps[name]
		d.Maps = append(d.Maps, layer.Map{Name: name, Entries: entries[name], Capacity: int(m.MaxEntries()), Bytes: bpfmap.Bytes(m)})
	}
	if l.datapath.packets {
		flows, err := l.datapath.flowCount()
		if err != nil {
			return d, err
		}
		d.Maps = append(d.Maps, layer.Map{
			Name: datapathMapTranslations, Entries: flows, Capacity: l.datapath.places(),
			Bytes: bpfmap.Bytes(l.datapath.maps[datapathMapTranslations]) + bpfmap.Bytes(l.datapath.maps[datapathMapPlaces]),
		})
	}
	for _, hook := range l.datapath.hooks() {
		if attached := l.datapath.attached[hook.name]; attached != nil && attached.Alive() {
			program := layer.Program{Name: hook.program, Hook: hook.attach.String() + " " + l.settings.Cgroup, Link: attached.ID()}
			if hook.device > 0 {
				program.Device = l.datapath.ports[hook.device].name
				program.Hook = hook.attach.String() + " " + program.Device
			}
			d.Programs = append(d.Programs, program)
		}
	}
	var err error
	d.Reasons, err = bpfmap.Counts(l.datapath.maps[datapathMapReasons], l.datapath.reasons)
	l.stuck.describe(&d)
	return d, err
}

// Close implements layer.Layer.
func (l *Layer) Close() error {
	if l.datapath == nil {
		return nil
	}
	err := l.datapath.endBypass()
	l.stuck.close()
	l.stuck = nil
	l.datapath.close()
	l.datapath = nil
	return err
}

// Removal implements layer.Layer: the bypass of connection tracking, which others need
// as soon as they serve, then what is pinned.
func (l *Layer) Removal() (layer.Changes, error) {
	untracked, err := l.bypassRemoval()
	if err != nil {
		return nil, err
	}
	pins, err := l.pinRemoval()
	return append(untracked, pins...), err
}

// pinRemoval is what is pinned, and the filters before it. Only names that this layer
// makes are in it, and only if the folder is in a bpf file system.
func (l *Layer) pinRemoval() (layer.Changes, error) {
	err := isBPF(l.settings.Pins)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	spec, err := loadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read embedded programs: %w", err)
	}
	pins, err := layer.PinsGone(l.settings.Pins, func(name string) bool {
		name = strings.TrimPrefix(name, nextPrefix)
		return spec.Maps[name] != nil || strings.HasPrefix(name, linkPrefix)
	})
	if err != nil || haveTCX() {
		return pins, err
	}
	filters, err := filtersLeft(l.settings)
	return append(filters, pins...), err
}

// Remove implements layer.Layer. It returns layer.ErrInUse while a process has
// the layer open, this one too.
func (l *Layer) Remove() (layer.Changes, error) {
	changes, err := l.Removal()
	if err != nil || len(changes) == 0 {
		return nil, err
	}
	lock, err := lockFolder(l.settings.Pins)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	defer lock.Close()
	return changes.Remove()
}

// Look implements layer.Layer: it reads the pinned maps and what there is of
// connection tracking. A pin folder that does not exist is an empty picture. It
// needs CAP_BPF or CAP_SYS_ADMIN; what it cannot see of tracking without
// CAP_NET_ADMIN does not change.
func (l *Layer) Look() (layer.Picture, error) {
	picture, err := l.lookAtTables()
	if err != nil {
		return nil, err
	}
	picture.tracking = readTracking(nft.In(l.settings.Netns))
	return picture, nil
}

func (l *Layer) lookAtTables() (*Picture, error) {
	spec, err := loadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read embedded programs: %w", err)
	}
	opened := map[string]*ebpf.Map{}
	defer func() {
		for _, m := range opened {
			m.Close()
		}
	}()
	for _, name := range tableMaps {
		m, err := ebpf.LoadPinnedMap(filepath.Join(l.settings.Pins, name), &ebpf.LoadPinOptions{ReadOnly: true})
		if errors.Is(err, fs.ErrNotExist) {
			return inForce(map[Frontend]*Row{}), nil
		}
		if err == nil {
			m, err = inOurLayout(m, spec.Maps[name])
		}
		if err != nil {
			return nil, fmt.Errorf("read pinned map %s: %w", filepath.Join(l.settings.Pins, name), err)
		}
		opened[name] = m
	}
	for _, name := range []string{datapathMapSourceRanges, datapathMapNodePorts} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(l.settings.Pins, name), &ebpf.LoadPinOptions{ReadOnly: true})
		if errors.Is(err, fs.ErrNotExist) { // a version without them
			m, err = ebpf.NewMap(spec.Maps[name])
		}
		if err != nil {
			return nil, fmt.Errorf("read pinned map %s: %w", filepath.Join(l.settings.Pins, name), err)
		}
		opened[name] = m
	}
	t := &tables{}
	t.use(opened)
	picture, _, err := t.read()
	return picture, err
}
