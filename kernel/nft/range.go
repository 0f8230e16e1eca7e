package nft

import (
	"net/netip"
	"slices"
)

// Merge is the shortest list of prefixes that cover the same addresses, in the
// order of their addresses, IPv4 first. Prefixes that are not valid are left out.
func Merge(prefixes []netip.Prefix) []netip.Prefix {
	sorted := make([]netip.Prefix, 0, len(prefixes))
	for _, p := range prefixes {
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		if p.IsValid() {
			sorted = append(sorted, p.Masked())
		}
	}
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	var merged []netip.Prefix
	for _, p := range sorted {
		if n := len(merged); n > 0 && merged[n-1].Contains(p.Addr()) {
			continue // the wider one came first
		}
		merged = append(merged, p)
		for n := len(merged); n > 1; n-- {
			both, ok := pair(merged[n-2], merged[n-1])
			if !ok {
				break
			}
			merged = append(merged[:n-2], both)
		}
	}
	return merged
}

// pair is the prefix of which a and b are the halves.
func pair(a, b netip.Prefix) (both netip.Prefix, ok bool) {
	if a.Bits() != b.Bits() || a.Bits() == 0 || a.Addr().BitLen() != b.Addr().BitLen() {
		return netip.Prefix{}, false
	}
	both = netip.PrefixFrom(a.Addr(), a.Bits()-1).Masked()
	return both, both.Contains(b.Addr())
}

// last is the last address of a prefix.
func last(p netip.Prefix) netip.Addr {
	bytes := p.Addr().AsSlice()
	for bit := p.Bits(); bit < p.Addr().BitLen(); bit++ {
		bytes[bit/8] |= 0x80 >> (bit % 8)
	}
	end, _ := netip.AddrFromSlice(bytes)
	return end
}

// prefixOf is the prefix that begins at start and ends before end; an end that is
// not valid is after the last address there is.
func prefixOf(start, end netip.Addr) (netip.Prefix, bool) {
	for bits := range start.BitLen() + 1 {
		p := netip.PrefixFrom(start, bits)
		if p.Masked() == p && last(p).Next() == end {
			return p, true
		}
	}
	return netip.Prefix{}, false
}
