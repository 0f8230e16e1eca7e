package sockdiag

import (
	"fmt"
	"net/netip"

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

const stateListen = 10 // TCP_LISTEN of net/tcp_states.h

// Listeners lists the TCP sockets of the calling thread's network namespace that
// listen. The drops of others than one's own take CAP_NET_ADMIN. It costs two messages,
// and no more where there are many connections.
func Listeners() (all []Listener, err error) {
	err = walk(unix.IPPROTO_TCP, 1<<stateListen, 1<<(skMemInfo-1), func(s State) {
		all = append(all, Listener{Address: s.Local, Waiting: uint32(s.ReceiveQueue), Backlog: uint32(s.SendQueue),
			Drops: uint32(s.Drops), Inode: s.Inode})
	})
	if err != nil {
		return nil, fmt.Errorf("list listening sockets: %w", err)
	}
	return all, nil
}
