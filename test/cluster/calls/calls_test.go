package main

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What the kernel's table says of a socket is where it is connected to.
func TestWhereASocketLeadsIsSeen(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		server, err := open("udp", netip.MustParseAddrPort(address))
		if err != nil {
			t.Fatal(err)
		}
		defer server.close()
		to := bound(t, server)
		client, err := open("udp-long", to)
		if err != nil {
			t.Fatal(err)
		}
		defer client.close()
		if err := client.connect(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		if got := client.leadsTo(); got != to.String() {
			t.Errorf("a socket that is connected to %v seems to lead to %q", to, got)
		}
	}
}

// bound gives a socket a port, and returns its address.
func bound(t *testing.T, s *socket) netip.AddrPort {
	t.Helper()
	if err := unix.Bind(s.fd, s.address()); err != nil {
		t.Fatal(err)
	}
	own, err := unix.Getsockname(s.fd)
	if err != nil {
		t.Fatal(err)
	}
	if v6, ok := own.(*unix.SockaddrInet6); ok {
		return netip.AddrPortFrom(s.to.Addr(), uint16(v6.Port))
	}
	return netip.AddrPortFrom(s.to.Addr(), uint16(own.(*unix.SockaddrInet4).Port))
}

func TestTargetsAreNamedWithTheirKind(t *testing.T) {
	target, err := parse("shop/tcp-long=[fd00::1]:80")
	if err != nil || target.name != "shop" || target.kind != "tcp-long" || target.to != netip.MustParseAddrPort("[fd00::1]:80") {
		t.Errorf("read as %+v, %v", target, err)
	}
	for _, wrong := range []string{"shop=10.0.0.1:80", "shop/sctp=10.0.0.1:80", "shop/tcp=10.0.0.1"} {
		if _, err := parse(wrong); err == nil {
			t.Errorf("%s is taken", wrong)
		}
	}
}
