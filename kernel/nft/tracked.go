package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Of linux/netfilter/nfnetlink_conntrack.h, in a tuple.
const (
	ctaTupleProto                = 2
	ctaSourcePort, ctaTargetPort = 2, 3
)

// Tracked is an entry of connection tracking: who sends to whom, as the packets of the
// connection come and as those of the answers do. They differ by more than their direction
// where addresses are translated.
type Tracked struct{ Original, Reply Direction }

// Direction is one of the two ways of an entry.
type Direction struct{ From, To netip.AddrPort }

// Translated is what becomes of a packet of the entry, which has to be one of its two
// directions: its ends once both translations are done.
func (t Tracked) Translated(d Direction) Direction {
	if d == t.Original {
		return Direction{t.Reply.To, t.Reply.From}
	}
	return Direction{t.Original.To, t.Original.From}
}

// Entry returns the entry that a packet of a protocol with ports belongs to, in whichever
// direction, of the zone 0. The error is fs.ErrNotExist where there is none, or no
// connection tracking. It costs one message, however many entries there are.
func (n *Net) Entry(protocol byte, d Direction) (t Tracked, err error) {
	s, err := n.dial(0)
	if err != nil {
		return t, err
	}
	defer s.close()
	family := byte(unix.AF_INET6)
	if d.From.Addr().Is4() {
		family = unix.AF_INET
	}
	name := attributes(nil).nest(ctaOriginal, tupleOf(protocol, d.From, d.To))
	for m, err := range s.request(ctGet, 0, family, name) {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return t, fs.ErrNotExist
		}
		if err != nil {
			return t, fmt.Errorf("ask connection tracking for %v > %v: %w", d.From, d.To, err)
		}
		return Tracked{direction(find(m.attributes, ctaOriginal)), direction(find(m.attributes, ctaReply))}, nil
	}
	return t, fs.ErrNotExist
}

func direction(tuple []byte) Direction {
	from, to := ends(tuple)
	ports := find(tuple, ctaTupleProto)
	port := func(kind uint16) uint16 {
		if value := find(ports, kind); len(value) >= 2 {
			return binary.BigEndian.Uint16(value)
		}
		return 0
	}
	return Direction{netip.AddrPortFrom(from, port(ctaSourcePort)), netip.AddrPortFrom(to, port(ctaTargetPort))}
}
