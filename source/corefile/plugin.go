package corefile

import (
	"fmt"
	"slices"
	"strings"
)

// places are where plugins are asked, of those that may answer or alter an answer
// (core/dnsserver/zdirectives.go of CoreDNS 1.14). One that is not here is new, or none
// of CoreDNS' own, and may be anywhere.
var places = map[string]int{
	"local": 1, "dns64": 2, "acl": 3, "tsig": 4, "rewrite": 5, "header": 6, "dnssec": 7, "autopath": 8, "template": 9,
	"hosts": 10, "route53": 11, "azure": 12, "clouddns": 13, "k8s_external": 14,
	"kubernetes": 15,
	"file":       16, "auto": 17, "secondary": 18, "etcd": 19,
	"forward": 20,
	"grpc":    21, "erratic": 22, "whoami": 23, "on": 24, "sign": 25, "view": 26, "nomad": 27,
}

// harmless plugins leave answers about addresses as they are, but for their order, and for
// how long they may be kept.
var harmless = []string{
	"root", "metadata", "geoip", "cancel", "tls", "proxyproto", "quic", "grpc_server", "https", "https3", "timeouts",
	"multisocket", "reload", "nsid", "bufsize", "debug", "trace", "ready", "health", "pprof", "prometheus", "errors", "log",
	"dnstap", "any", "chaos", "loadbalance", "cache", "minimal", "transfer", "loop",
}

// before says whether a plugin is asked before another one, or may be.
func before(d *directive, other string) bool {
	if slices.Contains(harmless, d.name) {
		return false
	}
	place, known := places[d.name]
	return !known || place < places[other]
}

// concern is a zone in which something is answered otherwise, and why.
type concern struct {
	zone, why string
	// ends are what names end in that are meant, which need be no zone; "" for zone.
	ends string
}

// touches says whether names in a zone are meant.
func (c concern) touches(zone string) bool {
	if c.ends == "" {
		return related(c.zone, zone)
	}
	return strings.HasSuffix(zone, c.ends) || strings.HasSuffix(c.ends, zone)
}

// concerns are the zones for which a plugin may answer, or alter what others do. Zones are
// those of its server block, for which it is where it names none.
func concerns(d *directive, zones []string) (all []concern) {
	why := fmt.Sprintf("%v: %s may answer in another way", d.at, clip(d.name))
	var named []string
	switch d.name {
	case "rewrite":
		return []concern{rewritten(d, why)}
	case "hosts":
		return hostsConcerns(d, zones, why)
	case "kubernetes":
		why, named = fmt.Sprintf("%v: kubernetes answers", d.at), d.args
	case "acl", "dnssec", "auto", "secondary", "etcd", "k8s_external":
		named = d.args
	case "file":
		named = d.args[min(1, len(d.args)):]
	case "template":
		named = d.args[min(2, len(d.args)):]
	}
	return inZones(named, zones, why)
}

// inZones are concerns for zones, or where none are named for those of the server block.
func inZones(named, zones []string, why string) (all []concern) {
	if len(named) == 0 {
		named = zones
	}
	for _, text := range named {
		zone, ok := zoneOrRange(text)
		if !ok {
			zone = "."
		}
		all = append(all, concern{zone: zone, why: why})
	}
	return all
}

// hostsConcerns are the zones that are left because of hosts: those in which it asks nobody
// for what is not in its table, or all if the table is not known. The names of addresses are
// in it wherever its zones are.
func hostsConcerns(d *directive, zones []string, why string) []concern {
	named := d.args[min(1, len(d.args)):]
	if d.table == nil {
		why += ": " + d.untabled
		return append(inZones(named, zones, why), concern{zone: reverseZones[0], why: why}, concern{zone: reverseZones[1], why: why})
	}
	return slices.DeleteFunc(inZones(named, zones, why+": it has no fallthrough"), func(c concern) bool { return d.table.fallsThrough(c.zone) })
}

// rewritten is what a rule of rewrite is for: `rewrite name [exact] FROM TO` or
// `rewrite name suffix FROM TO`, after stop or continue. Any other may be for all.
func rewritten(d *directive, why string) concern {
	rule := d.args
	if len(rule) > 0 && (rule[0] == "stop" || rule[0] == "continue") {
		rule = rule[1:]
	}
	if len(d.body) > 0 || len(rule) < 3 || rule[0] != "name" {
		return concern{zone: ".", why: why}
	}
	kind, from := rule[1], rule[2]
	if len(rule) == 3 {
		kind, from = "exact", rule[1]
	}
	name, ok := zoneOf(strings.TrimPrefix(from, "."))
	switch {
	case !ok || kind == "exact" && strings.HasPrefix(from, "."):
		return concern{zone: ".", why: why}
	case kind == "exact":
		return concern{zone: name, why: why}
	case kind != "suffix":
		return concern{zone: ".", why: why}
	case strings.HasPrefix(from, "."):
		return concern{zone: name, why: why, ends: "." + name}
	}
	// A suffix need not begin with a label.
	_, parent, below := strings.Cut(name, ".")
	if !below {
		parent = "."
	}
	return concern{zone: parent, why: why, ends: name}
}
