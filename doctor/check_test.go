package doctor

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/millrace/millrace/kernel/kubeproxy"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/kernel/sockdiag"
)

// Each check fires for what it is about, and says where it saw it.
func TestChecksFire(t *testing.T) {
	fired := map[string]bool{}
	for _, row := range slices.Concat(firing, settingsFire, clusterFires, probesFire) {
		t.Run(row.id+" "+row.what, func(t *testing.T) {
			w := healthy()
			row.change(w)
			results, _ := w.examine(t, one(t, row.id))
			r := results[row.id]
			if r.Status != row.want {
				t.Errorf("%s, not %s:\n%s", r.Status, row.want, texts(r))
			}
			if (r.Severity == Critical) != (row.want == Fail) {
				t.Errorf("status %s and severity %s", r.Status, r.Severity)
			}
			if !strings.Contains(texts(r)+r.Fix, row.says) {
				t.Errorf("the evidence does not say %q:\n%s%s", row.says, texts(r), r.Fix)
			}
		})
		fired[row.id] = true
	}
	for _, c := range ofOneNode() {
		if !fired[c.ID] {
			t.Errorf("no row makes %s fire", c.ID)
		}
	}
}

// grows is a counter of the pod, or with "node" before it of the node.
func grows(name string, by int) func(*world) {
	return func(w *world) {
		if of, ok := strings.CutPrefix(name, "node "); ok {
			w.node.grown[of] = by
		} else {
			w.pod.grown[name] = by
		}
	}
}

// sets is a file or setting of the pod, or with "node" before it of the node.
func sets(name, value string) func(*world) {
	return func(w *world) {
		if of, ok := strings.CutPrefix(name, "node "); ok {
			w.node.files[of] = value
		} else {
			w.pod.files[name] = value
		}
	}
}

func all(changes ...func(*world)) func(*world) {
	return func(w *world) {
		for _, change := range changes {
			change(w)
		}
	}
}

// manyTo is connections of the pod to one destination; more of them do not count.
func manyTo(n int) func(*world) {
	text := ""
	for i := range n {
		text += fmt.Sprintf("%4d: 0401F40A:%04X 0A00600A:0050 06 00000000:00000000 03:00000000 00000000 0 0 0 3 ffff\n", i, 40000+i)
	}
	text += "  99: 0401F40A:1F90 0B00600A:9C40 01 00000000:00000000 00:00000000 00000000 0 0 7 1 ffff 20 4 30 10 -1\n"
	return all(sets(Connections, text), sets(localPorts, "40000 40099"), sets(sockstat, fmt.Sprintf("TCP: inuse 1 orphan 0 tw %d alloc 1 mem 1\n", n)))
}

func udpSocket(port, drops int) string {
	return udpTitle + fmt.Sprintf("  1: 00000000:%04X 00000000:0000 07 00000000:00000000 00:00000000 00000000 0 0 900 2 ffff %d\n", port, drops)
}

// limited makes the pod a DNS server whose cgroup has these texts at the two readings.
func limited(first, last string) func(*world) {
	return func(w *world) {
		w.files["proc/41/comm"], w.files["proc/41/cgroup"] = "coredns", "0::/kubepods.slice/dns\n"
		w.node.files["/sys/fs/cgroup/kubepods.slice/dns/cpu.stat"] = first
		w.node.files["later:/sys/fs/cgroup/kubepods.slice/dns/cpu.stat"] = last
	}
}

var kubeProxyRules = kubeproxy.Found{Parts: []nft.Part{{Family: "ip", Table: "nat", Rules: 4}, {Family: "ip", Table: "nat", Rules: 3}}}

// story is a change of a healthy world, what a check says of it, and with which words.
type story struct {
	id, what string
	change   func(*world)
	want     Status
	says     string
}

var firing = []story{
	{"CT-01", "nearly full", sets(trackedCount, "250000"), Fail, "pod web-1 | net.netfilter.nf_conntrack_count | 250,000 of 262,144, 95 %"},
	{"CT-01", "filling", sets("node "+trackedCount, "200000"), Warn, "node | net.netfilter.nf_conntrack_count | 200,000 of 262,144, 76 %"},
	{"CT-01", "twice as much is advised", sets("node "+trackedCount, "200000"), Warn, "nf_conntrack_max=524288"},
	{"CT-01", "kube-proxy owns it", all(sets("node "+trackedCount, "200000"), func(w *world) { w.files["proc/30/comm"] = "kube-proxy" }), Warn, "kube-proxy sets this limit"},
	{"CT-02", "another value", sets("node /etc/sysctl.d/90-ct.conf", "net/netfilter/nf_conntrack_max = 1000000\n"), Warn, "/etc/sysctl.d/90-ct.conf | 1000000, and the kernel has 262144"},
	{"CT-02", "the folder that counts more", all(sets("node /usr/lib/sysctl.d/90-ct.conf", trackedMax+"=262144"), sets("node /etc/sysctl.d/90-ct.conf", trackedMax+"=9")), Warn, "/etc/sysctl.d/90-ct.conf | 9,"},
	{"CT-02", "the node's file, from a container", sets("node /proc/1/root/etc/sysctl.d/90-ct.conf", trackedMax+"=7"), Warn, "/etc/sysctl.d/90-ct.conf | 7, and"},
	{"CT-03", "few lists", sets("node "+trackedLists, "16384"), Warn, "16384 for at most 262144 entries"},
	{"CT-03", "a quarter is advised", sets("node "+trackedLists, "16384"), Warn, "echo 65536 >"},
	{"CT-04", "full", grows("nf_conntrack.drop", 10), Fail, "pod web-1 | nf_conntrack.drop | 10 in 0.0 s"},
	{"CT-04", "no port left", all(grows("nf_conntrack.drop", 9), grows("nf_conntrack.insert_failed", 9)), Fail, "no port left, rather than a full table"},
	{"CT-04", "early", grows("node nf_conntrack.early_drop", 3), Warn, "node | nf_conntrack.early_drop | 3"},
	{"CT-05", "clash", grows("nf_conntrack.insert_failed", 2), Warn, "nf_conntrack.insert_failed | 2"},
	{"CT-08", "idle", all(sets(tcpTracked, "432000"), sets(trackedCount, "140000")), Warn, "432000 s, and 140000 of 262144 entries"},
	{"CT-12", "logs", sets(logInvalid, "255"), Warn, "nf_conntrack_log_invalid | 255"},
	{"DN-06", "the node's resolver", func(w *world) { w.files["proc/41/root/etc/resolv.conf"] = "nameserver 127.0.0.53\n" }, Fail, "pod web-1 | /etc/resolv.conf | nameserver 127.0.0.53, and no socket"},
	{"DN-08", "many servers", func(w *world) {
		w.files["proc/41/root/etc/resolv.conf"] = strings.Repeat("nameserver 10.0.0.1\n", 5)
	}, Warn, "5 name servers: the last 2 are passed over"},
	{"DN-08", "long search", func(w *world) {
		w.files["proc/41/root/etc/resolv.conf"] = "search" + strings.Repeat(" a.example", 33) + "\n"
	}, Warn, "33 search domains"},
	{"DN-10", "server too slow", all(sets(udp4, udpSocket(53, 5)), sets("later:"+udp4, udpSocket(53, 12))), Warn, "0.0.0.0:53: 7 in"},
	{"HS-01", "drops", grows("node softnet.dropped", 18), Warn, "softnet.dropped | 18"},
	{"HS-04", "overflows", grows("TcpExt.ListenOverflows", 41), Fail, "pod web-1 | TcpExt.ListenOverflows | 41"},
	{"HS-04", "full now", func(w *world) {
		w.pod.listeners = []sockdiag.Listener{{Address: netip.MustParseAddrPort("0.0.0.0:80"), Waiting: 2, Backlog: 1, Drops: 16}}
	}, Fail, "0.0.0.0:80: 2 connections wait, room is for 1; 16 dropped"},
	{"HS-05", "low", sets(somaxconn, "128"), Warn, "net.core.somaxconn | 128"},
	{"HS-06", "queue full", grows("TcpExt.TCPReqQFullDrop", 58), Warn, "TcpExt.TCPReqQFullDrop | 58"},
	{"HS-06", "drops of another cause", all(grows("TcpExt.ListenDrops", 60), grows("TcpExt.ListenOverflows", 2)), Warn, "of which 2 are ListenOverflows"},
	{"HS-07", "cookies", grows("TcpExt.SyncookiesSent", 53), Warn, "TcpExt.SyncookiesSent | 53"},
	{"HS-08", "set", sets("node "+twReuse, "1"), Warn, "node | net.ipv4.tcp_tw_reuse | 1"},
	{"HS-09", "ports gone", manyTo(85), Warn, "10.244.1.4 to 10.96.0.10:80: 85 of 100 ports"},
	{"HS-13", "pressure", sets("node "+sockstat, "TCP: inuse 2 orphan 0 tw 1 alloc 3 mem 250\n"), Warn, "250 pages; tcp_mem is 100 200 300"},
	{"HS-13", "full", sets("node "+sockstat, "TCP: inuse 2 orphan 0 tw 1 alloc 3 mem 300\n"), Fail, "300 pages"},
	{"HS-14", "IPv6", grows("Udp6RcvbufErrors", 9), Warn, "Udp6RcvbufErrors | 9"},
	{"HS-14", "whose", all(grows("Udp.RcvbufErrors", 194), sets(udp4, udpSocket(9000, 0)), sets("later:"+udp4, udpSocket(9000, 194))), Warn, "0.0.0.0:9000: 194"},
	{"HS-16", "old kernel", sets(osRelease, "5.15.0-91-generic"), Warn, "bbr, on Linux 5.15"},
	{"HS-18", "interpreted", sets("node "+jitEnable, "0"), Warn, "bpf_jit_enable | 0"},
	{"HS-18", "blinded", sets("node "+jitHarden, "2"), Warn, "bpf_jit_harden | 2"},
	{"HS-19", "full", grows("node arp_cache.table_fulls", 4), Fail, "arp_cache.table_fulls | 4"},
	{"HS-19", "thrown out", grows("node ndisc_cache.forced_gc_runs", 2), Warn, "ndisc_cache.forced_gc_runs | 2"},
	{"HS-19", "nearly", sets("node "+neighbours[1].limit, "32"), Warn, "30 entries of 32"},
	{"HS-20", "dropped", all(grows("TcpExt.IPReversePathFilter", 6), sets("net.ipv4.conf.eth0.rp_filter", "1")), Fail, "net.ipv4.conf.eth0.rp_filter | 1: strict"},
	{"HS-20", "a device with a dot in its name", all(grows("TcpExt.IPReversePathFilter", 6), sets("net.ipv4.conf.eth0/100.rp_filter", "1")), Fail, "net.ipv4.conf.eth0/100.rp_filter | 1: strict"},
	{"HS-20", "on the node", all(grows("node TcpExt.IPReversePathFilter", 6), sets("node net.ipv4.conf.eth0.rp_filter", "1")), Warn, "node | net.ipv4.conf.eth0.rp_filter"},
	{"HS-20", "loose", all(grows("TcpExt.IPReversePathFilter", 6), sets("net.ipv4.conf.all.rp_filter", "2"), sets("net.ipv4.conf.eth0.rp_filter", "1")), Warn, "IPReversePathFilter | 6"},
	{"HS-21", "off", sets("node "+ipForward, "0"), Fail, "pod web-1 | net.ipv4.ip_forward | 0 on the node, whose veth1"},
	{"HS-22", "errors", sets("node later:"+netDev, "  eth0: 0 900 100 0 0 0 0 0 0 0 0 0 0 0 0 0\n"), Warn, "eth0: 100 errors in 900 packets received"},
	{"HS-24", "one queue", sets("node later:"+cpuStat, "cpu 0 0 0 110 0 0 90 0 0 0\ncpu0 0 0 0 10 0 0 90 0 0 0\ncpu1 0 0 0 100 0 0 0 0 0 0\n"), Warn, "echo 2 > /sys/class/net/eth0/queues/rx-0/rps_cpus"},
	{"HS-25", "steal", sets("node later:"+cpuStat, "cpu 60 0 0 100 0 0 0 40 0 0\n"), Warn, "20 % steal"},
	{"HS-26", "version 2", limited("nr_periods 10\nnr_throttled 2\n", "nr_periods 30\nnr_throttled 9\n"), Warn, "/sys/fs/cgroup/kubepods.slice/dns/cpu.stat | coredns (pid 41): 7 of 20 periods"},
	{"HS-26", "version 1", all(limited("", ""), func(w *world) {
		w.files["proc/41/cgroup"] = "3:memory:/kubepods/x\n1:cpu,cpuacct:/kubepods/dns\n0::/kubepods.slice/dns\n"
		w.node.files["/sys/fs/cgroup/cpu,cpuacct/kubepods/dns/cpu.stat"] = "nr_periods 0\nnr_throttled 0\n"
		w.node.files["later:/sys/fs/cgroup/cpu,cpuacct/kubepods/dns/cpu.stat"] = "nr_periods 4\nnr_throttled 1\n"
	}), Warn, "1 of 4 periods"},
	{"HS-27", "slow", sets("node /sys/devices/system/cpu/cpu0/cpufreq/scaling_driver", "acpi-cpufreq"), Warn, "powersave of the driver acpi-cpufreq"},
	{"HS-29", "a rate", func(w *world) { w.pod.drops = 46 }, Warn, "pod web-1 | rtnetlink qdiscs | eth0 (tbf): 46 in"},
	{"HS-29", "on purpose", func(w *world) { w.pod.drops, w.pod.kind = 46, "fq_codel" }, Warn, "eth0 (fq_codel): 46 in"},
	{"HS-31", "overflow", grows("TcpExt.TCPTimeWaitOverflow", 7), Warn, "TCPTimeWaitOverflow | 7"},
	{"HS-35", "bad", grows("Udp.InCsumErrors", 3), Warn, "Udp.InCsumErrors | 3"},
	{"HS-36", "to forward", grows("node IpExt.InNoRoutes", 3), Warn, "IpExt.InNoRoutes | 3"},
	{"HS-36", "own", grows("Ip.OutNoRoutes", 3), Warn, "Ip.OutNoRoutes | 3"},
	{"HS-37", "lost", grows("Ip.ReasmFails", 1), Warn, "Ip.ReasmFails | 1"},
	{"MT-01", "bound", func(w *world) { w.node.devices[2].MTU = 1451 }, Warn, "vxlan0 (vxlan) 1451 + 50, and eth0 below it 1500"},
	{"MT-01", "not bound", func(w *world) { w.node.devices[2].MTU, w.node.devices[2].Peer = 1500, 0 }, Warn, "and eth0 below it 1500"},
	{"MT-06", "cut", grows("node Ip.FragCreates", 400), Warn, "Ip.FragCreates | 400"},
	{"MT-12", "differ", func(w *world) { w.pod.devices[0].MTU = 1500 }, Fail, "pod web-1 | rtnetlink devices | eth0 1500, and its end on the node, veth1, 1450"},
	{"PX-02", "ipvs", func(w *world) { w.node.devices = append(w.node.devices, link.Device{Name: "kube-ipvs0"}) }, Warn, "kube-ipvs0"},
	{"PX-08", "left", func(w *world) { w.kubeProxy = kubeProxyRules }, Warn, "7 rules in table ip nat"},
	{"PX-15", "all ports", sets("node "+localPorts, "1024 65535"), Warn, "1024-65535 has 2768 ports of 30000-32767"},
	{"PX-15", "some reserved", all(sets("node "+localPorts, "1024 65535"), sets("node "+reservedPorts, "8080,30000-32766")), Warn, "has 1 ports of"},
	{"PX-15", "what was reserved stays so", all(sets("node "+localPorts, "1024 65535"), sets("node "+reservedPorts, "8080")), Warn, "=8080,30000-32767"},
	{"PX-15", "a range of one's own", func(w *world) {
		w.files["proc/1/comm"], w.files["proc/1/cmdline"] = "kube-apiserver", "kube-apiserver\x00--service-node-port-range=40000-40009\x00"
	}, Warn, "has 10 ports of 40000-40009"},
	{"PX-16", "routed", sets("node net.ipv4.conf.all.route_localnet", "1"), Warn, "net.ipv4.conf.all.route_localnet | 1"},
}

// ofOneNode are the checks but that which compares nodes.
func ofOneNode() []Check {
	return slices.DeleteFunc(Checks(), func(c Check) bool { return c.Scope == Among })
}

// On a healthy node nothing is found, and all could be looked at.
func TestAHealthyNode(t *testing.T) {
	results, facts := healthy().examine(t, ofOneNode())
	for id, r := range results {
		if r.Status != OK {
			t.Errorf("%s is %s:\n%s", id, r.Status, texts(r))
		}
	}
	if len(facts.Unseen) > 0 || len(facts.Spaces) != 2 {
		t.Errorf("%d namespaces; not seen: %q", len(facts.Spaces), facts.Unseen)
	}
}

// What looks like a fault and is none.
func TestChecksDoNotFire(t *testing.T) {
	resolv := "proc/41/root/etc/resolv.conf"
	for _, row := range slices.Concat(settingsCalm, clusterCalm, probesCalm, []story{
		{id: "CT-01", what: "at the threshold", change: sets(trackedCount, "196608")},
		{id: "CT-02", what: "a comment", change: sets("node /etc/sysctl.d/90.conf", "# "+trackedMax+"=1\n")},
		{id: "CT-02", what: "hidden by a file of the same name", change: all(sets("node /usr/lib/sysctl.d/90.conf", trackedMax+"=1"), sets("node /etc/sysctl.d/90.conf", ""))},
		{id: "CT-03", what: "kube-proxy's quarter", change: sets("node "+trackedLists, "65536")},
		{id: "CT-08", what: "days, but room", change: sets(tcpTracked, "432000")},
		{id: "DN-06", what: "a resolver of the pod's own", change: all(func(w *world) { w.files[resolv] = "nameserver 127.0.0.1\n" }, sets(udp6, udpTitle+
			"  1: 00000000000000000000000000000000:0035 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000 0 0 900 2 ffff 0\n"))},
		{id: "DN-08", what: "three servers", change: func(w *world) { w.files[resolv] = strings.Repeat("nameserver 10.0.0.1\n", 3) }},
		{id: "DN-10", what: "drops of long ago", change: sets(udp4, udpSocket(53, 500))},
		{id: "DN-10", what: "another's drops", change: all(sets(udp4, udpSocket(54, 5)), sets("later:"+udp4, udpSocket(54, 12)))},
		{id: "HS-04", what: "full to the brim", change: func(w *world) { w.pod.listeners = []sockdiag.Listener{{Waiting: 1, Backlog: 1, Drops: 3}} }},
		{id: "HS-06", what: "no way back", change: all(grows("TcpExt.ListenDrops", 2), grows("Ip.OutNoRoutes", 2))},
		{id: "HS-06", what: "all are overflows", change: all(grows("TcpExt.ListenDrops", 2), grows("TcpExt.ListenOverflows", 2))},
		{id: "HS-09", what: "less than 80 %", change: manyTo(79)},
		{id: "HS-16", what: "another algorithm", change: all(sets(osRelease, "5.15.0"), sets(congestion, "cubic"))},
		{id: "HS-16", what: "the node's own", change: sets("node "+osRelease, "5.15.0")},
		{id: "HS-21", what: "a pod on a bridge", change: all(sets("node "+ipForward, "0"), func(w *world) { w.node.devices[1].Master = 5 })},
		{id: "HS-21", what: "a pair that leads elsewhere", change: all(sets("node "+ipForward, "0"), func(w *world) { w.pod.devices[0].PeerNamespace = 4 })},
		{id: "HS-22", what: "few", change: sets("node later:"+netDev, "  eth0: 0 9 9 0 0 0 0 0 0 0 0 0 0 0 0 0\n")},
		{id: "HS-22", what: "a pair's", change: sets("node later:"+netDev, "  veth1: 0 9 900 0 0 0 0 0 0 0 0 0 0 0 0 0\n")},
		{id: "HS-24", what: "RPS is on", change: all(sets("node later:"+cpuStat, "cpu 0 0 0 110 0 0 90 0 0 0\ncpu0 0 0 0 10 0 0 90 0 0 0\ncpu1 0 0 0 100 0 0 0 0 0 0\n"), sets("node /sys/class/net/eth0/queues/rx-0/rps_cpus", "2"))},
		{id: "HS-26", what: "no limit", change: limited("usage_usec 1\n", "usage_usec 2\n")},
		{id: "HS-26", what: "now and then", change: limited("nr_periods 0\nnr_throttled 0\n", "nr_periods 20\nnr_throttled 4\n")},
		{id: "MT-01", what: "programs steer it", change: func(w *world) { w.node.devices[2].MTU, w.node.devices[2].Steered = 1500, true }},
		{id: "MT-01", what: "routes have their own", change: func(w *world) { w.node.devices[2].MTU, w.node.devices[2].Alias = 1500, "millrace route" }},
		{id: "MT-06", what: "no tunnel", change: all(grows("node Ip.FragCreates", 400), func(w *world) { w.node.devices = w.node.devices[:2] })},
		{id: "MT-12", what: "a pair that leads elsewhere", change: func(w *world) { w.pod.devices[0].MTU, w.pod.devices[0].PeerNamespace = 1500, 4 }},
		{id: "PX-08", what: "it runs", change: func(w *world) { w.kubeProxy = kubeProxyRules; w.kubeProxy.Process = 30 }},
		{id: "PX-15", what: "reserved", change: all(sets("node "+localPorts, "1024 65535"), sets("node "+reservedPorts, "30000-32767"))},
	}) {
		t.Run(row.id+" "+row.what, func(t *testing.T) {
			w := healthy()
			row.change(w)
			results, _ := w.examine(t, one(t, row.id))
			if r := results[row.id]; r.Status != OK {
				t.Errorf("%s:\n%s", r.Status, texts(r))
			}
		})
	}
}

// neverUnread are facts without which a check can do: which processes there are is
// seen, or nothing is; files of a pattern that are not there are none; HS-14 only says
// by them whose the datagrams were that are counted elsewhere; PX-06 and CN-13 ask for a
// setting only where there is IPVS or a bridge; DN-02 asks who sets the number of servers
// only where it is too low.
func neverUnread(id, read string) bool {
	return read == Processes || strings.Contains(read, "*") || id == "HS-14" && (read == udp4 || read == udp6) ||
		id == "DN-02" && (read == Deployments || read == Autoscalers) || id == "PX-06" && read != Devices || id == "CN-13" && read == bridgeRules
}

// Whatever of its facts a check cannot read, it does not say that all is well.
func TestChecksSayWhatTheyCannotRead(t *testing.T) {
	denied := errors.New("operation not permitted")
	for _, c := range ofOneNode() {
		for _, read := range c.Reads {
			if neverUnread(c.ID, read) {
				continue
			}
			t.Run(c.ID+" "+read, func(t *testing.T) {
				w := healthy()
				w.refused[read] = true // where it is a kind of objects
				switch read {
				case Echoes, Queries, Connects:
					w.wire = unsentWire(denied)
				case Devices, Listeners, Qdiscs, KubeProxyRules:
					w.unread[read] = denied
				case Throttling:
					limited("nr_periods 1\n", "nr_periods 2\n")(w)
					w.node.unread["/sys/fs/cgroup/kubepods.slice/dns/cpu.stat"] = true
				case Resolver:
					delete(w.files, "proc/41/root/etc/resolv.conf")
				case Connections:
					manyTo(85)(w)
					w.pod.unread[read] = true
				case udp4, udp6:
					w.pod.unread[read] = true
				default:
					w.node.unread[read], w.pod.unread[read] = true, true
				}
				results, _ := w.examine(t, one(t, c.ID))
				if r := results[c.ID]; r.Status != Skip || !strings.Contains(texts(r), "not permitted") && !strings.Contains(texts(r), "is a directory") && !strings.Contains(texts(r), "no such file") {
					t.Errorf("%s:\n%s", r.Status, texts(r))
				}
			})
		}
	}
}

// A check that looks at something it does not name is blind in a run of its own.
func TestChecksNameWhatTheyRead(t *testing.T) {
	for _, c := range Checks() {
		results, _ := healthy().examine(t, []Check{c})
		if r := results[c.ID]; strings.Contains(texts(r), errNotAsked.Error()) {
			t.Errorf("%s:\n%s", c.ID, texts(r))
		}
	}
}

var identity = regexp.MustCompile(`^(PX|CT|DN|MT|HS|CN|IN|GW|PR)-[0-9][0-9]$`)

// What a person is told is all there.
func TestChecksAreWhole(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range Checks() {
		if !identity.MatchString(c.ID) || seen[c.ID] {
			t.Errorf("%q: a wrong ID, or one that is taken", c.ID)
		}
		seen[c.ID] = true
		for name, text := range map[string]string{
			"layer": c.Layer, "title": c.Title, "when": c.When, "effect": c.Effect, "source": c.Source, "fix": c.Fix, "undo": c.Undo, "pitfall": c.Pitfall,
		} {
			if text == "" {
				t.Errorf("%s: no %s", c.ID, name)
			}
		}
		if !strings.Contains(c.Source, "https://") {
			t.Errorf("%s: the source %q is nowhere to be read", c.ID, c.Source)
		}
		if strings.Contains(c.Title, "|") || strings.Contains(c.When, "|") || len(c.Reads) == 0 || c.look == nil {
			t.Errorf("%s: a table cannot hold it, or it looks at nothing", c.ID)
		}
	}
}

func TestSelect(t *testing.T) {
	ids := func(names []string, least Severity) (text string) {
		chosen, err := Select(Checks(), names, least)
		if err != nil {
			return err.Error()
		}
		for _, c := range chosen {
			text += c.ID + " "
		}
		return text
	}
	for _, row := range []struct {
		names []string
		least Severity
		want  string
	}{
		{[]string{"ct-01", "MT"}, Info, "CT-01 MT-01 MT-02 MT-06 MT-07 MT-09 MT-12 MT-14 "},
		{[]string{"mtu"}, Critical, "MT-12 "},
		{[]string{"dns", "DN-06"}, Critical, "DN-06 DN-13 DN-18 "},
		{[]string{"cluster"}, Critical, "CN-01 CN-04 CN-05 CN-08 CN-20 CN-21 CN-22 CN-23 DN-13 DN-18 GW-01 GW-02 GW-03 GW-04 GW-05 PX-03 "},
		{[]string{"probe"}, Critical, "PR-01 PR-04 PR-06 PR-07 PR-08 PR-09 "},
		{[]string{"PR-03", "node"}, Critical, "CN-10 CN-13 HS-13 HS-19 "},
		{[]string{"CT-99"}, Info, `no check and no layer is called "CT-99": docs/doctor.md lists them`},
	} {
		if got := ids(row.names, row.least); got != row.want {
			t.Errorf("%v from %s on: %q, not %q", row.names, row.least, got, row.want)
		}
	}
}

// What a finding says to do, and to take back, is right in each place that it names.
func TestFixAndUndoAreThoseOfTheirPlaces(t *testing.T) {
	const established, jit, list = "sysctl -w " + tcpTracked + "=", "sysctl -w net.core.", "sysctl -w net.ipv4.tcp_rmem="
	for _, row := range []struct {
		id, what  string
		change    func(*world)
		fix, undo string
	}{
		{"CT-15", "one namespace", sets(tcpTracked, "600"), established + "86400 in that namespace", established + "600 in that namespace"},
		{"CT-15", "two that are alike", all(sets(tcpTracked, "600"), sets("node "+tcpTracked, "600")), established + "86400 in that namespace", established + "600 in that namespace"},
		{"CT-15", "two that differ", all(sets(tcpTracked, "600"), sets("node "+tcpTracked, "1200")), established + "86400 in that namespace", established + "N, with N what it was"},
		{"CT-12", "not all protocols", sets(logInvalid, "6"), "sysctl -w " + logInvalid + "=0 in that namespace", "sysctl -w " + logInvalid + "=6 in that namespace"},
		{"HS-12", "a maximum that somebody raised", sets(tcpReceive, "4096 87380 16777216"),
			list + `"4096 131072 16777216" in that namespace`, list + `"4096 87380 16777216" in that namespace`},
		{"HS-12", "a low maximum", sets(tcpReceive, "4096 262144 1048576"),
			list + `"4096 262144 6291456" in that namespace`, list + `"4096 262144 1048576" in that namespace`},
		{"HS-18", "interpreted", sets("node "+jitEnable, "0"), jit + "bpf_jit_enable=1", jit + "bpf_jit_enable=0"},
		{"HS-18", "blinded", sets("node "+jitHarden, "2"), jit + "bpf_jit_harden=1", jit + "bpf_jit_harden=2"},
		{"HS-18", "both", all(sets("node "+jitEnable, "0"), sets("node "+jitHarden, "2")),
			jit + "bpf_jit_enable=1 net.core.bpf_jit_harden=1", jit + "bpf_jit_enable=0 net.core.bpf_jit_harden=2"},
		{"PX-15", "nothing was reserved", sets("node "+localPorts, "1024 65535"), "sysctl -w " + reservedPorts + "=30000-32767, and the same in a file in /etc/sysctl.d",
			"echo > /proc/sys/net/ipv4/ip_local_reserved_ports, and without the file"},
		{"CT-01", "kube-proxy owns it", all(sets("node "+trackedCount, "200000"), func(w *world) { w.files["proc/30/comm"] = "kube-proxy" }),
			"sysctl -w " + trackedMax + "=524288 at once; kube-proxy sets this limit again when it starts: conntrack.maxPerCore: 0 in its configuration leaves it alone (then a file in /etc/sysctl.d keeps it), or raise conntrack.min",
			"sysctl -w " + trackedMax + "=262144, and conntrack of kube-proxy's configuration as it was"},
	} {
		t.Run(row.id+" "+row.what, func(t *testing.T) {
			w := healthy()
			row.change(w)
			results, _ := w.examine(t, one(t, row.id))
			if r := results[row.id]; r.Fix != row.fix || r.Undo != row.undo {
				t.Errorf("fix %q\nundo %q\nwanted %q\n%q\n%s", r.Fix, r.Undo, row.fix, row.undo, texts(r))
			}
		})
	}
}
