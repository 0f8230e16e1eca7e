package dns

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/layer"
)

const (
	// firstNames is what the map of names has room for at first (names.bpf.c), leastNames
	// what it may grow to on any node.
	firstNames = 1 << 12
	leastNames = 1 << 17
	// ofName is what a name takes at most, in bytes, and memoryShare the part of the node's
	// memory that all may take. More are not answered for, and then no name is said not to
	// exist.
	ofName, memoryShare = 416, 32
)

// mostNames is how many there may be on a node with so many bytes of memory: a power of two,
// of which none is lost.
func mostNames(memory uint64) int {
	return max(leastNames, 1<<(bits.Len64(memory/memoryShare/ofName|1)-1))
}

// memory is the node's, in bytes.
func memory() uint64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 0
	}
	return uint64(info.Totalram) * uint64(info.Unit)
}

// Picture is the state of the layer. It implements layer.Picture.
type Picture struct {
	zone string
	// names are by what they are below the zone.
	names     map[string]*Row
	resolvers map[netip.Addr]bool
	// whole says that a name that is not in names does not exist, serial is of the zone.
	whole  bool
	serial uint32
	// over is how many names were left out for want of room.
	over int
	// served says that the DNS servers can answer, left why they are to answer for all names.
	served bool
	left   string
	ttl    lifetime
	// ports says that pods' devices are to have the program; devices are those that
	// there are, in pictures of the kernel.
	ports   bool
	devices []device
	lost    []lost
	// searches are in the kernel, by the index of a device; lists are what the files of
	// pods say, if they were looked at.
	searches map[uint32]*SearchList
	looked   bool
	lists    map[int]*SearchList
}

func newPicture(zone string) *Picture {
	return &Picture{zone: zone, names: map[string]*Row{}, resolvers: map[netip.Addr]bool{}, searches: map[uint32]*SearchList{}, ttl: lifetimeUnknown}
}

// Row is a name and what it leads to. It implements layer.Subject.
type Row struct {
	// Name is what stands before the zone: "web.shop.svc".
	Name string
	// Addresses are sorted, no two equal.
	Addresses []netip.Addr
	// Left says that somebody else answers.
	Left bool
	// zone is set where it is shown.
	zone string
}

// newRow makes a row; sets that do not fit into an entry are left to others.
func newRow(name string, addresses []netip.Addr) *Row {
	addresses = slices.Clone(addresses)
	slices.SortFunc(addresses, netip.Addr.Compare)
	addresses = slices.Compact(addresses)
	var ip4 int
	for _, addr := range addresses {
		if addr.Is4() {
			ip4++
		}
	}
	if ip4 > mostAddresses || len(addresses)-ip4 > mostAddresses {
		return leftTo(name)
	}
	return &Row{Name: name, Addresses: addresses}
}

func leftTo(name string) *Row { return &Row{Name: name, Left: true} }

func (r *Row) equal(o *Row) bool { return r.Left == o.Left && slices.Equal(r.Addresses, o.Addresses) }

// Object implements layer.Subject.
func (r *Row) Object() string { return "name " + strings.TrimSuffix(r.Name+"."+r.zone, ".") }

// Detail implements layer.Subject.
func (r *Row) Detail() string { return "-> " + r.Leads() }

// Leads is what the name leads to, in words.
func (r *Row) Leads() string {
	if r.Left {
		return "others answer"
	}
	var text []string
	for _, addr := range r.Addresses {
		text = append(text, addr.String())
	}
	return strings.Join(text, ", ")
}

// MarshalJSON has the whole name.
func (r *Row) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Name      string       `json:"name"`
		Addresses []netip.Addr `json:"addresses"`
		Left      bool         `json:"left"`
	}{r.FullName(), append([]netip.Addr{}, r.Addresses...), r.Left})
}

// FullName is the name with the zone, without a final dot.
func (r *Row) FullName() string { return strings.TrimSuffix(r.Name+"."+r.zone, ".") }

// resolver is an address of the DNS Service. It implements layer.Subject.
type resolver netip.Addr

// Object implements layer.Subject.
func (r resolver) Object() string { return "resolver " + netip.Addr(r).String() }

// Detail implements layer.Subject.
func (r resolver) Detail() string { return "" }

// MarshalText gives the address.
func (r resolver) MarshalText() ([]byte, error) { return netip.Addr(r).MarshalText() }

// lifetime is how long records may be kept, in seconds. It implements layer.Subject.
type lifetime int64

const lifetimeUnknown lifetime = -1

// Object implements layer.Subject.
func (lifetime) Object() string { return "records" }

// Detail implements layer.Subject.
func (t lifetime) Detail() string { return fmt.Sprintf("-> to be kept for %d s", int64(t)) }

// device is one of the node's devices. It implements layer.Subject.
type device struct {
	Index int    `json:"index"`
	Name  string `json:"name"`
	// pod says that a pod is behind it, attached that the program is in force there.
	pod, attached bool
	// space is the number of the network namespace of its other end.
	space int
}

// Object implements layer.Subject.
func (d device) Object() string { return "device " + d.Name }

// Detail implements layer.Subject.
func (d device) Detail() string { return "" }

// lost is something that was taken away. It implements layer.Subject.
type lost string

// Object implements layer.Subject.
func (l lost) Object() string { return string(l) }

// Detail implements layer.Subject.
func (l lost) Detail() string { return "" }

// add puts rows in; the first of a name stays.
func (p *Picture) add(rows ...*Row) {
	for _, row := range rows {
		if row.zone == "" {
			row.zone = p.zone
		}
		if _, taken := p.names[row.Name]; !taken && fits(row.Name) {
			p.names[row.Name] = row
		}
	}
}

// cut leaves out what is too much, by the order of names.
func (p *Picture) cut(most int) {
	if len(p.names) <= most {
		return
	}
	p.whole, p.over = false, len(p.names)-most
	for _, name := range slices.Sorted(maps.Keys(p.names))[most:] {
		delete(p.names, name)
	}
}

// Len implements layer.Picture.
func (p *Picture) Len() int { return len(p.names) }

// Subjects implements layer.Picture: the names in their order, then the resolvers.
func (p *Picture) Subjects() (all []layer.Subject) {
	for _, name := range slices.Sorted(maps.Keys(p.names)) {
		all = append(all, p.names[name])
	}
	for _, addr := range sortedAddresses(p.resolvers) {
		all = append(all, resolver(addr))
	}
	return all
}

// Rows are the names in their order.
func (p *Picture) Rows() (rows []*Row) {
	for _, name := range slices.Sorted(maps.Keys(p.names)) {
		rows = append(rows, p.names[name])
	}
	return rows
}

func sortedAddresses(set map[netip.Addr]bool) []netip.Addr {
	return slices.SortedFunc(maps.Keys(set), netip.Addr.Compare)
}
