package trace

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unique"

	"github.com/millrace/millrace/kernel/proc"
	"github.com/millrace/millrace/layer/trace/cause"
)

// ours is a file of /proc/net in the calling thread's namespace.
func ours(name string) string {
	text, _ := os.ReadFile("/proc/thread-self/net/" + name)
	return string(text) // without the file there is nothing to be told
}

// counters reads those of the protocols, and how many packets wait for their parts.
func counters() (all map[string]uint64, fragments uint64) {
	all = map[string]uint64{}
	note := func(name string, n uint64) { all[unique.Make(name).Value()] = n } // the names of all namespaces are the same
	for _, file := range []string{"snmp", "netstat"} {
		proc.Counters(ours(file), note)
	}
	for line := range strings.Lines(ours("snmp6")) {
		if fields := strings.Fields(line); len(fields) == 2 {
			if n, err := strconv.ParseUint(fields[1], 10, 64); err == nil {
				note(fields[0], n)
			}
		}
	}
	four, _ := proc.Sockstat(ours("sockstat"), "FRAG.inuse")
	six, _ := proc.Sockstat(ours("sockstat6"), "FRAG6.inuse")
	return all, four + six
}

// tracking reads connection tracking; the numbers are zero where there is none.
func tracking() cause.Conntrack {
	text := ours("stat/nf_conntrack")
	if text == "" {
		return cause.Conntrack{}
	}
	column := func(name string) uint64 {
		n, _ := proc.PerCPU(text, name)
		return n
	}
	return cause.Conntrack{
		Count: number("netfilter/nf_conntrack_count"), Max: number("netfilter/nf_conntrack_max"),
		Drop: column("drop"), InsertFailed: column("insert_failed"), EarlyDrop: column("early_drop"), Invalid: column("invalid"),
	}
}

// number is a setting below /proc/sys/net that is one, else 0.
func number(name string) uint64 {
	text, _ := os.ReadFile("/proc/sys/net/" + name)
	n, _ := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	return n
}

// wantedSettings are those that a cause may lie in, and those of each device.
var (
	wantedSettings = []string{
		"core/somaxconn", "core/netdev_max_backlog", "core/rmem_max", "core/rmem_default",
		"ipv4/ip_forward", "ipv4/ip_local_port_range", "ipv4/ip_local_reserved_ports", "ipv4/tcp_syncookies",
		"ipv4/tcp_max_syn_backlog", "ipv4/tcp_abort_on_overflow", "ipv4/icmp_ratelimit", "ipv4/icmp_echo_ignore_all",
		"ipv6/icmp/echo_ignore_all", "ipv4/ip_no_pmtu_disc", "ipv4/tcp_mtu_probing", "ipv4/ipfrag_time", "ipv4/ipfrag_high_thresh",
		"ipv6/ip6frag_time", "ipv4/tcp_fin_timeout", "ipv4/tcp_tw_reuse",
		"netfilter/nf_conntrack_max", "netfilter/nf_conntrack_tcp_be_liberal", "netfilter/nf_conntrack_tcp_loose",
		"netfilter/nf_conntrack_tcp_timeout_established",
		"netfilter/nf_conntrack_checksum", "bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables",
	}
	ofDevices = []string{"ipv4/conf/*/rp_filter", "ipv4/conf/*/forwarding", "ipv4/conf/*/accept_local", "ipv4/conf/*/arp_ignore",
		"ipv4/conf/*/route_localnet", "ipv6/conf/*/forwarding", "ipv6/conf/*/disable_ipv6"}
)

// settings reads them, by their names with dots: "net.ipv4.conf.eth0.rp_filter".
func settings(links []cause.Link) map[string]string {
	all := map[string]string{}
	read := func(name, key string) {
		if text, err := os.ReadFile(filepath.Join("/proc/sys/net", name)); err == nil {
			all["net."+strings.ReplaceAll(key, "/", ".")] = strings.Join(strings.Fields(string(text)), " ")
		}
	}
	for _, name := range wantedSettings {
		read(name, name)
	}
	for _, pattern := range ofDevices {
		for _, device := range []string{"all", "default"} {
			name := strings.ReplaceAll(pattern, "*", device)
			read(name, name)
		}
		for _, l := range links {
			name := strings.ReplaceAll(pattern, "*", l.Name)
			read(name, name)
		}
	}
	return all
}
