package model

import (
	"net/netip"
	"slices"
	"strings"
	"time"
)

// DNS is how the cluster's DNS servers are configured.
type DNS struct {
	// Left is why the servers are to answer for the cluster's zone whole; empty where
	// they answer as Kubernetes says, and so others may in their place.
	Left string
	// Zone is the cluster's zone, in lower case, without a final dot; empty where it is
	// not known.
	Zone string
	// Reverse says that the servers answer for the addresses of Services and endpoints, in
	// in-addr.arpa and ip6.arpa.
	Reverse bool
	// TTL is that of the records of the cluster's zone, in whole seconds.
	TTL time.Duration
	// Forwards are whom they ask for what is not the cluster's, the longest zone first.
	Forwards []Forward
	// Hosts are names that they have in a table of their own, wherever these are: they are to be
	// asked for them. They are in lower case, without a final dot, and sorted; "*" for a first
	// label is any, and alone it is any name of one label.
	Hosts []string
	// HostAddresses are those of that table, sorted: the servers are to be asked for the names
	// of these, too.
	HostAddresses []netip.Addr
}

// HasHost says whether a name, in lower case and without a final dot, is in the servers' table.
func (d *DNS) HasHost(name string) bool {
	if d == nil || len(d.Hosts) == 0 {
		return false
	}
	if _, there := slices.BinarySearch(d.Hosts, name); there {
		return true
	}
	_, parent, below := strings.Cut(name, ".")
	if below {
		parent = "." + parent
	}
	_, there := slices.BinarySearch(d.Hosts, "*"+parent)
	return there
}

// HasHostAddress says whether an address is in the servers' table.
func (d *DNS) HasHostAddress(addr netip.Addr) bool {
	if d == nil {
		return false
	}
	_, there := slices.BinarySearchFunc(d.HostAddresses, addr, netip.Addr.Compare)
	return there
}

// Forward is a zone, and whom the cluster's DNS servers ask for the names in it.
type Forward struct {
	// Zone is in lower case, without a final dot; "." is the root, and so the rest.
	Zone string
	// To are the servers, any of which may be asked.
	To []Upstream
	// Left is why the cluster's DNS servers are to be asked for the zone, and not To.
	Left string
}

// Upstream is a DNS server outside the cluster.
type Upstream struct {
	// Address is where it is; the zero value with File.
	Address netip.AddrPort
	// File is "/etc/resolv.conf" for those that this file of the node names; else empty.
	File string
	// ServerName is the name that its certificate has to have, for DNS over TLS (RFC
	// 7858); empty for plain DNS.
	ServerName string
	// TCP says that it is to be asked over TCP alone.
	TCP bool
}

// HasAllNames says that a Service which is not in the Snapshot does not exist, or is one
// of Strangers.
func (s *Snapshot) HasAllNames() bool { return s.Complete && s.Unread == 0 && s.Named }

// Strangers are Services that have names and are not in the Snapshot, or not whole: those
// of other proxies, and those that cannot be used as they are.
func (s *Snapshot) Strangers() []Name {
	all := slices.Clone(s.Others)
	for _, problem := range s.Problems {
		object, ok := strings.CutPrefix(problem.Object, "Service ")
		namespace, name, named := strings.Cut(object, "/")
		if ok && named {
			all = append(all, Name{Namespace: namespace, Name: name})
		}
	}
	return all
}

// Label is what an endpoint is called below its Service: its host name, or its address
// with "-" for "." and ":", which ends in no "-": fd00--0 for fd00::.
func (e Endpoint) Label() string {
	if e.Hostname != "" {
		return e.Hostname
	}
	label := strings.NewReplacer(".", "-", ":", "-").Replace(e.Address.String())
	if strings.HasSuffix(label, "-") {
		label += "0"
	}
	return label
}

// HasEndpoint says whether anybody is behind a port, be it one that is about to end.
func (p ServicePort) HasEndpoint() bool {
	return slices.ContainsFunc(p.Backends, func(b Backend) bool { return b.Ready || b.Serving })
}
