package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The protocols of client work.
const (
	ProtoTCP  = "tcp"
	ProtoUDP  = "udp"    // from a connected socket
	ProtoSend = "sendto" // UDP from a socket that is not connected
	ProtoHTTP = "http"
	ProtoGRPC = "grpc" // Check of the health service, over HTTP/2 without TLS
)

// CallRequest asks a pod to call somebody.
type CallRequest struct {
	// Proto is one of the Proto constants; empty is tcp.
	Proto string `json:"proto"`
	// Target is "address:port", an IPv6 address in brackets.
	Target string `json:"target"`
	// Count is how many calls, one after the other, each on a new connection;
	// 0 is one.
	Count int `json:"count,omitempty"`
	// Timeout of each call in milliseconds; 0 is two seconds.
	Timeout int `json:"timeout_ms,omitempty"`
}

// Answer is the outcome of one call.
type Answer struct {
	// Pod that answered, "namespace/name", and its node.
	Pod  string `json:"pod,omitempty"`
	Node string `json:"node,omitempty"`
	// Peer is the far end's address as the client's socket sees it.
	Peer string `json:"peer,omitempty"`
	// Error and its Kind (one of the Failure constants), empty on success.
	Error string `json:"error,omitempty"`
	Kind  string `json:"kind,omitempty"`
	// Micros is how long it took from connect to the answer, in microseconds.
	Micros int64 `json:"us"`
}

// The kinds of failures, in the words of errno(3) where there is one.
const (
	FailureRefused     = "refused"
	FailureReset       = "reset"
	FailureTimeout     = "timeout"
	FailureUnreachable = "unreachable"
	FailureClosed      = "closed"
	FailureWrong       = "wrong answer"
	FailureBusy        = "too many in flight"
	FailureOther       = "other"
)

// errWrong is an answer that does not hold what was sent.
var errWrong = errors.New("wrong answer")

// kindOf sorts an error into a Failure constant.
func kindOf(err error) string {
	var timeout net.Error
	switch {
	case err == nil:
		return ""
	case errors.Is(err, errWrong):
		return FailureWrong
	case errors.Is(err, syscall.ECONNREFUSED):
		return FailureRefused
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNABORTED):
		return FailureReset
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EPERM):
		return FailureUnreachable
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return FailureClosed
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return FailureTimeout
	}
	return FailureOther
}

// nonce makes each request different, so that an answer to another one is
// noticed.
var nonce atomic.Uint64

// call does one call on a new connection.
func call(proto, target string, timeout time.Duration) Answer {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var a Answer
	var err error
	start := time.Now()
	switch proto {
	case "", ProtoTCP, ProtoUDP, ProtoSend:
		err = callOnce(ctx, proto, target, &a)
	case ProtoHTTP, ProtoGRPC:
		err = callHTTP(ctx, proto, target, &a)
	default:
		err = fmt.Errorf("unknown protocol %q: use tcp, udp, sendto, http or grpc", proto)
	}
	a.Micros = time.Since(start).Microseconds()
	if err != nil {
		a.Error, a.Kind = err.Error(), kindOf(err)
	}
	return a
}

// callOnce asks once on a connection of its own.
func callOnce(ctx context.Context, proto, target string, a *Answer) error {
	conn, err := dial(ctx, proto, target)
	if err != nil {
		return err
	}
	defer conn.Close()
	return ask(ctx, conn, a)
}

// dial connects, or makes a socket that sends without.
func dial(ctx context.Context, proto, target string) (net.Conn, error) {
	switch proto {
	case ProtoSend:
		return newSender(target)
	case ProtoUDP:
		return new(net.Dialer).DialContext(ctx, "udp", target)
	}
	return new(net.Dialer).DialContext(ctx, "tcp", target)
}

// sender is a UDP socket that is not connected and talks to one address: what
// comes from elsewhere is a wrong answer.
type sender struct {
	*net.UDPConn
	to netip.AddrPort
}

func newSender(target string) (*sender, error) {
	to, err := netip.ParseAddrPort(target)
	if err != nil {
		return nil, err
	}
	network := "udp4"
	if to.Addr().Is6() {
		network = "udp6"
	}
	conn, err := net.ListenUDP(network, nil)
	return &sender{conn, to}, err
}

func (s *sender) Write(datagram []byte) (int, error) { return s.WriteToUDPAddrPort(datagram, s.to) }

func (s *sender) Read(datagram []byte) (int, error) {
	n, from, err := s.ReadFromUDPAddrPort(datagram)
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if err == nil && from != s.to {
		err = fmt.Errorf("%w: asked %s, answered by %s", errWrong, s.to, from)
	}
	return n, err
}

func (s *sender) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(s.to) }

// ask sends one request on a connection and checks the answer.
func ask(ctx context.Context, conn net.Conn, a *Answer) error {
	a.Peer = conn.RemoteAddr().String()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	request := fmt.Sprintf("request-%d\n", nonce.Add(1))
	if _, err := io.WriteString(conn, request); err != nil {
		return err
	}
	buffer := make([]byte, 512)
	for have := 0; ; {
		n, err := conn.Read(buffer[have:])
		if err != nil {
			return err
		}
		if have += n; buffer[have-1] == '\n' || have == len(buffer) {
			return check(string(buffer[:have]), request, a)
		}
	}
}

// check takes "pod node request" apart and compares the request.
func check(answer, request string, a *Answer) error {
	pod, rest, _ := strings.Cut(answer, " ")
	node, echo, ok := strings.Cut(rest, " ")
	if !ok || echo != request {
		return fmt.Errorf("%w: sent %q, got %q", errWrong, request, answer)
	}
	a.Pod, a.Node = pod, node
	return nil
}

// callHTTP asks over HTTP/1.1, or gRPC's health service over HTTP/2.
func callHTTP(ctx context.Context, proto, target string, a *Answer) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(proto == ProtoHTTP)
	protocols.SetUnencryptedHTTP2(proto == ProtoGRPC)
	transport := &http.Transport{Protocols: protocols, DisableKeepAlives: proto == ProtoHTTP}
	defer transport.CloseIdleConnections()
	transport.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err == nil {
			a.Peer = conn.RemoteAddr().String()
		}
		return conn, err
	}
	if proto == ProtoGRPC {
		return callGRPC(ctx, transport, target, a)
	}
	path := fmt.Sprintf("/request-%d", nonce.Add(1))
	request, err := http.NewRequestWithContext(ctx, "GET", "http://"+target+path, nil)
	if err != nil {
		return err
	}
	body, err := roundTrip(transport, request)
	if err != nil {
		return err
	}
	return check(string(body), path+"\n", a)
}

func callGRPC(ctx context.Context, transport *http.Transport, target string, a *Answer) error {
	request, err := http.NewRequestWithContext(ctx, "POST", "http://"+target+healthCheck, strings.NewReader(grpcEmpty))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("Te", "trailers")
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 4096))
	if err != nil {
		return err
	}
	if status := response.Trailer.Get("Grpc-Status"); status != "0" || string(body) != grpcServing {
		return fmt.Errorf("%w: grpc-status %q, body %q", errWrong, status, body)
	}
	a.Pod = response.Header.Get("X-Millrace-Pod")
	return nil
}

func roundTrip(transport *http.Transport, request *http.Request) ([]byte, error) {
	response, err := transport.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%w: HTTP status %s", errWrong, response.Status)
	}
	return io.ReadAll(io.LimitReader(response.Body, 4096))
}

// ending tells the loads that run that they are to end.
type ending struct {
	mu  sync.Mutex
	end chan struct{}
}

func (e *ending) told() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.end
}

func (e *ending) tell() {
	e.mu.Lock()
	defer e.mu.Unlock()
	close(e.end)
	e.end = make(chan struct{})
}

// workHandler is what a pod does on its unix socket: POST /call, /load and
// /load/end.
func workHandler() http.Handler {
	mux := http.NewServeMux()
	loads := &ending{end: make(chan struct{})}
	mux.HandleFunc("POST /load/end", func(w http.ResponseWriter, _ *http.Request) {
		loads.tell()
		writeJSON(w, struct{}{})
	})
	mux.HandleFunc("POST /call", func(w http.ResponseWriter, r *http.Request) {
		var request CallRequest
		if !readJSON(w, r, &request) {
			return
		}
		answers := make([]Answer, max(1, request.Count))
		for i := range answers {
			if r.Context().Err() != nil {
				return
			}
			answers[i] = call(request.Proto, request.Target, millis(request.Timeout))
		}
		writeJSON(w, answers)
	})
	mux.HandleFunc("POST /load", func(w http.ResponseWriter, r *http.Request) {
		var request LoadRequest
		if !readJSON(w, r, &request) {
			return
		}
		result, err := runLoad(r.Context(), request, loads.told())
		if err != nil {
			writeError(w, http.StatusBadRequest, err)
			return
		}
		writeJSON(w, result)
	})
	return mux
}

func millis(n int) time.Duration {
	if n <= 0 {
		return 2 * time.Second
	}
	return time.Duration(n) * time.Millisecond
}

// controlError is how an error crosses a unix socket.
type controlError struct {
	Error string `json:"error"`
}

func readJSON(w http.ResponseWriter, r *http.Request, into any) bool {
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(into); err != nil {
		writeError(w, http.StatusBadRequest, fmt.Errorf("read request: %w", err))
		return false
	}
	return true
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

func writeError(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(controlError{err.Error()})
}

// postJSON asks over a unix socket and decodes the answer into out.
func postJSON(ctx context.Context, socket, method, path string, in, out any) error {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://lab"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	decoder := json.NewDecoder(bufio.NewReader(response.Body))
	if response.StatusCode >= 400 {
		var failure controlError
		if err := decoder.Decode(&failure); err != nil {
			return fmt.Errorf("HTTP status %s", response.Status)
		}
		return errors.New(failure.Error)
	}
	if out == nil {
		return nil
	}
	return decoder.Decode(out)
}
