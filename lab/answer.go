package lab

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	maxConns     = 4096                   // open TCP connections of one pod; more are closed at once
	idleLimit    = 5 * time.Minute        // a silent TCP connection is closed after this
	lineLimit    = 4096                   // bytes of a TCP request without a newline
	linePatience = 200 * time.Millisecond // how long a request may take to reach its newline
)

// answerer answers on every port of a pod with the pod's name. Its TCP side
// tells the protocols apart by the first bytes of the client, which always
// speaks first.
type answerer struct {
	pod, node string
	slots     chan struct{}
	// http is started by the first HTTP connection: most pods never see one.
	httpOnce sync.Once
	http     *handoff
}

func newAnswerer(spec *podSpec) *answerer {
	return &answerer{pod: spec.Name.String(), node: spec.Node, slots: make(chan struct{}, maxConns)}
}

// identity is what every answer starts with: "namespace/pod node ".
func (a *answerer) identity() string { return a.pod + " " + a.node + " " }

// serveUDP answers each datagram with the identity and the datagram.
func (a *answerer) serveUDP(conn *net.UDPConn) {
	head := len(a.identity())
	buffer := make([]byte, head+65536)
	copy(buffer, a.identity())
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buffer[head:])
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an earlier answer
		}
		conn.WriteToUDPAddrPort(buffer[:min(head+n, 65507)], from)
	}
}

func (a *answerer) serveTCP(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors: let some close
			time.Sleep(10 * time.Millisecond)
			continue
		}
		select {
		case a.slots <- struct{}{}:
			go a.converse(&slotConn{Conn: conn, release: sync.OnceFunc(func() { <-a.slots })})
		default:
			conn.Close()
		}
	}
}

// slotConn gives its place among the pod's connections back when it closes.
type slotConn struct {
	net.Conn
	release func()
}

func (c *slotConn) Close() error {
	c.release()
	return c.Conn.Close()
}

// converse finds out what the client speaks and answers in it.
func (a *answerer) converse(conn net.Conn) {
	conn.SetReadDeadline(time.Now().Add(idleLimit))
	reader := bufio.NewReaderSize(conn, lineLimit)
	if isHTTP(conn, reader) {
		conn.SetReadDeadline(time.Time{})
		a.httpOnce.Do(a.startHTTP)
		a.http.conns <- &peekedConn{Conn: conn, reader: reader}
		return
	}
	defer conn.Close()
	for {
		conn.SetReadDeadline(time.Now().Add(idleLimit))
		request, err := readRequest(conn, reader)
		if err != nil {
			return
		}
		if _, err := conn.Write(append([]byte(a.identity()), request...)); err != nil {
			return
		}
	}
}

// readRequest reads a line or, from a client that sends no newline, what has
// come when it pauses. The slice is valid until the next call.
func readRequest(conn net.Conn, reader *bufio.Reader) ([]byte, error) {
	if _, err := reader.Peek(1); err != nil {
		return nil, err
	}
	conn.SetReadDeadline(time.Now().Add(linePatience))
	line, err := reader.ReadSlice('\n')
	if err == nil || errors.Is(err, bufio.ErrBufferFull) || len(line) > 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		return line, nil
	}
	if errors.Is(err, io.EOF) && len(line) > 0 { // the client half-closed: it still wants its answer
		return line, nil
	}
	return nil, err
}

// methods are the beginnings of HTTP requests; PRI is that of HTTP/2 (RFC 9113, 3.4).
var methods = []string{"GET ", "HEAD", "POST", "PUT ", "PATC", "DELE", "OPTI", "PRI "}

// isHTTP looks at the first four bytes without taking them. A client that has
// sent fewer, and pauses, does not speak HTTP.
func isHTTP(conn net.Conn, reader *bufio.Reader) bool {
	if _, err := reader.Peek(1); err != nil {
		return false
	}
	conn.SetReadDeadline(time.Now().Add(linePatience))
	for n := 1; n <= 4; n++ {
		start, err := reader.Peek(n)
		if err != nil {
			return false
		}
		known := false
		for _, m := range methods {
			known = known || strings.HasPrefix(m, string(start))
		}
		if !known {
			return false
		}
	}
	return true
}

// peekedConn gives back what was read while guessing the protocol.
type peekedConn struct {
	net.Conn
	reader *bufio.Reader
}

func (c *peekedConn) Read(p []byte) (int, error) { return c.reader.Read(p) }

// handoff is a listener whose connections come from elsewhere in the process.
type handoff struct {
	conns chan net.Conn
	addr  net.Addr
}

func (h *handoff) Accept() (net.Conn, error) { return <-h.conns, nil }
func (h *handoff) Close() error              { return nil }
func (h *handoff) Addr() net.Addr            { return h.addr }

func (a *answerer) startHTTP() {
	a.http = &handoff{conns: make(chan net.Conn), addr: &net.TCPAddr{}}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler:           a,
		Protocols:         protocols,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       idleLimit,
		MaxHeaderBytes:    64 << 10,
	}
	go server.Serve(a.http)
}

// httpAnswer is the answer to an HTTP request that accepts JSON.
type httpAnswer struct {
	Pod  string `json:"pod"`
	Node string `json:"node"`
	Path string `json:"path"`
}

// ServeHTTP answers any path: as JSON if the client accepts it, as the line
// "namespace/pod node path" otherwise, and the gRPC health service's Check.
func (a *answerer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Millrace-Pod", a.pod)
	if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		answerGRPC(w, r)
		return
	}
	if strings.Contains(r.Header.Get("Accept"), "json") {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(httpAnswer{a.pod, a.node, r.URL.RequestURI()})
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintln(w, a.identity()+r.URL.RequestURI())
}

const (
	healthCheck = "/grpc.health.v1.Health/Check"
	// grpcServing is a gRPC frame (uncompressed, two bytes) around a
	// HealthCheckResponse whose field 1, status, is 1, SERVING.
	grpcServing = "\x00\x00\x00\x00\x02\x08\x01"
	// grpcEmpty is a frame around an empty HealthCheckRequest.
	grpcEmpty = "\x00\x00\x00\x00\x00"
)

// answerGRPC answers Check of gRPC's health protocol (grpc.health.v1) for any
// service name with SERVING, and every other method with UNIMPLEMENTED.
func answerGRPC(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, io.LimitReader(r.Body, 64<<10))
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Trailer", "Grpc-Status, Grpc-Message")
	if r.URL.Path != healthCheck {
		w.WriteHeader(http.StatusOK)
		w.Header().Set("Grpc-Status", "12")
		w.Header().Set("Grpc-Message", "this pod answers "+healthCheck+" only")
		return
	}
	io.WriteString(w, grpcServing)
	w.Header().Set("Grpc-Status", "0")
}
