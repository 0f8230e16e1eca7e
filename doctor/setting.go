package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/proc"
)

const (
	closeWait    = "net.netfilter.nf_conntrack_tcp_timeout_close_wait"
	udpStream    = "net.netfilter.nf_conntrack_udp_timeout_stream"
	reuseMode    = "net.ipv4.vs.conn_reuse_mode"
	tcpReceive   = "net.ipv4.tcp_rmem"
	receiveMax   = "net.core.rmem_max"
	forward6     = "net.ipv6.conf.all.forwarding"
	acceptRA     = "net.ipv6.conf.*.accept_ra"
	bridgeRules  = "net.bridge.bridge-nf-call-iptables"
	routes4      = "/proc/net/route"
	routes6      = "/proc/net/ipv6_route"
	ringMisses   = "/sys/class/net/*/statistics/rx_missed_errors"
	managerFiles = "/etc/NetworkManager/conf.d/*.conf"

	// natTCP is REQ-5 of RFC 5382, 2 hours and 4 minutes, and natUDP that of RFC 4787, in
	// seconds.
	natTCP, natUDP = 7440, 120
	// quicBuffer is what quic-go asks for, in bytes.
	quicBuffer = 7500000
	// leastIPv6 is the MTU that every link of IPv6 has at least (RFC 8200, section 5).
	leastIPv6 = 1280
	// largestOverhead is that of WireGuard, the tunnel that adds most over IPv4.
	largestOverhead = 60
)

// setting describes a check of one setting: it fires where wrong says so. A namespace or a
// kernel without the setting has nothing wrong.
func setting(c Check, name string, wrong func(n int64) bool) Check {
	c.Scope, c.Reads = Everywhere, []string{name}
	severity := c.Severity
	c.look = func(v *view) {
		if strings.Contains(name, "nf_conntrack") && !v.there(name) {
			v.lacks(name, "there is no connection tracking in this kernel, or it is not loaded")
			return
		}
		n, ok := v.number(name)
		switch {
		case !ok:
		case wrong(n):
			v.fires(severity, name, "%d", n)
			v.mends(v.fix, fmt.Sprintf("sysctl -w %s=%d in that namespace", name, n))
		default:
			v.sees(name, "%d", n)
		}
	}
	return c
}

func below(least int64) func(int64) bool { return func(n int64) bool { return n < least } }
func equals(bad int64) func(int64) bool  { return func(n int64) bool { return n == bad } }

// settingChecks are about settings that lists of advice change, and what they depend on.
var settingChecks = []Check{setting(Check{
	ID: "CT-15", Layer: "conntrack", Title: "idle connections are forgotten too early", Severity: Warning,
	When:    "nf_conntrack_tcp_timeout_established is below 7440 s",
	Effect:  "A connection that is idle for longer loses its translation: its next packet is reset or dropped, and pools of connections fail at the first use after a pause.",
	Source:  "https://www.rfc-editor.org/rfc/rfc5382#section-5 (REQ-5: not less than 2 hours 4 minutes); " + conntrackDoc,
	Fix:     "sysctl -w " + tcpTracked + "=86400 in that namespace",
	Undo:    "sysctl -w " + tcpTracked + "=N, with N what it was",
	Pitfall: "600 or 1200 of tuning lists makes room in a table that CT-01 would say is full; TCP keepalives begin after 7200 s.",
}, tcpTracked, below(natTCP)), setting(Check{
	ID: "CT-16", Layer: "conntrack", Title: "UDP flows are forgotten too early", Severity: Info,
	When:    "nf_conntrack_udp_timeout_stream is below 120 s",
	Effect:  "An answer or a packet after a pause finds no translation: QUIC, WireGuard and SIP lose their way.",
	Source:  "https://www.rfc-editor.org/rfc/rfc4787#section-4.3 (REQ-5: not less than 2 minutes); " + conntrackDoc,
	Fix:     "sysctl -w " + udpStream + "=120 in that namespace",
	Undo:    "sysctl -w " + udpStream + "=N, with N what it was",
	Pitfall: "nf_conntrack_udp_timeout (30 s) is for flows without an answer, DNS for the most part, and may be short.",
}, udpStream, below(natUDP)), setting(Check{
	ID: "HS-40", Layer: "sockets", Title: "TCP has no time stamps", Severity: Info,
	When:    "tcp_timestamps is 0",
	Effect:  "Times of the way are measured once in a round trip only, old packets cannot be told from new ones on fast links, tcp_tw_reuse does not work, and connections made by SYN cookies lose their options.",
	Source:  ipSysctl + " (tcp_timestamps); https://www.rfc-editor.org/rfc/rfc7323",
	Fix:     "sysctl -w net.ipv4.tcp_timestamps=1 in that namespace",
	Undo:    "sysctl -w net.ipv4.tcp_timestamps=0",
	Pitfall: "\"Off to save 12 bytes\", and for fear that the uptime can be read: since 4.10 each connection begins at a random value.",
}, "net.ipv4.tcp_timestamps", equals(0)), setting(Check{
	ID: "HS-41", Layer: "sockets", Title: "TCP has no selective acknowledgements", Severity: Info,
	When:    "tcp_sack is 0",
	Effect:  "After a loss of several packets one is sent again in each round trip: a transfer with losses is many times slower.",
	Source:  ipSysctl + " (tcp_sack); https://www.rfc-editor.org/rfc/rfc2018",
	Fix:     "sysctl -w net.ipv4.tcp_sack=1 in that namespace",
	Undo:    "sysctl -w net.ipv4.tcp_sack=0",
	Pitfall: "It was the stopgap for CVE-2019-11477, which every kernel since June 2019 has mended.",
}, "net.ipv4.tcp_sack", equals(0)), setting(Check{
	ID: "HS-42", Layer: "sockets", Title: "TCP's window cannot grow", Severity: Warning,
	When:    "tcp_window_scaling is 0",
	Effect:  "At most 64 KiB are on the way: 5 Mbit/s at 100 ms, 500 Mbit/s at 1 ms, whatever the link can do.",
	Source:  ipSysctl + " (tcp_window_scaling); https://www.rfc-editor.org/rfc/rfc7323#section-2",
	Fix:     "sysctl -w net.ipv4.tcp_window_scaling=1 in that namespace",
	Undo:    "sysctl -w net.ipv4.tcp_window_scaling=0",
	Pitfall: "It is advised against firewalls that forget the scale; it is the firewall that has to be mended.",
}, "net.ipv4.tcp_window_scaling", equals(0)), setting(Check{
	ID: "HS-43", Layer: "sockets", Title: "tcp_fin_timeout is lowered", Severity: Info,
	When:    "it is below 60 s, the default",
	Effect:  "Connections that this side has closed and the other has not are forgotten earlier: what still comes is answered with a reset. TIME_WAIT, which is meant, is 60 s all the same.",
	Source:  ipSysctl + " (tcp_fin_timeout); TCP_TIMEWAIT_LEN of https://github.com/torvalds/linux/blob/master/include/net/tcp.h",
	Fix:     "sysctl -w net.ipv4.tcp_fin_timeout=60 in that namespace",
	Undo:    "sysctl -w net.ipv4.tcp_fin_timeout=N, with N what it was",
	Pitfall: "\"Lower it against many TIME_WAIT\": it is the time in FIN-WAIT-2. TIME_WAIT cannot be set.",
}, "net.ipv4.tcp_fin_timeout", below(60)), setting(Check{
	ID: "HS-44", Layer: "sockets", Title: "TCP gives up earlier than it should", Severity: Info,
	When:    "tcp_retries2 is below 8",
	Effect:  "A connection ends after seconds without an answer: a restart of a switch, or a route that moves, ends all of them.",
	Source:  ipSysctl + " (tcp_retries2: at least 8, for the 100 s of RFC 1122)",
	Fix:     "sysctl -w net.ipv4.tcp_retries2=15 in that namespace; where a program has to know earlier, TCP_USER_TIMEOUT for its own sockets",
	Undo:    "sysctl -w net.ipv4.tcp_retries2=N, with N what it was",
	Pitfall: "It is advised for a faster failover of one program, and counts for all.",
}, "net.ipv4.tcp_retries2", below(8)), setting(Check{
	ID: "HS-45", Layer: "sockets", Title: "SYN cookies are off", Severity: Info,
	When:    "tcp_syncookies is 0",
	Effect:  "When the queue of handshakes is full, new ones are dropped (HS-06): a flood, or a burst, shuts everybody out.",
	Source:  ipSysctl + " (tcp_syncookies)",
	Fix:     "sysctl -w net.ipv4.tcp_syncookies=1 in that namespace, the default",
	Undo:    "sysctl -w net.ipv4.tcp_syncookies=0",
	Pitfall: "With 1 a cookie is sent only when the queue is full: it costs nothing before.",
}, "net.ipv4.tcp_syncookies", equals(0)), setting(Check{
	ID: "HS-46", Layer: "sockets", Title: "every connection begins with small packets", Severity: Info,
	When:    "tcp_mtu_probing is 2",
	Effect:  "Packets begin with 1024 bytes (tcp_base_mss) and grow by trying, on each connection, also where the way is known to take more.",
	Source:  ipSysctl + " (tcp_mtu_probing, tcp_base_mss)",
	Fix:     "sysctl -w net.ipv4.tcp_mtu_probing=1 in that namespace: only after a black hole was met; better 0 and an MTU that fits (MT-01)",
	Undo:    "sysctl -w net.ipv4.tcp_mtu_probing=2",
	Pitfall: "It hides a wrong MTU from TCP, and not from UDP.",
}, "net.ipv4.tcp_mtu_probing", equals(2)), {
	ID: "CT-06", Layer: "conntrack", Title: "packets belong to no connection", Severity: Info, Scope: Everywhere,
	Reads:   []string{trackedStat},
	When:    "invalid of /proc/net/stat/nf_conntrack grows",
	Effect:  "kube-proxy's mode iptables drops them on their way to pods, where a late packet of a long transfer ends it with a reset.",
	Source:  "https://github.com/kubernetes/kubernetes/blob/v1.36.3/pkg/proxy/iptables/proxier.go (ctstate INVALID); " + conntrackDoc + " (nf_conntrack_tcp_be_liberal)",
	Fix:     "find out which: sysctl -w " + logInvalid + "=6 for a minute; for late TCP packets conntrack.tcpBeLiberal: true of kube-proxy, or nf_conntrack_tcp_be_liberal=1",
	Undo:    "sysctl -w " + logInvalid + "=0; conntrack.tcpBeLiberal: false, or nf_conntrack_tcp_be_liberal=0",
	Pitfall: "A few are normal: scanners, and answers that come after all. Wrong checksums are among them (HS-35).",
	look:    func(v *view) { v.tracked(func() { v.rises(Info, "nf_conntrack.invalid") }) },
}, {
	ID: "CT-09", Layer: "conntrack", Title: "half-closed connections are forgotten too early", Severity: Info, Scope: Node,
	Reads:   []string{closeWait, KubeProxyRules},
	When:    "a process kube-proxy is in this namespace, and nf_conntrack_tcp_timeout_close_wait is below 3600 s",
	Effect:  "A server that answers long after its client has said that it will send no more: the answer keeps its own address, and the client resets it.",
	Source:  proxyDoc + " (tcpCloseWaitTimeout, 1 h); https://github.com/kubernetes/kubernetes/issues/32551",
	Fix:     "conntrack.tcpCloseWaitTimeout: 1h in kube-proxy's configuration, then restart it on each node",
	Undo:    "put conntrack.tcpCloseWaitTimeout back",
	Pitfall: "60, the kernel's own default, is what kube-proxy raises; \"lower it to 60\" brings the fault back.",
	look: func(v *view) {
		v.tracked(func() {
			found, there := get(v, KubeProxyRules, v.facts.kubeProxy)
			if n, ok := v.number(closeWait); ok && there && found.Process != 0 && n < 3600 {
				v.fires(Info, closeWait, "%d, and kube-proxy is process %d", n, found.Process)
			} else if ok {
				v.sees(closeWait, "%d", n)
			}
		})
	},
}, {
	ID: "PX-06", Layer: "service", Title: "IPVS delays connections on this kernel", Severity: Warning, Scope: Node,
	Reads:   []string{reuseMode, osRelease, Devices},
	When:    "the device kube-ipvs0 is there, the kernel is older than 5.9, and conn_reuse_mode is not 0",
	Effect:  "A connection that comes from a port used shortly before waits a second: bursts of short connections are slow.",
	Source:  "https://github.com/kubernetes/kubernetes/issues/93297; https://git.kernel.org/linus/35dfb013149f74c2be1ff9c78f14e6a3cd1539d1 (5.9)",
	Fix:     "a kernel of 5.9 or newer, or mode: nftables; sysctl -w " + reuseMode + "=0 sends such connections to endpoints that are gone instead",
	Undo:    "sysctl -w " + reuseMode + "=1",
	Pitfall: "kube-proxy sets it by the kernel's version; what a list of sysctls sets after it wins.",
	look: func(v *view) {
		all, ok := get(v, Devices, v.devices)
		if !ok || !slices.ContainsFunc(all, func(d link.Device) bool { return d.Name == "kube-ipvs0" }) {
			return
		}
		mode, ok := v.number(reuseMode)
		release, there := v.text(osRelease)
		if ok && there && mode != 0 && older(release, 5, 9) {
			v.fires(Warning, reuseMode, "%d, on Linux %s", mode, strings.TrimSpace(release))
		}
	},
}, {
	ID: "PX-09", Layer: "service", Title: "rules of Services are in both kinds of iptables", Severity: Warning, Scope: Node,
	Reads:   []string{KubeProxyRules},
	When:    "chains of kube-proxy are in iptables-legacy, and in nf_tables as well",
	Effect:  "Both are in force, and each program sees its own only: the ones that nobody updates translate to endpoints of long ago.",
	Source:  "https://kubernetes.io/docs/reference/setup-tools/kubeadm/kubeadm-init/; https://github.com/kubernetes-sigs/iptables-wrappers",
	Fix:     "find out which kube-proxy writes (iptables --version in its image), and remove the others: iptables-legacy-save > saved.rules, then grep -v KUBE saved.rules | iptables-legacy-restore; or the same with -nft, and for IPv6 with ip6tables",
	Undo:    "iptables-legacy-restore < saved.rules",
	Pitfall: "iptables -L shows one of the two, and not which.",
	look: func(v *view) {
		found, ok := get(v, KubeProxyRules, v.facts.kubeProxy)
		if !ok || len(found.Parts) == 0 {
			return
		}
		for _, left := range found.Left {
			if strings.HasPrefix(left, "chains of iptables-legacy") {
				v.fires(Warning, KubeProxyRules, "%d chains or tables in nf_tables, and %s", len(found.Parts), strings.SplitN(left, ":", 2)[0])
			}
		}
	},
}, {
	ID: "MT-02", Layer: "mtu", Title: "pods' packets are smaller than the network takes", Severity: Info, Scope: Everywhere,
	Reads:   []string{Devices},
	When:    "the MTU of a pod's device is more than 10 % below that of the node's device with the default route, less 60 bytes for a tunnel",
	Effect:  "More packets for the same data: on a network of jumbo frames six times as many.",
	Source:  "https://docs.cilium.io/en/stable/operations/performance/tuning/#mtu; https://docs.tigera.io/calico/latest/networking/configuring/mtu",
	Fix:     "the MTU in the network plug-in's configuration, then make the pods anew",
	Undo:    "put the MTU back",
	Pitfall: "It has to hold on the whole way: one node or one switch that takes less makes it a black hole.",
	look:    smallPackets,
}, {
	ID: "MT-07", Layer: "mtu", Title: "packets are wrapped although the nodes are neighbours", Severity: Info, Scope: Node,
	Reads:   []string{routes4, Nodes, ConfigMaps, CalicoPools},
	When:    "flannel's vxlan without DirectRouting, Calico's VXLAN or IPIP Always, or Cilium's tunnel, and all nodes' addresses are in ranges that this node reaches without a router",
	Effect:  "Each packet between nodes carries 20 to 50 bytes more and takes the work of wrapping it, where it could be sent as it is.",
	Source:  "https://docs.cilium.io/en/stable/network/concepts/routing/#native-routing; https://github.com/flannel-io/flannel/blob/master/Documentation/backends.md (host-gw, DirectRouting); https://docs.tigera.io/calico/latest/networking/configuring/vxlan-ipip (CrossSubnet)",
	Fix:     "Cilium: routingMode=native, autoDirectNodeRoutes=true, ipv4NativeRoutingCIDR=RANGE OF PODS; flannel: DirectRouting: true; Calico: vxlanMode: CrossSubnet",
	Undo:    "put the mode back, and wait until all agents have it",
	Pitfall: "Networks of clouds look like one link and drop packets from addresses that they do not know: try it with two nodes.",
	look:    needlessTunnel,
}, {
	ID: "MT-14", Layer: "mtu", Title: "a device is too narrow for IPv6", Severity: Info, Scope: Everywhere,
	Reads:   []string{Devices, "net.ipv6.conf.default.disable_ipv6"},
	When:    "the MTU of a device that is up is below 1280, and IPv6 is not disabled",
	Effect:  "The kernel takes IPv6 away from such a device, addresses and routes: in clusters with IPv6 the pod is not reached by it.",
	Source:  "https://www.rfc-editor.org/rfc/rfc8200#section-5; addrconf_notify of https://github.com/torvalds/linux/blob/master/net/ipv6/addrconf.c",
	Fix:     "an MTU of 1280 or more in the network plug-in's configuration; where the network below takes less, none of IPv6",
	Undo:    "put the MTU back",
	Pitfall: "Raising the MTU again does not bring its addresses back.",
	look: func(v *view) {
		all, ok := get(v, Devices, v.devices)
		off, there := v.number("net.ipv6.conf.default.disable_ipv6")
		if !ok || !there || off != 0 {
			return
		}
		for _, d := range all {
			if d.Up && d.MTU < leastIPv6 && d.Kind != "" {
				v.fires(Info, Devices, "%s %d", d.Name, d.MTU)
			}
		}
	},
}, {
	ID: "HS-11", Layer: "sockets", Title: "QUIC cannot have the buffers that it asks for", Severity: Info, Scope: Everywhere,
	Reads:   []string{udp4, udp6, receiveMax},
	When:    "something has UDP port 443 in a namespace, and rmem_max is below 7,500,000 bytes",
	Effect:  "Bursts that the program has not read yet are lost, which QUIC takes for a full network: fast transfers are slow.",
	Source:  "https://github.com/quic-go/quic-go/wiki/UDP-Buffer-Sizes",
	Fix:     "sysctl -w " + receiveMax + "=7500000 on the node, and net.core.wmem_max=7500000 where it is lower: they are global, and read-only in pods",
	Undo:    "sysctl -w " + receiveMax + "=N net.core.wmem_max=N, with what they were (212992 by default)",
	Pitfall: "It does nothing for TCP, whose own tuning goes by tcp_rmem; and nothing for programs that do not ask.",
	look: func(v *view) {
		quic := false
		ok := v.sockets(func(s proc.Socket, _ uint64) { quic = quic || s.Local.Port() == 443 })
		if n, there := v.number(receiveMax); ok && quic && there && n < quicBuffer {
			v.fires(Info, receiveMax, "%d, and a UDP socket on port 443", n)
		}
	},
}, {
	ID: "HS-12", Layer: "sockets", Title: "TCP's receive buffers begin or end below the default", Severity: Info, Scope: Everywhere,
	Reads:   []string{tcpReceive},
	When:    "the second value of tcp_rmem is below 131072, the default, or the third below 4 MiB",
	Effect:  "The second is the window of each new connection, the third the limit of its growth: at 10 ms, 4 MiB are 3.4 Gbit/s.",
	Source:  ipSysctl + " (tcp_rmem)",
	Fix:     "sysctl -w " + tcpReceive + "=\"MIN DEFAULT MAX\" in that namespace, with 131072 and 6291456 for what is below them, and the rest as it is",
	Undo:    "sysctl -w " + tcpReceive + "=\"MIN DEFAULT MAX\", with what it was",
	Pitfall: "\"4096 87380 16777216\" of the lists is from before Linux 4.20, and lowers the second. A new namespace takes the node's values when it is made.",
	look: func(v *view) {
		text, ok := v.text(tcpReceive)
		if !ok {
			return
		}
		var least, usual, most int64
		if _, err := fmt.Sscan(text, &least, &usual, &most); err != nil {
			v.lacks(tcpReceive, "it is %q", strings.TrimSpace(text))
		} else if usual < 131072 || most < 4<<20 {
			v.fires(Info, tcpReceive, "%d %d %d", least, usual, most)
			wanted := most
			if wanted < 4<<20 {
				wanted = 6 << 20 // the kernel's own, where there is memory for it
			}
			set := func(least, usual, most int64) string {
				return fmt.Sprintf("sysctl -w %s=\"%d %d %d\" in that namespace", tcpReceive, least, usual, most)
			}
			v.mends(set(least, max(usual, 131072), wanted), set(least, usual, most))
		}
	},
}, {
	ID: "HS-15", Layer: "sockets", Title: "BBR paces its packets by itself", Severity: Info, Scope: Node,
	Reads:   []string{congestion, Qdiscs, Devices},
	When:    "tcp_congestion_control is bbr, and the queueing discipline of a network card is neither fq nor mq",
	Effect:  "TCP then sets a timer for each socket in the place of fq doing it for all: it works, and costs more with many connections.",
	Source:  "the head of https://github.com/torvalds/linux/blob/master/net/ipv4/tcp_bbr.c",
	Fix:     "tc qdisc replace dev DEVICE root fq, and net.core.default_qdisc=fq in a file in /etc/sysctl.d",
	Undo:    "tc qdisc del dev DEVICE root, and without the file",
	Pitfall: "fq is no condition since Linux 4.13. default_qdisc is for devices made after it, and veth and loopback have none.",
	look: func(v *view) {
		algorithm, ok := v.text(congestion)
		cards, ok2 := get(v, Devices, v.devices)
		kinds, ok3 := get(v, Qdiscs, v.lastQdiscs)
		if !ok || !ok2 || !ok3 || strings.TrimSpace(algorithm) != "bbr" {
			return
		}
		for _, d := range cards {
			kind := kinds[d.Index].Kind
			if d.Kind == "" && d.Ethernet && d.Up && kind != "" && kind != "fq" && kind != "mq" {
				v.fires(Info, Qdiscs, "%s has %s", d.Name, kind)
			}
		}
	},
}, {
	ID: "HS-23", Layer: "host", Title: "a network card has no room for what comes in", Severity: Warning, Scope: Node,
	Reads:   []string{ringMisses, Devices},
	When:    "rx_missed_errors of a network card grows",
	Effect:  "The card drops packets before the kernel has them: its ring is full, because no processor empties it fast enough.",
	Source:  "https://docs.kernel.org/networking/statistics.html (rx_missed_errors); " + scalingDoc,
	Fix:     "ethtool -g DEVICE, then ethtool -G DEVICE rx N up to its maximum; more queues or RPS where one processor is busy (HS-24)",
	Undo:    "ethtool -G DEVICE rx N, with N what it was",
	Pitfall: "A longer ring takes longer bursts, and makes everything in it later.",
	look: func(v *view) {
		cards, ok := v.hardware()
		if !ok {
			return
		}
		for _, card := range cards {
			name := "/sys/class/net/" + card + "/statistics/rx_missed_errors"
			was, err := strconv.ParseUint(strings.TrimSpace(v.first[name].is), 10, 64)
			is, err2 := strconv.ParseUint(strings.TrimSpace(v.last[name].is), 10, 64)
			if err == nil && err2 == nil && is > was {
				v.fires(Warning, name, "%s", v.inWindow(is-was))
			}
		}
	},
}, {
	ID: "HS-32", Layer: "host", Title: "a firewall of its own runs on a node", Severity: Warning, Scope: Node,
	Reads:   []string{Processes},
	When:    "a process firewalld is on a node with a kubelet",
	Effect:  "Its rules drop what they do not know: packets of tunnels, of pods, and to NodePorts; and it writes them again at each change of its own.",
	Source:  "https://github.com/kubernetes/kubernetes/blob/v1.36.3/cmd/kubeadm/app/preflight/checks.go (FirewalldCheck); https://docs.tigera.io/calico/latest/getting-started/kubernetes/requirements",
	Fix:     "let the ranges of nodes, pods and Services through: firewall-cmd --permanent --zone=trusted --add-source=RANGE for each, then firewall-cmd --reload; or systemctl disable --now firewalld, where something outside guards the node",
	Undo:    "firewall-cmd --permanent --zone=trusted --remove-source=RANGE and --reload; or systemctl enable --now firewalld",
	Pitfall: "Opening 6443 and 10250, as kubeadm asks, lets the control plane work and pods still not.",
	look: func(v *view) {
		if v.facts.isNode() && v.runs("firewalld") {
			v.fires(Warning, Processes, "firewalld, process %d", v.facts.commands["firewalld"][0])
		}
	},
}, {
	ID: "HS-38", Layer: "routing", Title: "the node does not forward its pods' IPv6 packets", Severity: Critical, Scope: Everywhere,
	Reads:   []string{forward6, routes6, Devices},
	When:    "net.ipv6.conf.all.forwarding is 0 on the node, and a namespace has its IPv6 default route over a device pair whose end on the node is no part of a bridge",
	Effect:  "Pods reach nothing beyond the node by IPv6, and each other not either.",
	Source:  ipSysctl + " (conf/all/forwarding); https://kubernetes.io/docs/concepts/services-networking/dual-stack/",
	Fix:     "sysctl -w " + forward6 + "=1, and the same in a file in /etc/sysctl.d",
	Undo:    "sysctl -w " + forward6 + "=0, and without the file",
	Pitfall: "With forwarding on, a node no longer takes routes from router advertisements unless accept_ra is 2 (HS-47).",
	look:    forwarding6,
}, {
	ID: "HS-39", Layer: "host", Title: "a sysctl file sets what the kernel does not have", Severity: Info, Scope: Node,
	Reads:   append([]string{Processes}, sysctlFiles...),
	When:    "a file of sysctl.d(5) sets net.ipv4.tcp_tw_recycle, tcp_fack or tcp_low_latency (removed, or without effect)",
	Effect:  "The line does nothing; what it was to achieve is not there.",
	Source:  "https://git.kernel.org/linus/4396e46187ca (tcp_tw_recycle, 4.12); https://git.kernel.org/linus/713bafea9292 (tcp_fack, 4.15); https://git.kernel.org/linus/b6690b14386698ce2c19309abad3f17656bdfaea (tcp_low_latency, 4.14)",
	Fix:     "remove the line from the file",
	Undo:    "put the line back",
	Pitfall: "A list with tcp_tw_recycle in it is of before 2017: its other lines are as old.",
	look: func(v *view) {
		for _, gone := range []string{"tcp_tw_recycle", "tcp_fack", "tcp_low_latency"} {
			if file, value := v.configured("net.ipv4." + gone); file != "" {
				v.fires(Info, file, "net.ipv4.%s = %s", gone, value)
			}
		}
	},
}, {
	ID: "HS-47", Layer: "routing", Title: "the node is about to lose its IPv6 default route", Severity: Warning, Scope: Node,
	Reads:   []string{forward6, acceptRA, routes6},
	When:    "net.ipv6.conf.all.forwarding is 1, and the default route comes of router advertisements on a device whose accept_ra is 1",
	Effect:  "With forwarding on, 1 takes no more advertisements: the route goes when its lifetime is over, half an hour (what most routers say) after forwarding was switched on.",
	Source:  ipSysctl + " (accept_ra: 2 overrules forwarding)",
	Fix:     "sysctl -w net.ipv6.conf.DEVICE.accept_ra=2, and the same in a file in /etc/sysctl.d",
	Undo:    "sysctl -w net.ipv6.conf.DEVICE.accept_ra=1, and without the file",
	Pitfall: "It works for a while after each start, and breaks later by itself.",
	look:    advertisedRoute,
}, {
	ID: "HS-48", Layer: "host", Title: "NetworkManager may take over Calico's devices", Severity: Warning, Scope: Node,
	Reads:   []string{Processes, Devices, managerFiles},
	When:    "NetworkManager runs, a device is called cali*, and no file of its conf.d leaves such devices alone",
	Effect:  "It changes routes and addresses of devices that are not its own: pods lose their connection when it starts or is told of a change.",
	Source:  "https://docs.tigera.io/calico/latest/operations/troubleshoot/troubleshooting#configure-networkmanager; https://docs.rke2.io/known_issues#networkmanager",
	Fix:     "/etc/NetworkManager/conf.d/calico.conf: [keyfile] unmanaged-devices=interface-name:cali*;interface-name:tunl*;interface-name:vxlan.calico, on two lines; then systemctl reload NetworkManager",
	Undo:    "remove the file and reload",
	Pitfall: "nmcli device shows them as unmanaged until it is restarted with a network of its own to set up.",
	look: func(v *view) {
		all, ok := get(v, Devices, v.devices)
		at := slices.IndexFunc(all, func(d link.Device) bool { return strings.HasPrefix(d.Name, "cali") })
		if !ok || at < 0 || !v.runs("NetworkManager") {
			return
		}
		for _, name := range v.matches(managerFiles) {
			if strings.Contains(v.last[name].is, "cali") {
				v.sees(name, "it names cali")
				return
			}
		}
		v.fires(Warning, managerFiles, "none names cali*, and %s is there", all[at].Name)
	},
}, {
	ID: "CN-10", Layer: "plugin", Title: "a node has no route to another one's pods", Severity: Critical, Scope: Node,
	Reads:   []string{routes4, Nodes, Devices},
	When:    "this node has routes for the podCIDRs of some other nodes, and for one of them none but the default route",
	Effect:  "Pods here do not reach pods there: their packets leave by the default route, or are refused.",
	Source:  flannelTrouble + "; https://kubernetes.io/docs/concepts/cluster-administration/networking/",
	Fix:     "restart the network plug-in's agent on this node, and look into its log",
	Undo:    "nothing has to be taken back",
	Pitfall: "A blackhole route for the range counts as one here, and drops without a counter.",
	look:    missingRoutes,
}, {
	ID: "CN-13", Layer: "plugin", Title: "Services do not work between pods on one bridge", Severity: Critical, Scope: Node,
	Reads:   []string{Devices, bridgeRules, KubeProxyRules},
	When:    "pods are on a bridge, kube-proxy's rules are there, and bridge-nf-call-iptables is 0 or not there",
	Effect:  "The answer of a pod on the same bridge goes back without its address being translated: the client does not know it. Only connections to endpoints on the same node fail.",
	Source:  "https://kubernetes.io/docs/concepts/extend-kubernetes/compute-storage-net/network-plugins/#network-plugin-requirements",
	Fix:     "modprobe br_netfilter, then sysctl -w " + bridgeRules + "=1, and both in /etc/modules-load.d and /etc/sysctl.d",
	Undo:    "sysctl -w " + bridgeRules + "=0, and without the files",
	Pitfall: "Where a Service has endpoints on several nodes, a part of the connections works: it looks like a flaky application.",
	look:    bridgedPods,
}}

func smallPackets(v *view) {
	all, ok := get(v, Devices, v.devices)
	node := v.facts.Spaces[0]
	if !ok || v.Space == node {
		return
	}
	at := slices.IndexFunc(node.devices.is, func(d link.Device) bool { return d.DefaultRoute && overheads[d.Kind] == 0 })
	if at < 0 {
		return // nothing leads away from the node
	}
	takes := node.devices.is[at]
	for _, d := range all {
		if near := node.peerOf(v.Space, d); near != nil && d.Up && float64(d.MTU) < 0.9*float64(takes.MTU-largestOverhead) {
			v.fires(Info, Devices, "%s %d, and %s of the node %d", d.Name, d.MTU, takes.Name, takes.MTU)
		}
	}
}

func forwarding6(v *view) {
	node := v.facts.Spaces[0]
	if v.Space == node {
		if v.there(forward6) {
			v.number(forward6)
		}
		get(v, Devices, v.devices)
		return
	}
	if !v.there(routes6) {
		return // without IPv6
	}
	devices, ok := get(v, Devices, v.devices)
	text, there := v.text(routes6)
	if !ok || !there || strings.TrimSpace(node.last[forward6].is) != "0" {
		return
	}
	for _, name := range defaults6(text, false) {
		at := slices.IndexFunc(devices, func(d link.Device) bool { return d.Name == name })
		if at < 0 {
			continue
		}
		if near := node.peerOf(v.Space, devices[at]); near != nil && near.Master == 0 {
			v.fires(Critical, forward6, "0 on the node, whose %s is the IPv6 default route of this namespace", near.Name)
		}
	}
}

// defaults6 are the devices of default routes in /proc/net/ipv6_route: destination and its
// length first, flags (linux/ipv6_route.h, linux/route.h) and device last.
func defaults6(text string, advertised bool) (devices []string) {
	const up, reject, byAdvertisement = 0x1, 0x200, 0x40000
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 10 || strings.Trim(f[0], "0") != "" || f[1] != "00" {
			continue
		}
		flags, err := strconv.ParseUint(f[8], 16, 32)
		if err == nil && flags&up != 0 && flags&reject == 0 && f[9] != "lo" && (!advertised || flags&byAdvertisement != 0) {
			devices = append(devices, f[9])
		}
	}
	return devices
}

func advertisedRoute(v *view) {
	if !v.there(routes6) {
		return // without IPv6
	}
	forward, ok := v.number(forward6)
	text, there := v.text(routes6)
	if !ok || !there || forward == 0 {
		return
	}
	for _, name := range defaults6(text, true) {
		setting := "net.ipv6.conf." + strings.ReplaceAll(name, ".", "/") + ".accept_ra"
		if strings.TrimSpace(v.last[setting].is) == "1" {
			v.fires(Warning, setting, "1, and %s is 1", forward6)
		}
	}
}

// onLink are the ranges that /proc/net/route (proc_pid_net(5)) reaches without a router,
// and routes all of them but the default one.
func onLink(text string) (onLink, routes []netip.Prefix) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 8 || f[0] == "Iface" {
			continue
		}
		to, err := strconv.ParseUint(f[1], 16, 32)
		mask, err2 := strconv.ParseUint(f[7], 16, 32)
		if err != nil || err2 != nil || mask == 0 {
			continue
		}
		bits := 0
		for m := mask; m != 0; m &= m - 1 {
			bits++
		}
		addr := netip.AddrFrom4([4]byte{byte(to), byte(to >> 8), byte(to >> 16), byte(to >> 24)}) // in the host's order
		p := netip.PrefixFrom(addr, bits)
		routes = append(routes, p)
		if f[2] == "00000000" {
			onLink = append(onLink, p)
		}
	}
	return onLink, routes
}

func needlessTunnel(v *view) {
	nodes, ok := list[node](v, Nodes)
	network, ok2 := v.flannel()
	pools, ok3 := list[calicoPool](v, CalicoPools)
	text, ok4 := v.text(routes4)
	if !ok || !ok2 || !ok3 || !ok4 || len(nodes) < 2 {
		return
	}
	tunnel := ""
	switch {
	case network != nil && network.Backend.Type == "vxlan" && !network.Backend.DirectRouting:
		tunnel = "flannel's vxlan"
	case v.cilium("routing-mode") == "tunnel":
		tunnel = "Cilium's tunnel"
	}
	for _, p := range pools {
		if p.wraps("VXLAN") && p.Spec.VXLANMode == "Always" || p.wraps("IPIP") && p.Spec.IPIPMode == "Always" {
			tunnel = "Calico's pool " + p.Metadata.Name
		}
	}
	near, _ := onLink(text)
	for _, n := range nodes {
		for _, a := range n.internal() {
			if a.Is4() && !slices.ContainsFunc(near, func(p netip.Prefix) bool { return p.Contains(a) }) {
				return
			}
		}
	}
	if tunnel != "" {
		v.fires(Info, routes4, "%s, and all %d nodes are in ranges without a router", tunnel, len(nodes))
	}
}

func missingRoutes(v *view) {
	nodes, ok := list[node](v, Nodes)
	text, ok2 := v.text(routes4)
	devices, ok3 := get(v, Devices, v.devices)
	if !ok || !ok2 || !ok3 {
		return
	}
	_, routes := onLink(text)
	var with, without []string
	for _, n := range nodes {
		own := slices.ContainsFunc(n.internal(), func(a netip.Addr) bool {
			return slices.ContainsFunc(devices, func(d link.Device) bool { return slices.Contains(d.Addresses, a) })
		})
		for _, r := range n.podRanges() {
			switch {
			case own || !r.Addr().Is4():
			case slices.Contains(routes, r):
				with = append(with, n.Metadata.Name)
			case !slices.ContainsFunc(routes, func(p netip.Prefix) bool { return p.Bits() <= r.Bits() && p.Contains(r.Addr()) }):
				without = append(without, fmt.Sprintf("%s of node %s", r, n.Metadata.Name))
			}
		}
	}
	if len(with) == 0 {
		return // the network plug-in does not route by these ranges
	}
	for _, lost := range without {
		v.fires(Critical, routes4, "no route for %s", lost)
	}
	v.sees(routes4, "routes to the pods of %d nodes", len(with))
}

func bridgedPods(v *view) {
	all, ok := get(v, Devices, v.devices)
	found, there := get(v, KubeProxyRules, v.facts.kubeProxy)
	if !ok || !there || len(found.Parts) == 0 {
		return
	}
	bridged := slices.IndexFunc(all, func(d link.Device) bool {
		return d.Kind == "veth" && d.PeerElsewhere && slices.ContainsFunc(all, func(m link.Device) bool { return m.Index == d.Master && m.Kind == "bridge" })
	})
	if bridged < 0 {
		return
	}
	if !v.there(bridgeRules) {
		v.fires(Critical, bridgeRules, "it is not there (br_netfilter is not loaded), and %s is on a bridge", all[bridged].Name)
		return
	}
	if n, ok := v.number(bridgeRules); ok && n == 0 {
		v.fires(Critical, bridgeRules, "0, and %s is on a bridge", all[bridged].Name)
	}
}
