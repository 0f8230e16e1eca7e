package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Numbers of ctnetlink, linux/netfilter/nfnetlink_conntrack.h.
const (
	ctGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1
	ctDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2

	ctaOriginal, ctaReply, ctaID, ctaZone = 1, 2, 12, 18
	ctaTupleIP                            = 1 // of a tuple; in it sources and targets:
	ctaSource4, ctaTarget4                = 1, 2
	ctaSource6, ctaTarget6                = 3, 4
)

// Forget removes what the kernel remembers of connections between any two of the
// ranges, which must be as Merge gives them, and returns how many there were.
// After SetUntracked nothing updates it: it only takes room, for days, and were
// the connection tracked again, its packets would not fit and count as invalid.
// Connections whose addresses are translated stay. It reads the whole table, about
// two microseconds an entry, and keeps little of it in memory. A kernel that
// cannot do it forgets by itself when the entries' time has come.
func (n *Net) Forget(ranges []netip.Prefix) (count int, err error) {
	reader, err := n.dial(0)
	if err != nil {
		return 0, err
	}
	defer reader.close()
	remover, err := n.dial(0)
	if err != nil {
		return 0, err
	}
	defer remover.close()
	const most = 500 // messages at a time
	var forget []attributes
	flush := func() error {
		count += len(forget)
		err := remover.remove(forget)
		forget = forget[:0]
		return err
	}
	for m, err := range reader.request(ctGet, unix.NLM_F_DUMP, unix.AF_UNSPEC, nil) {
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return 0, nil // no ctnetlink in this kernel
		}
		if err == nil && between(m.attributes, ranges) {
			forget = append(forget, nameOf(m.attributes))
		}
		if err == nil && len(forget) == most {
			err = flush()
		}
		if err != nil && !errors.Is(err, errChanged) { // what came meanwhile is not tracked
			return count, fmt.Errorf("forget connections: %w", err)
		}
	}
	if err := flush(); err != nil {
		return count, fmt.Errorf("forget connections: %w", err)
	}
	return count, nil
}

// between says that an entry is of a connection between two of the ranges, not
// translated.
func between(entry []byte, ranges []netip.Prefix) bool {
	from, to := ends(find(entry, ctaOriginal))
	back, forth := ends(find(entry, ctaReply))
	return from == forth && to == back && within(from, ranges) && within(to, ranges)
}

func ends(tuple []byte) (source, target netip.Addr) {
	ip := find(tuple, ctaTupleIP)
	source, ok := netip.AddrFromSlice(find(ip, ctaSource4))
	if !ok {
		source, _ = netip.AddrFromSlice(find(ip, ctaSource6))
	}
	target, ok = netip.AddrFromSlice(find(ip, ctaTarget4))
	if !ok {
		target, _ = netip.AddrFromSlice(find(ip, ctaTarget6))
	}
	return source, target
}

// within says that an address is in one of the merged ranges.
func within(a netip.Addr, ranges []netip.Prefix) bool {
	after, exact := slices.BinarySearchFunc(ranges, a, func(p netip.Prefix, a netip.Addr) int { return p.Addr().Compare(a) })
	return exact || after > 0 && ranges[after-1].Contains(a)
}

// nameOf is what names an entry; its family goes with its addresses.
func nameOf(entry []byte) attributes {
	name := attributes(nil).nest(ctaOriginal, find(entry, ctaOriginal))
	for _, kind := range []uint16{ctaID, ctaZone} {
		if value := find(entry, kind); value != nil {
			name = name.put(kind, value)
		}
	}
	return name
}

// remove removes entries; those that are gone already are no error.
func (s *socket) remove(names []attributes) error {
	return s.each(ctDelete, 0, names, unix.ENOENT)
}

// each sends a message about each of some entries, in one go. What fails with the
// accepted error is none.
func (s *socket) each(message, flags uint16, entries []attributes, accepted unix.Errno) error {
	if len(entries) == 0 {
		return nil
	}
	var batch []byte
	for i, entry := range entries {
		if i == len(entries)-1 {
			flags |= unix.NLM_F_ACK
		}
		batch = append(batch, s.message(message, flags, familyOf(entry), entry)...)
	}
	if err := s.send(batch); err != nil {
		return err
	}
	for m, err := range s.receive() {
		if err != nil {
			return err
		}
		if err := m.err(); err != nil && !errors.Is(err, accepted) {
			return err
		}
		if m.sequence == s.sequence {
			return nil
		}
	}
	return nil
}

func familyOf(name attributes) byte {
	if source, _ := ends(find(name, ctaOriginal)); source.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
