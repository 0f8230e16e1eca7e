package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Connection is one of TCP, by its ends.
type Connection struct{ From, To netip.AddrPort }

// Reserve makes the kernel remember connections of this node that somebody else
// translates behind its back, so that masquerading gives none of their source ports to
// others. It lasts for a time and can be repeated before that is over. What the kernel
// tracks with the same ends stays as it is; one that cannot be told keeps nothing. Each
// takes an entry of the table, and two microseconds.
func (n *Net) Reserve(all []Connection, lasts time.Duration) error {
	const newEntry, most = unix.NFNL_SUBSYS_CTNETLINK << 8, 500
	if len(all) == 0 {
		return nil
	}
	s, err := n.dial(0)
	if err != nil {
		return err
	}
	defer s.close()
	for some := range slices.Chunk(all, most) {
		entries := make([]attributes, len(some))
		for i, c := range some {
			entries[i] = c.entry(lasts)
		}
		err := s.each(newEntry, unix.NLM_F_CREATE, entries, unix.EEXIST)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil // no ctnetlink in this kernel
		}
		if err != nil {
			return fmt.Errorf("reserve source ports: %w", err)
		}
	}
	return nil
}

// Unreserve makes the kernel forget connections, also those that Reserve did not make; what
// it does not know is no error.
func (n *Net) Unreserve(all []Connection) error {
	s, err := n.dial(0)
	if err != nil {
		return err
	}
	defer s.close()
	for some := range slices.Chunk(all, 500) {
		names := make([]attributes, len(some))
		for i, c := range some {
			names[i] = attributes(nil).nest(ctaOriginal, tupleOf(unix.IPPROTO_TCP, c.From, c.To))
		}
		if err := s.remove(names); err != nil {
			return fmt.Errorf("forget connections: %w", err)
		}
	}
	return nil
}

// entry is the connection as one that was answered and goes on.
func (c Connection) entry(lasts time.Duration) attributes {
	const (
		status, timeout = 3, 7               // CTA_STATUS, CTA_TIMEOUT
		open            = 1<<1 | 1<<2 | 1<<3 // IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED
	)
	return attributes(nil).
		nest(ctaOriginal, tupleOf(unix.IPPROTO_TCP, c.From, c.To)).
		nest(ctaReply, tupleOf(unix.IPPROTO_TCP, c.To, c.From)).
		number(status, open).
		number(timeout, uint32(lasts.Seconds()))
}

// tupleOf is one direction of an entry.
func tupleOf(protocol byte, from, to netip.AddrPort) attributes {
	const number = 1 // CTA_PROTO_NUM
	kinds := [2]uint16{ctaSource4, ctaTarget4}
	if from.Addr().Is6() {
		kinds = [2]uint16{ctaSource6, ctaTarget6}
	}
	port := func(a netip.AddrPort) []byte { return binary.BigEndian.AppendUint16(nil, a.Port()) }
	return attributes(nil).
		nest(ctaTupleIP, attributes(nil).put(kinds[0], from.Addr().AsSlice()).put(kinds[1], to.Addr().AsSlice())).
		nest(ctaTupleProto, attributes(nil).put(number, []byte{protocol}).put(ctaSourcePort, port(from)).put(ctaTargetPort, port(to)))
}
