package dns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/model"
)

const (
	mostAliases = 7
	recordBytes = 18 * 8
	// spared is the part of a full table that stays when names make room for others.
	spared = 7.0 / 8
)

// Learn makes the programs answer for names outside the cluster, which may have a final dot
// and be in any case; what was known of them is replaced. Those that do not fit into an
// entry (96 bytes of name, eight addresses of a family, 144 bytes of other records) are
// forgotten: they are no error. If the table is full, names make room that are not known
// any more, or were asked for longest ago. It returns the errors of names that could not
// be written, which are forgotten then. It may be called by several goroutines at a time.
func (l *Layer) Learn(of []model.Outside) error {
	l.learning.Lock()
	defer l.learning.Unlock()
	if l.host == nil {
		return errNotOpen
	}
	now, err := clockNow()
	if err != nil {
		return err
	}
	keys, entries := make([]datapathName, 0, len(of)), make([]datapathOutsideName, 0, len(of))
	var unfit []string
	fresh := map[datapathName]bool{}
	for _, o := range of {
		entry, ok := outsideOf(o, now)
		if !ok {
			unfit = append(unfit, o.Name)
			continue
		}
		key := keyOf(bare(o.Name))
		old, there, err := l.tables.outside.Get(key)
		if err == nil && there {
			entry.Asked = old.Asked
		} else if !fresh[key] {
			fresh[key] = true
			l.learned++
		}
		entry.Addresses.Number = l.number.Add(1)
		keys, entries = append(keys, key), append(entries, entry)
	}
	return l.writeOutside(func() error {
		failures := []error{l.forget(unfit)}
		for i, err := range l.putOutside(keys, entries, now) {
			if err != nil {
				name := nameOf(keys[i])
				if _, there, err := l.tables.outside.Get(keys[i]); err == nil && !there {
					l.learned--
				}
				failures = append(failures, fmt.Errorf("learn name %s: %w", name, err), l.forget([]string{name}))
			}
		}
		return errors.Join(failures...)
	})
}

// writeOutside has the programs know that the names outside are written meanwhile.
func (l *Layer) writeOutside(write func() error) error {
	if err := l.tables.begin(datapathTableTABLE_OUTSIDE); err != nil {
		return err
	}
	return errors.Join(write(), l.tables.end(datapathTableTABLE_OUTSIDE))
}

var errNotOpen = errors.New("the dns layer is not open")

// putOutside writes entries, and makes room where there is none.
func (l *Layer) putOutside(keys []datapathName, entries []datapathOutsideName, now clock) []error {
	errs := l.tables.outside.Put(keys, entries)
	full := slices.ContainsFunc(errs, func(err error) bool { return errors.Is(err, unix.E2BIG) })
	if !full || l.dropSome(now) != nil {
		return errs
	}
	return l.tables.outside.Put(keys, entries)
}

// dropSome drops an eighth of the names: those that are not known any more, then those
// asked for longest ago.
func (l *Layer) dropSome(now clock) error {
	all, err := l.asked(now)
	if err != nil {
		return err
	}
	slices.SortFunc(all, func(a, b model.Asked) int {
		overA, overB := endOfAll(a).Before(now.time), endOfAll(b).Before(now.time)
		if overA != overB {
			return map[bool]int{true: -1, false: 1}[overA]
		}
		return a.Last.Compare(b.Last)
	})
	n := len(all) - int(spared*float64(l.tables.outside.Capacity()))
	for n < len(all) && n > 0 && endOfAll(all[n]).Before(now.time) {
		n++
	}
	var names []string
	for _, one := range all[:max(n, 0)] {
		names = append(names, one.Name)
	}
	return l.forget(names)
}

// endOfAll is when nothing is known of a name any more.
func endOfAll(a model.Asked) time.Time {
	if a.A.After(a.AAAA) {
		return a.A
	}
	return a.AAAA
}

// Forget makes the programs pass up what is asked about names. Those that are not known
// are no error.
func (l *Layer) Forget(names []string) error {
	l.learning.Lock()
	defer l.learning.Unlock()
	if l.host == nil {
		return errNotOpen
	}
	return l.writeOutside(func() error { return l.forget(names) })
}

func (l *Layer) forget(names []string) error {
	var keys []datapathName
	for _, name := range names {
		if name = bare(name); !fits(name) {
			continue
		}
		if _, there, err := l.tables.outside.Get(keyOf(name)); err == nil && there {
			keys = append(keys, keyOf(name))
		}
	}
	l.learned -= len(keys)
	for i, err := range l.tables.outside.Delete(keys) {
		if err != nil {
			return fmt.Errorf("forget name %s: %w", nameOf(keys[i]), err)
		}
	}
	return nil
}

// Asked lists the names that were learned and not forgotten, in no order, also those that
// an earlier process learned: what is asked for often may be asked of the servers before
// its time is over.
func (l *Layer) Asked() ([]model.Asked, error) {
	l.learning.Lock()
	defer l.learning.Unlock()
	if l.host == nil {
		return nil, errNotOpen
	}
	now, err := clockNow()
	if err != nil {
		return nil, err
	}
	return l.asked(now)
}

func (l *Layer) asked(now clock) ([]model.Asked, error) {
	entries, err := l.tables.outside.All()
	if err != nil {
		return nil, fmt.Errorf("read the names outside the cluster: %w", err)
	}
	all := make([]model.Asked, 0, len(entries))
	for key, entry := range entries {
		one := model.Asked{Name: nameOf(key), Last: now.timeOf(entry.Asked)}
		for i, end := range []*time.Time{&one.A, &one.AAAA} {
			if known := entry.Known[i]; known.State != datapathKnownStateKNOWN_NOT {
				*end = now.timeOf(known.Until)
			}
		}
		all = append(all, one)
	}
	return all, nil
}

// clock is one moment by the program's clock and by ours.
type clock struct {
	boot uint64
	time time.Time
}

func clockNow() (clock, error) {
	boot, err := sinceBoot()
	return clock{boot, time.Now()}, err
}

func (c clock) timeOf(boot uint64) time.Time { return c.time.Add(time.Duration(boot - c.boot)) }

// bootOf is a moment by the program's clock; 0 for one before the machine was there.
func (c clock) bootOf(t time.Time) uint64 {
	return uint64(max(0, int64(c.boot)+int64(t.Sub(c.time))))
}

// bare is a name as keyOf takes it.
func bare(name string) string { return lower(strings.TrimSuffix(name, ".")) }

// outsideOf is what the kernel is told of a name. False if it does not fit.
func outsideOf(o model.Outside, now clock) (entry datapathOutsideName, ok bool) {
	if !fits(bare(o.Name)) || strings.Contains(o.Name, `\`) { // an escape of the text form (RFC 1035, 5.1)
		return entry, false
	}
	entry.Since, entry.Asked = now.boot, now.boot
	name := append(wire(strings.TrimSuffix(o.Name, ".")), 0)
	families := []model.Known{o.A, o.AAAA}
	levelAliases(families)
	var parts [2][]byte
	for i, known := range families {
		k := &entry.Known[i]
		k.State = datapathKnownState(known.State)
		if known.State == model.KnownNot {
			continue
		}
		if known.State > model.KnownAbsent {
			return entry, false
		}
		end := endOf(known, now.time)
		if parts[i], ok = packRecords(name, known, end.Sub(now.time)); !ok {
			return entry, false
		}
		k.Until, k.Aliases = now.bootOf(end), uint8(len(known.Chain))
		if known.Stale {
			k.Stale = 1
		}
		if known.State != model.KnownAddresses && known.SOA != nil {
			k.Negative = 1
		}
		if known.State == model.KnownAddresses && !entry.Addresses.add(known.Addresses, i == 0) {
			return entry, false
		}
		size := []int{4, 16}[i]
		longest := len(parts[i]) + len(known.Addresses)*(recordHead+size)
		entry.Addresses.Longest = max(entry.Addresses.Longest, uint16(longest))
	}
	from, all, ok := share(parts)
	if !ok {
		return entry, false
	}
	entry.Known[0].From, entry.Known[1].From = from[0], from[1]
	for i := range entry.Record {
		entry.Record[i] = binary.LittleEndian.Uint64(all[8*i:])
	}
	return entry, true
}

// add puts in the addresses of a family. False if they are too many, or others'.
func (a *datapathAddresses) add(addresses []netip.Addr, ip4 bool) bool {
	if len(addresses) == 0 || len(addresses) > mostAddresses {
		return false
	}
	for _, addr := range addresses {
		switch {
		case addr.Is4() != ip4, !addr.IsValid(), addr.Is4In6():
			return false
		case ip4:
			a.Ip4[a.Ip4Count] = addressOf(addr).Word[3]
			a.Ip4Count++
		default:
			a.Ip6[a.Ip6Count] = addressOf(addr)
			a.Ip6Count++
		}
	}
	return true
}

// levelAliases gives both families the shorter TTLs, where they have the same aliases: so
// that they are written once.
func levelAliases(families []model.Known) {
	a, b := slices.Clone(families[0].Chain), slices.Clone(families[1].Chain)
	if !slices.EqualFunc(a, b, func(a, b model.Alias) bool { return a.Target == b.Target }) {
		return
	}
	for i := range a {
		a[i].TTL = min(a[i].TTL, b[i].TTL)
	}
	families[0].Chain, families[1].Chain = a, a
}

// endOf is when the first record's time is over. Stale ones have none.
func endOf(known model.Known, now time.Time) time.Time {
	end := known.Until
	if known.Stale {
		return end
	}
	for _, alias := range known.Chain {
		if t := now.Add(alias.TTL); t.Before(end) {
			end = t
		}
	}
	if soa := known.SOA; known.State != model.KnownAddresses && soa != nil {
		if _, ttl, ok := readSOA(soa); ok && now.Add(time.Duration(ttl)*time.Second).Before(end) {
			end = now.Add(time.Duration(ttl) * time.Second)
		}
	}
	return end
}

// packRecords writes the aliases and the SOA record as the program wants them; what the
// latter says is known for no longer than is left. The name has its final zero.
func packRecords(name []byte, known model.Known, left time.Duration) (records []byte, ok bool) {
	if len(known.Chain) > mostAliases {
		return nil, false
	}
	before := [][]byte{name} // the names so far, and ...
	begin := []int{0}        // ... where they are, counted from the first
	for _, alias := range known.Chain {
		target := wire(strings.TrimSuffix(alias.Target, "."))
		if len(target) == 0 || strings.Contains(alias.Target, `\`) {
			return nil, false
		}
		target = append(target, 0)
		records = appendHead(records, begin[len(begin)-1], typeCNAME, alias.TTL, len(target))
		before, begin = append(before, target), append(begin, len(name)+len(records))
		records = append(records, target...)
	}
	if known.State == model.KnownAddresses || known.SOA == nil {
		return records, true
	}
	owner, _, ok := readSOA(known.SOA)
	if !ok {
		return nil, false
	}
	for i, one := range slices.Backward(before) {
		if !endsWith(one, owner) {
			continue
		}
		data := known.SOA[len(owner)+10:]
		records = appendHead(records, begin[i]+len(one)-len(owner), typeSOA, left, len(data))
		return append(records, data...), true
	}
	return nil, false // of a zone that has nothing to do with the name
}

const (
	typeCNAME = 5
	typeSOA   = 6
)

// appendHead appends the beginning of a record.
func appendHead(to []byte, owner, kind int, ttl time.Duration, length int) []byte {
	seconds := max(0, min(int64(ttl/time.Second), math.MaxInt32)) // RFC 2181, 8
	to = binary.BigEndian.AppendUint16(to, 0xc000|uint16(owner))
	to = binary.BigEndian.AppendUint16(to, uint16(kind))
	to = binary.BigEndian.AppendUint16(to, classIN)
	to = binary.BigEndian.AppendUint32(to, uint32(seconds))
	return binary.BigEndian.AppendUint16(to, uint16(length))
}

// readSOA reads the owner and the TTL of a record; false if it is no SOA record without
// compression.
func readSOA(record []byte) (owner []byte, ttl uint32, ok bool) {
	n := lengthOfName(record)
	rest := record[n:]
	if n == 0 || len(rest) < 10 || binary.BigEndian.Uint16(rest) != typeSOA || binary.BigEndian.Uint16(rest[2:]) != classIN ||
		int(binary.BigEndian.Uint16(rest[8:])) != len(rest)-10 {
		return nil, 0, false
	}
	data := rest[10:]
	for range 2 { // the server's name and the mailbox
		k := lengthOfName(data)
		if k == 0 {
			return nil, 0, false
		}
		data = data[k:]
	}
	return record[:n], binary.BigEndian.Uint32(rest[4:]), len(data) == 20
}

// lengthOfName is that of the name at the beginning, with its final zero; 0 if there is
// none.
func lengthOfName(text []byte) int {
	for at := 0; at < len(text) && text[at] <= labelLimit; at += 1 + int(text[at]) {
		if text[at] == 0 {
			return at + 1
		}
	}
	return 0
}

// endsWith says whether a name is another one or below it.
func endsWith(name, suffix []byte) bool {
	for at := 0; at < len(name); at += 1 + int(name[at]) {
		if bytes.Equal(lower(name[at:]), lower(suffix)) {
			return true
		}
		if name[at] == 0 {
			break
		}
	}
	return false
}

// share lays out what both families have, once where one begins as the other. False if
// there is no room for it.
func share(parts [2][]byte) (from [2]uint8, all [recordBytes]byte, ok bool) {
	whole := func(b []byte) int { return (len(b) + 7) / 8 * 8 }
	long, short := 0, 1
	if len(parts[1]) > len(parts[0]) {
		long, short = 1, 0
	}
	if len(parts[long]) > recordBytes {
		return from, all, false
	}
	copy(all[:], parts[long])
	if bytes.HasPrefix(parts[long], parts[short]) {
		return from, all, true
	}
	at := whole(parts[long])
	if at+len(parts[short]) > recordBytes {
		return from, all, false
	}
	copy(all[at:], parts[short])
	from[short] = uint8(at / 8)
	return from, all, true
}
