// Package sockdiag closes sockets of other processes, in whatever network
// namespace they are: their programs meet ECONNABORTED, and the peer of a TCP
// connection a reset.
//
// It asks the kernel to by SOCK_DESTROY (netlink, CONFIG_INET_DIAG_DESTROY). Where
// the kernel was built without it, programs that walk over a namespace's sockets do
// it (bpf_sock_destroy, Linux 6.5). A socket is named by its addresses and by its
// cookie, which no other socket ever has, so none is closed that came to the same
// addresses meanwhile.
//
// It also lists sockets with what the kernel knows of them (Listeners, Walk).
//
// It writes nothing that stays. A namespace is entered by a path that leads to it:
// /proc/PID/ns/net of a process in it, or a mount, as container runtimes make them
// below /run/netns. That takes CAP_SYS_ADMIN, and CAP_SYS_PTRACE for processes of
// others; closing takes CAP_NET_ADMIN.
//
// Costs, measured on a busy machine with two processors: a namespace 0.3 ms,
// or 3 ms where it has to be looked for among 200 processes; a socket 13 µs.
package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
)

// Socket names a connected socket.
type Socket struct {
	// Protocol is IPPROTO_TCP or IPPROTO_UDP.
	Protocol      uint8
	Local, Remote netip.AddrPort
	// Device is the index of the network device that it is bound to; 0 for none.
	Device uint32
	// Cookie is the kernel's number of the socket (SO_COOKIE), or AnyCookie.
	Cookie uint64
	// Namespace is the inode number of its network namespace, as in
	// "net:[4026531840]".
	Namespace uint32
}

// AnyCookie stands for the socket that has the addresses now; that is never found by
// walking.
const AnyCookie = 1<<64 - 1 // INET_DIAG_NOCOOKIE twice

// ErrEnded says that there is no such socket any more.
var ErrEnded = errors.New("the socket is closed already")

// ErrOutOfReach says that no path leads to the socket's network namespace.
var ErrOutOfReach = errors.New("no process and no mount leads to its network namespace")

// Closer closes sockets.
type Closer struct {
	home string
	// paths led to the namespaces of the last sockets.
	paths map[uint32]string
	// walker is used where netlink cannot.
	walker *walker
}

// New finds out how this kernel closes sockets; home is the path of a network
// namespace to be tried first, empty for this process's own. The error is a
// *need.Feature or a *need.Privilege.
func New(home string) (*Closer, error) {
	c := &Closer{home: home}
	err := probeNetlink()
	if err == nil {
		return c, nil
	}
	if errors.Is(err, unix.EPERM) {
		return nil, &need.Privilege{Act: act, Capabilities: []string{"CAP_NET_ADMIN"}}
	}
	if c.walker, err = newWalker(); err != nil {
		return nil, &need.Feature{Act: act, Feature: fmt.Sprintf("means to do it (%v)", err),
			Since: "CONFIG_INET_DIAG_DESTROY with the modules tcp_diag and udp_diag, or Linux 6.5"}
	}
	return c, nil
}

const act = "close sockets"

// End lets go of what New took.
func (c *Closer) End() {
	if c.walker != nil {
		c.walker.close()
	}
}

// Close closes sockets, 4096 at most. It returns an error or nil for each: ErrEnded,
// ErrOutOfReach, or why it could not be closed.
func (c *Closer) Close(sockets []Socket) []error {
	result := make([]error, len(sockets))
	of := map[uint32][]int{}
	for i, s := range sockets {
		of[s.Namespace] = append(of[s.Namespace], i)
	}
	paths := find(slices.Concat([]string{"/proc/self/ns/net", c.home}, slices.Collect(maps.Values(c.paths))), slices.Collect(maps.Keys(of)))
	c.paths = paths
	for namespace, members := range of {
		path, found := paths[namespace]
		if !found {
			note(result, members, ErrOutOfReach)
			continue
		}
		some := make([]Socket, len(members))
		for i, at := range members {
			some[i] = sockets[at]
		}
		var errs []error
		err := netns.Do(path, func() (err error) {
			errs, err = c.closeHere(some)
			return err
		})
		if err != nil {
			note(result, members, err)
			continue
		}
		for i, at := range members {
			result[at] = errs[i]
		}
	}
	return result
}

func note(result []error, members []int, err error) {
	for _, at := range members {
		result[at] = err
	}
}

// closeHere closes sockets of the calling thread's namespace.
func (c *Closer) closeHere(sockets []Socket) ([]error, error) {
	if c.walker != nil {
		return c.walker.closeHere(sockets)
	}
	conn, err := nl.Subscribe(unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("%s: open netlink: %w", act, err)
	}
	defer conn.Close()
	handle := map[int]*nl.SocketHandle{unix.NETLINK_SOCK_DIAG: {Socket: conn}}
	errs := make([]error, len(sockets))
	for i, s := range sockets {
		ask := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
		ask.Sockets = handle
		errs[i] = execute(ask, request(s, 0))
	}
	return errs, nil
}

func execute(ask *nl.NetlinkRequest, request []byte) error {
	ask.AddRawData(request)
	_, err := ask.Execute(unix.NETLINK_SOCK_DIAG, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) {
		return ErrEnded
	}
	return err
}

// request is struct inet_diag_req_v2 of linux/inet_diag.h.
func request(s Socket, states uint32) []byte {
	local, remote := s.Local.Addr().Unmap(), s.Remote.Addr().Unmap()
	r := make([]byte, 0, 56)
	family := byte(unix.AF_INET6)
	if remote.Is4() {
		family = unix.AF_INET
	}
	r = append(r, family, s.Protocol, 0, 0)
	r = binary.NativeEndian.AppendUint32(r, states)
	r = binary.BigEndian.AppendUint16(r, s.Local.Port())
	r = binary.BigEndian.AppendUint16(r, s.Remote.Port())
	for _, a := range []netip.Addr{local, remote} {
		var place [16]byte
		copy(place[:], a.AsSlice())
		r = append(r, place[:]...)
	}
	r = binary.NativeEndian.AppendUint32(r, s.Device)
	r = binary.NativeEndian.AppendUint32(r, uint32(s.Cookie))
	return binary.NativeEndian.AppendUint32(r, uint32(s.Cookie>>32))
}

// nobody is a socket that there never is.
func nobody(protocol uint8) Socket {
	nowhere := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	return Socket{Protocol: protocol, Local: nowhere, Remote: nowhere, Cookie: 1 << 63}
}

// probeNetlink finds out whether SOCK_DESTROY is there for both protocols. The
// kernel answers ENOENT for a socket that is not there and for a module that is not
// there. A list of sockets in no state tells the two apart: it is empty, or ENOENT.
func probeNetlink() error {
	for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		list := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		if err := execute(list, request(nobody(protocol), 0)); err != nil {
			return fmt.Errorf("list sockets of protocol %d: %w", protocol, err)
		}
		destroy := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
		if err := execute(destroy, request(nobody(protocol), 0)); err != nil && !errors.Is(err, ErrEnded) {
			return fmt.Errorf("close a socket of protocol %d: %w", protocol, err)
		}
	}
	return nil
}
