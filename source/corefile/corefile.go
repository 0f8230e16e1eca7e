package corefile

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/millrace/millrace/model"
)

const (
	// DefaultTTL is that of CoreDNS' kubernetes plugin
	// (https://coredns.io/plugins/kubernetes/).
	DefaultTTL = 5 * time.Second
	// Key is what a Corefile is in a ConfigMap.
	Key = "Corefile"
	// dnsPort is where CoreDNS serves if nothing else is said.
	dnsPort = 53
)

var (
	// ConfigMap is where CoreDNS finds its Corefile in a cluster of kubeadm, kind, k3s, kops,
	// EKS, AKS and Gardener.
	ConfigMap = model.Name{Namespace: "kube-system", Name: "coredns"}
	// Custom is the ConfigMap in which users of k3s, AKS and Gardener write what their
	// Corefile imports.
	Custom = model.Name{Namespace: "kube-system", Name: "coredns-custom"}
	// Deployment runs CoreDNS there, and says which files it has.
	Deployment = model.Name{Namespace: "kube-system", Name: "coredns"}
)

// Read says what a Corefile means for others, with the files that it names. It never returns
// nil: of a text that cannot be used, and of a part that is not understood, Left says why.
func Read(text string, files Files) *model.DNS {
	if why := files.another(); why != "" {
		return Unknown(why)
	}
	p, err := parse(text, &files)
	if err == nil && p.alien != "" {
		err = fmt.Errorf("%s", p.alien)
	}
	var servers []*server
	if err == nil {
		servers, err = serversOf(p.blocks)
	}
	if err == nil {
		servers, err = reachable(servers)
	}
	if err == nil {
		err = readTables(servers, &files)
	}
	if err != nil {
		return Unknown(err.Error())
	}
	d := &model.DNS{TTL: DefaultTTL, Forwards: forwards(servers)}
	tabled(d, servers)
	d.Left = cluster(d, servers)
	return d
}

// Unknown is the configuration of DNS servers of which nothing is known, for a reason.
func Unknown(why string) *model.DNS {
	return &model.DNS{Left: why, TTL: DefaultTTL, Forwards: []model.Forward{{Zone: ".", Left: why}}}
}

// server is a server block that is reached over plain DNS.
type server struct {
	block
	zones []string
	port  int
	at    place
}

// has finds a directive.
func (s *server) has(name string) *directive {
	for i := range s.directives {
		if s.directives[i].name == name {
			return &s.directives[i]
		}
	}
	return nil
}

// serversOf are the blocks for plain DNS.
func serversOf(blocks []block) (all []*server, err error) {
	for _, b := range blocks {
		s := &server{block: b, at: b.keys[0].place}
		for _, key := range b.keys {
			transport, rest, named := strings.Cut(key.text, "://")
			if !named {
				transport, rest = "dns", key.text
			}
			if transport != "dns" {
				continue // DNS over TLS and the like: nobody asks the DNS Service so
			}
			zone, port, err := zoneAndPort(rest)
			if err != nil {
				return nil, mistake(key.place, "%v", err)
			}
			if len(s.zones) > 0 && s.port != port {
				return nil, mistake(key.place, "a server block for two ports")
			}
			s.zones, s.port = append(s.zones, zone), port
		}
		if len(s.zones) > 0 {
			all = append(all, s)
		}
	}
	return all, nil
}

// zoneAndPort reads the key of a server block.
func zoneAndPort(key string) (zone string, port int, err error) {
	port = dnsPort
	if i := strings.LastIndexByte(key, ':'); i >= 0 {
		n, err := strconv.Atoi(key[i+1:])
		if err != nil || n < 1 || n > 65535 {
			return "", 0, fmt.Errorf("%s has no port", clip(key))
		}
		key, port = key[:i], n
	}
	zone, ok := zoneOf(key)
	if !ok {
		return "", 0, fmt.Errorf("%q is not understood as a zone", clip(key))
	}
	return zone, port, nil
}

// zoneOf reads a zone, in any case, with or without a final dot. A range of addresses is
// not understood as one.
func zoneOf(text string) (string, bool) {
	if text == "." {
		return ".", true
	}
	zone := strings.ToLower(strings.TrimSuffix(text, "."))
	if len(zone) > 253 {
		return "", false
	}
	for label := range strings.SplitSeq(zone, ".") {
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_'
		}) {
			return "", false
		}
	}
	return zone, true
}

// zoneOrRange reads a zone; of a range of addresses it is all of that family.
func zoneOrRange(text string) (string, bool) {
	prefix, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		return zoneOf(text)
	case prefix.Addr().Is4():
		return "in-addr.arpa", true
	}
	return "ip6.arpa", true
}

// reachable are the servers on the port on which the cluster's zone is served.
func reachable(all []*server) (on []*server, err error) {
	port := 0
	for _, s := range all {
		if s.has("kubernetes") == nil {
			continue
		}
		if port != 0 && s.port != port {
			return nil, mistake(s.at, "kubernetes is served on two ports, %d and %d", port, s.port)
		}
		port = s.port
	}
	if port == 0 {
		return nil, fmt.Errorf("%s: kubernetes is not in it", Key)
	}
	seen := map[string]bool{}
	for _, s := range all {
		if s.port != port {
			continue
		}
		for _, name := range []string{"bind", "view"} {
			if d := s.has(name); d != nil {
				return nil, mistake(d.at, "%s: not all who ask are answered alike", name)
			}
		}
		for _, zone := range s.zones {
			if seen[zone] {
				return nil, mistake(s.at, "the zone %s is there twice", zone)
			}
			seen[zone] = true
		}
		on = append(on, s)
	}
	return on, nil
}

// within says whether a zone is the other one or a part of it.
func within(zone, other string) bool {
	return other == "." || zone == other || strings.HasSuffix(zone, "."+other)
}

// related says whether one of two zones is within the other.
func related(a, b string) bool { return within(a, b) || within(b, a) }

// answering is the server that is asked for a name, nil for none.
func answering(servers []*server, name string) (of *server) {
	longest := -1
	for _, s := range servers {
		for _, zone := range s.zones {
			if n := len(strings.Trim(zone, ".")); within(name, zone) && n > longest {
				of, longest = s, n
			}
		}
	}
	return of
}

// cluster reads how the cluster's zone is served, and returns why it is to be left to the
// DNS servers.
func cluster(d *model.DNS, servers []*server) (left string) {
	var s *server
	var k *directive
	for _, of := range servers {
		for i := range of.directives {
			if of.directives[i].name != "kubernetes" {
				continue
			}
			if k != nil {
				return mistake(of.directives[i].at, "kubernetes is there twice").Error()
			}
			s, k = of, &of.directives[i]
		}
	}
	zones, err := kubernetesZones(s, k)
	if err != nil {
		return err.Error()
	}
	d.Zone = zones[0]
	if left := settingsOf(d, k, zones); left != "" {
		return left
	}
	if of := answering(servers, d.Zone); of != s {
		return mistake(k.at, "%s is not served here, but by another server block", d.Zone).Error()
	}
	for _, other := range servers {
		for _, zone := range other.zones {
			if zone != d.Zone && within(zone, d.Zone) {
				return mistake(other.at, "%s is served by a server block of its own", zone).Error()
			}
		}
	}
	if s.alien != "" {
		return s.alien
	}
	for i := range s.directives {
		if before(&s.directives[i], "kubernetes") {
			for _, c := range concerns(&s.directives[i], s.zones) {
				if c.touches(d.Zone) {
					return c.why
				}
			}
		}
	}
	d.Reverse = reversed(servers, s, k)
	return ""
}

// reverseZones have the names of all addresses (RFC 1035, 3.5; RFC 3596, 2.5).
var reverseZones = []string{"in-addr.arpa", "ip6.arpa"}

// reversed says whether the kubernetes plugin is asked first for all addresses.
func reversed(servers []*server, s *server, k *directive) bool {
	for _, reverse := range reverseZones {
		if !slices.ContainsFunc(k.args, func(text string) bool { zone, ok := zoneOf(text); return ok && zone == reverse }) || answering(servers, reverse) != s {
			return false
		}
		for _, other := range servers {
			if other != s && slices.ContainsFunc(other.zones, func(zone string) bool { return within(zone, reverse) }) {
				return false
			}
		}
		for i := range s.directives {
			if before(&s.directives[i], "kubernetes") && slices.ContainsFunc(concerns(&s.directives[i], s.zones), func(c concern) bool { return c.touches(reverse) }) {
				return false
			}
		}
	}
	return true
}

// kubernetesZones are the zones that the kubernetes plugin answers for, the first of
// which is the cluster's.
func kubernetesZones(s *server, k *directive) (zones []string, err error) {
	named := slices.Clone(k.args)
	if len(named) == 0 {
		named = s.zones
	}
	var reverse []string
	for _, text := range named {
		zone, ok := zoneOrRange(text)
		switch {
		case !ok:
			return nil, mistake(k.at, "kubernetes %s is not understood as a zone", clip(text))
		case isReverse(zone):
			reverse = append(reverse, zone)
		case !slices.Contains(zones, zone): // charts of RKE2 have it twice
			zones = append(zones, zone)
		}
	}
	if len(zones) == 0 {
		return nil, mistake(k.at, "kubernetes has no zone")
	}
	return append(zones, reverse...), nil
}

func isReverse(zone string) bool { return within(zone, "in-addr.arpa") || within(zone, "ip6.arpa") }

// settingsOf reads the settings of the kubernetes plugin.
func settingsOf(d *model.DNS, k *directive, zones []string) (left string) {
	for _, zone := range zones[1:] {
		if related(zone, d.Zone) {
			return mistake(k.at, "kubernetes answers for %s and for %s", d.Zone, zone).Error()
		}
	}
	for _, of := range k.body {
		args := of.words[1:]
		switch of.words[0] {
		case "pods": // these are asked of others anyway
		case "endpoint", "tls", "kubeconfig", "startup_timeout", "apiserver_qps", "apiserver_burst", "apiserver_max_inflight":
		case "fallthrough":
			if len(args) == 0 {
				args = []string{"."}
			}
			for _, text := range args {
				zone, ok := zoneOrRange(text)
				if !ok || related(zone, d.Zone) {
					return mistake(of.at, "fallthrough %s: for names that do not exist others are asked", clip(text)).Error()
				}
			}
		case "ttl":
			n := -1
			if len(args) > 0 {
				n, _ = strconv.Atoi(args[0])
			}
			if n < 0 || n > 3600 || len(args) != 1 || strconv.Itoa(n) != args[0] {
				return mistake(of.at, "ttl is not a number of seconds from 0 to 3600").Error()
			}
			d.TTL = time.Duration(n) * time.Second
		default: // endpoint_pod_names, namespaces, labels, noendpoints, ignore, multicluster ...
			return mistake(of.at, "kubernetes: %s changes which names there are", clip(of.words[0])).Error()
		}
	}
	return ""
}

// forwards says for each zone who is asked, the longest zone first.
func forwards(servers []*server) []model.Forward {
	var all []model.Forward
	for _, s := range servers {
		of := s.forwards()
		for _, zone := range s.zones {
			for _, f := range of {
				switch {
				case within(zone, f.Zone):
					f.Zone = zone
				case !within(f.Zone, zone):
					continue
				}
				if answering(servers, f.Zone) == s && !slices.ContainsFunc(all, func(o model.Forward) bool { return o.Zone == f.Zone }) {
					all = append(all, f)
				}
			}
		}
	}
	if !slices.ContainsFunc(all, func(f model.Forward) bool { return f.Zone == "." }) {
		all = append(all, model.Forward{Zone: ".", Left: "Corefile: no server block is for all other names"})
	}
	slices.SortFunc(all, func(a, b model.Forward) int {
		return cmp.Or(cmp.Compare(len(strings.Trim(b.Zone, ".")), len(strings.Trim(a.Zone, "."))), strings.Compare(a.Zone, b.Zone))
	})
	return all
}

// forwards says who is asked, as far as this server is. What comes first is asked first,
// also where its zone is the shorter one.
func (s *server) forwards() (all []model.Forward) {
	add := func(f model.Forward) {
		if !slices.ContainsFunc(all, func(o model.Forward) bool { return within(f.Zone, o.Zone) }) {
			all = append(all, f)
		}
	}
	if s.alien != "" {
		add(model.Forward{Zone: ".", Left: s.alien})
	}
	for i := range s.directives {
		if d := &s.directives[i]; before(d, "forward") {
			for _, c := range concerns(d, s.zones) {
				add(model.Forward{Zone: c.zone, Left: c.why})
			}
		}
	}
	for i := range s.directives {
		if d := &s.directives[i]; d.name == "forward" {
			f, except := forwardOf(d)
			for _, zone := range except {
				add(model.Forward{Zone: zone, Left: mistake(d.at, "forward excepts %s", zone).Error()})
			}
			add(f)
		}
	}
	add(model.Forward{Zone: ".", Left: mistake(s.at, "the server block forwards nothing else").Error()})
	return all
}

// forwardOf reads one forward, and what it is not for.
func forwardOf(d *directive) (f model.Forward, except []string) {
	leave := func(at place, format string, args ...any) (model.Forward, []string) {
		return model.Forward{Zone: cmp.Or(f.Zone, "."), Left: mistake(at, format, args...).Error()}, except
	}
	if len(d.args) < 2 {
		return leave(d.at, "forward names nobody")
	}
	zone, ok := zoneOf(d.args[0])
	if !ok {
		return leave(d.at, "forward %s is not understood as a zone", clip(d.args[0]))
	}
	f.Zone = zone
	serverName, tcp, sequential := "", false, false
	for _, of := range d.body {
		args := of.words[1:]
		switch of.words[0] {
		case "max_fails", "max_connect_attempts", "health_check", "expire", "max_idle_conns", "max_concurrent", "prefer_udp", "failfast_all_unhealthy_upstreams":
		case "except":
			for _, text := range args {
				zone, ok := zoneOf(text)
				if !ok {
					return leave(of.at, "except %s is not understood as a zone", clip(text))
				}
				except = append(except, zone)
			}
		case "force_tcp":
			tcp = true
		case "policy":
			sequential = slices.Equal(args, []string{"sequential"})
		case "tls_servername":
			if len(args) != 1 {
				return leave(of.at, "tls_servername is not one name")
			}
			serverName = args[0]
		case "tls":
			if len(args) > 0 {
				return leave(of.at, "tls: the certificates are with the DNS servers")
			}
		default: // next, failover, and what is new
			return leave(of.at, "forward: %s is not understood here", clip(of.words[0]))
		}
	}
	for _, text := range d.args[1:] {
		up, err := upstreamOf(text, serverName)
		if err != nil {
			return leave(d.at, "forward to %s: %v", clip(text), err)
		}
		up.TCP = tcp && up.ServerName == ""
		f.To = append(f.To, up)
	}
	if sequential && (len(f.To) > 1 || f.To[0].File != "") {
		return leave(d.at, "forward asks the first as long as it answers (policy sequential)")
	}
	return f, except
}

// upstreamOf reads one of those who are asked. Where no name is given for a certificate,
// it has to be for the address, as with CoreDNS.
func upstreamOf(text, serverName string) (up model.Upstream, err error) {
	transport, rest, named := strings.Cut(text, "://")
	if !named {
		transport, rest = "dns", text
	}
	port := dnsPort
	switch transport {
	case "dns":
	case "tls":
		port = 853
		if before, name, ok := strings.Cut(rest, "%"); ok {
			if serverName != "" {
				return up, fmt.Errorf("two names for its certificate")
			}
			// 192.0.2.1%name:853
			name, after, ported := strings.Cut(name, ":")
			if rest, serverName = before, strings.TrimSuffix(name, "]"); strings.HasPrefix(before, "[") {
				rest += "]"
			}
			if ported {
				rest += ":" + after
			}
		}
	default:
		return up, fmt.Errorf("%s is not spoken here", clip(transport))
	}
	if rest == "/etc/resolv.conf" && transport == "dns" {
		return model.Upstream{File: rest}, nil
	}
	if host, text, err := net.SplitHostPort(rest); err == nil {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return up, fmt.Errorf("%s is no port", clip(text))
		}
		rest, port = host, int(n)
	}
	addr, err := netip.ParseAddr(strings.Trim(rest, "[]"))
	switch {
	case err != nil:
		return up, fmt.Errorf("it is no address, or a file that only the DNS servers have")
	case addr.Zone() != "" || addr.IsLoopback() || addr.IsUnspecified():
		return up, fmt.Errorf("it is another one for the DNS servers than for the node")
	}
	up.Address = netip.AddrPortFrom(addr.Unmap(), uint16(port))
	if transport == "tls" {
		up.ServerName = cmp.Or(serverName, up.Address.Addr().String())
	}
	return up, nil
}
