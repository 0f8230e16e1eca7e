package corefile

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
)

// FuzzHosts looks for entries that CoreDNS would answer from and that are not left to it. It
// takes them from the lines by itself, as net.ParseIP and hosts(5) have it.
func FuzzHosts(f *testing.F) {
	for _, text := range []string{"192.0.2.1 a b.example. # c\n::1%eth0\tC", "x\n192.0.2.1\n\n#1.1.1.1 a\n::ffff:1.2.3.4 a", "fe80::1%eth0 A.\v*.b\r\n"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		files := Files{Container: customized(), ConfigMaps: map[string]*Keys{"coredns": {Texts: map[string]string{"Table": text}}}}
		d := Read(".:53 {\nkubernetes cluster.local\nhosts /etc/coredns/Table {\nfallthrough\n}\nforward . 192.0.2.1\n}", files)
		if d.Left != "" {
			t.Fatalf("%q: left: %s", text, d.Left)
		}
		for line := range strings.SplitSeq(text, "\n") {
			line, _, _ = strings.Cut(line, "#")
			words := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r >= 9 && r <= 13 })
			if len(words) == 0 {
				continue
			}
			address, _, _ := strings.Cut(words[0], "%")
			addr := net.ParseIP(address)
			for _, name := range words[1:] {
				if addr != nil && !d.HasHost(strings.TrimSuffix(strings.ToLower(name), ".")) {
					t.Errorf("%q: %q is not left: %q", text, name, d.Hosts)
				}
			}
			if a, _ := netip.AddrFromSlice(addr); addr != nil && len(words) > 1 && !d.HasHostAddress(a.Unmap()) {
				t.Errorf("%q: %s is not left: %v", text, addr, d.HostAddresses)
			}
		}
	})
}

func BenchmarkHosts(b *testing.B) {
	var table strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&table, "192.0.2.%d node-%d.example\n", i%250, i)
	}
	files := Files{Container: customized(), ConfigMaps: map[string]*Keys{"coredns": {Texts: map[string]string{"NodeHosts": table.String()}}}}
	for b.Loop() {
		Read(".:53 {\nkubernetes cluster.local\nhosts /etc/coredns/NodeHosts {\nfallthrough\n}\nforward . 192.0.2.1\n}", files)
	}
}
