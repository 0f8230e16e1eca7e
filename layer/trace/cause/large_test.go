package cause

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// As much evidence as there may be, of a thousand namespaces in which something of every
// kind dies, is judged within seconds of processor time.
func TestMuchEvidence(t *testing.T) {
	const spaces, events = 1000, 8192
	e := &Evidence{Window: time.Minute}
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}) }
	for i := range spaces {
		s := &Space{Inode: uint32(i + 1), Name: fmt.Sprint("s", i), Addrs: []Addr{{1, netip.MustParsePrefix("127.0.0.1/8"), false}, {2, netip.PrefixFrom(addr(i), 24), false}}}
		s.After.Links = []Link{{Index: 1, Name: "lo", Up: true}, {Index: 2, Name: "eth0", Kind: "veth", Up: true, Carrier: true, Peer: 3, PeerSpace: uint32(i ^ 1 + 1)}}
		s.After.Counters = map[string]uint64{"TcpExt.ListenDrops": 9, "TcpExt.ListenOverflows": 5, "Ip.OutNoRoutes": 3, "TcpExt.TCPReqQFullDoCookies": 2}
		for port := range 40 {
			o := Socket{Protocol: protoTCP, State: tcpListen, Local: netip.AddrPortFrom(addr(i), uint16(port+1)), Cookie: uint64(i*40 + port + 1), Inode: uint32(port)}
			if port%2 == 0 {
				o.Protocol, o.State = protoUDP, tcpClose
			}
			s.After.Sockets = append(s.After.Sockets, o)
		}
		s.Before = s.After
		s.Before.Counters = map[string]uint64{}
		e.Spaces = append(e.Spaces, s)
	}
	reasons := []string{"NO_SOCKET", "NETFILTER_DROP", "IP_RPFILTER", "NEIGH_FAILED", "IP_INNOROUTES", "SOCKET_RCVBUFF", "QDISC_DROP", "TCP_CSUM", "OTHERHOST", "IP_LOCALNET", "PKT_TOO_BIG", "NOT_SPECIFIED"}
	kinds := []Kind{Drop, Drop, Drop, ICMPSent, Retransmit, SocketError, CallFailed, StateChange, ResetSent}
	for i := range events {
		event := Event{Kind: kinds[i%len(kinds)], Space: uint32(i%spaces + 1), Count: 1, Reason: reasons[i%len(reasons)], Location: "f", Device: "eth0", Index: 2, Errno: 113, Call: "connect", OldState: tcpSynSent, NewState: tcpClose}
		event.Tuple = Tuple{Protocol: protoTCP, TCPFlags: flagSYN, EtherType: etherIP, Source: netip.AddrPortFrom(addr((i+7)%spaces), 40000), Destination: netip.AddrPortFrom(addr(i%spaces), uint16(100+i/spaces))}
		e.Events = append(e.Events, event)
	}
	for i := range 2000 {
		e.Paths = append(e.Paths, Path{Space: uint32(i%spaces + 1), Destination: addr((i + 7) % spaces), Type: "unicast", Device: "eth0"})
	}
	var began, ended unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &began)
	verdicts := Diagnose(e)
	unix.Getrusage(unix.RUSAGE_SELF, &ended)
	took := time.Duration(ended.Utime.Nano() - began.Utime.Nano())
	t.Logf("%d events in %d namespaces: %d verdicts, %s of processor time", events, spaces, len(verdicts), took)
	// 0.8 s here, 11 s with -race.
	if len(verdicts) < 1000 || took > 30*time.Second {
		t.Errorf("%d verdicts, %s", len(verdicts), took)
	}
}
