package trace

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// Range are addresses of one end of the packets that are asked for, and its port; 0
// stands for any.
type Range struct {
	Prefix netip.Prefix
	Port   uint16
}

// MostRanges is how many of them Options may hold, both sides together.
const MostRanges = 4096

// ends is how many ends are named.
func ends(o *Options) (n uint8) {
	for _, side := range [][]Range{o.From, o.To} {
		if len(side) > 0 {
			n++
		}
	}
	return n
}

const (
	sideFrom = 1 << iota
	sideTo
)

// claim is what is said of a range: whose it is, and the port at each side, where there
// is one alone.
type claim struct {
	of    uint8
	ports [2]uint16
}

// claims say of each range whose it is. The kernel looks at the longest one only, so that
// it holds what is said of those around it.
func claims(o *Options) map[netip.Prefix]claim {
	all := map[netip.Prefix]claim{}
	for _, side := range [][]Range{o.From, o.To} {
		for _, r := range side {
			all[bits128(r.Prefix)] = claim{}
		}
	}
	for at, side := range [][]Range{o.From, o.To} {
		for _, r := range side {
			around := bits128(r.Prefix)
			for prefix, c := range all {
				if prefix.Bits() < around.Bits() || !around.Contains(prefix.Addr()) {
					continue
				}
				if of := uint8(sideFrom << at); c.of&of == 0 {
					c.of, c.ports[at] = c.of|of, r.Port
				} else if c.ports[at] != r.Port {
					c.ports[at] = 0
				}
				all[prefix] = c
			}
		}
	}
	return all
}

// bits128 is a range as one of IPv6, IPv4 mapped (RFC 4291, 2.5.5.2).
func bits128(p netip.Prefix) netip.Prefix {
	if p.Addr().Is4() {
		return netip.PrefixFrom(netip.AddrFrom16(p.Addr().As16()), p.Bits()+96).Masked()
	}
	return p.Masked()
}

// putSides tells the programs whose packets are asked for.
func putSides(to *ebpf.Map, o *Options) error {
	if n := len(o.From) + len(o.To); n > MostRanges {
		return fmt.Errorf("%d ranges are asked for, %d is the most", n, MostRanges)
	}
	for prefix, c := range claims(o) {
		key := traceRange{Length: uint32(prefix.Bits())}
		address := prefix.Addr().As16()
		for i := range key.Address.Word {
			key.Address.Word[i] = binary.NativeEndian.Uint32(address[4*i:])
		}
		value := traceSide{Of: c.of, FromPort: swap(c.ports[0]), ToPort: swap(c.ports[1])}
		if err := to.Put(key, value); err != nil {
			return fmt.Errorf("ask for packets of %s: %w", prefix, err)
		}
	}
	return nil
}
