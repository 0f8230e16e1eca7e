package model

import "net/netip"

// HostPort is a port of this node that leads to one of its pods, as a container's
// ports[].hostPort asks for.
type HostPort struct {
	// Pod is empty where the runtime did not say.
	Pod      Name
	Protocol Protocol
	// At is the node's side: an unspecified address stands for all of the node's of that
	// family. To is the pod's.
	At, To netip.AddrPort
}

// Compare orders by address, port and protocol of the node's side.
func (h HostPort) Compare(o HostPort) int {
	if c := h.At.Compare(o.At); c != 0 {
		return c
	}
	return int(h.Protocol) - int(o.Protocol)
}
