// Package kubeproxy finds what a kube-proxy has left in the kernel of a node, and
// removes it, when somebody else has taken its place.
//
// It removes, in one network namespace and in one transaction: the tables
// `ip kube-proxy` and `ip6 kube-proxy` (mode nftables), and in the tables of
// iptables-nft kube-proxy's chains and the rules that lead there (mode iptables).
// The kubelet's chains (KUBE-FIREWALL, KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT),
// those of network plug-ins, and every table and built-in chain of iptables stay. What
// it finds but cannot remove, rules of iptables-legacy and of IPVS, it names.
//
// Connections that kube-proxy's rules have translated go on: while there are any, a
// table `inet millrace-hold` keeps the kernel's translation where it is.
//
// Costs: it reads all rules of nftables, 0.3 seconds for 20,000, and, where
// there is something to remove, the table of tracked connections, two microseconds
// an entry. Nothing of it runs by itself.
package kubeproxy

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/nft"
)

// table is kube-proxy's own in mode nftables.
const table = "kube-proxy"

// entries are the chains to which kube-proxy jumps from iptables' built-in chains;
// pkg/proxy/iptables/proxier.go and pkg/proxy/ipvs/proxier.go of Kubernetes.
var entries = []string{
	"KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-FORWARD", "KUBE-PROXY-FIREWALL",
	"KUBE-SOURCE-RANGES-FIREWALL", "KUBE-NODE-PORT", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER",
}

// chains are the others of fixed names, and prefixes those of Services and endpoints.
var (
	chains   = []string{"KUBE-MARK-MASQ", "KUBE-LOAD-BALANCER", "KUBE-PROXY-CANARY"}
	prefixes = []string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"}
)

var names = nft.Names{
	Tables:  func(name string) bool { return name == table },
	Entries: func(chain string) bool { return slices.Contains(entries, chain) },
	Chains: func(chain string) bool {
		return slices.Contains(entries, chain) || slices.Contains(chains, chain) ||
			slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(chain, p) })
	},
}

// Found is what there is of a kube-proxy.
type Found struct {
	// Parts can be removed.
	Parts []nft.Part
	// Kept are chains that somebody else's rules use.
	Kept []nft.Part
	// Left is what has to be removed otherwise, with how.
	Left []string
	// Connections are those whose destination is translated, by kube-proxy's rules or
	// by others'.
	Connections int
	// Held says that they are kept translated since an earlier call.
	Held bool
	// Process is a kube-proxy that runs in this network namespace; 0 for none.
	Process int
}

// Find looks in the namespace bound to path; the empty path is that of the calling
// thread. It needs CAP_NET_ADMIN.
func Find(path string) (found Found, err error) {
	rules := nft.In(path)
	if found.Parts, found.Kept, err = rules.Find(names); err != nil {
		return found, err
	}
	if found.Held, err = rules.Held(); err != nil {
		return found, err
	}
	if found.Left, err = left(path, rules); err != nil {
		return found, err
	}
	if len(found.Parts) > 0 || found.Held {
		if found.Connections, err = rules.Translated(); err != nil {
			return found, err
		}
	}
	found.Process, err = Running(path)
	return found, err
}

// left is what this package does not remove.
func left(path string, rules *nft.Net) (left []string, err error) {
	legacy, err := rules.LegacyHolds("KUBE-SERVICES")
	if err != nil {
		return nil, err
	}
	if len(legacy) > 0 {
		left = append(left, fmt.Sprintf("chains of iptables-legacy in %s: run `kube-proxy --cleanup` of its own version, or restart the node",
			strings.Join(legacy, ", ")))
	}
	devices, err := link.Open(path)
	if err != nil {
		return nil, err
	}
	defer devices.Close()
	all, err := devices.Devices()
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(all, func(d link.Device) bool { return d.Name == "kube-ipvs0" }) {
		left = append(left, "mode IPVS (device kube-ipvs0, virtual servers, ipsets KUBE-*): run `kube-proxy --cleanup` of its own version, or restart the node")
	}
	return left, nil
}

// Running is the number of a kube-proxy in the namespace bound to path (empty: that
// of the calling thread), which would write its rules again; 0 where there is none.
func Running(path string) (int, error) {
	if path == "" {
		path = "/proc/thread-self/ns/net"
	}
	var home unix.Stat_t
	if err := unix.Stat(path, &home); err != nil {
		return 0, fmt.Errorf("look for kube-proxy: namespace %s: %w", path, err)
	}
	processes, err := netns.Processes()
	if err != nil {
		return 0, fmt.Errorf("look for kube-proxy: %w", err)
	}
	for _, folder := range processes {
		command, err := os.ReadFile(filepath.Join(folder, "comm"))
		if err != nil || strings.TrimSpace(string(command)) != "kube-proxy" {
			continue // it has ended
		}
		var its unix.Stat_t
		if unix.Stat(filepath.Join(folder, "ns/net"), &its) == nil && its.Dev == home.Dev && its.Ino == home.Ino {
			var process int
			_, err := fmt.Sscan(filepath.Base(folder), &process)
			return process, err
		}
	}
	return 0, nil
}

// Remove removes what Find has found in the same namespace. Connections that are
// translated stay so; it returns how many there are. Once there are none, which
// calling it again finds out, nothing of it is left.
func Remove(path string, found Found) (connections int, err error) {
	rules := nft.In(path)
	if len(found.Parts) == 0 && !found.Held {
		return 0, nil
	}
	if len(found.Parts) > 0 {
		if err := rules.Take(found.Parts, true); err != nil {
			return 0, err
		}
	}
	// Counted when no rule begins new ones any more.
	if connections, err = rules.Translated(); err != nil || connections > 0 {
		return connections, err
	}
	return 0, rules.Release()
}
