package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// magic marks the payload of echoes that are notes, and is what the kernel filters by.
	magic = 0x6d696c6c72616365 // "millrace"
	// noteVersion is that of the payload: what has another is no note.
	noteVersion = 1
	// noteHops lets a fabric that routes what looks like one segment take its hops, and ends
	// what goes round in circles.
	noteHops = 8

	icmpHeader = 8
	// noteLength is that of the payload: magic, version, kind, what is said, a 0, about, token.
	noteLength = 24

	kindAsk, kindAnswer = 1, 2

	echo4, echoReply4 = 8, 0     // RFC 792
	echo6, echoReply6 = 128, 129 // RFC 4443
)

// Note is what two neighbours tell each other in an echo request, or its answer. The kernel
// that gets a request answers it, too, by repeating it; that is no note.
type Note struct {
	// From and To are the addresses in the packet, of one family. They need not be those of the
	// two hosts.
	From, To netip.Addr
	// MAC is the neighbour's hardware address: whom the note goes to, or who sent it.
	MAC [6]byte
	// Answer says that it is one, to the request with the same Token.
	Answer bool
	Token  uint64
	// Said and About mean what the two have agreed on.
	Said  uint8
	About uint32
}

// Notes sends notes by a device and gets those of one family that come there. They go past
// the host's routes and rules, and may have any addresses. Its methods may be called from
// several goroutines.
//
// It takes CAP_NET_RAW. While it is open, each packet of the family that comes by the device
// and reaches the stack is looked at by a filter: two instructions of it, if it is no ICMP.
type Notes struct {
	file   *os.File
	conn   syscall.RawConn
	device int
	six    bool
}

// OpenNotes opens one in a namespace. The error is ErrUnsent where it lacks what it takes.
func OpenNotes(space string, device int, six bool) (*Notes, error) {
	n := &Notes{device: device, six: six}
	if err := within(space, n.open); err != nil {
		return nil, err
	}
	return n, nil
}

func (n *Notes) open() error {
	// Of no protocol at first, so that nothing comes before the filter is there (packet(7)).
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return unsent("open a packet socket, which takes CAP_NET_RAW", err)
	}
	filter := n.filter()
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: n.protocol(), Ifindex: n.device})
	}
	if err != nil {
		unix.Close(fd)
		return unsent(fmt.Sprintf("set up a packet socket at device %d", n.device), err)
	}
	n.file = os.NewFile(uintptr(fd), "notes")
	if n.conn, err = n.file.SyscallConn(); err != nil {
		n.file.Close()
		return unsent("set up a packet socket", err)
	}
	return nil
}

// protocol is that of the frames, in network order.
func (n *Notes) protocol() uint16 {
	kind := uint16(unix.ETH_P_IP)
	if n.six {
		kind = unix.ETH_P_IPV6
	}
	return kind<<8 | kind>>8
}

// filter lets notes pass, by what is cheap to tell of them; parse does the rest.
func (n *Notes) filter() []unix.SockFilter {
	protocol, is, header := uint32(9), uint32(unix.IPPROTO_ICMP), uint32(ip4Header)
	if n.six {
		protocol, is, header = 6, unix.IPPROTO_ICMPV6, ip6Header
	}
	const (
		loadByte = unix.BPF_LD | unix.BPF_B | unix.BPF_ABS
		loadWord = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal    = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		end      = unix.BPF_RET | unix.BPF_K
	)
	return []unix.SockFilter{
		{Code: loadByte, K: protocol},
		{Code: equal, K: is, Jf: 5},
		{Code: loadWord, K: header + icmpHeader},
		{Code: equal, K: magic >> 32, Jf: 3},
		{Code: loadWord, K: header + icmpHeader + 4},
		{Code: equal, K: magic & 0xffffffff, Jf: 1},
		{Code: end, K: ip6Header + icmpHeader + noteLength + 1}, // one more than a note has, so that longer ones are seen to be none
		{Code: end, K: 0},
	}
}

// Close ends it, and a Receive that waits.
func (n *Notes) Close() error { return n.file.Close() }

// Send sends a note. It does not wait where the device has no room.
func (n *Notes) Send(note Note) error {
	if note.From.Is6() != n.six || note.To.Is6() != n.six {
		return fmt.Errorf("send a note from %s to %s: not of the socket's family", note.From, note.To)
	}
	to := &unix.SockaddrLinklayer{Protocol: n.protocol(), Ifindex: n.device, Halen: 6}
	copy(to.Addr[:], note.MAC[:])
	var failed error
	err := n.conn.Control(func(fd uintptr) { failed = unix.Sendto(int(fd), note.packet(), unix.MSG_DONTWAIT, to) })
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("send a note from %s to %s by device %d: %w", note.From, note.To, n.device, err)
	}
	return nil
}

// Receive waits for the next note that is for this host, by its hardware address. The error is
// os.ErrClosed after Close, or what befell the device.
func (n *Notes) Receive() (note Note, err error) {
	b := make([]byte, 2*(ip6Header+icmpHeader+noteLength))
	for {
		var size int
		var from unix.Sockaddr
		var failed error
		err := n.conn.Read(func(fd uintptr) bool {
			size, from, failed = unix.Recvfrom(int(fd), b, 0)
			return !errors.Is(failed, unix.EAGAIN)
		})
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			err = os.ErrClosed // nothing else ends the wait itself
		}
		if err = errors.Join(err, failed); err != nil {
			return note, fmt.Errorf("receive notes by device %d: %w", n.device, err)
		}
		sender, ok := from.(*unix.SockaddrLinklayer)
		if !ok || sender.Pkttype != unix.PACKET_HOST || sender.Halen != 6 {
			continue
		}
		if note, ok = parseNote(b[:size], n.six); ok {
			copy(note.MAC[:], sender.Addr[:])
			return note, nil
		}
	}
}

// packet is the note with its IP header.
func (n Note) packet() []byte {
	if n.From.Is6() {
		return n.packet6()
	}
	b := binary.BigEndian.AppendUint32(nil, 0x4500<<16|uint32(ip4Header+icmpHeader+noteLength))
	b = binary.BigEndian.AppendUint32(b, 0x4000) // Don't Fragment
	b = append(b, noteHops, unix.IPPROTO_ICMP, 0, 0)
	b = append(append(b, n.From.AsSlice()...), n.To.AsSlice()...)
	binary.BigEndian.PutUint16(b[10:], checksum(b))
	message := n.message(echo4, echoReply4)
	binary.BigEndian.PutUint16(message[2:], checksum(message))
	return append(b, message...)
}

func (n Note) packet6() []byte {
	b := binary.BigEndian.AppendUint32(nil, 6<<28)
	b = binary.BigEndian.AppendUint16(b, icmpHeader+noteLength)
	b = append(b, unix.IPPROTO_ICMPV6, noteHops)
	b = append(append(b, n.From.AsSlice()...), n.To.AsSlice()...)
	message := n.message(echo6, echoReply6)
	binary.BigEndian.PutUint16(message[2:], checksum(withPseudoHeader(b, message)))
	return append(b, message...)
}

// message is the ICMP part, without its checksum. The identifier and the number are of the
// token, so that a firewall that knows what was asked lets its answer pass.
func (n Note) message(ask, answer byte) []byte {
	kind, of := ask, byte(kindAsk)
	if n.Answer {
		kind, of = answer, kindAnswer
	}
	b := binary.BigEndian.AppendUint32([]byte{kind, 0, 0, 0}, uint32(n.Token))
	b = binary.BigEndian.AppendUint64(b, magic)
	b = append(b, noteVersion, of, n.Said, 0)
	b = binary.BigEndian.AppendUint32(b, n.About)
	return binary.BigEndian.AppendUint64(b, n.Token)
}

// withPseudoHeader is what the checksum of ICMPv6 is over (RFC 8200, 8.1).
func withPseudoHeader(header, message []byte) []byte {
	b := append([]byte(nil), header[8:ip6Header]...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(message)))
	b = append(b, 0, 0, 0, unix.IPPROTO_ICMPV6)
	return append(b, message...)
}

// parseNote reads a packet that anybody may have sent: without options, extension headers and
// fragments, of the right length, with right checksums.
func parseNote(b []byte, six bool) (n Note, ok bool) {
	header, ask, answer := ip4Header, byte(echo4), byte(echoReply4)
	if six {
		header, ask, answer = ip6Header, echo6, echoReply6
	}
	whole := header + icmpHeader + noteLength
	if len(b) < whole {
		return n, false
	}
	text := b[header:whole]
	if six {
		ok = b[0]>>4 == 6 && int(binary.BigEndian.Uint16(b[4:])) == whole-header && b[6] == unix.IPPROTO_ICMPV6 && checksum(withPseudoHeader(b, text)) == 0
		n.From, n.To = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	} else {
		ok = b[0] == 0x45 && int(binary.BigEndian.Uint16(b[2:])) == whole && binary.BigEndian.Uint16(b[6:])&0x3fff == 0 && b[9] == unix.IPPROTO_ICMP &&
			checksum(b[:header]) == 0 && checksum(text) == 0
		n.From, n.To = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	}
	payload := text[icmpHeader:]
	if !ok || text[1] != 0 || binary.BigEndian.Uint64(payload) != magic || payload[8] != noteVersion {
		return Note{}, false
	}
	n.Answer, n.Said = text[0] == answer, payload[10]
	n.About, n.Token = binary.BigEndian.Uint32(payload[12:]), binary.BigEndian.Uint64(payload[16:])
	if text[0] == ask && payload[9] == kindAsk || text[0] == answer && payload[9] == kindAnswer {
		return n, true
	}
	return Note{}, false
}
