package service

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/model"
)

// webAndNames is a cluster of a TCP and a UDP Service of both families.
func webAndNames(pods ...*pod) *model.Snapshot {
	var addresses []string
	for _, p := range pods {
		addresses = append(addresses, p.addresses()...)
	}
	return &model.Snapshot{Complete: true, Services: []*model.Service{
		serviceOf("closed", model.TCP, 70, []string{"10.96.0.7", "fd00:96::7"}, 7070),
		serviceOf("deaf", model.UDP, 70, []string{"10.96.0.7", "fd00:96::7"}, 7070),
		serviceOf("names", model.UDP, 53, []string{"10.96.0.10", "fd00:96::10"}, 5353, addresses...),
		serviceOf("web", model.TCP, 80, []string{"10.96.0.1", "fd00:96::1"}, 8080, addresses...),
	}}
}

// ways are the calls a client can make to webAndNames.
var ways = []struct{ network, address string }{
	{"tcp", "10.96.0.1:80"}, {"tcp", "[fd00:96::1]:80"},
	{"udp", "10.96.0.10:53"}, {"udp", "[fd00:96::10]:53"},
}

// twoPods is a village of a client and a server.
func twoPods(t *testing.T) (v *village, client, server *pod) {
	v = newVillage(t, Settings{Path: PathPacket})
	client, server = v.pod(), v.pod()
	server.serve("tcp", 8080, "server")
	server.serve("udp", 5353, "server")
	v.open(webAndNames(server))
	return v, client, server
}

func TestPacketsReachTheEndpointAndComeFromTheService(t *testing.T) {
	_, client, _ := twoPods(t)
	for _, way := range ways {
		for _, size := range []int{1, 1200, 9000} { // a packet, a full one, fragments
			text := strings.Repeat("x", size)
			line, rest, err := client.call(way.network, way.address, text)
			want := "server " + client.ip4.String()
			if strings.HasPrefix(way.address, "[") {
				want = "server " + client.ip6.String()
			}
			if err != nil || line != want || rest != text {
				t.Errorf("%s to %s, %d bytes: %q, %d bytes back, %v; want %q", way.network, way.address, size, line, len(rest), err, want)
			}
		}
	}
}

// Large transfers use segmentation offload in both directions.
func TestPacketsInBulk(t *testing.T) {
	_, client, _ := twoPods(t)
	text := strings.Repeat("0123456789abcdef", 1<<18)
	for _, way := range ways[:2] {
		if _, rest, err := client.call(way.network, way.address, text); err != nil || rest != text {
			t.Errorf("%s: %d of %d bytes came back, equal: %v, %v", way.address, len(rest), len(text), rest == text, err)
		}
	}
}

// A pod may be its own Service's only endpoint.
func TestHairpin(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket})
	own := v.pod()
	own.serve("tcp", 8080, "own")
	own.serve("udp", 5353, "own")
	v.open(webAndNames(own))
	for _, way := range ways {
		host, _, _ := net.SplitHostPort(way.address)
		text := strings.Repeat("y", 9000)
		line, rest, err := own.call(way.network, way.address, text)
		if err != nil || line != "own "+host || rest != text {
			t.Errorf("%s to %s: %q, %d bytes, %v", way.network, way.address, line, len(rest), err)
		}
	}
}

func TestRefusedPacketsAreToldAtOnce(t *testing.T) {
	v, client, _ := twoPods(t)
	for _, way := range []struct{ network, address string }{
		{"tcp", "10.96.0.7:70"}, {"tcp", "[fd00:96::7]:70"}, {"udp", "10.96.0.7:70"}, {"udp", "[fd00:96::7]:70"},
	} {
		_, _, err := client.call(way.network, way.address, "hello")
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s to %s: %v, want ECONNREFUSED", way.network, way.address, err)
		}
	}
	description, err := v.layer.Describe()
	v.must(err)
	if description.Reasons["no_backend"] < 4 {
		t.Errorf("no_backend is %d after four refusals", description.Reasons["no_backend"])
	}
}

// An endpoint on which nobody listens says so, and a router on the way may have a
// smaller MTU: the client must understand both.
func TestErrorsAboutTranslatedPackets(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket})
	client, server := v.pod(), v.pod()
	v.open(webAndNames(server))
	for _, way := range ways {
		if _, _, err := client.call(way.network, way.address, "anybody?"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s to %s: %v, want the endpoint's ECONNREFUSED", way.network, way.address, err)
		}
	}
	server.serve("tcp", 8080, "server")
	v.must(server.narrow(1300))
	for _, way := range ways[:2] {
		for _, size := range []int{1390, 100_000} {
			text := strings.Repeat("z", size)
			if _, rest, err := client.call(way.network, way.address, text); err != nil || rest != text {
				t.Errorf("%s over a smaller MTU: %d of %d bytes, %v", way.address, len(rest), size, err)
			}
		}
	}
	for _, c := range []struct {
		family int
		to     unix.Sockaddr
	}{
		{unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte{10, 96, 0, 10}, Port: 53}},
		{unix.AF_INET6, &unix.SockaddrInet6{Addr: netip.MustParseAddr("fd00:96::10").As16(), Port: 53}},
	} {
		if err := client.tooLarge(c.family, c.to); err != nil {
			t.Error(err)
		}
	}
}

// tooLarge sends a datagram that must not be fragmented until the kernel knows
// that it is too large.
func (p *pod) tooLarge(family int, to unix.Sockaddr) error {
	return p.inside(func() error {
		fd, err := unix.Socket(family, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		level, option := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
		if family == unix.AF_INET6 {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
		}
		if err := unix.SetsockoptInt(fd, level, option, unix.IP_PMTUDISC_DO); err != nil {
			return err
		}
		for range 100 {
			err := unix.Sendto(fd, make([]byte, 1400), 0, to)
			if errors.Is(err, unix.EMSGSIZE) {
				return nil
			}
			if err != nil && !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
		}
		return fmt.Errorf("family %d: 100 datagrams of 1400 bytes were sent over an MTU of 1300 and nobody was told", family)
	})
}

// Nobody is stuck to an endpoint that is gone: datagrams of an open socket go to
// another one.
func TestDatagramsLeaveADeadEndpoint(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket})
	client, first, second := v.pod(), v.pod(), v.pod()
	first.serve("udp", 5353, "first")
	second.serve("udp", 5353, "second")
	v.open(webAndNames(first))
	v.must(client.inside(func() error {
		conn, err := net.Dial("udp", "10.96.0.10:53")
		if err != nil {
			return err
		}
		defer conn.Close()
		if line, _, err := talk(conn, "1"); err != nil || !strings.HasPrefix(line, "first") {
			t.Errorf("%q, %v", line, err)
		}
		v.become(webAndNames(second))
		if line, _, err := talk(conn, "2"); err != nil || !strings.HasPrefix(line, "second") {
			t.Errorf("%q, %v", line, err)
		}
		v.become(webAndNames())
		if _, _, err := talk(conn, "3"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v, want ECONNREFUSED", err)
		}
		return nil
	}))
}

// Open connections go on when their Service changes, goes, or comes back.
func TestStreamsOutliveTheirService(t *testing.T) {
	v, client, server := twoPods(t)
	v.must(client.inside(func() error {
		conn, err := net.Dial("tcp", "10.96.0.1:80")
		if err != nil {
			return err
		}
		defer conn.Close()
		for i, snapshot := range []*model.Snapshot{webAndNames(server), webAndNames(), {Complete: true}, webAndNames(server)} {
			v.become(snapshot)
			if err := exchangeLine(conn, fmt.Sprint("line ", i)); err != nil {
				t.Errorf("with cluster %d: %v", i, err)
			}
		}
		return nil
	}))
}
