package doctor

import (
	"net/netip"
	"testing"

	"github.com/millrace/millrace/kernel/kubeproxy"
	"github.com/millrace/millrace/kernel/link"
)

// settingsFire are the stories of settings, and of what depends on them.
var settingsFire = []story{
	{"CT-06", "late packets", grows("nf_conntrack.invalid", 4), Warn, "pod web-1 | nf_conntrack.invalid | 4"},
	{"CT-09", "the kernel's default", all(sets("node "+closeWait, "60"), func(w *world) { w.kubeProxy = kubeproxy.Found{Process: 30} }), Warn, "60, and kube-proxy is process 30"},
	{"CT-15", "ten minutes", sets(tcpTracked, "600"), Warn, "pod web-1 | " + tcpTracked + " | 600"},
	{"CT-16", "half a minute", sets(udpStream, "30"), Warn, udpStream + " | 30"},
	{"HS-11", "a server of QUIC", sets(udp4, udpSocket(443, 0)), Warn, "212992, and a UDP socket on port 443"},
	{"HS-12", "an old list", sets(tcpReceive, "4096 87380 16777216"), Warn, "tcp_rmem | 4096 87380 16777216"},
	{"HS-12", "a low limit", sets("node "+tcpReceive, "4096 131072 1048576"), Warn, "node | " + tcpReceive},
	{"HS-15", "another discipline", func(w *world) { w.node.devices[0].Index, w.node.kind = 3, "pfifo_fast" }, Warn, "eth0 has pfifo_fast"},
	{"HS-23", "a full ring", sets("node later:"+ringFile, "19"), Warn, "12 in"},
	{"HS-32", "firewalld", func(w *world) { w.files["proc/1/comm"] = "firewalld" }, Warn, "firewalld, process 1"},
	{"HS-38", "off", sets("node "+forward6, "0"), Fail, "pod web-1 | net.ipv6.conf.all.forwarding | 0 on the node, whose veth1"},
	{"HS-39", "recycling", sets("node /etc/sysctl.d/99-tune.conf", "net.ipv4.tcp_tw_recycle = 1\n"), Warn, "/etc/sysctl.d/99-tune.conf | net.ipv4.tcp_tw_recycle = 1"},
	{"HS-40", "off", sets("net.ipv4.tcp_timestamps", "0"), Warn, "tcp_timestamps | 0"},
	{"HS-41", "off", sets("net.ipv4.tcp_sack", "0"), Warn, "tcp_sack | 0"},
	{"HS-42", "off", sets("net.ipv4.tcp_window_scaling", "0"), Warn, "tcp_window_scaling | 0"},
	{"HS-43", "ten", sets("net.ipv4.tcp_fin_timeout", "10"), Warn, "tcp_fin_timeout | 10"},
	{"HS-44", "three", sets("net.ipv4.tcp_retries2", "3"), Warn, "tcp_retries2 | 3"},
	{"HS-45", "off", sets("net.ipv4.tcp_syncookies", "0"), Warn, "tcp_syncookies | 0"},
	{"HS-46", "always", sets("net.ipv4.tcp_mtu_probing", "2"), Warn, "tcp_mtu_probing | 2"},
	{"HS-47", "of advertisements", sets("node "+routes6, default6("eth0", 0x40001)), Warn, "net.ipv6.conf.eth0.accept_ra | 1, and"},
	{"HS-48", "all devices", func(w *world) {
		w.files["proc/1/comm"], w.node.devices[1].Name = "NetworkManager", "cali12345"
		w.node.files["/etc/NetworkManager/conf.d/10-dns.conf"] = "[main]\ndns=none\n"
	}, Warn, "none names cali*, and cali12345 is there"},
	{"MT-02", "jumbo frames", func(w *world) { w.node.devices[0].MTU = 9000 }, Warn, "eth0 1450, and eth0 of the node 9000"},
	{"MT-07", "neighbours", in("DirectRouting\": true", "DirectRouting\": false"), Warn, "flannel's vxlan, and all 2 nodes"},
	{"MT-07", "Cilium", in("enable-ipv4-masquerade: \"true\"", "routing-mode: tunnel"), Warn, "Cilium's tunnel"},
	{"MT-14", "narrow", func(w *world) { w.pod.devices[0].MTU = 1200 }, Warn, "pod web-1 | rtnetlink devices | eth0 1200"},
	{"PX-06", "an old kernel", all(sets("node "+reuseMode, "1"), sets("node "+osRelease, "5.4.0-100"), ipvs), Warn, "1, on Linux 5.4.0-100"},
	{"PX-09", "both", func(w *world) {
		w.kubeProxy = kubeProxyRules
		w.kubeProxy.Left = []string{"chains of iptables-legacy in nat: run `kube-proxy --cleanup`"}
	}, Warn, "2 chains or tables in nf_tables, and chains of iptables-legacy in nat"},
	{"CN-10", "one is missing", func(w *world) {
		w.node.files[routes4] = routeTitle + route4("vxlan0", "0001F40A", "0001F40A", "00FFFFFF")
		w.objects += "---\n" + `{apiVersion: v1, kind: Node, metadata: {name: n3}, spec: {podCIDR: 10.244.2.0/24}}` + "\n"
	}, Fail, "no route for 10.244.2.0/24 of node n3"},
	{"CN-13", "not loaded", all(bridged, func(w *world) { w.kubeProxy = kubeProxyRules }), Fail, "br_netfilter is not loaded"},
	{"CN-13", "off", all(bridged, sets("node "+bridgeRules, "0"), func(w *world) { w.kubeProxy = kubeProxyRules }), Fail, "0, and veth1 is on a bridge"},
}

func ipvs(w *world) { w.node.devices = append(w.node.devices, link.Device{Name: "kube-ipvs0"}) }

func bridged(w *world) {
	w.node.devices[1].Master = 5
	w.node.devices = append(w.node.devices, link.Device{Index: 5, Name: "cni0", Kind: "bridge"})
}

// settingsCalm look like faults and are none.
var settingsCalm = []story{
	{id: "CT-09", what: "no kube-proxy", change: sets("node "+closeWait, "60")},
	{id: "CT-15", what: "at the threshold", change: sets(tcpTracked, "7440")},
	{id: "CT-16", what: "at the threshold", change: sets(udpStream, "120")},
	{id: "HS-11", what: "enough", change: all(sets(udp4, udpSocket(443, 0)), sets(receiveMax, "7500000"))},
	{id: "HS-11", what: "another port", change: sets(udp4, udpSocket(4433, 0))},
	{id: "HS-15", what: "cubic", change: all(sets("node "+congestion, "cubic"), func(w *world) { w.node.devices[0].Index, w.node.kind = 3, "pfifo_fast" })},
	{id: "HS-15", what: "a queue for each processor", change: func(w *world) { w.node.devices[0].Index, w.node.kind = 3, "mq" }},
	{id: "HS-32", what: "no node", change: func(w *world) { w.files["proc/1/comm"], w.files["proc/30/comm"] = "firewalld", "bash" }},
	{id: "HS-38", what: "a pod without IPv6", change: all(sets("node "+forward6, "0"), sets(routes6, ""))},
	{id: "HS-38", what: "an unreachable route", change: all(sets("node "+forward6, "0"), sets(routes6, default6("lo", 0x201)))},
	{id: "HS-38", what: "a pod on a bridge", change: all(sets("node "+forward6, "0"), func(w *world) { w.node.devices[1].Master = 5 })},
	{id: "HS-39", what: "a comment", change: sets("node /etc/sysctl.d/99-tune.conf", "# net.ipv4.tcp_tw_recycle = 1\n")},
	{id: "HS-43", what: "the default", change: sets("net.ipv4.tcp_fin_timeout", "60")},
	{id: "HS-46", what: "after a black hole", change: sets("net.ipv4.tcp_mtu_probing", "1")},
	{id: "HS-47", what: "2 overrules", change: all(sets("node "+routes6, default6("eth0", 0x40001)), sets("node net.ipv6.conf.eth0.accept_ra", "2"))},
	{id: "HS-47", what: "no forwarding", change: all(sets("node "+routes6, default6("eth0", 0x40001)), sets("node "+forward6, "0"))},
	{id: "HS-48", what: "left alone", change: func(w *world) {
		w.files["proc/1/comm"], w.node.devices[1].Name = "NetworkManager", "cali12345"
		w.node.files["/etc/NetworkManager/conf.d/calico.conf"] = "[keyfile]\nunmanaged-devices=interface-name:cali*\n"
	}},
	{id: "MT-02", what: "room for a tunnel", change: func(w *world) { w.node.devices[0].MTU = 1500 }},
	{id: "MT-07", what: "a router between", change: all(in("DirectRouting\": true", "DirectRouting\": false"), in("address: 192.0.2.2", "address: 198.51.100.2"))},
	{id: "MT-14", what: "without IPv6", change: all(sets("net.ipv6.conf.default.disable_ipv6", "1"), func(w *world) { w.pod.devices[0].MTU = 1200 })},
	{id: "PX-06", what: "no IPVS", change: all(sets("node "+reuseMode, "1"), sets("node "+osRelease, "5.4.0"))},
	{id: "PX-06", what: "mended", change: all(sets("node "+reuseMode, "1"), ipvs)},
	{id: "PX-09", what: "one kind", change: func(w *world) { w.kubeProxy = kubeProxyRules }},
	{id: "CN-10", what: "not routed by ranges", change: sets("node "+routes4, routeTitle)},
	{id: "CN-13", what: "on", change: all(bridged, sets("node "+bridgeRules, "1"), func(w *world) { w.kubeProxy = kubeProxyRules })},
	{id: "CN-13", what: "no kube-proxy", change: bridged},
}

func TestOnLink(t *testing.T) {
	near, all := onLink(routeTitle + route4("eth0", "00000000", "FE0200C0", "00000000") + route4("eth0", "000200C0", "00000000", "00FFFFFF") + route4("eth0", "0001F40A", "020200C0", "00FFFFFF"))
	link, routed := netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("10.244.1.0/24")
	if len(near) != 1 || near[0] != link || len(all) != 2 || all[1] != routed {
		t.Errorf("%v, %v", near, all)
	}
}
