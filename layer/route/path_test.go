package route

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/probe"
)

// A measurement that ends without a result says nothing against an earlier one; what an
// earlier process left is believed until somebody looked, and kept if nothing is heard
// because packets come and go.
func TestWhatIsKnownOfPaths(t *testing.T) {
	to, device := netip.MustParseAddr("192.0.2.2"), 2
	var answer probe.Path
	var failed error
	p := newPaths("")
	p.mtu = func(_ context.Context, _ string, _ netip.Addr, most int) (probe.Path, error) {
		answer.Tried = most
		return answer, failed
	}
	picture := newPicture()
	picture.facts = segment()
	row := &Row{To: netip.MustParsePrefix("10.244.2.0/24"), Via: to, Direct: true, index: device, set: 1350}
	picture.rows[row.To] = row
	picture.measure()
	p.takeOver(picture)
	passed := func(n int) func() { return func() { answer, failed = probe.Path{Passed: n}, nil } }
	fails := func(err error) func() { return func() { answer, failed = probe.Path{}, err } }
	mtu := func(n int) func() {
		return func() { picture.facts.devices[device] = fact{name: "eth0", mtu: n, ethernet: true} }
	}
	for _, step := range []struct {
		what   string
		do     func()
		differ bool
		narrow int
	}{
		{"an earlier process' is believed, if nothing can be sent", fails(fmt.Errorf("open a socket: %w", probe.ErrUnsent)), false, 1350},
		{"and while answers come and go", fails(errors.New("answers come and go")), false, 1350},
		{"and forgotten, if nobody answers", fails(probe.ErrSilent), true, 0},
		{"all passes", passed(1500), false, 0},
		{"less passes", passed(1400), true, 1400},
		{"still", passed(1400), false, 1400},
		{"a router says so now", func() { answer, failed = probe.Path{Passed: 1400, Announced: 1400}, nil }, true, 1400},
		{"the node is off", fails(probe.ErrSilent), false, 1400},
		{"it may be measured again", passed(1380), true, 1380},
		{"the uplink takes less by itself", func() { mtu(1300)(); passed(1300)() }, true, 0},
	} {
		step.do()
		p.aim(picture)
		if differ := p.measure(t.Context(), p.due(true)); differ != step.differ || p.all()[to].narrow() != step.narrow {
			t.Errorf("%s: differs: %v; known is %+v", step.what, differ, p.all()[to])
		}
	}
	if due := p.due(false); len(due) > 0 {
		t.Errorf("measured, and still to do: %v", due)
	}
	mtu(9000)()
	p.aim(picture)
	if due := p.due(false); fmt.Sprint(due) != "[192.0.2.2]" || len(p.news) != 1 {
		t.Errorf("the uplink takes more, and to be measured is %v", due)
	}
	delete(picture.rows, row.To)
	p.aim(picture)
	if len(p.all()) > 0 || p.learn(to, measurement{Path: probe.Path{Tried: 9000, Passed: 1400}, most: 9000}, nil) {
		t.Errorf("the node has gone, and known is %v", p.all())
	}
}

// Measuring ends when all that it began has, also where it is to end early.
func TestMeasuringWaits(t *testing.T) {
	p := newPaths("")
	var running atomic.Int32
	ctx, end := context.WithCancel(t.Context())
	p.mtu = func(ctx context.Context, _ string, _ netip.Addr, _ int) (probe.Path, error) {
		if running.Add(1) == pathsAtOnce {
			end()
		}
		defer running.Add(-1)
		<-ctx.Done()
		time.Sleep(20 * time.Millisecond)
		return probe.Path{}, ctx.Err()
	}
	for i := range byte(3 * pathsAtOnce) {
		p.aims[netip.AddrFrom4([4]byte{192, 0, 2, i})] = aim{most: 1500}
	}
	if p.measure(ctx, p.due(true)) || running.Load() > 0 {
		t.Errorf("it ended, and %d measurements run", running.Load())
	}
}

// An agent that may not open raw sockets says so, and changes nothing of what the one
// before it had measured.
func TestPathsWithoutRawSockets(t *testing.T) {
	v := newValley(t, ModeVXLAN, false)
	v.takes(1400)
	v.silence(true)
	before := v.layers[0]
	before.paths.measure(t.Context(), before.paths.due(true))
	v.refresh(0)
	before.paths.measure(t.Context(), before.paths.due(true))
	v.refresh(0)
	if d, err := before.Describe(); err != nil || strings.Contains(fmt.Sprint(d.Degraded), "is not measured") {
		t.Errorf("an agent that may says %q, %v", d.Degraded, err)
	}
	must(t, before.Close())
	const kept = "ip route show proto 110 10.244.2.0/24 | grep -qw 'mtu 1350'"
	v.sh(v.nodes[0], kept)
	c := exec.Command(os.Args[0], "-test.run", "^TestAsAgentWithoutRawSockets$", "-test.v")
	c.Env = append(os.Environ(), "WITHOUT_RAW="+v.nodes[0], "PINS="+v.settings[0].Pins)
	var said []byte
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: whatever it starts from now on lacks the capability
		err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_RAW, 0, 0, 0)
		if err == nil {
			said, err = c.CombinedOutput()
		}
		ended <- err
	}()
	if err := <-ended; err != nil || !strings.Contains(string(said), "how long packets to other nodes may be is not measured, of 1 (the first is 192.0.2.2): open a raw socket, which takes CAP_NET_RAW: operation not permitted") {
		t.Errorf("the next one, without CAP_NET_RAW: %v\n%s", err, said)
	}
	v.sh(v.nodes[0], kept)
}

// TestAsAgentWithoutRawSockets is that agent, in a process of its own: a capability is
// taken from all its threads.
func TestAsAgentWithoutRawSockets(t *testing.T) {
	space := os.Getenv("WITHOUT_RAW")
	if space == "" {
		return
	}
	v := &valley{village: &village{t: t}}
	v.settings[0] = Settings{Node: "n1", Mode: ModeVXLAN, Netns: space, Pins: os.Getenv("PINS")}
	l := v.start(0)
	v.layers[0] = l
	l.paths.measure(t.Context(), l.paths.due(true))
	v.refresh(0)
	d, err := l.Describe()
	must(t, err)
	t.Log(strings.Join(d.Degraded, "\n"))
}
