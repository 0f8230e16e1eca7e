package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/model"
)

// Learned lists what is known of the names that were learned and not forgotten, in no
// order, also by an earlier process; of those whose time is over, what was known last.
// Names that cannot be read are left out. TTLs are as of now, 0 where they are over.
func (l *Layer) Learned() ([]model.Outside, error) {
	l.learning.Lock()
	defer l.learning.Unlock()
	if l.host == nil {
		return nil, errNotOpen
	}
	return l.tables.learned()
}

// LookLearned is Learned for who has not opened the layer: it reads the pinned map, in the
// order of names. Where there is none nothing was learned.
func (l *Layer) LookLearned() ([]model.Outside, error) {
	opened, _, err := bpfmap.Look(l.settings.Pins, datapathMapOutside)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer bpfmap.CloseAll(opened)
	if err := sameLayout(opened); err != nil {
		return nil, fmt.Errorf("read the names in %s: %w", l.settings.Pins, err)
	}
	all, err := tablesOf(opened).learned()
	slices.SortFunc(all, func(a, b model.Outside) int { return strings.Compare(a.Name, b.Name) })
	return all, err
}

// learned are the names outside that are in force.
func (t tables) learned() ([]model.Outside, error) {
	now, err := clockNow()
	if err != nil {
		return nil, err
	}
	entries, err := t.outside.All()
	if err != nil {
		return nil, fmt.Errorf("read the names outside the cluster: %w", err)
	}
	all := make([]model.Outside, 0, len(entries))
	for key, entry := range entries {
		if o, ok := entry.recall(nameOf(key), now); ok {
			all = append(all, o)
		}
	}
	return all, nil
}

// recall is what outsideOf made an entry of.
func (e *datapathOutsideName) recall(name string, now clock) (o model.Outside, ok bool) {
	o.Name = name
	var records [recordBytes]byte
	for i, word := range e.Record {
		binary.LittleEndian.PutUint64(records[8*i:], word)
	}
	passed := time.Duration(now.boot - e.Since)
	for i, to := range []*model.Known{&o.A, &o.AAAA} {
		k := e.Known[i]
		if *to = (model.Known{State: model.KnownState(k.State), Until: now.timeOf(k.Until), Stale: k.Stale > 0}); to.State == model.KnownNot {
			continue
		}
		text := append(append(wire(name), 0), records[min(8*int(k.From), recordBytes):]...)
		if !recallRecords(to, text, k, passed) {
			return o, false
		}
		if to.State == model.KnownAddresses {
			to.Addresses = e.Addresses.list(i == 0)
		}
	}
	return o, true
}

// recallRecords reads the aliases and the SOA record behind a name. False if that is not
// what they are.
func recallRecords(k *model.Known, text []byte, of datapathKnown, passed time.Duration) bool {
	at := lengthOfName(text)
	for range int(of.Aliases) {
		r, ok := recordAt(text, at)
		if !ok || r.kind != typeCNAME || lengthOfName(r.data) != len(r.data) {
			return false
		}
		k.Chain = append(k.Chain, model.Alias{Target: dotted(r.data), TTL: max(0, r.ttl-passed).Truncate(time.Second)})
		at = r.end
	}
	if of.Negative == 0 {
		return true
	}
	r, ok := recordAt(text, at)
	if !ok || r.kind != typeSOA {
		return false
	}
	k.SOA = append(k.SOA, r.owner...)
	left := max(0, r.ttl-passed)
	k.SOA = append(k.SOA, 0, typeSOA, 0, classIN)
	k.SOA = binary.BigEndian.AppendUint32(k.SOA, uint32(left/time.Second))
	k.SOA = append(binary.BigEndian.AppendUint16(k.SOA, uint16(len(r.data))), r.data...)
	_, _, ok = readSOA(k.SOA)
	return ok
}

// written is one record as appendHead begins it.
type written struct {
	owner, data []byte
	kind        int
	ttl         time.Duration
	end         int
}

// recordAt reads a record whose owner is a place in the text.
func recordAt(text []byte, at int) (r written, ok bool) {
	if at+recordHead > len(text) {
		return r, false
	}
	head := text[at:]
	begin := at + recordHead
	r.end = begin + int(binary.BigEndian.Uint16(head[10:]))
	owner := int(binary.BigEndian.Uint16(head) &^ 0xc000)
	if r.end > len(text) || owner >= at {
		return r, false
	}
	n := lengthOfName(text[owner:])
	if n == 0 {
		return r, false
	}
	r.owner, r.data, r.kind = text[owner:owner+n], text[begin:r.end], int(binary.BigEndian.Uint16(head[2:]))
	r.ttl = time.Duration(binary.BigEndian.Uint32(head[6:])) * time.Second
	return r, true
}

// dotted is a name as people write it, without the final dot.
func dotted(name []byte) string {
	var labels []string
	for at := 0; at < len(name) && name[at] > 0; at += 1 + int(name[at]) {
		labels = append(labels, string(name[at+1:at+1+int(name[at])]))
	}
	return strings.Join(labels, ".")
}

// list are the addresses of a family.
func (a *datapathAddresses) list(ip4 bool) (all []netip.Addr) {
	if ip4 {
		for _, word := range a.Ip4[:min(int(a.Ip4Count), mostAddresses)] {
			var bytes [4]byte
			binary.LittleEndian.PutUint32(bytes[:], word)
			all = append(all, netip.AddrFrom4(bytes))
		}
		return all
	}
	for _, addr := range a.Ip6[:min(int(a.Ip6Count), mostAddresses)] {
		all = append(all, fromAddress(addr))
	}
	return all
}
