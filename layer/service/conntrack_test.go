package service

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/model"
)

// dropInvalid are rules of somebody that make the kernel track connections, and
// forgive no packet that fits in none.
const dropInvalid = `
table inet others {
	chain forward {
		type filter hook forward priority 0;
		ct state invalid drop
	}
	chain output {
		type filter hook output priority 0;
		ct state invalid drop
	}
}
`

// tracked is a village where others' rules make the kernel track connections,
// before a cluster of pods is served.
func tracked(t *testing.T, settings Settings) (v *village, client, server *pod) {
	t.Helper()
	v = newVillage(t, settings)
	client, server = v.pod(), v.pod()
	server.serve("tcp", 8080, "server")
	server.serve("udp", 5353, "server")
	v.rules(dropInvalid)
	return v, client, server
}

// rules adds rules of somebody.
func (v *village) rules(text string) {
	v.t.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		v.t.Skip("needs nft: ", err)
	}
	v.nft(text, "-f", "-")
}

// ruleset is what nft lists.
func (v *village) ruleset() string { return v.nft("", "list", "ruleset") }

func (v *village) nft(input string, arguments ...string) string {
	v.t.Helper()
	var said bytes.Buffer
	err := v.Inside(func() error {
		c := exec.Command("nft", arguments...)
		c.Stdin, c.Stdout, c.Stderr = strings.NewReader(input), &said, &said
		return c.Run()
	})
	if err != nil {
		v.t.Fatalf("nft %v: %v\n%s", arguments, err, said.String())
	}
	return said.String()
}

// ranges makes the cluster's nodes have ranges for pods; without one, no node has
// any.
func ranges(snapshot *model.Snapshot, texts ...string) *model.Snapshot {
	node := &model.Node{Name: "n1"}
	for _, text := range texts {
		node.PodCIDRs = append(node.PodCIDRs, netip.MustParsePrefix(text))
	}
	snapshot.Nodes = []*model.Node{node}
	return snapshot
}

// podRanges are those of the village's pods.
var podRanges = []string{"10.244.0.0/16", "fd00:244::/64"}

// servedTwice is a cluster where each way is served by the socket path and, on
// other addresses, by the packet path.
func servedTwice(server *pod) *model.Snapshot {
	snapshot := webAndNames(server)
	for i, s := range webAndNames(server).Services {
		snapshot.Services[i].Annotations = map[string]string{PathAnnotation: string(PathPacket)}
		s.Name.Name += "-by-socket"
		s.Annotations = map[string]string{PathAnnotation: string(PathSocket)}
		for i, a := range s.ClusterIPs {
			s.ClusterIPs[i] = bySocket(a)
		}
		snapshot.Services = append(snapshot.Services, s)
	}
	return ranges(snapshot, podRanges...)
}

// bySocket is the address of the same Service on the socket path.
func bySocket(a netip.Addr) netip.Addr {
	raw := a.AsSlice()
	raw[len(raw)-2]++
	other, _ := netip.AddrFromSlice(raw)
	return other
}

// waysOf are the four ways by one path.
func waysOf(path Path) (all []struct{ network, address string }) {
	for _, way := range ways {
		if path == PathSocket {
			at := netip.MustParseAddrPort(way.address)
			way.address = netip.AddrPortFrom(bySocket(at.Addr()), at.Port()).String()
		}
		all = append(all, way)
	}
	return all
}

// calls makes so many calls from the pod, each by a socket of its own, and returns
// the first error.
func (p *pod) calls(network, address string, count int) error {
	return p.inside(func() error {
		for i := range count {
			conn, err := net.DialTimeout(network, address, patience)
			if err != nil {
				return fmt.Errorf("call %d: %w", i, err)
			}
			_, rest, err := talk(conn, "hello")
			conn.Close()
			if err != nil || rest != "hello" {
				return fmt.Errorf("call %d: %q, %v", i, rest, err)
			}
		}
		return nil
	})
}

// entries is how many connections the kernel tracks in the node's namespace.
func (v *village) entries() int { return v.conntrackNumber("nf_conntrack_count") }

func (v *village) conntrackNumber(name string) (n int) {
	v.t.Helper()
	v.must(v.Inside(func() error {
		text, err := os.ReadFile("/proc/sys/net/netfilter/" + name)
		if err == nil {
			n, err = strconv.Atoi(strings.TrimSpace(string(text)))
		}
		return err
	}))
	return n
}

// Both paths get along with somebody who tracks connections and drops what fits
// in none: what tracking sees of a Service's connection is a connection of pods.
func TestServicesBesideConntrack(t *testing.T) {
	v, client, server := tracked(t, Settings{Conntrack: ConntrackKeep})
	v.open(servedTwice(server))
	for _, path := range []Path{PathSocket, PathPacket} {
		for _, way := range waysOf(path) {
			before := v.entries()
			if err := client.calls(way.network, way.address, 50); err != nil {
				t.Errorf("%s path, %s %s: %v", path, way.network, way.address, err)
			}
			if added := v.entries() - before; added == 0 {
				t.Errorf("%s path, %s %s: no entry was made: the test is blind", path, way.network, way.address)
			}
		}
	}
}

func TestServicesAddNoConntrackEntry(t *testing.T) {
	v, client, server := tracked(t, Settings{})
	v.open(servedTwice(server))
	const each = 1250
	total := 0
	for _, path := range []Path{PathSocket, PathPacket} {
		flows, err := v.layer.datapath.flowCount()
		v.must(err)
		for _, way := range waysOf(path) {
			if err := client.calls(way.network, way.address, each); err != nil {
				t.Errorf("%s path, %s %s: %v", path, way.network, way.address, err)
			}
			total += each
		}
		now, err := v.layer.datapath.flowCount()
		v.must(err)
		if (now > flows) != (path == PathPacket) {
			t.Errorf("%s path: %d flows of the packet path before, %d after", path, flows, now)
		}
	}
	if n := v.entries(); n != 0 {
		t.Errorf("%d calls made %d entries", total, n)
	}
}

// A router that reports about a connection which is not tracked must be heard, or
// large packets vanish beside somebody who drops what is invalid.
func TestErrorsAboutUntrackedPackets(t *testing.T) {
	v, client, server := tracked(t, Settings{Path: PathPacket})
	v.open(servedTwice(server))
	v.must(server.narrow(1300))
	for _, path := range []Path{PathSocket, PathPacket} {
		for _, way := range waysOf(path)[:2] {
			text := strings.Repeat("z", 100_000)
			if _, rest, err := client.call(way.network, way.address, text); err != nil || rest != text {
				t.Errorf("%s path, %s over a smaller MTU: %d bytes, %v", path, way.address, len(rest), err)
			}
		}
	}
	if n := v.entries(); n != 0 {
		t.Errorf("%d entries", n)
	}
}

// Fragments of untracked packets go through somebody's tracking as others do.
func TestFragmentsOfUntrackedPackets(t *testing.T) {
	v, client, server := tracked(t, Settings{Path: PathPacket})
	v.open(servedTwice(server))
	for _, path := range []Path{PathSocket, PathPacket} {
		for _, way := range waysOf(path)[2:] {
			text := strings.Repeat("f", 9000)
			if _, rest, err := client.call(way.network, way.address, text); err != nil || rest != text {
				t.Errorf("%s path, %s: %d bytes, %v", path, way.address, len(rest), err)
			}
		}
	}
	if n := v.entries(); n != 0 {
		t.Errorf("%d entries", n)
	}
}

// A full table stops whoever needs it, and no Service.
func TestServicesWhileConntrackIsFull(t *testing.T) {
	v, client, server := tracked(t, Settings{})
	v.open(servedTwice(server))
	v.AddAddress("10.9.9.9/32") // the node's own, which is tracked
	v.must(v.Inside(func() error {
		listener, err := net.Listen("tcp", "10.9.9.9:80")
		if err == nil {
			t.Cleanup(func() { listener.Close() })
			go func() {
				for {
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					go echoStream(conn, "node")
				}
			}()
		}
		return err
	}))
	if err := client.calls("tcp", "10.9.9.9:80", 1); err != nil {
		t.Fatalf("the node itself, before the table is full: %v", err)
	}
	v.must(v.Inside(layertest.FillConntrack))
	full, most := v.entries(), v.conntrackNumber("nf_conntrack_max")
	if full < most {
		t.Fatalf("%d of %d entries: the table is not full", full, most)
	}
	refused := func() error {
		return client.inside(func() error {
			conn, err := net.DialTimeout("tcp", "10.9.9.9:80", 300*time.Millisecond)
			if err == nil {
				conn.Close()
				return errors.New("the node itself is reached while the table is full: the test is blind")
			}
			return nil
		})
	}
	v.must(refused())
	const each = 250
	for _, path := range []Path{PathSocket, PathPacket} {
		for _, way := range waysOf(path) {
			if err := client.calls(way.network, way.address, each); err != nil {
				t.Errorf("%s path, %s %s: %v", path, way.network, way.address, err)
			}
		}
	}
	if now := v.entries(); now != full {
		t.Errorf("%d entries before, %d after", full, now)
	}
	v.must(refused())
}

// What others have in nftables stays as it is, through all the layer's life.
func TestLawsOfTheConntrackBypass(t *testing.T) {
	layertest.Laws(t, func(t *testing.T) layertest.Subject {
		v, client, server := tracked(t, Settings{Path: PathPacket})
		settings := v.layer.settings
		settings.Pins = filepath.Join(v.BPF, "millrace", "service")
		v.must(os.Mkdir(filepath.Dir(settings.Pins), 0o700))
		return layertest.Subject{
			New: func() layer.Layer { return New(settings) },
			Snapshots: []*model.Snapshot{
				ranges(webAndNames(server), podRanges...),
				ranges(webAndNames(server), "10.244.0.0/24", "10.244.1.0/25"),
				{Complete: true},
				ranges(webAndNames(server), "10.0.0.0/8", "fd00::/16"),
			},
			Observe: func() string { return observe(t, v.Bed) + v.observe() + v.ruleset() },
			Stranger: func() func() error {
				before := v.ruleset()
				return func() error {
					now := withoutOurs(v.ruleset())
					if now != before {
						return fmt.Errorf("before:\n%s\nnow:\n%s", before, now)
					}
					return nil
				}
			},
			Works: func() error {
				_, _, err := client.call("tcp", "10.96.0.1:80", "hello")
				return err
			},
		}
	})
}

// withoutOurs is a ruleset without the layer's table.
func withoutOurs(text string) string {
	begin := strings.Index(text, "table inet "+nft.Table+" {")
	if begin < 0 {
		return text
	}
	end := begin + strings.Index(text[begin:], "\n}\n") + len("\n}\n")
	return text[:begin] + text[end:]
}

// Whoever needs the state of connections keeps it, and the operator is told who.
func TestBypassGivesWayToThoseWhoNeedConntrack(t *testing.T) {
	v, client, server := tracked(t, Settings{Path: PathPacket})
	snapshot := servedTwice(server)
	v.open(snapshot)
	kubeProxy, err := os.ReadFile("../../bench/testdata/nftables.rules")
	v.must(err)
	for _, step := range []struct {
		rules  string
		bypass bool
		why    string
	}{
		{rules: "", bypass: true},
		{rules: string(kubeProxy), why: "kube-proxy's rules are present and need it (table ip kube-proxy, chain"},
		{rules: "delete table ip kube-proxy", bypass: true},
		{rules: "delete table inet " + nft.Table, bypass: true}, // somebody's mistake is mended
		{rules: "add rule inet others forward ct state established accept", why: "somebody's rules need it (table inet others, chain forward: looks at the state"},
		{rules: "flush chain inet others forward", bypass: true},
		{rules: "delete table inet others"}, // nobody tracks: there is nothing to bypass
	} {
		v.nft(step.rules, "-f", "-")
		v.become(snapshot)
		if there := strings.Contains(v.ruleset(), "table inet "+nft.Table); there != step.bypass {
			t.Errorf("after %.50q: the bypass is in force: %v", step.rules, there)
		}
		description, err := v.layer.Describe()
		v.must(err)
		said := strings.Join(description.Degraded, "\n")
		if strings.Contains(said, "conntrack") != (step.why != "") || !strings.Contains(said, step.why) {
			t.Errorf("after %.50q the layer says %q, want %q", step.rules, said, step.why)
		}
		if in := description.Settings["conntrack"]; strings.Contains(in, "bypassed for 10.244.0.0/16, fd00:244::/64") != step.bypass {
			t.Errorf("after %.50q the setting is shown as %q", step.rules, in)
		}
		if err := client.calls("tcp", "10.96.0.1:80", 1); err != nil {
			t.Errorf("after %.50q: %v", step.rules, err)
		}
	}
}

// A connection goes on when tracking is bypassed under it, and when it comes back.
func TestStreamsOutliveTheBypass(t *testing.T) {
	v, client, server := tracked(t, Settings{Path: PathPacket})
	with, without := servedTwice(server), ranges(servedTwice(server))
	v.open(without)
	v.must(client.inside(func() error {
		conn, err := net.Dial("tcp", "10.96.0.1:80")
		if err != nil {
			return err
		}
		defer conn.Close()
		for i, snapshot := range []*model.Snapshot{without, with, without, with} {
			v.become(snapshot)
			if err := exchangeLine(conn, fmt.Sprint("line ", i)); err != nil {
				t.Errorf("step %d: %v", i, err)
			}
		}
		return nil
	}))
}

// A layer that pins nothing leaves nothing.
func TestBypassWithoutPinsEndsWithTheProcess(t *testing.T) {
	v, _, server := tracked(t, Settings{Conntrack: ConntrackBypass})
	before := v.ruleset()
	v.layer.settings.Pins = ""
	v.must(v.layer.Open())
	have, err := v.layer.Read()
	v.must(err)
	want := v.layer.Plan(servedTwice(server))
	_, _, err = v.layer.Apply(have, want, v.layer.Diff(have, want, true))
	v.must(err)
	if v.ruleset() == before {
		t.Error("the bypass is not there")
	}
	v.must(v.layer.Close())
	if after := v.ruleset(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

func TestDecideOnConntrack(t *testing.T) {
	some, other := podPrefixes("10.244.0.0/16"), podPrefixes("10.245.0.0/16")
	established := nft.Use{Family: "ip", Table: "filter", Chain: "FORWARD", What: "looks at it"}
	elsewhere := established
	elsewhere.To = netip.MustParsePrefix("127.0.0.0/8")
	missing := &need.Feature{Act: "write", Feature: "nftables", Since: "an option"}
	for _, row := range []struct {
		what  string
		have  tracking
		want  untracked
		prune bool
		plan  string // the changes
		why   string
	}{
		{what: "nobody tracks", want: untracked{ConntrackAuto, some}, prune: true},
		{what: "somebody tracks", have: tracking{rules: nft.Tracking{Asked: true}}, want: untracked{"", some}, prune: true,
			plan: "+ conntrack bypass for 10.244.0.0/16"},
		{what: "it is off", have: tracking{rules: nft.Tracking{Asked: true}}, want: untracked{ConntrackKeep, some}, prune: true},
		{what: "it is forced", have: tracking{rules: nft.Tracking{Uses: []nft.Use{established}}}, want: untracked{ConntrackBypass, some}, prune: true,
			plan: "+ conntrack bypass for 10.244.0.0/16"},
		{what: "somebody needs it", have: tracking{rules: nft.Tracking{Asked: true, Uses: []nft.Use{elsewhere, established}}}, want: untracked{"", some}, prune: true,
			why: "somebody's rules need it (table ip filter, chain FORWARD: looks at it); --conntrack bypass"},
		{what: "somebody needs it elsewhere", have: tracking{rules: nft.Tracking{Asked: true, Uses: []nft.Use{elsewhere}}}, want: untracked{"", some}, prune: true,
			plan: "+ conntrack bypass for 10.244.0.0/16"},
		{what: "somebody comes to need it", have: tracking{rules: nft.Tracking{Asked: true, Uses: []nft.Use{established}}, inForce: some}, want: untracked{"", some},
			plan: "- conntrack bypass for 10.244.0.0/16", why: "somebody's rules need it"},
		{what: "no ranges", have: tracking{rules: nft.Tracking{Asked: true}}, prune: true, why: "spec.podCIDRs"},
		{what: "other ranges", have: tracking{rules: nft.Tracking{Asked: true}, inForce: other}, want: untracked{"", some}, prune: true,
			plan: "~ conntrack bypass for 10.244.0.0/16"},
		{what: "other ranges of a cluster not seen whole", have: tracking{rules: nft.Tracking{Asked: true}, inForce: other}, want: untracked{"", some},
			plan: "~ conntrack bypass for 10.244.0.0/15"},
		{what: "ranges are gone", have: tracking{rules: nft.Tracking{Asked: true}, inForce: some}, prune: true,
			plan: "- conntrack bypass for 10.244.0.0/16", why: "spec.podCIDRs"},
		{what: "ranges are gone in a cluster not seen whole", have: tracking{rules: nft.Tracking{Asked: true}, inForce: some}, why: "spec.podCIDRs"},
		{what: "somebody changed ours", have: tracking{rules: nft.Tracking{Asked: true}, inForce: some, torn: true}, want: untracked{"", some}, prune: true,
			plan: "~ conntrack bypass for 10.244.0.0/16"},
		{what: "what is left of ours", have: tracking{torn: true}, prune: true, plan: "- conntrack bypass"},
		{what: "no nftables, and nobody tracks", have: tracking{err: missing}, want: untracked{"", some}, prune: true},
		{what: "no nftables, and it is forced", have: tracking{err: missing}, want: untracked{ConntrackBypass, some}, prune: true, why: "this kernel has no nftables"},
		{what: "nothing is known", have: tracking{err: unix.EPERM, inForce: some}, want: untracked{"", other}, prune: true, why: "operation not permitted"},
	} {
		first, last := diffBypass(row.have, row.want, row.prune)
		plan := ""
		for _, change := range slices.Concat(first, last) {
			plan += change.String()
		}
		_, why := row.have.decide(row.want)
		if plan != row.plan || !strings.Contains(why, row.why) || (why == "") != (row.why == "") {
			t.Errorf("%s: %q because %q\nwant %q because %q", row.what, plan, why, row.plan, row.why)
		}
	}
}

func podPrefixes(texts ...string) (all bypass) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

func TestConntrackSettings(t *testing.T) {
	for text, want := range map[string]Conntrack{"": ConntrackAuto, "auto": ConntrackAuto, "bypass": ConntrackBypass, "keep": ConntrackKeep} {
		if got, err := ParseConntrack(text); err != nil || got != want {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	if _, err := ParseConntrack("off"); err == nil || !strings.Contains(err.Error(), "auto, bypass or keep") {
		t.Errorf("a word that is none: %v", err)
	}
	long := podPrefixes("10.0.0.0/24", "10.0.2.0/24", "10.0.4.0/24", "10.0.6.0/24", "10.0.8.0/24", "10.0.10.0/24", "10.0.12.0/24", "10.0.14.0/24", "10.0.16.0/24", "10.0.18.0/24")
	if text := long.Detail(); !strings.HasSuffix(text, "10.0.14.0/24, and 2 more") {
		t.Error(text)
	}
}

// A pod that is its own endpoint gets along with somebody's tracking, too.
func TestHairpinBesideConntrack(t *testing.T) {
	for _, setting := range []Conntrack{ConntrackKeep, ConntrackAuto} {
		t.Run(string(setting), func(t *testing.T) {
			v, _, server := tracked(t, Settings{Path: PathPacket, Conntrack: setting})
			v.open(servedTwice(server))
			for _, path := range []Path{PathSocket, PathPacket} {
				for _, way := range waysOf(path) {
					if err := server.calls(way.network, way.address, 20); err != nil {
						t.Errorf("%s path, %s %s: %v", path, way.network, way.address, err)
					}
				}
			}
			if n := v.entries(); n != 0 && setting == ConntrackAuto {
				t.Errorf("%d entries", n)
			}
		})
	}
}
