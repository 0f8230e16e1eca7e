package doctor

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/millrace/millrace/kernel/proc"
)

const (
	netstat    = "/proc/net/netstat"
	snmp       = "/proc/net/snmp"
	sockstat   = "/proc/net/sockstat"
	sockstat6  = "/proc/net/sockstat6"
	somaxconn  = "net.core.somaxconn"
	twReuse    = "net.ipv4.tcp_tw_reuse"
	localPorts = "net.ipv4.ip_local_port_range"
	tcpMem     = "net.ipv4.tcp_mem"
	congestion = "net.ipv4.tcp_congestion_control"
	osRelease  = "kernel.osrelease"

	counterDoc = "https://docs.kernel.org/networking/snmp_counter.html"

	// nearlyAll is the share of the local ports to one destination that is too much.
	nearlyAll = 0.8
)

var socketChecks = []Check{{
	ID: "HS-04", Layer: "sockets", Title: "a server does not take its connections, and new ones are dropped", Severity: Critical, Scope: Everywhere,
	Reads:   []string{netstat, Listeners},
	When:    "ListenOverflows grows, or more complete connections wait than the backlog of a socket allows",
	Effect:  "The queue between the kernel and accept() is full. Handshakes are dropped without an answer, and clients try again after a second or more. No drop event and no log tells of it.",
	Source:  counterDoc + " (TcpExtListenOverflows); https://man7.org/linux/man-pages/man2/listen.2.html",
	Fix:     "give the server more processor time or workers; if it only lacks room for bursts, a larger backlog in its listen() and net.core.somaxconn of its own namespace",
	Undo:    "put the backlog and somaxconn back",
	Pitfall: "somaxconn of the node does nothing for pods: each namespace begins with 4096. The backlog that a program gives to listen() is often lower, nginx's is 511.",
	look:    acceptQueue,
}, {
	ID: "HS-05", Layer: "sockets", Title: "listen queues are limited to less than the default", Severity: Info, Scope: Everywhere,
	Reads:   []string{somaxconn},
	When:    "somaxconn is below 4096, the default since Linux 5.4",
	Effect:  "Bursts of connections meet a full queue earlier (HS-04).",
	Source:  ipSysctl + " (somaxconn)",
	Fix:     "take away what lowers it, or securityContext.sysctls net.core.somaxconn=4096 of the pod, which the kubelet must allow (allowedUnsafeSysctls)",
	Undo:    "put the lower value back",
	Pitfall: "The value of the node is not inherited by pods, and programs read it when they call listen().",
	look: func(v *view) {
		if n, ok := v.number(somaxconn); ok && n < 4096 {
			v.fires(Info, somaxconn, "%d", n)
		} else if ok {
			v.sees(somaxconn, "%d", n)
		}
	},
}, {
	ID: "HS-06", Layer: "sockets", Title: "handshakes are dropped because too many are under way", Severity: Warning, Scope: Everywhere,
	Reads:   []string{netstat, snmp},
	When:    "TCPReqQFullDrop grows, or ListenDrops by more than ListenOverflows while no route is missing (Ip OutNoRoutes)",
	Effect:  "First packets of connections are dropped, and clients try again after a second or more.",
	Source:  ipSysctl + " (tcp_max_syn_backlog, tcp_syncookies)",
	Fix:     "sysctl -w net.ipv4.tcp_syncookies=1 in that namespace, the default, so that nothing is dropped; a larger net.ipv4.tcp_max_syn_backlog and backlog of listen() for legitimate load",
	Undo:    "put both settings back",
	Pitfall: "Each listening socket has its own limit, which its backlog lowers; with tcp_syncookies=1 it hardly matters.",
	look:    handshakes,
}, {
	ID: "HS-07", Layer: "sockets", Title: "a server answers with SYN cookies", Severity: Warning, Scope: Everywhere,
	Reads:   []string{netstat},
	When:    "SyncookiesSent grows",
	Effect:  "More connections begin than the server's queue holds: a flood, or legitimate load. Connections made by cookies lose TCP options.",
	Source:  ipSysctl + " (tcp_syncookies: it must not be used to help highly loaded servers)",
	Fix:     "ss -lt in that namespace shows the queue: for a flood filter it, else enlarge the backlog of listen(), net.core.somaxconn and net.ipv4.tcp_max_syn_backlog of that namespace",
	Undo:    "put the settings back",
	Pitfall: "Switching cookies off turns them into drops.",
	look:    func(v *view) { v.rises(Warning, "TcpExt.SyncookiesSent") },
}, {
	ID: "HS-08", Layer: "sockets", Title: "tcp_tw_reuse is set", Severity: Info, Scope: Everywhere,
	Reads:   []string{twReuse},
	When:    "it is 1; the default is 2, for loopback only",
	Effect:  "Ports in TIME_WAIT are used again for outgoing connections. It helps a client that lacks ports (HS-09) and no server.",
	Source:  ipSysctl + " (tcp_tw_reuse)",
	Fix:     "sysctl -w " + twReuse + "=2 in that namespace, unless HS-09 fires without it",
	Undo:    "sysctl -w " + twReuse + "=1",
	Pitfall: "Lists that advise it for servers mean tcp_tw_recycle, which Linux 4.12 removed because it broke clients behind NAT.",
	look: func(v *view) {
		if n, ok := v.number(twReuse); ok && n == 1 {
			v.fires(Info, twReuse, "1")
		}
	},
}, {
	ID: "HS-09", Layer: "sockets", Title: "local ports to one destination are running out", Severity: Warning, Scope: Everywhere,
	Reads:   []string{Connections, sockstat, sockstat6, localPorts},
	When:    "connections from one address to one address and port, TIME_WAIT included, take 80 % of ip_local_port_range or more",
	Effect:  "When none is left, connect() ends with EADDRNOTAVAIL. The kernel counts it nowhere.",
	Source:  ipSysctl + " (ip_local_port_range); https://man7.org/linux/man-pages/man2/connect.2.html (EADDRNOTAVAIL)",
	Fix:     "keep connections open (a pool, keep-alive); else widen net.ipv4.ip_local_port_range of that namespace, which a pod may (it is a safe sysctl), on a node without the range of NodePorts (PX-15)",
	Undo:    "put the range back",
	Pitfall: "The limit is for each destination: a busy pod with many destinations is far from it.",
	look:    portsInUse,
}, {
	ID: "HS-13", Layer: "sockets", Title: "TCP is short of memory", Severity: Critical, Scope: Node,
	Reads:   []string{sockstat, tcpMem},
	When:    "the memory of all TCP sockets exceeds the second value of tcp_mem (warning) or reaches the third (critical), in pages",
	Effect:  "Above the second, buffers of all connections are held small; at the third nothing more is queued: what arrives is dropped, in every namespace.",
	Source:  ipSysctl + " (tcp_mem)",
	Fix:     "find the process whose sockets hold it: ss -tm in each namespace, large r and t; tcp_mem is computed from the machine's memory, and seldom wrong",
	Undo:    "nothing is changed by looking",
	Pitfall: "tcp_mem is in pages, not in bytes, and global: it cannot be set for a pod.",
	look:    tcpMemory,
}, {
	ID: "HS-14", Layer: "sockets", Title: "UDP datagrams are lost at a full socket", Severity: Warning, Scope: Everywhere,
	Reads:   []string{snmp, snmp6, udp4, udp6},
	When:    "RcvbufErrors of Udp or Udp6 grows",
	Effect:  "The program does not read as fast as datagrams come in. They are lost without a word to either side.",
	Source:  "__udp_queue_rcv_skb of https://github.com/torvalds/linux/blob/master/net/ipv4/udp.c; https://man7.org/linux/man-pages/man7/socket.7.html (SO_RCVBUF)",
	Fix:     "give the program more processor time; for bursts a larger SO_RCVBUF in the program, up to net.core.rmem_max, which is the node's",
	Undo:    "put them back",
	Pitfall: "rmem_max alone changes nothing: it is only a limit for programs that ask, and TCP's own tuning does not use it.",
	look:    datagrams,
}, {
	ID: "HS-16", Layer: "sockets", Title: "BBR in a pod on a kernel that misleads it", Severity: Warning, Scope: Everywhere,
	Reads:   []string{congestion, osRelease},
	When:    "a namespace other than the node's has bbr, and the kernel is older than 5.18",
	Effect:  "The time stamps by which BBR paces its packets are cleared at the border of the namespace, so that it sends at the wrong rate.",
	Source:  "https://docs.cilium.io/en/stable/network/kubernetes/bandwidth-manager/ (BBR for Pods)",
	Fix:     "sysctl -w " + congestion + "=cubic in that namespace, or a kernel from 5.18 on",
	Undo:    "sysctl -w " + congestion + "=bbr",
	Pitfall: "A new namespace takes the node's setting as it is made; a change on the node does not reach pods that run.",
	look:    oldBBR,
}, {
	ID: "HS-29", Layer: "sockets", Title: "packets are dropped before a device sends them", Severity: Warning, Scope: Everywhere,
	Reads:   []string{Qdiscs, Devices},
	When:    "drops of the queueing discipline at the root of a device grow; information only, where it drops to keep delays short (fq_codel, cake, codel, fq_pie, pie, red)",
	Effect:  "More is sent than the device, or the rate it is given, takes: TCP slows down, UDP is lost.",
	Source:  "https://man7.org/linux/man-pages/man8/tc.8.html; https://docs.cilium.io/en/stable/network/kubernetes/bandwidth-manager/ (of the plug-in bandwidth, which makes tbf)",
	Fix:     "tc -s qdisc show dev DEVICE; a tbf comes of the annotations kubernetes.io/ingress-bandwidth and egress-bandwidth of the pod: raise them, or shape by eBPF (Cilium's bandwidth manager)",
	Undo:    "put the annotations back",
	Pitfall: "A longer queue drops later and delays everything: it is no remedy for sending too much.",
	look:    queueDrops,
}, {
	ID: "HS-31", Layer: "sockets", Title: "TCP gives up connections for want of room", Severity: Warning, Scope: Everywhere,
	Reads:   []string{netstat},
	When:    "TCPTimeWaitOverflow or TCPAbortOnMemory grows",
	Effect:  "TCPTimeWaitOverflow: sockets in TIME_WAIT are ended early, and late packets of an old connection may meet a new one. TCPAbortOnMemory: connections are reset.",
	Source:  ipSysctl + " (tcp_max_tw_buckets, tcp_max_orphans)",
	Fix:     "sysctl -w net.ipv4.tcp_max_tw_buckets=N in that namespace, higher than it is; for TCPAbortOnMemory see HS-13",
	Undo:    "sysctl -w net.ipv4.tcp_max_tw_buckets=N, with N what it was",
	Pitfall: "TIME_WAIT costs little; the kernel's documentation says that this limit must not be lowered.",
	look:    func(v *view) { v.rises(Warning, "TcpExt.TCPTimeWaitOverflow", "TcpExt.TCPAbortOnMemory") },
}}

func acceptQueue(v *view) {
	v.rises(Critical, "TcpExt.ListenOverflows")
	listeners, ok := get(v, Listeners, v.listeners)
	if !ok {
		return
	}
	for _, l := range listeners {
		if l.Waiting > l.Backlog {
			v.fires(Critical, Listeners, "%s: %d connections wait, room is for %d; %d dropped since it listens", l.Address, l.Waiting, l.Backlog, l.Drops)
		}
	}
}

func handshakes(v *view) {
	v.rises(Warning, "TcpExt.TCPReqQFullDrop")
	drops, ok := v.rise("TcpExt.ListenDrops")
	overflows, ok2 := v.rise("TcpExt.ListenOverflows")
	noRoute, ok3 := v.rise("Ip.OutNoRoutes")
	if ok && ok2 && ok3 && drops > overflows && noRoute == 0 {
		v.fires(Warning, "TcpExt.ListenDrops", "%s, of which %d are ListenOverflows", v.inWindow(drops), overflows)
	}
}

// portRange reads "32768	60999".
func portRange(text string) (low, high int, err error) {
	if _, err := fmt.Sscan(text, &low, &high); err != nil || low > high {
		return 0, 0, fmt.Errorf("%q is no range of ports", strings.TrimSpace(text))
	}
	return low, high, nil
}

func portsInUse(v *view) {
	connections, ok := get(v, Connections, v.connections)
	text, there := v.text(localPorts)
	if !ok || !there {
		return
	}
	low, high, err := portRange(text)
	if err != nil {
		v.lacks(localPorts, "%s", reason(err))
		return
	}
	type way struct {
		from netip.Addr
		to   netip.AddrPort
	}
	held := map[way]int{}
	for _, c := range connections {
		if port := int(c.Local.Port()); port >= low && port <= high && c.Remote.Port() != 0 {
			held[way{c.Local.Addr(), c.Remote}]++
		}
	}
	var over []way
	for w, n := range held {
		if float64(n) >= nearlyAll*float64(high-low+1) {
			over = append(over, w)
		}
	}
	slices.SortFunc(over, func(a, b way) int { return cmp.Or(a.from.Compare(b.from), a.to.Compare(b.to)) })
	for _, w := range over {
		v.fires(Warning, Connections, "%s to %s: %d of %d ports", w.from, w.to, held[w], high-low+1)
	}
}

func tcpMemory(v *view) {
	text, ok := v.text(sockstat)
	limits, there := v.text(tcpMem)
	if !ok || !there {
		return
	}
	used, err := proc.Sockstat(text, "TCP.mem")
	var low, pressure, high uint64
	if _, err2 := fmt.Sscan(limits, &low, &pressure, &high); err != nil || err2 != nil {
		v.lacks(sockstat, "the memory of TCP cannot be understood")
		return
	}
	evidence := fmt.Sprintf("%d pages; tcp_mem is %d %d %d", used, low, pressure, high)
	switch {
	case used >= high:
		v.fires(Critical, sockstat, "%s", evidence)
	case used > pressure:
		v.fires(Warning, sockstat, "%s", evidence)
	default:
		v.sees(sockstat, "%s", evidence)
	}
}

func datagrams(v *view) {
	if v.rises(Warning, "Udp.RcvbufErrors", "Udp6RcvbufErrors") == 0 {
		return
	}
	v.sockets(func(s proc.Socket, grown uint64) {
		if grown > 0 {
			v.fires(Warning, udp4, "%s: %s", s.Local, v.inWindow(grown))
		}
	})
}

// delayKeepers drop some packets early on purpose.
var delayKeepers = []string{"fq_codel", "cake", "codel", "fq_pie", "pie", "red"}

func queueDrops(v *view) {
	devices, ok := get(v, Devices, v.devices)
	was, ok1 := get(v, Qdiscs, v.firstQdiscs)
	is, ok2 := get(v, Qdiscs, v.lastQdiscs)
	if !ok || !ok1 || !ok2 {
		return
	}
	for _, d := range devices {
		before, there := was[d.Index]
		now := is[d.Index]
		if !there || before.Kind != now.Kind || now.Drops == before.Drops {
			continue
		}
		severity := Warning
		if slices.Contains(delayKeepers, now.Kind) {
			severity = Info
		}
		v.fires(severity, Qdiscs, "%s (%s): %s", d.Name, now.Kind, v.inWindow(uint64(now.Drops-before.Drops)))
	}
}

func oldBBR(v *view) {
	if v.Space == v.facts.Spaces[0] {
		return
	}
	algorithm, ok := v.text(congestion)
	release, there := v.text(osRelease)
	if !ok || !there {
		return
	}
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		v.lacks(osRelease, "%q is no version", strings.TrimSpace(release))
		return
	}
	if strings.TrimSpace(algorithm) == "bbr" && (major < 5 || major == 5 && minor < 18) {
		v.fires(Warning, congestion, "bbr, on Linux %d.%d", major, minor)
	}
}
