package route

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Settings are where the layer works, and how nodes speak to each other. Those but Node
// have to be the same on all nodes.
type Settings struct {
	// Node is this node's name in the cluster.
	Node string
	// Mode says which ways may be taken; empty is ModeAuto.
	Mode Mode
	// Port is the UDP port of VXLAN, VNI the network's number, 1 to 1<<24-1; 0 are what
	// flannel has where it is in the cluster, else DefaultPort and DefaultVNI.
	Port uint16
	VNI  uint32
	// Device is the name of the vxlan device; empty is DefaultDevice.
	Device string
	// Homes is the path of the pinned map that says where the node's own pods are
	// (pod.Homes in the pins of layer/pod), which has to be there before Open; without it
	// pods are found by the node's routes and neighbours.
	Homes string
	// Peer hands packets to pods that are not in it past the node's ends of their veths:
	// only where nothing has to run there, as the service layer's packet path does.
	Peer bool
	// Netns is the path of the node's network namespace; empty for this process's own.
	Netns string
	// Pins is the folder in a bpf file system for maps and links; it is the layer's
	// alone.
	Pins string
}

// Mode says which ways to other nodes may be taken.
type Mode string

const (
	// ModeAuto is direct to nodes on the same segment, if it carries packets of pods'
	// addresses, and VXLAN to all others.
	ModeAuto Mode = "auto"
	// ModeVXLAN is VXLAN to all, whatever segments carry.
	ModeVXLAN Mode = "vxlan"
)

const (
	// DefaultPort is IANA's (RFC 7348, 8.1), FlannelPort flannel's and the kernel's own.
	DefaultPort = 4789
	FlannelPort = 8472
	// DefaultVNI is flannel's
	// (https://github.com/flannel-io/flannel/blob/master/Documentation/backends.md).
	DefaultVNI = 1
	// DefaultDevice is the name of the vxlan device.
	DefaultDevice = "millrace"
	// Protocol is the layer's number in routes (rtm_protocol of rtnetlink(7)): it is nobody's in
	// iproute2's rt_protos, and not that of layer/pod, which would take the routes for its own.
	Protocol = 110
	// metric lets routes of others to the same range win.
	metric = 110
)

func (s Settings) device() string { return cmp.Or(s.Device, DefaultDevice) }

// Layer is the route layer. It implements layer.Layer.
type Layer struct {
	settings Settings
	host     host
	tables   tables
	paths    *paths
	fabrics  *fabrics

	mu     sync.Mutex // guards what follows
	rows   int
	left   []string
	nodes  []netip.Addr // of the others
	speaks network
	said   saying
}

// tables are the maps with their types.
type tables struct {
	remotes  bpfmap.Table[datapathRange, datapathRemote]
	vteps    bpfmap.Table[datapathAddress, datapathVtep]
	gates    bpfmap.Table[uint32, uint32]
	networks bpfmap.Table[uint32, datapathNetwork]
}

// host is what the layer needs of the kernel beside its tables.
type host interface {
	// facts are read anew; ports are the devices at which programs may be.
	facts() (facts, error)
	ports(facts) ([]port, error)
	attach(port) error
	detach(port) error
	// device reads the vxlan device, nil if there is none; makeDevice makes it so and
	// returns its index.
	device() (*device, error)
	makeDevice(*device) (int, error)
	dropDevice() error
	// dropFlannels removes a device of flannel.
	dropFlannels(name string) error
	// routes are the layer's, with To, Via and index; index is the vxlan device's where
	// packets go in VXLAN.
	routes() ([]*Row, error)
	makeRoute(row *Row, device int) error
	dropRoute(*Row) error
	// lost lists what somebody took away; restore brings it back.
	lost() []lost
	restore() error
	settle() error
	describe(*layer.Description) error
	close()
}

var _ layer.Layer = (*Layer)(nil)

// New makes the layer. It touches nothing before Open.
func New(settings Settings) *Layer {
	return &Layer{settings: settings, paths: newPaths(settings.Netns), fabrics: newFabrics(settings.Netns), speaks: networkOf(settings, network{port: DefaultPort, vni: DefaultVNI})}
}

// Name implements layer.Layer.
func (l *Layer) Name() string { return "route" }

// Plan implements layer.Layer: whose pods are where. The ways there depend on the host,
// and Diff chooses them.
func (l *Layer) Plan(snapshot *model.Snapshot) layer.Picture { return plan(l.settings, snapshot) }

// Diff implements layer.Layer.
func (l *Layer) Diff(have, want layer.Picture, prune bool) layer.Changes {
	return diff(l.settings, have.(*Picture), want.(*Picture), prune)
}

// Open implements layer.Layer. It needs CAP_BPF and CAP_NET_ADMIN, and Watch CAP_NET_RAW to
// measure paths and to ask segments: without, Describe says that none is. Errors are *need.Privilege, *need.Feature or name the object and the cause.
func (l *Layer) Open() error {
	d, err := open(l.settings)
	if err != nil {
		return err
	}
	l.host, l.tables = d, tablesOf(d.Maps)
	return nil
}

func tablesOf(maps map[string]*ebpf.Map) tables {
	return tables{
		remotes:  bpfmap.New[datapathRange, datapathRemote](maps[datapathMapRemotes]),
		vteps:    bpfmap.New[datapathAddress, datapathVtep](maps[datapathMapVteps]),
		gates:    bpfmap.New[uint32, uint32](maps[datapathMapGates]),
		networks: bpfmap.New[uint32, datapathNetwork](maps[datapathMapNetworks]),
	}
}

// Read implements layer.Layer.
func (l *Layer) Read() (layer.Picture, error) {
	picture, err := read(l.host, l.tables)
	if err != nil {
		return nil, err
	}
	picture.lost = l.host.lost()
	if picture.facts, err = l.host.facts(); err != nil {
		return nil, err
	}
	picture.measure()
	l.paths.takeOver(picture)
	l.fabrics.takeOver(picture)
	return l.Refresh(picture)
}

// read puts together what routes, maps and devices say.
func read(h host, t tables) (*Picture, error) {
	picture := newPicture()
	var err error
	if picture.device, err = h.device(); err != nil {
		return nil, err
	}
	if err := readNetwork(picture.device, t); err != nil {
		return nil, err
	}
	vteps, err := t.vteps.All()
	if err != nil {
		return nil, err
	}
	for key, entry := range vteps {
		switch a := fromAddress(key); {
		case entry.Device == 0:
			picture.vteps[a] = true
		case picture.device != nil && int(entry.Device) == picture.device.index && entry.Mac == picture.device.MAC:
			picture.device.VTEPs = append(picture.device.VTEPs, a)
		}
	}
	remotes, err := t.remotes.All()
	if err != nil {
		return nil, err
	}
	for key, entry := range remotes {
		row := rowOf(key, entry)
		row.torn = true // until its route is found
		picture.rows[row.To] = row
	}
	gates, err := t.gates.All()
	if err != nil {
		return nil, err
	}
	picture.open = gates[0] != 0
	routes, err := h.routes()
	for _, route := range routes {
		row := picture.rows[route.To]
		if row != nil && row.Direct && route.Via == row.Via && route.index == row.index {
			row.torn, row.set = false, route.set
			continue
		}
		if row != nil && picture.device != nil && route.index == picture.device.index {
			row.torn = row.ownMAC != picture.device.MAC
			row.set = route.set
			continue
		}
		route.torn = row != nil // an entry that is not to be there
		route.Direct = true
		picture.rows[route.To] = route
	}
	return picture, err
}

// Refresh implements layer.Layer: routes of others, devices and their addresses.
func (l *Layer) Refresh(have layer.Picture) (layer.Picture, error) {
	picture := have.(*Picture)
	var err error
	if picture.facts, err = l.host.facts(); err != nil {
		return nil, err
	}
	if picture.ports, err = l.host.ports(picture.facts); err != nil {
		return nil, err
	}
	for _, row := range picture.rows {
		row.Device = cmp.Or(picture.facts.devices[row.index].name, row.Device)
	}
	picture.measure()
	l.paths.aim(picture)
	picture.facts.paths, picture.facts.fabrics = l.paths.all(), l.fabrics.all()
	return picture, nil
}

// Watch implements layer.Layer: devices, addresses and routes to nodes come and go, and
// paths become others.
func (l *Layer) Watch(ctx context.Context, changed func()) error {
	var measuring sync.WaitGroup
	defer measuring.Wait()
	measuring.Go(func() { l.paths.watch(ctx, changed) })
	measuring.Go(func() { l.watchRoutes(ctx, changed) })
	measuring.Go(func() { l.fabrics.watch(ctx, changed) })
	err := link.Watch(ctx, l.settings.Netns, changed)
	if err != nil {
		changed()
		<-ctx.Done()
	}
	return err
}

// Look implements layer.Layer: it reads the pinned maps, the routes and the device. Of a pin
// folder that does not exist the picture has only what the host is like.
func (l *Layer) Look() (layer.Picture, error) {
	d := newDatapath(l.settings)
	opened, _, err := bpfmap.Look(l.settings.Pins, datapathMapRemotes, datapathMapVteps, datapathMapGates, datapathMapNetworks)
	if errors.Is(err, fs.ErrNotExist) {
		picture := newPicture()
		picture.facts, err = d.facts()
		return picture, err
	}
	if err != nil {
		return nil, err
	}
	defer bpfmap.CloseAll(opened)
	if err := sameLayout(opened); err != nil {
		return nil, fmt.Errorf("read the routes in %s: %w", l.settings.Pins, err)
	}
	picture, err := read(d, tablesOf(opened))
	if err != nil {
		return nil, err
	}
	picture.facts, err = d.facts()
	picture.measure()
	picture.facts.paths, picture.facts.fabrics = left(picture), leftBy(picture)
	for _, row := range picture.rows {
		row.Device = picture.facts.devices[row.index].name
	}
	return picture, err
}

// Apply implements layer.Layer. The result is have, altered.
func (l *Layer) Apply(have, want layer.Picture, changes layer.Changes) (layer.Picture, layer.Changes, error) {
	picture, wished := have.(*Picture), want.(*Picture).wish
	var failures []error
	var done layer.Changes
	restored := false
	for _, change := range changes {
		var err error
		if _, gone := change.Subject.(lost); gone && !restored {
			err = l.host.restore()
			restored = err == nil
		} else if !gone {
			err = l.carryOut(picture, change)
		}
		if err != nil {
			failures = append(failures, fmt.Errorf("%c %s: %w", change.Op, change.Subject.Object(), err))
			continue
		}
		picture.note(change)
		done = append(done, change)
	}
	if wished != nil {
		aim := resolve(l.settings, wished, picture.facts)
		picture.left, picture.narrow = aim.left, aim.narrow
		if aim.why != "" && len(aim.rows) > 0 {
			picture.left = append(picture.left, aim.why)
		}
		picture.left = append(picture.left, byStack(picture.ports, aim.wires())...)
		l.fabrics.aim(aim, wished, picture)
	}
	l.paths.aim(picture)
	l.mu.Lock()
	l.rows, l.left = len(picture.rows), slices.Concat(picture.left, picture.narrow)
	if wished != nil {
		l.nodes, l.speaks, l.said = wished.others(), wished.network, wished.say(picture)
	}
	l.mu.Unlock()
	return picture, done, errors.Join(failures...)
}

func (l *Layer) carryOut(have *Picture, change layer.Change) error {
	gone := change.Op == layer.Remove
	switch s := change.Subject.(type) {
	case *device:
		if gone {
			return l.dropDevice(s)
		}
		return l.makeDevice(have, s)
	case vtep:
		key := []datapathAddress{addressOf(netip.Addr(s))}
		if have.device != nil && slices.Contains(have.device.VTEPs, netip.Addr(s)) {
			return nil // it is ours by now, and makeDevice has said so
		}
		if gone {
			return errors.Join(l.tables.vteps.Delete(key)...)
		}
		return errors.Join(l.tables.vteps.Put(key, []datapathVtep{{}})...)
	case *Row:
		if gone {
			return l.dropRow(s)
		}
		return l.makeRow(have, s)
	case port:
		if gone {
			return l.host.detach(s)
		}
		return l.host.attach(s)
	case flannels:
		return l.host.dropFlannels(string(s))
	case gate:
		value := []uint32{1}
		if gone {
			value[0] = 0
		}
		return errors.Join(l.tables.gates.Put([]uint32{0}, value)...)
	}
	return fmt.Errorf("%s: unknown", change.Subject.Object())
}

// makeDevice makes the device, and then says that packets to this node are for it.
func (l *Layer) makeDevice(have *Picture, d *device) error {
	if err := l.putNetwork(d); err != nil {
		return err
	}
	index, err := l.host.makeDevice(d)
	if err != nil {
		return err
	}
	d.index = index
	var failures []error
	for _, a := range d.VTEPs {
		entry := datapathVtep{Device: uint32(index), Mac: d.MAC}
		failures = append(failures, l.tables.vteps.Put([]datapathAddress{addressOf(a)}, []datapathVtep{entry})...)
	}
	if have.device != nil {
		for _, a := range have.device.VTEPs {
			if !slices.Contains(d.VTEPs, a) {
				failures = append(failures, l.tables.vteps.Delete([]datapathAddress{addressOf(a)})...)
			}
		}
	}
	return errors.Join(failures...)
}

func (l *Layer) dropDevice(d *device) error {
	var failures []error
	for _, a := range d.VTEPs {
		failures = append(failures, l.tables.vteps.Delete([]datapathAddress{addressOf(a)})...)
	}
	return errors.Join(append(failures, l.host.dropDevice())...)
}

// makeRow writes the entry before the route that leads to it; of a way that is direct now,
// the route first.
func (l *Layer) makeRow(have *Picture, row *Row) error {
	if row.Direct {
		if err := l.host.makeRoute(row, 0); err != nil {
			return err
		}
		if row.Shortcut {
			return l.putRow(row, &device{})
		}
		return errors.Join(l.tables.remotes.Delete([]datapathRange{rangeOf(row.To)})...)
	}
	if have.device == nil {
		return errors.New("its vxlan device is not there")
	}
	if err := l.putRow(row, have.device); err != nil {
		return err
	}
	return l.host.makeRoute(row, have.device.index)
}

func (l *Layer) putRow(row *Row, d *device) error {
	return errors.Join(l.tables.remotes.Put([]datapathRange{rangeOf(row.To)}, []datapathRemote{entryOf(row, d)})...)
}

func (l *Layer) dropRow(row *Row) error {
	return errors.Join(append(l.tables.remotes.Delete([]datapathRange{rangeOf(row.To)}), l.host.dropRoute(row))...)
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
	d.Objects, d.Degraded = l.rows, append(d.Degraded, l.left...)
	if why := l.said.unsaid(); why != "" {
		d.Degraded = append(d.Degraded, why)
	}
	speaks := l.speaks
	l.mu.Unlock()
	d.Degraded = slices.Concat(d.Degraded, l.paths.unmeasured(), l.fabrics.findings())
	d.Settings = map[string]string{"mode": string(cmp.Or(l.settings.Mode, ModeAuto)), "port": fmt.Sprint(speaks.port), "vni": fmt.Sprint(speaks.vni)}
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

// Leave implements layer.Layer: routes serve all connections or none.
func (l *Layer) Leave() (layer.Changes, error) { return nil, nil }

// Left implements layer.Layer.
func (l *Layer) Left() (int, error) { return 0, nil }

// Removal implements layer.Layer.
func (l *Layer) Removal() (layer.Changes, error) { return removal(l.settings) }

// Remove implements layer.Layer. It returns layer.ErrInUse while a process has the
// layer open, this one too.
func (l *Layer) Remove() (layer.Changes, error) {
	changes, err := l.Removal()
	if err != nil {
		return nil, err
	}
	return changes.RemoveAlone(l.settings.Pins, nil)
}

// addressOf is the kernel's form of an address: both families in 16 bytes.
func addressOf(addr netip.Addr) datapathAddress {
	return datapathAddress{Word: bpfmap.AddrWords(addr)}
}

func fromAddress(a datapathAddress) netip.Addr { return bpfmap.AddrOf(a.Word) }

// rangeOf is the kernel's form of a range: that of IPv4 is 96 bits longer.
func rangeOf(p netip.Prefix) datapathRange {
	return datapathRange{Length: uint32(p.Bits() + 128 - p.Addr().BitLen()), Address: addressOf(p.Masked().Addr())}
}

func fromRange(r datapathRange) netip.Prefix {
	addr := fromAddress(r.Address)
	return netip.PrefixFrom(addr, int(r.Length)-128+addr.BitLen())
}

// entryOf is what the programs know of a way.
func entryOf(row *Row, d *device) datapathRemote {
	entry := datapathRemote{Vtep: addressOf(row.Via), Uplink: uint32(row.index), Mtu: uint16(min(row.MTU, 0xffff)), Mac: row.MAC, OwnMac: d.MAC}
	if row.Local.IsValid() {
		entry.Local = addressOf(row.Local)
	}
	if row.Via.Is4() {
		entry.Ip4 = 1
	}
	if row.Near || row.Direct {
		entry.Near = 1
	}
	if row.Direct {
		entry.Direct = 1
	}
	return entry
}

// rowOf is the way that an entry was made of.
func rowOf(key datapathRange, entry datapathRemote) *Row {
	row := &Row{To: fromRange(key), Via: fromAddress(entry.Vtep), index: int(entry.Uplink), MTU: int(entry.Mtu), ownMAC: entry.OwnMac}
	if entry.Direct != 0 {
		row.Direct, row.Shortcut = true, true
		return row
	}
	row.Local, row.MAC, row.Near = fromAddress(entry.Local), entry.Mac, entry.Near != 0
	return row
}
