package doctor

import (
	"cmp"
	"fmt"
	"maps"
	"math/bits"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/millrace/millrace/kernel/proc"
)

const (
	softnetStat  = "/proc/net/softnet_stat"
	backlog      = "net.core.netdev_max_backlog"
	cpuStat      = "/proc/stat"
	netDev       = "/proc/net/dev"
	packetQueues = "/sys/class/net/*/queues/rx-*/rps_cpus"
	governors    = "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
	drivers      = "/sys/devices/system/cpu/cpu*/cpufreq/scaling_driver"
	jitEnable    = "net.core.bpf_jit_enable"
	jitHarden    = "net.core.bpf_jit_harden"

	sysctlNetDoc = "https://docs.kernel.org/admin-guide/sysctl/net.html"
	scalingDoc   = "https://docs.kernel.org/networking/scaling.html"
	ipSysctl     = "https://docs.kernel.org/networking/ip-sysctl.html"
)

// neighbours are the tables of both families, global to the host.
var neighbours = []struct{ table, stat, limit string }{
	{"arp_cache", "/proc/net/stat/arp_cache", "net.ipv4.neigh.default.gc_thresh3"},
	{"ndisc_cache", "/proc/net/stat/ndisc_cache", "net.ipv6.neigh.default.gc_thresh3"},
}

var hostChecks = []Check{{
	ID: "HS-01", Layer: "host", Title: "processors drop packets before the stack sees them", Severity: Warning, Scope: Node,
	Reads:   []string{softnetStat},
	When:    "the second column of /proc/net/softnet_stat grows",
	Effect:  "A processor's queue of received packets (netdev_max_backlog) is full: packets to and from pods are lost, for each passes it at a veth.",
	Source:  sysctlNetDoc + " (netdev_max_backlog); " + scalingDoc,
	Fix:     "find out which processor is busy with receiving (mpstat -P ALL 1, %soft) and spread its work (HS-24); then sysctl -w " + backlog + "=N, with N twice what it is",
	Undo:    "sysctl -w " + backlog + "=N, with N what it was (1000 by default)",
	Pitfall: "The queue is that of veth, loopback and RPS, not the ring of a network card: where none of them carries the load, a longer one changes nothing.",
	look:    func(v *view) { v.rises(Warning, "softnet.dropped") },
}, {
	ID: "HS-18", Layer: "host", Title: "eBPF programs run slower than they could", Severity: Warning, Scope: Node,
	Reads:   []string{jitEnable, jitHarden},
	When:    "bpf_jit_enable is 0 (warning), or bpf_jit_harden is 2 (info)",
	Effect:  "Without the compiler every eBPF program is interpreted, several times slower. With bpf_jit_harden 2 the constants of privileged programs are blinded as well, at a cost in each.",
	Source:  sysctlNetDoc + " (bpf_jit_enable, bpf_jit_harden)",
	Fix:     "sysctl -w " + jitEnable + "=1, or " + jitHarden + "=1",
	Undo:    "sysctl -w " + jitEnable + "=0, or " + jitHarden + "=2",
	Pitfall: "Kernels built with CONFIG_BPF_JIT_ALWAYS_ON have no interpreter, and take no other value than 1.",
	look:    jit,
}, {
	ID: "HS-19", Layer: "host", Title: "the neighbour table is nearly full", Severity: Critical, Scope: Node,
	Reads:   []string{neighbours[0].stat, neighbours[0].limit, neighbours[1].stat, neighbours[1].limit},
	When:    "table_fulls grows (critical), forced_gc_runs grows (warning), or the entries exceed 75 % of gc_thresh3 (info)",
	Effect:  "An address that is not in the table cannot be reached when it is full. From gc_thresh2 on the kernel looks for entries to throw out. The table is one for all namespaces of the host.",
	Source:  ipSysctl + " (neigh/default/gc_thresh3); neigh_alloc of https://github.com/torvalds/linux/blob/master/net/core/neighbour.c",
	Fix:     "sysctl -w net.ipv4.neigh.default.gc_thresh3=N net.ipv4.neigh.default.gc_thresh2=N/2, for IPv6 the same below net.ipv6, with N twice the entries or more, and twice what it is at least",
	Undo:    "sysctl -w net.ipv4.neigh.default.gc_thresh3=N net.ipv4.neigh.default.gc_thresh2=N, with what they were (1024 and 512 by default)",
	Pitfall: "Permanent entries, as some network plug-ins write them, are counted among the entries, and the limit is not for them: many of them are no fault.",
	look:    neighbourTables,
}, {
	ID: "HS-22", Layer: "host", Title: "a network card loses packets to errors", Severity: Warning, Scope: Node,
	Reads:   []string{netDev, Devices},
	When:    "errors exceed 1 % of the packets received or sent in the window, and are 10 or more; of devices that are no virtual kind",
	Effect:  "The packets are lost on the wire, or the card had no room for them; TCP slows down, and UDP loses them.",
	Source:  "https://github.com/prometheus/node_exporter/blob/master/docs/node-mixin/alerts/alerts.libsonnet (NodeNetworkReceiveErrs, 1 %)",
	Fix:     "ethtool -S DEVICE says which error; for missed packets a longer ring (ethtool -G DEVICE rx N), else cable, port and duplex",
	Undo:    "ethtool -G DEVICE rx N, with N what it was",
	Pitfall: "Drops of the device are not counted here: frames of VLANs and protocols that nobody wants are among them.",
	look:    cardErrors,
}, {
	ID: "HS-24", Layer: "host", Title: "one processor receives for all", Severity: Warning, Scope: Node,
	Reads:   []string{cpuStat, packetQueues, Devices},
	When:    "a network card has one receive queue, without RPS, and one of several processors spends more than 80 % of the window in softirq",
	Effect:  "What that processor cannot take waits and is lost, while others are idle.",
	Source:  scalingDoc + " (RPS: Receive Packet Steering)",
	Fix:     "echo MASK > /sys/class/net/DEVICE/queues/rx-0/rps_cpus, with the other processors in MASK; or more queues: ethtool -L DEVICE combined N",
	Undo:    "echo 0 > /sys/class/net/DEVICE/queues/rx-0/rps_cpus, or ethtool -L DEVICE combined 1",
	Pitfall: "Where the card has as many queues as there are processors, RPS only adds work.",
	look:    oneReceiver,
}, {
	ID: "HS-25", Layer: "host", Title: "the hypervisor takes this node's processor time", Severity: Warning, Scope: Node,
	Reads:   []string{cpuStat},
	When:    "more than 10 % of the window is steal time",
	Effect:  "Packets wait while the machine does not run; latencies are those of a neighbour, not of the network.",
	Source:  "https://man7.org/linux/man-pages/man5/proc_stat.5.html (steal); https://samber.github.io/awesome-prometheus-alerts/rules#host-and-hardware (HostCpuStealNoisyNeighbor, 10 %)",
	Fix:     "move the machine, or give it processors of its own; for burstable kinds of machines, look at their credits",
	Undo:    "move it back",
	Pitfall: "Nothing in this node's kernel can be tuned to make up for it.",
	look: func(v *view) {
		was, is, ok := v.processors()
		if !ok {
			return
		}
		share := part(is["cpu"].Steal-was["cpu"].Steal, is["cpu"].Total()-was["cpu"].Total())
		if share > 0.1 {
			v.fires(Warning, cpuStat, "%.0f %% steal", 100*share)
		} else {
			v.sees(cpuStat, "%.1f %% steal", 100*share)
		}
	},
}, {
	ID: "HS-26", Layer: "host", Title: "a process that the network waits for is held back by its CPU limit", Severity: Warning, Scope: Node,
	Reads:   []string{Throttling},
	When:    "25 % or more of the periods of its cgroup were throttled (nr_throttled of nr_periods); of DNS servers, proxies, ingresses and network plug-ins",
	Effect:  "It stands still for up to 100 ms at a time. Its buffers overflow meanwhile (HS-14, DN-10), and clients see what looks like loss.",
	Source:  "https://github.com/kubernetes-monitoring/kubernetes-mixin/blob/master/alerts/resource_alerts.libsonnet (CPUThrottlingHigh, 25 %); https://docs.kernel.org/scheduler/sched-bwc.html",
	Fix:     "take resources.limits.cpu away from its container, and give it a request that it can live on",
	Undo:    "put the limit back",
	Pitfall: "Use of processor time on average says nothing of it: a limit is held in each tenth of a second.",
	look:    throttled,
}, {
	ID: "HS-27", Layer: "host", Title: "processors are held at their lowest frequency", Severity: Info, Scope: Node,
	Reads:   []string{governors, drivers},
	When:    "the governor is powersave, and the driver is neither intel_pstate nor amd-pstate-epp",
	Effect:  "That governor sets the lowest frequency for good: each packet costs a multiple of the time.",
	Source:  "https://docs.kernel.org/admin-guide/pm/cpufreq.html (powersave); https://docs.kernel.org/admin-guide/pm/intel_pstate.html (active mode)",
	Fix:     "cpupower frequency-set -g schedutil, or performance for latency",
	Undo:    "cpupower frequency-set -g powersave",
	Pitfall: "With intel_pstate and amd-pstate-epp \"powersave\" is another algorithm of the same name, which does raise the frequency under load.",
	look:    lowFrequency,
}}

func part(of, all uint64) float64 { return float64(of) / float64(max(1, all)) }

func jit(v *view) {
	var to, from string // only what is wrong is set: the other one is as somebody wants it
	if on, ok := v.number(jitEnable); ok && on == 0 {
		v.fires(Warning, jitEnable, "0")
		to, from = to+" "+jitEnable+"=1", from+" "+jitEnable+"=0"
	}
	if harden, ok := v.number(jitHarden); ok && harden == 2 {
		v.fires(Info, jitHarden, "2")
		to, from = to+" "+jitHarden+"=1", from+" "+jitHarden+"=2"
	}
	if to != "" {
		v.fix, v.undo = "sysctl -w"+to, "sysctl -w"+from
	}
}

func neighbourTables(v *view) {
	for _, n := range neighbours {
		if !v.there(n.stat) && strings.Contains(n.limit, "ipv6") {
			continue // without IPv6
		}
		text, ok := v.text(n.stat)
		limit, there := v.number(n.limit)
		if !ok || !there {
			continue
		}
		entries, err := proc.PerCPU(text, "entries")
		if err != nil {
			v.lacks(n.stat, "%s", reason(err))
			continue
		}
		if full, ok := v.rise(n.table + ".table_fulls"); ok && full > 0 {
			v.fires(Critical, n.table+".table_fulls", "%s", v.inWindow(full))
		}
		if forced, ok := v.rise(n.table + ".forced_gc_runs"); ok && forced > 0 {
			v.fires(Warning, n.table+".forced_gc_runs", "%s", v.inWindow(forced))
		}
		if part(entries, uint64(limit)) > 0.75 {
			v.fires(Info, n.stat, "%d entries of %d", entries, limit)
		} else {
			v.sees(n.stat, "%d entries of %d", entries, limit)
		}
	}
}

// hardware are the names of the devices that are network cards.
func (v *view) hardware() (names []string, ok bool) {
	all, ok := get(v, Devices, v.devices)
	for _, d := range all {
		if d.Kind == "" && d.Ethernet && d.Up {
			names = append(names, d.Name)
		}
	}
	return names, ok
}

func cardErrors(v *view) {
	cards, ok := v.hardware()
	text, there := v.text(netDev)
	if !ok || !there {
		return
	}
	is, err := proc.Devices(text)
	was, err0 := proc.Devices(v.first[netDev].is)
	if err != nil || err0 != nil {
		v.lacks(netDev, "it cannot be understood")
		return
	}
	judge := func(card, way string, errors, packets uint64) {
		if share := part(errors, errors+packets); errors >= 10 && share > 0.01 {
			v.fires(Warning, netDev, "%s: %d errors in %d packets %s", card, errors, packets, way)
		}
	}
	for _, card := range cards {
		a, b := was[card], is[card]
		judge(card, "received", b.ReceiveErrors-min(a.ReceiveErrors, b.ReceiveErrors), b.Received-min(a.Received, b.Received))
		judge(card, "sent", b.SendErrors-min(a.SendErrors, b.SendErrors), b.Sent-min(a.Sent, b.Sent))
	}
}

// processors are their times at the first and the last reading.
func (v *view) processors() (was, is map[string]proc.Times, ok bool) {
	text, ok := v.text(cpuStat)
	if !ok {
		return nil, nil, false
	}
	is, err := proc.CPUs(text)
	was, err0 := proc.CPUs(v.first[cpuStat].is)
	if err != nil || err0 != nil {
		v.lacks(cpuStat, "it cannot be understood")
		return nil, nil, false
	}
	return was, is, true
}

func oneReceiver(v *view) {
	cards, known := v.hardware()
	was, is, ok := v.processors()
	if !ok || !known || len(is) <= 2 { // "cpu" and "cpu0"
		return
	}
	busy := ""
	for name, now := range is {
		if name != "cpu" && part(now.SoftIRQ-was[name].SoftIRQ, now.Total()-was[name].Total()) > 0.8 {
			busy = name
		}
	}
	if busy == "" {
		return
	}
	for _, card := range cards {
		var queues []string
		for _, name := range v.matches(packetQueues) {
			if strings.HasPrefix(name, "/sys/class/net/"+card+"/") {
				queues = append(queues, name)
			}
		}
		if len(queues) == 1 && strings.Trim(v.last[queues[0]].is, "0,\n") == "" {
			v.fires(Warning, queues[0], "%s has one queue and no RPS, and %s is busy with receiving", card, busy)
			mask := 1<<(len(is)-1) - 1
			if at, err := strconv.Atoi(strings.TrimPrefix(busy, "cpu")); err == nil && bits.Len(uint(mask)) <= 32 {
				v.fix = fmt.Sprintf("echo %x > %s", mask&^(1<<at), queues[0])
				v.undo = "echo 0 > " + queues[0]
			}
		}
	}
}

func throttled(v *view) {
	for _, b := range v.budgets {
		f := v.last[b.file]
		if f.err == nil && !strings.Contains(f.is, "nr_periods") {
			continue // a cgroup without a limit
		}
		if err := cmp.Or(f.err, v.first[b.file].err); err != nil {
			v.lacks(b.file, "%s", reason(err))
			continue
		}
		grown := func(name string) uint64 {
			was, _ := proc.Line(v.first[b.file].is, name) // 0 without a limit then
			is, _ := proc.Line(f.is, name)
			return is - min(was, is)
		}
		held, periods := grown("nr_throttled"), grown("nr_periods")
		if held > 0 && part(held, periods) >= 0.25 {
			v.fires(Warning, b.file, "%s: %d of %d periods", b.process, held, periods)
		}
	}
}

func lowFrequency(v *view) {
	held := map[string]int{}
	for _, name := range v.matches(governors) {
		driver := strings.TrimSpace(v.last[path.Join(path.Dir(name), "scaling_driver")].is)
		if strings.TrimSpace(v.last[name].is) == "powersave" && !slices.Contains([]string{"intel_pstate", "amd-pstate-epp", ""}, driver) {
			held[driver]++
		}
	}
	for _, driver := range slices.Sorted(maps.Keys(held)) {
		v.fires(Info, governors, "powersave of the driver %s, on %d processors", driver, held[driver])
	}
	if len(v.matches(governors)) == 0 {
		v.lacks(governors, "no frequency can be set here, as in most virtual machines")
	}
}
