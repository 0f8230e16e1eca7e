package service

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fromPort dials from the pod, from a port of its choice, which another connection
// to somebody else may have.
func (p *pod) fromPort(network, address string, port int) (conn net.Conn, err error) {
	dialer := net.Dialer{Timeout: patience, Control: func(_, _ string, raw syscall.RawConn) (err error) {
		refused := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		if refused != nil {
			err = refused
		}
		return err
	}}
	dialer.LocalAddr = &net.TCPAddr{Port: port}
	if network == "udp" {
		dialer.LocalAddr = &net.UDPAddr{Port: port}
	}
	err = p.inside(func() error {
		conn, err = dialer.DialContext(context.Background(), network, address)
		return err
	})
	return conn, err
}

// whole checks that each flow has two entries, and no entry is without its flow.
func (v *village) whole(when string) {
	v.t.Helper()
	if counted, entries := v.flows(); entries != 2*counted {
		v.t.Errorf("%s there are %d entries for %d flows", when, entries, counted)
	}
}

// A flow that begins anew with another endpoint leaves nothing of what it was: a
// port is used again for a Service, or a datagram's endpoint is gone.
func TestFlowsThatBeginAnewLeaveNothingBehind(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket})
	client := v.pod()
	var servers []*pod
	for i := range 3 {
		server := v.pod()
		server.serve("tcp", 8080, fmt.Sprint(i))
		server.serve("udp", 5353, fmt.Sprint(i))
		servers = append(servers, server)
	}
	v.open(webAndNames(servers...))
	answers := map[string]bool{}
	for range 20 {
		conn, err := client.fromPort("tcp4", "10.96.0.1:80", 4000)
		v.must(err)
		line, _, err := talk(conn, "hello")
		v.must(err)
		answers[line] = true
		v.must(conn.(*net.TCPConn).SetLinger(0)) // no TIME_WAIT
		conn.Close()
	}
	if len(answers) < 2 {
		t.Fatalf("20 connections from one port went to %v only", answers)
	}
	v.whole("after connections from one port")
	datagrams, err := client.fromPort("udp", "10.96.0.10:53", 4001)
	v.must(err)
	defer datagrams.Close()
	for i := range 9 {
		v.become(webAndNames(servers[i%3]))
		line, _, err := talk(datagrams, "hello")
		if v.must(err); !strings.HasPrefix(line, fmt.Sprint(i%3)) {
			t.Errorf("%q answers, not the endpoint there is, %d", line, i%3)
		}
	}
	v.whole("after datagrams whose endpoints went")
}

// A reset that neither end heeds, for it is old or forged, does not end a flow.
func TestResetThatNobodyHeedsDoesNotEndTheFlow(t *testing.T) {
	v, client, server := twoPods(t)
	conn, err := client.fromPort("tcp4", "10.96.0.1:80", 4000)
	v.must(err)
	defer conn.Close()
	v.must(exchangeLine(conn, "first"))
	service := netip.MustParseAddrPort("10.96.0.1:80")
	here, there := netip.AddrPortFrom(client.ip4, 4000), netip.AddrPortFrom(server.ip4, 8080)
	for _, c := range []struct {
		program  string
		from, to netip.AddrPort
	}{{datapathProgFromPod, here, service}, {datapathProgToPod, there, here}} {
		frame := frame(ip4(c.from.Addr(), c.to.Addr(), protoTCP, nil, fragmented{}, tcp(c.from, c.to, flagRST, nil)))
		_, _, err := v.layer.datapath.programs[c.program].Test(frame)
		v.must(err)
		v.must(exchangeLine(conn, "they go on"))
		v.age(11 * time.Second)
		v.sweep()
		v.must(exchangeLine(conn, "after a silence"))
	}
	_, _, err = v.layer.datapath.programs[datapathProgToPod].Test(
		frame(ip4(there.Addr(), here.Addr(), protoTCP, nil, fragmented{}, tcp(there, here, flagRST, nil))))
	v.must(err)
	v.age(11 * time.Second)
	v.sweep()
	if counted, entries := v.flows(); counted != 0 || entries != 0 {
		t.Errorf("a reset was the last, and 11 s later there are %d flows and %d entries", counted, entries)
	}
}

// Numbers that a process gives may have been given before it began: a datagram's
// endpoint is known by its address, too.
func TestDatagramsLeaveADeadEndpointAfterARestart(t *testing.T) {
	v := newVillage(t, Settings{Path: PathPacket})
	client, first, second := v.pod(), v.pod(), v.pod()
	first.serve("udp", 5353, "first")
	second.serve("udp", 5353, "second")
	v.open(webAndNames(first))
	conn, err := client.fromPort("udp", "10.96.0.10:53", 4000)
	v.must(err)
	defer conn.Close()
	if line, _, err := talk(conn, "1"); err != nil || !strings.HasPrefix(line, "first") {
		t.Errorf("%q, %v", line, err)
	}
	v.become(webAndNames())
	v.again(webAndNames())
	v.become(webAndNames(second))
	if line, _, err := talk(conn, "2"); err != nil || !strings.HasPrefix(line, "second") {
		t.Errorf("%q answers, %v; want the endpoint there is", line, err)
	}
}

// A pod may talk to an endpoint without its Service, from a port from which it talks
// or has talked to the Service: the two are not taken for one.
func TestDirectConnectionFromAPortOfAFlow(t *testing.T) {
	v, client, _ := twoPods(t)
	for _, way := range [][2]string{{"10.96.0.1:80", "10.244.1.2:8080"}, {"[fd00:96::1]:80", "[fd00:244::2]:8080"}} {
		served, err := client.fromPort("tcp", way[0], 4000)
		v.must(err)
		v.must(exchangeLine(served, "by the Service"))
		for range 3 {
			direct, err := client.fromPort("tcp", way[1], 4000)
			if err != nil {
				t.Fatalf("directly to %s beside a connection to its Service: %v", way[1], err)
			}
			v.must(exchangeLine(direct, "directly"))
			v.must(exchangeLine(served, "by the Service, still"))
			v.must(direct.(*net.TCPConn).SetLinger(0))
			direct.Close()
		}
		served.Close()
		direct, err := client.fromPort("tcp", way[1], 4000)
		if err != nil {
			t.Fatalf("directly to %s after a connection to its Service: %v", way[1], err)
		}
		v.must(exchangeLine(direct, "directly"))
		direct.Close()
	}
	v.whole("at the end")
}

// The other way round: a flow of the Service that begins later from the port of a
// connection without it leaves that alone, and both get their own answers.
func TestFlowFromAPortOfADirectConnection(t *testing.T) {
	v, client, _ := twoPods(t)
	for _, way := range [][2]string{{"10.96.0.1:80", "10.244.1.2:8080"}, {"[fd00:96::1]:80", "[fd00:244::2]:8080"}} {
		direct, err := client.fromPort("tcp", way[1], 4000)
		v.must(err)
		v.must(exchangeLine(direct, "directly"))
		for range 3 {
			served, err := client.fromPort("tcp", way[0], 4000)
			v.must(err)
			v.must(exchangeLine(served, "by the Service"))
			v.must(exchangeLine(direct, "directly, still"))
			v.must(served.(*net.TCPConn).SetLinger(0))
			served.Close()
		}
		direct.Close()
	}
	v.whole("at the end")
}
