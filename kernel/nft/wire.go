package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/netns"
)

// The messages are those of linux/netfilter/nfnetlink.h and nf_tables.h:
// numbers inside attributes are big-endian, those of the headers are the
// machine's.

const (
	headerLen   = unix.SizeofNlMsghdr + 4 // nlmsghdr, nfgenmsg
	datagramLen = 1 << 16                 // the kernel fills at most 32 KiB
	patience    = 10                      // seconds to wait for an answer
)

var host = binary.NativeEndian

// errChanged says that the rules changed while they were read.
var errChanged = errors.New("the rules changed while they were read")

// socket is one netlink socket inside a namespace.
type socket struct {
	fd       int
	sequence uint32
	buffer   []byte
}

// dial opens a socket inside the namespace; groups are the multicast groups, as
// bits, that it receives.
func (n *Net) dial(groups uint32) (*socket, error) {
	s := &socket{fd: -1}
	open := func() (err error) {
		s.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err == nil {
			err = unix.Bind(s.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups})
		}
		return err
	}
	err := netns.In(n.path, open)
	if err == nil {
		err = unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: patience})
	}
	if err != nil {
		s.close()
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			return nil, missing("nfnetlink", "CONFIG_NF_TABLES")
		}
		return nil, fmt.Errorf("open a netfilter socket in %q: %w", n.path, err)
	}
	s.buffer = make([]byte, datagramLen)
	return s, nil
}

func missing(feature, option string) error {
	return &need.Feature{Act: "read and write nftables", Feature: feature, Since: option}
}

func (s *socket) close() {
	if s.fd >= 0 {
		unix.Close(s.fd)
	}
}

// message is one netlink message with its headers.
func (s *socket) message(kind, flags uint16, family byte, attributes attributes) []byte {
	s.sequence++
	m := make([]byte, headerLen, headerLen+len(attributes))
	host.PutUint32(m, uint32(headerLen+len(attributes)))
	host.PutUint16(m[4:], kind)
	host.PutUint16(m[6:], flags|unix.NLM_F_REQUEST)
	host.PutUint32(m[8:], s.sequence)
	m[unix.SizeofNlMsghdr] = family
	if kind == unix.NFNL_MSG_BATCH_BEGIN || kind == unix.NFNL_MSG_BATCH_END {
		binary.BigEndian.PutUint16(m[headerLen-2:], unix.NFNL_SUBSYS_NFTABLES)
	}
	return append(m, attributes...)
}

// kindOf is the message type of an nf_tables message.
func kindOf(message uint16) uint16 { return unix.NFNL_SUBSYS_NFTABLES<<8 | message }

// answer is one message of an answer.
type answer struct {
	family     byte
	attributes []byte
}

// ask sends one message of nf_tables and yields what comes back.
func (s *socket) ask(message, flags uint16, family byte, attributes attributes) iter.Seq2[answer, error] {
	return s.request(kindOf(message), flags, family, attributes)
}

// request sends one message and yields what comes back, until the kernel says
// that it was all. Who stops early must close the socket.
func (s *socket) request(kind, flags uint16, family byte, attributes attributes) iter.Seq2[answer, error] {
	return func(yield func(answer, error) bool) {
		if err := s.send(s.message(kind, flags|unix.NLM_F_ACK, family, attributes)); err != nil {
			yield(answer{}, err)
			return
		}
		changed := false
		for m, err := range s.receive() {
			switch {
			case err != nil:
				yield(answer{}, err)
				return
			case m.sequence != s.sequence:
				continue
			case m.kind == unix.NLMSG_ERROR || m.kind == unix.NLMSG_DONE:
				if err := m.err(); err != nil {
					yield(answer{}, err)
				} else if changed {
					yield(answer{}, errChanged)
				}
				return
			case m.flags&unix.NLM_F_DUMP_INTR != 0:
				changed = true
			case len(m.payload) < 4:
				continue
			case !yield(answer{m.payload[0], m.payload[4:]}, nil):
				return
			}
		}
	}
}

// received is a message without its header.
type received struct {
	kind, flags uint16
	sequence    uint32
	payload     []byte
}

// err is what an NLMSG_ERROR or NLMSG_DONE says.
func (m received) err() error {
	if len(m.payload) < 4 {
		return nil
	}
	if code := int32(host.Uint32(m.payload)); code < 0 {
		return unix.Errno(-code)
	}
	return nil
}

// send sends messages as one, however long.
func (s *socket) send(messages []byte) error {
	if len(messages) > datagramLen { // a message takes more of the socket's room than its bytes
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2*len(messages)+datagramLen); err != nil {
			return err
		}
	}
	return unix.Sendto(s.fd, messages, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// receive yields the messages that arrive, for ever; their memory is used again.
func (s *socket) receive() iter.Seq2[received, error] {
	return func(yield func(received, error) bool) {
		for {
			n, _, err := unix.Recvfrom(s.fd, s.buffer, unix.MSG_TRUNC)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				err = fmt.Errorf("the kernel has not answered for %v", patience*time.Second)
			case err == nil && n > len(s.buffer):
				err = fmt.Errorf("an answer of %d bytes is longer than %d", n, len(s.buffer))
			}
			if err != nil {
				yield(received{}, err)
				return
			}
			for rest := s.buffer[:n]; len(rest) >= unix.SizeofNlMsghdr; {
				length := int(host.Uint32(rest))
				if length < unix.SizeofNlMsghdr || length > len(rest) {
					break
				}
				m := received{host.Uint16(rest[4:]), host.Uint16(rest[6:]), host.Uint32(rest[8:]), rest[unix.SizeofNlMsghdr:length]}
				if !yield(m, nil) {
					return
				}
				rest = rest[min((length+3)&^3, len(rest)):]
			}
		}
	}
}

// step is one message of a transaction.
type step struct {
	message, flags uint16
	attributes     attributes
	family         byte // 0: inet
}

// commit carries out the steps, all or none. Only the last is answered, beside
// those that fail: answers to many would not fit into the socket.
func (s *socket) commit(steps []step) error {
	if len(steps) == 0 {
		return nil
	}
	batch := s.message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, nil)
	for i, step := range steps {
		flags, family := step.flags, step.family
		if i == len(steps)-1 {
			flags |= unix.NLM_F_ACK
		}
		if family == 0 {
			family = familyInet
		}
		batch = append(batch, s.message(kindOf(step.message), flags, family, step.attributes)...)
	}
	last := s.sequence
	batch = append(batch, s.message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, nil)...)
	if err := s.send(batch); err != nil {
		return err
	}
	for m, err := range s.receive() {
		if err != nil {
			return err
		}
		if m.kind != unix.NLMSG_ERROR {
			continue
		}
		if err := m.err(); err != nil {
			return err
		}
		if m.sequence == last {
			return nil
		}
	}
	return nil // not reached: receive ends with an error only
}

// attributes are netlink attributes being written.
type attributes []byte

func (a attributes) put(kind uint16, value []byte) attributes {
	a = host.AppendUint16(a, uint16(4+len(value)))
	a = host.AppendUint16(a, kind)
	a = append(a, value...)
	for len(a)%4 != 0 {
		a = append(a, 0)
	}
	return a
}

func (a attributes) text(kind uint16, text string) attributes {
	return a.put(kind, append([]byte(text), 0))
}

func (a attributes) number(kind uint16, n uint32) attributes {
	return a.put(kind, binary.BigEndian.AppendUint32(nil, n))
}

func (a attributes) nest(kind uint16, inner attributes) attributes {
	return a.put(kind|unix.NLA_F_NESTED, inner)
}

// attribute is one that was read.
type attribute struct {
	kind   uint16
	nested bool // its value is attributes; the kernel does not always say so
	value  []byte
}

// listed yields the attributes in raw by their places.
func listed(raw []byte) iter.Seq2[int, attribute] {
	return func(yield func(int, attribute) bool) {
		for i := 0; len(raw) >= 4; i++ {
			length, kind := int(host.Uint16(raw)), host.Uint16(raw[2:])
			if length < 4 || length > len(raw) {
				return
			}
			if !yield(i, attribute{kind &^ nested, kind&nested != 0, raw[4:length]}) {
				return
			}
			raw = raw[min((length+3)&^3, len(raw)):]
		}
	}
}

// nested marks an attribute that holds attributes; the mark of byte order
// (NLA_F_NET_BYTEORDER) is not used here.
const nested = unix.NLA_F_NESTED

// find is the first attribute of a kind; nil if there is none.
func find(raw []byte, kind uint16) []byte {
	for _, a := range listed(raw) {
		if a.kind == kind {
			return a.value
		}
	}
	return nil
}

// numberOf reads a big-endian number; 0 if it is missing.
func numberOf(raw []byte, kind uint16) uint32 {
	if value := find(raw, kind); len(value) == 4 {
		return binary.BigEndian.Uint32(value)
	}
	return 0
}

// textOf reads a text; "" if it is missing.
func textOf(raw []byte, kind uint16) string { return string(trim(find(raw, kind))) }

// trim is a text without the zero that ends it.
func trim(value []byte) []byte {
	if end := bytes.IndexByte(value, 0); end >= 0 {
		return value[:end]
	}
	return value
}
