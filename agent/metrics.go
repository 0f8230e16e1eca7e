package agent

import (
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/millrace/millrace/layer"
)

// metrics are what the agent counts itself. What the layers count is read from
// them when Prometheus asks.
type metrics struct {
	registry *prometheus.Registry
	duration prometheus.Histogram
	changes  *prometheus.CounterVec
	failures *prometheus.CounterVec
	drifts   *prometheus.CounterVec

	mu     sync.Mutex
	recent []time.Duration // of the last changes, for status
}

// recentMost bounds the changes whose latency is remembered.
const recentMost = 1000

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "millrace_agent_programming_duration_seconds",
			Help:    "From the source's noticing a change to its being in the kernel.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16),
		}),
		changes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "millrace_layer_changes_total", Help: "Changes applied, by layer and what they did.",
		}, []string{"layer", "op"}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "millrace_layer_changes_failed_total", Help: "Changes that failed; they are tried again.",
		}, []string{"layer"}),
		drifts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "millrace_layer_drift_total", Help: "Objects found other than applied: changed by somebody else.",
		}, []string{"layer"}),
	}
	m.registry.MustRegister(m.duration, m.changes, m.failures, m.drifts,
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewGoCollector())
	return m
}

func (m *metrics) programmed(took time.Duration) {
	m.duration.Observe(took.Seconds())
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.recent) == recentMost {
		m.recent = m.recent[1:]
	}
	m.recent = append(m.recent, took)
}

// Latency is the time from the source's noticing a change to its being in the
// kernel, over the last changes, at most a thousand.
type Latency struct {
	Changes int     `json:"changes"`
	P50MS   float64 `json:"p50_ms"`
	P99MS   float64 `json:"p99_ms"`
	MaxMS   float64 `json:"max_ms"`
}

// latency is nil before the first change.
func (m *metrics) latency() *Latency {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.recent) == 0 {
		return nil
	}
	sorted := slices.Sorted(slices.Values(m.recent))
	at := func(share float64) float64 {
		return float64(sorted[int(share*float64(len(sorted)-1))].Microseconds()) / 1000
	}
	return &Latency{Changes: len(sorted), P50MS: at(0.5), P99MS: at(0.99), MaxMS: at(1)}
}

func (m *metrics) applied(name string, t layer.Tally, failed int) {
	m.changes.WithLabelValues(name, "add").Add(float64(t.Added))
	m.changes.WithLabelValues(name, "alter").Add(float64(t.Altered))
	m.changes.WithLabelValues(name, "remove").Add(float64(t.Removed))
	m.failures.WithLabelValues(name).Add(float64(failed))
}

func (m *metrics) drift(name string, n int) { m.drifts.WithLabelValues(name).Add(float64(n)) }

// handler serves /metrics, and /livez and /readyz for a kubelet's probes: restart the
// agent? may one rely on it?
func (m *metrics) handler(a *Agent) http.Handler {
	m.registry.MustRegister(&statusCollector{a})
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock() // not to be had while the agent hangs: then there is no answer
		defer a.mu.Unlock()
		w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := a.health.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Write([]byte("ok\n"))
	})
	return mux
}

// statusCollector turns Status into metrics. Every label has few values: layers,
// maps and reasons are fixed by the program.
type statusCollector struct{ agent *Agent }

var (
	infoMetric     = describe("millrace_build_info", "The running version.", "version")
	readyMetric    = describe("millrace_agent_ready", "1 once the cluster was seen whole and is in the kernel.")
	ageMetric      = describe("millrace_agent_snapshot_age_seconds", "Age of the picture of the cluster that is in force.")
	lostMetric     = describe("millrace_agent_source_lost_seconds", "How long the source has not been readable; 0 while it is.")
	unreadMetric   = describe("millrace_agent_unread", "Objects of the input that could not be read and were never known; while there are any, nothing is removed.")
	problemsMetric = describe("millrace_agent_problems", "Objects of the input that cannot be used.")
	objectsMetric  = describe("millrace_layer_objects", "Objects in force.", "layer")
	degradedMetric = describe("millrace_layer_degraded", "What does not work in full; millrace status says each.", "layer")
	entriesMetric  = describe("millrace_map_entries", "Entries in a kernel map.", "layer", "map")
	capacityMetric = describe("millrace_map_capacity", "Largest number of entries; maps grow before it is reached.", "layer", "map")
	bytesMetric    = describe("millrace_map_bytes", "Kernel memory of a map.", "layer", "map")
	eventsMetric   = describe("millrace_events_total", "What the programs did, by reason.", "layer", "reason")
	dropsMetric    = describe("millrace_drops_total",
		"Packets that died in a pod's network namespace, by reason; in the node's own where pod is empty, in those of others where it is others.",
		"namespace", "pod", "reason")

	// Of TCP connections by who speaks to whom; seen_by is "client" or "server": where both
	// are on one node, or each has an agent, both ends are told.
	flowBytesMetric = describe("millrace_flow_bytes_total",
		"Bytes of TCP connections, of those that are open too, as the end that sees them has sent (and the other acknowledged) or received them.", append(flowLabels, "direction")...)
	flowRetransmitsMetric = describe("millrace_flow_retransmits_total", "Segments that were sent again.", flowLabels...)
	flowEndedMetric       = describe("millrace_flow_connections_ended_total",
		"Connections that have ended: well, refused, without an answer, or broken off by the other end.", append(flowLabels, "verdict")...)
	flowOpenMetric = describe("millrace_flow_connections_open",
		"Connections that are open: well, waiting for the answer to their SYN, or sending again or waiting for a window that is zero.", append(flowLabels, "verdict")...)
	flowRTTMetric = describe("millrace_flow_rtt_seconds", "The longest smoothed round-trip time of those that are open.", flowLabels...)
)

// flowLabels say who speaks to whom, of which at most pairsMost pairs are named.
var flowLabels = []string{"client_namespace", "client", "server_namespace", "server", "seen_by"}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// Describe implements prometheus.Collector; what is collected is known by name.
func (c *statusCollector) Describe(into chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{infoMetric, readyMetric, ageMetric, lostMetric, unreadMetric, problemsMetric,
		objectsMetric, degradedMetric, entriesMetric, capacityMetric, bytesMetric, eventsMetric, dropsMetric,
		flowBytesMetric, flowRetransmitsMetric, flowEndedMetric, flowOpenMetric, flowRTTMetric} {
		into <- d
	}
}

// Collect implements prometheus.Collector.
func (c *statusCollector) Collect(into chan<- prometheus.Metric) {
	status, err := c.agent.Status()
	if err != nil {
		into <- prometheus.NewInvalidMetric(readyMetric, err)
		return
	}
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		into <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	ready, lost := 0.0, 0.0
	if status.Ready {
		ready = 1
	}
	if since := status.Source.ErrorSince; since != nil {
		lost = time.Since(*since).Seconds()
	}
	gauge(infoMetric, 1, status.Version)
	gauge(readyMetric, ready)
	gauge(ageMetric, status.Source.AgeSeconds)
	gauge(lostMetric, lost)
	gauge(unreadMetric, float64(status.Source.Unread))
	gauge(problemsMetric, float64(len(status.Problems)))
	for _, l := range status.Layers {
		gauge(objectsMetric, float64(l.Objects), l.Name)
		gauge(degradedMetric, float64(len(l.Degraded)), l.Name)
		for _, m := range l.Maps {
			gauge(entriesMetric, float64(m.Entries), l.Name, m.Name)
			gauge(capacityMetric, float64(m.Capacity), l.Name, m.Name)
			gauge(bytesMetric, float64(m.Bytes), l.Name, m.Name)
		}
		for _, d := range l.Drops {
			namespace, pod := podLabels(d.Pod)
			into <- prometheus.MustNewConstMetric(dropsMetric, prometheus.CounterValue, float64(d.Count), namespace, pod, d.Reason)
		}
		for reason, n := range l.Reasons {
			into <- prometheus.MustNewConstMetric(eventsMetric, prometheus.CounterValue, float64(n), l.Name, reason)
		}
		if len(l.Flows) > 0 {
			for _, p := range c.agent.flows.add(l.Flows, c.agent.picture()) {
				p.collect(into)
			}
		}
	}
}

// collect gives the metrics of a pair. What is open of others is told as one.
func (p *pairFlow) collect(into chan<- prometheus.Metric) {
	clientSpace, client := podLabels(p.client)
	serverSpace, server := podLabels(p.server)
	labels := []string{clientSpace, client, serverSpace, server, map[bool]string{true: "client", false: "server"}[p.ofClient]}
	tell := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, more ...string) {
		into <- prometheus.MustNewConstMetric(d, kind, value, slices.Concat(labels, more)...)
	}
	tell(flowBytesMetric, prometheus.CounterValue, float64(p.sent), "sent")
	tell(flowBytesMetric, prometheus.CounterValue, float64(p.received), "received")
	tell(flowRetransmitsMetric, prometheus.CounterValue, float64(p.retransmits))
	for how, n := range p.ended {
		tell(flowEndedMetric, prometheus.CounterValue, float64(n), verdictNames[how])
	}
	tell(flowOpenMetric, prometheus.GaugeValue, float64(p.open-p.opening-p.stalled), "ok")
	tell(flowOpenMetric, prometheus.GaugeValue, float64(p.opening), "unanswered")
	tell(flowOpenMetric, prometheus.GaugeValue, float64(p.stalled), "retransmitting")
	if p.rtt > 0 {
		tell(flowRTTMetric, prometheus.GaugeValue, p.rtt.Seconds())
	}
}
