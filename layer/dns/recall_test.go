package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// What was learned is recalled as it was, but for the spelling of the name, and TTLs that
// both families share.
func TestRecalled(t *testing.T) {
	now, err := clockNow()
	must(t, err)
	for _, o := range neighbours() {
		entry, ok := outsideOf(o, now)
		if !ok {
			continue
		}
		got, ok := entry.recall(nameOf(keyOf(bare(o.Name))), now)
		if !ok || got.Name != bare(o.Name) {
			t.Errorf("%s: %+v, %v", o.Name, got, ok)
			continue
		}
		for i, pair := range [][2]Known{{o.A, got.A}, {o.AAAA, got.AAAA}} {
			if learned, recalled := textOf(pair[0]), textOf(pair[1]); learned != recalled {
				t.Errorf("%s, family %d:\nlearned  %s\nrecalled %s", o.Name, i, learned, recalled)
			}
		}
		later := clock{now.boot + uint64(100*time.Second), now.time.Add(100 * time.Second)}
		if again, _ := entry.recall(o.Name, later); len(got.A.Chain) > 0 && got.A.Chain[0].TTL-again.A.Chain[0].TTL != 100*time.Second {
			t.Errorf("%s: after 100 s its alias has %v, and had %v", o.Name, again.A.Chain[0].TTL, got.A.Chain[0].TTL)
		}
	}
}

// textOf is what is known, without the time at which it ends and the spelling of aliases.
func textOf(k Known) string {
	slices.SortFunc(k.Addresses, netip.Addr.Compare)
	var chain []string
	for _, alias := range k.Chain {
		chain = append(chain, bare(alias.Target))
	}
	return fmt.Sprintf("%d %v via %s, stale %v, SOA %x", k.State, k.Addresses, strings.Join(chain, ", "), k.Stale, lower(k.SOA))
}

// FuzzRecall looks for entries that stop who reads them: another version may have written
// them.
func FuzzRecall(f *testing.F) {
	now, err := clockNow()
	must(f, err)
	for _, o := range neighbours() {
		if entry, ok := outsideOf(o, now); ok {
			f.Add(o.Name, bytesOf(entry.Record[:]), entry.Known[0].From, entry.Known[0].Aliases, entry.Known[1].From, entry.Known[1].Aliases)
		}
	}
	f.Fuzz(func(t *testing.T, name string, record []byte, from0, aliases0, from1, aliases1 uint8) {
		entry := datapathOutsideName{}
		for i := range entry.Record {
			for j := range 8 {
				if at := 8*i + j; at < len(record) {
					entry.Record[i] |= uint64(record[at]) << (8 * j)
				}
			}
		}
		entry.Known = [2]datapathKnown{{State: 1, From: from0, Aliases: aliases0, Negative: 1}, {State: 2, From: from1, Aliases: aliases1, Negative: 1}}
		entry.Addresses.Ip4Count, entry.Addresses.Ip6Count = from0, from1
		if o, ok := entry.recall(name, now); ok {
			for _, k := range []Known{o.A, o.AAAA} {
				if len(k.Addresses) > mostAddresses {
					t.Errorf("%d addresses", len(k.Addresses))
				}
				if k.SOA != nil {
					if _, _, ok := readSOA(k.SOA); !ok {
						t.Errorf("SOA %x", k.SOA)
					}
				}
			}
		}
	})
}

func bytesOf(words []uint64) (all []byte) {
	for _, word := range words {
		for j := range 8 {
			all = append(all, byte(word>>(8*j)))
		}
	}
	return all
}
