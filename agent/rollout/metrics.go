package rollout

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are what Prometheus reads. Labels are knobs of the table, "node" or "pods", and
// the words below: there are at most 23 times 2 of them.
type metrics struct {
	registry *prometheus.Registry
	settings *prometheus.GaugeVec
	drift    *prometheus.GaugeVec
	drifts   *prometheus.CounterVec
	phase    *prometheus.GaugeVec
	answers  prometheus.Gauge
	rounds   *prometheus.CounterVec
	last     prometheus.Gauge
}

func newMetrics() *metrics {
	gauges := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		settings: gauges("millrace_tune_settings", "Settings of this node by what became of them: held, waiting, refused, failed.", "state"),
		drift:    gauges("millrace_tune_drift", "Settings that are not as they were set, and are left so to somebody else.", "knob", "scope"),
		drifts:   counters("millrace_tune_drift_total", "How often a setting was found otherwise than it was set.", "knob", "scope"),
		phase:    gauges("millrace_tune_rollout", "1 for what becomes of the choice here: set, waiting, stopped.", "state"),
		answers:  gauge("millrace_tune_api_server_answers", "0 if the API server was asked in the last round and has not answered: nothing new is set then."),
		rounds:   counters("millrace_tune_rounds_total", "Rounds of looking and setting, by how they ended: done, failed.", "result"),
		last:     gauge("millrace_tune_last_round_timestamp_seconds", "When a round was last done, or when the process started, before the first."),
	}
	m.registry.MustRegister(m.settings, m.drift, m.drifts, m.phase, m.answers, m.rounds, m.last,
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewGoCollector())
	m.last.SetToCurrentTime() // 0 would be a round of 1970
	return m
}

// states of millrace_tune_rollout.
const (
	isSet     = "set"
	isWaiting = "waiting"
	isStopped = "stopped"
)

func (m *metrics) rollout(d *Decision) {
	state := isWaiting
	switch {
	case d.May:
		state = isSet
	case d.Trial.Phase == Stopped:
		state = isStopped
	}
	for _, s := range []string{isSet, isWaiting, isStopped} {
		value := 0.0
		if s == state {
			value = 1
		}
		m.phase.WithLabelValues(s).Set(value)
	}
}

func (m *metrics) round(o *Outcome) {
	for state, n := range map[string]int{"held": o.Held, "waiting": len(o.Waiting), "refused": len(o.Refused), "failed": len(o.Failed)} {
		m.settings.WithLabelValues(state).Set(float64(n))
	}
	m.drift.Reset()
	for _, d := range o.Drift {
		scope := "node"
		if d.Pod {
			scope = "pods"
		}
		m.drifts.WithLabelValues(d.Knob, scope).Inc()
		if d.Left != "" {
			m.drift.WithLabelValues(d.Knob, scope).Inc()
		}
	}
	m.last.SetToCurrentTime()
}

func (m *metrics) done(err error) {
	result := "done"
	if err != nil {
		result = "failed"
	}
	m.rounds.WithLabelValues(result).Inc()
}

// handler serves /metrics, and /livez and /readyz for a kubelet's probes.
func (m *metrics) handler(hangs func() bool, ready func() bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	probe := func(well func() bool, not string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if !well() {
				http.Error(w, not, http.StatusServiceUnavailable)
				return
			}
			w.Write([]byte("ok\n"))
		}
	}
	mux.Handle("GET /livez", probe(func() bool { return !hangs() }, "no round has ended for too long"))
	mux.Handle("GET /readyz", probe(ready, "no round is done yet"))
	return mux
}

func (m *metrics) serve(handler http.Handler) *http.Server {
	return &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 1 << 14}
}
