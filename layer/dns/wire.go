package dns

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/millrace/millrace/kernel/bpfmap"
)

// Limits of an entry; names.bpf.c says why.
const (
	nameLimit     = 96
	zoneLimit     = 64
	labelLimit    = 63
	mostAddresses = 8
	recordHead    = 12              // owner, type, class, TTL and length
	soaLength     = recordHead + 42 // of the zone's SOA record
	suffixLimit   = 64
	mostSuffixes  = 8
	// mostDots is what resolvers make of a larger ndots: RES_MAXNDOTS of glibc's
	// <resolv.h>; musl and Go have the same.
	mostDots = 15
)

// wire is a name as it stands in messages (RFC 1035, 3.1), without the final zero; nil
// for one that none can have.
func wire(name string) []byte {
	var bytes []byte
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > labelLimit {
			return nil
		}
		bytes = append(append(bytes, byte(len(label))), label...)
	}
	return bytes
}

// lower is a name in lower case: of ASCII letters only (RFC 4343).
func lower[T string | []byte](name T) T {
	out := append([]byte(nil), name...)
	for i, c := range out {
		if 'A' <= c && c <= 'Z' {
			out[i] = c + 'a' - 'A'
		}
	}
	return T(out)
}

// ParseZone reads a cluster's domain, with or without a final dot, in any case. It
// has at most 62 characters.
func ParseZone(text string) (string, error) {
	zone := strings.ToLower(strings.TrimSuffix(text, "."))
	if n := len(wire(zone)); n == 0 || n+1 > zoneLimit {
		return "", fmt.Errorf("%q is no zone: use a domain name of at most %d characters, such as cluster.local", text, zoneLimit-2)
	}
	return zone, nil
}

// fits says whether a name can be a key. For those that cannot, others are asked.
func fits(name string) bool { n := len(wire(name)); return n > 0 && n <= nameLimit }

// keyOf is the key of a name that fits.
func keyOf(name string) datapathName {
	var bytes [nameLimit]byte
	copy(bytes[:], wire(name))
	var key datapathName
	for i := range key.Word {
		key.Word[i] = binary.LittleEndian.Uint64(bytes[8*i:])
	}
	return key
}

// nameOf is the name that keyOf made a key of.
func nameOf(key datapathName) string {
	var bytes [nameLimit + 1]byte
	for i, word := range key.Word {
		binary.LittleEndian.PutUint64(bytes[8*i:], word)
	}
	return nameIn(bytes[:])
}

// nameIn is the name that bytes begin with, as it stands in messages.
func nameIn(bytes []byte) string {
	var labels []string
	for at := 0; at < len(bytes) && bytes[at] > 0 && at+int(bytes[at]) < len(bytes); at += 1 + int(bytes[at]) {
		labels = append(labels, string(bytes[at+1:at+1+int(bytes[at])]))
	}
	return strings.Join(labels, ".")
}

// searchListOf is what the kernel is told of a pod's search list. False if it is not to be
// told: a list that is longer, or of which a domain is, would be known in part only.
func searchListOf(ndots int, domains []string) (list datapathSearchList, ok bool) {
	if len(domains) == 0 || len(domains) > mostSuffixes {
		return list, false
	}
	list.Ndots, list.Count = uint8(max(0, min(ndots, mostDots))), uint8(len(domains))
	for i, domain := range domains {
		suffix := wire(lower(strings.TrimSuffix(domain, ".")))
		if len(suffix) == 0 || len(suffix)+1 > suffixLimit {
			return list, false
		}
		list.Length[i] = uint8(len(suffix) + 1)
		var bytes [suffixLimit]byte
		copy(bytes[:], suffix)
		for k := range list.Suffix[i].Word {
			list.Suffix[i].Word[k] = binary.LittleEndian.Uint64(bytes[8*k:])
		}
	}
	return list, true
}

// addressOf is the kernel's form of an address: both families in 16 bytes.
func addressOf(addr netip.Addr) datapathAddress {
	return datapathAddress{Word: bpfmap.AddrWords(addr)}
}

func fromAddress(a datapathAddress) netip.Addr { return bpfmap.AddrOf(a.Word) }

// entryOf is what the kernel knows of a name.
func entryOf(row *Row) datapathAddresses {
	entry := datapathAddresses{Kind: datapathNameKindNAME_HAS}
	if row.Left {
		entry.Kind = datapathNameKindNAME_LEFT
	}
	for _, addr := range row.Addresses {
		if addr.Is4() {
			entry.Ip4[entry.Ip4Count] = addressOf(addr).Word[3]
			entry.Ip4Count++
			continue
		}
		entry.Ip6[entry.Ip6Count] = addressOf(addr)
		entry.Ip6Count++
	}
	entry.Longest = uint16(max(soaLength, int(entry.Ip4Count)*(recordHead+4), int(entry.Ip6Count)*(recordHead+16)))
	return entry
}

// rowOf is the row that an entry was made of.
func rowOf(zone string, key datapathName, entry datapathAddresses) *Row {
	row := &Row{Name: nameOf(key), Left: entry.Kind != datapathNameKindNAME_HAS, zone: zone}
	for _, word := range entry.Ip4[:min(int(entry.Ip4Count), mostAddresses)] {
		var bytes [4]byte
		binary.LittleEndian.PutUint32(bytes[:], word)
		row.Addresses = append(row.Addresses, netip.AddrFrom4(bytes))
	}
	for _, a := range entry.Ip6[:min(int(entry.Ip6Count), mostAddresses)] {
		row.Addresses = append(row.Addresses, fromAddress(a))
	}
	return row
}
