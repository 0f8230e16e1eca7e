package cluster

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// What the names of a headless Service lead to does not depend on ports: not on those
// of the Service, which may have none, nor on those of its slices.
func TestEndpointsOfAHeadlessService(t *testing.T) {
	c := New()
	headless := change(service("db", "None", 5432), func(s *corev1.Service) { s.Spec.Ports = nil })
	one := change(slice80("db-1", "db", "10.1.0.1", "10.1.0.2"), func(s *discoveryv1.EndpointSlice) {
		host, not := "db-0", false
		s.Ports = nil
		s.Endpoints[0].Hostname = &host
		s.Endpoints[1].Conditions.Ready = &not
	})
	two := slice80("db-2", "db", "10.1.0.2")
	set(t, c, headless, one)
	shows := func(about, want string) {
		t.Helper()
		if got := fmt.Sprint(c.Snapshot().Services[0].Endpoints); got != want {
			t.Errorf("%s: %s, not %s", about, got, want)
		}
	}
	shows("at first", "[{10.1.0.1 db-0 true} {10.1.0.2  false}]")
	set(t, c, two)
	shows("ready in another slice", "[{10.1.0.1 db-0 true} {10.1.0.2  true}]")
	set(t, c, change(one, func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].Hostname = nil }))
	shows("without a host name", "[{10.1.0.1  true} {10.1.0.2  true}]")
	set(t, c, change(two, func(s *discoveryv1.EndpointSlice) {
		host := "db-1"
		s.Endpoints[0].Hostname = &host
	}))
	shows("another host name in another slice", "[{10.1.0.1  true} {10.1.0.2  false} {10.1.0.2 db-1 true}]")
	set(t, c, two)
	more := func(about string, want bool) {
		t.Helper()
		if got := c.Snapshot().Services[0].More; got != want {
			t.Errorf("%s: the names lead to more: %v", about, got)
		}
	}
	more("addresses alone", false)
	set(t, c, change(slice80("db-2", "db", "10.1.0.2"), func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].Addresses = []string{"10.1.0.2", "10.1.0.3"} }))
	more("two addresses of one endpoint", true)
	set(t, c, slice80("db-2", "db", "10.1.0.2"))
	more("one address again", false)
	names := change(slice80("db-3", "db", "db.example.com"), func(s *discoveryv1.EndpointSlice) { s.AddressType = discoveryv1.AddressTypeFQDN })
	set(t, c, names)
	more("a host name", true)
	shows("a host name is no address", "[{10.1.0.1  true} {10.1.0.2  true}]")
	set(t, c, service("db", "10.0.0.1", 5432))
	shows("headless no more", "[]")
	more("headless no more", false)
	set(t, c, headless)
	more("headless again", true)
	c.Delete(KeyOf("EndpointSlice", "", "db-3"))
	more("no host name any more", false)
}
