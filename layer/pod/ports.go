package pod

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
	"github.com/millrace/millrace/model"
)

// mostPorts is how many hostPorts a pod may have: each is compared with those of the node's
// other pods, while other ADDs wait.
const mostPorts = 256

// portsOf reads the hostPorts that a runtime asks for; a port that is said twice is one. The
// error is CNI's.
func portsOf(asked []cni.PortMapping, pod *Pod, ranges []netip.Prefix) (ports []pool.Port, err error) {
	if len(asked) > mostPorts {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("%s has %d hostPorts: a pod may have %d: take some away, or give it hostNetwork", pod.Object(), len(asked), mostPorts), "")
	}
	for _, mapping := range asked {
		port, why := portOf(mapping, ranges)
		if why != "" {
			return nil, refusedPort(types.ErrInvalidNetworkConfig, asWritten(mapping), pod, why)
		}
		other := func(have pool.Port) bool { return have.Meets(port) && have.ContainerPort != port.ContainerPort }
		if i := slices.IndexFunc(ports, other); i >= 0 {
			return nil, refusedPort(types.ErrInvalidNetworkConfig, port.Host(), pod, fmt.Sprintf("it leads to port %d and to %d of the pod: say one", ports[i].ContainerPort, port.ContainerPort))
		}
		if !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	return ports, nil
}

func refusedPort(code uint, port string, pod *Pod, why string) error {
	return types.NewError(code, fmt.Sprintf("hostPort %s of %s: %s", port, pod.Object(), why), "")
}

// asWritten is a mapping as the runtime wrote it.
func asWritten(m cni.PortMapping) string {
	text := fmt.Sprintf("%d/%s", m.HostPort, m.Protocol)
	if m.HostIP != "" {
		text = m.HostIP + " " + text
	}
	return text
}

// portOf reads one mapping, or says why it cannot be served.
func portOf(m cni.PortMapping, ranges []netip.Prefix) (port pool.Port, why string) {
	protocol, err := model.ParseProtocol(m.Protocol)
	switch {
	case err != nil:
		return port, err.Error()
	case protocol == model.SCTP:
		return port, "SCTP is not served, for the kernel has no hook at which an SCTP socket's address could be replaced: take the hostPort out of the pod, or give it hostNetwork"
	case m.HostPort < 1 || m.HostPort > 65535 || m.ContainerPort < 1 || m.ContainerPort > 65535:
		return port, fmt.Sprintf("it is to lead to port %d of the pod; ports are 1 to 65535", m.ContainerPort)
	}
	port = pool.Port{Protocol: protocol.String(), HostPort: uint16(m.HostPort), ContainerPort: uint16(m.ContainerPort)}
	if m.HostIP == "" {
		return port, ""
	}
	addr, err := netip.ParseAddr(m.HostIP)
	if err != nil || addr.Zone() != "" || addr.IsMulticast() {
		return port, fmt.Sprintf("hostIP %q is no address that a node can have: write one such as 192.0.2.1, or none for all", m.HostIP)
	}
	port.HostIP = addr.Unmap()
	if !slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Addr().Is4() == port.HostIP.Is4() }) {
		return port, fmt.Sprintf("pods of this node have no address of the family of its hostIP (the ranges are %v): take another hostIP, or none", ranges)
	}
	return port, ""
}

// allot says whether a pod may have hostPorts, and which. Another pod that has one may be
// about to end: the runtime tries again.
func (l *Layer) allot(config *cni.Config, pod *Pod) ([]pool.Port, error) {
	ports, err := portsOf(config.RuntimeConfig.PortMappings, pod, l.pool.Ranges())
	if err != nil || len(ports) == 0 {
		return nil, err
	}
	if l.settings.HostPorts == nil {
		return nil, refusedPort(types.ErrInvalidNetworkConfig, ports[0].Host(), pod, "this node's agent serves no hostPorts, for it does not serve what comes from other machines: start it without --wire=false, "+
			"or take the capability portMappings from the plugin millrace and put the plug-in portmap behind it")
	}
	if holder, port, clash := l.pool.Clash(pod.Key, ports); clash {
		return nil, refusedPort(types.ErrTryAgainLater, port.Host(), pod, fmt.Sprintf("%s of this node has it: wait for its end, or give one of the two another hostPort or hostIP", podOf(holder).Object()))
	}
	owners := owners(l.services, ports)
	for _, port := range ports {
		if owner := owners[port]; owner != "" {
			return nil, refusedPort(types.ErrTryAgainLater, port.Host(), pod, fmt.Sprintf("%s has it: give the pod another hostPort, or the Service another port", owner))
		}
	}
	return ports, nil
}

// owners are the Services that have ports of the node, too, by those ports. Each Service is
// looked at once, however many ports there are. A Service at one address of the node is none
// of a port at all of them, though it is served there: such are those of k3s' ServiceLB, whose
// pods have the Service's port as hostPort, and their node's address in the Service's status.
func owners(services []*model.Service, ports []pool.Port) map[pool.Port]string {
	if len(ports) == 0 {
		return nil
	}
	type number struct {
		protocol string
		port     uint16
	}
	asked, found := map[number][]pool.Port{}, map[pool.Port]string{}
	for _, port := range ports {
		at := number{port.Protocol, port.HostPort}
		asked[at] = append(asked[at], port)
	}
	for _, s := range services {
		for i := range s.Ports {
			p := &s.Ports[i]
			for _, port := range asked[number{p.Protocol.String(), p.NodePort}] {
				note(found, port, "the node port of Service "+s.Name.String())
			}
			for _, port := range asked[number{p.Protocol.String(), p.Port}] {
				if slices.Contains(slices.Concat(s.ClusterIPs, s.ExternalIPs, s.LoadBalancerIPs), port.HostIP) {
					note(found, port, "Service "+s.Name.String())
				}
			}
		}
	}
	return found
}

// note notes who has a port; the first one is kept.
func note(owners map[pool.Port]string, port pool.Port, owner string) {
	if owners[port] == "" {
		owners[port] = owner
	}
}

// HostPorts are the ports of the node that lead to pods, in their order.
func (p *Picture) HostPorts() []model.HostPort {
	var leases []pool.Lease
	for _, pod := range p.pods {
		if pod.state != gone {
			leases = append(leases, pod.Lease)
		}
	}
	return hostPorts(leases, p.facts.own)
}

// ofNode says whether an address is the node's, by those of its devices: only those lead to
// pods. Or a pod's hostIP would take what this node and its pods send to anybody else.
func ofNode(addr netip.Addr, own []netip.Addr) bool {
	return addr.IsUnspecified() || addr.IsLoopback() || slices.Contains(own, addr)
}

// hostPorts are as many for each port as there are families in which it leads to the pod. What
// a pod has both at no hostIP and at 0.0.0.0 is one.
func hostPorts(leases []pool.Lease, own []netip.Addr) (all []model.HostPort) {
	for _, lease := range leases {
		for _, port := range lease.Ports {
			for _, addr := range lease.Addresses {
				at := port.HostIP
				if !at.IsValid() {
					at = netip.PrefixFrom(addr, 0).Masked().Addr() // all of its family
				}
				if at.Is4() != addr.Is4() || !ofNode(at, own) {
					continue
				}
				protocol, _ := model.ParseProtocol(port.Protocol)
				all = append(all, model.HostPort{Pod: nameIn(lease.Pod), Protocol: protocol,
					At: netip.AddrPortFrom(at, port.HostPort), To: netip.AddrPortFrom(addr, port.ContainerPort)})
			}
		}
	}
	slices.SortFunc(all, model.HostPort.Compare)
	return slices.Compact(all)
}

// nameIn reads "namespace/name"; what is no name is none.
func nameIn(text string) model.Name {
	namespace, name, _ := strings.Cut(text, "/")
	return model.Name{Namespace: namespace, Name: name}
}

// tellPorts says which ports of the node lead to pods, if they are others than were said last.
func (l *Layer) tellPorts() {
	if l.settings.HostPorts == nil {
		return
	}
	if ports := hostPorts(l.pool.Leases(), l.own); !slices.Equal(ports, l.told) {
		l.told = ports
		l.settings.HostPorts(ports)
	}
}

// unserved says which hostPorts lead nowhere, or not everywhere.
func (l *Layer) unserved() (why []string) {
	leases := l.pool.Leases()
	if l.settings.HostPorts == nil {
		return l.leftToPortmap(leases)
	}
	var ports []pool.Port
	for _, lease := range leases {
		ports = append(ports, lease.Ports...)
	}
	owners := owners(l.services, ports)
	for _, lease := range leases {
		for _, port := range lease.Ports {
			if port.HostIP.IsValid() && !ofNode(port.HostIP, l.own) {
				why = append(why, fmt.Sprintf("hostPort %s of %s is not served: no device of this node has its hostIP: give it the address, or the pod another hostIP, or none", port.Host(), podOf(lease).Object()))
			}
			if owner := owners[port]; owner != "" {
				why = append(why, fmt.Sprintf("hostPort %s of %s is not served, or not everywhere: %s has it, too: give one of the two another", port.Host(), podOf(lease).Object(), owner))
			}
		}
	}
	return why
}

// leftToPortmap says what that plug-in does not serve: all, where it is not there, and what
// pods were given by an agent before this one.
func (l *Layer) leftToPortmap(leases []pool.Lease) (why []string) {
	if l.settings.Plugins != "" && !l.install.hasPortmap() {
		why = append(why, "hostPorts of pods are not served: with --wire=false that is left to the plug-in portmap, which is not in "+l.settings.Plugins+": install it (containernetworking-plugins), or start the agent without --wire=false")
	}
	for _, lease := range leases {
		for _, port := range lease.Ports {
			why = append(why, fmt.Sprintf("hostPort %s of %s is not served with --wire=false, and no plug-in was asked for it: delete the pod, and it is made anew, or start the agent without that", port.Host(), podOf(lease).Object()))
		}
	}
	return why
}
