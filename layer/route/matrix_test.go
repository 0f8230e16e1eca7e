package route

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/proc"
)

// valley is a village with something between its nodes that looks like a segment to them,
// as clouds' fabrics do: it answers for each of them with its own hardware address
// (proxy_arp), and forwards. What it takes at most can be less than what the uplinks send.
//
//	pod1 - node1 - middle - node2 - pod2
type valley struct {
	*village
	middle string
	layers [2]*Layer
	mu     sync.Mutex // one apply at a time
}

func newValley(t *testing.T, mode Mode, six bool) *valley {
	v := &valley{village: bare(t, mode, six), middle: filepath.Join(t.TempDir(), "middle")}
	must(t, netns.Create(v.middle))
	t.Cleanup(func() { must(t, netns.Remove(v.middle)) })
	n, err := link.Open(v.middle)
	must(t, err)
	defer n.Close()
	v.sh(v.middle, "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.default.proxy_arp=1 net.ipv6.conf.default.accept_dad=0; ip link set lo up; ip addr add 192.0.2.254/32 dev lo; ip addr add 2001:db8::254/128 dev lo")
	for i := range v.nodes {
		_, err := n.Veth(link.Veth{Name: fmt.Sprintf("to%d", i+1), Peer: "uplink", PeerNamespace: v.nodes[i]})
		must(t, err)
		v.furnish(i)
		v.sh(v.middle, fmt.Sprintf("ip link set to%[1]d up; sysctl -qw net.ipv4.neigh.to%[1]d.proxy_delay=0 net.ipv6.neigh.to%[1]d.proxy_delay=0 net.ipv6.conf.to%[1]d.proxy_ndp=1; ip -6 neigh add proxy 2001:db8::%[2]d dev to%[1]d", i+1, 2-i))
	}
	v.takes(1500)
	for i := range v.nodes {
		v.layers[i] = v.start(i)
	}
	return v
}

// takes says how long packets may be that the middle forwards, in bytes.
func (v *valley) takes(most int) {
	v.t.Helper()
	var routes []string
	for i := 1; i <= 2; i++ {
		for _, one := range []struct{ family, node, pods string }{{"-4", "192.0.2.%d/32", "10.244.%d.0/24"}, {"-6", "2001:db8::%d/128", "fd00:244:%d::/64"}} {
			node, pods := fmt.Sprintf(one.node, i), fmt.Sprintf(one.pods, i)
			routes = append(routes, fmt.Sprintf("ip %s route replace %s dev to%d mtu %d", one.family, node, i, most))
			if one.family == "-6" || !v.six {
				via, _, _ := strings.Cut(node, "/")
				routes = append(routes, fmt.Sprintf("ip %s route replace %s via %s dev to%d onlink mtu %d", one.family, pods, via, i, most))
			}
		}
	}
	v.sh(v.middle, strings.Join(routes, "\n"))
	for _, space := range []string{v.middle, v.nodes[0], v.nodes[1], v.pods[0], v.pods[1]} {
		v.sh(space, "sysctl -qw net.ipv4.route.flush=1 net.ipv6.route.flush=1") // what they have learned
	}
}

// uplink gives all devices an MTU: those of nodes, those that the middle has there, and
// those of pods, which may send as much.
func (v *valley) uplink(mtu int) {
	v.t.Helper()
	for i := range v.nodes {
		v.sh(v.middle, fmt.Sprintf("ip link set to%d mtu %d", i+1, mtu))
		v.sh(v.nodes[i], fmt.Sprintf("ip link set uplink mtu %[1]d; ip link set pod mtu %[1]d", mtu))
		v.sh(v.pods[i], fmt.Sprintf("ip link set eth0 mtu %d", mtu))
	}
}

// silence has the middle say nothing of packets that are too big.
func (v *valley) silence(silent bool) {
	v.t.Helper()
	v.sh(v.middle, "nft flush ruleset")
	if silent {
		v.sh(v.middle, "nft 'table inet t { chain c { type filter hook output priority 0; icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }; }'")
	}
}

// watch has the layers measure, and apply what they found, until the test or who called it
// ends it.
func (v *valley) watch() (end func()) {
	ends := [2]func(){v.watchOne(0), v.watchOne(1)}
	return func() { ends[0](); ends[1]() }
}

func (v *valley) watchOne(i int) (end func()) {
	ctx, cancel := context.WithCancel(v.t.Context())
	var done sync.WaitGroup
	l := v.layers[i]
	l.paths.every = 200 * time.Millisecond
	done.Go(func() {
		_ = l.Watch(ctx, func() {
			v.mu.Lock()
			defer v.mu.Unlock()
			if ctx.Err() == nil {
				v.refresh(i)
			}
		})
	})
	end = func() { cancel(); done.Wait() }
	v.t.Cleanup(end)
	return end
}

// refresh is what the agent does when a layer says that something changed.
func (v *valley) refresh(i int) {
	l := v.layers[i]
	have, err := l.Read()
	if err == nil {
		want := l.Plan(v.snapshot())
		_, _, err = l.Apply(have, want, l.Diff(have, want, true))
	}
	if err != nil {
		v.t.Error(err)
	}
}

// learned waits until both layers know how long packets to the other node may be, and
// returns what they say of it.
func (v *valley) learned(uplink, passes int) (findings [2]string) {
	v.t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		all := true
		for i, l := range v.layers {
			d, err := l.Describe()
			must(v.t, err)
			findings[i] = strings.Join(d.Degraded, "\n")
			all = all && strings.Contains(findings[i], "packets of at most") == (passes != uplink)
			for _, m := range l.paths.all() {
				all = all && m.most == uplink && (m.narrow() == passes || m.narrow() == 0 && passes == uplink)
			}
		}
		if all {
			return findings
		}
		if time.Now().After(end) {
			v.t.Fatalf("uplinks of %d, %d of which pass: the nodes know %v and %v", uplink, passes, v.layers[0].paths.all(), v.layers[1].paths.all())
		}
	}
}

// rowMTU is what a node's routes say of the other's pods.
func (v *valley) rowMTU(i int, six bool) int {
	v.t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	p, err := v.layers[i].Read()
	must(v.t, err)
	for to, row := range p.(*Picture).rows {
		if to.Addr().Is6() == six {
			return row.MTU
		}
	}
	return 0
}

// TestMTUMatrix is what becomes of transfers between pods of two nodes: for uplinks of
// three sizes, by direct routes and in VXLAN, in both families, while something between
// them takes less and says so, or does not. The layer finds the number to the byte, says
// both, and 16 MB go each way; where nothing is smaller it finds nothing.
func TestMTUMatrix(t *testing.T) {
	for _, mode := range []Mode{ModeAuto, ModeVXLAN} {
		for _, six := range []bool{false, true} {
			t.Run(fmt.Sprintf("mode %s, IPv6 %v", mode, six), func(t *testing.T) {
				v := newValley(t, mode, six)
				v.watch()
				for _, uplink := range []int{1400, 1500, 9000} {
					v.uplink(uplink)
					v.takes(uplink)
					if findings := v.learned(uplink, uplink); findings != [2]string{} {
						t.Errorf("uplinks of %d, and nothing is smaller: %q", uplink, findings)
					}
					v.cell(fmt.Sprintf("uplinks of %d, and all passes", uplink), uplink)
					for _, silent := range []bool{false, true} {
						v.smaller(uplink, silent)
					}
				}
			})
		}
	}
}

// smaller is one cell of the matrix: the middle takes less than the uplinks send.
func (v *valley) smaller(uplink int, silent bool) {
	v.t.Helper()
	passes := map[int]int{1400: 1350, 1500: 1400, 9000: 1500}[uplink]
	what := fmt.Sprintf("uplinks of %d, %d of which pass, ICMP filtered %v", uplink, passes, silent)
	v.silence(silent)
	v.takes(passes)
	findings := v.learned(uplink, passes)
	for i, text := range findings {
		wants := []string{fmt.Sprintf("at most %d bytes", passes), fmt.Sprintf("an MTU of %d", uplink), "nobody says so"}
		if !silent {
			wants[2] = fmt.Sprintf("says that %d pass", passes)
		}
		for _, want := range wants {
			if !strings.Contains(text, want) {
				v.t.Errorf("%s: node %d says %q, without %q", what, i+1, text, want)
			}
		}
	}
	v.cell(what, passes)
	v.silence(false)
	v.takes(uplink)
	v.learned(uplink, uplink)
}

// cell sends 16 MB each way, in the family of the matrix, and VXLAN in both.
func (v *valley) cell(what string, outside int) {
	v.t.Helper()
	tunnel := v.settings[0].Mode == ModeVXLAN
	for _, inner := range []bool{false, true} {
		if !tunnel && inner != v.six {
			continue
		}
		want := outside
		if tunnel {
			want -= map[bool]int{false: overhead4, true: overhead6}[v.six]
		}
		for i := range v.nodes {
			if is := v.rowMTU(i, inner); is != want {
				v.t.Errorf("%s: node %d keeps packets (IPv6 %v) to %d bytes, not %d", what, i+1, inner, is, want)
			}
		}
		begun, cut := time.Now(), v.cutUp()
		if err := v.carry(0, inner, 16<<20); err != nil {
			v.t.Errorf("%s: 16 MB of IPv6 %v: %v", what, inner, err)
		}
		if n := v.cutUp() - cut; n > 0 {
			v.t.Errorf("%s: IPv6 %v: the middle made %d fragments", what, inner, n)
		}
		v.t.Logf("%s: 16 MB of IPv6 %v each way in %.2f s, %d bytes inside", what, inner, time.Since(begun).Seconds(), want)
	}
}

// cutUp is how many fragments the middle has made.
func (v *valley) cutUp() uint64 { return v.counter(v.middle, "Ip.FragCreates") }

// counter is a number of the kernel's in a namespace.
func (v *village) counter(space, name string) (n uint64) {
	v.t.Helper()
	file, read := "snmp", proc.Counter
	if !strings.Contains(name, ".") {
		file, read = "snmp6", proc.Line
	}
	must(v.t, netns.Do(space, func() error {
		text, err := os.ReadFile("/proc/thread-self/net/" + file)
		if err == nil {
			n, err = read(string(text), name)
		}
		return err
	}))
	return n
}

// A transfer that hangs, because something takes less and does not say so, goes on when
// the nodes have found it out: nothing in the pods is started anew.
func TestATransferGoesOn(t *testing.T) {
	for _, mode := range []Mode{ModeAuto, ModeVXLAN} {
		t.Run(string(mode), func(t *testing.T) {
			v := newValley(t, mode, true) // VXLAN over IPv4 would be cut up on the way, and pass
			v.silence(true)
			v.takes(1400)
			carried := make(chan error, 1)
			go func() { carried <- v.carry(0, true, 16<<20) }()
			select {
			case err := <-carried:
				t.Fatalf("it came through before anything was measured: %v", err)
			case <-time.After(2 * time.Second):
			}
			v.watch()
			v.learned(1500, 1400)
			begun := time.Now()
			must(t, <-carried)
			t.Logf("it went on within %.1f s", time.Since(begun).Seconds())
		})
	}
}

// Where all ICMP is filtered on the way, it is measured in VXLAN, which nobody takes for
// ICMP.
func TestAllICMPIsFiltered(t *testing.T) {
	for _, six := range []bool{false, true} {
		t.Run(fmt.Sprintf("outer IPv6 %v", six), func(t *testing.T) {
			v := newValley(t, ModeVXLAN, six)
			v.sh(v.middle, "nft 'table inet t { chain c { type filter hook forward priority 0; meta l4proto { icmp, icmpv6 } drop; }; chain d { type filter hook output priority 0; icmp type destination-unreachable drop; icmpv6 type packet-too-big drop; }; }'")
			v.takes(1400)
			v.watch()
			for _, text := range v.learned(1500, 1400) {
				if !strings.Contains(text, "at most 1400 bytes") || !strings.Contains(text, "nobody says so") {
					t.Errorf("a node says %q", text)
				}
			}
			v.cell("all ICMP is filtered", 1400)
			v.takes(1500)
			v.learned(1500, 1500)
		})
	}
}

// A datagram that is too long for the measured way, and must not be cut up, is answered by
// the node, although its uplink would take it: its sender is told what passes, and what
// fits arrives. By direct routes and in VXLAN, in both families.
func TestTooLongForThePath(t *testing.T) {
	for _, mode := range []Mode{ModeAuto, ModeVXLAN} {
		t.Run(string(mode), func(t *testing.T) {
			v := newValley(t, mode, false)
			v.silence(true)
			v.takes(1400)
			v.watch()
			v.learned(1500, 1400)
			mtu := map[Mode]int{ModeAuto: 1400, ModeVXLAN: 1350}[mode]
			for _, six := range []bool{false, true} {
				v.refused(six, mtu)
			}
		})
	}
}

// What it saves that pods' routes say how long packets may be, too: without that the first
// long packet to each destination is lost, answered, and sent again; with it nothing is.
func TestPodsThatAreTold(t *testing.T) {
	v := newVillage(t, ModeVXLAN, false)
	v.start(0)
	v.start(1)
	for _, six := range []bool{false, true} {
		for _, told := range []bool{false, true} {
			for i := range v.pods {
				n, err := link.Open(v.pods[i])
				must(t, err)
				defer n.Close()
				index, err := n.Index("eth0")
				must(t, err)
				mtu := map[bool]int{false: 0, true: 1450}[told]
				for _, via := range []string{"169.254.1.1", "fe80::1"} {
					to := netip.MustParseAddr(via)
					must(t, n.SetRoute(link.Route{To: netip.PrefixFrom(to, 0).Masked(), Via: to, Link: index, MTU: mtu}))
				}
			}
			errors := map[bool]string{false: "Icmp.InDestUnreachs", true: "Icmp6InPktTooBigs"}[six]
			var before, after [2]uint64
			count := func(to *[2]uint64) {
				for i := range v.pods {
					to[0] += v.counter(v.pods[i], errors)
					to[1] += v.counter(v.pods[i], "Tcp.RetransSegs")
				}
			}
			count(&before)
			must(t, v.carry(0, six, 1<<20))
			count(&after)
			answered, again := after[0]-before[0], after[1]-before[1]
			t.Logf("IPv6 %v, told %v: 1 MB each way, %d times answered that a packet is too long, %d sent again", six, told, answered, again)
			if told != (answered == 0) {
				t.Errorf("IPv6 %v, told %v: %d times answered that a packet is too long", six, told, answered)
			}
		}
	}
}
