package sockdiag

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Listener is a TCP socket that listens.
type Listener struct {
	Address netip.AddrPort
	// Waiting connections are complete, and accept() has not taken them. The kernel
	// refuses more once there are more than Backlog: the lesser of what the program
	// gave to listen() and of net.core.somaxconn.
	Waiting, Backlog uint32
	// Drops counts what this socket had no room for.
	Drops uint32
	Inode uint32
}

// of linux/inet_diag.h and net/tcp_states.h
const (
	stateListen = 10
	skMemInfo   = 7 // INET_DIAG_SKMEMINFO
	memDrops    = 8 // SK_MEMINFO_DROPS
	sizeOfReply = 72
)

// Listeners lists the TCP sockets of the calling thread's network namespace that
// listen. The drops of others than one's own take CAP_NET_ADMIN. It costs two messages,
// and no more where there are many connections.
func Listeners() (all []Listener, err error) {
	for _, anywhere := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		body := request(Socket{
			Protocol: unix.IPPROTO_TCP, Cookie: AnyCookie,
			Local: netip.AddrPortFrom(anywhere, 0), Remote: netip.AddrPortFrom(anywhere, 0),
		}, 1<<stateListen)
		body[2] = 1 << (skMemInfo - 1)
		list := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		list.AddRawData(body)
		replies, err := list.Execute(unix.NETLINK_SOCK_DIAG, 0)
		if err != nil {
			return nil, fmt.Errorf("list listening sockets: %w", err)
		}
		for _, reply := range replies {
			if l, ok := listener(reply); ok {
				all = append(all, l)
			}
		}
	}
	return all, nil
}

// listener reads struct inet_diag_msg and what follows it.
func listener(reply []byte) (l Listener, ok bool) {
	if len(reply) < sizeOfReply || reply[1] != stateListen {
		return l, false
	}
	addr := netip.AddrFrom16([16]byte(reply[8:24]))
	if reply[0] == unix.AF_INET {
		addr = netip.AddrFrom4([4]byte(reply[8:12]))
	}
	word := func(at int) uint32 { return binary.NativeEndian.Uint32(reply[at:]) }
	l = Listener{
		Address: netip.AddrPortFrom(addr, binary.BigEndian.Uint16(reply[4:])),
		Waiting: word(56), Backlog: word(60), Inode: word(68),
	}
	attributes, err := nl.ParseRouteAttr(reply[sizeOfReply:])
	if err != nil {
		return l, true
	}
	for _, a := range attributes {
		if a.Attr.Type == skMemInfo && len(a.Value) >= 4*(memDrops+1) {
			l.Drops = binary.NativeEndian.Uint32(a.Value[4*memDrops:])
		}
	}
	return l, true
}
