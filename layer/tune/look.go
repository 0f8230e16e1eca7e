package tune

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/kubeproxy"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/proc"
	"github.com/millrace/millrace/kernel/queue"
	"github.com/millrace/millrace/kernel/sockdiag"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer/tune/knob"
)

// Place is a network namespace in which settings are read and set.
type Place struct {
	// Name is "node", "pod web-7f", or another that a person can find it by.
	Name string
	// Path leads to it, empty for that of this process; Cookie is the kernel's number of
	// it (netns.Cookie).
	Path   string
	Cookie uint64
	// Node says that it is the node's own, Pod that it is a pod's.
	Node, Pod bool
}

// gear is the settings of a place: those of the kernel by names with dots, and those of
// its devices by names with slashes.
type gear struct {
	tree  sysctl.Tree
	queue queue.In
}

// at is the settings of a place; root stands for /proc/sys, empty is what sysctl.Find
// finds.
func at(root, path string) gear {
	return gear{sysctl.Tree{Root: root, Netns: path}, queue.In(path)}
}

// Read is the value of a setting.
func (g gear) Read(name string) (string, error) {
	if strings.Contains(name, "/") {
		return g.queue.Read(name)
	}
	return g.tree.Read(name)
}

// Write sets it and returns what it is then.
func (g gear) Write(name, value string) (string, error) {
	if strings.Contains(name, "/") {
		return g.queue.Write(name, value)
	}
	return g.tree.Write(name, value)
}

// Look reads what package knob plans by: of the machine, and of each place, with window
// between two readings of what is counted. Root stands for /proc/sys. It makes a
// network namespace to see what the kernel itself sets, and removes it. What cannot be
// read is in the Facts, as why.
func Look(ctx context.Context, root string, places []Place, window time.Duration) (*knob.Facts, error) {
	m := &knob.Facts{}
	if err := readMachine(m); err != nil {
		return nil, err
	}
	fresh := freshValues(root)
	var counted []counts
	for _, p := range places {
		s, err := lookAt(root, p)
		if err != nil {
			return nil, err
		}
		s.Fresh = fresh
		if p.Node {
			s.Files = files()
			for name, lines := range tuned() {
				s.Files[name] = append(s.Files[name], lines...)
			}
			if m.KubeProxy, err = kubeproxy.Running(p.Path); err != nil {
				return nil, err
			}
		}
		for _, d := range s.devices {
			if d.Hardware {
				m.Speed = max(m.Speed, uint64(d.Speed)*1e6)
			}
		}
		m.Spaces = append(m.Spaces, &s.Space)
		counted = append(counted, count(p.Path))
	}
	select {
	case <-time.After(window):
	case <-ctx.Done():
		return nil, fmt.Errorf("count for %s: %w", window, context.Cause(ctx))
	}
	for i, p := range places {
		counted[i].since(count(p.Path), m.Spaces[i])
	}
	return m, nil
}

// readMachine reads what is the whole machine's.
func readMachine(m *knob.Facts) error {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("read the size of the memory: %w", err)
	}
	m.Memory = info.Totalram * uint64(info.Unit)
	for i, table := range []string{"arp_cache", "ndisc_cache"} {
		text, err := os.ReadFile("/proc/net/stat/" + table)
		if errors.Is(err, fs.ErrNotExist) {
			continue // without IPv6, or in a namespace that does not show it
		}
		if err != nil {
			return fmt.Errorf("count neighbours: %w", err)
		}
		n, err := proc.PerCPU(string(text), "entries") // the same in each line
		if err != nil {
			return fmt.Errorf("count neighbours: %w", err)
		}
		m.Neighbours[i] = int(n)
	}
	return nil
}

// space is a knob.Space with its devices.
type space struct {
	knob.Space
	devices []queue.Device
}

func lookAt(root string, p Place) (*space, error) {
	s := &space{Space: knob.Space{Name: p.Name, Node: p.Node, Pod: p.Pod, Values: map[string]string{}, Unread: map[string]error{},
		Held: map[string]knob.Holding{}, Found: map[string][]string{}, Backlogs: map[uint16]uint32{}}}
	g := at(root, p.Path)
	read := func(name string) {
		value, err := g.Read(name)
		if err != nil {
			s.Unread[name] = err
			return
		}
		s.Values[name] = value
	}
	for _, name := range knob.Names() {
		read(name)
	}
	if err := s.lookAtDevices(g.queue); err != nil {
		return nil, fmt.Errorf("look at %s: %w", p.Name, err)
	}
	if text, err := g.tree.Read("net.netfilter.nf_conntrack_count"); err == nil {
		s.Tracked, _ = strconv.Atoi(text)
	}
	if err := netns.In(p.Path, s.sockets); err != nil {
		return nil, fmt.Errorf("look at %s: %w", p.Name, err)
	}
	return s, nil
}

// lookAtDevices reads the settings of devices; of a node, which may have hundreds for its
// pods, those of network cards.
func (s *space) lookAtDevices(q queue.In) (err error) {
	if s.devices, err = q.Devices(); err != nil {
		return err
	}
	var names []string
	for _, d := range s.devices {
		if d.Up && (d.Hardware || !s.Node) {
			g := knob.Gear{Name: d.Name, Hardware: d.Hardware, Receive: d.Receive, Send: d.Send, Channels: d.Channels, Ring: d.Ring}
			s.Devices = append(s.Devices, g)
			names = append(names, knob.DeviceNames(g)...)
		}
	}
	values, unread, err := q.ReadAll(names)
	maps.Copy(s.Values, values)
	maps.Copy(s.Unread, unread)
	return err
}

// sockets are those of the calling thread's namespace.
func (s *space) sockets() error {
	return sockdiag.Walk(unix.IPPROTO_TCP, func(t sockdiag.State) {
		switch {
		case t.State == listening:
			s.Backlogs[t.Local.Port()] = max(s.Backlogs[t.Local.Port()], uint32(t.SendQueue))
		case t.State == established && !here(t.Remote.Addr()):
			s.RTT = max(s.RTT, t.RTT.Seconds()*1000)
		}
	})
}

// states of net/tcp_states.h
const (
	established = 1
	listening   = 10
)

func here(a netip.Addr) bool { return a.IsLoopback() }

// counts are counters of a namespace at a moment.
type counts struct {
	at                  time.Time
	accepted, datagrams uint64
}

// count reads them; one that cannot be read is 0.
func count(path string) (c counts) {
	_ = netns.In(path, func() error { // a namespace that has ended has none
		snmp, _ := os.ReadFile("/proc/thread-self/net/snmp")
		netstat, _ := os.ReadFile("/proc/thread-self/net/netstat")
		number := func(text []byte, name string) uint64 {
			n, _ := proc.Counter(string(text), name)
			return n
		}
		c.accepted = number(snmp, "Tcp.PassiveOpens") + number(netstat, "TcpExt.ListenOverflows")
		c.datagrams = number(snmp, "Udp.InDatagrams") + number(snmp, "Udp.RcvbufErrors")
		return nil
	})
	c.at = time.Now()
	return c
}

func (c counts) since(now counts, s *knob.Space) {
	seconds := max(now.at.Sub(c.at).Seconds(), 1e-3)
	s.Accepted = float64(now.accepted-min(c.accepted, now.accepted)) / seconds
	s.Datagrams = float64(now.datagrams-min(c.datagrams, now.datagrams)) / seconds
}

// files are the lines of sysctl.d(5) about settings that can be tuned.
func files() map[string][][2]string {
	all := map[string][][2]string{}
	for _, name := range knob.Names() {
		for _, line := range sysctl.Lines(name) {
			all[name] = append(all[name], [2]string{line.File, line.Value})
		}
	}
	return all
}

// freshValues are those of a network namespace that was just made; none where it may not
// be made, or where root is no kernel's.
func freshValues(root string) map[string]string {
	folder, err := os.MkdirTemp("", "millrace-fresh-")
	if err != nil {
		return nil
	}
	defer os.Remove(folder)
	path := filepath.Join(folder, "net")
	if err := netns.Create(path); err != nil {
		return nil
	}
	defer netns.Remove(path)
	values := map[string]string{}
	for _, k := range knob.Knobs {
		if k.Scope != knob.Namespace {
			continue
		}
		for _, name := range k.Settings {
			if value, err := at(root, path).Read(name); err == nil {
				values[name] = value
			}
		}
	}
	return values
}

// Value is what a setting of a place is.
func Value(root string, p Place, setting string) (string, error) {
	return at(root, p.Path).Read(setting)
}
