package trace

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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

// Reader reads the state of network namespaces at both ends of a window. It changes
// nothing. It costs some milliseconds a namespace, and two microseconds a socket.
type Reader struct {
	spaces []Namespace
	before map[uint32]cause.Reading
	rules  map[uint32][]cause.Rule
	mu     sync.Mutex
	// missing says what could not be read, and why.
	missing map[string]bool
}

// NewReader makes a Reader of these namespaces.
func NewReader(spaces []Namespace) (*Reader, error) {
	r := &Reader{before: map[uint32]cause.Reading{}, rules: map[uint32][]cause.Rule{}, missing: map[string]bool{}}
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
		if !slices.ContainsFunc(r.spaces, func(o Namespace) bool { return o.Inode == s.Inode }) {
			r.spaces = append(r.spaces, s)
		}
	}
	return r, nil
}

// Close lets go of what the Reader holds.
func (r *Reader) Close() error { return nil }

// Before reads what After will compare with.
func (r *Reader) Before(ctx context.Context) error {
	return r.each(ctx, func(s Namespace) error {
		reading, rules := r.read(), r.readRules(s)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.before[s.Inode], r.rules[s.Inode] = reading, rules
		return nil
	})
}

// After reads everything again, asks the kernel about the routes of what was met, and
// puts it together. Namespaces that have gone are left out.
func (r *Reader) After(ctx context.Context, window time.Duration, events []cause.Event) (*cause.Evidence, error) {
	e := &cause.Evidence{Window: window, Kernel: release(), Events: events}
	spaces := make([]*cause.Space, len(r.spaces))
	err := r.each(ctx, func(n Namespace) error {
		at := slices.IndexFunc(r.spaces, func(o Namespace) bool { return o.Inode == n.Inode })
		s := &cause.Space{Inode: n.Inode, Name: n.Name, Pod: n.Pod, Enter: entering(n), After: r.read()}
		r.mu.Lock()
		s.Before = r.before[n.Inode]
		r.mu.Unlock()
		s.Settings = settings(s.After.Links)
		s.Addrs, s.Neighs, s.Routes = addresses(), neighbours(), refusing()
		s.Rules = bothCounts(r.rules[n.Inode], r.readRules(n))
		s.Programs, s.Policies = attachedTo(s.After.Links), blocking()
		spaces[at] = s
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, s := range spaces {
		if s != nil {
			e.Spaces = append(e.Spaces, s)
		}
	}
	r.lookAgain(ctx, e.Spaces)
	r.joinPeers(ctx, e.Spaces)
	e.Paths = r.paths(ctx, e)
	r.cgroups(ctx, e)
	for what := range r.missing {
		e.Missing = append(e.Missing, what)
	}
	slices.Sort(e.Missing)
	processes(e)
	return e, nil
}

// each runs f on a thread inside each namespace, a few at a time. Those that have gone
// are left out.
func (r *Reader) each(ctx context.Context, f func(Namespace) error) error {
	errs := make([]error, len(r.spaces))
	turns := make(chan struct{}, 2*runtime.GOMAXPROCS(0))
	var several sync.WaitGroup
	for i, s := range r.spaces {
		turns <- struct{}{}
		several.Go(func() {
			defer func() { <-turns }()
			if errs[i] = ctx.Err(); errs[i] == nil {
				errs[i] = netns.In(s.Path, func() error {
					if !here(s.Inode) {
						return fs.ErrNotExist // the path leads to another one by now
					}
					return f(s)
				})
			}
		})
	}
	several.Wait()
	for i, err := range errs {
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("read network namespace %s: %w", r.spaces[i].Name, err)
		}
	}
	return nil
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
		return "ip netns exec " + name
	}
	return "nsenter --net=" + n.Path
}

func release() string {
	text, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return strings.TrimSpace(string(text))
}

// miss notes that something could not be read.
func (r *Reader) miss(what string, err error) {
	if err == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.missing[fmt.Sprintf("%s: %v", what, err)] = true
}

// read takes what changes, in the calling thread's namespace.
func (r *Reader) read() cause.Reading {
	var reading cause.Reading
	reading.Counters, reading.Fragments = counters()
	reading.Conntrack = tracking()
	var err error
	reading.Links, err = links()
	r.miss("devices", err)
	reading.Sockets, reading.Busy, err = sockets()
	r.miss("sockets", err)
	return reading
}
