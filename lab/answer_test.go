package lab

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/millrace/millrace/model"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

func lockThread() { runtime.LockOSThread() }

// answering is a pod's TCP side on a loopback port.
func answering(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	a := newAnswerer(&podSpec{Name: model.Name{Namespace: "shop", Name: "web-1"}, Node: "n1"})
	go a.serveTCP(listener)
	return listener.Addr().String()
}

// TestRawAnswers sends bytes in every way a client may.
func TestRawAnswers(t *testing.T) {
	target := answering(t)
	for _, c := range []struct {
		what, send string
		halfClose  bool
	}{
		{"a line", "hello\n", false},
		{"two bytes without a newline", "hi", false},
		{"a line, half-closed", "hello\n", true},
		{"bytes, half-closed", "GE", true},
		{"what begins like HTTP", "GETTING on\n", false},
		{"bytes that are no text", "\x00\xff\x80", false},
	} {
		conn, err := net.Dial("tcp", target)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, c.send)
		if c.halfClose {
			conn.(*net.TCPConn).CloseWrite()
		}
		want := "shop/web-1 n1 " + c.send
		got := make([]byte, len(want))
		conn.SetDeadline(time.Now().Add(time.Minute))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v; want %q", c.what, got, err, want)
		}
		conn.Close()
	}
}

func TestHTTPAnswers(t *testing.T) {
	target := answering(t)
	for accept, want := range map[string]string{
		"text/plain":       "shop/web-1 n1 /any/path?x=1\n",
		"application/json": `{"pod":"shop/web-1","node":"n1","path":"/any/path?x=1"}` + "\n",
	} {
		request, err := http.NewRequest("GET", "http://"+target+"/any/path?x=1", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Accept", accept)
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || string(body) != want {
			t.Errorf("accepting %s: %q, %v; want %q", accept, body, err, want)
		}
	}
}

// TestGRPCAnswers asks with the client that everybody uses.
func TestGRPCAnswers(t *testing.T) {
	conn, err := grpc.NewClient(answering(t), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client := healthpb.NewHealthClient(conn)
	answer, err := client.Check(ctx, &healthpb.HealthCheckRequest{Service: "any"})
	if err != nil || answer.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("Check: %v, %v", answer, err)
	}
	if _, err := client.List(ctx, &healthpb.HealthListRequest{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("List: %v, want UNIMPLEMENTED", err)
	}
}

// TestUDPAnswersFromTheAddressAsked binds two addresses to one port: a socket
// bound to all would answer from the first, whichever was asked.
func TestUDPAnswersFromTheAddressAsked(t *testing.T) {
	spec := &podSpec{Name: model.Name{Namespace: "shop", Name: "dns-1"}, Node: "n1", OwnNamespace: true,
		Addresses: addrs("127.0.0.1", "127.0.0.2", "::1")}
	free, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(free.LocalAddr().(*net.UDPAddr).Port)
	free.Close()
	if err := servePort(spec, newAnswerer(spec), model.ContainerPort{Protocol: model.UDP, Port: port}); err != nil {
		t.Fatal(err)
	}
	for _, addr := range spec.Addresses {
		target := netip.AddrPortFrom(addr, port).String()
		if a := call(ProtoSend, target, time.Minute); a.Error != "" || a.Pod != "shop/dns-1" {
			t.Errorf("asked at %s: %+v", target, a)
		}
	}
}

// TestAWrongAnswerIsNoticed lets somebody answer who is no pod.
func TestAWrongAnswerIsNoticed(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 512))
			io.WriteString(conn, "shop/web-1 n1 request-of-another\n")
			conn.Close()
		}
	}()
	a := call(ProtoTCP, listener.Addr().String(), time.Minute)
	if a.Kind != FailureWrong || !strings.Contains(a.Error, "request-of-another") {
		t.Errorf("got %+v, want a wrong answer", a)
	}
}

func TestLogsStayBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.log")
	log, err := appendLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	line := strings.Repeat("x", 99) + "\n"
	for range 2 * logLimit / len(line) {
		if _, err := io.WriteString(log, line); err != nil {
			t.Fatal(err)
		}
	}
	trimLog(path)
	io.WriteString(log, "the last line\n")
	text, err := os.ReadFile(path)
	if err != nil || len(text) != logLimit/4+len("the last line\n") || !strings.HasSuffix(string(text), "x\nthe last line\n") {
		t.Errorf("after the cut: %d bytes, %v", len(text), err)
	}
}
