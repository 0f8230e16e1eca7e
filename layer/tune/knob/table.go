package knob

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	somaxconn          = "net.core.somaxconn"
	synBacklog         = "net.ipv4.tcp_max_syn_backlog"
	timeWaits          = "net.ipv4.tcp_max_tw_buckets"
	portRange          = "net.ipv4.ip_local_port_range"
	reservedPorts      = "net.ipv4.ip_local_reserved_ports"
	idleStart          = "net.ipv4.tcp_slow_start_after_idle"
	receiveWindow      = "net.ipv4.tcp_rmem"
	sendWindow         = "net.ipv4.tcp_wmem"
	congestion         = "net.ipv4.tcp_congestion_control"
	available          = "net.ipv4.tcp_available_congestion_control"
	receiveMax         = "net.core.rmem_max"
	sendMax            = "net.core.wmem_max"
	receiveDefault     = "net.core.rmem_default"
	backlog            = "net.core.netdev_max_backlog"
	backlogTime        = "net.core.netdev_budget_usecs"
	busyRead           = "net.core.busy_read"
	busyPoll           = "net.core.busy_poll"
	jitEnable          = "net.core.bpf_jit_enable"
	trackedMax         = "net.netfilter.nf_conntrack_max"
	trackedLists       = "net.netfilter.nf_conntrack_buckets"
	trackedEstablished = "net.netfilter.nf_conntrack_tcp_timeout_established"
	trackedLog         = "net.netfilter.nf_conntrack_log_invalid"

	ipSysctl     = "https://docs.kernel.org/networking/ip-sysctl.html"
	netSysctl    = "https://docs.kernel.org/admin-guide/sysctl/net.html"
	conntrackDoc = "https://docs.kernel.org/networking/nf_conntrack-sysctl.html"
	scalingDoc   = "https://docs.kernel.org/networking/scaling.html"
	linux        = "https://github.com/torvalds/linux/blob/master/"
)

const (
	// retryAfter is when a client sends its SYN again, in seconds (RFC 6298, section 2):
	// what waits for longer is asked for twice.
	retryAfter = 1
	// mostWaiting is the most that an accept queue is given: about 100 MB of them.
	mostWaiting = 1 << 16
	// pause is how long a CPU limit may hold a process, in seconds: a period of CFS.
	pause = 0.1
	// datagram is the memory that one of up to 1,500 bytes takes: a page's half and its
	// sk_buff, as SO_MEMINFO shows it.
	datagram = 2304
	// quic is what QUIC implementations ask for.
	quic = 7_500_000
	// frame is a full Ethernet frame on the wire, in bits.
	frame = 1538 * 8
	// entry is the memory of a connection in nf_conntrack with its extensions, and of its
	// two places in the table.
	entry = 400
	// waitingSocket is that of a connection in TIME_WAIT (struct tcp_timewait_sock).
	waitingSocket = 256
)

// Knobs are all that can be tuned, in the order in which they are proposed.
var Knobs = []*Knob{{
	ID: "accept-queue", Settings: []string{somaxconn}, Scope: Namespace,
	Title:    "how many complete connections may wait for accept()",
	Formula:  "connections that come within 1 s, after which a client tries again; the next power of two; 4096 (the default) at least and 65536 at most. Twice as many where the queue of a socket that is bound by it overflows",
	Source:   "https://www.rfc-editor.org/rfc/rfc6298#section-2; " + ipSysctl + " (somaxconn)",
	Evidence: "ListenOverflows grows in the namespace, and a socket that listens there has somaxconn for its backlog",
	Checks:   []string{"HS-04", "HS-05"},
	Pitfall:  "Pods do not inherit the node's. It bounds what the program gives to listen(): nginx asks for 511. A socket that listens already keeps what it has: start the server again. A queue does not make a slow server faster.",
	Profiles: []Profile{ManyConnections}, want: acceptQueue,
}, {
	ID: "syn-backlog", Settings: []string{synBacklog}, Scope: Namespace,
	Title:    "how many handshakes may be under way at a socket that listens",
	Formula:  "as many as may wait for accept() (somaxconn): what is acknowledged comes there next",
	Source:   ipSysctl + " (tcp_max_syn_backlog)",
	Evidence: "TCPReqQFullDrop grows, or ListenDrops without ListenOverflows",
	Checks:   []string{"HS-06"},
	Pitfall:  "With SYN cookies, the default, nothing is dropped at this limit.",
	Profiles: []Profile{ManyConnections}, want: func(v *view) ([]wish, string) {
		if !v.read(somaxconn) {
			return nil, "somaxconn, which it follows, cannot be read"
		}
		return atLeast(synBacklog, v.number(somaxconn)), ""
	},
}, {
	ID: "time-wait", Settings: []string{timeWaits}, Scope: Namespace,
	Title:    "how many closed connections may be remembered",
	Formula:  "twice what it is, where it overflows; at most 1/64 of the memory at 256 bytes each",
	Source:   ipSysctl + " (tcp_max_tw_buckets)",
	Evidence: "TCPTimeWaitOverflow grows",
	Checks:   []string{"HS-31"},
	Pitfall:  "It must never be lowered: who is not remembered may meet packets of an old connection.",
	want: func(v *view) ([]wish, string) {
		if len(v.Found["HS-31"]) == 0 {
			return nil, "nothing is forgotten for want of room (TCPTimeWaitOverflow does not grow): more would do nothing"
		}
		most := powerBelow(float64(v.m.Memory) / 64 / waitingSocket)
		return atLeast(timeWaits, max(v.number(timeWaits), min(most, power(2*float64(v.number(timeWaits)))))), ""
	},
}, {
	ID: "local-ports", Settings: []string{reservedPorts, portRange}, Scope: Namespace,
	Title:    "the ports from which connections begin",
	Formula:  "twice as many, downwards from the upper end; the ports at which programs of the namespace listen are reserved before, and on the node the range of node ports",
	Source:   ipSysctl + " (ip_local_port_range, ip_local_reserved_ports); https://github.com/kubernetes/kubernetes/issues/111682",
	Evidence: "connections to one address and port take 80 % of the ports",
	Checks:   []string{"HS-09"},
	Pitfall:  "\"1024 65535\" on a node takes node ports and the ports of hostNetwork servers that start later. Connections that are kept open need none of it.",
	Safe:     true, want: localPorts,
}, {
	ID: "node-ports", Settings: []string{reservedPorts}, Scope: Namespace,
	Title:    "node ports are kept from connections of the node's own",
	Formula:  "what is reserved already, and the range of node ports",
	Source:   "https://github.com/kubernetes/kubernetes/issues/111682; " + ipSysctl + " (ip_local_reserved_ports)",
	Evidence: "the ranges of node ports and of local ports meet, and what is in both is not reserved",
	Checks:   []string{"PX-15"},
	Pitfall:  "Since about 1.21 kube-proxy holds node ports no more, so that nothing complains when a connection takes one.",
	Safe:     true, want: func(v *view) ([]wish, string) {
		if !v.Node {
			return nil, "node ports are the node's"
		}
		if v.m.NodePorts == "" {
			return nil, "the range of node ports is not known"
		}
		return []wish{{reservedPorts, joined(append(spans(v.Values[reservedPorts]), spans(v.m.NodePorts)...)), false}}, ""
	},
}, {
	ID: "idle-start", Settings: []string{idleStart}, Scope: Namespace,
	Title:    "whether a connection that was idle begins slowly again",
	Formula:  "0 where an open connection has a round trip of 10 ms or more; each that was idle then needs fewer of them",
	Source:   ipSysctl + " (tcp_slow_start_after_idle); https://www.rfc-editor.org/rfc/rfc2861",
	Evidence: "connections that are kept open and idle, to clients 10 ms away or more",
	Pitfall:  "Within a data centre a round trip is too short for it to matter. It may send a burst into a path that has filled meanwhile.",
	Profiles: []Profile{Latency, Throughput}, want: func(v *view) ([]wish, string) {
		if v.RTT < 10 {
			return nil, fmt.Sprintf("the longest round trip of an open connection is %.1f ms: it would do next to nothing", v.RTT)
		}
		return []wish{{idleStart, "0", false}}, ""
	},
}, {
	ID: "tcp-window", Settings: []string{receiveWindow, sendWindow}, Scope: Copied,
	Title:    "how much of a connection may be under way",
	Formula:  "the third number alone: twice what the fastest card sends within the longest round trip of an open connection; at most 1/128 of the memory, the kernel's own bound",
	Source:   ipSysctl + " (tcp_rmem, tcp_wmem); tcp_init of " + linux + "net/ipv4/tcp.c",
	Evidence: "a fast card, and connections with long round trips: speed times time is more than the third number",
	Pitfall:  "rmem_max has nothing to do with it. A larger first or second number takes memory from every connection. Only pods that start later inherit the node's.",
	Profiles: []Profile{Throughput}, Safe: true, want: windows,
}, {
	ID: "bbr", Settings: []string{congestion}, Scope: Copied,
	Title:    "BBR for congestion control",
	Formula:  "bbr, where the kernel has it",
	Source:   linux + "net/ipv4/tcp_bbr.c; " + ipSysctl + " (tcp_congestion_control)",
	Evidence: "retransmissions of more than 1 % on paths of 10 ms and more, with loss that is not congestion",
	Pitfall:  "It takes its share from others' cubic, and gains nothing within a data centre. In pods it needs Linux 5.18 (HS-16). Without fq on the card it paces by a timer for each connection.",
	want: func(v *view) ([]wish, string) {
		if !slices.Contains(strings.Fields(v.Values[available]), "bbr") {
			return nil, "this kernel has no bbr now: load its module (tcp_bbr)"
		}
		return []wish{{congestion, "bbr", false}}, ""
	},
}, {
	ID: "socket-buffers", Settings: []string{receiveMax, sendMax}, Scope: Machine,
	Title:    "how much buffer a program may ask for",
	Formula:  "7,500,000 bytes, which QUIC implementations ask for, or what the fastest card brings in 10 ms; at most 1/256 of the memory",
	Source:   "https://github.com/quic-go/quic-go/wiki/UDP-Buffer-Sizes; " + netSysctl + " (rmem_max)",
	Evidence: "RcvbufErrors of a program that asks for more than it gets: QUIC, DNS, syslog",
	Pitfall:  "Who does not ask by SO_RCVBUF gets none of it, and TCP tunes itself by tcp_rmem: a TCP program that asks is tuned no more.",
	Profiles: []Profile{Throughput}, want: func(v *view) ([]wish, string) {
		n := int64(min(max(quic, float64(v.m.Speed)/8/100), float64(v.m.Memory)/256))
		return append(atLeast(receiveMax, n), atLeast(sendMax, n)...), ""
	},
}, {
	ID: "datagram-buffer", Settings: []string{receiveDefault}, Scope: Machine,
	Title:    "the receive buffer of a UDP socket that does not ask for one",
	Formula:  "datagrams that come within 100 ms, for which a CPU limit may hold the server, at 2304 bytes each; the next power of two; where they are lost twice what it is at least; at most 1/1024 of the memory",
	Source:   netSysctl + " (rmem_default); https://docs.kernel.org/scheduler/sched-bwc.html",
	Evidence: "RcvbufErrors grows in a namespace",
	Checks:   []string{"HS-14", "DN-10"},
	Pitfall:  "It holds for new sockets of all pods. A server that is slow all the time loses the same number of datagrams, only later: look at its CPU limit first (HS-26).",
	want: func(v *view) ([]wish, string) {
		if v.finding() == "" {
			return nil, "no datagram is lost at a full socket: more would do nothing"
		}
		rate := 0.0
		for _, s := range v.m.Spaces {
			rate = max(rate, s.Datagrams)
		}
		n := max(power(rate*pause*datagram), power(2*float64(v.number(receiveDefault))))
		return atLeast(receiveDefault, min(n, powerBelow(float64(v.m.Memory)/1024))), ""
	},
}, {
	ID: "receive-backlog", Settings: []string{backlog}, Scope: Machine,
	Title:    "how many packets may wait for a processor",
	Formula:  "full frames of the fastest card within one round of polling (netdev_budget_usecs), twice what it is at least; the next power of two; at most 65536",
	Source:   netSysctl + " (netdev_max_backlog, netdev_budget_usecs)",
	Evidence: "the second column of /proc/net/softnet_stat grows",
	Checks:   []string{"HS-01"},
	Pitfall:  "It is the queue of veth, loopback and RPS, not of a network card that polls (NAPI): \"raise it for 10G\" does nothing without them.",
	want: func(v *view) ([]wish, string) {
		if v.finding() == "" {
			return nil, "no packet is dropped for want of room there (softnet_stat): more would do nothing"
		}
		n := float64(v.m.Speed) / frame * float64(v.number(backlogTime)) / 1e6
		return atLeast(backlog, min(1<<16, max(power(n), power(2*float64(v.number(backlog)))))), ""
	},
}, {
	ID: "busy-polling", Settings: []string{busyRead, busyPoll}, Scope: Machine,
	Title:    "how long a read looks at the card before it sleeps, in microseconds",
	Formula:  "50, the documentation's for several sockets; with four processors or more and a network card whose driver polls",
	Source:   netSysctl + " (busy_read, busy_poll)",
	Evidence: "a program that waits for packets of the card, on a machine with idle processors, and a latency that matters more than they",
	Pitfall:  "It burns the processor of whoever waits. What comes from veth or loopback, as in most pods, gains nothing.",
	Profiles: []Profile{Latency}, want: func(v *view) ([]wish, string) {
		switch {
		case v.m.CPUs < 4:
			return nil, fmt.Sprintf("there are %d processors, and it takes one for each that waits", v.m.CPUs)
		case !slices.ContainsFunc(v.Devices, func(g Gear) bool { return g.Hardware }):
			return nil, "there is no network card here that could be polled"
		}
		return []wish{{busyRead, "50", true}, {busyPoll, "50", true}}, ""
	},
}, {
	ID: "jit", Settings: []string{jitEnable}, Scope: Machine,
	Title:    "eBPF programs are compiled",
	Formula:  "1",
	Source:   netSysctl + " (bpf_jit_enable)",
	Evidence: "it is 0",
	Checks:   []string{"HS-18"},
	Pitfall:  "Most kernels are built so that it is always 1.",
	Profiles: []Profile{Latency, Throughput, ManyConnections}, want: func(*view) ([]wish, string) { return atLeast(jitEnable, 1), "" },
}, {
	ID: "neighbours", Settings: neighbourSettings(), Scope: Machine,
	Title:    "how many neighbours are remembered, by both families",
	Formula:  "gc_thresh3 twice the entries, the next power of two; gc_thresh2 half and gc_thresh1 an eighth of it, as the kernel's own are",
	Source:   ipSysctl + " (neigh/default/gc_thresh3); " + linux + "net/ipv4/arp.c (arp_tbl)",
	Evidence: "table_fulls or forced_gc_runs grow, or the entries are more than 75 % of gc_thresh3",
	Checks:   []string{"HS-19"},
	Pitfall:  "The table is one for all namespaces. A routed pod network needs few: only large flat ones fill it.",
	want:     neighbours,
}, {
	ID: "conntrack", Settings: []string{trackedLists, trackedMax}, Scope: Machine,
	Title:    "how many connections can be tracked",
	Formula:  "twice the most that a namespace has, the next power of two; at most 1/64 of the memory at 400 bytes each, and that many where none is counted yet; as many lists (buckets) as connections",
	Source:   conntrackDoc + " (nf_conntrack_max, nf_conntrack_buckets); nf_conntrack_init_start of " + linux + "net/netfilter/nf_conntrack_core.c",
	Evidence: "nf_conntrack_count is 75 % of nf_conntrack_max, or packets are dropped for it",
	Checks:   []string{"CT-01", "CT-04"},
	Pitfall:  "kube-proxy sets both whenever it starts, since 1.29 also lower. The limit is one, the count each namespace's. A connection that need not be tracked costs nothing.",
	Profiles: []Profile{ManyConnections}, want: tracked,
}, {
	ID: "conntrack-lists", Settings: []string{trackedLists}, Scope: Machine,
	Title:    "how many lists the tracked connections are kept in",
	Formula:  "as many as connections can be tracked; the kernel rounds up",
	Source:   conntrackDoc + " (nf_conntrack_buckets)",
	Evidence: "nf_conntrack_max is more than four times nf_conntrack_buckets",
	Checks:   []string{"CT-03"},
	Pitfall:  "\"Eight connections a bucket\" was the kernel's own ratio once; now it is one.",
	want: func(v *view) ([]wish, string) {
		return atLeast(trackedLists, v.number(trackedMax)), ""
	},
}, {
	ID: "conntrack-idle", Settings: []string{trackedEstablished}, Scope: Namespace,
	Title:    "how long an idle connection stays tracked, in seconds",
	Formula:  "86,400, kube-proxy's default, in place of the kernel's five days",
	Source:   "https://github.com/kubernetes/kubernetes/blob/master/pkg/proxy/apis/config/v1alpha1/defaults.go (TCPEstablishedTimeout)",
	Evidence: "the table is half full, and the timeout is longer",
	Checks:   []string{"CT-08"},
	Pitfall:  "A connection that is idle for longer is cut where it is translated: keepalives must be more frequent. Pods have their own.",
	want:     func(*view) ([]wish, string) { return []wish{{trackedEstablished, "86400", false}}, "" },
}, {
	ID: "conntrack-log", Settings: []string{trackedLog}, Scope: Namespace,
	Title:    "whether each packet that cannot be tracked is logged",
	Formula:  "0",
	Source:   conntrackDoc + " (nf_conntrack_log_invalid)",
	Evidence: "it is not 0",
	Checks:   []string{"CT-12"},
	Pitfall:  "The counter \"invalid\" says how many there are without a log.",
	want:     func(*view) ([]wish, string) { return []wish{{trackedLog, "0", false}}, "" },
}, {
	ID: "rps", Settings: []string{"*/rx-*/rps_cpus"}, Scope: Device,
	Title:    "packets of few queues are received by all processors",
	Formula:  "all processors, for devices with fewer receive queues than there are processors; of the node network cards alone",
	Source:   scalingDoc + " (RPS)",
	Evidence: "one processor spends more than 80 % in softirq, and the card has one queue",
	Checks:   []string{"HS-24"},
	Pitfall:  "With as many queues as processors it only adds work. Packets then pass netdev_max_backlog.",
	Profiles: []Profile{Throughput}, want: receiveBy,
}, {
	ID: "xps", Settings: []string{"*/tx-*/xps_cpus"}, Scope: Device,
	Title:    "each processor sends by a queue of its own",
	Formula:  "processor i by queue i modulo the number of queues, for devices with several",
	Source:   scalingDoc + " (XPS)",
	Evidence: "locks of the sending queue in a profile (perf): no counter tells",
	Pitfall:  "Most drivers set it themselves.",
	want:     sendBy,
}, {
	ID: "channels", Settings: []string{"*/channels"}, Scope: Device,
	Title:    "how many queues a network card has",
	Formula:  "as many as processors, or as the card can have",
	Source:   scalingDoc + " (RSS)",
	Evidence: "one processor spends more than 80 % in softirq, and the card could have more queues",
	Checks:   []string{"HS-24"},
	Pitfall:  "Most drivers reset the card for it: no packet passes for a moment. Prefer it to RPS where the card can.",
	want: func(v *view) ([]wish, string) {
		return v.each(func(g Gear) (wishes []wish) {
			if n := min(int64(g.Channels), int64(v.m.CPUs)); n > 1 {
				wishes = atLeast(g.Name+"/channels", n)
			}
			return wishes
		}, "no card here can have more queues than it has")
	},
}, {
	ID: "ring", Settings: []string{"*/ring/rx"}, Scope: Device,
	Title:    "how many packets a network card may hold before they are received",
	Formula:  "twice what it is, at most what the card can have",
	Source:   "https://man7.org/linux/man-pages/man8/ethtool.8.html (-G)",
	Evidence: "the card counts packets that it had no room for (rx_missed_errors)",
	Checks:   []string{"HS-22"},
	Pitfall:  "A longer ring is a longer wait, and falls out of the processor's cache. Most drivers reset the card for it.",
	want: func(v *view) ([]wish, string) {
		return v.each(func(g Gear) (wishes []wish) {
			name := g.Name + "/ring/rx"
			if now := v.number(name); now > 0 && now < int64(g.Ring) && len(v.Found["HS-22"]) > 0 {
				wishes = atLeast(name, min(2*now, int64(g.Ring)))
			}
			return wishes
		}, "no card here loses packets for want of room: a longer ring would only be a longer wait")
	},
}, {
	ID: "fq", Settings: []string{"*/qdisc"}, Scope: Device,
	Title:    "the qdisc that paces, for BBR",
	Formula:  "fq, where bbr is the node's congestion control and nobody has chosen a discipline",
	Source:   linux + "net/ipv4/tcp_bbr.c; https://man7.org/linux/man-pages/man8/tc-fq.8.html",
	Evidence: "tcp_congestion_control is bbr, and the card's discipline is not fq",
	Pitfall:  "BBR works without. net.core.default_qdisc is for devices that are made later, and never for veth, which has no queue. With several queues the default is mq, and fq at its place takes their lock.",
	want: func(v *view) ([]wish, string) {
		if v.Values[congestion] != "bbr" {
			return nil, "the congestion control is " + v.Values[congestion] + ", which does not pace"
		}
		return v.each(func(g Gear) []wish { return []wish{{g.Name + "/qdisc", "fq", false}} }, "there is no network card here")
	},
}, {
	ID: "proxy-sync", Settings: []string{fieldMinSync, fieldSync}, Scope: Proxy,
	Title:    "how long kube-proxy waits before it applies changes",
	Formula:  "minSyncPeriod 1s and syncPeriod 30s, kube-proxy's own, where they are longer",
	Source:   "https://kubernetes.io/docs/reference/networking/virtual-ips/#minimize-iptables-restore",
	Evidence: "iptables.minSyncPeriod is more than 1 s, or iptables.syncPeriod is 1 h or more",
	Checks:   []string{"PX-18"},
	Pitfall:  "Longer ones were advised before Kubernetes 1.28, when all rules were written for each change.",
	want:     syncPeriods,
}, {
	ID: "proxy-addresses", Settings: []string{fieldNodePorts}, Scope: Proxy,
	Title:    "the addresses of nodes at which node ports are served",
	Formula:  "0.0.0.0/0, which is all of them, in mode nftables, where nothing is said",
	Source:   "https://kubernetes.io/blog/2025/02/28/nftables-kube-proxy/; https://kubernetes.io/docs/reference/config-api/kube-proxy-config.v1alpha1/ (nodePortAddresses)",
	Evidence: "mode nftables, which serves them at the primary address alone, and Services with node ports",
	Checks:   []string{"PX-04"},
	Pitfall:  "It opens node ports at addresses that had none: only for who missed them after a change of mode. [primary] says that they are not meant.",
	want: func(v *view) ([]wish, string) {
		if len(v.Found["PX-04"]) == 0 {
			return nil, "kube-proxy's mode serves them at all addresses, it is said at which, or there are none"
		}
		return []wish{{fieldNodePorts, `["0.0.0.0/0"]`, false}}, ""
	},
}}

// syncPeriods are kube-proxy's own where the configuration has longer ones.
func syncPeriods(v *view) (wishes []wish, why string) {
	for _, row := range []struct {
		field, usual string
		over         time.Duration
	}{{fieldMinSync, "1s", time.Second + 1}, {fieldSync, "30s", time.Hour}} {
		if d, err := time.ParseDuration(strings.Trim(v.Values[row.field], `"'`)); err == nil && d >= row.over && len(v.Found["PX-18"]) > 0 {
			wishes = append(wishes, wish{row.field, row.usual, false})
		}
	}
	if len(wishes) == 0 {
		why = "kube-proxy does not wait longer than it does by itself, or its mode has no such wait"
	}
	return wishes, why
}

func neighbourSettings() (all []string) {
	for _, family := range []string{"ipv4", "ipv6"} {
		for _, n := range []string{"3", "2", "1"} {
			all = append(all, "net."+family+".neigh.default.gc_thresh"+n)
		}
	}
	return all
}

func acceptQueue(v *view) ([]wish, string) {
	now := v.number(somaxconn)
	n := max(4096, power(v.Accepted*retryAfter))
	if len(v.Found["HS-04"]) > 0 && now >= n {
		bound := false
		for _, b := range v.Backlogs {
			bound = bound || int64(b) == now
		}
		if !bound {
			return nil, fmt.Sprintf("it is %d, and no program here asks for that much: raise the backlog that it gives to listen()", now)
		}
		n = 2 * now
	}
	return atLeast(somaxconn, min(n, mostWaiting)), ""
}

func localPorts(v *view) ([]wish, string) {
	var low, high int
	if _, err := fmt.Sscan(v.Values[portRange], &low, &high); err != nil {
		return nil, "the range cannot be read"
	}
	if len(v.Found["HS-09"]) == 0 {
		return nil, "no destination takes 80 % of the ports: more would do nothing"
	}
	// The kernel wants one end even and the other odd (ip_local_port_range).
	wider := max(1024, high+1-2*(high-low+1))
	if (high-wider)%2 == 0 {
		wider++
	}
	reserved := spans(v.Values[reservedPorts])
	for _, port := range v.ports() {
		if int(port) >= wider && int(port) < low {
			reserved = append(reserved, span{int(port), int(port)})
		}
	}
	if v.Node {
		reserved = append(reserved, spans(v.m.NodePorts)...)
	}
	return []wish{{reservedPorts, joined(reserved), false}, {portRange, fmt.Sprintf("%d %d", wider, high), false}}, ""
}

func windows(v *view) (wishes []wish, why string) {
	if v.m.Speed == 0 {
		return nil, "no network card tells its speed"
	}
	most := min(2*float64(v.m.Speed)/8*v.RTT/1000, float64(v.m.Memory)/128)
	for _, name := range []string{receiveWindow, sendWindow} {
		parts := strings.Fields(v.Values[name])
		if len(parts) != 3 {
			return nil, name + " cannot be read"
		}
		var now int64
		fmt.Sscan(parts[2], &now)
		if n := power(most); n > now {
			wishes = append(wishes, wish{name, parts[0] + " " + parts[1] + " " + text(n), true})
		}
	}
	if len(wishes) == 0 {
		why = fmt.Sprintf("with round trips of %.1f ms, the longest of an open connection, what there is suffices", v.RTT)
	}
	return wishes, why
}

func neighbours(v *view) (wishes []wish, why string) {
	for i, entries := range v.m.Neighbours {
		names := neighbourSettings()[3*i : 3*i+3]
		if !v.read(names[0]) {
			continue // without IPv6
		}
		if n := power(2 * float64(entries)); n > v.number(names[0]) {
			wishes = append(wishes, atLeast(names[0], n)...)
			wishes = append(wishes, atLeast(names[1], n/2)...)
			wishes = append(wishes, atLeast(names[2], n/8)...)
		}
	}
	if len(wishes) == 0 {
		why = fmt.Sprintf("%d entries of IPv4 and %d of IPv6 are less than half of what there is room for", v.m.Neighbours[0], v.m.Neighbours[1])
	}
	return wishes, why
}

func tracked(v *view) ([]wish, string) {
	count := 0
	for _, s := range v.m.Spaces {
		count = max(count, s.Tracked)
	}
	most := powerBelow(float64(v.m.Memory) / 64 / entry)
	n := most
	if v.finding() != "" {
		n = min(most, power(2*float64(count)))
	}
	if now := v.number(trackedMax); v.finding() != "" && n <= now {
		return nil, fmt.Sprintf("%d connections are tracked and %d can be: 1/64 of the memory has no room for more; shorten timeouts, or track less", count, now)
	}
	return append(atLeast(trackedLists, n), atLeast(trackedMax, n)...), ""
}

// each gathers the wishes for the devices that may be tuned: on a node network cards,
// elsewhere what there is.
func (v *view) each(f func(Gear) []wish, why string) (wishes []wish, _ string) {
	for _, g := range v.Devices {
		if g.Hardware || !v.Node {
			wishes = append(wishes, f(g)...)
		}
	}
	if len(wishes) == 0 {
		return nil, why
	}
	return wishes, ""
}

func receiveBy(v *view) ([]wish, string) {
	return v.each(func(g Gear) (wishes []wish) {
		for i := range g.Receive {
			if g.Receive < v.m.CPUs {
				wishes = append(wishes, wish{fmt.Sprintf("%s/rx-%d/rps_cpus", g.Name, i), mask(v.m.CPUs, func(int) bool { return true }), false})
			}
		}
		return wishes
	}, "each device here has as many receive queues as there are processors: it would only add work")
}

func sendBy(v *view) ([]wish, string) {
	return v.each(func(g Gear) (wishes []wish) {
		for i := range g.Send {
			if g.Send > 1 {
				wishes = append(wishes, wish{fmt.Sprintf("%s/tx-%d/xps_cpus", g.Name, i), mask(v.m.CPUs, func(cpu int) bool { return cpu%g.Send == i }), false})
			}
		}
		return wishes
	}, "no device here has more than one queue to send by")
}

// mask has a bit for each processor that is wanted, in hexadecimal.
func mask(cpus int, want func(int) bool) string {
	digits := ""
	for first := 0; first < cpus; first += 4 {
		digit := 0
		for cpu := first; cpu < min(cpus, first+4); cpu++ {
			if want(cpu) {
				digit |= 1 << (cpu - first)
			}
		}
		digits = fmt.Sprintf("%x", digit) + digits
	}
	if digits = strings.TrimLeft(digits, "0"); digits == "" {
		return "0"
	}
	return digits
}
