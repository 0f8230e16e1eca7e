package doctor

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/millrace/millrace/kernel/proc"
)

const (
	udp4 = "/proc/net/udp"
	udp6 = "/proc/net/udp6"

	mostNameservers = 3  // MAXNS of resolv.h; MaxDNSNameservers of Kubernetes
	mostSearches    = 32 // MaxDNSSearchPaths of Kubernetes
	longestSearch   = 2048
)

var dnsChecks = []Check{{
	ID: "DN-06", Layer: "dns", Title: "a pod asks a name server that is not there for it", Severity: Critical, Scope: Everywhere,
	Reads:   []string{Resolver, udp4, udp6},
	When:    "resolv.conf of a namespace other than the node's names a loopback address, and nothing has UDP port 53 in that namespace",
	Effect:  "127.0.0.53 is the node's own resolver; in the pod's namespace nobody answers there, so that no name resolves. Of CoreDNS, which forwards to what resolv.conf names, it makes a loop or an answer of SERVFAIL.",
	Source:  "https://kubernetes.io/docs/tasks/administer-cluster/dns-debugging-resolution/#known-issues; https://coredns.io/plugins/loop/",
	Fix:     "resolvConf: /run/systemd/resolve/resolv.conf in the kubelet's configuration; restart the kubelet, then make the pod anew",
	Undo:    "put the kubelet's resolvConf back and restart it",
	Pitfall: "Pods with dnsPolicy: Default inherit the node's file; those with ClusterFirst do not, and CoreDNS is of the former.",
	look:    unansweredResolver,
}, {
	ID: "DN-08", Layer: "dns", Title: "resolv.conf has more than resolvers read", Severity: Warning, Scope: Everywhere,
	Reads:   []string{Resolver},
	When:    fmt.Sprintf("more than %d name servers, more than %d search domains, or a search list of more than %d characters", mostNameservers, mostSearches, longestSearch),
	Effect:  "The C library reads the first 3 name servers and passes over the rest; Kubernetes cuts search lists that are longer.",
	Source:  "https://man7.org/linux/man-pages/man5/resolv.conf.5.html (MAXNS); https://kubernetes.io/docs/concepts/services-networking/dns-pod-service/",
	Fix:     "shorten the list, on the node or in the pod's dnsConfig",
	Undo:    "put the entries back",
	Pitfall: "Which entries are passed over is decided without a message.",
	look:    longResolver,
}, {
	ID: "DN-10", Layer: "dns", Title: "DNS queries are lost at the server's socket", Severity: Warning, Scope: Everywhere,
	Reads:   []string{udp4, udp6},
	When:    "the drops of a UDP socket on port 53 grow",
	Effect:  "The server does not read as fast as it is asked, and its buffer is full: each query that is lost is a wait of 5 s for its client.",
	Source:  "udp4_format_sock (drops) of https://github.com/torvalds/linux/blob/master/net/ipv4/udp.c; https://man7.org/linux/man-pages/man5/resolv.conf.5.html (timeout)",
	Fix:     "give the server more processor time (a CPU limit that throttles it is the usual cause: nr_throttled in its cgroup's cpu.stat), or more replicas",
	Undo:    "put the limit or the number of replicas back",
	Pitfall: "A larger buffer makes the wait longer before it makes the loss less.",
	look: func(v *view) {
		v.sockets(func(s proc.Socket, grown uint64) {
			if s.Local.Port() == 53 && grown > 0 {
				v.fires(Warning, udp4, "%s: %s", s.Local, v.inWindow(grown))
			}
		})
	},
}}

// sockets calls f with each UDP socket, and by how much its drops grew.
func (v *view) sockets(f func(s proc.Socket, grown uint64)) (ok bool) {
	for _, read := range []string{udp4, udp6} {
		if read == udp6 && !v.there(udp6) {
			continue // without IPv6
		}
		text, there := v.text(read)
		if !there {
			return false
		}
		before := map[uint64]uint64{}
		err := proc.Sockets(v.first[read].is, func(s proc.Socket) { before[s.Inode] = s.Drops })
		if err == nil {
			err = proc.Sockets(text, func(s proc.Socket) {
				if was, known := before[s.Inode]; known {
					f(s, s.Drops-min(was, s.Drops))
				} else {
					f(s, 0) // it is younger than the window
				}
			})
		}
		if err != nil {
			v.lacks(read, "%s", reason(err))
			return false
		}
	}
	return true
}

func (v *view) resolvConf() (servers, searches []string, ok bool) {
	text, ok := get(v, Resolver, v.resolver)
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		switch {
		case len(fields) < 2:
		case fields[0] == "nameserver":
			servers = append(servers, fields[1])
		case fields[0] == "search":
			searches = fields[1:] // the last one counts
		}
	}
	return servers, searches, ok
}

func unansweredResolver(v *view) {
	if v.Space == v.facts.Spaces[0] || len(v.processes) == 0 {
		return // of a namespace without processes nobody asks
	}
	servers, _, ok := v.resolvConf()
	if !ok {
		return
	}
	var lost []string
	for _, server := range servers {
		if addr, err := netip.ParseAddr(server); err == nil && addr.Unmap().IsLoopback() {
			lost = append(lost, server)
		}
	}
	answered := false
	ok = v.sockets(func(s proc.Socket, _ uint64) { answered = answered || s.Local.Port() == 53 })
	if ok && len(lost) > 0 && !answered {
		v.fires(Critical, Resolver, "nameserver %s, and no socket on UDP port 53", strings.Join(lost, ", "))
	}
}

func longResolver(v *view) {
	if len(v.processes) == 0 {
		return
	}
	servers, searches, ok := v.resolvConf()
	if !ok {
		return
	}
	if len(servers) > mostNameservers {
		v.fires(Warning, Resolver, "%d name servers: the last %d are passed over", len(servers), len(servers)-mostNameservers)
	}
	if n := len(strings.Join(searches, " ")); len(searches) > mostSearches || n > longestSearch {
		v.fires(Warning, Resolver, "%d search domains in %d characters", len(searches), n)
	}
}
