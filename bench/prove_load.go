package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/kernel/sysctl"
)

const (
	// mostSockets is how many a burst opens at most, of 20,000 that a process usually may:
	// as many at both ends.
	mostSockets = 8192
	// mostDatagrams are 150 MB of memory.
	mostDatagrams = 1 << 16
	// mostTracked is the largest table that is filled: 400 MB.
	mostTracked = 1 << 20
	// newConnections come beside a full table, of which free find room.
	newConnections, free = 200, 20
	connectionsFor       = 100 * time.Millisecond
	datagramSize         = 1000
	// datagramMemory is what one takes of a buffer, as SO_MEMINFO shows it.
	datagramMemory = 2304
)

var proofServer = netip.MustParseAddrPort("127.0.0.1:7000")

func address(a netip.AddrPort) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

// prepare makes the load in a namespace in which the setting has the value.
func (o *ProveOptions) prepare(ctx context.Context, path, value string) (stand, error) {
	switch o.Load {
	case BurstOfConnections:
		if err := o.set(path, value); err != nil {
			return nil, err
		}
		burst, err := o.burst(1024, mostSockets)
		return &connectionBurst{connections: burst}, err
	case BurstOfDatagrams:
		size, err := strconv.Atoi(value)
		burst, err2 := o.burst(16384*datagramMemory, mostDatagrams*datagramMemory)
		return &datagramBurst{size: size, burst: burst/datagramMemory + 64}, errors.Join(err, err2)
	case FullTable:
		return o.fill(ctx, path, value)
	case Connections:
		return &connecting{}, o.set(path, value)
	}
	return nil, fmt.Errorf("%w: there is no load %q", ErrOptions, o.Load)
}

// set the setting in the namespace.
func (o *ProveOptions) set(path, value string) error {
	_, err := sysctl.Tree{Root: "/proc/sys", Netns: path}.Write(o.Setting, value)
	return err
}

// numbers are the two values.
func (o *ProveOptions) numbers() (a, b int, err error) {
	a, err = strconv.Atoi(o.A)
	b, err2 := strconv.Atoi(o.B)
	if err = errors.Join(err, err2); err != nil || a < 1 || b < 1 {
		return 0, 0, fmt.Errorf("%w: %s of %q and %q: use numbers above 0", ErrOptions, o.Setting, o.A, o.B)
	}
	return a, b, nil
}

// burst is what both values are put under: as much as the larger of them holds; where that
// is more than a cheap burst, half as much again as the smaller holds will do.
func (o *ProveOptions) burst(cheap, most int) (int, error) {
	a, b, err := o.numbers()
	if err != nil {
		return 0, err
	}
	small, large := min(a, b), max(a, b)
	if n := min(large, max(cheap, small+small/2+1)); n <= most {
		return n, nil
	}
	return 0, fmt.Errorf("%w: %s of %d: a burst that it has no room for would be larger than this makes (%d)", ErrOptions, o.Setting, small, most)
}

// connectionBurst is BurstOfConnections.
type connectionBurst struct {
	connections int
	// from are the clients' ends of the last burst.
	from []netip.AddrPort
}

func (c *connectionBurst) close() error { return nil }

func (c *connectionBurst) turn() (float64, error) {
	listener, err := newListener()
	if err != nil {
		return 0, err
	}
	defer unix.Close(listener)
	sockets, err := connectAll(c.connections)
	defer closeAll(sockets)
	if err != nil {
		return 0, err
	}
	accepted, err := acceptAll(listener)
	closeAll(accepted)
	c.from = c.from[:0]
	for _, fd := range sockets {
		if name, err := unix.Getsockname(fd); err == nil { // else it has none, and is not tracked
			c.from = append(c.from, netip.AddrPortFrom(proofServer.Addr(), uint16(name.(*unix.SockaddrInet4).Port)))
		}
	}
	return float64(len(accepted)), err
}

// newListener is a server with as long a queue as it can have, in the thread's namespace.
func newListener() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("open a socket: %w", err)
	}
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, address(proofServer)), unix.Listen(fd, 1<<16))
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("listen at %s: %w", proofServer, err)
	}
	return fd, nil
}

// connectAll begins connections and waits for none. Over loopback a handshake is done
// when connect returns, if there is room for it.
func connectAll(n int) (sockets []int, err error) {
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return sockets, fmt.Errorf("open socket %d of %d: %w: raise the limit of open files (ulimit -n)", len(sockets)+1, n, err)
		}
		sockets = append(sockets, fd)
		// A reset at the end leaves no TIME_WAIT.
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return sockets, fmt.Errorf("set SO_LINGER: %w", err)
		}
		err = unix.Connect(fd, address(proofServer))
		if err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EPERM) { // EPERM: netfilter drops it
			return sockets, fmt.Errorf("connect to %s: %w", proofServer, err)
		}
	}
	return sockets, nil
}

func acceptAll(listener int) (accepted []int, err error) {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return accepted, nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
			continue
		case err != nil:
			return accepted, fmt.Errorf("accept: %w", err)
		}
		accepted = append(accepted, fd)
	}
}

func closeAll(sockets []int) {
	for _, fd := range sockets {
		unix.Close(fd)
	}
}

// datagramBurst is BurstOfDatagrams. The size is that of the receive buffer as the kernel
// counts it; a socket can be given it whatever the machine's settings are.
type datagramBurst struct{ size, burst int }

func (d *datagramBurst) close() error { return nil }

func (d *datagramBurst) turn() (float64, error) {
	server, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(server)
	client, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(client)
	// The kernel doubles what is asked for (socket(7)).
	err = errors.Join(unix.SetsockoptInt(server, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, d.size/2), unix.Bind(server, address(proofServer)),
		unix.Connect(client, address(proofServer)))
	if err != nil {
		return 0, fmt.Errorf("prepare a UDP server: %w", err)
	}
	payload := make([]byte, datagramSize)
	for range d.burst {
		if _, err := unix.Write(client, payload); err != nil {
			return 0, fmt.Errorf("send a datagram: %w", err)
		}
	}
	got := 0
	for {
		_, err := unix.Read(server, payload)
		if errors.Is(err, unix.EAGAIN) {
			return float64(got), nil
		}
		if err != nil {
			return 0, fmt.Errorf("receive a datagram: %w", err)
		}
		got++
	}
}

// connecting is Connections.
type connecting struct{}

func (connecting) close() error { return nil }

func (connecting) turn() (float64, error) {
	listener, err := newListener()
	if err != nil {
		return 0, err
	}
	defer unix.Close(listener)
	done, begun := 0, time.Now()
	for time.Since(begun) < connectionsFor {
		near, err := connectAll(1)
		var far []int
		if err == nil {
			far, err = acceptAll(listener)
		}
		if err == nil && len(far) != 1 {
			err = fmt.Errorf("a connection to %s brought %d to the server", proofServer, len(far))
		}
		if err == nil {
			err = echo(near[0], far[0])
		}
		closeAll(near)
		closeAll(far)
		if err != nil {
			return 0, err
		}
		done++
	}
	return float64(done) / time.Since(begun).Seconds(), nil
}

// echo sends a message there and back.
func echo(near, far int) error {
	message := make([]byte, messageSize)
	for _, ends := range [][2]int{{near, far}, {far, near}} {
		if _, err := unix.Write(ends[0], message); err != nil {
			return fmt.Errorf("send: %w", err)
		}
		if n, err := unix.Read(ends[1], message); err != nil || n != messageSize {
			return fmt.Errorf("receive %d bytes of %d: %w", n, messageSize, err)
		}
	}
	return nil
}

// fullTable is FullTable.
type fullTable struct{ path string }

const (
	tableLimit = "net.netfilter.nf_conntrack_max"
	tableCount = "net.netfilter.nf_conntrack_count"
)

// fill makes the namespace track connections, and as many as leave the room that the
// value would: all but a few for the smaller, in proportion fewer for the larger.
func (o *ProveOptions) fill(ctx context.Context, path, value string) (stand, error) {
	a, b, err := o.numbers()
	if err != nil {
		return nil, err
	}
	tree := sysctl.Tree{Root: "/proc/sys", Netns: path}
	text, err := tree.Read(tableLimit)
	if err != nil {
		return nil, err
	}
	limit, err := strconv.Atoi(text)
	if err != nil || limit > mostTracked || limit < 10*newConnections {
		return nil, fmt.Errorf("%s is %q: this fills tables of %d to %d", tableLimit, text, 10*newConnections, mostTracked)
	}
	program, err := exec.LookPath("nft")
	if err != nil {
		return nil, fmt.Errorf("have connections tracked: %w: install nftables", err)
	}
	err = netns.Do(path, func() error {
		command := exec.CommandContext(ctx, program, "-f", "-")
		command.Stdin = strings.NewReader("table ip tracked { chain c { type filter hook output priority 0; ct state new accept; }; }")
		var said bytes.Buffer
		command.Stderr = &said
		if err := command.Run(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, strings.TrimSpace(said.String()))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	n := limit - free
	if larger := max(a, b); value == strconv.Itoa(larger) && a != b {
		n = int(float64(limit-free) * float64(min(a, b)) / float64(larger))
	}
	f := &fullTable{path}
	if err := f.reserve(n); err != nil {
		return nil, err
	}
	if count, err := tree.Read(tableCount); err != nil || count != strconv.Itoa(n) {
		return nil, fmt.Errorf("%s connections are tracked, and not %d: %w", count, n, err)
	}
	return f, nil
}

// reserve makes entries of connections that go on.
func (f *fullTable) reserve(n int) error {
	to := netip.MustParseAddrPort("198.18.0.1:443")
	all := make([]nft.Connection, n)
	for i := range all {
		from := netip.AddrFrom4([4]byte{198, 19, byte(i >> 15), byte(i >> 23)})
		all[i] = nft.Connection{From: netip.AddrPortFrom(from, uint16(1024+i&0x7fff)), To: to}
	}
	return nft.In(f.path).Reserve(all, 24*time.Hour)
}

func (f *fullTable) close() error { return nil }

func (f *fullTable) turn() (figure float64, err error) {
	burst := connectionBurst{connections: newConnections}
	if figure, err = burst.turn(); err != nil {
		return 0, err
	}
	var ended []nft.Connection
	for _, from := range burst.from {
		ended = append(ended, nft.Connection{From: from, To: proofServer})
	}
	return figure, nft.In(f.path).Unreserve(ended)
}
