package agent

import (
	"net/http"
	"net/netip"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/millrace/millrace/agent/healthcheck"
	"github.com/millrace/millrace/model"
)

// KubeProxy is what others expect of a kube-proxy on this node: its ports, and what
// its configuration says.
type KubeProxy struct {
	// From names the configuration, for status; empty where there is none.
	From string
	// Notes name fields of it that have no effect here; Problems those that cannot
	// be understood.
	Notes    []string
	Problems []model.Problem
	// Ports says that Healthz, Metrics and each healthCheckNodePort are answered.
	Ports            bool
	Healthz, Metrics netip.AddrPort
	// HardFail ends the agent where Healthz or Metrics is taken when it starts.
	HardFail bool
	// NodePorts are the node's addresses that answer a healthCheckNodePort, NodeIP is
	// the node's primary address, if its Node object does not say it.
	NodePorts healthcheck.Places
	NodeIP    netip.Addr
	// Netns is the path of the node's network namespace; empty for this process's.
	Netns string
}

// KubeProxyStatus is how the agent does in kube-proxy's place.
type KubeProxyStatus struct {
	Config string              `json:"config,omitempty"`
	Notes  []string            `json:"notes"`
	Ports  []healthcheck.State `json:"ports"`
}

// proxyMode is what /proxyMode says. Those who read it expect iptables, ipvs or
// nftables to find that mode's rules, metrics and sysctls; none is here, so none of
// the three would be true. Kubernetes' tests want any answer ("should check
// kube-proxy urls"), or skip what is about mode iptables.
const proxyMode = "millrace"

// portsAgain is when ports that were taken are tried again.
const portsAgain = 5 * time.Second

// standIn is the agent in kube-proxy's place. Its zero value does nothing.
type standIn struct {
	config *KubeProxy
	node   string
	server healthcheck.Server
	health *healthcheck.Health
	counts *proxyMetrics
	// fixed are the listeners that are there from the start.
	fixed []healthcheck.Listener
	// checks and primary are of the last Snapshot.
	checks  []healthcheck.Check
	primary []netip.Addr
	// again is when to try again; nil while nothing was refused.
	again <-chan time.Time
}

// answerAsProxy begins to answer on kube-proxy's ports, before anything is changed,
// so that a port that is taken can end the agent.
func (a *Agent) answerAsProxy() error {
	config := a.config.KubeProxy
	if config == nil {
		return nil
	}
	for _, note := range config.Notes {
		a.config.Log.Info("kube-proxy's configuration", "note", note)
	}
	for _, problem := range config.Problems {
		a.config.Log.Warn("kube-proxy's configuration", "problem", problem.Error())
	}
	if !config.Ports {
		return nil
	}
	p := &a.proxy
	p.config, p.node, p.health = config, a.config.Node, &a.health
	p.server.Netns, p.server.Log = config.Netns, a.config.Log
	p.counts = newProxyMetrics(a.metrics.registry)
	p.fixed = []healthcheck.Listener{
		{Network: "tcp", Address: config.Healthz, For: "healthz", Handler: p.healthz()},
		{Network: "tcp", Address: config.Metrics, For: "metrics", Handler: p.metrics(a.metrics.registry)},
	}
	if err := p.bring(); err != nil && config.HardFail {
		return err
	}
	return nil
}

func (p *standIn) healthz() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/healthz", p.health.Healthz(countCode(p.counts.healthz)))
	mux.Handle("/livez", p.health.Livez(countCode(p.counts.livez)))
	return mux
}

func (p *standIn) metrics(registry *prometheus.Registry) http.Handler {
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain; charset=utf-8")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			w.Write([]byte(s))
		}
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux.Handle("/proxyMode", text(proxyMode))
	mux.Handle("/healthz", text("ok"))
	return mux
}

// take takes a Snapshot over: what it asks for is answered once it is in the
// kernel, with bring.
func (p *standIn) take(s *model.Snapshot) {
	if p.config == nil {
		return
	}
	p.counts.queued(time.Now())
	p.counts.withoutLocal(s, p.node)
	p.checks = healthcheck.Of(s, p.node)
	p.primary = nil
	here := slices.IndexFunc(s.Nodes, func(n *model.Node) bool { return n.Name == p.node })
	if here >= 0 {
		p.primary = s.Nodes[here].Addresses
	}
	if p.config.NodeIP.IsValid() {
		p.primary = append([]netip.Addr{p.config.NodeIP}, p.primary...)
	}
	gone := here < 0 && len(s.Nodes) > 0 && s.Complete && s.Unread == 0
	p.health.Leaving(gone || here >= 0 && s.Nodes[here].Leaving)
}

// applied says how applying went.
func (p *standIn) applied(clean bool, took time.Duration) {
	if p.config != nil {
		p.counts.synced(clean, took)
	}
}

// bring has the ports answered as the last Snapshot asks for.
func (p *standIn) bring() error {
	if p.config == nil {
		return nil
	}
	var has []netip.Addr
	if p.config.NodePorts.Choose() && len(p.checks) > 0 {
		var err error
		if has, err = healthcheck.Addresses(p.config.Netns); err != nil {
			p.server.Log.Error("list the node's addresses", "error", err)
		}
	}
	listeners := p.config.NodePorts.Listeners(p.checks, has, p.primary, p.health.Well)
	err := p.server.Bring(append(slices.Clone(p.fixed), listeners...))
	p.again = nil
	if err != nil {
		p.again = time.After(portsAgain)
	}
	return err
}

// kubeProxyStatus is nil where there is nothing of a kube-proxy.
func (a *Agent) kubeProxyStatus() *KubeProxyStatus {
	config := a.config.KubeProxy
	if config == nil {
		return nil
	}
	return &KubeProxyStatus{
		Config: config.From, Notes: append([]string{}, config.Notes...),
		Ports: append([]healthcheck.State{}, a.proxy.server.States()...),
	}
}
