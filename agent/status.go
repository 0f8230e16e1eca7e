package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/millrace/millrace/agent/resolver"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Status is what `millrace status -o json` prints.
type Status struct {
	// Ready: the cluster was seen whole once, and everything is in the kernel.
	Ready   bool      `json:"ready"`
	Node    string    `json:"node"`
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	// AttachedAfterMS is from process start to all programs attached.
	AttachedAfterMS float64       `json:"attached_after_ms"`
	Source          SourceStatus  `json:"source"`
	Layers          []LayerStatus `json:"layers"`
	// KubeProxy is absent where the agent does not stand in for a kube-proxy.
	KubeProxy *KubeProxyStatus `json:"kube_proxy,omitempty"`
	Latency   *Latency         `json:"latency,omitempty"`
	Memory    Memory           `json:"memory"`
	Ignored   map[string]int   `json:"ignored,omitempty"`
	// Problems are the objects of the input that cannot be used.
	Problems []model.Problem `json:"problems"`
}

// SourceStatus says how old the picture is.
type SourceStatus struct {
	Name string `json:"name"`
	// Error is why the source cannot be read now; the last picture stays in force.
	Error string `json:"error,omitempty"`
	// ErrorSince is since when; absent while there is no error.
	ErrorSince *time.Time `json:"error_since,omitempty"`
	// Unread counts what of the input could not be read and was never known;
	// while it is not zero nothing is removed.
	Unread     int       `json:"unread"`
	Snapshot   uint64    `json:"snapshot"`
	Complete   bool      `json:"complete"`
	Received   time.Time `json:"received"`
	AgeSeconds float64   `json:"age_seconds"`
	Services   int       `json:"services"`
	Pods       int       `json:"pods"`
	Nodes      int       `json:"nodes"`
}

// LayerStatus is a layer and what the agent did with it.
type LayerStatus struct {
	layer.Description
	Changes layer.Tally `json:"changes"`
	Failed  int         `json:"failed"`
	Drifted int         `json:"drifted"`
	// LongestApplyMS is the longest time that bringing a Snapshot's changes into
	// the kernel and reading them back took; as a rule that of the first.
	LongestApplyMS float64 `json:"longest_apply_ms"`
	LastError      string  `json:"last_error,omitempty"`
}

// Memory is the agent's own memory, and the kernel's for its maps.
type Memory struct {
	ResidentBytes uint64 `json:"resident_bytes"`
	MapBytes      uint64 `json:"map_bytes"`
}

// Status says how the agent does.
func (a *Agent) Status() (Status, error) {
	s, err := a.status()
	if err != nil {
		return s, err
	}
	for i := range s.Layers { // not under the lock: it may have to look for namespaces
		if of := &s.Layers[i]; len(of.Drops) > 0 {
			of.Drops = a.spaces.label(of.Drops, a.picture().Pods)
		}
	}
	return s, nil
}

func (a *Agent) status() (Status, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := Status{
		Ready: a.ready, Node: a.config.Node, Version: a.config.Version, PID: os.Getpid(),
		Started: a.config.Started, AttachedAfterMS: float64(a.attached.Microseconds()) / 1000,
		Source:    SourceStatus{Name: a.config.SourceName, Error: a.sourceIs},
		Latency:   a.metrics.latency(),
		Problems:  []model.Problem{},
		KubeProxy: a.kubeProxyStatus(),
	}
	if a.config.KubeProxy != nil {
		s.Problems = append(s.Problems, a.config.KubeProxy.Problems...)
	}
	if a.sourceIs != "" {
		since := a.sourceLost
		s.Source.ErrorSince = &since
	}
	if now := a.snapshot; now != nil {
		s.Source.Unread = now.Unread
		s.Source.Snapshot, s.Source.Complete = now.Number, now.Complete
		s.Source.Received, s.Source.AgeSeconds = a.received, time.Since(a.received).Seconds()
		s.Source.Services, s.Source.Pods, s.Source.Nodes = len(now.Services), len(now.Pods), len(now.Nodes)
		s.Ignored = now.Ignored
		s.Problems = append(s.Problems, now.Problems...)
	}
	for _, p := range a.parts {
		description, err := p.Describe()
		if err != nil {
			return s, err
		}
		s.Layers = append(s.Layers, LayerStatus{description, p.done, p.failed, p.drifted, float64(p.longest.Microseconds()) / 1000, p.lastError})
		for _, m := range description.Maps {
			s.Memory.MapBytes += m.Bytes
		}
	}
	s.Memory.ResidentBytes = resident()
	return s, nil
}

// resident is this process's VmRSS (proc_pid_status(5)), 0 if unknown.
func resident() uint64 {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	_, after, _ := strings.Cut(string(data), "VmRSS:")
	fields := strings.Fields(after)
	if len(fields) == 0 {
		return 0
	}
	kilobytes, _ := strconv.ParseUint(fields[0], 10, 64)
	return kilobytes << 10
}

// listeners are the open sockets: the first is the status socket, the second,
// where there is one, for Prometheus.
type listeners struct {
	open    []net.Listener
	servers []*http.Server
}

func (l *listeners) close() {
	for _, listener := range l.open {
		listener.Close()
	}
}

// shutdown waits for answers that are being given, for a second.
func (l *listeners) shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, server := range l.servers {
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
	}
}

func socketIn(folder string) string { return filepath.Join(folder, "agent.sock") }

// listen opens the sockets. Nobody is answered before serve.
func (a *Agent) listen() (*listeners, error) {
	path := socketIn(a.config.RunFolder)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove old status socket: %w", err)
	}
	local, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("open status socket: %w", err)
	}
	l := &listeners{open: []net.Listener{local}}
	if err := os.Chmod(path, 0o600); err != nil {
		l.close()
		return nil, fmt.Errorf("open status socket: %w", err)
	}
	if a.config.Metrics == "" {
		return l, nil
	}
	remote, err := net.Listen("tcp", a.config.Metrics)
	if err != nil {
		l.close()
		return nil, fmt.Errorf("serve metrics on %s: %w: name another address with --metrics, or none", a.config.Metrics, err)
	}
	l.open = append(l.open, remote)
	return l, nil
}

func (l *listeners) serve(a *Agent) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		status, err := a.Status()
		answer(w, status, err)
	})
	mux.HandleFunc("GET /wanted/{layer}", func(w http.ResponseWriter, r *http.Request) {
		answerEach(w, a.wanted(r.PathValue("layer")), func(s layer.Subject) layer.Subject { return s })
	})
	mux.HandleFunc("GET /pods", func(w http.ResponseWriter, _ *http.Request) {
		answerEach(w, a.picture().Pods, podOfInterest)
	})
	mux.HandleFunc("GET /queries", func(w http.ResponseWriter, _ *http.Request) {
		var recent []resolver.Query
		if a.config.Queries != nil {
			recent = a.config.Queries()
		}
		answerEach(w, recent, func(q resolver.Query) resolver.Query { return q })
	})
	mux.HandleFunc("GET /nodes", func(w http.ResponseWriter, _ *http.Request) {
		answerEach(w, a.picture().Nodes, func(n *model.Node) *model.Node { return n })
	})
	for i, handler := range []http.Handler{mux, a.metrics.handler(a)}[:len(l.open)] {
		server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 1 << 14}
		l.servers = append(l.servers, server)
		go server.Serve(l.open[i]) // ends with shutdown
	}
}

func answer(w http.ResponseWriter, value any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(value)
}

// answerEach answers with an array, one element after the other: what a large
// cluster has is never in memory twice.
func answerEach[T any](w http.ResponseWriter, all []T, of func(T) T) {
	w.Header().Set("Content-Type", "application/json")
	encoder, before := json.NewEncoder(w), "["
	for _, one := range all {
		io.WriteString(w, before)
		before = ","
		if encoder.Encode(of(one)) != nil {
			return // who asked is gone
		}
	}
	if len(all) == 0 {
		io.WriteString(w, before)
	}
	io.WriteString(w, "]")
}

// podOfInterest is what commands ask of a pod: whose an address is, and what it
// asks of millrace.
func podOfInterest(pod *model.Pod) *model.Pod {
	some := &model.Pod{Name: pod.Name, Node: pod.Node, Addresses: pod.Addresses, HostNetwork: pod.HostNetwork}
	for name, value := range pod.Annotations {
		if strings.HasPrefix(name, "millrace.io/") {
			if some.Annotations == nil {
				some.Annotations = map[string]string{}
			}
			some.Annotations[name] = value
		}
	}
	return some
}

// picture is the Snapshot in force, an empty one at first.
func (a *Agent) picture() *model.Snapshot {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.snapshot == nil {
		return &model.Snapshot{}
	}
	return a.snapshot
}

// wanted are the objects of a layer's plan, with the names that the kernel does
// not know.
func (a *Agent) wanted(name string) []layer.Subject {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.parts {
		if p.Name() == name && p.want != nil {
			return p.want.Subjects()
		}
	}
	return []layer.Subject{}
}

// askPatience is how long an agent may take to answer.
const askPatience = 5 * time.Second

// Ask reads from the agent of a run folder: path is "/status" (into a *Status),
// "/wanted/LAYER" (into a slice of the layer's subjects), "/queries" (into a slice of
// resolver.Query), or "/pods" and "/nodes" (into slices of model's; a pod has no labels and ports then, and of annotations
// those of millrace.io).
func Ask(ctx context.Context, folder, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socketIn(folder))
	}}}
	defer client.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("ask the agent at %s: %w", socketIn(folder), err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 1<<12))
		return fmt.Errorf("ask the agent at %s: %s", socketIn(folder), strings.TrimSpace(string(text)))
	}
	return json.NewDecoder(response.Body).Decode(into)
}
