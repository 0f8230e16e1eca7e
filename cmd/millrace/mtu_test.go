package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
)

// of both families, with one endpoint.
const farService = `
apiVersion: v1
kind: Service
metadata: {name: far}
spec: {clusterIPs: [10.96.0.7, "fd00:96::7"], ipFamilies: [IPv4, IPv6], ports: [{name: tcp, port: 80}, {name: udp, port: 80, protocol: UDP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: far-4, labels: {kubernetes.io/service-name: far}}
addressType: IPv4
ports: [{name: tcp, port: 80}, {name: udp, port: 80, protocol: UDP}]
endpoints: [{addresses: ["%[1]s"]}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: far-6, labels: {kubernetes.io/service-name: far}}
addressType: IPv6
ports: [{name: tcp, port: 80}, {name: udp, port: 80, protocol: UDP}]
endpoints: [{addresses: ["%[2]s"]}]
`

// Between two nodes something takes 1,400 bytes and says nothing. The agents find it and
// say so; pods are told what is left in VXLAN; what they send to a Service of the other node
// is carried, and a packet to it that is too long is answered.
func TestANarrowPath(t *testing.T) {
	n1 := newNode(t)
	n1.run = filepath.Join("/tmp", fmt.Sprint("millrace-test-", os.Getpid()))
	t.Cleanup(func() { os.RemoveAll(n1.run); os.RemoveAll(n1.run + "-2") })
	forward(t, n1.NetNS)
	n2, router := n1.second(space(t, "node2")), space(t, "router")
	wire(t, "eth0", [2]string{n1.NetNS, router}, [2][]string{{"192.0.2.1/24", "2001:db8:1::1/64"}, {"192.0.2.254/24", "2001:db8:1::fe/64"}}, true)
	wire(t, "eth1", [2]string{n2.NetNS, router}, [2][]string{{"198.51.100.2/24", "2001:db8:2::2/64"}, {"198.51.100.254/24", "2001:db8:2::fe/64"}}, true)
	shell(t, router, `ip route replace 192.0.2.0/24 dev eth0 mtu 1400; ip route replace 198.51.100.0/24 dev eth1 mtu 1400
		nft 'table inet t { chain c { type filter hook output priority 0; icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }; }'`)
	write(t, filepath.Join(n1.manifests, "nodes.yaml"), fmt.Sprintf(nodesWithRanges, "198.51.100.2", "2001:db8:2::2"))
	n1.start("pods", "--path", "packet")
	n2.start("pods", "--path", "packet", "--node", "n2")
	for _, n := range []*node{n1, n2} {
		n.until("status says that the path is narrow", func(s agent.Status) bool {
			return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool {
				said := strings.Join(l.Degraded, "\n")
				return l.Name == "route" && strings.Contains(said, "packets of at most 1400 bytes pass") && strings.Contains(said, "eth0 has an MTU of 1500") != (n == n2)
			})
		})
	}
	rows, _ := n1.routes()
	for _, r := range rows {
		if r.Node == "n2" && (r.MTU != 1350 || !strings.HasSuffix(r.Why, "; 1400 of 1500 bytes pass")) {
			t.Errorf("show routes has %+v", r)
		}
	}
	spaces := []string{inhabited(t, "pod1"), inhabited(t, "pod2")}
	n1.add("web", spaces[0])
	far := n2.add("db", spaces[1])
	write(t, filepath.Join(n1.manifests, "far.yaml"), fmt.Sprintf(farService, far[0], far[1]))
	n1.until("the Service is known", func(s agent.Status) bool {
		return slices.ContainsFunc(s.Layers, func(l agent.LayerStatus) bool { return l.Name == "service" && l.Objects >= 4 })
	})
	for i, way := range []string{"10.96.0.7:80", "[fd00:96::7]:80"} {
		to := netip.MustParseAddrPort(way)
		takes(t, spaces[0], far[i], 1350)
		if told, err := answered(spaces[0], to, 1400); err != nil || told != 1350 {
			t.Errorf("1400 bytes to %s: told that %d fit, %v", to, told, err)
		}
		if err := echoes(spaces[0], spaces[1], to, netip.AddrPortFrom(far[i], 80), 4<<20); err != nil {
			t.Errorf("4 MB to %s and back: %v", to, err)
		}
	}
}

func shell(t *testing.T, space, command string) {
	t.Helper()
	c := exec.Command("sh", "-ec", command)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := netns.Do(space, c.Start)
	if err == nil {
		err = c.Wait()
	}
	if err != nil {
		t.Fatalf("%s: %v: %s", command, err, out.String())
	}
}

// inhabited is a namespace with a process, by which the agent finds it.
func inhabited(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := netns.Create(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netns.Remove(path) })
	run := exec.Command("sleep", "600")
	if err := netns.Do(path, run.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = run.Process.Kill(); _ = run.Wait() })
	return path
}

// takes waits until a pod's route to an address takes so many bytes.
func takes(t *testing.T, space string, to netip.Addr, want int) {
	t.Helper()
	n, err := link.Open(space)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	var w link.Way
	for end := time.Now().Add(20 * time.Second); w.MTU != want; time.Sleep(20 * time.Millisecond) {
		if w, err = n.Way(to); err != nil || time.Now().After(end) {
			t.Fatalf("the way of a pod to %s takes %d bytes, not %d: %v", to, w.MTU, want, err)
		}
	}
}

// answered sends a datagram that may not be cut, whatever the sender's routes say, and
// returns the length that somebody says fits.
func answered(space string, to netip.AddrPort, bytes int) (told int, err error) {
	err = netns.Do(space, func() error {
		family, level, discover, probing, heard, header := unix.AF_INET, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE, unix.IP_RECVERR, 28
		var address unix.Sockaddr
		if to.Addr().Is4() {
			address = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
		}
		if to.Addr().Is6() {
			family, level, discover, probing, heard, header = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE, unix.IPV6_RECVERR, 48
			address = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		err = errors.Join(unix.SetsockoptInt(fd, level, discover, probing), unix.SetsockoptInt(fd, level, heard, 1), unix.Connect(fd, address))
		if err != nil {
			return err
		}
		control := make([]byte, 512)
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			_, _ = unix.Write(fd, make([]byte, bytes-header)) // an error is that of the one before
			_, n, _, _, err := unix.Recvmsg(fd, make([]byte, 64), control, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			if err != nil {
				continue
			}
			messages, err := unix.ParseSocketControlMessage(control[:n])
			if err != nil || len(messages) == 0 || len(messages[0].Data) < 16 {
				return fmt.Errorf("an error without a cause: %w", err)
			}
			if number := unix.Errno(binary.NativeEndian.Uint32(messages[0].Data)); number != unix.EMSGSIZE {
				return number
			}
			told = int(binary.NativeEndian.Uint32(messages[0].Data[8:]))
			return nil
		}
		return errors.New("nobody says anything")
	})
	return told, err
}

// echoes sends bytes by TCP from one namespace to an address that leads to a listener in
// another, and has them back.
func echoes(from, to string, at, listens netip.AddrPort, size int) error {
	var l net.Listener
	err := netns.Do(to, func() (err error) { l, err = net.Listen("tcp", listens.String()); return err })
	if err != nil {
		return err
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(30 * time.Second))
			_, _ = io.Copy(c, c)
		}
	}()
	var c net.Conn
	err = netns.Do(from, func() (err error) { c, err = net.DialTimeout("tcp", at.String(), 10*time.Second); return err })
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, size))
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	back, err := io.Copy(io.Discard, c)
	if err = errors.Join(err, <-sent); err == nil && back != int64(size) {
		err = fmt.Errorf("%d of %d bytes came back", back, size)
	}
	return err
}
