package sockdiag

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// State is what the kernel tells of one TCP, UDP or raw socket (sock_diag(7)).
type State struct {
	Protocol      uint8
	Local, Remote netip.AddrPort
	// State is one of TCP_*: 1 is established, 10 listens.
	State int
	// Timer is what it waits for: 1 a retransmission, 4 a probe of a window of zero.
	// Tries is how often that was done in a row.
	Timer, Tries int
	// Backoff is how often TCP has doubled the time that it waits.
	Backoff int
	// ReceiveQueue and SendQueue are bytes; of a listener connections that wait to be
	// accepted, and how many may.
	ReceiveQueue, SendQueue int
	Inode                   uint32
	Cookie, Cgroup          uint64
	// Received is the memory of its receive queue, ReceiveBuffer how much there may be.
	Received, ReceiveBuffer int
	Drops                   uint64
	// These are of TCP alone.
	MSS, PathMTU              int
	TotalRetransmits          uint64
	BytesAcked, BytesReceived uint64
	SendWindow, ReceiveWindow int // ReceiveWindow is negative where the kernel does not say it, before Linux 6.2
	LastSent, LastReceived    time.Duration
	RTT                       time.Duration
}

// Timers of State.
const (
	TimerRetransmit = 1
	TimerProbe      = 4
)

// of linux/inet_diag.h
const (
	diagInfo     = 2  // INET_DIAG_INFO, struct tcp_info
	skMemInfo    = 7  // INET_DIAG_SKMEMINFO
	diagCgroup   = 21 // INET_DIAG_CGROUP_ID
	memReceived  = 0  // SK_MEMINFO_RMEM_ALLOC
	memReceiveOf = 1  // SK_MEMINFO_RCVBUF
	memDrops     = 8  // SK_MEMINFO_DROPS
	sizeOfReply  = 72
)

// Walk calls f with each socket of the protocol (IPPROTO_TCP, _UDP, _RAW) in the calling
// thread's network namespace, of both families. None is kept, so that there may be very
// many: about two microseconds each.
func Walk(protocol uint8, f func(State)) error {
	err := walk(protocol, 1<<32-1, 1<<(diagInfo-1)|1<<(skMemInfo-1), func(s State) {
		s.Local, s.Remote = unmapped(s.Local), unmapped(s.Remote)
		f(s)
	})
	if err != nil {
		return fmt.Errorf("list sockets of protocol %d: %w", protocol, err)
	}
	return nil
}

// Ports are those at which somebody listens for TCP connections in the calling thread's
// network namespace, at any address.
func Ports() (map[uint16]bool, error) {
	ports := map[uint16]bool{}
	err := walk(unix.IPPROTO_TCP, 1<<stateListen, 0, func(s State) { ports[s.Local.Port()] = true })
	if err != nil {
		return nil, fmt.Errorf("list TCP ports that listen: %w", err)
	}
	return ports, nil
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// walk calls f with each socket in one of the states (bits), with what extensions (bits)
// tell of it.
func walk(protocol uint8, states uint32, extensions uint8, f func(State)) error {
	for _, anywhere := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		end := netip.AddrPortFrom(anywhere, 0)
		body := request(Socket{Protocol: protocol, Cookie: AnyCookie, Local: end, Remote: end}, states)
		body[2] = extensions
		list := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		list.AddRawData(body)
		err := list.ExecuteIter(unix.NETLINK_SOCK_DIAG, 0, func(reply []byte) bool {
			if s, ok := state(protocol, reply); ok {
				f(s)
			}
			return true
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// state reads struct inet_diag_msg and what follows it.
func state(protocol uint8, reply []byte) (s State, ok bool) {
	if len(reply) < sizeOfReply {
		return s, false
	}
	word := func(at int) uint32 { return binary.NativeEndian.Uint32(reply[at:]) }
	address := func(at int) netip.Addr {
		if reply[0] == unix.AF_INET {
			return netip.AddrFrom4([4]byte(reply[at : at+4]))
		}
		return netip.AddrFrom16([16]byte(reply[at : at+16]))
	}
	s = State{
		Protocol: protocol, State: int(reply[1]), Timer: int(reply[2]), Tries: int(reply[3]),
		Local:        netip.AddrPortFrom(address(8), binary.BigEndian.Uint16(reply[4:])),
		Remote:       netip.AddrPortFrom(address(24), binary.BigEndian.Uint16(reply[6:])),
		Cookie:       uint64(word(44)) | uint64(word(48))<<32,
		ReceiveQueue: int(word(56)), SendQueue: int(word(60)), Inode: word(68),
	}
	for rest := reply[sizeOfReply:]; len(rest) >= 4; {
		length, kind := int(binary.NativeEndian.Uint16(rest)), binary.NativeEndian.Uint16(rest[2:])
		if length < 4 || length > len(rest) {
			break
		}
		s.attribute(kind, rest[4:length])
		rest = rest[min((length+3)&^3, len(rest)):]
	}
	return s, true
}

func (s *State) attribute(kind uint16, value []byte) {
	word := func(at int) uint32 {
		if at+4 > len(value) {
			return 0 // an older kernel tells less
		}
		return binary.NativeEndian.Uint32(value[at:])
	}
	long := func(at int) uint64 { return uint64(word(at)) | uint64(word(at+4))<<32 }
	milliseconds := func(at int) time.Duration { return time.Duration(word(at)) * time.Millisecond }
	switch kind {
	case skMemInfo:
		s.Received, s.ReceiveBuffer = int(word(4*memReceived)), int(word(4*memReceiveOf))
		s.Drops = uint64(word(4 * memDrops))
	case diagCgroup:
		s.Cgroup = long(0)
	case diagInfo: // struct tcp_info of linux/tcp.h
		if len(value) > 4 {
			s.Backoff = int(value[4])
		}
		s.MSS, s.PathMTU = int(word(16)), int(word(60))
		s.LastSent, s.LastReceived = milliseconds(44), milliseconds(52)
		s.RTT = time.Duration(word(68)) * time.Microsecond
		s.TotalRetransmits = uint64(word(100))
		s.BytesAcked, s.BytesReceived = long(120), long(128)
		s.SendWindow, s.ReceiveWindow = int(word(228)), -1
		if len(value) >= 236 {
			s.ReceiveWindow = int(word(232))
		}
	}
}
