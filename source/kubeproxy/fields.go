package kubeproxy

import "time"

// Why whole groups of fields are not needed.
const (
	noRules  = "there are no rules to write anew: a change costs what changed, at once, and the kernel is read again once a minute"
	noMark   = "no packet mark is used: what is masqueraded is decided where it is rewritten"
	noIPVS   = "there is no IPVS table"
	ownFlows = "millrace's flows are in a table of its own (`--flows`), with times of their own (docs/service.md)"
	// What is honoured by setting it in the node; docs/tune.md.
	tracking     = "`net.netfilter.nf_conntrack_"
	atLeastMax   = "1,048,576 at most, and `nf_conntrack_buckets` at least a quarter of it; neither is ever lowered, and 0 leaves both alone ([tune](tune.md))"
	wholeSeconds = "whole seconds, 0 leaves it alone"

	noClient   = "`--source kube:PATH` and `--api-server` say how to reach the API server"
	noKlog     = "the log goes to stderr, as text or with `-o json` as JSON; there are no levels"
	masquerade = "what goes to a ClusterIP is masqueraded if it comes from outside the cluster's pods and nodes; this setting has no effect yet"
	ranges     = "pods of this node are known by their devices, and everybody else comes from outside"
)

// Fields are all fields of the API, in its order. One that has others below it
// stands for them.
var Fields = []Field{
	{Path: "featureGates", Fate: Unneeded, shape: anything, Text: "they are kube-proxy's; millrace has none"},

	{Path: "clientConnection.kubeconfig", Fate: Unneeded, Text: noClient},
	{Path: "clientConnection.acceptContentTypes", Fate: Unneeded, Text: "protobuf, JSON where a server has none"},
	{Path: "clientConnection.contentType", Fate: Unneeded, Text: "protobuf; nothing is sent", usual: []string{"application/vnd.kubernetes.protobuf"}},
	{Path: "clientConnection.qps", Fate: Unneeded, shape: number, Text: "at most four requests are under way at a time", usual: []string{"5"}},
	{Path: "clientConnection.burst", Fate: Unneeded, shape: number, Text: "at most four requests are under way at a time", usual: []string{"10"}},

	{Path: "logging.format", Fate: Unneeded, Text: noKlog, usual: []string{"text"}},
	{Path: "logging.flushFrequency", Fate: Unneeded, shape: anything, Text: "nothing is held back", usual: []string{"5s", "5000000000"}},
	{Path: "logging.verbosity", Fate: Unneeded, shape: number, Text: noKlog},
	{Path: "logging.vmodule", Fate: Unneeded, shape: anything, Text: noKlog},
	{Path: "logging.options", Fate: Unneeded, shape: anything, Text: noKlog, usual: []string{emptyOptions}},

	{Path: "hostnameOverride", Fate: Honoured, set: setNodeName, Text: "the node's name, where `--node` does not say another"},
	{Path: "bindAddress", Fate: Honoured, set: setNodeIP, Text: "the node's primary address of its family, and the family of the two addresses below where they are not set; nothing is bound to it, as with kube-proxy"},
	{Path: "healthzBindAddress", Fate: Honoured, set: setHealthz, Text: "`/healthz` and `/livez`; 0.0.0.0:10256 where it is not set"},
	{Path: "metricsBindAddress", Fate: Honoured, set: setMetrics, Text: "`/metrics`, `/proxyMode` and `/healthz`; 127.0.0.1:10249 where it is not set"},
	{Path: "bindAddressHardFail", Fate: Honoured, shape: flag, set: setHardFail, Text: "the agent ends if one of the two is taken; otherwise it says so and tries again"},
	{Path: "enableProfiling", Fate: Unneeded, shape: flag, Text: "there is no profile to read from outside; `perf` on the node has the program's symbols"},
	{Path: "showHiddenMetricsForVersion", Fate: Unneeded, Text: "no metric is hidden"},

	{Path: "mode", Fate: Honoured, set: setMode, Text: "all modes are served by the same programs, and `/proxyMode` says millrace; nftables sets `nodePortAddresses` to primary where they are empty, as with kube-proxy"},

	{Path: "iptables.masqueradeBit", Fate: Unneeded, shape: number, Text: noMark, usual: []string{"14"}},
	{Path: "iptables.masqueradeAll", Fate: Later, shape: flag, set: func(s *Settings, v value) error { s.masqueradeRules = v.text == "true"; return nil }, Text: masquerade},
	{Path: "iptables.localhostNodePorts", Fate: Later, shape: flag, Text: "NodePorts are served at 127.0.0.1, without route_localnet; `nodePortAddresses` can leave it out", usual: []string{"true"}},
	{Path: "iptables.syncPeriod", Fate: Unneeded, shape: duration, Text: noRules, usual: []string{"30s"}},
	{Path: "iptables.minSyncPeriod", Fate: Unneeded, shape: duration, Text: noRules, usual: []string{"1s"}},

	{Path: "ipvs.syncPeriod", Fate: Unneeded, shape: duration, Text: noRules, usual: []string{"30s"}},
	{Path: "ipvs.minSyncPeriod", Fate: Unneeded, shape: duration, Text: noRules},
	{Path: "ipvs.scheduler", Fate: Later, Text: "schedulers come later; until then each new flow goes to an endpoint by chance, all alike"},
	{Path: "ipvs.excludeCIDRs", Fate: Unneeded, shape: list, Text: noIPVS + ": that of others is not touched"},
	{Path: "ipvs.strictARP", Fate: Unneeded, shape: flag, Text: "no address of a Service is on any device, so the node answers no ARP for one"},
	{Path: "ipvs.tcpTimeout", Fate: Unneeded, shape: duration, Text: noIPVS + ": " + ownFlows},
	{Path: "ipvs.tcpFinTimeout", Fate: Unneeded, shape: duration, Text: noIPVS + ": " + ownFlows},
	{Path: "ipvs.udpTimeout", Fate: Unneeded, shape: duration, Text: noIPVS + ": " + ownFlows},

	{Path: "nftables.masqueradeBit", Fate: Unneeded, shape: number, Text: noMark, usual: []string{"14"}},
	{Path: "nftables.masqueradeAll", Fate: Later, shape: flag, set: func(s *Settings, v value) error { s.masqueradeSets = v.text == "true"; return nil }, Text: masquerade},
	{Path: "nftables.syncPeriod", Fate: Unneeded, shape: duration, Text: noRules, usual: []string{"30s"}},
	{Path: "nftables.minSyncPeriod", Fate: Unneeded, shape: duration, Text: noRules, usual: []string{"1s"}},

	{Path: "winkernel", Fate: Unneeded, shape: anything, Text: "Windows only", usual: []string{emptyWindows}},

	{Path: "detectLocalMode", Fate: Unneeded, set: setLocalMode, Text: ranges, usual: []string{"ClusterCIDR"}},
	{Path: "detectLocal.bridgeInterface", Fate: Unneeded, set: func(s *Settings, v value) error { s.DetectLocal.Bridge = v.text; return nil }, Text: ranges},
	{Path: "detectLocal.interfaceNamePrefix", Fate: Unneeded, set: func(s *Settings, v value) error { s.DetectLocal.DevicePrefix = v.text; return nil }, Text: ranges},
	{Path: "clusterCIDR", Fate: Honoured, set: setClusterCIDR, Text: "the ranges of the cluster's pods, if detectLocalMode is empty or ClusterCIDR; where it is empty, those of the Node objects"},

	{Path: "nodePortAddresses", Fate: Honoured, shape: list, set: setNodePortAddresses, Text: "the node addresses that serve NodePorts and answer healthCheckNodePort: ranges, `primary`, or all; primary is `bindAddress`, else the first address of each family of the Node object"},
	{Path: "oomScoreAdj", Fate: Unneeded, shape: number, Text: "an agent that is killed loses no packet and takes over what is in force when it starts again", usual: []string{"-999"}},

	{Path: "conntrack.maxPerCore", Fate: Honoured, shape: number, set: count(func(s *Settings) *int64 { return &s.Conntrack.MaxPerCore }), Text: tracking + "max` is at least this times the number of processors, " + atLeastMax},
	{Path: "conntrack.min", Fate: Honoured, shape: number, set: count(func(s *Settings) *int64 { return &s.Conntrack.Min }), Text: tracking + "max` is at least this, if maxPerCore is not 0, as with kube-proxy"},
	{Path: "conntrack.tcpEstablishedTimeout", Fate: Honoured, shape: duration, set: timeout(func(s *Settings) *time.Duration { return &s.Conntrack.TCPEstablished }), Text: tracking + "tcp_timeout_established`; " + wholeSeconds},
	{Path: "conntrack.tcpCloseWaitTimeout", Fate: Honoured, shape: duration, set: timeout(func(s *Settings) *time.Duration { return &s.Conntrack.TCPCloseWait }), Text: tracking + "tcp_timeout_close_wait`; " + wholeSeconds},
	{Path: "conntrack.tcpBeLiberal", Fate: Honoured, shape: flag, set: func(s *Settings, v value) error { s.Conntrack.TCPBeLiberal = v.text == "true"; return nil }, Text: tracking + "tcp_be_liberal` is 1; false leaves it alone. What a Service's flow needs is not judged by it"},
	{Path: "conntrack.udpTimeout", Fate: Honoured, shape: duration, set: timeout(func(s *Settings) *time.Duration { return &s.Conntrack.UDP }), Text: tracking + "udp_timeout`; " + wholeSeconds},
	{Path: "conntrack.udpStreamTimeout", Fate: Honoured, shape: duration, set: timeout(func(s *Settings) *time.Duration { return &s.Conntrack.UDPStream }), Text: tracking + "udp_timeout_stream`; " + wholeSeconds},
	{Path: "configSyncPeriod", Fate: Unneeded, shape: duration, Text: "changes are watched; lists are compared when a watch begins anew", usual: []string{"15m"}},
	{Path: "portRange", Fate: Unneeded, Text: "kube-proxy does not use it either"},
	{Path: "windowsRunAsService", Fate: Unneeded, shape: flag, Text: "Windows only"},
}

// What kubeadm writes for structures in which nothing is set.
const (
	emptyOptions = `{"json":{"infoBufferSize":"0"},"text":{"infoBufferSize":"0"}}`
	emptyWindows = `{"enableDSR":false,"forwardHealthCheckVip":false,"networkName":"","rootHnsEndpointName":"","sourceVip":""}`
)
