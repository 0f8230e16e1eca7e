package healthcheck

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"strconv"

	"github.com/millrace/millrace/model"
)

// Check is what a node says about one Service in one family.
type Check struct {
	Service model.Name
	// Port is the Service's healthCheckNodePort.
	Port uint16
	// IPv6 is the family.
	IPv6 bool
	// Local counts the endpoints of the family on this node that are ready.
	Local int
}

// Of lists the checks of a node, in the order of the Services.
func Of(s *model.Snapshot, node string) (checks []Check) {
	for _, service := range s.Services {
		if service.HealthCheckPort == 0 {
			continue
		}
		for _, address := range service.ClusterIPs {
			is6 := address.Is6()
			checks = append(checks, Check{service.Name, service.HealthCheckPort, is6, local(service, node, is6)})
		}
	}
	return checks
}

// local counts addresses: one that serves two ports is one endpoint.
func local(service *model.Service, node string, is6 bool) int {
	seen := map[netip.Addr]bool{}
	for _, port := range service.Ports {
		for _, backend := range port.Backends {
			if address := backend.Address.Addr(); backend.Ready && backend.Node == node && address.Is6() == is6 {
				seen[address] = true
			}
		}
	}
	return len(seen)
}

// answer says 200 where there are endpoints and the proxy is well, 503 otherwise.
func (c Check) answer(well func() bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		type service struct {
			Namespace string `json:"namespace"`
			Name      string `json:"name"`
		}
		healthy := well()
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(c.Local))
		reply(w, healthy && c.Local > 0, struct {
			Service        service `json:"service"`
			LocalEndpoints int     `json:"localEndpoints"`
			Healthy        bool    `json:"serviceProxyHealthy"`
		}{service{c.Service.Namespace, c.Service.Name}, c.Local, healthy})
	})
}

func reply(w http.ResponseWriter, good bool, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if !good {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	json.NewEncoder(w).Encode(body)
}
