package cluster

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"unsafe"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/millrace/millrace/model"
)

// TestEndpointsAreOnceInMemory looks whether slices keep endpoints of their own
// beside those that the Snapshot shows.
func TestEndpointsAreOnceInMemory(t *testing.T) {
	v6 := change(slice80("a-6", "a", "fd00::2", "fd00::1"), func(s *discoveryv1.EndpointSlice) { s.AddressType = discoveryv1.AddressTypeIPv6 })
	c := New()
	set(t, c, service("a", "10.0.0.1", 80), slice80("a-4", "a", "10.1.0.2", "10.1.0.1"), v6)
	shares := func(when string, want bool) {
		t.Helper()
		shown := c.Snapshot().Services[0].Ports[0].Backends
		for _, name := range []string{"a-4", "a-6"} {
			own := c.Said(KeyOf("EndpointSlice", "", name)).value.(*slice).endpoints
			if inside(own, shown) != want {
				t.Errorf("%s slice %s shares memory with the Snapshot: %v", when, name, !want)
			}
		}
	}
	shares("at first", true)
	first := c.Snapshot()
	moved := slice80("a-4", "a", "10.1.0.1", "10.1.0.2")
	if err := c.Set("another place", moved); err != nil {
		t.Fatal(err)
	}
	shares("written elsewhere", true)
	if c.Snapshot() != first {
		t.Error("a slice that was written elsewhere made another Snapshot")
	}
	set(t, c, change(v6, func(s *discoveryv1.EndpointSlice) { s.Endpoints = s.Endpoints[:1] }))
	shares("with one endpoint less", true)
	set(t, c, slice80("a-5", "a", "10.1.0.1"), slice80("a-6", "a", "10.1.0.0", "10.1.0.3"))
	if want(t, c, "interleaved", "a[10.0.0.1]:80>10.1.0.0:8080>10.1.0.1:8080>10.1.0.2:8080>10.1.0.3:8080; 0 problems"); t.Failed() {
		return
	}
	if own := c.Said(KeyOf("EndpointSlice", "", "a-6")).value.(*slice).endpoints; inside(own, c.Snapshot().Services[0].Ports[0].Backends) {
		t.Error("a slice between whose endpoints others stand shares memory")
	}
}

// inside says whether part is a part of all, in memory.
func inside(part, all []model.Backend) bool {
	for i := range all {
		if &all[i] == &part[0] {
			return true
		}
	}
	return false
}

// TestNamesAreOnceInMemory puts two objects that were read apart.
func TestNamesAreOnceInMemory(t *testing.T) {
	c, node := New(), func() *string { s := fmt.Sprint("no", "de"); return &s }
	for _, name := range []string{"a", "b"} {
		s := slice80(name, name, "10.1.0.1")
		s.Endpoints[0].NodeName = node()
		set(t, c, s, change(service(name, "", 80), func(s *corev1.Service) { s.Spec.Selector = map[string]string{*node(): strings.Clone(name)} }))
	}
	services := c.Snapshot().Services
	a, b := services[0].Ports[0].Backends[0].Node, services[1].Ports[0].Backends[0].Node
	if a != "node" || unsafe.StringData(a) != unsafe.StringData(b) {
		t.Errorf("%s and %s are two strings", a, b)
	}
	if want := map[string]string{"node": "a"}; !reflect.DeepEqual(services[0].Selector, want) {
		t.Errorf("the selector is %v and should be %v", services[0].Selector, want)
	}
	for key := range services[1].Selector {
		if unsafe.StringData(key) != unsafe.StringData(a) {
			t.Error("the key of a selector is a string of its own")
		}
	}
	for i := range maxNames * 2 {
		s := fmt.Sprint(i)
		c.names.one(&s)
	}
	if len(c.names) > maxNames {
		t.Errorf("%d names are remembered", len(c.names))
	}
}

// TestPutAgain takes an object out and puts it back, as happens when it is in two
// files, while somebody reads the Snapshot of before; the race detector looks on.
func TestPutAgain(t *testing.T) {
	c := New()
	set(t, c, change(service("a", "10.0.0.1", 80), func(s *corev1.Service) { s.Spec.Selector = map[string]string{"k": "a"} }), slice80("a-1", "a", "10.1.0.1"), pod("p", "10.1.0.1"))
	before := c.Snapshot()
	dump, read := in(before), make(chan string)
	go func() { read <- fmt.Sprint(in(before), before.Services[0].Selector) }()
	for _, k := range []Key{KeyOf("Service", "", "a"), KeyOf("EndpointSlice", "", "a-1"), KeyOf("Pod", "", "p")} {
		o := c.Said(k)
		c.Delete(k)
		if c.Said(k) != nil || c.Put(o) != o {
			t.Errorf("%s was not put anew", k)
		}
	}
	if got := <-read; got != dump+"map[k:a]" {
		t.Errorf("the Snapshot of before says %s and said %s", got, dump)
	}
	want(t, c, "put again", dump)
}
