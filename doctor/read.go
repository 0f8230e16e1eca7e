package doctor

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/kubeproxy"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/proc"
	"github.com/millrace/millrace/kernel/sockdiag"
)

// longest is how much of a file of somebody else's is read.
const longest = 1 << 16

// Host is where facts are read.
type Host struct {
	// root is the folder that has proc, sys and etc.
	root string
	// within calls read inside a namespace, with the folder that has its proc.
	within func(s *Space, read func(root string) error) error
	// privileged says what this process lacks to look at those of others.
	privileged func() error
	// fromNode calls read where cgroups of processes are seen as the node sees them.
	fromNode func(read func())
	// These are of the calling thread's namespace.
	devices   func(root string) (devices []link.Device, home int, err error)
	qdiscs    func(root string) (map[int]link.Qdisc, error)
	listeners func(root string) ([]sockdiag.Listener, error)
	kubeProxy func() (kubeproxy.Found, error)
	// wire is how probes are sent.
	wire wire
}

// This is the host that the process runs on.
func This() *Host {
	return &Host{
		root: "/",
		within: func(s *Space, read func(string) error) error {
			return netns.In(s.path, func() error { return read("/") })
		},
		privileged: func() error { return need.Check("look into network namespaces", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE") },
		fromNode:   fromNode,
		devices:    devices,
		qdiscs:     qdiscs,
		listeners:  func(string) ([]sockdiag.Listener, error) { return sockdiag.Listeners() },
		kubeProxy:  func() (kubeproxy.Found, error) { return kubeproxy.Find("") },
		wire:       thisWire(),
	}
}

// fromNode goes by the node's first process. Who may not see its cgroup namespace may not
// look into pods either, which is told.
func fromNode(read func()) {
	if cgroup.SeenFrom("/proc/1/ns/cgroup", read) != nil {
		read()
	}
}

func qdiscs(string) (map[int]link.Qdisc, error) {
	net, err := link.Open("")
	if err != nil {
		return nil, err
	}
	defer net.Close()
	return net.Qdiscs()
}

func devices(string) (all []link.Device, home int, err error) {
	net, err := link.Open("")
	if err != nil {
		return nil, -1, err
	}
	defer net.Close()
	if all, err = net.Devices(); err != nil {
		return nil, -1, err
	}
	file, err := os.Open("/proc/self/ns/net") // of the process, not of this thread
	if err != nil {
		return nil, -1, err
	}
	defer file.Close()
	home, err = netns.Number(int(file.Fd()))
	return all, home, err
}

// Read takes the facts that the checks name, twice, with window between. It tells
// progress as it goes.
func (h *Host) Read(ctx context.Context, checks []Check, window time.Duration, progress io.Writer) (*Facts, error) {
	f := &Facts{}
	if err := h.find(f); err != nil {
		return nil, err
	}
	fmt.Fprintf(progress, "read %d network namespaces, and again in %s\n", len(f.Spaces), window)
	w := wantedBy(checks)
	begun := time.Now()
	h.readAll(f, w, true)
	select {
	case <-time.After(window):
	case <-ctx.Done():
		return nil, fmt.Errorf("read facts: %w", context.Cause(ctx))
	}
	f.Window = time.Since(begun)
	h.readAll(f, w, false)
	if w.node[KubeProxyRules] {
		f.kubeProxy.is, f.kubeProxy.err = h.kubeProxy()
	}
	return f, nil
}

// wanted are the facts that checks name: those of the node alone, and those of every
// namespace.
type wanted struct{ node, everywhere map[string]bool }

func wantedBy(checks []Check) wanted {
	w := wanted{map[string]bool{}, map[string]bool{}}
	for _, c := range checks {
		for _, read := range c.Reads {
			if isResource(read) || c.Sends() {
				continue
			}
			w.node[read] = true
			if c.Scope == Everywhere {
				w.everywhere[read] = true
			}
		}
	}
	return w
}

// readAll reads every namespace, a few at a time. Those that have ended meanwhile, or
// that this process may not enter, are taken out; the latter are told of.
func (h *Host) readAll(f *Facts, w wanted, first bool) {
	errs := make([]error, len(f.Spaces))
	var several errgroup.Group
	several.SetLimit(2 * runtime.GOMAXPROCS(0))
	for i, s := range f.Spaces {
		reads := w.everywhere
		if i == 0 {
			reads = w.node
		}
		several.Go(func() error {
			errs[i] = h.within(s, func(root string) error { h.read(s, root, reads, first); return nil })
			return nil
		})
	}
	several.Wait()
	refused := map[string]int{}
	entered := f.Spaces[:0]
	for i, err := range errs {
		switch {
		case err == nil:
			entered = append(entered, f.Spaces[i])
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH):
			refused[reason(err)]++
		}
	}
	f.Spaces = entered
	for _, why := range slices.Sorted(maps.Keys(refused)) {
		f.hide(fmt.Sprintf("network namespaces that could not be entered: %d: %s", refused[why], why))
	}
}

// hide notes what checks of every namespace miss.
func (f *Facts) hide(text string) {
	f.Unseen = append(f.Unseen, text)
	f.hidden = append(f.hidden, Evidence{Scope: string(Everywhere), Read: "/proc/PID/ns/net", Value: text, Unread: true})
}

// read reads one namespace; the thread is in it.
func (h *Host) read(s *Space, root string, reads map[string]bool, first bool) {
	into := map[string]fact[string]{}
	if reads[Throttling] {
		for _, b := range s.budgets {
			data, err := os.ReadFile(filepath.Join(root, b.file))
			into[b.file] = fact[string]{string(data), err}
		}
	}
	for read := range reads {
		if strings.HasPrefix(read, "/proc/PID/") || !strings.HasPrefix(read, "/") && strings.Contains(read, " ") ||
			read == Connections || read == Resolver || first && !counted(read) {
			continue
		}
		for _, name := range expand(root, read) {
			data, err := os.ReadFile(place(root, name))
			into[name] = fact[string]{string(data), err}
		}
	}
	if first {
		s.first = into
		if reads[Qdiscs] {
			s.firstQdiscs.is, s.firstQdiscs.err = h.qdiscs(root)
		}
		return
	}
	s.last = into
	if reads[Qdiscs] {
		s.lastQdiscs.is, s.lastQdiscs.err = h.qdiscs(root)
	}
	if reads[Devices] {
		s.devices.is, s.home, s.devices.err = h.devices(root)
	}
	if reads[Listeners] {
		s.listeners.is, s.listeners.err = h.listeners(root)
	}
	if reads[Connections] {
		s.connections.is, s.connections.err = connections(s, root)
	}
	if reads[Resolver] {
		s.resolver.is, s.resolver.err = h.resolver(s)
	}
}

// counted says that a file holds counters, of which two readings are taken.
func counted(read string) bool {
	return strings.HasPrefix(read, "/proc/net/") || read == "/proc/stat" || read == ringMisses
}

// file is where a fact is: a setting below /proc/sys; what /proc/net leads to is the
// process's, not the thread's.
func file(read string) string {
	if rest, net := strings.CutPrefix(read, "/proc/net/"); net {
		return "/proc/thread-self/net/" + rest
	}
	if strings.HasPrefix(read, "/") {
		return read
	}
	return "/proc/sys/" + swapped(read)
}

// place is where a fact is below a root. The node's own files are those that its first
// process sees: this one may be in a container.
func place(root, read string) string {
	name := file(read)
	if !strings.HasPrefix(name, "/proc/") && !strings.HasPrefix(name, "/sys/") {
		root = nodeFiles(root)
	}
	return filepath.Join(root, name)
}

func nodeFiles(root string) string {
	const first = "proc/1/root"
	if _, err := os.Stat(filepath.Join(root, first, "etc")); err == nil {
		return filepath.Join(root, first)
	}
	return root
}

// swapped makes a path of a setting's name and back, as sysctl(8) does: the dot in the
// name of a device is a slash in that of a setting.
func swapped(name string) string { return strings.NewReplacer(".", "/", "/", ".").Replace(name) }

// expand finds the files of a pattern.
func expand(root, read string) []string {
	if !strings.Contains(read, "*") {
		return []string{read}
	}
	pattern := place(root, read)
	found, _ := filepath.Glob(pattern) // its only error is a bad pattern
	below := strings.TrimSuffix(pattern, file(read))
	for i, name := range found {
		if found[i] = strings.TrimPrefix(name, below); !strings.HasPrefix(read, "/") {
			found[i] = swapped(strings.TrimPrefix(found[i], "/proc/sys/"))
		}
	}
	return found
}

// connections lists TCP sockets where there may be too many for the local ports: to one
// destination there cannot be more than there are to all.
func connections(s *Space, root string) (all []proc.Socket, err error) {
	low, high, err := portRange(s.last[localPorts].is)
	six := s.last[sockstat6]
	if errors.Is(six.err, fs.ErrNotExist) {
		six = fact[string]{is: "TCP6: inuse 0"} // without IPv6
	}
	if err := cmp.Or(s.last[localPorts].err, s.last[sockstat].err, six.err, err); err != nil {
		return nil, err
	}
	held, err := proc.Sockstat(s.last[sockstat].is, "TCP.inuse")
	waiting, err2 := proc.Sockstat(s.last[sockstat].is, "TCP.tw") // of both families
	held6, err3 := proc.Sockstat(six.is, "TCP6.inuse")
	if err := cmp.Or(err, err2, err3); err != nil || float64(held+held6+waiting) < nearlyAll*float64(high-low+1) {
		return nil, err
	}
	for _, name := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		text, err := os.ReadFile(filepath.Join(root, file(name)))
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6
		}
		if err == nil {
			err = proc.Sockets(string(text), func(s proc.Socket) { all = append(all, s) })
		}
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// resolver reads the resolv.conf that processes of a namespace see. It is theirs to
// write: it may be anything, and lead anywhere.
func (h *Host) resolver(s *Space) (string, error) {
	if s.path == "" {
		return readBounded(nodeFiles(h.root), "etc/resolv.conf")
	}
	err := fmt.Errorf("no process is in the namespace")
	for _, p := range s.processes {
		var text string
		if text, err = readBounded(filepath.Join(h.root, "proc", p.id, "root"), "etc/resolv.conf"); err == nil {
			return text, nil
		}
	}
	return "", err
}

// readBounded reads a regular file below a folder that nothing leads out of.
func readBounded(folder, name string) (string, error) {
	root, err := os.OpenRoot(folder)
	if err != nil {
		return "", err
	}
	defer root.Close()
	file, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer file.Close()
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		return "", fmt.Errorf("it is no regular file")
	}
	data, err := io.ReadAll(io.LimitReader(file, longest))
	return string(data), err
}

// mounted lists the network namespaces that are mounted somewhere, by inode
// (proc_pid_mountinfo(5): the fourth field is the root, the fifth the place).
func (h *Host) mounted() map[uint64]string {
	places := map[uint64]string{}
	file, err := os.Open(filepath.Join(h.root, "proc/self/mountinfo"))
	if err != nil {
		return places // what processes lead to is found all the same
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 {
			if inode := inodeOf(fields[3]); inode != 0 {
				places[inode] = fields[4]
			}
		}
	}
	return places
}
