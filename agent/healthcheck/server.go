package healthcheck

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/millrace/millrace/kernel/netns"
)

// Server listens as it was last told. Its zero value listens nowhere.
type Server struct {
	// Netns is the path of the node's network namespace; empty for this process's.
	Netns string
	Log   *slog.Logger

	mu   sync.Mutex
	open map[place]*listening
	// refused are listeners that could not be opened, and why.
	refused map[place]State
}

type place struct {
	network string
	address netip.AddrPort
}

// listening is an open listener. Who answers can be exchanged.
type listening struct {
	state  State
	answer atomic.Pointer[http.Handler]
	server *http.Server
}

// State is one listener for status.
type State struct {
	Address string `json:"address"`
	For     string `json:"for"`
	// Error is why it does not listen; it is tried again.
	Error string `json:"error,omitempty"`
}

// Bring makes these the listeners, and says which could not be opened. What is
// open and still wanted is not closed; what was refused is tried again by the next
// Bring. What cannot be opened is logged when that is new.
func (s *Server) Bring(want []Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := map[place]bool{}
	for _, l := range want {
		wanted[place{l.Network, l.Address}] = true
	}
	for at, l := range s.open {
		if !wanted[at] {
			l.server.Close()
			delete(s.open, at)
		}
	}
	before := s.refused
	s.refused = map[place]State{}
	taken := map[place]string{}
	var all []error
	for _, l := range want {
		at := place{l.Network, l.Address}
		err := error(nil)
		if other, twice := taken[at]; twice {
			err = fmt.Errorf("listen at %s for %s: it is taken for %s: give one of them another port", l.Address, l.For, other)
		} else {
			taken[at] = l.For
			err = s.put(at, l)
		}
		if err == nil {
			continue
		}
		all = append(all, err)
		s.refused[at] = State{l.Address.String(), l.For, err.Error()}
		if before[at].Error != err.Error() {
			s.Log.Warn("a port is not answered, and is tried again", "error", err)
		}
	}
	return errors.Join(all...)
}

// put opens a listener, or has an open one answer anew.
func (s *Server) put(at place, l Listener) error {
	if now := s.open[at]; now != nil {
		now.state.For = l.For
		now.answer.Store(&l.Handler)
		return nil
	}
	var listener net.Listener
	err := netns.In(s.Netns, func() (err error) {
		listener, err = net.Listen(at.network, at.address.String())
		return err
	})
	if err != nil {
		var cause *net.OpError
		if errors.As(err, &cause) {
			err = cause.Err
		}
		return fmt.Errorf("listen at %s for %s: %w: if a kube-proxy runs here, end it or leave out --kube-proxy-ports", at.address, l.For, err)
	}
	if s.open == nil {
		s.open = map[place]*listening{}
	}
	now := &listening{state: State{Address: at.address.String(), For: l.For}}
	now.answer.Store(&l.Handler)
	now.server = &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*now.answer.Load()).ServeHTTP(w, r) }),
		ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 1 << 14,
		ErrorLog: slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug), // strangers' bad requests
	}
	s.open[at] = now
	go now.server.Serve(listener) // ends with Close
	return nil
}

// States are all listeners, those that could not be opened too, sorted.
func (s *Server) States() (all []State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.open {
		all = append(all, l.state)
	}
	for _, state := range s.refused {
		all = append(all, state)
	}
	slices.SortFunc(all, func(a, b State) int {
		return cmp.Or(cmp.Compare(a.Address, b.Address), cmp.Compare(a.For, b.For))
	})
	return all
}

// Close ends all listeners.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.open {
		l.server.Close()
	}
	s.open, s.refused = nil, nil
}
