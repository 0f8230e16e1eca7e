package dns

import (
	"strings"
	"testing"

	"github.com/millrace/millrace/model"
)

// What the DNS servers have in a table of their own is theirs, whether it is a Service or
// not; and where a search list comes by it, it goes no further.
func TestNamesOfHostsAreLeft(t *testing.T) {
	s := town()
	s.DNS = &model.DNS{Zone: "cluster.local", TTL: DefaultTTL, Hosts: []string{
		"api.example.com", "db-0.db.shop.svc.cluster.local", "dns-1.ns.dns.cluster.local", "in.nosuch.shop.svc.cluster.local",
		"new.shop.svc.cluster.local", "web.shop.svc.cluster.local",
	}}
	p := load(t, s)
	p.search(townSearch...)
	p.asks([]asked{
		{"web.shop.svc.cluster.local.", "left", "left"},
		{"_dns._udp.web.shop.svc.cluster.local.", "left", "left"},
		{"new.shop.svc.cluster.local.", "left", "left"},
		{"db-0.db.shop.svc.cluster.local.", "left", "left"},
		{"db-1.db.shop.svc.cluster.local.", "10.244.2.5", "nodata"},
		{"db.shop.svc.cluster.local.", "10.244.1.5 10.244.2.5 10.244.2.7", "fd00:244:2::7"},
		{"in.nosuch.shop.svc.cluster.local.", "left", "left"},
		{"dns-1.ns.dns.cluster.local.", "left", "left"},
		{"nosuch.kube-system.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"api.example.com.", "not_ours", "not_ours"},
		// candidates of which one is in the table
		{"new.shop.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"web.shop.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"four.shop.shop.svc.cluster.local.", "four.shop.svc.cluster.local. 10.96.0.21", "four.shop.svc.cluster.local. nodata"},
	})
	s.DNS.Hosts = nil
	p.apply(s)
	p.asks([]asked{
		{"web.shop.svc.cluster.local.", "10.96.0.20", "fd00:96::20"},
		{"new.shop.svc.cluster.local.", "nxdomain", "nxdomain"},
		{"web.shop.shop.svc.cluster.local.", "web.shop.svc.cluster.local. 10.96.0.20", "web.shop.svc.cluster.local. fd00:96::20"},
	})
}

// A name that the program would not look for cannot be left alone: all are.
func TestNamesThatCannotBeLeftAlone(t *testing.T) {
	for host, alone := range map[string]bool{
		"web.shop.svc.cluster.local": true, "x.web.shop.svc.cluster.local": true, "x.y.web.shop.svc.cluster.local": true, "x.y.z.web.shop.svc.cluster.local": false,
		"shop.svc.cluster.local": true, "svc.cluster.local": true, "1-2-3-4.shop.pod.cluster.local": true, "ns.dns.cluster.local": true,
		"gitlab.cluster.local": false, "*.shop.svc.cluster.local": false, "a..svc.cluster.local": false, `a\.b.shop.svc.cluster.local`: false,
		"cluster.local": true, "gitlab.example": true, "*.example": true, "*": true, "": true, "xcluster.local": true,
	} {
		left := leftWhole("cluster.local", &model.DNS{Zone: "cluster.local", Hosts: []string{host}})
		if (left == "") != alone || left != "" && !strings.Contains(left, host) {
			t.Errorf("%s: left because %q", host, left)
		}
	}
}
