package kubeproxy

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/model"
)

func read(t *testing.T, text string) Settings {
	t.Helper()
	s, err := Read("config.conf", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

// What kubeadm puts into the ConfigMap of a new cluster asks for nothing special,
// and only what names a file is worth a line.
func TestConfigurationOfKubeadm(t *testing.T) {
	data, err := os.ReadFile("testdata/kubeadm.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s := read(t, string(data))
	if len(s.Problems) > 0 {
		t.Errorf("problems: %v", s.Problems)
	}
	for _, note := range s.Notes {
		if !strings.HasPrefix(note, "clientConnection.kubeconfig: /var/lib/kube-proxy/kubeconfig.conf: not needed: ") {
			t.Errorf("note: %s", note)
		}
	}
	if len(s.Notes) != 1 {
		t.Errorf("%d notes", len(s.Notes))
	}
	want := "10.244.0.0/16 fd00:10:244::/56"
	if got := s.ClusterCIDRs[0].String() + " " + s.ClusterCIDRs[1].String(); got != want {
		t.Errorf("cluster ranges %s, want %s", got, want)
	}
	if s.Healthz.String() != "0.0.0.0:10256" || s.Metrics.String() != "127.0.0.1:10249" || s.NodeIP.IsValid() ||
		s.NodePortPrimary || s.NodePortAddresses != nil || s.Mode != "iptables" || s.DetectLocal.Mode != "ClusterCIDR" {
		t.Errorf("%+v", s)
	}
}

func TestFieldsThatCount(t *testing.T) {
	s := read(t, head+`
hostnameOverride: Worker-1
bindAddress: fd00::7
metricsBindAddress: "[::]"
bindAddressHardFail: true
mode: nftables
nftables: {masqueradeAll: true}
iptables: {masqueradeAll: false}
nodePortAddresses: [192.0.2.9/24, "fd00::/64"]
detectLocalMode: BridgeInterface
detectLocal: {bridgeInterface: cni0}
`)
	if s.NodeName != "worker-1" || s.NodeIP != netip.MustParseAddr("fd00::7") || s.Healthz.String() != "[::]:10256" ||
		s.Metrics.String() != "[::]:10249" || !s.HardFail || !s.MasqueradeAll || s.DetectLocal != (DetectLocal{Mode: "BridgeInterface", Bridge: "cni0"}) {
		t.Errorf("%+v", s)
	}
	if want := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("fd00::/64")}; !slices.Equal(s.NodePortAddresses, want) || s.NodePortPrimary {
		t.Errorf("NodePorts at %v, primary %v", s.NodePortAddresses, s.NodePortPrimary)
	}
	if got := fmt.Sprint(s.NodePortRanges(), s.PodRanges()); got != "[192.0.2.0/24 fd00::/64] []" {
		t.Errorf("ranges of NodePorts and of pods: %s", got)
	}
	s = read(t, head+"nodePortAddresses: [192.0.2.0/24]\nclusterCIDR: 10.0.0.0/8")
	if got := fmt.Sprint(s.NodePortRanges(), s.PodRanges()); got != "[192.0.2.0/24 ::/0] [10.0.0.0/8]" {
		t.Errorf("a family without a range has all addresses: %s", got)
	}
	for addresses, want := range map[string]string{"": "[] 0", "bindAddress: 0.0.0.0": "[] 0", "bindAddress: 192.0.2.7": "[192.0.2.7/32] 0"} {
		s := read(t, head+"nodePortAddresses: [primary]\n"+addresses)
		if got := fmt.Sprint(s.NodePortRanges(), len(s.Notes)); got != want {
			t.Errorf("primary, %s: ranges and notes %s, want %s", addresses, got, want)
		}
	}
	if s := read(t, head+"iptables: {localhostNodePorts: false}"); len(s.Notes) != 1 {
		t.Errorf("localhostNodePorts false, the default is true: %v", s.Notes)
	}
	if s := read(t, head+"mode: nftables"); !s.NodePortPrimary {
		t.Error("mode nftables has NodePorts at the primary addresses where nothing else is said")
	}
	if s := read(t, head+"mode: ipvs"); s.NodePortPrimary || s.NodePortAddresses != nil {
		t.Error("mode ipvs has NodePorts at all addresses where nothing else is said")
	}
}

// What is not said of connection tracking is kube-proxy's default, 0 is its word for
// leaving something alone, and without a configuration nothing is asked for.
func TestConntrack(t *testing.T) {
	if got := Default().Conntrack; got != (model.Conntrack{}) {
		t.Errorf("without a configuration: %+v", got)
	}
	usual := model.Conntrack{MaxPerCore: 32768, Min: 131072, TCPEstablished: 24 * time.Hour, TCPCloseWait: time.Hour}
	for yaml, want := range map[string]model.Conntrack{
		"": usual,
		"conntrack: {maxPerCore: null, min: null, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null, tcpBeLiberal: false, udpTimeout: 0s}": usual,
		"conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}":                                                {},
		"conntrack: {maxPerCore: 65536, min: 1, tcpEstablishedTimeout: 2h, tcpCloseWaitTimeout: 1m30s, tcpBeLiberal: true, udpTimeout: 30s, udpStreamTimeout: 3m}": {
			MaxPerCore: 65536, Min: 1, TCPEstablished: 2 * time.Hour, TCPCloseWait: 90 * time.Second, TCPBeLiberal: true, UDP: 30 * time.Second, UDPStream: 3 * time.Minute},
		"conntrack: {tcpCloseWaitTimeout: -1h}": usual, // what cannot be understood counts as not set
	} {
		s := read(t, head+yaml)
		if s.Conntrack != want || len(s.Notes) > 0 {
			t.Errorf("%q: %+v, notes %q; want %+v", yaml, s.Conntrack, s.Notes, want)
		}
	}
}

// A user of IPVS learns what becomes of each thing that was set.
func TestNotesSayWhatTakesItsPlace(t *testing.T) {
	s := read(t, head+`
mode: ipvs
featureGates: {TopologyAwareHints: true}
ipvs: {scheduler: lc, strictARP: true, tcpTimeout: 900s, udpTimeout: 0s, excludeCIDRs: [10.0.0.0/24], syncPeriod: 30000ms}
conntrack: {maxPerCore: 65536}
`)
	want := []string{
		"featureGates: {\"TopologyAwareHints\":true}: not needed: they are kube-proxy's",
		"ipvs.scheduler: lc: later: schedulers come later",
		"ipvs.strictARP: true: not needed: no address of a Service is on any device",
		"ipvs.tcpTimeout: 900s: not needed: there is no IPVS table",
		"ipvs.excludeCIDRs: 10.0.0.0/24: not needed: there is no IPVS table",
	}
	if len(s.Notes) != len(want) || len(s.Problems) > 0 {
		t.Errorf("%d notes, want %d: %s; problems %v", len(s.Notes), len(want), strings.Join(s.Notes, "\n"), s.Problems)
	}
	for i := range min(len(want), len(s.Notes)) {
		if !strings.HasPrefix(s.Notes[i], want[i]) {
			t.Errorf("note %q, want %q...", s.Notes[i], want[i])
		}
	}
}

// What cannot be understood is named with its line, and the rest is used.
func TestWhatIsWrongIsNamed(t *testing.T) {
	for yaml, want := range map[string]string{
		"mod: ipvs":                                "config.conf:3: KubeProxyConfiguration: mod: a KubeProxyConfiguration has no such field",
		"ipvs:\n  sceduler: rr":                    "config.conf:4: KubeProxyConfiguration: ipvs.sceduler: a KubeProxyConfiguration has no such field",
		"mode: kernelspace":                        `config.conf:3: KubeProxyConfiguration: mode: "kernelspace" is no mode on Linux`,
		"mode: 3":                                  "config.conf:3: KubeProxyConfiguration: mode: write text, in quotes",
		"mode: ipvs\nmode: iptables":               "config.conf:4: KubeProxyConfiguration: mode: the field is here twice and the first one counts",
		"bindAddressHardFail: \"true\"":            "bindAddressHardFail: write true or false without quotes",
		"ipvs: {syncPeriod: 30}":                   `ipvs.syncPeriod: "30" is no time`,
		"ipvs: [rr]":                               "ipvs: write fields below it",
		"conntrack: {min: many}":                   "conntrack.min: write a number",
		"conntrack: {min: 1.5}":                    "conntrack.min: 1.5 is no number of connections",
		"conntrack: {maxPerCore: -1}":              "conntrack.maxPerCore: -1 is no number of connections",
		"conntrack: {maxPerCore: 5000000000}":      "conntrack.maxPerCore: 5000000000 is no number of connections",
		"conntrack: {udpTimeout: -30s}":            "conntrack.udpTimeout: -30s cannot be a timeout",
		"conntrack: {udpStreamTimeout: 500ms}":     "conntrack.udpStreamTimeout: 500ms cannot be a timeout",
		"bindAddress: node-1":                      `bindAddress: "node-1" is no IP address`,
		"healthzBindAddress: 0.0.0.0:http":         `healthzBindAddress: "0.0.0.0:http" is no address with a port: write one such as 0.0.0.0:10256`,
		"clusterCIDR: 10.0.0.0":                    `clusterCIDR: "10.0.0.0" is no range of addresses`,
		"clusterCIDR: 10.0.0.0/8,11.0.0.0/8":       "clusterCIDR: \"10.0.0.0/8,11.0.0.0/8\": write one range, or one of each family",
		"detectLocalMode: Bridge":                  `detectLocalMode: "Bridge" is none of ClusterCIDR`,
		"nodePortAddresses: primary":               "nodePortAddresses: write a list",
		"nodePortAddresses: [primary, \"::/0\"]":   "nodePortAddresses: primary and ranges cannot be combined",
		"nodePortAddresses: [10.0.0.1, \"::1/x\"]": `nodePortAddresses: "::1/x" is no range`,
	} {
		s := read(t, head+yaml+"\nhostnameOverride: n1\n")
		if len(s.Problems) != 1 || !strings.Contains(s.Problems[0].Error(), want) {
			t.Errorf("%q: %v, want %s", yaml, s.Problems, want)
		}
		if s.NodeName != "n1" {
			t.Errorf("%q: the rest is not used", yaml)
		}
	}
}

// Somebody who wrote ranges wanted fewer addresses than all.
func TestBadNodePortAddressesOpenNothing(t *testing.T) {
	if s := read(t, head+"nodePortAddresses: [10.0.0.300/8]"); !s.NodePortPrimary {
		t.Error("NodePorts are at all addresses")
	}
	if s := read(t, head+"nodePortAddresses: [10.0.0.300/8, 192.0.2.0/24]"); s.NodePortPrimary || len(s.NodePortAddresses) != 1 {
		t.Errorf("primary %v, %v; want what is right of it", s.NodePortPrimary, s.NodePortAddresses)
	}
}

// kubeadm's own configuration file holds documents of other kinds too.
func TestTheRightDocumentIsFound(t *testing.T) {
	if s := read(t, "kind: ClusterConfiguration\nnetworking: {}\n---\n"+head+"mode: ipvs\n---\nkind: KubeletConfiguration\n"); s.Mode != "ipvs" {
		t.Errorf("mode %q", s.Mode)
	}
	for text, want := range map[string]string{
		"":                           "read config.conf: there is no document of kind KubeProxyConfiguration in it",
		"kind: KubeletConfiguration": "only [KubeletConfiguration]",
		"kind: [":                    "read config.conf: line ",
		"- 1":                        "there is no document of kind",
		"kind: KubeProxyConfiguration\napiVersion: v1": `its apiVersion is "v1": write kubeproxy.config.k8s.io/v1alpha1`,
		strings.Repeat("# long\n", most/7+1):           "is this the right file?",
	} {
		if _, err := Read("config.conf", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %s", text, err, want)
		}
	}
}

func FuzzRead(f *testing.F) {
	data, err := os.ReadFile("testdata/kubeadm.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(data))
	f.Add(head + "ipvs: &a {scheduler: *a}\nwinkernel: &b [*b]")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Read("config.conf", []byte(text))
		if err == nil && (!s.Healthz.IsValid() || !s.Metrics.IsValid() || s.Mode == "") {
			t.Errorf("%+v", s)
		}
	})
}
