package doctor

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/kubeproxy"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/sockdiag"
	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/dir"
)

// A world is a fake host: a healthy node with one pod, which rows of tests change. It
// becomes two trees of files, one for each reading.
type world struct {
	node, pod *spot
	// files are of the host, beside those of its namespaces.
	files      map[string]string
	kubeProxy  kubeproxy.Found
	unread     map[string]error // Devices, Listeners, KubeProxyRules
	privileged error
	// objects are manifests of the cluster; refused are kinds that may not be listed.
	objects string
	refused map[string]bool
	// inside says that the process is in a namespace of its own, as in a lab.
	inside bool
	// wire is what becomes of probes.
	wire wire
}

// spot is a namespace of a world.
type spot struct {
	files     map[string]string // by the names of Check.Reads
	grown     map[string]int    // counters of the second reading; 0 in the first
	unread    map[string]bool
	devices   []link.Device
	listeners []sockdiag.Listener
	// drops are those of device 3, a tbf unless said otherwise, at the second reading.
	drops uint32
	kind  string
}

const (
	podInode = 4026532001
	udpTitle = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n"
)

func healthy() *world {
	every := map[string]string{
		trackedCount: "10", trackedMax: "262144", tcpTracked: "86400", logInvalid: "0",
		somaxconn: "4096", twReuse: "2", localPorts: "32768\t60999", congestion: "bbr", osRelease: "6.18.44",
		ipForward: "1", "net.ipv4.conf.all.rp_filter": "0",
		sockstat: "sockets: used 3\nTCP: inuse 2 orphan 0 tw 1 alloc 3 mem 23\nUDP: inuse 0 mem 0\n", sockstat6: "TCP6: inuse 1\n",
		closeWait: "3600", udpStream: "120", tcpReceive: "4096\t131072\t6291456", receiveMax: "212992", forward6: "1",
		"net.ipv4.tcp_timestamps": "1", "net.ipv4.tcp_sack": "1", "net.ipv4.tcp_window_scaling": "1", "net.ipv4.tcp_fin_timeout": "60",
		"net.ipv4.tcp_retries2": "15", "net.ipv4.tcp_syncookies": "1", "net.ipv4.tcp_mtu_probing": "0", "net.ipv6.conf.default.disable_ipv6": "0",
		routes6: default6("eth0", 0x1),
		udp4:    udpTitle, udp6: udpTitle, Connections: "  sl\n", "/proc/net/tcp6": "  sl\n",
	}
	node := maps.Clone(every)
	maps.Copy(node, map[string]string{
		trackedLists: "262144", backlog: "1000", reservedPorts: "", tcpMem: "100 200 300", jitEnable: "1", jitHarden: "0",
		neighbours[0].limit: "1024", neighbours[1].limit: "1024", "net.ipv4.conf.all.route_localnet": "0",
		cpuStat: "cpu 0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\n",
		netDev:  "  eth0: 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n",
		"/sys/class/net/eth0/queues/rx-0/rps_cpus":              "0",
		"/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
		"/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver":   "intel_pstate",
		"/etc/sysctl.d/10-net.conf":                             "# nothing\n",
		"/etc/resolv.conf":                                      "nameserver 127.0.0.53\n",
		ringFile:                                                "7\n", "net.ipv6.conf.eth0.accept_ra": "1",
		routes4: routeTitle + route4("eth0", "00000000", "FE0200C0", "00000000") + route4("eth0", "000200C0", "00000000", "00FFFFFF") + route4("vxlan0", "0001F40A", "0001F40A", "00FFFFFF"),
	})
	address := []netip.Addr{netip.MustParseAddr("10.244.1.4")}
	return &world{
		node: &spot{files: node, grown: map[string]int{}, unread: map[string]bool{}, devices: []link.Device{
			{Index: 2, Name: "eth0", MTU: 1500, Up: true, Ethernet: true, DefaultRoute: true, PeerNamespace: -1, Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}},
			{Index: 9, Name: "veth1", Kind: "veth", MTU: 1450, Up: true, PeerElsewhere: true, PeerNamespace: 7, Peer: 3, Ethernet: true},
			{Index: 11, Name: "vxlan0", Kind: "vxlan", MTU: 1450, Up: true, Peer: 2, PeerNamespace: -1, Ethernet: true},
		}},
		pod: &spot{files: every, grown: map[string]int{}, unread: map[string]bool{}, devices: []link.Device{
			{Index: 3, Name: "eth0", Kind: "veth", MTU: 1450, Up: true, PeerElsewhere: true, PeerNamespace: 0, Peer: 9, DefaultRoute: true, Addresses: address, Ethernet: true},
		}},
		files: map[string]string{
			"proc/1/comm": "systemd", "proc/2/comm": "kthreadd", "proc/30/comm": "kubelet", "proc/40/comm": "pause", "proc/41/comm": "web",
			"proc/41/cgroup": "0::/kubepods.slice/kubepods-pod1.slice/web\n", "proc/41/root/etc/hostname": "web-1\n",
			"proc/41/root/etc/resolv.conf": "search a.svc b\nnameserver 10.96.0.10\noptions ndots:5\n", "proc/self/mountinfo": "",
			"proc/sys/kernel/hostname": "node-1\n",
		},
		unread:  map[string]error{},
		objects: healthyCluster,
		refused: map[string]bool{},
		wire:    healthyWire(),
	}
}

// healthyCluster is one in which all is well.
//
//go:embed testdata/cluster.yaml
var healthyCluster string

const (
	ringFile   = "/sys/class/net/eth0/statistics/rx_missed_errors"
	routeTitle = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
)

// route4 is a line of /proc/net/route; numbers are in the order of a little-endian host.
func route4(device, to, via, mask string) string {
	return fmt.Sprintf("%s %s %s 0003 0 0 0 %s 0 0 0\n", device, to, via, mask)
}

// default6 is a line of /proc/net/ipv6_route.
func default6(device string, flags uint32) string {
	zero := strings.Repeat("0", 32)
	return fmt.Sprintf("%s 00 %s 00 fe800000000000000000000000000001 00000400 00000001 00000000 %08x %8s\n", zero, zero, flags, device)
}

// decoded are the objects of texts that worlds had.
var decoded = map[string][]dir.Object{}

// Objects gives the manifests of a kind.
func (w *world) Objects(_ context.Context, r Resource, each func([]byte) error) error {
	if w.refused[r.Name] {
		return errors.New("list " + r.Path() + ": operation not permitted")
	}
	all, known := decoded[w.objects]
	if !known {
		var problems []model.Problem
		if all, problems = dir.Decode("cluster.yaml", []byte(w.objects)); len(problems) > 0 {
			return problems[0]
		}
		decoded[w.objects] = all
	}
	found := false
	for _, o := range all {
		if group, _, _ := strings.Cut(strings.TrimSuffix(o.APIVersion, "v1"), "/"); o.Kind == r.Kind && group == r.Group {
			found = true
			if err := each(o.JSON); err != nil {
				return err
			}
		}
	}
	if !found && r.Group != "" {
		return ErrNoKind
	}
	return nil
}

// Document finds one in a ConfigMap.
func (w *world) Document(text, kind string) ([]byte, error) {
	all, problems := dir.Decode("ConfigMap", []byte(text))
	for _, o := range all {
		if o.Kind == kind {
			return o.JSON, nil
		}
	}
	return nil, problems[0]
}

// counterFiles are the texts of the counters of a namespace.
func (s *spot) counterFiles(last bool) map[string]string {
	value := func(name string) int {
		if last {
			return s.grown[name]
		}
		return 0
	}
	groups := func(of map[string][]string) (text string) {
		for _, group := range slices.Sorted(maps.Keys(of)) {
			names, values := "", ""
			for _, name := range of[group] {
				names, values = names+" "+name, values+fmt.Sprint(" ", value(group+"."+name))
			}
			text += group + ":" + names + "\n" + group + ":" + values + "\n"
		}
		return text
	}
	table := func(group string, names ...string) string {
		values := "0000001e"
		for _, name := range names {
			values += fmt.Sprintf(" %08x", value(group+"."+name))
		}
		return "entries " + strings.Join(names, " ") + "\n" + values + "\n"
	}
	lines := ""
	for _, name := range []string{"Ip6ReasmFails", "Ip6FragCreates", "Udp6RcvbufErrors", "Udp6InCsumErrors"} {
		lines += fmt.Sprintln(name, value(name))
	}
	return map[string]string{
		netstat: groups(map[string][]string{
			"TcpExt": {"SyncookiesSent", "ListenOverflows", "ListenDrops", "TCPReqQFullDrop", "IPReversePathFilter", "TCPTimeWaitOverflow", "TCPAbortOnMemory"},
			"IpExt":  {"InNoRoutes", "InCsumErrors"},
		}),
		snmp: groups(map[string][]string{
			"Ip": {"OutNoRoutes", "ReasmFails", "FragCreates"}, "Tcp": {"InCsumErrors"}, "Udp": {"RcvbufErrors", "InCsumErrors"},
		}),
		snmp6:              lines,
		trackedStat:        table("nf_conntrack", "insert_failed", "drop", "early_drop", "invalid"),
		neighbours[0].stat: table("arp_cache", "forced_gc_runs", "table_fulls"),
		neighbours[1].stat: table("ndisc_cache", "forced_gc_runs", "table_fulls"),
		softnetStat:        fmt.Sprintf("00000010 %08x 00000000\n", value("softnet.dropped")),
	}
}

// lay writes a reading of the namespace below a folder.
func (s *spot) lay(t *testing.T, root string, checks []Check, last bool) {
	all := s.counterFiles(last)
	for name, text := range s.files {
		earlier, changes := strings.CutPrefix(name, "later:")
		if changes && !last {
			continue
		}
		if _, replaced := s.files["later:"+earlier]; replaced && last && !changes {
			continue
		}
		all[earlier] = text
	}
	for name, text := range all {
		if !wantedFile(checks, name) {
			continue // files take long on a busy disk
		}
		place := filepath.Join(root, file(name))
		if s.unread[name] { // root may read any file, but not a folder as one
			place = filepath.Join(place, "folder")
		}
		put(t, place, text)
	}
}

func wantedFile(checks []Check, name string) bool {
	return slices.ContainsFunc(checks, func(c Check) bool {
		return slices.ContainsFunc(c.Reads, func(read string) bool {
			fits, _ := filepath.Match(file(read), strings.TrimPrefix(file(name), "/proc/1/root"))
			return fits || read == Connections && name == "/proc/net/tcp6" || read == Throttling && strings.HasPrefix(name, "/sys/fs/cgroup/")
		})
	})
}

// folder is in memory where that can be: a world is a hundred small files.
func folder(t *testing.T) string {
	t.Helper()
	made, err := os.MkdirTemp("/dev/shm", "millrace-doctor-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(made) })
	return made
}

func put(t *testing.T, place, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(place), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(place, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (w *world) host(t *testing.T, checks []Check) *Host {
	t.Helper()
	base := folder(t)
	root := filepath.Join(base, "first")
	for name, text := range w.files {
		put(t, filepath.Join(root, name), text)
	}
	w.node.lay(t, root, checks, false)
	w.node.lay(t, filepath.Join(base, "last"), checks, true)
	w.pod.lay(t, filepath.Join(base, "first-pod"), checks, false)
	w.pod.lay(t, filepath.Join(base, "last-pod"), checks, true)
	for _, id := range []string{"self", "1", "2", "30"} {
		inode := 4026531840
		if w.inside && id != "self" {
			inode++
		}
		w.join(t, root, id, inode)
	}
	w.join(t, root, "40", podInode)
	w.join(t, root, "41", podInode)
	var lock sync.Mutex
	visits := map[*Space]int{}
	of := func(root string) *spot {
		switch {
		case strings.HasSuffix(root, "-pod"):
			return w.pod
		case strings.HasSuffix(root, "elsewhere"):
			return &spot{}
		}
		return w.node
	}
	return &Host{
		root: root,
		within: func(s *Space, read func(string) error) error {
			folder := "first"
			lock.Lock()
			if visits[s]++; visits[s] > 1 {
				folder = "last"
			}
			lock.Unlock()
			if s.inode == podInode {
				folder += "-pod"
			} else if s.path != "" {
				folder = "elsewhere"
			}
			return read(filepath.Join(base, folder))
		},
		fromNode:   func(read func()) { read() },
		privileged: func() error { return w.privileged },
		devices: func(root string) ([]link.Device, int, error) {
			return of(root).devices, 0, w.unread[Devices]
		},
		qdiscs: func(root string) (map[int]link.Qdisc, error) {
			q := link.Qdisc{Kind: cmp.Or(of(root).kind, "tbf"), Drops: 5}
			if strings.Contains(root, "last") {
				q.Drops += of(root).drops
			}
			return map[int]link.Qdisc{3: q}, w.unread[Qdiscs]
		},
		listeners: func(root string) ([]sockdiag.Listener, error) { return of(root).listeners, w.unread[Listeners] },
		kubeProxy: func() (kubeproxy.Found, error) { return w.kubeProxy, w.unread[KubeProxyRules] },
		wire:      w.wire,
	}
}

func (w *world) join(t *testing.T, root, id string, inode int) {
	t.Helper()
	folder := filepath.Join(root, "proc", id, "ns")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(fmt.Sprintf("net:[%d]", inode), filepath.Join(folder, "net")); err != nil {
		t.Fatal(err)
	}
}

// examine reads a world for some checks, and gives their results by ID.
func (w *world) examine(t *testing.T, checks []Check) (map[string]Result, *Facts) {
	t.Helper()
	facts, err := w.host(t, checks).Read(t.Context(), checks, time.Millisecond, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	cluster, err := ReadCluster(t.Context(), w, checks, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.host(t, nil).Probe(t.Context(), facts.With(cluster), checks, io.Discard); err != nil {
		t.Fatal(err)
	}
	results := map[string]Result{}
	for _, r := range Run(facts, checks) {
		results[r.ID] = r
	}
	return results, facts
}

func one(t *testing.T, id string) []Check {
	t.Helper()
	all := Checks()
	at := slices.IndexFunc(all, func(c Check) bool { return c.ID == id })
	if at < 0 {
		t.Fatalf("no check %s", id)
	}
	return all[at : at+1]
}

func texts(r Result) (text string) {
	for _, e := range r.Evidence {
		text += fmt.Sprintf("%s | %s | %s\n", e.Scope, e.Read, e.Value)
	}
	return text
}
