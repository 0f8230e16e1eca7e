package doctor

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

const (
	trackedCount = "net.netfilter.nf_conntrack_count"
	trackedMax   = "net.netfilter.nf_conntrack_max"
	trackedLists = "net.netfilter.nf_conntrack_buckets"
	trackedStat  = "/proc/net/stat/nf_conntrack"
	tcpTracked   = "net.netfilter.nf_conntrack_tcp_timeout_established"
	logInvalid   = "net.netfilter.nf_conntrack_log_invalid"

	conntrackDoc = "https://docs.kernel.org/networking/nf_conntrack-sysctl.html"
)

// sysctlFiles are those of sysctl.d(5), the folder that counts most last.
var sysctlFiles = []string{"/usr/lib/sysctl.d/*.conf", "/usr/local/lib/sysctl.d/*.conf", "/run/sysctl.d/*.conf", "/etc/sysctl.d/*.conf"}

var conntrackChecks = []Check{{
	ID: "CT-01", Layer: "conntrack", Title: "the connection tracking table is nearly full", Severity: Critical, Scope: Everywhere,
	Reads:  []string{trackedCount, trackedMax},
	When:   "the entries of a namespace exceed 75 % of nf_conntrack_max (warning) or 90 % (critical)",
	Effect: "When it is full, the first packet of each new connection is dropped, without an answer; the client meets a timeout. Entries are counted for each namespace, and each is held against the one limit.",
	Source: "https://github.com/prometheus/node_exporter/blob/master/docs/node-mixin/alerts/alerts.libsonnet (75 %); https://github.com/kubernetes/node-problem-detector/blob/master/config/plugin/network_problem.sh (90 %); " + conntrackDoc,
	Fix:    "sysctl -w " + trackedMax + "=N, with N twice what it is, and the same in a file in /etc/sysctl.d; where kube-proxy runs, conntrack.maxPerCore and conntrack.min of its configuration as well",
	Undo:   "sysctl -w " + trackedMax + "=N, with N what it was, without the file; put conntrack of kube-proxy's configuration back",
	Pitfall: "A sysctl on a node with kube-proxy does not last: from 1.29 on it writes its own value, higher or lower, whenever it starts. " +
		"A pod's namespace shows the limit and cannot set it.",
	look: conntrackUse,
}, {
	ID: "CT-02", Layer: "conntrack", Title: "nf_conntrack_max is not what the sysctl files say", Severity: Warning, Scope: Node,
	Reads:   append([]string{trackedMax, Processes}, sysctlFiles...),
	When:    "a file of sysctl.d(5) sets nf_conntrack_max, and the kernel has another value",
	Effect:  "Somebody else sets the limit: what the file promises is not there, at the latest after the next start of whoever that is.",
	Source:  "https://github.com/kubernetes/kubernetes/blob/v1.36.3/pkg/proxy/conntrack/sysctls.go; https://github.com/kubernetes/kubernetes/issues/141943",
	Fix:     "let one of them set it: remove the line from the file, or set conntrack.maxPerCore: 0 in kube-proxy's configuration, which then leaves the limit alone",
	Undo:    "put the line, or the value of conntrack.maxPerCore, back",
	Pitfall: "kube-proxy up to 1.28 only raised the limit; later ones write any value that differs, also a lower one, at each start.",
	look:    conntrackOwner,
}, {
	ID: "CT-03", Layer: "conntrack", Title: "the connection tracking table has too few lists for its size", Severity: Warning, Scope: Node,
	Reads:  []string{trackedMax, trackedLists},
	When:   "nf_conntrack_max is more than 4 times nf_conntrack_buckets",
	Effect: "Each connection is in two lists (once for each direction); when the table fills, each packet's look-up walks along lists of more than 8.",
	Source: conntrackDoc + " (nf_conntrack_buckets); https://github.com/kubernetes/kubernetes/blob/v1.36.3/pkg/proxy/conntrack/sysctls.go (kube-proxy sets a quarter)",
	Fix:    "echo N > /sys/module/nf_conntrack/parameters/hashsize, with N a quarter of nf_conntrack_max or more",
	Undo:   "echo N > /sys/module/nf_conntrack/parameters/hashsize, with N what it was",
	Pitfall: "\"Set max to 8 times the buckets\" is older than Linux 5.15, whose default is a list for each entry. " +
		"Only the node's own namespace can change the number.",
	look: conntrackLists,
}, {
	ID: "CT-04", Layer: "conntrack", Title: "packets are dropped because they cannot be tracked", Severity: Critical, Scope: Everywhere,
	Reads:   []string{trackedStat},
	When:    "drop (critical) or early_drop (warning) of /proc/net/stat/nf_conntrack grows",
	Effect:  "drop: packets of new connections are lost. early_drop: the table is full, and connections that had no answer yet are forgotten to make room.",
	Source:  "nf_conntrack_alloc and __nf_conntrack_confirm of https://github.com/torvalds/linux/blob/master/net/netfilter/nf_conntrack_core.c",
	Fix:     "where CT-01 finds the table full: its fix; where CT-05 finds insert_failed growing as well: that one's",
	Undo:    "that of the fix",
	Pitfall: "The kernel's log is no evidence: its \"table full\" is limited in rate for all messages together, and may never appear.",
	look:    conntrackDrops,
}, {
	ID: "CT-05", Layer: "conntrack", Title: "connections clash in the connection tracking table", Severity: Warning, Scope: Everywhere,
	Reads:   []string{trackedStat},
	When:    "insert_failed of /proc/net/stat/nf_conntrack grows",
	Effect:  "Two packets that begin flows raced for the same translated address and port, or no port was left: one packet is lost. For DNS over UDP that is a wait of 5 s.",
	Source:  "https://github.com/kubernetes/kubernetes/issues/56903; __nf_conntrack_confirm of https://github.com/torvalds/linux/blob/master/net/netfilter/nf_conntrack_core.c",
	Fix:     "avoid the translation: a DNS cache on each node (NodeLocal DNSCache) for DNS, routed pod addresses or more source addresses for what leaves the cluster",
	Undo:    "remove what was added",
	Pitfall: "--random-fully makes clashes rarer; it gives no more ports.",
	look:    func(v *view) { v.tracked(func() { v.rises(Warning, "nf_conntrack.insert_failed") }) },
}, {
	ID: "CT-08", Layer: "conntrack", Title: "idle connections are kept for days in a table that fills", Severity: Info, Scope: Everywhere,
	Reads:   []string{trackedCount, trackedMax, tcpTracked},
	When:    "the table is more than half full and nf_conntrack_tcp_timeout_established is above 86400 s",
	Effect:  "A connection whose ends are gone without a word stays for so long; the kernel's default is 5 days.",
	Source:  conntrackDoc + " (nf_conntrack_tcp_timeout_established); https://kubernetes.io/docs/reference/config-api/kube-proxy-config.v1alpha1/ (tcpEstablishedTimeout, 24 h)",
	Fix:     "sysctl -w " + tcpTracked + "=86400 in that namespace",
	Undo:    "sysctl -w " + tcpTracked + "=N, with N what it was",
	Pitfall: "Each namespace has its own. A connection that is idle for longer than the timeout is cut: keepalives must be more frequent.",
	look:    conntrackIdle,
}, {
	ID: "CT-12", Layer: "conntrack", Title: "each packet that cannot be tracked is logged", Severity: Info, Scope: Everywhere,
	Reads:   []string{logInvalid},
	When:    "nf_conntrack_log_invalid is not 0",
	Effect:  "It is for looking for a fault. Left on, anybody's odd packets fill the log, and the limit on its rate hides other messages.",
	Source:  conntrackDoc + " (nf_conntrack_log_invalid)",
	Fix:     "sysctl -w " + logInvalid + "=0 in that namespace",
	Undo:    "sysctl -w " + logInvalid + "=N, with N what it was",
	Pitfall: "The counter \"invalid\" of /proc/net/stat/nf_conntrack says how many there are without a log.",
	look: func(v *view) {
		v.tracked(func() {
			if n, ok := v.number(logInvalid); ok && n != 0 {
				v.fires(Info, logInvalid, "%d", n)
				v.mends(v.fix, fmt.Sprintf("sysctl -w %s=%d in that namespace", logInvalid, n))
			}
		})
	},
}}

// tracked calls look where the kernel tracks connections.
func (v *view) tracked(look func()) {
	for _, read := range v.check.Reads {
		if strings.Contains(read, "nf_conntrack") && !v.there(read) {
			v.lacks(read, "there is no connection tracking in this kernel, or it is not loaded")
			return
		}
	}
	look()
}

// fill is how full the table of a namespace is, from 0 to 1.
func (v *view) fill() (count, limit int64, fill float64, ok bool) {
	count, there := v.number(trackedCount)
	limit, ok = v.number(trackedMax)
	if !ok || !there {
		return count, limit, 0, false
	}
	return count, limit, float64(count) / float64(max(1, limit)), true
}

func conntrackUse(v *view) {
	v.tracked(func() {
		count, limit, fill, ok := v.fill()
		if !ok {
			return
		}
		text := fmt.Sprintf("%s of %s, %.0f %%", thousands(uint64(count)), thousands(uint64(limit)), 100*fill)
		switch {
		case fill > 0.9:
			v.fires(Critical, trackedCount, "%s", text)
		case fill > 0.75:
			v.fires(Warning, trackedCount, "%s", text)
		default:
			v.sees(trackedCount, "%s", text)
			return
		}
		if v.runs("kube-proxy") {
			v.fix = fmt.Sprintf("sysctl -w %s=%d at once; kube-proxy sets this limit again when it starts: conntrack.maxPerCore: 0 in its configuration leaves it alone (then a file in /etc/sysctl.d keeps it), or raise conntrack.min", trackedMax, 2*limit)
		} else {
			v.fix = fmt.Sprintf("sysctl -w %s=%d", trackedMax, 2*limit)
		}
		v.undo = fmt.Sprintf("sysctl -w %s=%d", trackedMax, limit)
		if v.runs("kube-proxy") {
			v.undo += ", and conntrack of kube-proxy's configuration as it was"
		}
	})
}

func conntrackOwner(v *view) {
	v.tracked(func() {
		limit, ok := v.number(trackedMax)
		if !ok {
			return
		}
		name, wanted := v.configured(trackedMax)
		if wanted == "" || wanted == fmt.Sprint(limit) {
			v.sees(trackedMax, "%d", limit)
			return
		}
		v.fires(Warning, name, "%s, and the kernel has %d", wanted, limit)
		if v.runs("kube-proxy") {
			v.fires(Warning, Processes, "kube-proxy runs here, which sets it")
		}
	})
}

// configured is what the files of sysctl.d(5) say of a setting, and which: one in a
// folder that counts more hides one of the same name, and then the last name counts.
func (v *view) configured(setting string) (file, value string) {
	byName := map[string]string{}
	for _, pattern := range sysctlFiles {
		for _, name := range v.matches(pattern) {
			byName[path.Base(name)] = name
		}
	}
	var names []string
	for name := range byName {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		for line := range strings.Lines(v.last[byName[name]].is) {
			key, is, found := strings.Cut(strings.TrimSpace(line), "=")
			key = strings.ReplaceAll(strings.TrimPrefix(strings.TrimSpace(key), "-"), "/", ".")
			if found && key == setting {
				file, value = byName[name], strings.TrimSpace(is)
			}
		}
	}
	return file, value
}

func conntrackLists(v *view) {
	v.tracked(func() {
		limit, ok := v.number(trackedMax)
		lists, there := v.number(trackedLists)
		if !ok || !there {
			return
		}
		if limit <= 4*lists {
			v.sees(trackedLists, "%d for at most %d entries", lists, limit)
			return
		}
		v.fires(Warning, trackedLists, "%d for at most %d entries", lists, limit)
		v.fix = fmt.Sprintf("echo %d > /sys/module/nf_conntrack/parameters/hashsize", (limit+3)/4)
		v.undo = fmt.Sprintf("echo %d > /sys/module/nf_conntrack/parameters/hashsize", lists)
	})
}

func conntrackDrops(v *view) {
	v.tracked(func() {
		if v.rises(Critical, "nf_conntrack.drop") > 0 {
			if n, ok := v.rise("nf_conntrack.insert_failed"); ok && n > 0 {
				v.fires(Critical, "nf_conntrack.insert_failed", "%s: a clash or no port left, rather than a full table", v.inWindow(n))
			}
		}
		v.rises(Warning, "nf_conntrack.early_drop")
	})
}

func conntrackIdle(v *view) {
	v.tracked(func() {
		count, limit, fill, ok := v.fill()
		timeout, there := v.number(tcpTracked)
		if ok && there && fill > 0.5 && timeout > 86400 {
			v.fires(Info, tcpTracked, "%d s, and %d of %d entries", timeout, count, limit)
			v.mends(v.fix, fmt.Sprintf("sysctl -w %s=%d in that namespace", tcpTracked, timeout))
		}
	})
}
