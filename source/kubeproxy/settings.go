package kubeproxy

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/millrace/millrace/model"
)

// The ports of a kube-proxy, where its configuration names no others.
const (
	HealthzPort = 10256
	MetricsPort = 10249
)

// Settings are what a configuration asks for.
type Settings struct {
	// NodeName is empty where it is not overridden.
	NodeName string
	// NodeIP is the node's primary address; not valid where it is not overridden.
	NodeIP netip.Addr
	// Mode is iptables, ipvs or nftables; iptables where none is named.
	Mode string
	// NodePortAddresses are the ranges of those addresses of the node that serve
	// NodePorts. A family without a range has all of them.
	NodePortAddresses []netip.Prefix
	// NodePortPrimary says that only the node's primary addresses do.
	NodePortPrimary bool
	// ClusterCIDRs are the ranges of the cluster's pods, at most one of each family.
	ClusterCIDRs []netip.Prefix
	DetectLocal  DetectLocal
	// MasqueradeAll says that whatever goes to a ClusterIP is masqueraded.
	MasqueradeAll bool
	// Healthz and Metrics are where these are served.
	Healthz, Metrics netip.AddrPort
	// Conntrack is what is asked of the node's connection tracking; kube-proxy's
	// defaults where a configuration says nothing of it, nothing where there is none.
	Conntrack model.Conntrack
	// HardFail says that a port that is taken ends the program.
	HardFail bool

	// Notes name each field that is set and has no effect here, and say why.
	Notes []string
	// Problems are fields that cannot be understood; they count as not set.
	Problems []model.Problem

	// masqueradeRules and masqueradeSets are masqueradeAll of the modes iptables and
	// ipvs, and of nftables.
	masqueradeRules, masqueradeSets bool
}

// DetectLocal says by what a packet of a pod of this node is known.
type DetectLocal struct {
	// Mode is ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix.
	Mode string
	// Bridge and DevicePrefix are for the last two.
	Bridge, DevicePrefix string
}

// usualConntrack are the defaults of the API; pkg/proxy/apis/config/v1alpha1/defaults.go
// of Kubernetes.
var usualConntrack = model.Conntrack{MaxPerCore: 32 << 10, Min: 128 << 10, TCPEstablished: 24 * time.Hour, TCPCloseWait: time.Hour}

// Default is for who has no configuration: a kube-proxy's ports and ranges, and
// nothing that is set in the node.
func Default() Settings {
	s := Settings{}
	s.complete()
	return s
}

// NodePortRanges hold the addresses of the node that serve NodePorts; nil is all.
// The primary addresses are among them as far as the configuration names them.
func (s Settings) NodePortRanges() []netip.Prefix {
	if s.NodePortPrimary && s.NodeIP.IsValid() {
		return []netip.Prefix{netip.PrefixFrom(s.NodeIP, s.NodeIP.BitLen())}
	}
	if len(s.NodePortAddresses) == 0 {
		return nil
	}
	ranges := slices.Clone(s.NodePortAddresses)
	for _, all := range []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)} {
		ofFamily := func(r netip.Prefix) bool { return r.Addr().Is4() == all.Addr().Is4() }
		if !slices.ContainsFunc(s.NodePortAddresses, ofFamily) {
			ranges = append(ranges, all)
		}
	}
	return ranges
}

// PodRanges are the ranges of the cluster's pods; nil where the configuration does
// not say that clients are told apart by them.
func (s Settings) PodRanges() []netip.Prefix {
	if s.DetectLocal.Mode != "ClusterCIDR" {
		return nil
	}
	return s.ClusterCIDRs
}

// complete fills in what follows from other fields.
func (s *Settings) complete() {
	if s.Mode == "" {
		s.Mode = "iptables"
	}
	if s.Mode == "nftables" && len(s.NodePortAddresses) == 0 {
		s.NodePortPrimary = true
	}
	s.MasqueradeAll = s.masqueradeRules
	if s.Mode == "nftables" {
		s.MasqueradeAll = s.masqueradeSets
	}
	if s.DetectLocal.Mode == "" {
		s.DetectLocal.Mode = "ClusterCIDR"
	}
	all, own := netip.IPv4Unspecified(), netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if s.NodeIP.Is6() {
		all, own = netip.IPv6Unspecified(), netip.IPv6Loopback()
	}
	if !s.Healthz.IsValid() {
		s.Healthz = netip.AddrPortFrom(all, HealthzPort)
	}
	if !s.Metrics.IsValid() {
		s.Metrics = netip.AddrPortFrom(own, MetricsPort)
	}
	if s.NodeIP.IsUnspecified() {
		s.NodeIP = netip.Addr{}
	}
}

func setNodeName(s *Settings, v value) error {
	s.NodeName = strings.ToLower(strings.TrimSpace(v.text))
	return nil
}

func setNodeIP(s *Settings, v value) (err error) {
	if s.NodeIP, err = netip.ParseAddr(v.text); err != nil {
		return fmt.Errorf("%q is no IP address", v.text)
	}
	return nil
}

func setHealthz(s *Settings, v value) (err error) {
	s.Healthz, err = bindAddress(v.text, HealthzPort)
	return err
}

func setMetrics(s *Settings, v value) (err error) {
	s.Metrics, err = bindAddress(v.text, MetricsPort)
	return err
}

// bindAddress reads an address that may lack its port.
func bindAddress(text string, port uint16) (netip.AddrPort, error) {
	host, number, err := net.SplitHostPort(text)
	if err != nil {
		host, number = strings.Trim(text, "[]"), strconv.Itoa(int(port))
	}
	address, errAddress := netip.ParseAddr(host)
	n, errPort := strconv.ParseUint(number, 10, 16)
	if errAddress != nil || errPort != nil || n == 0 {
		return netip.AddrPort{}, fmt.Errorf("%q is no address with a port: write one such as 0.0.0.0:%d or [::]:%d", text, port, port)
	}
	return netip.AddrPortFrom(address, uint16(n)), nil
}

func setHardFail(s *Settings, v value) error { s.HardFail = v.text == "true"; return nil }

// count sets a number of connections.
func count(of func(*Settings) *int64) func(*Settings, value) error {
	return func(s *Settings, v value) error {
		n, err := strconv.ParseInt(v.text, 0, 32)
		if err != nil || n < 0 {
			return fmt.Errorf("%s is no number of connections: write a whole number from 0 on", clip(v.text))
		}
		*of(s) = n
		return nil
	}
}

// timeout sets a time of connection tracking, which knows whole seconds.
func timeout(of func(*Settings) *time.Duration) func(*Settings, value) error {
	return func(s *Settings, v value) error {
		d, err := time.ParseDuration(v.text)
		if err != nil || d < 0 || d > 0 && d < time.Second {
			return fmt.Errorf("%s cannot be a timeout of connection tracking: write 1s or more, or 0s to leave it as it is", v.text)
		}
		*of(s) = d
		return nil
	}
}

func setMode(s *Settings, v value) error {
	if !slices.Contains([]string{"iptables", "ipvs", "nftables"}, v.text) {
		return fmt.Errorf("%q is no mode on Linux: kube-proxy has iptables, ipvs and nftables", v.text)
	}
	s.Mode = v.text
	return nil
}

func setLocalMode(s *Settings, v value) error {
	modes := []string{"ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"}
	if !slices.Contains(modes, v.text) {
		return fmt.Errorf("%q is none of %s", v.text, strings.Join(modes, ", "))
	}
	s.DetectLocal.Mode = v.text
	return nil
}

func setClusterCIDR(s *Settings, v value) (err error) {
	var ranges []netip.Prefix
	for text := range strings.SplitSeq(v.text, ",") {
		one, err := parseRange(text)
		if err != nil {
			return err
		}
		ranges = append(ranges, one)
	}
	if len(ranges) > 2 || len(ranges) == 2 && ranges[0].Addr().Is4() == ranges[1].Addr().Is4() {
		return fmt.Errorf("%q: write one range, or one of each family", v.text)
	}
	s.ClusterCIDRs = ranges
	return nil
}

// setNodePortAddresses takes what it can. Where nothing can be taken it takes the
// primary addresses, because somebody meant to have fewer than all.
func setNodePortAddresses(s *Settings, v value) error {
	var bad error
	for _, text := range v.list {
		if text == "primary" {
			s.NodePortPrimary = true
			if len(v.list) > 1 {
				bad = fmt.Errorf("primary and ranges cannot be combined, so it is primary alone")
			}
			continue
		}
		one, err := parseRange(text)
		if err != nil {
			bad = err
			continue
		}
		s.NodePortAddresses = append(s.NodePortAddresses, one)
	}
	if bad != nil && len(s.NodePortAddresses) == 0 {
		s.NodePortPrimary = true
	}
	if s.NodePortPrimary {
		s.NodePortAddresses = nil
	}
	return bad
}

func parseRange(text string) (netip.Prefix, error) {
	one, err := netip.ParsePrefix(strings.TrimSpace(text))
	if err != nil {
		return one, fmt.Errorf("%q is no range of addresses: write one such as 10.0.0.0/8 or fd00::/64", text)
	}
	return one.Masked(), nil
}
