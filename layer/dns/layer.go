package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
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
	// TTL is how long records may be kept where the DNS servers' configuration is not
	// known, in whole seconds; 0 is DefaultTTL.
	TTL time.Duration
	// Netns is the path of the node's network namespace; empty for this process's own.
	Netns string
	// Pins is the folder in a bpf file system for maps and links; it is the layer's
	// alone.
	Pins string
	// Heard says when the source last knew what the cluster asks for; nil is always now.
	Heard func() time.Time
	// names is how many there may be; 0 is what the node's memory allows. room is for how
	// many the map is made; 0 is firstNames. Tests choose them.
	names, room int
	// silence is how long the agent may be silent; 0 is mostSilence. Tests choose it.
	silence time.Duration
	// pace is the time between two queries of a device that are handed up, and of all; 0
	// is as in waiting.h. Tests choose it.
	pace time.Duration
	// patience is how long a query that was handed up may wait; 0 is mostPatience. Tests
	// choose it: a busy machine begins an agent in more.
	patience time.Duration
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
	// DenyFor is how long after the source last knew the cluster names are said not to
	// exist. The source tries again every 22 s at the latest, and the Corefile of kubeadm has
	// the DNS servers keep their own answers for 30 s (cache 30).
	DenyFor = 30 * time.Second
	// SayFor is how long after that names are still said to lead anywhere, where the DNS
	// servers can answer, and how long after the agent was last heard of, where they cannot.
	// Pods of a node that is cut off are made anew elsewhere after 300 s
	// (https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/), so
	// that addresses may be others' from then on; kubelet starts a container that ends again
	// and again every 300 s (https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/).
	SayFor = 5 * time.Minute
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
	// number is that of the entry written last.
	number atomic.Uint64
	// learning is held while names outside are written, and while the layer opens and closes.
	learning sync.Mutex
	learned  int // names outside that there are; guarded by learning
	files    *files

	mu sync.Mutex // guards what follows
	// known is what the programs are told of at each beat; nil before a Snapshot was applied.
	known   *knowledge
	applied int
	// serving says that Serve runs.
	serving bool
}

// knowledge is what is known of the names that are written.
type knowledge struct {
	serial uint32
	// whole says that other names do not exist, served that the DNS servers can answer.
	whole, served bool
	// left is why they are to answer for the whole zone.
	left string
	// cut is how many names were left out for want of room.
	cut int
}

// words are what the programs are told: for how long what is written may be said, also that
// a name has no address of a family if all of it is written, and for how long that other
// names do not exist.
type words struct {
	serial       uint32
	complete     bool
	known, whole time.Duration
}

// says is what may be said when the source last knew the cluster so long ago. The programs
// say nothing but what is known for SayFor when the agent is gone, and that only where
// nobody else can.
func (k *knowledge) says(ago, silence time.Duration) words {
	w := words{serial: k.serial, complete: k.whole}
	if ago <= SayFor || !k.served {
		w.known = silence
	}
	if !k.served {
		w.known = max(silence, SayFor)
	}
	if k.whole && ago <= DenyFor {
		w.whole = silence
	}
	return w
}

// tables are the maps with their types.
type tables struct {
	names     bpfmap.Table[datapathName, datapathAddresses]
	resolvers bpfmap.Table[uint32, datapathResolverList]
	outside   bpfmap.Table[datapathName, datapathOutsideName]
	searches  bpfmap.Table[uint32, datapathSearchList] // by the index of the pod's device
	writings  bpfmap.Table[datapathTable, uint64]
}

// replaceResolver puts an address of the DNS Service where another one is, or the zero value.
func (t tables) replaceResolver(old, new datapathAddress) error {
	all, _, err := t.resolvers.Get(0)
	if err != nil {
		return err
	}
	i := slices.Index(all.Address[:], old)
	if i < 0 {
		return fmt.Errorf("there is room for %d addresses", len(all.Address))
	}
	all.Address[i] = new
	return errors.Join(t.resolvers.Put([]uint32{0}, []datapathResolverList{all})...)
}

// begin tells the programs that a table of names is being written: until end they do not
// say that a name is not there, and look again for what they find.
func (t tables) begin(table datapathTable) error {
	number, _, err := t.writings.Get(table)
	if err == nil && number&1 == 0 {
		err = errors.Join(t.writings.Put([]datapathTable{table}, []uint64{number + 1})...)
	}
	if err != nil {
		return fmt.Errorf("tell the dns program that names are being written: %w", err)
	}
	return nil
}

// end tells them that it was written, or may have been.
func (t tables) end(table datapathTable) error {
	number, _, err := t.writings.Get(table)
	if err == nil {
		err = errors.Join(t.writings.Put([]datapathTable{table}, []uint64{(number | 1) + 1})...)
	}
	if err != nil {
		return fmt.Errorf("tell the dns program that names were written: %w", err)
	}
	return nil
}

// host is what the layer needs of the kernel beside its tables.
type host interface {
	// beat tells the programs that the agent is there, and what they may say.
	beat(words) error
	// ttl is how long records may be kept, in seconds.
	ttl() (uint32, error)
	setTTL(seconds uint32) error
	// devices lists the node's devices; attach and detach change one of them.
	devices() ([]device, error)
	attach(device) error
	detach(device) error
	// lost lists what somebody took away; restore brings it back.
	lost() []lost
	restore() error
	// grow makes room for so many names; from take on the host works with it.
	grow(room int) (take func() error, err error)
	// names is the map of them.
	names() *ebpf.Map
	// settle puts programs in force that waited for names.
	settle() error
	// server begins to answer what is handed up.
	server() (*server, error)
	describe(*layer.Description) error
	close()
}

var _ layer.Layer = (*Layer)(nil)

// New makes the layer. It touches nothing before Open.
func New(settings Settings) *Layer {
	if settings.names == 0 {
		settings.names = mostNames(memory())
	}
	return &Layer{settings: settings, files: newFiles()}
}

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
	now, err := sinceBoot()
	if err != nil {
		d.close()
		return err
	}
	// An earlier process' numbers are smaller: none writes an entry a nanosecond.
	l.number.Store(now)
	l.learning.Lock()
	defer l.learning.Unlock()
	l.host, l.tables = d, tablesOf(d.Maps)
	left, err := l.tables.outside.All() // an earlier process'
	if err != nil {
		d.close()
		l.host = nil
		return fmt.Errorf("read the names outside the cluster: %w", err)
	}
	l.learned = len(left)
	return nil
}

func tablesOf(maps map[string]*ebpf.Map) tables {
	return tables{
		names:     bpfmap.New[datapathName, datapathAddresses](maps[datapathMapNames]),
		resolvers: bpfmap.New[uint32, datapathResolverList](maps[datapathMapResolvers]),
		outside:   bpfmap.New[datapathName, datapathOutsideName](maps[datapathMapOutside]),
		searches:  bpfmap.New[uint32, datapathSearchList](maps[datapathMapSearches]),
		writings:  bpfmap.New[datapathTable, uint64](maps[datapathMapWritings]),
	}
}

// Read implements layer.Layer.
func (l *Layer) Read() (layer.Picture, error) {
	picture, err := l.tables.read(l.settings.Zone)
	if err != nil {
		return nil, err
	}
	picture.lost = l.host.lost()
	ttl, err := l.host.ttl()
	if err != nil {
		return nil, err
	}
	picture.ttl = lifetime(ttl)
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
	resolvers, _, err := t.resolvers.Get(0)
	if err != nil {
		return nil, err
	}
	for _, addr := range resolvers.Address {
		if addr != (datapathAddress{}) {
			picture.resolvers[fromAddress(addr)] = true
		}
	}
	searches, err := t.searches.All()
	for index, entry := range searches {
		picture.searches[index] = listIn(index, entry)
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
	for _, d := range devices {
		picture.nameDevice(d.Index, d.Name)
	}
	l.files.refresh(picture)
	return picture, nil
}

// Watch implements layer.Layer: devices come and go with pods, and the search lists in
// them change. Meanwhile it tells the programs that the agent is there.
func (l *Layer) Watch(ctx context.Context, changed func()) error {
	var beside sync.WaitGroup
	defer beside.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	beside.Go(func() {
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
	beside.Go(func() { l.files.follow(ctx, l.settings.Netns, changed) })
	err := link.Watch(ctx, l.settings.Netns, func() { changed(); l.files.stir() })
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
	if l.known == nil || l.host == nil {
		return nil
	}
	return l.host.beat(l.known.says(l.settings.ago(), cmp.Or(l.settings.silence, mostSilence)))
}

// ago is how long ago the source last knew the cluster.
func (s Settings) ago() time.Duration {
	if s.Heard == nil {
		return 0
	}
	return time.Since(s.Heard())
}

// assert sets what the programs are told of the names, which are written.
func (l *Layer) assert(wish *Picture, whole bool) error {
	l.mu.Lock()
	l.known = &knowledge{serial: wish.serial, whole: whole, served: wish.served, left: wish.left, cut: wish.over}
	l.mu.Unlock()
	if err := l.beat(); err != nil {
		return err // what they were told before may not be said of these names
	}
	return l.tables.end(datapathTableTABLE_NAMES)
}

// Look implements layer.Layer: it reads the pinned maps. A pin folder without names is an
// empty picture. It needs CAP_BPF or CAP_SYS_ADMIN.
func (l *Layer) Look() (layer.Picture, error) {
	opened, absent, err := bpfmap.Look(l.settings.Pins, datapathMapNames, datapathMapResolvers, datapathMapSearches)
	if errors.Is(err, fs.ErrNotExist) {
		if absent == datapathMapNames {
			return newPicture(l.settings.Zone), nil
		}
		return nil, fmt.Errorf("read the names in %s: map %s is missing, they are another version's: use the millrace that made them", l.settings.Pins, absent)
	}
	if err != nil {
		return nil, err
	}
	defer bpfmap.CloseAll(opened)
	if err := sameLayout(opened); err != nil {
		return nil, fmt.Errorf("read the names in %s: %w", l.settings.Pins, err)
	}
	picture, err := tablesOf(opened).read(l.settings.Zone)
	if err == nil {
		err = picture.nameDevices(l.settings.Netns)
	}
	return picture, err
}

// Apply implements layer.Layer. As long as a name could not be written, no name is
// said not to exist. The result is have, altered.
func (l *Layer) Apply(have, want layer.Picture, changes layer.Changes) (layer.Picture, layer.Changes, error) {
	picture, wish := have.(*Picture), want.(*Picture)
	var failures []error
	var done, rows layer.Changes
	if !wish.whole {
		failures = appendError(failures, l.assert(wish, false))
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
	names := len(picture.names) // the most at a time: names are removed last
	for _, change := range changes {
		switch change.Subject.(type) {
		case *Row:
			rows = append(rows, change)
			if change.Op == layer.Add {
				names++
			}
		case lost:
			first = append(first, change)
		default:
			last = append(last, change)
		}
	}
	each(first)
	failures = appendError(failures, l.makeRoom(names))
	if len(rows) > 0 {
		if err := l.tables.begin(datapathTableTABLE_NAMES); err != nil {
			return picture, done, errors.Join(append(failures, err)...)
		}
	}
	written, err := l.write(picture, rows)
	done = append(done, written...)
	failures = appendError(failures, err)
	torn := err != nil
	if torn {
		failures = appendError(failures, l.assert(wish, false))
	}
	each(last)
	if !torn {
		failures = appendError(failures, l.assert(wish, wish.whole))
	}
	l.mu.Lock()
	l.applied = len(picture.names)
	l.mu.Unlock()
	return picture, done, errors.Join(failures...)
}

// makeRoom sees to it that the map has room for so many names, also for those that are about
// to be removed. What does not fit is not written.
func (l *Layer) makeRoom(names int) error {
	room := roomFor(names)
	if room <= l.tables.names.Capacity() {
		return nil
	}
	take, err := l.host.grow(room)
	if err == nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		err = take()
		l.tables.names = bpfmap.New[datapathName, datapathAddresses](l.host.names())
	}
	if err != nil {
		return fmt.Errorf("make room for %d names: %w", room, err)
	}
	return nil
}

// roomFor is for how many names the map is made where there are so many: the next power of
// two, as the kernel makes it.
func roomFor(names int) int { return 1 << bits.Len(uint(max(names, 1)-1)) }

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
		entries[i].Number = l.number.Add(1)
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
		none, addr := datapathAddress{}, addressOf(netip.Addr(s))
		if change.Op == layer.Remove {
			return l.tables.replaceResolver(addr, none)
		}
		return l.tables.replaceResolver(none, addr)
	case lifetime:
		return l.host.setTTL(uint32(s))
	case *SearchList:
		key := []uint32{s.index}
		if change.Op == layer.Remove {
			return errors.Join(l.tables.searches.Delete(key)...)
		}
		return errors.Join(l.tables.searches.Put(key, []datapathSearchList{s.entry()})...)
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
	case lifetime:
		p.ttl = s
	case *SearchList:
		if p.searches[s.index] = s; gone {
			delete(p.searches, s.index)
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
	if l.known != nil {
		d.Degraded = append(d.Degraded, l.known.degraded(l.settings)...)
	}
	l.mu.Unlock()
	l.files.describe(&d)
	d.Settings = map[string]string{"zone": l.settings.Zone, "service": l.settings.service().String()}
	if err := l.host.describe(&d); err != nil {
		return d, err
	}
	l.learning.Lock()
	defer l.learning.Unlock()
	for i, m := range d.Maps {
		if m.Name == datapathMapOutside {
			d.Maps[i].Entries = l.learned
		}
	}
	return d, nil
}

// degraded says what is not said here, and why.
func (k *knowledge) degraded(settings Settings) (texts []string) {
	say := func(format string, args ...any) { texts = append(texts, fmt.Sprintf(format, args...)) }
	says, ago := k.says(settings.ago(), mostSilence), settings.ago().Round(time.Second)
	switch {
	case k.left != "":
		say("all names are left to the cluster's DNS servers: %s", k.left)
	case says.known == 0:
		say("the cluster's DNS servers are asked for every name: the source was last well %v ago", ago)
	case k.whole && says.whole == 0:
		say("names that are not known here are asked of the cluster's DNS servers: the source was last well %v ago", ago)
	case k.cut > 0:
		say("%d names and those that are not known here are asked of the cluster's DNS servers: there is room for %d, by the node's memory", k.cut, settings.names)
	case !k.whole:
		say("names that are not known here are asked of the cluster's DNS servers: not all Services of the cluster are known")
	}
	if !k.served {
		say("the cluster's DNS servers cannot answer what is asked of them: no endpoint of Service %s is ready", settings.service())
	}
	return texts
}

// Close implements layer.Layer.
func (l *Layer) Close() error {
	l.learning.Lock()
	defer l.learning.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.host != nil {
		l.host.close()
	}
	l.host, l.known = nil, nil
	return nil
}

// Leave implements layer.Layer: nothing that the layer does lasts longer than a query.
func (l *Layer) Leave() (layer.Changes, error) { return nil, nil }

// Left implements layer.Layer.
func (l *Layer) Left() (int, error) { return 0, nil }

// Removal implements layer.Layer.
func (l *Layer) Removal() (layer.Changes, error) { return removal(l.settings) }

// Remove implements layer.Layer. What an agent that was killed had taken goes on to the DNS
// Service first. It returns layer.ErrInUse while a process has the
// layer open, this one too.
func (l *Layer) Remove() (layer.Changes, error) {
	changes, err := l.Removal()
	if err != nil {
		return nil, err
	}
	return changes.RemoveAlone(l.settings.Pins, func() { giveAllBack(l.settings) })
}
