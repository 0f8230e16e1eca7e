package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/layertest"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/pod/pool"
)

// limited is more of a configuration: what containerd asks that was told rates in bits a
// second.
func limited(ingress, egress int) string {
	return fmt.Sprintf(`,"runtimeConfig":{"bandwidth":{"ingressRate":%d,"ingressBurst":4294967295,"egressRate":%d,"egressBurst":4294967295}}`, ingress, egress)
}

// addLimited gives a container its network, with limits.
func (b *town) addLimited(l *Layer, container, extra string) []netip.Addr {
	b.t.Helper()
	if b.pods[container] == "" {
		b.space(container)
	}
	result, err := l.Answer(b.t.Context(), b.request(cni.Add, container, extra))
	must(b.t, err)
	return addressesIn(result)
}

// A queue is one of the kernel's for each rate and burst, in whole ticks, through which
// the longest packet fits; and is read as what it was made of.
func TestBuckets(t *testing.T) {
	const unsaid = 1<<32 - 1
	for _, row := range []struct {
		what        string
		rate, burst uint64
		mtu         int
		want        link.TokenBucket
	}{
		{"no limit", 0, unsaid, 1500, link.TokenBucket{}},
		{"nobody says a burst", 100e6, 0, 1500, link.TokenBucket{Rate: 12_500_000, Burst: 20 * time.Millisecond, Limit: 250_000 + 312_500}},
		{"as containerd says nothing", 100e6, unsaid, 1500, link.TokenBucket{Rate: 12_500_000, Burst: 20 * time.Millisecond, Limit: 250_000 + 312_500}},
		{"as CRI-O does", 100e6, 8*unsaid - 1, 1500, link.TokenBucket{Rate: 12_500_000, Burst: 20 * time.Millisecond, Limit: 250_000 + 312_500}},
		{"a burst of 4 Mbit", 100e6, 4e6, 1500, link.TokenBucket{Rate: 12_500_000, Burst: 40 * time.Millisecond, Limit: 500_000 + 312_500}},
		{"one shorter than a packet", 100e6, 8, 1232, link.TokenBucket{Rate: 12_500_000, Burst: 100 * time.Microsecond, Limit: 1250 + 312_500}},
		{"a slow one", 1e6, 0, 6232, link.TokenBucket{Rate: 125_000, Burst: 50 * time.Millisecond, Limit: 6250 + 16*6250}},
		{"the slowest", 1e3, 0, 1482, link.TokenBucket{Rate: 125, Burst: 12 * time.Second, Limit: 1500 + 16*1500}},
		{"slower than the kernel can be told", 1e3, 0, 65535, link.TokenBucket{Rate: 125, Burst: math.MaxUint32 * link.Tick, Limit: 34_359 + 16*65_553}},
		{"the fastest", 1e15, 0, 1500, link.TokenBucket{Rate: 125_000_000_000_000, Burst: 20 * time.Millisecond, Limit: math.MaxInt32}},
	} {
		got := bucketOf(row.rate, said(row.rate, row.burst), row.mtu)
		if got.Burst%link.Tick != 0 || got.Burst-row.want.Burst > link.Tick || got.Rate != row.want.Rate || got.Limit/4 != row.want.Limit/4 {
			t.Errorf("%s: %+v, not %+v", row.what, got, row.want)
		}
		rate, burst := readBucket(got, row.mtu)
		if again := bucketOf(rate, burst, row.mtu); rate != row.rate || again != got {
			t.Errorf("%s: read as %d and %d, which makes %+v", row.what, rate, burst, again)
		}
	}
}

// What a pod receives and sends is limited whoever is at the other end, in both families:
// a pod of the node by the shortcut, the node, and who is elsewhere. "slow" has bursts that
// are shorter than the packets that TCP makes of bulk: those are cut up, not lost.
func TestLimitsHold(t *testing.T) {
	b := newTown(t)
	l := b.open(hamletRanges...)
	rates := map[string]int{"web": 20e6, "slow": 3e6}
	db := b.addLimited(l, "db", "")
	at := map[string][]netip.Addr{"db": db, "node": {node4, node6}}
	space := map[string]string{"db": b.pods["db"], "node": b.NetNS}
	for pod, rate := range rates {
		at[pod] = b.addLimited(l, pod, limited(rate, rate))
		space[pod] = b.pods[pod]
	}
	b.apply(l, hamletRanges...)
	before, err := l.Describe()
	must(t, err)
	for _, row := range []struct {
		limited, other string
		in, udp        bool
		streams        int
		family         int // 0 for IPv4
	}{
		{"web", "db", false, false, 1, 0}, {"web", "db", true, false, 4, 1}, {"web", "db", false, true, 1, 1}, {"web", "db", true, true, 1, 0},
		{"web", "node", false, false, 4, 1}, {"web", "node", true, false, 1, 0}, {"slow", "db", true, false, 1, 0}, {"slow", "node", true, false, 4, 1},
	} {
		from, to := row.limited, row.other
		if row.in {
			from, to = to, from
		}
		f := layertest.Flow{From: space[from], To: space[to], At: netip.AddrPortFrom(at[to][row.family], 7000), UDP: row.udp, Streams: row.streams, MTU: 1400}
		share, err := f.Near(float64(rates[row.limited]), 500*time.Millisecond)
		if err != nil {
			t.Errorf("%d streams (UDP: %v) from %s to %s at %s: %v", row.streams, row.udp, from, to, f.At, err)
		}
		t.Logf("%d streams (UDP: %v) from %s to %s at %s: %.2f of the limit", row.streams, row.udp, from, to, f.At, share)
	}
	after, err := l.Describe()
	must(t, err)
	if before.Degraded == nil && (after.Reasons["device"] == before.Reasons["device"] || after.Reasons["direct"] == before.Reasons["direct"]) {
		t.Errorf("to a limited pod packets go by the device, from it at once: %v", after.Reasons)
	}
}

// Limits are there as long as the pod: CHECK looks at both, the agent puts back what is the
// node's, an ADD that comes again all of it; an agent that is new, and one that has lost
// its file, know them. A queue that somebody else has put there stays.
func TestLimitsAreKept(t *testing.T) {
	b := newTown(t)
	l := b.open(hamletRanges...)
	asked := limited(20e6, 1e6)
	b.addLimited(l, "web", asked)
	b.addLimited(l, "db", "")
	b.apply(l, hamletRanges...)
	run := exec.Command("sleep", "600") // a namespace is found by its processes
	must(t, netns.Do(b.pods["web"], run.Start))
	t.Cleanup(func() { _ = run.Process.Kill(); _ = run.Wait() })

	if got := b.queues("db"); got[0] != (link.TokenBucket{}) || got[1] != got[0] {
		t.Errorf("a pod without limits has the queues %+v", got)
	}
	want := [2]link.TokenBucket{bucketOf(20e6, 0, 1400), bucketOf(1e6, 0, 1400)}
	keeps := func(when string) {
		t.Helper()
		if got := b.queues("web"); got != want {
			t.Errorf("%s the queues are %+v, not %+v", when, got, want)
		}
		if err := second(l.Answer(t.Context(), b.request(cni.Check, "web", asked))); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		pods := b.look(l)
		if !slices.ContainsFunc(pods, func(p *Pod) bool {
			return p.Container == "web" && p.Bandwidth == pool.Bandwidth{IngressRate: 20e6, EgressRate: 1e6}
		}) {
			t.Errorf("%s the pods are said to be %s", when, asJSON(t, pods))
		}
	}
	keeps("at first")
	// The plug-in bandwidth, behind ours, does not put its own in its place.
	if err := b.addQueue("web", link.TokenBucket{Rate: 1e6, Burst: time.Second, Limit: 1e6}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("a second queue at the node's end: %v", err)
	}

	b.dropQueue("web")
	if err := second(l.Answer(t.Context(), b.request(cni.Check, "web", asked))); err == nil || !strings.Contains(err.Error(), "missing is the limit of what the pod receives (tbf) at mr") {
		t.Errorf("CHECK says %v", err)
	}
	if changes := b.apply(l, hamletRanges...); len(changes) != 1 || !strings.HasPrefix(changes[0].String(), "~ pod shop/web at mr") {
		t.Errorf("the changes are\n%v", changes)
	}
	keeps("put back,")
	must(t, netns.Do(b.pods["web"], func() error { return exec.Command("tc", "qdisc", "del", "dev", "eth0", "root").Run() }))
	if err := second(l.Answer(t.Context(), b.request(cni.Check, "web", asked))); err == nil || !strings.Contains(err.Error(), "missing is the limit of what the pod sends (tbf) at eth0 of the pod") {
		t.Errorf("CHECK says %v", err)
	}
	b.addLimited(l, "web", asked)
	b.apply(l, hamletRanges...)
	keeps("added again,")

	must(t, l.Close())
	l = b.open(hamletRanges...)
	keeps("with a new agent,")
	must(t, l.Close())
	must(t, os.Remove(b.settings.file().Path))
	l = b.open(hamletRanges...)
	keeps("after the loss of the file")

	other := link.TokenBucket{Rate: 1e6, Burst: time.Second, Limit: 1e6}
	b.dropQueue("web")
	must(t, b.addQueue("web", other))
	b.apply(l, hamletRanges...)
	if got := b.queues("web"); got[0] != other {
		t.Errorf("somebody else's queue is %+v", got[0])
	}
}

// inTown is the plugin for a runtime's library, which asks the layer without a socket. It
// implements invoke.Exec.
type inTown struct {
	version.PluginDecoder
	b *town
	l *Layer
}

func (*inTown) FindInPath(plugin string, _ []string) (string, error) { return plugin, nil }

func (i *inTown) ExecPlugin(ctx context.Context, _ string, config []byte, environment []string) ([]byte, error) {
	said := func(name string) string {
		at := slices.IndexFunc(environment, func(pair string) bool { return strings.HasPrefix(pair, name+"=") })
		return environment[at][len(name)+1:]
	}
	r := i.b.request(said("CNI_COMMAND"), said("CNI_CONTAINERID"), "")
	r.Config = config
	result, err := i.l.Answer(ctx, r)
	if err != nil || result == nil {
		return nil, err
	}
	return json.Marshal(result)
}

// The list that the agent installs has a runtime say a pod's bandwidth: by libcni, as
// containerd and CRI-O read it, with what containerd gives it.
func TestTheListAsksForLimits(t *testing.T) {
	b := newTown(t)
	b.withFolders()
	l := b.open(hamletRanges...)
	text, err := os.ReadFile(string(b.settings.files()[1]))
	must(t, err)
	list, err := libcni.NetworkConfFromBytes(text)
	must(t, err)
	asked := map[string]uint64{"ingressRate": 20e6, "ingressBurst": 1<<32 - 1, "egressRate": 1e6, "egressBurst": 1<<32 - 1}
	pod := &libcni.RuntimeConf{ContainerID: "web", NetNS: b.space("web"), IfName: "eth0", CapabilityArgs: map[string]any{"bandwidth": asked}}
	runtime := libcni.NewCNIConfigWithCacheDir(nil, t.TempDir(), &inTown{b: b, l: l})
	if _, err := runtime.AddNetworkList(t.Context(), list, pod); err != nil {
		t.Fatal(err)
	}
	if got := b.queues("web"); got != [2]link.TokenBucket{bucketOf(20e6, 0, 1400), bucketOf(1e6, 0, 1400)} {
		t.Errorf("its queues are %+v", got)
	}
	must(t, runtime.CheckNetworkList(t.Context(), list, pod))
	must(t, runtime.DelNetworkList(t.Context(), list, pod))
}

// look are the pods as `millrace show pods` has them.
func (b *town) look(l *Layer) []*Pod {
	b.t.Helper()
	picture, err := l.Look()
	must(b.t, err)
	return picture.(*Picture).Pods()
}

// queues are those by which a pod receives and sends.
func (b *town) queues(container string) (both [2]link.TokenBucket) {
	b.t.Helper()
	for i, at := range []struct{ space, device string }{{b.NetNS, deviceName(pool.Key{Container: container, Interface: "eth0"})}, {b.pods[container], "eth0"}} {
		n, err := link.Open(at.space)
		must(b.t, err)
		defer n.Close()
		index, err := n.Index(at.device)
		must(b.t, err)
		all, err := n.Qdiscs()
		must(b.t, err)
		both[i] = all[index].Bucket
	}
	return both
}

// dropQueue removes the queue at the node's end of a pod's device.
func (b *town) dropQueue(container string) {
	b.t.Helper()
	name := deviceName(pool.Key{Container: container, Interface: "eth0"})
	must(b.t, b.Inside(func() error { return exec.Command("tc", "qdisc", "del", "dev", name, "root").Run() }))
}

// addQueue puts one there as the plug-in bandwidth does
// (https://github.com/containernetworking/plugins/blob/main/plugins/meta/bandwidth/ifb_creator.go).
func (b *town) addQueue(container string, q link.TokenBucket) error {
	return b.Inside(func() error {
		return netlink.QdiscAdd(&netlink.Tbf{
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: b.device(container), Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			Rate:       q.Rate, Limit: q.Limit, Buffer: uint32(q.Burst / link.Tick),
		})
	})
}

// A device that comes to take longer packets has bursts through which those fit; what
// somebody has put in the place of a queue stays.
func TestLimitsOfAGrownDevice(t *testing.T) {
	b := newTown(t)
	l := b.open(hamletRanges...)
	b.addLimited(l, "web", limited(1e6, 20e6))
	b.apply(l, hamletRanges...)
	run := exec.Command("sleep", "600")
	must(t, netns.Do(b.pods["web"], run.Start))
	t.Cleanup(func() { _ = run.Process.Kill(); _ = run.Wait() })
	n, err := link.Open(b.NetNS)
	must(t, err)
	defer n.Close()
	uplink, err := n.Index("uplink")
	must(t, err)
	must(t, n.SetMTU(uplink, 9000))
	b.apply(l, hamletRanges...)
	if got := b.queues("web"); got != [2]link.TokenBucket{bucketOf(1e6, 0, 9000), bucketOf(20e6, 0, 9000)} {
		t.Errorf("the device has grown, and the queues are %+v", got)
	}
	other := link.TokenBucket{Rate: 1e6, Burst: time.Second, Limit: 1e6}
	b.dropQueue("web")
	must(t, b.addQueue("web", other))
	must(t, n.SetMTU(uplink, 30000))
	b.apply(l, hamletRanges...)
	if got := b.queues("web"); got != [2]link.TokenBucket{other, bucketOf(20e6, 0, 30000)} {
		t.Errorf("the device has grown, somebody else has a queue there, and the queues are %+v", got)
	}
}

// What cannot be limited is refused, with what to do, and leaves nothing.
func TestLimitsThatCannotBeKept(t *testing.T) {
	b := newTown(t)
	l := b.open(hamletRanges...)
	before := b.observe()
	b.space("web")
	for _, row := range []struct {
		extra string
		code  uint
		says  string
	}{
		{limited(999, 0), types.ErrInvalidNetworkConfig, "limit the bandwidth of pod shop/web: ingressRate is 999 bits a second"},
		{limited(0, 2e15), types.ErrInvalidNetworkConfig, "egressRate is 2000000000000000 bits a second, and has to be from 1k to 1P: set the pod's annotations"},
		{`,"runtimeConfig":{"bandwidth":{"ingressRate":-1}}`, types.ErrDecodingFailure, "ingressRate"},
	} {
		err := second(l.Answer(t.Context(), b.request(cni.Add, "web", row.extra)))
		if code(t, err) != row.code || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v, code %d", row.extra, err, code(t, err))
		}
	}
	if after := b.observe(); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if err := second(l.Answer(t.Context(), b.request(cni.Del, "web", limited(999, 0)))); err != nil {
		t.Errorf("DEL of what was never made: %v", err)
	}
	// as a kernel says it that has no tbf: net/sched/sch_api.c, qdisc_create
	if err := withoutBuckets(fmt.Errorf("give link 7 a queue that limits (tbf): %w", unix.ENOENT)); !strings.Contains(err.Error(), "`modprobe sch_tbf`") || !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
	if text, err := json.Marshal(Pod{}); err != nil || strings.Contains(string(text), "bandwidth") {
		t.Errorf("a pod without limits is %s, %v", text, err)
	}
}
