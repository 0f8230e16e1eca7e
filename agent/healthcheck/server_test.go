package healthcheck

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// node is a network namespace with an address beside loopback.
func node(t *testing.T, address string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a network namespace")
	}
	path := filepath.Join(t.TempDir(), "node")
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netns.Remove(path) })
	n, err := link.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	index, err := n.Index("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.Addr(index, netip.MustParsePrefix(address)), n.UpLoopback()); err != nil {
		t.Fatal(err)
	}
	return path
}

type book struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *book) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *book) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// ask asks an address in a namespace; the answer is "200 text", or why there is
// none.
func ask(path, address string) string {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(_ context.Context, network, address string) (conn net.Conn, err error) {
		err = netns.Do(path, func() error { conn, err = net.Dial(network, address); return err })
		return conn, err
	}}}
	response, err := client.Get("http://" + address + "/")
	if err != nil {
		return "none"
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	return fmt.Sprint(response.StatusCode, " ", string(body))
}

func says(text string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) })
}

func listener(network, address, text string) Listener {
	return Listener{network, netip.MustParseAddrPort(address), "the check of " + text, says(text)}
}

// Ports come and go as Services do; who answers changes without a connection being
// refused; a port that somebody else has is named and taken as soon as it is free.
func TestServerIsBroughtToWhatIsWanted(t *testing.T) {
	path := node(t, "192.0.2.7/32")
	var log book
	s := &Server{Netns: path, Log: slog.New(slog.NewTextHandler(&log, nil))}
	t.Cleanup(s.Close)
	expect := func(address, want string) {
		t.Helper()
		if got := ask(path, address); got != want {
			t.Errorf("%s: %q, want %q", address, got, want)
		}
	}
	bring := func(want ...Listener) error { return s.Bring(want) }

	if err := bring(listener("tcp4", "0.0.0.0:30100", "web"), listener("tcp6", "[::]:30100", "web6"), listener("tcp4", "192.0.2.7:30101", "dns")); err != nil {
		t.Fatal(err)
	}
	expect("127.0.0.1:30100", "200 web")
	expect("[::1]:30100", "200 web6")
	expect("192.0.2.7:30101", "200 dns")
	expect("127.0.0.1:30101", "none")
	if c, err := net.Dial("tcp", "127.0.0.1:30100"); err == nil {
		c.Close()
		t.Error("it listens outside the node's namespace")
	}

	var foreign net.Listener
	if err := netns.Do(path, func() (err error) { foreign, err = net.Listen("tcp4", "0.0.0.0:30102"); return err }); err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	want := []Listener{listener("tcp4", "0.0.0.0:30100", "new"), listener("tcp4", "0.0.0.0:30102", "late"), listener("tcp4", "0.0.0.0:30100", "twin")}
	for range 3 {
		err := bring(want...)
		for _, part := range []string{
			"listen at 0.0.0.0:30102 for the check of late: bind: address already in use: if a kube-proxy runs here",
			"listen at 0.0.0.0:30100 for the check of twin: it is taken for the check of new",
		} {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%v, want %s", err, part)
			}
		}
	}
	expect("127.0.0.1:30100", "200 new")
	expect("192.0.2.7:30101", "none")
	if n := strings.Count(log.String(), "30102"); n != 1 {
		t.Errorf("said %d times:\n%s", n, &log)
	}
	states := s.States()
	if len(states) != 3 || states[0].Error+states[0].For != "the check of new" || states[1].Error == "" || states[2].Error == "" {
		t.Errorf("%+v", states)
	}

	foreign.Close()
	if err := bring(want[:2]...); err != nil {
		t.Error(err)
	}
	expect("127.0.0.1:30102", "200 late")
	s.Close()
	expect("127.0.0.1:30100", "none")
	if states := s.States(); len(states) > 0 {
		t.Errorf("%+v", states)
	}
}

// The addresses are those of the node, not of whoever asks.
func TestAddressesOfTheNode(t *testing.T) {
	has, err := Addresses(node(t, "192.0.2.7/32"))
	if err != nil || fmt.Sprint(has) != "[127.0.0.1 192.0.2.7 ::1]" {
		t.Errorf("%v, %v", has, err)
	}
	if _, err := Addresses("/absent"); err == nil {
		t.Error("a namespace that does not exist has addresses")
	}
	if has, err := Addresses(""); err != nil || len(has) == 0 {
		t.Errorf("here: %v, %v", has, err)
	}
}
