package agent

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/millrace/millrace/model"
)

// families are the values of kube-proxy's label ip_family. It brings them into the
// kernel one after the other, this agent both at once, so that each has the same.
var families = []string{"IPv4", "IPv6"}

// proxyMetrics have kube-proxy's names, and mean what they mean there. Those that
// count its rules are not here, as there are none, and neither is
// kubeproxy_network_programming_duration_seconds: it begins when a controller saw
// the change, which a Snapshot does not tell.
type proxyMetrics struct {
	duration                    *prometheus.HistogramVec
	last, lastQueued, localless *prometheus.GaugeVec
	healthz, livez              *prometheus.CounterVec
}

func newProxyMetrics(registry *prometheus.Registry) *proxyMetrics {
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	counter := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"code"})
	}
	m := &proxyMetrics{
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "kubeproxy_sync_proxy_rules_duration_seconds", Help: "How long bringing a change into the kernel took, for both families.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 15),
		}, []string{"ip_family"}),
		last:       gauge("kubeproxy_sync_proxy_rules_last_timestamp_seconds", "When all that was asked for was in the kernel last.", "ip_family"),
		lastQueued: gauge("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "When a change came in last.", "ip_family"),
		localless: gauge("kubeproxy_sync_proxy_rules_no_local_endpoints_total",
			"Service ports with endpoints, a Local traffic policy, and none of them on this node.", "traffic_policy", "ip_family"),
		healthz: counter("kubeproxy_proxy_healthz_total", "Answers of /healthz, by status."),
		livez:   counter("kubeproxy_proxy_livez_total", "Answers of /livez, by status."),
	}
	registry.MustRegister(m.duration, m.last, m.lastQueued, m.localless, m.healthz, m.livez)
	return m
}

// countCode counts answers by their status.
func countCode(in *prometheus.CounterVec) func(code int) {
	return func(code int) { in.WithLabelValues(strconv.Itoa(code)).Inc() }
}

func (m *proxyMetrics) queued(at time.Time) {
	for _, family := range families {
		m.lastQueued.WithLabelValues(family).Set(seconds(at))
	}
}

func (m *proxyMetrics) synced(clean bool, took time.Duration) {
	for _, family := range families {
		m.duration.WithLabelValues(family).Observe(took.Seconds())
		if clean {
			m.last.WithLabelValues(family).Set(seconds(time.Now()))
		}
	}
}

func seconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }

func (m *proxyMetrics) withoutLocal(s *model.Snapshot, node string) {
	for is6, family := range map[bool]string{false: "IPv4", true: "IPv6"} {
		internal, external := withoutLocal(s, node, is6)
		m.localless.WithLabelValues("internal", family).Set(float64(internal))
		m.localless.WithLabelValues("external", family).Set(float64(external))
	}
}

// withoutLocal counts Service ports whose traffic, from inside or from outside, may
// only go to endpoints of this node, which has none, while others have some.
func withoutLocal(s *model.Snapshot, node string, is6 bool) (internal, external int) {
	for _, service := range s.Services {
		outside := service.ExternalLocal && (service.Type == model.NodePort || service.Type == model.LoadBalancer || len(service.ExternalIPs) > 0)
		if !service.InternalLocal && !outside {
			continue
		}
		for _, port := range service.Ports {
			if !elsewhere(port.Backends, node, is6) {
				continue
			}
			if service.InternalLocal {
				internal++
			}
			if outside {
				external++
			}
		}
	}
	return internal, external
}

// elsewhere: there are endpoints of a family, and none of them on the node.
func elsewhere(backends []model.Backend, node string, is6 bool) bool {
	some := false
	for _, b := range backends {
		if b.Address.Addr().Is6() != is6 || !b.Ready && !(b.Serving && b.Terminating) {
			continue
		}
		if b.Node == node {
			return false
		}
		some = true
	}
	return some
}
