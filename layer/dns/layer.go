package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Settings are where the layer works, and for whom.
type Settings struct {
	// Zone is the cluster's domain, "cluster.local".
	Zone string
	// Service is the cluster's DNS Service; the zero value is DefaultService.
	Service model.Name
	// TTL is how long records may be kept, in whole seconds; 0 is DefaultTTL.
	TTL time.Duration
	// Netns is the path of the node's network namespace; empty for this process's own.
	Netns string
	// Pins is the folder in a bpf file system for maps and links; it is the layer's
	// alone.
	Pins string
	// silence is how long the agent may be silent; 0 is mostSilence. Tests choose it.
	silence time.Duration
}

// DefaultService is the name that the DNS Service has in nearly all clusters, whatever
// serves it (https://kubernetes.io/docs/tasks/administer-cluster/dns-custom-nameservers/).
var DefaultService = model.Name{Namespace: "kube-system", Name: "kube-dns"}

const (
	// DefaultTTL is that of CoreDNS' kubernetes plugin
	// (https://coredns.io/plugins/kubernetes/).
	DefaultTTL = 5 * time.Second
	// mostSilence is how long the agent may be silent before every query is passed up.
	mostSilence = 2 * time.Second
	// beatEvery is how often it says that it is there.
	beatEvery = 500 * time.Millisecond
	// batch is how many names are written at once.
	batch = 4096
)

func (s Settings) service() model.Name {
	if s.Service == (model.Name{}) {
		return DefaultService
	}
	return s.Service
}

func (s Settings) ttl() uint32 { return uint32(cmp.Or(s.TTL, DefaultTTL) / time.Second) }

// Layer is the DNS layer. It implements layer.Layer.
type Layer struct {
	settings Settings
	planner  planner
	host     host
	tables   tables

	mu sync.Mutex // guards what follows
	// authority is what the programs are told at each beat; nil before a Snapshot was
	// applied.
	authority *datapathAuthority
	applied   int
}

// tables are the maps with their types.
type tables struct {
	names     bpfmap.Table[datapathName, datapathAddresses]
	resolvers bpfmap.Table[datapathAddress, uint8]
}

// host is what the layer needs of the kernel beside its tables.
type host interface {
	// beat tells the programs that the agent is there.
	beat(datapathAuthority) error
	// devices lists the node's devices; attach and detach change one of them.
	devices() ([]device, error)
	attach(device) error
	detach(device) error
	// lost lists what somebody took away; restore brings it back.
	lost() []lost
	restore() error
	// settle puts programs in force that waited for names.
	settle() error
	describe(*layer.Description) error
	close()
}

var _ layer.Layer = (*Layer)(nil)

// New makes the layer. It touches nothing before Open.
func New(settings Settings) *Layer { return &Layer{settings: settings} }

// Name implements layer.Layer.
func (l *Layer) Name() string { return "dns" }

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
	d, err := open(l.settings)
	if err != nil {
		return err
	}
	l.host, l.tables = d, tablesOf(d.maps)
	return nil
}

func tablesOf(maps map[string]*ebpf.Map) tables {
	return tables{
		names:     bpfmap.New[datapathName, datapathAddresses](maps[datapathMapNames]),
		resolvers: bpfmap.New[datapathAddress, uint8](maps[datapathMapResolvers]),
	}
}

// Read implements layer.Layer.
func (l *Layer) Read() (layer.Picture, error) {
	picture, err := l.tables.read(l.settings.Zone)
	if err != nil {
		return nil, err
	}
	picture.lost = l.host.lost()
	return l.Refresh(picture)
}

func (t tables) read(zone string) (*Picture, error) {
	picture := newPicture(zone)
	entries, err := t.names.All()
	if err != nil {
		return nil, err
	}
	for key, entry := range entries {
		row := rowOf(zone, key, entry)
		picture.names[row.Name] = row
	}
	resolvers, err := t.resolvers.All()
	for addr := range resolvers {
		picture.resolvers[fromAddress(addr)] = true
	}
	return picture, err
}

// Refresh implements layer.Layer: which devices there are.
func (l *Layer) Refresh(have layer.Picture) (layer.Picture, error) {
	picture := have.(*Picture)
	devices, err := l.host.devices()
	if err != nil {
		return nil, fmt.Errorf("find the devices of pods: %w", err)
	}
	picture.devices = devices
	return picture, nil
}

// Watch implements layer.Layer: devices come and go with pods. Meanwhile it tells the
// programs that the agent is there.
func (l *Layer) Watch(ctx context.Context, changed func()) error {
	var beating sync.WaitGroup
	defer beating.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	beating.Go(func() {
		tick := time.NewTicker(beatEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				_ = l.beat() // silence makes the programs pass everything up
			}
		}
	})
	err := link.Watch(ctx, l.settings.Netns, changed)
	if err != nil {
		changed() // it is looked at once a minute
		<-ctx.Done()
	}
	return err
}

// beat tells the programs that the agent is there, if names have been applied.
func (l *Layer) beat() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.authority == nil || l.host == nil {
		return nil
	}
	return l.host.beat(*l.authority)
}

// assert sets what the programs are told of the names.
func (l *Layer) assert(whole bool, serial uint32) error {
	l.mu.Lock()
	l.authority = &datapathAuthority{Serial: serial}
	if whole {
		l.authority.Whole = 1
	}
	l.mu.Unlock()
	return l.beat()
}

// Look implements layer.Layer: it reads the pinned maps. A pin folder that does not
// exist is an empty picture. It needs CAP_BPF or CAP_SYS_ADMIN.
func (l *Layer) Look() (layer.Picture, error) {
	opened := map[string]*ebpf.Map{}
	defer closeMaps(opened)
	for _, name := range []string{datapathMapNames, datapathMapResolvers} {
		path := filepath.Join(l.settings.Pins, name)
		m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true})
		if errors.Is(err, fs.ErrNotExist) {
			return newPicture(l.settings.Zone), nil
		}
		if err != nil {
			return nil, fmt.Errorf("read pinned map %s: %w", path, err)
		}
		opened[name] = m
	}
	if err := sameLayout(opened); err != nil {
		return nil, fmt.Errorf("read the names in %s: %w", l.settings.Pins, err)
	}
	return tablesOf(opened).read(l.settings.Zone)
}

// Apply implements layer.Layer. As long as a name could not be written, no name is
// said not to exist. The result is have, altered.
func (l *Layer) Apply(have, want layer.Picture, changes layer.Changes) (layer.Picture, layer.Changes, error) {
	picture, wish := have.(*Picture), want.(*Picture)
	var failures []error
	var done, rows layer.Changes
	if !wish.whole {
		failures = appendError(failures, l.assert(false, wish.serial))
	}
	restored := false
	each := func(changes layer.Changes) {
		for _, change := range changes {
			var err error
			if _, gone := change.Subject.(lost); gone && !restored {
				err = l.host.restore()
				restored = err == nil
			} else if !gone {
				err = l.carryOut(change)
			}
			if err != nil {
				failures = append(failures, fmt.Errorf("%c %s: %w", change.Op, change.Subject.Object(), err))
				continue
			}
			picture.note(change)
			done = append(done, change)
		}
	}
	var first, last layer.Changes
	for _, change := range changes {
		switch change.Subject.(type) {
		case *Row:
			rows = append(rows, change)
		case lost:
			first = append(first, change)
		default:
			last = append(last, change)
		}
	}
	each(first)
	written, err := l.write(picture, rows)
	done = append(done, written...)
	failures = appendError(failures, err)
	torn := err != nil
	if torn {
		failures = appendError(failures, l.assert(false, wish.serial))
	}
	each(last)
	if !torn {
		failures = appendError(failures, l.assert(wish.whole, wish.serial))
	}
	l.mu.Lock()
	l.applied = len(picture.names)
	l.mu.Unlock()
	return picture, done, errors.Join(failures...)
}

// write carries out the changes of names, those that make some first.
func (l *Layer) write(picture *Picture, rows layer.Changes) (done layer.Changes, err error) {
	var failures []error
	for _, removing := range []bool{false, true} {
		var some layer.Changes
		flush := func() {
			for i, err := range l.writeSome(some, removing) {
				if err != nil {
					failures = append(failures, fmt.Errorf("%c %s: %w", some[i].Op, some[i].Subject.Object(), err))
					continue
				}
				picture.note(some[i])
				done = append(done, some[i])
			}
			some = some[:0]
		}
		for _, change := range rows {
			if (change.Op == layer.Remove) != removing {
				continue
			}
			if some = append(some, change); len(some) == batch {
				flush()
			}
		}
		flush()
	}
	return done, errors.Join(failures...)
}

// writeSome puts or deletes names; it returns an error or nil for each.
func (l *Layer) writeSome(some layer.Changes, removing bool) []error {
	keys := make([]datapathName, len(some))
	entries := make([]datapathAddresses, len(some))
	for i, change := range some {
		row := change.Subject.(*Row)
		keys[i], entries[i] = keyOf(row.Name), entryOf(row)
	}
	var errs []error
	if removing {
		errs = l.tables.names.Delete(keys)
	} else {
		errs = l.tables.names.Put(keys, entries)
	}
	if errs == nil {
		errs = make([]error, len(some))
	}
	return errs
}

func (l *Layer) carryOut(change layer.Change) error {
	switch s := change.Subject.(type) {
	case resolver:
		key := []datapathAddress{addressOf(netip.Addr(s))}
		errs := l.tables.resolvers.Delete(key)
		if change.Op != layer.Remove {
			errs = l.tables.resolvers.Put(key, []uint8{1})
		}
		return errors.Join(errs...)
	case device:
		if change.Op == layer.Remove {
			return l.host.detach(s)
		}
		return l.host.attach(s)
	}
	return fmt.Errorf("%s: unknown", change.Subject.Object())
}

// note puts a change that was made into a picture.
func (p *Picture) note(change layer.Change) {
	gone := change.Op == layer.Remove
	switch s := change.Subject.(type) {
	case lost:
		p.lost = nil
	case *Row:
		if p.names[s.Name] = s; gone {
			delete(p.names, s.Name)
		}
	case resolver:
		if p.resolvers[netip.Addr(s)] = true; gone {
			delete(p.resolvers, netip.Addr(s))
		}
	case device:
		for i := range p.devices {
			if p.devices[i].Index == s.Index {
				p.devices[i].attached = !gone
			}
		}
	}
}

func appendError(all []error, err error) []error {
	if err != nil {
		all = append(all, err)
	}
	return all
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
	d.Objects = l.applied
	if l.authority != nil && l.authority.Whole == 0 {
		d.Degraded = append(d.Degraded, "names that are not known here are asked of the cluster's DNS servers: not all Services of the cluster are known, or there are too many")
	}
	l.mu.Unlock()
	d.Settings = map[string]string{"zone": l.settings.Zone, "service": l.settings.service().String()}
	return d, l.host.describe(&d)
}

// Close implements layer.Layer.
func (l *Layer) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.host != nil {
		l.host.close()
	}
	l.host, l.authority = nil, nil
	return nil
}

// Leave implements layer.Layer: nothing that the layer does lasts longer than a query.
func (l *Layer) Leave() (layer.Changes, error) { return nil, nil }

// Left implements layer.Layer.
func (l *Layer) Left() (int, error) { return 0, nil }

// Removal implements layer.Layer.
func (l *Layer) Removal() (layer.Changes, error) { return removal(l.settings) }

// Remove implements layer.Layer. It returns layer.ErrInUse while a process has the
// layer open, this one too.
func (l *Layer) Remove() (layer.Changes, error) {
	changes, err := l.Removal()
	if err != nil || len(changes) == 0 {
		return nil, err
	}
	if _, err := os.Stat(l.settings.Pins); err == nil {
		lock, err := layer.Lock("pin folder", l.settings.Pins)
		if err != nil {
			return nil, err
		}
		defer lock.Close()
	}
	var done layer.Changes
	var failures []error
	for _, change := range changes {
		if err := change.Subject.(remover).remove(); err != nil {
			failures = append(failures, err)
			continue
		}
		done = append(done, change)
	}
	return done, errors.Join(failures...)
}
