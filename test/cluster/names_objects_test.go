package main

import (
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
)

// insecure: the API server is the test's own, in a namespace of its own.
var insecure = &tls.Config{InsecureSkipVerify: true}

// written is one call to the API server.
type written struct {
	method, path string
	object       object
}

// town is a cluster that is made up: Services of all sorts, and their endpoints.
type town struct {
	random     *rand.Rand
	namespaces []string
	services   []*stall
	// gone are names of Services that were deleted.
	gone []string
	made int
}

// stall is one Service.
type stall struct {
	name, namespace, kind string
	slices                []*group
	// left says that its names are asked of others: more than 8 addresses of a family,
	// several addresses of an endpoint.
	left bool
}

func (s *stall) full() string { return s.name + "." + s.namespace + ".svc.cluster.local." }

// group is one EndpointSlice.
type group struct {
	name      string
	family    string
	endpoints []*member
}

// member is one endpoint.
type member struct {
	address, more, hostname string
	ready                   bool
}

// label is the name of an endpoint below that of its Service.
func (m *member) label() string {
	switch {
	case m.hostname != "":
		return m.hostname
	case strings.HasSuffix(m.address, ":"):
		return strings.ReplaceAll(m.address, ":", "-") + "0"
	}
	return strings.NewReplacer(".", "-", ":", "-").Replace(m.address)
}

// Kinds of Services.
const (
	kindPlain    = "Service"
	kindHeadless = "headless Service"
	kindExternal = "ExternalName"
	kindOther    = "Service of another proxy"
)

const townServices = 400

// newTown founds the namespaces; some have names that mean something in DNS.
func newTown(random *rand.Rand) *town {
	t := &town{random: random, namespaces: []string{"default", "kube-system", "shop", "svc", "pod", "dns", "other", "1-2-3-4", strings.Repeat("n", 63)}}
	for i := range 20 {
		t.namespaces = append(t.namespaces, fmt.Sprintf("team-%d", i))
	}
	return t
}

// write is what is to be written for a round: all at first, then changes.
func (t *town) write(round int) (phases [][]written) {
	if round == 0 {
		phases = append(phases, t.found())
	}
	var services, groups []written
	for _, s := range slices.Clone(t.services) {
		switch n := t.random.IntN(10); {
		case n == 0:
			services = append(services, t.remove(s))
			if t.random.IntN(2) == 0 { // else its slices are left, as where no controller runs
				for _, g := range s.slices {
					groups = append(groups, written{http.MethodDelete, slicesOf(s) + "/" + g.name, nil})
				}
			}
		case n < 4:
			for _, g := range s.slices {
				g.endpoints = t.members(g.family)
				groups = append(groups, written{http.MethodPut, slicesOf(s) + "/" + g.name, g.object(s, t.random)})
			}
			s.look()
		}
	}
	for len(t.services) < townServices {
		s := t.add()
		services = append(services, written{http.MethodPost, servicesOf(s), s.object(t.random)})
		for _, g := range s.slices {
			groups = append(groups, written{http.MethodPost, slicesOf(s), g.object(s, t.random)})
		}
	}
	last := &stall{name: fmt.Sprintf("last-%d", round), namespace: "shop", kind: kindHeadless}
	g := &group{last.name + "-0", "IPv4", []*member{{address: "10.244.9.9", ready: true}}}
	return append(phases, services, groups, []written{
		{http.MethodPost, servicesOf(last), last.object(nil)}, {http.MethodPost, slicesOf(last), g.object(last, nil)},
	})
}

// sentinel are names that are known to who knows all of a round.
func (t *town) sentinel(round int) []string {
	return []string{fmt.Sprintf("last-%d.shop.svc.cluster.local.", round)}
}

// found are the objects without which there are no others.
func (t *town) found() (all []written) {
	for _, name := range t.namespaces {
		if name != "default" && name != "kube-system" && name != "shop" { // which are there
			all = append(all, written{http.MethodPost, "/api/v1/namespaces", object{"apiVersion": "v1", "kind": "Namespace", "metadata": object{"name": name}}})
		}
	}
	system := func(kind, name string, more object) object {
		o := object{"apiVersion": "v1", "kind": kind, "metadata": object{"name": name, "namespace": "kube-system"}}
		for key, value := range more {
			o[key] = value
		}
		return o
	}
	ports := []object{{"name": "dns", "port": 53, "targetPort": 5300, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "targetPort": 5300, "protocol": "TCP"}}
	all = append(all,
		written{http.MethodPost, "/api/v1/namespaces/kube-system/configmaps", system("ConfigMap", "coredns", object{"data": object{
			"Corefile": ".:53 {\n    kubernetes cluster.local in-addr.arpa ip6.arpa {\n        pods insecure\n        ttl 600\n    }\n}\n"}})},
		written{http.MethodPost, "/api/v1/namespaces/kube-system/services", system("Service", "kube-dns", object{"spec": object{
			"ipFamilyPolicy": "RequireDualStack", "clusterIP": dnsV4, "clusterIPs": []string{dnsV4, dnsV6}, "ports": ports}})})
	for family, address := range map[string]string{"IPv4": serverV4, "IPv6": serverV6} {
		g := &group{"kube-dns-" + strings.ToLower(family), family, []*member{{address: address, ready: true}}}
		o := g.object(&stall{name: "kube-dns", namespace: "kube-system"}, nil)
		o["ports"] = []object{{"name": "dns", "port": 5300, "protocol": "UDP"}, {"name": "dns-tcp", "port": 5300, "protocol": "TCP"}}
		all = append(all, written{http.MethodPost, "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices", o})
	}
	return all
}

func servicesOf(s *stall) string { return "/api/v1/namespaces/" + s.namespace + "/services" }

func slicesOf(s *stall) string {
	return "/apis/discovery.k8s.io/v1/namespaces/" + s.namespace + "/endpointslices"
}

func (t *town) remove(s *stall) written {
	t.services = slices.DeleteFunc(t.services, func(o *stall) bool { return o == s })
	t.gone = append(t.gone, s.full())
	return written{http.MethodDelete, servicesOf(s) + "/" + s.name, nil}
}

// add makes up a Service and its slices.
func (t *town) add() *stall {
	t.made++
	stems := []string{"web", "db", "svc", "pod", "dns", "ns", "a", "x-1", "cache", "api"}
	s := &stall{name: fmt.Sprintf("%s-%d", stems[t.random.IntN(len(stems))], t.made), namespace: t.namespaces[t.random.IntN(len(t.namespaces))]}
	switch t.random.IntN(12) {
	case 0:
		s.name += strings.Repeat("-x", 31)[:62-len(s.name)] + "y"
	case 1:
		s.name = "w" + s.name
	}
	s.kind = []string{kindPlain, kindPlain, kindPlain, kindPlain, kindHeadless, kindHeadless, kindHeadless, kindHeadless, kindExternal, kindOther}[t.random.IntN(10)]
	if s.kind != kindExternal {
		for i := range t.random.IntN(4) {
			family := []string{"IPv4", "IPv4", "IPv6"}[t.random.IntN(3)]
			s.slices = append(s.slices, &group{fmt.Sprintf("%s-%d-%d", s.name[:min(len(s.name), 50)], t.made, i), family, t.members(family)})
		}
	}
	s.look()
	t.services = append(t.services, s)
	return s
}

// members are the endpoints of a slice: some share a host name or an address with others,
// some are not ready.
func (t *town) members(family string) (all []*member) {
	for range t.random.IntN(5) {
		n := t.random.IntN(3000)
		if t.random.IntN(2) == 0 {
			n %= 6 // in other slices of the Service, too
		}
		m := &member{address: fmt.Sprintf("10.244.%d.%d", n/250, n%250+1), ready: t.random.IntN(5) > 0}
		if family == "IPv6" {
			if m.address = fmt.Sprintf("fd00:10:244:%x::%x", n/250+1, n%250+1); n%10 == 0 {
				m.address = fmt.Sprintf("fd00:10:244:%x::", n+1)
			}
		}
		if t.random.IntN(3) == 0 {
			m.hostname = fmt.Sprintf("db-%d", t.random.IntN(4))
		}
		if t.random.IntN(60) == 0 {
			m.more = strings.Replace(m.address, "244", "246", 1)
		}
		if !slices.ContainsFunc(all, func(o *member) bool { return o.address == m.address }) {
			all = append(all, m)
		}
	}
	if t.random.IntN(12) == 0 { // more than are answered here
		for i := range 10 {
			m := &member{address: fmt.Sprintf("10.245.%d.%d", t.random.IntN(200), i+1), ready: true}
			if family == "IPv6" {
				m.address = fmt.Sprintf("fd00:10:245:%x::%x", t.random.IntN(200)+1, i+1)
			}
			all = append(all, m)
		}
	}
	return all
}

// look says whether others are asked for the Service's names.
func (s *stall) look() {
	s.left = s.kind == kindExternal || s.kind == kindOther
	if s.kind != kindHeadless {
		return
	}
	of := map[string]map[string]bool{"IPv4": {}, "IPv6": {}}
	for _, g := range s.slices {
		for _, m := range g.endpoints {
			if m.ready {
				of[g.family][m.address] = true
			}
			s.left = s.left || m.more != ""
		}
	}
	s.left = s.left || len(of["IPv4"]) > 8 || len(of["IPv6"]) > 8
}

// object is the Service as it is written.
func (s *stall) object(random *rand.Rand) object {
	about := object{"name": s.name, "namespace": s.namespace}
	ports := []object{{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}}
	spec := object{"ports": ports}
	switch s.kind {
	case kindPlain:
		switch random.IntN(4) {
		case 0:
			spec["ipFamilyPolicy"] = "RequireDualStack"
		case 1:
			spec["ipFamilies"] = []string{"IPv6"}
		case 2:
			spec["type"] = "NodePort"
		}
	case kindHeadless:
		spec["clusterIP"] = "None"
		if random != nil && random.IntN(3) == 0 {
			delete(spec, "ports")
		}
		if random != nil {
			spec["publishNotReadyAddresses"] = random.IntN(2) == 0
		}
	case kindExternal:
		spec["type"] = "ExternalName"
		spec["externalName"] = []string{"db.example.com", "web-1.shop.svc.cluster.local", "192.0.2.1"}[random.IntN(3)]
	case kindOther:
		about["labels"] = object{"service.kubernetes.io/service-proxy-name": "other"}
	}
	return object{"apiVersion": "v1", "kind": "Service", "metadata": about, "spec": spec}
}

// object is the EndpointSlice as it is written.
func (g *group) object(s *stall, random *rand.Rand) object {
	labels := object{"kubernetes.io/service-name": s.name}
	if s.kind == kindHeadless {
		labels["service.kubernetes.io/headless"] = ""
	}
	if s.kind == kindOther {
		labels["service.kubernetes.io/service-proxy-name"] = "other"
	}
	o := object{
		"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": g.family,
		"metadata": object{"name": g.name, "namespace": s.namespace, "labels": labels},
		"ports":    []object{{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 5353, "protocol": "UDP"}},
	}
	if random != nil && random.IntN(4) == 0 {
		o["ports"] = []object{}
	}
	var endpoints []object
	for i, m := range g.endpoints {
		e := object{"addresses": []string{m.address}}
		if m.more != "" {
			e["addresses"] = []string{m.address, m.more}
		}
		if m.hostname != "" {
			e["hostname"] = m.hostname
		}
		switch {
		case !m.ready:
			e["conditions"] = object{"ready": false, "serving": i%2 == 0, "terminating": i%2 == 0}
		case i%3 > 0: // else nothing is said
			e["conditions"] = object{"ready": true}
		}
		if i%2 == 0 {
			e["targetRef"] = object{"kind": "Pod", "namespace": s.namespace, "name": fmt.Sprintf("%s-pod-%d", s.name[:min(len(s.name), 40)], i)}
		}
		endpoints = append(endpoints, e)
	}
	o["endpoints"] = endpoints
	if endpoints == nil {
		o["endpoints"] = []object{}
	}
	return o
}
