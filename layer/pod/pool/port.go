package pool

import (
	"fmt"
	"net/netip"
	"slices"
)

// Port is a port of the node that leads to one of an interface's: a hostPort.
type Port struct {
	// Protocol is "tcp" or "udp".
	Protocol string `json:"protocol"`
	// HostIP is the node's address that has it: invalid for all, an unspecified one for all
	// of its family.
	HostIP        netip.Addr `json:"host_ip,omitzero"`
	HostPort      uint16     `json:"host_port"`
	ContainerPort uint16     `json:"container_port"`
}

// String is "8080->80/tcp", or with an address "127.0.0.1:8080->80/tcp".
func (p Port) String() string { return fmt.Sprintf("%s->%d/%s", p.at(), p.ContainerPort, p.Protocol) }

// Host is the node's side of it: "8080/tcp", "127.0.0.1:8080/tcp".
func (p Port) Host() string { return p.at() + "/" + p.Protocol }

func (p Port) at() string {
	if !p.HostIP.IsValid() {
		return fmt.Sprint(p.HostPort)
	}
	return netip.AddrPortFrom(p.HostIP, p.HostPort).String()
}

// Meets says whether an address of the node has both ports for one protocol.
func (p Port) Meets(o Port) bool {
	if p.Protocol != o.Protocol || p.HostPort != o.HostPort {
		return false
	}
	return p.covers(o.HostIP) || o.covers(p.HostIP)
}

// covers says whether a port's addresses are all, or all of an address' family, or that one.
func (p Port) covers(addr netip.Addr) bool {
	if !p.HostIP.IsValid() || p.HostIP == addr {
		return true
	}
	return addr.IsValid() && p.HostIP.IsUnspecified() && p.HostIP.Is4() == addr.Is4()
}

// Clash is who else holds one of these ports, at an address that an interface would have it
// at, and which.
func (p *Pool) Clash(key Key, ports []Port) (holder Lease, port Port, clash bool) {
	if len(ports) == 0 {
		return Lease{}, Port{}, false
	}
	for _, lease := range p.Leases() {
		if lease.Key == key {
			continue
		}
		for _, held := range lease.Ports {
			if i := slices.IndexFunc(ports, held.Meets); i >= 0 {
				return lease, ports[i], true
			}
		}
	}
	return Lease{}, Port{}, false
}

// GivePorts takes an interface's ports back, before its addresses: nobody is led to it
// any more.
func (p *Pool) GivePorts(key Key) {
	if held, there := p.leases[key]; there {
		held.Ports = nil
		p.leases[key] = held
	}
}
