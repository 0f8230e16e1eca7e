package doctor

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/millrace/millrace/kernel/link"
)

// alike are settings that no node has to have otherwise than its neighbours: none of them
// is computed from the memory or the processors of its machine, as nf_conntrack_max,
// tcp_mem and tcp_max_syn_backlog are.
var alike = []string{
	osRelease, somaxconn, backlog, congestion, "net.core.default_qdisc", receiveMax, "net.core.wmem_max", jitHarden,
	ipForward, forward6, "net.ipv6.conf.all.disable_ipv6", "net.ipv4.conf.all.rp_filter", "net.ipv4.conf.default.rp_filter",
	localPorts, reservedPorts, twReuse, "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_mtu_probing",
	"net.ipv4.tcp_retries2", "net.ipv4.tcp_sack", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_timestamps", "net.ipv4.tcp_window_scaling",
	neighbours[0].limit, neighbours[1].limit, bridgeRules, tcpTracked, closeWait, udpStream,
	"net.netfilter.nf_conntrack_tcp_be_liberal",
}

const (
	uplinkMTU = "MTU of the default route's device"
	deviceMTU = "MTU of "
)

var amongChecks = []Check{{
	ID: "CN-25", Layer: "plugin", Title: "nodes differ in what they should have in common", Severity: Warning, Scope: Among,
	Reads:   append([]string{Devices}, alike...),
	When:    "the MTU of a tunnel or bridge of the same name is not that of most nodes (warning); or the MTU of the default route's device, the kernel, or a setting of the network that does not depend on a machine's size (information); with --nodes",
	Effect:  "What a pod can do depends on where it was scheduled: it works on one node and not on another. Packets that fit where they start are too long where they arrive.",
	Source:  "https://kubernetes.io/docs/tasks/administer-cluster/sysctl-cluster/ (nodes with special settings: taint them); https://docs.tigera.io/calico/latest/networking/configuring/mtu",
	Fix:     "give all nodes of a kind the same image, the same files in /etc/sysctl.d and the same configuration of the network plug-in; what shall differ belongs on tainted nodes",
	Undo:    "put the values back",
	Pitfall: "Most is not right: look at which of the values was meant. Nodes of several kinds, with another kernel or network card, differ with reason.",
	look:    func(v *view) { v.lacks(string(Among), "it compares nodes: say --nodes all --source kube:KUBECONFIG") },
}}

// Comparing is the check that Compare makes a result of. Its facts have to be read for
// Alike.
func Comparing() Check { return amongChecks[0] }

// Alike is what this node should have in common with the others of its cluster, by where
// it was read; what it does not have is left out.
func (f *Facts) Alike() map[string]string {
	values := map[string]string{}
	if len(f.Spaces) == 0 {
		return values
	}
	node := f.Spaces[0]
	for _, name := range alike {
		if read, there := node.last[name]; there && read.err == nil {
			values[name] = harmless(strings.Join(strings.Fields(read.is), " "))
		}
	}
	for _, d := range node.devices.is {
		switch {
		case d.DefaultRoute && overheads[d.Kind] == 0:
			least(values, uplinkMTU, d)
		case d.Up && (d.Kind == "bridge" || overheads[d.Kind] > 0):
			least(values, deviceMTU+harmless(d.Name), d)
		}
	}
	return values
}

// least keeps the lowest MTU: there may be several default routes.
func least(values map[string]string, name string, d link.Device) {
	before := 0
	if _, err := fmt.Sscan(values[name], &before); err != nil || d.MTU < before {
		values[name] = fmt.Sprint(d.MTU)
	}
}

// Compare says in what nodes differ from most of them. The values are those of Alike, by
// the nodes' names. It is pure.
func Compare(nodes map[string]map[string]string) Result {
	check := Comparing()
	r := Result{Check: &check, Fix: check.Fix, Undo: check.Undo}
	names := slices.Sorted(maps.Keys(nodes))
	if len(names) < 2 {
		r.Evidence = []Evidence{{Scope: string(Among), Read: "nodes", Value: "fewer than two nodes answered", Unread: true}}
		r.judge()
		return r
	}
	reads := map[string]bool{}
	for _, values := range nodes {
		for read := range values {
			reads[read] = true
		}
	}
	for _, read := range slices.Sorted(maps.Keys(reads)) {
		r.Evidence = append(r.Evidence, differing(read, names, nodes)...)
	}
	r.judge()
	if r.Status == OK {
		text := fmt.Sprintf("the same on %d nodes, of those that have them", len(nodes))
		r.Evidence = []Evidence{{Scope: string(Among), Read: fmt.Sprintf("%d values", len(reads)), Value: text}}
	}
	return r
}

// differing is the evidence of those that have another value than most; of equally many,
// the first of the nodes is right.
func differing(read string, names []string, nodes map[string]map[string]string) (all []Evidence) {
	count, have := map[string]int{}, 0
	var values []string
	for _, name := range names {
		value, there := nodes[name][read]
		if !there {
			continue
		}
		have++
		if count[value]++; count[value] == 1 {
			values = append(values, value)
		}
	}
	slices.SortStableFunc(values, func(a, b string) int { return cmp.Compare(count[b], count[a]) })
	severity := Info
	if strings.HasPrefix(read, deviceMTU) && read != uplinkMTU {
		severity = Warning
	}
	for _, name := range names {
		if value, there := nodes[name][read]; there && value != values[0] {
			text := fmt.Sprintf("%s; %d of %d nodes have %s", orNothing(value), count[values[0]], have, orNothing(values[0]))
			all = append(all, Evidence{Node: name, Scope: string(Node), Read: read, Value: text, Severity: severity})
		}
	}
	return all
}

func orNothing(value string) string { return cmp.Or(value, "nothing") }

// Join makes one result of those that a check came to on several nodes, of which there is
// at least one, and whose evidence names them. What nodes say where all is well is left
// out where something is not. Where each has a fix of its own, all are told with their
// nodes, or if they are many the check's own. It is pure.
func Join(of []Result) Result {
	r := Result{Check: of[0].Check}
	var found, unread, seen []Evidence
	var fixes, undos told
	for _, one := range of {
		for _, e := range one.Evidence {
			switch {
			case e.Severity != "":
				found = append(found, e)
			case e.Unread:
				unread = append(unread, e)
			default:
				seen = append(seen, e)
			}
		}
		if one.Status == Warn || one.Status == Fail {
			fixes.add(one.Fix, one.Evidence[0].Node)
			undos.add(one.Undo, one.Evidence[0].Node)
		}
	}
	r.Fix, r.Undo = fixes.or(r.Check.Fix), undos.or(r.Check.Undo)
	r.Evidence = slices.Concat(found, unread)
	r.judge()
	if r.Status == OK || r.Status == Skip {
		r.Evidence = append(r.Evidence, seen...)
	}
	return r
}

// told are texts and the nodes that say them.
type told []struct {
	text  string
	nodes []string
}

func (t *told) add(text, node string) {
	for i := range *t {
		if one := &(*t)[i]; one.text == text {
			one.nodes = append(one.nodes, node)
			return
		}
	}
	*t = append(*t, struct {
		text  string
		nodes []string
	}{text, []string{node}})
}

// mostTold is how many different texts are told: as many nodes may have as many.
const mostTold = 3

func (t told) or(own string) string {
	switch {
	case len(t) == 1:
		return t[0].text
	case len(t) == 0 || len(t) > mostTold:
		return own
	}
	var all []string
	for _, one := range t {
		all = append(all, fmt.Sprintf("on %s: %s", some(one.nodes), one.text))
	}
	return strings.Join(all, "; ")
}
