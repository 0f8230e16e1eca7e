package resolver

import (
	"context"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/millrace/millrace/model"
)

const (
	// schemaVersion is what `dns-version` has, and schemaTTL for how long: Kubernetes
	// DNS-Based Service Discovery 1.1.0, 2.2, and CoreDNS' plugin kubernetes.
	schemaVersion = "1.1.0"
	schemaTTL     = 28800
	// weightAll is shared by the records of an SRV answer, as that plugin does.
	weightAll = 100.0
)

// snapshot is a Snapshot with what is found in it by address, made when it is asked for.
type snapshot struct {
	*model.Snapshot
	// strangers have names, and are not known here whole.
	strangers map[model.Name]bool
	// served says that somebody is behind the DNS Service.
	served bool
	once   sync.Once
	names  map[netip.Addr]string // with a final dot, below the zone; "" is for others to say
}

func newSnapshot(s *model.Snapshot, dnsService model.Name) *snapshot {
	strangers := map[model.Name]bool{}
	for _, name := range s.Strangers() {
		strangers[name] = true
	}
	of := &snapshot{Snapshot: s, strangers: strangers}
	for _, service := range s.Services {
		of.served = of.served || service.Name == dnsService && slices.ContainsFunc(service.Ports, model.ServicePort.HasEndpoint)
	}
	return of
}

// trust is what may be said of the cluster: known, what is known of it; deny, that other
// names do not exist. It is what the kernel is told, too.
func (r *Resolver) trust(s *snapshot, now time.Time) (known, deny bool) {
	if r.settings.Heard == nil {
		return true, true
	}
	ago := now.Sub(r.settings.Heard())
	return ago <= r.settings.SayFor || !s.served, ago <= r.settings.DenyFor
}

// service finds a Service; known is false for one of which others know more.
func (s *snapshot) service(name model.Name) (service *model.Service, known bool) {
	if s.strangers[name] {
		return nil, false
	}
	at, ok := slices.BinarySearchFunc(s.Services, name, func(s *model.Service, name model.Name) int { return s.Name.Compare(name) })
	if !ok {
		return nil, true
	}
	return s.Services[at], true
}

// ours says whether the cluster's zone has a name, or a reverse zone.
func (r *Resolver) ours(name string) bool {
	return below(name, r.zone) || below(name, "in-addr.arpa.") || below(name, "ip6.arpa.")
}

// record is what leads a name below a Service to an endpoint or to the Service.
type record struct {
	// target is the name that has the address, below the zone.
	target string
	addr   netip.Addr
	port   uint16 // 0 where there is none
}

// cluster answers for the cluster's zone as CoreDNS' plugin kubernetes does with its
// defaults (https://github.com/kubernetes/dns/blob/master/docs/specification.md,
// https://coredns.io/plugins/kubernetes/); what its settings might change is handed back.
func (r *Resolver) cluster(ctx context.Context, from string, c *config, q *query, now time.Time) (*dns.Msg, Source) {
	s := r.snapshot.Load()
	if s == nil || !s.HasAllNames() || c.left != "" || c.ttl <= 0 || c.tabled(q.name) || strings.Contains(q.name, "\\") {
		return nil, HandedBack
	}
	known, deny := r.trust(s, now)
	if !known {
		return nil, HandedBack
	}
	a := &zoneAnswer{zone: r.zone, serial: uint32(s.Number), ttl: uint32(c.ttl / time.Second), query: q, deny: deny}
	if !below(q.name, r.zone) {
		if !c.reverse {
			return nil, HandedBack
		}
		return a.reverse(s, c)
	}
	a.asWritten = q.written[len(q.written)-len(r.zone):]
	labels := dns.SplitDomainName(strings.TrimSuffix(q.name, r.zone))
	if len(labels) == 1 && labels[0] == "dns-version" && q.kind == dns.TypeTXT {
		a.add(&dns.TXT{Hdr: a.header(q.written, dns.TypeTXT, schemaTTL), Txt: []string{schemaVersion}})
		return a.message, Cluster
	}
	if isNobodys(labels) && (q.kind == dns.TypeA || q.kind == dns.TypeAAAA) {
		return a.absent()
	}
	if len(labels) < 3 || labels[len(labels)-1] != "svc" {
		return nil, HandedBack
	}
	last := len(labels) - 2
	service, known := s.service(model.Name{Namespace: labels[last], Name: labels[last-1]})
	switch prefix := labels[:last-1]; {
	case !known || len(prefix) > 2:
		return nil, HandedBack
	case q.kind == dns.TypeSOA && !deny:
		return nil, HandedBack
	case q.kind == dns.TypeSOA:
		return a.nothing() // whatever the name: below the zone's own there is none
	case service == nil:
		return a.absent()
	case service.Type == model.ExternalName:
		return r.external(ctx, from, c, a, service, prefix, now)
	default:
		records, known := recordsOf(service, prefix, q.kind)
		if !known {
			return nil, HandedBack
		}
		return a.of(records)
	}
}

// isNobodys says that no name of the zone is like this one: what a search list makes of names
// outside. It is what the kernel says, too (docs/decisions/0014-dns.md).
func isNobodys(labels []string) bool {
	if len(labels) == 0 {
		return false
	}
	switch labels[len(labels)-1] {
	case "svc":
		return len(labels) > 5
	case "pod", "dns", "dns-version":
		return false
	default:
		return true
	}
}

// external answers for a Service that is a name elsewhere. What is found there comes with
// it, and nothing where that name does not exist.
func (r *Resolver) external(ctx context.Context, from string, c *config, a *zoneAnswer, service *model.Service, prefix []string, now time.Time) (*dns.Msg, Source) {
	target := strings.ToLower(dns.Fqdn(service.External))
	if _, err := netip.ParseAddr(service.External); err == nil || service.External == "" || r.ours(target) || strings.Contains(target, "\\") {
		return nil, HandedBack
	}
	if port, protocol := portOf(prefix); len(prefix) == 1 || port != "" || protocol != "" {
		return a.absent()
	}
	alias := &dns.CNAME{Hdr: a.header(a.query.written, dns.TypeCNAME, a.ttl), Target: dns.Fqdn(service.External)}
	switch a.query.kind {
	case dns.TypeCNAME:
		a.add(alias)
		return a.message, Cluster
	case dns.TypeA, dns.TypeAAAA:
	default:
		return a.nothing()
	}
	if !a.query.recursive {
		return nil, HandedBack
	}
	m, source := r.outside(ctx, from, c, target, a.query.kind, now)
	if m == nil {
		return nil, source
	}
	a.add(alias)
	a.message.Answer = append(a.message.Answer, m.Answer...)
	return a.message, source
}

// recordsOf are the records that a name below a Service has: none if there is no such
// name. known is false where the model does not say.
func recordsOf(s *model.Service, prefix []string, kind uint16) (records []record, known bool) {
	name := s.Name.Name + "." + s.Name.Namespace + ".svc"
	if strings.Contains(s.Name.Name, ".") {
		return nil, true
	}
	port, protocol := portOf(prefix)
	if s.Headless {
		if s.More || len(prefix) == 2 && len(s.Ports) == 0 {
			return nil, false
		}
		if len(prefix) < 2 && kind != dns.TypeSRV {
			return endpointsOf(s, name, prefix), true
		}
		// Ports of slices that nobody's controller made may be others than the Service's.
		return endpointPorts(s, name, prefix, port, protocol), s.Selector != nil
	}
	if len(prefix) == 1 || len(s.ClusterIPs) == 0 || len(s.Ports) == 0 {
		return nil, false
	}
	for i := range s.Ports {
		if p := &s.Ports[i]; called(p, port, protocol) {
			for _, addr := range s.ClusterIPs {
				records = append(records, record{name, addr, p.Port})
			}
		}
	}
	return records, true
}

// portOf are the port and the protocol that stand before a Service's name, "" for any.
func portOf(prefix []string) (port, protocol string) {
	if len(prefix) != 2 {
		return "", ""
	}
	return strings.TrimPrefix(prefix[0], "_"), strings.TrimPrefix(prefix[1], "_")
}

// endpointsOf are the endpoints of a headless Service that are ready, or those of a host
// name.
func endpointsOf(s *model.Service, name string, prefix []string) (records []record) {
	for _, e := range s.Endpoints {
		if host := e.Label(); e.Ready && (len(prefix) == 0 || strings.EqualFold(host, prefix[0])) {
			records = append(records, record{host + "." + name, e.Address, 0})
		}
	}
	return records
}

// endpointPorts are the endpoints of a headless Service that are ready, once for each port.
func endpointPorts(s *model.Service, name string, prefix []string, port, protocol string) (records []record) {
	hosts := map[netip.Addr][]string{} // one that is in two slices may have two
	for _, e := range s.Endpoints {
		if host := e.Label(); len(prefix) != 1 || strings.EqualFold(host, prefix[0]) {
			hosts[e.Address] = append(hosts[e.Address], host)
		}
	}
	for i := range s.Ports {
		p := &s.Ports[i]
		if !called(p, port, protocol) {
			continue
		}
		for _, b := range p.Backends {
			for _, host := range hosts[b.Address.Addr()] {
				if b.Ready {
					records = append(records, record{host + "." + name, b.Address.Addr(), b.Address.Port()})
				}
			}
		}
	}
	if len(s.Ports) == 0 {
		return endpointsOf(s, name, prefix)
	}
	return records
}

// called says whether a port is meant by a name and a protocol, which may be missing.
func called(p *model.ServicePort, name, protocol string) bool {
	return (name == "" || strings.EqualFold(name, p.Name)) && (protocol == "" || strings.EqualFold(protocol, p.Protocol.String()))
}

// zoneAnswer makes an answer of the cluster's zone.
type zoneAnswer struct {
	zone string
	// asWritten is the zone as the pod wrote it: what is added to it is in lower case.
	asWritten string
	serial    uint32
	ttl       uint32
	query     *query
	// deny says that it may be said that there is no such name.
	deny    bool
	message *dns.Msg
}

func (a *zoneAnswer) header(name string, kind uint16, ttl uint32) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: kind, Class: dns.ClassINET, Ttl: ttl}
}

func (a *zoneAnswer) start(rcode int) {
	if a.message == nil {
		a.message = &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: rcode, Authoritative: true}}
	}
}

func (a *zoneAnswer) add(record dns.RR) {
	a.start(dns.RcodeSuccess)
	a.message.Answer = append(a.message.Answer, record)
}

// absent says that there is no such name, if that is known.
func (a *zoneAnswer) absent() (*dns.Msg, Source) {
	if !a.deny {
		return nil, HandedBack
	}
	return a.negative(dns.RcodeNameError)
}

// nothing says that the name has no records of the type.
func (a *zoneAnswer) nothing() (*dns.Msg, Source) { return a.negative(dns.RcodeSuccess) }

// mostSOA is the most that the SOA record itself may be kept, in seconds (CoreDNS,
// plugin.SOA).
const mostSOA = 300

func (a *zoneAnswer) negative(rcode int) (*dns.Msg, Source) {
	a.start(rcode)
	a.message.Ns = []dns.RR{&dns.SOA{
		Hdr: a.header(a.asWritten, dns.TypeSOA, min(a.ttl, mostSOA)), Ns: "ns.dns." + a.asWritten, Mbox: "hostmaster." + a.asWritten,
		Serial: a.serial, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: a.ttl,
	}}
	return a.message, Cluster
}

// of answers with the records of a name.
func (a *zoneAnswer) of(records []record) (*dns.Msg, Source) {
	if len(records) == 0 {
		return a.absent()
	}
	switch a.query.kind {
	case dns.TypeA, dns.TypeAAAA:
		seen := map[netip.Addr]bool{}
		for _, r := range records {
			if r.addr.Is4() == (a.query.kind == dns.TypeA) && !seen[r.addr] {
				seen[r.addr] = true
				a.add(a.address(a.query.written, r.addr))
			}
		}
	case dns.TypeSRV:
		a.services(records)
	}
	if a.message == nil {
		return a.nothing()
	}
	return a.message, Cluster
}

func (a *zoneAnswer) address(name string, addr netip.Addr) dns.RR {
	if addr.Is4() {
		return &dns.A{Hdr: a.header(name, dns.TypeA, a.ttl), A: addr.AsSlice()}
	}
	return &dns.AAAA{Hdr: a.header(name, dns.TypeAAAA, a.ttl), AAAA: addr.AsSlice()}
}

// services adds SRV records, each once, and the addresses that they lead to.
func (a *zoneAnswer) services(records []record) {
	type place struct {
		target string
		port   uint16
	}
	type home struct {
		target string
		addr   netip.Addr
	}
	places, homes := map[place]bool{}, map[home]bool{}
	weight := max(1, uint16(math.Floor(weightAll/(weightAll*float64(len(records)))*weightAll)))
	for _, r := range records {
		if r.port == 0 {
			continue
		}
		target := r.target + "." + a.asWritten
		if p := (place{target, r.port}); !places[p] {
			places[p] = true
			a.add(&dns.SRV{Hdr: a.header(a.query.written, dns.TypeSRV, a.ttl), Weight: weight, Port: r.port, Target: target})
		}
		if h := (home{target, r.addr}); !homes[h] {
			homes[h] = true
			a.message.Extra = append(a.message.Extra, a.address(target, r.addr))
		}
	}
}

// reverse answers for the name of a Service's address; others know the rest.
func (a *zoneAnswer) reverse(s *snapshot, c *config) (*dns.Msg, Source) {
	addr, ok := addressOf(a.query.name)
	if !ok || c.dns.HasHostAddress(addr) || a.query.kind != dns.TypePTR {
		return nil, HandedBack
	}
	s.once.Do(s.index)
	name := s.names[addr]
	if name == "" {
		return nil, HandedBack
	}
	a.add(&dns.PTR{Hdr: a.header(a.query.written, dns.TypePTR, a.ttl), Ptr: name + a.zone})
	return a.message, Cluster
}

// index finds whose the addresses of Services are. Those of endpoints are for others: an
// endpoint has a name below each Service that has it in a slice, also below those that are
// not known here.
func (s *snapshot) index() {
	s.names = map[netip.Addr]string{}
	for _, service := range s.Services {
		for _, addr := range service.ClusterIPs {
			if _, twice := s.names[addr]; twice || s.strangers[service.Name] {
				s.names[addr] = ""
				continue
			}
			s.names[addr] = service.Name.Name + "." + service.Name.Namespace + ".svc."
		}
	}
}

// addressOf is the address that a name of a reverse zone is for (RFC 1035, 3.5; RFC 3596,
// 2.5).
func addressOf(name string) (addr netip.Addr, ok bool) {
	if text, four := strings.CutSuffix(name, ".in-addr.arpa."); four {
		labels := strings.Split(text, ".")
		slices.Reverse(labels)
		addr, err := netip.ParseAddr(strings.Join(labels, "."))
		return addr, err == nil && addr.Is4()
	}
	text, six := strings.CutSuffix(name, ".ip6.arpa.")
	if labels := strings.Split(text, "."); six && len(labels) == 32 {
		var bytes [16]byte
		for i, label := range labels {
			digit := strings.IndexByte("0123456789abcdef", (label + "?")[0])
			if len(label) != 1 || digit < 0 {
				return addr, false
			}
			at := 31 - i
			bytes[at/2] |= byte(digit) << (4 * (1 - at%2))
		}
		return netip.AddrFrom16(bytes), true
	}
	return addr, false
}
