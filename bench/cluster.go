package bench

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/millrace/millrace/model"
)

// The ports of every Service here and of the pods behind it.
const (
	servicePort = 80
	backendPort = 8080
)

// The addresses inside a bed; see the package documentation.
var (
	podRange     = netip.MustParsePrefix("10.244.0.0/16")
	serviceRange = netip.MustParsePrefix("10.96.0.0/12")
	// idleRange has the endpoints that nobody ever connects to.
	idleRange = netip.MustParsePrefix("10.128.0.0/9")

	clientAddress  = netip.MustParsePrefix("10.244.1.2/24")
	clientGateway  = netip.MustParsePrefix("10.244.1.1/24")
	backendGateway = netip.MustParsePrefix("10.244.2.1/24")
	// backendBase is the first backend's address; the others follow it.
	backendBase = netip.MustParsePrefix("10.244.2.2/24")
)

// Positions of the tested Service among all, in the order they are searched.
const (
	First  = "first"
	Middle = "middle"
	Last   = "last"
)

// testedIndex is the place of the tested Service among count.
func testedIndex(position string, count int) (int, error) {
	switch position {
	case First:
		return 0, nil
	case Middle:
		return count / 2, nil
	case Last, "":
		return count - 1, nil
	}
	return 0, fmt.Errorf("unknown position %q: use first, middle or last", position)
}

// liveBackends are endpoints that answer. Those behind the tested Service are
// the first, and the one after them is the spare.
func liveBackends(count int) []netip.AddrPort {
	live := make([]netip.AddrPort, count)
	for i := range live {
		live[i] = netip.AddrPortFrom(nth(backendBase.Addr(), i), backendPort)
	}
	return live
}

// cluster is count Services with endpoints each; the one at index tested leads
// to the live backends, the others to addresses that exist in rules only.
func cluster(count, endpoints, tested int) []*model.Service {
	services := make([]*model.Service, count)
	for i := range services {
		backends := make([]model.Backend, endpoints)
		for j := range backends {
			address := netip.AddrPortFrom(nth(idleRange.Addr(), 1+i*endpoints+j), backendPort)
			if i == tested {
				address = liveBackends(endpoints)[j]
			}
			backends[j] = model.Backend{Address: address, Ready: true, Serving: true, Node: "bench"}
		}
		services[i] = &model.Service{
			Name:       model.Name{Namespace: "bench", Name: fmt.Sprintf("service-%d", i)},
			Type:       model.ClusterIP,
			ClusterIPs: []netip.Addr{nth(serviceRange.Addr(), 10+i)},
			IPv4:       true,
			Ports: []model.ServicePort{{
				Name: "http", Protocol: model.TCP, Port: servicePort, TargetPort: backendPort, Backends: backends,
			}},
			Where: "bench",
		}
	}
	return services
}

// inNameOrder are the Services as a model.Snapshot has them: by name.
func inNameOrder(services []*model.Service) []*model.Service {
	return slices.SortedFunc(slices.Values(services), func(a, b *model.Service) int { return a.Name.Compare(b.Name) })
}

// withReplacedEndpoint is a Service of cluster whose last endpoint went and the
// spare one came, the one that lives and is behind none at first.
func withReplacedEndpoint(service *model.Service) *model.Service {
	changed := *service
	changed.Ports = slices.Clone(service.Ports)
	port := &changed.Ports[0]
	port.Backends = slices.Clone(port.Backends)
	last := len(port.Backends) - 1
	port.Backends[last].Address = liveBackends(last + 2)[last+1]
	return &changed
}

// addresses are those of the endpoints of a Service, in their order.
func addresses(service *model.Service) (all []netip.AddrPort) {
	for _, backend := range service.Ports[0].Backends {
		all = append(all, backend.Address)
	}
	return all
}

// serviceAddress is where a client finds a Service.
func serviceAddress(service *model.Service) netip.AddrPort {
	return netip.AddrPortFrom(service.ClusterIPs[0], service.Ports[0].Port)
}

// nth is the IPv4 address n after base.
func nth(base netip.Addr, n int) netip.Addr {
	bytes := base.As4()
	var next [4]byte
	binary.BigEndian.PutUint32(next[:], binary.BigEndian.Uint32(bytes[:])+uint32(n))
	return netip.AddrFrom4(next)
}
