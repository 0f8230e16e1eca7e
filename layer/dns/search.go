package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/resolv"
	"github.com/millrace/millrace/layer"
)

const (
	// lookEvery is how often the files of pods are read again. Go's resolver reads its own
	// again after 5 seconds at the earliest (src/net/dnsclient_unix.go), glibc's and musl's
	// with the next name.
	lookEvery = 10 * time.Second
	// lookSoon is when they are read after a device came or went. The rest after that
	// doubles up to lookEvery: a pod's process may come later than its device.
	lookSoon = 500 * time.Millisecond
)

// SearchList is how the resolvers of a pod make names complete (resolv.conf(5)). It
// implements layer.Subject.
type SearchList struct {
	// Device is the pod's at the node.
	Device string `json:"device"`
	// Suffixes are tried in this order.
	Suffixes []string `json:"suffixes"`
	// Ndots is how many dots a name has at least that is asked for as it is first.
	Ndots int `json:"ndots"`
	// index is the device's; server is whom the pod asks first, unknown of one that was
	// read from the kernel.
	index  uint32
	server netip.Addr
}

// Object implements layer.Subject.
func (s *SearchList) Object() string { return "search list of " + s.Device }

// Detail implements layer.Subject.
func (s *SearchList) Detail() string {
	return fmt.Sprintf("-> %s, ndots %d", strings.Join(s.Suffixes, " "), s.Ndots)
}

func (s *SearchList) equal(o *SearchList) bool {
	return s.Ndots == o.Ndots && slices.Equal(s.Suffixes, o.Suffixes)
}

// listOf is the list that a pod's file has, nil where it has none that would be of use. The
// error says why it cannot be used.
func listOf(d device, conf resolv.Conf) (*SearchList, error) {
	if len(conf.Servers) == 0 || len(conf.Search) == 0 {
		return nil, nil
	}
	if _, fits := searchListOf(conf.Ndots, conf.Search); !fits {
		return nil, fmt.Errorf("it has more than %d entries, or one of more than %d characters", mostSuffixes, suffixLimit-2)
	}
	return &SearchList{Device: d.Name, Suffixes: conf.Search, Ndots: conf.Ndots, index: uint32(d.Index), server: conf.Servers[0]}, nil
}

// entry is the list in the kernel.
func (s *SearchList) entry() datapathSearchList {
	entry, _ := searchListOf(s.Ndots, s.Suffixes)
	return entry
}

// listIn is the list that an entry was made of.
func listIn(index uint32, entry datapathSearchList) *SearchList {
	list := &SearchList{Device: fmt.Sprint("device ", index), Ndots: int(entry.Ndots), index: index}
	for _, suffix := range entry.Suffix[:min(int(entry.Count), mostSuffixes)] {
		var bytes [suffixLimit]byte
		for w, word := range suffix.Word {
			binary.LittleEndian.PutUint64(bytes[8*w:], word)
		}
		list.Suffixes = append(list.Suffixes, nameIn(bytes[:]))
	}
	return list
}

// files are what the resolv.conf of pods say, by the last look at them.
type files struct {
	mu sync.Mutex
	// devices are those that were there at the last Refresh.
	devices []device
	// looked says that there was a look. lists are by the index of a device, and problems
	// why a pod's is not known.
	looked   bool
	lists    map[int]*SearchList
	problems map[int]string
	// soon says that devices have come or gone.
	soon chan struct{}
	// every and first are lookEvery and lookSoon; tests have others.
	every, first time.Duration
}

func newFiles() *files {
	return &files{soon: make(chan struct{}, 1), every: lookEvery, first: lookSoon}
}

// refresh puts into a picture what is known of its devices.
func (f *files) refresh(picture *Picture) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.devices = slices.Clone(picture.devices)
	picture.looked, picture.lists = f.looked, f.lists
}

// stir has the next look come soon.
func (f *files) stir() {
	select {
	case f.soon <- struct{}{}:
	default:
	}
}

// follow looks again and again until ctx ends, and calls changed when a look finds another list.
func (f *files) follow(ctx context.Context, home string, changed func()) {
	var reader resolv.Reader
	for wait := f.first; ; wait = min(2*wait, f.every) {
		if f.look(&reader, home) {
			changed()
		}
		if !f.rest(ctx, wait) {
			wait = f.first / 2
			if ctx.Err() != nil {
				return
			}
		}
	}
}

// rest waits; false if it was told to look soon, or ctx has ended.
func (f *files) rest(ctx context.Context, wait time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(wait):
		return true
	case <-f.soon:
	}
	select { // what comes meanwhile is looked at in one go
	case <-ctx.Done():
	case <-time.After(f.first):
	}
	return false
}

// look reads the files of the pods whose devices were there before, and says whether
// a list is another one now.
func (f *files) look(reader *resolv.Reader, home string) (changed bool) {
	f.mu.Lock()
	devices := f.devices
	f.mu.Unlock()
	lists, problems := map[int]*SearchList{}, map[int]string{}
	views, err := reader.Views(home)
	if err != nil {
		problems[0] = err.Error()
	}
	for _, d := range devices {
		view, found := views[d.space]
		if !d.pod || !found {
			continue
		}
		list, err := listOf(d, view.Conf)
		if view.Err != nil {
			list, err = nil, view.Err
		}
		if err != nil {
			problems[d.Index] = fmt.Sprintf("%s: %v", d.Name, err)
		}
		if list != nil {
			lists[d.Index] = list
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	same := func(a, b *SearchList) bool { return a.equal(b) && a.server == b.server }
	changed = !f.looked || !maps.EqualFunc(f.lists, lists, same)
	f.looked, f.lists, f.problems = true, lists, problems
	return changed
}

// describe says of how many pods the list is not known, and why of some.
func (f *files) describe(to *layer.Description) {
	const spoken = 3
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.problems) == 0 {
		return
	}
	var some []string
	for _, index := range slices.Sorted(maps.Keys(f.problems)) {
		if some = append(some, f.problems[index]); len(some) == spoken {
			break
		}
	}
	to.Degraded = append(to.Degraded, fmt.Sprintf("the search list of %d pods is not known, and each of its entries takes them a query: %s",
		len(f.problems), strings.Join(some, "; ")))
}

// diffSearches says which lists are to be written and removed: a device has one if the pod's
// first name server is a resolver that is answered for.
func diffSearches(have, want *Picture, prune bool) (changes layer.Changes) {
	if !have.looked || !want.ports {
		return nil
	}
	wanted := map[uint32]*SearchList{}
	for _, d := range have.devices {
		list := have.lists[d.Index]
		if d.pod && list != nil && (want.resolvers[list.server] || !prune && have.resolvers[list.server]) {
			wanted[uint32(d.Index)] = list
		}
	}
	for _, index := range slices.Sorted(maps.Keys(wanted)) {
		switch old := have.searches[index]; {
		case old == nil:
			changes = append(changes, layer.Change{Op: layer.Add, Subject: wanted[index]})
		case !old.equal(wanted[index]):
			changes = append(changes, layer.Change{Op: layer.Alter, Subject: wanted[index]})
		}
	}
	for _, index := range slices.Sorted(maps.Keys(have.searches)) {
		if wanted[index] == nil {
			changes = append(changes, layer.Change{Op: layer.Remove, Subject: have.searches[index]})
		}
	}
	return changes
}

// nameDevice says how a device is called, which the kernel's entries do not know.
func (p *Picture) nameDevice(index int, name string) {
	if list := p.searches[uint32(index)]; list != nil {
		list.Device = name
	}
}

// nameDevices names those of a namespace.
func (p *Picture) nameDevices(home string) error {
	n, err := link.Open(home)
	if err != nil {
		return err
	}
	defer n.Close()
	devices, err := n.Devices()
	for _, d := range devices {
		p.nameDevice(d.Index, d.Name)
	}
	return err
}

// Searches are the search lists of pods, by device.
func (p *Picture) Searches() (lists []*SearchList) {
	for _, index := range slices.Sorted(maps.Keys(p.searches)) {
		lists = append(lists, p.searches[index])
	}
	return lists
}
