package nodedns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Settings are where the layer works, and for whom.
type Settings struct {
	// Service is the cluster's DNS Service; its queries are sent to the agent.
	Service model.Name
	// Cgroup is the folder of the cgroup2 group whose processes' calls are seen: all of the
	// node's.
	Cgroup string
	// Netns is the path of the node's network namespace; empty for this process's own.
	Netns string
	// Pins is the folder in a bpf file system for maps and links; it is the layer's alone.
	Pins string
	// silence is how long the agent may be silent; 0 is mostSilence. Tests choose it.
	silence time.Duration
	// asked is how long the DNS Service is waited for each time; 0 is askedFor. Tests choose
	// it.
	asked time.Duration
	// rest is how long after an agent that was killed the next one takes no queries; 0 is
	// restAfter. Tests choose it.
	rest time.Duration
}

const (
	// mostSilence is how long after its last beat the agent is taken to be there. It is short:
	// what comes to one that hangs, or whose threads have died and whose sockets are open yet,
	// has to wait, and the DNS Service loses nothing by being asked.
	mostSilence = 500 * time.Millisecond
	// beatEvery is how often it says that it is.
	beatEvery = 100 * time.Millisecond
	// restAfter is how long after the last beat of an agent that was killed the next one takes
	// no new queries: who lost one to it asks again after 5 s (resolv.conf(5), timeout), for
	// the last time, and shall not lose that one, too. Sockets of a process that was killed
	// are open for a moment yet, and a busy machine is slow.
	restAfter = 5*time.Second + beatEvery + 2*time.Second
)

// service is the DNS Service; its name is the same in nearly all clusters
// (https://kubernetes.io/docs/tasks/administer-cluster/dns-custom-nameservers/).
func (s Settings) service() model.Name {
	return cmp.Or(s.Service, model.Name{Namespace: "kube-system", Name: "kube-dns"})
}

// Layer is the layer for what the node itself asks. It implements layer.Layer.
type Layer struct {
	settings Settings
	counts   counts

	mu     sync.Mutex // guards what follows, and is held while the detours are written
	host   host
	tables tables
	// inForce are the addresses that are; deaf is why there is no socket of a family.
	inForce map[datapathFamily]detour
	deaf    map[datapathFamily]error
	serving bool
}

// tables are the maps with their types.
type tables struct {
	detours bpfmap.Table[datapathFamily, datapathDetour]
}

// host is what the layer needs of the kernel beside its tables.
type host interface {
	// lost lists what somebody took away; restore brings it back.
	lost() []lost
	restore() error
	// program is the one that sees a kind of call.
	program(ebpf.AttachType) ebpf.ProgramID
	// own marks a socket as the agent's own.
	own(fd uintptr) error
	// presence opens what tells the programs of the agent.
	presence() (*presence, error)
	describe(*layer.Description) error
	close()
}

var _ layer.Layer = (*Layer)(nil)

// New makes the layer. It touches nothing before Open.
func New(settings Settings) *Layer { return &Layer{settings: settings} }

// Name implements layer.Layer.
func (l *Layer) Name() string { return "nodedns" }

// Plan implements layer.Layer.
func (l *Layer) Plan(snapshot *model.Snapshot) layer.Picture { return plan(l.settings, snapshot) }

// Diff implements layer.Layer.
func (l *Layer) Diff(have, want layer.Picture, prune bool) layer.Changes {
	return diff(have.(*Picture), want.(*Picture), prune)
}

// Open implements layer.Layer. The programs are in force from then on: they do nothing
// before there are addresses and somebody serves. It needs CAP_BPF, CAP_NET_ADMIN and
// CAP_PERFMON; errors are *need.Privilege, *need.Feature or name the object and the cause.
func (l *Layer) Open() error {
	d, err := open(l.settings)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.host, l.tables = d, tablesOf(d.maps)
	return nil
}

func tablesOf(maps map[string]*ebpf.Map) tables {
	return tables{detours: bpfmap.New[datapathFamily, datapathDetour](maps[datapathMapDetours])}
}

// Program is the one of this layer that steers a kind of call, 0 where none does: others that
// translate the DNS Service's address have to see it later.
func (l *Layer) Program(call ebpf.AttachType) ebpf.ProgramID {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.host == nil || !slices.Contains(asking, call) {
		return 0
	}
	return l.host.program(call)
}

// Own marks a socket as one by which the agent asks others, also the DNS Service: what it
// sends is not sent to the agent. It is a net.Dialer's Control, for UDP sockets before they
// are connected. While the layer is not open it does nothing.
func (l *Layer) Own(_, _ string, c syscall.RawConn) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.host == nil {
		return nil
	}
	var marked error
	err := c.Control(func(fd uintptr) { marked = l.host.own(fd) })
	return errors.Join(err, marked)
}

// Read implements layer.Layer.
func (l *Layer) Read() (layer.Picture, error) {
	picture, err := l.tables.read()
	if err != nil {
		return nil, err
	}
	picture.lost = l.host.lost()
	return picture, nil
}

func (t tables) read() (*Picture, error) {
	picture := newPicture()
	for family := range datapathFamilyFAMILY_COUNT {
		by, _, err := t.detours.Get(family)
		if err != nil {
			return nil, fmt.Errorf("read which queries of the node go to the agent: %w", err)
		}
		if by.Service != (datapathAddress{}) {
			picture.detours[family] = detour(fromAddress(by.Service))
		}
	}
	return picture, nil
}

// Refresh implements layer.Layer: there is nothing that others change all the time.
func (l *Layer) Refresh(have layer.Picture) (layer.Picture, error) { return have, nil }

// Watch implements layer.Layer.
func (l *Layer) Watch(ctx context.Context, _ func()) error {
	<-ctx.Done()
	return nil
}

// Look implements layer.Layer: it reads the pinned maps. Where there is no pin folder
// nothing is in force.
func (l *Layer) Look() (layer.Picture, error) {
	opened, _, err := bpfmap.Look(l.settings.Pins, datapathMapDetours)
	if errors.Is(err, fs.ErrNotExist) {
		return newPicture(), nil
	}
	if err != nil {
		return nil, err
	}
	defer bpfmap.CloseAll(opened)
	spec, err := loadDatapath()
	if err == nil {
		err = bpfmap.SameLayout(opened, spec.Maps)
	}
	if err != nil {
		return nil, fmt.Errorf("read the detours in %s: %w", l.settings.Pins, err)
	}
	return tablesOf(opened).read()
}

// Apply implements layer.Layer. The result is have, altered.
func (l *Layer) Apply(have, _ layer.Picture, changes layer.Changes) (layer.Picture, layer.Changes, error) {
	picture := have.(*Picture)
	var failures []error
	var done layer.Changes
	for _, change := range changes {
		if err := l.carryOut(picture, change); err != nil {
			failures = append(failures, fmt.Errorf("%c %s: %w", change.Op, change.Subject.Object(), err))
			continue
		}
		done = append(done, change)
	}
	l.mu.Lock()
	l.inForce = maps.Clone(picture.detours)
	l.mu.Unlock()
	return picture, done, errors.Join(failures...)
}

// carryOut makes one change, and notes it in the picture.
func (l *Layer) carryOut(picture *Picture, change layer.Change) error {
	to, is := change.Subject.(detour)
	if !is { // lost: all of it is brought back with the first
		if picture.lost == nil {
			return nil
		}
		if err := l.host.restore(); err != nil {
			return err
		}
		picture.lost = nil
		return nil
	}
	service := addressOf(netip.Addr(to))
	if change.Op == layer.Remove {
		service = datapathAddress{}
	}
	err := l.change(to.family(), func(by *datapathDetour) { by.Service = service })
	if err != nil {
		return err
	}
	if picture.detours[to.family()] = to; change.Op == layer.Remove {
		delete(picture.detours, to.family())
	}
	return nil
}

// change alters the detour of a family.
func (l *Layer) change(family datapathFamily, alter func(*datapathDetour)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	by, _, err := l.tables.detours.Get(family)
	if err != nil {
		return err
	}
	alter(&by)
	return errors.Join(l.tables.detours.Put([]datapathFamily{family}, []datapathDetour{by})...)
}

// Settle implements layer.Layer: nothing is held back.
func (l *Layer) Settle() error { return nil }

// Describe implements layer.Layer.
func (l *Layer) Describe() (layer.Description, error) {
	d := layer.Description{Name: l.Name()}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.host == nil {
		return d, nil // not open
	}
	d.Objects = len(l.inForce)
	d.Settings = map[string]string{"service": l.settings.service().String()}
	if d.Objects == 0 {
		d.Degraded = append(d.Degraded, fmt.Sprintf("the node's own queries go to the DNS servers: Service %s has no ClusterIP with UDP port %d", l.settings.service(), dnsPort))
	}
	if !l.serving {
		d.Degraded = append(d.Degraded, "the node's own queries go to the DNS servers: the agent does not serve yet")
	}
	for family, err := range l.deaf {
		if to, asked := l.inForce[family]; asked { // else nobody misses it
			d.Degraded = append(d.Degraded, fmt.Sprintf("the node's own queries for %s go to the DNS servers: %v", netip.Addr(to), err))
		}
	}
	if err := l.host.describe(&d); err != nil {
		return d, err
	}
	for word, n := range l.counts.all() {
		d.Reasons[word] = n
	}
	return d, nil
}

// Close implements layer.Layer.
func (l *Layer) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.host != nil {
		l.host.close()
		l.host = nil
	}
	return nil
}

// Leave implements layer.Layer: nothing that the layer does lasts longer than a query.
func (l *Layer) Leave() (layer.Changes, error) { return nil, nil }

// Left implements layer.Layer.
func (l *Layer) Left() (int, error) { return 0, nil }

// Removal implements layer.Layer.
func (l *Layer) Removal() (layer.Changes, error) {
	return layer.PinsGone(l.settings.Pins, func(string) bool { return true })
}

// Remove implements layer.Layer. It returns layer.ErrInUse while a process has the layer
// open, this one too.
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
