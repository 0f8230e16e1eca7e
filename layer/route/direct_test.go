package route

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	bpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/layertest"
)

// forwarded is how many packets a node's stack has passed on (ForwDatagrams of
// /proc/net/snmp, Ip6OutForwDatagrams of snmp6).
func (v *village) forwarded(node int) (n uint64) {
	v.t.Helper()
	must(v.t, netns.Do(v.nodes[node], func() error {
		four, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		six, err := os.ReadFile("/proc/thread-self/net/snmp6")
		if err != nil {
			return err
		}
		add := func(text string) {
			number, wrong := strconv.ParseUint(text, 10, 64)
			must(v.t, wrong)
			n += number
		}
		var head []string
		for line := range strings.Lines(string(four)) {
			words := strings.Fields(line)
			for i := range words {
				if head != nil && words[0] == "Ip:" && head[i] == "ForwDatagrams" {
					add(words[i])
				}
			}
			if head = nil; words[1] == "Forwarding" {
				head = words
			}
		}
		for line := range strings.Lines(string(six)) {
			if words := strings.Fields(line); words[0] == "Ip6OutForwDatagrams" {
				add(words[1])
			}
		}
		return nil
	}))
	return n
}

// A rule of somebody that needs to see pods' packets sends them through the stack, in VXLAN
// as well as direct; when it goes they pass it by again.
func TestRulesOfOthers(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft")
	}
	for _, mode := range []Mode{ModeAuto, ModeVXLAN} {
		t.Run(string(mode), func(t *testing.T) {
			if mode == ModeAuto {
				needsTCX(t)
			}
			v := newVillage(t, mode, false)
			l := v.start(0)
			v.start(1)
			for _, row := range []struct {
				rule   string
				closes bool
			}{
				{"add rule ip t f ip saddr 198.18.0.0/15 ct state new accept", false},
				{"add rule ip t f ip daddr 10.244.2.0/24 ct state new,established accept", true},
				{"add rule ip t p ip daddr 198.51.100.1 tcp dport 80 dnat to 10.244.2.7:80", true},
			} {
				v.rules("add table ip t\nadd chain ip t f { type filter hook forward priority 0; }\nadd chain ip t p { type nat hook prerouting priority -100; }\n" + row.rule)
				v.apply(l, v.snapshot())
				v.passes(l, row.closes, row.rule)
				d, err := l.Describe()
				must(t, err)
				if said := strings.Join(d.Degraded, ""); strings.Contains(said, "somebody's rules need to see them (table ip t") != row.closes {
					t.Errorf("%s: it says %q", row.rule, said)
				}
				v.rules("delete table ip t")
				v.apply(l, v.snapshot())
				v.passes(l, false, "without the rule")
			}
		})
	}
}

// rules are put into the first node's nftables.
func (v *village) rules(text string) {
	v.t.Helper()
	c := exec.Command("nft", "-f", "-")
	c.Stdin = strings.NewReader(text)
	var said strings.Builder
	c.Stderr = &said
	if err := netns.Do(v.nodes[0], c.Run); err != nil {
		v.t.Fatalf("%s: %v: %s", text, err, said.String())
	}
}

// passes sends something both ways, and says whether it has to go through the first node's
// stack, which sees what is too long in any case.
func (v *village) passes(l *Layer, stack bool, when string) {
	v.t.Helper()
	before, passed := counted(v.t, l), v.forwarded(0)
	for _, six := range []bool{false, true} {
		if err := v.carry(0, six, 1<<20); err != nil {
			v.t.Errorf("%s: IPv6 %v: %v", when, six, err)
		}
	}
	after := counted(v.t, l)
	past := after["sent"] + after["sent_direct"] + after["taken"] + after["taken_direct"] - before["sent"] - before["sent_direct"] - before["taken"] - before["taken_direct"]
	long := after["too_big"] - before["too_big"]
	if passed = v.forwarded(0) - passed; stack != (passed > long) || stack != (past == 0) {
		v.t.Errorf("%s: %d packets went through the stack, and %d past it: %v", when, passed, past, after)
	}
}

// Where others have connections tracked, and their table is full, pods of two nodes reach
// each other all the same, and no entry is made for them.
func TestFullConntrack(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft")
	}
	for _, mode := range []Mode{ModeAuto, ModeVXLAN} {
		t.Run(string(mode), func(t *testing.T) {
			needsTCX(t)
			v := newVillage(t, mode, false)
			v.rules("add table inet t\nadd chain inet t f { type filter hook forward priority 0; }\nadd rule inet t f ip saddr 198.18.0.0/15 ct state new accept")
			l := v.start(0)
			v.start(1)
			must(t, v.carry(0, false, 1000))
			if n := v.tracked(); n > 0 {
				t.Errorf("%d connections of pods are tracked", n)
			}
			must(t, netns.Do(v.nodes[0], layertest.FillConntrack))
			full := v.tracked()
			stack := counted(t, l)["taken_stack"]
			for range 20 {
				for _, six := range []bool{false, true} {
					must(t, v.carry(0, six, 1000))
					must(t, v.carry(1, six, 1000))
				}
			}
			if n := v.tracked(); n != full {
				t.Errorf("%d entries before, %d after", full, n)
			}
			if n := counted(t, l)["taken_stack"] - stack; n > 0 {
				t.Errorf("%d packets were given to the stack", n)
			}
			// That the table is full the node itself shows.
			server := v.listen(v.nodes[1], netip.MustParseAddrPort("192.0.2.2:84"))
			defer server()
			must(t, netns.Do(v.nodes[0], func() error {
				c, err := net.DialTimeout("tcp", "192.0.2.2:84", 300*time.Millisecond)
				if err == nil {
					c.Close()
					t.Error("the node reaches others while the table is full: the test is blind")
				}
				return nil
			}))
		})
	}
}

// tracked is how many entries the first node's connection tracking has.
func (v *village) tracked() (n int) {
	v.t.Helper()
	must(v.t, netns.Do(v.nodes[0], func() error {
		text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
		if err == nil {
			n, err = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		return err
	}))
	return n
}

// counter is a program that counts packets and lets them pass.
func counter(t *testing.T) (program *ebpf.Program, seen func() uint64) {
	t.Helper()
	counts, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	must(t, err)
	t.Cleanup(func() { counts.Close() })
	program, err = ebpf.NewProgram(&ebpf.ProgramSpec{Name: "counter", Type: ebpf.SchedCLS, License: "MIT", Instructions: asm.Instructions{
		asm.StoreImm(asm.RFP, -4, 0, asm.Word), asm.LoadMapPtr(asm.R1, counts.FD()), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -4), asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"), asm.Mov.Imm(asm.R1, 1), asm.StoreXAdd(asm.R0, asm.R1, asm.DWord), asm.Mov.Imm(asm.R0, -1).WithSymbol("out"), asm.Return()}})
	must(t, err)
	t.Cleanup(func() { program.Close() })
	return program, func() (n uint64) {
		t.Helper()
		must(t, counts.Lookup(uint32(0), &n))
		return n
	}
}

// Programs of others at the uplink see what pods send and get: tcx in front of ours at what
// comes, as the service layer's stand there, and anything at what goes. Filters at what
// comes would not, so packets go through the stack for them.
func TestProgramsOfOthers(t *testing.T) {
	needsTCX(t)
	v := newVillage(t, ModeAuto, false)
	l := v.start(0)
	v.start(1)
	in, came := counter(t)
	out, left := counter(t)
	filter, filtered := counter(t)
	must(t, netns.Do(v.nodes[0], func() error {
		for program, attach := range map[*ebpf.Program]ebpf.AttachType{in: ebpf.AttachTCXIngress, out: ebpf.AttachTCXEgress} {
			at, err := bpflink.AttachTCX(bpflink.TCXOptions{Interface: v.uplinks[0], Program: program, Attach: attach, Anchor: bpflink.Head()})
			if err != nil {
				return err
			}
			t.Cleanup(func() { at.Close() })
		}
		return nil
	}))
	before := counted(t, l)
	v.passes(l, false, "with programs at the uplink")
	after := counted(t, l)
	if n := after["sent_direct"] - before["sent_direct"]; left() < n {
		t.Errorf("%d packets were sent, and a program at the uplink saw %d", n, left())
	}
	if n := after["taken_direct"] - before["taken_direct"]; came() < n {
		t.Errorf("%d packets came, and a program at the uplink saw %d", n, came())
	}
	clsact := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: v.uplinks[0], Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	must(t, netns.Do(v.nodes[0], func() error {
		if err := netlink.QdiscAdd(clsact); err != nil {
			return err
		}
		return netlink.FilterAdd(&netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{LinkIndex: v.uplinks[0], Parent: netlink.HANDLE_MIN_INGRESS, Priority: 1, Handle: 1, Protocol: unix.ETH_P_ALL},
			Fd: filter.FD(), Name: "others", DirectAction: true})
	}))
	v.apply(l, v.snapshot())
	taken := counted(t, l)["taken_direct"]
	must(t, v.carry(0, false, 1<<20))
	if n := counted(t, l)["taken_direct"] - taken; n > 0 || filtered() == 0 {
		t.Errorf("filters of others saw %d packets, and %d went past them", filtered(), n)
	}
	d, err := l.Describe()
	must(t, err)
	if said := strings.Join(d.Degraded, ""); !strings.Contains(said, "what comes by uplink goes through the stack: somebody's filters look at it") {
		t.Errorf("it says %q", said)
	}
	must(t, netns.Do(v.nodes[0], func() error { return netlink.QdiscDel(clsact) }))
	v.apply(l, v.snapshot())
	v.passes(l, false, "without filters")
}

// A datagram that is too long for the wire and must not be cut up is refused, and its
// sender is told what fits; what fits arrives.
func TestTooLongForTheWire(t *testing.T) {
	needsTCX(t)
	v := newVillage(t, ModeAuto, false)
	for i, path := range v.nodes {
		must(t, netns.Do(path, func() error {
			return netlink.LinkSetMTU(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: v.uplinks[i]}}, 1400)
		}))
	}
	l := v.start(0)
	v.start(1)
	for _, six := range []bool{false, true} {
		must(t, v.carry(0, six, 1<<20)) // TCP learns it
		to := netip.AddrPortFrom(podAddress(1, six), 82)
		var server *net.UDPConn
		must(t, netns.Do(v.pods[1], func() (err error) {
			server, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(to))
			return err
		}))
		must(t, netns.Do(v.pods[0], flushRoutes))
		header := map[bool]int{false: 28, true: 48}[six]
		told, err := v.sendLong(v.pods[0], to, 1500-header, 1400-header)
		if err != nil || told != 1400 {
			t.Errorf("IPv6 %v: told that %d bytes fit, not 1400: %v", six, told, err)
		}
		_ = server.SetReadDeadline(time.Now().Add(5 * time.Second))
		if n, err := server.Read(make([]byte, 2000)); err != nil || n != 1400-header {
			t.Errorf("IPv6 %v: %d bytes came, not %d: %v", six, n, 1400-header, err)
		}
		server.Close()
	}
	if counted(t, l)["too_big"] == 0 {
		t.Error("no packet was too long")
	}
}

// flushRoutes forgets what was learned of the length of ways.
func flushRoutes() error {
	for _, s := range []string{"net.ipv4.route.flush", "net.ipv6.route.flush"} {
		if err := netns.SetSysctl(s, "1"); err != nil {
			return err
		}
	}
	return nil
}

// Pods of layer/pod are where its map says: past their devices, by them where somebody
// looks, and with their own addresses alone.
func TestHomes(t *testing.T) {
	for _, mode := range []Mode{ModeAuto, ModeVXLAN} {
		t.Run(string(mode), func(t *testing.T) {
			needsTCX(t)
			v := newVillage(t, mode, false)
			spec, err := loadDatapath()
			must(t, err)
			var homes [2]*ebpf.Map
			for i := range homes {
				homes[i], err = ebpf.NewMap(spec.Maps[datapathMapHomes])
				must(t, err)
				t.Cleanup(func() { homes[i].Close() })
				v.settings[i].Homes = fmt.Sprintf("%s/homes%d", v.BPF, i+1)
				must(t, homes[i].Pin(v.settings[i].Homes))
			}
			write := func(i int, device int, direct uint8) {
				t.Helper()
				home := datapathHome{Device: uint32(device), Mtu: 1500, Direct: direct}
				copy(home.Ethernet[:6], podMACs[i])
				copy(home.Ethernet[6:], nodeMACs[i])
				for _, six := range []bool{false, true} {
					must(t, homes[i].Put(addressOf(podAddress(i, six)), home))
				}
			}
			write(0, v.ports[0], 1)
			write(1, v.ports[1], 0)
			l := v.start(0)
			v.start(1)
			// What comes to the first pod passes its device by, to the second it goes by it.
			var sent [2]uint64
			for i := range sent {
				sent[i] = v.bySender(i)
			}
			v.passes(l, false, "with homes")
			for i, least := range []bool{false, true} {
				if n := v.bySender(i) - sent[i]; (n > 100) != least {
					t.Errorf("node %d's end of the pod's veth sent %d packets", i+1, n)
				}
			}
			before := counted(t, l)["stack"]
			write(0, 999, 1) // the address is another's
			must(t, netns.Do(v.pods[0], func() error {
				c, err := net.Dial("udp", netip.AddrPortFrom(podAddress(1, false), 83).String())
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write([]byte("from another's address"))
				return err
			}))
			if n := counted(t, l)["stack"] - before; n != 1 {
				t.Errorf("of one packet from another's address %d went to the stack", n)
			}
		})
	}
}

// bySender is how many packets the node's end of a pod's veth has sent.
func (v *village) bySender(i int) (n uint64) {
	v.t.Helper()
	must(v.t, netns.Do(v.nodes[i], func() error {
		found, err := netlink.LinkByIndex(v.ports[i])
		if err == nil {
			n = found.Attrs().Statistics.TxPackets
		}
		return err
	}))
	return n
}
