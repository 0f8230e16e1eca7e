package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
	"github.com/millrace/millrace/model"
)

// Settings are where the layer works, and for whom.
type Settings struct {
	// Node is this node's name in the cluster: its podCIDRs are the ranges.
	Node string
	// Netns is the path of the node's network namespace; empty for this process's own.
	Netns string
	// Folder is where the pods' addresses are written down, and Socket where the plugin
	// asks. Both are the layer's alone.
	Folder, Socket string
	// Pins is the folder in a bpf file system for maps and links; it is the layer's alone.
	// Without one packets between pods take no shortcuts.
	Pins string
	// Plugins is the runtime's folder of plugins, and Networks that of its configurations:
	// the plugin, and a list that names it, are kept there. Where they are empty, somebody
	// else sees to that.
	Plugins, Networks string
	// HostLocal is where the plugin host-local writes which addresses it has given: none of
	// them is given here. Empty where it has given none.
	HostLocal string
	// HostPorts is told which ports of the node lead to pods, when the layer is opened and
	// whenever others do, before an ADD that asks for some returns; those at an address that
	// is not the node's are left out. It may not block. Nil
	// serves none: that is left to the plug-in portmap, where the runtime has it.
	HostPorts func([]model.HostPort) `json:"-"`
	// Cooldown is how long an address rests before it is given again; 0 is
	// pool.DefaultCooldown.
	Cooldown time.Duration
}

func (s Settings) cooldown() time.Duration {
	if s.Cooldown == 0 {
		return pool.DefaultCooldown
	}
	return s.Cooldown
}

func (s Settings) file() pool.File { return pool.File{Path: filepath.Join(s.Folder, "addresses.json")} }

// Layer is the pod layer. It implements layer.Layer. Beside its verbs, the plugin's
// requests come at any time.
type Layer struct {
	settings Settings
	host     host
	server   *cni.Server
	lock     *os.File
	// install is where runtimes find the plugin.
	install installation
	// shortcuts are nil where there are none; whyNone says why.
	shortcuts shortcuts
	whyNone   string

	mu sync.Mutex // guards what follows; not held while the kernel makes or removes devices
	// busy are the interfaces that somebody works on meanwhile; idle tells of each that is
	// done.
	busy map[pool.Key]bool
	idle *sync.Cond
	// done says that somebody was done with an interface.
	done chan struct{}
	// building and removing are for how many interfaces the kernel makes or removes devices.
	building, removing int
	pool               *pool.Pool
	save               func(pool.Book) error
	// told are the hostPorts as they were told last.
	told []model.HostPort
	// services are the cluster's.
	services []*model.Service
	// own are the node's addresses, cluster those that the cluster knows.
	own, cluster []netip.Addr
	// others are the ranges of other nodes, lengths what new pods get by that, and inside
	// what those have that run.
	others  []netip.Prefix
	lengths lengths
	inside  map[pool.Key]lengths
	// unset is of pods whose routes could not be set, and why.
	unset map[pool.Key]string
	// closed is why packets take no shortcuts, as it was seen last.
	closed string
	// aside is where a file was put that could not be read, and why.
	aside string
	// answers counts what became of requests: "add", "add_failed".
	answers map[string]uint64
}

// host is what the layer needs of the kernel.
type host interface {
	// look says what there is of ours, and what of the node matters for it.
	look() (facts, error)
	// build makes a pod's devices, one end in the namespace at space, and all that
	// belongs to them; demolish removes them by the name of the node's end.
	build(pod *Pod, space string, to lengths, sources []netip.Addr) error
	demolish(device string) error
	// mend puts back what is missing on the node's side.
	mend(pod *Pod, sources []netip.Addr) error
	// check lists what is missing on both sides.
	check(pod *Pod, space string) (missing []string, err error)
	// spaces are the paths of pods' namespaces, by their addresses. inside says how long
	// packets of a pod may be, and correct makes that others.
	spaces() map[netip.Addr]string
	inside(pod *Pod, space string) (lengths, error)
	correct(pod *Pod, space string, to lengths) error
	// bandwidth is what a pod may receive and send, by its queues; of a space that is not
	// known, what it may receive.
	bandwidth(pod *Pod, space string) (pool.Bandwidth, error)
}

var _ layer.Layer = (*Layer)(nil)

// New makes the layer. It touches nothing before Open.
func New(settings Settings) *Layer {
	l := &Layer{settings: settings, host: node{settings.Netns}, install: installation{settings: settings, self: "/proc/self/exe"}, answers: map[string]uint64{},
		lengths: facts{mtu: defaultMTU}.lengths(nil), inside: map[pool.Key]lengths{}, unset: map[pool.Key]string{},
		busy: map[pool.Key]bool{}, done: make(chan struct{}, 1), pool: pool.Open(pool.Book{}, settings.cooldown(), time.Now()), save: settings.file().Write}
	l.idle = sync.NewCond(&l.mu)
	return l
}

// alone calls f when nobody else works on an interface, and has the agent look at it
// then. The lock is held.
func (l *Layer) alone(key pool.Key, f func() error) error {
	for l.busy[key] {
		l.idle.Wait()
	}
	l.busy[key] = true
	defer func() {
		delete(l.busy, key)
		l.idle.Broadcast()
		select {
		case l.done <- struct{}{}:
		default: // it was not yet heard of another
		}
	}()
	return f()
}

// unlocked calls f without the lock, which is held before and after: what takes the kernel
// long is for one interface alone. It counts as one of those in count.
func (l *Layer) unlocked(count *int, f func() error) error {
	*count++
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		*count--
		l.idle.Broadcast()
	}()
	return f()
}

const (
	// mostRemoving is for how many interfaces devices are removed at once: the kernel
	// removes one in some 10 ms, in which it makes none (its lock rtnl).
	mostRemoving = 4
	// mostWaiting is how long a removal gives way to pods that begin.
	mostWaiting = 5 * time.Second
)

// giveWay waits until no pod begins, and few devices are being removed. The lock is held.
func (l *Layer) giveWay() {
	late := false
	timer := time.AfterFunc(mostWaiting, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		late = true
		l.idle.Broadcast()
	})
	defer timer.Stop()
	for l.removing >= mostRemoving || l.building > 0 && !late {
		l.idle.Wait()
	}
}

// Name implements layer.Layer.
func (l *Layer) Name() string { return "pod" }

// Plan implements layer.Layer.
func (l *Layer) Plan(snapshot *model.Snapshot) layer.Picture { return plan(l.settings, snapshot) }

// Diff implements layer.Layer.
func (l *Layer) Diff(have, want layer.Picture, prune bool) layer.Changes {
	return diff(have.(*Picture), want.(*Picture), prune)
}

// Open implements layer.Layer. It needs CAP_NET_ADMIN, and CAP_SYS_ADMIN to work in the
// namespaces of pods. Requests that come before Watch wait.
func (l *Layer) Open() error {
	const act = "open the pod layer"
	if err := need.Check(act, "CAP_NET_ADMIN", "CAP_SYS_ADMIN"); err != nil {
		return err
	}
	if err := l.open(); err != nil {
		l.letGo()
		return fmt.Errorf("%s: %w", act, err)
	}
	return nil
}

func (l *Layer) open() (err error) {
	if err := os.MkdirAll(l.settings.Folder, 0o700); err != nil {
		return fmt.Errorf("make its folder: %w", err)
	}
	if l.lock, err = layer.Lock("folder", l.settings.Folder); err != nil {
		return err
	}
	file := l.settings.file()
	book, there, err := file.Read()
	if err != nil && there {
		// The kernel's devices say whose they are: Read finds them.
		why := err
		var name string
		if name, err = file.SetAside(); err == nil {
			l.aside = fmt.Sprintf("which pod has which address was found out from the node's devices, and addresses may be given again at once: %v; the file is %s now", why, name)
		}
	}
	if err != nil {
		return err
	}
	found, err := l.host.look()
	if err != nil {
		return fmt.Errorf("find the node's addresses: %w", err)
	}
	l.mu.Lock()
	l.pool, l.own = pool.Open(book, l.settings.cooldown(), time.Now()), found.own
	l.tellPorts()
	l.mu.Unlock()
	if l.settings.Pins != "" {
		opened, err := openDatapath(l.settings)
		if err != nil && !errors.Is(err, errNoTCX) {
			return err
		}
		if l.whyNone = ""; err != nil {
			l.whyNone = err.Error()
		} else {
			l.shortcuts = opened
		}
	}
	l.server, err = cni.Listen(l.settings.Socket, l.Answer)
	return err
}

// Read implements layer.Layer.
func (l *Layer) Read() (layer.Picture, error) {
	l.mu.Lock()
	l.lookAgain()
	l.mu.Unlock()
	return l.Refresh(nil)
}

// Refresh implements layer.Layer: pods come and go beside the agent's verbs, so that all
// is looked at anew.
func (l *Layer) Refresh(layer.Picture) (layer.Picture, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	found, err := l.host.look()
	if err != nil {
		return nil, fmt.Errorf("find the devices of pods: %w", err)
	}
	l.lengths, l.own = found.lengths(l.others), found.own
	l.tellPorts() // an address of the node may have come or gone
	given, err := leasesOfOthers(l.settings.HostLocal, bootTime())
	if err != nil {
		return nil, err
	}
	l.pool.Reserve(slices.Concat(found.own, found.elsewhere(), given))
	p := picture(l.pool.Book(), found)
	for _, pod := range p.pods {
		pod.busy = l.busy[pod.Key]
	}
	if p.files, err = l.install.look(); err != nil {
		return nil, err
	}
	l.lookInside(p.pods)
	if l.shortcuts != nil {
		devices := []int{}
		for _, d := range found.devices {
			devices = append(devices, d.index)
		}
		if p.sights, err = l.shortcuts.look(devices, p.ranges); err != nil {
			return nil, fmt.Errorf("find the shortcuts between pods: %w", err)
		}
		l.closed = p.sights.why
	}
	return p, nil
}

// picture is what a book and the kernel say together.
func picture(book pool.Book, found facts) *Picture {
	p := &Picture{ranges: book.Ranges, facts: found}
	var pods []*Pod
	for _, lease := range book.Leases {
		pods = append(pods, &Pod{Lease: lease, Device: deviceName(lease.Key)})
	}
	p.pods = judge(pods, found)
	return p
}

// Look implements layer.Layer: it reads the file, the devices and the pinned maps. For the
// maps it needs CAP_BPF or CAP_SYS_ADMIN.
func (l *Layer) Look() (layer.Picture, error) {
	book, _, err := l.settings.file().Read()
	if err != nil {
		return nil, err
	}
	found, err := l.host.look()
	if err != nil {
		return nil, fmt.Errorf("find the devices of pods: %w", err)
	}
	p := picture(book, found)
	if p.files, err = l.install.look(); err != nil {
		return nil, err
	}
	s, err := lookAtPins(l.settings.Pins)
	if err != nil {
		return nil, err
	}
	for _, pod := range p.pods {
		pod.Way = s.wayTo(pod)
	}
	return p, nil
}

// rulesAtMost is how often somebody's changed rules are looked at.
const rulesAtMost = time.Second

// Watch implements layer.Layer: it answers the plugin, and devices come and go.
func (l *Layer) Watch(ctx context.Context, changed func()) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	served := make(chan error, 1)
	ctx, end := context.WithCancel(ctx)
	defer end()
	if l.shortcuts != nil {
		// Where it cannot be watched, it is looked at once a minute.
		go nft.Watch(ctx, l.settings.Netns, rulesAtMost, changed)
	}
	serving.Go(func() { l.tell(ctx, changed) })
	serving.Go(func() {
		served <- l.server.Serve(ctx)
		end() // said to be an error, not to be ended in silence
	})
	if err := link.Watch(ctx, l.settings.Netns, changed); err != nil {
		changed() // it is looked at once a minute
		<-ctx.Done()
	}
	return <-served
}

// tell has interfaces looked at with which somebody was done: what he left to be done, such
// as a pod's shortcut, no event of the kernel need tell of.
func (l *Layer) tell(ctx context.Context, changed func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.done:
			changed()
		}
	}
}

// Apply implements layer.Layer. The result is have, altered. A pod that began or ended
// since have was read is left as it is, and so is one that cannot be set in its own namespace.
func (l *Layer) Apply(have, want layer.Picture, changes layer.Changes) (layer.Picture, layer.Changes, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	picture, wish := have.(*Picture), want.(*Picture)
	l.cluster, l.others, l.services = wish.node, wish.others, wish.services
	l.lengths = picture.facts.lengths(l.others)
	spaces := sync.OnceValue(l.host.spaces)
	var done layer.Changes
	var failures []error
	for _, change := range changes {
		err := l.carryOut(change, spaces)
		if errors.Is(err, errInPod) {
			continue // Describe says so; one pod does not keep the node from being ready
		}
		if err != nil {
			failures = append(failures, fmt.Errorf("%c %s: %w", change.Op, change.Subject.Object(), err))
			continue
		}
		picture.note(change)
		done = append(done, change)
	}
	if len(done) > 0 && len(failures) == 0 {
		order(picture.ranges, wish.ranges)
	}
	return picture, done, errors.Join(failures...)
}

// order puts ranges in the order of others: that of the cluster is the one in which
// they are used.
func order(ranges, as []netip.Prefix) {
	at := func(r netip.Prefix) int { return slices.Index(as, r) }
	slices.SortStableFunc(ranges, func(a, b netip.Prefix) int { return at(a) - at(b) })
}

func (l *Layer) carryOut(change layer.Change, spaces func() map[netip.Addr]string) error {
	switch s := change.Subject.(type) {
	case podRange:
		return l.useRange(netip.Prefix(s), change.Op != layer.Remove)
	case *Pod:
		return l.putRight(s, spaces)
	case *correction:
		return l.correct(s, spaces)
	case *shortcut:
		return l.setShortcut(s)
	case nowhere:
		_, err := l.shortcuts.forget(netip.Addr(s))
		return err
	case gate:
		return l.shortcuts.open(change.Op != layer.Remove)
	case lost:
		return l.shortcuts.restore()
	case installed:
		return l.install.put(s)
	}
	return fmt.Errorf("%T is nothing of this layer", change.Subject)
}

// useRange begins or ends giving addresses of a range.
func (l *Layer) useRange(r netip.Prefix, use bool) error {
	before := l.pool.Ranges()
	after := slices.DeleteFunc(slices.Clone(before), func(have netip.Prefix) bool { return have == r })
	if use {
		after = append(after, r)
	}
	l.pool.Use(after)
	if err := l.save(l.pool.Book()); err != nil {
		l.pool.Use(before)
		return err
	}
	return nil
}

// putRight looks at one pod again, and does what is to be done about it.
func (l *Layer) putRight(pod *Pod, spaces func() map[netip.Addr]string) error {
	if l.busy[pod.Key] {
		return nil // who works on it knows
	}
	found, err := l.host.look()
	if err != nil {
		return err
	}
	var now *Pod
	for _, one := range picture(l.pool.Book(), found).pods {
		if one.Key == pod.Key {
			now = one
		}
	}
	switch {
	case now == nil, now.state == whole:
		return nil // it ended meanwhile, or somebody asked for it again
	case now.state == unknown:
		now.Bandwidth, _ = l.host.bandwidth(now, spaces()[now.Addresses[0]]) // it may be ending
		if err := l.pool.Adopt(now.Lease); err != nil {
			return fmt.Errorf("two pods have one address: %w: restart one of them", err)
		}
		return l.record()
	case now.state == torn:
		return l.host.mend(now, sources(l.cluster, found.own))
	}
	if err := l.forget(now.Key); err != nil {
		return err
	}
	l.pool.Give(now.Key, time.Now())
	return l.record()
}

// record writes down who has what, and tells of the hostPorts.
func (l *Layer) record() error {
	err := l.save(l.pool.Book())
	l.tellPorts()
	return err
}

// Settle implements layer.Layer.
func (l *Layer) Settle() error { return nil }

// Describe implements layer.Layer.
func (l *Layer) Describe() (layer.Description, error) {
	d := layer.Description{Name: l.Name(), Reasons: map[string]uint64{}}
	if l.server == nil {
		return d, nil // not open
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	d.Objects = len(l.pool.Leases())
	var words []string
	for _, r := range l.pool.Ranges() {
		words = append(words, r.String())
	}
	d.Settings = map[string]string{"ranges": strings.Join(words, ", "), "mtu": l.lengths.String(), "socket": l.settings.Socket}
	for name, n := range l.answers {
		d.Reasons[name] = n
	}
	if l.aside != "" {
		d.Degraded = append(d.Degraded, l.aside)
	}
	if len(words) == 0 {
		d.Degraded = append(d.Degraded, l.noRanges())
	}
	if err := l.forwards(); err != nil {
		d.Degraded = append(d.Degraded, err.Error())
	}
	for _, why := range []string{l.whyNone, l.closed} {
		if why != "" {
			d.Degraded = append(d.Degraded, why)
		}
	}
	d.Degraded = append(d.Degraded, slices.Sorted(maps.Values(l.unset))...)
	d.Degraded = append(d.Degraded, l.unserved()...)
	if l.shortcuts == nil {
		return d, nil
	}
	return d, l.shortcuts.describe(&d)
}

func (l *Layer) noRanges() string {
	return fmt.Sprintf("no pod can begin: node %s has no ranges for pods (spec.podCIDRs): start kube-controller-manager with --allocate-node-cidrs and --cluster-cidr", l.settings.Node)
}

// forwards says whether the node hands packets on, as it must for its pods: an error says
// what is missing.
func (l *Layer) forwards() error {
	tree := sysctl.Tree{Root: "/proc/sys", Netns: l.settings.Netns} // only read
	for i, setting := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
		uses := slices.ContainsFunc(l.pool.Ranges(), func(r netip.Prefix) bool { return r.Addr().Is6() == (i == 1) })
		if !uses {
			continue
		}
		if value, err := tree.Read(setting); err == nil && value != "1" {
			return fmt.Errorf("pods reach only this node: %s is %s: `sysctl -w %s=1`, and in /etc/sysctl.d for the next boot", setting, value, setting)
		}
	}
	return nil
}

// Close implements layer.Layer. The plugin waits for the next process.
func (l *Layer) Close() error {
	if l.server == nil {
		return nil
	}
	err := l.server.Close()
	if errors.Is(err, os.ErrClosed) || strings.Contains(fmt.Sprint(err), "use of closed") {
		err = nil
	}
	l.letGo()
	return err
}

func (l *Layer) letGo() {
	l.server = nil
	if l.shortcuts != nil {
		l.shortcuts.close()
		l.shortcuts = nil
	}
	if l.lock != nil {
		l.lock.Close()
		l.lock = nil
	}
}

// Leave implements layer.Layer: without an agent nobody is given anything.
func (l *Layer) Leave() (layer.Changes, error) { return nil, nil }

// Left implements layer.Layer: no connection ends with Remove.
func (l *Layer) Left() (int, error) { return 0, nil }

// Removal implements layer.Layer.
func (l *Layer) Removal() (layer.Changes, error) {
	changes, err := l.install.removal()
	if err != nil {
		return nil, err
	}
	pins, err := layer.PinsGone(l.settings.Pins, isOurs)
	if err != nil {
		return nil, err
	}
	changes = append(changes, pins...)
	paths := append([]string{l.settings.Socket}, l.settings.file().Paths()...)
	for _, path := range append(paths, l.settings.Folder) {
		_, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look for what the pod layer left: %w", err)
		}
		changes = append(changes, layer.Gone(left(path)))
	}
	return changes, nil
}

// Remove implements layer.Layer. Pods that run keep their network until they end.
func (l *Layer) Remove() (layer.Changes, error) {
	changes, err := l.Removal()
	if err != nil || len(changes) == 0 {
		return nil, err
	}
	lock, err := layer.Lock("folder", l.settings.Folder)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	defer lock.Close()
	return changes.Remove()
}

// left is a file of the layer. It implements layer.Removable.
type left string

// Object implements layer.Subject.
func (l left) Object() string { return "file " + string(l) }

// Detail implements layer.Subject.
func (l left) Detail() string { return "" }

// Remove implements layer.Removable.
func (l left) Remove() error {
	if err := os.Remove(string(l)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the pod layer: %w", err)
	}
	return nil
}
