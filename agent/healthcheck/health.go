package healthcheck

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// patience is how long a change may wait to be in the kernel before the proxy
// counts as ill: kube-proxy's two periods of 30 seconds.
const patience = time.Minute

// Health knows whether the proxy does well. The zero value has brought nothing
// into the kernel yet.
type Health struct {
	mu sync.Mutex
	// pending is when the oldest change came that is not in the kernel; zero for none.
	pending time.Time
	// updated is when all that was asked for was in the kernel last.
	updated time.Time
	// serving: Services are in the kernel, by this process or the one before.
	serving bool
	// leaving: new traffic shall go to other nodes.
	leaving bool
}

// Asked says that a change came in.
func (h *Health) Asked() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pending.IsZero() {
		h.pending = time.Now()
	}
}

// Done says that all that was asked for is in the kernel; serving, that this is
// the whole of a cluster. Once serving it stays so.
func (h *Health) Done(serving bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pending, h.updated = time.Time{}, time.Now()
	h.serving = h.serving || serving
}

// TookOver says that another process has left Services in the kernel.
func (h *Health) TookOver() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.serving = true
}

// Leaving says whether the node is about to go, or has gone from the cluster.
func (h *Health) Leaving(leaving bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.leaving = leaving
}

// Well says whether changes get into the kernel.
func (h *Health) Well() bool { return h.state(time.Now()).Healthy }

// Ready says why Services cannot be relied on here; nil where they are in the kernel
// and follow the cluster. A cluster that cannot be reached is no reason.
func (h *Health) Ready() error {
	s := h.state(time.Now())
	switch {
	case !s.serving:
		return errors.New("the cluster's Services are not in the kernel yet")
	case !s.Healthy:
		return fmt.Errorf("a change is not in the kernel after %v: see millrace status", patience)
	}
	return nil
}

// state has the fields of kube-proxy's answer.
type state struct {
	LastUpdated  time.Time         `json:"lastUpdated"`
	CurrentTime  time.Time         `json:"currentTime"`
	NodeEligible *bool             `json:"nodeEligible,omitempty"`
	Healthy      bool              `json:"healthy"`
	Status       map[string]family `json:"status,omitempty"`

	serving, leaving bool
}

type family struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

func (h *Health) state(now time.Time) state {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := state{LastUpdated: h.updated, CurrentTime: now, serving: h.serving, leaving: h.leaving}
	s.Healthy = h.pending.IsZero() || now.Sub(h.pending) < patience
	if !h.updated.IsZero() { // both families are brought into the kernel at once
		one := family{h.updated, s.Healthy}
		s.Status = map[string]family{"IPv4": one, "IPv6": one}
	}
	if s.Healthy {
		// As kube-proxy has it: recent while all is well, also when nothing changes.
		s.LastUpdated = now
	}
	return s
}

// Healthz is for load balancers: may the node be sent traffic? Beyond kube-proxy's
// answer it is no before any Service is in the kernel. counted is called with the
// status code.
func (h *Health) Healthz(counted func(code int)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s := h.state(time.Now())
		eligible := !s.leaving
		s.NodeEligible = &eligible
		tell(w, s, s.Healthy && eligible && s.serving, counted)
	})
}

// Livez is for whoever would restart the proxy: do changes get into the kernel?
func (h *Health) Livez(counted func(code int)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		s := h.state(time.Now())
		tell(w, s, s.Healthy, counted)
	})
}

func tell(w http.ResponseWriter, s state, good bool, counted func(code int)) {
	code := http.StatusOK
	if !good {
		code = http.StatusServiceUnavailable
	}
	counted(code)
	reply(w, good, s)
}
