package kube

import (
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/source/kube/kubetest"
)

// A connection on which nothing comes any more, without a word that it is gone, as when a
// node is cut off: how long Heard takes it for one that is well. The DNS layer counts on it.
func TestSilentServerIsNoticed(t *testing.T) {
	if os.Getenv("MILLRACE_LONG") == "" {
		t.Skip("set MILLRACE_LONG=1 to run it")
	}
	b := &bed{Server: kubetest.New(), t: t}
	web := httptest.NewUnstartedServer(b.Server)
	web.EnableHTTP2 = true // as API servers have it
	web.StartTLS()
	t.Cleanup(web.CloseClientConnections)
	at, mute := muted(t, web.Listener.Addr().String())
	config := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://%s", insecure-skip-tls-verify: true}}]
users: [{name: u, user: {token: secret}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, at)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if b.source, err = Open(Settings{Kubeconfig: config, Node: "n1"}); err != nil {
		t.Fatal(err)
	}
	b.apply(service("web", "10.96.0.2") + slice("web", "10.244.1.1"))
	b.run()
	b.watched()
	time.Sleep(time.Second) // what was sent has come
	begun := time.Now()
	mute()
	for time.Since(b.source.Heard()) < time.Second {
		if time.Since(begun) > 2*time.Minute {
			t.Fatal("two minutes of silence were not noticed")
		}
		time.Sleep(10 * time.Millisecond)
	}
	took := b.source.Heard().Sub(begun)
	t.Logf("noticed after %v", took.Round(100*time.Millisecond))
	if took > 50*time.Second {
		t.Errorf("docs/dns.md says 45 s")
	}
}

// muted passes connections on to a server, until mute is called: then bytes get lost, and
// nobody is told.
func muted(t *testing.T, to string) (at string, mute func()) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	silent := make(chan struct{})
	pass := func(from, to net.Conn) {
		bytes := make([]byte, 1<<14)
		for {
			n, err := from.Read(bytes)
			select {
			case <-silent:
				_, _ = io.Copy(io.Discard, from)
				return
			default:
			}
			if err != nil {
				to.Close()
				return
			}
			if _, err := to.Write(bytes[:n]); err != nil {
				return
			}
		}
	}
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				near.Close()
				continue
			}
			t.Cleanup(func() { near.Close(); far.Close() })
			go pass(near, far)
			go pass(far, near)
		}
	}()
	return listener.Addr().String(), sync.OnceFunc(func() { close(silent) })
}
