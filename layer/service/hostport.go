package service

import (
	"net/netip"
	"slices"

	"github.com/millrace/millrace/model"
)

// planPorts is the plan of all hostPorts, the last one where they are the same; nil for none.
func (p *planner) planPorts(ports []model.HostPort) *plan {
	ports = slices.SortedFunc(slices.Values(ports), model.HostPort.Compare)
	if !slices.Equal(ports, p.of) {
		p.of, p.ports = ports, nil
		if len(ports) > 0 {
			p.ports = &plan{&model.Service{}, demandsOfPorts(ports), rowsOfPorts(ports)}
		}
	}
	return p.ports
}

// rowsOfPorts plans hostPorts: each is what a node port with one endpoint on this node is,
// at all addresses of the node that have node ports or at one. Nobody is masqueraded.
func rowsOfPorts(ports []model.HostPort) (rows []*Row) {
	for _, port := range ports {
		row := &Row{Frontend: Frontend{unmapped(port.At), port.Protocol}, Entry: AtHostPort, Backends: []netip.AddrPort{unmapped(port.To)}}
		if port.Pod.Name != "" {
			row.Pod = &port.Pod
		}
		rows = append(rows, row)
	}
	return rows
}

// demandsOfPorts are as of Services at the same addresses. What is at a loopback address is
// for the node's own processes alone, and asks nothing of the wire.
func demandsOfPorts(ports []model.HostPort) (d demands) {
	for _, port := range ports {
		d.nodePorts = d.nodePorts || port.At.Addr().IsUnspecified()
		d.entrance = d.entrance || !port.At.Addr().IsLoopback()
	}
	return d
}
