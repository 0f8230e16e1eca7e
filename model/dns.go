package model

import (
	"net/netip"
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
