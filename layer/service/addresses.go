package service

import (
	"net/netip"
	"strings"

	"github.com/millrace/millrace/kernel/bpfmap"
)

// addresses are somebody's, one of each family; invalid where there is none.
type addresses struct{ ip4, ip6 netip.Addr }

// firstOf takes the first of each family that others can answer to.
func firstOf(all []netip.Addr) (first addresses) {
	for _, a := range all {
		a = a.Unmap()
		switch {
		case !a.IsGlobalUnicast():
		case a.Is4() && !first.ip4.IsValid():
			first.ip4 = a
		case a.Is6() && !first.ip6.IsValid():
			first.ip6 = a
		}
	}
	return first
}

// join is those that are there, as text.
func (a addresses) join(between string) string {
	var texts []string
	for _, one := range []netip.Addr{a.ip4, a.ip6} {
		if one.IsValid() {
			texts = append(texts, one.String())
		}
	}
	return strings.Join(texts, between)
}

// value is struct addresses of client.h.
func (a addresses) value() (value datapathAddresses) {
	if a.ip4.IsValid() {
		value.Ip4.Word = bpfmap.AddrWords(a.ip4)
	}
	if a.ip6.IsValid() {
		value.Ip6.Word = bpfmap.AddrWords(a.ip6)
	}
	return value
}

func addressesOf(value datapathAddresses) (a addresses) {
	if value.Ip4.Word != [4]uint32{} {
		a.ip4 = bpfmap.AddrOf(value.Ip4.Word)
	}
	if value.Ip6.Word != [4]uint32{} {
		a.ip6 = bpfmap.AddrOf(value.Ip6.Word)
	}
	return a
}
