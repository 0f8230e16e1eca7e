package model

import "net/netip"

// Masquerade is what the cluster says of packets that leave it: to whom pods speak with
// their own addresses, beside each other.
type Masquerade struct {
	// Not are the ranges towards which pods keep their addresses.
	Not []netip.Prefix
	// LinkLocal and LinkLocalIPv6 say that link-local addresses (169.254.0.0/16,
	// fe80::/10) are not among them.
	LinkLocal, LinkLocalIPv6 bool
}
