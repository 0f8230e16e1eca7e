// Package probe sends a few packets and says what came back: an echo request of a size
// that may not be cut, also in VXLAN, or that may take one step only, a DNS query, a TCP connection that
// is closed again. Each function answers one question, of one address, from one network
// namespace. Notes are what two neighbours tell each other in echoes of any addresses.
//
// It is not for load: no function sends more than some forty packets, one after the other,
// and each ends within seconds. Who asks many things at a time limits them. It sends no
// data over a connection, and queries only names that it is given.
//
// It changes no setting. As any traffic, it makes the kernel look up neighbours, and keep
// for ten minutes what a router said of the path's MTU (net.ipv4.route.mtu_expires).
// Echoes take CAP_NET_RAW; other namespaces, CAP_SYS_ADMIN.
package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// ErrUnsent says that nothing was sent: what it takes was not to be had here.
var ErrUnsent = errors.New("nothing was sent")

// ErrSilent says that nothing came back.
var ErrSilent = errors.New("no answer")

// ErrReset says that a connection was made, and then reset by the other end.
var ErrReset = errors.New("connected, and then reset")

// ErrClosed says that a connection was made, and closed by the other end at once.
var ErrClosed = errors.New("connected, and closed at once")

// connectFor is how long a connection may take: until the second repetition of its SYN,
// after 3 s, has been answered (RFC 6298: 1 s, then twice that).
const connectFor = 3500 * time.Millisecond

// watchFor is how long a connection is kept to see whether it is reset: a proxy that has
// nobody behind it accepts first.
const watchFor = 150 * time.Millisecond

// unsent wraps what stopped it before the first packet.
func unsent(act string, err error) error { return fmt.Errorf("%s: %w: %w", act, err, ErrUnsent) }

// Connect makes a TCP connection from a namespace (the empty path is this process's own),
// sends nothing and closes it. It says how long the handshake took. The error is
// ECONNREFUSED, EHOSTUNREACH and so on as the kernel has it, ErrSilent, ErrReset or
// ErrClosed.
func Connect(ctx context.Context, space string, to netip.AddrPort) (took time.Duration, err error) {
	var c net.Conn
	begun := time.Now()
	err = within(space, func() (err error) {
		d := net.Dialer{Timeout: connectFor, KeepAlive: -1}
		c, err = d.DialContext(ctx, "tcp", to.String())
		return err
	})
	took = time.Since(begun)
	var late net.Error
	switch {
	case errors.As(err, &late) && late.Timeout():
		return took, fmt.Errorf("%w in %.1f s", ErrSilent, connectFor.Seconds())
	case errors.Is(err, unix.ECONNRESET): // after the handshake: a SYN that is refused is ECONNREFUSED
		return took, ErrReset
	case err != nil:
		return took, err
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(watchFor))
	_, err = c.Read(make([]byte, 1))
	switch {
	case err == nil || errors.Is(err, os.ErrDeadlineExceeded):
		return took, nil // it speaks first, or waits for us to
	case errors.Is(err, unix.ECONNRESET):
		return took, ErrReset
	}
	return took, ErrClosed
}

// within runs f in a namespace; what stops it from getting there is ErrUnsent.
func within(space string, f func() error) error {
	var sent error
	err := netns.In(space, func() error { sent = f(); return nil })
	if err != nil {
		return unsent("enter network namespace", err)
	}
	if errors.Is(sent, unix.EMFILE) || errors.Is(sent, unix.ENFILE) {
		return unsent("open socket", sent)
	}
	return sent
}
