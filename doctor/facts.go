package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/millrace/millrace/kernel/kubeproxy"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/proc"
	"github.com/millrace/millrace/kernel/sockdiag"
)

// Facts that are no file and no setting, as Check.Reads names them.
const (
	// Devices are the network devices of a namespace.
	Devices = "rtnetlink devices"
	// Listeners are the TCP sockets that listen in a namespace.
	Listeners = "sock_diag listeners"
	// Connections are the TCP sockets of a namespace that has about as many of them as
	// local ports; elsewhere they are not listed.
	Connections = "/proc/net/tcp"
	// Resolver is the resolv.conf of a process in the namespace.
	Resolver = "/etc/resolv.conf"
	// KubeProxyRules are what a kube-proxy has left in nf_tables and iptables.
	KubeProxyRules = "nf_tables of kube-proxy"
	// Qdiscs are the queueing disciplines of a namespace's devices.
	Qdiscs = "rtnetlink qdiscs"
	// Throttling is the cpu.stat of the cgroups of processes that others' packets or
	// names wait for.
	Throttling = "cpu.stat of network processes"
	// Processes are the names of all processes.
	Processes = "/proc/PID/comm"
)

// Facts are what was read of a node.
type Facts struct {
	// Spaces are the network namespaces; the first is the node's.
	Spaces []*Space
	// Window is the time between the two readings.
	Window time.Duration
	// Unseen says what could not be looked into, and why.
	Unseen []string

	cluster   *Cluster   // nil where none was named
	probed    *probed    // nil where nothing was asked to be sent
	nested    bool       // the node's namespace is not that which the host began with
	hidden    []Evidence // of Unseen, what every check of Everywhere missed
	commands  map[string][]int
	kubeProxy fact[kubeproxy.Found]
	nodePorts string // kube-apiserver's --service-node-port-range, where it runs here
}

// With gives the facts the objects of a cluster: those of the cluster that the node is
// in. Facts of no node are &Facts{}.
func (f *Facts) With(c *Cluster) *Facts {
	f.cluster = c
	return f
}

// Space is one network namespace.
type Space struct {
	// Name is "node", "pod web-7f", or another that a person can find it by.
	Name string

	inode       uint64
	path        string // leads to it
	pod         string // whose it is, "" if nobody's
	processes   []process
	first, last map[string]fact[string]
	devices     fact[[]link.Device]
	home        int // the node's number here
	firstQdiscs fact[map[int]link.Qdisc]
	lastQdiscs  fact[map[int]link.Qdisc]
	budgets     []budget // of the node, those of all
	listeners   fact[[]sockdiag.Listener]
	connections fact[[]proc.Socket]
	resolver    fact[string]
}

// budget is the cpu.stat of a process's cgroup.
type budget struct{ process, file string }

// fact is what was read, or why it was not.
type fact[T any] struct {
	is  T
	err error
}

// errNotAsked is of facts that a check did not name.
var errNotAsked = errors.New("the check does not name it among what it reads")

// get returns a fact; where there is none, it notes why.
func get[T any](v *view, read string, f fact[T]) (T, bool) {
	if !slices.Contains(v.check.Reads, read) {
		f.err = errNotAsked
	}
	if f.err != nil {
		v.lacks(read, "%s", reason(f.err))
	}
	return f.is, f.err == nil
}

// errGlobal is of what only the namespace shows that the host began with.
var errGlobal = errors.New("no such file here: it is the host's, and this node is a namespace on it")

// reason is the cause without the path, which the evidence names.
func reason(err error) string {
	var number syscall.Errno
	if errors.As(err, &number) {
		return number.Error()
	}
	return err.Error()
}

// text is a file or setting as it was at the end.
func (v *view) text(read string) (string, bool) {
	f, there := v.last[read]
	if !there {
		f.err = errNotAsked
	}
	if v.facts.nested && errors.Is(f.err, fs.ErrNotExist) {
		f.err = errGlobal
	}
	return get(v, read, f)
}

// there says whether a file or setting exists.
func (v *view) there(read string) bool { return !errors.Is(v.last[read].err, fs.ErrNotExist) }

// number is a setting that is a number.
func (v *view) number(name string) (int64, bool) {
	text, ok := v.text(name)
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil {
		v.lacks(name, "it is %q, no number", strings.TrimSpace(text))
	}
	return n, err == nil
}

// matches are the files of a pattern, in order.
func (v *view) matches(pattern string) []string {
	var all []string
	for name := range v.last {
		if ok, _ := path.Match(file(pattern), file(name)); ok && name != pattern {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

// source says in which file counters are, and how they are read there.
type source struct {
	prefix, file string
	read         func(text, name string) (uint64, error)
}

const snmp6 = "/proc/net/snmp6"

var sources = []source{
	{"TcpExt.", "/proc/net/netstat", proc.Counter},
	{"IpExt.", "/proc/net/netstat", proc.Counter},
	{"Ip.", "/proc/net/snmp", proc.Counter},
	{"Tcp.", "/proc/net/snmp", proc.Counter},
	{"Udp.", "/proc/net/snmp", proc.Counter},
	{"Ip6", snmp6, proc.Line},
	{"Udp6", snmp6, proc.Line},
	{"nf_conntrack.", "/proc/net/stat/nf_conntrack", column},
	{"arp_cache.", "/proc/net/stat/arp_cache", column},
	{"ndisc_cache.", "/proc/net/stat/ndisc_cache", column},
	{"softnet.dropped", "/proc/net/softnet_stat", softnet},
}

func column(text, name string) (uint64, error) {
	_, name, _ = strings.Cut(name, ".")
	return proc.PerCPU(text, name)
}

func softnet(text, _ string) (uint64, error) { return proc.Softnet(text, proc.SoftnetDropped) }

// rise is by how much a counter grew in the window.
func (v *view) rise(name string) (grown uint64, ok bool) {
	from := sources[slices.IndexFunc(sources, func(s source) bool { return strings.HasPrefix(name, s.prefix) })]
	if from.file == snmp6 && !v.there(snmp6) {
		return 0, true // without IPv6 nothing of it is counted
	}
	text, ok := v.text(from.file)
	if !ok {
		return 0, false
	}
	after, err := from.read(text, name)
	first := v.first[from.file]
	before, err0 := from.read(first.is, name)
	if err := cmp.Or(first.err, err, err0); err != nil {
		v.lacks(from.file, "%s", reason(err))
		return 0, false
	}
	return after - min(before, after), true
}

// rises fires for each of the counters that grew.
func (v *view) rises(s Severity, names ...string) (grown uint64) {
	for _, name := range names {
		n, ok := v.rise(name)
		switch {
		case !ok:
		case n > 0:
			v.fires(s, name, "%s", v.inWindow(n))
		default:
			v.sees(name, "%s", v.inWindow(0))
		}
		grown += n
	}
	return grown
}

func (v *view) inWindow(n uint64) string {
	seconds := v.facts.Window.Seconds()
	if n == 0 {
		return fmt.Sprintf("0 in %.1f s", seconds)
	}
	return fmt.Sprintf("%s in %.1f s, %.1f a second", thousands(n), seconds, float64(n)/max(seconds, 1e-9))
}

// thousands is a number for people: "251,700".
func thousands(n uint64) string {
	text := strconv.FormatUint(n, 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// runs says whether a process of this name is there.
func (v *view) runs(command string) bool { return len(v.facts.commands[command]) > 0 }
