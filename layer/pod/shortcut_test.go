package pod

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	bpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/millrace/millrace/kernel/attach"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
)

// hamlet is a town with two pods and shortcuts between them.
type hamlet struct {
	*town
	l         *Layer
	addresses []netip.Addr // of db
}

var hamletRanges = []string{"10.244.1.0/24", "fd00:1::/64"}

func newHamlet(t *testing.T) *hamlet {
	h := &hamlet{town: newTown(t)}
	if !attach.HaveTCX() {
		t.Skip("needs Linux 6.6: tcx")
	}
	h.l = h.open(hamletRanges...)
	h.space("web")
	h.space("db")
	h.add(h.l, "web")
	h.addresses = h.add(h.l, "db")
	return h
}

// bring does what the agent does when something has changed, and returns what that was.
func (h *hamlet) bring() layer.Changes {
	h.t.Helper()
	return h.apply(h.l, hamletRanges...)
}

// talk has web talk to db, and says by which ways packets went.
func (h *hamlet) talk(what string) map[string]uint64 {
	h.t.Helper()
	before := h.crossings()
	for _, addr := range h.addresses {
		if _, err := say(h.pods["web"], h.pods["db"], addr); err != nil {
			h.t.Errorf("%s, to %s: %v", what, addr, err)
		}
	}
	after := h.crossings()
	for word := range after {
		after[word] -= before[word]
	}
	return after
}

func (h *hamlet) crossings() map[string]uint64 {
	h.t.Helper()
	d, err := h.l.Describe()
	must(h.t, err)
	return d.Reasons
}

// device is that of a pod on the node.
func (b *town) device(container string) int {
	b.t.Helper()
	n, err := link.Open(b.NetNS)
	must(b.t, err)
	defer n.Close()
	index, err := n.Index(deviceName(pool.Key{Container: container, Interface: "eth0"}))
	must(b.t, err)
	return index
}

// rules are put into the node's nftables by nft.
func (h *hamlet) rules(text string) {
	h.t.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		h.t.Skip("needs nft")
	}
	c := exec.Command("nft", "-f", "-")
	c.Stdin = strings.NewReader(text)
	var said strings.Builder
	c.Stderr = &said
	if err := h.Inside(c.Run); err != nil {
		h.t.Fatalf("%s: %v: %s", text, err, said.String())
	}
}

// bulk sends 16 MB from web to db.
func (h *hamlet) bulk() error {
	const size = 16 << 20
	var listener net.Listener
	err := netns.Do(h.pods["db"], func() (err error) {
		listener, err = net.Listen("tcp", netip.AddrPortFrom(h.addresses[0], 0).String())
		return err
	})
	if err != nil {
		return err
	}
	defer listener.Close()
	came := make(chan error, 1)
	go func() {
		c, err := listener.Accept()
		if err != nil {
			came <- err
			return
		}
		defer c.Close()
		n, err := io.Copy(io.Discard, c)
		if err == nil && n != size {
			err = fmt.Errorf("%d bytes of %d came", n, size)
		}
		came <- err
	}()
	err = netns.Do(h.pods["web"], func() error {
		c, err := net.DialTimeout("tcp", listener.Addr().String(), 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		_, err = c.Write(make([]byte, size))
		return err
	})
	return errors.Join(err, <-came)
}

// From pod to pod packets go at once, and by the stack as long as they may not.
func TestFromPodToPod(t *testing.T) {
	h := newHamlet(t)
	if ways := h.talk("before the agent has looked"); ways["direct"]+ways["device"] > 0 {
		t.Errorf("before the agent has looked: %v", ways)
	}
	changes := h.bring()
	if len(changes) != 2 || !strings.HasPrefix(changes[0].String(), "+ shortcut to pod shop/") {
		t.Errorf("the changes are\n%v", changes)
	}
	ways := h.talk("with shortcuts")
	if ways["direct"] < 12 || ways["device"] > 0 {
		t.Errorf("two connections went %v", ways)
	}
	// What is for the node goes to the node.
	if seen, err := say(h.pods["web"], h.NetNS, node4); err != nil || seen != netip.MustParseAddr("10.244.1.1") {
		t.Error(seen, err)
	}
	if seen, err := say(h.NetNS, h.pods["db"], h.addresses[0]); err != nil || seen != node4 {
		t.Error(seen, err)
	}
	// 64 KB packets, as TCP makes them of bulk, go whole.
	if err := h.bulk(); err != nil {
		t.Error(err)
	}
	if changes := h.bring(); len(changes) > 0 {
		t.Errorf("there is nothing to do, but\n%v", changes)
	}
	must(t, second(h.l.Answer(t.Context(), h.request(cni.Del, "db", ""))))
	if changes := h.bring(); len(changes) > 0 {
		t.Errorf("after a pod's end there is nothing to do, but\n%v", changes)
	}
	if pins, err := filepath.Glob(filepath.Join(h.settings.Pins, layer.LinkPrefix+"*")); err != nil || len(pins) != 1 {
		t.Errorf("one pod is left, with %v", pins)
	}
}

// Rules that need to see packets get them: translation and connection tracking. Those of
// other ranges change nothing.
func TestRulesOfOthers(t *testing.T) {
	h := newHamlet(t)
	h.bring()
	for _, row := range []struct {
		rule   string
		closes bool
	}{
		{"add rule ip t f ip saddr 198.18.0.0/15 ct state new accept", false},
		{"add rule ip t f ct state established accept", true},
		{"add rule ip t p ip daddr 192.0.2.10 tcp dport 80 dnat to 10.244.1.2:80", true},
	} {
		h.rules("add table ip t\nadd chain ip t f { type filter hook forward priority 0; }\nadd chain ip t p { type nat hook prerouting priority -100; }\n" + row.rule)
		changes := h.bring()
		if closed := slices.ContainsFunc(changes, func(c layer.Change) bool { return c.String() == "- shortcuts between pods" }); closed != row.closes {
			t.Errorf("%s: the changes are\n%v", row.rule, changes)
		}
		if ways := h.talk(row.rule); (ways["direct"] == 0) != row.closes {
			t.Errorf("%s: packets went %v", row.rule, ways)
		}
		d, err := h.l.Describe()
		must(t, err)
		if said := strings.Join(d.Degraded, ""); strings.Contains(said, "somebody's rules need to see them (table ip t") != row.closes {
			t.Errorf("%s: it says %q", row.rule, said)
		}
		h.rules("delete table ip t")
		h.bring()
		if ways := h.talk("without the rule"); ways["direct"] == 0 {
			t.Errorf("%s is gone, and packets go %v", row.rule, ways)
		}
	}
}

// Whoever looks at what a pod's device sends sees the packets of other pods, too, from
// the moment of a claim on; filters at what a pod sends see all of it.
func TestProgramsOfOthers(t *testing.T) {
	h := newHamlet(t)
	h.bring()
	must(t, h.l.Claim(h.device("db")))
	if ways := h.talk("after a claim"); ways["device"] == 0 || ways["direct"] == 0 {
		t.Errorf("to db by the device, back at once: %v", ways)
	}
	seen, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	must(t, err)
	defer seen.Close()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "counter", Type: ebpf.SchedCLS, License: "MIT", Instructions: asm.Instructions{
		asm.StoreImm(asm.RFP, -4, 0, asm.Word), asm.LoadMapPtr(asm.R1, seen.FD()), asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -4), asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"), asm.Mov.Imm(asm.R1, 1), asm.StoreXAdd(asm.R0, asm.R1, asm.DWord), asm.Mov.Imm(asm.R0, -1).WithSymbol("out"), asm.Return()}})
	must(t, err)
	defer program.Close()
	var at bpflink.Link
	must(t, h.Inside(func() (err error) {
		at, err = bpflink.AttachTCX(bpflink.TCXOptions{Interface: h.device("db"), Program: program, Attach: ebpf.AttachTCXEgress})
		return err
	}))
	if changes := h.bring(); len(changes) > 0 {
		t.Errorf("what was claimed is there, and the changes are\n%v", changes)
	}
	ways := h.talk("with a program of others")
	var n uint64
	must(t, seen.Lookup(uint32(0), &n))
	if n == 0 || n < ways["device"] {
		t.Errorf("%v packets went by the device, and it saw %d", ways, n)
	}
	must(t, at.Close())
	if changes := h.bring(); len(changes) != 1 || changes[0].Op != layer.Alter {
		t.Errorf("it is gone, and the changes are\n%v", changes)
	}
	if ways := h.talk("without it"); ways["device"] > 0 {
		t.Errorf("without it packets went %v", ways)
	}
	must(t, h.Inside(func() error {
		return netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: h.device("web"), Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
	}))
	if changes := h.bring(); len(changes) != 1 || !strings.HasPrefix(changes[0].String(), "~ shortcut to pod shop/web") {
		t.Errorf("with filters the changes are\n%v", changes)
	}
	if ways := h.talk("with filters at web"); ways["direct"] > 0 || ways["device"] == 0 {
		t.Errorf("with filters at web packets went %v", ways)
	}
}

// What somebody takes away comes back; what another version left is not used.
func TestLost(t *testing.T) {
	h := newHamlet(t)
	h.bring()
	must(t, os.Remove(filepath.Join(h.settings.Pins, datapathMapHomes)))
	pins, err := filepath.Glob(filepath.Join(h.settings.Pins, layer.LinkPrefix+"*"))
	must(t, err)
	must(t, os.Remove(pins[0]))
	if changes := h.bring(); len(changes) != 2 || changes[0].String() != "+ pin homes" {
		t.Errorf("the changes are\n%v", changes)
	}
	must(t, h.l.Close())
	must(t, os.Remove(filepath.Join(h.settings.Pins, datapathMapHomes)))
	old, err := ebpf.NewMap(&ebpf.MapSpec{Name: datapathMapHomes, Type: ebpf.Hash, KeySize: 16, ValueSize: 8, MaxEntries: 16})
	must(t, err)
	defer old.Close()
	must(t, old.Pin(filepath.Join(h.settings.Pins, datapathMapHomes)))
	h.l = New(h.settings)
	must(t, h.l.Open())
	defer h.l.Close()
	if ways := h.talk("before the new map is filled"); ways["stack"] == 0 || ways["direct"] > 0 {
		t.Errorf("before the new map is filled: %v", ways)
	}
	h.bring()
	if ways := h.talk("after"); ways["direct"] == 0 {
		t.Errorf("after: %v", ways)
	}
}

// A hop is a hop, and who is on the way answers.
func TestHops(t *testing.T) {
	h := newHamlet(t)
	h.bring()
	must(t, netns.Do(h.pods["web"], func() error { return netns.SetSysctl("net.ipv4.ip_default_ttl", "1") }))
	if _, err := say(h.pods["web"], h.pods["db"], h.addresses[0]); err == nil {
		t.Error("packets that may not pass a router came to another pod")
	}
	must(t, netns.Do(h.pods["web"], func() error { return netns.SetSysctl("net.ipv4.ip_default_ttl", "2") }))
	if _, err := say(h.pods["web"], h.pods["db"], h.addresses[0]); err != nil {
		t.Error(err)
	}
}
