// Package pool gives the addresses of a node's pods out of the ranges that the node
// has, and remembers who holds which, and which ports of the node lead there.
//
// A Pool is a plain value: no clock, no files, no kernel. A File keeps what it
// remembers where a crash does not lose it.
//
// It writes nothing in the kernel. It costs about 300 bytes a lease, and giving an
// address takes a few map look-ups where ranges are not nearly full.
package pool

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Key names a network interface of a container: CNI knows no other name for it
// (https://www.cni.dev/docs/spec/#attachment-parameters).
type Key struct {
	Container string `json:"container"`
	Interface string `json:"interface"`
}

// String is "container 3f2a…, interface eth0", with the first twelve characters, as
// crictl shows containers.
func (k Key) String() string {
	container := k.Container
	if len(container) > 12 {
		container = container[:12]
	}
	return "container " + container + ", interface " + k.Interface
}

func (k Key) compare(o Key) int {
	return cmp.Or(strings.Compare(k.Container, o.Container), strings.Compare(k.Interface, o.Interface))
}

// Lease is what an interface holds.
type Lease struct {
	Key
	// Network is the name of the network in the CNI configuration that asked for it.
	Network string `json:"network"`
	// Pod is NAMESPACE/NAME, empty where the runtime did not say.
	Pod string `json:"pod,omitempty"`
	// Addresses are one of each family that the ranges have, IPv4 first.
	Addresses []netip.Addr `json:"addresses"`
	// Bandwidth is what it may receive and send at most.
	Bandwidth Bandwidth `json:"bandwidth,omitzero"`
	// Ports are those of the node that lead to the interface.
	Ports []Port `json:"ports,omitempty"`
}

// Rest is an address that was given back, and is not given again before Until.
type Rest struct {
	Address netip.Addr `json:"address"`
	Until   time.Time  `json:"until"`
}

// Book is all that a Pool remembers, to be written down.
type Book struct {
	// Leases are in the order of their keys, Resting in that of addresses.
	Leases  []Lease `json:"leases"`
	Resting []Rest  `json:"resting,omitempty"`
	// Last are the addresses that were given last, at most one of each family.
	Last []netip.Addr `json:"last,omitempty"`
	// Ranges are those that addresses are given of.
	Ranges []netip.Prefix `json:"ranges,omitempty"`
}

// DefaultCooldown is how long an address rests. Others learn of a pod's end by their
// watch, and may send to its address until then; the AWS VPC CNI waits as long
// (https://github.com/aws/amazon-vpc-cni-k8s, cooldown period).
const DefaultCooldown = 30 * time.Second

// ErrFull says that a range has no address left.
var ErrFull = errors.New("all addresses are in use")

// Pool gives addresses. The zero value has no ranges and no cool-down. It is not for
// several goroutines at once.
type Pool struct {
	// Cooldown is how long an address rests after it was given back. Where nothing
	// else is free, the one that has rested longest is given before its time.
	Cooldown time.Duration

	ranges   []netip.Prefix
	reserved map[netip.Addr]bool
	leases   map[Key]Lease
	holder   map[netip.Addr]Key
	resting  map[netip.Addr]time.Time
	last     [2]netip.Addr
}

// Open goes on with a book. A rest that ends later than a cool-down from now was
// written when the clock was ahead: it ends then. Leases that hold an address of
// another one are left out.
func Open(book Book, cooldown time.Duration, now time.Time) *Pool {
	p := &Pool{Cooldown: cooldown, leases: map[Key]Lease{}, holder: map[netip.Addr]Key{}, resting: map[netip.Addr]time.Time{}}
	for _, lease := range book.Leases {
		_ = p.Adopt(lease)
	}
	for _, rest := range book.Resting {
		if p.holds(rest.Address) || !rest.Until.After(now) {
			continue
		}
		p.resting[rest.Address] = earlier(rest.Until, now.Add(cooldown))
	}
	for _, addr := range book.Last {
		p.last[familyOf(addr)] = addr
	}
	p.Use(book.Ranges)
	return p
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// familyOf is 0 for IPv4, 1 for IPv6.
func familyOf(addr netip.Addr) int {
	if addr.Is4() {
		return 0
	}
	return 1
}

// Book is what the pool remembers now.
func (p *Pool) Book() Book {
	b := Book{Leases: p.Leases()}
	for addr, until := range p.resting {
		b.Resting = append(b.Resting, Rest{addr, until})
	}
	slices.SortFunc(b.Resting, func(a, b Rest) int { return a.Address.Compare(b.Address) })
	for _, addr := range p.last {
		if addr.IsValid() {
			b.Last = append(b.Last, addr)
		}
	}
	b.Ranges = p.Ranges()
	return b
}

// Leases are all, in the order of their keys; the slice is the caller's.
func (p *Pool) Leases() []Lease {
	all := make([]Lease, 0, len(p.leases))
	for _, lease := range p.leases {
		all = append(all, lease)
	}
	slices.SortFunc(all, func(a, b Lease) int { return a.compare(b.Key) })
	return all
}

// Lease is what an interface holds.
func (p *Pool) Lease(key Key) (Lease, bool) {
	lease, held := p.leases[key]
	return lease, held
}

// Use says which ranges there are. Leases of others stay until they are given back.
func (p *Pool) Use(ranges []netip.Prefix) {
	p.ranges = nil
	for _, r := range ranges {
		p.ranges = append(p.ranges, r.Masked())
	}
}

// Reserve says which addresses somebody else has, such as the node itself.
func (p *Pool) Reserve(addresses []netip.Addr) {
	p.reserved = make(map[netip.Addr]bool, len(addresses))
	for _, addr := range addresses {
		p.reserved[addr.Unmap()] = true
	}
}

// Ranges are those in use; the slice is the caller's.
func (p *Pool) Ranges() []netip.Prefix { return slices.Clone(p.ranges) }

// Take gives an interface one address of each family that the ranges have; one that
// holds some already gets the same, with the bandwidth and the ports that it is to have now
// (Clash says whether those are free). The addresses of want are not looked at. The error is
// ErrFull, with the ranges that are full; then nothing is taken.
func (p *Pool) Take(want Lease, now time.Time) (Lease, error) {
	if held, there := p.leases[want.Key]; there {
		held.Bandwidth, held.Ports = want.Bandwidth, slices.Clone(want.Ports)
		p.leases[want.Key] = held
		return held, nil
	}
	p.wake(now)
	if len(p.ranges) == 0 {
		return Lease{}, errors.New("the node has no ranges for pods yet")
	}
	var err error
	if want.Addresses, err = p.next(); err != nil {
		return Lease{}, err
	}
	for _, addr := range want.Addresses {
		delete(p.resting, addr)
		p.last[familyOf(addr)] = addr
	}
	return want, p.Adopt(want)
}

// Room says whether another interface would get what Take gives.
func (p *Pool) Room() bool {
	_, err := p.next()
	return err == nil && len(p.ranges) > 0
}

// next are the addresses that the next interface gets.
func (p *Pool) next() (addresses []netip.Addr, err error) {
	for family := range p.last {
		ranges := slices.DeleteFunc(slices.Clone(p.ranges), func(r netip.Prefix) bool { return familyOf(r.Addr()) != family })
		if len(ranges) == 0 {
			continue
		}
		addr, ok := p.find(ranges, p.last[family])
		if !ok {
			return nil, fmt.Errorf("%w of %s", ErrFull, rangesText(ranges))
		}
		addresses = append(addresses, addr)
	}
	return addresses, nil
}

func rangesText(ranges []netip.Prefix) string {
	var words []string
	for _, r := range ranges {
		words = append(words, r.String())
	}
	return strings.Join(words, ", ")
}

// Adopt notes that an interface holds addresses, as somebody found it. It is an error
// where another one holds one of them, or this one others.
func (p *Pool) Adopt(lease Lease) error {
	if held, there := p.leases[lease.Key]; there && !slices.Equal(held.Addresses, lease.Addresses) {
		return fmt.Errorf("%s holds %v already, not %v", lease.Key, held.Addresses, lease.Addresses)
	}
	for _, addr := range lease.Addresses {
		if other, held := p.holder[addr]; held && other != lease.Key {
			return fmt.Errorf("%s is held by %s", addr, other)
		}
	}
	lease.Addresses, lease.Ports = slices.Clone(lease.Addresses), slices.Clone(lease.Ports)
	p.leases[lease.Key] = lease
	for _, addr := range lease.Addresses {
		p.holder[addr] = lease.Key
		delete(p.resting, addr)
	}
	return nil
}

// Give takes back what an interface holds; the addresses rest. One that holds nothing
// is no error.
func (p *Pool) Give(key Key, now time.Time) {
	p.wake(now)
	for _, addr := range p.leases[key].Addresses {
		delete(p.holder, addr)
		if p.Cooldown > 0 {
			p.resting[addr] = now.Add(p.Cooldown)
		}
	}
	delete(p.leases, key)
}

// wake ends the rests that are over.
func (p *Pool) wake(now time.Time) {
	for addr, until := range p.resting {
		if !until.After(now) {
			delete(p.resting, addr)
		}
	}
}

func (p *Pool) holds(addr netip.Addr) bool {
	_, held := p.holder[addr]
	return held
}

// free says whether nobody has an address.
func (p *Pool) free(addr netip.Addr) bool { return !p.holds(addr) && !p.reserved[addr] }

// find looks for an address of ranges of one family, first behind last: what was given
// back a moment ago comes last.
func (p *Pool) find(ranges []netip.Prefix, last netip.Addr) (netip.Addr, bool) {
	at := max(0, slices.IndexFunc(ranges, func(r netip.Prefix) bool { return r.Contains(last) }))
	// The range of last behind it, the other ranges, and that of last from its beginning.
	for i := range len(ranges) + 1 {
		r := ranges[(at+i)%len(ranges)]
		begin, end := ends(r)
		if i == 0 && r.Contains(last) {
			begin = last.Next()
		}
		for addr := begin; addr.IsValid() && addr.Compare(end) <= 0; addr = addr.Next() {
			if _, rests := p.resting[addr]; !rests && p.free(addr) {
				return addr, true
			}
		}
	}
	return p.longestRested(ranges)
}

// longestRested is the resting address of the ranges whose time comes first.
func (p *Pool) longestRested(ranges []netip.Prefix) (found netip.Addr, ok bool) {
	for addr, until := range p.resting {
		in := slices.ContainsFunc(ranges, func(r netip.Prefix) bool {
			begin, end := ends(r)
			return addr.Compare(begin) >= 0 && addr.Compare(end) <= 0
		})
		if !in || !p.free(addr) {
			continue
		}
		if best := p.resting[found]; !ok || until.Before(best) || until.Equal(best) && addr.Less(found) {
			found, ok = addr, true
		}
	}
	return found, ok
}

// ends are the first and the last address of a range that a pod may have. Not the first
// of all, which is the network's (RFC 922, 7) or any router's (RFC 4291, 2.6.1), and of
// IPv4 not the broadcast address; where the range is of one or two addresses, all
// (RFC 3021).
func ends(r netip.Prefix) (first, last netip.Addr) {
	bytes := r.Addr().AsSlice()
	for bit := r.Bits(); bit < 8*len(bytes); bit++ {
		bytes[bit/8] |= 1 << (7 - bit%8)
	}
	first = r.Addr()
	last, _ = netip.AddrFromSlice(bytes)
	if r.Addr().BitLen()-r.Bits() < 2 {
		return first, last
	}
	first = first.Next()
	if r.Addr().Is4() {
		last = last.Prev()
	}
	return first, last
}
