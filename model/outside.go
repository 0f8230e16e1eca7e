package model

import (
	"net/netip"
	"time"
)

// Outside is a name that is not one of the cluster's, and what is known of it: both
// families together, so that they are of one moment.
type Outside struct {
	// Name is in lower case, without a final dot.
	Name    string
	A, AAAA Known
}

// KnownState is what is known of one family of a name.
type KnownState uint8

// What may be known. The zero value is nothing: others are asked.
const (
	KnownNot KnownState = iota
	KnownAddresses
	// KnownNoData: the name exists, and has no address of the family.
	KnownNoData
	// KnownAbsent: there is no such name.
	KnownAbsent
)

// Known is what is known of one family of a name.
type Known struct {
	State KnownState
	// Chain are the aliases that lead from the name to the one that has the addresses, or
	// to the one that has none, in order.
	Chain []Alias
	// Addresses are of the family.
	Addresses []netip.Addr
	// SOA is the record of a negative answer (RFC 2308) as it stands in messages, its names
	// not compressed, its TTL as of now; or nil.
	SOA []byte
	// Until is when it is not known any more; it is so sooner if a record's TTL ends.
	Until time.Time
	// Stale says that the record's TTLs are over, and no server says more at the moment
	// (RFC 8767). Pods may keep it for 30 seconds.
	Stale bool
}

// Alias is a CNAME record.
type Alias struct {
	// Target is what it leads to, without a final dot, TTL what is left of its time now, in
	// whole seconds.
	Target string
	TTL    time.Duration
}

// Asked is when a name outside the cluster was asked for, which the kernel has learned.
type Asked struct {
	// Name is in lower case, without a final dot.
	Name string
	// Last is when a pod did so, to a second; when it was learned, if none did since.
	Last time.Time
	// A and AAAA are when they are not known any more; zero for what is not known.
	A, AAAA time.Time
}
