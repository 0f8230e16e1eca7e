package proc

import (
	"maps"
	"os"
	"testing"
)

func TestNumbers(t *testing.T) {
	const (
		netstat = "TcpExt: SyncookiesSent ListenOverflows\nTcpExt: 7 41\nIpExt: InNoRoutes\nIpExt: 3\n"
		snmp6   = "Ip6InReceives                   \t68\nUdp6RcvbufErrors                \t9\n"
		stat    = "entries  clashres drop early_drop\n0000000a  00000000 00000001 00000010\n0000000a  00000000 000000ff 00000000\n"
		softnet = "03e49aff 00000002 00000021\n0ba017d0 00000010 0000003c\n"
		sockets = "sockets: used 13\nTCP: inuse 5 orphan 0 tw 12 alloc 1 mem 23\nUDP: inuse 2 mem 70\n"
	)
	for _, row := range []struct {
		what string
		want uint64
		read func() (uint64, error)
	}{
		{"TcpExt.ListenOverflows", 41, func() (uint64, error) { return Counter(netstat, "TcpExt.ListenOverflows") }},
		{"IpExt.InNoRoutes", 3, func() (uint64, error) { return Counter(netstat, "IpExt.InNoRoutes") }},
		{"Udp6RcvbufErrors", 9, func() (uint64, error) { return Line(snmp6, "Udp6RcvbufErrors") }},
		{"drop", 256, func() (uint64, error) { return PerCPU(stat, "drop") }},
		{"early_drop", 16, func() (uint64, error) { return PerCPU(stat, "early_drop") }},
		{"entries, which each line has whole", 10, func() (uint64, error) { return PerCPU(stat, "entries") }},
		{"softnet dropped", 18, func() (uint64, error) { return Softnet(softnet, SoftnetDropped) }},
		{"softnet squeezed", 93, func() (uint64, error) { return Softnet(softnet, SoftnetSqueezed) }},
		{"TCP.tw", 12, func() (uint64, error) { return Sockstat(sockets, "TCP.tw") }},
		{"UDP.mem", 70, func() (uint64, error) { return Sockstat(sockets, "UDP.mem") }},
	} {
		if got, err := row.read(); err != nil || got != row.want {
			t.Errorf("%s is %d, not %d (%v)", row.what, got, row.want, err)
		}
	}
}

func TestCounters(t *testing.T) {
	got := map[string]uint64{}
	Counters("Tcp: MaxConn InSegs\nTcp: -1 5\nUdp: NoPorts InErrors\nUdp: 9\nIp: alone\n", func(name string, n uint64) { got[name] = n })
	if want := map[string]uint64{"Tcp.InSegs": 5, "Udp.NoPorts": 9}; !maps.Equal(got, want) {
		t.Errorf("%v, not %v", got, want)
	}
}

// A kernel without a counter is not one that has counted nothing.
func TestWhatIsNotThereIsAnError(t *testing.T) {
	for what, read := range map[string]func() (uint64, error){
		"netstat":  func() (uint64, error) { return Counter("TcpExt: A B\nTcpExt: 1 2\n", "TcpExt.C") },
		"group":    func() (uint64, error) { return Counter("TcpExt: A B\nTcpExt: 1 2\n", "IpExt.A") },
		"cut":      func() (uint64, error) { return Counter("TcpExt: A B\nTcpExt: 1\n", "TcpExt.B") },
		"snmp6":    func() (uint64, error) { return Line("A 1\n", "B") },
		"stat":     func() (uint64, error) { return PerCPU("entries drop\n00000001 00000002\n", "found") },
		"no lines": func() (uint64, error) { return PerCPU("", "found") },
		"short":    func() (uint64, error) { return PerCPU("entries drop\n00000001\n", "drop") },
		"softnet":  func() (uint64, error) { return Softnet("0001\n", SoftnetDropped) },
		"sockstat": func() (uint64, error) { return Sockstat("TCP: inuse\n", "TCP.inuse") },
	} {
		if n, err := read(); err == nil {
			t.Errorf("%s: %d and no error", what, n)
		}
	}
}

func TestProcessors(t *testing.T) {
	all, err := CPUs("cpu  10 1 20 300 4 5 60 7 8 0\ncpu0 10 1 20 300 4 5 60 7 8 0\nintr 1 2\n")
	if want := (Times{Busy: 103, Idle: 304, SoftIRQ: 60, Steal: 7}); err != nil || all["cpu"] != want || all["cpu0"] != want {
		t.Errorf("%+v, not %+v (%v)", all, want, err)
	}
	if _, err := CPUs("intr 1\n"); err == nil {
		t.Error("no processor and no error")
	}
}

func TestDeviceCounters(t *testing.T) {
	all, err := Devices("Inter-|   Receive\n face |bytes    packets errs drop fifo frame compressed multicast|bytes\n" +
		"  eth0: 100 11 12 13 0 0 0 0 200 21 22 23 0 0 0 0\n")
	if want := (Device{11, 12, 13, 21, 22, 23}); err != nil || all["eth0"] != want {
		t.Errorf("%+v, not %+v (%v)", all, want, err)
	}
}

func TestSocketsOfBothFamilies(t *testing.T) {
	const heading = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n"
	const udp = heading + "  437: 0100007F:0035 0200A8C0:1F90 07 00000000:00000000 00:00000000 00000000   101        0 15210 2 ffff 194\n"
	const tcp6 = heading + "   0: 00000000000000000000000001000000:1F90 B80D0120000000000000000001000000:0016 0A 00000000:00000000 00:00000000 00000000 0 0 77 1 ffff 100 0 0 10 0\n"
	var found []Socket
	keep := func(s Socket) { found = append(found, s) }
	for _, text := range []string{udp, tcp6} {
		if err := Sockets(text, keep); err != nil {
			t.Fatal(err)
		}
	}
	if len(found) != 2 || found[0].Local.String() != "127.0.0.1:53" || found[0].Remote.String() != "192.168.0.2:8080" || found[0].Drops != 194 || found[0].Inode != 15210 {
		t.Errorf("%+v", found)
	}
	if found[1].Local.String() != "[::1]:8080" || found[1].Remote.String() != "[2001:db8::1]:22" || found[1].State != 10 || found[1].Drops != 0 {
		t.Errorf("%+v", found[1])
	}
	if err := Sockets(heading+"1: zz:0035 zz:1 07 0 0 0 0 0 0 1 2 3 4\n", keep); err == nil {
		t.Error("no address and no error")
	}
}

// What this kernel writes can be read.
func TestThisKernel(t *testing.T) {
	text := func(name string) string {
		data, err := os.ReadFile("/proc/" + name)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	for _, name := range []string{"TcpExt.ListenOverflows", "TcpExt.ListenDrops", "TcpExt.SyncookiesSent", "TcpExt.TCPReqQFullDrop", "TcpExt.IPReversePathFilter", "TcpExt.TCPTimeWaitOverflow", "TcpExt.TCPAbortOnMemory", "IpExt.InNoRoutes"} {
		if _, err := Counter(text("net/netstat"), name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"Udp.RcvbufErrors", "Udp.InCsumErrors", "Tcp.InCsumErrors", "Ip.ReasmFails", "Ip.FragCreates"} {
		if _, err := Counter(text("net/snmp"), name); err != nil {
			t.Error(err)
		}
	}
	if _, err := PerCPU(text("net/stat/arp_cache"), "table_fulls"); err != nil {
		t.Error(err)
	}
	if _, err := Softnet(text("net/softnet_stat"), SoftnetDropped); err != nil {
		t.Error(err)
	}
	if _, err := Sockstat(text("net/sockstat"), "TCP.mem"); err != nil {
		t.Error(err)
	}
	if _, err := CPUs(text("stat")); err != nil {
		t.Error(err)
	}
	if all, err := Devices(text("net/dev")); err != nil || len(all) == 0 {
		t.Error(all, err)
	}
	for _, name := range []string{"net/tcp", "net/udp"} {
		if err := Sockets(text(name), func(Socket) {}); err != nil {
			t.Error(err)
		}
	}
}
