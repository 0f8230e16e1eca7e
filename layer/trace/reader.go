package trace

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
)

// Namespace is one network namespace that is looked at.
type Namespace struct {
	// Name is how the user named it, Path leads to it ("" is that of this process), Pod is
	// NAMESPACE/NAME where known.
	Name, Path, Pod string
	Inode           uint32
}

// There says whether the namespace's path still leads to it: if not, another one may have its
// inode by now.
func (n Namespace) There() bool {
	var file unix.Stat_t
	return n.Path == "" || unix.Stat(n.Path, &file) == nil && uint32(file.Ino) == n.Inode
}

// Reader reads the state of network namespaces at both ends of a window. It changes
// nothing. A namespace takes some milliseconds and 30 kB for each end, a socket two
// microseconds. What it reads is bounded in number, memory and time (reader_bounds.go), and
// what was left out for that is told.
type Reader struct {
	spaces []Namespace
	at     map[uint32]int // place in spaces, by inode
	before map[uint32]*beginning
	// cookies are the lower halves of those of the namespaces, as far as they are read.
	cookies map[uint32]uint32
	// came are namespaces that came after that, as they were met; find lists those that
	// there are now, nil if none may come.
	came map[identity]*newcomer
	find func() ([]Namespace, error)

	linkRoom, socketRoom, ruleRoom room

	mu sync.Mutex
	// missing says what could not be read, and why.
	missing map[string]bool
}

// beginning is what is kept of a namespace from the beginning of the window.
type beginning struct {
	cause.Reading
	// cookie tells the namespace from one that gets its inode later.
	cookie uint64
	rules  map[ruleKey]uint64 // how many packets each had counted
	// drops are those of sockets that had dropped something, by cookie.
	drops map[uint64]uint64
}

// NewReader makes a Reader of these namespaces. Those that come first are read, if they are
// more than can be.
func NewReader(spaces []Namespace) (*Reader, error) {
	r := &Reader{at: map[uint32]int{}, before: map[uint32]*beginning{}, cookies: map[uint32]uint32{}, came: map[identity]*newcomer{}, missing: map[string]bool{}}
	for _, s := range spaces {
		if s.Inode == 0 {
			var file unix.Stat_t
			path := s.Path
			if path == "" {
				path = "/proc/self/ns/net"
			}
			if err := unix.Stat(path, &file); err != nil {
				return nil, fmt.Errorf("find network namespace %s: %w", s.Name, err)
			}
			s.Inode = uint32(file.Ino)
		}
		if _, known := r.at[s.Inode]; !known {
			r.at[s.Inode] = len(r.spaces)
			r.spaces = append(r.spaces, s)
		}
	}
	return r, nil
}

// Addresses are those that the namespaces have now, by their inodes.
func (r *Reader) Addresses(ctx context.Context) (map[uint32][]cause.Addr, error) {
	all := map[uint32][]cause.Addr{}
	limited, cancel := context.WithTimeout(ctx, longestReading)
	defer cancel()
	_, err := each(limited, r.spaces, func(n Namespace) []cause.Addr { return r.addresses(n.Name) },
		func(n Namespace, of []cause.Addr) { all[n.Inode] = of })
	return all, err
}

// Before reads what After will compare with. It takes no longer than half a minute.
func (r *Reader) Before(ctx context.Context) error {
	nothing := &met{}
	chosen := r.chosen(nothing.spaces)
	r.fill()
	limited, cancel := context.WithTimeout(ctx, longestReading)
	defer cancel()
	unread, err := each(limited, chosen, func(n Namespace) *beginning {
		b := &beginning{}
		b.cookie, _ = netns.Cookie("") // before Linux 5.14 inodes have to do
		var devices []device
		devices, b.Reading, b.drops = r.read(limited, n, nothing)
		for i := range devices {
			b.Links = append(b.Links, devices[i].Link)
		}
		b.rules = countsOf(r.readRules(n))
		return b
	}, func(n Namespace, b *beginning) { r.before[n.Inode], r.cookies[n.Inode] = b, uint32(b.cookie) })
	if ctx.Err() != nil {
		return fmt.Errorf("read network namespaces: %w", ctx.Err())
	}
	r.notRead(len(chosen), unread, "before")
	return err
}

// ending is what is read of a namespace at the end of the window.
type ending struct {
	*cause.Space
	cookie    uint64
	drops     map[uint64]uint64
	elsewhere map[int]int // what it calls the namespaces of its devices' other ends, by index
}

// After reads everything again, asks the kernel about the routes of what was met, and
// puts it together. Namespaces that have gone are left out, also where another has their
// inode by now; those that came are read, if they are found (Newcomers). It takes no longer than half a minute.
func (r *Reader) After(ctx context.Context, window time.Duration, events []cause.Event) (*cause.Evidence, error) {
	e := &cause.Evidence{Window: window, Kernel: release(), Events: events}
	ctx, cancel := context.WithTimeout(ctx, longestReading)
	defer cancel()
	r.fill()
	gone := r.adopt(ctx, events)
	met := meet(events)
	chosen := r.chosen(met.spaces)
	spaces, elsewhere := make([]*cause.Space, len(r.spaces)), map[uint32]map[int]int{}
	unread, err := each(ctx, chosen, func(n Namespace) *ending { return r.readSpace(ctx, n, met) }, func(n Namespace, now *ending) {
		first := r.before[n.Inode]
		switch {
		case first == nil: // nothing to compare with: what is there now has to do
			now.Before = now.After
		case first.cookie != now.cookie:
			return // another one
		default:
			now.Before = first.Reading
			now.Before.Sockets = first.dropped(now.After.Sockets)
		}
		now.Rules = bothCounts(first, now.Rules)
		spaces[r.at[n.Inode]], elsewhere[n.Inode] = now.Space, now.elsewhere
	})
	if err != nil {
		return nil, err
	}
	for _, s := range spaces {
		if s != nil {
			e.Spaces = append(e.Spaces, s)
		}
	}
	e.Spaces = append(e.Spaces, gone...)
	r.notRead(len(chosen), unread, "after")
	r.strangers(e)
	r.lookAgain(ctx, e.Spaces)
	r.joinPeers(ctx, e.Spaces, elsewhere)
	e.Paths = r.paths(ctx, e)
	r.cgroups(ctx, e)
	r.processes(ctx, e)
	if ctx.Err() != nil {
		r.note("all of it: reading after the window was ended when it had taken %s", longestReading)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	e.Missing = slices.Sorted(maps.Keys(r.missing))
	return e, nil
}

// readSpace reads all that is known of a namespace, in the calling thread's.
func (r *Reader) readSpace(ctx context.Context, n Namespace, met *met) *ending {
	s := &cause.Space{Inode: n.Inode, Name: n.Name, Pod: n.Pod, Enter: entering(n)}
	e := &ending{Space: s, elsewhere: map[int]int{}}
	e.cookie, _ = netns.Cookie("")
	var devices []device
	devices, s.After, e.drops = r.read(ctx, n, met)
	for i := range devices {
		d := &devices[i]
		s.After.Links = append(s.After.Links, d.Link)
		e.elsewhere[d.Index] = d.elsewhere
	}
	s.Settings = settings(s.After.Links)
	s.Forwards = r.forwards(n.Name, s.After.Links)
	s.Addrs, s.Neighs, s.Routes = r.addresses(n.Name), r.neighbours(n.Name), r.refusing(ctx, n.Name)
	s.Rules = r.readRules(n)
	s.Programs, s.Policies = attachedTo(devices), r.blocking(n.Name)
	return e
}

// each runs f on a thread inside each namespace, a few at a time, and gives what it returns
// to keep, one after the other. Those that have gone are left out. When ctx ends it does not
// wait for those that are still read; unread counts them and those that were not begun.
func each[T any](ctx context.Context, all []Namespace, f func(Namespace) T, keep func(Namespace, T)) (unread int, err error) {
	type result struct {
		at    int
		value T
		err   error
	}
	results, next := make(chan result, len(all)), make(chan int, len(all))
	for i := range all {
		next <- i
	}
	close(next)
	for range min(len(all), 2*runtime.GOMAXPROCS(0)) {
		go func() {
			for i := range next {
				if ctx.Err() != nil {
					return
				}
				r := result{at: i}
				r.err = netns.In(all[i].Path, func() error {
					if !here(all[i].Inode) {
						return fs.ErrNotExist // the path leads to another one by now
					}
					r.value = f(all[i])
					return nil
				})
				results <- r
			}
		}()
	}
	for left := len(all); left > 0; left-- {
		select {
		case <-ctx.Done():
			return left, err
		case r := <-results:
			gone := errors.Is(r.err, fs.ErrNotExist) || errors.Is(r.err, unix.ESRCH) || errors.Is(r.err, unix.EINVAL)
			switch {
			case r.err == nil:
				keep(all[r.at], r.value)
			case !gone && err == nil:
				err = fmt.Errorf("read network namespace %s: %w", all[r.at].Name, r.err)
			}
		}
	}
	return 0, err
}

// inside runs f on a thread in a namespace that is read, unless it has gone.
func (r *Reader) inside(inode uint32, f func()) error {
	at, known := r.at[inode]
	if !known {
		return fs.ErrNotExist
	}
	return netns.In(r.spaces[at].Path, func() error {
		if !here(inode) {
			return fs.ErrNotExist
		}
		f()
		return nil
	})
}

// here says whether the calling thread is in the namespace.
func here(inode uint32) bool {
	var file unix.Stat_t
	err := unix.Stat("/proc/thread-self/ns/net", &file)
	return err == nil && uint32(file.Ino) == inode
}

// entering is what is put before a command that is for a namespace.
func entering(n Namespace) string {
	name, named := strings.CutPrefix(n.Path, "/run/netns/")
	if !named {
		name, named = strings.CutPrefix(n.Path, "/var/run/netns/")
	}
	switch {
	case n.Path == "":
		return ""
	case named:
		return "ip netns exec " + cause.Quote(name)
	}
	return "nsenter --net=" + cause.Quote(n.Path)
}

func release() string {
	text, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return strings.TrimSpace(string(text))
}

// miss notes that something could not be read.
func (r *Reader) miss(what string, err error) {
	if err != nil {
		r.note("%s: %v", what, err)
	}
}

// note adds a line to what is missing, once.
func (r *Reader) note(format string, values ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.missing) < mostMissing {
		r.missing[fmt.Sprintf(format, values...)] = true
	}
}

// read takes what changes, in the calling thread's namespace; apart from it devices, and
// what sockets have dropped.
func (r *Reader) read(ctx context.Context, n Namespace, met *met) (devices []device, reading cause.Reading, drops map[uint64]uint64) {
	reading.Counters, reading.Fragments = counters()
	reading.Conntrack = tracking()
	devices, err := r.links(ctx, n.Name)
	r.miss("devices of "+n.Name, err)
	reading.Sockets, reading.Busy, drops, err = r.sockets(n.Name, met)
	r.miss("sockets of "+n.Name, err)
	return devices, reading, drops
}
