package service

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// street is a bed in which the layer is on.
type street struct {
	*layertest.Bed
	t     *testing.T
	layer *Layer
	have  layer.Picture
}

func newStreet(t *testing.T, snapshot *model.Snapshot) *street {
	bed := layertest.NewBed(t)
	s := &street{Bed: bed, t: t, layer: New(Settings{Cgroup: bed.Cgroup, Pins: filepath.Join(bed.BPF, "service")})}
	if err := s.layer.Open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.layer.Close()
		if _, err := New(s.layer.settings).Remove(); err != nil {
			t.Error(err)
		}
	})
	var err error
	if s.have, err = s.layer.Read(); err != nil {
		t.Fatal(err)
	}
	s.become(snapshot)
	return s
}

// become makes the kernel hold another cluster.
func (s *street) become(snapshot *model.Snapshot) {
	s.t.Helper()
	var err error
	s.have, _, err = s.layer.Apply(s.have, s.layer.Plan(snapshot), s.layer.Diff(s.have, s.layer.Plan(snapshot), true))
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *street) reason(name string) uint64 {
	s.t.Helper()
	d, err := s.layer.Describe()
	if err != nil {
		s.t.Fatal(err)
	}
	return d.Reasons[name]
}

// serve answers on each address with that address until the test ends.
func serve(t *testing.T, bed *layertest.Bed, network string, addresses ...string) {
	t.Helper()
	for _, address := range addresses {
		err := bed.Inside(func() error {
			if network == "tcp" {
				listener, err := net.Listen("tcp", address)
				if err != nil {
					return err
				}
				t.Cleanup(func() { listener.Close() })
				go func() {
					for {
						conn, err := listener.Accept()
						if err != nil {
							return
						}
						fmt.Fprintln(conn, address)
						conn.Close()
					}
				}()
				return nil
			}
			conn, err := net.ListenPacket("udp", address)
			if err != nil {
				return err
			}
			t.Cleanup(func() { conn.Close() })
			go func() {
				buffer := make([]byte, 64)
				for {
					_, from, err := conn.ReadFrom(buffer)
					if err != nil {
						return
					}
					conn.WriteTo([]byte(address), from)
				}
			}()
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

const patience = 20 * time.Second

// ask connects from inside the bed, returns who answered and what the kernel
// says the peer is.
func ask(bed *layertest.Bed, network, address string) (answer, peer string, err error) {
	err = bed.Inside(func() error {
		conn, err := net.DialTimeout(network, address, patience)
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		if strings.HasPrefix(network, "udp") {
			if _, err := conn.Write([]byte("?")); err != nil {
				return err
			}
		}
		buffer := make([]byte, 64)
		n, err := conn.Read(buffer)
		answer, peer = strings.TrimSpace(string(buffer[:n])), conn.RemoteAddr().String()
		return err
	})
	return answer, peer, err
}

func TestConnectionsReachTheEndpointAndSeeTheService(t *testing.T) {
	s := newStreet(t, &model.Snapshot{Services: []*model.Service{
		serviceOf("web", model.TCP, 80, []string{"10.96.0.1", "fd00:96::1"}, 8080, "127.0.0.1", "::1"),
		serviceOf("dns", model.UDP, 53, []string{"10.96.0.10", "fd00:96::10"}, 5353, "127.0.0.3", "::1"),
	}})
	serve(t, s.Bed, "tcp", "127.0.0.1:8080", "[::1]:8080", "127.0.0.9:80")
	serve(t, s.Bed, "udp", "127.0.0.3:5353", "[::1]:5353")
	for _, row := range []struct{ network, to, answer string }{
		{"tcp4", "10.96.0.1:80", "127.0.0.1:8080"},
		{"tcp6", "[fd00:96::1]:80", "[::1]:8080"},
		{"udp4", "10.96.0.10:53", "127.0.0.3:5353"},
		{"udp6", "[fd00:96::10]:53", "[::1]:5353"},
		{"tcp4", "127.0.0.9:80", "127.0.0.9:80"}, // nobody's Service
	} {
		answer, peer, err := ask(s.Bed, row.network, row.to)
		if err != nil || answer != row.answer || peer != row.to {
			t.Errorf("%s to %s: %q answered, the peer is said to be %q, error %v; want %q, and the Service as peer",
				row.network, row.to, answer, peer, err, row.answer)
		}
	}
}

// A socket of family AF_INET6 can talk to IPv4 as ::ffff:a.b.c.d.
func TestMappedAddressesOnIPv6Sockets(t *testing.T) {
	s := newStreet(t, &model.Snapshot{Services: []*model.Service{
		serviceOf("web", model.TCP, 80, []string{"10.96.0.1"}, 8080, "127.0.0.1"),
		serviceOf("dns", model.UDP, 53, []string{"10.96.0.10"}, 5353, "127.0.0.3"),
	}})
	serve(t, s.Bed, "tcp", "127.0.0.1:8080")
	serve(t, s.Bed, "udp", "127.0.0.3:5353")
	err := s.Inside(func() error {
		tcp, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(tcp)
		web := &unix.SockaddrInet6{Port: 80, Addr: mapped(10, 96, 0, 1)}
		if err := unix.Connect(tcp, web); err != nil {
			return fmt.Errorf("connect to ::ffff:10.96.0.1: %w", err)
		}
		if peer, err := unix.Getpeername(tcp); err != nil || !same(peer, web) {
			return fmt.Errorf("getpeername: %+v, %v", peer, err)
		}
		udp, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(udp)
		dns := &unix.SockaddrInet6{Port: 53, Addr: mapped(10, 96, 0, 10)}
		_, err = exchange(udp, dns)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func mapped(a, b, c, d byte) [16]byte {
	return [16]byte{10: 0xff, 11: 0xff, 12: a, 13: b, 14: c, 15: d}
}

// exchange sends one datagram on an unconnected socket and says who answers. It
// fails if the answer seems to come from elsewhere than it was sent to.
func exchange(fd int, to unix.Sockaddr) (answer string, err error) {
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return "", err
	}
	if err := unix.Sendto(fd, []byte("?"), 0, to); err != nil {
		return "", err
	}
	buffer := make([]byte, 64)
	n, from, err := unix.Recvfrom(fd, buffer, 0)
	if err != nil {
		return "", err
	}
	if !same(from, to) {
		return "", fmt.Errorf("the answer seems to come from %v:%d, sent to %v:%d", address(from), port(from), address(to), port(to))
	}
	return string(buffer[:n]), nil
}

func same(a, b unix.Sockaddr) bool { return port(a) == port(b) && address(a).Equal(address(b)) }

func port(a unix.Sockaddr) int {
	if four, ok := a.(*unix.SockaddrInet4); ok {
		return four.Port
	}
	return a.(*unix.SockaddrInet6).Port
}

func address(a unix.Sockaddr) net.IP {
	if four, ok := a.(*unix.SockaddrInet4); ok {
		return four.Addr[:]
	}
	six := a.(*unix.SockaddrInet6).Addr
	return six[:]
}

// ownDatagrams makes an unconnected UDP socket in the bed.
func (s *street) ownDatagrams() int {
	s.t.Helper()
	var fd int
	err := s.Inside(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// Datagrams of one socket stay with one endpoint, as with connection tracking,
// and move at once when it is gone: nobody is stuck to a dead endpoint.
func TestDatagramsStayWithTheirEndpointUntilItIsGone(t *testing.T) {
	dns := func(pods ...string) *model.Snapshot {
		return &model.Snapshot{Services: []*model.Service{serviceOf("dns", model.UDP, 53, []string{"10.96.0.10"}, 5353, pods...)}}
	}
	pods := []string{"127.0.0.3", "127.0.0.4", "127.0.0.5", "127.0.0.6"}
	s := newStreet(t, dns(pods...))
	for _, pod := range pods {
		serve(t, s.Bed, "udp", pod+":5353")
	}
	to := &unix.SockaddrInet4{Port: 53, Addr: [4]byte{10, 96, 0, 10}}
	fd := s.ownDatagrams()
	first := s.whoAnswers(fd, to)
	for range 50 {
		if now := s.whoAnswers(fd, to); now != first {
			t.Fatalf("the flow moved from %s to %s though nothing changed", first, now)
		}
	}
	var rest []string
	for _, pod := range pods {
		if pod+":5353" != first {
			rest = append(rest, pod)
		}
	}
	s.become(dns(append(rest[1:], strings.TrimSuffix(first, ":5353"))...))
	if now := s.whoAnswers(fd, to); now != first {
		t.Fatalf("another endpoint went, and the flow moved from %s to %s", first, now)
	}
	s.become(dns(rest...))
	if now := s.whoAnswers(fd, to); now == first {
		t.Fatalf("%s is gone and still gets datagrams", first)
	}
}

func (s *street) whoAnswers(fd int, to unix.Sockaddr) string {
	s.t.Helper()
	answer, err := exchange(fd, to)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer
}

// One unconnected socket can talk to eight Services at a time. Beyond that the
// oldest gives way, which is counted; all still answer.
func TestOneSocketAndManyServices(t *testing.T) {
	snapshot := &model.Snapshot{}
	for i := range 12 {
		ip, pod := fmt.Sprintf("10.96.1.%d", i), fmt.Sprintf("127.0.1.%d", i+1)
		snapshot.Services = append(snapshot.Services, serviceOf(fmt.Sprintf("s%02d", i), model.UDP, 53, []string{ip}, 5353, pod))
	}
	s := newStreet(t, snapshot)
	for i := range 12 {
		serve(t, s.Bed, "udp", fmt.Sprintf("127.0.1.%d:5353", i+1))
	}
	fd := s.ownDatagrams()
	for i := range byte(12) {
		answer := s.whoAnswers(fd, &unix.SockaddrInet4{Port: 53, Addr: [4]byte{10, 96, 1, i}})
		if want := fmt.Sprintf("127.0.1.%d:5353", i+1); answer != want {
			t.Fatalf("%s answered, not %s", answer, want)
		}
		if forgotten := s.reason("flow_forgotten"); i < 8 && forgotten != 0 || i >= 8 && forgotten != uint64(i)-7 {
			t.Fatalf("after %d Services %d flows were forgotten", i+1, forgotten)
		}
	}
}

func TestNoEndpointIsRefusedAtOnce(t *testing.T) {
	s := newStreet(t, &model.Snapshot{Services: []*model.Service{
		serviceOf("web", model.TCP, 80, []string{"10.96.0.1", "fd00:96::1"}, 8080),
		serviceOf("dns", model.UDP, 53, []string{"10.96.0.10"}, 5353),
	}})
	for _, to := range []string{"10.96.0.1:80", "[fd00:96::1]:80"} {
		if _, _, err := ask(s.Bed, "tcp", to); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("connect to %s, which has no endpoint: %v, not connection refused", to, err)
		}
	}
	if _, _, err := ask(s.Bed, "udp", "10.96.0.10:53"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connected UDP: %v", err)
	}
	err := unix.Sendto(s.ownDatagrams(), []byte("?"), 0, &unix.SockaddrInet4{Port: 53, Addr: [4]byte{10, 96, 0, 10}})
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("unconnected UDP: %v", err)
	}
	if n := s.reason("no_backend"); n != 4 {
		t.Errorf("4 refusals, %d counted", n)
	}
}

// A UDP socket that leaves a Service for an ordinary address must not see the
// Service as its peer any more.
func TestReconnectedSocketForgetsTheService(t *testing.T) {
	s := newStreet(t, &model.Snapshot{Services: []*model.Service{
		serviceOf("dns", model.UDP, 53, []string{"10.96.0.10"}, 5353, "127.0.0.3")}})
	fd := s.ownDatagrams()
	for _, to := range []*unix.SockaddrInet4{
		{Port: 53, Addr: [4]byte{10, 96, 0, 10}},
		{Port: 5353, Addr: [4]byte{127, 0, 0, 3}},
		{Port: 53, Addr: [4]byte{10, 96, 0, 10}},
	} {
		if err := unix.Connect(fd, to); err != nil {
			t.Fatal(err)
		}
		if peer, err := unix.Getpeername(fd); err != nil || !same(peer, to) {
			t.Errorf("connected to %+v, getpeername says %+v, %v", to, peer, err)
		}
	}
}

// Each endpoint gets its share: of n connections to k endpoints each has about
// n/k, within five standard deviations of the binomial distribution.
func TestConnectionsAreSpread(t *testing.T) {
	pods := []string{"127.0.0.3", "127.0.0.4", "127.0.0.5"}
	s := newStreet(t, &model.Snapshot{Services: []*model.Service{
		serviceOf("dns", model.UDP, 53, []string{"10.96.0.10"}, 5353, pods...)}})
	for _, pod := range pods {
		serve(t, s.Bed, "udp", pod+":5353")
	}
	const n = 1500
	got := map[string]int{}
	for range n {
		answer, _, err := ask(s.Bed, "udp", "10.96.0.10:53")
		if err != nil {
			t.Fatal(err)
		}
		got[strings.TrimSuffix(answer, ":5353")]++
	}
	for _, pod := range pods {
		if k := got[pod]; k < 408 || k > 592 { // 500 +- 5*sqrt(n*1/3*2/3)
			t.Errorf("of %d connections %v: %s has %d", n, got, pod, k)
		}
	}
}
