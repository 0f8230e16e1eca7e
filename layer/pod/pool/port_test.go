package pool

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// portOf reads "8080/tcp" and "127.0.0.1:8080/udp"; the pod's is the same port.
func portOf(t *testing.T, text string) Port {
	t.Helper()
	at, protocol, _ := strings.Cut(text, "/")
	p := Port{Protocol: protocol}
	if !strings.Contains(at, ":") {
		at = "0.0.0.0:" + at // stands for no address
	}
	whole, err := netip.ParseAddrPort(at)
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(text, at) {
		p.HostIP = whole.Addr()
	}
	p.HostPort, p.ContainerPort = whole.Port(), whole.Port()
	return p
}

// Two ports meet where an address of the node would have both.
func TestPortsMeet(t *testing.T) {
	for _, row := range []struct {
		one, other string
		want       bool
	}{
		{"80/tcp", "80/tcp", true},
		{"80/tcp", "80/udp", false},
		{"80/tcp", "81/tcp", false},
		{"80/tcp", "192.0.2.1:80/tcp", true},
		{"80/tcp", "[::1]:80/tcp", true},
		{"0.0.0.0:80/tcp", "192.0.2.1:80/tcp", true},
		{"0.0.0.0:80/tcp", "80/tcp", true},
		{"0.0.0.0:80/tcp", "[2001:db8::1]:80/tcp", false},
		{"0.0.0.0:80/tcp", "[::]:80/tcp", false},
		{"[::]:80/tcp", "[2001:db8::1]:80/tcp", true},
		{"127.0.0.1:80/tcp", "192.0.2.1:80/tcp", false},
		{"192.0.2.1:80/tcp", "192.0.2.1:80/tcp", true},
		{"192.0.2.1:80/tcp", "192.0.2.1:80/udp", false},
	} {
		one, other := portOf(t, row.one), portOf(t, row.other)
		if one.Meets(other) != row.want || other.Meets(one) != row.want {
			t.Errorf("%s and %s meet: %v, not %v", one.Host(), other.Host(), one.Meets(other), row.want)
		}
		if one.Host() != row.one {
			t.Errorf("%s is shown as %s", row.one, one.Host())
		}
	}
}

// Ports are held until they are given back, are written down, and are not in the way of the
// interface that holds them.
func TestPortsAreHeld(t *testing.T) {
	p := opened(Book{}, begun, "10.1.0.0/29")
	web := []Port{portOf(t, "80/tcp"), portOf(t, "127.0.0.1:53/udp")}
	if _, err := p.Take(Lease{Key: key(0), Pod: "shop/web", Ports: web}, begun); err != nil {
		t.Fatal(err)
	}
	file := File{filepath.Join(t.TempDir(), "book.json")}
	if err := file.Write(p.Book()); err != nil {
		t.Fatal(err)
	}
	book, _, err := file.Read()
	if err != nil || !slices.Equal(book.Leases[0].Ports, web) {
		t.Fatalf("read again: %v, %v", book, err)
	}
	p = opened(book, begun, "10.1.0.0/29")
	holder, port, clash := p.Clash(key(1), []Port{portOf(t, "81/tcp"), portOf(t, "127.0.0.1:53/udp")})
	if !clash || holder.Pod != "shop/web" || port != web[1] {
		t.Errorf("%v %v %v", holder, port, clash)
	}
	for _, free := range []struct {
		key  Key
		text string
	}{{key(0), "80/tcp"}, {key(1), "80/udp"}, {key(1), "192.0.2.1:53/udp"}} {
		if holder, port, clash := p.Clash(free.key, []Port{portOf(t, free.text)}); clash {
			t.Errorf("%s of %s clashes with %v of %v", free.text, free.key, port, holder)
		}
	}
	if again, err := p.Take(Lease{Key: key(0), Ports: web[:1]}, begun); err != nil || !slices.Equal(again.Ports, web[:1]) || again.Pod != "shop/web" {
		t.Errorf("asked again: %v, %v", again, err)
	}
	p.GivePorts(key(0))
	p.GivePorts(key(7))
	if lease, held := p.Lease(key(0)); !held || len(lease.Ports) > 0 || len(lease.Addresses) != 1 {
		t.Errorf("without its ports the interface has %v", lease)
	}
	if _, _, clash := p.Clash(key(1), web); clash {
		t.Error("ports that were given back are held")
	}
}
